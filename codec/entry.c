#include "dict.h"
#include "entry_internal.h"
#include "parts.h"
#include "rows.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static bool needs_dict(const xkv_container *c);

xkv_status xkv_entry_open(xkv_ctx *ctx, const xkv_input *input, xkv_entry **entry_p)
{
    xkv_entry *entry = NULL;
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &entry));
    entry->input = *input;
    XKV_TRY_GOTO(xkv_container_read(ctx, input, XKV_KIND_ENTRY, &entry->c), out);
    if (needs_dict(&entry->c) && !xkv_entry_dictionary_id(entry)) {
        status =
            xkv_fail(ctx, XKV_ERROR_CORRUPT, "META: no dictionary.id of 16 bytes, but groups need a dictionary [Q5]");
        goto out;
    }
    entry->geometry = entry->c.geometry;
    *entry_p = entry;
    entry = NULL;
out:
    xkv_entry_close(ctx, entry);
    return status;
}

void xkv_entry_close(xkv_ctx *ctx, xkv_entry *entry)
{
    if (!entry)
        return;
    xkv_container_free(ctx, &entry->c);
    xkv_release(ctx, entry->positions);
    xkv_release(ctx, entry);
}

/* --- Description -------------------------------------------------------------------------------------------------- */

const xkv_geometry *xkv_entry_geometry(const xkv_entry *entry)
{
    return &entry->geometry;
}

const xkv_framing *xkv_entry_framing(const xkv_entry *entry)
{
    return entry->c.has_framing ? &entry->c.framing : NULL;
}

bool xkv_entry_own_lossless(const xkv_entry *entry)
{
    for (uint32_t i = 0; i < entry->c.group_count; i++)
        if (entry->c.groups[i].codec != XKV_GROUP_LOSSLESS && !xkv_group_is_cross(&entry->c.groups[i]))
            return false;
    return true;
}

bool xkv_entry_is_lossless(const xkv_entry *entry)
{
    while (entry && xkv_entry_own_lossless(entry))
        entry = entry->parent;
    return !entry;
}

static uint64_t section_size(const xkv_container *c, uint32_t type)
{
    for (uint32_t i = 0; i < c->section_count; i++)
        if (c->sections[i].type == type)
            return c->sections[i].size;
    return 0;
}

void xkv_entry_get_info(const xkv_entry *entry, xkv_entry_info *info)
{
    const xkv_container *c = &entry->c;

    memset(info, 0, sizeof *info);
    info->file_size = c->file_size;
    info->raw_bytes = xkv_geometry_raw_bytes(&c->geometry);
    info->raw16_bytes = xkv_raw16_bytes(&c->geometry);
    info->payload_bytes = c->payload_size;
    info->framing_bytes = section_size(c, XKV_SECTION_FRAM);
    info->token_bytes = section_size(c, XKV_SECTION_TOKN);
    memcpy(info->content_id, c->content_id, 16);
    memcpy(info->source_hash, c->source_hash, 16);
    info->write_version = c->write_version;
    info->read_version = c->read_version;
    info->sinks = c->sinks;
    info->window = c->window;
    info->chunk_tokens = c->chunk_tokens;
    info->chunk_count = c->chunk_count;
    info->group_count = c->group_count;
    info->lossless = xkv_entry_is_lossless(entry);
    info->needs_dict = needs_dict(c);
    if (info->needs_dict)
        memcpy(info->dictionary_id, xkv_entry_dictionary_id(entry), 16);
}

/* --- Dictionary ------------------------------------------------------------------------------------------------------
 */

static bool needs_dict(const xkv_container *c)
{
    for (uint32_t i = 0; i < c->group_count; i++)
        if (c->groups[i].codec == XKV_GROUP_DICT || xkv_group_is_cross(&c->groups[i]))
            return true;
    return false;
}

const uint8_t *xkv_entry_dictionary_id(const xkv_entry *entry)
{
    xkv_value v;

    return xkv_entry_find_value(entry, "dictionary.id", &v) && v.type == XKV_VALUE_BYTES && v.size == 16 ? v.bytes
                                                                                                         : NULL;
}

