/* test_llama_state.c - llama.cpp state files: every form of the layout, damage, and what is not understood. */
#include "engine_support.h"

#include <dirent.h>
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

/* Open an exact copy, so that a sanitizer sees reads behind the end. */
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
    return cache;
}

static void assert_engine(const xkv_cache *cache, uint32_t engine)
{
    assert_string_equal(xkv_engine_name(xkv_cache_framing(cache)->engine), xkv_engine_name(engine));
}

/* The file opens as what it is, with all its planes, and comes back byte for byte. */
static void assert_opens(const sequence *s)
{
    xkv_cache *cache = open_file(NULL);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_engine(cache, engine_of(s));
    assert_int_equal(g->token_count, s->cells);
    assert_int_equal(g->layer_count, s->layers);
    assert_int_equal(g->plane_count, s->layers * (s->v_row ? 2 : 1));
    assert_int_equal(g->token_id_count, s->kind == BLOB ? 0 : s->ids);
    for (uint32_t i = 0; i < g->token_id_count; i++)
        assert_int_equal(g->token_ids[i], 100 + i);
    for (uint32_t i = 1; i < g->token_count; i++)
        assert_true(g->positions[i - 1] <= g->positions[i]);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    xkv_cache_free(ctx, cache);
}

static void assert_cannot_cut(const xkv_cache *cache, const char *reason)
{
    xkv_framing *cut;
    assert_int_equal(xkv_framing_first(ctx, xkv_cache_framing(cache), xkv_cache_geometry(cache), 1, &cut),
                     XKV_ERROR_UNSUPPORTED);
    assert_non_null(strstr(xkv_ctx_error(ctx), "only restore its whole prefix"));
    assert_non_null(strstr(xkv_ctx_error(ctx), reason));
}

/* Offsets counted by hand from the layout, not by code. */
static void test_offsets(void **state)
{
    (void)state;
    static const uint64_t sizes[] = {84, 24, 12, 24, 12, 12, 12, 12};
    static const uint32_t planes[] = {0, 0, 0, 2, 0, 1, 0, 3}; /* planes are in order of layer, then K before V */
    sequence s = plain_sequence();
    put_sequence(&file, &s);
    assert_int_equal(file.size, 192);
    xkv_cache *cache = open_file(NULL);
    const xkv_framing *f = xkv_cache_framing(cache);
    assert_int_equal(f->segment_count, 8);
    for (uint32_t i = 0; i < 8; i++) {
        assert_int_equal(f->segments[i].size, sizes[i]);
        assert_int_equal(f->segments[i].plane_count, i % 2);
        assert_int_equal(f->segments[i].first_plane, planes[i]);
        assert_int_equal(f->segments[i].layout, XKV_LAYOUT_TOKEN_MAJOR);
    }
    assert_null(f->rows);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    const xkv_plane *v1 = &g->planes[3];
    assert_int_equal(v1->layer, 1);
    assert_int_equal(v1->kind, XKV_PLANE_V);
    assert_int_equal(v1->heads * v1->head_dim, 2);
    uint64_t size;
    const uint8_t *data = xkv_cache_data(cache, &size);
    assert_ptr_equal(view_element(&xkv_cache_views(cache)[3], 2, 0, 1), data + 180 + 2 * 4 + 2);
    assert_ptr_equal(view_element(&xkv_cache_views(cache)[2], 1, 0, 3), data + 120 + 8 + 6);
    assert_int_equal(xkv_geometry_raw_bytes(g), 24 + 24 + 12 + 12);
    xkv_cache_free(ctx, cache);
}

static void test_forms(void **state)
{
    (void)state;
    static const uint32_t versions[] = {2, 2, 3, 4};
    static const int streams[] = {0, 1, 1, 1};
    for (size_t form = 0; form < 4; form++)
        for (uint32_t cells = 1; cells <= 9; cells += 4)
            for (uint32_t extended = 0; extended < 2; extended++)
                for (uint32_t v_trans = 0; v_trans < 2; v_trans++) {
                    sequence s = plain_sequence();
                    s.version = versions[form];
                    s.streams = streams[form];
                    s.cells = cells;
                    s.extension = extended ? (s.version == 2 ? 8 : 12) : 0;
                    s.v_trans = v_trans;
                    put_sequence(&file, &s);
                    assert_opens(&s);
                }
}

static void test_streams(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    s.streams = 4;
    for (s.used = 0; s.used < 4; s.used++)
        for (s.v_row = 0; s.v_row <= 4; s.v_row += 4) {
            put_sequence(&file, &s);
            assert_opens(&s);
            put_checkpoints(&file);
            assert_opens(&s);
        }
}

static void test_types(void **state)
{
    (void)state;
    static const uint32_t types[] = {TYPE_F32, TYPE_F16, TYPE_BF16}, dtypes[] = {XKV_F32, XKV_F16, XKV_BF16};
    for (size_t i = 0; i < 3; i++) {
        sequence s = plain_sequence();
        s.k_type = s.v_type = types[i];
        put_sequence(&file, &s);
        assert_opens(&s);
        xkv_cache *cache = open_file(NULL);
        assert_int_equal(xkv_cache_geometry(cache)->planes[0].dtype, dtypes[i]);
        assert_int_equal(xkv_cache_geometry(cache)->planes[0].head_dim, types[i] == TYPE_F32 ? 2 : 4);
        xkv_cache_free(ctx, cache);
    }
}

/* Transposed V: dimension after dimension, each with all rows; V0 begins at 156 as in the plain file. */
static void test_transposed(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    s.v_trans = 1;
    put_sequence(&file, &s);
    xkv_cache *cache = open_file(NULL);
    uint64_t size;
    const uint8_t *data = xkv_cache_data(cache, &size);
    const xkv_view *v0 = &xkv_cache_views(cache)[1];
    assert_ptr_equal(view_element(v0, 0, 0, 0), data + 156);
    assert_ptr_equal(view_element(v0, 1, 0, 0), data + 156 + 2);
    assert_ptr_equal(view_element(v0, 1, 0, 1), data + 156 + 3 * 2 + 2);
    xkv_cache_free(ctx, cache);
}

