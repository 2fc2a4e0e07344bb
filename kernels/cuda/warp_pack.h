/* warp_pack.h - what a warp does when it packs: sums, the quantizer, counts for the choice of tables, streams. */
#ifndef XKV_CUDA_WARP_PACK_H
#define XKV_CUDA_WARP_PACK_H

#include "element.h"
#include "plugin.h"

#ifdef __CUDACC__
#define XKV_WARP_SYNC()       __syncwarp()
#define XKV_WARP_ADD(p, more) (void)atomicAdd((p), (more))
#else
#define XKV_WARP_SYNC()       (void)0
#define XKV_WARP_ADD(p, more) (void)(*(p) += (more))
#endif

/* All lanes get the sum of `v`; `other` is scratch of its type. */
#define XKV_WARP_TOTAL(v, other)                                                                                       \
    do {                                                                                                               \
        for (uint32_t step_ = 16; step_ > 0; step_ >>= 1) {                                                            \
            XKV_SHUFFLE(other, v, lane ^ step_);                                                                       \
            XKV_EACH_LANE (lane) {                                                                                     \
                XKV_AT(v) += XKV_AT(other);                                                                            \
            }                                                                                                          \
        }                                                                                                              \
    } while (0)

XKV_WARP void xkv_warp_sum_squares(const xkv_plug_sums *o, uint32_t i, uint32_t t)
{
    XKV_WARP_BEGIN;
    const float *row = o->rows + t * o->ld;
    double sum XKV_LANES, other XKV_LANES;

    XKV_EACH_LANE (lane) {
        XKV_AT(sum) = 0;
        for (uint32_t c = o->begins[i] + lane; c < o->begins[i + 1]; c += 32) {
            double x = (double)(o->mean ? row[c] + o->mean[c] : row[c]);
            XKV_AT(sum) += x * x;
        }
    }
    XKV_WARP_TOTAL(sum, other);
    XKV_EACH_LANE (lane) {
        if (lane == 0)
            o->sums[i * o->stride + t] = XKV_AT(sum);
    }
}

/* Component i of a tile. */
XKV_WARP void xkv_warp_quantize(const xkv_plug_quantize *o, uint64_t i)
{
    XKV_WARP_BEGIN;
    const float *y = o->y + i * o->y_stride;
    int16_t *q = o->q + i * o->q_stride;
    double energy XKV_LANES, error XKV_LANES, other XKV_LANES;
    uint64_t magnitude XKV_LANES, other_magnitude XKV_LANES;
    uint32_t outside XKV_LANES, any;

    XKV_EACH_LANE (lane) {
        XKV_AT(energy) = XKV_AT(error) = 0;
        XKV_AT(magnitude) = 0;
        XKV_AT(outside) = 0;
        for (uint32_t t = lane; t < o->tokens; t += 32) {
            float rounded = rintf(y[t] / o->step);
            const int fits = fabsf(rounded) <= 32767; /* false for a NaN */
            const int16_t value = fits ? (int16_t)rounded : (int16_t)0;
            double left = (double)(y[t] - (float)value * o->step);
            q[t] = value;
            XKV_AT(energy) += (double)y[t] * (double)y[t];
            XKV_AT(error) += left * left;
            XKV_AT(magnitude) += (uint64_t)(value < 0 ? -value : value);
            XKV_AT(outside) |= !fits;
        }
    }
    XKV_WARP_TOTAL(energy, other);
    XKV_WARP_TOTAL(error, other);
    XKV_WARP_TOTAL(magnitude, other_magnitude);
    XKV_BALLOT(any, XKV_AT(outside) != 0);
    XKV_EACH_LANE (lane) {
        if (lane == 0) {
            xkv_plug_stats *s = &o->stats[i * o->stats_stride];
            s->energy = XKV_AT(energy);
            s->error = XKV_AT(error);
            s->magnitude = XKV_AT(magnitude);
            s->outside = any;
            s->unused = 0;
        }
    }
}

/* Tokens of a component that a warp counts by itself, before it adds them to those of others. */
#define XKV_COUNT_TOKENS 4096u

/* Tokens from `first` on of component i; held [XKV_COUNT_SHIFTS * XKV_COUNT_BINS] is the warp's. */
XKV_WARP void xkv_warp_count(const xkv_plug_count *o, uint64_t i, uint64_t first, uint32_t *held)
{
    XKV_WARP_BEGIN;
    const int16_t *q = o->q + i * o->stride;
    const uint32_t low = o->windows[i] & 255u, shifts = o->windows[i] >> 8;
    const uint64_t end = first + XKV_COUNT_TOKENS < o->tokens ? first + XKV_COUNT_TOKENS : o->tokens;
    uint32_t *counts = o->counts + i * XKV_COUNT_SHIFTS * XKV_COUNT_BINS;

    XKV_EACH_LANE (lane) {
        for (uint32_t k = lane; k < shifts * XKV_COUNT_BINS; k += 32)
            held[k] = 0;
    }
    XKV_WARP_SYNC();
    XKV_EACH_LANE (lane) {
        for (uint64_t t = first + lane; t < end; t += 32)
            for (uint32_t k = 0; k < shifts; k++) {
                const uint32_t shift = low + k, half = (1u << shift) >> 1;
                int32_t u = (int32_t)((uint32_t)(q[t] + (1 << 16)) + half) >> shift;
                u -= (1 << 16) >> shift;
                const uint32_t magnitude = (uint32_t)(u < 0 ? -u : u);
                XKV_WARP_ADD(&held[k * XKV_COUNT_BINS + (magnitude < 128 ? magnitude : 128)], 1u);
            }
    }
    XKV_WARP_SYNC();
    XKV_EACH_LANE (lane) {
        for (uint32_t k = lane; k < shifts * XKV_COUNT_BINS; k += 32)
            if (held[k] != 0)
                XKV_WARP_ADD(&counts[k], held[k]);
    }
}

/* A writer that starts at the end of a chunk's words. */
XKV_WARP void xkv_warp_write_from(xkv_warp_writer *w, uint16_t *words, uint32_t end)
{
    w->words = words;
    w->next = end;
    XKV_EACH_LANE (lane) {
        XKV_AT(w->x) = XKV_WARP_RANS_LOW;
    }
}

/* The states of `lanes` lanes in front of the words; then the stream begins with w->next. */
XKV_WARP void xkv_warp_write_states(xkv_warp_writer *w, uint32_t lanes)
{
    XKV_WARP_BEGIN;

    w->next -= 2 * lanes;
    XKV_EACH_LANE (lane) {
        if (lane < lanes) {
            w->words[w->next + 2 * lane] = (uint16_t)XKV_AT(w->x);
            w->words[w->next + 2 * lane + 1] = (uint16_t)(XKV_AT(w->x) >> 16);
        }
    }
}

#endif
