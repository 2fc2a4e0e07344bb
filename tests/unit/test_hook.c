/* test_hook.c - the hook from an engine's side: what a match offers and when it declines, loads group by group, and
 * what is left when one fails. */
#include "store_support.h"

#include "hook_internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static test_store t;
static xkv_hook *hook;
static xkv_namespace ns;

/* A clock that moves by a step each time it is looked at, so that everything measured takes one step. */
static uint64_t test_time, test_step;

static uint64_t test_clock(void *user)
{
    (void)user;
    return test_time += test_step;
}

static void open_hook(const xkv_pack_options *pack)
{
    xkv_hook_options o = xkv_hook_options_default();
    o.clock = test_clock;
    o.pack = pack;
    assert_ok(t.ctx, xkv_hook_create(t.ctx, t.store, &o, &hook));
}

static int setup(void **state)
{
    (void)state;
    make_store(&t, 0);
    ns = make_namespace(NULL);
    test_step = 1000;
    open_hook(NULL);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    xkv_hook_close(hook);
    remove_folder(&t);
    return 0;
}

static xkv_hook_counters counters(void)
{
    xkv_hook_counters c;
    xkv_hook_get_counters(hook, &c);
    return c;
}

/* --- Prompts whose rows follow from their tokens ------------------------------------------------------------------ */

