/* hook.c - the hook's life, matching and loading. */
#include "container.h"
#include "hook_internal.h"
#include "store_internal.h"

#include <time.h>
#include <unistd.h>

struct xkv_hook_hit {
    xkv_hook *hook;
    xkv_ctx *own; /* everything here belongs to it, so that any thread may load and close */
    uint64_t id, bytes;
    uint32_t entry_tokens, tokens; /* of the entry; reusable */
    pthread_mutex_t mutex;         /* of all below */
    xkv_hit *hit;
    const xkv_entry *entry; /* NULL until a load asks for it; then read by all threads */
    bool damaged;
    bool used; /* a load has succeeded */
};

/* --- Shared ------------------------------------------------------------------------------------------------------- */

xkv_status xkv_hook_begin(xkv_ctx *ctx, const xkv_hook *hook)
{
    xkv_ctx_begin(ctx);
    if (hook->pid != getpid())
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the hook was made before fork(): make one in the child");
    return XKV_OK;
}

static uint64_t monotonic_clock(void *user)
{
    (void)user;
    return xkv_clock_ns();
}

uint64_t xkv_hook_now(const xkv_hook *hook)
{
    return hook->clock(hook->clock_user);
}

double xkv_hook_seconds(const xkv_hook *hook, uint64_t start)
{
    return (double)(xkv_hook_now(hook) - start) * 1e-9;
}

xkv_status xkv_hook_context(xkv_ctx *ctx, const xkv_hook *hook, uint32_t threads, xkv_ctx **made_p)
{
    xkv_ctx_options o = hook->context;
    o.threads = threads;
    xkv_status status = xkv_ctx_create(&o, made_p);
    return status == XKV_OK ? XKV_OK : xkv_fail(ctx, status, "a context of the hook: %s", xkv_status_string(status));
}

/* --- Life --------------------------------------------------------------------------------------------------------- */

static xkv_status check_options(xkv_ctx *ctx, const xkv_hook_options *o)
{
    if (o->save_threads == 0 || o->save_threads > 64 || o->pack_threads == 0 || o->pack_threads > 1024)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "save_threads: 1 to 64, pack_threads: 1 to 1024");
    if (o->queue_saves == 0 || o->queue_bytes == 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a queue without room");
    if (!(o->load_seconds >= 0 && o->load_seconds_per_byte >= 0 && o->load_seconds_per_token >= 0))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a load takes a negative time, or none that is a number");
    return XKV_OK;
}

static double or_default(double given, double otherwise)
{
    return given > 0 ? given : otherwise;
}

static xkv_status apply_options(xkv_ctx *ctx, xkv_hook *hook, const xkv_hook_options *o)
{
    hook->context = xkv_ctx_options_default();
    hook->pack = xkv_pack_options_default();
    XKV_TRY(xkv_copy_options(ctx, o->context, &hook->context, sizeof hook->context));
    XKV_TRY(xkv_copy_options(ctx, o->pack, &hook->pack, sizeof hook->pack));
    hook->pack_threads = o->pack_threads;
    hook->queue_saves = o->queue_saves;
    hook->queue_bytes = o->queue_bytes;
    hook->wait_ms = o->wait_ms;
    hook->clock = o->clock != NULL ? o->clock : monotonic_clock;
    hook->clock_user = o->clock_user;
    xkv_cost_init(&hook->cost, or_default(o->load_seconds, 1e-3), or_default(o->load_seconds_per_byte, 1e-9),
                  or_default(o->load_seconds_per_token, 2e-5));
    return XKV_OK;
}

