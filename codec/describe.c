/* describe.c - what entries and dictionaries are made of, for those that look at them: parts, components, values. */
#include "chunks.h"
#include "dict.h"
#include "parts.h"

#include <math.h>

/* --- Groups and values of both ------------------------------------------------------------------------------------ */

static void describe_group(const xkv_container *c, uint32_t group, xkv_group_info *info)
{
    const xkv_group *g = &c->groups[group];

    *info = (xkv_group_info){.codec = g->codec,
                             .reason = g->reason,
                             .plane_count = g->plane_count,
                             .planes = g->planes,
                             .errors = g->plane_errors,
                             .rank = g->rank,
                             .width = g->width,
                             .raw_bytes = xkv_group_row_bytes(&c->geometry, g, c->geometry.token_count),
                             .energy = g->energy,
                             .error = g->error};
    for (uint32_t i = 0; i < g->part_count; i++)
        info->packed_bytes += g->parts[i].size;
}

static void describe_value(const xkv_container *c, uint32_t index, xkv_value *value)
{
    const xkv_meta_value *v = &c->values[index];

    *value = (xkv_value){.key = v->key, .type = v->type, .size = v->size, .bytes = v->bytes};
    if (v->type == XKV_VALUE_U64)
        value->u64 = xkv_load64(v->bytes);
    if (v->type == XKV_VALUE_F64)
        value->f64 = xkv_loadf64(v->bytes);
}

void xkv_entry_get_group(const xkv_entry *entry, uint32_t group, xkv_group_info *info)
{
    describe_group(&entry->c, group, info);
}

uint64_t xkv_entry_part_size(const xkv_entry *entry, uint32_t group, uint32_t part)
{
    return entry->c.groups[group].parts[part].size;
}

uint32_t xkv_entry_value_count(const xkv_entry *entry)
{
    return entry->c.value_count;
}

void xkv_entry_get_value(const xkv_entry *entry, uint32_t index, xkv_value *value)
{
    describe_value(&entry->c, index, value);
}

int xkv_entry_find_value(const xkv_entry *entry, const char *key, xkv_value *value)
{
    for (uint32_t i = 0; i < entry->c.value_count; i++)
        if (strcmp(entry->c.values[i].key, key) == 0) {
            describe_value(&entry->c, i, value);
            return 1;
        }
    return 0;
}

const xkv_geometry *xkv_dict_geometry(const xkv_dict *dict)
{
    return &dict->c.geometry;
}

void xkv_dict_get_group(const xkv_dict *dict, uint32_t group, xkv_group_info *info)
{
    describe_group(&dict->c, group, info);
    info->codec = xkv_group_is_cross(&dict->c.groups[group]) ? XKV_CODEC_CROSS : XKV_CODEC_DICT;
}

uint32_t xkv_dict_value_count(const xkv_dict *dict)
{
    return dict->c.value_count;
}

void xkv_dict_get_value(const xkv_dict *dict, uint32_t index, xkv_value *value)
{
    describe_value(&dict->c, index, value);
}

/* --- Coding ------------------------------------------------------------------------------------------------------- */

static bool has_side(const xkv_group *g)
{
    return xkv_group_is_coded(g) || xkv_group_is_cross(g);
}

xkv_status xkv_entry_read_coding(xkv_ctx *ctx, const xkv_entry *entry, uint32_t group, xkv_group_coding *coding)
{
    const xkv_group *g = &entry->c.groups[group];
    xkv_side side = {0};
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    if (has_side(g))
        XKV_TRY_GOTO(xkv_side_read(ctx, entry, g, &side), out);
    *coding = (xkv_group_coding){.step = (double)side.step, .coded = side.coded};
out:
    xkv_side_free(ctx, &side);
    return status;
}

/* Add what the integers of a chunk, q [coded][tokens], tell; of deviations the sums of squares. */
static void add_chunk(const xkv_side *side, uint32_t rank, const int16_t *q, uint32_t tokens, xkv_component *components)
{
    for (uint32_t j = 0; j < rank; j++) {
        if (side->tables[j] == 0)
            continue;
        components[j].bits += xkv_table_cost(side->tables[j], q, tokens);
        for (uint32_t t = 0; t < tokens; t++)
            components[j].deviation += (double)q[t] * q[t];
        q += tokens;
    }
}

static xkv_status add_chunks(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, const xkv_side *side,
                             uint8_t *packed, int16_t *q, xkv_component *components)
{
    const xkv_container *c = &entry->c;
    uint32_t t0, t1;

    for (uint32_t i = 0; i < c->chunk_count; i++) {
        xkv_chunk_coded(c, i, &t0, &t1);
        XKV_TRY(xkv_check_cancel(ctx));
        XKV_TRY(xkv_side_integers(ctx, entry, g, side, i, packed, q));
        add_chunk(side, g->rank, q, t1 - t0, components);
    }
    return XKV_OK;
}

static uint64_t largest_chunk(const xkv_container *c, const xkv_group *g)
{
    uint64_t size = 0;

    for (uint32_t i = 0; i < c->chunk_count; i++)
        size = xkv_max64(size, g->parts[XKV_PART_CHUNKS + i].size);
    return size;
}

/* Sums of squares of integers become deviations, in units of coefficients. */
static void finish_components(const xkv_container *c, const xkv_side *side, uint32_t rank, xkv_component *components)
{
    double tokens = c->geometry.token_count - c->sinks - c->window;

    for (uint32_t j = 0; j < rank; j++) {
        components[j].table = side->tables[j];
        if (tokens > 0)
            components[j].deviation = (double)side->step * sqrt(components[j].deviation / tokens);
    }
}

xkv_status xkv_entry_read_components(xkv_ctx *ctx, const xkv_entry *entry, uint32_t group, xkv_component *components)
{
    const xkv_container *c = &entry->c;
    const xkv_group *g = &c->groups[group];
    xkv_side side = {0};
    uint8_t *packed = NULL;
    int16_t *q = NULL;
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    if (!has_side(g))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "group %u has no quantized components", group);
    memset(components, 0, g->rank * sizeof *components);
    XKV_TRY_GOTO(xkv_side_read(ctx, entry, g, &side), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)largest_chunk(c, g), &packed), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)xkv_min64(c->chunk_tokens, c->geometry.token_count) * side.coded, &q), out);
    XKV_TRY_GOTO(add_chunks(ctx, entry, g, &side, packed, q, components), out);
    finish_components(c, &side, g->rank, components);
out:
    xkv_side_free(ctx, &side);
    xkv_release(ctx, packed);
    xkv_release(ctx, q);
    return status;
}
