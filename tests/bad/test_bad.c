/*
 * test_bad.c - one bad file, or several, for each rule of spec/container.md.
 *
 *     test_bad             run the tests
 *     test_bad FOLDER      write the good and the bad files there, named RULE-NUMBER-STATUS.xkv
 *
 * Each bad file breaks one rule only: what depends on the changed bytes (checksums of sections, of the table and of the
 * header) is made right again, so that the rule itself is what refuses the file.
 */
#include "sample_entry.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>
#include <xxhash.h>

/* --- Places in a file ------------------------------------------------------------------------------------------- */

typedef enum place {
    HEADER,
    ENTRY_GEOM, /* entries of the section table */
    ENTRY_TOKN,
    ENTRY_FRAM,
    ENTRY_META,
    ENTRY_GRPS,
    ENTRY_PAYL,
    GEOM,
    PLANES,
    ROPE,
    TOKN,
    IDS, /* blobs */
    POSITIONS,
    FRAM,
    SEGMENTS,
    LITERALS,
    ROWS,
    META,
    VALUES,
    LAST_VALUE,
    GRPS,
    GROUP0,
    PLANES0,
    PARTS0,
    GROUP1,
    PLANES1,
    PARTS1,
    PAYL
} place;

static size_t entry_at(uint32_t index)
{
    return 64 + 32 * (size_t)index;
}

static size_t section_at(const image *f, place entry)
{
    return (size_t)xkv_load64(f->data + entry_at(entry - ENTRY_GEOM) + 8);
}

static size_t behind_blob(const image *f, size_t blob)
{
    return blob + 24 + (size_t)xkv_align64(xkv_load64(f->data + blob + 16), 8);
}

static size_t behind_value(const image *f, size_t value)
{
    return value + (size_t)xkv_align64(8u + xkv_load16(f->data + value) + xkv_load32(f->data + value + 4), 8);
}

static size_t group_at(const image *f, int index)
{
    size_t at = section_at(f, ENTRY_GRPS) + 8;
    return index == 0 ? at : at + 48 + 2 * 16 + 32 * (size_t)xkv_load32(f->data + at + 16);
}

static size_t locate(const image *f, place where)
{
    size_t values = section_at(f, ENTRY_META) + 8, segments = section_at(f, ENTRY_FRAM) + 56;
    switch (where) {
    case HEADER:
        return 0;
    case ENTRY_GEOM:
    case ENTRY_TOKN:
    case ENTRY_FRAM:
    case ENTRY_META:
    case ENTRY_GRPS:
    case ENTRY_PAYL:
        return entry_at(where - ENTRY_GEOM);
    case GEOM:
        return section_at(f, ENTRY_GEOM);
    case PLANES:
        return section_at(f, ENTRY_GEOM) + 32;
    case ROPE:
        return section_at(f, ENTRY_GEOM) + 32 + 24 * SAMPLE_PLANES;
    case TOKN:
        return section_at(f, ENTRY_TOKN);
    case IDS:
        return section_at(f, ENTRY_TOKN) + 16;
    case POSITIONS:
        return behind_blob(f, section_at(f, ENTRY_TOKN) + 16);
    case FRAM:
        return section_at(f, ENTRY_FRAM);
    case SEGMENTS:
        return segments;
    case LITERALS:
        return segments + 24 * SAMPLE_SEGMENTS;
    case ROWS:
        return behind_blob(f, segments + 24 * SAMPLE_SEGMENTS);
    case META:
        return section_at(f, ENTRY_META);
    case VALUES:
        return values;
    case LAST_VALUE:
        return behind_value(f, behind_value(f, behind_value(f, values)));
    case GRPS:
        return section_at(f, ENTRY_GRPS);
    case GROUP0:
    case GROUP1:
        return group_at(f, where == GROUP1);
    case PLANES0:
    case PLANES1:
        return group_at(f, where == PLANES1) + 48;
    case PARTS0:
    case PARTS1:
        return group_at(f, where == PARTS1) + 48 + 32;
    case PAYL:
        return section_at(f, ENTRY_PAYL);
    }
    return SIZE_MAX;
}

/* --- Checksums -------------------------------------------------------------------------------------------------- */

/* Up to what the checksums are made right again. */
typedef enum seal { SECTIONS, TABLE, HEAD, NONE } seal;

static void seal_sections(image *f, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *entry = f->data + entry_at(i);
        uint64_t offset = xkv_load64(entry + 8), size = xkv_load64(entry + 16);
        if (xkv_load32(entry) != XKV_SECTION_PAYL && offset <= f->size && size <= f->size - offset)
            xkv_store64(entry + 24, XXH3_64bits(f->data + offset, size));
    }
}

static void reseal(image *f, seal up_to)
{
    uint32_t count = 6;
    if (up_to == SECTIONS)
        seal_sections(f, count);
    if (up_to <= TABLE) {
        XXH128_canonical_t hash;
        XXH128_canonicalFromHash(&hash, XXH3_128bits(f->data + 64, 32u * count));
        memcpy(f->data + 40, hash.digest, 16);
    }
    if (up_to <= HEAD)
        xkv_store64(f->data + 56, XXH3_64bits(f->data, 56));
}

/* --- Patches that are more than one field ----------------------------------------------------------------------- */