static void test_cells_out_of_order(void **state)
{
    (void)state;
    static const int32_t at[] = {7, 3, 9, 3, 4};
    static const int32_t sorted[] = {3, 3, 4, 7, 9};
    static const uint32_t rows[] = {1, 3, 4, 0, 2}; /* the two cells at 3 keep their order */
    sequence s = plain_sequence();
    s.cells = 5;
    s.at = at;
    put_sequence(&file, &s);
    assert_opens(&s);
    xkv_cache *cache = open_file(NULL);
    assert_memory_equal(xkv_cache_geometry(cache)->positions, sorted, sizeof sorted);
    assert_memory_equal(xkv_cache_framing(cache)->rows, rows, sizeof rows);
    uint64_t size;
    const uint8_t *data = xkv_cache_data(cache, &size);
    const uint64_t k0 = 28 + 5 * 12 + 8 + 12;
    assert_ptr_equal(view_element(xkv_cache_views(cache), 2, 0, 0), data + k0 + 4 * 8);
    xkv_cache_free(ctx, cache);
}

static void test_checkpoints(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    put_sequence(&file, &s);
    size_t end = file.size;
    put_checkpoints(&file);
    assert_opens(&s);
    for (size_t size = end + 1; size < file.size; size++) {
        xkv_cache *cache;
        assert_int_equal(open_size(size, NULL, &cache), XKV_ERROR_TRUNCATED);
    }
    s.v_row = 0; /* MLA: the tail follows K */
    put_sequence(&file, &s);
    put_checkpoints(&file);
    assert_opens(&s);
}

static void test_served_token_field(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    s.served = 1;
    for (s.ids = 0; s.ids < 4; s.ids++) {
        put_sequence(&file, &s);
        assert_opens(&s);
    }
}

/* Another version, media, a count that does not end the field, and fields too short to have one. */
static void test_token_field_not_understood(void **state)
{
    (void)state;
    static const struct {
        uint32_t ids, offset, value;
    } cases[] = {{2, 16, 2}, {2, 20, 1}, {2, 20, 3}, {2, 20, UINT32_MAX - 3}, {2, 32, 1}, {0, 20, 1}, {0, 8, 4 - 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sequence s = plain_sequence();
        s.served = cases[i].offset != 8;
        s.ids = s.served ? cases[i].ids : cases[i].value;
        put_sequence(&file, &s);
        xkv_store32(file.data + 12, UINT32_MAX);
        if (s.served)
            xkv_store32(file.data + cases[i].offset, cases[i].value);
        xkv_cache *cache = open_file(NULL);
        assert_engine(cache, XKV_ENGINE_LLAMA_SEQUENCE);
        assert_int_equal(xkv_cache_geometry(cache)->token_id_count, 0);
        assert_int_equal(xkv_cache_geometry(cache)->plane_count, 4);
        assert_framing_is_file(ctx, cache, file.data, file.size);
        assert_cannot_cut(cache, "its token field");
        xkv_cache_free(ctx, cache);
    }
}

/* --- Sessions and blobs ------------------------------------------------------------------------------------------- */

/* A session has no tail, an architecture and, of older engines, outputs. */
static const sequence sessions[] = {
    {.version = 2, .streams = 0, .output_section = 1, .outputs = 2}, /* mid-2025 */
    {.version = 2, .streams = 1, .output_section = 1, .outputs = 1},
    {.version = 2, .streams = 1, .output_section = 1}, /* none computed */
    {.version = 2, .streams = 1},                      /* February 2026 */
    {.version = 2, .streams = 1, .extension = 8},
    {.version = 3, .streams = 3},
    {.version = 3, .streams = 1, .extension = 12},
    {.version = 4, .streams = 1},
    {.version = 4, .streams = 1, .extension = 12},
};

static sequence session(size_t i)
{
    sequence s = plain_sequence();
    s.kind = SESSION_FILE;
    s.architecture = "llama";
    s.version = sessions[i].version;
    s.streams = sessions[i].streams;
    s.output_section = sessions[i].output_section;
    s.outputs = sessions[i].outputs;
    s.extension = sessions[i].extension;
    return s;
}

static void test_sessions(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof sessions / sizeof *sessions; i++)
        for (uint32_t v_trans = 0; v_trans < 2; v_trans++) {
            sequence s = session(i);
            s.v_trans = v_trans;
            s.cells = 1 + 4 * (uint32_t)(i % 3);
            put_sequence(&file, &s);
            assert_opens(&s);
            s.v_row = 0;
            put_sequence(&file, &s);
            assert_opens(&s);
        }
}

/* Counted by hand: 12 and two ids, 4 + 5 of the architecture, 4 + 4 + 8 + 28 + 8 + 12 of one output, then the memory,
 * whose first K begins at 84 - 20 and whose layers are those of the plain file. */
static void test_session_offsets(void **state)
{
    (void)state;
    sequence s = session(1);
    put_sequence(&file, &s);
    xkv_cache *cache = open_file(NULL);
    const xkv_framing *f = xkv_cache_framing(cache);
    assert_int_equal(file.size, 192 + 9 + 64);
    assert_int_equal(f->segments[0].size, 84 + 9 + 64);
    assert_int_equal(f->segment_count, 8);
    xkv_cache_free(ctx, cache);
}

