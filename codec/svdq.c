#include "svdq.h"

#include "rate.h"

#include <math.h>

/* Sum of squares beyond which products of the decomposition could overflow f32: such rows are no activations. */
#define MAX_ENERGY 0x1p118
/* Added to the diagonal of the Gram matrix of rounded components, whose rows are of about unit length. */
#define RIDGE 1e-6

enum { BLOCK_ROWS = 256, OCTAVE = 8, MAX_EXPONENT = 255, FIELD_BITS = 24 }; /* of exponent and two tables */

/* --- Decomposition ------------------------------------------------------------------------------------------------ */

/* The group's rows, normalised. */
typedef struct rows {
    xkv_ctx *ctx;
    xkv_rotator *rotators;
    const xkv_group *g;
    const xkv_view *views;
    const xkv_svdq_target *target;
    const xkv_scalar *scale;
    uint32_t count; /* taken */
    float *x;       /* [count][width] */
    double *sums;   /* of squares, [tiles] */
} rows;

static xkv_status gather_tile(void *user, uint32_t worker, uint64_t tile)
{
    const rows *r = user;
    uint32_t coded = r->target->t1 - r->target->t0, token;
    uint32_t n = xkv_sample_tile(coded, r->count, (uint32_t)tile, &token);
    size_t width = r->g->width, elements = n * width;
    float *x = r->x + tile * XKV_TILE_ROWS * width;

    token += r->target->t0;
    XKV_TRY(xkv_gather_rows(r->ctx, &r->rotators[worker], r->g, r->views, token, token + n, x));
    for (size_t i = 0, k = 0; i < elements; i++, k = k + 1 < width ? k + 1 : 0)
        x[i] = (x[i] - r->scale->mean[k]) / r->scale->diagonal[k];
    r->sums[tile] = r->rotators->kernels->sum_squares(x, elements);
    return XKV_OK;
}

static xkv_status gather(rows *r, xkv_pool *pool, double *energy)
{
    uint64_t tiles = xkv_ceil_div(r->count, XKV_TILE_ROWS);

    XKV_TRY(XKV_NEW(r->ctx, (size_t)r->count * r->g->width, &r->x));
    XKV_TRY(XKV_NEW(r->ctx, (size_t)tiles, &r->sums));
    XKV_TRY(xkv_pool_run(r->ctx, pool, tiles, gather_tile, r));
    *energy = 0;
    for (uint64_t i = 0; i < tiles; i++)
        *energy += r->sums[i];
    return XKV_OK;
}

static xkv_status decompose(const rows *r, xkv_pool *pool, double energy, xkv_svd_result *svd)
{
    xkv_svd_options o = {.rank = r->target->max_rank,
                         .energy = r->target->energy,
                         .max_rank = r->target->max_rank,
                         .iterations = r->target->iterations,
                         .total = energy};

    return xkv_svd(r->ctx, pool, r->rotators->kernels, r->x, r->count, r->g->width, &o, svd);
}

/* Take the components over, in the form that rows before normalisation are analysed with. */
static xkv_status take(xkv_ctx *ctx, xkv_svd_result *svd, double share, xkv_svdq *s)
{
    size_t width = s->width;

    s->rank = svd->rank;
    XKV_TRY(XKV_NEW(ctx, s->rank, &s->offset));
    XKV_TRY(XKV_NEW(ctx, s->rank, &s->largest));
    s->analysis = svd->components;
    s->singular = svd->singular_values;
    svd->components = svd->singular_values = NULL;
    for (size_t j = 0; j < s->rank; j++) {
        float *row = s->analysis + j * width, largest = 0;
        double offset = 0;
        for (size_t i = 0; i < width; i++) {
            largest = fabsf(row[i]) > largest ? fabsf(row[i]) : largest;
            row[i] /= s->scale.diagonal[i];
            offset += (double)row[i] * (double)s->scale.mean[i];
        }
        s->offset[j] = (float)offset;
        s->largest[j] = largest;
        s->singular[j] *= (float)sqrt(1 / share);
    }
    return XKV_OK;
}

