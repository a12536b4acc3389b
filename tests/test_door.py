#!/usr/bin/python3
"""test_door.py --fake PROGRAM | --address HOST:PORT - the gRPC door as a client sees it.

With --fake the server is tests/door_fake, whose model says its prompt again and again, one byte per token: exact answers and all edge
cases. With --address it is any running server that may be given work; tests that need the script are skipped."""

import argparse
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import grpc

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from door_client import Client, Fake, load_messages

vllm, convoke, health, reflection, reflection_alpha, _, engine = load_messages()
Code = grpc.StatusCode
PATIENCE = float(os.environ.get("CONVOKE_TEST_PATIENCE", "1"))  # sanitizers make a server slow
TIMEOUT = 30 * PATIENCE
LONG = 1900  # tokens that take long enough to be interrupted, and fit into any model


class DoorTest(unittest.TestCase):
    program = None  # tests/door_fake
    address = None  # of a server that runs already
    options = {"token_ms": 0.5}

    @classmethod
    def setUpClass(cls):
        cls.fake = Fake(cls.program, **cls.options) if cls.program else None
        cls.at = cls.fake.address if cls.fake else cls.address
        cls.client = Client(cls.at)
        cls.methods(cls, cls.client)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        if cls.fake:
            code = cls.fake.stop()
            if code:
                raise AssertionError(f"the server ended with {code}")

    def methods(self, client):
        self.generate = staticmethod(client.unary("/vllm.Inference/Generate", vllm.GenerateRequest, vllm.GenerateResponse))
        self.stream = staticmethod(client.stream("/vllm.Inference/GenerateStream", vllm.GenerateRequest, vllm.GenerateResponse))
        self.check = staticmethod(client.unary("/grpc.health.v1.Health/Check", health.HealthCheckRequest, health.HealthCheckResponse))
        self.attach = staticmethod(client.stream("/convoke.v1.Requests/Attach", convoke.AttachRequest, vllm.GenerateResponse))
        self.list = staticmethod(client.unary("/convoke.v1.Requests/List", convoke.ListRequest, convoke.ListResponse))
        self.abort = staticmethod(client.unary("/vllm.Control/Abort", vllm.AbortRequest, vllm.AbortResponse))

    def fails(self, code, call, *arguments, **named):
        """The call ends with this status; returns the error."""
        named.setdefault("timeout", TIMEOUT)
        with self.assertRaises(grpc.RpcError) as raised:
            answer = call(*arguments, **named)
            if isinstance(answer, grpc.Call):
                list(answer)
        self.assertEqual(raised.exception.code(), code, raised.exception.details())
        return raised.exception

    def summary(self, request_id):
        for r in self.list(convoke.ListRequest(), timeout=TIMEOUT).requests:
            if r.request_id == request_id:
                return r
        return None

    def wait_finished(self, request_id, seconds=10):
        until = time.time() + seconds * PATIENCE
        while time.time() < until:
            r = self.summary(request_id)
            if r is None or r.finished:
                return r
            time.sleep(0.02)
        self.fail(f"{request_id} runs on")

    def only_fake(self):
        if not self.fake:
            self.skipTest("needs the scripted model")


def request(text="hello ", tokens=None, **fields):
    r = vllm.GenerateRequest(text=text, **fields)
    if tokens:
        r.stopping.max_new_tokens = tokens
        r.stopping.ignore_eos = tokens == LONG
    return r


