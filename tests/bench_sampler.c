/* How long one token takes to choose. Usage: bench_sampler [VOCAB] */
#include "proto/clock.h"
#include "tests/support.h"
#include "tests/support_bench.h"
#include "worker/sampler.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static void measure(sampler *s, const float *x, const char *name, const sampling_params *p)
{
    enum { ROUNDS = 101 };
    double us[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        int token;
        double start = clock_seconds();
        if (sampler_choose(s, p, NULL, x, (uint32_t)i, 0, &token) != STATUS_OK)
            exit(1);
        us[i] = (clock_seconds() - start) * 1e6;
    }
    printf("%-28s %8.1f us (median of %d)\n", name, bench_median(us, ROUNDS), ROUNDS);
}

int main(int argc, char **argv)
{
    int vocab = argc > 1 ? atoi(argv[1]) : 151936;
    float *x = malloc((size_t)vocab * sizeof *x);
    uint64_t seed = 1;
    sampler *s = NULL;
    if (vocab < 1 || !x || sampler_create(vocab, &s) != STATUS_OK)
        return 1;
    for (int i = 0; i < vocab; i++)
        x[i] = 2.5f * support_gauss(&seed);
    for (int i = 0; i < 30; i++) /* a head, as real models have one */
        x[support_below(&seed, vocab)] = 14 + 2 * support_gauss(&seed);
    token_bias bias = {5, 1};
    printf("vocabulary %d\n", vocab);
    measure(s, x, "greedy", &(sampling_params){0});
    measure(s, x, "greedy, one bias", &(sampling_params){.biases = &bias, .n_biases = 1});
    measure(s, x, "temperature 1", &(sampling_params){.temperature = 1});
    measure(s, x, "top-k 50", &(sampling_params){.temperature = 1, .top_k = 50});
    measure(s, x, "top-k 1000", &(sampling_params){.temperature = 1, .top_k = 1000});
    measure(s, x, "top-k 50, top-p 0.9", &(sampling_params){.temperature = 1, .top_k = 50, .top_p = 0.9f});
    measure(s, x, "top-p 0.9", &(sampling_params){.temperature = 1, .top_p = 0.9f});
    measure(s, x, "top-p 0.9, temperature 2", &(sampling_params){.top_p = 0.9f, .temperature = 2});
    measure(s, x, "min-p 0.05", &(sampling_params){.temperature = 1, .min_p = 0.05f});
    token_logprob top[20];
    double start = clock_seconds();
    for (int i = 0; i < 100; i++) {
        float sum = sampler_log_sum_exp(x, vocab);
        sampler_top_logprobs(s, x, sum, 20, top);
        top[0] = sampler_logprob(x, vocab, sum, top[3].token);
    }
    printf("%-28s %8.1f us\n", "20 logprobs and the chosen", (clock_seconds() - start) * 1e4);
    sampler_destroy(s);
    free(x);
    return 0;
}
