/* gpu_support.h - a device for programs that have nothing but its plug-in. Whatever fails ends them. */
#ifndef XKV_GPU_SUPPORT_H
#define XKV_GPU_SUPPORT_H

#include "device_tables.h"
#include "plugin.h"

#include <stdbool.h>
#include <stddef.h>

/* Exit codes: 0 passed, 1 failed, 77 there is no device. */
enum { GPU_SKIP = 77 };

/* The plug-in at `path` and its first device; ends the program with GPU_SKIP, saying why, when it has none. */
const xkv_plugin *gpu_open(const char *path, xkv_plug_device **device_p);

/* End the program unless `status` is XKV_OK. */
void gpu_try(const xkv_plugin *api, const xkv_plug_device *d, xkv_status status, const char *what);
#define GPU_TRY(g, call) gpu_try((g)->api, (g)->d, (g)->api->call, #call)

/* A device and a stream. */
typedef struct gpu {
    const xkv_plugin *api;
    xkv_plug_device *d;
    void *stream, *event;
} gpu;

gpu gpu_start(const char *path);
void gpu_end(gpu *g);
/* Wait for the stream. */
void gpu_wait(gpu *g);

/* Device memory with 256 bytes of a pattern on both sides. */
typedef struct gpu_block {
    uint8_t *raw;
    uint8_t *p;
    size_t size;
} gpu_block;

gpu_block gpu_alloc(gpu *g, size_t size);
gpu_block gpu_put(gpu *g, const void *from, size_t size); /* with contents */
void gpu_get(gpu *g, const gpu_block *b, void *to);
/* Whether the patterns are whole; frees. */
bool gpu_free(gpu *g, gpu_block *b);

/* splitmix64, and a normal deviate from it. */
uint64_t gpu_random(uint64_t *state);
double gpu_normal(uint64_t *state);

/* Encode a chunk by the lanes of warp_rans.h: row i of q, `stride` apart, with table tables[i] > 0. The size; `out` has
 * room for 4 bytes a token and component, and 128. */
size_t gpu_encode(const int16_t *q, size_t stride, uint32_t tokens, const uint8_t *tables, uint32_t components,
                  uint8_t *out);
/* Decode it on the CPU, likewise; what is found. `data` is readable up to a multiple of 4. */
uint32_t gpu_decode(const xkv_warp_table *tables, const uint8_t *data, size_t size, uint32_t tokens,
                    const uint8_t *components, uint32_t count, int16_t *q, size_t stride);

/* A value that is coded with a table, some at the edges of what it codes and far beyond. */
int16_t gpu_value(uint32_t table, uint64_t *state);

#endif
