/* container_read.c - opening an entry: header, section table, sections, and the bytes of parts. The sections' contents
 * are parsed by container_geometry.c, container_framing.c and container_groups.c. */
#include "container_parse.h"

#include <xxhash.h>

#define HASH_BLOCK (64u * 1024u)

const uint8_t xkv_container_magic[8] = {0x89, 'X', 'K', 'V', '\r', '\n', 0x1a, '\n'};

/* --- Header ----------------------------------------------------------------------------------------------------- */

static xkv_status check_versions(xkv_cursor *cur, xkv_container *c)
{
    const uint8_t *p = cur->data;
    c->write_version = xkv_load16(p + 8);
    c->read_version = xkv_load16(p + 10);
    XKV_REQUIRE(cur, c->read_version >= 1, p + 10, "H4", "read_version is 0, expected 1");
    if (c->read_version > 1)
        return xkv_cursor_fail_as(cur, XKV_ERROR_VERSION, p + 10, "H4",
                                  "read_version is %u, this reader knows version 1", c->read_version);
    XKV_REQUIRE(cur, c->write_version >= c->read_version, p + 8, "H5",
                "write_version is %u, expected at least read_version (%u)", c->write_version, c->read_version);
    return XKV_OK;
}

static xkv_status check_file_size(xkv_cursor *cur, xkv_container *c, uint64_t found)
{
    c->file_size = xkv_load64(cur->data + 16);
    if (found == c->file_size)
        return XKV_OK;
    return xkv_cursor_fail_as(cur, found < c->file_size ? XKV_ERROR_TRUNCATED : XKV_ERROR_CORRUPT, cur->data + 16, "H3",
                              "file_size is %llu, found %llu bytes", (unsigned long long)c->file_size,
                              (unsigned long long)found);
}

static const char *kind_name(uint32_t kind)
{
    return kind == XKV_KIND_ENTRY ? "an entry" : kind == XKV_KIND_DICTIONARY ? "a dictionary" : "unknown";
}

/* Fields behind the checksum. */
static xkv_status parse_header(xkv_cursor *cur, const xkv_input *input, xkv_container *c)
{
    const uint8_t *p = cur->data;
    XKV_TRY(check_versions(cur, c));
    XKV_TRY(check_file_size(cur, c, input->size));
    uint32_t kind = xkv_load32(p + 12), features = xkv_load32(p + 24);
    if (kind != c->kind)
        return xkv_cursor_fail_as(cur, XKV_ERROR_FORMAT, p + 12, "H6", "kind is %u (%s), expected %u (%s)", kind,
                                  kind_name(kind), c->kind, kind_name(c->kind));
    if ((features & ~(uint32_t)XKV_FEATURES_KNOWN) != 0)
        return xkv_cursor_fail_as(cur, XKV_ERROR_FEATURE, p + 24, "H7",
                                  "required_features is 0x%x, this reader knows 0x%x", features, XKV_FEATURES_KNOWN);
    c->required_features = features;
    c->section_count = xkv_load32(p + 32);
    uint64_t most = xkv_min64(XKV_MAX_SECTIONS, (input->size - XKV_HEADER_SIZE) / XKV_TABLE_ENTRY_SIZE);
    XKV_REQUIRE(cur, c->section_count >= 1 && c->section_count <= most, p + 32, "S1",
                "section_count is %u, expected 1 .. %llu", c->section_count, (unsigned long long)most);
    XKV_REQUIRE(cur, xkv_load32(p + 36) == 0, p + 36, "H8", "reserved field is not 0");
    memcpy(c->content_id, p + 40, sizeof c->content_id);
    return XKV_OK;
}

