/* container_groups.c - section GRPS and the extents of the parts: spec/container.md, section 10. */
#include "container_parse.h"

#include <math.h>

/* Tokens of [first, end) that lie in chunk `chunk`. */
static uint64_t tokens_in_chunk(const xkv_container *c, uint32_t chunk, uint64_t first, uint64_t end)
{
    uint64_t from = xkv_max64(first, (uint64_t)chunk * c->chunk_tokens);
    uint64_t to = xkv_min64(end, ((uint64_t)chunk + 1) * c->chunk_tokens);
    return to > from ? to - from : 0;
}

/* Side parts and basis headers, in bytes (spec/dictionary.md, sections 1 and 3). */
static uint64_t dict_side(const xkv_group *g)
{
    return 8 + (uint64_t)g->rank;
}

static uint64_t scalar_side(const xkv_group *g)
{
    return 8 + 4 * (uint64_t)g->plane_count + 3 * (uint64_t)g->width;
}

xkv_basis_header xkv_basis_layout(const xkv_geometry *geometry, const xkv_group *g)
{
    xkv_basis_header h = {.mu = 0, .sigma = 4ull * g->width};

    h.d = h.sigma + 4ull * g->rank;
    h.tables = h.d + 4ull * g->rank;
    h.blocks = h.size = h.tables + g->rank;
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[g->planes[i]];
        h.size += p->heads * (4 + 2ull * p->head_dim * p->head_dim);
    }
    return h;
}

xkv_cross_header xkv_cross_layout(uint32_t group_count, const xkv_group *g)
{
    xkv_cross_header h = {.counts = 0, .sigma = 4ull * (group_count - 1)};

    h.d = h.sigma + 4ull * g->rank;
    h.tables = h.d + 4ull * g->rank;
    h.size = h.tables + g->rank;
    return h;
}

xkv_svdq_layout xkv_svdq_side(const xkv_group *g)
{
    xkv_svdq_layout at = {.scales = 8, .mean_step = 8 + 4ull * g->plane_count};

    at.exponents = at.mean_step + 4;
    at.tables = at.exponents + g->rank;
    at.component_tables = at.tables + g->rank;
    at.stream = at.component_tables + g->rank + 1;
    return at;
}

/* What the group's rows or coefficients are made from: components of an svd group, side part of a coded one. */
static xkv_shape basis_shape(const xkv_container *c, const xkv_group *g)
{
    switch (g->codec) {
    case XKV_GROUP_SVD: /* f16 components, then an f32 scale each */
        return (xkv_shape){1, (uint64_t)g->rank * (g->width + 2u), 2, false};
    case XKV_GROUP_DICT:
    case XKV_GROUP_CROSS:
        return (xkv_shape){1, dict_side(g), 1, false};
    case XKV_GROUP_SCALAR:
        return (xkv_shape){1, scalar_side(g), 1, false};
    case XKV_GROUP_SVDQ: /* the mean is one more row */
        return (xkv_shape){g->rank + 1u, g->width, 2, true};
    case XKV_GROUP_BASIS:
        return (xkv_shape){1, xkv_basis_layout(&c->geometry, g).size, 1, false};
    case XKV_GROUP_CROSS_BASIS:
        return (xkv_shape){1, xkv_cross_layout(c->group_count, g).size, 1, false};
    default:
        return (xkv_shape){0, 0, 1, false};
    }
}

static bool is_basis(const xkv_group *g)
{
    return g->codec == XKV_GROUP_BASIS || g->codec == XKV_GROUP_CROSS_BASIS;
}

