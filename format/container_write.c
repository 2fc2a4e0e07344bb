/* container_write.c - writing an entry: small sections first, then parts as they come, tables and header last. What was
 * encoded is read back by the reader's parsers before it is written, so that no entry leaves which the reader refuses.
 */
#include "container_parse.h"
#include "engine_file.h"

#include <xxhash.h>

enum { MAX_WRITTEN = 6 }; /* GEOM TOKN FRAM META GRPS PAYL */

typedef struct xkv_writer_state {
    xkv_section sections[MAX_WRITTEN];
    uint32_t section_count;
    xkv_section *metadata;         /* NULL: none */
    xkv_section *groups, *payload; /* the last two */
} xkv_writer_state;

/* A rule broken by the caller's data is the caller's mistake, not damage of a file. */
static xkv_status as_argument(xkv_status status)
{
    return status == XKV_ERROR_CORRUPT || status == XKV_ERROR_FEATURE ? XKV_ERROR_ARGUMENT : status;
}

static xkv_status write_bytes(xkv_ctx *ctx, const xkv_container_writer *w, uint64_t offset, const void *src,
                              uint64_t size)
{
    return size > 0 ? w->output->write(w->output->user, ctx, offset, src, (size_t)size) : XKV_OK;
}

/* --- Encoding of sections --------------------------------------------------------------------------------------- */

static xkv_status encode_counts(xkv_buffer *b, const xkv_container *c)
{
    uint8_t *p;
    const xkv_geometry *g = &c->geometry;
    XKV_TRY(xkv_buffer_grow(b, XKV_GEOM_SIZE, &p));
    xkv_store32(p, g->layer_count);
    xkv_store32(p + 4, g->plane_count);
    xkv_store32(p + 8, g->rope_count);
    xkv_store32(p + 12, g->token_count);
    xkv_store32(p + 16, c->chunk_tokens);
    xkv_store32(p + 20, c->sinks);
    xkv_store32(p + 24, c->window);
    return XKV_OK;
}

static xkv_status encode_plane(xkv_buffer *b, const xkv_plane *plane)
{
    uint8_t *p;
    if (plane->kind > UINT8_MAX || plane->dtype > UINT8_MAX)
        return xkv_fail(b->ctx, XKV_ERROR_ARGUMENT, "kind %u or dtype %u of a plane is unknown [G6]", plane->kind,
                        plane->dtype);
    XKV_TRY(xkv_buffer_grow(b, XKV_PLANE_SIZE, &p));
    xkv_store32(p, plane->layer);
    p[4] = (uint8_t)plane->kind;
    p[5] = (uint8_t)plane->dtype;
    xkv_store32(p + 8, plane->heads);
    xkv_store32(p + 12, plane->head_dim);
    xkv_store32(p + 16, plane->rope);
    return XKV_OK;
}

static xkv_status encode_rope(xkv_buffer *b, const xkv_rope *rope)
{
    uint8_t *p;
    if (rope->n_rot > 2 * XKV_MAX_ROPE_PAIRS)
        return xkv_fail(b->ctx, XKV_ERROR_ARGUMENT, "n_rot is %u, expected at most %u [G11]", rope->n_rot,
                        2 * XKV_MAX_ROPE_PAIRS);
    uint32_t pairs = rope->n_rot / 2;
    XKV_TRY(xkv_buffer_grow(b, XKV_ROPE_SIZE + 8 * (uint64_t)pairs, &p));
    xkv_store32(p, rope->n_rot);
    xkv_store32(p + 4, rope->offset);
    xkv_store32(p + 8, rope->style);
    xkv_storef64(p + 16, rope->scale);
    for (uint32_t i = 0; i < pairs; i++)
        xkv_storef64(p + XKV_ROPE_SIZE + 8 * (size_t)i, rope->inv_freq[i]);
    return XKV_OK;
}

static xkv_status encode_geometry(xkv_buffer *b, const xkv_container *c, int zstd_level)
{
    (void)zstd_level;
    XKV_TRY(encode_counts(b, c));
    for (uint32_t i = 0; i < c->geometry.plane_count; i++)
        XKV_TRY(encode_plane(b, &c->geometry.planes[i]));
    for (uint32_t i = 0; i < c->geometry.rope_count; i++)
        XKV_TRY(encode_rope(b, &c->geometry.ropes[i]));
    return XKV_OK;
}

