/* gpu_check.c - the operations of libxkv_cuda.so on a GPU against the same elements and lanes run on the CPU.
 *     gpu_check PLUGIN
 * Integers, operands, views and byte planes must be the same bits; products agree to 1e-7 of their energy; cosines to
 * one unit of f32. All memory has guards. Exit code: 0 passed, 1 failed, 77 no device. */
#include "gpu_check.h"

#include "elements.h"
#include "warp_sum.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static int failures, checks;

static size_t size_of(uint32_t dtype)
{
    return dtype == XKV_F32 ? 4 : 2;
}

XKV_PRINTF(2, 0) void check(bool good, const char *format, uint32_t a, uint32_t b, uint32_t c)
{
    checks++;
    if (good)
        return;
    failures++;
    printf("FAILED: ");
    printf(format, a, b, c);
    printf("\n");
}

void release(gpu *g, gpu_block *b, const char *what)
{
    check(gpu_free(g, b), what, 0, 0, 0);
}

/* --- Checksums ---------------------------------------------------------------------------------------------------- */

enum { SUMS = 64, MOST_SUMMED = 4096 };

/* Streams of every length around stripes and blocks, some empty; in all rounds but the first one of them is damaged. */
static void check_verify(gpu *g)
{
    static uint8_t bytes[SUMS * MOST_SUMMED];
    xkv_plug_stream streams[SUMS];
    uint64_t seed = 4;

    for (uint32_t round = 0; round < 40; round++) {
        uint32_t fault = 0, damaged = (uint32_t)(gpu_random(&seed) % SUMS);
        for (uint32_t i = 0; i < sizeof bytes; i++)
            bytes[i] = (uint8_t)gpu_random(&seed);
        for (uint32_t i = 0; i < SUMS; i++) {
            uint64_t at = (uint64_t)i * MOST_SUMMED;
            uint32_t size = XKV_SUM_SHORT + 1 + (uint32_t)(gpu_random(&seed) % (MOST_SUMMED - XKV_SUM_SHORT));
            streams[i] = (xkv_plug_stream){at, size, 0, 0, xkv_warp_sum_of(bytes + at, size)};
            if (i != damaged && i % 16 == 3)
                streams[i].size = 0;
        }
        if (round > 0)
            bytes[streams[damaged].offset + gpu_random(&seed) % streams[damaged].size] ^= 1;
        gpu_block there = gpu_put(g, bytes, sizeof bytes), list = gpu_put(g, streams, sizeof streams);
        gpu_block word = gpu_put(g, &fault, sizeof fault);
        xkv_plug_verify o = {there.p, (const void *)list.p, SUMS, (void *)word.p};
        GPU_TRY(g, verify(g->d, &o, g->stream));
        gpu_get(g, &word, &fault);
        check(fault == (round > 0 ? XKV_WARP_BAD_SUM : 0), "verify %u: fault %u", round, fault, 0);
        release(g, &there, "verify wrote to the streams' bytes");
        release(g, &list, "verify wrote beside the streams");
        release(g, &word, "verify wrote beside the fault");
    }
}

/* --- rANS --------------------------------------------------------------------------------------------------------- */

enum { STREAMS = 40, COMPONENTS = 23, STRIDE = STREAMS * 260 };

typedef struct packed {
    xkv_plug_stream streams[STREAMS];
    uint8_t tables[COMPONENTS];
    xkv_warp_code codes[COMPONENTS];
    int16_t *q;
    uint8_t *bytes;
    size_t size;
} packed;

