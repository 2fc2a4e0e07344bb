/* block_element.h - 32 elements to a block of ggml's, as its reference code quantizes them; like element.h. */
#ifndef XKV_BLOCK_ELEMENT_H
#define XKV_BLOCK_ELEMENT_H

#include "element.h"

#include <float.h>

#define XKV_BLOCK_ELEMENTS 32u

/* What elements are multiplied by for a scale d: 0 when d is 0 or so small that its inverse is infinite. */
XKV_ELEMENT float xkv_block_inverse(float d)
{
    float inverse = d != 0 ? 1 / d : 0;
    return inverse > FLT_MAX || inverse < -FLT_MAX ? 0 : inverse;
}

XKV_ELEMENT float xkv_make_finite(float x)
{
    if (x != x)
        return 0;
    return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
}

/* The first element of the largest magnitude. */
XKV_ELEMENT float xkv_block_largest_of(const float *x)
{
    float most = 0;

    for (uint32_t i = 0; i < XKV_BLOCK_ELEMENTS; i++)
        if (fabsf(x[i]) > fabsf(most))
            most = x[i];
    return most;
}

XKV_ELEMENT void xkv_store_scale(uint8_t *dst, float d)
{
    uint16_t bits = xkv_f16_from_f32(d);

    dst[0] = (uint8_t)bits;
    dst[1] = (uint8_t)(bits >> 8);
}

XKV_ELEMENT void xkv_block_to_q8_0(const float *x, uint8_t *dst)
{
    float d = fabsf(xkv_block_largest_of(x)) / 127, inverse = xkv_block_inverse(d);

    xkv_store_scale(dst, d);
    for (uint32_t i = 0; i < XKV_BLOCK_ELEMENTS; i++)
        dst[2 + i] = (uint8_t)(int8_t)roundf(x[i] * inverse);
}

/* The largest element becomes -8, so that the others reach up to 8, which is cut to 7. */
XKV_ELEMENT void xkv_block_to_q4_0(const float *x, uint8_t *dst)
{
    float d = xkv_block_largest_of(x) / -8, inverse = xkv_block_inverse(d);

    xkv_store_scale(dst, d);
    for (uint32_t i = 0; i < XKV_BLOCK_ELEMENTS / 2; i++) {
        uint32_t low = (uint32_t)(x[i] * inverse + 8.5f);
        uint32_t high = (uint32_t)(x[i + XKV_BLOCK_ELEMENTS / 2] * inverse + 8.5f);
        dst[2 + i] = (uint8_t)((low < 15 ? low : 15) | (high < 15 ? high : 15) << 4);
    }
}

/* x is made finite first. */
XKV_ELEMENT void xkv_block_from_f32(uint32_t dtype, float *x, uint8_t *dst)
{
    for (uint32_t i = 0; i < XKV_BLOCK_ELEMENTS; i++)
        x[i] = xkv_make_finite(x[i]);
    if (dtype == XKV_Q8_0)
        xkv_block_to_q8_0(x, dst);
    else
        xkv_block_to_q4_0(x, dst);
}

#endif
