#!/bin/sh
# quickstart.sh [RANKS] - from a fresh clone to an answer: packages, build, the bundled model served by RANKS (2) workers, and a client that asks it something.
set -eu
cd "$(dirname "$0")/.."
ranks=${1:-2}
model=deploy/models/convoke-demo

deploy/install-packages.sh build
mkdir -p build
build_log=build/quickstart.log
[ -f build/build.ninja ] || cmake -S . -B build -G Ninja -DBUILD_TESTING=OFF >"$build_log" 2>&1 || { tail -n 20 "$build_log" >&2; exit 1; }
echo "build: build/convoke, build/convoke-worker, build/convoke-score, build/convoke-plan, build/convoke-probe"
cmake --build build --target convoke convoke-worker convoke-score convoke-plan convoke-probe >"$build_log" 2>&1 || { tail -n 40 "$build_log" >&2; exit 1; }

serve="build/convoke serve --model $model --ranks $ranks"
echo "serve: $serve"
said=build/quickstart-serve.out
: >"$said"
$serve --grpc 127.0.0.1:0 >"$said" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until grep -q '^ready: ' "$said"; do
    kill -0 $server 2>/dev/null || exit 1
    sleep 0.05
done
cat "$said"
address=$(sed -n 's/^ready: grpc \([^,]*\),.*/\1/p' "$said")
prompt='Question: A farmer has 12 cows and buys 5 more. How many cows does he have?'
echo "ask: build/convoke generate --connect $address --max-tokens 80 --seed 1 --stats \"$prompt\""
build/convoke generate --connect "$address" --max-tokens 80 --seed 1 --stats "$prompt"
kill -TERM $server
wait $server
trap - EXIT