static xkv_status read_header(xkv_ctx *ctx, const xkv_input *input, xkv_container *c)
{
    uint8_t bytes[XKV_HEADER_SIZE] = {0};
    xkv_cursor cur = {.ctx = ctx, .section = "header", .end_rule = "H9", .data = bytes, .size = sizeof bytes};
    size_t have = (size_t)xkv_min64(input->size, sizeof bytes);
    if (have > 0)
        XKV_TRY(input->read(input->user, ctx, 0, bytes, have));
    if (memcmp(bytes, xkv_container_magic, xkv_min64(have, sizeof xkv_container_magic)) != 0)
        return xkv_cursor_fail_as(&cur, XKV_ERROR_FORMAT, bytes, "H1", "magic does not match: not an xkv entry");
    if (have < sizeof bytes)
        return xkv_cursor_fail_as(&cur, XKV_ERROR_TRUNCATED, bytes + have, "H9",
                                  "the file ends after %zu bytes, expected at least 64", have);
    if (XXH3_64bits(bytes, 56) != xkv_load64(bytes + 56))
        return xkv_cursor_fail_as(&cur, XKV_ERROR_CHECKSUM, bytes + 56, "H2", "header_checksum does not match");
    return parse_header(&cur, input, c);
}

/* --- Section table ---------------------------------------------------------------------------------------------- */

/* The types that version 1 knows. */
typedef struct section_kind {
    uint32_t type;
    const char *name;
    bool required;                                          /* whether bit 0 of the flags must be set */
    uint64_t max_size;                                      /* [S9] */
    const char *end_rule;                                   /* the rule that the section ends with its last record */
    xkv_status (*parse)(xkv_cursor *cur, xkv_container *c); /* NULL: PAYL */
} section_kind;

/* In the order of parsing: GRPS before TOKN, so that positions, of which a file may declare 2^31 without storing any,
 * are made only when the payload is large enough for that many tokens [P2]. */
static const section_kind kinds[] = {
    {XKV_SECTION_GEOM, "GEOM", true, XKV_MAX_SECTION_SIZE, "G12", xkv_parse_geometry},
    {XKV_SECTION_GRPS, "GRPS", true, XKV_MAX_SECTION_SIZE, "R7", xkv_parse_groups},
    {XKV_SECTION_TOKN, "TOKN", true, XKV_MAX_SECTION_SIZE, "T4", xkv_parse_tokens},
    {XKV_SECTION_FRAM, "FRAM", true, UINT64_MAX, "F9", xkv_parse_framing},
    {XKV_SECTION_META, "META", false, XKV_MAX_SECTION_SIZE, "M5", xkv_parse_metadata},
    {XKV_SECTION_PAYL, "PAYL", true, UINT64_MAX, NULL, NULL},
};
enum { KIND_COUNT = sizeof kinds / sizeof kinds[0] };

static const section_kind *find_kind(uint32_t type)
{
    for (uint32_t i = 0; i < KIND_COUNT; i++)
        if (kinds[i].type == type)
            return &kinds[i];
    return NULL;
}

xkv_status xkv_parse_section(xkv_ctx *ctx, uint32_t type, const uint8_t *data, uint64_t size, uint64_t offset, bool own,
                             xkv_container *c)
{
    const section_kind *kind = find_kind(type);
    xkv_cursor cur = {.ctx = ctx,
                      .section = kind->name,
                      .end_rule = kind->end_rule,
                      .data = data,
                      .size = size,
                      .offset = offset,
                      .own = own};
    return kind->parse(&cur, c);
}

static bool is_letter(uint8_t b)
{
    return (b >= 'A' && b <= 'Z') || (b >= 'a' && b <= 'z');
}

static const xkv_section *find_section(const xkv_container *c, uint32_t type)
{
    for (uint32_t i = 0; i < c->section_count; i++)
        if (c->sections[i].type == type)
            return &c->sections[i];
    return NULL;
}

