#include "device_pack.h"
#include "encoder.h"

#include <math.h>

xkv_status xkv_encoder_report_progress(xkv_encoder *e, const xkv_group *g)
{
    e->done += xkv_encoder_group_bytes(e, g);
    if (e->o.progress && e->o.progress(e->o.progress_user, e->done, e->total) != 0)
        return xkv_fail(e->ctx, XKV_ERROR_CANCELLED, "stopped by the progress callback");
    return xkv_check_cancel(e->ctx);
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

uint64_t xkv_encoder_group_bytes(const xkv_encoder *e, const xkv_group *g)
{
    return xkv_group_row_bytes(&e->c.geometry, g, e->c.geometry.token_count);
}

static void make_lossless(xkv_group *g, uint32_t reason)
{
    g->codec = XKV_GROUP_LOSSLESS;
    g->reason = reason;
    g->rank = 0;
    g->energy = g->error = 0;
    memset(g->plane_errors, 0, g->plane_count * sizeof *g->plane_errors);
}

void xkv_encoder_fall_back(xkv_encoder *e, xkv_group *g)
{
    make_lossless(g, XKV_REASON_NO_GAIN);
    e->fallbacks++;
}

/* Bytes of the group when stored lossless. */
static xkv_status lossless_bytes(xkv_encoder *e, const xkv_group *g, uint64_t *bytes)
{
    xkv_group trial = *g;

    trial.codec = XKV_GROUP_LOSSLESS;
    *bytes = 0;
    return xkv_encoder_write_group(e, &trial, NULL, NULL, bytes);
}

/* Is rank `rank` larger than lossless? Only looked at closely when it is more than half of the raw bytes, since
 * lossless never gets below that. */
static xkv_status shrinks(xkv_encoder *e, const xkv_group *g, uint32_t rank, bool *yes)
{
    uint64_t svd = xkv_plan_svd_bytes(&e->c, g, rank), lossless = 0;

    *yes = true;
    if (svd <= xkv_encoder_group_bytes(e, g) / 2)
        return XKV_OK;
    XKV_TRY(lossless_bytes(e, g, &lossless));
    *yes = svd < lossless;
    return XKV_OK;
}

/* Largest rank whose factors are smaller than the raw group. */
static uint32_t rank_limit(const xkv_encoder *e, const xkv_group *g)
{
    uint64_t tokens = xkv_plan_coded_tokens(&e->c), per_rank = 2 * (tokens + g->width + 2);

    return (uint32_t)xkv_max64(1, xkv_min64(xkv_encoder_group_bytes(e, g) / per_rank, xkv_min64(tokens, g->width)));
}

void xkv_encoder_count_error(xkv_encoder *e, const xkv_group *g)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        uint32_t kind = e->c.geometry.planes[g->planes[i]].kind;
        e->kind_squares[kind] += g->plane_errors[i] * g->plane_errors[i] * g->plane_energies[i];
        e->kind_energy[kind] += g->plane_energies[i];
    }
}

double xkv_encoder_metric_error(const xkv_encoder *e)
{
    return xkv_relative_error(e->metric_squares, e->metric_energy);
}

/* The device factorizes where it can, which is where it has the rows; else the CPU, from a copy of them. */
static xkv_status factorize(xkv_encoder *e, xkv_group *g, const xkv_svd_target *target, xkv_factors *f, bool *good)
{
    uint32_t end = e->c.geometry.token_count - e->c.window;
    bool found;

    if (e->device) {
        XKV_TRY(xkv_device_factorize(e->device, g, target->iterations, f, &found));
        if (found)
            return XKV_OK;
        XKV_TRY(xkv_device_pack_bring(e->device, g));
    }
    return xkv_factorize(e->ctx, e->pool, e->rotators, g, e->views, e->c.sinks, end, target, f, good);
}

static xkv_status pack_svd(xkv_encoder *e, xkv_group *g)
{
    xkv_svd_target target = {.rank = g->rank, .max_rank = rank_limit(e, g), .iterations = e->o.iterations};
    xkv_factors f = {0};
    bool good = true;
    xkv_status status = XKV_OK;

    target.error = e->o.energy > 0 ? sqrt(1 - e->o.energy) : e->o.error;
    if (target.error == 0)
        XKV_TRY(shrinks(e, g, g->rank, &good)); /* a fixed rank tells its size before the work is done */
    if (good)
        XKV_TRY_GOTO(factorize(e, g, &target, &f, &good), out);
    if (good && target.error > 0)
        XKV_TRY_GOTO(shrinks(e, g, f.rank, &good), out);
    if (good) {
        xkv_encoder_count_error(e, g);
    } else {
        xkv_factors_free(e->ctx, &f);
        xkv_encoder_fall_back(e, g);
    }
    XKV_TRY_GOTO(xkv_encoder_write_group(e, g, &f, NULL, NULL), out);
out:
    xkv_factors_free(e->ctx, &f);
    return status;
}

