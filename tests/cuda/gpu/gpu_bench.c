/* gpu_bench.c - speed of libxkv_cuda.so on a GPU, beside the ceilings of the same process: one JSON document.
 *     gpu_bench [--quick] PLUGIN
 * Restores are those of codec/device_group.c with the file left out: packed bytes lie in pinned memory. Coefficients
 * are normal deviates whose deviation falls like a spectrum, so that the ratio comes out near 16. Exit code 77: no
 * device. */
#include "gpu_bench.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DISTINCT = 16, ROUNDS = 5 };

bool quick;

static void must(cudaError_t e, const char *what)
{
    if (e == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
    exit(1);
}

/* --- Time --------------------------------------------------------------------------------------------------------- */

double best_time(gpu *g, work_fn work, void *user)
{
    cudaEvent_t begin, end;
    double best = INFINITY;

    must(cudaEventCreate(&begin), "event");
    must(cudaEventCreate(&end), "event");
    for (int i = 0; i < (quick ? 2 : ROUNDS + 1); i++) {
        float ms;
        must(cudaEventRecord(begin, g->stream), "record");
        work(g, user);
        must(cudaEventRecord(end, g->stream), "record");
        must(cudaEventSynchronize(end), "wait");
        must(cudaEventElapsedTime(&ms, begin, end), "elapsed");
        if (i > 0)
            best = fmin(best, ms * 1e-3);
    }
    must(cudaEventDestroy(begin), "event");
    must(cudaEventDestroy(end), "event");
    return best;
}

void *device_memory(gpu *g, size_t size)
{
    void *p;

    GPU_TRY(g, alloc(g->d, size, &p));
    GPU_TRY(g, clear(g->d, p, size, g->stream));
    gpu_wait(g);
    return p;
}

void *device_copy(gpu *g, const void *from, size_t size)
{
    void *p = device_memory(g, size);

    GPU_TRY(g, copy(g->d, p, from, size, g->stream));
    gpu_wait(g);
    return p;
}

void *pinned_memory(gpu *g, size_t size)
{
    void *p;

    GPU_TRY(g, alloc_pinned(g->d, size, &p));
    memset(p, 0, size);
    return p;
}

/* --- Ceilings ----------------------------------------------------------------------------------------------------- */

typedef struct copying {
    void *to, *from;
    size_t size;
} copying;

static void do_copy(gpu *g, void *user)
{
    const copying *c = user;
    GPU_TRY(g, copy(g->d, c->to, c->from, c->size, g->stream));
}

static void do_gemm(gpu *g, void *user)
{
    GPU_TRY(g, gemm(g->d, user, g->stream));
}

static double gemm_rate(gpu *g, uint64_t m, uint64_t n, uint64_t k)
{
    size_t a_size = m * k * 2, b_size = k * n * 2;
    uint16_t *numbers = malloc(a_size > b_size ? a_size : b_size);
    uint64_t seed = 1;

    for (size_t i = 0; i < (a_size > b_size ? a_size : b_size) / 2; i++) /* power, and so the clock, depends on them */
        numbers[i] = (uint16_t)(0x3800 + gpu_random(&seed) % 0x800 + gpu_random(&seed) % 2 * 0x8000);
    void *a = device_copy(g, numbers, a_size), *b = device_copy(g, numbers, b_size), *c = device_memory(g, m * n * 4);
    xkv_plug_gemm o = {a, b, c, m, n, k, k, n, n, 1, 0, 0, 0};
    double t = best_time(g, do_gemm, &o);
    g->api->release(g->d, a);
    g->api->release(g->d, b);
    g->api->release(g->d, c);
    free(numbers);
    return 2.0 * (double)m * (double)n * (double)k / t;
}

double gemm_ceiling;

static void print_ceilings(gpu *g)
{
    size_t size = quick ? 64u << 20 : 1u << 30, side = quick ? 1024 : 8192;
    void *a = device_memory(g, size), *b = device_memory(g, size), *host = pinned_memory(g, size);
    copying within = {a, b, size}, up = {a, host, size};

    gemm_ceiling = gemm_rate(g, side, side, side);
    printf("  \"ceilings\": {\n");
    printf("    \"gemm_f16_tflops\": %.1f,\n", gemm_ceiling * 1e-12);
    printf("    \"gemm_f16_tflops_tile\": %.1f,\n", gemm_rate(g, TILE, WIDTH, side / 4) * 1e-12);
    printf("    \"device_memcpy_gb_s\": %.1f,\n", 2e-9 * (double)size / best_time(g, do_copy, &within));
    printf("    \"pinned_to_device_gb_s\": %.1f\n  },\n", 1e-9 * (double)size / best_time(g, do_copy, &up));
    g->api->release(g->d, a);
    g->api->release(g->d, b);
    g->api->release_pinned(g->d, host);
}

/* --- Streams ------------------------------------------------------------------------------------------------------ */

/* Some chunks of one group, as bytes, each at an offset that is a multiple of 4. */
typedef struct chunks {
    uint32_t components;
    uint8_t *tables;
    xkv_warp_code *codes;
    uint8_t *bytes;
    size_t offset[DISTINCT + 1];
} chunks;

double deviation(uint32_t component)
{
    return 60 / pow(1 + component / 4.0, 0.85);
}

uint8_t table_for(double sigma)
{
    double rung = rint(4 * (3 + log2(sigma)));
    return (uint8_t)(1 + fmin(fmax(rung, 0), XKV_TABLE_RUNGS - 1));
}

static chunks make_chunks(uint32_t components)
{
    chunks c = {components,
                malloc(components),
                malloc(components * sizeof(xkv_warp_code)),
                malloc((size_t)DISTINCT * (components * CHUNK * 4 + 256)),
                {0}};
    int16_t *q = malloc((size_t)components * CHUNK * 2);
    uint64_t seed = 7;

    for (uint32_t i = 0; i < components; i++) {
        c.tables[i] = table_for(deviation(i));
        c.codes[i] = xkv_device_code(c.tables[i]);
    }
    for (int k = 0; k < DISTINCT; k++) {
        for (uint32_t i = 0; i < components; i++)
            for (uint32_t t = 0; t < CHUNK; t++)
                q[i * CHUNK + t] = (int16_t)rint(deviation(i) * gpu_normal(&seed));
        size_t size = gpu_encode(q, CHUNK, CHUNK, c.tables, components, c.bytes + c.offset[k]);
        c.offset[k + 1] = c.offset[k] + (size + 3) / 4 * 4;
    }
    free(q);
    return c;
}

static void free_chunks(chunks *c)
{
    free(c->tables);
    free(c->codes);
    free(c->bytes);
}

/* Bytes of `count` chunks one behind the other, and their streams; what does not fit is not there. */
static size_t lay_chunks(const chunks *c, uint32_t count, uint8_t *bytes, xkv_plug_stream *streams)
{
    size_t at = 0;

    for (uint32_t i = 0; i < count; i++) {
        size_t k = i % DISTINCT, size = c->offset[k + 1] - c->offset[k];
        if (bytes)
            memcpy(bytes + at, c->bytes + c->offset[k], size);
        if (streams)
            streams[i] = (xkv_plug_stream){at, (uint32_t)size, CHUNK, (uint64_t)i * CHUNK, 0};
        at += size;
    }
    return at;
}

/* --- rANS alone --------------------------------------------------------------------------------------------------- */

static void do_decode(gpu *g, void *user)
{
    GPU_TRY(g, decode(g->d, user, g->stream));
}

static void print_decode(gpu *g, const xkv_warp_table *tables, uint32_t count, bool last)
{
    chunks c = make_chunks(512);
    xkv_plug_stream *streams = malloc(count * sizeof *streams);
    size_t size = lay_chunks(&c, count, NULL, streams);
    uint8_t *bytes = malloc(size);
    uint32_t fault = 0;

    (void)lay_chunks(&c, count, bytes, streams);
    xkv_plug_decode o = {.packed = device_copy(g, bytes, size),
                         .streams = device_copy(g, streams, count * sizeof *streams),
                         .count = count,
                         .tables = tables,
                         .codes = device_copy(g, c.codes, c.components * sizeof *c.codes),
                         .coded = c.components,
                         .q = device_memory(g, (size_t)c.components * count * CHUNK * 2),
                         .stride = (uint64_t)count * CHUNK,
                         .fault = device_memory(g, 4)};
    double t = best_time(g, do_decode, &o), symbols = (double)c.components * count * CHUNK;
    GPU_TRY(g, copy(g->d, &fault, o.fault, 4, g->stream));
    gpu_wait(g);
    if (fault != 0) {
        fprintf(stderr, "decode found fault %u\n", fault);
        exit(1);
    }
    printf("    {\"streams\": %u, \"ms\": %.3f, \"gsymbols_s\": %.2f, \"bits_per_symbol\": %.2f}%s\n", count, t * 1e3,
           symbols / t * 1e-9, 8.0 * (double)size / symbols, last ? "" : ",");
    g->api->release(g->d, (void *)(uintptr_t)o.packed);
    g->api->release(g->d, (void *)(uintptr_t)o.streams);
    g->api->release(g->d, (void *)(uintptr_t)o.codes);
    g->api->release(g->d, o.q);
    g->api->release(g->d, o.fault);
    free(bytes);
    free(streams);
    free_chunks(&c);
}

/* --- Restores ----------------------------------------------------------------------------------------------------- */

target make_target(gpu *g, uint32_t tokens, uint32_t plane_count)
{
    target t = {.plane_count = plane_count, .width = plane_count * HEADS * DIMS};
    uint32_t *rows = malloc(tokens * 4ull), pages = tokens / PAGE;
    int32_t *positions = malloc(tokens * 4ull);
    xkv_plug_plane *planes = calloc(plane_count, sizeof *planes);
    double inv_freq[DIMS / 2];
    uint64_t seed = 3;

    for (uint32_t i = 0; i < pages; i++)
        rows[i * PAGE] = i;
    for (uint32_t i = pages; i-- > 1;) {
        uint32_t k = (uint32_t)(gpu_random(&seed) % (i + 1)), x = rows[i * PAGE];
        rows[i * PAGE] = rows[k * PAGE];
        rows[k * PAGE] = x;
    }
    for (uint32_t i = tokens; i-- > 0;)
        rows[i] = rows[i / PAGE * PAGE] * PAGE + i % PAGE;
    for (uint32_t i = 0; i < tokens; i++)
        positions[i] = (int32_t)i;
    for (int i = 0; i < DIMS / 2; i++)
        inv_freq[i] = pow(500000, -2.0 * i / DIMS);
    t.cache = device_memory(g, (size_t)tokens * t.width * 2);
    t.rows = device_copy(g, rows, tokens * 4ull);
    for (uint32_t i = 0; i < plane_count; i++) {
        xkv_view v = {
            t.cache + (size_t)i * tokens * HEADS * DIMS * 2, HEADS * DIMS * 2, DIMS * 2, 2, t.rows, XKV_BF16, 0};
        planes[i] = (xkv_plug_plane){v, HEADS,   DIMS, i * HEADS * DIMS, i % 2 ? 0 : DIMS / 2, 0, XKV_ROPE_HALF_SPLIT,
                                     0, XKV_BF16};
    }
    t.planes = device_copy(g, planes, plane_count * sizeof *planes);
    t.mean = device_memory(g, t.width * 4ull);
    t.angles = device_memory(g, (size_t)BATCH * DIMS * 4);
    t.positions = device_copy(g, positions, tokens * 4ull);
    t.inv_freq = device_copy(g, inv_freq, sizeof inv_freq);
    free(rows);
    free(positions);
    free(planes);
    return t;
}

void free_target(gpu *g, target *t)
{
    g->api->release(g->d, t->cache);
    g->api->release(g->d, t->rows);
    g->api->release(g->d, t->planes);
    g->api->release(g->d, t->mean);
    g->api->release(g->d, t->angles);
    g->api->release(g->d, t->positions);
    g->api->release(g->d, t->inv_freq);
}

typedef struct restore {
    target target;
    uint32_t tokens, components, groups;
    void *copies, *arrived[2], *used[2]; /* streams and events */
    uint8_t *pinned, *slot[2];
    size_t batch_bytes;
    xkv_plug_stream *streams;
    xkv_plug_decode decode;
    xkv_plug_expand expand;
    xkv_plug_split split;
    float *rows;
    bool upload, entropy, product, store; /* which stages run */
    bool fused;                           /* expanding, product and storing in one kernel */
} restore;

static void store_tile(gpu *g, const restore *r, uint32_t first, uint32_t t0)
{
    const target *t = &r->target;
    xkv_plug_store o = {r->rows,        t->width, t->mean,   t->angles + (size_t)t0 * DIMS, DIMS, t->planes,
                        t->plane_count, TILE,     first + t0};
    GPU_TRY(g, store(g->d, &o, g->stream));
}

static void fuse_batch(gpu *g, const restore *r, uint32_t first)
{
    const target *t = &r->target;
    xkv_plug_fused o = {.q = {r->decode.q, NULL},
                        .q_stride = {r->decode.stride, 0},
                        .rows = {r->expand.rows, NULL},
                        .count = {r->components, 0},
                        .high = r->split.high,
                        .low = r->split.low,
                        .width = t->width,
                        .alpha = 1 / 16.0f,
                        .heads = t->plane_count * HEADS,
                        .dim = DIMS,
                        .fault = r->decode.fault,
                        .store = {.mean = t->mean,
                                  .angles = t->angles,
                                  .angles_stride = DIMS,
                                  .planes = t->planes,
                                  .plane_count = t->plane_count,
                                  .tokens = BATCH,
                                  .first = first}};
    GPU_TRY(g, fused(g->d, &o, g->stream));
}

static void do_batch(gpu *g, restore *r, uint32_t first, uint32_t turn)
{
    const target *t = &r->target;
    xkv_plug_angles angles = {t->positions + first, t->inv_freq, BATCH, DIMS / 2, 1, t->angles, DIMS};
    uint32_t slot = turn % 2;

    if (r->upload) {
        GPU_TRY(g, follow(g->d, r->copies, r->used[slot]));
        GPU_TRY(g, copy(g->d, r->slot[slot], r->pinned, r->batch_bytes, r->copies));
        GPU_TRY(g, record(g->d, r->arrived[slot], r->copies));
        GPU_TRY(g, follow(g->d, g->stream, r->arrived[slot]));
    }
    r->decode.packed = r->slot[slot];
    if (r->entropy) {
        GPU_TRY(g, decode(g->d, &r->decode, g->stream));
        if (!r->fused)
            GPU_TRY(g, expand(g->d, &r->expand, g->stream));
    }
    if (r->upload)
        GPU_TRY(g, record(g->d, r->used[slot], g->stream));
    if (r->store)
        GPU_TRY(g, angles(g->d, &angles, g->stream));
    if (r->fused)
        fuse_batch(g, r, first);
    for (uint32_t t0 = 0; t0 < BATCH && !r->fused; t0 += TILE) {
        xkv_plug_gemm o = {(uint16_t *)r->expand.tile + t0,
                           r->split.high,
                           r->rows,
                           TILE,
                           t->width,
                           2 * r->components,
                           BATCH,
                           t->width,
                           t->width,
                           1 / 16.0f,
                           0,
                           1,
                           0};
        if (r->product)
            GPU_TRY(g, gemm(g->d, &o, g->stream));
        if (r->store)
            store_tile(g, r, first, t0);
    }
}

static void do_restore(gpu *g, void *user)
{
    restore *r = user;
    uint32_t turn = 0;

    for (uint32_t group = 0; group < r->groups; group++) {
        if (r->product)
            GPU_TRY(g, split(g->d, &r->split, g->stream));
        for (uint32_t first = 0; first < r->tokens; first += BATCH)
            do_batch(g, r, first, turn++);
    }
}

static restore make_restore(gpu *g, const xkv_warp_table *tables, const chunks *c, uint32_t tokens, uint32_t groups)
{
    restore r = {.tokens = tokens, .components = c->components, .groups = groups};
    uint32_t count = BATCH / CHUNK, *whole = malloc(c->components * 4ull);
    xkv_plug_stream *streams = malloc(count * sizeof *streams);
    size_t area = (size_t)c->components * WIDTH;
    float *basis = malloc(area * 4);
    uint64_t seed = 5;

    r.target = make_target(g, tokens, 2 * LAYERS);
    r.batch_bytes = lay_chunks(c, count, NULL, streams);
    r.pinned = pinned_memory(g, r.batch_bytes);
    (void)lay_chunks(c, count, r.pinned, streams);
    GPU_TRY(g, stream_create(g->d, &r.copies));
    for (int i = 0; i < 2; i++) {
        r.slot[i] = device_copy(g, r.pinned, r.batch_bytes);
        GPU_TRY(g, event_create(g->d, &r.arrived[i]));
        GPU_TRY(g, event_create(g->d, &r.used[i]));
    }
    for (uint32_t i = 0; i < c->components; i++)
        whole[i] = i << 2 | XKV_OPERAND_WHOLE;
    for (size_t i = 0; i < area; i++)
        basis[i] = (float)((double)(gpu_random(&seed) % 65536) / 32768 - 1) * 0.02f;
    r.decode = (xkv_plug_decode){NULL,
                                 device_copy(g, streams, count * sizeof *streams),
                                 count,
                                 tables,
                                 device_copy(g, c->codes, c->components * sizeof *c->codes),
                                 c->components,
                                 device_memory(g, (size_t)c->components * BATCH * 2),
                                 BATCH,
                                 device_memory(g, 4)};
    r.expand = (xkv_plug_expand){r.decode.q,    BATCH,         device_copy(g, whole, c->components * 4ull),
                                 c->components, BATCH,         device_memory(g, (size_t)c->components * BATCH * 4),
                                 BATCH,         c->components, 0,
                                 r.decode.fault};
    uint16_t *halves = device_memory(g, area * 4);
    r.split = (xkv_plug_split){
        device_copy(g, basis, area * 4), NULL, c->components, WIDTH, 0.1f, 16, halves, halves + area, 0};
    r.rows = device_memory(g, (size_t)TILE * WIDTH * 4);
    free(whole);
    free(streams);
    free(basis);
    return r;
}

static void free_restore(gpu *g, restore *r)
{
    free_target(g, &r->target);
    g->api->release_pinned(g->d, r->pinned);
    for (int i = 0; i < 2; i++) {
        g->api->release(g->d, r->slot[i]);
        g->api->event_destroy(g->d, r->arrived[i]);
        g->api->event_destroy(g->d, r->used[i]);
    }
    g->api->stream_destroy(g->d, r->copies);
    g->api->release(g->d, (void *)(uintptr_t)r->decode.streams);
    g->api->release(g->d, (void *)(uintptr_t)r->decode.codes);
    g->api->release(g->d, r->decode.q);
    g->api->release(g->d, r->decode.fault);
    g->api->release(g->d, (void *)(uintptr_t)r->expand.rows);
    g->api->release(g->d, r->expand.tile);
    g->api->release(g->d, (void *)(uintptr_t)r->split.rows);
    g->api->release(g->d, r->split.high);
    g->api->release(g->d, r->rows);
}

static double stage(gpu *g, restore *r, bool upload, bool entropy, bool product, bool store)
{
    r->upload = upload;
    r->entropy = entropy;
    r->product = product;
    r->store = store;
    return best_time(g, do_restore, r) * 1e3;
}

static void print_dict(gpu *g, const xkv_warp_table *tables)
{
    uint32_t tokens = quick ? BATCH : 65536, groups = quick ? 1 : 8;
    chunks c = make_chunks(quick ? 128 : 1536);
    restore r = make_restore(g, tables, &c, tokens, groups);
    double raw = 2.0 * tokens * WIDTH * groups, ms = stage(g, &r, true, true, true, true);
    double flops = 4.0 * tokens * WIDTH * c.components * groups;

    printf("  \"restore_dict\": {\"tokens\": %u, \"groups\": %u, \"width\": %u, \"components\": %u, \"ratio\": %.2f,\n",
           tokens, groups, WIDTH, c.components, 2.0 * BATCH * WIDTH / (double)r.batch_bytes);
    printf("    \"ms\": %.2f, \"raw_gb_s\": %.1f, \"gemm_tflops\": %.1f, \"of_gemm_ceiling\": %.3f,\n", ms,
           raw / ms * 1e-6, flops / ms * 1e-9, flops / (ms * 1e-3) / gemm_ceiling);
    printf("    \"alone_ms\": {\"upload\": %.2f, ", stage(g, &r, true, false, false, false));
    printf("\"decode_expand\": %.2f, ", stage(g, &r, false, true, false, false));
    printf("\"gemm\": %.2f, ", stage(g, &r, false, false, true, false));
    printf("\"rope_store\": %.2f}},\n", stage(g, &r, false, false, false, true));
    free_restore(g, &r);
    free_chunks(&c);
}

/* Where one kernel beats three: device_work.c decides by the number of operands. */
static void print_fused(gpu *g, const xkv_warp_table *tables)
{
    static const uint32_t counts[] = {64, 128, 256, 512, 1024};
    uint32_t count = quick ? 1 : 5;

    printf("  \"restore_fused\": [\n");
    for (uint32_t i = 0; i < count; i++) {
        chunks c = make_chunks(counts[i]);
        restore r = make_restore(g, tables, &c, BATCH, 1);
        double apart = stage(g, &r, false, true, true, true);
        r.fused = true;
        double fused = stage(g, &r, false, true, true, true);
        printf("    {\"components\": %u, \"apart_ms\": %.3f, \"fused_ms\": %.3f}%s\n", counts[i], apart, fused,
               i + 1 < count ? "," : "");
        free_restore(g, &r);
        free_chunks(&c);
    }
    printf("  ],\n");
}

/* --- 16-bit factors ----------------------------------------------------------------------------------------------- */

typedef struct factors {
    target target;
    uint32_t tokens, rank, count;
    void *copies, *arrived[2], *used[2];
    uint16_t *pinned, *slot[2], *components;
    float *rows;
} factors;

static void do_factors(gpu *g, void *user)
{
    const factors *f = user;
    uint32_t turn = 0;

    for (uint32_t i = 0; i < f->count; i++)
        for (uint32_t first = 0; first < f->tokens; first += BATCH, turn++) {
            const target *t = &f->target;
            xkv_plug_angles angles = {t->positions + first, t->inv_freq, BATCH, DIMS / 2, 1, t->angles, DIMS};
            uint32_t slot = turn % 2;
            GPU_TRY(g, follow(g->d, f->copies, f->used[slot]));
            GPU_TRY(g, copy(g->d, f->slot[slot], f->pinned, 2ull * BATCH * f->rank, f->copies));
            GPU_TRY(g, record(g->d, f->arrived[slot], f->copies));
            GPU_TRY(g, follow(g->d, g->stream, f->arrived[slot]));
            GPU_TRY(g, angles(g->d, &angles, g->stream));
            for (uint32_t t0 = 0; t0 < BATCH; t0 += TILE) {
                xkv_plug_gemm o = {f->slot[slot] + (size_t)t0 * f->rank,
                                   f->components,
                                   f->rows,
                                   TILE,
                                   t->width,
                                   f->rank,
                                   f->rank,
                                   t->width,
                                   t->width,
                                   1,
                                   0,
                                   0,
                                   0};
                xkv_plug_store s = {f->rows,        t->width, NULL,      t->angles + (size_t)t0 * DIMS, DIMS, t->planes,
                                    t->plane_count, TILE,     first + t0};
                GPU_TRY(g, gemm(g->d, &o, g->stream));
                o.b = f->components + (size_t)f->rank * t->width;
                o.beta = 1;
                GPU_TRY(g, gemm(g->d, &o, g->stream));
                GPU_TRY(g, store(g->d, &s, g->stream));
            }
            GPU_TRY(g, record(g->d, f->used[slot], g->stream));
        }
}

/* Milliseconds of `count` matrices of one rank. */
static double time_factors(gpu *g, uint32_t tokens, uint32_t rank, uint32_t count)
{
    factors f = {.tokens = tokens, .rank = rank, .count = count};

    f.target = make_target(g, tokens, LAYERS);
    f.pinned = pinned_memory(g, 2ull * BATCH * rank);
    GPU_TRY(g, stream_create(g->d, &f.copies));
    for (int i = 0; i < 2; i++) {
        f.slot[i] = device_memory(g, 2ull * BATCH * rank);
        GPU_TRY(g, event_create(g->d, &f.arrived[i]));
        GPU_TRY(g, event_create(g->d, &f.used[i]));
    }
    f.components = device_memory(g, 4ull * rank * f.target.width);
    f.rows = device_memory(g, 4ull * TILE * f.target.width);
    double ms = best_time(g, do_factors, &f) * 1e3;
    free_target(g, &f.target);
    g->api->release_pinned(g->d, f.pinned);
    for (int i = 0; i < 2; i++) {
        g->api->release(g->d, f.slot[i]);
        g->api->event_destroy(g->d, f.arrived[i]);
        g->api->event_destroy(g->d, f.used[i]);
    }
    g->api->stream_destroy(g->d, f.copies);
    g->api->release(g->d, f.components);
    g->api->release(g->d, f.rows);
    return ms;
}

static void print_factors(gpu *g)
{
    uint32_t tokens = quick ? BATCH : 65536, count = quick ? 1 : 8;
    double ms = time_factors(g, tokens, 512, count) + time_factors(g, tokens, 768, count);
    double raw = 2.0 * tokens * WIDTH * count;

    printf("  \"restore_svd16\": {\"tokens\": %u, \"ranks\": [512, 768], \"ms\": %.2f, \"raw_gb_s\": %.1f},\n", tokens,
           ms, raw / ms * 1e-6);
}

/* --- Attention ---------------------------------------------------------------------------------------------------- */

/* One layer of held rows, of one codec: K and V of HEADS heads, a tile for each 32 tokens of chunks of 256. */
typedef struct held {
    xkv_held_plane planes[2];
    xkv_held_tile *tiles[2];
    xkv_held_split *splits;
    uint32_t tokens, tile_count, split_count;
    uint64_t bytes; /* of coefficients or rows, K and V */
} held;

enum { SPLIT_TILES = 16, QUERY_HEADS = 32 };

/* Rows of bf16, or lines of 8 bits. */
static held make_held(gpu *g, uint32_t tokens, uint32_t slots, float *basis, const uint32_t *numbers)
{
    held h = {.tokens = tokens, .tile_count = tokens / XKV_HELD_TOKENS};
    uint32_t width = HEADS * DIMS, lines = slots > 0 ? slots : 1;
    size_t chunk = slots > 0 ? (size_t)slots * CHUNK : (size_t)width * CHUNK * 2, size = tokens / CHUNK * chunk;
    xkv_held_line *host_lines = malloc(lines * sizeof *host_lines);

    for (uint32_t i = 0; i < lines; i++)
        host_lines[i] = (xkv_held_line){(uint64_t)i * CHUNK, 0.01f, 1};
    const xkv_held_line *device_lines = device_copy(g, host_lines, lines * sizeof *host_lines);
    for (int part = 0; part < 2; part++) {
        uint8_t *data = device_memory(g, size);
        h.tiles[part] = malloc(h.tile_count * sizeof *h.tiles[part]);
        h.planes[part] = (xkv_held_plane){.form = slots > 0 ? XKV_HELD_LINES : XKV_HELD_ROWS,
                                          .dtype = XKV_BF16,
                                          .width = width,
                                          .slots = slots,
                                          .row = numbers,
                                          .line = numbers,
                                          .basis = basis,
                                          .ld = width,
                                          .pairs = part == 0 && slots > 0 ? DIMS / 2 : 0,
                                          .style = XKV_ROPE_HALF_SPLIT};
        for (uint32_t i = 0; i < h.tile_count; i++) {
            uint32_t token = i * XKV_HELD_TOKENS;
            h.tiles[part][i] = (xkv_held_tile){
                token, XKV_HELD_TOKENS, (uint32_t)part, token % CHUNK, data + token / CHUNK * chunk, device_lines};
        }
        h.tiles[part] = device_copy(g, h.tiles[part], h.tile_count * sizeof *h.tiles[part]);
        h.bytes += size;
    }
    h.split_count = h.tile_count / SPLIT_TILES;
    h.splits = malloc(h.split_count * sizeof *h.splits);
    for (uint32_t i = 0; i < h.split_count; i++)
        h.splits[i] = (xkv_held_split){i * SPLIT_TILES, (i + 1) * SPLIT_TILES, i * SPLIT_TILES * XKV_HELD_TOKENS,
                                       (i + 1) * SPLIT_TILES * XKV_HELD_TOKENS, 0};
    h.splits = device_copy(g, h.splits, h.split_count * sizeof *h.splits);
    free(host_lines);
    return h;
}

static void do_attend(gpu *g, void *user)
{
    GPU_TRY(g, attend(g->d, user, g->stream));
}

static void do_restore_held(gpu *g, void *user)
{
    const xkv_plug_restore *planes = user;

    for (int i = 0; i < 2; i++)
        GPU_TRY(g, restore(g->d, &planes[i], g->stream));
}

/* Seconds that the rows of K and V take, bf16 and dense, from what attention reads. */
static double time_restore(gpu *g, const xkv_plug_attend *a)
{
    xkv_plug_restore planes[2];

    for (int i = 0; i < 2; i++)
        planes[i] = (xkv_plug_restore){.planes = a->planes,
                                       .tiles = i == 0 ? a->keys[0] : a->values,
                                       .tile_count = a->tile_count,
                                       .angles = a->angles,
                                       .angles_stride = a->angles_stride,
                                       .to = {.view = {.data = device_memory(g, (size_t)a->rows * HEADS * DIMS * 2),
                                                       .token_stride = HEADS * DIMS * 2,
                                                       .head_stride = DIMS * 2,
                                                       .dim_stride = 2,
                                                       .dtype = XKV_BF16},
                                              .heads = HEADS,
                                              .head_dim = DIMS}};
    return best_time(g, do_restore_held, planes);
}

/* One query token of 32 heads over a layer. What is read is counted once, for all heads of K and V, though each of the
 * KV heads reads the coefficients of K. Memory is the process' until it ends. */
static void print_attend(gpu *g, const char *name, uint32_t tokens, uint32_t slots, bool last)
{
    const uint32_t group = QUERY_HEADS / HEADS, most = slots > 0 ? slots : 1, columns = slots + DIMS + 1;
    const uint32_t which[] = {1};
    uint32_t *numbers = malloc(most * sizeof *numbers);

    for (uint32_t i = 0; i < most; i++)
        numbers[i] = i;
    const uint32_t *there = device_copy(g, numbers, most * sizeof *numbers);
    held h = make_held(g, tokens, slots, device_memory(g, (size_t)most * HEADS * DIMS * 4), there);
    xkv_plug_attend o = {.planes = device_copy(g, h.planes, sizeof h.planes),
                         .keys = {h.tiles[0], NULL},
                         .values = h.tiles[1],
                         .value_planes = device_copy(g, which, sizeof which),
                         .splits = h.splits,
                         .angles = device_memory(g, (size_t)tokens * DIMS * 4),
                         .positions = device_memory(g, tokens * 4ull),
                         .angles_stride = DIMS,
                         .rows = tokens,
                         .tile_count = h.tile_count,
                         .split_count = h.split_count,
                         .kv_heads = HEADS,
                         .dim_k = {DIMS, 0},
                         .dim_v = DIMS,
                         .group = group,
                         .count = group,
                         .queries = device_memory(g, QUERY_HEADS * DIMS * 4),
                         .query_stride = QUERY_HEADS * DIMS * 4,
                         .head_stride = DIMS * 4,
                         .scale = 1,
                         .slots = slots,
                         .scores = device_memory(g, (size_t)QUERY_HEADS * tokens * 4),
                         .largest = device_memory(g, (size_t)QUERY_HEADS * h.split_count * 4),
                         .sums = device_memory(g, (size_t)QUERY_HEADS * h.split_count * 4),
                         .parts = device_memory(g, (size_t)QUERY_HEADS * h.split_count * columns * 4),
                         .merged = device_memory(g, (size_t)QUERY_HEADS * columns * 4),
                         .output = device_memory(g, QUERY_HEADS * DIMS * 4),
                         .lse = device_memory(g, QUERY_HEADS * 4)};
    double t = best_time(g, do_attend, &o), rows = time_restore(g, &o);
    double flops = 2.0 * tokens * slots * HEADS * DIMS; /* of rebuilding K, which is most of it */
    printf("    {\"held\": \"%s\", \"tokens\": %u, \"slots\": %u, \"mb\": %.1f, \"us\": %.1f, \"tb_s\": %.3f, "
           "\"tflops\": %.2f, \"restore_us\": %.1f, \"restore_raw_gb_s\": %.1f, \"restore_tflops\": %.2f}%s\n",
           name, tokens, slots, (double)h.bytes * 1e-6, t * 1e6, (double)h.bytes / t * 1e-12, flops / t * 1e-12,
           rows * 1e6, 4.0 * tokens * HEADS * DIMS / rows * 1e-9, 2 * flops / rows * 1e-12, last ? "" : ",");
    free(numbers);
}

static void print_attention(gpu *g)
{
    uint32_t tokens = quick ? 4096 : 65536;

    printf("  \"attention\": [\n");
    print_attend(g, "bf16 rows", tokens, 0, false);
    print_attend(g, "8-bit coefficients", tokens, 512, false);
    print_attend(g, "8-bit coefficients", tokens, 128, true);
    printf("  ],\n");
}

/* --- The document ------------------------------------------------------------------------------------------------- */

static void print_device(gpu *g)
{
    xkv_plug_properties p;

    g->api->properties(g->d, &p);
    printf("  \"device\": {\"name\": \"%s\", \"capability\": \"%u.%u\", \"driver\": %u, \"runtime\": %u, ", p.name,
           p.major, p.minor, p.driver, p.runtime);
    printf("\"memory\": %llu},\n", (unsigned long long)p.memory);
}

int main(int argc, char **argv)
{
    static xkv_warp_table host[XKV_BASE_TABLES];
    static const uint32_t counts[] = {64, 256, 1024, 2048};
    gpu g;

    quick = argc == 3 && strcmp(argv[1], "--quick") == 0;
    if (argc != (quick ? 3 : 2)) {
        fprintf(stderr, "usage: gpu_bench [--quick] PLUGIN\n");
        return 1;
    }
    g = gpu_start(argv[argc - 1]);
    xkv_device_tables(host);
    xkv_warp_table *tables = device_copy(&g, host, sizeof host);
    printf("{\n");
    print_device(&g);
    print_ceilings(&g);
    printf("  \"rans_decode\": [\n");
    for (size_t i = 0; i < (quick ? 1 : 4); i++)
        print_decode(&g, tables, counts[i], i == (quick ? 0 : 3));
    printf("  ],\n");
    print_dict(&g, tables);
    print_fused(&g, tables);
    print_attention(&g);
    print_factors(&g);
    print_pack(&g);
    print_svd(&g);
    printf("}\n");
    g.api->release(g.d, tables);
    gpu_end(&g);
    return 0;
}
