/* gpu_check_pack.c - gpu_check for the operations of plugin_pack.h. Rows, halves, integers, counts and streams must be
 * the CPU's bits; sums agree to 1e-12. */
#include "gpu_check.h"
#include "pack_elements.h"
#include "warp_pack.h"

#include <math.h>
#include <stdlib.h>

enum { HEADS = 3, DIMS = 22, ROW = HEADS * DIMS, TOKENS = 37, PLANES = 2, LD = PLANES * ROW + 5 };
enum { CACHE = TOKENS * ROW * 4 };

/* --- Rows --------------------------------------------------------------------------------------------------------- */

/* Two planes, one of them rotated, with rows from last to first. */
static void make_planes(xkv_plug_plane *planes, uint8_t *data, const uint32_t *rows, uint32_t dtype, uint32_t style)
{
    int64_t e = dtype == XKV_F32 ? 4 : 2;

    for (uint32_t i = 0; i < PLANES; i++) {
        xkv_view v = {data + i * CACHE, ROW * e, DIMS * e, e, rows, dtype, 0};
        if (i == 1) /* transposed */
            v = (xkv_view){data + CACHE, e, TOKENS * DIMS * e, TOKENS * e, NULL, dtype, 0};
        planes[i] = (xkv_plug_plane){v, HEADS, DIMS, i * ROW + 2, i == 0 ? 8 : 0, 3, style, 1, 0};
    }
}

static void fill_cache(uint8_t *data, uint32_t dtype, uint64_t *seed)
{
    for (size_t i = 0; i < PLANES * CACHE / 4; i++) {
        float x = (float)gpu_normal(seed);
        if (dtype == XKV_F32)
            ((float *)(void *)data)[i] = x;
        else
            for (size_t k = 2 * i; k < 2 * i + 2; k++)
                ((uint16_t *)(void *)data)[k] = dtype == XKV_F16 ? xkv_f16_from_f32(x) : xkv_bf16_from_f32(x);
    }
}

static void check_gather_of(gpu *g, uint32_t dtype, uint32_t style, bool with_mean)
{
    static _Alignas(16) uint8_t data[PLANES * CACHE];
    static float angles[TOKENS * 20], mean[LD], expected[TOKENS * LD], found[TOKENS * LD];
    uint64_t seed = dtype * 10 + style;
    uint32_t rows[TOKENS];
    xkv_plug_plane planes[PLANES], there[PLANES];

    fill_cache(data, dtype, &seed);
    for (uint32_t i = 0; i < TOKENS; i++)
        rows[i] = TOKENS - 1 - i;
    for (uint32_t i = 0; i < TOKENS * 20; i++)
        angles[i] = (float)gpu_normal(&seed);
    for (uint32_t i = 0; i < LD; i++)
        mean[i] = (float)gpu_normal(&seed);
    memset(expected, 0x5a, sizeof expected);
    gpu_block cache = gpu_put(g, data, sizeof data), map = gpu_put(g, rows, sizeof rows);
    gpu_block turn = gpu_put(g, angles, sizeof angles), middle = gpu_put(g, mean, sizeof mean);
    gpu_block out = gpu_alloc(g, sizeof expected);
    make_planes(planes, data, rows, dtype, style);
    make_planes(there, cache.p, (const void *)map.p, dtype, style);
    gpu_block list = gpu_put(g, there, sizeof there);
    xkv_plug_gather host = {planes, PLANES, TOKENS - 2, 2, angles, 20, with_mean ? mean : NULL, expected, LD}, o = host;
    for (uint32_t i = 0; i < PLANES; i++)
        for (uint32_t t = 0; t < host.tokens; t++)
            for (uint32_t item = 0; item < xkv_items_of(&planes[i], planes[i].heads); item++)
                xkv_gather_item(&host, &planes[i], t, item);
    o.planes = (const void *)list.p;
    o.angles = (const void *)turn.p;
    o.mean = with_mean ? (const void *)middle.p : NULL;
    o.rows = (void *)out.p;
    GPU_TRY(g, gather(g->d, &o, g->stream));
    gpu_get(g, &out, found);
    check(memcmp(found, expected, sizeof found) == 0, "gather, dtype %u, style %u, mean %u: other rows", dtype, style,
          with_mean);
    release(g, &cache, "gather wrote beside the cache");
    release(g, &map, "gather wrote beside the map");
    release(g, &turn, "gather wrote beside the angles");
    release(g, &middle, "gather wrote beside the mean");
    release(g, &out, "gather wrote beside the rows");
    release(g, &list, "gather wrote beside the planes");
}