static void init_locks(xkv_hook *hook)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&hook->mutex, NULL);
    pthread_cond_init(&hook->work, NULL);
    pthread_cond_init(&hook->room, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

/* The hook belongs to a context of its own, and that to the hook. */
static xkv_status make(xkv_ctx *ctx, const xkv_hook *draft, uint32_t savers, xkv_hook **hook_p)
{
    xkv_hook *hook = NULL;
    xkv_ctx *own = NULL;
    XKV_TRY(xkv_hook_context(ctx, draft, 1, &own));
    xkv_status status = XKV_NEW(own, 1, &hook);
    if (status != XKV_OK) {
        xkv_fail(ctx, status, "%s", xkv_ctx_error(own));
        xkv_ctx_free(own);
        return status;
    }
    *hook = *draft;
    hook->own = own;
    hook->last = &hook->first;
    init_locks(hook);
    status = xkv_savers_start(ctx, hook, savers);
    if (status != XKV_OK) {
        xkv_hook_close(hook);
        return status;
    }
    *hook_p = hook;
    return XKV_OK;
}

xkv_status xkv_hook_create(xkv_ctx *ctx, xkv_store *store, const xkv_hook_options *options, xkv_hook **hook_p)
{
    xkv_hook_options o = xkv_hook_options_default();
    xkv_hook draft = {.store = store, .pid = getpid()};
    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(check_options(ctx, &o));
    XKV_TRY(apply_options(ctx, &draft, &o));
    return make(ctx, &draft, o.save_threads, hook_p);
}

void xkv_hook_close(xkv_hook *hook)
{
    if (hook == NULL)
        return;
    xkv_ctx *own = hook->own;
    xkv_savers_end(hook);
    pthread_cond_destroy(&hook->room);
    pthread_cond_destroy(&hook->work);
    pthread_mutex_destroy(&hook->mutex);
    xkv_release(own, hook);
    xkv_ctx_free(own);
}

void xkv_hook_get_counters(xkv_hook *hook, xkv_hook_counters *counters)
{
    pthread_mutex_lock(&hook->mutex);
    *counters = hook->counters;
    counters->seconds_per_load = hook->cost.now[XKV_COST_LOAD];
    counters->seconds_per_byte = hook->cost.now[XKV_COST_BYTE];
    counters->seconds_per_token = hook->cost.now[XKV_COST_TOKEN];
    pthread_mutex_unlock(&hook->mutex);
}

/* --- Matching ----------------------------------------------------------------------------------------------------- */

static uint32_t whole_pages(uint32_t tokens, uint32_t page_tokens)
{
    return tokens - tokens % page_tokens;
}

/* The fewest and the most tokens that a match may have, both whole pages. */
static void bounds(const xkv_prompt *prompt, const xkv_hook_match_options *o, uint64_t *least, uint32_t *most)
{
    uint64_t wanted = xkv_max64(o->min_tokens, (uint64_t)o->have_tokens + 1);
    *least = xkv_ceil_div(wanted, o->page_tokens) * o->page_tokens;
    *most = prompt->token_count > o->compute_tokens
                ? whole_pages(prompt->token_count - o->compute_tokens, o->page_tokens)
                : 0;
}

/* What `tokens` of the entry's share of its blob are. */
static double share_of(uint64_t bytes, uint32_t tokens, uint32_t entry_tokens)
{
    return (double)bytes * tokens / entry_tokens;
}

static bool is_known_damaged(const xkv_hook *hook, uint64_t id)
{
    uint64_t count = xkv_min64(hook->damaged_count, XKV_HOOK_DAMAGED);
    for (uint64_t i = 0; i < count; i++) {
        if (hook->damaged[i] == id)
            return true;
    }
    return false;
}

/* Fill in what was found and decide whether it pays. With the mutex held. */
static void judge(xkv_hook *hook, const xkv_match *m, const xkv_hook_match_options *o, uint32_t most, xkv_hook_found *f)
{
    f->reason = m->reason;
    f->id = m->id;
    f->bytes = m->bytes;
    f->entry_tokens = m->entry_tokens;
    if (m->reason != XKV_MATCH_FOUND)
        return;
    if (is_known_damaged(hook, m->id)) {
        f->reason = XKV_MATCH_CORRUPT;
        return;
    }
    f->offered_tokens = whole_pages((uint32_t)xkv_min64(m->tokens, most), o->page_tokens);
    if (m->whole_only && f->offered_tokens < m->tokens) {
        f->reason = XKV_MATCH_WHOLE_ONLY;
        f->offered_tokens = 0;
        return;
    }
    uint32_t load = f->offered_tokens - o->have_tokens;
    f->load_seconds = xkv_cost_expect(&hook->cost, share_of(m->bytes, load, m->entry_tokens), load);
    f->recompute_seconds = o->seconds_per_token * load;
    if (o->seconds_per_token > 0 && f->load_seconds >= f->recompute_seconds) {
        f->reason = XKV_HOOK_DECLINED;
        xkv_cost_fade(&hook->cost);
        return;
    }
    f->tokens = f->offered_tokens;
}

static uint64_t *match_counter(xkv_hook_counters *c, uint32_t reason)
{
    switch (reason) {
    case XKV_MATCH_FOUND:
        return &c->matches_found;
    case XKV_MATCH_NONE:
        return &c->misses_none;
    case XKV_MATCH_SHORT:
        return &c->misses_short;
    case XKV_MATCH_EXPIRED:
        return &c->misses_expired;
    case XKV_MATCH_NO_DICTIONARY:
        return &c->misses_no_dictionary;
    case XKV_MATCH_CORRUPT:
        return &c->misses_corrupt;
    case XKV_MATCH_GONE:
        return &c->misses_gone;
    case XKV_MATCH_NEWER:
        return &c->misses_newer;
    case XKV_MATCH_WHOLE_ONLY:
        return &c->misses_whole_only;
    case XKV_HOOK_DECLINED:
        return &c->matches_declined;
    default:
        return &c->matches_failed;
    }
}

static xkv_status make_hit(xkv_ctx *ctx, xkv_hook *hook, xkv_hook_hit **hit_p)
{
    xkv_ctx *own = NULL;
    xkv_hook_hit *hit = NULL;
    XKV_TRY(xkv_hook_context(ctx, hook, 1, &own));
    xkv_status status = XKV_NEW_ZERO(own, 1, &hit);
    if (status != XKV_OK) {
        xkv_fail(ctx, status, "%s", xkv_ctx_error(own));
        xkv_ctx_free(own);
        return status;
    }
    hit->hook = hook;
    hit->own = own;
    pthread_mutex_init(&hit->mutex, NULL);
    *hit_p = hit;
    return XKV_OK;
}

void xkv_hook_hit_close(xkv_hook_hit *hit)
{
    if (hit == NULL)
        return;
    xkv_ctx *own = hit->own;
    xkv_hit_close(own, hit->hit);
    pthread_mutex_destroy(&hit->mutex);
    xkv_release(own, hit);
    xkv_ctx_free(own);
}

/* Ask the store, in the context of `hit`. */
static xkv_status look_up(xkv_ctx *ctx, xkv_hook_hit *hit, const xkv_namespace *ns, const xkv_prompt *prompt,
                          const xkv_hook_match_options *o, xkv_hook_found *f)
{
    xkv_hook *hook = hit->hook;
    xkv_match m = {.reason = XKV_MATCH_SHORT};
    uint64_t least;
    uint32_t most;
    bounds(prompt, o, &least, &most);
    if (least <= most) {
        xkv_status status = xkv_store_find(hit->own, hook->store, ns, prompt, (uint32_t)least, &m, &hit->hit);
        if (status != XKV_OK)
            return xkv_fail(ctx, status, "%s", xkv_ctx_error(hit->own));
    }
    pthread_mutex_lock(&hook->mutex);
    judge(hook, &m, o, most, f);
    pthread_mutex_unlock(&hook->mutex);
    hit->id = f->id;
    hit->bytes = f->bytes;
    hit->entry_tokens = f->entry_tokens;
    hit->tokens = f->tokens;
    return XKV_OK;
}

static xkv_status match(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns, const xkv_prompt *prompt,
                        const xkv_hook_match_options *options, xkv_hook_found *f, xkv_hook_hit **hit_p)
{
    xkv_hook_match_options o = xkv_hook_match_options_default();
    xkv_hook_hit *hit = NULL;
    XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    if (o.page_tokens == 0 || !(o.seconds_per_token >= 0))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "pages of 0 tokens, or a negative time per token");
    XKV_TRY(make_hit(ctx, hook, &hit));
    xkv_status status = look_up(ctx, hit, ns, prompt, &o, f);
    if (status != XKV_OK || f->reason != XKV_MATCH_FOUND) {
        xkv_hook_hit_close(hit);
        hit = NULL;
    }
    if (status == XKV_OK)
        *hit_p = hit;
    return status;
}