/* Without a metric: errors in units of the planes' scales, against what the rows are without their mean. */
static void weigh_planes(const xkv_encoder *e, const xkv_group *g, xkv_coded *coded)
{
    uint32_t i = (uint32_t)(g - e->c.groups);
    const xkv_scalar *s = g->codec == XKV_GROUP_SVDQ ? &e->svdqs[i].scale : &e->scalars[i];

    for (uint32_t k = 0; k < g->plane_count; k++) {
        double error = g->plane_errors[k] / (double)s->scales[k];
        coded->metric_squares += error * error * g->plane_energies[k];
    }
    coded->metric_energy = s->energy;
}

/* Where the coded tokens end; a trial looks at no more than a sample. */
static uint32_t coded_end(const xkv_encoder *e)
{
    uint64_t end = e->c.geometry.token_count - e->c.window;

    return (uint32_t)(e->trial ? xkv_min64(end, (uint64_t)e->c.sinks + XKV_SAMPLE_TOKENS) : end);
}

static xkv_span coded_span(const xkv_encoder *e)
{
    return (xkv_span){e->c.sinks, coded_end(e), e->c.sinks};
}

/* Components of svdq that are worth their bits at the step, rounded. */
static xkv_status round_basis(xkv_encoder *e, xkv_group *g, xkv_svdq_basis *basis, xkv_transform *t)
{
    const xkv_svdq *s = t->own;
    const float *blocks = t->blocks;
    uint32_t end = coded_end(e);
    xkv_coded trial = {0};
    xkv_status status = XKV_OK;

    XKV_TRY(xkv_svdq_round(e->ctx, s, e->step, basis));
    if (basis->overflow)
        return XKV_OK;
    for (uint32_t i = 0; i < basis->rank; i++) /* the share that these tokens have to bear */
        basis->bits[i] *= (double)(end - e->c.sinks) / s->tokens;
    t->rank = basis->rank;
    t->component_bits = basis->bits;
    t->component_lost = basis->lost;
    XKV_TRY_GOTO(xkv_code_group(e->ctx, e->pool, e->rotators, g, e->views, coded_span(e), t, e->step, NULL,
                                (xkv_integers){NULL, 0}, &trial),
                 out);
    basis->overflow = trial.overflow;
    if (trial.overflow)
        goto out;
    xkv_svdq_select(basis, trial.tables);
    XKV_TRY_GOTO(xkv_svdq_finish(e->ctx, e->pool, e->kernels, s, basis), out);
    *t = xkv_transform_of_svdq_basis(basis);
    t->blocks = blocks;
out:
    xkv_coded_free(e->ctx, &trial);
    return status;
}

/* The group whose planes are none: the cross stage, if the dictionary has one. */
static xkv_group *cross_group(const xkv_encoder *e)
{
    return e->c.group_count > 0 && xkv_group_is_cross(&e->c.groups[0]) ? &e->c.groups[0] : NULL;
}

/* Store the groups lossless that make the cross stage overflow; all of them, if need be. */
static void drop_large(xkv_encoder *e, const float *norms, bool all)
{
    for (uint32_t i = 0; i < e->c.group_count; i++)
        if (xkv_takes_part(&e->c, e->transforms, i) &&
            (all || xkv_cross_too_large(norms[i], e->step, e->c.group_count)))
            xkv_encoder_fall_back(e, &e->c.groups[i]);
}

/* The stage, and what decides who is left out if it overflows. */
static xkv_status code_stage(xkv_encoder *e, float *norms)
{
    if (!e->device)
        return xkv_code_cross(e->ctx, e->pool, e->rotators, &e->c, e->views, e->c.sinks, coded_end(e), e->transforms,
                              e->o.dict->cross, NULL, e->step, norms, &e->cross);
    XKV_TRY(xkv_device_code_cross(e->device, e->pool, &e->c, e->transforms, e->step, &e->cross));
    return e->cross.overflow ? xkv_device_cross_norms(e->device, &e->c, e->transforms, norms) : XKV_OK;
}

/* Code the cross stage at e->step, in place of what was there. */
xkv_status xkv_encoder_code_cross(xkv_encoder *e)
{
    float *norms = NULL;
    xkv_status status = XKV_OK;

    if (!cross_group(e))
        return XKV_OK;
    XKV_TRY(XKV_NEW(e->ctx, e->c.group_count, &norms));
    for (int attempt = 0; attempt < 3; attempt++) {
        xkv_coded_free(e->ctx, &e->cross);
        XKV_TRY_GOTO(code_stage(e, norms), out);
        if (!e->cross.overflow)
            break;
        drop_large(e, norms, attempt > 0);
    }
out:
    xkv_release(e->ctx, norms);
    return status;
}

