/* fake_solver.c - fake_cuda.c for dense algebra: Cholesky, triangular solves and Jacobi's eigenvalues, by loops.
 * Matrices are by columns, and only what the plug-in asks for is there. */
#include "fake_cuda.h"

#include <cusolverDn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORK = 64 }; /* bytes that anything wants of a workspace */

struct fake_solver {
    cudaStream_t stream;
};

struct fake_params {
    int unused;
};

static void refuse(int wrong, const char *what)
{
    if (!wrong)
        return;
    fprintf(stderr, "fake_solver: %s\n", what);
    abort();
}

/* Count a call; the runtime fails it when told to. */
static cusolverStatus_t counted(void)
{
    int index;

    return cudaGetDevice(&index) == cudaSuccess                  ? CUSOLVER_STATUS_SUCCESS
           : fake_cuda_now()->error == cudaErrorMemoryAllocation ? CUSOLVER_STATUS_ALLOC_FAILED
                                                                 : CUSOLVER_STATUS_EXECUTION_FAILED;
}

static cusolverStatus_t launched(cudaError_t e)
{
    return e == cudaSuccess ? CUSOLVER_STATUS_SUCCESS : CUSOLVER_STATUS_EXECUTION_FAILED;
}

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t *solver)
{
    cusolverStatus_t s = counted();
    if (s == CUSOLVER_STATUS_SUCCESS)
        *solver = calloc(1, sizeof **solver);
    return s;
}

cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t solver)
{
    free(solver);
    return counted();
}

cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t *params)
{
    cusolverStatus_t s = counted();
    if (s == CUSOLVER_STATUS_SUCCESS)
        *params = calloc(1, sizeof **params);
    return s;
}

cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t params)
{
    free(params);
    return counted();
}

cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t solver, cudaStream_t stream)
{
    solver->stream = stream;
    return counted();
}

/* --- Cholesky ----------------------------------------------------------------------------------------------------- */

typedef struct factoring {
    double *a, *work;
    size_t n, lda;
    int *info;
} factoring;

/* Upper triangle: A = U^T U. */
static void run_factor(const void *args)
{
    const factoring *f = args;
    double *a = f->a;

    fake_check(a, ((f->n - 1) * f->lda + f->n) * sizeof *a);
    fake_check(f->work, WORK);
    fake_check(f->info, sizeof *f->info);
    *f->info = 0;
    for (size_t j = 0; j < f->n; j++)
        for (size_t i = 0; i <= j; i++) {
            double sum = a[j * f->lda + i];
            for (size_t k = 0; k < i; k++)
                sum -= a[i * f->lda + k] * a[j * f->lda + k];
            if (i == j && !(sum > 0)) {
                *f->info = (int)j + 1;
                return;
            }
            a[j * f->lda + i] = i == j ? sqrt(sum) : sum / a[i * f->lda + i];
        }
}

cusolverStatus_t cusolverDnDpotrf_bufferSize(cusolverDnHandle_t solver, cublasFillMode_t uplo, int n, double *a,
                                             int lda, int *words)
{
    (void)solver;
    (void)a;
    refuse(uplo != CUBLAS_FILL_MODE_UPPER || lda < n, "potrf of another form");
    *words = WORK / (int)sizeof(double);
    return counted();
}

cusolverStatus_t cusolverDnDpotrf(cusolverDnHandle_t solver, cublasFillMode_t uplo, int n, double *a, int lda,
                                  double *work, int words, int *info)
{
    factoring f = {a, work, (size_t)n, (size_t)lda, info};

    refuse(uplo != CUBLAS_FILL_MODE_UPPER || lda < n || words < WORK / (int)sizeof(double), "potrf of another form");
    return launched(fake_launch(solver->stream, run_factor, &f, sizeof f));
}

typedef struct solving {
    const double *a;
    double *b;
    size_t m, n, lda, ldb;
} solving;

/* B = U^-T B. */
static void run_solve(const void *args)
{
    const solving *s = args;

    fake_check(s->a, ((s->m - 1) * s->lda + s->m) * sizeof *s->a);
    fake_check(s->b, ((s->n - 1) * s->ldb + s->m) * sizeof *s->b);
    for (size_t j = 0; j < s->n; j++)
        for (size_t i = 0; i < s->m; i++) {
            double *b = s->b + j * s->ldb, sum = b[i];
            for (size_t k = 0; k < i; k++)
                sum -= s->a[i * s->lda + k] * b[k];
            b[i] = sum / s->a[i * s->lda + i];
        }
}

cublasStatus_t cublasDtrsm(cublasHandle_t blas, cublasSideMode_t side, cublasFillMode_t uplo, cublasOperation_t op,
                           cublasDiagType_t diagonal, int m, int n, const double *alpha, const double *a, int lda,
                           double *b, int ldb)
{
    solving s = {a, b, (size_t)m, (size_t)n, (size_t)lda, (size_t)ldb};

    refuse(side != CUBLAS_SIDE_LEFT || uplo != CUBLAS_FILL_MODE_UPPER || op != CUBLAS_OP_T ||
               diagonal != CUBLAS_DIAG_NON_UNIT || *alpha != 1,
           "trsm of another form");
    return fake_launch(fake_blas_stream(blas), run_solve, &s, sizeof s) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                                       : CUBLAS_STATUS_EXECUTION_FAILED;
}