xkv_status xkv_svdq_create(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, const xkv_group *g,
                           const xkv_view *views, const xkv_svdq_target *target, xkv_svdq *s)
{
    uint32_t coded = target->t1 - target->t0;
    rows r = {.ctx = ctx,
              .rotators = rotators,
              .g = g,
              .views = views,
              .target = target,
              .scale = &s->scale,
              .count = (uint32_t)xkv_min64(coded, target->most)};
    xkv_svd_result svd = {0};
    double energy;
    xkv_status status = XKV_OK;

    *s = (xkv_svdq){.width = g->width, .tokens = coded};
    XKV_TRY_GOTO(xkv_scalar_create(ctx, rotators, g, views, target->t0, target->t1, &s->scale), out);
    XKV_TRY_GOTO(gather(&r, pool, &energy), out);
    if (!(energy <= MAX_ENERGY))
        goto out;
    XKV_TRY_GOTO(decompose(&r, pool, energy, &svd), out);
    XKV_TRY_GOTO(take(ctx, &svd, (double)r.count / coded, s), out);
    s->found = energy > 0 ? fmin(svd.captured / energy, 1) : 1;
out:
    xkv_release(ctx, r.x);
    xkv_release(ctx, r.sums);
    xkv_svd_result_free(ctx, &svd);
    return status;
}

void xkv_svdq_free(xkv_ctx *ctx, xkv_svdq *s)
{
    xkv_scalar_free(ctx, &s->scale);
    xkv_release(ctx, s->analysis);
    xkv_release(ctx, s->offset);
    xkv_release(ctx, s->singular);
    xkv_release(ctx, s->largest);
    *s = (xkv_svdq){0};
}

xkv_transform xkv_transform_of_svdq(const xkv_svdq *s)
{
    return (xkv_transform){.rank = s->rank,
                           .width = s->width,
                           .mean = s->scale.mean,
                           .analysis = s->analysis,
                           .offset = s->offset,
                           .own = s};
}

/* --- Rounding ----------------------------------------------------------------------------------------------------- */

/* An eighth of an octave at a time: 2^(-exponent / 8), rounded to f32. */
static float component_step(uint32_t exponent)
{
    return ldexpf((float)exp2(-(double)(exponent % OCTAVE) / OCTAVE), -(int)(exponent / OCTAVE));
}

/* Rounding component j adds noise of singular^2 d^2 / 12 to each column of the rows, rounding its coefficients step^2 /
 * 12 to each token: one bit more for a number of either lowers the error alike when singular * d = step. */
static uint32_t choose_exponent(float singular, float step, float largest)
{
    double wanted = round(OCTAVE * log2((double)singular / (double)step));
    double fits = floor(OCTAVE * log2(32767 / (double)largest)); /* q has 16 bits */

    return (uint32_t)fmin(fmax(fmin(wanted, fits), 0), MAX_EXPONENT);
}

/* Share of the energy of coefficients of v that is lost when they are coefficients of w = q d. */
static double lost_share(const float *v, const int16_t *q, size_t n, float d)
{
    double product = 0, norm = 0, length = 0;

    for (size_t i = 0; i < n; i++) {
        float w = (float)q[i] * d;
        product += (double)(w * v[i]);
        norm += (double)(w * w);
        length += (double)(v[i] * v[i]);
    }
    return norm > 0 ? fmax(0, 1 - product * product / (norm * length)) : 1;
}

xkv_component_price xkv_svdq_price(const xkv_svdq *s, uint32_t j, float step, float *v, int16_t *q)
{
    xkv_component_price price = {.bits = INFINITY, .lost = 1};
    const float *row = s->analysis + (size_t)j * s->width;
    float d;

    if (s->singular[j] < step) /* see useful_rank() */
        return price;
    for (size_t i = 0; i < s->width; i++)
        v[i] = row[i] * s->scale.diagonal[i];
    price.exponent = choose_exponent(s->singular[j], step, s->largest[j]);
    d = component_step(price.exponent);
    if (!xkv_quantize(xkv_coder_cpu(), v, s->width, d, q))
        return price;
    price.table = (uint8_t)xkv_table_choose(q, s->width, &price.bits);
    price.bits += FIELD_BITS;
    price.lost = lost_share(v, q, s->width, d);
    return price;
}

/* The mean is a component whose coefficients are all 1: its singular value is sqrt(tokens). False when it does not fit
 * its 16 bits. */
static bool round_mean(const xkv_svdq *s, float step, float *v, int16_t *q, float *mean_step)
{
    float largest = 0;

    for (size_t i = 0; i < s->width; i++) {
        v[i] = s->scale.mean[i] / s->scale.diagonal[i];
        largest = fabsf(v[i]) > largest ? fabsf(v[i]) : largest;
    }
    *mean_step = fmaxf(step / sqrtf((float)s->tokens), largest / 32766);
    return xkv_quantize(xkv_coder_cpu(), v, s->width, *mean_step, q);
}

