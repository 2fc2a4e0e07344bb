/* device_rows.c - rows that the CPU has decoded, on their way into the device's views. */
#include "device_read.h"

#define HOST_BYTES (64u << 20) /* of rows that are decoded at a time */

/* Dense rows in host memory, and the views of them. */
typedef struct dense {
    uint8_t *bytes;
    xkv_view *views; /* [plane_count] */
    uint64_t row_bytes;
} dense;

/* With the heads that are asked for. */
static xkv_plane plane_of(const xkv_device_reading *r, uint32_t plane)
{
    uint32_t first;

    return xkv_plane_heads(&r->entry->c.geometry.planes[plane], r->target.heads, &first);
}

static uint64_t plane_bytes(const xkv_device_reading *r, const xkv_group *g, uint32_t i)
{
    xkv_plane p = plane_of(r, g->planes[i]);

    return xkv_dtype_bytes(r->views[g->planes[i]].dtype, xkv_plane_width(&p));
}

/* Views of `tokens` rows of the groups; planes one behind the other, each with its rows. */
static void lay_out(const xkv_device_reading *r, uint32_t first_group, uint32_t count, uint64_t tokens, dense *d)
{
    uint8_t *at = d->bytes;

    for (uint32_t j = first_group; j < first_group + count; j++) {
        const xkv_group *g = &r->entry->c.groups[j];
        for (uint32_t i = 0; i < g->plane_count; i++) {
            uint32_t dtype = r->views[g->planes[i]].dtype;
            xkv_plane p = plane_of(r, g->planes[i]);
            int64_t elem = (int64_t)xkv_dtype_size(dtype), row = (int64_t)plane_bytes(r, g, i);
            d->views[g->planes[i]] = (xkv_view){.data = at,
                                                .token_stride = row,
                                                .head_stride = row,
                                                .dim_stride = elem,
                                                .dtype = dtype,
                                                .head_dim = xkv_plane_width(&p)}; /* blocks may reach over heads */
            at += tokens * (uint64_t)row;
        }
    }
}

static uint64_t row_bytes(const xkv_device_reading *r, uint32_t first_group, uint32_t count)
{
    uint64_t sum = 0;

    for (uint32_t j = first_group; j < first_group + count; j++)
        for (uint32_t i = 0; i < r->entry->c.groups[j].plane_count; i++)
            sum += plane_bytes(r, &r->entry->c.groups[j], i);
    return sum;
}

static xkv_status dense_init(xkv_device_reading *r, uint32_t first_group, uint32_t count, uint64_t tokens, dense *d)
{
    *d = (dense){.row_bytes = row_bytes(r, first_group, count)};
    XKV_TRY(XKV_NEW_ZERO(r->ctx, r->entry->c.geometry.plane_count, &d->views));
    return XKV_NEW(r->ctx, (size_t)(tokens * d->row_bytes), &d->bytes);
}

static void dense_free(const xkv_device_reading *r, dense *d)
{
    xkv_release(r->ctx, d->bytes);
    xkv_release(r->ctx, d->views);
}

/* Rows [0, tokens) of a dense plane to rows from `first` on of the device's. */
static xkv_status move_plane(xkv_device_reading *r, uint32_t plane, const xkv_view *from, uint32_t first,
                             uint32_t tokens)
{
    xkv_plane p = plane_of(r, plane);
    uint64_t bytes = (uint64_t)from->token_stride, most = r->device->staging_bytes / bytes;

    for (uint32_t t = 0, n; t < tokens; t += n) {
        xkv_plug_move o = {.row_bytes = bytes, .view = r->views[plane], .heads = p.heads, .head_dim = p.head_dim};
        xkv_staging *s;
        n = (uint32_t)xkv_min64(tokens - t, most);
        XKV_TRY(xkv_staging_get(r->ctx, r->device, &s));
        memcpy(s->bytes, (const uint8_t *)from->data + t * bytes, (size_t)(n * bytes));
        o.rows = s->bytes;
        o.tokens = n;
        o.first = first + t;
        XKV_DEVICE(r, move(r->device->plug, &o, r->stream));
        XKV_TRY(xkv_staging_put(r->ctx, r->device, s, r->stream));
    }
    return XKV_OK;
}

static xkv_status move_group(xkv_device_reading *r, const xkv_group *g, const dense *d, uint32_t first, uint32_t tokens)
{
    for (uint32_t i = 0; i < g->plane_count; i++)
        XKV_TRY(move_plane(r, g->planes[i], &d->views[g->planes[i]], first, tokens));
    return XKV_OK;
}

