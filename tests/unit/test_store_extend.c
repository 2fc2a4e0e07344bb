/* test_store_extend.c - entries that extend others: what is stored, what is restored, and that a line of them is kept,
 * removed, repaired and moved as a whole. */
#include "store_support.h"

#include "store_internal.h"
#include "xkv/hook.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { CHUNK = 32, LONG = 300 };

static test_store t;
static xkv_namespace ns;
static int32_t tokens[STORE_TOKENS];
static uint64_t now;

static uint64_t fixed_clock(void *user)
{
    (void)user;
    return now;
}

static void open_with_clock(void)
{
    xkv_store_options o = xkv_store_options_default();
    o.clock = fixed_clock;
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, &o, &t.store));
}

static int setup(void **state)
{
    (void)state;
    make_store(&t, 0);
    ns = make_namespace(NULL);
    now = 1000000;
    open_with_clock();
    make_tokens(7, 50000, tokens, STORE_TOKENS);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    remove_folder(&t);
    return 0;
}

/* Put the first `count` tokens of the prompt. */
static xkv_put_report put_with(uint32_t count, xkv_put_options o)
{
    xkv_pack_options pack = xkv_pack_options_default();
    xkv_put_report report;
    pack.chunk_tokens = CHUNK;
    o.pack = &pack;
    now += 1000000;
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, count, &o, &report));
    return report;
}

static xkv_put_report put(uint32_t count)
{
    return put_with(count, xkv_put_options_default());
}

/* 100, 200 and 300 tokens: the first entry has chunks up to 96, the second one up to 192. */
static void put_line(uint64_t ids[3])
{
    const uint32_t bases[] = {0, 96, 192};
    for (uint32_t i = 0; i < 3; i++) {
        xkv_put_report r = put(100 * (i + 1));
        assert_int_equal(r.base_tokens, bases[i]);
        assert_int_equal(r.parent, i > 0 ? ids[i - 1] : 0);
        ids[i] = r.id;
    }
}

static xkv_match match_tokens(uint32_t count, xkv_hit **hit)
{
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_match m;
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, hit));
    return m;
}

/* The longest prefix that is found, every row of it compared. */
static uint32_t found(uint32_t count)
{
    xkv_hit *hit = NULL;
    xkv_status status = XKV_OK;
    xkv_match m = match_tokens(count, &hit);
    if (hit != NULL && !hit_is_right(t.ctx, hit, m.tokens, tokens, &status))
        fail_msg("wrong rows: %s", xkv_ctx_error(t.ctx));
    xkv_hit_close(t.ctx, hit);
    return m.tokens;
}

static xkv_verify_report verify(void)
{
    xkv_verify_report r;
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &r));
    return r;
}

static void assert_sound(uint64_t entries)
{
    xkv_verify_report r = verify();
    assert_string_equal(r.first, "");
    assert_int_equal(r.entries, entries);
    assert_int_equal(r.orphans, 0);
}

static xkv_store_stats stats(void)
{
    xkv_store_stats s;
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    return s;
}

/* --- Storing and restoring ---------------------------------------------------------------------------------------- */

/* Random rows do not compress: what is stored is what is new, and tables. */
static void only_what_is_new_is_stored(void **state)
{
    (void)state;
    const uint64_t row = 2 * STORE_LAYERS * STORE_WIDTH * 4, tables = 2500, count = 2000;
    uint64_t whole = put(count - 100).bytes, rest = put(count).bytes;
    assert_true(whole > row * (count - 100) / 2);
    assert_true(rest < row * (100 + CHUNK) + 4 * count + tables);
    assert_int_equal(found(count), count);
    assert_sound(2);
}

static void restore_range(xkv_hit *hit, uint32_t first, uint32_t count)
{
    rows *expected = make_rows(tokens, first + count), *got = make_rows(NULL, count);
    xkv_read_options o = xkv_read_options_default();
    o.first_token = first;
    o.token_count = count;
    o.positions = expected->positions + first; /* where they are; rows without a known RoPE cannot go elsewhere */
    assert_ok(t.ctx, xkv_hit_read(t.ctx, hit, &o, got->views));
    for (uint32_t p = 0; p < 2 * STORE_LAYERS; p++)
        assert_memory_equal(got->data[p][0], expected->data[p][first], count * sizeof got->data[p][0]);
    free(expected);
    free(got);
}

