/* gpu_bench_svd.c - gpu_bench for the truncated SVD: the steps of kernels/device_svd.c with rows gathered from a cache
 * in pages tile by tile, of several groups of one rank, whose eigenproblems are solved in one batch. Coefficients stay
 * on the device. */
#include "gpu_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { COLS = LAYERS * HEADS * DIMS, ROWS = 8192, PASSES = 3 };

typedef struct decomposing {
    target target;
    uint32_t tokens, rank, width, count, iterations;
    float *rows, *y, *v, *small_f32, *components, *coefficients;
    uint16_t *x_halves, *y_halves, *v_halves; /* high, then low */
    double *z64, *gram, *small, *values;      /* gram: [count][width][width] */
    void *work, *host_work;
    xkv_plug_dense_size dense;
    int32_t *info;
    uint64_t scratch;
} decomposing;

static void convert(gpu *g, const void *from, void *to, uint64_t rows, uint64_t cols, uint32_t to_f64,
                    uint32_t reversed)
{
    xkv_plug_convert o = {from, to, rows, cols, to_f64, reversed};
    GPU_TRY(g, convert(g->d, &o, g->stream));
}

static void gather_tile(gpu *g, const decomposing *s, uint32_t first)
{
    const target *t = &s->target;
    xkv_plug_angles angles = {t->positions + first, t->inv_freq, ROWS, DIMS / 2, 1, t->angles, DIMS};
    xkv_plug_gather o = {t->planes, t->plane_count, ROWS, first, t->angles, DIMS, NULL, s->rows, COLS};

    GPU_TRY(g, angles(g->d, &angles, g->stream));
    GPU_TRY(g, gather(g->d, &o, g->stream));
    halve(g, s->rows, ROWS, COLS, COLS, s->x_halves);
}

/* Y = X V of a tile. */
static void multiply_tile(gpu *g, const decomposing *s, uint32_t first, bool rough)
{
    uint64_t p = s->width;
    xkv_plug_product o = {{NULL, NULL, s->y, ROWS, p, COLS, COLS, p, p, 1, 0, 0, XKV_PRODUCT_BF16}, 0, 1, 0, 0, 0};

    gather_tile(g, s, first);
    multiply(g, o, s->x_halves, (uint64_t)ROWS * COLS, s->v_halves, COLS * p, rough);
    halve(g, s->y, ROWS, p, p, s->y_halves);
}

static void orthonormalize(gpu *g, const decomposing *s)
{
    uint64_t p = s->width;
    xkv_plug_product gram = {
        {s->z64, s->z64, (float *)(void *)s->small, p, p, COLS, p, p, p, 1, 0, 1, XKV_PRODUCT_F64}, 0, 1, 0, 0, 0};
    xkv_plug_scale_gram scale = {s->small, s->gram, s->z64, p, COLS, 0};
    xkv_plug_cholesky o = {s->gram, s->z64, p, COLS, s->work, s->dense.cholesky, s->info};

    convert(g, s->v, s->z64, COLS, p, 1, 0);
    for (int i = 0; i < PASSES; i++) {
        scale.shift = i == 0 ? 1e-6 : 0;
        GPU_TRY(g, product(g->d, &gram, g->stream));
        GPU_TRY(g, scale_gram(g->d, &scale, g->stream));
        GPU_TRY(g, cholesky(g->d, &o, g->stream));
    }
}

static void iterate(gpu *g, const decomposing *s, float *v)
{
    uint64_t p = s->width;
    xkv_plug_sketch sketch = {s->v_halves, COLS * p, 1};
    xkv_plug_product z = {{NULL, NULL, s->v, COLS, p, ROWS, COLS, p, p, 1, 0, 1, XKV_PRODUCT_BF16}, 0, 1, 0, 0, 0};

    GPU_TRY(g, sketch(g->d, &sketch, g->stream));
    for (uint32_t i = 0; i < s->iterations; i++) {
        for (uint32_t first = 0; first < s->tokens; first += ROWS) {
            multiply_tile(g, s, first, true);
            z.g.beta = first > 0 ? 1 : 0;
            multiply(g, z, s->x_halves, 0, s->y_halves, 0, true);
        }
        orthonormalize(g, s);
        convert(g, s->z64, v, COLS, p, 0, 0);
        halve(g, v, COLS, p, p, s->v_halves);
    }
}

static void find_gram(gpu *g, const decomposing *s, double *gram)
{
    uint64_t p = s->width, y = ROWS * p;
    xkv_plug_product c = {{NULL, NULL, s->small_f32, p, p, ROWS, p, p, p, 1, 0, 1, XKV_PRODUCT_BF16}, 0, 1, 0, 0, 0};

    for (uint32_t first = 0; first < s->tokens; first += ROWS) {
        multiply_tile(g, s, first, false);
        c.g.beta = first > 0 ? 1 : 0;
        multiply(g, c, s->y_halves, y, s->y_halves, y, false);
    }
    convert(g, s->small_f32, gram, p, p, 1, 0);
}

