/* plan.c - plans in memory and as JSON. The reader trusts nothing: every count is checked against the lists that are really
 * there before memory is set aside for it, so a lying file cannot ask for more than a small multiple of its own size. */
#include "placement/plan.h"

#include "proto/file_replace.h"
#include "proto/json.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PLAN_VERSION   1
#define PLAN_MAX_BYTES ((size_t)1 << 30)

static int *copy_ints(const int *from, size_t n)
{
    int *to = malloc((n ? n : 1) * sizeof *to);
    if (to && n)
        memcpy(to, from, n * sizeof *to);
    return to;
}

status plan_copy(const plan *p, plan *out)
{
    size_t n_lists = (size_t)p->n_layers * (size_t)p->n_experts;
    plan copy = *p;
    copy.layer_numbers = copy_ints(p->layer_numbers, (size_t)p->n_layers);
    copy.node_of_rank = copy_ints(p->node_of_rank, (size_t)p->n_ranks);
    copy.first_copy = copy_ints(p->first_copy, n_lists + 1);
    copy.copy_ranks = copy_ints(p->copy_ranks, (size_t)p->first_copy[n_lists]);
    if (!copy.layer_numbers || !copy.node_of_rank || !copy.first_copy || !copy.copy_ranks) {
        plan_clear(&copy);
        return status_fail(STATUS_NO_MEMORY, "plan %s: no memory to copy it", p->name);
    }
    *out = copy;
    return STATUS_OK;
}

void plan_clear(plan *p)
{
    free(p->layer_numbers);
    free(p->node_of_rank);
    free(p->first_copy);
    free(p->copy_ranks);
    *p = (plan){0};
}

/* All arrays zeroed; n_copies in all layers together. */
static status plan_allocate(const char *where, int n_ranks, int n_experts, int n_layers, size_t n_copies, plan *p)
{
    *p = (plan){.n_ranks = n_ranks, .n_experts = n_experts, .n_layers = n_layers};
    size_t n_lists = (size_t)n_layers * (size_t)n_experts;
    if (n_lists >= INT_MAX || n_copies >= INT_MAX)
        return status_fail(STATUS_UNSUPPORTED, "%s: %zu experts in all layers are more than a plan can hold", where, n_lists);
    p->layer_numbers = calloc((size_t)n_layers, sizeof *p->layer_numbers);
    p->node_of_rank = calloc((size_t)n_ranks, sizeof *p->node_of_rank);
    p->first_copy = calloc(n_lists + 1, sizeof *p->first_copy);
    p->copy_ranks = calloc(n_copies + 1, sizeof *p->copy_ranks);
    if (p->layer_numbers && p->node_of_rank && p->first_copy && p->copy_ranks)
        return STATUS_OK;
    plan_clear(p);
    return status_fail(STATUS_NO_MEMORY, "%s: no memory for a plan of %zu copies", where, n_copies);
}

status plan_create(const char *where, const plan_shape *shape, const int *node_of_rank, const int *n_copies, plan *out)
{
    if (shape->n_ranks < 1 || shape->n_ranks > PLAN_MAX_RANKS || shape->n_experts < 1 || shape->n_experts > PLAN_MAX_EXPERTS ||
        shape->n_layers < 1)
        return status_fail(STATUS_BAD_INPUT, "%s: %d experts in %d layers on %d ranks cannot be planned", where, shape->n_experts,
                           shape->n_layers, shape->n_ranks);
    plan p;
    size_t n_lists = (size_t)shape->n_layers * (size_t)shape->n_experts, total = 0;
    for (size_t i = 0; i < n_lists; i++)
        total += n_copies ? (size_t)n_copies[i] : 1;
    TRY(plan_allocate(where, shape->n_ranks, shape->n_experts, shape->n_layers, total, &p));
    for (int l = 0; l < p.n_layers; l++)
        p.layer_numbers[l] = shape->layer_numbers ? shape->layer_numbers[l] : l;
    for (int r = 0; r < p.n_ranks; r++)
        p.node_of_rank[r] = node_of_rank ? node_of_rank[r] : 0;
    for (size_t i = 0; i < n_lists; i++)
        p.first_copy[i + 1] = p.first_copy[i] + (n_copies ? n_copies[i] : 1);
    *out = p;
    return STATUS_OK;
}

