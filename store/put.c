/* put.c - storing: entries, planes, dictionaries, exported files. */
#include "entry_internal.h"
#include "put_parent.h"

#include <fcntl.h>
#include <unistd.h>

/* One put, from the prompt to the commit. */
typedef struct put {
    xkv_store *store;
    const xkv_put_options *o;
    const uint32_t *symbols;   /* of the prompt */
    const xkv_page_key *names; /* [item.names] */
    xkv_item item;
    xkv_put_report report;
    xkv_blob_writer writer;
    xkv_parent parent; /* the entry that it will extend, if there is one */
    bool fetched;      /* it comes from the remote */
} put;

/* --- Checks ------------------------------------------------------------------------------------------------------- */

static xkv_status begin_put(xkv_ctx *ctx, const xkv_store *store, const xkv_put_options *given, xkv_put_options *o)
{
    XKV_TRY(xkv_store_begin_change(ctx, store));
    XKV_TRY(xkv_copy_options(ctx, given, o, sizeof *o));
    if (o->ttl > UINT64_MAX / 4000000u)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a ttl of %llu s", (unsigned long long)o->ttl);
    if (o->key_count > 0 && o->keys == NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "keys are NULL");
    return XKV_OK;
}

static xkv_status check_names(xkv_ctx *ctx, const xkv_put_options *o, uint32_t tokens)
{
    for (uint32_t i = 0, last = 0; i < o->key_count; last = o->keys[i++].tokens) {
        if (o->keys[i].tokens <= last || o->keys[i].tokens > tokens)
            return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "page key %u stands for %u tokens, after one for %u, of %u", i,
                            o->keys[i].tokens, last, tokens);
    }
    return XKV_OK;
}

static xkv_status check_rows(xkv_ctx *ctx, const xkv_geometry *g)
{
    return g->plane_count > 0 && g->token_count > 0
               ? XKV_OK
               : xkv_fail(ctx, XKV_ERROR_UNSUPPORTED,
                          "the entry holds no rows of tokens: only its whole would be of use");
}

/* The prompt must be that of the entry: not more tokens than rows, and the same where the entry knows them. */
static xkv_status check_prompt(xkv_ctx *ctx, const xkv_geometry *g, const xkv_prompt *prompt)
{
    XKV_TRY(check_rows(ctx, g));
    if (prompt->token_count > g->token_count)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "the prompt has %u tokens, the entry %u rows", prompt->token_count,
                        g->token_count);
    for (uint32_t i = 0; i < prompt->token_count && i < g->token_id_count; i++) {
        if (prompt->tokens[i] != g->token_ids[i])
            return xkv_fail(ctx, XKV_ERROR_MISMATCH, "token %u of the prompt is %d, in the entry %d", i,
                            (int)prompt->tokens[i], (int)g->token_ids[i]);
    }
    return XKV_OK;
}

static xkv_prompt prompt_of(const xkv_geometry *g)
{
    uint32_t count = g->token_id_count < g->token_count ? g->token_id_count : g->token_count;
    return (xkv_prompt){.tokens = g->token_ids, .token_count = count};
}

/* --- The very prompt is there already ----------------------------------------------------------------------------- */

static xkv_status renew(xkv_txn *txn, xkv_meta *meta, put *p, const xkv_item *before)
{
    xkv_item after = *before;
    after.used = xkv_max64(before->used, p->item.created);
    after.pinned = before->pinned || p->o->pin;
    after.expires = xkv_later_expiry(before->expires, p->item.expires);
    p->report.id = before->id;
    p->report.existed = 1;
    p->report.bytes = before->file_size;
    return xkv_entry_change(txn, meta, before, &after);
}

/* Whether the entry has the page keys that are put. */
static xkv_status has_names(xkv_txn *txn, const put *p, const xkv_item *before, bool *has)
{
    *has = p->item.names <= before->names;
    for (uint32_t i = 0; *has && i < p->item.names; i++) {
        xkv_key name = xkv_key_pair(XKV_TABLE_NAMES, before->id, i);
        uint8_t hash[16], theirs[16];
        xkv_page_hash(p->item.space, p->names[i].key, hash);
        xkv_status status = xkv_txn_get(txn, &name, theirs, sizeof theirs);
        *has = status == XKV_OK && memcmp(hash, theirs, sizeof hash) == 0; /* a damaged record has none */
        if (status != XKV_ERROR_CORRUPT)
            XKV_TRY(status);
    }
    return XKV_OK;
}

