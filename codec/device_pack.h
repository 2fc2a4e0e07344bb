/* device_pack.h - packing rows that are in a device's memory. The encoder (encode.c) is the CPU's; for groups of codec
 * dict it asks the device in place of xkv_code_group(), xkv_code_cross() and xkv_rans_encode(), for those of codec svd
 * in place of xkv_factorize().
 *
 *   device_pack.c        the call, its workspace
 *   device_pack_rows.c   rows that the host needs: exact ones, samples, groups that are stored lossless
 *   device_pack_tile.c   a group's rows, and sums over them
 *   device_pack_group.c  from rows to integers, and the error that they make
 *   device_pack_choose.c which components are coded, and with which tables
 *   device_pack_code.c   from integers to streams
 *   device_pack_svd.c    from rows to 16-bit factors, and the error that they make
 */
#ifndef XKV_DEVICE_PACK_H
#define XKV_DEVICE_PACK_H

#include "coded.h"
#include "device_dict.h"
#include "svd_group.h"

/* What the groups, of a dictionary or of codec svd, need of the workspace: the most of all of them. */
typedef struct xkv_pack_need {
    uint64_t width, rank, top;
    uint64_t operands;  /* rank + top */
    uint64_t area;      /* operands * width */
    uint64_t stage;     /* components of the cross stage; 0 without one */
    uint64_t listed;    /* the larger of rank and stage */
    uint64_t planes;    /* of a group */
    uint64_t angles;    /* cosines and sines of a token */
    uint64_t blocks;    /* f32 of metric blocks */
    uint64_t constants; /* bytes of what a group brings: planes, RoPEs, mean, where its planes begin */
    uint64_t svd;       /* bytes of xkv_device_svd_run(); 0 with a dictionary */
} xkv_pack_need;

/* Where everything is: offsets into the workspace. */
typedef struct xkv_pack_layout {
    uint32_t tile_tokens;  /* whose rows are there at a time */
    uint32_t tiles;        /* that the coded tokens make */
    uint32_t batch_chunks; /* that are encoded at a time */
    uint64_t stride;       /* of integers: all coded tokens */
    uint64_t positions, constants, blocks, lists, flags, tables, angles;
    uint64_t rows, product;             /* f32 [tile][width] */
    uint64_t row_halves, basis_halves;  /* two bf16 [tile][width], [operands][width] */
    uint64_t y, y_halves;               /* f32 [operands][tile], two bf16 */
    uint64_t stage_y, mix;              /* f32 [stage][tile], [stage][top] */
    uint64_t q, stage_q;                /* int16 [rank][stride], [stage][stride] */
    uint64_t stats, windows, counts;    /* [listed][tiles], [listed], [listed][shifts][bins] */
    uint64_t sums;                      /* f64 [2 (planes + 1)][stride] */
    uint64_t room, spans, sizes, words; /* words of a chunk; [batch_chunks] */

    /* Codec svd, whose rows are f32 [tokens][width]. */
    uint64_t coefficients, factors;        /* f32 and f16 [tokens][rank] */
    uint64_t components, component_halves; /* f32 and two f16 [rank][width] */
    uint64_t scales, svd;                  /* [rank]; what decomposing needs */
    uint64_t size;
} xkv_pack_layout;

/* One call. */
typedef struct xkv_device_packing {
    xkv_ctx *ctx;
    xkv_device *device;
    const xkv_plugin *api;
    void *stream;
    const xkv_geometry *geometry;
    const xkv_view *views; /* the device's */
    const xkv_dict *dict;  /* NULL: codec svd */
    const xkv_device_dict *device_dict;
    uint32_t chunk_tokens, sinks, window;
    uint32_t tokens; /* coded: all but sinks and window */
    bool sample;     /* rate control looks at some rows */
    xkv_pack_need need;
    xkv_pack_layout at;
    uint8_t *workspace; /* NULL: the device computes nothing */

    /* Rows on the host. */
    xkv_view *host_views; /* [plane_count] of `few`, or of all rows of the group at hand */
    uint32_t *few_rows;   /* [token_count] where a token's row is, in order of the tokens that are there */
    uint8_t **few, **all; /* [plane_count] dense rows */
    uint32_t few_count;   /* rows of few */
    const uint32_t *here; /* [here_count] planes of which all rows are there: those of a group */
    uint32_t here_count;

    /* Streams of what was coded last, when they were asked for. */
    uint8_t *streams;
    uint64_t *stream_at; /* [chunk_count + 1] */
    uint64_t stream_room;
    bool streams_made;
} xkv_device_packing;

