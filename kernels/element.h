/* element.h - what one element takes: conversions and angles, the same in C and in CUDA. Includes nothing that only one
 * of the two has. */
#ifndef XKV_ELEMENT_H
#define XKV_ELEMENT_H

#include "xkv/format.h"

#include <math.h>

#ifdef __CUDACC__
#define XKV_ELEMENT static __host__ __device__ inline
#else
#define XKV_ELEMENT static inline
#endif

XKV_ELEMENT float xkv_float_from_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

XKV_ELEMENT uint32_t xkv_bits_of_float(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

XKV_ELEMENT float xkv_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = h >> 10 & 31u, mantissa = h & 1023u;
    if (exponent == 31) /* a NaN becomes a quiet one, as processors convert it */
        return xkv_float_from_bits(sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0));
    if (exponent == 0) /* zero or subnormal: a multiple of 2^-24, exact in f32 */
        return xkv_float_from_bits(sign | xkv_bits_of_float((float)mantissa * (1.0f / 16777216.0f)));
    return xkv_float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* To nearest, ties to even; finite values beyond 65504 become 65504. */
XKV_ELEMENT uint16_t xkv_f16_from_f32(float f)
{
    uint32_t bits = xkv_bits_of_float(f), magnitude = bits & 0x7fffffffu;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude == 0x7f800000u)
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude > 0x477fe000u) /* beyond 65504 */
        return (uint16_t)(sign | 0x7bffu);
    if (magnitude < 0x38800000u) { /* below 2^-14: numbers next to 0.5 have f16's subnormal step of 2^-24 */
        float rounded = xkv_float_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (xkv_bits_of_float(rounded) - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u); /* ties to even */
    return (uint16_t)(sign | (magnitude - (112u << 23)) >> 13);
}

/* Likewise; beyond the largest finite bf16 is that. */
XKV_ELEMENT uint16_t xkv_bf16_from_f32(float f)
{
    uint32_t bits = xkv_bits_of_float(f), magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    if (magnitude < 0x7f800000u && magnitude > 0x7f7f0000u) /* beyond the largest finite bf16 */
        return (uint16_t)((bits >> 16 & 0x8000u) | 0x7f7fu);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16); /* ties to even; infinities stay */
}

/* Cosine and sine of position * inv_freq. The product is taken exactly, as angle + rest, for positions may be large and
 * cosines forget nothing. */
XKV_ELEMENT void xkv_cos_sin_of(double position, double inv_freq, double *c, double *s)
{
    double angle = position * inv_freq, rest = fma(position, inv_freq, -angle);
    double c0 = cos(angle), s0 = sin(angle);
    *c = c0 - rest * s0;
    *s = s0 + rest * c0;
}

#endif
