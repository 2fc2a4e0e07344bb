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
    xkv_store64(value + 208, 0);
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
}

bool xkv_item_needs_dict(const xkv_item *item)
{
    return !xkv_all_zero(item->dict, sizeof item->dict);
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
