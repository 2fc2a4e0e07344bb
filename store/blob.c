/* blob.c - the files of a store. */
#include "blob.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define COPY_BLOCK       (256u * 1024u)
#define ALIGNMENT        64u
#define QUARANTINE_FILES 8u
#define QUARANTINE_SHARE 16u   /* of the byte cap */
#define RUN_SYMBOLS      1024u /* with a checksum of their own, so that a short prompt reads no more */
#define WRITE_VERSION    1u
#define READ_VERSION     1u
#define FEATURE_SEALED   1u
#define FEATURE_EXTENDS  2u
#define FEATURE_WHOLE    4u
#define LINK_BYTES       64u

static const uint8_t magic[8] = {0x89, 'X', 'K', 'B', '\r', '\n', 0x1a, '\n'};
static const char temp_text[] = "temporary file of the store";

/* --- Names -------------------------------------------------------------------------------------------------------- */

xkv_blob_name xkv_blob_name_of(const uint8_t hash[32], uint64_t id)
{
    xkv_blob_name n;
    xkv_hex(hash, 32, n.text);
    snprintf(n.text + 64, sizeof n.text - 64, ".%016llx", (unsigned long long)id);
    return n;
}

/* A lower-case hexadecimal digit, or -1. */
static int digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool xkv_blob_name_parse(const char *text, uint8_t hash[32], uint64_t *id)
{
    if (strlen(text) != XKV_BLOB_NAME || text[64] != '.')
        return false;
    *id = 0;
    for (size_t i = 0; i < XKV_BLOB_NAME; i++) {
        int d = digit(text[i]);
        if (i == 64)
            continue;
        if (d < 0)
            return false;
        if (i > 64)
            *id = *id << 4 | (unsigned)d;
        else if (i % 2 == 0)
            hash[i / 2] = (uint8_t)(d << 4);
        else
            hash[i / 2] = (uint8_t)(hash[i / 2] | d);
    }
    return true;
}

/* --- Bytes -------------------------------------------------------------------------------------------------------- */

static xkv_status write_at(xkv_ctx *ctx, int fd, uint64_t offset, const void *src, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = pwrite(fd, (const uint8_t *)src + done, size - done, (off_t)(offset + done));
        if (n > 0)
            done += (size_t)n;
        else if (n == 0 || errno != EINTR)
            return xkv_fail_errno(ctx, "write a", temp_text, n == 0 ? ENOSPC : errno);
    }
    return XKV_OK;
}

static xkv_status read_at(xkv_ctx *ctx, int fd, uint64_t offset, void *dst, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = pread(fd, (uint8_t *)dst + done, size - done, (off_t)(offset + done));
        if (n > 0)
            done += (size_t)n;
        else if (n == 0)
            return xkv_fail(ctx, XKV_ERROR_TRUNCATED, "a blob ends at offset %llu [SB3]",
                            (unsigned long long)(offset + done));
        else if (errno != EINTR)
            return xkv_fail_errno(ctx, "read a", "blob", errno);
    }
    return XKV_OK;
}

static xkv_status file_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    return read_at(ctx, *(const int *)user, offset, dst, size);
}

static void file_prefetch(void *user, uint64_t offset, uint64_t size)
{
    (void)posix_fadvise(*(const int *)user, (off_t)offset, (off_t)size, POSIX_FADV_WILLNEED);
}

static int file_descriptor(void *user, uint64_t *offset_p)
{
    *offset_p = 0;
    return *(const int *)user;
}

xkv_status xkv_blob_file(xkv_ctx *ctx, const int *fd, xkv_input *file)
{
    struct stat st;
    if (fstat(*fd, &st) != 0)
        return xkv_fail_errno(ctx, "examine a", "blob", errno);
    *file = (xkv_input){.user = (void *)(uintptr_t)fd, /* file_read() gives the const back */
                        .size = (uint64_t)st.st_size,
                        .read = file_read,
                        .name = "blob",
                        .prefetch = file_prefetch,
                        .file = file_descriptor};
    return XKV_OK;
}

static xkv_status window_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    const xkv_window *w = user;
    return w->input->read(w->input->user, ctx, w->offset + offset, dst, size);
}

static void window_prefetch(void *user, uint64_t offset, uint64_t size)
{
    const xkv_window *w = user;
    w->input->prefetch(w->input->user, w->offset + offset, size);
}

static int window_file(void *user, uint64_t *offset_p)
{
    const xkv_window *w = user;
    int fd = w->input->file(w->input->user, offset_p);
    *offset_p += w->offset;
    return fd;
}

xkv_input xkv_input_window(xkv_window *w, const xkv_input *input, uint64_t offset, uint64_t size)
{
    *w = (xkv_window){input, offset};
    return (xkv_input){.user = w,
                       .size = size,
                       .read = window_read,
                       .name = input->name,
                       .prefetch = input->prefetch ? window_prefetch : NULL,
                       .file = input->file ? window_file : NULL};
}

static xkv_status shifted_write(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    const xkv_shift *s = user;
    return s->output->write(s->output->user, ctx, s->offset + offset, src, size);
}

