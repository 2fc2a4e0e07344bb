/* attention.c - opening an attention: which rows are whose, and holding coefficients or rows in memory. The arithmetic
 * is in attend.c. */
#include "attention.h"

#include "parts.h"

/* --- Stretches ---------------------------------------------------------------------------------------------------- */

static bool layer_asked(const xkv_attention *a, uint32_t layer)
{
    return layer - a->first_layer < a->layer_count;
}

/* Flags of the planes of asked layers. */
static xkv_status mark_planes(xkv_ctx *ctx, const xkv_attention *a, uint8_t **asked_p)
{
    const xkv_geometry *g = &a->entry->geometry;

    XKV_TRY(XKV_NEW_ZERO(ctx, g->plane_count, asked_p));
    for (uint32_t i = 0; i < g->plane_count; i++)
        (*asked_p)[i] = layer_asked(a, g->planes[i].layer);
    return XKV_OK;
}

static bool group_asked(const xkv_group *g, const uint8_t *asked)
{
    for (uint32_t i = 0; i < g->plane_count; i++)
        if (asked[g->planes[i]])
            return true;
    return false;
}

/* The smallest range of groups of `entry` with all asked planes. */
static void find_groups(const xkv_entry *entry, const uint8_t *asked, xkv_read_options *o)
{
    uint32_t end = 0;

    o->first_group = entry->c.group_count;
    for (uint32_t i = 0; i < entry->c.group_count; i++)
        if (group_asked(&entry->c.groups[i], asked)) {
            o->first_group = i < o->first_group ? i : o->first_group;
            end = i + 1;
        }
    o->group_count = end > o->first_group ? end - o->first_group : 0;
}

static xkv_status open_stretch(xkv_ctx *ctx, const xkv_attention *a, const uint8_t *asked, xkv_stretch *s)
{
    const xkv_container *c = &s->entry->c;
    xkv_read_options o = xkv_read_options_default();

    s->first_chunk = s->first / c->chunk_tokens;
    s->chunk_count = (s->end - 1) / c->chunk_tokens - s->first_chunk + 1;
    o.first_token = s->first;
    o.token_count = s->end - s->first;
    o.positions = a->own_positions ? a->own_positions + s->at : NULL;
    find_groups(s->entry, asked, &o);
    XKV_TRY(xkv_moves_create(ctx, &c->geometry, c->groups, &o, &s->moves));
    XKV_TRY(XKV_NEW_ZERO(ctx, c->group_count, &s->groups));
    XKV_TRY(xkv_cross_stage_open(ctx, s->entry, &s->cross));
    for (uint32_t i = 0; i < c->group_count; i++)
        if (group_asked(&c->groups[i], asked))
            XKV_TRY(xkv_tile_group_open(ctx, s->entry, &c->groups[i], &s->cross, asked, &s->groups[i]));
    return XKV_OK;
}

/* Which entries of the chain have asked rows; with `stretches` NULL only how many. */
static uint32_t find_stretches(const xkv_attention *a, xkv_stretch *stretches)
{
    uint32_t count = 0, limit = a->first_token + a->token_count;

    for (const xkv_entry *e = a->entry; e; e = e->parent) {
        uint32_t first = e->base > a->first_token ? e->base : a->first_token;
        if (first < limit) {
            count++;
            if (stretches)
                stretches[a->stretch_count - count] = (xkv_stretch){
                    .entry = e, .first = first - e->base, .end = limit - e->base, .at = first - a->first_token};
            limit = first;
        }
    }
    return count;
}

static xkv_status open_stretches(xkv_ctx *ctx, const uint8_t *asked, xkv_attention *a)
{
    a->stretch_count = find_stretches(a, NULL);
    XKV_TRY(XKV_NEW_ZERO(ctx, a->stretch_count, &a->stretches));
    (void)find_stretches(a, a->stretches);
    for (uint32_t i = 0; i < a->stretch_count; i++) {
        XKV_TRY(xkv_check_cancel(ctx));
        XKV_TRY(open_stretch(ctx, a, asked, &a->stretches[i]));
    }
    return XKV_OK;
}

