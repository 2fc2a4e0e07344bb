/* device_support.h - what the tests on a device share: contexts that count what is logged, samples, caches in the
 * device's memory. */
#ifndef XKV_TEST_DEVICE_SUPPORT_H
#define XKV_TEST_DEVICE_SUPPORT_H

#include "device_opened.h"

extern uint32_t errors_logged, warnings_logged;

/* A context with two threads; the counts are 0. */
xkv_ctx *logging_ctx(void);

/* Of samples: 16 unless a test says otherwise. The fused kernel takes heads of a multiple of 16. */
extern uint32_t head_dim;
/* 3 layers in groups of 2, 2 heads. */
synthetic sample(uint32_t tokens, uint32_t dtype, int rope);

/* A dictionary trained on a cache, opened for packing; its file is in *trained. */
xkv_dict *train_dict(xkv_ctx *ctx, const synthetic *s, uint32_t cross, memory *trained);

enum { SENTINEL = 64 };
typedef enum layout { TOKEN_MAJOR, HEAD_MAJOR, TRANSPOSED, LAYOUTS } layout;

/* All planes, one behind the other, with sentinels around: on the device, and the same on the host. */
typedef struct cache {
    uint32_t planes, tokens, dtype;
    layout layout;
    uint64_t size, plane_size;
    uint8_t *there, *host, *found; /* found: what was there when it was compared */
    uint32_t *rows;                /* the device's; NULL: none */
    uint32_t *host_rows;
    xkv_view *views, *host_views;
} cache;

/* Sentinels everywhere. `paged`: pages of 8 tokens, from last to first. */
cache make_cache(const synthetic *s, uint32_t tokens, uint32_t dtype, layout l, bool paged);
void free_cache(cache *c);
/* Nothing has been written on the device. */
void clear_cache(cache *c);

#endif
