#!/usr/bin/env python3
"""test_deploy.py - what people copy is right as far as it can be checked without running it: scripts parse, YAML loads, a hostfile is understood, and every
--option that deploy/'s files and the READMEs give to one of our programs is in that program's --help.
"""
import glob
import os
import re
import subprocess
import sys

import yaml

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402

DEPLOY = os.path.join(serving.SOURCE, "deploy")
PROGRAMS = {"convoke serve": ["convoke", "serve"], "convoke generate": ["convoke", "generate"], "convoke tokenize": ["convoke", "tokenize"],
            "convoke-worker": ["convoke-worker"], "convoke-score": ["convoke-score"],
            **{f"convoke-plan {c}": ["convoke-plan", c] for c in ("import", "export", "stats", "show", "solve", "score", "compare", "simulate", "diff", "probe")}}
NAMES = re.compile(r"(?<![\w./-])(?:\S*/)?(convoke (?:serve|generate|tokenize)|convoke-worker|convoke-score|convoke-plan [a-z]+)(?=\s)")
# A command ends where the shell, a comment, a table's cell or a quotation ends it.
END = re.compile(r"[|&;>`]|\s#\s|\.\s")


def known_options(command):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMPI_")}
    text = subprocess.run([os.path.join(serving.BINARY, command[0]), *command[1:], "--help"], env=environment, capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"--([a-z][a-z0-9-]*)", text))
    return options | {"no-" + o for o in options}


def commands_in(text):
    """(program, its words as text) for each command of ours; continued lines are one."""
    for line in re.sub(r"\\\n\s*", " ", text).split("\n"):
        found = list(NAMES.finditer(line))
        for i, match in enumerate(found):
            rest = line[match.end():found[i + 1].start() if i + 1 < len(found) else len(line)]
            yield match.group(1), END.split(rest)[0]


def commands_in_yaml(node):
    """A command as a list of words: as one line. Shell text inside is text."""
    if isinstance(node, dict):
        words = (node.get("command") or []) + (node.get("args") or [])
        if words and all(isinstance(w, str) for w in words):
            yield from commands_in(" ".join(w + (" " if "\n" in w else "") for w in words) + " ")
        for value in node.values():
            yield from commands_in_yaml(value)
    elif isinstance(node, list):
        for value in node:
            yield from commands_in_yaml(value)


def check_options(path, commands, known):
    n = 0
    for program, words in commands:
        for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", re.sub(r"\"[^\"]*\"", "", words)):
            n += 1
            assert option in known[program], f"{path}: {program} has no option --{option}"
    return n


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def main():
    known = {name: known_options(command) for name, command in PROGRAMS.items()}
    assert list(commands_in("a/convoke serve --x 1 | convoke-worker --y \\\n  --z & convoke-score --w")) == [
        ("convoke serve", " --x 1 "), ("convoke-worker", " --y  --z "), ("convoke-score", " --w")]

    for path in glob.glob(os.path.join(DEPLOY, "*.sh")) + [os.path.join(DEPLOY, "slurm.sbatch")]:
        subprocess.run(["bash", "-n", path], check=True)
    counts = {}
    for path in glob.glob(os.path.join(DEPLOY, "*")) + glob.glob(os.path.join(serving.SOURCE, "*", "README.md")) + [os.path.join(serving.SOURCE, "README.md")]:
        if not os.path.isfile(path):
            continue
        name = os.path.relpath(path, serving.SOURCE)
        commands = list(commands_in(read(path)))
        if path.endswith(".yaml"):
            documents = [d for d in yaml.safe_load_all(read(path)) if d]
            assert all("kind" in d and "name" in d["metadata"] for d in documents), name
            commands += commands_in_yaml(documents)
        elif path.endswith(".yml"):
            assert yaml.safe_load(read(path))["scrape_configs"]
        counts[name] = check_options(name, commands, known)
    for name, least in (("deploy/slurm.sbatch", 7), ("deploy/kubernetes.yaml", 12), ("deploy/README.md", 12), ("README.md", 8), ("deploy/quickstart.sh", 4)):
        assert counts.get(name, 0) >= least, f"{name}: only {counts.get(name)} options found: this test is blind"

    hostfile = subprocess.run([os.path.join(serving.BINARY, "convoke"), "serve", "--model", serving.DEMO, "--ranks", "4", "--grpc", "127.0.0.1:0", "--hostfile",
                               os.path.join(DEPLOY, "hostfile.example")], capture_output=True, text=True, timeout=60, check=False)
    assert "rank 0 runs on node0 and cannot reach the control connection" in hostfile.stderr, hostfile.stderr
    print("ok: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items()) if n))


if __name__ == "__main__":
    main()
