/* common.c - status texts, contexts, memory with an account, error text, log and cancel flag. */
#include "base.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define ALIGNMENT   64u
#define MAX_THREADS 1024u
#define TEXT_SIZE   1024u
#define HUGE_PAGE   ((size_t)2 << 20)
#define LARGE_BLOCK (2 * HUGE_PAGE)

/* Under a sanitizer every block is released for good, so that late accesses are seen. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MAX_KEPT 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define MAX_KEPT 0
#endif
#endif
#ifndef MAX_KEPT
#define MAX_KEPT 16
#endif

/* The error text is written once per call, by whichever thread fails first. */
enum { ERROR_NONE, ERROR_BEING_WRITTEN, ERROR_SET };

/* Large blocks that were released, for the next request of about their size: fresh ones cost the system's zeroing of
 * every page, a quarter of the time of packing. Together with the blocks in use they never exceed the peak of these. */
typedef struct kept_blocks {
    pthread_mutex_t lock;
    int count;
    void *raw[MAX_KEPT + 1];
    size_t total[MAX_KEPT + 1];
} kept_blocks;

struct xkv_ctx {
    xkv_allocator allocator;
    kept_blocks kept; /* of the default allocator only */
    void *object;     /* see xkv_ctx_keep(); with the lock of `kept` */
    void (*release_object)(void *object);
    xkv_log_fn log;
    void *log_user;
    uint32_t threads;
    uint64_t memory_limit;
    _Atomic uint64_t memory_used;
    _Atomic uint64_t memory_peak;
    atomic_int cancelled; /* lock-free, hence safe in a signal handler */
    atomic_int error_state;
    char error[TEXT_SIZE];
};

_Static_assert(ATOMIC_INT_LOCK_FREE == 2, "the cancel flag is set in signal handlers");

/* --- Status and version ----------------------------------------------------------------------------------------- */

const char *xkv_status_string(xkv_status status)
{
    switch (status) {
    case XKV_OK:
        return "success";
    case XKV_ERROR_ARGUMENT:
        return "invalid argument";
    case XKV_ERROR_UNSUPPORTED:
        return "not supported";
    case XKV_ERROR_FORMAT:
        return "not a file of the expected kind";
    case XKV_ERROR_VERSION:
        return "needs a newer reader";
    case XKV_ERROR_FEATURE:
        return "uses an unknown required feature";
    case XKV_ERROR_CORRUPT:
        return "damaged or invalid data";
    case XKV_ERROR_CHECKSUM:
        return "checksum mismatch";
    case XKV_ERROR_TRUNCATED:
        return "truncated";
    case XKV_ERROR_MISMATCH:
        return "model or geometry mismatch";
    case XKV_ERROR_TARGET:
        return "target cannot be reached";
    case XKV_ERROR_NOT_FOUND:
        return "no such entry";
    case XKV_ERROR_LIMIT:
        return "beyond a limit";
    case XKV_ERROR_MEMORY:
        return "out of memory";
    case XKV_ERROR_IO:
        return "input/output error";
    case XKV_ERROR_EXISTS:
        return "output exists";
    case XKV_ERROR_NO_SPACE:
        return "no space left";
    case XKV_ERROR_CANCELLED:
        return "cancelled";
    case XKV_ERROR_TIMEOUT:
        return "not done in time";
    case XKV_ERROR_BACKEND:
        return "compute backend failed";
    case XKV_ERROR_INTERNAL:
        return "internal error";
    }
    return "unknown status";
}

#define TEXT_OF(x)       #x
#define VERSION(a, b, c) TEXT_OF(a) "." TEXT_OF(b) "." TEXT_OF(c)

const char *xkv_version(void)
{
    return VERSION(XKV_VERSION_MAJOR, XKV_VERSION_MINOR, XKV_VERSION_PATCH);
}

/* --- Context ---------------------------------------------------------------------------------------------------- */

/* Large blocks ask for huge pages: they come fresh from the system, and touching them page by page costs a fifth of the
 * time of packing. */
