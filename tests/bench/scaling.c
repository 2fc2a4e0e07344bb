/* scaling.c - pack and unpack files of growing length, each in a process of its own, so that its peak RSS is that of
 * the one job. The parent must be slim when it forks: a child starts with its parent's resident pages. */
#include "bench.h"
#include "synthetic.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LAYERS = 8, HEADS = 3, HEAD_DIM = 64, GROUP_LAYERS = 4, RANK_K = 76, RANK_V = 115, MAX_SIZES = 6, ROUNDS = 3 };

typedef struct job {
    uint32_t tokens, threads, profile;
    char engine_path[128], entry_path[128];
} job;

/* What a child sends to its parent, and what the system says about it. */
typedef struct outcome {
    double seconds;
    uint64_t memory_peak; /* the library's own count */
    uint64_t max_rss;     /* bytes, filled in by the parent */
} outcome;

typedef void (*child_fn)(xkv_ctx *ctx, const job *j);

/* --- Children ----------------------------------------------------------------------------------------------------- */

/* An outcome of `work`, from a new process. */
static outcome in_child(child_fn work, const job *j)
{
    outcome o = {0};
    struct rusage usage;
    int ends[2], status;
    pid_t pid;

    (void)fflush(NULL);
    if (pipe(ends) != 0 || (pid = fork()) < 0)
        bench_die("no pipe or process for the scaling test");
    if (pid == 0) {
        xkv_ctx *ctx = bench_context(j->threads);
        double start = bench_now();
        work(ctx, j);
        o = (outcome){.seconds = bench_now() - start, .memory_peak = xkv_ctx_memory_peak(ctx)};
        _exit(write(ends[1], &o, sizeof o) == sizeof o ? 0 : 1);
    }
    close(ends[1]);
    if (read(ends[0], &o, sizeof o) != sizeof o || wait4(pid, &status, 0, &usage) != pid || status != 0)
        bench_die("a process of the scaling test failed");
    close(ends[0]);
    o.max_rss = (uint64_t)usage.ru_maxrss * 1024;
    return o;
}

static void copy_literals(const xkv_framing *f, uint8_t *image)
{
    const uint8_t *literals = f->literals;

    for (uint32_t i = 0; i < f->segment_count; i++) {
        if (f->segments[i].plane_count == 0) {
            memcpy(image, literals, (size_t)f->segments[i].size);
            literals += f->segments[i].size;
        }
        image += f->segments[i].size;
    }
}

/* A safetensors file with a synthetic cache. */
static void make_file(xkv_ctx *ctx, const job *j)
{
    synthetic s = synthetic_create(j->tokens, LAYERS, HEADS, HEAD_DIM);
    xkv_view views[2 * LAYERS];
    xkv_framing *framing;
    xkv_file *file;
    uint8_t *image;

    bench_try(ctx, xkv_framing_safetensors(ctx, &s.geometry, XKV_LAYOUT_TOKEN_MAJOR, &framing), "framing");
    bench_try(ctx, xkv_file_create(ctx, j->engine_path, 1, &file), j->engine_path);
    bench_try(ctx, xkv_file_map(ctx, file, framing->source_size, &image), j->engine_path);
    copy_literals(framing, image);
    bench_try(ctx, xkv_framing_views(ctx, framing, &s.geometry, image, views), "views");
    synthetic_fill(&s, GROUP_LAYERS, SYNTHETIC_ROOT, views);
    bench_try(ctx, xkv_file_commit(ctx, file), j->engine_path);
    xkv_framing_free(ctx, framing);
    synthetic_free(&s);
}

static xkv_model *make_model(xkv_ctx *ctx)
{
    xkv_rope_options o = xkv_rope_options_default();
    xkv_model *model;

    o.base = 10000;
    o.dims = HEAD_DIM;
    o.head_dim = HEAD_DIM;
    o.style = XKV_ROPE_HALF_SPLIT;
    bench_try(ctx, xkv_model_from_options(ctx, LAYERS, &o, &model), "model");
    return model;
}

static void pack_file(xkv_ctx *ctx, const job *j)
{
    xkv_pack_options o = xkv_pack_options_default();
    xkv_model *model = make_model(ctx);

    o.profile = j->profile;
    o.model = model;
    o.group_layers = GROUP_LAYERS;
    o.iterations = 1;
    if (j->profile == XKV_PROFILE_SVD) {
        o.rank_k = RANK_K;
        o.rank_v = RANK_V;
    }
    bench_try(ctx, xkv_pack_file(ctx, j->engine_path, j->entry_path, 1, &o, NULL), j->engine_path);
    xkv_model_free(ctx, model);
}

static void unpack_file(xkv_ctx *ctx, const job *j)
{
    bench_try(ctx, xkv_unpack_file(ctx, j->entry_path, j->engine_path, 1, 0), j->entry_path);
}

/* --- Measurements ------------------------------------------------------------------------------------------------- */

