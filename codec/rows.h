/* rows.h - rows of a group in f32: the planes side by side, K before RoPE. */
#ifndef XKV_ROWS_H
#define XKV_ROWS_H

#include "container.h"
#include "kernels.h"

/* KV heads [first, first + count) of a plane; count 0: all. */
typedef struct xkv_heads {
    uint32_t first, count;
} xkv_heads;

/* The plane with these heads alone; *element: where they begin in its row. What all heads share is whole. */
xkv_plane xkv_plane_heads(const xkv_plane *p, xkv_heads heads, uint32_t *element);

/* Scratch of one thread for turning rows: angle tables of the geometry's RoPEs, made when first used. */
typedef struct xkv_rotator {
    const xkv_geometry *geometry;
    const xkv_kernels *kernels;
    bool inverse;
    xkv_heads heads;         /* that are turned; set after init, which asks for all */
    xkv_rope_table **tables; /* [rope_count] */
    float *cos_sin;          /* of the row at hand */
} xkv_rotator;

XKV_MUST_CHECK xkv_status xkv_rotator_init(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_kernels *k,
                                           bool inverse, xkv_rotator *r);
void xkv_rotator_free(xkv_ctx *ctx, xkv_rotator *r);

/* Rotate (or un-rotate) the planes of `g` that have a RoPE in rows [rows][g->width] by positions [rows]. */
XKV_MUST_CHECK xkv_status xkv_rotate_rows(xkv_ctx *ctx, xkv_rotator *r, const xkv_group *g, const int32_t *positions,
                                          uint32_t rows, float *x);

/* Tokens [t0, t1) of g's planes from views (of which token 0 is row 0) into x [t1 - t0][g->width], un-rotated. */
XKV_MUST_CHECK xkv_status xkv_gather_rows(xkv_ctx *ctx, xkv_rotator *r, const xkv_group *g, const xkv_view *views,
                                          uint32_t t0, uint32_t t1, float *x);

static inline uint32_t xkv_plane_width(const xkv_plane *p)
{
    return p->heads * p->head_dim;
}

/* Bytes of the cache at 16 bits an element, whatever its dtype: the numerator of a ratio. */
uint64_t xkv_raw16_bytes(const xkv_geometry *geometry);

/* sqrt(squares / energy), 0 without energy: spec/codec.md, section 4. */
double xkv_relative_error(double squares, double energy);

#endif
