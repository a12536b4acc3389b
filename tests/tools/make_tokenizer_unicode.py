#!/usr/bin/env python3
"""Write cluster/tokenizer_unicode.h: where PCRE2's and utf8proc's tables and the `tokenizers` package's differ.

usage: make_tokenizer_unicode.py > cluster/tokenizer_unicode.h

Needs the package `tokenizers` and the libraries libpcre2-8.so.0 and libutf8proc.so.2. Every code point is asked of both sides (some
minutes). The package's regular expressions, its normalisers, its digits and its punctuation each come from another version of
Unicode; the lists below are what has to be added to ours (or forgotten) to say the same.
"""
import ctypes, tokenizers
from tokenizers import Regex, normalizers as N
from tokenizers.pre_tokenizers import Digits, Punctuation, Split, Whitespace

CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
BLOCKS = [CODE_POINTS[i:i + 2000] for i in range(0, len(CODE_POINTS), 2000)]
utf8proc = ctypes.CDLL("libutf8proc.so.2")
utf8proc.utf8proc_map.restype = ctypes.c_ssize_t
utf8proc.utf8proc_version.restype = utf8proc.utf8proc_unicode_version.restype = ctypes.c_char_p
pcre2 = ctypes.CDLL("libpcre2-8.so.0")
pcre2.pcre2_compile_8.restype = pcre2.pcre2_match_data_create_8.restype = ctypes.c_void_p
libc = ctypes.CDLL(None)
NFC, NFD, NFKC, NFKD = 2 | 8, 2 | 16, 2 | 8 | 4, 2 | 16 | 4


def package_class(pattern):
    """The code points that a regular expression of the package matches."""
    split, hit = Split(Regex(pattern), "removed"), set()
    for block in BLOCKS:
        kept = set()
        for _, (a, b) in split.pre_tokenize_str("".join(map(chr, block))):
            kept.update(range(a, b))
        hit.update(c for i, c in enumerate(block) if i not in kept)
    return hit


def pcre2_class(pattern):
    error, at = ctypes.c_int(), ctypes.c_size_t()
    code = pcre2.pcre2_compile_8(pattern.encode(), ctypes.c_size_t(len(pattern)), 0x00080000 | 0x00020000, ctypes.byref(error), ctypes.byref(at), None)
    assert code, pattern
    data = ctypes.c_void_p(pcre2.pcre2_match_data_create_8(4, None))
    hit = set()
    for c in CODE_POINTS:
        text = chr(c).encode()
        if pcre2.pcre2_match_8(ctypes.c_void_p(code), text, ctypes.c_size_t(len(text)), ctypes.c_size_t(0), 0, data, None) > 0:
            hit.add(c)
    return hit


def one_by_one(pre_tokenizer, n_parts):
    return {c for c in CODE_POINTS if len(pre_tokenizer.pre_tokenize_str("a" + chr(c) + "a")) == n_parts}


def by_category(categories):
    return {c for c in CODE_POINTS if utf8proc.utf8proc_category(c) in categories}


def mapped(text, options):
    data, out = text.encode(), ctypes.c_void_p()
    n = utf8proc.utf8proc_map(data, ctypes.c_ssize_t(len(data)), ctypes.byref(out), options)
    text = ctypes.string_at(out, n).decode()
    libc.free(out)
    return text


def ranges(points):
    out = []
    for c in sorted(points):
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def wrapped(items, indent, width=128):
    lines, line = [], indent
    for item in items:
        if len(line) + len(item) > width:
            lines.append(line.rstrip())
            line = indent
        line += item
    return "\n".join(lines + [line.rstrip()])


def print_ranges(name, comment, points):
    print(f"\n/* {comment} */\nstatic const uint32_t {name}[][2] = {{")
    print(wrapped(["{0x%x, 0x%x}, " % tuple(r) for r in ranges(points)], "    ") + "\n};")


