/* test_kernels.c - operation tables: conversions for every bit pattern, sums, byte planes, GEMM, dispatch. */
#include "cpu/ops.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>

/* Every table that runs here. */
static size_t tables(const xkv_kernels *list[2])
{
    list[0] = xkv_kernels_cpu_generic();
    list[1] = xkv_kernels_cpu_vector();
    return list[1] != NULL ? 2 : 1;
}

#define FOR_EACH_TABLE(k)                                                                                              \
    const xkv_kernels *list_[2];                                                                                       \
    size_t count_ = tables(list_);                                                                                     \
    const xkv_kernels *k = list_[0];                                                                                   \
    for (size_t table_ = 0; table_ < count_ && (k = list_[table_]) != NULL; table_++)

static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state ^ *state >> 16;
}

/* --- Conversions -------------------------------------------------------------------------------------------------- */

/* A 16-bit float format: digits of the significand with the leading one, smallest normal exponent, bits below sign. */
typedef struct format16 {
    uint32_t dtype;
    int digits, least_exponent, mantissa_bits;
    double largest;
} format16;

static const format16 formats[] = {{XKV_F16, 11, -14, 10, 65504.0}, {XKV_BF16, 8, -126, 7, 0x1.fep127}};

/* IEEE 754's definition, in f64. */
static double decode(const format16 *f, uint16_t h)
{
    int bias = 1 - f->least_exponent, top = 2 * bias + 1;
    int exponent = (h & 0x7fff) >> f->mantissa_bits, mantissa = h & ((1 << f->mantissa_bits) - 1);
    double sign = h & 0x8000 ? -1.0 : 1.0;
    if (exponent == top)
        return mantissa ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0)
        return sign * ldexp(mantissa, f->least_exponent - f->mantissa_bits);
    return sign * ldexp((1 << f->mantissa_bits) + mantissa, exponent - bias - f->mantissa_bits);
}

/* Nearest value of the format, ties to even, finite values clamped. */
static double round_to(const format16 *f, double x)
{
    int exponent;
    if (isnan(x) || isinf(x) || x == 0)
        return x;
    frexp(x, &exponent);
    double quantum = ldexp(1, (exponent - 1 > f->least_exponent ? exponent - 1 : f->least_exponent) - f->digits + 1);
    double r = nearbyint(x / quantum) * quantum;
    return fabs(r) > f->largest ? copysign(f->largest, x) : r;
}

static void test_decode_every_pattern(void **state)
{
    (void)state;
    uint8_t *src = malloc(2 * 65536 + 1);
    float *out = malloc(65536 * sizeof *out);
    assert_true(src != NULL && out != NULL);
    for (uint32_t h = 0; h < 65536; h++)
        xkv_store16(src + 1 + 2 * h, (uint16_t)h); /* unaligned on purpose */
    FOR_EACH_TABLE(k)
    {
        for (size_t i = 0; i < 2; i++) {
            k->to_f32(formats[i].dtype, src + 1, out, 65536);
            for (uint32_t h = 0; h < 65536; h++) {
                double expected = decode(&formats[i], (uint16_t)h);
                if (isnan(expected))
                    assert_true(isnan(out[h]));
                else
                    assert_true(out[h] == expected && !signbit(out[h]) == !signbit(expected));
            }
        }
    }
    free(out);
    free(src);
}

/* Convert n values and compare each with the oracle. */
static void check_encode(const xkv_kernels *k, const format16 *f, const float *x, size_t n)
{
    uint8_t buffer[64 * 2 + 1];
    assert_true(n <= 64);
    k->from_f32(f->dtype, x, buffer + 1, n);
    for (size_t i = 0; i < n; i++) {
        double expected = round_to(f, x[i]), found = decode(f, xkv_load16(buffer + 1 + 2 * i));
        if (isnan(expected))
            assert_true(isnan(found));
        else if (found != expected || signbit(found) != signbit(expected))
            fail_msg("%s, dtype %u: %a became %a, expected %a", k->name, f->dtype, (double)x[i], found, expected);
    }
}

/* Each finite value, its neighbours in f32, and the halfway points above with theirs. */
static void test_encode_around_every_value(void **state)
{
    (void)state;
    FOR_EACH_TABLE(k)
    {
        for (size_t i = 0; i < 2; i++) {
            const format16 *f = &formats[i];
            for (uint32_t h = 0; h < 65536; h++) {
                double value = decode(f, (uint16_t)h), next = decode(f, (uint16_t)(h + 1));
                float half = (float)(value + (isfinite(next) ? (next - value) / 2 : value * ldexp(1, -f->digits - 1)));
                float v = (float)value;
                float x[17] = {v,    nextafterf(v, INFINITY),    nextafterf(v, -INFINITY),
                               half, nextafterf(half, INFINITY), nextafterf(half, -INFINITY)};
                for (size_t j = 6; j < 17; j++)
                    x[j] = x[j - 6];
                check_encode(k, f, x, 17); /* a vector of 16 and a tail */
            }
        }
    }
}

