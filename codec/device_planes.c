#include "device_planes.h"

#include "scatter.h"

xkv_status xkv_device_check_view(xkv_ctx *ctx, const xkv_geometry *geometry, uint32_t plane, xkv_heads heads,
                                 const xkv_view *v)
{
    uint64_t places =
        (uintptr_t)v->data | (uint64_t)v->token_stride | (uint64_t)v->head_stride | (uint64_t)v->dim_stride;

    XKV_TRY(xkv_check_heads_view(ctx, geometry, plane, heads, v));
    if (xkv_dtype_block(v->dtype) == 1 && places % xkv_dtype_size(v->dtype) != 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "view %u: its address and strides are no multiples of %zu bytes",
                        plane, xkv_dtype_size(v->dtype));
    return XKV_OK;
}

/* The RoPE of the group's i-th plane when it is another one than that of the last plane that had one; else NULL. */
static const xkv_rope *next_rope(const xkv_geometry *geometry, const xkv_group *g, uint32_t i, uint32_t *last)
{
    uint32_t rope = geometry->planes[g->planes[i]].rope;

    if (rope == XKV_NO_ROPE || rope == *last)
        return NULL;
    *last = rope;
    return &geometry->ropes[rope];
}

void xkv_device_list_planes(const xkv_geometry *geometry, const xkv_group *g, const xkv_view *views, xkv_heads heads,
                            xkv_plug_plane *planes)
{
    uint32_t column = 0, angles = 0, last = XKV_NO_ROPE, last_angles = 0;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[g->planes[i]];
        const xkv_rope *rope = next_rope(geometry, g, i, &last);
        uint32_t first;
        xkv_plane part = xkv_plane_heads(p, heads, &first);
        planes[i] =
            (xkv_plug_plane){views[g->planes[i]], part.heads, p->head_dim, column + first, 0, 0, 0, 0, p->dtype};
        if (rope) {
            last_angles = angles;
            angles += rope->n_rot;
        }
        if (p->rope != XKV_NO_ROPE) {
            rope = &geometry->ropes[p->rope];
            planes[i].pairs = rope->n_rot / 2;
            planes[i].offset = rope->offset;
            planes[i].style = rope->style;
            planes[i].angles = last_angles;
        }
        column += xkv_plane_width(p);
    }
}

uint64_t xkv_device_list_ropes(const xkv_geometry *geometry, const xkv_group *g, uint8_t *to)
{
    uint32_t last = XKV_NO_ROPE;
    uint64_t at = 0;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_rope *rope = next_rope(geometry, g, i, &last);
        if (!rope)
            continue;
        if (to)
            memcpy(to + at, rope->inv_freq, rope->n_rot / 2 * sizeof(double));
        at = xkv_align64(at + rope->n_rot / 2 * sizeof(double), XKV_CONSTANT_ALIGN);
    }
    return at;
}

uint32_t xkv_device_count_angles(const xkv_geometry *geometry, const xkv_group *g)
{
    uint32_t last = XKV_NO_ROPE, sum = 0;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_rope *rope = next_rope(geometry, g, i, &last);
        sum += rope ? rope->n_rot : 0;
    }
    return sum;
}

xkv_status xkv_device_make_angles(xkv_ctx *ctx, xkv_device *d, void *stream, const xkv_geometry *geometry,
                                  const xkv_group *g, const uint8_t *ropes, bool inverse, xkv_plug_angles o)
{
    uint32_t last = XKV_NO_ROPE;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_rope *rope = next_rope(geometry, g, i, &last);
        if (!rope)
            continue;
        o.inv_freq = (const double *)(const void *)ropes;
        o.pairs = rope->n_rot / 2;
        o.scale = inverse ? 1 / rope->scale : rope->scale;
        XKV_TRY(xkv_device_result(ctx, d, d->api->angles(d->plug, &o, stream)));
        ropes += xkv_align64(o.pairs * sizeof(double), XKV_CONSTANT_ALIGN);
        o.out += rope->n_rot;
    }
    return XKV_OK;
}
