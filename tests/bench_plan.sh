#!/bin/bash
# bench_plan.sh [--build DIR] [--data DIR] [--solvers NAME,..] [--regimes NAME,..] [--slots N,..] [--seconds X] - what plans are worth.
#
# Modelled step time over the contiguous plan's, on the traffic a plan was made from and on traffic it has not seen: gpt-oss-20b's
# routing on MMLU (DIR of --data: experts.u8, probs.f16, index.csv), fitted on every second category sorted by name, held out the
# others; 8 ranks on 2 nodes, 128 sequences at once, round-robin owners, replicas by the step's load. --seconds 0: until the
# solvers' own work is done, which gives the same plans on every machine.
#
# Regimes: cpu   row_us 250, expert_us 1650, same node 5 GB/s 15 us, cross 1 GB/s 60 us
#          h100  row_us 0.15, expert_us 11.6, same node 300 GB/s 10 us, cross 40 GB/s 15 us
#          link  row_us 5, expert_us 30, same node 5 GB/s 15 us, cross 0.12 GB/s 60 us
set -euo pipefail
source_dir=$(cd "$(dirname "$0")/.." && pwd)
build=$source_dir/build
data=$source_dir/../shared/data/routing/gptoss20b-mmlu
solvers=lpt,eplb,craft,moetuner,exflow,batch,auto regimes=cpu,h100,link slots=0,1,2 seconds=20
usage() {
    sed -n '2s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
    --build | --data | --solvers | --regimes | --slots | --seconds)
        [ $# -ge 2 ] || usage
        printf -v "${1#--}" '%s' "$2"
        shift 2
        ;;
    *) usage ;;
    esac
done
plan=$build/convoke-plan
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Arrays and index of either half.
/usr/bin/python3 - "$data" "$work" <<'PYTHON'
import csv, os, sys
data, work = sys.argv[1:]
rows = list(csv.DictReader(open(f"{data}/index.csv")))
names = sorted({r["category"] for r in rows})
experts = open(f"{data}/experts.u8", "rb").read()
for half, name in enumerate(("fit", "held")):
    os.mkdir(f"{work}/{name}")
    at = 0
    with open(f"{work}/{name}/index.csv", "w", newline="") as f, open(f"{work}/{name}/experts.u8", "wb") as out:
        index = csv.DictWriter(f, rows[0].keys())
        index.writeheader()
        for r in rows:
            if names.index(r["category"]) % 2 == half:
                first, n = int(r["offset_tokens"]), int(r["n_tokens"])
                out.write(experts[first * 96 : (first + n) * 96])  # 24 layers, 4 choices
                index.writerow({**r, "offset_tokens": at})
                at += n
PYTHON
for half in fit held; do
    "$plan" import flat "$work/$half/experts.u8" --experts 32 --layers 24 --top-k 4 --model gpt-oss-20b \
        -o "$work/$half.safetensors" >/dev/null
done

topology() { # name row_us expert_us same_us same_gb cross_us cross_gb
    local ranks='' g
    for g in 0 1 2 3 4 5 6 7; do
        ranks+="${ranks:+, }{\"node\": $((g / 4)), \"expert_bytes\": null, \"row_us\": $2, \"expert_us\": $3}"
    done
    echo "{\"ranks\": [$ranks], \"same_node\": {\"us\": $4, \"gb_per_s\": $5}, \"cross_node\": {\"us\": $6, \"gb_per_s\": $7}," \
        "\"row_bytes\": 5760}" >"$work/$1.json"
}
topology cpu 250 1650 15 5 60 1
topology h100 0.15 11.6 10 300 15 40
topology link 5 30 15 5 60 0.12

step_us() { # plan half regime
    "$plan" score --plan "$1" --trace "$work/$2.safetensors" --topology "$work/$3.json" -C 128 --replica-choice step --bounds none \
        --json | /usr/bin/python3 -c 'import json, sys; print(json.load(sys.stdin)["plans"][-1]["step_us"])'
}

printf '%-6s %5s  %-12s %10s %10s %10s %10s %8s\n' regime slots solver fitted held 'fit/contig' 'held/contig' seconds
for regime in ${regimes//,/ }; do
    base_fit='' base_held=''
    for extra in ${slots//,/ }; do
        for solver in contiguous ${solvers//,/ }; do
            [ "$solver" != contiguous ] || [ -z "$base_fit" ] || continue
            start=$(date +%s.%N)
            if ! "$plan" solve --trace "$work/fit.safetensors" --topology "$work/$regime.json" -C 128 --replica-choice step \
                --solver "$solver" --extra-slots "$extra" --seconds "$seconds" --folds 0 --bounds none -o "$work/plan.json" \
                >/dev/null 2>"$work/error"; then
                printf '%-6s %5s  %-12s %s\n' "$regime" "$extra" "$solver" "$(tail -1 "$work/error")"
                continue
            fi
            took=$(/usr/bin/python3 -c "import time; print(f'{time.time() - $start:.1f}')")
            fit=$(step_us "$work/plan.json" fit "$regime") held=$(step_us "$work/plan.json" held "$regime")
            base_fit=${base_fit:-$fit} base_held=${base_held:-$held}
            /usr/bin/python3 -c "print('%-6s %5s  %-12s %10.1f %10.1f %10.4f %10.4f %8s' % ('$regime', '$extra', '$solver', $fit, \
                $held, $fit / $base_fit, $held / $base_held, '$took'))"
        done
    done
done