xkv_status xkv_hook_match(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns, const xkv_prompt *prompt,
                          const xkv_hook_match_options *options, xkv_hook_found *found, xkv_hook_hit **hit_p)
{
    xkv_hook_found f = {0};
    XKV_TRY(xkv_hook_begin(ctx, hook));
    uint64_t start = xkv_hook_now(hook);
    xkv_status status = match(ctx, hook, ns, prompt, options, &f, hit_p);
    double seconds = xkv_hook_seconds(hook, start);
    pthread_mutex_lock(&hook->mutex);
    ++*(status == XKV_OK ? match_counter(&hook->counters, f.reason) : &hook->counters.matches_failed);
    hook->counters.found_tokens += status == XKV_OK ? f.tokens : 0;
    hook->counters.match_seconds += seconds;
    pthread_mutex_unlock(&hook->mutex);
    if (status == XKV_OK)
        *found = f;
    return status;
}

/* --- Loading: checks ---------------------------------------------------------------------------------------------- */

static xkv_status check_plane(xkv_ctx *ctx, const xkv_geometry *theirs, const xkv_geometry *ours, uint32_t i)
{
    const xkv_plane *a = &theirs->planes[i], *b = &ours->planes[i];
    if (a->layer != b->layer || a->kind != b->kind || a->heads != b->heads || a->head_dim != b->head_dim)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH,
                        "plane %u: layer %u %s %u x %u in the entry, layer %u %s %u x %u asked", i, a->layer,
                        xkv_plane_kind_name(a->kind), a->heads, a->head_dim, b->layer, xkv_plane_kind_name(b->kind),
                        b->heads, b->head_dim);
    if (b->rope != XKV_NO_ROPE && b->rope >= ours->rope_count)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u: there is no rope %u", i, b->rope);
    if (a->rope != XKV_NO_ROPE && b->rope != XKV_NO_ROPE &&
        !xkv_rope_equal(&theirs->ropes[a->rope], &ours->ropes[b->rope]))
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "plane %u: the entry's keys are rotated in another way", i);
    return XKV_OK;
}

