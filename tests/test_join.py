#!/usr/bin/env python3
"""test_join.py - workers that others start: `convoke serve --wait-for-workers`, and convoke-worker under mpirun by hand, as Slurm or Kubernetes would.

  1. Workers are there before the coordinator, and join when it appears. They serve; killed and started again by hand, the streams go on. A second
     job waits until the first is gone, then takes over. A wrong secret is refused with a sentence on both sides; nobody hears of it.
  2. The coordinator is killed with its journal on disk while a loop restarts the workers whenever they end: a new coordinator finds the requests
     again, the workers find it.
All streams must give the tokens of an undisturbed run; at the end nothing may be left.
"""
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402
from streams import attach, end_streams, same, start_streams, wait_mid_decode  # noqa: E402

STREAMS = 10
WORKER = os.path.join(serving.BINARY, "convoke-worker")
MPIRUN = os.path.join(serving.SOURCE, "deploy/mpirun.sh")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_secret(path, text):
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        f.write(text + "\n")
    return path


class Workers:
    """Two ranks by `deploy/mpirun.sh`, in a session of their own, with the server's mark: what is left is found."""

    def __init__(self, server, control, secret_file, ranks=2, connect_seconds=30):
        self.log = open(os.path.join(server.folder, "workers.log"), "a+b")
        self.begin = self.log.seek(0, os.SEEK_END)
        scratch = os.path.join(server.folder, "mpirun")  # a killed mpirun leaves its own there
        os.makedirs(scratch, exist_ok=True)
        environment = dict(server.environment, OMPI_MCA_mpi_yield_when_idle="1", TMPDIR=scratch)
        environment["ASAN_OPTIONS"] = "detect_leaks=0:" + environment.get("ASAN_OPTIONS", "")  # Open MPI leaks
        self.process = subprocess.Popen([MPIRUN, "-np", str(ranks), WORKER, "--coordinator", control, "--secret-file", secret_file,
                                         "--connect-seconds", str(connect_seconds)], env=environment, stdin=subprocess.DEVNULL,
                                        stdout=self.log, stderr=self.log, start_new_session=True)

    def said(self):
        with open(self.log.name, errors="replace") as f:
            f.seek(self.begin)
            return f.read()

    def wait(self, seconds=20):
        code = self.process.wait(seconds * serving.SLOW)
        self.log.close()
        return code

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()


def expect(what, text, pattern, seconds=0):
    """text() holds the pattern within some seconds."""
    until = time.monotonic() + seconds * serving.SLOW
    while not re.search(pattern, text(), re.M):
        assert time.monotonic() < until, f"{what} did not say: {pattern}\n{text()}"
        time.sleep(0.02)


def start_server(secret_file, control, *options):
    return serving.Server("--wait-for-workers", "--secret-file", secret_file, "--control", control, *options, ranks=1, ready=False)


def wrong_secret(server, control, folder):
    """Refused, and it knows why; the coordinator says who it was."""
    stranger = Workers(server, control, write_secret(os.path.join(folder, "wrong"), "not-the-secret-of-this-job"))
    assert stranger.wait() != 0
    expect("the stranger", stranger.said, f"^convoke-worker: rank 0: the coordinator at {control} refuses: wrong secret$")
    expect("the coordinator", server.said, r"turned away 127\.0\.0\.1:\d+ on the control connection: wrong secret$")
    assert "not-the-secret" not in server.said() + stranger.said()


