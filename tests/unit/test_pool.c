/* test_pool.c - the worker pool: every task once, order, failures, cancellation, OpenBLAS's thread count, threads that
 * a context keeps. */
#include "kernels.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cblas.h>
#include <cmocka.h>
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#define TASKS 1000

typedef struct record {
    xkv_ctx *ctx;
    uint32_t threads;
    atomic_uint runs[TASKS];
    atomic_uint started;
    atomic_bool bad_worker, cancelled;
    uint64_t fail_at, cancel_at;
} record;

static xkv_status count_task(void *user, uint32_t worker, uint64_t index)
{
    record *r = user;
    atomic_fetch_add(&r->runs[index], 1);
    atomic_fetch_add(&r->started, 1);
    if (worker >= r->threads)
        atomic_store(&r->bad_worker, true);
    if (index == r->cancel_at) {
        xkv_ctx_cancel(r->ctx);
        atomic_store(&r->cancelled, true);
    }
    while (index > r->cancel_at && !atomic_load(&r->cancelled)) /* so that no worker runs far ahead */
        sched_yield();
    return index >= r->fail_at ? xkv_fail(r->ctx, XKV_ERROR_BACKEND, "task %u", (unsigned)index) : XKV_OK;
}

static xkv_ctx *new_ctx(void)
{
    xkv_ctx *ctx = NULL;
    assert_int_equal(xkv_ctx_create(NULL, &ctx), XKV_OK);
    return ctx;
}

/* Run all tasks on `threads` threads, 0: without a pool. */
static xkv_status run_tasks(record *r, uint32_t threads, uint64_t fail_at, uint64_t cancel_at)
{
    xkv_pool *pool = NULL;
    memset(r, 0, sizeof *r);
    r->ctx = new_ctx();
    r->fail_at = fail_at;
    r->cancel_at = cancel_at;
    if (threads > 0)
        assert_int_equal(xkv_pool_create(r->ctx, threads, &pool), XKV_OK);
    r->threads = xkv_pool_threads(pool);
    xkv_status status = xkv_pool_run(r->ctx, pool, TASKS, count_task, r);
    xkv_pool_free(r->ctx, pool);
    assert_int_equal(xkv_ctx_memory_used(r->ctx), 0);
    xkv_ctx_free(r->ctx);
    assert_false(r->bad_worker);
    return status;
}

static const uint32_t thread_counts[] = {0, 1, 2, 5, 16};

static void test_every_task_runs_once(void **state)
{
    (void)state;
    for (size_t i = 0; i < 5; i++) {
        record r;
        assert_int_equal(run_tasks(&r, thread_counts[i], TASKS, TASKS), XKV_OK);
        for (size_t t = 0; t < TASKS; t++)
            assert_int_equal(r.runs[t], 1);
    }
}

static void test_failure_stops(void **state)
{
    (void)state;
    for (size_t i = 0; i < 5; i++) {
        record r;
        assert_int_equal(run_tasks(&r, thread_counts[i], 300, TASKS), XKV_ERROR_BACKEND);
        for (size_t t = 0; t < 300; t++) /* all before the first failure were taken before it */
            assert_int_equal(r.runs[t], 1);
        assert_true(r.started <= 300 + r.threads);
    }
}

static void test_cancel_stops(void **state)
{
    (void)state;
    for (size_t i = 0; i < 5; i++) {
        record r;
        assert_int_equal(run_tasks(&r, thread_counts[i], TASKS, 200), XKV_ERROR_CANCELLED);
        assert_true(r.started + r.threads > 200 && r.started <= 200 + r.threads);
    }
}

static xkv_status lowest_task(void *user, uint32_t worker, uint64_t index)
{
    pthread_barrier_t *both_started = user;
    (void)worker;
    pthread_barrier_wait(both_started);
    return index == 0 ? XKV_ERROR_IO : XKV_ERROR_LIMIT;
}

static void test_lowest_failure_is_returned(void **state)
{
    (void)state;
    xkv_ctx *ctx = new_ctx();
    xkv_pool *pool = NULL;
    pthread_barrier_t barrier;
    assert_int_equal(xkv_pool_create(ctx, 2, &pool), XKV_OK);
    pthread_barrier_init(&barrier, NULL, 2);
    for (size_t i = 0; i < 200; i++)
        assert_int_equal(xkv_pool_run(ctx, pool, 2, lowest_task, &barrier), XKV_ERROR_IO);
    pthread_barrier_destroy(&barrier);
    xkv_pool_free(ctx, pool);
    xkv_ctx_free(ctx);
}

static xkv_status add_task(void *user, uint32_t worker, uint64_t index)
{
    (void)worker;
    atomic_fetch_add((atomic_ullong *)user, index + 1);
    return XKV_OK;
}

