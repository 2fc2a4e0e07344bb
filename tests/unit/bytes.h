/* bytes.h - building files byte by byte in tests. */
#ifndef XKV_TEST_BYTES_H
#define XKV_TEST_BYTES_H

#include "base.h"

typedef struct bytes {
    uint8_t data[1 << 16];
    size_t size;
} bytes;

static inline void put(bytes *b, const void *p, size_t n)
{
    memcpy(b->data + b->size, p, n);
    b->size += n;
}
static inline void put32(bytes *b, uint32_t v)
{
    xkv_store32(b->data + b->size, v);
    b->size += 4;
}
static inline void put64(bytes *b, uint64_t v)
{
    xkv_store64(b->data + b->size, v);
    b->size += 8;
}
static inline void putf32(bytes *b, float v)
{
    xkv_storef32(b->data + b->size, v);
    b->size += 4;
}
/* n bytes that depend on `seed`, none of them small integers in a row */
static inline void put_noise(bytes *b, size_t n, uint32_t seed)
{
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        b->data[b->size++] = (uint8_t)(seed >> 24);
    }
}

#endif
