/* svd_group.h - one group by truncated SVD: factors at 16 bits, and the error they make. */
#ifndef XKV_SVD_GROUP_H
#define XKV_SVD_GROUP_H

#include "rows.h"

typedef struct xkv_factors {
    uint32_t rank;
    uint32_t first;         /* token of the first row of coefficients */
    uint16_t *coefficients; /* f16 [tokens][rank], the largest of a column is 1 when the scales are made for them */
    uint16_t *components;   /* f16 [rank][width] */
    float *scales;          /* [rank] */
} xkv_factors;

/* What an svd group should become. Either `rank` > 0, or `error` > 0: the smallest rank up to max_rank whose measured
 * error is at most that. */
typedef struct xkv_svd_target {
    uint32_t rank, max_rank, iterations;
    double error;
} xkv_svd_target;

/* Decompose tokens [t0, t1) of g. Sets g->rank, energy, error and plane_errors (spec/codec.md, section 4).
 * *reached is false, and the factors are empty, when the error cannot be had within max_rank.
 * `rotators` has one entry per thread of the pool and un-rotates. */
XKV_MUST_CHECK xkv_status xkv_factorize(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, xkv_group *g,
                                        const xkv_view *views, uint32_t t0, uint32_t t1, const xkv_svd_target *target,
                                        xkv_factors *f, bool *reached);
/* Coefficients of tokens [t0, t1) of g on the components and in the scales that f holds. Sets g's energy, error, plane
 * errors and energies, of the tokens from `measured` on. *fit is false, and nothing is set, when a coefficient is
 * beyond the f16 of its scale. */
XKV_MUST_CHECK xkv_status xkv_project(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, xkv_group *g,
                                      const xkv_view *views, uint32_t t0, uint32_t t1, uint32_t measured,
                                      xkv_factors *f, bool *fit);
void xkv_factors_free(xkv_ctx *ctx, xkv_factors *f);

#endif
