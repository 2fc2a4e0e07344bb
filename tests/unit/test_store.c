/* test_store.c - the store: longest prefixes against a plain search, tenants, eviction, pins, expiry, restarts. */
#include "store_support.h"

#include "entry_internal.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
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

/* --- Helpers ------------------------------------------------------------------------------------------------------ */

static uint64_t put(const xkv_namespace *ns, const int32_t *tokens, uint32_t count)
{
    xkv_put_report report;
    assert_ok(t.ctx, put_rows(t.ctx, t.store, ns, tokens, count, NULL, &report));
    return report.id;
}

static xkv_match match(const xkv_namespace *ns, const int32_t *tokens, uint32_t count)
{
    return find_rows(t.ctx, t.store, ns, tokens, count);
}

static xkv_store_stats stats(void)
{
    xkv_store_stats s;
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    return s;
}

/* Nothing is wrong, and so many entries are there. */
static void assert_sound(uint64_t entries)
{
    xkv_verify_report r;
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &r));
    if (r.first[0] != '\0')
        fail_msg("%s", r.first);
    assert_int_equal(r.damaged + r.missing + r.unreachable + r.orphans + r.wrong_sums, 0);
    assert_int_equal(r.entries, entries);
    assert_int_equal(stats().entries, entries);
}

static int count_files(const char *name)
{
    char path[128];
    int n = 0;
    snprintf(path, sizeof path, "%s/%s", t.path, name);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

/* --- Prefixes ----------------------------------------------------------------------------------------------------- */

static void one_entry_serves_every_prefix(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    int32_t tokens[1200];
    make_tokens(1, 50000, tokens, 1200);
    put(&ns, tokens, 1000);
    for (uint32_t n = 1; n <= 1000; n += 37)
        assert_int_equal(match(&ns, tokens, n).tokens, n);
    assert_int_equal(match(&ns, tokens, 1200).tokens, 1000);
    tokens[700] ^= 1;
    assert_int_equal(match(&ns, tokens, 1200).tokens, 700);
    tokens[0] ^= 1;
    assert_int_equal(match(&ns, tokens, 1200).reason, XKV_MATCH_NONE);
    assert_sound(1);
}

static void same_prompt_is_one_blob(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_put_report report;
    int32_t tokens[300];
    make_tokens(2, 50000, tokens, 300);
    uint64_t id = put(&ns, tokens, 300);
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, 300, NULL, &report));
    assert_int_equal(report.existed, 1);
    assert_int_equal(report.id, id);
    assert_int_equal(count_files("blobs"), 1);
    assert_sound(1);
}

enum { PROMPTS = 120, LONGEST = 40 };

/* Prompts over a tiny vocabulary, so that they share, contain and part from each other in every way. */
static void prefixes_agree_with_a_plain_search(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    static int32_t prompts[PROMPTS][LONGEST];
    uint32_t sizes[PROMPTS];
    uint64_t ids[PROMPTS] = {0}, random = 7;
    uint64_t alive = 0;
    for (int round = 0; round < 600; round++) {
        size_t i = test_random(&random) % PROMPTS;
        if (ids[i] != 0) {
            assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, ids[i]));
            for (size_t j = 0, id = ids[i]; j < PROMPTS; j++) /* equal prompts have one entry */
                ids[j] = ids[j] == id ? 0 : ids[j];
            alive--;
        } else {
            uint64_t before = stats().entries;
            sizes[i] = 1 + (uint32_t)(test_random(&random) % LONGEST);
            make_tokens(test_random(&random) % 12, 2, prompts[i], sizes[i]);
            if (sizes[i] > 8)
                prompts[i][8] = (int32_t)(test_random(&random) % 3);
            ids[i] = put(&ns, prompts[i], sizes[i]);
            alive += stats().entries - before;
        }
        int32_t query[LONGEST];
        uint32_t longest = 0;
        make_tokens(test_random(&random) % 12, 2, query, LONGEST);
        query[8] = (int32_t)(test_random(&random) % 3);
        for (size_t j = 0; j < PROMPTS; j++) {
            uint32_t n = 0;
            while (ids[j] != 0 && n < sizes[j] && prompts[j][n] == query[n])
                n++;
            longest = n > longest ? n : longest;
        }
        assert_int_equal(match(&ns, query, LONGEST).tokens, longest);
    }
    assert_sound(alive);
}