xkv_output xkv_output_from(xkv_shift *s, const xkv_output *output, uint64_t offset)
{
    *s = (xkv_shift){output, offset};
    return (xkv_output){.user = s, .write = shifted_write};
}

xkv_status xkv_input_copy(xkv_ctx *ctx, const xkv_input *from, const xkv_output *to)
{
    xkv_status status = XKV_OK;
    uint8_t *block = NULL;
    XKV_TRY(XKV_NEW(ctx, COPY_BLOCK, &block));
    for (uint64_t offset = 0; offset < from->size;) {
        size_t n = (size_t)xkv_min64(from->size - offset, COPY_BLOCK);
        XKV_TRY_GOTO(from->read(from->user, ctx, offset, block, n), out);
        XKV_TRY_GOTO(to->write(to->user, ctx, offset, block, n), out);
        XKV_TRY_GOTO(xkv_check_cancel(ctx), out);
        offset += n;
    }
out:
    xkv_release(ctx, block);
    return status;
}

xkv_status xkv_input_equal(xkv_ctx *ctx, const xkv_input *a, const xkv_input *b, bool *equal)
{
    xkv_status status = XKV_OK;
    uint8_t *block = NULL;
    *equal = a->size == b->size;
    XKV_TRY(XKV_NEW(ctx, 2 * COPY_BLOCK, &block));
    for (uint64_t offset = 0; *equal && offset < a->size; offset += COPY_BLOCK) {
        size_t n = (size_t)xkv_min64(a->size - offset, COPY_BLOCK);
        XKV_TRY_GOTO(a->read(a->user, ctx, offset, block, n), out);
        XKV_TRY_GOTO(b->read(b->user, ctx, offset, block + COPY_BLOCK, n), out);
        *equal = memcmp(block, block + COPY_BLOCK, n) == 0;
    }
out:
    xkv_release(ctx, block);
    return status;
}

xkv_status xkv_blob_check_hash(xkv_ctx *ctx, const xkv_input *file, const uint8_t expected[32])
{
    uint8_t hash[32];
    XKV_TRY(xkv_hash_input(ctx, file, hash));
    return memcmp(hash, expected, sizeof hash) == 0
               ? XKV_OK
               : xkv_fail(ctx, XKV_ERROR_CHECKSUM, "the hash of the blob does not match [SB6]");
}

/* --- Head --------------------------------------------------------------------------------------------------------- */

static void sign_head(uint8_t bytes[XKV_BLOB_HEAD])
{
    xkv_store64(bytes + 248, XXH3_64bits(bytes, 248));
}

static void encode_head(const xkv_blob_head *h, uint8_t bytes[XKV_BLOB_HEAD])
{
    memset(bytes, 0, XKV_BLOB_HEAD);
    memcpy(bytes, magic, sizeof magic);
    xkv_store16(bytes + 8, WRITE_VERSION);
    xkv_store16(bytes + 10, READ_VERSION);
    xkv_store32(bytes + 12, h->kind);
    xkv_store64(bytes + 16, h->file_size);
    xkv_store32(bytes + 24, (h->sealed ? FEATURE_SEALED : 0) | (h->extends ? FEATURE_EXTENDS : 0) |
                                (h->whole_only ? FEATURE_WHOLE : 0));
    xkv_store32(bytes + 28, h->tokens);
    xkv_store32(bytes + 32, h->symbols);
    xkv_store32(bytes + 36, h->names);
    xkv_store64(bytes + 40, h->payload_offset);
    xkv_store64(bytes + 48, h->payload_size);
    xkv_store64(bytes + 56, h->created);
    xkv_store64(bytes + 64, h->expires);
    xkv_store64(bytes + 72, h->raw_bytes);
    xkv_store64(bytes + 80, h->body_checksum);
    memcpy(bytes + 88, h->dict, 16);
    memcpy(bytes + 104, h->space, 32);
    memcpy(bytes + 136, h->key, 32);
    if (h->sealed)
        memcpy(bytes + XKV_SEAL_NONCE_AT, h->nonce, sizeof h->nonce);
    sign_head(bytes);
}

/* Checksums of the runs of symbols, and one of the page keys. */
static uint64_t table_size(uint64_t symbols)
{
    return 8 * (xkv_ceil_div(symbols, RUN_SYMBOLS) + 1);
}

/* Where the page keys end. */
static uint64_t names_end(uint64_t symbols, uint64_t names)
{
    return XKV_BLOB_HEAD + table_size(symbols) + 4 * symbols + XKV_PAGE_KEY_BYTES * names;
}

/* `link`: bytes of it and of the framing. */
static uint64_t payload_offset(uint64_t symbols, uint64_t names, uint64_t link)
{
    return xkv_align64(names_end(symbols, names) + link, ALIGNMENT);
}

/* A blob that extends another is longer by its framing, of which the link tells the size. */
static bool is_payload_offset(const xkv_blob_head *h)
{
    uint64_t least = payload_offset(h->symbols, h->names, h->extends ? LINK_BYTES : 0);
    return h->extends ? h->payload_offset >= least && h->payload_offset % ALIGNMENT == 0 : h->payload_offset == least;
}

