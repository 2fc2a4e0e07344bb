/* container_framing.c - sections FRAM and META: spec/container.md, sections 8 and 9. */
#include "container_parse.h"
#include "engine_file.h"

#include <xxhash.h>

/* --- FRAM ------------------------------------------------------------------------------------------------------- */

/* What a walk over the segments adds up. */
typedef struct segment_sums {
    uint64_t all, literal;
    uint8_t *seen; /* [plane_count] 1 when a segment holds the plane */
} segment_sums;

/* Mark the planes of a segment and add up the bytes of their rows. */
static xkv_status claim_planes(const xkv_cursor *cur, const uint8_t *p, const xkv_geometry *g, const xkv_segment *s,
                               uint8_t *seen, uint64_t *row_size)
{
    *row_size = 0;
    for (uint32_t i = s->first_plane; i < s->first_plane + s->plane_count; i++) {
        XKV_REQUIRE(cur, !seen[i], p + 8, "F8", "plane %u belongs to two segments, expected one", i);
        seen[i] = 1;
        const xkv_plane *plane = &g->planes[i];
        *row_size += xkv_dtype_bytes(plane->dtype, (uint64_t)plane->heads * plane->head_dim);
    }
    return XKV_OK;
}

static xkv_status check_tensor(const xkv_cursor *cur, const uint8_t *p, const xkv_geometry *g, const xkv_segment *s,
                               segment_sums *sums)
{
    uint64_t row_size, size;
    XKV_REQUIRE(cur, (uint64_t)s->first_plane + s->plane_count <= g->plane_count, p + 8, "F2",
                "first_plane is %u and plane_count %u, expected together at most %u", s->first_plane, s->plane_count,
                g->plane_count);
    XKV_REQUIRE(cur, s->layout <= XKV_LAYOUT_REVERSED, p + 16, "F2", "layout is %u, expected 0 .. 3", s->layout);
    XKV_REQUIRE(cur, s->plane_count == 1 || (s->layout != XKV_LAYOUT_DIM_MAJOR && s->layout != XKV_LAYOUT_HEAD_MAJOR),
                p + 16, "F2", "layout is %u with %u planes, expected one plane", s->layout, s->plane_count);
    XKV_TRY(claim_planes(cur, p, g, s, sums->seen, &row_size));
    XKV_REQUIRE(cur, xkv_layout_fits(s->layout, &g->planes[s->first_plane]), p + 16, "F10",
                "layout is %u, which splits the blocks of plane %u", s->layout, s->first_plane);
    XKV_REQUIRE(cur, xkv_mul64(row_size, g->token_count, &size) && s->size == size, p, "F2",
                "size of a tensor segment is %llu, expected %u rows of %llu bytes", (unsigned long long)s->size,
                g->token_count, (unsigned long long)row_size);
    return XKV_OK;
}

static xkv_status parse_segment(const xkv_cursor *cur, const uint8_t *p, const xkv_geometry *g, segment_sums *sums,
                                xkv_segment *s)
{
    *s = (xkv_segment){.size = xkv_load64(p),
                       .first_plane = xkv_load32(p + 8),
                       .plane_count = xkv_load32(p + 12),
                       .layout = xkv_load32(p + 16)};
    XKV_REQUIRE(cur, s->size > 0, p, "F2", "size of a segment is 0, expected more");
    XKV_REQUIRE(cur, xkv_load32(p + 20) == 0, p + 20, "F2", "reserved field is not 0");
    XKV_REQUIRE(cur, xkv_add64(sums->all, s->size, &sums->all), p, "F2", "sizes of the segments pass 2^64");
    if (s->plane_count > 0)
        return check_tensor(cur, p, g, s, sums);
    XKV_REQUIRE(cur, s->first_plane == 0 && s->layout == 0, p + 8, "F2",
                "first_plane is %u and layout %u in a literal segment, expected 0", s->first_plane, s->layout);
    sums->literal += s->size;
    return XKV_OK;
}

static xkv_status parse_segments(xkv_cursor *cur, const xkv_geometry *g, xkv_framing *f)
{
    const uint8_t *p;
    xkv_segment *segments = NULL;
    segment_sums sums = {0};
    XKV_TRY(xkv_cursor_take(cur, (uint64_t)f->segment_count * XKV_SEGMENT_SIZE, &p));
    XKV_TRY(XKV_NEW(cur->ctx, f->segment_count, &segments));
    f->segments = segments;

    XKV_TRY(XKV_NEW_ZERO(cur->ctx, g->plane_count, &sums.seen));
    xkv_status status = XKV_OK;
    for (uint32_t i = 0; i < f->segment_count && status == XKV_OK; i++, p += XKV_SEGMENT_SIZE)
        status = parse_segment(cur, p, g, &sums, &segments[i]);
    for (uint32_t i = 0; i < g->plane_count && status == XKV_OK; i++)
        if (!sums.seen[i])
            status = xkv_cursor_fail(cur, cur->data + 4, "F8", "plane %u belongs to no segment, expected one", i);
    xkv_release(cur->ctx, sums.seen);
    XKV_TRY(status);

    XKV_REQUIRE(cur, f->source_size == sums.all, cur->data + 8, "F2",
                "source_size is %llu, expected the sum of the segments, %llu", (unsigned long long)f->source_size,
                (unsigned long long)sums.all);
    f->literal_size = sums.literal;
    return XKV_OK;
}

