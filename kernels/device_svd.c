#include "device_svd.h"

#include "kernels.h"

#include <float.h>

#define TILE_ROWS   8192u /* of one sum in a tensor core, which truncates */
#define QR_PASSES   3u
#define PLACE_ALIGN 256u
#define SEED        UINT64_C(0x786b76)

/* --- Products in halves ------------------------------------------------------------------------------------------- */

xkv_status xkv_device_halve(xkv_ctx *ctx, xkv_device *d, void *stream, const float *rows, uint64_t ld, uint64_t count,
                            uint64_t width, xkv_halves to)
{
    xkv_plug_halve o = {
        .rows = rows, .ld = ld, .count = count, .width = width, .factor = 1, .high = to.high, .low = to.low};

    return xkv_device_result(ctx, d, d->api->halve(d->plug, &o, stream));
}

xkv_status xkv_device_multiply(xkv_ctx *ctx, xkv_device *d, void *stream, xkv_plug_gemm o, bool transposed,
                               xkv_halves a, xkv_halves b, bool quick)
{
    const uint16_t *const pairs[3][2] = {{a.high, b.high}, {a.low, b.high}, {a.high, b.low}};
    xkv_plug_product p = {.g = o, .transposed = transposed, .batch = 1};

    p.g.exact = XKV_PRODUCT_BF16;
    for (int i = 0; i < (quick ? 1 : 3); i++) {
        p.g.a = pairs[i][0];
        p.g.b = pairs[i][1];
        if (i > 0)
            p.g.beta = 1;
        XKV_TRY(xkv_device_result(ctx, d, d->api->product(d->plug, &p, stream)));
    }
    return XKV_OK;
}

/* --- Workspace ---------------------------------------------------------------------------------------------------- */

/* Offsets. V is [cols][width], Z and z64 likewise, Y [tile][width], the small ones [width][width]. */
typedef struct layout {
    uint64_t x_halves, y, y_halves, v, v_halves, z64, gram, small, small_f32, values, info, work, size;
} layout;

typedef struct svd {
    xkv_ctx *ctx;
    xkv_device *device;
    void *stream;
    const xkv_device_svd *o;
    uint64_t width, tile;
    xkv_plug_dense_size dense;
    layout at;
    uint8_t *workspace;
} svd;

#define CALL(s, call) XKV_TRY(xkv_device_result((s)->ctx, (s)->device, (s)->device->api->call))

static void *place(const svd *s, uint64_t offset)
{
    return s->workspace + offset;
}

static xkv_halves halves_at(const svd *s, uint64_t offset, uint64_t elements)
{
    uint16_t *high = place(s, offset);

    return (xkv_halves){high, high + elements};
}

static xkv_halves x_halves(const svd *s)
{
    return halves_at(s, s->at.x_halves, s->tile * s->o->cols);
}

static xkv_halves y_halves(const svd *s)
{
    return halves_at(s, s->at.y_halves, s->tile * s->width);
}

static xkv_halves v_halves(const svd *s)
{
    return halves_at(s, s->at.v_halves, s->o->cols * s->width);
}

static uint64_t take(uint64_t *size, uint64_t bytes)
{
    uint64_t at = *size;

    *size += xkv_align64(bytes, PLACE_ALIGN);
    return at;
}

static uint32_t info_count(const svd *s)
{
    return s->o->iterations * QR_PASSES + 1;
}

static xkv_status svd_init(xkv_ctx *ctx, xkv_device *device, void *stream, const xkv_device_svd *o, svd *s)
{
    uint64_t n, cols = o->cols;

    *s = (svd){.ctx = ctx, .device = device, .stream = stream, .o = o};
    s->width = n = xkv_min64(xkv_svd_block_width(o->rank), xkv_min64(o->rows, cols));
    s->tile = xkv_min64(TILE_ROWS, o->rows);
    CALL(s, dense_size(device->plug, n, 1, &s->dense));
    s->at.x_halves = take(&s->at.size, 4 * s->tile * cols);
    s->at.y = take(&s->at.size, 4 * s->tile * n);
    s->at.y_halves = take(&s->at.size, 4 * s->tile * n);
    s->at.v = take(&s->at.size, 4 * cols * n);
    s->at.v_halves = take(&s->at.size, 4 * cols * n);
    s->at.z64 = take(&s->at.size, 8 * cols * n);
    s->at.gram = take(&s->at.size, 8 * n * n);
    s->at.small = take(&s->at.size, 8 * n * n);
    s->at.small_f32 = take(&s->at.size, 4 * n * n);
    s->at.values = take(&s->at.size, 8 * n);
    s->at.info = take(&s->at.size, 4ull * info_count(s));
    s->at.work = take(&s->at.size, xkv_max64(s->dense.cholesky, s->dense.eigen));
    return XKV_OK;
}

xkv_status xkv_device_svd_size(xkv_ctx *ctx, xkv_device *device, const xkv_device_svd *o, uint64_t *size)
{
    svd s;

    XKV_TRY(svd_init(ctx, device, NULL, o, &s));
    *size = s.at.size;
    return XKV_OK;
}