static void save(const int32_t *tokens, uint32_t count)
{
    rows *r = make_rows(tokens, count);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_hook_saved saved;
    assert_ok(t.ctx, xkv_hook_save(t.ctx, hook, &ns, &prompt, &r->geometry, r->views, NULL, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_QUEUED);
    memset(r, 0x55, sizeof *r); /* it was copied */
    free(r);
    assert_ok(t.ctx, xkv_hook_flush(t.ctx, hook, XKV_HOOK_FOREVER));
}

static xkv_hook_found match(const int32_t *tokens, uint32_t count, const xkv_hook_match_options *o, xkv_hook_hit **hit)
{
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_hook_found f;
    *hit = (xkv_hook_hit *)&prompt;
    assert_ok(t.ctx, xkv_hook_match(t.ctx, hook, &ns, &prompt, o, &f, hit));
    assert_true((*hit != NULL) == (f.reason == XKV_MATCH_FOUND));
    assert_true((f.tokens > 0) == (f.reason == XKV_MATCH_FOUND));
    return f;
}

static uint32_t reason_of(const int32_t *tokens, uint32_t count)
{
    xkv_hook_hit *hit;
    uint32_t reason = match(tokens, count, NULL, &hit).reason;
    xkv_hook_hit_close(hit);
    return reason;
}

/* Load [first, first + count) and compare each row. */
static void load_rows(xkv_hook_hit *hit, const int32_t *tokens, uint32_t first, uint32_t count)
{
    rows *expected = make_rows(tokens, first + count), *got = make_rows(NULL, first + count);
    xkv_hook_load_options o = xkv_hook_load_options_default();
    o.first_token = first;
    o.token_count = count;
    o.positions = expected->positions + first;
    assert_ok(t.ctx, xkv_hook_load(t.ctx, hit, &got->geometry, got->views, &o));
    for (uint32_t p = 0; p < 2 * STORE_LAYERS; p++) {
        assert_memory_equal(got->data[p], expected->data[p] + first, count * sizeof expected->data[p][0]);
        for (uint32_t i = count; i < STORE_TOKENS; i++)
            assert_true(got->data[p][i][0] == 0);
    }
    free(expected);
    free(got);
}

static void a_saved_prompt_comes_back(void **state)
{
    (void)state;
    xkv_hook_hit *hit;
    int32_t tokens[700];
    make_tokens(1, 50000, tokens, 700);
    assert_int_equal(reason_of(tokens, 700), XKV_MATCH_NONE);
    save(tokens, 600);
    xkv_hook_found f = match(tokens, 700, NULL, &hit);
    assert_int_equal(f.tokens, 600);
    assert_int_equal(f.entry_tokens, 600);
    load_rows(hit, tokens, 0, 600);
    load_rows(hit, tokens, 599, 1);
    load_rows(hit, tokens, 250, 300);
    xkv_hook_hit_close(hit);
    xkv_hook_counters c = counters();
    assert_int_equal(c.matches_found, 1);
    assert_int_equal(c.misses_none, 1);
    assert_int_equal(c.found_tokens, 600);
    assert_int_equal(c.loads_ok, 3);
    assert_int_equal(c.loaded_tokens, 901);
    assert_int_equal(c.loaded_bytes, 901 * 2 * STORE_WIDTH * 4);
    assert_int_equal(c.saves_queued, 1);
    assert_int_equal(c.saves_stored, 1);
    assert_int_equal(c.saved_tokens, 600);
    assert_int_equal(c.saved_bytes, 600 * 2 * STORE_WIDTH * 4);
    assert_int_equal(c.saved_packed_bytes, f.bytes);
    assert_int_equal(c.loaded_packed_bytes / 10, f.bytes * 901 / 600 / 10); /* rounded once for each load */
}

static void tenants_are_apart(void **state)
{
    (void)state;
    const xkv_namespace mine = ns;
    int32_t tokens[100];
    make_tokens(2, 50000, tokens, 100);
    save(tokens, 100);
    ns = make_namespace("other");
    assert_int_equal(reason_of(tokens, 100), XKV_MATCH_NONE);
    ns = mine;
    assert_int_equal(reason_of(tokens, 100), XKV_MATCH_FOUND);
}

/* Against a search for the largest number of tokens that all options allow. */
static void offers_agree_with_a_plain_search(void **state)
{
    (void)state;
    enum { STORED = 40, LONGEST = 60 };
    uint64_t random = 5;
    int32_t tokens[LONGEST], asked[LONGEST];
    make_tokens(3, 50000, tokens, LONGEST);
    save(tokens, STORED);
    for (int round = 0; round < 3000; round++) {
        xkv_hook_match_options o = xkv_hook_match_options_default();
        xkv_hook_hit *hit;
        uint32_t count = 1 + (uint32_t)(test_random(&random) % LONGEST), same = (uint32_t)(test_random(&random) % 50);
        uint32_t common = 0, best = 0;
        o.page_tokens = 1 + (uint32_t)(test_random(&random) % 9);
        o.min_tokens = (uint32_t)(test_random(&random) % 20);
        o.have_tokens = (uint32_t)(test_random(&random) % 30);
        o.compute_tokens = (uint32_t)(test_random(&random) % 3);
        memcpy(asked, tokens, sizeof asked);
        if (same < LONGEST)
            asked[same] ^= 1;
        while (common < STORED && common < count && asked[common] == tokens[common])
            common++;
        for (uint32_t n = 1; n <= common && n + o.compute_tokens <= count; n++) {
            if (n % o.page_tokens == 0 && n > o.have_tokens && n >= o.min_tokens)
                best = n;
        }
        xkv_hook_found f = match(asked, count, &o, &hit);
        assert_int_equal(f.tokens, best);
        assert_int_equal(f.offered_tokens, best);
        if (best > 0)
            load_rows(hit, tokens, o.have_tokens, best - o.have_tokens);
        else
            assert_true(f.reason == XKV_MATCH_SHORT || (f.reason == XKV_MATCH_NONE && common == 0));
        xkv_hook_hit_close(hit);
    }
}

static void wrong_arguments_are_refused(void **state)
{
    (void)state;
    int32_t tokens[10] = {1, 2, 3};
    xkv_prompt prompt = {.tokens = tokens, .token_count = 10};
    xkv_hook_match_options o = xkv_hook_match_options_default();
    xkv_hook_options h = xkv_hook_options_default();
    xkv_hook_found f;
    xkv_hook_hit *hit = NULL;
    xkv_hook *other = NULL;
    o.page_tokens = 0;
    assert_int_equal(xkv_hook_match(t.ctx, hook, &ns, &prompt, &o, &f, &hit), XKV_ERROR_ARGUMENT);
    o.page_tokens = 1;
    o.seconds_per_token = NAN;
    assert_int_equal(xkv_hook_match(t.ctx, hook, &ns, &prompt, &o, &f, &hit), XKV_ERROR_ARGUMENT);
    tokens[4] = -1;
    assert_int_equal(xkv_hook_match(t.ctx, hook, &ns, &prompt, NULL, &f, &hit), XKV_ERROR_ARGUMENT);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "negative"));
    assert_null(hit);
    assert_int_equal(counters().matches_failed, 3);
    h.save_threads = 0;
    assert_int_equal(xkv_hook_create(t.ctx, t.store, &h, &other), XKV_ERROR_ARGUMENT);
    h = xkv_hook_options_default();
    h.queue_bytes = 0;
    assert_int_equal(xkv_hook_create(t.ctx, t.store, &h, &other), XKV_ERROR_ARGUMENT);
    h = xkv_hook_options_default();
    h.load_seconds_per_byte = -1;
    assert_int_equal(xkv_hook_create(t.ctx, t.store, &h, &other), XKV_ERROR_ARGUMENT);
    assert_null(other);
    xkv_hook_close(NULL);
    xkv_hook_hit_close(NULL);
}

