/* test_framing.c - framings: building, placing planes in an image, cutting llama.cpp files to their first tokens. */
#include "engine_file.h"
#include "engine_support.h"

#include <stdio.h>

static xkv_ctx *ctx;
static bytes file;

static int setup(void **state)
{
    (void)state;
    return xkv_ctx_create(NULL, &ctx) != XKV_OK;
}

static int teardown(void **state)
{
    (void)state;
    int leak = xkv_ctx_memory_used(ctx) != 0;
    xkv_ctx_free(ctx);
    return leak;
}

static void test_builder(void **state)
{
    (void)state;
    xkv_framing_builder b = {.ctx = ctx};
    xkv_framing f = {0};
    for (int i = 0; i < 300; i++) {
        assert_int_equal(xkv_framing_add_literal(&b, "abc", 3), XKV_OK);
        assert_int_equal(xkv_framing_add_literal(&b, "", 0), XKV_OK);
        assert_int_equal(xkv_framing_add_literal(&b, "de", 2), XKV_OK);
        assert_int_equal(xkv_framing_add_tensor(&b, &(xkv_segment){.size = 7, .plane_count = 1}), XKV_OK);
    }
    xkv_framing_take(&b, XKV_ENGINE_SAFETENSORS, &f);
    xkv_framing_builder_free(&b);
    assert_int_equal(f.segment_count, 600); /* neighbouring literals are one */
    assert_int_equal(f.segments[598].size, 5);
    assert_int_equal(f.source_size, 300 * 12);
    assert_int_equal(f.literal_size, 1500);
    assert_memory_equal(f.literals + 1495, "abcde", 5);
    xkv_framing_release(ctx, &f);
}

/* Where element (t, h, d) lies in each layout, by the formulas of spec/container.md, section 8. */
static void test_views(void **state)
{
    (void)state;
    enum { N = 3, H = 2, D = 4 };
    static const xkv_plane planes[] = {{0, XKV_PLANE_K, XKV_F16, H, D, XKV_NO_ROPE},
                                       {0, XKV_PLANE_V, XKV_F32, H, D, XKV_NO_ROPE}};
    static const uint32_t k_size = N * H * D * 2, v_size = N * H * D * 4, row = H * D * 6;
    static uint8_t image[1000];
    xkv_geometry g = {.layer_count = 1, .plane_count = 2, .token_count = N, .planes = planes};
    xkv_view v[2];
    for (uint32_t layout = 0; layout < 4; layout++) {
        bool together = layout == XKV_LAYOUT_TOKEN_MAJOR || layout == XKV_LAYOUT_REVERSED;
        const xkv_segment one[] = {{.size = 10}, {k_size + v_size, 0, 2, layout}};
        const xkv_segment two[] = {{v_size, 1, 1, layout}, {.size = 10}, {k_size, 0, 1, layout}};
        xkv_framing f = {
            .segment_count = together ? 2 : 3, .segments = together ? one : two, .source_size = 10 + k_size + v_size};
        assert_int_equal(xkv_framing_views(ctx, &f, &g, image, v), XKV_OK);
        for (uint32_t t = 0; t < N; t++)
            for (uint32_t h = 0; h < H; h++)
                for (uint32_t d = 0; d < D; d++) {
                    uint32_t flat = h * D + d;
                    const uint32_t k_at[] = {10 + t * row + flat * 2, 10 + v_size + (flat * N + t) * 2,
                                             10 + v_size + ((h * N + t) * D + d) * 2,
                                             10 + t * row + H * D * 4 + flat * 2};
                    const uint32_t v_at[] = {10 + t * row + H * D * 2 + flat * 4, (flat * N + t) * 4,
                                             ((h * N + t) * D + d) * 4, 10 + t * row + flat * 4};
                    assert_ptr_equal(view_element(&v[0], t, h, d), image + k_at[layout]);
                    assert_ptr_equal(view_element(&v[1], t, h, d), image + v_at[layout]);
                }
    }
}

