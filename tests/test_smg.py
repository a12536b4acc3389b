#!/usr/bin/env python3
"""test_smg.py (--fake PROGRAM --model DIR | --address HOST:PORT [--model DIR]) - vllm.grpc.engine.VllmEngine, spoken to by the classes of
the package smg-grpc-proto, which nobody here wrote."""

import argparse
import hashlib
import io
import json
import os
import sys
import subprocess
import unittest
import zipfile

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2 as pb, vllm_engine_pb2_grpc

TIMEOUT = 30


class Smg(unittest.TestCase):
    program = address = model = None

    @classmethod
    def setUpClass(cls):
        cls.process = None
        if cls.program:
            command = [cls.program, "token_ms=2", "model=" + cls.model]
            cls.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            cls.address = "127.0.0.1:" + cls.process.stdout.readline().split()[1]
        cls.channel = grpc.insecure_channel(cls.address)
        cls.engine = vllm_engine_pb2_grpc.VllmEngineStub(cls.channel)

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        if cls.process:
            cls.process.communicate("quit\n", timeout=TIMEOUT)
            assert cls.process.returncode == 0, cls.process.returncode

    def request(self, ids=(10, 20, 30), stream=True, request_id="", **sampling):
        sampling.setdefault("temperature", 0)
        return pb.GenerateRequest(request_id=request_id, tokenized=pb.TokenizedInput(original_text="x", input_ids=ids), stream=stream,
                                  sampling_params=pb.SamplingParams(**sampling))

    def fails(self, code, request):
        with self.assertRaises(grpc.RpcError) as raised:
            list(self.engine.Generate(request, timeout=TIMEOUT))
        self.assertEqual(raised.exception.code(), code, raised.exception.details())
        return raised.exception.details()

    def test_a_stream_is_chunks_and_a_whole(self):
        answers = list(self.engine.Generate(self.request(max_tokens=12, ignore_eos=True), timeout=TIMEOUT))
        chunks, last = [a.chunk for a in answers[:-1]], answers[-1]
        self.assertEqual([a.WhichOneof("response") for a in answers], ["chunk"] * len(chunks) + ["complete"])
        ids = [i for c in chunks for i in c.token_ids]
        self.assertEqual(len(ids), 12)
        self.assertEqual(sum(c.completion_tokens for c in chunks), 12)
        self.assertTrue(all(c.prompt_tokens == 3 for c in chunks))
        self.assertEqual(list(last.complete.output_ids), ids)
        self.assertEqual((last.complete.finish_reason, last.complete.prompt_tokens, last.complete.completion_tokens), ("length", 3, 12))
        whole = list(self.engine.Generate(self.request(stream=False, max_tokens=12, ignore_eos=True), timeout=TIMEOUT))
        self.assertEqual(len(whole), 1)
        self.assertEqual(list(whole[0].complete.output_ids), ids)

    def test_several_sequences(self):
        for stream in [True, False]:
            r = self.request(stream=stream, max_tokens=6, ignore_eos=True, n=3, temperature=1, seed=4)
            wholes = [a.complete for a in self.engine.Generate(r, timeout=TIMEOUT) if a.WhichOneof("response") == "complete"]
            self.assertEqual(sorted(c.index for c in wholes), [0, 1, 2])
            self.assertTrue(all(len(c.output_ids) == 6 for c in wholes))

    def test_logprobs_of_output_and_prompt(self):
        r = self.request(ids=[5, 6, 7, 8], max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
        chunks = [a.chunk for a in self.engine.Generate(r, timeout=TIMEOUT) if a.WhichOneof("response") == "chunk"]
        prompt = chunks[0].input_logprobs
        self.assertFalse(any(c.HasField("input_logprobs") for c in chunks[1:]))
        self.assertEqual(list(prompt.token_ids), [5, 6, 7, 8])
        self.assertEqual([v.HasField("value") for v in prompt.token_logprobs], [False, True, True, True])
        self.assertEqual([len(t.values) for t in prompt.top_logprobs], [0, 2, 2, 2])
        logprobs = [c.output_logprobs for c in chunks if c.token_ids]
        self.assertEqual([list(x.token_ids) for x in logprobs], [list(c.token_ids) for c in chunks if c.token_ids])
        self.assertEqual(sum(len(x.token_logprobs) for x in logprobs), 5)
        for x in logprobs:
            for top in x.top_logprobs:
                self.assertEqual((len(top.values), len(top.token_ids)), (3, 3))
                self.assertEqual(sorted(top.values, reverse=True), list(top.values))
        r.stream = False
        whole = list(self.engine.Generate(r, timeout=TIMEOUT))[0].complete
        self.assertEqual(len(whole.output_logprobs.token_logprobs), 5)
        self.assertEqual(len(whole.input_logprobs.token_logprobs), 4)
        r = self.request(max_tokens=2, logprobs=0, ignore_eos=True)
        whole = [a.chunk for a in self.engine.Generate(r, timeout=TIMEOUT) if a.WhichOneof("response") == "chunk"]
        self.assertEqual(sum(len(c.output_logprobs.token_logprobs) for c in whole), 2)
        self.assertFalse(any(c.output_logprobs.top_logprobs for c in whole))

    def test_what_matched(self):
        r = self.request(max_tokens=40, ignore_eos=True)
        first = list(self.engine.Generate(r, timeout=TIMEOUT))[-1].complete.output_ids[0]
        r.sampling_params.stop_token_ids.append(first)
        whole = list(self.engine.Generate(r, timeout=TIMEOUT))[-1].complete
        self.assertEqual((whole.finish_reason, whole.WhichOneof("matched_stop"), whole.matched_token_id), ("stop", "matched_token_id", first))

    def test_a_text_prompt(self):
        r = pb.GenerateRequest(text="Hello", sampling_params=pb.SamplingParams(max_tokens=3, ignore_eos=True))
        whole = list(self.engine.Generate(r, timeout=TIMEOUT))[-1].complete
        self.assertEqual(len(whole.output_ids), 3)
        self.assertGreater(whole.prompt_tokens, 0)

    def test_what_is_not_served_is_named(self):
        for field in ["json_schema", "regex", "grammar", "structural_tag"]:
            self.assertIn(field, self.fails(grpc.StatusCode.UNIMPLEMENTED, self.request(**{field: "x"})))
        self.assertIn("json_object", self.fails(grpc.StatusCode.UNIMPLEMENTED, self.request(json_object=True)))
        r = self.request()
        r.kv_transfer_params_json = "{}"
        self.assertIn("kv_transfer_params_json", self.fails(grpc.StatusCode.UNIMPLEMENTED, r))
        r = self.request()
        r.mm_inputs.pixel_values.dtype = "float32"
        self.assertIn("mm_inputs", self.fails(grpc.StatusCode.UNIMPLEMENTED, r))
        r = self.request()
        r.media_refs.items.add(url="http://x")
        self.assertIn("media_refs", self.fails(grpc.StatusCode.UNIMPLEMENTED, r))

    def test_requests_that_cannot_be_right(self):
        bad = [pb.GenerateRequest(), self.request(ids=[]), self.request(max_tokens=0), self.request(logprobs=-2),
               self.request(truncate_prompt_tokens=0), self.request(logit_bias={-1: 1.0})]
        r = self.request()
        r.data_parallel_rank = -1
        bad.append(r)
        for request in bad:
            self.fails(grpc.StatusCode.INVALID_ARGUMENT, request)

    def test_abort(self):
        call = self.engine.Generate(self.request(request_id="smg-abort", max_tokens=400, ignore_eos=True), timeout=TIMEOUT)
        next(call)
        self.engine.Abort(pb.AbortRequest(request_ids=["smg-abort"]), timeout=TIMEOUT)
        self.assertEqual(list(call)[-1].complete.finish_reason, "abort")

    def test_loads_health_and_infos(self):
        call = self.engine.Generate(self.request(max_tokens=400, ignore_eos=True), timeout=TIMEOUT)
        next(call)
        loads = self.engine.GetLoads(pb.GetLoadsRequest(include=["core"]), timeout=TIMEOUT)
        self.assertEqual((loads.dp_rank_count, len(loads.loads)), (1, 1))
        load = loads.loads[0]
        self.assertGreaterEqual(load.num_running_reqs + load.num_waiting_reqs, 1)
        self.assertGreater(load.max_total_num_tokens, 0)
        self.assertRegex(loads.timestamp, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00$")
        call.cancel()
        self.assertTrue(self.engine.HealthCheck(pb.HealthCheckRequest(), timeout=TIMEOUT).healthy)
        server = self.engine.GetServerInfo(pb.GetServerInfoRequest(), timeout=TIMEOUT)
        self.assertGreaterEqual(server.data_parallel_size, 1)
        self.assertFalse(server.is_paused)
        model = self.engine.GetModelInfo(pb.GetModelInfoRequest(), timeout=TIMEOUT)
        self.assertTrue(model.is_generation and model.served_model_name)
        self.assertGreater(model.vocab_size, 0)
        self.assertGreater(model.max_context_length, 0)
        if self.model:
            with open(os.path.join(self.model, "config.json"), encoding="utf-8") as f:
                config = json.load(f)
            self.assertEqual(model.model_type, config["model_type"])
            self.assertEqual(list(model.architectures), config["architectures"])

    def test_the_tokenizers_files_come_as_a_zip(self):
        chunks = list(self.engine.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=TIMEOUT))
        data = b"".join(c.data for c in chunks)
        self.assertTrue(all(not c.sha256 for c in chunks[:-1]))
        self.assertEqual(chunks[-1].sha256, hashlib.sha256(data).hexdigest())
        archive = zipfile.ZipFile(io.BytesIO(data))
        self.assertIsNone(archive.testzip())
        self.assertIn("tokenizer.json", archive.namelist())
        self.assertIn("config.json", archive.namelist())
        for name in archive.namelist():
            if self.model:
                with open(os.path.join(self.model, name), "rb") as f:
                    self.assertEqual(archive.read(name), f.read(), name)

    def test_what_the_engine_has_and_we_have_not(self):
        with self.assertRaises(grpc.RpcError) as raised:
            self.engine.Embed(pb.EmbedRequest(), timeout=TIMEOUT)
        self.assertEqual(raised.exception.code(), grpc.StatusCode.UNIMPLEMENTED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option in ["--fake", "--address", "--model"]:
        parser.add_argument(option)
    known, rest = parser.parse_known_args()
    if not known.fake and not known.address:
        parser.error("--fake PROGRAM or --address HOST:PORT")
    Smg.program, Smg.address, Smg.model = known.fake, known.address, known.model
    unittest.main(argv=[sys.argv[0]] + rest)
