/* chunks.h - decoding the chunks of one group of an entry: into exact rows, into coefficients, or into rows made of
 * these. */
#ifndef XKV_CHUNKS_H
#define XKV_CHUNKS_H

#include "coded.h"
#include "entry_internal.h"
#include "scalar.h"
#include "svdq.h"

#include <zstd.h>

/* The side part of a coded group, checked. */
typedef struct xkv_side {
    uint8_t *bytes;
    float step;
    const uint8_t *tables; /* [rank], in `bytes` */
    uint8_t *coded_tables; /* [coded] without zeros */
    uint32_t coded;
} xkv_side;

/* Step and tables: what all codecs with a side part have in it. Errors: CHECKSUM, CORRUPT [Q3, Q4], MEMORY, and what
 * the input returns. */
XKV_MUST_CHECK xkv_status xkv_side_read(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, xkv_side *side);
void xkv_side_free(xkv_ctx *ctx, xkv_side *side);

/* The integers of a chunk's coded tokens, q [coded][tokens]. `packed` holds the chunk's part. Errors: CHECKSUM, CORRUPT
 * [E2, E3], and what the input returns. */
XKV_MUST_CHECK xkv_status xkv_side_integers(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g,
                                            const xkv_side *side, uint32_t chunk, uint8_t *packed, int16_t *q);

/* Integers of chunks from `first` on that stay in memory, since several tasks need them: [coded][tokens] each. */
typedef struct xkv_kept {
    uint32_t first;
    int16_t *q; /* NULL: none */
} xkv_kept;

/* --- The cross stage ---------------------------------------------------------------------------------------------- */

/* The cross stage of an entry, which its groups of codec dict are decoded with. */
typedef struct xkv_cross_stage {
    const xkv_group *g; /* NULL: the entry has none */
    xkv_side side;
    xkv_cross cross;
    xkv_kept kept; /* its integers, which every group needs */
} xkv_cross_stage;

/* Open the stage of an entry, if it has one. Errors: MISMATCH (no dictionary), CORRUPT [Q6], as xkv_side_read(). */
XKV_MUST_CHECK xkv_status xkv_cross_stage_open(xkv_ctx *ctx, const xkv_entry *entry, xkv_cross_stage *stage);
/* Keep the integers of chunks first .. last when they are loaded: 2 bytes for each token and coded component. */
XKV_MUST_CHECK xkv_status xkv_cross_stage_keep(xkv_ctx *ctx, const xkv_entry *entry, uint32_t first, uint32_t last,
                                               xkv_cross_stage *stage);
void xkv_cross_stage_free(xkv_ctx *ctx, xkv_cross_stage *stage);

/* --- A group ------------------------------------------------------------------------------------------------------ */

/* What decoding any chunk of a group needs: its basis, and how its coefficients are coded. Of the cross stage's group
 * only the integers can be decoded. */
typedef struct xkv_group_reader {
    xkv_ctx *ctx;
    const xkv_kernels *kernels;
    const xkv_entry *entry;
    const xkv_group *g;
    xkv_cross_stage *cross; /* NULL: none; belongs to somebody else */

    xkv_panels components; /* svd: [rank][width], times their scales */

    /* dict, scalar and svdq */
    xkv_side side;
    xkv_scalar scalar;
    xkv_svdq_basis svdq;
    xkv_transform transform;
    xkv_synthesis synthesis; /* empty until asked for */
    xkv_kept kept;           /* its own integers */

    xkv_columns *columns; /* [column_count] that xkv_chunk_own_rows() makes; empty until asked for */
    uint32_t column_count;
} xkv_group_reader;

/* Read what a group has beside its chunks and exact rows. `cross` may be NULL for groups that are not of codec dict.
 * A reader stays where it is until it is closed. Errors: MISMATCH (no dictionary), CHECKSUM, CORRUPT, MEMORY, and what
 * the input returns. */
XKV_MUST_CHECK xkv_status xkv_group_reader_open(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g,
                                                xkv_cross_stage *cross, xkv_group_reader *r);
/* Make what rows need, which then makes only these heads' columns. */
XKV_MUST_CHECK xkv_status xkv_group_reader_for_rows(xkv_group_reader *r, xkv_heads heads);
void xkv_group_reader_close(xkv_group_reader *r);

/* Whether the group's coefficients are integers: dict, scalar, svdq. */
static inline bool xkv_group_is_coded(const xkv_group *g)
{
    return g->codec == XKV_GROUP_DICT || g->codec == XKV_GROUP_SCALAR || g->codec == XKV_GROUP_SVDQ;
}

/* Whether the integers of the cross stage are part of the group's chunks. */
bool xkv_group_uses_cross(const xkv_group_reader *r);

