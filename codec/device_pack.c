#include "device_pack.h"

#include "device_pack_tile.h"
#include "device_svd.h"
#include "device_tables.h"
#include "encoder.h"

/* Beyond these more does not help: rows that stay in the L2 cache, enough streams for all multiprocessors. */
#define TILE_TOKENS  2048u
#define BATCH_TOKENS 32768u
#define LEAST_TILE   64u
#define PLACE_ALIGN  256u

/* --- What is needed ----------------------------------------------------------------------------------------------- */

uint64_t xkv_pack_block_elements(const xkv_geometry *geometry, const xkv_group *g)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[g->planes[i]];
        sum += (uint64_t)p->heads * p->head_dim * p->head_dim;
    }
    return sum;
}

/* Groups of an entry are those of its dictionary, with RoPEs of its own. */
static uint64_t angle_bound(const xkv_geometry *geometry, const xkv_group *g)
{
    uint64_t most = 0;

    for (uint32_t i = 0; i < geometry->rope_count; i++)
        most = xkv_max64(most, geometry->ropes[i].n_rot);
    return most * g->plane_count;
}

static void add_need(xkv_pack_need *need, const xkv_geometry *geometry, const xkv_dict *dict, uint32_t i)
{
    const xkv_basis *b = &dict->bases[i];
    const xkv_group *g = &dict->c.groups[i];
    uint64_t angles = angle_bound(geometry, g);

    need->width = xkv_max64(need->width, b->width);
    need->rank = xkv_max64(need->rank, b->rank);
    need->top = xkv_max64(need->top, b->top);
    need->operands = xkv_max64(need->operands, (uint64_t)b->rank + b->top);
    need->area = xkv_max64(need->area, ((uint64_t)b->rank + b->top) * b->width);
    need->planes = xkv_max64(need->planes, g->plane_count);
    need->angles = xkv_max64(need->angles, angles);
    need->blocks = xkv_max64(need->blocks, b->blocks ? xkv_pack_block_elements(&dict->c.geometry, g) : 0);
    need->constants = xkv_max64(need->constants, xkv_pack_constant_bytes(b->width, g->plane_count, angles));
}

static void find_need(xkv_device_packing *p)
{
    const xkv_dict *dict = p->dict;

    for (uint32_t i = 0; i < dict->c.group_count; i++)
        if (dict->bases[i].analysis)
            add_need(&p->need, p->geometry, dict, i);
    p->need.stage = dict->cross ? dict->cross->rank : 0;
    p->need.listed = xkv_max64(p->need.rank, p->need.stage);
}

static xkv_status add_factors(xkv_device_packing *p, const xkv_group *g, uint32_t iterations)
{
    xkv_device_svd o = {.rows = p->tokens, .cols = g->width, .rank = g->rank, .iterations = iterations};
    uint64_t size, angles = angle_bound(p->geometry, g);
    xkv_pack_need *need = &p->need;

    XKV_TRY(xkv_device_svd_size(p->ctx, p->device, &o, &size));
    need->svd = xkv_max64(need->svd, size);
    need->width = xkv_max64(need->width, g->width);
    need->rank = xkv_max64(need->rank, g->rank);
    need->area = xkv_max64(need->area, (uint64_t)g->rank * g->width);
    need->planes = xkv_max64(need->planes, g->plane_count);
    need->angles = xkv_max64(need->angles, angles);
    need->constants = xkv_max64(need->constants, xkv_pack_constant_bytes(g->width, g->plane_count, angles));
    return XKV_OK;
}

/* What groups of fixed ranks need: those that there are when no plane has a NaN, which would have a smaller group. */
static xkv_status find_factor_need(xkv_device_packing *p, const xkv_pack_options *o)
{
    xkv_container c = {.geometry = *p->geometry};
    uint8_t *nonfinite = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW_ZERO(p->ctx, p->geometry->plane_count, &nonfinite));
    XKV_TRY_GOTO(xkv_plan_groups(p->ctx, o, false, nonfinite, &c), out);
    for (uint32_t i = 0; i < c.group_count; i++)
        if (c.groups[i].codec == XKV_GROUP_SVD)
            XKV_TRY_GOTO(add_factors(p, &c.groups[i], o->iterations), out);
out:
    xkv_plan_release(p->ctx, &c);
    xkv_release(p->ctx, nonfinite);
    return status;
}

/* --- Workspace ---------------------------------------------------------------------------------------------------- */

static uint64_t take(uint64_t *size, uint64_t bytes)
{
    uint64_t at = *size;

    *size += xkv_align64(bytes, PLACE_ALIGN);
    return at;
}

/* Words of a chunk's stream at the most. */
static uint64_t stream_words(const xkv_device_packing *p)
{
    return 2 * XKV_RANS_LANES + 2 * p->need.listed * xkv_min64(p->chunk_tokens, xkv_max64(p->tokens, 1));
}

