/* container_blob.c - what all sections share: the cursor, the encoding buffer, and blobs. */
#include "container_parse.h"

#include <stdarg.h>
#include <stdio.h>
#include <zstd.h>
#include <zstd_errors.h>

/* --- Cursor ----------------------------------------------------------------------------------------------------- */

static xkv_status fail_at(const xkv_cursor *cur, xkv_status status, const uint8_t *at, const char *rule,
                          const char *fmt, va_list args)
{
    char text[512];
    vsnprintf(text, sizeof text, fmt, args);
    return xkv_fail(cur->ctx, status, "%s, offset %llu: %s [%s]", cur->section,
                    (unsigned long long)(cur->offset + (uint64_t)(at - cur->data)), text, rule);
}

xkv_status xkv_cursor_fail(const xkv_cursor *cur, const uint8_t *at, const char *rule, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    xkv_status status = fail_at(cur, XKV_ERROR_CORRUPT, at, rule, fmt, args);
    va_end(args);
    return status;
}

xkv_status xkv_cursor_fail_as(const xkv_cursor *cur, xkv_status status, const uint8_t *at, const char *rule,
                              const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    fail_at(cur, status, at, rule, fmt, args);
    va_end(args);
    return status;
}

xkv_status xkv_cursor_take(xkv_cursor *cur, uint64_t size, const uint8_t **bytes_p)
{
    XKV_REQUIRE(cur, size <= cur->size - cur->pos, cur->data + cur->pos, cur->end_rule,
                "a record of %llu bytes, expected at most the %llu left in the section", (unsigned long long)size,
                (unsigned long long)(cur->size - cur->pos));
    *bytes_p = cur->data + cur->pos;
    cur->pos += size;
    return XKV_OK;
}

xkv_status xkv_cursor_end(const xkv_cursor *cur)
{
    XKV_REQUIRE(cur, cur->pos == cur->size, cur->data + cur->pos, cur->end_rule,
                "%llu bytes after the last record, expected the end of the section",
                (unsigned long long)(cur->size - cur->pos));
    return XKV_OK;
}

/* --- Reading blobs ---------------------------------------------------------------------------------------------- */

typedef struct blob {
    uint32_t method, element_size;
    uint64_t size, stored_size;
    const uint8_t *data;
} blob;

static xkv_status take_head(xkv_cursor *cur, blob *b)
{
    const uint8_t *head = NULL;
    XKV_TRY(xkv_cursor_take(cur, XKV_BLOB_SIZE, &head));
    b->method = xkv_load32(head);
    b->element_size = xkv_load32(head + 4);
    b->size = xkv_load64(head + 8);
    b->stored_size = xkv_load64(head + 16);
    uint64_t left = cur->size - cur->pos;

    XKV_REQUIRE(cur, b->method <= XKV_METHOD_ZSTD, head, "B1", "method of a blob is %u, expected 0 or 1", b->method);
    XKV_REQUIRE(cur, b->element_size == 1 || b->element_size == 4, head + 4, "B1",
                "element_size of a blob is %u, expected 1 or 4", b->element_size);
    XKV_REQUIRE(cur, b->size % b->element_size == 0, head + 8, "B1",
                "size of a blob is %llu, expected a multiple of its element_size %u", (unsigned long long)b->size,
                b->element_size);
    XKV_REQUIRE(cur, b->size <= XKV_MAX_BLOB_SIZE, head + 8, "B2", "size of a blob is %llu, expected at most 2^32",
                (unsigned long long)b->size);
    XKV_REQUIRE(cur, b->stored_size <= left, head + 16, "B2",
                "stored_size of a blob is %llu, expected at most the %llu bytes left in the section",
                (unsigned long long)b->stored_size, (unsigned long long)left);
    /* stored_size is in memory, so that the product cannot overflow. */
    uint64_t most = b->method == XKV_METHOD_STORED ? b->stored_size : b->stored_size * XKV_MAX_ZSTD_RATIO;
    XKV_REQUIRE(cur, b->size <= most && (b->method != XKV_METHOD_STORED || b->size == most), head + 8, "B2",
                "size of a blob is %llu, which %llu bytes of method %u cannot hold", (unsigned long long)b->size,
                (unsigned long long)b->stored_size, b->method);
    return XKV_OK;
}

