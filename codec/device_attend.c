/* device_attend.c - attention over held rows, and restoring them, put on a stream. */
#include "device_attend.h"

#include "device_planes.h"

#define PLACE_ALIGN 256u

/* --- Workspace ---------------------------------------------------------------------------------------------------- */

/* Offsets of what a call needs, for XKV_ATTEND_QUERIES queries of each KV head. */
typedef struct layout {
    uint64_t scores, largest, sums, parts, merged, size;
} layout;

static uint64_t take(uint64_t *size, uint64_t floats)
{
    uint64_t at = *size;

    *size += xkv_align64(floats * sizeof(float), PLACE_ALIGN);
    return at;
}

static layout lay_out(const xkv_device_attention *d, const xkv_plane *value, uint32_t slots)
{
    uint64_t queries = (uint64_t)value->heads * XKV_ATTEND_QUERIES, columns = slots + value->head_dim + 1ull;
    layout at = {0};

    at.scores = take(&at.size, queries * d->token_count);
    at.largest = take(&at.size, queries * d->split_count);
    at.sums = take(&at.size, queries * d->split_count);
    at.parts = take(&at.size, queries * d->split_count * columns);
    at.merged = take(&at.size, queries * columns);
    return at;
}

void xkv_device_attention_get_info(const xkv_device_attention *d, xkv_device_attention_info *info)
{
    *info = (xkv_device_attention_info){.held_bytes = d->size};
    for (uint32_t i = 0; i < d->entry_count; i++)
        for (uint32_t k = 0; d->dicts[i] && k < d->dicts[i]->dict->c.group_count; k++) {
            const xkv_basis *b = &d->dicts[i]->dict->bases[k];
            info->held_bytes += b->rows.data ? (uint64_t)b->rank * b->width * sizeof(float) : 0;
        }
    for (uint32_t i = 0; i < d->geometry->plane_count; i++)
        if (d->tiles[i])
            info->workspace_bytes =
                xkv_max64(info->workspace_bytes, lay_out(d, &d->geometry->planes[i], d->slots[i]).size);
}

/* --- The call ----------------------------------------------------------------------------------------------------- */

static xkv_status check_addresses(xkv_ctx *ctx, const xkv_queries *q, const void *workspace, const float *output,
                                  const float *lse)
{
    uintptr_t floats = (uintptr_t)q->data | (uintptr_t)q->positions | (uintptr_t)output | (uintptr_t)lse |
                       (uintptr_t)q->query_stride | (uintptr_t)q->head_stride;

    if ((uintptr_t)workspace % PLACE_ALIGN != 0 || !workspace)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the workspace is not aligned to %u bytes", PLACE_ALIGN);
    if (floats % sizeof(float) != 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "queries, strides or outputs are no multiples of 4 bytes");
    return XKV_OK;
}

static void set_keys(const xkv_device_attention *d, const xkv_attend_layer *l, xkv_plug_attend *o)
{
    for (uint32_t i = XKV_ROLE_KEY; i <= XKV_ROLE_KEY_ROPE; i++) {
        const xkv_plane_role *r = &l->roles[i];
        if (!r->present)
            continue;
        o->keys[i] = d->tiles[r->plane];
        o->dim_k[i] = r->facts->head_dim;
        o->angles_at[i] = r->facts->rope != XKV_NO_ROPE ? d->angles_at[r->facts->rope] : 0;
    }
}

/* Everything but which queries, and where their results go. */
static xkv_plug_attend describe(const xkv_device_attention *d, const xkv_attend_layer *l, const xkv_queries *q,
                                uint8_t *workspace)
{
    const xkv_plane_role *value = &l->roles[l->value];
    layout at = lay_out(d, value->facts, d->slots[value->plane]);
    xkv_plug_attend o = {.planes = d->planes,
                         .values = d->tiles[value->plane],
                         .value_planes = d->value_planes[value->plane],
                         .splits = d->splits,
                         .angles = d->angles,
                         .positions = d->positions,
                         .angles_stride = d->angles_stride,
                         .rows = d->token_count,
                         .tile_count = d->tile_count,
                         .split_count = d->split_count,
                         .kv_heads = l->kv_heads,
                         .dim_v = l->dim_v,
                         .group = q->heads / l->kv_heads,
                         .queries = q->data,
                         .query_positions = q->positions,
                         .scale = (float)l->o.scale,
                         .softcap = (float)l->o.softcap,
                         .causal = l->o.causal,
                         .window = l->o.window,
                         .slots = d->slots[value->plane],
                         .scores = (float *)(void *)(workspace + at.scores),
                         .largest = (float *)(void *)(workspace + at.largest),
                         .sums = (float *)(void *)(workspace + at.sums),
                         .parts = (float *)(void *)(workspace + at.parts),
                         .merged = (float *)(void *)(workspace + at.merged)};

    o.head_stride = q->head_stride ? q->head_stride : (int64_t)l->dim_k * (int64_t)sizeof(float);
    o.query_stride = q->query_stride ? q->query_stride : o.head_stride * q->heads;
    set_keys(d, l, &o);
    return o;
}

