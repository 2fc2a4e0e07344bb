/* verify.c - is everything what it should be? Nothing is changed. */
#include "store_internal.h"

#include <stdio.h>
#include <unistd.h>

enum { BATCH = 64 };

typedef struct verify {
    xkv_ctx *ctx;
    xkv_store *store;
    int decode;
    xkv_progress_fn progress;
    void *progress_user;
    xkv_verify_report *report;
    xkv_meta meta;
    xkv_key next;          /* record to go on from */
    xkv_item items[BATCH]; /* read in one transaction */
    uint32_t count;
    uint64_t bytes, pinned;     /* sums over the records */
    uint64_t dict_bytes;        /* of them, of dictionaries */
    xkv_shared shared, counted; /* what the index says of entries that extend others, and what is there */
    xkv_records_report records;
    uint32_t *symbols; /* of the entry at hand */
    const xkv_item *item;
    xkv_item parent; /* that it extends */
} verify;

/* Count a fault; the first one is described. */
static void note(verify *v, uint64_t *counter, uint64_t id, const char *what)
{
    ++*counter;
    if (v->report->first[0] == '\0')
        snprintf(v->report->first, sizeof v->report->first, "entry %llu: %s", (unsigned long long)id, what);
}

static xkv_status report_progress(verify *v, uint64_t bytes)
{
    v->report->bytes += bytes;
    if (v->progress != NULL && v->progress(v->progress_user, v->report->bytes, v->meta.bytes) != 0)
        return xkv_fail(v->ctx, XKV_ERROR_CANCELLED, "cancelled by the caller");
    return xkv_check_cancel(v->ctx);
}

/* --- In the index ------------------------------------------------------------------------------------------------- */

static bool has_mark(xkv_txn *txn, uint8_t table, uint64_t time, uint64_t id)
{
    uint8_t none[1];
    xkv_key key = xkv_key_pair(table, time, id);
    return xkv_txn_get(txn, &key, none, 0) == XKV_OK;
}

static bool has_names(xkv_txn *txn, const xkv_item *item)
{
    uint8_t hash[16];
    for (uint32_t i = 0; i < item->names; i++) {
        xkv_key key = xkv_key_pair(XKV_TABLE_NAMES, item->id, i);
        if (xkv_txn_get(txn, &key, hash, sizeof hash) == XKV_ERROR_NOT_FOUND)
            return false;
    }
    return true;
}

/* Whether a lookup of the entry's own prompt ends at it, or at one that begins with it. */
static xkv_status check_reach(xkv_txn *txn, void *user)
{
    verify *v = user;
    xkv_item now; /* the tree and the uses may have changed since */
    const xkv_item *item = &now;
    xkv_status status = xkv_txn_get_item(txn, v->item->id, &now);
    if (status != XKV_OK)
        return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
    xkv_key key = xkv_key_bytes(XKV_TABLE_KEY, item->key, 32);
    xkv_key leaf = item->at_end ? xkv_key_end(item->node) : xkv_key_edge(item->node, item->symbol);
    uint8_t value[XKV_EDGE_SIZE];
    xkv_space space;
    xkv_edge edge = {0};
    uint64_t id = 0, found = 0;
    bool reached = xkv_txn_get_space(txn, item->space, &space) == XKV_OK &&
                   xkv_trie_find(txn, space.root, v->symbols, item->symbols, &found) == XKV_OK &&
                   xkv_txn_get_u64(txn, &key, &id) == XKV_OK && id == item->id &&
                   xkv_txn_get(txn, &leaf, value, sizeof value) == XKV_OK;
    if (reached)
        xkv_edge_decode(value, &edge);
    if (!reached || edge.entry != item->id || edge.child != 0 || edge.depth != item->symbols)
        note(v, &v->report->unreachable, item->id, "a lookup of its prompt does not lead to it");
    if ((item->pinned == 0 && item->children == 0 && !has_mark(txn, XKV_TABLE_USED, item->used, item->id)) ||
        (item->expires != 0 && !has_mark(txn, XKV_TABLE_EXPIRES, item->expires, item->id)))
        note(v, &v->report->wrong_sums, item->id, "it is not listed for eviction or expiry");
    if (!has_names(txn, item))
        note(v, &v->report->wrong_sums, item->id, "a page key of it is not noted");
    return XKV_OK;
}

