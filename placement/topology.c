#include "placement/topology.h"

#include "placement/plan.h"
#include "proto/file_replace.h"
#include "proto/json.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TOPOLOGY_MAX_BYTES ((size_t)1 << 30)
/* Wider than any machine, and narrow enough that no product or quotient of a few of them leaves the range of a double. */
#define LEAST    1e-9
#define GREATEST 1e12

void topology_clear(topology *t)
{
    free(t->node_of_rank);
    free(t->local_index);
    free(t->row_us);
    free(t->expert_us);
    free(t->expert_bytes);
    free(t->links);
    *t = (topology){0};
}

/* Everything zeroed but the budgets, of which there are none. */
static status allocate(const char *where, int n_ranks, topology *t)
{
    size_t n = (size_t)n_ranks;
    *t = (topology){.n_ranks = n_ranks};
    t->node_of_rank = calloc(n, sizeof *t->node_of_rank);
    t->local_index = calloc(n, sizeof *t->local_index);
    t->row_us = calloc(n, sizeof *t->row_us);
    t->expert_us = calloc(n, sizeof *t->expert_us);
    t->expert_bytes = calloc(n, sizeof *t->expert_bytes);
    if (!t->node_of_rank || !t->local_index || !t->row_us || !t->expert_us || !t->expert_bytes) {
        topology_clear(t);
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a topology of %d ranks", where, n_ranks);
    }
    for (size_t r = 0; r < n; r++)
        t->expert_bytes[r] = -1;
    return STATUS_OK;
}

/* Counts the nodes and numbers each node's ranks; refuses node numbers that leave one out. */
static status number_nodes(const char *where, topology *t)
{
    int *seen = calloc((size_t)t->n_ranks, sizeof *seen);
    if (!seen)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a topology of %d ranks", where, t->n_ranks);
    t->n_nodes = 0;
    for (int r = 0; r < t->n_ranks; r++) {
        int node = t->node_of_rank[r];
        t->local_index[r] = node < t->n_ranks ? seen[node]++ : 0;
        if (node >= t->n_nodes)
            t->n_nodes = node + 1;
    }
    status st = STATUS_OK;
    for (int node = 0; node < t->n_nodes && st == STATUS_OK; node++)
        if (node >= t->n_ranks || seen[node] == 0)
            st =
                status_fail(STATUS_BAD_INPUT, "%s: no rank is on node %d, though one is on node %d", where, node, t->n_nodes - 1);
    free(seen);
    return st;
}

status topology_uniform(int n_ranks, int n_nodes, topology *out)
{
    if (n_ranks < 1 || n_ranks > PLAN_MAX_RANKS || n_nodes < 1 || n_nodes > n_ranks)
        return status_fail(STATUS_BAD_INPUT, "%d ranks cannot be spread over %d nodes", n_ranks, n_nodes);
    topology t;
    TRY(allocate("uniform topology", n_ranks, &t));
    for (int r = 0; r < n_ranks; r++) {
        t.node_of_rank[r] = (int)((long long)r * n_nodes / n_ranks);
        t.row_us[r] = 250;
        t.expert_us[r] = 1650;
    }
    t.link[LINK_SAME_NODE] = (link_cost){.us = 15, .gb_per_s = 5};
    t.link[LINK_CROSS_NODE] = (link_cost){.us = 60, .gb_per_s = 1};
    t.row_bytes = 5760;
    status st = number_nodes("uniform topology", &t);
    if (st != STATUS_OK) {
        topology_clear(&t);
        return st;
    }
    *out = t;
    return STATUS_OK;
}

status topology_set_nodes(topology *t, const uint32_t *node_of_rank)
{
    topology other;
    TRY(topology_copy(t, &other));
    for (int r = 0; r < t->n_ranks; r++)
        other.node_of_rank[r] = node_of_rank[r] < (uint32_t)t->n_ranks ? (int)node_of_rank[r] : t->n_ranks;
    status st = number_nodes("topology", &other);
    if (st == STATUS_OK) {
        topology old = *t;
        *t = other;
        other = old;
    }
    topology_clear(&other);
    return st;
}

static void *copy_of(const void *from, size_t bytes)
{
    void *to = malloc(bytes);
    if (to)
        memcpy(to, from, bytes);
    return to;
}