/* --- Does loading pay? -------------------------------------------------------------------------------------------- */

/* A world in which loads take a fixed time, and so much for bytes and tokens. */
static void expectations_find_the_truth(void **state)
{
    (void)state;
    static const double worlds[][XKV_COST_PARTS] = {
        {1e-3, 1e-9, 2e-5}, {5e-2, 1e-7, 2e-6}, {1e-5, 1e-11, 1e-3}, {1e-4, 3e-8, 1e-8}};
    for (size_t w = 0; w < sizeof worlds / sizeof *worlds; w++) {
        const double *world = worlds[w];
        uint64_t random = 3;
        xkv_cost c;
        xkv_cost_init(&c, 1e-3, 1e-9, 2e-5);
        double error = 0;
        for (int i = 0; i < 400; i++) {
            double tokens = 100 + (double)(test_random(&random) % 8000);
            double bytes = tokens * (i % 2 ? 1500 : 23000); /* entries of two profiles */
            double truth = world[XKV_COST_LOAD] + world[XKV_COST_BYTE] * bytes + world[XKV_COST_TOKEN] * tokens;
            if (i >= 200)
                error += fabs(log(xkv_cost_expect(&c, bytes, tokens) / truth)) / 200;
            xkv_cost_learn(&c, bytes, tokens, truth * (0.9 + 0.2 * test_uniform(&random)));
        }
        if (error > 0.2)
            fail_msg("world %zu: the expectation is off by %.0f %% on average", w, 100 * error);
        assert_true(c.now[0] > 0 && c.now[1] > 0 && c.now[2] > 0);
        for (int i = 0; i < 256 * 20; i++)
            xkv_cost_fade(&c);
        for (int i = 0; i < XKV_COST_PARTS; i++)
            assert_true(fabs(c.now[i] / c.start[i] - 1) < 1e-6);
    }
}

/* Half of the way (in logarithms), whatever the parts are. */
static void one_load_moves_the_expectation(void **state)
{
    (void)state;
    static const double loads[][2] = {{1, 1}, {1e6, 1}, {1, 1000}, {1e6, 50}, {2e7, 1000}};
    for (size_t i = 0; i < sizeof loads / sizeof *loads; i++) {
        xkv_cost c;
        xkv_cost_init(&c, 1e-3, 1e-9, 2e-5);
        double before = xkv_cost_expect(&c, loads[i][0], loads[i][1]);
        xkv_cost_learn(&c, loads[i][0], loads[i][1], before * 1.1);
        double after = xkv_cost_expect(&c, loads[i][0], loads[i][1]);
        assert_true(fabs(log(after / before) / log(1.1) - 0.5) < 0.02);
    }
}

static void one_slow_load_is_not_believed(void **state)
{
    (void)state;
    xkv_cost c;
    xkv_cost_init(&c, 1e-3, 1e-9, 2e-5);
    double before = xkv_cost_expect(&c, 1e6, 1000);
    xkv_cost_learn(&c, 1e6, 1000, 1e9);
    assert_true(xkv_cost_expect(&c, 1e6, 1000) < before * 4);
    for (int i = 0; i < 20; i++)
        xkv_cost_learn(&c, 1e6, 1000, before);
    assert_true(fabs(xkv_cost_expect(&c, 1e6, 1000) / before - 1) < 0.01);
    xkv_cost_learn(&c, 1e6, 1000, 0); /* a clock that stands */
    assert_true(xkv_cost_expect(&c, 1e6, 1000) > 0);
}

