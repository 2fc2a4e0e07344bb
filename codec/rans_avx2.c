/* rans_avx2.c - the loops of rans.c for x86-64 with AVX2: 32 lanes in four vectors. Same integers and bytes. */
#include "rans_coder.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

/* Only these functions may use the extension: the rest of the library runs on any x86-64. */
#define AVX2    __attribute__((target("avx2")))
#define INLINE  AVX2 __attribute__((always_inline)) static inline
#define VECTORS 4

INLINE __m128i load_shuffle(const uint8_t *p)
{
    return _mm_loadu_si128((const __m128i *)p);
}

INLINE unsigned lane_mask(__m256i v)
{
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(v));
}

INLINE void load_states(__m256i x[VECTORS], const uint32_t *state)
{
    for (int v = 0; v < VECTORS; v++)
        x[v] = _mm256_loadu_si256((const __m256i *)(state + 8 * v));
}

INLINE void store_states(uint32_t *state, const __m256i x[VECTORS])
{
    for (int v = 0; v < VECTORS; v++)
        _mm256_storeu_si256((__m256i *)(state + 8 * v), x[v]);
}

/* --- Decoder ------------------------------------------------------------------------------------------------------ */

/* Words that one round can take: one for each symbol, and one for low bits or an escaped value. */
#define ROUND_BYTES (2 * 2 * (ptrdiff_t)XKV_RANS_LANES)

INLINE __m256i refill(__m256i x, __m256i allowed, const uint8_t **next)
{
    __m256i low = _mm256_and_si256(_mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256()), allowed);
    unsigned mask = lane_mask(low);
    __m128i words = _mm_shuffle_epi8(load_shuffle(*next), load_shuffle(xkv_rans_shuffles.spread[mask]));
    *next += 2 * __builtin_popcount(mask);
    __m256i filled = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_cvtepu16_epi32(words));
    return _mm256_blendv_epi8(x, filled, low);
}

INLINE __m256i decode_symbols(__m256i *x, const uint32_t *table)
{
    const __m256i twelve_bits = _mm256_set1_epi32(0xfff);
    __m256i entry = _mm256_i32gather_epi32((const int *)table, _mm256_and_si256(*x, twelve_bits), 4);
    __m256i f = _mm256_and_si256(entry, twelve_bits);
    __m256i offset = _mm256_and_si256(_mm256_srli_epi32(entry, 12), twelve_bits);
    *x = _mm256_add_epi32(_mm256_mullo_epi32(f, _mm256_srli_epi32(*x, 12)), offset);
    return _mm256_srai_epi32(entry, 24);
}

/* Low bits of the lanes that are not skipped: u becomes the value. */
INLINE __m256i decode_low_bits(__m256i *x, __m256i u, __m256i skipped, uint32_t shift, const uint8_t **next)
{
    const __m128i count = _mm_cvtsi32_si128((int)shift);
    const __m256i low = _mm256_and_si256(*x, _mm256_set1_epi32((1 << shift) - 1));
    const __m256i half = _mm256_set1_epi32(1 << shift >> 1), all = _mm256_set1_epi32(-1);
    *x = _mm256_blendv_epi8(_mm256_srl_epi32(*x, count), *x, skipped);
    *x = refill(*x, _mm256_andnot_si256(skipped, all), next);
    return _mm256_sub_epi32(_mm256_add_epi32(_mm256_sll_epi32(u, count), low), half);
}

static void decode_escapes(uint32_t mask, int16_t *q, const uint8_t **next)
{
    for (; mask != 0; mask &= mask - 1) {
        q[__builtin_ctz(mask)] = (int16_t)xkv_load16(*next);
        *next += 2;
    }
}

/* The lanes of vector v that the first `lanes` of a round have. */
INLINE __m256i active_lanes(int v, uint32_t lanes)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)lanes - 8 * v), lane);
}

