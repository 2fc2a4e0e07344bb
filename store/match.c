/* match.c - finding the entry that serves the longest prefix, and handing it out. */
#include "entry_internal.h"
#include "store_internal.h"

#include <stdio.h>
#include <unistd.h>

#define ATTEMPTS 8 /* damaged or vanished entries that one lookup steps over */

/* An entry of a hit. */
typedef struct part {
    xkv_item item;
    int fd; /* of the blob; its lock keeps it from eviction */
    xkv_blob blob;
    xkv_entry *entry;      /* NULL until asked for */
    xkv_cached_dict *dict; /* NULL: none needed, or not loaded yet */
} part;

struct xkv_hit {
    xkv_store *store;
    uint32_t tokens; /* matched */
    bool look_only;  /* nothing goes into quarantine */
    bool rejected;
    bool spared; /* it could not be opened for want of a dictionary or of a newer program: no entry is to blame */
    uint32_t count;
    part parts[]; /* [count] the entry, the one that it extends, and so on */
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
    xkv_item line[XKV_LINE_MAX]; /* [count] the entry, the one that it extends, and so on */
    int fds[XKV_LINE_MAX];       /* their blobs; open when the reason is FOUND */
    uint32_t count, bad;         /* bad: the one that is to blame for a miss */
    bool has_dicts;              /* whether the dictionaries they need are there */
    bool rows_only;  /* rows are wanted, of whichever tokens: also those of entries that can only be restored whole */
    uint32_t common; /* leading tokens that the best entry shares with the prompt, also when they are of no use */
    xkv_match match;
    uint64_t declined[ATTEMPTS]; /* entries that are of no use and stay: others may serve in their place */
    uint32_t declined_count;
    xkv_match best; /* the first of them; its reason 0: none */
} lookup;

/* --- In the index ------------------------------------------------------------------------------------------------- */

/* Whether the dictionary that the entry needs is there, too. */
static xkv_status find_need(xkv_txn *txn, lookup *l, const xkv_item *item)
{
    xkv_dict_record dict;
    if (!xkv_item_needs_dict(item))
        return XKV_OK;
    xkv_status status = xkv_txn_get_dict(txn, item->dict, &dict);
    l->has_dicts = l->has_dicts && status == XKV_OK;
    return status == XKV_ERROR_NOT_FOUND || status == XKV_ERROR_CORRUPT ? XKV_OK : status; /* no fault of the entry */
}

/* The entry that line[count - 1] extends. */
static xkv_status find_parent(xkv_txn *txn, lookup *l)
{
    const xkv_item *child = &l->line[l->count - 1];
    xkv_item *parent = &l->line[l->count];
    if (l->count == XKV_LINE_MAX)
        return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_CORRUPT, "more than %d entries extend each other [SE3]",
                        XKV_LINE_MAX);
    xkv_status status = xkv_txn_get_item(txn, child->parent, parent);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_CORRUPT, "entry %llu extends entry %llu, which is not there [SE1]",
                        (unsigned long long)child->id, (unsigned long long)child->parent);
    XKV_TRY(status);
    l->count++;
    return xkv_line_check(xkv_txn_ctx(txn), child, parent);
}

/* What the found entry needs: those that it extends, and dictionaries. */
static xkv_status find_needs(xkv_txn *txn, lookup *l)
{
    l->count = 1;
    l->has_dicts = true;
    XKV_TRY(find_need(txn, l, &l->line[0]));
    while (l->line[l->count - 1].parent != 0) {
        XKV_TRY(find_parent(txn, l));
        XKV_TRY(find_need(txn, l, &l->line[l->count - 1]));
    }
    return XKV_OK;
}

static xkv_status get_found(xkv_txn *txn, lookup *l, uint64_t id)
{
    l->match.id = id;
    xkv_status status = xkv_txn_get_item(txn, id, &l->line[0]);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_CORRUPT, "entry %llu has no record [SI4]", (unsigned long long)id);
    XKV_TRY(status);
    if (memcmp(l->line[0].space, l->ns->id, 32) != 0)
        return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_CORRUPT, "entry %llu is of another namespace [SI4]",
                        (unsigned long long)id);
    return XKV_OK;
}

