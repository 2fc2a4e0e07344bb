/* warp.h - one source for code that a warp runs: in CUDA a thread is a lane, in C a lane is a turn of a loop.
 *
 * A variable that each lane has its own of is declared `type name XKV_LANES` and used as XKV_AT(name); all others are
 * the same in all lanes. What lanes do is inside XKV_EACH_LANE(lane) { ... }, where `lane` is 0 .. 31; between two such
 * blocks all lanes have done the first one, which in CUDA matters only for the two calls that look into other lanes:
 *     XKV_BALLOT(mask, predicate)        mask: a bit for each lane whose predicate holds
 *     XKV_SHUFFLE(to, from, index)       to = `from` of lane index mod 32
 * A variable that is the same in all lanes becomes one of all of them by XKV_FIRST_LANE(name).
 * Functions begin with XKV_WARP_BEGIN. All 32 lanes run them. */
#ifndef XKV_CUDA_WARP_H
#define XKV_CUDA_WARP_H

#include <stdint.h>

#ifdef __CUDACC__

#define XKV_WARP       static __device__ __forceinline__
#define XKV_WARP_BEGIN const uint32_t lane = threadIdx.x & 31u
#define XKV_LANES
#define XKV_AT(v)                    (v)
#define XKV_EACH_LANE(lane)          /* this thread */
#define XKV_BALLOT(mask, predicate)  (mask) = __ballot_sync(0xffffffffu, (predicate))
#define XKV_SHUFFLE(to, from, index) (to) = __shfl_sync(0xffffffffu, (from), (int)((index)&31u))
#define XKV_COUNT_BITS(mask)         ((uint32_t)__popc(mask))
#define XKV_FIRST_LANE(v)            (v)

#else

#define XKV_WARP            static inline
#define XKV_WARP_BEGIN      (void)0
#define XKV_LANES           [32]
#define XKV_AT(v)           (v)[lane]
#define XKV_EACH_LANE(lane) for (uint32_t lane = 0; lane < 32u; lane++)
#define XKV_BALLOT(mask, predicate)                                                                                    \
    do {                                                                                                               \
        uint32_t ballot_ = 0;                                                                                          \
        XKV_EACH_LANE (lane)                                                                                           \
            ballot_ |= (uint32_t)((predicate) ? 1 : 0) << lane;                                                        \
        (mask) = ballot_;                                                                                              \
    } while (0)
#define XKV_SHUFFLE(to, from, index)                                                                                   \
    do {                                                                                                               \
        XKV_EACH_LANE (lane)                                                                                           \
            (to)[lane] = (from)[(index)&31u];                                                                          \
    } while (0)
#define XKV_COUNT_BITS(mask) ((uint32_t)__builtin_popcount(mask))
#define XKV_FIRST_LANE(v)    ((v)[0])

#endif

/* The lanes below this one. */
#define XKV_LANES_BELOW(lane) ((1u << (lane)) - 1u)

#endif
