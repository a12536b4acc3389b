# cmake -DIN=x.proto -DOUT=y.proto -P derive_proto.cmake - the variant of a .proto that protoc-c reads.
# `optional T x = n;` becomes a oneof of one, which is what proto3 makes of it; a string whose remark begins with [counted] becomes
# bytes, so that C keeps its length. Neither changes a byte on the wire.
file(READ ${IN} text)
string(REGEX REPLACE "(\n *)optional ([A-Za-z0-9_.]+) ([a-z0-9_]+) = ([0-9]+);" "\\1oneof _\\3 { \\2 \\3 = \\4; }" text "${text}")
string(REGEX REPLACE "string ([a-z0-9_]+ = [0-9]+; *// \\[counted\\])" "bytes \\1" text "${text}")
file(WRITE ${OUT} "${text}")
