/*
 * xkv/common.h - status codes, contexts, allocator and log hooks shared by every part of libxkv.
 *
 * Level of use: start with <xkv/codec.h> (pack and unpack) or <xkv/store.h> (find packed prefixes; <xkv/hook.h> for
 * engines); <xkv/format.h> describes caches, models and engine files; <xkv/kernels.h> chooses a backend. This header is
 * included by all of them.
 *
 * Conventions of the whole API
 *   - Every fallible function returns xkv_status; outputs come last and are written only on XKV_OK.
 *   - Handles are opaque. `_free` and `_close` accept NULL.
 *   - Options structs begin with `struct_size`; obtain them from their `_default()` function, then change fields.
 *     Fields are only ever appended; the library reads min(sizes) and fills the rest with defaults, so that a
 *     program compiled against an older header keeps working.
 *   - Sizes are bytes unless a name says otherwise (tokens, layers, elements, dims).
 *   - The library never prints, exits or aborts, and keeps no global mutable state except the OpenBLAS thread count,
 *     which it holds at one thread while it computes and then restores (OpenBLAS offers no per-thread setting), and the
 *     list of open stores, since a process opens each only once.
 */
#ifndef XKV_COMMON_H
#define XKV_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The release. The shared object's major version (SOVERSION) is XKV_ABI_VERSION and rises when the ABI breaks; the
 * file format has its own version (spec/container.md, section 2) and neither follows the release number. */
#define XKV_VERSION_MAJOR 0
#define XKV_VERSION_MINOR 1
#define XKV_VERSION_PATCH 0
#define XKV_ABI_VERSION   0

#if defined(XKV_BUILD_SHARED) && defined(__GNUC__)
#define XKV_API __attribute__((visibility("default")))
#else
#define XKV_API
#endif
#if defined(__GNUC__)
#define XKV_MUST_CHECK        __attribute__((warn_unused_result))
#define XKV_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define XKV_MUST_CHECK
#define XKV_PRINTF(fmt, args)
#endif

/* Status codes. Values are fixed for ever and spaced by class, so that a caller may test a range. */
typedef enum xkv_status {
    XKV_OK = 0,

    /* 1..19: the call is wrong */
    XKV_ERROR_ARGUMENT = 1,    /* an argument is outside its documented range */
    XKV_ERROR_UNSUPPORTED = 2, /* valid, but this build or version cannot do it */

    /* 20..39: the input bytes are not what they should be */
    XKV_ERROR_FORMAT = 20,    /* not a file of the expected kind (magic, structure of an engine file) */
    XKV_ERROR_VERSION = 22,   /* needs a newer reader */
    XKV_ERROR_FEATURE = 24,   /* uses a required feature or section that this reader does not know */
    XKV_ERROR_CORRUPT = 26,   /* breaks a numbered rule of the specification */
    XKV_ERROR_CHECKSUM = 28,  /* a checksum does not match */
    XKV_ERROR_TRUNCATED = 30, /* ends before it should */

    /* 40..49: the input is sound but does not fit the request */
    XKV_ERROR_MISMATCH = 40,  /* other model, geometry or engine than the caller says */
    XKV_ERROR_TARGET = 42,    /* the asked ratio, error or energy cannot be reached */
    XKV_ERROR_NOT_FOUND = 44, /* there is no such entry */

    /* 50..69: limits and memory */
    XKV_ERROR_LIMIT = 50,  /* beyond a limit of the format or of the caller (memory limit) */
    XKV_ERROR_MEMORY = 60, /* the allocator returned NULL */

    /* 70..79: the system */
    XKV_ERROR_IO = 70,       /* a system call on a file failed; the detail text holds its reason */
    XKV_ERROR_EXISTS = 72,   /* the output exists and overwriting was not asked for */
    XKV_ERROR_NO_SPACE = 74, /* disk full, quota or file-size limit reached */

    /* 80 and up: the run */
    XKV_ERROR_CANCELLED = 80, /* xkv_ctx_cancel() was called, or a callback asked to stop */
    XKV_ERROR_TIMEOUT = 82,   /* not done in the time that was given */
    XKV_ERROR_BACKEND = 90,   /* the compute backend failed (LAPACK info != 0, device error) */
    XKV_ERROR_INTERNAL = 100  /* a bug in xkv */
} xkv_status;

