/* test_svd.c - the truncated SVD against an fp64 Jacobi SVD at small sizes and against matrices of known spectrum. */
#include "kernels.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>

/* --- Matrices ----------------------------------------------------------------------------------------------------- */

static double random_unit(uint64_t *state) /* -1 .. 1 */
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (double)(int64_t)(*state >> 11 << 11) / 0x1p63;
}

static void *checked_calloc(size_t n, size_t size)
{
    void *p = calloc(n, size);
    assert_non_null(p);
    return p;
}

static float *random_matrix(size_t rows, size_t cols, uint64_t seed)
{
    float *x = checked_calloc(rows * cols, sizeof *x);
    for (size_t i = 0; i < rows * cols; i++)
        x[i] = (float)random_unit(&seed);
    return x;
}

/* `count` orthonormal rows of length n: random ones, Gram-Schmidt twice. */
static double *orthonormal_rows(size_t count, size_t n, uint64_t seed)
{
    double *q = checked_calloc(count * n, sizeof *q);
    for (size_t i = 0; i < count; i++) {
        double *row = q + i * n, norm = 0;
        for (size_t c = 0; c < n; c++)
            row[c] = random_unit(&seed);
        for (size_t twice = 0; twice < 2; twice++) {
            for (size_t j = 0; j < i; j++) {
                double dot = 0;
                for (size_t c = 0; c < n; c++)
                    dot += row[c] * q[j * n + c];
                for (size_t c = 0; c < n; c++)
                    row[c] -= dot * q[j * n + c];
            }
        }
        for (size_t c = 0; c < n; c++)
            norm += row[c] * row[c];
        for (size_t c = 0; c < n; c++)
            row[c] /= sqrt(norm);
    }
    return q;
}

/* X = sum over k of sigma_k u_k v_k^T. */
static float *compose(size_t rows, size_t cols, size_t count, const double *u, const double *v, const double *sigma)
{
    float *x = checked_calloc(rows * cols, sizeof *x);
    double *row = checked_calloc(cols, sizeof *row);
    for (size_t r = 0; r < rows; r++) {
        memset(row, 0, cols * sizeof *row);
        for (size_t k = 0; k < count; k++)
            for (size_t c = 0; c < cols; c++)
                row[c] += sigma[k] * u[k * rows + r] * v[k * cols + c];
        for (size_t c = 0; c < cols; c++)
            x[r * cols + c] = (float)row[c];
    }
    free(row);
    return x;
}

/* --- Oracle ------------------------------------------------------------------------------------------------------- */

/* Rotate columns i and j of a [m, n] (column-major) to make them orthogonal; false when they are. */
static bool jacobi_rotate(double *a, size_t m, size_t i, size_t j)
{
    double *x = a + i * m, *y = a + j * m, alpha = 0, beta = 0, gamma = 0;
    for (size_t k = 0; k < m; k++) {
        alpha += x[k] * x[k];
        beta += y[k] * y[k];
        gamma += x[k] * y[k];
    }
    if (fabs(gamma) <= 1e-15 * sqrt(alpha * beta))
        return false;
    double zeta = (beta - alpha) / (2 * gamma);
    double t = copysign(1, zeta) / (fabs(zeta) + sqrt(1 + zeta * zeta)), c = 1 / sqrt(1 + t * t), s = c * t;
    for (size_t k = 0; k < m; k++) {
        double old = x[k];
        x[k] = c * old - s * y[k];
        y[k] = s * old + c * y[k];
    }
    return true;
}

static int falling(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* Singular values of x, falling, by one-sided Jacobi rotations of its columns (of its rows when these are fewer). */
static double *jacobi_values(const float *x, size_t rows, size_t cols)
{
    bool by_rows = rows < cols;
    size_t m = by_rows ? cols : rows, n = by_rows ? rows : cols;
    double *a = checked_calloc(m * n, sizeof *a), *values = checked_calloc(n, sizeof *values);
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < m; k++)
            a[i * m + k] = by_rows ? x[i * cols + k] : x[k * cols + i];
    bool rotated = true;
    for (int sweep = 0; sweep < 60 && rotated; sweep++) {
        rotated = false;
        for (size_t i = 0; i + 1 < n; i++)
            for (size_t j = i + 1; j < n; j++)
                rotated |= jacobi_rotate(a, m, i, j);
    }
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < m; k++)
            values[i] += a[i * m + k] * a[i * m + k];
        values[i] = sqrt(values[i]);
    }
    qsort(values, n, sizeof *values, falling);
    free(a);
    return values;
}

