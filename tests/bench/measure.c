#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_REPEATS = 99 };

/* --- Subjects ----------------------------------------------------------------------------------------------------- */

static size_t plane_width(const xkv_plane *p)
{
    return (size_t)p->heads * p->head_dim;
}

void bench_contiguous_views(const xkv_geometry *geometry, uint8_t *data, xkv_view *views)
{
    for (uint32_t i = 0; i < geometry->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[i];
        int64_t elem = (int64_t)xkv_dtype_size(p->dtype), row = (int64_t)plane_width(p) * elem;
        views[i] = (xkv_view){.data = data,
                              .token_stride = row,
                              .head_stride = p->head_dim * elem,
                              .dim_stride = elem,
                              .dtype = p->dtype};
        data += (size_t)row * geometry->token_count;
    }
}

bench_subject bench_subject_create(const char *name, const xkv_geometry *geometry, const xkv_view *views)
{
    size_t raw = (size_t)xkv_geometry_raw_bytes(geometry);
    bench_subject s = {.name = name, .geometry = geometry, .views = views};

    s.entry_capacity = raw + raw / 8 + (1u << 20);
    s.entry = bench_alloc(s.entry_capacity, 1);
    s.restored_data = bench_alloc(raw, 1);
    s.restored = bench_alloc(geometry->plane_count, sizeof *s.restored);
    bench_contiguous_views(geometry, s.restored_data, s.restored);
    return s;
}

void bench_subject_free(bench_subject *s)
{
    free(s->entry);
    free(s->restored_data);
    free(s->restored);
    *s = (bench_subject){0};
}

static xkv_status write_entry(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    bench_subject *s = user;

    (void)ctx;
    if (offset > s->entry_capacity || size > s->entry_capacity - offset)
        return XKV_ERROR_NO_SPACE;
    memcpy(s->entry + offset, src, size);
    if (offset + size > s->entry_size)
        s->entry_size = (size_t)offset + size;
    return XKV_OK;
}

double bench_time_pack(bench_subject *s, xkv_ctx *ctx, const xkv_pack_options *o, xkv_pack_report *report)
{
    xkv_output output = {.user = s, .write = write_entry};
    double start;

    s->entry_size = 0;
    start = bench_now();
    bench_try(ctx, xkv_pack(ctx, s->geometry, s->views, NULL, NULL, 0, o, &output, report), s->name);
    return bench_now() - start;
}

xkv_entry *bench_open_entry(const bench_subject *s, xkv_ctx *ctx)
{
    xkv_input input = xkv_input_from_memory(s->entry, s->entry_size);
    xkv_entry *entry;

    bench_try(ctx, xkv_entry_open(ctx, &input, &entry), s->name);
    return entry;
}

double bench_time_unpack(const bench_subject *s, xkv_ctx *ctx, const xkv_entry *entry)
{
    double start = bench_now();

    bench_try(ctx, xkv_entry_read(ctx, entry, NULL, s->restored), s->name);
    return bench_now() - start;
}

/* Did every byte come back? */
static bool identical(const bench_subject *s)
{
    for (uint32_t i = 0; i < s->geometry->plane_count; i++) {
        const xkv_plane *p = &s->geometry->planes[i];
        const xkv_view *a = &s->views[i], *b = &s->restored[i];
        for (uint32_t t = 0; t < s->geometry->token_count; t++)
            for (uint32_t k = 0; k < plane_width(p); k++) {
                int64_t row = a->rows ? a->rows[t] : t;
                int64_t from =
                    row * a->token_stride + k / p->head_dim * a->head_stride + k % p->head_dim * a->dim_stride;
                int64_t to = t * b->token_stride + k * b->dim_stride;
                if (memcmp((uint8_t *)a->data + from, (uint8_t *)b->data + to, (size_t)b->dim_stride) != 0)
                    return false;
            }
    }
    return true;
}

void bench_add_goal(bench_plan *plan, const bench_subject *s, const char *what, uint32_t threads, double limit,
                    double found)
{
    char text[160];

    (void)snprintf(text, sizeof text, "%s (%s, %u tokens)", what, s->name, s->geometry->token_count);
    bench_goal(plan, text, threads, limit, true, found);
}

/* --- One direction of one case ------------------------------------------------------------------------------------ */

/* Seconds of pack and unpack, and (lossless) the best of zstd alone in between. */
typedef struct times {
    double pack[MAX_REPEATS], unpack[MAX_REPEATS];
    double zstd_pack, zstd_unpack;
} times;

