/* test_views.c - gather and scatter against the definition of a view, element by element. */
#include "cpu/ops.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>

enum { TOKENS = 75, MARGIN = 64 };

/* How the strides follow from heads, head_dim and element size. */
typedef enum layout {
    TOKEN_MAJOR,   /* [token][head][dim] */
    WIDER_ROWS,    /* the same in rows with something behind */
    SPACED_HEADS,  /* [token][head][dim] with gaps between heads */
    HEAD_MAJOR,    /* [head][token][dim] */
    TRANSPOSED,    /* [head][dim][token] */
    EVERY_OTHER,   /* [token][head][dim] with gaps between dims */
    BACKWARDS,     /* tokens and dims from high to low addresses */
    ODD_TRANSPOSED /* [dim][token][head] */
} layout;
#define LAYOUTS 8

typedef struct fixture {
    xkv_plane plane;
    xkv_view view;
    uint8_t *memory, *before; /* before: a copy */
    size_t size;
    uint32_t rows[TOKENS];
} fixture;

static void set_strides(fixture *f, layout l)
{
    int64_t heads = f->plane.heads, dims = f->plane.head_dim, e = (int64_t)xkv_dtype_size(f->view.dtype);
    const int64_t strides[LAYOUTS][3] = {
        {heads * dims * e, dims * e, e},
        {heads * dims * e + 24, dims * e, e},
        {heads * (dims + 3) * e, (dims + 3) * e, e},
        {dims * e, TOKENS * dims * e, e},
        {e, TOKENS * dims * e, TOKENS * e},
        {2 * heads * dims * e, 2 * dims * e, 2 * e},
        {-heads * dims * e, dims * e, -e},
        {heads * e, e, heads * TOKENS * e},
    };
    f->view.token_stride = strides[l][0];
    f->view.head_stride = strides[l][1];
    f->view.dim_stride = strides[l][2];
    int64_t base = MARGIN + 1; /* an odd address */
    if (l == BACKWARDS)
        base += (TOKENS - 1) * heads * dims * e + (dims - 1) * e;
    f->view.data = f->memory + base;
}

static void permute_rows(fixture *f, int permutation)
{
    for (uint32_t i = 0; i < TOKENS; i++)
        f->rows[i] = permutation == 1 ? TOKENS - 1 - i : permutation == 2 ? (i + 20) % TOKENS : i * 2 % TOKENS;
    f->view.rows = permutation == 0 ? NULL : f->rows;
}

static void setup(fixture *f, uint32_t heads, uint32_t head_dim, uint32_t dtype, uint32_t plane_dtype, layout l,
                  int permutation)
{
    memset(f, 0, sizeof *f);
    f->plane = (xkv_plane){.dtype = plane_dtype, .heads = heads, .head_dim = head_dim, .rope = XKV_NO_ROPE};
    f->view.dtype = dtype;
    f->size = 2 * MARGIN + (size_t)TOKENS * (heads * (head_dim + 4) * 8 + 24);
    f->memory = malloc(f->size);
    f->before = malloc(f->size);
    assert_true(f->memory != NULL && f->before != NULL);
    for (size_t i = 0; i < f->size; i++) /* no exponent byte is 0x7f or 0xff: all elements are finite */
        f->memory[i] = (uint8_t)((i * 37 + i / 251) % 113);
    memcpy(f->before, f->memory, f->size);
    set_strides(f, l);
    permute_rows(f, permutation);
}

static void teardown(fixture *f)
{
    free(f->memory);
    free(f->before);
}

/* Offset of an element in `memory`, by the definition in xkv/format.h. */
static size_t place(const fixture *f, uint32_t t, uint32_t h, uint32_t d)
{
    int64_t row = f->view.rows != NULL ? f->view.rows[t] : t;
    int64_t at = (uint8_t *)f->view.data - f->memory + row * f->view.token_stride + (int64_t)h * f->view.head_stride +
                 (int64_t)d * f->view.dim_stride;
    assert_true(at >= 0 && (size_t)at + 4 <= f->size);
    return (size_t)at;
}

#define FOR_EACH_ELEMENT(f, t0, t1, t, h, d)                                                                           \
    for (uint32_t t = t0; t < (t1); t++)                                                                               \
        for (uint32_t h = 0; h < (f)->plane.heads; h++)                                                                \
            for (uint32_t d = 0; d < (f)->plane.head_dim; d++)