/* No product here can overflow: a row has at most 2^20 bytes, a rank is at most 2^18, tokens are less than 2^31. */
xkv_shape xkv_part_shape(const xkv_container *c, const xkv_group *g, uint32_t part)
{
    uint64_t tokens = c->geometry.token_count, coded_end = tokens - c->window;
    uint32_t elem = xkv_group_element_size(&c->geometry, g);
    uint64_t row = xkv_group_row_bytes(&c->geometry, g, 1) / elem;
    bool lossless = g->codec == XKV_GROUP_LOSSLESS;
    if (part == XKV_PART_COMPONENTS)
        return basis_shape(c, g);
    if (part == XKV_PART_EXACT && is_basis(g)) /* a dictionary's components */
        return (xkv_shape){g->rank, g->width, 2, true};
    if (part == XKV_PART_EXACT)
        return (xkv_shape){lossless ? 0 : (uint64_t)c->sinks + c->window, row, elem, false};
    if (lossless)
        return (xkv_shape){tokens_in_chunk(c, part - XKV_PART_CHUNKS, 0, tokens), row, elem, false};
    return (xkv_shape){tokens_in_chunk(c, part - XKV_PART_CHUNKS, c->sinks, coded_end), g->rank, 2,
                       g->codec != XKV_GROUP_SVD};
}

/* --- Groups ----------------------------------------------------------------------------------------------------- */

/* Coded with an error that the record states. */
static bool is_lossy(const xkv_group *g)
{
    return g->codec != XKV_GROUP_LOSSLESS && !is_basis(g) && !xkv_group_is_cross(g);
}

static bool is_known(const xkv_container *c, const xkv_group *g)
{
    if (c->kind == XKV_KIND_DICTIONARY)
        return is_basis(g);
    return g->codec <= XKV_GROUP_SVDQ || g->codec == XKV_GROUP_CROSS;
}

static xkv_status check_group(const xkv_cursor *cur, const uint8_t *p, const xkv_container *c, const xkv_group *g)
{
    bool lossy = is_lossy(g), cross = xkv_group_is_cross(g);
    if (!is_known(c, g))
        return xkv_cursor_fail_as(cur, XKV_ERROR_FEATURE, p, "R2", "codec is %u, which this reader does not know",
                                  g->codec);
    bool lossless = g->codec == XKV_GROUP_LOSSLESS;
    XKV_REQUIRE(cur, g->reason <= (lossless ? 5 : 0), p + 4, "R2", "reason is %u, expected %s", g->reason,
                lossless ? "0 .. 5" : "0 but in a lossless group");
    XKV_REQUIRE(cur, cross == (g->plane_count == 0), p + 8, "R3", "plane_count is %u, expected %s", g->plane_count,
                cross ? "0 in a cross stage" : "at least 1");
    XKV_REQUIRE(cur, g->part_count == c->chunk_count + 2, p + 16, "R5",
                "part_count is %u, expected 2 + %u, the number of chunks", g->part_count, c->chunk_count);
    XKV_REQUIRE(cur, xkv_load32(p + 20) == 0, p + 20, "R1", "reserved field is not 0");
    XKV_REQUIRE(cur, isfinite(g->energy) && g->energy >= 0 && (lossy || g->energy == 0), p + 24, "R6",
                "energy is %g, expected finite and >= 0, and 0 unless the group is lossy", g->energy);
    XKV_REQUIRE(cur, isfinite(g->error) && g->error >= 0 && (lossy || g->error == 0), p + 32, "R6",
                "error is %g, expected finite and >= 0, and 0 unless the group is lossy", g->error);
    XKV_REQUIRE(cur, xkv_load64(p + 40) == 0, p + 40, "R1", "reserved field is not 0");
    return XKV_OK;
}