status topology_copy(const topology *t, topology *out)
{
    topology c;
    TRY(allocate("topology", t->n_ranks, &c));
    size_t n = (size_t)t->n_ranks;
    memcpy(c.node_of_rank, t->node_of_rank, n * sizeof *c.node_of_rank);
    memcpy(c.local_index, t->local_index, n * sizeof *c.local_index);
    memcpy(c.row_us, t->row_us, n * sizeof *c.row_us);
    memcpy(c.expert_us, t->expert_us, n * sizeof *c.expert_us);
    memcpy(c.expert_bytes, t->expert_bytes, n * sizeof *c.expert_bytes);
    memcpy(c.link, t->link, sizeof c.link);
    c.n_nodes = t->n_nodes;
    c.row_bytes = t->row_bytes;
    c.bytes_per_expert = t->bytes_per_expert;
    c.links = t->links ? copy_of(t->links, n * n * sizeof *t->links) : NULL;
    if (t->links && !c.links) {
        topology_clear(&c);
        return status_fail(STATUS_NO_MEMORY, "no memory for the links of %d ranks", t->n_ranks);
    }
    *out = c;
    return STATUS_OK;
}

/* ---- reading ---- */

static status check_number(const cJSON *item, const char *where, const char *name, bool zero_is_fine, double *out)
{
    if (!item)
        return status_fail(STATUS_BAD_INPUT, "%s: %s is missing", where, name);
    if (!cJSON_IsNumber(item))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is not a number", where, name);
    double v = item->valuedouble;
    if (!(v >= LEAST && v <= GREATEST) && !(zero_is_fine && v == 0))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is %g, outside %s%g to %g", where, name, v, zero_is_fine ? "0, " : "", LEAST,
                           GREATEST);
    *out = v;
    return STATUS_OK;
}

static status read_rank(const cJSON *item, const char *where, int r, topology *t)
{
    char place[1024];
    int64_t node;
    snprintf(place, sizeof place, "%.900s: rank %d", where, r);
    if (!cJSON_IsObject(item))
        return status_fail(STATUS_BAD_INPUT, "%s is not an object", place);
    TRY(json_get_int(item, place, "node", 0, PLAN_MAX_RANKS, &node));
    TRY(json_get_int_or(item, place, "expert_bytes", 0, INT64_C(1) << 53, -1, &t->expert_bytes[r]));
    TRY(check_number(json_find(item, "row_us"), place, "row_us", false, &t->row_us[r]));
    TRY(check_number(json_find(item, "expert_us"), place, "expert_us", true, &t->expert_us[r]));
    t->node_of_rank[r] = (int)node;
    return STATUS_OK;
}

static status read_ranks(const cJSON *ranks, const char *where, topology *t)
{
    const cJSON *item;
    int r = 0;
    cJSON_ArrayForEach(item, ranks) TRY(read_rank(item, where, r++, t));
    return number_nodes(where, t);
}

static status read_class(const cJSON *tree, const char *where, const char *key, link_cost *out)
{
    char place[1024];
    const cJSON *item = json_find(tree, key);
    if (!cJSON_IsObject(item))
        return status_fail(STATUS_BAD_INPUT, "%s: %s is %s", where, key, item ? "not an object" : "missing");
    snprintf(place, sizeof place, "%.900s: %s", where, key);
    TRY(check_number(json_find(item, "us"), place, "us", true, &out->us));
    return check_number(json_find(item, "gb_per_s"), place, "gb_per_s", false, &out->gb_per_s);
}

static status read_link_row(const cJSON *row, const char *where, int from, topology *t)
{
    int n = cJSON_IsArray(row) ? cJSON_GetArraySize(row) : -1, to = 0;
    if (n != t->n_ranks)
        return status_fail(STATUS_BAD_INPUT, "%s: links: row %d is not a list of %d numbers", where, from, t->n_ranks);
    const cJSON *item;
    cJSON_ArrayForEach(item, row)
    {
        char name[40];
        double *at = &t->links[(size_t)from * (size_t)t->n_ranks + (size_t)to];
        snprintf(name, sizeof name, "links from %d to %d", from, to);
        if (to++ != from)
            TRY(check_number(item, where, name, false, at));
    }
    return STATUS_OK;
}

static status read_links(const cJSON *tree, const char *where, topology *t)
{
    const cJSON *links, *row;
    if (!json_find(tree, "links"))
        return STATUS_OK;
    TRY(json_get_array(tree, where, "links", &links));
    int n = cJSON_GetArraySize(links), from = 0;
    if (n != t->n_ranks)
        return status_fail(STATUS_BAD_INPUT, "%s: links has %d rows for %d ranks", where, n, t->n_ranks);
    cJSON_ArrayForEach(row, links) /* before memory for the square is set aside */
        if (cJSON_GetArraySize(row) != n) return status_fail(STATUS_BAD_INPUT, "%s: links: a row is not a list of %d numbers",
                                                             where, n);
    t->links = calloc((size_t)n * (size_t)n, sizeof *t->links);
    if (!t->links)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for the links of %d ranks", where, n);
    cJSON_ArrayForEach(row, links) TRY(read_link_row(row, where, from++, t));
    return STATUS_OK;
}