static void test_many_runs(void **state)
{
    (void)state;
    xkv_ctx *ctx = new_ctx();
    xkv_pool *pool = NULL;
    atomic_ullong sum = 0;
    assert_int_equal(xkv_pool_create(ctx, 4, &pool), XKV_OK);
    for (uint64_t i = 0; i < 3000; i++)
        assert_int_equal(xkv_pool_run(ctx, pool, i % 7, add_task, &sum), XKV_OK);
    unsigned long long expected = 0;
    for (uint64_t i = 0; i < 3000; i++)
        expected += (i % 7) * (i % 7 + 1) / 2;
    assert_true(sum == expected);
    xkv_pool_free(ctx, pool);
    xkv_ctx_free(ctx);
}

static void test_blas_is_held_at_one_thread(void **state)
{
    (void)state;
    xkv_ctx *ctx = new_ctx();
    xkv_pool *first = NULL, *second = NULL;
    openblas_set_num_threads(2);
    int before = openblas_get_num_threads();
    assert_int_equal(xkv_pool_create(ctx, 1, &first), XKV_OK);
    assert_int_equal(openblas_get_num_threads(), 1);
    assert_int_equal(xkv_pool_create(ctx, 2, &second), XKV_OK);
    xkv_pool_free(ctx, first);
    assert_int_equal(openblas_get_num_threads(), 1);
    xkv_pool_free(ctx, second);
    assert_int_equal(openblas_get_num_threads(), before);
    xkv_ctx_free(ctx);
}

static void test_arguments(void **state)
{
    (void)state;
    xkv_ctx *ctx = new_ctx();
    xkv_pool *pool = NULL;
    assert_int_equal(xkv_pool_create(ctx, 0, &pool), XKV_ERROR_ARGUMENT);
    xkv_pool_free(ctx, NULL);
    assert_int_equal(xkv_pool_threads(NULL), 1);
    xkv_ctx_free(ctx);
}

/* --- Threads that are kept ---------------------------------------------------------------------------------------- */

enum { KEPT = 3 };

typedef struct meeting {
    pthread_barrier_t barrier;
    pthread_t threads[KEPT];
} meeting;

static xkv_status meet(void *user, uint32_t worker, uint64_t index)
{
    meeting *m = user;
    (void)index;
    m->threads[worker] = pthread_self();
    pthread_barrier_wait(&m->barrier); /* so that each runs one */
    return XKV_OK;
}

/* Which threads run the tasks of a new pool. */
static meeting who_runs(xkv_ctx *ctx)
{
    meeting m;
    xkv_pool *pool = NULL;
    assert_int_equal(xkv_pool_create(ctx, KEPT, &pool), XKV_OK);
    pthread_barrier_init(&m.barrier, NULL, KEPT);
    assert_int_equal(xkv_pool_run(ctx, pool, KEPT, meet, &m), XKV_OK);
    pthread_barrier_destroy(&m.barrier);
    xkv_pool_free(ctx, pool);
    return m;
}

static int count_threads(void)
{
    DIR *d = opendir("/proc/self/task");
    int n = 0;
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void test_threads_are_kept(void **state)
{
    (void)state;
    xkv_ctx *ctx = new_ctx();
    xkv_pool *other = NULL;
    int before = count_threads();
    meeting first = who_runs(ctx);
    for (int i = 0; i < 5; i++) {
        meeting m = who_runs(ctx);
        for (int k = 0; k < KEPT; k++)
            assert_true(pthread_equal(m.threads[k], first.threads[k]));
    }
    assert_int_equal(count_threads(), before + KEPT - 1);
    assert_int_equal(xkv_pool_create(ctx, KEPT + 2, &other), XKV_OK); /* replaces it when it is freed */
    xkv_pool_free(ctx, other);
    assert_int_equal(count_threads(), before + KEPT + 1);
    xkv_ctx_trim(ctx);
    assert_int_equal(count_threads(), before);
    who_runs(ctx);
    xkv_ctx_free(ctx);
    assert_int_equal(count_threads(), before);
}

/* A child has none of its parent's threads: it starts its own, and waits for nobody else. */
static void test_after_a_fork(void **state)
{
    (void)state;
#if defined(__SANITIZE_THREAD__)
    skip(); /* it lets no child of several threads start any */
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
    skip();
#endif
#endif
    for (int use = 0; use < 2; use++) {
        xkv_ctx *ctx = new_ctx();
        int status = 0;
        who_runs(ctx);
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            alarm(20);
            if (use)
                who_runs(ctx);
            xkv_ctx_free(ctx);
            _exit(0);
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status, 0);
        who_runs(ctx);
        xkv_ctx_free(ctx);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_task_runs_once),
        cmocka_unit_test(test_failure_stops),
        cmocka_unit_test(test_cancel_stops),
        cmocka_unit_test(test_lowest_failure_is_returned),
        cmocka_unit_test(test_many_runs),
        cmocka_unit_test(test_blas_is_held_at_one_thread),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_threads_are_kept),
        cmocka_unit_test(test_after_a_fork),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
