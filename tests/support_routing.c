#include "tests/support_routing.h"

#include "tests/support.h"

#include <stdbool.h>

routing_shape support_routing_shape(int n_layers, int n_experts, int top_k, int n_domains)
{
    static const int layers[] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    static const char *const domains[] = {"math", "code", "prose \"of\" \xc3\xa9", "law"};
    return (routing_shape){.model = "demo",
                           .n_experts = n_experts,
                           .top_k = top_k,
                           .n_layers = n_layers,
                           .n_domains = n_domains,
                           .layer_numbers = layers,
                           .domains = domains};
}

void support_routing_row(uint64_t *seed, const routing_shape *shape, int drop_percent, uint16_t *experts, float *weights)
{
    for (int l = 0; l < shape->n_layers; l++)
        for (int j = 0; j < shape->top_k; j++) {
            uint16_t *layer = experts + l * shape->top_k;
            bool taken = true, drop = j > 0 && (layer[j - 1] == ROUTING_NO_EXPERT || support_below(seed, 100) < drop_percent);
            while (taken) {
                layer[j] = (uint16_t)support_below(seed, shape->n_experts);
                taken = false;
                for (int i = 0; i < j; i++)
                    taken |= layer[i] == layer[j];
            }
            if (drop)
                layer[j] = ROUTING_NO_EXPERT;
            if (weights)
                weights[l * shape->top_k + j] = drop ? 0 : 1 / (float)(j + 2 + support_below(seed, 1000) / 1000);
        }
}