/* What one entry of the table says about itself. */
static xkv_status check_entry(const xkv_cursor *cur, const uint8_t *p, const xkv_container *c, const xkv_section *s)
{
    XKV_REQUIRE(cur, is_letter(p[0]) && is_letter(p[1]) && is_letter(p[2]) && is_letter(p[3]), p, "S3",
                "type of a section is 0x%08x, expected four ASCII letters", s->type);
    XKV_REQUIRE(cur, find_section(c, s->type) == s, p, "S3", "section %.4s occurs twice", (const char *)p);
    const section_kind *kind = find_kind(s->type);
    bool required = s->flags & XKV_FLAG_REQUIRED;
    if (required && kind == NULL)
        return xkv_cursor_fail_as(cur, XKV_ERROR_FEATURE, p, "S4",
                                  "section %.4s is required, but not known to this reader", (const char *)p);
    bool payload = s->type == XKV_SECTION_PAYL;
    XKV_REQUIRE(cur, (s->flags & ~XKV_FLAG_REQUIRED) == (payload ? XKV_FLAG_BY_PARTS : 0), p + 4, "S5",
                "flags of section %.4s are 0x%x, expected bit 1 in PAYL only, and no reserved bit", (const char *)p,
                s->flags);
    XKV_REQUIRE(cur, !payload || s->checksum == 0, p + 24, "S5", "checksum of PAYL is not 0");
    XKV_REQUIRE(cur, kind == NULL || required == kind->required, p + 4, "S8",
                "flags of section %s are 0x%x, expected bit 0 to be %d", kind->name, s->flags, kind->required);
    if (kind != NULL && s->size > kind->max_size)
        return xkv_cursor_fail_as(cur, XKV_ERROR_LIMIT, p + 16, "S9",
                                  "size of section %s is %llu, expected at most 256 MiB", kind->name,
                                  (unsigned long long)s->size);
    return XKV_OK;
}

/* *end is where the part of the file before this section ended. */
static xkv_status check_extent(const xkv_cursor *cur, const uint8_t *p, const xkv_section *s, uint64_t file_size,
                               uint64_t *end)
{
    uint64_t expected = xkv_align64(*end, XKV_ALIGN);
    XKV_REQUIRE(cur, s->offset == expected, p + 8, "S6", "offset of section %.4s is %llu, expected %llu",
                (const char *)p, (unsigned long long)s->offset, (unsigned long long)expected);
    XKV_REQUIRE(cur, expected <= file_size && s->size <= file_size - expected, p + 16, "S6",
                "section %.4s of %llu bytes at offset %llu, expected to end inside the file (%llu bytes)",
                (const char *)p, (unsigned long long)s->size, (unsigned long long)expected,
                (unsigned long long)file_size);
    *end = expected + s->size;
    return XKV_OK;
}

/* The sections that an entry cannot do without are there, in their order. */
static xkv_status check_order(const xkv_cursor *cur, const xkv_container *c)
{
    static const uint32_t order[] = {XKV_SECTION_GEOM, XKV_SECTION_TOKN, XKV_SECTION_GRPS, XKV_SECTION_PAYL};
    uint32_t next = 0;
    for (uint32_t i = 0; i < c->section_count && next < 4; i++)
        if (c->sections[i].type == order[next])
            next++;
    XKV_REQUIRE(cur, next == 4 && c->sections[c->section_count - 1].type == XKV_SECTION_PAYL, cur->data, "S8",
                "expected GEOM, TOKN, GRPS and PAYL in this order, PAYL last");
    return XKV_OK;
}

static xkv_status parse_entries(xkv_cursor *cur, xkv_container *c)
{
    const uint8_t *p = cur->data;
    uint64_t end = XKV_HEADER_SIZE + cur->size;
    for (uint32_t i = 0; i < c->section_count; i++, p += XKV_TABLE_ENTRY_SIZE) {
        xkv_section *s = &c->sections[i];
        *s = (xkv_section){.type = xkv_load32(p),
                           .flags = xkv_load32(p + 4),
                           .offset = xkv_load64(p + 8),
                           .size = xkv_load64(p + 16),
                           .checksum = xkv_load64(p + 24)};
        XKV_TRY(check_entry(cur, p, c, s));
        XKV_TRY(check_extent(cur, p, s, c->file_size, &end));
    }
    XKV_REQUIRE(cur, end == c->file_size, p - 16, "S6", "the last section ends at %llu, expected file_size (%llu)",
                (unsigned long long)end, (unsigned long long)c->file_size);
    return check_order(cur, c);
}

