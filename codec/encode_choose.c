#include "encoder.h"

#include <math.h>

/* How often the step is made finer for an asked error, as long as that lowers the error to this share of it; or
 * coarser, when the error is below this share of what was asked for. */
enum { MAX_REFINEMENTS = 6 };
#define SMALLEST_GAIN 0.95
/* On the sample this share of the error is aimed at, so that its first step mostly keeps the error. */
#define SAMPLE_AIM 0.99

/* --- Rate --------------------------------------------------------------------------------------------------------- */

/* Payload bytes that do not depend on the ranks: lossless groups, and the exact rows of the others. */
static xkv_status fixed_bytes(xkv_encoder *e, uint64_t *bytes)
{
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        xkv_group *g = &e->c.groups[i], exact = *g;
        if (g->codec != XKV_GROUP_LOSSLESS) { /* what is left are its exact rows */
            exact.codec = XKV_GROUP_SVD;
            exact.part_count = XKV_PART_CHUNKS;
            exact.rank = 0;
        }
        XKV_TRY(xkv_encoder_write_group(e, &exact, NULL, NULL, bytes));
    }
    return XKV_OK;
}

xkv_status xkv_encoder_choose_ranks(xkv_encoder *e)
{
    uint64_t budget = (uint64_t)((double)xkv_raw16_bytes(&e->c.geometry) / e->o.ratio);
    uint64_t fixed = xkv_container_head_size(&e->w);

    XKV_TRY(fixed_bytes(e, &fixed));
    if (fixed > budget || !xkv_plan_fill(&e->c, budget - fixed))
        return xkv_fail(e->ctx, XKV_ERROR_TARGET,
                        "a ratio of %g allows %llu bytes; tables, exact rows and rank 1 already take %llu", e->o.ratio,
                        (unsigned long long)budget, (unsigned long long)fixed);
    return XKV_OK;
}

/* --- Coded groups: transforms and step -----------------------------------------------------------------------------
 */

/* Bits that a number of a factor takes on average are more than this, or it were not worth it. */
#define LEAST_BITS 1.3
/* Of the squared error that is asked for, this share may come from what the decomposition does not look for. */
#define TAIL_SHARE 0.3
/* Up to this order all components are found at the price of one product and an eigenproblem, without iterations. */
#define EASY_ORDER 2048

static xkv_status decompose_group(xkv_encoder *e, uint32_t group, uint32_t most)
{
    xkv_group *g = &e->c.groups[group];
    xkv_svdq_target target = {
        .t0 = e->c.sinks, .t1 = e->c.geometry.token_count - e->c.window, .most = most, .iterations = e->o.iterations};
    double tokens = target.t1 - target.t0, width = g->width, order = fmin(fmin(tokens, most), width), rank = order;

    if (e->o.ratio > 0)
        rank = fmin(rank, ceil(16 / LEAST_BITS / e->o.ratio * tokens * width / (tokens + width)));
    else if (order > EASY_ORDER)
        target.energy = 1 - TAIL_SHARE * e->o.error * e->o.error;
    if (order <= EASY_ORDER && rank > order / 2)
        rank = order;
    target.max_rank = (uint32_t)fmax(rank, 1);
    if (e->svdqs[group].width == 0) /* else a trial has done it */
        XKV_TRY(xkv_svdq_create(e->ctx, e->pool, e->rotators, g, e->views, &target, &e->svdqs[group]));
    if (e->svdqs[group].rank == 0)
        xkv_encoder_fall_back(e, g);
    else
        e->transforms[group] = xkv_transform_of_svdq(&e->svdqs[group]);
    return xkv_check_cancel(e->ctx);
}

/* What errors of a group are measured with: when auto compares with a dictionary its metric, where it has one. */
static const float *find_blocks(const xkv_encoder *e, const xkv_group *g)
{
    const xkv_basis *basis = e->automatic && e->o.dict ? xkv_dict_basis(e->o.dict, &e->c.geometry, g) : NULL;

    return basis ? basis->blocks : NULL;
}

