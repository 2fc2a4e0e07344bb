/* Tokens appended to an entry: what was there stays bit for bit, new rows are as good as the basis allows, and the
 * errors that the entry tells are those that its rows have, measured here in f64. */
#include "support.h"

#include <math.h>
#include <stdlib.h>

enum { TOKENS = 500, CHUNK = 64 };

typedef enum profile { LOSSLESS, SVD_RANKS, SVD_ERROR, SCALAR, DICT, CROSS, PROFILES } profile;

/* f32, so that errors are the codec's and not those of rounding to the engine's type. */
static synthetic sample(uint32_t dtype)
{
    return make_synthetic(&(synthetic_options){.layers = 3,
                                               .tokens = TOKENS,
                                               .heads = 2,
                                               .head_dim = 8,
                                               .dtype = dtype,
                                               .rank = 5,
                                               .group_layers = 2,
                                               .noise = 0.05,
                                               .mean = 1,
                                               .rope = 1,
                                               .first_position = 3});
}

/* A dictionary trained on the sample; with a cross stage or without. */
typedef struct trained {
    memory m;
    xkv_dict *dict;
} trained;

static void train(xkv_ctx *ctx, const synthetic *s, uint32_t cross, trained *t)
{
    xkv_train_options o = xkv_train_options_default();
    xkv_input input;

    *t = (trained){0};
    o.group_layers = 2;
    o.zstd_level = 1;
    o.cross = cross;
    assert_ok(ctx, train_on(ctx, &s, 1, &o, &t->m));
    input = xkv_input_from_memory(t->m.data, t->m.size);
    assert_ok(ctx, xkv_dict_open(ctx, &input, 1, &t->dict));
}

static void free_trained(xkv_ctx *ctx, trained *t)
{
    xkv_dict_close(ctx, t->dict);
    memory_free(&t->m);
}

static xkv_pack_options options_of(profile which, const xkv_dict *dict, uint32_t window)
{
    xkv_pack_options o = xkv_pack_options_default();

    o.chunk_tokens = CHUNK;
    o.window = window;
    o.group_layers = 2;
    if (which == SVD_RANKS || which == SVD_ERROR)
        o.profile = XKV_PROFILE_SVD;
    if (which == SVD_RANKS)
        o.rank_k = o.rank_v = 8;
    if (which == SCALAR)
        o.profile = XKV_PROFILE_SCALAR;
    if (which == SVD_ERROR || which == SCALAR)
        o.error = 0.05;
    if (which == DICT || which == CROSS) {
        o.profile = XKV_PROFILE_DICT;
        o.dict = dict;
        o.quality = 60;
    }
    return o;
}

static packed pack_first(xkv_ctx *ctx, const synthetic *s, uint32_t tokens, const xkv_pack_options *o)
{
    synthetic first = *s;

    first.geometry.token_count = tokens;
    return pack_planes(ctx, &first, o);
}

/* The first `tokens` tokens of s, of which `base` has some. */
static packed append_up_to(xkv_ctx *ctx, const packed *base, const synthetic *s, uint32_t tokens, const xkv_dict *dict)
{
    packed p = {{0}, {0}, {0}, NULL};
    memory *m = calloc(1, sizeof *m);
    xkv_output output = memory_output(m);
    xkv_geometry geometry = s->geometry;

    geometry.token_count = tokens;
    assert_ok(ctx, xkv_append(ctx, base->entry, &geometry, s->views, NULL, NULL, 0, NULL, &output, &p.report));
    p.m = *m;
    free(m);
    assert_int_equal(p.m.size, p.report.entry_bytes);
    p.input = xkv_input_from_memory(p.m.data, p.m.size);
    assert_ok(ctx, xkv_entry_open(ctx, &p.input, &p.entry));
    if (dict)
        assert_ok(ctx, xkv_entry_attach(ctx, p.entry, dict));
    assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
    return p;
}

/* --- What is restored --------------------------------------------------------------------------------------------- */

/* Squared error and energy of tokens [t0, t1) of a plane, before RoPE. */
static void measure(const synthetic *s, const uint8_t *restored, uint32_t plane, uint32_t t0, uint32_t t1,
                    double *squares, double *energy)
{
    uint32_t width = row_width(&s->planes[plane]);
    double *x = calloc(2 * width, sizeof *x), *y = x + width;

    *squares = *energy = 0;
    for (uint32_t t = t0; t < t1; t++) {
        plane_row(s, s->data, plane, t, x);
        plane_row(s, restored, plane, t, y);
        for (uint32_t i = 0; i < width; i++) {
            *squares += (x[i] - y[i]) * (x[i] - y[i]);
            *energy += x[i] * x[i];
        }
    }
    free(x);
}

