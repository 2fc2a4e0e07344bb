/* plan.h - which planes form a group, what each group is coded with, and ranks. */
#ifndef XKV_PLAN_H
#define XKV_PLAN_H

#include "container.h"
#include "kernels.h"
#include "xkv/codec.h"

/* Check `given` (may be NULL) and resolve defaults and the profile into *options.
 * Errors: ARGUMENT. */
XKV_MUST_CHECK xkv_status xkv_plan_options(xkv_ctx *ctx, const xkv_pack_options *given, xkv_pack_options *options);

/* Whether the options (resolved) lead to the quantizer and its step: dict, scalar, and svd with a ratio or an error. */
bool xkv_plan_quantized(const xkv_pack_options *options);

/* Form c->groups from c->geometry: contiguous layers, one dtype and, unless `joint`, one kind a group. Planes flagged
 * in `nonfinite` [plane_count] get lossless groups of their own. svd groups get the rank that rank_k/rank_v say, or 1
 * with other targets. Also sets chunk_tokens, chunk_count, sinks and window. Errors: ARGUMENT, LIMIT, MEMORY. */
XKV_MUST_CHECK xkv_status xkv_plan_groups(xkv_ctx *ctx, const xkv_pack_options *options, bool joint,
                                          const uint8_t *nonfinite, xkv_container *c);
/* Free c->groups. */
void xkv_plan_release(xkv_ctx *ctx, xkv_container *c);

/* Tokens that svd groups code: all but sinks and window. */
uint32_t xkv_plan_coded_tokens(const xkv_container *c);

/* Payload bytes of an svd group of rank `rank`, alignment included and factors stored, without its exact rows. */
uint64_t xkv_plan_svd_bytes(const xkv_container *c, const xkv_group *g, uint32_t rank);

/* Set the ranks of all svd groups so that their bytes fill `budget` as closely as whole components allow, K : V = 1
 * : 1.5 per layer as in xKV. False when even rank 1 exceeds it. */
bool xkv_plan_fill(xkv_container *c, uint64_t budget);

#endif
