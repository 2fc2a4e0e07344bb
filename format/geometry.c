/* geometry.c - names and sizes of what a cache consists of. */
#include "container.h"

/* By xkv_dtype. */
static const struct {
    const char *name;
    uint8_t block, size;
} dtypes[] = {[XKV_F32] = {"f32", 1, 4},
              [XKV_F16] = {"f16", 1, 2},
              [XKV_BF16] = {"bf16", 1, 2},
              [XKV_Q8_0] = {"q8_0", 32, 34},
              [XKV_Q4_0] = {"q4_0", 32, 18}};
enum { DTYPE_COUNT = sizeof dtypes / sizeof dtypes[0] };

uint32_t xkv_dtype_block(uint32_t dtype)
{
    return dtype < DTYPE_COUNT ? dtypes[dtype].block : 0;
}

size_t xkv_dtype_size(uint32_t dtype)
{
    return dtype < DTYPE_COUNT ? dtypes[dtype].size : 0;
}

uint64_t xkv_dtype_bytes(uint32_t dtype, uint64_t count)
{
    return dtype < DTYPE_COUNT ? count / dtypes[dtype].block * dtypes[dtype].size : 0;
}

const char *xkv_dtype_name(uint32_t dtype)
{
    return dtype < DTYPE_COUNT ? dtypes[dtype].name : "unknown";
}

const char *xkv_plane_kind_name(uint32_t kind)
{
    static const char *const names[] = {"K", "V", "latent", "K-rope"};
    return kind < sizeof names / sizeof *names ? names[kind] : "unknown";
}

const char *xkv_engine_name(uint32_t engine)
{
    static const char *const names[] = {"none",   "llama.cpp sequence", "safetensors",
                                        "opaque", "llama.cpp session",  "llama.cpp blob"};
    return engine < sizeof names / sizeof *names ? names[engine] : "unknown";
}

uint64_t xkv_geometry_raw_bytes(const xkv_geometry *g)
{
    uint64_t row = 0, total;
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &g->planes[i];
        row += xkv_dtype_bytes(p->dtype, (uint64_t)p->heads * p->head_dim);
    }
    return xkv_mul64(row, g->token_count, &total) ? total : UINT64_MAX;
}

uint32_t xkv_geometry_features(const xkv_geometry *g)
{
    for (uint32_t i = 0; i < g->plane_count; i++)
        if (xkv_dtype_block(g->planes[i].dtype) > 1)
            return XKV_FEATURE_BLOCKS;
    return 0;
}

bool xkv_rope_equal(const xkv_rope *a, const xkv_rope *b)
{
    return a->n_rot == b->n_rot && a->offset == b->offset && a->style == b->style && a->scale == b->scale &&
           memcmp(a->inv_freq, b->inv_freq, a->n_rot / 2 * sizeof *a->inv_freq) == 0;
}

/* --- Checks of what callers describe ------------------------------------------------------------------------------ */

xkv_status xkv_check_plane(xkv_ctx *ctx, const xkv_geometry *g, uint32_t index)
{
    const xkv_plane *p = &g->planes[index];
    uint64_t width = (uint64_t)p->heads * p->head_dim;
    if (p->heads == 0 || p->head_dim == 0 || width > XKV_MAX_WIDTH || p->kind > XKV_PLANE_K_ROPE ||
        p->layer >= g->layer_count || (p->rope != XKV_NO_ROPE && p->rope >= g->rope_count))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u: shape, kind, layer or rope out of range", index);
    uint32_t block = xkv_dtype_block(p->dtype);
    if (block == 0 || width % block != 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u: rows of %llu elements of dtype %u (%s)", index,
                        (unsigned long long)width, p->dtype, xkv_dtype_name(p->dtype));
    return XKV_OK;
}

xkv_status xkv_check_view(xkv_ctx *ctx, const xkv_geometry *g, uint32_t index, const xkv_view *view)
{
    return xkv_check_plane_view(ctx, &g->planes[index], index, view);
}

xkv_status xkv_check_plane_view(xkv_ctx *ctx, const xkv_plane *p, uint32_t index, const xkv_view *view)
{
    uint32_t block = xkv_dtype_block(view->dtype), dim = xkv_view_head_dim(view, p);
    if (view->data == NULL || block == 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u: its view has no data or an unknown dtype (%u)", index,
                        view->dtype);
    if ((uint64_t)p->heads * p->head_dim % dim != 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u: its view has heads of %u, which do not divide rows of %u",
                        index, dim, p->heads * p->head_dim);
    if (block > 1 && (dim % block != 0 || view->dim_stride != (int64_t)xkv_dtype_size(view->dtype)))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT,
                        "plane %u: its view splits blocks of %s: heads of %u, dim_stride %lld, expected a multiple of "
                        "%u and %zu",
                        index, xkv_dtype_name(view->dtype), dim, (long long)view->dim_stride, block,
                        xkv_dtype_size(view->dtype));
    return XKV_OK;
}
