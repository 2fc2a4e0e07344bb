/* remote_fetch.c - what the folder does not have is looked for in the remote, checked, and stored. */
#include "remote.h"

#include <stdio.h>
#include <unistd.h>

/* One lookup in the remote. */
typedef struct fetch {
    xkv_ctx *ctx;
    xkv_store *store;
    xkv_remote *remote;
    const xkv_namespace *ns;
    const xkv_symbols *prompt;
    xkv_page_key *keys; /* [key_count] of the prompt */
    uint32_t key_count;
    uint64_t deadline;
    xkv_pointer pointer; /* of the longest run of blocks that was found */
    uint32_t tokens;     /* in it; 0: nothing was found */
    uint64_t room;       /* bytes that may still be fetched for it */
    bool stored;         /* an entry, be it one that another was to extend */
    xkv_hit *here;       /* an entry of the folder that one of the fetched ones extends; NULL: none */
    bool alone;          /* none of the folder fits */
} fetch;

/* --- The longest prefix that it has ------------------------------------------------------------------------------- */

/* Say that an object is not what it should be; it counts as not there. */
static void note_damage(const fetch *f, const char *name)
{
    xkv_remote_count(f->remote, &f->remote->stats.damaged, 1);
    xkv_logf(f->ctx, XKV_LOG_WARNING, "the remote's object %s is of no use: %s", name, xkv_ctx_error(f->ctx));
}

/* Errors that mean: the object is not what it should be, or was made by a newer program. */
static bool is_useless(xkv_status status)
{
    return xkv_is_damage(status) || xkv_is_newer(status) || status == XKV_ERROR_LIMIT || status == XKV_ERROR_MISMATCH ||
           status == XKV_ERROR_UNSUPPORTED;
}

/* The index object of run i, if it is there: *found. */
static xkv_status ask(fetch *f, uint32_t i, bool *found)
{
    uint8_t bytes[XKV_POINTER_SIZE];
    xkv_remote_name name = xkv_remote_index_name(f->remote, f->keys[i].key);
    xkv_request q = {.kind = XKV_REQUEST_GET, .name = name.text, .limit = sizeof bytes, .fd = -1, .bytes = bytes};
    xkv_pointer pointer = {0};
    *found = false;
    xkv_status status = xkv_remote_run(f->ctx, f->remote, &q, f->deadline);
    if (status == XKV_ERROR_NOT_FOUND)
        return XKV_OK;
    if (status == XKV_OK)
        status = xkv_pointer_decode(f->ctx, bytes, q.size, &pointer);
    if (is_useless(status)) {
        note_damage(f, name.text);
        return XKV_OK;
    }
    XKV_TRY(status);
    *found = true;
    f->pointer = pointer;
    f->tokens = f->keys[i].tokens;
    return XKV_OK;
}

/* Whoever has a run of blocks has all that it begins with, so that most misses are one request, and a hit a few. */
static xkv_status find_longest(fetch *f, uint32_t first)
{
    uint32_t low = first + 1, high = f->key_count;
    bool found;
    XKV_TRY(ask(f, first, &found));
    if (!found)
        return XKV_OK;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        XKV_TRY(ask(f, middle, &found));
        if (found)
            low = middle + 1;
        else
            high = middle;
    }
    return XKV_OK;
}

/* --- Blobs -------------------------------------------------------------------------------------------------------- */

/* A blob that has arrived in a temporary file. */
typedef struct arrived {
    xkv_blob_writer file;
    xkv_blob blob;
    xkv_blob_link link; /* if it extends another one */
    uint8_t *link_bytes;
} arrived;

/* A dictionary that was stored for the entries that are fetched. */
typedef struct added_dict {
    uint8_t id[16];
    uint64_t added;
} added_dict;

/* Fetch an object of `limit` bytes at most. End it by forget(), also after an error. */
static xkv_status receive(const fetch *f, const char *name, uint64_t limit, arrived *a)
{
    XKV_TRY(xkv_blob_begin(f->ctx, &f->store->folders, NULL, 0, 0, NULL, &a->file));
    xkv_request q = {.kind = XKV_REQUEST_GET, .name = name, .limit = limit, .fd = a->file.fd};
    XKV_TRY(xkv_remote_run(f->ctx, f->remote, &q, f->deadline));
    if (ftruncate(a->file.fd, (off_t)q.size) != 0) /* a failed attempt may have written more */
        return xkv_fail(f->ctx, XKV_ERROR_IO, "cannot shorten a temporary file");
    return XKV_OK;
}