/* Rows as they are, and one element that is none. */
static void check_take_of(gpu *g, uint32_t dtype)
{
    static _Alignas(16) uint8_t data[PLANES * CACHE], expected[TOKENS * ROW * 4], found[TOKENS * ROW * 4];
    uint64_t seed = dtype;
    uint32_t rows[TOKENS], flags[PLANES] = {0, 0};
    float nan = NAN;
    size_t e = dtype == XKV_F32 ? 4 : 2;
    xkv_plug_plane planes[PLANES], there[PLANES];

    fill_cache(data, dtype, &seed);
    for (uint32_t i = 0; i < TOKENS; i++)
        rows[i] = TOKENS - 1 - i;
    if (dtype == XKV_F32)
        memcpy(data + CACHE + 4 * 99, &nan, 4);
    else
        memset(data + CACHE + 2 * 99, 0xff, 2);
    memset(expected, 0x5a, sizeof expected);
    gpu_block cache = gpu_put(g, data, sizeof data), map = gpu_put(g, rows, sizeof rows);
    gpu_block out = gpu_alloc(g, sizeof expected), flag = gpu_put(g, flags, sizeof flags);
    make_planes(planes, data, rows, dtype, 0);
    make_planes(there, cache.p, (const void *)map.p, dtype, 0);
    gpu_block list = gpu_put(g, there, sizeof there);
    xkv_plug_take host = {planes[0].view, HEADS, DIMS, TOKENS - 1, 1, expected, ROW * e}, o = host;
    for (uint32_t t = 0; t < host.tokens; t++)
        for (uint32_t i = 0; i < ROW; i++)
            xkv_take_element(&host, t, i);
    o.view = there[0].view;
    o.rows = out.p;
    GPU_TRY(g, take(g->d, &o, g->stream));
    gpu_get(g, &out, found);
    check(memcmp(found, expected, sizeof found) == 0, "take, dtype %u: other elements", dtype, 0, 0);
    xkv_plug_scan scan = {(const void *)list.p, PLANES, TOKENS, (void *)flag.p};
    GPU_TRY(g, scan(g->d, &scan, g->stream));
    gpu_get(g, &flag, flags);
    check(flags[0] == 0 && flags[1] == 1, "scan, dtype %u: found %u and %u, expected 0 and 1", dtype, flags[0],
          flags[1]);
    release(g, &cache, "take wrote beside the cache");
    release(g, &map, "take wrote beside the map");
    release(g, &out, "take wrote beside the rows");
    release(g, &flag, "scan wrote beside the flags");
    release(g, &list, "scan wrote beside the planes");
}

static void check_halve_of(gpu *g, uint32_t count, uint32_t width)
{
    uint64_t seed = count * 7 + width, ld = width + 3;
    size_t size = (size_t)count * width * 2;
    float *rows = malloc(count * ld * 4);
    uint32_t *index = malloc(count * 4ull);
    uint16_t *expected = malloc(2 * size), *found = malloc(2 * size);

    for (size_t i = 0; i < count * ld; i++)
        rows[i] = (float)(gpu_normal(&seed) * exp2((double)(gpu_random(&seed) % 60) - 30));
    for (uint32_t i = 0; i < count; i++)
        index[i] = (uint32_t)(gpu_random(&seed) % count);
    gpu_block from = gpu_put(g, rows, count * ld * 4), list = gpu_put(g, index, count * 4ull);
    gpu_block to = gpu_alloc(g, 2 * size);
    xkv_plug_halve host = {rows, index, ld, count, width, 0.37f, expected, expected + size / 2}, o = host;
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t c = 0; c < width; c++)
            xkv_halve_element(&host, i, c);
    o.rows = (const void *)from.p;
    o.index = (const void *)list.p;
    o.high = (void *)to.p;
    o.low = (void *)(to.p + size);
    GPU_TRY(g, halve(g->d, &o, g->stream));
    gpu_get(g, &to, found);
    check(memcmp(found, expected, 2 * size) == 0, "halve %u x %u: other halves", count, width, 0);
    release(g, &from, "halve wrote beside the rows");
    release(g, &list, "halve wrote beside the index");
    release(g, &to, "halve wrote beside the halves");
    free(rows);
    free(index);
    free(expected);
    free(found);
}

