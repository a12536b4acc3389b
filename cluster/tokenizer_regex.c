/* tokenizer_regex.c - a regular expression as tokenizer.json has it, rewritten for PCRE2.
 *
 * The tokenizers package uses Oniguruma with Ruby's syntax. Most of it reads the same in PCRE2 and much of that means something
 * slightly different: \s and \w hold other characters, \h and \v are other classes, {n,m}+ is no possessive quantifier, (?m) lets
 * the dot match line breaks, \p{Han} is a script there and a script extension here, and the properties come from another
 * version of Unicode. So classes are written out, what differs is rewritten, and what cannot be said the same way is refused.
 * What is left: U+1171E, which Unicode 16 took out of Mn, and in \P{..} inside brackets characters newer than PCRE2. */
#include "cluster/tokenizer_parts.h"
#include "cluster/tokenizer_unicode.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GROUPS_MAX = 100, PATTERN_MAX = 65536 };

typedef struct {
    const char *where;
    const char *at, *end;
    bytes_writer *out;
    size_t atom; /* where the last thing that a quantifier can stand behind begins in `out` */
    bool quantifiable;
    size_t groups[GROUPS_MAX]; /* where open groups begin */
    int n_groups;
    bool group_began; /* nothing stands in the innermost group yet */
} translation;

static status refuse(const translation *t, const char *what)
{
    return status_fail(STATUS_UNSUPPORTED, "%s: a regular expression with %s is not supported", t->where, what);
}

static void put(translation *t, const char *text)
{
    bytes_put(t->out, text, strlen(text));
}

/* ---- classes: what stands between brackets ---- */

static const char *additions(const char *property)
{
    for (size_t i = 0; i < sizeof unicode_class_additions / sizeof unicode_class_additions[0]; i++)
        if (strcmp(unicode_class_additions[i].property, property) == 0)
            return unicode_class_additions[i].more;
    return "";
}

static void put_property(translation *t, const char *property)
{
    /* ASCII first: PCRE2 looks it up in a bitmap and need not ask for the property. */
    if (strcmp(property, "L") == 0)
        put(t, "A-Za-z");
    else if (strcmp(property, "N") == 0 || strcmp(property, "Nd") == 0)
        put(t, "0-9");
    put(t, "\\p{");
    put(t, property);
    put(t, "}");
    put(t, additions(property));
}

static void put_space(translation *t)
{
    put(t, "\\x{9}-\\x{d} \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}");
}

static void put_word(translation *t)
{
    static const char *const properties[] = {"L", "M", "Nd", "Nl", "Pc"};
    for (size_t i = 0; i < sizeof properties / sizeof properties[0]; i++)
        put_property(t, properties[i]);
    put(t, unicode_word_additions);
}

/* The inside of a class for \d, \s, \w, \h; false: no such class. */
static bool put_class(translation *t, char letter)
{
    switch (letter) {
    case 'd':
        put_property(t, "Nd");
        return true;
    case 's':
        put_space(t);
        return true;
    case 'w':
        put_word(t);
        return true;
    case 'h':
        put(t, "0-9A-Fa-f");
        return true;
    }
    return false;
}

/* Scripts by their own property where PCRE2 would otherwise take the script extensions. */
static bool is_script(const char *name)
{
    static const char *const scripts[] = {
        "Han",  "Hiragana", "Katakana", "Hangul", "Bopomofo", "Latin", "Greek",   "Cyrillic", "Arabic", "Hebrew",   "Devanagari",
        "Thai", "Bengali",  "Tamil",    "Telugu", "Kannada",  "Lao",   "Tibetan", "Myanmar",  "Khmer",  "Georgian", "Armenian"};
    for (size_t i = 0; i < sizeof scripts / sizeof scripts[0]; i++)
        if (strcmp(scripts[i], name) == 0)
            return true;
    return false;
}

/* The characters of the scripts in use for cutting that came after Unicode 14. */
static const char *script_additions(const char *name)
{
    return strcmp(name, "Han") == 0        ? "\\x{2b739}\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"
           : strcmp(name, "Hiragana") == 0 ? "\\x{1b132}"
           : strcmp(name, "Katakana") == 0 ? "\\x{1b155}"
                                           : "";
}