/* Ranges that begin and end around every boundary. */
static void every_range_is_restored(void **state)
{
    (void)state;
    static const uint32_t edges[] = {0, 1, 31, 32, 95, 96, 97, 99, 100, 128, 191, 192, 193, 224, 299, 300};
    uint64_t ids[3];
    xkv_hit *hit = NULL;
    put_line(ids);
    assert_int_equal(match_tokens(LONG, &hit).tokens, LONG);
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++)
        for (size_t j = i + 1; j < sizeof edges / sizeof *edges; j++)
            restore_range(hit, edges[i], edges[j] - edges[i]);
    xkv_hit_close(t.ctx, hit);
    for (uint32_t count = 1; count <= LONG; count++)
        assert_int_equal(found(count), count);
    assert_sound(3);
}

/* --- Keeping and removing ----------------------------------------------------------------------------------------- */

static xkv_store_item listed[64];
static uint32_t listed_count;

static int list_one(void *user, const xkv_store_item *item)
{
    (void)user;
    assert_true(listed_count < 64);
    listed[listed_count++] = *item;
    return 0;
}

static const xkv_store_item *item_of(uint64_t id)
{
    listed_count = 0;
    assert_ok(t.ctx, xkv_store_list(t.ctx, t.store, &ns, list_one, NULL));
    for (uint32_t i = 0; i < listed_count; i++)
        if (listed[i].id == id)
            return &listed[i];
    return NULL;
}

/* With room for all but a byte, one entry goes: the last one of the line, though it was used last. */
static void lines_are_evicted_from_the_end(void **state)
{
    (void)state;
    uint64_t ids[3];
    put_line(ids);
    assert_int_equal(found(LONG), LONG);
    for (uint32_t left = 3; left-- > 0;) {
        assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, stats().bytes - 1, NULL));
        assert_int_equal(stats().entries, left);
        assert_sound(left);
        for (uint32_t i = 0; i < 3; i++)
            assert_int_equal(item_of(ids[i]) != NULL, i < left);
        assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 0, NULL));
    }
    assert_int_equal(stats().evictions, 3);
}

/* A use of what extends an entry is one of the entry: others go first. Once it extends nothing, it is as old as that.
 */
static void uses_count_for_what_is_extended(void **state)
{
    (void)state;
    uint64_t ids[3];
    int32_t other[40];
    xkv_put_report report;
    put_line(ids);
    now += 1000000;
    make_tokens(8, 50000, other, 40);
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, other, 40, NULL, &report));
    now += 1000000;
    assert_int_equal(found(LONG), LONG);
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, stats().bytes - 1, NULL));
    assert_null(item_of(report.id));
    assert_int_equal(stats().entries, 3);
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 0, NULL));
    now += 1000000;
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, other, 40, NULL, &report));
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, item_of(report.id)->bytes, NULL)); /* all of the line, at once */
    assert_non_null(item_of(report.id));
    assert_sound(1);
}

static void pins_keep_the_line(void **state)
{
    (void)state;
    uint64_t ids[3];
    put_line(ids);
    assert_ok(t.ctx, xkv_store_pin(t.ctx, t.store, &ns, ids[1], 1));
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 1, NULL));
    assert_int_equal(stats().entries, 2);
    assert_int_equal(found(LONG), 200);
    assert_sound(2);
    assert_ok(t.ctx, xkv_store_pin(t.ctx, t.store, &ns, ids[1], 0));
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 1, NULL));
    assert_sound(0);
}