static void set32(image *f, place where, size_t offset, uint32_t value)
{
    xkv_store32(f->data + locate(f, where) + offset, value);
}

static void add64(image *f, place where, size_t offset, uint64_t by)
{
    uint8_t *p = f->data + locate(f, where) + offset;
    xkv_store64(p, xkv_load64(p) + by);
}

static void append_byte(image *f)
{
    f->size++;
}

static void cut_to_63(image *f)
{
    f->size = 63;
}

static void cut_to_nothing(image *f)
{
    f->size = 0;
}

static void damage_unknown(image *f)
{
    set32(f, ENTRY_META, 0, XKV_TAG('A', 'B', 'C', 'D'));
    f->data[locate(f, META)] ^= 1;
}

static void fill_section_gap(image *f)
{
    f->data[locate(f, GEOM) + xkv_load64(f->data + entry_at(0) + 16)] = 1;
}

static void swap_first_types(image *f)
{
    set32(f, ENTRY_GEOM, 0, XKV_SECTION_TOKN);
    set32(f, ENTRY_TOKN, 0, XKV_SECTION_GEOM);
}

static void payload_not_last(image *f)
{
    uint8_t entry[8];
    memcpy(entry, f->data + entry_at(4), 8);
    memcpy(f->data + entry_at(4), f->data + entry_at(5), 8);
    memcpy(f->data + entry_at(5), entry, 8);
    memset(f->data + entry_at(4) + 24, 0, 8);
}

static void no_tokens(image *f)
{
    memset(f->data + locate(f, GEOM) + 12, 0, 4);
    memset(f->data + locate(f, GEOM) + 20, 0, 8);
}

static void no_planes(image *f)
{
    set32(f, GEOM, 4, 0);
}

/* 8 bytes, which lie in the gap behind the section, more, or 8 fewer. */
static void grow(image *f, place entry, uint64_t by)
{
    uint64_t size = xkv_load64(f->data + locate(f, entry) + 16);
    assert_int_equal(xkv_align64(size, 64), xkv_align64(size + by, 64));
    add64(f, entry, 16, by);
}
static void grow_geometry(image *f)
{
    grow(f, ENTRY_GEOM, 8);
}
static void shrink_geometry(image *f)
{
    grow(f, ENTRY_GEOM, (uint64_t)-8);
    memset(f->data + locate(f, ROPE) + 40, 0, 8); /* now part of the gap */
}
static void make_blocks(image *f)
{
    f->data[locate(f, PLANES) + 5] = XKV_Q4_0;
    xkv_store32(f->data + locate(f, PLANES) + 12, 16); /* two heads */
}
/* An entry of its own, with blocks, whose V of the second layer is dimension after dimension. */
static void turn_blocks(image *f)
{
    xkv_ctx *ctx;
    sample s;
    sample_init(&s, SAMPLE_SMALL);
    sample_use_blocks(&s);
    assert_int_equal(xkv_ctx_create(NULL, &ctx), XKV_OK);
    assert_int_equal(sample_write(ctx, &s, f), XKV_OK);
    assert_int_equal(sample_check(ctx, f->data, f->size), XKV_OK);
    xkv_ctx_free(ctx);
    xkv_store32(f->data + locate(f, SEGMENTS) + 3 * 24 + 16, XKV_LAYOUT_DIM_MAJOR);
}
static void grow_tokens(image *f)
{
    grow(f, ENTRY_TOKN, 8);
}
static void shrink_tokens(image *f)
{
    grow(f, ENTRY_TOKN, (uint64_t)-4);
}
static void grow_framing(image *f)
{
    grow(f, ENTRY_FRAM, 8);
}
static void grow_metadata(image *f)
{
    grow(f, ENTRY_META, 8);
}
static void grow_groups(image *f)
{
    grow(f, ENTRY_GRPS, 8);
}

static void fill_blob_padding(image *f)
{
    size_t at = locate(f, LITERALS), stored = (size_t)xkv_load64(f->data + at + 16);
    assert_int_not_equal(stored % 8, 0);
    f->data[at + 24 + stored] = 1;
}

static void damage_block(image *f)
{
    /* Magic, descriptor and a content size of two bytes; then the block header, whose type 3 is reserved. */
    f->data[locate(f, IDS) + 24 + 7] |= 6;
}

static void cut_frame(image *f)
{
    /* A frame that ends one byte early; the byte then belongs to the padding, which must be zero. */
    uint8_t *blob = f->data + locate(f, IDS);
    uint64_t stored = xkv_load64(blob + 16);
    blob[24 + stored - 1] = 0;
    if (stored % 8 != 1)
        xkv_store64(blob + 16, stored - 1);
}

static void second_frame(image *f)
{
    /* A skippable frame without content behind that of the last blob; the section grows into the gap. */
    uint8_t *blob = f->data + locate(f, POSITIONS), *end = blob + 24 + xkv_load64(blob + 16);
    grow(f, ENTRY_TOKN, 8);
    xkv_store32(end, 0x184d2a50);
    xkv_store32(end + 4, 0);
    add64(f, POSITIONS, 16, 8);
}

static void mode_0_too_far(image *f)
{
    set32(f, TOKN, 4, 0);
    set32(f, TOKN, 8, INT32_MAX - 1);
}

