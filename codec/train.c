#include "coded.h"
#include "parts.h"
#include "plan.h"
#include "values.h"

#include <math.h>
#include <stdlib.h>

/* The rounding of a component adds noise to every row it is used for. With steps of this size, in units of
 * step / (sigma sqrt(width)), all components together add PRECISION^2 = 3.6 % to the quantizer's own noise. */
#define PRECISION 0.19
/* Components whose deviation is below this share of the step are rounded as if it were that. */
#define SMALLEST_RATIO 0.5
/* Of the eigenproblem of the cross stage, whose time grows with the cube. */
enum { MAX_CROSS_WIDTH = 16384 };
/* Taken off the covariances between planes, and between groups in the cross stage: what few rows do not span is then
 * ordered by the planes' own covariances, which are 2 to 4 % less error from 400 rows on a width of 1024 to 1536. More
 * of it costs: what planes have in common is real, and 10 % make the error 5 % larger. */
#define PRIOR 0.005
/* Added to the diagonal of a metric, in units of its mean: no direction is free. */
#define RIDGE 0.02
/* Without a metric: planes are divided by their deviation, and keys weigh more. */
#define KEY_WEIGHT 1.4

/* A cache with the planes that are coded only: those of the dictionary, numbered alike. */
typedef struct source {
    xkv_geometry geometry;
    xkv_view *views;
    xkv_rotator rotator; /* of its own: positions differ */
} source;

typedef struct trainer {
    xkv_ctx *ctx;
    const xkv_kernels *kernels;
    xkv_train_options o;
    const xkv_cache *const *caches;
    uint32_t cache_count;
    xkv_pool *pool;
    source *sources; /* [caches] */
    xkv_container c; /* of the dictionary */
    xkv_container_writer w;
    uint64_t rows;         /* training rows: all tokens but sinks */
    float **blocks;        /* [plane_count] metric blocks of its heads, as a reader will see them */
    float **stored_scales; /* [plane_count][heads] */
    uint16_t **stored;     /* [plane_count] f16 of the blocks */
    float **leading;       /* [group_count] rows that make the coefficients which the cross stage takes; NULL: none */
    double unit;
    uint64_t done, total; /* rows times planes, for progress */
} trainer;

static xkv_status report_progress(trainer *t, uint64_t work)
{
    t->done += work;
    if (t->o.progress && t->o.progress(t->o.progress_user, t->done, t->total) != 0)
        return xkv_fail(t->ctx, XKV_ERROR_CANCELLED, "stopped by the progress callback");
    return xkv_check_cancel(t->ctx);
}

/* --- Rows of the training set ------------------------------------------------------------------------------------- */

/* Calls `use` with tiles of at most XKV_TILE_ROWS rows of the group's planes, K before RoPE. */
typedef xkv_status (*tile_fn)(void *user, const float *x, uint32_t rows);

static xkv_status check_finite(const trainer *t, uint32_t cache, const float *x, size_t n)
{
    if (t->kernels->all_finite(XKV_F32, x, n))
        return XKV_OK;
    return xkv_fail(t->ctx, XKV_ERROR_ARGUMENT,
                    "cache %u holds a NaN or an infinity: a dictionary cannot be trained on it", cache);
}

static xkv_status each_tile(trainer *t, const xkv_group *g, float *x, tile_fn use, void *user)
{
    for (uint32_t i = 0; i < t->cache_count; i++) {
        source *s = &t->sources[i];
        uint32_t n = s->geometry.token_count, t1;
        for (uint32_t t0 = t->o.sinks; t0 < n; t0 = t1) {
            t1 = (uint32_t)xkv_min64(n, (uint64_t)t0 + XKV_TILE_ROWS);
            XKV_TRY(xkv_gather_rows(t->ctx, &s->rotator, g, s->views, t0, t1, x));
            XKV_TRY(check_finite(t, i, x, (size_t)(t1 - t0) * g->width));
            XKV_TRY(use(user, x, t1 - t0));
            XKV_TRY(report_progress(t, (uint64_t)(t1 - t0) * g->plane_count));
        }
    }
    return XKV_OK;
}

/* --- Covariances -------------------------------------------------------------------------------------------------- */

enum { COLUMN_BLOCK = 256, FLUSH_TILES = 16 };

/* Mean and covariance of rows, accumulated around the mean of the first tile: a large mean would drown the rest in f32.
 */
typedef struct moments {
    trainer *t;
    size_t width;
    float *shift;
    double *sum;   /* [width] of x - shift */
    float *tile;   /* [width][width] products since the last flush */
    double *total; /* [width][width] */
    uint32_t tiles;
    uint64_t rows;
    float *x; /* the shifted tile */
    uint32_t n;
} moments;