static packed make_packed(uint64_t *seed)
{
    static const uint32_t lengths[] = {1, 2, 31, 32, 33, 63, 64, 65, 128, 255, 256, 257};
    packed p = {.q = calloc(COMPONENTS * STRIDE, 2), .bytes = calloc(1, STREAMS * (COMPONENTS * 260 * 4 + 256))};
    uint64_t column = 0;

    for (uint32_t i = 0; i < COMPONENTS; i++) {
        p.tables[i] = (uint8_t)(1 + gpu_random(seed) % XKV_TABLE_MAX);
        if (i % 5 == 4) /* runs of one base table */
            p.tables[i] = p.tables[i - 1];
        p.codes[i] = xkv_device_code(p.tables[i]);
    }
    for (uint32_t s = 0; s < STREAMS; s++) {
        uint32_t tokens = lengths[s % 12];
        for (uint32_t i = 0; i < COMPONENTS; i++)
            for (uint32_t t = 0; t < tokens; t++)
                p.q[i * STRIDE + column + t] = gpu_value(p.tables[i], seed);
        size_t size = gpu_encode(p.q + column, STRIDE, tokens, p.tables, COMPONENTS, p.bytes + p.size);
        p.streams[s] = (xkv_plug_stream){p.size, (uint32_t)size, tokens, column, 0};
        p.size += (size + 3) / 4 * 4;
        column += tokens;
    }
    return p;
}

/* Decode on the device: values and fault. */
static uint32_t device_decode(gpu *g, const packed *p, const gpu_block *tables, int16_t *q)
{
    uint32_t fault = 0;
    gpu_block bytes = gpu_put(g, p->bytes, p->size), streams = gpu_put(g, p->streams, sizeof p->streams);
    gpu_block codes = gpu_put(g, p->codes, sizeof p->codes), word = gpu_put(g, &fault, sizeof fault);
    gpu_block out = gpu_put(g, q, COMPONENTS * STRIDE * 2);
    xkv_plug_decode o = {bytes.p,    (const void *)streams.p, STREAMS, (const void *)tables->p, (const void *)codes.p,
                         COMPONENTS, (void *)out.p,           STRIDE,  (void *)word.p};

    GPU_TRY(g, decode(g->d, &o, g->stream));
    gpu_get(g, &word, &fault);
    gpu_get(g, &out, q);
    release(g, &bytes, "decode wrote in front of or behind the packed bytes");
    release(g, &streams, "decode wrote beside the streams");
    release(g, &codes, "decode wrote beside the codes");
    release(g, &word, "decode wrote beside the fault");
    release(g, &out, "decode wrote beside the integers");
    return fault;
}

static void check_decode(gpu *g)
{
    static xkv_warp_table host_tables[XKV_BASE_TABLES];
    uint64_t seed = 1;
    int16_t *q = malloc(COMPONENTS * STRIDE * 2), *expected = malloc(COMPONENTS * STRIDE * 2);

    xkv_device_tables(host_tables);
    gpu_block tables = gpu_put(g, host_tables, sizeof host_tables);
    for (uint32_t round = 0; round < 40; round++) {
        packed p = make_packed(&seed);
        uint32_t wrong = 0;
        if (round > 0) { /* damage one stream: a bit, or its length */
            xkv_plug_stream *s = &p.streams[round];
            if (round % 2)
                p.bytes[s->offset + gpu_random(&seed) % s->size] ^= (uint8_t)(1u << gpu_random(&seed) % 8);
            else
                s->size = (uint32_t)(gpu_random(&seed) % (s->size + 1));
        }
        memset(q, 0x11, COMPONENTS * STRIDE * 2);
        memset(expected, 0x11, COMPONENTS * STRIDE * 2);
        for (uint32_t s = 0; s < STREAMS; s++)
            wrong |= gpu_decode(host_tables, p.bytes + p.streams[s].offset, p.streams[s].size, p.streams[s].tokens,
                                p.tables, COMPONENTS, expected + p.streams[s].column, STRIDE);
        check(device_decode(g, &p, &tables, q) == wrong, "decode %u: another fault than on the CPU", round, 0, 0);
        check(memcmp(q, expected, COMPONENTS * STRIDE * 2) == 0, "decode %u: other integers than on the CPU", round, 0,
              0);
        if (round == 0)
            for (uint32_t i = 0; i < COMPONENTS; i++)
                for (uint32_t s = 0; s < STREAMS; s++)
                    check(memcmp(q + i * STRIDE + p.streams[s].column, p.q + i * STRIDE + p.streams[s].column,
                                 p.streams[s].tokens * 2ull) == 0,
                          "decode: component %u of stream %u is not what was encoded", i, s, 0);
        free(p.q);
        free(p.bytes);
    }
    release(g, &tables, "decode wrote beside the tables");
    free(q);
    free(expected);
}

