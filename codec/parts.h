/* parts.h - the parts of a group (spec/codec.md, sections 1 and 2): their shapes, and how their bytes are stored. */
#ifndef XKV_PARTS_H
#define XKV_PARTS_H

#include "container.h"
#include "kernels.h"

#include <zstd.h>

/* Tokens [*t0, *t1) of a chunk, and the coded ones among them (an empty range has *t0 == *t1). */
void xkv_chunk_tokens(const xkv_container *c, uint32_t chunk, uint32_t *t0, uint32_t *t1);
void xkv_chunk_coded(const xkv_container *c, uint32_t chunk, uint32_t *t0, uint32_t *t1);

/* Largest stored size of a part of this shape. */
uint64_t xkv_part_bound(xkv_shape s);

/* Store the matrix at `raw`: method 1 into `packed` (xkv_part_bound() bytes) when that is smaller, else method 0, which
 * is the matrix itself. `planes` is scratch of the matrix's size; level 0 always takes method 0.
 * *data points to the bytes to write. Errors: BACKEND (zstd). */
XKV_MUST_CHECK xkv_status xkv_part_encode(xkv_ctx *ctx, const xkv_kernels *k, ZSTD_CCtx *zstd, int level, xkv_shape s,
                                          const void *raw, uint8_t *planes, uint8_t *packed, const void **data,
                                          uint64_t *size, uint32_t *method);

/* The reverse for method 1: `packed` of `size` bytes into `raw`. `where` names the part in messages. Errors: CORRUPT
 * [D2]. */
XKV_MUST_CHECK xkv_status xkv_part_decode(xkv_ctx *ctx, const xkv_kernels *k, ZSTD_DCtx *zstd, xkv_shape s,
                                          const uint8_t *packed, uint64_t size, uint8_t *planes, void *raw,
                                          const char *where);

/* The same without the last step: the byte planes, of the matrix's size. */
XKV_MUST_CHECK xkv_status xkv_part_planes(xkv_ctx *ctx, ZSTD_DCtx *zstd, xkv_shape s, const uint8_t *packed,
                                          uint64_t size, uint8_t *planes, const char *where);

/* Read part `part` of `g` whole, check it, and undo method 1: *raw_p is allocated, of the part's shape. `where` names
 * the part in messages. Errors: CHECKSUM, CORRUPT, MEMORY, and what the input returns. */
XKV_MUST_CHECK xkv_status xkv_read_matrix(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c,
                                          const xkv_group *g, uint32_t part, const char *where, uint8_t **raw_p);

#endif