static void test_session_truncation(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof sessions / sizeof *sessions; i++) {
        sequence s = session(i);
        put_sequence(&file, &s);
        size_t behind_k = file.size - 2 * (12 + 12) - (s.streams > 1 ? 4 * ((size_t)s.streams - 1) : 0);
        for (size_t size = 4; size < file.size; size++) {
            xkv_cache *cache = NULL;
            xkv_status status = open_size(size, NULL, &cache);
            if (size == behind_k && s.streams <= 1) {
                assert_int_equal(status, XKV_OK);
                xkv_cache_free(ctx, cache);
            } else if (status != XKV_ERROR_TRUNCATED) {
                fail_msg("session %zu, %zu of %zu bytes: %d", i, size, file.size, status);
            }
        }
    }
}

static void test_session_architecture(void **state)
{
    (void)state;
    static xkv_model_layer layers[] = {{.kv_heads = 1, .head_dim_k = 4, .head_dim_v = 2, .rope = XKV_NO_ROPE},
                                       {.kv_heads = 1, .head_dim_k = 4, .head_dim_v = 2, .rope = XKV_NO_ROPE}};
    static const struct {
        const char *model;
        xkv_status status;
    } cases[] = {{"llama", XKV_OK},
                 {"", XKV_OK},
                 {"llam", XKV_ERROR_MISMATCH},
                 {"llama4", XKV_ERROR_MISMATCH},
                 {"qwen2", XKV_ERROR_MISMATCH}};
    sequence s = session(7);
    put_sequence(&file, &s);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        xkv_model model = {.layer_count = 2, .layers = layers};
        xkv_cache *cache;
        strcpy(model.architecture, cases[i].model);
        assert_int_equal(open_size(file.size, &model, &cache), cases[i].status);
        if (cases[i].status == XKV_OK)
            xkv_cache_free(ctx, cache);
        else
            assert_non_null(strstr(xkv_ctx_error(ctx), "[LS12]"));
    }
}

/* Blobs tell neither version nor tokens. */
static void test_blobs(void **state)
{
    (void)state;
    for (size_t i = 3; i < sizeof sessions / sizeof *sessions; i++) {
        sequence s = session(i);
        s.kind = BLOB;
        put_sequence(&file, &s);
        assert_opens(&s);
        for (size_t size = 4; size + 2 * (12 + 12) < file.size - 8; size++) {
            xkv_cache *cache;
            assert_int_equal(open_size(size, NULL, &cache), XKV_ERROR_TRUNCATED);
        }
    }
}

/* --- MLA ---------------------------------------------------------------------------------------------------------- */

/* Two layers whose K row of 4 elements is a latent of 3 and a rotated part of 1. */
static xkv_model latent_model(void)
{
    static xkv_model_layer layers[] = {{1, 4, 3, XKV_NO_ROPE, 0}, {1, 4, 3, XKV_NO_ROPE, 0}};
    return (xkv_model){.layer_count = 2, .layers = layers, .latent_dim = 3, .latent_first = 1};
}

static void assert_latent_planes(const xkv_model *model, bool latent_first, bool has_v)
{
    xkv_cache *cache = open_file(model);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    uint32_t n = has_v ? 3 : 2, latent = has_v ? 1 : 0;
    assert_int_equal(g->plane_count, 2 * n);
    assert_int_equal(g->planes[n + latent].kind, XKV_PLANE_LATENT);
    assert_int_equal(g->planes[n + latent].head_dim, 3);
    assert_int_equal(g->planes[n + latent + 1].kind, XKV_PLANE_K_ROPE);
    assert_int_equal(g->planes[n + latent + 1].head_dim, 1);
    assert_int_equal(g->planes[n + latent + 1].layer, 1);
    uint64_t size;
    const uint8_t *k1 = xkv_cache_data(cache, &size) + 120;
    const xkv_view *views = xkv_cache_views(cache);
    assert_ptr_equal(view_element(&views[n + latent], 2, 0, 0), k1 + 2 * 8 + (latent_first ? 0 : 2));
    assert_ptr_equal(view_element(&views[n + latent + 1], 2, 0, 0), k1 + 2 * 8 + (latent_first ? 6 : 0));
    assert_framing_is_file(ctx, cache, file.data, file.size);
    xkv_cache_free(ctx, cache);
}

static void test_latent(void **state)
{
    (void)state;
    xkv_model model = latent_model();
    sequence s = plain_sequence();
    s.v_row = 0;
    put_sequence(&file, &s);
    assert_opens(&s); /* without a model: rows of K */
    assert_latent_planes(&model, true, false);
    model.latent_first = 0;
    assert_latent_planes(&model, false, false);
    model.latent_first = 1; /* engines that also cached V had the rotated part first */
    s.v_row = 6;
    put_sequence(&file, &s);
    assert_latent_planes(&model, false, true);
}

/* --- What is understood in part ----------------------------------------------------------------------------------- */

/* K in a type that planes do not have, V in one that is known: V is packed, K carried. */
static void test_unknown_type(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    s.k_type = TYPE_IQ4_NL;
    s.k_row = 18;
    put_sequence(&file, &s);
    xkv_cache *cache = open_file(NULL);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_engine(cache, XKV_ENGINE_LLAMA_SEQUENCE);
    assert_int_equal(g->plane_count, 2);
    assert_int_equal(g->planes[0].kind, XKV_PLANE_V);
    assert_int_equal(g->token_count, 3);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    xkv_framing *cut;
    assert_int_equal(xkv_framing_first(ctx, xkv_cache_framing(cache), g, 1, &cut), XKV_ERROR_UNSUPPORTED);
    xkv_cache_free(ctx, cache);
    s = plain_sequence(); /* no engine transposes blocks */
    s.v_type = TYPE_Q8_0;
    s.v_row = 34;
    s.v_trans = 1;
    put_sequence(&file, &s);
    cache = open_file(NULL);
    assert_int_equal(xkv_cache_geometry(cache)->plane_count, 2);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    xkv_cache_free(ctx, cache);
}

