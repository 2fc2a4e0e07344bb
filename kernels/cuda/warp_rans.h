/* warp_rans.h - interleaved rANS (spec/codec.md, section 8), a warp for each stream: lane = token mod 32.
 *
 * Tables are small enough to be held in shared memory, two of them at a time: the symbol of a slot is a byte, and
 * frequency and start are looked up by the symbol. */
#ifndef XKV_CUDA_WARP_RANS_H
#define XKV_CUDA_WARP_RANS_H

#include "warp.h"

#define XKV_WARP_RANS_LOW  0x10000u /* states are at least this */
#define XKV_WARP_RANS_BITS 12u

/* Symbols are numbered 0 .. 2 reach for u = -reach .. reach; 2 reach + 1 is the escape. */
typedef struct xkv_warp_table {
    uint32_t symbol[256]; /* frequency : 16 | start : 16, lowest bits first */
    uint8_t slot[4096];   /* symbol of each slot */
    uint32_t reach, unused[3];
} xkv_warp_table;

/* What encoding a symbol takes: as in xkv_symbol of the CPU's coder. */
typedef struct xkv_warp_encode_table {
    uint32_t reciprocal[256], packed[256];
    uint32_t reach, unused[3];
} xkv_warp_encode_table;

/* How a component is coded. */
typedef struct xkv_warp_code {
    uint16_t table; /* index into the base tables */
    uint16_t shift;
} xkv_warp_code;

/* What a stream was found to be. 0: sound. */
enum {
    XKV_WARP_BAD_START = 1, /* too few bytes, half a word, or a state that is too small [E2] */
    XKV_WARP_TOO_SHORT = 2, /* words end early [E3] */
    XKV_WARP_LEFT_OVER = 4, /* words are left, or a lane does not end with 2^16 [E3] */
    XKV_WARP_TOO_WIDE = 8,  /* sound, but a value does not fit into the tile's type */
    XKV_WARP_BAD_SUM = 16   /* its bytes are not those of its checksum [P3] */
};

/* --- Decoder ------------------------------------------------------------------------------------------------------ */

/* The words pass through a window of registers: 64 words in use, and the 64 behind them on their way. */
typedef struct xkv_warp_reader {
    const uint32_t *pairs; /* words, two by two; the last half pair may be anything */
    uint32_t count, next;  /* words: all, and those taken; may pass `count`, where words are 0 */
    uint32_t base;         /* the first word of the window */
    uint32_t window XKV_LANES, ahead XKV_LANES;
    uint32_t x XKV_LANES;
    uint32_t word XKV_LANES; /* what xkv_warp_take() gave */
} xkv_warp_reader;

XKV_WARP uint32_t xkv_warp_pair(const xkv_warp_reader *r, uint32_t word)
{
    return word < r->count ? r->pairs[word >> 1] : 0;
}

/* A word for each lane of `mask`, in ascending order. */
XKV_WARP void xkv_warp_take(xkv_warp_reader *r, uint32_t mask)
{
    XKV_WARP_BEGIN;
    uint32_t index XKV_LANES, low XKV_LANES, high XKV_LANES;

    if (mask == 0)
        return;
    XKV_EACH_LANE (lane) {
        XKV_AT(index) = r->next - r->base + XKV_COUNT_BITS(mask & XKV_LANES_BELOW(lane));
    }
    XKV_SHUFFLE(low, r->window, XKV_AT(index) >> 1);
    XKV_SHUFFLE(high, r->ahead, XKV_AT(index) >> 1);
    XKV_EACH_LANE (lane) {
        uint32_t pair = XKV_AT(index) < 64 ? XKV_AT(low) : XKV_AT(high);
        XKV_AT(r->word) = (XKV_AT(index) & 1) != 0 ? pair >> 16 : pair & 0xffffu;
    }
    r->next += XKV_COUNT_BITS(mask);
    if (r->next - r->base < 64)
        return;
    r->base += 64;
    XKV_EACH_LANE (lane) {
        XKV_AT(r->window) = XKV_AT(r->ahead);
        XKV_AT(r->ahead) = xkv_warp_pair(r, r->base + 64 + 2 * lane);
    }
}

XKV_WARP void xkv_warp_refill(xkv_warp_reader *r, uint32_t mask)
{
    XKV_WARP_BEGIN;

    xkv_warp_take(r, mask);
    XKV_EACH_LANE (lane) {
        if ((mask >> lane & 1) != 0)
            XKV_AT(r->x) = XKV_AT(r->x) << 16 | XKV_AT(r->word);
    }
}

