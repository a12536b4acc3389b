#include "proto/options.h"
#include "tests/support.h"

#include <stdlib.h>
#include <string.h>

static struct {
    const char *model;
    int64_t batch, bytes;
    double rate;
    bool json;
    int combine;
} o;

static const option_entry entries[] = {
    {"model", OPTION_STRING, &o.model, .argument = "DIR", .environment = "TEST_MODEL", .required = true,
     .help = "checkpoint folder"},
    {"batch", OPTION_INT, &o.batch, .letter = 'b', .fallback = "32", .environment = "TEST_BATCH", .min = 1, .max = 100,
     .help = "sequences at once"},
    {"kv-bytes", OPTION_SIZE, &o.bytes, .fallback = "1G", .help = "memory for keys and values"},
    {"rate", OPTION_DOUBLE, &o.rate, .fallback = "0.5", .min = 0, .max = 1, .help = "a rate"},
    {"json", OPTION_FLAG, &o.json, .environment = "TEST_JSON", .fallback = "0", .help = "one object"},
    {"combine", OPTION_CHOICE, &o.combine, .choices = "exact|fixed|fast", .fallback = "fixed", .help = "how results are added"},
};
static const option_table table = {.name = "prog",
                                   .summary = "does things",
                                   .version = "1.2",
                                   .entries = entries,
                                   .n_entries = sizeof entries / sizeof entries[0],
                                   .operand_name = "FILE",
                                   .max_operands = 2};

static const char *operands[2];
static int n_operands;
static options_wish wish;

/* Splits at blanks, like a plain command line. */
static status parse(const char *line)
{
    static char buffer[256];
    char *argv[32] = {(char[]){"prog"}}, *save;
    int argc = 1;
    snprintf(buffer, sizeof buffer, "%s", line);
    for (char *word = strtok_r(buffer, " ", &save); word; word = strtok_r(NULL, " ", &save))
        argv[argc++] = word;
    return options_parse(&table, argc, argv, &wish, operands, &n_operands);
}

static int clean(void **state)
{
    (void)state;
    memset(&o, 0, sizeof o);
    unsetenv("TEST_MODEL");
    unsetenv("TEST_BATCH");
    unsetenv("TEST_JSON");
    return 0;
}

static void defaults_apply(void **state)
{
    (void)state;
    assert_int_equal(parse("--model m"), STATUS_OK);
    assert_int_equal(wish, OPTIONS_RUN);
    assert_string_equal(o.model, "m");
    assert_int_equal(o.batch, 32);
    assert_int_equal(o.bytes, (int64_t)1 << 30);
    assert_true(o.rate == 0.5);
    assert_false(o.json);
    assert_int_equal(o.combine, 1);
    assert_int_equal(n_operands, 0);
}

static void order_of_sources(void **state)
{
    (void)state;
    setenv("TEST_BATCH", "7", 1);
    setenv("TEST_MODEL", "from-env", 1);
    setenv("TEST_JSON", "yes", 1);
    assert_int_equal(parse(""), STATUS_OK);
    assert_int_equal(o.batch, 7);
    assert_string_equal(o.model, "from-env");
    assert_true(o.json);
    assert_int_equal(parse("--batch 9 --no-json --model x"), STATUS_OK);
    assert_int_equal(o.batch, 9);
    assert_false(o.json);
    assert_string_equal(o.model, "x");
    setenv("TEST_BATCH", "many", 1); /* overridden, so it does not matter */
    assert_int_equal(parse("--batch 9"), STATUS_OK);
    setenv("TEST_BATCH", "", 1); /* empty: unset */
    assert_int_equal(parse("--batch=3"), STATUS_OK);
    assert_int_equal(parse(""), STATUS_OK);
    assert_int_equal(o.batch, 32);
}

static void all_spellings(void **state)
{
    (void)state;
    assert_int_equal(parse("--model=m -b5 --kv-bytes=3k --json --combine fast one --rate 1e-1 -- --two"), STATUS_OK);
    assert_int_equal(o.batch, 5);
    assert_int_equal(o.bytes, 3072);
    assert_true(o.json);
    assert_int_equal(o.combine, 2);
    assert_true(o.rate == 0.1);
    assert_int_equal(n_operands, 2);
    assert_string_equal(operands[0], "one");
    assert_string_equal(operands[1], "--two");
    assert_int_equal(parse("--model m -b 6 --kv-bytes 2T --batch 8"), STATUS_OK);
    assert_int_equal(o.batch, 8); /* the last one counts */
    assert_int_equal(o.bytes, (int64_t)2 << 40);
}

