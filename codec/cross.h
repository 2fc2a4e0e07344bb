/* cross.h - packing the cross stage (spec/dictionary.md, section 4): the leading coefficients of all groups of a
 * dictionary, rotated together. */
#ifndef XKV_CROSS_H
#define XKV_CROSS_H

#include "coded.h"

/* The groups that take part, by index in the container: those with transforms[i].top > 0 and a codec that is dict. */
static inline bool xkv_takes_part(const xkv_container *c, const xkv_transform *transforms, uint32_t group)
{
    return c->groups[group].codec == XKV_GROUP_DICT && transforms[group].top > 0;
}

/* Add a group's share to the cross coefficients: y [basis->rank] rows += components of `t`'s columns times its leading
 * coefficients z[j * stride + s]. Rows of y are `y_stride` apart. */
void xkv_cross_add(const xkv_kernels *k, const xkv_cross_basis *basis, const xkv_transform *t, const float *z,
                   size_t stride, uint32_t tokens, float *y, size_t y_stride);

/* Largest squared norm, over tokens, of the leading coefficients z of a group: what decides when the stage overflows.
 */
float xkv_cross_norm(const float *z, size_t stride, uint32_t top, uint32_t tokens);

/* Which groups must be left out when a coefficient of the stage exceeds the quantizer's 16 bits at `step`: norms
 * [count] are those above. Without these groups none exceeds them, if the basis is orthonormal to a factor of 2. */
bool xkv_cross_too_large(float norm, float step, uint32_t count);

/* Analyze, quantize and choose tokens [t0, t1) of the cross stage, with `tables` [basis->rank] if there are any (as in
 * xkv_transform). norms [group_count], 0 for groups that take no part. */
XKV_MUST_CHECK xkv_status xkv_code_cross(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, const xkv_container *c,
                                         const xkv_view *views, uint32_t t0, uint32_t t1,
                                         const xkv_transform *transforms, const xkv_cross_basis *basis,
                                         const uint8_t *tables, float step, float *norms, xkv_coded *coded);

/* What coding a group needs of the stage; it points into `coded`. */
static inline xkv_cross xkv_cross_of_coded(const xkv_cross_basis *basis, const xkv_coded *coded)
{
    return (xkv_cross){.basis = basis,
                       .rank = coded->rank,
                       .tables = coded->tables,
                       .step = coded->step,
                       .coded = coded->coded,
                       .coded_tables = coded->coded_tables};
}

#endif
