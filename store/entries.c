/* entries.c - what an entry is in the index: put in, changed, evicted, taken out, each inside one write transaction. */
#include "store_internal.h"

#include "sha256.h"

#include <errno.h>
#include <stdio.h>
#include <unistd.h>

/* --- Lists of what was removed ------------------------------------------------------------------------------------ */

void xkv_removed_clear(xkv_ctx *ctx, xkv_removed *r)
{
    for (uint64_t i = 0; i < r->count; i++) {
        if (r->blobs[i].fd >= 0)
            close(r->blobs[i].fd);
    }
    xkv_release(ctx, r->blobs);
    memset(r, 0, sizeof *r);
}

/* Takes over `fd`, also when it fails. */
static xkv_status add_removed(xkv_ctx *ctx, xkv_removed *r, const uint8_t hash[32], uint64_t id, uint64_t bytes, int fd)
{
    if (r->count == r->capacity) {
        uint64_t capacity = r->capacity * 2 + 16;
        struct xkv_removed_blob *blobs = NULL;
        xkv_status status = XKV_NEW(ctx, capacity, &blobs);
        if (status != XKV_OK) {
            if (fd >= 0)
                close(fd);
            return status;
        }
        if (r->count > 0)
            memcpy(blobs, r->blobs, r->count * sizeof *blobs);
        xkv_release(ctx, r->blobs);
        r->blobs = blobs;
        r->capacity = capacity;
    }
    r->blobs[r->count++] = (struct xkv_removed_blob){.id = id, .fd = fd, .name = xkv_blob_name_of(hash, id)};
    r->bytes += bytes;
    return XKV_OK;
}

/* A blob that could not be deleted keeps its TRASH record. */
void xkv_removed_finish(xkv_ctx *ctx, xkv_store *store, xkv_removed *r, bool quarantine, uint64_t byte_cap)
{
    for (uint64_t i = 0; i < r->count; i++) {
        bool gone = true;
        if (quarantine)
            xkv_blob_quarantine(&store->folders, &r->blobs[i].name, byte_cap);
        else
            gone = xkv_blob_unlink(&store->folders, &r->blobs[i].name);
        pthread_mutex_lock(&store->mutex);
        if (gone && store->pending.trash_count < XKV_DONE_TRASH)
            store->pending.trash[store->pending.trash_count++] = r->blobs[i].id;
        pthread_mutex_unlock(&store->mutex);
    }
    xkv_removed_clear(ctx, r);
}

/* --- Records that follow from others ------------------------------------------------------------------------------ */

xkv_status xkv_item_check_head(xkv_ctx *ctx, const xkv_item *item, const xkv_blob_head *head)
{
    if (head->kind != XKV_BLOB_ENTRY || head->file_size != item->file_size || head->symbols != item->symbols ||
        head->tokens != item->tokens || head->names != item->names || memcmp(head->key, item->key, 32) != 0 ||
        memcmp(head->space, item->space, 32) != 0 || memcmp(head->dict, item->dict, 16) != 0 ||
        head->extends != (item->parent != 0) || head->whole_only != (item->whole_only != 0))
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: it is not what its record says [SB6]");
    return XKV_OK;
}

void xkv_page_hash(const uint8_t space[32], const uint8_t page[32], uint8_t hash[16])
{
    uint8_t digest[32];
    xkv_sha256 h;
    xkv_sha256_begin(&h);
    xkv_sha256_add(&h, space, 32);
    xkv_sha256_add(&h, page, 32);
    xkv_sha256_end(&h, digest);
    memcpy(hash, digest, 16);
}

/* USED and EXPIRES. Pinned entries are in no order of use: nothing but a removal touches them. Nor are those that
 * others extend: they are needed as long as the last one of these. */
static xkv_status put_times(xkv_txn *txn, const xkv_item *item)
{
    xkv_key used = xkv_key_pair(XKV_TABLE_USED, item->used, item->id);
    xkv_key expires = xkv_key_pair(XKV_TABLE_EXPIRES, item->expires, item->id);
    if (item->pinned == 0 && item->children == 0)
        XKV_TRY(xkv_txn_put_mark(txn, &used));
    return item->expires == 0 ? XKV_OK : xkv_txn_put_mark(txn, &expires);
}

