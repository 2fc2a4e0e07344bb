/* match.c - finding the entry that serves the longest prefix, and handing it out. */
#include "store_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#define ATTEMPTS 8 /* damaged or vanished entries that one lookup steps over */

struct xkv_hit {
    xkv_store *store;
    xkv_item item;
    uint32_t tokens; /* matched */
    int fd;          /* of the blob; its lock keeps it from eviction */
    bool look_only;  /* nothing goes into quarantine */
    bool rejected;
    bool spared; /* it could not be opened for want of its dictionary or of a newer program: it is not to blame */
    xkv_input raw, file, payload; /* the blob as it lies there, decrypted, the entry in it */
    xkv_sealed sealed;
    xkv_window window;
    xkv_entry *entry;      /* NULL until asked for */
    xkv_cached_dict *dict; /* NULL: none needed, or not loaded yet */
};

/* One lookup. */
typedef struct lookup {
    xkv_store *store;
    const xkv_namespace *ns;
    const uint32_t *symbols; /* of the prompt */
    uint32_t symbol_count, token_count, min_tokens;
    const uint8_t (*keys)[32]; /* or an engine's keys */
    uint32_t key_count;
    uint64_t now;
    xkv_item item;
    bool has_dict;   /* whether the dictionary it needs is there */
    uint32_t common; /* leading tokens that the best entry shares with the prompt, also when they are too few */
    xkv_match match;
    uint64_t declined[ATTEMPTS]; /* entries that are of no use and stay: others may serve in their place */
    uint32_t declined_count;
    xkv_match best; /* the first of them; its reason 0: none */
} lookup;

/* --- In the index ------------------------------------------------------------------------------------------------- */

/* Whether the dictionary that the entry needs is there. */
static xkv_status find_need(xkv_txn *txn, lookup *l)
{
    xkv_dict_record dict;
    l->has_dict = true;
    if (!xkv_item_needs_dict(&l->item))
        return XKV_OK;
    xkv_status status = xkv_txn_get_dict(txn, l->item.dict, &dict);
    l->has_dict = status == XKV_OK;
    return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
}

static xkv_status get_found(xkv_txn *txn, lookup *l, uint64_t id)
{
    l->match.id = id;
    xkv_status status = xkv_txn_get_item(txn, id, &l->item);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_CORRUPT, "entry %llu has no record [SI4]", (unsigned long long)id);
    XKV_TRY(status);
    if (memcmp(l->item.space, l->ns->id, 32) != 0)
        return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_CORRUPT, "entry %llu is of another namespace [SI4]",
                        (unsigned long long)id);
    return find_need(txn, l);
}

static bool is_expired(const xkv_item *item, uint64_t now)
{
    return item->expires != 0 && item->expires <= now;
}

/* If nothing else is found, the first entry in the way is the reason. */
static void note_best(lookup *l, uint32_t reason)
{
    if (l->best.reason == XKV_MATCH_FOUND)
        l->best = (xkv_match){
            .reason = reason, .entry_tokens = l->item.tokens, .id = l->match.id, .bytes = l->item.file_size};
}

/* What a lookup that may write would remove, one that may not steps over. */
static xkv_status serves(xkv_txn *txn, void *user, uint64_t id, bool *yes)
{
    lookup *l = user;
    *yes = false;
    for (uint32_t i = 0; i < l->declined_count; i++) {
        if (l->declined[i] == id)
            return XKV_OK;
    }
    XKV_TRY(get_found(txn, l, id));
    *yes = !l->store->read_only || !is_expired(&l->item, l->now);
    if (!*yes)
        note_best(l, XKV_MATCH_EXPIRED);
    return XKV_OK;
}

static xkv_status find_by_symbols(xkv_txn *txn, void *user)
{
    lookup *l = user;
    xkv_space space;
    uint64_t id = 0;
    XKV_TRY(xkv_txn_get_space(txn, l->ns->id, &space));
    return xkv_trie_find_serving(txn, space.root, l->symbols, l->symbol_count, serves, l, &id);
}

/* An entry that serves and has page i, and how many tokens that stands for; both are as they were when there is none.
 */
