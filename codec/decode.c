#include "chunks.h"
#include "moves.h"
#include "parts.h"

/* What one thread needs for the group at hand. */
typedef struct worker {
    xkv_chunk_scratch scratch;
    float *rows; /* [XKV_TILE_ROWS][width] */
    xkv_rotator rotator;
    xkv_rotator mover; /* of exact rows, when positions are asked for */
} worker;

typedef struct decoder {
    xkv_ctx *ctx;
    const xkv_kernels *kernels;
    const xkv_entry *entry;
    const xkv_container *c;
    const xkv_view *views; /* NULL: check only */
    uint32_t first, end;   /* tokens asked for */
    uint32_t first_chunk, last_chunk;
    xkv_moves moves;
    xkv_pool *pool;
    uint32_t threads;
    worker *workers;       /* [threads] */
    xkv_cross_stage cross; /* for all groups */

    const xkv_group *g;          /* at hand */
    xkv_group_reader *reader;    /* its own */
    xkv_group_reader readers[2]; /* by turns: while the chunks of one group are decoded, the next one is opened */
    uint32_t next, groups_end;   /* the group behind it, if any */
} decoder;

/* --- Rows to views ------------------------------------------------------------------------------------------------ */

/* Exact rows of tokens [t0, t1) at other positions: what has a RoPE turns by the way between the two. */
static xkv_status scatter_moved(decoder *d, worker *w, const uint8_t *matrix, uint32_t t0, uint32_t t1)
{
    size_t elem = xkv_group_element_size(&d->c->geometry, d->g), width = d->g->width;

    for (uint32_t t = t0; t < t1; t++) {
        uint32_t row = t - d->first;
        size_t column = 0;
        d->kernels->to_f32(d->c->geometry.planes[d->g->planes[0]].dtype, matrix + (t - t0) * width * elem, w->rows,
                           width);
        XKV_TRY(xkv_rotate_rows(d->ctx, &w->mover, d->g, &d->moves.distances[row], 1, w->rows));
        for (uint32_t i = 0; i < d->g->plane_count; i++) {
            const xkv_plane *p = &d->c->geometry.planes[d->g->planes[i]];
            if (p->rope != XKV_NO_ROPE)
                xkv_view_scatter(d->kernels, w->rows + column, width, p, row, row + 1, &d->views[d->g->planes[i]]);
            column += xkv_plane_width(p);
        }
    }
    return XKV_OK;
}

/* Exact rows of tokens [t0, t1), as the engine holds them. */
static xkv_status scatter_exact(decoder *d, worker *w, const uint8_t *matrix, uint32_t t0, uint32_t t1)
{
    size_t elem = xkv_group_element_size(&d->c->geometry, d->g), row_bytes = d->g->width * elem, column = 0;

    for (uint32_t i = 0; d->views && i < d->g->plane_count; i++) {
        const xkv_plane *p = &d->c->geometry.planes[d->g->planes[i]];
        const xkv_view *view = &d->views[d->g->planes[i]];
        size_t width = xkv_plane_width(p);
        bool moved = d->moves.distances && p->rope != XKV_NO_ROPE;
        if (view->dtype == p->dtype && !moved)
            xkv_view_scatter_bytes(matrix + column, row_bytes, p, t0 - d->first, t1 - d->first, view);
        for (uint32_t t = t0; view->dtype != p->dtype && !moved && t < t1; t++) {
            d->kernels->to_f32(p->dtype, matrix + (t - t0) * row_bytes + column, w->rows, width);
            xkv_view_scatter(d->kernels, w->rows, width, p, t - d->first, t - d->first + 1, view);
        }
        column += width * elem;
    }
    return d->views && d->moves.distances ? scatter_moved(d, w, matrix, t0, t1) : XKV_OK;
}

/* Tokens [*t0, *t1) cut to those asked for; false when none is left. */
static bool cut_range(const decoder *d, uint32_t *t0, uint32_t *t1)
{
    if (*t0 < d->first)
        *t0 = d->first;
    if (*t1 > d->end)
        *t1 = d->end;
    return *t0 < *t1;
}

/* Rows t0 .. t1-1 of a matrix whose first row is token `base`. */
static xkv_status scatter_asked(decoder *d, worker *w, const uint8_t *matrix, uint32_t base, uint32_t t0, uint32_t t1)
{
    size_t row_bytes = (size_t)xkv_group_row_bytes(&d->c->geometry, d->g, 1);

    if (!cut_range(d, &t0, &t1))
        return XKV_OK;
    return scatter_exact(d, w, matrix + (t0 - base) * row_bytes, t0, t1);
}

