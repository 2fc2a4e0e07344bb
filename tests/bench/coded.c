/* coded.c - packing with a dictionary and restoring, beside sgemm; and the entropy coder by itself. */
#include "bench.h"

#include "entry_internal.h"
#include "parts.h"
#include "rans.h"

#include <math.h>
#include <stdlib.h>

enum { MAX_REPEATS = 99 };

/* --- Arithmetic ----------------------------------------------------------------------------------------------------
 * What cannot be left out. To restore: integers times rows, and the share of the cross stage in the leading
 * coefficients. To pack: rows times all components, the rotation of the cross stage, and, for the errors that the entry
 * states, a restore. */

typedef struct work {
    double pack_flops, unpack_flops;
    uint64_t symbols; /* coded integers */
} work;

static void add_group(const xkv_dict *dict, uint32_t index, const xkv_group_info *g, uint32_t coded, uint32_t cross,
                      double tokens, work *w)
{
    uint32_t leading = cross > 0 ? xkv_dict_leading(dict, index) : 0;
    double restore = 2 * tokens * ((double)(coded + leading) * g->width + (double)cross * leading);

    w->unpack_flops += restore;
    w->pack_flops += restore + 2 * tokens * (double)g->rank * g->width;
}

/* The k-th group with planes of an entry of all the dictionary's planes is the k-th group of the dictionary. */
static work count_work(xkv_ctx *ctx, const xkv_entry *entry, const xkv_dict *dict)
{
    xkv_entry_info info;
    xkv_dict_info d;
    work w = {0};
    uint32_t cross = 0, index = 0;
    double tokens;

    xkv_entry_get_info(entry, &info);
    xkv_dict_get_info(dict, &d);
    tokens = xkv_entry_geometry(entry)->token_count - info.sinks - info.window;
    for (uint32_t i = 0; i < info.group_count; i++) {
        xkv_group_info g;
        xkv_group_coding coding;
        xkv_entry_get_group(entry, i, &g);
        bench_try(ctx, xkv_entry_read_coding(ctx, entry, i, &coding), "coding of a group");
        w.symbols += (uint64_t)(coding.coded * tokens);
        if (g.codec == XKV_CODEC_CROSS) {
            cross = coding.coded;
            w.pack_flops += 2 * tokens * (double)d.cross_components * d.cross_components;
        } else if (g.codec == XKV_CODEC_DICT) {
            add_group(dict, index++, &g, coding.coded, cross, tokens, &w);
        } else {
            bench_die("a group was not coded with the dictionary");
        }
    }
    return w;
}

double bench_unpack_flops(xkv_ctx *ctx, const xkv_entry *entry, const xkv_dict *dict)
{
    return count_work(ctx, entry, dict).unpack_flops;
}

/* --- Entropy coder ------------------------------------------------------------------------------------------------ */

/* One chunk of one group: its stream, and what it holds. */
typedef struct stream {
    xkv_rans_shape shape;
    uint8_t *tables, *data, *scratch; /* `scratch`: to encode into */
    size_t size;
    int16_t *q;
} stream;

static stream load_stream(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, uint32_t chunk)
{
    const xkv_part *part = &g->parts[XKV_PART_CHUNKS + chunk];
    uint8_t *side = NULL;
    uint32_t t0, t1;
    stream s = {.size = (size_t)part->size};

    xkv_chunk_coded(&entry->c, chunk, &t0, &t1);
    bench_try(ctx, xkv_read_matrix(ctx, &entry->input, &entry->c, g, XKV_PART_COMPONENTS, "side", &side), "side part");
    s.tables = bench_alloc(g->rank, 1);
    memcpy(s.tables, side + 8, g->rank); /* dict and cross: behind the step */
    xkv_release(ctx, side);
    s.shape = (xkv_rans_shape){t1 - t0, g->rank, t1 - t0, s.tables};
    s.data = bench_alloc(s.size, 1);
    bench_try(ctx, xkv_container_read_part(ctx, &entry->input, &entry->c, part, s.data), "chunk");
    s.q = bench_alloc((size_t)g->rank * (t1 - t0), sizeof *s.q);
    s.scratch = bench_alloc((size_t)xkv_rans_bound(&s.shape), 1);
    return s;
}

static void free_stream(stream *s)
{
    free(s->tables);
    free(s->data);
    free(s->scratch);
    free(s->q);
}

typedef struct coder_times {
    double encode, decode; /* seconds of all streams, the best of the rounds */
} coder_times;

static coder_times time_streams(xkv_ctx *ctx, stream *streams, uint32_t count, int repeats)
{
    coder_times best = {INFINITY, INFINITY};

    for (int i = -1; i < repeats; i++) { /* round -1 is the warm-up */
        double start = bench_now(), decoded;
        for (uint32_t k = 0; k < count; k++)
            bench_try(ctx,
                      xkv_rans_decode(ctx, xkv_coder_cpu(), &streams[k].shape, streams[k].data, streams[k].size,
                                      "chunk", streams[k].q),
                      "rANS");
        decoded = bench_now();
        for (uint32_t k = 0; k < count; k++)
            if (xkv_rans_encode(xkv_coder_cpu(), &streams[k].shape, streams[k].q, streams[k].scratch) !=
                streams[k].size)
                bench_die("a stream did not come out as it was");
        best.decode = fmin(best.decode, decoded - start);
        best.encode = fmin(best.encode, bench_now() - decoded);
    }
    return best;
}

