/* ops.c - the operation table in plain C: the reference for every other table, and what runs where there is none. */
#include "ops.h"

#include "element.h"

#include <cblas.h>

/* --- Conversions -------------------------------------------------------------------------------------------------- */

void xkv_generic_to_f32(uint32_t dtype, const void *src, float *dst, size_t n)
{
    const uint8_t *s = src;
    if (dtype == XKV_F32) {
        for (size_t i = 0; i < n; i++)
            dst[i] = xkv_loadf32(s + 4 * i);
    } else if (dtype == XKV_F16) {
        for (size_t i = 0; i < n; i++)
            dst[i] = xkv_f16_to_f32(xkv_load16(s + 2 * i));
    } else if (dtype == XKV_BF16) {
        for (size_t i = 0; i < n; i++)
            dst[i] = xkv_float_from_bits((uint32_t)xkv_load16(s + 2 * i) << 16);
    } else {
        xkv_blocks_to_f32(dtype, s, dst, n);
    }
}

void xkv_generic_from_f32(uint32_t dtype, const float *src, void *dst, size_t n)
{
    uint8_t *d = dst;
    if (dtype == XKV_F32) {
        for (size_t i = 0; i < n; i++)
            xkv_storef32(d + 4 * i, src[i]);
    } else if (dtype == XKV_F16) {
        for (size_t i = 0; i < n; i++)
            xkv_store16(d + 2 * i, xkv_f16_from_f32(src[i]));
    } else if (dtype == XKV_BF16) {
        for (size_t i = 0; i < n; i++)
            xkv_store16(d + 2 * i, xkv_bf16_from_f32(src[i]));
    } else {
        xkv_blocks_from_f32(dtype, src, d, n);
    }
}

bool xkv_generic_all_finite(uint32_t dtype, const void *src, size_t n)
{
    const uint8_t *s = src;
    if (xkv_dtype_block(dtype) > 1)
        return xkv_blocks_finite(dtype, s, n);
    uint32_t exponent = dtype == XKV_F32 ? 0x7f800000u : dtype == XKV_F16 ? 0x7c00u : 0x7f80u;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = dtype == XKV_F32 ? xkv_load32(s + 4 * i) : xkv_load16(s + 2 * i);
        if ((bits & exponent) == exponent)
            return false;
    }
    return true;
}

/* --- RoPE --------------------------------------------------------------------------------------------------------- */

void xkv_generic_rope_row(float *row, uint32_t heads, uint32_t head_dim, const xkv_rope *rope, const float *cos_sin,
                          bool inverse)
{
    size_t pairs = rope->n_rot / 2;
    bool interleaved = rope->style == XKV_ROPE_INTERLEAVED;
    size_t step = interleaved ? 2 : 1, distance = interleaved ? 1 : pairs;
    float sign = inverse ? -1.0f : 1.0f;
    for (size_t h = 0; h < heads; h++) {
        float *head = row + h * head_dim + rope->offset;
        for (size_t i = 0; i < pairs; i++) {
            float a = head[step * i], b = head[step * i + distance];
            float c = cos_sin[i], s = sign * cos_sin[pairs + i];
            head[step * i] = a * c - b * s;
            head[step * i + distance] = a * s + b * c;
        }
    }
}

/* --- BLAS --------------------------------------------------------------------------------------------------------- */

/* BLAS counts in int. Limits of the format (tokens < 2^31, rows of a group <= 2^18 elements) and xkv_svd() keep every
 * size below that. */
void xkv_blas_gemm_nn(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float beta,
                      float *c, size_t ldc)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)m, (int)n, (int)k, 1.0f, a, (int)lda, b, (int)ldb, beta,
                c, (int)ldc);
}

void xkv_blas_gemm_tn(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float beta,
                      float *c, size_t ldc)
{
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)m, (int)n, (int)k, 1.0f, a, (int)lda, b, (int)ldb, beta,
                c, (int)ldc);
}

void xkv_blas_gemm_nt(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float beta,
                      float *c, size_t ldc)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)m, (int)n, (int)k, 1.0f, a, (int)lda, b, (int)ldb, beta,
                c, (int)ldc);
}

/* --- Sums --------------------------------------------------------------------------------------------------------- */

