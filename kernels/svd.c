/* svd.c - truncated SVD by subspace iteration on the column side, and the small dense algebra that it needs. */
#include "kernels.h"

#include <cblas.h>
#include <float.h>
#include <limits.h>
#include <math.h>

/* LAPACK has no header of its own. The sizes at the end are the hidden lengths of the character arguments. */
void dsyevd_(const char *jobz, const char *uplo, const int *n, double *a, const int *lda, double *w, double *work,
             const int *lwork, int *iwork, const int *liwork, int *info, size_t jobz_length, size_t uplo_length);
void dpotrf_(const char *uplo, const int *n, double *a, const int *lda, int *info, size_t uplo_length);
void dtrtri_(const char *uplo, const char *diag, const int *n, double *a, const int *lda, int *info, size_t uplo_length,
             size_t diag_length);

#define TRANSFORM_ROWS  128u /* rows in one task of an orthonormalisation; with f64 copies of input and output */
#define ENERGY_START    32u  /* smallest first block when the rank is sought */
#define SKETCH_ENTRIES  4u   /* of a row of the sketch: fewer may lose directions that only few tokens hold */
#define PREFETCH_ROWS   8u
#define MAX_QR_PASSES   6u
#define MAX_EXPONENT    120 /* of the norm of X: singular values must fit in f32 with room for sums */
#define RANDOM_SEED     UINT64_C(0x786b76)
#define NULL_RATIO      4e-12  /* Ritz values below this share of the largest are rounding noise of f32 */
#define MAX_TRANSFORM   1e7    /* squared row norm up to which one pass leaves errors of 1e-8: see orthonormalise() */
#define MAX_EIGEN_ORDER 32764u /* largest n with 2 n^2 + 6 n + 1 in an int */

typedef struct svd {
    xkv_ctx *ctx;
    xkv_pool *pool;
    const xkv_kernels *k;
    const float *x; /* [rows, cols] */
    size_t rows, cols;
    double energy; /* sum of squares of X; 0 until known */
    double scale;  /* power of two that brings the norm of X to 0.5 .. 1; blocks are multiplied by it, so that neither
                      Y nor its Gram matrix leaves the range of f32 */

    size_t width;      /* columns of the block now */
    size_t allocated;  /* columns the buffers have room for */
    float *v;          /* [cols, width] orthonormal columns times scale */
    float *y;          /* [rows, width] X V */
    float *z;          /* [cols, width] X^T Y; in the end the weights [width, rank] */
    double *gram;      /* [width, width], lower triangle; then eigenvectors as rows */
    double *transform; /* [new width, width]: row j holds the weights of new column j */
    double *values;    /* [width] eigenvalues, ascending */
    double *scratch;   /* [threads][XKV_TILE_ROWS * allocated] */

    const float *gram_source; /* of the running gram() */
    size_t gram_rows, gram_block;
    double *tile_energy; /* [row tiles], of measure_energy() */
    xkv_svd_result result;
} svd;

static size_t tile_count(size_t n, size_t tile)
{
    return n / tile + (n % tile != 0);
}

/* Rows of X in a task of X V, columns of X in a task of X^T Y: large tiles repack the other operand less often, several
 * tasks keep threads busy. */
static size_t gemm_tile(size_t n)
{
    return xkv_align64(xkv_min64(xkv_max64(n / 8, 128), 1024), 128);
}

static double *worker_scratch(const svd *s, uint32_t worker)
{
    return s->scratch + (size_t)worker * XKV_TILE_ROWS * s->allocated;
}

static xkv_status run(svd *s, size_t count, xkv_task_fn task)
{
    return xkv_pool_run(s->ctx, s->pool, count, task, s);
}

/* --- Symmetric eigenproblem --------------------------------------------------------------------------------------- */

