#include "cross.h"

#include <math.h>

#define LARGEST_INTEGER 32767.0f

void xkv_cross_add(const xkv_kernels *k, const xkv_cross_basis *basis, const xkv_transform *t, const float *z,
                   size_t stride, uint32_t tokens, float *y, size_t y_stride)
{
    k->gemm_nn(basis->rank, tokens, t->top, basis->analysis + t->cross_at, basis->width, z, stride, 1, y, y_stride);
}

float xkv_cross_norm(const float *z, size_t stride, uint32_t top, uint32_t tokens)
{
    float largest = 0;

    for (size_t s = 0; s < tokens; s++) {
        float sum = 0;
        for (size_t j = 0; j < top; j++)
            sum += z[j * stride + s] * z[j * stride + s];
        if (!(sum <= largest)) /* a NaN stays */
            largest = sum;
    }
    return largest;
}

bool xkv_cross_too_large(float norm, float step, uint32_t count)
{
    float reach = step * LARGEST_INTEGER / 2;

    return !(norm * (float)count <= reach * reach);
}

typedef struct job {
    xkv_ctx *ctx;
    xkv_rotator *rotators;
    const xkv_kernels *kernels;
    const xkv_container *c;
    const xkv_view *views;
    const xkv_transform *transforms;
    const xkv_cross_basis *basis;
    uint32_t first, tokens;
    float *y;     /* [rank][tokens] */
    float *norms; /* [tiles][group_count] */
    float *scratch;
    size_t rows_size, scratch_size; /* of a tile of rows; of all a thread needs */
} job;

static xkv_status analyze_group(const job *j, uint32_t worker, uint32_t group, uint32_t row, uint32_t n, float *norm)
{
    const xkv_transform *t = &j->transforms[group];
    xkv_transform leading = *t;
    float *x = j->scratch + worker * j->scratch_size, *z = x + j->rows_size;

    leading.rank = t->top;
    XKV_TRY(xkv_gather_rows(j->ctx, &j->rotators[worker], &j->c->groups[group], j->views, j->first + row,
                            j->first + row + n, x));
    xkv_analyze(j->kernels, &leading, 0, x, n, z, n);
    *norm = xkv_cross_norm(z, n, t->top, n);
    xkv_cross_add(j->kernels, j->basis, t, z, n, n, j->y + row, j->tokens);
    return XKV_OK;
}

static xkv_status analyze_tile(void *user, uint32_t worker, uint64_t tile)
{
    job *j = user;
    uint32_t row = (uint32_t)tile * XKV_TILE_ROWS, count = j->c->group_count;
    uint32_t n = (uint32_t)xkv_min64(XKV_TILE_ROWS, j->tokens - row);

    for (uint32_t i = 0; i < count; i++)
        if (xkv_takes_part(j->c, j->transforms, i))
            XKV_TRY(analyze_group(j, worker, i, row, n, &j->norms[tile * count + i]));
    return XKV_OK;
}

static void size_scratch(job *j)
{
    uint64_t width = 0, top = 0;

    for (uint32_t i = 0; i < j->c->group_count; i++) {
        width = xkv_max64(width, j->c->groups[i].width);
        top = xkv_max64(top, j->transforms[i].top);
    }
    j->rows_size = (size_t)(XKV_TILE_ROWS * width);
    j->scratch_size = j->rows_size + (size_t)(XKV_TILE_ROWS * top);
}

static void merge_norms(const job *j, uint64_t tiles, float *norms)
{
    for (uint32_t i = 0; i < j->c->group_count; i++) {
        norms[i] = 0;
        for (uint64_t t = 0; t < tiles; t++) {
            float norm = j->norms[t * j->c->group_count + i];
            if (!(norm <= norms[i]))
                norms[i] = norm;
        }
    }
}

static xkv_status run(job *j, xkv_pool *pool, const uint8_t *tables, float *norms, xkv_coded *coded)
{
    const xkv_transform given = {.tables = tables};
    uint64_t tiles = xkv_ceil_div(j->tokens, XKV_TILE_ROWS);

    size_scratch(j);
    XKV_TRY(XKV_NEW(j->ctx, j->scratch_size * xkv_pool_threads(pool), &j->scratch));
    XKV_TRY(XKV_NEW_ZERO(j->ctx, (size_t)coded->rank * j->tokens, &j->y));
    XKV_TRY(XKV_NEW_ZERO(j->ctx, (size_t)tiles * j->c->group_count, &j->norms));
    XKV_TRY(xkv_pool_run(j->ctx, pool, tiles, analyze_tile, j));
    merge_norms(j, tiles, norms);
    return xkv_code_components(j->ctx, pool, &given, j->y, 0, coded);
}

xkv_status xkv_code_cross(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, const xkv_container *c,
                          const xkv_view *views, uint32_t t0, uint32_t t1, const xkv_transform *transforms,
                          const xkv_cross_basis *basis, const uint8_t *tables, float step, float *norms,
                          xkv_coded *coded)
{
    job j = {.ctx = ctx,
             .rotators = rotators,
             .kernels = rotators->kernels,
             .c = c,
             .views = views,
             .transforms = transforms,
             .basis = basis,
             .first = t0,
             .tokens = t1 - t0};
    xkv_status status;

    *coded = (xkv_coded){.first = t0, .tokens = j.tokens, .rank = basis->rank, .step = step};
    status = run(&j, pool, tables, norms, coded);
    xkv_release(ctx, j.scratch);
    xkv_release(ctx, j.y);
    xkv_release(ctx, j.norms);
    if (status != XKV_OK)
        xkv_coded_free(ctx, coded);
    return status;
}
