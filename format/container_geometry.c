/* container_geometry.c - sections GEOM and TOKN: spec/container.md, sections 5 and 7. */
#include "container_parse.h"

#include <math.h>

/* --- GEOM ------------------------------------------------------------------------------------------------------- */

static xkv_status parse_counts(xkv_cursor *cur, xkv_container *c)
{
    const uint8_t *p;
    xkv_geometry *g = &c->geometry;
    XKV_TRY(xkv_cursor_take(cur, XKV_GEOM_SIZE, &p));
    g->layer_count = xkv_load32(p);
    g->plane_count = xkv_load32(p + 4);
    g->rope_count = xkv_load32(p + 8);
    g->token_count = xkv_load32(p + 12);
    c->chunk_tokens = xkv_load32(p + 16);
    c->sinks = xkv_load32(p + 20);
    c->window = xkv_load32(p + 24);

    XKV_REQUIRE(cur, g->layer_count <= XKV_MAX_LAYERS, p, "G1", "layer_count is %u, expected at most %u",
                g->layer_count, XKV_MAX_LAYERS);
    XKV_REQUIRE(cur, g->plane_count <= XKV_MAX_PLANES, p + 4, "G1", "plane_count is %u, expected at most %u",
                g->plane_count, XKV_MAX_PLANES);
    XKV_REQUIRE(cur, g->rope_count <= XKV_MAX_ROPES, p + 8, "G1", "rope_count is %u, expected at most %u",
                g->rope_count, XKV_MAX_ROPES);
    XKV_REQUIRE(cur, g->token_count <= XKV_MAX_TOKENS, p + 12, "G1", "token_count is %u, expected at most 2^31 - 1",
                g->token_count);
    XKV_REQUIRE(cur,
                c->chunk_tokens >= XKV_MIN_CHUNK && c->chunk_tokens <= XKV_MAX_CHUNK &&
                    (c->chunk_tokens & (c->chunk_tokens - 1)) == 0,
                p + 16, "G2", "chunk_tokens is %u, expected a power of two, 32 .. 65536", c->chunk_tokens);
    XKV_REQUIRE(cur, (uint64_t)c->sinks + c->window <= g->token_count, p + 20, "G3",
                "sinks %u and window %u, expected together at most token_count (%u)", c->sinks, c->window,
                g->token_count);
    XKV_REQUIRE(cur, xkv_load32(p + 28) == 0, p + 28, "G4", "reserved field is not 0");
    if (c->kind == XKV_KIND_DICTIONARY)
        XKV_REQUIRE(cur, g->token_count == 0, p + 12, "Y1", "token_count is %u, expected 0 in a dictionary",
                    g->token_count);
    else
        XKV_REQUIRE(cur, (g->token_count == 0) == (g->plane_count == 0), p + 12, "G10",
                    "token_count is %u and plane_count %u, expected both or neither to be 0", g->token_count,
                    g->plane_count);
    c->chunk_count = (uint32_t)xkv_ceil_div(g->token_count, c->chunk_tokens);
    return XKV_OK;
}

static xkv_status parse_plane(const xkv_cursor *cur, const uint8_t *p, const xkv_geometry *g, xkv_plane *plane)
{
    *plane = (xkv_plane){.layer = xkv_load32(p),
                         .kind = p[4],
                         .dtype = p[5],
                         .heads = xkv_load32(p + 8),
                         .head_dim = xkv_load32(p + 12),
                         .rope = xkv_load32(p + 16)};
    XKV_REQUIRE(cur, plane->layer < g->layer_count, p, "G5", "layer is %u, expected less than layer_count (%u)",
                plane->layer, g->layer_count);
    XKV_REQUIRE(cur, plane->kind <= XKV_PLANE_K_ROPE, p + 4, "G6", "kind is %u, expected 0 .. 3", plane->kind);
    XKV_REQUIRE(cur, xkv_dtype_block(plane->dtype) > 0, p + 5, "G6", "dtype is %u, expected 0 .. 4", plane->dtype);
    XKV_REQUIRE(cur, xkv_load16(p + 6) == 0, p + 6, "G4", "reserved field is not 0");
    XKV_REQUIRE(cur,
                plane->heads >= 1 && plane->head_dim >= 1 && (uint64_t)plane->heads * plane->head_dim <= XKV_MAX_WIDTH,
                p + 8, "G7", "heads is %u and head_dim %u, expected both at least 1, their product at most %u",
                plane->heads, plane->head_dim, XKV_MAX_WIDTH);
    XKV_REQUIRE(cur, (uint64_t)plane->heads * plane->head_dim % xkv_dtype_block(plane->dtype) == 0, p + 8, "G13",
                "heads is %u and head_dim %u, expected their product to be a multiple of %u for dtype %u", plane->heads,
                plane->head_dim, xkv_dtype_block(plane->dtype), plane->dtype);
    XKV_REQUIRE(cur, plane->rope == XKV_NO_ROPE || (plane->rope < g->rope_count && plane->kind == XKV_PLANE_K), p + 16,
                "G8", "rope is %u, expected less than rope_count (%u) in a plane of kind K, else 2^32 - 1", plane->rope,
                g->rope_count);
    XKV_REQUIRE(cur, xkv_load32(p + 20) == 0, p + 20, "G4", "row_set is %u, expected 0", xkv_load32(p + 20));
    return XKV_OK;
}