xkv_status xkv_syevd(xkv_ctx *ctx, uint32_t n, double *a, double *w)
{
    double *work = NULL;
    int *integers = NULL;
    xkv_status status = XKV_OK;
    if (n == 0 || n > MAX_EIGEN_ORDER)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "eigenvalues of order %u; LAPACK's range is 1 .. %u", n, MAX_EIGEN_ORDER);
    int order = (int)n, info = 0, work_size = 1 + 6 * order + 2 * order * order, integer_size = 3 + 5 * order;
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)work_size, &work), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)integer_size, &integers), out);
    dsyevd_("V", "U", &order, a, &order, w, work, &work_size, integers, &integer_size, &info, 1, 1);
    if (info != 0)
        status = xkv_fail(ctx, XKV_ERROR_BACKEND, "dsyevd of order %u failed: info %d", n, info);
out:
    xkv_release(ctx, integers);
    xkv_release(ctx, work);
    return status;
}

/* --- Products ----------------------------------------------------------------------------------------------------- */

static xkv_status energy_task(void *user, uint32_t worker, uint64_t index)
{
    svd *s = user;
    size_t first = index * XKV_TILE_ROWS, count = xkv_min64(XKV_TILE_ROWS, s->rows - first);
    (void)worker;
    s->tile_energy[index] = s->k->sum_squares(s->x + first * s->cols, count * s->cols);
    return XKV_OK;
}

/* Sum of squares of X; tiles are added in order, whoever computed them. */
static xkv_status measure_energy(svd *s)
{
    size_t tiles = tile_count(s->rows, XKV_TILE_ROWS);
    if (s->energy > 0)
        return XKV_OK;
    XKV_TRY(XKV_NEW(s->ctx, tiles, &s->tile_energy));
    XKV_TRY(run(s, tiles, energy_task));
    s->energy = 0;
    for (size_t i = 0; i < tiles; i++)
        s->energy += s->tile_energy[i];
    return XKV_OK;
}

static xkv_status multiply_task(void *user, uint32_t worker, uint64_t index)
{
    svd *s = user;
    size_t tile = gemm_tile(s->rows), first = index * tile, count = xkv_min64(tile, s->rows - first);
    (void)worker;
    s->k->gemm_nn(count, s->width, s->cols, s->x + first * s->cols, s->cols, s->v, s->width, 0.0f,
                  s->y + first * s->width, s->width);
    return XKV_OK;
}

static xkv_status project_task(void *user, uint32_t worker, uint64_t index)
{
    svd *s = user;
    size_t tile = gemm_tile(s->cols), first = index * tile, count = xkv_min64(tile, s->cols - first);
    (void)worker;
    s->k->gemm_tn(count, s->width, s->rows, s->x + first, s->cols, s->y, s->width, 0.0f, s->z + first * s->width,
                  s->width);
    return XKV_OK;
}

/* Y = X V. */
static xkv_status multiply(svd *s)
{
    return run(s, tile_count(s->rows, gemm_tile(s->rows)), multiply_task);
}

/* Z = X^T Y. */
static xkv_status project(svd *s)
{
    return run(s, tile_count(s->cols, gemm_tile(s->cols)), project_task);
}

static void widen_rows(const float *src, size_t ld, size_t rows, size_t cols, double *dst)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            dst[r * cols + c] = src[r * ld + c];
}

/* One block row of the lower triangle. Squaring doubles the digits that small singular values need: hence f64. */
static xkv_status gram_task(void *user, uint32_t worker, uint64_t index)
{
    svd *s = user;
    double *chunk = worker_scratch(s, worker);
    size_t blocks = tile_count(s->width, s->gram_block);
    size_t first = (blocks - 1 - index) * s->gram_block; /* the longest rows first */
    size_t end = xkv_min64(first + s->gram_block, s->width);
    for (size_t r = 0; r < s->gram_rows; r += XKV_TILE_ROWS) {
        size_t count = xkv_min64(XKV_TILE_ROWS, s->gram_rows - r);
        widen_rows(s->gram_source + r * s->width, s->width, count, end, chunk);
        cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)(end - first), (int)end, (int)count, 1.0,
                    chunk + first, (int)end, chunk, (int)end, r == 0 ? 0.0 : 1.0, s->gram + first * s->width,
                    (int)s->width);
    }
    return XKV_OK;
}