/* A call of the device's table, passed on. */
#define XKV_PACKING(p, call) XKV_TRY(xkv_device_result((p)->ctx, (p)->device, (p)->api->call))

static inline void *xkv_pack_place(const xkv_device_packing *p, uint64_t offset)
{
    return p->workspace + offset;
}

/* f32 of the metric blocks of a group. */
uint64_t xkv_pack_block_elements(const xkv_geometry *geometry, const xkv_group *g);

/* --- device_pack_rows.c --- */

/* Tokens that the host needs of all planes: sinks, window and, with `sample`, those that rate control looks at.
 * Errors: MEMORY, LIMIT, BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_pack_few(xkv_device_packing *p, bool sample);
/* All rows of a group, in place of those of the group before; `g` NULL: of none. Errors: likewise. */
XKV_MUST_CHECK xkv_status xkv_device_pack_bring(xkv_device_packing *p, const xkv_group *g);
/* All rows of all planes. Errors: likewise. */
XKV_MUST_CHECK xkv_status xkv_device_pack_bring_all(xkv_device_packing *p);
void xkv_device_pack_release_rows(xkv_device_packing *p);

/* --- device_pack_group.c --- */

/* Set nonfinite[plane_count] where a plane has a NaN or an infinity. Errors: BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_pack_scan(xkv_device_packing *p, uint8_t *nonfinite);

/* xkv_code_cross() and xkv_code_group(), with integers that stay on the device: coded->q is NULL. Figures are those of
 * the CPU up to the rounding of products (TF32 in the metric), integers where the coefficients are the same. Errors:
 * MEMORY, BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_code_cross(xkv_device_packing *p, xkv_pool *pool, const xkv_container *c,
                                                const xkv_transform *transforms, float step, xkv_coded *coded);
XKV_MUST_CHECK xkv_status xkv_device_code_group(xkv_device_packing *p, xkv_pool *pool, xkv_group *g,
                                                const xkv_transform *t, float step, const xkv_cross *cross,
                                                xkv_coded *coded);
/* The norms [group_count] of xkv_code_cross(). */
XKV_MUST_CHECK xkv_status xkv_device_cross_norms(xkv_device_packing *p, const xkv_container *c,
                                                 const xkv_transform *transforms, float *norms);

/* --- device_pack_choose.c --- */

/* Of components first .. coded->rank - 1, whose integers lie at `q`, p->at.stride apart, with stats for p->at.tiles
 * tiles: choose the tables, and set all of `coded` but its errors. */
XKV_MUST_CHECK xkv_status xkv_device_pack_choose(xkv_device_packing *p, xkv_pool *pool, const int16_t *q,
                                                 uint32_t first, xkv_coded *coded);

/* --- device_pack_code.c --- */

/* The streams of `coded`, the group or stage coded last: p->streams. `first` as above. Errors: MEMORY, BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_pack_streams(xkv_device_packing *p, const xkv_container *c,
                                                  const xkv_coded *coded);

/* --- device_pack_svd.c --- */

/* xkv_factorize() of all coded tokens, of rank g->rank. *found is false, and nothing is set but energies, when the CPU
 * has to do it: the rows' norm is beyond what the device takes, or their columns are dependent. Errors: MEMORY,
 * BACKEND.
 */
XKV_MUST_CHECK xkv_status xkv_device_factorize(xkv_device_packing *p, xkv_group *g, uint32_t iterations, xkv_factors *f,
                                               bool *found);

#endif