static void media_part_prompts(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    const xkv_media cat = {10, "cat", 3}, dog = {10, "dog", 3};
    int32_t tokens[100];
    make_tokens(3, 50000, tokens, 100);
    rows *r = make_rows(tokens, 100);
    xkv_prompt prompt = {tokens, 100, &cat, 1};
    xkv_match m;
    assert_ok(t.ctx,
              xkv_store_put_planes(t.ctx, t.store, &ns, &prompt, &r->geometry, r->views, NULL, NULL, 0, NULL, NULL));
    free(r);
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, NULL));
    assert_int_equal(m.tokens, 100);
    prompt.media = &dog;
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, NULL));
    assert_int_equal(m.tokens, 10);
    assert_int_equal(match(&ns, tokens, 100).tokens, 10);
    assert_sound(1);
}

static void page_keys_find_the_longest(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL), other = make_namespace("other");
    xkv_put_options o = xkv_put_options_default();
    int32_t tokens[640];
    xkv_page_key names[10];
    uint8_t keys[10][32];
    xkv_match m;
    make_tokens(4, 50000, tokens, 640);
    assert_ok(t.ctx, xkv_chain_sglang(t.ctx, tokens, 640, 64, names));
    for (size_t i = 0; i < 10; i++)
        memcpy(keys[i], names[i].key, 32);
    o.keys = names;
    o.key_count = 7;
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, 500, &o, NULL));
    for (uint32_t n = 0; n <= 10; n++) {
        uint32_t found = n < 7 ? n : 7;
        assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, (const uint8_t(*)[32])keys, n, &m, NULL));
        assert_int_equal(m.keys, found);
        assert_int_equal(m.tokens, 64 * found);
    }
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &other, (const uint8_t(*)[32])keys, 10, &m, NULL));
    assert_int_equal(m.reason, XKV_MATCH_NONE);
    o.keys = names;
    o.key_count = 8;
    assert_int_equal(put_rows(t.ctx, t.store, &ns, tokens, 500, &o, NULL), XKV_ERROR_ARGUMENT);
}

/* --- Tenants ------------------------------------------------------------------------------------------------------ */

static int count_item(void *user, const xkv_store_item *item)
{
    (void)item;
    ++*(int *)user;
    return 0;
}

static int listed(const xkv_namespace *ns)
{
    int n = 0;
    assert_ok(t.ctx, xkv_store_list(t.ctx, t.store, ns, count_item, &n));
    return n;
}

static void salts_keep_tenants_apart(void **state)
{
    (void)state;
    const xkv_namespace mine = make_namespace("mine"), yours = make_namespace("yours"), none = make_namespace(NULL);
    xkv_match m;
    xkv_hit *hit = NULL;
    uint64_t removed = 0;
    int32_t tokens[300];
    make_tokens(5, 50000, tokens, 300);
    uint64_t id = put(&mine, tokens, 300);
    assert_int_equal(match(&mine, tokens, 300).tokens, 300);
    assert_int_equal(match(&yours, tokens, 300).reason, XKV_MATCH_NONE);
    assert_int_equal(match(&none, tokens, 300).reason, XKV_MATCH_NONE);
    assert_int_equal(listed(&mine), 1);
    assert_int_equal(listed(&yours), 0);
    assert_int_equal(xkv_store_get(t.ctx, t.store, &yours, id, &m, &hit), XKV_ERROR_NOT_FOUND);
    assert_int_equal(xkv_store_remove(t.ctx, t.store, &yours, id), XKV_ERROR_NOT_FOUND);
    assert_int_equal(xkv_store_pin(t.ctx, t.store, &yours, id, 1), XKV_ERROR_NOT_FOUND);
    put(&yours, tokens, 300);
    assert_int_equal(count_files("blobs"), 2); /* nothing is shared that could be measured */
    assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &mine, &removed));
    assert_int_equal(removed, 1);
    assert_int_equal(match(&mine, tokens, 300).reason, XKV_MATCH_NONE);
    assert_int_equal(match(&yours, tokens, 300).tokens, 300);
    assert_int_equal(count_files("blobs"), 1);
    assert_sound(1);
}