/* The same with f32 products of a tile, summed up in f64: for Ritz values, whose digits below those of X are of no use.
 */
static xkv_status quick_gram_task(void *user, uint32_t worker, uint64_t index)
{
    svd *s = user;
    float *product = (float *)worker_scratch(s, worker);
    size_t first = (tile_count(s->width, s->gram_block) - 1 - index) * s->gram_block, n = s->width;
    size_t end = xkv_min64(first + s->gram_block, n);
    for (size_t r = 0; r < s->gram_rows; r += XKV_TILE_ROWS) {
        size_t count = xkv_min64(XKV_TILE_ROWS, s->gram_rows - r);
        const float *tile = s->gram_source + r * n;
        s->k->gemm_tn(end - first, end, count, tile + first, n, tile, n, 0.0f, product, end);
        for (size_t i = first; i < end; i++)
            for (size_t j = 0; j < end; j++)
                s->gram[i * n + j] = (r == 0 ? 0 : s->gram[i * n + j]) + (double)product[(i - first) * end + j];
    }
    return XKV_OK;
}

/* gram = A^T A of A [rows, width]. */
static xkv_status gram(svd *s, const float *a, size_t rows, xkv_task_fn task)
{
    s->gram_source = a;
    s->gram_rows = rows;
    s->gram_block = xkv_align64(xkv_min64(xkv_max64(s->width / 6, 32), 128), 8);
    return run(s, tile_count(s->width, s->gram_block), task);
}

/* --- Orthonormal columns ------------------------------------------------------------------------------------------ */

/* 1 / norm of column j of Z, 0 for a null column. */
static double column_scale(const svd *s, size_t j)
{
    double square = s->gram[j * s->width + j];
    return square > 0 ? 1 / sqrt(square) : 0;
}

/* transform = lower triangle of the Gram matrix of Z with its columns scaled to unit length, plus `shift` times I. */
static void scaled_gram(svd *s, double shift)
{
    size_t n = s->width;
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j <= i; j++)
            s->transform[i * n + j] = s->gram[i * n + j] * column_scale(s, i) * column_scale(s, j);
        memset(s->transform + i * n + i + 1, 0, (n - 1 - i) * sizeof *s->transform);
        s->transform[i * n + i] += shift;
    }
}

static void scale_transform(svd *s, size_t new_width)
{
    for (size_t j = 0; j < s->width; j++) {
        double scale = column_scale(s, j);
        for (size_t i = 0; i < new_width; i++)
            s->transform[i * s->width + j] *= scale;
    }
}

/* transform = L^-1 where L L^T is the scaled Gram matrix (+ shift); false when that is not positive definite. LAPACK
 * counts by columns, so that our lower triangle is its upper one. */
static bool cholesky_transform(svd *s, double shift)
{
    int n = (int)s->width, info = 0;
    scaled_gram(s, shift);
    dpotrf_("U", &n, s->transform, &n, &info, 1);
    if (info == 0)
        dtrtri_("U", "N", &n, s->transform, &n, &info, 1, 1);
    return info == 0;
}

/* The shift that makes Cholesky succeed (Fukaya et al. 2020, equation 4.3); squared norm of scaled Z <= width. */
static double safe_shift(const svd *s)
{
    double m = (double)s->cols, n = (double)s->width;
    return 11 * (m * n + n * (n + 1)) * (DBL_EPSILON / 2) * n;
}

/* transform = Q^T / sqrt(eigenvalue) from the eigenvectors of the scaled Gram matrix, without those of null columns
 * (Stathopoulos and Wu 2002). */
