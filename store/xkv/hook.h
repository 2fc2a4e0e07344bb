/*
 * xkv/hook.h - what an inference engine calls: find a stored prefix of a prompt, load it layer by layer, save prompts
 * in the background.
 *
 *   xkv_hook_match()   before prefill: how many tokens can be reused, and whether loading them beats computing them
 *   xkv_hook_load()    into the engine's cache, group by group in order of layers, with a callback after each
 *   xkv_hook_save()    after prefill: copies the rows and returns; packing and storing run on threads of the hook
 *   xkv_hook_flush(), xkv_hook_cancel(), xkv_hook_get_counters()
 *
 * What goes wrong is a miss: the engine computes what it did not get. A load that fails says so and never leaves a
 * cache that passes for whole; the entry behind it goes into quarantine when it is to blame. Every call has an outcome,
 * and every outcome a counter.
 *
 * Threads: all calls but xkv_hook_close() may be made from any number of threads at once, each with its own context,
 * also on one hit. While a load or a save computes, OpenBLAS is held at one thread (see <xkv/common.h>).
 */
#ifndef XKV_HOOK_H
#define XKV_HOOK_H

#include "xkv/store.h"

#ifdef __cplusplus
extern "C" {
#endif

/* --- Opening -------------------------------------------------------------------------------------------------------
 */

/* An engine's end of a store. Not across fork(). */
typedef struct xkv_hook xkv_hook;

#define XKV_HOOK_FOREVER 0xffffffffu /* as a time in milliseconds */

typedef struct xkv_hook_options {
    size_t struct_size;
    /* Allocator, log and memory limit of the contexts that the hook makes: one for the rows it copies, one for each
     * background thread, one for each hit. The log is called from background threads too, several at once. Only read by
     * xkv_hook_create(); its number of threads is not looked at. NULL: defaults. */
    const xkv_ctx_options *context;

    uint32_t save_threads; /* saves packed at once, each on a background thread, 1 .. 64; default 1 */
    uint32_t pack_threads; /* threads of one save, that one included, 1 .. 1024; default 1 */
    uint32_t queue_saves;  /* saves on their way at once: being copied, waiting or being packed; >= 1; default 64 */
    uint64_t queue_bytes;  /* memory that their copies may take together; default 1 GiB */
    uint32_t wait_ms;      /* how long xkv_hook_save() waits for room before it drops the save: 0 not at all (default);
                              XKV_HOOK_FOREVER */
    /* How saves are packed; NULL: defaults, hence lossless. The struct is copied, what it points to must outlive the
     * hook; a dictionary must be in the store; `progress` is called on background threads. */
    const xkv_pack_options *pack;

    /* Where the expected time of a load starts from, until loads have been measured: seconds for each load, for each
     * byte of the entry and for each token; 0: 1e-3, 1e-9, 2e-5 (a fast disk, a small model). Start low: what is
     * declined is not measured. */
    double load_seconds, load_seconds_per_byte, load_seconds_per_token;

    uint64_t (*clock)(void *user); /* nanoseconds from any start, never back; NULL: the system's monotonic clock */
    void *clock_user;
} xkv_hook_options;

static inline xkv_hook_options xkv_hook_options_default(void)
{
    xkv_hook_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.save_threads = 1;
    o.pack_threads = 1;
    o.queue_saves = 64;
    o.queue_bytes = (uint64_t)1 << 30;
    return o;
}

/* Start the hook of an open store, which must outlive it; several hooks on one store are possible. `options` may be
 * NULL. Errors: ARGUMENT, MEMORY, LIMIT (no thread could be started). */
XKV_API XKV_MUST_CHECK xkv_status xkv_hook_create(xkv_ctx *ctx, xkv_store *store, const xkv_hook_options *options,
                                                  xkv_hook **hook_p);

/* Cancel the saves that are on their way, wait for the background threads to end (a save that is being packed stops
 * within one group) and free everything. To keep those saves call xkv_hook_flush() before. All hits must be closed, and
 * no other call may run or come later. Accepts NULL. */
XKV_API void xkv_hook_close(xkv_hook *hook);

/* --- Matching ------------------------------------------------------------------------------------------------------
 */

#define XKV_HOOK_DECLINED                                                                                              \
    100u /* beside xkv_match_reason: found, but computing is expected to be faster than loading                        \
          */

typedef struct xkv_hook_match_options {
    size_t struct_size;
    uint32_t min_tokens;      /* fewer reusable tokens are a miss (SHORT); default 1 */
    uint32_t page_tokens;     /* the engine reuses whole pages of so many tokens; default 1 */
    uint32_t have_tokens;     /* leading tokens whose rows the engine has already; default 0 */
    uint32_t compute_tokens;  /* tokens at the end of the prompt that are computed in any case; default 1: without the
                                 last one there is nothing to sample from */
    double seconds_per_token; /* what computing a token takes the engine; 0: not known, nothing is declined (default) */
} xkv_hook_match_options;

static inline xkv_hook_match_options xkv_hook_match_options_default(void)
{
    xkv_hook_match_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.min_tokens = 1;
    o.page_tokens = 1;
    o.compute_tokens = 1;
    return o;
}

typedef struct xkv_hook_found {
    uint32_t reason;          /* xkv_match_reason, or XKV_HOOK_DECLINED */
    uint32_t tokens;          /* leading tokens of the prompt that can be reused: whole pages; 0 unless FOUND */
    uint32_t offered_tokens;  /* the same, also for DECLINED */
    uint32_t entry_tokens;    /* of the entry that has them */
    uint64_t id, bytes;       /* of the entry; of its blob */
    double load_seconds;      /* expected for tokens have_tokens .. offered_tokens - 1 */
    double recompute_seconds; /* what computing these would take; 0: not known */
} xkv_hook_found;

/* A stored entry that is ready to be loaded, safe from eviction while it is open. Any thread may load it, several at
 * once too. */
typedef struct xkv_hook_hit xkv_hook_hit;

/* Find the longest stored prefix of `prompt`. What cannot or should not be reused is a miss: XKV_OK with the reason, 0
 * tokens and *hit_p NULL. `options` may be NULL.
 *
 * A match is declined when its load is expected to take as long as computing the same tokens, or longer. The
 * expectation follows the loads of this hook: their bytes, their tokens and the time they took without that spent in
 * callbacks. Since what is declined is not measured, every decline moves it 1/256 of the way back to where it started,
 * so that now and then a load is tried again.
 *
 * To the store a match is a hit, and renews the entry's time of use, once its tokens are loaded: with the first load
 * that succeeds.
 *
 * Errors: ARGUMENT, IO, MEMORY; the engine takes them as a miss. */
XKV_API XKV_MUST_CHECK xkv_status xkv_hook_match(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns,
                                                 const xkv_prompt *prompt, const xkv_hook_match_options *options,
                                                 xkv_hook_found *found, xkv_hook_hit **hit_p);

/* On any thread, when no load of it runs any more. Accepts NULL. */
XKV_API void xkv_hook_hit_close(xkv_hook_hit *hit);

/* --- Loading -------------------------------------------------------------------------------------------------------
 */

typedef struct xkv_hook_load_options {
    size_t struct_size;
    uint32_t first_token,
        token_count;          /* tokens [first, first+count); count 0: to the last reusable one. Default: all */
    const int32_t *positions; /* [token_count, filled in] where the engine wants the rows: K is rotated for these
                                 positions, as in xkv_read_options; NULL: where they were computed */
    /* Called on the thread that loads when the asked tokens of a group are in their views, in order of layers: layers
     * 0 .. layers-1 are now complete. Return non-zero to stop. NULL: none. */
    int (*group_ready)(void *user, uint32_t group, uint32_t layers);
    void *group_ready_user;
} xkv_hook_load_options;

static inline xkv_hook_load_options xkv_hook_load_options_default(void)
{
    xkv_hook_load_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

/* Restore tokens into views[geometry->plane_count]: token first_token goes to row(0) of each view. `geometry` is the
 * engine's: its layers, planes and ropes must be those of the entry (element types may differ, and a rotation that
 * either side does not know is not compared); its tokens and positions are not looked at. `options` may be NULL. The
 * work is done on the caller's thread and those of `ctx`; xkv_ctx_cancel(ctx) stops it within one group.
 *
 * On XKV_OK every asked row is in place. On any other status the load is a miss and the engine computes the tokens:
 *   - the rows of groups that were announced by group_ready are whole, verified and final, whatever happens later, so
 *     that what was computed from them in these layers is right;
 *   - the rows of all other groups are undefined: untouched, old and new ones mixed;
 *   - hence the asked tokens as a whole are not in the cache. With ARGUMENT, UNSUPPORTED and MISMATCH no view was
 *     touched.
 * An entry that turns out damaged (FORMAT, CORRUPT, CHECKSUM, TRUNCATED) goes into quarantine: no match finds it again;
 * loads of it that run at the same time fail as well, or give right rows. Other failures leave it in the store.
 *
 * Errors: ARGUMENT (range, positions, views), VERSION and FEATURE (only a newer program can read it), UNSUPPORTED
 * (other positions for keys whose RoPE the entry does not know), MISMATCH (geometry; the entry's dictionary is gone,
 * missing or damaged: then no match finds the entry until it is put again), CORRUPT (also: an earlier load of this hit
 * found it damaged), CHECKSUM, TRUNCATED, CANCELLED, LIMIT, MEMORY, IO, BACKEND. */
XKV_API XKV_MUST_CHECK xkv_status xkv_hook_load(xkv_ctx *ctx, xkv_hook_hit *hit, const xkv_geometry *geometry,
                                                const xkv_view *views, const xkv_hook_load_options *options);

/* --- Saving --------------------------------------------------------------------------------------------------------
 */

typedef struct xkv_hook_save_options {
    size_t struct_size;
    uint64_t ttl;             /* as in xkv_put_options */
    uint32_t pin;             /* likewise */
    const xkv_page_key *keys; /* [key_count] likewise; copied */
    uint32_t key_count;
} xkv_hook_save_options;

static inline xkv_hook_save_options xkv_hook_save_options_default(void)
{
    xkv_hook_save_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

typedef enum xkv_save_outcome {
    XKV_SAVE_QUEUED = 0,  /* copied; a background thread will store it */
    XKV_SAVE_STORED = 1,  /* the store serves all tokens of the prompt already; nothing was copied */
    XKV_SAVE_PENDING = 2, /* the same prompt, with these options, is on its way already; nothing was copied */
    XKV_SAVE_DROPPED = 3  /* there was no room in time; nothing was copied */
} xkv_save_outcome;

typedef struct xkv_hook_saved {
    uint32_t outcome; /* xkv_save_outcome */
    uint64_t ticket;  /* QUEUED: of this save; PENDING: of the one on its way; else 0. Tickets ascend from 1 */
} xkv_hook_saved;

/* Save the rows of a prompt: the first prompt->token_count of `geometry` (which may have more), read from
 * views[geometry->plane_count] in the planes' element types. Prompt, geometry, keys and rows are copied; on return all
 * of them belong to the caller again. Whether storing succeeds later is counted and logged, not returned.
 *
 * The store is asked first, so that what it has, found by all keys too, costs no copy; not with a ttl or pin, since
 * putting renews these. A save of the same prompt on its way is enough if it has the same keys (or none are asked for),
 * a pin if one is asked for, and lives as long; else this one is queued behind it. The
 * copies of all saves on their way never take more than queue_bytes: when there is no room for this one the call waits
 * up to wait_ms, then drops it. xkv_ctx_cancel(ctx) and xkv_hook_cancel(hook, 0) end the wait (within 50 ms).
 *
 * `options` and `saved` may be NULL. Errors: ARGUMENT, LIMIT (the copy alone would pass queue_bytes, which
 * counts as dropped; the memory limit), CANCELLED, MEMORY, IO. */
XKV_API XKV_MUST_CHECK xkv_status xkv_hook_save(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns,
                                                const xkv_prompt *prompt, const xkv_geometry *geometry,
                                                const xkv_view *views, const xkv_hook_save_options *options,
                                                xkv_hook_saved *saved);

/* Cancel the save of a ticket, or with 0 all saves, those that wait for room included. One that waits is dropped at
 * once, one that is being packed stops within one group of work, unless it is just being committed: then it is stored.
 * Returns how many were asked to stop: 0 when the save is done already. */
XKV_API uint32_t xkv_hook_cancel(xkv_hook *hook, uint64_t ticket);

/* Wait until all saves that were queued before this call are done: stored, failed or cancelled.
 * Errors: TIMEOUT (after timeout_ms; the saves go on), CANCELLED (xkv_ctx_cancel(), within 50 ms), ARGUMENT. */
XKV_API XKV_MUST_CHECK xkv_status xkv_hook_flush(xkv_ctx *ctx, xkv_hook *hook, uint32_t timeout_ms);

/* --- Counters ------------------------------------------------------------------------------------------------------
 */

/* Since the hook was created. */
typedef struct xkv_hook_counters {
    /* Matches; each call adds 1 to one of these. */
    uint64_t matches_found, matches_declined;
    uint64_t misses_none, misses_short, misses_expired, misses_no_dictionary, misses_corrupt, misses_gone, misses_newer,
        misses_whole_only;
    uint64_t matches_failed; /* an error was returned */
    uint64_t found_tokens;   /* reusable, over all found */
    double match_seconds;

    /* Loads; each call adds 1 to one of these. */
    uint64_t loads_ok;
    uint64_t loads_damaged;       /* the entry was to blame and went into quarantine */
    uint64_t loads_cancelled;     /* also: stopped by the callback */
    uint64_t loads_refused;       /* ARGUMENT, UNSUPPORTED, MISMATCH: nothing was read */
    uint64_t loads_failed;        /* for another reason */
    uint64_t loaded_tokens;       /* of those that are ok, like the following */
    uint64_t loaded_bytes;        /* of rows, as the entry's source held them */
    uint64_t loaded_packed_bytes; /* the share of the blobs that these tokens have */
    double load_seconds;          /* without callbacks */

    /* Saves; each call adds 1 to one of these. */
    uint64_t saves_queued, saves_known, saves_pending,
        saves_dropped;      /* the outcomes; too large ones count as dropped */
    uint64_t saves_refused; /* an error was returned */
    double copy_seconds;    /* of those queued */

    /* Queued saves that are done; each adds 1 to one of these. */
    uint64_t saves_stored;
    uint64_t saves_existed; /* the very prompt was stored meanwhile, or it was to be renewed */
    uint64_t saves_failed;
    uint64_t saves_cancelled;
    uint64_t saved_tokens, saved_bytes, saved_packed_bytes; /* of those stored: rows as copied, blobs */
    double pack_seconds;                                    /* of all, on the background threads */

    /* Now. */
    uint64_t queue_saves, queue_bytes; /* on their way, and what their copies take */
    uint64_t queue_bytes_peak;
    double seconds_per_load, seconds_per_byte, seconds_per_token; /* what a load is expected to take */
} xkv_hook_counters;

/* All at one moment. */
XKV_API void xkv_hook_get_counters(xkv_hook *hook, xkv_hook_counters *counters);

#ifdef __cplusplus
}
#endif
#endif
