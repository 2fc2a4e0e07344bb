/* device_read.c - restoring an entry into a device's memory: which groups the device takes, what workspace that needs,
 * and groups in order, the next one on its way while the host learns how the last one went. */
#include "device_read.h"

#include "device_planes.h"
#include "parts.h"

/* Beyond these more does not help: enough streams for all multiprocessors, and rows that stay in the L2 cache. */
#define BATCH_TOKENS 16384u
#define TILE_TOKENS  2048u
#define LEAST_TILE   64u
#define PLACE_ALIGN  256u

/* --- Workspace ---------------------------------------------------------------------------------------------------- */

static uint64_t take(uint64_t *size, uint64_t bytes)
{
    uint64_t at = *size;

    *size += xkv_align64(bytes, PLACE_ALIGN);
    return at;
}

static xkv_device_layout lay_out(const xkv_device_reading *r, uint32_t batch_tokens, uint32_t tile_tokens)
{
    const xkv_device_need *need = &r->need;
    xkv_device_layout at = {.batch_tokens = batch_tokens, .tile_tokens = tile_tokens};

    at.stride = xkv_align64(batch_tokens, 64);
    at.cross_stride = xkv_align64(r->cross_end - r->cross_begin, 64);
    at.fault = take(&at.size, sizeof(uint32_t));
    at.constants = take(&at.size, need->constants);
    at.packed[0] = take(&at.size, r->device->staging_bytes);
    at.packed[1] = take(&at.size, r->device->staging_bytes);
    at.integers = take(&at.size, 2 * need->coded * at.stride);
    at.cross = take(&at.size, 2 * need->cross * at.cross_stride);
    at.angles = take(&at.size, 4 * need->angles * batch_tokens);
    at.operands = take(&at.size, xkv_max64(4 * need->operands * at.stride, 4 * need->top * tile_tokens));
    at.components = take(&at.size, 4 * need->area);
    at.rows = take(&at.size, xkv_max64(4 * need->width * tile_tokens, need->matrix));
    return at;
}

/* A level below: half as many tokens, down to one chunk, and a tile of 64. False when there is none. */
static bool next_level(const xkv_device_reading *r, xkv_device_layout *at)
{
    uint32_t chunk = r->entry->c.chunk_tokens, batch = at->batch_tokens / 2 / chunk * chunk, tile = at->tile_tokens / 2;

    if (batch < chunk)
        batch = chunk;
    if (tile < LEAST_TILE)
        tile = LEAST_TILE;
    if (batch == at->batch_tokens && tile == at->tile_tokens)
        return false;
    *at = lay_out(r, batch, tile);
    return true;
}

static xkv_device_layout best_layout(const xkv_device_reading *r)
{
    uint64_t chunk = r->entry->c.chunk_tokens;
    uint64_t batch = xkv_max64(1, xkv_min64(BATCH_TOKENS / chunk, r->chunks)) * chunk;
    uint64_t tile = xkv_max64(LEAST_TILE, xkv_min64(TILE_TOKENS, xkv_align64(batch, LEAST_TILE)));

    return lay_out(r, (uint32_t)batch, (uint32_t)tile);
}

static xkv_device_layout least_layout(const xkv_device_reading *r)
{
    xkv_device_layout at = best_layout(r);

    while (next_level(r, &at)) {
    }
    return at;
}

/* --- Preparing ---------------------------------------------------------------------------------------------------- */

/* Which chunks, and what the groups that the device takes need. */
static xkv_status survey(xkv_device_reading *r)
{
    const xkv_container *c = &r->entry->c;
    uint32_t unused;

    r->first_chunk = r->target.first / c->chunk_tokens;
    r->chunks = (r->target.end - 1) / c->chunk_tokens - r->first_chunk + 1;
    xkv_chunk_coded(c, r->first_chunk, &r->cross_begin, &unused);
    xkv_chunk_coded(c, r->first_chunk + r->chunks - 1, &unused, &r->cross_end);
    if (r->cross_end < r->cross_begin)
        r->cross_end = r->cross_begin;
    if (xkv_read_needs_cross(r->entry, r->o))
        XKV_TRY(xkv_cross_stage_open(r->ctx, r->entry, &r->cross));
    if (r->cross.g) {
        r->need.cross = r->cross.cross.coded;
        XKV_TRY(xkv_device_group_need(r, r->cross.g, &r->need));
    }
    for (uint32_t i = r->o->first_group; i < r->o->first_group + r->o->group_count; i++)
        if (xkv_device_takes(r, &c->groups[i]))
            XKV_TRY(xkv_device_group_need(r, &c->groups[i], &r->need));
    return XKV_OK;
}