/* --- Iteration ---------------------------------------------------------------------------------------------------- */

static xkv_status convert(const svd *s, const void *from, void *to, uint64_t rows, uint64_t cols, bool to_f64,
                          bool reversed)
{
    xkv_plug_convert o = {from, to, rows, cols, to_f64, reversed};

    CALL(s, convert(s->device->plug, &o, s->stream));
    return XKV_OK;
}

/* Y = X V of a tile. */
static xkv_status multiply_tile(const svd *s, uint64_t row, uint64_t n, bool quick)
{
    uint64_t cols = s->o->cols;
    xkv_plug_gemm o = {.c = place(s, s->at.y),
                       .m = n,
                       .n = s->width,
                       .k = cols,
                       .lda = cols,
                       .ldb = s->width,
                       .ldc = s->width,
                       .alpha = 1};

    XKV_TRY(xkv_device_halve(s->ctx, s->device, s->stream, s->o->x + row * cols, cols, n, cols, x_halves(s)));
    XKV_TRY(xkv_device_multiply(s->ctx, s->device, s->stream, o, false, x_halves(s), v_halves(s), quick));
    return xkv_device_halve(s->ctx, s->device, s->stream, o.c, s->width, n, s->width, y_halves(s));
}

/* Z += X^T Y of a tile, in the place of V, which is needed in halves only. */
static xkv_status project_tile(const svd *s, uint64_t row, uint64_t n)
{
    xkv_plug_gemm o = {.c = place(s, s->at.v),
                       .m = s->o->cols,
                       .n = s->width,
                       .k = n,
                       .lda = s->o->cols,
                       .ldb = s->width,
                       .ldc = s->width,
                       .alpha = 1,
                       .beta = row > 0 ? 1 : 0,
                       .component_major = 1};

    return xkv_device_multiply(s->ctx, s->device, s->stream, o, false, x_halves(s), y_halves(s), true);
}

/* The shift that makes Cholesky succeed (Fukaya et al. 2020, equation 4.3); squared norm of scaled Z <= width. */
static double safe_shift(const svd *s)
{
    double m = (double)s->o->cols, n = (double)s->width;

    return 11 * (m * n + n * (n + 1)) * (DBL_EPSILON / 2) * n;
}

/* One pass of Cholesky-QR of z64. */
static xkv_status orthonormalize_once(const svd *s, double shift, int32_t *info)
{
    uint64_t n = s->width, cols = s->o->cols;
    double *z = place(s, s->at.z64), *gram = place(s, s->at.gram), *small = place(s, s->at.small);
    xkv_plug_product product = {.g = {.a = z,
                                      .b = z,
                                      .c = (float *)(void *)gram,
                                      .m = n,
                                      .n = n,
                                      .k = cols,
                                      .lda = n,
                                      .ldb = n,
                                      .ldc = n,
                                      .alpha = 1,
                                      .component_major = 1,
                                      .exact = XKV_PRODUCT_F64},
                                .batch = 1};
    xkv_plug_scale_gram scale = {gram, small, z, n, cols, shift};
    xkv_plug_cholesky o = {small, z, n, cols, place(s, s->at.work), s->dense.cholesky, info};

    CALL(s, product(s->device->plug, &product, s->stream));
    CALL(s, scale_gram(s->device->plug, &scale, s->stream));
    CALL(s, cholesky(s->device->plug, &o, s->stream));
    return XKV_OK;
}

/* V with orthonormal columns from Z. */
static xkv_status orthonormalize(const svd *s, int32_t *info)
{
    uint64_t n = s->width, cols = s->o->cols;

    XKV_TRY(convert(s, place(s, s->at.v), place(s, s->at.z64), cols, n, true, false));
    for (uint32_t i = 0; i < QR_PASSES; i++)
        XKV_TRY(orthonormalize_once(s, i == 0 ? safe_shift(s) : 0, info + i));
    XKV_TRY(convert(s, place(s, s->at.z64), place(s, s->at.v), cols, n, false, false));
    return xkv_device_halve(s->ctx, s->device, s->stream, place(s, s->at.v), n, cols, n, v_halves(s));
}

static xkv_status iterate(const svd *s)
{
    xkv_plug_sketch o = {v_halves(s).high, s->o->cols * s->width, SEED};

    CALL(s, sketch(s->device->plug, &o, s->stream));
    for (uint32_t i = 0; i < s->o->iterations; i++) {
        for (uint64_t row = 0, n; row < s->o->rows; row += n) {
            n = xkv_min64(s->tile, s->o->rows - row);
            XKV_TRY(multiply_tile(s, row, n, true));
            XKV_TRY(project_tile(s, row, n));
        }
        XKV_TRY(orthonormalize(s, (int32_t *)place(s, s->at.info) + i * QR_PASSES));
    }
    return XKV_OK;
}

