#include "device_pack.h"
#include "encoder.h"
#include "values.h"

#include <stdlib.h>
#include <xxhash.h>

/* --- Preparation -------------------------------------------------------------------------------------------------- */

static xkv_status scan_plane(void *user, uint32_t worker, uint64_t index)
{
    xkv_encoder *e = user;
    const xkv_plane *p = &e->c.geometry.planes[index];
    size_t row_bytes = (size_t)xkv_dtype_bytes(p->dtype, xkv_plane_width(p));
    uint32_t n = e->c.geometry.token_count, t1;
    uint8_t *rows = e->slots[worker].raw;

    for (uint32_t t = 0; t < n && !e->nonfinite[index]; t = t1) {
        t1 = (uint32_t)xkv_min64(n, (uint64_t)t + XKV_TILE_ROWS);
        xkv_view_gather_bytes(&e->views[index], p, t, t1, rows, row_bytes);
        e->nonfinite[index] = !e->kernels->all_finite(p->dtype, rows, (size_t)(t1 - t) * xkv_plane_width(p));
    }
    return XKV_OK;
}

/* NaN and Inf have no SVD. */
static xkv_status find_nonfinite(xkv_encoder *e)
{
    size_t row = 0;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW_ZERO(e->ctx, e->c.geometry.plane_count, &e->nonfinite));
    if (e->device)
        return xkv_device_pack_scan(e->device, e->nonfinite);
    for (uint32_t i = 0; i < e->c.geometry.plane_count; i++)
        row = (size_t)xkv_max64(row, xkv_plane_width(&e->c.geometry.planes[i]) * 4ull);
    for (uint32_t i = 0; i < e->threads; i++)
        XKV_TRY_GOTO(XKV_NEW(e->ctx, row * XKV_TILE_ROWS, &e->slots[i].raw), out);
    XKV_TRY_GOTO(xkv_pool_run(e->ctx, e->pool, e->c.geometry.plane_count, scan_plane, e), out);
out:
    xkv_encoder_release_slots(e);
    return status;
}

static xkv_status check_planes(const xkv_encoder *e)
{
    const xkv_geometry *geometry = &e->c.geometry;

    for (uint32_t i = 0; i < geometry->plane_count; i++) {
        XKV_TRY(xkv_check_plane(e->ctx, geometry, i));
        if (geometry->token_count > 0)
            XKV_TRY(xkv_check_view(e->ctx, geometry, i, &e->views[i]));
        if (e->views[i].dtype != geometry->planes[i].dtype)
            return xkv_fail(e->ctx, XKV_ERROR_ARGUMENT, "plane %u: the view's dtype is not the plane's", i);
    }
    return XKV_OK;
}

static xkv_status init(xkv_encoder *e)
{
    e->threads = xkv_ctx_threads(e->ctx);
    XKV_TRY(check_planes(e));
    XKV_TRY(xkv_pool_create(e->ctx, e->threads, &e->pool));
    e->threads = xkv_pool_threads(e->pool);
    XKV_TRY(XKV_NEW_ZERO(e->ctx, e->threads, &e->slots));
    XKV_TRY(XKV_NEW_ZERO(e->ctx, e->threads, &e->rotators));
    for (uint32_t i = 0; i < e->threads; i++) {
        XKV_TRY(xkv_rotator_init(e->ctx, &e->c.geometry, e->kernels, true, &e->rotators[i]));
        e->slots[i].zstd = ZSTD_createCCtx();
        if (!e->slots[i].zstd)
            return xkv_fail(e->ctx, XKV_ERROR_MEMORY, "zstd: no memory for a context");
    }
    if (e->o.profile != XKV_PROFILE_LOSSLESS)
        return find_nonfinite(e);
    return XKV_NEW_ZERO(e->ctx, e->c.geometry.plane_count, &e->nonfinite);
}

static void fini(xkv_encoder *e)
{
    for (uint32_t i = 0; e->slots && i < e->threads; i++)
        ZSTD_freeCCtx(e->slots[i].zstd);
    for (uint32_t i = 0; e->rotators && i < e->threads; i++)
        if (e->rotators[i].geometry)
            xkv_rotator_free(e->ctx, &e->rotators[i]);
    xkv_release(e->ctx, e->slots);
    xkv_release(e->ctx, e->rotators);
    xkv_release(e->ctx, e->nonfinite);
    xkv_pool_free(e->ctx, e->pool);
    xkv_container_writer_free(e->ctx, &e->w);
    xkv_coded_free(e->ctx, &e->cross);
    xkv_encoder_release_decompositions(e);
    xkv_encoder_release_transforms(e);
    xkv_encoder_release_append(e);
    xkv_plan_release(e->ctx, &e->c);
}

/* --- Metadata ----------------------------------------------------------------------------------------------------- */

/* Whether the engine's file begins with a magic number and a version. */
static bool has_version(const xkv_framing *f)
{
    return (f->engine == XKV_ENGINE_LLAMA_SEQUENCE || f->engine == XKV_ENGINE_LLAMA_SESSION) && f->literal_size >= 8;
}