/* If nothing else is found, the first entry in the way is the reason. */
static void note_best(lookup *l, uint32_t reason)
{
    if (l->best.reason == XKV_MATCH_FOUND)
        l->best = (xkv_match){
            .reason = reason, .entry_tokens = l->line[0].tokens, .id = l->match.id, .bytes = l->line[0].file_size};
}

/* What a lookup that may write would remove, one that may not steps over. */
static xkv_status serves(xkv_txn *txn, void *user, uint64_t id, uint32_t most, bool *yes)
{
    lookup *l = user;
    *yes = false;
    for (uint32_t i = 0; i < l->declined_count; i++) {
        if (l->declined[i] == id)
            return XKV_OK;
    }
    XKV_TRY(get_found(txn, l, id));
    const bool expired = l->store->read_only && xkv_is_expired(l->line[0].expires, l->now);
    const bool longer = !l->rows_only && l->line[0].whole_only && l->line[0].symbols > most;
    *yes = !expired && !longer;
    if (*yes)
        return XKV_OK;
    note_best(l, expired ? XKV_MATCH_EXPIRED : XKV_MATCH_WHOLE_ONLY);
    l->match.id = 0; /* what goes wrong from here on is not its fault */
    return XKV_OK;
}

static xkv_status find_by_symbols(xkv_txn *txn, void *user)
{
    lookup *l = user;
    xkv_space space;
    XKV_TRY(xkv_txn_get_space(txn, l->ns->id, &space));
    XKV_TRY(xkv_trie_find_serving(txn, space.root, l->symbols, l->symbol_count, serves, l));
    return find_needs(txn, l);
}

/* An entry that serves and has page i, and how many tokens that stands for; both are as they were when there is none.
 */
static xkv_status find_page(xkv_txn *txn, lookup *l, uint32_t i, uint64_t *id, uint32_t *tokens)
{
    uint8_t hash[16], value[XKV_VALUE_MAX];
    xkv_key key;
    xkv_page_hash(l->ns->id, l->keys[i], hash);
    xkv_key at = xkv_key_page(hash, 0);
    for (bool yes = false; !yes;) {
        l->match.id = 0; /* no entry is to blame for a page key */
        XKV_TRY(xkv_txn_next(txn, &at, 17, &key, value));
        XKV_TRY(serves(txn, l, xkv_key_u64(&key, 17), UINT32_MAX, &yes));
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
    XKV_TRY(get_found(txn, l, id));
    return find_needs(txn, l);
}

/* --- In the blob -------------------------------------------------------------------------------------------------- */

/* Compare the prompt with the tokens that were stored. */
static xkv_status compare(xkv_ctx *ctx, lookup *l, const xkv_blob *b)
{
    uint32_t *theirs = NULL, count = l->symbol_count;
    XKV_TRY(xkv_blob_read_body(ctx, &b->file, &b->head, &count, &theirs, NULL));
    uint32_t same = xkv_symbols_common(l->symbols, l->symbol_count, theirs, count);
    xkv_release(ctx, theirs);
    l->match.tokens = xkv_symbols_to_tokens(l->symbols, same);
    return XKV_OK;
}

static xkv_status examine(xkv_ctx *ctx, lookup *l)
{
    xkv_blob b;
    XKV_TRY(xkv_blob_read(ctx, l->store->key, &l->fds[0], &b));
    XKV_TRY(xkv_item_check_head(ctx, &l->line[0], &b.head));
    return l->symbols != NULL ? compare(ctx, l, &b) : XKV_OK;
}

/* Close the first `count` blobs. */
static void close_blobs(lookup *l, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        close(l->fds[i]);
}

/* Open the blobs of all entries, which keeps them from eviction. NOT_FOUND without a message: `bad` is gone. */
static xkv_status open_blobs(xkv_ctx *ctx, lookup *l)
{
    for (l->bad = 0; l->bad < l->count; l->bad++) {
        xkv_blob_name name = xkv_blob_name_of(l->line[l->bad].blob, l->line[l->bad].id);
        xkv_status status = xkv_blob_open(ctx, &l->store->folders, &name, true, &l->fds[l->bad]);
        if (status != XKV_OK) {
            close_blobs(l, l->bad);
            return status;
        }
    }
    l->bad = 0;
    return XKV_OK;
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
    if (!xkv_is_expired(item.expires, l->now))
        return XKV_OK;
    meta->expirations++;
    return xkv_entry_remove(txn, meta, &item, &change->removed, -1);
}

/* The blob is gone and the record still there: a removal is under way, or somebody has deleted the file. */
static bool is_missing(xkv_ctx *ctx, const lookup *l)
{
    xkv_blob_name name = xkv_blob_name_of(l->line[l->bad].blob, l->line[l->bad].id);
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
            xkv_store_quarantine(ctx, l->store, l->line[l->bad].id, "its blob is missing"); /* unless its record went */
        *again = decline(l);
        return XKV_OK;
    case XKV_MATCH_NO_DICTIONARY:
    case XKV_MATCH_NEWER:
    case XKV_MATCH_WHOLE_ONLY:
        *again = decline(l);
        return XKV_OK;
    default:
        return status;
    }
}