static double tail_norm(const double *sigma, size_t count, size_t rank)
{
    double sum = 0;
    for (size_t k = rank; k < count; k++)
        sum += sigma[k] * sigma[k];
    return sqrt(sum);
}

/* --- Running and checking ----------------------------------------------------------------------------------------- */

static xkv_status run_svd(const float *x, size_t rows, size_t cols, uint32_t threads, xkv_svd_options o,
                          xkv_svd_result *r)
{
    xkv_ctx *ctx = NULL;
    xkv_pool *pool = NULL;
    assert_int_equal(xkv_ctx_create(NULL, &ctx), XKV_OK);
    assert_int_equal(xkv_pool_create(ctx, threads, &pool), XKV_OK);
    xkv_svd_result own = {0};
    xkv_status status = xkv_svd(ctx, pool, xkv_kernels_cpu(), x, rows, cols, &o, &own);
    *r = own; /* the arrays are copied out, so that the context can be checked for leaks */
    if (status == XKV_OK) {
        r->components = checked_calloc(own.rank * cols, 4);
        r->coefficients = checked_calloc(own.rank * rows, 4);
        r->singular_values = checked_calloc(own.rank, 4);
        memcpy(r->components, own.components, own.rank * cols * 4);
        memcpy(r->coefficients, own.coefficients, own.rank * rows * 4);
        memcpy(r->singular_values, own.singular_values, own.rank * 4);
        xkv_svd_result_free(ctx, &own);
    }
    xkv_pool_free(ctx, pool);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    xkv_ctx_free(ctx);
    return status;
}

static void free_result(xkv_svd_result *r)
{
    free(r->components);
    free(r->coefficients);
    free(r->singular_values);
    memset(r, 0, sizeof *r);
}