/* Behind \p or \P: "{Name}" or "{^Name}". */
static status read_property(translation *t, char name[32], bool *negated)
{
    if (t->at == t->end || *t->at != '{')
        return refuse(t, "\\p without braces");
    const char *close = memchr(t->at, '}', (size_t)(t->end - t->at));
    const char *from = t->at + 1;
    if (close && from < close && *from == '^') {
        *negated = !*negated;
        from++;
    }
    if (!close || close == from || close - from >= 32)
        return refuse(t, "a property it does not name");
    size_t n = (size_t)(close - from);
    for (size_t i = 0; i < n; i++)
        if (!isalnum((unsigned char)from[i]) && from[i] != '_' && from[i] != '&')
            return refuse(t, "a property of a strange name");
    memcpy(name, from, n);
    name[n] = '\0';
    t->at = close + 1;
    return STATUS_OK;
}

static status property(translation *t, bool negated, bool in_class)
{
    char name[32];
    TRY(read_property(t, name, &negated));
    bool script = is_script(name);
    if (negated && in_class) { /* a union cannot be taken out of a union: the newest characters stay */
        put(t, script ? "\\P{sc:" : "\\P{");
        put(t, name);
        put(t, "}");
        return STATUS_OK;
    }
    if (!in_class)
        put(t, negated ? "[^" : "[");
    if (script) {
        put(t, "\\p{sc:");
        put(t, name);
        put(t, "}");
        put(t, script_additions(name));
    } else {
        put_property(t, name);
    }
    if (!in_class)
        put(t, "]");
    return STATUS_OK;
}

/* ---- escapes ---- */

static status put_code_point(translation *t, unsigned long c)
{
    char text[32];
    if (c > 0x10FFFF || (c >= 0xD800 && c < 0xE000))
        return refuse(t, "a code point that is no character");
    snprintf(text, sizeof text, "\\x{%lx}", c);
    put(t, text);
    return STATUS_OK;
}

/* Up to `max` hexadecimal digits. */
static int read_hex(translation *t, int max, unsigned long *out)
{
    int n = 0;
    *out = 0;
    for (; n < max && t->at < t->end && isxdigit((unsigned char)*t->at); n++, t->at++)
        *out = *out * 16 + (unsigned long)(isdigit((unsigned char)*t->at) ? *t->at - '0' : (*t->at | 0x20) - 'a' + 10);
    return n;
}

static status hexadecimal(translation *t, char letter)
{
    unsigned long c;
    if (letter == 'u') {
        if (read_hex(t, 4, &c) != 4)
            return refuse(t, "\\u and fewer than four digits");
    } else if (t->at < t->end && *t->at == '{') {
        t->at++;
        if (read_hex(t, 8, &c) == 0 || t->at == t->end || *t->at != '}')
            return refuse(t, "\\x{..} it cannot read");
        t->at++;
    } else if (read_hex(t, 2, &c) == 0 || c >= 0x80) {
        return refuse(t, "\\x of a single byte");
    }
    return put_code_point(t, c);
}

/* Where words begin and end, by our \w. */
static void word_boundary(translation *t, bool negated)
{
    put(t, "(?:(?<=[");
    put_word(t);
    put(t, negated ? "])(?=[" : "])(?![");
    put_word(t);
    put(t, "])|(?<![");
    put_word(t);
    put(t, negated ? "])(?![" : "])(?=[");
    put_word(t);
    put(t, "]))");
}

/* Escapes that mean a class: true when it was one. */
static status class_escape(translation *t, char letter, bool in_class, bool *done)
{
    *done = true;
    if (strchr("dswh", letter)) {
        if (!in_class)
            put(t, "[");
        put_class(t, letter);
        if (!in_class)
            put(t, "]");
    } else if (strchr("DSWH", letter)) {
        if (in_class && letter == 'S') {
            put(t, "\\S\\x{180e}"); /* PCRE2 alone takes this one for white space */
        } else if (in_class) {
            char what[] = "\\D inside a class";
            what[1] = letter;
            return refuse(t, what);
        } else {
            put(t, "[^");
            put_class(t, (char)(letter | 0x20));
            put(t, "]");
        }
    } else if (letter == 'p' || letter == 'P') {
        return property(t, letter == 'P', in_class);
    } else {
        *done = false;
    }
    return STATUS_OK;
}

