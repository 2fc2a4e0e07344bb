/* rans_neon.c - the loops of rans.c for AArch64: 32 lanes in four groups of eight. Same integers and bytes.
 *
 * NEON has no gather, so the table look-ups are scalar loads, of which processors do two or three a cycle. All around
 * them pays as vectors, since words move by a shuffle for eight lanes instead of a branch or selection for each:
 * without low bits a symbol takes 9 instructions to decode and 12 to encode (counted, gcc 12), in plain C 38 and 38,
 * and in scalar code without branches 16 at best to decode. */
#include "rans_coder.h"

#if defined(__aarch64__) && defined(__ARM_NEON) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

#include <arm_neon.h>

#define INLINE __attribute__((always_inline)) static inline
#define GROUPS 4

/* Before a loop over the groups: with all of them at hand the states stay in registers and the groups overlap. */
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif

/* Eight states, or what belongs to them; the functions that move words look at the states' lower and upper halves. */
typedef uint32x4x2_t eight;

INLINE void load_states(eight x[GROUPS], const uint32_t *state)
{
    UNROLL
    for (int g = 0; g < GROUPS; g++)
        x[g] = (eight){{vld1q_u32(state + 8 * g), vld1q_u32(state + 8 * g + 4)}};
}

INLINE void store_states(uint32_t *state, const eight x[GROUPS])
{
    UNROLL
    for (int g = 0; g < GROUPS; g++) {
        vst1q_u32(state + 8 * g, x[g].val[0]);
        vst1q_u32(state + 8 * g + 4, x[g].val[1]);
    }
}

INLINE uint16x8_t lower(eight x)
{
    return vuzp1q_u16(vreinterpretq_u16_u32(x.val[0]), vreinterpretq_u16_u32(x.val[1]));
}

INLINE uint16x8_t upper(eight x)
{
    return vuzp2q_u16(vreinterpretq_u16_u32(x.val[0]), vreinterpretq_u16_u32(x.val[1]));
}

INLINE eight from_halves(uint16x8_t low, uint16x8_t high)
{
    return (eight){{vreinterpretq_u32_u16(vzip1q_u16(low, high)), vreinterpretq_u32_u16(vzip2q_u16(low, high))}};
}

/* The lanes chosen, as a mask of eight bits; above it their number. */
INLINE uint32_t lane_mask(uint16x8_t chosen)
{
    const uint16x8_t bits = {0x101, 0x102, 0x104, 0x108, 0x110, 0x120, 0x140, 0x180};
    return vaddvq_u16(vandq_u16(chosen, bits));
}

INLINE bool any(const uint16x8_t chosen[GROUPS])
{
    return vmaxvq_u16(vorrq_u16(vorrq_u16(chosen[0], chosen[1]), vorrq_u16(chosen[2], chosen[3]))) != 0;
}

INLINE uint32_t lane_mask_of_round(const uint16x8_t chosen[GROUPS])
{
    uint32_t mask = 0;
    for (int g = 0; g < GROUPS; g++)
        mask |= (lane_mask(chosen[g]) & 0xff) << 8 * g;
    return mask;
}

INLINE uint16x8_t shuffle(uint16x8_t words, const uint8_t *how)
{
    return vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(words), vld1q_u8(how)));
}

/* --- Decoder ------------------------------------------------------------------------------------------------------ */

/* Words that one round can take: one for each symbol, and one for low bits or an escaped value. */
#define ROUND_BYTES (2 * 2 * (ptrdiff_t)XKV_RANS_LANES)

INLINE eight refill(eight x, const uint8_t **next)
{
    uint16x8_t low = lower(x), high = upper(x), wanting = vceqzq_u16(high);
    uint32_t mask = lane_mask(wanting);
    uint16x8_t words = shuffle(vreinterpretq_u16_u8(vld1q_u8(*next)), xkv_rans_shuffles.spread[mask & 0xff]);
    *next += 2 * (mask >> 8);
    return from_halves(vbslq_u16(wanting, words, low), vbslq_u16(wanting, low, high));
}