static void longer_literal(image *f)
{
    add64(f, SEGMENTS, 0, 1);
    add64(f, FRAM, 8, 1);
}

static void longer_tensor(image *f)
{
    add64(f, SEGMENTS, 24, 1);
    add64(f, FRAM, 8, 1);
}

static void empty_segment(image *f)
{
    add64(f, SEGMENTS, 0, 4);
    add64(f, SEGMENTS, 4 * 24, (uint64_t)-4);
}

static void plane_in_two_segments(image *f)
{
    uint64_t size = SAMPLE_LARGE * SAMPLE_WIDTH * 2;
    set32(f, SEGMENTS, 24 + 12, 3);
    add64(f, SEGMENTS, 24, size);
    add64(f, FRAM, 8, size);
}

static void plane_in_no_segment(image *f)
{
    memset(f->data + locate(f, SEGMENTS) + 3 * 24 + 8, 0, 12);
}

static void swap_group_planes(image *f)
{
    set32(f, PLANES0, 0, 1);
    set32(f, PLANES0, 16, 3);
    set32(f, PLANES1, 0, 0);
    set32(f, PLANES1, 16, 2);
}

static void too_wide_group(image *f)
{
    set32(f, PLANES, 8, 65536);
    set32(f, PLANES, 2 * 24 + 8, 65536);
}

static void too_much_content(image *f)
{
    /* A plane of group 1 becomes wide: chunk 0 has 45 bytes for 8 MB; the other chunks claim to be frames as well. */
    set32(f, PLANES, 24 + 8, 16384);
    set32(f, PARTS1, 3 * 32 + 24, 1);
    set32(f, PARTS1, 4 * 32 + 24, 1);
}

static void frames_of_nothing(image *f)
{
    add64(f, PARTS1, 8, 45);
    set32(f, PARTS1, 24, 1);
}

static void longer_payload(image *f)
{
    add64(f, ENTRY_PAYL, 16, 64);
    add64(f, HEADER, 16, 64);
    f->size += 64;
}

static void part_behind_payload(image *f)
{
    /* The last part of the last group. */
    uint8_t *part = f->data + locate(f, PARTS1) + 32 * (xkv_load32(f->data + locate(f, GROUP1) + 16) - 1);
    xkv_store64(part + 8, UINT64_C(1) << 40);
    xkv_store32(part + 24, 1);
}

static void fill_part_gap(image *f)
{
    size_t end = (size_t)xkv_load64(f->data + locate(f, PARTS0) + 8);
    assert_int_not_equal(end % 64, 0);
    f->data[locate(f, PAYL) + end] = 1;
}

static void damage_part(image *f)
{
    f->data[locate(f, PAYL)] ^= 1;
}

/* --- The table -------------------------------------------------------------------------------------------------- */

#define F64_NAN   UINT64_C(0x7ff8000000000000)
#define F64_INF   UINT64_C(0x7ff0000000000000)
#define F64_65    UINT64_C(0x4050400000000000)
#define F64_1     UINT64_C(0x3ff0000000000000)
#define F64_MINUS UINT64_C(0xbff0000000000000)
#define OPTIONAL  UINT64_C(0x00000000)
#define REQUIRED  UINT64_C(0x100000000)
#define ABCD      XKV_TAG('A', 'B', 'C', 'D')
#define BAD       XKV_ERROR_CORRUPT
#define SUM       XKV_ERROR_CHECKSUM

/* Either `size` bytes at `where` + offset become `value`, or `patch` does more. */
typedef struct bad_case {
    const char *rule, *what;
    uint32_t tokens;
    place where;
    size_t offset, size;
    uint64_t value;
    void (*patch)(image *f);
    seal up_to;
    xkv_status status;
} bad_case;

#define FIELD(rule, what, where, offset, size, value)                                                                  \
    {                                                                                                                  \
        rule, what, SAMPLE_LARGE, where, offset, size, value, NULL, SECTIONS, BAD                                      \
    }
#define SMALL(rule, what, where, offset, size, value)                                                                  \
    {                                                                                                                  \
        rule, what, SAMPLE_SMALL, where, offset, size, value, NULL, SECTIONS, BAD                                      \
    }
#define OTHER(rule, what, where, offset, size, value, up_to, status)                                                   \
    {                                                                                                                  \
        rule, what, SAMPLE_LARGE, where, offset, size, value, NULL, up_to, status                                      \
    }
#define PATCH(rule, what, tokens, patch, up_to, status)                                                                \
    {                                                                                                                  \
        rule, what, tokens, HEADER, 0, 0, 0, patch, up_to, status                                                      \
    }