/* Sizes stay below 2^63: tokens and elements of a row have 31 and 18 bits at most, and no dictionary has 2^32 numbers.
 */
static xkv_pack_layout lay_out(const xkv_device_packing *p, uint32_t tile, uint32_t chunks)
{
    const xkv_pack_need *n = &p->need;
    xkv_pack_layout at = {.tile_tokens = tile, .batch_chunks = chunks};
    uint64_t tiles = xkv_ceil_div(p->tokens, tile);

    at.tiles = (uint32_t)tiles;
    at.stride = xkv_align64(p->tokens, 64);
    at.room = stream_words(p);
    at.positions = take(&at.size, 4ull * p->geometry->token_count);
    at.constants = take(&at.size, n->constants);
    at.blocks = take(&at.size, 4 * n->blocks);
    at.lists = take(&at.size, 12 * n->listed);
    at.flags = take(&at.size, sizeof(uint32_t));
    at.tables = take(&at.size, XKV_BASE_TABLES * sizeof(xkv_warp_encode_table));
    at.angles = take(&at.size, 4 * n->angles * tile);
    at.rows = take(&at.size, 4 * n->width * tile);
    at.product = take(&at.size, n->blocks > 0 ? 4 * n->width * tile : 0);
    at.row_halves = take(&at.size, 4 * n->width * tile);
    at.basis_halves = take(&at.size, 4 * n->area);
    at.y = take(&at.size, 4 * n->operands * tile);
    at.y_halves = take(&at.size, 4 * n->operands * tile);
    at.stage_y = take(&at.size, 4 * n->stage * tile);
    at.mix = take(&at.size, 4 * n->stage * n->top);
    at.q = take(&at.size, 2 * n->rank * at.stride);
    at.stage_q = take(&at.size, 2 * n->stage * at.stride);
    at.stats = take(&at.size, n->listed * tiles * sizeof(xkv_plug_stats));
    at.windows = take(&at.size, 4 * n->listed);
    at.counts = take(&at.size, 4ull * n->listed * XKV_COUNT_SHIFTS * XKV_COUNT_BINS);
    at.sums = take(&at.size, 16 * (n->planes + 1) * at.stride);
    at.spans = take(&at.size, chunks * sizeof(xkv_plug_span));
    at.sizes = take(&at.size, 4ull * chunks);
    at.words = take(&at.size, 2 * at.room * chunks);
    return at;
}

/* Of codec svd: one that is large enough, since all rows of a group are decomposed together. */
static xkv_pack_layout lay_out_factors(const xkv_device_packing *p, uint32_t tile)
{
    const xkv_pack_need *n = &p->need;
    xkv_pack_layout at = {.tile_tokens = tile, .tiles = (uint32_t)xkv_ceil_div(p->tokens, tile)};
    uint64_t tokens = p->tokens;

    at.stride = xkv_align64(tokens, 64);
    at.positions = take(&at.size, 4ull * p->geometry->token_count);
    at.constants = take(&at.size, n->constants);
    at.flags = take(&at.size, sizeof(uint32_t));
    at.angles = take(&at.size, 4 * n->angles * tile);
    at.rows = take(&at.size, 4 * n->width * tokens);
    at.coefficients = take(&at.size, 4 * n->rank * tokens);
    at.factors = take(&at.size, 2 * n->rank * tokens);
    at.components = take(&at.size, 4 * n->area);
    at.component_halves = take(&at.size, 4 * n->area);
    at.scales = take(&at.size, 4 * n->rank);
    at.sums = take(&at.size, 8 * n->planes * at.stride);
    at.svd = take(&at.size, n->svd);
    return at;
}

static xkv_pack_layout best_layout(const xkv_device_packing *p)
{
    uint64_t tile = xkv_max64(LEAST_TILE, xkv_min64(TILE_TOKENS, xkv_align64(p->tokens, LEAST_TILE)));
    uint64_t all = xkv_ceil_div(p->geometry->token_count, p->chunk_tokens);
    uint64_t chunks = xkv_max64(1, xkv_min64(all, BATCH_TOKENS / p->chunk_tokens));

    if (!p->dict)
        return lay_out_factors(p, (uint32_t)tile);
    return lay_out(p, (uint32_t)tile, (uint32_t)chunks);
}

/* A level below: half as many tokens and chunks, down to 64 and one. False when there is none. */
static bool next_level(const xkv_device_packing *p, xkv_pack_layout *at)
{
    uint32_t tile = at->tile_tokens / 2, chunks = at->batch_chunks / 2;

    if (!p->dict || (at->tile_tokens == LEAST_TILE && at->batch_chunks == 1))
        return false;
    *at = lay_out(p, tile < LEAST_TILE ? LEAST_TILE : tile, chunks < 1 ? 1 : chunks);
    return true;
}

