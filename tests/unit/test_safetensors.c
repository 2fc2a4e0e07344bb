/* test_safetensors.c - caches in safetensors files: names, axes, metadata, strict headers, writing and cutting. */
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

static void build(const char *header, size_t data_size)
{
    file.size = 0;
    put64(&file, strlen(header));
    put(&file, header, strlen(header));
    put_noise(&file, data_size, 5);
}

static xkv_status open_size(size_t size, const xkv_model *model, xkv_cache **cache)
{
    static uint8_t *copy;
    free(copy);
    copy = malloc(size ? size : 1);
    memcpy(copy, file.data, size);
    xkv_status status = xkv_cache_from_memory(ctx, copy, size, "test", model, cache);
    if (status != XKV_OK) {
        free(copy);
        copy = NULL;
    }
    return status;
}

static xkv_cache *open_file(const xkv_model *model)
{
    xkv_cache *cache = NULL;
    xkv_status status = open_size(file.size, model, &cache);
    if (status != XKV_OK)
        print_message("%s\n", xkv_ctx_error(ctx));
    assert_int_equal(status, XKV_OK);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    return cache;
}

static const uint8_t *data_of(const xkv_cache *cache)
{
    uint64_t size;
    const uint8_t *data = xkv_cache_data(cache, &size);
    return data + 8 + xkv_load64(data);
}

/* K of 2 heads, 3 tokens, dim 4 and V of 2 heads, 3 tokens, dim 2, in f16: 48 and 24 bytes. */
#define K_V                                                                                                            \
    "\"layer.0.key\":{\"dtype\":\"F16\",\"shape\":[2,3,4],\"data_offsets\":[0,48]},"                                   \
    "\"layer.0.value\":{\"dtype\":\"F16\",\"shape\":[2,3,2],\"data_offsets\":[48,72]}"

static void test_heads_first(void **state)
{
    (void)state;
    build("{" K_V "}", 72);
    xkv_cache *cache = open_file(NULL);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_int_equal(xkv_cache_framing(cache)->engine, XKV_ENGINE_SAFETENSORS);
    assert_int_equal(g->token_count, 3);
    assert_int_equal(g->plane_count, 2);
    assert_int_equal(g->planes[0].heads, 2);
    assert_int_equal(g->planes[1].head_dim, 2);
    assert_int_equal(g->positions[2], 2);
    assert_ptr_equal(view_element(xkv_cache_views(cache), 2, 1, 3), data_of(cache) + ((1 * 3 + 2) * 4 + 3) * 2);
    xkv_cache_free(ctx, cache);
}

static void test_tokens_first(void **state)
{
    (void)state;
    build("{\"__metadata__\":{\"xkv.layout\":\"tokens_heads_dim\",\"xkv.positions_start\":\"5\"}," K_V "}", 72);
    xkv_cache *cache = open_file(NULL);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_int_equal(g->token_count, 2);
    assert_int_equal(g->planes[0].heads, 3);
    assert_int_equal(g->positions[0], 5);
    assert_int_equal(g->positions[1], 6);
    assert_ptr_equal(view_element(xkv_cache_views(cache), 1, 2, 3), data_of(cache) + ((1 * 3 + 2) * 4 + 3) * 2);
    xkv_cache_free(ctx, cache);
}

/* Without a word about the axes: the axis on which all tensors agree is that of the tokens, or the model knows. */
static void test_axes_found(void **state)
{
    (void)state;
    build("{\"layer.0.key\":{\"dtype\":\"F16\",\"shape\":[5,2,4],\"data_offsets\":[0,80]},"
          "\"layer.1.key\":{\"dtype\":\"F16\",\"shape\":[5,3,4],\"data_offsets\":[80,200]}}",
          200);
    xkv_cache *cache = open_file(NULL);
    assert_int_equal(xkv_cache_geometry(cache)->token_count, 5);
    assert_int_equal(xkv_cache_geometry(cache)->planes[1].heads, 3);
    xkv_cache_free(ctx, cache);
    build("{" K_V "}", 72);
    xkv_model_layer layer = {3, 4, 2, XKV_NO_ROPE, 0};
    xkv_model model = {.layer_count = 1, .layers = &layer};
    cache = open_file(&model);
    assert_int_equal(xkv_cache_geometry(cache)->token_count, 2);
    assert_int_equal(xkv_cache_geometry(cache)->planes[0].heads, 3);
    xkv_cache_free(ctx, cache);
    layer.kv_heads = 4;
    assert_int_equal(open_size(file.size, &model, &cache), XKV_ERROR_MISMATCH);
    layer = (xkv_model_layer){3, 4, 4, XKV_NO_ROPE, 0};
    assert_int_equal(open_size(file.size, &model, &cache), XKV_ERROR_MISMATCH);
}