static status escape(translation *t, bool in_class)
{
    if (t->at == t->end)
        return refuse(t, "a \\ at its end");
    char letter = *t->at++;
    bool done = false;
    if (letter && isalpha((unsigned char)letter))
        TRY(class_escape(t, letter, in_class, &done));
    if (done)
        return STATUS_OK;
    if (letter == 'x' || letter == 'u')
        return hexadecimal(t, letter);
    if (letter == 'v') {
        put(t, "\\x{b}");
    } else if (letter && (strchr("ntrfae", letter) || (!in_class && strchr("RXAzZ", letter)))) {
        bytes_put(t->out, (char[]){'\\', letter}, 2);
    } else if ((letter == 'b' || letter == 'B') && !in_class) {
        word_boundary(t, letter == 'B');
    } else if (letter == 'b') {
        put(t, "\\x{8}");
    } else if (isalnum((unsigned char)letter)) {
        if (letter >= '1' && letter <= '9' && !in_class && (t->at == t->end || !isdigit((unsigned char)*t->at))) {
            bytes_put(t->out, (char[]){'\\', letter}, 2);
            return STATUS_OK;
        }
        char what[] = "\\?";
        what[1] = letter;
        return refuse(t, what);
    } else {
        put(t, "\\");
        bytes_put(t->out, &letter, 1); /* the rest of a longer character follows as it is */
    }
    return STATUS_OK;
}

static status bracket(translation *t)
{
    put(t, "[");
    if (t->at < t->end && *t->at == '^') {
        put(t, "^");
        t->at++;
    }
    for (bool first = true; t->at < t->end; first = false) {
        char c = *t->at++;
        if (c == ']' && !first) {
            put(t, "]");
            return STATUS_OK;
        }
        if (c == '[')
            return refuse(t, "[ inside a class (escape it)");
        if (c == '&' && t->at < t->end && *t->at == '&')
            return refuse(t, "&& inside a class");
        if (c == '\\')
            TRY(escape(t, true));
        else if (c == ']')
            put(t, "\\]");
        else
            bytes_put(t->out, &c, 1);
    }
    return refuse(t, "a [ that is never closed");
}

/* ---- groups ---- */

/* Behind "(?": flags such as i, i-m, up to ':' or ')'. In Ruby m means what s means elsewhere. */
static status flags(translation *t)
{
    bool at_start = t->group_began;
    put(t, "(?");
    for (; t->at < t->end; t->at++) {
        char c = *t->at;
        if (c == ':' || c == ')') {
            t->at++;
            bytes_put(t->out, &c, 1);
            if (c == ':') {
                t->group_began = true;
                return STATUS_OK;
            }
            t->n_groups--;
            t->quantifiable = false;
            t->group_began = at_start;
            /* Ruby lets the flags reach over the alternatives that follow, as if in a group of their own. */
            return at_start ? STATUS_OK : refuse(t, "flags in its middle");
        }
        if (c == 'm')
            c = 's';
        else if (c != 'i' && c != '-')
            return refuse(t, "flags other than i and m");
        bytes_put(t->out, &c, 1);
    }
    return refuse(t, "a group that is never closed");
}

static bool starts(const translation *t, const char *text)
{
    size_t n = strlen(text);
    return (size_t)(t->end - t->at) >= n && memcmp(t->at, text, n) == 0;
}

static status open_group(translation *t)
{
    static const char *const plain[] = {"?:", "?=", "?!", "?>", "?<=", "?<!"};
    if (t->n_groups == GROUPS_MAX)
        return refuse(t, "groups nested that deep");
    t->groups[t->n_groups++] = t->out->size;
    t->quantifiable = false;
    if (starts(t, "*"))
        return refuse(t, "(*");
    if (!starts(t, "?")) {
        put(t, "(");
        t->group_began = true;
        return STATUS_OK;
    }
    for (size_t i = 0; i < sizeof plain / sizeof plain[0]; i++)
        if (starts(t, plain[i])) {
            put(t, "(");
            put(t, plain[i]);
            t->at += strlen(plain[i]);
            t->group_began = true;
            return STATUS_OK;
        }
    t->at++;
    if (t->at < t->end && (isalpha((unsigned char)*t->at) || *t->at == '-'))
        return flags(t);
    return refuse(t, "a group of a kind it does not know");
}

