/* admin.c - listing, pinning, removing, counting, collecting, exporting. */
#include "store_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- Walking over entries ----------------------------------------------------------------------------------------- */

typedef struct walk {
    const xkv_namespace *ns;
    uint64_t after;     /* ids from here on */
    xkv_item items[64]; /* what one transaction has found */
    uint32_t count;
    bool done;
} walk;

/* Some entries of the namespace, in order of id; a transaction is never kept open while the caller works. */
static xkv_status fill_walk(xkv_txn *txn, void *user)
{
    walk *w = user;
    xkv_key at = xkv_key_id(XKV_TABLE_ITEM, w->after), key;
    uint8_t value[XKV_VALUE_MAX];
    w->count = 0;
    for (uint32_t seen = 0; seen < 4096 && w->count < 64; seen++) {
        xkv_item *item = &w->items[w->count];
        xkv_status status = xkv_txn_next(txn, &at, 1, &key, value);
        w->done = status == XKV_ERROR_NOT_FOUND;
        if (w->done)
            return XKV_OK;
        XKV_TRY(status);
        xkv_item_decode(value, item);
        w->count += memcmp(item->space, w->ns->id, 32) == 0;
        w->after = xkv_key_u64(&key, 1) + 1;
    }
    return XKV_OK;
}

static void describe(const xkv_item *item, xkv_store_item *out)
{
    *out = (xkv_store_item){
        .id = item->id,
        .tokens = item->tokens,
        .pinned = item->pinned,
        .bytes = item->file_size,
        .raw_bytes = item->raw_bytes,
        .created = item->created,
        .expires = item->expires,
        .used = item->used,
        .needs_dict = xkv_item_needs_dict(item),
        .parent = item->parent,
        .base_tokens = item->base_tokens,
        .children = item->children,
    };
    memcpy(out->dictionary_id, item->dict, 16);
    memcpy(out->key, item->key, 32);
    memcpy(out->blob, item->blob, 32);
}

static xkv_status list_all(xkv_ctx *ctx, xkv_store *store, walk *w, int (*item)(void *user, const xkv_store_item *item),
                           void *user)
{
    while (!w->done) {
        XKV_TRY(xkv_index_read(ctx, store->index, fill_walk, w));
        for (uint32_t i = 0; i < w->count; i++) {
            xkv_store_item out;
            describe(&w->items[i], &out);
            if (item(user, &out) != 0)
                return XKV_OK;
        }
        XKV_TRY(xkv_check_cancel(ctx));
    }
    return XKV_OK;
}

xkv_status xkv_store_list(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                          int (*item)(void *user, const xkv_store_item *item), void *user)
{
    walk *w = NULL;
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &w));
    w->ns = ns;
    xkv_status status = list_all(ctx, store, w, item, user);
    xkv_release(ctx, w);
    return status;
}

/* --- One entry ---------------------------------------------------------------------------------------------------- */

typedef struct one {
    const xkv_namespace *ns;
    uint64_t id;
    int pinned;
    xkv_item *item;
} one;

static xkv_status get_own(xkv_txn *txn, const one *o, xkv_item *item)
{
    xkv_status status = xkv_txn_get_item(txn, o->id, item);
    if (status == XKV_OK && memcmp(item->space, o->ns->id, 32) != 0)
        status = XKV_ERROR_NOT_FOUND;
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(xkv_txn_ctx(txn), status, "there is no entry %llu in the namespace", (unsigned long long)o->id);
    return status;
}

static xkv_status pin_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    const one *o = change->user;
    xkv_item before, after;
    XKV_TRY(get_own(txn, o, &before));
    after = before;
    after.pinned = o->pinned != 0;
    return xkv_entry_change(txn, meta, &before, &after);
}

xkv_status xkv_store_pin(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, uint64_t id, int pinned)
{
    one o = {.ns = ns, .id = id, .pinned = pinned};
    xkv_change change = {.store = store, .body = pin_body, .user = &o};
    XKV_TRY(xkv_store_begin(ctx, store));
    return xkv_store_change(ctx, &change);
}

static xkv_status remove_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    xkv_item item;
    XKV_TRY(get_own(txn, change->user, &item));
    return xkv_entry_remove(txn, meta, &item, &change->removed, -1);
}

xkv_status xkv_store_remove(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, uint64_t id)
{
    one o = {.ns = ns, .id = id};
    xkv_change change = {.store = store, .body = remove_body, .user = &o};
    XKV_TRY(xkv_store_begin(ctx, store));
    return xkv_store_change(ctx, &change);
}

