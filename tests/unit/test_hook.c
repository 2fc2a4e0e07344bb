/* test_hook.c - the engine's hook: what is saved comes back, copies are copies, the queue has an end, jobs can be
 * cancelled, slow loads are declined, and no failure looks like success. */
#include "store_support.h"

#include "xkv/hook.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SIZE = 200 };

static test_store t;
static xkv_hook *hook;
static xkv_hook_options options;

static void open_hook(void)
{
    xkv_hook_free(t.ctx, hook);
    hook = NULL;
    options.store = t.store;
    assert_ok(t.ctx, xkv_hook_create(t.ctx, &options, &hook));
}

static int setup(void **state)
{
    (void)state;
    make_store(&t, 0);
    options = xkv_hook_options_default();
    options.ns = make_namespace("hook");
    open_hook();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    xkv_hook_free(t.ctx, hook);
    hook = NULL;
    remove_folder(&t);
    return 0;
}

static xkv_hook_counters counters(void)
{
    xkv_hook_counters c;
    xkv_hook_get_counters(hook, &c);
    assert_int_equal(c.matches, c.worth_it + c.declined + c.misses);
    assert_int_equal(c.saves, c.too_short + c.refused + c.queued);
    return c;
}

static xkv_status save(xkv_ctx *ctx, uint64_t seed, uint32_t count, uint64_t *job)
{
    int32_t tokens[STORE_TOKENS];
    make_tokens(seed, 50000, tokens, count);
    rows *r = make_rows(tokens, count);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_status status = xkv_hook_save(ctx, hook, &prompt, &r->geometry, r->views, job);
    memset(r, 0xee, sizeof *r); /* as an engine goes on using its memory */
    free(r);
    return status;
}

static xkv_hook_match_info match(xkv_ctx *ctx, uint64_t seed, uint32_t count, uint32_t computed, xkv_hit **hit)
{
    int32_t tokens[STORE_TOKENS];
    xkv_hook_match_info info;
    make_tokens(seed, 50000, tokens, count);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    assert_ok(ctx, xkv_hook_match(ctx, hook, &prompt, computed, &info, hit));
    assert_true((*hit != NULL) == (info.worth_it != 0));
    return info;
}

/* Load `count` tokens from `first` on and compare them. */
static xkv_status load(xkv_ctx *ctx, xkv_hit *hit, uint64_t seed, uint32_t first, uint32_t count)
{
    int32_t tokens[STORE_TOKENS];
    xkv_load_options o = xkv_load_options_default();
    make_tokens(seed, 50000, tokens, first + count);
    rows *expected = make_rows(tokens, first + count), *got = make_rows(NULL, count);
    o.first_token = first;
    o.token_count = count;
    xkv_status status = xkv_hook_load(ctx, hook, hit, &expected->geometry, &o, got->views);
    for (uint32_t p = 0; status == XKV_OK && p < 2 * STORE_LAYERS; p++)
        assert_memory_equal(got->data[p], expected->data[p][first], count * sizeof got->data[p][0]);
    free(expected);
    free(got);
    return status;
}

/* --- Round trips -------------------------------------------------------------------------------------------------- */

static void saved_prefixes_are_loaded(void **state)
{
    (void)state;
    xkv_hit *hit = NULL;
    uint64_t job = 0;
    assert_ok(t.ctx, save(t.ctx, 1, SIZE, &job));
    assert_true(job > 0);
    xkv_hook_flush(hook);
    assert_int_equal(counters().stored, 1);
    assert_int_equal(counters().waiting_jobs + counters().waiting_bytes, 0);
    xkv_hook_match_info info = match(t.ctx, 1, SIZE + 50, 0, &hit);
    assert_int_equal(info.match.tokens, SIZE);
    assert_true(info.load_seconds > 0);
    assert_ok(t.ctx, load(t.ctx, hit, 1, 0, SIZE));
    assert_ok(t.ctx, load(t.ctx, hit, 1, 120, 30));
    assert_int_equal(load(t.ctx, hit, 1, SIZE - 5, 6), XKV_ERROR_ARGUMENT);
    xkv_hit_close(t.ctx, hit);
    assert_int_equal(counters().tokens_loaded, SIZE + 30);
    assert_int_equal(counters().load_failures, 1);
    assert_ok(t.ctx, save(t.ctx, 1, SIZE, NULL));
    xkv_hook_flush(hook);
    assert_int_equal(counters().existed, 1);
}

