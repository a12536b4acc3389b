/* Rotary tables against transformers' own, every kind of scaling, read from config texts in both spellings. */
#include "tests/support.h"

#include "tests/rope_expected.h"
#include "worker/model_config.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void tables_of(const char *text, int n, model_config *c, float **cosines, float **sines)
{
    if (model_config_parse("config.json", text, strlen(text), c) != STATUS_OK)
        fail_msg("%s", status_message());
    /* formulas are checked beyond the model's own length too, where they say nothing new */
    int limit = c->rope.kind == ROPE_DYNAMIC ? c->max_positions : n > c->max_positions ? n : c->max_positions;
    assert_int_equal(rope_tables(&c->rope, c->head_dim, limit, n < limit ? n : limit, cosines, sines), STATUS_OK);
}

static void as_transformers(void **state)
{
    (void)state;
    const int n = rope_positions[7] + 1;
    for (size_t i = 0; i < sizeof rope_cases / sizeof *rope_cases; i++) {
        model_config c;
        float *cosines, *sines;
        tables_of(rope_cases[i].config, n, &c, &cosines, &sines);
        for (int row = 0; row < 8; row++)
            for (int k = 0; k < ROPE_SHOWN; k++) {
                int half = c.head_dim / 2, column = rope_cases[i].columns[k], p = rope_positions[row];
                if (c.rope.kind == ROPE_DYNAMIC && p >= c.max_positions)
                    p = c.max_positions - 1;
                size_t at = (size_t)p * (size_t)half + (size_t)column;
                /* two units in the last place of the frequency, times the position, and the cosine's own rounding */
                double slack = 3e-7 + 2.4e-7 * p * pow(c.rope.theta, -column / (double)half);
                double gap = fmax(fabs(cosines[at] - rope_cases[i].values[row][k]),
                                  fabs(sines[at] - rope_cases[i].values[row][k + ROPE_SHOWN]));
                if (!(gap <= slack))
                    fail_msg("%s: position %d, column %d: off by %g, %g allowed", rope_cases[i].name, p, column, gap, slack);
            }
        free(cosines);
        free(sines);
        model_config_clear(&c);
    }
}

static void on_the_circle(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof rope_cases / sizeof *rope_cases; i++) {
        model_config c;
        float *cosines, *sines;
        tables_of(rope_cases[i].config, 64, &c, &cosines, &sines);
        float scale = cosines[0];
        for (int k = 0; k < 64 * c.head_dim / 2; k++)
            assert_true(fabsf(cosines[k] * cosines[k] + sines[k] * sines[k] - scale * scale) < 1e-5f);
        free(cosines);
        free(sines);
        model_config_clear(&c);
    }
}

static void prefix_does_not_matter(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof rope_cases / sizeof *rope_cases; i++) {
        model_config c;
        float *cosines, *sines, *short_cosines, *short_sines;
        tables_of(rope_cases[i].config, 200, &c, &cosines, &sines);
        model_config_clear(&c);
        tables_of(rope_cases[i].config, 50, &c, &short_cosines, &short_sines);
        assert_memory_equal(cosines, short_cosines, 50 * sizeof(float) * (size_t)c.head_dim / 2);
        assert_memory_equal(sines, short_sines, 50 * sizeof(float) * (size_t)c.head_dim / 2);
        free(cosines), free(sines), free(short_cosines), free(short_sines);
        model_config_clear(&c);
    }
}

static void beyond_the_model(void **state)
{
    (void)state;
    rope_config rope = {.kind = ROPE_DYNAMIC, .theta = 1e4, .factor = 2};
    float *cosines = NULL, *sines = NULL;
    assert_int_equal(rope_tables(&rope, 16, 100, 101, &cosines, &sines), STATUS_UNSUPPORTED);
    assert_null(cosines);
    assert_int_equal(rope_tables(&rope, 16, 100, 100, &cosines, &sines), STATUS_OK);
    free(cosines);
    free(sines);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"every kind of scaling gives transformers' tables", as_transformers, NULL, NULL, NULL},
        {"cosine and sine lie on one circle", on_the_circle, NULL, NULL, NULL},
        {"a position's row does not depend on how many rows there are", prefix_does_not_matter, NULL, NULL, NULL},
        {"positions beyond the model are refused", beyond_the_model, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
