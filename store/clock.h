/* clock.h - time that never goes back. */
#ifndef XKV_CLOCK_H
#define XKV_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t xkv_clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
static inline uint64_t xkv_clock_ms(void)
{
    return xkv_clock_ns() / 1000000u;
}
/* What a condition variable on this clock waits until, for `ms` milliseconds. */
static inline struct timespec xkv_clock_after(uint64_t ms)
{
    const uint64_t at = xkv_clock_ns() + ms * 1000000u;
    return (struct timespec){.tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u)};
}

#endif
