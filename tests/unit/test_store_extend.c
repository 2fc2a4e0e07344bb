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
    return find_rows(t.ctx, t.store, &ns, tokens, count).tokens;
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

/* What an entry refuses is refused before another one has touched a view: rows without a known RoPE stay. */
static void refused_reads_touch_nothing(void **state)
{
    (void)state;
    uint64_t ids[3];
    xkv_hit *hit = NULL;
    rows *got = make_rows(NULL, LONG), *untouched = make_rows(NULL, LONG);
    xkv_read_options o = xkv_read_options_default();
    put_line(ids);
    assert_int_equal(match_tokens(LONG, &hit).tokens, LONG);
    o.positions = got->positions;
    for (uint32_t i = 0; i < LONG; i += LONG - 1) {
        got->positions[i]++;
        assert_int_equal(xkv_hit_read(t.ctx, hit, &o, got->views), XKV_ERROR_UNSUPPORTED);
        got->positions[i]--;
        assert_memory_equal(got->data, untouched->data, sizeof got->data);
    }
    assert_ok(t.ctx, xkv_hit_read(t.ctx, hit, &o, got->views));
    xkv_hit_close(t.ctx, hit);
    free(got);
    free(untouched);
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

/* While the new entry is packed, somebody removes what it was to extend. */
static int remove_parent(void *user, uint64_t done, uint64_t total)
{
    uint64_t *id = user;
    xkv_ctx *other = new_ctx(1);
    (void)done;
    (void)total;
    if (*id != 0)
        assert_ok(other, xkv_store_remove(other, t.store, &ns, *id));
    *id = 0;
    xkv_ctx_free(other);
    return 0;
}

static void what_is_extended_may_go(void **state)
{
    (void)state;
    xkv_pack_options pack = xkv_pack_options_default();
    uint64_t ids[3];
    put_line(ids);
    pack.chunk_tokens = CHUNK;
    pack.progress = remove_parent;
    pack.progress_user = &ids[1];
    xkv_put_report r = put_packed(400, &pack);
    assert_int_equal(ids[1], 0);
    assert_int_equal(r.parent, 0);
    assert_int_equal(found(400), 400);
    assert_sound(2);
}

/* Both do not fit under the cap, but the whole does without the other one. */
static void the_cap_is_for_the_whole(void **state)
{
    (void)state;
    put(1000);
    uint64_t most = stats().bytes + 2000;
    assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, NULL));
    put(520);
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, most, NULL));
    xkv_put_report r = put(1000);
    assert_true(r.parent != 0 || r.evicted_entries == 1);
    assert_int_equal(found(1000), 1000);
    tokens[300] += 1; /* shares 300 of 1000: less than half */
    assert_int_equal(put(1000).parent, 0);
    tokens[600] += 1; /* shares 600 */
    r = put(1000);
    assert_int_equal(r.parent, 0);
    assert_int_equal(found(1000), 1000);
    assert_sound(1);
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

/* --- Loss, dictionaries and groups -------------------------------------------------------------------------------- */

enum { SAMPLE = 256, LAYERS = 4 };

static synthetic sample(uint64_t seed)
{
    const synthetic_options o = {.layers = LAYERS,
                                 .tokens = SAMPLE,
                                 .heads = 2,
                                 .head_dim = 8,
                                 .dtype = XKV_F16,
                                 .rank = 6,
                                 .group_layers = 2,
                                 .noise = 0.1,
                                 .rope = 1,
                                 .seed = seed};
    return make_synthetic(&o);
}

/* Put the first `count` rows of the sample. */
static xkv_put_report put_sample(const synthetic *s, uint32_t count, const xkv_pack_options *pack)
{
    xkv_geometry geometry = s->geometry;
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_put_options o = xkv_put_options_default();
    xkv_put_report report;
    geometry.token_count = count;
    geometry.token_id_count = 0;
    o.pack = pack;
    assert_ok(t.ctx,
              xkv_store_put_planes(t.ctx, t.store, &ns, &prompt, &geometry, s->views, NULL, NULL, 0, &o, &report));
    return report;
}