static const bad_case cases[] = {
    OTHER("H1", "magic", HEADER, 0, 1, 'X', HEAD, XKV_ERROR_FORMAT),
    OTHER("H1", "magic, line end", HEADER, 4, 1, '\n', HEAD, XKV_ERROR_FORMAT),
    OTHER("H2", "header_checksum", HEADER, 56, 8, 1, NONE, SUM),
    OTHER("H3", "file_size larger than the file", HEADER, 16, 8, 1 << 20, HEAD, XKV_ERROR_TRUNCATED),
    PATCH("H3", "a byte more than file_size", SAMPLE_LARGE, append_byte, NONE, BAD),
    OTHER("H4", "read_version 2", HEADER, 8, 4, 0x00020002, HEAD, XKV_ERROR_VERSION),
    OTHER("H4", "read_version 0", HEADER, 10, 2, 0, HEAD, BAD),
    OTHER("H5", "write_version below read_version", HEADER, 8, 2, 0, HEAD, BAD),
    OTHER("H6", "kind: dictionary", HEADER, 12, 4, 2, HEAD, XKV_ERROR_FORMAT),
    OTHER("H6", "kind 0", HEADER, 12, 4, 0, HEAD, XKV_ERROR_FORMAT),
    OTHER("H7", "required feature, lowest unknown bit", HEADER, 24, 4, 2, HEAD, XKV_ERROR_FEATURE),
    OTHER("H7", "required feature, highest bit", HEADER, 24, 4, 0x80000000, HEAD, XKV_ERROR_FEATURE),
    OTHER("H8", "reserved", HEADER, 36, 4, 1, HEAD, BAD),
    PATCH("H9", "63 bytes", SAMPLE_LARGE, cut_to_63, NONE, XKV_ERROR_TRUNCATED),
    PATCH("H9", "no bytes", SAMPLE_LARGE, cut_to_nothing, NONE, XKV_ERROR_TRUNCATED),

    OTHER("S1", "no sections", HEADER, 32, 4, 0, HEAD, BAD),
    OTHER("S1", "257 sections", HEADER, 32, 4, 257, HEAD, BAD),
    OTHER("S1", "a table that ends behind the file", HEADER, 32, 4, 200, HEAD, BAD),
    OTHER("S2", "table_hash", HEADER, 40, 8, 1, HEAD, SUM),
    FIELD("S3", "a type twice", ENTRY_META, 0, 4, XKV_SECTION_GEOM),
    FIELD("S3", "a type that is not letters", ENTRY_META, 0, 4, 0x31424344),
    OTHER("S4", "unknown section, required", ENTRY_META, 0, 8, ABCD | REQUIRED, SECTIONS, XKV_ERROR_FEATURE),
    FIELD("S5", "reserved flag", ENTRY_GEOM, 4, 4, 5),
    FIELD("S5", "GEOM checksummed by parts", ENTRY_GEOM, 4, 4, 3),
    FIELD("S5", "PAYL not checksummed by parts", ENTRY_PAYL, 4, 4, 1),
    FIELD("S5", "checksum of PAYL", ENTRY_PAYL, 24, 8, 1),
    FIELD("S6", "first section too late", ENTRY_GEOM, 8, 8, 320),
    FIELD("S6", "sections overlap", ENTRY_TOKN, 8, 8, 256),
    FIELD("S6", "size beyond the file", ENTRY_FRAM, 16, 8, 1 << 20),
    FIELD("S6", "offset + size overflow", ENTRY_FRAM, 16, 8, UINT64_MAX - 100),
    FIELD("S6", "the last section ends before the file", ENTRY_PAYL, 16, 8, 64),
    PATCH("S6", "gap", SAMPLE_LARGE, fill_section_gap, SECTIONS, BAD),
    OTHER("S7", "checksum of GEOM", ENTRY_GEOM, 24, 8, 1, TABLE, SUM),
    OTHER("S7", "checksum of META", ENTRY_META, 24, 8, 1, TABLE, SUM),
    PATCH("S7", "an unknown section", SAMPLE_LARGE, damage_unknown, TABLE, SUM),
    FIELD("S8", "GEOM not required", ENTRY_GEOM, 4, 4, 0),
    FIELD("S8", "FRAM not required", ENTRY_FRAM, 4, 4, 0),
    FIELD("S8", "META required", ENTRY_META, 4, 4, 1),
    FIELD("S8", "no TOKN", ENTRY_TOKN, 0, 8, ABCD | OPTIONAL),
    PATCH("S8", "TOKN before GEOM", SAMPLE_LARGE, swap_first_types, SECTIONS, BAD),
    PATCH("S8", "PAYL not last", SAMPLE_LARGE, payload_not_last, SECTIONS, BAD),
    OTHER("S9", "META of more than 256 MiB", ENTRY_META, 16, 8, (1 << 28) + 1, SECTIONS, XKV_ERROR_LIMIT),

    FIELD("G1", "layer_count", GEOM, 0, 4, 4097),
    FIELD("G1", "plane_count", GEOM, 4, 4, 16385),
    FIELD("G1", "rope_count", GEOM, 8, 4, 4097),
    FIELD("G1", "token_count", GEOM, 12, 4, 0x80000000),
    FIELD("G2", "chunk_tokens 0", GEOM, 16, 4, 0),
    FIELD("G2", "chunk_tokens 16", GEOM, 16, 4, 16),
    FIELD("G2", "chunk_tokens 33", GEOM, 16, 4, 33),
    FIELD("G2", "chunk_tokens 131072", GEOM, 16, 4, 131072),
    FIELD("G3", "sinks", GEOM, 20, 4, 69),
    FIELD("G3", "sinks + window overflow", GEOM, 24, 4, UINT32_MAX),
    FIELD("G4", "reserved", GEOM, 28, 4, 1),
    FIELD("G4", "reserved of a plane", PLANES, 6, 2, 1),
    FIELD("G4", "row_set", PLANES, 20, 4, 1),
    FIELD("G4", "reserved of a RoPE record", ROPE, 12, 4, 1),
    FIELD("G4", "second reserved of a RoPE record", ROPE, 24, 8, 1),
    FIELD("G5", "layer", PLANES, 3 * 24, 4, 2),
    FIELD("G6", "kind", PLANES, 4, 1, 4),
    FIELD("G6", "dtype", PLANES, 5, 1, 5),
    FIELD("G7", "heads 0", PLANES, 8, 4, 0),
    FIELD("G7", "head_dim 0", PLANES, 12, 4, 0),
    FIELD("G7", "width", PLANES, 8, 4, 65537),
    FIELD("G7", "width overflow", PLANES, 8, 8, UINT64_C(0x0001000000010000)),
    FIELD("G8", "rope", PLANES, 16, 4, 1),
    FIELD("G8", "rope of a V plane", PLANES, 24 + 16, 4, 0),
    FIELD("G9", "(layer, kind) twice", PLANES, 24 + 4, 1, 0),
    FIELD("G9", "descending", PLANES, 0, 4, 1),
    PATCH("G10", "planes without tokens", SAMPLE_LARGE, no_tokens, SECTIONS, BAD),
    PATCH("G10", "tokens without planes", SAMPLE_LARGE, no_planes, SECTIONS, BAD),
    FIELD("G11", "n_rot 0", ROPE, 0, 4, 0),
    FIELD("G11", "n_rot odd", ROPE, 0, 4, 3),
    FIELD("G11", "n_rot 1026", ROPE, 0, 4, 1026),
    FIELD("G11", "first_dim", ROPE, 4, 4, 1),
    FIELD("G11", "first_dim overflow", ROPE, 4, 4, UINT32_MAX),
    FIELD("G11", "style", ROPE, 8, 4, 2),
    FIELD("G11", "scale 0", ROPE, 16, 8, 0),
    FIELD("G11", "scale infinite", ROPE, 16, 8, F64_INF),
    FIELD("G11", "scale NaN", ROPE, 16, 8, F64_NAN),
    FIELD("G11", "inv_freq NaN", ROPE, 32, 8, F64_NAN),
    FIELD("G11", "inv_freq 65", ROPE, 40, 8, F64_65),
    PATCH("G12", "bytes behind the last record", SAMPLE_LARGE, grow_geometry, SECTIONS, BAD),
    PATCH("G12", "section too short", SAMPLE_LARGE, shrink_geometry, SECTIONS, BAD),
    FIELD("G12", "more planes than fit", GEOM, 4, 4, 16384),
    FIELD("G12", "more RoPE records than fit", GEOM, 8, 4, 4096),
    FIELD("G13", "rows that are no whole blocks", PLANES, 5, 1, XKV_Q8_0),
    PATCH("G13", "blocks without the feature", SAMPLE_LARGE, make_blocks, SECTIONS, BAD),
    OTHER("G13", "the feature without blocks", HEADER, 24, 4, XKV_FEATURE_BLOCKS, HEAD, BAD),

    FIELD("B1", "method", IDS, 0, 4, 2),
    FIELD("B1", "element_size", IDS, 4, 4, 2),
    FIELD("B1", "element_size 0", IDS, 4, 4, 0),
    FIELD("B1", "size no multiple of element_size", IDS, 8, 8, 4 * 71 + 1),
    FIELD("B2", "size", IDS, 8, 8, UINT64_C(0x100000004)),
    FIELD("B2", "stored_size", IDS, 16, 8, UINT32_MAX),
    FIELD("B2", "stored_size overflow", IDS, 16, 8, UINT64_MAX),
    SMALL("B2", "method 0, size is not stored_size", IDS, 8, 8, 12),
    FIELD("B2", "method 1, more than any frame holds", IDS, 8, 8, UINT64_C(0x100000000)),
    PATCH("B3", "padding", SAMPLE_SMALL, fill_blob_padding, SECTIONS, BAD),
    PATCH("B3", "section ends in the padding", SAMPLE_SMALL, shrink_tokens, SECTIONS, BAD),
    FIELD("B4", "not a frame", IDS, 24, 4, 0),
    FIELD("B4", "a skippable frame", IDS, 24, 4, 0x184d2a50),
    FIELD("B4", "content size", IDS, 24 + 5, 2, 4 * 71 - 256 + 4),
    PATCH("B4", "damaged block", SAMPLE_LARGE, damage_block, SECTIONS, BAD),
    PATCH("B4", "damaged end", SAMPLE_LARGE, cut_frame, SECTIONS, BAD),
    PATCH("B4", "a second frame", SAMPLE_LARGE, second_frame, SECTIONS, BAD),
    FIELD("B4", "a frame among the literals", LITERALS, 24, 4, 0),

    FIELD("T1", "token_id_count", TOKN, 0, 4, 0x80000000),
    FIELD("T1", "position_mode", TOKN, 4, 4, 2),
    FIELD("T1", "first_position in mode 1", TOKN, 8, 4, 1),
    FIELD("T1", "reserved", TOKN, 12, 4, 1),
    FIELD("T2", "token_id_count is not the blob's", TOKN, 0, 4, 70),
    FIELD("T2", "element_size", IDS, 4, 4, 1),
    SMALL("T3", "descending positions", POSITIONS, 24, 4, 2),
    FIELD("T3", "element_size", POSITIONS, 4, 4, 1),
    PATCH("T3", "position beyond 2^31 - 1", SAMPLE_LARGE, mode_0_too_far, SECTIONS, BAD),
    PATCH("T4", "bytes behind the last blob", SAMPLE_LARGE, grow_tokens, SECTIONS, BAD),
    FIELD("T4", "a blob behind positions of mode 0", TOKN, 4, 4, 0),

    FIELD("F1", "no segments", FRAM, 4, 4, 0),
    FIELD("F1", "65537 segments", FRAM, 4, 4, 65537),
    FIELD("F2", "source_size", FRAM, 8, 8, 1),
    PATCH("F2", "size 0", SAMPLE_LARGE, empty_segment, SECTIONS, BAD),
    FIELD("F2", "sum of sizes overflows", SEGMENTS, 0, 8, UINT64_MAX),
    PATCH("F2", "size of a tensor segment", SAMPLE_LARGE, longer_tensor, SECTIONS, BAD),
    FIELD("F2", "planes beyond plane_count", SEGMENTS, 3 * 24 + 8, 4, 4),
    FIELD("F2", "first_plane + plane_count overflow", SEGMENTS, 3 * 24 + 12, 4, UINT32_MAX),
    FIELD("F2", "layout", SEGMENTS, 3 * 24 + 16, 4, 4),
    FIELD("F2", "layout 1 with two planes", SEGMENTS, 24 + 16, 4, 1),
    FIELD("F2", "layout 2 with two planes", SEGMENTS, 24 + 16, 4, 2),
    FIELD("F2", "first_plane of a literal segment", SEGMENTS, 8, 4, 1),
    FIELD("F2", "layout of a literal segment", SEGMENTS, 16, 4, 1),
    FIELD("F2", "reserved", SEGMENTS, 20, 4, 1),
    FIELD("F3", "row_mode", FRAM, 48, 4, 2),
    FIELD("F3", "reserved", FRAM, 52, 4, 1),
    FIELD("F4", "element_size", LITERALS, 4, 4, 4),
    PATCH("F4", "size", SAMPLE_LARGE, longer_literal, SECTIONS, BAD),
    SMALL("F5", "a row twice", ROWS, 24, 4, 2),
    SMALL("F5", "a row beyond token_count", ROWS, 24, 4, 3),
    FIELD("F5", "element_size", ROWS, 4, 4, 1),
    OTHER("F6", "literal_hash", FRAM, 32, 8, 1, SECTIONS, SUM),
    PATCH("F8", "plane in two segments", SAMPLE_LARGE, plane_in_two_segments, SECTIONS, BAD),
    PATCH("F8", "plane in no segment", SAMPLE_LARGE, plane_in_no_segment, SECTIONS, BAD),
    PATCH("F9", "bytes behind the last blob", SAMPLE_LARGE, grow_framing, SECTIONS, BAD),
    FIELD("F9", "more segments than fit", FRAM, 4, 4, 65536),
    PATCH("F10", "blocks by dimension", SAMPLE_SMALL, turn_blocks, SECTIONS, BAD),

    FIELD("M1", "count", META, 0, 4, 4097),
    FIELD("M1", "reserved", META, 4, 4, 1),
    FIELD("M2", "key_size 0", VALUES, 0, 2, 0),
    FIELD("M2", "key_size 256", VALUES, 0, 2, 256),
    FIELD("M2", "type 0", VALUES, 2, 2, 0),
    FIELD("M2", "type 5", VALUES, 2, 2, 5),
    FIELD("M2", "value_size of a number", VALUES, 4, 4, 4),
    FIELD("M2", "value_size", LAST_VALUE, 4, 4, (1 << 20) + 1),
    FIELD("M3", "letter of a key", VALUES, 8, 1, 'E'),
    FIELD("M3", "descending keys", VALUES, 8, 1, 'o'),
    FIELD("M4", "padding", LAST_VALUE, 8 + 6 + 7, 1, 1),
    PATCH("M5", "bytes behind the last record", SAMPLE_LARGE, grow_metadata, SECTIONS, BAD),
    FIELD("M5", "fewer records than there are", META, 0, 4, 3),
    FIELD("M5", "more records than there are", META, 0, 4, 5),
    FIELD("M6", "not UTF-8", LAST_VALUE, 8 + 6, 1, 0xff),
    FIELD("M6", "a NUL", LAST_VALUE, 8 + 6, 1, 0),
    FIELD("M6", "an incomplete sequence", LAST_VALUE, 8 + 6 + 6, 1, 0xc3),
    FIELD("M6", "an overlong form", LAST_VALUE, 8 + 6 + 5, 2, 0xafc0),
    FIELD("M6", "a surrogate", LAST_VALUE, 8 + 6 + 4, 3, 0x80a0ed),

    FIELD("R1", "group_count", GRPS, 0, 4, 6),
    FIELD("R1", "reserved", GRPS, 4, 4, 1),
    FIELD("R1", "reserved of a group", GROUP0, 20, 4, 1),
    FIELD("R1", "second reserved of a group", GROUP0, 40, 8, 1),
    FIELD("R1", "reserved of a part", PARTS0, 28, 4, 1),
    OTHER("R2", "unknown codec", GROUP0, 0, 4, 9, SECTIONS, XKV_ERROR_FEATURE),
    FIELD("R2", "reason of a lossless group", GROUP1, 4, 4, 6),
    FIELD("R2", "reason of an svd group", GROUP0, 4, 4, 1),
    FIELD("R3", "group without planes", GROUP0, 8, 4, 0),
    FIELD("R3", "plane beyond plane_count", PLANES0, 16, 4, 4),
    FIELD("R3", "descending planes", PLANES0, 0, 4, 3),
    FIELD("R3", "plane in two groups", PLANES1, 0, 4, 0),
    FIELD("R3", "planes in no group", GRPS, 0, 4, 1),
    PATCH("R3", "groups not sorted", SAMPLE_LARGE, swap_group_planes, SECTIONS, BAD),
    FIELD("R4", "rank 0", GROUP0, 12, 4, 0),
    FIELD("R4", "rank beyond the width", GROUP0, 12, 4, 17),
    FIELD("R4", "rank of a lossless group", GROUP1, 12, 4, 1),
    PATCH("R4", "width", SAMPLE_LARGE, too_wide_group, SECTIONS, BAD),
    FIELD("R5", "part_count", GROUP0, 16, 4, 4),
    FIELD("R6", "energy NaN", GROUP0, 24, 8, F64_NAN),
    FIELD("R6", "energy negative", GROUP0, 24, 8, F64_MINUS),
    FIELD("R6", "energy of a lossless group", GROUP1, 24, 8, F64_1),
    FIELD("R6", "error infinite", GROUP0, 32, 8, F64_INF),
    FIELD("R6", "error of a lossless group", GROUP1, 32, 8, F64_1),
    FIELD("R6", "error of a plane negative", PLANES0, 8, 8, F64_MINUS),
    FIELD("R6", "error of a plane of a lossless group", PLANES1, 8, 8, F64_1),
    FIELD("R6", "reserved of a plane", PLANES0, 4, 4, 1),
    PATCH("R7", "bytes behind the last record", SAMPLE_LARGE, grow_groups, SECTIONS, BAD),
    FIELD("R7", "more planes than fit", GROUP0, 8, 4, 1000),

    FIELD("P1", "first part not at 0", PARTS0, 0, 8, 64),
    FIELD("P1", "parts overlap", PARTS0, 32, 8, 64),
    FIELD("P1", "offset of an empty part", PARTS1, 0, 8, 64),
    PATCH("P1", "PAYL ends behind the last part", SAMPLE_LARGE, longer_payload, SECTIONS, BAD),
    PATCH("P1", "part ends behind PAYL", SAMPLE_LARGE, part_behind_payload, SECTIONS, BAD),
    PATCH("P1", "gap between parts", SAMPLE_LARGE, fill_part_gap, SECTIONS, BAD),
    FIELD("P2", "size of a stored part", PARTS0, 8, 8, 71),
    FIELD("P2", "size 0 of a part that holds something", PARTS0, 8, 8, 0),
    FIELD("P2", "size of a part that holds nothing", PARTS1, 8, 8, 8),
    PATCH("P2", "frames of a part that holds nothing", SAMPLE_LARGE, frames_of_nothing, SECTIONS, BAD),
    FIELD("P2", "method", PARTS0, 24, 4, 2),
    FIELD("P2", "method of an empty part", PARTS1, 24, 4, 1),
    FIELD("P2", "frames too short", PARTS1, 2 * 32 + 8, 8, 11),
    PATCH("P2", "more than frames hold", SAMPLE_LARGE, too_much_content, SECTIONS, BAD),
    PATCH("P3", "damaged part", SAMPLE_LARGE, damage_part, SECTIONS, SUM),
    OTHER("P3", "checksum of a part", PARTS0, 16, 8, 1, SECTIONS, SUM),
    FIELD("P3", "checksum of an empty part", PARTS1, 16, 8, 1),
};
enum { CASE_COUNT = sizeof cases / sizeof cases[0] };