double xkv_svdq_mean_bits(const xkv_svdq *s, float step, float *v, int16_t *q)
{
    float mean_step;
    double bits;

    if (!round_mean(s, step, v, q, &mean_step))
        return INFINITY;
    (void)xkv_table_choose(q, s->width, &bits);
    return bits;
}

static xkv_status allocate(xkv_ctx *ctx, uint32_t rank, uint32_t width, xkv_svdq_basis *b)
{
    b->rank = rank;
    b->width = width;
    XKV_TRY(XKV_NEW_ZERO(ctx, rank, &b->exponents));
    XKV_TRY(XKV_NEW_ZERO(ctx, rank + 1u, &b->tables));
    return XKV_NEW_ZERO(ctx, ((size_t)rank + 1) * width, &b->q);
}

/* Components that may be worth something: the coefficients of the others are nearly all zero. */
static uint32_t useful_rank(const xkv_svdq *s, float step)
{
    uint32_t n = 0;

    while (n < s->rank && s->singular[n] >= step)
        n++;
    return n > 0 ? n : 1;
}

xkv_status xkv_svdq_round(xkv_ctx *ctx, const xkv_svdq *s, float step, xkv_svdq_basis *b)
{
    float *scratch = NULL;
    double bits;
    xkv_status status = XKV_OK;

    *b = (xkv_svdq_basis){.scales = s->scale.scales};
    XKV_TRY_GOTO(allocate(ctx, useful_rank(s, step), s->width, b), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, b->rank, &b->bits), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, b->rank, &b->lost), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, s->width, &scratch), out);
    b->overflow = !round_mean(s, step, scratch, b->q, &b->mean_step);
    if (b->overflow)
        goto out;
    b->tables[0] = (uint8_t)xkv_table_choose(b->q, s->width, &bits);
    for (uint32_t j = 0; j < b->rank; j++) {
        xkv_component_price price = xkv_svdq_price(s, j, step, scratch, b->q + (size_t)(j + 1) * s->width);
        b->exponents[j] = (uint8_t)price.exponent;
        b->tables[j + 1] = price.table;
        b->bits[j] = price.bits;
        b->lost[j] = price.lost;
    }
out:
    xkv_release(ctx, scratch);
    if (status != XKV_OK)
        xkv_svdq_basis_free(ctx, b);
    return status;
}

void xkv_svdq_select(xkv_svdq_basis *b, const uint8_t *tables)
{
    size_t width = b->width;
    uint32_t n = 0;

    for (uint32_t j = 0; j < b->rank; j++) {
        if (tables[j] == 0 || b->tables[j + 1] == 0)
            continue;
        memmove(b->q + (n + 1) * width, b->q + (j + 1) * width, width * sizeof *b->q);
        b->exponents[n] = b->exponents[j];
        b->tables[++n] = b->tables[j + 1];
    }
    if (n == 0) { /* a group has a component [R4]; this one is not coded */
        memset(b->q + width, 0, width * sizeof *b->q);
        b->tables[++n] = 0;
    }
    b->rank = n;
}

/* What the stored numbers stand for. */
static xkv_status dequantize(xkv_ctx *ctx, const xkv_kernels *k, const float *diagonal, xkv_svdq_basis *b)
{
    size_t width = b->width;
    float *row = NULL;

    XKV_TRY(XKV_NEW(ctx, width, &b->mean));
    XKV_TRY(xkv_panels_create(ctx, k, b->rank, width, &b->rows));
    XKV_TRY(XKV_NEW(ctx, width, &row));
    for (size_t i = 0; i < width; i++)
        b->mean[i] = (float)b->q[i] * b->mean_step * diagonal[i];
    for (size_t j = 0; j < b->rank; j++) {
        float d = component_step(b->exponents[j]);
        const int16_t *q = b->q + (j + 1) * width;
        for (size_t i = 0; i < width; i++)
            row[i] = (float)q[i] * d * diagonal[i];
        xkv_panels_set(&b->rows, j, 1, row);
    }
    xkv_release(ctx, row);
    return XKV_OK;
}

/* --- Dual basis --------------------------------------------------------------------------------------------------- */

/* Rounding has cost the components their orthonormality: rows are analysed by least squares, with the rows of
 * (W W^T)^-1 W, so that the coefficients make good what part of the noise the other components can express. */
