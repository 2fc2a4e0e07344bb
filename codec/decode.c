/* decode.c - restoring an entry: groups in order, on all threads.
 *
 * The work is one list of numbered tasks: for each group one that opens it, then one for each of its chunks, or of
 * parts of these where there are too few to keep all threads busy. Threads take them in their order, so that the chunks
 * of several groups may be decoded at the same time. A task waits for nothing but tasks before it: a chunk for its
 * group to be open and, in groups of codec dict, when their own part is done for all chunks of the cross stage, which
 * is the first group; opening for a free place. */
#include "chunks.h"
#include "parts.h"
#include "scatter.h"

enum {
    TASKS_PER_THREAD = 8,        /* of a group, if there are enough tokens: */
    SLICE_STRIPS = 4,            /* tokens that a task restores, at least, in strips of a product */
    MAX_PLACES = 8,              /* groups that are open at a time */
    MAX_OPEN_BYTES = 32u << 20,  /* of components that they have in memory, beyond two groups */
    MAX_KEPT_BYTES = 4u << 20,   /* of integers of a group that several tasks share */
    CANCEL_NANOSECONDS = 5000000 /* how soon a task that waits finds out that the call is cancelled */
};

/* What one thread needs. */
typedef struct worker {
    xkv_chunk_scratch scratch; /* of the group whose task it ran last */
    float *rows;               /* [XKV_CHUNK_ROWS][width] likewise */
    const xkv_group *g;
    xkv_scatterer scatterer;
    uint64_t task; /* at hand */
} worker;

/* A group to be restored. */
typedef struct member {
    const xkv_group *g;
    uint32_t index; /* in the entry */
    bool asked;     /* else only others need it */
    bool open, done;
    uint32_t left; /* slices that are not restored yet */
} member;

typedef struct decoder {
    xkv_ctx *ctx;
    const xkv_entry *entry;
    const xkv_read_options *o;
    xkv_target target;
    uint32_t first_chunk, chunks; /* that have tokens asked for */
    uint32_t slices;              /* tasks that restore a chunk, each some of its tiles: */
    uint32_t slice_tokens;        /* at most, a multiple of XKV_STRIP */
    xkv_pool *pool;
    uint32_t threads;
    worker *workers; /* [threads] */
    xkv_cross_stage cross;

    uint32_t count, places;
    member *members;           /* [count] */
    xkv_group_reader *readers; /* [places] member m's is that at m % places */

    /* The thread of the call tells which groups are ready. */
    uint32_t announced;
    uint64_t done, total; /* bytes */

    pthread_mutex_t mutex; /* of members' open, done and left, and of: */
    pthread_cond_t changed;
    uint64_t failed; /* the first task that has failed, or UINT64_MAX */
} decoder;

/* --- Order -------------------------------------------------------------------------------------------------------- */

static xkv_group_reader *reader_of(const decoder *d, uint32_t m)
{
    return &d->readers[m % d->places];
}

static bool is_open(const decoder *d, uint32_t m)
{
    return d->members[m].open;
}

static bool has_cross(const decoder *d, uint32_t m)
{
    return d->members[m].g->codec != XKV_GROUP_DICT || !d->cross.g || d->members[0].done;
}

static bool has_place(const decoder *d, uint32_t m)
{
    return m < d->places || d->members[m - d->places].done;
}

/* The first group that has rows. */
static uint32_t first_member(const decoder *d)
{
    return d->cross.g ? 1 : 0;
}

/* Somebody waits for the first group: before it is ready the thread of the call, which has to tell, begins no later
 * one. */
static bool may_go_on(const decoder *d, uint32_t m)
{
    return m <= first_member(d) || d->members[first_member(d)].done;
}

/* Wait for tasks before the one at hand. When one of these has failed, that is the result of the call, whatever is
 * returned here; those behind do not matter. */