/* Other programs' names, a batch of one, and tensors that are none of a cache's. */
static void test_names(void **state)
{
    (void)state;
    static const char *const pairs[][2] = {{"layer.7.key", "layer.7.value"},
                                           {"layers.7.key", "layers.7.value"},
                                           {"layers.7.keys", "layers.7.values"},
                                           {"key_cache.7", "value_cache.7"},
                                           {"past_key_values.7.key", "past_key_values.7.value"}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        char header[512];
        snprintf(header, sizeof header,
                 "{\"a\":{\"dtype\":\"I32\",\"shape\":[2],\"data_offsets\":[0,8]},"
                 "\"%s\":{\"dtype\":\"BF16\",\"shape\":[1,2,3,4],\"data_offsets\":[56,104]},"
                 "\"%s\":{\"dtype\":\"BF16\",\"shape\":[1,2,3,4],\"data_offsets\":[8,56]},"
                 "\"z\":{\"dtype\":\"F4\",\"shape\":[16],\"data_offsets\":[104,112]}}   ",
                 pairs[i][0], pairs[i][1]);
        build(header, 112);
        xkv_cache *cache = open_file(NULL);
        const xkv_geometry *g = xkv_cache_geometry(cache);
        const xkv_framing *f = xkv_cache_framing(cache);
        assert_int_equal(g->plane_count, 2);
        assert_int_equal(g->layer_count, 8);
        assert_int_equal(g->planes[0].layer, 7);
        assert_int_equal(g->planes[0].kind, XKV_PLANE_K);
        assert_int_equal(g->planes[0].dtype, XKV_BF16);
        assert_int_equal(f->segment_count, 4); /* header and "a"; V; K; "z" */
        assert_int_equal(f->segments[1].first_plane, 1);
        assert_int_equal(f->segments[3].size, 8);
        xkv_framing *cut;
        assert_int_equal(xkv_framing_first(ctx, f, g, 1, &cut), XKV_ERROR_UNSUPPORTED);
        xkv_cache_free(ctx, cache);
    }
}

static void test_metadata(void **state)
{
    (void)state;
    build("{\"__metadata__\":{\"xkv.positions\":\"[9,4,6]\",\"xkv.token_ids\":\"[11,-1,13,14]\","
          "\"xkv.ropes\":\"[{\\\"n_rot\\\":4,\\\"offset\\\":0,\\\"style\\\":0,\\\"scale\\\":1.5,"
          "\\\"inv_freq\\\":[1,0.25]}]\",\"xkv.layer_ropes\":\"[0]\",\"format\":\"pt\"}," K_V "}",
          72);
    xkv_cache *cache = open_file(NULL);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    static const int32_t positions[] = {4, 6, 9}, ids[] = {11, -1, 13, 14};
    static const uint32_t rows[] = {1, 2, 0};
    assert_memory_equal(g->positions, positions, sizeof positions);
    assert_memory_equal(xkv_cache_framing(cache)->rows, rows, sizeof rows);
    assert_int_equal(g->token_id_count, 4);
    assert_memory_equal(g->token_ids, ids, sizeof ids);
    assert_int_equal(g->rope_count, 1);
    assert_int_equal(g->planes[0].rope, 0);
    assert_int_equal(g->planes[1].rope, XKV_NO_ROPE);
    assert_true(g->ropes[0].n_rot == 4 && g->ropes[0].scale == 1.5 && g->ropes[0].inv_freq[1] == 0.25);
    xkv_cache_free(ctx, cache);
}