static void *default_alloc(void *user, size_t size)
{
    void *block;

    (void)user;
    if (size < LARGE_BLOCK || size > SIZE_MAX - HUGE_PAGE)
        return malloc(size);
    block = aligned_alloc(HUGE_PAGE, (size + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
    if (block)
        (void)madvise(block, size, MADV_HUGEPAGE); /* a hint: whatever it says */
    return block;
}

static void default_release(void *user, void *ptr)
{
    (void)user;
    free(ptr);
}

static uint32_t processors_online(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (uint32_t)xkv_min64((uint64_t)n, MAX_THREADS);
}

xkv_status xkv_ctx_create(const xkv_ctx_options *options, xkv_ctx **ctx_p)
{
    xkv_ctx_options o = xkv_ctx_options_default();
    XKV_TRY(xkv_copy_options(NULL, options, &o, sizeof o));
    if ((o.allocator.alloc == NULL) != (o.allocator.release == NULL) || o.threads > MAX_THREADS)
        return XKV_ERROR_ARGUMENT;
    if (o.allocator.alloc == NULL)
        o.allocator = (xkv_allocator){NULL, default_alloc, default_release};

    xkv_ctx *ctx = o.allocator.alloc(o.allocator.user, sizeof *ctx);
    if (ctx == NULL)
        return XKV_ERROR_MEMORY;
    memset(ctx, 0, sizeof *ctx);
    ctx->allocator = o.allocator;
    ctx->log = o.log;
    ctx->log_user = o.log_user;
    ctx->threads = o.threads ? o.threads : processors_online();
    ctx->memory_limit = o.memory_limit;
    if (pthread_mutex_init(&ctx->kept.lock, NULL) != 0) {
        ctx->allocator.release(ctx->allocator.user, ctx);
        return XKV_ERROR_MEMORY;
    }
    *ctx_p = ctx;
    return XKV_OK;
}

void xkv_ctx_free(xkv_ctx *ctx)
{
    if (ctx == NULL)
        return;
    xkv_ctx_trim(ctx);
    pthread_mutex_destroy(&ctx->kept.lock);
    ctx->allocator.release(ctx->allocator.user, ctx);
}

uint32_t xkv_ctx_threads(const xkv_ctx *ctx)
{
    return ctx->threads;
}

void xkv_ctx_cancel(xkv_ctx *ctx)
{
    atomic_store(&ctx->cancelled, 1);
}

void xkv_ctx_reset(xkv_ctx *ctx)
{
    atomic_store(&ctx->cancelled, 0);
}

xkv_status xkv_check_cancel(xkv_ctx *ctx)
{
    if (atomic_load_explicit(&ctx->cancelled, memory_order_relaxed))
        return xkv_fail(ctx, XKV_ERROR_CANCELLED, "cancelled by the caller");
    return XKV_OK;
}

xkv_status xkv_copy_options(xkv_ctx *ctx, const void *given, void *defaults, size_t size)
{
    if (given == NULL)
        return XKV_OK;
    size_t given_size;
    memcpy(&given_size, given, sizeof given_size);
    if (given_size < sizeof given_size)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT,
                        "struct_size of the options is %zu: take them from their _default() function", given_size);
    memcpy(defaults, given, given_size < size ? given_size : size);
    memcpy(defaults, &size, sizeof size);
    return XKV_OK;
}

/* --- Error text and log ----------------------------------------------------------------------------------------- */

void xkv_ctx_begin(xkv_ctx *ctx)
{
    if (ctx != NULL)
        atomic_store(&ctx->error_state, ERROR_NONE);
}

const char *xkv_ctx_error(const xkv_ctx *ctx)
{
    return atomic_load(&ctx->error_state) == ERROR_SET ? ctx->error : "";
}

xkv_status xkv_fail(xkv_ctx *ctx, xkv_status status, const char *fmt, ...)
{
    int none = ERROR_NONE;
    if (ctx == NULL || !atomic_compare_exchange_strong(&ctx->error_state, &none, ERROR_BEING_WRITTEN))
        return status;
    va_list args;
    va_start(args, fmt);
    vsnprintf(ctx->error, sizeof ctx->error, fmt, args);
    va_end(args);
    atomic_store(&ctx->error_state, ERROR_SET);
    return status;
}

xkv_status xkv_fail_errno(xkv_ctx *ctx, const char *doing, const char *name, int error)
{
    char buffer[128];
    bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
    return xkv_fail(ctx, full ? XKV_ERROR_NO_SPACE : XKV_ERROR_IO, "cannot %s %s: %s", doing, name,
                    strerror_r(error, buffer, sizeof buffer));
}

void xkv_logf(xkv_ctx *ctx, xkv_log_level level, const char *fmt, ...)
{
    if (ctx == NULL || ctx->log == NULL)
        return;
    char message[TEXT_SIZE];
    va_list args;
    va_start(args, fmt);
    vsnprintf(message, sizeof message, fmt, args);
    va_end(args);
    ctx->log(ctx->log_user, level, message);
}

/* --- Memory ----------------------------------------------------------------------------------------------------- */

/* Lies right before each block, so that any allocator serves: it need not align to 64 nor know sizes.
 *
 *     raw ... padding ... | block_head | block, aligned
 */
typedef struct block_head {
    void *raw;
    size_t total; /* bytes asked of the allocator */
} block_head;

static void raise_peak(xkv_ctx *ctx, uint64_t used)
{
    uint64_t peak = atomic_load(&ctx->memory_peak);
    while (peak < used && !atomic_compare_exchange_weak(&ctx->memory_peak, &peak, used)) {
    }
}

/* Count `total` bytes, unless that would pass the limit. */
static bool reserve(xkv_ctx *ctx, uint64_t total)
{
    uint64_t used = atomic_load(&ctx->memory_used), sum;
    do {
        if (!xkv_add64(used, total, &sum) || (ctx->memory_limit && sum > ctx->memory_limit))
            return false;
    } while (!atomic_compare_exchange_weak(&ctx->memory_used, &used, sum));
    raise_peak(ctx, sum);
    return true;
}

static void remove_kept(kept_blocks *k, int index)
{
    k->count--;
    k->raw[index] = k->raw[k->count];
    k->total[index] = k->total[k->count];
}

/* A kept block of *total bytes or up to twice as many, and its size; NULL when there is none. The groups of an entry
 * ask for blocks of similar sizes one after the other. */
static void *take_kept(xkv_ctx *ctx, size_t *total)
{
    kept_blocks *k = &ctx->kept;
    void *raw = NULL;
    int best = -1;

    pthread_mutex_lock(&k->lock);
    for (int i = 0; i < k->count; i++)
        if (k->total[i] >= *total && k->total[i] - *total <= *total && (best < 0 || k->total[i] < k->total[best]))
            best = i;
    if (best >= 0) {
        raw = k->raw[best];
        *total = k->total[best];
        remove_kept(k, best);
    }
    pthread_mutex_unlock(&k->lock);
    return raw;
}

/* Release kept blocks until they have given back `bytes`, or none is left. */
static void release_kept(xkv_ctx *ctx, size_t bytes)
{
    kept_blocks *k = &ctx->kept;
    size_t released = 0;

    pthread_mutex_lock(&k->lock);
    while (k->count > 0 && released < bytes) {
        released += k->total[k->count - 1];
        ctx->allocator.release(ctx->allocator.user, k->raw[k->count - 1]);
        remove_kept(k, k->count - 1);
    }
    pthread_mutex_unlock(&k->lock);
}

static bool is_kept_size(const xkv_ctx *ctx, size_t total)
{
    return total >= LARGE_BLOCK && ctx->allocator.alloc == default_alloc;
}

/* False when there is no room for it. */
static bool keep_block(xkv_ctx *ctx, void *raw, size_t total)
{
    kept_blocks *k = &ctx->kept;
    bool room;

    pthread_mutex_lock(&k->lock);
    room = k->count < MAX_KEPT;
    if (room) {
        k->raw[k->count] = raw;
        k->total[k->count++] = total;
    }
    pthread_mutex_unlock(&k->lock);
    return room;
}

void *xkv_ctx_keep(xkv_ctx *ctx, void *object, void (*release)(void *object))
{
    pthread_mutex_lock(&ctx->kept.lock);
    void *before = ctx->object;
    ctx->object = object;
    ctx->release_object = release;
    pthread_mutex_unlock(&ctx->kept.lock);
    return before;
}

void xkv_ctx_trim(xkv_ctx *ctx)
{
    void *object = xkv_ctx_keep(ctx, NULL, ctx->release_object);
    if (object)
        ctx->release_object(object);
    release_kept(ctx, SIZE_MAX);
}

/* Memory of *total bytes, or a little more, counted against the limit. */
static xkv_status get_block(xkv_ctx *ctx, size_t *total, void **raw_p)
{
    size_t wanted = *total;
    bool large = is_kept_size(ctx, wanted);

    *raw_p = large ? take_kept(ctx, total) : NULL;
    if (*raw_p && reserve(ctx, *total))
        return XKV_OK;
    if (*raw_p)
        ctx->allocator.release(ctx->allocator.user, *raw_p);
    *total = wanted;
    if (!reserve(ctx, wanted))
        return xkv_fail(ctx, XKV_ERROR_LIMIT,
                        "%zu bytes more than the %llu in use would pass the memory limit of %llu bytes", wanted,
                        (unsigned long long)xkv_ctx_memory_used(ctx), (unsigned long long)ctx->memory_limit);
    if (large)
        release_kept(ctx, wanted); /* the new one takes their place */
    *raw_p = ctx->allocator.alloc(ctx->allocator.user, wanted);
    if (*raw_p)
        return XKV_OK;
    atomic_fetch_sub(&ctx->memory_used, wanted);
    return xkv_fail(ctx, XKV_ERROR_MEMORY, "out of memory: %zu bytes", wanted);
}

xkv_status xkv_alloc(xkv_ctx *ctx, size_t count, size_t size, void **ptr_p)
{
    size_t bytes, total;
    if (__builtin_mul_overflow(count, size, &bytes) ||
        __builtin_add_overflow(bytes ? bytes : 1, sizeof(block_head) + ALIGNMENT - 1, &total))
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "%zu x %zu bytes do not fit into the address space", count, size);
    void *raw;
    XKV_TRY(get_block(ctx, &total, &raw));
    uintptr_t address = (uintptr_t)raw + sizeof(block_head);
    uint8_t *block = (uint8_t *)raw + (xkv_align64(address, ALIGNMENT) - (uintptr_t)raw);
    block_head head = {raw, total};
    memcpy(block - sizeof head, &head, sizeof head);
    *ptr_p = block;
    return XKV_OK;
}

xkv_status xkv_alloc_zero(xkv_ctx *ctx, size_t count, size_t size, void **ptr_p)
{
    XKV_TRY(xkv_alloc(ctx, count, size, ptr_p));
    memset(*ptr_p, 0, count * size);
    return XKV_OK;
}

void xkv_release(xkv_ctx *ctx, void *ptr)
{
    if (ptr == NULL)
        return;
    block_head head;
    memcpy(&head, (uint8_t *)ptr - sizeof head, sizeof head);
    if (!is_kept_size(ctx, head.total) || !keep_block(ctx, head.raw, head.total))
        ctx->allocator.release(ctx->allocator.user, head.raw);
    atomic_fetch_sub(&ctx->memory_used, head.total);
}

uint64_t xkv_ctx_memory_used(const xkv_ctx *ctx)
{
    return atomic_load(&ctx->memory_used);
}

uint64_t xkv_ctx_memory_peak(const xkv_ctx *ctx)
{
    return atomic_load(&ctx->memory_peak);
}
