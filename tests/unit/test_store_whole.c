/* Entries of which only the whole can be restored, since a window has slid: what a lookup promises of them. */
#include "engine_support.h"
#include "store_support.h"
#include "xkv/hook.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static test_store t;

static int setup(void **state)
{
    (void)state;
    make_store(&t, 0);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    remove_folder(&t);
    return 0;
}

static void assert_sound(uint64_t entries)
{
    xkv_verify_report v;
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &v));
    assert_string_equal(v.first, "");
    assert_int_equal(v.entries, entries);
}

/* The cache of a model with windows, of which the last 3 tokens are there; it has no token ids. */
static xkv_cache *windowed_cache(uint32_t tokens)
{
    sequence s = plain_sequence(), window = plain_sequence();
    bytes file = {0};
    char path[128];
    xkv_cache *cache = NULL;
    int32_t at[] = {(int32_t)tokens - 3, (int32_t)tokens - 2, (int32_t)tokens - 1};
    assert_true(tokens > 3);
    s.ids = 0;
    s.cells = tokens;
    s.second = &window;
    window.at = at;
    put_sequence(&file, &s);
    snprintf(path, sizeof path, "%s.ggsq", t.path);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(file.data, 1, file.size, f), file.size);
    fclose(f);
    assert_ok(t.ctx, xkv_cache_open(t.ctx, path, NULL, &cache));
    unlink(path);
    return cache;
}

static uint64_t put_whole(const xkv_namespace *ns, const int32_t *tokens, uint32_t count, const xkv_put_options *o)
{
    xkv_cache *c = windowed_cache(count);
    uint64_t size = 0;
    const void *source = xkv_cache_data(c, &size);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_put_report report;
    assert_ok(t.ctx, xkv_store_put_planes(t.ctx, t.store, ns, &prompt, xkv_cache_geometry(c), xkv_cache_views(c),
                                          xkv_cache_framing(c), source, size, o, &report));
    xkv_cache_free(t.ctx, c);
    return report.id;
}

static xkv_match ask(const xkv_namespace *ns, const int32_t *tokens, uint32_t count)
{
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_match m;
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, ns, &prompt, 0, &m, NULL));
    return m;
}

/* Prompts over a tiny vocabulary, so that they share, contain and part from each other in every way: what is matched is
 * what can be restored. */
static void whole_entries_agree_with_a_plain_search(void **state)
{
    (void)state;
    enum { COUNT = 60, LONG = 24 };
    const xkv_namespace ns = make_namespace(NULL);
    static int32_t prompts[COUNT][LONG];
    uint32_t sizes[COUNT], found_whole = 0;
    bool whole[COUNT];
    uint64_t random = 11;
    for (size_t i = 0; i < COUNT; i++) {
        sizes[i] = 4 + (uint32_t)(test_random(&random) % (LONG - 4));
        make_tokens(test_random(&random) % 6, 2, prompts[i], sizes[i]);
        if (sizes[i] > 8)
            prompts[i][8] = (int32_t)(test_random(&random) % 3);
        whole[i] = test_random(&random) % 3 > 0;
        for (size_t j = 0; j < i; j++) /* the first one stays */
            if (sizes[j] == sizes[i] && memcmp(prompts[j], prompts[i], 4 * sizes[i]) == 0)
                whole[i] = whole[j];
        if (whole[i])
            put_whole(&ns, prompts[i], sizes[i], NULL);
        else
            assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, prompts[i], sizes[i], NULL, NULL));
    }
    for (int round = 0; round < 600; round++) {
        int32_t query[LONG];
        uint32_t longest = 0, count = 1 + (uint32_t)(test_random(&random) % LONG);
        make_tokens(test_random(&random) % 6, 2, query, LONG);
        query[8] = (int32_t)(test_random(&random) % 3);
        for (size_t j = 0; j < COUNT; j++) {
            uint32_t n = 0;
            while (n < sizes[j] && n < count && prompts[j][n] == query[n])
                n++;
            if ((!whole[j] || n == sizes[j]) && n > longest)
                longest = n;
        }
        xkv_match m = ask(&ns, query, count);
        assert_int_equal(m.tokens, longest);
        if (m.whole_only)
            assert_int_equal(m.tokens, m.entry_tokens);
        found_whole += m.reason == XKV_MATCH_FOUND && m.whole_only;
    }
    assert_true(found_whole > 20);
}

