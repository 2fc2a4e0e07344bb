/* hook.c - match, load and save for engines: a queue of copied caches, threads that pack them, a cost model. */
#include "xkv/hook.h"
#include "store_internal.h"

#include "kernels.h"

#include <stdio.h>
#include <time.h>

#define FIRST_RATE  500e6 /* bytes of raw cache a second, until a load has been measured */
#define SMOOTHING   0.2   /* weight of the latest load */
#define MAX_WORKERS 64u

/* A cache that is to be stored: everything copied. */
typedef struct job {
    struct job *next;
    uint64_t number;
    uint64_t bytes; /* counted against the queue */
    xkv_prompt prompt;
    xkv_geometry geometry;
    xkv_view *views;
    uint8_t *block; /* all copies lie in it */
} job;

typedef struct worker {
    xkv_hook *hook;
    pthread_t thread;
    xkv_ctx *ctx;
    uint64_t running; /* number of its job; 0: none */
    bool started;
} worker;

struct xkv_hook {
    xkv_hook_options o;
    xkv_pack_options pack;
    xkv_ctx *own; /* jobs belong to it; only its account is used, by many threads */
    pthread_mutex_t mutex;
    pthread_cond_t changed; /* a job came, or one is done */
    job *first, *last;
    uint64_t next_number, waiting_bytes;
    uint32_t waiting_jobs;
    bool closing;
    xkv_hook_counters counters;
    char failure[256];
    worker workers[MAX_WORKERS];
};

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- Workers ------------------------------------------------------------------------------------------------------ */

static void count_outcome(xkv_hook *h, const worker *w, xkv_status status, const xkv_put_report *report)
{
    if (status == XKV_OK && report->existed)
        h->counters.existed++;
    else if (status == XKV_OK)
        h->counters.stored++;
    else if (status == XKV_ERROR_CANCELLED)
        h->counters.cancelled++;
    else
        h->counters.failed++;
    if (status != XKV_OK && status != XKV_ERROR_CANCELLED)
        snprintf(h->failure, sizeof h->failure, "%s: %.200s", xkv_status_string(status), xkv_ctx_error(w->ctx));
}

/* With the mutex held. */
static void drop_job(xkv_hook *h, job *j)
{
    h->waiting_bytes -= j->bytes;
    h->waiting_jobs--;
    xkv_release(h->own, j->block);
    xkv_release(h->own, j);
    pthread_cond_broadcast(&h->changed);
}

static xkv_status store_job(worker *w, const job *j, xkv_put_report *report)
{
    const xkv_hook *h = w->hook;
    xkv_put_options o = xkv_put_options_default();
    o.ttl = h->o.ttl;
    o.pack = &h->pack;
    return xkv_store_put_planes(w->ctx, h->o.store, &h->o.ns, &j->prompt, &j->geometry, j->views, NULL, NULL, 0, &o,
                                report);
}

static void *work(void *user)
{
    worker *w = user;
    xkv_hook *h = w->hook;
    pthread_mutex_lock(&h->mutex);
    for (;;) {
        while (h->first == NULL && !h->closing)
            pthread_cond_wait(&h->changed, &h->mutex);
        if (h->closing)
            break; /* what still waits is dropped by xkv_hook_free() */
        job *j = h->first;
        h->first = j->next;
        if (h->first == NULL)
            h->last = NULL;
        w->running = j->number;
        xkv_ctx_reset(w->ctx);
        pthread_mutex_unlock(&h->mutex);
        xkv_put_report report = {0};
        xkv_status status = store_job(w, j, &report);
        pthread_mutex_lock(&h->mutex);
        w->running = 0;
        count_outcome(h, w, status, &report);
        drop_job(h, j);
    }
    pthread_mutex_unlock(&h->mutex);
    return NULL;
}

/* --- Creating ----------------------------------------------------------------------------------------------------- */