/* In ascending order of the keys [M3]. Returns where error.metric, which is known last, is kept. */
static uint8_t *set_values(const xkv_encoder *e, xkv_values *v)
{
    const xkv_framing *f = &e->c.framing;
    uint8_t *error = NULL;

    if (e->o.profile == XKV_PROFILE_DICT)
        xkv_values_add_bytes(v, "dictionary.id", e->o.dict->c.content_id, 16);
    if (e->c.has_framing && has_version(f))
        xkv_values_add_u64(v, "engine.version", xkv_load32(f->literals + 4));
    if (e->o.profile == XKV_PROFILE_DICT) {
        error = v->numbers[v->count];
        xkv_values_add_f64(v, "error.metric", 0);
    }
    xkv_values_add_model(v, e->o.model);
    xkv_values_add_string(v, "writer", e->o.writer ? e->o.writer : "libxkv");
    return error;
}

/* --- Report ------------------------------------------------------------------------------------------------------- */

static void fill_report(const xkv_encoder *e, uint64_t file_size, xkv_pack_report *r)
{
    *r = (xkv_pack_report){0};
    r->raw_bytes = xkv_geometry_raw_bytes(&e->c.geometry);
    r->raw16_bytes = xkv_raw16_bytes(&e->c.geometry);
    r->entry_bytes = file_size;
    r->ratio = (double)r->raw16_bytes / (double)file_size;
    for (int kind = 0; kind < 4; kind++)
        r->error[kind] = xkv_relative_error(e->kind_squares[kind], e->kind_energy[kind]);
    r->fallback_groups = e->fallbacks;
    r->step = (double)e->step;
    r->error_metric = xkv_encoder_metric_error(e);
    r->profile = e->o.profile;
    memcpy(r->estimates, e->estimates, sizeof r->estimates);
    r->components = e->components;
    r->component_total = e->component_total;
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        r->group_count += !xkv_group_is_cross(&e->c.groups[i]);
        r->lossless_groups += e->c.groups[i].codec == XKV_GROUP_LOSSLESS;
    }
    for (uint32_t i = 0; i < e->c.geometry.plane_count; i++)
        r->nonfinite_planes += e->nonfinite[i];
}

/* --- Entry points ------------------------------------------------------------------------------------------------- */

static xkv_status check_source(xkv_ctx *ctx, const xkv_framing *framing, const void *source, uint64_t source_size)
{
    if (framing && (!source || source_size != framing->source_size))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a framing needs the engine's file it was made from");
    return XKV_OK;
}

static void set_cache(xkv_encoder *e, const xkv_geometry *geometry, const xkv_framing *framing, const void *source,
                      uint64_t source_size)
{
    XXH128_canonical_t hash;

    e->c.geometry = *geometry;
    e->total = xkv_geometry_raw_bytes(geometry);
    if (!framing)
        return;
    e->c.has_framing = true;
    e->c.framing = *framing;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(source, (size_t)source_size));
    memcpy(e->c.source_hash, hash.digest, 16);
}

static xkv_status pack(xkv_encoder *e, const xkv_output *output, xkv_pack_report *report)
{
    xkv_values values = {.count = 0};
    uint8_t *error;
    uint64_t file_size;

    XKV_TRY(init(e));
    if (e->o.profile == XKV_PROFILE_AUTO)
        XKV_TRY(xkv_encoder_choose_profile(e));
    error = set_values(e, &values);
    e->c.values = values.list;
    e->c.value_count = values.count;
    XKV_TRY(xkv_encoder_plan(e, output));
    if (e->o.ratio > 0 && !xkv_plan_quantized(&e->o))
        XKV_TRY(xkv_encoder_choose_ranks(e));
    XKV_TRY(xkv_encoder_choose_step(e));
    XKV_TRY(xkv_encoder_pack_groups(e));
    if (error)
        xkv_storef64(error, xkv_encoder_metric_error(e));
    XKV_TRY(xkv_container_finish(e->ctx, &e->w, &file_size));
    if (report)
        fill_report(e, file_size, report);
    return XKV_OK;
}

/* All of xkv_pack() but for the checks that it alone needs. */
static xkv_status pack_all(xkv_encoder *e, const xkv_geometry *geometry, const xkv_framing *framing, const void *source,
                           uint64_t source_size, const xkv_pack_options *options, const xkv_output *output,
                           xkv_pack_report *report)
{
    xkv_status status;

    XKV_TRY(xkv_plan_options(e->ctx, options, &e->o));
    set_cache(e, geometry, framing, source, source_size);
    status = pack(e, output, report);
    fini(e);
    return status;
}

xkv_status xkv_pack(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_view *views, const xkv_framing *framing,
                    const void *source, uint64_t source_size, const xkv_pack_options *options, const xkv_output *output,
                    xkv_pack_report *report)
{
    xkv_encoder e = {.ctx = ctx, .kernels = xkv_kernels_cpu(), .views = views};

    xkv_ctx_begin(ctx);
    XKV_TRY(check_source(ctx, framing, source, source_size));
    return pack_all(&e, geometry, framing, source, source_size, options, output, report);
}