static void slow_loads_are_declined(void **state)
{
    (void)state;
    xkv_hook_match_options o = xkv_hook_match_options_default();
    xkv_hook_hit *hit;
    int32_t tokens[501];
    make_tokens(4, 50000, tokens, 501);
    save(tokens, 500);
    xkv_hook_found f = match(tokens, 501, &o, &hit);
    assert_true(fabs(f.load_seconds - (1e-3 + 1e-9 * (double)f.bytes + 2e-5 * 500)) < 1e-9);
    assert_true(f.recompute_seconds == 0);
    o.seconds_per_token = 1e-3;
    test_step = 2000000000; /* each load takes 2 s, where computing takes 0.5 s */
    for (int i = 0; i < 8; i++)
        load_rows(hit, tokens, 0, 500);
    xkv_hook_hit_close(hit);
    test_step = 1000;
    f = match(tokens, 501, &o, &hit);
    assert_int_equal(f.reason, XKV_HOOK_DECLINED);
    assert_null(hit);
    assert_int_equal(f.tokens, 0);
    assert_int_equal(f.offered_tokens, 500);
    assert_true(fabs(f.recompute_seconds - 0.5) < 1e-9);
    assert_true(fabs(f.load_seconds / 2 - 1) < 0.1);
    o.seconds_per_token = 0.1; /* a slower engine would still load */
    assert_int_equal(match(tokens, 501, &o, &hit).reason, XKV_MATCH_FOUND);
    xkv_hook_hit_close(hit);
    o.seconds_per_token = 1e-3;
    int declined = 1;
    while (declined < 400 && (f = match(tokens, 501, &o, &hit)).reason == XKV_HOOK_DECLINED)
        declined++;
    assert_int_equal(f.reason, XKV_MATCH_FOUND); /* tried again */
    assert_true(declined > 20);
    assert_int_equal(counters().matches_declined, declined);
    test_step = 2000000000;
    load_rows(hit, tokens, 0, 500);
    xkv_hook_hit_close(hit);
    test_step = 1000;
    assert_int_equal(match(tokens, 501, &o, &hit).reason, XKV_HOOK_DECLINED);
}

/* To the store, what was declined or never loaded is no hit; what was loaded is one, of whole pages. */
static void hits_are_what_is_loaded(void **state)
{
    (void)state;
    xkv_hook_match_options o = xkv_hook_match_options_default();
    xkv_hook_hit *hit;
    xkv_store_stats s;
    int32_t tokens[601];
    make_tokens(14, 50000, tokens, 601);
    save(tokens, 600);
    o.page_tokens = 256;
    assert_int_equal(match(tokens, 601, &o, &hit).tokens, 512);
    xkv_hook_hit_close(hit);
    o.seconds_per_token = 1e-12;
    assert_int_equal(match(tokens, 601, &o, &hit).reason, XKV_HOOK_DECLINED);
    o.seconds_per_token = 0;
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_int_equal(s.hits + s.misses + s.tokens_reused + s.bytes_reused, 0);
    match(tokens, 601, &o, &hit);
    load_rows(hit, tokens, 0, 256);
    load_rows(hit, tokens, 256, 256);
    xkv_hook_hit_close(hit);
    tokens[0] ^= 1;
    assert_int_equal(match(tokens, 601, &o, &hit).reason, XKV_MATCH_NONE);
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_int_equal(s.hits, 1);
    assert_int_equal(s.misses, 1);
    assert_int_equal(s.tokens_reused, 512);
}

static void only_what_must_be_loaded_costs(void **state)
{
    (void)state;
    xkv_hook_match_options o = xkv_hook_match_options_default();
    xkv_hook_hit *hit;
    int32_t tokens[1000];
    make_tokens(5, 50000, tokens, 1000);
    save(tokens, 1000);
    o.have_tokens = 899;
    o.seconds_per_token = 1;
    xkv_hook_found f = match(tokens, 1000, &o, &hit);
    assert_int_equal(f.tokens, 999);
    assert_true(fabs(f.recompute_seconds - 100) < 1e-9);
    assert_true(fabs(f.load_seconds - (1e-3 + 1e-10 * (double)f.bytes + 2e-5 * 100)) < 1e-9);
    xkv_hook_hit_close(hit);
    o.have_tokens = 999;
    assert_int_equal(match(tokens, 1000, &o, &hit).reason, XKV_MATCH_SHORT);
}

/* --- Several layers ----------------------------------------------------------------------------------------------- */

enum { LAYERS = 5, TOKENS = 600, SENTINEL = 0x5a };

/* A cache of several layers, saved and matched, and room to load it. */
typedef struct engine {
    synthetic source;
    int32_t tokens[TOKENS + 1];
    xkv_hook_hit *hit;
    uint64_t id;
    uint8_t *cache;
    xkv_view *views;
    /* What group_ready has seen. */
    uint32_t announced, layers, stop_at;
    xkv_ctx *cancel;
    bool wrong;
} engine;