static json_t *lossless_rate(double raw, double seconds, double best, double zstd)
{
    return bench_json(json_pack("{s:f, s:f, s:f, s:f, s:f}", "seconds", seconds, "best_seconds", best, "mb_per_s",
                                raw / seconds / 1e6, "zstd_mb_per_s", raw / zstd / 1e6, "percent_of_zstd",
                                100 * zstd / seconds));
}

static json_t *svd_rate(double raw, double seconds, double best, double flops, double square, double shape)
{
    double gflops = flops / seconds / 1e9;

    return bench_json(json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "seconds", seconds, "best_seconds", best,
                                "mb_per_s", raw / seconds / 1e6, "gflops", gflops, "percent_of_gemm",
                                100 * gflops / square, "shape_sgemm_gflops", shape, "percent_of_shape_gemm",
                                100 * gflops / shape));
}

void bench_set_result(json_t *result, const bench_subject *s, const xkv_pack_report *r, uint32_t threads)
{
    json_object_set_new(result, "cache", bench_json(json_string(s->name)));
    json_object_set_new(result, "tokens", json_integer(s->geometry->token_count));
    json_object_set_new(result, "threads", json_integer(threads));
    json_object_set_new(result, "raw_bytes", json_integer((json_int_t)r->raw_bytes));
    json_object_set_new(result, "packed_bytes", json_integer((json_int_t)r->entry_bytes));
    json_object_set_new(result, "ratio", json_real(r->ratio));
}

/* --- lossless ----------------------------------------------------------------------------------------------------- */

static void time_lossless(const bench_plan *plan, bench_subject *s, xkv_ctx *ctx, uint32_t threads,
                          const xkv_pack_options *o, xkv_pack_report *report, times *t)
{
    xkv_entry *entry;
    bench_frames *frames;

    bench_time_pack(s, ctx, o, report);
    entry = bench_open_entry(s, ctx);
    frames = bench_frames_create(entry, s->views, o->zstd_level);
    t->zstd_pack = t->zstd_unpack = INFINITY;
    for (int i = -1; i < plan->repeats; i++) { /* round -1 is the warm-up */
        double packed = bench_frames_compress(frames, threads), unpacked = bench_frames_decompress(frames, threads);
        t->zstd_pack = fmin(t->zstd_pack, packed);
        t->zstd_unpack = fmin(t->zstd_unpack, unpacked);
        t->pack[i < 0 ? 0 : i] = bench_time_pack(s, ctx, o, report);
        t->unpack[i < 0 ? 0 : i] = bench_time_unpack(s, ctx, entry); /* each pack writes the same entry */
    }
    bench_frames_free(frames);
    xkv_entry_close(ctx, entry);
}

json_t *bench_lossless(bench_plan *plan, bench_subject *s, uint32_t threads)
{
    xkv_pack_options o = xkv_pack_options_default();
    xkv_pack_report report;
    xkv_ctx *ctx = bench_context(threads);
    json_t *result = bench_json(json_object());
    times t;
    double pack, unpack, raw;

    o.profile = XKV_PROFILE_LOSSLESS;
    time_lossless(plan, s, ctx, threads, &o, &report, &t);
    pack = bench_median(t.pack, plan->repeats);
    unpack = bench_median(t.unpack, plan->repeats);
    raw = (double)report.raw_bytes;
    bench_set_result(result, s, &report, threads);
    json_object_set_new(result, "zstd_level", json_integer(o.zstd_level));
    json_object_set_new(result, "identical", json_boolean(identical(s)));
    json_object_set_new(result, "pack", lossless_rate(raw, pack, t.pack[0], t.zstd_pack));
    json_object_set_new(result, "unpack", lossless_rate(raw, unpack, t.unpack[0], t.zstd_unpack));
    bench_add_goal(plan, s, "lossless pack, % of zstd", threads, 60, 100 * t.zstd_pack / pack);
    bench_add_goal(plan, s, "lossless unpack, % of zstd", threads, 60, 100 * t.zstd_unpack / unpack);
    xkv_ctx_free(ctx);
    return result;
}

/* --- svd ---------------------------------------------------------------------------------------------------------- */

/* Arithmetic that cannot be left out: (2q+1) products of the coded tokens' X with a block of p = r + max(8, r/8)
 * columns to pack, coefficients times components to unpack. */
typedef struct work {
    double pack_flops, unpack_flops;
    uint32_t tokens, width, rank, block; /* of the largest group */
    double square;                       /* GFLOP/s of the square sgemm, the best between the runs */
} work;

