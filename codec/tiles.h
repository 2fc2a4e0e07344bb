/* tiles.h - what attention reads of an entry: chunks of a group as blocks of coefficients in their smallest form, and
 * tiles of rows, or of weighted coefficients, made from these.
 *
 * A plane's rows are either stored exactly, or x = mean + sum over slots of a coefficient times a row of the basis,
 * which stays where it is: for codec dict in the dictionary. Slots are the components that are coded. */
#ifndef XKV_TILES_H
#define XKV_TILES_H

#include "chunks.h"

/* Tokens of a tile, and slots that are multiplied at a time. */
#define XKV_ATTEND_TOKENS 64u
#define XKV_ATTEND_SLOTS  128u
/* Components of the cross stage that are. */
#define XKV_ATTEND_LINES 32u
/* f32 of the strips of a tile's slots, or of their coefficients. */
#define XKV_TILE_PANEL xkv_strips_size(XKV_ATTEND_TOKENS, XKV_ATTEND_SLOTS)

/* --- A group, for some of its planes ------------------------------------------------------------------------------ */

typedef enum xkv_block_form {
    XKV_BLOCK_ROWS,     /* lossless: rows as the engine stores them */
    XKV_BLOCK_FACTORS,  /* svd: f16 coefficients, [tokens][slots] */
    XKV_BLOCK_INTEGERS, /* dict, svdq: a line for each coefficient, [lines][tokens] */
    XKV_BLOCK_DIAGONAL  /* scalar: likewise, a line for each element */
} xkv_block_form;

#define XKV_NO_LINE UINT32_MAX

typedef struct xkv_tile_group {
    xkv_group_reader reader;
    xkv_block_form form;

    /* Exact rows hold the asked planes only, side by side. */
    uint32_t *offsets; /* [plane_count of the group] bytes in such a row; XKV_NO_LINE: not asked */
    uint32_t row_bytes;
    uint8_t *exact; /* sinks, then window; NULL for lossless groups */

    uint32_t lines;          /* of a block: those of the leading coefficients, then the group's own */
    uint32_t top;            /* leading coefficients, which the cross stage adds to; 0 without one */
    uint32_t *line_of;       /* DIAGONAL: [coded] line of a coded component, or XKV_NO_LINE */
    uint32_t slots;          /* FACTORS and INTEGERS; of INTEGERS each is a line */
    uint32_t *component;     /* [slots], or DIAGONAL: [lines] */
    const xkv_panels *basis; /* [component][width] */
    const float *mean;       /* [width], or NULL for 0 */
} xkv_tile_group;

/* Open a group of an entry for its planes with asked[plane] != 0. `cross` is that of xkv_group_reader_open(). */
XKV_MUST_CHECK xkv_status xkv_tile_group_open(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g,
                                              xkv_cross_stage *cross, const uint8_t *asked, xkv_tile_group *t);
void xkv_tile_group_close(xkv_ctx *ctx, xkv_tile_group *t);

/* Whether a plane's rows can be weighted as coefficients. */
static inline bool xkv_has_slots(const xkv_tile_group *t)
{
    return t->form == XKV_BLOCK_FACTORS || t->form == XKV_BLOCK_INTEGERS;
}

/* --- Blocks ------------------------------------------------------------------------------------------------------- */

/* Coefficients of one component, integer * scale. Those that the cross stage adds to are no multiples of a step: they
 * are rounded to 16 bits of the largest of the chunk. */
typedef struct xkv_line {
    size_t at; /* bytes from the block's data */
    float scale;
    uint32_t bytes; /* of an integer: 1, 2 */
} xkv_line;

/* The tokens [t0, t1) of a chunk that are not exact rows (of a lossless group: all). */
typedef struct xkv_block {
    uint32_t t0, t1;
    const uint8_t *data;
    size_t size;
    xkv_line *lines; /* [lines] */
    uint8_t *memory; /* data, where it belongs to the block, and so do the lines */
} xkv_block;

/* What one thread needs to load blocks of a group. */
typedef struct xkv_block_scratch {
    xkv_ctx *ctx;
    const xkv_tile_group *group;
    xkv_group_reader reader; /* the group's, with the context of the thread's call */
    xkv_chunk_scratch chunk;
    float *panel;    /* xkv_block_panel() f32; belongs to somebody else */
    int16_t *q;      /* [chunk tokens] */
    uint8_t *memory; /* [capacity] first the sums of the cross stage in f32, then what the block holds */
    size_t used, capacity;
    xkv_line *lines;

    uint32_t tokens; /* of the chunk being loaded */
    uint32_t panel_first, panel_count;
} xkv_block_scratch;

/* f32 that loading a block takes for the while. */
size_t xkv_block_panel(const xkv_tile_group *t);

XKV_MUST_CHECK xkv_status xkv_block_scratch_create(xkv_ctx *ctx, const xkv_tile_group *t, float *panel,
                                                   xkv_block_scratch *s);
void xkv_block_scratch_free(xkv_block_scratch *s);

/* Load the block of a chunk; it lives in the scratch until the next one is loaded. */
XKV_MUST_CHECK xkv_status xkv_block_load(xkv_block_scratch *s, uint32_t chunk, xkv_block *b);
/* A copy of its own. */
XKV_MUST_CHECK xkv_status xkv_block_keep(xkv_ctx *ctx, const xkv_tile_group *t, const xkv_block *b, xkv_block *kept);
void xkv_block_free(xkv_ctx *ctx, xkv_block *b);
/* What a block takes when it is kept, and about what that of a whole chunk will. */
uint64_t xkv_block_bytes(const xkv_tile_group *t, const xkv_block *b);
uint64_t xkv_block_expected_bytes(const xkv_tile_group *t);

/* --- Tiles -------------------------------------------------------------------------------------------------------- */

/* Columns [column, column + width) of a group's rows: a plane. */
typedef struct xkv_tile_plane {
    const xkv_tile_group *group;
    uint32_t plane; /* in the geometry */
    uint32_t index; /* in the group */
    uint32_t column, width;
} xkv_tile_plane;

/* Rows x [count][width] of coded tokens t0 .. of a block; K before RoPE. `panel`: XKV_TILE_PANEL f32. */
void xkv_tile_rows(const xkv_tile_plane *p, const xkv_block *b, uint32_t t0, uint32_t count, float *panel, float *x);

/* The stored rows of the group from a token on that is exact, or of a lossless group, whose block it is in. */
const uint8_t *xkv_tile_stored(const xkv_tile_group *t, const xkv_block *b, uint32_t token);
/* Exact rows as f32: `rows` are the group's, from the first wanted token on. */
void xkv_tile_exact(const xkv_tile_plane *p, const uint8_t *rows, uint32_t count, float *x);

/* sums [m][slots] += weights [m][count] (rows `ld` apart) times the coefficients of tokens t0 .. ; `p` has slots. */
void xkv_tile_weigh(const xkv_tile_plane *p, const xkv_block *b, uint32_t t0, uint32_t count, size_t m,
                    const float *weights, size_t ld, float *panel, float *sums);

/* x [m][n] (rows `ld` apart) += sums [m][slots] times columns [from, from + n) of the plane's basis, + weight[i] times
 * its mean. `panel` as above. */
void xkv_tile_apply_basis(const xkv_tile_plane *p, size_t m, const float *sums, const float *weight, uint32_t from,
                          uint32_t n, float *panel, float *x, size_t ld);

#endif