/* A line that is being read is whole to its reader, and evicted after it. */
static void readers_keep_the_line(void **state)
{
    (void)state;
    uint64_t ids[3];
    xkv_hit *hit = NULL;
    xkv_status status;
    put_line(ids);
    assert_int_equal(match_tokens(LONG, &hit).tokens, LONG);
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 1, NULL));
    assert_int_equal(stats().entries, 3);
    assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, ids[0]));
    assert_true(hit_is_right(t.ctx, hit, LONG, tokens, &status));
    xkv_hit_close(t.ctx, hit);
    assert_sound(0);
}

static void removal_takes_what_extends_it(void **state)
{
    (void)state;
    uint64_t ids[3];
    put_line(ids);
    assert_ok(t.ctx, xkv_store_pin(t.ctx, t.store, &ns, ids[2], 1));
    assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, ids[1]));
    assert_int_equal(found(LONG), 100);
    assert_int_equal(stats().pinned, 0);
    assert_sound(1);
    assert_int_equal(put(200).base_tokens, 96);
    uint64_t removed = 0;
    assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, &removed));
    assert_int_equal(removed, 2);
    assert_sound(0);
}

static xkv_put_report put_for(uint32_t count, uint64_t ttl)
{
    xkv_put_options o = xkv_put_options_default();
    o.ttl = ttl;
    return put_with(count, o);
}

static void what_is_extended_lives_as_long(void **state)
{
    (void)state;
    uint64_t first = put_for(100, 10).id, second = put_for(200, 50).id, third = put_for(300, 20).id;
    assert_int_equal(item_of(first)->expires, item_of(second)->expires);
    assert_sound(3);
    now += 30 * 1000000;
    assert_int_equal(found(LONG), 200); /* the third one is gone, the first one has outlived its time */
    assert_null(item_of(third));
    assert_sound(2);
    put_for(200, 100); /* what lives longer lets what it extends live longer */
    assert_int_equal(item_of(first)->expires, item_of(second)->expires);
    now += 200 * 1000000;
    xkv_collect_report r;
    assert_ok(t.ctx, xkv_store_collect(t.ctx, t.store, 0, &r));
    assert_int_equal(r.expired, 2);
    assert_int_equal(stats().expirations, 3);
    assert_sound(0);
    put_for(100, 10);
    put_for(200, 0);
    now += 1000 * 1000000u;
    assert_int_equal(found(100), 100);
    assert_sound(2);
}

/* --- Which entries extend others ---------------------------------------------------------------------------------- */

static void what_adds_no_chunk_is_passed_over(void **state)
{
    (void)state;
    uint64_t ids[3];
    put_line(ids);
    xkv_put_report r = put(310);
    assert_int_equal(r.parent, ids[2]);
    assert_int_equal(r.base_tokens, 288);
    xkv_put_report next = put(319); /* what 310 tokens add to those 288 is less than a chunk */
    assert_int_equal(next.parent, ids[2]);
    assert_int_equal(next.base_tokens, 288);
    assert_int_equal(found(319), 319);
    tokens[250] += 1; /* shares 250 with the last ones */
    r = put(319);
    assert_int_equal(r.parent, ids[2]);
    assert_int_equal(r.base_tokens, 224);
    tokens[40] += 1; /* too little to be worth it */
    assert_int_equal(put(319).parent, 0);
    assert_int_equal(found(319), 319);
    assert_sound(7);
}

static void options_can_forbid_it(void **state)
{
    (void)state;
    xkv_put_options o = xkv_put_options_default();
    put(100);
    o.whole = 1;
    assert_int_equal(put_with(200, o).parent, 0);
    assert_int_equal(put(300).base_tokens, 192);
    assert_sound(3);
}

static xkv_put_report put_packed(uint32_t count, const xkv_pack_options *pack)
{
    xkv_put_options o = xkv_put_options_default();
    xkv_put_report report;
    o.pack = pack;
    now += 1000000;
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, count, &o, &report));
    return report;
}

