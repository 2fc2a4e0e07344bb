#include "moves.h"

/* moves = to - from; *any: one is not 0. */
static xkv_status subtract(xkv_ctx *ctx, const int32_t *to, const int32_t *from, uint32_t count, int32_t *moves,
                           bool *any)
{
    *any = false;
    for (uint32_t i = 0; i < count; i++) {
        if (__builtin_sub_overflow(to[i], from[i], &moves[i]))
            return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "position %d cannot be moved to %d: too far", (int)from[i],
                            (int)to[i]);
        *any |= moves[i] != 0;
    }
    return XKV_OK;
}

/* A K whose rotation the entry does not know cannot be turned. */
static xkv_status check_ropes(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_group *groups,
                              const xkv_read_options *o)
{
    for (uint32_t i = o->first_group; i < o->first_group + o->group_count; i++)
        for (uint32_t j = 0; j < groups[i].plane_count; j++) {
            const xkv_plane *p = &geometry->planes[groups[i].planes[j]];
            if ((p->kind == XKV_PLANE_K || p->kind == XKV_PLANE_K_ROPE) && p->rope == XKV_NO_ROPE)
                return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED,
                                "%s of layer %u has no known RoPE: it cannot be moved to other positions",
                                xkv_plane_kind_name(p->kind), p->layer);
        }
    return XKV_OK;
}

static xkv_status copy_ropes(xkv_ctx *ctx, const xkv_geometry *geometry, xkv_moves *m)
{
    XKV_TRY(XKV_NEW(ctx, geometry->rope_count, &m->ropes));
    for (uint32_t i = 0; i < geometry->rope_count; i++) { /* the rows have their scale already */
        m->ropes[i] = geometry->ropes[i];
        m->ropes[i].scale = 1;
    }
    m->geometry = *geometry;
    m->geometry.ropes = m->ropes;
    return XKV_OK;
}

xkv_status xkv_moves_create(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_group *groups,
                            const xkv_read_options *o, xkv_moves *m)
{
    const int32_t *stored = geometry->positions + o->first_token;
    xkv_status status = XKV_OK;
    bool any;

    *m = (xkv_moves){.positions = stored};
    if (!o->positions)
        return XKV_OK;
    XKV_TRY(XKV_NEW(ctx, o->token_count, &m->distances));
    XKV_TRY_GOTO(subtract(ctx, o->positions, stored, o->token_count, m->distances, &any), out);
    if (!any)
        goto out;
    m->positions = o->positions;
    XKV_TRY_GOTO(check_ropes(ctx, geometry, groups, o), out);
    XKV_TRY_GOTO(copy_ropes(ctx, geometry, m), out);
    return XKV_OK;
out:
    xkv_moves_free(ctx, m);
    m->positions = stored;
    return status;
}

void xkv_moves_free(xkv_ctx *ctx, xkv_moves *m)
{
    xkv_release(ctx, m->distances);
    xkv_release(ctx, m->ropes);
    *m = (xkv_moves){0};
}