print(f"""/* Made by tests/tools/make_tokenizer_unicode.py with tokenizers {tokenizers.__version__}, utf8proc {utf8proc.utf8proc_version().decode()} \
(Unicode {utf8proc.utf8proc_unicode_version().decode()}), PCRE2 10.42 (Unicode 14): do not edit.
 * The tokenizers package takes its character classes from several versions of Unicode. Models saw text cut by those tables, so
 * these lists bring ours to say the same. With newer libraries here most of the additions are simply there already. */
#ifndef CONVOKE_CLUSTER_TOKENIZER_UNICODE_H
#define CONVOKE_CLUSTER_TOKENIZER_UNICODE_H

#include <stdint.h>

/* What a property inside a regular expression also holds: pieces of a character class. */
static const struct {{
    const char *property, *more;
}} unicode_class_additions[] = {{""")
for name in "L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So".split():
    more = package_class(r"\p{%s}" % name) - pcre2_class(r"\p{%s}" % name)
    if more:
        text = ["\\\\x{%x}" % a if a == b else "\\\\x{%x}-\\\\x{%x}" % (a, b) for a, b in ranges(more)]
        lines = wrapped(text, "", 110).split("\n")
        print('    {"%s",\n' % name + "\n".join('     "%s"' % line for line in lines) + "},")
print("};")

OUR_WORD_PIECES = set()
for name in "L M Nd Nl Pc".split():
    OUR_WORD_PIECES |= pcre2_class(r"\p{%s}" % name)
more = ranges(package_class(r"\w") - OUR_WORD_PIECES)
text = wrapped(["\\\\x{%x}" % a if a == b else "\\\\x{%x}-\\\\x{%x}" % (a, b) for a, b in more], "", 110).split("\n")
print("\n/* The same for \\w, beside letters, marks, decimal digits, letter numbers and connectors. */\nstatic const char unicode_word_additions[] =")
print("\n".join('    "%s"' % line for line in text) + ";")

NUMBERS, PUNCTUATION = {9, 10, 11}, set(range(12, 19))
digits = one_by_one(Digits(individual_digits=True), 3)
print_ranges("unicode_more_numbers", "Numbers for the pre-tokenizer Digits that are missing from the categories N*.", digits - by_category(NUMBERS))
punctuation = one_by_one(Punctuation("removed"), 2)
ours = by_category(PUNCTUATION) | {c for c in range(128) if chr(c) in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"}
print_ranges("unicode_more_punctuation", "The same for the pre-tokenizer Punctuation and P*", punctuation - ours)
print_ranges("unicode_no_punctuation", "and what does not count.", ours - punctuation)
word = one_by_one(Whitespace(), 1)
print_ranges("unicode_more_word", "Characters of words (\\w in the package's own expressions) that are not L*, M*, Nd, Nl or Pc.",
             word - by_category({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12}))
assert word >= by_category({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12})

unknown = set()
for package, options in ((N.NFC(), NFC), (N.NFD(), NFD), (N.NFKC(), NFKC), (N.NFKD(), NFKD)):
    for c in CODE_POINTS:
        x = chr(c)
        if c < 0x80: continue
        # alone, and among marks of class 1 and 230: shows its decomposition and its combining class
        if any(package.normalize_str(s) != mapped(s, options) for s in (x, "a\u0334" + x, "a\u0301" + x, "a" + x + "\u0334")):
            unknown.add(c)
            parts = mapped(x, NFD)
            if len(parts) > 1:
                unknown.add(ord(parts[1]))  # nor does it put such a character together
print_ranges("unicode_normal_unknown", "The package's normalisers know no decomposition and no combining class of these.", unknown)
print("\n/* Lower case of the package where it differs: one character each, but for U+0130, which is treated by hand. */")
print("static const uint32_t unicode_lower[][2] = {")
pairs = []
for c in CODE_POINTS:
    lower = N.Lowercase().normalize_str(chr(c))
    if c != 0x130 and lower != chr(utf8proc.utf8proc_tolower(c)):
        assert len(lower) == 1
        pairs.append("{0x%x, 0x%x}, " % (c, ord(lower)))
print(wrapped(pairs, "    ") + "\n};\n\n#endif")
