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

enum {
    LOSSLESS,
    SVD_RANKS,
    SVD_ERROR,
    SVD_RATIO,
    DICT_QUALITY,
    DICT_ERROR,
    SCALAR_RATIO,
    SVDQ_ERROR,
    AUTO_ERROR,
    AUTO_RATIO,
    PROFILES
};

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

    if (profile >= SVD_RANKS && profile <= SVD_RATIO)
        o.profile = XKV_PROFILE_SVD;
    if (profile == DICT_QUALITY || profile == DICT_ERROR)
        o.profile = XKV_PROFILE_DICT;
    if (profile == SCALAR_RATIO)
        o.profile = XKV_PROFILE_SCALAR;
    if (profile == SVDQ_ERROR)
        o.profile = XKV_PROFILE_SVD;
    o.half_factors = profile == SVD_ERROR || profile == SVD_RATIO;
    if (profile == SVD_RANKS)
        o.rank_k = o.rank_v = 3;
    if (profile == SVD_ERROR || profile == DICT_ERROR || profile == SVDQ_ERROR || profile == AUTO_ERROR)
        o.error = 0.05;
    if (profile == SVD_RATIO || profile == SCALAR_RATIO || profile == AUTO_RATIO)
        o.ratio = 3;
    return o;
}

/* What the runs of the dict profiles train, open and attach. */
static xkv_status train_run(xkv_ctx *ctx, const synthetic *s, memory *m)
{
    xkv_train_options o = xkv_train_options_default();

    o.zstd_level = 1;
    return train_on(ctx, &s, 1, &o, m);
}

/* A dictionary in a context of its own, for runs that shall not fail in it. */
typedef struct steady {
    xkv_ctx *ctx;
    memory m;
    xkv_input input;
    xkv_dict *dict;
} steady;

static void make_steady(const synthetic *s, steady *d)
{
    memset(d, 0, sizeof *d);
    d->ctx = new_ctx(1);
    assert_ok(d->ctx, train_run(d->ctx, s, &d->m));
    d->input = xkv_input_from_memory(d->m.data, d->m.size);
    assert_ok(d->ctx, xkv_dict_open(d->ctx, &d->input, 1, &d->dict));
}

static void free_steady(steady *d)
{
    xkv_dict_close(d->ctx, d->dict);
    memory_free(&d->m);
    xkv_ctx_free(d->ctx);
}

static xkv_status pack_run(xkv_ctx *ctx, const synthetic *s, int profile, const xkv_dict *dict, memory *m)
{
    xkv_pack_options o = sample_options(profile);
    xkv_output output = memory_output(m);

    o.dict = dict;
    return xkv_pack(ctx, &s->geometry, s->views, NULL, NULL, 0, &o, &output, NULL);
}

static xkv_status read_run(xkv_ctx *ctx, const xkv_input *input, const xkv_dict *dict, const xkv_view *views)
{
    xkv_entry *entry = NULL;
    xkv_entry_info info = {0};
    xkv_status status = xkv_entry_open(ctx, input, &entry);

    if (status == XKV_OK)
        xkv_entry_get_info(entry, &info);
    if (status == XKV_OK && info.needs_dict)
        status = xkv_entry_attach(ctx, entry, dict);
    if (status == XKV_OK)
        status = xkv_entry_read(ctx, entry, NULL, views);
    if (status == XKV_OK)
        status = xkv_entry_verify(ctx, entry, NULL, NULL);
    xkv_entry_close(ctx, entry);
    return status;
}

/* --- Allocation --- */

