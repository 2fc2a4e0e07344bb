#include "bench.h"

#include <stdio.h>
#include <stdlib.h>

enum { MAX_REPEATS = 99, BLOCK_TOKENS = 16 };

/* Where a cache is restored to. `axes` NULL: token-major rows, a plane after the other; else pages of 16 tokens, K and
 * V of a layer in one tensor. The first one is what the others are compared with. */
typedef struct destination {
    const char *name, *axes;
    uint32_t dtype;
    double seconds[MAX_REPEATS];
    uint8_t *memory;
    xkv_view *views;
    int32_t *table;
} destination;

static void make_rows(destination *d, const xkv_geometry *g)
{
    size_t offset = 0;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        uint32_t width = g->planes[i].heads * g->planes[i].head_dim;
        int64_t row = (int64_t)xkv_dtype_bytes(d->dtype, width);
        d->views[i] = (xkv_view){.data = d->memory + offset,
                                 .token_stride = row,
                                 .head_stride = row,
                                 .dim_stride = (int64_t)xkv_dtype_size(d->dtype),
                                 .dtype = d->dtype,
                                 .head_dim = width};
        offset += (size_t)row * g->token_count;
    }
}

/* Blocks of the sequence from the last one of the pool to the first. */
static void make_pages(destination *d, const xkv_geometry *g, xkv_ctx *ctx)
{
    uint32_t blocks = (g->token_count + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    xkv_pages *pages = bench_alloc(g->layer_count, sizeof *pages);
    size_t offset = 0;
    xkv_view *views;

    d->table = bench_alloc(blocks, sizeof *d->table);
    for (uint32_t i = 0; i < blocks; i++)
        d->table[i] = (int32_t)(blocks - 1 - i);
    for (uint32_t i = 0; i < g->layer_count; i++) {
        uint32_t width = g->planes[2 * i].heads * g->planes[2 * i].head_dim;
        uint64_t size = 2 * xkv_dtype_bytes(d->dtype, (uint64_t)blocks * BLOCK_TOKENS * width);
        pages[i] = (xkv_pages){.data = d->memory + offset,
                               .size = size,
                               .axes = d->axes,
                               .dtype = d->dtype,
                               .first_layer = i,
                               .layer_count = 1,
                               .kinds = {XKV_PLANE_K, XKV_PLANE_V},
                               .kind_count = 2,
                               .block_count = blocks,
                               .block_tokens = BLOCK_TOKENS,
                               .table = d->table,
                               .table_size = blocks};
        offset += (size_t)size;
    }
    bench_try(ctx, xkv_views_from_pages(ctx, g, pages, g->layer_count, 0, 0, &views), d->name);
    memcpy(d->views, views, g->plane_count * sizeof *views);
    for (uint32_t i = 0; i < g->plane_count; i++) { /* the rows outlive the allocation they came in */
        uint32_t *rows = bench_alloc(g->token_count, sizeof *rows);
        memcpy(rows, views[i].rows, g->token_count * sizeof *rows);
        d->views[i].rows = rows;
    }
    xkv_views_free(ctx, views);
    free(pages);
}

static void free_destination(destination *d, uint32_t planes)
{
    for (uint32_t i = 0; d->axes && i < planes; i++)
        free((void *)(uintptr_t)d->views[i].rows);
    free(d->views);
    free(d->memory);
    free(d->table);
}

/* Restores by turns, so that all destinations see the same machine. */
static void time_all(const bench_plan *plan, xkv_ctx *ctx, const xkv_entry *entry, destination *list, size_t count)
{
    for (int i = -1; i < plan->repeats; i++) /* round -1 is the warm-up */
        for (size_t k = 0; k < count; k++) {
            double start = bench_now();
            bench_try(ctx, xkv_entry_read(ctx, entry, NULL, list[k].views), list[k].name);
            list[k].seconds[i < 0 ? 0 : i] = bench_now() - start;
        }
}

static json_t *results(const bench_plan *plan, const bench_subject *s, destination *list, size_t count)
{
    json_t *all = bench_json(json_array());
    double elements = 0, first = bench_median(list[0].seconds, plan->repeats);

    for (uint32_t i = 0; i < s->geometry->plane_count; i++)
        elements += (double)s->geometry->token_count * s->geometry->planes[i].heads * s->geometry->planes[i].head_dim;
    for (size_t k = 0; k < count; k++) {
        double seconds = bench_median(list[k].seconds, plan->repeats);
        json_array_append_new(all, bench_json(json_pack("{s:s, s:s, s:f, s:f, s:f}", "into", list[k].name, "dtype",
                                                        xkv_dtype_name(list[k].dtype), "seconds", seconds,
                                                        "raw16_mb_per_s", 2 * elements / seconds / 1e6,
                                                        "percent_more_than_first", 100 * (seconds / first - 1))));
    }
    return all;
}

json_t *bench_destinations(const bench_plan *plan, bench_subject *s, uint32_t profile, uint32_t threads)
{
    destination list[] = {
        {.name = "rows", .dtype = XKV_F16},
        {.name = "rows", .dtype = XKV_BF16},
        {.name = "rows", .dtype = XKV_F32},
        {.name = "rows", .dtype = XKV_Q8_0},
        {.name = "rows", .dtype = XKV_Q4_0},
        {.name = "pages [2, block, slot, head, dim]", .axes = "KBNHD", .dtype = XKV_F16},
        {.name = "pages [block, head, slot, K | V]", .axes = "BHNC", .dtype = XKV_F16},
        {.name = "pages [2, block, slot, head, dim]", .axes = "KBNHD", .dtype = XKV_Q8_0},
    };
    const size_t count = sizeof list / sizeof *list;
    xkv_pack_options o = xkv_pack_options_default();
    xkv_pack_report report;
    xkv_ctx *ctx = bench_context(threads);
    json_t *result = bench_json(json_object());
    xkv_entry *entry;

    o.profile = profile;
    o.error = profile == XKV_PROFILE_LOSSLESS ? 0 : 0.1;
    bench_time_pack(s, ctx, &o, &report);
    entry = bench_open_entry(s, ctx);
    for (size_t k = 0; k < count; k++) {
        list[k].memory = bench_alloc((size_t)xkv_geometry_raw_bytes(s->geometry) * 2 + (1u << 24), 1);
        list[k].views = bench_alloc(s->geometry->plane_count, sizeof *list[k].views);
        if (list[k].axes)
            make_pages(&list[k], s->geometry, ctx);
        else
            make_rows(&list[k], s->geometry);
    }
    time_all(plan, ctx, entry, list, count);
    bench_set_result(result, s, &report, threads);
    json_object_set_new(result, "profile",
                        bench_json(json_string(profile == XKV_PROFILE_LOSSLESS ? "lossless" : "scalar")));
    json_object_set_new(result, "memcpy_gb_per_s", json_real(bench_memcpy(plan, threads)));
    json_object_set_new(result, "destinations", results(plan, s, list, count));
    for (size_t k = 0; k < count; k++)
        free_destination(&list[k], s->geometry->plane_count);
    xkv_entry_close(ctx, entry);
    xkv_ctx_free(ctx);
    return result;
}
