/* gpu_bench.h - what the files of gpu_bench share: gpu_bench.c, gpu_bench_pack.c. */
#ifndef XKV_GPU_BENCH_H
#define XKV_GPU_BENCH_H

#include "gpu_support.h"

enum { CHUNK = 256, PAGE = 16, LAYERS = 4, HEADS = 8, DIMS = 128, WIDTH = 2 * LAYERS * HEADS * DIMS };
enum { TILE = 2048, BATCH = 16384 };

extern bool quick;          /* small shapes, few rounds */
extern double gemm_ceiling; /* flops a second of f16 */

/* Seconds of the best of some rounds, after one that does not count. */
typedef void (*work_fn)(gpu *g, void *user);
double best_time(gpu *g, work_fn work, void *user);

/* Memory of zeros, with contents, and the host's. */
void *device_memory(gpu *g, size_t size);
void *device_copy(gpu *g, const void *from, size_t size);
void *pinned_memory(gpu *g, size_t size);

/* Deviations of the coefficients over the step: from 60 down to about 0.35; and the table for one. */
double deviation(uint32_t component);
uint8_t table_for(double sigma);

/* Planes of a group in pages of 16 tokens, in a shuffled order. */
typedef struct target {
    uint8_t *cache;
    uint32_t *rows;
    xkv_plug_plane *planes; /* the device's */
    uint32_t plane_count, width;
    float *mean, *angles;
    int32_t *positions;
    double *inv_freq;
} target;

target make_target(gpu *g, uint32_t tokens, uint32_t plane_count);
void free_target(gpu *g, target *t);

/* The target's cache full of normal deviates in bf16, a piece again and again. */
void fill_cache(gpu *g, const target *t, uint32_t tokens);

/* Rows of f32 in two halves of bf16, the low ones behind the high ones; and products of such, whose matrices have
 * a_size and b_size numbers: the three that matter, or `rough` one. */
void halve(gpu *g, const float *rows, uint64_t count, uint64_t width, uint64_t ld, uint16_t *to);
void multiply(gpu *g, xkv_plug_product o, const uint16_t *a, uint64_t a_size, const uint16_t *b, uint64_t b_size,
              bool rough);

/* Members of the document: "pack_dict", "pack_svd". */
void print_pack(gpu *g);
void print_svd(gpu *g);

#endif