/* A model's rotation is used with half-split pairs: that is how transformers caches every model. */
static void test_model_rope(void **state)
{
    (void)state;
    xkv_rope rope = {.n_rot = 4, .style = XKV_ROPE_INTERLEAVED, .scale = 1};
    xkv_model_layer layer = {2, 4, 2, 0, 0};
    xkv_model model = {.layer_count = 1, .layers = &layer, .rope_count = 1, .ropes = &rope};
    build("{" K_V "}", 72);
    xkv_cache *cache = open_file(&model);
    assert_int_equal(xkv_cache_geometry(cache)->planes[0].rope, 0);
    assert_int_equal(xkv_cache_geometry(cache)->ropes[0].style, XKV_ROPE_HALF_SPLIT);
    xkv_cache_free(ctx, cache);
}

static void test_empty_and_foreign(void **state)
{
    (void)state;
    build("{\"layer.0.key\":{\"dtype\":\"F16\",\"shape\":[2,0,4],\"data_offsets\":[0,0]}}", 0);
    xkv_cache *cache = open_file(NULL);
    assert_int_equal(xkv_cache_framing(cache)->engine, XKV_ENGINE_SAFETENSORS);
    assert_int_equal(xkv_cache_geometry(cache)->plane_count, 0);
    xkv_cache_free(ctx, cache);
    build("{\"w\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4);
    cache = open_file(NULL);
    assert_int_equal(xkv_cache_framing(cache)->engine, XKV_ENGINE_OPAQUE);
    xkv_cache_free(ctx, cache);
}

static void assert_refused(const char *header, size_t data_size, xkv_status expected, const char *rule)
{
    xkv_cache *cache;
    build(header, data_size);
    xkv_status status = open_size(file.size, NULL, &cache);
    if (status != expected || !strstr(xkv_ctx_error(ctx), rule))
        print_message("%s: %s\n", header, xkv_ctx_error(ctx));
    assert_int_equal(status, expected);
    assert_non_null(strstr(xkv_ctx_error(ctx), rule));
}

#define ONE(shape, offsets) "{\"layer.0.key\":{\"dtype\":\"F16\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void test_strict(void **state)
{
    (void)state;
    assert_refused("{ not json", 0, XKV_ERROR_CORRUPT, "[SF2]");
    assert_refused("{\"a\":1}", 0, XKV_ERROR_CORRUPT, "[SF3]");
    assert_refused("{\"__metadata__\":{\"a\":1}," K_V "}", 72, XKV_ERROR_CORRUPT, "[SF2]");
    assert_refused("{\"__metadata__\":[]," K_V "}", 72, XKV_ERROR_CORRUPT, "[SF2]");
    assert_refused("{" K_V "," K_V "}", 72, XKV_ERROR_CORRUPT, "[SF2]"); /* names twice */
    assert_refused(ONE("[1,1,4]", "[0,6]"), 6, XKV_ERROR_CORRUPT, "[SF3]");
    assert_refused(ONE("[1,1,-4]", "[0,8]"), 8, XKV_ERROR_CORRUPT, "[SF3]");
    assert_refused(ONE("[1,1,4]", "[8,0]"), 8, XKV_ERROR_CORRUPT, "[SF3]");
    assert_refused(ONE("[4294967296,4294967296,4]", "[0,0]"), 0, XKV_ERROR_CORRUPT, "[SF3]");
    assert_refused(ONE("[1,1,4]", "[0,8.5]"), 8, XKV_ERROR_CORRUPT, "[SF3]");
    assert_refused(ONE("[1,1,4]", "[2,10]"), 10, XKV_ERROR_CORRUPT, "[SF4]"); /* hole */
    assert_refused(ONE("[1,1,4]", "[0,8]"), 9, XKV_ERROR_CORRUPT, "[SF4]");   /* bytes left over */
    assert_refused(ONE("[1,1,4]", "[0,8]"), 7, XKV_ERROR_TRUNCATED, "[SF4]"); /* bytes lacking */
    assert_refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
                   "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]}}",
                   6, XKV_ERROR_CORRUPT, "[SF4]"); /* overlap */
    assert_refused("{\"key_cache.0\":{\"dtype\":\"F16\",\"shape\":[1,1,1],\"data_offsets\":[0,2]},"
                   "\"layer.0.key\":{\"dtype\":\"F16\",\"shape\":[1,1,1],\"data_offsets\":[2,4]}}",
                   4, XKV_ERROR_CORRUPT, "[SF5]"); /* one plane under two names */
    assert_refused(ONE("[1,1,300000]", "[0,600000]"), 0, XKV_ERROR_TRUNCATED, "[SF4]");
    assert_refused("{\"__metadata__\":{\"xkv.layout\":\"heads\"}," K_V "}", 72, XKV_ERROR_CORRUPT, "[SF6]");
    assert_refused("{\"__metadata__\":{\"xkv.positions\":\"[1,2]\"}," K_V "}", 72, XKV_ERROR_CORRUPT, "[SF7]");
    assert_refused("{\"__metadata__\":{\"xkv.positions_start\":\"2147483647\"}," K_V "}", 72, XKV_ERROR_CORRUPT,
                   "[SF7]");
    assert_refused("{\"__metadata__\":{\"xkv.token_ids\":\"[1e3]\"}," K_V "}", 72, XKV_ERROR_CORRUPT, "[SF7]");
    assert_refused("{\"__metadata__\":{\"xkv.ropes\":\"[{}]\"}," K_V "}", 72, XKV_ERROR_CORRUPT, "[SF7]");
}