static void test_views_refused(void **state)
{
    (void)state;
    static const xkv_plane planes[] = {{0, XKV_PLANE_K, XKV_F16, 1, 4, XKV_NO_ROPE},
                                       {0, XKV_PLANE_V, XKV_F16, 1, 4, XKV_NO_ROPE}};
    xkv_geometry g = {.layer_count = 1, .plane_count = 2, .token_count = 2, .planes = planes};
    static uint8_t image[64];
    xkv_view v[2];
    static const xkv_segment bad[][2] = {{{16, 0, 1, 0}, {.size = 16}},           /* plane 1 is lacking */
                                         {{16, 0, 1, 0}, {16, 0, 1, 0}},          /* plane 0 twice */
                                         {{16, 0, 1, 0}, {16, 2, 1, 0}},          /* no such plane */
                                         {{16, 0, 1, 0}, {16, 1, UINT32_MAX, 0}}, /* nor that many */
                                         {{16, 0, 1, 0}, {16, 1, 1, 4}},          /* no such layout */
                                         {{.size = 0}, {32, 0, 2, 1}},            /* dim-major holds one plane */
                                         {{18, 0, 1, 0}, {14, 1, 1, 0}},          /* sizes */
                                         {{16, 0, 1, 0}, {17, 1, 1, 0}}};         /* more than the source */
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        xkv_framing f = {.segment_count = 2, .segments = bad[i], .source_size = 32};
        assert_int_equal(xkv_framing_views(ctx, &f, &g, image, v), XKV_ERROR_ARGUMENT);
    }
}

/* --- Cutting ------------------------------------------------------------------------------------------------------ */

/* Cut `cache` to `kept` tokens, fill the cut file from its rows, and open it. */
static void assert_cut(const xkv_cache *cache, uint32_t kept, uint64_t expected_size)
{
    const xkv_geometry *g = xkv_cache_geometry(cache);
    xkv_framing *cut;
    xkv_cache *reopened;
    xkv_status status = xkv_framing_first(ctx, xkv_cache_framing(cache), g, kept, &cut);
    if (status != XKV_OK)
        print_message("%s\n", xkv_ctx_error(ctx));
    assert_int_equal(status, XKV_OK);
    assert_int_equal(cut->source_size, expected_size);
    xkv_geometry less = *g;
    less.token_count = kept;
    uint8_t *image = literal_image(cut);
    xkv_view *views = calloc(g->plane_count, sizeof *views);
    assert_int_equal(xkv_framing_views(ctx, cut, &less, image, views), XKV_OK);
    copy_rows(&less, views, xkv_cache_views(cache), kept);
    assert_int_equal(xkv_cache_from_memory(ctx, image, (size_t)cut->source_size, "cut", NULL, &reopened), XKV_OK);
    const xkv_geometry *r = xkv_cache_geometry(reopened);
    assert_int_equal(xkv_cache_framing(reopened)->engine, xkv_cache_framing(cache)->engine);
    assert_int_equal(r->token_count, kept);
    assert_int_equal(r->plane_count, g->plane_count);
    assert_memory_equal(r->positions, g->positions, kept * sizeof *r->positions);
    assert_int_equal(r->token_id_count, g->token_id_count < kept ? g->token_id_count : kept);
    assert_equal_rows(r, xkv_cache_views(reopened), xkv_cache_views(cache), kept);
    xkv_cache_free(ctx, reopened);
    free(views);
    free(image);
    xkv_framing_free(ctx, cut);
}