/* One attempt with the n-th allocation failing; true when it succeeded. */
static int attempt(long n, int for_ever, int profile, const synthetic *s, const steady *d, const memory *good)
{
    failing f = {.fail_at = n, .for_ever = for_ever};
    memory m = {0};
    xkv_ctx *ctx = NULL;
    uint8_t *data = malloc(s->size);
    xkv_view *views = views_into(s, data);
    xkv_input input = xkv_input_from_memory(good->data, good->size);
    xkv_status status = make_ctx(&f, &ctx);

    if (status == XKV_OK)
        status = pack_run(ctx, s, profile, d->dict, &m);
    if (status == XKV_OK)
        status = read_run(ctx, &input, d->dict, views);
    if (status != XKV_OK)
        assert_int_equal(status, XKV_ERROR_MEMORY);
    xkv_ctx_free(ctx);
    assert_int_equal(f.alive, 0);
    memory_free(&m);
    free(views);
    free(data);
    return status == XKV_OK;
}

/* One query of the first layer, with each way to hold what it needs. */
static xkv_status attend_run(xkv_ctx *ctx, const xkv_entry *entry)
{
    float query[16] = {1}, output[16], lse;
    const xkv_queries queries = {.data = query, .count = 1, .heads = 1};
    xkv_attention_options o = xkv_attention_options_default();
    xkv_status status = XKV_OK;

    for (o.hold = XKV_HOLD_NOTHING; status == XKV_OK && o.hold <= XKV_HOLD_ROWS; o.hold++) {
        xkv_attention *attention = NULL;
        status = xkv_attention_open(ctx, entry, &o, &attention);
        if (status == XKV_OK)
            status = xkv_attend(ctx, attention, 0, &queries, NULL, output, &lse);
        xkv_attention_close(ctx, attention);
    }
    return status;
}

/* Entry and dictionary belong to a context that does not fail. */
static int attend_attempt(long n, int for_ever, const xkv_entry *entry)
{
    failing f = {.fail_at = n, .for_ever = for_ever};
    xkv_ctx *ctx = NULL;
    xkv_status status = make_ctx(&f, &ctx);

    if (status == XKV_OK)
        status = attend_run(ctx, entry);
    if (status != XKV_OK)
        assert_int_equal(status, XKV_ERROR_MEMORY);
    xkv_ctx_free(ctx);
    assert_int_equal(f.alive, 0);
    return status == XKV_OK;
}

static void attention_without_memory(void **state)
{
    synthetic s = sample();
    steady d;

    (void)state;
    make_steady(&s, &d);
    for (int profile = 0; profile < PROFILES; profile++) {
        xkv_pack_options o = sample_options(profile);
        packed p;
        o.dict = d.dict;
        o.chunk_tokens = 128;
        p = pack_planes(d.ctx, &s, &o);
        for (int for_ever = 0; for_ever < 2; for_ever++) {
            long n = 1;
            while (!attend_attempt(n, for_ever, p.entry))
                n++;
        }
        free_packed(d.ctx, &p);
    }
    free_steady(&d);
    free_synthetic(&s);
}

static void allocations_fail_one_by_one(void **state)
{
    synthetic s = sample();
    steady d;

    (void)state;
    make_steady(&s, &d);
    for (int profile = 0; profile < PROFILES; profile++) {
        failing f = {0};
        memory good = {0};
        xkv_ctx *ctx = NULL;
        assert_int_equal(make_ctx(&f, &ctx), XKV_OK);
        assert_int_equal(pack_run(ctx, &s, profile, d.dict, &good), XKV_OK);
        xkv_ctx_free(ctx);
        for (int for_ever = 0; for_ever < 2; for_ever++) {
            long n = 1;
            while (!attempt(n, for_ever, profile, &s, &d, &good))
                n++;
            assert_true(n > 30); /* so that the loop is known to have reached the inside */
        }
        memory_free(&good);
    }
    free_steady(&d);
    free_synthetic(&s);
}

