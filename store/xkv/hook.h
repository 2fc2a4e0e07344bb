/*
 * xkv/hook.h - what an inference engine calls to reuse prefixes: match, load, save.
 *
 *   match   before prefill: how many tokens could be loaded, how long that would take, and whether it beats computing
 *   load    group by group into the engine's own cache, each group usable as soon as it is there
 *   save    after prefill: copies the cache and returns; packing and storing happen on threads of the hook
 *
 * Nothing here may make an engine fail: whatever goes wrong is a miss, which costs a prefill, and is counted.
 */
#ifndef XKV_HOOK_H
#define XKV_HOOK_H

#include "xkv/store.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Threads: shared by all, each call with its own context. */
typedef struct xkv_hook xkv_hook;

typedef struct xkv_hook_options {
    size_t struct_size;
    xkv_store *store;             /* open, read-write for save; outlives the hook */
    xkv_namespace ns;             /* of all that is matched and saved */
    const xkv_pack_options *pack; /* copied, what it points to outlives the hook; NULL: defaults (lossless). Its
                                     progress function is not called */
    uint64_t ttl;                 /* of what is saved, seconds; 0: for ever */
    uint32_t min_tokens;          /* shorter prefixes are neither matched nor saved; default 64 */
    uint32_t workers;             /* threads that pack, 1 .. 64; default 1 */
    uint32_t worker_threads;      /* threads of one packing, 0: all cores; default 1 */
    uint64_t queue_bytes;         /* copies of caches waiting or being packed, at most; default 1 GiB */
    uint32_t wait;                /* save when there is no room: 0 refuses (default), else it waits for room */
    double recompute_rate;        /* tokens the engine prefills in a second; 0: unknown, every match is worth it */
} xkv_hook_options;

static inline xkv_hook_options xkv_hook_options_default(void)
{
    xkv_hook_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.min_tokens = 64;
    o.workers = 1;
    o.worker_threads = 1;
    o.queue_bytes = (uint64_t)1 << 30;
    return o;
}

/* Errors: ARGUMENT, MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_hook_create(xkv_ctx *ctx, const xkv_hook_options *options, xkv_hook **hook_p);

/* Drops what is queued and waits for what is being packed; call xkv_hook_flush() first to keep it. No other call may be
 * running. Accepts NULL. */
XKV_API void xkv_hook_free(xkv_ctx *ctx, xkv_hook *hook);

typedef struct xkv_hook_match_info {
    xkv_match match;          /* what the store says */
    double load_seconds;      /* expected, from the loads so far; at first a guess */
    double recompute_seconds; /* of the tokens that a load would save; 0 when the rate is unknown */
    uint32_t worth_it;        /* non-zero: load it. Zero: a miss, or slower than computing (counted as declined) */
} xkv_hook_match_info;

/* Look a prompt up. `computed` leading tokens are in the engine's cache already, and only those beyond count. *hit_p is
 * NULL unless worth_it; close it with xkv_hit_close(). A failure of the store is a miss. Errors: ARGUMENT. */
XKV_API XKV_MUST_CHECK xkv_status xkv_hook_match(xkv_ctx *ctx, xkv_hook *hook, const xkv_prompt *prompt,
                                                 uint32_t computed, xkv_hook_match_info *info, xkv_hit **hit_p);

typedef struct xkv_load_options {
    size_t struct_size;
    uint32_t first_token, token_count; /* [first, first+count) of the matched ones; count 0: to the last */
    const int32_t *positions; /* [token_count] at which the engine wants them; NULL: as they were stored. Keys are
                                 rotated to where they were stored: others are UNSUPPORTED */
    int (*group_ready)(void *user, uint32_t group); /* as in xkv_read_options */
    void *group_ready_user;
} xkv_load_options;

static inline xkv_load_options xkv_load_options_default(void)
{
    xkv_load_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

/* Restore into views [plane_count] of planes that must be those of the entry: `geometry` (its planes and ropes) is
 * compared first, and nothing is written on MISMATCH or UNSUPPORTED. On any error the tokens must be computed: what is
 * in the views is of no use, whatever groups were ready. A damaged entry goes into quarantine.
 * Errors: also those of xkv_hit_read(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_hook_load(xkv_ctx *ctx, xkv_hook *hook, xkv_hit *hit,
                                                const xkv_geometry *geometry, const xkv_load_options *options,
                                                const xkv_view *views);

/* Copy the first prompt->token_count rows of the planes and queue them; the engine may change its cache when this
 * returns. *job (may be NULL) is for xkv_hook_cancel(); 0: nothing was queued, since the prompt is too short.
 * Errors: ARGUMENT (also: fewer rows than tokens), LIMIT (no room in the queue), MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_hook_save(xkv_ctx *ctx, xkv_hook *hook, const xkv_prompt *prompt,
                                                const xkv_geometry *geometry, const xkv_view *views, uint64_t *job);

/* Drop a job that waits, or stop one that is being packed. Harmless when it is done. */
XKV_API void xkv_hook_cancel(xkv_hook *hook, uint64_t job);

/* Wait until all jobs queued so far are done, whatever became of them. */
XKV_API void xkv_hook_flush(xkv_hook *hook);

typedef struct xkv_hook_counters {
    uint64_t matches, worth_it, declined, misses; /* outcomes of match; their sum is the first */
    uint64_t loads, load_failures;                /* of load: attempts, and those that failed */
    uint64_t tokens_loaded;
    uint64_t saves, too_short, refused, queued;  /* outcomes of save; their sum is the first */
    uint64_t stored, existed, cancelled, failed; /* what became of the queued ones */
    uint64_t waiting_jobs, waiting_bytes;        /* now, with those being packed */
    double bytes_per_second;                     /* of raw cache that loads restore, as match assumes */
} xkv_hook_counters;
XKV_API void xkv_hook_get_counters(xkv_hook *hook, xkv_hook_counters *counters);

/* What the last job that failed said; "" if none has. Copied into text [size]. */
XKV_API void xkv_hook_last_failure(xkv_hook *hook, char *text, size_t size);

#ifdef __cplusplus
}
#endif
#endif
