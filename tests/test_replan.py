#!/usr/bin/env python3
"""test_replan.py - experts change their ranks under sixteen streams; every stream gives the same tokens as undisturbed.

  1. A server that nothing disturbs: the reference.
  2. Plan after plan goes live, each moving every expert, while streams run. Printed: the longest gap between two pieces of a stream, with and
     without.
  3. A rank is killed while experts are loaded: the old plan stays. A rank is killed later: the job starts again with the plan that was live.
  4. The server starts again, and begins with the plan it ended with.
  5. On its own, with convoke-plan where it was built: a plan is made from what was counted, and the log says what it was worth.
"""
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402
from streams import end_streams, same, start_streams, wait_mid_decode  # noqa: E402

FLIPS = 4
RANKS = 3
PLAIN = os.path.join(serving.SOURCE, "tests/plain_planner.py")
ROTATE = {"PLAIN_PLANNER_ROTATE": "1"}


def get(server):
    with urllib.request.urlopen(f"http://{server.http}/plan", timeout=20 * serving.SLOW) as r:
        return json.load(r)


def metric(server, name):
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=20 * serving.SLOW) as r:
        for line in r.read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
    return None


def ask(server, query=""):
    """The status code: 202 when a plan is being made."""
    request = urllib.request.Request(f"http://{server.http}/plan{query}", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=20 * serving.SLOW) as r:
            return r.status
    except urllib.error.HTTPError as e:
        return e.code


def wait(server, what, patience=60):
    until = time.monotonic() + patience * serving.SLOW
    while True:
        plan = get(server)
        if what(plan):
            return plan
        if time.monotonic() > until:
            raise AssertionError(f"never came to be: {plan}\n{server.said()}")
        time.sleep(0.01)


def start(folder, *options, **more):
    """Plans only when asked to, unless told otherwise."""
    return serving.Server("--http", "127.0.0.1:0", "--plan", "auto", "--plan-dir", os.path.join(folder, "plans"), "--statistics-seconds", "0.2",
                          "--replan", "apply", "--no-log-requests", "--max-failures", "100", *options, ranks=RANKS, **more)


def by_hand(folder, *options):
    return start(folder, "--planner", PLAIN, "--replan-balance", "1000", "--replan-drift", "1", *options, environment=ROTATE)


def under_streams(server, pb, name, reference, do):
    """Streams from before until after `do`, in as many waves as it takes."""
    waves = [start_streams(server, pb, name)]
    wait_mid_decode(waves[0])
    do()
    end_streams(waves[0])
    same(waves[0], reference)
    return max(s.gap for s in waves[0])


def epoch_in_journal(path):
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        return db.execute("SELECT plan_epoch FROM launch ORDER BY number DESC LIMIT 1").fetchone()[0]


def test_flips(pb, folder, reference):
    journal = os.path.join(folder, "journal.sqlite")
    with by_hand(folder, "--journal", journal) as server:
        assert get(server)["plan"] == "contiguous"
        assert ask(server) == 409  # nothing was counted
        quiet = []
        for i in range(2):
            streams = start_streams(server, pb, f"quiet-{i}")
            end_streams(streams)
            same(streams, reference)
            quiet.append(max(s.gap for s in streams))
        wait(server, lambda p: p["window"]["tokens"] > 500)
        assert metric(server, "convoke_plan_balance") >= 1
        gaps = []
        for i in range(FLIPS):
            def flip():
                assert ask(server, "?take=always") == 202, server.said()

            gaps.append(under_streams(server, pb, f"flip-{i}", reference, flip))
            plan = wait(server, lambda p: p["epoch"] == i + 1)
            assert plan["plan"] == f"auto-{i + 1}"
            assert metric(server, "convoke_plan_epoch") == i + 1
        for i in range(10):  # until it is known what the plan has brought
            if get(server)["state"] != "measuring":
                break
            streams = start_streams(server, pb, f"after-{i}")
            end_streams(streams)
            same(streams, reference)
        assert epoch_in_journal(journal) == FLIPS
        assert " steps: the busiest rank " in get(server)["last"], get(server)
        print(f"longest gap in a stream: undisturbed {max(quiet) * 1e3:.0f} ms, while a plan went live " +
              ", ".join(f"{g * 1e3:.0f}" for g in gaps) + " ms", flush=True)
        print(f"{get(server)['last']}", flush=True)


def test_losses(pb, folder, reference):
    with by_hand(folder, "--replan-rate", "2M") as server:
        plan = get(server)
        assert plan["plan"] == f"auto-{FLIPS}" and plan["epoch"] == FLIPS, plan  # what it ended with
        end_streams(start_streams(server, pb, "first"))
        wait(server, lambda p: p["window"]["tokens"] > 500)

        def kill_while_loading():
            assert ask(server, "?take=always") == 202, server.said()
            wait(server, lambda p: p["state"] == "moving experts" and p["next"]["loaded_bytes"] > 0)
            os.kill(server.workers()[1], signal.SIGKILL)

        under_streams(server, pb, "loading", reference, kill_while_loading)
        plan = wait(server, lambda p: p["state"] == "serving")
        assert plan["epoch"] == FLIPS and "not live yet" in plan["last"], plan
        end_streams(start_streams(server, pb, "again"))
        wait(server, lambda p: p["window"]["tokens"] > 500)
        assert ask(server, "?take=always") == 202, server.said()
        live = wait(server, lambda p: p["epoch"] > FLIPS)

        def kill():
            os.kill(server.workers()[2], signal.SIGKILL)

        under_streams(server, pb, "later", reference, kill)
        plan = wait(server, lambda p: p["state"] != "waiting for workers")
        assert (plan["plan"], plan["epoch"]) == (live["plan"], live["epoch"]), plan
        print(f"a rank lost while experts moved, another later: {plan['plan']} is in force", flush=True)


def planner():
    """How a server plans: by itself where convoke-plan was built."""
    program = os.path.join(serving.BINARY, "convoke-plan")
    if not os.access(program, os.X_OK):
        return ["--planner", PLAIN]
    solvers = subprocess.run([program, "solve", "--solver", "list"], capture_output=True, check=True, text=True).stdout
    return [] if "\nauto " in solvers else ["--plan-solver", "lpt"]


def test_alone(pb, folder, reference):
    how = planner()
    with start(folder, "--plan-seconds", "5", "--replan-balance", "1.02", "--replan-pause", "2", *how) as server:
        until = time.monotonic() + 60 * serving.SLOW
        n = 0
        while not get(server)["last"] and time.monotonic() < until:
            streams = start_streams(server, pb, f"alone-{n}")
            end_streams(streams)
            same(streams, reference)
            n += 1
        said = server.said()
        assert "no new plan" not in said, said
        assert "planning, because the busiest rank computes too much" in said, said
        assert " would cut the busiest rank " in said or "nothing better" in said, said
        wait(server, lambda p: p["state"] != "planning")
        for line in said.splitlines():
            if "plan" in line and "worker" not in line:
                print(" ".join(how) + " " * bool(how) + line, flush=True)


def main():
    with tempfile.TemporaryDirectory() as classes, tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        pb, _ = serving.message_classes(classes)
        with serving.Server(ranks=RANKS) as server:
            reference = start_streams(server, pb, "reference")
            end_streams(reference)
        test_flips(pb, folder, reference)
        test_losses(pb, folder, reference)
        test_alone(pb, other, reference)


if __name__ == "__main__":
    main()