/* A cut file is what the engine would have saved after that many tokens, byte for byte where rows are in order. */
static void assert_cut_is_shorter_save(const sequence *s, const sequence *less)
{
    bytes *shorter = calloc(1, sizeof *shorter);
    put_sequence(shorter, less);
    put_sequence(&file, s);
    xkv_cache *cache, *from_shorter;
    assert_int_equal(xkv_cache_from_memory(ctx, file.data, file.size, "test", NULL, &cache), XKV_OK);
    assert_cut(cache, less->cells, shorter->size);
    xkv_framing *cut;
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_int_equal(xkv_framing_first(ctx, xkv_cache_framing(cache), g, less->cells, &cut), XKV_OK);
    assert_int_equal(xkv_cache_from_memory(ctx, shorter->data, shorter->size, "test", NULL, &from_shorter), XKV_OK);
    const xkv_framing *f = xkv_cache_framing(from_shorter);
    assert_int_equal(cut->engine, engine_of(s));
    assert_int_equal(cut->segment_count, f->segment_count);
    assert_int_equal(cut->literal_size, f->literal_size);
    assert_memory_equal(cut->literals, f->literals, (size_t)f->literal_size);
    xkv_cache_free(ctx, from_shorter);
    xkv_framing_free(ctx, cut);
    xkv_cache_free(ctx, cache);
    free(shorter);
}

static void test_cut_is_shorter_save(void **state)
{
    (void)state;
    static const uint32_t versions[] = {2, 2, 3, 4};
    static const int streams[] = {0, 1, 1, 3};
    for (size_t form = 0; form < 4; form++)
        for (uint32_t v_trans = 0; v_trans < 2; v_trans++)
            for (uint32_t kept = 1; kept <= 6; kept++) {
                sequence s = plain_sequence();
                s.version = versions[form];
                s.streams = streams[form];
                s.used = streams[form] / 2;
                s.v_trans = v_trans;
                s.ids = s.cells = 6;
                s.v_row = v_trans ? 4 : 6;
                for (int served = 0; served < 2; served++) {
                    s.served = served;
                    sequence less = s;
                    less.ids = less.cells = kept;
                    assert_cut_is_shorter_save(&s, &less);
                }
            }
}

/* The outputs of a session are those of its last tokens: none are left. */
static void test_cut_session(void **state)
{
    (void)state;
    for (uint32_t version = 2; version <= 4; version++)
        for (int outputs = 0; outputs <= (version == 2 ? 2 : 0); outputs++)
            for (uint32_t kept = 1; kept <= 6; kept++) {
                sequence s = plain_sequence();
                s.kind = SESSION_FILE;
                s.architecture = "qwen2";
                s.version = version;
                s.ids = s.cells = 6;
                s.output_section = outputs > 0;
                s.outputs = (uint32_t)outputs;
                sequence less = s;
                less.ids = less.cells = kept;
                less.outputs = 0;
                assert_cut_is_shorter_save(&s, &less);
                s.kind = less.kind = BLOB;
                assert_cut_is_shorter_save(&s, &less);
            }
}

/* Both caches of a model with windows are cut alike. */
static void test_cut_two_caches(void **state)
{
    (void)state;
    for (uint32_t kept = 1; kept <= 5; kept++)
        for (int v_trans = 0; v_trans < 2; v_trans++) {
            sequence s = plain_sequence(), second = plain_sequence();
            s.ids = s.cells = second.cells = 6;
            s.streams = second.streams = 2;
            s.v_trans = second.v_trans = (uint32_t)v_trans;
            second.layers = 3;
            second.k_row = 16;
            sequence less = s, less_second = second;
            s.second = &second;
            less.second = &less_second;
            less.ids = less.cells = less_second.cells = kept;
            assert_cut_is_shorter_save(&s, &less);
        }
}

