#include "device_pack_tile.h"

/* --- Opening ------------------------------------------------------------------------------------------------------ */

uint64_t xkv_pack_constant_bytes(uint64_t width, uint64_t planes, uint64_t angles)
{
    return angles / 2 * sizeof(double) + planes * sizeof(xkv_plug_plane) + (width + planes + 3) * 4 +
           (planes + 4) * XKV_CONSTANT_ALIGN;
}

/* Where the planes begin in a row, and its end; then the row's own. */
static void list_begins(const xkv_pack_work *w, const xkv_plug_plane *planes, uint32_t *begins)
{
    for (uint32_t i = 0; i < w->g->plane_count; i++)
        begins[i] = planes[i].column;
    begins[w->g->plane_count] = w->g->width;
    begins[w->g->plane_count + 1] = 0;
    begins[w->g->plane_count + 2] = w->g->width;
}

static xkv_status send_constants(xkv_pack_work *w)
{
    xkv_device_packing *p = w->p;
    uint64_t width = w->g->width;
    uint8_t *bytes = NULL;
    xkv_plug_plane *planes;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW_ZERO(p->ctx, (size_t)p->need.constants, &bytes));
    w->ropes_at = 0;
    w->planes_at = xkv_align64(xkv_device_list_ropes(p->geometry, w->g, bytes), XKV_CONSTANT_ALIGN);
    planes = (xkv_plug_plane *)(void *)(bytes + w->planes_at);
    xkv_device_list_planes(p->geometry, w->g, p->views, (xkv_heads){0}, planes);
    w->mean_at = xkv_align64(w->planes_at + w->g->plane_count * sizeof *planes, XKV_CONSTANT_ALIGN);
    if (w->t)
        memcpy(bytes + w->mean_at, w->t->mean, width * sizeof(float));
    w->begins_at = xkv_align64(w->mean_at + width * sizeof(float), XKV_CONSTANT_ALIGN);
    list_begins(w, planes, (uint32_t *)(void *)(bytes + w->begins_at));
    XKV_TRY_GOTO(xkv_device_upload(p->ctx, p->device, bytes, p->need.constants, xkv_pack_constant(w, 0), p->stream),
                 out);
out:
    xkv_release(p->ctx, bytes);
    return status;
}

xkv_status xkv_pack_open(xkv_device_packing *p, const xkv_group *g, const xkv_transform *t, xkv_pack_work *w)
{
    *w = (xkv_pack_work){.p = p, .g = g, .t = t, .angles = xkv_device_count_angles(p->geometry, g)};
    if (g->codec == XKV_GROUP_DICT)
        w->basis = xkv_device_basis_find(p->device_dict, xkv_dict_basis(p->dict, p->geometry, g));
    return send_constants(w);
}

/* --- Rows --------------------------------------------------------------------------------------------------------- */

xkv_status xkv_pack_gather(const xkv_pack_work *w, uint32_t row, uint32_t n, float *to)
{
    xkv_device_packing *p = w->p;
    uint32_t token = p->sinks + row;
    xkv_plug_angles angles = {.positions = (const int32_t *)xkv_pack_place(p, p->at.positions) + token,
                              .tokens = n,
                              .out = xkv_pack_place(p, p->at.angles),
                              .stride = w->angles};
    xkv_plug_gather o = {.planes = xkv_pack_constant(w, w->planes_at),
                         .plane_count = w->g->plane_count,
                         .tokens = n,
                         .first = token,
                         .angles = angles.out,
                         .angles_stride = w->angles,
                         .mean = w->t ? xkv_pack_constant(w, w->mean_at) : NULL,
                         .rows = to,
                         .ld = w->g->width};

    XKV_TRY(xkv_device_make_angles(p->ctx, p->device, p->stream, p->geometry, w->g, xkv_pack_constant(w, w->ropes_at),
                                   true, angles));
    XKV_PACKING(p, gather(p->device->plug, &o, p->stream));
    return XKV_OK;
}

xkv_status xkv_pack_total(const xkv_pack_work *w, uint32_t i, double *scratch, double *sum)
{
    xkv_device_packing *p = w->p;
    const double *there = (const double *)xkv_pack_place(p, p->at.sums) + i * p->at.stride;

    XKV_TRY(xkv_device_download(p->ctx, p->device, there, p->tokens * sizeof *there, scratch, p->stream));
    *sum = 0;
    for (uint32_t t = 0; t < p->tokens; t++)
        *sum += scratch[t];
    return XKV_OK;
}