/* Rows [0, count) of the sample's prompt. */
static uint8_t *load_sample(const synthetic *s, uint32_t count)
{
    uint8_t *data = calloc(1, s->size);
    xkv_view *views = views_into(s, data);
    xkv_hit *hit = NULL;
    assert_int_equal(match_tokens(count, &hit).tokens, count);
    assert_ok(t.ctx, xkv_hit_read(t.ctx, hit, NULL, views));
    xkv_hit_close(t.ctx, hit);
    free(views);
    return data;
}

/* Relative error of V in rows [first, end): squares of what differs over those of what is there. */
static double error_of(const synthetic *s, const uint8_t *data, uint32_t first, uint32_t end)
{
    double wrong = 0, all = 0;
    for (uint32_t p = 1; p < s->geometry.plane_count; p += 2)
        for (uint32_t r = first; r < end; r++)
            for (uint32_t i = 0; i < row_width(&s->planes[p]); i++) {
                double x = element(s, s->data, p, r, i), d = element(s, data, p, r, i) - x;
                wrong += d * d;
                all += x * x;
            }
    return wrong / all;
}

typedef struct trained {
    memory file;
    xkv_dict *dict;
} trained;

static trained train(void)
{
    trained d = {.dict = NULL};
    synthetic s = sample(1);
    const synthetic *list = &s;
    memset(&d.file, 0, sizeof d.file);
    assert_ok(t.ctx, train_on(t.ctx, &list, 1, NULL, &d.file));
    free_synthetic(&s);
    const xkv_input input = xkv_input_from_memory(d.file.data, d.file.size);
    assert_ok(t.ctx, xkv_dict_open(t.ctx, &input, 1, &d.dict));
    assert_ok(t.ctx, xkv_store_put_dict(t.ctx, t.store, &input, NULL));
    return d;
}

static void free_trained(trained *d)
{
    xkv_dict_close(t.ctx, d->dict);
    memory_free(&d->file);
}

static xkv_pack_options lossy_options(const trained *d)
{
    xkv_pack_options o = xkv_pack_options_default();

    o.chunk_tokens = CHUNK;
    o.dict = d->dict;
    o.quality = 50;
    return o;
}

/* The rows that are taken over keep their bits, the others have the error that whole packing gives them. */
static void lines_of_lossy_entries(void **state)
{
    (void)state;
    trained d = train();
    synthetic s = sample(2);
    xkv_pack_options pack = lossy_options(&d);
    assert_int_equal(put_sample(&s, 110, &pack).parent, 0);
    uint8_t *before = load_sample(&s, 110);
    xkv_put_report r = put_sample(&s, 180, &pack);
    assert_int_equal(r.base_tokens, 96);
    assert_int_equal(put_sample(&s, SAMPLE, &pack).base_tokens, 160);
    uint8_t *line = load_sample(&s, SAMPLE);
    for (uint32_t p = 0; p < s.geometry.plane_count; p++)
        for (uint32_t i = 0; i < row_width(&s.planes[p]); i++)
            for (uint32_t row = 0; row < 96; row++)
                assert_true(element(&s, before, p, row, i) == element(&s, line, p, row, i));
    xkv_namespace other = make_namespace("whole"), mine = ns;
    ns = other;
    put_sample(&s, SAMPLE, &pack);
    uint8_t *whole = load_sample(&s, SAMPLE);
    ns = mine;
    assert_true(error_of(&s, whole, 0, SAMPLE) > 0);
    assert_true(error_of(&s, line, 96, SAMPLE) < 1.1 * error_of(&s, whole, 96, SAMPLE));
    assert_true(error_of(&s, line, 0, SAMPLE) < 1.1 * error_of(&s, whole, 0, SAMPLE));
    assert_sound(4);
    free(before);
    free(line);
    free(whole);
    free_synthetic(&s);
    free_trained(&d);
}

