/* svdq.h - codec svdq (spec/dictionary.md, section 1): a basis of the entry's own rows, rounded and coded with it. */
#ifndef XKV_SVDQ_H
#define XKV_SVDQ_H

#include "coded.h"
#include "scalar.h"

/* Components of a group before rounding: the right singular vectors of its rows less their mean, each plane divided by
 * its scale as in profile scalar. */
typedef struct xkv_svdq {
    uint32_t rank, width;
    uint32_t tokens;  /* that the entry codes */
    xkv_scalar scale; /* scales of the planes, and the mean of the rows */
    float *analysis;  /* [rank][width] component j over the scales: y_j = x . analysis_j - offset_j */
    float *offset;    /* [rank] */
    float *singular;  /* [rank] singular values of all coded tokens, falling */
    float *largest;   /* [rank] magnitude in component j */
    double found;     /* share of the rows' energy that the components hold */
} xkv_svdq;

/* Which rows to take, and how far to go. */
typedef struct xkv_svdq_target {
    uint32_t t0, t1;     /* coded tokens */
    uint32_t most;       /* of them to decompose: all, or so many in tiles spread evenly (rate.h) */
    uint32_t max_rank;   /* >= 1 */
    double energy;       /* share of the energy to find; 0: max_rank components */
    uint32_t iterations; /* of xkv_svd */
} xkv_svdq_target;

/* Decompose. rank is 0 when the group's values are too large for it. `rotators` has one entry per thread. */
XKV_MUST_CHECK xkv_status xkv_svdq_create(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, const xkv_group *g,
                                          const xkv_view *views, const xkv_svdq_target *target, xkv_svdq *s);
void xkv_svdq_free(xkv_ctx *ctx, xkv_svdq *s);

/* Exact components, for rate control: there is no synthesis. */
xkv_transform xkv_transform_of_svdq(const xkv_svdq *s);

/* What storing a component costs at a step. */
typedef struct xkv_component_price {
    uint32_t exponent;
    uint8_t table; /* 0: it is not worth storing, whatever its coefficients */
    double bits;
    double lost; /* share of its coefficients' energy that its rounding turns into an error */
} xkv_component_price;

/* Price of component `j`; of the mean, in bits. Scratch: v and q [width], q is its integers. */
xkv_component_price xkv_svdq_price(const xkv_svdq *s, uint32_t j, float step, float *v, int16_t *q);
double xkv_svdq_mean_bits(const xkv_svdq *s, float step, float *v, int16_t *q);

/* The basis as a decoder sees it: mean and components rounded for one step. */
typedef struct xkv_svdq_basis {
    uint32_t rank, width;
    float mean_step;
    const float *scales; /* [plane_count] of the planes; belong to somebody else */
    uint8_t *exponents;  /* [rank] component j is q_j 2^(-exponent / 8) */
    uint8_t *tables;     /* [rank + 1] of the mean, then of the components */
    int16_t *q;          /* [rank + 1][width] */
    double *bits, *lost; /* [rank] prices of the components; encoder only */
    float *mean;         /* [width] */
    xkv_panels rows;     /* [rank][width] */
    float *analysis;     /* [rank][width] dual to these rows, by least squares; encoder only, as is */
    float *offset;       /* [rank] */
    bool overflow;       /* the mean is beyond 16 bits: nothing else is set */
} xkv_svdq_basis;

/* Three steps: round the mean and the first components, to learn their prices; take those components whose coefficients
 * have a table; make what they are used with. */
XKV_MUST_CHECK xkv_status xkv_svdq_round(xkv_ctx *ctx, const xkv_svdq *s, float step, xkv_svdq_basis *b);
void xkv_svdq_select(xkv_svdq_basis *b, const uint8_t *tables);
XKV_MUST_CHECK xkv_status xkv_svdq_finish(xkv_ctx *ctx, xkv_pool *pool, const xkv_kernels *k, const xkv_svdq *s,
                                          xkv_svdq_basis *b);
/* Leave out the components that have no coefficients after all, in both; one is kept in any case. */
void xkv_svdq_close_up(xkv_svdq_basis *b, xkv_coded *coded);
void xkv_svdq_basis_free(xkv_ctx *ctx, xkv_svdq_basis *b);

xkv_transform xkv_transform_of_svdq_basis(const xkv_svdq_basis *b);

/* --- Side part --- */

/* Space that xkv_svdq_store needs, and what it stores: the size. */
uint64_t xkv_svdq_bound(const xkv_group *g, const xkv_svdq_basis *b);
uint64_t xkv_svdq_store(const xkv_group *g, const xkv_svdq_basis *b, const xkv_coded *coded, uint8_t *out);

/* The basis of a side part of `size` bytes that may be anything but shorter than its arrays. Errors: CORRUPT [Q3, E1,
 * E2, E3]. */
XKV_MUST_CHECK xkv_status xkv_svdq_parse(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_group *g,
                                         const uint8_t *side, uint64_t size, const char *where, xkv_svdq_basis *b);

/* Give a parsed basis what rows are analysed with, as xkv_svdq_finish() does. */
XKV_MUST_CHECK xkv_status xkv_svdq_invert(xkv_ctx *ctx, xkv_pool *pool, const xkv_kernels *k,
                                          const xkv_geometry *geometry, const xkv_group *g, const uint8_t *side,
                                          const char *where, xkv_svdq_basis *b);

#endif