static status read_tree(const cJSON *tree, const char *where, topology *t)
{
    const cJSON *ranks;
    if (!cJSON_IsObject(tree))
        return status_fail(STATUS_BAD_INPUT, "%s: not a topology: the file holds no JSON object", where);
    TRY(json_get_array(tree, where, "ranks", &ranks));
    int n = cJSON_GetArraySize(ranks);
    if (n < 1 || n > PLAN_MAX_RANKS)
        return status_fail(STATUS_BAD_INPUT, "%s: %d ranks are outside 1 to %d", where, n, PLAN_MAX_RANKS);
    TRY(allocate(where, n, t));
    TRY(read_ranks(ranks, where, t));
    TRY(read_class(tree, where, "same_node", &t->link[LINK_SAME_NODE]));
    TRY(read_class(tree, where, "cross_node", &t->link[LINK_CROSS_NODE]));
    TRY(check_number(json_find(tree, "row_bytes"), where, "row_bytes", false, &t->row_bytes));
    TRY(json_get_int_or(tree, where, "bytes_per_expert", 0, INT64_C(1) << 53, 0, &t->bytes_per_expert));
    return read_links(tree, where, t);
}

static status finish_tree(cJSON *tree, const char *where, topology *out)
{
    topology t = {0};
    status st = read_tree(tree, where, &t);
    cJSON_Delete(tree);
    if (st == STATUS_OK)
        *out = t;
    else
        topology_clear(&t);
    return st;
}

status topology_parse(const char *where, const char *text, size_t size, topology *out)
{
    cJSON *tree;
    TRY(json_parse(where, text, size, &tree));
    return finish_tree(tree, where, out);
}

status topology_read(const char *path, topology *out)
{
    cJSON *tree;
    TRY(json_read_file(path, TOPOLOGY_MAX_BYTES, &tree));
    return finish_tree(tree, path, out);
}

/* ---- writing ---- */

/* 17 digits: what is read back is the same number. */
static void write_topology(FILE *file, const topology *t)
{
    fprintf(file, "{\"ranks\": [\n");
    for (int r = 0; r < t->n_ranks; r++) {
        fprintf(file, "  {\"node\": %d, \"expert_bytes\": ", t->node_of_rank[r]);
        if (t->expert_bytes[r] < 0)
            fprintf(file, "null");
        else
            fprintf(file, "%lld", (long long)t->expert_bytes[r]);
        fprintf(file, ", \"row_us\": %.17g, \"expert_us\": %.17g}%s\n", t->row_us[r], t->expert_us[r],
                r + 1 < t->n_ranks ? "," : "");
    }
    const link_cost *same = &t->link[LINK_SAME_NODE], *cross = &t->link[LINK_CROSS_NODE];
    fprintf(file,
            " ],\n \"same_node\": {\"us\": %.17g, \"gb_per_s\": %.17g}, \"cross_node\": {\"us\": %.17g, \"gb_per_s\": %.17g},\n"
            " \"row_bytes\": %.17g, \"bytes_per_expert\": %lld",
            same->us, same->gb_per_s, cross->us, cross->gb_per_s, t->row_bytes, (long long)t->bytes_per_expert);
    for (int from = 0; t->links && from < t->n_ranks; from++) {
        fprintf(file, from ? ",\n  [" : ",\n \"links\": [\n  [");
        for (int to = 0; to < t->n_ranks; to++)
            fprintf(file, to ? ", %.17g" : "%.17g", t->links[(size_t)from * (size_t)t->n_ranks + (size_t)to]);
        fprintf(file, from + 1 < t->n_ranks ? "]" : "]\n ]");
    }
    fprintf(file, "}\n");
}

/* Written beside its place and renamed, as plans are. */
status topology_write(const topology *t, const char *path)
{
    char *beside;
    if (asprintf(&beside, "%s.part-%ld", path, (long)getpid()) < 0)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a file name", path);
    status st = STATUS_OK;
    FILE *file = fopen(beside, "w");
    if (!file) {
        st = status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
        goto out;
    }
    write_topology(file, t);
    bool failed = ferror(file) != 0;
    failed |= fclose(file) != 0;
    if (failed || file_replace(beside, path) != 0) {
        st = status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
        unlink(beside);
    }
out:
    free(beside);
    return st;
}