/* To extend an entry is not to read its rows. */
static void no_dictionary_is_decoded_for_it(void **state)
{
    (void)state;
    trained d = train();
    synthetic s = sample(2);
    xkv_pack_options pack = lossy_options(&d);
    put_sample(&s, 110, &pack);
    reopen_store(&t);
    assert_int_equal(put_sample(&s, 180, &pack).base_tokens, 96);
    for (uint32_t i = 0; i < XKV_DICT_CACHE; i++)
        assert_null(t.store->dicts[i].dict);
    free_synthetic(&s);
    free_trained(&d);
}

/* Coarser steps and larger errors are not what is asked for. */
static void what_is_coarser_is_not_extended(void **state)
{
    (void)state;
    trained d = train();
    synthetic s = sample(2);
    xkv_pack_options pack = xkv_pack_options_default(), error = pack;
    pack.chunk_tokens = error.chunk_tokens = CHUNK;
    pack.dict = error.dict = d.dict;
    pack.quality = 40;
    xkv_put_report first = put_sample(&s, 128, &pack);
    pack.quality = 60;
    assert_int_equal(put_sample(&s, 160, &pack).parent, 0);
    assert_int_equal(put_sample(&s, 192, &pack).base_tokens, 160);
    error.error = first.pack.error_metric / 2;
    assert_int_equal(put_sample(&s, 200, &error).parent, 0);
    error.error *= 1.5;
    assert_int_equal(put_sample(&s, 240, &error).base_tokens, 192);
    assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, NULL));
    assert_int_equal(put_sample(&s, 128, &pack).parent, 0);
    pack.dict = NULL;
    pack.quality = 0;
    assert_int_equal(put_sample(&s, 160, &pack).parent, 0); /* lossless */
    assert_sound(2);
    free_synthetic(&s);
    free_trained(&d);
}

typedef struct progress {
    const synthetic *s;
    const uint8_t *data;
    uint32_t layers, calls, count;
} progress;

/* What is announced is there, of all entries of the line. */
static int layers_ready(void *user, uint32_t group, uint32_t layers)
{
    progress *p = user;
    assert_int_equal(group, p->calls++);
    assert_true(layers >= p->layers && layers <= LAYERS);
    p->layers = layers;
    for (uint32_t plane = 0; plane < 2 * layers; plane++)
        for (uint32_t row = 0; row < p->count; row++)
            for (uint32_t i = 0; i < row_width(&p->s->planes[plane]); i++)
                assert_true(element(p->s, p->data, plane, row, i) == element(p->s, p->s->data, plane, row, i));
    return 0;
}

static void load_in_groups(const synthetic *s, xkv_hook *hook, uint32_t count, uint32_t groups)
{
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_hook_match_options o = xkv_hook_match_options_default();
    xkv_hook_load_options load = xkv_hook_load_options_default();
    uint8_t *data = calloc(1, s->size);
    xkv_view *views = views_into(s, data);
    progress p = {.s = s, .data = data, .count = count};
    xkv_hook_found f;
    xkv_hook_hit *hit = NULL;
    o.compute_tokens = 0;
    load.group_ready = layers_ready;
    load.group_ready_user = &p;
    load.positions = s->positions;
    assert_ok(t.ctx, xkv_hook_match(t.ctx, hook, &ns, &prompt, &o, &f, &hit));
    assert_int_equal(f.tokens, count);
    assert_ok(t.ctx, xkv_hook_load(t.ctx, hit, &s->geometry, views, &load));
    assert_int_equal(p.layers, LAYERS);
    assert_int_equal(p.calls, groups);
    xkv_hook_hit_close(hit);
    free(views);
    free(data);
}

