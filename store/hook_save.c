/* hook_save.c - saves: taken in under the limits of the queue, packed and stored on background threads. */
#include "clock.h"
#include "hook_internal.h"
#include "sha256.h"

#include <signal.h>
#include <time.h>

#define SLICE_MS 50u /* a wait looks at the caller's cancel flag so often */

/* --- Saves on their way, with the mutex held ---------------------------------------------------------------------- */

static bool has_room(const xkv_hook *hook, uint64_t bytes)
{
    return hook->counters.queue_saves < hook->queue_saves && bytes <= hook->queue_bytes - hook->counters.queue_bytes;
}

static void admit(xkv_hook *hook, xkv_job *job)
{
    xkv_hook_counters *c = &hook->counters;
    job->ticket = ++hook->tickets;
    *hook->last = job;
    hook->last = &job->next;
    c->queue_saves++;
    c->queue_bytes += job->block_size;
    c->queue_bytes_peak = xkv_max64(c->queue_bytes_peak, c->queue_bytes);
}

/* Its copy must be freed before, so that there is room indeed. */
static void take_out(xkv_hook *hook, xkv_job *job)
{
    xkv_job **at = &hook->first;
    while (*at != job)
        at = &(*at)->next;
    *at = job->next;
    if (hook->last == &job->next)
        hook->last = at;
    hook->counters.queue_saves--;
    hook->counters.queue_bytes -= job->block_size;
    pthread_cond_broadcast(&hook->room);
}

static void free_copy(xkv_hook *hook, xkv_job *job)
{
    xkv_release(hook->own, job->block);
    job->block = NULL;
}

static void drop(xkv_hook *hook, xkv_job *job)
{
    free_copy(hook, job);
    take_out(hook, job);
    xkv_release(hook->own, job);
}

/* --- Waiting ------------------------------------------------------------------------------------------------------ */

/* UINT64_MAX: never. */
static uint64_t deadline_after(uint32_t ms)
{
    return ms == XKV_HOOK_FOREVER ? UINT64_MAX : xkv_clock_ms() + ms;
}

/* Wait until a save is done, for a slice of time at most. TIMEOUT: the deadline has passed. With the mutex held. */
static xkv_status wait_a_while(xkv_ctx *ctx, xkv_hook *hook, uint64_t deadline)
{
    uint64_t now = xkv_clock_ms();
    if (now >= deadline)
        return XKV_ERROR_TIMEOUT;
    uint64_t until = now + xkv_min64(SLICE_MS, deadline - now);
    const struct timespec at = {(time_t)(until / 1000), (long)(until % 1000 * 1000000)};
    pthread_cond_timedwait(&hook->room, &hook->mutex, &at);
    return xkv_check_cancel(ctx);
}

/* --- Taking a save in --------------------------------------------------------------------------------------------- */

/* What a save is asked for, and what becomes of it. */
typedef struct request {
    const xkv_prompt *prompt;
    const xkv_geometry *geometry;
    const xkv_view *views;
    xkv_hook_save_options o;
    uint8_t key[32], names[32]; /* of the prompt; SHA-256 of the page keys */
    uint64_t size;              /* of the copy */
    xkv_hook_saved saved;
    double copy_seconds;
} request;

static void hash_names(request *r)
{
    xkv_sha256 h;
    xkv_sha256_begin(&h);
    for (uint32_t i = 0; i < r->o.key_count; i++) {
        uint8_t tokens[4];
        xkv_store32(tokens, r->o.keys[i].tokens);
        xkv_sha256_add(&h, tokens, sizeof tokens);
        xkv_sha256_add(&h, r->o.keys[i].key, sizeof r->o.keys[i].key);
    }
    xkv_sha256_end(&h, r->names);
}

/* Whether the job does all that is asked for. */
static bool covers(const xkv_job *job, const request *r)
{
    return !job->cancelled && memcmp(job->key, r->key, sizeof job->key) == 0 && (job->pin != 0 || r->o.pin == 0) &&
           (job->ttl == 0 || (r->o.ttl != 0 && r->o.ttl <= job->ttl)) &&
           (r->o.key_count == 0 ||
            (r->o.key_count == job->key_count && memcmp(job->names, r->names, sizeof job->names) == 0));
}

/* Whether the same prompt is on its way, with the same options or more; then that is the outcome. With the mutex held.
 */
static bool is_pending(const xkv_hook *hook, request *r)
{
    const xkv_job *job = hook->first;
    while (job != NULL && !covers(job, r))
        job = job->next;
    if (job == NULL)
        return false;
    r->saved = (xkv_hook_saved){XKV_SAVE_PENDING, job->ticket};
    return true;
}

