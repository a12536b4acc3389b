#!/bin/sh
# planted_race.sh COMMAND... - succeeds if ThreadSanitizer reports the race that was planted in rpc_server.c (RPC_PLANT_RACE).
out=$("$@" 2>&1)
case $out in
*"ThreadSanitizer: data race"*rpc_server.c*) exit 0 ;;
esac
echo "$out" | tail -n 40
echo "the planted race was not reported" >&2
exit 1