static xkv_status parse_group_planes(xkv_cursor *cur, const xkv_geometry *geometry, uint8_t *seen, xkv_group *g)
{
    const uint8_t *p;
    XKV_TRY(xkv_cursor_take(cur, (uint64_t)g->plane_count * XKV_GROUP_PLANE_SIZE, &p));
    XKV_TRY(XKV_NEW(cur->ctx, g->plane_count, &g->planes));
    XKV_TRY(XKV_NEW(cur->ctx, g->plane_count, &g->plane_errors));
    for (uint32_t i = 0; i < g->plane_count; i++, p += XKV_GROUP_PLANE_SIZE) {
        uint32_t plane = g->planes[i] = xkv_load32(p);
        double error = g->plane_errors[i] = xkv_loadf64(p + 8);
        XKV_REQUIRE(cur, plane < geometry->plane_count, p, "R3", "plane is %u, expected less than %u", plane,
                    geometry->plane_count);
        XKV_REQUIRE(
            cur, i == 0 || g->planes[i - 1]<plane, p, "R3", "plane %u after %u, expected ascending order", plane, i> 0
                     ? g->planes[i - 1]
                     : 0);
        XKV_REQUIRE(cur, !seen[plane], p, "R3", "plane %u belongs to two groups, expected one", plane);
        XKV_REQUIRE(cur, xkv_load32(p + 4) == 0, p + 4, "R6", "reserved field is not 0");
        XKV_REQUIRE(cur, isfinite(error) && error >= 0 && (is_lossy(g) || error == 0), p + 8, "R6",
                    "error of plane %u is %g, expected finite and >= 0, and 0 unless the group is lossy", plane, error);
        XKV_REQUIRE(cur, geometry->planes[plane].dtype == geometry->planes[g->planes[0]].dtype, p, "D1",
                    "plane %u has another dtype than plane %u, expected one dtype in a group", plane, g->planes[0]);
        XKV_REQUIRE(cur, g->codec == XKV_GROUP_LOSSLESS || geometry->planes[plane].kind != XKV_PLANE_K_ROPE, p, "D1",
                    "plane %u has kind K-rope, expected K, V or latent in a group that is not lossless", plane);
        seen[plane] = 1;
        g->width += geometry->planes[plane].heads * geometry->planes[plane].head_dim;
        XKV_REQUIRE(cur, g->width <= XKV_MAX_WIDTH, p, "R4", "width of the group is at least %u, expected at most %u",
                    g->width, XKV_MAX_WIDTH);
    }
    return XKV_OK;
}

static xkv_status check_rank(const xkv_cursor *cur, const uint8_t *p, const xkv_group *g)
{
    bool lossless = g->codec == XKV_GROUP_LOSSLESS;
    uint32_t most = xkv_group_is_cross(g) ? XKV_MAX_WIDTH : g->width; /* a cross stage's width is in the dictionary */
    XKV_REQUIRE(cur, lossless ? g->rank == 0 : g->rank >= 1 && g->rank <= most, p + 12, "R4",
                "rank is %u, expected %s (%u)", g->rank, lossless ? "0 in a lossless group" : "1 .. width of the group",
                most);
    XKV_REQUIRE(cur, g->codec != XKV_GROUP_SCALAR || g->rank == g->width, p + 12, "Q1",
                "rank is %u, expected the width (%u) in a scalar group", g->rank, g->width);
    return XKV_OK;
}

/* --- Parts ------------------------------------------------------------------------------------------------------ */

