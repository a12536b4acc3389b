#!/usr/bin/env python3
"""Files as other engines write them, and what is in them, read without any code of ours.

  make_engine_files.py make FOLDER                     writes samples of every format into FOLDER
  make_engine_files.py verify FOLDER                   compares FOLDER/imported-* with what the samples hold
  make_engine_files.py exported FORMAT FILE PLAN ...   each FILE, written for FORMAT, holds the copies of PLAN (our JSON), rank by rank
  make_engine_files.py counts FORMAT FILE STATS        FILE holds the counts of STATS (our safetensors)

Layouts follow the engines: EPLB's rebalance_experts() and its README, SGLang's ExpertLocationMetadata and recorder, TensorRT-LLM's
MoeLoadBalancerConfig, vllm-ascend's expert map, vLLM's expert_to_ep_rank, ExFlow's trace.npy, CD-MoE's and OLMoE's published counts.
"""
import csv
import json
import struct
import sys
from pathlib import Path

try:
    import numpy as np
    import yaml
except ImportError as missing:
    sys.exit(f"make_engine_files.py: {missing}")

LAYERS, EXPERTS, K, RANKS, SLOTS = 3, 8, 2, 4, 12


def load_tensors(path):
    raw = Path(path).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    types = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "F32": np.float32, "U64": np.uint64}
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = np.frombuffer(raw[8 + size + begin:8 + size + end], types[entry["dtype"]]).reshape(entry["shape"])
    return metadata, arrays


def random_choices(rng, tokens, layers=LAYERS, experts=EXPERTS, k=K):
    return np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :k]


def random_map(rng, layers=LAYERS):
    """[layers][SLOTS]: every expert once, the other slots repeat some, in any order."""
    rows = [rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(0, EXPERTS, SLOTS - EXPERTS)])) for _ in range(layers)]
    return np.array(rows, np.int64)