INLINE uint32x4_t look_up(const uint32_t *table, uint32x4_t index)
{
    uint64_t ab = vgetq_lane_u64(vreinterpretq_u64_u32(index), 0), cd = vgetq_lane_u64(vreinterpretq_u64_u32(index), 1);
    uint64_t low = table[(uint32_t)ab] | (uint64_t)table[ab >> 32] << 32;
    uint64_t high = table[(uint32_t)cd] | (uint64_t)table[cd >> 32] << 32;
    return vreinterpretq_u32_u64(vcombine_u64(vcreate_u64(low), vcreate_u64(high)));
}

INLINE int16x8_t decode_symbols(eight *x, const uint32_t *table)
{
    const uint32x4_t twelve_bits = vdupq_n_u32(0xfff);
    eight entry;
    for (int i = 0; i < 2; i++) {
        uint32x4_t v = x->val[i];
        entry.val[i] = look_up(table, vandq_u32(v, twelve_bits));
        uint32x4_t f = vandq_u32(entry.val[i], twelve_bits);
        uint32x4_t offset = vandq_u32(vshrq_n_u32(entry.val[i], 12), twelve_bits);
        x->val[i] = vmlaq_u32(offset, f, vshrq_n_u32(v, 12));
    }
    return vshrq_n_s16(vreinterpretq_s16_u16(upper(entry)), 8);
}

/* Low bits of the lanes that did not escape: u becomes the value. A lane that escaped keeps its state, of at least
 * 2^16, and takes no word. */
INLINE int16x8_t decode_low_bits(eight *x, int16x8_t u, uint16x8_t escaped, uint32_t shift, const uint8_t **next)
{
    const int16x8_t bits = vdupq_n_s16((int16_t)shift), half = vdupq_n_s16((int16_t)(1 << shift >> 1));
    uint16x8_t low = vandq_u16(lower(*x), vdupq_n_u16((uint16_t)((1u << shift) - 1)));
    int16x8_t count = vbicq_s16(vnegq_s16(bits), vreinterpretq_s16_u16(escaped));
    x->val[0] = vshlq_u32(x->val[0], vmovl_s16(vget_low_s16(count)));
    x->val[1] = vshlq_u32(x->val[1], vmovl_s16(vget_high_s16(count)));
    *x = refill(*x, next);
    return vsubq_s16(vaddq_s16(vshlq_s16(u, bits), vreinterpretq_s16_u16(low)), half);
}

static void decode_escapes(uint32_t mask, int16_t *q, const uint8_t **next)
{
    for (; mask != 0; mask &= mask - 1) {
        q[__builtin_ctz(mask)] = (int16_t)xkv_load16(*next);
        *next += 2;
    }
}

INLINE const uint8_t *decode_round(eight x[GROUPS], xkv_table table, int16_t *q, const uint8_t *next)
{
    int16x8_t u[GROUPS];
    uint16x8_t escaped[GROUPS];

    UNROLL
    for (int g = 0; g < GROUPS; g++) {
        u[g] = decode_symbols(&x[g], table.base->decode);
        escaped[g] = vceqq_s16(u[g], vdupq_n_s16(XKV_ESCAPE));
        x[g] = refill(x[g], &next);
    }
    if (table.shift > 0) {
        UNROLL
        for (int g = 0; g < GROUPS; g++)
            u[g] = decode_low_bits(&x[g], u[g], escaped[g], table.shift, &next);
    }
    UNROLL
    for (int g = 0; g < GROUPS; g++)
        vst1q_s16(q + 8 * g, u[g]);
    if (any(escaped))
        decode_escapes(lane_mask_of_round(escaped), q, &next);
    return next;
}

static void neon_decode(xkv_rans_reader *r, xkv_table table, int16_t *q, uint32_t tokens)
{
    eight x[GROUPS];

    load_states(x, r->state);
    while (tokens >= XKV_RANS_LANES && r->end - r->next >= ROUND_BYTES) {
        r->next = decode_round(x, table, q, r->next);
        q += XKV_RANS_LANES;
        tokens -= XKV_RANS_LANES;
    }
    store_states(r->state, x);
    xkv_generic_decode(r, table, q, tokens);
}

