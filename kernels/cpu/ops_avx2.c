/* ops_avx2.c - the operation table for x86-64 with AVX2 and F16C. Same results as ops.c, bit for bit. */
#include "ops.h"

#include "element.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>

/* Only these functions may use the extensions: the rest of the library runs on any x86-64. */
#define AVX2 __attribute__((target("avx2,f16c")))

/* --- Conversions -------------------------------------------------------------------------------------------------- */

AVX2 static void f16_to_f32(const uint8_t *src, float *dst, size_t n)
{
    for (size_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + 2 * i))));
}

AVX2 static void bf16_to_f32(const uint8_t *src, float *dst, size_t n)
{
    for (size_t i = 0; i < n; i += 8) {
        __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(src + 2 * i)));
        _mm256_storeu_ps(dst + i, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    }
}

AVX2 static void f16_from_f32(const float *src, uint8_t *dst, size_t n)
{
    const __m256 sign_bit = _mm256_set1_ps(-0.0f), largest = _mm256_set1_ps(65504.0f);
    const __m256 infinity = _mm256_set1_ps(__builtin_inff());
    for (size_t i = 0; i < n; i += 8) {
        __m256 x = _mm256_loadu_ps(src + i);
        __m256 magnitude = _mm256_andnot_ps(sign_bit, x);
        __m256 is_infinite = _mm256_cmp_ps(magnitude, infinity, _CMP_EQ_OQ);
        __m256 clamped = _mm256_min_ps(largest, magnitude); /* the second operand when one is a NaN */
        clamped = _mm256_or_ps(_mm256_blendv_ps(clamped, magnitude, is_infinite), _mm256_and_ps(sign_bit, x));
        __m128i h = _mm256_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128((__m128i *)(dst + 2 * i), h);
    }
}

AVX2 static __m256i bf16_bits(__m256 x)
{
    const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
    __m256i bits = _mm256_castps_si256(x), magnitude = _mm256_and_si256(bits, magnitude_mask);
    __m256i sign = _mm256_srli_epi32(_mm256_andnot_si256(magnitude_mask, bits), 16);
    __m256i upper = _mm256_srli_epi32(magnitude, 16);
    __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(magnitude, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    /* Finite values stop at the largest finite one; infinities and NaNs have a larger limit. */
    __m256i not_finite = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f7fffff));
    __m256i is_nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
    __m256i finite = _mm256_min_epi32(rounded, _mm256_set1_epi32(0x7f7f));
    __m256i special = _mm256_or_si256(upper, _mm256_and_si256(is_nan, _mm256_set1_epi32(0x40)));
    return _mm256_or_si256(sign, _mm256_blendv_epi8(finite, special, not_finite));
}

AVX2 static void bf16_from_f32(const float *src, uint8_t *dst, size_t n)
{
    for (size_t i = 0; i < n; i += 16) {
        __m256i a = bf16_bits(_mm256_loadu_ps(src + i)), b = bf16_bits(_mm256_loadu_ps(src + i + 8));
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
        _mm256_storeu_si256((__m256i *)(dst + 2 * i), packed);
    }
}

/* --- Blocks of 32 elements, as in blocks.c ----------------------------------------------------------------------- */

AVX2 static void q8_0_to_f32(const uint8_t *src, float *dst, size_t n)
{
    for (size_t i = 0; i < n; i += 32, src += 34) {
        __m256 d = _mm256_set1_ps(_cvtsh_ss(xkv_load16(src)));
        for (size_t j = 0; j < 32; j += 8) {
            __m256i q = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(src + 2 + j)));
            _mm256_storeu_ps(dst + i + j, _mm256_mul_ps(_mm256_cvtepi32_ps(q), d));
        }
    }
}

AVX2 static void q4_0_to_f32(const uint8_t *src, float *dst, size_t n)
{
    const __m128i low_bits = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    for (size_t i = 0; i < n; i += 32, src += 18) {
        __m256 d = _mm256_set1_ps(_cvtsh_ss(xkv_load16(src)));
        __m128i bytes = _mm_loadu_si128((const __m128i *)(src + 2));
        __m128i low = _mm_sub_epi8(_mm_and_si128(bytes, low_bits), eight);
        __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits), eight);
        const __m128i eights[4] = {low, _mm_srli_si128(low, 8), high, _mm_srli_si128(high, 8)};
        for (size_t j = 0; j < 4; j++)
            _mm256_storeu_ps(dst + i + 8 * j, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eights[j])), d));
    }
}

