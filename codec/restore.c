#include "entry_internal.h"

#include <xxhash.h>

/* The framing of a restore: the entry's own, or one cut to fewer tokens, which *cut_p then owns. */
static xkv_status framing_for(xkv_ctx *ctx, const xkv_entry *entry, uint32_t token_count, const xkv_framing **framing,
                              xkv_framing **cut_p)
{
    const xkv_geometry *geometry = &entry->geometry;

    if (!entry->c.has_framing)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED,
                        "the entry was packed from memory: it has no engine's file to restore");
    *framing = &entry->c.framing;
    if (token_count == 0 || token_count == geometry->token_count)
        return XKV_OK;
    XKV_TRY(xkv_framing_first(ctx, &entry->c.framing, geometry, token_count, cut_p));
    *framing = *cut_p;
    return XKV_OK;
}

xkv_status xkv_entry_restored_size(xkv_ctx *ctx, const xkv_entry *entry, uint32_t token_count, uint64_t *size)
{
    const xkv_framing *framing = NULL;
    xkv_framing *cut = NULL;

    xkv_ctx_begin(ctx);
    XKV_TRY(framing_for(ctx, entry, token_count, &framing, &cut));
    *size = framing->source_size;
    xkv_framing_free(ctx, cut);
    return XKV_OK;
}

static void copy_literals(const xkv_framing *framing, uint8_t *image)
{
    const uint8_t *literal = framing->literals;

    for (uint32_t i = 0; i < framing->segment_count; i++) {
        const xkv_segment *s = &framing->segments[i];
        if (s->plane_count == 0) {
            memcpy(image, literal, (size_t)s->size);
            literal += s->size;
        }
        image += s->size;
    }
}

static xkv_status check_source_hash(xkv_ctx *ctx, const xkv_entry *entry, const uint8_t *image, uint64_t size)
{
    XXH128_canonical_t hash;

    XXH128_canonicalFromHash(&hash, XXH3_128bits(image, (size_t)size));
    if (memcmp(hash.digest, entry->c.source_hash, 16) != 0)
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM,
                        "the restored file does not have the hash of the one that was packed [F7]");
    return XKV_OK;
}

static xkv_status fill_image(xkv_ctx *ctx, const xkv_entry *entry, const xkv_framing *framing,
                             const xkv_read_options *o, uint8_t *image)
{
    xkv_geometry geometry = entry->geometry;
    xkv_view *views = NULL;
    xkv_status status = XKV_OK;

    geometry.token_count = o->token_count;
    XKV_TRY(XKV_NEW_ZERO(ctx, geometry.plane_count, &views));
    XKV_TRY_GOTO(xkv_framing_views(ctx, framing, &geometry, image, views), out);
    copy_literals(framing, image);
    XKV_TRY_GOTO(xkv_entry_decode(ctx, entry, o, views), out);
out:
    xkv_release(ctx, views);
    return status;
}

xkv_status xkv_entry_restore(xkv_ctx *ctx, const xkv_entry *entry, uint32_t token_count, xkv_progress_fn progress,
                             void *progress_user, uint8_t *image, uint64_t image_size)
{
    xkv_read_options o = xkv_read_options_default();
    const xkv_framing *framing = NULL;
    xkv_framing *cut = NULL;
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    XKV_TRY(framing_for(ctx, entry, token_count, &framing, &cut));
    if (image_size != framing->source_size) {
        status = xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the image has %llu bytes, the restored file %llu",
                          (unsigned long long)image_size, (unsigned long long)framing->source_size);
        goto out;
    }
    o.token_count = token_count ? token_count : entry->geometry.token_count;
    o.progress = progress;
    o.progress_user = progress_user;
    for (const xkv_entry *e = entry; e; e = e->parent) /* no damaged byte goes unseen */
        XKV_TRY_GOTO(xkv_container_check_gaps(ctx, &e->input, &e->c), out);
    XKV_TRY_GOTO(fill_image(ctx, entry, framing, &o, image), out);
    if (!cut && xkv_entry_is_lossless(entry))
        XKV_TRY_GOTO(check_source_hash(ctx, entry, image, image_size), out);
out:
    xkv_framing_free(ctx, cut);
    return status;
}