static xkv_status reading_init(xkv_ctx *ctx, xkv_device *device, const xkv_entry *entry, const xkv_read_options *o,
                               xkv_device_reading *r)
{
    *r = (xkv_device_reading){.ctx = ctx, .device = device, .api = device->api, .entry = entry, .o = o};
    r->target = (xkv_target){.ctx = ctx,
                             .kernels = xkv_kernels_cpu(),
                             .c = &entry->c,
                             .first = o->first_token,
                             .end = o->first_token + o->token_count,
                             .heads = {o->first_head, o->head_count}};
    XKV_TRY(xkv_moves_create(ctx, &entry->c.geometry, entry->c.groups, o, &r->target.moves));
    return survey(r);
}

static void reading_fini(xkv_device_reading *r)
{
    for (uint32_t i = 0; r->scratch && i < xkv_pool_threads(r->pool); i++)
        xkv_chunk_scratch_free(r->ctx, &r->scratch[i]);
    xkv_release(r->ctx, r->scratch);
    xkv_pool_free(r->ctx, r->pool);
    xkv_cross_stage_free(r->ctx, &r->cross);
    xkv_moves_free(r->ctx, &r->target.moves);
}

/* --- Size --------------------------------------------------------------------------------------------------------- */

/* Options with what 0 stands for filled in, of an entry's own rows, or of all it has. */
static xkv_status resolve(xkv_ctx *ctx, const xkv_entry *entry, bool own, const xkv_read_options *given,
                          xkv_read_options *o)
{
    *o = xkv_read_options_default();
    if (given)
        XKV_TRY(xkv_copy_options(ctx, given, o, sizeof *o));
    return xkv_read_options_resolve(ctx, entry, own ? entry->c.geometry.token_count : entry->geometry.token_count, o);
}

/* What one entry needs, or those that it extends. */
typedef struct sizes {
    xkv_device *device;
    uint64_t least, best;
} sizes;

static xkv_status measure(void *user, xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *given,
                          const xkv_view *views)
{
    sizes *s = user;
    xkv_read_options o;
    xkv_device_reading r;
    xkv_status status;

    (void)views;
    XKV_TRY(resolve(ctx, entry, true, given, &o));
    if (o.token_count == 0 || o.group_count == 0)
        return XKV_OK;
    status = reading_init(ctx, s->device, entry, &o, &r);
    if (status == XKV_OK && r.need.constants > 0) {
        s->least = xkv_max64(s->least, least_layout(&r).size);
        s->best = xkv_max64(s->best, best_layout(&r).size);
    }
    reading_fini(&r);
    return status;
}

xkv_status xkv_device_read_size(xkv_ctx *ctx, xkv_device *device, const xkv_entry *entry,
                                const xkv_read_options *options, uint64_t *least, uint64_t *best)
{
    sizes s = {device, 0, 0};
    xkv_view *none = NULL;
    xkv_read_options o;
    xkv_status status;

    xkv_ctx_begin(ctx);
    XKV_TRY(resolve(ctx, entry, false, options, &o));
    o.group_ready = NULL;
    o.progress = NULL;
    XKV_TRY(XKV_NEW_ZERO(ctx, entry->geometry.plane_count, &none));
    for (uint32_t i = 0; i < entry->geometry.plane_count; i++)
        none[i].data = none; /* nothing is written, but views are shifted */
    status = entry->parent ? xkv_extended_decode(ctx, entry, &o, none, measure, &s) : measure(&s, ctx, entry, &o, none);
    xkv_release(ctx, none);
    XKV_TRY(status);
    *least = s.least;
    *best = s.best;
    return XKV_OK;
}