static xkv_status save_engine(const engine *e)
{
    const xkv_prompt prompt = {.tokens = e->tokens, .token_count = TOKENS};
    xkv_status status = xkv_hook_save(t.ctx, hook, &ns, &prompt, &e->source.geometry, e->source.views, NULL, NULL);
    return status == XKV_OK ? xkv_hook_flush(t.ctx, hook, XKV_HOOK_FOREVER) : status;
}

static engine *make_engine(const xkv_pack_options *pack)
{
    engine *e = calloc(1, sizeof *e);
    const synthetic_options o = {
        .layers = LAYERS, .tokens = TOKENS, .heads = 2, .head_dim = 8, .dtype = XKV_F16, .rope = 1, .seed = 9};
    e->source = make_synthetic(&o);
    e->cache = malloc(e->source.size);
    e->views = views_into(&e->source, e->cache);
    memset(e->cache, SENTINEL, e->source.size);
    make_tokens(7, 50000, e->tokens, TOKENS + 1);
    e->stop_at = UINT32_MAX;
    xkv_hook_close(hook);
    open_hook(pack);
    assert_ok(t.ctx, save_engine(e));
    e->id = match(e->tokens, TOKENS + 1, NULL, &e->hit).id;
    assert_non_null(e->hit);
    return e;
}

static void free_engine(engine *e)
{
    xkv_hook_hit_close(e->hit);
    free_synthetic(&e->source);
    free(e->cache);
    free(e->views);
    free(e);
}

/* Bytes of one layer: K and V. */
static size_t layer_bytes(const engine *e)
{
    return e->source.size / LAYERS;
}

static int group_ready(void *user, uint32_t group, uint32_t layers)
{
    engine *e = user;
    e->wrong |= group != e->announced++ || layers < e->layers || layers > LAYERS;
    e->layers = layers;
    e->wrong |= memcmp(e->cache, e->source.data, layers * layer_bytes(e)) != 0;
    if (e->cancel != NULL && e->announced == 2)
        xkv_ctx_cancel(e->cancel);
    return e->announced == e->stop_at;
}

static xkv_status load(engine *e)
{
    xkv_hook_load_options o = xkv_hook_load_options_default();
    o.group_ready = group_ready;
    o.group_ready_user = e;
    e->announced = e->layers = 0;
    xkv_status status = xkv_hook_load(t.ctx, e->hit, &e->source.geometry, e->views, &o);
    assert_false(e->wrong);
    /* What was announced stays as it was, whatever came later. */
    assert_memory_equal(e->cache, e->source.data, e->layers * layer_bytes(e));
    return status;
}

static bool is_untouched(const engine *e)
{
    for (size_t i = 0; i < e->source.size; i++) {
        if (e->cache[i] != SENTINEL)
            return false;
    }
    return true;
}

static void groups_are_announced_in_order(void **state)
{
    (void)state;
    for (uint32_t group_layers = 1; group_layers <= LAYERS + 1; group_layers++) {
        xkv_pack_options pack = xkv_pack_options_default();
        xkv_store_stats s;
        pack.group_layers = group_layers;
        engine *e = make_engine(&pack);
        assert_ok(t.ctx, load(e));
        assert_int_equal(e->layers, LAYERS);
        assert_true(e->announced >= (LAYERS + group_layers - 1) / group_layers);
        assert_memory_equal(e->cache, e->source.data, e->source.size);
        uint64_t id = e->id;
        free_engine(e);
        assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, id));
        assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
        assert_int_equal(s.entries, 0);
    }
}

static void time_in_callbacks_is_not_the_load_s(void **state)
{
    (void)state;
    engine *e = make_engine(NULL);
    test_step = 1000000000;
    xkv_hook_counters before = counters();
    assert_ok(t.ctx, load(e));
    /* The clock was looked at when the load began, twice for each callback, and when it ended. */
    double seconds = counters().load_seconds - before.load_seconds;
    assert_true(fabs(seconds - (e->announced + 1)) < 1e-6);
    free_engine(e);
}