static void forget(const fetch *f, arrived *a)
{
    xkv_release(f->ctx, a->link_bytes);
    xkv_blob_end(f->ctx, &a->file, false);
}

static const arrived nothing = {.file.fd = -1, .file.plain = -1};

/* --- Dictionaries ------------------------------------------------------------------------------------------------- */

/* The id follows from what a dictionary holds, so that none can be passed off as another. */
static xkv_status check_dict(const fetch *f, const arrived *a, const uint8_t id[16])
{
    xkv_dict_info info;
    if (a->blob.head.kind != XKV_BLOB_DICT)
        return xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it is no dictionary [SR5]");
    XKV_TRY(xkv_dict_read_info(f->ctx, &a->blob.payload, &info));
    return memcmp(info.id, id, 16) == 0 ? XKV_OK
                                        : xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it is another dictionary [SR5]");
}

static xkv_status take_dict(const fetch *f, const char *name, arrived *a, added_dict *d)
{
    XKV_TRY(receive(f, name, f->remote->o.object_bytes, a));
    XKV_TRY(xkv_blob_read(f->ctx, f->store->key, &a->file.fd, &a->blob));
    XKV_TRY(check_dict(f, a, d->id));
    return xkv_store_add_dict(f->ctx, f->store, &a->blob.payload, d->id, &d->added);
}

/* The dictionary that the entry needs, unless it is here. */
static xkv_status fetch_dict(const fetch *f, const uint8_t id[16], added_dict *d)
{
    arrived a = nothing;
    xkv_dict_record record;
    d->added = 0;
    if (xkv_all_zero(id, 16))
        return XKV_OK;
    xkv_status status = xkv_index_get_dict(f->ctx, f->store->index, id, &record);
    if (status != XKV_ERROR_NOT_FOUND)
        return status;
    memcpy(d->id, id, 16);
    xkv_remote_name name = xkv_remote_dict_name(f->remote, id);
    status = take_dict(f, name.text, &a, d);
    forget(f, &a);
    if (is_useless(status))
        note_damage(f, name.text);
    return status;
}

/* No entry came after all: the dictionary was stored for nothing. */
static void drop_dict(const fetch *f, const added_dict *d)
{
    if (d->added == 0)
        return;
    xkv_ctx_begin(f->ctx);
    if (xkv_store_drop_dict(f->ctx, f->store, d->id, d->added) != XKV_OK)
        xkv_logf(f->ctx, XKV_LOG_WARNING, "%s: a dictionary that no entry needs stays: %s", f->store->path,
                 xkv_ctx_error(f->ctx));
}

/* --- One entry ---------------------------------------------------------------------------------------------------- */

/* Symbols of an arrived entry: all, or the first *count. */
static xkv_status read_symbols(const fetch *f, const arrived *a, uint32_t *count, uint32_t **symbols)
{
    return xkv_blob_read_body(f->ctx, &a->blob.file, &a->blob.head, count, symbols, NULL);
}

/* It must begin with the blocks that it was found by. */
static xkv_status check_tokens(const fetch *f, const arrived *a)
{
    uint32_t *theirs = NULL, count = f->prompt->count;
    XKV_TRY(read_symbols(f, a, &count, &theirs));
    const uint32_t same = xkv_symbols_common(f->prompt->data, f->prompt->count, theirs, count);
    xkv_release(f->ctx, theirs);
    return xkv_symbols_to_tokens(f->prompt->data, same) >= f->tokens
               ? XKV_OK
               : xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it does not begin with the tokens that it was found by [SR5]");
}

static xkv_status open_entry(const fetch *f, const uint8_t hash[32], arrived *a)
{
    xkv_input raw;
    uint8_t own[32];
    XKV_TRY(xkv_blob_file(f->ctx, &a->file.fd, &raw));
    XKV_TRY(xkv_hash_input(f->ctx, &raw, own));
    if (memcmp(own, hash, 32) != 0)
        return xkv_fail(f->ctx, XKV_ERROR_CHECKSUM, "its size or hash is not that of its name [SR5]");
    XKV_TRY(xkv_blob_read(f->ctx, f->store->key, &a->file.fd, &a->blob));
    if (a->blob.head.kind != XKV_BLOB_ENTRY || memcmp(a->blob.head.space, f->ns->id, 32) != 0)
        return xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it is no entry of the namespace [SR5]");
    return a->blob.head.extends ? xkv_blob_read_link(f->ctx, &a->blob.file, &a->blob.head, &a->link, &a->link_bytes)
                                : XKV_OK;
}