/* How many entries are said to extend this one, and do; false when one of them does not. */
static bool count_children(xkv_txn *txn, const xkv_item *item, uint32_t *count)
{
    xkv_key at = xkv_key_pair(XKV_TABLE_CHILD, item->id, 0), key;
    for (*count = 0; xkv_txn_next(txn, &at, 9, &key, NULL) == XKV_OK; ++*count) {
        xkv_item child;
        if (xkv_txn_get_item(txn, xkv_key_u64(&key, 9), &child) != XKV_OK || child.parent != item->id)
            return false;
    }
    return true;
}

/* Whether the entry and those next to it in its line say the same of each other [SI5]. */
static xkv_status check_line(xkv_txn *txn, void *user)
{
    verify *v = user;
    const xkv_item *item = v->item;
    xkv_item now;
    uint32_t children = 0;
    XKV_TRY(xkv_txn_get_item(txn, item->id, &now)); /* NOT_FOUND: it was removed meanwhile */
    if (!count_children(txn, item, &children) || children != now.children)
        note(v, &v->report->wrong_sums, item->id, "it is wrong about what extends it [SI5]");
    if (item->parent == 0)
        return XKV_OK;
    if (!has_mark(txn, XKV_TABLE_CHILD, item->parent, item->id))
        note(v, &v->report->wrong_sums, item->id, "what it extends does not know it [SI5]");
    xkv_status status = xkv_txn_get_item(txn, item->parent, &v->parent);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(v->ctx, XKV_ERROR_CORRUPT, "it extends entry %llu, which is not there [SE1]",
                        (unsigned long long)item->parent);
    XKV_TRY(status);
    if (v->parent.expires != 0 && (now.expires == 0 || now.expires > v->parent.expires))
        note(v, &v->report->wrong_sums, item->id, "it outlives what it extends");
    return XKV_OK;
}

static xkv_status check_link(verify *v, const xkv_blob *b)
{
    xkv_blob_link link;
    uint8_t *bytes = NULL;
    XKV_TRY(xkv_index_read(v->ctx, v->store->index, check_line, v));
    if (!b->head.extends)
        return XKV_OK;
    XKV_TRY(xkv_blob_read_link(v->ctx, &b->file, &b->head, &link, &bytes));
    xkv_release(v->ctx, bytes);
    xkv_status status = xkv_line_check_link(v->ctx, v->store, v->item, v->symbols, &link, &v->parent);
    return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status; /* the blob that it extends is noted itself */
}

/* Go on reading entries. */
static xkv_status fill(xkv_txn *txn, void *user)
{
    verify *v = user;
    uint8_t value[XKV_VALUE_MAX];
    for (v->count = 0; v->count < BATCH;) {
        xkv_key key;
        xkv_status status = xkv_txn_next(txn, &v->next, 1, &key, value);
        if (status != XKV_OK && !xkv_is_damaged_record(status, &key))
            return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
        if (status != XKV_OK)
            note(v, &v->report->damaged, xkv_key_u64(&key, 1), "its record is damaged");
        else
            xkv_item_decode(value, &v->items[v->count++]);
    }
    return XKV_OK;
}

static xkv_status is_there(xkv_txn *txn, void *user)
{
    const verify *v = user;
    xkv_item item;
    return xkv_txn_get_item(txn, v->item->id, &item);
}

/* --- Blobs -------------------------------------------------------------------------------------------------------- */

static xkv_status decode_all(verify *v)
{
    xkv_hit *hit = NULL;
    const xkv_entry *entry = NULL;
    XKV_TRY(xkv_store_look(v->ctx, v->store, v->item->id, &hit));
    xkv_status status = xkv_hit_entry(v->ctx, hit, &entry);
    if (status == XKV_OK)
        status = xkv_entry_verify(v->ctx, entry, NULL, NULL);
    xkv_hit_close(v->ctx, hit);
    return status;
}

