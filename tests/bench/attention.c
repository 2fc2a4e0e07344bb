/* attention.c - attention over a packed cache: direct, over coefficients or restored rows that are held, beside
 * restoring first and beside raw rows in memory. Long caches repeat each row of a short one: to the codec, which looks
 * at one row at a time, they are as good as others. */
#include "bench.h"
#include "synthetic.h"

#include "engine_file.h"
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* --- Long caches -------------------------------------------------------------------------------------------------- */

typedef struct long_cache {
    xkv_geometry geometry;
    int32_t *positions;
    uint32_t *rows;
    xkv_view *views;
} long_cache;

static long_cache lengthen(const xkv_geometry *g, const xkv_view *views, uint32_t tokens)
{
    long_cache c = {.geometry = *g,
                    .positions = bench_alloc(tokens, sizeof *c.positions),
                    .rows = bench_alloc(tokens, sizeof *c.rows),
                    .views = bench_alloc(g->plane_count, sizeof *c.views)};

    for (uint32_t t = 0; t < tokens; t++) {
        uint32_t from = (uint32_t)((uint64_t)t * g->token_count / tokens);
        c.positions[t] = g->positions[from];
        c.rows[t] = views[0].rows ? views[0].rows[from] : from;
    }
    for (uint32_t i = 0; i < g->plane_count; i++) {
        c.views[i] = views[i];
        c.views[i].rows = c.rows;
    }
    c.geometry.positions = c.positions;
    c.geometry.token_count = tokens;
    c.geometry.token_id_count = 0;
    return c;
}

static void free_long(long_cache *c)
{
    free(c->positions);
    free(c->rows);
    free(c->views);
}

/* --- An entry in an unnamed file, whose reads are counted --------------------------------------------------------- */

typedef struct counted {
    xkv_input input;
    uint64_t bytes;
} counted;

static xkv_status counted_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    counted *c = user;

    __atomic_add_fetch(&c->bytes, size, __ATOMIC_RELAXED);
    return c->input.read(c->input.user, ctx, offset, dst, size);
}

/* One layer of one group, and what is asked of it. */
typedef struct subject {
    const bench_plan *plan;
    xkv_ctx *packer;
    xkv_file *file;
    counted counted;
    xkv_entry *entry;
    const xkv_dict *dict;
    xkv_pack_report report;
    uint32_t tokens, layer, group, layers; /* group of the entry that the layer is in, and its layers */
    uint32_t components, leading, stage;   /* coded ones, those that the stage adds to, and its own */
    uint32_t heads, kv_heads, dim;
    uint32_t width;    /* of K and of V */
    uint16_t *half[2]; /* restored K and V, in f16 */
    float *single[2];  /* the same in f32 */
    float *q, *output, *lse;
} subject;

static void pack(subject *s, const long_cache *c)
{
    xkv_pack_options o = xkv_pack_options_default();
    xkv_output output;
    xkv_input input;

    o.profile = XKV_PROFILE_DICT;
    o.dict = s->dict;
    o.ratio = 16;
    bench_try(s->packer, xkv_file_create(s->packer, NULL, 0, &s->file), "temporary file");
    output = xkv_file_output(s->file);
    bench_try(s->packer, xkv_pack(s->packer, &c->geometry, c->views, NULL, NULL, 0, &o, &output, &s->report), "pack");
    s->counted.input = xkv_file_input(s->file);
    input = s->counted.input;
    input.user = &s->counted;
    input.read = counted_read;
    input.prefetch = NULL;
    bench_try(s->packer, xkv_entry_open(s->packer, &input, &s->entry), "entry");
    bench_try(s->packer, xkv_entry_attach(s->packer, s->entry, s->dict), "dictionary");
}