static xkv_status check_options(xkv_ctx *ctx, const xkv_hook_options *o)
{
    if (o->store == NULL || o->workers < 1 || o->workers > MAX_WORKERS || o->worker_threads > 1024)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a hook needs a store and 1 to %u workers, not %u", MAX_WORKERS,
                        o->workers);
    if (!(o->recompute_rate >= 0) || o->ttl > UINT64_MAX / 4000000u)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a recompute rate of %g, a ttl of %llu s", o->recompute_rate,
                        (unsigned long long)o->ttl);
    return XKV_OK;
}

static xkv_status start_worker(xkv_ctx *ctx, xkv_hook *h, worker *w)
{
    xkv_ctx_options o = xkv_ctx_options_default();
    w->hook = h;
    o.threads = h->o.worker_threads;
    xkv_status status = xkv_ctx_create(&o, &w->ctx);
    if (status != XKV_OK || pthread_create(&w->thread, NULL, work, w) != 0)
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "cannot start a thread of the hook");
    w->started = true;
    return XKV_OK;
}

xkv_status xkv_hook_create(xkv_ctx *ctx, const xkv_hook_options *options, xkv_hook **hook_p)
{
    xkv_hook_options o = xkv_hook_options_default();
    xkv_hook *h = NULL;
    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(check_options(ctx, &o));
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &h));
    h->o = o;
    h->next_number = 1;
    h->pack = xkv_pack_options_default();
    h->counters.bytes_per_second = FIRST_RATE;
    pthread_mutex_init(&h->mutex, NULL);
    pthread_cond_init(&h->changed, NULL);
    xkv_status status = xkv_copy_options(ctx, o.pack, &h->pack, sizeof h->pack);
    h->pack.progress = NULL;
    if (status == XKV_OK)
        status = xkv_ctx_create(NULL, &h->own);
    for (uint32_t i = 0; status == XKV_OK && i < o.workers; i++)
        status = start_worker(ctx, h, &h->workers[i]);
    if (status != XKV_OK) {
        xkv_hook_free(ctx, h);
        return status;
    }
    *hook_p = h;
    return XKV_OK;
}

void xkv_hook_free(xkv_ctx *ctx, xkv_hook *hook)
{
    if (hook == NULL)
        return;
    pthread_mutex_lock(&hook->mutex);
    hook->closing = true;
    pthread_cond_broadcast(&hook->changed);
    pthread_mutex_unlock(&hook->mutex);
    for (uint32_t i = 0; i < MAX_WORKERS; i++) {
        if (hook->workers[i].started)
            pthread_join(hook->workers[i].thread, NULL);
        xkv_ctx_free(hook->workers[i].ctx);
    }
    while (hook->first != NULL) {
        job *j = hook->first;
        hook->first = j->next;
        drop_job(hook, j);
    }
    xkv_ctx_free(hook->own);
    pthread_cond_destroy(&hook->changed);
    pthread_mutex_destroy(&hook->mutex);
    xkv_release(ctx, hook);
}

/* --- Match -------------------------------------------------------------------------------------------------------- */

/* Whether loading beats computing, as far as that is known. */
static void estimate(xkv_hook *h, uint32_t computed, xkv_hook_match_info *info)
{
    const xkv_match *m = &info->match;
    double gained = m->tokens > computed ? m->tokens - computed : 0;
    info->load_seconds = m->tokens > 0 ? (double)m->raw_bytes * gained / m->tokens / h->counters.bytes_per_second : 0;
    info->recompute_seconds = h->o.recompute_rate > 0 ? gained / h->o.recompute_rate : 0;
    info->worth_it = gained > 0 && (h->o.recompute_rate <= 0 || info->load_seconds < info->recompute_seconds);
}