/* --- Operands ----------------------------------------------------------------------------------------------------- */

static void check_expand_of(gpu *g, uint32_t count, uint32_t tokens, uint32_t exact)
{
    uint64_t seed = count * 1000 + tokens, stride = tokens + 5, q_stride = tokens + 3;
    size_t size = 2 * count * stride * 4;
    int16_t *q = malloc(count * q_stride * 2);
    uint32_t *rows = malloc(count * 4), fault = 0, host_fault = 0;
    uint8_t *tile = malloc(size), *expected = malloc(size);

    for (uint32_t i = 0; i < count * q_stride; i++)
        q[i] = (int16_t)(gpu_random(&seed) % (i % 7 ? 4097 : 65536) - (i % 7 ? 2048 : 32768));
    for (uint32_t i = 0; i < count; i++)
        rows[i] = (uint32_t)(gpu_random(&seed) % count << 2 | gpu_random(&seed) % 3);
    memset(expected, 0x5a, size);
    gpu_block q_there = gpu_put(g, q, count * q_stride * 2), rows_there = gpu_put(g, rows, count * 4);
    gpu_block word = gpu_put(g, &fault, 4), there = gpu_put(g, expected, size);
    xkv_plug_expand host = {q, q_stride, rows, count, tokens, expected, stride, exact ? 0 : count, exact, &host_fault};
    xkv_plug_expand o = host;
    o.q = (const void *)q_there.p;
    o.rows = (const void *)rows_there.p;
    o.tile = there.p;
    o.fault = (void *)word.p;
    GPU_TRY(g, expand(g->d, &o, g->stream));
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t t = 0; t < tokens; t++)
            host_fault |= xkv_expand_element(&host, i, t);
    gpu_get(g, &there, tile);
    gpu_get(g, &word, &fault);
    check(memcmp(tile, expected, size) == 0, "expand %u x %u, exact %u: other operands", count, tokens, exact);
    check(fault == host_fault, "expand %u x %u, exact %u: another fault", count, tokens, exact);
    release(g, &q_there, "expand wrote beside the integers");
    release(g, &rows_there, "expand wrote beside the rows");
    release(g, &word, "expand wrote beside the fault");
    release(g, &there, "expand wrote beside the tile");
    free(q);
    free(rows);
    free(tile);
    free(expected);
}

static void check_split_of(gpu *g, uint32_t count, uint32_t width, uint32_t exact)
{
    uint64_t seed = count * 77 + width;
    size_t size = (size_t)count * width;
    float *rows = malloc(size * 4);
    uint32_t *index = malloc(count * 4);
    uint8_t *found = malloc(size * 4), *expected = malloc(size * 4);

    for (size_t i = 0; i < size; i++)
        rows[i] = (float)(gpu_normal(&seed) * exp2(-(double)(gpu_random(&seed) % 30)));
    for (uint32_t i = 0; i < count; i++)
        index[i] = (uint32_t)(gpu_random(&seed) % count);
    gpu_block rows_there = gpu_put(g, rows, size * 4), index_there = gpu_put(g, index, count * 4);
    gpu_block there = gpu_alloc(g, size * 4);
    xkv_plug_split host = {rows, index, count, width, 0.37f, 4096, expected, expected + size * 2, exact}, o = host;
    o.rows = (const void *)rows_there.p;
    o.index = (const void *)index_there.p;
    o.high = there.p;
    o.low = there.p + size * 2;
    GPU_TRY(g, split(g->d, &o, g->stream));
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t c = 0; c < width; c++)
            xkv_split_element(&host, i, c);
    gpu_get(g, &there, found);
    check(memcmp(found, expected, size * 4) == 0, "split %u x %u, exact %u: other halves", count, width, exact);
    release(g, &rows_there, "split wrote beside the rows");
    release(g, &index_there, "split wrote beside the index");
    release(g, &there, "split wrote beside the halves");
    free(rows);
    free(index);
    free(found);
    free(expected);
}

