/* test_model.c - one rank against transformers: four families, every instruction set this machine has, and nothing about the
 * batch, the chunks, the threads, the weights' place or the combine mode changes a bit that must not change. */
#include "tests/support.h"
#include "tests/support_model.h"

#include <stdio.h>
#include <stdlib.h>

/* The last eight are small models with unusual settings (tests/data/variants/README.md): sliding windows, rope scalings, tied
 * embeddings, dense layers between, biases, fp16 and fp32, sizes that divide by nothing. */
static const char *const families[] = {"mixtral",
                                       "olmoe",
                                       "qwen2_moe",
                                       "qwen3_moe",
                                       "variants/mixtral-window",
                                       "variants/mixtral-llama3-fp16",
                                       "variants/olmoe-clip-linear-fp32",
                                       "variants/qwen2-window-tied",
                                       "variants/qwen2-nobias-dynamic",
                                       "variants/qwen3-sparse-bias",
                                       "variants/qwen3-yarn-tied",
                                       "variants/qwen3-one-head"};
enum { N_FAMILIES = sizeof families / sizeof *families };

static runtime_options plain(void)
{
    return (runtime_options){.threads = 1, .combine = COMBINE_EXACT, .limits = {.max_sequences = 4, .chunk = 64}};
}

static void agrees_with_transformers(void **state)
{
    (void)state;
    for (int isa = 0; isa < N_ISAS; isa++) {
        if (!kernels_of((kernel_isa)isa))
            continue;
        setenv("CONVOKE_ISA", kernel_isa_name((kernel_isa)isa), 1);
        for (int f = 0; f < N_FAMILIES; f++)
            for (int mode = COMBINE_EXACT; mode <= COMBINE_FAST; mode++) {
                runtime_options o = plain();
                o.combine = (combine_mode)mode;
                model_answer a;
                support_run_reference(support_data(families[f]), &o, 7, &a);
                double worst = support_compare_reference(support_data(families[f]), &a);
                print_message("%-32s %-10s %s: logits within %.2g of transformers\n", families[f],
                              kernel_isa_name((kernel_isa)isa),
                              mode == COMBINE_EXACT   ? "exact"
                              : mode == COMBINE_FIXED ? "fixed"
                                                      : "fast ",
                              worst);
                assert_true(worst < 2e-4);
                support_answer_clear(&a);
            }
    }
    unsetenv("CONVOKE_ISA");
}

/* The runs that must agree bit for bit with the plain one of the same combine mode. */
static void run_variants(const char *dir, combine_mode mode, const model_answer *want)
{
    const struct {
        int threads, chunk, max_sequences;
        weights_mode weights;
        unsigned which;
    } variants[] = {{2, 64, 4, WEIGHTS_MAP, 7},  {3, 5, 4, WEIGHTS_MAP, 7},   {1, 1, 1, WEIGHTS_MAP, 7},
                    {2, 33, 2, WEIGHTS_COPY, 6}, {1, 64, 1, WEIGHTS_COPY, 4}, {4, 7, 3, WEIGHTS_MAP, 5}};
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
        runtime_options o = plain();
        o.combine = mode;
        o.threads = variants[v].threads;
        o.limits.chunk = variants[v].chunk;
        o.limits.max_sequences = variants[v].max_sequences;
        o.weights = variants[v].weights;
        model_answer a;
        support_run_reference(dir, &o, variants[v].which, &a);
        support_assert_same(&a, want);
        support_answer_clear(&a);
    }
}

static void bits_do_not_depend_on_the_batch(void **state)
{
    (void)state;
    for (int f = 0; f < N_FAMILIES; f++)
        for (int mode = COMBINE_EXACT; mode <= COMBINE_FIXED; mode++) {
            runtime_options o = plain();
            o.combine = (combine_mode)mode;
            model_answer want;
            support_run_reference(support_data(families[f]), &o, 7, &want);
            run_variants(support_data(families[f]), (combine_mode)mode, &want);
            support_answer_clear(&want);
        }
}

static void bits_do_not_depend_on_the_instruction_set(void **state)
{
    (void)state;
    for (int f = 0; f < N_FAMILIES; f++) {
        runtime_options o = plain();
        o.combine = COMBINE_FIXED;
        model_answer want, got;
        setenv("CONVOKE_ISA", "scalar", 1);
        support_run_reference(support_data(families[f]), &o, 7, &want);
        for (int isa = ISA_AVX2; isa <= ISA_AVX512; isa++) {
            if (!kernels_of((kernel_isa)isa))
                continue;
            setenv("CONVOKE_ISA", kernel_isa_name((kernel_isa)isa), 1);
            support_run_reference(support_data(families[f]), &o, 7, &got);
            support_assert_same(&got, &want);
            support_answer_clear(&got);
        }
        support_answer_clear(&want);
    }
    unsetenv("CONVOKE_ISA");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"logits, experts and greedy tokens are transformers' on every instruction set", agrees_with_transformers, NULL, NULL,
         NULL},
        {"batch, chunk, threads and place of weights never change a bit", bits_do_not_depend_on_the_batch, NULL, NULL, NULL},
        {"instruction sets agree bit for bit", bits_do_not_depend_on_the_instruction_set, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests_name("one rank", tests, NULL, NULL);
}