static xkv_status find_page(xkv_txn *txn, lookup *l, uint32_t i, uint64_t *id, uint32_t *tokens)
{
    uint8_t hash[16], value[XKV_VALUE_MAX];
    xkv_key key;
    xkv_page_hash(l->ns->id, l->keys[i], hash);
    xkv_key from = xkv_key_page(hash, 0);
    for (bool yes = false; !yes;) {
        XKV_TRY(xkv_txn_seek(txn, &from, 17, &key, value));
        XKV_TRY(serves(txn, l, xkv_key_u64(&key, 17), &yes));
        from = key;
        from.bytes[from.size++] = 0;
    }
    *id = xkv_key_u64(&key, 17);
    *tokens = (uint32_t)xkv_load64(value);
    return XKV_OK;
}

/* Every entry has all keys up to its last one, so that those which are stored come first: search for where they end. */
static xkv_status find_by_keys(xkv_txn *txn, void *user)
{
    lookup *l = user;
    uint32_t low = 0, high = l->key_count, tokens = 0;
    uint64_t id = 0;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        xkv_status status = find_page(txn, l, middle, &id, &tokens);
        if (status == XKV_ERROR_NOT_FOUND) {
            high = middle;
            continue;
        }
        XKV_TRY(status);
        low = middle + 1;
    }
    if (low == 0)
        return XKV_ERROR_NOT_FOUND;
    l->match.keys = low;
    l->match.tokens = tokens;
    return get_found(txn, l, id);
}

/* --- In the blob -------------------------------------------------------------------------------------------------- */

/* The blob must be the one that the record speaks of. */
static xkv_status check_blob(xkv_ctx *ctx, const xkv_item *item, const xkv_blob_head *head)
{
    if (head->kind != XKV_BLOB_ENTRY || head->file_size != item->file_size || head->symbols != item->symbols ||
        head->tokens != item->tokens || head->names != item->names || memcmp(head->key, item->key, 32) != 0 ||
        memcmp(head->space, item->space, 32) != 0 || memcmp(head->dict, item->dict, 16) != 0)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: it is not what its record says [SB6]");
    return XKV_OK;
}

/* Compare the prompt with the tokens that were stored. */
static xkv_status compare(xkv_ctx *ctx, lookup *l, const xkv_input *file, const xkv_blob_head *head)
{
    uint32_t *theirs = NULL, same = 0, count = l->symbol_count;
    XKV_TRY(xkv_blob_read_body(ctx, file, head, &count, &theirs, NULL));
    uint32_t most = l->symbol_count < count ? l->symbol_count : count;
    while (same < most && theirs[same] == l->symbols[same])
        same++;
    xkv_release(ctx, theirs);
    l->match.tokens = xkv_symbols_to_tokens(l->symbols, same);
    return XKV_OK;
}

static xkv_status examine(xkv_ctx *ctx, lookup *l, const int *fd)
{
    xkv_input raw, file;
    xkv_sealed sealed;
    xkv_blob_head head;
    XKV_TRY(xkv_blob_file(ctx, fd, &raw));
    XKV_TRY(xkv_blob_plain(ctx, l->store->key, &raw, &sealed, &file));
    XKV_TRY(xkv_blob_read_head(ctx, &file, &head));
    XKV_TRY(check_blob(ctx, &l->item, &head));
    return l->symbols != NULL ? compare(ctx, l, &file, &head) : XKV_OK;
}

/* --- Outcomes ----------------------------------------------------------------------------------------------------- */

/* An entry that is expired goes, when this process may write; then a shorter one may serve. Another process may have
 * renewed it since it was found. */
static xkv_status drop_expired(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    const lookup *l = change->user;
    xkv_item item;
    xkv_status status = xkv_txn_get_item(txn, l->match.id, &item);
    if (status != XKV_OK)
        return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
    if (!is_expired(&item, l->now))
        return XKV_OK;
    meta->expirations++;
    return xkv_entry_remove(txn, meta, &item, &change->removed, -1);
}