static void check_spread_of(gpu *g, uint32_t width, uint32_t tokens)
{
    uint64_t seed = width * 13 + tokens, stride = tokens + 7;
    size_t size = (size_t)tokens * width * 4;
    int16_t *q = malloc(width * stride * 2);
    uint32_t *source = malloc(width * 4ull);
    float *factor = malloc(width * 4ull), *found = malloc(size), *expected = malloc(size);

    for (size_t i = 0; i < width * stride; i++)
        q[i] = (int16_t)gpu_random(&seed);
    for (uint32_t i = 0; i < width; i++) {
        source[i] = gpu_random(&seed) % 5 ? (uint32_t)(gpu_random(&seed) % width) : XKV_NO_SOURCE;
        factor[i] = (float)gpu_normal(&seed);
    }
    gpu_block q_there = gpu_put(g, q, width * stride * 2), source_there = gpu_put(g, source, width * 4ull);
    gpu_block factor_there = gpu_put(g, factor, width * 4ull), there = gpu_alloc(g, size);
    xkv_plug_spread host = {q, stride, source, factor, width, tokens, expected}, o = host;
    o.q = (const void *)q_there.p;
    o.source = (const void *)source_there.p;
    o.factor = (const void *)factor_there.p;
    o.rows = (void *)there.p;
    GPU_TRY(g, spread(g->d, &o, g->stream));
    for (uint32_t t = 0; t < tokens; t++)
        for (uint32_t i = 0; i < width; i++)
            xkv_spread_element(&host, t, i);
    gpu_get(g, &there, found);
    check(memcmp(found, expected, size) == 0, "spread %u x %u: other rows", tokens, width, 0);
    release(g, &q_there, "spread wrote beside the integers");
    release(g, &source_there, "spread wrote beside the sources");
    release(g, &factor_there, "spread wrote beside the factors");
    release(g, &there, "spread wrote beside the rows");
    free(q);
    free(source);
    free(factor);
    free(found);
    free(expected);
}

static void check_operands(gpu *g)
{
    static const uint32_t sizes[] = {1, 31, 32, 33, 255, 257, 600};

    for (uint32_t exact = 0; exact < 2; exact++)
        for (int i = 0; i < 7; i++) {
            check_expand_of(g, sizes[i], sizes[6 - i], exact);
            check_split_of(g, sizes[i], sizes[6 - i], exact);
            check_spread_of(g, sizes[i], sizes[6 - i]);
        }
}

/* --- Rows --------------------------------------------------------------------------------------------------------- */

static void check_angles(gpu *g)
{
    enum { TOKENS = 300, PAIRS = 48, WIDE = 2 * PAIRS + 6 };
    static float found[TOKENS * WIDE], expected[TOKENS * WIDE];
    int32_t positions[TOKENS];
    double inv_freq[PAIRS], most = 0;
    uint64_t seed = 3;

    for (int i = 0; i < TOKENS; i++)
        positions[i] = i < 100 ? i : (int32_t)(gpu_random(&seed) % (i < 200 ? 131072 : 2147483647u));
    for (int i = 0; i < PAIRS; i++)
        inv_freq[i] = pow(500000, -i / (double)PAIRS);
    gpu_block p = gpu_put(g, positions, sizeof positions), f = gpu_put(g, inv_freq, sizeof inv_freq);
    gpu_block there = gpu_alloc(g, sizeof found);
    xkv_plug_angles host = {positions, inv_freq, TOKENS, PAIRS, 1.1, expected, WIDE}, o = host;
    o.positions = (const void *)p.p;
    o.inv_freq = (const void *)f.p;
    o.out = (void *)there.p;
    GPU_TRY(g, angles(g->d, &o, g->stream));
    gpu_get(g, &there, found);
    for (uint32_t t = 0; t < TOKENS; t++)
        for (uint32_t i = 0; i < PAIRS; i++) {
            xkv_angle_element(&host, t, i);
            for (uint32_t k = i; k < 2 * PAIRS; k += PAIRS)
                most = fmax(most, fabs((double)found[t * WIDE + k] - (double)expected[t * WIDE + k]));
        }
    check(most <= 1.2e-7, "angles: cosines are off", 0, 0, 0);
    release(g, &p, "angles wrote beside the positions");
    release(g, &f, "angles wrote beside the frequencies");
    release(g, &there, "angles wrote beside the cosines");
}