static xkv_status parse_planes(xkv_cursor *cur, xkv_geometry *g)
{
    const uint8_t *p;
    xkv_plane *planes = NULL;
    XKV_TRY(xkv_cursor_take(cur, (uint64_t)g->plane_count * XKV_PLANE_SIZE, &p));
    XKV_TRY(XKV_NEW(cur->ctx, g->plane_count, &planes));
    g->planes = planes;
    for (uint32_t i = 0; i < g->plane_count; i++, p += XKV_PLANE_SIZE) {
        XKV_TRY(parse_plane(cur, p, g, &planes[i]));
        XKV_REQUIRE(cur,
                    i == 0 || planes[i - 1].layer < planes[i].layer ||
                        (planes[i - 1].layer == planes[i].layer && planes[i - 1].kind < planes[i].kind),
                    p, "G9", "plane (layer %u, kind %u) after (%u, %u), expected ascending order", planes[i].layer,
                    planes[i].kind, planes[i - 1].layer, planes[i - 1].kind);
    }
    return XKV_OK;
}

static xkv_status parse_rope(xkv_cursor *cur, xkv_rope *rope)
{
    const uint8_t *p, *freq;
    XKV_TRY(xkv_cursor_take(cur, XKV_ROPE_SIZE, &p));
    rope->n_rot = xkv_load32(p);
    rope->offset = xkv_load32(p + 4);
    rope->style = xkv_load32(p + 8);
    rope->scale = xkv_loadf64(p + 16);
    XKV_REQUIRE(cur, rope->n_rot >= 2 && rope->n_rot <= 2 * XKV_MAX_ROPE_PAIRS && rope->n_rot % 2 == 0, p, "G11",
                "n_rot is %u, expected an even number, 2 .. %u", rope->n_rot, 2 * XKV_MAX_ROPE_PAIRS);
    XKV_REQUIRE(cur, rope->style <= XKV_ROPE_HALF_SPLIT, p + 8, "G11", "style is %u, expected 0 or 1", rope->style);
    XKV_REQUIRE(cur, xkv_load32(p + 12) == 0, p + 12, "G4", "reserved field is not 0");
    XKV_REQUIRE(cur, isfinite(rope->scale) && rope->scale > 0, p + 16, "G11", "scale is %g, expected finite and > 0",
                rope->scale);
    XKV_REQUIRE(cur, xkv_load64(p + 24) == 0, p + 24, "G4", "reserved field is not 0");

    XKV_TRY(xkv_cursor_take(cur, 4 * (uint64_t)rope->n_rot, &freq));
    for (uint32_t i = 0; i < rope->n_rot / 2; i++, freq += 8) {
        rope->inv_freq[i] = xkv_loadf64(freq);
        XKV_REQUIRE(cur, fabs(rope->inv_freq[i]) <= XKV_MAX_INV_FREQ, freq, "G11",
                    "inv_freq[%u] is %g, expected finite, at most %g in size", i, rope->inv_freq[i], XKV_MAX_INV_FREQ);
    }
    return XKV_OK;
}

static xkv_status parse_ropes(xkv_cursor *cur, xkv_geometry *g)
{
    xkv_rope *ropes = NULL;
    uint64_t least = (uint64_t)g->rope_count * (XKV_ROPE_SIZE + 8);
    XKV_REQUIRE(cur, least <= cur->size - cur->pos, cur->data + 8, "G12",
                "rope_count is %u, expected no more than fit into the %llu bytes left", g->rope_count,
                (unsigned long long)(cur->size - cur->pos));
    XKV_TRY(XKV_NEW_ZERO(cur->ctx, g->rope_count, &ropes));
    g->ropes = ropes;
    for (uint32_t i = 0; i < g->rope_count; i++)
        XKV_TRY(parse_rope(cur, &ropes[i]));
    return XKV_OK;
}