static xkv_status check_part_size(const xkv_cursor *cur, const uint8_t *p, const xkv_container *c, const xkv_group *g,
                                  uint32_t index)
{
    const xkv_part *part = &g->parts[index];
    xkv_shape shape = xkv_part_shape(c, g, index);
    uint64_t decoded = xkv_shape_bytes(shape), least = 4 + 4 * (uint64_t)shape.elem;
    uint32_t most = part->size == 0 ? XKV_METHOD_STORED : XKV_METHOD_ZSTD;
    bool side = g->codec == XKV_GROUP_SVDQ && index == XKV_PART_COMPONENTS; /* tables, then a stream */
    if (shape.coded && !side && part->size == 0) /* right when no component is coded, which the side part tells [E2] */
        decoded = 0;
    if (shape.coded && part->size > 0) /* a cross basis does not tell its width here */
        decoded = xkv_max64(decoded, 1);
    XKV_REQUIRE(cur, (part->size == 0) == (decoded == 0), p + 8, "P2",
                "size of part %u is %llu, expected 0 exactly when it holds nothing (%llu bytes decoded)", index,
                (unsigned long long)part->size, (unsigned long long)decoded);
    if (shape.coded && part->size > 0) {
        bool by_row = !is_basis(g) && index >= XKV_PART_CHUNKS; /* lanes run over tokens, or elements */
        least = side ? xkv_svdq_side(g).stream : 4 * xkv_min64(32, by_row ? shape.rows : shape.cols);
        XKV_REQUIRE(cur, part->method == XKV_METHOD_CODED, p + 24, "Q2", "method of part %u is %u, expected 2", index,
                    part->method);
        XKV_REQUIRE(cur, part->size >= least, p + 8, "Q2", "size of part %u is %llu, expected at least %llu", index,
                    (unsigned long long)part->size, (unsigned long long)least);
        return XKV_OK;
    }
    XKV_REQUIRE(cur, part->method <= most, p + 24, "P2",
                "method of part %u is %u, expected 0 or 1, and 0 for an empty part", index, part->method);
    if (part->method == XKV_METHOD_STORED) {
        XKV_REQUIRE(cur, part->size == decoded, p + 8, "P2", "size of part %u is %llu, expected %llu", index,
                    (unsigned long long)part->size, (unsigned long long)decoded);
        return XKV_OK;
    }
    XKV_REQUIRE(cur, part->size >= least && xkv_ceil_div(decoded, XKV_MAX_ZSTD_RATIO) <= part->size, p + 8, "P2",
                "size of part %u is %llu, which is too small for zstd frames of %llu bytes", index,
                (unsigned long long)part->size, (unsigned long long)decoded);
    return XKV_OK;
}

/* *end is where the last part that is not empty ended. */
static xkv_status check_part_place(const xkv_cursor *cur, const uint8_t *p, const xkv_container *c, uint32_t index,
                                   const xkv_part *part, uint64_t *end)
{
    uint64_t expected = part->size ? xkv_align64(*end, XKV_ALIGN) : 0;
    XKV_REQUIRE(cur, part->offset == expected, p, "P1", "offset of part %u is %llu, expected %llu", index,
                (unsigned long long)part->offset, (unsigned long long)expected);
    if (part->size == 0) {
        XKV_REQUIRE(cur, part->checksum == 0, p + 16, "P3", "checksum of the empty part %u is not 0", index);
        return XKV_OK;
    }
    XKV_REQUIRE(cur, expected <= c->payload_size && part->size <= c->payload_size - expected, p + 8, "P1",
                "part %u of %llu bytes at offset %llu, expected to end inside PAYL (%llu bytes)", index,
                (unsigned long long)part->size, (unsigned long long)expected, (unsigned long long)c->payload_size);
    *end = expected + part->size;
    return XKV_OK;
}

static xkv_status parse_parts(xkv_cursor *cur, const xkv_container *c, xkv_group *g, uint64_t *end)
{
    const uint8_t *p;
    XKV_TRY(xkv_cursor_take(cur, (uint64_t)g->part_count * XKV_PART_SIZE, &p));
    XKV_TRY(XKV_NEW(cur->ctx, g->part_count, &g->parts));
    for (uint32_t i = 0; i < g->part_count; i++, p += XKV_PART_SIZE) {
        g->parts[i] = (xkv_part){.offset = xkv_load64(p),
                                 .size = xkv_load64(p + 8),
                                 .checksum = xkv_load64(p + 16),
                                 .method = xkv_load32(p + 24)};
        XKV_REQUIRE(cur, xkv_load32(p + 28) == 0, p + 28, "R1", "reserved field is not 0");
        XKV_TRY(check_part_size(cur, p, c, g, i));
        XKV_TRY(check_part_place(cur, p, c, i, &g->parts[i], end));
    }
    return XKV_OK;
}

/* --- Section ---------------------------------------------------------------------------------------------------- */