/* The group in the middle, and its first layer. */
static void choose_layer(subject *s)
{
    const xkv_geometry *g = xkv_entry_geometry(s->entry);
    xkv_entry_info info;
    xkv_group_info group;
    const xkv_plane *p;

    xkv_entry_get_info(s->entry, &info);
    s->group = info.group_count / 2;
    xkv_entry_get_group(s->entry, s->group, &group);
    if (group.codec != XKV_CODEC_DICT)
        bench_die("a group was not coded with the dictionary");
    p = &g->planes[group.planes[0]];
    s->layer = p->layer;
    s->layers = group.plane_count / 2;
    s->kv_heads = p->heads;
    s->dim = p->head_dim;
    s->width = p->heads * p->head_dim;
}

/* K and V of the layer in one array each, as f16; those of other layers of the group into a row that is written over.
 */
static double read_group(subject *s, xkv_ctx *ctx)
{
    const xkv_geometry *g = xkv_entry_geometry(s->entry);
    size_t plane = (size_t)s->tokens * s->width;
    uint16_t *all = bench_alloc(plane * 2 * s->layers, sizeof *all);
    xkv_view *views = bench_alloc(g->plane_count, sizeof *views);
    xkv_read_options o = xkv_read_options_default();
    double start;
    uint32_t next = 0;

    for (uint32_t i = 0; i < g->plane_count; i++)
        if (g->planes[i].layer - s->layer < s->layers)
            views[i] = (xkv_view){.data = all + plane * next++,
                                  .token_stride = 2 * (int64_t)s->width,
                                  .head_stride = 2 * (int64_t)s->dim,
                                  .dim_stride = 2,
                                  .dtype = XKV_F16};
    o.first_group = s->group;
    o.group_count = 1;
    for (size_t i = 0; i < plane * 2 * s->layers; i += 1024) /* have every page in memory */
        all[i] = 1;
    start = bench_now();
    bench_try(ctx, xkv_entry_read(ctx, s->entry, &o, views), "restore");
    start = bench_now() - start;
    memcpy(s->half[0], all, 2 * plane);
    memcpy(s->half[1], all + plane, 2 * plane);
    free(views);
    free(all);
    return start;
}

static void prepare(subject *s, xkv_ctx *ctx, uint32_t most)
{
    size_t plane = (size_t)s->tokens * s->width;
    uint64_t state = 1;

    s->q = bench_alloc((size_t)most * s->heads * s->dim, sizeof *s->q);
    s->output = bench_alloc((size_t)most * s->heads * s->dim, sizeof *s->output);
    s->lse = bench_alloc((size_t)most * s->heads, sizeof *s->lse);
    for (int i = 0; i < 2; i++) {
        s->half[i] = bench_alloc(plane, sizeof *s->half[i]);
        s->single[i] = bench_alloc(plane, sizeof *s->single[i]);
    }
    (void)read_group(s, ctx);
    for (int i = 0; i < 2; i++)
        xkv_kernels_cpu()->to_f32(XKV_F16, s->half[i], s->single[i], plane);
    for (size_t i = 0; i < (size_t)most * s->heads * s->dim; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        s->q[i] = (float)(state >> 40) / (float)(1 << 23) - 1;
    }
}

static void free_subject(subject *s)
{
    for (int i = 0; i < 2; i++) {
        free(s->half[i]);
        free(s->single[i]);
    }
    free(s->q);
    free(s->output);
    free(s->lse);
    xkv_entry_close(s->packer, s->entry);
    xkv_file_abort(s->packer, s->file);
    xkv_ctx_free(s->packer);
}

/* --- Raw rows: one KV head after the other, as OpenBLAS likes it -------------------------------------------------- */

typedef struct raw {
    const subject *s;
    bool half;
    uint32_t n, threads;
    float *scores, *tile, *q; /* per thread: [n * group][tokens], [XKV_TILE_ROWS][dim], [n * group][dim] */
    float *output;            /* [kv_heads][n * group][dim] */
} raw;