static void check_floats(fixture *f, const xkv_kernels *k, uint32_t t0, uint32_t t1)
{
    const xkv_kernels *oracle = xkv_kernels_cpu_generic();
    size_t elem = xkv_dtype_size(f->view.dtype), width = (size_t)f->plane.heads * f->plane.head_dim, ld = width + 3;
    float *dense = calloc((t1 - t0) * ld + 1, sizeof *dense);
    assert_non_null(dense);
    xkv_view_gather(k, &f->view, &f->plane, t0, t1, dense, ld);
    FOR_EACH_ELEMENT(f, t0, t1, t, h, d)
    {
        float expected;
        oracle->to_f32(f->view.dtype, f->memory + place(f, t, h, d), &expected, 1);
        float *found = &dense[(t - t0) * ld + h * f->plane.head_dim + d];
        assert_memory_equal(&expected, found, 4);
        *found = *found * 1.25f + 0.5f;
    }
    for (uint32_t t = t0; t < t1; t++) /* nothing behind the rows is touched */
        assert_true(dense[(t - t0) * ld + width] == 0);
    xkv_view_scatter(k, dense, ld, &f->plane, t0, t1, &f->view);
    FOR_EACH_ELEMENT(f, t0, t1, t, h, d)
    {
        size_t at = place(f, t, h, d);
        uint8_t expected[4];
        oracle->from_f32(f->view.dtype, &dense[(t - t0) * ld + h * f->plane.head_dim + d], expected, 1);
        assert_memory_equal(expected, f->memory + at, elem);
        memcpy(f->memory + at, f->before + at, elem);
    }
    assert_memory_equal(f->memory, f->before, f->size); /* nothing else was written */
    free(dense);
}

static void check_bytes(fixture *f, uint32_t t0, uint32_t t1)
{
    size_t elem = xkv_dtype_size(f->view.dtype), row_bytes = f->plane.heads * f->plane.head_dim * elem + 5;
    uint8_t *dense = calloc((t1 - t0) * row_bytes + 1, 1);
    assert_non_null(dense);
    xkv_view_gather_bytes(&f->view, &f->plane, t0, t1, dense, row_bytes);
    FOR_EACH_ELEMENT(f, t0, t1, t, h, d)
    {
        uint8_t *found = dense + (t - t0) * row_bytes + (h * f->plane.head_dim + d) * elem;
        assert_memory_equal(f->memory + place(f, t, h, d), found, elem);
        for (size_t b = 0; b < elem; b++)
            found[b] ^= 0x5a;
    }
    xkv_view_scatter_bytes(dense, row_bytes, &f->plane, t0, t1, &f->view);
    FOR_EACH_ELEMENT(f, t0, t1, t, h, d)
    {
        size_t at = place(f, t, h, d);
        for (size_t b = 0; b < elem; b++)
            f->memory[at + b] ^= 0x5a;
    }
    assert_memory_equal(f->memory, f->before, f->size);
    free(dense);
}

static const uint32_t shapes[][2] = {{1, 64}, {3, 40}, {2, 33}, {5, 1}, {1, 1}};

static void test_gather_and_scatter(void **state)
{
    (void)state;
    const xkv_kernels *tables[] = {xkv_kernels_cpu_generic(), xkv_kernels_cpu_vector()};
    for (size_t k = 0; k < 2 && tables[k] != NULL; k++)
        for (size_t s = 0; s < 5; s++)
            for (uint32_t dtype = 0; dtype < 3; dtype++)
                for (int l = 0; l < LAYOUTS; l++)
                    for (int permutation = 0; permutation < 4; permutation++) {
                        fixture f;
                        setup(&f, shapes[s][0], shapes[s][1], dtype, (dtype + 1) % 3, (layout)l, permutation);
                        check_floats(&f, tables[k], 0, TOKENS);
                        check_floats(&f, tables[k], 13, 70);
                        check_floats(&f, tables[k], 5, 5);
                        teardown(&f);
                    }
}

static void test_bytes(void **state)
{
    (void)state;
    for (size_t s = 0; s < 5; s++)
        for (uint32_t dtype = 0; dtype < 3; dtype++)
            for (int l = 0; l < LAYOUTS; l++)
                for (int permutation = 0; permutation < 4; permutation++) {
                    fixture f;
                    setup(&f, shapes[s][0], shapes[s][1], dtype, dtype, (layout)l, permutation);
                    check_bytes(&f, 0, TOKENS);
                    check_bytes(&f, 13, 70);
                    teardown(&f);
                }
}

/* Block j of head h of token t, heads of `dim` elements: by the definition in xkv/format.h. */
static uint8_t *block_at(const xkv_view *v, uint32_t t, uint32_t h, uint32_t j)
{
    int64_t row = v->rows != NULL ? v->rows[t] : t;
    return (uint8_t *)v->data + row * v->token_stride + h * v->head_stride + j * (int64_t)xkv_dtype_size(v->dtype);
}

