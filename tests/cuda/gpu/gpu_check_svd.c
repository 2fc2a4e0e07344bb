/* gpu_check_svd.c - gpu_check for the operations of plugin_svd.h: signs and conversions are the CPU's bits; what a
 * Cholesky factor and eigenvectors are is checked by what they do. */
#include "gpu_check.h"
#include "svd_elements.h"

#include <math.h>
#include <stdlib.h>

enum { ROWS = 150, N = 37, BATCH = 3 };

static double *some_numbers(uint32_t count, uint64_t seed)
{
    double *x = malloc(count * sizeof *x);

    for (uint32_t i = 0; i < count; i++)
        x[i] = gpu_normal(&seed);
    return x;
}

static void check_sketch(gpu *g)
{
    static uint16_t expected[5000], found[5000];
    gpu_block to = gpu_alloc(g, sizeof found);
    xkv_plug_sketch host = {expected, 5000, 77}, o = host;

    for (uint64_t i = 0; i < 5000; i++)
        xkv_sketch_element(&host, i);
    o.out = (void *)to.p;
    GPU_TRY(g, sketch(g->d, &o, g->stream));
    gpu_get(g, &to, found);
    check(memcmp(found, expected, sizeof found) == 0, "sketch: other signs", 0, 0, 0);
    release(g, &to, "sketch wrote beside the signs");
}

static void check_convert(gpu *g)
{
    double *x = some_numbers(ROWS * N, 1);
    float *expected = malloc(ROWS * N * 4), *found = malloc(ROWS * N * 4);
    gpu_block from = gpu_put(g, x, ROWS * N * 8), to = gpu_alloc(g, ROWS * N * 4);
    xkv_plug_convert host = {x, expected, ROWS, N, 0, 1}, o = {from.p, to.p, ROWS, N, 0, 1};

    for (uint64_t row = 0; row < ROWS; row++)
        for (uint64_t column = 0; column < N; column++)
            xkv_convert_element(&host, row, column);
    GPU_TRY(g, convert(g->d, &o, g->stream));
    gpu_get(g, &to, found);
    check(memcmp(found, expected, ROWS * N * 4) == 0, "convert: other numbers", 0, 0, 0);
    o = (xkv_plug_convert){to.p, from.p, ROWS, N, 1, 0};
    GPU_TRY(g, convert(g->d, &o, g->stream));
    gpu_get(g, &from, x);
    bool same = true;
    for (uint32_t i = 0; i < ROWS * N; i++)
        same = same && x[i] == (double)expected[i];
    check(same, "convert to f64: other numbers", 0, 0, 0);
    release(g, &from, "convert wrote beside the numbers");
    release(g, &to, "convert wrote beside the numbers");
    free(x);
    free(expected);
    free(found);
}

/* Columns of z come out orthonormal. */
static void check_cholesky(gpu *g, const xkv_plug_dense_size *size)
{
    double *z = some_numbers(ROWS * N, 2), worst = 0;
    int32_t info = -1;
    gpu_block there = gpu_put(g, z, ROWS * N * 8), gram = gpu_alloc(g, N * N * 8), small = gpu_alloc(g, N * N * 8);
    gpu_block work = gpu_alloc(g, size->cholesky), word = gpu_put(g, &info, 4);
    xkv_plug_product p = {
        {there.p, there.p, (void *)gram.p, N, N, ROWS, N, N, N, 1, 0, 1, XKV_PRODUCT_F64}, 0, 1, 0, 0, 0};
    xkv_plug_scale_gram s = {(void *)gram.p, (void *)small.p, (void *)there.p, N, ROWS, 0};
    xkv_plug_cholesky o = {(void *)small.p, (void *)there.p, N, ROWS, work.p, size->cholesky, (void *)word.p};

    GPU_TRY(g, product(g->d, &p, g->stream));
    GPU_TRY(g, scale_gram(g->d, &s, g->stream));
    GPU_TRY(g, cholesky(g->d, &o, g->stream));
    gpu_get(g, &there, z);
    gpu_get(g, &word, &info);
    for (uint32_t i = 0; i < N; i++)
        for (uint32_t j = 0; j < N; j++) {
            double sum = i == j ? -1 : 0;
            for (uint32_t r = 0; r < ROWS; r++)
                sum += z[r * N + i] * z[r * N + j];
            worst = fmax(worst, fabs(sum));
        }
    check(info == 0 && worst < 1e-12, "cholesky: columns are not orthonormal", 0, 0, 0);
    release(g, &there, "cholesky wrote beside the columns");
    release(g, &gram, "cholesky wrote beside the products");
    release(g, &small, "cholesky wrote beside the factor");
    release(g, &work, "cholesky wrote beside its workspace");
    release(g, &word, "cholesky wrote beside its info");
    free(z);
}

static void check_eigen(gpu *g, const xkv_plug_dense_size *size)
{
    double *a = some_numbers(BATCH * N * N, 3), *v = malloc(BATCH * N * N * 8), w[BATCH * N], worst = 0;
    int32_t info[BATCH] = {-1, -1, -1};
    void *host = malloc(size->eigen_host + 1);
    bool ascending = true;

    for (uint32_t b = 0; b < BATCH; b++)
        for (uint32_t i = 0; i < N; i++)
            for (uint32_t j = 0; j < i; j++)
                a[(b * N + i) * N + j] = a[(b * N + j) * N + i];
    gpu_block there = gpu_put(g, a, BATCH * N * N * 8), values = gpu_alloc(g, sizeof w);
    gpu_block work = gpu_alloc(g, size->eigen), words = gpu_put(g, info, sizeof info);
    xkv_plug_eigen o = {(void *)there.p,  (void *)values.p, N, BATCH, work.p, host, size->eigen,
                        size->eigen_host, (void *)words.p};
    GPU_TRY(g, eigen(g->d, &o, g->stream));
    gpu_get(g, &there, v);
    gpu_get(g, &values, w);
    gpu_get(g, &words, info);
    for (uint32_t b = 0; b < BATCH; b++)
        for (uint32_t k = 0; k < N; k++) {
            const double *row = v + (b * N + k) * N;
            ascending = ascending && info[b] == 0 && (k == 0 || w[b * N + k] >= w[b * N + k - 1]);
            for (uint32_t i = 0; i < N; i++) {
                double sum = -w[b * N + k] * row[i];
                for (uint32_t j = 0; j < N; j++)
                    sum += a[(b * N + i) * N + j] * row[j];
                worst = fmax(worst, fabs(sum));
            }
        }
    check(ascending && worst < 1e-10, "eigen: not the eigenvectors", 0, 0, 0);
    release(g, &there, "eigen wrote beside the matrices");
    release(g, &values, "eigen wrote beside the values");
    release(g, &work, "eigen wrote beside its workspace");
    release(g, &words, "eigen wrote beside its info");
    free(a);
    free(v);
    free(host);
}

void check_svd(gpu *g)
{
    xkv_plug_dense_size size;

    check_sketch(g);
    check_convert(g);
    GPU_TRY(g, dense_size(g->d, N, BATCH, &size));
    check_cholesky(g, &size);
    check_eigen(g, &size);
}
