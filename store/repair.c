/* repair.c - a new index in place of the old one: rebuilt from the blobs, or copied without its free pages. The new one
 * is complete and synced before the two folders change places in one step. */
#include "store_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct repair {
    xkv_ctx *ctx;
    xkv_store *store; /* its folders; its index is the new one */
    xkv_index *old;   /* NULL: cannot be read */
    uint32_t kind;    /* of the blobs at this pass */
    uint64_t next_id; /* above those of all blobs */
    bool extends;     /* entries that extend others, once these are in the index */
    bool last;        /* no pass follows: what has no place by now has none */
    xkv_repair_report report;
} repair;

/* --- Folders ------------------------------------------------------------------------------------------------------ */

/* Whatever has the name: if it is a link, only that goes. */
static void remove_new(int root)
{
    static const char *const names[] = {"data.mdb", "lock.mdb"};
    int folder = openat(root, "index.new", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    for (size_t i = 0; folder >= 0 && i < 2; i++)
        (void)unlinkat(folder, names[i], 0);
    if (folder >= 0)
        close(folder);
    (void)unlinkat(root, "index.new", folder >= 0 ? AT_REMOVEDIR : 0);
}

static xkv_status make_new(xkv_ctx *ctx, int root)
{
    remove_new(root);
    return mkdirat(root, "index.new", 0700) == 0 ? XKV_OK : xkv_fail_errno(ctx, "create", "index.new", errno);
}

static xkv_status sync_new(xkv_ctx *ctx, int root)
{
    int fd = openat(root, "index.new/data.mdb", O_RDWR | O_NOFOLLOW | O_CLOEXEC);
    bool done = fd >= 0 && fchmod(fd, 0600) == 0 && fsync(fd) == 0; /* LMDB copies with the mode of the umask */
    int error = errno;
    if (fd >= 0)
        close(fd);
    return done ? XKV_OK : xkv_fail_errno(ctx, "sync", "the new index", error);
}

/* `index` may be missing altogether. */
static xkv_status exchange(xkv_ctx *ctx, int root)
{
    struct stat st;
    XKV_TRY(sync_new(ctx, root));
    bool there = fstatat(root, "index", &st, AT_SYMLINK_NOFOLLOW) == 0;
    if (renameat2(root, "index.new", root, "index", there ? RENAME_EXCHANGE : 0) != 0)
        return xkv_fail_errno(ctx, "put into place", "the new index", errno);
    if (fsync(root) != 0 && errno != EINVAL)
        return xkv_fail_errno(ctx, "sync", "the folder of the store", errno);
    remove_new(root);
    return XKV_OK;
}

/* --- Rebuilding --------------------------------------------------------------------------------------------------- */

typedef struct old_item {
    uint64_t id;
    xkv_item item;
} old_item;

static xkv_status get_old(xkv_txn *txn, void *user)
{
    old_item *o = user;
    return xkv_txn_get_item(txn, o->id, &o->item);
}

/* What only the old index knows: when it was used, whether it is pinned. */
static void keep_uses(repair *r, xkv_item *item)
{
    old_item o = {.id = item->id};
    if (r->old == NULL || xkv_index_read(r->ctx, r->old, get_old, &o) != XKV_OK ||
        memcmp(o.item.blob, item->blob, 32) != 0)
        return;
    item->pinned = o.item.pinned;
    item->used = o.item.used;
    item->expires = o.item.expires;
}

typedef struct old_trash {
    uint64_t id;
    uint8_t hash[32];
} old_trash;

static xkv_status get_trash(xkv_txn *txn, void *user)
{
    old_trash *o = user;
    xkv_key key = xkv_key_id(XKV_TABLE_TRASH, o->id);
    return xkv_txn_get(txn, &key, o->hash, sizeof o->hash);
}

/* Whether the blob was removed, by a process that was killed before it had deleted the file. */
static bool was_removed(repair *r, const xkv_item *item)
{
    old_trash o = {.id = item->id};
    return r->old != NULL && xkv_index_read(r->ctx, r->old, get_trash, &o) == XKV_OK &&
           memcmp(o.hash, item->blob, 32) == 0;
}

/* A blob as it is read. */
typedef struct found {
    repair *r;
    xkv_item item;
    xkv_blob_head head;
    uint32_t *symbols;
    xkv_page_key *names;
    xkv_blob_link link; /* if it extends another one */
    uint8_t *link_bytes;
    uint64_t parent_id; /* that one, by the file that has the hash of the link */
    xkv_item parent;    /* of id 0 when it is not in the index */
} found;

static xkv_status insert_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    found *f = change->user;
    xkv_store *store = f->r->store;
    meta->next_id = xkv_max64(meta->next_id, f->item.id + 1);
    if (f->head.kind == XKV_BLOB_DICT) {
        xkv_dict_record dict;
        xkv_status status = xkv_txn_get_dict(txn, f->head.dict, &dict);
        if (status != XKV_ERROR_NOT_FOUND)
            return status;
        return xkv_dict_insert(txn, meta, f->head.dict, f->item.id, f->item.blob, f->head.file_size);
    }
    xkv_key key = xkv_key_bytes(XKV_TABLE_KEY, f->item.key, 32);
    uint64_t other = 0;
    xkv_status status = xkv_txn_get_u64(txn, &key, &other);
    if (status != XKV_ERROR_NOT_FOUND)
        return status; /* the prompt is there: this blob is an orphan, left when a process was killed */
    return xkv_entry_insert(txn, meta, store, f->symbols, f->names, &f->item, &change->quarantine);
}

