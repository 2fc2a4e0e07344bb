/* device_group.c - a group that the device decodes.
 *
 *     once      constants: codes, row lists, mean, RoPE, planes; components: rows of the basis, scaled, in two halves
 *     a batch   packed chunks -> integers -> operands; cosines and sines        (the next batch is copied meanwhile)
 *     a tile    operands x components -> rows -> + mean, RoPE, rounding -> views
 *               or, of few operands, all of that of a batch in one kernel (plugin_fused.h)
 *
 * An f16 operand holds integers up to 2048 exactly. Components whose table goes beyond have two rows of operands, and a
 * rare escape beyond it sets the fault word, upon which the group is done again with f32. A component is the sum of two
 * halves, which keep 22 bits of it; the product of both with the same operands is one GEMM, twice as long. */
#include "device_work.h"

/* --- Tiles -------------------------------------------------------------------------------------------------------- */

static xkv_status decode_batch(const xkv_device_batch *b)
{
    xkv_device_reading *r = b->w->r;
    bool cross = xkv_group_is_cross(b->w->g);
    int16_t *q = xkv_device_place(b->w, cross ? r->at.cross : r->at.integers);
    xkv_plug_decode o = {.packed = b->there + b->data_at,
                         .streams = (const xkv_plug_stream *)(const void *)(b->there + b->streams_at),
                         .count = b->chunks,
                         .tables = r->device->tables,
                         .codes = xkv_device_constant(b->w, b->w->codes_at),
                         .coded = xkv_device_side_of(b->w)->coded,
                         .q = cross ? q + (b->t0 - r->cross_begin) : q,
                         .stride = cross ? r->at.cross_stride : r->at.stride,
                         .fault = xkv_device_place(b->w, r->at.fault)};

    if (o.coded > 0 && b->t1 > b->t0)
        XKV_DEVICE(r, decode(r->device->plug, &o, r->stream));
    return XKV_OK;
}

static xkv_status expand_rows(const xkv_device_batch *b, const int16_t *q, uint64_t q_stride, uint64_t rows_at,
                              uint32_t count, uint64_t at)
{
    const xkv_device_work *w = b->w;
    xkv_device_reading *r = w->r;
    uint64_t elem = w->exact ? 4 : 2;
    xkv_plug_expand o = {.q = q,
                         .q_stride = q_stride,
                         .rows = xkv_device_constant(w, rows_at),
                         .count = count,
                         .tokens = b->end - b->first,
                         .tile = (uint8_t *)xkv_device_place(w, r->at.operands) + at * r->at.stride * elem,
                         .stride = r->at.stride,
                         .copy = w->exact ? 0 : w->own + w->cross,
                         .exact = w->exact,
                         .fault = xkv_device_place(w, r->at.fault)};

    XKV_DEVICE(r, expand(r->device->plug, &o, r->stream));
    return XKV_OK;
}

static xkv_status expand_batch(const xkv_device_batch *b)
{
    const xkv_device_work *w = b->w;
    xkv_device_reading *r = w->r;

    XKV_TRY(expand_rows(b, (int16_t *)xkv_device_place(w, r->at.integers) + (b->first - b->t0), r->at.stride,
                        w->own_rows_at, w->own, 0));
    if (!w->crossed)
        return XKV_OK;
    return expand_rows(b, (int16_t *)xkv_device_place(w, r->at.cross) + (b->first - r->cross_begin), r->at.cross_stride,
                       w->cross_rows_at, w->cross, w->own);
}

static xkv_status make_angles(const xkv_device_batch *b)
{
    const xkv_device_work *w = b->w;
    xkv_device_reading *r = w->r;
    xkv_plug_angles o = {.positions = (const int32_t *)(const void *)b->there,
                         .tokens = b->end - b->first,
                         .out = xkv_device_place(w, r->at.angles),
                         .stride = w->angles};

    return xkv_device_make_angles(r->ctx, r->device, r->stream, &r->entry->c.geometry, w->g,
                                  xkv_device_constant(w, w->ropes_at), false, o);
}