static status close_group(translation *t)
{
    if (t->n_groups == 0)
        return refuse(t, "a ) too many");
    t->atom = t->groups[--t->n_groups];
    t->quantifiable = true;
    t->group_began = false;
    put(t, ")");
    return STATUS_OK;
}

/* ---- quantifiers ---- */

/* "{n}", "{n,}", "{,m}", "{n,m}" at t->at, which stands behind the brace: its length with the closing brace; 0: none. */
static size_t interval_length(const translation *t)
{
    const char *p = t->at;
    int digits = 0, commas = 0;
    for (; p < t->end && *p != '}'; p++) {
        if (isdigit((unsigned char)*p))
            digits++;
        else if (*p == ',' && commas == 0)
            commas++;
        else
            return 0;
    }
    return p < t->end && digits > 0 ? (size_t)(p - t->at) + 1 : 0;
}

/* Makes the last atom with its quantifier an atom of its own. */
static void enclose(translation *t)
{
    char *room = bytes_extend(t->out, 3);
    if (!room)
        return;
    unsigned char *atom = t->out->data + t->atom;
    memmove(atom + 3, atom, t->out->size - 3 - t->atom);
    memcpy(atom, "(?:", 3);
    put(t, ")");
}

/* Behind an interval, + repeats it and ? makes it optional where it is an exact {n}; only ranges can be reluctant. */
static status interval(translation *t, size_t length)
{
    const char *text = t->at;
    bool exact = !memchr(text, ',', length);
    t->at += length;
    put(t, *text == ',' ? "{0" : "{");
    bytes_put(t->out, text, length);
    char next = t->at < t->end ? *t->at : 0;
    if (next == '+' || (next == '?' && exact)) {
        enclose(t);
    } else if (next == '?') {
        put(t, "?");
        t->at++;
        t->quantifiable = false;
    } else {
        t->quantifiable = false;
    }
    return STATUS_OK;
}

static status quantifier(translation *t, char c)
{
    if (!t->quantifiable)
        return refuse(t, "a quantifier behind nothing or behind another");
    bytes_put(t->out, &c, 1);
    if (t->at < t->end && (*t->at == '?' || *t->at == '+'))
        bytes_put(t->out, t->at++, 1); /* reluctant, possessive: the same in both */
    t->quantifiable = false;
    return STATUS_OK;
}

/* ---- the whole ---- */

static void literal(translation *t, char c)
{
    bytes_put(t->out, &c, 1);
    while (t->at < t->end && (*t->at & 0xC0) == 0x80) /* a character of several bytes is one atom */
        bytes_put(t->out, t->at++, 1);
}

static status translate_one(translation *t)
{
    char c = *t->at++;
    size_t length;
    if (c == '(')
        return open_group(t);
    if (c == ')')
        return close_group(t);
    if (c == '*' || c == '+' || c == '?')
        return quantifier(t, c);
    if (c == '{' && (length = interval_length(t)) > 0)
        return t->quantifiable ? interval(t, length) : refuse(t, "a quantifier behind nothing or behind another");
    t->atom = t->out->size;
    t->quantifiable = c != '|' && c != '^' && c != '$';
    t->group_began = false;
    if (c == '\\')
        return escape(t, false);
    if (c == '[')
        return bracket(t);
    if (c == '{')
        put(t, "\\{");
    else
        literal(t, c);
    return STATUS_OK;
}

status regex_translate(const char *where, text_span from, bytes_writer *out)
{
    translation t = {.where = where, .at = from.text, .end = from.text + from.size, .out = out, .group_began = true};
    if (from.size > PATTERN_MAX)
        return refuse(&t, "more than 65536 bytes");
    while (t.at < t.end)
        TRY(translate_one(&t));
    if (t.n_groups > 0)
        return refuse(&t, "a group that is never closed");
    return out->failed ? status_fail(STATUS_NO_MEMORY, "%s: no memory for a regular expression", where) : STATUS_OK;
}