xkv_status xkv_hook_match(xkv_ctx *ctx, xkv_hook *hook, const xkv_prompt *prompt, uint32_t computed,
                          xkv_hook_match_info *info, xkv_hit **hit_p)
{
    xkv_hook_match_info i = {.match = {.reason = XKV_MATCH_NONE}};
    xkv_hit *hit = NULL;
    xkv_status status = xkv_store_match(ctx, hook->o.store, &hook->o.ns, prompt, hook->o.min_tokens, &i.match, &hit);
    if (status == XKV_ERROR_ARGUMENT)
        return status;
    bool found = status == XKV_OK && i.match.reason == XKV_MATCH_FOUND;
    pthread_mutex_lock(&hook->mutex);
    if (found)
        estimate(hook, computed, &i);
    hook->counters.matches++;
    hook->counters.worth_it += i.worth_it;
    hook->counters.declined += found && !i.worth_it;
    hook->counters.misses += !found;
    pthread_mutex_unlock(&hook->mutex);
    if (!i.worth_it) {
        xkv_hit_close(ctx, hit);
        hit = NULL;
    }
    *info = i;
    *hit_p = hit;
    return XKV_OK;
}

/* --- Load --------------------------------------------------------------------------------------------------------- */

/* The rotation of two planes: the same, bit for bit, or none. */
static bool same_rope(const xkv_geometry *a, uint32_t i, const xkv_geometry *b, uint32_t j)
{
    if (i == XKV_NO_ROPE || j == XKV_NO_ROPE)
        return i == j;
    const xkv_rope *x = &a->ropes[i], *y = &b->ropes[j];
    return x->n_rot == y->n_rot && x->offset == y->offset && x->style == y->style &&
           memcmp(&x->scale, &y->scale, sizeof x->scale) == 0 &&
           memcmp(x->inv_freq, y->inv_freq, x->n_rot / 2 * sizeof *x->inv_freq) == 0;
}

static xkv_status check_geometry(xkv_ctx *ctx, const xkv_geometry *stored, const xkv_geometry *wanted)
{
    if (stored->layer_count != wanted->layer_count || stored->plane_count != wanted->plane_count)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "the entry has %u layers and %u planes, the engine %u and %u",
                        stored->layer_count, stored->plane_count, wanted->layer_count, wanted->plane_count);
    for (uint32_t i = 0; i < stored->plane_count; i++) {
        const xkv_plane *a = &stored->planes[i], *b = &wanted->planes[i];
        if (a->layer != b->layer || a->kind != b->kind || a->heads != b->heads || a->head_dim != b->head_dim ||
            !same_rope(stored, a->rope, wanted, b->rope))
            return xkv_fail(ctx, XKV_ERROR_MISMATCH, "plane %u of the entry is not that of the engine", i);
    }
    return XKV_OK;
}

static xkv_status check_positions(xkv_ctx *ctx, const xkv_geometry *g, const xkv_load_options *o, uint32_t count)
{
    bool rotated = false;
    for (uint32_t i = 0; i < g->plane_count; i++)
        rotated = rotated || g->planes[i].kind == XKV_PLANE_K || g->planes[i].kind == XKV_PLANE_K_ROPE;
    for (uint32_t i = 0; o->positions != NULL && rotated && i < count; i++) {
        if (o->positions[i] != g->positions[o->first_token + i])
            return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "token %u was stored at position %d, not %d",
                            o->first_token + i, (int)g->positions[o->first_token + i], (int)o->positions[i]);
    }
    return XKV_OK;
}

static xkv_status load(xkv_ctx *ctx, xkv_hit *hit, const xkv_geometry *geometry, xkv_load_options *o,
                       const xkv_view *views)
{
    xkv_read_options r = xkv_read_options_default();
    const xkv_entry *entry = NULL;
    uint32_t matched = xkv_hit_tokens(hit);
    xkv_status status = xkv_hit_entry(ctx, hit, &entry);
    if (xkv_is_damage(status))
        xkv_hit_reject(ctx, hit);
    XKV_TRY(status);
    if (o->first_token >= matched || o->token_count > matched - o->first_token)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "tokens %u + %u of %u matched ones", o->first_token, o->token_count,
                        matched);
    if (o->token_count == 0)
        o->token_count = matched - o->first_token;
    XKV_TRY(check_geometry(ctx, xkv_entry_geometry(entry), geometry));
    XKV_TRY(check_positions(ctx, xkv_entry_geometry(entry), o, o->token_count));
    r.first_token = o->first_token;
    r.token_count = o->token_count;
    r.group_ready = o->group_ready;
    r.group_ready_user = o->group_ready_user;
    return xkv_hit_read(ctx, hit, &r, views);
}

