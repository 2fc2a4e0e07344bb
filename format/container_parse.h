/* container_parse.h - the sections of an entry as bytes: shared by the reader, and by the writer, which reads back what
 * it encoded and so refuses exactly what the reader would. */
#ifndef XKV_CONTAINER_PARSE_H
#define XKV_CONTAINER_PARSE_H

#include "container.h"

#define XKV_HEADER_SIZE      64u
#define XKV_TABLE_ENTRY_SIZE 32u
#define XKV_MAX_SECTIONS     256u
#define XKV_MAX_SECTION_SIZE (256u * 1024u * 1024u) /* GEOM, TOKN, META, GRPS */
#define XKV_MAX_BLOB_SIZE    (UINT64_C(1) << 32)
#define XKV_MAX_ZSTD_RATIO   32768u /* what no zstd frame exceeds: spec/container.md, section 6 */
#define XKV_MAX_SEGMENTS     65536u
#define XKV_MAX_VALUES       4096u
#define XKV_MAX_VALUE_SIZE   (1u << 20)
#define XKV_MIN_CHUNK        32u
#define XKV_MAX_CHUNK        65536u
#define XKV_MAX_INV_FREQ     64.0

enum { XKV_GEOM_SIZE = 32, XKV_PLANE_SIZE = 24, XKV_ROPE_SIZE = 32, XKV_BLOB_SIZE = 24, XKV_TOKN_SIZE = 16 };
enum { XKV_FRAM_SIZE = 56, XKV_SEGMENT_SIZE = 24, XKV_META_SIZE = 8, XKV_VALUE_SIZE = 8 };
enum { XKV_GRPS_SIZE = 8, XKV_GROUP_SIZE = 48, XKV_GROUP_PLANE_SIZE = 16, XKV_PART_SIZE = 32 };

/* Flags of a section. */
#define XKV_FLAG_REQUIRED 1u
#define XKV_FLAG_BY_PARTS 2u

extern const uint8_t xkv_container_magic[8];

/* --- A walk over the bytes of one section ------------------------------------------------------------------------ */

typedef struct xkv_cursor {
    xkv_ctx *ctx;
    const char *section;  /* "GEOM" */
    const char *end_rule; /* the rule that the section ends with its last record */
    const uint8_t *data;
    uint64_t size, pos;
    uint64_t offset; /* of data in the file, for messages */
    bool own;        /* just encoded by the writer: literals need not be decoded again */
} xkv_cursor;

/* The next `size` bytes; CORRUPT [end_rule] when there are fewer. */
XKV_MUST_CHECK xkv_status xkv_cursor_take(xkv_cursor *cur, uint64_t size, const uint8_t **bytes_p);
/* CORRUPT [end_rule] unless all bytes are taken. */
XKV_MUST_CHECK xkv_status xkv_cursor_end(const xkv_cursor *cur);
/* Report that the field at `at` breaks `rule`: CORRUPT, or another status. */
xkv_status xkv_cursor_fail(const xkv_cursor *cur, const uint8_t *at, const char *rule, const char *fmt, ...)
    XKV_PRINTF(4, 5);
xkv_status xkv_cursor_fail_as(const xkv_cursor *cur, xkv_status status, const uint8_t *at, const char *rule,
                              const char *fmt, ...) XKV_PRINTF(5, 6);

/* XKV_REQUIRE(cur, condition, at, "G3", "sinks is %u, expected ...", sinks) */
#define XKV_REQUIRE(cur, condition, at, ...)                                                                           \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return xkv_cursor_fail(cur, at, __VA_ARGS__);                                                              \
    } while (0)

/* --- Sections: each parses its bytes into `c` and checks their rules; what it allocates belongs to c ----------------
 */

xkv_status xkv_parse_geometry(xkv_cursor *cur, xkv_container *c);
xkv_status xkv_parse_groups(xkv_cursor *cur, xkv_container *c); /* needs the geometry and c->payload_size */
xkv_status xkv_parse_tokens(xkv_cursor *cur, xkv_container *c);
xkv_status xkv_parse_framing(xkv_cursor *cur, xkv_container *c);
xkv_status xkv_parse_metadata(xkv_cursor *cur, xkv_container *c);

/* The parser of `type`, one of the five above, over `size` bytes at `offset` of the file; own: see xkv_cursor. */
xkv_status xkv_parse_section(xkv_ctx *ctx, uint32_t type, const uint8_t *data, uint64_t size, uint64_t offset, bool own,
                             xkv_container *c);

/* --- Blobs (spec section 6) -------------------------------------------------------------------------------------- */

/* Take a blob that must hold `size` bytes in elements of element_size ([rule], "name"). Elements of 4 bytes come as
 * host integers. *data_p is allocated; data_p NULL: check the blob without decoding it. */
xkv_status xkv_blob_take(xkv_cursor *cur, uint32_t element_size, uint64_t size, const char *rule, const char *name,
                         void **data_p);

/* --- A growing buffer for encoding ------------------------------------------------------------------------------- */

typedef struct xkv_buffer {
    xkv_ctx *ctx;
    uint8_t *data;
    size_t size, capacity;
} xkv_buffer;

/* Append `size` zero bytes and return them to be filled; the pointer is valid until the next call. */
XKV_MUST_CHECK xkv_status xkv_buffer_grow(xkv_buffer *b, uint64_t size, uint8_t **bytes_p);
/* Append zeros up to a multiple of `align`. */
XKV_MUST_CHECK xkv_status xkv_buffer_align(xkv_buffer *b, uint64_t align);
/* Append a blob of `count` elements: bytes, or host integers when element_size is 4. zstd when that is smaller. */
XKV_MUST_CHECK xkv_status xkv_buffer_blob(xkv_buffer *b, uint32_t element_size, const void *data, uint64_t count,
                                          int zstd_level);

/* Free what xkv_parse_groups() made. */
void xkv_free_groups(xkv_ctx *ctx, xkv_container *c);

#endif
