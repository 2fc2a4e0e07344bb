/* test_common.c - contexts, the memory account, error texts, options, log and cancellation. */
#include "base.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

static xkv_ctx *make(const xkv_ctx_options *o)
{
    xkv_ctx *ctx = NULL;
    assert_int_equal(xkv_ctx_create(o, &ctx), XKV_OK);
    return ctx;
}

/* --- Texts ------------------------------------------------------------------------------------------------------ */

static void each_status_has_its_own_text(void **state)
{
    static const xkv_status all[] = {0, 1, 2, 20, 22, 24, 26, 28, 30, 40, 42, 50, 60, 70, 72, 74, 80, 90, 100};
    (void)state;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        assert_string_not_equal(xkv_status_string(all[i]), "unknown status");
        for (size_t k = 0; k < i; k++)
            assert_string_not_equal(xkv_status_string(all[i]), xkv_status_string(all[k]));
    }
    assert_string_equal(xkv_status_string(XKV_ERROR_CHECKSUM), "checksum mismatch");
    assert_string_equal(xkv_status_string((xkv_status)3), "unknown status");
    assert_string_equal(xkv_status_string((xkv_status)-1), "unknown status");
}

static void version_is_that_of_the_header(void **state)
{
    char expected[32];
    (void)state;
    snprintf(expected, sizeof expected, "%d.%d.%d", XKV_VERSION_MAJOR, XKV_VERSION_MINOR, XKV_VERSION_PATCH);
    assert_string_equal(xkv_version(), expected);
}

static void the_first_failure_of_a_call_wins(void **state)
{
    (void)state;
    xkv_ctx *ctx = make(NULL);
    assert_string_equal(xkv_ctx_error(ctx), "");
    assert_int_equal(xkv_fail(ctx, XKV_ERROR_CORRUPT, "offset %d", 7), XKV_ERROR_CORRUPT);
    assert_int_equal(xkv_fail(ctx, XKV_ERROR_IO, "later"), XKV_ERROR_IO);
    assert_string_equal(xkv_ctx_error(ctx), "offset 7");
    xkv_ctx_begin(ctx);
    assert_string_equal(xkv_ctx_error(ctx), "");
    assert_int_equal(xkv_fail(NULL, XKV_ERROR_IO, "no context"), XKV_ERROR_IO);
    xkv_ctx_free(ctx);
    xkv_ctx_free(NULL);
}

static void long_error_texts_are_cut(void **state)
{
    (void)state;
    xkv_ctx *ctx = make(NULL);
    char text[3000];
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    assert_int_equal(xkv_fail(ctx, XKV_ERROR_IO, "%s", text), XKV_ERROR_IO);
    assert_int_equal(strlen(xkv_ctx_error(ctx)), 1023);
    xkv_ctx_free(ctx);
}

