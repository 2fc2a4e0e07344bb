/* encode_append.c - tokens behind those of an entry: its bases, tables and full chunks stay, and what follows them is
 * coded in the same way. */
#include "encoder.h"

#include "dict.h"

static const xkv_group *base_group(const xkv_encoder *e, const xkv_group *g)
{
    return &e->append.base->c.groups[g - e->c.groups];
}

/* Tokens that are coded now: the rest of the entry's last chunk, and what was appended. */
static xkv_span new_span(const xkv_encoder *e)
{
    uint32_t end = e->c.geometry.token_count - e->c.window;
    uint32_t first = (uint32_t)xkv_max64(e->c.sinks, (uint64_t)e->append.chunks * e->c.chunk_tokens);

    return (xkv_span){first, end, e->append.tokens};
}

/* --- Plan --------------------------------------------------------------------------------------------------------- */

static xkv_status copy_group(const xkv_encoder *e, const xkv_group *from, xkv_group *to)
{
    *to = (xkv_group){.codec = from->codec,
                      .reason = from->reason,
                      .plane_count = from->plane_count,
                      .rank = from->rank,
                      .part_count = e->c.chunk_count + 2,
                      .width = from->width};
    XKV_TRY(XKV_NEW(e->ctx, to->plane_count, &to->planes));
    XKV_TRY(XKV_NEW_ZERO(e->ctx, to->plane_count, &to->plane_errors));
    XKV_TRY(XKV_NEW_ZERO(e->ctx, to->plane_count, &to->plane_energies));
    XKV_TRY(XKV_NEW_ZERO(e->ctx, to->part_count, &to->parts));
    if (to->plane_count > 0)
        memcpy(to->planes, from->planes, to->plane_count * sizeof *to->planes);
    return XKV_OK;
}

static xkv_status copy_groups(xkv_encoder *e)
{
    const xkv_container *base = &e->append.base->c;

    e->c.chunk_tokens = base->chunk_tokens;
    e->c.chunk_count = (uint32_t)xkv_ceil_div(e->c.geometry.token_count, base->chunk_tokens);
    e->c.sinks = base->sinks;
    e->c.window = base->window;
    XKV_TRY(XKV_NEW_ZERO(e->ctx, base->group_count, &e->c.groups));
    for (; e->c.group_count < base->group_count; e->c.group_count++) {
        xkv_status status = copy_group(e, &base->groups[e->c.group_count], &e->c.groups[e->c.group_count]);
        if (status != XKV_OK) {
            e->c.group_count++; /* what there is of it is released with the others */
            return status;
        }
    }
    return XKV_OK;
}

/* The entry's metadata, but for the writer, and for the error, which is known last. */
static xkv_status copy_values(xkv_encoder *e)
{
    const xkv_container *base = &e->append.base->c;
    const char *writer = e->o.writer ? e->o.writer : "libxkv";

    XKV_TRY(XKV_NEW(e->ctx, base->value_count, &e->append.values));
    e->c.values = e->append.values;
    e->c.value_count = base->value_count;
    for (uint32_t i = 0; i < base->value_count; i++) {
        xkv_meta_value *v = &e->append.values[i];
        *v = base->values[i];
        if (strcmp(v->key, "error.metric") == 0 && v->type == XKV_VALUE_F64) {
            e->append.metric_error = xkv_loadf64(v->bytes);
            v->bytes = e->append.error;
        }
        if (strcmp(v->key, "writer") == 0 && v->type == XKV_VALUE_STRING) {
            v->size = (uint32_t)xkv_utf8_prefix(writer, strlen(writer));
            v->bytes = (uint8_t *)(uintptr_t)writer;
        }
    }
    return XKV_OK;
}

/* What is coded with loss must have a number for every row. */
static xkv_status check_finite(const xkv_encoder *e)
{
    for (uint32_t i = 0; i < e->c.group_count; i++)
        for (uint32_t k = 0; e->c.groups[i].codec != XKV_GROUP_LOSSLESS && k < e->c.groups[i].plane_count; k++)
            if (e->nonfinite[e->c.groups[i].planes[k]])
                return xkv_fail(e->ctx, XKV_ERROR_UNSUPPORTED,
                                "plane %u holds NaN or Inf, and the entry to append to codes it with loss: pack the "
                                "whole cache",
                                e->c.groups[i].planes[k]);
    return XKV_OK;
}