/* The first `lanes` values of a round; what follows them in q [XKV_RANS_LANES] is of no use. */
INLINE const uint8_t *decode_round(__m256i x[VECTORS], xkv_table table, int16_t *q, uint32_t lanes, const uint8_t *next)
{
    __m256i u[VECTORS], escaped[VECTORS];
    uint32_t mask = 0;

    for (int v = 0; v < VECTORS; v++) {
        __m256i before = x[v], active = active_lanes(v, lanes);
        u[v] = decode_symbols(&x[v], table.base->decode);
        escaped[v] = _mm256_and_si256(_mm256_cmpeq_epi32(u[v], _mm256_set1_epi32(XKV_ESCAPE)), active);
        mask |= lane_mask(escaped[v]) << 8 * v;
        x[v] = refill(_mm256_blendv_epi8(before, x[v], active), active, &next);
    }
    for (int v = 0; v < VECTORS && table.shift > 0; v++) {
        __m256i skipped = _mm256_or_si256(escaped[v], _mm256_xor_si256(active_lanes(v, lanes), _mm256_set1_epi32(-1)));
        u[v] = decode_low_bits(&x[v], u[v], skipped, table.shift, &next);
    }
    for (int v = 0; v < VECTORS; v += 2) {
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(u[v], u[v + 1]), 0xd8);
        _mm256_storeu_si256((__m256i *)(q + 8 * v), packed);
    }
    decode_escapes(mask, q, &next);
    return next;
}

AVX2 static void avx2_decode(xkv_rans_reader *r, xkv_table table, int16_t *q, uint32_t tokens)
{
    __m256i x[VECTORS];
    int16_t last[XKV_RANS_LANES];

    load_states(x, r->state);
    while (tokens >= XKV_RANS_LANES && r->end - r->next >= ROUND_BYTES) {
        r->next = decode_round(x, table, q, XKV_RANS_LANES, r->next);
        q += XKV_RANS_LANES;
        tokens -= XKV_RANS_LANES;
    }
    if (tokens > 0 && tokens < XKV_RANS_LANES && r->end - r->next >= ROUND_BYTES) {
        r->next = decode_round(x, table, last, tokens, r->next);
        memcpy(q, last, tokens * sizeof *q);
        tokens = 0;
    }
    store_states(r->state, x);
    xkv_generic_decode(r, table, q, tokens);
}

/* --- Encoder ------------------------------------------------------------------------------------------------------ */

/* Writes eight words, of which the last ones count: what is overwritten in front has not been written yet, and the room
 * for the states is always there. */
INLINE __m256i shrink(__m256i x, __m256i full, uint8_t **next)
{
    unsigned mask = lane_mask(full);
    __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storeu_si128((__m128i *)(*next - 16), _mm_shuffle_epi8(words, load_shuffle(xkv_rans_shuffles.gather[mask])));
    *next -= 2 * __builtin_popcount(mask);
    return _mm256_blendv_epi8(x, _mm256_srli_epi32(x, 16), full);
}

/* Upper halves of the 64-bit products. */
INLINE __m256i multiply_high(__m256i a, __m256i b)
{
    __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a, b), 32);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
    return _mm256_blend_epi32(even, odd, 0xaa);
}

INLINE __m256i encode_symbols(__m256i x, const xkv_symbol *symbols, __m256i index, uint8_t **next)
{
    const __m256i twelve_bits = _mm256_set1_epi32(0xfff);
    __m256i reciprocal = _mm256_i32gather_epi32((const int *)&symbols->reciprocal, index, 8);
    __m256i packed = _mm256_i32gather_epi32((const int *)&symbols->packed, index, 8);
    __m256i start = _mm256_and_si256(packed, twelve_bits);
    __m256i rest = _mm256_and_si256(_mm256_srli_epi32(packed, 12), twelve_bits);
    __m256i shift = _mm256_and_si256(_mm256_srli_epi32(packed, 24), _mm256_set1_epi32(15));
    /* x >> 20 >= 4096 - rest */
    __m256i sum = _mm256_add_epi32(_mm256_srli_epi32(x, 20), rest);
    x = shrink(x, _mm256_cmpgt_epi32(sum, twelve_bits), next);
    __m256i quotient = multiply_high(_mm256_add_epi32(x, _mm256_srli_epi32(packed, 31)), reciprocal);
    quotient = _mm256_srlv_epi32(quotient, shift);
    return _mm256_add_epi32(_mm256_add_epi32(x, start), _mm256_mullo_epi32(quotient, rest));
}

