/* cpu/ops.h - what the CPU tables share: the plain C operations serve the others for tails and for what gains nothing
 * from vectors. */
#ifndef XKV_CPU_OPS_H
#define XKV_CPU_OPS_H

#include "block_element.h"
#include "kernels.h"

#include <float.h>

/* The AVX2 + FMA + F16C table, and the same with products in AVX-512; NULL where they are not built in or the processor
 * lacks the instructions. */
const xkv_kernels *xkv_kernels_cpu_avx2(void);
const xkv_kernels *xkv_kernels_cpu_avx512(void);
/* The AArch64 NEON table; NULL where it is not built in. */
const xkv_kernels *xkv_kernels_cpu_neon(void);
/* The one of these that runs here, or NULL. */
const xkv_kernels *xkv_kernels_cpu_vector(void);

/* True when XKV_CPU asked for something that cannot be had; the pool says so in the log. */
bool xkv_kernels_cpu_choice_ignored(void);

/* The same three operations for dtypes of blocks (blocks.c); n is a multiple of the block. */
void xkv_blocks_to_f32(uint32_t dtype, const uint8_t *src, float *dst, size_t n);
void xkv_blocks_from_f32(uint32_t dtype, const float *src, uint8_t *dst, size_t n);
bool xkv_blocks_finite(uint32_t dtype, const uint8_t *src, size_t n);

void xkv_generic_to_f32(uint32_t dtype, const void *src, float *dst, size_t n);
void xkv_generic_from_f32(uint32_t dtype, const float *src, void *dst, size_t n);
bool xkv_generic_all_finite(uint32_t dtype, const void *src, size_t n);
void xkv_generic_rope_row(float *row, uint32_t heads, uint32_t head_dim, const xkv_rope *rope, const float *cos_sin,
                          bool inverse);
void xkv_blas_gemm_nn(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float beta,
                      float *c, size_t ldc);
void xkv_blas_gemm_nt(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float beta,
                      float *c, size_t ldc);
void xkv_blas_gemm_tn(size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb, float beta,
                      float *c, size_t ldc);
/* Tiles of products (panels.c): how many columns each has, and what adds it up. */
enum { XKV_GENERIC_COLS = 8, XKV_AVX2_COLS = 16, XKV_AVX512_COLS = 32, XKV_NEON_COLS = 16 };
void xkv_generic_add_tile(const xkv_tile_product *p);
void xkv_avx2_add_tile(const xkv_tile_product *p);
void xkv_avx512_add_tile(const xkv_tile_product *p);
void xkv_neon_add_tile(const xkv_tile_product *p);

void xkv_generic_split_bytes(const void *src, size_t rows, size_t cols, size_t elem, uint8_t *planes);
void xkv_generic_join_bytes(const uint8_t *planes, size_t rows, size_t cols, size_t elem, void *dst);

/* Sums are kept in this many interleaved partial sums, added up in one order, so that every table gives the same bits
 * and vectors of doubles can be used. */
#define XKV_SUM_LANES 16
double xkv_generic_add_lanes(double lanes[XKV_SUM_LANES]);
void xkv_generic_sum_squares_tail(const float *x, size_t n, double lanes[XKV_SUM_LANES]);
void xkv_generic_sum_squared_difference_tail(const float *a, const float *b, size_t n, double lanes[XKV_SUM_LANES]);

/* Byte planes of a sub-matrix [r0, r1) x [c0, c1) of a rows x cols matrix. */
typedef struct xkv_tile {
    size_t rows, cols;
    size_t r0, r1, c0, c1;
} xkv_tile;
void xkv_generic_split_tile(const xkv_tile *t, const uint8_t *src, size_t elem, uint8_t *planes);
void xkv_generic_join_tile(const xkv_tile *t, const uint8_t *planes, size_t elem, uint8_t *dst);

#endif