static const float *tile_of(const raw *r, int which, uint32_t head, uint32_t t, uint32_t count, float *tile, size_t *ld)
{
    const subject *s = r->s;

    *ld = r->half ? s->dim : s->width;
    if (!r->half)
        return s->single[which] + (size_t)t * s->width + (size_t)head * s->dim;
    for (uint32_t i = 0; i < count; i++)
        xkv_kernels_cpu()->to_f32(XKV_F16, s->half[which] + (size_t)(t + i) * s->width + (size_t)head * s->dim,
                                  tile + (size_t)i * s->dim, s->dim);
    return tile;
}

static void soften(float *x, size_t n)
{
    float largest = -INFINITY;
    double sum = 0;

    for (size_t i = 0; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    for (size_t i = 0; i < n; i++)
        sum += (double)(x[i] = expf(x[i] - largest));
    for (size_t i = 0; i < n; i++)
        x[i] = (float)((double)x[i] / sum);
}

static void raw_head(const raw *r, uint32_t worker, uint32_t head)
{
    const xkv_kernels *k = xkv_kernels_cpu();
    const subject *s = r->s;
    size_t m = (size_t)r->n * (s->heads / s->kv_heads), step = r->half ? XKV_TILE_ROWS : s->tokens, ld;
    float *scores = r->scores + worker * m * s->tokens, *tile = r->tile + (size_t)worker * XKV_TILE_ROWS * s->dim;
    float *output = r->output + head * m * s->dim;

    for (uint32_t t = 0; t < s->tokens; t += (uint32_t)step) {
        uint32_t count = (uint32_t)xkv_min64(step, s->tokens - t);
        const float *rows = tile_of(r, 0, head, t, count, tile, &ld);
        k->gemm_nt(m, count, s->dim, s->q + head * m * s->dim, s->dim, rows, ld, 0, scores + t, s->tokens);
    }
    for (size_t i = 0; i < m; i++)
        soften(scores + i * s->tokens, s->tokens);
    for (uint32_t t = 0; t < s->tokens; t += (uint32_t)step) {
        uint32_t count = (uint32_t)xkv_min64(step, s->tokens - t);
        const float *rows = tile_of(r, 1, head, t, count, tile, &ld);
        k->gemm_nn(m, s->dim, count, scores + t, s->tokens, rows, ld, t == 0 ? 0 : 1, output, s->dim);
    }
}

static void raw_share(void *user, uint32_t worker)
{
    const raw *r = user;

    for (uint32_t head = worker; head < r->s->kv_heads; head += r->threads)
        raw_head(r, worker, head);
}

static double time_raw(const subject *s, bool half, uint32_t n, uint32_t threads)
{
    size_t m = (size_t)n * (s->heads / s->kv_heads);
    raw r = {.s = s,
             .half = half,
             .n = n,
             .threads = threads,
             .scores = bench_alloc(threads * m * s->tokens, sizeof *r.scores),
             .tile = bench_alloc((size_t)threads * XKV_TILE_ROWS * s->dim, sizeof *r.tile),
             .output = bench_alloc(s->kv_heads * m * s->dim, sizeof *r.output)};
    double best = INFINITY;

    for (int i = -1; i < s->plan->repeats; i++) { /* round -1 is the warm-up */
        double start = bench_now();
        bench_parallel(threads, raw_share, &r);
        best = i < 0 ? best : fmin(best, bench_now() - start);
    }
    free(r.scores);
    free(r.tile);
    free(r.output);
    return best;
}

/* --- The library -------------------------------------------------------------------------------------------------- */

static xkv_attention *open_hold(const subject *s, xkv_ctx *ctx, uint32_t layers, uint32_t hold)
{
    xkv_attention_options o = xkv_attention_options_default();
    xkv_attention *a;

    o.first_layer = s->layer;
    o.layer_count = layers;
    o.hold = hold;
    bench_try(ctx, xkv_attention_open(ctx, s->entry, &o, &a), "open");
    return a;
}

static void attend(const subject *s, xkv_ctx *ctx, const xkv_attention *a, uint32_t n)
{
    xkv_queries q = {.data = s->q, .count = n, .heads = s->heads};

    bench_try(ctx, xkv_attend(ctx, a, s->layer, &q, NULL, s->output, s->lse), "attend");
}

static double time_attend(const subject *s, xkv_ctx *ctx, const xkv_attention *a, uint32_t n)
{
    double best = INFINITY;

    for (int i = -1; i < s->plan->repeats; i++) {
        double start = bench_now();
        attend(s, ctx, a, n);
        best = i < 0 ? best : fmin(best, bench_now() - start);
    }
    return best;
}

static double time_open(const subject *s, xkv_ctx *ctx, uint32_t hold)
{
    double best = INFINITY;

    for (int i = -1; i < s->plan->repeats; i++) {
        double start = bench_now();
        xkv_attention *a = open_hold(s, ctx, s->layers, hold);
        best = i < 0 ? best : fmin(best, bench_now() - start);
        xkv_attention_close(ctx, a);
    }
    return best;
}

/* What one call of `n` queries allocates at most, opening included, and what it reads. */
static json_t *memory_of(subject *s, uint32_t threads, uint32_t n, uint32_t hold)
{
    xkv_ctx *ctx = bench_context(threads);
    double raw_layer = 4.0 * s->tokens * s->width, peak;
    uint64_t before = s->counted.bytes;
    xkv_attention *a = open_hold(s, ctx, 1, hold);
    xkv_attention_info info;

    attend(s, ctx, a, n);
    xkv_attention_get_info(a, &info);
    xkv_attention_close(ctx, a);
    peak = (double)xkv_ctx_memory_peak(ctx);
    xkv_ctx_free(ctx);
    return bench_json(json_pack("{s:i, s:i, s:I, s:f, s:I, s:I}", "hold", (int)hold, "queries", (int)n, "peak_bytes",
                                (json_int_t)peak, "of_raw_layer", peak / raw_layer, "held_bytes",
                                (json_int_t)info.held_bytes, "bytes_read", (json_int_t)(s->counted.bytes - before)));
}

/* --- One length, one number of threads ---------------------------------------------------------------------------- */

typedef struct holds {
    xkv_attention *a[XKV_HOLD_ROWS + 1];
    double open[XKV_HOLD_ROWS + 1], read;
} holds;

/* What cannot be left out of one call over coefficients, as a share of what sgemm gives. */
static double percent_of_gemm(const subject *s, uint32_t n, double seconds, double square)
{
    double slots = s->components + s->leading, products = slots * s->width; /* K */

    products += fmin((double)n * s->heads * slots, slots * s->width + (double)n * s->heads * s->dim); /* V */
    products += (double)n * s->heads * s->dim;
    return 100 * 2 * s->tokens * products / seconds / 1e9 / square;
}

static json_t *measure_count(subject *s, xkv_ctx *ctx, const holds *h, uint32_t n, uint32_t threads)
{
    double file = time_attend(s, ctx, h->a[XKV_HOLD_NOTHING], n);
    double coefficients = time_attend(s, ctx, h->a[XKV_HOLD_COEFFICIENTS], n);
    double rows = time_attend(s, ctx, h->a[XKV_HOLD_ROWS], n), square = bench_sgemm_square(s->plan, threads, 1);
    double half = time_raw(s, true, n, threads), single = time_raw(s, false, n, threads), layers = s->layers;
    json_t *one = json_pack("{s:f, s:f, s:f, s:f, s:f, s:f}", "direct_ms", 1e3 * file, "coefficients_ms",
                            1e3 * coefficients, "rows_ms", 1e3 * rows, "raw_f16_ms", 1e3 * half, "raw_f32_ms",
                            1e3 * single, "restore_then_attend_ms", 1e3 * (h->read + half));
    json_t *all = json_pack("{s:f, s:f, s:f}", "direct_ms", 1e3 * layers * file, "coefficients_ms",
                            1e3 * (h->open[XKV_HOLD_COEFFICIENTS] + layers * coefficients), "restore_then_attend_ms",
                            1e3 * (h->read + layers * half));

    return bench_json(json_pack("{s:i, s:o, s:o, s:f, s:f, s:f}", "queries", (int)n, "layer", bench_json(one),
                                "group_once", bench_json(all), "sgemm_square_gflops", square,
                                "coefficients_percent_of_gemm", percent_of_gemm(s, n, coefficients, square),
                                "raw_f16_gb_per_s", 4e-9 * s->tokens * s->width / half));
}

static void add_goals(bench_plan *plan, const json_t *counts, const json_t *memory, uint32_t threads)
{
    double slowest = 0;

    for (size_t i = 0; i < json_array_size(counts); i++) {
        const json_t *c = json_array_get(counts, i);
        if (json_integer_value(json_object_get(c, "queries")) <= 8)
            slowest = fmax(slowest,
                           json_real_value(json_object_get(json_object_get(c, "layer"), "direct_ms")) /
                               json_real_value(json_object_get(json_object_get(c, "layer"), "restore_then_attend_ms")));
    }
    bench_goal(plan, "attention: direct over restore-then-attend, up to 8 queries", threads, 1, false, slowest);
    bench_goal(plan, "attention: memory of one query over the raw layer", threads, 0.125, false,
               json_real_value(json_object_get(json_array_get(memory, 0), "of_raw_layer")));
}

static json_t *measure_threads(bench_plan *plan, subject *s, uint32_t threads)
{
    static const uint32_t all[] = {1, 2, 4, 8, 16, 32, 64};
    xkv_ctx *ctx = bench_context(threads);
    json_t *counts = bench_json(json_array()), *memory = bench_json(json_array());
    holds h = {.read = INFINITY};

    for (int i = 0; i < plan->repeats; i++)
        h.read = fmin(h.read, read_group(s, ctx));
    for (uint32_t hold = XKV_HOLD_NOTHING; hold <= XKV_HOLD_ROWS; hold++) {
        h.open[hold] = time_open(s, ctx, hold);
        h.a[hold] = open_hold(s, ctx, s->layers, hold);
        json_array_append_new(memory, memory_of(s, threads, 1, hold));
        json_array_append_new(memory, memory_of(s, threads, 8, hold));
    }
    for (size_t i = 0; i < sizeof all / sizeof *all && !(plan->quick && i > 1); i++)
        json_array_append_new(counts, measure_count(s, ctx, &h, all[i], threads));
    for (uint32_t hold = XKV_HOLD_NOTHING; hold <= XKV_HOLD_ROWS; hold++)
        xkv_attention_close(ctx, h.a[hold]);
    xkv_ctx_free(ctx);
    if (s->tokens >= 8192)
        add_goals(plan, counts, memory, threads);
    return bench_json(json_pack("{s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:o, s:o}", "threads", (int)threads,
                                "sgemm_square_gflops", bench_sgemm_square(plan, threads, plan->repeats),
                                "memcpy_gb_per_s", bench_memcpy(plan, threads), "restore_group_ms", 1e3 * h.read,
                                "open_nothing_ms", 1e3 * h.open[XKV_HOLD_NOTHING], "open_coefficients_ms",
                                1e3 * h.open[XKV_HOLD_COEFFICIENTS], "open_rows_ms", 1e3 * h.open[XKV_HOLD_ROWS],
                                "memory", memory, "calls", counts));
}

/* How the layer's group is coded. */
static void count_components(subject *s)
{
    xkv_group_coding coding;
    xkv_group_info first;
    xkv_dict_info info;

    bench_try(s->packer, xkv_entry_read_coding(s->packer, s->entry, s->group, &coding), "coding");
    s->components = coding.coded;
    xkv_entry_get_group(s->entry, 0, &first);
    xkv_dict_get_info(s->dict, &info);
    if (first.codec != XKV_CODEC_CROSS)
        return;
    bench_try(s->packer, xkv_entry_read_coding(s->packer, s->entry, 0, &coding), "coding");
    s->stage = coding.coded;
    s->leading = xkv_dict_leading(s->dict, s->group - 1); /* entry and dictionary have the same groups */
}

static json_t *measure_length(bench_plan *plan, const bench_attention_case *c, uint32_t tokens)
{
    subject s = {.plan = plan,
                 .packer = bench_context(plan->threads[plan->thread_counts - 1]),
                 .dict = c->dict,
                 .tokens = tokens,
                 .heads = c->query_heads};
    long_cache cache = lengthen(c->geometry, c->views, tokens);
    json_t *all = bench_json(json_array()), *result;

    pack(&s, &cache);
    choose_layer(&s);
    count_components(&s);
    prepare(&s, s.packer, 64);
    for (int i = 0; i < plan->thread_counts; i++)
        json_array_append_new(all, measure_threads(plan, &s, plan->threads[i]));
    result = bench_json(json_pack(
        "{s:s, s:i, s:f, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:I, s:o}", "cache", c->name, "tokens", (int)tokens,
        "ratio", s.report.ratio, "query_heads", (int)s.heads, "kv_heads", (int)s.kv_heads, "head_dim", (int)s.dim,
        "group_layers", (int)s.layers, "components", (int)s.components, "leading", (int)s.leading, "stage_components",
        (int)s.stage, "raw_layer_bytes", (json_int_t)(4ull * tokens * s.width), "threads", all));
    free_long(&cache);
    free_subject(&s);
    return result;
}

json_t *bench_attention(bench_plan *plan, const bench_attention_case *c)
{
    static const uint32_t lengths[] = {2048, 8192, 32768};
    json_t *all = bench_json(json_array());

    if (plan->quick || plan->tokens) {
        json_array_append_new(all, measure_length(plan, c, plan->tokens ? plan->tokens : 512));
        return all;
    }
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        json_array_append_new(all, measure_length(plan, c, lengths[i]));
    return all;
}

/* --- Synthetic caches --------------------------------------------------------------------------------------------- */

/* A dictionary trained on the very cache: it is only about speed. */
static xkv_dict *train(xkv_ctx *ctx, const synthetic *s, xkv_view *views)
{
    xkv_train_options o = xkv_train_options_default();
    const xkv_cache cache = {.geometry = s->geometry, .views = views}, *list = &cache;
    xkv_file *file;
    xkv_output output;
    xkv_input input;
    xkv_dict *dict;

    o.zstd_level = 1;
    bench_try(ctx, xkv_file_create(ctx, NULL, 0, &file), "temporary file");
    output = xkv_file_output(file);
    bench_try(ctx, xkv_train(ctx, &list, 1, &o, &output), "train");
    input = xkv_file_input(file);
    bench_try(ctx, xkv_dict_open(ctx, &input, 1, &dict), "dictionary");
    xkv_file_abort(ctx, file);
    return dict;
}

json_t *bench_attention_synthetic(bench_plan *plan)
{
    uint32_t heads = plan->quick ? 1 : 8, tokens = plan->quick ? 400 : 3000;
    synthetic s = synthetic_create(tokens, 8, heads, 64);
    uint8_t *data = bench_alloc((size_t)xkv_geometry_raw_bytes(&s.geometry), 1);
    xkv_view *views = bench_alloc(s.geometry.plane_count, sizeof *views);
    xkv_ctx *ctx = bench_context(plan->threads[plan->thread_counts - 1]);
    bench_attention_case c = {.geometry = &s.geometry, .views = views, .query_heads = 4 * heads};
    char name[96];
    xkv_dict *dict;
    json_t *result;

    bench_contiguous_views(&s.geometry, data, views);
    synthetic_fill(&s, 4, SYNTHETIC_INVERSE, views);
    (void)snprintf(name, sizeof name, "synthetic %s, 8 layers x %u", synthetic_spectrum_name(SYNTHETIC_INVERSE),
                   64 * heads);
    c.name = name;
    c.dict = dict = train(ctx, &s, views);
    result = bench_attention(plan, &c);
    xkv_dict_close(ctx, dict);
    xkv_ctx_free(ctx);
    synthetic_free(&s);
    free(views);
    free(data);
    return result;
}