/* What takes the place of an entry stays pinned and lives as long. */
static void inherit(put *p, const xkv_item *before)
{
    p->item.pinned = before->pinned || p->o->pin;
    p->item.expires = xkv_later_expiry(before->expires, p->item.expires);
}

/* The entry of this very prompt by the tree, where the record of its key is damaged; that is made right. */
static xkv_status find_by_tree(xkv_txn *txn, const put *p, const xkv_key *key, xkv_item *item)
{
    xkv_space space;
    uint64_t id = 0;
    XKV_TRY(xkv_txn_get_space(txn, p->item.space, &space));
    XKV_TRY(xkv_trie_find(txn, space.root, p->symbols, p->item.symbols, &id));
    XKV_TRY(xkv_txn_get_item(txn, id, item));
    return memcmp(item->key, p->item.key, 32) == 0 ? xkv_txn_put_u64(txn, key, id) : XKV_ERROR_NOT_FOUND;
}

/* The entry of this very prompt. NOT_FOUND without a message. */
static xkv_status find_same(xkv_txn *txn, const put *p, xkv_item *item)
{
    const xkv_key key = xkv_key_bytes(XKV_TABLE_KEY, p->item.key, 32);
    uint64_t id = 0;
    xkv_status status = xkv_txn_get_u64(txn, &key, &id);
    if (status == XKV_ERROR_CORRUPT)
        return find_by_tree(txn, p, &key, item);
    XKV_TRY(status);
    return xkv_txn_get_item(txn, id, item);
}

/* Sets report.existed. An entry that is expired makes room; so does one without the page keys, when there is one to
 * take its place: page keys lie in the blob. */
static xkv_status renew_existing(xkv_txn *txn, xkv_meta *meta, put *p, xkv_removed *removed, bool replace)
{
    bool has = true;
    xkv_item before;
    p->report.existed = 0;
    xkv_status status = find_same(txn, p, &before);
    if (status == XKV_ERROR_NOT_FOUND)
        return XKV_OK;
    XKV_TRY(status);
    xkv_blob_name name = xkv_blob_name_of(before.blob, before.id);
    bool expired = xkv_is_expired(before.expires, p->item.created);
    bool there = faccessat(p->store->folders.blobs, name.text, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
    if (!expired && there)
        XKV_TRY(has_names(txn, p, &before, &has));
    has = has || before.children > 0; /* what extends it would go with it */
    if (!expired && there && has)
        return renew(txn, meta, p, &before);
    if (!has && !replace)
        return XKV_OK;
    if (!has)
        inherit(p, &before);
    meta->expirations += expired;
    return xkv_entry_remove(txn, meta, &before, removed, -1);
}

static xkv_status find_body(xkv_txn *txn, void *user)
{
    put *p = user;
    xkv_key key = xkv_key_bytes(XKV_TABLE_KEY, p->item.key, 32);
    xkv_status status = xkv_txn_get_u64(txn, &key, &p->report.id);
    return status == XKV_ERROR_CORRUPT ? XKV_OK : status; /* the change that follows makes it right */
}

static xkv_status renew_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    return renew_existing(txn, meta, change->user, &change->removed, false);
}

/* Before anything is packed. */
static xkv_status try_existing(xkv_ctx *ctx, put *p)
{
    xkv_change change = {.store = p->store, .body = renew_body, .user = p};
    xkv_status status = xkv_index_read(ctx, p->store->index, find_body, p);
    if (status == XKV_ERROR_NOT_FOUND)
        return XKV_OK;
    XKV_TRY(status);
    return xkv_store_change(ctx, &change);
}

/* --- The commit --------------------------------------------------------------------------------------------------- */

static xkv_status check_dict(xkv_txn *txn, const xkv_item *item)
{
    xkv_dict_record dict;
    if (!xkv_item_needs_dict(item))
        return XKV_OK;
    xkv_status status = xkv_txn_get_dict(txn, item->dict, &dict);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_MISMATCH, "the dictionary of the entry is not in the store");
    return status;
}

