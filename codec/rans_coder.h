/* rans_coder.h - what the loops in plain C, for AVX2 and for NEON share. */
#ifndef XKV_RANS_CODER_H
#define XKV_RANS_CODER_H

#include "rans.h"

/* Goes backwards: last token first, and each word in front of the one before. */
typedef struct xkv_rans_writer {
    uint32_t state[XKV_RANS_LANES];
    uint8_t *next;
} xkv_rans_writer;

struct xkv_coder {
    const char *name;
    bool (*quantize)(const float *y, size_t n, float step, int16_t *q);
    void (*dequantize)(const int16_t *q, size_t n, float step, float *y);
    /* One component of a chunk. After an overrun the values are undefined. */
    void (*encode)(xkv_rans_writer *w, xkv_table table, const int16_t *q, uint32_t tokens);
    void (*decode)(xkv_rans_reader *r, xkv_table table, int16_t *q, uint32_t tokens);
};

/* The AVX2 and the NEON loops; NULL where they are not built in. The caller asks the processor first. */
const xkv_coder *xkv_coder_cpu_avx2(void);
const xkv_coder *xkv_coder_cpu_neon(void);

/* The plain C loops, which also do what is left over by the others. */
bool xkv_generic_quantize(const float *y, size_t n, float step, int16_t *q);
void xkv_generic_dequantize(const int16_t *q, size_t n, float step, float *y);
void xkv_generic_encode_round(xkv_rans_writer *w, xkv_table table, const int16_t *q, uint32_t lanes);
void xkv_generic_decode(xkv_rans_reader *r, xkv_table table, int16_t *q, uint32_t tokens);

/* Byte shuffles of eight words, by the mask of the lanes that read or write one. Made by the first call, from any
 * thread. */
typedef struct xkv_rans_shuffle_tables {
    uint8_t spread[256][16]; /* the first words to the lanes of the mask */
    uint8_t gather[256][16]; /* the words of these lanes to the end, in order */
} xkv_rans_shuffle_tables;
extern xkv_rans_shuffle_tables xkv_rans_shuffles;
void xkv_rans_make_shuffles(void);

static inline void xkv_rans_push(xkv_rans_writer *w, uint32_t word)
{
    w->next -= 2;
    xkv_store16(w->next, (uint16_t)word);
}

static inline uint32_t xkv_rans_take(xkv_rans_reader *r)
{
    if (r->next == r->end) {
        r->overrun = true;
        return 0;
    }
    uint32_t word = xkv_load16(r->next);
    r->next += 2;
    return word;
}

#endif
