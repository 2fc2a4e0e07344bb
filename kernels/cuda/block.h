/* block.h - one source for what the threads of a block do together: in CUDA items are shared out among them, in C they
 * are turns of a loop, which counts down so that nobody comes to rely on an order.
 *
 * Items of one XKV_EACH_ITEM do not look at what others of it write; XKV_TOGETHER() ends it, after which all may.
 * Variables outside of these loops are the same for all threads. All threads of a block run the same functions. */
#ifndef XKV_CUDA_BLOCK_H
#define XKV_CUDA_BLOCK_H

#include <stdint.h>

#ifdef __CUDACC__
#define XKV_BLOCK                 static __device__ __forceinline__
#define XKV_EACH_ITEM(i, n)       for (uint32_t i = threadIdx.x; i < (n); i += blockDim.x)
#define XKV_TOGETHER()            __syncthreads()
#define XKV_MULTIPLY_ADD(a, b, c) fmaf(a, b, c) /* which --fmad=false does not forbid */
#else
#define XKV_BLOCK                 static inline
#define XKV_EACH_ITEM(i, n)       for (uint32_t i = (n); i-- > 0;)
#define XKV_TOGETHER()            ((void)0)
#define XKV_MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* Numbers that are brought together: partial[XKV_BLOCK_PARTS], of which the first then holds the result. */
#define XKV_BLOCK_PARTS 256u

XKV_BLOCK void xkv_block_largest(float *partial)
{
    for (uint32_t half = XKV_BLOCK_PARTS / 2; half > 0; half /= 2) {
        XKV_TOGETHER();
        XKV_EACH_ITEM(i, half)
        if (partial[i + half] > partial[i])
            partial[i] = partial[i + half];
    }
    XKV_TOGETHER();
}

XKV_BLOCK void xkv_block_sum(float *partial)
{
    for (uint32_t half = XKV_BLOCK_PARTS / 2; half > 0; half /= 2) {
        XKV_TOGETHER();
        XKV_EACH_ITEM(i, half)
        partial[i] += partial[i + half];
    }
    XKV_TOGETHER();
}

#endif