static xkv_status commit_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    put *p = change->user;
    XKV_TRY(renew_existing(txn, meta, p, &change->removed, true));
    if (p->report.existed)
        return XKV_OK;
    XKV_TRY(check_dict(txn, &p->item));
    XKV_TRY(xkv_expire(txn, meta, p->item.created, XKV_BATCH, &change->removed));
    XKV_TRY(xkv_evict(txn, meta, change, p->item.file_size));
    if (change->again)
        return XKV_OK;
    p->report.evicted_entries = (uint32_t)(change->evicted_count + change->removed.evicted);
    p->report.evicted_bytes = change->evicted_bytes + change->removed.evicted_bytes;
    p->item.id = meta->next_id++;
    memcpy(p->item.blob, p->writer.hash, 32);
    XKV_TRY(xkv_blob_publish(xkv_txn_ctx(txn), &p->writer, p->item.id));
    change->blobs_synced = true;
    xkv_status status = xkv_entry_insert(txn, meta, p->store, p->symbols, p->names, &p->item, &change->quarantine);
    p->parent.gone = status == XKV_ERROR_NOT_FOUND;
    if (p->parent.gone)
        return xkv_fail(xkv_txn_ctx(txn), status, "entry %llu, which it extends, was removed meanwhile",
                        (unsigned long long)p->item.parent);
    XKV_TRY(status);
    p->report.id = p->item.id;
    p->report.bytes = p->item.file_size;
    meta->puts++;
    return p->fetched ? XKV_OK : xkv_remote_queue(txn, p->store, &p->item);
}

static void head_of(const xkv_item *item, xkv_blob_head *head)
{
    *head = (xkv_blob_head){
        .kind = XKV_BLOB_ENTRY,
        .tokens = item->tokens,
        .symbols = item->symbols,
        .names = item->names,
        .created = item->created,
        .expires = item->expires,
        .raw_bytes = item->raw_bytes,
        .whole_only = item->whole_only != 0,
    };
    memcpy(head->dict, item->dict, 16);
    memcpy(head->space, item->space, 32);
    memcpy(head->key, item->key, 32);
}

static xkv_status begin_blob(xkv_ctx *ctx, put *p)
{
    const xkv_blob_link *link = p->parent.hit != NULL ? &p->parent.link : NULL;
    p->item.parent = p->report.parent = link != NULL ? link->parent : 0;
    p->item.base_tokens = p->report.base_tokens = link != NULL ? link->base : 0;
    return xkv_blob_begin(ctx, &p->store->folders, p->store->key, p->item.symbols, p->item.names, link, &p->writer);
}

/* The payload is written: complete the blob and commit it. */
static xkv_status commit(xkv_ctx *ctx, put *p)
{
    xkv_change change = {.store = p->store, .body = commit_body, .user = p};
    xkv_blob_head head;
    head_of(&p->item, &head);
    XKV_TRY(xkv_blob_finish(ctx, &p->writer, &head, p->symbols, p->names));
    p->item.file_size = head.file_size;
    XKV_TRY(xkv_store_change(ctx, &change));
    xkv_remote_wake(p->store);
    return XKV_OK;
}

/* What the entry in the payload says of itself. */
static void note_entry(const xkv_entry *entry, xkv_item *item)
{
    xkv_entry_info info;
    xkv_entry_get_info(entry, &info);
    item->raw_bytes = info.raw_bytes;
    if (info.needs_dict)
        memcpy(item->dict, info.dictionary_id, 16);
}

/* Whether first tokens of the engine's file can be restored too; what has none is read by rows. */
static xkv_status note_cuts(xkv_ctx *ctx, put *p, const xkv_framing *framing, const xkv_geometry *g)
{
    if (framing != NULL)
        XKV_TRY(xkv_framing_is_whole_only(ctx, framing, g, &p->item.whole_only));
    xkv_ctx_begin(ctx); /* the reason is no error of the put */
    return XKV_OK;
}

/* Everything of the item that follows from the prompt. */
static void note_prompt(put *p, const xkv_namespace *ns, const xkv_symbols *symbols)
{
    xkv_item *item = &p->item;
    p->symbols = symbols->data;
    p->names = p->o->keys;
    item->tokens = p->report.tokens = symbols->tokens;
    item->symbols = symbols->count;
    item->names = p->o->key_count;
    item->pinned = p->o->pin != 0;
    item->created = item->used = xkv_store_now(p->store);
    item->expires = p->o->ttl > 0 ? item->created + p->o->ttl * 1000000u : 0;
    memcpy(item->space, ns->id, 32);
    xkv_chain_last(ns, symbols, p->store->properties.block_tokens, item->key);
}

/* --- A packed entry ----------------------------------------------------------------------------------------------- */

