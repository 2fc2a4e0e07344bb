/* test_panels.c - products with bases in panels, for every instruction set that runs here: against sums in f64, at odd
 * sizes and edges, with guards around the result; and that bits do not depend on what is computed beside them. */
#include "cpu/ops.h"
#include "panels.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>

/* The tile of AVX-512 in plain C, for processors without it. */
void add_wide_tile(const xkv_tile_product *p);
#define TILE add_wide_tile
#define TILE_TARGET
#define TILE_VECTOR 64
#define TILE_ROWS   12
#define TILE_COLS   XKV_AVX512_COLS
#include "cpu/panel_tile.h"

static const xkv_kernels wide = {.name = "wide", .panel_tile = {add_wide_tile, XKV_AVX512_COLS}};

#define GUARD 12345.0f

enum { ROWS = 97, TABLES = 5 };

static size_t all_tables(const xkv_kernels *list[TABLES])
{
    size_t n = 0;
    const xkv_kernels *tables[] = {xkv_kernels_cpu_generic(), xkv_kernels_cpu_avx2(), xkv_kernels_cpu_avx512(),
                                   xkv_kernels_cpu_neon(), &wide};

    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (tables[i])
            list[n++] = tables[i];
    return n;
}

static float next_value(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(int32_t)*state / 2147483648.0f;
}

typedef struct problem {
    xkv_ctx *ctx;
    size_t m, depth, cols;
    float *a; /* [depth][m] */
    float *b; /* [rows][cols] */
    uint32_t *pick;
    xkv_panels panels;
    float *strips;
} problem;

static void make(xkv_ctx *ctx, const xkv_kernels *k, size_t m, size_t depth, size_t cols, problem *p)
{
    uint32_t state = (uint32_t)(m * 31 + depth * 7 + cols);

    *p = (problem){.ctx = ctx, .m = m, .depth = depth, .cols = cols};
    p->a = malloc(depth * m * sizeof *p->a);
    p->b = malloc(ROWS * cols * sizeof *p->b);
    p->pick = malloc(depth * sizeof *p->pick);
    p->strips = malloc(xkv_strips_size(m, depth) * sizeof *p->strips);
    for (size_t i = 0; i < depth * m; i++)
        p->a[i] = next_value(&state);
    for (size_t i = 0; i < ROWS * cols; i++)
        p->b[i] = next_value(&state);
    for (size_t i = 0; i < depth; i++)
        p->pick[i] = (uint32_t)(i * 7 % ROWS);
    assert_int_equal(xkv_panels_create(ctx, k, ROWS, cols, &p->panels), XKV_OK);
    xkv_panels_set(&p->panels, 0, 1, p->b);
    xkv_panels_set(&p->panels, 1, ROWS - 1, p->b + cols);
    for (size_t i = 0; i < depth; i++)
        xkv_strips_set(p->strips, depth, i, p->a + i * m, 1, m);
}

static void unmake(problem *p)
{
    xkv_panels_free(p->ctx, &p->panels);
    free(p->a);
    free(p->b);
    free(p->pick);
    free(p->strips);
}

/* Columns [first, first + count) between guards, on top of what is there. */
static void check_columns(const problem *p, size_t first, size_t count)
{
    size_t ld = count + 3;
    float *c = malloc(p->m * ld * sizeof *c);

    for (size_t i = 0; i < p->m * ld; i++)
        c[i] = GUARD;
    xkv_multiply_panels(p->m, p->depth, p->strips, &p->panels, p->pick, first, count, c + 1, ld);
    for (size_t t = 0; t < p->m; t++)
        for (size_t i = 0; i < ld; i++) {
            double sum = GUARD, size = GUARD;
            for (size_t j = 0; j < p->depth && i >= 1 && i < count + 1; j++) {
                double term = (double)p->a[j * p->m + t] * (double)p->b[p->pick[j] * p->cols + first + i - 1];
                sum += term;
                size += fabs(term);
            }
            assert_true(fabs((double)c[t * ld + i] - sum) <= 1e-6 * size);
        }
    free(c);
}