/* Two layers a group, then one, then four: whoever loads sees the groups of the last entry. */
static void loads_announce_groups_of_all(void **state)
{
    (void)state;
    static const uint32_t counts[] = {110, 180, SAMPLE}, layers[] = {2, 1, 4};
    synthetic s = sample(2);
    xkv_hook *hook = NULL;
    assert_ok(t.ctx, xkv_hook_create(t.ctx, t.store, NULL, &hook));
    for (uint32_t i = 0; i < 3; i++) {
        xkv_pack_options pack = xkv_pack_options_default();
        pack.chunk_tokens = CHUNK;
        pack.group_layers = layers[i];
        assert_int_equal(put_sample(&s, counts[i], &pack).parent != 0, i > 0);
        xkv_hit *hit = NULL;
        const xkv_entry *entry = NULL;
        xkv_entry_info info;
        assert_int_equal(match_tokens(counts[i], &hit).tokens, counts[i]);
        assert_ok(t.ctx, xkv_hit_entry(t.ctx, hit, &entry));
        xkv_entry_get_info(entry, &info);
        xkv_hit_close(t.ctx, hit);
        load_in_groups(&s, hook, counts[i], info.group_count);
    }
    xkv_hook_close(hook);
    free_synthetic(&s);
}

/* --- Damage and repair -------------------------------------------------------------------------------------------- */

typedef struct blob_file {
    char path[256];
    uint8_t *data;
    size_t size;
} blob_file;

static blob_file read_blob(uint64_t id)
{
    blob_file b;
    struct stat st;
    const xkv_store_item *item = item_of(id);
    assert_non_null(item);
    snprintf(b.path, sizeof b.path, "%s/blobs/%s", t.path, xkv_blob_name_of(item->blob, id).text);
    int fd = open(b.path, O_RDONLY);
    assert_true(fd >= 0 && fstat(fd, &st) == 0);
    b.size = (size_t)st.st_size;
    b.data = malloc(b.size);
    assert_int_equal(read(fd, b.data, b.size), st.st_size);
    close(fd);
    return b;
}

static void write_file(const char *path, const uint8_t *data, size_t size)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, data, size), (ssize_t)size);
    close(fd);
}

static void flip(uint64_t id, long from_end)
{
    blob_file b = read_blob(id);
    b.data[b.size - (size_t)from_end] ^= 4;
    write_file(b.path, b.data, b.size);
    free(b.data);
}

static xkv_repair_report repair(bool lose_index)
{
    xkv_repair_report r;
    char path[96];
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    snprintf(path, sizeof path, "%s/index/data.mdb", t.path);
    if (lose_index)
        assert_int_equal(unlink(path), 0);
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, &r));
    open_with_clock();
    return r;
}

/* Whichever entry is damaged: what extends it is not served, what it extends is. */
static void damage_takes_what_extends_it(void **state)
{
    (void)state;
    for (uint32_t bad = 0; bad < 3; bad++) {
        uint64_t ids[3];
        xkv_hit *hit = NULL;
        put_line(ids);
        flip(ids[bad], 1000); /* before the last chunk, of which nothing is taken over */
        assert_int_equal(match_tokens(LONG, &hit).tokens, LONG);
        rows *got = make_rows(NULL, LONG);
        assert_true(xkv_is_damage(xkv_hit_read(t.ctx, hit, NULL, got->views)));
        free(got);
        xkv_hit_close(t.ctx, hit);
        assert_int_equal(found(LONG), 100 * bad);
        assert_int_equal(stats().corrupt, bad + 1);
        assert_sound(bad);
        assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, NULL));
    }
}

static void missing_blobs_take_what_extends_them(void **state)
{
    (void)state;
    uint64_t ids[3];
    xkv_hit *hit = NULL;
    put_line(ids);
    blob_file b = read_blob(ids[1]);
    assert_int_equal(unlink(b.path), 0);
    free(b.data);
    assert_string_not_equal(verify().first, "");
    xkv_match m = match_tokens(LONG, &hit);
    assert_int_equal(m.tokens, 100);
    xkv_hit_close(t.ctx, hit);
    assert_int_equal(found(LONG), 100);
    assert_sound(1);
}