static xkv_status eigen_transform(svd *s, size_t *new_width)
{
    size_t n = s->width, kept = 0;
    scaled_gram(s, 0);
    XKV_TRY(xkv_syevd(s->ctx, (uint32_t)n, s->transform, s->values));
    double least = s->values[n - 1] * (double)n * 8 * DBL_EPSILON;
    for (size_t j = 0; j < n; j++) {
        if (!(s->values[j] > least))
            continue;
        for (size_t i = 0; i < n; i++)
            s->transform[kept * n + i] = s->transform[j * n + i] / sqrt(s->values[j]);
        kept++;
    }
    *new_width = kept;
    return kept > 0 ? XKV_OK : xkv_fail(s->ctx, XKV_ERROR_BACKEND, "subspace iteration lost all columns");
}

static double largest_row_norm(const svd *s)
{
    double largest = 0;
    for (size_t i = 0; i < s->width; i++) {
        const double *row = s->transform + i * s->width;
        largest = fmax(largest, cblas_ddot((int)s->width, row, 1, row, 1));
    }
    return largest;
}

/* One pass of Cholesky-QR. */
typedef struct qr_pass {
    svd *s;
    size_t new_width;
    bool triangular;  /* the transform */
    bool orthonormal; /* its result, to rounding */
} qr_pass;

static xkv_status find_transform(qr_pass *p, bool first)
{
    svd *s = p->s;
    p->new_width = s->width;
    p->triangular = true;
    if (cholesky_transform(s, 0)) {
        p->orthonormal = largest_row_norm(s) <= MAX_TRANSFORM;
    } else if (!first || !cholesky_transform(s, safe_shift(s))) {
        p->triangular = false;
        XKV_TRY(eigen_transform(s, &p->new_width));
    }
    scale_transform(s, p->new_width);
    return XKV_OK;
}

static void narrow(const double *src, size_t n, double scale, float *dst)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = (float)(src[i] * scale);
}

/* Rows of V = Z transform^T, in f64. The triangle is used in steps of 96 columns. */
static xkv_status transform_task(void *user, uint32_t worker, uint64_t index)
{
    const qr_pass *p = user;
    svd *s = p->s;
    size_t first = index * TRANSFORM_ROWS, count = xkv_min64(TRANSFORM_ROWS, s->cols - first);
    size_t n = s->width, step = p->triangular ? 96 : p->new_width;
    double *in = worker_scratch(s, worker), *out = in + count * n;
    widen_rows(s->z + first * n, n, count, n, in);
    for (size_t j = 0; j < p->new_width; j += step) {
        size_t columns = xkv_min64(step, p->new_width - j), inner = p->triangular ? j + columns : n;
        cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)count, (int)columns, (int)inner, 1.0, in, (int)n,
                    s->transform + j * n, (int)n, 0.0, out + j, (int)p->new_width);
    }
    narrow(out, count * p->new_width, s->scale, s->v + first * p->new_width);
    return XKV_OK;
}

/* V = scale * (orthonormal columns that span those of Z), by Cholesky-QR; Z is lost. The rounding error of an element
 * of V^T V is about the unit roundoff times the product of two row norms of the transform. While that is not small, or
 * the Gram matrix had to be shifted or cut, the pass is repeated on its result. */
static xkv_status orthonormalise(svd *s)
{
    for (uint32_t i = 0; i < MAX_QR_PASSES; i++) {
        qr_pass p = {.s = s};
        XKV_TRY(gram(s, s->z, s->cols, gram_task));
        XKV_TRY(find_transform(&p, i == 0));
        XKV_TRY(xkv_pool_run(s->ctx, s->pool, tile_count(s->cols, TRANSFORM_ROWS), transform_task, &p));
        s->width = p.new_width;
        if (p.orthonormal)
            return XKV_OK;
        float *swap = s->z;
        s->z = s->v;
        s->v = swap;
    }
    return xkv_fail(s->ctx, XKV_ERROR_BACKEND, "Cholesky-QR did not converge in %u passes", MAX_QR_PASSES);
}