def copies_of_map(rows):
    """Per layer and expert the set of ranks, slots in equal blocks."""
    block = rows.shape[1] // RANKS
    return [[sorted({int(s) // block for s in np.flatnonzero(row == e)}) for e in range(row.max() + 1)] for row in rows]


def nearest_home(row, expert):
    """Our rule where a format does not name the home: the lowest place in a block, then the lowest rank."""
    block = len(row) // RANKS
    return min((int(s) % block, int(s) // block) for s in np.flatnonzero(row == expert))[1]


# ---- the samples ----


def make_flat(rng, folder):
    folder = folder / "flat"
    folder.mkdir()
    rows = [("algebra", 5, 0, 10), ("law", 7, 1, 3), ("algebra", 4, 0, 0), ("biology", 6, 0, 2)]  # category, tokens, repetition, prompt
    total = sum(row[1] for row in rows)
    experts = random_choices(rng, total).astype(np.uint8)
    weights = rng.random((total, LAYERS, K)).astype(np.float16)
    experts.tofile(folder / "experts.u8")
    weights.tofile(folder / "probs.f16")
    with open(folder / "index.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow("example,dataset,category,finished,repetition,prompt_tokens,n_tokens,offset_tokens".split(","))
        offset = 0
        for i, (category, n, repetition, prompt) in enumerate(rows):
            out.writerow([i, "mmlu_dev", category, 1, repetition, prompt, n, offset])
            offset += n
    np.savez(folder / "truth.npz", experts=experts, weights=weights)


def verify_flat(folder, suffix, keep):
    truth = np.load(folder / "flat" / "truth.npz")
    metadata, got = load_tensors(folder / f"imported-flat{suffix}")
    rows = list(csv.DictReader(open(folder / "flat" / "index.csv")))
    kept = [r for r in rows if keep or r["repetition"] == "0"]
    domains = sorted({r["category"] for r in kept})
    take = np.concatenate([np.arange(int(r["offset_tokens"]), int(r["offset_tokens"]) + int(r["n_tokens"])) for r in kept])
    assert json.loads(metadata["domains"]) == domains and metadata["top_k"] == str(K) and metadata["n_experts"] == str(EXPERTS)
    assert (got["experts"] == truth["experts"][take]).all() and (got["weights"] == truth["weights"][take]).all()
    assert (got["phase"] == 1).all()
    lengths = [int(r["n_tokens"]) for r in kept]
    assert (got["sequence"] == np.repeat(np.arange(len(kept)), lengths)).all()
    assert (got["position"] == np.concatenate([int(r["prompt_tokens"]) + np.arange(int(r["n_tokens"])) for r in kept])).all()
    assert (got["domain"] == np.repeat([domains.index(r["category"]) for r in kept], lengths)).all()


def make_counts(rng, folder):
    counts = rng.integers(0, 1000, (2, LAYERS, EXPERTS))
    np.save(folder / "counts.npy", counts)
    numbers = [0, 7, 15]
    with open(folder / "olmoe.csv", "w") as f:
        f.write("domain,layer,expert,count\n")
        for d, name in enumerate(["arxiv", '"github, all"']):
            for l in range(LAYERS):
                for e in range(EXPERTS):
                    if counts[d, l, e] or e == EXPERTS - 1:
                        f.write(f"{name},{numbers[l]},{e},{counts[d, l, e]}\n")
    with open(folder / "olmoe-pairs.csv", "w") as f:
        f.write("domain,layers,expert_i,expert_j,count\narxiv,0-7,0,0,914\n")
    entries = {}
    for l in rng.permutation(LAYERS):
        for e in rng.permutation(EXPERTS):
            hits = int(counts[0, l, e])
            entries[f"{l}-{e}"] = [hits * 0.07, hits, 0.07]
    (folder / "cd-moe.json").write_text(json.dumps(entries, indent=4))
    with open(folder / "sglang-old.csv", "w") as f:
        f.write("layer_id,expert_id,count\n")
        for l in range(LAYERS):
            for e in range(EXPERTS):
                f.write(f"{l},{e},{counts[0, l, e]}\n")
    all_layers = np.zeros((5, LAYERS + 1, EXPERTS), np.int64)  # steps; the model's first layer has no experts
    for step in range(5):
        all_layers[step, 1:] = counts[0] // 5
    all_layers[0, 1:] += counts[0] % 5
    (folder / "sglang-counts.json").write_text(json.dumps({"logical_count": all_layers.tolist(), "rank": 0}))
    (folder / "sglang-counts-2d.json").write_text(json.dumps({"logical_count": all_layers.sum(axis=0).tolist()}))
    np.savez(folder / "eplb-weight.npz", weight=counts[0])
    np.savez_compressed(folder / "eplb-weight-float.npz", weight=(counts[0] * 0.25 + 0.125).astype(np.float32))


def verify_counts(folder):
    counts = np.load(folder / "counts.npy")
    for name, layers, phase in [("olmoe", [0, 7, 15], 0), ("cd-moe", [0, 1, 2], 0), ("sglang-old", [0, 1, 2], 1),
                                ("sglang-counts", [1, 2, 3], 1), ("sglang-counts-2d", [1, 2, 3], 1), ("eplb-weight", [0, 1, 2], 1)]:
        metadata, got = load_tensors(folder / f"imported-{name}")
        domains = 2 if name == "olmoe" else 1
        assert json.loads(metadata["layers"]) == layers, name
        assert got["tokens_per_expert"].shape == (domains * 2, LAYERS, EXPERTS), name
        for d in range(domains):
            assert (got["tokens_per_expert"][2 * d + phase] == counts[d]).all(), name
            assert got["tokens_per_expert"][2 * d + 1 - phase].sum() == 0, name
            assert got["tokens_seen"][2 * d + phase] == -(-counts[d].sum(axis=1).max() // K), name
    assert json.loads(load_tensors(folder / "imported-olmoe")[0]["domains"]) == ["arxiv", "github, all"]
    got = load_tensors(folder / "imported-eplb-weight-float")[1]["tokens_per_expert"][1].astype(float)
    want = counts[0] * 0.25 + 0.125
    assert got.max() == 1e6 and np.abs(got / got.sum() - want / want.sum()).max() < 1e-5


def make_maps(rng, folder):
    rows = random_map(rng)
    with_dense = np.concatenate([np.arange(SLOTS)[None] % EXPERTS, rows])
    (folder / "sglang-map.json").write_text(json.dumps({"physical_to_logical_map": with_dense.tolist()}))
    width = max(int((row == e).sum()) for row in rows for e in range(EXPERTS))
    log2phy = np.full((LAYERS, EXPERTS, width), -1, np.int64)
    logcnt = np.zeros((LAYERS, EXPERTS), np.int64)
    for l, row in enumerate(rows):
        for e in range(EXPERTS):
            slots = rng.permutation(np.flatnonzero(row == e))
            log2phy[l, e, :len(slots)] = slots
            logcnt[l, e] = len(slots)
    np.savez(folder / "eplb-plan.npz", phy2log=rows.astype(np.int32), log2phy=log2phy, logcnt=logcnt)
    (folder / "eplb-plan.json").write_text(json.dumps(
        {"physical_to_logical_map": rows.tolist(), "logical_to_physical_map": log2phy.tolist(), "expert_count": logcnt.tolist()}))
    np.savez(folder / "eplb-plan-alone.npz", phy2log=rows)
    (folder / "tensorrt-llm.yaml").write_text(yaml.safe_dump(
        {"num_slots": SLOTS, "initial_global_assignments": {5 + l: row.tolist() for l, row in enumerate(rows)}, "layer_updates_per_iter": 0}))
    (folder / "tensorrt-llm-nested.yaml").write_text(yaml.safe_dump(
        {"moe_config": {"backend": "WIDEEP", "load_balancer": {"num_slots": SLOTS, "initial_global_assignments":
                                                              {5 + l: row.tolist() for l, row in enumerate(rows)}}}}, default_flow_style=True))
    block = SLOTS // RANKS
    (folder / "vllm-ascend.json").write_text(json.dumps({"moe_layer_count": LAYERS, "layer_list": [
        {"layer_id": l, "device_count": RANKS, "device_list": [
            {"device_id": g, "device_expert": row[g * block:(g + 1) * block].tolist()} for g in range(RANKS)]}
        for l, row in enumerate(rows)]}, indent=4))
    (folder / "vllm.json").write_text(json.dumps({"expert_to_ep_rank": rng.permutation(np.repeat(np.arange(RANKS), EXPERTS // RANKS)).tolist()}))


def verify_maps(folder):
    rows = np.load(folder / "eplb-plan.npz")["phy2log"]
    log2phy = np.load(folder / "eplb-plan.npz")["log2phy"]
    copies = copies_of_map(rows)
    for name, first in [("sglang-map", 1), ("eplb-plan.npz", 0), ("eplb-plan.json", 0), ("eplb-plan-alone", 0), ("tensorrt-llm", 5),
                        ("tensorrt-llm-nested", 5), ("vllm-ascend", 3)]:
        plan = json.loads((folder / f"imported-{name}").read_text())
        assert plan["experts"] == EXPERTS and plan["ranks"] == RANKS and plan["node_of_rank"] == [0, 0, 1, 1], name
        assert [entry["layer"] for entry in plan["layers"]] == list(range(first, first + LAYERS)), name
        for l, entry in enumerate(plan["layers"]):
            for e, ranks in enumerate(entry["ranks_of_expert"]):
                assert sorted(ranks) == copies[l][e], (name, l, e)
                named = name in ("eplb-plan.npz", "eplb-plan.json")
                home = int(log2phy[l, e, 0]) // (SLOTS // RANKS) if named else nearest_home(rows[l], e)
                assert ranks[0] == home, (name, l, e)
    plan = json.loads((folder / "imported-vllm").read_text())
    want = json.loads((folder / "vllm.json").read_text())["expert_to_ep_rank"]
    assert all([ranks[0] for ranks in entry["ranks_of_expert"]] == want for entry in plan["layers"]) and len(plan["layers"]) == 2


def make_traces(rng, folder):
    choices = random_choices(rng, 40, k=1)[:, :, 0]
    np.save(folder / "trace.npy", choices.astype(np.int32))
    np.save(folder / "trace2.npy", choices[:7].astype(np.int64))
    # Two sequences through a prefill and some decode steps; physical experts, first layer without any, top-2 of 8 columns.
    logical_to_physical = rng.permutation(EXPERTS)
    physical_to_logical = np.argsort(logical_to_physical)
    records, truth, lengths = [], [], [5, 3]
    for step in range(5):
        if step == 0:
            owners, positions = [0] * 5 + [1] * 3, list(range(5)) + list(range(3))
        else:
            owners, positions = [0, 1], [lengths[0], lengths[1]]
            lengths = [n + 1 for n in lengths]
        logical = random_choices(rng, len(owners))
        topk = np.full((LAYERS + 1, len(owners), 8), -1)
        topk[1:, :, :K] = logical_to_physical[logical].transpose(1, 0, 2)
        records.append({"forward_pass_id": step, "rank": 0, "input_ids": [7] * len(owners), "positions": positions,
                        "extend_seq_lens": [5, 3] if step == 0 else None, "forward_mode": 1 if step == 0 else 2,
                        "topk_ids_of_layer": topk.tolist(), "misc_objects": []})
        truth += [(owners[i], positions[i], int(step > 0), logical[i].tolist()) for i in range(len(owners))]
    maps = np.tile(physical_to_logical, (LAYERS + 1, 1))
    (folder / "sglang-tokens.json").write_text(json.dumps({"records": records, "last_physical_to_logical_map": maps.tolist()}))
    bare = [{key: r[key] for key in ("input_ids", "positions", "topk_ids_of_layer")} for r in records]
    (folder / "sglang-tokens-bare.json").write_text(json.dumps({"records": bare, "last_physical_to_logical_map": maps.tolist()}))
    for i, r in enumerate(records):
        arrays = {"topk_ids_of_layer": np.array(r["topk_ids_of_layer"], np.int32), "input_ids": np.array(r["input_ids"]),
                  "positions": np.array(r["positions"]), "forward_mode": np.array(r["forward_mode"]), "last_physical_to_logical_map": maps}
        if r["extend_seq_lens"]:
            arrays["extend_seq_lens"] = np.array(r["extend_seq_lens"])
        np.savez_compressed(folder / f"sglang-tokens-{i}.npz", **arrays)
    (folder / "sglang-tokens-truth.json").write_text(json.dumps(truth))


def verify_traces(folder):
    choices = np.load(folder / "trace.npy")
    _, got = load_tensors(folder / "imported-exflow")
    assert (got["experts"][:40, :, 0] == choices).all() and (got["experts"][40:, :, 0] == choices[:7]).all()
    assert (got["sequence"] == [0] * 40 + [1] * 7).all() and (got["weights"] == 1).all()
    truth = json.loads((folder / "sglang-tokens-truth.json").read_text())
    for name in ("sglang-tokens", "sglang-tokens-bare", "sglang-tokens-npz"):
        metadata, got = load_tensors(folder / f"imported-{name}")
        assert json.loads(metadata["layers"]) == [1, 2, 3] and metadata["top_k"] == str(K), name
        assert got["sequence"].tolist() == [t[0] for t in truth], name
        assert got["position"].tolist() == [t[1] for t in truth], name
        assert got["phase"].tolist() == [t[2] for t in truth], name
        assert got["experts"].tolist() == [t[3] for t in truth], name
        assert (got["weights"] == np.float32(1 / K)).all(), name


# ---- what was exported ----


def read_slots(kind, path):
    """{layer number: [expert of each slot]}"""
    if kind == "sglang":
        whole = json.loads(Path(path).read_text())
        assert list(whole) == ["physical_to_logical_map"]
        return dict(enumerate(whole["physical_to_logical_map"]))
    if kind == "eplb":
        arrays = np.load(path)
        for l, row in enumerate(arrays["phy2log"]):
            for e, slots in enumerate(arrays["log2phy"][l]):
                assert sorted(s for s in slots if s >= 0) == np.flatnonzero(row == e).tolist()
                assert arrays["logcnt"][l][e] == (row == e).sum() and (slots[:arrays["logcnt"][l][e]] >= 0).all()
        return dict(enumerate(arrays["phy2log"].tolist()))
    if kind == "tensorrt-llm":
        whole = yaml.safe_load(Path(path).read_text())
        assert whole["layer_updates_per_iter"] == 0
        assert all(len(row) == whole["num_slots"] for row in whole["initial_global_assignments"].values())
        return whole["initial_global_assignments"]
    whole = json.loads(Path(path).read_text())
    assert kind == "vllm-ascend" and whole["moe_layer_count"] == len(whole["layer_list"])
    tensor = np.array([[d["device_expert"] for d in layer["device_list"]] for layer in whole["layer_list"]], np.int32)
    assert tensor.ndim == 3 and all(layer["layer_id"] == i for i, layer in enumerate(whole["layer_list"]))
    return dict(enumerate(tensor.reshape(tensor.shape[0], -1).tolist()))


def check_export(kind, path, plan_path):
    plan = json.loads(Path(plan_path).read_text())
    if kind == "vllm":
        ranks = json.loads(Path(path).read_text())["expert_to_ep_rank"]
        assert all(entry["ranks_of_expert"] == [[r] for r in ranks] for entry in plan["layers"])
        return
    rows = read_slots(kind, path)
    by_number = kind in ("sglang", "tensorrt-llm")
    for l, entry in enumerate(plan["layers"]):
        row = np.array(rows[entry["layer"] if by_number else l])
        block = len(row) // plan["ranks"]
        assert block * plan["ranks"] == len(row) and set(row) == set(range(plan["experts"]))
        for e, ranks in enumerate(entry["ranks_of_expert"]):
            assert sorted(ranks) == sorted({int(s) // block for s in np.flatnonzero(row == e)}), (kind, l, e)
    assert len({len(row) for row in rows.values()}) == 1


def check_counts(kind, path, stats_path):
    metadata, tensors = load_tensors(stats_path)
    want = tensors["tokens_per_expert"].sum(axis=0)
    if kind == "eplb":
        got = np.load(path)["weight"]
    else:
        got = np.array(json.loads(Path(path).read_text())["logical_count"])
        layers = json.loads(metadata["layers"])
        assert got.sum() == got[layers].sum() and len(got) == layers[-1] + 1
        got = got[layers]
    assert (got == want).all()


def main():
    command = sys.argv[1]
    if command == "make":
        folder, rng = Path(sys.argv[2]), np.random.default_rng(11)
        for make in (make_flat, make_counts, make_maps, make_traces):
            make(rng, folder)
    elif command == "verify":
        folder = Path(sys.argv[2])
        verify_flat(folder, "", False)
        verify_flat(folder, "-all", True)
        verify_counts(folder)
        verify_maps(folder)
        verify_traces(folder)
    elif command == "exported":
        for i in range(2, len(sys.argv), 3):
            check_export(*sys.argv[i:i + 3])
    elif command == "counts":
        check_counts(*sys.argv[2:5])
    else:
        sys.exit(__doc__)


main()
