/* scatter.h - restored rows of a group, exact or coded, into the views that were asked for. */
#ifndef XKV_SCATTER_H
#define XKV_SCATTER_H

#include "entry_internal.h"
#include "moves.h"
#include "rows.h"

/* What a read asks for. */
typedef struct xkv_target {
    xkv_ctx *ctx;
    const xkv_kernels *kernels;
    const xkv_container *c;
    const xkv_view *views; /* NULL: rows go nowhere */
    uint32_t first, end;   /* tokens [first, end); `first` is row 0 of the views */
    xkv_moves moves;
    xkv_heads heads; /* of the planes */
} xkv_target;

/* What one thread needs. */
typedef struct xkv_scatterer {
    xkv_rotator rotator;
    xkv_rotator mover; /* of exact rows, when positions are asked for */
} xkv_scatterer;

/* Whether a view can hold some heads of a plane. Errors: ARGUMENT. */
XKV_MUST_CHECK xkv_status xkv_check_heads_view(xkv_ctx *ctx, const xkv_geometry *g, uint32_t plane, xkv_heads heads,
                                               const xkv_view *view);

XKV_MUST_CHECK xkv_status xkv_scatterer_init(const xkv_target *t, xkv_scatterer *s);
void xkv_scatterer_free(const xkv_target *t, xkv_scatterer *s);

/* Tokens [t0, t1) of g, as the engine holds them; `scratch` [g->width] f32. Only those asked for are taken. */
XKV_MUST_CHECK xkv_status xkv_scatter_exact(const xkv_target *t, xkv_scatterer *s, const xkv_group *g,
                                            const uint8_t *matrix, uint32_t t0, uint32_t t1, float *scratch);
/* Tokens [t0, t1) of g, K before RoPE: rotated, which changes `rows`, and rounded. Likewise. */
XKV_MUST_CHECK xkv_status xkv_scatter_rows(const xkv_target *t, xkv_scatterer *s, const xkv_group *g, float *rows,
                                           uint32_t t0, uint32_t t1);

#endif