static bool positions_are_consecutive(const xkv_geometry *g)
{
    for (uint32_t i = 1; i < g->token_count; i++)
        if ((int64_t)g->positions[i] != (int64_t)g->positions[0] + i)
            return false;
    return true;
}

static xkv_status encode_tokens(xkv_buffer *b, const xkv_container *c, int zstd_level)
{
    uint8_t *p;
    const xkv_geometry *g = &c->geometry;
    bool consecutive = positions_are_consecutive(g);
    XKV_TRY(xkv_buffer_grow(b, XKV_TOKN_SIZE, &p));
    xkv_store32(p, g->token_id_count);
    xkv_store32(p + 4, !consecutive);
    xkv_store32(p + 8, consecutive && g->token_count > 0 ? (uint32_t)g->positions[0] : 0);
    XKV_TRY(xkv_buffer_blob(b, 4, g->token_ids, g->token_id_count, zstd_level));
    return consecutive ? XKV_OK : xkv_buffer_blob(b, 4, g->positions, g->token_count, zstd_level);
}

static xkv_status encode_framing(xkv_buffer *b, const xkv_container *c, int zstd_level)
{
    uint8_t *p;
    const xkv_framing *f = &c->framing;
    XKV_TRY(xkv_buffer_grow(b, XKV_FRAM_SIZE + (uint64_t)f->segment_count * XKV_SEGMENT_SIZE, &p));
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(f->literals, (size_t)f->literal_size));
    xkv_store32(p, f->engine);
    xkv_store32(p + 4, f->segment_count);
    xkv_store64(p + 8, f->source_size);
    memcpy(p + 16, c->source_hash, 16);
    memcpy(p + 32, hash.digest, 16);
    xkv_store32(p + 48, f->rows != NULL);
    p += XKV_FRAM_SIZE;
    for (uint32_t i = 0; i < f->segment_count; i++, p += XKV_SEGMENT_SIZE) {
        xkv_store64(p, f->segments[i].size);
        xkv_store32(p + 8, f->segments[i].first_plane);
        xkv_store32(p + 12, f->segments[i].plane_count);
        xkv_store32(p + 16, f->segments[i].layout);
    }
    XKV_TRY(xkv_buffer_blob(b, 1, f->literals, f->literal_size, zstd_level));
    return f->rows ? xkv_buffer_blob(b, 4, f->rows, c->geometry.token_count, zstd_level) : XKV_OK;
}

xkv_status xkv_framing_encode(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_framing *framing,
                              const uint8_t source_hash[16], int zstd_level, uint8_t **bytes_p, size_t *size)
{
    xkv_container c = {.geometry = *geometry, .has_framing = true, .framing = *framing};
    xkv_container parsed = {.geometry = *geometry};
    xkv_buffer b = {.ctx = ctx};
    memcpy(c.source_hash, source_hash, sizeof c.source_hash);
    xkv_status status = encode_framing(&b, &c, zstd_level);
    if (status == XKV_OK)
        status = as_argument(xkv_parse_section(ctx, XKV_SECTION_FRAM, b.data, b.size, 0, true, &parsed));
    xkv_framing_release(ctx, &parsed.framing);
    if (status != XKV_OK) {
        xkv_release(ctx, b.data);
        return status;
    }
    *bytes_p = b.data;
    *size = b.size;
    return XKV_OK;
}

static xkv_status encode_value(xkv_buffer *b, const xkv_meta_value *v)
{
    uint8_t *p;
    size_t key_size = strlen(v->key);
    if (key_size > UINT16_MAX || v->type > UINT16_MAX)
        return xkv_fail(b->ctx, XKV_ERROR_ARGUMENT, "a metadata key of %zu bytes or type %u is too large [M2]",
                        key_size, v->type);
    XKV_TRY(xkv_buffer_grow(b, XKV_VALUE_SIZE + key_size + v->size, &p));
    xkv_store16(p, (uint16_t)key_size);
    xkv_store16(p + 2, (uint16_t)v->type);
    xkv_store32(p + 4, v->size);
    memcpy(p + XKV_VALUE_SIZE, v->key, key_size);
    if (v->size > 0)
        memcpy(p + XKV_VALUE_SIZE + key_size, v->bytes, v->size);
    return xkv_buffer_align(b, 8);
}