/* Rules that the container alone cannot check: F7 needs the restored engine file, D1 to Q6 are those of what it holds
 * (test_bad_coded). */
static const char *const checked_elsewhere[] = {"F7"};

static void make_bad(xkv_ctx *ctx, const bad_case *b, image *f)
{
    sample s;
    sample_init(&s, b->tokens);
    assert_int_equal(sample_write(ctx, &s, f), XKV_OK);
    uint8_t *at = f->data + locate(f, b->where) + b->offset;
    for (size_t i = 0; i < b->size; i++)
        at[i] = (uint8_t)(b->value >> 8 * i);
    if (b->patch != NULL)
        b->patch(f);
    reseal(f, b->up_to);
}

/* --- Tests ------------------------------------------------------------------------------------------------------ */

static int create_ctx(void **state)
{
    return xkv_ctx_create(NULL, (xkv_ctx **)state) == XKV_OK ? 0 : -1;
}

static int free_ctx(void **state)
{
    int leaked = xkv_ctx_memory_used(*state) != 0;
    xkv_ctx_free(*state);
    return leaked;
}

static void good_files_are_accepted(void **state)
{
    static const uint32_t tokens[] = {SAMPLE_LARGE, SAMPLE_SMALL};
    for (int i = 0; i < 2; i++) {
        image f;
        sample s;
        sample_init(&s, tokens[i]);
        assert_int_equal(sample_write(*state, &s, &f), XKV_OK);
        assert_int_equal(sample_check(*state, f.data, f.size), XKV_OK);
    }
}

