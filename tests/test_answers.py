#!/usr/bin/env python3
"""test_answers.py - what the door answers is what transformers answers, alone and inside a busy batch.

For small models of four families: greedy tokens and prompt log-probabilities equal transformers' (tests/data), alone and with 32 mixed requests
running beside, on few KV blocks (so that sequences are preempted and recomputed), with short steps (so that prompts are cut) and with the
prefix cache warm. Seeded samples are the same alone and in the batch; n sequences differ, and each is reproducible.
"""
import json
import math
import os
import struct
import sys
import tempfile
import threading

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402

GENERATE, STREAM = "/vllm.Inference/Generate", "/vllm.Inference/GenerateStream"
DATA = os.path.join(serving.SOURCE, "tests/data")


def safetensors(path):
    """{name: (shape, flat numbers)} of the f32 and i32 tensors."""
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        body = f.read()
    found = {}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        begin, end = t["data_offsets"]
        found[name] = t["shape"], struct.unpack("<%d%s" % ((end - begin) // 4, {"F32": "f", "I32": "i"}[t["dtype"]]), body[begin:end])
    return found


def request(pb, ids, n_new, seed=None, n=1):
    r = pb.GenerateRequest()
    r.token_ids.ids.extend(ids)
    r.temperature = 0.0 if seed is None else 1.0
    if seed is not None:
        r.sampling.seed = seed
    r.sampling.num_sequences = n
    r.stopping.max_new_tokens = n_new
    r.stopping.ignore_eos = True
    r.response.output_token_ids = True
    r.response.output_text = False
    return r


def answers(server, pb, r):
    """[tokens of each sequence], the prompt's info."""
    tokens, prompt = {}, None
    for response in server.stream(STREAM, r, pb.GenerateResponse):
        tokens.setdefault(response.outputs.index, []).extend(response.outputs.token_ids)
        if response.HasField("prompt_info"):
            assert prompt is None, "a second prompt info"
            prompt = response.prompt_info
    return [tokens[i] for i in sorted(tokens)], prompt


def check_greedy(server, pb, reference):
    for i in range(3):
        ids, expected = reference[f"prompt_{i}"][1], list(reference[f"greedy_{i}"][1])
        for _ in range(2):  # the second finds its prompt in the prefix cache
            got, _ = answers(server, pb, request(pb, ids, len(expected)))
            assert got == [expected], f"prompt {i}: {got} instead of {expected}"


def check_prompt_logprobs(server, pb, reference):
    for i in (1, 2):
        ids, (shape, logits) = reference[f"prompt_{i}"][1], reference[f"logits_{i}"]
        r = request(pb, ids, 1)
        r.response.prompt_logprobs = True
        r.response.prompt_candidates.top_n = 3
        r.response.prompt_token_ids = True
        _, info = answers(server, pb, r)
        assert list(info.token_ids) == list(ids) and info.num_prompt_tokens == len(ids)
        for position in range(1, len(ids)):
            row = logits[(position - 1) * shape[1]:position * shape[1]]
            top = max(row)
            log_sum = top + math.log(sum(math.exp(x - top) for x in row))
            assert abs(info.logprobs[position] - (row[ids[position]] - log_sum)) < 1e-4, (i, position)
            best = sorted(range(len(row)), key=lambda t: (-row[t], t))
            assert info.ranks[position] == best.index(ids[position]) + 1
            listed = sorted(info.candidate_tokens[position].tokens, key=lambda t: t.rank)
            assert [t.id for t in listed[:3]] == best[:3], (i, position)


class Beside(threading.Thread):
    """One request of the busy batch."""

    def __init__(self, server, pb, r):
        super().__init__(daemon=True)
        self.server, self.pb, self.r, self.tokens, self.error = server, pb, r, None, None

    def run(self):
        try:
            self.tokens, _ = answers(self.server, self.pb, self.r)
        except Exception as e:  # pylint: disable=broad-except
            self.error = e


def mixed_requests(pb, reference):
    rows = []
    for i in range(32):
        ids = reference[f"prompt_{i % 3}"][1]
        r = request(pb, list(ids) + [i % 7] * (i % 5), 20 + i, seed=i if i % 3 else None)
        if i % 4 == 1:
            r.sampling.top_k = 20
        if i % 4 == 2:
            r.sampling.top_p = 0.8
        if i % 5 == 3:
            r.decoding.frequency_penalty = 0.5
            r.decoding.logit_bias[i] = 3.0
        r.priority = i % 3
        rows.append(r)
    return rows


def check_batch(server, pb, reference):
    rows = mixed_requests(pb, reference)
    alone = [answers(server, pb, r)[0] for r in rows]
    batch = [Beside(server, pb, r) for r in rows]
    for b in batch:
        b.start()
    check_greedy(server, pb, reference)
    for b, expected in zip(batch, alone):
        b.join(120 * serving.SLOW)
        assert b.error is None, b.error
        assert b.tokens == expected, "a request gives other tokens in a batch than alone"


def check_n(server, pb, reference):
    r = request(pb, reference["prompt_1"][1], 16, seed=5, n=4)
    first, _ = answers(server, pb, r)
    again, _ = answers(server, pb, r)
    assert len(first) == 4 and len({tuple(t) for t in first}) == 4, "n sequences are n different samples"
    assert first == again, "n sequences are reproducible"


def test_family(pb, name):
    model = os.path.join(DATA, name)
    reference = safetensors(os.path.join(model, "reference.safetensors"))
    with serving.Server("--step-ms", "1", "--kv-bytes", "1M", "--max-length", "128", model=model) as server:
        check_greedy(server, pb, reference)
        check_prompt_logprobs(server, pb, reference)
        check_batch(server, pb, reference)
        check_n(server, pb, reference)
        said = server.said()
    print(f"{name}: ok, {server.kv_tokens} KV tokens" + ("" if "error" not in said else ", but the log has errors"), flush=True)


def test_demo(pb):
    """The bundled model's own expected answers, to text lines cut as there."""
    with open(os.path.join(serving.DEMO, "texts.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    with open(os.path.join(serving.DEMO, "expected.jsonl")) as f:
        expected = {row["id"]: row for row in map(json.loads, f)}
    with serving.Server(ranks=2) as server:
        for line in lines:
            r = request(pb, line["token_ids"][:32], 32)
            if len(line["token_ids"]) >= 32:
                got, _ = answers(server, pb, r)
                assert got == [expected[line["id"]]["greedy_after_32"]], line["id"]
            r.text = line["text"]
            r.stopping.max_new_tokens = 1
            r.response.prompt_token_ids = True
            _, info = answers(server, pb, r)
            assert list(info.token_ids) == line["token_ids"], line["id"]
    print("the bundled model: ok", flush=True)


def main():
    with tempfile.TemporaryDirectory() as classes:
        pb, _ = serving.message_classes(classes)
        for name in sys.argv[1:] or ["qwen3_moe", "mixtral", "olmoe", "qwen2_moe"]:
            test_family(pb, name)
        test_demo(pb)


if __name__ == "__main__":
    main()
