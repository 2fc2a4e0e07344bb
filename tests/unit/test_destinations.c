/* test_destinations.c - a genuine cache restored into, and packed from, engines' pages and ggml's blocks. What must
 * come out is derived from the restored engine file, element by element; blocks by the quantizer of support.c. */
#include "kernels.h"
#include "support.h"

#include <stdlib.h>
#include <string.h>

enum { LAYERS = 30, PLANES = 2 * LAYERS, TOKENS = 160, HEADS = 3, DIM = 64, WIDTH = HEADS * DIM, BLOCKS = 200 };

static xkv_ctx *ctx;
static xkv_model *model;
static xkv_cache *cache;

static int open_cache(void **state)
{
    (void)state;
    ctx = new_ctx(2);
    assert_ok(ctx, xkv_model_from_gguf(ctx, XKV_DATA_DIR "/smollm2-135m.gguf", NULL, &model));
    assert_ok(ctx, xkv_cache_open(ctx, XKV_DATA_DIR "/smollm2-135m-jargon.ggsq", model, &cache));
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_int_equal(g->plane_count, PLANES);
    assert_int_equal(g->token_count, TOKENS);
    assert_int_equal(g->planes[0].heads * g->planes[0].head_dim, WIDTH);
    return 0;
}

static int close_cache(void **state)
{
    (void)state;
    xkv_cache_free(ctx, cache);
    xkv_model_free(ctx, model);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    xkv_ctx_free(ctx);
    return 0;
}

/* --- Pages -------------------------------------------------------------------------------------------------------- */

/* A layout and block size; every plane, or the K and V of a layer, in a pool of its own. */
typedef struct paging {
    const char *k_axes, *v_axes; /* v_axes NULL: K and V in one tensor */
    uint32_t dtype, block_tokens, split;
} paging;

typedef struct pool {
    uint8_t *memory;
    int32_t table[BLOCKS + 2];
    xkv_view *views;
} pool;

static pool make_pool(const xkv_geometry *g, const paging *how, uint32_t first, uint32_t tokens)
{
    static xkv_pages pages[PLANES];
    uint32_t count = how->v_axes ? PLANES : LAYERS, blocks = BLOCKS / how->block_tokens + 2;
    size_t plane = (size_t)xkv_dtype_bytes(how->dtype, (uint64_t)blocks * how->block_tokens * WIDTH);
    pool p = {.memory = malloc(PLANES * plane)};
    assert_non_null(p.memory);
    memset(p.memory, 0xa5, PLANES * plane);
    for (uint32_t i = 0; i < blocks; i++)
        p.table[i] = (int32_t)(blocks - 1 - i);
    for (uint32_t i = 0; i < count; i++)
        pages[i] = (xkv_pages){.data = p.memory + i * plane * (how->v_axes ? 1 : 2),
                               .size = plane * (how->v_axes ? 1 : 2),
                               .axes = how->v_axes && i % 2 ? how->v_axes : how->k_axes,
                               .dtype = how->dtype,
                               .first_layer = how->v_axes ? i / 2 : i,
                               .layer_count = 1,
                               .kinds = {how->v_axes ? i % 2 : XKV_PLANE_K, XKV_PLANE_V},
                               .kind_count = how->v_axes ? 1 : 2,
                               .block_count = blocks,
                               .block_tokens = how->block_tokens,
                               .dim_split = how->v_axes && i % 2 ? 0 : how->split,
                               .table = p.table,
                               .table_size = blocks};
    assert_ok(ctx, xkv_views_from_pages(ctx, g, pages, count, first, tokens, &p.views));
    return p;
}

static void free_pool(pool *p)
{
    xkv_views_free(ctx, p->views);
    free(p->memory);
}

static const paging f16_pages[] = {
    {"KBNHD", NULL, XKV_F16, 16, 0}, {"BHNC", NULL, XKV_F16, 7, 0},    {"BHDNX", "BHDN", XKV_F16, 16, 8},
    {"BHD", "HDB", XKV_F16, 1, 0},   {"BHND", "BNHD", XKV_F16, 61, 0},
};
static const paging block_pages[] = {
    {"KBNHD", NULL, XKV_Q8_0, 16, 0},
    {"BHNC", NULL, XKV_Q4_0, 32, 0},
    {"BHD", "BHD", XKV_Q8_0, 1, 0},
    {"BHD", "BHD", XKV_Q4_0, 1, 0},
};

/* --- Entries ------------------------------------------------------------------------------------------------------ */