static xkv_status wait_for(decoder *d, const worker *w, bool (*come)(const decoder *d, uint32_t m), uint32_t m)
{
    xkv_status status = XKV_OK;
    xkv_patience patience = {0};

    pthread_mutex_lock(&d->mutex);
    while (status == XKV_OK && !come(d, m)) {
        xkv_wait_for_change(&d->mutex, &d->changed, CANCEL_NANOSECONDS, &patience);
        status = d->failed < w->task ? XKV_ERROR_CANCELLED : xkv_check_cancel(d->ctx);
    }
    pthread_mutex_unlock(&d->mutex);
    return status;
}

static void set_flag(decoder *d, bool *flag)
{
    pthread_mutex_lock(&d->mutex);
    *flag = true;
    pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->mutex);
}

static bool is_done(decoder *d, uint32_t m)
{
    bool done;

    pthread_mutex_lock(&d->mutex);
    done = d->members[m].done;
    pthread_mutex_unlock(&d->mutex);
    return done;
}

/* A slice is restored. Behind the last one nobody uses the reader any more. */
static void count_slice(decoder *d, uint32_t m)
{
    bool last;

    pthread_mutex_lock(&d->mutex);
    last = --d->members[m].left == 0;
    pthread_mutex_unlock(&d->mutex);
    if (!last)
        return;
    xkv_group_reader_close(reader_of(d, m));
    set_flag(d, &d->members[m].done);
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

static uint64_t asked_bytes(const decoder *d, const member *m)
{
    return m->asked ? xkv_group_row_bytes(&d->entry->c.geometry, m->g, d->target.end - d->target.first) : 0;
}

/* Tell which groups are ready, if this is the thread of the call. */
static xkv_status announce(decoder *d, const worker *w)
{
    for (; w == d->workers && d->announced < d->count && is_done(d, d->announced); d->announced++) {
        const member *m = &d->members[d->announced];
        d->done += asked_bytes(d, m);
        if (m->asked)
            XKV_TRY(xkv_read_announce(d->ctx, d->o, m->index, d->done, d->total));
    }
    return XKV_OK;
}

/* Scratch for a group. */
static xkv_status size_worker(const decoder *d, worker *w, const xkv_group_reader *r)
{
    if (w->g == r->g)
        return XKV_OK;
    w->g = NULL;
    XKV_TRY(xkv_chunk_scratch_size(r, true, &w->scratch));
    xkv_release(d->ctx, w->rows);
    w->rows = NULL;
    XKV_TRY(XKV_NEW(d->ctx, (size_t)XKV_CHUNK_ROWS * r->g->width, &w->rows));
    w->g = r->g;
    return XKV_OK;
}

/* Sinks and window. */
static xkv_status scatter_exact_rows(const decoder *d, worker *w, const xkv_group *g, const uint8_t *matrix)
{
    const xkv_container *c = &d->entry->c;
    uint32_t end = c->geometry.token_count, window = end - c->window;

    XKV_TRY(xkv_scatter_exact(&d->target, &w->scatterer, g, matrix, 0, c->sinks, w->rows));
    matrix += xkv_group_row_bytes(&c->geometry, g, c->sinks);
    return xkv_scatter_exact(&d->target, &w->scatterer, g, matrix, window, end, w->rows);
}

static xkv_status restore_exact_rows(const decoder *d, worker *w, const xkv_group_reader *r)
{
    const xkv_container *c = &d->entry->c;
    uint8_t *matrix = NULL;
    xkv_status status;

    if (r->g->codec == XKV_GROUP_LOSSLESS || xkv_group_is_cross(r->g) || c->sinks + c->window == 0)
        return XKV_OK;
    XKV_TRY(xkv_read_exact_rows(r, &matrix));
    status = scatter_exact_rows(d, w, r->g, matrix);
    xkv_release(d->ctx, matrix);
    return status;
}

/* The stage, for groups that are decoded with it; to check a group's own integers nobody needs it. */
static xkv_cross_stage *stage_for(decoder *d, const xkv_group *g)
{
    return d->target.views || xkv_group_is_cross(g) ? &d->cross : NULL;
}

/* Whether integers are decoded once for several tasks that make rows of them, or by each of these. */
static bool shares_integers(const decoder *d, const xkv_group_reader *r)
{
    uint64_t bytes = sizeof(int16_t) * (uint64_t)r->side.coded * d->chunks * d->entry->c.chunk_tokens;

    return d->slices > 1 && d->target.views && xkv_group_is_coded(r->g) && !xkv_group_is_cross(r->g) &&
           bytes <= MAX_KEPT_BYTES;
}

static xkv_status open_group(decoder *d, worker *w, uint32_t m)
{
    xkv_group_reader *r = reader_of(d, m);

    XKV_TRY(wait_for(d, w, has_place, m));
    if (m + 1 < d->count)
        xkv_container_prefetch(&d->entry->input, &d->entry->c, d->members[m + 1].g, d->first_chunk, d->chunks);
    XKV_TRY(xkv_group_reader_open(d->ctx, d->entry, d->members[m].g, stage_for(d, d->members[m].g), r));
    if (d->target.views)
        XKV_TRY(xkv_group_reader_for_rows(r, d->target.heads));
    XKV_TRY(size_worker(d, w, r));
    if (shares_integers(d, r))
        XKV_TRY(xkv_group_reader_keep(r, &w->scratch, d->first_chunk, d->first_chunk + d->chunks - 1));
    XKV_TRY(restore_exact_rows(d, w, r));
    set_flag(d, &d->members[m].open);
    return XKV_OK;
}

/* --- Chunks ------------------------------------------------------------------------------------------------------- */

/* What the group's own integers say does not wait for those of the cross stage. */
static xkv_status restore_tiles(decoder *d, worker *w, uint32_t m, const xkv_chunk *chunk, uint32_t slice)
{
    const xkv_group_reader *r = reader_of(d, m);
    uint64_t begin = chunk->t0 + (uint64_t)slice * d->slice_tokens;
    uint32_t end = (uint32_t)xkv_min64(xkv_min64(chunk->t1, d->target.end), begin + d->slice_tokens);

    for (uint32_t t0 = (uint32_t)xkv_max64(begin, d->target.first), t1; t0 < end; t0 = t1) {
        t1 = (uint32_t)xkv_min64(end, (uint64_t)t0 + XKV_CHUNK_ROWS);
        xkv_chunk_own_rows(r, &w->scratch, chunk, t0, t1, w->rows);
        XKV_TRY(wait_for(d, w, has_cross, m));
        xkv_chunk_add_cross(r, &w->scratch, chunk, t0, t1, w->rows);
        XKV_TRY(xkv_scatter_rows(&d->target, &w->scatterer, r->g, w->rows, t0, t1));
    }
    return XKV_OK;
}

static xkv_status restore_slice(decoder *d, worker *w, uint32_t m, uint32_t index, uint32_t slice)
{
    const xkv_group_reader *r = reader_of(d, m);
    bool whole = r->g->codec == XKV_GROUP_LOSSLESS || !d->target.views || xkv_group_is_cross(r->g);
    xkv_chunk chunk;

    if (whole && slice > 0)
        return XKV_OK;
    XKV_TRY(size_worker(d, w, r));
    XKV_TRY(xkv_chunk_load(r, &w->scratch, d->first_chunk + index, &chunk));
    if (r->g->codec == XKV_GROUP_LOSSLESS)
        return xkv_scatter_exact(&d->target, &w->scatterer, r->g, chunk.matrix, chunk.t0, chunk.t1, w->rows);
    return whole ? XKV_OK : restore_tiles(d, w, m, &chunk, slice);
}

/* Which member a task is for: its at-th, where 0 opens it. The first one that has rows is opened before the integers of
 * the cross stage are decoded, and each behind it before rows of the one before it are made. */
static void find_task(const decoder *d, uint64_t task, uint32_t *m, uint32_t *at)
{
    uint64_t parts = (uint64_t)d->chunks * d->slices, begun = xkv_min64(first_member(d) + 1, d->count);
    uint64_t plain = begun * (parts + 1);

    if (task < begun || task == plain) {
        *m = (uint32_t)(task < begun ? task : begun);
        *at = 0;
    } else if (task < plain) {
        *m = (uint32_t)((task - begun) / parts);
        *at = (uint32_t)((task - begun) % parts) + 1;
    } else {
        task -= plain + 1; /* .. then the next member is opened, and rows of this one are made */
        *m = (uint32_t)(begun + task / (parts + 1));
        *at = (uint32_t)(task % (parts + 1));
        if (*m == d->count - 1) /* no next one */
            ++*at;
        else if (*at == 0)
            ++*m;
    }
}

static xkv_status run_task(decoder *d, worker *w, uint64_t task)
{
    uint32_t m, at;

    w->task = task;
    find_task(d, task, &m, &at);
    if (w == d->workers)
        XKV_TRY(wait_for(d, w, may_go_on, m));
    XKV_TRY(announce(d, w));
    if (at == 0)
        return open_group(d, w, m);
    XKV_TRY(wait_for(d, w, is_open, m));
    XKV_TRY(restore_slice(d, w, m, (at - 1) / d->slices, (at - 1) % d->slices));
    count_slice(d, m);
    return XKV_OK;
}

static xkv_status task(void *user, uint32_t number, uint64_t index)
{
    decoder *d = user;
    worker *w = &d->workers[number];
    xkv_status status = run_task(d, w, index);

    if (status == XKV_OK)
        status = announce(d, w);
    if (status != XKV_OK) {
        pthread_mutex_lock(&d->mutex);
        d->failed = xkv_min64(d->failed, index);
        pthread_cond_broadcast(&d->changed);
        pthread_mutex_unlock(&d->mutex);
    }
    return status;
}

/* --- The call ----------------------------------------------------------------------------------------------------- */

static void add_member(decoder *d, uint32_t group, bool asked)
{
    member *m = &d->members[d->count++];

    *m = (member){.g = &d->entry->c.groups[group], .index = group, .asked = asked, .left = d->chunks * d->slices};
    d->total += asked_bytes(d, m);
}

/* The groups that are asked for, behind the cross stage if one of them needs it. */
static xkv_status list_members(decoder *d)
{
    uint32_t first = d->o->first_group, end = first + d->o->group_count;

    XKV_TRY(XKV_NEW(d->ctx, d->o->group_count + 1u, &d->members));
    if (xkv_read_needs_cross(d->entry, d->o)) {
        XKV_TRY(xkv_cross_stage_open(d->ctx, d->entry, &d->cross));
        if (d->target.views)
            XKV_TRY(xkv_cross_stage_keep(d->ctx, d->entry, d->first_chunk, d->first_chunk + d->chunks - 1, &d->cross));
    }
    if (d->cross.g && first > 0)
        add_member(d, 0, false);
    for (uint32_t i = first; i < end; i++)
        add_member(d, i, true);
    return XKV_OK;
}

/* Products are shared among the threads in parts of chunks where there are few of these. */
static void choose_slices(decoder *d)
{
    const xkv_container *c = &d->entry->c;
    uint64_t strips = xkv_ceil_div(xkv_min64(c->chunk_tokens, c->geometry.token_count), XKV_STRIP);
    uint64_t wanted = d->threads > 1 ? xkv_ceil_div((uint64_t)TASKS_PER_THREAD * d->threads, d->chunks) : 1;

    d->slices = (uint32_t)xkv_max64(1, xkv_min64(strips / SLICE_STRIPS, wanted));
    d->slice_tokens = (uint32_t)xkv_ceil_div(strips, d->slices) * XKV_STRIP;
}

/* As many groups at a time as keep all threads busy, while their components take little memory. */
static void choose_places(decoder *d)
{
    uint64_t largest = 1, wanted = 2 + xkv_ceil_div(2ull * d->threads, (uint64_t)d->chunks * d->slices);

    for (uint32_t i = 0; i < d->count; i++)
        largest = xkv_max64(largest, (uint64_t)d->members[i].g->rank * d->members[i].g->width * sizeof(float));
    wanted = xkv_min64(wanted, xkv_max64(2, MAX_OPEN_BYTES / largest));
    d->places = (uint32_t)xkv_min64(d->count, xkv_min64(wanted, MAX_PLACES));
}

static xkv_status init(decoder *d)
{
    d->threads = xkv_ctx_threads(d->ctx);
    XKV_TRY(xkv_moves_create(d->ctx, &d->entry->c.geometry, d->entry->c.groups, d->o, &d->target.moves));
    XKV_TRY(xkv_pool_create(d->ctx, d->threads, &d->pool));
    d->threads = xkv_pool_threads(d->pool);
    XKV_TRY(XKV_NEW_ZERO(d->ctx, d->threads, &d->workers));
    for (uint32_t i = 0; i < d->threads; i++)
        XKV_TRY(xkv_scatterer_init(&d->target, &d->workers[i].scatterer));
    choose_slices(d);
    XKV_TRY(list_members(d));
    choose_places(d);
    return XKV_NEW_ZERO(d->ctx, d->places, &d->readers);
}

static void fini(decoder *d)
{
    for (uint32_t i = 0; d->readers && i < d->places; i++)
        xkv_group_reader_close(&d->readers[i]);
    for (uint32_t i = 0; d->workers && i < d->threads; i++) {
        xkv_chunk_scratch_free(d->ctx, &d->workers[i].scratch);
        xkv_release(d->ctx, d->workers[i].rows);
        xkv_scatterer_free(&d->target, &d->workers[i].scatterer);
    }
    xkv_cross_stage_free(d->ctx, &d->cross);
    xkv_release(d->ctx, d->readers);
    xkv_release(d->ctx, d->members);
    xkv_release(d->ctx, d->workers);
    xkv_moves_free(d->ctx, &d->target.moves);
    xkv_pool_free(d->ctx, d->pool);
    pthread_mutex_destroy(&d->mutex);
    pthread_cond_destroy(&d->changed);
}

static xkv_status decode(decoder *d)
{
    XKV_TRY(init(d));
    XKV_TRY(xkv_pool_run(d->ctx, d->pool, d->count * (1u + (uint64_t)d->chunks * d->slices), task, d));
    return announce(d, d->workers);
}

xkv_status xkv_resolve_range(xkv_ctx *ctx, const char *what, uint32_t total, uint32_t first, uint32_t *count)
{
    if (first > total || *count > total - first)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "%s %u + %u are not within the %u of the entry", what, first, *count,
                        total);
    if (*count == 0)
        *count = total - first;
    return XKV_OK;
}

