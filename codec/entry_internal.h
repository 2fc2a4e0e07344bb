#ifndef XKV_ENTRY_INTERNAL_H
#define XKV_ENTRY_INTERNAL_H

#include "container.h"
#include "xkv/codec.h"

struct xkv_entry {
    xkv_container c;
    xkv_input input;
    const xkv_dict *dict; /* NULL until attached */
};

/* xkv_entry_read() without forgetting the last error, for use inside other calls. `views` NULL: decode and check only.
 */
XKV_MUST_CHECK xkv_status xkv_entry_decode(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                                           const xkv_view *views);

/* Fail since the entry has no dictionary attached: MISMATCH naming its id [Q5]. */
xkv_status xkv_dict_missing(xkv_ctx *ctx, const xkv_entry *entry);

/* True when no group is coded with loss. */
bool xkv_entry_is_lossless(const xkv_entry *entry);

#endif