/* The blob is gone and the record still there: a removal is under way, or somebody has deleted the file. */
static bool is_missing(xkv_ctx *ctx, const lookup *l)
{
    xkv_blob_name name = xkv_blob_name_of(l->item.blob, l->item.id);
    bool locked = false;
    int fd = -1;
    if (xkv_blob_try_lock(ctx, &l->store->folders, &name, &locked, &fd) != XKV_OK)
        return false;
    if (fd >= 0)
        close(fd);
    return locked && fd < 0;
}

/* The entry stays and is of no use to this lookup. True when another one may serve. */
static bool decline(lookup *l)
{
    if (l->match.id == 0 || l->declined_count == ATTEMPTS)
        return false;
    note_best(l, l->match.reason);
    l->declined[l->declined_count++] = l->match.id;
    return true;
}

/* What the search gave is of no use; *again when another try may find another one. */
static xkv_status settle_miss(xkv_ctx *ctx, lookup *l, xkv_status status, bool *again)
{
    xkv_change change = {.store = l->store, .body = drop_expired, .user = l};
    *again = false;
    switch (l->match.reason) {
    case XKV_MATCH_EXPIRED:
        *again = (!l->store->read_only && xkv_store_change(ctx, &change) == XKV_OK) || decline(l);
        return XKV_OK;
    case XKV_MATCH_CORRUPT:
        if (l->match.id != 0)
            xkv_store_quarantine(ctx, l->store, l->match.id, xkv_ctx_error(ctx));
        *again = decline(l);
        return XKV_OK;
    case XKV_MATCH_GONE:
        if (is_missing(ctx, l))
            xkv_store_quarantine(ctx, l->store, l->match.id, "its blob is missing"); /* unless its record went first */
        *again = decline(l);
        return XKV_OK;
    case XKV_MATCH_NO_DICTIONARY:
    case XKV_MATCH_NEWER:
        *again = decline(l);
        return XKV_OK;
    default:
        return status;
    }
}

/* What the status of the search means. */
static uint32_t reason_of(xkv_status status, const lookup *l)
{
    if (status == XKV_ERROR_NOT_FOUND)
        return XKV_MATCH_NONE;
    if (xkv_is_damage(status))
        return XKV_MATCH_CORRUPT;
    if (is_expired(&l->item, l->now))
        return XKV_MATCH_EXPIRED;
    return l->has_dict ? XKV_MATCH_FOUND : XKV_MATCH_NO_DICTIONARY;
}

/* Raw bytes of so many of an entry's tokens. */
static uint64_t raw_share(const xkv_item *item, uint32_t tokens)
{
    return item->tokens == 0 ? 0 : (uint64_t)((double)item->raw_bytes * tokens / item->tokens);
}

/* Other processes evict by the uses that are recorded. */
static void flush_when_due(xkv_ctx *ctx, xkv_store *store, uint64_t now)
{
    if (!store->read_only && xkv_pending_due(store, now) && xkv_store_flush(ctx, store) != XKV_OK)
        xkv_logf(ctx, XKV_LOG_WARNING, "%s: uses were not recorded: %s", store->path, xkv_ctx_error(ctx));
}

static void count_miss(xkv_ctx *ctx, xkv_store *store)
{
    pthread_mutex_lock(&store->mutex);
    store->pending.misses++;
    pthread_mutex_unlock(&store->mutex);
    flush_when_due(ctx, store, xkv_store_now(store));
}

void xkv_hit_count(xkv_ctx *ctx, const xkv_hit *hit, uint32_t tokens)
{
    xkv_store *store = hit->store;
    uint64_t now = xkv_store_now(store);
    pthread_mutex_lock(&store->mutex);
    store->pending.hits++;
    store->pending.tokens_reused += tokens;
    store->pending.bytes_reused += raw_share(&hit->item, tokens);
    pthread_mutex_unlock(&store->mutex);
    xkv_pending_use(store, hit->item.id, now);
    flush_when_due(ctx, store, now);
}

/* --- The search --------------------------------------------------------------------------------------------------- */