static xkv_status make_transforms(xkv_encoder *e)
{
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        const xkv_group *g = &e->c.groups[i];
        if (g->codec == XKV_GROUP_CROSS)
            e->transforms[i] = (xkv_transform){.rank = g->rank};
        if (g->codec == XKV_GROUP_DICT)
            e->transforms[i] = xkv_transform_of_basis(xkv_dict_basis(e->o.dict, &e->c.geometry, g));
        if (g->codec == XKV_GROUP_SVDQ)
            XKV_TRY(decompose_group(e, i, e->trial ? XKV_SAMPLE_TOKENS : UINT32_MAX));
        if (g->codec == XKV_GROUP_SCALAR) {
            XKV_TRY(xkv_scalar_create(e->ctx, e->rotators, g, e->views, e->c.sinks,
                                      e->c.geometry.token_count - e->c.window, &e->scalars[i]));
            e->transforms[i] = xkv_transform_of_scalar(&e->scalars[i]);
        }
        if (g->codec != XKV_GROUP_DICT && g->plane_count > 0)
            e->transforms[i].blocks = find_blocks(e, g);
    }
    return XKV_OK;
}

/* Bytes of a side part that no table choice changes: scales and means. */
static double side_bytes(const xkv_group *g)
{
    if (g->codec == XKV_GROUP_SVDQ)
        return 12 + 4.0 * g->plane_count;
    return g->codec == XKV_GROUP_SCALAR ? 4.0 * g->plane_count + 2.0 * g->width : 0;
}

/* Bytes that do not depend on the step: the head, the exact rows, lossless groups, and what every stream costs whatever
 * it holds. */
static xkv_status bytes_beside_streams(xkv_encoder *e, double *bytes)
{
    uint64_t fixed = xkv_container_head_size(&e->w);
    double states = 0;

    XKV_TRY(fixed_bytes(e, &fixed));
    for (uint32_t i = 0; i < e->c.group_count; i++)
        if (e->transforms[i].rank > 0)
            states += (64.0 + XKV_ALIGN / 2) * e->c.chunk_count + XKV_ALIGN + side_bytes(&e->c.groups[i]);
    *bytes = (double)fixed + states;
    return XKV_OK;
}

/* Bytes for the rANS streams when the whole entry shall have the asked ratio. */
static xkv_status stream_budget(xkv_encoder *e, double beside, double *bytes)
{
    *bytes = (double)xkv_raw16_bytes(&e->c.geometry) / e->o.ratio - beside;
    if (*bytes <= 0)
        return xkv_fail(e->ctx, XKV_ERROR_TARGET,
                        "a ratio of %g is out of reach: tables and exact rows alone take %.0f bytes", e->o.ratio,
                        beside);
    return XKV_OK;
}

/* The error of all coded groups at e->step, or that of the worst one over XKV_GROUP_SLACK; with `drop`, groups that
 * exceed `drop` by themselves become lossless. */
static xkv_status measure_error(xkv_encoder *e, double drop, double *error)
{
    double worst = 0;

    e->metric_squares = e->metric_energy = 0;
    XKV_TRY(xkv_encoder_code_cross(e));
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        xkv_group *g = &e->c.groups[i];
        xkv_svdq_basis basis = {0};
        xkv_coded coded = {0};
        xkv_status status;
        if (g->codec == XKV_GROUP_LOSSLESS || g->codec == XKV_GROUP_SVD || xkv_group_is_cross(g))
            continue;
        status = xkv_encoder_code_group(e, g, &basis, &coded);
        worst = fmax(worst, xkv_relative_error(coded.metric_squares, coded.metric_energy));
        if (status == XKV_OK && drop > 0 && coded.metric_squares > drop * drop * coded.metric_energy)
            xkv_encoder_fall_back(e, g);
        xkv_coded_free(e->ctx, &coded);
        xkv_svdq_basis_free(e->ctx, &basis);
        XKV_TRY(status);
        XKV_TRY(xkv_check_cancel(e->ctx));
    }
    *error = fmax(xkv_encoder_metric_error(e), worst / XKV_GROUP_SLACK);
    e->metric_squares = e->metric_energy = 0;
    return XKV_OK;
}