/* Whether the heads asked for are a plane's, and its blocks are not cut. */
static xkv_status check_heads(xkv_ctx *ctx, uint32_t plane, const xkv_plane *p, const xkv_read_options *o)
{
    if (o->first_head >= p->heads || o->head_count > p->heads - o->first_head)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "heads %u + %u are not within the %u of plane %u", o->first_head,
                        o->head_count, p->heads, plane);
    if (p->head_dim % xkv_dtype_block(p->dtype) != 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u: blocks of %s reach over heads of %u", plane,
                        xkv_dtype_name(p->dtype), p->head_dim);
    return XKV_OK;
}

/* Nothing is changed when all heads are asked for. */
static xkv_status resolve_heads(xkv_ctx *ctx, const xkv_geometry *g, xkv_read_options *o)
{
    bool to_the_end = o->head_count == 0;

    for (uint32_t i = 0; i < g->plane_count && (o->first_head > 0 || !to_the_end); i++) {
        const xkv_plane *p = &g->planes[i];
        if (p->kind == XKV_PLANE_LATENT || p->kind == XKV_PLANE_K_ROPE)
            continue;
        if (to_the_end && p->heads > o->first_head)
            o->head_count = p->heads - o->first_head;
        to_the_end = false; /* the first plane says where it is */
        XKV_TRY(check_heads(ctx, i, p, o));
    }
    return XKV_OK;
}

