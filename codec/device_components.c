/* device_components.c - the operands that every tile of a group is multiplied with: rows of its basis, and what the
 * cross stage adds, in two halves. */
#include "device_work.h"

/* Rows [at, at + count) of the components from rows of f32 on the device. */
static xkv_status split_rows(xkv_device_work *w, const float *rows, const uint32_t *index, uint32_t at, uint32_t count,
                             float factor)
{
    xkv_device_reading *r = w->r;
    uint64_t width = w->g->width, all = w->own + w->cross, elem = w->exact ? 4 : 2;
    uint8_t *high = (uint8_t *)xkv_device_place(w, r->at.components) + at * width * elem;
    xkv_plug_split o = {rows, index, count, width, factor, w->scale, high, high + all * width * elem, w->exact};

    XKV_DEVICE(r, split(r->device->plug, &o, r->stream));
    return XKV_OK;
}

/* The group's own, from the host, a few rows at a time through the place of the tile's rows. */
static xkv_status send_components(xkv_device_work *w)
{
    xkv_device_reading *r = w->r;
    uint64_t row = 4ull * w->g->width, most = xkv_min64(r->at.tile_tokens, r->device->staging_bytes / row);
    float *there = xkv_device_place(w, r->at.rows);

    for (uint32_t at = 0, n; at < w->own; at += n) {
        xkv_staging *s;
        n = (uint32_t)xkv_min64(w->own - at, most);
        XKV_TRY(xkv_staging_get(r->ctx, r->device, &s));
        for (uint32_t i = 0; i < n; i++)
            xkv_panels_get(w->components, w->own_index[at + i], 1, (float *)(void *)(s->bytes + i * row));
        XKV_DEVICE(r, copy(r->device->plug, there, s->bytes, n * row, r->stream));
        XKV_TRY(xkv_staging_put(r->ctx, r->device, s, r->stream));
        XKV_TRY(split_rows(w, there, NULL, at, n, w->step));
    }
    return XKV_OK;
}

/* Leading parts of the stage's components first .. of those that are coded, times the step. */
static xkv_status send_mix(xkv_device_work *w, uint32_t first, uint32_t count, void *to)
{
    const xkv_cross *cross = &w->r->cross.cross;
    const xkv_transform *t = &w->reader.transform;
    float *mix = NULL, *row;
    uint32_t coded = 0;
    xkv_status status;

    XKV_TRY(XKV_NEW(w->r->ctx, (size_t)count * t->top, &mix));
    row = mix;
    for (size_t i = 0; i < cross->rank; i++) {
        if (cross->tables[i] == 0)
            continue;
        if (coded >= first && coded < first + count)
            for (size_t j = 0; j < t->top; j++)
                *row++ = cross->basis->components[i * cross->basis->width + t->cross_at + j] * cross->step;
        coded++;
    }
    status = xkv_device_upload(w->r->ctx, w->r->device, mix, 4ull * count * t->top, to, w->r->stream);
    xkv_release(w->r->ctx, mix);
    return status;
}

/* What the stage's components are in the group's rows: their parts times the leading rows of its basis. The place of
 * the operands holds the parts meanwhile. */
static xkv_status mix_components(xkv_device_work *w)
{
    xkv_device_reading *r = w->r;
    uint32_t coded = r->cross.cross.coded, top = w->reader.transform.top, at = 0;
    float *rows = xkv_device_place(w, r->at.rows), *parts = xkv_device_place(w, r->at.operands);

    for (uint32_t first = 0; first < coded; first += r->at.tile_tokens) {
        uint32_t count = (uint32_t)xkv_min64(coded - first, r->at.tile_tokens), end = at;
        xkv_plug_gemm o = {parts,       w->basis->rows, rows, count, w->g->width, top, top,
                           w->g->width, w->g->width,    1,    0,     0,           1};
        while (end < w->cross && w->cross_rows[end] >> 2 < first + count)
            end++;
        XKV_TRY(send_mix(w, first, count, parts));
        XKV_DEVICE(r, gemm(r->device->plug, &o, r->stream));
        XKV_TRY(split_rows(w, rows, (const uint32_t *)xkv_device_constant(w, w->cross_index_at) + at, w->own + at,
                           end - at, 1));
        at = end;
    }
    return XKV_OK;
}

xkv_status xkv_device_make_components(xkv_device_work *w)
{
    if (w->components)
        XKV_TRY(send_components(w));
    else
        XKV_TRY(split_rows(w, w->basis->rows, xkv_device_constant(w, w->own_index_at), 0, w->own, w->step));
    return w->crossed ? mix_components(w) : XKV_OK;
}
