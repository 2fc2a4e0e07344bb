/* rate.h - the quantizer's step for a ratio or an error: bisection on coefficients projected once. */
#ifndef XKV_RATE_H
#define XKV_RATE_H

#include "cross.h"

/* Rows that rate control looks at: of more than this many, so many in tiles spread evenly. */
#define XKV_SAMPLE_TOKENS (4 * XKV_TILE_ROWS)

/* With an error for all groups together, one of them may have up to this many times it: their metrics are estimates of
 * what errors cost, but a group of huge values must not buy room for ruining the others. */
#define XKV_GROUP_SLACK 4

/* Tile `tile` of a sample of `sampled` of `coded` rows: its first row, and how many it has. */
uint32_t xkv_sample_tile(uint32_t coded, uint32_t sampled, uint32_t tile, uint32_t *row);

/* Coefficients of all coded groups over a sample of the tokens. */
typedef struct xkv_sample xkv_sample;

/* Project tokens of every group whose transform has a rank (transforms [group_count]): all coded tokens when there are
 * at most 1024, else four tiles of 256 spread evenly. `cross` is the basis of group 0 when that is a cross stage. */
XKV_MUST_CHECK xkv_status xkv_sample_create(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, const xkv_container *c,
                                            const xkv_view *views, const xkv_transform *transforms,
                                            const xkv_cross_basis *cross, xkv_sample **sample_p);
void xkv_sample_free(xkv_ctx *ctx, xkv_sample *sample);

/* The step at which the payload's entropy-coded bytes come to `bytes`, or the relative error (in the metric, where
 * there is one) to `error`; whichever is not 0. Errors: TARGET. */
XKV_MUST_CHECK xkv_status xkv_sample_step(xkv_ctx *ctx, xkv_pool *pool, xkv_sample *sample, double bytes, double error,
                                          float *step);

/* What a step comes to: bytes of the payload's entropy-coded parts, and the relative error. */
typedef struct xkv_estimate {
    double bytes, error;
} xkv_estimate;
XKV_MUST_CHECK xkv_status xkv_sample_estimate(xkv_pool *pool, xkv_sample *sample, float step, xkv_estimate *estimate);

#endif
