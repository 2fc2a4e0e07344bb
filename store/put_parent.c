/* put_parent.c - the stored entry that a new one extends. */
#include "put_parent.h"

#include "entry_internal.h"

#include <xxhash.h>

/* --- Which one, and from where on --------------------------------------------------------------------------------- */

/* What is asked for can be had of the new rows alone, whatever the others cost: no ratio and no ranks over all. */
static bool rows_stand_alone(const xkv_pack_options *o)
{
    return o->profile != XKV_PROFILE_SVD && o->half_factors == 0 && !(o->ratio > 0) && !(o->energy > 0) &&
           o->rank_k == 0 && o->rank_v == 0;
}

/* Whether the groups that are coded have the step of the quality. */
static bool has_step(xkv_ctx *ctx, const xkv_entry *entry, double step)
{
    for (uint32_t i = 0; i < entry->c.group_count; i++) {
        xkv_group_coding coding;
        if (entry->c.groups[i].codec == XKV_GROUP_LOSSLESS)
            continue;
        if (xkv_entry_read_coding(ctx, entry, i, &coding) != XKV_OK || coding.step != (double)(float)step)
            return false;
    }
    return true;
}

/* Whether the rows that the entry itself holds are as good as what the options ask for. */
static bool is_good_enough(xkv_ctx *ctx, const xkv_entry *entry, const xkv_pack_options *o)
{
    const uint8_t *id = xkv_entry_dictionary_id(entry);
    xkv_value error;
    xkv_dict_info info;
    if (xkv_entry_own_lossless(entry))
        return true;
    if (o->dict == NULL || o->profile == XKV_PROFILE_LOSSLESS || o->profile == XKV_PROFILE_SCALAR || id == NULL)
        return false;
    xkv_dict_get_info(o->dict, &info);
    if (memcmp(id, info.id, 16) != 0)
        return false;
    if (o->error > 0)
        return xkv_entry_find_value(entry, "error.metric", &error) && error.type == XKV_VALUE_F64 &&
               error.f64 <= o->error;
    return has_step(ctx, entry, xkv_dict_step(o->dict, o->quality > 0 ? o->quality : 50));
}

/* All rows that would be taken over. */
static bool fits(xkv_ctx *ctx, const xkv_entry *entry, const xkv_geometry *geometry, uint32_t base,
                 const xkv_pack_options *o)
{
    if (!xkv_geometry_begins_alike(&entry->geometry, geometry, base))
        return false;
    while (entry != NULL && is_good_enough(ctx, entry, o))
        entry = entry->parent;
    return entry == NULL;
}

static uint32_t line_length(const xkv_hit *hit, uint32_t i)
{
    uint32_t count = 0;
    while (xkv_hit_item(hit, i + count) != NULL)
        count++;
    return count;
}

/* The last chunk boundary among the first `most` tokens, in an entry that holds whole chunks there; 0: none. */
static uint32_t last_boundary(const xkv_entry *entry, uint32_t most)
{
    for (; entry != NULL; entry = entry->parent) {
        if (most > entry->base) {
            uint32_t own = most - entry->base;
            return entry->base + own - own % entry->c.chunk_tokens;
        }
    }
    return 0;
}

/* Nothing of itself is taken over by the very prompt. */
static bool has_key(const xkv_hit *hit, const uint8_t key[32])
{
    for (uint32_t i = 0; xkv_hit_item(hit, i) != NULL; i++) {
        if (memcmp(xkv_hit_item(hit, i)->key, key, 32) == 0)
            return true;
    }
    return false;
}

/* The entry that holds the row before `base` becomes the parent; `entry` is that of the hit. False: its line is too
 * long. */
static bool set_parent(xkv_parent *p, const xkv_entry *entry, uint32_t base)
{
    uint32_t i = 0;
    for (p->entry = entry; p->entry->base >= base; p->entry = p->entry->parent)
        i++;
    p->item = xkv_hit_item(p->hit, i);
    p->link.parent = p->item->id;
    p->link.base = base;
    memcpy(p->link.blob, p->item->blob, 32);
    return line_length(p->hit, i) < XKV_LINE_MAX;
}

/* Tokens that may be taken over: those that must be exact at the end, and the last one, are the new entry's own. */
static uint32_t most_tokens(const xkv_item *item, uint32_t common, const xkv_geometry *geometry,
                            const xkv_pack_options *o)
{
    uint32_t before_window = geometry->token_count - (uint32_t)xkv_min64(o->window, geometry->token_count);
    return (uint32_t)xkv_min64(xkv_min64(common, before_window), item->tokens - 1);
}

