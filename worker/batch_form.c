#include "worker/batch_form.h"

int batch_form(const batch_candidate *candidates, int n, int prefill_budget, int *order, int *rows)
{
    int total = 0, n_order = 0;
    for (int i = 0; i < n; i++) {
        rows[i] = candidates[i].is_decoding && candidates[i].n_pending > 0;
        total += rows[i];
        if (candidates[i].is_decoding || candidates[i].n_pending == 0)
            continue;
        int j = n_order++; /* insertion keeps the oldest first; n is a batch, not a queue */
        for (; j > 0 && candidates[order[j - 1]].arrival > candidates[i].arrival; j--)
            order[j] = order[j - 1];
        order[j] = i;
    }
    for (int i = 0; i < n_order && prefill_budget > 0; i++) {
        int pending = candidates[order[i]].n_pending, take = pending < prefill_budget ? pending : prefill_budget;
        rows[order[i]] = take;
        prefill_budget -= take;
        total += take;
    }
    return total;
}
