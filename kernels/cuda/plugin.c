/* plugin.c - the table of plugin.h over the CUDA runtime and cuBLAS. No kernel is here, so that the tests can compile
 * it against a runtime of their own, which fails when told to (tests/cuda). */
#include "direct.h"
#include "launch.h"
#include "text.h"

#include <cublas_v2.h>
#include <cusolverDn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What cuBLAS takes for splitting sums; a workspace of ours, so that it allocates nothing while work is captured, and
 * results can be repeated. */
#define BLAS_WORKSPACE (32u << 20)

struct xkv_plug_device {
    int index;
    cublasHandle_t blas;
    void *blas_workspace;
    cusolverDnHandle_t solver; /* with `params`, once somebody asks for dense_size() */
    cusolverDnParams_t params;
    int dead;
    char error[256];
};

/* --- Errors ------------------------------------------------------------------------------------------------------- */

/* Errors after which nothing works any more in this process: those that the runtime documents as such. */
static int breaks_context(cudaError_t e)
{
    switch (e) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorContextIsDestroyed:
    case cudaErrorUnknown:
        return 1;
    default:
        return 0;
    }
}

/* What a call of the runtime comes to. The runtime keeps its last error; it is taken, so that nobody else finds it. */
static xkv_status result_of(xkv_plug_device *d, cudaError_t e, const char *call)
{
    if (e == cudaSuccess)
        return XKV_OK;
    (void)cudaGetLastError();
    d->dead |= breaks_context(e);
    xkv_write_text(d->error, sizeof d->error, "%s: %s (%s)%s", call, cudaGetErrorString(e), cudaGetErrorName(e),
                   d->dead ? "; the device cannot be used any more" : "");
    return e == cudaErrorMemoryAllocation ? XKV_ERROR_MEMORY : XKV_ERROR_BACKEND;
}

static xkv_status result_of_blas(xkv_plug_device *d, cublasStatus_t s, const char *call)
{
    cudaError_t e = cudaSuccess;

    if (s == CUBLAS_STATUS_SUCCESS)
        return XKV_OK;
    if (s == CUBLAS_STATUS_EXECUTION_FAILED || s == CUBLAS_STATUS_INTERNAL_ERROR)
        e = cudaGetLastError();
    if (e != cudaSuccess)
        return result_of(d, e, call);
    xkv_write_text(d->error, sizeof d->error, "%s: %s", call, cublasGetStatusString(s));
    return s == CUBLAS_STATUS_ALLOC_FAILED ? XKV_ERROR_MEMORY : XKV_ERROR_BACKEND;
}