static xkv_status delete_times(xkv_txn *txn, const xkv_item *item)
{
    xkv_key used = xkv_key_pair(XKV_TABLE_USED, item->used, item->id);
    xkv_key expires = xkv_key_pair(XKV_TABLE_EXPIRES, item->expires, item->id);
    XKV_TRY(xkv_txn_delete(txn, &used));
    return item->expires == 0 ? XKV_OK : xkv_txn_delete(txn, &expires);
}

static xkv_status put_names(xkv_txn *txn, const xkv_item *item, const xkv_page_key *names)
{
    for (uint32_t i = 0; i < item->names; i++) {
        uint8_t hash[16];
        xkv_page_hash(item->space, names[i].key, hash);
        xkv_key page = xkv_key_page(hash, item->id), name = xkv_key_pair(XKV_TABLE_NAMES, item->id, i);
        XKV_TRY(xkv_txn_put_u64(txn, &page, names[i].tokens));
        XKV_TRY(xkv_txn_put(txn, &name, hash, sizeof hash));
    }
    return XKV_OK;
}

static xkv_status delete_names(xkv_txn *txn, const xkv_item *item)
{
    for (uint32_t i = 0; i < item->names; i++) {
        xkv_key name = xkv_key_pair(XKV_TABLE_NAMES, item->id, i);
        uint8_t hash[16];
        xkv_status status = xkv_txn_get(txn, &name, hash, sizeof hash);
        if (status == XKV_OK) {
            xkv_key page = xkv_key_page(hash, item->id);
            XKV_TRY(xkv_txn_delete(txn, &page));
        } else if (status != XKV_ERROR_NOT_FOUND && status != XKV_ERROR_CORRUPT) {
            return status; /* damaged: its page key leads nowhere from now on, which lookups step over */
        }
        XKV_TRY(xkv_txn_delete(txn, &name));
    }
    return XKV_OK;
}

/* Count one user of the entry's dictionary more or less. One that is not there, after a repair that did not find it,
 * counts its users when it is put. Nothing is counted in a damaged record. */
static xkv_status count_user(xkv_txn *txn, const xkv_item *item, int change)
{
    xkv_dict_record dict;
    if (!xkv_item_needs_dict(item))
        return XKV_OK;
    xkv_status status = xkv_txn_get_dict(txn, item->dict, &dict);
    if (status == XKV_ERROR_NOT_FOUND || status == XKV_ERROR_CORRUPT)
        return XKV_OK;
    XKV_TRY(status);
    dict.users = change > 0 ? dict.users + 1 : dict.users - (dict.users > 0);
    return xkv_txn_put_dict(txn, item->dict, &dict);
}

/* --- Putting in --------------------------------------------------------------------------------------------------- */

/* The namespace's record, made when it is the first entry. */
static xkv_status need_space(xkv_txn *txn, xkv_meta *meta, const uint8_t ns[32], xkv_space *space)
{
    xkv_status status = xkv_txn_get_space(txn, ns, space);
    if (status != XKV_ERROR_NOT_FOUND)
        return status;
    *space = (xkv_space){.root = meta->next_node++};
    meta->namespaces++;
    return XKV_OK;
}

bool xkv_is_damage(xkv_status status)
{
    return status >= XKV_ERROR_FORMAT && status <= XKV_ERROR_TRUNCATED && !xkv_is_newer(status);
}

bool xkv_is_newer(xkv_status status)
{
    return status == XKV_ERROR_VERSION || status == XKV_ERROR_FEATURE;
}

/* How far the prompt agrees with what is in the tree. An entry on the way whose blob is damaged is taken out, into
 * `broken`, since nothing says where the new one parts from it. */