static xkv_status parse_literals(xkv_cursor *cur, xkv_framing *f)
{
    void *literals = NULL;
    XKV_TRY(xkv_blob_take(cur, 1, f->literal_size, "F4", "literals", cur->own ? NULL : &literals));
    f->literals = literals;
    if (cur->own)
        return XKV_OK;
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(literals, (size_t)f->literal_size));
    if (memcmp(hash.digest, cur->data + 32, 16) != 0)
        return xkv_cursor_fail_as(cur, XKV_ERROR_CHECKSUM, cur->data + 32, "F6",
                                  "literal_hash does not match the literals");
    return XKV_OK;
}

static xkv_status check_permutation(const xkv_cursor *cur, const uint8_t *at, const uint32_t *rows, uint32_t count)
{
    uint8_t *seen = NULL;
    xkv_status status = XKV_OK;
    XKV_TRY(XKV_NEW_ZERO(cur->ctx, count, &seen));
    for (uint32_t i = 0; i < count && status == XKV_OK; i++) {
        if (rows[i] >= count || seen[rows[i]])
            status = xkv_cursor_fail(cur, at, "F5", "row of token %u is %u, expected each of 0 .. %u once", i, rows[i],
                                     count - 1);
        else
            seen[rows[i]] = 1;
    }
    xkv_release(cur->ctx, seen);
    return status;
}

static xkv_status parse_rows(xkv_cursor *cur, uint32_t token_count, xkv_framing *f)
{
    void *rows = NULL;
    const uint8_t *at = cur->data + cur->pos;
    XKV_TRY(xkv_blob_take(cur, 4, 4 * (uint64_t)token_count, "F5", "rows", &rows));
    f->rows = rows;
    return check_permutation(cur, at, rows, token_count);
}

xkv_status xkv_parse_framing(xkv_cursor *cur, xkv_container *c)
{
    const uint8_t *p;
    xkv_framing *f = &c->framing;
    XKV_TRY(xkv_cursor_take(cur, XKV_FRAM_SIZE, &p));
    f->engine = xkv_load32(p);
    f->segment_count = xkv_load32(p + 4);
    f->source_size = xkv_load64(p + 8);
    memcpy(c->source_hash, p + 16, sizeof c->source_hash);
    uint32_t row_mode = xkv_load32(p + 48);
    XKV_REQUIRE(cur, f->segment_count >= 1 && f->segment_count <= XKV_MAX_SEGMENTS, p + 4, "F1",
                "segment_count is %u, expected 1 .. %u", f->segment_count, XKV_MAX_SEGMENTS);
    XKV_REQUIRE(cur, row_mode <= 1, p + 48, "F3", "row_mode is %u, expected 0 or 1", row_mode);
    XKV_REQUIRE(cur, xkv_load32(p + 52) == 0, p + 52, "F3", "reserved field is not 0");

    XKV_TRY(parse_segments(cur, &c->geometry, f));
    XKV_TRY(parse_literals(cur, f));
    if (row_mode == 1)
        XKV_TRY(parse_rows(cur, c->geometry.token_count, f));
    c->has_framing = true;
    return xkv_cursor_end(cur);
}

xkv_status xkv_framing_decode(xkv_ctx *ctx, const xkv_geometry *geometry, const uint8_t *bytes, size_t size,
                              xkv_framing *framing, uint8_t source_hash[16])
{
    xkv_container c = {.geometry = *geometry};
    xkv_status status = xkv_parse_section(ctx, XKV_SECTION_FRAM, bytes, size, 0, false, &c);
    if (status != XKV_OK) {
        xkv_framing_release(ctx, &c.framing);
        return status;
    }
    *framing = c.framing;
    memcpy(source_hash, c.source_hash, sizeof c.source_hash);
    return XKV_OK;
}

/* --- META ------------------------------------------------------------------------------------------------------- */