/* One round: q[lane] of `lanes` lanes. */
XKV_WARP void xkv_warp_decode_round(xkv_warp_reader *r, const xkv_warp_table *t, uint32_t shift, uint32_t lanes,
                                    int16_t *q)
{
    XKV_WARP_BEGIN;
    const uint32_t escape = 2 * t->reach + 1, low_bits = (1u << shift) - 1;
    uint32_t symbol XKV_LANES, escaped, mask;
    int32_t value XKV_LANES;

    XKV_EACH_LANE (lane) {
        uint32_t x = XKV_AT(r->x), slot = x & 4095u, entry;
        XKV_AT(symbol) = t->slot[slot];
        entry = t->symbol[XKV_AT(symbol)];
        XKV_AT(value) = (int32_t)XKV_AT(symbol) - (int32_t)t->reach;
        if (lane < lanes)
            XKV_AT(r->x) = (entry & 0xffffu) * (x >> XKV_WARP_RANS_BITS) + slot - (entry >> 16);
    }
    XKV_BALLOT(mask, lane < lanes && XKV_AT(r->x) < XKV_WARP_RANS_LOW);
    xkv_warp_refill(r, mask);
    XKV_BALLOT(escaped, lane < lanes && XKV_AT(symbol) == escape);
    if (shift > 0) {
        XKV_EACH_LANE (lane) {
            if (lane < lanes && (escaped >> lane & 1) == 0) {
                uint32_t x = XKV_AT(r->x);
                XKV_AT(value) = XKV_AT(value) * (int32_t)(low_bits + 1) + (int32_t)(x & low_bits);
                XKV_AT(value) -= (int32_t)((low_bits + 1) >> 1);
                XKV_AT(r->x) = x >> shift;
            }
        }
        XKV_BALLOT(mask, lane < lanes && XKV_AT(r->x) < XKV_WARP_RANS_LOW && (escaped >> lane & 1) == 0);
        xkv_warp_refill(r, mask);
    }
    if (escaped != 0) {
        xkv_warp_take(r, escaped);
        XKV_EACH_LANE (lane) {
            if ((escaped >> lane & 1) != 0)
                XKV_AT(value) = (int16_t)(uint16_t)XKV_AT(r->word);
        }
    }
    XKV_EACH_LANE (lane) {
        if (lane < lanes)
            q[lane] = (int16_t)XKV_AT(value);
    }
}

/* Start on `size` bytes at `data`, 4-byte aligned and readable up to a multiple of 4. What is wrong, or 0. */
XKV_WARP uint32_t xkv_warp_open(xkv_warp_reader *r, const uint8_t *data, uint32_t size, uint32_t lanes)
{
    XKV_WARP_BEGIN;
    const uint32_t *pairs = (const uint32_t *)(const void *)data;
    uint32_t bad;

    r->count = r->next = r->base = 0;
    r->pairs = pairs;
    XKV_EACH_LANE (lane) {
        XKV_AT(r->x) = XKV_WARP_RANS_LOW;
        XKV_AT(r->window) = XKV_AT(r->ahead) = XKV_AT(r->word) = 0;
    }
    if (size < 4 * lanes || size % 2 != 0)
        return XKV_WARP_BAD_START;
    r->pairs = pairs + lanes;
    r->count = (size - 4 * lanes) / 2;
    XKV_EACH_LANE (lane) {
        if (lane < lanes)
            XKV_AT(r->x) = pairs[lane];
        XKV_AT(r->window) = xkv_warp_pair(r, 2 * lane);
        XKV_AT(r->ahead) = xkv_warp_pair(r, 64 + 2 * lane);
    }
    XKV_BALLOT(bad, XKV_AT(r->x) < XKV_WARP_RANS_LOW);
    return bad != 0 ? XKV_WARP_BAD_START : 0;
}

/* One component. False when the words ended. */
XKV_WARP int xkv_warp_decode_component(xkv_warp_reader *r, const xkv_warp_table *t, uint32_t shift, uint32_t tokens,
                                       int16_t *q)
{
    for (uint32_t first = 0; first < tokens; first += 32) {
        uint32_t lanes = tokens - first < 32 ? tokens - first : 32;
        xkv_warp_decode_round(r, t, shift, lanes, q + first);
    }
    return r->next <= r->count;
}