static void short_prompts_are_left_alone(void **state)
{
    (void)state;
    xkv_hit *hit = NULL;
    uint64_t job = 9;
    assert_ok(t.ctx, save(t.ctx, 1, 63, &job));
    assert_int_equal(job, 0);
    assert_int_equal(counters().too_short, 1);
    assert_ok(t.ctx, save(t.ctx, 1, SIZE, NULL));
    xkv_hook_flush(hook);
    assert_int_equal(match(t.ctx, 1, 63, 0, &hit).match.reason, XKV_MATCH_SHORT);
    assert_int_equal(match(t.ctx, 2, SIZE, 0, &hit).match.reason, XKV_MATCH_NONE);
    assert_int_equal(counters().misses, 2);
}

static int note_group(void *user, uint32_t group)
{
    uint32_t *next = user;
    assert_int_equal(group, *next);
    ++*next;
    return 0;
}

static void groups_become_ready_in_order(void **state)
{
    (void)state;
    xkv_load_options o = xkv_load_options_default();
    xkv_hit *hit = NULL;
    uint32_t groups = 0;
    assert_ok(t.ctx, save(t.ctx, 1, SIZE, NULL));
    xkv_hook_flush(hook);
    match(t.ctx, 1, SIZE, 0, &hit);
    rows *got = make_rows(NULL, SIZE);
    o.group_ready = note_group;
    o.group_ready_user = &groups;
    assert_ok(t.ctx, xkv_hook_load(t.ctx, hook, hit, &got->geometry, &o, got->views));
    assert_true(groups > 0);
    free(got);
    xkv_hit_close(t.ctx, hit);
}

/* --- Refusals ----------------------------------------------------------------------------------------------------- */

/* Neither another model's cache nor other positions: and nothing is written then. */
static void what_does_not_fit_is_not_loaded(void **state)
{
    (void)state;
    xkv_load_options o = xkv_load_options_default();
    xkv_hit *hit = NULL;
    int32_t positions[SIZE];
    assert_ok(t.ctx, save(t.ctx, 1, SIZE, NULL));
    xkv_hook_flush(hook);
    match(t.ctx, 1, SIZE, 0, &hit);
    rows *got = make_rows(NULL, SIZE), *empty = make_rows(NULL, SIZE);
    got->planes[1].heads = 2;
    assert_int_equal(xkv_hook_load(t.ctx, hook, hit, &got->geometry, &o, got->views), XKV_ERROR_MISMATCH);
    got->planes[1].heads = 1;
    for (int32_t i = 0; i < SIZE; i++)
        positions[i] = i + (i == SIZE - 1);
    o.positions = positions;
    assert_int_equal(xkv_hook_load(t.ctx, hook, hit, &got->geometry, &o, got->views), XKV_ERROR_UNSUPPORTED);
    assert_memory_equal(got->data, empty->data, sizeof got->data);
    positions[SIZE - 1]--;
    assert_ok(t.ctx, xkv_hook_load(t.ctx, hook, hit, &got->geometry, &o, got->views));
    assert_int_equal(counters().load_failures, 2);
    free(got);
    free(empty);
    xkv_hit_close(t.ctx, hit);
}

static void slow_loads_are_declined(void **state)
{
    (void)state;
    xkv_hit *hit = NULL;
    assert_ok(t.ctx, save(t.ctx, 1, SIZE, NULL));
    xkv_hook_flush(hook);
    options.recompute_rate = 1e12;
    open_hook();
    xkv_hook_match_info info = match(t.ctx, 1, SIZE, 0, &hit);
    assert_int_equal(info.match.tokens, SIZE);
    assert_true(info.load_seconds > info.recompute_seconds);
    assert_int_equal(counters().declined, 1);
    options.recompute_rate = 10;
    open_hook();
    info = match(t.ctx, 1, SIZE, 50, &hit);
    assert_true(info.worth_it && info.recompute_seconds == (SIZE - 50) / 10.0);
    xkv_hit_close(t.ctx, hit);
    assert_false(match(t.ctx, 1, SIZE, SIZE, &hit).worth_it); /* all is computed */
}