static xkv_status check_opened(verify *v, const int *fd)
{
    xkv_blob b;
    xkv_input raw;
    XKV_TRY(xkv_blob_file(v->ctx, fd, &raw));
    XKV_TRY(xkv_blob_check_hash(v->ctx, &raw, v->item->blob)); /* of newer ones, too */
    XKV_TRY(xkv_blob_read(v->ctx, v->store->key, fd, &b));
    XKV_TRY(xkv_item_check_head(v->ctx, v->item, &b.head));
    uint32_t count = b.head.symbols;
    xkv_page_key *names = NULL;
    XKV_TRY(xkv_blob_read_body(v->ctx, &b.file, &b.head, &count, &v->symbols, &names));
    xkv_release(v->ctx, names);
    xkv_status status = xkv_index_read(v->ctx, v->store->index, check_reach, v);
    if (status == XKV_OK)
        status = check_link(v, &b);
    xkv_release(v->ctx, v->symbols);
    v->symbols = NULL;
    return status;
}

static xkv_status check_item(verify *v)
{
    xkv_blob_name name = xkv_blob_name_of(v->item->blob, v->item->id);
    int fd = -1;
    v->report->entries++;
    v->bytes += v->item->file_size;
    v->pinned += v->item->pinned;
    v->counted.entries += v->item->parent != 0;
    v->counted.bytes += xkv_item_raw_share(v->item, v->item->base_tokens);
    xkv_ctx_begin(v->ctx);
    xkv_status status = xkv_blob_open(v->ctx, &v->store->folders, &name, false, &fd);
    if (status == XKV_OK) {
        status = check_opened(v, &fd);
        close(fd);
        if (status == XKV_OK && v->decode)
            status = decode_all(v);
    }
    if (status == XKV_ERROR_NOT_FOUND && xkv_index_read(v->ctx, v->store->index, is_there, v) == XKV_OK)
        note(v, &v->report->missing, v->item->id, "its blob is missing");
    else if (xkv_is_damage(status) || status == XKV_ERROR_MISMATCH)
        note(v, &v->report->damaged, v->item->id, xkv_ctx_error(v->ctx));
    else if (status != XKV_OK && status != XKV_ERROR_NOT_FOUND && !xkv_is_newer(status))
        return status;
    return report_progress(v, v->item->file_size);
}

static xkv_status check_entries(verify *v)
{
    v->next = xkv_key_bytes(XKV_TABLE_ITEM, NULL, 0);
    do {
        XKV_TRY(xkv_index_read(v->ctx, v->store->index, fill, v));
        for (uint32_t i = 0; i < v->count; i++) {
            v->item = &v->items[i];
            XKV_TRY(check_item(v));
        }
    } while (v->count > 0);
    return XKV_OK;
}

/* --- Dictionaries and the rest ------------------------------------------------------------------------------------ */

typedef struct dict_walk {
    verify *v;
    xkv_key next;
    xkv_dict_record dict;
} dict_walk;

static xkv_status next_dict(xkv_txn *txn, void *user)
{
    dict_walk *w = user;
    uint8_t value[XKV_VALUE_MAX];
    xkv_key key;
    xkv_status status;
    do /* a damaged one is noted with all records */
        status = xkv_txn_next(txn, &w->next, 1, &key, value);
    while (xkv_is_damaged_record(status, &key));
    XKV_TRY(status);
    xkv_dict_record_decode(value, &w->dict);
    return XKV_OK;
}