XKV_WARP uint32_t xkv_warp_close(const xkv_warp_reader *r)
{
    uint32_t bad;

    if (r->next > r->count)
        return XKV_WARP_TOO_SHORT;
    XKV_BALLOT(bad, XKV_AT(r->x) != XKV_WARP_RANS_LOW);
    return bad != 0 || r->next != r->count ? XKV_WARP_LEFT_OVER : 0;
}

/* --- Encoder ------------------------------------------------------------------------------------------------------ */

/* Goes backwards: last component first, last token first, and each word in front of the one before. */
typedef struct xkv_warp_writer {
    uint16_t *words;
    uint32_t next; /* the word that was written last */
    uint32_t x XKV_LANES;
} xkv_warp_writer;

/* The low 16 bits of the states of `mask`, which keep the others. */
XKV_WARP void xkv_warp_shrink(xkv_warp_writer *w, uint32_t mask)
{
    XKV_WARP_BEGIN;

    w->next -= XKV_COUNT_BITS(mask);
    XKV_EACH_LANE (lane) {
        if ((mask >> lane & 1) != 0) {
            w->words[w->next + XKV_COUNT_BITS(mask & XKV_LANES_BELOW(lane))] = (uint16_t)XKV_AT(w->x);
            XKV_AT(w->x) >>= 16;
        }
    }
}

XKV_WARP void xkv_warp_encode_round(xkv_warp_writer *w, const xkv_warp_encode_table *t, uint32_t shift, uint32_t lanes,
                                    const int16_t *q)
{
    XKV_WARP_BEGIN;
    const uint32_t half = (1u << shift) >> 1, low_bits = (1u << shift) - 1, escape = 2 * t->reach + 1;
    uint32_t shifted XKV_LANES, symbol XKV_LANES, escaped, mask;

    XKV_EACH_LANE (lane) {
        uint32_t u;
        XKV_AT(shifted) = (uint32_t)((lane < lanes ? q[lane] : 0) + (1 << 16)) + half;
        u = (XKV_AT(shifted) >> shift) - (1u << 16 >> shift) + t->reach;
        XKV_AT(symbol) = u < escape ? u : escape;
    }
    XKV_BALLOT(escaped, lane < lanes && XKV_AT(symbol) == escape);
    w->next -= XKV_COUNT_BITS(escaped);
    XKV_EACH_LANE (lane) {
        if ((escaped >> lane & 1) != 0)
            w->words[w->next + XKV_COUNT_BITS(escaped & XKV_LANES_BELOW(lane))] = (uint16_t)q[lane];
    }
    if (shift > 0) {
        XKV_BALLOT(mask, lane < lanes && XKV_AT(symbol) != escape && XKV_AT(w->x) >> (32 - shift) != 0);
        xkv_warp_shrink(w, mask);
        XKV_EACH_LANE (lane) {
            if (lane < lanes && XKV_AT(symbol) != escape)
                XKV_AT(w->x) = XKV_AT(w->x) << shift | (XKV_AT(shifted) & low_bits);
        }
    }
    XKV_BALLOT(mask, lane < lanes && XKV_AT(w->x) >> 20 >= 4096u - (t->packed[XKV_AT(symbol)] >> 12 & 0xfffu));
    xkv_warp_shrink(w, mask);
    XKV_EACH_LANE (lane) {
        if (lane < lanes) {
            uint32_t how = t->packed[XKV_AT(symbol)], x = XKV_AT(w->x);
            uint64_t product = (uint64_t)(x + (how >> 31)) * t->reciprocal[XKV_AT(symbol)];
            uint32_t quotient = (uint32_t)(product >> 32) >> (how >> 24 & 15u);
            XKV_AT(w->x) = x + quotient * (how >> 12 & 0xfffu) + (how & 0xfffu);
        }
    }
}

XKV_WARP void xkv_warp_encode_component(xkv_warp_writer *w, const xkv_warp_encode_table *t, uint32_t shift,
                                        uint32_t tokens, const int16_t *q)
{
    while (tokens > 0) {
        uint32_t lanes = (tokens - 1) % 32 + 1;
        tokens -= lanes;
        xkv_warp_encode_round(w, t, shift, lanes, q + tokens);
    }
}

#endif
