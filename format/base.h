/* base.h - what every source file of libxkv uses: error flow, checked arithmetic, little-endian access, memory. */
#ifndef XKV_BASE_H
#define XKV_BASE_H

#include "xkv/common.h"

#include <stdbool.h>

/* --- Error flow ------------------------------------------------------------------------------------------------- */

/* Return from the function, or jump to `label`, when `expr` is not XKV_OK. Who decides an error reports it with
 * xkv_fail(); everybody else only passes it on. */
#define XKV_TRY(expr)                                                                                                  \
    do {                                                                                                               \
        xkv_status try_status_ = (expr);                                                                               \
        if (try_status_ != XKV_OK)                                                                                     \
            return try_status_;                                                                                        \
    } while (0)
#define XKV_TRY_GOTO(expr, label)                                                                                      \
    do {                                                                                                               \
        status = (expr);                                                                                               \
        if (status != XKV_OK)                                                                                          \
            goto label;                                                                                                \
    } while (0)

/* Record the detail text of a failure on `ctx` (may be NULL) and return `status`. Safe to call from worker threads:
 * the first failure of a call wins. */
xkv_status xkv_fail(xkv_ctx *ctx, xkv_status status, const char *fmt, ...) XKV_PRINTF(3, 4);

/* The same for a system call that failed with `error` while doing something to `name`: "cannot DOING NAME: why"; IO or
 * NO_SPACE. */
xkv_status xkv_fail_errno(xkv_ctx *ctx, const char *doing, const char *name, int error);

/* Start a public call: forget the last error. */
void xkv_ctx_begin(xkv_ctx *ctx);

/* Log through the hook of `ctx`, if any. */
void xkv_logf(xkv_ctx *ctx, xkv_log_level level, const char *fmt, ...) XKV_PRINTF(3, 4);

/* XKV_ERROR_CANCELLED once xkv_ctx_cancel() was called. */
xkv_status xkv_check_cancel(xkv_ctx *ctx);

/* Threads a call on this context may use (>= 1). */
uint32_t xkv_ctx_threads(const xkv_ctx *ctx);

/* A context keeps one object from call to call for a layer above, which always gives the same `release`. Give it one,
 * and get what it had: NULL, or an object that is the caller's now. Any thread. */
void *xkv_ctx_keep(xkv_ctx *ctx, void *object, void (*release)(void *object));

/* --- Memory ----------------------------------------------------------------------------------------------------- */

/* Allocate `count * size` bytes (checked; a zero product gives a one-byte block), 64-byte aligned, counted against the
 * memory limit. On failure: MEMORY or LIMIT with detail, and *ptr_p untouched. Free with xkv_release(). */
XKV_MUST_CHECK xkv_status xkv_alloc(xkv_ctx *ctx, size_t count, size_t size, void **ptr_p);
XKV_MUST_CHECK xkv_status xkv_alloc_zero(xkv_ctx *ctx, size_t count, size_t size, void **ptr_p);
void xkv_release(xkv_ctx *ctx, void *ptr); /* accepts NULL */

/* XKV_NEW(ctx, n, &p): n elements of the type p points to. */
#define XKV_NEW(ctx, n, pp)      xkv_alloc(ctx, n, sizeof **(pp), (void **)(pp))
#define XKV_NEW_ZERO(ctx, n, pp) xkv_alloc_zero(ctx, n, sizeof **(pp), (void **)(pp))

/* Copy a caller's options struct of any age over defaults: min(struct_size) bytes.
 * Errors: ARGUMENT when struct_size is smaller than the size_t that holds it. */
XKV_MUST_CHECK xkv_status xkv_copy_options(xkv_ctx *ctx, const void *given, void *defaults, size_t size);

/* --- Checked arithmetic: false on overflow, *r untouched ---------------------------------------------------------- */

static inline bool xkv_mul64(uint64_t a, uint64_t b, uint64_t *r)
{
    return !__builtin_mul_overflow(a, b, r);
}
static inline bool xkv_add64(uint64_t a, uint64_t b, uint64_t *r)
{
    return !__builtin_add_overflow(a, b, r);
}
static inline uint64_t xkv_min64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}
static inline uint64_t xkv_max64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}
/* Round up to a power of two `align`; the caller has made sure that it cannot overflow. */
static inline uint64_t xkv_align64(uint64_t x, uint64_t align)
{
    return (x + align - 1) & ~(align - 1);
}
static inline uint64_t xkv_ceil_div(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

/* --- Text --- */

/* 2 * size lower-case hexadecimal digits and a zero. */
static inline void xkv_hex(const uint8_t *bytes, size_t size, char *text)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < size; i++) {
        text[2 * i] = digits[bytes[i] >> 4];
        text[2 * i + 1] = digits[bytes[i] & 15];
    }
    text[2 * size] = '\0';
}

/* --- Little-endian access (file bytes are never cast to structs) -------------------------------------------------- */

static inline bool xkv_all_zero(const uint8_t *bytes, uint64_t size)
{
    for (uint64_t i = 0; i < size; i++)
        if (bytes[i] != 0)
            return false;
    return true;
}
static inline uint16_t xkv_load16(const void *p)
{
    const uint8_t *b = p;
    return (uint16_t)(b[0] | b[1] << 8);
}
static inline uint32_t xkv_load32(const void *p)
{
    const uint8_t *b = p;
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}
static inline uint64_t xkv_load64(const void *p)
{
    const uint8_t *b = p;
    return (uint64_t)xkv_load32(b) | (uint64_t)xkv_load32(b + 4) << 32;
}
static inline void xkv_store16(void *p, uint16_t v)
{
    uint8_t *b = p;
    b[0] = (uint8_t)v;
    b[1] = (uint8_t)(v >> 8);
}
static inline void xkv_store32(void *p, uint32_t v)
{
    xkv_store16(p, (uint16_t)v);
    xkv_store16((uint8_t *)p + 2, (uint16_t)(v >> 16));
}
static inline void xkv_store64(void *p, uint64_t v)
{
    xkv_store32(p, (uint32_t)v);
    xkv_store32((uint8_t *)p + 4, (uint32_t)(v >> 32));
}
static inline float xkv_loadf32(const void *p)
{
    uint32_t u = xkv_load32(p);
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline double xkv_loadf64(const void *p)
{
    uint64_t u = xkv_load64(p);
    double f;
    memcpy(&f, &u, 8);
    return f;
}
static inline void xkv_storef32(void *p, float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    xkv_store32(p, u);
}
static inline void xkv_storef64(void *p, double f)
{
    uint64_t u;
    memcpy(&u, &f, 8);
    xkv_store64(p, u);
}

#endif