/* --- The block ---------------------------------------------------------------------------------------------------- */

static uint64_t mix64(uint64_t x) /* splitmix64's */
{
    x = (x + RANDOM_SEED) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* dst[c * ld + r] = src[r * cols + c], in squares that fit the cache. */
static void transpose(const float *src, size_t rows, size_t cols, float *dst, size_t ld)
{
    enum { SIDE = 16 };
    for (size_t r0 = 0; r0 < rows; r0 += SIDE)
        for (size_t c0 = 0; c0 < cols; c0 += SIDE)
            for (size_t c = c0; c < xkv_min64(c0 + SIDE, cols); c++)
                for (size_t r = r0; r < xkv_min64(r0 + SIDE, rows); r++)
                    dst[c * ld + r] = src[r * cols + c];
}

/* Columns of Z from `old_width` on, for the block starts with columns that are known. */
typedef struct sketch {
    svd *s;
    const float *old; /* [cols, old_width] */
    size_t old_width;
} sketch;

static void add_scaled(float *restrict sum, const float *restrict x, size_t n, float scale)
{
    for (size_t c = 0; c < n; c++)
        sum[c] += scale * x[c];
}

/* Add row t of X, with random signs, to SKETCH_ENTRIES of the sums. The first follows the row number, so that no sum
 * stays empty; the others and the signs are bits of a hash, hence the same on every machine. */
static void sketch_row(const float *x, size_t n, uint64_t t, uint64_t seed, size_t sums, float *tile)
{
    uint64_t bits = mix64(seed ^ t);
    for (size_t i = 0; i < SKETCH_ENTRIES; i++, bits >>= 16) {
        size_t place = i == 0 ? t % sums : (bits & 0x7fff) * sums >> 15;
        add_scaled(tile + place * n, x, n, bits & 0x8000 ? 1.0f : -1.0f);
    }
}

/* Ask for a piece of a row before its turn: pieces of rows are too short for the processor to see the pattern. */
static void prefetch(const float *x, size_t n)
{
    for (size_t c = 0; c < n; c += 16)
        __builtin_prefetch(x + c);
}

static xkv_status sketch_task(void *user, uint32_t worker, uint64_t index)
{
    const sketch *k = user;
    svd *s = k->s;
    size_t first = index * TRANSFORM_ROWS, count = xkv_min64(TRANSFORM_ROWS, s->cols - first);
    size_t sums = s->width - k->old_width;
    float *tile = (float *)worker_scratch(s, worker);
    memset(tile, 0, sums * count * sizeof *tile);
    for (size_t t = 0; t < s->rows; t++) {
        if (t + PREFETCH_ROWS < s->rows)
            prefetch(s->x + (t + PREFETCH_ROWS) * s->cols + first, count);
        sketch_row(s->x + t * s->cols + first, count, t, (uint64_t)s->width << 32, sums, tile);
    }
    for (size_t r = 0; r < count && k->old_width > 0; r++)
        memcpy(s->z + (first + r) * s->width, k->old + (first + r) * k->old_width, k->old_width * sizeof *s->z);
    transpose(tile, sums, count, s->z + first * s->width + k->old_width, s->width);
    return XKV_OK;
}

static void release_block(svd *s)
{
    xkv_release(s->ctx, s->v);
    xkv_release(s->ctx, s->y);
    xkv_release(s->ctx, s->z);
    xkv_release(s->ctx, s->gram);
    xkv_release(s->ctx, s->transform);
    xkv_release(s->ctx, s->values);
    xkv_release(s->ctx, s->scratch);
    s->v = s->y = s->z = NULL;
    s->gram = s->transform = s->values = s->scratch = NULL;
}

static xkv_status allocate_block(svd *s, size_t width)
{
    s->width = s->allocated = width;
    XKV_TRY(XKV_NEW(s->ctx, s->cols * width, &s->v));
    XKV_TRY(XKV_NEW(s->ctx, s->rows * width, &s->y));
    XKV_TRY(XKV_NEW(s->ctx, s->cols * width, &s->z));
    XKV_TRY(XKV_NEW(s->ctx, width * width, &s->gram));
    XKV_TRY(XKV_NEW(s->ctx, width * width, &s->transform));
    XKV_TRY(XKV_NEW(s->ctx, width, &s->values));
    return XKV_NEW(s->ctx, xkv_pool_threads(s->pool) * width * XKV_TILE_ROWS, &s->scratch);
}

/* Make room for `width` columns and start with those found so far and X^T S, where S is a sparse random matrix of signs
 * (Tropp, Yurtsever, Udell and Cevher 2019, arXiv 1902.08651, section 3.3): as good as a Gaussian one at the price of
 * reading X. A block that will be as wide as X is high or wide needs no start. */
static xkv_status start_block(svd *s, size_t width)
{
    xkv_status status = XKV_OK;
    sketch k = {s, s->v, s->width};
    float *old = s->v;
    s->v = NULL;
    release_block(s);
    XKV_TRY_GOTO(allocate_block(s, width), out);
    if (width == s->rows || width == s->cols)
        goto out;
    XKV_TRY_GOTO(xkv_pool_run(s->ctx, s->pool, tile_count(s->cols, TRANSFORM_ROWS), sketch_task, &k), out);
    XKV_TRY_GOTO(orthonormalise(s), out);
out:
    xkv_release(s->ctx, old);
    return status;
}

/* m = scale * identity of order width. */
static void set_identity(const svd *s, float *m)
{
    memset(m, 0, s->width * s->width * sizeof *m);
    for (size_t i = 0; i < s->width; i++)
        m[i * s->width + i] = (float)s->scale;
}

/* Find V. A block as wide as X is high or wide holds its whole row space at once: nothing to iterate. */
static xkv_status find_subspace(svd *s, uint32_t iterations)
{
    if (s->width == s->cols) {
        set_identity(s, s->v);
        return XKV_OK;
    }
    bool complete = s->width == s->rows;
    for (uint32_t i = 0; i < (complete ? 1 : iterations); i++) {
        if (complete)
            set_identity(s, s->y);
        else
            XKV_TRY(multiply(s));
        XKV_TRY(project(s));
        XKV_TRY(orthonormalise(s));
    }
    return XKV_OK;
}

/* Rayleigh-Ritz: eigenvectors of (X V)^T (X V) in the rows of gram, values ascending. */
static xkv_status rayleigh_ritz(svd *s)
{
    XKV_TRY(multiply(s));
    XKV_TRY(gram(s, s->y, s->rows, quick_gram_task));
    return xkv_syevd(s->ctx, (uint32_t)s->width, s->gram, s->values);
}

/* The j-th largest Ritz value, that of the unscaled X. */
static double ritz_value(const svd *s, size_t j)
{
    return fmax(s->values[s->width - 1 - j], 0) / (s->scale * s->scale);
}

/* --- Rank --------------------------------------------------------------------------------------------------------- */

/* With oversampling, and a multiple of 16, up to which GEMM's vector kernels make columns nearly free. */
size_t xkv_svd_block_width(size_t rank)
{
    return xkv_align64(rank + xkv_max64(8, rank / 8), 16);
}

/* Smallest rank whose Ritz values sum up to `wanted`, width + 1 if none does. */
static size_t rank_for(const svd *s, double wanted)
{
    double sum = 0;
    for (size_t j = 0; j < s->width; j++) {
        sum += ritz_value(s, j);
        if (sum >= wanted)
            return j + 1;
    }
    return s->width + 1;
}

static xkv_status solve_for_rank(svd *s, size_t rank, const xkv_svd_options *options)
{
    XKV_TRY(start_block(s, xkv_min64(xkv_svd_block_width(rank), xkv_min64(s->rows, s->cols))));
    XKV_TRY(find_subspace(s, options->iterations));
    XKV_TRY(rayleigh_ritz(s));
    s->result.rank = (uint32_t)xkv_min64(rank, s->width);
    return XKV_OK;
}

/* Widen the block until it holds the rank that keeps the wanted energy, with the usual oversampling. */
static xkv_status solve_for_energy(svd *s, size_t max_rank, const xkv_svd_options *options)
{
    size_t smaller = xkv_min64(s->rows, s->cols), limit = xkv_min64(smaller, xkv_svd_block_width(max_rank));
    size_t width = xkv_min64(xkv_max64(ENERGY_START, smaller / 8), limit), rank;
    for (;;) {
        XKV_TRY(start_block(s, width));
        XKV_TRY(find_subspace(s, options->iterations));
        XKV_TRY(rayleigh_ritz(s));
        rank = rank_for(s, options->energy * s->energy);
        /* Enough when oversampled as usual, or when null columns were dropped, which leaves little to be found. */
        bool reached = rank <= s->width;
        if (width == limit || (reached && (xkv_svd_block_width(rank) <= s->width || s->width < width)))
            break;
        width = xkv_min64(reached ? xkv_svd_block_width(rank) : 2 * width, limit);
    }
    s->result.rank = (uint32_t)xkv_min64(xkv_min64(rank, s->width), max_rank);
    return XKV_OK;
}

static void drop_null_components(svd *s)
{
    while (s->result.rank > 1 && ritz_value(s, s->result.rank - 1) <= NULL_RATIO * ritz_value(s, 0))
        s->result.rank--;
}

/* --- Result ------------------------------------------------------------------------------------------------------- */

/* Rows of A = Y W. */
static xkv_status coefficients_task(void *user, uint32_t worker, uint64_t index)
{
    svd *s = user;
    size_t first = index * XKV_TILE_ROWS, count = xkv_min64(XKV_TILE_ROWS, s->rows - first);
    size_t rank = s->result.rank;
    (void)worker;
    s->k->gemm_nn(count, rank, s->width, s->y + first * s->width, s->width, s->z, rank, 0.0f,
                  s->result.coefficients + first * rank, rank);
    return XKV_OK;
}

/* Columns of B = (V W)^T. */
static xkv_status components_task(void *user, uint32_t worker, uint64_t index)
{
    svd *s = user;
    size_t first = index * XKV_TILE_ROWS, count = xkv_min64(XKV_TILE_ROWS, s->cols - first);
    size_t rank = s->result.rank;
    float *tile = (float *)worker_scratch(s, worker);
    s->k->gemm_nn(count, rank, s->width, s->v + first * s->width, s->width, s->z, rank, 0.0f, tile, rank);
    transpose(tile, count, rank, s->result.components + first, s->cols);
    return XKV_OK;
}

/* W [width, rank]: eigenvectors by falling value as columns, with the scale of V and Y taken back. Kept in z. */
static void set_weights(svd *s)
{
    size_t n = s->width, rank = s->result.rank;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < rank; j++)
            s->z[i * rank + j] = (float)(s->gram[(n - 1 - j) * n + i] / s->scale);
}