static void *fail_and_allocate(void *user)
{
    xkv_ctx *ctx = user;
    for (int i = 0; i < 200; i++) {
        void *p = NULL;
        if (xkv_alloc(ctx, 1, 100, &p) == XKV_OK)
            xkv_release(ctx, p);
        (void)xkv_fail(ctx, XKV_ERROR_IO, "thread says %s", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
    }
    return NULL;
}

static void threads_may_fail_and_allocate_together(void **state)
{
    (void)state;
    xkv_ctx *ctx = make(NULL);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, fail_and_allocate, ctx), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    assert_string_equal(xkv_ctx_error(ctx), "thread says aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    assert_true(xkv_ctx_memory_peak(ctx) >= 100 && xkv_ctx_memory_peak(ctx) <= 4 * 200);
    xkv_ctx_free(ctx);
}

static char last_message[64];
static xkv_log_level last_level;

static void remember(void *user, xkv_log_level level, const char *message)
{
    *(int *)user += 1;
    last_level = level;
    snprintf(last_message, sizeof last_message, "%s", message);
}

static void log_messages_reach_the_hook(void **state)
{
    (void)state;
    int calls = 0;
    xkv_ctx_options o = xkv_ctx_options_default();
    o.log = remember;
    o.log_user = &calls;
    xkv_ctx *ctx = make(&o);
    xkv_logf(ctx, XKV_LOG_WARNING, "%d planes", 3);
    assert_int_equal(calls, 1);
    assert_int_equal(last_level, XKV_LOG_WARNING);
    assert_string_equal(last_message, "3 planes");
    xkv_logf(NULL, XKV_LOG_ERROR, "nobody");
    xkv_ctx_free(ctx);
}

/* --- Context ---------------------------------------------------------------------------------------------------- */

static void bad_context_options_are_refused(void **state)
{
    (void)state;
    xkv_ctx *ctx = NULL;
    xkv_ctx_options o = xkv_ctx_options_default();
    o.struct_size = 0;
    assert_int_equal(xkv_ctx_create(&o, &ctx), XKV_ERROR_ARGUMENT);
    o = xkv_ctx_options_default();
    o.threads = 1025;
    assert_int_equal(xkv_ctx_create(&o, &ctx), XKV_ERROR_ARGUMENT);
    o = xkv_ctx_options_default();
    o.allocator.release = (void (*)(void *, void *))abort;
    assert_int_equal(xkv_ctx_create(&o, &ctx), XKV_ERROR_ARGUMENT);
    assert_null(ctx);
}

static void threads_default_to_the_processors(void **state)
{
    (void)state;
    xkv_ctx_options o = xkv_ctx_options_default();
    xkv_ctx *ctx = make(&o);
    assert_in_range(xkv_ctx_threads(ctx), 1, 1024);
    xkv_ctx_free(ctx);
    o.threads = 7;
    ctx = make(&o);
    assert_int_equal(xkv_ctx_threads(ctx), 7);
    xkv_ctx_free(ctx);
}

static xkv_ctx *signalled;

static void cancel_on_signal(int number)
{
    (void)number;
    xkv_ctx_cancel(signalled);
}

static void cancellation_stays_until_reset(void **state)
{
    (void)state;
    xkv_ctx *ctx = signalled = make(NULL);
    assert_int_equal(xkv_check_cancel(ctx), XKV_OK);
    void (*old)(int) = signal(SIGUSR1, cancel_on_signal);
    raise(SIGUSR1);
    signal(SIGUSR1, old);
    assert_int_equal(xkv_check_cancel(ctx), XKV_ERROR_CANCELLED);
    xkv_ctx_begin(ctx);
    assert_int_equal(xkv_check_cancel(ctx), XKV_ERROR_CANCELLED);
    xkv_ctx_reset(ctx);
    assert_int_equal(xkv_check_cancel(ctx), XKV_OK);
    xkv_ctx_free(ctx);
}

/* --- Options ---------------------------------------------------------------------------------------------------- */

typedef struct old_options {
    size_t struct_size;
    uint64_t a;
} old_options;

typedef struct new_options {
    size_t struct_size;
    uint64_t a, b;
} new_options;

static void options_of_any_age_are_understood(void **state)
{
    (void)state;
    xkv_ctx *ctx = make(NULL);
    old_options older = {sizeof older, 5};
    new_options o = {sizeof o, 1, 2};
    assert_int_equal(xkv_copy_options(ctx, &older, &o, sizeof o), XKV_OK);
    assert_true(o.struct_size == sizeof o && o.a == 5 && o.b == 2);

    new_options newer = {sizeof newer, 6, 7};
    old_options p = {sizeof p, 1};
    assert_int_equal(xkv_copy_options(ctx, &newer, &p, sizeof p), XKV_OK);
    assert_true(p.struct_size == sizeof p && p.a == 6);

    assert_int_equal(xkv_copy_options(ctx, NULL, &p, sizeof p), XKV_OK);
    assert_int_equal(p.a, 6);
    older.struct_size = sizeof(size_t) - 1;
    assert_int_equal(xkv_copy_options(ctx, &older, &o, sizeof o), XKV_ERROR_ARGUMENT);
    assert_int_equal(o.a, 5);
    xkv_ctx_free(ctx);
}

/* --- Memory ----------------------------------------------------------------------------------------------------- */

/* Returns addresses that are aligned for nothing but bytes beyond 16, and keeps count. */
typedef struct crooked {
    size_t alive, bytes;
    int fail;
} crooked;

static void *crooked_alloc(void *user, size_t size)
{
    crooked *c = user;
    uint8_t *p = c->fail ? NULL : malloc(size + 32);
    if (p == NULL)
        return NULL;
    c->alive++;
    c->bytes += size;
    memcpy(p, &size, sizeof size);
    return p + 16;
}

static void crooked_release(void *user, void *ptr)
{
    crooked *c = user;
    size_t size;
    memcpy(&size, (uint8_t *)ptr - 16, sizeof size);
    c->alive--;
    c->bytes -= size;
    free((uint8_t *)ptr - 16);
}

static void blocks_are_aligned_and_counted(void **state)
{
    (void)state;
    crooked c = {0};
    xkv_ctx_options o = xkv_ctx_options_default();
    o.allocator = (xkv_allocator){&c, crooked_alloc, crooked_release};
    xkv_ctx *ctx = make(&o);
    size_t own = c.bytes;
    uint8_t *blocks[100];
    for (size_t i = 0; i < 100; i++) {
        assert_int_equal(XKV_NEW_ZERO(ctx, i, &blocks[i]), XKV_OK);
        assert_int_equal((uintptr_t)blocks[i] % 64, 0);
        for (size_t k = 0; k < i; k++)
            assert_int_equal(blocks[i][k], 0);
        memset(blocks[i], 0xff, i ? i : 1);
    }
    assert_int_equal(xkv_ctx_memory_used(ctx), c.bytes - own);
    uint64_t peak = xkv_ctx_memory_used(ctx);
    for (size_t i = 0; i < 100; i++)
        xkv_release(ctx, blocks[i]);
    xkv_release(ctx, NULL);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    assert_int_equal(xkv_ctx_memory_peak(ctx), peak);
    xkv_ctx_free(ctx);
    assert_int_equal(c.alive, 0);
}

static void failed_allocations_leave_no_trace(void **state)
{
    (void)state;
    crooked c = {0};
    xkv_ctx_options o = xkv_ctx_options_default();
    o.allocator = (xkv_allocator){&c, crooked_alloc, crooked_release};
    o.memory_limit = 10000;
    xkv_ctx *ctx = make(&o);
    void *p = &c, *q = NULL;
    assert_int_equal(xkv_alloc(ctx, 1, 10001, &p), XKV_ERROR_LIMIT);
    assert_non_null(strstr(xkv_ctx_error(ctx), "10000"));
    assert_int_equal(xkv_alloc(ctx, SIZE_MAX / 2, 3, &p), XKV_ERROR_LIMIT);
    assert_int_equal(xkv_alloc(ctx, SIZE_MAX, 1, &p), XKV_ERROR_LIMIT);
    assert_int_equal(xkv_alloc(ctx, 1, 6000, &q), XKV_OK);
    assert_int_equal(xkv_alloc(ctx, 1, 6000, &p), XKV_ERROR_LIMIT);
    xkv_release(ctx, q);
    c.fail = 1;
    assert_int_equal(xkv_alloc(ctx, 1, 6000, &p), XKV_ERROR_MEMORY);
    assert_ptr_equal(p, &c);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    c.fail = 0;
    xkv_ctx_free(ctx);
    c.fail = 1;
    assert_int_equal(xkv_ctx_create(&o, &ctx), XKV_ERROR_MEMORY);
}

/* A block that was kept still holds what was in it, a fresh one is zero. */
static bool is_kept(xkv_ctx *ctx, size_t size)
{
    void *p;
    assert_int_equal(xkv_alloc(ctx, 1, size, &p), XKV_OK);
    bool kept = ((uint8_t *)p)[size - 1] == 0xaa;
    memset(p, 0xaa, size);
    xkv_release(ctx, p);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    return kept;
}

static void large_blocks_are_kept_until_trimmed(void **state)
{
    (void)state;
    const size_t size = (size_t)10 << 20;
    xkv_ctx_options o = xkv_ctx_options_default();
    o.memory_limit = 3 * size;
    xkv_ctx *ctx = make(&o);
    is_kept(ctx, size);
    if (!is_kept(ctx, size)) {
        xkv_ctx_free(ctx); /* built with a sanitizer */
        skip();
    }
    assert_true(is_kept(ctx, size - (1 << 20)));
    assert_true(is_kept(ctx, size / 2));
    assert_false(is_kept(ctx, size / 2 - 65536)); /* which puts the larger one out */
    assert_true(is_kept(ctx, size / 2 - 65536));
    assert_false(is_kept(ctx, 2 * size));
    assert_true(xkv_ctx_memory_peak(ctx) < 2 * size + 4096);
    xkv_ctx_trim(ctx);
    assert_false(is_kept(ctx, 2 * size));
    void *p; /* what is kept does not count against the limit */
    assert_int_equal(xkv_alloc(ctx, 1, 3 * size - 4096, &p), XKV_OK);
    xkv_release(ctx, p);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_status_has_its_own_text),           cmocka_unit_test(version_is_that_of_the_header),
        cmocka_unit_test(the_first_failure_of_a_call_wins),       cmocka_unit_test(long_error_texts_are_cut),
        cmocka_unit_test(threads_may_fail_and_allocate_together), cmocka_unit_test(log_messages_reach_the_hook),
        cmocka_unit_test(bad_context_options_are_refused),        cmocka_unit_test(threads_default_to_the_processors),
        cmocka_unit_test(cancellation_stays_until_reset),         cmocka_unit_test(options_of_any_age_are_understood),
        cmocka_unit_test(blocks_are_aligned_and_counted),         cmocka_unit_test(failed_allocations_leave_no_trace),
        cmocka_unit_test(large_blocks_are_kept_until_trimmed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