/* --- A namespace -------------------------------------------------------------------------------------------------- */

/* The entries that a walk has found, those that are still there. */
static xkv_status remove_walk(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    const walk *w = change->user;
    for (uint32_t i = 0; i < w->count; i++) {
        xkv_item item;
        xkv_status status = xkv_txn_get_item(txn, w->items[i].id, &item);
        if (status == XKV_ERROR_NOT_FOUND)
            continue;
        XKV_TRY(status);
        XKV_TRY(xkv_entry_remove(txn, meta, &item, &change->removed, -1));
    }
    return XKV_OK;
}

static xkv_status remove_all(xkv_ctx *ctx, xkv_store *store, walk *w, uint64_t *removed)
{
    while (!w->done) {
        xkv_change change = {.store = store, .body = remove_walk, .user = w};
        XKV_TRY(xkv_index_read(ctx, store->index, fill_walk, w));
        if (w->count > 0)
            XKV_TRY(xkv_store_change(ctx, &change));
        *removed += change.removed_count;
        XKV_TRY(xkv_check_cancel(ctx));
    }
    return xkv_store_flush(ctx, store);
}

xkv_status xkv_store_remove_namespace(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, uint64_t *removed)
{
    uint64_t count = 0;
    walk *w = NULL;
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &w));
    w->ns = ns;
    xkv_status status = remove_all(ctx, store, w, &count);
    xkv_release(ctx, w);
    if (status == XKV_OK && removed != NULL)
        *removed = count;
    return status;
}

/* --- Sums --------------------------------------------------------------------------------------------------------- */

typedef struct folder_sum {
    int folder;
    uint64_t count, bytes;
} folder_sum;

static xkv_status add_file(void *user, const char *name)
{
    folder_sum *sum = user;
    struct stat st;
    if (fstatat(sum->folder, name, &st, AT_SYMLINK_NOFOLLOW) != 0)
        return XKV_OK; /* gone since */
    sum->count++;
    sum->bytes += (uint64_t)st.st_size;
    return XKV_OK;
}

static xkv_status get_shared(xkv_txn *txn, void *user)
{
    return xkv_line_get_shared(txn, user);
}

xkv_status xkv_store_get_stats(xkv_ctx *ctx, xkv_store *store, xkv_store_stats *stats)
{
    xkv_store_stats s = {.block_tokens = store->properties.block_tokens, .read_only = store->read_only};
    const xkv_pending *p = &store->pending;
    xkv_meta m;
    xkv_shared shared;
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(xkv_index_get_meta(ctx, store->index, &m));
    XKV_TRY(xkv_index_read(ctx, store->index, get_shared, &shared));
    folder_sum bad = {.folder = store->folders.quarantine};
    XKV_TRY(xkv_folder_list(ctx, store->folders.quarantine, add_file, &bad));
    s.quarantined = bad.count;
    s.quarantined_bytes = bad.bytes;
    xkv_index_sizes(store->index, &s.index_bytes, &s.map_bytes);
    s.byte_cap = m.byte_cap;
    s.bytes = m.bytes;
    s.entries = m.entries;
    s.pinned = m.pinned;
    s.namespaces = m.namespaces;
    s.dictionaries = m.dictionaries;
    s.puts = m.puts;
    s.extending = shared.entries;
    s.bytes_shared = shared.bytes;
    s.evictions = m.evictions;
    s.expirations = m.expirations;
    pthread_mutex_lock(&store->mutex);
    s.hits = m.hits + p->hits;
    s.misses = m.misses + p->misses;
    s.corrupt = m.corrupt + p->corrupt;
    s.tokens_reused = m.tokens_reused + p->tokens_reused;
    s.bytes_reused = m.bytes_reused + p->bytes_reused;
    pthread_mutex_unlock(&store->mutex);
    *stats = s;
    return XKV_OK;
}

/* --- Making room -------------------------------------------------------------------------------------------------- */

/* The properties, for a repair, are written inside the transaction, since other processes would use the same name. */
static xkv_status cap_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    xkv_properties p = change->store->properties;
    meta->byte_cap = p.byte_cap = *(const uint64_t *)change->user;
    XKV_TRY(xkv_properties_write(xkv_txn_ctx(txn), change->store->folders.root, &p));
    return xkv_evict(txn, meta, change, 0);
}