/* Sinks and window. */
static xkv_status scatter_sinks_and_window(decoder *d, const uint8_t *matrix)
{
    const xkv_container *c = d->c;
    uint32_t end = c->geometry.token_count, window = end - c->window;

    XKV_TRY(scatter_asked(d, &d->workers[0], matrix, 0, 0, c->sinks));
    return scatter_asked(d, &d->workers[0], matrix + xkv_group_row_bytes(&c->geometry, d->g, c->sinks), window, window,
                         end);
}

static xkv_status restore_exact_rows(decoder *d)
{
    uint8_t *matrix = NULL;
    xkv_status status;

    if (d->g->codec == XKV_GROUP_LOSSLESS || xkv_group_is_cross(d->g) || d->c->sinks + d->c->window == 0)
        return XKV_OK;
    XKV_TRY(xkv_read_exact_rows(d->reader, &matrix));
    status = scatter_sinks_and_window(d, matrix);
    xkv_release(d->ctx, matrix);
    return status;
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

/* Of tokens [t0, t1), whose rows are in w->rows, those asked for: rotate, round, store. */
static xkv_status finish_tile(decoder *d, worker *w, uint32_t t0, uint32_t t1)
{
    size_t width = d->g->width, column = 0;
    uint32_t first = t0;
    float *rows;

    if (!cut_range(d, &first, &t1))
        return XKV_OK;
    rows = w->rows + (first - t0) * width;
    XKV_TRY(xkv_rotate_rows(d->ctx, &w->rotator, d->g, d->moves.positions + (first - d->first), t1 - first, rows));
    for (uint32_t i = 0; d->views && i < d->g->plane_count; i++) {
        const xkv_plane *p = &d->c->geometry.planes[d->g->planes[i]];
        xkv_view_scatter(d->kernels, rows + column, width, p, first - d->first, t1 - d->first,
                         &d->views[d->g->planes[i]]);
        column += xkv_plane_width(p);
    }
    return XKV_OK;
}

/* The next tile of a chunk, tokens [*t0, *t1), of which some are asked for; false: no more. Tiles start at the first
 * coded token of the chunk and are computed whole, so that the bits of a row do not depend on the range asked for: a
 * GEMM may round a row differently in a matrix of another height. */
static bool next_tile(const decoder *d, uint32_t end, uint32_t *t0, uint32_t *t1)
{
    for (*t0 = *t1; *t0 < xkv_min64(end, d->end); *t0 = *t1) {
        *t1 = (uint32_t)xkv_min64(end, (uint64_t)*t0 + XKV_TILE_ROWS);
        if (*t1 > d->first)
            return true;
    }
    return false;
}

static xkv_status restore_chunk(decoder *d, worker *w, uint32_t index)
{
    uint32_t t0, t1;
    xkv_chunk chunk;

    XKV_TRY(xkv_chunk_load(d->reader, &w->scratch, index, &chunk));
    if (d->g->codec == XKV_GROUP_LOSSLESS)
        return scatter_asked(d, w, chunk.matrix, chunk.t0, chunk.t0, chunk.t1);
    if (xkv_group_is_cross(d->g))
        return XKV_OK;
    for (t1 = chunk.t0; next_tile(d, chunk.t1, &t0, &t1);) {
        xkv_chunk_rows(d->reader, &w->scratch, &chunk, t0, t1, w->rows);
        XKV_TRY(finish_tile(d, w, t0, t1));
    }
    return XKV_OK;
}

/* Scratch for the group at hand, in every thread. */
static xkv_status size_workers(decoder *d)
{
    for (uint32_t i = 0; i < d->threads; i++) {
        XKV_TRY(xkv_chunk_scratch_size(d->reader, &d->workers[i].scratch));
        XKV_TRY(XKV_NEW(d->ctx, (size_t)XKV_TILE_ROWS * d->g->width, &d->workers[i].rows));
    }
    return XKV_OK;
}

static void empty_workers(decoder *d)
{
    for (uint32_t i = 0; i < d->threads; i++) {
        xkv_chunk_scratch_empty(d->ctx, &d->workers[i].scratch);
        xkv_release(d->ctx, d->workers[i].rows);
        d->workers[i].rows = NULL;
    }
}

/* The group from `group` on that has something to be restored: the cross stage has no planes, and those that follow
 * decode it as they need it. */
static uint32_t next_group(const decoder *d, uint32_t group)
{
    return d->views && group < d->groups_end && xkv_group_is_cross(&d->c->groups[group]) ? group + 1 : group;
}

static void prefetch_group(const decoder *d, uint32_t group)
{
    const xkv_group *g = &d->c->groups[group];

    xkv_container_prefetch(&d->entry->input, d->c, g, XKV_PART_COMPONENTS, XKV_PART_EXACT);
    xkv_container_prefetch(&d->entry->input, d->c, g, XKV_PART_CHUNKS + d->first_chunk,
                           XKV_PART_CHUNKS + d->last_chunk);
}

/* Open the next group, and have the one behind it fetched. */
static xkv_status open_next(decoder *d)
{
    xkv_group_reader *r = &d->readers[d->reader == &d->readers[0]];

    if (d->next + 1 < d->groups_end)
        prefetch_group(d, d->next + 1);
    XKV_TRY(xkv_group_reader_open(d->ctx, d->entry, &d->c->groups[d->next], &d->cross, r));
    return xkv_group_reader_for_rows(r);
}

/* A chunk of the group at hand; behind the last one, the next group. */
static xkv_status run_task(void *user, uint32_t index, uint64_t task)
{
    decoder *d = user;
    uint32_t chunk = d->first_chunk + (uint32_t)task;

    return chunk <= d->last_chunk ? restore_chunk(d, &d->workers[index], chunk) : open_next(d);
}

/* The group that has been opened. With other threads to do it, the next one is opened meanwhile; *opened tells. */
static xkv_status restore_group(decoder *d, bool *opened)
{
    uint64_t chunks = d->last_chunk - d->first_chunk + 1u;
    xkv_status status = XKV_OK;

    *opened = d->threads > 1 && d->next < d->groups_end;
    XKV_TRY_GOTO(size_workers(d), out);
    XKV_TRY_GOTO(restore_exact_rows(d), out);
    XKV_TRY_GOTO(xkv_pool_run(d->ctx, d->pool, chunks + *opened, run_task, d), out);
out:
    empty_workers(d);
    xkv_group_reader_close(d->reader);
    return status;
}

/* --- Entry point -------------------------------------------------------------------------------------------------- */

static xkv_status init(decoder *d)
{
    d->threads = xkv_ctx_threads(d->ctx);
    XKV_TRY(xkv_pool_create(d->ctx, d->threads, &d->pool));
    d->threads = xkv_pool_threads(d->pool);
    XKV_TRY(XKV_NEW_ZERO(d->ctx, d->threads, &d->workers));
    for (uint32_t i = 0; i < d->threads; i++) {
        XKV_TRY(xkv_rotator_init(d->ctx, &d->c->geometry, d->kernels, false, &d->workers[i].rotator));
        if (d->moves.distances)
            XKV_TRY(xkv_rotator_init(d->ctx, &d->moves.geometry, d->kernels, false, &d->workers[i].mover));
    }
    return XKV_OK;
}

static void fini(decoder *d)
{
    xkv_cross_stage_free(d->ctx, &d->cross);
    xkv_group_reader_close(&d->readers[0]);
    xkv_group_reader_close(&d->readers[1]);
    for (uint32_t i = 0; d->workers && i < d->threads; i++) {
        if (d->workers[i].rotator.geometry)
            xkv_rotator_free(d->ctx, &d->workers[i].rotator);
        if (d->workers[i].mover.geometry)
            xkv_rotator_free(d->ctx, &d->workers[i].mover);
        xkv_chunk_scratch_free(d->ctx, &d->workers[i].scratch);
    }
    xkv_release(d->ctx, d->workers);
    xkv_moves_free(d->ctx, &d->moves);
    xkv_pool_free(d->ctx, d->pool);
}

static uint64_t asked_bytes(const decoder *d, const xkv_group *g)
{
    return xkv_group_row_bytes(&d->c->geometry, g, d->end - d->first);
}

/* What the groups that are asked for hold in all. */
static uint64_t total_bytes(const decoder *d, const xkv_read_options *o)
{
    uint64_t total = 0;

    for (uint32_t i = o->first_group; i < d->groups_end; i++)
        total += asked_bytes(d, &d->c->groups[i]);
    return total;
}

static xkv_status open_cross(decoder *d, const xkv_read_options *o)
{
    bool needed = false;

    for (uint32_t i = o->first_group; i < d->groups_end; i++)
        needed |= d->c->groups[i].codec == XKV_GROUP_DICT || (!d->views && xkv_group_is_cross(&d->c->groups[i]));
    if (!needed)
        return XKV_OK;
    XKV_TRY(xkv_cross_stage_open(d->ctx, d->entry, &d->cross));
    return xkv_cross_stage_keep(d->ctx, d->entry, d->first_chunk, d->last_chunk, &d->cross);
}

static xkv_status announce(decoder *d, const xkv_read_options *o, uint32_t group, uint64_t done, uint64_t total)
{
    if ((o->group_ready && o->group_ready(o->group_ready_user, group) != 0) ||
        (o->progress && o->progress(o->progress_user, done, total) != 0))
        return xkv_fail(d->ctx, XKV_ERROR_CANCELLED, "stopped by a callback");
    return XKV_OK;
}

static xkv_status restore_groups(decoder *d, const xkv_read_options *o)
{
    uint64_t done = 0, total;
    bool opened = false;

    d->groups_end = o->first_group + o->group_count;
    total = total_bytes(d, o);
    XKV_TRY(open_cross(d, o));
    d->next = next_group(d, o->first_group);
    if (d->next > o->first_group)
        XKV_TRY(announce(d, o, o->first_group, done, total));
    while (d->next < d->groups_end) {
        uint32_t group = d->next;
        XKV_TRY(xkv_check_cancel(d->ctx));
        if (!opened)
            XKV_TRY(open_next(d));
        d->reader = &d->readers[d->reader == &d->readers[0]];
        d->g = &d->c->groups[group];
        d->next = next_group(d, group + 1);
        XKV_TRY(restore_group(d, &opened));
        done += asked_bytes(d, d->g);
        XKV_TRY(announce(d, o, group, done, total));
    }
    return XKV_OK;
}

/* Fill in what 0 stands for, and check the ranges. */
static xkv_status resolve(xkv_ctx *ctx, const xkv_entry *entry, uint32_t tokens, xkv_read_options *o)
{
    uint32_t groups = entry->c.group_count;

    if (o->first_token > tokens || o->token_count > tokens - o->first_token)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "tokens %u + %u are not within the %u of the entry", o->first_token,
                        o->token_count, tokens);
    if (o->first_group > groups || o->group_count > groups - o->first_group)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "groups %u + %u are not within the %u of the entry", o->first_group,
                        o->group_count, groups);
    if (o->token_count == 0)
        o->token_count = tokens - o->first_token;
    if (o->group_count == 0)
        o->group_count = groups - o->first_group;
    return XKV_OK;
}