static xkv_status allocate_result(svd *s)
{
    xkv_svd_result *r = &s->result;
    r->energy = s->energy;
    XKV_TRY(XKV_NEW(s->ctx, r->rank * s->cols, &r->components));
    XKV_TRY(XKV_NEW(s->ctx, s->rows * r->rank, &r->coefficients));
    return XKV_NEW(s->ctx, r->rank, &r->singular_values);
}

static xkv_status make_result(svd *s)
{
    XKV_TRY(allocate_result(s));
    for (size_t j = 0; j < s->result.rank; j++) {
        s->result.singular_values[j] = (float)sqrt(ritz_value(s, j));
        s->result.captured += ritz_value(s, j);
    }
    set_weights(s);
    XKV_TRY(run(s, tile_count(s->rows, XKV_TILE_ROWS), coefficients_task));
    return run(s, tile_count(s->cols, XKV_TILE_ROWS), components_task);
}

/* Of a zero matrix: one component, the first unit vector. */
static xkv_status make_zero_result(svd *s)
{
    s->result.rank = 1;
    XKV_TRY(allocate_result(s));
    memset(s->result.components, 0, s->cols * sizeof(float));
    s->result.components[0] = 1;
    memset(s->result.coefficients, 0, s->rows * sizeof(float));
    s->result.singular_values[0] = 0;
    return XKV_OK;
}

