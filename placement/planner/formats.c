#include "placement/planner/import.h"

#include <string.h>

const file_format *const file_formats[] = {
    &format_flat,         &format_olmoe,       &format_cd_moe, &format_sglang, &format_eplb,
    &format_tensorrt_llm, &format_vllm_ascend, &format_vllm,   &format_exflow, NULL};

const file_format *format_find(const char *name)
{
    for (const file_format *const *f = file_formats; *f; f++)
        if (strcmp((*f)->name, name) == 0)
            return *f;
    return NULL;
}