static xkv_status copy_and_commit(xkv_ctx *ctx, put *p, const xkv_input *entry)
{
    XKV_TRY(begin_blob(ctx, p));
    xkv_output output = xkv_blob_output(&p->writer);
    xkv_status status = xkv_input_copy(ctx, entry, &output);
    if (status == XKV_OK)
        status = commit(ctx, p);
    xkv_blob_end(ctx, &p->writer, status == XKV_OK && !p->report.existed);
    return status;
}

static xkv_status put_opened(xkv_ctx *ctx, put *p, const xkv_namespace *ns, const xkv_prompt *prompt,
                             const xkv_input *input, const xkv_entry *entry)
{
    const xkv_geometry *g = xkv_entry_geometry(entry);
    xkv_prompt own = prompt_of(g);
    xkv_symbols symbols = {0};
    if (prompt == NULL)
        prompt = &own;
    XKV_TRY(check_prompt(ctx, g, prompt));
    XKV_TRY(check_names(ctx, p->o, prompt->token_count));
    XKV_TRY(xkv_symbols_make(ctx, prompt, &symbols));
    note_prompt(p, ns, &symbols);
    note_entry(entry, &p->item);
    xkv_status status = note_cuts(ctx, p, xkv_entry_framing(entry), g);
    if (status == XKV_OK)
        status = try_existing(ctx, p);
    if (status == XKV_OK && !p->report.existed)
        status = copy_and_commit(ctx, p, input);
    xkv_symbols_free(ctx, &symbols);
    return status;
}

xkv_status xkv_store_put(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const xkv_prompt *prompt,
                         const xkv_input *entry, const xkv_put_options *options, xkv_put_report *report)
{
    xkv_put_options o = xkv_put_options_default();
    put p = {.store = store, .o = &o};
    xkv_entry *opened = NULL;
    XKV_TRY(begin_put(ctx, store, options, &o));
    XKV_TRY(xkv_entry_open(ctx, entry, &opened));
    xkv_status status = put_opened(ctx, &p, ns, prompt, entry, opened);
    xkv_entry_close(ctx, opened);
    if (status == XKV_OK && report != NULL)
        *report = p.report;
    return status;
}

/* --- Planes ------------------------------------------------------------------------------------------------------- */

typedef struct planes {
    const xkv_geometry *geometry;
    const xkv_view *views;
    const xkv_framing *framing;
    const void *source;
    uint64_t source_size;
} planes;

/* Whether the dictionary that would be packed with is there, before the work is done. */
static xkv_status check_dict_body(xkv_txn *txn, void *user)
{
    return check_dict(txn, user);
}

static xkv_status check_pack_dict(xkv_ctx *ctx, const put *p)
{
    xkv_item wanted = {0};
    xkv_dict_info info;
    if (p->o->pack == NULL || p->o->pack->dict == NULL)
        return XKV_OK;
    xkv_dict_get_info(p->o->pack->dict, &info);
    memcpy(wanted.dict, info.id, 16);
    return xkv_index_read(ctx, p->store->index, check_dict_body, &wanted);
}

/* Pack all rows, or those that follow the parent's. */
static xkv_status pack_rows(xkv_ctx *ctx, put *p, const planes *from)
{
    xkv_output output = xkv_blob_output(&p->writer);
    if (p->parent.hit != NULL)
        return xkv_parent_pack_rest(ctx, &p->parent, from->geometry, from->views, p->o->pack, &output, &p->report.pack);
    return xkv_pack(ctx, from->geometry, from->views, from->framing, from->source, from->source_size, p->o->pack,
                    &output, &p->report.pack);
}

static xkv_status pack_payload(xkv_ctx *ctx, put *p, const planes *from)
{
    xkv_entry *entry = NULL;
    XKV_TRY(pack_rows(ctx, p, from));
    xkv_input payload = xkv_blob_payload(&p->writer);
    XKV_TRY(xkv_entry_open(ctx, &payload, &entry));
    note_entry(entry, &p->item);
    p->item.raw_bytes = xkv_geometry_raw_bytes(from->geometry);
    xkv_entry_close(ctx, entry);
    return XKV_OK;
}

static xkv_status pack_and_commit(xkv_ctx *ctx, put *p, const planes *from)
{
    memset(p->item.dict, 0, sizeof p->item.dict);
    XKV_TRY(begin_blob(ctx, p));
    xkv_status status = pack_payload(ctx, p, from);
    if (status == XKV_OK)
        status = commit(ctx, p);
    xkv_blob_end(ctx, &p->writer, status == XKV_OK && !p->report.existed);
    return status;
}

