/* device_work.h - a group that the device decodes, in pieces: what it needs (device_need.c), opening it and its
 * constants (device_work.c), its components (device_components.c), its chunks (device_batch.c), its rows
 * (device_group.c). */
#ifndef XKV_DEVICE_WORK_H
#define XKV_DEVICE_WORK_H

#include "device_planes.h"
#include "device_read.h"
#include "device_tables.h"
#include "parts.h"

/* A group at hand. */
typedef struct xkv_device_work {
    xkv_device_reading *r;
    const xkv_group *g;
    xkv_group_reader reader;
    bool exact, integers, crossed; /* coefficients are integers; the cross stage adds to them */
    bool scalar, lossless;
    uint32_t own, cross;               /* rows of operands */
    uint32_t *own_rows, *cross_rows;   /* xkv_plug_expand.rows */
    uint32_t *own_index, *cross_index; /* xkv_plug_split.index: the basis' rows; rows of a tile of the stage's */
    const xkv_panels *components; /* the host's [..][width], of which own_index lists rows; NULL: the device has them */
    const xkv_device_basis *basis; /* dict */
    uint32_t *source;              /* scalar: xkv_plug_spread.source and */
    float *factor;                 /* .factor */
    float step, scale;             /* of the components; scale is a power of two */
    uint32_t angles;               /* elements of a token's cosines and sines */
    bool fused;                    /* one kernel makes rows of integers and stores them */

    /* Offsets in the constants. */
    uint64_t codes_at, own_rows_at, cross_rows_at, own_index_at, cross_index_at, source_at, factor_at, mean_at,
        planes_at, ropes_at;
} xkv_device_work;

static inline void *xkv_device_place(const xkv_device_work *w, uint64_t offset)
{
    return w->r->workspace + offset;
}

static inline void *xkv_device_constant(const xkv_device_work *w, uint64_t offset)
{
    return xkv_device_place(w, w->r->at.constants + offset);
}

/* --- device_need.c ------------------------------------------------------------------------------------------------ */

/* Rows of operands that a component with this table takes: 1 or 2. */
uint32_t xkv_device_parts_of(uint8_t table);
/* Whether the cross stage adds to a group, of whose coefficients it codes the first `top`. */
bool xkv_device_is_crossed(const xkv_device_reading *r, const xkv_group *g, uint32_t top);

/* --- device_work.c ------------------------------------------------------------------------------------------------ */

/* Open, and close whatever became of it. Errors: as xkv_group_reader_open(). */
XKV_MUST_CHECK xkv_status xkv_device_work_open(xkv_device_reading *r, const xkv_group *g, bool exact,
                                               xkv_device_work *w);
void xkv_device_work_close(xkv_device_work *w);

/* The side part that tells how the integers at hand are coded. */
const xkv_side *xkv_device_side_of(const xkv_device_work *w);

XKV_MUST_CHECK xkv_status xkv_device_send_constants(xkv_device_work *w);

/* --- device_components.c ------------------------------------------------------------------------------------------ */

/* Make the operands that every tile is multiplied with. */
XKV_MUST_CHECK xkv_status xkv_device_make_components(xkv_device_work *w);

/* --- device_batch.c ----------------------------------------------------------------------------------------------- */

/* Neighbouring chunks on their way: positions of the tokens that are asked for, streams, then the chunks' bytes. */
typedef struct xkv_device_batch {
    xkv_device_work *w;
    uint32_t chunk, chunks;
    uint32_t t0, t1;     /* coded tokens */
    uint32_t first, end; /* of these, asked for */
    uint64_t streams_at, data_at, size;
    xkv_staging *staging;
    uint8_t *there;
} xkv_device_batch;

/* The tokens that a chunk holds, and its bytes in a batch. */
void xkv_device_tokens_of(const xkv_device_work *w, uint32_t chunk, uint32_t *t0, uint32_t *t1);
uint64_t xkv_device_chunk_bytes(const xkv_device_work *w, uint32_t chunk);

/* As many chunks from b->chunk on as fit. */
void xkv_device_plan_batch(xkv_device_batch *b);
/* Read and copy them, on the stream of copies, while the caller's is busy with the batch before. Errors: as
 * xkv_chunk_load(); BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_send_batch(xkv_device_batch *b);
/* What is on the caller's stream is the last that uses them. */
XKV_MUST_CHECK xkv_status xkv_device_release_slot(const xkv_device_batch *b);

/* --- device_direct.c ---------------------------------------------------------------------------------------------- */

/* Whether the device can read the chunks of a batch itself: it can check them, and they lie in the file as they are to
 * lie in the batch. */
bool xkv_device_reads(const xkv_device_batch *b);
/* Have it do so, and the caller's stream check them once it has the streams. False: it could not, the log says why, and
 * will not be asked again in this call. */
bool xkv_device_direct_read(const xkv_device_batch *b);
XKV_MUST_CHECK xkv_status xkv_device_verify(const xkv_device_batch *b);

#endif