typedef struct opened {
    memory m, dictionary;
    xkv_input input, dictionary_input;
    xkv_dict *dict;
    xkv_entry *entry;
} opened;

static void pack_into(opened *o, const xkv_geometry *g, const xkv_view *views, const xkv_pack_options *options)
{
    xkv_output output = memory_output(&o->m);
    assert_ok(ctx, xkv_pack(ctx, g, views, NULL, NULL, 0, options, &output, NULL));
    o->input = xkv_input_from_memory(o->m.data, o->m.size);
    assert_ok(ctx, xkv_entry_open(ctx, &o->input, &o->entry));
    if (options->profile == XKV_PROFILE_DICT)
        assert_ok(ctx, xkv_entry_attach(ctx, o->entry, options->dict));
}

static void train(opened *o, uint32_t cross)
{
    xkv_train_options options = xkv_train_options_default();
    xkv_output output = memory_output(&o->dictionary);
    options.group_layers = 2;
    options.zstd_level = 1;
    options.cross = cross;
    assert_ok(ctx, xkv_train(ctx, (const xkv_cache *const *)&cache, 1, &options, &output));
    o->dictionary_input = xkv_input_from_memory(o->dictionary.data, o->dictionary.size);
    assert_ok(ctx, xkv_dict_open(ctx, &o->dictionary_input, 1, &o->dict));
}

static void close_entry(opened *o)
{
    xkv_entry_close(ctx, o->entry);
    xkv_dict_close(ctx, o->dict);
    memory_free(&o->m);
    memory_free(&o->dictionary);
    *o = (opened){.entry = NULL};
}

enum { LOSSLESS, SVD, SVD16, SCALAR, DICT, DICT_CROSS, PROFILES };

static xkv_pack_options profile_options(opened *o, int which)
{
    xkv_pack_options options = xkv_pack_options_default();
    options.zstd_level = 1;
    options.profile = which == LOSSLESS ? XKV_PROFILE_LOSSLESS
                      : which == SCALAR ? XKV_PROFILE_SCALAR
                      : which >= DICT   ? XKV_PROFILE_DICT
                                        : XKV_PROFILE_SVD;
    if (which == SVD16) {
        options.rank_k = 12;
        options.rank_v = 18;
    } else if (which == SVD || which == SCALAR) {
        options.error = 0.2;
    } else if (which >= DICT) {
        train(o, which == DICT_CROSS ? 8 : 0);
        options.dict = o->dict;
        options.quality = 50;
    }
    return options;
}

/* No group fell back to another codec. */
static void assert_all_coded(const opened *o, int which)
{
    static const uint32_t codecs[] = {XKV_CODEC_LOSSLESS, XKV_CODEC_SVDQ, XKV_CODEC_SVD,
                                      XKV_CODEC_SCALAR,   XKV_CODEC_DICT, XKV_CODEC_DICT};
    xkv_entry_info info;
    xkv_group_info group;
    xkv_entry_get_info(o->entry, &info);
    for (uint32_t i = which == DICT_CROSS ? 1 : 0; i < info.group_count; i++) {
        xkv_entry_get_group(o->entry, i, &group);
        assert_int_equal(group.codec, codecs[which]);
    }
}

/* --- Restoring ---------------------------------------------------------------------------------------------------- */

/* The restored engine file, as xkv-unpack writes it, and views of its planes. */
typedef struct unpacked {
    uint8_t *image;
    xkv_view views[PLANES];
} unpacked;

static unpacked unpack(const opened *o)
{
    unpacked u;
    const xkv_framing *framing = xkv_cache_framing(cache);
    xkv_read_options options = xkv_read_options_default();
    u.image = malloc((size_t)framing->source_size);
    assert_non_null(u.image);
    assert_ok(ctx, xkv_framing_views(ctx, framing, xkv_cache_geometry(cache), u.image, u.views));
    assert_ok(ctx, xkv_entry_read(ctx, o->entry, &options, u.views));
    return u;
}

/* Token t of a plane in the file: rows of 192 f16. */
static const uint8_t *file_row(const unpacked *u, uint32_t plane, uint32_t t)
{
    assert_int_equal(u->views[plane].dim_stride, 2);
    assert_int_equal(u->views[plane].head_stride, 2 * DIM);
    return (const uint8_t *)u->views[plane].data + t * (size_t)u->views[plane].token_stride;
}

