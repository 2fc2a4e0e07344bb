#include "svd_group.h"

#include <math.h>

/* Sum of squares beyond which products of the decomposition could overflow f32: such rows are no activations. */
#define MAX_ENERGY 0x1p118
/* The largest f16. */
#define MAX_HALF 65504.0f

/* The group in f32 with what is measured on it. Work is split into tiles of XKV_TILE_ROWS rows; sums are kept per tile
 * and added in order, so that figures do not depend on the number of threads. */
typedef struct job {
    xkv_ctx *ctx;
    xkv_pool *pool;
    xkv_rotator *rotators;
    const xkv_kernels *kernels;
    xkv_group *g;
    const xkv_view *views;
    uint32_t first; /* token of row 0 */
    uint32_t rows;
    uint32_t known; /* leading rows whose errors are not measured */
    float *x;       /* [rows][width] */
    uint64_t tiles;
    double *sums; /* [tiles][plane_count] */
    xkv_factors *f;
    float *dequantized; /* components times scales, [rank][width] */
    float *scratch;     /* per thread: a tile of coefficients and one of rows */
    size_t scratch_size;
} job;

static job make_job(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, xkv_group *g, const xkv_view *views,
                    uint32_t t0, uint32_t t1, xkv_factors *f)
{
    return (job){.ctx = ctx,
                 .pool = pool,
                 .rotators = rotators,
                 .kernels = rotators->kernels,
                 .g = g,
                 .views = views,
                 .first = t0,
                 .rows = t1 - t0,
                 .tiles = xkv_ceil_div(t1 - t0, XKV_TILE_ROWS),
                 .f = f};
}

static uint32_t tile_rows(const job *j, uint64_t tile, uint32_t *row)
{
    *row = (uint32_t)(tile * XKV_TILE_ROWS);
    return (uint32_t)xkv_min64(XKV_TILE_ROWS, j->rows - *row);
}

/* Rows of a tile to leave out when sums are taken. */
static uint32_t rows_known(const job *j, uint32_t row, uint32_t rows)
{
    return j->known > row ? (uint32_t)xkv_min64(rows, j->known - row) : 0;
}

static void add_sums(const job *j, double *totals)
{
    for (uint32_t p = 0; p < j->g->plane_count; p++) {
        totals[p] = 0;
        for (uint64_t t = 0; t < j->tiles; t++)
            totals[p] += j->sums[t * j->g->plane_count + p];
    }
}

/* --- Gather --- */

static xkv_status gather_tile(void *user, uint32_t worker, uint64_t tile)
{
    job *j = user;
    uint32_t row, rows = tile_rows(j, tile, &row);
    float *x = j->x + (size_t)row * j->g->width;
    double *sums = j->sums + tile * j->g->plane_count;

    XKV_TRY(xkv_gather_rows(j->ctx, &j->rotators[worker], j->g, j->views, j->first + row, j->first + row + rows, x));
    x += (size_t)rows_known(j, row, rows) * j->g->width;
    for (uint32_t t = rows_known(j, row, rows); t < rows; t++)
        for (uint32_t i = 0; i < j->g->plane_count; i++) {
            uint32_t width = xkv_plane_width(&j->rotators->geometry->planes[j->g->planes[i]]);
            sums[i] += j->kernels->sum_squares(x, width);
            x += width;
        }
    return XKV_OK;
}

static xkv_status gather(job *j)
{
    memset(j->sums, 0, (size_t)j->tiles * j->g->plane_count * sizeof *j->sums);
    XKV_TRY(xkv_pool_run(j->ctx, j->pool, j->tiles, gather_tile, j));
    add_sums(j, j->g->plane_energies);
    j->g->energy = 0;
    for (uint32_t i = 0; i < j->g->plane_count; i++)
        j->g->energy += j->g->plane_energies[i];
    return XKV_OK;
}

/* --- 16-bit factors --- */

static void round_components(const job *j, const xkv_svd_result *svd)
{
    size_t n = (size_t)svd->rank * j->g->width;

    j->kernels->from_f32(XKV_F16, svd->components, j->f->components, n);
}

static void find_scales(const job *j, const float *a)
{
    uint32_t rank = j->f->rank;
    float *scales = j->f->scales;

    memset(scales, 0, rank * sizeof *scales);
    for (size_t t = 0; t < j->rows; t++)
        for (uint32_t i = 0; i < rank; i++)
            scales[i] = fmaxf(scales[i], fabsf(a[t * rank + i]));
}