static xkv_status moments_init(trainer *t, size_t width, moments *m)
{
    *m = (moments){.t = t, .width = width};
    XKV_TRY(XKV_NEW(t->ctx, width, &m->shift));
    XKV_TRY(XKV_NEW_ZERO(t->ctx, width, &m->sum));
    XKV_TRY(XKV_NEW_ZERO(t->ctx, width * width, &m->tile));
    XKV_TRY(XKV_NEW_ZERO(t->ctx, width * width, &m->total));
    return XKV_OK;
}

static void moments_free(moments *m)
{
    xkv_release(m->t->ctx, m->shift);
    xkv_release(m->t->ctx, m->sum);
    xkv_release(m->t->ctx, m->tile);
    xkv_release(m->t->ctx, m->total);
}

static void set_shift(moments *m, const float *x, uint32_t rows)
{
    for (size_t i = 0; i < m->width; i++) {
        double sum = 0;
        for (size_t t = 0; t < rows; t++)
            sum += (double)x[t * m->width + i];
        m->shift[i] = (float)(sum / rows);
    }
}

static xkv_status multiply_block(void *user, uint32_t worker, uint64_t block)
{
    moments *m = user;
    size_t first = (size_t)block * COLUMN_BLOCK, n = (size_t)xkv_min64(COLUMN_BLOCK, m->width - first);

    (void)worker;
    m->t->kernels->gemm_tn(m->width, n, m->n, m->x, m->width, m->x + first, m->width, 1, m->tile + first, m->width);
    return XKV_OK;
}

static void flush(moments *m)
{
    for (size_t i = 0; i < m->width * m->width; i++)
        m->total[i] += (double)m->tile[i];
    memset(m->tile, 0, m->width * m->width * sizeof *m->tile);
    m->tiles = 0;
}

static xkv_status add_tile(void *user, const float *tile, uint32_t rows)
{
    moments *m = user;

    m->x = (float *)(uintptr_t)tile; /* the tile is scratch: shifted in place */
    m->n = rows;
    if (m->rows == 0)
        set_shift(m, tile, rows);
    for (size_t t = 0; t < rows; t++)
        for (size_t i = 0; i < m->width; i++) {
            m->x[t * m->width + i] -= m->shift[i];
            m->sum[i] += (double)m->x[t * m->width + i];
        }
    XKV_TRY(xkv_pool_run(m->t->ctx, m->t->pool, xkv_ceil_div(m->width, COLUMN_BLOCK), multiply_block, m));
    m->rows += rows;
    if (++m->tiles == FLUSH_TILES)
        flush(m);
    return XKV_OK;
}

/* total becomes the covariance, shift the mean. */
static void finish(moments *m)
{
    double n = (double)m->rows;

    flush(m);
    for (size_t i = 0; i < m->width; i++)
        for (size_t k = 0; k < m->width; k++)
            m->total[i * m->width + k] = m->total[i * m->width + k] / n - m->sum[i] / n * (m->sum[k] / n);
    for (size_t i = 0; i < m->width; i++)
        m->shift[i] += (float)(m->sum[i] / n);
}

/* Columns [first, first + n) are a block: shrink its covariances with all others. */
static void shrink_block(moments *m, size_t first, size_t n)
{
    for (size_t i = first; i < first + n; i++)
        for (size_t k = 0; k < m->width; k++)
            if (k < first || k >= first + n)
                m->total[i * m->width + k] *= 1 - PRIOR;
}

static xkv_status measure_moments(trainer *t, const xkv_group *g, moments *m)
{
    float *x = NULL;
    size_t first = 0;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(moments_init(t, g->width, m), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, (size_t)XKV_TILE_ROWS * g->width, &x), out);
    XKV_TRY_GOTO(each_tile(t, g, x, add_tile, m), out);
    finish(m);
    for (uint32_t i = 0; i < g->plane_count; first += xkv_plane_width(&t->c.geometry.planes[g->planes[i++]]))
        shrink_block(m, first, xkv_plane_width(&t->c.geometry.planes[g->planes[i]]));
out:
    xkv_release(t->ctx, x);
    return status;
}

/* --- Metric blocks ------------------------------------------------------------------------------------------------ */