static xkv_pack_layout least_layout(const xkv_device_packing *p)
{
    xkv_pack_layout at = best_layout(p);

    while (next_level(p, &at)) {
    }
    return at;
}

/* --- Preparing ---------------------------------------------------------------------------------------------------- */

static xkv_status check_view(const xkv_device_packing *p, uint32_t plane)
{
    const xkv_view *v = &p->views[plane];

    XKV_TRY(xkv_device_check_view(p->ctx, p->geometry, plane, (xkv_heads){0}, v));
    if (v->dtype > XKV_BF16)
        return xkv_fail(p->ctx, XKV_ERROR_UNSUPPORTED, "view %u: %s in a device's memory", plane,
                        xkv_dtype_name(v->dtype));
    if (v->dtype == p->geometry->planes[plane].dtype)
        return XKV_OK;
    return xkv_fail(p->ctx, XKV_ERROR_ARGUMENT, "plane %u: the view's dtype is not the plane's", plane);
}

static xkv_status check_planes(const xkv_device_packing *p)
{
    for (uint32_t i = 0; i < p->geometry->plane_count; i++) {
        XKV_TRY(xkv_check_plane(p->ctx, p->geometry, i));
        XKV_TRY(check_view(p, i));
    }
    return XKV_OK;
}

/* Without memory on a device that is sound the CPU packs: what was in the way is no error of the call. */
static bool falls_to_cpu(const xkv_device_packing *p, xkv_status status)
{
    if (status != XKV_ERROR_MEMORY || p->api->dead(p->device->plug))
        return false;
    xkv_logf(p->ctx, XKV_LOG_WARNING, "%s: out of memory, the CPU packs", p->api->name);
    xkv_ctx_begin(p->ctx);
    return true;
}

static bool has_fixed_ranks(const xkv_pack_options *o)
{
    return o->profile == XKV_PROFILE_SVD && o->rank_k + (uint64_t)o->rank_v > 0;
}

/* Options with what 0 stands for filled in; whether the device computes anything. */
static xkv_status packing_init(xkv_ctx *ctx, xkv_device *device, const xkv_geometry *geometry,
                               const xkv_pack_options *options, xkv_device_packing *p, bool *computes)
{
    uint32_t n = geometry->token_count;
    xkv_pack_options o;

    *p = (xkv_device_packing){.ctx = ctx, .device = device, .api = device->api, .geometry = geometry};
    XKV_TRY(xkv_plan_options(ctx, options, &o));
    p->chunk_tokens = o.chunk_tokens;
    p->sinks = (uint32_t)xkv_min64(o.sinks, n);
    p->window = (uint32_t)xkv_min64(o.window, n - p->sinks);
    p->tokens = n - p->sinks - p->window;
    *computes = p->tokens > 0 && (o.profile == XKV_PROFILE_DICT || has_fixed_ranks(&o));
    if (!*computes)
        return XKV_OK;
    if (o.profile == XKV_PROFILE_SVD) {
        xkv_status status = find_factor_need(p, &o);
        *computes = status == XKV_OK && p->need.svd > 0;
        return falls_to_cpu(p, status) ? XKV_OK : status;
    }
    p->dict = o.dict;
    p->sample = o.ratio > 0 || o.error > 0;
    find_need(p);
    *computes = stream_words(p) <= INT32_MAX; /* which the device counts in 32 bits */
    return XKV_OK;
}

xkv_status xkv_device_pack_size(xkv_ctx *ctx, xkv_device *device, const xkv_geometry *geometry,
                                const xkv_pack_options *options, uint64_t *least, uint64_t *best)
{
    xkv_device_packing p;
    bool computes;

    xkv_ctx_begin(ctx);
    XKV_TRY(packing_init(ctx, device, geometry, options, &p, &computes));
    *least = computes ? least_layout(&p).size : 0;
    *best = computes ? best_layout(&p).size : 0;
    return XKV_OK;
}

/* --- Memory ------------------------------------------------------------------------------------------------------- */

/* What the call has allocated itself. */
typedef struct borrowed {
    void *workspace;
    xkv_device_dict *dict;
} borrowed;

/* The largest workspace that can be had. */
static xkv_status alloc_workspace(xkv_device_packing *p, borrowed *b)
{
    xkv_status status;

    p->at = best_layout(p);
    do {
        status = p->api->alloc(p->device->plug, p->at.size, &b->workspace);
    } while (status == XKV_ERROR_MEMORY && next_level(p, &p->at));
    XKV_TRY(xkv_device_result(p->ctx, p->device, status));
    if (p->at.size < best_layout(p).size)
        xkv_logf(p->ctx, XKV_LOG_WARNING, "%s: short of memory, %u tokens at a time", p->api->name, p->at.tile_tokens);
    p->workspace = b->workspace;
    return XKV_OK;
}

