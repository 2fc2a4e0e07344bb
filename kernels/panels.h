/* panels.h - products of coefficients with a basis that is used again and again.
 *
 * The basis B [rows][cols] is laid out once, so that no product copies it: in panels of as many columns as the
 * processor's inner product takes, each [rows][width], the last one filled up with zeros. The coefficients A [depth][m]
 * are laid out by blocks of XKV_DEPTH components in strips of XKV_STRIP tokens, each [components][XKV_STRIP]: whoever
 * makes them writes them so. (Goto and van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication, copy both
 * for each product.) A strip of a block stays in the first cache with the part of a panel that it is multiplied with.
 *
 * A sum is formed in the same order whatever else is computed beside it: its bits depend neither on the tokens and
 * columns that are asked for nor on the number of threads. */
#ifndef XKV_PANELS_H
#define XKV_PANELS_H

#include "kernels.h"

#define XKV_STRIP 12u
#define XKV_DEPTH 256u

typedef struct xkv_panels {
    const xkv_panel_tile *tile; /* the inner product that they are made for */
    size_t rows, cols;
    float *data;   /* [ceil(cols / tile->cols)][rows][tile->cols], aligned to a cache line */
    float *memory; /* which holds it */
} xkv_panels;

/* All zeros. Errors: MEMORY, LIMIT. */
XKV_MUST_CHECK xkv_status xkv_panels_create(xkv_ctx *ctx, const xkv_kernels *k, size_t rows, size_t cols,
                                            xkv_panels *p);
void xkv_panels_free(xkv_ctx *ctx, xkv_panels *p);

/* Rows [first, first + count) from rows [count][cols], and back. */
void xkv_panels_set(const xkv_panels *p, size_t first, size_t count, const float *rows);
void xkv_panels_get(const xkv_panels *p, size_t first, size_t count, float *rows);

/* Whether no element is NaN or infinite. */
bool xkv_panels_finite(const xkv_panels *p, const xkv_kernels *k);

/* f32 of the strips of m tokens. */
size_t xkv_strips_size(size_t m, size_t depth);
/* Component k of `depth` for m tokens: a[t * stride]. */
void xkv_strips_set(float *strips, size_t depth, size_t k, const float *a, size_t stride, size_t m);
/* All components [m][depth], rows `stride` apart; or [depth] of token t, where depth <= XKV_DEPTH. */
void xkv_strips_set_rows(float *strips, size_t depth, const float *a, size_t stride, size_t m);
void xkv_strips_set_token(float *strips, size_t depth, size_t t, const float *a);

/* C [m][count] += A^T times rows pick[0 .. depth) of B, of which columns [first, first + count) are taken. Rows of C
 * are `ldc` apart. */
void xkv_multiply_panels(size_t m, size_t depth, const float *strips, const xkv_panels *b, const uint32_t *pick,
                         size_t first, size_t count, float *c, size_t ldc);

#endif