static void each_bad_file_is_refused(void **state)
{
    int failures = 0;
    for (int i = 0; i < CASE_COUNT; i++) {
        const bad_case *b = &cases[i];
        image f;
        char number[8];
        make_bad(*state, b, &f);
        xkv_status status = sample_check(*state, f.data, f.size);
        snprintf(number, sizeof number, "[%s]", b->rule);
        if (status != b->status || strstr(xkv_ctx_error(*state), number) == NULL) {
            print_error("%s %s: expected \"%s\", got \"%s\": %s\n", number, b->what, xkv_status_string(b->status),
                        xkv_status_string(status), xkv_ctx_error(*state));
            failures++;
        }
    }
    assert_int_equal(failures, 0);
}

static bool is_listed(const char *rule)
{
    for (int i = 0; i < CASE_COUNT; i++)
        if (strcmp(cases[i].rule, rule) == 0)
            return true;
    for (size_t i = 0; i < sizeof checked_elsewhere / sizeof checked_elsewhere[0]; i++)
        if (strcmp(checked_elsewhere[i], rule) == 0)
            return true;
    return false;
}

/* Every number in brackets, as in [H1] or [H7, S4], has a bad file. */
static void each_rule_of_the_specification_has_a_bad_file(void **state)
{
    (void)state;
    FILE *spec = fopen(XKV_SPEC_FILE, "r");
    int c, missing = 0, found = 0;
    assert_non_null(spec);
    while ((c = getc(spec)) != EOF) {
        char rule[8];
        if (c != '[')
            continue;
        do {
            if (fscanf(spec, " %1[A-Z]%3[0-9]", rule, rule + 1) != 2)
                break;
            found++;
            if (!is_listed(rule)) {
                print_error("rule [%s] has no bad file\n", rule);
                missing++;
            }
        } while (getc(spec) == ',');
    }
    fclose(spec);
    assert_int_equal(missing, 0);
    assert_true(found > 60);
}