/* --- Views -------------------------------------------------------------------------------------------------------- */

static xkv_status check_views(const xkv_device_reading *r)
{
    const xkv_group *groups = r->entry->c.groups;

    for (uint32_t j = r->o->first_group; j < r->o->first_group + r->o->group_count; j++)
        for (uint32_t i = 0; i < groups[j].plane_count; i++)
            XKV_TRY(xkv_device_check_view(r->ctx, &r->entry->c.geometry, groups[j].planes[i], r->target.heads,
                                          &r->views[groups[j].planes[i]]));
    return XKV_OK;
}

/* --- Memory ------------------------------------------------------------------------------------------------------- */

/* What the call has allocated itself. */
typedef struct borrowed {
    void *workspace;
    xkv_device_dict *dict;
} borrowed;

static xkv_status alloc_dict(xkv_device_reading *r, borrowed *b)
{
    XKV_TRY(xkv_device_dict_copy(r->ctx, r->device, r->entry->dict, &b->dict));
    r->dict = b->dict;
    return XKV_OK;
}

/* The largest workspace that can be had. */
static xkv_status alloc_workspace(xkv_device_reading *r, borrowed *b)
{
    xkv_status status;

    r->at = best_layout(r);
    do {
        status = r->api->alloc(r->device->plug, r->at.size, &b->workspace);
    } while (status == XKV_ERROR_MEMORY && next_level(r, &r->at));
    XKV_TRY(xkv_device_result(r->ctx, r->device, status));
    if (r->at.size < best_layout(r).size)
        xkv_logf(r->ctx, XKV_LOG_WARNING, "%s: short of memory, %u tokens at a time", r->api->name, r->at.batch_tokens);
    r->workspace = b->workspace;
    return XKV_OK;
}

static xkv_status given_workspace(xkv_device_reading *r, const xkv_device_target *t)
{
    if ((uintptr_t)t->workspace % PLACE_ALIGN != 0)
        return xkv_fail(r->ctx, XKV_ERROR_ARGUMENT, "the workspace is not aligned to %u bytes", PLACE_ALIGN);
    r->at = best_layout(r);
    while (r->at.size > t->workspace_size)
        if (!next_level(r, &r->at))
            return xkv_fail(r->ctx, XKV_ERROR_ARGUMENT, "a workspace of %llu bytes, at least %llu are needed",
                            (unsigned long long)t->workspace_size, (unsigned long long)r->at.size);
    r->workspace = t->workspace;
    return XKV_OK;
}

/* Tables, dictionary, workspace. MEMORY: the device has not enough left. */
static xkv_status get_memory(xkv_device_reading *r, const xkv_device_target *t, borrowed *b)
{
    XKV_TRY(xkv_device_load_tables(r->ctx, r->device));
    if (t->dict && t->dict->dict == r->entry->dict)
        r->dict = t->dict;
    if (!r->dict && r->entry->dict && xkv_read_needs_cross(r->entry, r->o))
        XKV_TRY(alloc_dict(r, b));
    return t->workspace ? given_workspace(r, t) : alloc_workspace(r, b);
}

static void give_back(xkv_device_reading *r, borrowed *b)
{
    r->api->release(r->device->plug, b->workspace);
    xkv_device_dict_free(r->ctx, b->dict);
}

/* --- Order -------------------------------------------------------------------------------------------------------- */

/* A group on the stream, whose end nobody has waited for. */
typedef struct pending {
    const xkv_group *g; /* NULL: none */
    bool asked, on_device;
    uint32_t which;
} pending;

/* Progress of the call. */
typedef struct progress {
    uint64_t done, total;
} progress;

static xkv_status announce(xkv_device_reading *r, const xkv_group *g, progress *p)
{
    p->done += xkv_group_row_bytes(&r->entry->c.geometry, g, r->o->token_count);
    return xkv_read_announce(r->ctx, r->o, (uint32_t)(g - r->entry->c.groups), p->done, p->total);
}