static xkv_status encode_metadata(xkv_buffer *b, const xkv_container *c, int zstd_level)
{
    uint8_t *p;
    (void)zstd_level;
    XKV_TRY(xkv_buffer_grow(b, XKV_META_SIZE, &p));
    xkv_store32(p, c->value_count);
    for (uint32_t i = 0; i < c->value_count; i++)
        XKV_TRY(encode_value(b, &c->values[i]));
    return XKV_OK;
}

/* --- Head ------------------------------------------------------------------------------------------------------- */

typedef xkv_status (*encode_fn)(xkv_buffer *b, const xkv_container *c, int zstd_level);

/* Everything begin() needs while it encodes. */
typedef struct head {
    xkv_buffer bytes;     /* of the small sections; starts at `offset` of the file */
    uint64_t offset;      /* the first multiple of 64 behind the table */
    xkv_container parsed; /* what reading back gives */
    int zstd_level;
} head;

static xkv_section *append_section(xkv_writer_state *s, uint32_t type, uint32_t flags)
{
    xkv_section *section = &s->sections[s->section_count++];
    *section = (xkv_section){.type = type, .flags = flags};
    return section;
}

static xkv_status add_section(head *h, const xkv_container *c, xkv_writer_state *s, uint32_t type, encode_fn encode)
{
    xkv_section *section = append_section(s, type, type == XKV_SECTION_META ? 0 : XKV_FLAG_REQUIRED);
    if (type == XKV_SECTION_META)
        s->metadata = section;
    size_t start = h->bytes.size;
    XKV_TRY(encode(&h->bytes, c, h->zstd_level));
    const uint8_t *data = h->bytes.data + start;
    section->offset = h->offset + start;
    section->size = h->bytes.size - start;
    section->checksum = XXH3_64bits(data, section->size);
    if (type != XKV_SECTION_FRAM && section->size > XKV_MAX_SECTION_SIZE)
        return xkv_fail(h->bytes.ctx, XKV_ERROR_LIMIT, "a section of %llu bytes, expected at most 256 MiB [S9]",
                        (unsigned long long)section->size);
    XKV_TRY(xkv_parse_section(h->bytes.ctx, type, data, section->size, section->offset, true, &h->parsed));
    return xkv_buffer_align(&h->bytes, XKV_ALIGN);
}

/* GRPS and PAYL get their places; their contents follow. */
static xkv_status lay_out_groups(xkv_ctx *ctx, const xkv_container *c, uint64_t offset, xkv_writer_state *s)
{
    uint64_t size = XKV_GRPS_SIZE;
    for (uint32_t i = 0; i < c->group_count; i++)
        size += XKV_GROUP_SIZE + (uint64_t)c->groups[i].plane_count * XKV_GROUP_PLANE_SIZE +
                (uint64_t)c->groups[i].part_count * XKV_PART_SIZE;
    if (size > XKV_MAX_SECTION_SIZE)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "GRPS of %llu bytes, expected at most 256 MiB [S9]",
                        (unsigned long long)size);
    s->groups = append_section(s, XKV_SECTION_GRPS, XKV_FLAG_REQUIRED);
    s->groups->offset = offset;
    s->groups->size = size;
    s->payload = append_section(s, XKV_SECTION_PAYL, XKV_FLAG_REQUIRED | XKV_FLAG_BY_PARTS);
    s->payload->offset = xkv_align64(offset + size, XKV_ALIGN);
    return XKV_OK;
}

static xkv_status encode_head(head *h, const xkv_container *c, xkv_writer_state *s)
{
    uint64_t count = 4u + c->has_framing + (c->value_count > 0);
    h->offset = xkv_align64(XKV_HEADER_SIZE + count * XKV_TABLE_ENTRY_SIZE, XKV_ALIGN);
    XKV_TRY(add_section(h, c, s, XKV_SECTION_GEOM, encode_geometry));
    XKV_TRY(add_section(h, c, s, XKV_SECTION_TOKN, encode_tokens));
    if (c->has_framing)
        XKV_TRY(add_section(h, c, s, XKV_SECTION_FRAM, encode_framing));
    if (c->value_count > 0)
        XKV_TRY(add_section(h, c, s, XKV_SECTION_META, encode_metadata));
    return lay_out_groups(h->bytes.ctx, c, h->offset + h->bytes.size, s);
}