/* `size` is that of what the blob holds; encrypted, the file is larger. */
static xkv_status check_head(xkv_ctx *ctx, const xkv_blob_head *h, uint64_t size)
{
    const char *problem = NULL;
    if (h->kind != XKV_BLOB_ENTRY && h->kind != XKV_BLOB_DICT)
        problem = "unknown kind [SB3]";
    else if (h->file_size != (h->sealed ? xkv_sealed_size(size) : size))
        problem = "its size differs from that of the file [SB3]";
    else if ((h->extends || h->whole_only) && h->kind != XKV_BLOB_ENTRY)
        problem = "only entries extend others, or cannot be cut [SB2]";
    else if (h->kind == XKV_BLOB_DICT ? h->symbols + h->names + h->tokens != 0
                                      : h->symbols == 0 || h->symbols > XKV_MAX_SYMBOLS || h->names > XKV_MAX_SYMBOLS)
        problem = "impossible number of symbols or page keys [SB4]";
    else if (!is_payload_offset(h) || h->payload_offset > size || h->payload_size != size - h->payload_offset ||
             h->payload_size == 0)
        problem = "its payload is not the rest of the file [SB4]";
    return problem == NULL ? XKV_OK : xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: %s", problem);
}

/* The bytes of the head, as they were written. */
static xkv_status read_head_bytes(xkv_ctx *ctx, const xkv_input *file, uint8_t b[XKV_BLOB_HEAD])
{
    if (file->size < XKV_BLOB_HEAD)
        return xkv_fail(ctx, XKV_ERROR_TRUNCATED, "blob: %llu bytes are no blob [SB1]", (unsigned long long)file->size);
    XKV_TRY(file->read(file->user, ctx, 0, b, XKV_BLOB_HEAD));
    if (memcmp(b, magic, sizeof magic) != 0)
        return xkv_fail(ctx, XKV_ERROR_FORMAT, "blob: wrong magic [SB1]");
    if (xkv_load64(b + 248) != XXH3_64bits(b, 248))
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "blob: the checksum of the head does not match [SB1]");
    return XKV_OK;
}

xkv_status xkv_blob_is_sealed(xkv_ctx *ctx, const xkv_input *file, bool *sealed)
{
    uint8_t b[XKV_BLOB_HEAD];
    XKV_TRY(read_head_bytes(ctx, file, b));
    *sealed = (xkv_load32(b + 24) & 1) != 0;
    return XKV_OK;
}

xkv_status xkv_blob_read_head(xkv_ctx *ctx, const xkv_input *file, xkv_blob_head *head)
{
    uint8_t b[XKV_BLOB_HEAD];
    XKV_TRY(read_head_bytes(ctx, file, b));
    if (xkv_load16(b + 10) > READ_VERSION)
        return xkv_fail(ctx, XKV_ERROR_VERSION, "blob: version %u [SB2]", xkv_load16(b + 10));
    if (xkv_load32(b + 24) > (FEATURE_SEALED | FEATURE_EXTENDS | FEATURE_WHOLE))
        return xkv_fail(ctx, XKV_ERROR_FEATURE, "blob: unknown features [SB2]");
    bool sealed = xkv_is_sealed_input(file);
    if (xkv_load16(b + 10) == 0 || (xkv_load32(b + 24) & FEATURE_SEALED) != sealed ||
        !xkv_all_zero(b + (sealed ? 208 : 168), sealed ? 40 : 80))
        return xkv_fail(ctx, XKV_ERROR_CORRUPT,
                        "blob: version 0, reserved bytes, or encrypted and not expected to be [SB2]");
    *head = (xkv_blob_head){
        .kind = xkv_load32(b + 12),
        .file_size = xkv_load64(b + 16),
        .tokens = xkv_load32(b + 28),
        .symbols = xkv_load32(b + 32),
        .names = xkv_load32(b + 36),
        .payload_offset = xkv_load64(b + 40),
        .payload_size = xkv_load64(b + 48),
        .created = xkv_load64(b + 56),
        .expires = xkv_load64(b + 64),
        .raw_bytes = xkv_load64(b + 72),
        .body_checksum = xkv_load64(b + 80),
    };
    memcpy(head->dict, b + 88, 16);
    memcpy(head->space, b + 104, 32);
    memcpy(head->key, b + 136, 32);
    head->sealed = sealed;
    head->extends = (xkv_load32(b + 24) & FEATURE_EXTENDS) != 0;
    head->whole_only = (xkv_load32(b + 24) & FEATURE_WHOLE) != 0;
    return check_head(ctx, head, file->size);
}

/* --- Symbols and page keys ---------------------------------------------------------------------------------------- */