/* --- Encoder ------------------------------------------------------------------------------------------------------ */

/* Writes eight words, of which the last ones count: what is overwritten in front has not been written yet, and the room
 * for the states is always there. */
INLINE eight shrink(uint16x8_t low, uint16x8_t high, uint16x8_t full, uint8_t **next)
{
    uint32_t mask = lane_mask(full);
    vst1q_u8(*next - 16, vreinterpretq_u8_u16(shuffle(low, xkv_rans_shuffles.gather[mask & 0xff])));
    *next -= 2 * (mask >> 8);
    return from_halves(vbslq_u16(full, high, low), vbicq_u16(high, full));
}

/* Two symbols, as reciprocal, packed, reciprocal, packed. */
INLINE uint32x4_t load_symbols(const xkv_symbol *a, const xkv_symbol *b)
{
    return vreinterpretq_u32_u8(vcombine_u8(vld1_u8((const uint8_t *)a), vld1_u8((const uint8_t *)b)));
}

INLINE void look_up_symbols(const xkv_symbol *symbols, uint64_t index, uint32x4_t *reciprocal, uint32x4_t *packed)
{
    uint32x4_t low = load_symbols(symbols + (index & 0xffff), symbols + (index >> 16 & 0xffff));
    uint32x4_t high = load_symbols(symbols + (index >> 32 & 0xffff), symbols + (index >> 48));
    *reciprocal = vuzp1q_u32(low, high);
    *packed = vuzp2q_u32(low, high);
}

/* Upper halves of the 64-bit products. */
INLINE uint32x4_t multiply_high(uint32x4_t a, uint32x4_t b)
{
    uint64x2_t low = vmull_u32(vget_low_u32(a), vget_low_u32(b)), high = vmull_high_u32(a, b);
    return vuzp2q_u32(vreinterpretq_u32_u64(low), vreinterpretq_u32_u64(high));
}

INLINE eight encode_symbols(eight x, const xkv_symbol *symbols, uint16x8_t index, uint8_t **next)
{
    const uint32x4_t twelve_bits = vdupq_n_u32(0xfff);
    uint64x2_t index64 = vreinterpretq_u64_u16(index);
    uint32x4_t reciprocal[2], packed[2];
    eight rest;

    look_up_symbols(symbols, vgetq_lane_u64(index64, 0), &reciprocal[0], &packed[0]);
    look_up_symbols(symbols, vgetq_lane_u64(index64, 1), &reciprocal[1], &packed[1]);
    for (int i = 0; i < 2; i++)
        rest.val[i] = vandq_u32(vshrq_n_u32(packed[i], 12), twelve_bits);
    uint16x8_t high = upper(x), f = vsubq_u16(vdupq_n_u16(4096), lower(rest));
    x = shrink(lower(x), high, vcgeq_u16(vshrq_n_u16(high, 4), f), next);
    for (int i = 0; i < 2; i++) {
        uint32x4_t shift = vandq_u32(vshrq_n_u32(packed[i], 24), vdupq_n_u32(15));
        uint32x4_t quotient = multiply_high(vsraq_n_u32(x.val[i], packed[i], 31), reciprocal[i]);
        quotient = vshlq_u32(quotient, vnegq_s32(vreinterpretq_s32_u32(shift)));
        uint32x4_t start = vandq_u32(packed[i], twelve_bits);
        x.val[i] = vmlaq_u32(vaddq_u32(x.val[i], start), quotient, rest.val[i]);
    }
    return x;
}