/* What a row of f16 is in another dtype. */
static void expect_row(const uint8_t *row, uint32_t dtype, uint8_t *expected)
{
    float x[WIDTH];
    uint16_t h;
    if (dtype == XKV_F16) {
        memcpy(expected, row, 2 * WIDTH);
        return;
    }
    for (uint32_t i = 0; i < WIDTH; i++) {
        memcpy(&h, row + 2 * i, 2);
        x[i] = (float)test_from_half(h);
    }
    for (uint32_t i = 0; i < WIDTH; i += 32)
        test_quantize(dtype, x + i, expected + xkv_dtype_bytes(dtype, i));
}

/* Tokens [first, first + tokens) restored into pages are those of the file. */
static void check_pages(const opened *o, const unpacked *u, const paging *how, uint32_t first, uint32_t tokens)
{
    const xkv_geometry *g = xkv_cache_geometry(cache);
    pool p = make_pool(g, how, first, tokens);
    xkv_read_options options = xkv_read_options_default();
    uint8_t found[2 * WIDTH], expected[2 * WIDTH];
    size_t size = (size_t)xkv_dtype_bytes(how->dtype, WIDTH);
    options.first_token = first;
    options.token_count = tokens;
    assert_ok(ctx, xkv_entry_read(ctx, o->entry, &options, p.views));
    for (uint32_t plane = 0; plane < PLANES; plane++) {
        xkv_plane as = g->planes[plane];
        as.dtype = how->dtype;
        for (uint32_t t = 0; t < tokens; t++) {
            expect_row(file_row(u, plane, first + t), how->dtype, expected);
            xkv_view_gather_bytes(&p.views[plane], &as, t, t + 1, found, size);
            assert_memory_equal(found, expected, size);
        }
    }
    free_pool(&p);
}

static void restored_pages_hold_the_unpacked_file(void **state)
{
    (void)state;
    for (int which = 0; which < PROFILES; which++) {
        opened o = {.entry = NULL};
        xkv_pack_options options = profile_options(&o, which);
        pack_into(&o, xkv_cache_geometry(cache), xkv_cache_views(cache), &options);
        assert_all_coded(&o, which);
        unpacked u = unpack(&o);
        for (size_t i = 0; i < sizeof f16_pages / sizeof *f16_pages; i++)
            check_pages(&o, &u, &f16_pages[i], i % 2 ? 37 : 0, i % 2 ? 101 : TOKENS);
        for (size_t i = 0; i < sizeof block_pages / sizeof *block_pages; i++)
            check_pages(&o, &u, &block_pages[i], i == 1 ? 3 : 0, i == 1 ? 65 : TOKENS);
        free(u.image);
        close_entry(&o);
    }
}

/* K at other positions: pages get what plain views get. */
static void shifted_pages(void **state)
{
    const xkv_geometry *g = xkv_cache_geometry(cache);
    int32_t positions[TOKENS];
    (void)state;
    for (int32_t t = 0; t < TOKENS; t++)
        positions[t] = t + 1000;
    for (int which = LOSSLESS; which <= SCALAR; which += SCALAR) {
        opened o = {.entry = NULL};
        xkv_pack_options options = profile_options(&o, which);
        xkv_read_options read = xkv_read_options_default();
        read.positions = positions;
        pack_into(&o, g, xkv_cache_views(cache), &options);
        unpacked u = unpack(&o);
        assert_ok(ctx, xkv_entry_read(ctx, o.entry, &read, u.views));
        pool p = make_pool(g, &f16_pages[0], 0, TOKENS), q = make_pool(g, &block_pages[0], 0, TOKENS);
        assert_ok(ctx, xkv_entry_read(ctx, o.entry, &read, p.views));
        assert_ok(ctx, xkv_entry_read(ctx, o.entry, &read, q.views));
        for (uint32_t plane = 0; plane < PLANES; plane++)
            for (uint32_t t = 0; t < TOKENS; t++) {
                uint8_t found[2 * WIDTH], expected[2 * WIDTH];
                xkv_plane as = g->planes[plane];
                xkv_view_gather_bytes(&p.views[plane], &as, t, t + 1, found, sizeof found);
                assert_memory_equal(found, file_row(&u, plane, t), 2 * WIDTH);
                as.dtype = XKV_Q8_0;
                expect_row(file_row(&u, plane, t), XKV_Q8_0, expected);
                xkv_view_gather_bytes(&q.views[plane], &as, t, t + 1, found, sizeof found);
                assert_memory_equal(found, expected, WIDTH / 32 * 34);
            }
        free_pool(&p);
        free_pool(&q);
        free(u.image);
        close_entry(&o);
    }
}

