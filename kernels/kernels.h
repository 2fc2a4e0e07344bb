/*
 * kernels.h - the operation table (one per backend), the worker pool, and the algorithms built on both.
 *
 * Matrices are row-major; `ld` is the distance between rows in elements. Nothing here aliases unless it says so.
 * All operations are deterministic: the same input gives the same bits whatever the number of threads, because work is
 * split at fixed sizes and every tile is one single-threaded BLAS call.
 */
#ifndef XKV_KERNELS_INTERNAL_H
#define XKV_KERNELS_INTERNAL_H

#include "base.h"
#include "xkv/format.h"
#include "xkv/kernels.h"

#include <pthread.h>

/* --- Worker pool -------------------------------------------------------------------------------------------------- */

/* A fixed set of threads that run numbered tasks. One xkv_pool_run at a time. While at least one pool exists OpenBLAS
 * is held at one thread (counted, the old value comes back with the last pool). */
typedef struct xkv_pool xkv_pool;

/* `threads` >= 1 includes the calling thread. If threads cannot be started the pool has fewer; that is not an error.
 * The context keeps a pool that is freed, and gives it to the next call: threads that were on processors of their own
 * go there again, where new ones may share the caller's for milliseconds. */
XKV_MUST_CHECK xkv_status xkv_pool_create(xkv_ctx *ctx, uint32_t threads, xkv_pool **pool_p);
void xkv_pool_free(xkv_ctx *ctx, xkv_pool *pool);
uint32_t xkv_pool_threads(const xkv_pool *pool);

/* Task `index` of `count`, on worker `worker` < xkv_pool_threads(). */
typedef xkv_status (*xkv_task_fn)(void *user, uint32_t worker, uint64_t index);

/* Run all tasks, taken in ascending order, and wait. The first failing status (lowest index among those that ran) is
 * returned; after a failure or a cancellation no further task starts. `pool` NULL runs them on the caller. */
XKV_MUST_CHECK xkv_status xkv_pool_run(xkv_ctx *ctx, xkv_pool *pool, uint64_t count, xkv_task_fn task, void *user);

/* How long a thread stays awake that waits for another one of the same call. What it waits for mostly comes soon, and
 * to wake a thread that sleeps takes longer than that, on virtual machines up to milliseconds. Begin with {0}. */
typedef struct xkv_patience {
    uint64_t until; /* nanoseconds of the monotonic clock */
    bool over;      /* sleep now */
} xkv_patience;

/* Until something may have changed, with the mutex held before and after: a moment awake, well below a microsecond, or
 * asleep until `changed` is signalled, for `most` nanoseconds (0: any number; the condition's clock is the default). */
void xkv_wait_for_change(pthread_mutex_t *mutex, pthread_cond_t *changed, uint64_t most, xkv_patience *p);

/* --- Operation table ---------------------------------------------------------------------------------------------- */

#define XKV_MAX_PANEL 32u

/* The inner product of panels.h: C [XKV_STRIP][cols] += A^T B. */
typedef struct xkv_tile_product {
    size_t rows, depth;   /* only so many rows of C matter */
    const float *a;       /* [depth][XKV_STRIP] */
    const float *b;       /* row k is the `cols` elements at b + pick[k] * cols */
    const uint32_t *pick; /* [depth] */
    float *c;
    size_t ldc;
    const float *next; /* these rows [next_count] of it are wanted soon */
    const uint32_t *next_pick;
    size_t next_count;
} xkv_tile_product;

typedef struct xkv_panel_tile {
    void (*add)(const xkv_tile_product *p);
    size_t cols; /* at most XKV_MAX_PANEL */
} xkv_panel_tile;