/* Extend what is stored. All rows are needed after all when that is removed before the commit, or leaves no room under
 * the cap, where it would have been evicted for the whole. */
static xkv_status pack_rest_or_all(xkv_ctx *ctx, put *p, const xkv_namespace *ns, const planes *from)
{
    XKV_TRY(check_pack_dict(ctx, p));
    if (p->o->whole == 0)
        XKV_TRY(xkv_parent_find(ctx, p->store, ns, &p->item, p->symbols, from->geometry, p->o->pack, &p->parent));
    xkv_status status = XKV_OK;
    if (p->parent.hit != NULL && from->framing != NULL)
        status =
            xkv_parent_set_framing(ctx, &p->parent, from->geometry, from->framing, from->source, from->source_size);
    if (status == XKV_OK)
        status = pack_and_commit(ctx, p, from);
    bool again = p->parent.gone || (p->parent.hit != NULL && status == XKV_ERROR_LIMIT);
    xkv_parent_leave(ctx, &p->parent);
    if (!again)
        return status;
    xkv_ctx_begin(ctx);
    return pack_and_commit(ctx, p, from);
}

static xkv_status put_planes(xkv_ctx *ctx, put *p, const xkv_namespace *ns, const xkv_prompt *prompt,
                             const planes *from)
{
    xkv_prompt own = prompt_of(from->geometry);
    xkv_symbols symbols = {0};
    if (prompt == NULL)
        prompt = &own;
    XKV_TRY(check_prompt(ctx, from->geometry, prompt));
    XKV_TRY(check_names(ctx, p->o, prompt->token_count));
    XKV_TRY(xkv_symbols_make(ctx, prompt, &symbols));
    note_prompt(p, ns, &symbols);
    xkv_status status = note_cuts(ctx, p, from->framing, from->geometry);
    if (status == XKV_OK)
        status = try_existing(ctx, p);
    if (status == XKV_OK && !p->report.existed)
        status = pack_rest_or_all(ctx, p, ns, from);
    xkv_symbols_free(ctx, &symbols);
    return status;
}

xkv_status xkv_store_put_planes(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const xkv_prompt *prompt,
                                const xkv_geometry *geometry, const xkv_view *views, const xkv_framing *framing,
                                const void *source, uint64_t source_size, const xkv_put_options *options,
                                xkv_put_report *report)
{
    const planes from = {geometry, views, framing, source, source_size};
    xkv_put_options o = xkv_put_options_default();
    put p = {.store = store, .o = &o};
    XKV_TRY(begin_put(ctx, store, options, &o));
    XKV_TRY(put_planes(ctx, &p, ns, prompt, &from));
    if (report != NULL)
        *report = p.report;
    return XKV_OK;
}

/* --- Exported files ----------------------------------------------------------------------------------------------- */

/* Decode all of an entry that comes from elsewhere. */
static xkv_status verify_foreign(xkv_ctx *ctx, xkv_store *store, xkv_entry *entry)
{
    xkv_cached_dict *dict = NULL;
    xkv_entry_info info;
    xkv_status status = XKV_OK;
    xkv_entry_get_info(entry, &info);
    if (info.needs_dict) {
        XKV_TRY(xkv_store_use_dict(ctx, store, info.dictionary_id, false, &dict));
        status = xkv_entry_attach(ctx, entry, dict->dict);
    }
    if (status == XKV_OK)
        status = xkv_entry_verify(ctx, entry, NULL, NULL);
    xkv_store_leave_dict(store, dict);
    return status;
}

/* The same checks as for a prompt that is put. */
static xkv_status check_foreign(xkv_ctx *ctx, const xkv_geometry *g, const xkv_symbols *symbols)
{
    uint32_t token = 0;
    XKV_TRY(check_rows(ctx, g));
    if (g->token_count < symbols->tokens)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: more tokens than its entry has rows [SB6]");
    for (uint32_t i = 0; i < symbols->count && token < g->token_id_count;) {
        if (symbols->data[i] == XKV_MEDIA_MARKER) {
            i += XKV_MEDIA_SYMBOLS;
            continue;
        }
        if (symbols->data[i] != (uint32_t)g->token_ids[token])
            return xkv_fail(ctx, XKV_ERROR_MISMATCH, "token %u of the prompt is %u, in the entry %d", token,
                            symbols->data[i], (int)g->token_ids[token]);
        token++;
        i++;
    }
    return XKV_OK;
}