static xkv_status find_common(xkv_txn *txn, xkv_meta *meta, xkv_store *store, uint64_t root, const uint32_t *symbols,
                              const xkv_item *item, xkv_removed *broken, xkv_common *c)
{
    xkv_ctx *ctx = xkv_txn_ctx(txn);
    for (;;) {
        uint64_t id = 0;
        xkv_item nearest;
        uint32_t *theirs = NULL;
        *c = (xkv_common){0};
        xkv_status status = xkv_trie_find(txn, root, symbols, item->symbols, &id);
        if (status == XKV_ERROR_NOT_FOUND)
            return XKV_OK;
        XKV_TRY(status);
        status = xkv_txn_get_item(txn, id, &nearest);
        if (status == XKV_ERROR_NOT_FOUND)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "entry %llu has no record: repair rebuilds the index [SI4]",
                            (unsigned long long)id);
        XKV_TRY(status);
        status = xkv_line_read_symbols(ctx, store, &nearest, &theirs);
        if (xkv_is_damage(status) || status == XKV_ERROR_NOT_FOUND) {
            XKV_TRY(xkv_entry_remove(txn, meta, &nearest, broken, -1));
            meta->corrupt++;
            continue;
        }
        XKV_TRY(status);
        c->count = xkv_symbols_common(symbols, item->symbols, theirs, nearest.symbols);
        c->other = c->count < nearest.symbols ? theirs[c->count] : 0;
        xkv_release(ctx, theirs);
        return XKV_OK;
    }
}

xkv_status xkv_entry_insert_known(xkv_txn *txn, xkv_meta *meta, const uint32_t *symbols, const xkv_page_key *names,
                                  const xkv_common *c, xkv_item *item)
{
    xkv_key key = xkv_key_bytes(XKV_TABLE_KEY, item->key, 32);
    xkv_space space;
    XKV_TRY(need_space(txn, meta, item->space, &space));
    XKV_TRY(xkv_trie_insert(txn, meta, space.root, symbols, c->count, c->other, item));
    XKV_TRY(xkv_txn_put_item(txn, item));
    XKV_TRY(xkv_txn_put_u64(txn, &key, item->id));
    XKV_TRY(put_times(txn, item));
    XKV_TRY(put_names(txn, item, names));
    XKV_TRY(count_user(txn, item, 1));
    space.entries++;
    space.bytes += item->file_size;
    meta->entries++;
    meta->pinned += item->pinned;
    meta->bytes += item->file_size;
    XKV_TRY(xkv_txn_put_space(txn, item->space, &space));
    return xkv_line_join(txn, meta, item);
}

xkv_status xkv_entry_insert(xkv_txn *txn, xkv_meta *meta, xkv_store *store, const uint32_t *symbols,
                            const xkv_page_key *names, xkv_item *item, xkv_removed *broken)
{
    xkv_space space;
    xkv_common c = {0};
    xkv_status status = xkv_txn_get_space(txn, item->space, &space);
    if (status == XKV_OK)
        status = find_common(txn, meta, store, space.root, symbols, item, broken, &c);
    if (status != XKV_OK && status != XKV_ERROR_NOT_FOUND)
        return status;
    return xkv_entry_insert_known(txn, meta, symbols, names, &c, item);
}

/* Entries that need a dictionary: they may be there before it is. Damaged records count for nothing. */
static xkv_status find_users(xkv_txn *txn, const uint8_t dict_id[16], uint64_t *users)
{
    xkv_key at = xkv_key_bytes(XKV_TABLE_ITEM, NULL, 0), key;
    uint8_t value[XKV_VALUE_MAX];
    for (*users = 0;;) {
        xkv_item item;
        xkv_status status = xkv_txn_next(txn, &at, 1, &key, value);
        if (status == XKV_ERROR_NOT_FOUND)
            return XKV_OK;
        if (xkv_is_damaged_record(status, &key))
            continue;
        XKV_TRY(status);
        xkv_item_decode(value, &item);
        *users += memcmp(item.dict, dict_id, sizeof item.dict) == 0;
    }
}

xkv_status xkv_dict_insert(xkv_txn *txn, xkv_meta *meta, const uint8_t dict_id[16], uint64_t id, const uint8_t hash[32],
                           uint64_t file_size)
{
    xkv_dict_record dict = {.id = id, .file_size = file_size};
    memcpy(dict.blob, hash, 32);
    XKV_TRY(find_users(txn, dict_id, &dict.users));
    meta->dictionaries++;
    meta->bytes += file_size;
    return xkv_txn_put_dict(txn, dict_id, &dict);
}

/* --- Taking out --------------------------------------------------------------------------------------------------- */

