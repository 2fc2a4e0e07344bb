#include "parts.h"

#include <inttypes.h>

void xkv_chunk_tokens(const xkv_container *c, uint32_t chunk, uint32_t *t0, uint32_t *t1)
{
    uint64_t first = (uint64_t)chunk * c->chunk_tokens;

    *t0 = (uint32_t)first;
    *t1 = (uint32_t)xkv_min64(first + c->chunk_tokens, c->geometry.token_count);
}

void xkv_chunk_coded(const xkv_container *c, uint32_t chunk, uint32_t *t0, uint32_t *t1)
{
    uint32_t end = c->geometry.token_count - c->window;

    xkv_chunk_tokens(c, chunk, t0, t1);
    if (*t0 < c->sinks)
        *t0 = c->sinks;
    if (*t1 > end)
        *t1 = end;
    if (*t0 > *t1)
        *t0 = *t1;
}

uint64_t xkv_part_bound(xkv_shape s)
{
    return s.elem * (4 + (uint64_t)ZSTD_compressBound((size_t)(s.rows * s.cols)));
}

/* The highest plane goes channel by channel, and channels differ: a window of 64 KiB makes blocks of that size, each
 * with Huffman tables of its own, which saves 1 %. The other planes are nearly noise, and gain from far matches if at
 * all. */
static size_t compress_plane(ZSTD_CCtx *zstd, int level, bool highest, const uint8_t *plane, size_t size, uint8_t *dst,
                             size_t cap)
{
    ZSTD_CCtx_reset(zstd, ZSTD_reset_session_and_parameters);
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_compressionLevel, level);
    if (highest)
        ZSTD_CCtx_setParameter(zstd, ZSTD_c_windowLog, 16);
    return ZSTD_compress2(zstd, dst, cap, plane, size);
}

xkv_status xkv_part_encode(xkv_ctx *ctx, const xkv_kernels *k, ZSTD_CCtx *zstd, int level, xkv_shape s, const void *raw,
                           uint8_t *planes, uint8_t *packed, const void **data, uint64_t *size, uint32_t *method)
{
    size_t plane_size = (size_t)(s.rows * s.cols);
    uint64_t used = 4ull * s.elem, bound = xkv_part_bound(s);

    *data = raw;
    *size = xkv_shape_bytes(s);
    *method = XKV_METHOD_STORED;
    if (level == 0 || plane_size == 0)
        return XKV_OK;
    k->split_bytes(raw, (size_t)s.rows, (size_t)s.cols, s.elem, planes);
    for (uint32_t b = 0; b < s.elem; b++) {
        size_t n = compress_plane(zstd, level, b == s.elem - 1, planes + b * plane_size, plane_size, packed + used,
                                  (size_t)(bound - used));
        if (ZSTD_isError(n))
            return xkv_fail(ctx, XKV_ERROR_BACKEND, "zstd: %s", ZSTD_getErrorName(n));
        xkv_store32(packed + 4ull * b, (uint32_t)n);
        used += n;
    }
    if (used < *size) {
        *data = packed;
        *size = used;
        *method = XKV_METHOD_ZSTD;
    }
    return XKV_OK;
}

/* One byte plane: exactly one frame, of exactly the expected content. */
static xkv_status decode_plane(xkv_ctx *ctx, ZSTD_DCtx *zstd, const uint8_t *frame, size_t frame_size, uint8_t *plane,
                               size_t plane_size, const char *where, uint32_t index)
{
    unsigned long long content = ZSTD_getFrameContentSize(frame, frame_size);
    size_t n;

    if (content != plane_size || ZSTD_findFrameCompressedSize(frame, frame_size) != frame_size)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: byte plane %u: not one zstd frame of %zu bytes [D2]", where, index,
                        plane_size);
    n = ZSTD_decompressDCtx(zstd, plane, plane_size, frame, frame_size);
    if (ZSTD_isError(n) || n != plane_size)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: byte plane %u: zstd: %s [D2]", where, index,
                        ZSTD_isError(n) ? ZSTD_getErrorName(n) : "wrong size");
    return XKV_OK;
}

xkv_status xkv_part_planes(xkv_ctx *ctx, ZSTD_DCtx *zstd, xkv_shape s, const uint8_t *packed, uint64_t size,
                           uint8_t *planes, const char *where)
{
    size_t plane_size = (size_t)(s.rows * s.cols);
    uint64_t at = 4ull * s.elem;

    if (size < at)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: %" PRIu64 " bytes have no room for the frame sizes [D2]", where,
                        size);
    for (uint32_t b = 0; b < s.elem; b++) {
        uint64_t n = xkv_load32(packed + 4ull * b);
        if (n > size - at)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT,
                            "%s: byte plane %u: %" PRIu64 " bytes, %" PRIu64 " left in the part [D2]", where, b, n,
                            size - at);
        XKV_TRY(decode_plane(ctx, zstd, packed + at, (size_t)n, planes + b * plane_size, plane_size, where, b));
        at += n;
    }
    if (at != size)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: %" PRIu64 " bytes behind the last frame [D2]", where, size - at);
    return XKV_OK;
}

xkv_status xkv_part_decode(xkv_ctx *ctx, const xkv_kernels *k, ZSTD_DCtx *zstd, xkv_shape s, const uint8_t *packed,
                           uint64_t size, uint8_t *planes, void *raw, const char *where)
{
    XKV_TRY(xkv_part_planes(ctx, zstd, s, packed, size, planes, where));
    k->join_bytes(planes, (size_t)s.rows, (size_t)s.cols, s.elem, raw);
    return XKV_OK;
}

static xkv_status read_coded_matrix(xkv_ctx *ctx, const xkv_part *p, xkv_shape shape, const char *where,
                                    const uint8_t *packed, uint8_t *raw)
{
    ZSTD_DCtx *zstd = ZSTD_createDCtx();
    uint8_t *planes = NULL;
    xkv_status status;

    if (!zstd)
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "zstd: no memory for a context");
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)xkv_shape_bytes(shape), &planes), out);
    XKV_TRY_GOTO(xkv_part_decode(ctx, xkv_kernels_cpu(), zstd, shape, packed, p->size, planes, raw, where), out);
out:
    ZSTD_freeDCtx(zstd);
    xkv_release(ctx, planes);
    return status;
}

xkv_status xkv_read_matrix(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c, const xkv_group *g,
                           uint32_t part, const char *where, uint8_t **raw_p)
{
    const xkv_part *p = &g->parts[part];
    xkv_shape shape = xkv_part_shape(c, g, part);
    uint8_t *packed = NULL, *raw = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW(ctx, (size_t)p->size, &packed));
    XKV_TRY_GOTO(xkv_container_read_part(ctx, input, c, p, packed), out);
    if (p->method == XKV_METHOD_STORED) {
        *raw_p = packed;
        return XKV_OK;
    }
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)xkv_shape_bytes(shape), &raw), out);
    XKV_TRY_GOTO(read_coded_matrix(ctx, p, shape, where, packed, raw), out);
    *raw_p = raw;
    raw = NULL;
out:
    xkv_release(ctx, packed);
    xkv_release(ctx, raw);
    return status;
}