static void many_of_a_namespace_go(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace("many"), other = make_namespace("few");
    uint64_t removed = 0;
    int32_t tokens[20];
    for (uint64_t i = 0; i < 300; i++) {
        make_tokens(i, 50000, tokens, 20);
        put(i % 3 == 0 ? &other : &ns, tokens, 20);
    }
    assert_int_equal(listed(&ns), 200);
    assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, &removed));
    assert_int_equal(removed, 200);
    assert_int_equal(stats().namespaces, 1);
    assert_sound(100);
    reopen_store(&t);
    assert_sound(100);
}

/* --- Eviction, pins, expiry --------------------------------------------------------------------------------------- */

static uint64_t test_time;

static uint64_t test_clock(void *user)
{
    (void)user;
    return test_time;
}

/* The store anew, with a clock that stands still. */
static void open_with(uint64_t seconds, uint32_t access)
{
    xkv_store_options o = xkv_store_options_default();
    test_time = seconds * 1000000u;
    o.clock = test_clock;
    o.access = access;
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, &o, &t.store));
}

static void open_at(uint64_t seconds)
{
    open_with(seconds, XKV_STORE_READ_WRITE);
}

static uint64_t put_numbered(const xkv_namespace *ns, uint64_t number, const xkv_put_options *o)
{
    xkv_put_report report;
    int32_t tokens[50];
    make_tokens(number, 50000, tokens, 50);
    assert_ok(t.ctx, put_rows(t.ctx, t.store, ns, tokens, 50, o, &report));
    return report.id;
}

static uint32_t match_numbered(const xkv_namespace *ns, uint64_t number)
{
    int32_t tokens[50];
    make_tokens(number, 50000, tokens, 50);
    return match(ns, tokens, 50).reason;
}

static void least_recently_used_goes_first(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    open_at(1);
    put_numbered(&ns, 0, NULL);
    uint64_t each = stats().bytes;
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 4 * each + each / 2, NULL)); /* packed sizes differ a little */
    for (uint64_t i = 1; i < 4; i++) {
        test_time += 1000;
        put_numbered(&ns, i, NULL);
    }
    test_time += 1000;
    assert_int_equal(match_numbered(&ns, 0), XKV_MATCH_FOUND);
    open_at(2); /* the use of 0 survives */
    put_numbered(&ns, 4, NULL);
    assert_int_equal(match_numbered(&ns, 1), XKV_MATCH_NONE);
    assert_int_equal(match_numbered(&ns, 0), XKV_MATCH_FOUND);
    assert_int_equal(match_numbered(&ns, 2), XKV_MATCH_FOUND);
    assert_int_equal(stats().evictions, 1);
    assert_true(stats().bytes <= stats().byte_cap);
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, each + each / 2, NULL));
    assert_sound(1);
    assert_int_equal(count_files("blobs"), 1);
}

