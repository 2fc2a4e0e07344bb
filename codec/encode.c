#include "cross.h"
#include "parts.h"
#include "plan.h"
#include "rate.h"
#include "scalar.h"
#include "svd_group.h"
#include "svdq.h"
#include "values.h"

#include <math.h>
#include <stdlib.h>
#include <xxhash.h>

/* How often the step is made finer for an asked error, as long as that lowers the error to this share of it; or
 * coarser, when the error is below this share of what was asked for. */
enum { MAX_REFINEMENTS = 6 };
#define SMALLEST_GAIN 0.95
/* On the sample this share of the error is aimed at, so that its first step mostly keeps the error. */
#define SAMPLE_AIM 0.99

/* Chunks are encoded a batch at a time, one per slot, and written in order. */
typedef struct slot {
    ZSTD_CCtx *zstd;
    uint8_t *raw, *planes, *packed;
    const void *data; /* what to write: raw or packed */
    uint64_t size;
    uint32_t method;
} slot;

typedef struct encoder {
    xkv_ctx *ctx;
    const xkv_kernels *kernels;
    xkv_pack_options o;
    xkv_pool *pool;
    uint32_t threads;
    const xkv_view *views;
    xkv_container c;
    xkv_container_writer w;
    xkv_rotator *rotators; /* [threads] */
    slot *slots;           /* [threads] */
    uint8_t *nonfinite;    /* [plane_count] */
    uint64_t done, total;  /* raw bytes, for progress */
    double kind_squares[4], kind_energy[4];
    uint32_t fallbacks;
    xkv_transform *transforms; /* [group_count] of coded groups; rank 0: none */
    xkv_scalar *scalars;       /* [group_count] what the transforms of profile scalar point to */
    xkv_coded cross;           /* the cross stage at `step`; rank 0: none */
    xkv_svdq *svdqs;           /* [decomposed] and those of quantized svd */
    uint32_t decomposed;       /* group_count, once there are any */
    float step;
    double metric_squares, metric_energy;
    uint32_t components, component_total;
    bool automatic;                    /* profile auto chooses, or has chosen */
    bool trial;                        /* a profile is tried: a sample will do */
    xkv_profile_estimate estimates[8]; /* by profile */
} encoder;

/* The group and batch at hand. */
typedef struct batch {
    encoder *e;
    xkv_group *g;
    const xkv_factors *f;   /* svd */
    const xkv_coded *coded; /* dict, scalar and svdq */
    uint32_t first;
} batch;

static xkv_status report_progress(encoder *e, uint64_t bytes)
{
    e->done += bytes;
    if (e->o.progress && e->o.progress(e->o.progress_user, e->done, e->total) != 0)
        return xkv_fail(e->ctx, XKV_ERROR_CANCELLED, "stopped by the progress callback");
    return xkv_check_cancel(e->ctx);
}

/* --- Parts -------------------------------------------------------------------------------------------------------- */

/* Rows of tokens [t0, t1) as the engine holds them: spec/codec.md, section 1. */
static void gather_exact(const encoder *e, const xkv_group *g, uint32_t t0, uint32_t t1, uint8_t *dst, size_t row_bytes)
{
    size_t column = 0;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &e->c.geometry.planes[g->planes[i]];
        xkv_view_gather_bytes(&e->views[g->planes[i]], p, t0, t1, dst + column, row_bytes);
        column += xkv_plane_width(p) * xkv_dtype_size(p->dtype);
    }
}

/* spec/dictionary.md, section 1: side part. */
static void side_part(const batch *b, uint8_t *p)
{
    const xkv_container *c = &b->e->c;
    const xkv_scalar *scalar = &b->e->scalars[b->g - c->groups];

    xkv_storef32(p, b->coded->step);
    xkv_store32(p + 4, 0);
    p += 8;
    if (b->g->codec == XKV_CODEC_SCALAR) {
        for (uint32_t i = 0; i < b->g->plane_count; i++, p += 4)
            xkv_storef32(p, scalar->scales[i]);
        memcpy(p, scalar->stored_mean, 2ull * b->g->width);
        p += 2ull * b->g->width;
    }
    memcpy(p, b->coded->tables, b->g->rank);
}