/* Symmetric square root of metric + ridge into root, both [n][n]. */
static xkv_status square_root(trainer *t, const float *metric, uint32_t n, float *root)
{
    double *u = NULL, *w = NULL, trace = 0;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(XKV_NEW(t->ctx, (size_t)n * n, &u), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, n, &w), out);
    for (size_t i = 0; i < (size_t)n * n; i++)
        u[i] = (double)metric[i];
    for (size_t i = 0; i < n; i++)
        trace += u[i * n + i];
    for (size_t i = 0; i < n; i++)
        u[i * n + i] += RIDGE * trace / n;
    XKV_TRY_GOTO(xkv_syevd(t->ctx, n, u, w), out);
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k <= i; k++) {
            double sum = 0; /* eigenvectors are columns of a column-major matrix: vector j starts at u + j n */
            for (size_t j = 0; j < n; j++)
                sum += u[j * n + i] * sqrt(fmax(w[j], RIDGE * trace / n)) * u[j * n + k];
            root[i * n + k] = root[k * n + i] = (float)sum;
        }
out:
    xkv_release(t->ctx, u);
    xkv_release(t->ctx, w);
    return status;
}

/* Round a block as the dictionary stores it. */
static void store_block(trainer *t, uint32_t plane, uint32_t head, size_t elements)
{
    float *block = t->blocks[plane] + head * elements, largest = 0;
    uint16_t *stored = t->stored[plane] + head * elements;

    for (size_t i = 0; i < elements; i++)
        largest = fmaxf(largest, fabsf(block[i]));
    if (largest == 0)
        largest = 1;
    t->stored_scales[plane][head] = largest;
    for (size_t i = 0; i < elements; i++)
        block[i] /= largest;
    t->kernels->from_f32(XKV_F16, block, stored, elements);
    t->kernels->to_f32(XKV_F16, stored, block, elements);
    for (size_t i = 0; i < elements; i++)
        block[i] *= largest;
}

static const float *given_metric(const trainer *t, const xkv_plane *p, uint32_t head)
{
    const xkv_metric *m = t->o.metric;
    size_t block = (size_t)p->head_dim * p->head_dim;

    return m ? (p->kind == XKV_PLANE_V ? m->v : m->k) + ((size_t)p->layer * p->heads + head) * block : NULL;
}

/* Trace of block C block, C the covariance of one head's columns. */
static double weighed_trace(const float *block, const double *covariance, size_t n, size_t ld)
{
    double trace = 0;

    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < n; k++) {
            double row = 0;
            for (size_t j = 0; j < n; j++)
                row += covariance[k * ld + j] * (double)block[j * n + i];
            trace += (double)block[i * n + k] * row;
        }
    return trace;
}

/* Blocks of one plane, from the metric or from its variance; *trace is what it contributes to the unit. */
static xkv_status make_blocks(trainer *t, uint32_t plane, double *trace)
{
    const xkv_plane *p = &t->c.geometry.planes[plane];
    size_t n = p->head_dim, elements = n * n, width = xkv_plane_width(p);
    xkv_group single = {.plane_count = 1, .width = (uint32_t)width, .planes = &plane};
    moments m = {.t = t};
    double variance = 0;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(measure_moments(t, &single, &m), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(t->ctx, p->heads * elements, &t->blocks[plane]), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, p->heads * elements, &t->stored[plane]), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, p->heads, &t->stored_scales[plane]), out);
    for (size_t i = 0; i < width; i++)
        variance += m.total[i * width + i] / (double)width;
    for (uint32_t h = 0; h < p->heads; h++) {
        float *block = t->blocks[plane] + h * elements;
        const float *metric = given_metric(t, p, h);
        if (metric)
            XKV_TRY_GOTO(square_root(t, metric, p->head_dim, block), out);
        for (size_t i = 0; !metric && i < n; i++)
            block[i * n + i] = (float)((p->kind == XKV_PLANE_V ? 1 : KEY_WEIGHT) / sqrt(variance > 0 ? variance : 1));
        store_block(t, plane, h, elements);
        *trace += weighed_trace(block, m.total + h * n * width + h * n, n, width);
    }
out:
    moments_free(&m);
    return status;
}

static xkv_status make_all_blocks(trainer *t)
{
    uint64_t elements = 0;
    double trace = 0;

    for (uint32_t i = 0; i < t->c.geometry.plane_count; i++) {
        XKV_TRY(make_blocks(t, i, &trace));
        elements += xkv_plane_width(&t->c.geometry.planes[i]);
    }
    t->unit = sqrt(trace / (double)elements);
    if (!isfinite(t->unit))
        return xkv_fail(t->ctx, XKV_ERROR_ARGUMENT, "the values of the caches are too large: their squares overflow");
    if (t->unit <= 0)
        return xkv_fail(t->ctx, XKV_ERROR_ARGUMENT, "the caches hold the same row everywhere: nothing to train on");
    return XKV_OK;
}

