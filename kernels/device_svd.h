/* device_svd.h - the truncated SVD of kernels.h on a device, and the products that it shares with packing. */
#ifndef XKV_DEVICE_SVD_H
#define XKV_DEVICE_SVD_H

#include "device.h"

/* --- Products in halves ------------------------------------------------------------------------------------------- */

/* The two bf16 of the numbers of a matrix, in the device's memory: 16 bits of them. */
typedef struct xkv_halves {
    uint16_t *high, *low;
} xkv_halves;

/* Rows [count][width] of f32, `ld` apart, in two halves, which are dense. Errors: BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_halve(xkv_ctx *ctx, xkv_device *device, void *stream, const float *rows,
                                           uint64_t ld, uint64_t count, uint64_t width, xkv_halves to);
/* `o` of matrices in halves: the three products that matter, or with `quick` that of the higher ones alone, which has 8
 * bits. Errors: BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_multiply(xkv_ctx *ctx, xkv_device *device, void *stream, xkv_plug_gemm o,
                                              bool transposed, xkv_halves a, xkv_halves b, bool quick);

/* --- Truncated SVD ------------------------------------------------------------------------------------------------ */

typedef struct xkv_device_svd {
    const float *x; /* [rows][cols] */
    uint64_t rows, cols;
    uint32_t rank;       /* 1 .. min(rows, cols) */
    uint32_t iterations; /* 1 .. 8 */
    float *components;   /* [rank][cols], orthonormal rows by falling Ritz value */
    float *coefficients; /* [rows][rank] = X components^T */
    double *values;      /* [rank] Ritz values: the host's */
} xkv_device_svd;

/* Device memory that it takes. Errors: MEMORY, BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_svd_size(xkv_ctx *ctx, xkv_device *device, const xkv_device_svd *svd,
                                              uint64_t *size);

/* xkv_svd() of a fixed rank, of a matrix whose norm lies between 2^-50 and 2^59: subspace iteration on the column side
 * with Rayleigh-Ritz. Products of the iterations have bf16 operands and f32 sums, of tiles of 8,192 rows; those of the
 * last one, of the Gram matrix and of the coefficients have operands of 16 bits. Cholesky-QR, shifted and repeated
 * twice (Fukaya et al. 2020, arXiv 1809.11085), and the eigenproblem are in f64. *found is false, and the result is of
 * no use, when the block's columns are dependent or something is not finite: xkv_svd() knows what to do then.
 * `workspace` is aligned to 256 bytes. Waits for its result. Errors: MEMORY, BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_svd_run(xkv_ctx *ctx, xkv_device *device, void *stream, const xkv_device_svd *svd,
                                             void *workspace, bool *found);

#endif