static void close_stretch(xkv_ctx *ctx, xkv_stretch *s)
{
    for (uint32_t i = 0; i < s->entry->c.group_count; i++) {
        for (uint32_t k = 0; s->blocks && s->blocks[i] && k < s->chunk_count; k++)
            xkv_block_free(ctx, &s->blocks[i][k]);
        if (s->blocks)
            xkv_release(ctx, s->blocks[i]);
        if (s->groups)
            xkv_tile_group_close(ctx, &s->groups[i]);
    }
    xkv_release(ctx, s->blocks);
    xkv_release(ctx, s->groups);
    xkv_cross_stage_free(ctx, &s->cross);
    xkv_moves_free(ctx, &s->moves);
}

xkv_tile_plane xkv_stretch_plane(const xkv_stretch *s, uint32_t plane)
{
    xkv_tile_plane found = {0};

    for (uint32_t i = 0; i < s->entry->c.group_count; i++) {
        const xkv_group *g = &s->entry->c.groups[i];
        uint32_t column = 0;
        for (uint32_t k = 0; k < g->plane_count; k++) {
            uint32_t width = xkv_plane_width(&s->entry->c.geometry.planes[g->planes[k]]);
            if (g->planes[k] == plane)
                found = (xkv_tile_plane){&s->groups[i], plane, k, column, width};
            column += width;
        }
    }
    return found;
}

/* --- Holding coefficients ----------------------------------------------------------------------------------------- */

typedef struct keeping {
    xkv_ctx *ctx;
    const xkv_stretch *stretch;
    const xkv_tile_group *group;
    xkv_block *blocks;          /* [chunk_count] */
    xkv_block_scratch *scratch; /* per thread */
    float **panels;             /* likewise */
} keeping;

static xkv_status keep_chunk(void *user, uint32_t worker, uint64_t index)
{
    keeping *k = user;
    xkv_block block;

    if (!k->scratch[worker].ctx) {
        XKV_TRY(XKV_NEW(k->ctx, xkv_block_panel(k->group), &k->panels[worker]));
        XKV_TRY(xkv_block_scratch_create(k->ctx, k->group, k->panels[worker], &k->scratch[worker]));
    }
    XKV_TRY(xkv_block_load(&k->scratch[worker], k->stretch->first_chunk + (uint32_t)index, &block));
    return xkv_block_keep(k->ctx, k->group, &block, &k->blocks[index]);
}

static xkv_status keep_group(keeping *k, xkv_pool *pool, uint64_t *bytes)
{
    xkv_status status = xkv_pool_run(k->ctx, pool, k->stretch->chunk_count, keep_chunk, k);

    for (uint32_t i = 0; i < xkv_pool_threads(pool); i++) {
        xkv_block_scratch_free(&k->scratch[i]);
        xkv_release(k->ctx, k->panels[i]);
        k->panels[i] = NULL;
    }
    for (uint32_t i = 0; status == XKV_OK && i < k->stretch->chunk_count; i++)
        *bytes += xkv_block_bytes(k->group, &k->blocks[i]);
    return status;
}

static xkv_status keep_stretch(keeping *k, xkv_pool *pool, xkv_stretch *s, uint64_t *bytes)
{
    k->stretch = s;
    XKV_TRY(XKV_NEW_ZERO(k->ctx, s->entry->c.group_count, &s->blocks));
    for (uint32_t i = 0; i < s->entry->c.group_count; i++) {
        k->group = &s->groups[i];
        if (!k->group->reader.g)
            continue;
        XKV_TRY(XKV_NEW_ZERO(k->ctx, s->chunk_count, &s->blocks[i]));
        k->blocks = s->blocks[i];
        XKV_TRY(keep_group(k, pool, bytes));
    }
    return XKV_OK;
}

static xkv_status hold_coefficients(xkv_ctx *ctx, xkv_attention *a)
{
    keeping k = {.ctx = ctx};
    xkv_pool *pool = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(xkv_pool_create(ctx, xkv_ctx_threads(ctx), &pool));
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, xkv_pool_threads(pool), &k.scratch), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, xkv_pool_threads(pool), &k.panels), out);
    for (uint32_t i = 0; i < a->stretch_count; i++)
        XKV_TRY_GOTO(keep_stretch(&k, pool, &a->stretches[i], &a->held_bytes), out);