/* --- Bases -------------------------------------------------------------------------------------------------------- */

/* a [width][width] = W C W, in f32; mu = mean W. */
static void weigh(const trainer *t, const xkv_group *g, const moments *m, float *a, float *half, float *mu)
{
    size_t width = g->width, row = 0;

    for (size_t i = 0; i < width * width; i++)
        a[i] = (float)m->total[i];
    for (uint32_t i = 0; i < g->plane_count; i++) { /* half = C W */
        const xkv_plane *p = &t->c.geometry.planes[g->planes[i]];
        for (uint32_t h = 0; h < p->heads; h++, row += p->head_dim) {
            const float *block = t->blocks[g->planes[i]] + (size_t)h * p->head_dim * p->head_dim;
            t->kernels->gemm_nn(width, p->head_dim, p->head_dim, a + row, width, block, p->head_dim, 0, half + row,
                                width);
            t->kernels->gemm_nn(1, p->head_dim, p->head_dim, m->shift + row, width, block, p->head_dim, 0, mu + row,
                                width);
        }
    }
    row = 0;
    for (uint32_t i = 0; i < g->plane_count; i++) { /* a = W half */
        const xkv_plane *p = &t->c.geometry.planes[g->planes[i]];
        for (uint32_t h = 0; h < p->heads; h++, row += p->head_dim) {
            const float *block = t->blocks[g->planes[i]] + (size_t)h * p->head_dim * p->head_dim;
            t->kernels->gemm_nn(p->head_dim, width, p->head_dim, block, p->head_dim, half + row * width, width, 0,
                                a + row * width, width);
        }
    }
}

/* One group's basis as it goes into the file. */
typedef struct basis_file {
    uint8_t *header;
    uint64_t header_size;
    int16_t *q; /* [rank][width] */
    uint8_t *stream;
    uint64_t stream_size;
} basis_file;

static void store_floats(uint8_t *at, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        xkv_storef32(at + 4 * i, x[i]);
}

/* Where the figures of components lie in a header. */
typedef struct component_header {
    uint64_t sigma, d, tables;
} component_header;

/* Component j: the eigenvector of the j-th largest eigenvalue, rounded. */
static void round_component(const trainer *t, component_header at, uint32_t n, const double *vector, double sigma,
                            uint32_t j, basis_file *f)
{
    double step = 2.0 / 3 * t->unit * exp2((50 - t->o.max_quality) / 16), bits;
    double d = PRECISION * step / (fmax(sigma, SMALLEST_RATIO * step) * sqrt(n));
    int16_t *q = f->q + (size_t)j * n;

    d = fmax(d, 1.0 / 32767);
    for (uint32_t i = 0; i < n; i++)
        q[i] = (int16_t)lrint(vector[i] / d);
    xkv_storef32(f->header + at.sigma + 4ull * j, (float)sigma);
    xkv_storef32(f->header + at.d + 4ull * j, (float)d);
    f->header[at.tables + j] = (uint8_t)xkv_table_choose(q, n, &bits);
}

/* All n components and their stream. vectors: eigenvectors as rows, by rising eigenvalue (columns of LAPACK's
 * column-major result). */
static xkv_status encode_components(trainer *t, component_header at, uint32_t n, const double *vectors,
                                    const double *values, basis_file *f)
{
    xkv_rans_shape shape = {n, n, n, f->header + at.tables};

    XKV_TRY(XKV_NEW(t->ctx, (size_t)n * n, &f->q));
    for (uint32_t j = 0; j < n; j++)
        round_component(t, at, n, vectors + (size_t)(n - 1 - j) * n, sqrt(fmax(values[n - 1 - j], 0)), j, f);
    XKV_TRY(XKV_NEW(t->ctx, (size_t)xkv_rans_bound(&shape), &f->stream));
    f->stream_size = xkv_rans_encode(xkv_coder_cpu(), &shape, f->q, f->stream);
    return XKV_OK;
}

static void store_group_blocks(const trainer *t, const xkv_group *g, uint8_t *at)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &t->c.geometry.planes[g->planes[i]];
        size_t elements = (size_t)p->head_dim * p->head_dim;
        for (uint32_t h = 0; h < p->heads; h++) {
            xkv_storef32(at, t->stored_scales[g->planes[i]][h]);
            memcpy(at + 4, t->stored[g->planes[i]] + h * elements, 2 * elements);
            at += 4 + 2 * elements;
        }
    }
}

