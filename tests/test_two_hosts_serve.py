#!/usr/bin/env python3
"""test_two_hosts_serve.py - `convoke serve --hostfile` over two hosts of two ranks each loses the second one under ten streams.

Started by two_hosts.sh with TWO_HOSTS_ALONE=1, which makes the hosts. Ten streams, greedy and sampled, are read once undisturbed; then
  1. Open MPI's daemon on the second host is killed: the host answers afterwards, so it stays, with all four ranks and their plan;
  2. its link is cut: it leaves the job, two ranks in equal blocks go on.
Each time all streams must end with the reference's tokens and text, health must say NOT_SERVING in between, and a request that comes just then
must wait and get the same tokens, too. At the end nothing may be left on either host.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import grpc

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402
from streams import Stream, end_streams, same, start_streams, wait_mid_decode  # noqa: E402

STREAMS = 10
RANKS = 4
LOST = r"launch %d is lost: mpirun has lost its daemon on host node1; rank [23] \(pid \d+, host node1\) was last heard \d+\.\d s ago$"
WATCH = "/grpc.health.v1.Health/Watch"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # HealthCheckResponse{status}


class Health(threading.Thread):
    """What a watcher of the server's health is told, and when."""

    def __init__(self, server):
        super().__init__(daemon=True)
        watch = server.channel.unary_stream(WATCH, request_serializer=bytes, response_deserializer=bytes)
        self.call = watch(b"")
        self.told = []
        self.start()

    def run(self):
        try:
            for status in self.call:
                self.told.append((status, time.monotonic()))
        except grpc.RpcError:
            pass  # the channel was closed

    def wait(self, status, n_before, seconds):
        """Until it is told after the first n_before; when that was."""
        until = time.monotonic() + seconds * serving.SLOW
        while time.monotonic() < until:
            for said, at in self.told[n_before:]:
                if said == status:
                    return at
            time.sleep(0.005)
        raise AssertionError(f"health was never {status}: {self.told}")


def write_plan(path):
    """Not contiguous, one replica: expert e of a layer lies on rank (e + layer) % 4."""
    with open(os.path.join(serving.DEMO, "config.json")) as f:
        config = json.load(f)
    layers = []
    for layer in range(config["num_hidden_layers"]):
        ranks = [[(e + layer) % RANKS] for e in range(config["num_experts"])]
        ranks[0].append((ranks[0][0] + 2) % RANKS)
        layers.append({"layer": layer, "ranks_of_expert": ranks})
    plan = {"format": "convoke-plan", "version": 1, "name": "spread", "epoch": 3, "experts": config["num_experts"], "ranks": RANKS,
            "node_of_rank": [0, 0, 1, 1], "layers": layers}
    with open(path, "w") as f:
        json.dump(plan, f)


def find(server, name):
    return [p for p in serving.marked_processes(server.mark) if os.path.basename(serving.command_line(p).split(" ")[0]) == name]


def lose(server, pb, health, reference, name, harm):
    """Streams through a loss. What the log said of it, and how long nobody was served."""
    said_before, told_before = len(server.said()), len(health.told)
    streams = start_streams(server, pb, name, STREAMS)
    wait_mid_decode(streams)
    begin = time.monotonic()
    harm()
    down = health.wait(NOT_SERVING, told_before, 60)
    late = Stream(server, pb, 1, name + "-late")
    late.start()
    up = health.wait(SERVING, told_before, 90)
    assert not late.tokens or late.last >= up - 0.05, "a request was answered while nobody served"
    end_streams(streams + [late])
    same(streams, reference)
    same([late], [reference[1]])
    assert [s for s, _ in health.told[told_before:]] == [NOT_SERVING, SERVING], health.told
    print(f"{name}: noticed after {down - begin:.1f} s, serving again {up - down:.1f} s later, longest pause of a stream "
          f"{max(s.gap for s in streams):.1f} s", flush=True)
    return server.said()[said_before:]


def expect(text, pattern):
    match = re.search(f".*(?:{pattern}).*", text, re.M)
    assert match, f"not said: {pattern}\n{text}"
    print("  " + match.group(0), flush=True)


def nothing_left_on_hosts(server):
    """The lost host's processes end by themselves, and both hosts' /dev/shm is this run's own."""
    until = time.monotonic() + 20 * serving.SLOW
    while find(server, "convoke-worker") or find(server, "orted") or os.listdir("/dev/shm"):
        assert time.monotonic() < until, f"left: {[serving.command_line(p) for p in serving.marked_processes(server.mark)]} {os.listdir('/dev/shm')}"
        time.sleep(0.05)


def kill_daemon(server):
    daemons = find(server, "orted")
    assert len(daemons) == 1, daemons
    os.kill(daemons[0], signal.SIGKILL)


def cut_link():
    subprocess.run(["ip", "-n", "node1", "link", "set", "inner1", "down"], check=True)


def main():
    if "TWO_HOSTS_HOSTFILE" not in os.environ:
        sys.exit("usage: TWO_HOSTS_ALONE=1 two_hosts.sh 2 python3 test_two_hosts_serve.py")
    with tempfile.TemporaryDirectory() as folder:
        pb, _ = serving.message_classes(folder)
        plan = os.path.join(folder, "plan.json")
        write_plan(plan)
        with serving.Server("--hostfile", os.environ["TWO_HOSTS_HOSTFILE"], "--mpirun-args", os.environ["TWO_HOSTS_MPIRUN_ARGS"], "--plan", plan,
                            "--combine", "fixed", ranks=RANKS) as server:
            expect(server.said(), r"4 ranks on 2 hosts joined$")
            assert server.ranks == RANKS
            health = Health(server)
            health.wait(SERVING, 0, 10)
            reference = start_streams(server, pb, "reference", STREAMS)
            end_streams(reference)
            assert len({tuple(s.tokens) for s in reference}) > STREAMS // 2  # greedy ones may agree

            said = lose(server, pb, health, reference, "daemon killed", lambda: kill_daemon(server))
            expect(said, LOST % 1)
            expect(said, r"4 ranks on 2 hosts joined$")

            said = lose(server, pb, health, reference, "link cut", cut_link)
            expect(said, LOST % 2)
            expect(said, r"host node1 does not answer and leaves the job with its 2 ranks$")
            expect(said, r"2 ranks on 1 host remain$")
            expect(said, r"2 ranks on 1 host joined; the plan is for another number of ranks, so experts lie in equal blocks")
            assert len(find(server, "convoke-worker")) >= 2
        nothing_left_on_hosts(server)
    print("ok")


if __name__ == "__main__":
    main()
