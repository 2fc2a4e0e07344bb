/* pool.c - persistent worker threads that run numbered tasks, and the hold on OpenBLAS's thread count. */
#include "cpu/ops.h"
#include "kernels.h"

#include <cblas.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define AWAKE_NANOSECONDS 1000000u
#define PAUSES            8

typedef struct worker {
    xkv_pool *pool;
    uint32_t number; /* 1 .. threads-1; the caller is worker 0 */
    pthread_t thread;
} worker;

/* Everything that changes is guarded by the mutex: tasks are large (a tile of a GEMM), taking one is not. */
struct xkv_pool {
    pthread_mutex_t mutex;
    pthread_cond_t work; /* a run has begun, or quit */
    pthread_cond_t done; /* the last worker has left the run */
    pid_t process;
    uint32_t wanted, threads; /* as asked for, and there are */
    bool quit;

    uint64_t run; /* number of the current run; a worker joins each once */
    uint32_t busy;
    xkv_ctx *ctx;
    xkv_task_fn task;
    void *user;
    uint64_t next, count;
    xkv_status status; /* of the failure with the lowest index */
    uint64_t failed;

    worker workers[]; /* [threads - 1] */
};

/* --- Waiting ------------------------------------------------------------------------------------------------------ */

#define SECOND 1000000000u

