/* rate.h - the quantizer's step for a ratio or an error: bisection on coefficients projected once. */
#ifndef XKV_RATE_H
#define XKV_RATE_H

#include "cross.h"

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

#endif