INLINE __m256i encode_low_bits(__m256i x, __m256i shifted, __m256i escaped, uint32_t shift, uint8_t **next)
{
    const __m128i count = _mm_cvtsi32_si128((int)shift), rest = _mm_cvtsi32_si128((int)(32 - shift));
    __m256i low = _mm256_and_si256(shifted, _mm256_set1_epi32((1 << shift) - 1));
    __m256i fits = _mm256_cmpeq_epi32(_mm256_srl_epi32(x, rest), _mm256_setzero_si256());
    x = shrink(x, _mm256_andnot_si256(_mm256_or_si256(fits, escaped), _mm256_set1_epi32(-1)), next);
    return _mm256_blendv_epi8(_mm256_or_si256(_mm256_sll_epi32(x, count), low), x, escaped);
}

static void encode_escapes(xkv_rans_writer *w, uint32_t mask, const int16_t *q)
{
    while (mask != 0) {
        int lane = 31 - __builtin_clz(mask);
        xkv_rans_push(w, (uint16_t)q[lane]);
        mask ^= 1u << lane;
    }
}

INLINE void encode_round(xkv_rans_writer *w, __m256i x[VECTORS], xkv_table table, const int16_t *q)
{
    const int32_t reach = (int32_t)table.base->reach, shift = (int32_t)table.shift;
    const __m128i count = _mm_cvtsi32_si128(shift);
    const __m256i escape = _mm256_set1_epi32(2 * reach + 1);
    __m256i index[VECTORS], shifted[VECTORS], escaped[VECTORS];
    uint32_t mask = 0;

    for (int v = 0; v < VECTORS; v++) {
        __m256i value = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(q + 8 * v)));
        shifted[v] = _mm256_add_epi32(value, _mm256_set1_epi32(1 << shift >> 1));
        __m256i u = _mm256_sra_epi32(shifted[v], count);
        index[v] = _mm256_min_epu32(_mm256_add_epi32(u, _mm256_set1_epi32(reach)), escape);
        escaped[v] = _mm256_cmpeq_epi32(index[v], escape);
        mask |= lane_mask(escaped[v]) << 8 * v;
    }
    encode_escapes(w, mask, q);
    for (int v = VECTORS; shift > 0 && v-- > 0;)
        x[v] = encode_low_bits(x[v], shifted[v], escaped[v], table.shift, &w->next);
    for (int v = VECTORS; v-- > 0;)
        x[v] = encode_symbols(x[v], table.base->encode, index[v], &w->next);
}

AVX2 static void avx2_encode(xkv_rans_writer *w, xkv_table table, const int16_t *q, uint32_t tokens)
{
    uint32_t whole = tokens / XKV_RANS_LANES * XKV_RANS_LANES;
    __m256i x[VECTORS];

    if (whole < tokens)
        xkv_generic_encode_round(w, table, q + whole, tokens - whole);
    load_states(x, w->state);
    while (whole > 0) {
        whole -= XKV_RANS_LANES;
        encode_round(w, x, table, q + whole);
    }
    store_states(w->state, x);
}

/* --- Quantizer ---------------------------------------------------------------------------------------------------- */

AVX2 static bool avx2_quantize(const float *y, size_t n, float step, int16_t *q)
{
    const __m256 divisor = _mm256_set1_ps(step), largest = _mm256_set1_ps(32767), sign = _mm256_set1_ps(-0.0f);
    __m256 inside = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    size_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_div_ps(_mm256_loadu_ps(y + i), divisor);
        x = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        inside = _mm256_and_ps(inside, _mm256_cmp_ps(_mm256_andnot_ps(sign, x), largest, _CMP_LE_OQ));
        __m256i whole = _mm256_cvtps_epi32(x);
        __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storeu_si128((__m128i *)(q + i), packed);
    }
    bool rest = xkv_generic_quantize(y + i, n - i, step, q + i);
    return rest && _mm256_movemask_ps(inside) == 0xff;
}

AVX2 static void avx2_dequantize(const int16_t *q, size_t n, float step, float *y)
{
    const __m256 factor = _mm256_set1_ps(step);
    size_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m256i whole = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(q + i)));
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_cvtepi32_ps(whole), factor));
    }
    xkv_generic_dequantize(q + i, n - i, step, y + i);
}

static const xkv_coder avx2 = {"avx2", avx2_quantize, avx2_dequantize, avx2_encode, avx2_decode};

const xkv_coder *xkv_coder_cpu_avx2(void)
{
    xkv_rans_make_shuffles();
    return &avx2;
}

#else

const xkv_coder *xkv_coder_cpu_avx2(void)
{
    return NULL;
}

#endif