static bool is_pending_now(xkv_hook *hook, request *r)
{
    pthread_mutex_lock(&hook->mutex);
    bool pending = is_pending(hook, r);
    pthread_mutex_unlock(&hook->mutex);
    return pending;
}

/* Whether the store finds an entry by all of the page keys. */
static xkv_status ask_for_names(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns, const request *r, bool *has)
{
    uint8_t(*keys)[32] = NULL;
    xkv_match m;
    XKV_TRY(XKV_NEW(ctx, r->o.key_count, &keys));
    for (uint32_t i = 0; i < r->o.key_count; i++)
        memcpy(keys[i], r->o.keys[i].key, sizeof keys[i]);
    xkv_status status =
        xkv_store_match_keys(ctx, hook->store, ns, (const uint8_t(*)[32])keys, r->o.key_count, &m, NULL);
    xkv_release(ctx, keys);
    *has = status == XKV_OK && m.reason == XKV_MATCH_FOUND && m.keys == r->o.key_count;
    return status;
}

/* Whether the store serves the whole prompt. */
static xkv_status ask_store(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns, request *r)
{
    xkv_match m;
    bool has = true;
    if (r->o.ttl > 0 || r->o.pin)
        return XKV_OK;
    XKV_TRY(xkv_store_match(ctx, hook->store, ns, r->prompt, r->prompt->token_count, &m, NULL));
    if (m.reason == XKV_MATCH_FOUND && r->o.key_count > 0)
        XKV_TRY(ask_for_names(ctx, hook, ns, r, &has));
    if (m.reason == XKV_MATCH_FOUND && has)
        r->saved.outcome = XKV_SAVE_STORED;
    return XKV_OK;
}

/* Wait for room and admit the job, unless the same prompt got in meanwhile. */
static xkv_status enter(xkv_ctx *ctx, xkv_hook *hook, request *r, xkv_job *job)
{
    uint64_t deadline = deadline_after(hook->wait_ms), cancels = hook->cancels;
    while (!is_pending(hook, r) && !has_room(hook, r->size)) {
        xkv_status status = wait_a_while(ctx, hook, deadline);
        if (status == XKV_ERROR_TIMEOUT) {
            r->saved.outcome = XKV_SAVE_DROPPED;
            return XKV_OK;
        }
        XKV_TRY(status);
        if (hook->cancels != cancels)
            return xkv_fail(ctx, XKV_ERROR_CANCELLED, "all saves were cancelled");
    }
    if (r->saved.outcome == XKV_SAVE_PENDING)
        return XKV_OK;
    admit(hook, job);
    r->saved.ticket = job->ticket;
    return XKV_OK;
}

/* Copy everything, without the mutex: the job is in the list, but nobody else touches it. */
static xkv_status copy(xkv_ctx *ctx, xkv_hook *hook, request *r, xkv_job *job)
{
    uint64_t start = xkv_hook_now(hook);
    xkv_status status = xkv_alloc(hook->own, 1, (size_t)job->block_size, &job->block);
    if (status != XKV_OK)
        return xkv_fail(ctx, status, "the copy of %llu bytes: %s", (unsigned long long)job->block_size,
                        xkv_status_string(status));
    xkv_job_copy(job, r->prompt, r->geometry, r->views, &r->o);
    r->copy_seconds = xkv_hook_seconds(hook, start);
    return XKV_OK;
}

/* The copy is made, or was not possible. */
static void leave_copying(xkv_hook *hook, xkv_job *job, xkv_status status)
{
    pthread_mutex_lock(&hook->mutex);
    if (status != XKV_OK) {
        drop(hook, job);
    } else if (job->cancelled) {
        hook->counters.saves_cancelled++;
        drop(hook, job);
    } else {
        job->state = XKV_JOB_QUEUED;
        pthread_cond_signal(&hook->work);
    }
    pthread_mutex_unlock(&hook->mutex);
}

static xkv_status take_in(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns, request *r)
{
    xkv_job *job = NULL;
    xkv_status status = XKV_NEW_ZERO(hook->own, 1, &job);
    if (status != XKV_OK)
        return xkv_fail(ctx, status, "a save: %s", xkv_status_string(status));
    memcpy(job->key, r->key, sizeof job->key);
    memcpy(job->names, r->names, sizeof job->names);
    job->ttl = r->o.ttl;
    job->pin = r->o.pin;
    job->key_count = r->o.key_count;
    job->ns = *ns;
    job->block_size = r->size;
    pthread_mutex_lock(&hook->mutex);
    status = enter(ctx, hook, r, job);
    pthread_mutex_unlock(&hook->mutex);
    if (status != XKV_OK || r->saved.outcome != XKV_SAVE_QUEUED) {
        xkv_release(hook->own, job);
        return status;
    }
    status = copy(ctx, hook, r, job);
    leave_copying(hook, job, status);
    return status;
}

