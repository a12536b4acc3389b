#!/usr/bin/env python3
"""bench_affinity.py - its two halves that a shell is no good at.

  mix TEXTS.jsonl TOKENS.jsonl FIT.jsonl HELD.jsonl   texts with domains and their token ids: domains in turn, every second text of each
                                                      domain to fit on, the others held out, in pieces
  links TOPOLOGY OUT                                  the same machine with links so slow that a plan looks at little else
  table RUN.json...                                   NAME@ROUND.json as convoke-score --json wrote them: medians over rounds
"""
import json
import statistics
import sys
from pathlib import Path

PIECE = 128  # tokens of a sequence at most: the texts are few


def mix(texts, tokens, fit, held):
    by_domain = {}
    for text, ids in zip(open(texts), open(tokens)):
        ids = json.loads(ids)["token_ids"]
        parts = by_domain.setdefault(json.loads(text)["domain"], [[], []])
        half = parts[len(parts[0]) > len(parts[1])]
        half.append([ids[i:i + PIECE] for i in range(0, len(ids) - PIECE // 2, PIECE)])
    for path, half in ((fit, 0), (held, 1)):
        rest = {domain: [piece for text in parts[half] for piece in text] for domain, parts in by_domain.items()}
        with open(path, "w") as out:
            while any(rest.values()):
                for domain, lines in rest.items():
                    if lines:
                        out.write(json.dumps({"domain": domain, "token_ids": lines.pop(0)}) + "\n")


def links(path, out):
    topology = json.loads(Path(path).read_text())
    for kind in ("same_node", "cross_node"):
        topology[kind] = {"us": 1e-6, "gb_per_s": topology[kind]["gb_per_s"] / 100}
    Path(out).write_text(json.dumps(topology))


def table(paths):
    runs = {}
    for path in map(Path, paths):
        runs.setdefault(path.name.split("@")[0], []).append(json.loads(path.read_text()))
    rows = {}
    for name, rounds in runs.items():
        crossed = [r["row_bytes_cross_node"] + r["return_bytes_cross_node"] + r["moved_bytes_cross_node"] for r in rounds]
        rows[name] = (statistics.median(crossed), rounds[0]["moved_sequences"],
                      statistics.median(r["moved_bytes_cross_node"] for r in rounds),
                      statistics.median(r["prefill_tokens_per_s"] for r in rounds),
                      statistics.median(r["decode_tokens_per_s"] for r in rounds),
                      statistics.mean(rounds[0]["max_over_mean"]))
    base = next(iter(rows.values()))[0]
    print(f"{'plan, owners':28} {'cross MB':>9} {'ratio':>6} {'moved':>6} {'KV MB':>6} {'prefill/s':>10} {'decode/s':>9} {'max/mean':>9}")
    for name, (crossed, moved, kv, prefill, decode, balance) in rows.items():
        print(f"{name:28} {crossed / 1e6:9.2f} {crossed / base:6.3f} {moved:6.0f} {kv / 1e6:6.2f} {prefill:10.0f} {decode:9.0f} {balance:9.2f}")


if __name__ == "__main__":
    if sys.argv[1] == "mix":
        mix(*sys.argv[2:])
    elif sys.argv[1] == "links":
        links(*sys.argv[2:])
    else:
        table(sys.argv[2:])