status plan_contiguous(const plan_shape *shape, const int *node_of_rank, plan *out)
{
    plan p;
    TRY(plan_create("contiguous plan", shape, node_of_rank, NULL, &p));
    for (int i = 0; i < p.n_layers * p.n_experts; i++)
        p.copy_ranks[i] = (int)((long long)(i % p.n_experts) * p.n_ranks / p.n_experts);
    snprintf(p.name, sizeof p.name, "contiguous");
    *out = p;
    return STATUS_OK;
}

/* ---- reading ---- */

/* The name ends up in log lines: cut to fit between characters, control characters made visible. */
static void set_name(const char *from, char *name, size_t size)
{
    size_t n = strlen(from);
    if (n >= size)
        for (n = size - 1; n > 0 && ((unsigned char)from[n] & 0xc0) == 0x80;)
            n--;
    for (size_t i = 0; i < n; i++)
        name[i] = (unsigned char)from[i] < 0x20 || from[i] == 0x7f ? '?' : from[i];
    name[n] = '\0';
}

static status read_header(const cJSON *tree, const char *where, const plan_shape *shape, int *n_ranks, int *n_experts)
{
    if (!cJSON_IsObject(tree))
        return status_fail(STATUS_BAD_INPUT, "%s: not a plan: the file holds no JSON object", where);
    const char *format, *model;
    int64_t version, ranks, experts;
    TRY(json_get_string(tree, where, "format", &format));
    if (strcmp(format, "convoke-plan") != 0)
        return status_fail(STATUS_BAD_INPUT, "%s: not a plan: its format is \"%.40s\", not \"convoke-plan\"", where, format);
    TRY(json_get_int(tree, where, "version", 0, INT_MAX, &version));
    if (version != PLAN_VERSION)
        return status_fail(STATUS_UNSUPPORTED, "%s: version %lld of the plan format is unknown; this program reads version %d",
                           where, (long long)version, PLAN_VERSION);
    TRY(json_get_int(tree, where, "ranks", 1, PLAN_MAX_RANKS, &ranks));
    TRY(json_get_int(tree, where, "experts", 1, PLAN_MAX_EXPERTS, &experts));
    if (json_find(tree, "model"))
        TRY(json_get_string(tree, where, "model", &model));
    if (shape && shape->model_name && json_find(tree, "model") && strcmp(model, shape->model_name) != 0)
        return status_fail(STATUS_BAD_INPUT, "%s: a plan for model %.200s, not for %.200s", where, model, shape->model_name);
    if (shape && experts != shape->n_experts)
        return status_fail(STATUS_BAD_INPUT, "%s: a plan for %d experts per layer; the model has %d", where, (int)experts,
                           shape->n_experts);
    if (shape && ranks != shape->n_ranks)
        return status_fail(STATUS_BAD_INPUT, "%s: a plan for %d ranks; this job has %d", where, (int)ranks, shape->n_ranks);
    *n_ranks = (int)ranks;
    *n_experts = (int)experts;
    return STATUS_OK;
}

/* Every layer has a list of n_experts lists: after this, memory for them is backed by the file's own size. */
static status count_lists(const cJSON *layers, const char *where, const plan_shape *shape, int n_experts, int *n_layers,
                          size_t *n_copies)
{
    const cJSON *layer, *lists, *list;
    int n = 0;
    *n_copies = 0;
    cJSON_ArrayForEach(layer, layers)
    {
        char place[1024];
        snprintf(place, sizeof place, "%.900s: entry %d of layers", where, n);
        if (!cJSON_IsObject(layer))
            return status_fail(STATUS_BAD_INPUT, "%s is not an object", place);
        TRY(json_get_array(layer, place, "ranks_of_expert", &lists));
        int n_lists = cJSON_GetArraySize(lists);
        if (n_lists != n_experts)
            return status_fail(STATUS_BAD_INPUT, "%s: ranks_of_expert has %d entries for %d experts", place, n_lists, n_experts);
        cJSON_ArrayForEach(list, lists) *n_copies += (size_t)cJSON_GetArraySize(list);
        n++;
    }
    if (n == 0)
        return status_fail(STATUS_BAD_INPUT, "%s: layers is empty", where);
    if (shape && n != shape->n_layers)
        return status_fail(STATUS_BAD_INPUT, "%s: a plan for %d layers of experts; the model has %d", where, n, shape->n_layers);
    *n_layers = n;
    return STATUS_OK;
}

