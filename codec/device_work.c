/* device_work.c - opening a group: lists of its operands' rows, their scale, and what goes to the device once. */
#include "device_work.h"

#include <math.h>

/* --- Lists of rows ------------------------------------------------------------------------------------------------ */

/* Row lists of `coded` components with these tables; component i is row index[i] of its basis. */
static uint32_t list_rows(const uint8_t *tables, uint32_t count, bool dense, uint32_t modulus, uint32_t *rows,
                          uint32_t *index)
{
    uint32_t n = 0, coded = 0;

    for (uint32_t i = 0; i < count; i++) {
        if (tables[i] == 0)
            continue;
        uint32_t parts = xkv_device_parts_of(tables[i]), from = dense ? coded % modulus : i;
        for (uint32_t part = 0; part < parts; part++, n++) {
            rows[n] = coded << 2 | (parts == 1 ? XKV_OPERAND_WHOLE : XKV_OPERAND_HIGH + part);
            index[n] = from;
        }
        coded++;
    }
    return n;
}

static xkv_status list_own(xkv_device_work *w)
{
    const xkv_group *g = w->g;
    xkv_ctx *ctx = w->r->ctx;

    XKV_TRY(XKV_NEW(ctx, 2ull * g->rank, &w->own_rows));
    XKV_TRY(XKV_NEW(ctx, 2ull * g->rank, &w->own_index));
    if (w->integers) {
        w->own = list_rows(w->reader.side.tables, g->rank, false, 1, w->own_rows, w->own_index);
        return XKV_OK;
    }
    w->own = g->rank;
    for (uint32_t i = 0; i < g->rank; i++) {
        w->own_rows[i] = i << 2;
        w->own_index[i] = i;
    }
    return XKV_OK;
}

/* Which integers make each element of a scalar group's row, and times what. */
static xkv_status list_elements(xkv_device_work *w)
{
    const xkv_side *side = &w->reader.side;
    uint32_t coded = 0;

    XKV_TRY(XKV_NEW(w->r->ctx, w->g->width, &w->source));
    XKV_TRY(XKV_NEW(w->r->ctx, w->g->width, &w->factor));
    for (uint32_t i = 0; i < w->g->width; i++) {
        w->source[i] = side->tables[i] != 0 ? coded++ : XKV_NO_SOURCE;
        w->factor[i] = side->step * w->reader.transform.diagonal[i];
    }
    return XKV_OK;
}

static xkv_status list_cross(xkv_device_work *w)
{
    const xkv_side *side = &w->r->cross.side;
    xkv_ctx *ctx = w->r->ctx;

    XKV_TRY(XKV_NEW(ctx, 2ull * side->coded, &w->cross_rows));
    XKV_TRY(XKV_NEW(ctx, 2ull * side->coded, &w->cross_index));
    w->cross = list_rows(side->coded_tables, side->coded, true, w->r->at.tile_tokens, w->cross_rows, w->cross_index);
    return XKV_OK;
}

/* --- Scale -------------------------------------------------------------------------------------------------------- */

/* Elements of the stage's rows in this group: by Cauchy and Schwarz at most |p| times the norm of a column. */
static float largest_crossed(const xkv_device_work *w)
{
    const xkv_cross *cross = &w->r->cross.cross;
    const xkv_transform *t = &w->reader.transform;
    double most = 0;

    for (size_t i = 0; i < cross->rank; i++) {
        const float *p = cross->basis->components + i * cross->basis->width + t->cross_at;
        double sum = 0;
        for (size_t j = 0; cross->tables[i] != 0 && j < t->top; j++)
            sum += (double)p[j] * (double)p[j];
        most = fmax(most, sum);
    }
    return (float)(sqrt(most) * (double)w->basis->top_norm) * cross->step;
}

static xkv_status find_scale(xkv_device_work *w)
{
    float most = 0, *row = NULL;

    XKV_TRY(XKV_NEW(w->r->ctx, w->g->width, &row));
    for (uint32_t i = 0; i < w->own; i++) {
        if (w->components)
            xkv_panels_get(w->components, w->own_index[i], 1, row);
        most = fmaxf(most, w->components ? xkv_largest(row, w->g->width) : w->basis->largest[w->own_index[i]]);
    }
    xkv_release(w->r->ctx, row);
    most *= w->step;
    if (w->crossed)
        most = fmaxf(most, largest_crossed(w));
    w->scale = xkv_operand_scale(most);
    return XKV_OK;
}

/* --- Fusing ------------------------------------------------------------------------------------------------------- */

/* Where a plain tile product is likely to beat a GEMM that leaves its rows in memory, for another kernel to read them
 * again: with few operands. A guess until gpu_bench has measured both. */
#define FUSED_OPERANDS 256u

static bool can_fuse(const xkv_device_work *w)
{
    for (uint32_t i = 0; i < w->g->plane_count; i++) {
        uint32_t dim = w->r->entry->c.geometry.planes[w->g->planes[i]].head_dim;
        if (dim % xkv_dtype_block(w->r->views[w->g->planes[i]].dtype) != 0)
            return false;
        if (dim > XKV_FUSED_DIM || dim % XKV_FUSED_STEP != 0)
            return false;
    }
    return w->integers && !w->exact && w->own + w->cross > 0 && w->own + w->cross <= FUSED_OPERANDS;
}

/* --- Opening ------------------------------------------------------------------------------------------------------ */