static xkv_status encode_basis(trainer *t, const xkv_group *g, const double *vectors, const double *values,
                               const float *mu, basis_file *f)
{
    xkv_basis_header at = xkv_basis_layout(&t->c.geometry, g);

    XKV_TRY(XKV_NEW_ZERO(t->ctx, (size_t)at.size, &f->header));
    f->header_size = at.size;
    store_floats(f->header + at.mu, mu, g->width);
    store_group_blocks(t, g, f->header + at.blocks);
    return encode_components(t, (component_header){at.sigma, at.d, at.tables}, g->width, vectors, values, f);
}

static xkv_status write_basis(trainer *t, xkv_group *g, const basis_file *f)
{
    XKV_TRY(xkv_container_add_part(t->ctx, &t->w, &g->parts[0], f->header, f->header_size, XKV_METHOD_STORED));
    return xkv_container_add_part(t->ctx, &t->w, &g->parts[1], f->stream, f->stream_size, XKV_METHOD_CODED);
}

static void free_basis_file(trainer *t, basis_file *f)
{
    xkv_release(t->ctx, f->header);
    xkv_release(t->ctx, f->q);
    xkv_release(t->ctx, f->stream);
}

/* Leading coefficients of a group that the cross stage takes. */
static uint32_t leading_count(const trainer *t, const xkv_group *g)
{
    return (uint32_t)xkv_min64(t->o.cross, g->width);
}

/* leading [count][width] = the first components times W: what turns rows into the group's leading coefficients. */
static xkv_status keep_leading(trainer *t, const xkv_group *g, const double *vectors)
{
    size_t width = g->width, count = leading_count(t, g), column = 0;
    float *u = NULL, *rows;
    xkv_status status = XKV_OK;

    if (!t->leading)
        return XKV_OK;
    XKV_TRY(XKV_NEW(t->ctx, count * width, &t->leading[g - t->c.groups]));
    rows = t->leading[g - t->c.groups];
    XKV_TRY_GOTO(XKV_NEW(t->ctx, count * width, &u), out);
    for (size_t j = 0; j < count; j++)
        for (size_t i = 0; i < width; i++)
            u[j * width + i] = (float)vectors[(width - 1 - j) * width + i];
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &t->c.geometry.planes[g->planes[i]];
        size_t n = p->head_dim;
        for (uint32_t h = 0; h < p->heads; h++, column += n)
            t->kernels->gemm_nn(count, n, n, u + column, width, t->blocks[g->planes[i]] + h * n * n, n, 0,
                                rows + column, width);
    }
out:
    xkv_release(t->ctx, u);
    return status;
}

static xkv_status train_group(trainer *t, xkv_group *g)
{
    size_t n = g->width;
    moments m = {.t = t};
    float *a = NULL, *half = NULL, *mu = NULL;
    double *vectors, *values = NULL;
    basis_file f = {0};
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(measure_moments(t, g, &m), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, n * n, &a), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, n * n, &half), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, n, &mu), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, n, &values), out);
    weigh(t, g, &m, a, half, mu);
    vectors = m.total; /* the covariance is no longer needed */
    for (size_t i = 0; i < n * n; i++)
        vectors[i] = (double)a[i];
    XKV_TRY_GOTO(xkv_syevd(t->ctx, g->width, vectors, values), out);
    XKV_TRY_GOTO(encode_basis(t, g, vectors, values, mu, &f), out);
    XKV_TRY_GOTO(write_basis(t, g, &f), out);
    XKV_TRY_GOTO(keep_leading(t, g, vectors), out);
out:
    moments_free(&m);
    xkv_release(t->ctx, a);
    xkv_release(t->ctx, half);
    xkv_release(t->ctx, mu);
    xkv_release(t->ctx, values);
    free_basis_file(t, &f);
    return status;
}

/* --- Cross stage -------------------------------------------------------------------------------------------------- */

/* The trainer's view of the leading coefficients of all groups side by side. */
typedef struct cross_rows {
    trainer *t;
    const xkv_group *cross;
    moments m;
    float *x, *z; /* a tile of one group's rows; of the coefficients */
} cross_rows;

/* One tile of a cache; its coefficients keep the constant that the means of the rows make, which moments take off. */
static xkv_status add_cross_tile(cross_rows *r, uint32_t cache, uint32_t t0, uint32_t t1)
{
    trainer *t = r->t;
    source *s = &t->sources[cache];
    size_t at = 0;

    for (const xkv_group *g = t->c.groups; g < r->cross; g++) {
        uint32_t count = leading_count(t, g);
        XKV_TRY(xkv_gather_rows(t->ctx, &s->rotator, g, s->views, t0, t1, r->x));
        t->kernels->gemm_nt(t1 - t0, count, g->width, r->x, g->width, t->leading[g - t->c.groups], g->width, 0,
                            r->z + at, r->m.width);
        at += count;
        XKV_TRY(report_progress(t, (uint64_t)(t1 - t0) * g->plane_count));
    }
    return add_tile(&r->m, r->z, t1 - t0);
}