static status read_nodes(const cJSON *tree, const char *where, plan *p)
{
    const cJSON *nodes, *item;
    if (!json_find(tree, "node_of_rank"))
        return STATUS_OK; /* all on node 0 */
    TRY(json_get_array(tree, where, "node_of_rank", &nodes));
    int n = cJSON_GetArraySize(nodes), r = 0;
    if (n != p->n_ranks)
        return status_fail(STATUS_BAD_INPUT, "%s: node_of_rank has %d entries for %d ranks", where, n, p->n_ranks);
    char place[1024];
    snprintf(place, sizeof place, "%.900s: node_of_rank", where);
    cJSON_ArrayForEach(item, nodes)
    {
        int64_t node;
        TRY(json_item_int(item, place, r, 0, PLAN_MAX_RANKS, &node));
        p->node_of_rank[r++] = (int)node;
    }
    return STATUS_OK;
}

static status read_layer_number(const cJSON *layer, const char *where, const plan_shape *shape, int index, plan *p)
{
    int64_t number;
    char place[1024];
    snprintf(place, sizeof place, "%.900s: entry %d of layers", where, index);
    TRY(json_get_int(layer, place, "layer", 0, INT_MAX, &number));
    if (shape && shape->layer_numbers && number != shape->layer_numbers[index])
        return status_fail(STATUS_BAD_INPUT, "%s is layer %d, but the model's experts there are in layer %d", place, (int)number,
                           shape->layer_numbers[index]);
    if (index > 0 && number <= p->layer_numbers[index - 1])
        return status_fail(STATUS_BAD_INPUT, "%s: layer %d does not rise above layer %d before it", place, (int)number,
                           p->layer_numbers[index - 1]);
    p->layer_numbers[index] = (int)number;
    return STATUS_OK;
}

/* One expert's ranks, appended at copy_ranks[*at]. seen[r]: the last list that named rank r, plus one. */
static status read_copies(const cJSON *list, const char *where, int layer, int expert, size_t list_number, int *seen, plan *p,
                          int *at)
{
    if (!cJSON_IsArray(list))
        return status_fail(STATUS_BAD_INPUT, "%s: layer %d: expert %d has no list of ranks", where, layer, expert);
    if (!list->child)
        return status_fail(STATUS_BAD_INPUT, "%s: layer %d: expert %d is on no rank", where, layer, expert);
    const cJSON *item;
    cJSON_ArrayForEach(item, list)
    {
        double rank = item->valuedouble;
        if (!cJSON_IsNumber(item) || !(rank >= -1e15 && rank <= 1e15) || rank != (double)(int64_t)rank)
            return status_fail(STATUS_BAD_INPUT, "%s: layer %d: expert %d: a rank is not a whole number", where, layer, expert);
        if (rank < 0 || rank >= p->n_ranks)
            return status_fail(STATUS_BAD_INPUT, "%s: layer %d: expert %d: rank %.0f is outside 0 to %d", where, layer, expert,
                               rank, p->n_ranks - 1);
        if (seen[(int)rank] == (int)list_number + 1)
            return status_fail(STATUS_BAD_INPUT, "%s: layer %d: expert %d is on rank %.0f twice", where, layer, expert, rank);
        seen[(int)rank] = (int)list_number + 1;
        p->copy_ranks[(*at)++] = (int)rank;
    }
    return STATUS_OK;
}