static xkv_status check_arguments(const svd *s, const xkv_svd_options *o)
{
    if (s->rows == 0 || s->cols == 0)
        return xkv_fail(s->ctx, XKV_ERROR_ARGUMENT, "SVD of an empty matrix");
    if (s->rows > INT_MAX || s->cols > INT_MAX)
        return xkv_fail(s->ctx, XKV_ERROR_LIMIT, "SVD of %zu x %zu; BLAS counts to %d", s->rows, s->cols, INT_MAX);
    if (o->iterations < 1 || o->iterations > 8)
        return xkv_fail(s->ctx, XKV_ERROR_ARGUMENT, "power iterations %u; 1 .. 8 expected", o->iterations);
    if (!(o->energy >= 0 && o->energy <= 1) || (o->energy == 0 && o->rank == 0))
        return xkv_fail(s->ctx, XKV_ERROR_ARGUMENT, "rank %u, energy %g; expected rank >= 1 or 0 < energy <= 1",
                        o->rank, o->energy);
    return XKV_OK;
}

/* Choose the scale from the norm of X. */
static xkv_status choose_scale(svd *s)
{
    int exponent;
    if (!isfinite(s->energy))
        return xkv_fail(s->ctx, XKV_ERROR_ARGUMENT, "SVD of a matrix with NaN or Inf");
    frexp(sqrt(s->energy), &exponent);
    if (exponent > MAX_EXPONENT)
        return xkv_fail(s->ctx, XKV_ERROR_ARGUMENT, "SVD of a matrix of norm %g, beyond 2^%d", sqrt(s->energy),
                        MAX_EXPONENT);
    s->scale = ldexp(1, -(int)fmax(exponent, -MAX_EXPONENT));
    return XKV_OK;
}