/* What the device has found wrong with a group the CPU has words for. */
static xkv_status explain(xkv_device_reading *r, const xkv_group *g)
{
    xkv_read_options o = xkv_read_options_default();

    o.first_token = r->o->first_token;
    o.token_count = r->o->token_count;
    o.first_group = (uint32_t)(g - r->entry->c.groups);
    o.group_count = 1;
    XKV_TRY(xkv_entry_decode_own(r->ctx, r->entry, &o, NULL));
    return xkv_fail(r->ctx, XKV_ERROR_BACKEND, "%s: group %u is damaged for the device, and sound for the CPU",
                    r->api->name, o.first_group);
}

static xkv_status wait_ready(xkv_device_reading *r, uint32_t which, uint32_t *fault)
{
    XKV_DEVICE(r, wait(r->device->plug, r->device->ready[which]));
    memcpy(fault, (const uint32_t *)r->device->results + which, sizeof *fault);
    return XKV_OK;
}

/* Once more, in another way. */
static xkv_status do_again(xkv_device_reading *r, const xkv_group *g, uint32_t which, bool exact, uint32_t *fault)
{
    XKV_TRY(xkv_device_group(r, g, which, exact));
    return wait_ready(r, which, fault);
}

/* *reread: it was done again, because the device had read it wrongly. */
static xkv_status finish(xkv_device_reading *r, pending *last, progress *p, bool *reread)
{
    const xkv_group *g = last->g;
    uint32_t fault = 0;

    *reread = false;
    if (!g)
        return XKV_OK;
    last->g = NULL;
    XKV_TRY(wait_ready(r, last->which, &fault));
    if (last->on_device && (fault & XKV_WARP_BAD_SUM) != 0) {
        xkv_logf(r->ctx, XKV_LOG_WARNING, "%s: the host reads: group %u did not arrive as it is in the file",
                 r->api->name, (unsigned)(g - r->entry->c.groups));
        xkv_device_direct_close(r);
        *reread = true;
        XKV_TRY(do_again(r, g, last->which, false, &fault));
    }
    if (last->on_device && fault == XKV_WARP_TOO_WIDE)
        XKV_TRY(do_again(r, g, last->which, true, &fault));
    if (last->on_device && fault != 0)
        return explain(r, g);
    return last->asked ? announce(r, g, p) : XKV_OK;
}

/* Rows from the CPU, behind which the stream has come to the end of the group. */
static xkv_status host_group(xkv_device_reading *r, const xkv_group *g, uint32_t which)
{
    XKV_TRY(xkv_device_host_rows(r, (uint32_t)(g - r->entry->c.groups), 1, r->target.first, r->target.end));
    XKV_DEVICE(r, record(r->device->plug, r->device->ready[which], r->stream));
    return XKV_OK;
}

/* Put a group on the stream, then see how the one before went. */
static xkv_status next_group(xkv_device_reading *r, const xkv_group *g, bool asked, bool device, pending *last,
                             progress *p)
{
    pending now = {g, asked, device && xkv_device_takes(r, g), last->which ^ 1};
    bool reread;

    XKV_TRY(now.on_device ? xkv_device_group(r, g, now.which, false) : host_group(r, g, now.which));
    XKV_TRY(finish(r, last, p, &reread));
    if (reread && now.on_device) /* with integers of a cross stage that were wrong */
        XKV_TRY(xkv_device_group(r, g, now.which, false));
    *last = now;
    return XKV_OK;
}

static xkv_status read_groups(xkv_device_reading *r, bool device)
{
    const xkv_group *groups = r->entry->c.groups;
    uint32_t first = r->o->first_group, end = first + r->o->group_count;
    pending last = {0};
    progress p = {0, 0};
    bool reread;

    for (uint32_t i = first; i < end; i++)
        p.total += xkv_group_row_bytes(&r->entry->c.geometry, &groups[i], r->o->token_count);
    if (device && r->cross.g && first > 0)
        XKV_TRY(next_group(r, groups, false, true, &last, &p));
    for (uint32_t i = first; i < end; i++) {
        if (i + 1 < end)
            xkv_container_prefetch(&r->entry->input, &r->entry->c, &groups[i + 1], r->first_chunk, r->chunks);
        XKV_TRY(next_group(r, &groups[i], true, device, &last, &p));
    }
    return finish(r, &last, &p, &reread);
}