typedef struct dual {
    const xkv_kernels *kernels;
    const xkv_svdq_basis *b;
    const float *w; /* [rank][width] components */
    float *gram, *analysis;
} dual;

static xkv_status gram_block(void *user, uint32_t worker, uint64_t block)
{
    const dual *d = user;
    size_t rank = d->b->rank, width = d->b->width, first = block * BLOCK_ROWS;

    (void)worker;
    d->kernels->gemm_nt((size_t)xkv_min64(BLOCK_ROWS, rank - first), rank, width, d->w + first * width, width, d->w,
                        width, 0, d->gram + first * rank, rank);
    return XKV_OK;
}

static xkv_status dual_block(void *user, uint32_t worker, uint64_t block)
{
    const dual *d = user;
    size_t rank = d->b->rank, width = d->b->width, first = block * BLOCK_ROWS;

    (void)worker;
    d->kernels->gemm_nn((size_t)xkv_min64(BLOCK_ROWS, rank - first), width, rank, d->gram + first * rank, rank, d->w,
                        width, 0, d->analysis + first * width, width);
    return XKV_OK;
}

/* b->analysis and b->offset, from b->rows. */
static xkv_status make_dual(xkv_ctx *ctx, xkv_pool *pool, const xkv_kernels *k, const float *diagonal,
                            xkv_svdq_basis *b)
{
    size_t n = (size_t)b->rank * b->width;
    uint64_t blocks = xkv_ceil_div(b->rank, BLOCK_ROWS);
    float *w = NULL;
    dual d = {.kernels = k, .b = b};
    bool regular;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(XKV_NEW(ctx, n, &b->analysis), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, b->rank, &b->offset), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, n, &w), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)b->rank * b->rank, &d.gram), out);
    d.w = w;
    d.analysis = b->analysis;
    xkv_panels_get(&b->rows, 0, b->rank, w);
    for (size_t i = 0; i < n; i++)
        w[i] /= diagonal[i % b->width];
    XKV_TRY_GOTO(xkv_pool_run(ctx, pool, blocks, gram_block, &d), out);
    XKV_TRY_GOTO(xkv_gram_inverse(ctx, b->rank, RIDGE, d.gram, &regular), out);
    if (!regular) {
        status = xkv_fail(ctx, XKV_ERROR_BACKEND, "components of rank %u became dependent", b->rank);
        goto out;
    }
    XKV_TRY_GOTO(xkv_pool_run(ctx, pool, blocks, dual_block, &d), out);
    for (size_t j = 0; j < b->rank; j++) {
        float *row = b->analysis + j * b->width;
        double offset = 0;
        for (size_t i = 0; i < b->width; i++) {
            row[i] /= diagonal[i];
            offset += (double)row[i] * (double)b->mean[i];
        }
        b->offset[j] = (float)offset;
    }
out:
    xkv_release(ctx, w);
    xkv_release(ctx, d.gram);
    return status;
}

xkv_status xkv_svdq_finish(xkv_ctx *ctx, xkv_pool *pool, const xkv_kernels *k, const xkv_svdq *s, xkv_svdq_basis *b)
{
    XKV_TRY(dequantize(ctx, k, s->scale.diagonal, b));
    return make_dual(ctx, pool, k, s->scale.diagonal, b);
}

void xkv_svdq_close_up(xkv_svdq_basis *b, xkv_coded *coded)
{
    xkv_svdq_select(b, coded->tables);
    if (coded->coded > 0)
        memcpy(coded->tables, coded->coded_tables, coded->coded);
    coded->rank = b->rank;
}

void xkv_svdq_basis_free(xkv_ctx *ctx, xkv_svdq_basis *b)
{
    xkv_release(ctx, b->exponents);
    xkv_release(ctx, b->tables);
    xkv_release(ctx, b->q);
    xkv_release(ctx, b->bits);
    xkv_release(ctx, b->lost);
    xkv_release(ctx, b->mean);
    xkv_panels_free(ctx, &b->rows);
    xkv_release(ctx, b->analysis);
    xkv_release(ctx, b->offset);
    *b = (xkv_svdq_basis){0};
}

xkv_transform xkv_transform_of_svdq_basis(const xkv_svdq_basis *b)
{
    return (xkv_transform){.rank = b->rank,
                           .width = b->width,
                           .mean = b->mean,
                           .basis = &b->rows,
                           .analysis = b->analysis,
                           .offset = b->offset};
}

/* --- Side part ---------------------------------------------------------------------------------------------------- */