/* What the status of the search means; what is wrong with the machine is no reason for a miss, and none is given. */
static uint32_t reason_of(xkv_status status, const lookup *l)
{
    if (status == XKV_ERROR_NOT_FOUND)
        return XKV_MATCH_NONE;
    if (xkv_is_damage(status))
        return XKV_MATCH_CORRUPT;
    if (status != XKV_OK)
        return XKV_MATCH_FOUND;
    if (xkv_is_expired(l->line[0].expires, l->now))
        return XKV_MATCH_EXPIRED;
    return l->has_dicts ? XKV_MATCH_FOUND : XKV_MATCH_NO_DICTIONARY;
}

/* Bytes of the entry's blob, and of its share of those that it extends. */
static uint64_t packed_share(const lookup *l)
{
    double bytes = 0;
    for (uint32_t i = 0, end = l->line[0].tokens; i < l->count; end = l->line[i++].base_tokens) {
        const xkv_item *item = &l->line[i];
        if (item->tokens <= item->base_tokens)
            continue;
        bytes += (double)item->file_size * (end - item->base_tokens) / (item->tokens - item->base_tokens);
    }
    return (uint64_t)bytes;
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
    store->pending.bytes_reused += xkv_item_raw_share(&hit->parts[0].item, tokens);
    pthread_mutex_unlock(&store->mutex);
    xkv_pending_use(store, hit->parts[0].item.id, now);
    flush_when_due(ctx, store, now);
}

/* --- The search --------------------------------------------------------------------------------------------------- */

/* Once: in the index, then in the blobs, which are open when the reason is FOUND. */
static xkv_status attempt(xkv_ctx *ctx, lookup *l, xkv_txn_fn find)
{
    xkv_ctx_begin(ctx); /* what an earlier one met is dealt with */
    l->match = (xkv_match){0};
    memset(&l->line[0], 0, sizeof l->line[0]);
    l->count = l->bad = 0;
    xkv_status status = xkv_index_read(ctx, l->store->index, find, l);
    l->match.reason = reason_of(status, l);
    if (status != XKV_OK || l->match.reason != XKV_MATCH_FOUND)
        return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
    status = open_blobs(ctx, l);
    if (status == XKV_ERROR_NOT_FOUND) {
        l->match.reason = XKV_MATCH_GONE;
        return XKV_OK;
    }
    XKV_TRY(status);
    status = examine(ctx, l);
    if (xkv_is_damage(status))
        l->match.reason = XKV_MATCH_CORRUPT;
    else if (xkv_is_newer(status))
        l->match.reason = XKV_MATCH_NEWER;
    else if (status == XKV_OK && l->match.tokens < l->min_tokens)
        l->match.reason = XKV_MATCH_SHORT;
    else if (status == XKV_OK && l->line[0].whole_only && !l->rows_only && l->match.tokens < l->line[0].tokens)
        l->match.reason = XKV_MATCH_WHOLE_ONLY;
    if (l->match.tokens > l->common)
        l->common = l->match.tokens;
    if (status != XKV_OK || l->match.reason != XKV_MATCH_FOUND)
        close_blobs(l, l->count);
    return status;
}