double xkv_generic_add_lanes(double lanes[XKV_SUM_LANES])
{
    for (size_t half = XKV_SUM_LANES / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

void xkv_generic_sum_squares_tail(const float *x, size_t n, double lanes[XKV_SUM_LANES])
{
    for (size_t i = 0; i < n; i++)
        lanes[i % XKV_SUM_LANES] += (double)x[i] * (double)x[i];
}

void xkv_generic_sum_squared_difference_tail(const float *a, const float *b, size_t n, double lanes[XKV_SUM_LANES])
{
    for (size_t i = 0; i < n; i++) {
        double difference = (double)a[i] - (double)b[i];
        lanes[i % XKV_SUM_LANES] += difference * difference;
    }
}

static double generic_sum_squares(const float *x, size_t n)
{
    double lanes[XKV_SUM_LANES] = {0};
    xkv_generic_sum_squares_tail(x, n, lanes);
    return xkv_generic_add_lanes(lanes);
}

static double generic_sum_squared_difference(const float *a, const float *b, size_t n)
{
    double lanes[XKV_SUM_LANES] = {0};
    xkv_generic_sum_squared_difference_tail(a, b, n, lanes);
    return xkv_generic_add_lanes(lanes);
}

/* --- Byte planes -------------------------------------------------------------------------------------------------- */

void xkv_generic_split_tile(const xkv_tile *t, const uint8_t *src, size_t elem, uint8_t *planes)
{
    size_t count = t->rows * t->cols;
    uint8_t *highest = planes + (elem - 1) * count;
    for (size_t r = t->r0; r < t->r1; r++) {
        for (size_t c = t->c0; c < t->c1; c++) {
            const uint8_t *e = src + (r * t->cols + c) * elem;
            for (size_t b = 0; b + 1 < elem; b++)
                planes[b * count + r * t->cols + c] = e[b];
            highest[c * t->rows + r] = e[elem - 1];
        }
    }
}

void xkv_generic_join_tile(const xkv_tile *t, const uint8_t *planes, size_t elem, uint8_t *dst)
{
    size_t count = t->rows * t->cols;
    const uint8_t *highest = planes + (elem - 1) * count;
    for (size_t r = t->r0; r < t->r1; r++) {
        for (size_t c = t->c0; c < t->c1; c++) {
            uint8_t *e = dst + (r * t->cols + c) * elem;
            for (size_t b = 0; b + 1 < elem; b++)
                e[b] = planes[b * count + r * t->cols + c];
            e[elem - 1] = highest[c * t->rows + r];
        }
    }
}

/* Columns of a tile: its part of the transposed plane stays in the cache while the rows pass. */
#define TILE_COLS 64

void xkv_generic_split_bytes(const void *src, size_t rows, size_t cols, size_t elem, uint8_t *planes)
{
    for (size_t c = 0; c < cols; c += TILE_COLS) {
        xkv_tile t = {rows, cols, 0, rows, c, xkv_min64(c + TILE_COLS, cols)};
        xkv_generic_split_tile(&t, src, elem, planes);
    }
}

void xkv_generic_join_bytes(const uint8_t *planes, size_t rows, size_t cols, size_t elem, void *dst)
{
    for (size_t c = 0; c < cols; c += TILE_COLS) {
        xkv_tile t = {rows, cols, 0, rows, c, xkv_min64(c + TILE_COLS, cols)};
        xkv_generic_join_tile(&t, planes, elem, dst);
    }
}

const xkv_kernels *xkv_kernels_cpu_generic(void)
{
    static const xkv_kernels table = {
        .name = "generic",
        .to_f32 = xkv_generic_to_f32,
        .from_f32 = xkv_generic_from_f32,
        .all_finite = xkv_generic_all_finite,
        .rope_row = xkv_generic_rope_row,
        .gemm_nn = xkv_blas_gemm_nn,
        .gemm_tn = xkv_blas_gemm_tn,
        .gemm_nt = xkv_blas_gemm_nt,
        .panel_tile = {xkv_generic_add_tile, XKV_GENERIC_COLS},
        .sum_squares = generic_sum_squares,
        .sum_squared_difference = generic_sum_squared_difference,
        .split_bytes = xkv_generic_split_bytes,
        .join_bytes = xkv_generic_join_bytes,
    };
    return &table;
}