/* Raw bytes of `tokens` tokens. */
static double raw_bytes(const xkv_geometry *g, uint32_t tokens)
{
    return (double)xkv_geometry_raw_bytes(g) / (g->token_count > 0 ? g->token_count : 1) * tokens;
}

xkv_status xkv_hook_load(xkv_ctx *ctx, xkv_hook *hook, xkv_hit *hit, const xkv_geometry *geometry,
                         const xkv_load_options *options, const xkv_view *views)
{
    xkv_load_options o = xkv_load_options_default();
    const xkv_entry *entry = NULL;
    double start = seconds();
    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    xkv_status status = load(ctx, hit, geometry, &o, views);
    double taken = seconds() - start;
    if (status == XKV_OK)
        status = xkv_hit_entry(ctx, hit, &entry); /* open already */
    pthread_mutex_lock(&hook->mutex);
    hook->counters.loads++;
    hook->counters.load_failures += status != XKV_OK;
    if (status == XKV_OK) {
        double *rate = &hook->counters.bytes_per_second;
        double now = raw_bytes(xkv_entry_geometry(entry), o.token_count) / (taken > 1e-6 ? taken : 1e-6);
        bool first = hook->counters.tokens_loaded == 0;
        *rate = first ? now : *rate + SMOOTHING * (now - *rate);
        hook->counters.tokens_loaded += o.token_count;
    }
    pthread_mutex_unlock(&hook->mutex);
    return status;
}

/* --- Save --------------------------------------------------------------------------------------------------------- */

/* Sizes of the pieces that one block holds. */
typedef struct sizes {
    uint64_t planes, ropes, positions, tokens, views, media, names, rows, total;
} sizes;

static bool add_size(uint64_t *total, uint64_t count, uint64_t size, uint64_t *part)
{
    return xkv_mul64(count, size, part) && *part < UINT64_MAX / 64 && xkv_add64(*total, xkv_align64(*part, 64), total);
}

static xkv_status measure(xkv_ctx *ctx, const xkv_prompt *p, const xkv_geometry *g, sizes *s)
{
    uint64_t row = 0;
    memset(s, 0, sizeof *s);
    for (uint32_t i = 0; i < g->plane_count; i++)
        row += (uint64_t)g->planes[i].heads * g->planes[i].head_dim * xkv_dtype_size(g->planes[i].dtype);
    for (uint32_t i = 0; i < p->media_count; i++)
        s->names += p->media[i].id_size;
    uint64_t names = s->names;
    if (!add_size(&s->total, g->plane_count, sizeof *g->planes, &s->planes) ||
        !add_size(&s->total, g->rope_count, sizeof *g->ropes, &s->ropes) ||
        !add_size(&s->total, p->token_count, sizeof *g->positions, &s->positions) ||
        !add_size(&s->total, p->token_count, sizeof *p->tokens, &s->tokens) ||
        !add_size(&s->total, g->plane_count, sizeof(xkv_view), &s->views) ||
        !add_size(&s->total, p->media_count, sizeof *p->media, &s->media) ||
        !add_size(&s->total, names, 1, &s->names) || !add_size(&s->total, p->token_count, row, &s->rows) ||
        s->total > SIZE_MAX)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "the cache does not fit into memory twice");
    return XKV_OK;
}

/* What is copied, checked as far as the copying needs it; packing checks the rest. */
static xkv_status check_save(xkv_ctx *ctx, const xkv_prompt *p, const xkv_geometry *g, const xkv_view *views)
{
    if (p->token_count == 0 || p->token_count > g->token_count || g->plane_count > XKV_MAX_PLANES ||
        g->rope_count > XKV_MAX_ROPES)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a prompt of %u tokens, a cache of %u rows and %u planes",
                        p->token_count, g->token_count, g->plane_count);
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *plane = &g->planes[i];
        if (views[i].dtype != plane->dtype || xkv_dtype_size(plane->dtype) == 0 || plane->heads == 0 ||
            plane->heads > XKV_MAX_WIDTH || plane->head_dim == 0 || plane->head_dim > XKV_MAX_WIDTH)
            return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u: its view must have its dtype, and a width", i);
    }
    return XKV_OK;
}

