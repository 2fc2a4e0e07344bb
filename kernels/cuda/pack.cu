/* pack.cu - the kernels of packing: how threads share the elements of pack_elements.h and the warps of warp_pack.h. */
#include "launch.h"
#include "pack_elements.h"
#include "warp_pack.h"

namespace
{

constexpr uint32_t threads_of_a_block = 256, warps_of_a_block = threads_of_a_block / 32;
constexpr uint32_t most_rows = 32768; /* of a grid; what is beyond takes another turn */

unsigned blocks_for(uint64_t count, uint32_t each)
{
    return (unsigned)((count + each - 1) / each);
}

unsigned rows_for(uint64_t count)
{
    return (unsigned)(count < most_rows ? count : most_rows);
}

/* The number of a warp among all of a one-dimensional grid. */
__device__ __forceinline__ uint64_t this_warp()
{
    return (uint64_t)blockIdx.x * warps_of_a_block + threadIdx.x / 32;
}

/* --- Rows --------------------------------------------------------------------------------------------------------- */

/* A block for each token and plane: neighbouring threads have neighbouring elements of a head. */
__global__ void gather_kernel(const xkv_plug_gather o)
{
    const xkv_plug_plane p = o.planes[blockIdx.y];

    for (uint32_t i = threadIdx.x; i < xkv_items_of(&p, p.heads); i += blockDim.x)
        xkv_gather_item(&o, &p, blockIdx.x, i);
}

__global__ void take_kernel(const xkv_plug_take o)
{
    for (uint32_t i = threadIdx.x; i < o.heads * o.head_dim; i += blockDim.x)
        xkv_take_element(&o, blockIdx.x, i);
}

__global__ void scan_kernel(const xkv_plug_scan o)
{
    const xkv_plug_plane p = o.planes[blockIdx.y];
    uint32_t found = 0;

    for (uint32_t i = threadIdx.x; i < p.heads * p.head_dim; i += blockDim.x)
        found |= xkv_is_nonfinite(&p, blockIdx.x, i);
    if (found != 0)
        atomicOr(&o.flags[blockIdx.y], 1u);
}

__global__ void halve_kernel(const xkv_plug_halve o)
{
    const uint64_t column = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;

    for (uint64_t i = blockIdx.y; column < o.width && i < o.count; i += gridDim.y)
        xkv_halve_element(&o, i, column);
}

/* A warp for each token and sum. */
__global__ void sums_kernel(const xkv_plug_sums o)
{
    const uint64_t warp = this_warp();

    if (warp < (uint64_t)o.tokens * o.count)
        xkv_warp_sum_squares(&o, (uint32_t)(warp % o.count), (uint32_t)(warp / o.count));
}

/* --- Integers ----------------------------------------------------------------------------------------------------- */

/* A warp for each component. */
__global__ void quantize_kernel(const xkv_plug_quantize o)
{
    const uint64_t warp = this_warp();

    if (warp < o.count)
        xkv_warp_quantize(&o, warp);
}

/* A block is one warp, for one component and some tokens. */
__global__ void __launch_bounds__(32) count_kernel(const xkv_plug_count o)
{
    __shared__ uint32_t held[XKV_COUNT_SHIFTS * XKV_COUNT_BINS];

    xkv_warp_count(&o, blockIdx.x, (uint64_t)blockIdx.y * XKV_COUNT_TOKENS, held);
}

/* --- Factors ------------------------------------------------------------------------------------------------------ */

__global__ void largest_kernel(const xkv_plug_round_columns o)
{
    const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x;

    for (uint64_t i = (uint64_t)blockIdx.y * XKV_COLUMN_ROWS; column < o.width && i < o.count;
         i += (uint64_t)gridDim.y * XKV_COLUMN_ROWS)
        atomicMax((uint32_t *)&o.scales[column], xkv_largest_of_column(&o, i, column));
}

__global__ void round_kernel(const xkv_plug_round_columns o)
{
    const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x;

    for (uint64_t i = blockIdx.y; column < o.width && i < o.count; i += gridDim.y)
        xkv_round_element(&o, i, column);
}

/* --- rANS --------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void copy_table(xkv_warp_encode_table *to, const xkv_warp_encode_table *from)
{
    static_assert(sizeof(xkv_warp_encode_table) % 16 == 0, "copied in pieces of 16 bytes");

    for (uint32_t i = threadIdx.x; i < sizeof *to / 16; i += 32)
        ((uint4 *)to)[i] = ((const uint4 *)from)[i];
}

/* A block is one warp, which encodes one chunk, from its last component to the first. */
__global__ void __launch_bounds__(32) encode_kernel(const xkv_plug_encode o)
{
    __shared__ alignas(16) xkv_warp_encode_table held;
    const xkv_plug_span s = o.spans[blockIdx.x];
    const uint32_t end = (uint32_t)o.room;
    uint32_t last = 0xffffffffu;
    xkv_warp_writer w;

    xkv_warp_write_from(&w, o.words + blockIdx.x * o.room, end);
    for (uint32_t i = o.coded; i-- > 0;) {
        const xkv_warp_code code = o.codes[i];
        __syncwarp(); /* nobody reads the table that is overwritten */
        if (code.table != last)
            copy_table(&held, &o.tables[code.table]);
        __syncwarp();
        last = code.table;
        xkv_warp_encode_component(&w, &held, code.shift, s.tokens, o.q + o.rows[i] * o.stride + s.column);
    }
    xkv_warp_write_states(&w, s.tokens < 32 ? s.tokens : 32);
    if (threadIdx.x == 0)
        o.sizes[blockIdx.x] = 2 * (end - w.next);
}

} // namespace

/* --- Launches ----------------------------------------------------------------------------------------------------- */

XKV_LAUNCH(gather)
{
    const dim3 grid(o->tokens, o->plane_count);

    gather_kernel<<<grid, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(take)
{
    take_kernel<<<o->tokens, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(scan)
{
    const dim3 grid(o->tokens, o->plane_count);

    scan_kernel<<<grid, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(halve)
{
    const dim3 grid(blocks_for(o->width, threads_of_a_block), rows_for(o->count));

    halve_kernel<<<grid, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(sums)
{
    sums_kernel<<<blocks_for((uint64_t)o->tokens * o->count, warps_of_a_block), threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(quantize)
{
    quantize_kernel<<<blocks_for(o->count, warps_of_a_block), threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(count)
{
    const dim3 grid(o->count, blocks_for(o->tokens, XKV_COUNT_TOKENS));

    count_kernel<<<grid, 32, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(encode)
{
    encode_kernel<<<o->count, 32, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(round_columns)
{
    const unsigned across = blocks_for(o->width, threads_of_a_block);
    const dim3 strips(across, rows_for((o->count + XKV_COLUMN_ROWS - 1) / XKV_COLUMN_ROWS));
    const dim3 rows(across, rows_for(o->count));
    const cudaError_t e = cudaMemsetAsync(o->scales, 0, o->width * sizeof *o->scales, stream);

    if (e != cudaSuccess)
        return e;
    largest_kernel<<<strips, threads_of_a_block, 0, stream>>>(*o);
    round_kernel<<<rows, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}
