#!/bin/bash
# score_two_hosts.sh CONVOKE_SCORE MODEL LINES - what two "hosts" (network namespaces) of two ranks compute is what one rank computes, byte
# for byte, in exact and fixed; and rows did cross. Exit code 77 where such hosts cannot be made (two_hosts.sh says why).
set -u
program=$1 model=$2 lines=$3
here=$(dirname "$0")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for mode in exact fixed; do
    options=(--model "$model" --input "$lines" --combine $mode --greedy 8 --threads 1 --json)
    "$program" "${options[@]}" --logits "$out/one" >"$out/one.json" || exit 1
    "$here/two_hosts.sh" 2 "$program" "${options[@]}" --logits "$out/four" >"$out/four.json"
    rc=$?
    [ $rc = 0 ] || exit $rc
    cmp "$out/one" "$out/four" || exit 1
    grep -q '"nodes":2' "$out/four.json" || { echo "not two nodes" >&2; exit 1; }
    grep -q '"row_bytes_cross_node":0,' "$out/four.json" && { echo "no row crossed" >&2; exit 1; }
done
echo ok