/* The next piece of the block, with a copy of `from` unless that is NULL. */
static void *take(uint8_t **at, const void *from, uint64_t size)
{
    uint8_t *piece = *at;
    if (from != NULL && size > 0)
        memcpy(piece, from, (size_t)size);
    *at += xkv_align64(size, 64);
    return piece;
}

static void copy_media(const xkv_prompt *p, xkv_media *media, uint8_t *names)
{
    for (uint32_t i = 0; i < p->media_count; i++) {
        memcpy(names, p->media[i].id, p->media[i].id_size);
        media[i] = p->media[i];
        media[i].id = names;
        names += p->media[i].id_size;
    }
}

static void copy_rows(const xkv_geometry *g, uint32_t tokens, const xkv_view *from, xkv_view *to, uint8_t *rows)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *plane = &g->planes[i];
        size_t element = xkv_dtype_size(plane->dtype), head = plane->head_dim * element, row = plane->heads * head;
        xkv_view_gather_bytes(&from[i], plane, 0, tokens, rows, row);
        to[i] = (xkv_view){rows, (int64_t)row, (int64_t)head, (int64_t)element, NULL, plane->dtype};
        rows += row * tokens;
    }
}

static void fill_job(job *j, const sizes *s, const xkv_prompt *p, const xkv_geometry *g, const xkv_view *views)
{
    uint8_t *at = j->block;
    j->geometry = *g;
    j->geometry.token_count = p->token_count;
    j->geometry.planes = take(&at, g->planes, s->planes);
    j->geometry.ropes = take(&at, g->ropes, s->ropes);
    j->geometry.positions = take(&at, g->positions, s->positions);
    j->prompt = *p;
    j->prompt.tokens = take(&at, p->tokens, s->tokens);
    j->geometry.token_ids = j->prompt.tokens;
    j->geometry.token_id_count = p->token_count;
    j->views = take(&at, NULL, s->views);
    xkv_media *media = take(&at, NULL, s->media);
    copy_media(p, media, take(&at, NULL, s->names));
    j->prompt.media = media;
    copy_rows(g, p->token_count, views, j->views, at);
}

/* Room for the bytes, taken at once; a job larger than the whole queue is taken when nothing else waits. */
static bool take_room(xkv_hook *h, uint64_t bytes)
{
    pthread_mutex_lock(&h->mutex);
    h->counters.saves++;
    while (h->waiting_jobs > 0 && (bytes > h->o.queue_bytes || h->waiting_bytes > h->o.queue_bytes - bytes)) {
        if (!h->o.wait) {
            h->counters.refused++;
            pthread_mutex_unlock(&h->mutex);
            return false;
        }
        pthread_cond_wait(&h->changed, &h->mutex);
    }
    h->waiting_bytes += bytes;
    h->waiting_jobs++;
    pthread_mutex_unlock(&h->mutex);
    return true;
}

static void leave_room(xkv_hook *h, uint64_t bytes)
{
    pthread_mutex_lock(&h->mutex);
    h->waiting_bytes -= bytes;
    h->waiting_jobs--;
    h->counters.refused++;
    pthread_cond_broadcast(&h->changed);
    pthread_mutex_unlock(&h->mutex);
}

static xkv_status make_job(xkv_ctx *ctx, xkv_hook *h, uint64_t bytes, job **job_p)
{
    job *j = NULL;
    xkv_status status = XKV_NEW_ZERO(h->own, 1, &j);
    if (status == XKV_OK)
        status = XKV_NEW(h->own, (size_t)bytes, &j->block);
    if (status != XKV_OK) {
        xkv_release(h->own, j);
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "no memory for a copy of the cache: %llu bytes",
                        (unsigned long long)bytes);
    }
    j->bytes = bytes;
    *job_p = j;
    return XKV_OK;
}

