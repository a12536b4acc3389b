/* experts.h - runs feed-forward blocks on rows: the experts on rows that arrived, and the dense and shared blocks on own rows.
 *
 * An expert's rows from all sources are gathered, so that its weights are read once per step; then two parallel passes
 * over all experts together (gate and up; down), split by columns and weighted by rows, so that a pass has one join however many
 * experts it touches:
 *
 *     rows of all sources ─gather─► X ─gate, up, SwiGLU─► A ─down─► weight * y ─► results of each source (combine.h)
 *
 * Rows are taken in waves of bounded size; a row's bits do not depend on the wave. */
#ifndef CONVOKE_WORKER_EXPERTS_H
#define CONVOKE_WORKER_EXPERTS_H

#include "router/exchange.h"
#include "worker/checkpoint.h"
#include "worker/thread_pool.h"

typedef struct experts experts;

typedef struct {
    int hidden, n_experts, top_k;
    int expert_inter; /* width of an expert */
    int dense_inter;  /* the widest of dense and shared blocks; 0: none */
    int max_rows;     /* own rows per step: what a dense block may see at once */
    int n_ranks;
    combine_mode combine;
    row_format rows;
} experts_shape;

status experts_create(const experts_shape *shape, const kernel_table *kernels, thread_pool *pool, experts **out);
void experts_destroy(experts *e); /* NULL is fine */
size_t experts_buffer_bytes(const experts *e);

/* Between exchange_send() and exchange_wait(): own rows of those experts that have many of them, so that the wait is not idle. An
 * expert with few own rows waits for the others': its weights would be read twice. Deterministic. */
status experts_run_home(experts *e, const mlp_weights *weights, exchange *x, int own_rank);
/* After exchange_wait(): everything else. */
status experts_run_rest(experts *e, const mlp_weights *weights, exchange *x, int own_rank);
/* (row, expert) products of the layer just run on this rank, and distinct experts touched. */
void experts_last_load(const experts *e, int *rows, int *touched);

/* out [n_rows][hidden] (rows out_stride apart) = down(swiglu(gate x, up x)); x rows x_stride apart. */
void experts_run_block(experts *e, const mlp_weights *block, const float *x, size_t x_stride, int n_rows, float *out,
                       size_t out_stride);

/* y [n_rows][w->n_out] = x w^T, columns split over the pool; for the other projections of the model. */
typedef struct {
    const weight_matrix *w;
    float *y;
    size_t y_stride;
    const float *bias; /* NULL: none */
} projection;
/* Several projections of the same x in one parallel pass. */
void project(thread_pool *pool, const kernel_table *kernels, const projection *list, int n, const float *x, size_t x_stride,
             int n_rows);

#endif