static xkv_status solve(svd *s, const xkv_svd_options *o)
{
    size_t most = xkv_min64(s->rows, s->cols);
    if (o->max_rank > 0)
        most = xkv_min64(most, o->max_rank);
    XKV_TRY(check_arguments(s, o));
    XKV_TRY(measure_energy(s));
    XKV_TRY(choose_scale(s));
    if (s->energy == 0)
        return make_zero_result(s);
    if (o->energy > 0)
        XKV_TRY(solve_for_energy(s, most, o));
    else
        XKV_TRY(solve_for_rank(s, xkv_min64(o->rank, most), o));
    drop_null_components(s);
    return make_result(s);
}

xkv_status xkv_svd(xkv_ctx *ctx, xkv_pool *pool, const xkv_kernels *k, const float *x, size_t rows, size_t cols,
                   const xkv_svd_options *options, xkv_svd_result *result)
{
    svd s = {.ctx = ctx, .pool = pool, .k = k, .x = x, .rows = rows, .cols = cols, .energy = options->total};
    xkv_status status = solve(&s, options);
    release_block(&s);
    xkv_release(ctx, s.tile_energy);
    if (status == XKV_OK)
        *result = s.result;
    else
        xkv_svd_result_free(ctx, &s.result);
    return status;
}

void xkv_svd_result_free(xkv_ctx *ctx, xkv_svd_result *result)
{
    xkv_release(ctx, result->components);
    xkv_release(ctx, result->coefficients);
    xkv_release(ctx, result->singular_values);
    memset(result, 0, sizeof *result);
}
