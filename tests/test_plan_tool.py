#!/usr/bin/env python3
"""test_plan_tool.py - convoke-plan as a person uses it, on a trace of the bundled model: score writes the trace, the tool counts, plans with every solver, prices,
compares, exports, imports, says what moves; the workers then run under a plan and send exactly the rows that the replay counts. Mistakes get one sentence.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

SOURCE = os.environ.get("CONVOKE_SOURCE_DIR", os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = os.environ.get("CONVOKE_BINARY_DIR", os.path.join(SOURCE, "build"))
DEMO = os.path.join(SOURCE, "deploy/models/convoke-demo")
PLAN = os.path.join(BINARY, "convoke-plan")
RANKS = 4
MPI = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
       "OMPI_MCA_hwloc_base_binding_policy": "none", "ASAN_OPTIONS": "detect_leaks=0"}


def plan(*words, code=0):
    done = subprocess.run([PLAN, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"convoke-plan {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def plan_json(*words):
    return json.loads(plan(*words, "--json").stdout)


def refused(needle, *words, code=1):
    """One sentence on stderr, nothing on stdout, nothing written."""
    done = plan(*words, code=code)
    assert done.stdout == "" and needle in done.stderr and len(done.stderr.strip().split("\n")) == 1, (words, done.stderr)


def score(folder, name, *words):
    """Runs the model on four ranks, writes <name>.trace, returns the summary."""
    lines = os.path.join(folder, "lines.jsonl")
    if not os.path.exists(lines):
        with open(lines, "w", encoding="utf-8") as f:
            text = subprocess.run([os.path.join(BINARY, "convoke"), "tokenize", "--model", DEMO, os.path.join(DEMO, "texts.jsonl")], capture_output=True, text=True,
                                  check=True).stdout
            for line in text.splitlines():
                entry = json.loads(line)
                entry["token_ids"] = entry["token_ids"][:64]
                f.write(json.dumps(entry) + "\n")
    done = subprocess.run(["mpirun", "--bind-to", "none", "-np", str(RANKS), os.path.join(BINARY, "convoke-score"), "--model", DEMO, "--input", lines, "--greedy", "8",
                           "--routing", os.path.join(folder, name + ".trace"), "--json", *words], env=MPI, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_solvers(folder, trace, topology):
    """Every solver makes a plan that the tool itself takes back; auto is at least as quick as any."""
    listed = re.findall(r"^(\S+)", plan("solve", "--solver", "list").stdout, re.M)
    names = [n for n in listed if n]
    assert len(names) >= 12 and "auto" in names and "moetuner" in names, names
    steps = {}
    for name in names:
        if name == "ilp":  # six layers of 32 experts take GLPK its time
            words = ("--seconds", "3")
        else:
            words = ("--seconds", "10", "--work", "20000000") if name in ("batch", "affinity", "auto") else ("--seconds", "10")
        out = os.path.join(folder, name + ".json")
        plan("solve", "--trace", trace, "--topology", topology, "--solver", name, "--folds", "0", "--bounds", "none", "-C", "16", "-o", out, *words)
        steps[name] = plan_json("simulate", "--plan", out, "--trace", trace, "--topology", topology, "-C", "16")["plans"][0]["step_us"]
        with open(out, encoding="utf-8") as f:
            made = json.load(f)
        assert made["solver"]["name"] == name and made["score"]["step_us"] == steps[name] and len(made["tokens_per_expert"]) == 6
    best = min(v for k, v in steps.items() if k not in ("affinity",))
    assert steps["auto"] <= best * 1.02, steps  # its members get shares of the time that the others had alone
    assert steps["contiguous"] >= best
    return names


def check_rows(folder):
    """What the workers send is what the replay counts, row for row."""
    for name in ("contiguous", "lpt", "eplb"):
        path = os.path.join(folder, name + ".json")
        sent = score(folder, name, "--plan", path)["link_rows"]
        replayed = plan_json("simulate", "--plan", path, "--trace", os.path.join(folder, name + ".trace"), "--owner", "recorded")["plans"][0]["link_rows"]
        assert sent == replayed, f"{name}: sent {sent}, replayed {replayed}"


def check_files(folder, trace):
    """Statistics, reports, pictures, other engines' files, what moves."""
    stats, report = os.path.join(folder, "stats"), os.path.join(folder, "report.html")
    plan("stats", trace, "--pairs", "-o", stats, "--report", report)
    assert os.path.getsize(report) > 10000
    assert "convoke-demo" in plan("show", stats).stdout and "drama" in plan("show", trace).stdout
    made = os.path.join(folder, "from-stats.json")
    said = plan("solve", "--stats", stats, "--ranks", str(RANKS), "--solver", "lpt", "-o", made).stdout
    assert "step us needs a trace" in said
    shares = plan_json("score", "--plan", made, "--stats", stats)["plans"]
    assert [p["name"] for p in shares] == ["contiguous", "lpt"] and shares[1]["max_over_mean_mean"] < shares[0]["max_over_mean_mean"]
    picture = os.path.join(folder, "picture.svg")
    said = plan("compare", "-p", made, "-p", os.path.join(folder, "chain.json"), "--trace", trace, "-C", "16", "--picture", picture).stdout
    assert "lower bound" in said and "chain" in said
    xml.etree.ElementTree.parse(picture)
    for engine in ("eplb", "sglang", "tensorrt-llm", "vllm-ascend"):
        there, back = os.path.join(folder, engine), os.path.join(folder, engine + ".json")
        there += {"eplb": ".npz", "tensorrt-llm": ".yaml"}.get(engine, ".json.txt")
        plan("export", engine, made, "-o", there)
        plan("import", engine, there, "-o", back, "--ranks", str(RANKS), "--experts", "32")
        with open(made, encoding="utf-8") as a, open(back, encoding="utf-8") as b:
            assert [l["ranks_of_expert"] for l in json.load(a)["layers"]] == [l["ranks_of_expert"] for l in json.load(b)["layers"]], engine
    said = plan("diff", os.path.join(folder, "contiguous.json"), made, "--bytes-per-expert", "110592", "--ranks", str(RANKS), "--traffic", trace, "-C", "16").stdout
    assert "bytes" in said and "copies" in said