static void encode_body(const xkv_blob_head *h, const uint32_t *symbols, const xkv_page_key *names, uint8_t *bytes)
{
    uint8_t *symbol = bytes + table_size(h->symbols), *keys = symbol + 4 * (size_t)h->symbols, *key = keys;
    for (uint32_t i = 0; i < h->symbols; i += RUN_SYMBOLS, bytes += 8) {
        const uint8_t *run = symbol;
        for (uint32_t j = i; j < h->symbols && j < i + RUN_SYMBOLS; j++, symbol += 4)
            xkv_store32(symbol, symbols[j]);
        xkv_store64(bytes, XXH3_64bits(run, (size_t)(symbol - run)));
    }
    for (uint32_t i = 0; i < h->names; i++, key += XKV_PAGE_KEY_BYTES) {
        xkv_store32(key, names[i].tokens);
        xkv_store32(key + 4, 0);
        memcpy(key + 8, names[i].key, 32);
    }
    xkv_store64(bytes, XXH3_64bits(keys, (size_t)(key - keys)));
}

static xkv_status check_symbols(xkv_ctx *ctx, const xkv_blob_head *h, const uint32_t *symbols)
{
    uint32_t tokens = 0;
    for (uint32_t i = 0; i < h->symbols;) {
        bool medium = symbols[i] == XKV_MEDIA_MARKER;
        if (medium ? h->symbols - i <= XKV_MEDIA_SYMBOLS : symbols[i] > INT32_MAX)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: symbol %u is neither a token nor a medium [SB5]", i);
        tokens += !medium;
        i += medium ? XKV_MEDIA_SYMBOLS : 1;
    }
    if (tokens != h->tokens)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: %u tokens, not %u [SB5]", tokens, h->tokens);
    return XKV_OK;
}

/* Page keys, and the zeros after them, unless there is a link. */
static xkv_status decode_names(xkv_ctx *ctx, const xkv_blob_head *h, uint64_t checksum, const uint8_t *bytes,
                               size_t size, xkv_page_key *names)
{
    size_t used = XKV_PAGE_KEY_BYTES * (size_t)h->names;
    if (XXH3_64bits(bytes, used) != checksum)
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "blob: the checksum of the page keys does not match [SB5]");
    if (!h->extends && !xkv_all_zero(bytes + used, size - used))
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: the page keys are not followed by zeros [SB5]");
    for (uint32_t i = 0, last = 0; i < h->names; i++, bytes += XKV_PAGE_KEY_BYTES) {
        uint32_t tokens = xkv_load32(bytes);
        if (tokens <= last || tokens > h->tokens || xkv_load32(bytes + 4) != 0)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: page key %u is out of order or range [SB5]", i);
        last = tokens;
        names[i].tokens = tokens;
        memcpy(names[i].key, bytes + 8, 32);
    }
    return XKV_OK;
}

/* Runs of symbols, up to the one that holds symbol count - 1. */
static xkv_status decode_symbols(xkv_ctx *ctx, const xkv_blob_head *h, const uint8_t *sums, const uint8_t *bytes,
                                 uint32_t count, uint32_t *symbols)
{
    for (uint32_t i = 0; i < count; i += RUN_SYMBOLS, sums += 8) {
        uint32_t n = (uint32_t)xkv_min64(count - i, RUN_SYMBOLS);
        if (XXH3_64bits(bytes + 4 * (size_t)i, 4 * (size_t)n) != xkv_load64(sums))
            return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "blob: the checksum of the tokens from %u on does not match [SB5]",
                            i);
    }
    for (uint32_t i = 0; i < count; i++, bytes += 4)
        symbols[i] = xkv_load32(bytes);
    return count == h->symbols ? check_symbols(ctx, h, symbols) : XKV_OK;
}

/* What is read of an open blob. */
typedef struct body {
    uint8_t *bytes; /* from the end of the head to the last symbol that is wanted, or to the payload */
    uint32_t *symbols;
    xkv_page_key *names;
} body;

static xkv_status read_body(xkv_ctx *ctx, const xkv_input *file, const xkv_blob_head *h, uint32_t count, bool names,
                            body *b)
{
    size_t table = (size_t)table_size(h->symbols);
    size_t all = (size_t)((h->extends ? names_end(h->symbols, h->names) : h->payload_offset) - XKV_BLOB_HEAD);
    size_t keys = table + 4 * (size_t)h->symbols, size = names ? all : table + 4 * (size_t)count;
    XKV_TRY(XKV_NEW(ctx, size, &b->bytes));
    XKV_TRY(XKV_NEW(ctx, count, &b->symbols));
    XKV_TRY(file->read(file->user, ctx, XKV_BLOB_HEAD, b->bytes, size));
    if (XXH3_64bits(b->bytes, table) != h->body_checksum)
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "blob: the checksum of its checksums does not match [SB5]");
    if (names) {
        XKV_TRY(XKV_NEW(ctx, h->names, &b->names));
        XKV_TRY(decode_names(ctx, h, xkv_load64(b->bytes + table - 8), b->bytes + keys, all - keys, b->names));
    }
    return decode_symbols(ctx, h, b->bytes, b->bytes + table, count, b->symbols);
}

