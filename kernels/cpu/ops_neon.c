/* ops_neon.c - the operation table for AArch64. Same results as ops.c, bit for bit. Only what compilers make no vectors
 * of is here: gcc does for bf16, f32 and the rotations of ops.c, and has no use of the f16 instructions. */
#include "ops.h"

#if defined(__aarch64__) && defined(__ARM_NEON) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

#include <arm_neon.h>

/* --- Conversions -------------------------------------------------------------------------------------------------- */

static void f16_to_f32(const uint8_t *src, float *dst, size_t n)
{
    for (size_t i = 0; i < n; i += 8) {
        float16x8_t h = vreinterpretq_f16_u8(vld1q_u8(src + 2 * i));
        vst1q_f32(dst + i, vcvt_f32_f16(vget_low_f16(h)));
        vst1q_f32(dst + i + 4, vcvt_high_f32_f16(h));
    }
}

/* Finite values stop at 65504; infinities and NaNs stay. */
static float32x4_t clamp_to_f16(float32x4_t x)
{
    const uint32x4_t sign = vdupq_n_u32(0x80000000u), largest = vdupq_n_u32(0x477fe000),
                     infinity = vdupq_n_u32(0x7f800000);
    uint32x4_t magnitude = vreinterpretq_u32_f32(vabsq_f32(x));
    uint32x4_t clamped = vbslq_u32(vcgeq_u32(magnitude, infinity), magnitude, vminq_u32(magnitude, largest));
    return vreinterpretq_f32_u32(vbslq_u32(sign, vreinterpretq_u32_f32(x), clamped));
}

static void f16_from_f32(const float *src, uint8_t *dst, size_t n)
{
    for (size_t i = 0; i < n; i += 8) {
        float16x4_t low = vcvt_f16_f32(clamp_to_f16(vld1q_f32(src + i)));
        float16x8_t h = vcvt_high_f16_f32(low, clamp_to_f16(vld1q_f32(src + i + 4)));
        vst1q_u8(dst + 2 * i, vreinterpretq_u8_f16(h));
    }
}

static void neon_to_f32(uint32_t dtype, const void *src, float *dst, size_t n)
{
    size_t whole = dtype == XKV_F16 ? n / 8 * 8 : 0;
    f16_to_f32(src, dst, whole);
    xkv_generic_to_f32(dtype, (const uint8_t *)src + 2 * whole, dst + whole, n - whole);
}

static void neon_from_f32(uint32_t dtype, const float *src, void *dst, size_t n)
{
    size_t whole = dtype == XKV_F16 ? n / 8 * 8 : 0;
    f16_from_f32(src, dst, whole);
    xkv_generic_from_f32(dtype, src + whole, (uint8_t *)dst + 2 * whole, n - whole);
}

static bool neon_all_finite(uint32_t dtype, const void *src, size_t n)
{
    const uint8_t *s = src;
    if (xkv_dtype_block(dtype) > 1)
        return xkv_blocks_finite(dtype, s, n);
    size_t elem = dtype == XKV_F32 ? 4 : 2, whole = n * elem / 16 * 16;
    uint32x4_t exponent32 = vdupq_n_u32(0x7f800000);
    uint16x8_t exponent16 = vdupq_n_u16(dtype == XKV_F16 ? 0x7c00 : 0x7f80);
    uint8x16_t found = vdupq_n_u8(0);
    for (size_t i = 0; i < whole; i += 16) {
        uint8x16_t bits = vld1q_u8(s + i);
        uint32x4_t hit32 = vceqq_u32(vandq_u32(vreinterpretq_u32_u8(bits), exponent32), exponent32);
        uint16x8_t hit16 = vceqq_u16(vandq_u16(vreinterpretq_u16_u8(bits), exponent16), exponent16);
        found = vorrq_u8(found, elem == 4 ? vreinterpretq_u8_u32(hit32) : vreinterpretq_u8_u16(hit16));
    }
    return vmaxvq_u8(found) == 0 && xkv_generic_all_finite(dtype, s + whole, n - whole / elem);
}

/* --- Sums --------------------------------------------------------------------------------------------------------- */

#define SUMS (XKV_SUM_LANES / 2) /* vectors of two partial sums */

static double neon_sum_squares(const float *x, size_t n)
{
    double lanes[XKV_SUM_LANES];
    float64x2_t sum[SUMS];
    size_t i = 0;
    for (size_t j = 0; j < SUMS; j++)
        sum[j] = vdupq_n_f64(0);
    for (; i + XKV_SUM_LANES <= n; i += XKV_SUM_LANES) {
        for (size_t j = 0; j < SUMS; j++) {
            float64x2_t v = vcvt_f64_f32(vld1_f32(x + i + 2 * j));
            sum[j] = vaddq_f64(sum[j], vmulq_f64(v, v));
        }
    }
    for (size_t j = 0; j < SUMS; j++)
        vst1q_f64(lanes + 2 * j, sum[j]);
    xkv_generic_sum_squares_tail(x + i, n - i, lanes);
    return xkv_generic_add_lanes(lanes);
}