/* False when one is beyond what an f16 holds, in units of its scale, or not a number. */
static bool round_coefficients(const job *j, float *a)
{
    uint32_t rank = j->f->rank;
    const float *scales = j->f->scales;
    bool fit = true;

    for (size_t t = 0; t < j->rows; t++) {
        for (uint32_t i = 0; i < rank; i++) {
            a[t * rank + i] = scales[i] > 0 ? a[t * rank + i] / scales[i] : 0;
            fit &= fabsf(a[t * rank + i]) <= MAX_HALF;
        }
        j->kernels->from_f32(XKV_F16, a + t * rank, j->f->coefficients + t * rank, rank);
    }
    return fit;
}

/* Components as a decoder sees them, into [rank][width] f32. */
static void dequantize_components(job *j, float *components)
{
    size_t width = j->g->width;

    j->dequantized = components;
    j->kernels->to_f32(XKV_F16, j->f->components, components, j->f->rank * width);
    for (size_t i = 0; i < j->f->rank; i++)
        for (size_t k = 0; k < width; k++)
            components[i * width + k] *= j->f->scales[i];
}

static xkv_status round_factors(job *j, xkv_svd_result *svd)
{
    xkv_factors *f = j->f;

    f->rank = svd->rank;
    f->first = j->first;
    XKV_TRY(XKV_NEW(j->ctx, (size_t)j->rows * f->rank, &f->coefficients));
    XKV_TRY(XKV_NEW(j->ctx, (size_t)j->g->width * f->rank, &f->components));
    XKV_TRY(XKV_NEW(j->ctx, f->rank, &f->scales));
    round_components(j, svd);
    find_scales(j, svd->coefficients);
    (void)round_coefficients(j, svd->coefficients); /* at most 1, by their scales */
    dequantize_components(j, svd->components);      /* which are no longer needed, and make room */
    return XKV_OK;
}

/* --- Measured error --- */

static xkv_status measure_tile(void *user, uint32_t worker, uint64_t tile)
{
    job *j = user;
    uint32_t row, rows = tile_rows(j, tile, &row), known = rows_known(j, row, rows), rank = j->f->rank;
    size_t width = j->g->width;
    float *a = j->scratch + worker * j->scratch_size, *y = a + (size_t)XKV_TILE_ROWS * rank;
    const float *x = j->x + (row + known) * width;
    double *sums = j->sums + tile * j->g->plane_count;

    j->kernels->to_f32(XKV_F16, j->f->coefficients + (size_t)row * rank, a, (size_t)rows * rank);
    j->kernels->gemm_nn(rows, width, rank, a, rank, j->dequantized, width, 0, y, width);
    y += known * width;
    for (uint32_t t = known; t < rows; t++)
        for (uint32_t i = 0; i < j->g->plane_count; i++) {
            uint32_t n = xkv_plane_width(&j->rotators->geometry->planes[j->g->planes[i]]);
            sums[i] += j->kernels->sum_squared_difference(x, y, n);
            x += n;
            y += n;
        }
    return XKV_OK;
}

static xkv_status measure(job *j)
{
    double total = 0;
    xkv_status status;

    j->scratch_size = (size_t)XKV_TILE_ROWS * (j->f->rank + j->g->width);
    XKV_TRY(XKV_NEW(j->ctx, j->scratch_size * xkv_pool_threads(j->pool), &j->scratch));
    memset(j->sums, 0, (size_t)j->tiles * j->g->plane_count * sizeof *j->sums);
    status = xkv_pool_run(j->ctx, j->pool, j->tiles, measure_tile, j);
    xkv_release(j->ctx, j->scratch);
    XKV_TRY(status);
    add_sums(j, j->g->plane_errors);
    for (uint32_t i = 0; i < j->g->plane_count; i++) {
        total += j->g->plane_errors[i];
        j->g->plane_errors[i] = xkv_relative_error(j->g->plane_errors[i], j->g->plane_energies[i]);
    }
    j->g->error = xkv_relative_error(total, j->g->energy);
    return XKV_OK;
}

/* --- Decomposition --- */

/* One attempt: the rank asked for, or the smallest one that keeps `energy`. */
static xkv_status attempt(job *j, const xkv_svd_target *target, double energy)
{
    xkv_svd_options o = {.rank = target->rank,
                         .energy = energy,
                         .max_rank = target->max_rank,
                         .iterations = target->iterations,
                         .total = j->g->energy};
    xkv_svd_result svd = {0};
    xkv_status status = XKV_OK;

    xkv_factors_free(j->ctx, j->f);
    XKV_TRY(xkv_svd(j->ctx, j->pool, j->kernels, j->x, j->rows, j->g->width, &o, &svd));
    XKV_TRY_GOTO(round_factors(j, &svd), out);
    XKV_TRY_GOTO(measure(j), out);
out:
    xkv_svd_result_free(j->ctx, &svd);
    return status;
}