static void pinned_and_read_entries_stay(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_put_options pin = xkv_put_options_default();
    int32_t tokens[50];
    xkv_match m;
    xkv_hit *hit = NULL;
    xkv_status status;
    pin.pin = 1;
    uint64_t id = put_numbered(&ns, 0, &pin);
    uint64_t each = stats().bytes;
    put_numbered(&ns, 1, NULL);
    make_tokens(1, 50000, tokens, 50);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = 50};
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, &hit));
    assert_int_equal(m.tokens, 50);
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 2 * each + each / 2, NULL));
    make_tokens(2, 50000, tokens, 50);
    assert_int_equal(put_rows(t.ctx, t.store, &ns, tokens, 50, NULL, NULL), XKV_ERROR_LIMIT);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "do not fit under the cap"));
    make_tokens(1, 50000, tokens, 50);
    assert_true(hit_is_right(t.ctx, hit, 50, tokens, &status));
    xkv_hit_close(t.ctx, hit);
    put_numbered(&ns, 2, NULL);
    assert_int_equal(match_numbered(&ns, 0), XKV_MATCH_FOUND);
    assert_int_equal(match_numbered(&ns, 1), XKV_MATCH_NONE);
    assert_ok(t.ctx, xkv_store_pin(t.ctx, t.store, &ns, id, 0));
    assert_int_equal(stats().pinned, 0);
    put_numbered(&ns, 3, NULL);
    put_numbered(&ns, 4, NULL);
    assert_int_equal(match_numbered(&ns, 0), XKV_MATCH_NONE);
    assert_sound(2);
}

/* This process may have so many descriptors more than it has; those it could have before. */
static struct rlimit allow_descriptors(uint32_t more)
{
    struct rlimit before, limit;
    int next = dup(STDERR_FILENO);
    assert_true(next >= 0);
    close(next);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    limit = before;
    limit.rlim_cur = (rlim_t)next + more;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    return before;
}

/* Every evicted blob is held until the commit, and there are more of them than a process has descriptors. */
static void many_are_evicted_with_few_descriptors(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_put_report report;
    int32_t tokens[2000];
    for (int32_t i = 0; i < 300; i++)
        put(&ns, &i, 1);
    const uint64_t each = stats().bytes / 300;
    struct rlimit before = allow_descriptors(0);
    assert_int_equal(xkv_store_set_cap(t.ctx, t.store, 10 * each, NULL), XKV_ERROR_IO);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(stats().byte_cap, 0);
    assert_int_equal(stats().entries, 300);
    allow_descriptors(100);
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 150 * each, NULL));
    assert_true(stats().bytes <= 150 * each);
    make_tokens(300, 50000, tokens, 2000);
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, stats().bytes, NULL));
    uint64_t left = stats().entries, evictions = stats().evictions;
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, 2000, NULL, &report));
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_true(report.evicted_entries > 64); /* so that it took several transactions */
    assert_int_equal(report.evicted_entries, left + 1 - stats().entries);
    assert_int_equal(report.evicted_entries, stats().evictions - evictions);
    assert_true(stats().bytes <= stats().byte_cap);
    assert_sound(stats().entries);
}

static void expired_entries_are_misses(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_put_options o = xkv_put_options_default();
    xkv_collect_report r;
    open_at(100);
    o.ttl = 10;
    put_numbered(&ns, 0, &o);
    put_numbered(&ns, 1, &o);
    put_numbered(&ns, 2, NULL);
    open_at(109);
    assert_int_equal(match_numbered(&ns, 0), XKV_MATCH_FOUND);
    put_numbered(&ns, 1, &o); /* renewed, to 119 */
    open_at(111);
    assert_int_not_equal(match_numbered(&ns, 0), XKV_MATCH_FOUND);
    assert_int_equal(match_numbered(&ns, 1), XKV_MATCH_FOUND);
    open_at(120);
    assert_ok(t.ctx, xkv_store_collect(t.ctx, t.store, 0, &r));
    assert_int_equal(r.expired, 1);
    assert_int_equal(stats().expirations, 2);
    assert_int_equal(match_numbered(&ns, 2), XKV_MATCH_FOUND);
    assert_sound(1);
}