/* A block in four vectors, NaN as 0 and infinities as the largest finite numbers; the largest magnitude in all lanes.
 */
AVX2 static __m256 load_block(const float *src, __m256 x[4])
{
    const __m256 sign_bit = _mm256_set1_ps(-0.0f), largest = _mm256_set1_ps(3.40282347e38f);
    __m256 m = _mm256_setzero_ps();
    for (size_t j = 0; j < 4; j++) {
        x[j] = _mm256_loadu_ps(src + 8 * j);
        x[j] = _mm256_and_ps(x[j], _mm256_cmp_ps(x[j], x[j], _CMP_ORD_Q));
        x[j] = _mm256_max_ps(_mm256_min_ps(x[j], largest), _mm256_xor_ps(largest, sign_bit));
        m = _mm256_max_ps(m, _mm256_andnot_ps(sign_bit, x[j]));
    }
    m = _mm256_max_ps(m, _mm256_permute2f128_ps(m, m, 1));
    m = _mm256_max_ps(m, _mm256_shuffle_ps(m, m, 0x4e));
    return _mm256_max_ps(m, _mm256_shuffle_ps(m, m, 0xb1));
}

/* Four vectors of integers that fit bytes, in order. */
AVX2 static __m256i pack_bytes(const __m256i q[4])
{
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

AVX2 static void q8_0_from_f32(const float *src, uint8_t *dst, size_t n)
{
    /* below a half by as little as f32 can: x plus that, cut off, is x rounded with halves away from zero */
    const __m256 sign_bit = _mm256_set1_ps(-0.0f), half = _mm256_set1_ps(0.49999997f);
    for (size_t i = 0; i < n; i += 32, dst += 34) {
        __m256 x[4];
        __m256i q[4];
        float d = _mm256_cvtss_f32(load_block(src + i, x)) / 127;
        __m256 inverse = _mm256_set1_ps(xkv_block_inverse(d));
        for (size_t j = 0; j < 4; j++) {
            x[j] = _mm256_mul_ps(x[j], inverse);
            x[j] = _mm256_add_ps(x[j], _mm256_or_ps(half, _mm256_and_ps(x[j], sign_bit)));
            q[j] = _mm256_cvttps_epi32(x[j]);
        }
        xkv_store16(dst, xkv_f16_from_f32(d));
        _mm256_storeu_si256((__m256i *)(dst + 2), pack_bytes(q));
    }
}

/* The first element of the largest magnitude m. */
AVX2 static float first_largest(const __m256 x[4], __m256 m)
{
    const __m256 sign_bit = _mm256_set1_ps(-0.0f);
    float block[32];
    uint32_t hits = 0;
    for (uint32_t j = 0; j < 4; j++) {
        __m256 hit = _mm256_cmp_ps(_mm256_andnot_ps(sign_bit, x[j]), m, _CMP_EQ_OQ);
        hits |= (uint32_t)_mm256_movemask_ps(hit) << 8 * j;
        _mm256_storeu_ps(block + 8 * j, x[j]);
    }
    return block[__builtin_ctz(hits)];
}

AVX2 static void q4_0_from_f32(const float *src, uint8_t *dst, size_t n)
{
    const __m256 middle = _mm256_set1_ps(8.5f);
    const __m256i most = _mm256_set1_epi32(15);
    for (size_t i = 0; i < n; i += 32, dst += 18) {
        __m256 x[4];
        __m256i q[4];
        __m256 m = load_block(src + i, x);
        float d = _mm256_cvtss_f32(m) > 0 ? first_largest(x, m) / -8 : -0.0f;
        __m256 inverse = _mm256_set1_ps(xkv_block_inverse(d));
        for (size_t j = 0; j < 4; j++) {
            q[j] = _mm256_cvttps_epi32(_mm256_add_ps(_mm256_mul_ps(x[j], inverse), middle));
            q[j] = _mm256_min_epi32(q[j], most);
        }
        __m256i bytes = pack_bytes(q);
        __m128i high = _mm_slli_epi16(_mm256_extracti128_si256(bytes, 1), 4);
        xkv_store16(dst, xkv_f16_from_f32(d));
        _mm_storeu_si128((__m128i *)(dst + 2), _mm_or_si128(_mm256_castsi256_si128(bytes), high));
    }
}

static void avx2_to_f32(uint32_t dtype, const void *src, float *dst, size_t n)
{
    size_t whole = n / 16 * 16;
    if (dtype == XKV_F32) {
        memcpy(dst, src, n * sizeof *dst);
        return;
    }
    if (xkv_dtype_block(dtype) > 1) {
        (dtype == XKV_Q8_0 ? q8_0_to_f32 : q4_0_to_f32)(src, dst, n);
        return;
    }
    (dtype == XKV_F16 ? f16_to_f32 : bf16_to_f32)(src, dst, whole);
    xkv_generic_to_f32(dtype, (const uint8_t *)src + 2 * whole, dst + whole, n - whole);
}

static void avx2_from_f32(uint32_t dtype, const float *src, void *dst, size_t n)
{
    size_t whole = n / 16 * 16;
    if (dtype == XKV_F32) {
        memcpy(dst, src, n * sizeof *src);
        return;
    }
    if (xkv_dtype_block(dtype) > 1) {
        (dtype == XKV_Q8_0 ? q8_0_from_f32 : q4_0_from_f32)(src, dst, n);
        return;
    }
    (dtype == XKV_F16 ? f16_from_f32 : bf16_from_f32)(src, dst, whole);
    xkv_generic_from_f32(dtype, src + whole, (uint8_t *)dst + 2 * whole, n - whole);
}

AVX2 static bool avx2_all_finite(uint32_t dtype, const void *src, size_t n)
{
    const uint8_t *s = src;
    if (xkv_dtype_block(dtype) > 1)
        return xkv_blocks_finite(dtype, s, n);
    size_t elem = dtype == XKV_F32 ? 4 : 2, whole = n * elem / 32 * 32;
    __m256i exponent =
        dtype == XKV_F32 ? _mm256_set1_epi32(0x7f800000) : _mm256_set1_epi16(dtype == XKV_F16 ? 0x7c00 : 0x7f80);
    __m256i found = _mm256_setzero_si256();
    for (size_t i = 0; i < whole; i += 32) {
        __m256i bits = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(s + i)), exponent);
        __m256i hit = dtype == XKV_F32 ? _mm256_cmpeq_epi32(bits, exponent) : _mm256_cmpeq_epi16(bits, exponent);
        found = _mm256_or_si256(found, hit);
    }
    return _mm256_testz_si256(found, found) && xkv_generic_all_finite(dtype, s + whole, n - whole / elem);
}

