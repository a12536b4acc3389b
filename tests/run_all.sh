#!/bin/bash
# run_all.sh [--quick] - everything a change must pass, one line per stage, the end of the log where one fails.
#   packages; build with warnings as errors; all tests; then, unless --quick: the tests again under AddressSanitizer and UBSan, the
#   threads of worker and coordinator under ThreadSanitizer, and every fuzzer for CONVOKE_FUZZ_SECONDS (20).
# Builds lie in build-test, build-asan, build-tsan and build-fuzz; logs in build-test/logs.
set -euo pipefail
cd "$(dirname "$0")/.."
quick=
case ${1:-} in
"") ;;
--quick) quick=yes ;;
*)
    echo "usage: run_all.sh [--quick]" >&2
    exit 2
    ;;
esac
jobs=$(nproc)
logs=$PWD/build-test/logs
mkdir -p "$logs"
exec </dev/null

# stage NAME COMMAND...: the command's output goes to a log.
stage() {
    local name=$1 start=$SECONDS log
    shift
    log=$logs/${name// /-}.log
    printf '%-36s' "$name"
    if "$@" >"$log" 2>&1; then
        printf 'ok %5d s  %s\n' $((SECONDS - start)) "$(remark "$log")"
        return
    fi
    printf 'FAILED after %d s; the end of %s:\n' $((SECONDS - start)) "${log#"$PWD"/}"
    tail -n 80 "$log"
    exit 1
}

# What is worth saying about a stage that went well: how many tests, and which did not run.
remark() {
    local total skipped again
    total=$(sed -n 's/^100% tests passed, 0 tests failed out of \([0-9]*\)$/\1 tests/p' "$1" | tail -n 1)
    skipped=$(sed -n 's/^[[:space:]]*[0-9]* - \([^ ]*\) (Skipped)$/\1/p' "$1" | sort -u | tr '\n' ' ')
    again=$(sed -n -E 's/^ *[0-9]+\/[0-9]+ Test +#[0-9]+: ([^ ]+) .*\*\*\*(Failed|Timeout|Exception).*/\1/p' "$1" | sort -u | tr '\n' ' ')
    echo "$total${skipped:+, skipped: $skipped}${again:+, passed only the second time: $again}"
}

# configure FOLDER OPTIONS...
configure() {
    cmake -S . -B "$1" -G Ninja -DCONVOKE_WERROR=ON "${@:2}"
}

# Some tests are about time (a hang, an end within seconds) and the machine may be shared: a second try, which is said.
run_tests() {
    ctest --test-dir "$1" -j "$jobs" --output-on-failure --timeout 300 --repeat until-pass:2 "${@:2}"
}

thread_tests='^(test_thread_pool|test_journal|test_metrics|test_door_http|test_generate|test_requests|test_job|test_live_plan|test_replanner|test_control_server|test_supervision|door|door_planted_race)$'

# gcc's ThreadSanitizer does not start where the kernel randomises addresses widely: then without randomisation.
run_thread_tests() {
    local out
    if out=$(run_tests build-tsan -R "$thread_tests" 2>&1); then
        echo "$out"
        return
    fi
    echo "$out"
    grep -q 'unexpected memory mapping' <<<"$out" && setarch -R ctest --test-dir build-tsan -R "$thread_tests" --output-on-failure
}

fuzz_one() {
    local name=${1#fuzz_} found
    found=$(mktemp -d)
    local seeds=()
    [ -d "tests/data/fuzz/$name" ] && seeds=("tests/data/fuzz/$name")
    "build-fuzz/tests/$1" -max_total_time="${CONVOKE_FUZZ_SECONDS:-20}" -timeout=20 -rss_limit_mb=3000 -max_len=16384 \
        -artifact_prefix="build-fuzz/$1-" "$found" "${seeds[@]}" 2>&1
    local rc=$?
    rm -rf "$found"
    return $rc
}
export -f fuzz_one

fuzz_all() {
    printf '%s\n' "${fuzzers[@]}" | xargs -P "$jobs" -I{} bash -c 'fuzz_one {}'
}

fuzzers=()
for source in tests/fuzz_*.c; do
    source=${source#tests/}
    fuzzers+=("${source%.c}")
done

stage "packages" deploy/install-packages.sh test
stage "configure" configure build-test
stage "build" cmake --build build-test
stage "tests" run_tests build-test
if [ -z "$quick" ]; then
    stage "asan configure" configure build-asan -DCONVOKE_SANITIZE=address,undefined
    stage "asan build" cmake --build build-asan
    stage "asan tests" run_tests build-asan
    if [ -f tests/test_thread_pool.c ]; then
        stage "tsan configure" configure build-tsan -DCONVOKE_SANITIZE=thread
        stage "tsan build" cmake --build build-tsan --target test_thread_pool door_fake door_race \
            test_journal test_metrics test_door_http test_generate test_requests test_job test_live_plan test_replanner test_control_server test_supervision fake_worker
        stage "tsan tests" run_thread_tests
    fi
    if command -v clang >/dev/null; then
        stage "fuzz configure" configure build-fuzz -DCMAKE_C_COMPILER=clang -DCONVOKE_FUZZ=ON -DCONVOKE_SANITIZE=address,undefined
        stage "fuzz build" cmake --build build-fuzz --target "${fuzzers[@]}"
        stage "fuzz" fuzz_all
    fi
fi
echo "all passed in $SECONDS s"