xkv_status xkv_device_attend(xkv_ctx *ctx, const xkv_device_attention *d, uint32_t layer, const xkv_queries *queries,
                             const xkv_attend_options *options, void *stream, void *workspace, float *output,
                             float *lse)
{
    xkv_attend_layer l;
    xkv_plug_attend o;

    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_attend_layer_init(ctx, d->geometry, d->first_layer, d->layer_count, layer, queries, options, &l));
    XKV_TRY(check_addresses(ctx, queries, workspace, output, lse));
    o = describe(d, &l, queries, workspace);
    o.output = output;
    o.lse = lse;
    for (size_t first = 0; first < l.m; first += o.count) {
        o.first = (uint32_t)first;
        o.count = (uint32_t)xkv_min64(l.m - first, XKV_ATTEND_QUERIES);
        XKV_TRY(xkv_device_result(ctx, d->device, d->device->api->attend(d->device->plug, &o, stream)));
    }
    return XKV_OK;
}

xkv_status xkv_device_attention_merge(xkv_ctx *ctx, xkv_device *device, const xkv_attention_state *states,
                                      uint32_t state_count, uint64_t rows, uint32_t dim, void *stream, float *output,
                                      float *lse)
{
    xkv_plug_merge o = {.count = state_count, .dim = dim, .rows = rows, .output = output, .lse = lse};

    xkv_ctx_begin(ctx);
    if (state_count > XKV_PLUG_STATES)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "%u states, at most %u at a time", state_count, XKV_PLUG_STATES);
    for (uint32_t i = 0; i < state_count; i++) {
        o.outputs[i] = states[i].output;
        o.lses[i] = states[i].lse;
    }
    return xkv_device_result(ctx, device, device->api->merge(device->plug, &o, stream));
}

/* --- Restoring ---------------------------------------------------------------------------------------------------- */

static bool is_held(const xkv_device_attention *d, uint32_t plane)
{
    return d->tiles[plane] != NULL;
}

/* A block of the kernel makes a tile of one head in shared memory, so that no block of the view may reach over heads.
 */
static xkv_status check_destination(xkv_ctx *ctx, const xkv_device_attention *d, uint32_t plane, const xkv_view *v)
{
    uint32_t dim = d->geometry->planes[plane].head_dim;

    XKV_TRY(xkv_device_check_view(ctx, d->geometry, plane, (xkv_heads){0}, v));
    if (dim > XKV_HELD_DIM)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "plane %u: heads of %u elements, at most %u on a device", plane,
                        dim, XKV_HELD_DIM);
    if (dim % xkv_dtype_block(v->dtype) != 0)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "view %u: blocks of %s reach over heads of %u elements", plane,
                        xkv_dtype_name(v->dtype), dim);
    return XKV_OK;
}

static xkv_status restore_plane(xkv_ctx *ctx, const xkv_device_attention *d, uint32_t plane, const xkv_view *v,
                                void *stream)
{
    const xkv_plane *p = &d->geometry->planes[plane];
    xkv_plug_restore o = {.planes = d->planes,
                          .tiles = d->tiles[plane],
                          .tile_count = d->tile_count,
                          .angles = d->angles,
                          .angles_stride = d->angles_stride,
                          .to = {.view = *v, .heads = p->heads, .head_dim = p->head_dim, .via = p->dtype}};

    if (p->rope != XKV_NO_ROPE)
        o.angles += d->angles_at[p->rope];
    return xkv_device_result(ctx, d->device, d->device->api->restore(d->device->plug, &o, stream));
}

xkv_status xkv_device_attention_restore(xkv_ctx *ctx, const xkv_device_attention *d, void *stream,
                                        const xkv_view *views)
{
    xkv_ctx_begin(ctx);
    if (!views)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "no views to restore into");
    for (uint32_t i = 0; i < d->geometry->plane_count; i++)
        if (is_held(d, i))
            XKV_TRY(check_destination(ctx, d, i, &views[i]));
    for (uint32_t i = 0; i < d->geometry->plane_count; i++)
        if (is_held(d, i))
            XKV_TRY(restore_plane(ctx, d, i, &views[i], stream));
    return XKV_OK;
}