/* By its id, too. */
static void expired_entries_cannot_be_got(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_put_options o = xkv_put_options_default();
    xkv_match m;
    xkv_hit *hit = NULL;
    open_at(100);
    o.ttl = 10;
    uint64_t id = put_numbered(&ns, 0, &o);
    open_at(109);
    assert_ok(t.ctx, xkv_store_get(t.ctx, t.store, &ns, id, &m, &hit));
    assert_int_equal(m.reason, XKV_MATCH_FOUND);
    assert_int_equal(m.tokens, 50);
    xkv_hit_close(t.ctx, hit);
    open_at(111);
    assert_ok(t.ctx, xkv_store_get(t.ctx, t.store, &ns, id, &m, &hit));
    assert_int_equal(m.reason, XKV_MATCH_EXPIRED);
    assert_int_equal(m.id, id);
    assert_int_equal(m.tokens, 0);
    assert_null(hit);
    assert_int_equal(stats().expirations, 1);
    assert_int_equal(xkv_store_get(t.ctx, t.store, &ns, id, &m, &hit), XKV_ERROR_NOT_FOUND);
}

/* A prompt of a small tree: 12 ways to begin that part early or late, cut off somewhere. Even ones live for ten
 * seconds.
 */
static uint32_t ageing_prompt(uint64_t number, int32_t tokens[LONGEST])
{
    make_tokens(number % 12, 2, tokens, LONGEST);
    tokens[8] = (int32_t)(number % 3);
    return 3 + (uint32_t)(number * 7 % (LONGEST - 3));
}

/* The longest common prefix with an entry that lives. */
static uint32_t longest_alive(const int32_t query[LONGEST], uint64_t numbers)
{
    uint32_t longest = 0;
    for (uint64_t i = 1; i < numbers; i += 2) {
        int32_t tokens[LONGEST];
        uint32_t n = 0, count = ageing_prompt(i, tokens);
        while (n < count && tokens[n] == query[n])
            n++;
        longest = n > longest ? n : longest;
    }
    return longest;
}

/* What is expired stays in a store that is open read-only, and hides nothing there. */
static void expired_entries_hide_no_others(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    enum { NUMBERS = 200 };
    xkv_put_options o = xkv_put_options_default();
    int32_t tokens[LONGEST];
    uint32_t hits = 0;
    open_at(100);
    for (uint64_t i = 0; i < NUMBERS; i++) {
        uint32_t count = ageing_prompt(i, tokens);
        o.ttl = i % 2 == 0 ? 10 : 0;
        assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, count, &o, NULL));
    }
    open_with(120, XKV_STORE_READ_ONLY);
    for (uint64_t i = 0; i < NUMBERS; i++) {
        (void)ageing_prompt(i, tokens);
        uint32_t expected = longest_alive(tokens, NUMBERS);
        assert_int_equal(match(&ns, tokens, LONGEST).tokens, expected);
        hits += expected > 0;
    }
    assert_true(hits > NUMBERS / 2);
}

static void expired_entries_hide_no_others_by_keys(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_put_options o = xkv_put_options_default();
    int32_t tokens[64];
    xkv_page_key names[8];
    uint8_t keys[8][32];
    xkv_match m;
    make_tokens(5, 50000, tokens, 64);
    assert_ok(t.ctx, xkv_chain_sglang(t.ctx, tokens, 64, 8, names));
    for (size_t i = 0; i < 8; i++)
        memcpy(keys[i], names[i].key, 32);
    o.keys = names;
    open_at(100);
    for (uint32_t pages = 8; pages > 2; pages--) { /* of 8 to 3 pages; the one of 5 stays */
        o.key_count = pages;
        o.ttl = pages == 5 ? 0 : 10;
        assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, 8 * pages, &o, NULL));
    }
    open_with(120, XKV_STORE_READ_ONLY);
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, (const uint8_t(*)[32])keys, 8, &m, NULL));
    assert_int_equal(m.reason, XKV_MATCH_FOUND);
    assert_int_equal(m.keys, 5);
    assert_int_equal(m.tokens, 40);
}

