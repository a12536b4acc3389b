#!/usr/bin/env python3
"""bench_replan.py [WAVES] - what a plan that goes live costs running streams: the longest gap between two pieces of a stream, of sixteen, in WAVES
(12) waves of streams each undisturbed, with a planner running beside them that finds nothing, and with every expert changing its rank under
them. The figure is the difference of the medians.
"""
import os
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402
import test_replan as replan  # noqa: E402
from streams import end_streams, start_streams, wait_mid_decode  # noqa: E402

WAVES = int(sys.argv[1]) if len(sys.argv) > 1 else 12


def wave(server, pb, name, query=None):
    streams = start_streams(server, pb, name)
    wait_mid_decode(streams)
    if query is not None:
        assert replan.ask(server, query) == 202, server.said()
    end_streams(streams)
    replan.wait(server, lambda p: p["state"] in ("serving", "measuring"))
    return max(s.gap for s in streams) * 1e3


def main():
    quiet, planned, moved = [], [], []
    with tempfile.TemporaryDirectory() as classes, tempfile.TemporaryDirectory() as folder:
        pb, _ = serving.message_classes(classes)
        with replan.by_hand(folder) as server:
            wave(server, pb, "first")
            step = replan.wait(server, lambda p: p["window"]["tokens"] > 500)["measured"]["step_seconds"] * 1e3
            for i in range(WAVES):
                quiet.append(wave(server, pb, f"quiet-{i}"))
                planned.append(wave(server, pb, f"planned-{i}", ""))
                moved.append(wave(server, pb, f"moved-{i}", "?take=always"))
                replan.wait(server, lambda p: p["epoch"] == 2 * i + 2)
    for name, gaps in ("undisturbed", quiet), ("a planner runs", planned), ("a plan goes live", moved):
        print(f"{name:17} median {statistics.median(gaps):5.0f} ms, least {min(gaps):5.0f}, most {max(gaps):5.0f}")
    print(f"added             median {statistics.median(moved) - statistics.median(quiet):+5.0f} ms; a step takes {step:.1f} ms")


if __name__ == "__main__":
    main()