static void damage_is_a_miss(void **state)
{
    (void)state;
    char path[256];
    xkv_hit *hit = NULL;
    xkv_store_stats s;
    assert_ok(t.ctx, save(t.ctx, 1, SIZE, NULL));
    xkv_hook_flush(hook);
    snprintf(path, sizeof path, "%s/blobs", t.path);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.') {
            int fd = openat(dirfd(d), e->d_name, O_RDWR);
            uint8_t byte;
            off_t at = lseek(fd, 0, SEEK_END) / 2;
            assert_int_equal(pread(fd, &byte, 1, at), 1);
            byte ^= 1;
            assert_int_equal(pwrite(fd, &byte, 1, at), 1);
            close(fd);
        }
    closedir(d);
    assert_true(match(t.ctx, 1, SIZE, 0, &hit).worth_it);
    assert_int_not_equal(load(t.ctx, hit, 1, 0, SIZE), XKV_OK);
    xkv_hit_close(t.ctx, hit);
    assert_int_equal(counters().load_failures, 1);
    assert_int_equal(match(t.ctx, 1, SIZE, 0, &hit).match.reason, XKV_MATCH_NONE);
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_int_equal(s.corrupt, 1);
    assert_int_equal(s.quarantined, 1);
}

static void bad_arguments(void **state)
{
    (void)state;
    xkv_hook *none = NULL;
    xkv_hook_options o = options;
    o.workers = 0;
    assert_int_equal(xkv_hook_create(t.ctx, &o, &none), XKV_ERROR_ARGUMENT);
    o = options;
    o.recompute_rate = -1;
    assert_int_equal(xkv_hook_create(t.ctx, &o, &none), XKV_ERROR_ARGUMENT);
    int32_t tokens[SIZE + 1];
    make_tokens(1, 50000, tokens, SIZE + 1);
    rows *r = make_rows(tokens, SIZE);
    xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE + 1};
    assert_int_equal(xkv_hook_save(t.ctx, hook, &prompt, &r->geometry, r->views, NULL), XKV_ERROR_ARGUMENT);
    prompt.token_count = SIZE;
    r->views[1].dtype = XKV_F16;
    assert_int_equal(xkv_hook_save(t.ctx, hook, &prompt, &r->geometry, r->views, NULL), XKV_ERROR_ARGUMENT);
    free(r);
}

/* A job that cannot be stored is counted, and says why. */
static void failed_jobs_are_counted(void **state)
{
    (void)state;
    char text[256];
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 1000));
    assert_ok(t.ctx, save(t.ctx, 1, SIZE, NULL));
    xkv_hook_flush(hook);
    assert_int_equal(counters().failed, 1);
    xkv_hook_last_failure(hook, text, sizeof text);
    assert_non_null(strstr(text, "do not fit under the cap"));
}

/* --- The queue ---------------------------------------------------------------------------------------------------- */

/* Jobs that take long enough for others to wait. */
static void slow_jobs(xkv_pack_options *pack)
{
    *pack = xkv_pack_options_default();
    pack->profile = XKV_PROFILE_LOSSLESS;
    pack->zstd_level = 19;
    options.pack = pack;
}