static uint64_t now(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static void pause_a_little(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void stay_awake(xkv_patience *p)
{
    uint64_t t = now(CLOCK_MONOTONIC);

    if (p->until == 0)
        p->until = t + AWAKE_NANOSECONDS;
    p->over = t >= p->until;
    for (int i = 0; i < PAUSES; i++)
        pause_a_little();
}

void xkv_wait_for_change(pthread_mutex_t *mutex, pthread_cond_t *changed, uint64_t most, xkv_patience *p)
{
    if (!p->over) {
        pthread_mutex_unlock(mutex);
        stay_awake(p);
        pthread_mutex_lock(mutex);
    } else if (most == 0) {
        pthread_cond_wait(changed, mutex);
    } else {
        uint64_t end = now(CLOCK_REALTIME) + most;
        struct timespec until = {.tv_sec = (time_t)(end / SECOND), .tv_nsec = (long)(end % SECOND)};
        (void)pthread_cond_timedwait(changed, mutex, &until);
    }
}

/* --- OpenBLAS ----------------------------------------------------------------------------------------------------- */

static pthread_mutex_t hold_mutex = PTHREAD_MUTEX_INITIALIZER;
static uint64_t hold_count;
static int held_threads;

static void hold_blas(void)
{
    pthread_mutex_lock(&hold_mutex);
    if (hold_count++ == 0) {
        held_threads = openblas_get_num_threads();
        openblas_set_num_threads(1);
    }
    pthread_mutex_unlock(&hold_mutex);
}

static void release_blas(void)
{
    pthread_mutex_lock(&hold_mutex);
    if (--hold_count == 0)
        openblas_set_num_threads(held_threads);
    pthread_mutex_unlock(&hold_mutex);
}

/* --- Running ------------------------------------------------------------------------------------------------------ */

/* Remember a failure unless one with a lower index is known, and let no further task start. */
static void record_failure(xkv_pool *pool, uint64_t index, xkv_status status)
{
    if (pool->status == XKV_OK || index < pool->failed) {
        pool->status = status;
        pool->failed = index;
    }
    pool->next = pool->count;
}

/* Take and run tasks until none is left. Called and left with the mutex held. */
static void run_tasks(xkv_pool *pool, uint32_t number)
{
    while (pool->next < pool->count) {
        uint64_t index = pool->next++;
        pthread_mutex_unlock(&pool->mutex);
        xkv_status status = xkv_check_cancel(pool->ctx);
        if (status == XKV_OK)
            status = pool->task(pool->user, number, index);
        pthread_mutex_lock(&pool->mutex);
        if (status != XKV_OK)
            record_failure(pool, index, status);
    }
}

static void *worker_main(void *user)
{
    worker *w = user;
    xkv_pool *pool = w->pool;
    uint64_t seen = 0;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        for (xkv_patience p = {0}; !pool->quit && pool->run == seen;)
            xkv_wait_for_change(&pool->mutex, &pool->work, 0, &p);
        if (pool->quit)
            break;
        seen = pool->run;
        pool->busy++;
        run_tasks(pool, w->number);
        if (--pool->busy == 0)
            pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

static xkv_status run_on_caller(xkv_ctx *ctx, uint64_t count, xkv_task_fn task, void *user)
{
    for (uint64_t i = 0; i < count; i++) {
        XKV_TRY(xkv_check_cancel(ctx));
        XKV_TRY(task(user, 0, i));
    }
    return XKV_OK;
}

xkv_status xkv_pool_run(xkv_ctx *ctx, xkv_pool *pool, uint64_t count, xkv_task_fn task, void *user)
{
    if (pool == NULL || pool->threads == 1 || count <= 1)
        return run_on_caller(ctx, count, task, user);
    pthread_mutex_lock(&pool->mutex);
    pool->run++;
    pool->ctx = ctx;
    pool->task = task;
    pool->user = user;
    pool->next = 0;
    pool->count = count;
    pool->status = XKV_OK;
    pthread_cond_broadcast(&pool->work);
    run_tasks(pool, 0);
    for (xkv_patience p = {0}; pool->busy > 0;) /* a worker that wakes up later finds no task left */
        xkv_wait_for_change(&pool->mutex, &pool->done, 0, &p);
    xkv_status status = pool->status;
    pthread_mutex_unlock(&pool->mutex);
    return status;
}

uint32_t xkv_pool_threads(const xkv_pool *pool)
{
    return pool != NULL ? pool->threads : 1;
}

/* --- Life --------------------------------------------------------------------------------------------------------- */

/* Start workers until one cannot be started. They take no signals, which are the business of the program's threads. */
static void start_workers(xkv_pool *pool)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->threads < pool->wanted) {
        worker *w = &pool->workers[pool->threads - 1];
        w->pool = pool;
        w->number = pool->threads;
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0)
            break;
        pool->threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Not through the context: a pool outlives the call that it was made for. */
static xkv_pool *start(uint32_t threads)
{
    xkv_pool *pool = calloc(1, sizeof *pool + (threads - 1) * sizeof *pool->workers);
    if (pool == NULL)
        return NULL;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->process = getpid();
    pool->wanted = threads;
    pool->threads = 1;
    start_workers(pool);
    return pool;
}

static void stop(void *object)
{
    xkv_pool *pool = object;
    if (pool->process != getpid()) /* its threads are another process's, and its mutex may be locked for ever */
        return;
    pthread_mutex_lock(&pool->mutex);
    pool->quit = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (uint32_t i = 1; i < pool->threads; i++)
        pthread_join(pool->workers[i - 1].thread, NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}

/* In place of what was kept before. A pool that lacks threads is not worth it. */
static void keep(xkv_ctx *ctx, xkv_pool *pool)
{
    bool whole = pool->threads == pool->wanted && pool->threads > 1;
    xkv_pool *rest = whole ? xkv_ctx_keep(ctx, pool, stop) : pool;
    if (rest != NULL)
        stop(rest);
}

/* The pool that the context has kept, if it is of this size and process. */
static xkv_pool *take(xkv_ctx *ctx, uint32_t threads)
{
    xkv_pool *pool = xkv_ctx_keep(ctx, NULL, stop);
    if (pool == NULL || (pool->wanted == threads && pool->process == getpid()))
        return pool;
    keep(ctx, pool);
    return NULL;
}

xkv_status xkv_pool_create(xkv_ctx *ctx, uint32_t threads, xkv_pool **pool_p)
{
    if (threads == 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a pool needs at least one thread");
    xkv_pool *pool = take(ctx, threads);
    if (pool == NULL)
        pool = start(threads);
    if (pool == NULL)
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "no memory for %u threads", threads);
    hold_blas();
    if (pool->threads < threads)
        xkv_logf(ctx, XKV_LOG_WARNING, "only %u of %u threads could be started", pool->threads, threads);
    if (xkv_kernels_cpu_choice_ignored())
        xkv_logf(ctx, XKV_LOG_WARNING, "XKV_CPU names no CPU code that runs here; using \"%s\"",
                 xkv_kernels_cpu_name());
    *pool_p = pool;
    return XKV_OK;
}

void xkv_pool_free(xkv_ctx *ctx, xkv_pool *pool)
{
    if (pool == NULL)
        return;
    release_blas();
    keep(ctx, pool);
}