static void note_entry(lookup *l)
{
    l->match.entry_tokens = l->line[0].tokens;
    l->match.whole_only = l->line[0].whole_only;
    l->match.bytes = packed_share(l);
    l->match.raw_bytes = xkv_item_raw_share(&l->line[0], l->match.tokens);
}

static xkv_status search(xkv_ctx *ctx, lookup *l, xkv_txn_fn find)
{
    xkv_status status = XKV_OK;
    bool again = true;
    l->now = xkv_store_now(l->store);
    for (int i = 0; again && i < ATTEMPTS; i++) {
        status = attempt(ctx, l, find);
        again = false;
        if (l->match.reason != XKV_MATCH_FOUND)
            status = settle_miss(ctx, l, status, &again);
    }
    XKV_TRY(status);
    if (l->match.reason != XKV_MATCH_FOUND && l->best.reason != XKV_MATCH_FOUND) {
        l->match = l->best;
        return XKV_OK;
    }
    if (l->match.reason != XKV_MATCH_FOUND)
        l->match.tokens = l->match.keys = 0;
    note_entry(l);
    return XKV_OK;
}

/* Hand the open blobs of what was found to a hit. */
static xkv_status hand_out(xkv_ctx *ctx, lookup *l, xkv_hit **hit_p)
{
    xkv_hit *hit = NULL;
    xkv_status status = xkv_alloc_zero(ctx, 1, sizeof *hit + l->count * sizeof(part), (void **)&hit);
    if (status != XKV_OK) {
        close_blobs(l, l->count);
        return status;
    }
    hit->store = l->store;
    hit->tokens = l->match.tokens;
    hit->count = l->count;
    for (uint32_t i = 0; i < l->count; i++) {
        hit->parts[i].item = l->line[i];
        hit->parts[i].fd = l->fds[i];
    }
    *hit_p = hit;
    return XKV_OK;
}

/* The same if one is wanted. */
static xkv_status make_hit(xkv_ctx *ctx, lookup *l, xkv_hit **hit_p)
{
    bool found = l->match.reason == XKV_MATCH_FOUND;
    if (hit_p != NULL && found)
        return hand_out(ctx, l, hit_p);
    if (found)
        close_blobs(l, l->count);
    if (hit_p != NULL)
        *hit_p = NULL;
    return XKV_OK;
}

/* Search here, and when that does not give the whole prompt, in the remote. */
static xkv_status search_everywhere(xkv_ctx *ctx, lookup *l, xkv_txn_fn find)
{
    const xkv_symbols prompt = {.data = l->symbols, .count = l->symbol_count, .tokens = l->token_count};
    XKV_TRY(search(ctx, l, find));
    if (l->symbols == NULL || l->match.reason == XKV_MATCH_NEWER ||
        !xkv_remote_fetch(ctx, l->store, l->ns, &prompt, l->common))
        return XKV_OK;
    if (l->match.reason == XKV_MATCH_FOUND)
        close_blobs(l, l->count);
    return search(ctx, l, find);
}

static xkv_status finish(xkv_ctx *ctx, lookup *l, xkv_txn_fn find, xkv_match *match, xkv_hit **hit_p)
{
    XKV_TRY(search_everywhere(ctx, l, find));
    XKV_TRY(make_hit(ctx, l, hit_p));
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
    XKV_TRY(xkv_txn_get_item(txn, l->match.id, &l->line[0]));
    bool own = l->ns == NULL || memcmp(l->line[0].space, l->ns->id, 32) == 0;
    return own ? find_needs(txn, l) : XKV_ERROR_NOT_FOUND;
}

