"""streams.py - many streams at once against a server of serving.py: greedy and sampled ones, read to their ends and compared with a
reference that nothing disturbed.
"""
import threading
import time

import grpc

import serving

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


def start_streams(server, pb, name, n=STREAMS):
    streams = [Stream(server, pb, i, f"{name}-{i}") for i in range(n)]
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
