/* test_rope.c - angles against long double, rotation against the formula of spec/container.md, section 5. */
#include "cpu/ops.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>

static xkv_rope make_rope(uint32_t n_rot, uint32_t offset, uint32_t style, double scale, double base)
{
    xkv_rope rope = {.n_rot = n_rot, .offset = offset, .style = style, .scale = scale};
    for (uint32_t i = 0; i < n_rot / 2; i++)
        rope.inv_freq[i] = pow(base, -2.0 * i / n_rot);
    return rope;
}

/* cos and sin of position * inv_freq. The position is cut into pieces of 11 bits, whose products with a double are
 * exact in long double (64 bits); the angles are added by the addition theorems. */
static void exact_cos_sin(int32_t position, double inv_freq, long double *c, long double *s)
{
    long double cs = 1, sn = 0;
    int64_t rest = position;
    for (int64_t unit = INT64_C(1) << 22; unit > 0; unit >>= 11) {
        int64_t piece = rest / unit * unit;
        long double angle = (long double)piece * inv_freq, ca = cosl(angle), sa = sinl(angle), old = cs;
        cs = cs * ca - sn * sa;
        sn = sn * ca + old * sa;
        rest -= piece;
    }
    *c = cs;
    *s = sn;
}

/* Half a unit in the last place of f32 and the table's error before rounding. */
static void check_rounded(float found, long double exact)
{
    long double ulp = nextafterf(fabsf(found), INFINITY) - fabsf(found);
    if (fabsl(found - exact) > ulp / 2 + 2e-15L)
        fail_msg("%.9g instead of %.18Lg", (double)found, exact);
}

static const int32_t positions[] = {
    0,  1,    2,    255,  256,   257,       511, 4095,   65536,    131071,  1000003,  16777217,   INT32_MAX, -1,
    -2, -255, -256, -257, -1000, INT32_MIN, 7,   131000, -1000003, 8388607, 33554431, 1073741825, 3,         300};

static void check_angles(const xkv_rope *rope, bool inverse)
{
    xkv_ctx *ctx = NULL;
    xkv_rope_table *table = NULL;
    float direct[2 * XKV_MAX_ROPE_PAIRS], from_table[2 * XKV_MAX_ROPE_PAIRS];
    uint32_t pairs = rope->n_rot / 2;
    assert_int_equal(xkv_ctx_create(NULL, &ctx), XKV_OK);
    assert_int_equal(xkv_rope_table_create(ctx, rope, inverse, &table), XKV_OK);
    for (size_t p = 0; p < sizeof positions / sizeof *positions; p++) {
        xkv_rope_cos_sin(rope, positions[p], inverse, direct);
        xkv_rope_table_row(table, positions[p], from_table);
        for (uint32_t i = 0; i < pairs; i++) {
            long double c, s, scale = inverse ? 1 / (long double)rope->scale : (long double)rope->scale;
            exact_cos_sin(positions[p], rope->inv_freq[i], &c, &s);
            check_rounded(direct[i], c * scale);
            check_rounded(direct[pairs + i], s * scale);
            check_rounded(from_table[i], c * scale);
            check_rounded(from_table[pairs + i], s * scale);
        }
    }
    xkv_rope_table_free(ctx, table);
    xkv_rope_table_free(ctx, NULL);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    xkv_ctx_free(ctx);
}

static void test_angles(void **state)
{
    (void)state;
    xkv_rope ropes[] = {make_rope(64, 0, XKV_ROPE_INTERLEAVED, 1, 10000),
                        make_rope(128, 0, XKV_ROPE_HALF_SPLIT, 1, 1e6), make_rope(2, 0, 0, 1, 10000),
                        make_rope(1024, 0, 0, 0.7, 500000), make_rope(64, 0, 0, 1.27, 1e4)};
    ropes[4].inv_freq[3] = 64; /* the limits of the format */
    ropes[4].inv_freq[4] = -64;
    ropes[4].inv_freq[5] = 0;
    for (size_t i = 0; i < 5; i++) {
        check_angles(&ropes[i], false);
        check_angles(&ropes[i], true);
    }
}

/* The formula, in long double, out of place. */
static void rotate_exactly(const float *in, long double *out, uint32_t heads, uint32_t head_dim, const xkv_rope *rope,
                           const float *cos_sin, bool inverse)
{
    uint32_t pairs = rope->n_rot / 2;
    for (uint32_t i = 0; i < heads * head_dim; i++)
        out[i] = in[i];
    for (uint32_t h = 0; h < heads; h++) {
        for (uint32_t i = 0; i < pairs; i++) {
            bool half = rope->style == XKV_ROPE_HALF_SPLIT;
            uint32_t first = h * head_dim + rope->offset;
            uint32_t ia = first + (half ? i : 2 * i), ib = first + (half ? i + pairs : 2 * i + 1);
            long double a = in[ia], b = in[ib], c = cos_sin[i], s = cos_sin[pairs + i];
            out[ia] = inverse ? a * c + b * s : a * c - b * s;
            out[ib] = inverse ? b * c - a * s : a * s + b * c;
        }
    }
}