class Answers(DoorTest):
    def test_unary_says_what_the_stream_says(self):
        for text in ["hello ", "Once upon a time", "żółć and €uro 😀 end "]:
            r = request(text, 40, temperature=0)
            r.stopping.ignore_eos = True
            r.response.output_token_ids = True
            whole = self.generate(r, timeout=TIMEOUT)
            parts = list(self.stream(r, timeout=TIMEOUT))
            self.assertEqual("".join(p.outputs.text for p in parts), whole.outputs.text)
            self.assertEqual([i for p in parts for i in p.outputs.token_ids], list(whole.outputs.token_ids))
            self.assertEqual(sum(p.outputs.num_tokens for p in parts), whole.outputs.num_tokens)
            self.assertEqual(whole.outputs.num_tokens, 40)
            self.assertEqual(parts[-1].outputs.finish_info, whole.outputs.finish_info)
            self.assertEqual(whole.outputs.finish_info.num_output_tokens, 40)
            self.assertEqual(whole.outputs.finish_info.finish_reason, vllm.FinishInfo.LENGTH)
            self.assertTrue(parts[0].HasField("prompt_info"))
            self.assertFalse(any(p.HasField("prompt_info") for p in parts[1:]))
            self.assertFalse(any(p.outputs.HasField("finish_info") for p in parts[:-1]))

    def test_the_older_paths_answer_alike(self):
        generate = self.client.unary("/vllm.Generate/Generate", vllm.GenerateRequest, vllm.GenerateResponse)
        stream = self.client.stream("/vllm.Generate/GenerateStream", vllm.GenerateRequest, vllm.GenerateResponse)
        r = request(tokens=8, temperature=0)
        text = self.generate(r, timeout=TIMEOUT).outputs.text
        self.assertEqual(generate(r, timeout=TIMEOUT).outputs.text, text)
        self.assertEqual("".join(p.outputs.text for p in stream(r, timeout=TIMEOUT)), text)

    def test_twenty_tokens_unless_said(self):
        r = request(temperature=0)
        r.stopping.ignore_eos = True
        self.assertEqual(self.generate(r, timeout=TIMEOUT).outputs.num_tokens, 20)

    def test_nothing_is_said_that_was_not_asked_for(self):
        plain = self.generate(request(tokens=4), timeout=TIMEOUT)
        self.assertTrue(plain.outputs.text)
        self.assertGreater(plain.prompt_info.num_prompt_tokens, 0)
        for field in ["token_ids", "logprobs", "ranks", "candidate_tokens"]:
            self.assertEqual(len(getattr(plain.outputs, field)), 0, field)
            self.assertEqual(len(getattr(plain.prompt_info, field)), 0, field)
        r = request(tokens=4)
        r.response.output_text = False
        quiet = self.generate(r, timeout=TIMEOUT)
        self.assertEqual((quiet.outputs.text, quiet.outputs.num_tokens), ("", 4))

    def test_logprobs_ranks_and_candidates_of_prompt_and_output(self):
        r = request("abcdef", 5, temperature=0)
        r.response.prompt_token_ids = r.response.prompt_logprobs = True
        r.response.output_token_ids = r.response.output_logprobs = True
        r.response.prompt_candidates.top_n = 3
        r.response.output_candidates.top_n = 2
        for parts in [[self.generate(r, timeout=TIMEOUT)], list(self.stream(r, timeout=TIMEOUT))]:
            prompt = parts[0].prompt_info
            n = prompt.num_prompt_tokens
            self.assertEqual([len(prompt.token_ids), len(prompt.logprobs), len(prompt.ranks), len(prompt.candidate_tokens)], [n] * 4)
            self.assertEqual((prompt.logprobs[0], prompt.ranks[0], len(prompt.candidate_tokens[0].tokens)), (0, 0, 0))
            self.assertTrue(all(lp <= 0 for lp in prompt.logprobs))
            self.assertTrue(all(len(c.tokens) == 3 for c in prompt.candidate_tokens[1:]))
            n = sum(p.outputs.num_tokens for p in parts)
            logprobs = [x for p in parts for x in p.outputs.logprobs]
            candidates = [x for p in parts for x in p.outputs.candidate_tokens]
            self.assertEqual([len(logprobs), len(candidates), sum(len(p.outputs.ranks) for p in parts)], [n] * 3)
            for c in candidates:
                self.assertEqual([t.rank for t in c.tokens], [1, 2])
                self.assertGreaterEqual(c.tokens[0].logprob, c.tokens[1].logprob)
            if self.fake:
                self.assertEqual(bytes(prompt.token_ids), b"abcdef")
                self.assertEqual(logprobs, [0, -0.25, -0.5, -0.75, -1])
                self.assertEqual([x for p in parts for x in p.outputs.ranks], [1, 2, 3, 1, 2])

    def test_candidates_by_id_and_all(self):
        r = request("abc", 3)
        r.response.output_candidates.token_ids.ids.extend([9, 5, 7])
        out = self.generate(r, timeout=TIMEOUT).outputs
        self.assertEqual([[t.id for t in c.tokens] for c in out.candidate_tokens], [[9, 5, 7]] * 3)
        self.assertEqual(len(out.logprobs), 0)
        r.response.output_candidates.all = True
        out = self.generate(r, timeout=TIMEOUT).outputs
        sizes = {len(c.tokens) for c in out.candidate_tokens}
        self.assertEqual(len(sizes), 1)
        self.assertGreaterEqual(sizes.pop(), 256)

    def test_token_ids_as_prompt(self):
        r = vllm.GenerateRequest(token_ids=vllm.TokenIds(ids=[10, 20, 30]), temperature=0)
        r.response.prompt_token_ids = True
        answer = self.generate(r, timeout=TIMEOUT)
        self.assertEqual(list(answer.prompt_info.token_ids), [10, 20, 30])
        r.truncate_prompt_tokens = 2
        self.assertEqual(list(self.generate(r, timeout=TIMEOUT).prompt_info.token_ids), [20, 30])

    def test_several_sequences(self):
        r = request("abcdef", 7, temperature=1)
        r.stopping.ignore_eos = True
        r.sampling.num_sequences = 3
        r.sampling.seed = 5
        answers = []
        for _ in range(2):
            texts, ends, prompts = {}, {}, 0
            for p in self.stream(r, timeout=TIMEOUT):
                prompts += p.HasField("prompt_info")
                if p.HasField("outputs"):
                    texts[p.outputs.index] = texts.get(p.outputs.index, "") + p.outputs.text
                    if p.outputs.HasField("finish_info"):
                        ends[p.outputs.index] = p.outputs.finish_info.num_output_tokens
            self.assertEqual((prompts, ends), (1, {0: 7, 1: 7, 2: 7}))
            answers.append(texts)
        self.assertEqual(len(set(answers[0].values())), 3)
        self.assertEqual(answers[0], answers[1])

    def test_stop_strings_are_held_back(self):
        self.only_fake()
        r = request("one two END three ", 50)
        r.stopping.stop_strings.append("END")
        parts = list(self.stream(r, timeout=TIMEOUT))
        self.assertEqual("".join(p.outputs.text for p in parts), "one two ")
        self.assertFalse(any("E" in p.outputs.text for p in parts))
        finish = parts[-1].outputs.finish_info
        self.assertEqual((finish.finish_reason, finish.stop_string), (vllm.FinishInfo.STOP, "END"))
        r.stopping.include_stop_strings = True
        self.assertEqual(self.generate(r, timeout=TIMEOUT).outputs.text, "one two END")

    def test_stop_tokens_and_the_end_of_text(self):
        self.only_fake()
        r = request("abc", 50)
        r.stopping.stop_token_ids.append(ord("c"))
        finish = self.generate(r, timeout=TIMEOUT).outputs.finish_info
        self.assertEqual((finish.finish_reason, finish.WhichOneof("stop_reason"), finish.stop_token_id),
                         (vllm.FinishInfo.STOP, "stop_token_id", ord("c")))
        r = vllm.GenerateRequest(token_ids=vllm.TokenIds(ids=[65, 66, 0, 67]))
        answer = self.generate(r, timeout=TIMEOUT).outputs
        self.assertEqual((answer.text, answer.finish_info.WhichOneof("stop_reason"), answer.finish_info.num_output_tokens),
                         ("AB", "eos_token_id", 3))

    def test_text_keeps_nul_bytes(self):
        self.only_fake()
        r = request("a\0b", 6)
        r.stopping.ignore_eos = True
        answer = self.generate(r, timeout=TIMEOUT)
        self.assertEqual((answer.prompt_info.num_prompt_tokens, answer.outputs.text), (3, "a\0ba\0b"))

    def test_every_field_reaches_the_wish(self):
        self.only_fake()
        r = request("abc", 30, request_id="wish", model="echo", temperature=0.5, priority=-3, session_id="us:er")
        r.sampling.top_k, r.sampling.top_p, r.sampling.min_p, r.sampling.seed = 5, 0.75, 0.25, -1
        r.decoding.presence_penalty, r.decoding.frequency_penalty, r.decoding.repetition_penalty = 0.5, 0.25, 1.5
        r.decoding.logit_bias[7] = 2.0
        r.decoding.allowed_token_ids.extend([1, 2])
        r.stopping.min_new_tokens = 3
        r.kv.bypass_prefix_cache = True
        r.kv.cache_salt = "salt"
        r.response.skip_special_tokens = False
        self.generate(r, timeout=TIMEOUT, metadata=[("x-data-parallel-rank", "2"), ("x-linger-ms", "1500")])
        self.assertEqual(json.loads(self.fake.ask("wish")), {
            "id": "wish", "client": "us:er:", "n": 0, "max_new": 30, "min_new": 3, "has_temperature": 1, "temperature": 0.5,
            "has_top_k": 1, "top_k": 5, "has_top_p": 1, "top_p": 0.75, "min_p": 0.25, "has_seed": 1, "seed": 2**64 - 1,
            "presence": 0.5, "frequency": 0.25, "repetition": 1.5, "n_biases": 1, "n_allowed": 2, "include_stop": 0, "ignore_eos": 0,
            "keep_special": 1, "no_text": 0, "bypass": 1, "salt": "salt", "priority": -3, "owner": 2, "linger_ms": 1500,
            "add_special": 1})
        self.generate(vllm.GenerateRequest(token_ids=vllm.TokenIds(ids=[1])), timeout=TIMEOUT)
        wish = json.loads(self.fake.ask("wish"))
        self.assertTrue(wish.pop("client").startswith("ipv4:127.0.0.1:"))
        self.assertEqual({k: v for k, v in wish.items() if v}, {"max_new": 20, "owner": -1})

    def test_a_failure_after_tokens_is_the_calls_status(self):
        self.only_fake()
        call = self.stream(request("fail here", 9), timeout=TIMEOUT)
        error = self.fails(Code.UNAVAILABLE, lambda timeout: call)
        self.assertIn("workers were lost", error.details())
        self.fails(Code.UNAVAILABLE, self.generate, request("fail here", 9))


