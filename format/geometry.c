/* geometry.c - names and sizes of what a cache consists of. */
#include "container.h"

size_t xkv_dtype_size(uint32_t dtype)
{
    switch (dtype) {
    case XKV_F32:
        return 4;
    case XKV_F16:
    case XKV_BF16:
        return 2;
    default:
        return 0;
    }
}

const char *xkv_plane_kind_name(uint32_t kind)
{
    static const char *const names[] = {"K", "V", "latent", "K-rope"};
    return kind < sizeof names / sizeof *names ? names[kind] : "unknown";
}

const char *xkv_engine_name(uint32_t engine)
{
    static const char *const names[] = {"none", "llama.cpp sequence", "safetensors", "opaque"};
    return engine < sizeof names / sizeof *names ? names[engine] : "unknown";
}

uint64_t xkv_geometry_raw_bytes(const xkv_geometry *g)
{
    uint64_t row = 0, total;
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &g->planes[i];
        row += (uint64_t)p->heads * p->head_dim * xkv_dtype_size(p->dtype);
    }
    return xkv_mul64(row, g->token_count, &total) ? total : UINT64_MAX;
}

bool xkv_rope_equal(const xkv_rope *a, const xkv_rope *b)
{
    return a->n_rot == b->n_rot && a->offset == b->offset && a->style == b->style && a->scale == b->scale &&
           memcmp(a->inv_freq, b->inv_freq, a->n_rot / 2 * sizeof *a->inv_freq) == 0;
}
