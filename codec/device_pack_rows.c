#include "device_pack.h"
#include "rate.h"
#include "rows.h"

/* --- Copying ------------------------------------------------------------------------------------------------------ */

/* Tokens [t0, t1) of a plane into dense rows at `to`. */
static xkv_status take_rows(xkv_device_packing *p, uint32_t plane, uint32_t t0, uint32_t t1, uint8_t *to)
{
    const xkv_plane *geometry = &p->geometry->planes[plane];
    uint64_t row = (uint64_t)xkv_plane_width(geometry) * xkv_dtype_size(geometry->dtype);
    uint64_t most = xkv_max64(1, p->device->staging_bytes / row);

    for (uint32_t t = t0, n; t < t1; t += n, to += n * row) {
        xkv_plug_take o = {.view = p->views[plane], .heads = geometry->heads, .head_dim = geometry->head_dim};
        xkv_staging *s;
        n = (uint32_t)xkv_min64(t1 - t, most);
        XKV_TRY(xkv_staging_get(p->ctx, p->device, &s));
        o.tokens = n;
        o.first = t;
        o.rows = s->bytes; /* pinned memory, which the device writes itself */
        o.row_bytes = row;
        XKV_PACKING(p, take(p->device->plug, &o, p->stream));
        XKV_TRY(xkv_staging_put(p->ctx, p->device, s, p->stream));
        XKV_PACKING(p, wait(p->device->plug, s->event));
        memcpy(to, s->bytes, (size_t)(n * row));
    }
    return XKV_OK;
}

static void set_view(xkv_device_packing *p, uint32_t plane, uint8_t *rows, const uint32_t *where)
{
    const xkv_plane *geometry = &p->geometry->planes[plane];
    int64_t elem = (int64_t)xkv_dtype_size(geometry->dtype);

    p->host_views[plane] = (xkv_view){.data = rows,
                                      .token_stride = elem * xkv_plane_width(geometry),
                                      .head_stride = elem * geometry->head_dim,
                                      .dim_stride = elem,
                                      .rows = where,
                                      .dtype = geometry->dtype};
}

static size_t plane_row(const xkv_device_packing *p, uint32_t plane)
{
    const xkv_plane *geometry = &p->geometry->planes[plane];

    return xkv_plane_width(geometry) * xkv_dtype_size(geometry->dtype);
}

/* --- Few rows ----------------------------------------------------------------------------------------------------- */

/* What is done with each run of tokens that is needed. */
typedef xkv_status (*run_fn)(xkv_device_packing *p, uint32_t plane, uint32_t t0, uint32_t t1);

static xkv_status each_run(xkv_device_packing *p, bool sample, uint32_t plane, run_fn run)
{
    uint32_t count = p->geometry->token_count, sampled = (uint32_t)xkv_min64(p->tokens, XKV_SAMPLE_TOKENS);

    p->few_count = 0;
    XKV_TRY(run(p, plane, 0, p->sinks));
    for (uint32_t i = 0; sample && i < xkv_ceil_div(sampled, XKV_TILE_ROWS); i++) {
        uint32_t row, n = xkv_sample_tile(p->tokens, sampled, i, &row);
        XKV_TRY(run(p, plane, p->sinks + row, p->sinks + row + n));
    }
    return run(p, plane, count - p->window, count);
}

static xkv_status number_rows(xkv_device_packing *p, uint32_t plane, uint32_t t0, uint32_t t1)
{
    (void)plane;
    for (uint32_t t = t0; t < t1; t++)
        p->few_rows[t] = p->few_count++;
    return XKV_OK;
}

static xkv_status take_run(xkv_device_packing *p, uint32_t plane, uint32_t t0, uint32_t t1)
{
    uint8_t *to = p->few[plane] + p->few_count * plane_row(p, plane);

    p->few_count += t1 - t0;
    return take_rows(p, plane, t0, t1, to);
}

static xkv_status alloc_rows(xkv_device_packing *p)
{
    uint32_t planes = p->geometry->plane_count;

    XKV_TRY(XKV_NEW_ZERO(p->ctx, planes, &p->host_views));
    XKV_TRY(XKV_NEW_ZERO(p->ctx, planes, &p->few));
    return XKV_NEW_ZERO(p->ctx, planes, &p->all);
}

xkv_status xkv_device_pack_few(xkv_device_packing *p, bool sample)
{
    XKV_TRY(alloc_rows(p));
    XKV_TRY(XKV_NEW_ZERO(p->ctx, p->geometry->token_count, &p->few_rows));
    XKV_TRY(each_run(p, sample, 0, number_rows));
    for (uint32_t i = 0; i < p->geometry->plane_count; i++) {
        XKV_TRY(XKV_NEW(p->ctx, p->few_count * plane_row(p, i), &p->few[i]));
        XKV_TRY(each_run(p, sample, i, take_run));
        set_view(p, i, p->few[i], p->few_rows);
    }
    return XKV_OK;
}

/* --- All rows ----------------------------------------------------------------------------------------------------- */

static xkv_status bring_plane(xkv_device_packing *p, uint32_t plane)
{
    uint32_t count = p->geometry->token_count;

    XKV_TRY(XKV_NEW(p->ctx, count * plane_row(p, plane), &p->all[plane]));
    XKV_TRY(take_rows(p, plane, 0, count, p->all[plane]));
    set_view(p, plane, p->all[plane], NULL);
    return XKV_OK;
}

static void let_go(xkv_device_packing *p)
{
    for (uint32_t i = 0; i < p->here_count; i++) {
        uint32_t plane = p->here[i];
        xkv_release(p->ctx, p->all[plane]);
        p->all[plane] = NULL;
        set_view(p, plane, p->few[plane], p->few_rows);
    }
    p->here = NULL;
    p->here_count = 0;
}

xkv_status xkv_device_pack_bring(xkv_device_packing *p, const xkv_group *g)
{
    if (g && g->planes == p->here)
        return XKV_OK;
    let_go(p);
    if (!g)
        return XKV_OK;
    p->here = g->planes;
    p->here_count = g->plane_count;
    for (uint32_t i = 0; i < g->plane_count; i++)
        XKV_TRY(bring_plane(p, g->planes[i]));
    return XKV_OK;
}

xkv_status xkv_device_pack_bring_all(xkv_device_packing *p)
{
    XKV_TRY(alloc_rows(p));
    for (uint32_t i = 0; i < p->geometry->plane_count; i++)
        XKV_TRY(bring_plane(p, i));
    return XKV_OK;
}

void xkv_device_pack_release_rows(xkv_device_packing *p)
{
    for (uint32_t i = 0; i < p->geometry->plane_count; i++) {
        if (p->few)
            xkv_release(p->ctx, p->few[i]);
        if (p->all)
            xkv_release(p->ctx, p->all[i]);
    }
    xkv_release(p->ctx, p->few);
    xkv_release(p->ctx, p->all);
    xkv_release(p->ctx, p->few_rows);
    xkv_release(p->ctx, p->host_views);
    p->few = p->all = NULL;
    p->few_rows = NULL;
    p->host_views = NULL;
    p->here = NULL;
    p->here_count = 0;
}
