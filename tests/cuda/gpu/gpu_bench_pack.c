/* gpu_bench_pack.c - gpu_bench for packing: the device's work of codec/device_pack_group.c and device_pack_code.c, with
 * the choice of tables left out: tables are those of the deviations that the coefficients are given. */
#include "gpu_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct packing {
    target target;
    uint32_t tokens, rank, coded, groups;
    float *analysis, *synthesis, *rows, *weighed, *blocks, *y;
    uint16_t *basis_halves, *row_halves, *y_halves;
    int16_t *q;
    xkv_plug_stats *stats;
    uint32_t *windows, *counts, *listed, *begins, *fault;
    double *sums;
    xkv_plug_encode encode;
    bool analyze, measure, code; /* which stages run */
} packing;

void halve(gpu *g, const float *rows, uint64_t count, uint64_t width, uint64_t ld, uint16_t *to)
{
    xkv_plug_halve o = {rows, NULL, ld, count, width, 1, to, to + count * width};
    GPU_TRY(g, halve(g->d, &o, g->stream));
}

void multiply(gpu *g, xkv_plug_product o, const uint16_t *a, uint64_t a_size, const uint16_t *b, uint64_t b_size,
              bool rough)
{
    for (int i = 0; i < (rough ? 1 : 3); i++) {
        o.g.a = i == 1 ? a + a_size : a;
        o.g.b = i == 2 ? b + b_size : b;
        if (i > 0)
            o.g.beta = 1;
        GPU_TRY(g, product(g->d, &o, g->stream));
    }
}

static void gather(gpu *g, const packing *p, uint32_t first)
{
    const target *t = &p->target;
    xkv_plug_angles angles = {t->positions + first, t->inv_freq, TILE, DIMS / 2, 1, t->angles, DIMS};
    xkv_plug_gather o = {t->planes, t->plane_count, TILE, first, t->angles, DIMS, t->mean, p->rows, WIDTH};

    GPU_TRY(g, angles(g->d, &angles, g->stream));
    GPU_TRY(g, gather(g->d, &o, g->stream));
}

static void analyze_tile(gpu *g, const packing *p, uint32_t first)
{
    xkv_plug_product o = {
        {NULL, NULL, p->y, p->rank, TILE, WIDTH, WIDTH, WIDTH, TILE, 1, 0, 0, XKV_PRODUCT_BF16}, 1, 1, 0, 0, 0};
    xkv_plug_quantize q = {
        p->y, TILE, p->q + first, p->tokens, p->rank, TILE, 1, p->stats + first / TILE, p->tokens / TILE};

    gather(g, p, first);
    halve(g, p->rows, TILE, WIDTH, WIDTH, p->row_halves);
    multiply(g, o, p->basis_halves, (uint64_t)p->rank * WIDTH, p->row_halves, (uint64_t)TILE * WIDTH, false);
    GPU_TRY(g, quantize(g->d, &q, g->stream));
}

/* Sums of the planes, then in the metric. */
static void sum_tile(gpu *g, const packing *p, uint32_t first)
{
    uint32_t planes = p->target.plane_count;
    xkv_plug_sums o = {p->rows, NULL, p->begins, WIDTH, p->tokens, planes, TILE, p->sums + first};
    xkv_plug_product w = {
        {p->rows, p->blocks, p->weighed, TILE, DIMS, DIMS, WIDTH, DIMS, WIDTH, 1, 0, 0, XKV_PRODUCT_TF32},
        0,
        WIDTH / DIMS,
        DIMS,
        DIMS * DIMS,
        DIMS};

    GPU_TRY(g, sums(g->d, &o, g->stream));
    GPU_TRY(g, product(g->d, &w, g->stream));
    o.rows = p->weighed;
    o.begins = p->begins + planes + 1;
    o.count = 1;
    GPU_TRY(g, sums(g->d, &o, g->stream));
}

static void measure_tile(gpu *g, const packing *p, uint32_t first)
{
    xkv_plug_expand e = {p->q + first, p->tokens, p->listed, p->coded, TILE, p->y, TILE, 0, 1, p->fault};
    xkv_plug_product o = {
        {NULL, NULL, p->rows, TILE, WIDTH, p->coded, TILE, WIDTH, WIDTH, -1, 1, 1, XKV_PRODUCT_BF16}, 0, 1, 0, 0, 0};

    gather(g, p, first);
    sum_tile(g, p, first);
    GPU_TRY(g, expand(g->d, &e, g->stream));
    halve(g, p->y, p->coded, TILE, TILE, p->y_halves);
    multiply(g, o, p->y_halves, (uint64_t)p->coded * TILE, p->basis_halves, (uint64_t)p->coded * WIDTH, false);
    sum_tile(g, p, first);
}

