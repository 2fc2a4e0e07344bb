/* fused_block.h - coefficients to stored rows: what a block does for one head and XKV_FUSED_TOKENS tokens. Before it is
 * included `xkv_fused_sums` is what a thread keeps of the sums, with
 *     xkv_fused_clear(sums)                    all are 0
 *     xkv_fused_add(sums, a, b, dim)           += a^T b, where a is [XKV_FUSED_DEPTH][XKV_FUSED_TOKENS] and b
 *                                              [XKV_FUSED_DEPTH][dim], both f16 and shared
 *     xkv_fused_take(sums, alpha, dim, rows)   times alpha to rows [XKV_FUSED_TOKENS][dim], f32 and shared
 * which is tensor cores in CUDA, and loops in the emulation. */
#ifndef XKV_CUDA_FUSED_BLOCK_H
#define XKV_CUDA_FUSED_BLOCK_H

#include "block.h"
#include "elements.h"

#ifdef __CUDACC__
#define XKV_RAISE(fault, bits) ((void)atomicOr((fault), (bits)))
#else
#define XKV_RAISE(fault, bits) ((void)(*(fault) |= (bits)))
#endif

/* Bytes that a block shares: operands, a half of the components, and the rows. */
XKV_ELEMENT uint32_t xkv_fused_shared(uint32_t dim)
{
    return XKV_FUSED_DEPTH * (XKV_FUSED_TOKENS + dim) * (uint32_t)sizeof(uint16_t) +
           XKV_FUSED_TOKENS * dim * (uint32_t)sizeof(float);
}

/* Operand k of a token, f16; 0 beyond the last one. */
XKV_BLOCK uint16_t xkv_fused_operand(const xkv_plug_fused *o, uint32_t k, uint32_t t)
{
    uint32_t list = k >= o->count[0], i = list ? k - o->count[0] : k;

    if (i >= o->count[list] || t >= o->store.tokens)
        return 0;
    uint32_t row = o->rows[list][i];
    int32_t part = xkv_part_of(o->q[list][(row >> 2) * o->q_stride[list] + t], row & 3u);
    if ((row & 3u) == XKV_OPERAND_WHOLE && (part > 2048 || part < -2048))
        XKV_RAISE(o->fault, XKV_WARP_TOO_WIDE);
    return xkv_f16_from_f32((float)part);
}

XKV_BLOCK uint16_t xkv_fused_component(const xkv_plug_fused *o, const uint16_t *half, uint32_t k, uint32_t column)
{
    return k < o->count[0] + o->count[1] ? half[k * o->width + column] : 0;
}

/* The plane that the n-th head of all planes is of; which one of its heads it is. */
XKV_ELEMENT uint32_t xkv_fused_plane(const xkv_plug_fused *o, uint32_t n, uint32_t *head)
{
    uint32_t plane = 0;

    for (; n >= o->store.planes[plane].heads; plane++)
        n -= o->store.planes[plane].heads;
    *head = n;
    return plane;
}

/* Rows of one head, as if they were the only columns there are. */
XKV_BLOCK void xkv_fused_store(const xkv_plug_fused *o, const xkv_plug_plane *plane, uint32_t head, uint32_t first,
                               const float *rows)
{
    uint32_t items = xkv_items_of(plane, 1), left = o->store.tokens - first;
    uint32_t tokens = left < XKV_FUSED_TOKENS ? left : XKV_FUSED_TOKENS;
    xkv_plug_plane p = *plane;
    xkv_plug_store s = o->store;

    p.column = 0u - head * plane->head_dim; /* which wraps back when the head's elements are counted */
    s.rows = rows;
    s.ld = plane->head_dim;
    s.mean = o->store.mean ? o->store.mean + plane->column + head * plane->head_dim : NULL;
    s.angles = o->store.angles + first * o->store.angles_stride;
    s.first = o->store.first + first;
    XKV_EACH_ITEM(i, tokens * items)
    xkv_store_item(&s, &p, i / items, head * items + i % items);
}

/* A block: tokens from number * XKV_FUSED_TOKENS on, the n-th head. */
XKV_BLOCK void xkv_block_fused(const xkv_plug_fused *o, uint32_t number, uint32_t n, uint8_t *shared)
{
    uint32_t head, first = number * XKV_FUSED_TOKENS;
    const xkv_plug_plane *p = &o->store.planes[xkv_fused_plane(o, n, &head)];
    uint32_t dim = p->head_dim, column = p->column + head * dim;
    uint16_t *a = (uint16_t *)(void *)shared, *b = a + XKV_FUSED_DEPTH * XKV_FUSED_TOKENS;
    float *rows = (float *)(void *)(b + XKV_FUSED_DEPTH * dim);
    xkv_fused_sums sums;

    xkv_fused_clear(&sums);
    for (uint32_t k = 0; k < o->count[0] + o->count[1]; k += XKV_FUSED_DEPTH) {
        XKV_EACH_ITEM(i, XKV_FUSED_DEPTH * XKV_FUSED_TOKENS)
        a[i] = xkv_fused_operand(o, k + i / XKV_FUSED_TOKENS, first + i % XKV_FUSED_TOKENS);
        for (int half = 0; half < 2; half++) {
            XKV_EACH_ITEM(i, XKV_FUSED_DEPTH * dim)
            b[i] = xkv_fused_component(o, half == 0 ? o->high : o->low, k + i / dim, column + i % dim);
            XKV_TOGETHER();
            xkv_fused_add(&sums, a, b, dim);
            XKV_TOGETHER();
        }
    }
    xkv_fused_take(&sums, o->alpha, dim, rows);
    XKV_TOGETHER();
    xkv_fused_store(o, p, head, first, rows);
}

#endif