xkv_status xkv_store_set_cap(xkv_ctx *ctx, xkv_store *store, uint64_t byte_cap, xkv_collect_report *report)
{
    xkv_change change = {.store = store, .body = cap_body, .user = &byte_cap};
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(xkv_store_change(ctx, &change));
    if (report != NULL)
        *report = (xkv_collect_report){.evicted = change.evicted_count, .freed_bytes = change.evicted_bytes};
    return XKV_OK;
}

typedef struct collect {
    xkv_ctx *ctx;
    xkv_store *store;
    xkv_collect_report *report;
    uint64_t now;
    bool more; /* the last transaction removed as many as one may */
} collect;

static xkv_status expire_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    collect *c = change->user;
    XKV_TRY(xkv_expire(txn, meta, c->now, XKV_BATCH, &change->removed));
    c->more = change->removed.count >= XKV_BATCH;
    return XKV_OK;
}

static xkv_status evict_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    return xkv_evict(txn, meta, change, 0);
}

/* Dictionaries without users; they are few. */
static xkv_status unused_dicts_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    xkv_key at = xkv_key_bytes(XKV_TABLE_DICT, NULL, 0), key;
    uint8_t value[XKV_VALUE_MAX];
    for (;;) {
        xkv_dict_record dict;
        xkv_status status = xkv_txn_next(txn, &at, 1, &key, value);
        if (status == XKV_ERROR_NOT_FOUND)
            return XKV_OK;
        XKV_TRY(status);
        xkv_dict_record_decode(value, &dict);
        if (dict.users == 0)
            XKV_TRY(xkv_dict_remove(txn, meta, key.bytes + 1, &dict, &change->removed));
    }
}

/* Run a body and add up what it removed. */
static xkv_status run(collect *c, xkv_status (*body)(xkv_txn *, xkv_meta *, xkv_change *), uint64_t *count)
{
    xkv_change change = {.store = c->store, .body = body, .user = c};
    XKV_TRY(xkv_store_change(c->ctx, &change));
    *count += change.removed_count;
    c->report->freed_bytes += change.removed_bytes;
    return XKV_OK;
}

/* Whether only a newer program can read the blob; if not, which one it extends, if it does. */
static bool is_newer(const collect *c, const xkv_blob_name *name, bool *extends, xkv_blob_link *link)
{
    xkv_blob b;
    uint8_t *bytes = NULL;
    int fd = -1;
    xkv_status status = xkv_blob_open(c->ctx, &c->store->folders, name, false, &fd);
    if (status == XKV_OK)
        status = xkv_blob_read(c->ctx, c->store->key, &fd, &b);
    *extends =
        status == XKV_OK && b.head.extends && xkv_blob_read_link(c->ctx, &b.file, &b.head, link, &bytes) == XKV_OK;
    xkv_release(c->ctx, bytes);
    if (fd >= 0)
        close(fd);
    return xkv_is_newer(status);
}

/* After a repair an orphan may be what only a newer program can read, or extend such an entry: it is not ours to
 * delete. */
static bool is_newer_blob(const collect *c, const char *text)
{
    xkv_blob_name name;
    xkv_blob_link link = {0};
    bool extends = true;
    snprintf(name.text, sizeof name.text, "%s", text);
    for (int i = 0; extends && i < XKV_LINE_MAX; i++) {
        if (is_newer(c, &name, &extends, &link))
            return true;
        name = xkv_blob_name_of(link.blob, link.parent);
    }
    return false;
}