/* All sizes up to a little over a strip, two panels and a block. */
static void test_products(void **state)
{
    const size_t tokens[] = {1, 5, 6, 7, 11, 12, 13, 24, 31}, depths[] = {1, 3, 255, 256, 257, 600},
                 widths[] = {1, 8, 15, 16, 31, 32, 33, 64, 96, 100};
    enum { DEPTHS = sizeof depths / sizeof *depths, WIDTHS = sizeof widths / sizeof *widths };
    const xkv_kernels *list[TABLES];
    size_t count = all_tables(list);

    for (size_t i = 0; i < count * (sizeof tokens / sizeof *tokens) * DEPTHS * WIDTHS; i++) {
        problem p;
        make(*state, list[i % count], tokens[i / count / DEPTHS / WIDTHS], depths[i / count / WIDTHS % DEPTHS],
             widths[i / count % WIDTHS], &p);
        check_columns(&p, 0, p.cols);
        if (p.cols > 20)
            check_columns(&p, 17, p.cols - 19);
        unmake(&p);
    }
}

/* The sum for one token and one column alone. */
static float lonely_sum(const problem *p, size_t token, size_t column)
{
    float sum = 0, *strips = malloc(xkv_strips_size(1, p->depth) * sizeof *strips);

    for (size_t k = 0; k < p->depth; k++)
        xkv_strips_set(strips, p->depth, k, p->a + k * p->m + token, 1, 1);
    xkv_multiply_panels(1, p->depth, strips, &p->panels, p->pick, column, 1, &sum, 1);
    free(strips);
    return sum;
}

static void test_bits_do_not_depend_on_neighbours(void **state)
{
    const xkv_kernels *list[TABLES];
    size_t count = all_tables(list);
    float all[40 * 100], one;
    problem p;

    for (size_t i = 0; i < count; i++) {
        make(*state, list[i], 40, XKV_DEPTH + 5, 100, &p);
        memset(all, 0, sizeof all);
        xkv_multiply_panels(p.m, p.depth, p.strips, &p.panels, p.pick, 0, p.cols, all, p.cols);
        for (size_t j = 0; j < p.m * p.cols; j += 37) {
            one = lonely_sum(&p, j / p.cols, j % p.cols);
            assert_memory_equal(&one, &all[j], sizeof one);
        }
        unmake(&p);
    }
}

static void test_rows_come_back(void **state)
{
    float row[77];
    problem p;

    make(*state, xkv_kernels_cpu(), 1, 1, 77, &p);
    for (size_t i = 0; i < ROWS; i++) {
        xkv_panels_get(&p.panels, i, 1, row);
        assert_memory_equal(row, p.b + i * p.cols, p.cols * sizeof *row);
    }
    assert_int_equal((uintptr_t)p.panels.data % 64, 0);
    assert_true(xkv_panels_finite(&p.panels, xkv_kernels_cpu()));
    row[76] = INFINITY;
    xkv_panels_set(&p.panels, 13, 1, row);
    assert_false(xkv_panels_finite(&p.panels, xkv_kernels_cpu()));
    unmake(&p);
}

static void test_strips_of_rows(void **state)
{
    const float rows[] = {1, 2, 3, 4, 5, 6}; /* [tokens 3][components 2] */
    float *strips = malloc(xkv_strips_size(15, 2) * sizeof *strips);

    (void)state;
    xkv_strips_set_rows(strips, 2, rows, 2, 3);
    xkv_strips_set_token(strips, 2, 14, &rows[4]);
    assert_float_equal(strips[2 * XKV_STRIP + 2], 5, 0);
    assert_float_equal(strips[3 * XKV_STRIP + 2], 6, 0);
    for (size_t k = 0; k < 2; k++)
        for (size_t t = 0; t < XKV_STRIP; t++)
            assert_float_equal(strips[k * XKV_STRIP + t], t < 3 ? rows[2 * t + k] : 0, 0);
    free(strips);
}

static int set_up(void **state)
{
    return xkv_ctx_create(NULL, (xkv_ctx **)state) == XKV_OK ? 0 : -1;
}

static int tear_down(void **state)
{
    xkv_ctx_free(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_bits_do_not_depend_on_neighbours),
        cmocka_unit_test(test_rows_come_back),
        cmocka_unit_test(test_strips_of_rows),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
