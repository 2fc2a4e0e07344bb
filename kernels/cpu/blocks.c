/* blocks.c - rows of ggml's blocks: 32 elements behind one f16 scale, quantized as ggml's reference code does. */
#include "ops.h"

#include "element.h"

#include <math.h>

enum { BLOCK = 32 };

/* --- To f32 ------------------------------------------------------------------------------------------------------- */

static void q8_0_to_f32(const uint8_t *src, float *dst)
{
    float d = xkv_f16_to_f32(xkv_load16(src));
    for (size_t i = 0; i < BLOCK; i++)
        dst[i] = (float)(int8_t)src[2 + i] * d;
}

static void q4_0_to_f32(const uint8_t *src, float *dst)
{
    float d = xkv_f16_to_f32(xkv_load16(src));
    for (size_t i = 0; i < BLOCK / 2; i++) {
        dst[i] = (float)((src[2 + i] & 15) - 8) * d;
        dst[i + BLOCK / 2] = (float)((src[2 + i] >> 4) - 8) * d;
    }
}

void xkv_blocks_to_f32(uint32_t dtype, const uint8_t *src, float *dst, size_t n)
{
    size_t size = xkv_dtype_size(dtype);
    for (size_t i = 0; i < n; i += BLOCK, src += size)
        (dtype == XKV_Q8_0 ? q8_0_to_f32 : q4_0_to_f32)(src, dst + i);
}

/* --- From f32 ----------------------------------------------------------------------------------------------------- */

static float make_finite(float x)
{
    if (isnan(x))
        return 0;
    return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
}

/* The first element of the largest magnitude. */
static float largest(const float *x)
{
    float most = 0;
    for (size_t i = 0; i < BLOCK; i++)
        if (fabsf(x[i]) > fabsf(most))
            most = x[i];
    return most;
}

static void q8_0_from_f32(const float *x, uint8_t *dst)
{
    float d = fabsf(largest(x)) / 127, inverse = xkv_block_inverse(d);
    xkv_store16(dst, xkv_f16_from_f32(d));
    for (size_t i = 0; i < BLOCK; i++)
        dst[2 + i] = (uint8_t)(int8_t)roundf(x[i] * inverse);
}

/* The largest element becomes -8, so that the others reach up to 8, which is cut to 7. */
static void q4_0_from_f32(const float *x, uint8_t *dst)
{
    float d = largest(x) / -8, inverse = xkv_block_inverse(d);
    xkv_store16(dst, xkv_f16_from_f32(d));
    for (size_t i = 0; i < BLOCK / 2; i++) {
        uint32_t low = (uint32_t)(x[i] * inverse + 8.5f), high = (uint32_t)(x[i + BLOCK / 2] * inverse + 8.5f);
        dst[2 + i] = (uint8_t)(xkv_min64(low, 15) | xkv_min64(high, 15) << 4);
    }
}

void xkv_blocks_from_f32(uint32_t dtype, const float *src, uint8_t *dst, size_t n)
{
    size_t size = xkv_dtype_size(dtype);
    for (size_t i = 0; i < n; i += BLOCK, dst += size) {
        float x[BLOCK];
        for (size_t j = 0; j < BLOCK; j++)
            x[j] = make_finite(src[i + j]);
        (dtype == XKV_Q8_0 ? q8_0_from_f32 : q4_0_from_f32)(x, dst);
    }
}

bool xkv_blocks_finite(uint32_t dtype, const uint8_t *src, size_t n)
{
    size_t size = xkv_dtype_size(dtype);
    for (size_t i = 0; i < n; i += BLOCK, src += size)
        if ((xkv_load16(src) & 0x7c00u) == 0x7c00u)
            return false;
    return true;
}
