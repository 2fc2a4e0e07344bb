/* hook_internal.h - the hook, its saves on their way, and what a load is expected to take. */
#ifndef XKV_HOOK_INTERNAL_H
#define XKV_HOOK_INTERNAL_H

#include "base.h"
#include "xkv/hook.h"

#include <pthread.h>
#include <sys/types.h>

/* --- Expected time of a load (hook_cost.c) --- */

enum { XKV_COST_LOAD, XKV_COST_BYTE, XKV_COST_TOKEN, XKV_COST_PARTS };

/* Seconds per load, per byte and per token, now and at the start; all > 0. */
typedef struct xkv_cost {
    double now[XKV_COST_PARTS], start[XKV_COST_PARTS];
} xkv_cost;

void xkv_cost_init(xkv_cost *c, double load, double byte, double token);
double xkv_cost_expect(const xkv_cost *c, double bytes, double tokens);
/* A load took `seconds`. */
void xkv_cost_learn(xkv_cost *c, double bytes, double tokens, double seconds);
/* A load was declined: go a little back to the start. */
void xkv_cost_fade(xkv_cost *c);

/* --- Saves (hook_job.c) --- */

typedef enum xkv_job_state { XKV_JOB_COPYING, XKV_JOB_QUEUED, XKV_JOB_PACKING } xkv_job_state;

/* A save on its way. What the pointers point to lies in `block`. */
typedef struct xkv_job {
    struct xkv_job *next; /* in order of tickets */
    uint64_t ticket;
    uint8_t key[32]; /* of namespace and prompt */
    xkv_job_state state;
    bool cancelled;
    uint64_t ttl; /* what it was asked with, as in `put`, which is set when the copy is made */
    uint32_t pin, key_count;
    uint8_t names[32]; /* SHA-256 of its page keys */
    void *block;
    uint64_t block_size;
    xkv_namespace ns;
    xkv_prompt prompt;
    xkv_geometry geometry;
    xkv_view *views;
    xkv_put_options put; /* all but `pack` */
} xkv_job;

/* Check what a save is given, and tell the size of its copy. */
XKV_MUST_CHECK xkv_status xkv_job_check(xkv_ctx *ctx, const xkv_prompt *prompt, const xkv_geometry *geometry,
                                        const xkv_view *views, const xkv_hook_save_options *o, uint64_t *size);
/* Copy it all into job->block [job->block_size]. */
void xkv_job_copy(xkv_job *job, const xkv_prompt *prompt, const xkv_geometry *geometry, const xkv_view *views,
                  const xkv_hook_save_options *o);

/* --- The hook --- */

enum { XKV_HOOK_DAMAGED = 64 };

typedef struct xkv_saver {
    xkv_hook *hook;
    pthread_t thread;
    xkv_ctx *ctx;
    const xkv_job *job; /* being packed; NULL: none */
} xkv_saver;

struct xkv_hook {
    xkv_ctx *own; /* the hook and the copies of rows belong to it */
    xkv_store *store;
    pid_t pid;
    xkv_ctx_options context;
    xkv_pack_options pack;
    uint32_t pack_threads, queue_saves, wait_ms;
    uint64_t queue_bytes;
    uint64_t (*clock)(void *user);
    void *clock_user;

    xkv_saver *savers; /* [saver_count] */
    uint32_t saver_count;

    pthread_mutex_t mutex; /* of all below, and of `job` of the savers */
    pthread_cond_t work;   /* a save was queued, or quit */
    pthread_cond_t room;   /* a save is done, or all were cancelled; on the monotonic clock */
    bool quit;
    uint64_t cancels; /* how often all saves were cancelled */
    uint64_t tickets; /* the last one */
    xkv_job *first;   /* saves on their way, in order of tickets */
    xkv_job **last;
    xkv_hook_counters counters;
    xkv_cost cost;
    /* Entries that loads found damaged, the last ones: where they could not be put into quarantine (a read-only store)
     * they would be found again and again. */
    uint64_t damaged[XKV_HOOK_DAMAGED], damaged_count;
};

/* Start a public call. ARGUMENT after fork(). */
XKV_MUST_CHECK xkv_status xkv_hook_begin(xkv_ctx *ctx, const xkv_hook *hook);
/* Seconds since `start`, which xkv_hook_now() gave. */
uint64_t xkv_hook_now(const xkv_hook *hook);
double xkv_hook_seconds(const xkv_hook *hook, uint64_t start);
/* Another context made of the hook's options. */
XKV_MUST_CHECK xkv_status xkv_hook_context(xkv_ctx *ctx, const xkv_hook *hook, uint32_t threads, xkv_ctx **made_p);

/* Start and end the background threads (hook_save.c). */
XKV_MUST_CHECK xkv_status xkv_savers_start(xkv_ctx *ctx, xkv_hook *hook, uint32_t count);
void xkv_savers_end(xkv_hook *hook);

#endif