static void check_round_columns_of(gpu *g, uint32_t count, uint32_t width)
{
    uint64_t seed = count * 5 + width;
    size_t elements = (size_t)count * width;
    float *rows = malloc(elements * 4), *scales = calloc(width, 4), *found_scales = malloc(width * 4ull);
    uint16_t *expected = malloc(elements * 2), *found = malloc(elements * 2);

    for (size_t i = 0; i < elements; i++) /* column 0 is of zeros */
        rows[i] = i % width ? (float)(gpu_normal(&seed) * exp2((double)(gpu_random(&seed) % 20) - 10)) : 0;
    for (size_t i = 0; i < elements; i++)
        scales[i % width] = fmaxf(scales[i % width], fabsf(rows[i]));
    for (size_t i = 0; i < elements; i++)
        expected[i] = xkv_f16_from_f32(i % width ? rows[i] / scales[i % width] : 0);
    gpu_block from = gpu_put(g, rows, elements * 4);
    gpu_block units = gpu_alloc(g, width * 4ull), to = gpu_alloc(g, elements * 2);
    xkv_plug_round_columns o = {(const void *)from.p, count, width, (void *)units.p, (void *)to.p};
    GPU_TRY(g, round_columns(g->d, &o, g->stream));
    gpu_get(g, &units, found_scales);
    gpu_get(g, &to, found);
    check(memcmp(found_scales, scales, width * 4ull) == 0, "round_columns %u x %u: other scales", count, width, 0);
    check(memcmp(found, expected, elements * 2) == 0, "round_columns %u x %u: other numbers", count, width, 0);
    release(g, &from, "round_columns wrote beside the rows");
    release(g, &units, "round_columns wrote beside the scales");
    release(g, &to, "round_columns wrote beside the numbers");
    free(rows);
    free(scales);
    free(found_scales);
    free(expected);
    free(found);
}

static void check_sums_of(gpu *g, uint32_t width, uint32_t tokens, bool with_mean)
{
    uint64_t seed = width + tokens;
    const uint32_t begins[4] = {0, width / 3, width / 2, width};
    float *rows = malloc((size_t)width * tokens * 4), *mean = malloc(width * 4ull);
    double *expected = malloc(3ull * tokens * 8), *found = malloc(3ull * tokens * 8);
    bool good = true;

    for (size_t i = 0; i < (size_t)width * tokens; i++)
        rows[i] = (float)gpu_normal(&seed);
    for (uint32_t i = 0; i < width; i++)
        mean[i] = (float)gpu_normal(&seed);
    gpu_block from = gpu_put(g, rows, (size_t)width * tokens * 4), middle = gpu_put(g, mean, width * 4ull);
    gpu_block list = gpu_put(g, begins, sizeof begins), to = gpu_alloc(g, 3ull * tokens * 8);
    xkv_plug_sums host = {rows, with_mean ? mean : NULL, begins, width, tokens, 3, tokens, expected}, o = host;
    for (uint32_t i = 0; i < 3; i++)
        for (uint32_t t = 0; t < tokens; t++)
            xkv_warp_sum_squares(&host, i, t);
    o.rows = (const void *)from.p;
    o.mean = with_mean ? (const void *)middle.p : NULL;
    o.begins = (const void *)list.p;
    o.sums = (void *)to.p;
    GPU_TRY(g, sums(g->d, &o, g->stream));
    gpu_get(g, &to, found);
    for (uint32_t i = 0; i < 3 * tokens; i++)
        good = good && fabs(found[i] - expected[i]) <= 1e-12 * expected[i];
    check(good, "sums of %u x %u, mean %u: other sums", tokens, width, with_mean);
    release(g, &from, "sums wrote beside the rows");
    release(g, &middle, "sums wrote beside the mean");
    release(g, &list, "sums wrote beside the columns");
    release(g, &to, "sums wrote beside the sums");
    free(rows);
    free(mean);
    free(expected);
    free(found);
}

