/* svd.cu - the kernels of the truncated SVD: how threads share the elements of svd_elements.h. */
#include "launch.h"
#include "svd_elements.h"

namespace
{

constexpr uint32_t threads_of_a_block = 256;
constexpr uint32_t most_rows = 32768; /* of a grid; what is beyond takes another turn */

dim3 grid_for(uint64_t rows, uint64_t columns)
{
    return dim3((unsigned)((columns + threads_of_a_block - 1) / threads_of_a_block),
                (unsigned)(rows < most_rows ? rows : most_rows));
}

__global__ void sketch_kernel(const xkv_plug_sketch o)
{
    const uint64_t step = (uint64_t)gridDim.x * blockDim.x;

    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < o.count; i += step)
        xkv_sketch_element(&o, i);
}

__global__ void convert_kernel(const xkv_plug_convert o)
{
    const uint64_t column = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;

    for (uint64_t row = blockIdx.y; column < o.cols && row < o.rows; row += gridDim.y)
        xkv_convert_element(&o, row, column);
}

__global__ void scale_gram_kernel(const xkv_plug_scale_gram o)
{
    const uint64_t column = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;

    for (uint64_t row = blockIdx.y; column < o.n && row < o.n + o.rows; row += gridDim.y)
        xkv_scale_gram_element(&o, row, column);
}

} // namespace

XKV_LAUNCH(sketch)
{
    sketch_kernel<<<grid_for(1, o->count < 1u << 24 ? o->count : 1u << 24), threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(convert)
{
    convert_kernel<<<grid_for(o->rows, o->cols), threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(scale_gram)
{
    scale_gram_kernel<<<grid_for(o->n + o->rows, o->n), threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}