static xkv_status take_data(xkv_cursor *cur, blob *b)
{
    const uint8_t *padding;
    uint64_t padding_size = xkv_align64(b->stored_size, 8) - b->stored_size;
    XKV_TRY(xkv_cursor_take(cur, b->stored_size, &b->data));
    XKV_REQUIRE(cur, padding_size <= cur->size - cur->pos, cur->data + cur->pos, "B3",
                "the section ends inside the padding of a blob");
    XKV_TRY(xkv_cursor_take(cur, padding_size, &padding));
    XKV_REQUIRE(cur, xkv_all_zero(padding, padding_size), padding, "B3", "padding of a blob is not zero");
    return XKV_OK;
}

/* Check the frame's header and extent before anything is allocated for its content. */
static xkv_status check_frame(const xkv_cursor *cur, const blob *b)
{
    XKV_REQUIRE(cur, b->stored_size >= 4 && xkv_load32(b->data) == ZSTD_MAGICNUMBER, b->data, "B4",
                "a blob of method 1 does not start with a zstd frame");
    unsigned long long content = ZSTD_getFrameContentSize(b->data, b->stored_size);
    XKV_REQUIRE(cur, content == b->size, b->data, "B4", "content size of a zstd frame is %lld, expected %llu",
                (long long)content, (unsigned long long)b->size);
    XKV_REQUIRE(cur, ZSTD_getDictID_fromFrame(b->data, b->stored_size) == 0, b->data, "B4",
                "a zstd frame asks for a dictionary");
    size_t end = ZSTD_findFrameCompressedSize(b->data, b->stored_size);
    XKV_REQUIRE(cur, !ZSTD_isError(end), b->data, "B4", "a zstd frame is damaged (%s)", ZSTD_getErrorName(end));
    XKV_REQUIRE(cur, end == b->stored_size, b->data, "B4", "a zstd frame takes %zu bytes, expected %llu", end,
                (unsigned long long)b->stored_size);
    return XKV_OK;
}

/* dst has b->size bytes. */
static xkv_status expand(const xkv_cursor *cur, const blob *b, uint8_t *dst)
{
    if (b->method == XKV_METHOD_STORED) {
        memcpy(dst, b->data, b->size);
        return XKV_OK;
    }
    size_t n = ZSTD_decompress(dst, b->size, b->data, b->stored_size);
    if (ZSTD_isError(n) && ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation)
        return xkv_fail(cur->ctx, XKV_ERROR_MEMORY, "out of memory while decompressing");
    XKV_REQUIRE(cur, n == b->size, b->data, "B4", "a zstd frame is damaged (%s)",
                ZSTD_isError(n) ? ZSTD_getErrorName(n) : "short content");
    return XKV_OK;
}

/* Bytes of 4-byte elements, in file order or split into byte planes, to host integers. */
static void to_integers(const uint8_t *bytes, bool split, uint64_t count, uint32_t *dst)
{
    for (uint64_t i = 0; i < count; i++) {
        if (split)
            dst[i] = (uint32_t)bytes[i] | (uint32_t)bytes[count + i] << 8 | (uint32_t)bytes[2 * count + i] << 16 |
                     (uint32_t)bytes[3 * count + i] << 24;
        else
            dst[i] = xkv_load32(bytes + 4 * i);
    }
}

static xkv_status decode(const xkv_cursor *cur, const blob *b, void **data_p)
{
    uint8_t *bytes = NULL;
    uint32_t *integers = NULL;
    xkv_status status;
    XKV_TRY_GOTO(XKV_NEW(cur->ctx, b->size, &bytes), out);
    XKV_TRY_GOTO(expand(cur, b, bytes), out);
    if (b->element_size == 1) {
        *data_p = bytes;
        return XKV_OK;
    }
    XKV_TRY_GOTO(XKV_NEW(cur->ctx, b->size / 4, &integers), out);
    to_integers(bytes, b->method == XKV_METHOD_ZSTD, b->size / 4, integers);
    *data_p = integers;
out:
    xkv_release(cur->ctx, bytes);
    return status;
}

xkv_status xkv_blob_take(xkv_cursor *cur, uint32_t element_size, uint64_t size, const char *rule, const char *name,
                         void **data_p)
{
    blob b = {0};
    const uint8_t *head = cur->data + cur->pos;
    XKV_TRY(take_head(cur, &b));
    XKV_REQUIRE(cur, b.element_size == element_size, head + 4, rule, "element_size of the %s is %u, expected %u", name,
                b.element_size, element_size);
    XKV_REQUIRE(cur, b.size == size, head + 8, rule, "size of the %s is %llu, expected %llu", name,
                (unsigned long long)b.size, (unsigned long long)size);
    XKV_TRY(take_data(cur, &b));
    if (b.method == XKV_METHOD_ZSTD)
        XKV_TRY(check_frame(cur, &b));
    return data_p != NULL ? decode(cur, &b, data_p) : XKV_OK;
}