/* The side part of a group of codec svd, checked [D3]: f16 components [rank][width], then f32 scales [rank]; allocated.
 */
XKV_MUST_CHECK xkv_status xkv_read_components(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g,
                                              uint8_t **matrix_p);

/* The exact rows of a group that is not lossless, sinks then window; allocated. */
XKV_MUST_CHECK xkv_status xkv_read_exact_rows(const xkv_group_reader *r, uint8_t **rows);

/* Rows that are made of coefficients at a time: their coefficients stay in the second cache. */
#define XKV_CHUNK_ROWS (11 * XKV_STRIP)

/* --- A chunk ------------------------------------------------------------------------------------------------------ */

/* What one thread needs to decode chunks. */
typedef struct xkv_chunk_scratch {
    ZSTD_DCtx *zstd;                /* made when first needed */
    uint8_t *packed, *planes, *raw; /* of the largest chunk */
    int16_t *q, *cross_q;           /* [coded][chunk_tokens] of the group, and of the cross stage, unless kept */
    float *coefficients;            /* svd: of a tile */
    float *synthesis;               /* for rows of a tile */
} xkv_chunk_scratch;

/* Scratch for the chunks of this group; what is there already is replaced. Without `integers` only what
 * xkv_chunk_visit() and xkv_chunk_load() of groups without integers need. */
XKV_MUST_CHECK xkv_status xkv_chunk_scratch_size(const xkv_group_reader *r, bool integers, xkv_chunk_scratch *s);
void xkv_chunk_scratch_empty(xkv_ctx *ctx, xkv_chunk_scratch *s);
void xkv_chunk_scratch_free(xkv_ctx *ctx, xkv_chunk_scratch *s);

/* A chunk, decoded into the scratch it was loaded with. */
typedef struct xkv_chunk {
    uint32_t t0, t1;       /* its tokens: all of them where the group is lossless, else the coded ones */
    const uint8_t *matrix; /* lossless: rows as the engine stores them; svd: f16 coefficients [t1 - t0][rank] */
    xkv_integers own;      /* dict, scalar, svdq: [coded] */
    xkv_integers cross;    /* [coded of the stage] where it adds to the group, else NULL */
} xkv_chunk;

/* Read, check and decode a chunk; of the cross stage, only its integers. A group that uses the stage takes those that
 * are kept: the stage's own chunk has been loaded before. Errors: CHECKSUM, CORRUPT, MEMORY, BACKEND, and what the
 * input returns. */
XKV_MUST_CHECK xkv_status xkv_chunk_load(const xkv_group_reader *r, xkv_chunk_scratch *s, uint32_t chunk,
                                         xkv_chunk *out);

/* Load chunks first .. last of a group with integers and keep those in the reader, for several threads to load them
 * again at no cost. After an error the reader can only be closed. Errors: likewise. */
XKV_MUST_CHECK xkv_status xkv_group_reader_keep(xkv_group_reader *r, xkv_chunk_scratch *s, uint32_t first,
                                                uint32_t last);

/* The integers of a chunk's coded components one after the other, where not all need be in memory: `take` gets those of
 * the i-th one, [tokens], which are gone afterwards. `cross`: those of the stage, not of the group. `q` is [tokens]. */
typedef xkv_status (*xkv_component_fn)(void *user, uint32_t i, const int16_t *q);
XKV_MUST_CHECK xkv_status xkv_chunk_visit(const xkv_group_reader *r, const xkv_chunk_scratch *s, bool cross,
                                          uint32_t chunk, int16_t *q, xkv_component_fn take, void *user);

/* Read and check a chunk of a lossless group into `to`, which has room for its rows: as they are, or as byte planes
 * [spec/codec.md, section 2] when the part's method is XKV_METHOD_ZSTD. Errors: likewise. */
XKV_MUST_CHECK xkv_status xkv_chunk_load_planes(const xkv_group_reader *r, xkv_chunk_scratch *s, uint32_t chunk,
                                                uint8_t *to);

/* Rows x [t1 - t0][width] (K before RoPE) of at most XKV_CHUNK_ROWS tokens of a chunk that is not lossless: as far as
 * the group's own integers go, and then what those of the cross stage add. */
void xkv_chunk_own_rows(const xkv_group_reader *r, xkv_chunk_scratch *s, const xkv_chunk *chunk, uint32_t t0,
                        uint32_t t1, float *x);
void xkv_chunk_add_cross(const xkv_group_reader *r, xkv_chunk_scratch *s, const xkv_chunk *chunk, uint32_t t0,
                         uint32_t t1, float *x);

#endif
