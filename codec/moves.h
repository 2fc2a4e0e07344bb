/* moves.h - restoring K at other positions than those it was computed at. */
#ifndef XKV_MOVES_H
#define XKV_MOVES_H

#include "container.h"
#include "xkv/codec.h"

/* From the entry's positions to those asked for. Groups that are coded before RoPE are rotated to the new position;
 * rows that are stored exactly turn once more, by the distance, which is the same for any RoPE whose angles are a
 * multiple of the position (<xkv/format.h>, xkv_rope). */
typedef struct xkv_moves {
    const int32_t *positions; /* [count] to rotate to; belongs to somebody else */
    int32_t *distances;       /* [count]; NULL: all rows stay where they are */
    xkv_geometry geometry;    /* the entry's, with ropes that turn but do not scale */
    xkv_rope *ropes;
} xkv_moves;

/* Of the tokens and groups that are asked for; `geometry` is that of the planes of `groups`. Without positions they
 * stay. Errors: ARGUMENT (a distance too large), UNSUPPORTED (a K without a known RoPE), MEMORY. */
XKV_MUST_CHECK xkv_status xkv_moves_create(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_group *groups,
                                           const xkv_read_options *o, xkv_moves *m);
void xkv_moves_free(xkv_ctx *ctx, xkv_moves *m);

#endif