/* A product of a tile, or of some heads the columns of each plane. */
static xkv_status multiply_columns(const xkv_device_work *w, const xkv_plug_gemm *whole)
{
    xkv_device_reading *r = w->r;
    xkv_plug_gemm o = *whole;
    uint32_t column = 0;

    if (r->target.heads.count == 0) {
        XKV_DEVICE(r, gemm(r->device->plug, whole, r->stream));
        return XKV_OK;
    }
    for (uint32_t i = 0; i < w->g->plane_count; i++) {
        const xkv_plane *p = &r->entry->c.geometry.planes[w->g->planes[i]];
        uint32_t at;
        xkv_plane part = xkv_plane_heads(p, r->target.heads, &at);
        o.b = (const uint8_t *)whole->b + (column + at) * (w->exact ? sizeof(float) : sizeof(uint16_t));
        o.c = whole->c + column + at;
        o.n = xkv_plane_width(&part);
        XKV_DEVICE(r, gemm(r->device->plug, &o, r->stream));
        column += xkv_plane_width(p);
    }
    return XKV_OK;
}

/* Coefficients of codec svd, as they are stored: token by token. */
static xkv_status multiply_factors(const xkv_device_batch *b, uint32_t t0, xkv_plug_gemm *o)
{
    const xkv_device_work *w = b->w;
    const uint8_t *low = (const uint8_t *)o->b + 2ull * w->own * w->g->width;

    o->a = b->there + b->data_at + 2ull * (t0 - b->t0) * w->g->rank;
    o->lda = w->g->rank;
    o->k = w->own;
    XKV_TRY(multiply_columns(w, o));
    o->b = low;
    o->beta = 1;
    return multiply_columns(w, o);
}

static xkv_status spread_tile(const xkv_device_batch *b, uint32_t t0, uint32_t tokens, float *rows)
{
    const xkv_device_work *w = b->w;
    const int16_t *q = xkv_device_place(w, w->r->at.integers);
    xkv_plug_spread o = {q + (t0 - b->t0),
                         w->r->at.stride,
                         xkv_device_constant(w, w->source_at),
                         xkv_device_constant(w, w->factor_at),
                         w->g->width,
                         tokens,
                         rows};

    XKV_DEVICE(w->r, spread(w->r->device->plug, &o, w->r->stream));
    return XKV_OK;
}

static xkv_status multiply_tile(const xkv_device_batch *b, uint32_t t0, uint32_t tokens, float *rows)
{
    const xkv_device_work *w = b->w;
    xkv_device_reading *r = w->r;
    uint64_t operands = w->own + w->cross, elem = w->exact ? 4 : 2;
    xkv_plug_gemm o = {.a = (uint8_t *)xkv_device_place(w, r->at.operands) + (t0 - b->first) * elem,
                       .b = xkv_device_place(w, r->at.components),
                       .c = rows,
                       .m = tokens,
                       .n = w->g->width,
                       .k = w->exact ? operands : 2 * operands,
                       .lda = r->at.stride,
                       .ldb = w->g->width,
                       .ldc = w->g->width,
                       .alpha = 1 / w->scale,
                       .component_major = w->integers,
                       .exact = w->exact};

    if (w->scalar)
        XKV_TRY(spread_tile(b, t0, tokens, rows));
    else if (operands == 0)
        XKV_DEVICE(r, clear(r->device->plug, rows, 4ull * tokens * w->g->width, r->stream));
    else if (w->integers)
        XKV_TRY(multiply_columns(w, &o));
    else
        XKV_TRY(multiply_factors(b, t0, &o));
    return XKV_OK;
}

/* Storing tokens from t0 on, whose rows are still to be named. */
static xkv_plug_store store_of(const xkv_device_batch *b, uint32_t t0, uint32_t tokens)
{
    const xkv_device_work *w = b->w;
    const xkv_device_reading *r = w->r;

    return (xkv_plug_store){.mean = w->reader.transform.mean ? xkv_device_constant(w, w->mean_at) : NULL,
                            .angles =
                                (float *)xkv_device_place(w, r->at.angles) + (uint64_t)(t0 - b->first) * w->angles,
                            .angles_stride = w->angles,
                            .planes = xkv_device_constant(w, w->planes_at),
                            .plane_count = w->g->plane_count,
                            .tokens = tokens,
                            .first = t0 - r->target.first};
}