/* K0 begins at 84 as in the plain file, V0 behind two K of 4 cells. */
static void test_quantized_rows(void **state)
{
    (void)state;
    static const int32_t at[] = {5, 2, 9, 4};
    sequence s = plain_sequence();
    s.cells = 4;
    s.at = at;
    s.k_type = TYPE_Q8_0;
    s.k_row = 2 * 34;
    s.v_type = TYPE_Q4_0;
    s.v_row = 3 * 18;
    put_sequence(&file, &s);
    assert_opens(&s);
    xkv_cache *cache = open_file(NULL);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    uint64_t size;
    const uint8_t *k0 = xkv_cache_data(cache, &size) + 84 + 12, *v0 = k0 + 2 * 4 * 68 + 12 + 12;
    assert_int_equal(g->planes[0].dtype, XKV_Q8_0);
    assert_int_equal(g->planes[0].heads * g->planes[0].head_dim, 64);
    assert_int_equal(g->planes[1].dtype, XKV_Q4_0);
    assert_int_equal(g->planes[1].heads * g->planes[1].head_dim, 96);
    assert_int_equal(xkv_geometry_raw_bytes(g), 2 * 4 * (68 + 54));
    assert_ptr_equal(row_element(&xkv_cache_views(cache)[0], &g->planes[0], 0, 32), k0 + 1 * 68 + 34);
    assert_ptr_equal(row_element(&xkv_cache_views(cache)[1], &g->planes[1], 3, 64), v0 + 2 * 54 + 36);

    bytes whole = file; /* cut to two tokens: cells 1 and 3, as the engine would have saved them */
    xkv_framing *cut;
    xkv_geometry first = *g;
    xkv_view views[4];
    assert_int_equal(xkv_framing_first(ctx, xkv_cache_framing(cache), g, 2, &cut), XKV_OK);
    uint8_t *image = literal_image(cut);
    first.token_count = 2;
    assert_int_equal(xkv_framing_views(ctx, cut, &first, image, views), XKV_OK);
    copy_rows(g, views, xkv_cache_views(cache), 2);
    assert_int_equal(cut->source_size, whole.size - 2 * (12 + 2 * (68 + 54)));
    assert_memory_equal(views[0].data, k0 + 68, 68);
    assert_memory_equal((uint8_t *)views[0].data + 68, k0 + 3 * 68, 68);
    xkv_cache *again;
    assert_int_equal(xkv_cache_from_memory(ctx, image, cut->source_size, "cut", NULL, &again), XKV_OK);
    assert_int_equal(xkv_cache_geometry(again)->positions[1], 4);
    assert_equal_rows(xkv_cache_geometry(again), xkv_cache_views(again), views, 2);
    xkv_cache_free(ctx, again);
    free(image);
    xkv_framing_free(ctx, cut);
    xkv_cache_free(ctx, cache);
}

/* RoPE is undone where the engine cannot have turned rows by a Hadamard matrix behind it. */
static void test_quantized_rope(void **state)
{
    (void)state;
    static const struct {
        uint32_t version, head_dim, rot_k, rope;
    } cases[] = {{3, 64, 0, XKV_NO_ROPE},  {3, 32, 0, 0},           {3, 96, 0, 0}, {4, 64, 0, 0},
                 {4, 64, 64, XKV_NO_ROPE}, {2, 128, 0, XKV_NO_ROPE}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        xkv_rope rope = {.n_rot = 2, .scale = 1};
        xkv_model_layer layers[] = {{2, cases[i].head_dim, 2, 0, 0}, {2, cases[i].head_dim, 2, 0, 0}};
        xkv_model model = {.layer_count = 2, .layers = layers, .rope_count = 1, .ropes = &rope};
        sequence s = plain_sequence();
        s.version = cases[i].version;
        s.rot_k = cases[i].rot_k;
        s.k_type = TYPE_Q8_0;
        s.k_row = 2 * cases[i].head_dim / 32 * 34;
        s.v_row = 8;
        put_sequence(&file, &s);
        xkv_cache *cache = open_file(&model);
        assert_int_equal(xkv_cache_geometry(cache)->planes[0].head_dim, cases[i].head_dim);
        assert_int_equal(xkv_cache_geometry(cache)->planes[0].rope, cases[i].rope);
        xkv_cache_free(ctx, cache);
    }
}

/* MLA rows in blocks: two planes unless a block holds some of both. */
static void test_quantized_latent(void **state)
{
    (void)state;
    xkv_model_layer layers[] = {{1, 96, 64, XKV_NO_ROPE, 0}, {1, 96, 64, XKV_NO_ROPE, 0}};
    xkv_model model = {.layer_count = 2, .layers = layers, .latent_dim = 64, .latent_first = 1};
    sequence s = plain_sequence();
    s.k_type = TYPE_Q8_0;
    s.k_row = 3 * 34;
    s.v_row = 0;
    put_sequence(&file, &s);
    xkv_cache *cache = open_file(&model);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    const xkv_view *views = xkv_cache_views(cache);
    assert_int_equal(g->plane_count, 4);
    assert_int_equal(g->planes[1].kind, XKV_PLANE_K_ROPE);
    assert_ptr_equal(row_element(&views[1], &g->planes[1], 1, 0), (uint8_t *)views[0].data + 102 + 68);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    xkv_cache_free(ctx, cache);
    model.latent_dim = 48;
    cache = open_file(&model);
    assert_int_equal(xkv_cache_geometry(cache)->plane_count, 2);
    assert_int_equal(xkv_cache_geometry(cache)->planes[0].kind, XKV_PLANE_K);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    xkv_cache_free(ctx, cache);
}

/* --- Two caches: layers without and with a window ----------------------------------------------------------------- */

/* Three layers with K of 8 elements behind the plain file's two. */
static sequence window_cache(void)
{
    sequence s = plain_sequence();
    s.layers = 3;
    s.k_row = 16;
    return s;
}