static void test_truncation(void **state)
{
    (void)state;
    build("{" K_V "}", 72);
    for (size_t size = 9; size < file.size; size++) {
        xkv_cache *cache;
        assert_int_equal(open_size(size, NULL, &cache), XKV_ERROR_TRUNCATED);
    }
}

/* --- Writing ------------------------------------------------------------------------------------------------------ */

/* Write the cache `from` as a fresh file into `file`. */
static void write_file(const xkv_geometry *g, const xkv_view *from, uint32_t layout)
{
    xkv_framing *f;
    xkv_view views[8];
    assert_int_equal(xkv_framing_safetensors(ctx, g, layout, &f), XKV_OK);
    assert_int_equal(xkv_load64(f->literals) % 8, 0);
    uint8_t *image = literal_image(f);
    assert_int_equal(xkv_framing_views(ctx, f, g, image, views), XKV_OK);
    copy_rows(g, views, from, g->token_count);
    file.size = 0;
    put(&file, image, (size_t)f->source_size);
    free(image);
    xkv_framing_free(ctx, f);
}

/* Geometry and rows survive being written and read, in both orders of axes. */
static void test_written(void **state)
{
    (void)state;
    static const xkv_plane planes[] = {{0, XKV_PLANE_K, XKV_F16, 2, 4, 0},
                                       {0, XKV_PLANE_V, XKV_BF16, 2, 2, XKV_NO_ROPE},
                                       {2, XKV_PLANE_LATENT, XKV_F32, 1, 3, XKV_NO_ROPE},
                                       {2, XKV_PLANE_K_ROPE, XKV_F32, 1, 2, XKV_NO_ROPE}};
    static const xkv_rope rope = {2, 1, XKV_ROPE_INTERLEAVED, 1.1386294361119891, {0.1}};
    static const int32_t runs[][3] = {{7, 8, 9}, {7, 7, 9}}, ids[] = {1, 2, 3, 4};
    static uint8_t rows[4][64];
    xkv_view source[4];
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t e = (uint32_t)xkv_dtype_size(planes[i].dtype), dim = planes[i].head_dim;
        bytes *b = &file;
        b->size = 0;
        put_noise(b, sizeof rows[i], i);
        memcpy(rows[i], b->data, sizeof rows[i]);
        source[i] = (xkv_view){rows[i], planes[i].heads * dim * e, dim * e, e, NULL, .dtype = planes[i].dtype};
    }
    for (uint32_t i = 0; i < 4; i++) {
        xkv_geometry g = {3, 4, 1, 3, planes, &rope, runs[i / 2], ids, 4};
        write_file(&g, source, i % 2 ? XKV_LAYOUT_HEAD_MAJOR : XKV_LAYOUT_TOKEN_MAJOR);
        xkv_cache *cache = open_file(NULL);
        const xkv_geometry *r = xkv_cache_geometry(cache);
        assert_int_equal(r->layer_count, 3);
        assert_int_equal(r->plane_count, 4);
        assert_int_equal(r->token_count, 3);
        assert_memory_equal(r->planes, planes, sizeof planes);
        assert_memory_equal(r->positions, runs[i / 2], sizeof runs[0]);
        assert_int_equal(r->token_id_count, 4);
        assert_memory_equal(r->token_ids, ids, sizeof ids);
        assert_int_equal(r->rope_count, 1);
        assert_memory_equal(r->ropes, &rope, sizeof rope);
        assert_equal_rows(r, xkv_cache_views(cache), source, 3);
        xkv_cache_free(ctx, cache);
    }
    xkv_geometry g = {3, 4, 1, 3, planes, &rope, runs[0], ids, 4};
    xkv_framing *f;
    assert_int_equal(xkv_framing_safetensors(ctx, &g, XKV_LAYOUT_DIM_MAJOR, &f), XKV_ERROR_ARGUMENT);
}

