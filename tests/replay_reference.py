#!/usr/bin/python3
"""Replays a trace under a plan a second time, from what placement/replay.h and replica_split.h say, with none of their code.

    replay_reference.py --plan PLAN.json --trace TRACE.safetensors --topology TOPOLOGY.json --concurrency C
                        [--owner round-robin|affinity|recorded] [--replica-choice share|step] [--node-dedupe]

prints one JSON object; --batch FILE reads a JSON list of such argument lists and prints a JSON list. split_gap is worked out over
all sets of ranks, so up to 12 ranks only (null above).
"""
import argparse
import json
import math
import struct
import sys

import numpy as np

DTYPES = {"U8": "u1", "U16": "<u2", "I32": "<i4", "F16": "<f2", "F32": "<f4", "U64": "<u8", "I64": "<i8"}
AFFINITY_TOKENS, AFFINITY_PAYBACK = 32, 256


# ---- files ----

def read_safetensors(path):
    with open(path, "rb") as file:
        raw = file.read()
    size, = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8:8 + size])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + at for at in entry["data_offsets"])
            tensors[name] = np.frombuffer(raw[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return header["__metadata__"], tensors


class Trace:
    """Tokens by sequence in order of first rows, within one by position."""

    def __init__(self, path):
        _, tensors = read_safetensors(path)
        experts = tensors["experts"].astype(np.int64)
        experts[experts == (255 if tensors["experts"].dtype.itemsize == 1 else 65535)] = -1
        rows_of = {}
        for row, sequence in enumerate(tensors["sequence"]):
            rows_of.setdefault(int(sequence), []).append(row)
        self.row, self.first = [], [0]
        for rows in rows_of.values():  # in order of insertion: of first rows
            self.row += sorted(rows, key=lambda row: tensors["position"][row])
            self.first.append(len(self.row))
        self.experts = experts[self.row].tolist()
        recorded = "owner" in tensors and "step" in tensors
        self.owner = tensors["owner"].reshape(-1)[self.row].tolist() if recorded else None
        self.step = tensors["step"].reshape(-1)[self.row].tolist() if recorded else None
        self.n_layers = experts.shape[1]


class Topology:
    def __init__(self, path):
        with open(path) as file:
            tree = json.load(file)
        self.node = [rank["node"] for rank in tree["ranks"]]
        self.row_us = [float(rank["row_us"]) for rank in tree["ranks"]]
        self.expert_us = [float(rank["expert_us"]) for rank in tree["ranks"]]
        self.n = len(self.node)
        self.members = [[r for r in range(self.n) if self.node[r] == node] for node in range(max(self.node) + 1)]
        self.classes = {"same": tree["same_node"], "cross": tree["cross_node"]}
        self.links = tree.get("links")
        self.row_bytes = float(tree["row_bytes"])

    def link(self, a, b):
        return "same" if self.node[a] == self.node[b] else "cross"

    def us_per_byte(self, a, b):
        if a == b:
            return 0.0
        return 1e-3 / (self.links[a][b] if self.links else self.classes[self.link(a, b)]["gb_per_s"])


# ---- who runs when ----

def nearest(copies, topo, rank):
    if rank in copies:
        return rank
    return next((c for c in copies if topo.node[c] == topo.node[rank]), copies[0])


class Places:
    def __init__(self, trace, layers, topo, count, affinity):
        self.trace, self.layers, self.topo, self.affinity = trace, layers, topo, affinity
        self.sequence = list(range(count))
        self.next = [trace.first[s] for s in self.sequence]
        self.owner = [place % topo.n for place in range(count)]
        self.room = -(-21 * count // (20 * topo.n))
        self.started = count

    def time_from(self, rank, tokens):
        sent = [0] * self.topo.n
        for token in tokens:
            for layer, chosen in zip(self.layers, self.trace.experts[token]):
                for to in {nearest(layer[e], self.topo, rank) for e in chosen if e >= 0} - {rank}:
                    sent[to] += 1
        total = 0.0
        for to, rows in enumerate(sent):
            total += rows * (self.topo.row_bytes * self.topo.us_per_byte(rank, to))
        return total

    def moves(self):
        done = []
        for place, sequence in enumerate(self.sequence):
            if self.next[place] - self.trace.first[sequence] != AFFINITY_TOKENS:
                continue
            tokens, owner = range(self.trace.first[sequence], self.next[place]), self.owner[place]
            stays = self.time_from(owner, tokens)
            best, least = owner, stays
            for rank in range(self.topo.n):
                if self.owner.count(rank) < self.room and self.time_from(rank, tokens) < least:
                    best, least = rank, self.time_from(rank, tokens)
            price = AFFINITY_TOKENS * self.trace.n_layers * self.topo.row_bytes * self.topo.us_per_byte(owner, best)
            if 2 * (stays - least) * AFFINITY_PAYBACK / AFFINITY_TOKENS > price:
                self.owner[place] = best
                done.append((owner, best))
        return done

    def steps(self):
        while True:
            moves = self.moves() if self.affinity else []
            yield list(zip(self.next, self.owner)), moves
            for place in range(len(self.next)):
                self.next[place] += 1
            for place in range(len(self.next)):
                if self.next[place] == self.trace.first[self.sequence[place] + 1]:
                    if self.started == len(self.trace.first) - 1:
                        return
                    self.sequence[place] = self.started
                    self.next[place] = self.trace.first[self.started]
                    self.started += 1


def recorded_steps(trace):
    by_step = {}
    for token in sorted(range(len(trace.row)), key=lambda t: trace.row[t]):
        by_step.setdefault(trace.step[token], []).append((token, trace.owner[token]))
    return [(by_step[step], []) for step in sorted(by_step)]


# ---- replicas by step: water-fill-1 ----

class Split:
    """State of one layer and step; a copy is (expert, rank)."""

    def __init__(self, layer, topo, rows):
        self.layer, self.topo, self.want = layer, topo, rows
        self.x = {(e, r): 0 for e, copies in enumerate(layer) for r in copies}
        self.rows, self.open = [0] * topo.n, [0] * topo.n
        self.several = [e for e, copies in enumerate(layer) if len(copies) > 1 and rows[e] > 0]
        self.on = [[e for e in self.several if r in layer[e]] for r in range(topo.n)]

    def load(self, rank, rows=0, opened=0):
        return (self.rows[rank] + rows) * self.topo.row_us[rank] + (self.open[rank] + opened) * self.topo.expert_us[rank]

    def put(self, e, rank, rows):
        self.open[rank] += (self.x[e, rank] + rows > 0) - (self.x[e, rank] > 0)
        self.x[e, rank] += rows
        self.rows[rank] += rows

    def hand(self, e, a, b, rows):
        self.put(e, a, -rows)
        self.put(e, b, rows)

    def opens(self, e, rank):
        return int(self.x[e, rank] == 0)

    def even(self, high, low, a, b):
        return max(0, math.floor((high - low) / (self.topo.row_us[a] + self.topo.row_us[b])))

    def leaving(self, rank):
        """(expert, rank to) of every copy with rows there."""
        for e in self.on[rank]:
            if self.x[e, rank] > 0:
                for to in sorted(self.layer[e]):
                    if to != rank:
                        yield e, to

    def shift(self, b):
        best, found = self.load(b), None
        for e, g in self.leaving(b):
            have, opened = self.x[e, b], self.opens(e, g)
            even = self.even(self.load(b), self.load(g, 0, opened), b, g)
            for m in (even, even + 1, have):
                if 1 <= m <= have:
                    left = max(self.load(b, -m, -(m == have)), self.load(g, m, opened))
                    if left < best:
                        best, found = left, (e, b, g, m)
        if found:
            self.hand(*found)
        return found is not None

    def path(self, b):
        came, queue, limit = {b: []}, [b], self.load(b)
        for u in queue:
            for e, v in self.leaving(u):
                if v in came or self.load(v, 0, self.opens(e, v)) > limit:
                    continue
                came[v] = came[u] + [(e, u, v)]
                queue.append(v)
                way = came[v]
                if len(way) < 2:
                    continue
                m = max(1, self.even(limit, self.load(v, 0, self.opens(e, v)), b, v))
                m = min([m] + [self.x[f, a] for f, a, _ in way])
                before = self.x.copy(), self.rows[:], self.open[:]
                for f, a, c in way:
                    self.hand(f, a, c, m)
                between = [self.load(c) for _, _, c in way[:-1]]
                if self.load(b) < limit and self.load(v) < limit and all(us <= limit for us in between):
                    return True
                self.x, self.rows, self.open = before
        return False

    def chain(self, u, goal, depth):
        for e, w in list(self.leaving(u)):
            have = self.x[e, u]
            least = math.floor((self.load(u) - goal) / self.topo.row_us[u]) + 1
            for m in ([least] if least < have else []) + ([have] if self.load(u, -have, -1) < goal else []):
                if depth == 1 and self.load(w, m, self.opens(e, w)) >= goal:
                    continue
                if self.tries == 0:
                    return False
                self.tries -= 1
                self.hand(e, u, w, m)
                if self.load(w) < goal or (depth > 1 and self.chain(w, goal, depth - 1)):
                    return True
                self.hand(e, w, u, m)
        return False

    def run(self):
        for e, copies in enumerate(self.layer):
            if len(copies) == 1 and self.want[e] > 0:
                self.put(e, copies[0], self.want[e])
        for e in sorted(self.several, key=lambda e: (-self.want[e], e)):
            self.put(e, min(self.layer[e], key=lambda r: (self.load(r, self.want[e], 1), r)), self.want[e])
        n_copies = sum(map(len, self.layer))
        self.tries = 2 * n_copies
        for _ in range(2 * n_copies):
            b = max(range(self.topo.n), key=lambda r: (self.load(r), -r))
            if not self.shift(b) and not self.path(b) and not self.chain(b, self.load(b) * (1 - 1 / 1024), 4):
                break
        return self.x

    def bound(self):
        """The largest time over all sets of ranks, each set a bit pattern."""
        sets = np.arange(1, 1 << self.topo.n)
        inside = lambda ranks: (sets & sum(1 << r for r in ranks)) == sum(1 << r for r in ranks)
        forced, speed = np.zeros(len(sets)), np.zeros(len(sets))
        for r in range(self.topo.n):
            speed += inside([r]) / self.topo.row_us[r]
        for e, copies in enumerate(self.layer):
            if self.want[e] > 0:
                forced += inside(copies) * (self.want[e] + min(self.topo.expert_us[r] / self.topo.row_us[r] for r in copies))
        return float((forced / speed).max())


def serve_owners(layer, topo, tokens, x):
    """Copies of every owner's rows of an expert, in their order: {(owner, expert): [rank, ...]}."""
    wants = {}
    for chosen, owner in tokens:
        for e in chosen:
            if e >= 0:
                wants[e, owner] = wants.get((e, owner), 0) + 1
    left, given = dict(x), {}
    circles = (lambda o, r: r == o, lambda o, r: topo.node[r] == topo.node[o], lambda o, r: True)
    for circle in circles:
        for e, owner in sorted(wants):
            for rank in layer[e]:
                if circle(owner, rank):
                    rows = min(wants[e, owner], left[e, rank])
                    wants[e, owner] -= rows
                    left[e, rank] -= rows
                    given[e, owner, rank] = given.get((e, owner, rank), 0) + rows
    return {(e, o): [r for r in layer[e] for _ in range(given.get((e, o, r), 0))] for e, o in wants}


# ---- one layer ----

def choose_by_share(copies, topo, owner, turn):
    """plan.h: the owner's own copy, else one on its node, else round-robin over all."""
    if owner in copies:
        return owner
    near = [r for r in copies if topo.node[r] == topo.node[owner]] or copies
    return near[turn % len(near)]


class Layer:
    def __init__(self, layer, topo, options):
        self.layer, self.topo, self.options = layer, topo, options
        self.turn = [0] * topo.n
        self.link_rows = np.zeros((topo.n, topo.n))
        self.rank_rows = np.zeros(topo.n)
        self.copies = self.cross = self.home = self.choices = 0
        self.compute, self.dispatch, self.combine, self.over_mean, self.gap = [], [], [], [], []

    def route(self, tokens):
        """[(owner, [rank of each choice], [expert])] of a step."""
        served = None
        if self.options.replica_choice == "step":
            rows = [0] * len(self.layer)
            for chosen, _ in tokens:
                for e in chosen:
                    if e >= 0:
                        rows[e] += 1
            split = Split(self.layer, self.topo, rows)
            served = serve_owners(self.layer, self.topo, tokens, split.run())
            if self.topo.n <= 12:
                bound = split.bound() if max(map(len, self.layer)) > 1 else 0
                self.gap.append(max(split.load(r) for r in range(self.topo.n)) / bound if bound else 1.0)
        for chosen, owner in tokens:
            chosen = [e for e in chosen if e >= 0]
            if served is not None:
                ranks = [served[e, owner].pop(0) for e in chosen]
            else:
                ranks = [choose_by_share(self.layer[e], self.topo, owner, self.turn[owner]) for e in chosen]
            self.turn[owner] += 1
            yield owner, ranks, chosen

    def hops(self, owner, ranks):
        """Links that a row to these ranks takes."""
        topo, crossed = self.topo, set()
        for to in sorted(set(ranks) - {owner}):
            self.copies += 1
            if topo.node[to] == topo.node[owner] or not self.options.node_dedupe:
                self.cross += topo.node[to] != topo.node[owner]
                yield owner, to
                continue
            there = topo.members[topo.node[to]]
            gateway = there[topo.members[topo.node[owner]].index(owner) % len(there)]
            if topo.node[to] not in crossed:
                crossed.add(topo.node[to])
                self.cross += 1
                yield owner, gateway
            if gateway != to:
                yield gateway, to

    def transfer(self, rows):
        """rows [from][to] over their links."""
        topo = self.topo
        out, into, start = [0.0] * topo.n, [0.0] * topo.n, 0.0
        for a, b in zip(*np.nonzero(rows)):
            us = rows[a, b] * topo.row_bytes * topo.us_per_byte(a, b)
            out[a] += us
            into[b] += us
            start = max(start, topo.classes[topo.link(a, b)]["us"])
        return max(out + into) + start

    def step(self, tokens, moves):
        n, sent, touched = self.topo.n, np.zeros((self.topo.n, self.topo.n)), [set() for _ in range(self.topo.n)]
        rows = np.zeros(n)
        for owner, ranks, chosen in self.route(tokens):
            for e, rank in zip(chosen, ranks):
                rows[rank] += 1
                touched[rank].add(e)
            self.home += ranks.count(owner)
            self.choices += len(ranks)
            for a, b in self.hops(owner, ranks):
                sent[a, b] += 1
        self.link_rows += sent
        self.rank_rows += rows
        self.compute.append(max(rows[r] * self.topo.row_us[r] + len(touched[r]) * self.topo.expert_us[r] for r in range(n)))
        self.combine.append(self.transfer(sent.T))
        for a, b in moves:
            sent[a, b] += AFFINITY_TOKENS
        self.dispatch.append(self.transfer(sent))
        self.over_mean.append(rows.max() * n / rows.sum() if rows.sum() else 1.0)


# ---- the whole ----

def mix(counter):
    z = (counter + np.uint64(1)) * np.uint64(0x9e3779b97f4a7c15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
    return z ^ (z >> np.uint64(31))


def interval(times):
    n = len(times)
    draws = mix(np.arange(1000 * n, dtype=np.uint64)) % np.uint64(n)
    means = np.sort(times[draws.astype(np.int64)].reshape(1000, n).mean(axis=1))
    return float(means[25]), float(means[974])


def replay(options):
    with open(options.plan) as file:
        plan = json.load(file)
    layers = [layer["ranks_of_expert"] for layer in plan["layers"]]
    trace, topo = Trace(options.trace), Topology(options.topology)
    if options.owner == "recorded":
        steps = recorded_steps(trace)
    else:
        steps = list(Places(trace, layers, topo, options.concurrency, options.owner == "affinity").steps())
    runs = [Layer(layer, topo, options) for layer in layers]
    for number, run in enumerate(runs):
        for entries, moves in steps:
            run.step([(trace.experts[token][number], owner) for token, owner in entries], moves)
    times = sum(np.array(run.compute) + np.array(run.dispatch) + np.array(run.combine) for run in runs)
    n_rows, low_high = sum(len(entries) for entries, _ in steps), interval(times)
    balance = [float(run.rank_rows.max() * topo.n / run.rank_rows.sum()) if run.rank_rows.sum() else 1.0 for run in runs]
    choices = sum(run.choices for run in runs)
    gaps = [gap for run in runs for gap in run.gap]
    return {
        "steps": len(steps), "rows": n_rows, "moves": sum(len(moves) for _, moves in steps),
        "step_us": float(times.mean()), "low_us": low_high[0], "high_us": low_high[1],
        "compute_us": float(sum(np.mean(run.compute) for run in runs)),
        "dispatch_us": float(sum(np.mean(run.dispatch) for run in runs)),
        "combine_us": float(sum(np.mean(run.combine) for run in runs)),
        "copies": sum(run.copies for run in runs) / (n_rows * len(runs)),
        "cross_copies": sum(run.cross for run in runs) / (n_rows * len(runs)),
        "home": sum(run.home for run in runs) / choices if choices else 0.0,
        "max_over_mean_mean": sum(balance) / len(balance), "max_over_mean_worst": max(balance),
        "max_over_mean_step": float(np.mean([run.over_mean for run in runs])),
        "split_gap": (float(np.mean(gaps)) if topo.n <= 12 else None) if options.replica_choice == "step" else 0.0,
        "layer_us": [float(np.mean(run.compute) + np.mean(run.dispatch) + np.mean(run.combine)) for run in runs],
        "max_over_mean": balance, "step_times": times.tolist(),
        "link_rows": sum(run.link_rows for run in runs).astype(int).tolist(),
        "rank_rows": [run.rank_rows.astype(int).tolist() for run in runs],
    }


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("plan", "trace", "topology"):
        parser.add_argument("--" + name, required=True)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--owner", choices=("round-robin", "affinity", "recorded"), default="round-robin")
    parser.add_argument("--replica-choice", choices=("share", "step"), default="share")
    parser.add_argument("--node-dedupe", action="store_true")
    return parser.parse_args(arguments)


def main():
    if sys.argv[1:2] == ["--batch"]:
        with open(sys.argv[2]) as file:
            print(json.dumps([replay(parse(arguments)) for arguments in json.load(file)]))
    else:
        print(json.dumps(replay(parse(sys.argv[1:]))))


if __name__ == "__main__":
    main()