/* The rotated dims of each plane lie inside its heads. */
static xkv_status check_rotations(const xkv_cursor *cur, const xkv_geometry *g)
{
    const uint8_t *p = cur->data + XKV_GEOM_SIZE;
    for (uint32_t i = 0; i < g->plane_count; i++, p += XKV_PLANE_SIZE) {
        const xkv_plane *plane = &g->planes[i];
        if (plane->rope == XKV_NO_ROPE)
            continue;
        const xkv_rope *rope = &g->ropes[plane->rope];
        XKV_REQUIRE(cur, (uint64_t)rope->offset + rope->n_rot <= plane->head_dim, p + 12, "G11",
                    "head_dim is %u, expected at least first_dim %u + n_rot %u of RoPE record %u", plane->head_dim,
                    rope->offset, rope->n_rot, plane->rope);
    }
    return XKV_OK;
}

xkv_status xkv_parse_geometry(xkv_cursor *cur, xkv_container *c)
{
    XKV_TRY(parse_counts(cur, c));
    XKV_TRY(parse_planes(cur, &c->geometry));
    XKV_TRY(parse_ropes(cur, &c->geometry));
    XKV_TRY(check_rotations(cur, &c->geometry));
    uint32_t features = xkv_geometry_features(&c->geometry);
    XKV_REQUIRE(cur, features == c->required_features, cur->data + 4, "G13",
                "required_features is 0x%x in the header, the dtypes of the planes ask for 0x%x", c->required_features,
                features);
    return xkv_cursor_end(cur);
}

/* --- TOKN ------------------------------------------------------------------------------------------------------- */

static xkv_status implied_positions(xkv_cursor *cur, xkv_geometry *g, const uint8_t *at, int32_t first)
{
    int32_t *positions = NULL;
    XKV_REQUIRE(cur, (int64_t)first + g->token_count - 1 <= INT32_MAX, at, "T3",
                "first_position is %d, expected the last of %u positions to be at most 2^31 - 1", first,
                g->token_count);
    XKV_TRY(XKV_NEW(cur->ctx, g->token_count, &positions));
    g->positions = positions;
    for (uint32_t i = 0; i < g->token_count; i++)
        positions[i] = (int32_t)((int64_t)first + i);
    return XKV_OK;
}

static xkv_status explicit_positions(xkv_cursor *cur, xkv_geometry *g)
{
    void *positions = NULL;
    const uint8_t *at = cur->data + cur->pos;
    XKV_TRY(xkv_blob_take(cur, 4, 4 * (uint64_t)g->token_count, "T3", "positions", &positions));
    g->positions = positions;
    for (uint32_t i = 1; i < g->token_count; i++)
        XKV_REQUIRE(cur, g->positions[i - 1] <= g->positions[i], at, "T3",
                    "position of token %u is %d after %d, expected no descent", i, g->positions[i],
                    g->positions[i - 1]);
    return XKV_OK;
}

xkv_status xkv_parse_tokens(xkv_cursor *cur, xkv_container *c)
{
    const uint8_t *p;
    xkv_geometry *g = &c->geometry;
    XKV_TRY(xkv_cursor_take(cur, XKV_TOKN_SIZE, &p));
    g->token_id_count = xkv_load32(p);
    uint32_t mode = xkv_load32(p + 4);
    int32_t first = (int32_t)xkv_load32(p + 8);
    XKV_REQUIRE(cur, g->token_id_count <= XKV_MAX_TOKENS, p, "T1", "token_id_count is %u, expected at most 2^31 - 1",
                g->token_id_count);
    XKV_REQUIRE(cur, mode <= 1, p + 4, "T1", "position_mode is %u, expected 0 or 1", mode);
    XKV_REQUIRE(cur, mode == 0 || first == 0, p + 8, "T1", "first_position is %d, expected 0 in mode 1", first);
    XKV_REQUIRE(cur, xkv_load32(p + 12) == 0, p + 12, "T1", "reserved field is not 0");

    void *ids = NULL;
    XKV_TRY(xkv_blob_take(cur, 4, 4 * (uint64_t)g->token_id_count, "T2", "token ids", &ids));
    g->token_ids = ids;
    XKV_TRY(mode == 0 ? implied_positions(cur, g, p + 8, first) : explicit_positions(cur, g));
    return xkv_cursor_end(cur);
}