static void test_encode_random_patterns(void **state)
{
    (void)state;
    FOR_EACH_TABLE(k)
    {
        uint32_t seed = 1;
        for (size_t round = 0; round < 20000; round++) {
            float x[19];
            for (size_t i = 0; i < 19; i++) {
                uint32_t bits = next_random(&seed);
                memcpy(&x[i], &bits, 4);
            }
            check_encode(k, &formats[round % 2], x, 19);
        }
    }
}

static void test_encode_limits(void **state)
{
    (void)state;
    const float x[] = {65504.0f,  65519.0f, 65520.0f, 1e30f, -65520.0f, FLT_MAX,  -FLT_MAX,   INFINITY,
                       -INFINITY, NAN,      0.0f,     -0.0f, 0x1p-24f,  0x1p-25f, 0x1.8p-25f, FLT_TRUE_MIN};
    const uint16_t f16[] = {0x7bff, 0x7bff, 0x7bff, 0x7bff, 0xfbff, 0x7bff, 0xfbff, 0x7c00,
                            0xfc00, 0,      0,      0x8000, 1,      0,      1,      0};
    FOR_EACH_TABLE(k)
    {
        uint8_t out[32];
        k->from_f32(XKV_F16, x, out, 16);
        for (size_t i = 0; i < 16; i++)
            if (!isnan(x[i]))
                assert_int_equal(xkv_load16(out + 2 * i), f16[i]);
        k->from_f32(XKV_BF16, x, out, 16);
        assert_int_equal(xkv_load16(out + 10), 0x7f7f);
        assert_int_equal(xkv_load16(out + 12), 0xff7f);
        assert_int_equal(xkv_load16(out + 14), 0x7f80);
    }
}

static void test_tables_agree_on_nan_bits(void **state)
{
    (void)state;
    const xkv_kernels *list[2];
    if (tables(list) < 2)
        skip();
    uint32_t seed = 5;
    for (size_t round = 0; round < 4000; round++) {
        float x[16], wide[2][16];
        uint8_t out[2][32];
        for (size_t i = 0; i < 16; i++) {
            uint32_t bits = next_random(&seed) | 0x7f800000u;
            memcpy(&x[i], &bits, 4);
        }
        for (uint32_t dtype = XKV_F16; dtype <= XKV_BF16; dtype++) {
            for (size_t t = 0; t < 2; t++) {
                list[t]->from_f32(dtype, x, out[t], 16);
                list[t]->to_f32(dtype, out[t], wide[t], 16);
            }
            assert_memory_equal(out[0], out[1], 32);
            assert_memory_equal(wide[0], wide[1], sizeof wide[0]);
        }
    }
}

static void test_f32_passes_unchanged(void **state)
{
    (void)state;
    float x[37], y[37];
    uint8_t bytes[37 * 4 + 1];
    for (size_t i = 0; i < 37; i++)
        x[i] = (float)i * 1.37f - 3;
    FOR_EACH_TABLE(k)
    {
        k->from_f32(XKV_F32, x, bytes + 1, 37);
        k->to_f32(XKV_F32, bytes + 1, y, 37);
        assert_memory_equal(x, y, sizeof x);
        assert_true(xkv_loadf32(bytes + 1 + 4 * 36) == x[36]);
    }
}

static void test_all_finite(void **state)
{
    (void)state;
    const uint32_t bad[3][3] = {
        {0x7f800000u, 0xff800000u, 0x7fc00001u}, {0x7c00, 0xfc00, 0x7c01}, {0x7f80, 0xff80, 0xffff}};
    const uint32_t good[3] = {0x7f7fffffu, 0x7bff, 0x7f7f};
    FOR_EACH_TABLE(k)
    {
        for (uint32_t dtype = 0; dtype < 3; dtype++) {
            size_t elem = dtype == XKV_F32 ? 4 : 2;
            for (size_t n = 0; n < 70; n++) {
                uint8_t bytes[70 * 4 + 1];
                for (size_t i = 0; i < n; i++)
                    elem == 4 ? xkv_store32(bytes + 1 + 4 * i, good[dtype])
                              : xkv_store16(bytes + 1 + 2 * i, (uint16_t)good[dtype]);
                assert_true(k->all_finite(dtype, bytes + 1, n));
                if (n == 0)
                    continue;
                size_t place = n * 7 % n + n / 3;
                uint32_t value = bad[dtype][n % 3];
                elem == 4 ? xkv_store32(bytes + 1 + 4 * place, value)
                          : xkv_store16(bytes + 1 + 2 * place, (uint16_t)value);
                assert_false(k->all_finite(dtype, bytes + 1, n));
            }
        }
    }
}

/* --- Sums and GEMM ------------------------------------------------------------------------------------------------ */