static xkv_status measure_cross(cross_rows *r)
{
    trainer *t = r->t;
    size_t first = 0;

    for (uint32_t i = 0; i < t->cache_count; i++) {
        uint32_t n = t->sources[i].geometry.token_count, t1;
        for (uint32_t t0 = t->o.sinks; t0 < n; t0 = t1) {
            t1 = (uint32_t)xkv_min64(n, (uint64_t)t0 + XKV_TILE_ROWS);
            XKV_TRY(add_cross_tile(r, i, t0, t1));
        }
    }
    finish(&r->m);
    for (const xkv_group *g = t->c.groups; g < r->cross; first += leading_count(t, g++))
        shrink_block(&r->m, first, leading_count(t, g));
    return XKV_OK;
}

static xkv_status encode_cross(trainer *t, const xkv_group *cross, const double *vectors, const double *values,
                               basis_file *f)
{
    xkv_cross_header at = xkv_cross_layout(t->c.group_count, cross);

    XKV_TRY(XKV_NEW_ZERO(t->ctx, (size_t)at.size, &f->header));
    f->header_size = at.size;
    for (uint32_t i = 0; i < t->c.group_count - 1; i++)
        xkv_store32(f->header + at.counts + 4ull * i, leading_count(t, &t->c.groups[i]));
    return encode_components(t, (component_header){at.sigma, at.d, at.tables}, cross->rank, vectors, values, f);
}

static xkv_status train_cross(trainer *t, xkv_group *cross)
{
    cross_rows r = {.t = t, .cross = cross};
    double *values = NULL;
    basis_file f = {0};
    size_t widest = 0;
    xkv_status status = XKV_OK;

    for (const xkv_group *g = t->c.groups; g < cross; g++)
        widest = (size_t)xkv_max64(widest, g->width);
    r.m.t = t;
    XKV_TRY_GOTO(moments_init(t, cross->rank, &r.m), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, XKV_TILE_ROWS * widest, &r.x), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, (size_t)XKV_TILE_ROWS * cross->rank, &r.z), out);
    XKV_TRY_GOTO(XKV_NEW(t->ctx, cross->rank, &values), out);
    XKV_TRY_GOTO(measure_cross(&r), out);
    XKV_TRY_GOTO(xkv_syevd(t->ctx, cross->rank, r.m.total, values), out);
    XKV_TRY_GOTO(encode_cross(t, cross, r.m.total, values, &f), out);
    XKV_TRY_GOTO(write_basis(t, cross, &f), out);
out:
    moments_free(&r.m);
    xkv_release(t->ctx, r.x);
    xkv_release(t->ctx, r.z);
    xkv_release(t->ctx, values);
    free_basis_file(t, &f);
    return status;
}

/* --- The whole ---------------------------------------------------------------------------------------------------- */

static bool same_rope(const xkv_rope *a, const xkv_rope *b)
{
    return a->n_rot == b->n_rot && a->offset == b->offset && a->style == b->style && a->scale == b->scale &&
           memcmp(a->inv_freq, b->inv_freq, a->n_rot / 2 * sizeof *a->inv_freq) == 0;
}

/* All caches come from one model: same planes, and rows rotated with the same frequencies. */
static xkv_status check_caches(const trainer *t)
{
    const xkv_geometry *first = xkv_cache_geometry(t->caches[0]);

    for (uint32_t i = 0; i < t->cache_count; i++) {
        const xkv_geometry *g = xkv_cache_geometry(t->caches[i]);
        bool same = g->plane_count == first->plane_count && g->rope_count == first->rope_count;
        if (same && g->plane_count > 0) /* an opaque cache has no array */
            same = memcmp(g->planes, first->planes, g->plane_count * sizeof *g->planes) == 0;
        for (uint32_t k = 0; same && k < g->rope_count; k++)
            same = same_rope(&g->ropes[k], &first->ropes[k]);
        if (!same)
            return xkv_fail(t->ctx, XKV_ERROR_ARGUMENT, "cache %u has other planes, or other RoPE, than cache 0", i);
    }
    return XKV_OK;
}