out:
    xkv_release(ctx, k.scratch);
    xkv_release(ctx, k.panels);
    xkv_pool_free(ctx, pool);
    return status;
}

/* --- Holding rows ------------------------------------------------------------------------------------------------- */

static size_t plane_bytes(const xkv_attention *a, const xkv_plane *p)
{
    return (size_t)xkv_dtype_bytes(p->dtype, xkv_plane_width(p)) * a->token_count;
}

/* All planes that a read of the groups touches; those of other layers are given back afterwards. */
static xkv_status allocate_rows(xkv_ctx *ctx, const xkv_read_options *o, xkv_attention *a, xkv_view *views)
{
    const xkv_entry *e = a->entry;

    for (uint32_t i = o->first_group; i < o->first_group + o->group_count; i++)
        for (uint32_t j = 0; j < e->c.groups[i].plane_count; j++) {
            uint32_t plane = e->c.groups[i].planes[j];
            const xkv_plane *p = &e->geometry.planes[plane];
            uint32_t width = xkv_plane_width(p);
            XKV_TRY(XKV_NEW(ctx, plane_bytes(a, p), &a->rows[plane]));
            views[plane] = (xkv_view){.data = a->rows[plane],
                                      .token_stride = (int64_t)xkv_dtype_bytes(p->dtype, width),
                                      .head_stride = (int64_t)xkv_dtype_bytes(p->dtype, width),
                                      .dim_stride = (int64_t)xkv_dtype_size(p->dtype),
                                      .dtype = p->dtype,
                                      .head_dim = width}; /* blocks may reach over heads */
        }
    return XKV_OK;
}

static void drop_other_rows(xkv_ctx *ctx, const uint8_t *asked, xkv_attention *a)
{
    for (uint32_t i = 0; i < a->entry->geometry.plane_count; i++) {
        if (a->rows[i] && asked[i]) {
            a->held_bytes += plane_bytes(a, &a->entry->geometry.planes[i]);
            continue;
        }
        xkv_release(ctx, a->rows[i]);
        a->rows[i] = NULL;
    }
}

static xkv_status hold_rows(xkv_ctx *ctx, const uint8_t *asked, xkv_attention *a)
{
    xkv_read_options o = xkv_read_options_default();
    xkv_view *views = NULL;
    xkv_status status = XKV_OK;

    o.first_token = a->first_token;
    o.token_count = a->token_count;
    o.positions = a->own_positions;
    o.group_count = a->entry->c.group_count;
    if (a->token_count == 0)
        return XKV_OK;
    if (!a->entry->parent) /* whose groups may be others: all are read */
        find_groups(a->entry, asked, &o);
    XKV_TRY(XKV_NEW_ZERO(ctx, a->entry->geometry.plane_count, &a->rows));
    if (o.group_count == 0)
        return XKV_OK;
    XKV_TRY(XKV_NEW_ZERO(ctx, a->entry->geometry.plane_count, &views));
    XKV_TRY_GOTO(allocate_rows(ctx, &o, a, views), out);
    XKV_TRY_GOTO(xkv_entry_decode(ctx, a->entry, &o, views), out);
    drop_other_rows(ctx, asked, a);
out:
    xkv_release(ctx, views);
    return status;
}

/* --- What to hold ------------------------------------------------------------------------------------------------- */

static uint64_t rows_bytes(const xkv_attention *a, const uint8_t *asked)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < a->entry->geometry.plane_count; i++)
        if (asked[i])
            bytes += plane_bytes(a, &a->entry->geometry.planes[i]);
    return bytes;
}

/* About what the coefficients take. */
static uint64_t coefficient_bytes(const xkv_attention *a)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < a->stretch_count; i++) {
        const xkv_stretch *s = &a->stretches[i];
        for (uint32_t k = 0; k < s->entry->c.group_count; k++)
            if (s->groups[k].reader.g)
                bytes += s->chunk_count * xkv_block_expected_bytes(&s->groups[k]);
    }
    return bytes;
}

/* What was measured (README, "Attend without restoring"): restoring pays from the second call for each layer on. For
 * one call coefficients that are decoded once for all layers of a group are the fastest, and where they do not fit
 * either, each layer decodes them. */
