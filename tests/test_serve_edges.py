#!/usr/bin/env python3
"""test_serve_edges.py - mistakes, limits and bad moments: each is one clear sentence, nothing hangs, nothing is left, no token is wrong.

  1. Servers that cannot start say why and end; told to stop while loading they end in order.
  2. Each field of a request at its limits and beyond.
  3. Clients that cancel, stop reading, break off or read again while workers are killed; pauses under load and during a restart.
  4. The coordinator is killed under streams that know more tokens than its journal; told to stop during a restart, and twice.
"""
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import grpc

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402

GENERATE, STREAM, ATTACH = "/vllm.Inference/Generate", "/vllm.Inference/GenerateStream", "/convoke.v1.Requests/Attach"
CONVOKE = os.path.join(serving.BINARY, "convoke")
LENGTH, ABORTED = 1, 3
BIGGEST = 2**32 - 1
STREAMS = 12


# ---- 1. start ----


def changed_model(folder, name, content):
    """The demo model with one file replaced; content None: by a link to itself."""
    model = tempfile.mkdtemp(dir=folder)
    for file in os.listdir(serving.DEMO):
        if file != name:
            os.symlink(os.path.join(serving.DEMO, file), os.path.join(model, file))
    path = os.path.join(model, name)
    if content is None:
        os.symlink(path, path)
    else:
        with open(path, "wb") as f:
            f.write(content)
    return model


def refuses_to_start(folder, expected, *options, model=serving.DEMO, code=1):
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        environment = dict(os.environ, TMPDIR=tmp, OMPI_MCA_rmaps_base_oversubscribe="1")
        command = [CONVOKE, "serve", "--model", model, "--grpc", "127.0.0.1:0", "--threads", "1", *options]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30 * serving.SLOW, check=False)
        assert run.returncode == code, (command, run)
        assert expected in run.stderr, (command, run.stderr)
        assert run.stdout == "" and os.listdir(tmp) == [], (command, run.stdout, os.listdir(tmp))