static void count(gpu *g, const packing *p)
{
    uint64_t size = 4ull * p->rank * XKV_COUNT_SHIFTS * XKV_COUNT_BINS;
    xkv_plug_count o = {p->q, p->tokens, p->tokens, p->rank, p->windows, p->counts};

    GPU_TRY(g, clear(g->d, p->counts, size, g->stream));
    GPU_TRY(g, count_values(g->d, &o, g->stream));
}

static void do_pack(gpu *g, void *user)
{
    packing *p = user;

    for (uint32_t group = 0; group < p->groups; group++) {
        if (p->analyze) {
            halve(g, p->analysis, p->rank, WIDTH, WIDTH, p->basis_halves);
            for (uint32_t first = 0; first < p->tokens; first += TILE)
                analyze_tile(g, p, first);
            count(g, p);
        }
        if (p->measure) {
            halve(g, p->synthesis, p->coded, WIDTH, WIDTH, p->basis_halves);
            for (uint32_t first = 0; first < p->tokens; first += TILE)
                measure_tile(g, p, first);
        }
        if (p->code)
            GPU_TRY(g, encode(g->d, &p->encode, g->stream));
    }
}

/* Rows of normal deviates, component i times `scale` of it; rows that are as long as they are wide. */
static float *make_basis(gpu *g, uint32_t rank, bool scaled)
{
    float *basis = malloc(4ull * rank * WIDTH);
    uint64_t seed = 29;

    for (uint32_t i = 0; i < rank; i++)
        for (uint32_t c = 0; c < WIDTH; c++)
            basis[(size_t)i * WIDTH + c] = (float)((scaled ? deviation(i) : 1) * gpu_normal(&seed) / sqrt(WIDTH));
    float *there = device_copy(g, basis, 4ull * rank * WIDTH);
    free(basis);
    return there;
}

void fill_cache(gpu *g, const target *t, uint32_t tokens)
{
    const size_t size = 1u << 22, all = 2ull * tokens * t->width;
    uint16_t *piece = malloc(size);
    uint64_t seed = 31;

    for (size_t i = 0; i < size / 2; i++) {
        float x = (float)gpu_normal(&seed);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        piece[i] = (uint16_t)(bits >> 16);
    }
    for (size_t at = 0; at < all; at += size)
        GPU_TRY(g, copy(g->d, t->cache + at, piece, at + size <= all ? size : all - at, g->stream));
    gpu_wait(g);
    free(piece);
}

static void make_encode(gpu *g, packing *p)
{
    static xkv_warp_encode_table tables[XKV_BASE_TABLES];
    uint32_t chunks = p->tokens / CHUNK, *rows = malloc(4ull * p->coded), *operands = malloc(4ull * p->coded);
    xkv_warp_code *codes = malloc(p->coded * sizeof *codes);
    xkv_plug_span *spans = malloc(chunks * sizeof *spans);
    uint64_t room = 64 + 2ull * p->coded * CHUNK;

    xkv_device_encode_tables(tables);
    for (uint32_t i = 0; i < p->coded; i++) {
        rows[i] = i;
        operands[i] = i << 2 | XKV_OPERAND_WHOLE;
        codes[i] = xkv_device_code(table_for(deviation(i)));
    }
    for (uint32_t i = 0; i < chunks; i++)
        spans[i] = (xkv_plug_span){(uint64_t)i * CHUNK, CHUNK, 0};
    p->listed = device_copy(g, operands, 4ull * p->coded);
    p->encode = (xkv_plug_encode){.q = p->q,
                                  .stride = p->tokens,
                                  .rows = device_copy(g, rows, 4ull * p->coded),
                                  .tables = device_copy(g, tables, sizeof tables),
                                  .codes = device_copy(g, codes, p->coded * sizeof *codes),
                                  .coded = p->coded,
                                  .count = chunks,
                                  .spans = device_copy(g, spans, chunks * sizeof *spans),
                                  .words = device_memory(g, 2 * room * chunks),
                                  .room = room,
                                  .sizes = device_memory(g, 4ull * chunks)};
    free(rows);
    free(operands);
    free(codes);
    free(spans);
}