/* Mean and components as a stream whose "tokens" are the elements of a row. */
static xkv_rans_shape stream_shape(const xkv_svdq_basis *b, const uint8_t *tables)
{
    return (xkv_rans_shape){b->width, b->rank + 1, b->width, tables};
}

uint64_t xkv_svdq_bound(const xkv_group *g, const xkv_svdq_basis *b)
{
    xkv_rans_shape shape = stream_shape(b, b->tables);

    return xkv_svdq_side(g).stream + xkv_rans_bound(&shape);
}

uint64_t xkv_svdq_store(const xkv_group *g, const xkv_svdq_basis *b, const xkv_coded *coded, uint8_t *out)
{
    xkv_svdq_layout at = xkv_svdq_side(g);
    xkv_rans_shape shape = stream_shape(b, b->tables);

    xkv_storef32(out, coded->step);
    xkv_store32(out + 4, 0);
    for (uint32_t i = 0; i < g->plane_count; i++)
        xkv_storef32(out + at.scales + 4ull * i, b->scales[i]);
    xkv_storef32(out + at.mean_step, b->mean_step);
    memcpy(out + at.exponents, b->exponents, b->rank);
    memcpy(out + at.tables, coded->tables, b->rank);
    memcpy(out + at.component_tables, b->tables, b->rank + 1u);
    return at.stream + xkv_rans_encode(xkv_coder_cpu(), &shape, b->q, out + at.stream);
}

static xkv_status parse_scales(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_group *g, const uint8_t *scales,
                               const char *where, float *diagonal)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        float scale = xkv_loadf32(scales + 4ull * i);
        if (!isfinite(scale) || scale <= 0)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: the scale of a plane is not finite and positive [Q3]", where);
        for (uint32_t n = xkv_plane_width(&geometry->planes[g->planes[i]]); n > 0; n--)
            *diagonal++ = scale;
    }
    return XKV_OK;
}

/* The stream of mean and components. */
static xkv_status parse_stream(xkv_ctx *ctx, const uint8_t *side, uint64_t size, const xkv_svdq_layout *at,
                               const char *where, xkv_svdq_basis *b)
{
    xkv_rans_shape shape = stream_shape(b, side + at->component_tables);

    b->mean_step = xkv_loadf32(side + at->mean_step);
    if (!isfinite(b->mean_step) || b->mean_step <= 0)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: the step of the mean is not finite and positive [Q3]", where);
    memcpy(b->exponents, side + at->exponents, b->rank);
    return xkv_rans_decode(ctx, xkv_coder_cpu(), &shape, side + at->stream, size - at->stream, where, b->q);
}

xkv_status xkv_svdq_parse(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_group *g, const uint8_t *side,
                          uint64_t size, const char *where, xkv_svdq_basis *b)
{
    const xkv_kernels *k = xkv_kernels_cpu();
    xkv_svdq_layout at = xkv_svdq_side(g);
    float *diagonal = NULL;
    xkv_status status = XKV_OK;

    *b = (xkv_svdq_basis){0};
    XKV_TRY_GOTO(allocate(ctx, g->rank, g->width, b), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, g->width, &diagonal), out);
    XKV_TRY_GOTO(parse_scales(ctx, geometry, g, side + at.scales, where, diagonal), out);
    XKV_TRY_GOTO(parse_stream(ctx, side, size, &at, where, b), out);
    XKV_TRY_GOTO(dequantize(ctx, k, diagonal, b), out);
    if (!k->all_finite(XKV_F32, b->mean, b->width) || !xkv_panels_finite(&b->rows, k))
        status = xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: mean or components overflow [Q3]", where);
out:
    xkv_release(ctx, diagonal);
    if (status != XKV_OK)
        xkv_svdq_basis_free(ctx, b);
    return status;
}

xkv_status xkv_svdq_invert(xkv_ctx *ctx, xkv_pool *pool, const xkv_kernels *k, const xkv_geometry *geometry,
                           const xkv_group *g, const uint8_t *side, const char *where, xkv_svdq_basis *b)
{
    float *diagonal = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(XKV_NEW(ctx, g->width, &diagonal), out);
    XKV_TRY_GOTO(parse_scales(ctx, geometry, g, side + xkv_svdq_side(g).scales, where, diagonal), out);
    XKV_TRY_GOTO(make_dual(ctx, pool, k, diagonal, b), out);
out:
    xkv_release(ctx, diagonal);
    return status;
}