/* A blob of an exported file. */
typedef struct exported {
    const xkv_input *file;
    xkv_blob_head head;
    uint32_t *symbols;
    xkv_page_key *names;
    xkv_window window;
    xkv_input payload;
} exported;

static xkv_status read_exported(xkv_ctx *ctx, exported *e)
{
    uint32_t count = e->head.symbols;
    XKV_TRY(xkv_blob_read_body(ctx, e->file, &e->head, &count, &e->symbols, &e->names));
    e->payload = xkv_input_window(&e->window, e->file, e->head.payload_offset, e->head.payload_size);
    return XKV_OK;
}

/* What it extends is the entry that came before it in the file, by whatever id that has here, or one that this extends
 * in turn. */
static xkv_status find_imported_parent(xkv_ctx *ctx, put *p, const exported *e, uint64_t before)
{
    xkv_hit *hit = NULL;
    xkv_blob_link link;
    XKV_TRY(xkv_blob_read_link(ctx, e->file, &e->head, &link, &p->parent.fram));
    xkv_status status = xkv_store_look(ctx, p->store, before, &hit);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "the file does not have the entry that another one extends [SB9]");
    XKV_TRY(status);
    XKV_TRY(xkv_parent_take(ctx, hit, link.base, &p->parent));
    p->parent.link.fram = link.fram;
    p->parent.link.fram_size = link.fram_size;
    p->item.parent = p->parent.link.parent;
    p->item.base_tokens = link.base;
    return xkv_line_check_link(ctx, p->store, &p->item, e->symbols, &p->parent.link, p->parent.item);
}

static xkv_status check_entry(xkv_ctx *ctx, put *p, xkv_entry *entry, const xkv_symbols *symbols)
{
    const xkv_blob_link *link = &p->parent.link;
    note_entry(entry, &p->item);
    if (p->parent.hit != NULL)
        XKV_TRY(xkv_entry_extend(ctx, entry, p->parent.entry, link->base, link->fram, link->fram_size));
    p->item.raw_bytes = xkv_geometry_raw_bytes(xkv_entry_geometry(entry));
    XKV_TRY(check_foreign(ctx, xkv_entry_geometry(entry), symbols));
    XKV_TRY(note_cuts(ctx, p, xkv_entry_framing(entry), xkv_entry_geometry(entry)));
    return verify_foreign(ctx, p->store, entry);
}

/* An entry. */
static xkv_status import_entry(xkv_ctx *ctx, put *p, const exported *e, const xkv_import *how)
{
    xkv_namespace ns;
    const xkv_symbols symbols = {.data = e->symbols, .count = e->head.symbols, .tokens = e->head.tokens};
    xkv_entry *entry = NULL;
    memcpy(ns.id, e->head.space, 32);
    note_prompt(p, &ns, &symbols);
    p->item.expires = xkv_later_expiry(e->head.expires, how->expires);
    XKV_TRY(xkv_entry_open(ctx, &e->payload, &entry));
    xkv_status status = e->head.extends ? find_imported_parent(ctx, p, e, how->before) : XKV_OK;
    if (status == XKV_OK)
        status = check_entry(ctx, p, entry, &symbols);
    xkv_entry_close(ctx, entry);
    XKV_TRY(status);
    XKV_TRY(try_existing(ctx, p));
    return p->report.existed ? XKV_OK : copy_and_commit(ctx, p, &e->payload);
}

/* An entry, with its tokens and page keys. */
static xkv_status import_file(xkv_ctx *ctx, xkv_store *store, exported *e, const xkv_import *how,
                              xkv_put_report *report)
{
    xkv_put_options o = xkv_put_options_default();
    put p = {.store = store, .o = &o, .fetched = how->fetched};
    xkv_status status = read_exported(ctx, e);
    o.keys = e->names;
    o.key_count = e->head.names;
    if (status == XKV_OK)
        status = import_entry(ctx, &p, e, how);
    xkv_parent_leave(ctx, &p.parent);
    xkv_release(ctx, e->symbols);
    xkv_release(ctx, e->names);
    if (status == XKV_OK)
        *report = p.report;
    return status;
}

