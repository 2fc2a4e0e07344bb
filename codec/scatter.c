#include "scatter.h"

xkv_status xkv_check_heads_view(xkv_ctx *ctx, const xkv_geometry *g, uint32_t plane, xkv_heads heads,
                                const xkv_view *view)
{
    uint32_t element;
    xkv_plane part = xkv_plane_heads(&g->planes[plane], heads, &element);

    return xkv_check_plane_view(ctx, &part, plane, view);
}

xkv_status xkv_scatterer_init(const xkv_target *t, xkv_scatterer *s)
{
    XKV_TRY(xkv_rotator_init(t->ctx, &t->c->geometry, t->kernels, false, &s->rotator));
    if (t->moves.distances)
        XKV_TRY(xkv_rotator_init(t->ctx, &t->moves.geometry, t->kernels, false, &s->mover));
    s->rotator.heads = s->mover.heads = t->heads;
    return XKV_OK;
}

void xkv_scatterer_free(const xkv_target *t, xkv_scatterer *s)
{
    if (s->rotator.geometry)
        xkv_rotator_free(t->ctx, &s->rotator);
    if (s->mover.geometry)
        xkv_rotator_free(t->ctx, &s->mover);
}

/* Tokens [*t0, *t1) cut to those asked for; false when none is left. */
static bool cut_range(const xkv_target *t, uint32_t *t0, uint32_t *t1)
{
    if (*t0 < t->first)
        *t0 = t->first;
    if (*t1 > t->end)
        *t1 = t->end;
    return *t0 < *t1;
}

/* --- Exact rows --------------------------------------------------------------------------------------------------- */

/* At other positions: what has a RoPE turns by the way between the two. */
static xkv_status scatter_moved(const xkv_target *t, xkv_scatterer *s, const xkv_group *g, const uint8_t *matrix,
                                uint32_t t0, uint32_t t1, float *row)
{
    size_t row_bytes = (size_t)xkv_group_row_bytes(&t->c->geometry, g, 1);

    for (uint32_t i = t0 - t->first; i < t1 - t->first; i++, matrix += row_bytes) {
        size_t column = 0;
        t->kernels->to_f32(xkv_group_dtype(&t->c->geometry, g), matrix, row, g->width);
        XKV_TRY(xkv_rotate_rows(t->ctx, &s->mover, g, &t->moves.distances[i], 1, row));
        for (uint32_t k = 0; k < g->plane_count; k++) {
            const xkv_plane *p = &t->c->geometry.planes[g->planes[k]];
            uint32_t at;
            xkv_plane part = xkv_plane_heads(p, t->heads, &at);
            if (p->rope != XKV_NO_ROPE)
                xkv_view_scatter(t->kernels, row + column + at, g->width, &part, i, i + 1, &t->views[g->planes[k]]);
            column += xkv_plane_width(p);
        }
    }
    return XKV_OK;
}

static void scatter_plane(const xkv_target *t, const xkv_plane *p, const xkv_view *view, const uint8_t *matrix,
                          size_t row_bytes, uint32_t t0, uint32_t t1, float *row)
{
    uint32_t first = t0 - t->first, end = t1 - t->first;
    xkv_plane in_f32 = *p; /* where nothing is left to be rounded to the plane's dtype */

    in_f32.dtype = XKV_F32;
    if (view->dtype == p->dtype) {
        xkv_view_scatter_bytes(matrix, row_bytes, p, first, end, view);
        return;
    }
    for (uint32_t i = first; i < end; i++, matrix += row_bytes) {
        t->kernels->to_f32(p->dtype, matrix, row, xkv_plane_width(p));
        xkv_view_scatter(t->kernels, row, xkv_plane_width(p), &in_f32, i, i + 1, view);
    }
}

xkv_status xkv_scatter_exact(const xkv_target *t, xkv_scatterer *s, const xkv_group *g, const uint8_t *matrix,
                             uint32_t t0, uint32_t t1, float *scratch)
{
    size_t row_bytes = (size_t)xkv_group_row_bytes(&t->c->geometry, g, 1), column = 0;
    uint32_t first = t0;

    if (!t->views || !cut_range(t, &first, &t1))
        return XKV_OK;
    matrix += (first - t0) * row_bytes;
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &t->c->geometry.planes[g->planes[i]];
        uint32_t at;
        xkv_plane part = xkv_plane_heads(p, t->heads, &at);
        if (!t->moves.distances || p->rope == XKV_NO_ROPE)
            scatter_plane(t, &part, &t->views[g->planes[i]], matrix + column + xkv_dtype_bytes(p->dtype, at), row_bytes,
                          first, t1, scratch);
        column += (size_t)xkv_dtype_bytes(p->dtype, xkv_plane_width(p));
    }
    return t->moves.distances ? scatter_moved(t, s, g, matrix, first, t1, scratch) : XKV_OK;
}

/* --- Coded rows --------------------------------------------------------------------------------------------------- */

xkv_status xkv_scatter_rows(const xkv_target *t, xkv_scatterer *s, const xkv_group *g, float *rows, uint32_t t0,
                            uint32_t t1)
{
    size_t column = 0;
    uint32_t first = t0;

    if (!cut_range(t, &first, &t1))
        return XKV_OK;
    rows += (size_t)(first - t0) * g->width;
    XKV_TRY(xkv_rotate_rows(t->ctx, &s->rotator, g, t->moves.positions + (first - t->first), t1 - first, rows));
    for (uint32_t i = 0; t->views && i < g->plane_count; i++) {
        const xkv_plane *p = &t->c->geometry.planes[g->planes[i]];
        uint32_t at;
        xkv_plane part = xkv_plane_heads(p, t->heads, &at);
        xkv_view_scatter(t->kernels, rows + column + at, g->width, &part, first - t->first, t1 - t->first,
                         &t->views[g->planes[i]]);
        column += xkv_plane_width(p);
    }
    return XKV_OK;
}
