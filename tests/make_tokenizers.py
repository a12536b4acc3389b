#!/usr/bin/env python3
"""Write tests/data/tokenizers/: small tokenizers and what the `tokenizers` package makes of difficult texts with them.

usage: make_tokenizers.py            (needs the package `tokenizers`; writes into the checkout)

<name>/tokenizer.json is one tokenizer. <name>/expected.jsonl has a line per text of texts.jsonl: {"ids", "special", "kept", "skipped"}
(ids without and with add_special_tokens, and what the latter decode to, special tokens kept and skipped), then lines {"of", "kept",
"skipped"} of ids taken at random, and last {"digests": [..]}: one of the ids of each block of sweep() below. What is not there is the
same as what stands before it ("kept": as the text itself), unless "panics" says that the package cannot decode these ids. Texts are in
hexadecimal UTF-8: they hold NUL characters, and JSON readers disagree about those.
"""
import json, os, random, shutil
from tokenizers import AddedToken, Regex, Tokenizer, __version__, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Punctuation, Split, Whitespace, WhitespaceSplit

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "data", "tokenizers")

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
DEEPSEEK = [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"]

SENTENCES = """The quick brown fox jumps over the lazy dog, didn't it? It's 1234567 o'clock; I'll go, they've gone, we'd better.
def f(x):\n    return x ** 2  # squared\n\n\nclass A(B):\n\tpass\n
Größe, Übergröße und Maß: ein Fuß im Schuß. Ça va très bien, garçon! Señor Núñez comió piña. Ærøskøbing på Ærø.
Привет, мир! Как дела? Съешь же ещё этих мягких французских булок. Γειά σου Κόσμε, τι κάνεις;
السلام عليكم ورحمة الله وبركاته 2024 שלום עולם नमस्ते दुनिया สวัสดีชาวโลก
你好世界,今天天气很好。我们去公园吧!こんにちは世界、カタカナとひらがな。안녕하세요 세계 여러분
int main(void) { printf("%d\\n", 42); return 0; } /* 0x1F == 31 */ <div class="a">&amp;</div> https://example.org/a?b=c#d
""".split("\n")

NASTY = [
    "", " ", "  ", "\n", "\r\n", "\n\n \n", "\t\t x", "a", "\0", "a\0b\0\0", "\x01\x02\x1b[0m\x7f\x80\x9f", "\u00a0x\u3000y\u2028z\u2029\u0085w",
    "\ufeffbom", "\u180emvs\u180e x", "\u200b\u200c\u200d zero", "  two  three   \n  ", " " * 70, "\n" * 70, " \n" * 40, "a" * 200, "ab" * 150, "é" * 60, "中" * 50,
    "👨‍👩‍👧‍👦 family 👍🏽 🇩🇪🇫🇷 ☺️ ❤️‍🔥", "e\u0301 E\u0301 n\u0303 a\u030a\u0323 a\u0323\u030a \u1e69 s\u0323\u0307 s\u0307\u0323", "\u0301start \u0323\u0301",
    "ﬁ ﬀ ① ⅷ ½ ㎏ ﷺ ｆｕｌｌ ＷＩＤＴＨ ｶﾅ Å Å Ω Ω", "각 각 한글 ᄀ ᆨ", "İstanbul ısı ẞ ß ǅ ŉ ΑΣ ΟΔΟΣ", "don't DON'T Don'T it'S we'LL I'ſ 'ſ ’s ‘t", "'s't're've'm'll'd", "x'y''z'''",
    "1 12 123 1234 12345 123456 1234567 ٣٤٥٦ ४५ 一二三 ①② ²³ ½¾ Ⅷ", "1,234,567.89 -1e-10 0x1F 3.14.15", "snake_case camelCase PascalCase SCREAMING_CASE kebab-case", "a.b,c;d:e!f?g",
    "!!! ??? ... --- ***\n\n### $$$ @@@ ^^^", "¡¿«»“”„‘’–—…•§¶†‡", "€£¥₹₿ ±×÷√∞≈≠≤≥ ←↑→↓ ♠♥♦♣ ♪♫", "▁ a▁b ▁▁ c ▁▁▁d▁", "Ġ Ċ ĠĠhello", "<0x41> <0xE2><0x96> <unk> <s> </s>",
    "مَرْحَبًا بِالعَالَم", "שָׁלוֹם", "क्षत्रिय ज्ञान श्री", "ภาษาไทยไม่มีช่องว่าง", "ខ្មែរ မြန်မာ ଓଡ଼ିଆ", "日本語とEnglishの混在123テスト", "中文,标点。符号!「引号」", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𐍈 𓀀 🀄",
    "\U00031350\U000323af \U0002ebf0 \ua7cb \u1c89 \U00010d40\U00010d41", "\U0010ffff\ue000\ufdd0\uffff", "a\u0300\u0301\u0302\u0303\u0304\u0305" + "\u0316\u0301" * 20,
    "<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", " <|endoftext|> ", "<|endoftext", "<|<|endoftext|>|>", "<|im_start|>user\nHi<|im_end|>\n",
    "x [L] y  [L]z", "x [R] y [R]  z", "x  [LR]  y [LR][LR] z", "[L][R][LR]", "[R]   [L]", "[R]   [R]  x", "a [W] b[W]c [W]d d[W] [W] [W]", "[W]é é[W] _[W] [W]1 -[W]-", "Été ÉTÉ été e\u0301te\u0301 xÉtéx",
    "[N] [n] x[N]y", "    four  two   three", "tool <tool_call>{}</tool_call> </think>", "   [R]", "[L]   ", "\u00a0[L]\u2003", "[R]\u00a0\u3000x\n[R]\n\n",
    "Ünï[R] \ufb01", "trailing ", "trailing  ", " leading", "  leading", "mixed \t \n \r\n \r x", "a\rb\r\nc\n\rd", "x\n\n\n\ny", "x \n \n y", "-- a\n-- b", "/* c */", "\\n\\t\\0 \\u0041", "\"quoted\" 'single' `tick`",
]
POOL = list("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789") + list(" \n\t\r.,!?-_'\"<>[]|/\\@#") + [" ", "  ", "\n\n", "'s", "'LL", " the", "ing", "tion", "123", "▁", "é", "e\u0301", "ß", "ﬁ", "中", "文", "の", "カ", "안", "م", "ש", "क",
        "ั", "👍", "👍🏽", "\u200d", "\u0301", "\u0323", "\u00a0", "\u3000", "\u180e", "\0", "\x1b", "\ufeff", "½", "²", "Ⅷ", "٣", "[L]", "[R]", "[LR]", "[W]", "[N]", "<|endoftext|>", "<tool_call>", "<s>", "</s>", "<unk>", "<0x41>", "Été"]


def random_texts(n, seed):
    r = random.Random(seed)
    return ["".join(r.choice(POOL) for _ in range(r.choice([3, 8, 20, 60]))) for _ in range(n)]


def sweep():
    """Characters of all kinds, each between letters, behind a blank, twice and among marks, in blocks of 4096 code points; tests do the
    same in C."""
    blocks = {}
    for c in range(0x110000):
        thin = (0x3500 <= c < 0x9F00 or 0xAC80 <= c < 0xD700 or 0x17000 <= c < 0x18A00) and c % 97
        if 0xD800 <= c < 0xE000 or thin or (0x20000 <= c < 0xE0000 and c % 251) or (c >= 0xE0200 and c % 9973):
            continue
        blocks.setdefault(c >> 12, []).append("a" + chr(c) + "b " + chr(c) + chr(c) + "\u0334" + chr(c) + "\u0301")
    return [" ".join(b) for _, b in sorted(blocks.items())]


def digest(ids):
    h = 0xCBF29CE484222325
    for i in ids:
        h = (h ^ i) * 0x100000001B3 % 2**64
    return "%016x" % h


def corpus():
    texts = SENTENCES * 3
    with open(os.path.join(HERE, "..", "deploy", "models", "convoke-demo", "texts.jsonl"), encoding="utf-8") as file:
        texts += [json.loads(line).get("text", "") for line in list(file)[:60]]
    return texts


def common_added(special="<|endoftext|>"):
    return [AddedToken(special, special=True, normalized=False), AddedToken("<|im_start|>", special=True, normalized=False), AddedToken("<|im_end|>", special=True, normalized=False),
            AddedToken("[L]", lstrip=True, normalized=False), AddedToken("[R]", rstrip=True, normalized=False, special=True), AddedToken("[LR]", lstrip=True, rstrip=True, normalized=False),
            AddedToken("[W]", single_word=True, normalized=False), AddedToken("[N]", normalized=True), AddedToken("Été", normalized=True), AddedToken("<tool_call>", normalized=False),
            AddedToken("</tool_call>", normalized=False), AddedToken("    ", normalized=True), AddedToken("  ", normalized=True)]


def byte_level(vocab, pre, normalizer=None, ignore_merges=False, added=(), post=None):
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    t.pre_tokenizer = pre
    if normalizer:
        t.normalizer = normalizer
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    t.decoder = decoders.ByteLevel()
    t.add_tokens(list(added))
    if post:
        t.post_processor = post(t)
    return t


def sentence_piece(vocab, normalizer, pre, decoder, byte_fallback=True, fuse_unk=True, added=("<unk>", "<s>", "</s>"), post=True):
    names = list(added) + (["<0x%02X>" % b for b in range(256)] if byte_fallback else [])
    t = Tokenizer(models.BPE(byte_fallback=byte_fallback, fuse_unk=fuse_unk, unk_token="<unk>"))
    if normalizer:
        t.normalizer = normalizer
    t.pre_tokenizer = pre or Metaspace(prepend_scheme="first")  # trained by words, as these models were
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=vocab, special_tokens=names, limit_alphabet=120, show_progress=False))
    spec = json.loads(t.to_str())
    spec["added_tokens"] = [a for a in spec["added_tokens"] if a["content"] in added]  # byte tokens belong to the model alone
    if not pre:
        spec["pre_tokenizer"] = None
    t = Tokenizer.from_str(json.dumps(spec))
    if decoder:
        t.decoder = decoder
    if post:
        t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", t.token_to_id("<s>"))])
    return t