/* Loss is not passed on to who asks for none; what is asked for over all rows is had over all rows. */
static void what_is_worse_is_not_extended(void **state)
{
    (void)state;
    xkv_pack_options lossless = xkv_pack_options_default(), error = lossless, ratio = lossless;
    lossless.chunk_tokens = error.chunk_tokens = ratio.chunk_tokens = CHUNK;
    lossless.profile = XKV_PROFILE_LOSSLESS;
    error.profile = XKV_PROFILE_SCALAR;
    error.error = 0.1;
    ratio.profile = XKV_PROFILE_SCALAR;
    ratio.ratio = 3;
    assert_int_equal(put_packed(300, &error).parent, 0);
    assert_int_equal(put_packed(400, &lossless).parent, 0);
    assert_int_equal(put_packed(500, &ratio).parent, 0);
    lossless.window = 150; /* exact rows are those at the end */
    assert_int_equal(put_packed(600, &lossless).parent, 0);
    assert_true(put_packed(700, &lossless).base_tokens <= 550);
    lossless.window = 0;
    lossless.sinks = 1000;
    assert_int_equal(put_packed(800, &lossless).parent, 0);
    lossless.sinks = 4;
    xkv_put_report r = put_packed(1000, &error); /* exact ones are good enough */
    assert_int_equal(r.base_tokens, 800);
    assert_sound(7);
}

/* Another layout, or rows at other positions, are not the same rows. */
static void other_caches_are_not_extended(void **state)
{
    (void)state;
    rows *r = make_rows(tokens, 300);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = 300};
    xkv_pack_options pack = xkv_pack_options_default();
    xkv_put_options o = xkv_put_options_default();
    xkv_put_report report;
    pack.chunk_tokens = CHUNK;
    o.pack = &pack;
    put(200);
    xkv_namespace other = make_namespace("other");
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &other, tokens, 300, &o, &report));
    assert_int_equal(report.parent, 0);
    for (uint32_t i = 0; i < 300; i++)
        r->positions[i] += 1;
    assert_ok(t.ctx,
              xkv_store_put_planes(t.ctx, t.store, &ns, &prompt, &r->geometry, r->views, NULL, NULL, 0, &o, &report));
    assert_int_equal(report.parent, 0);
    assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, report.id));
    for (uint32_t i = 0; i < 300; i++)
        r->positions[i] -= 1;
    r->planes[1].heads = 2;
    r->planes[1].head_dim = STORE_WIDTH / 2;
    assert_ok(t.ctx,
              xkv_store_put_planes(t.ctx, t.store, &ns, &prompt, &r->geometry, r->views, NULL, NULL, 0, &o, &report));
    assert_int_equal(report.parent, 0);
    free(r);
    assert_sound(3);
}

/* The line has an end: then all is stored again. */
static void lines_are_bounded(void **state)
{
    (void)state;
    uint32_t whole = 0;
    for (uint32_t i = 0; i < XKV_LINE_MAX + 2; i++)
        whole += put(CHUNK * (i + 1)).parent == 0;
    assert_int_equal(whole, 2);
    assert_int_equal(found(CHUNK * (XKV_LINE_MAX + 2)), CHUNK * (XKV_LINE_MAX + 2));
    assert_int_equal(found(CHUNK * XKV_LINE_MAX), CHUNK * XKV_LINE_MAX);
    assert_sound(XKV_LINE_MAX + 2);
}

/* --- Moving, damage, repair --------------------------------------------------------------------------------------- */

/* The path of an entry's blob. */
static void blob_path(uint64_t id, char path[512])
{
    char folder[300];
    snprintf(folder, sizeof folder, "%s/blobs", t.path);
    DIR *d = opendir(folder);
    assert_non_null(d);
    path[0] = '\0';
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (strlen(e->d_name) == 81 && strtoull(e->d_name + 65, NULL, 16) == id)
            snprintf(path, 512, "%s/%.100s", folder, e->d_name);
    closedir(d);
    assert_true(path[0] != '\0');
}

/* Change a byte in the middle of an entry's payload. */
static void damage_blob(uint64_t id)
{
    char path[512], byte;
    struct stat st;
    blob_path(id, path);
    int fd = open(path, O_RDWR);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(pread(fd, &byte, 1, st.st_size / 2), 1);
    byte ^= 8;
    assert_int_equal(pwrite(fd, &byte, 1, st.st_size / 2), 1);
    close(fd);
}