static void lines_are_rebuilt_from_blobs(void **state)
{
    (void)state;
    for (int lose = 0; lose < 2; lose++) {
        uint64_t ids[3];
        put_line(ids);
        assert_ok(t.ctx, xkv_store_pin(t.ctx, t.store, &ns, ids[1], 1));
        assert_int_equal(repair(lose != 0).entries, 3);
        assert_sound(3);
        for (uint32_t i = 0; i < 3; i++) {
            assert_int_equal(item_of(ids[i])->parent, i > 0 ? ids[i - 1] : 0);
            assert_int_equal(item_of(ids[i])->children, i < 2);
            assert_int_equal(item_of(ids[i])->pinned, i == 1 && !lose);
        }
        assert_int_equal(found(LONG), LONG);
        flip(ids[1], 10);
        xkv_repair_report r = repair(lose != 0);
        assert_int_equal(r.entries, 1);
        assert_int_equal(r.quarantined, 2);
        assert_int_equal(found(LONG), 100);
        assert_sound(1);
        assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, NULL));
    }
}

/* A link as spec/store.md, section 11, has it. */
static uint8_t *link_of(const blob_file *b)
{
    uint32_t symbols = xkv_load32(b->data + 32), names = xkv_load32(b->data + 36);
    return b->data + 256 + 8 * ((symbols + 1023) / 1024 + 1) + 4 * symbols + 40 * names;
}

static void seal_link(uint8_t *link)
{
    xkv_store64(link + 56, XXH3_64bits(link, 56));
}

enum {
    OTHER_HASH,
    NO_BASE,
    FRAMING_BEYOND,
    BASE_BELOW,
    BASE_BEYOND,
    BASE_OF_ALL,
    OTHER_SPACE,
    OTHER_TOKENS,
    BASE_NEAR,
    LIES
};

/* The third entry of a line, with a link that is not true. */
static void lie(uint8_t *link, int which, uint64_t other)
{
    const xkv_store_item *item;
    switch (which) {
    case OTHER_HASH:
        link[5] ^= 1;
        break;
    case NO_BASE:
        xkv_store32(link + 40, 0);
        break;
    case FRAMING_BEYOND:
        xkv_store32(link + 44, 1u << 20);
        break;
    case BASE_BELOW: /* the second entry holds nothing before token 96 */
        xkv_store32(link + 40, 96);
        break;
    case BASE_NEAR: /* by itself it could be true */
        xkv_store32(link + 40, 193);
        break;
    case BASE_BEYOND:
        xkv_store32(link + 40, 201);
        break;
    case BASE_OF_ALL:
        xkv_store32(link + 40, 300);
        break;
    default:
        item = item_of(other);
        assert_non_null(item);
        xkv_store64(link + 32, other);
        memcpy(link, item->blob, 32);
    }
    seal_link(link);
}

