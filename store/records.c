/* records.c - keys and values of the index, byte for byte as spec/store.md, section 6, has them. */
#include "records.h"

/* --- Keys --------------------------------------------------------------------------------------------------------- */

static void add_u32(xkv_key *k, uint32_t v)
{
    for (int shift = 24; shift >= 0; shift -= 8)
        k->bytes[k->size++] = (uint8_t)(v >> shift);
}

static void add_u64(xkv_key *k, uint64_t v)
{
    add_u32(k, (uint32_t)(v >> 32));
    add_u32(k, (uint32_t)v);
}

uint32_t xkv_key_u32(const xkv_key *key, size_t offset)
{
    const uint8_t *b = key->bytes + offset;
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

uint64_t xkv_key_u64(const xkv_key *key, size_t offset)
{
    return (uint64_t)xkv_key_u32(key, offset) << 32 | xkv_key_u32(key, offset + 4);
}

xkv_key xkv_key_meta(void)
{
    return (xkv_key){.bytes = {XKV_TABLE_META}, .size = 1};
}

xkv_key xkv_key_shared(void)
{
    return (xkv_key){.bytes = {XKV_TABLE_SHARED}, .size = 1};
}

xkv_key xkv_key_bytes(uint8_t table, const void *bytes, size_t size)
{
    xkv_key k = {.bytes = {table}, .size = 1 + size};
    if (size > 0)
        memcpy(k.bytes + 1, bytes, size);
    return k;
}

xkv_key xkv_key_id(uint8_t table, uint64_t id)
{
    xkv_key k = {.bytes = {table}, .size = 1};
    add_u64(&k, id);
    return k;
}

xkv_key xkv_key_pair(uint8_t table, uint64_t first, uint64_t second)
{
    xkv_key k = xkv_key_id(table, first);
    add_u64(&k, second);
    return k;
}

xkv_key xkv_key_edge(uint64_t node, uint32_t symbol)
{
    xkv_key k = xkv_key_id(XKV_TABLE_EDGE, node);
    add_u32(&k, symbol);
    return k;
}

xkv_key xkv_key_end(uint64_t node)
{
    return xkv_key_id(XKV_TABLE_EDGE, node);
}

xkv_key xkv_key_page(const uint8_t page[16], uint64_t id)
{
    xkv_key k = xkv_key_bytes(XKV_TABLE_PAGE, page, 16);
    add_u64(&k, id);
    return k;
}

/* --- Shapes ------------------------------------------------------------------------------------------------------- */

/* Sizes of the keys and values of each table. */
static const struct {
    uint8_t table, key_size, other_key_size; /* EDGE: of an entry that ends at the node */
    uint8_t size;
} shapes[] = {
    {XKV_TABLE_CHILD, 17, 17, 0},
    {XKV_TABLE_DICT, 17, 17, XKV_DICT_SIZE},
    {XKV_TABLE_ITEM, 9, 9, XKV_ITEM_SIZE},
    {XKV_TABLE_SHARED, 1, 1, XKV_SHARED_SIZE},
    {XKV_TABLE_NAMES, 17, 17, 16},
    {XKV_TABLE_KEY, 33, 33, 8},
    {XKV_TABLE_USED, 17, 17, 0},
    {XKV_TABLE_META, 1, 1, XKV_META_SIZE},
    {XKV_TABLE_SPACE, 33, 33, XKV_SPACE_SIZE},
    {XKV_TABLE_NODE, 9, 9, XKV_NODE_SIZE},
    {XKV_TABLE_PAGE, 25, 25, 8},
    {XKV_TABLE_EDGE, 13, 9, XKV_EDGE_SIZE},
    {XKV_TABLE_UNSENT, 9, 9, 0},
    {XKV_TABLE_EXPIRES, 17, 17, 0},
    {XKV_TABLE_TRASH, 9, 9, 32},
};

/* Fields that can have one value only, and flags. An entry's id is also in its key. */
static bool has_known_fields(const uint8_t *key, const uint8_t *value)
{
    xkv_key id = xkv_key_id(XKV_TABLE_ITEM, 0);
    switch (key[0]) {
    case XKV_TABLE_EDGE:
        return xkv_load32(value + 20) == 0;
    case XKV_TABLE_NODE:
        return xkv_load32(value + 12) == 0;
    case XKV_TABLE_ITEM:
        id = xkv_key_id(XKV_TABLE_ITEM, xkv_load64(value));
        return memcmp(id.bytes, key, id.size) == 0 && xkv_load32(value + 68) <= 1 && xkv_load32(value + 80) <= 1 &&
               xkv_load32(value + 208) <= 1 && xkv_load32(value + 212) == 0;
    default:
        return true;
    }
}

const char *xkv_record_problem(const uint8_t *key, size_t key_size, const uint8_t *value, size_t size)
{
    for (size_t i = 0; key_size > 0 && i < sizeof shapes / sizeof *shapes; i++) {
        if (shapes[i].table != key[0])
            continue;
        if (key_size != shapes[i].key_size && key_size != shapes[i].other_key_size)
            return "its key has a wrong size [SI3]";
        if (size != shapes[i].size)
            return "its value has a wrong size [SI3]";
        return has_known_fields(key, value)
                   ? NULL
                   : "its id is not that of its key, a reserved field not 0, or a flag not 0 or 1 [SI3]";
    }
    return "it is of no known table [SI3]";
}

/* --- Values ------------------------------------------------------------------------------------------------------- */

/* The fields of xkv_meta in the order of the record: all u64, none between them. */
_Static_assert(sizeof(xkv_meta) == XKV_META_SIZE, "xkv_meta is a row of u64");

void xkv_meta_encode(const xkv_meta *meta, uint8_t value[XKV_META_SIZE])
{
    uint64_t fields[XKV_META_SIZE / 8];
    memcpy(fields, meta, sizeof fields);
    for (size_t i = 0; i < XKV_META_SIZE / 8; i++)
        xkv_store64(value + 8 * i, fields[i]);
}

void xkv_meta_decode(const uint8_t value[XKV_META_SIZE], xkv_meta *meta)
{
    uint64_t fields[XKV_META_SIZE / 8];
    for (size_t i = 0; i < XKV_META_SIZE / 8; i++)
        fields[i] = xkv_load64(value + 8 * i);
    memcpy(meta, fields, sizeof fields);
}

void xkv_space_encode(const xkv_space *space, uint8_t value[XKV_SPACE_SIZE])
{
    xkv_store64(value, space->root);
    xkv_store64(value + 8, space->entries);
    xkv_store64(value + 16, space->bytes);
}

void xkv_space_decode(const uint8_t value[XKV_SPACE_SIZE], xkv_space *space)
{
    *space = (xkv_space){xkv_load64(value), xkv_load64(value + 8), xkv_load64(value + 16)};
}

void xkv_edge_encode(const xkv_edge *edge, uint8_t value[XKV_EDGE_SIZE])
{
    xkv_store64(value, edge->child);
    xkv_store64(value + 8, edge->entry);
    xkv_store32(value + 16, edge->depth);
    xkv_store32(value + 20, 0);
}

void xkv_edge_decode(const uint8_t value[XKV_EDGE_SIZE], xkv_edge *edge)
{
    *edge = (xkv_edge){xkv_load64(value), xkv_load64(value + 8), xkv_load32(value + 16)};
}

void xkv_node_encode(const xkv_node *node, uint8_t value[XKV_NODE_SIZE])
{
    xkv_store64(value, node->parent);
    xkv_store32(value + 8, node->symbol);
    xkv_store32(value + 12, 0);
}

void xkv_node_decode(const uint8_t value[XKV_NODE_SIZE], xkv_node *node)
{
    *node = (xkv_node){xkv_load64(value), xkv_load32(value + 8)};
}

void xkv_item_encode(const xkv_item *item, uint8_t value[XKV_ITEM_SIZE])
{
    const uint64_t wide[] = {item->id,      item->file_size, item->raw_bytes, item->created,
                             item->expires, item->used,      item->node,      item->parent};
    const uint32_t narrow[] = {item->symbol, item->at_end, item->tokens,      item->symbols,
                               item->pinned, item->names,  item->base_tokens, item->children};
    for (size_t i = 0; i < 8; i++)
        xkv_store64(value + 8 * i, wide[i]);
    for (size_t i = 0; i < 8; i++)
        xkv_store32(value + 64 + 4 * i, narrow[i]);
    memcpy(value + 96, item->blob, 32);
    memcpy(value + 128, item->space, 32);
    memcpy(value + 160, item->key, 32);
    memcpy(value + 192, item->dict, 16);
    xkv_store32(value + 208, item->whole_only);
    xkv_store32(value + 212, 0);
}

void xkv_item_decode(const uint8_t value[XKV_ITEM_SIZE], xkv_item *item)
{
    uint64_t *const wide[] = {&item->id,      &item->file_size, &item->raw_bytes, &item->created,
                              &item->expires, &item->used,      &item->node,      &item->parent};
    uint32_t *const narrow[] = {&item->symbol, &item->at_end, &item->tokens,      &item->symbols,
                                &item->pinned, &item->names,  &item->base_tokens, &item->children};
    for (size_t i = 0; i < 8; i++)
        *wide[i] = xkv_load64(value + 8 * i);
    for (size_t i = 0; i < 8; i++)
        *narrow[i] = xkv_load32(value + 64 + 4 * i);
    memcpy(item->blob, value + 96, 32);
    memcpy(item->space, value + 128, 32);
    memcpy(item->key, value + 160, 32);
    memcpy(item->dict, value + 192, 16);
    item->whole_only = xkv_load32(value + 208);
}

uint64_t xkv_item_raw_share(const xkv_item *item, uint32_t tokens)
{
    return item->tokens == 0 ? 0 : (uint64_t)((double)item->raw_bytes * tokens / item->tokens);
}

bool xkv_item_needs_dict(const xkv_item *item)
{
    return !xkv_all_zero(item->dict, sizeof item->dict);
}

void xkv_shared_encode(const xkv_shared *shared, uint8_t value[XKV_SHARED_SIZE])
{
    xkv_store64(value, shared->entries);
    xkv_store64(value + 8, shared->bytes);
}

void xkv_shared_decode(const uint8_t value[XKV_SHARED_SIZE], xkv_shared *shared)
{
    *shared = (xkv_shared){xkv_load64(value), xkv_load64(value + 8)};
}

void xkv_dict_record_encode(const xkv_dict_record *dict, uint8_t value[XKV_DICT_SIZE])
{
    xkv_store64(value, dict->id);
    xkv_store64(value + 8, dict->file_size);
    xkv_store64(value + 16, dict->users);
    memcpy(value + 24, dict->blob, 32);
}

void xkv_dict_record_decode(const uint8_t value[XKV_DICT_SIZE], xkv_dict_record *dict)
{
    *dict = (xkv_dict_record){xkv_load64(value), xkv_load64(value + 8), xkv_load64(value + 16), {0}};
    memcpy(dict->blob, value + 24, 32);
}