INLINE eight encode_low_bits(eight x, int16x8_t value, uint16x8_t escaped, uint32_t shift, uint8_t **next)
{
    uint16x8_t shifted = vaddq_u16(vreinterpretq_u16_s16(value), vdupq_n_u16((uint16_t)(1u << shift >> 1)));
    uint16x8_t low = vbicq_u16(vandq_u16(shifted, vdupq_n_u16((uint16_t)((1u << shift) - 1))), escaped);
    int16x8_t count = vbicq_s16(vdupq_n_s16((int16_t)shift), vreinterpretq_s16_u16(escaped));
    uint16x8_t high = upper(x), full = vcgeq_u16(high, vdupq_n_u16((uint16_t)(1u << (16 - shift))));
    x = shrink(lower(x), high, vbicq_u16(full, escaped), next);
    x.val[0] = vaddw_u16(vshlq_u32(x.val[0], vmovl_s16(vget_low_s16(count))), vget_low_u16(low));
    x.val[1] = vaddw_u16(vshlq_u32(x.val[1], vmovl_s16(vget_high_s16(count))), vget_high_u16(low));
    return x;
}

static void encode_escapes(xkv_rans_writer *w, uint32_t mask, const int16_t *q)
{
    while (mask != 0) {
        int lane = 31 - __builtin_clz(mask);
        xkv_rans_push(w, (uint16_t)q[lane]);
        mask ^= 1u << lane;
    }
}

INLINE void encode_round(xkv_rans_writer *w, eight x[GROUPS], xkv_table table, const int16_t *q)
{
    const uint16_t reach = (uint16_t)table.base->reach;
    const int16x8_t right = vnegq_s16(vdupq_n_s16((int16_t)table.shift));
    const uint16x8_t escape = vdupq_n_u16((uint16_t)(2 * reach + 1));
    uint16x8_t index[GROUPS], escaped[GROUPS];
    int16x8_t value[GROUPS];

    UNROLL
    for (int g = 0; g < GROUPS; g++) {
        value[g] = vld1q_s16(q + 8 * g);
        uint16x8_t u = vreinterpretq_u16_s16(vrshlq_s16(value[g], right)); /* adds half without overflow */
        index[g] = vminq_u16(vaddq_u16(u, vdupq_n_u16(reach)), escape);
        escaped[g] = vceqq_u16(index[g], escape);
    }
    if (any(escaped))
        encode_escapes(w, lane_mask_of_round(escaped), q);
    if (table.shift > 0) {
        UNROLL
        for (int g = GROUPS - 1; g >= 0; g--)
            x[g] = encode_low_bits(x[g], value[g], escaped[g], table.shift, &w->next);
    }
    UNROLL
    for (int g = GROUPS - 1; g >= 0; g--)
        x[g] = encode_symbols(x[g], table.base->encode, index[g], &w->next);
}

static void neon_encode(xkv_rans_writer *w, xkv_table table, const int16_t *q, uint32_t tokens)
{
    uint32_t whole = tokens / XKV_RANS_LANES * XKV_RANS_LANES;
    eight x[GROUPS];

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

static bool neon_quantize(const float *y, size_t n, float step, int16_t *q)
{
    const float32x4_t divisor = vdupq_n_f32(step), largest = vdupq_n_f32(32767);
    uint32x4_t inside = vdupq_n_u32(UINT32_MAX);
    size_t i = 0;

    for (; i + 8 <= n; i += 8) {
        float32x4_t a = vrndnq_f32(vdivq_f32(vld1q_f32(y + i), divisor));
        float32x4_t b = vrndnq_f32(vdivq_f32(vld1q_f32(y + i + 4), divisor));
        inside = vandq_u32(inside, vandq_u32(vcaleq_f32(a, largest), vcaleq_f32(b, largest))); /* a NaN is not */
        vst1q_s16(q + i, vqmovn_high_s32(vqmovn_s32(vcvtq_s32_f32(a)), vcvtq_s32_f32(b)));
    }
    bool rest = xkv_generic_quantize(y + i, n - i, step, q + i);
    return rest && vminvq_u32(inside) != 0;
}

/* Compilers make vectors of the plain loop that dequantizes. */
static const xkv_coder neon = {"neon", neon_quantize, xkv_generic_dequantize, neon_encode, neon_decode};

const xkv_coder *xkv_coder_cpu_neon(void)
{
    xkv_rans_make_shuffles();
    return &neon;
}

#else

const xkv_coder *xkv_coder_cpu_neon(void)
{
    return NULL;
}

#endif