xkv_status xkv_blob_read_body(xkv_ctx *ctx, const xkv_input *file, const xkv_blob_head *head, uint32_t *count,
                              uint32_t **symbols_p, xkv_page_key **names_p)
{
    uint64_t whole = xkv_min64(xkv_align64(*count, RUN_SYMBOLS), head->symbols);
    body b = {0};
    if (names_p != NULL)
        whole = head->symbols;
    xkv_status status = read_body(ctx, file, head, (uint32_t)whole, names_p != NULL, &b);
    xkv_release(ctx, b.bytes);
    if (status != XKV_OK) {
        xkv_release(ctx, b.symbols);
        xkv_release(ctx, b.names);
        return status;
    }
    *count = (uint32_t)whole;
    *symbols_p = b.symbols;
    if (names_p != NULL)
        *names_p = b.names;
    return XKV_OK;
}

/* --- The link ----------------------------------------------------------------------------------------------------- */

static void encode_link(const xkv_blob_link *link, uint8_t *bytes)
{
    memcpy(bytes, link->blob, 32);
    xkv_store64(bytes + 32, link->parent);
    xkv_store32(bytes + 40, link->base);
    xkv_store32(bytes + 44, link->fram_size);
    xkv_store64(bytes + 48, XXH3_64bits(link->fram, link->fram_size));
    xkv_store64(bytes + 56, XXH3_64bits(bytes, 56));
    if (link->fram_size > 0)
        memcpy(bytes + LINK_BYTES, link->fram, link->fram_size);
}

static xkv_status decode_link(xkv_ctx *ctx, const xkv_blob_head *h, const uint8_t *bytes, size_t size,
                              xkv_blob_link *link)
{
    *link = (xkv_blob_link){.parent = xkv_load64(bytes + 32),
                            .base = xkv_load32(bytes + 40),
                            .fram_size = xkv_load32(bytes + 44),
                            .fram = bytes + LINK_BYTES};
    memcpy(link->blob, bytes, 32);
    if (xkv_load64(bytes + 56) != XXH3_64bits(bytes, 56))
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "blob: the checksum of the link does not match [SB8]");
    if (payload_offset(h->symbols, h->names, (uint64_t)LINK_BYTES + link->fram_size) != h->payload_offset)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: a framing of %u bytes does not end at the payload [SB8]",
                        link->fram_size);
    if (xkv_load64(bytes + 48) != XXH3_64bits(link->fram, link->fram_size))
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "blob: the checksum of the framing does not match [SB8]");
    if (link->parent == 0 || link->base == 0 || link->base >= h->tokens ||
        !xkv_all_zero(link->fram + link->fram_size, size - LINK_BYTES - link->fram_size))
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blob: it takes %u of %u tokens from entry %llu, or no zeros [SB8]",
                        link->base, h->tokens, (unsigned long long)link->parent);
    return XKV_OK;
}

xkv_status xkv_blob_read_link(xkv_ctx *ctx, const xkv_input *file, const xkv_blob_head *head, xkv_blob_link *link,
                              uint8_t **bytes_p)
{
    uint64_t offset = names_end(head->symbols, head->names);
    size_t size = (size_t)(head->payload_offset - offset); /* at least LINK_BYTES [SB4] */
    uint8_t *bytes = NULL;
    XKV_TRY(XKV_NEW(ctx, size, &bytes));
    xkv_status status = file->read(file->user, ctx, offset, bytes, size);
    if (status == XKV_OK)
        status = decode_link(ctx, head, bytes, size, link);
    if (status != XKV_OK) {
        xkv_release(ctx, bytes);
        return status;
    }
    *bytes_p = bytes;
    return XKV_OK;
}

/* --- Writing ------------------------------------------------------------------------------------------------------ */

/* A new file, locked against those who clean up, who ask for an exclusive lock; shared, since readers may come as soon
 * as the index is committed, and turning one kind of lock into the other leaves a moment without any. Between making
 * and locking the file somebody may have removed it. */