static xkv_status read_table(xkv_ctx *ctx, const xkv_input *input, xkv_container *c)
{
    uint8_t bytes[XKV_MAX_SECTIONS * XKV_TABLE_ENTRY_SIZE];
    size_t size = c->section_count * (size_t)XKV_TABLE_ENTRY_SIZE;
    xkv_cursor cur = {.ctx = ctx, .section = "section table", .data = bytes, .size = size, .offset = XKV_HEADER_SIZE};
    XKV_TRY(input->read(input->user, ctx, XKV_HEADER_SIZE, bytes, size));
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(bytes, size));
    if (memcmp(hash.digest, c->content_id, sizeof c->content_id) != 0)
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "header, offset 40: table_hash does not match [S2]");
    XKV_TRY(XKV_NEW_ZERO(ctx, c->section_count, &c->sections));
    return parse_entries(&cur, c);
}

/* --- Sections --------------------------------------------------------------------------------------------------- */

/* Bytes from `from` to `to`, fewer than 64, are zero. */
static xkv_status check_gap(xkv_ctx *ctx, const xkv_input *input, uint64_t from, uint64_t to, const char *rule)
{
    uint8_t bytes[XKV_ALIGN];
    size_t size = (size_t)(to - from);
    if (size > 0)
        XKV_TRY(input->read(input->user, ctx, from, bytes, size));
    if (!xkv_all_zero(bytes, size))
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "offset %llu: a gap of %zu bytes is not zero [%s]",
                        (unsigned long long)from, size, rule);
    return XKV_OK;
}

static xkv_status check_section_gaps(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c)
{
    uint64_t end = XKV_HEADER_SIZE + (uint64_t)c->section_count * XKV_TABLE_ENTRY_SIZE;
    for (uint32_t i = 0; i < c->section_count; i++) {
        XKV_TRY(check_gap(ctx, input, end, c->sections[i].offset, "S6"));
        end = c->sections[i].offset + c->sections[i].size;
    }
    return XKV_OK;
}

static xkv_status compare_checksum(xkv_ctx *ctx, const xkv_section *s, uint64_t found)
{
    if (found == s->checksum)
        return XKV_OK;
    char name[5] = {0};
    xkv_store32(name, s->type);
    return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "%s, offset %llu: checksum is %016llx, expected %016llx [S7]", name,
                    (unsigned long long)s->offset, (unsigned long long)found, (unsigned long long)s->checksum);
}

/* A section of a type that is not known is checked block by block, whatever its size. */
static xkv_status check_unknown(xkv_ctx *ctx, const xkv_input *input, const xkv_section *s)
{
    uint8_t *block = NULL;
    xkv_status status = XKV_OK;
    XXH3_state_t *state = XXH3_createState();
    if (state == NULL)
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "out of memory for a checksum");
    XKV_TRY_GOTO(XKV_NEW(ctx, HASH_BLOCK, &block), out);
    XXH3_64bits_reset(state);
    for (uint64_t done = 0; done < s->size;) {
        size_t n = (size_t)xkv_min64(s->size - done, HASH_BLOCK);
        XKV_TRY_GOTO(input->read(input->user, ctx, s->offset + done, block, n), out);
        XXH3_64bits_update(state, block, n);
        done += n;
    }
    status = compare_checksum(ctx, s, XXH3_64bits_digest(state));
out:
    xkv_release(ctx, block);
    XXH3_freeState(state);
    return status;
}

static xkv_status read_section(xkv_ctx *ctx, const xkv_input *input, const xkv_section *s, xkv_container *c)
{
    uint8_t *data = NULL;
    xkv_status status;
    XKV_TRY_GOTO(XKV_NEW(ctx, s->size, &data), out);
    XKV_TRY_GOTO(input->read(input->user, ctx, s->offset, data, s->size), out);
    XKV_TRY_GOTO(compare_checksum(ctx, s, XXH3_64bits(data, s->size)), out);
    status = xkv_parse_section(ctx, s->type, data, s->size, s->offset, false, c);
out:
    xkv_release(ctx, data);
    return status;
}

static xkv_status read_sections(xkv_ctx *ctx, const xkv_input *input, xkv_container *c)
{
    const xkv_section *payload = find_section(c, XKV_SECTION_PAYL);
    c->payload_offset = payload->offset;
    c->payload_size = payload->size;
    for (uint32_t i = 0; i < KIND_COUNT; i++) {
        const xkv_section *s = find_section(c, kinds[i].type);
        if (s != NULL && kinds[i].parse != NULL)
            XKV_TRY(read_section(ctx, input, s, c));
    }
    for (uint32_t i = 0; i < c->section_count; i++)
        if (find_kind(c->sections[i].type) == NULL)
            XKV_TRY(check_unknown(ctx, input, &c->sections[i]));
    return XKV_OK;
}

