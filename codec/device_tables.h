/* device_tables.h - the static tables as a device's decoder takes them. */
#ifndef XKV_DEVICE_TABLES_H
#define XKV_DEVICE_TABLES_H

#include "cuda/warp_rans.h"
#include "tables.h"

#define XKV_BASE_TABLES (XKV_TABLE_SHAPES * XKV_BASE_RUNGS)

/* All base tables: tables[XKV_BASE_TABLES]. */
void xkv_device_tables(xkv_warp_table *tables);

/* The same as a device's encoder takes them. */
void xkv_device_encode_tables(xkv_warp_encode_table *tables);

/* Table `index`, 1 .. XKV_TABLE_MAX, in terms of these. */
xkv_warp_code xkv_device_code(uint32_t index);

/* The largest magnitude that it codes without an escape. */
uint32_t xkv_table_span(uint32_t index);

#endif