/* The matrix of a part, at s->raw. */
static const void *part_matrix(const batch *b, uint32_t part, xkv_shape shape, slot *s)
{
    const xkv_container *c = &b->e->c;
    size_t row_bytes = (size_t)(shape.cols * shape.elem);
    uint32_t t0, t1, n = c->geometry.token_count;

    if (part == XKV_PART_COMPONENTS && b->coded) {
        side_part(b, s->raw);
    } else if (part == XKV_PART_COMPONENTS) {
        size_t bytes = (size_t)b->g->rank * b->g->width * 2;
        memcpy(s->raw, b->f->components, bytes);
        for (uint32_t i = 0; i < b->g->rank; i++)
            xkv_storef32(s->raw + bytes + 4ull * i, b->f->scales[i]);
    } else if (part == XKV_PART_EXACT) {
        gather_exact(b->e, b->g, 0, c->sinks, s->raw, row_bytes);
        gather_exact(b->e, b->g, n - c->window, n, s->raw + c->sinks * row_bytes, row_bytes);
    } else if (b->g->codec == XKV_CODEC_SVD) {
        xkv_chunk_coded(c, part - XKV_PART_CHUNKS, &t0, &t1);
        return b->f->coefficients + (size_t)(t0 - c->sinks) * b->g->rank;
    } else {
        xkv_chunk_tokens(c, part - XKV_PART_CHUNKS, &t0, &t1);
        gather_exact(b->e, b->g, t0, t1, s->raw, row_bytes);
    }
    return s->raw;
}

/* The coefficients of one chunk as a rANS stream. */
static void encode_chunk(const batch *b, uint32_t part, slot *s)
{
    const xkv_coded *coded = b->coded;
    uint32_t t0, t1;

    xkv_chunk_coded(&b->e->c, part - XKV_PART_CHUNKS, &t0, &t1);
    xkv_rans_shape shape = {t1 - t0, coded->coded, coded->tokens, coded->coded_tables};
    s->size = xkv_rans_encode(xkv_coder_cpu(), &shape, coded->q + (t0 - b->e->c.sinks), s->packed);
    s->method = XKV_METHOD_CODED;
    s->data = s->packed;
}

/* Side part of svdq. */
static void encode_basis(const batch *b, slot *s)
{
    s->size = xkv_svdq_store(b->g, b->coded->basis, b->coded, s->packed);
    s->method = XKV_METHOD_CODED;
    s->data = s->packed;
}

static xkv_status encode_part(const batch *b, uint32_t part, slot *s)
{
    xkv_shape shape = xkv_part_shape(&b->e->c, b->g, part);
    bool factors = b->g->codec == XKV_CODEC_SVD && part != XKV_PART_EXACT;

    if (xkv_shape_bytes(shape) == 0) {
        s->size = 0;
        s->method = XKV_METHOD_STORED;
        return XKV_OK;
    }
    if (shape.coded) {
        if (part == XKV_PART_COMPONENTS)
            encode_basis(b, s);
        else
            encode_chunk(b, part, s);
        return XKV_OK;
    }
    return xkv_part_encode(b->e->ctx, b->e->kernels, s->zstd, factors && !b->e->o.zstd_factors ? 0 : b->e->o.zstd_level,
                           shape, part_matrix(b, part, shape, s), s->planes, s->packed, &s->data, &s->size, &s->method);
}

static xkv_status encode_task(void *user, uint32_t worker, uint64_t index)
{
    batch *b = user;

    (void)worker; /* slots belong to tasks, since their contents outlive the run */
    return encode_part(b, b->first + (uint32_t)index, &b->e->slots[index]);
}

/* Encode all parts of a group in order, and write them; or, with `count_only`, add up their aligned sizes. */
static xkv_status encode_parts(encoder *e, xkv_group *g, const xkv_factors *f, const xkv_coded *coded,
                               uint64_t *count_only)
{
    batch b = {.e = e, .g = g, .f = f, .coded = coded};

    for (; b.first < g->part_count; b.first += e->threads) {
        uint32_t n = (uint32_t)xkv_min64(e->threads, g->part_count - b.first);
        XKV_TRY(xkv_pool_run(e->ctx, e->pool, n, encode_task, &b));
        for (uint32_t i = 0; i < n; i++) {
            const slot *s = &e->slots[i];
            if (count_only)
                *count_only += xkv_align64(s->size, XKV_ALIGN);
            else
                XKV_TRY(xkv_container_add_part(e->ctx, &e->w, &g->parts[b.first + i], s->data, s->size, s->method));
        }
    }
    return XKV_OK;
}

