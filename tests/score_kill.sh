#!/bin/bash
# score_kill.sh CONVOKE_SCORE MODEL LINES - one of three ranks is killed in the middle of a run: within five seconds the job is over with exit
# code 137 and one survivor has said who died.
set -u
program=$1 model=$2 lines=$3
here=$(dirname "$0")
out=$(mktemp -d)
job=
trap 'kill -9 $job 2>/dev/null; rm -rf "$out"' EXIT
export CONVOKE_MPI_SECONDS=120
"$here/run_mpi.sh" 3 "$program" --model "$model" --input "$lines" --greedy 60 --threads 1 --routing "$out/trace" >"$out/stdout" 2>"$out/stderr" &
job=$!
victim=
for _ in $(seq 600); do # rank 1 maps the windows of the group and, last before the step loop, of the exchange
    victim=$(for p in $(pgrep -f -- "--routing $out/trace"); do tr '\0' '\n' <"/proc/$p/environ" 2>/dev/null | grep -qx 'OMPI_COMM_WORLD_RANK=1' && echo "$p"; done | head -1)
    [ -n "$victim" ] && [ "$(grep -o '/dev/shm/convoke[^ ]*' "/proc/$victim/maps" 2>/dev/null | sort -u | wc -l)" -ge 4 ] && break
    sleep 0.05
done
sleep 0.3
begin=$(date +%s%N)
kill -9 "$victim" || { echo "rank 1 was not there to be killed" >&2; cat "$out/stderr" >&2; exit 1; }
wait $job
rc=$?
took=$((($(date +%s%N) - begin) / 1000000))
[ $rc = 137 ] || [ $rc = 1 ] || { echo "exit code $rc" >&2; cat "$out/stderr" >&2; exit 1; }
[ $took -lt 5000 ] || { echo "it took $took ms to end" >&2; exit 1; }
[ "$(grep -c "rank 1 (pid $victim, host .*) died while rank [02] waited" "$out/stderr")" = 1 ] || { echo "no survivor said who died" >&2; cat "$out/stderr" >&2; exit 1; }
[ -e "$out/trace" ] && { echo "a half-written trace was left" >&2; exit 1; }
echo "ok, $took ms"