xkv_status xkv_encoder_plan_append(xkv_encoder *e, const xkv_output *output)
{
    const xkv_entry *base = e->append.base;

    e->append.tokens = base->c.geometry.token_count - base->c.window;
    e->append.chunks = e->append.tokens / base->c.chunk_tokens;
    e->append.exact = e->c.has_framing && xkv_entry_own_lossless(base);
    XKV_TRY(copy_groups(e));
    XKV_TRY(check_finite(e));
    XKV_TRY(copy_values(e));
    return xkv_container_begin(e->ctx, &e->c, output, e->o.zstd_level, &e->w);
}

void xkv_encoder_release_append(xkv_encoder *e)
{
    xkv_cross_stage_free(e->ctx, &e->append.stage);
    xkv_release(e->ctx, e->append.values);
}

/* --- Errors ------------------------------------------------------------------------------------------------------- */

/* Energies of the rows that the entry's errors are relative to. */
static xkv_status weigh_known(xkv_encoder *e, xkv_group *g, const xkv_transform *t, double **energies, double *metric)
{
    XKV_TRY(xkv_weigh_group(e->ctx, e->pool, e->rotators, g, e->views, e->c.sinks,
                            (uint32_t)xkv_max64(e->c.sinks, e->append.tokens), t, metric));
    XKV_TRY(XKV_NEW(e->ctx, g->plane_count, energies));
    memcpy(*energies, g->plane_energies, g->plane_count * sizeof **energies);
    return XKV_OK;
}

/* The errors in g are those of the new tokens: add those of the others, which the entry tells. */
static void add_known(xkv_encoder *e, xkv_group *g, const double *energies)
{
    const xkv_group *base = base_group(e, g);
    double squares = 0;

    g->energy = 0;
    for (uint32_t i = 0; i < g->plane_count; i++) {
        double was = base->plane_errors[i], is = g->plane_errors[i], energy = energies[i] + g->plane_energies[i];
        double sum = was * was * energies[i] + is * is * g->plane_energies[i];
        g->plane_errors[i] = xkv_relative_error(sum, energy);
        g->plane_energies[i] = energy;
        g->energy += energy;
        squares += sum;
    }
    g->error = xkv_relative_error(squares, g->energy);
    xkv_encoder_count_error(e, g);
}

static xkv_status too_large(const xkv_encoder *e)
{
    return xkv_fail(e->ctx, XKV_ERROR_UNSUPPORTED,
                    "a coefficient is beyond what the entry to append to can hold: pack the whole cache");
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

static xkv_status append_svd(xkv_encoder *e, xkv_group *g)
{
    size_t n = (size_t)g->rank * g->width;
    xkv_span span = new_span(e);
    xkv_factors f = {.rank = g->rank};
    uint8_t *stored = NULL;
    double *energies = NULL, metric;
    bool fit;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(xkv_read_components(e->ctx, e->append.base, base_group(e, g), &stored), out);
    XKV_TRY_GOTO(XKV_NEW(e->ctx, n, &f.components), out);
    XKV_TRY_GOTO(XKV_NEW(e->ctx, g->rank, &f.scales), out);
    memcpy(f.components, stored, 2 * n);
    for (uint32_t i = 0; i < g->rank; i++)
        f.scales[i] = xkv_loadf32(stored + 2 * n + 4ull * i);
    XKV_TRY_GOTO(weigh_known(e, g, NULL, &energies, &metric), out);
    XKV_TRY_GOTO(xkv_project(e->ctx, e->pool, e->rotators, g, e->views, span.t0, span.t1, span.measured, &f, &fit),
                 out);
    if (!fit) {
        status = too_large(e);
        goto out;
    }
    add_known(e, g, energies);
    XKV_TRY_GOTO(xkv_encoder_write_group(e, g, &f, NULL, NULL), out);
out:
    xkv_release(e->ctx, energies);
    xkv_release(e->ctx, stored);
    xkv_factors_free(e->ctx, &f);
    return status;
}

static xkv_status append_integers(xkv_encoder *e, xkv_group *g, const xkv_group_reader *r, xkv_coded *coded)
{
    bool crossed = r->cross && r->transform.top > 0;
    xkv_cross cross = {0};
    xkv_transform t = r->transform;

    t.tables = r->side.tables;
    if (crossed)
        cross = xkv_cross_of_coded(e->append.stage.cross.basis, &e->cross);
    return xkv_code_group(e->ctx, e->pool, e->rotators, g, e->views, new_span(e), &t, r->side.step,
                          crossed ? &cross : NULL, (xkv_integers){crossed ? e->cross.q : NULL, e->cross.tokens}, coded);
}

static xkv_status append_coded(xkv_encoder *e, xkv_group *g, xkv_group_reader *r)
{
    xkv_coded coded = {0};
    double *energies = NULL, metric = 0;
    xkv_status status = XKV_OK;

    if (g->codec == XKV_GROUP_SVDQ) {
        XKV_TRY(xkv_svdq_invert(e->ctx, e->pool, e->kernels, &e->c.geometry, g, r->side.bytes, "the entry to append to",
                                &r->svdq));
        r->transform = xkv_transform_of_svdq_basis(&r->svdq);
    }
    XKV_TRY_GOTO(weigh_known(e, g, &r->transform, &energies, &metric), out);
    XKV_TRY_GOTO(append_integers(e, g, r, &coded), out);
    if (coded.overflow) {
        status = too_large(e);
        goto out;
    }
    add_known(e, g, energies);
    e->step = r->side.step;
    e->metric_squares += coded.metric_squares + e->append.metric_error * e->append.metric_error * metric;
    e->metric_energy += coded.metric_energy + metric;
    e->components += coded.coded;
    e->component_total += g->codec == XKV_GROUP_SVDQ ? g->width : g->rank;
    XKV_TRY_GOTO(xkv_encoder_write_group(e, g, NULL, &coded, NULL), out);
out:
    xkv_release(e->ctx, energies);
    xkv_coded_free(e->ctx, &coded);
    return status;
}

/* What the stage needs of the groups: their leading coefficients. */
static xkv_status make_transforms(xkv_encoder *e)
{
    XKV_TRY(XKV_NEW_ZERO(e->ctx, e->c.group_count, &e->transforms));
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        const xkv_group *g = &e->c.groups[i];
        const xkv_basis *b =
            g->codec == XKV_GROUP_DICT ? xkv_dict_basis(e->append.base->dict, &e->c.geometry, g) : NULL;
        if (b)
            e->transforms[i] = xkv_transform_of_basis(b);
    }
    return XKV_OK;
}

