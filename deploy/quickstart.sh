#!/bin/sh
# quickstart.sh [RANKS] - from a fresh clone to tokens: packages, build, and the bundled model over RANKS (2) processes.
set -eu
cd "$(dirname "$0")/.."
ranks=${1:-2}
model=deploy/models/convoke-demo

deploy/install-packages.sh build
mkdir -p build
build_log=build/quickstart.log
[ -f build/build.ninja ] || cmake -S . -B build -G Ninja >"$build_log" 2>&1 || { tail -n 20 "$build_log" >&2; exit 1; }
echo "build: build/convoke-score"
cmake --build build --target convoke-score >"$build_log" 2>&1 || { tail -n 40 "$build_log" >&2; exit 1; }

set -- deploy/mpirun.sh -np "$ranks" build/convoke-score --model "$model" --input "$model/texts.jsonl" --greedy 32
echo "run: $*"
exec "$@"