class Refusals(DoorTest):
    options = {"token_ms": 20, "max_requests": 3, "max_length": 1000}

    def test_fields_that_are_not_served_are_named(self):
        cases = [("media", request(media=[vllm.MediaItem(url="http://x")])), ("lora_name", request(lora_name="x"))]
        for field in ["json", "regex", "grammar", "structural_tag"]:
            cases.append((field, request(decoding=vllm.DecodingParameters(**{field: "x"}))))
        cases.append(("json_object", request(decoding=vllm.DecodingParameters(json_object=True))))
        cases.append(("choice", request(decoding=vllm.DecodingParameters(choice=vllm.DecodingParameters.StringChoices(choices=["x"])))))
        for field in ["kv_transfer_params", "ec_transfer_params"]:
            r = request()
            getattr(r.kv, field).fields["x"].number_value = 1
            cases.append((field, r))
        for field, r in cases:
            for call in [self.generate, self.stream]:
                self.assertIn(field, self.fails(Code.UNIMPLEMENTED, call, r).details())

    def test_an_unknown_model_is_not_found(self):
        self.fails(Code.NOT_FOUND, self.generate, request(model="no-such-model"))

    def test_requests_that_cannot_be_right(self):
        self.assertIn("prompt", self.fails(Code.INVALID_ARGUMENT, self.generate, vllm.GenerateRequest()).details())
        self.fails(Code.INVALID_ARGUMENT, self.generate, request(""))
        self.fails(Code.INVALID_ARGUMENT, self.generate, vllm.GenerateRequest(token_ids=vllm.TokenIds(ids=[2**32 - 1])))
        self.fails(Code.INVALID_ARGUMENT, self.generate, vllm.GenerateRequest(token_ids=vllm.TokenIds(ids=[2**31 - 1])))
        for value in ["x", "-1", "", "99999999999999999999", "1 "]:
            error = self.fails(Code.INVALID_ARGUMENT, self.generate, request(), metadata=[("x-data-parallel-rank", value)])
            self.assertIn("x-data-parallel-rank", error.details())
        self.fails(Code.INVALID_ARGUMENT, self.generate, request(), metadata=[("x-data-parallel-rank", "100000")])

    def test_too_long_a_prompt_is_told_with_both_numbers(self):
        self.only_fake()
        details = self.fails(Code.INVALID_ARGUMENT, self.generate, request("x" * 2000)).details()
        self.assertIn("2000", details)
        self.assertIn("1000", details)

    def test_unary_generate_answers_with_one_sequence(self):
        r = request()
        r.sampling.num_sequences = 2
        self.assertIn("GenerateStream", self.fails(Code.INVALID_ARGUMENT, self.generate, r).details())

    def test_one_live_request_per_id(self):
        call = self.stream(request(tokens=900, request_id="twice"), timeout=TIMEOUT)
        next(call)
        self.fails(Code.ALREADY_EXISTS, self.generate, request(request_id="twice"))
        call.cancel()
        self.wait_finished("twice")

    def test_a_full_queue_says_when_to_come_again(self):
        self.only_fake()
        calls = [self.stream(request(tokens=900), timeout=TIMEOUT) for _ in range(3)]
        for call in calls:
            next(call)
        error = self.fails(Code.RESOURCE_EXHAUSTED, self.generate, request())
        self.assertEqual(dict(error.trailing_metadata()).get("retry-after-ms"), "250")
        for call in calls:
            call.cancel()

    def test_draining_refuses_new_requests(self):
        self.only_fake()
        self.fake.ask("state draining")
        self.fails(Code.UNAVAILABLE, self.generate, request())
        self.fake.ask("state ready")

    def test_malformed_protobuf(self):
        raw = self.client.raw("/vllm.Inference/Generate")
        for body in [b"\xff\xff\xff", b"\x1a\x7fhi", b"\x0b", b"\x2a\x05ab", b"\x32\x02\x08", b"\x08" + b"\xff" * 11]:
            self.fails(Code.INVALID_ARGUMENT, raw, body)

    def test_strings_must_be_utf8_without_nul(self):
        raw = self.client.raw("/vllm.Inference/Generate")
        self.assertIn("request_id", self.fails(Code.INVALID_ARGUMENT, raw, b"\x0a\x02\xff\xfe\x1a\x01a").details())
        self.assertIn("request_id", self.fails(Code.INVALID_ARGUMENT, raw, b"\x0a\x03a\x00b\x1a\x01a").details())

    def test_nesting_without_end_is_refused(self):
        body = b""
        for _ in range(20000):  # kv.kv_transfer_params: Struct in Value in Struct ...
            inner = b"\x2a" + varint(len(body)) + body
            entry = b"\x12" + varint(len(inner)) + inner
            body = b"\x0a" + varint(len(entry)) + entry
        params = b"\x1a" + varint(len(body)) + body
        error = self.fails(Code.INVALID_ARGUMENT, self.client.raw("/vllm.Inference/Generate"), b"\x52" + varint(len(params)) + params)
        self.assertIn("nested", error.details())

    def test_too_many_parts_are_refused(self):
        body = b"\x72\x00" * 450000  # empty media items
        self.assertIn("parts", self.fails(Code.INVALID_ARGUMENT, self.client.raw("/vllm.Inference/Generate"), body).details())

    def test_oversized_requests(self):
        big = Client(self.at, options=[("grpc.max_send_message_length", -1)])
        self.fails(Code.RESOURCE_EXHAUSTED, big.raw("/vllm.Inference/Generate"), request("x" * 40_000_000).SerializeToString())
        big.close()
        self.generate(request(tokens=1), timeout=TIMEOUT)

    def test_unknown_methods(self):
        for path in ["/vllm.Inference/Nothing", "/no.such.Service/Method", "/", "/vllm.Control/LoadLora", "/vllm.Control/Sleep",
                     "/vllm.Control/GetKvEventSources", "/vllm.Control/UpdateWeights", "/vllm.grpc.engine.VllmEngine/Embed"]:
            self.assertIn(path, self.fails(Code.UNIMPLEMENTED, self.client.raw(path), b"").details())

    def test_no_request_message_at_all(self):
        call = self.client.channel.stream_unary("/vllm.Inference/Generate")
        self.fails(Code.INVALID_ARGUMENT, call, iter(()))


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