xkv_status xkv_encoder_pack_rows(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_view *views,
                                 struct xkv_device_packing *device, const xkv_pack_options *options,
                                 const xkv_output *output, xkv_pack_report *report)
{
    xkv_encoder e = {.ctx = ctx, .kernels = xkv_kernels_cpu(), .views = views, .device = device};

    return pack_all(&e, geometry, NULL, NULL, 0, options, output, report);
}

xkv_status xkv_pack_cache(xkv_ctx *ctx, const xkv_cache *cache, const xkv_pack_options *options,
                          const xkv_output *output, xkv_pack_report *report)
{
    uint64_t size;
    const uint8_t *data = xkv_cache_data(cache, &size);

    return xkv_pack(ctx, xkv_cache_geometry(cache), xkv_cache_views(cache), xkv_cache_framing(cache), data, size,
                    options, output, report);
}

/* --- Appending ---------------------------------------------------------------------------------------------------- */

static bool same_ids(const xkv_geometry *a, const xkv_geometry *b)
{
    size_t n = a->token_id_count < b->token_id_count ? a->token_id_count : b->token_id_count;

    return n == 0 || memcmp(a->token_ids, b->token_ids, n * sizeof *a->token_ids) == 0;
}

static xkv_status check_base(xkv_ctx *ctx, const xkv_entry *base, const xkv_geometry *geometry)
{
    uint32_t count = base->geometry.token_count;

    if (base->parent)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "an entry that extends another cannot be appended to");
    if (base->dict && !base->dict->for_packing)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the dictionary was not opened for packing");
    if (geometry->token_count < count)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "%u tokens in all, %u are in the entry to append to",
                        geometry->token_count, count);
    if (!xkv_geometry_begins_alike(&base->geometry, geometry, count) || !same_ids(&base->geometry, geometry))
        return xkv_fail(ctx, XKV_ERROR_MISMATCH,
                        "the cache has other planes, RoPE, positions or token ids than the entry to append to");
    return XKV_OK;
}

static uint32_t profile_of(const xkv_container *c)
{
    static const uint32_t profiles[] = {[XKV_GROUP_SVD] = XKV_PROFILE_SVD,
                                        [XKV_GROUP_DICT] = XKV_PROFILE_DICT,
                                        [XKV_GROUP_SCALAR] = XKV_PROFILE_SCALAR,
                                        [XKV_GROUP_SVDQ] = XKV_PROFILE_SVD};

    for (uint32_t i = 0; i < c->group_count; i++)
        if (c->groups[i].codec != XKV_GROUP_LOSSLESS && !xkv_group_is_cross(&c->groups[i]))
            return profiles[c->groups[i].codec];
    return XKV_PROFILE_LOSSLESS;
}

static xkv_status append(xkv_encoder *e, const xkv_output *output, xkv_pack_report *report)
{
    uint64_t file_size;

    XKV_TRY(init(e));
    XKV_TRY(xkv_encoder_plan_append(e, output));
    XKV_TRY(xkv_encoder_append_groups(e));
    XKV_TRY(xkv_container_finish(e->ctx, &e->w, &file_size));
    if (report)
        fill_report(e, file_size, report);
    return XKV_OK;
}

xkv_status xkv_append(xkv_ctx *ctx, const xkv_entry *base, const xkv_geometry *geometry, const xkv_view *views,
                      const xkv_framing *framing, const void *source, uint64_t source_size,
                      const xkv_append_options *options, const xkv_output *output, xkv_pack_report *report)
{
    xkv_encoder e = {.ctx = ctx, .kernels = xkv_kernels_cpu(), .views = views, .append = {.base = base}};
    xkv_append_options o = xkv_append_options_default();
    xkv_status status;

    xkv_ctx_begin(ctx);
    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    if (o.zstd_level < 1 || o.zstd_level > 19)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "zstd_level: expected 1 .. 19, found %d", o.zstd_level);
    XKV_TRY(check_source(ctx, framing, source, source_size));
    XKV_TRY(check_base(ctx, base, geometry));
    e.o = (xkv_pack_options){.profile = profile_of(&base->c),
                             .zstd_level = o.zstd_level,
                             .writer = o.writer,
                             .progress = o.progress,
                             .progress_user = o.progress_user};
    set_cache(&e, geometry, framing, source, source_size);
    status = append(&e, output, report);
    fini(&e);
    return status;
}

xkv_status xkv_append_cache(xkv_ctx *ctx, const xkv_entry *base, const xkv_cache *cache,
                            const xkv_append_options *options, const xkv_output *output, xkv_pack_report *report)
{
    uint64_t size;
    const uint8_t *data = xkv_cache_data(cache, &size);

    return xkv_append(ctx, base, xkv_cache_geometry(cache), xkv_cache_views(cache), xkv_cache_framing(cache), data,
                      size, options, output, report);
}