static status read_layers(const cJSON *layers, const char *where, const plan_shape *shape, plan *p)
{
    int *seen = calloc((size_t)p->n_ranks, sizeof *seen), at = 0, index = 0;
    if (!seen)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for %d ranks", where, p->n_ranks);
    status st = STATUS_OK;
    size_t list_number = 0;
    const cJSON *layer, *lists, *list;
    cJSON_ArrayForEach(layer, layers)
    {
        TRY_GOTO(read_layer_number(layer, where, shape, index, p), out);
        TRY_GOTO(json_get_array(layer, where, "ranks_of_expert", &lists), out);
        int expert = 0;
        cJSON_ArrayForEach(list, lists)
        {
            p->first_copy[list_number] = at;
            TRY_GOTO(read_copies(list, where, p->layer_numbers[index], expert++, list_number, seen, p, &at), out);
            list_number++;
        }
        index++;
    }
    p->first_copy[list_number] = at;
out:
    free(seen);
    return st;
}

static status read_tree(const cJSON *tree, const char *where, const plan_shape *shape, plan *p)
{
    int n_ranks = 0, n_experts = 0, n_layers = 0;
    size_t n_copies = 0;
    const cJSON *layers;
    TRY(read_header(tree, where, shape, &n_ranks, &n_experts));
    TRY(json_get_array(tree, where, "layers", &layers));
    TRY(count_lists(layers, where, shape, n_experts, &n_layers, &n_copies));
    TRY(plan_allocate(where, n_ranks, n_experts, n_layers, n_copies, p));
    TRY(read_nodes(tree, where, p));
    TRY(read_layers(layers, where, shape, p));
    int64_t epoch;
    TRY(json_get_int_or(tree, where, "epoch", 0, INT64_C(1) << 53, 0, &epoch));
    p->epoch = epoch;
    const char *slash = strrchr(where, '/'), *name = slash ? slash + 1 : where;
    if (json_find(tree, "name"))
        TRY(json_get_string(tree, where, "name", &name));
    set_name(name, p->name, sizeof p->name);
    return STATUS_OK;
}

static status finish_tree(cJSON *tree, const char *where, const plan_shape *shape, plan *out)
{
    plan p = {0};
    status st = read_tree(tree, where, shape, &p);
    cJSON_Delete(tree);
    if (st == STATUS_OK)
        *out = p;
    else
        plan_clear(&p);
    return st;
}

status plan_parse(const char *where, const char *text, size_t size, const plan_shape *shape, plan *out)
{
    cJSON *tree;
    TRY(json_parse(where, text, size, &tree));
    return finish_tree(tree, where, shape, out);
}

status plan_read(const char *path, const plan_shape *shape, plan *out)
{
    cJSON *tree;
    TRY(json_read_file(path, PLAN_MAX_BYTES, &tree));
    return finish_tree(tree, path, shape, out);
}

/* ---- writing ---- */

static void write_string(FILE *file, const char *key, const char *text)
{
    cJSON *item = cJSON_CreateString(text);
    char *quoted = item ? cJSON_PrintUnformatted(item) : NULL;
    if (quoted)
        fprintf(file, "\"%s\": %s, ", key, quoted);
    cJSON_free(quoted);
    cJSON_Delete(item);
}

/* One line per layer: large plans stay readable in a diff. */
static void write_layer(FILE *file, const plan *p, int l)
{
    fprintf(file, "  {\"layer\": %d, \"ranks_of_expert\": [", p->layer_numbers[l]);
    for (int e = 0; e < p->n_experts; e++) {
        const int *ranks = plan_copies(p, l, e);
        fprintf(file, e ? ", [" : "[");
        for (int c = 0; c < plan_n_copies(p, l, e); c++)
            fprintf(file, c ? ", %d" : "%d", ranks[c]);
        fputc(']', file);
    }
    fprintf(file, l + 1 < p->n_layers ? "]},\n" : "]}\n");
}

/* One line per member, and one per element of a list of lists: they may be long. */
static void write_member(FILE *file, const cJSON *member)
{
    char *text = NULL, *key;
    cJSON *name = cJSON_CreateString(member->string);
    key = name ? cJSON_PrintUnformatted(name) : NULL;
    fprintf(file, " %s: ", key ? key : "\"\"");
    if (cJSON_IsArray(member) && cJSON_IsArray(member->child)) {
        const cJSON *element;
        cJSON_ArrayForEach(element, member)
        {
            text = cJSON_PrintUnformatted(element);
            fprintf(file, "%s%s", element == member->child ? "[\n  " : ",\n  ", text ? text : "[]");
            cJSON_free(text);
        }
        fputs("]", file);
    } else {
        text = cJSON_PrintUnformatted(member);
        fputs(text ? text : "null", file);
        cJSON_free(text);
    }
    fputs(",\n", file);
    cJSON_free(key);
    cJSON_Delete(name);
}