/* --- The call ----------------------------------------------------------------------------------------------------- */

/* Wait for everything that was begun, whatever becomes of it: staging and workspace are free afterwards. */
static void drain(xkv_device_reading *r)
{
    const xkv_plugin *api = r->api;
    xkv_device *d = r->device;

    if (api->record(d->plug, d->begun, d->copies) == XKV_OK)
        (void)api->wait(d->plug, d->begun);
    if (api->record(d->plug, d->begun, r->stream) == XKV_OK)
        (void)api->wait(d->plug, d->begun);
    for (uint32_t i = 0; i < d->staging_count; i++)
        d->staging[i].busy = false;
}

static xkv_status run(xkv_device_reading *r, bool device)
{
    xkv_device *d = r->device;

    /* The workspace may be in use by what the caller's stream still has to do. */
    XKV_DEVICE(r, record(d->plug, d->begun, r->stream));
    XKV_DEVICE(r, follow(d->plug, d->copies, d->begun));
    XKV_TRY(xkv_pool_create(r->ctx, xkv_ctx_threads(r->ctx), &r->pool));
    XKV_TRY(XKV_NEW_ZERO(r->ctx, xkv_pool_threads(r->pool), &r->scratch));
    if (device)
        XKV_TRY(xkv_device_direct_open(r));
    return read_groups(r, device);
}

static xkv_status read_into(xkv_device_reading *r, const xkv_device_target *t)
{
    borrowed b = {0};
    bool device = r->need.constants > 0;
    xkv_status status = XKV_OK;

    XKV_TRY(check_views(r));
    if (device) {
        status = get_memory(r, t, &b);
        device = status == XKV_OK;
        if (status == XKV_ERROR_MEMORY && !r->api->dead(r->device->plug)) {
            xkv_logf(r->ctx, XKV_LOG_WARNING, "%s: out of memory, the CPU decodes", r->api->name);
            xkv_ctx_begin(r->ctx); /* what was in the way of the device is no error of the call */
            status = XKV_OK;
        }
    }
    if (status == XKV_OK) {
        status = run(r, device);
        drain(r);
        xkv_device_direct_close(r);
    }
    give_back(r, &b);
    return status;
}

/* Whose memory, and where to. */
typedef struct call {
    xkv_device *device;
    xkv_device_target target;
} call;

static xkv_status read_own(void *user, xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *given,
                           const xkv_view *views)
{
    const call *c = user;
    xkv_read_options o;
    xkv_device_reading r;
    xkv_status status;

    XKV_TRY(resolve(ctx, entry, true, given, &o));
    if (o.token_count == 0 || o.group_count == 0)
        return XKV_OK;
    status = reading_init(ctx, c->device, entry, &o, &r);
    r.views = views;
    r.stream = c->target.stream;
    if (status == XKV_OK)
        status = read_into(&r, &c->target);
    reading_fini(&r);
    return status;
}

/* That the dictionary on the device is one that the entry, or one that it extends, was packed with. */
static xkv_status check_dict(xkv_ctx *ctx, const xkv_entry *entry, const xkv_device_dict *dict)
{
    for (const xkv_entry *e = entry; e && dict; e = e->parent)
        if (e->dict == dict->dict)
            return XKV_OK;
    return dict ? xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the dictionary on the device is not that of the entry") : XKV_OK;
}

xkv_status xkv_device_read(xkv_ctx *ctx, xkv_device *device, const xkv_entry *entry, const xkv_read_options *options,
                           const xkv_device_target *target, const xkv_view *views)
{
    call c = {device, xkv_device_target_default()};
    xkv_read_options o;

    xkv_ctx_begin(ctx);
    if (!views)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "no views to restore into");
    if (target)
        XKV_TRY(xkv_copy_options(ctx, target, &c.target, sizeof c.target));
    XKV_TRY(check_dict(ctx, entry, c.target.dict));
    XKV_TRY(resolve(ctx, entry, false, options, &o));
    if (o.token_count == 0 || o.group_count == 0)
        return XKV_OK;
    return entry->parent ? xkv_extended_decode(ctx, entry, &o, views, read_own, &c)
                         : read_own(&c, ctx, entry, &o, views);
}