static void unknown_optional_sections_are_skipped(void **state)
{
    image f;
    bad_case b = FIELD("-", "-", ENTRY_META, 0, 4, ABCD);
    make_bad(*state, &b, &f);
    assert_int_equal(sample_check(*state, f.data, f.size), XKV_OK);
}

static void each_damaged_byte_is_noticed(void **state)
{
    static const uint8_t masks[] = {0x01, 0x80, 0xff, 0x20};
    image f;
    sample s;
    sample_init(&s, SAMPLE_LARGE);
    assert_int_equal(sample_write(*state, &s, &f), XKV_OK);
    for (size_t i = 0; i < f.size; i++) {
        for (size_t k = 0; k < sizeof masks; k++) {
            f.data[i] ^= masks[k];
            if (sample_check(*state, f.data, f.size) == XKV_OK)
                fail_msg("byte %zu, mask 0x%02x", i, masks[k]);
            f.data[i] ^= masks[k];
        }
    }
}

static void each_truncation_is_noticed(void **state)
{
    image f;
    sample s;
    sample_init(&s, SAMPLE_LARGE);
    assert_int_equal(sample_write(*state, &s, &f), XKV_OK);
    for (size_t size = 0; size < f.size; size++) {
        /* A copy of that size, so that a sanitizer sees reads behind the end. */
        uint8_t *cut = malloc(size ? size : 1);
        assert_non_null(cut);
        memcpy(cut, f.data, size);
        assert_int_equal(sample_check(*state, cut, size), XKV_ERROR_TRUNCATED);
        free(cut);
    }
}