static xkv_status store_tile(const xkv_device_batch *b, uint32_t t0, uint32_t tokens, const float *rows)
{
    xkv_device_reading *r = b->w->r;
    xkv_plug_store o = store_of(b, t0, tokens);

    o.rows = rows;
    o.ld = b->w->g->width;
    XKV_DEVICE(r, store(r->device->plug, &o, r->stream));
    return XKV_OK;
}

/* All tokens of a batch at once: nothing of them is in memory between integers and views. */
static xkv_status fuse_batch(const xkv_device_batch *b)
{
    const xkv_device_work *w = b->w;
    xkv_device_reading *r = w->r;
    const uint16_t *components = xkv_device_place(w, r->at.components);
    xkv_plug_fused o = {.q = {(int16_t *)xkv_device_place(w, r->at.integers) + (b->first - b->t0)},
                        .q_stride = {r->at.stride, r->at.cross_stride},
                        .rows = {xkv_device_constant(w, w->own_rows_at), xkv_device_constant(w, w->cross_rows_at)},
                        .count = {w->own, w->cross},
                        .high = components,
                        .low = components + (uint64_t)(w->own + w->cross) * w->g->width,
                        .width = w->g->width,
                        .alpha = 1 / w->scale,
                        .fault = xkv_device_place(w, r->at.fault),
                        .store = store_of(b, b->first, b->end - b->first)};

    if (w->cross > 0)
        o.q[1] = (int16_t *)xkv_device_place(w, r->at.cross) + (b->first - r->cross_begin);
    for (uint32_t i = 0; i < w->g->plane_count; i++) {
        uint32_t first;
        const xkv_plane *p = &r->entry->c.geometry.planes[w->g->planes[i]];
        o.dim = p->head_dim > o.dim ? p->head_dim : o.dim;
        o.heads += xkv_plane_heads(p, r->target.heads, &first).heads;
    }
    XKV_DEVICE(r, fused(r->device->plug, &o, r->stream));
    return XKV_OK;
}

static xkv_status make_rows(const xkv_device_batch *b)
{
    float *rows = xkv_device_place(b->w, b->w->r->at.rows);

    if (b->first == b->end)
        return XKV_OK;
    XKV_TRY(make_angles(b));
    if (b->w->fused)
        return fuse_batch(b);
    if (b->w->integers && !b->w->scalar)
        XKV_TRY(expand_batch(b));
    for (uint32_t t0 = b->first, n; t0 < b->end; t0 += n) {
        n = (uint32_t)xkv_min64(b->end - t0, b->w->r->at.tile_tokens);
        XKV_TRY(multiply_tile(b, t0, n, rows));
        XKV_TRY(store_tile(b, t0, n, rows));
    }
    return XKV_OK;
}

/* --- Lossless rows ------------------------------------------------------------------------------------------------ */

static xkv_status move_rows(const xkv_device_batch *b, const uint8_t *matrix, uint32_t t0, uint32_t t1)
{
    const xkv_device_work *w = b->w;
    xkv_device_reading *r = w->r;
    const xkv_geometry *geometry = &r->entry->c.geometry;
    uint64_t row = xkv_group_row_bytes(geometry, w->g, 1), column = 0;
    uint32_t first = (uint32_t)xkv_max64(t0, b->first), end = (uint32_t)xkv_min64(t1, b->end);

    for (uint32_t i = 0; i < w->g->plane_count && first < end; i++) {
        const xkv_plane *p = &geometry->planes[w->g->planes[i]];
        uint32_t at;
        xkv_plane part = xkv_plane_heads(p, r->target.heads, &at);
        xkv_plug_move o = {.rows = matrix + (first - t0) * row,
                           .row_bytes = row,
                           .column = column + at * xkv_dtype_size(p->dtype),
                           .view = r->views[w->g->planes[i]],
                           .heads = part.heads,
                           .head_dim = p->head_dim,
                           .tokens = end - first,
                           .first = first - r->target.first};
        XKV_DEVICE(r, move(r->device->plug, &o, r->stream));
        column += xkv_plane_width(p) * xkv_dtype_size(p->dtype);
    }
    return XKV_OK;
}

