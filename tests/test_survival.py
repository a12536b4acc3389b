#!/usr/bin/env python3
"""test_survival.py [KILLS] - workers are killed, stopped and cut off under sixteen streams; every stream gives the same tokens as undisturbed.

  1. Sixteen streams, greedy and sampled, are read once without harm: the reference.
  2. KILLS (20) times: the same streams again; once at least eight of them are mid-decode, a rank or the whole mpirun is killed, or a rank is
     stopped as if it hung. All streams must end with the reference's tokens and text: none lost, repeated or changed.
  3. The coordinator is killed with its journal on disk: a new one finds running and finished requests again, by Attach.
After each server nothing may be left: no process, no shared memory, no file.
"""
import os
import random
import signal
import sys
import tempfile
import threading
import time

import grpc

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402

KILLS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
STREAMS = 16
NEW_TOKENS = 160
GENERATE = "/vllm.Inference/GenerateStream"
ATTACH = "/convoke.v1.Requests/Attach"


class Stream(threading.Thread):
    """One request, read to its end."""

    def __init__(self, server, pb, number, name):
        super().__init__(daemon=True)
        self.server, self.pb, self.number, self.name_of_request = server, pb, number, name
        self.tokens, self.text, self.error, self.done = [], "", None, False
        self.gap, self.last = 0.0, None

    def request(self):
        pb = self.pb
        r = pb.GenerateRequest(request_id=self.name_of_request, text=f"Once upon a time number {self.number}, there was a")
        r.temperature = 0.0 if self.number % 2 == 0 else 1.0
        r.sampling.seed = 1000 + self.number
        r.stopping.max_new_tokens = NEW_TOKENS
        r.stopping.ignore_eos = True
        r.response.output_token_ids = True
        r.response.output_logprobs = True
        if self.number % 5 == 0:
            r.decoding.repetition_penalty = 1.1
        return r

    def take(self, response):
        now = time.monotonic()
        if self.last is not None:
            self.gap = max(self.gap, now - self.last)
        self.last = now
        self.tokens += response.outputs.token_ids
        self.text += response.outputs.text
        if response.outputs.HasField("finish_info"):
            self.done = True

    def run(self):
        try:
            for response in self.server.stream(GENERATE, self.request(), self.pb.GenerateResponse):
                self.take(response)
        except grpc.RpcError as e:
            self.error = e


def start_streams(server, pb, name):
    streams = [Stream(server, pb, i, f"{name}-{i}") for i in range(STREAMS)]
    for s in streams:
        s.start()
    return streams


def end_streams(streams):
    for s in streams:
        s.join(180 * serving.SLOW)
        assert not s.is_alive(), f"stream {s.number} hangs after {len(s.tokens)} tokens"
        assert s.error is None, f"stream {s.number}: {s.error}"
        assert s.done, f"stream {s.number} ended without a finish"


def wait_mid_decode(streams, at_least=8):
    until = time.monotonic() + 60 * serving.SLOW
    while time.monotonic() < until:
        middle = sum(1 for s in streams if 2 <= len(s.tokens) < NEW_TOKENS - 10)
        if middle >= at_least:
            return middle
        time.sleep(0.001)
    raise AssertionError("never eight streams mid-decode: " + str([len(s.tokens) for s in streams]))


def same(streams, reference):
    for s, r in zip(streams, reference):
        assert s.tokens == r.tokens, f"stream {s.number}: tokens differ at {next((i for i, (a, b) in enumerate(zip(s.tokens, r.tokens)) if a != b), 'the end')}"
        assert s.text == r.text, f"stream {s.number}: text differs"


def harm(server, kind, chance):
    workers = server.workers()
    assert len(workers) == server.ranks, f"workers: {workers}"
    rank = chance.choice(sorted(workers))
    if kind == "kill":
        os.kill(workers[rank], signal.SIGKILL)
        return f"kill -9 of rank {rank}"
    if kind == "stop":
        os.kill(workers[rank], signal.SIGSTOP)
        return f"SIGSTOP of rank {rank}"
    os.kill(server.mpirun(), signal.SIGKILL)
    return "kill -9 of mpirun"


def test_kills(pb):
    chance = random.Random(7)
    kinds = (["kill", "kill", "stop", "mpirun"] * (KILLS // 4 + 1))[:KILLS]
    with serving.Server("--hang-seconds", "2", "--max-failures", "1000", ranks=3) as server:
        reference = start_streams(server, pb, "reference")
        end_streams(reference)
        assert all(len(s.tokens) == NEW_TOKENS for s in reference)
        assert len({tuple(s.tokens) for s in reference}) > STREAMS // 2  # greedy ones may agree
        for i, kind in enumerate(kinds):
            streams = start_streams(server, pb, f"kill-{i}")
            middle = wait_mid_decode(streams)
            what = harm(server, kind, chance)
            begin = time.monotonic()
            end_streams(streams)
            same(streams, reference)
            print(f"{what}, {middle} streams mid-decode: longest pause {max(s.gap for s in streams):.2f} s, all ended after "
                  f"{time.monotonic() - begin:.2f} s", flush=True)
    return reference


def attach(server, pb, convoke, name, from_token, patience=120):
    """What the journal gives from a token on."""
    tokens, text, done = [], "", False
    request = convoke.AttachRequest(request_id=name, from_token=from_token)
    request.response.output_token_ids = True
    for response in server.stream(ATTACH, request, pb.GenerateResponse, timeout=patience):
        tokens += response.outputs.token_ids
        text += response.outputs.text
        done = done or response.outputs.HasField("finish_info")
    assert done, name
    return tokens, text


def test_journal(pb, convoke, reference):
    with tempfile.TemporaryDirectory() as folder:
        server = serving.Server("--journal", os.path.join(folder, "journal.sqlite"), "--remember-seconds", "300", ranks=2)
        with server:
            over = Stream(server, pb, 3, "over")
            over.start()
            end_streams([over])
            streams = start_streams(server, pb, "cut")
            wait_mid_decode(streams)
            server.process.kill()
            server.process.wait()
            for s in streams:
                s.join(30)
            server.nothing_left_of_workers()
            server.start()
            tokens, text = attach(server, pb, convoke, "over", 0)
            assert tokens == over.tokens and text == over.text
            for s, r in zip(streams, reference):
                tokens, text = attach(server, pb, convoke, f"cut-{s.number}", len(s.tokens))
                assert s.tokens + tokens == r.tokens, f"stream {s.number} after the coordinator was killed"
                assert s.text + text == r.text, f"stream {s.number}: text after the coordinator was killed"
    print("the coordinator was killed: every request was found again", flush=True)


def main():
    with tempfile.TemporaryDirectory() as classes:
        pb, convoke = serving.message_classes(classes)
        reference = test_kills(pb)
        test_journal(pb, convoke, reference)


if __name__ == "__main__":
    main()