static xkv_status create_temp(xkv_ctx *ctx, xkv_blob_writer *w)
{
    for (int attempt = 0; attempt < 100; attempt++) {
        struct stat st;
        uint64_t number = (uint64_t)getpid() << 32 | (uint64_t)attempt;
        if (getrandom(&number, sizeof number, GRND_NONBLOCK) < 0)
            xkv_logf(ctx, XKV_LOG_DEBUG, "no random numbers: naming the temporary file by process");
        snprintf(w->temp, sizeof w->temp, "%016llx.tmp", (unsigned long long)number);
        w->fd = openat(w->folders->temp, w->temp, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (w->fd < 0 && errno != EEXIST && errno != EINTR)
            break;
        if (w->fd < 0)
            continue;
        if (flock(w->fd, LOCK_SH | LOCK_NB) == 0 && fstat(w->fd, &st) == 0 && st.st_nlink > 0)
            return XKV_OK;
        xkv_blob_end(ctx, w, false);
    }
    int error = errno;
    w->temp[0] = '\0';
    return xkv_fail_errno(ctx, "create a", temp_text, error);
}

xkv_status xkv_blob_begin(xkv_ctx *ctx, const xkv_folders *folders, const uint8_t *key, uint32_t symbols,
                          uint32_t names, const xkv_blob_link *link, xkv_blob_writer *w)
{
    memset(w, 0, sizeof *w);
    w->folders = folders;
    w->key = key;
    w->link = link;
    w->fd = w->plain = -1;
    w->payload_offset = payload_offset(symbols, names, link != NULL ? (uint64_t)LINK_BYTES + link->fram_size : 0);
    XKV_TRY(create_temp(ctx, w));
    xkv_status status = xkv_hasher_create(ctx, w->fd, &w->hasher);
    w->plain = key != NULL ? memfd_create("xkv", MFD_CLOEXEC) : w->fd;
    if (status == XKV_OK && w->plain < 0)
        status = xkv_fail_errno(ctx, "create a file in", "memory", errno);
    if (status != XKV_OK)
        xkv_blob_end(ctx, w, false);
    return status;
}

/* To the file itself. */
static xkv_status write_file(xkv_ctx *ctx, xkv_blob_writer *w, uint64_t offset, const void *src, size_t size)
{
    XKV_TRY(write_at(ctx, w->fd, offset, src, size));
    return xkv_hasher_note(ctx, w->hasher, offset, size);
}

/* To the file, or to what is to be encrypted. */
static xkv_status write_plain(xkv_ctx *ctx, xkv_blob_writer *w, uint64_t offset, const void *src, size_t size)
{
    return w->plain == w->fd ? write_file(ctx, w, offset, src, size) : write_at(ctx, w->plain, offset, src, size);
}

static xkv_status payload_write(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    xkv_blob_writer *w = user;
    uint64_t end;
    if (!xkv_add64(offset, size, &end) || end > INT64_MAX - w->payload_offset)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "offset %llu is beyond what a file can hold", (unsigned long long)offset);
    XKV_TRY(write_plain(ctx, w, w->payload_offset + offset, src, size));
    w->payload_size = xkv_max64(w->payload_size, end);
    return XKV_OK;
}

xkv_output xkv_blob_output(xkv_blob_writer *w)
{
    return (xkv_output){.user = w, .write = payload_write};
}

static xkv_status payload_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    const xkv_blob_writer *w = user;
    return read_at(ctx, w->plain, w->payload_offset + offset, dst, size);
}

xkv_input xkv_blob_payload(xkv_blob_writer *w)
{
    return (xkv_input){.user = w, .size = w->payload_size, .read = payload_read, .name = "entry"};
}

static xkv_status write_body(xkv_ctx *ctx, xkv_blob_writer *w, xkv_blob_head *head, const uint32_t *symbols,
                             const xkv_page_key *names)
{
    size_t size = (size_t)(w->payload_offset - XKV_BLOB_HEAD);
    uint8_t *bytes = NULL;
    XKV_TRY(XKV_NEW_ZERO(ctx, size, &bytes));
    encode_body(head, symbols, names, bytes);
    if (w->link != NULL)
        encode_link(w->link, bytes + names_end(head->symbols, head->names) - XKV_BLOB_HEAD);
    head->body_checksum = XXH3_64bits(bytes, (size_t)table_size(head->symbols));
    xkv_status status = write_plain(ctx, w, XKV_BLOB_HEAD, bytes, size);
    xkv_release(ctx, bytes);
    return status;
}

/* Encrypt what lies behind the head, piece by piece. */
static xkv_status seal_pieces(xkv_ctx *ctx, xkv_blob_writer *w, const uint8_t *head)
{
    const uint64_t total = w->payload_offset + w->payload_size - XKV_BLOB_HEAD;
    uint8_t *buffer = NULL;
    xkv_status status = XKV_OK;
    XKV_TRY(XKV_NEW(ctx, 2 * XKV_SEAL_PIECE + XKV_SEAL_TAG, &buffer));
    for (uint64_t piece = 0, done = 0; done < total; piece++) {
        size_t n = (size_t)xkv_min64(total - done, XKV_SEAL_PIECE);
        XKV_TRY_GOTO(read_at(ctx, w->plain, XKV_BLOB_HEAD + done, buffer, n), out);
        XKV_TRY_GOTO(xkv_check_cancel(ctx), out);
        xkv_seal_piece(w->key, head, piece, buffer, n, buffer + XKV_SEAL_PIECE);
        XKV_TRY_GOTO(write_file(ctx, w, XKV_BLOB_HEAD + piece * (XKV_SEAL_PIECE + XKV_SEAL_TAG),
                                buffer + XKV_SEAL_PIECE, n + XKV_SEAL_TAG),
                     out);
        done += n;
    }
out:
    xkv_release(ctx, buffer);
    return status;
}

xkv_status xkv_blob_finish(xkv_ctx *ctx, xkv_blob_writer *w, xkv_blob_head *head, const uint32_t *symbols,
                           const xkv_page_key *names)
{
    uint8_t bytes[XKV_BLOB_HEAD];
    head->extends = w->link != NULL;
    XKV_TRY(write_body(ctx, w, head, symbols, names));
    head->payload_offset = w->payload_offset;
    head->payload_size = w->payload_size;
    head->file_size = w->payload_offset + w->payload_size;
    head->sealed = w->key != NULL;
    if (head->sealed) {
        head->file_size = xkv_sealed_size(head->file_size);
        xkv_seal_nonce(head->nonce);
    }
    encode_head(head, bytes);
    if (head->sealed) {
        xkv_seal_head(w->key, bytes);
        sign_head(bytes);
        XKV_TRY(seal_pieces(ctx, w, bytes));
    }
    XKV_TRY(write_file(ctx, w, 0, bytes, sizeof bytes));
    (void)sync_file_range(w->fd, 0, 0, SYNC_FILE_RANGE_WRITE); /* the disk works while the hash is computed */
    XKV_TRY(xkv_hasher_finish(ctx, w->hasher, w->hash));
    return fsync(w->fd) == 0 ? XKV_OK : xkv_fail_errno(ctx, "write a", temp_text, errno);
}