/* --- Cutting ------------------------------------------------------------------------------------------------------ */

static void assert_cut(const char *header, size_t data_size, uint32_t kept)
{
    build(header, data_size);
    xkv_cache *cache = open_file(NULL), *cut_cache;
    const xkv_geometry *g = xkv_cache_geometry(cache);
    xkv_framing *cut;
    assert_int_equal(xkv_framing_first(ctx, xkv_cache_framing(cache), g, kept, &cut), XKV_OK);
    xkv_geometry less = *g;
    less.token_count = kept;
    xkv_view views[4];
    uint8_t *image = literal_image(cut);
    assert_int_equal(xkv_framing_views(ctx, cut, &less, image, views), XKV_OK);
    copy_rows(&less, views, xkv_cache_views(cache), kept);
    assert_int_equal(xkv_cache_from_memory(ctx, image, (size_t)cut->source_size, "cut", NULL, &cut_cache), XKV_OK);
    const xkv_geometry *r = xkv_cache_geometry(cut_cache);
    assert_int_equal(r->token_count, kept);
    assert_int_equal(r->plane_count, g->plane_count);
    assert_memory_equal(r->positions, g->positions, kept * sizeof *r->positions);
    assert_int_equal(r->token_id_count, g->token_id_count < kept ? g->token_id_count : kept);
    assert_equal_rows(r, xkv_cache_views(cut_cache), xkv_cache_views(cache), kept);
    xkv_cache_free(ctx, cut_cache);
    free(image);
    xkv_framing_free(ctx, cut);
    xkv_cache_free(ctx, cache);
}

static void test_cut(void **state)
{
    (void)state;
    for (uint32_t kept = 1; kept <= 2; kept++) {
        assert_cut("{" K_V "}", 72, kept);
        assert_cut("{\"__metadata__\":{\"xkv.layout\":\"tokens_heads_dim\",\"xkv.token_ids\":\"[3]\"}," K_V "}", 72,
                   kept);
        assert_cut("{\"__metadata__\":{\"xkv.positions\":\"[9,4,6]\",\"xkv.token_ids\":\"[1,2,3]\"}," K_V "}", 72,
                   kept);
        assert_cut("{\"layer.0.key\":{\"dtype\":\"F32\",\"shape\":[1,2,5,1],\"data_offsets\":[0,40]}}", 40, kept);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_heads_first, setup, teardown),
        cmocka_unit_test_setup_teardown(test_tokens_first, setup, teardown),
        cmocka_unit_test_setup_teardown(test_axes_found, setup, teardown),
        cmocka_unit_test_setup_teardown(test_names, setup, teardown),
        cmocka_unit_test_setup_teardown(test_metadata, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model_rope, setup, teardown),
        cmocka_unit_test_setup_teardown(test_empty_and_foreign, setup, teardown),
        cmocka_unit_test_setup_teardown(test_strict, setup, teardown),
        cmocka_unit_test_setup_teardown(test_truncation, setup, teardown),
        cmocka_unit_test_setup_teardown(test_written, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cut, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
