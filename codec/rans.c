/* rans.c - see rans.h. The order of the words is that of spec/codec.md, section "rANS"; the encoder does everything the
 * other way round. */
#include "rans_coder.h"

#include "kernels.h"

#include <math.h>

/* --- Quantizer ---------------------------------------------------------------------------------------------------- */

bool xkv_generic_quantize(const float *y, size_t n, float step, int16_t *q)
{
    bool inside = true;
    for (size_t i = 0; i < n; i++) {
        float rounded = rintf(y[i] / step);
        bool fits = fabsf(rounded) <= 32767; /* false for a NaN */
        inside = inside && fits;
        q[i] = fits ? (int16_t)rounded : 0;
    }
    return inside;
}

void xkv_generic_dequantize(const int16_t *q, size_t n, float step, float *y)
{
    for (size_t i = 0; i < n; i++)
        y[i] = (float)q[i] * step;
}

bool xkv_quantize(const xkv_coder *coder, const float *y, size_t n, float step, int16_t *q)
{
    return coder->quantize(y, n, step, q);
}

void xkv_dequantize(const xkv_coder *coder, const int16_t *q, size_t n, float step, float *y)
{
    coder->dequantize(q, n, step, y);
}

/* --- Encoder ------------------------------------------------------------------------------------------------------ */

/* Make room in a state that is about to grow. */
static uint32_t shrink(xkv_rans_writer *w, uint32_t x, bool full)
{
    if (!full)
        return x;
    xkv_rans_push(w, x);
    return x >> 16;
}

static void encode_symbol(xkv_rans_writer *w, uint32_t lane, xkv_symbol s)
{
    uint32_t start = s.packed & 0xfff, rest = s.packed >> 12 & 0xfff, shift = s.packed >> 24 & 15;
    uint32_t increment = s.packed >> 31, f = (1u << XKV_PROBABILITY_BITS) - rest;
    uint32_t x = shrink(w, w->state[lane], w->state[lane] >> 20 >= f);
    uint32_t quotient = (uint32_t)((uint64_t)(x + increment) * s.reciprocal >> 32) >> shift;
    w->state[lane] = x + quotient * rest + start; /* (quotient << 12) + x % f + start */
}

static void encode_low_bits(xkv_rans_writer *w, uint32_t lane, uint32_t shift, uint32_t bits)
{
    uint32_t x = shrink(w, w->state[lane], w->state[lane] >> (32 - shift) != 0);
    w->state[lane] = x << shift | bits;
}

void xkv_generic_encode_round(xkv_rans_writer *w, xkv_table table, const int16_t *q, uint32_t lanes)
{
    const uint32_t shift = table.shift, half = (1u << shift) >> 1, escape = 2 * table.base->reach + 1;
    uint32_t index[XKV_RANS_LANES], shifted[XKV_RANS_LANES];

    for (uint32_t i = 0; i < lanes; i++) {
        shifted[i] = (uint32_t)(q[i] + (1 << 16)) + half; /* not negative: 2^16 is a multiple of 2^shift */
        uint32_t u_and_reach = (shifted[i] >> shift) - (1u << 16 >> shift) + table.base->reach;
        index[i] = u_and_reach < escape ? u_and_reach : escape;
    }
    for (uint32_t i = lanes; i-- > 0;)
        if (index[i] == escape)
            xkv_rans_push(w, (uint16_t)q[i]);
    for (uint32_t i = lanes; shift > 0 && i-- > 0;)
        if (index[i] != escape)
            encode_low_bits(w, i, shift, shifted[i] & ((1u << shift) - 1));
    for (uint32_t i = lanes; i-- > 0;)
        encode_symbol(w, i, table.base->encode[index[i]]);
}

static void generic_encode(xkv_rans_writer *w, xkv_table table, const int16_t *q, uint32_t tokens)
{
    while (tokens > 0) {
        uint32_t lanes = (tokens - 1) % XKV_RANS_LANES + 1;
        tokens -= lanes;
        xkv_generic_encode_round(w, table, q + tokens, lanes);
    }
}

/* --- Decoder ------------------------------------------------------------------------------------------------------ */

static void refill(xkv_rans_reader *r, uint32_t lane)
{
    if (r->state[lane] < XKV_RANS_LOW)
        r->state[lane] = r->state[lane] << 16 | xkv_rans_take(r);
}

static int32_t decode_symbol(uint32_t *x, const xkv_base_table *t)
{
    uint32_t entry = t->decode[*x & ((1u << XKV_PROBABILITY_BITS) - 1)];
    *x = (entry & 0xfff) * (*x >> XKV_PROBABILITY_BITS) + (entry >> 12 & 0xfff);
    return (int8_t)(entry >> 24);
}

static void decode_round(xkv_rans_reader *r, xkv_table table, int16_t *q, uint32_t lanes)
{
    const int32_t scale = 1 << table.shift, half = scale >> 1;
    int32_t u[XKV_RANS_LANES];

    for (uint32_t i = 0; i < lanes; i++) {
        u[i] = decode_symbol(&r->state[i], table.base);
        refill(r, i);
    }
    for (uint32_t i = 0; i < lanes; i++) {
        if (u[i] == XKV_ESCAPE || table.shift == 0) {
            q[i] = (int16_t)u[i];
            continue;
        }
        q[i] = (int16_t)(u[i] * scale + (int32_t)(r->state[i] & (uint32_t)(scale - 1)) - half);
        r->state[i] >>= table.shift;
        refill(r, i);
    }
    for (uint32_t i = 0; i < lanes; i++)
        if (u[i] == XKV_ESCAPE)
            q[i] = (int16_t)xkv_rans_take(r);
}