/* The engine's cache is laid out as it says, never as the entry would like it. */
static xkv_status check_geometry(xkv_ctx *ctx, const xkv_geometry *theirs, const xkv_geometry *ours,
                                 const xkv_view *views)
{
    if (ours == NULL || views == NULL || ours->planes == NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a load needs the engine's geometry and views");
    if (theirs->layer_count != ours->layer_count || theirs->plane_count != ours->plane_count)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "%u layers and %u planes in the entry, %u and %u asked",
                        theirs->layer_count, theirs->plane_count, ours->layer_count, ours->plane_count);
    for (uint32_t i = 0; i < ours->plane_count; i++) {
        XKV_TRY(check_plane(ctx, theirs, ours, i));
        XKV_TRY(xkv_check_view(ctx, theirs, i, &views[i]));
    }
    return XKV_OK;
}

/* Fill in what 0 stands for, and check the range. */
static xkv_status resolve(xkv_ctx *ctx, const xkv_hook_hit *hit, xkv_hook_load_options *o)
{
    if (o->first_token >= hit->tokens || o->token_count > hit->tokens - o->first_token)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "tokens %u + %u of %u reusable ones", o->first_token, o->token_count,
                        hit->tokens);
    if (o->token_count == 0)
        o->token_count = hit->tokens - o->first_token;
    return XKV_OK;
}

/* --- Loading ------------------------------------------------------------------------------------------------------ */

/* One load. */
typedef struct load {
    xkv_ctx *ctx;
    xkv_hook_hit *hit;
    const xkv_entry *entry;
    xkv_hook_load_options o;
    uint32_t group_count;
    double callback_seconds;
} load;

/* Open the entry once for all loads of the hit. */
static xkv_status open_entry(load *l)
{
    xkv_hook_hit *hit = l->hit;
    xkv_status status = XKV_OK;
    pthread_mutex_lock(&hit->mutex);
    if (hit->damaged)
        status = xkv_fail(l->ctx, XKV_ERROR_CORRUPT, "an earlier load found entry %llu damaged",
                          (unsigned long long)hit->id);
    else if (hit->entry == NULL && (status = xkv_hit_entry(hit->own, hit->hit, &hit->entry)) != XKV_OK)
        xkv_fail(l->ctx, status, "%s", xkv_ctx_error(hit->own));
    l->entry = hit->entry;
    pthread_mutex_unlock(&hit->mutex);
    return status;
}

/* Layers below are complete when groups up to `group` are: groups are in order of their lowest planes. */
static uint32_t complete_layers(const load *l, uint32_t group)
{
    const xkv_geometry *g = xkv_entry_geometry(l->entry);
    xkv_group_info info;
    for (uint32_t i = group + 1; i < l->group_count; i++) {
        xkv_entry_get_group(l->entry, i, &info);
        if (info.plane_count > 0)
            return g->planes[info.planes[0]].layer;
    }
    return g->layer_count;
}

static int announce(void *user, uint32_t group)
{
    load *l = user;
    uint64_t start = xkv_hook_now(l->hit->hook);
    int stop = l->o.group_ready(l->o.group_ready_user, group, complete_layers(l, group));
    l->callback_seconds += xkv_hook_seconds(l->hit->hook, start);
    return stop;
}