static packing make_packing(gpu *g, uint32_t tokens, uint32_t rank, uint32_t coded, uint32_t groups)
{
    packing p = {.tokens = tokens, .rank = rank, .coded = coded, .groups = groups};
    uint32_t begins[2 * LAYERS + 3], *windows = malloc(4ull * rank), first, shifts;

    p.target = make_target(g, tokens, 2 * LAYERS);
    fill_cache(g, &p.target, tokens);
    p.analysis = make_basis(g, rank, true);
    p.synthesis = make_basis(g, coded, false);
    p.blocks = make_basis(g, 2 * DIMS, false); /* as good as any: WIDTH / DIMS blocks of DIMS^2 */
    p.rows = device_memory(g, 4ull * TILE * WIDTH);
    p.weighed = device_memory(g, 4ull * TILE * WIDTH);
    p.y = device_memory(g, 4ull * rank * TILE);
    p.row_halves = device_memory(g, 4ull * TILE * WIDTH);
    p.basis_halves = device_memory(g, 4ull * rank * WIDTH);
    p.y_halves = device_memory(g, 4ull * rank * TILE);
    p.q = device_memory(g, 2ull * rank * tokens);
    p.stats = device_memory(g, (uint64_t)rank * (tokens / TILE) * sizeof *p.stats);
    p.counts = device_memory(g, 4ull * rank * XKV_COUNT_SHIFTS * XKV_COUNT_BINS);
    p.sums = device_memory(g, 8ull * (2 * LAYERS + 1) * tokens);
    p.fault = device_memory(g, 4);
    for (uint32_t i = 0; i < rank; i++) {
        xkv_table_window((uint64_t)(0.8 * deviation(i) * tokens), tokens, &first, &shifts);
        windows[i] = first | shifts << 8;
    }
    p.windows = device_copy(g, windows, 4ull * rank);
    for (uint32_t i = 0; i <= 2 * LAYERS; i++)
        begins[i] = i * HEADS * DIMS;
    begins[2 * LAYERS + 1] = 0;
    begins[2 * LAYERS + 2] = WIDTH;
    p.begins = device_copy(g, begins, sizeof begins);
    make_encode(g, &p);
    free(windows);
    return p;
}

static void free_packing(gpu *g, packing *p)
{
    void *const blocks[] = {p->analysis,
                            p->synthesis,
                            p->blocks,
                            p->rows,
                            p->weighed,
                            p->y,
                            p->row_halves,
                            p->basis_halves,
                            p->y_halves,
                            p->q,
                            p->stats,
                            p->counts,
                            p->sums,
                            p->fault,
                            p->windows,
                            p->begins,
                            p->listed,
                            (void *)(uintptr_t)p->encode.rows,
                            (void *)(uintptr_t)p->encode.tables,
                            (void *)(uintptr_t)p->encode.codes,
                            (void *)(uintptr_t)p->encode.spans,
                            p->encode.words,
                            p->encode.sizes};

    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        g->api->release(g->d, blocks[i]);
    free_target(g, &p->target);
}

static double stage(gpu *g, packing *p, bool analyze, bool measure, bool code)
{
    p->analyze = analyze;
    p->measure = measure;
    p->code = code;
    return best_time(g, do_pack, p) * 1e3;
}

void print_pack(gpu *g)
{
    uint32_t tokens = quick ? BATCH : 65536, groups = quick ? 1 : 8, rank = quick ? 256 : 2048;
    packing p = make_packing(g, tokens, rank, rank * 3 / 4, groups);
    double raw = 2.0 * tokens * WIDTH * groups, ms = stage(g, &p, true, true, true), code;
    double flops = 6.0 * tokens * WIDTH * (p.rank + p.coded) * groups, symbols = (double)tokens * p.coded * groups;
    uint32_t *sizes = malloc(4ull * p.encode.count);
    uint64_t bytes = 0;

    GPU_TRY(g, copy(g->d, sizes, p.encode.sizes, 4ull * p.encode.count, g->stream));
    gpu_wait(g);
    for (uint32_t i = 0; i < p.encode.count; i++)
        bytes += sizes[i];
    printf("  \"pack_dict\": {\"tokens\": %u, \"groups\": %u, \"width\": %u, \"rank\": %u, \"components\": %u, ",
           tokens, groups, WIDTH, p.rank, p.coded);
    printf("\"ratio\": %.2f,\n    \"ms\": %.2f, \"raw_gb_s\": %.1f, ", raw / groups / (double)bytes, ms,
           raw / ms * 1e-6);
    printf("\"gemm_tflops\": %.1f, \"of_gemm_ceiling\": %.3f,\n", flops / ms * 1e-9,
           flops / (ms * 1e-3) / gemm_ceiling);
    printf("    \"alone_ms\": {\"analyze_quantize_count\": %.2f, ", stage(g, &p, true, false, false));
    printf("\"measure\": %.2f, ", stage(g, &p, false, true, false));
    code = stage(g, &p, false, false, true);
    printf("\"encode\": %.2f}, \"encode_gsymbols_s\": %.2f},\n", code, symbols / code * 1e-6);
    free(sizes);
    free_packing(g, &p);
}