/* Tokens [t0, t1) decoded and moved. */
static xkv_status bring(xkv_device_reading *r, uint32_t first_group, uint32_t count, dense *d, uint32_t t0, uint32_t t1)
{
    xkv_read_options o = xkv_read_options_default();

    o.first_token = t0;
    o.token_count = t1 - t0;
    o.first_group = first_group;
    o.group_count = count;
    o.first_head = r->target.heads.first;
    o.head_count = r->target.heads.count;
    if (r->o->positions)
        o.positions = r->o->positions + (t0 - r->o->first_token);
    lay_out(r, first_group, count, t1 - t0, d);
    XKV_TRY(xkv_entry_decode_own(r->ctx, r->entry, &o, d->views));
    for (uint32_t j = first_group; j < first_group + count; j++)
        XKV_TRY(move_group(r, &r->entry->c.groups[j], d, t0 - r->o->first_token, t1 - t0));
    return XKV_OK;
}

xkv_status xkv_device_host_rows(xkv_device_reading *r, uint32_t first_group, uint32_t group_count, uint32_t first,
                                uint32_t end)
{
    uint64_t bytes = row_bytes(r, first_group, group_count), chunk = r->entry->c.chunk_tokens, tokens;
    xkv_status status = XKV_OK;
    dense d = {0};

    if (bytes == 0 || first == end)
        return XKV_OK;
    tokens = xkv_min64(end - first, xkv_max64(1, HOST_BYTES / bytes / chunk) * chunk);
    XKV_TRY_GOTO(dense_init(r, first_group, group_count, tokens, &d), out);
    for (uint32_t t0 = first, t1; t0 < end; t0 = t1) { /* no chunk is decoded twice */
        t1 = (uint32_t)xkv_min64(end, t0 - t0 % chunk + tokens);
        if (t1 <= t0)
            t1 = (uint32_t)xkv_min64(end, t0 + tokens);
        XKV_TRY_GOTO(bring(r, first_group, group_count, &d, t0, t1), out);
    }
out:
    dense_free(r, &d);
    return status;
}

/* --- Exact rows of groups that the device decodes ----------------------------------------------------------------- */

/* Tokens [t0, t1), whose rows are at `matrix`, as far as they are asked for. */
static xkv_status bring_exact(xkv_device_reading *r, xkv_scatterer *s, const xkv_group *g, const uint8_t *matrix,
                              uint32_t t0, uint32_t t1, dense *d, float *scratch)
{
    xkv_target target = r->target;
    uint32_t first = (uint32_t)xkv_max64(t0, target.first), end = (uint32_t)xkv_min64(t1, target.end);

    if (first >= end)
        return XKV_OK;
    lay_out(r, (uint32_t)(g - r->entry->c.groups), 1, end - first, d);
    target.views = d->views;
    if (target.moves.distances)
        target.moves.distances += first - target.first;
    target.first = first;
    target.end = end;
    XKV_TRY(xkv_scatter_exact(&target, s, g, matrix, t0, t1, scratch));
    return move_group(r, g, d, first - r->o->first_token, end - first);
}

static xkv_status bring_both(xkv_device_reading *r, xkv_scatterer *s, const xkv_group *g, const uint8_t *matrix,
                             dense *d, float *scratch)
{
    const xkv_container *c = &r->entry->c;
    uint32_t end = c->geometry.token_count;

    XKV_TRY(bring_exact(r, s, g, matrix, 0, c->sinks, d, scratch));
    matrix += xkv_group_row_bytes(&c->geometry, g, c->sinks);
    return bring_exact(r, s, g, matrix, end - c->window, end, d, scratch);
}

xkv_status xkv_device_exact_rows(xkv_device_reading *r, const xkv_group_reader *reader)
{
    const xkv_container *c = &r->entry->c;
    const xkv_group *g = reader->g;
    xkv_scatterer s = {0};
    uint8_t *matrix = NULL;
    float *scratch = NULL;
    xkv_status status = XKV_OK;
    dense d = {0};

    if (r->target.first >= c->sinks && r->target.end <= c->geometry.token_count - c->window)
        return XKV_OK;
    XKV_TRY_GOTO(xkv_scatterer_init(&r->target, &s), out);
    XKV_TRY_GOTO(XKV_NEW(r->ctx, g->width, &scratch), out);
    XKV_TRY_GOTO(xkv_read_exact_rows(reader, &matrix), out);
    XKV_TRY_GOTO(dense_init(r, (uint32_t)(g - c->groups), 1, xkv_max64(c->sinks, c->window), &d), out);
    XKV_TRY_GOTO(bring_both(r, &s, g, matrix, &d, scratch), out);
out:
    dense_free(r, &d);
    xkv_release(r->ctx, matrix);
    xkv_release(r->ctx, scratch);
    xkv_scatterer_free(&r->target, &s);
    return status;
}
