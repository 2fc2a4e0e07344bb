/* gpu_check_graph.c - operations captured into a graph and launched twice give what they give on a stream; and what is
 * held is restored by a graph into whichever rows an array in the device's memory says at its launch. */
#include "gpu_check.h"

#include "attend_block.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* --- Graphs ------------------------------------------------------------------------------------------------------- */

/* Puts operations on the stream. */
typedef void (*put_fn)(gpu *g, const void *args);

#ifndef XKV_EMULATED

#include <cuda_runtime_api.h>

typedef struct graph {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
} graph;

static void must(cudaError_t e, const char *what)
{
    if (e == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
    exit(1);
}

static graph make_graph(gpu *g, put_fn put, const void *args)
{
    graph made;

    must(cudaStreamBeginCapture(g->stream, cudaStreamCaptureModeGlobal), "begin capture");
    put(g, args);
    must(cudaStreamEndCapture(g->stream, &made.graph), "end capture");
    must(cudaGraphInstantiate(&made.exec, made.graph, 0), "instantiate");
    return made;
}

static void launch(gpu *g, const graph *made)
{
    must(cudaGraphLaunch(made->exec, g->stream), "launch");
}

static void free_graph(const graph *made)
{
    must(cudaGraphExecDestroy(made->exec), "destroy");
    must(cudaGraphDestroy(made->graph), "destroy");
}

#else

/* The emulated device has none: the same operations once more. */
typedef struct graph {
    put_fn put;
    const void *args;
} graph;

static graph make_graph(gpu *g, put_fn put, const void *args)
{
    (void)g;
    return (graph){put, args};
}

static void launch(gpu *g, const graph *made)
{
    made->put(g, made->args);
}

static void free_graph(const graph *made)
{
    (void)made;
}

#endif

/* --- Products ----------------------------------------------------------------------------------------------------- */

typedef struct product {
    xkv_plug_expand e;
    xkv_plug_split s;
    xkv_plug_gemm m;
} product;

static void put_product(gpu *g, const void *args)
{
    const product *p = args;

    GPU_TRY(g, expand(g->d, &p->e, g->stream));
    GPU_TRY(g, split(g->d, &p->s, g->stream));
    GPU_TRY(g, gemm(g->d, &p->m, g->stream));
}

static void check_product(gpu *g)
{
    enum { M = 96, N = 128, K = 64 };
    static int16_t q[K * M];
    static uint32_t rows[K];
    static float components[K * N], plain[M * N], replayed[M * N];
    uint32_t fault = 0;
    uint64_t seed = 8;

    for (int i = 0; i < K * M; i++)
        q[i] = (int16_t)(gpu_random(&seed) % 200 - 100);
    for (uint32_t i = 0; i < K; i++)
        rows[i] = i << 2;
    for (int i = 0; i < K * N; i++)
        components[i] = (float)gpu_normal(&seed);
    gpu_block q_there = gpu_put(g, q, sizeof q), rows_there = gpu_put(g, rows, sizeof rows);
    gpu_block f32 = gpu_put(g, components, sizeof components), halves = gpu_alloc(g, 2 * K * N * 2);
    gpu_block tile = gpu_alloc(g, 2 * K * M * 2), word = gpu_put(g, &fault, 4), out = gpu_alloc(g, sizeof plain);
    product p = {{(void *)q_there.p, M, (void *)rows_there.p, K, M, tile.p, M, K, 0, (void *)word.p},
                 {(void *)f32.p, NULL, K, N, 1, 256, halves.p, halves.p + K * N * 2, 0},
                 {tile.p, halves.p, (void *)out.p, M, N, 2 * K, M, N, N, 1 / 256.0f, 0, 1, 0}};
    put_product(g, &p);
    gpu_get(g, &out, plain);
    graph made = make_graph(g, put_product, &p);
    GPU_TRY(g, clear(g->d, out.p, sizeof plain, g->stream));
    for (int i = 0; i < 2; i++)
        launch(g, &made);
    gpu_get(g, &out, replayed);
    check(memcmp(plain, replayed, sizeof plain) == 0, "a graph gives other rows than the stream", 0, 0, 0);
    free_graph(&made);
    release(g, &q_there, "graph: integers");
    release(g, &rows_there, "graph: rows");
    release(g, &f32, "graph: components");
    release(g, &halves, "graph: halves");
    release(g, &tile, "graph: tile");
    release(g, &word, "graph: fault");
    release(g, &out, "graph: out");
}

/* --- Restoring ---------------------------------------------------------------------------------------------------- */

enum { TOKENS = 70, TILES = 3, HEADS = 2, DIM = 48, WIDTH = HEADS * DIM, SLOTS = 37, PAIRS = 16, PLACES = 2 * TOKENS };

/* What the restore of a plane reads, and where it writes: f32, token by token. */
typedef struct held {
    xkv_held_plane plane;
    xkv_held_tile tiles[TILES];
    xkv_held_line lines[WIDTH];
    uint32_t row[SLOTS], line[WIDTH], map[TOKENS];
    float factor[WIDTH], basis[SLOTS * WIDTH], mean[WIDTH], angles[TOKENS * 2 * PAIRS];
    uint8_t data[2 * WIDTH * TOKENS + 16];
    float cache[PLACES * WIDTH];
} held;

/* Addresses in `there`, which is the structure itself or a copy of it. */
static void point(held *h, const held *there)
{
    for (uint32_t i = 0; i < TILES; i++) {
        h->tiles[i].data = there->data;
        h->tiles[i].lines = there->lines;
    }
    h->plane.row = there->row;
    h->plane.line = there->line;
    h->plane.factor = there->factor;
    h->plane.basis = there->basis;
    h->plane.mean = there->mean;
}

static xkv_plug_restore restore_of(held *there)
{
    return (xkv_plug_restore){.planes = &there->plane,
                              .tiles = there->tiles,
                              .tile_count = TILES,
                              .angles = there->angles,
                              .angles_stride = 2 * PAIRS,
                              .to = {.view = {.data = there->cache,
                                              .token_stride = 4 * WIDTH,
                                              .head_stride = 4 * DIM,
                                              .dim_stride = 4,
                                              .rows = there->map,
                                              .dtype = XKV_F32},
                                     .heads = HEADS,
                                     .head_dim = DIM}};
}

static void fill_held(held *h, uint32_t form, uint32_t style)
{
    uint64_t seed = form * 7 + style;
    uint32_t slots = form == XKV_HELD_FACTORS || form == XKV_HELD_LINES ? SLOTS : 0;

    h->plane = (xkv_held_plane){.form = form,
                                .dtype = XKV_F16,
                                .width = WIDTH,
                                .slots = slots,
                                .ld = WIDTH,
                                .pairs = PAIRS,
                                .offset = 8,
                                .style = style};
    for (uint32_t i = 0; i < TILES; i++)
        h->tiles[i] = (xkv_held_tile){
            .row = 32 * i, .count = i + 1 < TILES ? XKV_HELD_TOKENS : TOKENS % XKV_HELD_TOKENS, .from = 32 * i};
    for (uint32_t i = 0; i < WIDTH; i++) {
        h->lines[i] = (xkv_held_line){2ull * TOKENS * i, 0.01f, i % 3 ? 2 : 1};
        h->line[i] = i % 5 == 4 ? XKV_NO_SOURCE : i;
        h->factor[i] = (float)gpu_normal(&seed);
        h->mean[i] = (float)gpu_normal(&seed);
    }
    for (uint32_t i = 0; i < SLOTS; i++)
        h->row[i] = SLOTS - 1 - i;
    for (uint32_t i = 0; i < SLOTS * WIDTH; i++)
        h->basis[i] = (float)gpu_normal(&seed);
    for (uint32_t i = 0; i < TOKENS * 2 * PAIRS; i++)
        h->angles[i] = (float)cos((double)i);
    for (uint32_t i = 0; i < WIDTH * TOKENS; i++) {
        uint16_t half = xkv_f16_from_f32((float)gpu_normal(&seed));
        if (form >= XKV_HELD_LINES)
            half = (uint16_t)(gpu_random(&seed) % 512 - 256);
        memcpy(h->data + 2 * i, &half, 2);
    }
}

/* Pages of 10 tokens, in an order of their own, in the `part`-th half of the cache. */
static void fill_map(held *h, uint32_t part)
{
    for (uint32_t i = 0; i < TOKENS; i++)
        h->map[i] = part * TOKENS + (i / 10 * (3 + 2 * part) + 2) % 7 * 10 + i % 10;
}

static void restore_on_host(held *h)
{
    xkv_plug_restore o = restore_of(h);
    float *shared = malloc(xkv_restore_shared(&o) * sizeof *shared);

    for (uint32_t i = 0; i < TILES; i++)
        for (uint32_t head = 0; head < HEADS; head++)
            xkv_block_restore(&o, i, head, shared);
    free(shared);
}

static void put_restore(gpu *g, const void *args)
{
    GPU_TRY(g, restore(g->d, args, g->stream));
}

/* Untouched places are the same bits, since both sides began with them. */
static void check_restore_of(gpu *g, uint32_t form, uint32_t style)
{
    held *host = calloc(1, sizeof *host), *copy = calloc(1, sizeof *copy);
    double error = 0, energy = 0;

    fill_held(host, form, style);
    memcpy(copy, host, sizeof *copy);
    gpu_block there = gpu_alloc(g, sizeof *host);
    point(host, host);
    point(copy, (const held *)(const void *)there.p);
    GPU_TRY(g, copy(g->d, there.p, copy, sizeof *copy, g->stream));
    gpu_wait(g);
    xkv_plug_restore o = restore_of((held *)(void *)there.p);
    graph made = make_graph(g, put_restore, &o);
    for (uint32_t part = 0; part < 2; part++) {
        fill_map(host, part);
        restore_on_host(host);
        GPU_TRY(g, copy(g->d, (void *)o.to.view.rows, host->map, sizeof host->map, g->stream));
        launch(g, &made);
        gpu_wait(g);
    }
    gpu_get(g, &there, copy);
    for (uint32_t i = 0; i < PLACES * WIDTH; i++) {
        error += ((double)copy->cache[i] - (double)host->cache[i]) * ((double)copy->cache[i] - (double)host->cache[i]);
        energy += (double)host->cache[i] * (double)host->cache[i];
    }
    check(error <= 1e-12 * energy && energy > 0, "a graph restores other rows: form %u, style %u", form, style, 0);
    free_graph(&made);
    release(g, &there, "restore wrote beside what it was given");
    free(host);
    free(copy);
}

void check_graphs(gpu *g)
{
    check_product(g);
    for (uint32_t form = XKV_HELD_ROWS; form <= XKV_HELD_DIAGONAL; form++)
        for (uint32_t style = 0; style < 2; style++)
            check_restore_of(g, form, style);
}