/* Once: in the index, then in the blob. *fd is open when the reason is FOUND. */
static xkv_status attempt(xkv_ctx *ctx, lookup *l, xkv_txn_fn find, int *fd)
{
    l->match = (xkv_match){0};
    memset(&l->item, 0, sizeof l->item);
    xkv_status status = xkv_index_read(ctx, l->store->index, find, l);
    l->match.reason = reason_of(status, l);
    if (status != XKV_OK || l->match.reason != XKV_MATCH_FOUND)
        return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
    xkv_blob_name name = xkv_blob_name_of(l->item.blob, l->item.id);
    status = xkv_blob_open(ctx, &l->store->folders, &name, true, fd);
    if (status == XKV_ERROR_NOT_FOUND) {
        l->match.reason = XKV_MATCH_GONE;
        return XKV_OK;
    }
    if (status == XKV_OK)
        status = examine(ctx, l, fd);
    if (xkv_is_damage(status))
        l->match.reason = XKV_MATCH_CORRUPT;
    else if (xkv_is_newer(status))
        l->match.reason = XKV_MATCH_NEWER;
    else if (status == XKV_OK && l->match.tokens < l->min_tokens)
        l->match.reason = XKV_MATCH_SHORT;
    if (status == XKV_OK && l->match.reason == XKV_MATCH_FOUND)
        return XKV_OK;
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    return status;
}

static xkv_status search(xkv_ctx *ctx, lookup *l, xkv_txn_fn find, int *fd)
{
    xkv_status status = XKV_OK;
    bool again = true;
    *fd = -1;
    l->now = xkv_store_now(l->store);
    for (int i = 0; again && i < ATTEMPTS; i++) {
        status = attempt(ctx, l, find, fd);
        again = false;
        if (l->match.reason != XKV_MATCH_FOUND)
            status = settle_miss(ctx, l, status, &again);
    }
    XKV_TRY(status);
    if (l->match.reason != XKV_MATCH_FOUND && l->best.reason != XKV_MATCH_FOUND) {
        l->match = l->best;
        return XKV_OK;
    }
    l->match.entry_tokens = l->item.tokens;
    l->match.bytes = l->item.file_size;
    l->common = l->match.tokens;
    if (l->match.reason != XKV_MATCH_FOUND)
        l->match.tokens = l->match.keys = 0;
    l->match.raw_bytes = raw_share(&l->item, l->match.tokens);
    return XKV_OK;
}

/* Hand the open blob to a hit, if one is wanted. */
static xkv_status make_hit(xkv_ctx *ctx, const lookup *l, int fd, xkv_hit **hit_p)
{
    xkv_hit *hit = NULL;
    xkv_status status = hit_p != NULL && fd >= 0 ? XKV_NEW_ZERO(ctx, 1, &hit) : XKV_OK;
    if (hit == NULL) {
        if (fd >= 0)
            close(fd);
        if (hit_p != NULL && status == XKV_OK)
            *hit_p = NULL;
        return status;
    }
    hit->store = l->store;
    hit->item = l->item;
    hit->tokens = l->match.tokens;
    hit->fd = fd;
    *hit_p = hit;
    return XKV_OK;
}

/* Search here, and when that does not give the whole prompt, in the remote. */
static xkv_status search_everywhere(xkv_ctx *ctx, lookup *l, xkv_txn_fn find, int *fd)
{
    const xkv_symbols prompt = {.data = l->symbols, .count = l->symbol_count, .tokens = l->token_count};
    XKV_TRY(search(ctx, l, find, fd));
    if (l->symbols == NULL || l->match.reason == XKV_MATCH_NEWER ||
        !xkv_remote_fetch(ctx, l->store, l->ns, &prompt, l->common))
        return XKV_OK;
    if (*fd >= 0)
        close(*fd);
    return search(ctx, l, find, fd);
}

static xkv_status finish(xkv_ctx *ctx, lookup *l, xkv_txn_fn find, xkv_match *match, xkv_hit **hit_p)
{
    int fd;
    XKV_TRY(search_everywhere(ctx, l, find, &fd));
    XKV_TRY(make_hit(ctx, l, fd, hit_p));
    if (hit_p != NULL && *hit_p == NULL) /* who only asks misses nothing */
        count_miss(ctx, l->store);
    *match = l->match;
    return XKV_OK;
}