/* --- Packing ------------------------------------------------------------------------------------------------------ */

/* The cache in another dtype: planes of a geometry of their own, rows in memory one behind the other. */
typedef struct converted {
    xkv_geometry geometry;
    xkv_plane planes[PLANES];
    xkv_view views[PLANES];
    uint8_t *data;
    size_t row;
} converted;

static void convert(converted *c, uint32_t dtype)
{
    c->geometry = *xkv_cache_geometry(cache);
    c->row = (size_t)xkv_dtype_bytes(dtype, WIDTH);
    c->data = malloc(PLANES * TOKENS * c->row);
    assert_non_null(c->data);
    for (uint32_t i = 0; i < PLANES; i++) {
        const xkv_view *from = &xkv_cache_views(cache)[i];
        c->planes[i] = c->geometry.planes[i];
        c->planes[i].dtype = dtype;
        c->views[i] = (xkv_view){.data = c->data + i * TOKENS * c->row,
                                 .token_stride = (int64_t)c->row,
                                 .head_stride = (int64_t)c->row / HEADS,
                                 .dim_stride = (int64_t)xkv_dtype_size(dtype),
                                 .dtype = dtype};
        for (uint32_t t = 0; t < TOKENS; t++)
            expect_row((const uint8_t *)from->data + t * (size_t)from->token_stride, dtype,
                       (uint8_t *)c->views[i].data + t * c->row);
    }
    c->geometry.planes = c->planes;
}

static void check_packing_from_pages(const converted *c, const paging *how, int which)
{
    opened plain = {.entry = NULL}, paged = {.entry = NULL};
    xkv_pack_options options = profile_options(&plain, which);
    pool p = make_pool(&c->geometry, how, 0, TOKENS);
    for (uint32_t i = 0; i < PLANES; i++)
        xkv_view_scatter_bytes(c->views[i].data, c->row, &c->planes[i], 0, TOKENS, &p.views[i]);
    pack_into(&plain, &c->geometry, c->views, &options);
    pack_into(&paged, &c->geometry, p.views, &options);
    assert_int_equal(plain.m.size, paged.m.size);
    assert_memory_equal(plain.m.data, paged.m.data, plain.m.size);
    free_pool(&p);
    close_entry(&paged);
    close_entry(&plain);
}

static void packing_from_pages_is_packing_from_rows(void **state)
{
    converted c;
    (void)state;
    convert(&c, XKV_F16);
    for (size_t i = 0; i < sizeof f16_pages / sizeof *f16_pages; i++)
        check_packing_from_pages(&c, &f16_pages[i], i == 0 ? DICT : i == 1 ? SVD16 : LOSSLESS);
    free(c.data);
    for (size_t i = 0; i < sizeof block_pages / sizeof *block_pages; i++) {
        convert(&c, block_pages[i].dtype);
        check_packing_from_pages(&c, &block_pages[i], i < 2 ? SCALAR : LOSSLESS);
        free(c.data);
    }
}

/* Blocks as planes: lossless gives back the very blocks; a coded entry what quantizing its f32 rows gives. */
static void planes_of_blocks(void **state)
{
    static float rows[PLANES][TOKENS][WIDTH];
    (void)state;
    for (uint32_t dtype = XKV_Q8_0; dtype <= XKV_Q4_0; dtype++)
        for (int which = 0; which < PROFILES; which++) {
            converted c;
            opened o = {.entry = NULL};
            xkv_view blocks[PLANES], floats[PLANES];
            convert(&c, dtype);
            xkv_pack_options options = profile_options(&o, which);
            pack_into(&o, &c.geometry, c.views, &options);
            assert_all_coded(&o, which);
            assert_int_equal(xkv_load32(o.m.data + 24), 1); /* the header asks for a reader that knows blocks */
            uint8_t *back = malloc(PLANES * TOKENS * c.row);
            for (uint32_t i = 0; i < PLANES; i++) {
                blocks[i] = c.views[i];
                blocks[i].data = back + i * TOKENS * c.row;
                floats[i] = (xkv_view){rows[i], 4 * WIDTH, 4 * DIM, 4, NULL, .dtype = XKV_F32};
            }
            assert_ok(ctx, xkv_entry_read(ctx, o.entry, NULL, blocks));
            assert_ok(ctx, xkv_entry_read(ctx, o.entry, NULL, floats));
            assert_ok(ctx, xkv_entry_verify(ctx, o.entry, NULL, NULL));
            uint32_t exact = which == LOSSLESS ? TOKENS : 4;
            for (uint32_t i = 0; i < PLANES; i++)
                for (uint32_t t = 0; t < TOKENS; t++) {
                    const uint8_t *source = (uint8_t *)c.views[i].data + t * c.row;
                    const uint8_t *found = (uint8_t *)blocks[i].data + t * c.row;
                    uint8_t expected[2 * WIDTH];
                    for (uint32_t e = 0; e < WIDTH; e += 32)
                        test_quantize(dtype, &rows[i][t][e], expected + xkv_dtype_bytes(dtype, e));
                    assert_memory_equal(found, t < exact ? source : expected, c.row);
                }
            free(back);
            free(c.data);
            close_entry(&o);
        }
}