static void save(const char *folder, const char *name, const image *f)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s.xkv", folder, name);
    FILE *file = fopen(path, "wb");
    if (file == NULL || fwrite(f->data, 1, f->size, file) != f->size || fclose(file) != 0) {
        perror(path);
        exit(1);
    }
}

static int save_all(const char *folder)
{
    xkv_ctx *ctx = NULL;
    bad_case good = FIELD("good", "", HEADER, 0, 0, 0);
    image f;
    if (xkv_ctx_create(NULL, &ctx) != XKV_OK)
        return 1;
    make_bad(ctx, &good, &f);
    save(folder, "good-large", &f);
    good.tokens = SAMPLE_SMALL;
    make_bad(ctx, &good, &f);
    save(folder, "good-small", &f);
    for (int i = 0; i < CASE_COUNT; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s-%03d-status%d", cases[i].rule, i, (int)cases[i].status);
        make_bad(ctx, &cases[i], &f);
        save(folder, name, &f);
    }
    xkv_ctx_free(ctx);
    return 0;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_files_are_accepted),
        cmocka_unit_test(each_bad_file_is_refused),
        cmocka_unit_test(each_rule_of_the_specification_has_a_bad_file),
        cmocka_unit_test(unknown_optional_sections_are_skipped),
        cmocka_unit_test(each_damaged_byte_is_noticed),
        cmocka_unit_test(each_truncation_is_noticed),
    };
    return argc > 1 ? save_all(argv[1]) : cmocka_run_group_tests(tests, create_ctx, free_ctx);
}