/* Scratch for the largest part of a group, in every slot. */
static xkv_status size_slots(encoder *e, const xkv_group *g, const xkv_coded *coded)
{
    uint64_t raw = 0, packed = 0;

    for (uint32_t i = 0; i < g->part_count; i++) {
        xkv_shape s = xkv_part_shape(&e->c, g, i);
        xkv_rans_shape stream = {(uint32_t)s.rows, coded ? coded->coded : 0, 0, coded ? coded->coded_tables : NULL};
        if (!s.coded)
            raw = xkv_max64(raw, xkv_shape_bytes(s));
        packed = xkv_max64(packed, s.coded ? xkv_rans_bound(&stream) : xkv_part_bound(s));
    }
    if (g->codec == XKV_GROUP_SVDQ)
        packed = xkv_max64(packed, xkv_svdq_bound(g, coded->basis));
    for (uint32_t i = 0; i < e->threads; i++) {
        slot *s = &e->slots[i];
        XKV_TRY(XKV_NEW(e->ctx, (size_t)raw, &s->raw));
        XKV_TRY(XKV_NEW(e->ctx, (size_t)raw, &s->planes));
        XKV_TRY(XKV_NEW(e->ctx, (size_t)packed, &s->packed));
    }
    return XKV_OK;
}

static void release_slots(encoder *e)
{
    for (uint32_t i = 0; i < e->threads; i++) {
        slot *s = &e->slots[i];
        xkv_release(e->ctx, s->raw);
        xkv_release(e->ctx, s->planes);
        xkv_release(e->ctx, s->packed);
        s->raw = s->planes = s->packed = NULL;
    }
}

static xkv_status write_group(encoder *e, xkv_group *g, const xkv_factors *f, const xkv_coded *coded,
                              uint64_t *count_only)
{
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(size_slots(e, g, coded), out);
    XKV_TRY_GOTO(encode_parts(e, g, f, coded, count_only), out);
out:
    release_slots(e);
    return status;
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

static uint64_t group_bytes(const encoder *e, const xkv_group *g)
{
    return xkv_group_row_bytes(&e->c.geometry, g, e->c.geometry.token_count);
}

static void make_lossless(xkv_group *g, uint32_t reason)
{
    g->codec = XKV_CODEC_LOSSLESS;
    g->reason = reason;
    g->rank = 0;
    g->energy = g->error = 0;
    memset(g->plane_errors, 0, g->plane_count * sizeof *g->plane_errors);
}

static void fall_back(encoder *e, xkv_group *g)
{
    make_lossless(g, XKV_REASON_NO_GAIN);
    e->fallbacks++;
}

/* Bytes of the group when stored lossless. */
static xkv_status lossless_bytes(encoder *e, const xkv_group *g, uint64_t *bytes)
{
    xkv_group trial = *g;

    trial.codec = XKV_CODEC_LOSSLESS;
    *bytes = 0;
    return write_group(e, &trial, NULL, NULL, bytes);
}

/* Is rank `rank` larger than lossless? Only looked at closely when it is more than half of the raw bytes, since
 * lossless never gets below that. */
static xkv_status shrinks(encoder *e, const xkv_group *g, uint32_t rank, bool *yes)
{
    uint64_t svd = xkv_plan_svd_bytes(&e->c, g, rank), lossless = 0;

    *yes = true;
    if (svd <= group_bytes(e, g) / 2)
        return XKV_OK;
    XKV_TRY(lossless_bytes(e, g, &lossless));
    *yes = svd < lossless;
    return XKV_OK;
}

/* Largest rank whose factors are smaller than the raw group. */
static uint32_t rank_limit(const encoder *e, const xkv_group *g)
{
    uint64_t tokens = xkv_plan_coded_tokens(&e->c), per_rank = 2 * (tokens + g->width + 2);

    return (uint32_t)xkv_max64(1, xkv_min64(group_bytes(e, g) / per_rank, xkv_min64(tokens, g->width)));
}

static void count_error(encoder *e, const xkv_group *g)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        uint32_t kind = e->c.geometry.planes[g->planes[i]].kind;
        e->kind_squares[kind] += g->plane_errors[i] * g->plane_errors[i] * g->plane_energies[i];
        e->kind_energy[kind] += g->plane_energies[i];
    }
}

