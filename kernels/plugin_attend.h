/* plugin_attend.h - attention over rows in a device's memory: part of plugin.h. */
#ifndef XKV_PLUGIN_ATTEND_H
#define XKV_PLUGIN_ATTEND_H

/* --- Rows, as they are held --------------------------------------------------------------------------------------- */

/* How the rows of a plane are held. With slots x = mean + sum over slots of a coefficient times a row of the basis. */
enum {
    XKV_HELD_ROWS = 0,    /* elements as they are, dense [tokens][width] */
    XKV_HELD_FACTORS = 1, /* slots; f16 coefficients [tokens][slots] */
    XKV_HELD_LINES = 2,   /* slots; a line of integers each */
    XKV_HELD_DIAGONAL = 3 /* a line of integers for each element: x = mean + integer * scale * factor */
};

/* Integers of one component, and what they are multiplied with. */
typedef struct xkv_held_line {
    uint64_t at; /* bytes from the data of the tile; a multiple of `bytes` */
    float scale;
    uint32_t bytes; /* of an integer: 1, 2 */
} xkv_held_line;

/* What the rows of a plane in one entry have in common. */
typedef struct xkv_held_plane {
    uint32_t form, dtype;   /* dtype: f32, f16 or bf16, of ROWS */
    uint32_t width, column; /* elements of a row; of its first one in the basis and the mean */
    uint32_t slots;         /* 0 where there are none */
    const uint32_t *row;    /* [slots] of the basis */
    const uint32_t *line;   /* LINES: [slots], DIAGONAL: [width]; XKV_NO_SOURCE: 0 */
    const float *factor;    /* DIAGONAL: [width] */
    const float *basis;     /* [..][ld] */
    const float *mean;      /* [ld], or NULL for 0 */
    uint64_t ld;
    uint32_t pairs, offset, style; /* of the RoPE that is still to be applied; pairs 0: none */
} xkv_held_plane;

/* At most so many tokens are attended to at a time. */
#define XKV_HELD_TOKENS 32u

/* Rows [row, row + count) of those asked for, of one plane. */
typedef struct xkv_held_tile {
    uint32_t row, count; /* count <= XKV_HELD_TOKENS */
    uint32_t plane;      /* of xkv_plug_attend.planes */
    uint32_t from;       /* of its first token among those of the data */
    const uint8_t *data;
    const xkv_held_line *lines;
} xkv_held_tile;

/* Neighbouring tiles whose rows are added up together; all of one entry. */
typedef struct xkv_held_split {
    uint32_t first_tile, end_tile, first_row, end_row;
    uint32_t entry; /* which one */
} xkv_held_split;

/* --- Operations --------------------------------------------------------------------------------------------------- */

/* Queries of a KV head that are attended at a time. */
#define XKV_ATTEND_QUERIES 8u

/* Attention of queries first .. first + count - 1 of every KV head: query i is that of token i / group and head
 * i % group of the KV head's. Four kernels: scores of a tile; weights of a split; weighted coefficients and rows of V
 * of a split; output, from those of all splits. */
typedef struct xkv_plug_attend {
    const xkv_held_plane *planes;
    const xkv_held_tile *keys[2]; /* [tile_count]; K, or MLA's latent and K-rope */
    uint64_t angles_at[2];        /* of the RoPE of each, in a row of the angles */
    const xkv_held_tile *values;  /* [tile_count] */
    const uint32_t *value_planes; /* [entries] the plane whose slots the weighted coefficients are of */
    const xkv_held_split *splits; /* [split_count] */
    const float *angles;          /* [rows][angles_stride] cosines, then sines, of each RoPE */
    const int32_t *positions;     /* [rows] */
    uint64_t angles_stride;
    uint32_t rows, tile_count, split_count;

    uint32_t kv_heads, dim_k[2], dim_v; /* dim_k[1] 0: no second part */
    uint32_t group;                     /* query heads of a KV head */
    uint32_t first, count;              /* count <= XKV_ATTEND_QUERIES */
    const uint8_t *queries;             /* f32, each head's contiguous, [dim_k[0] + dim_k[1]] */
    int64_t query_stride, head_stride;
    const int32_t *query_positions; /* [tokens]; NULL unless causal */
    float scale, softcap;           /* softcap 0: none */
    uint32_t causal, window;

    uint32_t slots;        /* the most of the planes of V */
    float *scores;         /* [kv_heads][count][rows] */
    float *largest, *sums; /* [split_count][kv_heads][count] */
    float *parts;          /* [split_count][kv_heads][count][columns], columns = slots + dim_v + 1 */
    float *merged;         /* [kv_heads][count][columns] */
    float *output, *lse;   /* [tokens][heads][dim_v], [tokens][heads] */
} xkv_plug_attend;

/* Rows of one plane as they were, restored from what is held: one kernel. `to` is in the launch itself, so that nothing
 * is copied for it: its heads have at most 640 elements, a multiple of a block's where the view is of blocks; its
 * column and its RoPE are not used. Token t is row t of the view. */
typedef struct xkv_plug_restore {
    const xkv_held_plane *planes;
    const xkv_held_tile *tiles; /* [tile_count] */
    uint32_t tile_count;
    const float *angles; /* of the plane's RoPE */
    uint64_t angles_stride;
    xkv_plug_plane to;
} xkv_plug_restore;

/* Attention over all rows from that over parts of them (xkv_attention_merge). */
#define XKV_PLUG_STATES 16u
typedef struct xkv_plug_merge {
    const float *outputs[XKV_PLUG_STATES]; /* [rows][dim] */
    const float *lses[XKV_PLUG_STATES];    /* [rows] */
    uint32_t count, dim;
    uint64_t rows;
    float *output, *lse; /* either may be that of a state */
} xkv_plug_merge;

#endif
