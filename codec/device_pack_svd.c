/* device_pack_svd.c - groups of codec svd: rows stay on the device, which decomposes them, rounds the coefficients and
 * measures what the factors restore. To the host come the factors. */
#include "device_pack_tile.h"
#include "device_svd.h"

/* Between these squares of a norm nothing that is multiplied overflows or vanishes (device_svd.h). */
#define LEAST_ENERGY 0x1p-100
#define MOST_ENERGY  0x1p118

/* A group at hand. */
typedef struct factoring {
    xkv_pack_work w;
    xkv_group *g;
    uint32_t rank, iterations;
    xkv_factors *f;
} factoring;

static float *rows_of(const factoring *j)
{
    return xkv_pack_place(j->w.p, j->w.p->at.rows);
}

/* --- Rows --------------------------------------------------------------------------------------------------------- */

static xkv_status gather_rows(const factoring *j)
{
    const xkv_device_packing *p = j->w.p;

    for (uint32_t tile = 0; tile < p->at.tiles; tile++) {
        uint32_t row, n = xkv_pack_tile(p, tile, &row);
        XKV_TRY(xkv_pack_gather(&j->w, row, n, rows_of(j) + (uint64_t)row * j->g->width));
    }
    return XKV_OK;
}

/* Squares of the rows there are, by plane and in all. */
static xkv_status sum_squares(const factoring *j, double *scratch, double *planes, double *all)
{
    xkv_device_packing *p = j->w.p;
    xkv_plug_sums o = {.rows = rows_of(j),
                       .begins = xkv_pack_constant(&j->w, j->w.begins_at),
                       .ld = j->g->width,
                       .stride = p->at.stride,
                       .count = j->g->plane_count,
                       .tokens = p->tokens,
                       .sums = xkv_pack_place(p, p->at.sums)};

    XKV_PACKING(p, sums(p->device->plug, &o, p->stream));
    *all = 0;
    for (uint32_t i = 0; i < j->g->plane_count; i++) {
        XKV_TRY(xkv_pack_total(&j->w, i, scratch, &planes[i]));
        *all += planes[i];
    }
    return XKV_OK;
}

/* --- Factors ------------------------------------------------------------------------------------------------------ */

static xkv_status decompose(const factoring *j, bool *found)
{
    xkv_device_packing *p = j->w.p;
    xkv_device_svd o = {.x = rows_of(j),
                        .rows = p->tokens,
                        .cols = j->g->width,
                        .rank = j->rank,
                        .iterations = j->iterations,
                        .components = xkv_pack_place(p, p->at.components),
                        .coefficients = xkv_pack_place(p, p->at.coefficients)};
    xkv_status status;

    XKV_TRY(XKV_NEW(p->ctx, j->rank, &o.values));
    status = xkv_device_svd_run(p->ctx, p->device, p->stream, &o, xkv_pack_place(p, p->at.svd), found);
    xkv_release(p->ctx, o.values);
    return status;
}

/* Coefficients in 16 bits, in units of the largest of each column; to the host with their scales. */
static xkv_status round_coefficients(const factoring *j)
{
    xkv_device_packing *p = j->w.p;
    uint64_t count = (uint64_t)p->tokens * j->rank;
    xkv_plug_round_columns o = {.rows = xkv_pack_place(p, p->at.coefficients),
                                .count = p->tokens,
                                .width = j->rank,
                                .scales = xkv_pack_place(p, p->at.scales),
                                .out = xkv_pack_place(p, p->at.factors)};

    XKV_PACKING(p, round_columns(p->device->plug, &o, p->stream));
    XKV_TRY(xkv_device_download(p->ctx, p->device, o.out, 2 * count, j->f->coefficients, p->stream));
    return xkv_device_download(p->ctx, p->device, o.scales, 4ull * j->rank, j->f->scales, p->stream);
}

/* Components in 16 bits; in `components` as a decoder sees them, times their scales. */
static xkv_status round_components(const factoring *j, float *components)
{
    xkv_device_packing *p = j->w.p;
    const xkv_kernels *k = xkv_kernels_cpu();
    size_t width = j->g->width, count = j->rank * width;

    XKV_TRY(
        xkv_device_download(p->ctx, p->device, xkv_pack_place(p, p->at.components), 4 * count, components, p->stream));
    k->from_f32(XKV_F16, components, j->f->components, count);
    k->to_f32(XKV_F16, j->f->components, components, count);
    for (size_t i = 0; i < count; i++)
        components[i] *= j->f->scales[i / width];
    return XKV_OK;
}