class Endings(DoorTest):
    options = {"token_ms": 5}

    def test_a_cancelled_call_ends_the_request(self):
        call = self.stream(request(tokens=LONG, request_id="cancel"), timeout=TIMEOUT)
        next(call)
        call.cancel()
        summary = self.wait_finished("cancel")
        self.assertTrue(summary is None or summary.num_output_tokens < LONG)

    def test_a_deadline_ends_the_request(self):
        for name, call in [("deadline-unary", self.generate), ("deadline-stream", self.stream)]:
            start = time.time()
            self.fails(Code.DEADLINE_EXCEEDED, call, request(tokens=LONG, request_id=name), timeout=0.4)
            self.assertLess(time.time() - start, 5 * PATIENCE)
            self.wait_finished(name)

    def test_a_lost_connection_ends_the_request(self):
        other = Client(self.at)
        stream = other.stream("/vllm.Inference/GenerateStream", vllm.GenerateRequest, vllm.GenerateResponse)
        call = stream(request(tokens=LONG, request_id="lost"), timeout=TIMEOUT)
        next(call)
        other.close()
        self.wait_finished("lost")

    def test_abort_ends_with_a_reason(self):
        for abort in [self.abort, self.client.unary("/vllm.grpc.engine.VllmEngine/Abort", engine.AbortRequest, engine.AbortResponse)]:
            call = self.stream(request(tokens=LONG, request_id="abort"), timeout=TIMEOUT)
            next(call)
            message = (vllm if abort is self.abort else engine).AbortRequest(request_ids=["abort", "nobody"])
            abort(message, timeout=TIMEOUT)
            last = list(call)[-1]
            self.assertEqual(last.outputs.finish_info.finish_reason, vllm.FinishInfo.ABORTED)
            self.wait_finished("abort")

    def test_attach_takes_the_stream_up_at_any_token(self):
        r = request("abcdefghij", 60, request_id="attach", temperature=0)
        r.stopping.ignore_eos = True
        call = self.stream(r, timeout=TIMEOUT, metadata=[("x-linger-ms", "20000")])
        text = "".join(p.outputs.text for p in call)
        for start in [0, 1, 25, 59, 60]:
            options = vllm.ResponseOptions(output_token_ids=True)
            parts = list(self.attach(convoke.AttachRequest(request_id="attach", from_token=start, response=options), timeout=TIMEOUT))
            self.assertEqual(parts[0].HasField("prompt_info"), start == 0)
            self.assertEqual(sum(p.outputs.num_tokens for p in parts), 60 - start)
            self.assertEqual(sum(len(p.outputs.token_ids) for p in parts), 60 - start)
            self.assertTrue(text.endswith("".join(p.outputs.text for p in parts)))
            self.assertEqual(parts[-1].outputs.finish_info.num_output_tokens, 60)
        self.fails(Code.NOT_FOUND, self.attach, convoke.AttachRequest(request_id="never was"))

    def test_a_request_that_lingers_outlives_its_connection(self):
        r = request("abcdefghij", 100, request_id="linger", temperature=0)
        r.stopping.ignore_eos = True
        call = self.stream(r, timeout=TIMEOUT, metadata=[("x-linger-ms", "20000")])
        next(call)
        call.cancel()
        parts = list(self.attach(convoke.AttachRequest(request_id="linger"), timeout=TIMEOUT))
        self.assertEqual(sum(p.outputs.num_tokens for p in parts), 100)
        self.assertEqual(parts[-1].outputs.finish_info.finish_reason, vllm.FinishInfo.LENGTH)

    def test_a_second_reader_does_not_end_the_request(self):
        r = request("abcdefghij", 200, request_id="second")
        r.stopping.ignore_eos = True
        call = self.stream(r, timeout=TIMEOUT)
        next(call)
        second = self.attach(convoke.AttachRequest(request_id="second"), timeout=TIMEOUT)
        next(second)
        second.cancel()
        self.assertEqual(list(call)[-1].outputs.finish_info.num_output_tokens, 200)

    def test_list_says_what_runs(self):
        call = self.stream(request("abc", LONG, request_id="listed"), timeout=TIMEOUT)
        next(call)
        found = self.summary("listed")
        self.assertEqual((found.num_sequences, found.finished), (1, False))
        self.assertGreater(found.num_prompt_tokens, 0)
        call.cancel()