static bool rows_pay(const xkv_attention *a, const xkv_attention_options *o, const uint8_t *asked)
{
    return o->calls != 1 && (o->memory == 0 || rows_bytes(a, asked) <= o->memory);
}

static bool coefficients_pay(const xkv_attention *a, const xkv_attention_options *o)
{
    return o->memory == 0 || coefficient_bytes(a) <= o->memory;
}

/* --- Opening ------------------------------------------------------------------------------------------------------ */

static xkv_status resolve(xkv_ctx *ctx, const xkv_entry *entry, xkv_attention_options *o)
{
    const xkv_geometry *g = &entry->geometry;

    XKV_TRY(xkv_resolve_range(ctx, "tokens", g->token_count, o->first_token, &o->token_count));
    XKV_TRY(xkv_resolve_range(ctx, "layers", g->layer_count, o->first_layer, &o->layer_count));
    if (o->hold > XKV_HOLD_ROWS)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "hold is %u, expected 0 .. 3", o->hold);
    return XKV_OK;
}

static xkv_status set_positions(xkv_ctx *ctx, const int32_t *positions, xkv_attention *a)
{
    a->positions = a->entry->geometry.positions + a->first_token;
    if (!positions)
        return XKV_OK;
    XKV_TRY(XKV_NEW(ctx, a->token_count, &a->own_positions));
    if (a->token_count > 0)
        memcpy(a->own_positions, positions, a->token_count * sizeof *positions);
    a->positions = a->own_positions;
    return XKV_OK;
}

static xkv_status open_held(xkv_ctx *ctx, const xkv_attention_options *o, const uint8_t *asked, xkv_attention *a)
{
    bool choose = a->hold == XKV_HOLD_AUTO;

    if (choose && rows_pay(a, o, asked))
        a->hold = XKV_HOLD_ROWS;
    if (a->hold == XKV_HOLD_ROWS)
        return hold_rows(ctx, asked, a);
    XKV_TRY(open_stretches(ctx, asked, a));
    if (choose)
        a->hold = coefficients_pay(a, o) ? XKV_HOLD_COEFFICIENTS : XKV_HOLD_NOTHING;
    return a->hold == XKV_HOLD_COEFFICIENTS ? hold_coefficients(ctx, a) : XKV_OK;
}

xkv_status xkv_attention_open(xkv_ctx *ctx, const xkv_entry *entry, const xkv_attention_options *options,
                              xkv_attention **attention_p)
{
    xkv_attention_options o = xkv_attention_options_default();
    xkv_attention *a = NULL;
    uint8_t *asked = NULL;
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(resolve(ctx, entry, &o));
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &a));
    *a = (xkv_attention){.entry = entry,
                         .first_token = o.first_token,
                         .token_count = o.token_count,
                         .first_layer = o.first_layer,
                         .layer_count = o.layer_count,
                         .hold = o.hold};
    XKV_TRY_GOTO(set_positions(ctx, o.positions, a), out);
    XKV_TRY_GOTO(mark_planes(ctx, a, &asked), out);
    XKV_TRY_GOTO(open_held(ctx, &o, asked, a), out);
    *attention_p = a;
    a = NULL;
out:
    xkv_release(ctx, asked);
    xkv_attention_close(ctx, a);
    return status;
}

void xkv_attention_close(xkv_ctx *ctx, xkv_attention *a)
{
    if (!a)
        return;
    for (uint32_t i = 0; a->stretches && i < a->stretch_count; i++)
        close_stretch(ctx, &a->stretches[i]);
    for (uint32_t i = 0; a->rows && i < a->entry->geometry.plane_count; i++)
        xkv_release(ctx, a->rows[i]);
    xkv_release(ctx, a->stretches);
    xkv_release(ctx, a->rows);
    xkv_release(ctx, a->own_positions);
    xkv_release(ctx, a);
}

void xkv_attention_get_info(const xkv_attention *a, xkv_attention_info *info)
{
    *info = (xkv_attention_info){.hold = a->hold,
                                 .token_count = a->token_count,
                                 .first_layer = a->first_layer,
                                 .layer_count = a->layer_count,
                                 .held_bytes = a->held_bytes};
}
