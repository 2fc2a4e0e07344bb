/* warp_sum.h - XXH3-64 without a seed (the xxHash specification, "XXH3 Algorithm Overview"), a warp for each input of
 * more than XKV_SUM_SHORT bytes: what checksums of parts are (spec/container.md, rule P3).
 *
 * The input is taken by stripes of 8 words, 16 of which are a block. Within a block sums do not depend on the order, so
 * that lane i takes word i mod 8 of every fourth stripe from i / 8 on; between blocks it has accumulator i mod 8. */
#ifndef XKV_CUDA_WARP_SUM_H
#define XKV_CUDA_WARP_SUM_H

#include "warp.h"

#ifdef __CUDACC__
#define XKV_SUM_TABLE              static __device__ const
#define XKV_SUM_HIGH_PRODUCT(a, b) __umul64hi(a, b)
#else
#define XKV_SUM_TABLE              static const
#define XKV_SUM_HIGH_PRODUCT(a, b) ((uint64_t)((xkv_sum_product)(a) * (b) >> 64))
__extension__ typedef unsigned __int128 xkv_sum_product;
#endif

#define XKV_SUM_STRIPE    64u
#define XKV_SUM_BLOCK     1024u /* bytes */
#define XKV_SUM_SCRAMBLE  16u   /* words of the secret from which on it scrambles */
#define XKV_SUM_LAST      121u  /* its byte for the last stripe */
#define XKV_SUM_MERGE     11u   /* and for the end */
#define XKV_SUM_PRIME32_1 0x9e3779b1u
#define XKV_SUM_PRIME64_1 0x9e3779b185ebca87u

/* The default secret, 192 bytes. */
XKV_SUM_TABLE uint64_t xkv_sum_secret[24] = {
    0xbe4ba423396cfeb8u, 0x1cad21f72c81017cu, 0xdb979083e96dd4deu, 0x1f67b3b7a4a44072u, 0x78e5c0cc4ee679cbu,
    0x2172ffcc7dd05a82u, 0x8e2443f7744608b8u, 0x4c263a81e69035e0u, 0xcb00c391bb52283cu, 0xa32e531b8b65d088u,
    0x4ef90da297486471u, 0xd8acdea946ef1938u, 0x3f349ce33f76faa8u, 0x1d4f0bc7c7bbdcf9u, 0x3159b4cd4be0518au,
    0x647378d9c97e9fc8u, 0xc3ebd33483acc5eau, 0xeb6313faffa081c5u, 0x49daf0b751dd0d17u, 0x9e68d429265516d3u,
    0xfca1477d58be162bu, 0xce31d07ad1b8f88fu, 0x280416958f3acb45u, 0x7e404bbbcafbd7afu};

XKV_SUM_TABLE uint64_t xkv_sum_start[8] = {0xc2b2ae3du,         XKV_SUM_PRIME64_1,   0xc2b2ae3d27d4eb4fu,
                                           0x165667b19e3779f9u, 0x85ebca77c2b2ae63u, 0x85ebca77u,
                                           0x27d4eb2f165667c5u, XKV_SUM_PRIME32_1};

/* The secret from any byte on. */
XKV_WARP uint64_t xkv_sum_secret_at(uint32_t byte)
{
    uint32_t shift = 8 * (byte % 8);

    return shift == 0 ? xkv_sum_secret[byte / 8]
                      : xkv_sum_secret[byte / 8] >> shift | xkv_sum_secret[byte / 8 + 1] << (64 - shift);
}

XKV_WARP uint64_t xkv_sum_word_at(const uint8_t *p)
{
    uint64_t word = 0;

    for (uint32_t i = 0; i < 8; i++)
        word |= (uint64_t)p[i] << 8 * i;
    return word;
}

XKV_WARP uint64_t xkv_sum_multiply(uint64_t word, uint64_t secret)
{
    uint64_t mixed = word ^ secret;

    return (mixed & 0xffffffffu) * (mixed >> 32);
}

/* A block of `stripes` <= 16 stripes: its products and words, of each lane those of its own words. */
typedef struct xkv_warp_sum {
    uint64_t total XKV_LANES; /* accumulator lane mod 8 */
    uint64_t products XKV_LANES, words XKV_LANES;
} xkv_warp_sum;

XKV_WARP void xkv_warp_sum_stripes(xkv_warp_sum *s, const uint64_t *words, uint32_t stripes)
{
    XKV_WARP_BEGIN;

    XKV_EACH_LANE (lane) {
        XKV_AT(s->products) = XKV_AT(s->words) = 0;
        for (uint32_t stripe = lane >> 3; stripe < stripes; stripe += 4) {
            uint64_t word = words[8 * stripe + (lane & 7)];
            XKV_AT(s->products) += xkv_sum_multiply(word, xkv_sum_secret[stripe + (lane & 7)]);
            XKV_AT(s->words) += word;
        }
    }
}