xkv_status xkv_store_import_entry(xkv_ctx *ctx, xkv_store *store, const xkv_input *file, const xkv_import *how,
                                  uint64_t *id)
{
    exported e = {.file = file};
    xkv_put_report report;
    XKV_TRY(xkv_store_begin_change(ctx, store));
    XKV_TRY(xkv_blob_read_head(ctx, file, &e.head));
    XKV_TRY(import_file(ctx, store, &e, how, &report));
    *id = report.id;
    return XKV_OK;
}

/* When the entry that ends at `offset` of a file may expire: not before those that follow and extend it, each the one
 * before. */
static xkv_status find_expiry(xkv_ctx *ctx, const xkv_input *file, uint64_t offset, uint64_t *expires)
{
    for (xkv_blob_head head = {.extends = true}; offset < file->size && head.extends;) {
        xkv_window window;
        xkv_input blob;
        XKV_TRY(xkv_blob_next(ctx, file, offset, &window, &blob));
        XKV_TRY(xkv_blob_read_head(ctx, &blob, &head));
        if (head.extends)
            *expires = xkv_later_expiry(*expires, head.expires);
        offset += blob.size;
    }
    return XKV_OK;
}

/* One of the blobs of a file, which ends at `end`; `report` is that of the entry before it. */
static xkv_status import_blob(xkv_ctx *ctx, xkv_store *store, const xkv_input *file, const xkv_input *blob,
                              uint64_t end, xkv_put_report *report)
{
    exported e = {.file = blob};
    XKV_TRY(xkv_blob_read_head(ctx, blob, &e.head));
    if (e.head.kind == XKV_BLOB_DICT) {
        e.payload = xkv_input_window(&e.window, blob, e.head.payload_offset, e.head.payload_size);
        return xkv_store_put_dict(ctx, store, &e.payload, NULL);
    }
    xkv_import how = {.before = report->id, .expires = e.head.expires};
    XKV_TRY(find_expiry(ctx, file, end, &how.expires));
    return import_file(ctx, store, &e, &how, report);
}

xkv_status xkv_store_import(xkv_ctx *ctx, xkv_store *store, const xkv_input *file, xkv_put_report *report)
{
    xkv_put_report last = {.id = 0};
    uint64_t offset = 0;
    XKV_TRY(xkv_store_begin_change(ctx, store));
    do {
        xkv_window window;
        xkv_input blob;
        XKV_TRY(xkv_blob_next(ctx, file, offset, &window, &blob));
        offset += blob.size;
        XKV_TRY(import_blob(ctx, store, file, &blob, offset, &last));
    } while (offset < file->size);
    if (last.id == 0)
        return xkv_fail(ctx, XKV_ERROR_FORMAT, "the file holds no entry [SB9]");
    if (report != NULL)
        *report = last;
    return XKV_OK;
}

/* --- Dictionaries ------------------------------------------------------------------------------------------------- */

typedef struct put_dict {
    xkv_store *store;
    xkv_blob_writer writer;
    uint8_t id[16];
    uint64_t file_size;
    bool existed;
    xkv_dict_record record; /* if so */
    uint64_t bad;           /* the record of this blob is as good as none; 0: none */
} put_dict;

static xkv_status find_dict(xkv_txn *txn, void *user)
{
    put_dict *p = user;
    xkv_status status = xkv_txn_get_dict(txn, p->id, &p->record);
    p->existed = status == XKV_OK;
    return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
}

static xkv_status dict_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    put_dict *p = change->user;
    XKV_TRY(find_dict(txn, p));
    if (p->existed && p->record.id != p->bad)
        return XKV_OK;
    XKV_TRY(xkv_evict(txn, meta, change, p->file_size));
    if (change->again)
        return XKV_OK;
    if (p->existed)
        XKV_TRY(xkv_dict_remove(txn, meta, p->id, &p->record, &change->quarantine));
    meta->corrupt += p->existed;
    p->existed = false;
    p->record.id = meta->next_id++;
    XKV_TRY(xkv_blob_publish(xkv_txn_ctx(txn), &p->writer, p->record.id));
    change->blobs_synced = true;
    return xkv_dict_insert(txn, meta, p->id, p->record.id, p->writer.hash, p->file_size);
}

/* Compare what is put, which nobody has checked, with a blob of the store. */
static xkv_status compare_stored(xkv_ctx *ctx, const put_dict *p, const int *fd, const xkv_input *dictionary,
                                 bool *same)
{
    xkv_blob b;
    XKV_TRY(xkv_blob_read(ctx, p->store->key, fd, &b));
    XKV_TRY(xkv_blob_check_hash(ctx, &b.raw, p->record.blob));
    return xkv_input_equal(ctx, &b.payload, dictionary, same);
}