/* Prompts no longer than the window: both caches hold the same cells, and all layers are planes. */
static void test_two_caches(void **state)
{
    (void)state;
    static const uint32_t versions[] = {2, 2, 3, 4};
    static const int streams[] = {0, 1, 3, 1};
    for (size_t form = 0; form < 4; form++)
        for (int variant = 0; variant < 8; variant++) {
            sequence s = plain_sequence(), second = window_cache();
            s.kind = variant & 4 ? SESSION_FILE : SEQUENCE_FILE;
            s.architecture = "gemma3";
            s.output_section = streams[form] == 0;
            s.version = second.version = versions[form];
            s.streams = second.streams = streams[form];
            s.v_row = variant & 1 ? 0 : 4;
            second.v_row = s.v_row;
            s.v_trans = second.v_trans = variant & 2 ? 1 : 0;
            if (s.v_row == 0 && s.streams == 0)
                continue; /* nothing tells whether the old form has V */
            s.second = &second;
            put_sequence(&file, &s);
            sequence both = s;
            both.layers = 5;
            assert_opens(&both);
        }
}

/* K of the second cache begins where the plain file ends, 192, behind n_stream, cell_count, three cells, v_trans and
 * n_layer. */
static void test_layers_of_two_caches(void **state)
{
    (void)state;
    enum { FULL = 0, LOCAL = 1, K2 = 192 + 8 + 36 + 8 };
    xkv_rope ropes[2] = {{.n_rot = 4, .scale = 1}, {.n_rot = 2, .scale = 1}};
    xkv_model_layer layers[] = {{2, 4, 2, LOCAL, 9}, {1, 4, 2, FULL, 0},  {0, 0, 0, XKV_NO_ROPE, 0},
                                {2, 4, 2, LOCAL, 9}, {2, 4, 2, LOCAL, 9}, {1, 4, 2, FULL, 0}};
    static const uint32_t widths[] = {8, 4, 8, 8, 4}, numbers[] = {0, 1, 3, 4, 5};
    static const uint64_t k_offsets[] = {K2, 84 - 12, K2 + 60, K2 + 120, 120 - 12};
    xkv_model model = {.layer_count = 6, .layers = layers, .rope_count = 2, .ropes = ropes};
    sequence s = plain_sequence(), second = window_cache();
    second.v_row = 8; /* two heads of 2 */
    s.second = &second;
    put_sequence(&file, &s);
    xkv_cache *cache = open_file(&model);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    uint64_t size;
    const uint8_t *data = xkv_cache_data(cache, &size);
    assert_int_equal(g->layer_count, 6);
    assert_int_equal(g->plane_count, 10);
    assert_int_equal(g->rope_count, 2);
    for (uint32_t i = 0; i < 5; i++) {
        const xkv_plane *k = &g->planes[2 * i];
        assert_int_equal(k->layer, numbers[i]);
        assert_int_equal(k->kind, XKV_PLANE_K);
        assert_int_equal(k->heads * k->head_dim, widths[i]);
        assert_int_equal(k->rope, widths[i] == 8 ? LOCAL : FULL);
        assert_ptr_equal(view_element(&xkv_cache_views(cache)[2 * i], 1, 0, 0),
                         data + k_offsets[i] + 12 + 2 * widths[i]);
    }
    assert_framing_is_file(ctx, cache, file.data, file.size);
    xkv_cache_free(ctx, cache);
    layers[1].window = 9; /* other layers than the file's */
    cache = open_file(&model);
    assert_int_equal(xkv_cache_geometry(cache)->layer_count, 5);
    assert_int_equal(xkv_cache_geometry(cache)->rope_count, 0);
    xkv_cache_free(ctx, cache);
    s.second = NULL; /* the cache of the layers with a window is lacking */
    put_sequence(&file, &s);
    assert_int_equal(open_size(file.size, &model, &cache), XKV_ERROR_MISMATCH);
}

/* Longer prompts: the second cache has the last cells only. It is carried, and the whole cannot be cut. */
static void test_window_with_other_cells(void **state)
{
    (void)state;
    static const int32_t last[] = {1, 2}, shuffled[] = {1, 0, 2};
    for (int shuffle = 0; shuffle < 2; shuffle++) {
        sequence s = plain_sequence(), second = window_cache();
        second.cells = shuffle ? 3 : 2;
        second.at = shuffle ? shuffled : last;
        s.second = &second;
        put_sequence(&file, &s);
        xkv_cache *cache = open_file(NULL);
        const xkv_framing *f = xkv_cache_framing(cache);
        assert_engine(cache, XKV_ENGINE_LLAMA_SEQUENCE);
        assert_int_equal(xkv_cache_geometry(cache)->plane_count, 4);
        assert_int_equal(f->segment_count, 9);
        assert_int_equal(f->segments[8].size, file.size - 192);
        assert_framing_is_file(ctx, cache, file.data, file.size);
        assert_cannot_cut(cache, "a window");
        xkv_cache_free(ctx, cache);
    }
}

/* With a model, the first cache gets its layers' numbers and rotation also where the second is carried. */
static void test_window_with_other_cells_and_model(void **state)
{
    (void)state;
    xkv_rope ropes[2] = {{.n_rot = 4, .scale = 1}, {.n_rot = 2, .scale = 1}};
    xkv_model_layer layers[] = {{2, 4, 1, 1, 2}, {1, 4, 2, 0, 0}, {2, 4, 1, 1, 2}, {2, 4, 1, 1, 2}, {1, 4, 2, 0, 0}};
    xkv_model model = {.layer_count = 5, .layers = layers, .rope_count = 2, .ropes = ropes};
    static const int32_t last[] = {1, 2};
    sequence s = plain_sequence(), second = window_cache();
    second.cells = 2;
    second.at = last;
    s.second = &second;
    put_sequence(&file, &s);
    xkv_cache *cache = open_file(&model);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_int_equal(g->layer_count, 5);
    assert_int_equal(g->plane_count, 4);
    assert_int_equal(g->planes[0].layer, 1);
    assert_int_equal(g->planes[2].layer, 4);
    assert_int_equal(g->planes[2].rope, 0);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    assert_cannot_cut(cache, "a window");
    xkv_cache_free(ctx, cache);
}

