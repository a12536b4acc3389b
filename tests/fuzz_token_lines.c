/* Any bytes as token lines: they are either refused with a sentence or every id is inside the vocabulary. */
#include "worker/token_lines.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    token_lines t = {0};
    if (token_lines_parse("fuzz", (const char *)data, size, 4096, &t) != STATUS_OK) {
        if (t.lines || strncmp(status_message(), "fuzz: ", 6) != 0)
            abort();
        return 0;
    }
    for (int i = 0; i < t.n_lines; i++) {
        const token_line *line = &t.lines[i];
        if (line->n_ids < 1 || line->domain < -1 || line->domain >= t.n_domains)
            abort();
        for (int j = 0; j < line->n_ids; j++)
            if (line->ids[j] < 0 || line->ids[j] >= 4096)
                abort();
    }
    token_lines_clear(&t);
    return 0;
}