/* --- Integers ----------------------------------------------------------------------------------------------------- */

enum { RANK = 19, LONG = 5000, STRIDE = LONG + 24 };

static void check_quantize(gpu *g, float step)
{
    static float y[RANK * STRIDE];
    static int16_t expected[RANK * STRIDE], found[RANK * STRIDE];
    xkv_plug_stats stats[RANK], got[RANK];
    uint64_t seed = 17;
    bool good = true;

    for (uint32_t i = 0; i < RANK; i++)
        for (uint32_t t = 0; t < STRIDE; t++)
            y[i * STRIDE + t] = (float)(gpu_normal(&seed) * exp2(8 - (double)i));
    y[5 * STRIDE + 77] = NAN;
    memset(expected, 0x5a, sizeof expected);
    gpu_block from = gpu_put(g, y, sizeof y), to = gpu_alloc(g, sizeof expected), known = gpu_alloc(g, sizeof stats);
    xkv_plug_quantize host = {y, STRIDE, expected, STRIDE, RANK, LONG, step, stats, 1}, o = host;
    for (uint32_t i = 0; i < RANK; i++)
        xkv_warp_quantize(&host, i);
    o.y = (const void *)from.p;
    o.q = (void *)to.p;
    o.stats = (void *)known.p;
    GPU_TRY(g, quantize(g->d, &o, g->stream));
    gpu_get(g, &to, found);
    gpu_get(g, &known, got);
    check(memcmp(found, expected, sizeof found) == 0, "quantize: other integers", 0, 0, 0);
    for (uint32_t i = 0; i < RANK; i++) {
        good = good && got[i].magnitude == stats[i].magnitude && (got[i].outside != 0) == (stats[i].outside != 0);
        if (i != 5)
            good = good && fabs(got[i].energy - stats[i].energy) <= 1e-12 * stats[i].energy &&
                   fabs(got[i].error - stats[i].error) <= 1e-12 * stats[i].error;
    }
    check(good, "quantize: other sums", 0, 0, 0);
    release(g, &from, "quantize wrote beside the coefficients");
    release(g, &to, "quantize wrote beside the integers");
    release(g, &known, "quantize wrote beside the sums");
}

static void check_count(gpu *g)
{
    static int16_t q[RANK * STRIDE];
    static uint32_t expected[RANK * XKV_COUNT_SHIFTS * XKV_COUNT_BINS], found[RANK * XKV_COUNT_SHIFTS * XKV_COUNT_BINS];
    uint32_t windows[RANK], held[XKV_COUNT_SHIFTS * XKV_COUNT_BINS];
    uint64_t seed = 19;

    for (uint32_t i = 0; i < RANK; i++) {
        windows[i] = i % 3 | (i % 8) << 8;
        for (uint32_t t = 0; t < STRIDE; t++)
            q[i * STRIDE + t] = (int16_t)(gpu_normal(&seed) * exp2((double)(i % 12)));
    }
    memset(expected, 0, sizeof expected);
    gpu_block from = gpu_put(g, q, sizeof q), list = gpu_put(g, windows, sizeof windows);
    gpu_block to = gpu_put(g, expected, sizeof expected);
    xkv_plug_count host = {q, STRIDE, LONG, RANK, windows, expected}, o = host;
    for (uint32_t i = 0; i < RANK; i++)
        for (uint64_t t = 0; t < LONG; t += XKV_COUNT_TOKENS)
            xkv_warp_count(&host, i, t, held);
    o.q = (const void *)from.p;
    o.windows = (const void *)list.p;
    o.counts = (void *)to.p;
    GPU_TRY(g, count_values(g->d, &o, g->stream));
    gpu_get(g, &to, found);
    check(memcmp(found, expected, sizeof found) == 0, "count: other counts", 0, 0, 0);
    release(g, &from, "count wrote beside the integers");
    release(g, &list, "count wrote beside the windows");
    release(g, &to, "count wrote beside the counts");
}

