/* launch.cu - the kernels: how threads share the elements of elements.h and the warps of warp_rans.h. */
#include "elements.h"
#include "launch.h"

#include "warp_sum.h"

#include <cuda_pipeline.h>

namespace
{

constexpr uint32_t threads_of_a_block = 256;
constexpr uint32_t most_rows = 32768; /* of a grid; what is beyond takes another turn */

unsigned blocks_for(uint64_t count)
{
    return (unsigned)((count + threads_of_a_block - 1) / threads_of_a_block);
}

unsigned rows_for(uint64_t count)
{
    return (unsigned)(count < most_rows ? count : most_rows);
}

/* --- Checksums ---------------------------------------------------------------------------------------------------- */

/* A block is one warp, which reads one stream. */
__global__ void __launch_bounds__(32) verify_kernel(const xkv_plug_verify o)
{
    const xkv_plug_stream s = o.streams[blockIdx.x];

    if (s.size > 0 && xkv_warp_sum_of(o.packed + s.offset, s.size) != s.checksum && threadIdx.x == 0)
        atomicOr(o.fault, XKV_WARP_BAD_SUM);
}

/* --- rANS --------------------------------------------------------------------------------------------------------- */

/* A lane's share of a table on its way into shared memory. */
__device__ __forceinline__ void fetch_table(xkv_warp_table *to, const xkv_warp_table *from)
{
    static_assert(sizeof(xkv_warp_table) % 16 == 0, "copied in pieces of 16 bytes");

    for (uint32_t i = threadIdx.x; i < sizeof *to / 16; i += 32)
        __pipeline_memcpy_async((uint4 *)to + i, (const uint4 *)from + i, 16);
}

/* All components of a stream. While one is decoded the table of the next is fetched, unless it has the same. */
__device__ __forceinline__ uint32_t decode_components(const xkv_plug_decode &o, const xkv_plug_stream &s,
                                                      xkv_warp_reader *r, xkv_warp_table *held)
{
    uint32_t at = 0, fault = 0;

    fetch_table(&held[0], &o.tables[o.codes[0].table]);
    __pipeline_commit();
    for (uint32_t i = 0; i < o.coded && fault == 0; i++) {
        const xkv_warp_code code = o.codes[i];
        const bool other = i + 1 < o.coded && o.codes[i + 1].table != code.table;
        if (other)
            fetch_table(&held[at ^ 1], &o.tables[o.codes[i + 1].table]);
        __pipeline_commit();
        __pipeline_wait_prior(1);
        __syncwarp();
        if (!xkv_warp_decode_component(r, &held[at], code.shift, s.tokens, o.q + i * o.stride + s.column))
            fault = XKV_WARP_TOO_SHORT;
        __syncwarp(); /* nobody reads the table that is overwritten next */
        at ^= other;
    }
    __pipeline_wait_prior(0);
    return fault;
}

/* A block is one warp, which decodes one stream: warps have nothing to share, and do not wait for each other. */
__global__ void __launch_bounds__(32) decode_kernel(const xkv_plug_decode o)
{
    __shared__ alignas(16) xkv_warp_table held[2];
    const xkv_plug_stream s = o.streams[blockIdx.x];
    xkv_warp_reader r;
    uint32_t fault = xkv_warp_open(&r, o.packed + s.offset, s.size, s.tokens < 32 ? s.tokens : 32);

    if (fault == 0)
        fault = decode_components(o, s, &r, held);
    if (fault == 0)
        fault = xkv_warp_close(&r);
    if (fault != 0 && threadIdx.x == 0)
        atomicOr(o.fault, fault);
}

/* --- Operands ----------------------------------------------------------------------------------------------------- */

__global__ void expand_kernel(const xkv_plug_expand o)
{
    const uint64_t t = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t fault = 0;

    for (uint64_t i = blockIdx.y; t < o.tokens && i < o.count; i += gridDim.y)
        fault |= xkv_expand_element(&o, i, t);
    if (fault != 0)
        atomicOr(o.fault, fault);
}

__global__ void split_kernel(const xkv_plug_split o)
{
    const uint64_t column = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;

    for (uint64_t i = blockIdx.y; column < o.width && i < o.count; i += gridDim.y)
        xkv_split_element(&o, i, column);
}

/* A thread takes 32 tokens of an element, which are neighbours among the integers, so that what it reads stays in the
 * cache; threads write neighbouring elements. */
constexpr uint32_t spread_tokens = 32;

__global__ void spread_kernel(const xkv_plug_spread o)
{
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    const uint64_t first = (uint64_t)blockIdx.y * spread_tokens;

    for (uint64_t t = first; i < o.width && t < o.tokens && t < first + spread_tokens; t++)
        xkv_spread_element(&o, t, i);
}

/* --- Rows --------------------------------------------------------------------------------------------------------- */

__global__ void angles_kernel(const xkv_plug_angles o)
{
    const uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;

    if (i < (uint64_t)o.tokens * o.pairs)
        xkv_angle_element(&o, i / o.pairs, (uint32_t)(i % o.pairs));
}

/* A block for each token and plane: neighbouring threads have neighbouring elements of a head. */
__global__ void store_kernel(const xkv_plug_store o)
{
    const xkv_plug_plane p = o.planes[blockIdx.y];

    for (uint32_t i = threadIdx.x; i < xkv_items_of(&p, p.heads); i += blockDim.x)
        xkv_store_item(&o, &p, blockIdx.x, i);
}

__global__ void move_kernel(const xkv_plug_move o)
{
    for (uint32_t i = threadIdx.x; i < xkv_move_items(&o); i += blockDim.x)
        xkv_move_element(&o, blockIdx.x, i);
}

__global__ void join_kernel(const xkv_plug_join o)
{
    const uint64_t column = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;

    for (uint64_t row = blockIdx.y; column < o.cols && row < o.rows; row += gridDim.y)
        xkv_join_element(&o, row, column);
}

} // namespace

/* --- Launches ----------------------------------------------------------------------------------------------------- */

XKV_LAUNCH(verify)
{
    verify_kernel<<<o->count, 32, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(decode)
{
    decode_kernel<<<o->count, 32, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(expand)
{
    const dim3 grid(blocks_for(o->tokens), rows_for(o->count));

    expand_kernel<<<grid, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(split)
{
    const dim3 grid(blocks_for(o->width), rows_for(o->count));

    split_kernel<<<grid, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(spread)
{
    const dim3 grid(blocks_for(o->width), (o->tokens + spread_tokens - 1) / spread_tokens);

    spread_kernel<<<grid, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(angles)
{
    angles_kernel<<<blocks_for((uint64_t)o->tokens * o->pairs), threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(store)
{
    const dim3 grid(o->tokens, o->plane_count);

    store_kernel<<<grid, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(move)
{
    move_kernel<<<o->tokens, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}

XKV_LAUNCH(join)
{
    const dim3 grid(blocks_for(o->cols), rows_for(o->rows));

    join_kernel<<<grid, threads_of_a_block, 0, stream>>>(*o);
    return cudaGetLastError();
}