static void note_head(found *f)
{
    xkv_item *item = &f->item;
    const xkv_blob_head *h = &f->head;
    item->file_size = h->file_size;
    item->raw_bytes = h->raw_bytes;
    item->created = item->used = h->created;
    item->expires = h->expires;
    item->tokens = h->tokens;
    item->symbols = h->symbols;
    item->names = h->names;
    item->whole_only = h->whole_only;
    memcpy(item->space, h->space, 32);
    memcpy(item->key, h->key, 32);
    memcpy(item->dict, h->dict, 16);
}

/* The key must follow from the tokens, since both are looked up by. */
static xkv_status check_key(repair *r, const found *f)
{
    xkv_namespace ns;
    const xkv_symbols symbols = {.data = f->symbols, .count = f->head.symbols, .tokens = f->head.tokens};
    uint8_t key[32];
    memcpy(ns.id, f->head.space, 32);
    xkv_chain_last(&ns, &symbols, r->store->properties.block_tokens, key);
    return memcmp(key, f->head.key, 32) == 0
               ? XKV_OK
               : xkv_fail(r->ctx, XKV_ERROR_CORRUPT, "blob: its key does not follow from its tokens [SB6]");
}

/* A writer that is killed before it commits leaves a blob whose id the next one takes, too. Usually its name in tmp/
 * tells; where it does not, both blobs are sound, and the one that comes second gets an id of its own. */
static xkv_status settle_id(repair *r, found *f)
{
    const int blobs = r->store->folders.blobs;
    xkv_known_blob k = {.id = f->item.id};
    memcpy(k.hash, f->item.blob, 32);
    XKV_TRY(xkv_index_read(r->ctx, r->store->index, xkv_find_blob, &k));
    if (!k.taken || k.found)
        return XKV_OK;
    const xkv_blob_name before = xkv_blob_name_of(f->item.blob, f->item.id);
    f->item.id = r->next_id++;
    const xkv_blob_name after = xkv_blob_name_of(f->item.blob, f->item.id);
    if (renameat(blobs, before.text, blobs, after.text) != 0 || (fsync(blobs) != 0 && errno != EINVAL))
        return xkv_fail_errno(r->ctx, "rename the blob", before.text, errno);
    return XKV_OK;
}

static xkv_status insert_blob(repair *r, found *f, const xkv_input *file)
{
    xkv_change change = {.store = r->store, .body = insert_body, .user = f};
    if (f->head.kind == XKV_BLOB_ENTRY) {
        uint32_t count = f->head.symbols;
        XKV_TRY(xkv_blob_read_body(r->ctx, file, &f->head, &count, &f->symbols, &f->names));
        XKV_TRY(check_key(r, f));
        note_head(f);
        keep_uses(r, &f->item);
    }
    XKV_TRY(settle_id(r, f));
    if (f->head.extends) {
        f->item.parent = f->parent_id;
        f->item.base_tokens = f->link.base;
        XKV_TRY(xkv_line_check_link(r->ctx, r->store, &f->item, f->symbols, &f->link, &f->parent));
    }
    return xkv_store_change(r->ctx, &change);
}

