/* restore.c - restoring a packed prompt of growing length from a file, beside what else could be done: reading the raw
 * cache, from the page cache and from the disk. Long prompts repeat a genuine one at later positions. */
#include "bench.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { MAX_LENGTHS = 8, MAX_REPEATS = 99, PIECE = 1 << 22 };

/* --- A long cache ------------------------------------------------------------------------------------------------- */

typedef struct long_cache {
    xkv_geometry geometry;
    int32_t *positions;
    uint8_t *data;
    xkv_view *views;
} long_cache;

/* Token t is token t mod n of `source`, its K turned to position t. The lossless entry of the source does that. */
static void repeat_rows(xkv_ctx *ctx, const xkv_entry *entry, const long_cache *l)
{
    uint32_t n = xkv_entry_geometry(entry)->token_count, planes = l->geometry.plane_count;
    xkv_view *views = bench_alloc(planes, sizeof *views);

    for (uint32_t first = 0; first < l->geometry.token_count; first += n) {
        xkv_read_options o = xkv_read_options_default();
        uint32_t left = l->geometry.token_count - first;
        o.token_count = left < n ? left : n;
        o.positions = l->positions + first;
        for (uint32_t i = 0; i < planes; i++) {
            views[i] = l->views[i];
            views[i].data = (uint8_t *)views[i].data + first * views[i].token_stride;
        }
        bench_try(ctx, xkv_entry_read(ctx, entry, &o, views), "rows of the long cache");
    }
    free(views);
}

static long_cache make_long(xkv_ctx *ctx, const bench_subject *source, const xkv_entry *entry, uint32_t tokens)
{
    long_cache l = {.geometry = *source->geometry};

    l.positions = bench_alloc(tokens, sizeof *l.positions);
    for (uint32_t t = 0; t < tokens; t++)
        l.positions[t] = (int32_t)t;
    l.geometry.token_count = tokens;
    l.geometry.positions = l.positions;
    l.geometry.token_id_count = 0;
    l.data = bench_alloc((size_t)xkv_geometry_raw_bytes(&l.geometry), 1);
    l.views = bench_alloc(l.geometry.plane_count, sizeof *l.views);
    bench_contiguous_views(&l.geometry, l.data, l.views);
    repeat_rows(ctx, entry, &l);
    return l;
}

static void free_long(long_cache *l)
{
    free(l->positions);
    free(l->data);
    free(l->views);
}

/* --- Files -------------------------------------------------------------------------------------------------------- */

typedef struct temporary {
    char path[256];
} temporary;

static temporary write_file(const char *name, const void *data, size_t size)
{
    const char *folder = getenv("TMPDIR");
    temporary t;
    FILE *f;

    (void)snprintf(t.path, sizeof t.path, "%s/xkv-bench-%ld-%s", folder ? folder : "/tmp", (long)getpid(), name);
    f = fopen(t.path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fflush(f) != 0 || fsync(fileno(f)) != 0)
        bench_die("cannot write %s", t.path);
    (void)fclose(f);
    return t;
}

/* Have the next read of a file come from its disk. */
static void forget(const temporary *t)
{
    int fd = open(t->path, O_RDONLY);

    if (fd < 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0)
        bench_die("cannot drop %s from the page cache", t->path);
    close(fd);
}

/* Seconds to read a file into `data`, as an engine that stores raw caches would. */
static double read_raw(const temporary *t, uint8_t *data, size_t size)
{
    double start = bench_now();
    int fd = open(t->path, O_RDONLY);
    ssize_t n = 1;

    for (size_t done = 0; done < size && n > 0; done += (size_t)n)
        n = pread(fd, data + done, size - done < PIECE ? size - done : PIECE, (off_t)done);
    if (n <= 0)
        bench_die("cannot read %s", t->path);
    close(fd);
    return bench_now() - start;
}

/* --- One length --------------------------------------------------------------------------------------------------- */

typedef struct first_group {
    double start, seconds; /* until it was ready; 0: not yet */
    uint32_t planes_at;    /* the first group that holds planes */
} first_group;

static int note_ready(void *user, uint32_t group)
{
    first_group *f = user;

    if (group == f->planes_at)
        f->seconds = bench_now() - f->start;
    return 0;
}

typedef struct restores {
    double warm[MAX_REPEATS], first[MAX_REPEATS]; /* seconds of the whole, and until its first group */
    double rested_first[MAX_REPEATS];             /* until that of a restore after the processors have been idle */
    double cold;
    uint64_t peak;              /* bytes that the library took beside the destination */
    double square[MAX_REPEATS]; /* GFLOP/s of sgemm before each: the machine's speed of that moment */
} restores;

typedef struct measured {
    const char *name;
    const temporary *file;
    const xkv_dict *dict;
    const xkv_view *views; /* where it goes */
    uint32_t threads;
} measured;

