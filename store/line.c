/* line.c - entries that extend each other, in the index (spec/store.md, section 11). */
#include "store_internal.h"

#include <unistd.h>

/* --- Whether one can extend the other ----------------------------------------------------------------------------- */

xkv_status xkv_line_read_symbols(xkv_ctx *ctx, const xkv_store *store, const xkv_item *item, uint32_t **symbols)
{
    xkv_blob_name name = xkv_blob_name_of(item->blob, item->id);
    xkv_blob b;
    uint32_t count = item->symbols;
    int fd = -1;
    XKV_TRY(xkv_blob_open(ctx, &store->folders, &name, false, &fd)); /* nobody removes it during this transaction */
    xkv_status status = xkv_blob_read(ctx, store->key, &fd, &b);
    if (status == XKV_OK && b.head.symbols != item->symbols)
        status = xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: %u symbols, its record says %u [SB6]", b.head.symbols,
                          item->symbols);
    if (status == XKV_OK)
        status = xkv_blob_read_body(ctx, &b.file, &b.head, &count, symbols, NULL);
    close(fd);
    return status;
}

xkv_status xkv_line_check(xkv_ctx *ctx, const xkv_item *child, const xkv_item *parent)
{
    if (memcmp(child->space, parent->space, 32) != 0)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "entry %llu extends one of another namespace [SE1]",
                        (unsigned long long)child->id);
    if (child->base_tokens <= parent->base_tokens || child->base_tokens > parent->tokens ||
        child->base_tokens >= child->tokens)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT,
                        "entry %llu takes %u of its %u tokens from entry %llu, which has tokens %u .. %u [SE2]",
                        (unsigned long long)child->id, child->base_tokens, child->tokens,
                        (unsigned long long)parent->id, parent->base_tokens, parent->tokens);
    return XKV_OK;
}

/* Both must begin with the same tokens, as far as they are taken over. */
static xkv_status check_symbols(xkv_ctx *ctx, const xkv_store *store, const xkv_item *child, const uint32_t *symbols,
                                const xkv_item *parent)
{
    uint32_t *theirs = NULL;
    XKV_TRY(xkv_line_read_symbols(ctx, store, parent, &theirs));
    uint32_t same = xkv_symbols_common(symbols, child->symbols, theirs, parent->symbols);
    xkv_release(ctx, theirs);
    return xkv_symbols_to_tokens(symbols, same) >= child->base_tokens
               ? XKV_OK
               : xkv_fail(ctx, XKV_ERROR_CORRUPT, "entry %llu has other tokens than entry %llu, which it extends [SE1]",
                          (unsigned long long)child->id, (unsigned long long)parent->id);
}

xkv_status xkv_line_match_link(xkv_ctx *ctx, const xkv_item *child, const xkv_blob_link *link, const xkv_item *parent)
{
    if (child->parent != parent->id || link->base != child->base_tokens || memcmp(link->blob, parent->blob, 32) != 0)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: it does not extend what its record says [SE1]");
    return XKV_OK;
}

xkv_status xkv_line_check_link(xkv_ctx *ctx, const xkv_store *store, const xkv_item *child, const uint32_t *symbols,
                               const xkv_blob_link *link, const xkv_item *parent)
{
    XKV_TRY(xkv_line_match_link(ctx, child, link, parent));
    XKV_TRY(xkv_line_check(ctx, child, parent));
    return check_symbols(ctx, store, child, symbols, parent);
}

/* --- Lines in the index ------------------------------------------------------------------------------------------- */

/* The way up ends, since bases fall on it. */
xkv_status xkv_line_extend_life(xkv_txn *txn, xkv_meta *meta, const xkv_item *child)
{
    xkv_item before, after;
    xkv_status status = xkv_txn_get_item(txn, child->parent, &before);
    if (status == XKV_ERROR_CORRUPT || (status == XKV_OK && before.base_tokens >= child->base_tokens))
        return XKV_OK; /* whoever reads the child meets the damage */
    XKV_TRY(status);
    after = before;
    after.expires = xkv_later_expiry(before.expires, child->expires);
    return after.expires == before.expires ? XKV_OK : xkv_entry_change(txn, meta, &before, &after);
}

xkv_status xkv_line_get_shared(xkv_txn *txn, xkv_shared *shared)
{
    xkv_key key = xkv_key_shared();
    uint8_t value[XKV_SHARED_SIZE];
    xkv_status status = xkv_txn_get(txn, &key, value, sizeof value);
    *shared = (xkv_shared){0};
    if (status == XKV_OK)
        xkv_shared_decode(value, shared);
    return status == XKV_ERROR_NOT_FOUND || status == XKV_ERROR_CORRUPT ? XKV_OK : status;
}

/* One entry more, or less, that extends another. A damaged sum is begun anew, and counted again by a repair. */
static xkv_status count_shared(xkv_txn *txn, const xkv_item *item, bool more)
{
    xkv_key key = xkv_key_shared();
    xkv_shared shared;
    uint8_t value[XKV_SHARED_SIZE];
    uint64_t bytes = xkv_item_raw_share(item, item->base_tokens);
    XKV_TRY(xkv_line_get_shared(txn, &shared));
    shared.entries = more ? shared.entries + 1 : shared.entries - (shared.entries > 0);
    shared.bytes = more ? shared.bytes + bytes : shared.bytes - xkv_min64(shared.bytes, bytes);
    xkv_shared_encode(&shared, value);
    return xkv_txn_put(txn, &key, value, sizeof value);
}

xkv_status xkv_line_join(xkv_txn *txn, xkv_meta *meta, const xkv_item *item)
{
    xkv_key mark = xkv_key_pair(XKV_TABLE_CHILD, item->parent, item->id);
    xkv_item before, after;
    if (item->parent == 0)
        return XKV_OK;
    XKV_TRY(xkv_txn_get_item(txn, item->parent, &before));
    after = before;
    after.children++;
    after.expires = xkv_later_expiry(before.expires, item->expires);
    XKV_TRY(xkv_entry_change(txn, meta, &before, &after));
    XKV_TRY(xkv_txn_put_mark(txn, &mark));
    return count_shared(txn, item, true);
}

xkv_status xkv_line_leave(xkv_txn *txn, xkv_meta *meta, const xkv_item *item)
{
    xkv_key mark = xkv_key_pair(XKV_TABLE_CHILD, item->parent, item->id);
    xkv_item before, after;
    if (item->parent == 0)
        return XKV_OK;
    XKV_TRY(xkv_txn_delete(txn, &mark));
    XKV_TRY(count_shared(txn, item, false));
    xkv_status status = xkv_txn_get_item(txn, item->parent, &before);
    if (status != XKV_OK)
        return status == XKV_ERROR_NOT_FOUND || status == XKV_ERROR_CORRUPT ? XKV_OK : status;
    after = before;
    after.children -= after.children > 0;
    after.used = xkv_max64(before.used, item->used);
    return xkv_entry_change(txn, meta, &before, &after);
}

xkv_status xkv_line_take_child(xkv_txn *txn, uint64_t id, uint64_t *child)
{
    xkv_key from = xkv_key_pair(XKV_TABLE_CHILD, id, 0), key = {.size = 0};
    xkv_status status = xkv_txn_seek(txn, &from, 9, &key, NULL);
    if (status != XKV_OK && (status != XKV_ERROR_CORRUPT || key.size == 0))
        return status; /* a damaged one goes like any other */
    *child = xkv_key_u64(&key, 9);
    return xkv_txn_delete(txn, &key);
}
