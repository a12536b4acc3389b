#!/usr/bin/env python3
"""Compare `convoke tokenize` with the `tokenizers` package over whole corpora: token ids, and the text that the ids decode to.

usage: compare_tokenizers.py CONVOKE CORPORA TOKENIZER...     (needs the package `tokenizers`)

CONVOKE is the program `convoke`; CORPORA a folder of .txt and .jsonl files (every string in a line's object is a text, those of a list
too); each TOKENIZER a folder with tokenizer.json. Ends with 1 if anything differs.
"""
import json, os, subprocess, sys, tempfile
from tokenizers import Tokenizer


def strings(value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [s for v in value for s in strings(v)] if isinstance(value, (list, type({}.values()))) else []


def read_texts(folder):
    texts = []
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), newline="", encoding="utf-8") as file:
            if name.endswith(".txt"):
                texts.append(file.read())
            elif name.endswith(".jsonl"):
                for line in file:
                    texts += strings(json.loads(line))
    return [t for t in texts if "\0" not in t]


def run(convoke, folder, lines, *options):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        out = subprocess.run([*convoke.split(), "tokenize", "--model", folder, *options, file.name], check=True, stdout=subprocess.PIPE)
    return [json.loads(line) for line in out.stdout.split(b"\n") if line]


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    convoke, corpora, folders = sys.argv[1], sys.argv[2], sys.argv[3:]
    texts = read_texts(corpora)
    wrong = 0
    for folder in folders:
        package = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        expected = [package.encode(t, add_special_tokens=True).ids for t in texts]
        ours = [line["token_ids"] for line in run(convoke, folder, ({"text": t} for t in texts), "--special")]
        differ = [i for i, (a, b) in enumerate(zip(expected, ours)) if a != b]
        decoded = [line["text"] for line in run(convoke, folder, ({"token_ids": ids} for ids in expected), "--decode", "--special")]
        undone = [i for i, ids in enumerate(expected) if package.decode(ids, skip_special_tokens=False) != decoded[i]]
        same = len(ours) == len(texts) == len(decoded) and not differ and not undone
        wrong += not same
        print(f"{folder}: {len(texts)} texts, {sum(len(t.encode()) for t in texts) / 1e6:.1f} MB, {sum(map(len, expected))} tokens: "
              + ("all the same" if same else f"ids differ in {len(differ)} texts, decoded text in {len(undone)}: {differ[:5]} {undone[:5]}"))
        for i in differ[:2]:
            a, b = expected[i], ours[i]
            at = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            print(f"  text {i}, token {at}: package {[package.id_to_token(x) for x in a[max(0, at - 2):at + 4]]}, ours {[package.id_to_token(x) for x in b[max(0, at - 2):at + 4]]}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