static xkv_status leave_space(xkv_txn *txn, xkv_meta *meta, const xkv_item *item)
{
    xkv_key key = xkv_key_bytes(XKV_TABLE_SPACE, item->space, 32);
    xkv_space space;
    XKV_TRY(xkv_txn_get_space(txn, item->space, &space));
    XKV_TRY(xkv_trie_remove(txn, space.root, item));
    space.entries -= space.entries > 0;
    space.bytes -= xkv_min64(space.bytes, item->file_size);
    if (space.entries > 0)
        return xkv_txn_put_space(txn, item->space, &space);
    meta->namespaces -= meta->namespaces > 0;
    return xkv_txn_delete(txn, &key);
}

static xkv_status remove_records(xkv_txn *txn, xkv_meta *meta, const xkv_item *item)
{
    xkv_key self = xkv_key_id(XKV_TABLE_ITEM, item->id), key = xkv_key_bytes(XKV_TABLE_KEY, item->key, 32);
    xkv_key trash = xkv_key_id(XKV_TABLE_TRASH, item->id);
    XKV_TRY(leave_space(txn, meta, item));
    XKV_TRY(delete_names(txn, item));
    XKV_TRY(delete_times(txn, item));
    XKV_TRY(count_user(txn, item, -1));
    XKV_TRY(xkv_txn_delete(txn, &key));
    XKV_TRY(xkv_txn_delete(txn, &self));
    XKV_TRY(xkv_line_leave(txn, meta, item));
    meta->entries -= meta->entries > 0;
    meta->pinned -= xkv_min64(meta->pinned, item->pinned);
    meta->bytes -= xkv_min64(meta->bytes, item->file_size);
    return xkv_txn_put(txn, &trash, item->blob, sizeof item->blob);
}

static xkv_status remove_line(xkv_txn *txn, xkv_meta *meta, const xkv_item *item, xkv_removed *r, int fd, int depth);

/* All that extend the entry. Those whose records are damaged are left for a repair. */
static xkv_status remove_children(xkv_txn *txn, xkv_meta *meta, const xkv_item *item, xkv_removed *r, int depth)
{
    if (depth == XKV_LINE_MAX)
        return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_CORRUPT, "more than %d entries extend each other [SE3]", depth);
    for (;;) {
        xkv_item child;
        uint64_t id = 0;
        xkv_status status = xkv_line_take_child(txn, item->id, &id);
        if (status != XKV_OK)
            return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
        status = xkv_txn_get_item(txn, id, &child);
        if (status == XKV_OK && child.parent == item->id)
            XKV_TRY(remove_line(txn, meta, &child, r, -1, depth + 1));
        else if (status != XKV_OK && status != XKV_ERROR_NOT_FOUND && status != XKV_ERROR_CORRUPT)
            return status;
    }
}

/* `item` has `depth` ancestors that go, too. */
static xkv_status remove_line(xkv_txn *txn, xkv_meta *meta, const xkv_item *item, xkv_removed *r, int fd, int depth)
{
    xkv_item now = *item;
    xkv_status status = XKV_OK;
    if (item->children > 0) {
        status = remove_children(txn, meta, item, r, depth);
        if (status == XKV_OK)
            status = xkv_txn_get_item(txn, item->id, &now); /* they changed it */
    }
    if (status != XKV_OK) {
        if (fd >= 0)
            close(fd);
        return status;
    }
    XKV_TRY(add_removed(xkv_txn_ctx(txn), r, now.blob, now.id, now.file_size, fd));
    return remove_records(txn, meta, &now);
}

xkv_status xkv_entry_remove(xkv_txn *txn, xkv_meta *meta, const xkv_item *item, xkv_removed *r, int fd)
{
    return remove_line(txn, meta, item, r, fd, 0);
}

xkv_status xkv_dict_remove(xkv_txn *txn, xkv_meta *meta, const uint8_t dict_id[16], const xkv_dict_record *dict,
                           xkv_removed *r)
{
    xkv_key self = xkv_key_bytes(XKV_TABLE_DICT, dict_id, 16), trash = xkv_key_id(XKV_TABLE_TRASH, dict->id);
    XKV_TRY(add_removed(xkv_txn_ctx(txn), r, dict->blob, dict->id, dict->file_size, -1));
    XKV_TRY(xkv_txn_delete(txn, &self));
    meta->dictionaries -= meta->dictionaries > 0;
    meta->bytes -= xkv_min64(meta->bytes, dict->file_size);
    return xkv_txn_put(txn, &trash, dict->blob, sizeof dict->blob);
}