class Control(DoorTest):
    options = {"token_ms": 5}

    def control(self, method, *arguments, client=None, **named):
        if method == "GetServerInfo" or method == "GetModelInfo":
            response = {"GetServerInfo": vllm.ServerInfo, "GetModelInfo": vllm.ModelInfo}[method]
        else:
            response = getattr(vllm, method + "Response")
        call = (client or self.client).unary("/vllm.Control/" + method, getattr(vllm, method + "Request"), response)
        return call(getattr(vllm, method + "Request")(*arguments, **named), timeout=TIMEOUT)

    def test_what_the_server_is(self):
        info = self.control("GetServerInfo")
        self.assertTrue(info.engine_version.startswith("convoke"))
        self.assertGreater(info.max_model_len, 0)
        self.assertGreater(info.total_kv_blocks, 0)
        p = info.parallelism
        self.assertEqual((p.tensor_parallel_size, p.pipeline_parallel_size, p.data_parallel_size), (1, 1, p.world_size))
        model = self.control("GetModelInfo")
        self.assertTrue(model.served_model_name)
        self.assertTrue(model.supports_token_ids_input)
        self.assertFalse(model.supports_lora or model.supports_multimodal)
        self.generate(request(tokens=1, model=model.served_model_name), timeout=TIMEOUT)

    def test_pause_keeps_and_resume_goes_on(self):
        r = request("abcdefghij", 100)
        r.stopping.ignore_eos = True
        call = self.stream(r, timeout=TIMEOUT)
        next(call)
        self.assertFalse(self.control("IsPaused").paused)
        self.control("PauseGeneration", mode=vllm.PAUSE_MODE_KEEP)
        self.assertTrue(self.control("IsPaused").paused)
        self.control("ResumeGeneration")
        self.assertFalse(self.control("IsPaused").paused)
        self.assertEqual(list(call)[-1].outputs.finish_info.num_output_tokens, 100)

    def test_pause_waits_for_what_runs(self):
        r = request("abcdefghij", 100)
        r.stopping.ignore_eos = True
        call = self.stream(r, timeout=TIMEOUT)
        next(call)
        self.control("PauseGeneration", mode=vllm.PAUSE_MODE_WAIT, clear_cache=False)
        self.assertEqual(list(call)[-1].outputs.finish_info.num_output_tokens, 100)
        self.control("ResumeGeneration")

    def test_pause_aborts_unless_told_otherwise(self):
        call = self.stream(request(tokens=LONG), timeout=TIMEOUT)
        next(call)
        self.control("PauseGeneration")
        self.assertEqual(list(call)[-1].outputs.finish_info.finish_reason, vllm.FinishInfo.ABORTED)
        self.control("ResumeGeneration")
        raw = self.client.raw("/vllm.Control/PauseGeneration")
        self.fails(Code.INVALID_ARGUMENT, raw, b"\x08\x09")

    def test_shutdown_is_passed_on(self):
        self.only_fake()
        self.control("Shutdown")
        self.assertEqual(self.fake.ask("shutdown?"), "1")

    def test_only_an_admin_may(self):
        self.only_fake()
        server = Fake(self.program, admin_token="secret")
        client = Client(server.address)
        for method in ["Shutdown", "PauseGeneration", "ResumeGeneration"]:
            call = client.unary("/vllm.Control/" + method, getattr(vllm, method + "Request"), getattr(vllm, method + "Response"))
            message = getattr(vllm, method + "Request")()
            self.fails(Code.PERMISSION_DENIED, call, message)
            self.fails(Code.PERMISSION_DENIED, call, message, metadata=[("authorization", "Bearer wrong")])
            call(message, timeout=TIMEOUT, metadata=[("authorization", "Bearer secret")])
        client.close()
        self.assertEqual(server.stop(), 0)