/* Training, then opening what was trained. */
static int train_attempt(long n, int for_ever, const synthetic *s, const xkv_input *input)
{
    failing f = {.fail_at = n, .for_ever = for_ever};
    memory m = {0};
    xkv_ctx *ctx = NULL;
    xkv_dict *dict = NULL;
    xkv_status status = make_ctx(&f, &ctx);

    if (status == XKV_OK)
        status = train_run(ctx, s, &m);
    if (status == XKV_OK)
        status = xkv_dict_open(ctx, input, 1, &dict);
    if (status != XKV_OK)
        assert_int_equal(status, XKV_ERROR_MEMORY);
    xkv_dict_close(ctx, dict);
    xkv_ctx_free(ctx);
    assert_int_equal(f.alive, 0);
    memory_free(&m);
    return status == XKV_OK;
}

static void allocations_of_training_fail_one_by_one(void **state)
{
    synthetic s = sample();
    steady d;

    (void)state;
    make_steady(&s, &d);
    for (int for_ever = 0; for_ever < 2; for_ever++) {
        long n = 1;
        while (!train_attempt(n, for_ever, &s, &d.input))
            n++;
        assert_true(n > 60);
    }
    free_steady(&d);
    free_synthetic(&s);
}

enum { TRAIN = PROFILES }; /* what else the loops below run */

static xkv_status any_run(xkv_ctx *ctx, const synthetic *s, int run, const steady *d, memory *m)
{
    return run == TRAIN ? train_run(ctx, s, m) : pack_run(ctx, s, run, d->dict, m);
}

static void limit_run(const synthetic *s, int run, const steady *d)
{
    int refused = 0, done = 0;

    for (uint64_t limit = 1024; !done; limit += limit / 4) {
        xkv_ctx_options o = xkv_ctx_options_default();
        xkv_ctx *ctx = NULL;
        memory m = {0};
        xkv_status status;
        o.threads = 1;
        o.memory_limit = limit;
        status = xkv_ctx_create(&o, &ctx);
        if (status == XKV_OK)
            status = any_run(ctx, s, run, d, &m);
        assert_true(status == XKV_OK || status == XKV_ERROR_LIMIT);
        assert_true(!ctx || xkv_ctx_memory_peak(ctx) <= limit);
        refused += status != XKV_OK;
        done = status == XKV_OK;
        xkv_ctx_free(ctx);
        memory_free(&m);
    }
    assert_true(refused > 3);
}

static void memory_limit_is_kept(void **state)
{
    static const int runs[] = {SVD_RANKS, DICT_ERROR, SCALAR_RATIO, SVDQ_ERROR, AUTO_RATIO, TRAIN};
    synthetic s = sample();
    steady d;

    (void)state;
    make_steady(&s, &d);
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++)
        limit_run(&s, runs[i], &d);
    free_steady(&d);
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

/* Every write fails once; the entry or dictionary that is complete in the end. */
static memory write_run(xkv_ctx *ctx, const synthetic *s, int run, const steady *d)
{
    xkv_status status = XKV_ERROR_IO;
    memory good = {0};
    int n;

    for (n = 1; status != XKV_OK; n++) {
        memory m = {.fail_at = n};
        status = any_run(ctx, s, run, d, &m);
        assert_true(status == XKV_OK || status == XKV_ERROR_IO);
        if (status == XKV_OK)
            good = m;
        else
            memory_free(&m);
    }
    assert_true(n > 8);
    return good;
}

static xkv_status open_run(xkv_ctx *ctx, const xkv_input *input)
{
    xkv_dict *dict = NULL;
    xkv_status status = xkv_dict_open(ctx, input, 1, &dict);

    xkv_dict_close(ctx, dict);
    return status;
}

