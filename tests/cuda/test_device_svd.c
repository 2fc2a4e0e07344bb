/* The truncated SVD on the emulated device, or with XKV_GPU_PLUGIN on a genuine one: its error against the optimum,
 * which the eigenvalues of X^T X in f64 tell, on spectra of several kinds; orthonormal components; coefficients that
 * are X times them; what cannot be decomposed; failures of any call. */
#include "device_support.h"

#include "device_svd.h"
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

/* --- Matrices ----------------------------------------------------------------------------------------------------- */

typedef enum spectrum { SQUARE_ROOT, HARMONIC, EXPONENTIAL, DOMINANT_MEAN, SPECTRA } spectrum;

/* Random rows times random columns, weighted like the spectrum. */
static float *make_matrix(uint32_t rows, uint32_t cols, spectrum kind, uint64_t seed)
{
    float *x = calloc((size_t)rows * cols, sizeof *x), *row = malloc(rows * sizeof *row);
    float *column = malloc(cols * sizeof *column);

    for (uint32_t k = 0; k < cols; k++) {
        double s = kind == HARMONIC      ? 1.0 / (k + 1)
                   : kind == EXPONENTIAL ? exp(-8.0 * k / cols) + 0.01
                                         : pow(k + 1, -0.5);
        for (uint32_t i = 0; i < rows; i++)
            row[i] = (float)(s * test_normal(&seed));
        for (uint32_t i = 0; i < cols; i++)
            column[i] = (float)test_normal(&seed);
        for (size_t i = 0; i < (size_t)rows * cols; i++)
            x[i] += row[i / cols] * column[i % cols] + (kind == DOMINANT_MEAN && k == 0 ? 20.0f * column[i % cols] : 0);
    }
    free(row);
    free(column);
    return x;
}

/* Sum of squares that the best approximation of a rank leaves. */
static double optimum(xkv_ctx *ctx, const float *x, uint32_t rows, uint32_t cols, uint32_t rank)
{
    double *gram = calloc((size_t)cols * cols, sizeof *gram), *values = malloc(cols * sizeof *values), tail = 0;

    for (uint32_t t = 0; t < rows; t++)
        for (uint32_t i = 0; i < cols; i++)
            for (uint32_t j = 0; j < cols; j++)
                gram[i * cols + j] += (double)x[(size_t)t * cols + i] * (double)x[(size_t)t * cols + j];
    assert_ok(ctx, xkv_syevd(ctx, cols, gram, values));
    for (uint32_t i = 0; i < cols - rank; i++)
        tail += fmax(values[i], 0);
    free(gram);
    free(values);
    return tail;
}

/* --- The device --------------------------------------------------------------------------------------------------- */

/* A decomposition, on the host. */
typedef struct result {
    float *components, *coefficients;
    double *values;
    bool found;
} result;

static uint64_t fail_in; /* which call of the runtime in the decomposition fails; 0: none */
static uint64_t made;    /* calls in the last one */

static void *there(uint64_t size)
{
    void *p = NULL;

    assert_true(device->api->alloc(device->plug, size, &p) == XKV_OK);
    return p;
}

static xkv_status decompose(xkv_ctx *ctx, const float *x, uint32_t rows, uint32_t cols, uint32_t rank,
                            uint32_t iterations, result *r)
{
    uint64_t size = 0, a_size = 4ull * rows * rank, b_size = 4ull * cols * rank, x_size = 4ull * rows * cols;
    float *x_there = there(x_size), *a = there(a_size), *b = there(b_size);
    void *workspace = NULL;
    xkv_status status;

    *r = (result){malloc(b_size), malloc(a_size), calloc(rank, sizeof(double)), false};
    device_copy(x_there, x, x_size);
    xkv_device_svd o = {x_there, rows, cols, rank, iterations, b, a, r->values};
    made = control ? control->calls : 0;
    if (fail_in > 0)
        control->fail_at = made + fail_in;
    status = xkv_device_svd_size(ctx, device, &o, &size);
    if (status == XKV_OK)
        status = xkv_device_result(ctx, device, device->api->alloc(device->plug, size, &workspace));
    if (status == XKV_OK)
        status = xkv_device_svd_run(ctx, device, NULL, &o, workspace, &r->found);
    if (control) {
        made = control->calls - made;
        control->fail_at = 0;
    }
    if (status == XKV_OK) {
        device_copy(r->components, b, b_size);
        device_copy(r->coefficients, a, a_size);
    }
    device->api->release(device->plug, workspace);
    device->api->release(device->plug, x_there);
    device->api->release(device->plug, a);
    device->api->release(device->plug, b);
    return status;
}