class Health(DoorTest):
    def test_check(self):
        for service in ["", "vllm.Inference", "vllm.Control", "vllm.grpc.engine.VllmEngine", "grpc.health.v1.Health"]:
            self.assertEqual(self.check(health.HealthCheckRequest(service=service), timeout=TIMEOUT).status,
                             health.HealthCheckResponse.SERVING)
        self.fails(Code.NOT_FOUND, self.check, health.HealthCheckRequest(service="no.such"))

    def test_watch_follows_the_state(self):
        self.only_fake()
        watch = self.client.stream("/grpc.health.v1.Health/Watch", health.HealthCheckRequest, health.HealthCheckResponse)
        call = watch(health.HealthCheckRequest(service="vllm.Inference"), timeout=TIMEOUT)
        self.assertEqual(next(call).status, health.HealthCheckResponse.SERVING)
        for state, expected in [("restarting", "NOT_SERVING"), ("ready", "SERVING"), ("draining", "NOT_SERVING"), ("ready", "SERVING")]:
            self.fake.ask("state " + state)
            self.assertEqual(next(call).status, getattr(health.HealthCheckResponse, expected))
            answer = self.check(health.HealthCheckRequest(), timeout=TIMEOUT)
            self.assertEqual(answer.status, getattr(health.HealthCheckResponse, expected))
        call.cancel()
        call = watch(health.HealthCheckRequest(service="no.such"), timeout=TIMEOUT)
        self.assertEqual(next(call).status, health.HealthCheckResponse.SERVICE_UNKNOWN)
        call.cancel()


class Reflection(DoorTest):
    def talk(self, module, version, *questions):
        info = self.client.both(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo", module.ServerReflectionRequest,
                                module.ServerReflectionResponse)
        return list(info(iter([module.ServerReflectionRequest(**q) for q in questions]), timeout=TIMEOUT))

    def test_services_and_their_files(self):
        from google.protobuf import descriptor_pb2, descriptor_pool
        for module, version in [(reflection, "v1"), (reflection_alpha, "v1alpha")]:
            listed = self.talk(module, version, {"list_services": ""})[0]
            names = {s.name for s in listed.list_services_response.service}
            self.assertIn("vllm.Inference", names)
            self.assertIn("convoke.v1.Requests", names)
            pool, known = descriptor_pool.DescriptorPool(), set()
            for answer in self.talk(module, version, *[{"file_containing_symbol": name} for name in sorted(names)]):
                files = answer.file_descriptor_response.file_descriptor_proto
                self.assertGreater(len(files), 0, answer)
                for data in reversed(files):  # imports first
                    file = descriptor_pb2.FileDescriptorProto.FromString(data)
                    if file.name not in known:
                        known.add(file.name)
                        pool.Add(file) if hasattr(pool, "Add") else pool.AddSerializedFile(data)
            for name in names:
                self.assertEqual(pool.FindServiceByName(name).full_name, name)
            method = pool.FindServiceByName("vllm.Inference").methods_by_name["GenerateStream"]
            self.assertEqual(method.input_type.full_name, "vllm.GenerateRequest")
            field = method.input_type.fields_by_name["temperature"]
            self.assertEqual((field.number, field.containing_oneof.name), (5, "_temperature"))  # a true proto3 optional

    def test_symbols_files_and_what_is_not_there(self):
        questions = [{"file_containing_symbol": "vllm.FinishInfo.FinishReason"}, {"file_containing_symbol": "vllm.Inference.Generate"},
                     {"file_containing_symbol": "vllm.GenerateRequest.temperature"}, {"file_by_filename": "proto/vllm.proto"},
                     {"file_containing_symbol": "vllm.NoSuch"}, {"file_by_filename": "no/such.proto"},
                     {"all_extension_numbers_of_type": "vllm.GenerateRequest"}]
        answers = self.talk(reflection, "v1", *questions)
        self.assertEqual([a.WhichOneof("message_response") for a in answers],
                         ["file_descriptor_response"] * 4 + ["error_response"] * 3)
        self.assertEqual([a.error_response.error_code for a in answers[4:]], [5, 5, 12])
        self.assertEqual(answers[0].original_request.file_containing_symbol, "vllm.FinishInfo.FinishReason")