xkv_status xkv_dict_missing(xkv_ctx *ctx, const xkv_entry *entry)
{
    char want[33];

    xkv_hex(xkv_entry_dictionary_id(entry), 16, want);
    return xkv_fail(ctx, XKV_ERROR_MISMATCH, "the entry needs the dictionary %s [Q5]", want);
}

xkv_status xkv_entry_attach(xkv_ctx *ctx, xkv_entry *entry, const xkv_dict *dict)
{
    char want[33], have[33];

    xkv_ctx_begin(ctx);
    if (!needs_dict(&entry->c))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the entry needs no dictionary");
    xkv_hex(xkv_entry_dictionary_id(entry), 16, want);
    xkv_hex(dict->c.content_id, 16, have);
    if (memcmp(want, have, sizeof want) != 0)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "the entry needs the dictionary %s, this one is %s [Q5]", want, have);
    entry->dict = dict;
    return XKV_OK;
}

/* --- Model check -------------------------------------------------------------------------------------------------- */

static xkv_status check_widths(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_model *model)
{
    for (uint32_t i = 0; i < geometry->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[i];
        const xkv_model_layer *l = &model->layers[p->layer];
        uint32_t dim = p->kind == XKV_PLANE_V ? l->head_dim_v : l->head_dim_k;
        if (p->kind <= XKV_PLANE_V && xkv_plane_width(p) != l->kv_heads * dim)
            return xkv_fail(ctx, XKV_ERROR_MISMATCH,
                            "layer %u, %s: %u elements wide in the entry, %u x %u in the model", p->layer,
                            xkv_plane_kind_name(p->kind), xkv_plane_width(p), l->kv_heads, dim);
    }
    return XKV_OK;
}

xkv_status xkv_entry_check_model(xkv_ctx *ctx, const xkv_entry *entry, const xkv_model *model)
{
    const xkv_geometry *geometry = &entry->c.geometry;
    xkv_value v;
    char have[33], want[33];

    xkv_ctx_begin(ctx);
    if (model->has_fingerprint && xkv_entry_find_value(entry, "model.fingerprint", &v) && v.type == XKV_VALUE_BYTES &&
        v.size == 16) {
        xkv_hex(v.bytes, 16, have);
        xkv_hex(model->fingerprint, 16, want);
        if (memcmp(v.bytes, model->fingerprint, 16) != 0)
            return xkv_fail(ctx, XKV_ERROR_MISMATCH, "model.fingerprint: the entry was made by %s, the model is %s",
                            have, want);
        return XKV_OK;
    }
    if (geometry->layer_count != model->layer_count)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "the entry has %u layers, the model %u", geometry->layer_count,
                        model->layer_count);
    return check_widths(ctx, geometry, model);
}

/* --- Verify ------------------------------------------------------------------------------------------------------- */

/* An all-lossless entry gives back the very file: rebuild it in memory, whose hash the restore compares [F7]. */
static xkv_status verify_source(xkv_ctx *ctx, const xkv_entry *entry, xkv_progress_fn progress, void *progress_user)
{
    uint64_t size = entry->c.framing.source_size;
    uint8_t *image = NULL;
    xkv_status status;

    if (size > SIZE_MAX)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "the engine's file of %llu bytes does not fit into memory",
                        (unsigned long long)size);
    XKV_TRY(XKV_NEW(ctx, (size_t)size, &image));
    status = xkv_entry_restore(ctx, entry, 0, progress, progress_user, image, size);
    xkv_release(ctx, image);
    return status;
}

xkv_status xkv_entry_verify(xkv_ctx *ctx, const xkv_entry *entry, xkv_progress_fn progress, void *progress_user)
{
    xkv_read_options o = xkv_read_options_default();

    xkv_ctx_begin(ctx);
    if (entry->c.has_framing && xkv_entry_is_lossless(entry))
        return verify_source(ctx, entry, progress, progress_user);
    XKV_TRY(xkv_container_check_gaps(ctx, &entry->input, &entry->c));
    o.progress = progress;
    o.progress_user = progress_user;
    return xkv_entry_decode_own(ctx, entry, &o, NULL);
}