static void make_factors(gpu *g, const decomposing *s, const float *v, const double *gram)
{
    uint64_t p = s->width, r = s->rank;
    xkv_plug_product w = {
        {s->small_f32, v, s->components, r, COLS, p, p, p, COLS, 1, 0, 0, XKV_PRODUCT_F32}, 1, 1, 0, 0, 0};
    xkv_plug_product a = {{NULL, NULL, NULL, ROWS, r, COLS, COLS, COLS, r, 1, 0, 0, XKV_PRODUCT_BF16}, 1, 1, 0, 0, 0};

    convert(g, gram, s->small_f32, p, p, 0, 1);
    GPU_TRY(g, product(g->d, &w, g->stream));
    halve(g, s->components, r, COLS, COLS, s->v_halves);
    for (uint32_t first = 0; first < s->tokens; first += ROWS) {
        a.g.c = s->coefficients + first * r;
        gather_tile(g, s, first);
        multiply(g, a, s->x_halves, (uint64_t)ROWS * COLS, s->v_halves, r * COLS, false);
    }
}

static void do_svd(gpu *g, void *user)
{
    const decomposing *s = user;
    uint64_t p = s->width;
    xkv_plug_eigen eigen = {s->gram,        s->values,           p,      s->count, s->work, s->host_work,
                            s->dense.eigen, s->dense.eigen_host, s->info};

    for (uint32_t i = 0; i < s->count; i++) {
        float *v = s->v + (i + 1) * COLS * p;
        iterate(g, s, v);
        find_gram(g, s, s->gram + (i + 1) * p * p);
    }
    eigen.a += p * p; /* the first place is that of Cholesky-QR */
    GPU_TRY(g, eigen(g->d, &eigen, g->stream));
    for (uint32_t i = 0; i < s->count; i++)
        make_factors(g, s, s->v + (i + 1) * COLS * p, s->gram + (i + 1) * p * p);
}

static void *memory(gpu *g, decomposing *s, uint64_t size)
{
    s->scratch += size;
    return device_memory(g, size);
}

/* Milliseconds for `count` matrices of one rank. */
static double time_svd(gpu *g, uint32_t tokens, uint32_t rank, uint32_t count, uint32_t iterations, uint64_t *scratch)
{
    uint32_t width = (rank + rank / 8 + 15) / 16 * 16;
    uint64_t p = width;
    decomposing s = {.tokens = tokens, .rank = rank, .width = width, .count = count, .iterations = iterations};

    s.target = make_target(g, tokens, LAYERS);
    fill_cache(g, &s.target, tokens);
    GPU_TRY(g, dense_size(g->d, p, count, &s.dense));
    s.rows = memory(g, &s, 4ull * ROWS * COLS);
    s.x_halves = memory(g, &s, 4ull * ROWS * COLS);
    s.y = memory(g, &s, 4 * ROWS * p);
    s.y_halves = memory(g, &s, 4 * ROWS * p);
    s.v = memory(g, &s, 4 * (count + 1) * COLS * p);
    s.v_halves = memory(g, &s, 4 * COLS * p);
    s.z64 = memory(g, &s, 8 * COLS * p);
    s.gram = memory(g, &s, 8 * (count + 1) * p * p);
    s.small = memory(g, &s, 8 * p * p);
    s.small_f32 = memory(g, &s, 4 * p * p);
    s.values = memory(g, &s, 8 * count * p);
    s.work = memory(g, &s, s.dense.cholesky > s.dense.eigen ? s.dense.cholesky : s.dense.eigen);
    s.info = memory(g, &s, 4ull * count);
    s.components = memory(g, &s, 4ull * rank * COLS);
    s.coefficients = memory(g, &s, 4ull * tokens * rank);
    s.host_work = malloc(s.dense.eigen_host + 1);
    double ms = best_time(g, do_svd, &s) * 1e3;
    void *const blocks[] = {s.rows,  s.x_halves, s.y,         s.y_halves, s.v,    s.v_halves,   s.z64,         s.gram,
                            s.small, s.values,   s.small_f32, s.work,     s.info, s.components, s.coefficients};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        g->api->release(g->d, blocks[i]);
    free(s.host_work);
    free_target(g, &s.target);
    if (s.scratch > *scratch)
        *scratch = s.scratch;
    return ms;
}

void print_svd(gpu *g)
{
    uint32_t tokens = quick ? BATCH : 65536, count = quick ? 1 : 8;
    double raw = 2.0 * tokens * COLS * 2 * count;

    printf("  \"pack_svd\": {\"tokens\": %u, \"cols\": %u, \"matrices\": %u, \"ranks\": [512, 768]", tokens, COLS,
           2 * count);
    for (uint32_t q = 1; q <= (quick ? 1 : 2); q++) {
        uint64_t scratch = 0;
        double ms = time_svd(g, tokens, 512, count, q, &scratch) + time_svd(g, tokens, 768, count, q, &scratch);
        printf(",\n    \"q%u\": {\"ms\": %.2f, \"raw_gb_s\": %.1f, \"scratch_gb\": %.2f}", q, ms, raw / ms * 1e-6,
               1e-9 * (double)scratch);
    }
    printf("}\n");
}
