#!/bin/bash
# bench_serve.sh --model DIR [--build DIR] [--demo DIR] [--ranks N] [--threads T] [--rounds R] [--only GROUP,..] - the figures of serving.
#
# DIR of --model is a large checkpoint with random weights (1.9 GB: 12 layers, hidden 1024, 32 experts, top 4, vocabulary 32000, bf16);
# --demo the bundled one. --ranks (1) and --threads (2, of each rank) hold for all groups but the last two.
#
# Groups, and how each figure is made:
#   throughput  convoke-score's batch decode at 16 sequences (its decode_tokens_per_s) and a server's at 16 streams, in turn for R
#               rounds, since the machine's speed moves under both; 16 prompt tokens and 96 new ones each. The ratio is the median of
#               the rounds' ratios.
#   ttft        100 requests of 16 tokens, one after another, on an idle server with the bundled model. Added by door and control path:
#               p50 of the requests' differences between the time from the call to its first token, at the client, and the seconds
#               that the workers' steps took meanwhile by the leader's clock (/metrics before and after each request), which is
#               the model's own time in the very same state of caches and clocks. R rounds, medians.
#   gap         8 streams and a 2,000-token prompt: p99 of the time between tokens while it is prefilled over p99 before, and the
#               prompt's time to first token among the streams over that on an idle server.
#   prefix      1,000 shared tokens and 16 of one's own: the second request's time to first token over the first's.
#   idle        CPU seconds of coordinator, mpirun and workers over 20 s, two ranks, from /proc/PID/stat.
#   recovery    16 streams at temperature 1, two ranks; kill -9 of a worker: the longest pause of any stream, and whether all tokens
#               are those of an undisturbed run.
set -euo pipefail
source_dir=$(cd "$(dirname "$0")/.." && pwd)
build=$source_dir/build
demo=$source_dir/deploy/models/convoke-demo
model='' ranks=1 threads=2 rounds=5 only=throughput,ttft,gap,prefix,idle,recovery
usage() {
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
    --model | --build | --demo | --ranks | --threads | --rounds | --only)
        [ $# -ge 2 ] || usage
        printf -v "${1#--}" '%s' "$2"
        shift 2
        ;;
    *) usage ;;
    esac
done
wants() { [[ ,$only, == *,$1,* ]]; }
if [ -z "$model" ] && { wants throughput || wants gap || wants prefix; }; then usage; fi

scratch=$(mktemp -d)
server=
cleanup() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ -z "$server" ] || wait "$server" 2>/dev/null || true
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
trap 'echo "bench_serve.sh: line $LINENO failed" >&2; tail -n 20 "$scratch/log" >&2' ERR

# start MODEL RANKS THREADS [MORE]: a server; its address is $address, its process $server.
start() {
    : >"$scratch/ready"
    "$build/convoke" serve --model "$1" --ranks "$2" --threads "$3" --grpc 127.0.0.1:0 --no-log-requests "${@:4}" \
        >"$scratch/ready" 2>"$scratch/log" &
    server=$!
    until grep -q '^ready: ' "$scratch/ready"; do
        kill -0 "$server" 2>/dev/null || { echo "the server did not start:" >&2; cat "$scratch/log" >&2; exit 1; }
        sleep 0.1
    done
    address=$(sed -n 's/^ready: grpc \([^,]*\),.*/\1/p' "$scratch/ready")
}

stop() {
    kill -TERM "$server"
    wait "$server" || { echo "the server ended badly:" >&2; tail -n 20 "$scratch/log" >&2; exit 1; }
    server=
}