/* --- RoPE --------------------------------------------------------------------------------------------------------- */

AVX2 static void rotate_half_split(float *a, float *b, size_t pairs, const float *cos_sin, __m256 flip)
{
    for (size_t i = 0; i < pairs; i += 8) {
        __m256 c = _mm256_loadu_ps(cos_sin + i), s = _mm256_xor_ps(_mm256_loadu_ps(cos_sin + pairs + i), flip);
        __m256 x = _mm256_loadu_ps(a + i), y = _mm256_loadu_ps(b + i);
        _mm256_storeu_ps(a + i, _mm256_sub_ps(_mm256_mul_ps(x, c), _mm256_mul_ps(y, s)));
        _mm256_storeu_ps(b + i, _mm256_add_ps(_mm256_mul_ps(x, s), _mm256_mul_ps(y, c)));
    }
}

/* Four values, each twice: the cosines of four interleaved pairs. */
AVX2 static __m256 load_doubled(const float *p)
{
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), twice);
}

AVX2 static void rotate_interleaved(float *x, size_t pairs, const float *cos_sin, __m256 flip)
{
    for (size_t i = 0; i < pairs; i += 4) {
        __m256 c = load_doubled(cos_sin + i), s = _mm256_xor_ps(load_doubled(cos_sin + pairs + i), flip);
        __m256 ab = _mm256_loadu_ps(x + 2 * i), ba = _mm256_permute_ps(ab, 0xb1);
        _mm256_storeu_ps(x + 2 * i, _mm256_addsub_ps(_mm256_mul_ps(ab, c), _mm256_mul_ps(ba, s)));
    }
}

AVX2 static void avx2_rope_row(float *row, uint32_t heads, uint32_t head_dim, const xkv_rope *rope,
                               const float *cos_sin, bool inverse)
{
    size_t pairs = rope->n_rot / 2;
    if (pairs % 8 != 0) {
        xkv_generic_rope_row(row, heads, head_dim, rope, cos_sin, inverse);
        return;
    }
    __m256 flip = _mm256_set1_ps(inverse ? -0.0f : 0.0f);
    for (size_t h = 0; h < heads; h++) {
        float *head = row + h * head_dim + rope->offset;
        if (rope->style == XKV_ROPE_INTERLEAVED)
            rotate_interleaved(head, pairs, cos_sin, flip);
        else
            rotate_half_split(head, head + pairs, pairs, cos_sin, flip);
    }
}

