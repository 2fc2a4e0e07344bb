/* What threads and warps do when they pack (pack_elements.h, warp_pack.h), lane after lane on the CPU: rows against
 * xkv_gather_rows(), integers against the CPU's quantizer, choices against xkv_table_choose(), streams against the
 * plain C encoder. */
#include "support.h"

#include "cpu/ops.h"
#include "device_planes.h"
#include "device_tables.h"
#include "pack_elements.h"
#include "rans.h"
#include "rows.h"
#include "warp_pack.h"

#include <math.h>
#include <stdlib.h>

/* --- Rows --------------------------------------------------------------------------------------------------------- */

static synthetic sample(uint32_t dtype, int rope)
{
    synthetic_options o = {.layers = 2,
                           .tokens = 37,
                           .heads = 3,
                           .head_dim = 20,
                           .dtype = dtype,
                           .mean = 2,
                           .rope = rope,
                           .first_position = 1000};
    return make_synthetic(&o);
}

static xkv_group all_planes(const synthetic *s, uint32_t *planes)
{
    xkv_group g = {.plane_count = s->geometry.plane_count, .planes = planes};

    for (uint32_t i = 0; i < g.plane_count; i++) {
        planes[i] = i;
        g.width += row_width(&s->planes[i]);
    }
    return g;
}

/* Rows [3, 37) as the kernels make them, with a mean taken off. */
static void gather(const synthetic *s, const xkv_group *g, const xkv_view *views, const float *mean, float *rows)
{
    xkv_plug_plane planes[8];
    uint32_t width = xkv_device_count_angles(&s->geometry, g), tokens = s->geometry.token_count - 3;
    float *angles = calloc((size_t)tokens * (width + 1), sizeof *angles);
    const xkv_rope *rope = s->geometry.rope_count > 0 ? &s->geometry.ropes[0] : NULL;

    xkv_device_list_planes(&s->geometry, g, views, (xkv_heads){0}, planes);
    for (uint32_t t = 0; rope && t < tokens; t++)
        xkv_rope_cos_sin(rope, s->geometry.positions[3 + t], true, angles + (size_t)t * width);
    xkv_plug_gather o = {planes, g->plane_count, tokens, 3, angles, width, mean, rows, g->width};
    for (uint32_t i = 0; i < g->plane_count; i++)
        for (uint32_t t = 0; t < tokens; t++)
            for (uint32_t item = 0; item < xkv_items_of(&planes[i], planes[i].heads); item++)
                xkv_gather_item(&o, &planes[i], t, item);
    free(angles);
}

static void test_gather(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    uint64_t seed = 1;

    (void)state;
    for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++)
        for (int rope = 0; rope < 2; rope++) {
            synthetic s = sample(dtype, rope);
            uint32_t planes[8], tokens = s.geometry.token_count - 3;
            xkv_group g = all_planes(&s, planes);
            size_t count = (size_t)tokens * g.width;
            float *expected = malloc(count * 4), *found = malloc(count * 4), *mean = malloc(g.width * 4);
            xkv_rotator r;
            for (uint32_t i = 0; i < g.width; i++)
                mean[i] = (float)test_normal(&seed);
            assert_ok(ctx, xkv_rotator_init(ctx, &s.geometry, xkv_kernels_cpu_generic(), true, &r));
            assert_ok(ctx, xkv_gather_rows(ctx, &r, &g, s.views, 3, 3 + tokens, expected));
            gather(&s, &g, s.views, NULL, found);
            for (size_t i = 0; i < count; i++) /* angles come from a table there, within 1e-15 */
                assert_true(fabsf(found[i] - expected[i]) <= 1e-6f * fmaxf(1, fabsf(expected[i])));
            gather(&s, &g, s.views, mean, expected);
            for (size_t i = 0; i < count; i++)
                assert_true(expected[i] == found[i] - mean[i % g.width]);
            xkv_rotator_free(ctx, &r);
            free(expected);
            free(found);
            free(mean);
            free_synthetic(&s);
        }
    xkv_ctx_free(ctx);
}

/* The first row of a plane, with one bad element. */
static void test_nonfinite(void **state)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    const xkv_kernels *k = xkv_kernels_cpu_generic();

    (void)state;
    for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++)
        for (uint32_t i = 0; i < 4; i++) {
            float row[6] = {1, -2, 65504, 0, 1e-6f, 3};
            _Alignas(4) uint8_t bytes[24];
            xkv_plug_plane p = {.heads = 2, .head_dim = 3};
            uint32_t found = 0;
            int64_t e = (int64_t)xkv_dtype_size(dtype);
            if (i < 3)
                row[2 * i] = bad[i];
            k->from_f32(dtype, row, bytes, 6);
            p.view = (xkv_view){.data = bytes, .head_stride = 3 * e, .dim_stride = e, .dtype = dtype};
            for (uint32_t j = 0; j < 6; j++)
                found |= xkv_is_nonfinite(&p, 0, j);
            assert_int_equal(found, i < 3);
        }
}