static uint64_t enqueue(xkv_hook *h, job *j)
{
    pthread_mutex_lock(&h->mutex);
    uint64_t number = j->number = h->next_number++;
    if (h->last != NULL)
        h->last->next = j;
    else
        h->first = j;
    h->last = j;
    h->counters.queued++;
    pthread_cond_broadcast(&h->changed);
    pthread_mutex_unlock(&h->mutex);
    return number;
}

xkv_status xkv_hook_save(xkv_ctx *ctx, xkv_hook *hook, const xkv_prompt *prompt, const xkv_geometry *geometry,
                         const xkv_view *views, uint64_t *job_number)
{
    sizes s;
    job *j = NULL;
    xkv_ctx_begin(ctx);
    XKV_TRY(check_save(ctx, prompt, geometry, views));
    if (prompt->token_count < hook->o.min_tokens) {
        pthread_mutex_lock(&hook->mutex);
        hook->counters.saves++;
        hook->counters.too_short++;
        pthread_mutex_unlock(&hook->mutex);
        if (job_number != NULL)
            *job_number = 0;
        return XKV_OK;
    }
    XKV_TRY(measure(ctx, prompt, geometry, &s));
    if (!take_room(hook, s.total))
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "%llu bytes more do not fit into the queue of %llu",
                        (unsigned long long)s.total, (unsigned long long)hook->o.queue_bytes);
    xkv_status status = make_job(ctx, hook, s.total, &j);
    if (status != XKV_OK) {
        leave_room(hook, s.total);
        return status;
    }
    fill_job(j, &s, prompt, geometry, views);
    uint64_t number = enqueue(hook, j);
    if (job_number != NULL)
        *job_number = number;
    return XKV_OK;
}

/* Take a waiting job out of the queue; NULL when it does not wait. With the mutex held. */
static job *unqueue(xkv_hook *h, uint64_t number)
{
    job *before = NULL, *j = h->first;
    for (; j != NULL && j->number != number; j = j->next)
        before = j;
    if (j == NULL)
        return NULL;
    if (before != NULL)
        before->next = j->next;
    else
        h->first = j->next;
    if (h->last == j)
        h->last = before;
    return j;
}

void xkv_hook_cancel(xkv_hook *hook, uint64_t number)
{
    if (number == 0)
        return;
    pthread_mutex_lock(&hook->mutex);
    job *j = unqueue(hook, number);
    if (j != NULL) {
        hook->counters.cancelled++;
        drop_job(hook, j);
    }
    for (uint32_t i = 0; j == NULL && i < hook->o.workers; i++) {
        if (hook->workers[i].running == number)
            xkv_ctx_cancel(hook->workers[i].ctx);
    }
    pthread_mutex_unlock(&hook->mutex);
}

/* Whether a job with a number below `end` waits or is being packed. With the mutex held. */
static bool is_busy(const xkv_hook *h, uint64_t end)
{
    if (h->first != NULL && h->first->number < end) /* numbers ascend in the queue */
        return true;
    for (uint32_t i = 0; i < h->o.workers; i++) {
        if (h->workers[i].running != 0 && h->workers[i].running < end)
            return true;
    }
    return false;
}

void xkv_hook_flush(xkv_hook *hook)
{
    pthread_mutex_lock(&hook->mutex);
    for (uint64_t end = hook->next_number; is_busy(hook, end);)
        pthread_cond_wait(&hook->changed, &hook->mutex);
    pthread_mutex_unlock(&hook->mutex);
}

/* --- Counters ----------------------------------------------------------------------------------------------------- */

void xkv_hook_get_counters(xkv_hook *hook, xkv_hook_counters *counters)
{
    pthread_mutex_lock(&hook->mutex);
    *counters = hook->counters;
    counters->waiting_jobs = hook->waiting_jobs;
    counters->waiting_bytes = hook->waiting_bytes;
    pthread_mutex_unlock(&hook->mutex);
}

void xkv_hook_last_failure(xkv_hook *hook, char *text, size_t size)
{
    pthread_mutex_lock(&hook->mutex);
    snprintf(text, size, "%s", hook->failure);
    pthread_mutex_unlock(&hook->mutex);
}
