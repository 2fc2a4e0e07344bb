/* tables.h - the static frequency tables (spec/codec.md, section "Tables"), what a component costs under them, and the
 * choice among them. */
#ifndef XKV_TABLES_H
#define XKV_TABLES_H

#include "base.h"

#define XKV_PROBABILITY_BITS 12
#define XKV_TABLE_SHAPES     4u
#define XKV_TABLE_RUNGS      60u /* of the ladder of sigma/step: 28 base tables, then the last 4 with 8 shifts */
#define XKV_BASE_RUNGS       28u
#define XKV_TABLE_MAX        (XKV_TABLE_SHAPES * XKV_TABLE_RUNGS) /* table indices are 1..XKV_TABLE_MAX, 0: not coded */
#define XKV_MAX_REACH        127
#define XKV_ESCAPE           (-128) /* in place of a value u */

/* What encoding a symbol of frequency f takes, with x / f as ((x + increment) * reciprocal) >> (32 + shift):
 * start : 12 | 4096 - f : 12 | shift : 4 | 0 : 3 | increment : 1, lowest bits first. */
typedef struct xkv_symbol {
    uint32_t reciprocal, packed;
} xkv_symbol;

typedef struct xkv_base_table {
    uint32_t decode[1 << XKV_PROBABILITY_BITS]; /* by slot: f : 12 | slot - start : 12 | u as i8 : 8 */
    xkv_symbol encode[2 * XKV_MAX_REACH + 2];   /* by u + reach; the escape at 2 * reach + 1 */
    uint32_t cost[XKV_MAX_REACH + 1];           /* by |u|, 1/65536 bit */
    uint32_t escape_cost;                       /* with the word that follows */
    uint32_t reach;                             /* S: the table codes u in [-S, S] */
    uint16_t frequency[XKV_MAX_REACH + 1];      /* by |u| */
    uint16_t escape_frequency;
} xkv_base_table;

typedef struct xkv_table {
    const xkv_base_table *base;
    uint32_t shift; /* low bits that are stored as they are */
} xkv_table;

/* Table `index`, 1..XKV_TABLE_MAX. All are made on the first call, by any thread. */
xkv_table xkv_table_get(uint32_t index);

/* Exact code length, in bits, of n values under table `index`; what rANS adds to it is the spec's 64 bytes a chunk. */
double xkv_table_cost(uint32_t index, const int16_t *q, size_t n);

/* The table of the smallest cost, and that cost; 0 and no bits when all values are zero. */
uint32_t xkv_table_choose(const int16_t *q, size_t n, double *bits);

/* What the choice looks at of n values that are elsewhere: how often |u| occurs at shifts first .. first + shifts - 1.
 */
#define XKV_TABLE_BINS (XKV_MAX_REACH + 2) /* the last one is for all magnitudes beyond XKV_MAX_REACH */
typedef struct xkv_table_counts {
    const uint32_t *counts; /* [shifts][XKV_TABLE_BINS] */
    uint32_t first, shifts;
    uint64_t magnitude; /* sum of |q| */
} xkv_table_counts;

/* The shifts that choosing for n values with this sum of |q| will mostly look at, at most 7; none for zeros. */
void xkv_table_window(uint64_t magnitude, size_t n, uint32_t *first, uint32_t *shifts);
/* The same choice as xkv_table_choose(); false when it needs another shift. */
bool xkv_table_choose_counted(const xkv_table_counts *counts, size_t n, uint32_t *table, double *bits);

#endif