/* The rows less what the factors restore of them, in two products: a component is the sum of two f16. */
static xkv_status subtract(const factoring *j, const float *components)
{
    xkv_device_packing *p = j->w.p;
    uint64_t width = j->g->width, count = j->rank * width;
    float *there = xkv_pack_place(p, p->at.components);
    uint16_t *high = xkv_pack_place(p, p->at.component_halves);
    xkv_plug_split s = {.rows = there,
                        .count = j->rank,
                        .width = width,
                        .factor = 1,
                        .scale = xkv_operand_scale(xkv_largest(components, count)),
                        .high = high,
                        .low = high + count};
    xkv_plug_gemm o = {.a = xkv_pack_place(p, p->at.factors),
                       .b = s.high,
                       .c = rows_of(j),
                       .m = p->tokens,
                       .n = width,
                       .k = j->rank,
                       .lda = j->rank,
                       .ldb = width,
                       .ldc = width,
                       .alpha = -1 / s.scale,
                       .beta = 1};

    XKV_TRY(xkv_device_upload(p->ctx, p->device, components, 4 * count, there, p->stream));
    XKV_PACKING(p, split(p->device->plug, &s, p->stream));
    XKV_PACKING(p, gemm(p->device->plug, &o, p->stream));
    o.b = s.low;
    XKV_PACKING(p, gemm(p->device->plug, &o, p->stream));
    return XKV_OK;
}

/* --- The group ---------------------------------------------------------------------------------------------------- */

static xkv_status alloc_factors(const factoring *j)
{
    xkv_ctx *ctx = j->w.p->ctx;

    j->f->rank = j->rank;
    j->f->first = j->w.p->sinks;
    XKV_TRY(XKV_NEW(ctx, (size_t)j->w.p->tokens * j->rank, &j->f->coefficients));
    XKV_TRY(XKV_NEW(ctx, (size_t)j->rank * j->g->width, &j->f->components));
    return XKV_NEW(ctx, j->rank, &j->f->scales);
}

/* Round what was found, and measure it. */
static xkv_status take_factors(const factoring *j, double *scratch)
{
    xkv_ctx *ctx = j->w.p->ctx;
    xkv_group *g = j->g;
    float *components = NULL;
    double squares;
    xkv_status status = XKV_OK;

    XKV_TRY(alloc_factors(j));
    XKV_TRY(XKV_NEW(ctx, (size_t)j->rank * g->width, &components));
    XKV_TRY_GOTO(round_coefficients(j), out);
    XKV_TRY_GOTO(round_components(j, components), out);
    XKV_TRY_GOTO(subtract(j, components), out);
    XKV_TRY_GOTO(sum_squares(j, scratch, g->plane_errors, &squares), out);
    for (uint32_t i = 0; i < g->plane_count; i++)
        g->plane_errors[i] = xkv_relative_error(g->plane_errors[i], g->plane_energies[i]);
    g->error = xkv_relative_error(squares, g->energy);
    g->rank = j->rank;
out:
    xkv_release(ctx, components);
    return status;
}

static xkv_status factorize(factoring *j, double *scratch, bool *found)
{
    XKV_TRY(xkv_pack_open(j->w.p, j->g, NULL, &j->w));
    XKV_TRY(gather_rows(j));
    XKV_TRY(sum_squares(j, scratch, j->g->plane_energies, &j->g->energy));
    if (!(j->g->energy >= LEAST_ENERGY && j->g->energy <= MOST_ENERGY))
        return XKV_OK;
    XKV_TRY(decompose(j, found));
    return *found ? take_factors(j, scratch) : XKV_OK;
}

xkv_status xkv_device_factorize(xkv_device_packing *p, xkv_group *g, uint32_t iterations, xkv_factors *f, bool *found)
{
    factoring j = {.w = {.p = p}, .g = g, .rank = g->rank, .iterations = iterations, .f = f};
    double *scratch = NULL;
    xkv_status status;

    *f = (xkv_factors){0};
    *found = false;
    XKV_TRY(XKV_NEW(p->ctx, p->tokens, &scratch));
    status = factorize(&j, scratch, found);
    xkv_release(p->ctx, scratch);
    if (status != XKV_OK)
        xkv_factors_free(p->ctx, f);
    return status;
}