/* --- Sums --------------------------------------------------------------------------------------------------------- */

AVX2 static double avx2_sum_squares(const float *x, size_t n)
{
    double lanes[XKV_SUM_LANES];
    __m256d sum[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
    size_t i = 0;
    for (; i + XKV_SUM_LANES <= n; i += XKV_SUM_LANES) {
        for (size_t j = 0; j < 4; j++) {
            __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * j));
            sum[j] = _mm256_add_pd(sum[j], _mm256_mul_pd(v, v));
        }
    }
    for (size_t j = 0; j < 4; j++)
        _mm256_storeu_pd(lanes + 4 * j, sum[j]);
    xkv_generic_sum_squares_tail(x + i, n - i, lanes);
    return xkv_generic_add_lanes(lanes);
}

AVX2 static double avx2_sum_squared_difference(const float *a, const float *b, size_t n)
{
    double lanes[XKV_SUM_LANES];
    __m256d sum[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
    size_t i = 0;
    for (; i + XKV_SUM_LANES <= n; i += XKV_SUM_LANES) {
        for (size_t j = 0; j < 4; j++) {
            __m256d v = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(a + i + 4 * j)),
                                      _mm256_cvtps_pd(_mm_loadu_ps(b + i + 4 * j)));
            sum[j] = _mm256_add_pd(sum[j], _mm256_mul_pd(v, v));
        }
    }
    for (size_t j = 0; j < 4; j++)
        _mm256_storeu_pd(lanes + 4 * j, sum[j]);
    xkv_generic_sum_squared_difference_tail(a + i, b + i, n - i, lanes);
    return xkv_generic_add_lanes(lanes);
}

/* --- Byte planes of 2-byte elements, in blocks of 16 rows x 32 columns ----------------------------------------------
 */

#define BLOCK_ROWS 16
#define BLOCK_COLS 32

/* Transpose the 16 x 16 bytes in the lower lanes of v and those in the upper lanes. One round interleaves vector i with
 * vector i + 8, which rotates the eight bits of a byte's index (4 for the row, 4 for the column) by one; four rounds
 * exchange row and column. */
AVX2 static void transpose_lanes(__m256i v[16])
{
    __m256i t[16];
    for (size_t round = 0; round < 4; round++) {
        for (size_t i = 0; i < 8; i++) {
            t[2 * i] = _mm256_unpacklo_epi8(v[i], v[i + 8]);
            t[2 * i + 1] = _mm256_unpackhi_epi8(v[i], v[i + 8]);
        }
        memcpy(v, t, sizeof t);
    }
}

AVX2 static void split_block(const uint8_t *src, size_t rows, size_t cols, uint8_t *low, uint8_t *high)
{
    const __m256i low_byte = _mm256_set1_epi16(0xff);
    __m256i v[16];
    for (size_t r = 0; r < BLOCK_ROWS; r++) {
        const uint8_t *s = src + r * cols * 2;
        __m256i a = _mm256_loadu_si256((const __m256i *)s), b = _mm256_loadu_si256((const __m256i *)(s + 32));
        __m256i l = _mm256_packus_epi16(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte));
        __m256i h = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        _mm256_storeu_si256((__m256i *)(low + r * cols), _mm256_permute4x64_epi64(l, 0xd8));
        v[r] = _mm256_permute4x64_epi64(h, 0xd8);
    }
    transpose_lanes(v);
    for (size_t c = 0; c < 16; c++) {
        _mm_storeu_si128((__m128i *)(high + c * rows), _mm256_castsi256_si128(v[c]));
        _mm_storeu_si128((__m128i *)(high + (c + 16) * rows), _mm256_extracti128_si256(v[c], 1));
    }
}