static void links_that_lie_are_refused(void **state)
{
    (void)state;
    for (int which = 0; which < LIES; which++) {
        uint64_t ids[3], other = 0;
        xkv_namespace mine = ns;
        put_line(ids);
        blob_file b = read_blob(ids[2]);
        if (which == OTHER_TOKENS)
            tokens[150] += 1;
        if (which == OTHER_SPACE)
            ns = make_namespace("other");
        if (which == OTHER_SPACE || which == OTHER_TOKENS)
            other = put(200).id;
        lie(link_of(&b), which, other);
        ns = mine;
        if (which == OTHER_TOKENS)
            tokens[150] -= 1;

        /* Under its old name: the record says what the link should be. */
        write_file(b.path, b.data, b.size);
        xkv_hit *hit = NULL;
        assert_int_equal(match_tokens(LONG, &hit).tokens, LONG);
        rows *got = make_rows(NULL, LONG);
        assert_int_equal(xkv_hit_read(t.ctx, hit, NULL, got->views), XKV_ERROR_CORRUPT);
        free(got);
        xkv_hit_close(t.ctx, hit);
        assert_int_equal(found(LONG), 200);
        if (which == BASE_NEAR) {
            free(b.data);
            break;
        }

        /* Under its true one, when the index is made anew. */
        uint8_t hash[32];
        const xkv_input input = xkv_input_from_memory(b.data, b.size);
        assert_ok(t.ctx, xkv_hash_input(t.ctx, &input, hash));
        snprintf(b.path, sizeof b.path, "%s/blobs/%s", t.path, xkv_blob_name_of(hash, ids[2]).text);
        write_file(b.path, b.data, b.size);
        assert_int_equal(repair(true).quarantined, 1);
        assert_int_equal(found(LONG), 200);
        if (which == OTHER_SPACE)
            assert_int_equal(verify().entries, 3);
        else
            assert_sound(which == OTHER_TOKENS ? 3 : 2);
        free(b.data);
        teardown(NULL);
        setup(NULL);
    }
}

/* A killed put and a lost index may leave two sound blobs with one id. Whichever gets another one: what extends it
 * finds it, by its hash, in this repair and in later ones. */
static void new_ids_keep_the_line(void **state)
{
    (void)state;
    for (uint64_t seed = 100; seed < 108; seed++) { /* the order of files differs */
        uint64_t ids[3];
        char path[256];
        int32_t mine[STORE_TOKENS];
        memcpy(mine, tokens, sizeof mine);
        put_line(ids);
        make_tokens(seed, 50000, tokens, STORE_TOKENS);
        const uint64_t other = put(100).id;
        memcpy(tokens, mine, sizeof mine);
        blob_file b = read_blob(other);
        snprintf(path, sizeof path, "%.*s%016llx", (int)(strlen(b.path) - 16), b.path,
                 (unsigned long long)ids[seed % 3]);
        assert_int_equal(rename(b.path, path), 0);
        free(b.data);
        for (int i = 0; i < 2; i++) {
            xkv_repair_report r = repair(true);
            assert_int_equal(r.entries, 4);
            assert_int_equal(r.quarantined, 0);
            assert_int_equal(found(LONG), LONG);
            assert_sound(4);
        }
        teardown(NULL);
        setup(NULL);
    }
}

/* A record that names another dictionary than its blob: a lookup would refuse it. */
static xkv_status change_dict(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    xkv_item item;
    (void)meta;
    XKV_TRY(xkv_txn_get_item(txn, *(const uint64_t *)change->user, &item));
    item.dict[3] ^= 1;
    return xkv_txn_put_item(txn, &item);
}

static void heads_are_verified_like_lookups(void **state)
{
    (void)state;
    uint64_t id = put(100).id;
    xkv_change change = {.store = t.store, .body = change_dict, .user = &id};
    xkv_verify_report r;
    assert_ok(t.ctx, xkv_store_change(t.ctx, &change));
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 0, NULL, NULL, &r));
    assert_int_equal(r.damaged, 1);
}

/* An index that says entries extend each other in a ring is not followed for ever. */
static xkv_status make_ring(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    const uint64_t *ids = change->user;
    xkv_key mark = xkv_key_pair(XKV_TABLE_CHILD, ids[2], ids[0]);
    xkv_item item;
    (void)meta;
    XKV_TRY(xkv_txn_get_item(txn, ids[0], &item));
    item.parent = ids[2];
    item.base_tokens = 50;
    XKV_TRY(xkv_txn_put_mark(txn, &mark));
    return xkv_txn_put_item(txn, &item);
}

