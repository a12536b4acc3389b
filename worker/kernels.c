/* kernels.c - which instruction set runs, and the small helpers that need no table. */
#include "worker/kernels.h"
#include "worker/kernels_tables.h"

#include <stdlib.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

_Thread_local float kernels_packed[PACK_FLOATS] __attribute__((aligned(64)));

static const char *const isa_names[N_ISAS] = {"scalar", "avx2", "avx512", "avx512bf16"};

#if defined(__x86_64__)
static int cpu_has_f16c(void)
{
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* __builtin_cpu_supports also asks the operating system whether it saves the wide registers. */
static int cpu_has(kernel_isa isa)
{
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (isa) {
    case ISA_SCALAR:
        return 1;
    case ISA_AVX2:
        return avx2;
    case ISA_AVX512:
        return avx512;
    default:
        return avx512 && __builtin_cpu_supports("avx512bf16");
    }
}
#endif

const kernel_table *kernels_of(kernel_isa isa)
{
#if defined(__x86_64__)
    static const kernel_table *const tables[N_ISAS] = {&kernels_scalar, &kernels_avx2, &kernels_avx512, &kernels_avx512bf16};
    if ((unsigned)isa >= N_ISAS || !cpu_has(isa))
        return NULL;
    return tables[isa];
#else
    return isa == ISA_SCALAR ? &kernels_scalar : NULL;
#endif
}

const char *kernel_isa_name(kernel_isa isa)
{
    return (unsigned)isa < N_ISAS ? isa_names[isa] : "unknown";
}

/* AVX-512-BF16 only when it is asked for: its bits differ from the others', so a job that moves between machine types would
 * change its tokens, and on Sapphire Rapids it runs at half of AVX-512's speed (worker/README.md). */
static kernel_isa best_isa(void)
{
    kernel_isa best = ISA_SCALAR;
    for (int isa = 0; isa < ISA_AVX512BF16; isa++)
        if (kernels_of((kernel_isa)isa))
            best = (kernel_isa)isa;
    return best;
}

status kernels_pick(kernel_isa *out)
{
    const char *asked = getenv("CONVOKE_ISA");
    if (!asked || !*asked) {
        *out = best_isa();
        return STATUS_OK;
    }
    for (int isa = 0; isa < N_ISAS; isa++) {
        if (strcmp(asked, isa_names[isa]))
            continue;
        if (!kernels_of((kernel_isa)isa))
            return status_fail(STATUS_UNSUPPORTED, "CONVOKE_ISA: this CPU has no %s; the best it has is %s", asked,
                               isa_names[best_isa()]);
        *out = (kernel_isa)isa;
        return STATUS_OK;
    }
    return status_fail(STATUS_USAGE,
                       "CONVOKE_ISA: unknown instruction set '%s' (this CPU: %s; known: scalar, avx2, avx512, avx512bf16)", asked,
                       isa_names[best_isa()]);
}

status kernel_isa_find(const char *name, kernel_isa *out)
{
    for (int isa = 0; isa < N_ISAS; isa++)
        if (strcmp(name, isa_names[isa]) == 0) {
            *out = (kernel_isa)isa;
            return STATUS_OK;
        }
    return status_fail(STATUS_USAGE, "unknown instruction set '%s' (known: scalar, avx2, avx512, avx512bf16)", name);
}

size_t weight_format_size(weight_format format)
{
    return format == FORMAT_F32 ? 4 : 2;
}

void weights_to_f32(weight_format format, const void *row, size_t n, float *out)
{
    if (format == FORMAT_F32) {
        if (n)
            memcpy(out, row, n * sizeof *out);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, (const char *)row + 2 * i, 2);
        out[i] = format == FORMAT_BF16 ? bf16_to_f32(half) : f16_to_f32(half);
    }
}
