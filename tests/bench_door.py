#!/usr/bin/python3
"""bench_door.py PROGRAM [STREAMS] - what the gRPC door costs, over the scripted model of tests/door_fake (whose own work is in the figures):
time of a unary call, and the server's CPU time per token when every token of every stream is a message of its own."""

import sys
import threading
import time

import grpc
from door_client import Client, Fake, load_messages

vllm = load_messages()[0]


def unary(program):
    server = Fake(program, token_ms=0)
    client = Client(server.address)
    generate = client.unary("/vllm.Inference/Generate", vllm.GenerateRequest, vllm.GenerateResponse)
    request = vllm.GenerateRequest(text="hello", stopping=vllm.StoppingCriteria(max_new_tokens=1))
    times = []
    for _ in range(2000):
        start = time.perf_counter()
        generate(request)
        times.append(time.perf_counter() - start)
    times.sort()
    print(f"unary, one token: p50 {times[1000] * 1e6:.0f} us, p99 {times[1980] * 1e6:.0f} us (client in Python included)")
    client.close()
    server.stop()


def streams(program, n, token_ms, seconds=6):
    server = Fake(program, token_ms=token_ms)
    clients = [Client(server.address) for _ in range(min(4, n))]
    counts = [0] * n

    def read(i):
        stream = clients[i % len(clients)].stream("/vllm.Inference/GenerateStream", vllm.GenerateRequest, vllm.GenerateResponse)
        request = vllm.GenerateRequest(text="abcdef", stopping=vllm.StoppingCriteria(max_new_tokens=200))
        request.response.output_token_ids = True
        try:
            while True:
                for message in stream(request):
                    counts[i] += message.outputs.num_tokens
        except grpc.RpcError:
            pass  # the end of the measurement

    threads = [threading.Thread(target=read, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    time.sleep(1)
    before, cpu, start = sum(counts), float(server.ask("cpu").split()[0]), time.perf_counter()
    time.sleep(seconds)
    tokens, cpu, wall = sum(counts) - before, float(server.ask("cpu").split()[0]) - cpu, time.perf_counter() - start
    print(f"{n} streams: {tokens / wall:.0f} tokens/s, {cpu / wall * 100:.1f} % of a core, {cpu / tokens * 1e6:.0f} us per token")
    server.stop("quit 0")
    for t in threads:
        t.join()
    for c in clients:
        c.close()


if __name__ == "__main__":
    unary(sys.argv[1])
    for ms in [50, 20, 5]:
        streams(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 16, ms)
