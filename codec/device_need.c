/* device_need.c - which groups the device takes, and what workspace they need. */
#include "device_work.h"

#define WHOLE_SPAN 2048u /* integers up to this are exact in f16 */

uint32_t xkv_device_parts_of(uint8_t table)
{
    return xkv_table_span(table) > WHOLE_SPAN ? 2 : 1;
}

static uint64_t count_operands(const xkv_side *side)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < side->coded; i++)
        sum += xkv_device_parts_of(side->coded_tables[i]);
    return sum;
}

static uint32_t angles_of(const xkv_device_reading *r, const xkv_group *g)
{
    return xkv_device_count_angles(&r->entry->c.geometry, g);
}

/* `lists`: rows of operands, or elements of a scalar group's row; two words each. */
static uint64_t constant_bytes(const xkv_group *g, uint64_t coded, uint64_t lists, uint64_t angles)
{
    return 4 * coded + 8 * lists + 4ull * g->width + angles / 2 * sizeof(double) +
           g->plane_count * (sizeof(xkv_plug_plane) + XKV_CONSTANT_ALIGN) + 11 * XKV_CONSTANT_ALIGN;
}

/* The most that a chunk brings to the staging buffer, with what alignment adds. */
static uint64_t chunk_bound(const xkv_device_reading *r, const xkv_group *g)
{
    const xkv_container *c = &r->entry->c;
    uint64_t tokens = xkv_min64(c->chunk_tokens, c->geometry.token_count), most = 0;

    if (g->codec == XKV_GROUP_LOSSLESS)
        most = xkv_group_row_bytes(&c->geometry, g, tokens);
    else if (g->codec == XKV_GROUP_SVD)
        most = tokens * g->rank * 2;
    else
        for (uint32_t i = 0; i < c->chunk_count; i++)
            most = xkv_max64(most, g->parts[XKV_PART_CHUNKS + i].size);
    return most + 4 * tokens + sizeof(xkv_plug_stream) + 4 * XKV_CONSTANT_ALIGN;
}

/* Lossless rows go as they are, or not at all: neither converted nor turned to other positions. */
static bool moves_as_it_is(const xkv_device_reading *r, const xkv_group *g)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &r->entry->c.geometry.planes[g->planes[i]];
        if (xkv_dtype_block(p->dtype) > 1 || (r->views && r->views[g->planes[i]].dtype != p->dtype) ||
            (r->target.moves.distances && p->rope != XKV_NO_ROPE))
            return false;
    }
    return true;
}

bool xkv_device_takes(const xkv_device_reading *r, const xkv_group *g)
{
    uint64_t room = r->device->staging_bytes;

    if (g->codec == XKV_GROUP_LOSSLESS && !moves_as_it_is(r, g))
        return false;
    if (g->codec == XKV_GROUP_DICT && r->cross.g && !xkv_device_takes(r, r->cross.g))
        return false;
    return chunk_bound(r, g) <= room && 4ull * g->width <= room &&
           constant_bytes(g, g->rank, 2ull * g->rank + 2 * r->need.cross, angles_of(r, g)) <= room;
}

static void add_need(xkv_device_need *need, const xkv_group *g, uint64_t coded, uint64_t operands, uint64_t angles)
{
    uint64_t lists = g->codec == XKV_GROUP_SCALAR ? g->width : operands;

    need->coded = xkv_max64(need->coded, coded);
    need->operands = xkv_max64(need->operands, operands);
    need->width = xkv_max64(need->width, g->width);
    need->area = xkv_max64(need->area, operands * g->width);
    need->angles = xkv_max64(need->angles, angles);
    need->constants = xkv_max64(need->constants, constant_bytes(g, coded, lists, angles));
}

bool xkv_device_is_crossed(const xkv_device_reading *r, const xkv_group *g, uint32_t top)
{
    return r->cross.g && g->codec == XKV_GROUP_DICT && top > 0 && r->cross.cross.coded > 0;
}

/* Rows of operands: the group's own, and those of the stage. */
static uint64_t operands_of(const xkv_device_reading *r, const xkv_group *g, const xkv_side *side, const xkv_basis *b)
{
    uint64_t own = g->codec == XKV_GROUP_DICT || g->codec == XKV_GROUP_SVDQ ? count_operands(side) : 0;

    return own + (b && xkv_device_is_crossed(r, g, b->top) ? count_operands(&r->cross.side) : 0);
}

xkv_status xkv_device_group_need(xkv_device_reading *r, const xkv_group *g, xkv_device_need *need)
{
    const xkv_basis *b = NULL;
    xkv_side side = {0};
    xkv_status status;

    if (g->codec == XKV_GROUP_LOSSLESS)
        need->matrix = xkv_max64(need->matrix, chunk_bound(r, g));
    if (g->codec == XKV_GROUP_LOSSLESS || g->codec == XKV_GROUP_SVD) {
        add_need(need, g, 0, g->codec == XKV_GROUP_SVD ? g->rank : 0, angles_of(r, g));
        return XKV_OK;
    }
    if (g->codec == XKV_GROUP_DICT) {
        if (!r->entry->dict)
            return xkv_dict_missing(r->ctx, r->entry);
        b = xkv_dict_basis(r->entry->dict, &r->entry->c.geometry, g);
        need->top = xkv_max64(need->top, b ? b->top : 0);
    }
    status = xkv_side_read(r->ctx, r->entry, g, &side);
    if (status == XKV_OK)
        add_need(need, g, side.coded, operands_of(r, g, &side, b), angles_of(r, g));
    xkv_side_free(r->ctx, &side);
    return status;
}