static void rings_end(void **state)
{
    (void)state;
    uint64_t ids[3];
    put_line(ids);
    xkv_change change = {.store = t.store, .body = make_ring, .user = ids};
    assert_ok(t.ctx, xkv_store_change(t.ctx, &change));
    assert_string_not_equal(verify().first, "");
    xkv_hit *hit = NULL;
    assert_int_equal(match_tokens(LONG, &hit).tokens, 0);
    assert_null(hit);
    (void)!xkv_store_remove(t.ctx, t.store, &ns, ids[1]);
    repair(true);
    assert_sound(stats().entries);
}

/* --- Export and import -------------------------------------------------------------------------------------------- */

static memory export(uint64_t id)
{
    memory m = {.data = NULL};
    const xkv_output output = memory_output(&m);
    assert_ok(t.ctx, xkv_store_export(t.ctx, t.store, &ns, id, &output));
    return m;
}

static void make_other_store(const uint8_t *key)
{
    xkv_store_properties p = xkv_store_properties_default();
    xkv_store_options o = xkv_store_options_default();
    teardown(NULL);
    make_folder(&t);
    p.block_tokens = 16;
    p.key = o.key = key;
    assert_ok(t.ctx, xkv_store_create(t.ctx, t.path, &p));
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, &o, &t.store));
}

static xkv_status import(const memory *m, size_t size, xkv_put_report *report)
{
    const xkv_input input = xkv_input_from_memory(m->data, size);
    return xkv_store_import(t.ctx, t.store, &input, report);
}

/* From a store into another, from there into an encrypted one, and from that into a third. */
static void exports_hold_the_line(void **state)
{
    (void)state;
    const uint8_t key[32] = {1, 2, 3};
    uint64_t ids[3];
    xkv_put_report r;
    put_line(ids);
    put(290); /* not exported */
    for (int i = 0; i < 3; i++) {
        memory m = export(ids[2]);
        make_other_store(i == 1 ? key : NULL);
        assert_ok(t.ctx, import(&m, m.size, &r));
        assert_int_equal(r.base_tokens, 192);
        ids[2] = r.id;
        assert_int_equal(found(LONG), LONG);
        assert_int_equal(stats().extending, 2);
        assert_int_equal(stats().bytes_shared, (96 + 192) * 2 * STORE_WIDTH * 4);
        assert_sound(3);
        assert_ok(t.ctx, import(&m, m.size, &r));
        assert_int_equal(r.existed, 1);
        assert_sound(3);
        memory_free(&m);
    }
}

/* What is extended lives on in another store, too, though its blob says that it has expired. */
static void exported_lines_live_on(void **state)
{
    (void)state;
    xkv_put_report r;
    put_for(100, 10);
    put(200);
    memory m = export(put(300).id);
    make_other_store(NULL); /* many years later */
    assert_ok(t.ctx, import(&m, m.size, &r));
    assert_int_equal(r.tokens, 300);
    assert_int_equal(found(LONG), LONG);
    assert_sound(3);
    memory_free(&m);
}

/* What an entry of the file extends may be there already, as an entry that extends others. */
static void imports_join_what_is_there(void **state)
{
    (void)state;
    xkv_put_options o = xkv_put_options_default();
    xkv_put_report r;
    o.whole = 1;
    put(100);
    put_with(200, o);
    memory m = export(put(300).id); /* of two entries: 200 whole, and 300 */
    make_other_store(NULL);
    put(100);
    put(200);
    assert_ok(t.ctx, import(&m, m.size, &r));
    assert_int_equal(r.base_tokens, 192);
    assert_int_equal(found(LONG), LONG);
    assert_sound(3);
    assert_int_equal(stats().extending, 2);
    memory_free(&m);
}