static void free_result(result *r)
{
    free(r->components);
    free(r->coefficients);
    free(r->values);
}

/* --- Checks ------------------------------------------------------------------------------------------------------- */

static double dot(const float *a, const float *b, uint32_t n)
{
    double sum = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* Sum of squares of X - A B. */
static double left_over(const float *x, uint32_t rows, uint32_t cols, uint32_t rank, const result *r)
{
    double sum = 0;

    for (uint32_t t = 0; t < rows; t++)
        for (uint32_t i = 0; i < cols; i++) {
            double d = (double)x[(size_t)t * cols + i];
            for (uint32_t k = 0; k < rank; k++)
                d -= (double)r->coefficients[(size_t)t * rank + k] * (double)r->components[(size_t)k * cols + i];
            sum += d * d;
        }
    return sum;
}

static void check_factors(const float *x, uint32_t rows, uint32_t cols, uint32_t rank, const result *r)
{
    double norm = sqrt(dot(x, x, rows * cols) / rows);

    for (uint32_t i = 0; i < rank; i++) {
        double squares = 0;
        for (uint32_t j = 0; j <= i; j++)
            assert_true(fabs(dot(r->components + i * cols, r->components + j * cols, cols) - (i == j)) < 1e-5);
        for (uint32_t t = 0; t < rows; t++) {
            double a = (double)r->coefficients[(size_t)t * rank + i];
            assert_true(fabs(a - dot(x + (size_t)t * cols, r->components + i * cols, cols)) < 1e-3 * norm);
            squares += a * a;
        }
        assert_true(fabs(squares - r->values[i]) <= 1e-3 * r->values[0]);
        assert_true(i == 0 || r->values[i] <= r->values[i - 1]);
    }
}

/* `most`: of the optimum. */
static void check(xkv_ctx *ctx, uint32_t rows, uint32_t cols, uint32_t rank, uint32_t iterations, spectrum kind,
                  double most)
{
    float *x = make_matrix(rows, cols, kind, rows + cols + (uint32_t)kind);
    double best = sqrt(optimum(ctx, x, rows, cols, rank)), error;
    result r;

    assert_ok(ctx, decompose(ctx, x, rows, cols, rank, iterations, &r));
    assert_true(r.found);
    check_factors(x, rows, cols, rank, &r);
    error = sqrt(left_over(x, rows, cols, rank, &r));
    if (!(error <= most * best + 1e-4 * sqrt(dot(x, x, rows * cols))))
        fail_msg("%u x %u, rank %u, q = %u, spectrum %d: error %.4f of the optimum", rows, cols, rank, iterations,
                 (int)kind, error / best);
    free_result(&r);
    free(x);
}

static void test_error(void **state)
{
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (int kind = 0; kind < SPECTRA; kind++) {
        check(ctx, 400, 160, 20, 1, (spectrum)kind, 1.06);
        check(ctx, 400, 160, 20, 2, (spectrum)kind, 1.02);
        check(ctx, 61, 120, 9, 2, (spectrum)kind, 1.01);
    }
    xkv_ctx_free(ctx);
}

/* Blocks as wide as the matrix, or as high as it; several tiles. */
static void test_shapes(void **state)
{
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    check(ctx, 64, 16, 16, 1, HARMONIC, 1);
    check(ctx, 64, 16, 3, 1, HARMONIC, 1);
    check(ctx, 300, 1, 1, 1, HARMONIC, 1);
    check(ctx, 8300, 24, 2, 2, SQUARE_ROOT, 1.02);
    xkv_ctx_free(ctx);
}

/* Of what has not as many independent columns as the block the device says so, or its result is right. */
static void test_dependent(void **state)
{
    enum { ROWS = 80, COLS = 48, RANK = 8 };
    xkv_ctx *ctx = logging_ctx();
    float *x = calloc((size_t)ROWS * COLS, sizeof *x);
    result r;

    (void)state;
    assert_ok(ctx, decompose(ctx, x, ROWS, COLS, RANK, 2, &r)); /* zeros */
    assert_false(r.found);
    free_result(&r);
    for (uint32_t i = 0; i < ROWS * COLS; i++)
        x[i] = (float)((i / COLS) % 3) - (float)((i % COLS) % 2); /* rank 2 */
    assert_ok(ctx, decompose(ctx, x, ROWS, COLS, RANK, 2, &r));
    if (r.found)
        assert_true(left_over(x, ROWS, COLS, RANK, &r) < 1e-6 * dot(x, x, ROWS * COLS));
    free_result(&r);
    x[77] = NAN;
    assert_ok(ctx, decompose(ctx, x, ROWS, COLS, RANK, 1, &r));
    assert_false(r.found);
    free_result(&r);
    free(x);
    xkv_ctx_free(ctx);
}

/* The same bits every time. */
static void test_repeatable(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    float *x = make_matrix(100, 40, HARMONIC, 5);
    result a, b;

    (void)state;
    assert_ok(ctx, decompose(ctx, x, 100, 40, 6, 1, &a));
    assert_ok(ctx, decompose(ctx, x, 100, 40, 6, 1, &b));
    assert_memory_equal(a.components, b.components, 40 * 6 * sizeof(float));
    assert_memory_equal(a.coefficients, b.coefficients, 100 * 6 * sizeof(float));
    free_result(&a);
    free_result(&b);
    free(x);
    xkv_ctx_free(ctx);
}

static void test_failing_calls(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    float *x = make_matrix(60, 24, HARMONIC, 5);
    uint64_t calls, blocks = control->blocks;
    result r;

    (void)state;
    assert_ok(ctx, decompose(ctx, x, 60, 24, 4, 1, &r));
    free_result(&r);
    calls = made;
    assert_true(calls > 100);
    for (fail_in = 1; fail_in < calls - 3; fail_in++) { /* staging buffers may be waited for once less */
        control->error = fail_in % 2 ? cudaErrorInvalidValue : cudaErrorMemoryAllocation;
        xkv_status status = decompose(ctx, x, 60, 24, 4, 1, &r);
        assert_true(status == XKV_ERROR_BACKEND || status == XKV_ERROR_MEMORY);
        free_result(&r);
        assert_int_equal(control->blocks, blocks);
    }
    fail_in = 0;
    assert_ok(ctx, decompose(ctx, x, 60, 24, 4, 1, &r));
    check_factors(x, 60, 24, 4, &r);
    free_result(&r);
    free(x);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest everywhere[] = {
        cmocka_unit_test(test_error),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_dependent),
        cmocka_unit_test(test_repeatable),
    };
    const struct CMUnitTest told_to_fail[] = {cmocka_unit_test(test_failing_calls)};
    int failed;

    if (!find_device())
        return 77;
    failed = cmocka_run_group_tests_name("everywhere", everywhere, open_the_device, NULL);
    if (control != NULL)
        failed += cmocka_run_group_tests_name("told to fail", told_to_fail, NULL, NULL);
    return failed;
}