class Readers(DoorTest):
    """Clients that are slow, or never read."""
    options = {"token_ms": 1, "tokens_per_step": 50, "reader_seconds": 1.5, "reader_bytes": 32768}

    def big(self, **fields):
        r = request("abcdefghijklmnopqrstuvwxyz", 1_000_000, **fields)
        r.response.output_candidates.all = True
        return r

    def test_a_client_that_never_reads_is_dropped_and_slows_nobody(self):
        self.only_fake()
        stuck = self.stream(self.big(request_id="stuck"), timeout=60)
        next(stuck)
        start = time.time()
        parts = list(self.stream(request("abc", 500), timeout=TIMEOUT))
        self.assertEqual(parts[-1].outputs.finish_info.num_output_tokens, 500)
        self.assertLess(time.time() - start, 5 * PATIENCE)
        self.wait_finished("stuck", 15)
        self.fails(Code.RESOURCE_EXHAUSTED, lambda timeout: stuck)

    def test_a_slow_reader_gets_everything_in_messages_of_bounded_size(self):
        self.only_fake()
        r = request("abcdefghijklmnopqrstuvwxyz", 5000)
        r.response.output_candidates.top_n = 100
        r.response.output_token_ids = True
        text, n, largest = "", 0, 0
        for i, p in enumerate(self.stream(r, timeout=60)):
            if i < 3:
                time.sleep(0.3)
            text += p.outputs.text
            n += len(p.outputs.candidate_tokens)
            largest = max(largest, p.ByteSize())
        self.assertEqual((len(text), n), (5000, 5000))
        self.assertLess(largest, 3 * 32768)

    def test_clients_that_never_read_their_socket(self):
        self.only_fake()
        sockets = []
        for i in range(8):
            s = socket.create_connection(("127.0.0.1", self.fake.port))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.sendall(http2_call(self.big(request_id=f"deaf-{i}").SerializeToString()))
            sockets.append(s)
        time.sleep(0.5)
        self.assertEqual(self.generate(request("abc", 3), timeout=TIMEOUT).outputs.text, "abc")
        for i in range(8):
            self.wait_finished(f"deaf-{i}", 15)
        for s in sockets:
            s.close()


def http2_frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, not a goodbye
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(4, 0, 0, b"")


def http2_call(message):
    """A GenerateStream call as bytes, with the largest windows, by a client that will never look at an answer."""
    def header(name, value):
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    headers = b"".join(header(k, v) for k, v in [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/vllm.Inference/GenerateStream"), (b":authority", b"x"),
        (b"content-type", b"application/grpc"), (b"te", b"trailers")])
    window = (0x7FFFFFFF).to_bytes(4, "big")
    settings = b"\x00\x04" + window
    return (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(4, 0, 0, settings) +
            http2_frame(8, 0, 0, (0x7FFFFFFF - 65535).to_bytes(4, "big")) + http2_frame(1, 4, 1, headers) +
            http2_frame(0, 1, 1, b"\x00" + len(message).to_bytes(4, "big") + message))


class Connections(DoorTest):
    options = {"token_ms": 1}

    def test_ten_thousand_connections(self):
        self.only_fake()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        n = min(int(10000 / PATIENCE), hard - 500)
        call = self.stream(request("abc", 20000), timeout=300)  # one stream runs through it all
        next(call)
        sockets = []
        try:
            for i in range(n):
                s = socket.create_connection(("127.0.0.1", self.fake.port), timeout=30)
                s.sendall(HTTP2_HELLO if i % 10 else b"")  # every tenth never says a word
                sockets.append(s)
            self.assertEqual(self.generate(request("abc", 3), timeout=60).outputs.text, "abc")
            other = Client(self.at)
            generate = other.unary("/vllm.Inference/Generate", vllm.GenerateRequest, vllm.GenerateResponse)
            self.assertEqual(generate(request("abc", 3), timeout=60).outputs.text, "abc")
            other.close()
            next(call)
        finally:
            for s in sockets:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)  # ten thousand ports in TIME_WAIT would be missed elsewhere
                s.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        call.cancel()
        self.assertEqual(self.generate(request("abc", 3), timeout=60).outputs.text, "abc")

    def test_half_open_and_broken_connections(self):
        self.only_fake()
        sockets = []
        for data in [b"", b"PRI * HT", b"GET / HTTP/1.1\r\n\r\n", os.urandom(500), HTTP2_HELLO, HTTP2_HELLO + b"\x00\x10",
                     HTTP2_HELLO + http2_frame(1, 0, 1, b"\x82"), HTTP2_HELLO + http2_frame(0, 1, 7, b"x" * 100),
                     http2_call(b"")[:-3], http2_call(b"")[:60]]:
            for _ in range(20):
                s = socket.create_connection(("127.0.0.1", self.fake.port), timeout=10)
                s.sendall(data)
                sockets.append(s)
        self.assertEqual(self.generate(request("abc", 3), timeout=TIMEOUT).outputs.text, "abc")
        for i, s in enumerate(sockets):
            if i % 2:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            s.close()
        self.assertEqual(self.generate(request("abc", 3), timeout=TIMEOUT).outputs.text, "abc")

    def test_many_streams_at_once_over_one_connection(self):
        calls = [self.stream(request("abcdef", 50, temperature=0), timeout=60) for _ in range(48)]
        texts = {"".join(p.outputs.text for p in call) for call in calls}
        self.assertEqual(len(texts), 1)

    def test_large_requests_delay_no_others(self):
        self.only_fake()
        slow = request("slow" + "x" * 200_000, 2)
        early = self.stream(slow, timeout=0.3)  # its deadline passes while it is being accepted
        calls = [self.generate.future(slow, timeout=60) for _ in range(4)] + [self.stream(slow, timeout=60)]
        gone = self.stream(slow, timeout=0.2)  # and this one's while it waits
        start, worst = time.time(), 0
        while time.time() - start < 2:
            before = time.time()
            self.generate(request("abc", 3), timeout=TIMEOUT)
            worst = max(worst, time.time() - before)
        self.assertLess(worst, 0.5 * PATIENCE)
        self.assertEqual([c.result().outputs.text for c in calls[:4]], ["sl"] * 4)
        self.assertEqual("".join(p.outputs.text for p in calls[4]), "sl")
        for call in [early, gone]:
            self.fails(Code.DEADLINE_EXCEEDED, lambda timeout, call=call: call)

    def test_calls_that_come_and_go_from_many_threads(self):
        errors = []

        def work(k):
            client = Client(self.at)
            stream = client.stream("/vllm.Inference/GenerateStream", vllm.GenerateRequest, vllm.GenerateResponse)
            try:
                for i in range(25):
                    call = stream(request("abcdef", 1 + i * 3), timeout=60 if i % 3 else 0.01 * i + 0.001)
                    try:
                        for j, _ in enumerate(call):
                            if i % 5 == 4 and j == 2:
                                call.cancel()
                    except grpc.RpcError as e:
                        if e.code() not in (Code.CANCELLED, Code.DEADLINE_EXCEEDED):
                            errors.append(e)
            finally:
                client.close()

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(errors, [])