/* The entry tells the errors that its coded tokens have. */
static void assert_errors_told(const synthetic *s, const uint8_t *restored, const packed *p)
{
    xkv_entry_info info;

    xkv_entry_get_info(p->entry, &info);
    for (uint32_t i = 0; i < info.group_count; i++) {
        xkv_group_info g;
        double all_squares = 0, all_energy = 0, squares, energy;
        xkv_entry_get_group(p->entry, i, &g);
        for (uint32_t k = 0; g.codec != XKV_CODEC_LOSSLESS && k < g.plane_count; k++) {
            measure(s, restored, g.planes[k], info.sinks, TOKENS - info.window, &squares, &energy);
            assert_true(fabs(g.errors[k] - sqrt(squares / energy)) <= 1e-3 * g.errors[k] + 1e-6);
            all_squares += squares;
            all_energy += energy;
        }
        if (g.codec == XKV_CODEC_LOSSLESS || g.plane_count == 0)
            continue;
        assert_true(fabs(g.error - sqrt(all_squares / all_energy)) <= 1e-3 * g.error + 1e-6);
        assert_true(fabs(g.energy - all_energy) <= 1e-5 * all_energy);
    }
}

/* Tokens [t0, t1) of all planes, the same bits in both. */
static void assert_same_rows(const synthetic *s, const uint8_t *a, const uint8_t *b, uint32_t t0, uint32_t t1)
{
    for (uint32_t p = 0; p < s->geometry.plane_count; p++) {
        size_t at = (size_t)((uint8_t *)s->views[p].data - s->data), row = (size_t)s->views[p].token_stride;
        assert_memory_equal(a + at + t0 * row, b + at + t0 * row, (t1 - t0) * row);
    }
}

static void assert_rows_good(const synthetic *s, const uint8_t *restored, uint32_t t0, uint32_t t1, double limit)
{
    for (uint32_t p = 0; p < s->geometry.plane_count; p++) {
        double squares, energy;
        measure(s, restored, p, t0, t1, &squares, &energy);
        assert_true(sqrt(squares / energy) <= limit);
    }
}

static void check_appended(xkv_ctx *ctx, const synthetic *s, profile which, uint32_t tokens, uint32_t window,
                           const xkv_dict *dict)
{
    xkv_pack_options o = options_of(which, dict, window);
    packed base = pack_first(ctx, s, tokens, &o), p = append_up_to(ctx, &base, s, TOKENS, dict);
    uint8_t *before = restore(ctx, s, base.entry), *after = restore(ctx, s, p.entry);
    uint32_t kept = (tokens - window) / CHUNK * CHUNK;

    assert_int_equal(xkv_entry_geometry(p.entry)->token_count, TOKENS);
    assert_same_rows(s, before, after, 0, kept);
    assert_same_rows(s, s->data, after, 0, 4); /* sinks */
    assert_same_rows(s, s->data, after, TOKENS - window, TOKENS);
    if (which == LOSSLESS) {
        assert_memory_equal(after, s->data, s->size);
    } else {
        assert_rows_good(s, after, kept, TOKENS, which == SVD_RANKS ? 0.17 : 0.1);
        assert_errors_told(s, after, &p);
    }
    assert_int_equal(p.report.lossless_groups, which == LOSSLESS ? p.report.group_count : 0);
    free(before);
    free(after);
    free_packed(ctx, &p);
    free_packed(ctx, &base);
}

/* The entry that is appended to ends in a chunk, at its end, in the first one, or behind its sinks. */
static void every_profile_is_appended_to(void **state)
{
    static const uint32_t tokens[] = {300, 320, 50, 130, TOKENS - 1, TOKENS};
    synthetic s = sample(XKV_F32);

    (void)state;
    for (uint32_t threads = 1; threads <= 2; threads++) {
        xkv_ctx *ctx = new_ctx(threads);
        trained plain, crossed;
        train(ctx, &s, 0, &plain);
        train(ctx, &s, 12, &crossed);
        for (profile which = 0; which < PROFILES; which++)
            for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
                for (uint32_t window = 0; window <= 5; window += 5)
                    check_appended(ctx, &s, which, tokens[i], window,
                                   which == DICT    ? plain.dict
                                   : which == CROSS ? crossed.dict
                                                    : NULL);
        free_trained(ctx, &plain);
        free_trained(ctx, &crossed);
        xkv_ctx_free(ctx);
    }
    free_synthetic(&s);
}