/* A short fixed English text for `status` ("checksum mismatch"); "unknown status" for a value not listed above.
 * Never NULL; static storage. */
XKV_API const char *xkv_status_string(xkv_status status);

/* The version of the linked library as "MAJOR.MINOR.PATCH"; static storage. */
XKV_API const char *xkv_version(void);

/* --- Context ---------------------------------------------------------------------------------------------------- */

/* Custom allocator. `alloc` returns `size` bytes (size > 0) aligned for any type, or NULL; `release` gets exactly what
 * `alloc` returned, never NULL. Both may be called from worker threads at the same time. A zeroed struct means
 * malloc/free. OpenBLAS, zstd's contexts (except where they take an allocator) and jansson use malloc themselves. */
typedef struct xkv_allocator {
    void *user;
    void *(*alloc)(void *user, size_t size);
    void (*release)(void *user, void *ptr);
} xkv_allocator;

typedef enum xkv_log_level {
    XKV_LOG_ERROR = 1,
    XKV_LOG_WARNING = 2,
    XKV_LOG_INFO = 3,
    XKV_LOG_DEBUG = 4
} xkv_log_level;

/* Receives one message without a final newline. Called on the thread that runs the API call. */
typedef void (*xkv_log_fn)(void *user, xkv_log_level level, const char *message);

typedef struct xkv_ctx_options {
    size_t struct_size;
    xkv_allocator allocator; /* default: malloc/free */
    xkv_log_fn log;          /* default: NULL, nothing is logged */
    void *log_user;
    uint32_t threads;      /* worker threads of one call, the caller's included; 0 = processors online (default) */
    uint64_t memory_limit; /* largest sum of allocations alive at once, bytes; 0 = unlimited (default) */
} xkv_ctx_options;

static inline xkv_ctx_options xkv_ctx_options_default(void)
{
    xkv_ctx_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

/* Carries the hooks, the thread count, the text of the last error and the cancel flag.
 * Threads: a context runs one call at a time; use one context per thread. */
typedef struct xkv_ctx xkv_ctx;

/* Create a context. `options` may be NULL for defaults.
 * Errors: ARGUMENT (struct_size 0, threads > 1024, only one of the allocator's functions), MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_ctx_create(const xkv_ctx_options *options, xkv_ctx **ctx_p);

/* Free a context; everything made with it must have been freed before. */
XKV_API void xkv_ctx_free(xkv_ctx *ctx);

/* Detail of the last failed call on `ctx`: where (offset, field), what was expected and what was found, and the
 * number of the violated rule of spec/ in brackets. "" if none. Valid until the next call on `ctx`. */
XKV_API const char *xkv_ctx_error(const xkv_ctx *ctx);

/* Ask the call running on `ctx`, from another thread or a signal handler, to stop: it returns XKV_ERROR_CANCELLED
 * within one group of work. The flag stays set until xkv_ctx_reset(), which must not be called before that
 * call has returned. Cancelling is async-signal-safe. */
XKV_API void xkv_ctx_cancel(xkv_ctx *ctx);
XKV_API void xkv_ctx_reset(xkv_ctx *ctx);

/* Bytes now allocated through `ctx`, and the highest value so far. */
XKV_API uint64_t xkv_ctx_memory_used(const xkv_ctx *ctx);
XKV_API uint64_t xkv_ctx_memory_peak(const xkv_ctx *ctx);

/* Give memory and threads back to the system. Without an allocator of the caller's a context keeps large blocks that
 * its calls have released, for the next ones: with those in use never more than the peak. It also keeps the threads of
 * its last call, which sleep; a process forked in between starts its own. */
XKV_API void xkv_ctx_trim(xkv_ctx *ctx);

#ifdef __cplusplus
}
#endif
#endif
