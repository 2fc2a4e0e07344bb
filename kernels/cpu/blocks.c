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

void xkv_blocks_from_f32(uint32_t dtype, const float *src, uint8_t *dst, size_t n)
{
    size_t size = xkv_dtype_size(dtype);
    for (size_t i = 0; i < n; i += BLOCK, dst += size) {
        float x[BLOCK];
        memcpy(x, src + i, sizeof x);
        xkv_block_from_f32(dtype, x, dst);
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
