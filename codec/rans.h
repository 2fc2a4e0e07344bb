/* rans.h - from coefficients to the bytes of a chunk and back: quantizer and interleaved rANS (spec/codec.md, sections
 * "Quantizer" and "rANS"). */
#ifndef XKV_RANS_H
#define XKV_RANS_H

#include "tables.h"

#define XKV_RANS_LANES 32u
#define XKV_RANS_LOW   (1u << 16) /* states are at least this; the encoder starts, and the decoder ends, with it */

/* The inner loops, in plain C, for AVX2 and for NEON: same integers, same bytes. */
typedef struct xkv_coder xkv_coder;
const xkv_coder *xkv_coder_cpu(void); /* follows the choice of xkv_kernels_cpu() */
const xkv_coder *xkv_coder_cpu_generic(void);

/* q = y / step, to nearest, ties to even. False when a value is not finite or beyond +-32767: q is then undefined. */
bool xkv_quantize(const xkv_coder *coder, const float *y, size_t n, float step, int16_t *q);
/* y = q * step in f32. */
void xkv_dequantize(const xkv_coder *coder, const int16_t *q, size_t n, float step, float *y);

/* The quantized coefficients of one chunk: row i of q, `stride` elements after row i - 1, holds the tokens of component
 * i, coded with tables[i] (0: not coded). */
typedef struct xkv_rans_shape {
    uint32_t tokens, components;
    size_t stride;         /* >= tokens */
    const uint8_t *tables; /* [components] */
} xkv_rans_shape;

/* Space that xkv_rans_encode needs: it writes from the end of it, without checks. */
uint64_t xkv_rans_bound(const xkv_rans_shape *shape);

/* Encode into out[xkv_rans_bound()]; the size of the result, which starts at out. Tables are valid and no value is
 * -32768. */
size_t xkv_rans_encode(const xkv_coder *coder, const xkv_rans_shape *shape, const int16_t *q, uint8_t *out);

/* Decode `size` bytes that may be anything. Rows of components that are not coded are not touched; `where` names the
 * chunk in messages. Errors: CORRUPT [E1, E2, E3], with q undefined. */
XKV_MUST_CHECK xkv_status xkv_rans_decode(xkv_ctx *ctx, const xkv_coder *coder, const xkv_rans_shape *shape,
                                          const uint8_t *data, uint64_t size, const char *where, int16_t *q);

/* The same one component after the other, where the integers of all need not be in memory. */
typedef struct xkv_rans_reader {
    uint32_t state[XKV_RANS_LANES];
    const uint8_t *next, *end; /* whole words */
    bool overrun;              /* a word was wanted beyond the end */
} xkv_rans_reader;

/* Begin; then xkv_rans_next() for each component that has a table, in order; then xkv_rans_close(). */
XKV_MUST_CHECK xkv_status xkv_rans_open(xkv_ctx *ctx, const xkv_rans_shape *shape, const uint8_t *data, uint64_t size,
                                        const char *where, xkv_rans_reader *r);
XKV_MUST_CHECK xkv_status xkv_rans_next(xkv_ctx *ctx, const xkv_coder *coder, const xkv_rans_shape *shape,
                                        uint32_t component, const char *where, xkv_rans_reader *r, int16_t *q);
XKV_MUST_CHECK xkv_status xkv_rans_close(xkv_ctx *ctx, const xkv_rans_shape *shape, const char *where,
                                         const xkv_rans_reader *r);

#endif