static xkv_status pack_svd(encoder *e, xkv_group *g)
{
    xkv_svd_target target = {.rank = g->rank, .max_rank = rank_limit(e, g), .iterations = e->o.iterations};
    uint32_t end = e->c.geometry.token_count - e->c.window;
    xkv_factors f = {0};
    bool good = true;
    xkv_status status = XKV_OK;

    target.error = e->o.energy > 0 ? sqrt(1 - e->o.energy) : e->o.error;
    if (target.error == 0)
        XKV_TRY(shrinks(e, g, g->rank, &good)); /* a fixed rank tells its size before the work is done */
    if (good)
        XKV_TRY_GOTO(xkv_factorize(e->ctx, e->pool, e->rotators, g, e->views, e->c.sinks, end, &target, &f, &good),
                     out);
    if (good && target.error > 0)
        XKV_TRY_GOTO(shrinks(e, g, f.rank, &good), out);
    if (good) {
        count_error(e, g);
    } else {
        xkv_factors_free(e->ctx, &f);
        fall_back(e, g);
    }
    XKV_TRY_GOTO(write_group(e, g, &f, NULL, NULL), out);
out:
    xkv_factors_free(e->ctx, &f);
    return status;
}

/* Without a metric: errors in units of the planes' scales, against what the rows are without their mean. */
static void weigh_planes(const encoder *e, const xkv_group *g, xkv_coded *coded)
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
static uint32_t coded_end(const encoder *e)
{
    uint64_t end = e->c.geometry.token_count - e->c.window;

    return (uint32_t)(e->trial ? xkv_min64(end, (uint64_t)e->c.sinks + XKV_SAMPLE_TOKENS) : end);
}

/* Components of svdq that are worth their bits at the step, rounded. */
static xkv_status round_basis(encoder *e, xkv_group *g, xkv_svdq_basis *basis, xkv_transform *t)
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
    XKV_TRY_GOTO(xkv_code_group(e->ctx, e->pool, e->rotators, g, e->views, e->c.sinks, end, t, e->step, NULL,
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
static xkv_group *cross_group(const encoder *e)
{
    return e->c.group_count > 0 && xkv_group_is_cross(&e->c.groups[0]) ? &e->c.groups[0] : NULL;
}

/* Store the groups lossless that make the cross stage overflow; all of them, if need be. */
static void drop_large(encoder *e, const float *norms, bool all)
{
    for (uint32_t i = 0; i < e->c.group_count; i++)
        if (xkv_takes_part(&e->c, e->transforms, i) &&
            (all || xkv_cross_too_large(norms[i], e->step, e->c.group_count)))
            fall_back(e, &e->c.groups[i]);
}

/* Code the cross stage at e->step, in place of what was there. */
static xkv_status code_cross(encoder *e)
{
    float *norms = NULL;
    xkv_status status = XKV_OK;

    if (!cross_group(e))
        return XKV_OK;
    XKV_TRY(XKV_NEW(e->ctx, e->c.group_count, &norms));
    for (int attempt = 0; attempt < 3; attempt++) {
        xkv_coded_free(e->ctx, &e->cross);
        XKV_TRY_GOTO(xkv_code_cross(e->ctx, e->pool, e->rotators, &e->c, e->views, e->c.sinks, coded_end(e),
                                    e->transforms, e->o.dict->cross, e->step, norms, &e->cross),
                     out);
        if (!e->cross.overflow)
            break;
        drop_large(e, norms, attempt > 0);
    }
out:
    xkv_release(e->ctx, norms);
    return status;
}

/* The rows of a group, with the share of the cross stage if it has one. */
static xkv_status code_with_cross(encoder *e, xkv_group *g, const xkv_transform *t, xkv_coded *coded)
{
    xkv_cross cross = {0};
    bool crossed = cross_group(e) && xkv_takes_part(&e->c, e->transforms, (uint32_t)(g - e->c.groups));

    if (crossed)
        cross = xkv_cross_of_coded(e->o.dict->cross, &e->cross);
    return xkv_code_group(e->ctx, e->pool, e->rotators, g, e->views, e->c.sinks, coded_end(e), t, e->step,
                          crossed ? &cross : NULL, (xkv_integers){crossed ? e->cross.q : NULL, e->cross.tokens}, coded);
}

/* `basis` is set for svdq; the caller frees it and `coded`. */
static xkv_status code_group(encoder *e, xkv_group *g, xkv_svdq_basis *basis, xkv_coded *coded)
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

static xkv_status pack_cross(encoder *e, xkv_group *g)
{
    XKV_TRY(code_cross(e));
    e->components += e->cross.coded;
    return write_group(e, g, NULL, &e->cross, NULL);
}

/* Is a coded group smaller than lossless, which never gets below half of the raw bytes? */
static xkv_status is_smaller(encoder *e, xkv_group *g, const xkv_coded *coded, bool *yes)
{
    uint64_t bytes = 0, lossless = 0;

    *yes = true;
    XKV_TRY(write_group(e, g, NULL, coded, &bytes));
    if (bytes <= group_bytes(e, g) / 2)
        return XKV_OK;
    XKV_TRY(lossless_bytes(e, g, &lossless));
    *yes = bytes < lossless;
    return XKV_OK;
}

/* A group with a coefficient that its 16 bits do not hold is stored lossless: an outlier costs bytes, not quality. So
 * is one that the quantizer does not make smaller. */
static xkv_status pack_coded(encoder *e, xkv_group *g)
{
    xkv_svdq_basis basis = {0};
    xkv_coded coded = {0};
    double squares = e->metric_squares, energy = e->metric_energy;
    bool good;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(code_group(e, g, &basis, &coded), out);
    good = !coded.overflow;
    if (good && (coded.basis || coded.bits / 8 > (double)group_bytes(e, g) / 4)) /* else there is no need to look */
        XKV_TRY_GOTO(is_smaller(e, g, &coded, &good), out);
    if (!good) {
        e->metric_squares = squares;
        e->metric_energy = energy;
        fall_back(e, g);
        XKV_TRY_GOTO(write_group(e, g, NULL, NULL, NULL), out);
        goto out;
    }
    count_error(e, g);
    e->components += coded.coded;
    e->component_total +=
        g->codec == XKV_GROUP_SVDQ ? g->width : coded.rank; /* those of the cross stage are among them */
    XKV_TRY_GOTO(write_group(e, g, NULL, &coded, NULL), out);
out:
    xkv_coded_free(e->ctx, &coded);
    xkv_svdq_basis_free(e->ctx, &basis);
    return status;
}

static xkv_status pack_group(encoder *e, xkv_group *g)
{
    if (g->codec == XKV_CODEC_SVD)
        return pack_svd(e, g);
    if (xkv_group_is_cross(g))
        return pack_cross(e, g);
    return g->codec == XKV_CODEC_LOSSLESS ? write_group(e, g, NULL, NULL, NULL) : pack_coded(e, g);
}

static xkv_status pack_groups(encoder *e)
{
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        xkv_group *g = &e->c.groups[i];
        XKV_TRY(pack_group(e, g));
        XKV_TRY(report_progress(e, group_bytes(e, g)));
    }
    return XKV_OK;
}

/* --- Rate --------------------------------------------------------------------------------------------------------- */

/* Payload bytes that do not depend on the ranks: lossless groups, and the exact rows of the others. */
static xkv_status fixed_bytes(encoder *e, uint64_t *bytes)
{
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        xkv_group *g = &e->c.groups[i], exact = *g;
        if (g->codec != XKV_CODEC_LOSSLESS) { /* what is left are its exact rows */
            exact.codec = XKV_CODEC_SVD;
            exact.part_count = XKV_PART_CHUNKS;
            exact.rank = 0;
        }
        XKV_TRY(write_group(e, &exact, NULL, NULL, bytes));
    }
    return XKV_OK;
}