/* Whether the hit has a parent for the entry of `item`, which begins with `common` tokens of it. */
static bool choose(xkv_ctx *ctx, xkv_parent *p, const xkv_item *item, uint32_t common, const xkv_geometry *geometry,
                   const xkv_pack_options *o)
{
    const xkv_entry *entry = NULL;
    if (has_key(p->hit, item->key) || xkv_hit_examine(ctx, p->hit, &entry) != XKV_OK)
        return false;
    uint32_t base = last_boundary(entry, most_tokens(item, common, geometry, o));
    return base > 0 && base >= o->sinks && set_parent(p, entry, base) && 2 * (uint64_t)base >= p->item->tokens &&
           fits(ctx, p->entry, geometry, base, o);
}

xkv_status xkv_parent_find(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const xkv_item *item,
                           const uint32_t *symbols, const xkv_geometry *geometry, const xkv_pack_options *pack,
                           xkv_parent *parent)
{
    xkv_pack_options o = xkv_pack_options_default();
    uint32_t common = 0;
    XKV_TRY(xkv_copy_options(ctx, pack, &o, sizeof o));
    if (!rows_stand_alone(&o))
        return XKV_OK;
    XKV_TRY(xkv_store_nearest(ctx, store, ns, symbols, item->symbols, &common, &parent->hit));
    if (parent->hit != NULL && !choose(ctx, parent, item, common, geometry, &o))
        xkv_parent_leave(ctx, parent);
    xkv_ctx_begin(ctx); /* whatever was wrong with it is no error of the put */
    return XKV_OK;
}

xkv_status xkv_parent_take(xkv_ctx *ctx, xkv_hit *hit, uint32_t base, xkv_parent *parent)
{
    const xkv_entry *entry = NULL;
    parent->hit = hit;
    if (base == 0 || base > xkv_hit_item(hit, 0)->tokens)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: it takes %u of %u tokens from another [SE2]", base,
                        xkv_hit_item(hit, 0)->tokens);
    XKV_TRY(xkv_hit_entry(ctx, hit, &entry));
    return set_parent(parent, entry, base)
               ? XKV_OK
               : xkv_fail(ctx, XKV_ERROR_LIMIT, "more than %d entries would extend each other [SE3]", XKV_LINE_MAX);
}

/* --- What follows ------------------------------------------------------------------------------------------------- */

xkv_status xkv_parent_set_framing(xkv_ctx *ctx, xkv_parent *parent, const xkv_geometry *geometry,
                                  const xkv_framing *framing, const void *source, uint64_t source_size)
{
    XXH128_canonical_t hash;
    size_t size = 0;
    if (source == NULL || source_size != framing->source_size)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a framing needs the engine's file it was made from");
    XXH128_canonicalFromHash(&hash, XXH3_128bits(source, (size_t)source_size));
    XKV_TRY(xkv_framing_encode(ctx, geometry, framing, hash.digest, 4, &parent->fram, &size));
    if (size > UINT32_MAX)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "a framing of %zu bytes", size);
    parent->link.fram = parent->fram;
    parent->link.fram_size = (uint32_t)size;
    return XKV_OK;
}

xkv_status xkv_parent_pack_rest(xkv_ctx *ctx, const xkv_parent *parent, const xkv_geometry *geometry,
                                const xkv_view *views, const xkv_pack_options *pack, const xkv_output *output,
                                xkv_pack_report *report)
{
    xkv_pack_options o = xkv_pack_options_default();
    xkv_geometry rest = *geometry;
    xkv_view *shifted = NULL;
    XKV_TRY(xkv_copy_options(ctx, pack, &o, sizeof o));
    o.sinks = 0; /* the parent has them */
    rest.token_count -= parent->link.base;
    rest.positions += parent->link.base;
    rest.token_id_count = 0; /* the blob has them all */
    XKV_TRY(XKV_NEW(ctx, geometry->plane_count, &shifted));
    xkv_views_from(views, geometry->plane_count, parent->link.base, shifted);
    xkv_status status = xkv_pack(ctx, &rest, shifted, NULL, NULL, 0, &o, output, report);
    xkv_release(ctx, shifted);
    return status;
}

void xkv_parent_leave(xkv_ctx *ctx, xkv_parent *parent)
{
    xkv_hit_close(ctx, parent->hit);
    xkv_release(ctx, parent->fram);
    *parent = (xkv_parent){0};
}