/* Where nothing else serves, the reason is the one that was in the way. */
static void an_expired_entry_is_the_reason(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_put_options o = xkv_put_options_default();
    int32_t tokens[50];
    open_at(100);
    o.ttl = 10;
    uint64_t id = put_numbered(&ns, 0, &o);
    open_with(120, XKV_STORE_READ_ONLY);
    make_tokens(0, 50000, tokens, 50);
    xkv_match m = match(&ns, tokens, 50);
    assert_int_equal(m.reason, XKV_MATCH_EXPIRED);
    assert_int_equal(m.id, id);
    assert_int_equal(m.entry_tokens, 50);
}

/* --- Restarts and counters ---------------------------------------------------------------------------------------- */

static void counters_survive(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    put_numbered(&ns, 0, NULL);
    match_numbered(&ns, 0);
    match_numbered(&ns, 0);
    match_numbered(&ns, 1);
    reopen_store(&t);
    assert_int_equal(stats().puts, 1);
    assert_int_equal(stats().hits, 2);
    assert_int_equal(stats().misses, 1);
    assert_int_equal(stats().tokens_reused, 100);
    assert_int_equal(stats().bytes_reused, 100 * 2 * STORE_WIDTH * 4);
}

static void asking_counts_nothing(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_match m;
    int32_t tokens[50];
    put_numbered(&ns, 0, NULL);
    for (uint64_t i = 0; i < 2; i++) {
        make_tokens(i, 50000, tokens, 50);
        const xkv_prompt prompt = {.tokens = tokens, .token_count = 50};
        assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, NULL));
        assert_int_equal(m.reason, i == 0 ? XKV_MATCH_FOUND : XKV_MATCH_NONE);
    }
    assert_int_equal(stats().hits + stats().misses + stats().tokens_reused, 0);
}

static void a_store_is_opened_once(void **state)
{
    (void)state;
    xkv_store *second = NULL;
    assert_int_equal(xkv_store_open(t.ctx, t.path, NULL, &second), XKV_ERROR_ARGUMENT);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "already open in this process"));
    assert_int_equal(xkv_store_repair(t.ctx, t.path, NULL, 0, NULL), XKV_ERROR_IO);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "in use"));
    reopen_store(&t);
}

/* Put the prompt in a child that opens the store for itself. */
static void put_in_child(const xkv_namespace *ns, uint64_t number, const xkv_store_options *o)
{
    int32_t tokens[50];
    xkv_ctx *ctx = NULL;
    xkv_store *store = NULL;
    int status;
    make_tokens(number, 50000, tokens, 50);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        bool done = xkv_ctx_create(NULL, &ctx) == XKV_OK && xkv_store_open(ctx, t.path, o, &store) == XKV_OK &&
                    put_rows(ctx, store, ns, tokens, 50, NULL, NULL) == XKV_OK;
        if (!done)
            fprintf(stderr, "%s\n", xkv_ctx_error(ctx));
        xkv_store_close(ctx, store);
        _exit(done ? 0 : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static void a_child_opens_it_for_itself(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    put_numbered(&ns, 0, NULL);
    put_in_child(&ns, 1, NULL);
    assert_int_equal(match_numbered(&ns, 0), XKV_MATCH_FOUND);
    assert_int_equal(match_numbered(&ns, 1), XKV_MATCH_FOUND);
    assert_sound(2);
}

/* Uses and counters are written while the store stays open, for the eviction of others. */
static void uses_reach_other_processes(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_store_options o = xkv_store_options_default();
    o.clock = test_clock;
    open_at(1);
    put_numbered(&ns, 0, NULL);
    uint64_t each = stats().bytes;
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 2 * each + each / 2, NULL));
    test_time += 1000;
    put_numbered(&ns, 1, NULL);
    test_time += 1000;
    assert_int_equal(match_numbered(&ns, 0), XKV_MATCH_FOUND);
    test_time += 5000000;
    assert_int_equal(match_numbered(&ns, 5), XKV_MATCH_NONE); /* a miss writes it, too */
    put_in_child(&ns, 2, &o);
    assert_int_equal(match_numbered(&ns, 0), XKV_MATCH_FOUND);
    assert_int_equal(match_numbered(&ns, 1), XKV_MATCH_NONE);
    assert_int_equal(stats().evictions, 1);
}

