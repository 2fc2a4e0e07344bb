/* verify_index.c - does every record of the index say what the records it speaks of say? Each is compared with those it
 * names, in the transaction that reads it, so that others may go on changing the store. */
#include "store_internal.h"

#include <stdio.h>

enum { BATCH = 1024 }; /* records looked at in one transaction */

typedef struct walk {
    xkv_records_report *report;
    xkv_key next;
    bool done;
} walk;

static void note(walk *w, const char *what)
{
    w->report->bad++;
    if (w->report->first[0] == '\0')
        snprintf(w->report->first, sizeof w->report->first, "%s", what);
}

/* An entry that a record names. Where its own record is damaged, that is noted with the entries. */
static bool has_item(xkv_txn *txn, uint64_t id, xkv_item *item)
{
    memset(item, 0, sizeof *item);
    return xkv_txn_get_item(txn, id, item) != XKV_ERROR_NOT_FOUND;
}

static bool get_edge(xkv_txn *txn, const xkv_key *key, xkv_edge *edge)
{
    uint8_t value[XKV_EDGE_SIZE];
    if (xkv_txn_get(txn, key, value, sizeof value) != XKV_OK)
        return false;
    xkv_edge_decode(value, edge);
    return true;
}

/* --- Tables ------------------------------------------------------------------------------------------------------- */

static const char *check_key(xkv_txn *txn, const xkv_key *key, const uint8_t *value)
{
    xkv_item item;
    if (!has_item(txn, xkv_load64(value), &item) || (item.id != 0 && memcmp(item.key, key->bytes + 1, 32) != 0))
        return "a native key leads to no entry of that key";
    return NULL;
}

static const char *check_node(xkv_txn *txn, const xkv_key *key, const uint8_t *value)
{
    xkv_node node;
    xkv_edge edge;
    xkv_node_decode(value, &node);
    const xkv_key up = xkv_key_edge(node.parent, node.symbol);
    if (!get_edge(txn, &up, &edge) || edge.child != xkv_key_u64(key, 1))
        return "no edge leads to a node [SI4]";
    return NULL;
}

static const char *check_leaf(xkv_txn *txn, const xkv_key *key, const xkv_edge *edge)
{
    xkv_item item;
    bool at_end = key->size == 9;
    if (!has_item(txn, edge->entry, &item))
        return "an edge leads to an entry that has no record [SI4]";
    if (item.id != 0 && (item.node != xkv_key_u64(key, 1) || (item.at_end != 0) != at_end ||
                         (!at_end && item.symbol != xkv_key_u32(key, 9)) || item.symbols != edge->depth))
        return "an edge leads to an entry whose place is another one [SI4]";
    return NULL;
}

static const char *check_edge(xkv_txn *txn, const xkv_key *key, const uint8_t *value)
{
    xkv_edge edge;
    xkv_node node;
    xkv_item item;
    uint8_t below[XKV_NODE_SIZE];
    xkv_edge_decode(value, &edge);
    if (edge.child == 0)
        return check_leaf(txn, key, &edge);
    const xkv_key down = xkv_key_id(XKV_TABLE_NODE, edge.child);
    if (key->size == 9 || xkv_txn_get(txn, &down, below, sizeof below) != XKV_OK)
        return "an edge leads to a node that has no record [SI4]";
    xkv_node_decode(below, &node);
    if (node.parent != xkv_key_u64(key, 1) || node.symbol != xkv_key_u32(key, 9))
        return "an edge leads to a node that another one leads to [SI4]";
    return has_item(txn, edge.entry, &item) ? NULL : "an edge names an entry that has no record [SI4]";
}

static const char *check_page(xkv_txn *txn, const xkv_key *key, const uint8_t *value)
{
    xkv_item item;
    if (!has_item(txn, xkv_key_u64(key, 17), &item))
        return "a page key leads to an entry that has no record";
    return item.id != 0 && (item.names == 0 || xkv_load64(value) > item.tokens)
               ? "a page key stands for too many tokens"
               : NULL;
}

