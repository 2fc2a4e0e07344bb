#include "rows.h"

#include <math.h>

xkv_status xkv_rotator_init(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_kernels *k, bool inverse,
                            xkv_rotator *r)
{
    xkv_status status = XKV_OK;

    *r = (xkv_rotator){.geometry = geometry, .kernels = k, .inverse = inverse};
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, geometry->rope_count, &r->tables), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, 2 * XKV_MAX_ROPE_PAIRS, &r->cos_sin), out);
out:
    if (status != XKV_OK)
        xkv_rotator_free(ctx, r);
    return status;
}

void xkv_rotator_free(xkv_ctx *ctx, xkv_rotator *r)
{
    for (uint32_t i = 0; r->tables && i < r->geometry->rope_count; i++)
        xkv_rope_table_free(ctx, r->tables[i]);
    xkv_release(ctx, r->tables);
    xkv_release(ctx, r->cos_sin);
    *r = (xkv_rotator){0};
}

static xkv_status make_tables(xkv_ctx *ctx, xkv_rotator *r, const xkv_group *g)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        uint32_t rope = r->geometry->planes[g->planes[i]].rope;
        if (rope != XKV_NO_ROPE && !r->tables[rope])
            XKV_TRY(xkv_rope_table_create(ctx, &r->geometry->ropes[rope], r->inverse, &r->tables[rope]));
    }
    return XKV_OK;
}

xkv_plane xkv_plane_heads(const xkv_plane *p, xkv_heads heads, uint32_t *element)
{
    xkv_plane part = *p;

    *element = 0;
    if (heads.count == 0 || p->kind == XKV_PLANE_LATENT || p->kind == XKV_PLANE_K_ROPE)
        return part;
    *element = heads.first * p->head_dim;
    part.heads = heads.count;
    return part;
}

static void rotate_row(xkv_rotator *r, const xkv_group *g, int32_t position, float *x)
{
    uint32_t current = XKV_NO_ROPE; /* neighbouring layers share their angles: compute them once a row */

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &r->geometry->planes[g->planes[i]];
        if (p->rope != XKV_NO_ROPE) {
            if (p->rope != current)
                xkv_rope_table_row(r->tables[p->rope], position, r->cos_sin);
            current = p->rope;
            uint32_t first;
            xkv_plane part = xkv_plane_heads(p, r->heads, &first);
            r->kernels->rope_row(x + first, part.heads, p->head_dim, &r->geometry->ropes[p->rope], r->cos_sin,
                                 r->inverse);
        }
        x += xkv_plane_width(p);
    }
}

xkv_status xkv_rotate_rows(xkv_ctx *ctx, xkv_rotator *r, const xkv_group *g, const int32_t *positions, uint32_t rows,
                           float *x)
{
    XKV_TRY(make_tables(ctx, r, g));
    for (uint32_t t = 0; t < rows; t++)
        rotate_row(r, g, positions[t], x + (size_t)t * g->width);
    return XKV_OK;
}

xkv_status xkv_gather_rows(xkv_ctx *ctx, xkv_rotator *r, const xkv_group *g, const xkv_view *views, uint32_t t0,
                           uint32_t t1, float *x)
{
    size_t column = 0;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &r->geometry->planes[g->planes[i]];
        xkv_view_gather(r->kernels, &views[g->planes[i]], p, t0, t1, x + column, g->width);
        column += xkv_plane_width(p);
    }
    return xkv_rotate_rows(ctx, r, g, r->geometry->positions + t0, t1 - t0, x);
}

uint64_t xkv_raw16_bytes(const xkv_geometry *geometry)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < geometry->plane_count; i++)
        sum += 2ull * geometry->token_count * xkv_plane_width(&geometry->planes[i]);
    return sum;
}

double xkv_relative_error(double squares, double energy)
{
    return energy > 0 ? sqrt(squares / energy) : 0;
}
