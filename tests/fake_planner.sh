#!/bin/bash
# fake_planner.sh COMMAND ... - what tests run in convoke-plan's place. $FAKE_PLANNER_DIR/mode says what `solve` does:
#   good      copies $FAKE_PLANNER_DIR/plan.json to -o
#   rubbish   prints and writes rubbish
#   nothing   succeeds without a plan
#   fail      says why and ends with code 1
#   crash     is killed by a signal of its own
#   hang      never ends, deaf to SIGTERM, with a child that would live on
#   flood     prints without end
# `diff` prints $FAKE_PLANNER_DIR/diff.json, or fails when there is none. What it was called with goes to $FAKE_PLANNER_DIR/calls.
set -u
dir=$FAKE_PLANNER_DIR
echo "$*" >>"$dir/calls"
if [ "$1" = diff ]; then
    [ -e "$dir/diff.json" ] && exec cat "$dir/diff.json"
    echo "convoke-plan: unknown command \"diff\"" >&2
    exit 2
fi
statistics= output= topology= present=
while [ $# -gt 1 ]; do
    case $1 in
    --stats) statistics=$2 ;;
    --topology) topology=$2 ;;
    --seed-plan) present=$2 ;;
    -o) output=$2 ;;
    esac
    shift
done
dirname "$output" >"$dir/folder"
nice >"$dir/niceness"
[ -s "$statistics" ] && [ -s "$topology" ] && [ -s "$present" ] || { echo "an input is missing" >&2; exit 1; }
case $(cat "$dir/mode") in
good) cp "$dir/plan.json" "$output" && echo "planned" ;;
rubbish) echo '{{{'; head -c 5000 /dev/urandom >"$output" ;;
nothing) ;;
fail) printf 'thinking\nconvoke-plan: no plan keeps this slack\n' >&2; exit 1 ;;
crash) kill -SEGV $$ ;;
hang)
    trap '' TERM
    echo $$ >"$dir/pids"
    echo "thinking hard"
    sleep 1000 &
    echo $! >>"$dir/pids"
    while :; do sleep 1000; done
    ;;
flood) exec yes "all work and no play" ;;
esac