static double neon_sum_squared_difference(const float *a, const float *b, size_t n)
{
    double lanes[XKV_SUM_LANES];
    float64x2_t sum[SUMS];
    size_t i = 0;
    for (size_t j = 0; j < SUMS; j++)
        sum[j] = vdupq_n_f64(0);
    for (; i + XKV_SUM_LANES <= n; i += XKV_SUM_LANES) {
        for (size_t j = 0; j < SUMS; j++) {
            float64x2_t v = vsubq_f64(vcvt_f64_f32(vld1_f32(a + i + 2 * j)), vcvt_f64_f32(vld1_f32(b + i + 2 * j)));
            sum[j] = vaddq_f64(sum[j], vmulq_f64(v, v));
        }
    }
    for (size_t j = 0; j < SUMS; j++)
        vst1q_f64(lanes + 2 * j, sum[j]);
    xkv_generic_sum_squared_difference_tail(a + i, b + i, n - i, lanes);
    return xkv_generic_add_lanes(lanes);
}

/* --- Byte planes of 2-byte elements, in blocks of 16 x 16 --------------------------------------------------------- */

#define BLOCK 16

/* One round interleaves vector i with vector i + 8, which rotates the eight bits of a byte's index (4 for the row, 4
 * for the column) by one; four rounds exchange row and column. */
static inline void transpose(uint8x16_t v[BLOCK])
{
    uint8x16_t t[BLOCK];
    for (size_t round = 0; round < 4; round++) {
        for (size_t i = 0; i < 8; i++) {
            t[2 * i] = vzip1q_u8(v[i], v[i + 8]);
            t[2 * i + 1] = vzip2q_u8(v[i], v[i + 8]);
        }
        memcpy(v, t, sizeof t);
    }
}

static void split_block(const uint8_t *src, size_t rows, size_t cols, uint8_t *low, uint8_t *high)
{
    uint8x16_t v[BLOCK];
    for (size_t r = 0; r < BLOCK; r++) {
        uint8x16x2_t bytes = vld2q_u8(src + r * cols * 2);
        vst1q_u8(low + r * cols, bytes.val[0]);
        v[r] = bytes.val[1];
    }
    transpose(v);
    for (size_t c = 0; c < BLOCK; c++)
        vst1q_u8(high + c * rows, v[c]);
}

static void join_block(const uint8_t *low, const uint8_t *high, size_t rows, size_t cols, uint8_t *dst)
{
    uint8x16_t v[BLOCK];
    for (size_t c = 0; c < BLOCK; c++)
        v[c] = vld1q_u8(high + c * rows);
    transpose(v);
    for (size_t r = 0; r < BLOCK; r++) {
        uint8x16x2_t bytes = {{vld1q_u8(low + r * cols), v[r]}};
        vst2q_u8(dst + r * cols * 2, bytes);
    }
}

static void neon_split_bytes(const void *src, size_t rows, size_t cols, size_t elem, uint8_t *planes)
{
    if (elem != 2) {
        xkv_generic_split_bytes(src, rows, cols, elem, planes);
        return;
    }
    const uint8_t *s = src;
    uint8_t *high = planes + rows * cols;
    size_t whole_rows = rows / BLOCK * BLOCK, whole_cols = cols / BLOCK * BLOCK;
    for (size_t c = 0; c < whole_cols; c += BLOCK)
        for (size_t r = 0; r < whole_rows; r += BLOCK)
            split_block(s + (r * cols + c) * 2, rows, cols, planes + r * cols + c, high + c * rows + r);
    xkv_tile right = {rows, cols, 0, whole_rows, whole_cols, cols}, bottom = {rows, cols, whole_rows, rows, 0, cols};
    xkv_generic_split_tile(&right, src, elem, planes);
    xkv_generic_split_tile(&bottom, src, elem, planes);
}

static void neon_join_bytes(const uint8_t *planes, size_t rows, size_t cols, size_t elem, void *dst)
{
    if (elem != 2) {
        xkv_generic_join_bytes(planes, rows, cols, elem, dst);
        return;
    }
    uint8_t *d = dst;
    const uint8_t *high = planes + rows * cols;
    size_t whole_rows = rows / BLOCK * BLOCK, whole_cols = cols / BLOCK * BLOCK;
    for (size_t c = 0; c < whole_cols; c += BLOCK)
        for (size_t r = 0; r < whole_rows; r += BLOCK)
            join_block(planes + r * cols + c, high + c * rows + r, rows, cols, d + (r * cols + c) * 2);
    xkv_tile right = {rows, cols, 0, whole_rows, whole_cols, cols}, bottom = {rows, cols, whole_rows, rows, 0, cols};
    xkv_generic_join_tile(&right, planes, elem, dst);
    xkv_generic_join_tile(&bottom, planes, elem, dst);
}

const xkv_kernels *xkv_kernels_cpu_neon(void)
{
    static const xkv_kernels table = {
        .name = "neon",
        .to_f32 = neon_to_f32,
        .from_f32 = neon_from_f32,
        .all_finite = neon_all_finite,
        .rope_row = xkv_generic_rope_row,
        .gemm_nn = xkv_blas_gemm_nn,
        .gemm_tn = xkv_blas_gemm_tn,
        .gemm_nt = xkv_blas_gemm_nt,
        .panel_tile = {xkv_neon_add_tile, XKV_NEON_COLS},
        .sum_squares = neon_sum_squares,
        .sum_squared_difference = neon_sum_squared_difference,
        .split_bytes = neon_split_bytes,
        .join_bytes = neon_join_bytes,
    };
    return &table; /* every AArch64 processor that runs Linux has NEON */
}

#else

const xkv_kernels *xkv_kernels_cpu_neon(void)
{
    return NULL;
}

#endif