/* The step was chosen on a sample, as if the basis were orthonormal: refine it until the measured error is as asked. On
 * rows unlike those it was trained on the rounding of a basis sets a floor, which no step gets below; then the groups
 * that are above the error by themselves are stored lossless, which leaves the rest below it. */
static xkv_status keep_error(xkv_encoder *e)
{
    double error = 0, before = INFINITY, factor = 1;
    float good = 0;

    for (int i = 0; i < MAX_REFINEMENTS; i++) {
        XKV_TRY(measure_error(e, 0, &error));
        if (error <= e->o.error)
            good = fmaxf(good, e->step);
        if (error == 0 || (error <= e->o.error && error >= SMALLEST_GAIN * e->o.error))
            break;
        if (error > e->o.error && factor < 0.9 && error > SMALLEST_GAIN * before)
            break;
        before = error;
        factor = e->o.error / error * 0.99;
        e->step *= (float)factor;
    }
    if (good == 0)
        return measure_error(e, e->o.error, &error);
    e->step = good;
    return XKV_OK;
}

/* No reader takes an entry with another step [Q3]; a hostile dictionary may ask for one. */
static xkv_status check_step(const xkv_encoder *e)
{
    if (isfinite(e->step) && e->step > 0)
        return XKV_OK;
    return xkv_fail(e->ctx, XKV_ERROR_TARGET, "the target needs a step of %g, expected finite and positive [Q3]",
                    (double)e->step);
}

/* An estimate is of no use when its error is further from the one that is asked for. */
#define ERROR_TOLERANCE 1.02

/* The error in a dictionary's metric at e->step; with an error to be kept, at the step that comes near it. */
static xkv_status measure_in_metric(xkv_encoder *e, double *error)
{
    XKV_TRY(measure_error(e, 0, error));
    for (int i = 0; i < 3 && e->o.error > 0 && *error > 0; i++) {
        if (*error > 0.92 * e->o.error && *error < ERROR_TOLERANCE * e->o.error)
            return XKV_OK;
        e->step *= (float)(e->o.error / *error);
        XKV_TRY(measure_error(e, 0, error));
    }
    return XKV_OK;
}

/* Bytes and error of the profile that is tried. The coefficients of the sample tell both, but not the error in a
 * dictionary's metric, nor the one that the rounding of its basis makes: then rows are measured. */
static xkv_status estimate(xkv_encoder *e, xkv_sample *sample, double beside)
{
    xkv_profile_estimate *found = &e->estimates[e->o.profile];
    xkv_estimate t;
    double error = 0;

    if (e->o.dict)
        XKV_TRY(measure_in_metric(e, &error));
    if (e->o.error > 0 && error > ERROR_TOLERANCE * e->o.error)
        return XKV_OK; /* out of reach */
    XKV_TRY(xkv_sample_estimate(e->pool, sample, e->step, &t));
    found->bytes = beside + t.bytes;
    found->error = e->o.dict ? error : t.error;
    return XKV_OK;
}

/* Bytes of the entry at e->step, without writing it. */
static xkv_status count_bytes(xkv_encoder *e, uint64_t *bytes)
{
    *bytes = xkv_container_head_size(&e->w);
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        xkv_group *g = &e->c.groups[i], exact = *g;
        xkv_svdq_basis basis = {0};
        xkv_coded coded = {0};
        xkv_status status = XKV_OK;
        exact.codec = XKV_GROUP_LOSSLESS;
        if (g->codec != XKV_GROUP_LOSSLESS)
            status = xkv_encoder_code_group(e, g, &basis, &coded);
        if (status == XKV_OK)
            status = xkv_encoder_write_group(e, coded.tables ? g : &exact, NULL, &coded, bytes);
        xkv_coded_free(e->ctx, &coded);
        xkv_svdq_basis_free(e->ctx, &basis);
        XKV_TRY(status);
        XKV_TRY(xkv_check_cancel(e->ctx));
    }
    e->metric_squares = e->metric_energy = 0;
    return XKV_OK;
}

