/* trie.c - the tree of prompts: walking down, splitting an edge, joining what a removed entry had kept apart. */
#include "trie.h"

/* A child edge of a node, with where it hangs. */
typedef struct place {
    uint64_t node;
    uint32_t symbol;
    bool at_end; /* the entry ends at the node: there is no symbol */
} place;

static xkv_key place_key(const place *p)
{
    return p->at_end ? xkv_key_end(p->node) : xkv_key_edge(p->node, p->symbol);
}

static xkv_status get_edge(xkv_txn *txn, const place *p, xkv_edge *edge)
{
    uint8_t value[XKV_EDGE_SIZE];
    xkv_key key = place_key(p);
    XKV_TRY(xkv_txn_get(txn, &key, value, sizeof value));
    xkv_edge_decode(value, edge);
    return XKV_OK;
}

static xkv_status put_edge(xkv_txn *txn, const place *p, const xkv_edge *edge)
{
    uint8_t value[XKV_EDGE_SIZE];
    xkv_key key = place_key(p);
    xkv_edge_encode(edge, value);
    return xkv_txn_put(txn, &key, value, sizeof value);
}

static xkv_status delete_edge(xkv_txn *txn, const place *p)
{
    xkv_key key = place_key(p);
    return xkv_txn_delete(txn, &key);
}

static xkv_status get_node(xkv_txn *txn, uint64_t id, xkv_node *node)
{
    uint8_t value[XKV_NODE_SIZE];
    xkv_key key = xkv_key_id(XKV_TABLE_NODE, id);
    XKV_TRY(xkv_txn_get(txn, &key, value, sizeof value));
    xkv_node_decode(value, node);
    return XKV_OK;
}

static xkv_status put_node(xkv_txn *txn, uint64_t id, const place *from)
{
    uint8_t value[XKV_NODE_SIZE];
    xkv_key key = xkv_key_id(XKV_TABLE_NODE, id);
    xkv_node_encode(&(xkv_node){from->node, from->symbol}, value);
    return xkv_txn_put(txn, &key, value, sizeof value);
}

static xkv_status fail_tree(xkv_txn *txn, uint64_t node)
{
    return xkv_fail(xkv_txn_ctx(txn), XKV_ERROR_CORRUPT,
                    "the tree of prompts contradicts itself at node %llu: repair rebuilds the index [SI4]",
                    (unsigned long long)node);
}

/* A record that must be there. */
static xkv_status must(xkv_txn *txn, uint64_t node, xkv_status status)
{
    return status == XKV_ERROR_NOT_FOUND ? fail_tree(txn, node) : status;
}

/* --- Walking down ------------------------------------------------------------------------------------------------- */

/* The last edge on the way of the symbols, and where it hangs. */
static xkv_status descend(xkv_txn *txn, uint64_t root, const uint32_t *symbols, uint32_t count, place *at,
                          xkv_edge *edge)
{
    *edge = (xkv_edge){.child = root};
    for (bool first = true; edge->child != 0 && edge->depth < count; first = false) {
        const place next_at = {edge->child, symbols[edge->depth], false};
        xkv_edge next = {0};
        xkv_status status = get_edge(txn, &next_at, &next);
        if (status == XKV_ERROR_NOT_FOUND && !first)
            break; /* all entries below the node agree with the prompt as far as any does */
        XKV_TRY(status);
        if (next.depth <= edge->depth)
            return fail_tree(txn, edge->child); /* or the walk might not end */
        *edge = next;
        *at = next_at;
    }
    return XKV_OK;
}

xkv_status xkv_trie_find(xkv_txn *txn, uint64_t root, const uint32_t *symbols, uint32_t count, uint64_t *id)
{
    place at = {0};
    xkv_edge edge;
    XKV_TRY(descend(txn, root, symbols, count, &at, &edge));
    *id = edge.entry;
    return XKV_OK;
}

/* --- Walking around ----------------------------------------------------------------------------------------------- */

/* The first edge of a node whose key is not below `from`; then `from` is behind it. NOT_FOUND: there is none. */
static xkv_status next_edge(xkv_txn *txn, uint64_t node, xkv_key *from, place *at, xkv_edge *edge)
{
    const size_t prefix = xkv_key_end(node).size;
    uint8_t value[XKV_VALUE_MAX];
    xkv_key key;
    XKV_TRY(xkv_txn_next(txn, from, prefix, &key, value));
    bool at_end = key.size == prefix;
    *at = (place){node, at_end ? 0 : xkv_key_u32(&key, prefix), at_end};
    xkv_edge_decode(value, edge);
    return XKV_OK;
}

/* A search for an entry that serves. */
typedef struct hunt {
    xkv_serves_fn serves;
    void *user;
    uint32_t edges; /* that may still be looked at: a damaged tree may have loops */
} hunt;

enum { MOST_EDGES = 8192 };

