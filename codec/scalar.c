#include "scalar.h"

#include <math.h>

/* Errors of keys cost more than errors of values of the same relative size. */
#define KEY_WEIGHT 1.4

static xkv_status allocate(xkv_ctx *ctx, const xkv_group *g, xkv_scalar *s)
{
    *s = (xkv_scalar){.width = g->width};
    XKV_TRY(XKV_NEW(ctx, g->plane_count, &s->scales));
    XKV_TRY(XKV_NEW(ctx, g->width, &s->stored_mean));
    XKV_TRY(XKV_NEW(ctx, g->width, &s->mean));
    return XKV_NEW(ctx, g->width, &s->diagonal);
}

static void fill_diagonal(const xkv_geometry *geometry, const xkv_group *g, xkv_scalar *s)
{
    float *d = s->diagonal;

    for (uint32_t i = 0; i < g->plane_count; i++)
        for (uint32_t n = xkv_plane_width(&geometry->planes[g->planes[i]]); n > 0; n--)
            *d++ = s->scales[i];
}

/* Sums of x and of x^2 of every element. */
static xkv_status sum_columns(xkv_ctx *ctx, xkv_rotator *r, const xkv_group *g, const xkv_view *views, uint32_t t0,
                              uint32_t t1, float *x, double *sums, double *squares)
{
    for (uint32_t end; t0 < t1; t0 = end) {
        end = (uint32_t)xkv_min64(t1, (uint64_t)t0 + XKV_TILE_ROWS);
        XKV_TRY(xkv_gather_rows(ctx, r, g, views, t0, end, x));
        for (size_t t = 0; t < end - t0; t++)
            for (size_t i = 0; i < g->width; i++) {
                double v = (double)x[t * g->width + i];
                sums[i] += v;
                squares[i] += v * v;
            }
    }
    return XKV_OK;
}

static void set_scales(const xkv_geometry *geometry, const xkv_group *g, const double *sums, const double *squares,
                       double n, xkv_scalar *s)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[g->planes[i]];
        uint32_t width = xkv_plane_width(p);
        double variance = 0;
        for (uint32_t k = 0; k < width; k++, sums++, squares++)
            variance += fmax(*squares / n - *sums / n * (*sums / n), 0);
        double scale = sqrt(variance / width) / (p->kind == XKV_PLANE_K ? KEY_WEIGHT : 1);
        s->scales[i] = scale > 1e-20 ? (float)scale : 1;
        s->energy += n * variance / ((double)s->scales[i] * (double)s->scales[i]);
    }
}

xkv_status xkv_scalar_create(xkv_ctx *ctx, xkv_rotator *rotator, const xkv_group *g, const xkv_view *views, uint32_t t0,
                             uint32_t t1, xkv_scalar *s)
{
    const xkv_kernels *k = rotator->kernels;
    float *x = NULL;
    double *sums = NULL, *squares = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(allocate(ctx, g, s), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)XKV_TILE_ROWS * g->width, &x), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, g->width, &sums), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, g->width, &squares), out);
    XKV_TRY_GOTO(sum_columns(ctx, rotator, g, views, t0, t1, x, sums, squares), out);
    set_scales(rotator->geometry, g, sums, squares, t1 - t0, s);
    for (uint32_t i = 0; i < g->width; i++)
        s->mean[i] = (float)(sums[i] / (t1 - t0));
    k->from_f32(XKV_F16, s->mean, s->stored_mean, g->width);
    k->to_f32(XKV_F16, s->stored_mean, s->mean, g->width);
    fill_diagonal(rotator->geometry, g, s);
out:
    xkv_release(ctx, x);
    xkv_release(ctx, sums);
    xkv_release(ctx, squares);
    return status;
}

xkv_status xkv_scalar_parse(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_group *g, const uint8_t *scales,
                            const uint8_t *mean, const char *where, xkv_scalar *s)
{
    const xkv_kernels *k = xkv_kernels_cpu();

    XKV_TRY(allocate(ctx, g, s));
    for (uint32_t i = 0; i < g->plane_count; i++) {
        s->scales[i] = xkv_loadf32(scales + 4ull * i);
        if (!isfinite(s->scales[i]) || s->scales[i] <= 0)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: the scale of a plane is not finite and positive [Q3]", where);
    }
    if (!k->all_finite(XKV_F16, mean, g->width))
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: a mean is not finite [Q3]", where);
    k->to_f32(XKV_F16, mean, s->mean, g->width);
    fill_diagonal(geometry, g, s);
    return XKV_OK;
}

void xkv_scalar_free(xkv_ctx *ctx, xkv_scalar *s)
{
    xkv_release(ctx, s->scales);
    xkv_release(ctx, s->stored_mean);
    xkv_release(ctx, s->mean);
    xkv_release(ctx, s->diagonal);
    *s = (xkv_scalar){0};
}

xkv_transform xkv_transform_of_scalar(const xkv_scalar *s)
{
    return (xkv_transform){.rank = s->width, .width = s->width, .mean = s->mean, .diagonal = s->diagonal};
}