static xkv_status save(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns, request *r)
{
    xkv_page_key key;
    XKV_TRY(xkv_job_check(ctx, r->prompt, r->geometry, r->views, &r->o, &r->size));
    XKV_TRY(xkv_chain_native(ctx, ns, r->prompt, r->prompt->token_count, &key));
    memcpy(r->key, key.key, sizeof r->key);
    hash_names(r);
    if (is_pending_now(hook, r))
        return XKV_OK;
    XKV_TRY(ask_store(ctx, hook, ns, r));
    if (r->saved.outcome == XKV_SAVE_STORED)
        return XKV_OK;
    if (r->size > hook->queue_bytes) {
        r->saved.outcome = XKV_SAVE_DROPPED;
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "the copy takes %llu bytes, all saves together may take %llu",
                        (unsigned long long)r->size, (unsigned long long)hook->queue_bytes);
    }
    return take_in(ctx, hook, ns, r);
}

static uint64_t *save_counter(xkv_hook_counters *c, xkv_status status, uint32_t outcome)
{
    if (status != XKV_OK && outcome != XKV_SAVE_DROPPED)
        return &c->saves_refused;
    switch (outcome) {
    case XKV_SAVE_STORED:
        return &c->saves_known;
    case XKV_SAVE_PENDING:
        return &c->saves_pending;
    case XKV_SAVE_DROPPED:
        return &c->saves_dropped;
    default:
        return &c->saves_queued;
    }
}

xkv_status xkv_hook_save(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns, const xkv_prompt *prompt,
                         const xkv_geometry *geometry, const xkv_view *views, const xkv_hook_save_options *options,
                         xkv_hook_saved *saved)
{
    request r = {.prompt = prompt, .geometry = geometry, .views = views, .o = xkv_hook_save_options_default()};
    XKV_TRY(xkv_hook_begin(ctx, hook));
    xkv_status status = xkv_copy_options(ctx, options, &r.o, sizeof r.o);
    if (status == XKV_OK)
        status = save(ctx, hook, ns, &r);
    pthread_mutex_lock(&hook->mutex);
    ++*save_counter(&hook->counters, status, r.saved.outcome);
    hook->counters.copy_seconds += r.copy_seconds;
    pthread_mutex_unlock(&hook->mutex);
    if (status == XKV_OK && saved != NULL)
        *saved = r.saved;
    return status;
}

/* --- Background threads ------------------------------------------------------------------------------------------- */

static xkv_job *next_queued(const xkv_hook *hook)
{
    xkv_job *job = hook->first;
    while (job != NULL && job->state != XKV_JOB_QUEUED)
        job = job->next;
    return job;
}

/* With the mutex held. */
static void count_done(xkv_hook *hook, xkv_status status, uint64_t raw_bytes, const xkv_put_report *report)
{
    xkv_hook_counters *c = &hook->counters;
    if (status == XKV_ERROR_CANCELLED) {
        c->saves_cancelled++;
    } else if (status != XKV_OK) {
        c->saves_failed++;
    } else if (report->existed) {
        c->saves_existed++;
    } else {
        c->saves_stored++;
        c->saved_tokens += report->tokens;
        c->saved_bytes += raw_bytes;
        c->saved_packed_bytes += report->bytes;
    }
}

static xkv_status put(xkv_saver *s, const xkv_job *job, xkv_put_report *report)
{
    const xkv_hook *hook = s->hook;
    xkv_put_options o = job->put;
    o.pack = &hook->pack;
    return xkv_store_put_planes(s->ctx, hook->store, &job->ns, &job->prompt, &job->geometry, job->views, NULL, NULL, 0,
                                &o, report);
}

/* Called and left with the mutex held. */
static void run_job(xkv_saver *s, xkv_job *job)
{
    xkv_hook *hook = s->hook;
    xkv_put_report report = {0};
    job->state = XKV_JOB_PACKING;
    s->job = job;
    xkv_ctx_reset(s->ctx);
    pthread_mutex_unlock(&hook->mutex);

    uint64_t start = xkv_hook_now(hook), raw_bytes = xkv_geometry_raw_bytes(&job->geometry);
    xkv_status status = put(s, job, &report);
    double seconds = xkv_hook_seconds(hook, start);
    if (status != XKV_OK && status != XKV_ERROR_CANCELLED)
        xkv_logf(s->ctx, XKV_LOG_WARNING, "a prompt of %u tokens was not saved: %s: %s", job->prompt.token_count,
                 xkv_status_string(status), xkv_ctx_error(s->ctx));
    free_copy(hook, job); /* takes long for large ones */

    pthread_mutex_lock(&hook->mutex);
    s->job = NULL;
    count_done(hook, status, raw_bytes, &report);
    hook->counters.pack_seconds += seconds;
    drop(hook, job);
}