static void test_take(void **state)
{
    uint16_t elements[40], rows[4][12];
    const uint32_t map[] = {3, 2, 1, 0};
    xkv_plug_take o = {
        .view =
            {.data = elements, .token_stride = 20, .head_stride = 10, .dim_stride = 4, .rows = map, .dtype = XKV_BF16},
        .heads = 2,
        .head_dim = 2,
        .tokens = 3,
        .first = 1,
        .rows = (uint8_t *)(void *)rows,
        .row_bytes = sizeof *rows};

    (void)state;
    for (uint16_t i = 0; i < 40; i++)
        elements[i] = i;
    for (uint32_t t = 0; t < 3; t++)
        for (uint32_t e = 0; e < 4; e++) {
            xkv_take_element(&o, t, e);
            assert_int_equal(rows[t][e], 10 * (2 - t) + 5 * (e / 2) + 2 * (e % 2));
        }
}

/* Two halves of bf16 leave less than 2^-16 of a number, whatever its size. */
static void test_halve(void **state)
{
    enum { WIDTH = 1000 };
    static float rows[3][WIDTH];
    static uint16_t high[WIDTH], low[WIDTH];
    uint32_t index = 2;
    uint64_t seed = 3;
    xkv_plug_halve o = {rows[0], &index, WIDTH, 1, WIDTH, 0.37f, high, low};

    (void)state;
    for (uint32_t i = 0; i < WIDTH; i++)
        rows[2][i] = (float)(test_normal(&seed) * exp2((double)(test_random(&seed) % 160) - 80));
    for (uint32_t i = 0; i < WIDTH; i++) {
        xkv_halve_element(&o, 0, i);
        double x = (double)(rows[2][i] * 0.37f), left = x - test_from_bf16(high[i]) - test_from_bf16(low[i]);
        assert_true(fabs(left) <= fabs(x) * exp2(-16));
    }
    for (uint32_t q = 0; q < 32768; q++) { /* integers lose nothing */
        rows[0][0] = (float)q;
        o = (xkv_plug_halve){rows[0], NULL, WIDTH, 1, WIDTH, 1, high, low};
        xkv_halve_element(&o, 0, 0);
        assert_true(test_from_bf16(high[0]) + test_from_bf16(low[0]) == q);
    }
}

static void test_sums(void **state)
{
    enum { WIDTH = 77, TOKENS = 3 };
    static float rows[TOKENS][WIDTH], mean[WIDTH];
    const uint32_t begins[] = {0, 5, 70, WIDTH};
    double found[3][4];
    uint64_t seed = 5;

    (void)state;
    for (uint32_t t = 0; t < TOKENS; t++)
        for (uint32_t i = 0; i < WIDTH; i++)
            rows[t][i] = (float)test_normal(&seed);
    for (uint32_t i = 0; i < WIDTH; i++)
        mean[i] = (float)test_normal(&seed);
    for (int with = 0; with < 2; with++) {
        xkv_plug_sums o = {rows[0], with ? mean : NULL, begins, WIDTH, 4, 3, TOKENS, found[0]};
        for (uint32_t i = 0; i < 3; i++)
            for (uint32_t t = 0; t < TOKENS; t++) {
                double sum = 0;
                for (uint32_t c = begins[i]; c < begins[i + 1]; c++)
                    sum += pow((double)(with ? rows[t][c] + mean[c] : rows[t][c]), 2);
                xkv_warp_sum_squares(&o, i, t);
                assert_true(fabs(found[i][t] - sum) <= 1e-14 * sum);
            }
    }
}

/* --- Integers ----------------------------------------------------------------------------------------------------- */

static void check_quantize(const float *y, uint32_t n, float step)
{
    int16_t *found = malloc(n * sizeof *found), *expected = malloc(n * sizeof *expected);
    xkv_plug_stats stats[3] = {{0}};
    xkv_plug_quantize o = {y, n, found, n, 1, n, step, stats + 1, 1};
    bool fits = xkv_quantize(xkv_coder_cpu_generic(), y, n, step, expected);
    double energy = 0, error = 0;
    uint64_t magnitude = 0;

    xkv_warp_quantize(&o, 0);
    assert_int_equal(stats[1].outside == 0, fits);
    if (fits) {
        assert_memory_equal(found, expected, n * sizeof *found);
        for (uint32_t i = 0; i < n; i++) {
            energy += (double)y[i] * (double)y[i];
            error += pow((double)(y[i] - (float)expected[i] * step), 2);
            magnitude += (uint64_t)abs(expected[i]);
        }
        assert_true(fabs(stats[1].energy - energy) <= 1e-13 * energy);
        assert_true(fabs(stats[1].error - error) <= 1e-13 * error);
        assert_int_equal(stats[1].magnitude, magnitude);
    }
    free(found);
    free(expected);
}

