#!/usr/bin/python3
"""plain_planner.py solve|diff ... - speaks convoke-plan's language just enough for a server to plan with: tests of replanning run it where
what is to be seen is the server, not the planner. `solve` gives each layer's experts, the busiest first, to the rank with least load.

$PLAIN_PLANNER_ROTATE=1: every expert goes to the rank after the one that has it now (a plan that is different for certain).
"""
import json
import os
import struct
import sys

import numpy


def read_tensors(path):
    with open(path, "rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(size))
        data = f.read()
    meta = header.pop("__metadata__")
    return meta, {k: numpy.frombuffer(data[v["data_offsets"][0]:v["data_offsets"][1]], numpy.uint64).reshape(v["shape"])
                  for k, v in header.items() if v["dtype"] == "U64"}


def solve(options):
    meta, tensors = read_tensors(options["--stats"])
    with open(options["--topology"]) as f:
        nodes = [r["node"] for r in json.load(f)["ranks"]]
    with open(options["--seed-plan"]) as f:
        present = json.load(f)["layers"]
    counts = tensors["tokens_per_expert"].sum(axis=0)
    layers = []
    for number, row, now in zip(json.loads(meta["layers"]), counts, present):
        room = -(-len(row) // len(nodes))
        load, held, home = [0] * len(nodes), [0] * len(nodes), [None] * len(row)
        for e in sorted(range(len(row)), key=lambda e: (-int(row[e]), e)):
            rank = min((r for r in range(len(nodes)) if held[r] < room), key=lambda r: (load[r], r))
            home[e] = rank
            load[rank] += int(row[e])
            held[rank] += 1
        if os.environ.get("PLAIN_PLANNER_ROTATE"):
            home = [(ranks[0] + 1) % len(nodes) for ranks in now["ranks_of_expert"]]
        layers.append({"layer": number, "ranks_of_expert": [[r] for r in home]})
    with open(options["-o"], "w") as f:
        json.dump({"format": "convoke-plan", "version": 1, "name": "plain", "experts": counts.shape[1], "ranks": len(nodes),
                   "node_of_rank": nodes, "layers": layers}, f)


def main():
    words = sys.argv[1:]
    if words[0] == "solve":
        solve(dict(zip(words[1::2], words[2::2])))
    elif words[0] == "diff":
        print(json.dumps({"bytes": 0, "seconds": 0.001}))
    else:
        sys.exit(f"plain_planner: no command {words[0]}")


if __name__ == "__main__":
    main()