/* Chunks of all lengths, of components out of order. */
static void check_encode(gpu *g)
{
    enum { CHUNKS = 9, CODED = 17 };
    static const uint32_t lengths[CHUNKS] = {1, 2, 31, 32, 33, 64, 255, 256, 257};
    static int16_t q[RANK * STRIDE];
    static xkv_warp_encode_table tables[XKV_BASE_TABLES];
    static uint8_t expected[4 * CODED * 257 + 128];
    const uint64_t room = 64 + 2ull * CODED * 257;
    xkv_plug_span spans[CHUNKS];
    uint8_t index[CODED];
    uint32_t rows[CODED], sizes[CHUNKS] = {0};
    xkv_warp_code codes[CODED];
    uint16_t *words = malloc(CHUNKS * room * 2);
    uint64_t seed = 23, column = 3;
    int16_t *ordered = malloc(CODED * STRIDE * 2);

    for (uint32_t i = 0; i < CODED; i++) {
        index[i] = (uint8_t)(1 + gpu_random(&seed) % XKV_TABLE_MAX);
        if (i % 4 == 3)
            index[i] = index[i - 1];
        codes[i] = xkv_device_code(index[i]);
        rows[i] = RANK - 1 - i;
        for (uint32_t t = 0; t < STRIDE; t++)
            q[rows[i] * STRIDE + t] = ordered[i * STRIDE + t] = gpu_value(index[i], &seed);
    }
    for (uint32_t i = 0; i < CHUNKS; i++) {
        spans[i] = (xkv_plug_span){column, lengths[i], 0};
        column += lengths[i];
    }
    xkv_device_encode_tables(tables);
    gpu_block from = gpu_put(g, q, sizeof q), list = gpu_put(g, rows, sizeof rows);
    gpu_block code = gpu_put(g, codes, sizeof codes), table = gpu_put(g, tables, sizeof tables);
    gpu_block span = gpu_put(g, spans, sizeof spans), to = gpu_alloc(g, CHUNKS * room * 2);
    gpu_block size = gpu_alloc(g, sizeof sizes);
    xkv_plug_encode o = {(const void *)from.p,
                         STRIDE,
                         (const void *)list.p,
                         (const void *)table.p,
                         (const void *)code.p,
                         CODED,
                         CHUNKS,
                         (const void *)span.p,
                         (void *)to.p,
                         room,
                         (void *)size.p};
    GPU_TRY(g, encode(g->d, &o, g->stream));
    gpu_get(g, &to, words);
    gpu_get(g, &size, sizes);
    for (uint32_t i = 0; i < CHUNKS; i++) {
        size_t bytes = gpu_encode(ordered + spans[i].column, STRIDE, lengths[i], index, CODED, expected);
        const uint8_t *found = (const uint8_t *)(words + (i + 1) * room) - sizes[i];
        check(sizes[i] == bytes && memcmp(found, expected, bytes) == 0, "encode: another stream of %u tokens",
              lengths[i], 0, 0);
    }
    release(g, &from, "encode wrote beside the integers");
    release(g, &list, "encode wrote beside the rows");
    release(g, &code, "encode wrote beside the codes");
    release(g, &table, "encode wrote beside the tables");
    release(g, &span, "encode wrote beside the chunks");
    release(g, &to, "encode wrote beside the words");
    release(g, &size, "encode wrote beside the sizes");
    free(words);
    free(ordered);
}

void check_pack(gpu *g)
{
    static const uint32_t sizes[] = {1, 31, 32, 33, 257, 600};

    for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++) {
        for (uint32_t kind = 0; kind < 4; kind++)
            check_gather_of(g, dtype, kind & 1 ? XKV_ROPE_INTERLEAVED : XKV_ROPE_HALF_SPLIT, kind > 1);
        check_take_of(g, dtype);
    }
    for (int i = 0; i < 6; i++) {
        check_halve_of(g, sizes[i], sizes[5 - i]);
        check_round_columns_of(g, sizes[i], sizes[5 - i]);
        check_sums_of(g, sizes[i], sizes[5 - i], i % 2);
    }
    check_quantize(g, 0.125f);
    check_count(g);
    check_encode(g);
}
