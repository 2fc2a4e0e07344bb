/* entry_internal.h - the opened entry. */
#ifndef XKV_ENTRY_INTERNAL_H
#define XKV_ENTRY_INTERNAL_H

#include "container.h"
#include "xkv/codec.h"

struct xkv_entry {
    xkv_container c;
    xkv_input input;
    const xkv_dict *dict; /* NULL until attached */

    xkv_geometry geometry;   /* of all rows: those of `c`, behind the first `base` ones of `parent` */
    const xkv_entry *parent; /* NULL: c holds all rows */
    uint32_t base;
    int32_t *positions; /* those of `geometry` when there is a parent; owned */
};

/* --- Entries that extend another (extend.c) ----------------------------------------------------------------------- */

/* Let `entry`, opened and packed without framing, begin with the first `base` rows of `parent`, which must outlive it.
 * From now on it has all these rows; its groups stay those of its own. `fram` [fram_size] (0: none): the framing of
 * the whole. Errors: CORRUPT [SE2, SE4], those of xkv_framing_decode(). Then `entry` can only be closed. */
XKV_MUST_CHECK xkv_status xkv_entry_extend(xkv_ctx *ctx, xkv_entry *entry, const xkv_entry *parent, uint32_t base,
                                           const uint8_t *fram, size_t fram_size);

/* Whether caches of the two have the same planes, rotated alike, and their first `count` rows the same positions. */
bool xkv_geometry_begins_alike(const xkv_geometry *a, const xkv_geometry *b, uint32_t count);

/* Views of the rows from `first` on. `to` [count] */
void xkv_views_from(const xkv_view *views, uint32_t count, uint32_t first, xkv_view *to);

/* What reads rows of one entry, counted from the first one that it itself holds, as xkv_entry_decode_own() does. */
typedef xkv_status (*xkv_decode_fn)(void *user, xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *o,
                                    const xkv_view *views);

/* Read an entry with a parent: `decode` is called for each of the entries that have rows of it. All options are filled
 * in. Errors: UNSUPPORTED (some groups, which are not those of all entries), and what `decode` returns. */
XKV_MUST_CHECK xkv_status xkv_extended_decode(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *o,
                                              const xkv_view *views, xkv_decode_fn decode, void *user);

/* --- All entries -------------------------------------------------------------------------------------------------- */

/* xkv_entry_read() without forgetting the last error, for use inside other calls. */
XKV_MUST_CHECK xkv_status xkv_entry_decode(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                                           const xkv_view *views);
/* The same for the rows that the entry itself holds, counted from the first one of them. `views` NULL: decode and check
 * only. */
XKV_MUST_CHECK xkv_status xkv_entry_decode_own(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                                               const xkv_view *views);

/* A range [first, first + *count) of the `total` tokens, groups or layers that an entry has: check it, and set a count
 * of 0 to all from `first` on. Errors: ARGUMENT. */
XKV_MUST_CHECK xkv_status xkv_resolve_range(xkv_ctx *ctx, const char *what, uint32_t total, uint32_t first,
                                            uint32_t *count);
/* The same for the ranges of a read of an entry of `tokens` rows. */
XKV_MUST_CHECK xkv_status xkv_read_options_resolve(xkv_ctx *ctx, const xkv_entry *entry, uint32_t tokens,
                                                   xkv_read_options *o);

/* Whether one of the groups that are asked for is decoded with the cross stage, or is the stage. */
bool xkv_read_needs_cross(const xkv_entry *entry, const xkv_read_options *o);
/* Tell that a group is ready, and the progress in bytes. Errors: CANCELLED when a callback asks to stop. */
XKV_MUST_CHECK xkv_status xkv_read_announce(xkv_ctx *ctx, const xkv_read_options *o, uint32_t group, uint64_t done,
                                            uint64_t total);

/* Fail since the entry has no dictionary attached: MISMATCH naming its id [Q5]. */
xkv_status xkv_dict_missing(xkv_ctx *ctx, const xkv_entry *entry);

/* True when no group is coded with loss, of its own; of all that the entry has rows of. */
bool xkv_entry_own_lossless(const xkv_entry *entry);
bool xkv_entry_is_lossless(const xkv_entry *entry);

/* The content id of the dictionary that META names; NULL without one. */
const uint8_t *xkv_entry_dictionary_id(const xkv_entry *entry);

#endif