/* Rows of 192 elements in blocks, as heads of `dim`; the plane's own heads are of 48, which is no multiple of 32. */
static void check_blocks(const xkv_kernels *k, uint32_t dtype, uint32_t dim, int64_t token_stride, int64_t head_stride)
{
    enum { WIDTH = 192 };
    static const uint32_t rows[] = {3, 0, 4};
    static uint8_t memory[16384], before[sizeof memory];
    const xkv_plane plane = {.dtype = dtype, .heads = 4, .head_dim = 48, .rope = XKV_NO_ROPE};
    int64_t size = (int64_t)xkv_dtype_size(dtype);
    const xkv_view v = {memory + MARGIN + 1, token_stride, head_stride, size, rows, .dtype = dtype, .head_dim = dim};
    float dense[3 * (WIDTH + 1)], back[3 * (WIDTH + 1)] = {0};
    uint8_t bytes[3][WIDTH / 32 * 34];
    memset(memory, 0x5a, sizeof memory);
    memset(before, 0x5a, sizeof before);
    for (uint32_t i = 0; i < 3 * (WIDTH + 1); i++)
        dense[i] = sinf((float)i) * (float)(1 + i % 7);
    xkv_view_scatter(k, dense, WIDTH + 1, &plane, 0, 3, &v);
    xkv_view_gather(k, &v, &plane, 0, 3, back, WIDTH + 1);
    xkv_view_gather_bytes(&v, &plane, 0, 3, bytes[0], sizeof bytes[0]);
    for (uint32_t t = 0; t < 3; t++)
        for (uint32_t i = 0; i < WIDTH; i += 32) {
            uint8_t expected[34];
            float elements[32], *row = dense + t * (WIDTH + 1) + i;
            uint8_t *at = block_at(&v, t, i / dim, i % dim / 32);
            xkv_kernels_cpu_generic()->from_f32(dtype, row, expected, 32);
            xkv_kernels_cpu_generic()->to_f32(dtype, expected, elements, 32);
            assert_memory_equal(at, expected, (size_t)size);
            assert_memory_equal(back + t * (WIDTH + 1) + i, elements, sizeof elements);
            assert_memory_equal(bytes[t] + i / 32 * (size_t)size, expected, (size_t)size);
            memcpy(before + (at - memory), expected, (size_t)size);
        }
    assert_memory_equal(memory, before, sizeof memory); /* nothing else was written */
    memset(memory, 0x5a, sizeof memory);
    xkv_view_scatter_bytes(bytes[0], sizeof bytes[0], &plane, 0, 3, &v);
    assert_memory_equal(memory, before, sizeof memory);
}

static void test_blocks(void **state)
{
    (void)state;
    const xkv_kernels *tables[] = {xkv_kernels_cpu_generic(), xkv_kernels_cpu_vector()};
    for (size_t k = 0; k < 2 && tables[k] != NULL; k++)
        for (uint32_t dtype = XKV_Q8_0; dtype <= XKV_Q4_0; dtype++) {
            int64_t size = (int64_t)xkv_dtype_size(dtype);
            check_blocks(tables[k], dtype, 192, 6 * size, 0);       /* a row of blocks, whatever its heads */
            check_blocks(tables[k], dtype, 192, 7 * size + 3, 0);   /* in wider rows */
            check_blocks(tables[k], dtype, 64, 6 * size, 2 * size); /* heads of 64 behind each other */
            check_blocks(tables[k], dtype, 64, 9 * size, 3 * size); /* ... with gaps */
            check_blocks(tables[k], dtype, 32, size, 5 * size);     /* [head][token] */
        }
}

/* A view may count heads otherwise than the plane: [dim / 8][token][8], as some engines split keys. */
static void test_own_heads(void **state)
{
    (void)state;
    enum { GROUPS = 2 * 24 / 8 };
    static uint16_t memory[GROUPS][TOKENS][8];
    const xkv_plane plane = {.dtype = XKV_F16, .heads = 2, .head_dim = 24, .rope = XKV_NO_ROPE};
    const xkv_view v = {memory, sizeof memory[0][0], sizeof memory[0], 2, NULL, .dtype = XKV_F16, .head_dim = 8};
    uint16_t dense[TOKENS][48];
    for (uint32_t t = 0; t < TOKENS; t++)
        for (uint32_t i = 0; i < 48; i++)
            dense[t][i] = (uint16_t)(t * 48 + i);
    xkv_view_scatter_bytes((const uint8_t *)dense, sizeof dense[0], &plane, 0, TOKENS, &v);
    for (uint32_t t = 0; t < TOKENS; t++)
        for (uint32_t i = 0; i < 48; i++)
            assert_int_equal(memory[i / 8][t][i % 8], t * 48 + i);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_gather_and_scatter), cmocka_unit_test(test_bytes),
                                       cmocka_unit_test(test_blocks), cmocka_unit_test(test_own_heads)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
