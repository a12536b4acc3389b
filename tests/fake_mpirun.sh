#!/bin/bash
# fake_mpirun.sh -np N [OPTIONS] WORKER ARGS... - what the job's tests start in mpirun's place: the worker once, told how many ranks it is
# to be, in a process group of its own; on its death mpirun's announcement and its exit code. $FAKE_WORKER_DIR/args keeps the
# command line, so that a test can look for what must not stand there.
set -u
printf '%s\n' "$0 $*" >>"$FAKE_WORKER_DIR/args"
echo $$ >>"$FAKE_WORKER_DIR/pids"
echo $$ >"$FAKE_WORKER_DIR/mpirun"
ranks=1
while [ $# -gt 0 ]; do
    case $1 in
    -np) ranks=$2; shift 2 ;;
    --hostfile) cp "$2" "$FAKE_WORKER_DIR/hostfile"; shift 2 ;;
    --mca) shift 3 ;;
    -*) shift ;;
    *) break ;;
    esac
done
program=$1
shift
[ "${3:-}" = --secret-file ] && cp -p "$4" "$FAKE_WORKER_DIR/seen-secret"
if [ "$program" = /bin/true ]; then # a host is probed
    ! grep -q "$(sed -n '1s/ .*//p' "$FAKE_WORKER_DIR/hostfile")" "$FAKE_WORKER_DIR/lost" 2>/dev/null
    exit
fi
set -m
"$program" "$ranks" "$@" </dev/null &
worker=$!
set +m
trap 'kill -TERM $worker 2>/dev/null' TERM
wait $worker
code=$?
while kill -0 $worker 2>/dev/null; do wait $worker; code=$?; done
if [ $code -ne 0 ]; then
    line=--------------------------------------------------------------------------
    printf '%s\nmpirun detected that one or more processes exited with non-zero status, thus causing\nthe job to be terminated.\n%s\n' $line $line >&2
fi
exit $code