/* The entry that it extends, at the end of a line that has room for one more. */
static xkv_status find_parent(xkv_txn *txn, void *user)
{
    found *f = user;
    xkv_item up;
    xkv_status status = xkv_txn_get_item(txn, f->parent_id, &f->parent);
    const bool same = status == XKV_OK && memcmp(f->parent.blob, f->link.blob, 32) == 0;
    if (!same) { /* perhaps another one has the id, and it comes later */
        f->parent.id = 0;
        return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
    }
    up = f->parent;
    for (int count = 1; up.parent != 0; count++) {
        if (count == XKV_LINE_MAX - 1)
            return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_CORRUPT, "more than %d entries extend each other [SE3]",
                            XKV_LINE_MAX);
        XKV_TRY(xkv_txn_get_item(txn, up.parent, &up));
    }
    return XKV_OK;
}

/* Whether a file has the name of a blob; else it is not ours. */
static bool is_blob_name(const char *text, uint8_t hash[32], uint64_t *id)
{
    return xkv_blob_name_parse(text, hash, id) && *id != 0 && *id != UINT64_MAX;
}

static xkv_status compare_hash(void *user, const char *text)
{
    found *f = user;
    xkv_known_blob k;
    if (is_blob_name(text, k.hash, &k.id) && memcmp(k.hash, f->link.blob, 32) == 0)
        f->parent_id = k.id;
    return XKV_OK;
}

