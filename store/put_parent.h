/* put_parent.h - the stored entry that a new one extends: finding it, and packing what follows (spec/store.md,
 * section 11). */
#ifndef XKV_PUT_PARENT_H
#define XKV_PUT_PARENT_H

#include "store_internal.h"

/* Zero: there is none. */
typedef struct xkv_parent {
    xkv_hit *hit; /* keeps it from eviction; the parent may be one that the hit's entry extends */
    const xkv_item *item;
    const xkv_entry *entry; /* the opened parent */
    xkv_blob_link link;
    uint8_t *fram; /* what link.fram points to, owned */
    bool gone;     /* it was removed before the new entry was committed */
} xkv_parent;

/* Look for an entry that the one of `item` (space, key, tokens) can extend, with what the pack options (NULL: defaults)
 * ask for. None is no error, nor is one that cannot be read. */
XKV_MUST_CHECK xkv_status xkv_parent_find(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const xkv_item *item,
                                          const uint32_t *symbols, const xkv_geometry *geometry,
                                          const xkv_pack_options *pack, xkv_parent *parent);
/* Extend the hit's entry, or the nearest of those it extends that has some of the first `base` tokens itself: takes
 * over the hit. CORRUPT [SE2], LIMIT [SE3]: it cannot be. */
XKV_MUST_CHECK xkv_status xkv_parent_take(xkv_ctx *ctx, xkv_hit *hit, uint32_t base, xkv_parent *parent);
/* Keep the framing of the whole file `source` in the link. */
XKV_MUST_CHECK xkv_status xkv_parent_set_framing(xkv_ctx *ctx, xkv_parent *parent, const xkv_geometry *geometry,
                                                 const xkv_framing *framing, const void *source, uint64_t source_size);
/* xkv_pack() of the rows that follow. */
XKV_MUST_CHECK xkv_status xkv_parent_pack_rest(xkv_ctx *ctx, const xkv_parent *parent, const xkv_geometry *geometry,
                                               const xkv_view *views, const xkv_pack_options *pack,
                                               const xkv_output *output, xkv_pack_report *report);
void xkv_parent_leave(xkv_ctx *ctx, xkv_parent *parent);

#endif