static xkv_status given_workspace(xkv_device_packing *p, const xkv_device_target *t)
{
    if ((uintptr_t)t->workspace % PLACE_ALIGN != 0)
        return xkv_fail(p->ctx, XKV_ERROR_ARGUMENT, "the workspace is not aligned to %u bytes", PLACE_ALIGN);
    p->at = best_layout(p);
    while (p->at.size > t->workspace_size)
        if (!next_level(p, &p->at))
            return xkv_fail(p->ctx, XKV_ERROR_ARGUMENT, "a workspace of %llu bytes, at least %llu are needed",
                            (unsigned long long)t->workspace_size, (unsigned long long)p->at.size);
    p->workspace = t->workspace;
    return XKV_OK;
}

static xkv_status get_memory(xkv_device_packing *p, const xkv_device_target *t, borrowed *b)
{
    p->device_dict = t->dict;
    if (!p->device_dict && p->dict) {
        XKV_TRY(xkv_device_dict_copy(p->ctx, p->device, p->dict, &b->dict));
        p->device_dict = b->dict;
    }
    return t->workspace ? given_workspace(p, t) : alloc_workspace(p, b);
}

/* --- The call ----------------------------------------------------------------------------------------------------- */

/* What all groups need: positions, and tables of those that are coded. */
static xkv_status send_tables(xkv_device_packing *p)
{
    xkv_warp_encode_table *tables = NULL;
    xkv_status status;

    XKV_TRY(xkv_device_upload(p->ctx, p->device, p->geometry->positions, 4ull * p->geometry->token_count,
                              xkv_pack_place(p, p->at.positions), p->stream));
    if (!p->dict)
        return XKV_OK;
    XKV_TRY(XKV_NEW(p->ctx, XKV_BASE_TABLES, &tables));
    xkv_device_encode_tables(tables);
    status = xkv_device_upload(p->ctx, p->device, tables, XKV_BASE_TABLES * sizeof *tables,
                               xkv_pack_place(p, p->at.tables), p->stream);
    xkv_release(p->ctx, tables);
    return status;
}

static xkv_status run(xkv_device_packing *p, bool device, const xkv_pack_options *options, const xkv_output *output,
                      xkv_pack_report *report)
{
    if (!device) {
        XKV_TRY(xkv_device_pack_bring_all(p));
        return xkv_encoder_pack_rows(p->ctx, p->geometry, p->host_views, NULL, options, output, report);
    }
    XKV_TRY(send_tables(p));
    XKV_TRY(xkv_device_pack_few(p, p->sample));
    return xkv_encoder_pack_rows(p->ctx, p->geometry, p->host_views, p, options, output, report);
}

/* Wait for everything that was begun, whatever becomes of it: staging and workspace are free afterwards. */
static void drain(xkv_device_packing *p)
{
    xkv_device *d = p->device;

    if (p->api->record(d->plug, d->begun, p->stream) == XKV_OK)
        (void)p->api->wait(d->plug, d->begun);
    for (uint32_t i = 0; i < d->staging_count; i++)
        d->staging[i].busy = false;
}

static void packing_fini(xkv_device_packing *p, borrowed *b)
{
    drain(p);
    xkv_device_pack_release_rows(p);
    xkv_release(p->ctx, p->streams);
    xkv_release(p->ctx, p->stream_at);
    p->api->release(p->device->plug, b->workspace);
    xkv_device_dict_free(p->ctx, b->dict);
}

xkv_status xkv_device_pack(xkv_ctx *ctx, xkv_device *device, const xkv_geometry *geometry, const xkv_view *views,
                           const xkv_pack_options *options, const xkv_device_target *target, const xkv_output *output,
                           xkv_pack_report *report)
{
    xkv_device_target t = xkv_device_target_default();
    xkv_device_packing p;
    borrowed b = {0};
    bool computes;
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    if (target)
        XKV_TRY(xkv_copy_options(ctx, target, &t, sizeof t));
    XKV_TRY(packing_init(ctx, device, geometry, options, &p, &computes));
    p.views = views;
    p.stream = t.stream;
    if (geometry->token_count == 0) /* nothing to be had from the device */
        return xkv_encoder_pack_rows(ctx, geometry, views, NULL, options, output, report);
    XKV_TRY(check_planes(&p));
    if (computes && p.dict && t.dict && t.dict->dict != p.dict)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the dictionary on the device is not that of the options");
    if (computes) {
        status = get_memory(&p, &t, &b);
        computes = status == XKV_OK;
        if (falls_to_cpu(&p, status))
            status = XKV_OK;
    }
    if (status == XKV_OK)
        status = run(&p, computes, options, output, report);
    packing_fini(&p, &b);
    return status;
}