/* --- Eviction and expiry ------------------------------------------------------------------------------------------ */

bool xkv_item_is_listed(const xkv_item *item, uint8_t table, uint64_t time)
{
    return table == XKV_TABLE_USED ? item->pinned == 0 && item->children == 0 && item->used == time
                                   : item->expires == time;
}

/* The next record of USED or EXPIRES from `at` on: its time and the entry. A damaged record, or one that is not of
 * its entry any more, is of no use and goes; one whose entry cannot be read stays for a repair. */
static xkv_status next_item(xkv_txn *txn, xkv_key *at, uint64_t *time, xkv_item *item)
{
    for (;;) {
        xkv_key key;
        xkv_status status = xkv_txn_next(txn, at, 1, &key, NULL);
        if (status != XKV_OK && !xkv_is_damaged_record(status, &key))
            return status;
        *time = xkv_key_u64(&key, 1);
        if (status == XKV_OK)
            status = xkv_txn_get_item(txn, xkv_key_u64(&key, 9), item);
        else
            status = XKV_ERROR_NOT_FOUND;
        if (status == XKV_OK && !xkv_item_is_listed(item, key.bytes[0], *time))
            status = XKV_ERROR_NOT_FOUND;
        if (status == XKV_ERROR_NOT_FOUND)
            XKV_TRY(xkv_txn_delete(txn, &key));
        else if (status != XKV_ERROR_CORRUPT)
            return status;
    }
}

static xkv_status fail_full(xkv_txn *txn, const xkv_meta *meta, uint64_t bytes)
{
    return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_LIMIT,
                    "%llu bytes more do not fit under the cap of %llu: %llu are pinned, being read or dictionaries",
                    (unsigned long long)bytes, (unsigned long long)meta->byte_cap, (unsigned long long)meta->bytes);
}

/* Evict one entry unless somebody reads it. */
static xkv_status evict_one(xkv_txn *txn, xkv_meta *meta, xkv_change *change, const xkv_item *item)
{
    const xkv_blob_name name = xkv_blob_name_of(item->blob, item->id);
    xkv_removed *r = &change->removed;
    bool locked = false;
    int fd = -1;
    XKV_TRY(xkv_blob_try_lock(xkv_txn_ctx(txn), &change->store->folders, &name, &locked, &fd));
    if (!locked)
        return XKV_OK;
    XKV_TRY(xkv_entry_remove(txn, meta, item, r, fd));
    r->evicted++;
    r->evicted_bytes += item->file_size;
    meta->evictions++;
    return XKV_OK;
}

/* A batch for each transaction, since every evicted blob keeps a descriptor until the commit. */
xkv_status xkv_evict(xkv_txn *txn, xkv_meta *meta, xkv_change *change, uint64_t bytes)
{
    xkv_key from = xkv_key_bytes(XKV_TABLE_USED, NULL, 0);
    while (meta->byte_cap > 0 && (bytes > meta->byte_cap || meta->bytes > meta->byte_cap - bytes)) {
        uint64_t used = 0;
        xkv_item item;
        change->again = change->removed.evicted == XKV_BATCH;
        if (change->again)
            return XKV_OK;
        xkv_status status = bytes > meta->byte_cap ? XKV_ERROR_NOT_FOUND : next_item(txn, &from, &used, &item);
        if (status == XKV_ERROR_NOT_FOUND)
            return bytes > 0 ? fail_full(txn, meta, bytes) : XKV_OK;
        XKV_TRY(status);
        uint64_t evicted = change->removed.evicted;
        XKV_TRY(evict_one(txn, meta, change, &item));
        if (item.parent != 0 && change->removed.evicted > evicted) /* the parent may be next, at the same time of use */
            from = xkv_key_pair(XKV_TABLE_USED, item.used, 0);
    }
    return XKV_OK;
}