/* The blobs are open when the reason is FOUND. */
static xkv_status get(xkv_ctx *ctx, lookup *l)
{
    const uint64_t id = l->match.id;
    bool again;
    l->now = xkv_store_now(l->store);
    xkv_status status = xkv_index_read(ctx, l->store->index, find_by_id, l);
    if (status == XKV_OK) {
        l->match.reason = reason_of(status, l);
        if (l->match.reason != XKV_MATCH_FOUND)
            return settle_miss(ctx, l, status, &again);
        status = open_blobs(ctx, l);
    }
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(ctx, status, "there is no entry %llu in the namespace", (unsigned long long)id);
    if (status == XKV_OK) {
        status = examine(ctx, l);
        if (status == XKV_OK)
            return XKV_OK;
        close_blobs(l, l->count);
    }
    if (xkv_is_damage(status) && l->line[0].id != 0)
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
    XKV_TRY(xkv_store_begin(ctx, store));
    XKV_TRY(get(ctx, &l));
    if (l.match.reason == XKV_MATCH_FOUND)
        l.match.tokens = l.line[0].tokens;
    note_entry(&l);
    XKV_TRY(make_hit(ctx, &l, hit_p));
    *match = l.match;
    return XKV_OK;
}

xkv_status xkv_store_look(xkv_ctx *ctx, xkv_store *store, uint64_t id, xkv_hit **hit_p)
{
    lookup l = {.store = store, .match.id = id};
    XKV_TRY(xkv_index_read(ctx, store->index, find_by_id, &l));
    XKV_TRY(open_blobs(ctx, &l));
    l.match.tokens = l.line[0].tokens;
    XKV_TRY(hand_out(ctx, &l, hit_p));
    (*hit_p)->look_only = true;
    return XKV_OK;
}

xkv_status xkv_store_nearest(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const uint32_t *symbols,
                             uint32_t count, uint32_t *tokens, xkv_hit **hit_p)
{
    lookup l = {
        .store = store, .ns = ns, .symbols = symbols, .symbol_count = count, .min_tokens = 1, .rows_only = true};
    XKV_TRY(search(ctx, &l, find_by_symbols));
    *tokens = l.match.tokens;
    return make_hit(ctx, &l, hit_p);
}

/* --- Hits --------------------------------------------------------------------------------------------------------- */

/* The entry's share of a dictionary in memory. */
static xkv_status attach_dict(xkv_ctx *ctx, xkv_hit *hit, part *p)
{
    xkv_entry_info info;
    xkv_entry_get_info(p->entry, &info);
    if (!info.needs_dict)
        return XKV_OK;
    xkv_status status = xkv_store_use_dict(ctx, hit->store, info.dictionary_id, hit->look_only, &p->dict);
    hit->spared = status != XKV_OK;
    XKV_TRY(status);
    return xkv_entry_attach(ctx, p->entry, p->dict->dict);
}

/* Let the entry begin with rows of the one that it extends, which is open. */
static xkv_status extend_part(xkv_ctx *ctx, part *p, const part *parent)
{
    xkv_blob_link link;
    uint8_t *bytes = NULL;
    XKV_TRY(xkv_blob_read_link(ctx, &p->blob.file, &p->blob.head, &link, &bytes));
    xkv_status status = xkv_line_match_link(ctx, &p->item, &link, &parent->item);
    if (status == XKV_OK)
        status = xkv_entry_extend(ctx, p->entry, parent->entry, link.base, link.fram, link.fram_size);
    xkv_release(ctx, bytes);
    return status;
}