static double restore_once(const measured *m, xkv_ctx *ctx, double *first)
{
    xkv_input input;
    xkv_entry *entry;
    xkv_read_options o = xkv_read_options_default();
    first_group f = {.start = bench_now()};
    xkv_group_info g;
    double seconds;

    bench_try(ctx, xkv_input_open(ctx, m->file->path, &input), m->name);
    bench_try(ctx, xkv_entry_open(ctx, &input, &entry), m->name);
    bench_try(ctx, xkv_entry_attach(ctx, entry, m->dict), m->name);
    xkv_entry_get_group(entry, 0, &g);
    f.planes_at = g.codec == XKV_CODEC_CROSS;
    o.group_ready = note_ready;
    o.group_ready_user = &f;
    bench_try(ctx, xkv_entry_read(ctx, entry, &o, m->views), m->name);
    seconds = bench_now() - f.start;
    *first = f.seconds;
    xkv_entry_close(ctx, entry);
    xkv_input_close(ctx, &input);
    return seconds;
}

/* OpenBLAS's own threads go on spinning for tens of milliseconds after a product, on the processors that are needed. */
static void rest(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
}

static restores measure(const bench_plan *plan, const measured *m)
{
    xkv_ctx *ctx = bench_context(m->threads);
    restores r = {.peak = 0};
    double unused;

    for (int i = -1; i < plan->repeats; i++) { /* round -1 is the warm-up */
        int at = i < 0 ? 0 : i;
        r.square[at] = bench_sgemm_square(plan, m->threads, 1);
        rest();
        (void)restore_once(m, ctx, &r.rested_first[at]); /* idle processors take milliseconds to be fast again */
        r.warm[at] = restore_once(m, ctx, &r.first[at]);
    }
    r.peak = xkv_ctx_memory_peak(ctx);
    forget(m->file);
    r.cold = restore_once(m, ctx, &unused);
    xkv_ctx_free(ctx);
    return r;
}

/* Bytes of the integers of the two largest groups: what may stay in memory beside a fixed amount. */
static uint64_t two_groups(const bench_subject *s, xkv_ctx *ctx, const xkv_entry *entry)
{
    uint64_t largest = 0, second = 0;
    xkv_entry_info info;

    xkv_entry_get_info(entry, &info);
    for (uint32_t i = 0; i < info.group_count; i++) {
        xkv_group_coding coding;
        bench_try(ctx, xkv_entry_read_coding(ctx, entry, i, &coding), s->name);
        uint64_t bytes = 2ull * coding.coded * s->geometry->token_count;
        second = bytes > largest ? largest : bytes > second ? bytes : second;
        largest = bytes > largest ? bytes : largest;
    }
    return largest + second;
}

static uint32_t groups_with_planes(const xkv_entry *entry)
{
    xkv_entry_info info;
    xkv_group_info g;

    xkv_entry_get_info(entry, &info);
    xkv_entry_get_group(entry, 0, &g);
    return info.group_count - (g.codec == XKV_CODEC_CROSS);
}

static json_t *result_of(bench_plan *plan, const bench_subject *s, uint32_t threads, restores *r, double flops,
                         uint32_t groups, uint64_t allowed)
{
    double share[MAX_REPEATS], percent[MAX_REPEATS], warm, first;

    for (int i = 0; i < plan->repeats; i++) {
        share[i] = r->first[i] / r->warm[i] * groups;
        percent[i] = flops / r->warm[i] / r->square[i] / 1e7;
    }
    warm = bench_median(r->warm, plan->repeats);
    first = bench_median(r->first, plan->repeats);
    bench_add_goal(plan, s, "restore from a file, % of GEMM", threads, 75, bench_median(percent, plan->repeats));
    bench_goal(plan, "first group, in shares of one group", threads, 1.3, false, bench_median(share, plan->repeats));
    bench_goal(plan, "memory beside destination and coefficients of two groups, MiB", threads, 64, false,
               r->peak > allowed ? (double)(r->peak - allowed) / (1 << 20) : 0);
    return bench_json(json_pack(
        "{s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I}", "threads", (int)threads, "seconds", warm,
        "percent_of_gemm", bench_median(percent, plan->repeats), "first_group_seconds", first, "first_group_share",
        bench_median(share, plan->repeats), "best_seconds", r->warm[0], "best_first_group_seconds", r->first[0],
        "rested_first_group_seconds", bench_median(r->rested_first, plan->repeats), "cold_seconds", r->cold,
        "memory_peak", (json_int_t)r->peak, "coefficients_of_two_groups", (json_int_t)allowed));
}