enum { ROWS = 40, HEADS = 3, DIMS = 48, WIDTH = 2 * HEADS * DIMS + 5, PLANES = 2 };
enum { CACHE = 2 * ROWS * HEADS * DIMS * 4 };

/* Token-major, head-major, transposed, backwards. */
static size_t strides_of(xkv_view *v, uint32_t layout, int64_t e)
{
    const int64_t s[4][3] = {{HEADS * DIMS * e, DIMS * e, e},
                             {DIMS * e, ROWS * DIMS * e, e},
                             {e, ROWS * DIMS * e, ROWS * e},
                             {-2 * HEADS * DIMS * e, 2 * DIMS * e, 2 * e}};

    v->token_stride = s[layout][0];
    v->head_stride = s[layout][1];
    v->dim_stride = s[layout][2];
    return layout == 3 ? (size_t)((ROWS - 1) * 2 * HEADS * DIMS * e) : 0;
}

static void check_store_of(gpu *g, uint32_t layout, uint32_t dtype, uint32_t style)
{
    static float rows[ROWS * WIDTH], mean[WIDTH], cos_sin[ROWS * DIMS];
    static uint8_t host[PLANES][CACHE], found[CACHE];
    uint32_t map[ROWS];
    uint64_t seed = layout * 9 + dtype * 3 + style;
    gpu_block cache[PLANES];
    xkv_plug_plane host_planes[PLANES], planes[PLANES];

    for (size_t i = 0; i < ROWS * WIDTH; i++)
        rows[i] = (float)gpu_normal(&seed);
    for (size_t i = 0; i < WIDTH; i++)
        mean[i] = (float)gpu_normal(&seed);
    for (size_t i = 0; i < ROWS * DIMS; i++)
        cos_sin[i] = (float)cos((double)i);
    for (uint32_t i = 0; i < ROWS; i++)
        map[i] = (i * 7) % ROWS;
    gpu_block map_there = gpu_put(g, map, sizeof map);
    memset(host, 0x5a, sizeof host);
    for (uint32_t i = 0; i < PLANES; i++) {
        xkv_plug_plane *p = &host_planes[i];
        *p = (xkv_plug_plane){{.dtype = dtype, .rows = map}, HEADS, DIMS, 2 + i * HEADS * DIMS, 0, 0, 0, 0, XKV_F32};
        size_t at = strides_of(&p->view, layout, (int64_t)size_of(dtype));
        if (i == 0 && style < 2) {
            p->pairs = 16;
            p->offset = 8;
            p->style = style;
        }
        cache[i] = gpu_put(g, host[i], CACHE);
        p->view.data = host[i] + at;
        planes[i] = *p;
        planes[i].view.data = cache[i].p + at;
        planes[i].view.rows = (const void *)map_there.p;
    }
    gpu_block rows_there = gpu_put(g, rows, sizeof rows), mean_there = gpu_put(g, mean, sizeof mean);
    gpu_block angles_there = gpu_put(g, cos_sin, sizeof cos_sin), planes_there = gpu_put(g, planes, sizeof planes);
    xkv_plug_store o = {rows, WIDTH, style == 1 ? NULL : mean, cos_sin, DIMS, host_planes, PLANES, ROWS - 3, 2};
    for (uint32_t i = 0; i < PLANES; i++)
        for (uint32_t t = 0; t < o.tokens; t++)
            for (uint32_t item = 0; item < xkv_items_of(&host_planes[i], HEADS); item++)
                xkv_store_item(&o, &host_planes[i], t, item);
    o.rows = (const void *)rows_there.p;
    o.mean = o.mean ? (const void *)mean_there.p : NULL;
    o.angles = (const void *)angles_there.p;
    o.planes = (const void *)planes_there.p;
    GPU_TRY(g, store(g->d, &o, g->stream));
    for (uint32_t i = 0; i < PLANES; i++) {
        gpu_get(g, &cache[i], found);
        check(memcmp(found, host[i], CACHE) == 0, "store, layout %u, dtype %u, style %u: other bytes", layout, dtype,
              style);
        release(g, &cache[i], "store wrote beside the cache");
    }
    release(g, &rows_there, "store wrote beside the rows");
    release(g, &mean_there, "store wrote beside the mean");
    release(g, &angles_there, "store wrote beside the angles");
    release(g, &planes_there, "store wrote beside the planes");
    release(g, &map_there, "store wrote beside the map");
}

