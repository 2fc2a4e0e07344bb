/* bench.h - what the files of the benchmark share: time, memory, threads, and the four kinds of measurement. */
#ifndef XKV_BENCH_H
#define XKV_BENCH_H

#include "xkv/codec.h"

#include <jansson.h>
#include <stdbool.h>

/* What the command line asked for. */
typedef struct bench_plan {
    bool quick, only_files, restore;
    uint32_t query_heads; /* > 0: measure attention on the files, and nothing else */
    uint32_t tokens;      /* of the synthetic caches; 0: as each case says */
    int repeats;          /* each time is the median of so many, each ceiling the best */
    uint32_t threads[2];
    int thread_counts; /* how many of `threads` to try: one, and all */
    json_t *goals;     /* array, grows with the measurements */
} bench_plan;

/* --- Helpers; they end the program when something fails ----------------------------------------------------------- */

_Noreturn void bench_die(const char *fmt, ...) XKV_PRINTF(1, 2);
void *bench_alloc(size_t count, size_t size); /* zeroed, free() */
json_t *bench_json(json_t *value);            /* `value`, unless it is NULL */
xkv_ctx *bench_context(uint32_t threads);
void bench_try(const xkv_ctx *ctx, xkv_status status, const char *what);

double bench_now(void);                /* seconds of the monotonic clock */
double bench_median(double *x, int n); /* sorts x, so that x[0] is the least */

/* Note whether a goal was met: `found` on the right side of `limit`. */
void bench_goal(bench_plan *plan, const char *what, uint32_t threads, double limit, bool at_least, double found);

/* Run `task` for worker = 0 .. threads-1, all at once. */
typedef void (*bench_task_fn)(void *user, uint32_t worker);
void bench_parallel(uint32_t threads, bench_task_fn task, void *user);

/* --- ceilings.c: what the machine gives at best ------------------------------------------------------------------- */

/* GFLOP/s of one C[m,n] = A[m,k] B[k,n] (or A[k,m]^T B), after a warm-up; the best of `repeats`. */
double bench_sgemm(uint32_t threads, bool transposed, size_t m, size_t n, size_t k, int repeats);
/* The same for the square that ceilings refer to. */
double bench_sgemm_square(const bench_plan *plan, uint32_t threads, int repeats);
/* GB/s of copied bytes between two buffers larger than the caches. */
double bench_memcpy(const bench_plan *plan, uint32_t threads);
json_t *bench_ceilings(const bench_plan *plan);

/* The byte planes of a lossless entry's parts, for zstd alone with the library's parameters. `entry` says how planes
 * are grouped and cut. */
typedef struct bench_frames bench_frames;
bench_frames *bench_frames_create(const xkv_entry *entry, const xkv_view *views, int level);
void bench_frames_free(bench_frames *f);
double bench_frames_compress(bench_frames *f, uint32_t threads); /* seconds */
double bench_frames_decompress(bench_frames *f, uint32_t threads);

/* --- measure.c: pack and unpack in memory ------------------------------------------------------------------------- */

/* A cache to measure on, with room for its entry and for what comes back. */
typedef struct bench_subject {
    const char *name;
    const xkv_geometry *geometry;
    const xkv_view *views;
    xkv_view *restored;
    uint8_t *restored_data, *entry;
    size_t entry_size, entry_capacity;
} bench_subject;

bench_subject bench_subject_create(const char *name, const xkv_geometry *geometry, const xkv_view *views);
void bench_subject_free(bench_subject *s);
/* views[plane_count] of planes one behind the other, token-major, in `data`. */
void bench_contiguous_views(const xkv_geometry *geometry, uint8_t *data, xkv_view *views);

/* Seconds of one call. */
double bench_time_pack(bench_subject *s, xkv_ctx *ctx, const xkv_pack_options *o, xkv_pack_report *report);
double bench_time_unpack(const bench_subject *s, xkv_ctx *ctx, const xkv_entry *entry);
xkv_entry *bench_open_entry(const bench_subject *s, xkv_ctx *ctx); /* what was packed last */
/* What all results have; and a goal named after the subject. */
void bench_set_result(json_t *result, const bench_subject *s, const xkv_pack_report *r, uint32_t threads);
void bench_add_goal(bench_plan *plan, const bench_subject *s, const char *what, uint32_t threads, double limit,
                    double found);

json_t *bench_lossless(bench_plan *plan, bench_subject *s, uint32_t threads);
json_t *bench_svd(bench_plan *plan, bench_subject *s, uint32_t rank_k, uint32_t rank_v, uint32_t iterations,
                  uint32_t threads);

/* destinations.c: what restoring costs into other types and into pages; profile lossless or scalar. Planes must be K
 * and V of each layer, with rows of whole blocks. */
json_t *bench_destinations(const bench_plan *plan, bench_subject *s, uint32_t profile, uint32_t threads);

/* coded.c: with a dictionary that has all planes of the subject. */
json_t *bench_dict(bench_plan *plan, bench_subject *s, const xkv_dict *dict, double ratio, uint32_t threads);

/* Arithmetic that restoring an entry of all planes of its dictionary takes at least. */
double bench_unpack_flops(xkv_ctx *ctx, const xkv_entry *entry, const xkv_dict *dict);

/* restore.c: from a file, for 256 to 32k tokens; --tokens is the most. The subject's own entry is lost. */
json_t *bench_restore(bench_plan *plan, bench_subject *source, const xkv_dict *dict);

/* --- attention.c: attention over packed caches -------------------------------------------------------------------- */

typedef struct bench_attention_case {
    const char *name;
    const xkv_geometry *geometry;
    const xkv_view *views;
    const xkv_dict *dict;
    uint32_t query_heads;
} bench_attention_case;

/* An array: 2k, 8k and 32k tokens, or as the plan says. */
json_t *bench_attention(bench_plan *plan, const bench_attention_case *c);
/* The same on a synthetic cache of 8 KV heads of 64, with a dictionary made for it. */
json_t *bench_attention_synthetic(bench_plan *plan);

/* --- scaling.c: time and memory over the number of tokens, from file to file -------------------------------------- */

json_t *bench_scaling(bench_plan *plan);

#endif
