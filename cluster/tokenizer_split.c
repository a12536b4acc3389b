/* tokenizer_split.c - patterns: a string, or a regular expression by PCRE2 with its just-in-time compiler. */
#include "cluster/tokenizer_parts.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

/* A run of a megabyte may need a deep stack in some expressions; beyond it the interpreter takes over. */
enum { STACK_START = 32 << 10, STACK_MAX = 8 << 20, HEAP_MAX_KIB = 64 << 10 };

struct tokenizer_pattern {
    pcre2_code *code; /* NULL: a string */
    bool compiled;    /* by the just-in-time compiler */
    char *string;
    size_t size;
};

struct tokenizer_matcher {
    pcre2_match_data *data;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

static status no_memory(const char *where)
{
    return status_fail(STATUS_NO_MEMORY, "%s: no memory for a pattern", where);
}

status pattern_create_string(const char *where, text_span string, tokenizer_pattern **out)
{
    if (string.size == 0)
        return status_fail(STATUS_UNSUPPORTED, "%s: an empty pattern is not supported", where);
    tokenizer_pattern *p = calloc(1, sizeof *p);
    if (!p)
        return no_memory(where);
    p->string = malloc(string.size);
    if (!p->string) {
        free(p);
        return no_memory(where);
    }
    memcpy(p->string, string.text, string.size);
    p->size = string.size;
    *out = p;
    return STATUS_OK;
}

static status compile(const char *where, const bytes_writer *regex, tokenizer_pattern *p)
{
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (!context)
        return no_memory(where);
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    int error = 0;
    PCRE2_SIZE at = 0;
    /* ^ and $ stand at every line in Ruby's syntax. */
    p->code = pcre2_compile(regex->size ? regex->data : (PCRE2_SPTR) "", regex->size, PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE,
                            &error, &at, context);
    pcre2_compile_context_free(context);
    if (!p->code) {
        unsigned char text[160] = "";
        pcre2_get_error_message(error, text, sizeof text);
        return status_fail(STATUS_UNSUPPORTED, "%s: a regular expression cannot be used (%s)", where, (const char *)text);
    }
    p->compiled = pcre2_jit_compile(p->code, PCRE2_JIT_COMPLETE) == 0;
    return STATUS_OK;
}

status pattern_create_regex(const char *where, text_span regex, tokenizer_pattern **out)
{
    tokenizer_pattern *p = calloc(1, sizeof *p);
    if (!p)
        return no_memory(where);
    bytes_writer translated = {0};
    status st;
    TRY_GOTO(regex_translate(where, regex, &translated), out);
    TRY_GOTO(compile(where, &translated, p), out);
    *out = p;
    p = NULL;
out:
    bytes_clear(&translated);
    pattern_destroy(p);
    return st;
}

void pattern_destroy(tokenizer_pattern *p)
{
    if (!p)
        return;
    pcre2_code_free(p->code);
    free(p->string);
    free(p);
}

text_span pattern_string(const tokenizer_pattern *p)
{
    return (text_span){p->string, p->size};
}

status matcher_create(tokenizer_matcher **out)
{
    tokenizer_matcher *m = calloc(1, sizeof *m);
    if (m) {
        m->data = pcre2_match_data_create(1, NULL);
        m->context = pcre2_match_context_create(NULL);
        m->stack = pcre2_jit_stack_create(STACK_START, STACK_MAX, NULL);
    }
    if (!m || !m->data || !m->context) { /* without a stack of our own PCRE2 uses a small one */
        matcher_destroy(m);
        return status_fail(STATUS_NO_MEMORY, "no memory to match patterns");
    }
    pcre2_set_heap_limit(m->context, HEAP_MAX_KIB);
    if (m->stack)
        pcre2_jit_stack_assign(m->context, NULL, m->stack);
    *out = m;
    return STATUS_OK;
}

void matcher_destroy(tokenizer_matcher *m)
{
    if (!m)
        return;
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->context);
    pcre2_jit_stack_free(m->stack);
    free(m);
}

/* The text is valid UTF-8 and is not checked again. */
static int search(const tokenizer_pattern *p, tokenizer_matcher *m, const pattern_pass *pass)
{
    PCRE2_SPTR text = (PCRE2_SPTR)pass->text;
    int n = PCRE2_ERROR_JIT_STACKLIMIT;
    if (p->compiled)
        n = pcre2_jit_match(p->code, text, pass->size, pass->at, 0, m->data, m->context);
    if (n == PCRE2_ERROR_JIT_STACKLIMIT)
        n = pcre2_match(p->code, text, pass->size, pass->at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, m->data, m->context);
    return n;
}

static status next_regex(const tokenizer_pattern *p, tokenizer_matcher *m, pattern_pass *pass, bool *found, size_t *start,
                         size_t *end)
{
    while (pass->at <= pass->size) {
        int n = search(p, m, pass);
        if (n == PCRE2_ERROR_NOMATCH)
            break;
        if (n < 0) {
            unsigned char text[160] = "";
            pcre2_get_error_message(n, text, sizeof text);
            return status_fail(STATUS_BAD_INPUT, "a regular expression of the tokenizer gives up on this text (%s)",
                               (const char *)text);
        }
        const PCRE2_SIZE *place = pcre2_get_ovector_pointer(m->data);
        *start = place[0];
        *end = place[1];
        /* An empty match right behind the last match is none. */
        if (*start == *end && pass->last_end == *end + 1) {
            pass->at += pass->at < pass->size ? utf8_length((unsigned char)pass->text[pass->at]) : 1;
            continue;
        }
        pass->at = *end;
        pass->last_end = *end + 1;
        *found = true;
        return STATUS_OK;
    }
    pass->at = pass->size + 1;
    *found = false;
    return STATUS_OK;
}

status pattern_next(const tokenizer_pattern *p, tokenizer_matcher *m, pattern_pass *pass, bool *found, size_t *start, size_t *end)
{
    if (p->code)
        return next_regex(p, m, pass, found, start, end);
    const char *from = pass->text + pass->at;
    const char *hit = pass->at < pass->size ? memmem(from, pass->size - pass->at, p->string, p->size) : NULL;
    *found = hit != NULL;
    if (hit) {
        *start = (size_t)(hit - pass->text);
        *end = pass->at = *start + p->size;
    }
    return STATUS_OK;
}