/* The temporary name becomes the final one too, so that who cleans up after a killed process knows both. A file system
 * without hard links: the temporary file itself gets the final name, and a process killed now leaves an orphan. */
static xkv_status link_blob(xkv_ctx *ctx, xkv_blob_writer *w)
{
    const xkv_folders *f = w->folders;
    if (renameat(f->temp, w->temp, f->temp, w->name.text) != 0)
        return xkv_fail_errno(ctx, "rename a", temp_text, errno);
    memcpy(w->temp, w->name.text, sizeof w->temp);
    if (linkat(f->temp, w->temp, f->blobs, w->name.text, 0) == 0)
        return XKV_OK;
    if (errno != EPERM && errno != EOPNOTSUPP && errno != EMLINK && errno != ENOSYS)
        return xkv_fail_errno(ctx, "name the", "blob", errno);
    if (renameat(f->temp, w->temp, f->blobs, w->name.text) != 0)
        return xkv_fail_errno(ctx, "name the", "blob", errno);
    w->temp[0] = '\0';
    return XKV_OK;
}

xkv_status xkv_blob_publish(xkv_ctx *ctx, xkv_blob_writer *w, uint64_t id)
{
    xkv_blob_name name = xkv_blob_name_of(w->hash, id);
    if (w->linked && strcmp(name.text, w->name.text) == 0)
        return XKV_OK;
    if (w->linked) { /* an earlier attempt gave it another id */
        xkv_blob_unlink(w->folders, &w->name);
        w->linked = false;
    }
    w->name = name;
    XKV_TRY(link_blob(ctx, w));
    w->linked = true;
    if (fsync(w->folders->blobs) != 0 && errno != EINVAL)
        return xkv_fail_errno(ctx, "sync the folder of", "blobs", errno);
    return XKV_OK;
}

void xkv_blob_end(xkv_ctx *ctx, xkv_blob_writer *w, bool committed)
{
    xkv_hasher_free(ctx, w->hasher);
    w->hasher = NULL;
    if (w->linked && !committed)
        xkv_blob_unlink(w->folders, &w->name);
    if (w->temp[0] != '\0')
        (void)unlinkat(w->folders->temp, w->temp, 0); /* if it stays, the next one to open the store removes it */
    if (w->plain >= 0 && w->plain != w->fd)
        close(w->plain);
    if (w->fd >= 0)
        close(w->fd);
    w->fd = w->plain = -1;
    w->temp[0] = '\0';
    w->linked = false;
}

/* --- Reading ------------------------------------------------------------------------------------------------------ */

xkv_status xkv_blob_open(xkv_ctx *ctx, const xkv_folders *folders, const xkv_blob_name *name, bool lock, int *fd_p)
{
    struct stat st;
    int fd = openat(folders->blobs, name->text, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && errno == ENOENT)
        return XKV_ERROR_NOT_FOUND;
    if (fd < 0)
        return xkv_fail_errno(ctx, "open the blob", name->text, errno);
    xkv_status status = XKV_OK;
    if (lock && flock(fd, LOCK_SH | LOCK_NB) != 0)
        status = errno == EWOULDBLOCK ? XKV_ERROR_NOT_FOUND : xkv_fail_errno(ctx, "lock the blob", name->text, errno);
    else if (fstat(fd, &st) != 0)
        status = xkv_fail_errno(ctx, "examine the blob", name->text, errno);
    else if (!S_ISREG(st.st_mode))
        status = xkv_fail(ctx, XKV_ERROR_IO, "the blob %s is not a regular file [SO5]", name->text);
    else if (st.st_nlink == 0)
        status = XKV_ERROR_NOT_FOUND;
    if (status == XKV_OK)
        *fd_p = fd;
    else
        close(fd);
    return status;
}

xkv_status xkv_blob_plain(xkv_ctx *ctx, const uint8_t *key, const xkv_input *file, xkv_sealed *sealed, xkv_input *plain)
{
    if (key != NULL)
        return xkv_sealed_open(ctx, key, file, sealed, plain);
    *plain = *file;
    return XKV_OK;
}

xkv_status xkv_blob_copy_plain(xkv_ctx *ctx, const xkv_input *plain, const xkv_output *output)
{
    uint8_t bytes[XKV_BLOB_HEAD];
    xkv_blob_head head;
    xkv_window window;
    xkv_shift shift;
    XKV_TRY(xkv_blob_read_head(ctx, plain, &head));
    head.sealed = false;
    head.file_size = plain->size;
    encode_head(&head, bytes);
    XKV_TRY(output->write(output->user, ctx, 0, bytes, sizeof bytes));
    const xkv_input rest = xkv_input_window(&window, plain, XKV_BLOB_HEAD, plain->size - XKV_BLOB_HEAD);
    xkv_output behind = xkv_output_from(&shift, output, XKV_BLOB_HEAD);
    return xkv_input_copy(ctx, &rest, &behind);
}