static double norm_of(const float *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

/* ||X - A B||, in f64. */
static double residual_norm(const float *x, size_t rows, size_t cols, const xkv_svd_result *r)
{
    double *row = checked_calloc(cols, sizeof *row), sum = 0;
    for (size_t t = 0; t < rows; t++) {
        for (size_t c = 0; c < cols; c++)
            row[c] = x[t * cols + c];
        for (size_t j = 0; j < r->rank; j++) {
            double a = r->coefficients[t * r->rank + j];
            const float *b = r->components + j * cols;
            for (size_t c = 0; c < cols; c++)
                row[c] -= a * (double)b[c];
        }
        for (size_t c = 0; c < cols; c++)
            sum += row[c] * row[c];
    }
    free(row);
    return sqrt(sum);
}

/* What holds for every result: orthonormal components, falling values, the energy identity. Returns ||X - A B||. */
static double check_result(const float *x, size_t rows, size_t cols, const xkv_svd_result *r)
{
    assert_true(r->rank >= 1 && r->rank <= rows && r->rank <= cols);
    for (size_t i = 0; i < r->rank; i++) {
        for (size_t j = 0; j <= i; j++) {
            double dot = 0;
            for (size_t c = 0; c < cols; c++)
                dot += (double)r->components[i * cols + c] * (double)r->components[j * cols + c];
            if (fabs(dot - (i == j)) >= 1e-6)
                fail_msg("components %zu and %zu: product %.9f", i, j, dot);
        }
        assert_true(i == 0 || r->singular_values[i] <= r->singular_values[i - 1]);
    }
    double norm = norm_of(x, rows * cols), residual = residual_norm(x, rows, cols, r), captured = 0;
    for (size_t i = 0; i < r->rank; i++)
        captured += (double)r->singular_values[i] * (double)r->singular_values[i];
    assert_true(fabs(r->energy - norm * norm) <= 1e-12 * norm * norm);
    assert_true(fabs(r->captured - captured) <= 1e-6 * r->energy);
    if (fabs(r->captured + residual * residual - r->energy) > 1e-5 * r->energy)
        fail_msg("energy %.9g, captured %.9g, residual %.9g", r->energy, r->captured, residual * residual);
    return residual;
}

/* Error of rank `rank` relative to the optimum; everything else is checked on the way. */
static double error_ratio(const float *x, size_t rows, size_t cols, const double *sigma, uint32_t rank,
                          uint32_t iterations)
{
    xkv_svd_result r;
    assert_int_equal(run_svd(x, rows, cols, 2, (xkv_svd_options){.rank = rank, .iterations = iterations}, &r), XKV_OK);
    assert_int_equal(r.rank, rank);
    double ratio = check_result(x, rows, cols, &r) / tail_norm(sigma, rows < cols ? rows : cols, rank);
    free_result(&r);
    return ratio;
}

/* --- Tests -------------------------------------------------------------------------------------------------------- */

static void test_against_jacobi(void **state)
{
    (void)state;
    const size_t sizes[][2] = {{60, 40}, {40, 60}, {128, 96}, {33, 33}, {300, 24}, {24, 300}};
    for (size_t i = 0; i < 6; i++) {
        size_t rows = sizes[i][0], cols = sizes[i][1], smaller = rows < cols ? rows : cols;
        float *x = random_matrix(rows, cols, i + 1);
        for (size_t t = 0; t < rows; t++) /* columns of unlike weight: a falling spectrum */
            for (size_t c = 0; c < cols; c++)
                x[t * cols + c] /= (float)(c + 1);
        double *sigma = jacobi_values(x, rows, cols);
        for (uint32_t rank = 1; rank < smaller; rank += 7) {
            double ratio = error_ratio(x, rows, cols, sigma, rank, 2);
            if (!(ratio >= 1 - 1e-4 && ratio <= 1.02))
                fail_msg("%zu x %zu, rank %u: %.5f of the optimum", rows, cols, rank, ratio);
        }
        xkv_svd_result r;
        xkv_svd_options all = {.rank = (uint32_t)(rows + cols), .iterations = 1};
        assert_int_equal(run_svd(x, rows, cols, 2, all, &r), XKV_OK);
        assert_int_equal(r.rank, smaller);
        assert_true(check_result(x, rows, cols, &r) <= 2e-6 * sqrt(r.energy));
        for (size_t k = 0; k < smaller; k++)
            assert_true(fabs((double)r.singular_values[k] - sigma[k]) <= 1e-6 * sigma[0]);
        free_result(&r);
        free(sigma);
        free(x);
    }
}

enum { ROWS = 1024, COLS = 256 };
static double *left, *right; /* orthonormal factors of the matrices of known spectrum */

static int make_factors(void **state)
{
    (void)state;
    left = orthonormal_rows(COLS, ROWS, 11);
    right = orthonormal_rows(COLS, COLS, 12);
    return 0;
}

static int free_factors(void **state)
{
    (void)state;
    free(left);
    free(right);
    return 0;
}

typedef struct spectrum {
    const char *name;
    double (*sigma)(double k); /* k = 1 .. COLS */
    double once, twice;        /* bounds of the error with 1 and 2 iterations, relative to the optimum */
} spectrum;

static double root(double k)
{
    return 1 / sqrt(k);
}
static double inverse(double k)
{
    return 1 / k;
}
static double dominant_mean(double k)
{
    return k == 1 ? 30 : 1 / sqrt(k);
}
static double exponential(double k)
{
    return exp(-8 * k / COLS) + 0.01;
}
static double outliers(double k)
{
    return pow(k, -1.5) * (k <= 3 ? 100 : 1);
}

static void test_known_spectra(void **state)
{
    (void)state;
    const spectrum spectra[] = {{"k^-0.5", root, 1.048, 1.015},
                                {"k^-1", inverse, 1.037, 1.009},
                                {"dominant mean", dominant_mean, 1.048, 1.016},
                                {"exp + floor", exponential, 1.054, 1.014},
                                {"outliers", outliers, 1.11, 1.07}};
    for (size_t i = 0; i < 5; i++) {
        double sigma[COLS];
        for (size_t k = 0; k < COLS; k++)
            sigma[k] = spectra[i].sigma((double)k + 1);
        float *x = compose(ROWS, COLS, COLS, left, right, sigma);
        for (uint32_t rank = COLS / 8; rank <= COLS / 4; rank += COLS / 8) {
            double once = error_ratio(x, ROWS, COLS, sigma, rank, 1),
                   twice = error_ratio(x, ROWS, COLS, sigma, rank, 2);
            print_message("%-14s rank %3u: q=1 %.4f, q=2 %.4f of the optimum\n", spectra[i].name, rank, once, twice);
            assert_true(once >= 1 - 1e-4 && once <= spectra[i].once);
            assert_true(twice >= 1 - 1e-4 && twice <= spectra[i].twice && twice <= once + 1e-4);
        }
        free(x);
    }
}

static void test_energy_target(void **state)
{
    (void)state;
    double sigma[COLS], total = 0;
    for (size_t k = 0; k < COLS; k++) {
        sigma[k] = inverse((double)k + 1);
        total += sigma[k] * sigma[k];
    }
    float *x = compose(ROWS, COLS, COLS, left, right, sigma);
    const double targets[] = {0.3, 0.9, 0.98, 0.99, 0.995, 0.9999, 1};
    for (size_t i = 0; i < 7; i++) {
        xkv_svd_result r;
        xkv_svd_options o = {.energy = targets[i], .iterations = 2};
        uint32_t least = 1;
        while (least < COLS && total - pow(tail_norm(sigma, COLS, least), 2) < targets[i] * total)
            least++;
        assert_int_equal(run_svd(x, ROWS, COLS, 2, o, &r), XKV_OK);
        check_result(x, ROWS, COLS, &r);
        assert_true(r.captured >= targets[i] * r.energy * (1 - 1e-6));
        assert_true(r.rank + 1 >= least && r.rank <= least + least / 50 + 1); /* +- 1: values of f32 */
        if (r.rank > 4) {                                                     /* max_rank stops it */
            uint32_t cut = r.rank / 2;
            free_result(&r);
            o.max_rank = cut;
            assert_int_equal(run_svd(x, ROWS, COLS, 1, o, &r), XKV_OK);
            assert_int_equal(r.rank, cut);
            assert_true(check_result(x, ROWS, COLS, &r) <= 1.02 * tail_norm(sigma, COLS, cut));
        }
        free_result(&r);
    }
    free(x);
}

static void test_same_bits_for_any_thread_count(void **state)
{
    (void)state;
    const size_t sizes[][2] = {{700, 300}, {90, 520}, {257, 64}};
    const uint32_t threads[] = {2, 5};
    for (size_t i = 0; i < 3; i++) {
        size_t rows = sizes[i][0], cols = sizes[i][1];
        float *x = random_matrix(rows, cols, 40 + i);
        for (int by_energy = 0; by_energy < 2; by_energy++) {
            xkv_svd_options o = {.rank = 30, .energy = by_energy ? 0.7 : 0, .iterations = 2};
            xkv_svd_result one, many;
            assert_int_equal(run_svd(x, rows, cols, 1, o, &one), XKV_OK);
            for (size_t t = 0; t < 2; t++) {
                assert_int_equal(run_svd(x, rows, cols, threads[t], o, &many), XKV_OK);
                assert_int_equal(many.rank, one.rank);
                assert_memory_equal(&many.energy, &one.energy, sizeof one.energy);
                assert_memory_equal(&many.captured, &one.captured, sizeof one.captured);
                assert_memory_equal(many.components, one.components, one.rank * cols * 4);
                assert_memory_equal(many.coefficients, one.coefficients, one.rank * rows * 4);
                free_result(&many);
            }
            free_result(&one);
        }
        free(x);
    }
}

static void test_zero_matrix(void **state)
{
    (void)state;
    float *x = checked_calloc(50 * 20, sizeof *x);
    const xkv_svd_options options[] = {{.rank = 5, .iterations = 1}, {.energy = 0.9, .iterations = 2}};
    for (size_t i = 0; i < 2; i++) {
        xkv_svd_result r;
        assert_int_equal(run_svd(x, 50, 20, 2, options[i], &r), XKV_OK);
        assert_int_equal(r.rank, 1);
        assert_true(r.singular_values[0] == 0 && r.energy == 0 && r.captured == 0);
        check_result(x, 50, 20, &r);
        free_result(&r);
    }
    free(x);
}

/* Exact rank 5, as a product of small integers. */
static float *rank_five(size_t rows, size_t cols)
{
    float *x = checked_calloc(rows * cols, sizeof *x);
    uint64_t seed = 77;
    for (size_t k = 0; k < 5; k++) {
        float a[512], b[512];
        for (size_t i = 0; i < rows; i++)
            a[i] = (float)(int)(random_unit(&seed) * 8);
        for (size_t i = 0; i < cols; i++)
            b[i] = (float)(int)(random_unit(&seed) * 8);
        for (size_t i = 0; i < rows * cols; i++)
            x[i] += a[i / cols] * b[i % cols];
    }
    return x;
}

static void test_rank_deficient(void **state)
{
    (void)state;
    const size_t sizes[][2] = {{300, 120}, {60, 200}, {20, 200}, {400, 24}};
    const xkv_svd_options options[] = {{.rank = 20, .iterations = 1},
                                       {.rank = 200, .iterations = 2},
                                       {.energy = 1, .iterations = 1},
                                       {.energy = 0.99999999, .iterations = 2}};
    for (size_t i = 0; i < 4; i++) {
        float *x = rank_five(sizes[i][0], sizes[i][1]);
        for (size_t j = 0; j < 4; j++) {
            xkv_svd_result r;
            assert_int_equal(run_svd(x, sizes[i][0], sizes[i][1], 2, options[j], &r), XKV_OK);
            assert_true(check_result(x, sizes[i][0], sizes[i][1], &r) <= 3e-6 * sqrt(r.energy));
            assert_int_equal(r.rank, 5);
            free_result(&r);
        }
        free(x);
    }
}

/* Equal rows, zero rows and zero columns: exactly null columns in the block. */
static void test_degenerate_rows(void **state)
{
    (void)state;
    const size_t sizes[][2] = {{12, 400}, {40, 64}, {1, 50}, {50, 1}, {1, 1}};
    for (size_t i = 0; i < 5; i++) {
        size_t rows = sizes[i][0], cols = sizes[i][1];
        float *x = checked_calloc(rows * cols, sizeof *x);
        for (size_t t = 0; t < rows; t += 2)
            for (size_t c = 0; c < cols; c += 3)
                x[t * cols + c] = (float)c + 1;
        xkv_svd_result r;
        assert_int_equal(run_svd(x, rows, cols, 2, (xkv_svd_options){.rank = 10, .iterations = 2}, &r), XKV_OK);
        assert_int_equal(r.rank, 1);
        assert_true(check_result(x, rows, cols, &r) <= 1e-6 * sqrt(r.energy));
        free_result(&r);
        free(x);
    }
}

static void test_outlier_column(void **state)
{
    (void)state;
    enum { L = 200, N = 80 };
    float *x = random_matrix(L, N, 3);
    for (size_t t = 0; t < L; t++)
        x[t * N + 17] = 3000.0f + x[t * N + 17];
    double *sigma = jacobi_values(x, L, N);
    assert_true(error_ratio(x, L, N, sigma, 20, 1) <= 1.05);
    assert_true(error_ratio(x, L, N, sigma, 20, 2) <= 1.03);
    free(sigma);
    free(x);
}

/* A power of two changes nothing but the exponents, also far from 1. */
static void test_extreme_scales(void **state)
{
    (void)state;
    enum { L = 120, N = 70 };
    const int exponents[] = {100, 60, -60, -100};
    float *x = random_matrix(L, N, 8);
    xkv_svd_options o = {.rank = 9, .iterations = 2};
    xkv_svd_result plain, scaled;
    assert_int_equal(run_svd(x, L, N, 1, o, &plain), XKV_OK);
    for (size_t i = 0; i < 4; i++) {
        float *y = checked_calloc(L * N, sizeof *y);
        for (size_t j = 0; j < L * N; j++)
            y[j] = ldexpf(x[j], exponents[i]);
        assert_int_equal(run_svd(y, L, N, 1, o, &scaled), XKV_OK);
        assert_memory_equal(scaled.components, plain.components, plain.rank * N * 4);
        for (size_t j = 0; j < plain.rank; j++)
            assert_true(scaled.singular_values[j] == ldexpf(plain.singular_values[j], exponents[i]));
        free_result(&scaled);
        free(y);
    }
    free_result(&plain);
    free(x);
}

static void test_bad_arguments(void **state)
{
    (void)state;
    float x[6] = {1, 2, 3, 4, 5, 6};
    const xkv_svd_options bad[] = {{.rank = 0, .iterations = 1},     {.rank = 1, .iterations = 0},
                                   {.rank = 1, .iterations = 9},     {.energy = -0.1, .iterations = 1},
                                   {.energy = 1.1, .iterations = 1}, {.energy = NAN, .iterations = 1}};
    xkv_svd_result r;
    for (size_t i = 0; i < 6; i++)
        assert_int_equal(run_svd(x, 2, 3, 1, bad[i], &r), XKV_ERROR_ARGUMENT);
    const xkv_svd_options good = {.rank = 1, .iterations = 1};
    assert_int_equal(run_svd(x, 0, 3, 1, good, &r), XKV_ERROR_ARGUMENT);
    const float worst[] = {NAN, INFINITY, FLT_MAX};
    for (size_t i = 0; i < 3; i++) {
        x[3] = worst[i];
        assert_int_equal(run_svd(x, 2, 3, 1, good, &r), XKV_ERROR_ARGUMENT);
    }
}

static void test_cancel_and_memory_limit(void **state)
{
    (void)state;
    xkv_ctx_options options = xkv_ctx_options_default();
    options.memory_limit = 100000;
    xkv_ctx *ctx = NULL;
    float *x = random_matrix(300, 100, 5);
    xkv_svd_options o = {.rank = 40, .iterations = 1};
    xkv_svd_result r;
    assert_int_equal(xkv_ctx_create(&options, &ctx), XKV_OK);
    assert_int_equal(xkv_svd(ctx, NULL, xkv_kernels_cpu(), x, 300, 100, &o, &r), XKV_ERROR_LIMIT);
    xkv_ctx_cancel(ctx);
    assert_int_equal(xkv_svd(ctx, NULL, xkv_kernels_cpu(), x, 300, 100, &o, &r), XKV_ERROR_CANCELLED);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    xkv_ctx_free(ctx);
    free(x);
}

/* --- Eigenproblem ------------------------------------------------------------------------------------------------- */

/* ||A q - w q|| and orthonormality of some eigenvectors, trace and order of the values. */
static void check_eigen(uint32_t n, size_t step)
{
    xkv_ctx *ctx = NULL;
    xkv_pool *pool = NULL; /* holds OpenBLAS at one thread, as callers do */
    size_t size = (size_t)n * n;
    double *a = checked_calloc(size, sizeof *a), *q = checked_calloc(size, sizeof *q);
    double *w = checked_calloc(n, sizeof *w), trace = 0, sum = 0, norm = 0;
    uint64_t seed = n;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++)
            a[i * n + j] = a[j * n + i] = random_unit(&seed);
    for (size_t i = 0; i < size; i++)
        norm += a[i] * a[i];
    memcpy(q, a, size * sizeof *a);
    assert_int_equal(xkv_ctx_create(NULL, &ctx), XKV_OK);
    assert_int_equal(xkv_pool_create(ctx, 1, &pool), XKV_OK);
    assert_int_equal(xkv_syevd(ctx, n, q, w), XKV_OK);
    for (size_t i = 0; i < n; i++) {
        trace += a[i * n + i];
        sum += w[i];
        assert_true(i == 0 || w[i] >= w[i - 1]);
    }
    assert_true(fabs(trace - sum) <= 1e-12 * n * sqrt(norm));
    for (size_t k = 0; k < n; k += step) {
        const double *v = q + k * n;
        double residual = 0, length = 0, other = 0;
        for (size_t i = 0; i < n; i++) {
            double row = -w[k] * v[i];
            for (size_t j = 0; j < n; j++)
                row += a[i * n + j] * v[j];
            residual += row * row;
            length += v[i] * v[i];
            other += v[i] * q[(k + 1) % n * n + i];
        }
        assert_true(sqrt(residual) <= 1e-13 * sqrt(norm) * n && fabs(length - 1) <= 1e-12);
        assert_true(n == 1 || fabs(other) <= 1e-12);
    }
    xkv_pool_free(ctx, pool);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    xkv_ctx_free(ctx);
    free(a);
    free(q);
    free(w);
}