static xkv_status check_order(const xkv_cursor *cur, const uint8_t *at, const xkv_container *c, const xkv_group *g)
{
    uint32_t index = (uint32_t)(g - c->groups);
    const xkv_group *before = index > 0 ? g - 1 : NULL;
    uint32_t place = c->kind == XKV_KIND_DICTIONARY ? c->group_count - 1 : 0;
    if (xkv_group_is_cross(g)) {
        XKV_REQUIRE(cur, index == place, at, "R3", "the cross stage is group %u, expected %u", index, place);
        return XKV_OK;
    }
    if (before && !xkv_group_is_cross(before))
        XKV_REQUIRE(cur, before->planes[0] < g->planes[0], at, "R3",
                    "group %u starts with plane %u, expected groups sorted by their lowest plane", index, g->planes[0]);
    return XKV_OK;
}

static xkv_status parse_group(xkv_cursor *cur, const xkv_container *c, uint8_t *seen, uint64_t *end, xkv_group *g)
{
    const uint8_t *p;
    XKV_TRY(xkv_cursor_take(cur, XKV_GROUP_SIZE, &p));
    g->codec = xkv_load32(p);
    g->reason = xkv_load32(p + 4);
    g->plane_count = xkv_load32(p + 8);
    g->rank = xkv_load32(p + 12);
    g->part_count = xkv_load32(p + 16);
    g->energy = xkv_loadf64(p + 24);
    g->error = xkv_loadf64(p + 32);
    XKV_TRY(check_group(cur, p, c, g));
    XKV_TRY(parse_group_planes(cur, &c->geometry, seen, g));
    XKV_TRY(check_rank(cur, p, g));
    XKV_TRY(check_order(cur, p, c, g));
    return parse_parts(cur, c, g, end);
}

static xkv_status parse_all_groups(xkv_cursor *cur, xkv_container *c, uint8_t *seen)
{
    uint64_t end = 0;
    for (uint32_t i = 0; i < c->group_count; i++)
        XKV_TRY(parse_group(cur, c, seen, &end, &c->groups[i]));
    for (uint32_t i = 0; i < c->geometry.plane_count; i++)
        XKV_REQUIRE(cur, seen[i], cur->data, "R3", "plane %u belongs to no group, expected one", i);
    XKV_TRY(xkv_cursor_end(cur));
    XKV_REQUIRE(cur, end == c->payload_size, cur->data, "P1",
                "the parts end at %llu, expected at the end of PAYL, %llu", (unsigned long long)end,
                (unsigned long long)c->payload_size);
    return XKV_OK;
}

xkv_status xkv_parse_groups(xkv_cursor *cur, xkv_container *c)
{
    const uint8_t *p;
    uint8_t *seen = NULL;
    XKV_TRY(xkv_cursor_take(cur, XKV_GRPS_SIZE, &p));
    uint32_t count = xkv_load32(p);
    XKV_REQUIRE(cur, count <= c->geometry.plane_count + 1, p, "R1",
                "group_count is %u, expected at most plane_count (%u), and one more with a cross stage", count,
                c->geometry.plane_count);
    XKV_REQUIRE(cur, xkv_load32(p + 4) == 0, p + 4, "R1", "reserved field is not 0");
    XKV_TRY(XKV_NEW_ZERO(cur->ctx, count, &c->groups));
    c->group_count = count;

    XKV_TRY(XKV_NEW_ZERO(cur->ctx, c->geometry.plane_count, &seen));
    xkv_status status = parse_all_groups(cur, c, seen);
    xkv_release(cur->ctx, seen);
    return status;
}

void xkv_free_groups(xkv_ctx *ctx, xkv_container *c)
{
    for (uint32_t i = 0; i < c->group_count; i++) {
        xkv_release(ctx, c->groups[i].planes);
        xkv_release(ctx, c->groups[i].plane_errors);
        xkv_release(ctx, c->groups[i].parts);
    }
    xkv_release(ctx, c->groups);
    c->groups = NULL;
    c->group_count = 0;
}