static work count_work(const xkv_entry *entry, uint32_t iterations)
{
    xkv_entry_info info;
    xkv_group_info g;
    work w = {0};

    xkv_entry_get_info(entry, &info);
    w.tokens = xkv_entry_geometry(entry)->token_count - info.sinks - info.window;
    for (uint32_t i = 0; i < info.group_count; i++) {
        xkv_entry_get_group(entry, i, &g);
        if (g.codec != XKV_CODEC_SVD)
            continue;
        uint32_t block = g.rank + (g.rank / 8 > 8 ? g.rank / 8 : 8), most = g.width < w.tokens ? g.width : w.tokens;
        block = block < most ? block : most;
        w.unpack_flops += 2.0 * w.tokens * g.width * g.rank;
        w.pack_flops += (2 * iterations + 1) * 2.0 * w.tokens * g.width * block;
        if (g.rank > w.rank) {
            w.rank = g.rank;
            w.width = g.width;
            w.block = block;
        }
    }
    return w;
}

/* What sgemm alone does on the products of the largest group, cut in tiles of 256 tokens: X V and X^T Y (harmonic mean)
 * to pack. */
static double pack_shape(const work *w, uint32_t threads)
{
    size_t rows = w->tokens < 256 ? w->tokens : 256;
    double nn = bench_sgemm(threads, false, rows, w->block, w->width, 5);
    double tn = bench_sgemm(threads, true, w->width, w->block, rows, 5);

    return 2 / (1 / nn + 1 / tn);
}

static double unpack_shape(const work *w, uint32_t threads)
{
    return bench_sgemm(threads, false, w->tokens < 256 ? w->tokens : 256, w->width, w->rank, 5);
}

static void time_svd(const bench_plan *plan, bench_subject *s, xkv_ctx *ctx, uint32_t threads,
                     const xkv_pack_options *o, xkv_pack_report *report, times *t, work *w)
{
    double square = 0;

    for (int i = -1; i < plan->repeats; i++) { /* round -1 is the warm-up */
        xkv_entry *entry;
        square = fmax(square, bench_sgemm_square(plan, threads, 1));
        t->pack[i < 0 ? 0 : i] = bench_time_pack(s, ctx, o, report);
        entry = bench_open_entry(s, ctx);
        t->unpack[i < 0 ? 0 : i] = bench_time_unpack(s, ctx, entry);
        *w = count_work(entry, o->iterations);
        xkv_entry_close(ctx, entry);
    }
    w->square = square;
    if (w->rank == 0)
        bench_die("%s: no group is worth an svd at these ranks", s->name);
}

static json_t *errors(const xkv_geometry *geometry, const xkv_pack_report *report)
{
    json_t *by_kind = bench_json(json_object());

    for (uint32_t i = 0; i < geometry->plane_count; i++) {
        uint32_t kind = geometry->planes[i].kind;
        json_object_set_new(by_kind, xkv_plane_kind_name(kind), json_real(report->error[kind]));
    }
    return by_kind;
}

json_t *bench_svd(bench_plan *plan, bench_subject *s, uint32_t rank_k, uint32_t rank_v, uint32_t iterations,
                  uint32_t threads)
{
    xkv_pack_options o = xkv_pack_options_default();
    xkv_pack_report report;
    xkv_ctx *ctx = bench_context(threads);
    json_t *result = bench_json(json_object());
    times t;
    work w = {0};
    double pack, unpack, raw;

    o.profile = XKV_PROFILE_SVD;
    o.rank_k = rank_k;
    o.rank_v = rank_v;
    o.iterations = iterations;
    time_svd(plan, s, ctx, threads, &o, &report, &t, &w);
    pack = bench_median(t.pack, plan->repeats);
    unpack = bench_median(t.unpack, plan->repeats);
    raw = (double)report.raw_bytes;
    bench_set_result(result, s, &report, threads);
    json_object_set_new(result, "width", json_integer(w.width));
    json_object_set_new(result, "rank_k", json_integer(rank_k));
    json_object_set_new(result, "rank_v", json_integer(rank_v));
    json_object_set_new(result, "iterations", json_integer(iterations));
    json_object_set_new(result, "error", errors(s->geometry, &report));
    json_object_set_new(result, "sgemm_square_gflops", json_real(w.square));
    json_object_set_new(result, "pack",
                        svd_rate(raw, pack, t.pack[0], w.pack_flops, w.square, pack_shape(&w, threads)));
    json_object_set_new(result, "unpack",
                        svd_rate(raw, unpack, t.unpack[0], w.unpack_flops, w.square, unpack_shape(&w, threads)));
    if (iterations == 1) {
        bench_add_goal(plan, s, "svd pack q=1, % of GEMM", threads, 60, w.pack_flops / pack / w.square / 1e7);
        bench_add_goal(plan, s, "svd unpack, % of GEMM", threads, 75, w.unpack_flops / unpack / w.square / 1e7);
    }
    xkv_ctx_free(ctx);
    return result;
}