static void test_sums(void **state)
{
    (void)state;
    float a[1000], b[1000];
    uint32_t seed = 3;
    for (size_t i = 0; i < 1000; i++) {
        a[i] = (float)(int32_t)next_random(&seed) * 1e-7f;
        b[i] = (float)(int32_t)next_random(&seed) * 1e-9f;
    }
    const xkv_kernels *generic = xkv_kernels_cpu_generic();
    FOR_EACH_TABLE(k)
    {
        for (size_t n = 0; n <= 1000; n = n < 40 ? n + 1 : n + 97) {
            long double squares = 0, differences = 0;
            for (size_t i = 0; i < n; i++) {
                squares += (long double)a[i] * a[i];
                differences += ((long double)a[i] - b[i]) * ((long double)a[i] - b[i]);
            }
            assert_true(fabsl(k->sum_squares(a, n) - squares) <= 1e-14L * squares);
            assert_true(fabsl(k->sum_squared_difference(a, b, n) - differences) <= 1e-14L * differences);
            assert_true(k->sum_squares(a, n) == generic->sum_squares(a, n));
            assert_true(k->sum_squared_difference(a, b, n) == generic->sum_squared_difference(a, b, n));
        }
    }
}

static void test_gemm(void **state)
{
    (void)state;
    enum { M = 7, N = 5, K = 11, LDA = 13, LDB = 6, LDC = 9 };
    float a[K * LDA], at[K * LDA], b[K * LDB], c[2][M * LDC];
    uint32_t seed = 9;
    for (size_t i = 0; i < K * LDB; i++)
        b[i] = (float)(next_random(&seed) % 17) - 8;
    for (size_t m = 0; m < M; m++)
        for (size_t k = 0; k < K; k++)
            a[m * LDA + k] = at[k * LDA + m] = (float)(next_random(&seed) % 17) - 8;
    FOR_EACH_TABLE(table)
    {
        for (int beta = 0; beta < 2; beta++) {
            for (size_t i = 0; i < M * LDC; i++)
                c[0][i] = c[1][i] = 100;
            table->gemm_nn(M, N, K, a, LDA, b, LDB, (float)beta, c[0], LDC);
            table->gemm_tn(M, N, K, at, LDA, b, LDB, (float)beta, c[1], LDC);
            for (size_t m = 0; m < M; m++) {
                for (size_t n = 0; n < LDC; n++) {
                    float sum = n < N ? 100.0f * (float)beta : 100.0f; /* small integers: exact */
                    for (size_t k = 0; k < K && n < N; k++)
                        sum += a[m * LDA + k] * b[k * LDB + n];
                    assert_true(c[0][m * LDC + n] == sum && c[1][m * LDC + n] == sum);
                }
            }
        }
    }
}

/* --- Byte planes -------------------------------------------------------------------------------------------------- */

static void check_planes(const xkv_kernels *k, size_t rows, size_t cols, size_t elem)
{
    size_t count = rows * cols, size = count * elem;
    uint8_t *src = malloc(size + 1), *planes = malloc(size + 1), *back = malloc(size + 1);
    uint32_t seed = (uint32_t)(rows * 131 + cols);
    assert_true(src != NULL && planes != NULL && back != NULL);
    for (size_t i = 0; i < size; i++)
        src[i] = (uint8_t)next_random(&seed);
    planes[size] = back[size] = 0xa5;
    k->split_bytes(src, rows, cols, elem, planes);
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            for (size_t b = 0; b < elem; b++)
                assert_int_equal(planes[b * count + (b == elem - 1 ? c * rows + r : r * cols + c)],
                                 src[(r * cols + c) * elem + b]);
    k->join_bytes(planes, rows, cols, elem, back);
    assert_memory_equal(src, back, size);
    assert_int_equal(planes[size], 0xa5);
    assert_int_equal(back[size], 0xa5);
    free(src);
    free(planes);
    free(back);
}

static void test_byte_planes(void **state)
{
    (void)state;
    const size_t sides[] = {1, 2, 15, 16, 17, 31, 32, 33, 64, 67, 100};
    enum { SIDES = sizeof sides / sizeof *sides };
    FOR_EACH_TABLE(k)
    {
        for (size_t i = 0; i < SIDES * SIDES; i++) {
            check_planes(k, sides[i / SIDES], sides[i % SIDES], 2);
            check_planes(k, sides[i / SIDES], sides[i % SIDES], 4);
        }
        check_planes(k, 0, 5, 2);
    }
}

static void test_names(void **state)
{
    (void)state;
    const char *wanted = getenv("XKV_CPU");
    const char *best = xkv_kernels_cpu_vector() != NULL ? xkv_kernels_cpu_vector()->name : "generic";
    bool generic = wanted != NULL && strcmp(wanted, "generic") == 0;
    assert_string_equal(xkv_kernels_cpu_name(), generic ? "generic" : best);
    assert_ptr_equal(xkv_kernels_cpu(), xkv_kernels_cpu());
    assert_non_null(strstr(xkv_kernels_blas_name(), "OpenBLAS"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_decode_every_pattern),
        cmocka_unit_test(test_encode_around_every_value),
        cmocka_unit_test(test_encode_random_patterns),
        cmocka_unit_test(test_encode_limits),
        cmocka_unit_test(test_tables_agree_on_nan_bits),
        cmocka_unit_test(test_f32_passes_unchanged),
        cmocka_unit_test(test_all_finite),
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_byte_planes),
        cmocka_unit_test(test_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
