/* records.h - keys and values of the index (spec/store.md, section 6). Layouts are little-endian; numbers inside keys
 * are big-endian, so that keys sort by them. */
#ifndef XKV_RECORDS_H
#define XKV_RECORDS_H

#include "base.h"
#include "xkv/store.h"

enum {
    XKV_KEY_MAX = 64,
    XKV_META_SIZE = 128,
    XKV_SPACE_SIZE = 24,
    XKV_EDGE_SIZE = 24,
    XKV_NODE_SIZE = 16,
    XKV_ITEM_SIZE = 216,
    XKV_DICT_SIZE = 56,
    XKV_SHARED_SIZE = 16,
    XKV_VALUE_MAX = XKV_ITEM_SIZE
};

/* First byte of a key: what the record is. */
enum {
    XKV_TABLE_CHILD = 'c',   /* id of an entry, id of one that extends it */
    XKV_TABLE_DICT = 'd',    /* id of the dictionary [16] */
    XKV_TABLE_ITEM = 'e',    /* id of the entry */
    XKV_TABLE_SHARED = 'h',  /* one record, when entries extend others */
    XKV_TABLE_NAMES = 'f',   /* id of the entry, number: which page keys it has */
    XKV_TABLE_KEY = 'k',     /* native key [32] -> id */
    XKV_TABLE_USED = 'l',    /* time of use, id: what may be evicted, oldest first */
    XKV_TABLE_META = 'm',    /* one record */
    XKV_TABLE_SPACE = 'n',   /* namespace [32] -> its number and sums */
    XKV_TABLE_NODE = 'p',    /* node -> the edge that leads to it */
    XKV_TABLE_PAGE = 'q',    /* hash of namespace and page key [16], id -> tokens */
    XKV_TABLE_EDGE = 't',    /* node [, symbol] -> edge; without symbol: an entry ends at the node */
    XKV_TABLE_UNSENT = 'u',  /* id: an entry that is to be sent to the remote */
    XKV_TABLE_EXPIRES = 'x', /* time, id */
    XKV_TABLE_TRASH = 'z',   /* id -> blob that is to be deleted */
};

typedef struct xkv_key {
    uint8_t bytes[XKV_KEY_MAX + 1]; /* one more: the key behind the longest one has a zero at its end */
    size_t size;
} xkv_key;

xkv_key xkv_key_meta(void);
xkv_key xkv_key_shared(void);
xkv_key xkv_key_id(uint8_t table, uint64_t id);                       /* ITEM, NODE, TRASH, UNSENT */
xkv_key xkv_key_bytes(uint8_t table, const void *bytes, size_t size); /* DICT, KEY, SPACE */
xkv_key xkv_key_pair(uint8_t table, uint64_t first, uint64_t second); /* CHILD, USED, EXPIRES, NAMES */
xkv_key xkv_key_edge(uint64_t node, uint32_t symbol);
xkv_key xkv_key_end(uint64_t node);
xkv_key xkv_key_page(const uint8_t page[16], uint64_t id);
/* Numbers at an offset of a key. */
uint64_t xkv_key_u64(const xkv_key *key, size_t offset);
uint32_t xkv_key_u32(const xkv_key *key, size_t offset);

/* The next key there can be. */
static inline void xkv_key_step(xkv_key *key)
{
    key->bytes[key->size++] = 0;
}

/* What the whole store counts. */
typedef struct xkv_meta {
    uint64_t next_id;   /* of entries and dictionaries; none is used twice */
    uint64_t next_node; /* of namespaces and nodes */
    uint64_t byte_cap, bytes, entries, pinned, namespaces, dictionaries;
    uint64_t puts, hits, misses, evictions, expirations, corrupt, tokens_reused, bytes_reused;
} xkv_meta;

typedef struct xkv_space {
    uint64_t root; /* node of the empty prefix */
    uint64_t entries, bytes;
} xkv_space;