/* Least squares turn the coefficients of svdq into others than those of the sample, which take up to two per cent fewer
 * bytes: what is left over is added to the budget of another search. */
static xkv_status correct_step(xkv_encoder *e, xkv_sample *sample, double bytes)
{
    uint64_t found;

    XKV_TRY(check_step(e));
    XKV_TRY(count_bytes(e, &found));
    bytes += (double)xkv_raw16_bytes(&e->c.geometry) / e->o.ratio - (double)found;
    return xkv_sample_step(e->ctx, e->pool, sample, bytes, 0, &e->step);
}

static xkv_status choose_step(xkv_encoder *e)
{
    xkv_sample *sample = NULL;
    double beside = 0, bytes = 0;
    xkv_status status = XKV_OK;

    if (e->o.quality > 0) {
        e->step = (float)xkv_dict_step(e->o.dict, e->o.quality);
        return check_step(e);
    }
    if (e->o.ratio > 0 || e->trial)
        XKV_TRY(bytes_beside_streams(e, &beside));
    if (e->o.ratio > 0)
        XKV_TRY(stream_budget(e, beside, &bytes));
    XKV_TRY_GOTO(xkv_sample_create(e->ctx, e->pool, e->rotators, &e->c, e->views, e->transforms,
                                   e->o.dict ? e->o.dict->cross : NULL, &sample),
                 out);
    XKV_TRY_GOTO(xkv_sample_step(e->ctx, e->pool, sample, bytes, e->o.error * SAMPLE_AIM, &e->step), out);
    if (e->trial)
        XKV_TRY_GOTO(estimate(e, sample, beside), out);
    else if (e->o.ratio > 0 && e->o.profile == XKV_PROFILE_SVD)
        XKV_TRY_GOTO(correct_step(e, sample, bytes), out);
    xkv_sample_free(e->ctx, sample);
    sample = NULL;
    if (e->o.error > 0 && !e->trial)
        XKV_TRY_GOTO(keep_error(e), out);
    status = check_step(e);
out:
    xkv_sample_free(e->ctx, sample);
    return status;
}

xkv_status xkv_encoder_choose_step(xkv_encoder *e)
{
    XKV_TRY(XKV_NEW_ZERO(e->ctx, e->c.group_count, &e->transforms));
    XKV_TRY(XKV_NEW_ZERO(e->ctx, e->c.group_count, &e->scalars));
    if (!e->svdqs) {
        XKV_TRY(XKV_NEW_ZERO(e->ctx, e->c.group_count, &e->svdqs));
        e->decomposed = e->c.group_count;
    }
    if (!xkv_plan_quantized(&e->o))
        return XKV_OK;
    XKV_TRY(make_transforms(e));
    return choose_step(e);
}

void xkv_encoder_release_transforms(xkv_encoder *e)
{
    for (uint32_t i = 0; e->scalars && i < e->c.group_count; i++)
        xkv_scalar_free(e->ctx, &e->scalars[i]);
    xkv_release(e->ctx, e->scalars);
    xkv_release(e->ctx, e->transforms);
    e->scalars = NULL;
    e->transforms = NULL;
}

void xkv_encoder_release_decompositions(xkv_encoder *e)
{
    for (uint32_t i = 0; i < e->decomposed; i++)
        xkv_svdq_free(e->ctx, &e->svdqs[i]);
    xkv_release(e->ctx, e->svdqs);
    e->svdqs = NULL;
    e->decomposed = 0;
}

/* --- Profile auto ------------------------------------------------------------------------------------------------- */

static xkv_status discard(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    (void)user;
    (void)ctx;
    (void)offset;
    (void)src;
    (void)size;
    return XKV_OK;
}