/* From a node that was gone through back to the one above, behind the edge between them. */
static xkv_status ascend(xkv_txn *txn, uint64_t *node, xkv_key *from)
{
    xkv_node up = {0};
    XKV_TRY(must(txn, *node, get_node(txn, *node, &up)));
    *from = xkv_key_edge(up.parent, up.symbol);
    xkv_key_step(from);
    *node = up.parent;
    return XKV_OK;
}

/* Go through the entries below a node, but for those below the edge at `without`; all agree with the prompt in at most
 * `most` symbols. NOT_FOUND: none serves. */
static xkv_status hunt_below(xkv_txn *txn, hunt *h, uint64_t top, const place *without, uint32_t most)
{
    uint64_t node = top;
    xkv_key from = xkv_key_end(node);
    while (h->edges-- > 0) {
        place at;
        xkv_edge edge;
        bool serves = false;
        xkv_status status = next_edge(txn, node, &from, &at, &edge);
        if (status == XKV_ERROR_NOT_FOUND && node != top) {
            XKV_TRY(ascend(txn, &node, &from));
            continue;
        }
        XKV_TRY(status);
        if (without != NULL && node == top && at.at_end == without->at_end && at.symbol == without->symbol)
            continue;
        if (edge.child != 0) {
            node = edge.child;
            from = xkv_key_end(node);
            continue;
        }
        XKV_TRY(h->serves(txn, h->user, edge.entry, most, &serves));
        if (serves)
            return XKV_OK;
    }
    h->edges = 0;
    return XKV_ERROR_NOT_FOUND;
}

/* The entry that ends at a node, if there is one and it serves: else NOT_FOUND. */
static xkv_status hunt_end(xkv_txn *txn, const hunt *h, uint64_t node, uint32_t depth)
{
    xkv_edge edge = {0};
    bool serves = false;
    XKV_TRY(get_edge(txn, &(place){.node = node, .at_end = true}, &edge));
    XKV_TRY(h->serves(txn, h->user, edge.entry, depth, &serves));
    return serves ? XKV_OK : XKV_ERROR_NOT_FOUND;
}

/* The edge that leads to a node, and where it hangs. */
static xkv_status edge_to(xkv_txn *txn, uint64_t node, place *at, xkv_edge *edge)
{
    xkv_node up = {0};
    XKV_TRY(must(txn, node, get_node(txn, node, &up)));
    *at = (place){up.parent, up.symbol, false};
    return must(txn, node, get_edge(txn, at, edge));
}

/* All entries below the last edge, which is `edge` at `at`, agree with the prompt equally far; those beside it as far
 * as its node; and so on upwards. Where too many are in the way, the next entries that end on this way are left. */
static xkv_status hunt_upwards(xkv_txn *txn, hunt *h, uint64_t root, place at, xkv_edge edge, uint32_t count)
{
    const uint32_t most = edge.depth < count ? edge.depth : count;
    xkv_status status = edge.child != 0 ? hunt_below(txn, h, edge.child, NULL, most) : XKV_ERROR_NOT_FOUND;
    while (status == XKV_ERROR_NOT_FOUND && at.node != root) {
        const uint64_t node = at.node;
        const place below = at;
        const uint32_t depth = edge.depth;
        XKV_TRY(edge_to(txn, node, &at, &edge));
        if (edge.depth >= depth || edge.child != node)
            return fail_tree(txn, node); /* or the walk might not end */
        status = h->edges > 0 ? hunt_below(txn, h, node, &below, edge.depth) : hunt_end(txn, h, node, edge.depth);
    }
    return status;
}

xkv_status xkv_trie_find_serving(xkv_txn *txn, uint64_t root, const uint32_t *symbols, uint32_t count,
                                 xkv_serves_fn serves, void *user)
{
    hunt h = {serves, user, MOST_EDGES};
    place at = {0};
    xkv_edge edge;
    bool yes = false;
    XKV_TRY(descend(txn, root, symbols, count, &at, &edge));
    XKV_TRY(serves(txn, user, edge.entry, UINT32_MAX, &yes));
    return yes ? XKV_OK : hunt_upwards(txn, &h, root, at, edge, count);
}

/* --- Inserting ---------------------------------------------------------------------------------------------------- */

/* Hang the entry at `p` and note its place. */
static xkv_status hang(xkv_txn *txn, const place *p, xkv_item *item)
{
    item->node = p->node;
    item->symbol = p->at_end ? 0 : p->symbol;
    item->at_end = p->at_end;
    return put_edge(txn, p, &(xkv_edge){.entry = item->id, .depth = item->symbols});
}

/* What `edge` leads to now hangs at `to`. */
static xkv_status move(xkv_txn *txn, const xkv_edge *edge, const place *to)
{
    xkv_item item;
    XKV_TRY(put_edge(txn, to, edge));
    if (edge->child != 0)
        return put_node(txn, edge->child, to);
    XKV_TRY(must(txn, to->node, xkv_txn_get_item(txn, edge->entry, &item)));
    item.node = to->node;
    item.symbol = to->at_end ? 0 : to->symbol;
    item.at_end = to->at_end;
    return xkv_txn_put_item(txn, &item);
}