/* One whose blob is missing or damaged is put anew. `same`: the blob holds just what is put. */
static xkv_status check_stored(xkv_ctx *ctx, put_dict *p, const xkv_input *dictionary, bool *same)
{
    xkv_blob_name name = xkv_blob_name_of(p->record.blob, p->record.id);
    int fd = -1;
    xkv_status status = xkv_blob_open(ctx, &p->store->folders, &name, true, &fd);
    if (status == XKV_OK) {
        status = compare_stored(ctx, p, &fd, dictionary, same);
        close(fd);
    }
    if (status != XKV_OK && status != XKV_ERROR_NOT_FOUND && !xkv_is_damage(status))
        return status;
    p->existed = status == XKV_OK;
    p->bad = p->existed ? 0 : p->record.id;
    xkv_ctx_begin(ctx); /* it is put anew */
    return XKV_OK;
}

static xkv_status write_dict(xkv_ctx *ctx, put_dict *p, const xkv_input *dictionary)
{
    xkv_change change = {.store = p->store, .body = dict_body, .user = p};
    xkv_blob_head head = {.kind = XKV_BLOB_DICT, .created = xkv_store_now(p->store)};
    memcpy(head.dict, p->id, 16);
    xkv_output output = xkv_blob_output(&p->writer);
    XKV_TRY(xkv_input_copy(ctx, dictionary, &output));
    XKV_TRY(xkv_blob_finish(ctx, &p->writer, &head, NULL, NULL));
    p->file_size = head.file_size;
    return xkv_store_change(ctx, &change);
}

/* Decode it, so that none gets in that cannot be used, and store it unless one of its id is there. */
static xkv_status add_dict(xkv_ctx *ctx, put_dict *p, const xkv_input *dictionary)
{
    xkv_dict *dict = NULL;
    XKV_TRY(xkv_dict_open(ctx, dictionary, 0, &dict));
    xkv_dict_close(ctx, dict);
    if (p->existed)
        return XKV_OK;
    XKV_TRY(xkv_blob_begin(ctx, &p->store->folders, p->store->key, 0, 0, NULL, &p->writer));
    xkv_status status = write_dict(ctx, p, dictionary);
    xkv_blob_end(ctx, &p->writer, status == XKV_OK && !p->existed);
    return status;
}

xkv_status xkv_store_add_dict(xkv_ctx *ctx, xkv_store *store, const xkv_input *dictionary, uint8_t id[16],
                              uint64_t *added)
{
    put_dict p = {.store = store};
    xkv_dict_info info;
    bool same = false;
    XKV_TRY(xkv_store_begin_change(ctx, store));
    XKV_TRY(xkv_dict_read_info(ctx, dictionary, &info));
    memcpy(p.id, info.id, 16);
    XKV_TRY(xkv_index_read(ctx, store->index, find_dict, &p));
    if (p.existed)
        XKV_TRY(check_stored(ctx, &p, dictionary, &same));
    if (!same)
        XKV_TRY(add_dict(ctx, &p, dictionary));
    memcpy(id, p.id, 16);
    *added = p.existed ? 0 : p.record.id;
    return XKV_OK;
}

xkv_status xkv_store_put_dict(xkv_ctx *ctx, xkv_store *store, const xkv_input *dictionary, uint8_t id[16])
{
    uint8_t own[16];
    uint64_t added;
    return xkv_store_add_dict(ctx, store, dictionary, id != NULL ? id : own, &added);
}

static xkv_status drop_dict_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    const put_dict *p = change->user;
    xkv_dict_record record;
    xkv_status status = xkv_txn_get_dict(txn, p->id, &record);
    if (status == XKV_ERROR_NOT_FOUND || (status == XKV_OK && (record.id != p->record.id || record.users > 0)))
        return XKV_OK;
    XKV_TRY(status);
    return xkv_dict_remove(txn, meta, p->id, &record, &change->removed);
}

xkv_status xkv_store_drop_dict(xkv_ctx *ctx, xkv_store *store, const uint8_t id[16], uint64_t added)
{
    put_dict p = {.record.id = added};
    xkv_change change = {.store = store, .body = drop_dict_body, .user = &p};
    memcpy(p.id, id, 16);
    return xkv_store_change(ctx, &change);
}