/* A second memory beside all layers of the model, as of an index for sparse attention, is not one of these layers. */
static void test_second_memory_of_no_layer(void **state)
{
    (void)state;
    xkv_model_layer layers[] = {{1, 4, 2, XKV_NO_ROPE, 0}, {1, 4, 2, XKV_NO_ROPE, 0}};
    xkv_model model = {.layer_count = 2, .layers = layers};
    sequence s = plain_sequence(), second = plain_sequence();
    s.v_row = second.v_row = 0;
    second.k_row = 6;
    s.second = &second;
    put_sequence(&file, &s);
    xkv_cache *cache = open_file(&model);
    assert_int_equal(xkv_cache_geometry(cache)->plane_count, 2);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    assert_cannot_cut(cache, "a window");
    xkv_cache_free(ctx, cache);
}

/* What is behind two memories is not understood; the two are. */
static void test_third_memory(void **state)
{
    (void)state;
    sequence s = plain_sequence(), second = window_cache();
    s.second = &second;
    put_sequence(&file, &s);
    put_memory(&file, &s);
    xkv_cache *cache = open_file(NULL);
    assert_int_equal(xkv_cache_geometry(cache)->plane_count, 10);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    assert_cannot_cut(cache, "not understood");
    xkv_cache_free(ctx, cache);
}

/* A second cache that ends too early or contradicts itself is damaged, once its cells make sense: they end at 192 + 8 +
 * 36, and n_layer 8 bytes later. */
static void test_damaged_second_memory(void **state)
{
    (void)state;
    sequence s = plain_sequence(), second = window_cache();
    s.second = &second;
    put_sequence(&file, &s);
    size_t behind_k = file.size - 3 * (12 + 12);
    for (size_t size = 192 + 8 + 36 + 8; size < file.size; size++) {
        xkv_cache *cache = NULL;
        xkv_status status = open_size(size, NULL, &cache);
        assert_int_equal(status, size == behind_k ? XKV_OK : XKV_ERROR_TRUNCATED);
        xkv_cache_free(ctx, cache);
    }
    xkv_cache *cache;
    xkv_store32(file.data + 192 + 8 + 36 + 8, 99); /* type of its first K */
    assert_int_equal(open_size(file.size, NULL, &cache), XKV_ERROR_CORRUPT);
    assert_non_null(strstr(xkv_ctx_error(ctx), "[LS7]"));
}

/* --- What is not understood --------------------------------------------------------------------------------------- */

static void assert_opaque(void)
{
    xkv_cache *cache = open_file(NULL);
    const xkv_framing *f = xkv_cache_framing(cache);
    assert_engine(cache, XKV_ENGINE_OPAQUE);
    assert_int_equal(f->segment_count, 1);
    assert_int_equal(xkv_cache_geometry(cache)->plane_count, 0);
    assert_memory_equal(f->literals, file.data, file.size);
    xkv_cache_free(ctx, cache);
}

static void test_not_understood(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    s.version = 5;
    put_sequence(&file, &s);
    assert_opaque();
    s = session(5); /* sessions of several sequences: a cell of two, cells of one each */
    s.version = 5;
    put_sequence(&file, &s);
    assert_opaque();
    s = session(7);
    put_sequence(&file, &s);
    xkv_store32(file.data + 28 + 9 + 4, 2);
    assert_opaque();
    put_sequence(&file, &s);
    xkv_store32(file.data + 28 + 9 + 12 + 8, 6);
    assert_opaque();
    put_sequence(&file, &s); /* an architecture of 4,000 bytes */
    xkv_store32(file.data + 20, 4000);
    file.size += 4000;
    assert_opaque();
    file.size = 0;
    put_noise(&file, 500, 1);
    assert_opaque();
    file.size = 0; /* a recurrent state: one cell without sequence, R and S tensors */
    put32(&file, 0x67677371);
    put32(&file, 3);
    put32(&file, 0);
    put32(&file, 1);
    put32(&file, 99);
    put32(&file, 0);
    put32(&file, 0);
    put32(&file, 1);
    put32(&file, 0);
    put64(&file, 64);
    put_noise(&file, 4000, 3);
    assert_opaque();
    s = plain_sequence(); /* cells of several sequences */
    put_sequence(&file, &s);
    xkv_store32(file.data + 28 + 12 + 4, 2);
    assert_opaque();
    put_sequence(&file, &s); /* cells run into the tensors */
    xkv_store32(file.data + 24, 0x7fffffff);
    assert_opaque();
}

/* --- Empty and damaged files -------------------------------------------------------------------------------------- */

static void test_no_cells(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    s.cells = 0;
    for (s.streams = 0; s.streams < 3; s.streams++)
        for (s.version = 2; s.version <= 4; s.version++) {
            if (s.streams == 0 && s.version > 2)
                continue;
            put_sequence(&file, &s);
            xkv_cache *cache = open_file(NULL);
            assert_engine(cache, XKV_ENGINE_LLAMA_SEQUENCE);
            assert_int_equal(xkv_cache_geometry(cache)->token_count, 0);
            assert_int_equal(xkv_cache_geometry(cache)->plane_count, 0);
            assert_framing_is_file(ctx, cache, file.data, file.size);
            xkv_cache_free(ctx, cache);
        }
    xkv_cache *cache;
    assert_int_equal(open_size(0, NULL, &cache), XKV_ERROR_TRUNCATED);
}