/* Cells out of order: the first tokens are those of the lowest positions, and stay in the order of the file. */
static void test_cut_unordered(void **state)
{
    (void)state;
    static const int32_t at[] = {7, 3, 9, 3, 4};
    static const uint32_t rows[] = {1, 2, 3, 0}; /* of positions 3, 3, 4, 7 among the rows of 7, 3, 3, 4 */
    sequence s = plain_sequence();
    s.cells = 5;
    s.at = at;
    s.extension = 12;
    put_sequence(&file, &s);
    size_t end = file.size;
    put_checkpoints(&file);
    xkv_cache *cache;
    assert_int_equal(xkv_cache_from_memory(ctx, file.data, file.size, "test", NULL, &cache), XKV_OK);
    for (uint32_t kept = 1; kept <= 5; kept++)
        assert_cut(cache, kept, end - (5 - kept) * (24 + 2 * (8 + 4)) - (kept == 1 ? 4 : 0)); /* ids: 2, then 1 */
    xkv_framing *cut;
    assert_int_equal(xkv_framing_first(ctx, xkv_cache_framing(cache), xkv_cache_geometry(cache), 4, &cut), XKV_OK);
    assert_memory_equal(cut->rows, rows, sizeof rows);
    xkv_framing_free(ctx, cut);
    xkv_cache_free(ctx, cache);
}

static void test_cut_refused(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    put_sequence(&file, &s);
    xkv_cache *cache;
    xkv_framing *cut;
    assert_int_equal(xkv_cache_from_memory(ctx, file.data, file.size, "test", NULL, &cache), XKV_OK);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    xkv_framing f = *xkv_cache_framing(cache);
    assert_int_equal(xkv_framing_first(ctx, &f, g, 0, &cut), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_framing_first(ctx, &f, g, 4, &cut), XKV_ERROR_ARGUMENT);
    f.engine = XKV_ENGINE_OPAQUE;
    assert_int_equal(xkv_framing_first(ctx, &f, g, 1, &cut), XKV_ERROR_UNSUPPORTED);
    /* a framing that does not belong to its literals: as an entry from elsewhere may hold it */
    f.engine = XKV_ENGINE_LLAMA_SEQUENCE;
    xkv_segment segments[8];
    memcpy(segments, f.segments, sizeof segments);
    f.segments = segments;
    segments[1].size++;
    assert_int_equal(xkv_framing_first(ctx, &f, g, 1, &cut), XKV_ERROR_UNSUPPORTED);
    segments[1].size--;
    f.segment_count--;
    f.source_size -= segments[7].size;
    assert_int_equal(xkv_framing_first(ctx, &f, g, 1, &cut), XKV_ERROR_UNSUPPORTED);
    f.source_size = f.literal_size;
    f.segment_count = 1;
    assert_int_equal(xkv_framing_first(ctx, &f, g, 1, &cut), XKV_ERROR_UNSUPPORTED);
    xkv_cache_free(ctx, cache);
    file.size = 0;
    put_noise(&file, 100, 1);
    assert_int_equal(xkv_cache_from_memory(ctx, file.data, file.size, "test", NULL, &cache), XKV_OK);
    assert_int_equal(xkv_framing_first(ctx, xkv_cache_framing(cache), xkv_cache_geometry(cache), 1, &cut),
                     XKV_ERROR_ARGUMENT);
    xkv_cache_free(ctx, cache);
}

static void test_cut_genuine(void **state)
{
    (void)state;
    char path[1024];
    snprintf(path, sizeof path, "%s/data/qwen2.5-coder-0.5b/train/code-1.ggsq", XKV_SHARED_DIR);
    xkv_cache *cache;
    if (xkv_cache_open(ctx, path, NULL, &cache) == XKV_ERROR_IO) {
        print_message("skipped: no %s\n", path);
        skip();
    }
    const xkv_geometry *g = xkv_cache_geometry(cache);
    uint32_t n = g->token_count, ids = g->token_id_count;
    for (uint32_t kept = 1; kept < n; kept += 200)
        assert_cut(cache, kept,
                   12 + 4 * (uint64_t)(ids < kept ? ids : kept) + 8 + 12 * kept + 8 + 48 * (12 + 256 * (uint64_t)kept));
    xkv_cache_free(ctx, cache);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_builder, setup, teardown),
        cmocka_unit_test_setup_teardown(test_views, setup, teardown),
        cmocka_unit_test_setup_teardown(test_views_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cut_is_shorter_save, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cut_session, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cut_two_caches, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cut_unordered, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cut_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cut_genuine, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