static void test_quantizer(void **state)
{
    static float y[300];
    uint64_t seed = 7;

    (void)state;
    for (uint32_t n = 1; n < 300; n += 13) {
        for (uint32_t i = 0; i < n; i++)
            y[i] = (float)(test_normal(&seed) * exp2((double)(test_random(&seed) % 12)));
        y[n / 2] = 0.5f * 0.25f; /* ties */
        y[n / 3] = -2.5f * 0.25f;
        check_quantize(y, n, 0.25f);
        check_quantize(y, n, 1e-3f);
        y[n - 1] = 0.25f * 32767.5f;
        check_quantize(y, n, 0.25f);
        y[n - 1] = NAN;
        check_quantize(y, n, 0.25f);
    }
}

/* Counts of the device lead to the table that the integers themselves lead to, or it says that they do not. */
static bool check_choice(const int16_t *q, uint32_t n)
{
    static uint32_t counts[XKV_COUNT_SHIFTS * XKV_COUNT_BINS], held[XKV_COUNT_SHIFTS * XKV_COUNT_BINS];
    uint64_t magnitude = 0;
    uint32_t first, shifts, window, table, expected;
    double bits, expected_bits;

    for (uint32_t i = 0; i < n; i++)
        magnitude += (uint64_t)abs(q[i]);
    xkv_table_window(magnitude, n, &first, &shifts);
    assert_true(shifts <= XKV_COUNT_SHIFTS);
    window = first | shifts << 8;
    memset(counts, 0, sizeof counts);
    xkv_plug_count o = {q, n, n, 1, &window, counts};
    for (uint64_t t = 0; t < n; t += XKV_COUNT_TOKENS)
        xkv_warp_count(&o, 0, t, held);
    xkv_table_counts c = {counts, first, shifts, magnitude};
    expected = xkv_table_choose(q, n, &expected_bits);
    if (!xkv_table_choose_counted(&c, n, &table, &bits))
        return false;
    assert_int_equal(table, expected);
    assert_true(bits == expected_bits);
    return true;
}

static void test_choice(void **state)
{
    enum { MOST = 9000 };
    static int16_t q[MOST];
    static const uint32_t lengths[] = {1, 31, 256, 4096, 4097, MOST};
    uint64_t seed = 11;
    uint32_t known = 0, all = 0;

    (void)state;
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
        for (int rung = -8; rung < 60; rung++)
            for (int shape = 0; shape < 2; shape++) {
                uint32_t n = lengths[l];
                for (uint32_t i = 0; i < n; i++) {
                    double x = test_normal(&seed) * exp2(-3 + rung / 4.0);
                    if (shape == 1 && test_random(&seed) % 50 == 0)
                        x *= 300;
                    q[i] = (int16_t)fmax(-32767, fmin(32767, rint(x)));
                }
                known += check_choice(q, n);
                all++;
            }
    memset(q, 0, sizeof q);
    assert_true(check_choice(q, MOST));
    assert_true(known > all * 9 / 10);
}

/* --- Streams ------------------------------------------------------------------------------------------------------ */

static void test_stream(void **state)
{
    enum { ROWS = 5, MOST = 300 };
    static xkv_warp_encode_table tables[XKV_BASE_TABLES];
    static int16_t q[ROWS][MOST];
    static const uint8_t all[ROWS] = {200, 0, 13, 29, 13};
    uint8_t coded[4];
    uint64_t seed = 13;

    (void)state;
    xkv_device_encode_tables(tables);
    for (uint32_t tokens = 1; tokens <= MOST; tokens += 23) {
        xkv_rans_shape s = {tokens, ROWS, MOST, all};
        uint8_t *expected = malloc(xkv_rans_bound(&s));
        uint32_t end = 64 + 8 * tokens, n = 0;
        uint16_t *words = malloc(end * sizeof *words);
        xkv_warp_writer w;
        for (uint32_t i = 0; i < ROWS; i++)
            for (uint32_t t = 0; t < tokens; t++)
                q[i][t] = (int16_t)(test_normal(&seed) * (i == 0 ? 3000 : 4));
        size_t size = xkv_rans_encode(xkv_coder_cpu_generic(), &s, q[0], expected);
        for (uint32_t i = 0; i < ROWS; i++)
            if (all[i] != 0)
                coded[n++] = (uint8_t)i;
        xkv_warp_write_from(&w, words, end);
        for (uint32_t i = n; i-- > 0;) {
            xkv_warp_code code = xkv_device_code(all[coded[i]]);
            xkv_warp_encode_component(&w, &tables[code.table], code.shift, tokens, q[coded[i]]);
        }
        xkv_warp_write_states(&w, tokens < 32 ? tokens : 32);
        assert_int_equal(2 * (end - w.next), size);
        assert_memory_equal(words + w.next, expected, size);
        free(words);
        free(expected);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gather), cmocka_unit_test(test_nonfinite), cmocka_unit_test(test_take),
        cmocka_unit_test(test_halve),  cmocka_unit_test(test_sums),      cmocka_unit_test(test_quantizer),
        cmocka_unit_test(test_choice), cmocka_unit_test(test_stream),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
