/* Failing allocations and failing input and output, one call after another: always an error, never a leak (the
 * allocator counts) or a crash, and success once nothing fails any more. */
#include "support.h"

#include <stdlib.h>
#include <string.h>

/* --- An allocator that fails at call n, once or for ever after --- */

typedef struct failing {
    long fail_at; /* 1: the first call; 0: never */
    int for_ever;
    long calls;
    long alive;
} failing;

static void *failing_alloc(void *user, size_t size)
{
    failing *f = user;
    long call = __atomic_add_fetch(&f->calls, 1, __ATOMIC_SEQ_CST);

    if (f->fail_at && (call == f->fail_at || (f->for_ever && call > f->fail_at)))
        return NULL;
    __atomic_add_fetch(&f->alive, 1, __ATOMIC_SEQ_CST);
    return malloc(size);
}

static void failing_release(void *user, void *ptr)
{
    failing *f = user;

    __atomic_sub_fetch(&f->alive, 1, __ATOMIC_SEQ_CST);
    free(ptr);
}

static xkv_status make_ctx(failing *f, xkv_ctx **ctx)
{
    xkv_ctx_options o = xkv_ctx_options_default();

    o.threads = 1;
    o.allocator = (xkv_allocator){f, failing_alloc, failing_release};
    return xkv_ctx_create(&o, ctx);
}

/* --- Runs under test: the whole of packing, opening, reading, verifying --- */

static synthetic sample(void)
{
    return make_synthetic(&(synthetic_options){.layers = 2,
                                               .tokens = 300,
                                               .heads = 1,
                                               .head_dim = 16,
                                               .dtype = XKV_F16,
                                               .rank = 2,
                                               .group_layers = 2,
                                               .noise = 0.1,
                                               .rope = 1});
}

static xkv_pack_options sample_options(int profile)
{
    xkv_pack_options o = xkv_pack_options_default();

    if (profile == 1)
        o.rank_k = o.rank_v = 3;
    if (profile == 2)
        o.error = 0.05;
    if (profile == 3)
        o.ratio = 3;
    return o;
}

static xkv_status pack_run(xkv_ctx *ctx, const synthetic *s, int profile, memory *m)
{
    xkv_pack_options o = sample_options(profile);
    xkv_output output = memory_output(m);

    return xkv_pack(ctx, &s->geometry, s->views, NULL, NULL, 0, &o, &output, NULL);
}

static xkv_status read_run(xkv_ctx *ctx, const xkv_input *input, const xkv_view *views)
{
    xkv_entry *entry = NULL;
    xkv_status status = xkv_entry_open(ctx, input, &entry);

    if (status == XKV_OK)
        status = xkv_entry_read(ctx, entry, NULL, views);
    if (status == XKV_OK)
        status = xkv_entry_verify(ctx, entry, NULL, NULL);
    xkv_entry_close(ctx, entry);
    return status;
}

/* --- Allocation --- */

/* One attempt with the n-th allocation failing; true when it succeeded. */
static int attempt(long n, int for_ever, int profile, const synthetic *s, const memory *good)
{
    failing f = {.fail_at = n, .for_ever = for_ever};
    memory m = {0};
    xkv_ctx *ctx = NULL;
    uint8_t *data = malloc(s->size);
    xkv_view *views = views_into(s, data);
    xkv_input input = xkv_input_from_memory(good->data, good->size);
    xkv_status status = make_ctx(&f, &ctx);

    if (status == XKV_OK)
        status = pack_run(ctx, s, profile, &m);
    if (status == XKV_OK)
        status = read_run(ctx, &input, views);
    if (status != XKV_OK)
        assert_int_equal(status, XKV_ERROR_MEMORY);
    xkv_ctx_free(ctx);
    assert_int_equal(f.alive, 0);
    memory_free(&m);
    free(views);
    free(data);
    return status == XKV_OK;
}

static void allocations_fail_one_by_one(void **state)
{
    synthetic s = sample();

    (void)state;
    for (int profile = 0; profile < 4; profile++) {
        failing f = {0};
        memory good = {0};
        xkv_ctx *ctx = NULL;
        assert_int_equal(make_ctx(&f, &ctx), XKV_OK);
        assert_int_equal(pack_run(ctx, &s, profile, &good), XKV_OK);
        xkv_ctx_free(ctx);
        for (int for_ever = 0; for_ever < 2; for_ever++) {
            long n = 1;
            while (!attempt(n, for_ever, profile, &s, &good))
                n++;
            assert_true(n > 30); /* so that the loop is known to have reached the inside */
        }
        memory_free(&good);
    }
    free_synthetic(&s);
}

static void memory_limit_is_kept(void **state)
{
    synthetic s = sample();
    int refused = 0, done = 0;

    (void)state;
    for (uint64_t limit = 1024; !done; limit += limit / 4) {
        xkv_ctx_options o = xkv_ctx_options_default();
        xkv_ctx *ctx = NULL;
        memory m = {0};
        xkv_status status;
        o.threads = 1;
        o.memory_limit = limit;
        status = xkv_ctx_create(&o, &ctx);
        if (status == XKV_OK)
            status = pack_run(ctx, &s, 1, &m);
        assert_true(status == XKV_OK || status == XKV_ERROR_LIMIT);
        assert_true(!ctx || xkv_ctx_memory_peak(ctx) <= limit);
        refused += status != XKV_OK;
        done = status == XKV_OK;
        xkv_ctx_free(ctx);
        memory_free(&m);
    }
    assert_true(refused > 3);
    free_synthetic(&s);
}

/* --- Input and output --- */

typedef struct failing_input {
    xkv_input good;
    int fail_at, calls;
} failing_input;

static xkv_status failing_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    failing_input *f = user;

    return ++f->calls == f->fail_at ? XKV_ERROR_IO : f->good.read(f->good.user, ctx, offset, dst, size);
}

static void reads_and_writes_fail_one_by_one(void **state)
{
    synthetic s = sample();
    failing f = {0};
    memory good = {0};
    xkv_ctx *ctx = NULL;
    uint8_t *data = malloc(s.size);
    xkv_view *views = views_into(&s, data);
    xkv_status status = XKV_ERROR_IO;
    int n;

    (void)state;
    assert_int_equal(make_ctx(&f, &ctx), XKV_OK);
    for (n = 1; status != XKV_OK; n++) {
        memory m = {.fail_at = n};
        status = pack_run(ctx, &s, 1, &m);
        assert_true(status == XKV_OK || status == XKV_ERROR_IO);
        if (status == XKV_OK)
            good = m;
        else
            memory_free(&m);
    }
    assert_true(n > 10);
    status = XKV_ERROR_IO;
    for (n = 1; status != XKV_OK; n++) {
        failing_input fi = {xkv_input_from_memory(good.data, good.size), n, 0};
        xkv_input input = fi.good;
        input.user = &fi;
        input.read = failing_read;
        status = read_run(ctx, &input, views);
        assert_true(status == XKV_OK || status == XKV_ERROR_IO);
    }
    assert_true(n > 10);
    xkv_ctx_free(ctx);
    assert_int_equal(f.alive, 0);
    memory_free(&good);
    free(views);
    free(data);
    free_synthetic(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(allocations_fail_one_by_one),
        cmocka_unit_test(memory_limit_is_kept),
        cmocka_unit_test(reads_and_writes_fail_one_by_one),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