xkv_status xkv_read_options_resolve(xkv_ctx *ctx, const xkv_entry *entry, uint32_t tokens, xkv_read_options *o)
{
    XKV_TRY(xkv_resolve_range(ctx, "tokens", tokens, o->first_token, &o->token_count));
    XKV_TRY(xkv_resolve_range(ctx, "groups", entry->c.group_count, o->first_group, &o->group_count));
    return resolve_heads(ctx, &entry->geometry, o);
}

bool xkv_read_needs_cross(const xkv_entry *entry, const xkv_read_options *o)
{
    for (uint32_t i = o->first_group; i < o->first_group + o->group_count; i++)
        if (entry->c.groups[i].codec == XKV_GROUP_DICT || xkv_group_is_cross(&entry->c.groups[i]))
            return true;
    return false;
}

xkv_status xkv_read_announce(xkv_ctx *ctx, const xkv_read_options *o, uint32_t group, uint64_t done, uint64_t total)
{
    if ((o->group_ready && o->group_ready(o->group_ready_user, group) != 0) ||
        (o->progress && o->progress(o->progress_user, done, total) != 0))
        return xkv_fail(ctx, XKV_ERROR_CANCELLED, "stopped by a callback");
    return XKV_OK;
}

/* Only those of the groups asked for are looked at. */
static xkv_status check_views(xkv_ctx *ctx, const xkv_container *c, const xkv_read_options *o, const xkv_view *views)
{
    for (uint32_t i = o->first_group; i < o->first_group + o->group_count; i++)
        for (uint32_t k = 0; k < c->groups[i].plane_count; k++)
            XKV_TRY(xkv_check_heads_view(ctx, &c->geometry, c->groups[i].planes[k],
                                         (xkv_heads){o->first_head, o->head_count}, &views[c->groups[i].planes[k]]));
    return XKV_OK;
}