xkv_status xkv_expire(xkv_txn *txn, xkv_meta *meta, uint64_t now, uint64_t most, xkv_removed *r)
{
    xkv_key from = xkv_key_bytes(XKV_TABLE_EXPIRES, NULL, 0);
    for (uint64_t i = 0; i < most; i++) {
        uint64_t expires = 0;
        xkv_item item;
        xkv_status status = next_item(txn, &from, &expires, &item);
        if (status == XKV_ERROR_NOT_FOUND || (status == XKV_OK && expires > now))
            return XKV_OK;
        XKV_TRY(status);
        uint64_t before = r->count;
        XKV_TRY(xkv_entry_remove(txn, meta, &item, r, -1));
        meta->expirations += r->count - before; /* what extends it does not outlive it */
    }
    return XKV_OK;
}

/* --- Changing ----------------------------------------------------------------------------------------------------- */

xkv_status xkv_entry_change(xkv_txn *txn, xkv_meta *meta, const xkv_item *before, xkv_item *after)
{
    XKV_TRY(delete_times(txn, before));
    XKV_TRY(put_times(txn, after));
    meta->pinned = meta->pinned - xkv_min64(meta->pinned, before->pinned) + after->pinned;
    XKV_TRY(xkv_txn_put_item(txn, after));
    return after->parent != 0 && after->expires != before->expires ? xkv_line_extend_life(txn, meta, after) : XKV_OK;
}

/* --- Pending uses and counters ------------------------------------------------------------------------------------ */

static void drop_pending(xkv_pending *p)
{
    p->hits = p->misses = p->corrupt = p->tokens_reused = p->bytes_reused = 0;
    if (p->use_count > 0)
        memset(p->uses, 0, sizeof p->uses);
    p->use_count = p->trash_count = 0;
}

/* As far as there is room: what does not fit is the order of a few uses. */
static void add_use(xkv_pending *p, uint64_t id, uint64_t time)
{
    uint64_t slot = id * 0x9e3779b97f4a7c15u >> 32;
    while (p->uses[slot % XKV_USE_SLOTS].id != id && p->uses[slot % XKV_USE_SLOTS].id != 0)
        slot++;
    slot %= XKV_USE_SLOTS;
    if (p->uses[slot].id == 0) {
        if (p->use_count == XKV_USES)
            return;
        p->use_count++;
    }
    p->uses[slot].id = id;
    p->uses[slot].time = xkv_max64(p->uses[slot].time, time);
}

/* Take all that is pending, to be written in a transaction; put it back if that fails. */
static void pending_take(xkv_store *store, xkv_pending *p)
{
    uint64_t now = xkv_store_now(store);
    pthread_mutex_lock(&store->mutex);
    store->flushed = now;
    *p = store->pending;
    drop_pending(&store->pending);
    pthread_mutex_unlock(&store->mutex);
}

static void pending_return(xkv_store *store, const xkv_pending *p)
{
    xkv_pending *to = &store->pending;
    pthread_mutex_lock(&store->mutex);
    to->hits += p->hits;
    to->misses += p->misses;
    to->corrupt += p->corrupt;
    to->tokens_reused += p->tokens_reused;
    to->bytes_reused += p->bytes_reused;
    for (uint32_t i = 0; i < XKV_USE_SLOTS; i++) {
        if (p->uses[i].id != 0)
            add_use(to, p->uses[i].id, p->uses[i].time);
    }
    for (uint32_t i = 0; i < p->trash_count && to->trash_count < XKV_DONE_TRASH; i++)
        to->trash[to->trash_count++] = p->trash[i];
    pthread_mutex_unlock(&store->mutex);
}

void xkv_pending_use(xkv_store *store, uint64_t id, uint64_t time)
{
    pthread_mutex_lock(&store->mutex);
    add_use(&store->pending, id, time);
    pthread_mutex_unlock(&store->mutex);
}

/* Other processes evict by what is written, so that it is not kept for long; nor is every lookup to cost a commit. A
 * clock that was set back does not stop it. */
bool xkv_pending_due(xkv_store *store, uint64_t time)
{
    const uint64_t pause = 5 * 1000 * 1000;
    pthread_mutex_lock(&store->mutex);
    bool due = time < store->flushed || time - store->flushed >= pause;
    if (due)
        store->flushed = time;
    pthread_mutex_unlock(&store->mutex);
    return due;
}