xkv_status xkv_encoder_plan(xkv_encoder *e, const xkv_output *output)
{
    XKV_TRY(xkv_plan_groups(e->ctx, &e->o, xkv_plan_quantized(&e->o), e->nonfinite, &e->c));
    return xkv_container_begin(e->ctx, &e->c, output, e->o.zstd_level, &e->w);
}

/* Estimate what a profile would come to, at the price of projecting a sample. A decomposition of all tokens is kept: it
 * is needed again if the profile is taken. */
static xkv_status try_profile(xkv_encoder *e, uint32_t profile)
{
    xkv_output nowhere = {NULL, discard};
    xkv_status status = XKV_OK;

    e->o.profile = profile;
    e->trial = true;
    XKV_TRY_GOTO(xkv_encoder_plan(e, &nowhere), out);
    XKV_TRY_GOTO(xkv_encoder_choose_step(e), out);
out:
    e->trial = false;
    xkv_container_writer_free(e->ctx, &e->w);
    xkv_encoder_release_transforms(e);
    if (status != XKV_OK || xkv_plan_coded_tokens(&e->c) > XKV_SAMPLE_TOKENS)
        xkv_encoder_release_decompositions(e);
    xkv_plan_release(e->ctx, &e->c);
    e->fallbacks = 0;
    return status;
}

/* Bytes when all is lossless. */
static xkv_status try_lossless(xkv_encoder *e)
{
    xkv_output nowhere = {NULL, discard};
    uint64_t bytes = 0;
    xkv_status status = XKV_OK;

    e->o.profile = XKV_PROFILE_LOSSLESS;
    XKV_TRY_GOTO(xkv_encoder_plan(e, &nowhere), out);
    bytes = xkv_container_head_size(&e->w);
    XKV_TRY_GOTO(fixed_bytes(e, &bytes), out);
    e->estimates[XKV_PROFILE_LOSSLESS].bytes = (double)bytes;
out:
    xkv_container_writer_free(e->ctx, &e->w);
    xkv_plan_release(e->ctx, &e->c);
    return status;
}

/* Is profile a better than b? The smaller for an error, the one of less error for a ratio. */
static bool is_better(const xkv_encoder *e, uint32_t a, uint32_t b)
{
    const xkv_profile_estimate *x = &e->estimates[a], *y = &e->estimates[b];

    if (x->bytes == 0 || y->bytes == 0)
        return x->bytes > 0;
    return e->o.ratio > 0 ? x->error < y->error : x->bytes < y->bytes;
}

/* Bytes that lossless never gets below: half of the raw ones, or of 16 bits an element. */
static double lossless_hope(const xkv_encoder *e)
{
    return (double)xkv_min64(xkv_raw16_bytes(&e->c.geometry), xkv_geometry_raw_bytes(&e->c.geometry)) / 2;
}

xkv_status xkv_encoder_choose_profile(xkv_encoder *e)
{
    static const uint32_t candidates[] = {XKV_PROFILE_DICT, XKV_PROFILE_SCALAR, XKV_PROFILE_SVD};
    uint32_t best = XKV_PROFILE_SCALAR;

    e->automatic = true;
    for (size_t i = e->o.dict ? 0 : 1; i < sizeof candidates / sizeof *candidates; i++) {
        xkv_status status = try_profile(e, candidates[i]);
        if (status == XKV_ERROR_TARGET) /* out of reach for this one */
            xkv_ctx_begin(e->ctx);
        else if (status != XKV_OK)
            return status;
        if (is_better(e, candidates[i], best))
            best = candidates[i];
    }
    if (e->o.error > 0 && e->estimates[best].bytes > lossless_hope(e)) {
        XKV_TRY(try_lossless(e));
        if (is_better(e, XKV_PROFILE_LOSSLESS, best))
            best = XKV_PROFILE_LOSSLESS;
    }
    if (best != XKV_PROFILE_SVD)
        xkv_encoder_release_decompositions(e);
    e->o.profile = best;
    return XKV_OK;
}