class Stops(DoorTest):
    def setUp(self):
        self.only_fake()

    def test_running_streams_finish_and_new_calls_are_refused(self):
        server = Fake(self.program, token_ms=5)
        client = Client(server.address)
        stream = client.stream("/vllm.Inference/GenerateStream", vllm.GenerateRequest, vllm.GenerateResponse)
        watch = client.stream("/grpc.health.v1.Health/Watch", health.HealthCheckRequest, health.HealthCheckResponse)
        call = stream(request("abc", 100), timeout=TIMEOUT)
        watching = watch(health.HealthCheckRequest(), timeout=TIMEOUT)
        next(call)
        next(watching)
        server.tell("quit 20")
        self.fails(Code.UNAVAILABLE, lambda timeout: watching)
        late = Client(server.address)
        self.fails(Code.UNAVAILABLE, late.unary("/vllm.Inference/Generate", vllm.GenerateRequest, vllm.GenerateResponse), request())
        self.assertEqual(list(call)[-1].outputs.finish_info.num_output_tokens, 100)
        self.assertEqual(server.stop(), 0)
        client.close()
        late.close()

    def test_what_does_not_finish_in_time_is_cancelled(self):
        server = Fake(self.program, token_ms=5)
        client = Client(server.address)
        stream = client.stream("/vllm.Inference/GenerateStream", vllm.GenerateRequest, vllm.GenerateResponse)
        call = stream(request("abc", 100000), timeout=TIMEOUT)
        next(call)
        start = time.time()
        server.tell("quit 0.3")
        self.fails(Code.UNAVAILABLE, lambda timeout: call)
        self.assertEqual(server.stop(), 0)
        self.assertLess(time.time() - start, 10 * PATIENCE)
        client.close()

    def test_a_port_in_use_is_an_error_not_a_second_server(self):
        server = Fake(self.program)
        second = subprocess.run([self.program, f"address={server.address}"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                timeout=TIMEOUT)
        self.assertEqual(second.returncode, 1)
        self.assertIn(server.address, second.stderr)
        self.assertEqual(server.stop(), 0)


class Tls(DoorTest):
    def setUp(self):
        self.only_fake()
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        for name, extra in [("ca", []), ("server", ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]), ("client", [])]:
            self.certificate(name, extra)

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def certificate(self, name, extra):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                   "/CN=" + name, "-keyout", self.path(name + ".key"), "-out", self.path(name + ".pem")]
        if name != "ca":
            command += ["-CA", self.path("ca.pem"), "-CAkey", self.path("ca.key")]
        subprocess.run(command + extra, check=True, capture_output=True)

    def read(self, name):
        with open(self.path(name), "rb") as f:
            return f.read()

    def call(self, server, credentials):
        client = Client(server.address, credentials)
        try:
            generate = client.unary("/vllm.Inference/Generate", vllm.GenerateRequest, vllm.GenerateResponse)
            return generate(request("abc", 3), timeout=5).outputs.text
        finally:
            client.close()

    def test_tls(self):
        server = Fake(self.program, tls_cert=self.path("server.pem"), tls_key=self.path("server.key"))
        self.assertEqual(self.call(server, grpc.ssl_channel_credentials(self.read("ca.pem"))), "abc")
        self.fails(Code.UNAVAILABLE, lambda timeout: self.call(server, None))
        self.assertEqual(server.stop(), 0)

    def test_clients_show_a_certificate(self):
        server = Fake(self.program, tls_cert=self.path("server.pem"), tls_key=self.path("server.key"), tls_client_ca=self.path("ca.pem"))
        known = grpc.ssl_channel_credentials(self.read("ca.pem"), self.read("client.key"), self.read("client.pem"))
        self.assertEqual(self.call(server, known), "abc")
        self.fails(Code.UNAVAILABLE, lambda timeout: self.call(server, grpc.ssl_channel_credentials(self.read("ca.pem"))))
        self.assertEqual(server.stop(), 0)

    def test_a_missing_file_is_named(self):
        second = subprocess.run([self.program, "tls_cert=/no/such.pem", "tls_key=" + self.path("server.key")], stdin=subprocess.DEVNULL,
                                capture_output=True, text=True, timeout=TIMEOUT)
        self.assertEqual(second.returncode, 1)
        self.assertIn("/no/such.pem", second.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fake")
    parser.add_argument("--address")
    known, rest = parser.parse_known_args()
    if not known.fake and not known.address:
        parser.error("--fake PROGRAM or --address HOST:PORT")
    DoorTest.program, DoorTest.address = known.fake, known.address
    unittest.main(argv=[sys.argv[0]] + rest)