/* An index that outgrows its map again and again, here and in another process. */
static void the_map_grows(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_store_options o = xkv_store_options_default();
    int status;
    o.map_size = 1 << 16;
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (xkv_store_open(t.ctx, t.path, &o, &t.store) != XKV_OK)
            _exit(1);
        for (uint64_t i = 0; i < 300; i++) {
            int32_t tokens[50];
            make_tokens(1000 + i, 50000, tokens, 50);
            if (put_rows(t.ctx, t.store, &ns, tokens, 50, NULL, NULL) != XKV_OK)
                _exit(2);
        }
        xkv_store_close(t.ctx, t.store);
        _exit(0);
    }
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, &o, &t.store));
    for (uint64_t i = 0; i < 300; i++) {
        put_numbered(&ns, i, NULL);
        assert_int_equal(match_numbered(&ns, i / 2), XKV_MATCH_FOUND);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    for (uint64_t i = 0; i < 300; i++)
        assert_int_equal(match_numbered(&ns, 1000 + i), XKV_MATCH_FOUND);
    assert_true(stats().map_bytes > 4 * o.map_size);
    assert_sound(600);
}

static void modes_are_private(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    static const char *const names[] = {"store", "index/data.mdb", "index/lock.mdb"};
    char path[128];
    struct stat st;
    put_numbered(&ns, 0, NULL);
    for (size_t i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", t.path, names[i]);
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_mode & 0777, 0600);
    }
    assert_int_equal(stat(t.path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
}

/* --- Repair and transfer ------------------------------------------------------------------------------------------ */

static void repair_rebuilds_the_index(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL), other = make_namespace("other");
    xkv_repair_report r;
    char path[128];
    for (uint64_t i = 0; i < 40; i++)
        put_numbered(i % 2 ? &ns : &other, i, NULL);
    assert_ok(t.ctx, xkv_store_pin(t.ctx, t.store, &other, 1, 1));
    match_numbered(&ns, 1);
    for (int lost = 0; lost < 3; lost++) {
        xkv_store_close(t.ctx, t.store);
        t.store = NULL;
        snprintf(path, sizeof path, "%s/index/data.mdb", t.path);
        if (lost)
            assert_int_equal(lost == 1 ? truncate(path, 5000) : unlink(path), 0);
        if (lost) {
            assert_int_equal(xkv_store_open(t.ctx, t.path, NULL, &t.store), XKV_ERROR_CORRUPT);
            assert_non_null(strstr(xkv_ctx_error(t.ctx), lost == 1 ? "[SI1]" : "[SO4]"));
        }
        assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, &r));
        assert_int_equal(r.entries, 40);
        assert_int_equal(r.quarantined, 0);
        assert_int_equal(r.kept_uses, !lost);
        reopen_store(&t);
        assert_int_equal(stats().pinned, !lost);
        assert_int_equal(stats().hits, !lost);
        assert_sound(40);
        assert_int_equal(match_numbered(&ns, 39), XKV_MATCH_FOUND);
        put_numbered(&ns, 39, NULL);
    }
}

static void compaction_keeps_everything(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_repair_report r;
    char path[128];
    struct stat before, after;
    uint64_t removed = 0;
    for (uint64_t i = 0; i < 400; i++)
        put_numbered(&ns, i, NULL);
    assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, &removed));
    put_numbered(&ns, 1, NULL);
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    snprintf(path, sizeof path, "%s/index/data.mdb", t.path);
    assert_int_equal(stat(path, &before), 0);
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 1, &r));
    assert_int_equal(stat(path, &after), 0);
    assert_true(after.st_size < before.st_size / 2);
    assert_int_equal(after.st_mode & 0777, 0600);
    reopen_store(&t);
    assert_sound(1);
    assert_int_equal(match_numbered(&ns, 1), XKV_MATCH_FOUND);
}