static xkv_status write_use(xkv_txn *txn, xkv_meta *meta, uint64_t id, uint64_t time)
{
    xkv_item before, after;
    xkv_status status = xkv_txn_get_item(txn, id, &before);
    if (status == XKV_ERROR_NOT_FOUND || status == XKV_ERROR_CORRUPT || (status == XKV_OK && before.used >= time))
        return XKV_OK; /* nobody's change shall fail for an order of use */
    XKV_TRY(status);
    after = before;
    after.used = time;
    return xkv_entry_change(txn, meta, &before, &after);
}

static xkv_status pending_write(xkv_txn *txn, xkv_meta *meta, const xkv_pending *p)
{
    meta->hits += p->hits;
    meta->misses += p->misses;
    meta->corrupt += p->corrupt;
    meta->tokens_reused += p->tokens_reused;
    meta->bytes_reused += p->bytes_reused;
    for (uint32_t i = 0; p->use_count > 0 && i < XKV_USE_SLOTS; i++) {
        if (p->uses[i].id != 0)
            XKV_TRY(write_use(txn, meta, p->uses[i].id, p->uses[i].time));
    }
    for (uint32_t i = 0; i < p->trash_count; i++) {
        xkv_key key = xkv_key_id(XKV_TABLE_TRASH, p->trash[i]);
        XKV_TRY(xkv_txn_delete(txn, &key));
    }
    return XKV_OK;
}

/* --- Changes ------------------------------------------------------------------------------------------------------ */

typedef struct attempt {
    xkv_change *change;
    const xkv_pending *pending;
} attempt;

static xkv_status run_change(xkv_txn *txn, void *user)
{
    attempt *a = user;
    xkv_ctx *ctx = xkv_txn_ctx(txn);
    xkv_meta meta;
    xkv_removed_clear(ctx, &a->change->removed);
    xkv_removed_clear(ctx, &a->change->quarantine);
    a->change->again = false;
    XKV_TRY(xkv_txn_get_meta(txn, &meta));
    XKV_TRY(pending_write(txn, &meta, a->pending));
    if (a->change->body != NULL)
        XKV_TRY(a->change->body(txn, &meta, a->change));
    XKV_TRY(xkv_txn_put_meta(txn, &meta));
    a->change->byte_cap = meta.byte_cap;
    /* Blobs whose TRASH records go must not come back. */
    int blobs = a->change->store->folders.blobs;
    if (a->pending->trash_count > 0 && !a->change->blobs_synced && fsync(blobs) != 0 && errno != EINVAL)
        return xkv_fail_errno(ctx, "sync the folder of", "blobs", errno);
    return XKV_OK;
}

static xkv_status change_once(xkv_ctx *ctx, xkv_change *change, xkv_pending *pending)
{
    xkv_store *store = change->store;
    change->blobs_synced = false;
    pending_take(store, pending);
    attempt a = {change, pending};
    xkv_status status = change->body != NULL ? xkv_index_write(ctx, store->index, run_change, &a)
                                             : xkv_index_write_lazily(ctx, store->index, run_change, &a);
    if (status != XKV_OK) {
        pending_return(store, pending);
        xkv_removed_clear(ctx, &change->removed);
        xkv_removed_clear(ctx, &change->quarantine);
        return status;
    }
    change->removed_count += change->removed.count;
    change->removed_bytes += change->removed.bytes;
    change->evicted_count += change->removed.evicted;
    change->evicted_bytes += change->removed.evicted_bytes;
    xkv_removed_finish(ctx, store, &change->removed, false, change->byte_cap);
    xkv_removed_finish(ctx, store, &change->quarantine, true, change->byte_cap);
    return XKV_OK;
}

xkv_status xkv_store_change(xkv_ctx *ctx, xkv_change *change)
{
    xkv_pending *pending = NULL;
    XKV_TRY(XKV_NEW(ctx, 1, &pending));
    xkv_status status = change_once(ctx, change, pending);
    while (status == XKV_OK && change->again)
        status = change_once(ctx, change, pending);
    xkv_release(ctx, pending);
    return status;
}