/* Every shorter file is refused, but for one that ends behind K: nothing tells it from a file without V. */
static void test_truncation(void **state)
{
    (void)state;
    static const uint32_t versions[] = {2, 2, 3, 4};
    static const int streams[] = {0, 1, 1, 1};
    for (size_t form = 0; form < 4; form++)
        for (uint32_t v_trans = 0; v_trans < 2; v_trans++) {
            sequence s = plain_sequence();
            s.version = versions[form];
            s.streams = streams[form];
            s.v_trans = v_trans;
            put_sequence(&file, &s);
            size_t behind_k = file.size - 2 * (12 + 12);
            for (size_t size = 4; size < file.size; size++) {
                xkv_cache *cache = NULL;
                xkv_status status = open_size(size, NULL, &cache);
                if (size == behind_k) {
                    assert_int_equal(status, XKV_OK);
                    xkv_cache_free(ctx, cache);
                    continue;
                }
                assert_int_equal(status, XKV_ERROR_TRUNCATED);
                assert_non_null(strstr(xkv_ctx_error(ctx), "offset"));
            }
        }
}

static void assert_refused(size_t offset, uint32_t value, xkv_status expected)
{
    uint8_t saved[4];
    xkv_cache *cache;
    memcpy(saved, file.data + offset, 4);
    xkv_store32(file.data + offset, value);
    xkv_status status = open_size(file.size, NULL, &cache);
    if (status != expected)
        print_message("offset %zu: %s\n", offset, xkv_ctx_error(ctx));
    assert_int_equal(status, expected);
    memcpy(file.data + offset, saved, 4);
}

static void test_contradictions(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    put_sequence(&file, &s);
    assert_refused(76, 0, XKV_ERROR_CORRUPT);            /* K width 0 */
    assert_refused(76, 7, XKV_ERROR_CORRUPT);            /* half an element */
    assert_refused(72, 99, XKV_ERROR_CORRUPT);           /* no such type */
    assert_refused(108, 4000000000u, XKV_ERROR_CORRUPT); /* type of the second layer */
    assert_refused(148, 0, XKV_ERROR_CORRUPT);           /* V width 0 */
    assert_refused(80, 1, XKV_ERROR_CORRUPT);            /* rows of 2^32 bytes: above the width limit */
    assert_refused(8, UINT32_MAX, XKV_ERROR_TRUNCATED);  /* n_token_count */
    assert_refused(68, 4096, XKV_ERROR_TRUNCATED);       /* n_layer */
    s.k_type = TYPE_Q8_0;
    s.k_row = 34;
    put_sequence(&file, &s);
    assert_refused(76, 35, XKV_ERROR_CORRUPT);        /* no whole block */
    assert_refused(76, 8193 * 34, XKV_ERROR_CORRUPT); /* one block more than a row may have */
    s.k_type = TYPE_IQ4_NL;
    put_sequence(&file, &s);
    assert_refused(80, 0x7fffffff, XKV_ERROR_CORRUPT); /* size overflows */
    s = plain_sequence();
    s.v_trans = 1;
    put_sequence(&file, &s);
    assert_refused(148, 4, XKV_ERROR_CORRUPT); /* v_size_el of f16 */
    assert_refused(152, 0, XKV_ERROR_CORRUPT); /* n_embd_v_gqa */
}

/* --- Models ------------------------------------------------------------------------------------------------------- */

static void test_model(void **state)
{
    (void)state;
    sequence s = plain_sequence();
    put_sequence(&file, &s);
    xkv_rope_options o = xkv_rope_options_default();
    o.base = 10000;
    o.dims = 2;
    o.style = XKV_ROPE_HALF_SPLIT;
    o.head_dim = 2;
    xkv_model *model;
    xkv_cache *cache;
    assert_int_equal(xkv_model_from_options(ctx, 2, &o, &model), XKV_OK);
    cache = open_file(model);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_int_equal(g->planes[0].heads, 2);
    assert_int_equal(g->planes[0].head_dim, 2);
    assert_int_equal(g->planes[0].rope, 0);
    assert_int_equal(g->planes[1].heads, 1);
    assert_int_equal(g->planes[1].rope, XKV_NO_ROPE);
    assert_int_equal(g->rope_count, 1);
    assert_framing_is_file(ctx, cache, file.data, file.size);
    xkv_cache_free(ctx, cache);
    model->layers[1].head_dim_k = 3;
    assert_int_equal(open_size(file.size, model, &cache), XKV_ERROR_MISMATCH);
    model->layers[1].head_dim_k = 0; /* a layer without cache: the file has one too many */
    assert_int_equal(open_size(file.size, model, &cache), XKV_ERROR_MISMATCH);
    assert_non_null(strstr(xkv_ctx_error(ctx), "2 layers, the model caches 1"));
    xkv_model_free(ctx, model);
}

/* Layers keep the numbers of the model when some have no cache. */
static void test_layers_without_cache(void **state)
{
    (void)state;
    xkv_model_layer layers[] = {
        {0, 0, 0, XKV_NO_ROPE, 0}, {1, 4, 2, XKV_NO_ROPE, 0}, {0, 0, 0, XKV_NO_ROPE, 0}, {2, 2, 1, XKV_NO_ROPE, 0}};
    xkv_model model = {.layer_count = 4, .layers = layers};
    sequence s = plain_sequence();
    put_sequence(&file, &s);
    xkv_cache *cache = open_file(&model);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_int_equal(g->layer_count, 4);
    assert_int_equal(g->planes[0].layer, 1);
    assert_int_equal(g->planes[2].layer, 3);
    assert_int_equal(g->planes[2].heads, 2);
    xkv_cache_free(ctx, cache);
}

