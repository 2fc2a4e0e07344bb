/* fused.cu - coefficients to stored rows on tensor cores: 8 warps, each with every 8th square of 16 x 16 sums. */
#include "launch.h"

#include "block.h"
#include "elements.h"

#include <mma.h>

#define XKV_FUSED_TOKENS 64u
#define XKV_FUSED_DEPTH  32u

namespace
{

using namespace nvcuda;

constexpr uint32_t side = XKV_FUSED_STEP, warps = 8;
constexpr uint32_t squares = XKV_FUSED_TOKENS / side * (XKV_FUSED_DIM / side) / warps; /* of a warp at most */

struct xkv_fused_sums {
    wmma::fragment<wmma::accumulator, side, side, side, float> square[squares];
};

__device__ __forceinline__ void xkv_fused_clear(xkv_fused_sums *sums)
{
#pragma unroll
    for (uint32_t i = 0; i < squares; i++)
        wmma::fill_fragment(sums->square[i], 0.0f);
}

/* Squares of a warp are numbered along the tokens first. */
__device__ __forceinline__ void xkv_fused_add(xkv_fused_sums *sums, const uint16_t *a, const uint16_t *b, uint32_t dim)
{
    constexpr uint32_t down = XKV_FUSED_TOKENS / side;
    const half *operands = reinterpret_cast<const half *>(a), *components = reinterpret_cast<const half *>(b);
    wmma::fragment<wmma::matrix_a, side, side, side, half, wmma::col_major> left;
    wmma::fragment<wmma::matrix_b, side, side, side, half, wmma::row_major> right;

    for (uint32_t k = 0; k < XKV_FUSED_DEPTH; k += side)
#pragma unroll
        for (uint32_t i = 0; i < squares; i++) {
            const uint32_t n = threadIdx.x / 32 + i * warps;
            if (n >= down * (dim / side))
                break;
            wmma::load_matrix_sync(left, operands + k * XKV_FUSED_TOKENS + n % down * side, XKV_FUSED_TOKENS);
            wmma::load_matrix_sync(right, components + k * dim + n / down * side, dim);
            wmma::mma_sync(sums->square[i], left, right, sums->square[i]);
        }
}

__device__ __forceinline__ void xkv_fused_take(xkv_fused_sums *sums, float alpha, uint32_t dim, float *rows)
{
    constexpr uint32_t down = XKV_FUSED_TOKENS / side;

#pragma unroll
    for (uint32_t i = 0; i < squares; i++) {
        const uint32_t n = threadIdx.x / 32 + i * warps;
        if (n >= down * (dim / side))
            break;
        for (uint32_t e = 0; e < sums->square[i].num_elements; e++)
            sums->square[i].x[e] *= alpha;
        wmma::store_matrix_sync(rows + n % down * side * dim + n / down * side, sums->square[i], dim,
                                wmma::mem_row_major);
    }
}

#include "fused_block.h"

extern __shared__ __align__(32) uint8_t shared_bytes[];

__global__ void __launch_bounds__(32 * warps) fused_kernel(const xkv_plug_fused o)
{
    xkv_block_fused(&o, blockIdx.x, blockIdx.y, shared_bytes);
}

} // namespace

XKV_LAUNCH(fused)
{
    const dim3 grid((o->store.tokens + XKV_FUSED_TOKENS - 1) / XKV_FUSED_TOKENS, o->heads);
    const size_t shared = xkv_fused_shared(o->dim);
    cudaError_t e =
        cudaFuncSetAttribute((const void *)fused_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);

    if (e != cudaSuccess)
        return e;
    fused_kernel<<<grid, 32 * warps, shared, stream>>>(*o);
    return cudaGetLastError();
}