def template(single, *tokens):
    return lambda t: processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=[(x, t.token_to_id(x)) for x in tokens])


def split(*patterns, behavior="isolated", invert=False):
    return [Split(p if isinstance(p, str) else Regex(p[0]), behavior, invert) for p in patterns]


def tokenizers():
    seq, bl = pre_tokenizers.Sequence, ByteLevel(add_prefix_space=False, use_regex=False)
    llama = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    yield "gpt2", byte_level(700, ByteLevel(add_prefix_space=False), added=common_added()[:1])
    yield "gpt2_prefix", byte_level(500, ByteLevel(add_prefix_space=True), added=common_added())
    yield "llama3", byte_level(900, seq(split([LLAMA3]) + [bl]), ignore_merges=True, added=[AddedToken("<|begin_of_text|>", special=True, normalized=False)] + common_added(),
                               post=lambda t: processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<|begin_of_text|> $A", "<|begin_of_text|>")(t)]))
    yield "qwen2", byte_level(700, seq(split([QWEN]) + [bl]), normalizer=normalizers.NFC(), added=common_added())
    yield "olmoe", byte_level(600, ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC(), added=[AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)] + common_added()[:1],
                              post=template("$A <|endoftext|>", "<|endoftext|>"))
    yield "deepseek", byte_level(800, seq(split(*[[p] for p in DEEPSEEK]) + [bl]), normalizer=normalizers.Sequence([]), added=common_added())
    yield "o200k", byte_level(500, seq(split([O200K]) + [bl]), added=common_added()[:4])
    yield "mixtral", sentence_piece(900, prepend, None, llama)
    yield "mixtral_metaspace", sentence_piece(700, None, Metaspace(prepend_scheme="first", split=False), llama, added=("<unk>", "<s>", "</s>", "[L]"))
    yield "metaspace", sentence_piece(500, normalizers.NFKC(), Metaspace(prepend_scheme="always", split=True), decoders.Metaspace(prepend_scheme="always"), byte_fallback=False, fuse_unk=False)
    yield "metaspace_never", sentence_piece(500, normalizers.Sequence([normalizers.Strip(True, True), normalizers.NFKD(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s{2,}|\d+"), " ")]),
                                            Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="never"), byte_fallback=False, post=False)
    yield "first_after_split", sentence_piece(500, normalizers.NFD(), seq([WhitespaceSplit(), Metaspace(prepend_scheme="first", split=False)]), decoders.Sequence([decoders.Strip("▁", 1, 0), decoders.Replace(Regex("[▁e]"), " "), decoders.ByteFallback()]))
    yield "classes", sentence_piece(500, normalizers.Strip(True, False), seq([Whitespace(), Digits(individual_digits=False), Punctuation("merged_with_previous")]), None)
    yield "classes_isolated", byte_level(500, seq([WhitespaceSplit(), Digits(individual_digits=True), Punctuation(), bl]))
    yield "twice", byte_level(500, seq([ByteLevel(add_prefix_space=True, use_regex=True), Split(Regex("[tĠ]"), "merged_with_next", False)]))
    yield "fused_replace", sentence_piece(500, prepend, None, decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁▁", "  "), decoders.Replace("▁", " "), decoders.Strip(" ", 2, 3)]), added=("<unk>", "<s>", "</s>", "<tool_call>"))
    for behavior in ("removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"):
        yield "split_" + behavior, byte_level(330, seq(split([r"\s|[aeiou]+"], behavior=behavior) + split("th", ".", behavior=behavior, invert=behavior == "contiguous") + [bl]))
        yield "split_%s_inverted" % behavior, byte_level(330, seq(split([r"\w\w?"], behavior=behavior, invert=True) + [bl]))
    exotic = [r"\w+\b|\W", r"\h{2,3}+|[^\S\n]+$|^-- ", r"(?i:MIXED|été|ς)|(?<=[.,])\p{^L}|\p{Han}{2}", r"(?m:a.b)|.$|[\d\-]+\D?|\u00e9|\x{4e2d}|[^\r\n]{20}?", r"(?>\p{Lu}+)\p{P}?|\p{S}{,2}|\R|\X(?!\S)"]
    for i, pattern in enumerate(exotic):
        yield "regex_%d" % i, byte_level(330, seq(split([pattern]) + [bl]))


def plain_model(tokens, **options):
    return Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>", **options))


def sweepers():
    """Tokenizers that show what was cut and what was normalised, one character at a time: only their digests are kept."""
    for name in "s S w W d h p{L} P{L} p{Lu} p{Ll} p{Lt} p{Lm} p{Lo} p{M} p{Mc} p{N} p{Nd} p{P} p{Po} p{S} p{So} p{Sc} p{Z} p{Han} p{Katakana}".split():
        t = plain_model(["<unk>", "a", "b"], fuse_unk=True)
        t.pre_tokenizer = Split(Regex("\\" + name), "removed")
        yield "class_" + name.replace("{", "").replace("}", ""), t
    kinds = dict(digits=Digits(individual_digits=True), punctuation=Punctuation("isolated"), whitespace=Whitespace(), whitespace_split=WhitespaceSplit())
    for name, pre in kinds.items():
        t = plain_model(["<unk>", "a", "b"], fuse_unk=True)
        t.pre_tokenizer = pre
        yield "class_" + name, t
    t = plain_model(["<unk>", "a", "b"], fuse_unk=True)
    t.add_tokens([AddedToken("a", single_word=True, normalized=False), AddedToken("b", lstrip=True, rstrip=True, normalized=False)])
    yield "class_added", t
    forms = dict(nfc=normalizers.NFC(), nfd=normalizers.NFD(), nfkc=normalizers.NFKC(), nfkd=normalizers.NFKD(), lower=normalizers.Lowercase(), strip=normalizers.Strip())
    for name, normalizer in forms.items():
        t = plain_model(["<0x%02X>" % b for b in range(256)] + ["<unk>"], byte_fallback=True)
        t.normalizer = normalizer
        yield "form_" + name, t


def hexed(text):
    return text.encode().hex()


def write(name, t, texts, blocks):
    folder = os.path.join(OUT, name)
    os.makedirs(folder)
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as file:
        spec = json.loads(t.to_str())
        if name == "gpt2":  # as older files have it
            spec["model"]["merges"] = [" ".join(m) for m in spec["model"]["merges"]]
            del spec["model"]["type"]
        json.dump(spec, file, ensure_ascii=False, separators=(",", ":"))
    t = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    r = random.Random(name)
    with open(os.path.join(folder, "expected.jsonl"), "w") as file:
        def line(**values):
            file.write(json.dumps(values, separators=(",", ":")) + "\n")
        def decoded(ids, text=None):
            try:  # Strip of a token shorter than it takes off panics in the package
                kept, skipped = t.decode(ids, skip_special_tokens=False), t.decode(ids, skip_special_tokens=True)
            except BaseException:
                return {"panics": True}
            return {**({"kept": hexed(kept)} if kept != text else {}), **({"skipped": hexed(skipped)} if skipped != kept else {})}
        for text in texts:
            special = t.encode(text).ids
            ids = t.encode(text, add_special_tokens=False).ids
            line(ids=ids, **({"special": special} if special != ids else {}), **decoded(special, text))
        for _ in range(20 if texts else 0):
            ids = [r.randrange(t.get_vocab_size() + 2) for _ in range(r.choice([1, 5, 30]))]
            line(of=ids, **decoded(ids))
        line(digests=[digest(t.encode(b, add_special_tokens=False).ids) for b in blocks])


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs(OUT)
    texts = SENTENCES + NASTY + random_texts(40, 1)
    with open(os.path.join(OUT, "texts.jsonl"), "w") as file:
        file.writelines(json.dumps(hexed(t)) + "\n" for t in texts)
    blocks = sweep()
    for name, t in tokenizers():
        write(name, t, texts, blocks)
        print(name, t.get_vocab_size())
    for name, t in sweepers():
        write(name, t, [], blocks)
    with open(os.path.join(OUT, "README.md"), "w") as file:
        file.write(f"Small tokenizers and what the package `tokenizers` {__version__} makes of texts with them: written by `tests/make_tokenizers.py`, which says\nwhat the files hold.\n")


if __name__ == "__main__":
    main()