static xkv_status read_rows(load *l, const xkv_view *views)
{
    xkv_read_options o = xkv_read_options_default();
    xkv_entry_info info;
    xkv_entry_get_info(l->entry, &info);
    l->group_count = info.group_count;
    o.first_token = l->o.first_token;
    o.token_count = l->o.token_count;
    o.positions = l->o.positions;
    if (l->o.group_ready != NULL) {
        o.group_ready = announce;
        o.group_ready_user = l;
    }
    return xkv_entry_read(l->ctx, l->entry, &o, views);
}

static xkv_status run_load(load *l, const xkv_geometry *geometry, const xkv_view *views,
                           const xkv_hook_load_options *options)
{
    XKV_TRY(xkv_copy_options(l->ctx, options, &l->o, sizeof l->o));
    XKV_TRY(open_entry(l));
    XKV_TRY(check_geometry(l->ctx, xkv_entry_geometry(l->entry), geometry, views));
    XKV_TRY(resolve(l->ctx, l->hit, &l->o));
    return read_rows(l, views);
}

/* The first load that finds the damage puts the entry into quarantine. */
static void reject(load *l)
{
    xkv_hook_hit *hit = l->hit;
    xkv_hook *hook = hit->hook;
    pthread_mutex_lock(&hit->mutex);
    if (!hit->damaged) {
        hit->damaged = true;
        xkv_hit_reject(l->ctx, hit->hit);
    }
    pthread_mutex_unlock(&hit->mutex);
    pthread_mutex_lock(&hook->mutex);
    if (!is_known_damaged(hook, hit->id))
        hook->damaged[hook->damaged_count++ % XKV_HOOK_DAMAGED] = hit->id;
    pthread_mutex_unlock(&hook->mutex);
}

/* The first load that succeeds is the store's hit, and a use of the entry. */
static void note_use(load *l)
{
    xkv_hook_hit *hit = l->hit;
    pthread_mutex_lock(&hit->mutex);
    if (!hit->used)
        xkv_hit_count(l->ctx, hit->hit, hit->tokens);
    hit->used = true;
    pthread_mutex_unlock(&hit->mutex);
}

/* With the mutex held. */
static void count_loaded(xkv_hook *hook, const load *l, double seconds)
{
    const xkv_geometry *g = xkv_entry_geometry(l->entry);
    uint32_t tokens = l->o.token_count;
    double packed = share_of(l->hit->bytes, tokens, l->hit->entry_tokens);
    hook->counters.loads_ok++;
    hook->counters.loaded_tokens += tokens;
    hook->counters.loaded_bytes += xkv_geometry_raw_bytes(g) / g->token_count * tokens;
    hook->counters.loaded_packed_bytes += (uint64_t)packed;
    hook->counters.load_seconds += seconds;
    xkv_cost_learn(&hook->cost, packed, tokens, seconds);
}

static void count_load(const load *l, xkv_status status, double seconds)
{
    xkv_hook *hook = l->hit->hook;
    pthread_mutex_lock(&hook->mutex);
    if (status == XKV_OK)
        count_loaded(hook, l, seconds);
    else if (xkv_is_damage(status))
        hook->counters.loads_damaged++;
    else if (status == XKV_ERROR_CANCELLED)
        hook->counters.loads_cancelled++;
    else if (status == XKV_ERROR_ARGUMENT || status == XKV_ERROR_UNSUPPORTED || status == XKV_ERROR_MISMATCH)
        hook->counters.loads_refused++;
    else
        hook->counters.loads_failed++;
    pthread_mutex_unlock(&hook->mutex);
}

xkv_status xkv_hook_load(xkv_ctx *ctx, xkv_hook_hit *hit, const xkv_geometry *geometry, const xkv_view *views,
                         const xkv_hook_load_options *options)
{
    load l = {.ctx = ctx, .hit = hit, .o = xkv_hook_load_options_default()};
    XKV_TRY(xkv_hook_begin(ctx, hit->hook));
    uint64_t start = xkv_hook_now(hit->hook);
    xkv_status status = run_load(&l, geometry, views, options);
    double seconds = xkv_hook_seconds(hit->hook, start) - l.callback_seconds;
    if (status == XKV_OK)
        note_use(&l);
    else if (xkv_is_damage(status))
        reject(&l);
    count_load(&l, status, seconds);
    return status;
}