xkv_status xkv_store_flush(xkv_ctx *ctx, xkv_store *store)
{
    const xkv_pending *p = &store->pending;
    pthread_mutex_lock(&store->mutex);
    bool idle = p->hits + p->misses + p->corrupt + p->use_count + p->trash_count == 0;
    pthread_mutex_unlock(&store->mutex);
    xkv_change change = {.store = store};
    return idle ? XKV_OK : xkv_store_change(ctx, &change);
}

/* --- Quarantine --------------------------------------------------------------------------------------------------- */

/* An entry, or a dictionary, that was found to be damaged. */
typedef struct bad_blob {
    uint64_t id;
    const uint8_t *dict_id; /* NULL: an entry */
    bool known;             /* the index still has it: nobody was faster */
} bad_blob;

static xkv_status find_bad_item(xkv_txn *txn, bad_blob *bad, xkv_item *item)
{
    xkv_status status = xkv_txn_get_item(txn, bad->id, item);
    bad->known = status != XKV_ERROR_NOT_FOUND;
    return bad->known ? status : XKV_OK;
}

/* Unless it was replaced meanwhile. */
static xkv_status find_bad_dict(xkv_txn *txn, bad_blob *bad, xkv_dict_record *dict)
{
    xkv_status status = xkv_txn_get_dict(txn, bad->dict_id, dict);
    bad->known = status != XKV_ERROR_NOT_FOUND && (status != XKV_OK || dict->id == bad->id);
    return bad->known ? status : XKV_OK;
}

static xkv_status find_bad(xkv_txn *txn, void *user)
{
    bad_blob *bad = user;
    xkv_item item;
    xkv_dict_record dict;
    return bad->dict_id == NULL ? find_bad_item(txn, bad, &item) : find_bad_dict(txn, bad, &dict);
}

static xkv_status take_out(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    bad_blob *bad = change->user;
    xkv_item item;
    XKV_TRY(find_bad_item(txn, bad, &item));
    meta->corrupt += bad->known;
    return bad->known ? xkv_entry_remove(txn, meta, &item, &change->quarantine, -1) : XKV_OK;
}

static xkv_status take_out_dict(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    bad_blob *bad = change->user;
    xkv_dict_record dict;
    XKV_TRY(find_bad_dict(txn, bad, &dict));
    meta->corrupt += bad->known;
    return bad->known ? xkv_dict_remove(txn, meta, bad->dict_id, &dict, &change->quarantine) : XKV_OK;
}

/* What another process has removed since it was found is not damaged: nothing is logged or counted. */
static void quarantine(xkv_ctx *ctx, xkv_store *store, bad_blob *bad, const char *why)
{
    const char *kind = bad->dict_id == NULL ? "entry" : "dictionary";
    xkv_change change = {.store = store, .body = bad->dict_id == NULL ? take_out : take_out_dict, .user = bad};
    char text[256];
    snprintf(text, sizeof text, "%s", why); /* often the message of `ctx`, which may get another one */
    xkv_status status =
        store->read_only ? xkv_index_read(ctx, store->index, find_bad, bad) : xkv_store_change(ctx, &change);
    if (status == XKV_OK && !bad->known)
        return;
    bool gone = status == XKV_OK && !store->read_only;
    xkv_logf(ctx, XKV_LOG_WARNING, "%s: %s %llu is damaged and %s: %s", store->path, kind, (unsigned long long)bad->id,
             gone ? "was put into quarantine" : "could not be put into quarantine", text);
    if (gone)
        return;
    pthread_mutex_lock(&store->mutex);
    store->pending.corrupt++;
    pthread_mutex_unlock(&store->mutex);
}

void xkv_store_quarantine_dict(xkv_ctx *ctx, xkv_store *store, const uint8_t dict_id[16], uint64_t id, const char *why)
{
    bad_blob bad = {.id = id, .dict_id = dict_id};
    quarantine(ctx, store, &bad, why);
}

void xkv_store_quarantine(xkv_ctx *ctx, xkv_store *store, uint64_t id, const char *why)
{
    bad_blob bad = {.id = id};
    quarantine(ctx, store, &bad, why);
}