/* Tokens behind an entry of blocks: all of them come back. */
static void appended_blocks(void **state)
{
    (void)state;
    for (uint32_t dtype = XKV_Q8_0; dtype <= XKV_Q4_0; dtype++) {
        converted c;
        opened base = {.entry = NULL}, longer = {.entry = NULL};
        xkv_output output = memory_output(&longer.m);
        convert(&c, dtype);
        xkv_geometry first = c.geometry;
        xkv_pack_options options = profile_options(&base, LOSSLESS);
        first.token_count = 101;
        options.chunk_tokens = 32;
        pack_into(&base, &first, c.views, &options);
        assert_ok(ctx, xkv_append(ctx, base.entry, &c.geometry, c.views, NULL, NULL, 0, NULL, &output, NULL));
        longer.input = xkv_input_from_memory(longer.m.data, longer.m.size);
        assert_ok(ctx, xkv_entry_open(ctx, &longer.input, &longer.entry));
        uint8_t *back = calloc(PLANES * TOKENS, c.row);
        assert_non_null(back);
        for (uint32_t i = 0; i < PLANES; i++)
            c.views[i].data = back + i * TOKENS * c.row;
        assert_ok(ctx, xkv_entry_read(ctx, longer.entry, NULL, c.views));
        assert_memory_equal(back, c.data, PLANES * TOKENS * c.row);
        free(back);
        free(c.data);
        close_entry(&longer);
        close_entry(&base);
    }
}

/* Views that split blocks, or that no type is known of, are refused before anything is written. */
static void bad_views(void **state)
{
    converted c;
    opened o = {.entry = NULL};
    (void)state;
    convert(&c, XKV_Q8_0);
    xkv_pack_options options = profile_options(&o, LOSSLESS);
    pack_into(&o, &c.geometry, c.views, &options);
    const xkv_view good = c.views[7];
    const xkv_view bad[] = {{good.data, good.token_stride, good.head_stride, 2, NULL, .dtype = XKV_Q8_0},
                            {good.data, good.token_stride, good.head_stride, 34, NULL, .dtype = 5},
                            {NULL, good.token_stride, good.head_stride, 34, NULL, .dtype = XKV_Q8_0},
                            {good.data, good.token_stride, 17, 34, NULL, .dtype = XKV_Q8_0, .head_dim = 16},
                            {good.data, good.token_stride, 34, 34, NULL, .dtype = XKV_Q8_0, .head_dim = 160},
                            {good.data, good.token_stride, 4, 4, NULL, .dtype = XKV_F32, .head_dim = 7}};
    memset(c.data, 0xa5, PLANES * TOKENS * c.row);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        memory m = {0};
        xkv_output output = memory_output(&m);
        c.views[7] = bad[i];
        assert_int_equal(xkv_entry_read(ctx, o.entry, NULL, c.views), XKV_ERROR_ARGUMENT);
        assert_non_null(strstr(xkv_ctx_error(ctx), "plane 7"));
        assert_int_equal(xkv_pack(ctx, &c.geometry, c.views, NULL, NULL, 0, &options, &output, NULL),
                         XKV_ERROR_ARGUMENT);
        memory_free(&m);
    }
    for (size_t i = 0; i < PLANES * TOKENS * c.row; i++)
        assert_int_equal(c.data[i], 0xa5);
    free(c.data);
    close_entry(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(restored_pages_hold_the_unpacked_file),
        cmocka_unit_test(shifted_pages),
        cmocka_unit_test(packing_from_pages_is_packing_from_rows),
        cmocka_unit_test(planes_of_blocks),
        cmocka_unit_test(appended_blocks),
        cmocka_unit_test(bad_views),
    };
    return cmocka_run_group_tests(tests, open_cache, close_cache);
}
