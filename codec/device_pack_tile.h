/* device_pack_tile.h - the rows of a group on the device: gathered, and sums over them. */
#ifndef XKV_DEVICE_PACK_TILE_H
#define XKV_DEVICE_PACK_TILE_H

#include "device_pack.h"
#include "device_planes.h"

/* A group at hand. */
typedef struct xkv_pack_work {
    xkv_device_packing *p;
    const xkv_group *g;
    const xkv_transform *t;        /* NULL: rows keep their mean */
    const xkv_device_basis *basis; /* of codec dict */
    uint32_t angles;               /* cosines and sines of a token */

    /* Offsets in the constants. */
    uint64_t ropes_at, planes_at, mean_at, begins_at;
} xkv_pack_work;

static inline void *xkv_pack_constant(const xkv_pack_work *w, uint64_t offset)
{
    return xkv_pack_place(w->p, w->p->at.constants + offset);
}

/* Rows of a tile, the first of which is *row. */
static inline uint32_t xkv_pack_tile(const xkv_device_packing *p, uint32_t tile, uint32_t *row)
{
    *row = tile * p->at.tile_tokens;
    return (uint32_t)xkv_min64(p->at.tile_tokens, p->tokens - *row);
}

/* Bytes of constants that a group brings. */
uint64_t xkv_pack_constant_bytes(uint64_t width, uint64_t planes, uint64_t angles);

/* Send what a group brings; `t` may be NULL. Errors: MEMORY, BACKEND. */
XKV_MUST_CHECK xkv_status xkv_pack_open(xkv_device_packing *p, const xkv_group *g, const xkv_transform *t,
                                        xkv_pack_work *w);
/* Rows [row, row + n) of the coded tokens, less their mean, [n][width] f32; n <= tile_tokens. Errors: BACKEND. */
XKV_MUST_CHECK xkv_status xkv_pack_gather(const xkv_pack_work *w, uint32_t row, uint32_t n, float *to);
/* Sum number i of all tokens, each of which has one at p->at.sums, p->at.stride apart; `scratch` [tokens]. Errors:
 * BACKEND. */
XKV_MUST_CHECK xkv_status xkv_pack_total(const xkv_pack_work *w, uint32_t i, double *scratch, double *sum);

#endif