/* Put a node onto the edge at `p`, `common` symbols deep; the old way goes on from there by `other`, or ends. */
static xkv_status split(xkv_txn *txn, xkv_meta *meta, const place *p, const xkv_edge *edge, uint32_t common,
                        uint32_t other, uint64_t *node)
{
    *node = meta->next_node++;
    bool ends = edge->child == 0 && edge->depth == common;
    XKV_TRY(move(txn, edge, &(place){*node, other, ends}));
    XKV_TRY(put_node(txn, *node, p));
    return put_edge(txn, p, &(xkv_edge){.child = *node, .entry = edge->entry, .depth = common});
}

xkv_status xkv_trie_insert(xkv_txn *txn, xkv_meta *meta, uint64_t root, const uint32_t *symbols, uint32_t common,
                           uint32_t other, xkv_item *item)
{
    xkv_edge edge = {.child = root};
    while (edge.depth < common) {
        place p = {edge.child, symbols[edge.depth], false};
        xkv_edge next = {0};
        XKV_TRY(must(txn, p.node, get_edge(txn, &p, &next)));
        if (next.depth <= edge.depth)
            return fail_tree(txn, p.node);
        if (next.child == 0 || next.depth > common) {
            if (next.child == 0 && next.depth < common)
                return fail_tree(txn, p.node);
            uint64_t node = 0;
            XKV_TRY(split(txn, meta, &p, &next, common, other, &node));
            next = (xkv_edge){.child = node, .depth = common};
        }
        edge = next;
    }
    place p = {edge.child, 0, item->symbols == common};
    if (!p.at_end)
        p.symbol = symbols[common];
    xkv_status status = get_edge(txn, &p, &edge);
    if (status == XKV_OK)
        return fail_tree(txn, p.node);
    return status == XKV_ERROR_NOT_FOUND ? hang(txn, &p, item) : status;
}

/* --- Removing ----------------------------------------------------------------------------------------------------- */

/* The first edges of a node, at most two: *count of them. */
static xkv_status first_edges(xkv_txn *txn, uint64_t node, place places[2], xkv_edge edges[2], int *count)
{
    xkv_key from = xkv_key_end(node);
    for (*count = 0; *count < 2; ++*count) {
        xkv_status status = next_edge(txn, node, &from, &places[*count], &edges[*count]);
        if (status == XKV_ERROR_NOT_FOUND)
            return XKV_OK;
        XKV_TRY(status);
    }
    return XKV_OK;
}

/* The node has one edge left: let the edge that leads to the node lead to where that one does. */
static xkv_status join(xkv_txn *txn, uint64_t node, const place *only, const xkv_edge *edge)
{
    xkv_key key = xkv_key_id(XKV_TABLE_NODE, node);
    xkv_node up = {0};
    XKV_TRY(must(txn, node, get_node(txn, node, &up)));
    XKV_TRY(delete_edge(txn, only));
    XKV_TRY(xkv_txn_delete(txn, &key));
    return move(txn, edge, &(place){up.parent, up.symbol, false});
}

/* On the way from `node` up to the root, edges that name entry `gone` name `instead`. */
static xkv_status rename_up(xkv_txn *txn, uint64_t root, uint64_t node, uint64_t gone, uint64_t instead)
{
    for (uint32_t depth = UINT32_MAX; node != root;) {
        place p = {0};
        xkv_edge edge = {0};
        XKV_TRY(edge_to(txn, node, &p, &edge));
        if (edge.depth >= depth || edge.child != node)
            return fail_tree(txn, node); /* or the walk might not end */
        if (edge.entry == gone) {
            edge.entry = instead;
            XKV_TRY(put_edge(txn, &p, &edge));
        }
        depth = edge.depth;
        node = p.node;
    }
    return XKV_OK;
}

xkv_status xkv_trie_remove(xkv_txn *txn, uint64_t root, const xkv_item *item)
{
    place p = {item->node, item->symbol, item->at_end != 0}, left[2];
    xkv_edge edge = {0}, edges[2] = {{0}};
    int count = 0;
    uint64_t node = p.node;
    XKV_TRY(must(txn, node, get_edge(txn, &p, &edge)));
    if (edge.child != 0 || edge.entry != item->id)
        return fail_tree(txn, node);
    XKV_TRY(delete_edge(txn, &p));
    XKV_TRY(first_edges(txn, node, left, edges, &count));
    if (count == 0)
        return node == root ? XKV_OK : fail_tree(txn, node);
    if (count == 1 && node != root) {
        xkv_node up = {0};
        XKV_TRY(must(txn, node, get_node(txn, node, &up)));
        XKV_TRY(join(txn, node, &left[0], &edges[0]));
        node = up.parent;
    }
    return rename_up(txn, root, node, item->id, edges[0].entry);
}