static void *saver_main(void *user)
{
    xkv_saver *s = user;
    xkv_hook *hook = s->hook;
    pthread_mutex_lock(&hook->mutex);
    while (!hook->quit) {
        xkv_job *job = next_queued(hook);
        if (job != NULL)
            run_job(s, job);
        else
            pthread_cond_wait(&hook->work, &hook->mutex);
    }
    pthread_mutex_unlock(&hook->mutex);
    return NULL;
}

/* Start until one cannot be started. They take no signals, which are the business of the program's threads. */
static void start_threads(xkv_hook *hook, uint32_t count)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (hook->saver_count < count) {
        xkv_saver *s = &hook->savers[hook->saver_count];
        s->hook = hook;
        if (xkv_hook_context(NULL, hook, hook->pack_threads, &s->ctx) != XKV_OK)
            break;
        if (pthread_create(&s->thread, NULL, saver_main, s) != 0) {
            xkv_ctx_free(s->ctx);
            break;
        }
        hook->saver_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

xkv_status xkv_savers_start(xkv_ctx *ctx, xkv_hook *hook, uint32_t count)
{
    xkv_status status = XKV_NEW_ZERO(hook->own, count, &hook->savers);
    if (status != XKV_OK)
        return xkv_fail(ctx, status, "%u background threads: %s", count, xkv_status_string(status));
    start_threads(hook, count);
    if (hook->saver_count == 0)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "no background thread could be started");
    if (hook->saver_count < count)
        xkv_logf(ctx, XKV_LOG_WARNING, "only %u of %u background threads could be started", hook->saver_count, count);
    return XKV_OK;
}

void xkv_savers_end(xkv_hook *hook)
{
    pthread_mutex_lock(&hook->mutex);
    hook->quit = true;
    pthread_cond_broadcast(&hook->work);
    pthread_mutex_unlock(&hook->mutex);
    xkv_hook_cancel(hook, 0);
    for (uint32_t i = 0; i < hook->saver_count; i++) {
        pthread_join(hook->savers[i].thread, NULL);
        xkv_ctx_free(hook->savers[i].ctx);
    }
    xkv_release(hook->own, hook->savers);
}

/* --- Cancelling and waiting --------------------------------------------------------------------------------------- */

/* With the mutex held; a job that waits is gone afterwards. */
static void cancel(xkv_hook *hook, xkv_job *job)
{
    job->cancelled = true;
    if (job->state == XKV_JOB_QUEUED) {
        hook->counters.saves_cancelled++;
        drop(hook, job);
        return;
    }
    for (uint32_t i = 0; i < hook->saver_count; i++) { /* one being copied ends when the copy is made */
        if (hook->savers[i].job == job)
            xkv_ctx_cancel(hook->savers[i].ctx);
    }
}

uint32_t xkv_hook_cancel(xkv_hook *hook, uint64_t ticket)
{
    uint32_t count = 0;
    pthread_mutex_lock(&hook->mutex);
    for (xkv_job *job = hook->first, *next; job != NULL; job = next) {
        next = job->next;
        if (job->cancelled || (ticket != 0 && job->ticket != ticket))
            continue;
        cancel(hook, job);
        count++;
    }
    if (ticket == 0) {
        hook->cancels++;
        pthread_cond_broadcast(&hook->room);
    }
    pthread_mutex_unlock(&hook->mutex);
    return count;
}

xkv_status xkv_hook_flush(xkv_ctx *ctx, xkv_hook *hook, uint32_t timeout_ms)
{
    xkv_status status = XKV_OK;
    XKV_TRY(xkv_hook_begin(ctx, hook));
    uint64_t deadline = deadline_after(timeout_ms);
    pthread_mutex_lock(&hook->mutex);
    uint64_t last = hook->tickets;
    while (status == XKV_OK && hook->first != NULL && hook->first->ticket <= last)
        status = wait_a_while(ctx, hook, deadline);
    uint64_t left = hook->counters.queue_saves;
    pthread_mutex_unlock(&hook->mutex);
    if (status == XKV_ERROR_TIMEOUT)
        return xkv_fail(ctx, status, "%llu saves are still on their way", (unsigned long long)left);
    return status;
}
