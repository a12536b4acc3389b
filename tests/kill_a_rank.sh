#!/bin/bash
# kill_a_rank.sh MPI_EXCHANGE - three ranks exchange without end; one is killed. Then: exactly one survivor says who died, all processes
# are gone within five seconds, and nothing is left in /dev/shm. The same with SIGTERM for all: one sentence says so.
set -u
program=$1
here=$(dirname "$0")
out=$(mktemp)
pids= job=
trap 'kill -9 $pids $job 2>/dev/null; rm -f "$out"' EXIT
export CONVOKE_MPI_SECONDS=60

fail()
{
    echo "kill_a_rank.sh: $*" >&2
    cat "$out" >&2
    exit 1
}

start() # ranks_per_node
{
    : >"$out"
    "$here/run_mpi.sh" 3 "$program" forever "$1" >"$out" 2>&1 &
    job=$!
    for _ in $(seq 200); do
        [ "$(grep -c '^running' "$out")" = 3 ] && break
        sleep 0.1
    done
    [ "$(grep -c '^running' "$out")" = 3 ] || fail "three ranks did not get under way"
    pids=$(awk '/^running/ {print $3}' "$out")
    victim=$(awk '/^running 1 / {print $3}' "$out")
    segments=$(for p in $pids; do grep -o '/dev/shm/[^ ]*' "/proc/$p/maps"; done | sort -u)
    echo "$segments" | grep -q convoke || fail "the ranks share no window"
    ls /dev/shm/ | grep -F "$(echo "$segments" | grep convoke | head -1 | cut -d- -f2)" && fail "a window still has its name while ranks run"
    begin=$(date +%s%N)
}

all_gone()
{
    wait "$job"
    for p in $pids; do
        while kill -0 "$p" 2>/dev/null && (($(date +%s%N) - begin < 5000000000)); do sleep 0.05; done
        kill -0 "$p" 2>/dev/null && fail "process $p outlived the job"
    done
    (($(date +%s%N) - begin < 5000000000)) || fail "it took more than five seconds to end"
    for s in $segments; do
        [ -e "$s" ] && fail "$s was left behind"
    done
}

start 0
kill -9 "$victim"
all_gone
[ "$(grep -c "rank 1 (pid $victim, host .*) died while rank [02] waited for" "$out")" = 1 ] ||
    fail "not exactly one survivor said that rank 1 died"

start 1 # every rank a node of its own: peers cannot see the death, mpirun tells them
kill -9 "$victim"
all_gone
grep -q "told to stop while rank [02] (host .*) waited for .* for [0-9.]* s" "$out" || fail "no survivor said what it waited for"

start 0
kill -TERM $pids
all_gone
[ "$(grep -c 'told to stop while rank' "$out")" = 1 ] || fail "not exactly one rank said that it was told to stop"
echo ok