static xkv_status check_dict(verify *v, const xkv_dict_record *dict)
{
    xkv_blob_name name = xkv_blob_name_of(dict->blob, dict->id);
    xkv_input file;
    int fd = -1;
    v->report->dictionaries++;
    v->bytes += dict->file_size;
    v->dict_bytes += dict->file_size;
    xkv_status status = xkv_blob_open(v->ctx, &v->store->folders, &name, false, &fd);
    if (status == XKV_OK) {
        status = xkv_blob_file(v->ctx, &fd, &file);
        if (status == XKV_OK)
            status = xkv_blob_check_hash(v->ctx, &file, dict->blob);
        close(fd);
    }
    if (status == XKV_ERROR_NOT_FOUND)
        note(v, &v->report->missing, dict->id, "the blob of a dictionary is missing");
    else if (xkv_is_damage(status))
        note(v, &v->report->damaged, dict->id, "the blob of a dictionary is damaged");
    else
        XKV_TRY(status);
    return report_progress(v, dict->file_size);
}

static xkv_status check_dicts(verify *v)
{
    dict_walk w = {.v = v, .next = xkv_key_bytes(XKV_TABLE_DICT, NULL, 0)};
    for (;;) {
        xkv_ctx_begin(v->ctx);
        xkv_status status = xkv_index_read(v->ctx, v->store->index, next_dict, &w);
        if (status != XKV_OK)
            return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
        XKV_TRY(check_dict(v, &w.dict));
    }
}

/* All tables. */
static xkv_status check_records(verify *v)
{
    XKV_TRY(xkv_verify_records(v->ctx, v->store, &v->records));
    v->report->bad_records = v->records.bad;
    if (v->report->first[0] == '\0')
        memcpy(v->report->first, v->records.first, sizeof v->report->first);
    return XKV_OK;
}

static xkv_status check_orphan(void *user, const char *name)
{
    verify *v = user;
    bool orphan = false;
    XKV_TRY(xkv_store_is_orphan(v->ctx, v->store, name, &orphan));
    v->report->orphans += orphan;
    return xkv_check_cancel(v->ctx);
}

static xkv_status get_sums(xkv_txn *txn, void *user)
{
    verify *v = user;
    XKV_TRY(xkv_line_get_shared(txn, &v->shared));
    return xkv_txn_get_meta(txn, &v->meta);
}

/* Others may have changed the store meanwhile: sums are compared only if nobody has. */
static void check_sums(verify *v, const xkv_meta *before)
{
    const xkv_meta *m = &v->meta;
    if (memcmp(before, m, sizeof *m) != 0)
        return;
    const xkv_records_report *r = &v->records;
    uint64_t entry_bytes = v->bytes - v->dict_bytes;
    if (r->spaces != m->namespaces || r->entries != m->entries || r->bytes != entry_bytes)
        note(v, &v->report->wrong_sums, 0, "the sums of the namespaces are wrong");
    if (m->entries != v->report->entries || m->dictionaries != v->report->dictionaries || m->bytes != v->bytes ||
        m->pinned != v->pinned || v->shared.entries != v->counted.entries || v->shared.bytes != v->counted.bytes)
        note(v, &v->report->wrong_sums, 0, "the sums of the store are wrong");
}

static xkv_status verify_all(verify *v)
{
    XKV_TRY(xkv_index_get_meta(v->ctx, v->store->index, &v->meta));
    const xkv_meta before = v->meta;
    XKV_TRY(check_entries(v));
    XKV_TRY(check_dicts(v));
    XKV_TRY(check_records(v));
    XKV_TRY(xkv_folder_list(v->ctx, v->store->folders.blobs, check_orphan, v));
    XKV_TRY(xkv_index_read(v->ctx, v->store->index, get_sums, v));
    check_sums(v, &before);
    return XKV_OK;
}

xkv_status xkv_store_verify(xkv_ctx *ctx, xkv_store *store, int decode, xkv_progress_fn progress, void *progress_user,
                            xkv_verify_report *report)
{
    verify *v = NULL;
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &v));
    *v = (verify){.ctx = ctx,
                  .store = store,
                  .decode = decode,
                  .progress = progress,
                  .progress_user = progress_user,
                  .report = report};
    memset(report, 0, sizeof *report);
    xkv_status status = verify_all(v);
    xkv_release(ctx, v);
    return status;
}