static void damaged_exports_are_refused(void **state)
{
    (void)state;
    uint64_t ids[3];
    put_line(ids);
    memory m = export(ids[2]);
    make_other_store(NULL);
    for (size_t i = 0; i < m.size; i += 97) {
        m.data[i] ^= 16;
        assert_int_not_equal(import(&m, m.size, NULL), XKV_OK);
        m.data[i] ^= 16;
        assert_int_not_equal(import(&m, i, NULL), XKV_OK);
    }
    assert_sound(stats().entries);
    assert_true(found(LONG) <= 200);
    size_t first = (size_t)xkv_load64(m.data + 16); /* the second and third one without the first */
    const memory rest = {.data = m.data + first, .size = m.size - first};
    assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, NULL));
    assert_int_equal(import(&rest, rest.size, NULL), XKV_ERROR_CORRUPT);
    assert_sound(0);
    memory_free(&m);
}

static void exports_hold_dictionaries(void **state)
{
    (void)state;
    trained d = train();
    synthetic s = sample(2);
    xkv_pack_options pack = xkv_pack_options_default();
    pack.chunk_tokens = CHUNK;
    pack.dict = d.dict;
    put_sample(&s, 128, &pack);
    memory m = export(put_sample(&s, SAMPLE, &pack).id);
    uint8_t *before = load_sample(&s, SAMPLE);
    xkv_dict_close(t.ctx, d.dict);
    d.dict = NULL;
    make_other_store(NULL);
    assert_ok(t.ctx, import(&m, m.size, NULL));
    assert_int_equal(stats().dictionaries, 1);
    uint8_t *after = load_sample(&s, SAMPLE);
    assert_memory_equal(before, after, s.size);
    assert_sound(2);
    free(before);
    free(after);
    free_synthetic(&s);
    free_trained(&d);
    memory_free(&m);
}

/* New page keys would need a new blob, and what extends the old one would go with it. */
static void what_is_extended_gets_no_new_keys(void **state)
{
    (void)state;
    uint64_t ids[3];
    xkv_page_key names[2];
    xkv_put_options o = xkv_put_options_default();
    put_line(ids);
    assert_ok(t.ctx, xkv_chain_sglang(t.ctx, tokens, 100, 50, names));
    o.keys = names;
    o.key_count = 2;
    xkv_put_report r = put_with(100, o);
    assert_int_equal(r.existed, 1);
    assert_int_equal(r.id, ids[0]);
    assert_int_equal(found(LONG), LONG);
    assert_sound(3);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(only_what_is_new_is_stored),
        TEST(every_range_is_restored),
        TEST(refused_reads_touch_nothing),
        TEST(lines_are_evicted_from_the_end),
        TEST(uses_count_for_what_is_extended),
        TEST(pins_keep_the_line),
        TEST(readers_keep_the_line),
        TEST(removal_takes_what_extends_it),
        TEST(what_is_extended_lives_as_long),
        TEST(what_is_shared_is_counted),
        TEST(what_adds_no_chunk_is_passed_over),
        TEST(options_can_forbid_it),
        TEST(what_is_worse_is_not_extended),
        TEST(what_is_extended_may_go),
        TEST(the_cap_is_for_the_whole),
        TEST(other_caches_are_not_extended),
        TEST(lines_are_bounded),
        TEST(what_is_extended_gets_no_new_keys),
        TEST(lines_of_lossy_entries),
        TEST(no_dictionary_is_decoded_for_it),
        TEST(what_is_coarser_is_not_extended),
        TEST(loads_announce_groups_of_all),
        TEST(damage_takes_what_extends_it),
        TEST(missing_blobs_take_what_extends_them),
        TEST(lines_are_rebuilt_from_blobs),
        TEST(links_that_lie_are_refused),
        TEST(new_ids_keep_the_line),
        TEST(heads_are_verified_like_lookups),
        TEST(rings_end),
        TEST(exports_hold_the_line),
        TEST(exported_lines_live_on),
        TEST(imports_join_what_is_there),
        TEST(damaged_exports_are_refused),
        TEST(exports_hold_dictionaries),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