/* Thousands that go on where the common beginning ends, more than a lookup looks at. */
static void whole_entries_hide_no_others(void **state)
{
    (void)state;
    enum { SHARED = 20, MANY = 9000 };
    const xkv_namespace ns = make_namespace(NULL);
    int32_t tokens[SHARED + 10];
    make_tokens(5, 50000, tokens, SHARED + 10);
    xkv_cache *c = windowed_cache(SHARED + 2);
    uint64_t size = 0;
    memory file = {0};
    const xkv_output to = memory_output(&file);
    const void *source = xkv_cache_data(c, &size);
    assert_ok(t.ctx, xkv_pack(t.ctx, xkv_cache_geometry(c), xkv_cache_views(c), xkv_cache_framing(c), source, size,
                              NULL, &to, NULL));
    const xkv_input entry = xkv_input_from_memory(file.data, file.size);
    for (int32_t i = 0; i < MANY; i++) {
        const xkv_prompt prompt = {.tokens = tokens, .token_count = SHARED + 2};
        tokens[SHARED] = 60000 + i;
        assert_ok(t.ctx, xkv_store_put(t.ctx, t.store, &ns, &prompt, &entry, NULL, NULL));
    }
    xkv_cache_free(t.ctx, c);
    memory_free(&file);
    tokens[SHARED] = 7;
    assert_int_equal(ask(&ns, tokens, SHARED + 10).reason, XKV_MATCH_WHOLE_ONLY);
    assert_int_equal(ask(&ns, tokens, SHARED + 10).tokens, 0);
    uint64_t shared = put_whole(&ns, tokens, SHARED, NULL), half = put_whole(&ns, tokens, SHARED / 2, NULL);
    assert_int_equal(ask(&ns, tokens, SHARED + 10).id, shared);
    assert_int_equal(ask(&ns, tokens, SHARED + 10).tokens, SHARED);
    assert_int_equal(ask(&ns, tokens, SHARED - 1).id, half);
    assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, shared));
    assert_int_equal(ask(&ns, tokens, SHARED + 10).id, half); /* with nothing at the node that has thousands below it */
}

static void whole_entries_survive_repair_and_export(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    int32_t tokens[40];
    make_tokens(6, 50000, tokens, 40);
    uint64_t id = put_whole(&ns, tokens, 30, NULL);
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, NULL));
    reopen_store(&t);
    assert_int_equal(ask(&ns, tokens, 29).reason, XKV_MATCH_WHOLE_ONLY);
    assert_int_equal(ask(&ns, tokens, 40).tokens, 30);
    assert_sound(1);
    memory file = {0};
    const xkv_output to = memory_output(&file);
    assert_ok(t.ctx, xkv_store_export(t.ctx, t.store, &ns, id, &to));
    assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, id));
    const xkv_input from = xkv_input_from_memory(file.data, file.size);
    assert_ok(t.ctx, xkv_store_import(t.ctx, t.store, &from, NULL));
    memory_free(&file);
    assert_int_equal(ask(&ns, tokens, 29).reason, XKV_MATCH_WHOLE_ONLY);
    assert_int_equal(ask(&ns, tokens, 40).tokens, 30);
    assert_sound(1);
}

static void whole_entries_are_not_found_by_some_keys(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_put_options o = xkv_put_options_default();
    int32_t tokens[32];
    xkv_page_key names[4];
    uint8_t keys[4][32];
    xkv_match m;
    make_tokens(7, 50000, tokens, 32);
    assert_ok(t.ctx, xkv_chain_sglang(t.ctx, tokens, 32, 8, names));
    for (size_t i = 0; i < 4; i++)
        memcpy(keys[i], names[i].key, 32);
    o.keys = names;
    o.key_count = 4;
    put_whole(&ns, tokens, 32, &o);
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, (const uint8_t(*)[32])keys, 3, &m, NULL));
    assert_int_equal(m.reason, XKV_MATCH_WHOLE_ONLY);
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, (const uint8_t(*)[32])keys, 4, &m, NULL));
    assert_int_equal(m.tokens, 32);
    o.key_count = 2;
    uint64_t half = put_whole(&ns, tokens, 16, &o);
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, (const uint8_t(*)[32])keys, 3, &m, NULL));
    assert_int_equal(m.id, half);
    assert_int_equal(m.tokens, 16);
}

/* Whole pages of it are not the whole, nor is what leaves a token to compute. */
static void a_hook_offers_no_part_of_it(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_hook_match_options o = xkv_hook_match_options_default();
    int32_t tokens[40];
    static const struct {
        uint32_t count, page_tokens, reason, tokens;
    } asked[] = {{31, 1, XKV_MATCH_FOUND, 30},
                 {31, 8, XKV_MATCH_WHOLE_ONLY, 0},
                 {40, 10, XKV_MATCH_FOUND, 30},
                 {30, 1, XKV_MATCH_WHOLE_ONLY, 0},
                 {29, 1, XKV_MATCH_WHOLE_ONLY, 0}};
    make_tokens(8, 50000, tokens, 40);
    put_whole(&ns, tokens, 30, NULL);
    xkv_hook *hook;
    xkv_hook_counters counters;
    assert_ok(t.ctx, xkv_hook_create(t.ctx, t.store, NULL, &hook));
    for (size_t i = 0; i < sizeof asked / sizeof *asked; i++) {
        const xkv_prompt prompt = {.tokens = tokens, .token_count = asked[i].count};
        xkv_hook_found found;
        xkv_hook_hit *hit = NULL;
        o.page_tokens = asked[i].page_tokens;
        assert_ok(t.ctx, xkv_hook_match(t.ctx, hook, &ns, &prompt, &o, &found, &hit));
        assert_int_equal(found.reason, asked[i].reason);
        assert_int_equal(found.tokens, asked[i].tokens);
        xkv_hook_hit_close(hit);
    }
    xkv_hook_get_counters(hook, &counters);
    assert_int_equal(counters.misses_whole_only, 3);
    xkv_hook_close(hook);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(whole_entries_agree_with_a_plain_search),
        TEST(whole_entries_hide_no_others),
        TEST(whole_entries_survive_repair_and_export),
        TEST(whole_entries_are_not_found_by_some_keys),
        TEST(a_hook_offers_no_part_of_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