typedef struct xkv_kernels {
    const char *name;

    /* n elements of `dtype` (little-endian, any alignment; a multiple of its block) to f32: exact. */
    void (*to_f32)(uint32_t dtype, const void *src, float *dst, size_t n);
    /* f32 to `dtype`: nearest, ties to even; finite values beyond the type's range become its largest finite value
     * (F16: 65504), infinities stay, a NaN stays a NaN. Blocks: see xkv_view. */
    void (*from_f32)(uint32_t dtype, const float *src, void *dst, size_t n);
    /* True when no element of n (of blocks: no scale) is NaN or infinite. */
    bool (*all_finite)(uint32_t dtype, const void *src, size_t n);

    /* Rotate (inverse = false) or un-rotate (true) pairs of one row of `heads` heads of head_dim f32 in place.
     * cos_sin holds n_rot/2 cosines, then n_rot/2 sines, already multiplied by scale (rotate) or divided by it
     * (un-rotate). */
    void (*rope_row)(float *row, uint32_t heads, uint32_t head_dim, const xkv_rope *rope, const float *cos_sin,
                     bool inverse);

    /* C[m,n] = A[m,k] B[k,n] + beta C; f32, f32 accumulation, one thread. */
    void (*gemm_nn)(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float beta,
                    float *c, size_t ldc);
    /* C[m,n] = A[k,m]^T B[k,n] + beta C. */
    void (*gemm_tn)(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float beta,
                    float *c, size_t ldc);

    /* C[m,n] = A[m,k] B[n,k]^T + beta C. */
    void (*gemm_nt)(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float beta,
                    float *c, size_t ldc);

    xkv_panel_tile panel_tile;

    /* Sum of squares of n f32 in f64, and of differences (a - b)^2. */
    double (*sum_squares)(const float *x, size_t n);
    double (*sum_squared_difference)(const float *a, const float *b, size_t n);

    /* spec/codec.md, section 2: rows x cols elements of `elem` bytes (2 or 4) to elem byte planes of rows*cols bytes
     * each, stored one behind the other at `planes`, the highest transposed; and back. */
    void (*split_bytes)(const void *src, size_t rows, size_t cols, size_t elem, uint8_t *planes);
    void (*join_bytes)(const uint8_t *planes, size_t rows, size_t cols, size_t elem, void *dst);
} xkv_kernels;

/* The CPU table in use (dispatched once), and the plain C one, which is the reference in tests. Never NULL. */
const xkv_kernels *xkv_kernels_cpu(void);
const xkv_kernels *xkv_kernels_cpu_generic(void);

/* --- RoPE angles -------------------------------------------------------------------------------------------------- */

/* Cosines and sines of `rope` at `position`, computed in f64 and rounded once, in the form rope_row takes:
 * cos_sin[n_rot]. For runs of positions use the table below. */
void xkv_rope_cos_sin(const xkv_rope *rope, int32_t position, bool inverse, float *cos_sin);

/* Angles for many positions: keeps f64 tables of the low 5 bits of the position and of the last high part seen, so that
 * a row costs n_rot/2 complex products instead of sines; within 1e-15 of the exact values before rounding. One per
 * thread. */
typedef struct xkv_rope_table xkv_rope_table;
XKV_MUST_CHECK xkv_status xkv_rope_table_create(xkv_ctx *ctx, const xkv_rope *rope, bool inverse,
                                                xkv_rope_table **table_p);
void xkv_rope_table_free(xkv_ctx *ctx, xkv_rope_table *table);
void xkv_rope_table_row(xkv_rope_table *table, int32_t position, float *cos_sin);

/* --- Views -------------------------------------------------------------------------------------------------------- */

/* Gather tokens [t0, t1) of a view (plane `p`) into f32 rows at dst (ld elements apart), exact; and the reverse with
 * the rounding of from_f32, to blocks from elements that are first rounded to p's dtype where that has 16 bits. The
 * *_bytes forms move elements of p's dtype unchanged (view->dtype == p->dtype). */
void xkv_view_gather(const xkv_kernels *k, const xkv_view *view, const xkv_plane *p, uint32_t t0, uint32_t t1,
                     float *dst, size_t ld);
void xkv_view_scatter(const xkv_kernels *k, const float *src, size_t ld, const xkv_plane *p, uint32_t t0, uint32_t t1,
                      const xkv_view *view);
void xkv_view_gather_bytes(const xkv_view *view, const xkv_plane *p, uint32_t t0, uint32_t t1, uint8_t *dst,
                           size_t row_bytes);
void xkv_view_scatter_bytes(const uint8_t *src, size_t row_bytes, const xkv_plane *p, uint32_t t0, uint32_t t1,
                            const xkv_view *view);