/* Rows of [first, first + count) as they come at `positions`: rotated again in f64, rounded to f16 once. */
static void assert_moved(const engine *e, uint32_t first, uint32_t count, const int32_t *positions)
{
    double row[16];
    for (uint32_t p = 0; p < 2 * LAYERS; p++)
        for (uint32_t i = 0; i < count; i++) {
            moved_row(&e->source, e->source.data, p, first + i, positions[i], row);
            for (uint32_t d = 0; d < 16; d++)
                assert_true(fabs(element(&e->source, e->cache, p, i, d) - row[d]) <= fabs(row[d]) / 2048 + 4e-6);
        }
}

static void rows_come_at_other_positions(void **state)
{
    (void)state;
    engine *e = make_engine(NULL);
    xkv_hook_load_options o = xkv_hook_load_options_default();
    int32_t positions[TOKENS + 1];
    for (int32_t i = 0; i <= TOKENS; i++)
        positions[i] = i + 321;
    o.positions = positions;
    assert_ok(t.ctx, xkv_hook_load(t.ctx, e->hit, &e->source.geometry, e->views, &o));
    assert_moved(e, 0, TOKENS, positions);
    o.first_token = 77; /* positions[0] is that of token 77 now */
    o.token_count = 100;
    assert_ok(t.ctx, xkv_hook_load(t.ctx, e->hit, &e->source.geometry, e->views, &o));
    assert_moved(e, 77, 100, positions);
    o.token_count = TOKENS;
    assert_int_equal(xkv_hook_load(t.ctx, e->hit, &e->source.geometry, e->views, &o), XKV_ERROR_ARGUMENT);
    assert_int_equal(counters().loads_refused, 1);
    assert_int_equal(counters().loads_ok, 2);
    free_engine(e);
}

/* The rows of make_rows() do not say how they are rotated. */
static void unknown_ropes_stay_where_they_are(void **state)
{
    (void)state;
    xkv_hook_load_options o = xkv_hook_load_options_default();
    rows *got = make_rows(NULL, 100), *untouched = make_rows(NULL, 100);
    xkv_hook_hit *hit;
    int32_t tokens[101], positions[100];
    make_tokens(8, 50000, tokens, 101);
    save(tokens, 100);
    assert_int_equal(match(tokens, 101, NULL, &hit).tokens, 100);
    for (int32_t i = 0; i < 100; i++)
        positions[i] = i + (i == 99);
    o.positions = positions;
    assert_int_equal(xkv_hook_load(t.ctx, hit, &got->geometry, got->views, &o), XKV_ERROR_UNSUPPORTED);
    assert_memory_equal(got->data, untouched->data, sizeof got->data);
    assert_int_equal(counters().loads_refused, 1);
    load_rows(hit, tokens, 0, 100);
    xkv_hook_hit_close(hit);
    free(got);
    free(untouched);
}

/* Every way in which the engine may differ from the entry: one change of its geometry. */
static void other_geometries_are_refused(void **state)
{
    (void)state;
    engine *e = make_engine(NULL);
    xkv_plane planes[2 * LAYERS];
    xkv_rope rope;
    for (int change = 0; change < 9; change++) {
        xkv_geometry g = e->source.geometry;
        memcpy(planes, g.planes, sizeof planes);
        rope = g.ropes[0];
        g.planes = planes;
        g.ropes = &rope;
        xkv_status expected = XKV_ERROR_MISMATCH;
        switch (change) {
        case 0:
            g.layer_count--;
            break;
        case 1:
            g.plane_count--;
            break;
        case 2:
            planes[9].heads = 1;
            break;
        case 3:
            planes[3].head_dim = 4;
            break;
        case 4:
            planes[2].kind = XKV_PLANE_V;
            break;
        case 5:
            rope.inv_freq[3] *= 1.0001;
            break;
        case 6:
            rope.style = !rope.style;
            break;
        case 7:
            planes[0].rope = 1;
            expected = XKV_ERROR_ARGUMENT;
            break;
        case 8: /* how its keys are rotated is not said */
            for (size_t i = 0; i < 2 * LAYERS; i++)
                planes[i].rope = XKV_NO_ROPE;
            expected = XKV_OK;
            break;
        }
        assert_int_equal(xkv_hook_load(t.ctx, e->hit, &g, e->views, NULL), expected);
        if (expected != XKV_OK)
            assert_true(is_untouched(e));
    }
    assert_memory_equal(e->cache, e->source.data, e->source.size);
    e->views[4].data = NULL;
    assert_int_equal(xkv_hook_load(t.ctx, e->hit, &e->source.geometry, e->views, NULL), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_hook_load(t.ctx, e->hit, NULL, e->views, NULL), XKV_ERROR_ARGUMENT);
    assert_int_equal(counters().loads_refused, 10);
    free_engine(e);
}

