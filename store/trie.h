/* trie.h - all prompts of a namespace as one compressed tree of symbols (spec/store.md, section 5).
 *
 * A node is a prefix at which prompts part or end; an edge leads from it, by the next symbol, to the next such prefix,
 * and names one entry below it. A walk down looks only at the symbols at the nodes, so that the entry it ends at need
 * not begin like the prompt; but none begins more like it, and one comparison of the two says how far they agree. */
#ifndef XKV_TRIE_H
#define XKV_TRIE_H

#include "index.h"

/* An entry below `root` that has the longest common prefix with the symbols. NOT_FOUND without a message: none begins
 * with the first one. */
XKV_MUST_CHECK xkv_status xkv_trie_find(xkv_txn *txn, uint64_t root, const uint32_t *symbols, uint32_t count,
                                        uint64_t *id);

/* Calls `serves` with entries that are ever less like the symbols, until it takes one: those that it declines are
 * stepped over; after a few thousand of them only entries whose symbols all begin the prompt are asked for. `most`: it
 * has at most so many leading symbols in common with the prompt; of the first one that is not known. */
typedef xkv_status (*xkv_serves_fn)(xkv_txn *txn, void *user, uint64_t id, uint32_t most, bool *serves);
XKV_MUST_CHECK xkv_status xkv_trie_find_serving(xkv_txn *txn, uint64_t root, const uint32_t *symbols, uint32_t count,
                                                xkv_serves_fn serves, void *user);

/* Put the entry `item` (id, symbols) into the tree. `common`: length of the longest common prefix with any entry there,
 * 0: none; `other`: the symbol that follows it in the entry that xkv_trie_find() gave, if it goes on. Sets the place in
 * `item`, which the caller stores. `meta` gives the numbers of nodes. CORRUPT [SI4]. */
XKV_MUST_CHECK xkv_status xkv_trie_insert(xkv_txn *txn, xkv_meta *meta, uint64_t root, const uint32_t *symbols,
                                          uint32_t common, uint32_t other, xkv_item *item);

/* Take the entry out again. CORRUPT [SI4]. */
XKV_MUST_CHECK xkv_status xkv_trie_remove(xkv_txn *txn, uint64_t root, const xkv_item *item);

#endif