/* --- Eigenvalues -------------------------------------------------------------------------------------------------- */

typedef struct problems {
    double *a, *w;
    void *work;
    int *info;
    size_t n, batch;
} problems;

static void rotate(double *x, double *y, size_t n, size_t step, double c, double s)
{
    for (size_t k = 0; k < n * step; k += step) {
        double a = x[k], b = y[k];
        x[k] = c * a - s * b;
        y[k] = s * a + c * b;
    }
}

/* One sweep of cyclic Jacobi on a, rotations collected in v (columns). */
static void sweep(double *a, double *v, size_t n)
{
    for (size_t p = 0; p + 1 < n; p++)
        for (size_t q = p + 1; q < n; q++) {
            double apq = a[q * n + p];
            if (apq == 0)
                continue;
            double theta = (a[q * n + q] - a[p * n + p]) / (2 * apq);
            double t = (theta >= 0 ? 1 : -1) / (fabs(theta) + sqrt(theta * theta + 1));
            double c = 1 / sqrt(t * t + 1), s = t * c;
            rotate(a + p * n, a + q * n, n, 1, c, s);
            rotate(a + p, a + q, n, n, c, s);
            rotate(v + p * n, v + q * n, n, 1, c, s);
        }
}

static void solve_one(double *a, double *w, size_t n)
{
    double *v = calloc(n * n, sizeof *v);

    for (size_t j = 0; j < n; j++) { /* the upper triangle is what counts */
        v[j * n + j] = 1;
        for (size_t i = 0; i < j; i++)
            a[i * n + j] = a[j * n + i];
    }
    for (int i = 0; i < 12; i++)
        sweep(a, v, n);
    for (size_t j = 0; j < n; j++)
        w[j] = a[j * n + j];
    for (size_t j = 0; j < n; j++) { /* ascending, with its vectors */
        size_t least = j;
        for (size_t k = j + 1; k < n; k++)
            least = w[k] < w[least] ? k : least;
        for (size_t i = 0; i < n; i++) {
            double x = v[j * n + i];
            v[j * n + i] = v[least * n + i];
            v[least * n + i] = x;
        }
        double x = w[j];
        w[j] = w[least];
        w[least] = x;
    }
    memcpy(a, v, n * n * sizeof *a);
    free(v);
}

static void run_problems(const void *args)
{
    const problems *p = args;

    fake_check(p->a, p->batch * p->n * p->n * sizeof *p->a);
    fake_check(p->w, p->batch * p->n * sizeof *p->w);
    fake_check(p->work, WORK);
    fake_check(p->info, p->batch * sizeof *p->info);
    for (size_t i = 0; i < p->batch; i++) {
        solve_one(p->a + i * p->n * p->n, p->w + i * p->n, p->n);
        p->info[i] = 0;
    }
}

cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t solver, cusolverDnParams_t params,
                                                   cusolverEigMode_t mode, cublasFillMode_t uplo, int64_t n,
                                                   cudaDataType type_a, const void *a, int64_t lda, cudaDataType type_w,
                                                   const void *w, cudaDataType compute, size_t *on_device,
                                                   size_t *on_host, int64_t batch)
{
    (void)solver;
    (void)a;
    (void)w;
    (void)batch;
    refuse(params == NULL || mode != CUSOLVER_EIG_MODE_VECTOR || uplo != CUBLAS_FILL_MODE_UPPER || lda < n ||
               type_a != CUDA_R_64F || type_w != CUDA_R_64F || compute != CUDA_R_64F,
           "eigenvalues of another form");
    *on_device = *on_host = WORK;
    return counted();
}

cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t solver, cusolverDnParams_t params, cusolverEigMode_t mode,
                                        cublasFillMode_t uplo, int64_t n, cudaDataType type_a, void *a, int64_t lda,
                                        cudaDataType type_w, void *w, cudaDataType compute, void *device_work,
                                        size_t device_size, void *host_work, size_t host_size, int *info, int64_t batch)
{
    problems p = {a, w, device_work, info, (size_t)n, (size_t)batch};

    refuse(params == NULL || mode != CUSOLVER_EIG_MODE_VECTOR || uplo != CUBLAS_FILL_MODE_UPPER || lda != n ||
               type_a != CUDA_R_64F || type_w != CUDA_R_64F || compute != CUDA_R_64F || device_size < WORK ||
               host_size < WORK,
           "eigenvalues of another form");
    memset(host_work, 0x5a, host_size);
    return launched(fake_launch(solver->stream, run_problems, &p, sizeof p));
}