static json_t *measure_length(bench_plan *plan, const bench_subject *s, const xkv_dict *dict)
{
    xkv_ctx *ctx = bench_context(plan->threads[plan->thread_counts - 1]);
    size_t raw = (size_t)xkv_geometry_raw_bytes(s->geometry);
    temporary packed = write_file("packed", s->entry, s->entry_size);
    temporary plain = write_file("raw", s->views[0].data, raw);
    xkv_entry *entry = bench_open_entry(s, ctx);
    double flops, read_warm, read_cold;
    json_t *runs = bench_json(json_array());

    bench_try(ctx, xkv_entry_attach(ctx, entry, dict), s->name);
    flops = bench_unpack_flops(ctx, entry, dict);
    read_warm = read_raw(&plain, s->restored_data, raw); /* the second time is warm, pages and all */
    read_warm = read_raw(&plain, s->restored_data, raw);
    forget(&plain);
    read_cold = read_raw(&plain, s->restored_data, raw);
    for (int i = 0; i < plan->thread_counts; i++) {
        measured m = {s->name, &packed, dict, s->restored, plan->threads[i]};
        restores r = measure(plan, &m);
        json_array_append_new(runs, result_of(plan, s, plan->threads[i], &r, flops, groups_with_planes(entry),
                                              two_groups(s, ctx, entry)));
    }
    xkv_entry_close(ctx, entry);
    xkv_ctx_free(ctx);
    (void)unlink(packed.path);
    (void)unlink(plain.path);
    return bench_json(json_pack("{s:i, s:I, s:I, s:f, s:f, s:o}", "tokens", (int)s->geometry->token_count, "raw_bytes",
                                (json_int_t)raw, "packed_bytes", (json_int_t)s->entry_size, "read_raw_seconds",
                                read_warm, "read_raw_cold_seconds", read_cold, "restore", runs));
}

/* --- All lengths -------------------------------------------------------------------------------------------------- */

static uint32_t lengths_of(const bench_plan *plan, uint32_t *lengths)
{
    static const uint32_t all[] = {256, 1024, 4096, 8192, 16384, 32768};
    uint32_t count = 0, most = plan->quick ? 1024 : plan->tokens ? plan->tokens : 32768;

    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i] <= most)
            lengths[count++] = all[i];
    return count;
}

/* The first `tokens` tokens of the long cache, packed at the step that 1024 of them take for `ratio`. */
static json_t *pack_and_measure(bench_plan *plan, const char *name, const long_cache *l, const xkv_dict *dict,
                                uint32_t tokens, double *quality)
{
    xkv_geometry geometry = l->geometry;
    xkv_view *views = bench_alloc(geometry.plane_count, sizeof *views);
    uint8_t *data;
    xkv_pack_options o = xkv_pack_options_default();
    xkv_pack_report report;
    xkv_ctx *ctx = bench_context(plan->threads[plan->thread_counts - 1]);
    bench_subject s;
    json_t *result;

    geometry.token_count = tokens;
    data = bench_alloc((size_t)xkv_geometry_raw_bytes(&geometry), 1);
    bench_contiguous_views(&geometry, data, views);
    for (uint32_t i = 0; i < geometry.plane_count; i++)
        memcpy(views[i].data, l->views[i].data, (size_t)(tokens * views[i].token_stride));
    s = bench_subject_create(name, &geometry, views);
    o.profile = XKV_PROFILE_DICT;
    o.dict = dict;
    o.quality = *quality;
    o.ratio = *quality > 0 ? 0 : 16;
    bench_time_pack(&s, ctx, &o, &report);
    *quality = xkv_dict_quality(dict, report.step);
    xkv_ctx_free(ctx);
    result = measure_length(plan, &s, dict);
    bench_subject_free(&s);
    free(views);
    free(data);
    return result;
}

json_t *bench_restore(bench_plan *plan, bench_subject *source, const xkv_dict *dict)
{
    uint32_t lengths[MAX_LENGTHS], count = lengths_of(plan, lengths);
    xkv_ctx *ctx = bench_context(plan->threads[plan->thread_counts - 1]);
    xkv_pack_options o = xkv_pack_options_default();
    xkv_pack_report report;
    xkv_entry *entry;
    long_cache l;
    json_t *all = bench_json(json_array());
    double quality = 0;

    o.profile = XKV_PROFILE_LOSSLESS;
    bench_time_pack(source, ctx, &o, &report);
    entry = bench_open_entry(source, ctx);
    l = make_long(ctx, source, entry, lengths[count - 1]);
    xkv_entry_close(ctx, entry);
    xkv_ctx_free(ctx);
    json_decref(pack_and_measure(plan, source->name, &l, dict, count > 1 ? 1024 : 256, &quality)); /* for the step */
    json_array_clear(plan->goals);
    for (uint32_t i = 0; i < count; i++)
        json_array_append_new(all, pack_and_measure(plan, source->name, &l, dict, lengths[i], &quality));
    free_long(&l);
    return bench_json(json_pack("{s:s, s:o}", "cache", source->name, "lengths", all));
}