static xkv_status choose_ranks(encoder *e)
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

static xkv_status decompose_group(encoder *e, uint32_t group, uint32_t most)
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
        fall_back(e, g);
    else
        e->transforms[group] = xkv_transform_of_svdq(&e->svdqs[group]);
    return xkv_check_cancel(e->ctx);
}

/* What errors of a group are measured with: when auto compares with a dictionary its metric, where it has one. */
static const float *find_blocks(const encoder *e, const xkv_group *g)
{
    const xkv_basis *basis = e->automatic && e->o.dict ? xkv_dict_basis(e->o.dict, &e->c.geometry, g) : NULL;

    return basis ? basis->blocks : NULL;
}

static xkv_status make_transforms(encoder *e)
{
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        const xkv_group *g = &e->c.groups[i];
        if (g->codec == XKV_GROUP_CROSS)
            e->transforms[i] = (xkv_transform){.rank = g->rank};
        if (g->codec == XKV_CODEC_DICT)
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
    return g->codec == XKV_CODEC_SCALAR ? 4.0 * g->plane_count + 2.0 * g->width : 0;
}

/* Bytes that do not depend on the step: the head, the exact rows, lossless groups, and what every stream costs whatever
 * it holds. */
static xkv_status bytes_beside_streams(encoder *e, double *bytes)
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
static xkv_status stream_budget(encoder *e, double beside, double *bytes)
{
    *bytes = (double)xkv_raw16_bytes(&e->c.geometry) / e->o.ratio - beside;
    if (*bytes <= 0)
        return xkv_fail(e->ctx, XKV_ERROR_TARGET,
                        "a ratio of %g is out of reach: tables and exact rows alone take %.0f bytes", e->o.ratio,
                        beside);
    return XKV_OK;
}