/* --- Truncated SVD ------------------------------------------------------------------------------------------------ */

typedef struct xkv_svd_options {
    uint32_t rank;       /* wanted rank r >= 1, cut to min(rows, cols); ignored when energy > 0 */
    double energy;       /* > 0: smallest rank that keeps this share of the sum of squares (0 < energy <= 1), as far as
                            f32 can tell */
    uint32_t max_rank;   /* upper bound on the rank (0: none); with energy, stop there even if it is not reached */
    uint32_t iterations; /* power iterations q, 1..8 */
    double total;        /* sum of squares of X in f64, where the caller knows it; 0: to be measured */
} xkv_svd_options;

typedef struct xkv_svd_result {
    uint32_t rank;
    double energy;          /* sum of squares of X, f64 */
    double captured;        /* sum of the kept Ritz values */
    float *components;      /* [rank, cols] orthonormal rows, by falling Ritz value */
    float *coefficients;    /* [rows, rank] = X components^T */
    float *singular_values; /* [rank] square roots of the kept Ritz values */
    /* The arrays belong to the caller: xkv_svd_result_free(). */
} xkv_svd_result;

/* X [rows, cols] ~= coefficients components: subspace iteration on the column side with Rayleigh-Ritz (Halko,
 * Martinsson, Tropp 2011, algorithms 4.4 and 5.3 in N-side form): V = cholqr(X^T S), S a fixed sparse random matrix;
 * q times { Y = X V, Z = X^T Y, V = cholqr(Z) }; Y = X V; eig(Y^T Y). The block has p = r + max(8, r/8) columns,
 * rounded up to a multiple of 16, at most min(rows, cols) (then it holds the whole row space and nothing is iterated).
 * Cholesky-QR, the Gram matrices and the eigenproblem are in f64. Cholesky-QR is repeated unless the first factor shows
 * that one pass gives orthonormal columns, and shifted (Fukaya et al. 2020, arXiv 1809.11085) when the first Cholesky
 * fails. With `energy` the block doubles, keeping the columns it has, until it holds the wanted rank.
 * Null columns and components below 1e-6 of the largest singular value are dropped, so that the rank may come out
 * smaller than asked. A zero matrix gives rank 1: the first unit vector with singular value 0.
 * Scratch: rows*p + 2*cols*p f32, 4*p*p f64, and threads*256*p f64. Errors: MEMORY, LIMIT, BACKEND, CANCELLED, ARGUMENT
 * (X must be finite with a norm below 2^120). */
XKV_MUST_CHECK xkv_status xkv_svd(xkv_ctx *ctx, xkv_pool *pool, const xkv_kernels *k, const float *x, size_t rows,
                                  size_t cols, const xkv_svd_options *options, xkv_svd_result *result);
void xkv_svd_result_free(xkv_ctx *ctx, xkv_svd_result *result);

/* Columns of the block for a rank, if there are so many. */
size_t xkv_svd_block_width(size_t rank);

/* Eigenvalues (ascending) and eigenvectors (columns, column-major, replacing a[n*n]) of a symmetric matrix, of which
 * the upper triangle (column-major) is read: dsyevd_ with workspace sizes of our own. In f64, since f32 eigenvectors
 * are not orthonormal to 1e-6 from n of about 100 on. Errors: LIMIT (n = 0, n > 32764), MEMORY, BACKEND. */
XKV_MUST_CHECK xkv_status xkv_syevd(xkv_ctx *ctx, uint32_t n, double *a, double *w);

/* Inverse of a symmetric positive definite matrix a[n*n] in place, by Cholesky in f64; false when it is not one. */
bool xkv_spd_inverse(uint32_t n, double *a);

/* Inverse of the Gram matrix gram[n*n] of rows in place, in f64, with `ridge` added to its diagonal, and 1 where a row
 * is all zeros. *regular is false, and gram as it was, when the rows are linearly dependent. Errors: MEMORY. */
XKV_MUST_CHECK xkv_status xkv_gram_inverse(xkv_ctx *ctx, uint32_t n, double ridge, float *gram, bool *regular);

/* Rows of one GEMM tile. */
#define XKV_TILE_ROWS 256u

#endif
