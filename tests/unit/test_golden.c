/* The files of tests/golden, which must be decodable for ever: what the library makes of them is what was packed, or
 * for lossy ones what the reference decoder makes of them (tests/golden/README.md). */
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct golden {
    const char *name, *suffix;
    int lossless;
    const char *dictionary; /* NULL: needs none */
} golden;

static const golden goldens[] = {
    {"lossless-f16", "ggsq", 1, NULL},
    {"lossless-f32", "ggsq", 1, NULL},
    {"lossless-chunks", "ggsq", 1, NULL},
    {"lossless-heads", "safetensors", 1, NULL},
    {"opaque", "bin", 1, NULL},
    {"svd-stored", "ggsq", 0, NULL},
    {"svd-zstd", "ggsq", 0, NULL},
    {"svd-window", "ggsq", 0, NULL},
    {"svd-latent", "ggsq", 0, NULL},
    {"svdq-fine", "ggsq", 0, NULL},
    {"svdq-window", "ggsq", 0, NULL},
    {"dict-fine", "ggsq", 0, "dictionary"},
    {"dict-window", "ggsq", 0, "dictionary"},
    {"scalar", "ggsq", 0, NULL},
    {"dict-cross", "ggsq", 0, "dictionary-cross"},
    {"scalar-coarse", "ggsq", 0, NULL},
    {"lossless-blocks", "ggsq", 1, NULL},
    {"scalar-blocks", "ggsq", 0, NULL},
    {"dict-blocks", "ggsq", 0, "dictionary"},
    {"lossless-session", "ggsn", 1, NULL},
    {"scalar-session", "ggsn", 0, NULL},
    {"svdq-windows", "ggsq", 0, NULL},
    {"scalar-windows", "ggsq", 0, NULL},
    {"scalar-positions", "ggsq", 0, NULL},
    {"scalar-slot", "ggsq", 0, NULL},
};

/* --- Agreement of two decoders: spec/codec.md, section 3 --- */

/* Element (t, i) of a plane: its value, for 16-bit types its place among the numbers of the type, and in blocks the
 * size of their scale. */
typedef struct number {
    double value;
    int32_t ordinal;
    double step;
} number;

static number number_at(const xkv_plane *plane, const xkv_view *view, uint32_t t, uint32_t i)
{
    uint32_t head_dim = view->head_dim ? view->head_dim : plane->head_dim, block = xkv_dtype_block(plane->dtype);
    int64_t row = view->rows ? view->rows[t] : t, head = i / head_dim, dim = i % head_dim / block;
    const uint8_t *at =
        (const uint8_t *)view->data + row * view->token_stride + head * view->head_stride + dim * view->dim_stride;
    uint16_t bits;
    float f;

    if (plane->dtype == XKV_F32) {
        memcpy(&f, at, 4);
        return (number){f, 0, 0};
    }
    memcpy(&bits, at, 2);
    if (block > 1)
        return (number){test_from_block(plane->dtype, at, i % block), 0, fabs(test_from_half(bits))};
    return (number){plane->dtype == XKV_F16 ? test_from_half(bits) : test_from_bf16(bits),
                    bits & 0x8000 ? -(bits & 0x7fff) : bits, 0};
}

static void assert_rows_agree(const char *name, const xkv_plane *plane, const xkv_view *found, const xkv_view *expected,
                              uint32_t t)
{
    uint32_t width = plane->heads * plane->head_dim;
    double largest = 0;

    for (uint32_t i = 0; i < width; i++)
        largest = fmax(largest, fabs(number_at(plane, expected, t, i).value));
    for (uint32_t i = 0; i < width; i++) {
        number a = number_at(plane, found, t, i), b = number_at(plane, expected, t, i);
        int near = xkv_dtype_size(plane->dtype) == 2 && abs(a.ordinal - b.ordinal) <= 1;
        if (xkv_dtype_block(plane->dtype) > 1)
            near = fabs(a.value - b.value) <= 1.1 * fmax(a.step, b.step);
        if (!near && !(fabs(a.value - b.value) <= ldexp(largest, -16)))
            fail_msg("%s: layer %u, kind %u, token %u, element %u is %.9g, expected %.9g", name, plane->layer,
                     plane->kind, t, i, a.value, b.value);
    }
}