static double metric_error(const encoder *e)
{
    return xkv_relative_error(e->metric_squares, e->metric_energy);
}

/* The error of all coded groups at e->step, or that of the worst one over XKV_GROUP_SLACK; with `drop`, groups that
 * exceed `drop` by themselves become lossless. */
static xkv_status measure_error(encoder *e, double drop, double *error)
{
    double worst = 0;

    e->metric_squares = e->metric_energy = 0;
    XKV_TRY(code_cross(e));
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        xkv_group *g = &e->c.groups[i];
        xkv_svdq_basis basis = {0};
        xkv_coded coded = {0};
        xkv_status status;
        if (g->codec == XKV_GROUP_LOSSLESS || g->codec == XKV_GROUP_SVD || xkv_group_is_cross(g))
            continue;
        status = code_group(e, g, &basis, &coded);
        worst = fmax(worst, xkv_relative_error(coded.metric_squares, coded.metric_energy));
        if (status == XKV_OK && drop > 0 && coded.metric_squares > drop * drop * coded.metric_energy)
            fall_back(e, g);
        xkv_coded_free(e->ctx, &coded);
        xkv_svdq_basis_free(e->ctx, &basis);
        XKV_TRY(status);
        XKV_TRY(xkv_check_cancel(e->ctx));
    }
    *error = fmax(metric_error(e), worst / XKV_GROUP_SLACK);
    e->metric_squares = e->metric_energy = 0;
    return XKV_OK;
}

/* The step was chosen on a sample, as if the basis were orthonormal: refine it until the measured error is as asked. On
 * rows unlike those it was trained on the rounding of a basis sets a floor, which no step gets below; then the groups
 * that are above the error by themselves are stored lossless, which leaves the rest below it. */
static xkv_status keep_error(encoder *e)
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
static xkv_status check_step(const encoder *e)
{
    if (isfinite(e->step) && e->step > 0)
        return XKV_OK;
    return xkv_fail(e->ctx, XKV_ERROR_TARGET, "the target needs a step of %g, expected finite and positive [Q3]",
                    (double)e->step);
}

/* An estimate is of no use when its error is further from the one that is asked for. */
#define ERROR_TOLERANCE 1.02