static void a_full_queue_refuses(void **state)
{
    (void)state;
    xkv_pack_options pack;
    uint64_t refused = 0;
    slow_jobs(&pack);
    options.queue_bytes = 3 * STORE_TOKENS * STORE_WIDTH * 4 * 2;
    open_hook();
    for (uint64_t i = 0; i < 40; i++) {
        xkv_status status = save(t.ctx, i, STORE_TOKENS, NULL);
        assert_true(status == XKV_OK || status == XKV_ERROR_LIMIT);
        refused += status != XKV_OK;
        assert_true(counters().waiting_bytes <= options.queue_bytes);
    }
    assert_true(refused > 0);
    assert_int_equal(counters().refused, refused);
    xkv_hook_flush(hook);
    assert_int_equal(counters().stored, 40 - refused);
    options.wait = 1;
    open_hook();
    for (uint64_t i = 0; i < 10; i++)
        assert_ok(t.ctx, save(t.ctx, 100 + i, STORE_TOKENS, NULL));
    xkv_hook_flush(hook);
    assert_int_equal(counters().stored, 10);
    options.queue_bytes = 1000; /* smaller than any job: one at a time */
    open_hook();
    for (uint64_t i = 0; i < 3; i++)
        assert_ok(t.ctx, save(t.ctx, 200 + i, STORE_TOKENS, NULL));
    xkv_hook_flush(hook);
    assert_int_equal(counters().stored, 3);
}

static void jobs_can_be_cancelled(void **state)
{
    (void)state;
    xkv_pack_options pack;
    uint64_t jobs[12];
    xkv_store_stats s;
    slow_jobs(&pack);
    open_hook();
    for (uint64_t i = 0; i < 12; i++)
        assert_ok(t.ctx, save(t.ctx, i, STORE_TOKENS, &jobs[i]));
    for (uint64_t i = 0; i < 12; i++)
        if (i != 7)
            xkv_hook_cancel(hook, jobs[i]);
    xkv_hook_cancel(hook, 0);
    xkv_hook_cancel(hook, 12345);
    xkv_hook_flush(hook);
    const xkv_hook_counters c = counters();
    assert_int_equal(c.stored + c.cancelled, 12);
    assert_true(c.stored >= 1 && c.cancelled >= 9);
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_int_equal(s.entries, c.stored);
    for (uint64_t i = 0; i < 12; i++)
        assert_ok(t.ctx, save(t.ctx, 100 + i, STORE_TOKENS, NULL));
    open_hook(); /* the old one drops what waits */
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_true(s.entries < c.stored + 12);
}

/* --- Threads ------------------------------------------------------------------------------------------------------ */

static void *engine(void *user)
{
    uint64_t random = *(const uint64_t *)user;
    xkv_ctx *ctx = new_ctx(1);
    for (int i = 0; i < 60; i++) {
        uint64_t seed = test_random(&random) % 20, job = 0;
        xkv_hit *hit = NULL;
        xkv_hook_match_info info = match(ctx, seed, SIZE, 0, &hit);
        if (hit != NULL)
            assert_ok(ctx, load(ctx, hit, seed, 0, info.match.tokens));
        xkv_hit_close(ctx, hit);
        if (hit == NULL)
            assert_ok(ctx, save(ctx, seed, SIZE, &job));
        if (i % 7 == 0)
            xkv_hook_cancel(hook, job);
        if (i % 11 == 0)
            xkv_hook_flush(hook);
    }
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    xkv_ctx_free(ctx);
    return NULL;
}

static void many_threads_share_a_hook(void **state)
{
    (void)state;
    pthread_t threads[4];
    uint64_t seeds[4];
    options.workers = 3;
    options.wait = 1;
    options.queue_bytes = 100000;
    open_hook();
    for (uint64_t i = 0; i < 4; i++) {
        seeds[i] = i;
        assert_int_equal(pthread_create(&threads[i], NULL, engine, &seeds[i]), 0);
    }
    for (size_t i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    xkv_hook_flush(hook);
    const xkv_hook_counters c = counters();
    assert_int_equal(c.queued, c.stored + c.existed + c.cancelled + c.failed);
    assert_int_equal(c.failed + c.load_failures, 0);
    assert_true(c.stored > 0 && c.stored <= 20 && c.tokens_loaded > 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(saved_prefixes_are_loaded),
        TEST(short_prompts_are_left_alone),
        TEST(groups_become_ready_in_order),
        TEST(what_does_not_fit_is_not_loaded),
        TEST(slow_loads_are_declined),
        TEST(damage_is_a_miss),
        TEST(bad_arguments),
        TEST(failed_jobs_are_counted),
        TEST(a_full_queue_refuses),
        TEST(jobs_can_be_cancelled),
        TEST(many_threads_share_a_hook),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