def test_start(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "127.0.0.1:%d" % taken.getsockname()[1]
        for option in ("--grpc", "--http", "--control"):
            refuses_to_start(folder, "Address already in use", option, address)
    for option in ("--grpc", "--http"):
        refuses_to_start(folder, f'{option}: "127.0.0.1:99999" is not HOST:PORT', option, "127.0.0.1:99999", code=2)
    refuses_to_start(folder, "Name or service not known", "--grpc", "no.such.host.invalid:0")
    refuses_to_start(folder, "there is no such model folder", model=os.path.join(folder, "nothing"))
    refuses_to_start(folder, "there is no such model folder", model=os.path.join(serving.DEMO, "config.json"))
    refuses_to_start(folder, "tokenizer.json: not JSON", model=changed_model(folder, "tokenizer.json", b"{"))
    refuses_to_start(folder, "tokenizer.json: cannot be read", model=changed_model(folder, "tokenizer.json", None))
    refuses_to_start(folder, "generation_config.json", model=changed_model(folder, "generation_config.json", b'{"temperature": "hot"}'))
    refuses_to_start(folder, "config.json: not JSON", model=changed_model(folder, "config.json", b"{"))
    for name, text, option, expected in (("plan", "{}", "--plan", "plan: format is missing"), ("hosts", "a slot=2\n", "--hostfile", "line 1: \"slot\""),
                                         ("token", "short", "--admin-token-file", "at least 16 characters"),
                                         ("journal", "a text\n" * 200, "--journal", "not a journal of Convoke")):
        path = os.path.join(folder, name)
        with open(path, "w", encoding="ascii") as f:
            f.write(text)
        refuses_to_start(folder, expected, option, path)
    refuses_to_start(folder, "does not hold one block", "--kv-bytes", "1K")


def test_stop_while_loading():
    for delay in (0.15, 0.6):
        server = serving.Server(ready=False)
        try:
            with open(server.log_path, "ab") as log:
                server.process = subprocess.Popen(server.arguments, env=server.environment, stdout=subprocess.DEVNULL, stderr=log)
            server.pids.append(server.process.pid)
            time.sleep(delay * serving.SLOW)
            server.process.send_signal(signal.SIGTERM)
            server.stop()
        finally:
            server.destroy()


# ---- 2. fields ----


def request(pb, n_new, name="", seed=None, text="Once upon a time"):
    r = pb.GenerateRequest(request_id=name, text=text)
    r.temperature = 0.0 if seed is None else 1.0
    if seed is not None:
        r.sampling.seed = seed
    r.stopping.max_new_tokens = n_new
    r.stopping.ignore_eos = True
    r.response.output_token_ids = True
    return r


def answer(server, pb, r, **more):
    """OK, or the code's name and the sentence."""
    try:
        responses = list(server.stream(STREAM, r, pb.GenerateResponse, **more))
    except grpc.RpcError as e:
        return e.code().name, e.details()
    finishes = [x.outputs.finish_info.num_output_tokens for x in responses if x.outputs.HasField("finish_info")]
    assert len(finishes) == max(1, r.sampling.num_sequences), responses
    return "OK", ""


def put(r, path, value):
    *way, last = path.split(".")
    for name in way:
        r = getattr(r, name)
    if isinstance(value, list):
        del getattr(r, last)[:]
        getattr(r, last).extend(value)
    elif isinstance(value, dict):
        getattr(r, last).update(value)
    else:
        setattr(r, last, value)


# field, values that are fine, values that are INVALID_ARGUMENT
FIELDS = (
    ("temperature", [0, 1e-30, 100], [math.nan, math.inf, -1, 101]),
    ("sampling.num_sequences", [0, 2, 64], [65, BIGGEST]),
    ("sampling.top_k", [1, BIGGEST], []),
    ("sampling.top_p", [1e-9, 1], [math.nan, -1, 1.01]),
    ("sampling.min_p", [1], [math.nan, -1, 2]),
    ("sampling.seed", [-2**63, 2**63 - 1], []),
    ("decoding.presence_penalty", [-2, 2], [math.nan, -2.1, math.inf]),
    ("decoding.frequency_penalty", [-2, 2], [math.nan, 3]),
    ("decoding.repetition_penalty", [1e-30, 1000], [math.nan, -1, 1001]),
    ("decoding.logit_bias", [{0: 100}, {4095: -100}], [{0: math.nan}, {0: 101}, {4096: 1}, {BIGGEST: 1}]),
    ("decoding.allowed_token_ids", [[5] * 10, list(range(4096))], [[4096], [BIGGEST], [5] * 4097]),
    ("stopping.max_new_tokens", [0, 1, 40], [2045, BIGGEST]),
    ("stopping.min_new_tokens", [3], [4, BIGGEST]),
    ("stopping.stop_token_ids", [[4095]], [[4096], [BIGGEST], [1] * 4097]),
    ("stopping.stop_strings", [["a"] * 64, ["x" * 1024], ["é"]], [[""], ["a"] * 65, ["x" * 1025], ["\0"]]),
    ("response.prompt_candidates.top_n", [1, 4096], [4097, BIGGEST]),
    ("response.output_candidates.all", [True], []),
    ("kv.cache_salt", ["x" * 100000], ["\0"]),
    ("truncate_prompt_tokens", [1, BIGGEST], []),
    ("priority", [-2**31, 2**31 - 1], []),
    ("session_id", ["x" * 5000, "a:b:c"], []),
    ("request_id", ["x" * 127, "ü"], ["x" * 128, "a\nb", "\0"]),
    ("text", ["\0"], ["", "a" * 20000]),
)
UNSERVED = (("decoding.json", "{}"), ("decoding.regex", "a"), ("decoding.grammar", "a"), ("decoding.json_object", True), ("lora_name", "x"))


def test_fields(server, pb):
    for field, fine, wrong in FIELDS:
        for expected, values in (("OK", fine), ("INVALID_ARGUMENT", wrong)):
            for value in values:
                r = request(pb, 3)
                put(r, field, value)
                code, sentence = answer(server, pb, r)
                assert code == expected, (field, value, code, sentence)
    for field, value in UNSERVED:
        r = request(pb, 3)
        put(r, field, value)
        code, sentence = answer(server, pb, r)
        assert code == "UNIMPLEMENTED" and field in sentence, (field, code, sentence)
    for n_prompt, n_new, expected in ((2047, 1, "OK"), (2048, 1, "INVALID_ARGUMENT"), (2000, 48, "OK"), (2000, 49, "INVALID_ARGUMENT")):
        r = request(pb, n_new)
        r.token_ids.ids.extend([5] * n_prompt)
        code, sentence = answer(server, pb, r)
        assert code == expected, (n_prompt, n_new, code, sentence)
    for key, value, expected in (("x-data-parallel-rank", "1", "OK"), ("x-data-parallel-rank", "2", "INVALID_ARGUMENT"), ("x-data-parallel-rank", "-1", "INVALID_ARGUMENT"),
                                 ("x-linger-ms", "a", "INVALID_ARGUMENT"), ("x-linger-ms", "600001", "INVALID_ARGUMENT")):
        code, sentence = answer(server, pb, request(pb, 3), metadata=((key, value),))
        assert code == expected, (key, value, code, sentence)


def test_damaged_messages(server):
    raw = server.channel.unary_stream(STREAM, request_serializer=lambda x: x, response_deserializer=lambda x: x)
    for name, message in (("text", b"\x1a\x02\xff\xfe"), ("id", b"\x0a\x02\xff\xfe\x1a\x01a"), ("cut", b"\x1a\x50a"), ("type", b"\x1d\0\0\0\0"), ("group", b"\x0b\x0c"), ("empty", b"")):
        try:
            list(raw(message, timeout=30 * serving.SLOW))
            raise AssertionError(f"{name} is accepted")
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.INVALID_ARGUMENT, (name, e)


# ---- 3. bad moments ----


class Stream(threading.Thread):
    """One call read to its end, or until it has `enough` tokens; then it is cancelled."""

    def __init__(self, server, pb, r, path=STREAM, enough=None, linger=None):
        super().__init__(daemon=True)
        self.tokens, self.text, self.n_tokens, self.finish, self.error = {}, {}, 0, None, None
        self.enough = enough
        metadata = (("x-linger-ms", str(linger)),) if linger else None
        self.call = server.stream(path, r, pb.GenerateResponse, metadata=metadata)
        self.start()

    def run(self):
        try:
            for response in self.call:
                o = response.outputs
                self.tokens.setdefault(o.index, []).extend(o.token_ids)
                self.text[o.index] = self.text.get(o.index, "") + o.text
                self.n_tokens += o.num_tokens
                if o.HasField("finish_info"):
                    self.finish = o.finish_info.finish_reason
                if self.enough is not None and self.n_tokens >= self.enough:
                    self.call.cancel()
                    return
        except grpc.RpcError as e:
            self.error = e

    def wait_for(self, n_tokens):
        until = time.monotonic() + 60 * serving.SLOW
        while self.n_tokens < n_tokens and self.is_alive():
            assert time.monotonic() < until, f"only {self.n_tokens} tokens"
            time.sleep(0.002)
        return self

    def end(self):
        self.join(120 * serving.SLOW)
        assert not self.is_alive(), f"hangs after {self.n_tokens} tokens"
        return self

    def end_well(self):
        self.end()
        assert self.error is None and self.finish == LENGTH, (self.error, self.finish, self.n_tokens)
        return self


def mixed(pb, i, name=""):
    r = request(pb, 60 + 5 * i, name, seed=i, text=f"Number {i} was once upon a time")
    r.sampling.num_sequences = 1 + i % 3
    r.response.prompt_logprobs = i % 4 == 1
    if i % 4 == 2:
        r.response.output_candidates.top_n = 5
    return r


def live(server, convoke):
    listed = server.call("/convoke.v1.Requests/List", convoke.ListRequest(), convoke.ListResponse)
    return [x.request_id for x in listed.requests if not x.finished]


def wait_until_idle(server, convoke):
    until = time.monotonic() + 20 * serving.SLOW
    while live(server, convoke):
        assert time.monotonic() < until, f"still live: {live(server, convoke)}"
        time.sleep(0.05)


def attach(server, pb, convoke, name, from_token):
    r = convoke.AttachRequest(request_id=name, from_token=from_token)
    r.response.output_token_ids = True
    return Stream(server, pb, r, ATTACH)


def kill_a_worker(server, chance):
    workers = server.workers()
    if workers:
        os.kill(chance.choice(sorted(workers.values())), signal.SIGKILL)


def test_chaos(server, pb, convoke):
    chance = random.Random(11)
    reference = [Stream(server, pb, mixed(pb, i)).end_well() for i in range(STREAMS)]
    for turn in range(2):
        kept = [Stream(server, pb, mixed(pb, i)) for i in range(STREAMS)]
        dropped = [Stream(server, pb, mixed(pb, i), enough=chance.randrange(40)) for i in range(STREAMS)]
        broken = [Stream(server, pb, mixed(pb, i, f"broken-{turn}-{i}"), enough=10, linger=60000) for i in range(0, STREAMS, 3)]  # of one sequence
        for s in broken:
            s.end()
        kill_a_worker(server, chance)
        again = [attach(server, pb, convoke, f"broken-{turn}-{i}", s.n_tokens) for i, s in zip(range(0, STREAMS, 3), broken)]
        for s, r in zip(kept, reference):
            s.end_well()
            assert s.tokens == r.tokens and s.text == r.text
        for i, s, a in zip(range(0, STREAMS, 3), broken, again):
            a.end_well()
            assert s.tokens[0] + a.tokens[0] == reference[i].tokens[0] and s.text[0] + a.text[0] == reference[i].text[0]
        for s in dropped:
            s.end()
    wait_until_idle(server, convoke)


def test_not_reading_over_a_restart(server, pb, convoke):
    """A client that does not read has its sequence held, also by the workers of the next launch; then it gets all of it."""
    r = request(pb, 60)
    r.response.output_candidates.all = True
    expected = Stream(server, pb, request(pb, 60)).end_well().tokens[0]
    call = server.stream(STREAM, r, pb.GenerateResponse)
    first = next(call)
    kill_a_worker(server, random.Random(2))
    Stream(server, pb, request(pb, 5)).end_well()  # the workers are back
    assert len(live(server, convoke)) == 1
    tokens = list(first.outputs.token_ids)
    for response in call:
        tokens += response.outputs.token_ids
    assert tokens == expected


def test_broken_within_a_piece(server, pb, convoke):
    """What has gathered for a client that did not read comes in several messages; each has the text of its tokens."""
    expected = Stream(server, pb, request(pb, 400)).end_well()
    r = request(pb, 400, "within")
    r.response.output_candidates.all = True
    call = server.stream(STREAM, r, pb.GenerateResponse, metadata=(("x-linger-ms", "60000"),))
    tokens, text = [], ""
    time.sleep(1)
    for response in call:
        tokens += response.outputs.token_ids
        text += response.outputs.text
        if response.outputs.num_tokens > 10:  # a message has room for about thirteen
            break
    call.cancel()
    a = attach(server, pb, convoke, "within", len(tokens)).end_well()
    assert tokens + a.tokens[0] == expected.tokens[0] and text + a.text[0] == expected.text[0], (len(tokens), text)


def control(server, pb, name, **fields):
    server.call("/vllm.Control/" + name, getattr(pb, name + "Request")(**fields), getattr(pb, name + "Response"))


def test_pauses(server, pb):
    abort, wait, keep = 1, 2, 3
    for restart in (False, True):
        for mode in (abort, wait, keep):
            n_new = 2000 if mode == abort else 300  # aborted ones must not be over before
            running = Stream(server, pb, request(pb, n_new)).wait_for(3)
            if restart:
                os.kill(server.workers()[1], signal.SIGKILL)
                time.sleep(0.1)
            control(server, pb, "PauseGeneration", mode=mode)
            new = Stream(server, pb, request(pb, 3))
            if mode == wait:
                running.end_well()
            elif mode == abort:
                assert running.end().finish == ABORTED
            before = running.n_tokens if mode == keep else 0
            time.sleep(0.3 if not restart else 2)
            assert new.n_tokens == 0 and (mode != keep or running.n_tokens - before <= 5)
            control(server, pb, "ResumeGeneration")
            new.end_well()
            assert mode == abort or running.end_well().n_tokens == n_new


def generate(server, *arguments, **more):
    return subprocess.Popen([CONVOKE, "generate", "--connect", server.address, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def test_generate(server, convoke):
    endless = ("--max-tokens", "2000", "--ignore-eos", "Once")
    p = generate(server, *endless)
    p.stdout.read(10)
    p.send_signal(signal.SIGINT)
    assert p.communicate(timeout=20 * serving.SLOW)[1] == b"" and p.returncode == 130
    p = generate(server, *endless)
    p.stdout.read(10)
    p.stdout.close()  # as head does
    assert p.wait(20 * serving.SLOW) != 0 and p.stderr.read() == b""
    p = generate(server, b"\xff\xfe")
    assert b"byte 0 of the text is not UTF-8" in p.communicate(timeout=20 * serving.SLOW)[1] and p.returncode == 1
    p = generate(server, *endless)
    p.stdout.read(10)
    p.kill()
    p.communicate()
    wait_until_idle(server, convoke)


# ---- 4. the coordinator ----


def test_killed_coordinator(folder, pb, convoke):
    """Tokens that were shown and not yet written down are computed again, and a client that has them gets none twice."""
    journal = os.path.join(folder, "requests")
    with serving.Server("--journal", journal, "--journal-commit-ms", "10000") as server:
        refuses_to_start(folder, "in use by another coordinator", "--journal", journal)
        reference = [Stream(server, pb, mixed(pb, i)).end_well() for i in (0, 3)]
        streams = [Stream(server, pb, mixed(pb, i, f"cut-{i}")) for i in (0, 3)]
        test_broken_within_a_piece(server, pb, convoke)
        gone = Stream(server, pb, request(pb, 2000, "gone"))
        for s in [gone] + streams:
            s.wait_for(20)
        server.process.kill()
        server.process.wait()
        for s in streams + [gone]:
            s.end()
        server.nothing_left_of_workers()
        server.start()
        again = [attach(server, pb, convoke, f"cut-{i}", s.n_tokens) for i, s in zip((0, 3), streams)]
        for s, a, r in zip(streams, again, reference):
            a.end_well()
            assert s.tokens[0] + a.tokens[0] == r.tokens[0], (s.n_tokens, a.n_tokens)
            assert s.text[0] + a.text[0] == r.text[0]
        server.call("/vllm.Control/Abort", pb.AbortRequest(request_ids=["gone"]), pb.AbortResponse)
        assert attach(server, pb, convoke, "gone", 5000).end().finish == ABORTED


def test_stop(pb):
    with serving.Server("--drain-seconds", "30") as server:
        s = Stream(server, pb, request(pb, 300)).wait_for(5)
        os.kill(server.workers()[1], signal.SIGKILL)
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)  # what runs is finished by the next workers
        time.sleep(0.5)
        assert answer(server, pb, request(pb, 3))[0] == "UNAVAILABLE"
        assert s.end_well().n_tokens == 300
    with serving.Server("--drain-seconds", "60") as server:
        s = Stream(server, pb, request(pb, 2000)).wait_for(5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert s.end().error.code() == grpc.StatusCode.UNAVAILABLE and "shut down" in s.error.details()


def main():
    with tempfile.TemporaryDirectory() as folder:
        pb, convoke = serving.message_classes(folder)
        began = time.monotonic()

        def say(what):
            print(f"{time.monotonic() - began:5.1f} s: {what}", flush=True)

        test_start(folder)
        test_stop_while_loading()
        say("what cannot start says why and leaves nothing")
        with serving.Server("--max-failures", "1000", "--reader-bytes", "4096") as server:
            test_fields(server, pb)
            test_damaged_messages(server)
            say("fields at their limits")
            test_chaos(server, pb, convoke)
            test_not_reading_over_a_restart(server, pb, convoke)
            say("cancelled, broken, unread and killed: every token is right")
            test_pauses(server, pb)
            say("pauses, also during restarts")
            test_generate(server, convoke)
        say("convoke generate, interrupted")
        test_killed_coordinator(folder, pb, convoke)
        test_stop(pb)
        say("coordinators killed and told to stop")


if __name__ == "__main__":
    main()