/* Bring lanes together: a word is added to its neighbour's accumulator, a product to its own. */
XKV_WARP void xkv_warp_sum_add(xkv_warp_sum *s)
{
    XKV_WARP_BEGIN;
    uint64_t other XKV_LANES;

    XKV_SHUFFLE(other, s->words, lane ^ 1);
    XKV_EACH_LANE (lane) {
        XKV_AT(s->products) += XKV_AT(other);
    }
    XKV_SHUFFLE(other, s->products, lane + 8);
    XKV_EACH_LANE (lane) {
        XKV_AT(s->products) += XKV_AT(other);
    }
    XKV_SHUFFLE(other, s->products, lane + 16);
    XKV_EACH_LANE (lane) {
        XKV_AT(s->total) += XKV_AT(s->products) + XKV_AT(other);
    }
}

XKV_WARP void xkv_warp_sum_scramble(xkv_warp_sum *s)
{
    XKV_WARP_BEGIN;

    XKV_EACH_LANE (lane) {
        uint64_t a = XKV_AT(s->total);
        XKV_AT(s->total) = ((a ^ a >> 47) ^ xkv_sum_secret[XKV_SUM_SCRAMBLE + (lane & 7)]) * XKV_SUM_PRIME32_1;
    }
}

/* The last 64 bytes, some of which may have been taken before. */
XKV_WARP void xkv_warp_sum_last(xkv_warp_sum *s, const uint8_t *stripe)
{
    XKV_WARP_BEGIN;

    XKV_EACH_LANE (lane) {
        XKV_AT(s->words) = lane < 8 ? xkv_sum_word_at(stripe + 8 * (lane & 7)) : 0;
        XKV_AT(s->products) =
            lane < 8 ? xkv_sum_multiply(XKV_AT(s->words), xkv_sum_secret_at(XKV_SUM_LAST + 8 * (lane & 7))) : 0;
    }
    xkv_warp_sum_add(s);
}

/* The accumulators in pairs, which lanes 0, 2, 4 and 6 multiply; the sum is every lane's. */
XKV_WARP uint64_t xkv_warp_sum_end(xkv_warp_sum *s, uint64_t size)
{
    XKV_WARP_BEGIN;
    uint64_t keyed XKV_LANES, other XKV_LANES, sum;

    XKV_EACH_LANE (lane) {
        XKV_AT(keyed) = XKV_AT(s->total) ^ xkv_sum_secret_at(XKV_SUM_MERGE + 8 * (lane & 7));
    }
    XKV_SHUFFLE(other, keyed, lane + 1);
    XKV_EACH_LANE (lane) {
        uint64_t low = XKV_AT(keyed) * XKV_AT(other);
        XKV_AT(keyed) = low ^ XKV_SUM_HIGH_PRODUCT(XKV_AT(keyed), XKV_AT(other));
    }
    XKV_SHUFFLE(other, keyed, lane ^ 4);
    XKV_EACH_LANE (lane) {
        XKV_AT(keyed) += XKV_AT(other);
    }
    XKV_SHUFFLE(other, keyed, lane ^ 2);
    XKV_EACH_LANE (lane) {
        XKV_AT(keyed) += XKV_AT(other);
    }
    XKV_SHUFFLE(other, keyed, 0);
    sum = XKV_FIRST_LANE(other) + size * XKV_SUM_PRIME64_1;
    sum = (sum ^ sum >> 37) * 0x165667919e3779f9u;
    return sum ^ sum >> 32;
}

/* XXH3-64 of `size` > XKV_SUM_SHORT bytes at a multiple of 8. */
XKV_WARP uint64_t xkv_warp_sum_of(const uint8_t *data, uint64_t size)
{
    XKV_WARP_BEGIN;
    const uint64_t *words = (const uint64_t *)(const void *)data;
    const uint64_t blocks = (size - 1) / XKV_SUM_BLOCK;
    xkv_warp_sum s;

    XKV_EACH_LANE (lane) {
        XKV_AT(s.total) = xkv_sum_start[lane & 7];
    }
    for (uint64_t i = 0; i < blocks; i++) {
        xkv_warp_sum_stripes(&s, words + i * (XKV_SUM_BLOCK / 8), XKV_SUM_BLOCK / XKV_SUM_STRIPE);
        xkv_warp_sum_add(&s);
        xkv_warp_sum_scramble(&s);
    }
    xkv_warp_sum_stripes(&s, words + blocks * (XKV_SUM_BLOCK / 8),
                         (uint32_t)((size - 1 - blocks * XKV_SUM_BLOCK) / XKV_SUM_STRIPE));
    xkv_warp_sum_add(&s);
    xkv_warp_sum_last(&s, data + size - XKV_SUM_STRIPE);
    return xkv_warp_sum_end(&s, size);
}

#endif