static void repair(void)
{
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, NULL));
    open_with_clock();
}

static void exported_lines_can_be_imported(void **state)
{
    (void)state;
    uint64_t ids[3];
    memory m = {0};
    xkv_output output = memory_output(&m);
    xkv_put_report report;
    put_line(ids);
    assert_ok(t.ctx, xkv_store_export(t.ctx, t.store, &ns, ids[2], &output));
    remove_folder(&t);
    make_store(&t, 0);
    for (size_t at = 0; at < m.size; at += 97) {
        xkv_input bad = xkv_input_from_memory(m.data, m.size), cut = xkv_input_from_memory(m.data, at);
        m.data[at] ^= 4;
        assert_int_not_equal(xkv_store_import(t.ctx, t.store, &bad, &report), XKV_OK);
        m.data[at] ^= 4;
        assert_true(xkv_store_import(t.ctx, t.store, &cut, &report) != XKV_OK || report.tokens < LONG);
        uint32_t tokens_found = found(LONG); /* what came before the damage may be there, whole */
        assert_true(tokens_found == 0 || tokens_found == 100 || tokens_found == 200);
    }
    xkv_input good = xkv_input_from_memory(m.data, m.size);
    assert_ok(t.ctx, xkv_store_import(t.ctx, t.store, &good, &report));
    assert_int_equal(report.tokens, LONG);
    assert_int_equal(report.base_tokens, 192);
    assert_int_equal(found(LONG), LONG);
    assert_sound(3);
    free(m.data);
}

static void what_is_shared_is_counted(void **state)
{
    (void)state;
    const uint64_t row = 2 * STORE_LAYERS * STORE_WIDTH * 4;
    uint64_t ids[3];
    put_line(ids);
    assert_int_equal(stats().extending, 2);
    assert_int_equal(stats().bytes_shared, row * (96 + 192));
    assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, ids[2]));
    assert_int_equal(stats().extending, 1);
    assert_int_equal(stats().bytes_shared, row * 96);
}

/* Whichever of the three it is, no row of it is handed out; the others are whole, or gone. */
static void damage_of_a_line_is_a_miss(void **state)
{
    (void)state;
    for (uint32_t bad = 0; bad < 3; bad++) {
        uint64_t ids[3];
        put_line(ids);
        damage_blob(ids[bad]);
        for (int i = 0; i < 4; i++) { /* each look finds one more damage */
            xkv_hit *hit = NULL;
            xkv_status status = XKV_OK;
            xkv_match m = match_tokens(LONG, &hit);
            assert_true(hit == NULL || hit_is_right(t.ctx, hit, m.tokens, tokens, &status) || status != XKV_OK);
            xkv_hit_close(t.ctx, hit);
        }
        assert_int_equal(found(LONG), 100 * bad);
        assert_true(stats().corrupt > bad);
        assert_sound(bad);
        assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, NULL));
    }
}

static void a_repair_rebuilds_lines(void **state)
{
    (void)state;
    uint64_t ids[3];
    put_line(ids);
    repair();
    assert_int_equal(found(LONG), LONG);
    assert_sound(3);
    damage_blob(ids[1]);
    repair();
    assert_int_equal(found(LONG), 100);
    assert_sound(1);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(only_what_is_new_is_stored),
        TEST(every_range_is_restored),
        TEST(lines_are_evicted_from_the_end),
        TEST(uses_count_for_what_is_extended),
        TEST(pins_keep_the_line),
        TEST(readers_keep_the_line),
        TEST(removal_takes_what_extends_it),
        TEST(what_is_extended_lives_as_long),
        TEST(what_adds_no_chunk_is_passed_over),
        TEST(options_can_forbid_it),
        TEST(what_is_worse_is_not_extended),
        TEST(other_caches_are_not_extended),
        TEST(lines_are_bounded),
        TEST(exported_lines_can_be_imported),
        TEST(what_is_shared_is_counted),
        TEST(damage_of_a_line_is_a_miss),
        TEST(a_repair_rebuilds_lines),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