/* --- Writing ---------------------------------------------------------------------------------------------------- */

xkv_status xkv_buffer_grow(xkv_buffer *b, uint64_t size, uint8_t **bytes_p)
{
    uint64_t end;
    if (!xkv_add64(b->size, size, &end) || end > SIZE_MAX / 2)
        return xkv_fail(b->ctx, XKV_ERROR_LIMIT, "a section of %llu bytes is too large", (unsigned long long)size);
    if (end > b->capacity) {
        uint8_t *data = NULL;
        size_t capacity = (size_t)xkv_max64(end, 2 * (uint64_t)b->capacity);
        XKV_TRY(XKV_NEW(b->ctx, capacity, &data));
        if (b->size > 0)
            memcpy(data, b->data, b->size);
        xkv_release(b->ctx, b->data);
        b->data = data;
        b->capacity = capacity;
    }
    *bytes_p = b->data + b->size;
    memset(*bytes_p, 0, size);
    b->size = (size_t)end;
    return XKV_OK;
}

xkv_status xkv_buffer_align(xkv_buffer *b, uint64_t align)
{
    uint8_t *padding;
    return xkv_buffer_grow(b, xkv_align64(b->size, align) - b->size, &padding);
}

/* Host integers to bytes: in file order, or split into byte planes. */
static void from_integers(const uint32_t *src, uint64_t count, bool split, uint8_t *dst)
{
    for (uint64_t i = 0; i < count; i++) {
        uint8_t bytes[4];
        xkv_store32(bytes, src[i]);
        for (uint64_t k = 0; k < 4; k++)
            dst[split ? k * count + i : 4 * i + k] = bytes[k];
    }
}

/* Compress into the end of the buffer; *stored is 0 when that would not be smaller. */
static xkv_status append_frame(xkv_buffer *b, const uint8_t *src, size_t size, int level, size_t *stored)
{
    uint8_t *dst;
    size_t start = b->size, bound = ZSTD_compressBound(size);
    XKV_TRY(xkv_buffer_grow(b, bound, &dst));
    size_t n = ZSTD_compress(dst, bound, src, size, level);
    if (ZSTD_isError(n))
        return xkv_fail(b->ctx,
                        ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation ? XKV_ERROR_MEMORY : XKV_ERROR_INTERNAL,
                        "zstd: %s", ZSTD_getErrorName(n));
    *stored = n < size ? n : 0;
    b->size = start + *stored;
    return XKV_OK;
}

static xkv_status append_stored(xkv_buffer *b, uint32_t element_size, const void *data, uint64_t count)
{
    uint8_t *dst;
    XKV_TRY(xkv_buffer_grow(b, count * element_size, &dst));
    if (element_size == 4)
        from_integers(data, count, false, dst);
    else if (count > 0)
        memcpy(dst, data, count);
    return XKV_OK;
}

xkv_status xkv_buffer_blob(xkv_buffer *b, uint32_t element_size, const void *data, uint64_t count, int zstd_level)
{
    size_t head_at = b->size, stored = 0;
    uint64_t size = count * element_size;
    uint8_t *head, *split = NULL;
    xkv_status status;
    XKV_TRY_GOTO(xkv_buffer_grow(b, XKV_BLOB_SIZE, &head), out);
    if (element_size == 4) {
        XKV_TRY_GOTO(XKV_NEW(b->ctx, size, &split), out);
        from_integers(data, count, true, split);
    }
    if (size > 0)
        XKV_TRY_GOTO(append_frame(b, split ? split : data, size, zstd_level, &stored), out);
    if (stored == 0)
        XKV_TRY_GOTO(append_stored(b, element_size, data, count), out);

    head = b->data + head_at;
    xkv_store32(head, stored ? XKV_METHOD_ZSTD : XKV_METHOD_STORED);
    xkv_store32(head + 4, element_size);
    xkv_store64(head + 8, size);
    xkv_store64(head + 16, stored ? stored : size);
    status = xkv_buffer_align(b, 8);
out:
    xkv_release(b->ctx, split);
    return status;
}
