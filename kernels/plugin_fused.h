/* plugin_fused.h - coefficients to stored rows in one kernel: part of plugin.h. */
#ifndef XKV_PLUGIN_FUSED_H
#define XKV_PLUGIN_FUSED_H

/* Heads of this many elements at most, a multiple of XKV_FUSED_STEP. */
#define XKV_FUSED_DIM  256u
#define XKV_FUSED_STEP 16u

/* What expand, a product and store do: operands from integers, times both halves of the components, times alpha, then
 * stored. Operands are those of two lists (xkv_plug_expand.rows), one behind the other: a group's own, the cross
 * stage's. `store.rows` and `store.ld` are not used: rows are never in memory. */
typedef struct xkv_plug_fused {
    const int16_t *q[2];
    uint64_t q_stride[2];
    const uint32_t *rows[2];
    uint32_t count[2];
    const uint16_t *high, *low; /* f16 [count[0] + count[1]][width] */
    uint64_t width;
    float alpha;
    uint32_t heads; /* of all planes */
    uint32_t dim;   /* elements of the largest */
    uint32_t *fault;
    xkv_plug_store store;
} xkv_plug_fused;

#endif