/* Token by token, and across chunks. */
static void appended_again_and_again(void **state)
{
    static const uint32_t steps[] = {101, 102, 103, 128, 129, 300, TOKENS};
    synthetic s = sample(XKV_F32);
    xkv_ctx *ctx = new_ctx(2);
    trained t;

    (void)state;
    train(ctx, &s, 12, &t);
    for (profile which = 0; which < PROFILES; which++) {
        const xkv_dict *dict = which == CROSS || which == DICT ? t.dict : NULL;
        xkv_pack_options o = options_of(which, dict, 0);
        packed p = pack_first(ctx, &s, 100, &o);
        uint8_t *restored;
        for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
            packed next = append_up_to(ctx, &p, &s, steps[i], dict);
            free_packed(ctx, &p);
            p = next;
        }
        restored = restore(ctx, &s, p.entry);
        assert_rows_good(&s, restored, 0, TOKENS, which == SVD_RANKS ? 0.17 : 0.1);
        if (which != LOSSLESS)
            assert_errors_told(&s, restored, &p);
        free(restored);
        free_packed(ctx, &p);
    }
    free_trained(ctx, &t);
    xkv_ctx_free(ctx);
    free_synthetic(&s);
}

/* --- What is refused ---------------------------------------------------------------------------------------------- */

static xkv_status try_append(xkv_ctx *ctx, const packed *base, const xkv_geometry *geometry, const xkv_view *views)
{
    memory m = {0};
    xkv_output output = memory_output(&m);
    xkv_status status = xkv_append(ctx, base->entry, geometry, views, NULL, NULL, 0, NULL, &output, NULL);

    memory_free(&m);
    return status;
}

static void other_caches_are_refused(void **state)
{
    synthetic s = sample(XKV_F32);
    xkv_ctx *ctx = new_ctx(1);
    xkv_pack_options o = options_of(SCALAR, NULL, 0);
    packed base = pack_first(ctx, &s, 300, &o);
    xkv_geometry g = s.geometry;

    (void)state;
    g.token_count = 299;
    assert_int_equal(try_append(ctx, &base, &g, s.views), XKV_ERROR_ARGUMENT);
    g.token_count = TOKENS;
    s.positions[299]--;
    assert_int_equal(try_append(ctx, &base, &g, s.views), XKV_ERROR_MISMATCH);
    s.positions[299]++;
    s.ropes[0].inv_freq[1] *= 2;
    assert_int_equal(try_append(ctx, &base, &g, s.views), XKV_ERROR_MISMATCH);
    s.ropes[0].inv_freq[1] /= 2;
    s.planes[2].heads = 1;
    assert_int_equal(try_append(ctx, &base, &g, s.views), XKV_ERROR_MISMATCH);
    s.planes[2].heads = 2;
    assert_int_equal(try_append(ctx, &base, &g, s.views), XKV_OK);
    free_packed(ctx, &base);
    xkv_ctx_free(ctx);
    free_synthetic(&s);
}

static void values_that_do_not_fit_are_refused(void **state)
{
    synthetic s = sample(XKV_F32);
    xkv_ctx *ctx = new_ctx(1);
    trained t;
    float *row = (float *)(void *)((uint8_t *)s.views[3].data + 450 * s.views[3].token_stride), was = row[2];

    (void)state;
    train(ctx, &s, 12, &t);
    for (profile which = SVD_RANKS; which < PROFILES; which++) {
        const xkv_dict *dict = which == CROSS || which == DICT ? t.dict : NULL;
        xkv_pack_options o = options_of(which, dict, 0);
        packed base = pack_first(ctx, &s, 300, &o);
        row[2] = NAN;
        assert_int_equal(try_append(ctx, &base, &s.geometry, s.views), XKV_ERROR_UNSUPPORTED);
        assert_non_null(strstr(xkv_ctx_error(ctx), "plane 3"));
        row[2] = 1e30f;
        assert_int_equal(try_append(ctx, &base, &s.geometry, s.views), XKV_ERROR_UNSUPPORTED);
        row[2] =
            1e7f * (which == SVD_RANKS ? 1 : 1e7f); /* beyond 65504 times the largest coefficient, or 32767 steps */
        assert_int_equal(try_append(ctx, &base, &s.geometry, s.views), XKV_ERROR_UNSUPPORTED);
        row[2] = was;
        assert_int_equal(try_append(ctx, &base, &s.geometry, s.views), XKV_OK);
        free_packed(ctx, &base);
    }
    free_trained(ctx, &t);
    xkv_ctx_free(ctx);
    free_synthetic(&s);
}