/* Rows rotated by a Hadamard matrix, and tokens with several positions that differ, cannot be un-rotated. */
static void test_no_rope(void **state)
{
    (void)state;
    static const struct {
        uint32_t version, rot_k, extension;
        extension_kind positions;
        bool rope;
    } cases[] = {{4, 0, 0, TEXT_POSITIONS, true},      {4, 64, 0, TEXT_POSITIONS, false},
                 {4, 0, 12, SEVERAL_POSITIONS, false}, {4, 0, 12, TEXT_POSITIONS, true},
                 {3, 0, 12, EQUAL_POSITIONS, true},    {2, 0, 8, TEXT_POSITIONS, true},
                 {2, 0, 8, SEVERAL_POSITIONS, false},  {4, 64, 12, TEXT_POSITIONS, false}};
    xkv_rope rope = {.n_rot = 2, .scale = 1};
    xkv_model_layer layers[] = {{1, 4, 2, 0, 0}, {1, 4, 2, 0, 0}};
    xkv_model model = {.layer_count = 2, .layers = layers, .rope_count = 1, .ropes = &rope};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sequence s = plain_sequence();
        s.version = cases[i].version;
        s.rot_k = cases[i].rot_k;
        s.extension = cases[i].extension;
        s.positions = cases[i].positions;
        put_sequence(&file, &s);
        xkv_cache *cache = open_file(&model);
        assert_int_equal(xkv_cache_geometry(cache)->planes[0].rope, cases[i].rope ? 0 : XKV_NO_ROPE);
        assert_int_equal(xkv_cache_geometry(cache)->rope_count, cases[i].rope);
        assert_framing_is_file(ctx, cache, file.data, file.size);
        xkv_cache_free(ctx, cache);
    }
    sequence s = plain_sequence(); /* text behind an image: the last token alone is at (9, 2) */
    s.extension = 12;
    s.positions = EQUAL_POSITIONS;
    put_sequence(&file, &s);
    xkv_store32(file.data + 28 + 2 * 24 + 8, 9);
    xkv_cache *cache = open_file(&model);
    assert_int_equal(xkv_cache_geometry(cache)->planes[0].rope, XKV_NO_ROPE);
    xkv_cache_free(ctx, cache);
}

/* --- Genuine files ------------------------------------------------------------------------------------------------ */

static int check_folder(const char *model_name, const char *part, uint32_t layers, uint32_t kv_width)
{
    char folder[1024], path[2048];
    snprintf(folder, sizeof folder, "%s/data/%s/%s", XKV_SHARED_DIR, model_name, part);
    DIR *dir = opendir(folder);
    int count = 0;
    for (struct dirent *e; dir && (e = readdir(dir));) {
        xkv_cache *cache;
        if (!strstr(e->d_name, ".ggsq"))
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        assert_int_equal(xkv_cache_open(ctx, path, NULL, &cache), XKV_OK);
        const xkv_geometry *g = xkv_cache_geometry(cache);
        const xkv_framing *f = xkv_cache_framing(cache);
        uint64_t n = g->token_count;
        assert_engine(cache, XKV_ENGINE_LLAMA_SEQUENCE);
        assert_int_equal(g->layer_count, layers);
        assert_int_equal(xkv_geometry_raw_bytes(g), n * layers * 2 * kv_width * 2);
        /* the size formula of a plain sequence file */
        assert_int_equal(f->source_size,
                         12 + 4 * g->token_id_count + 8 + 12 * n + 8 + 2 * layers * (12 + n * kv_width * 2));
        assert_int_equal(f->segments[f->segment_count - 1].plane_count, 1);
        xkv_cache_free(ctx, cache);
        count++;
    }
    if (dir)
        closedir(dir);
    return count;
}

static void test_genuine_files(void **state)
{
    (void)state;
    int count = check_folder("smollm2-135m", "test", 30, 192) + check_folder("smollm2-135m", "train", 30, 192) +
                check_folder("qwen2.5-coder-0.5b", "test", 24, 128) +
                check_folder("qwen2.5-coder-0.5b", "train", 24, 128);
    if (count == 0) {
        print_message("skipped: no genuine caches under \"%s\"\n", XKV_SHARED_DIR);
        skip();
    }
    assert_int_equal(count, 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_offsets, setup, teardown),
        cmocka_unit_test_setup_teardown(test_forms, setup, teardown),
        cmocka_unit_test_setup_teardown(test_streams, setup, teardown),
        cmocka_unit_test_setup_teardown(test_types, setup, teardown),
        cmocka_unit_test_setup_teardown(test_transposed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cells_out_of_order, setup, teardown),
        cmocka_unit_test_setup_teardown(test_checkpoints, setup, teardown),
        cmocka_unit_test_setup_teardown(test_served_token_field, setup, teardown),
        cmocka_unit_test_setup_teardown(test_token_field_not_understood, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sessions, setup, teardown),
        cmocka_unit_test_setup_teardown(test_session_offsets, setup, teardown),
        cmocka_unit_test_setup_teardown(test_session_truncation, setup, teardown),
        cmocka_unit_test_setup_teardown(test_session_architecture, setup, teardown),
        cmocka_unit_test_setup_teardown(test_blobs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_latent, setup, teardown),
        cmocka_unit_test_setup_teardown(test_unknown_type, setup, teardown),
        cmocka_unit_test_setup_teardown(test_quantized_rows, setup, teardown),
        cmocka_unit_test_setup_teardown(test_quantized_rope, setup, teardown),
        cmocka_unit_test_setup_teardown(test_quantized_latent, setup, teardown),
        cmocka_unit_test_setup_teardown(test_two_caches, setup, teardown),
        cmocka_unit_test_setup_teardown(test_layers_of_two_caches, setup, teardown),
        cmocka_unit_test_setup_teardown(test_window_with_other_cells, setup, teardown),
        cmocka_unit_test_setup_teardown(test_window_with_other_cells_and_model, setup, teardown),
        cmocka_unit_test_setup_teardown(test_second_memory_of_no_layer, setup, teardown),
        cmocka_unit_test_setup_teardown(test_third_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(test_damaged_second_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(test_not_understood, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_cells, setup, teardown),
        cmocka_unit_test_setup_teardown(test_truncation, setup, teardown),
        cmocka_unit_test_setup_teardown(test_contradictions, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model, setup, teardown),
        cmocka_unit_test_setup_teardown(test_layers_without_cache, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_rope, setup, teardown),
        cmocka_unit_test_setup_teardown(test_genuine_files, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