typedef struct shape {
    uint32_t heads, head_dim, n_rot, offset;
} shape;

static const shape shapes[] = {{1, 2, 2, 0},    {3, 64, 64, 0}, {2, 128, 128, 0},  {4, 64, 32, 0}, {2, 96, 48, 16},
                               {3, 80, 32, 48}, {5, 10, 6, 3},  {1, 576, 64, 512}, {2, 37, 24, 5}, {1, 1024, 1024, 0}};

static void check_rotation(const xkv_kernels *k, const shape *sh, uint32_t style, double scale, int32_t position)
{
    xkv_rope rope = make_rope(sh->n_rot, sh->offset, style, scale, 10000);
    uint32_t n = sh->heads * sh->head_dim;
    float x[1024] = {0}, y[1024] = {0}, generic[1024], cos_sin[1024], inverse_cos_sin[1024];
    long double expected[1024];
    for (uint32_t i = 0; i < n; i++)
        x[i] = y[i] = sinf((float)i * 1.7f + 0.3f) * 8;
    xkv_rope_cos_sin(&rope, position, false, cos_sin);
    xkv_rope_cos_sin(&rope, position, true, inverse_cos_sin);

    rotate_exactly(x, expected, sh->heads, sh->head_dim, &rope, cos_sin, false);
    k->rope_row(y, sh->heads, sh->head_dim, &rope, cos_sin, false);
    for (uint32_t i = 0; i < n; i++)
        assert_true(fabsl(y[i] - expected[i]) <= 8 * 1.5L * FLT_EPSILON * scale);
    memcpy(generic, x, sizeof generic);
    xkv_generic_rope_row(generic, sh->heads, sh->head_dim, &rope, cos_sin, false);
    assert_memory_equal(generic, y, n * sizeof *y);

    memcpy(generic, y, sizeof generic);
    rotate_exactly(y, expected, sh->heads, sh->head_dim, &rope, inverse_cos_sin, true);
    k->rope_row(y, sh->heads, sh->head_dim, &rope, inverse_cos_sin, true);
    xkv_generic_rope_row(generic, sh->heads, sh->head_dim, &rope, inverse_cos_sin, true);
    assert_memory_equal(generic, y, n * sizeof *y);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t dim = i % sh->head_dim;
        bool rotated = dim >= sh->offset && dim < sh->offset + sh->n_rot;
        assert_true(fabsl(y[i] - expected[i]) <= 8 * 1.5L * FLT_EPSILON);
        assert_true(rotated ? fabsf(y[i] - x[i]) <= 8 * 4 * FLT_EPSILON : y[i] == x[i]);
    }
}

static void test_rotation(void **state)
{
    (void)state;
    const xkv_kernels *tables[] = {xkv_kernels_cpu_generic(), xkv_kernels_cpu_vector()};
    for (size_t t = 0; t < 2 && tables[t] != NULL; t++) {
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            for (uint32_t style = 0; style < 2; style++) {
                check_rotation(tables[t], &shapes[i], style, 1, 1000);
                check_rotation(tables[t], &shapes[i], style, 1.27, 77);
                check_rotation(tables[t], &shapes[i], style, 0.5, -3);
            }
        }
    }
}

/* A known case by hand: a quarter turn takes (a, b) to (-b, a). */
static void test_quarter_turn(void **state)
{
    (void)state;
    xkv_rope rope = {.n_rot = 4, .offset = 0, .style = XKV_ROPE_INTERLEAVED, .scale = 2};
    rope.inv_freq[0] = rope.inv_freq[1] = acos(-1.0) / 2;
    float row[2][4] = {{1, 2, 3, 4}, {1, 2, 3, 4}}, cos_sin[4];
    xkv_rope_cos_sin(&rope, 1, false, cos_sin);
    xkv_kernels_cpu()->rope_row(row[0], 1, 4, &rope, cos_sin, false);
    rope.style = XKV_ROPE_HALF_SPLIT;
    xkv_kernels_cpu()->rope_row(row[1], 1, 4, &rope, cos_sin, false);
    const float expected[2][4] = {{-4, 2, -8, 6}, {-6, -8, 2, 4}};
    for (size_t i = 0; i < 8; i++)
        assert_true(fabsf(row[i / 4][i % 4] - expected[i / 4][i % 4]) < 1e-6f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_angles), cmocka_unit_test(test_rotation),
                                       cmocka_unit_test(test_quarter_turn)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