door() { "$build/tests/bench_door" --connect "$address" --vocab "$vocab" --json "$@" >"$scratch/door.json"; }
# value FILE KEY: the number behind "KEY" in a JSON object.
value() { sed -n "s/.*\"$2\": *\([-+0-9.e]*\).*/\1/p" "$1" | head -n 1; }
door_value() { value "$scratch/door.json" "$1" | awk '{ printf "%.4g\n", $1 }'; }
median() { sort -g | awk '{ v[NR] = $1 } END { printf "%.4g\n", NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
vocab_of() { value "$1/config.json" vocab_size; }
calc() { awk "BEGIN { printf \"%.4g\n\", $1 }"; }
row() { printf '%-58s %12s  %-28s %s\n' "$1" "$2" "$3" "$4"; }
under_mpi() { "$source_dir/tests/run_mpi.sh" "$@"; }

row "figure" "measured" "reach" ""

if wants throughput; then
    vocab=$(vocab_of "$model")
    awk -v vocab="$vocab" 'BEGIN { srand(7); for (l = 0; l < 16; l++) { s = ""; for (i = 0; i < 16; i++) s = s (i ? "," : "") int(rand() * vocab);
        print "{\"token_ids\": [" s "]}" } }' >"$scratch/lines.jsonl"
    for ((i = 0; i < rounds; i++)); do
        under_mpi "$ranks" "$build/convoke-score" --model "$model" --input "$scratch/lines.jsonl" --greedy 96 --batch 16 --threads "$threads" \
            --json >"$scratch/score.json" 2>"$scratch/log"
        ceiling=$(value "$scratch/score.json" decode_tokens_per_s)
        start "$model" "$ranks" "$threads"
        door throughput --streams 16 --prompt 16 --tokens 96 --rounds 1
        stop
        through=$(door_value decode_tokens_per_s)
        echo "$ceiling" >>"$scratch/ceilings"
        echo "$through" >>"$scratch/throughs"
        calc "$through / $ceiling" >>"$scratch/ratios"
        for key in ttft_p50_ms ttft_p99_ms inter_token_p50_ms inter_token_p99_ms; do door_value $key >>"$scratch/$key"; done
    done
    row "tokens/s through the door, 16 streams" "$(median <"$scratch/throughs")" "" "convoke-score: $(median <"$scratch/ceilings") (medians of $rounds rounds)"
    row "  over convoke-score's batch decode at 16" "$(median <"$scratch/ratios")" ">= 0.95" "rounds: $(tr '\n' ' ' <"$scratch/ratios")"
    row "  time to first token of 16 at once, p50 / p99 ms" "$(median <"$scratch/ttft_p50_ms") / $(median <"$scratch/ttft_p99_ms")" "" ""
    row "  between tokens, p50 / p99 ms" "$(median <"$scratch/inter_token_p50_ms") / $(median <"$scratch/inter_token_p99_ms")" "" ""
fi

if wants ttft; then
    vocab=$(vocab_of "$demo")
    start "$demo" "$ranks" "$threads" --http 127.0.0.1:0
    for ((i = 0; i < rounds; i++)); do
        door ttft --prompt 16 --rounds 100 --http "$(sed -n 's/^ready: .*, http \(.*\)/\1/p' "$scratch/ready")"
        for key in ttft_p50_ms ttft_p99_ms ttft_own_p50_ms ttft_added_p50_ms ttft_added_p99_ms; do door_value $key >>"$scratch/one_$key"; done
    done
    stop
    one() { median <"$scratch/one_$1"; }
    row "time to first token added by door and control path, ms" "$(one ttft_added_p50_ms)" "<= 2" \
        "p99 $(one ttft_added_p99_ms); whole p50 $(one ttft_p50_ms), p99 $(one ttft_p99_ms); the model's own p50 $(one ttft_own_p50_ms)"
fi

if wants gap; then
    vocab=$(vocab_of "$model")
    start "$model" "$ranks" "$threads"
    door gap --streams 8 --prompt 2000 --rounds 3 --seconds 5
    stop
    row "time between tokens, p99, during a 2,000-token prefill" "$(door_value inter_token_p99_ratio)" "<= 2 x before" \
        "$(door_value inter_token_before_p99_ms) ms before, $(door_value inter_token_during_p99_ms) ms during"
    row "  that prompt's time to first token" "$(door_value long_prompt_ttft_ratio)" "<= 3 x idle" \
        "$(door_value long_prompt_ttft_alone_ms) ms idle, $(door_value long_prompt_ttft_among_ms) ms among 8 streams"
fi

if wants prefix; then
    vocab=$(vocab_of "$model")
    start "$model" "$ranks" "$threads"
    door prefix --prompt 1000 --rounds 5
    stop
    row "second request with a shared 1,000-token prefix, ttft" "$(door_value prefix_ttft_ratio)" "<= 0.1 x first" \
        "$(door_value prefix_first_ttft_ms) ms first, $(door_value prefix_second_ttft_ms) ms second"
fi

if wants idle; then
    vocab=$(vocab_of "$demo")
    start "$demo" 2 1
    sleep 2
    door idle --seconds 20 --server-pid "$server"
    stop
    row "idle server, 2 ranks, % of one core" "$(door_value idle_total_percent)" "<= 4" \
        "$(sed 's/[{}"]//g; s/idle_//g; s/_percent//g; s/\(\.[0-9][0-9]\)[0-9]*/\1/g' "$scratch/door.json")"
fi

if wants recovery; then
    vocab=$(vocab_of "$demo")
    start "$demo" 2 1 --max-failures 100
    door recovery --streams 16 --tokens 1000 --rounds 3 --server-pid "$server"
    stop
    row "recovery after kill -9 of a rank, s" "$(door_value recovery_pause_s)" "<= 5" \
        "most $(door_value recovery_pause_most_s); streams hit $(door_value recovery_streams_hit), same tokens $(door_value recovery_same_tokens)"
fi