static void reads_and_writes_fail_one_by_one(void **state)
{
    static const int runs[] = {SVD_RANKS, DICT_QUALITY, SCALAR_RATIO, SVDQ_ERROR, TRAIN};
    synthetic s = sample();
    steady d;
    failing f = {0};
    xkv_ctx *ctx = NULL;
    uint8_t *data = malloc(s.size);
    xkv_view *views = views_into(&s, data);

    (void)state;
    make_steady(&s, &d);
    assert_int_equal(make_ctx(&f, &ctx), XKV_OK);
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        memory good = write_run(ctx, &s, runs[i], &d);
        xkv_status status = XKV_ERROR_IO;
        int n;
        for (n = 1; status != XKV_OK; n++) {
            failing_input fi = {xkv_input_from_memory(good.data, good.size), n, 0};
            xkv_input input = fi.good;
            input.user = &fi;
            input.read = failing_read;
            status = runs[i] == TRAIN ? open_run(ctx, &input) : read_run(ctx, &input, d.dict, views);
            assert_true(status == XKV_OK || status == XKV_ERROR_IO);
        }
        assert_true(n > 8);
        memory_free(&good);
    }
    xkv_ctx_free(ctx);
    assert_int_equal(f.alive, 0);
    free(views);
    free(data);
    free_steady(&d);
    free_synthetic(&s);
}

/* --- Appending --- */

/* One attempt to append to `base`, in which one allocation, read or write fails: the n-th. */
typedef enum failure { ALLOCATION, ALLOCATIONS, READ, WRITE, FAILURES } failure;

static xkv_status append_run(xkv_ctx *ctx, const xkv_input *base, const xkv_dict *dict, const synthetic *s, memory *m)
{
    xkv_output output = memory_output(m);
    xkv_entry_info info = {0};
    xkv_entry *entry = NULL;
    xkv_status status = xkv_entry_open(ctx, base, &entry);

    if (status == XKV_OK)
        xkv_entry_get_info(entry, &info);
    if (status == XKV_OK && info.needs_dict)
        status = xkv_entry_attach(ctx, entry, dict);
    if (status == XKV_OK)
        status = xkv_append(ctx, entry, &s->geometry, s->views, NULL, NULL, 0, NULL, &output, NULL);
    xkv_entry_close(ctx, entry);
    return status;
}

static int append_attempt(int n, failure which, const synthetic *s, const steady *d, const memory *base)
{
    failing f = {.fail_at = which <= ALLOCATIONS ? n : 0, .for_ever = which == ALLOCATIONS};
    failing_input fi = {xkv_input_from_memory(base->data, base->size), which == READ ? n : 0, 0};
    xkv_input input = {.user = &fi, .size = fi.good.size, .read = failing_read};
    memory m = {.fail_at = which == WRITE ? n : 0};
    xkv_ctx *ctx = NULL;
    xkv_status status = make_ctx(&f, &ctx);

    if (status == XKV_OK)
        status = append_run(ctx, &input, d->dict, s, &m);
    if (status != XKV_OK)
        assert_int_equal(status, which <= ALLOCATIONS ? XKV_ERROR_MEMORY : XKV_ERROR_IO);
    xkv_ctx_free(ctx);
    assert_int_equal(f.alive, 0);
    memory_free(&m);
    return status == XKV_OK;
}

static void appending_fails_at_every_step(void **state)
{
    static const int profiles[] = {LOSSLESS, SVD_RANKS, DICT_QUALITY, SCALAR_RATIO, SVDQ_ERROR};
    synthetic s = sample(), first = s;
    steady d;

    (void)state;
    make_steady(&s, &d);
    first.geometry.token_count = 200;
    for (size_t i = 0; i < sizeof profiles / sizeof *profiles; i++) {
        memory base = {0};
        assert_ok(d.ctx, pack_run(d.ctx, &first, profiles[i], d.dict, &base));
        for (failure which = 0; which < FAILURES; which++) {
            int n = 1;
            while (!append_attempt(n, which, &s, &d, &base))
                n++;
            assert_true(n > 6);
        }
        memory_free(&base);
    }
    free_steady(&d);
    free_synthetic(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(appending_fails_at_every_step),
        cmocka_unit_test(allocations_fail_one_by_one),
        cmocka_unit_test(allocations_of_training_fail_one_by_one),
        cmocka_unit_test(memory_limit_is_kept),
        cmocka_unit_test(attention_without_memory),
        cmocka_unit_test(reads_and_writes_fail_one_by_one),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