/* Open parts[i], after those that it extends. */
static xkv_status open_part(xkv_ctx *ctx, xkv_hit *hit, uint32_t i, bool attach)
{
    part *p = &hit->parts[i];
    XKV_TRY(xkv_blob_read(ctx, hit->store->key, &p->fd, &p->blob));
    XKV_TRY(xkv_item_check_head(ctx, &p->item, &p->blob.head));
    XKV_TRY(xkv_entry_open(ctx, &p->blob.payload, &p->entry));
    if (p->item.parent != 0)
        XKV_TRY(extend_part(ctx, p, p + 1));
    if (xkv_entry_geometry(p->entry)->token_count < p->item.tokens)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: more tokens than its entry has rows [SB6]");
    return attach ? attach_dict(ctx, hit, p) : XKV_OK;
}

/* A payload that asks for a newer program and is not what was written is damaged. */
static xkv_status check_newer(xkv_ctx *ctx, xkv_hit *hit, const part *p, xkv_status status)
{
    XKV_TRY(xkv_blob_check_hash(ctx, &p->blob.raw, p->item.blob));
    hit->spared = true;
    return status;
}

static void close_entries(xkv_ctx *ctx, xkv_hit *hit)
{
    for (uint32_t i = 0; i < hit->count; i++) {
        part *p = &hit->parts[i];
        xkv_entry_close(ctx, p->entry);
        xkv_store_leave_dict(hit->store, p->dict);
        p->entry = NULL;
        p->dict = NULL;
    }
}

static xkv_status open_entries(xkv_ctx *ctx, xkv_hit *hit, bool attach)
{
    xkv_status status = XKV_OK;
    for (uint32_t i = hit->count; status == XKV_OK && i-- > 0;) {
        status = open_part(ctx, hit, i, attach);
        if (xkv_is_newer(status) && !hit->spared)
            status = check_newer(ctx, hit, &hit->parts[i], status);
    }
    if (status != XKV_OK)
        close_entries(ctx, hit);
    return status;
}

xkv_status xkv_hit_entry(xkv_ctx *ctx, xkv_hit *hit, const xkv_entry **entry_p)
{
    XKV_TRY(xkv_store_begin(ctx, hit->store));
    if (hit->parts[0].entry == NULL)
        XKV_TRY(open_entries(ctx, hit, true));
    *entry_p = hit->parts[0].entry;
    return XKV_OK;
}

xkv_status xkv_hit_examine(xkv_ctx *ctx, xkv_hit *hit, const xkv_entry **entry_p)
{
    XKV_TRY(open_entries(ctx, hit, false));
    *entry_p = hit->parts[0].entry;
    return XKV_OK;
}

const xkv_item *xkv_hit_item(const xkv_hit *hit, uint32_t i)
{
    return i < hit->count ? &hit->parts[i].item : NULL;
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

/* Which of the entries is not what was written; the first one when all are, so that it cannot be them. */
static const xkv_item *find_damaged(xkv_ctx *ctx, const xkv_hit *hit)
{
    for (uint32_t i = hit->count; i-- > 1;) {
        const part *p = &hit->parts[i];
        xkv_input raw;
        if (xkv_blob_file(ctx, &p->fd, &raw) == XKV_OK &&
            xkv_blob_check_hash(ctx, &raw, p->item.blob) == XKV_ERROR_CHECKSUM)
            return &p->item;
    }
    return &hit->parts[0].item;
}

void xkv_hit_reject(xkv_ctx *ctx, xkv_hit *hit)
{
    char why[256];
    if (hit->rejected || hit->spared || hit->look_only)
        return;
    hit->rejected = true;
    snprintf(why, sizeof why, "%s", xkv_ctx_error(ctx));
    xkv_store_quarantine(ctx, hit->store, find_damaged(ctx, hit)->id, why);
}

void xkv_hit_close(xkv_ctx *ctx, xkv_hit *hit)
{
    if (hit == NULL)
        return;
    close_entries(ctx, hit);
    for (uint32_t i = 0; i < hit->count; i++)
        close(hit->parts[i].fd);
    xkv_release(ctx, hit);
}