xkv_status xkv_entry_decode_own(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                                const xkv_view *views)
{
    xkv_read_options o = xkv_read_options_default();
    decoder d = {.ctx = ctx, .entry = entry, .o = &o, .failed = UINT64_MAX};
    xkv_status status;

    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(xkv_read_options_resolve(ctx, entry, entry->c.geometry.token_count, &o));
    if (o.token_count == 0 || o.group_count == 0)
        return XKV_OK;
    if (views)
        XKV_TRY(check_views(ctx, &entry->c, &o, views));
    d.target = (xkv_target){.ctx = ctx,
                            .kernels = xkv_kernels_cpu(),
                            .c = &entry->c,
                            .views = views,
                            .first = o.first_token,
                            .end = o.first_token + o.token_count,
                            .heads = {o.first_head, o.head_count}};
    d.first_chunk = d.target.first / entry->c.chunk_tokens;
    d.chunks = (d.target.end - 1) / entry->c.chunk_tokens - d.first_chunk + 1;
    pthread_mutex_init(&d.mutex, NULL);
    pthread_cond_init(&d.changed, NULL);
    status = decode(&d);
    fini(&d);
    return status;
}

static xkv_status decode_one(void *user, xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *o,
                             const xkv_view *views)
{
    (void)user;
    return xkv_entry_decode_own(ctx, entry, o, views);
}

xkv_status xkv_entry_decode(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                            const xkv_view *views)
{
    xkv_read_options o = xkv_read_options_default();

    if (!entry->parent)
        return xkv_entry_decode_own(ctx, entry, options, views);
    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(xkv_read_options_resolve(ctx, entry, entry->geometry.token_count, &o));
    return o.token_count == 0 || o.group_count == 0 ? XKV_OK
                                                    : xkv_extended_decode(ctx, entry, &o, views, decode_one, NULL);
}

xkv_status xkv_entry_read(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options, const xkv_view *views)
{
    xkv_ctx_begin(ctx);
    if (!views)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "no views to restore into");
    return xkv_entry_decode(ctx, entry, options, views);
}