/* The id of the blob that it extends: the one that it had, unless a repair has given it another. */
static xkv_status find_parent_id(repair *r, found *f)
{
    const xkv_folders *folders = &r->store->folders;
    xkv_blob_name name = xkv_blob_name_of(f->link.blob, f->link.parent);
    f->parent_id = f->link.parent;
    if (faccessat(folders->blobs, name.text, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
        return XKV_OK;
    return xkv_folder_list(r->ctx, folders->blobs, compare_hash, f);
}

/* Whether it is the turn of an entry that extends another: that one is in the index, and it is not. When no pass is
 * left there must be such an entry, unless only a newer program can read it. */
static xkv_status is_next(repair *r, found *f, const xkv_input *file, bool *next)
{
    xkv_known_blob k = {.id = f->item.id};
    memcpy(k.hash, f->item.blob, 32);
    *next = false;
    XKV_TRY(xkv_index_read(r->ctx, r->store->index, xkv_find_blob, &k));
    if (k.found)
        return XKV_OK;
    XKV_TRY(xkv_blob_read_link(r->ctx, file, &f->head, &f->link, &f->link_bytes));
    XKV_TRY(find_parent_id(r, f));
    XKV_TRY(xkv_index_read(r->ctx, r->store->index, find_parent, f));
    *next = f->parent.id != 0;
    if (*next || !r->last)
        return XKV_OK;
    xkv_blob_name name = xkv_blob_name_of(f->link.blob, f->parent_id);
    if (faccessat(r->store->folders.blobs, name.text, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
        return xkv_fail(r->ctx, XKV_ERROR_VERSION, "it extends entry %llu, which is not in the index [SE1]",
                        (unsigned long long)f->parent_id);
    return xkv_fail(r->ctx, XKV_ERROR_CORRUPT, "blob: it extends entry %llu, which is not there [SE1]",
                    (unsigned long long)f->parent_id);
}

static xkv_status take_file(repair *r, found *f, const int *fd)
{
    bool next = true;
    xkv_blob b;
    XKV_TRY(xkv_blob_read(r->ctx, r->store->key, fd, &b));
    f->head = b.head;
    if (f->head.kind != r->kind || f->head.extends != r->extends)
        return XKV_OK; /* its turn comes, or has been */
    if (f->head.extends)
        XKV_TRY(is_next(r, f, &b.file, &next));
    if (!next)
        return XKV_OK;
    XKV_TRY(xkv_blob_check_hash(r->ctx, &b.raw, f->item.blob));
    return insert_blob(r, f, &b.file);
}

/* It stays where it is. */
static void leave_newer(repair *r, const found *f, const char *name)
{
    if (r->kind != XKV_BLOB_ENTRY || r->extends != f->head.extends) /* at another pass */
        return;
    xkv_logf(r->ctx, XKV_LOG_WARNING, "%s: left alone: %s", name, xkv_ctx_error(r->ctx));
    r->report.newer++;
}

static xkv_status take_blob(void *user, const char *text)
{
    repair *r = user;
    found f = {.r = r};
    int fd = -1;
    XKV_TRY(xkv_check_cancel(r->ctx));
    if (!is_blob_name(text, f.item.blob, &f.item.id))
        return XKV_OK;
    xkv_blob_name name = xkv_blob_name_of(f.item.blob, f.item.id);
    if (was_removed(r, &f.item)) {
        xkv_blob_unlink(&r->store->folders, &name);
        return XKV_OK;
    }
    xkv_ctx_begin(r->ctx);
    xkv_status status = xkv_blob_open(r->ctx, &r->store->folders, &name, false, &fd);
    if (status == XKV_OK)
        status = take_file(r, &f, &fd);
    if (fd >= 0)
        close(fd);
    xkv_release(r->ctx, f.symbols);
    xkv_release(r->ctx, f.names);
    xkv_release(r->ctx, f.link_bytes);
    if (xkv_is_newer(status))
        leave_newer(r, &f, name.text);
    if (!xkv_is_damage(status))
        return xkv_is_newer(status) ? XKV_OK : status;
    xkv_logf(r->ctx, XKV_LOG_WARNING, "%s: damaged, into quarantine: %s", name.text, xkv_ctx_error(r->ctx));
    xkv_blob_quarantine(&r->store->folders, &name, r->store->properties.byte_cap);
    r->report.quarantined++;
    return XKV_OK;
}

/* A temporary file with the name of a blob: where the old index does not know that one, its writer was killed before
 * the commit, and neither name stays. */
static xkv_status drop_temp(void *user, const char *text)
{
    const repair *r = user;
    xkv_known_blob k;
    if (r->old != NULL && is_blob_name(text, k.hash, &k.id) &&
        xkv_index_read(r->ctx, r->old, xkv_find_blob, &k) == XKV_OK && !k.found) {
        xkv_blob_name name = xkv_blob_name_of(k.hash, k.id);
        xkv_blob_unlink(&r->store->folders, &name);
    }
    (void)unlinkat(r->store->folders.temp, text, 0);
    return XKV_OK;
}

static xkv_status note_id(void *user, const char *text)
{
    repair *r = user;
    xkv_known_blob k;
    if (is_blob_name(text, k.hash, &k.id))
        r->next_id = xkv_max64(r->next_id, k.id + 1);
    return XKV_OK;
}

static xkv_status open_path(xkv_ctx *ctx, const xkv_store *store, const char *name, bool read_only, xkv_index **index)
{
    const xkv_index_options o = {
        .read_only = read_only, .check = read_only, .no_sync = !read_only, .map_size = 1u << 30};
    char *path = NULL;
    XKV_TRY(xkv_join_path(ctx, store->path, name, &path));
    xkv_status status = xkv_index_open(ctx, path, &o, index);
    xkv_release(ctx, path);
    return status;
}

/* Counters go on from those of the old index; without it the cap comes from the properties. */
static xkv_status begin_new(repair *r)
{
    xkv_meta meta = {0}, fresh = {.next_id = 1, .next_node = 1, .byte_cap = r->store->properties.byte_cap};
    bool lock_there;
    xkv_status status = xkv_store_check_index(r->ctx, r->store->folders.root, &lock_there);
    if (status == XKV_ERROR_IO)
        return status;
    if (status != XKV_OK || open_path(r->ctx, r->store, "index", true, &r->old) != XKV_OK ||
        xkv_index_get_meta(r->ctx, r->old, &meta) != XKV_OK) {
        xkv_logf(r->ctx, XKV_LOG_WARNING, "%s: the old index cannot be read: %s", r->store->path,
                 xkv_ctx_error(r->ctx));
        xkv_index_close(r->ctx, r->old);
        r->old = NULL;
    } else {
        r->report.kept_uses = 1;
        fresh = meta;
        fresh.next_node = 1;
        fresh.bytes = fresh.entries = fresh.pinned = fresh.namespaces = fresh.dictionaries = 0;
    }
    xkv_ctx_begin(r->ctx);
    XKV_TRY(xkv_folder_list(r->ctx, r->store->folders.blobs, note_id, r));
    r->next_id = fresh.next_id = xkv_max64(fresh.next_id, r->next_id);
    XKV_TRY(make_new(r->ctx, r->store->folders.root));
    XKV_TRY(open_path(r->ctx, r->store, "index.new", false, &r->store->index));
    return xkv_index_put_meta(r->ctx, r->store->index, &fresh);
}

/* Entries that extend others come after these: as many passes as the longest line has entries, and one to put aside
 * what is left. */
static xkv_status take_extending(repair *r)
{
    xkv_meta meta;
    uint64_t before = 0;
    r->extends = true;
    do {
        XKV_TRY(xkv_index_get_meta(r->ctx, r->store->index, &meta));
        r->last = meta.entries == before;
        before = meta.entries;
        XKV_TRY(xkv_folder_list(r->ctx, r->store->folders.blobs, take_blob, r));
    } while (!r->last);
    return XKV_OK;
}

static xkv_status rebuild(repair *r)
{
    xkv_meta meta;
    XKV_TRY(begin_new(r));
    XKV_TRY(xkv_folder_list(r->ctx, r->store->folders.temp, drop_temp, r));
    r->kind = XKV_BLOB_DICT; /* first, to count what uses them */
    XKV_TRY(xkv_folder_list(r->ctx, r->store->folders.blobs, take_blob, r));
    r->kind = XKV_BLOB_ENTRY;
    XKV_TRY(xkv_folder_list(r->ctx, r->store->folders.blobs, take_blob, r));
    XKV_TRY(take_extending(r));
    XKV_TRY(xkv_index_get_meta(r->ctx, r->store->index, &meta));
    r->store->properties.byte_cap = meta.byte_cap;
    r->report.entries = meta.entries;
    r->report.dictionaries = meta.dictionaries;
    return XKV_OK;
}

static xkv_status compact(repair *r)
{
    xkv_meta meta;
    char *path = NULL;
    bool lock_there;
    XKV_TRY(xkv_store_check_index(r->ctx, r->store->folders.root, &lock_there));
    XKV_TRY(open_path(r->ctx, r->store, "index", true, &r->old));
    XKV_TRY(xkv_index_get_meta(r->ctx, r->old, &meta));
    XKV_TRY(make_new(r->ctx, r->store->folders.root));
    XKV_TRY(xkv_join_path(r->ctx, r->store->path, "index.new", &path));
    xkv_status status = xkv_index_copy(r->ctx, r->old, path);
    xkv_release(r->ctx, path);
    r->report = (xkv_repair_report){.entries = meta.entries, .dictionaries = meta.dictionaries, .kept_uses = 1};
    return status;
}

static xkv_status recover_properties(repair *r, const uint8_t *key)
{
    xkv_logf(r->ctx, XKV_LOG_WARNING, "%s: its properties are made anew: %s", r->store->path, xkv_ctx_error(r->ctx));
    xkv_ctx_begin(r->ctx);
    XKV_TRY(xkv_properties_recover(r->ctx, r->store, key, &r->store->properties));
    xkv_logf(r->ctx, XKV_LOG_INFO, "%s: blocks of %u tokens, as its blobs show", r->store->path,
             r->store->properties.block_tokens);
    return XKV_OK;
}

static xkv_status run(repair *r, const char *path, const uint8_t *key, int compact_only)
{
    bool alone = false, lost = false;
    XKV_TRY(xkv_store_open_folders(r->ctx, path, true, compact_only ? NULL : &lost, r->store, &alone));
    r->report.lost_properties = lost;
    if (lost)
        XKV_TRY(recover_properties(r, key));
    XKV_TRY(xkv_store_take_key(r->ctx, r->store, key));
    xkv_status status = compact_only ? compact(r) : rebuild(r);
    if (status == XKV_OK && lost)
        status = xkv_properties_write(r->ctx, r->store->folders.root, &r->store->properties);
    xkv_index_close(r->ctx, r->old);
    xkv_index_close(r->ctx, r->store->index);
    r->store->index = NULL;
    if (status == XKV_OK)
        status = exchange(r->ctx, r->store->folders.root);
    else
        remove_new(r->store->folders.root);
    return status;
}

xkv_status xkv_store_repair(xkv_ctx *ctx, const char *path, const uint8_t *key, int compact_only,
                            xkv_repair_report *report)
{
    repair r = {.ctx = ctx};
    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_store_alloc(ctx, path, &r.store));
    xkv_status status = pthread_mutex_init(&r.store->mutex, NULL) == 0 ? XKV_OK : XKV_ERROR_MEMORY;
    if (status == XKV_OK)
        status = run(&r, path, key, compact_only);
    xkv_store_close_folders(r.store);
    xkv_store_forget_key(r.store);
    pthread_mutex_destroy(&r.store->mutex);
    xkv_release(ctx, r.store);
    if (status == XKV_OK && report != NULL)
        *report = r.report;
    return status;
}