/* The rows of a group, with the share of the cross stage if it has one. */
static xkv_status code_with_cross(xkv_encoder *e, xkv_group *g, const xkv_transform *t, xkv_coded *coded)
{
    xkv_cross cross = {0};
    bool crossed = cross_group(e) && xkv_takes_part(&e->c, e->transforms, (uint32_t)(g - e->c.groups));

    if (crossed)
        cross = xkv_cross_of_coded(e->o.dict->cross, &e->cross);
    if (e->device)
        return xkv_device_code_group(e->device, e->pool, g, t, e->step, crossed ? &cross : NULL, coded);
    return xkv_code_group(e->ctx, e->pool, e->rotators, g, e->views, coded_span(e), t, e->step, crossed ? &cross : NULL,
                          (xkv_integers){crossed ? e->cross.q : NULL, e->cross.tokens}, coded);
}

/* `basis` is set for svdq; the caller frees it and `coded`. */
xkv_status xkv_encoder_code_group(xkv_encoder *e, xkv_group *g, xkv_svdq_basis *basis, xkv_coded *coded)
{
    xkv_transform t = e->transforms[g - e->c.groups];

    if (g->codec == XKV_GROUP_SVDQ)
        XKV_TRY(round_basis(e, g, basis, &t));
    coded->overflow = basis->overflow;
    if (!coded->overflow)
        XKV_TRY(code_with_cross(e, g, &t, coded));
    if (coded->overflow)
        return XKV_OK;
    if (g->codec != XKV_GROUP_DICT && !t.blocks)
        weigh_planes(e, g, coded);
    if (g->codec == XKV_GROUP_SVDQ) {
        xkv_svdq_close_up(basis, coded);
        coded->basis = basis;
        g->rank = basis->rank;
    }
    e->metric_squares += coded->metric_squares;
    e->metric_energy += coded->metric_energy;
    return XKV_OK;
}

static xkv_status pack_cross(xkv_encoder *e, xkv_group *g)
{
    XKV_TRY(xkv_encoder_code_cross(e));
    e->components += e->cross.coded;
    return xkv_encoder_write_group(e, g, NULL, &e->cross, NULL);
}

/* Is a coded group smaller than lossless, which never gets below half of the raw bytes? */
static xkv_status is_smaller(xkv_encoder *e, xkv_group *g, const xkv_coded *coded, bool *yes)
{
    uint64_t bytes = 0, lossless = 0;

    *yes = true;
    XKV_TRY(xkv_encoder_write_group(e, g, NULL, coded, &bytes));
    if (bytes <= xkv_encoder_group_bytes(e, g) / 2)
        return XKV_OK;
    XKV_TRY(lossless_bytes(e, g, &lossless));
    *yes = bytes < lossless;
    return XKV_OK;
}

/* A group with a coefficient that its 16 bits do not hold is stored lossless: an outlier costs bytes, not quality. So
 * is one that the quantizer does not make smaller. */
static xkv_status pack_coded(xkv_encoder *e, xkv_group *g)
{
    xkv_svdq_basis basis = {0};
    xkv_coded coded = {0};
    double squares = e->metric_squares, energy = e->metric_energy;
    bool good;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(xkv_encoder_code_group(e, g, &basis, &coded), out);
    good = !coded.overflow;
    if (good &&
        (coded.basis || coded.bits / 8 > (double)xkv_encoder_group_bytes(e, g) / 4)) /* else there is no need to look */
        XKV_TRY_GOTO(is_smaller(e, g, &coded, &good), out);
    if (!good) {
        e->metric_squares = squares;
        e->metric_energy = energy;
        xkv_encoder_fall_back(e, g);
        XKV_TRY_GOTO(xkv_encoder_write_group(e, g, NULL, NULL, NULL), out);
        goto out;
    }
    xkv_encoder_count_error(e, g);
    e->components += coded.coded;
    e->component_total +=
        g->codec == XKV_GROUP_SVDQ ? g->width : coded.rank; /* those of the cross stage are among them */
    XKV_TRY_GOTO(xkv_encoder_write_group(e, g, NULL, &coded, NULL), out);
out:
    xkv_coded_free(e->ctx, &coded);
    xkv_svdq_basis_free(e->ctx, &basis);
    return status;
}

static xkv_status pack_group(xkv_encoder *e, xkv_group *g)
{
    if (g->codec == XKV_GROUP_SVD)
        return pack_svd(e, g);
    if (xkv_group_is_cross(g))
        return pack_cross(e, g);
    return g->codec == XKV_GROUP_LOSSLESS ? xkv_encoder_write_group(e, g, NULL, NULL, NULL) : pack_coded(e, g);
}

xkv_status xkv_encoder_pack_groups(xkv_encoder *e)
{
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        xkv_group *g = &e->c.groups[i];
        XKV_TRY(pack_group(e, g));
        XKV_TRY(xkv_encoder_report_progress(e, g));
    }
    return XKV_OK;
}