/* What was looked for. */
static xkv_status check_found(const fetch *f, const arrived *a)
{
    if (a->blob.raw.size != f->pointer.size)
        return xkv_fail(f->ctx, XKV_ERROR_CHECKSUM, "its size or hash is not that of its name [SR5]");
    XKV_TRY(check_tokens(f, a));
    return xkv_is_expired(a->blob.head.expires, xkv_store_now(f->store)) ? XKV_ERROR_NOT_FOUND : XKV_OK;
}

/* What a child takes from it must be there, and be of the same tokens. */
static xkv_status check_parent(const fetch *f, const arrived *a, const arrived *child)
{
    uint32_t *own = NULL, *theirs = NULL, count = a->blob.head.symbols, child_count = child->blob.head.symbols,
             same = 0;
    const uint32_t base = child->link.base;
    if (a->blob.head.tokens < base || (a->blob.head.extends && a->link.base >= base))
        return xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it does not hold what another takes from it [SE2]");
    xkv_status status = read_symbols(f, a, &count, &own);
    if (status == XKV_OK)
        status = read_symbols(f, child, &child_count, &theirs);
    if (status == XKV_OK)
        same = xkv_symbols_to_tokens(own, xkv_symbols_common(own, count, theirs, child_count));
    xkv_release(f->ctx, own);
    xkv_release(f->ctx, theirs);
    XKV_TRY(status);
    return same >= base ? XKV_OK
                        : xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it has other tokens than one that extends it [SE1]");
}

/* Fetch the entry that the index object named, or with a `child` the one that this extends. */
static xkv_status take_entry(fetch *f, const arrived *child, arrived *a)
{
    const uint8_t *hash = child != NULL ? child->link.blob : f->pointer.hash;
    const xkv_remote_name name = xkv_remote_blob_name(hash);
    xkv_status status = receive(f, name.text, child != NULL ? f->room : f->pointer.size, a);
    if (status == XKV_OK)
        status = open_entry(f, hash, a);
    if (status == XKV_OK)
        status = child == NULL ? check_found(f, a) : check_parent(f, a, child);
    if (is_useless(status) && !(child != NULL && status == XKV_ERROR_LIMIT)) /* a parent may be larger than the room */
        note_damage(f, name.text);
    if (status == XKV_OK)
        f->room -= xkv_min64(f->room, a->blob.raw.size);
    return status;
}

/* --- Entries that extend others ----------------------------------------------------------------------------------- */

/* An entry here whose prompt begins with all tokens that the arrived one takes from another: it serves as well. */
static xkv_status find_here(fetch *f, const arrived *a)
{
    uint32_t *symbols = NULL, count = a->blob.head.symbols, tokens = 0;
    XKV_TRY(read_symbols(f, a, &count, &symbols));
    xkv_status status = xkv_store_nearest(f->ctx, f->store, f->ns, symbols, count, &tokens, &f->here);
    xkv_release(f->ctx, symbols);
    if (status == XKV_OK && tokens < a->link.base) {
        xkv_hit_close(f->ctx, f->here);
        f->here = NULL;
    }
    return status;
}

/* The entry that was found and those that it extends, up to one that is here. All of them must lie in the remote.
 * *count: those that have come before. */
static xkv_status take_line(fetch *f, arrived *line, uint32_t *count)
{
    for (;;) {
        if (*count == XKV_LINE_MAX)
            return xkv_fail(f->ctx, XKV_ERROR_LIMIT, "more than %d entries extend each other [SE3]", XKV_LINE_MAX);
        arrived *a = &line[(*count)++];
        XKV_TRY(take_entry(f, *count > 1 ? a - 1 : NULL, a));
        if (!a->blob.head.extends)
            return XKV_OK;
        if (!f->alone)
            XKV_TRY(find_here(f, a));
        if (f->here != NULL)
            return XKV_OK;
    }
}

/* Store them, from the first one on. */
static xkv_status store_line(fetch *f, const arrived *line, uint32_t count)
{
    xkv_import how = {.before = f->here != NULL ? xkv_hit_item(f->here, 0)->id : 0,
                      .expires = line[0].blob.head.expires,
                      .fetched = true};
    while (count-- > 0) {
        xkv_status status = xkv_store_import_entry(f->ctx, f->store, &line[count].blob.file, &how, &how.before);
        if (xkv_is_damage(status))
            note_damage(f, xkv_remote_blob_name(count > 0 ? line[count - 1].link.blob : f->pointer.hash).text);
        XKV_TRY(status);
        f->stored = true;
    }
    return XKV_OK;
}