/* The error has two parts: what truncation leaves out, and what 16 bits round off. The second is known after a first
 * attempt and taken off the allowance of the next. */
static xkv_status attempt_error(job *j, const xkv_svd_target *target, bool *reached)
{
    double allowed = target->error * target->error;

    for (int i = 0; i < 4; i++) {
        XKV_TRY(attempt(j, target, 1 - allowed));
        *reached = j->g->error <= target->error;
        if (*reached || j->f->rank >= target->max_rank)
            return XKV_OK;
        allowed -= 1.1 * (j->g->error * j->g->error - target->error * target->error);
        if (allowed <= 0)
            return XKV_OK;
    }
    return XKV_OK;
}

xkv_status xkv_factorize(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, xkv_group *g, const xkv_view *views,
                         uint32_t t0, uint32_t t1, const xkv_svd_target *target, xkv_factors *f, bool *reached)
{
    job j = make_job(ctx, pool, rotators, g, views, t0, t1, f);
    xkv_status status = XKV_OK;

    *f = (xkv_factors){0};
    *reached = true;
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)j.rows * g->width, &j.x), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)j.tiles * g->plane_count, &j.sums), out);
    XKV_TRY_GOTO(gather(&j), out);
    if (g->energy > MAX_ENERGY) {
        *reached = false;
        goto out;
    }
    if (target->error > 0)
        XKV_TRY_GOTO(attempt_error(&j, target, reached), out);
    else
        XKV_TRY_GOTO(attempt(&j, target, 0), out);
    g->rank = f->rank;
out:
    xkv_release(ctx, j.x);
    xkv_release(ctx, j.sums);
    if (status != XKV_OK || !*reached)
        xkv_factors_free(ctx, f);
    return status;
}

/* --- Projection --------------------------------------------------------------------------------------------------- */

/* Coefficients of a tile on the components, which are orthonormal but for their rounding; then in units of their
 * scales. They need the rows of `j->x` no longer than the errors do. */
static xkv_status project_tile(void *user, uint32_t worker, uint64_t tile)
{
    job *j = user;
    uint32_t row, rows = tile_rows(j, tile, &row), rank = j->f->rank;
    size_t width = j->g->width;

    (void)worker;
    j->kernels->gemm_nt(rows, rank, width, j->x + row * width, width, j->dequantized, width, 0,
                        j->scratch + (size_t)row * rank, rank);
    return XKV_OK;
}

static xkv_status project(job *j, float *components, bool *fit)
{
    xkv_factors *f = j->f;
    float *coefficients = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW(j->ctx, (size_t)j->rows * f->rank, &coefficients));
    j->kernels->to_f32(XKV_F16, f->components, components, (size_t)f->rank * j->g->width);
    j->dequantized = components;
    j->scratch = coefficients;
    XKV_TRY_GOTO(xkv_pool_run(j->ctx, j->pool, j->tiles, project_tile, j), out);
    f->first = j->first;
    XKV_TRY_GOTO(XKV_NEW(j->ctx, (size_t)j->rows * f->rank, &f->coefficients), out);
    *fit = round_coefficients(j, coefficients);
    dequantize_components(j, components);
    if (*fit)
        XKV_TRY_GOTO(measure(j), out);
out:
    xkv_release(j->ctx, coefficients);
    return status;
}

xkv_status xkv_project(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, xkv_group *g, const xkv_view *views,
                       uint32_t t0, uint32_t t1, uint32_t measured, xkv_factors *f, bool *fit)
{
    job j = make_job(ctx, pool, rotators, g, views, t0, t1, f);
    float *components = NULL;
    xkv_status status = XKV_OK;

    j.known = measured - t0;
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)j.rows * g->width, &j.x), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)j.tiles * g->plane_count, &j.sums), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)f->rank * g->width, &components), out);
    XKV_TRY_GOTO(gather(&j), out);
    *fit = g->energy <= MAX_ENERGY;
    if (*fit)
        XKV_TRY_GOTO(project(&j, components, fit), out);
out:
    xkv_release(ctx, j.x);
    xkv_release(ctx, j.sums);
    xkv_release(ctx, components);
    return status;
}

void xkv_factors_free(xkv_ctx *ctx, xkv_factors *f)
{
    xkv_release(ctx, f->coefficients);
    xkv_release(ctx, f->components);
    xkv_release(ctx, f->scales);
    *f = (xkv_factors){0};
}