def test_by_hand(pb, folder):
    control = f"127.0.0.1:{free_port()}"
    secret_file = write_secret(os.path.join(folder, "secret"), "a-secret-made-by-a-person")
    server = start_server(secret_file, control, "--max-failures", "20")
    with server:
        workers = Workers(server, control, secret_file)
        time.sleep(0.7)  # it has tried and found nobody
        begin = time.monotonic()
        server.start()
        print(f"workers that came first: serving after {time.monotonic() - begin:.1f} s", flush=True)
        assert server.ranks == 2
        expect("the coordinator", server.said, f"^convoke: waiting for workers at {control}$")
        expect("the coordinator", server.said, r"^convoke: 2 ranks on 1 host joined$")
        reference = start_streams(server, pb, "reference", STREAMS)
        end_streams(reference)

        streams = start_streams(server, pb, "strangers", STREAMS)
        wait_mid_decode(streams)
        wrong_secret(server, control, folder)
        end_streams(streams)
        same(streams, reference)

        for name, harm in (("rank killed", lambda w: os.kill(server.workers()[1], signal.SIGKILL)), ("mpirun killed", lambda w: w.kill())):
            streams = start_streams(server, pb, name, STREAMS)
            wait_mid_decode(streams)
            begin = time.monotonic()
            harm(workers)
            if name == "rank killed":
                assert workers.wait() != 0
            workers = Workers(server, control, secret_file)
            end_streams(streams)
            same(streams, reference)
            print(f"{name}, workers started again by hand: longest pause of a stream {max(s.gap for s in streams):.1f} s", flush=True)
        expect("the coordinator", server.said, r"launch 1 is lost: rank [01] \(pid \d+, host .*\) ended the job: .*rank 1 .*died")
        expect("the coordinator", server.said, r"launch 2 is lost: the (leader closed the control connection|control connection broke)")

        spare = Workers(server, control, secret_file, ranks=3)  # it waits until the others are gone
        expect("the spare job", spare.said, "refuses: this job has a leader already; trying again for 30 s$", 10)
        streams = start_streams(server, pb, "spare", STREAMS)
        wait_mid_decode(streams)
        workers.kill()
        end_streams(streams)
        same(streams, reference)
        expect("the coordinator", server.said, r"^convoke: 3 ranks on 1 host joined$")
        print(f"a second job took over: longest pause of a stream {max(s.gap for s in streams):.1f} s", flush=True)
        server.process.send_signal(signal.SIGTERM)
        assert spare.wait() == 0, spare.said()
    return reference



class Loop(threading.Thread):
    """A restart policy: whatever ends is started again."""

    def __init__(self, server, control, secret_file):
        super().__init__(daemon=True)
        self.arguments, self.n, self.over = (server, control, secret_file), 0, False
        self.start()

    def run(self):
        while not self.over:
            self.workers = Workers(*self.arguments)
            self.n += 1
            self.workers.process.wait()
            time.sleep(0.2)

    def end(self):
        self.over = True
        self.workers.process.terminate()
        self.join(30 * serving.SLOW)
        assert not self.is_alive()


def test_restart_policy(pb, convoke, folder, reference):
    control = f"127.0.0.1:{free_port()}"
    secret_file = write_secret(os.path.join(folder, "secret-2"), "another-secret-made-by-a-person")
    server = start_server(secret_file, control, "--journal", os.path.join(folder, "journal.sqlite"), "--remember-seconds", "300")
    with server:
        loop = Loop(server, control, secret_file)
        server.start()
        streams = start_streams(server, pb, "cut", STREAMS)
        wait_mid_decode(streams)
        server.process.kill()
        server.process.wait()
        for s in streams:
            s.join(30)
        time.sleep(1)  # the workers have ended and are started again, and again find nobody
        begin = time.monotonic()
        server.start()
        print(f"coordinator started again: serving after {time.monotonic() - begin:.1f} s, the workers for the {loop.n}. time", flush=True)
        for s, r in zip(streams, reference):
            tokens, text = attach(server, pb, convoke, f"cut-{s.number}", len(s.tokens))
            assert s.tokens + tokens == r.tokens, f"stream {s.number} after the coordinator was killed"
            assert s.text + text == r.text, f"stream {s.number}: text after the coordinator was killed"
        assert loop.n >= 2
        streams = start_streams(server, pb, "kill", STREAMS)
        wait_mid_decode(streams)
        os.kill(server.workers()[0], signal.SIGKILL)
        end_streams(streams)
        same(streams, reference)
        print(f"rank 0 killed, started again by the loop: longest pause of a stream {max(s.gap for s in streams):.1f} s", flush=True)
        loop.over = True
        server.process.send_signal(signal.SIGTERM)
        loop.end()


def main():
    with tempfile.TemporaryDirectory() as folder:
        pb, convoke = serving.message_classes(folder)
        reference = test_by_hand(pb, folder)
        test_restart_policy(pb, convoke, folder, reference)
    print("ok")


if __name__ == "__main__":
    main()