/* With the dictionaries that they need. */
static xkv_status store_all(fetch *f, const arrived *line, uint32_t count)
{
    added_dict dicts[XKV_LINE_MAX];
    uint32_t taken = 0;
    xkv_status status = XKV_OK;
    for (; status == XKV_OK && taken < count; taken++)
        status = fetch_dict(f, line[taken].blob.head.dict, &dicts[taken]);
    if (status == XKV_OK)
        status = store_line(f, line, count);
    char why[256];
    snprintf(why, sizeof why, "%s", xkv_ctx_error(f->ctx));
    while (status != XKV_OK && taken-- > 0)
        drop_dict(f, &dicts[taken]);
    return status != XKV_OK && why[0] != '\0' ? xkv_fail(f->ctx, status, "%s", why) : status;
}

static xkv_status take_and_store(fetch *f, arrived *line, uint32_t *count)
{
    XKV_TRY(take_line(f, line, count));
    return store_all(f, line, *count);
}

/* An entry here was chosen by its tokens. Its rows may still be others (planes, positions); those that the remote has
 * for it are not. */
static bool does_not_fit(const fetch *f, xkv_status status)
{
    return f->here != NULL && !f->stored && is_useless(status);
}

static xkv_status fetch_line(fetch *f)
{
    arrived *line = NULL;
    uint32_t count = 0;
    XKV_TRY(XKV_NEW(f->ctx, XKV_LINE_MAX, &line));
    for (uint32_t i = 0; i < XKV_LINE_MAX; i++)
        line[i] = nothing;
    xkv_status status = take_and_store(f, line, &count);
    if (does_not_fit(f, status)) {
        xkv_hit_close(f->ctx, f->here);
        f->here = NULL;
        f->alone = true;
        xkv_ctx_begin(f->ctx);
        status = take_and_store(f, line, &count);
    }
    for (uint32_t i = 0; i < count; i++)
        forget(f, &line[i]);
    xkv_release(f->ctx, line);
    xkv_hit_close(f->ctx, f->here);
    return status;
}

/* Whether a blob of this size may come in: what would be refused at the end is not begun. */
static bool has_room(fetch *f)
{
    xkv_meta meta;
    if (xkv_index_get_meta(f->ctx, f->store->index, &meta) != XKV_OK)
        return false;
    f->room = xkv_min64(f->remote->o.object_bytes, meta.byte_cap > 0 ? meta.byte_cap : UINT64_MAX);
    return f->pointer.size <= f->room;
}

static xkv_status fetch_from(fetch *f, uint32_t first)
{
    XKV_TRY(find_longest(f, first));
    return f->tokens > 0 && has_room(f) ? fetch_line(f) : XKV_ERROR_NOT_FOUND;
}

/* What the lookup came to. */
static bool conclude(const fetch *f, xkv_status status)
{
    xkv_remote *r = f->remote;
    xkv_remote_count(r, status == XKV_OK ? &r->stats.hits : &r->stats.misses, 1);
    if (status == XKV_OK)
        xkv_logf(f->ctx, XKV_LOG_INFO, "%s: stored an entry from the remote, %llu bytes", f->store->path,
                 (unsigned long long)f->pointer.size);
    else if (status != XKV_ERROR_NOT_FOUND)
        xkv_logf(f->ctx, XKV_LOG_DEBUG, "%s: nothing from the remote: %s", f->store->path, xkv_ctx_error(f->ctx));
    xkv_ctx_begin(f->ctx); /* no lookup fails because of it */
    return f->stored;
}

bool xkv_remote_fetch(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const xkv_symbols *prompt, uint32_t have)
{
    fetch f = {.ctx = ctx, .store = store, .remote = store->remote, .ns = ns, .prompt = prompt};
    if (store->remote == NULL || have >= prompt->tokens)
        return false;
    if (xkv_remote_is_down(store->remote)) {
        xkv_remote_count(store->remote, &store->remote->stats.skipped, 1);
        return false;
    }
    const uint32_t block = store->properties.block_tokens;
    f.key_count = (uint32_t)xkv_ceil_div(prompt->tokens, block);
    f.deadline = xkv_remote_now(store->remote) + store->remote->o.lookup_ms;
    xkv_status status = XKV_NEW(ctx, f.key_count, &f.keys);
    if (status == XKV_OK) {
        xkv_chain_keys(ns, prompt, block, f.keys);
        status = fetch_from(&f, have / block);
        xkv_release(ctx, f.keys);
    }
    return conclude(&f, status);
}
