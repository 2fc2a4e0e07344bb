#include "device_tables.h"

/* The slots of a symbol are neighbours; an entry tells the symbol's frequency and how far into it the slot is. */
static void fill_table(const xkv_base_table *base, xkv_warp_table *t)
{
    memset(t, 0, sizeof *t);
    t->reach = base->reach;
    for (uint32_t slot = 0; slot < 1u << XKV_PROBABILITY_BITS; slot++) {
        uint32_t entry = base->decode[slot], start = slot - (entry >> 12 & 0xfff);
        int32_t u = (int8_t)(entry >> 24);
        uint32_t symbol = u == XKV_ESCAPE ? 2 * base->reach + 1 : (uint32_t)(u + (int32_t)base->reach);
        t->slot[slot] = (uint8_t)symbol;
        t->symbol[symbol] = (entry & 0xfff) | start << 16;
    }
}

/* Base table (shape, rung) is that of index 1 + 60 shape + rung. */
static const xkv_base_table *base_table(uint32_t i)
{
    return xkv_table_get(1 + i / XKV_BASE_RUNGS * XKV_TABLE_RUNGS + i % XKV_BASE_RUNGS).base;
}

void xkv_device_tables(xkv_warp_table *tables)
{
    for (uint32_t i = 0; i < XKV_BASE_TABLES; i++)
        fill_table(base_table(i), &tables[i]);
}

static void fill_encode_table(const xkv_base_table *base, xkv_warp_encode_table *t)
{
    memset(t, 0, sizeof *t);
    t->reach = base->reach;
    for (uint32_t i = 0; i <= 2 * base->reach + 1; i++) {
        t->reciprocal[i] = base->encode[i].reciprocal;
        t->packed[i] = base->encode[i].packed;
    }
}

void xkv_device_encode_tables(xkv_warp_encode_table *tables)
{
    for (uint32_t i = 0; i < XKV_BASE_TABLES; i++)
        fill_encode_table(base_table(i), &tables[i]);
}

xkv_warp_code xkv_device_code(uint32_t index)
{
    const xkv_base_table *first = xkv_table_get(1).base; /* they lie behind each other */
    xkv_table t = xkv_table_get(index);

    return (xkv_warp_code){(uint16_t)(t.base - first), (uint16_t)t.shift};
}

uint32_t xkv_table_span(uint32_t index)
{
    xkv_table t = xkv_table_get(index);

    return (t.base->reach << t.shift) + (1u << t.shift >> 1);
}
