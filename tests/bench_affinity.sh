#!/bin/bash
# bench_affinity.sh BUILD [PLAN.json] - what owners by affinity save on the link between two hosts: the bundled model on 4 ranks over two
# network namespaces, six domains mixed, half of the texts to plan on, the other half run.
#
#   RATE=1gbit    of the link       NEW=64     tokens each text is continued by
#   BATCH=24      sequences at once ROUNDS=3   of each setting, in turn
#   SOLVE="..."   further arguments of `convoke-plan solve`, where no plan is given (--extra-slots 2)
#   FITTED=1      plan on all texts, those of the run among them
# Bytes are rows out and back and moved keys and values between nodes. Needs what two_hosts.sh needs.
set -eu
build=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
plan=${2:-}
model=$here/../deploy/models/convoke-demo
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export TWO_HOSTS_RATE=${RATE:-1gbit}
new=${NEW:-64} batch=${BATCH:-24}

"$build/convoke" tokenize --model "$model" "$model/texts.jsonl" >"$out/tokens.jsonl"
python3 "$here/bench_affinity.py" mix "$model/texts.jsonl" "$out/tokens.jsonl" "$out/fit.jsonl" "$out/held.jsonl"
"$here/two_hosts.sh" 2 "$build/convoke-probe" --model "$model" --threads 1 --seconds 2 -o "$out/topology.json"
if [ -z "$plan" ]; then
    plan=$out/plan.json
    python3 "$here/bench_affinity.py" links "$out/topology.json" "$out/links.json"
    [ -z "${FITTED:-}" ] || cat "$out/held.jsonl" >>"$out/fit.jsonl"
    "$build/convoke-score" --model "$model" --input "$out/fit.jsonl" --greedy "$new" --routing "$out/fit.trace" >/dev/null
    # shellcheck disable=SC2086 # SOLVE is words
    "$build/convoke-plan" solve --trace "$out/fit.trace" --topology "$out/links.json" --owner affinity --node-dedupe --solver affinity \
        --replica-choice share --bounds none --folds 0 --concurrency "$batch" --seconds 30 ${SOLVE:-} -o "$plan"
fi

run() # NAME ROUND ARGUMENTS...
{
    local file="$out/$1@$2.json"
    shift 2
    "$here/two_hosts.sh" 2 "$build/convoke-score" --model "$model" --input "$out/held.jsonl" --greedy "$new" --batch "$batch" --threads 1 \
        --topology "$out/topology.json" --json "$@" >"$file"
}
for round in $(seq "${ROUNDS:-3}"); do
    run "contiguous, spread" "$round" --owners spread
    run "contiguous, affinity" "$round" --owners affinity
    run "planned, spread" "$round" --owners spread --plan "$plan"
    run "planned, affinity" "$round" --owners affinity --plan "$plan"
done
python3 "$here/bench_affinity.py" table "$out/contiguous, spread"@*.json "$out/contiguous, affinity"@*.json \
    "$out/planned, spread"@*.json "$out/planned, affinity"@*.json
