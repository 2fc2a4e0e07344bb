/* scalar.h - the transform of profile scalar (spec/dictionary.md, section 1): subtract each element's mean, divide each
 * plane by its scale. */
#ifndef XKV_SCALAR_H
#define XKV_SCALAR_H

#include "coded.h"

typedef struct xkv_scalar {
    uint32_t width;
    float *scales;         /* [plane_count] */
    uint16_t *stored_mean; /* [width] f16, as stored */
    float *mean;           /* [width] the same in f32 */
    float *diagonal;       /* [width] scale of the element's plane */
    double energy;         /* sum of ((x - mean) / scale)^2 over what was measured; 0 when read */
} xkv_scalar;

/* Measure tokens [t0, t1) of g: means, and as scale the plane's standard deviation, over KEY_WEIGHT for keys. */
XKV_MUST_CHECK xkv_status xkv_scalar_create(xkv_ctx *ctx, xkv_rotator *rotator, const xkv_group *g,
                                            const xkv_view *views, uint32_t t0, uint32_t t1, xkv_scalar *s);
/* The same from a stored side part: `scales` f32, `mean` f16, little-endian. Errors: CORRUPT [Q3]. */
XKV_MUST_CHECK xkv_status xkv_scalar_parse(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_group *g,
                                           const uint8_t *scales, const uint8_t *mean, const char *where,
                                           xkv_scalar *s);
void xkv_scalar_free(xkv_ctx *ctx, xkv_scalar *s);

xkv_transform xkv_transform_of_scalar(const xkv_scalar *s);

#endif