/* The error in a dictionary's metric at e->step; with an error to be kept, at the step that comes near it. */
static xkv_status measure_in_metric(encoder *e, double *error)
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
static xkv_status estimate(encoder *e, xkv_sample *sample, double beside)
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
static xkv_status count_bytes(encoder *e, uint64_t *bytes)
{
    *bytes = xkv_container_head_size(&e->w);
    for (uint32_t i = 0; i < e->c.group_count; i++) {
        xkv_group *g = &e->c.groups[i], exact = *g;
        xkv_svdq_basis basis = {0};
        xkv_coded coded = {0};
        xkv_status status = XKV_OK;
        exact.codec = XKV_GROUP_LOSSLESS;
        if (g->codec != XKV_GROUP_LOSSLESS)
            status = code_group(e, g, &basis, &coded);
        if (status == XKV_OK)
            status = write_group(e, coded.tables ? g : &exact, NULL, &coded, bytes);
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
static xkv_status correct_step(encoder *e, xkv_sample *sample, double bytes)
{
    uint64_t found;

    XKV_TRY(check_step(e));
    XKV_TRY(count_bytes(e, &found));
    bytes += (double)xkv_raw16_bytes(&e->c.geometry) / e->o.ratio - (double)found;
    return xkv_sample_step(e->ctx, e->pool, sample, bytes, 0, &e->step);
}

static xkv_status choose_step(encoder *e)
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

static xkv_status prepare_coded(encoder *e)
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

static void release_transforms(encoder *e)
{
    for (uint32_t i = 0; e->scalars && i < e->c.group_count; i++)
        xkv_scalar_free(e->ctx, &e->scalars[i]);
    xkv_release(e->ctx, e->scalars);
    xkv_release(e->ctx, e->transforms);
    e->scalars = NULL;
    e->transforms = NULL;
}

static void release_decompositions(encoder *e)
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

static xkv_status plan(encoder *e, const xkv_output *output)
{
    XKV_TRY(xkv_plan_groups(e->ctx, &e->o, xkv_plan_quantized(&e->o), e->nonfinite, &e->c));
    return xkv_container_begin(e->ctx, &e->c, output, e->o.zstd_level, &e->w);
}

/* Estimate what a profile would come to, at the price of projecting a sample. A decomposition of all tokens is kept: it
 * is needed again if the profile is taken. */
static xkv_status try_profile(encoder *e, uint32_t profile)
{
    xkv_output nowhere = {NULL, discard};
    xkv_status status = XKV_OK;

    e->o.profile = profile;
    e->trial = true;
    XKV_TRY_GOTO(plan(e, &nowhere), out);
    XKV_TRY_GOTO(prepare_coded(e), out);
out:
    e->trial = false;
    xkv_container_writer_free(e->ctx, &e->w);
    release_transforms(e);
    if (status != XKV_OK || xkv_plan_coded_tokens(&e->c) > XKV_SAMPLE_TOKENS)
        release_decompositions(e);
    xkv_plan_release(e->ctx, &e->c);
    e->fallbacks = 0;
    return status;
}

/* Bytes when all is lossless. */
static xkv_status try_lossless(encoder *e)
{
    xkv_output nowhere = {NULL, discard};
    uint64_t bytes = 0;
    xkv_status status = XKV_OK;

    e->o.profile = XKV_PROFILE_LOSSLESS;
    XKV_TRY_GOTO(plan(e, &nowhere), out);
    bytes = xkv_container_head_size(&e->w);
    XKV_TRY_GOTO(fixed_bytes(e, &bytes), out);
    e->estimates[XKV_PROFILE_LOSSLESS].bytes = (double)bytes;
out:
    xkv_container_writer_free(e->ctx, &e->w);
    xkv_plan_release(e->ctx, &e->c);
    return status;
}

/* Is profile a better than b? The smaller for an error, the one of less error for a ratio. */
static bool is_better(const encoder *e, uint32_t a, uint32_t b)
{
    const xkv_profile_estimate *x = &e->estimates[a], *y = &e->estimates[b];

    if (x->bytes == 0 || y->bytes == 0)
        return x->bytes > 0;
    return e->o.ratio > 0 ? x->error < y->error : x->bytes < y->bytes;
}

static xkv_status choose_profile(encoder *e)
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
    if (e->o.error > 0 && e->estimates[best].bytes > (double)xkv_raw16_bytes(&e->c.geometry) / 2) {
        XKV_TRY(try_lossless(e)); /* which never gets below half */
        if (is_better(e, XKV_PROFILE_LOSSLESS, best))
            best = XKV_PROFILE_LOSSLESS;
    }
    if (best != XKV_PROFILE_SVD)
        release_decompositions(e);
    e->o.profile = best;
    return XKV_OK;
}

/* --- Preparation -------------------------------------------------------------------------------------------------- */

static xkv_status scan_plane(void *user, uint32_t worker, uint64_t index)
{
    encoder *e = user;
    const xkv_plane *p = &e->c.geometry.planes[index];
    size_t row_bytes = xkv_plane_width(p) * xkv_dtype_size(p->dtype);
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
static xkv_status find_nonfinite(encoder *e)
{
    size_t row = 0;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW_ZERO(e->ctx, e->c.geometry.plane_count, &e->nonfinite));
    for (uint32_t i = 0; i < e->c.geometry.plane_count; i++)
        row = (size_t)xkv_max64(row, xkv_plane_width(&e->c.geometry.planes[i]) * 4ull);
    for (uint32_t i = 0; i < e->threads; i++)
        XKV_TRY_GOTO(XKV_NEW(e->ctx, row * XKV_TILE_ROWS, &e->slots[i].raw), out);
    XKV_TRY_GOTO(xkv_pool_run(e->ctx, e->pool, e->c.geometry.plane_count, scan_plane, e), out);
out:
    release_slots(e);
    return status;
}

static xkv_status check_planes(const encoder *e)
{
    const xkv_geometry *geometry = &e->c.geometry;

    for (uint32_t i = 0; i < geometry->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[i];
        if (p->heads == 0 || p->head_dim == 0 || (uint64_t)p->heads * p->head_dim > XKV_MAX_WIDTH ||
            p->kind > XKV_PLANE_K_ROPE || xkv_dtype_size(p->dtype) == 0 || p->layer >= geometry->layer_count ||
            (p->rope != XKV_NO_ROPE && p->rope >= geometry->rope_count))
            return xkv_fail(e->ctx, XKV_ERROR_ARGUMENT, "plane %u: shape, kind, dtype, layer or rope out of range", i);
        if (e->views[i].dtype != p->dtype)
            return xkv_fail(e->ctx, XKV_ERROR_ARGUMENT, "plane %u: the view's dtype is not the plane's", i);
    }
    return XKV_OK;
}

static xkv_status init(encoder *e)
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

static void fini(encoder *e)
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
    release_decompositions(e);
    release_transforms(e);
    xkv_plan_release(e->ctx, &e->c);
}