/* The planes that are coded: all but MLA's rotated part, which is kept exact. */
static xkv_status set_geometry(trainer *t)
{
    const xkv_geometry *g = xkv_cache_geometry(t->caches[0]);
    xkv_plane *planes;

    XKV_TRY(XKV_NEW(t->ctx, g->plane_count, &planes));
    t->c.geometry =
        (xkv_geometry){.layer_count = g->layer_count, .rope_count = g->rope_count, .ropes = g->ropes, .planes = planes};
    for (uint32_t i = 0; i < g->plane_count; i++)
        if (g->planes[i].kind != XKV_PLANE_K_ROPE)
            planes[t->c.geometry.plane_count++] = g->planes[i];
    for (uint32_t i = 0; i < t->cache_count; i++) {
        uint32_t n = xkv_cache_geometry(t->caches[i])->token_count;
        t->rows += n > t->o.sinks ? n - t->o.sinks : 0;
    }
    if (t->rows < 2 || t->c.geometry.plane_count == 0)
        return xkv_fail(t->ctx, XKV_ERROR_ARGUMENT, "the caches hold %llu rows behind their sinks: nothing to train on",
                        (unsigned long long)t->rows);
    t->total = 2 * t->rows * t->c.geometry.plane_count;
    return XKV_OK;
}

static xkv_status check_metric(const trainer *t)
{
    const xkv_geometry *g = &t->c.geometry;
    const xkv_metric *m = t->o.metric;

    if (!m)
        return XKV_OK;
    if (m->layers != g->layer_count)
        return xkv_fail(t->ctx, XKV_ERROR_MISMATCH, "the metric has %u layers, the caches %u", m->layers,
                        g->layer_count);
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &g->planes[i];
        if (p->heads != m->heads || p->head_dim != m->head_dim)
            return xkv_fail(t->ctx, XKV_ERROR_MISMATCH,
                            "layer %u, %s: the metric has %u heads of %u elements, the caches %u of %u", p->layer,
                            xkv_plane_kind_name(p->kind), m->heads, m->head_dim, p->heads, p->head_dim);
    }
    return XKV_OK;
}

/* The cross stage comes last; the planner has left room for it. */
static xkv_status add_cross_group(trainer *t)
{
    xkv_group *cross = &t->c.groups[t->c.group_count];
    uint64_t width = 0;

    for (const xkv_group *g = t->c.groups; g < cross; g++)
        width += leading_count(t, g);
    if (width > MAX_CROSS_WIDTH)
        return xkv_fail(t->ctx, XKV_ERROR_ARGUMENT,
                        "cross: %u coefficients of %u groups are %llu, at most %d can be trained", t->o.cross,
                        t->c.group_count, (unsigned long long)width, MAX_CROSS_WIDTH);
    *cross = (xkv_group){.codec = XKV_GROUP_CROSS_BASIS, .rank = (uint32_t)width, .part_count = 2};
    t->c.group_count++;
    t->total += t->rows * t->c.geometry.plane_count;
    XKV_TRY(XKV_NEW_ZERO(t->ctx, cross->part_count, &cross->parts));
    return XKV_NEW_ZERO(t->ctx, t->c.group_count, &t->leading);
}

/* The planner forms the groups; they become bases of full rank. */
static xkv_status form_groups(trainer *t)
{
    xkv_pack_options o = xkv_pack_options_default();
    uint8_t *nonfinite;
    xkv_status status;

    o.profile = XKV_PROFILE_LOSSLESS;
    o.group_layers = t->o.group_layers;
    XKV_TRY(XKV_NEW_ZERO(t->ctx, t->c.geometry.plane_count, &nonfinite));
    status = xkv_plan_groups(t->ctx, &o, !t->o.apart, nonfinite, &t->c);
    xkv_release(t->ctx, nonfinite);
    XKV_TRY(status);
    for (uint32_t i = 0; i < t->c.group_count; i++) {
        t->c.groups[i].codec = XKV_GROUP_BASIS;
        t->c.groups[i].rank = t->c.groups[i].width;
    }
    return t->o.cross > 0 && t->c.group_count > 1 ? add_cross_group(t) : XKV_OK;
}

static xkv_status init_source(trainer *t, const xkv_cache *cache, source *s)
{
    const xkv_geometry *g = xkv_cache_geometry(cache);
    uint32_t n = 0;

    XKV_TRY(XKV_NEW(t->ctx, t->c.geometry.plane_count, &s->views));
    for (uint32_t i = 0; i < g->plane_count; i++)
        if (g->planes[i].kind != XKV_PLANE_K_ROPE)
            s->views[n++] = xkv_cache_views(cache)[i];
    s->geometry = *g;
    s->geometry.planes = t->c.geometry.planes;
    s->geometry.plane_count = n;
    return xkv_rotator_init(t->ctx, &s->geometry, t->kernels, true, &s->rotator);
}

