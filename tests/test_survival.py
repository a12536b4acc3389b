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
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402
from streams import NEW_TOKENS, STREAMS, Stream, attach, end_streams, same, start_streams, wait_mid_decode  # noqa: E402

KILLS = int(sys.argv[1]) if len(sys.argv) > 1 else 20


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
                if not s.tokens:  # it may not have been accepted before the kill
                    continue
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