static void write_plan(FILE *file, const plan *p, const char *model_name, const cJSON *beside)
{
    fprintf(file, "{\"format\": \"convoke-plan\", \"version\": %d, ", PLAN_VERSION);
    if (model_name)
        write_string(file, "model", model_name);
    write_string(file, "name", p->name);
    fprintf(file, "\"epoch\": %lld, \"experts\": %d, \"ranks\": %d,\n \"node_of_rank\": [", p->epoch, p->n_experts, p->n_ranks);
    for (int r = 0; r < p->n_ranks; r++)
        fprintf(file, r ? ", %d" : "%d", p->node_of_rank[r]);
    fprintf(file, "],\n");
    const cJSON *member;
    cJSON_ArrayForEach(member, beside) write_member(file, member);
    fprintf(file, " \"layers\": [\n");
    for (int l = 0; l < p->n_layers; l++)
        write_layer(file, p, l);
    fprintf(file, " ]}\n");
}

/* Written beside its place and renamed: a reader sees the old plan or the new one, never half of it. */
status plan_write_beside(const plan *p, const char *model_name, const cJSON *beside, const char *path)
{
    char *part;
    if (asprintf(&part, "%s.part-%ld", path, (long)getpid()) < 0)
        return status_fail(STATUS_NO_MEMORY, "%s: no memory for a file name", path);
    status st = STATUS_OK;
    FILE *file = fopen(part, "w");
    if (!file) {
        st = status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
        goto out;
    }
    write_plan(file, p, model_name, beside);
    bool failed = ferror(file) != 0;
    failed |= fclose(file) != 0;
    if (failed || file_replace(part, path) != 0) {
        st = status_fail(STATUS_IO, "%s: cannot be written (%s)", path, strerror(errno));
        unlink(part);
    }
out:
    free(part);
    return st;
}

status plan_write(const plan *p, const char *model_name, const char *path)
{
    return plan_write_beside(p, model_name, NULL, path);
}

/* ---- using ---- */

bool plan_holds(const plan *p, int layer, int expert, int rank)
{
    const int *ranks = plan_copies(p, layer, expert);
    for (int c = 0, n = plan_n_copies(p, layer, expert); c < n; c++)
        if (ranks[c] == rank)
            return true;
    return false;
}

int plan_nearest(const plan *p, const int *node_of_rank, int layer, int expert, int owner)
{
    const int *ranks = plan_copies(p, layer, expert);
    int near = -1;
    for (int c = 0, n = plan_n_copies(p, layer, expert); c < n; c++) {
        if (ranks[c] == owner)
            return owner;
        if (near < 0 && node_of_rank[ranks[c]] == node_of_rank[owner])
            near = ranks[c];
    }
    return near < 0 ? ranks[0] : near;
}

int plan_choose(const plan *p, replica_choice choice, int layer, int expert, int owner, uint32_t turn)
{
    assert(owner >= 0 && owner < p->n_ranks);
    const int *ranks = plan_copies(p, layer, expert);
    uint32_t n = (uint32_t)plan_n_copies(p, layer, expert), n_near = 0;
    if (n == 1)
        return ranks[0];
    if (choice != REPLICA_ROUND_ROBIN) {
        for (uint32_t c = 0; c < n; c++) {
            if (ranks[c] == owner)
                return owner;
            n_near += p->node_of_rank[ranks[c]] == p->node_of_rank[owner];
        }
        if (n_near > 0) {
            uint32_t skip = turn % n_near;
            for (uint32_t c = 0;; c++)
                if (p->node_of_rank[ranks[c]] == p->node_of_rank[owner] && skip-- == 0)
                    return ranks[c];
        }
    }
    return ranks[turn % n];
}