static void mistakes_are_named(void **state)
{
    (void)state;
    static const struct {
        const char *line, *sentence;
    } cases[] = {
        {"", "--model is missing (or set TEST_MODEL)"},
        {"--model", "--model: a value is missing"},
        {"--model m --batch 0", "--batch: '0' is not a whole number from 1 to 100"},
        {"--model m --batch 101", "--batch: '101' is not a whole number from 1 to 100"},
        {"--model m -b 5x", "-b: '5x' is not a whole number from 1 to 100"},
        {"--model m --batch 99999999999999999999", "--batch: '99999999999999999999' is not"},
        {"--model m --kv-bytes 5X", "--kv-bytes: '5X' is not a size"},
        {"--model m --kv-bytes -1", "--kv-bytes: '-1' is not a size"},
        {"--model m --kv-bytes 9999999999T", "--kv-bytes: '9999999999T' is not a size"},
        {"--model m --kv-bytes K", "--kv-bytes: 'K' is not a size"},
        {"--model m --rate 2", "--rate: '2' is not a number from 0 to 1"},
        {"--model m --rate nan", "--rate: 'nan' is not a number"},
        {"--model m --combine quick", "--combine: 'quick' is not one of exact|fixed|fast"},
        {"--model m --combine exac", "--combine: 'exac' is not one of"},
        {"--model m --json=maybe", "--json: 'maybe' is not 1 or 0"},
        {"--modle m", "unknown option --modle (did you mean --model? --help lists all)"},
        {"--quite-else", "unknown option --quite-else (--help lists all)"},
        {"--no-batch", "unknown option --no-batch"},
        {"-x", "unknown option -x (--help lists all)"},
        {"--model m a b c", "'c' is one argument too many"},
        {"--model=", "--model: the value is empty"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(parse(cases[i].line), STATUS_USAGE);
        if (strncmp(status_message(), cases[i].sentence, strlen(cases[i].sentence)) != 0)
            fail_msg("'%s' says \"%s\", not \"%s\"", cases[i].line, status_message(), cases[i].sentence);
    }
    setenv("TEST_BATCH", "many", 1);
    assert_int_equal(parse("--model m"), STATUS_USAGE);
    assert_non_null(strstr(status_message(), "TEST_BATCH: 'many' is not a whole number from 1 to 100"));
}

static void help_needs_nothing(void **state)
{
    (void)state;
    assert_int_equal(parse("--help"), STATUS_OK);
    assert_int_equal(wish, OPTIONS_HELP);
    assert_int_equal(parse("--batch 5 -h --nonsense"), STATUS_OK);
    assert_int_equal(wish, OPTIONS_HELP);
    assert_int_equal(parse("--version"), STATUS_OK);
    assert_int_equal(wish, OPTIONS_VERSION);
}

static void help_lists_everything(void **state)
{
    (void)state;
    char text[4096] = "";
    FILE *file = fmemopen(text, sizeof text, "w");
    options_print(&table, OPTIONS_HELP, file);
    fclose(file);
    for (int i = 0; i < table.n_entries; i++) {
        const char *const parts[] = {entries[i].name, entries[i].help, entries[i].fallback, entries[i].environment};
        for (int j = 0; j < 4; j++)
            assert_true(!parts[j] || strstr(text, parts[j]));
    }
    assert_non_null(strstr(text, "prog [OPTIONS] [FILE]\ndoes things\n"));
    char version[64] = "";
    file = fmemopen(version, sizeof version, "w");
    options_print(&table, OPTIONS_VERSION, file);
    fclose(file);
    assert_string_equal(version, "prog 1.2\n");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"what is not said has its default", defaults_apply, clean, NULL, NULL},
        {"the command line beats the environment beats the default", order_of_sources, clean, NULL, NULL},
        {"every spelling is understood", all_spellings, clean, NULL, NULL},
        {"a mistake names the option and what is allowed", mistakes_are_named, clean, NULL, NULL},
        {"help and version ask for nothing else", help_needs_nothing, clean, NULL, NULL},
        {"help shows every option, default and variable", help_lists_everything, clean, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, clean);
}