AVX2 static void join_block(const uint8_t *low, const uint8_t *high, size_t rows, size_t cols, uint8_t *dst)
{
    __m256i v[16];
    for (size_t c = 0; c < 16; c++) {
        __m128i a = _mm_loadu_si128((const __m128i *)(high + c * rows));
        __m128i b = _mm_loadu_si128((const __m128i *)(high + (c + 16) * rows));
        v[c] = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    }
    transpose_lanes(v);
    for (size_t r = 0; r < BLOCK_ROWS; r++) {
        __m256i l = _mm256_loadu_si256((const __m256i *)(low + r * cols));
        l = _mm256_permute4x64_epi64(l, 0xd8);
        __m256i h = _mm256_permute4x64_epi64(v[r], 0xd8);
        _mm256_storeu_si256((__m256i *)(dst + r * cols * 2), _mm256_unpacklo_epi8(l, h));
        _mm256_storeu_si256((__m256i *)(dst + r * cols * 2 + 32), _mm256_unpackhi_epi8(l, h));
    }
}

static void avx2_split_bytes(const void *src, size_t rows, size_t cols, size_t elem, uint8_t *planes)
{
    if (elem != 2) {
        xkv_generic_split_bytes(src, rows, cols, elem, planes);
        return;
    }
    const uint8_t *s = src;
    uint8_t *high = planes + rows * cols;
    size_t whole_rows = rows / BLOCK_ROWS * BLOCK_ROWS, whole_cols = cols / BLOCK_COLS * BLOCK_COLS;
    for (size_t c = 0; c < whole_cols; c += BLOCK_COLS)
        for (size_t r = 0; r < whole_rows; r += BLOCK_ROWS)
            split_block(s + (r * cols + c) * 2, rows, cols, planes + r * cols + c, high + c * rows + r);
    xkv_tile right = {rows, cols, 0, whole_rows, whole_cols, cols}, bottom = {rows, cols, whole_rows, rows, 0, cols};
    xkv_generic_split_tile(&right, src, elem, planes);
    xkv_generic_split_tile(&bottom, src, elem, planes);
}

static void avx2_join_bytes(const uint8_t *planes, size_t rows, size_t cols, size_t elem, void *dst)
{
    if (elem != 2) {
        xkv_generic_join_bytes(planes, rows, cols, elem, dst);
        return;
    }
    uint8_t *d = dst;
    const uint8_t *high = planes + rows * cols;
    size_t whole_rows = rows / BLOCK_ROWS * BLOCK_ROWS, whole_cols = cols / BLOCK_COLS * BLOCK_COLS;
    for (size_t c = 0; c < whole_cols; c += BLOCK_COLS)
        for (size_t r = 0; r < whole_rows; r += BLOCK_ROWS)
            join_block(planes + r * cols + c, high + c * rows + r, rows, cols, d + (r * cols + c) * 2);
    xkv_tile right = {rows, cols, 0, whole_rows, whole_cols, cols}, bottom = {rows, cols, whole_rows, rows, 0, cols};
    xkv_generic_join_tile(&right, planes, elem, dst);
    xkv_generic_join_tile(&bottom, planes, elem, dst);
}

static bool processor_has_f16c(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

#define OPERATIONS                                                                                                     \
    .to_f32 = avx2_to_f32, .from_f32 = avx2_from_f32, .all_finite = avx2_all_finite, .rope_row = avx2_rope_row,        \
    .gemm_nn = xkv_blas_gemm_nn, .gemm_tn = xkv_blas_gemm_tn, .gemm_nt = xkv_blas_gemm_nt,                             \
    .sum_squares = avx2_sum_squares, .sum_squared_difference = avx2_sum_squared_difference,                            \
    .split_bytes = avx2_split_bytes, .join_bytes = avx2_join_bytes

const xkv_kernels *xkv_kernels_cpu_avx2(void)
{
    static const xkv_kernels table = {.name = "avx2", OPERATIONS, .panel_tile = {xkv_avx2_add_tile, XKV_AVX2_COLS}};
    /* cpu_supports("avx2") also asks whether the system saves the wide registers; the others need nothing more. */
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && processor_has_f16c() ? &table : NULL;
}

const xkv_kernels *xkv_kernels_cpu_avx512(void)
{
    static const xkv_kernels table = {
        .name = "avx512", OPERATIONS, .panel_tile = {xkv_avx512_add_tile, XKV_AVX512_COLS}};
    __builtin_cpu_init();
    return xkv_kernels_cpu_avx2() && __builtin_cpu_supports("avx512f") ? &table : NULL;
}

#else

const xkv_kernels *xkv_kernels_cpu_avx2(void)
{
    return NULL;
}

const xkv_kernels *xkv_kernels_cpu_avx512(void)
{
    return NULL;
}

#endif