static void test_eigen(void **state)
{
    (void)state;
    check_eigen(1, 1);
    check_eigen(2, 1);
    check_eigen(64, 1);
    assert_int_equal(xkv_syevd(NULL, 0, NULL, NULL), XKV_ERROR_LIMIT);
    assert_int_equal(xkv_syevd(NULL, 40000, NULL, NULL), XKV_ERROR_LIMIT);
}

/* Beyond n = 2896 a workspace size no longer fits the float that LAPACKE returns it in. */
static void test_large_eigen(void **state)
{
    (void)state;
    if (getenv("XKV_TEST_LONG") == NULL)
        skip();
    check_eigen(3000, 300);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_jacobi),
        cmocka_unit_test(test_known_spectra),
        cmocka_unit_test(test_energy_target),
        cmocka_unit_test(test_same_bits_for_any_thread_count),
        cmocka_unit_test(test_zero_matrix),
        cmocka_unit_test(test_rank_deficient),
        cmocka_unit_test(test_degenerate_rows),
        cmocka_unit_test(test_outlier_column),
        cmocka_unit_test(test_extreme_scales),
        cmocka_unit_test(test_bad_arguments),
        cmocka_unit_test(test_cancel_and_memory_limit),
        cmocka_unit_test(test_eigen),
        cmocka_unit_test(test_large_eigen),
    };
    return cmocka_run_group_tests(tests, make_factors, free_factors);
}