/* --- Rayleigh-Ritz ------------------------------------------------------------------------------------------------ */

/* C = Y^T Y, in f32. */
static xkv_status find_gram(const svd *s)
{
    xkv_plug_gemm o = {.c = place(s, s->at.small_f32),
                       .m = s->width,
                       .n = s->width,
                       .lda = s->width,
                       .ldb = s->width,
                       .ldc = s->width,
                       .alpha = 1,
                       .component_major = 1};

    for (uint64_t row = 0, n; row < s->o->rows; row += n) {
        n = xkv_min64(s->tile, s->o->rows - row);
        XKV_TRY(multiply_tile(s, row, n, false));
        o.k = n;
        o.beta = row > 0 ? 1 : 0;
        XKV_TRY(xkv_device_multiply(s->ctx, s->device, s->stream, o, false, y_halves(s), y_halves(s), false));
    }
    return XKV_OK;
}

/* Eigenvectors of C by falling value, as rows of f32 where C was. */
static xkv_status find_weights(const svd *s)
{
    uint64_t n = s->width;
    xkv_plug_eigen o = {.a = place(s, s->at.gram),
                        .values = place(s, s->at.values),
                        .n = n,
                        .batch = 1,
                        .work = place(s, s->at.work),
                        .work_size = s->dense.eigen,
                        .host_size = s->dense.eigen_host,
                        .info = (int32_t *)place(s, s->at.info) + s->o->iterations * QR_PASSES};
    uint8_t *host = NULL;
    xkv_status status;

    XKV_TRY(convert(s, place(s, s->at.small_f32), o.a, n, n, true, false));
    XKV_TRY(XKV_NEW(s->ctx, (size_t)o.host_size, &host));
    o.host_work = host;
    status = xkv_device_result(s->ctx, s->device, s->device->api->eigen(s->device->plug, &o, s->stream));
    xkv_release(s->ctx, host);
    XKV_TRY(status);
    return convert(s, o.a, place(s, s->at.small_f32), n, n, false, true);
}

/* components = W^T V^T, then coefficients = X components^T. */
static xkv_status make_factors(const svd *s)
{
    const xkv_device_svd *o = s->o;
    xkv_plug_product w = {.g = {.a = place(s, s->at.small_f32),
                                .b = place(s, s->at.v),
                                .c = o->components,
                                .m = o->rank,
                                .n = o->cols,
                                .k = s->width,
                                .lda = s->width,
                                .ldb = s->width,
                                .ldc = o->cols,
                                .alpha = 1,
                                .exact = XKV_PRODUCT_F32},
                          .transposed = 1,
                          .batch = 1};

    CALL(s, product(s->device->plug, &w, s->stream));
    XKV_TRY(xkv_device_halve(s->ctx, s->device, s->stream, o->components, o->cols, o->rank, o->cols, v_halves(s)));
    for (uint64_t row = 0, n; row < o->rows; row += n) {
        n = xkv_min64(s->tile, o->rows - row);
        xkv_plug_gemm a = {.c = o->coefficients + row * o->rank,
                           .m = n,
                           .n = o->rank,
                           .k = o->cols,
                           .lda = o->cols,
                           .ldb = o->cols,
                           .ldc = o->rank,
                           .alpha = 1};
        XKV_TRY(xkv_device_halve(s->ctx, s->device, s->stream, o->x + row * o->cols, o->cols, n, o->cols, x_halves(s)));
        XKV_TRY(xkv_device_multiply(s->ctx, s->device, s->stream, a, true, x_halves(s), v_halves(s), false));
    }
    return XKV_OK;
}

/* Values by falling size, and whether every step went well. */
static xkv_status read_result(const svd *s, bool *found)
{
    double *values = NULL;
    int32_t info[8 * QR_PASSES + 1];
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW(s->ctx, (size_t)s->width, &values));
    XKV_TRY_GOTO(xkv_device_download(s->ctx, s->device, place(s, s->at.values), 8 * s->width, values, s->stream), out);
    XKV_TRY_GOTO(xkv_device_download(s->ctx, s->device, place(s, s->at.info), 4ull * info_count(s), info, s->stream),
                 out);
    *found = true;
    for (uint32_t i = 0; i < info_count(s); i++)
        *found = *found && info[i] == 0;
    for (uint32_t i = 0; i < s->o->rank; i++)
        s->o->values[i] = values[s->width - 1 - i];
out:
    xkv_release(s->ctx, values);
    return status;
}

xkv_status xkv_device_svd_run(xkv_ctx *ctx, xkv_device *device, void *stream, const xkv_device_svd *o, void *workspace,
                              bool *found)
{
    svd s;

    *found = false;
    XKV_TRY(svd_init(ctx, device, stream, o, &s));
    s.workspace = workspace;
    XKV_TRY(iterate(&s));
    XKV_TRY(find_gram(&s));
    XKV_TRY(find_weights(&s));
    XKV_TRY(make_factors(&s));
    return read_result(&s, found);
}