static void check_move_of(gpu *g, uint32_t layout, uint32_t dtype)
{
    static uint8_t host[CACHE], found[CACHE];
    size_t e = size_of(dtype), row = WIDTH * e;
    uint64_t seed = layout * 5 + dtype;
    uint8_t *pinned;

    GPU_TRY(g, alloc_pinned(g->d, ROWS * row, (void **)&pinned));
    for (size_t i = 0; i < ROWS * row; i++)
        pinned[i] = (uint8_t)gpu_random(&seed);
    memset(host, 0x5a, sizeof host);
    gpu_block cache = gpu_put(g, host, CACHE);
    xkv_plug_move o = {pinned, row, 3 * e, {.dtype = dtype}, HEADS, DIMS, ROWS - 1, 1};
    size_t at = strides_of(&o.view, layout, (int64_t)e);
    o.view.data = host + at;
    for (uint32_t t = 0; t < o.tokens; t++)
        for (uint32_t i = 0; i < HEADS * DIMS; i++)
            xkv_move_element(&o, t, i);
    o.view.data = cache.p + at;
    GPU_TRY(g, move(g->d, &o, g->stream));
    gpu_get(g, &cache, found);
    check(memcmp(found, host, CACHE) == 0, "move, layout %u, dtype %u: other bytes", layout, dtype, 0);
    release(g, &cache, "move wrote beside the cache");
    g->api->release_pinned(g->d, pinned);
}

static void check_join_of(gpu *g, uint32_t rows, uint32_t cols, uint32_t elem)
{
    size_t size = (size_t)rows * cols * elem;
    uint8_t *planes = malloc(size), *found = malloc(size), *expected = malloc(size);
    uint64_t seed = rows + cols;

    for (size_t i = 0; i < size; i++)
        planes[i] = (uint8_t)gpu_random(&seed);
    gpu_block from = gpu_put(g, planes, size), to = gpu_alloc(g, size);
    xkv_plug_join o = {planes, rows, cols, elem, expected};
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t c = 0; c < cols; c++)
            xkv_join_element(&o, r, c);
    o.planes = from.p;
    o.out = to.p;
    GPU_TRY(g, join(g->d, &o, g->stream));
    gpu_get(g, &to, found);
    check(memcmp(found, expected, size) == 0, "join %u x %u of %u bytes: other bytes", rows, cols, elem);
    release(g, &from, "join wrote beside the planes");
    release(g, &to, "join wrote beside the elements");
    free(planes);
    free(found);
    free(expected);
}

static void check_rows(gpu *g)
{
    for (uint32_t layout = 0; layout < 4; layout++)
        for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++) {
            for (uint32_t style = 0; style < 3; style++)
                check_store_of(g, layout, dtype, style);
            check_move_of(g, layout, dtype);
        }
    check_join_of(g, 1, 1, 2);
    check_join_of(g, 33, 71, 2);
    check_join_of(g, 256, 512, 2);
    check_join_of(g, 70, 31, 4);
}

int main(int argc, char **argv)
{
    gpu g;

    if (argc != 2) {
        fprintf(stderr, "usage: gpu_check PLUGIN\n");
        return 1;
    }
    g = gpu_start(argv[1]);
    check_verify(&g);
    check_decode(&g);
    check_operands(&g);
    check_products(&g);
    check_angles(&g);
    check_rows(&g);
    check_pack(&g);
    check_svd(&g);
    check_graphs(&g);
    gpu_end(&g);
    printf("%d checks, %d failed\n", checks, failures);
    return failures > 0;
}