def check_ignored(folder, trace, made):
    """No option is silently without effect, and what must fail fails before the planning."""
    stats, pipe = os.path.join(folder, "stats"), os.path.join(folder, "pipe")
    refused("--nodes goes with --ranks", "score", "--plan", made, "--trace", trace, "--nodes", "2", code=2)
    refused("--domain chooses from a trace", "solve", "--stats", stats, "--ranks", "4", "--domain", "math", code=2)
    refused("--phase chooses from a trace", "diff", made, made, "--phase", "decode", code=2)
    refused("--folds: one part", "solve", "--trace", trace, "--ranks", "4", "--folds", "1", code=2)
    refused("without --json", "solve", "--trace", trace, "--ranks", "4", "--held-out", trace, "--json", code=2)
    refused("a picture needs a trace", "solve", "--stats", stats, "--ranks", "4", "--picture", os.path.join(folder, "none"), code=2)
    slow = ("solve", "--trace", trace, "--ranks", "4", "--seconds", "0", "--work", "0")
    refused("No such file", *slow, "-o", os.path.join(folder, "no", "plan.json"))
    refused("Is a directory", *slow, "-o", folder)
    refused("cannot be opened", *slow, "--held-out", os.path.join(folder, "no.trace"))
    refused("a trace is not overwritten", "stats", trace, "-o", trace, code=2)
    refused("--stats goes with a plan", "show", trace, "--stats", stats, code=2)
    refused("in a page alone", "show", trace, "--plan", made, code=2)
    refused("cannot be opened", "stats", trace, "--plan", os.path.join(folder, "no.json"), "-o", os.path.join(folder, "none"))
    os.mkfifo(pipe)
    for words in (slow, ("import", "eplb", os.path.join(folder, "eplb.npz"), "--ranks", "4"), ("export", "eplb", made), ("export", "sglang", made), ("stats", trace)):
        refused("not supported", *words, "-o", pipe)
    assert not os.path.isfile(pipe) and not [n for n in os.listdir(folder) if n.startswith("pipe.")]


