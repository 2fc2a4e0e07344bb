/* attend.cu - attention over held rows: the blocks of attend_block.h, one kernel for each step. */
#include "attend_block.h"
#include "launch.h"

namespace
{

constexpr uint32_t threads_of_a_block = 256;

extern __shared__ float shared_floats[];

__global__ void __launch_bounds__(threads_of_a_block) scores_kernel(const xkv_plug_attend o)
{
    xkv_block_scores(&o, blockIdx.x, blockIdx.y, shared_floats);
}

__global__ void __launch_bounds__(threads_of_a_block) weights_kernel(const xkv_plug_attend o)
{
    xkv_block_weights(&o, blockIdx.x, blockIdx.y, shared_floats);
}

__global__ void __launch_bounds__(threads_of_a_block) values_kernel(const xkv_plug_attend o)
{
    const uint32_t column = blockIdx.z * blockDim.x + threadIdx.x;

    if (column < xkv_value_columns(&o))
        xkv_value_column(&o, blockIdx.x, blockIdx.y, column);
}

__global__ void __launch_bounds__(threads_of_a_block) output_kernel(const xkv_plug_attend o)
{
    xkv_block_output(&o, blockIdx.x, shared_floats);
}

__global__ void __launch_bounds__(threads_of_a_block) merge_kernel(const xkv_plug_merge o)
{
    __shared__ float partial[2];

    for (uint64_t row = blockIdx.x; row < o.rows; row += gridDim.x) {
        xkv_block_merge(&o, row, partial);
        __syncthreads();
    }
}

__global__ void __launch_bounds__(threads_of_a_block) restore_kernel(const xkv_plug_restore o)
{
    xkv_block_restore(&o, blockIdx.x, blockIdx.y, shared_floats);
}

/* More shared memory than a kernel gets unasked. */
cudaError_t allow_shared(const void *kernel, size_t size)
{
    return size <= 48u << 10 ? cudaSuccess
                             : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)size);
}

} // namespace

XKV_LAUNCH(attend)
{
    const size_t scores = xkv_score_shared(o) * sizeof(float), output = xkv_output_shared(o) * sizeof(float);
    const uint32_t columns = (xkv_value_columns(o) + threads_of_a_block - 1) / threads_of_a_block;
    const uint32_t queries = o->kv_heads * o->count;
    cudaError_t e = allow_shared((const void *)scores_kernel, scores);

    if (e != cudaSuccess)
        return e;
    if (o->tile_count > 0) {
        scores_kernel<<<dim3(o->tile_count, o->kv_heads), threads_of_a_block, scores, stream>>>(*o);
        weights_kernel<<<dim3(o->split_count, queries), threads_of_a_block, XKV_BLOCK_PARTS * sizeof(float), stream>>>(
            *o);
        values_kernel<<<dim3(o->split_count, o->kv_heads, columns), threads_of_a_block, 0, stream>>>(*o);
    }
    output_kernel<<<queries, threads_of_a_block, output, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(merge)
{
    const unsigned blocks = (unsigned)(o->rows < 1u << 20 ? o->rows : 1u << 20);

    merge_kernel<<<blocks, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(restore)
{
    const size_t shared = xkv_restore_shared(o) * sizeof(float);
    const cudaError_t e = allow_shared((const void *)restore_kernel, shared);

    if (e != cudaSuccess)
        return e;
    restore_kernel<<<dim3(o->tile_count, o->to.heads), threads_of_a_block, shared, stream>>>(*o);
    return cudaGetLastError();
}
