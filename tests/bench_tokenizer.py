#!/usr/bin/env python3
"""Our tokenizer against the `tokenizers` package, one thread each, in turn, on the same documents.

usage: bench_tokenizer.py BUILD CORPORA TOKENIZER... [--rounds N]     (needs the package `tokenizers`)

BUILD is the build folder (with tests/bench_tokenizer), CORPORA a folder of .txt and .jsonl files, TOKENIZER folders with tokenizer.json.
A round is our program over all documents (a process whose cache is empty at first), then the package over them (its cache stays warm
from round to round), by encode() and by encode_batch_fast(). Medians over the rounds, MB = 10^6 bytes, and ours over the better of the two.
"""
import os
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import argparse, json, re, statistics, subprocess, tempfile, time
from tokenizers import Tokenizer
from compare_tokenizers import read_texts


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def encode_each(package, texts):
    for t in texts:
        package.encode(t, add_special_tokens=False)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build"), p.add_argument("corpora"), p.add_argument("tokenizers", nargs="+")
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    texts = read_texts(args.corpora)
    size = sum(len(t.encode()) for t in texts) / 1e6
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in texts)
        file.flush()
        for folder in args.tokenizers:
            package = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
            ours, single, batch, loads = [], [], [], []
            for _ in range(args.rounds):
                out = subprocess.run([os.path.join(args.build, "tests", "bench_tokenizer"), folder, file.name, "1"], check=True, stdout=subprocess.PIPE, text=True).stdout
                ours.append(float(re.search(r"median ([\d.]+)", out)[1]))
                loads.append(float(re.search(r"loaded in ([\d.]+)", out)[1]))
                single.append(size / seconds(lambda: encode_each(package, texts)))
                batch.append(size / seconds(lambda: package.encode_batch_fast(texts, add_special_tokens=False)))
            o, s, b = map(statistics.median, (ours, single, batch))
            print(f"{folder}: {len(texts)} documents, {size:.1f} MB: ours {o:.2f} MB/s, package {s:.2f} (encode), {b:.2f} (encode_batch_fast); "
                  f"ratio {o / max(s, b):.1f}; loaded in {statistics.median(loads):.3f} s", flush=True)


if __name__ == "__main__":
    main()