/* From a node, by a symbol, to the next node, or to the end of the only entry that goes on that way. */
typedef struct xkv_edge {
    uint64_t child; /* node; 0: a leaf */
    uint64_t entry; /* one of those below; of a leaf, the entry */
    uint32_t depth; /* symbols before the child; of a leaf, all of the entry's */
} xkv_edge;

typedef struct xkv_node {
    uint64_t parent;
    uint32_t symbol;
} xkv_node;

/* An entry. */
typedef struct xkv_item {
    uint64_t id;
    uint64_t file_size, raw_bytes;
    uint64_t created, expires, used;
    uint64_t node;   /* its place in the tree: the edge (node, symbol), or the end of node */
    uint64_t parent; /* the entry that it extends; 0: none */
    uint32_t symbol, at_end;
    uint32_t tokens, symbols;
    uint32_t pinned, names;
    uint32_t base_tokens; /* taken from there */
    uint32_t children;    /* entries that extend it */
    uint32_t whole_only;  /* of its tokens only all can be restored */
    uint8_t blob[32], space[32], key[32];
    uint8_t dict[16];
} xkv_item;

/* What need not be stored since entries extend others. */
typedef struct xkv_shared {
    uint64_t entries; /* that do */
    uint64_t bytes;   /* raw ones of the tokens that they take over */
} xkv_shared;

typedef struct xkv_dict_record {
    uint64_t id, file_size, users;
    uint8_t blob[32];
} xkv_dict_record;

/* What is wrong with a record whose checksum is right, before any of its fields is used [SI3]: a table that there is
 * none of, sizes of key or value that the table's records do not have, reserved fields and flags. NULL: nothing. */
const char *xkv_record_problem(const uint8_t *key, size_t key_size, const uint8_t *value, size_t size);

void xkv_meta_encode(const xkv_meta *meta, uint8_t value[XKV_META_SIZE]);
void xkv_meta_decode(const uint8_t value[XKV_META_SIZE], xkv_meta *meta);
void xkv_space_encode(const xkv_space *space, uint8_t value[XKV_SPACE_SIZE]);
void xkv_space_decode(const uint8_t value[XKV_SPACE_SIZE], xkv_space *space);
void xkv_edge_encode(const xkv_edge *edge, uint8_t value[XKV_EDGE_SIZE]);
void xkv_edge_decode(const uint8_t value[XKV_EDGE_SIZE], xkv_edge *edge);
void xkv_node_encode(const xkv_node *node, uint8_t value[XKV_NODE_SIZE]);
void xkv_node_decode(const uint8_t value[XKV_NODE_SIZE], xkv_node *node);
void xkv_item_encode(const xkv_item *item, uint8_t value[XKV_ITEM_SIZE]);
void xkv_item_decode(const uint8_t value[XKV_ITEM_SIZE], xkv_item *item);
/* Raw bytes of so many of the entry's tokens. */
uint64_t xkv_item_raw_share(const xkv_item *item, uint32_t tokens);
/* Whether the entry was packed with a dictionary. */
bool xkv_item_needs_dict(const xkv_item *item);
void xkv_shared_encode(const xkv_shared *shared, uint8_t value[XKV_SHARED_SIZE]);
void xkv_shared_decode(const uint8_t value[XKV_SHARED_SIZE], xkv_shared *shared);
void xkv_dict_record_encode(const xkv_dict_record *dict, uint8_t value[XKV_DICT_SIZE]);
void xkv_dict_record_decode(const uint8_t value[XKV_DICT_SIZE], xkv_dict_record *dict);

/* Times at which entries expire; 0: never. */
static inline bool xkv_is_expired(uint64_t expires, uint64_t now)
{
    return expires != 0 && expires <= now;
}
static inline uint64_t xkv_later_expiry(uint64_t a, uint64_t b)
{
    return a == 0 || b == 0 ? 0 : xkv_max64(a, b);
}

#endif