/* Bytes of the UTF-8 sequence at the start of s, or 0 when it is none (RFC 3629, section 4). */
static size_t utf8_sequence(const uint8_t *s, size_t left)
{
    uint8_t b = s[0];
    if (b >= 0x01 && b <= 0x7f)
        return 1;
    size_t n = b >= 0xc2 && b <= 0xdf ? 2 : b >= 0xe0 && b <= 0xef ? 3 : b >= 0xf0 && b <= 0xf4 ? 4 : 0;
    if (n == 0 || n > left)
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    bool overlong = (b == 0xe0 && s[1] < 0xa0) || (b == 0xf0 && s[1] < 0x90);
    bool surrogate = b == 0xed && s[1] > 0x9f;
    bool too_high = b == 0xf4 && s[1] > 0x8f;
    return overlong || surrogate || too_high ? 0 : n;
}

size_t xkv_utf8_prefix(const void *text, size_t size)
{
    const uint8_t *s = text;
    size_t pos = 0;
    while (pos < size) {
        size_t n = utf8_sequence(s + pos, size - pos);
        if (n == 0)
            break;
        pos += n;
    }
    return pos;
}

static bool is_key_byte(uint8_t b)
{
    return (b >= 'a' && b <= 'z') || (b >= '0' && b <= '9') || b == '.' || b == '_';
}

static xkv_status parse_key(const xkv_cursor *cur, const uint8_t *bytes, size_t size, const char *previous,
                            char **key_p)
{
    char *key = NULL;
    for (size_t i = 0; i < size; i++)
        XKV_REQUIRE(cur, is_key_byte(bytes[i]), bytes + i, "M3", "byte 0x%02x in a key, expected a-z, 0-9, . or _",
                    bytes[i]);
    XKV_TRY(XKV_NEW(cur->ctx, size + 1, &key));
    memcpy(key, bytes, size);
    key[size] = '\0';
    *key_p = key;
    XKV_REQUIRE(cur, previous == NULL || strcmp(previous, key) < 0, bytes, "M3",
                "key \"%s\" after \"%s\", expected ascending order", key, previous);
    return XKV_OK;
}

static xkv_status parse_value_bytes(const xkv_cursor *cur, const uint8_t *bytes, xkv_meta_value *v)
{
    XKV_REQUIRE(cur, v->type != 1 || xkv_utf8_prefix(bytes, v->size) == v->size, bytes, "M6",
                "value of \"%s\" is not valid UTF-8", v->key);
    XKV_TRY(XKV_NEW(cur->ctx, (size_t)v->size + 1, &v->bytes));
    memcpy(v->bytes, bytes, v->size);
    v->bytes[v->size] = 0;
    return XKV_OK;
}

static xkv_status parse_value(xkv_cursor *cur, const char *previous, xkv_meta_value *v)
{
    const uint8_t *p, *bytes;
    XKV_TRY(xkv_cursor_take(cur, XKV_VALUE_SIZE, &p));
    uint32_t key_size = xkv_load16(p);
    v->type = xkv_load16(p + 2);
    v->size = xkv_load32(p + 4);
    XKV_REQUIRE(cur, key_size >= 1 && key_size <= 255, p, "M2", "key_size is %u, expected 1 .. 255", key_size);
    XKV_REQUIRE(cur, v->type >= 1 && v->type <= 4, p + 2, "M2", "type is %u, expected 1 .. 4", v->type);
    bool number = v->type == 2 || v->type == 3;
    XKV_REQUIRE(cur, number ? v->size == 8 : v->size <= XKV_MAX_VALUE_SIZE, p + 4, "M2",
                "value_size is %u with type %u, expected 8 for numbers, else at most 2^20", v->size, v->type);

    uint64_t used = key_size + v->size, padding = xkv_align64(used, 8) - used;
    XKV_TRY(xkv_cursor_take(cur, used + padding, &bytes));
    XKV_REQUIRE(cur, xkv_all_zero(bytes + used, padding), bytes + used, "M4", "padding of a value is not zero");
    XKV_TRY(parse_key(cur, bytes, key_size, previous, &v->key));
    return parse_value_bytes(cur, bytes + key_size, v);
}

xkv_status xkv_parse_metadata(xkv_cursor *cur, xkv_container *c)
{
    const uint8_t *p;
    XKV_TRY(xkv_cursor_take(cur, XKV_META_SIZE, &p));
    uint32_t count = xkv_load32(p);
    XKV_REQUIRE(cur, count <= XKV_MAX_VALUES, p, "M1", "count is %u, expected at most %u", count, XKV_MAX_VALUES);
    XKV_REQUIRE(cur, xkv_load32(p + 4) == 0, p + 4, "M1", "reserved field is not 0");
    XKV_TRY(XKV_NEW_ZERO(cur->ctx, count, &c->values));
    c->value_count = count;
    for (uint32_t i = 0; i < count; i++)
        XKV_TRY(parse_value(cur, i > 0 ? c->values[i - 1].key : NULL, &c->values[i]));
    return xkv_cursor_end(cur);
}
