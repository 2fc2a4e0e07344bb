#include "attend_layer.h"

#include <float.h>
#include <math.h>

/* Queries times heads, far within what BLAS counts with. */
#define MAX_QUERIES (1u << 22)

static void set_role(const xkv_geometry *g, uint32_t index, uint32_t plane, uint32_t query_dim, xkv_attend_layer *l)
{
    l->roles[index] = (xkv_plane_role){true, plane, &g->planes[plane], query_dim};
}

/* The planes of a layer: K and V, or MLA's latent and K-rope. */
static xkv_status find_roles(xkv_ctx *ctx, const xkv_geometry *g, uint32_t layer, xkv_attend_layer *l)
{
    bool has[4] = {false};
    uint32_t plane[4] = {0};

    for (uint32_t i = 0; i < g->plane_count; i++)
        if (g->planes[i].layer == layer && g->planes[i].kind <= XKV_PLANE_K_ROPE) {
            has[g->planes[i].kind] = true;
            plane[g->planes[i].kind] = i;
        }
    if (has[XKV_PLANE_LATENT]) {
        set_role(g, XKV_ROLE_KEY, plane[XKV_PLANE_LATENT], 0, l);
        if (has[XKV_PLANE_K_ROPE])
            set_role(g, XKV_ROLE_KEY_ROPE, plane[XKV_PLANE_K_ROPE], l->roles[XKV_ROLE_KEY].facts->head_dim, l);
        l->value = XKV_ROLE_KEY;
        return XKV_OK;
    }
    if (!has[XKV_PLANE_K] || !has[XKV_PLANE_V])
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "layer %u does not have both K and V", layer);
    set_role(g, XKV_ROLE_KEY, plane[XKV_PLANE_K], 0, l);
    set_role(g, XKV_ROLE_VALUE, plane[XKV_PLANE_V], 0, l);
    l->value = XKV_ROLE_VALUE;
    return XKV_OK;
}

static xkv_status check_heads(xkv_ctx *ctx, uint32_t layer, const xkv_queries *queries, xkv_attend_layer *l)
{
    uint64_t count = (uint64_t)queries->count * queries->heads;

    l->kv_heads = l->roles[XKV_ROLE_KEY].facts->heads;
    l->dim_v = l->roles[l->value].facts->head_dim;
    for (uint32_t i = 0; i < XKV_ROLE_COUNT; i++) {
        if (!l->roles[i].present)
            continue;
        if (l->roles[i].facts->heads != l->kv_heads)
            return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "layer %u has planes of %u and %u heads", layer, l->kv_heads,
                            l->roles[i].facts->heads);
        if (i != XKV_ROLE_VALUE)
            l->dim_k += l->roles[i].facts->head_dim;
    }
    if (queries->heads % l->kv_heads != 0 || count > MAX_QUERIES)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT,
                        "%u queries of %u heads, expected a multiple of the %u KV heads and %u in all at most",
                        queries->count, queries->heads, l->kv_heads, MAX_QUERIES);
    l->count = (size_t)count;
    l->m = l->count / l->kv_heads;
    return XKV_OK;
}

static xkv_status check_options(xkv_ctx *ctx, const xkv_queries *queries, xkv_attend_layer *l)
{
    xkv_attend_options *o = &l->o;

    if (o->scale == 0 && l->value == XKV_ROLE_VALUE)
        o->scale = 1 / sqrt((double)l->dim_k);
    if (!(o->scale > 0) || !isfinite(o->scale))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "scale is %g, expected finite and positive%s", o->scale,
                        l->value == XKV_ROLE_VALUE ? "" : "; MLA has no default");
    if (o->softcap != 0 && !(o->softcap >= (double)FLT_MIN && o->softcap <= (double)FLT_MAX))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "softcap is %g, expected 0 or a positive f32", o->softcap);
    if (o->window > 0 && !o->causal)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a window without causal");
    if (o->causal && !queries->positions && queries->count > 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "causal attention needs the queries' positions");
    return XKV_OK;
}

xkv_status xkv_attend_layer_init(xkv_ctx *ctx, const xkv_geometry *geometry, uint32_t first_layer, uint32_t layer_count,
                                 uint32_t layer, const xkv_queries *queries, const xkv_attend_options *options,
                                 xkv_attend_layer *l)
{
    *l = (xkv_attend_layer){.o = xkv_attend_options_default()};
    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &l->o, sizeof l->o));
    if (layer - first_layer >= layer_count)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "layer %u is not among the %u from %u on", layer, layer_count,
                        first_layer);
    XKV_TRY(find_roles(ctx, geometry, layer, l));
    XKV_TRY(check_heads(ctx, layer, queries, l));
    return check_options(ctx, queries, l);
}