xkv_status xkv_blob_read(xkv_ctx *ctx, const uint8_t *key, const int *fd, xkv_blob *b)
{
    XKV_TRY(xkv_blob_file(ctx, fd, &b->raw));
    XKV_TRY(xkv_blob_plain(ctx, key, &b->raw, &b->sealed, &b->file));
    XKV_TRY(xkv_blob_read_head(ctx, &b->file, &b->head));
    b->payload = xkv_input_window(&b->window, &b->file, b->head.payload_offset, b->head.payload_size);
    return XKV_OK;
}

xkv_status xkv_blob_next(xkv_ctx *ctx, const xkv_input *file, uint64_t offset, xkv_window *window, xkv_input *blob)
{
    uint8_t b[24];
    if (file->size - offset < XKV_BLOB_HEAD)
        return xkv_fail(ctx, XKV_ERROR_TRUNCATED, "blob: %llu bytes are no blob [SB1]",
                        (unsigned long long)(file->size - offset));
    XKV_TRY(file->read(file->user, ctx, offset, b, sizeof b));
    if (memcmp(b, magic, sizeof magic) != 0)
        return xkv_fail(ctx, XKV_ERROR_FORMAT, "blob: wrong magic [SB1]");
    uint64_t size = xkv_load64(b + 16);
    if (size > file->size - offset)
        return xkv_fail(ctx, XKV_ERROR_TRUNCATED, "blob: its size differs from that of the file [SB3]");
    *blob = xkv_input_window(window, file, offset, xkv_max64(size, XKV_BLOB_HEAD));
    return XKV_OK;
}

/* --- Removing ----------------------------------------------------------------------------------------------------- */

xkv_status xkv_blob_try_lock(xkv_ctx *ctx, const xkv_folders *folders, const xkv_blob_name *name, bool *locked, int *fd)
{
    *fd = openat(folders->blobs, name->text, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    *locked = *fd < 0 ? errno == ENOENT : flock(*fd, LOCK_EX | LOCK_NB) == 0;
    if (*fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM)) /* that says nothing about the blob */
        return xkv_fail_errno(ctx, "open the blob", name->text, errno);
    if (*fd >= 0 && !*locked) {
        close(*fd);
        *fd = -1;
    }
    return XKV_OK;
}

bool xkv_blob_unlink(const xkv_folders *folders, const xkv_blob_name *name)
{
    return unlinkat(folders->blobs, name->text, 0) == 0 || errno == ENOENT;
}

typedef struct oldest {
    int folder;
    uint32_t count;
    uint64_t bytes;
    struct timespec time; /* of the oldest */
    char name[256];
} oldest;

static xkv_status consider_oldest(void *user, const char *name)
{
    oldest *o = user;
    struct stat st;
    if (fstatat(o->folder, name, &st, AT_SYMLINK_NOFOLLOW) != 0)
        return XKV_OK;
    o->bytes += (uint64_t)st.st_size;
    bool older = st.st_ctim.tv_sec < o->time.tv_sec ||
                 (st.st_ctim.tv_sec == o->time.tv_sec && st.st_ctim.tv_nsec < o->time.tv_nsec);
    if (o->count++ == 0 || older) {
        o->time = st.st_ctim;
        snprintf(o->name, sizeof o->name, "%s", name);
    }
    return XKV_OK;
}

/* Nothing is evicted for what is in quarantine, so that it must not take much beside the cap. */
static bool is_too_full(const oldest *o, uint64_t byte_cap)
{
    return o->count > QUARANTINE_FILES || (byte_cap > 0 && o->count > 1 && o->bytes > byte_cap / QUARANTINE_SHARE);
}

void xkv_blob_quarantine(const xkv_folders *folders, const xkv_blob_name *name, uint64_t byte_cap)
{
    if (renameat(folders->blobs, name->text, folders->quarantine, name->text) != 0)
        xkv_blob_unlink(folders, name);
    for (;;) {
        oldest o = {.folder = folders->quarantine};
        xkv_status status = xkv_folder_list(NULL, folders->quarantine, consider_oldest, &o);
        if (status != XKV_OK || !is_too_full(&o, byte_cap) || unlinkat(folders->quarantine, o.name, 0) != 0)
            return;
    }
}

xkv_status xkv_folder_list(xkv_ctx *ctx, int folder, xkv_status (*name)(void *user, const char *name), void *user)
{
    int fd = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* with a position of its own */
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    xkv_status status = XKV_OK;
    if (d == NULL) {
        int error = errno;
        if (fd >= 0)
            close(fd);
        return xkv_fail_errno(ctx, "list a folder of", "the store", error);
    }
    for (const struct dirent *e; status == XKV_OK && (e = readdir(d)) != NULL;) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            status = name(user, e->d_name);
    }
    closedir(d);
    return status;
}