static xkv_status append_cross(xkv_encoder *e, xkv_group *g)
{
    const xkv_cross *cross = &e->append.stage.cross;
    xkv_span span = new_span(e);
    uint8_t *tables = NULL;
    float *norms = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(make_transforms(e), out);
    XKV_TRY_GOTO(XKV_NEW(e->ctx, e->c.group_count, &norms), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(e->ctx, cross->basis->rank, &tables), out); /* the entry may list fewer components */
    memcpy(tables, cross->tables, cross->rank);
    XKV_TRY_GOTO(xkv_code_cross(e->ctx, e->pool, e->rotators, &e->c, e->views, span.t0, span.t1, e->transforms,
                                cross->basis, tables, cross->step, norms, &e->cross),
                 out);
    if (e->cross.overflow) {
        status = too_large(e);
        goto out;
    }
    e->components += e->cross.coded;
    XKV_TRY_GOTO(xkv_encoder_write_group(e, g, NULL, &e->cross, NULL), out);
out:
    xkv_release(e->ctx, tables);
    xkv_release(e->ctx, norms);
    return status;
}

static xkv_status append_group(xkv_encoder *e, xkv_group *g)
{
    xkv_group_reader r = {0};
    xkv_status status;

    if (g->codec == XKV_GROUP_LOSSLESS)
        return xkv_encoder_write_group(e, g, NULL, NULL, NULL);
    if (xkv_group_is_cross(g))
        return append_cross(e, g);
    if (g->codec == XKV_GROUP_SVD)
        return append_svd(e, g);
    status = xkv_group_reader_open(e->ctx, e->append.base, base_group(e, g), &e->append.stage, &r);
    if (status == XKV_OK)
        status = append_coded(e, g, &r);
    xkv_group_reader_close(&r);
    return status;
}

xkv_status xkv_encoder_append_groups(xkv_encoder *e)
{
    XKV_TRY(xkv_cross_stage_open(e->ctx, e->append.base, &e->append.stage));
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        xkv_group *g = &e->c.groups[i];
        XKV_TRY(append_group(e, g));
        XKV_TRY(xkv_encoder_report_progress(e, g));
    }
    xkv_storef64(e->append.error, xkv_encoder_metric_error(e));
    return XKV_OK;
}