static xkv_status drop_orphan(void *user, const char *name)
{
    collect *c = user;
    bool orphan = false;
    XKV_TRY(xkv_store_is_orphan(c->ctx, c->store, name, &orphan));
    struct stat st;
    if (orphan && !is_newer_blob(c, name) && fstatat(c->store->folders.blobs, name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
        unlinkat(c->store->folders.blobs, name, 0) == 0) {
        c->report->orphans++;
        c->report->freed_bytes += (uint64_t)st.st_size;
    }
    return xkv_check_cancel(c->ctx);
}

static xkv_status empty_quarantine(void *user, const char *name)
{
    collect *c = user;
    struct stat st;
    if (fstatat(c->store->folders.quarantine, name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
        unlinkat(c->store->folders.quarantine, name, 0) == 0)
        c->report->freed_bytes += (uint64_t)st.st_size;
    return XKV_OK;
}

static xkv_status collect_all(collect *c, int unused_dicts)
{
    do
        XKV_TRY(run(c, expire_body, &c->report->expired));
    while (c->more);
    XKV_TRY(run(c, evict_body, &c->report->evicted));
    if (unused_dicts)
        XKV_TRY(run(c, unused_dicts_body, &c->report->dictionaries));
    XKV_TRY(xkv_store_tidy(c->ctx, c->store, &c->report->leftovers));
    XKV_TRY(xkv_folder_list(c->ctx, c->store->folders.blobs, drop_orphan, c));
    XKV_TRY(xkv_folder_list(c->ctx, c->store->folders.quarantine, empty_quarantine, c));
    return xkv_store_flush(c->ctx, c->store);
}

xkv_status xkv_store_collect(xkv_ctx *ctx, xkv_store *store, int unused_dicts, xkv_collect_report *report)
{
    xkv_collect_report r = {0};
    collect c = {.ctx = ctx, .store = store, .report = &r, .now = xkv_store_now(store)};
    XKV_TRY(xkv_store_begin_change(ctx, store));
    XKV_TRY(collect_all(&c, unused_dicts));
    if (report != NULL)
        *report = r;
    return XKV_OK;
}

/* --- Exporting ---------------------------------------------------------------------------------------------------- */

static xkv_status find_own(xkv_txn *txn, void *user)
{
    const one *o = user;
    return get_own(txn, o, o->item);
}

/* An exported file in the making: blobs, one behind the other. */
typedef struct exporting {
    xkv_ctx *ctx;
    xkv_store *store;
    const xkv_output *output;
    uint64_t size;
} exporting;

static xkv_status copy_blob(exporting *e, const uint8_t hash[32], const int *fd)
{
    xkv_input file, plain;
    xkv_sealed sealed;
    xkv_shift shift;
    XKV_TRY(xkv_blob_file(e->ctx, fd, &file));
    XKV_TRY(xkv_blob_check_hash(e->ctx, &file, hash));
    XKV_TRY(xkv_blob_plain(e->ctx, e->store->key, &file, &sealed, &plain));
    xkv_output output = xkv_output_from(&shift, e->output, e->size);
    e->size += plain.size;
    return xkv_blob_copy_plain(e->ctx, &plain, &output);
}

static xkv_status export_blob(exporting *e, const uint8_t hash[32], uint64_t id)
{
    xkv_blob_name name = xkv_blob_name_of(hash, id);
    int fd = -1;
    xkv_status status = xkv_blob_open(e->ctx, &e->store->folders, &name, true, &fd);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(e->ctx, status, "blob %llu is gone", (unsigned long long)id);
    XKV_TRY(status);
    status = copy_blob(e, hash, &fd);
    close(fd);
    return status;
}

/* The dictionary of entry i, unless one before it has the same. */
static xkv_status export_dict(exporting *e, const xkv_hit *hit, uint32_t i)
{
    const uint8_t *id = xkv_hit_item(hit, i)->dict;
    xkv_dict_record record;
    if (!xkv_item_needs_dict(xkv_hit_item(hit, i)))
        return XKV_OK;
    for (uint32_t j = 0; j < i; j++) {
        if (memcmp(xkv_hit_item(hit, j)->dict, id, 16) == 0)
            return XKV_OK;
    }
    xkv_status status = xkv_index_get_dict(e->ctx, e->store->index, id, &record);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(e->ctx, XKV_ERROR_MISMATCH, "the dictionary of the entry is not in the store");
    XKV_TRY(status);
    return export_blob(e, record.blob, record.id);
}

/* What is needed comes before what needs it. */
static xkv_status export_all(exporting *e, const xkv_hit *hit)
{
    uint32_t count = 0;
    for (; xkv_hit_item(hit, count) != NULL; count++)
        XKV_TRY(export_dict(e, hit, count));
    while (count-- > 0)
        XKV_TRY(export_blob(e, xkv_hit_item(hit, count)->blob, xkv_hit_item(hit, count)->id));
    return XKV_OK;
}

xkv_status xkv_store_export(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, uint64_t id,
                            const xkv_output *output)
{
    exporting e = {.ctx = ctx, .store = store, .output = output};
    xkv_hit *hit = NULL;
    xkv_item item;
    one o = {.ns = ns, .id = id, .item = &item};
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(xkv_index_read(ctx, store->index, find_own, &o));
    xkv_status status = xkv_store_look(ctx, store, id, &hit);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(ctx, status, "the blob of entry %llu is gone", (unsigned long long)id);
    XKV_TRY(status);
    status = export_all(&e, hit);
    xkv_hit_close(ctx, hit);
    return status;
}