void xkv_generic_decode(xkv_rans_reader *r, xkv_table table, int16_t *q, uint32_t tokens)
{
    while (tokens > 0 && !r->overrun) {
        uint32_t lanes = tokens < XKV_RANS_LANES ? tokens : XKV_RANS_LANES;
        decode_round(r, table, q, lanes);
        q += lanes;
        tokens -= lanes;
    }
}

/* --- Dispatch ----------------------------------------------------------------------------------------------------- */

static const xkv_coder generic = {"generic", xkv_generic_quantize, xkv_generic_dequantize, generic_encode,
                                  xkv_generic_decode};

const xkv_coder *xkv_coder_cpu_generic(void)
{
    return &generic;
}

const xkv_coder *xkv_coder_cpu(void)
{
    const xkv_coder *vector = xkv_coder_cpu_avx2() ? xkv_coder_cpu_avx2() : xkv_coder_cpu_neon();

    return vector && xkv_kernels_cpu() != xkv_kernels_cpu_generic() ? vector : &generic;
}

/* --- Chunks ------------------------------------------------------------------------------------------------------- */

static uint32_t lane_count(const xkv_rans_shape *s)
{
    return s->tokens < XKV_RANS_LANES ? s->tokens : XKV_RANS_LANES;
}

static uint32_t coded_components(const xkv_rans_shape *s)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < s->components; i++)
        count += s->tables[i] != 0;
    return s->tokens > 0 ? count : 0;
}

uint64_t xkv_rans_bound(const xkv_rans_shape *s)
{
    /* A token has at most two words: one for its symbol, and one for its low bits or its escaped value. */
    return 4 * lane_count(s) + 4 * (uint64_t)coded_components(s) * s->tokens;
}

size_t xkv_rans_encode(const xkv_coder *coder, const xkv_rans_shape *s, const int16_t *q, uint8_t *out)
{
    xkv_rans_writer w;
    uint8_t *end = out + xkv_rans_bound(s);

    if (coded_components(s) == 0)
        return 0;
    w.next = end;
    for (uint32_t i = 0; i < XKV_RANS_LANES; i++)
        w.state[i] = XKV_RANS_LOW;
    for (uint32_t i = s->components; i-- > 0;)
        if (s->tables[i] != 0)
            coder->encode(&w, xkv_table_get(s->tables[i]), q + i * s->stride, s->tokens);
    w.next -= 4 * lane_count(s);
    for (uint32_t i = 0; i < lane_count(s); i++)
        xkv_store32(w.next + 4 * i, w.state[i]);
    memmove(out, w.next, (size_t)(end - w.next));
    return (size_t)(end - w.next);
}

static xkv_status check_tables(xkv_ctx *ctx, const xkv_rans_shape *s, const char *where)
{
    for (uint32_t i = 0; i < s->components; i++)
        if (s->tables[i] > XKV_TABLE_MAX)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: component %u has table %u, expected at most %u [E1]", where, i,
                            s->tables[i], XKV_TABLE_MAX);
    return XKV_OK;
}

xkv_status xkv_rans_open(xkv_ctx *ctx, const xkv_rans_shape *s, const uint8_t *data, uint64_t size, const char *where,
                         xkv_rans_reader *r)
{
    uint32_t lanes = coded_components(s) > 0 ? lane_count(s) : 0;

    XKV_TRY(check_tables(ctx, s, where));
    *r = (xkv_rans_reader){.next = data, .end = data + size};
    if (lanes == 0)
        return size == 0 ? XKV_OK
                         : xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: %llu bytes, expected none [E2]", where,
                                    (unsigned long long)size);
    if (size < 4 * lanes || size % 2 != 0)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: %llu bytes, expected %u and whole words [E2]", where,
                        (unsigned long long)size, 4 * lanes);
    for (uint32_t i = 0; i < lanes; i++) {
        r->state[i] = xkv_load32(data + 4 * i);
        if (r->state[i] < XKV_RANS_LOW)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: lane %u starts with %u, expected at least %u [E2]", where, i,
                            r->state[i], XKV_RANS_LOW);
    }
    r->next += 4 * lanes;
    return XKV_OK;
}

xkv_status xkv_rans_next(xkv_ctx *ctx, const xkv_coder *coder, const xkv_rans_shape *s, uint32_t component,
                         const char *where, xkv_rans_reader *r, int16_t *q)
{
    coder->decode(r, xkv_table_get(s->tables[component]), q, s->tokens);
    if (r->overrun)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: ends inside component %u [E3]", where, component);
    return XKV_OK;
}

xkv_status xkv_rans_close(xkv_ctx *ctx, const xkv_rans_shape *s, const char *where, const xkv_rans_reader *r)
{
    if (r->next != r->end)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: %llu bytes left over [E3]", where,
                        (unsigned long long)(r->end - r->next));
    for (uint32_t i = 0; coded_components(s) > 0 && i < lane_count(s); i++)
        if (r->state[i] != XKV_RANS_LOW)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: lane %u ends with %u, expected %u [E3]", where, i, r->state[i],
                            XKV_RANS_LOW);
    return XKV_OK;
}

xkv_status xkv_rans_decode(xkv_ctx *ctx, const xkv_coder *coder, const xkv_rans_shape *s, const uint8_t *data,
                           uint64_t size, const char *where, int16_t *q)
{
    xkv_rans_reader r;

    XKV_TRY(xkv_rans_open(ctx, s, data, size, where, &r));
    for (uint32_t i = 0; s->tokens > 0 && i < s->components; i++)
        if (s->tables[i] != 0)
            XKV_TRY(xkv_rans_next(ctx, coder, s, i, where, &r, q + i * s->stride));
    return xkv_rans_close(ctx, s, where, &r);
}