def check_mistakes(folder, trace):
    made = os.path.join(folder, "lpt.json")
    refused("is missing", "solve", "--trace", trace, code=2)
    refused("neither --stats nor --trace", "solve", "--ranks", "4", code=2)
    refused("'quick' is none of", "solve", "--trace", trace, "--ranks", "4", "--solver", "quick", code=2)
    refused("smallest slack that would do", "solve", "--trace", trace, "--ranks", "32", "--slack", "1%", "-o", os.path.join(folder, "none"))
    refused("no domain is called 'law'", "solve", "--trace", trace, "--ranks", "4", "--domain", "law", code=2)
    refused("sequences", "simulate", "--plan", made, "--trace", trace, "-C", "5000")
    refused("cannot be opened", "score", "--plan", os.path.join(folder, "nothing.json"), "--trace", trace)
    budget = os.path.join(folder, "budget.json")
    with open(budget, "w", encoding="utf-8") as f:
        rank = {"node": 0, "expert_bytes": 40 * 110592, "row_us": 3, "expert_us": 4}
        json.dump({"ranks": [rank] * RANKS, "same_node": {"us": 1, "gb_per_s": 3}, "cross_node": {"us": 60, "gb_per_s": 1}, "row_bytes": 768,
                   "bytes_per_expert": 110592}, f)
    refused(f"{32 * 110592} bytes more would do, or {48 * 110592} bytes on every rank", "solve", "--trace", trace, "--topology", budget)
    with open(budget, encoding="utf-8") as f:
        uneven = json.load(f)
    for rank, n in zip(uneven["ranks"], (96, 48, 48, 12)):
        rank["expert_bytes"] = n * 110592
    with open(budget, "w", encoding="utf-8") as f:
        json.dump(uneven, f)
    said = plan("solve", "--trace", trace, "--topology", budget, "--solver", "lpt", "--folds", "0", "-C", "16").stdout
    assert "contiguous does not fit: rank 3 would hold 48 experts and has room for 12" in said and "lpt does not fit" not in said, said
    assert "lpt does not fit: rank 3" in plan("score", "--plan", made, "--trace", trace, "--topology", budget, "-C", "16").stdout
    with open(made, encoding="utf-8") as f:
        text = f.read()
    cut = os.path.join(folder, "cut.json")
    with open(cut, "w", encoding="utf-8") as f:
        f.write(text[:len(text) // 2])
    refused("cut.json", "score", "--plan", cut, "--trace", trace)
    check_ignored(folder, trace, made)
    with open(trace, "rb") as f:
        data = f.read()
    with open(os.path.join(folder, "cut.trace"), "wb") as f:
        f.write(data[:len(data) // 2])
    refused("cut.trace", "stats", os.path.join(folder, "cut.trace"), "-o", os.path.join(folder, "none"))
    assert not os.path.exists(os.path.join(folder, "none"))


def main():
    with tempfile.TemporaryDirectory() as folder:
        score(folder, "first")
        trace, topology = os.path.join(folder, "first.trace"), os.path.join(folder, "topology.json")
        done = subprocess.run(["mpirun", "--bind-to", "none", "-np", str(RANKS), PLAN, "probe", "--model", DEMO, "-o", topology], env=MPI, capture_output=True, text=True,
                              timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        names = check_solvers(folder, trace, topology)
        check_rows(folder)
        check_files(folder, trace)
        check_mistakes(folder, trace)
    print("ok: " + ", ".join(names))


if __name__ == "__main__":
    sys.exit(main())