static xkv_status init(trainer *t)
{
    uint32_t planes;

    XKV_TRY(check_caches(t));
    XKV_TRY(set_geometry(t));
    XKV_TRY(check_metric(t));
    planes = t->c.geometry.plane_count;
    XKV_TRY(form_groups(t));
    XKV_TRY(xkv_pool_create(t->ctx, xkv_ctx_threads(t->ctx), &t->pool));
    XKV_TRY(XKV_NEW_ZERO(t->ctx, t->cache_count, &t->sources));
    for (uint32_t i = 0; i < t->cache_count; i++)
        XKV_TRY(init_source(t, t->caches[i], &t->sources[i]));
    XKV_TRY(XKV_NEW_ZERO(t->ctx, planes, &t->blocks));
    XKV_TRY(XKV_NEW_ZERO(t->ctx, planes, &t->stored));
    return XKV_NEW_ZERO(t->ctx, planes, &t->stored_scales);
}

static void fini(trainer *t)
{
    for (uint32_t i = 0; i < t->c.geometry.plane_count; i++) {
        if (t->blocks)
            xkv_release(t->ctx, t->blocks[i]);
        if (t->stored)
            xkv_release(t->ctx, t->stored[i]);
        if (t->stored_scales)
            xkv_release(t->ctx, t->stored_scales[i]);
    }
    for (uint32_t i = 0; t->sources && i < t->cache_count; i++) {
        xkv_release(t->ctx, t->sources[i].views);
        if (t->sources[i].rotator.geometry)
            xkv_rotator_free(t->ctx, &t->sources[i].rotator);
    }
    for (uint32_t i = 0; t->leading && i < t->c.group_count; i++)
        xkv_release(t->ctx, t->leading[i]);
    xkv_release(t->ctx, t->leading);
    xkv_release(t->ctx, t->blocks);
    xkv_release(t->ctx, t->stored);
    xkv_release(t->ctx, t->stored_scales);
    xkv_release(t->ctx, t->sources);
    xkv_pool_free(t->ctx, t->pool);
    xkv_container_writer_free(t->ctx, &t->w);
    xkv_plan_release(t->ctx, &t->c);
    xkv_release(t->ctx, (void *)(uintptr_t)t->c.geometry.planes);
}

static xkv_status write_dictionary(trainer *t, const xkv_output *output)
{
    xkv_values values = {0};
    uint64_t size;

    xkv_values_add_f64(&values, "dict.quality.max", t->o.max_quality);
    xkv_values_add_u64(&values, "dict.tokens", t->rows);
    xkv_values_add_f64(&values, "dict.unit", t->unit);
    xkv_values_add_model(&values, t->o.model);
    xkv_values_add_string(&values, "writer", t->o.writer ? t->o.writer : "libxkv");
    t->c.kind = XKV_KIND_DICTIONARY;
    t->c.values = values.list;
    t->c.value_count = values.count;
    XKV_TRY(xkv_container_begin(t->ctx, &t->c, output, t->o.zstd_level, &t->w));
    for (uint32_t i = 0; i < t->c.group_count; i++) {
        xkv_group *g = &t->c.groups[i];
        XKV_TRY(xkv_group_is_cross(g) ? train_cross(t, g) : train_group(t, g));
    }
    return xkv_container_finish(t->ctx, &t->w, &size);
}

static xkv_status train(trainer *t, const xkv_output *output)
{
    XKV_TRY(init(t));
    XKV_TRY(make_all_blocks(t));
    return write_dictionary(t, output);
}

xkv_status xkv_train(xkv_ctx *ctx, const xkv_cache *const *caches, uint32_t cache_count,
                     const xkv_train_options *options, const xkv_output *output)
{
    trainer t = {.ctx = ctx,
                 .kernels = xkv_kernels_cpu(),
                 .o = xkv_train_options_default(),
                 .caches = caches,
                 .cache_count = cache_count};
    xkv_status status;

    xkv_ctx_begin(ctx);
    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &t.o, sizeof t.o));
    if (cache_count == 0 || t.o.group_layers < 1 || !(t.o.max_quality >= 1 && t.o.max_quality <= 100))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT,
                        "expected at least one cache, group_layers >= 1 and max_quality 1 .. 100");
    status = train(&t, output);
    fini(&t);
    return status;
}