static void exported_entries_can_be_imported(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace("tenant");
    xkv_put_options o = xkv_put_options_default();
    memory m = {0};
    xkv_output output = memory_output(&m);
    xkv_put_report report;
    xkv_page_key names[2];
    int32_t tokens[50];
    make_tokens(0, 50000, tokens, 50);
    assert_ok(t.ctx, xkv_chain_sglang(t.ctx, tokens, 50, 25, names));
    o.keys = names;
    o.key_count = 2;
    uint64_t id = put_numbered(&ns, 0, &o);
    assert_ok(t.ctx, xkv_store_export(t.ctx, t.store, &ns, id, &output));
    remove_folder(&t);
    make_store(&t, 0);
    for (size_t at = 0; at < m.size; at += 7) {
        xkv_input bad = xkv_input_from_memory(m.data, m.size);
        m.data[at] ^= 4;
        assert_int_not_equal(xkv_store_import(t.ctx, t.store, &bad, &report), XKV_OK);
        m.data[at] ^= 4;
        assert_int_equal(stats().entries, 0);
    }
    xkv_input good = xkv_input_from_memory(m.data, m.size);
    assert_ok(t.ctx, xkv_store_import(t.ctx, t.store, &good, &report));
    assert_int_equal(report.tokens, 50);
    assert_int_equal(match_numbered(&ns, 0), XKV_MATCH_FOUND);
    xkv_match found;
    const uint8_t(*key)[32] = (const uint8_t(*)[32]) & names[0].key;
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, key, 1, &found, NULL));
    assert_int_equal(found.tokens, 25);
    assert_sound(1);
    memory_free(&m);
}

/* An entry lies in its blob as it is: who reads files himself finds it there. */
static void entries_lie_in_files(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    int32_t tokens[300];
    uint8_t here[200], there[200];
    const xkv_entry *entry;
    xkv_hit *hit = NULL;
    xkv_match m;
    uint64_t offset = 0;
    make_tokens(2, 50000, tokens, 300);
    uint64_t id = put(&ns, tokens, 300);
    assert_ok(t.ctx, xkv_store_get(t.ctx, t.store, &ns, id, &m, &hit));
    assert_ok(t.ctx, xkv_hit_entry(t.ctx, hit, &entry));
    const xkv_input *input = &entry->input;
    assert_non_null(input->file);
    int fd = input->file(input->user, &offset);
    for (uint64_t at = 0; at + sizeof here <= input->size; at += 77) {
        assert_ok(t.ctx, input->read(input->user, t.ctx, at, here, sizeof here));
        assert_int_equal(pread(fd, there, sizeof there, (off_t)(offset + at)), sizeof there);
        assert_memory_equal(here, there, sizeof here);
    }
    xkv_hit_close(t.ctx, hit);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(one_entry_serves_every_prefix),
        TEST(same_prompt_is_one_blob),
        TEST(entries_lie_in_files),
        TEST(prefixes_agree_with_a_plain_search),
        TEST(media_part_prompts),
        TEST(page_keys_find_the_longest),
        TEST(salts_keep_tenants_apart),
        TEST(many_of_a_namespace_go),
        TEST(least_recently_used_goes_first),
        TEST(pinned_and_read_entries_stay),
        TEST(many_are_evicted_with_few_descriptors),
        TEST(expired_entries_are_misses),
        TEST(expired_entries_cannot_be_got),
        TEST(expired_entries_hide_no_others),
        TEST(expired_entries_hide_no_others_by_keys),
        TEST(an_expired_entry_is_the_reason),
        TEST(counters_survive),
        TEST(asking_counts_nothing),
        TEST(a_store_is_opened_once),
        TEST(a_child_opens_it_for_itself),
        TEST(uses_reach_other_processes),
        TEST(the_map_grows),
        TEST(modes_are_private),
        TEST(repair_rebuilds_the_index),
        TEST(compaction_keeps_everything),
        TEST(exported_entries_can_be_imported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