xkv_status xkv_store_find(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const xkv_prompt *prompt,
                          uint32_t min_tokens, xkv_match *match, xkv_hit **hit_p)
{
    xkv_symbols symbols = {0};
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(xkv_symbols_make(ctx, prompt, &symbols));
    lookup l = {.store = store,
                .ns = ns,
                .symbols = symbols.data,
                .symbol_count = symbols.count,
                .token_count = symbols.tokens,
                .min_tokens = min_tokens > 0 ? min_tokens : 1};
    xkv_status status = finish(ctx, &l, find_by_symbols, match, hit_p);
    xkv_symbols_free(ctx, &symbols);
    return status;
}

xkv_status xkv_store_match(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const xkv_prompt *prompt,
                           uint32_t min_tokens, xkv_match *match, xkv_hit **hit_p)
{
    XKV_TRY(xkv_store_find(ctx, store, ns, prompt, min_tokens, match, hit_p));
    if (hit_p != NULL && *hit_p != NULL)
        xkv_hit_count(ctx, *hit_p, match->tokens);
    return XKV_OK;
}

xkv_status xkv_store_match_keys(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const uint8_t (*keys)[32],
                                uint32_t key_count, xkv_match *match, xkv_hit **hit_p)
{
    lookup l = {.store = store, .ns = ns, .keys = keys, .key_count = key_count};
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(finish(ctx, &l, find_by_keys, match, hit_p));
    if (hit_p != NULL && *hit_p != NULL)
        xkv_hit_count(ctx, *hit_p, match->tokens);
    return XKV_OK;
}

static xkv_status find_by_id(xkv_txn *txn, void *user)
{
    lookup *l = user;
    XKV_TRY(xkv_txn_get_item(txn, l->match.id, &l->item));
    return memcmp(l->item.space, l->ns->id, 32) == 0 ? find_need(txn, l) : XKV_ERROR_NOT_FOUND;
}

/* *fd is open when the reason is FOUND. */
static xkv_status get(xkv_ctx *ctx, lookup *l, int *fd)
{
    const uint64_t id = l->match.id;
    bool again;
    l->now = xkv_store_now(l->store);
    xkv_status status = xkv_index_read(ctx, l->store->index, find_by_id, l);
    if (status == XKV_OK) {
        l->match.reason = reason_of(status, l);
        if (l->match.reason != XKV_MATCH_FOUND)
            return settle_miss(ctx, l, status, &again);
        xkv_blob_name name = xkv_blob_name_of(l->item.blob, l->item.id);
        status = xkv_blob_open(ctx, &l->store->folders, &name, true, fd);
    }
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(ctx, status, "there is no entry %llu in the namespace", (unsigned long long)id);
    if (status == XKV_OK)
        status = examine(ctx, l, fd);
    if (status == XKV_OK)
        return XKV_OK;
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    if (xkv_is_damage(status) && l->item.id != 0)
        xkv_store_quarantine(ctx, l->store, id, xkv_ctx_error(ctx));
    if (!xkv_is_newer(status))
        return status;
    l->match.reason = XKV_MATCH_NEWER;
    return XKV_OK;
}

xkv_status xkv_store_get(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, uint64_t id, xkv_match *match,
                         xkv_hit **hit_p)
{
    lookup l = {.store = store, .ns = ns, .match.id = id};
    int fd = -1;
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(get(ctx, &l, &fd));
    l.match.entry_tokens = l.item.tokens;
    l.match.bytes = l.item.file_size;
    if (l.match.reason == XKV_MATCH_FOUND) {
        l.match.tokens = l.item.tokens;
        l.match.raw_bytes = l.item.raw_bytes;
    }
    XKV_TRY(make_hit(ctx, &l, fd, hit_p));
    *match = l.match;
    return XKV_OK;
}

xkv_status xkv_store_look(xkv_ctx *ctx, xkv_store *store, const xkv_item *item, xkv_hit **hit_p)
{
    const lookup l = {.store = store, .item = *item, .match.tokens = item->tokens};
    xkv_blob_name name = xkv_blob_name_of(item->blob, item->id);
    int fd = -1;
    XKV_TRY(xkv_blob_open(ctx, &store->folders, &name, true, &fd));
    XKV_TRY(make_hit(ctx, &l, fd, hit_p));
    (*hit_p)->look_only = true;
    return XKV_OK;
}