static const char *check_name(xkv_txn *txn, const xkv_key *key, const uint8_t *value)
{
    xkv_item item;
    uint64_t tokens;
    const uint64_t id = xkv_key_u64(key, 1);
    if (!has_item(txn, id, &item) || (item.id != 0 && xkv_key_u64(key, 9) >= item.names))
        return "a page key is noted for no entry";
    const xkv_key page = xkv_key_page(value, id);
    return xkv_txn_get_u64(txn, &page, &tokens) == XKV_ERROR_NOT_FOUND ? "a page key of an entry leads nowhere" : NULL;
}

static const char *check_time(xkv_txn *txn, const xkv_key *key)
{
    xkv_item item;
    if (!has_item(txn, xkv_key_u64(key, 9), &item) ||
        (item.id != 0 && !xkv_item_is_listed(&item, key->bytes[0], xkv_key_u64(key, 1))))
        return "an entry is listed for eviction or expiry at a time that is not its own";
    return NULL;
}

static const char *check_child(xkv_txn *txn, const xkv_key *key)
{
    xkv_item item;
    if (!has_item(txn, xkv_key_u64(key, 9), &item) || (item.id != 0 && item.parent != xkv_key_u64(key, 1)))
        return "an entry is listed as an extension of one that it does not extend [SI5]";
    return NULL;
}

static const char *check_record(xkv_txn *txn, walk *w, const xkv_key *key, const uint8_t *value)
{
    xkv_space space;
    switch (key->bytes[0]) {
    case XKV_TABLE_KEY:
        return check_key(txn, key, value);
    case XKV_TABLE_NODE:
        return check_node(txn, key, value);
    case XKV_TABLE_EDGE:
        return check_edge(txn, key, value);
    case XKV_TABLE_PAGE:
        return check_page(txn, key, value);
    case XKV_TABLE_NAMES:
        return check_name(txn, key, value);
    case XKV_TABLE_USED:
    case XKV_TABLE_EXPIRES:
        return check_time(txn, key);
    case XKV_TABLE_CHILD:
        return check_child(txn, key);
    case XKV_TABLE_SPACE:
        xkv_space_decode(value, &space);
        w->report->spaces++;
        w->report->entries += space.entries;
        w->report->bytes += space.bytes;
        return NULL;
    default: /* entries and dictionaries are looked at with their blobs */
        return NULL;
    }
}

/* --- The walk ----------------------------------------------------------------------------------------------------- */

static xkv_status check_next(xkv_txn *txn, walk *w)
{
    xkv_key key;
    uint8_t value[XKV_VALUE_MAX];
    xkv_status status = xkv_txn_next(txn, &w->next, 0, &key, value);
    if (status != XKV_OK && status != XKV_ERROR_CORRUPT)
        return status;
    const char *problem = status == XKV_OK ? check_record(txn, w, &key, value) : xkv_ctx_error(xkv_txn_ctx(txn));
    if (problem != NULL && (status == XKV_OK || key.size == 0 || key.bytes[0] != XKV_TABLE_ITEM))
        note(w, problem);
    w->done = key.size == 0; /* a key that is too long: there is no going on */
    return XKV_OK;
}

static xkv_status check_some(xkv_txn *txn, void *user)
{
    walk *w = user;
    for (int i = 0; i < BATCH && !w->done; i++) {
        xkv_status status = check_next(txn, w);
        w->done = w->done || status == XKV_ERROR_NOT_FOUND;
        if (!w->done)
            XKV_TRY(status);
    }
    return XKV_OK;
}

xkv_status xkv_verify_records(xkv_ctx *ctx, xkv_store *store, xkv_records_report *report)
{
    walk w = {.report = report, .next = {.bytes = {0}, .size = 1}};
    memset(report, 0, sizeof *report);
    while (!w.done) {
        xkv_ctx_begin(ctx);
        XKV_TRY(xkv_index_read(ctx, store->index, check_some, &w));
        XKV_TRY(xkv_check_cancel(ctx));
    }
    xkv_ctx_begin(ctx); /* what is wrong is no error of this call */
    return XKV_OK;
}