/* Symbols a second on one thread, on all streams of the entry. */
static json_t *coder_rates(const bench_plan *plan, xkv_ctx *ctx, const xkv_entry *entry, uint64_t symbols)
{
    uint32_t count = entry->c.group_count * entry->c.chunk_count, n = 0;
    stream *streams = bench_alloc(count, sizeof *streams);
    coder_times t;

    for (uint32_t g = 0; g < entry->c.group_count; g++)
        for (uint32_t c = 0; c < entry->c.chunk_count; c++)
            streams[n++] = load_stream(ctx, entry, &entry->c.groups[g], c);
    t = time_streams(ctx, streams, count, plan->repeats + 2);
    for (uint32_t i = 0; i < count; i++)
        free_stream(&streams[i]);
    free(streams);
    return bench_json(json_pack("{s:I, s:f, s:f}", "symbols", (json_int_t)symbols, "decode_msymbols_per_s",
                                (double)symbols / t.decode / 1e6, "encode_msymbols_per_s",
                                (double)symbols / t.encode / 1e6));
}

/* --- Pack and unpack ---------------------------------------------------------------------------------------------- */

typedef struct times {
    double pack[MAX_REPEATS], pack_ratio[MAX_REPEATS], unpack[MAX_REPEATS];
    double square; /* GFLOP/s of the square sgemm, the best between the runs */
} times;

/* Pack for a ratio, then at the very step that it took, which is what packing at a quality does; restore. */
static work time_all(const bench_plan *plan, bench_subject *s, xkv_ctx *ctx, const xkv_dict *dict, uint32_t threads,
                     double ratio, xkv_pack_report *report, times *t, json_t **coder)
{
    xkv_pack_options o = xkv_pack_options_default();
    work w = {0};

    o.profile = XKV_PROFILE_DICT;
    o.dict = dict;
    for (int i = -1; i < plan->repeats; i++) { /* round -1 is the warm-up */
        xkv_entry *entry;
        int at = i < 0 ? 0 : i;
        t->square = fmax(t->square, bench_sgemm_square(plan, threads, 1));
        o.ratio = ratio;
        o.quality = 0;
        t->pack_ratio[at] = bench_time_pack(s, ctx, &o, report);
        o.ratio = 0;
        o.quality = xkv_dict_quality(dict, report->step);
        t->pack[at] = bench_time_pack(s, ctx, &o, report);
        entry = bench_open_entry(s, ctx);
        bench_try(ctx, xkv_entry_attach(ctx, entry, dict), s->name);
        t->unpack[at] = bench_time_unpack(s, ctx, entry);
        if (i == plan->repeats - 1) {
            w = count_work(ctx, entry, dict);
            *coder = coder_rates(plan, ctx, entry, w.symbols);
        }
        xkv_entry_close(ctx, entry);
    }
    return w;
}

static json_t *rate(double raw, double seconds, double best, double flops, double square)
{
    double gflops = flops / seconds / 1e9;

    return bench_json(json_pack("{s:f, s:f, s:f, s:f, s:f}", "seconds", seconds, "best_seconds", best, "mb_per_s",
                                raw / seconds / 1e6, "gflops", gflops, "percent_of_gemm", 100 * gflops / square));
}

json_t *bench_dict(bench_plan *plan, bench_subject *s, const xkv_dict *dict, double ratio, uint32_t threads)
{
    xkv_ctx *ctx = bench_context(threads);
    json_t *result = bench_json(json_object()), *coder = NULL;
    xkv_pack_report report;
    times t = {.square = 0};
    work w = time_all(plan, s, ctx, dict, threads, ratio, &report, &t, &coder);
    double pack = bench_median(t.pack, plan->repeats), unpack = bench_median(t.unpack, plan->repeats);
    double raw = (double)report.raw_bytes;

    bench_set_result(result, s, &report, threads);
    json_object_set_new(result, "profile", bench_json(json_string("dict")));
    json_object_set_new(result, "components", json_integer(report.components));
    json_object_set_new(result, "error_metric", json_real(report.error_metric));
    json_object_set_new(result, "sgemm_square_gflops", json_real(t.square));
    json_object_set_new(result, "pack", rate(raw, pack, t.pack[0], w.pack_flops, t.square));
    json_object_set_new(result, "pack_at_ratio_seconds", json_real(bench_median(t.pack_ratio, plan->repeats)));
    json_object_set_new(result, "unpack", rate(raw, unpack, t.unpack[0], w.unpack_flops, t.square));
    json_object_set_new(result, "rans", coder);
    bench_add_goal(plan, s, "dict pack, % of GEMM", threads, 60, w.pack_flops / pack / t.square / 1e7);
    bench_add_goal(plan, s, "dict unpack, % of GEMM", threads, 75, w.unpack_flops / unpack / t.square / 1e7);
    bench_add_goal(plan, s, "rANS decode, M symbols/s", 1, 250,
                   json_real_value(json_object_get(coder, "decode_msymbols_per_s")));
    bench_add_goal(plan, s, "rANS encode, M symbols/s", 1, 150,
                   json_real_value(json_object_get(coder, "encode_msymbols_per_s")));
    xkv_ctx_free(ctx);
    return result;
}