static void a_dictionary_for_restoring_is_refused(void **state)
{
    synthetic s = sample(XKV_F32);
    xkv_ctx *ctx = new_ctx(1);
    trained t;
    xkv_dict *slim;
    xkv_input input;

    (void)state;
    train(ctx, &s, 0, &t);
    xkv_pack_options o = options_of(DICT, t.dict, 0);
    packed base = pack_first(ctx, &s, 300, &o);
    input = xkv_input_from_memory(t.m.data, t.m.size);
    assert_ok(ctx, xkv_dict_open(ctx, &input, 0, &slim));
    assert_ok(ctx, xkv_entry_attach(ctx, base.entry, slim));
    assert_int_equal(try_append(ctx, &base, &s.geometry, s.views), XKV_ERROR_ARGUMENT);
    free_packed(ctx, &base);
    xkv_dict_close(ctx, slim);
    free_trained(ctx, &t);
    xkv_ctx_free(ctx);
    free_synthetic(&s);
}

/* --- Engine files ------------------------------------------------------------------------------------------------- */

/* The first `tokens` tokens of a cache's file, in memory. */
static uint8_t *first_of_file(xkv_ctx *ctx, const xkv_cache *cache, uint32_t tokens, size_t *size)
{
    memory m = {0};
    xkv_output output = memory_output(&m);
    xkv_input input;
    xkv_entry *entry;
    uint64_t n;
    uint8_t *image;

    assert_ok(ctx, xkv_pack_cache(ctx, cache, NULL, &output, NULL));
    input = xkv_input_from_memory(m.data, m.size);
    assert_ok(ctx, xkv_entry_open(ctx, &input, &entry));
    assert_ok(ctx, xkv_entry_restored_size(ctx, entry, tokens, &n));
    image = malloc((size_t)n);
    assert_ok(ctx, xkv_entry_restore(ctx, entry, tokens, NULL, NULL, image, n));
    xkv_entry_close(ctx, entry);
    memory_free(&m);
    *size = (size_t)n;
    return image;
}

/* A genuine file, packed in two goes, comes back bit for bit; one whose first rows are others does not get in. */
static void a_lossless_file_grows(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    xkv_cache *whole, *first, *changed;
    memory base = {0}, grown = {0};
    xkv_output base_output = memory_output(&base), output = memory_output(&grown);
    xkv_pack_options o = xkv_pack_options_default();
    xkv_input input;
    xkv_entry *entry, *result;
    const uint8_t *data;
    uint8_t *head, *image, *copy;
    uint64_t size;
    size_t head_size;

    (void)state;
    o.chunk_tokens = 32;
    assert_ok(ctx, xkv_cache_open(ctx, XKV_DATA_DIR "/smollm2-135m-jargon.ggsq", NULL, &whole));
    data = xkv_cache_data(whole, &size);
    head = first_of_file(ctx, whole, 100, &head_size);
    assert_ok(ctx, xkv_cache_from_memory(ctx, head, head_size, "head", NULL, &first));
    assert_ok(ctx, xkv_pack_cache(ctx, first, &o, &base_output, NULL));
    input = xkv_input_from_memory(base.data, base.size);
    assert_ok(ctx, xkv_entry_open(ctx, &input, &entry));
    assert_ok(ctx, xkv_append_cache(ctx, entry, whole, NULL, &output, NULL));
    input = xkv_input_from_memory(grown.data, grown.size);
    assert_ok(ctx, xkv_entry_open(ctx, &input, &result));
    assert_ok(ctx, xkv_entry_verify(ctx, result, NULL, NULL));
    image = malloc((size_t)size);
    assert_ok(ctx, xkv_entry_restore(ctx, result, 0, NULL, NULL, image, size));
    assert_memory_equal(image, data, (size_t)size);

    copy = malloc((size_t)size);
    memcpy(copy, data, (size_t)size);
    assert_ok(ctx, xkv_cache_from_memory(ctx, copy, (size_t)size, "copy", NULL, &changed));
    const xkv_view *view = &xkv_cache_views(changed)[7];
    ((uint8_t *)view->data)[20 * view->token_stride] ^= 1;
    memory refused = {0};
    output = memory_output(&refused);
    assert_int_equal(xkv_append_cache(ctx, entry, changed, NULL, &output, NULL), XKV_ERROR_MISMATCH);
    assert_non_null(strstr(xkv_ctx_error(ctx), "tokens 0 .. 31"));
    memory_free(&refused);
    free(copy);
    free(image);
    free(head);
    xkv_entry_close(ctx, entry);
    xkv_entry_close(ctx, result);
    xkv_cache_free(ctx, whole);
    xkv_cache_free(ctx, first);
    xkv_cache_free(ctx, changed);
    memory_free(&base);
    memory_free(&grown);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_profile_is_appended_to),
        cmocka_unit_test(appended_again_and_again),
        cmocka_unit_test(other_caches_are_refused),
        cmocka_unit_test(values_that_do_not_fit_are_refused),
        cmocka_unit_test(a_dictionary_for_restoring_is_refused),
        cmocka_unit_test(a_lossless_file_grows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
