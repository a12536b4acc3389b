#!/usr/bin/env python3
"""test_gateway.py ADDRESS - the smg gateway in front of a running server: OpenAI clients speak to it, it speaks VllmEngine to us. It takes the
tokenizer from us, makes tokens of text and text of tokens; nobody here wrote any of it."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

PROMPT = "Once upon a time"


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Gateway(unittest.TestCase):
    address = None

    @classmethod
    def setUpClass(cls):
        port, metrics = free_ports(2)
        cls.url = f"http://127.0.0.1:{port}"
        cls.log = tempfile.TemporaryFile()
        cls.process = subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "smg"), "launch", "--worker-urls", "grpc://" + cls.address,
                                        "--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port",
                                        str(metrics)], stdout=cls.log, stderr=cls.log, cwd=tempfile.gettempdir())
        cls.model = None
        until = time.time() + 60
        while not cls.model and time.time() < until and cls.process.poll() is None:
            time.sleep(0.2)
            cls.model = cls.ready_model()
        if not cls.model:
            cls.tearDownClass()
            raise AssertionError("the gateway does not serve our model")

    @classmethod
    def ready_model(cls):
        """The model's name once it can be asked: the gateway lists it before it has its tokenizer."""
        try:
            name = json.load(urllib.request.urlopen(cls.url + "/v1/models", timeout=5))["data"][0]["id"]
            cls.post(cls, "/v1/completions", model=name, prompt=PROMPT, max_tokens=1)
            return name
        except (OSError, ValueError, IndexError):
            return None

    @classmethod
    def tearDownClass(cls):
        cls.process.terminate()
        try:
            cls.process.wait(20)
        except subprocess.TimeoutExpired:
            cls.process.kill()
            cls.process.wait()
        if not cls.model:
            cls.log.seek(0)
            sys.stderr.write(cls.log.read().decode(errors="replace")[-4000:])
        cls.log.close()

    def post(self, path, **body):
        body = dict({"model": self.model, "temperature": 0, "max_tokens": 12}, **body)
        r = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        return urllib.request.urlopen(r, timeout=60).read().decode()

    def complete(self, **body):
        return json.loads(self.post("/v1/completions", prompt=PROMPT, **body))

    def test_completions_whole_and_streamed(self):
        whole = self.complete()
        choice = whole["choices"][0]
        self.assertEqual((choice["finish_reason"], whole["usage"]["completion_tokens"]), ("length", 12))
        self.assertGreater(len(choice["text"]), 12)
        lines = [line[6:] for line in self.post("/v1/completions", prompt=PROMPT, stream=True).split("\n") if line.startswith("data: ")]
        self.assertEqual(lines[-1], "[DONE]")
        parts = [json.loads(line)["choices"][0] for line in lines[:-1]]
        self.assertEqual("".join(p["text"] for p in parts), choice["text"])
        self.assertEqual(parts[-1]["finish_reason"], "length")

    def test_stop_strings(self):
        text = self.complete()["choices"][0]["text"]
        word = text.split()[3]
        stopped = self.complete(stop=[word])["choices"][0]
        self.assertEqual((stopped["text"], stopped["finish_reason"]), (text[:text.index(word)], "stop"))

    def test_several_samples_with_a_seed(self):
        answers = [self.complete(n=3, temperature=1, seed=7)["choices"] for _ in range(2)]
        texts = [sorted((c["index"], c["text"]) for c in choices) for choices in answers]
        self.assertEqual(texts[0], texts[1])
        self.assertEqual(len({text for _, text in texts[0]}), 3)

    def test_chat_with_logprobs(self):
        answer = json.loads(self.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2))
        content = answer["choices"][0]["logprobs"]["content"]
        self.assertEqual(len(content), answer["usage"]["completion_tokens"])
        for token in content:
            self.assertEqual(token["logprob"], max(t["logprob"] for t in token["top_logprobs"]))  # greedy

    def test_what_we_refuse_is_an_error_there(self):
        with self.assertRaises(urllib.error.HTTPError) as raised:
            self.complete(max_tokens=100_000_000)
        self.assertGreaterEqual(raised.exception.code, 400)


if __name__ == "__main__":
    Gateway.address = sys.argv[1]
    unittest.main(argv=[sys.argv[0]] + sys.argv[2:])
