/* remote_fetch.c - what the folder does not have is looked for in the remote, checked, and stored. */
#include "remote.h"

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

/* A blob that has arrived in a temporary file, as what it holds. */
typedef struct arrived {
    xkv_blob_writer file;
    xkv_input raw, plain, payload;
    xkv_sealed sealed;
    xkv_window window;
    xkv_blob_head head;
} arrived;

/* Fetch an object of `limit` bytes at most. End it by xkv_blob_end(), also after an error. */
static xkv_status receive(const fetch *f, const char *name, uint64_t limit, arrived *a)
{
    XKV_TRY(xkv_blob_begin(f->ctx, &f->store->folders, NULL, 0, 0, NULL, &a->file));
    xkv_request q = {.kind = XKV_REQUEST_GET, .name = name, .limit = limit, .fd = a->file.fd};
    XKV_TRY(xkv_remote_run(f->ctx, f->remote, &q, f->deadline));
    if (ftruncate(a->file.fd, (off_t)q.size) != 0) /* a failed attempt may have written more */
        return xkv_fail(f->ctx, XKV_ERROR_IO, "cannot shorten a temporary file");
    return xkv_blob_file(f->ctx, &a->file.fd, &a->raw);
}

static xkv_status open_arrived(const fetch *f, arrived *a)
{
    XKV_TRY(xkv_blob_plain(f->ctx, f->store->key, &a->raw, &a->sealed, &a->plain));
    XKV_TRY(xkv_blob_read_head(f->ctx, &a->plain, &a->head));
    a->payload = xkv_input_window(&a->window, &a->plain, a->head.payload_offset, a->head.payload_size);
    return XKV_OK;
}

/* --- Dictionaries ------------------------------------------------------------------------------------------------- */

/* The id follows from what a dictionary holds, so that none can be passed off as another. */
static xkv_status check_dict(const fetch *f, const arrived *a, const uint8_t id[16])
{
    xkv_dict_info info;
    if (a->head.kind != XKV_BLOB_DICT)
        return xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it is no dictionary [SR5]");
    XKV_TRY(xkv_dict_read_info(f->ctx, &a->payload, &info));
    return memcmp(info.id, id, 16) == 0 ? XKV_OK
                                        : xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it is another dictionary [SR5]");
}

static xkv_status take_dict(const fetch *f, const char *name, const uint8_t id[16], arrived *a)
{
    XKV_TRY(receive(f, name, f->remote->o.object_bytes, a));
    XKV_TRY(open_arrived(f, a));
    XKV_TRY(check_dict(f, a, id));
    return xkv_store_put_dict(f->ctx, f->store, &a->payload, NULL);
}

/* The dictionary that the entry needs, unless it is here. */
static xkv_status fetch_dict(const fetch *f, uint8_t id[16])
{
    arrived a = {.file.fd = -1, .file.plain = -1};
    xkv_dict_record record;
    if (xkv_all_zero(id, 16))
        return XKV_OK;
    xkv_status status = xkv_index_get_dict(f->ctx, f->store->index, id, &record);
    if (status != XKV_ERROR_NOT_FOUND)
        return status;
    xkv_remote_name name = xkv_remote_dict_name(f->remote, id);
    status = take_dict(f, name.text, id, &a);
    xkv_blob_end(f->ctx, &a.file, false);
    if (is_useless(status))
        note_damage(f, name.text);
    return status;
}

/* --- The entry ---------------------------------------------------------------------------------------------------- */

/* It must begin with the blocks that it was found by. */
static xkv_status check_tokens(const fetch *f, const arrived *a)
{
    uint32_t *theirs = NULL, count = f->prompt->count;
    XKV_TRY(xkv_blob_read_body(f->ctx, &a->plain, &a->head, &count, &theirs, NULL));
    const uint32_t same = xkv_symbols_common(f->prompt->data, f->prompt->count, theirs, count);
    xkv_release(f->ctx, theirs);
    return xkv_symbols_to_tokens(f->prompt->data, same) >= f->tokens
               ? XKV_OK
               : xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it does not begin with the tokens that it was found by [SR5]");
}

static xkv_status check_blob(const fetch *f, arrived *a)
{
    uint8_t hash[32];
    XKV_TRY(xkv_hash_input(f->ctx, &a->raw, hash));
    if (a->raw.size != f->pointer.size || memcmp(hash, f->pointer.hash, 32) != 0)
        return xkv_fail(f->ctx, XKV_ERROR_CHECKSUM, "its size or hash is not that of its name [SR5]");
    XKV_TRY(open_arrived(f, a));
    if (a->head.kind != XKV_BLOB_ENTRY || memcmp(a->head.space, f->ns->id, 32) != 0)
        return xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it is no entry of the namespace [SR5]");
    if (a->head.extends)
        return xkv_fail(f->ctx, XKV_ERROR_CORRUPT, "it extends another entry [SR5]");
    return check_tokens(f, a);
}

static xkv_status take_blob(const fetch *f, const char *name, arrived *a)
{
    xkv_status status = receive(f, name, f->pointer.size, a);
    if (status == XKV_OK)
        status = check_blob(f, a);
    if (is_useless(status))
        note_damage(f, name);
    XKV_TRY(status);
    if (xkv_is_expired(a->head.expires, xkv_store_now(f->store)))
        return XKV_ERROR_NOT_FOUND;
    XKV_TRY(fetch_dict(f, a->head.dict));
    status = xkv_store_import_fetched(f->ctx, f->store, &a->plain);
    if (xkv_is_damage(status))
        note_damage(f, name);
    return status;
}

/* Whether a blob of this size may come in: what would be refused at the end is not begun. */
static bool has_room(const fetch *f)
{
    xkv_meta meta;
    const uint64_t size = f->pointer.size;
    return size <= f->remote->o.object_bytes && xkv_index_get_meta(f->ctx, f->store->index, &meta) == XKV_OK &&
           (meta.byte_cap == 0 || size <= meta.byte_cap);
}

static xkv_status fetch_from(fetch *f, uint32_t first)
{
    arrived a = {.file.fd = -1, .file.plain = -1};
    XKV_TRY(find_longest(f, first));
    if (f->tokens == 0 || !has_room(f))
        return XKV_ERROR_NOT_FOUND;
    xkv_remote_name name = xkv_remote_blob_name(f->pointer.hash);
    xkv_status status = take_blob(f, name.text, &a);
    xkv_blob_end(f->ctx, &a.file, false);
    return status;
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
    return status == XKV_OK;
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