xkv_status xkv_entry_decode_own(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                                const xkv_view *views)
{
    xkv_read_options o = xkv_read_options_default();
    decoder d = {.ctx = ctx, .kernels = xkv_kernels_cpu(), .entry = entry, .c = &entry->c, .views = views};
    xkv_status status;

    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(resolve(ctx, entry, entry->c.geometry.token_count, &o));
    if (o.token_count == 0 || o.group_count == 0)
        return XKV_OK;
    d.first = o.first_token;
    d.end = o.first_token + o.token_count;
    d.first_chunk = d.first / entry->c.chunk_tokens;
    d.last_chunk = (d.end - 1) / entry->c.chunk_tokens;
    XKV_TRY_GOTO(xkv_moves_create(ctx, &entry->c.geometry, entry->c.groups, &o, &d.moves), out);
    XKV_TRY_GOTO(init(&d), out);
    XKV_TRY_GOTO(restore_groups(&d, &o), out);
out:
    fini(&d);
    return status;
}

xkv_status xkv_entry_decode(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                            const xkv_view *views)
{
    xkv_read_options o = xkv_read_options_default();

    if (!entry->parent)
        return xkv_entry_decode_own(ctx, entry, options, views);
    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(resolve(ctx, entry, entry->geometry.token_count, &o));
    return o.token_count == 0 || o.group_count == 0 ? XKV_OK : xkv_extended_decode(ctx, entry, &o, views);
}

xkv_status xkv_entry_read(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options, const xkv_view *views)
{
    xkv_ctx_begin(ctx);
    if (!views)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "no views to restore into");
    return xkv_entry_decode(ctx, entry, options, views);
}

xkv_status xkv_entry_read_coding(xkv_ctx *ctx, const xkv_entry *entry, uint32_t group, xkv_group_coding *coding)
{
    const xkv_group *g = &entry->c.groups[group];
    xkv_side side = {0};
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    if (g->codec != XKV_GROUP_LOSSLESS && g->codec != XKV_GROUP_SVD)
        XKV_TRY_GOTO(xkv_side_read(ctx, entry, g, &side), out);
    *coding = (xkv_group_coding){.step = (double)side.step, .coded = side.coded};
out:
    xkv_side_free(ctx, &side);
    return status;
}