static void assert_tensors_agree(xkv_ctx *ctx, const char *name, const xkv_entry *entry, uint8_t *found,
                                 uint8_t *expected)
{
    const xkv_geometry *g = xkv_entry_geometry(entry);
    const xkv_framing *framing = xkv_entry_framing(entry);
    xkv_view *views = calloc(2 * (size_t)g->plane_count + 1, sizeof *views), *others = views + g->plane_count;

    assert_ok(ctx, xkv_framing_views(ctx, framing, g, found, views));
    assert_ok(ctx, xkv_framing_views(ctx, framing, g, expected, others));
    for (uint32_t p = 0; p < g->plane_count; p++)
        for (uint32_t t = 0; t < g->token_count; t++)
            assert_rows_agree(name, &g->planes[p], &views[p], &others[p], t);
    free(views);
}

static void assert_literals_equal(const xkv_framing *framing, const uint8_t *found, const uint8_t *expected)
{
    for (uint32_t i = 0; i < framing->segment_count; i++) {
        size_t size = (size_t)framing->segments[i].size;
        if (framing->segments[i].plane_count == 0)
            assert_memory_equal(found, expected, size);
        found += size;
        expected += size;
    }
}

/* --- Tests --- */

static uint8_t *read_input(xkv_ctx *ctx, const golden *g, uint64_t size)
{
    char path[512];
    xkv_input input;
    uint8_t *data = malloc((size_t)size);

    (void)snprintf(path, sizeof path, "%s/%s.%s", XKV_GOLDEN_DIR, g->name, g->suffix);
    assert_ok(ctx, xkv_input_open(ctx, path, &input));
    assert_true(input.size == size);
    assert_ok(ctx, input.read(input.user, ctx, 0, data, (size_t)size));
    xkv_input_close(ctx, &input);
    return data;
}

static void check_restored(xkv_ctx *ctx, const golden *g, const xkv_entry *entry)
{
    uint64_t size;
    uint8_t *found, *expected;

    assert_ok(ctx, xkv_entry_restored_size(ctx, entry, 0, &size));
    expected = read_input(ctx, g, size);
    found = malloc((size_t)size);
    assert_ok(ctx, xkv_entry_restore(ctx, entry, 0, NULL, NULL, found, size));
    assert_literals_equal(xkv_entry_framing(entry), found, expected);
    if (g->lossless)
        assert_memory_equal(found, expected, (size_t)size);
    else
        assert_tensors_agree(ctx, g->name, entry, found, expected);
    assert_ok(ctx, xkv_entry_verify(ctx, entry, NULL, NULL));
    free(found);
    free(expected);
}

static xkv_dict *open_dictionary(xkv_ctx *ctx, const char *name)
{
    char path[512];
    xkv_input input;
    xkv_dict *dict;

    (void)snprintf(path, sizeof path, "%s/%s.xkvd", XKV_GOLDEN_DIR, name);
    assert_ok(ctx, xkv_input_open(ctx, path, &input));
    assert_ok(ctx, xkv_dict_open(ctx, &input, 0, &dict));
    xkv_input_close(ctx, &input);
    return dict;
}

static void check_golden(const golden *g)
{
    xkv_ctx *ctx = new_ctx(1);
    char path[512];
    xkv_input input;
    xkv_entry *entry;
    xkv_dict *dict = g->dictionary ? open_dictionary(ctx, g->dictionary) : NULL;
    xkv_entry_info info;

    (void)snprintf(path, sizeof path, "%s/%s.xkv", XKV_GOLDEN_DIR, g->name);
    assert_ok(ctx, xkv_input_open(ctx, path, &input));
    assert_ok(ctx, xkv_entry_open(ctx, &input, &entry));
    xkv_entry_get_info(entry, &info);
    assert_int_equal(info.lossless != 0, g->lossless);
    assert_int_equal(info.needs_dict != 0, dict != NULL);
    if (dict)
        assert_ok(ctx, xkv_entry_attach(ctx, entry, dict));
    check_restored(ctx, g, entry);
    xkv_entry_close(ctx, entry);
    xkv_dict_close(ctx, dict);
    xkv_input_close(ctx, &input);
    xkv_ctx_free(ctx);
}

static void test_golden(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof goldens / sizeof *goldens; i++)
        check_golden(&goldens[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_golden)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