/* --- Hits --------------------------------------------------------------------------------------------------------- */

static xkv_status open_entry(xkv_ctx *ctx, xkv_hit *hit)
{
    xkv_blob_head head;
    xkv_entry_info info;
    XKV_TRY(xkv_blob_file(ctx, &hit->fd, &hit->raw));
    XKV_TRY(xkv_blob_plain(ctx, hit->store->key, &hit->raw, &hit->sealed, &hit->file));
    XKV_TRY(xkv_blob_read_head(ctx, &hit->file, &head));
    XKV_TRY(check_blob(ctx, &hit->item, &head));
    hit->payload = xkv_input_window(&hit->window, &hit->file, head.payload_offset, head.payload_size);
    XKV_TRY(xkv_entry_open(ctx, &hit->payload, &hit->entry));
    xkv_entry_get_info(hit->entry, &info);
    if (xkv_entry_geometry(hit->entry)->token_count < hit->item.tokens)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: more tokens than its entry has rows [SB6]");
    if (!info.needs_dict)
        return XKV_OK;
    xkv_status status = xkv_store_use_dict(ctx, hit->store, info.dictionary_id, hit->look_only, &hit->dict);
    hit->spared = status != XKV_OK;
    XKV_TRY(status);
    return xkv_entry_attach(ctx, hit->entry, hit->dict->dict);
}

/* A payload that asks for a newer program and is not what was written is damaged. */
static xkv_status check_newer(xkv_ctx *ctx, xkv_hit *hit, xkv_status status)
{
    uint8_t hash[32];
    XKV_TRY(xkv_blob_hash(ctx, &hit->raw, hash));
    if (memcmp(hash, hit->item.blob, 32) != 0)
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "the SHA-256 of the blob does not match [SB6]");
    hit->spared = true;
    return status;
}

xkv_status xkv_hit_entry(xkv_ctx *ctx, xkv_hit *hit, const xkv_entry **entry_p)
{
    XKV_TRY(xkv_store_begin(ctx, hit->store));
    if (hit->entry == NULL) {
        xkv_status status = open_entry(ctx, hit);
        if (xkv_is_newer(status) && !hit->spared)
            status = check_newer(ctx, hit, status);
        if (status != XKV_OK) {
            xkv_entry_close(ctx, hit->entry);
            xkv_store_leave_dict(hit->store, hit->dict);
            hit->entry = NULL;
            hit->dict = NULL;
            return status;
        }
    }
    *entry_p = hit->entry;
    return XKV_OK;
}

static xkv_status read_planes(xkv_ctx *ctx, xkv_hit *hit, xkv_read_options *o, const xkv_view *views)
{
    const xkv_entry *entry = NULL;
    XKV_TRY(xkv_hit_entry(ctx, hit, &entry));
    if (o->first_token >= hit->tokens || o->token_count > hit->tokens - o->first_token)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "tokens %u + %u of %u matched ones", o->first_token, o->token_count,
                        hit->tokens);
    if (o->token_count == 0)
        o->token_count = hit->tokens - o->first_token;
    return xkv_entry_read(ctx, entry, o, views);
}

xkv_status xkv_hit_read(xkv_ctx *ctx, xkv_hit *hit, const xkv_read_options *options, const xkv_view *views)
{
    xkv_read_options o = xkv_read_options_default();
    XKV_TRY(xkv_store_begin(ctx, hit->store));
    XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    xkv_status status = read_planes(ctx, hit, &o, views);
    if (xkv_is_damage(status))
        xkv_hit_reject(ctx, hit);
    return status;
}

void xkv_hit_reject(xkv_ctx *ctx, xkv_hit *hit)
{
    if (hit->rejected || hit->spared || hit->look_only)
        return;
    hit->rejected = true;
    xkv_store_quarantine(ctx, hit->store, hit->item.id, xkv_ctx_error(ctx));
}

void xkv_hit_close(xkv_ctx *ctx, xkv_hit *hit)
{
    if (hit == NULL)
        return;
    xkv_entry_close(ctx, hit->entry);
    xkv_store_leave_dict(hit->store, hit->dict);
    close(hit->fd);
    xkv_release(ctx, hit);
}