static xkv_status read_all(xkv_ctx *ctx, const xkv_input *input, xkv_container *c)
{
    XKV_TRY(read_header(ctx, input, c));
    XKV_TRY(read_table(ctx, input, c));
    XKV_TRY(check_section_gaps(ctx, input, c));
    return read_sections(ctx, input, c);
}

xkv_status xkv_container_read(xkv_ctx *ctx, const xkv_input *input, uint32_t kind, xkv_container *c)
{
    memset(c, 0, sizeof *c);
    c->kind = kind;
    xkv_status status = read_all(ctx, input, c);
    if (status != XKV_OK)
        xkv_container_free(ctx, c);
    return status;
}

/* The const members of the public structs are the container's own memory. */
static void release_const(xkv_ctx *ctx, const void *ptr)
{
    xkv_release(ctx, (void *)(uintptr_t)ptr);
}

void xkv_container_free(xkv_ctx *ctx, xkv_container *c)
{
    xkv_free_groups(ctx, c);
    for (uint32_t i = 0; i < c->value_count; i++) {
        xkv_release(ctx, c->values[i].key);
        xkv_release(ctx, c->values[i].bytes);
    }
    xkv_release(ctx, c->values);
    release_const(ctx, c->framing.segments);
    release_const(ctx, c->framing.literals);
    release_const(ctx, c->framing.rows);
    release_const(ctx, c->geometry.planes);
    release_const(ctx, c->geometry.ropes);
    release_const(ctx, c->geometry.positions);
    release_const(ctx, c->geometry.token_ids);
    xkv_release(ctx, c->sections);
    memset(c, 0, sizeof *c);
}

/* --- Payload ---------------------------------------------------------------------------------------------------- */

xkv_status xkv_container_read_part(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c, const xkv_part *p,
                                   void *dst)
{
    if (p->size == 0)
        return XKV_OK;
    unsigned long long offset = c->payload_offset + p->offset;
    XKV_TRY(input->read(input->user, ctx, offset, dst, p->size));
    uint64_t found = XXH3_64bits(dst, p->size);
    if (found != p->checksum)
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM,
                        "PAYL, offset %llu: checksum of a part of %llu bytes is %016llx, expected %016llx [P3]", offset,
                        (unsigned long long)p->size, (unsigned long long)found, (unsigned long long)p->checksum);
    return XKV_OK;
}

/* Parts lie in the order of the table [P1]; empty ones lie nowhere. */
static void prefetch_parts(const xkv_input *input, const xkv_container *c, const xkv_group *g, uint32_t first,
                           uint32_t last)
{
    while (first < last && g->parts[first].size == 0)
        first++;
    while (last > first && g->parts[last].size == 0)
        last--;
    uint64_t begin = g->parts[first].offset, end = g->parts[last].offset + g->parts[last].size;
    if (begin < end)
        input->prefetch(input->user, c->payload_offset + begin, end - begin);
}

void xkv_container_prefetch(const xkv_input *input, const xkv_container *c, const xkv_group *g, uint32_t first_chunk,
                            uint32_t chunks)
{
    if (input->prefetch == NULL)
        return;
    prefetch_parts(input, c, g, XKV_PART_COMPONENTS, XKV_PART_EXACT);
    prefetch_parts(input, c, g, XKV_PART_CHUNKS + first_chunk, XKV_PART_CHUNKS + first_chunk + chunks - 1);
}

xkv_status xkv_container_check_gaps(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c)
{
    uint64_t end = 0;
    for (uint32_t i = 0; i < c->group_count; i++) {
        for (uint32_t k = 0; k < c->groups[i].part_count; k++) {
            const xkv_part *p = &c->groups[i].parts[k];
            if (p->size == 0)
                continue;
            XKV_TRY(check_gap(ctx, input, c->payload_offset + end, c->payload_offset + p->offset, "P1"));
            end = p->offset + p->size;
        }
    }
    return XKV_OK;
}