/* Median seconds and largest memory of several runs. */
static outcome repeat(child_fn work, const job *j, int rounds)
{
    double seconds[ROUNDS];
    outcome most = {0};

    for (int i = 0; i < rounds; i++) {
        outcome o = in_child(work, j);
        seconds[i] = o.seconds;
        if (o.memory_peak > most.memory_peak)
            most.memory_peak = o.memory_peak;
        if (o.max_rss > most.max_rss)
            most.max_rss = o.max_rss;
    }
    most.seconds = bench_median(seconds, rounds);
    return most;
}

static json_t *outcome_json(const outcome *o)
{
    return bench_json(json_pack("{s:f, s:I, s:I}", "seconds", o->seconds, "memory_peak", (json_int_t)o->memory_peak,
                                "max_rss", (json_int_t)o->max_rss));
}

static uint64_t raw_bytes(uint32_t tokens)
{
    return 2ull * LAYERS * HEADS * HEAD_DIM * 2 * tokens;
}

/* raw input mapped + 2 groups in f32 + 64 MiB */
static uint64_t rss_bound(uint32_t tokens)
{
    return raw_bytes(tokens) + 2 * 4ull * GROUP_LAYERS * HEADS * HEAD_DIM * tokens + (64u << 20);
}

/* The slope of log(seconds) over log(tokens): 1 is linear. */
static double exponent(const uint32_t *tokens, const double *seconds, int n)
{
    double x = 0, y = 0, xx = 0, xy = 0;

    for (int i = 0; i < n; i++) {
        double a = log(tokens[i]), b = log(seconds[i]);
        x += a;
        y += b;
        xx += a * a;
        xy += a * b;
    }
    return (n * xy - x * y) / (n * xx - x * x);
}

static json_t *measure_size(bench_plan *plan, job *j, double *pack_seconds, double *unpack_seconds)
{
    int rounds = plan->quick ? 1 : ROUNDS;
    outcome pack = repeat(pack_file, j, rounds), unpack = repeat(unpack_file, j, rounds);

    *pack_seconds = pack.seconds;
    *unpack_seconds = unpack.seconds;
    bench_goal(plan, "pack: peak RSS / (raw input + 2 groups in f32 + 64 MiB)", j->threads, 1, false,
               (double)pack.max_rss / (double)rss_bound(j->tokens));
    return bench_json(json_pack("{s:i, s:I, s:I, s:o, s:o}", "tokens", (int)j->tokens, "raw_bytes",
                                (json_int_t)raw_bytes(j->tokens), "rss_bound", (json_int_t)rss_bound(j->tokens), "pack",
                                outcome_json(&pack), "unpack", outcome_json(&unpack)));
}

static json_t *measure_profile(bench_plan *plan, job *j, const uint32_t *tokens, int n)
{
    json_t *sizes = bench_json(json_array());
    double pack[MAX_SIZES], unpack[MAX_SIZES], slope;

    for (int i = 0; i < n; i++) {
        j->tokens = tokens[i];
        (void)in_child(make_file, j);
        json_array_append_new(sizes, measure_size(plan, j, &pack[i], &unpack[i]));
    }
    slope = exponent(tokens, pack, n);
    bench_goal(plan, "pack: exponent of seconds over tokens", j->threads, 1.1, false, slope);
    return bench_json(json_pack(
        "{s:s, s:i, s:f, s:f, s:o}", "profile", j->profile == XKV_PROFILE_SVD ? "svd" : "lossless", "threads",
        (int)j->threads, "pack_exponent", slope, "unpack_exponent", exponent(tokens, unpack, n), "sizes", sizes));
}

json_t *bench_scaling(bench_plan *plan)
{
    static const uint32_t full[MAX_SIZES] = {1024, 2048, 4096, 8192, 16384, 32768}, quick[2] = {256, 512};
    const char *base = getenv("TMPDIR");
    char folder[96];
    json_t *all = bench_json(json_array());
    job j = {.threads = plan->threads[plan->thread_counts - 1]};

    if (snprintf(folder, sizeof folder, "%s/xkv-bench-XXXXXX", base ? base : "/tmp") >= (int)sizeof folder ||
        !mkdtemp(folder))
        bench_die("cannot make a folder in %s", base ? base : "/tmp");
    (void)snprintf(j.engine_path, sizeof j.engine_path, "%s/cache.safetensors", folder);
    (void)snprintf(j.entry_path, sizeof j.entry_path, "%s/cache.xkv", folder);
    for (j.profile = XKV_PROFILE_LOSSLESS; j.profile <= XKV_PROFILE_SVD; j.profile++)
        json_array_append_new(all, measure_profile(plan, &j, plan->quick ? quick : full, plan->quick ? 2 : MAX_SIZES));
    (void)unlink(j.engine_path);
    (void)unlink(j.entry_path);
    (void)rmdir(folder);
    return all;
}