static void element_types_may_differ(void **state)
{
    (void)state;
    engine *e = make_engine(NULL);
    const size_t elements = e->source.size / 2;
    float *wide = calloc(elements, sizeof *wide);
    for (uint32_t p = 0; p < 2 * LAYERS; p++)
        e->views[p] = (xkv_view){wide + (size_t)p * TOKENS * 16, 64, 32, 4, NULL, .dtype = XKV_F32};
    assert_ok(t.ctx, xkv_hook_load(t.ctx, e->hit, &e->source.geometry, e->views, NULL));
    for (size_t i = 0; i < elements; i++) {
        uint16_t half;
        memcpy(&half, e->source.data + 2 * i, 2);
        assert_true((double)wide[i] == test_from_half(half));
    }
    free(wide);
    free_engine(e);
}

/* What is loaded is what the codec alone makes of the same cache with the same dictionary. */
static void dictionaries_must_be_in_the_store(void **state)
{
    (void)state;
    engine *e = make_engine(NULL);
    const synthetic *list = &e->source;
    xkv_pack_options pack = xkv_pack_options_default();
    xkv_dict *dict = NULL;
    memory m = {0};
    assert_ok(t.ctx, train_on(t.ctx, &list, 1, NULL, &m));
    const xkv_input input = xkv_input_from_memory(m.data, m.size);
    assert_ok(t.ctx, xkv_dict_open(t.ctx, &input, 1, &dict));
    pack.dict = dict;
    pack.quality = 50;
    xkv_hook_hit_close(e->hit);
    xkv_hook_close(hook);
    open_hook(&pack);
    ns = make_namespace("packed with a dictionary");

    assert_ok(t.ctx, save_engine(e)); /* the dictionary is missing */
    assert_int_equal(counters().saves_failed, 1);
    assert_ok(t.ctx, xkv_store_put_dict(t.ctx, t.store, &input, NULL));
    assert_ok(t.ctx, save_engine(e));
    assert_int_equal(counters().saves_stored, 1);
    match(e->tokens, TOKENS + 1, NULL, &e->hit);
    assert_ok(t.ctx, xkv_hook_load(t.ctx, e->hit, &e->source.geometry, e->views, NULL));

    packed p = pack_planes(t.ctx, &e->source, &pack);
    uint8_t *expected = restore(t.ctx, &e->source, p.entry);
    assert_memory_equal(e->cache, expected, e->source.size);
    assert_memory_not_equal(e->cache, e->source.data, e->source.size);
    free(expected);
    free_packed(t.ctx, &p);
    free_engine(e);
    xkv_hook_close(hook);
    hook = NULL;
    xkv_dict_close(t.ctx, dict);
    memory_free(&m);
}

static void loads_can_be_stopped(void **state)
{
    (void)state;
    xkv_pack_options pack = xkv_pack_options_default();
    pack.group_layers = 1;
    engine *e = make_engine(&pack);
    e->stop_at = 2;
    assert_int_equal(load(e), XKV_ERROR_CANCELLED);
    assert_int_equal(e->announced, 2);
    e->stop_at = UINT32_MAX;
    e->cancel = t.ctx;
    assert_int_equal(load(e), XKV_ERROR_CANCELLED);
    assert_true(e->announced == 2);
    assert_int_equal(load(e), XKV_ERROR_CANCELLED); /* the flag stays */
    assert_int_equal(e->announced, 0);
    e->cancel = NULL;
    xkv_ctx_reset(t.ctx);
    assert_ok(t.ctx, load(e)); /* nothing is wrong with the entry */
    assert_memory_equal(e->cache, e->source.data, e->source.size);
    assert_int_equal(counters().loads_cancelled, 3);
    assert_int_equal(counters().loads_ok, 1);
    free_engine(e);
}

/* --- Damage ------------------------------------------------------------------------------------------------------- */

/* The path of the only file in a folder of the store; how many there are. */
static int only_file(const char *folder, char path[512])
{
    char name[128];
    int count = 0;
    snprintf(name, sizeof name, "%s/%s", t.path, folder);
    DIR *d = opendir(name);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.') {
            snprintf(path, 512, "%s/%s", name, e->d_name);
            count++;
        }
    closedir(d);
    return count;
}