static void find_components(xkv_device_work *w)
{
    w->step = w->integers ? w->reader.side.step : 1;
    if (w->g->codec == XKV_GROUP_SVD || w->g->codec == XKV_GROUP_SVDQ)
        w->components = w->reader.transform.basis;
    else
        w->basis = xkv_device_basis_find(w->r->dict, xkv_dict_basis(w->r->entry->dict, &w->r->entry->c.geometry, w->g));
}

xkv_status xkv_device_work_open(xkv_device_reading *r, const xkv_group *g, bool exact, xkv_device_work *w)
{
    *w = (xkv_device_work){.r = r, .g = g, .exact = exact, .integers = xkv_group_is_coded(g) || xkv_group_is_cross(g)};
    w->scalar = g->codec == XKV_GROUP_SCALAR;
    w->lossless = g->codec == XKV_GROUP_LOSSLESS;
    w->angles = xkv_device_count_angles(&r->entry->c.geometry, g);
    if (xkv_group_is_cross(g)) /* only its integers are decoded, for which the call has read the side part */
        return XKV_OK;
    XKV_TRY(xkv_group_reader_open(r->ctx, r->entry, g, &r->cross, &w->reader));
    if (w->lossless)
        return XKV_OK;
    if (w->scalar)
        return list_elements(w);
    w->crossed = xkv_device_is_crossed(r, g, w->reader.transform.top);
    find_components(w);
    XKV_TRY(list_own(w));
    if (w->crossed)
        XKV_TRY(list_cross(w));
    XKV_TRY(find_scale(w));
    w->fused = can_fuse(w);
    return XKV_OK;
}

void xkv_device_work_close(xkv_device_work *w)
{
    xkv_ctx *ctx = w->r->ctx;

    xkv_release(ctx, w->own_rows);
    xkv_release(ctx, w->own_index);
    xkv_release(ctx, w->cross_rows);
    xkv_release(ctx, w->cross_index);
    xkv_release(ctx, w->source);
    xkv_release(ctx, w->factor);
    if (w->reader.ctx)
        xkv_group_reader_close(&w->reader);
}

/* The side part that tells how the integers at hand are coded. */
const xkv_side *xkv_device_side_of(const xkv_device_work *w)
{
    return xkv_group_is_cross(w->g) ? &w->r->cross.side : &w->reader.side;
}

/* --- Constants ---------------------------------------------------------------------------------------------------- */

/* Append to a staging buffer; where it will be in the constants. */
static uint64_t append(uint8_t *bytes, uint64_t *used, const void *from, uint64_t size)
{
    uint64_t at = xkv_align64(*used, XKV_CONSTANT_ALIGN);

    if (size > 0)
        memcpy(bytes + at, from, (size_t)size);
    *used = at + size;
    return at;
}

static void append_codes(xkv_device_work *w, uint8_t *bytes, uint64_t *used)
{
    const xkv_side *side = xkv_device_side_of(w);

    w->codes_at = xkv_align64(*used, XKV_CONSTANT_ALIGN);
    *used = w->codes_at;
    for (uint32_t i = 0; w->integers && i < side->coded; i++) {
        xkv_warp_code code = xkv_device_code(side->coded_tables[i]);
        memcpy(bytes + *used, &code, sizeof code);
        *used += sizeof code;
    }
}

static void append_planes(xkv_device_work *w, uint8_t *bytes, uint64_t *used)
{
    const xkv_geometry *geometry = &w->r->entry->c.geometry;

    w->ropes_at = xkv_align64(*used, XKV_CONSTANT_ALIGN);
    w->planes_at =
        xkv_align64(w->ropes_at + xkv_device_list_ropes(geometry, w->g, bytes + w->ropes_at), XKV_CONSTANT_ALIGN);
    xkv_device_list_planes(geometry, w->g, w->r->views, w->r->target.heads,
                           (xkv_plug_plane *)(void *)(bytes + w->planes_at));
    *used = w->planes_at + w->g->plane_count * sizeof(xkv_plug_plane);
}

xkv_status xkv_device_send_constants(xkv_device_work *w)
{
    xkv_device_reading *r = w->r;
    xkv_staging *s;
    uint64_t used = 0;

    XKV_TRY(xkv_staging_get(r->ctx, r->device, &s));
    append_codes(w, s->bytes, &used);
    w->own_rows_at = append(s->bytes, &used, w->own_rows, 4ull * w->own);
    w->own_index_at = append(s->bytes, &used, w->own_index, 4ull * w->own);
    w->cross_rows_at = append(s->bytes, &used, w->cross_rows, 4ull * w->cross);
    w->cross_index_at = append(s->bytes, &used, w->cross_index, 4ull * w->cross);
    if (w->scalar) {
        w->source_at = append(s->bytes, &used, w->source, 4ull * w->g->width);
        w->factor_at = append(s->bytes, &used, w->factor, 4ull * w->g->width);
    }
    if (w->reader.transform.mean)
        w->mean_at = append(s->bytes, &used, w->reader.transform.mean, 4ull * w->g->width);
    if (!xkv_group_is_cross(w->g))
        append_planes(w, s->bytes, &used);
    if (used > 0)
        XKV_DEVICE(r, copy(r->device->plug, xkv_device_constant(w, 0), s->bytes, used, r->stream));
    return xkv_staging_put(r->ctx, r->device, s, r->stream);
}