xkv_status xkv_container_begin(xkv_ctx *ctx, xkv_container *c, const xkv_output *output, int zstd_level,
                               xkv_container_writer *w)
{
    head h = {.bytes = {.ctx = ctx}, .zstd_level = zstd_level};
    xkv_status status;
    memset(w, 0, sizeof *w);
    if (c->kind == 0)
        c->kind = XKV_KIND_ENTRY;
    c->required_features = xkv_geometry_features(&c->geometry);
    h.parsed.kind = c->kind;
    h.parsed.required_features = c->required_features;
    w->c = c;
    w->output = output;
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, 1, &w->state), out);
    XKV_TRY_GOTO(as_argument(encode_head(&h, c, w->state)), out);
    XKV_TRY_GOTO(write_bytes(ctx, w, h.offset, h.bytes.data, h.bytes.size), out);
    c->chunk_count = h.parsed.chunk_count;
    c->payload_offset = w->state->payload->offset;
out:
    xkv_release(ctx, h.bytes.data);
    xkv_container_free(ctx, &h.parsed);
    if (status != XKV_OK)
        xkv_container_writer_free(ctx, w);
    return status;
}

uint64_t xkv_container_head_size(const xkv_container_writer *w)
{
    return w->state->payload->offset;
}

/* --- Payload ---------------------------------------------------------------------------------------------------- */

xkv_status xkv_container_add_part(xkv_ctx *ctx, xkv_container_writer *w, xkv_part *part, const void *data,
                                  uint64_t size, uint32_t method)
{
    static const uint8_t zeros[XKV_ALIGN] = {0};
    memset(part, 0, sizeof *part);
    if (size == 0)
        return XKV_OK;
    uint64_t start = w->state->payload->offset, offset = xkv_align64(w->payload_end, XKV_ALIGN);
    XKV_TRY(write_bytes(ctx, w, start + w->payload_end, zeros, offset - w->payload_end));
    XKV_TRY(write_bytes(ctx, w, start + offset, data, size));
    *part = (xkv_part){.offset = offset, .size = size, .checksum = XXH3_64bits(data, size), .method = method};
    w->payload_end = offset + size;
    return XKV_OK;
}

/* --- Tables and header ------------------------------------------------------------------------------------------ */

static uint8_t *encode_group(const xkv_group *g, uint8_t *p)
{
    xkv_store32(p, g->codec);
    xkv_store32(p + 4, g->reason);
    xkv_store32(p + 8, g->plane_count);
    xkv_store32(p + 12, g->rank);
    xkv_store32(p + 16, g->part_count);
    xkv_storef64(p + 24, g->energy);
    xkv_storef64(p + 32, g->error);
    p += XKV_GROUP_SIZE;
    for (uint32_t i = 0; i < g->plane_count; i++, p += XKV_GROUP_PLANE_SIZE) {
        xkv_store32(p, g->planes[i]);
        xkv_storef64(p + 8, g->plane_errors[i]);
    }
    for (uint32_t i = 0; i < g->part_count; i++, p += XKV_PART_SIZE) {
        xkv_store64(p, g->parts[i].offset);
        xkv_store64(p + 8, g->parts[i].size);
        xkv_store64(p + 16, g->parts[i].checksum);
        xkv_store32(p + 24, g->parts[i].method);
    }
    return p;
}

/* Read GRPS back, with the geometry lent by the caller's container. */
static xkv_status check_groups(xkv_ctx *ctx, const xkv_container_writer *w, const uint8_t *data)
{
    const xkv_section *s = w->state->groups;
    xkv_container lent = {.kind = w->c->kind,
                          .geometry = w->c->geometry,
                          .chunk_tokens = w->c->chunk_tokens,
                          .chunk_count = w->c->chunk_count,
                          .sinks = w->c->sinks,
                          .window = w->c->window,
                          .payload_size = w->payload_end};
    xkv_status status = xkv_parse_section(ctx, XKV_SECTION_GRPS, data, s->size, s->offset, true, &lent);
    xkv_free_groups(ctx, &lent);
    return as_argument(status);
}