/* --- Metadata ----------------------------------------------------------------------------------------------------- */

/* In ascending order of the keys [M3]. Returns where error.metric, which is known last, is kept. */
static uint8_t *set_values(const encoder *e, xkv_values *v)
{
    const xkv_framing *f = &e->c.framing;
    uint8_t *error = NULL;

    if (e->o.profile == XKV_PROFILE_DICT)
        xkv_values_add_bytes(v, "dictionary.id", e->o.dict->c.content_id, 16);
    if (e->c.has_framing && f->engine == XKV_ENGINE_LLAMA_SEQUENCE && f->literal_size >= 8)
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

static void fill_report(const encoder *e, uint64_t file_size, xkv_pack_report *r)
{
    *r = (xkv_pack_report){0};
    r->raw_bytes = xkv_geometry_raw_bytes(&e->c.geometry);
    r->raw16_bytes = xkv_raw16_bytes(&e->c.geometry);
    r->entry_bytes = file_size;
    r->ratio = (double)r->raw16_bytes / (double)file_size;
    for (int kind = 0; kind < 4; kind++)
        r->error[kind] = xkv_relative_error(e->kind_squares[kind], e->kind_energy[kind]);
    r->group_count = e->c.group_count;
    r->fallback_groups = e->fallbacks;
    r->step = (double)e->step;
    r->error_metric = metric_error(e);
    r->profile = e->o.profile;
    memcpy(r->estimates, e->estimates, sizeof r->estimates);
    r->components = e->components;
    r->component_total = e->component_total;
    for (uint32_t i = 0; i < e->c.group_count; i++)
        r->lossless_groups += e->c.groups[i].codec == XKV_CODEC_LOSSLESS;
    for (uint32_t i = 0; i < e->c.geometry.plane_count; i++)
        r->nonfinite_planes += e->nonfinite[i];
}

/* --- Entry points ------------------------------------------------------------------------------------------------- */

static void set_framing(encoder *e, const xkv_framing *framing, const void *source, uint64_t source_size)
{
    XXH128_canonical_t hash;

    if (!framing)
        return;
    e->c.has_framing = true;
    e->c.framing = *framing;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(source, (size_t)source_size));
    memcpy(e->c.source_hash, hash.digest, 16);
}

static xkv_status pack(encoder *e, const xkv_output *output, xkv_pack_report *report)
{
    xkv_values values = {.count = 0};
    uint8_t *error;
    uint64_t file_size;

    XKV_TRY(init(e));
    if (e->o.profile == XKV_PROFILE_AUTO)
        XKV_TRY(choose_profile(e));
    error = set_values(e, &values);
    e->c.values = values.list;
    e->c.value_count = values.count;
    XKV_TRY(plan(e, output));
    if (e->o.ratio > 0 && !xkv_plan_quantized(&e->o))
        XKV_TRY(choose_ranks(e));
    XKV_TRY(prepare_coded(e));
    XKV_TRY(pack_groups(e));
    if (error)
        xkv_storef64(error, metric_error(e));
    XKV_TRY(xkv_container_finish(e->ctx, &e->w, &file_size));
    if (report)
        fill_report(e, file_size, report);
    return XKV_OK;
}

xkv_status xkv_pack(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_view *views, const xkv_framing *framing,
                    const void *source, uint64_t source_size, const xkv_pack_options *options, const xkv_output *output,
                    xkv_pack_report *report)
{
    encoder e = {.ctx = ctx, .kernels = xkv_kernels_cpu(), .views = views};
    xkv_status status;

    xkv_ctx_begin(ctx);
    if (framing && (!source || source_size != framing->source_size))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a framing needs the engine's file it was made from");
    XKV_TRY(xkv_plan_options(ctx, options, &e.o));
    e.c.geometry = *geometry;
    e.total = xkv_geometry_raw_bytes(geometry);
    set_framing(&e, framing, source, source_size);
    status = pack(&e, output, report);
    fini(&e);
    return status;
}

xkv_status xkv_pack_cache(xkv_ctx *ctx, const xkv_cache *cache, const xkv_pack_options *options,
                          const xkv_output *output, xkv_pack_report *report)
{
    uint64_t size;
    const uint8_t *data = xkv_cache_data(cache, &size);

    return xkv_pack(ctx, xkv_cache_geometry(cache), xkv_cache_views(cache), xkv_cache_framing(cache), data, size,
                    options, output, report);
}