/* Flip a bit of the only blob, at `at`; its size. */
static size_t flip(size_t at)
{
    char path[512];
    uint8_t byte;
    assert_int_equal(only_file("blobs", path), 1);
    int fd = open(path, O_RDWR);
    off_t size = lseek(fd, 0, SEEK_END);
    if (at < (size_t)size) {
        assert_int_equal(pread(fd, &byte, 1, (off_t)at), 1);
        byte ^= 0x10;
        assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
    }
    close(fd);
    return (size_t)size;
}

/* A wrong bit, after the match, somewhere in the blob: a failed load puts the entry into quarantine and the next match
 * misses; rows that were announced are right all the same. */
static void damaged_entries_are_never_data(void **state)
{
    (void)state;
    xkv_pack_options pack = xkv_pack_options_default();
    char path[512];
    uint32_t failed = 0, after_some = 0;
    pack.group_layers = 1;
    size_t size = SIZE_MAX;
    for (size_t at = 40; at < size; at += size / 60) {
        engine *e = make_engine(&pack);
        size = flip(at);
        xkv_status status = load(e);
        if (status == XKV_OK) { /* bytes that a load does not need */
            assert_memory_equal(e->cache, e->source.data, e->source.size);
            assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, e->id));
        } else {
            assert_true(status >= XKV_ERROR_FORMAT && status <= XKV_ERROR_TRUNCATED);
            failed++;
            after_some += e->layers > 0;
            assert_int_equal(only_file("blobs", path), 0);
            assert_int_equal(only_file("quarantine", path), 1);
            assert_int_equal(reason_of(e->tokens, TOKENS + 1), XKV_MATCH_NONE);
            assert_int_equal(load(e), XKV_ERROR_CORRUPT);
            assert_non_null(strstr(xkv_ctx_error(t.ctx), "an earlier load"));
            assert_int_equal(e->announced, 0);
            assert_int_equal(counters().loads_damaged, 2);
            assert_int_equal(counters().misses_none, 1);
            unlink(path);
        }
        free_engine(e);
    }
    assert_true(failed > 40);
    assert_true(after_some > 30);
}

/* Nothing can be put into quarantine there. */
static void damage_in_a_read_only_store_is_remembered(void **state)
{
    (void)state;
    xkv_store_options o = xkv_store_options_default();
    engine *e = make_engine(NULL);
    size_t size = flip(SIZE_MAX);
    xkv_hook_hit_close(e->hit);
    e->hit = NULL;
    xkv_hook_close(hook);
    xkv_store_close(t.ctx, t.store);
    o.access = XKV_STORE_READ_ONLY;
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, &o, &t.store));
    open_hook(NULL);
    match(e->tokens, TOKENS + 1, NULL, &e->hit);
    flip(size / 2);
    assert_int_not_equal(load(e), XKV_OK);
    assert_int_equal(reason_of(e->tokens, TOKENS + 1), XKV_MATCH_CORRUPT);
    assert_int_equal(counters().misses_corrupt, 1);
    free_engine(e);
}

/* A match outlives the removal of its entry. */
static void hits_survive_a_removal(void **state)
{
    (void)state;
    engine *e = make_engine(NULL);
    (void)!xkv_store_remove(t.ctx, t.store, &ns, e->id);
    assert_ok(t.ctx, load(e));
    assert_memory_equal(e->cache, e->source.data, e->source.size);
    free_engine(e);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_saved_prompt_comes_back),
        TEST(tenants_are_apart),
        TEST(offers_agree_with_a_plain_search),
        TEST(wrong_arguments_are_refused),
        cmocka_unit_test(expectations_find_the_truth),
        cmocka_unit_test(one_load_moves_the_expectation),
        cmocka_unit_test(one_slow_load_is_not_believed),
        TEST(slow_loads_are_declined),
        TEST(hits_are_what_is_loaded),
        TEST(only_what_must_be_loaded_costs),
        TEST(groups_are_announced_in_order),
        TEST(time_in_callbacks_is_not_the_load_s),
        TEST(rows_come_at_other_positions),
        TEST(unknown_ropes_stay_where_they_are),
        TEST(other_geometries_are_refused),
        TEST(element_types_may_differ),
        TEST(dictionaries_must_be_in_the_store),
        TEST(loads_can_be_stopped),
        TEST(damaged_entries_are_never_data),
        TEST(damage_in_a_read_only_store_is_remembered),
        TEST(hits_survive_a_removal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