static xkv_status write_groups(xkv_ctx *ctx, xkv_container_writer *w)
{
    uint8_t *data = NULL;
    xkv_status status;
    xkv_section *s = w->state->groups;
    size_t padded = (size_t)(w->state->payload->offset - s->offset);
    XKV_TRY(XKV_NEW_ZERO(ctx, padded, &data));
    xkv_store32(data, w->c->group_count);
    uint8_t *p = data + XKV_GRPS_SIZE;
    for (uint32_t i = 0; i < w->c->group_count; i++)
        p = encode_group(&w->c->groups[i], p);
    s->checksum = XXH3_64bits(data, s->size);
    XKV_TRY_GOTO(check_groups(ctx, w, data), out);
    status = write_bytes(ctx, w, s->offset, data, padded);
out:
    xkv_release(ctx, data);
    return status;
}

static void encode_table(const xkv_writer_state *s, uint8_t *p)
{
    for (uint32_t i = 0; i < s->section_count; i++, p += XKV_TABLE_ENTRY_SIZE) {
        xkv_store32(p, s->sections[i].type);
        xkv_store32(p + 4, s->sections[i].flags);
        xkv_store64(p + 8, s->sections[i].offset);
        xkv_store64(p + 16, s->sections[i].size);
        xkv_store64(p + 24, s->sections[i].checksum);
    }
}

static void encode_header(const xkv_writer_state *s, const xkv_container *c, uint8_t *p)
{
    memcpy(p, xkv_container_magic, sizeof xkv_container_magic);
    xkv_store16(p + 8, (uint16_t)c->write_version);
    xkv_store16(p + 10, (uint16_t)c->read_version);
    xkv_store32(p + 12, c->kind);
    xkv_store64(p + 16, c->file_size);
    xkv_store32(p + 24, c->required_features);
    xkv_store32(p + 32, s->section_count);
    memcpy(p + 40, c->content_id, sizeof c->content_id);
    xkv_store64(p + 56, XXH3_64bits(p, 56));
}

/* The header is the last write: a file without it is no entry. */
static xkv_status write_table_and_header(xkv_ctx *ctx, xkv_container_writer *w)
{
    enum { MAX_SIZE = XKV_HEADER_SIZE + (MAX_WRITTEN + 1) * XKV_TABLE_ENTRY_SIZE };
    uint8_t bytes[MAX_SIZE] = {0}, *table = bytes + XKV_HEADER_SIZE;
    const xkv_writer_state *s = w->state;
    xkv_container *c = w->c;
    c->write_version = c->read_version = 1;
    c->file_size = s->payload->offset + w->payload_end;
    c->payload_size = w->payload_end;
    encode_table(s, table);
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(table, s->section_count * (size_t)XKV_TABLE_ENTRY_SIZE));
    memcpy(c->content_id, hash.digest, sizeof c->content_id);
    encode_header(s, c, bytes);
    XKV_TRY(write_bytes(ctx, w, XKV_HEADER_SIZE, table, s->sections[0].offset - XKV_HEADER_SIZE));
    return write_bytes(ctx, w, 0, bytes, XKV_HEADER_SIZE);
}

/* Values of a fixed size may have changed since begin(): a measured error, say. */
static xkv_status rewrite_metadata(xkv_ctx *ctx, const xkv_container_writer *w)
{
    xkv_buffer b = {.ctx = ctx};
    xkv_section *s = w->state->metadata;
    xkv_status status = XKV_OK;
    if (s == NULL)
        return XKV_OK;
    XKV_TRY_GOTO(encode_metadata(&b, w->c, 0), out);
    if (b.size != s->size) {
        status = xkv_fail(ctx, XKV_ERROR_INTERNAL, "the metadata changed its size while packing");
        goto out;
    }
    s->checksum = XXH3_64bits(b.data, b.size);
    status = write_bytes(ctx, w, s->offset, b.data, b.size);
out:
    xkv_release(ctx, b.data);
    return status;
}

xkv_status xkv_container_finish(xkv_ctx *ctx, xkv_container_writer *w, uint64_t *file_size)
{
    xkv_status status;
    w->state->payload->size = w->payload_end;
    XKV_TRY_GOTO(rewrite_metadata(ctx, w), out);
    XKV_TRY_GOTO(write_groups(ctx, w), out);
    XKV_TRY_GOTO(write_table_and_header(ctx, w), out);
    *file_size = w->c->file_size;
out:
    xkv_container_writer_free(ctx, w);
    return status;
}

void xkv_container_writer_free(xkv_ctx *ctx, xkv_container_writer *w)
{
    xkv_release(ctx, w->state);
    w->state = NULL;
}