#define TRY_CUDA(d, call)                                                                                              \
    do {                                                                                                               \
        xkv_status status_ = result_of(d, call, #call);                                                                \
        if (status_ != XKV_OK)                                                                                         \
            return status_;                                                                                            \
    } while (0)
#define TRY_BLAS(d, call)                                                                                              \
    do {                                                                                                               \
        xkv_status status_ = result_of_blas(d, call, #call);                                                           \
        if (status_ != XKV_OK)                                                                                         \
            return status_;                                                                                            \
    } while (0)

static xkv_status result_of_solver(xkv_plug_device *d, cusolverStatus_t s, const char *call)
{
    cudaError_t e = cudaSuccess;

    if (s == CUSOLVER_STATUS_SUCCESS)
        return XKV_OK;
    if (s == CUSOLVER_STATUS_EXECUTION_FAILED || s == CUSOLVER_STATUS_INTERNAL_ERROR)
        e = cudaGetLastError();
    if (e != cudaSuccess)
        return result_of(d, e, call);
    xkv_write_text(d->error, sizeof d->error, "%s: cuSOLVER status %d", call, (int)s);
    return s == CUSOLVER_STATUS_ALLOC_FAILED ? XKV_ERROR_MEMORY : XKV_ERROR_BACKEND;
}

#define TRY_SOLVER(d, call)                                                                                            \
    do {                                                                                                               \
        xkv_status status_ = result_of_solver(d, call, #call);                                                         \
        if (status_ != XKV_OK)                                                                                         \
            return status_;                                                                                            \
    } while (0)

/* --- The current device ------------------------------------------------------------------------------------------- */

/* The runtime works on the thread's current device; the caller's comes back. */
static xkv_status enter(xkv_plug_device *d, int *callers)
{
    *callers = d->index;
    if (d->dead)
        return XKV_ERROR_BACKEND; /* the text of what broke it stays */
    TRY_CUDA(d, cudaGetDevice(callers));
    if (*callers != d->index)
        TRY_CUDA(d, cudaSetDevice(d->index));
    return XKV_OK;
}

static void leave(const xkv_plug_device *d, int callers)
{
    if (callers != d->index)
        (void)cudaSetDevice(callers);
}

/* Run `call`, an expression of a cudaError_t, on the device. */
#define ON_DEVICE(d, call)                                                                                             \
    do {                                                                                                               \
        int callers_;                                                                                                  \
        xkv_status on_device_ = enter(d, &callers_);                                                                   \
        if (on_device_ == XKV_OK) {                                                                                    \
            on_device_ = result_of(d, call, #call);                                                                    \
            leave(d, callers_);                                                                                        \
        }                                                                                                              \
        return on_device_;                                                                                             \
    } while (0)

/* Run `call`, an expression of an xkv_status, on the device. */
#define ALL_ON_DEVICE(d, call)                                                                                         \
    do {                                                                                                               \
        int callers_;                                                                                                  \
        xkv_status on_device_ = enter(d, &callers_);                                                                   \
        if (on_device_ == XKV_OK) {                                                                                    \
            on_device_ = call;                                                                                         \
            leave(d, callers_);                                                                                        \
        }                                                                                                              \
        return on_device_;                                                                                             \
    } while (0)

/* --- Devices ------------------------------------------------------------------------------------------------------ */

static uint32_t count_devices(char *why, size_t why_size)
{
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);

    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        xkv_write_text(why, why_size, "%s", cudaGetErrorString(e));
        return 0;
    }
    if (count == 0)
        xkv_write_text(why, why_size, "the driver has no device");
    return (uint32_t)count;
}

/* Kernels are built for compute capability 8.0 and up. */
static xkv_status check_capability(xkv_plug_device *d)
{
    int major = 0;

    TRY_CUDA(d, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d->index));
    if (major >= 8)
        return XKV_OK;
    xkv_write_text(d->error, sizeof d->error, "compute capability %d.x; 8.0 or higher is needed", major);
    return XKV_ERROR_UNSUPPORTED;
}

static xkv_status prepare(xkv_plug_device *d)
{
    TRY_CUDA(d, cudaMalloc(&d->blas_workspace, BLAS_WORKSPACE));
    TRY_BLAS(d, cublasCreate(&d->blas));
    /* Sums that are split over blocks stay in f32. */
    TRY_BLAS(d, cublasSetMathMode(d->blas, CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    TRY_BLAS(d, cublasSetPointerMode(d->blas, CUBLAS_POINTER_MODE_HOST));
    return XKV_OK;
}

static void close_device(xkv_plug_device *d)
{
    int callers = 0;

    if (d == NULL)
        return;
    if (enter(d, &callers) == XKV_OK) { /* a broken context frees nothing */
        if (d->blas != NULL)
            (void)cublasDestroy(d->blas);
        if (d->params != NULL)
            (void)cusolverDnDestroyParams(d->params);
        if (d->solver != NULL)
            (void)cusolverDnDestroy(d->solver);
        (void)cudaFree(d->blas_workspace);
        leave(d, callers);
    }
    free(d);
}

static xkv_status open_device(uint32_t index, xkv_plug_device **device_p, char *why, size_t why_size)
{
    xkv_plug_device *d = calloc(1, sizeof *d);
    xkv_status status;
    int callers;

    if (d == NULL)
        return XKV_ERROR_MEMORY;
    d->index = (int)index;
    status = enter(d, &callers);
    if (status == XKV_OK) {
        status = check_capability(d);
        if (status == XKV_OK)
            status = prepare(d);
        leave(d, callers);
    }
    if (status == XKV_OK) {
        *device_p = d;
        return XKV_OK;
    }
    xkv_write_text(why, why_size, "%s", d->error);
    close_device(d);
    return status;
}

static void get_properties(xkv_plug_device *d, xkv_plug_properties *p)
{
    struct cudaDeviceProp found;
    size_t available = 0, memory = 0;
    int driver = 0, runtime = 0, callers;

    memset(p, 0, sizeof *p);
    if (enter(d, &callers) != XKV_OK)
        return;
    if (cudaGetDeviceProperties(&found, d->index) == cudaSuccess) {
        xkv_write_text(p->name, sizeof p->name, "%s", found.name);
        p->major = (uint32_t)found.major;
        p->minor = (uint32_t)found.minor;
    }
    (void)cudaDriverGetVersion(&driver);
    (void)cudaRuntimeGetVersion(&runtime);
    (void)cudaMemGetInfo(&available, &memory);
    (void)cudaGetLastError();
    leave(d, callers);
    p->driver = (uint32_t)driver;
    p->runtime = (uint32_t)runtime;
    p->memory = memory;
    p->available = available;
}

static const char *last_error(const xkv_plug_device *d)
{
    return d->error;
}

static int is_dead(const xkv_plug_device *d)
{
    return d->dead;
}

/* --- Memory, streams, events -------------------------------------------------------------------------------------- */

static xkv_status alloc_memory(xkv_plug_device *d, uint64_t size, void **p)
{
    ON_DEVICE(d, cudaMalloc(p, (size_t)size));
}

static xkv_status alloc_pinned(xkv_plug_device *d, uint64_t size, void **p)
{
    ON_DEVICE(d, cudaHostAlloc(p, (size_t)size, cudaHostAllocPortable | cudaHostAllocMapped));
}

static xkv_status free_memory(xkv_plug_device *d, void *p)
{
    ON_DEVICE(d, cudaFree(p));
}

static xkv_status free_pinned(xkv_plug_device *d, void *p)
{
    ON_DEVICE(d, cudaFreeHost(p));
}

static xkv_status destroy_stream(xkv_plug_device *d, cudaStream_t stream)
{
    ON_DEVICE(d, cudaStreamDestroy(stream));
}

static xkv_status destroy_event(xkv_plug_device *d, cudaEvent_t event)
{
    ON_DEVICE(d, cudaEventDestroy(event));
}

/* Those that give back: what cannot be given back is lost, and nobody is to hear of it. */
static void release_memory(xkv_plug_device *d, void *p)
{
    if (p != NULL)
        (void)free_memory(d, p);
}

static void release_pinned(xkv_plug_device *d, void *p)
{
    if (p != NULL)
        (void)free_pinned(d, p);
}

static void release_stream(xkv_plug_device *d, void *stream)
{
    if (stream != NULL)
        (void)destroy_stream(d, stream);
}

static void release_event(xkv_plug_device *d, void *event)
{
    if (event != NULL)
        (void)destroy_event(d, event);
}

static xkv_status create_stream(xkv_plug_device *d, void **stream_p)
{
    ON_DEVICE(d, cudaStreamCreateWithFlags((cudaStream_t *)stream_p, cudaStreamNonBlocking));
}

static xkv_status create_event(xkv_plug_device *d, void **event_p)
{
    ON_DEVICE(d, cudaEventCreateWithFlags((cudaEvent_t *)event_p, cudaEventDisableTiming));
}

static xkv_status record_event(xkv_plug_device *d, void *event, void *stream)
{
    ON_DEVICE(d, cudaEventRecord(event, stream));
}

static xkv_status follow_event(xkv_plug_device *d, void *stream, void *event)
{
    ON_DEVICE(d, cudaStreamWaitEvent(stream, event, 0));
}

static xkv_status wait_event(xkv_plug_device *d, void *event)
{
    ON_DEVICE(d, cudaEventSynchronize(event));
}

static xkv_status copy(xkv_plug_device *d, void *to, const void *from, uint64_t size, void *stream)
{
    ON_DEVICE(d, cudaMemcpyAsync(to, from, (size_t)size, cudaMemcpyDefault, stream));
}

static xkv_status clear(xkv_plug_device *d, void *p, uint64_t size, void *stream)
{
    ON_DEVICE(d, cudaMemsetAsync(p, 0, (size_t)size, stream));
}

/* --- Files -------------------------------------------------------------------------------------------------------- */

static xkv_status open_file(xkv_plug_device *d, const xkv_plug_file_open *o, void **file_p)
{
    ALL_ON_DEVICE(d, xkv_direct_open(o, (xkv_direct_file **)file_p, d->error, sizeof d->error));
}

static void close_file(xkv_plug_device *d, void *file)
{
    (void)d;
    xkv_direct_close(file);
}

static xkv_status read_file(xkv_plug_device *d, const xkv_plug_file_read *o)
{
    ALL_ON_DEVICE(d, xkv_direct_read(o, d->error, sizeof d->error));
}

static xkv_status verify(xkv_plug_device *d, const xkv_plug_verify *o, void *stream)
{
    if (o->count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_verify(o, stream));
}

/* --- Operations --------------------------------------------------------------------------------------------------- */

static xkv_status decode(xkv_plug_device *d, const xkv_plug_decode *o, void *stream)
{
    if (o->count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_decode(o, stream));
}

static xkv_status expand(xkv_plug_device *d, const xkv_plug_expand *o, void *stream)
{
    if (o->count == 0 || o->tokens == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_expand(o, stream));
}

static xkv_status split(xkv_plug_device *d, const xkv_plug_split *o, void *stream)
{
    if (o->count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_split(o, stream));
}

static xkv_status spread(xkv_plug_device *d, const xkv_plug_spread *o, void *stream)
{
    if (o->tokens == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_spread(o, stream));
}

static xkv_status angles(xkv_plug_device *d, const xkv_plug_angles *o, void *stream)
{
    if (o->tokens == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_angles(o, stream));
}

static xkv_status store(xkv_plug_device *d, const xkv_plug_store *o, void *stream)
{
    if (o->tokens == 0 || o->plane_count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_store(o, stream));
}

static xkv_status move(xkv_plug_device *d, const xkv_plug_move *o, void *stream)
{
    if (o->tokens == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_move(o, stream));
}

static xkv_status join(xkv_plug_device *d, const xkv_plug_join *o, void *stream)
{
    if (o->rows == 0 || o->cols == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_join(o, stream));
}

static cudaDataType element_type(const xkv_plug_gemm *g)
{
    return g->exact == XKV_PRODUCT_F16    ? CUDA_R_16F
           : g->exact == XKV_PRODUCT_BF16 ? CUDA_R_16BF
           : g->exact == XKV_PRODUCT_F64  ? CUDA_R_64F
                                          : CUDA_R_32F;
}

static cublasComputeType_t compute_type(const xkv_plug_gemm *g)
{
    return g->exact == XKV_PRODUCT_TF32  ? CUBLAS_COMPUTE_32F_FAST_TF32
           : g->exact == XKV_PRODUCT_F64 ? CUBLAS_COMPUTE_64F
                                         : CUBLAS_COMPUTE_32F;
}

/* cuBLAS counts columns first: its C is our C transposed, and so are A and B, so that they change places. */
static xkv_status multiply(xkv_plug_device *d, const xkv_plug_product *o, cudaStream_t stream)
{
    const xkv_plug_gemm *g = &o->g;
    cublasOperation_t op_a = g->component_major ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t op_b = o->transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    cudaDataType type = element_type(g), out = type == CUDA_R_64F ? CUDA_R_64F : CUDA_R_32F;
    const double alpha = (double)g->alpha, beta = (double)g->beta; /* of the type that is computed in */
    const void *factors[2] = {&g->alpha, &g->beta};

    if (type == CUDA_R_64F) {
        factors[0] = &alpha;
        factors[1] = &beta;
    }
    TRY_BLAS(d, cublasSetStream(d->blas, stream)); /* which also takes the workspace away */
    TRY_BLAS(d, cublasSetWorkspace(d->blas, d->blas_workspace, BLAS_WORKSPACE));
    TRY_BLAS(d, cublasGemmStridedBatchedEx(d->blas, op_b, op_a, (int)g->n, (int)g->m, (int)g->k, factors[0], g->b, type,
                                           (int)g->ldb, (long long)o->b_step, g->a, type, (int)g->lda,
                                           (long long)o->a_step, factors[1], g->c, out, (int)g->ldc,
                                           (long long)o->c_step, (int)o->batch, compute_type(g), CUBLAS_GEMM_DEFAULT));
    return XKV_OK;
}

static xkv_status product(xkv_plug_device *d, const xkv_plug_product *o, void *stream)
{
    if (o->g.m == 0 || o->g.n == 0 || o->batch == 0)
        return XKV_OK;
    ALL_ON_DEVICE(d, multiply(d, o, stream));
}

static xkv_status gemm(xkv_plug_device *d, const xkv_plug_gemm *o, void *stream)
{
    xkv_plug_product one = {*o, 0, 1, 0, 0, 0};

    return product(d, &one, stream);
}

/* --- Packing ------------------------------------------------------------------------------------------------------ */

static xkv_status gather(xkv_plug_device *d, const xkv_plug_gather *o, void *stream)
{
    if (o->tokens == 0 || o->plane_count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_gather(o, stream));
}

static xkv_status take(xkv_plug_device *d, const xkv_plug_take *o, void *stream)
{
    if (o->tokens == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_take(o, stream));
}

static xkv_status scan(xkv_plug_device *d, const xkv_plug_scan *o, void *stream)
{
    if (o->tokens == 0 || o->plane_count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_scan(o, stream));
}

static xkv_status halve(xkv_plug_device *d, const xkv_plug_halve *o, void *stream)
{
    if (o->count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_halve(o, stream));
}

static xkv_status sums(xkv_plug_device *d, const xkv_plug_sums *o, void *stream)
{
    if (o->tokens == 0 || o->count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_sums(o, stream));
}

static xkv_status quantize(xkv_plug_device *d, const xkv_plug_quantize *o, void *stream)
{
    if (o->count == 0 || o->tokens == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_quantize(o, stream));
}

static xkv_status count_values(xkv_plug_device *d, const xkv_plug_count *o, void *stream)
{
    if (o->count == 0 || o->tokens == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_count(o, stream));
}

static xkv_status encode(xkv_plug_device *d, const xkv_plug_encode *o, void *stream)
{
    if (o->count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_encode(o, stream));
}

static xkv_status round_columns(xkv_plug_device *d, const xkv_plug_round_columns *o, void *stream)
{
    if (o->count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_round_columns(o, stream));
}

/* --- Dense algebra ------------------------------------------------------------------------------------------------ */

static xkv_status find_dense_size(xkv_plug_device *d, uint64_t n, uint64_t batch, xkv_plug_dense_size *size)
{
    size_t on_device = 0, on_host = 0;
    int words = 0;

    if (d->solver == NULL)
        TRY_SOLVER(d, cusolverDnCreate(&d->solver));
    if (d->params == NULL)
        TRY_SOLVER(d, cusolverDnCreateParams(&d->params));
    TRY_SOLVER(d, cusolverDnDpotrf_bufferSize(d->solver, CUBLAS_FILL_MODE_UPPER, (int)n, NULL, (int)n, &words));
    TRY_SOLVER(d, cusolverDnXsyevBatched_bufferSize(
                      d->solver, d->params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_UPPER, (int64_t)n, CUDA_R_64F,
                      NULL, (int64_t)n, CUDA_R_64F, NULL, CUDA_R_64F, &on_device, &on_host, (int64_t)batch));
    *size = (xkv_plug_dense_size){(uint64_t)words * sizeof(double), on_device, on_host};
    return XKV_OK;
}

static xkv_status dense_size(xkv_plug_device *d, uint64_t n, uint64_t batch, xkv_plug_dense_size *size)
{
    ALL_ON_DEVICE(d, find_dense_size(d, n, batch, size));
}

static xkv_status sketch(xkv_plug_device *d, const xkv_plug_sketch *o, void *stream)
{
    ON_DEVICE(d, xkv_launch_sketch(o, stream));
}

static xkv_status convert(xkv_plug_device *d, const xkv_plug_convert *o, void *stream)
{
    ON_DEVICE(d, xkv_launch_convert(o, stream));
}

static xkv_status scale_gram(xkv_plug_device *d, const xkv_plug_scale_gram *o, void *stream)
{
    ON_DEVICE(d, xkv_launch_scale_gram(o, stream));
}

/* By columns: gram = U^T U with U = L^T, and z^T = L^-1 z^T = U^-T z^T. */
static xkv_status factor(xkv_plug_device *d, const xkv_plug_cholesky *o, cudaStream_t stream)
{
    const double one = 1;

    TRY_SOLVER(d, cusolverDnSetStream(d->solver, stream));
    TRY_SOLVER(d, cusolverDnDpotrf(d->solver, CUBLAS_FILL_MODE_UPPER, (int)o->n, o->gram, (int)o->n, o->work,
                                   (int)(o->work_size / sizeof(double)), o->info));
    TRY_BLAS(d, cublasSetStream(d->blas, stream));
    TRY_BLAS(d, cublasSetWorkspace(d->blas, d->blas_workspace, BLAS_WORKSPACE));
    TRY_BLAS(d, cublasDtrsm(d->blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_T, CUBLAS_DIAG_NON_UNIT,
                            (int)o->n, (int)o->rows, &one, o->gram, (int)o->n, o->z, (int)o->n));
    return XKV_OK;
}

static xkv_status cholesky(xkv_plug_device *d, const xkv_plug_cholesky *o, void *stream)
{
    ALL_ON_DEVICE(d, factor(d, o, stream));
}

/* Eigenvectors are columns by columns, hence our rows. */
static xkv_status find_eigen(xkv_plug_device *d, const xkv_plug_eigen *o, cudaStream_t stream)
{
    TRY_SOLVER(d, cusolverDnSetStream(d->solver, stream));
    TRY_SOLVER(d, cusolverDnXsyevBatched(d->solver, d->params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_UPPER,
                                         (int64_t)o->n, CUDA_R_64F, o->a, (int64_t)o->n, CUDA_R_64F, o->values,
                                         CUDA_R_64F, o->work, (size_t)o->work_size, o->host_work, (size_t)o->host_size,
                                         o->info, (int64_t)o->batch));
    return XKV_OK;
}

static xkv_status eigen(xkv_plug_device *d, const xkv_plug_eigen *o, void *stream)
{
    ALL_ON_DEVICE(d, find_eigen(d, o, stream));
}

static xkv_status fused(xkv_plug_device *d, const xkv_plug_fused *o, void *stream)
{
    if (o->store.tokens == 0 || o->heads == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_fused(o, stream));
}

/* --- Attention ---------------------------------------------------------------------------------------------------- */

static xkv_status attend(xkv_plug_device *d, const xkv_plug_attend *o, void *stream)
{
    if (o->count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_attend(o, stream));
}

static xkv_status merge(xkv_plug_device *d, const xkv_plug_merge *o, void *stream)
{
    if (o->rows == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_merge(o, stream));
}

static xkv_status restore(xkv_plug_device *d, const xkv_plug_restore *o, void *stream)
{
    if (o->tile_count == 0)
        return XKV_OK;
    ON_DEVICE(d, xkv_launch_restore(o, stream));
}

/* --- The table ---------------------------------------------------------------------------------------------------- */

extern const xkv_plugin xkv_plugin_table;

__attribute__((visibility("default"))) const xkv_plugin xkv_plugin_table = {
    .abi = XKV_PLUGIN_ABI,
    .size = sizeof(xkv_plugin),
    .name = "cuda",
    .count = count_devices,
    .open = open_device,
    .close = close_device,
    .properties = get_properties,
    .error = last_error,
    .dead = is_dead,
    .alloc = alloc_memory,
    .release = release_memory,
    .alloc_pinned = alloc_pinned,
    .release_pinned = release_pinned,
    .stream_create = create_stream,
    .stream_destroy = release_stream,
    .event_create = create_event,
    .event_destroy = release_event,
    .record = record_event,
    .follow = follow_event,
    .wait = wait_event,
    .copy = copy,
    .clear = clear,
    .file_open = open_file,
    .file_close = close_file,
    .file_read = read_file,
    .verify = verify,
    .decode = decode,
    .expand = expand,
    .split = split,
    .spread = spread,
    .gemm = gemm,
    .angles = angles,
    .store = store,
    .move = move,
    .join = join,
    .attend = attend,
    .merge = merge,
    .restore = restore,
    .fused = fused,
    .gather = gather,
    .take = take,
    .scan = scan,
    .halve = halve,
    .product = product,
    .sums = sums,
    .quantize = quantize,
    .count_values = count_values,
    .encode = encode,
    .round_columns = round_columns,
    .dense_size = dense_size,
    .sketch = sketch,
    .convert = convert,
    .scale_gram = scale_gram,
    .cholesky = cholesky,
    .eigen = eigen,
};