/* Chunk by chunk: byte planes are joined in the place of the tile's rows. */
static xkv_status move_chunks(const xkv_device_batch *b)
{
    const xkv_device_work *w = b->w;
    xkv_device_reading *r = w->r;
    const uint8_t *at = b->there + b->data_at;
    uint8_t *joined = xkv_device_place(w, r->at.rows);

    for (uint32_t i = 0; i < b->chunks; i++) {
        uint32_t t0, t1;
        xkv_device_tokens_of(w, b->chunk + i, &t0, &t1);
        xkv_plug_join o = {at, t1 - t0, w->g->width, xkv_group_element_size(&r->entry->c.geometry, w->g), joined};
        bool planes = w->g->parts[XKV_PART_CHUNKS + b->chunk + i].method == XKV_METHOD_ZSTD;
        if (planes)
            XKV_DEVICE(r, join(r->device->plug, &o, r->stream));
        XKV_TRY(move_rows(b, planes ? joined : at, t0, t1));
        at += xkv_device_chunk_bytes(w, b->chunk + i);
    }
    return XKV_OK;
}

/* --- The group ---------------------------------------------------------------------------------------------------- */

static xkv_status run_batch(xkv_device_batch *b)
{
    XKV_TRY(xkv_device_send_batch(b));
    if (b->w->integers)
        XKV_TRY(decode_batch(b));
    if (b->w->lossless)
        XKV_TRY(move_chunks(b));
    else if (!xkv_group_is_cross(b->w->g))
        XKV_TRY(make_rows(b));
    return xkv_device_release_slot(b);
}

static xkv_status run_batches(xkv_device_work *w)
{
    xkv_device_reading *r = w->r;
    xkv_device_batch b = {.w = w, .chunk = r->first_chunk};

    while (b.chunk < r->first_chunk + r->chunks) {
        xkv_device_plan_batch(&b);
        XKV_TRY(run_batch(&b));
        b.chunk += b.chunks;
    }
    return XKV_OK;
}

static xkv_status run_group(xkv_device_work *w)
{
    xkv_device_reading *r = w->r;
    uint32_t threads = xkv_pool_threads(r->pool);

    XKV_DEVICE(r, clear(r->device->plug, xkv_device_place(w, r->at.fault), sizeof(uint32_t), r->stream));
    XKV_TRY(xkv_device_send_constants(w));
    if (w->own + w->cross > 0)
        XKV_TRY(xkv_device_make_components(w));
    for (uint32_t i = 0; !w->integers && i < threads; i++)
        XKV_TRY(xkv_chunk_scratch_size(&w->reader, false, &r->scratch[i]));
    XKV_TRY(run_batches(w));
    return xkv_group_is_cross(w->g) || w->lossless ? XKV_OK : xkv_device_exact_rows(r, &w->reader);
}

xkv_status xkv_device_group(xkv_device_reading *r, const xkv_group *g, uint32_t which, bool exact)
{
    xkv_device_work w;
    xkv_status status;

    XKV_TRY_GOTO(xkv_device_work_open(r, g, exact, &w), out);
    XKV_TRY_GOTO(run_group(&w), out);
    XKV_TRY_GOTO(xkv_device_result(r->ctx, r->device,
                                   r->api->copy(r->device->plug, (uint32_t *)r->device->results + which,
                                                xkv_device_place(&w, r->at.fault), sizeof(uint32_t), r->stream)),
                 out);
    XKV_TRY_GOTO(
        xkv_device_result(r->ctx, r->device, r->api->record(r->device->plug, r->device->ready[which], r->stream)), out);
out:
    xkv_device_work_close(&w);
    return status;
}
