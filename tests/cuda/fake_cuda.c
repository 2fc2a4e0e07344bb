#include "fake_cuda.h"

#include <cublas_v2.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "element.h"

__attribute__((visibility("default"))) fake_cuda_control fake_cuda = {.devices = 1, .capability = 9};

const fake_cuda_control *fake_cuda_now(void)
{
    return &fake_cuda;
}

static cudaError_t last_error;
static int broken; /* a context that has met an error like an illegal address stays so */

/* Count a call, and let it fail if it is its turn. */
static cudaError_t call(void)
{
    fake_cuda.calls++;
    if (broken)
        return last_error = (cudaError_t)broken;
    if (fake_cuda.calls != fake_cuda.fail_at)
        return cudaSuccess;
    if (fake_cuda.error >= cudaErrorIllegalAddress)
        broken = (int)fake_cuda.error;
    return last_error = fake_cuda.error;
}

/* A call that a graph cannot take up. */
static void outside_of_graphs(const char *what)
{
    if (!fake_cuda.capturing)
        return;
    fprintf(stderr, "fake_cuda: %s while a graph is captured\n", what);
    abort();
}

#define CALL()                                                                                                         \
    do {                                                                                                               \
        cudaError_t call_ = call();                                                                                    \
        if (call_ != cudaSuccess)                                                                                      \
            return call_;                                                                                              \
    } while (0)

cudaError_t cudaGetLastError(void)
{
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}

const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaErrorInsufficientDriver ? "CUDA driver version is insufficient for CUDA runtime version"
           : e == cudaErrorNoDevice         ? "no CUDA-capable device is detected"
           : e == cudaErrorMemoryAllocation ? "out of memory"
                                            : "a fault that the test asked for";
}

const char *cudaGetErrorName(cudaError_t e)
{
    return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorOther";
}

/* --- Devices ------------------------------------------------------------------------------------------------------ */

cudaError_t cudaGetDeviceCount(int *count)
{
    CALL();
    *count = fake_cuda.devices;
    return last_error = fake_cuda.count_error;
}

cudaError_t cudaGetDevice(int *index)
{
    CALL();
    *index = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int index)
{
    CALL();
    return index < fake_cuda.devices ? cudaSuccess : (last_error = cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int index)
{
    (void)attribute;
    (void)index;
    CALL();
    *value = fake_cuda.capability;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int index)
{
    (void)index;
    CALL();
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulated device");
    p->major = fake_cuda.capability;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *all)
{
    *all = fake_cuda.memory != 0 ? (size_t)fake_cuda.memory : (size_t)1 << 33;
    *available = *all - (size_t)fake_cuda.used;
    return cudaSuccess;
}

/* --- Memory ------------------------------------------------------------------------------------------------------- */

typedef struct block {
    uint8_t *bytes;
    uint64_t size;
    int pinned;
    struct block *next;
} block;

static block *blocks;

static cudaError_t new_block(void **p, size_t size, int pinned)
{
    block *b;

    if (!pinned && fake_cuda.memory != 0 && size > fake_cuda.memory - fake_cuda.used)
        return last_error = cudaErrorMemoryAllocation;
    b = calloc(1, sizeof *b);
    *b = (block){aligned_alloc(256, (size + 255) / 256 * 256), size, pinned, blocks}; /* as the runtime aligns it */
    memset(b->bytes, 0xa5, size);
    blocks = b;
    fake_cuda.blocks++;
    if (!pinned)
        fake_cuda.used += size;
    if (fake_cuda.used > fake_cuda.peak)
        fake_cuda.peak = fake_cuda.used;
    *p = b->bytes;
    return cudaSuccess;
}

static void free_block(const void *p, int pinned)
{
    for (block **at = &blocks; *at != NULL; at = &(*at)->next) {
        block *b = *at;
        if (b->bytes != p)
            continue;
        if (b->pinned != pinned)
            break;
        *at = b->next;
        fake_cuda.blocks--;
        if (!pinned)
            fake_cuda.used -= b->size;
        free(b->bytes);
        free(b);
        return;
    }
    fprintf(stderr, "fake_cuda: %p is no block that was allocated like this\n", p);
    abort();
}

void fake_check(const void *p, uint64_t size)
{
    const uint8_t *bytes = p;

    for (const block *b = blocks; b != NULL; b = b->next)
        if (bytes >= b->bytes && size <= b->size && (uint64_t)(bytes - b->bytes) <= b->size - size)
            return;
    fprintf(stderr, "fake_cuda: %llu bytes at %p are not in one block of device memory\n", (unsigned long long)size, p);
    abort();
}

/* Not pinned either, which might have changed when a graph is launched. */
static int in_device_memory(const void *p)
{
    const uint8_t *bytes = p;

    for (const block *b = blocks; b != NULL; b = b->next)
        if (bytes >= b->bytes && bytes < b->bytes + b->size)
            return !b->pinned;
    return 0;
}

static void run_all(void);

cudaError_t cudaMalloc(void **p, size_t size)
{
    outside_of_graphs("cudaMalloc");
    CALL();
    return new_block(p, size, 0);
}

cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags)
{
    outside_of_graphs("cudaHostAlloc");
    (void)flags;
    CALL();
    return new_block(p, size, 1);
}

cudaError_t cudaFree(void *p)
{
    outside_of_graphs("cudaFree");
    cudaError_t e = call();
    if (p != NULL) {
        run_all();
        free_block(p, 0);
    }
    return e;
}

cudaError_t cudaFreeHost(void *p)
{
    outside_of_graphs("cudaFreeHost");
    cudaError_t e = call();
    if (p != NULL) {
        run_all();
        free_block(p, 1);
    }
    return e;
}

/* --- Streams ------------------------------------------------------------------------------------------------------ */

typedef struct operation {
    void (*run)(const void *args); /* NULL: wait for `stream` to have done `count` */
    struct fake_stream *stream;
    uint64_t count;
    struct operation *next;
    _Alignas(16) unsigned char args[];
} operation;

struct fake_stream {
    uint64_t put, done;
    operation *first, *last;
    struct fake_stream *next;
};

struct fake_event {
    struct fake_stream *stream; /* NULL: never recorded */
    uint64_t count;
};

static struct fake_stream default_stream;
static struct fake_stream *streams = &default_stream;

static struct fake_stream *the(cudaStream_t stream)
{
    return stream != NULL ? stream : &default_stream;
}

static void run_until(struct fake_stream *s, uint64_t count)
{
    while (s->done < count) {
        operation *o = s->first;
        s->first = o->next;
        if (s->first == NULL)
            s->last = NULL;
        s->done++;
        if (o->run == NULL)
            run_until(o->stream, o->count);
        else if (!broken)
            o->run(o->args);
        free(o);
    }
}

static void run_all(void)
{
    for (struct fake_stream *s = streams; s != NULL; s = s->next)
        run_until(s, s->put);
}

static void put(struct fake_stream *s, operation *o)
{
    o->next = NULL;
    if (s->last != NULL)
        s->last->next = o;
    else
        s->first = o;
    s->last = o;
    s->put++;
    if (fake_cuda.eager)
        run_until(s, s->put);
}

cudaError_t fake_launch(cudaStream_t stream, void (*run)(const void *args), const void *args, size_t size)
{
    operation *o;

    CALL();
    fake_cuda.launches++;
    o = malloc(sizeof *o + size);
    *o = (operation){.run = run};
    memcpy(o->args, args, size);
    put(the(stream), o);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    outside_of_graphs("cudaStreamCreateWithFlags");
    (void)flags;
    CALL();
    *stream = calloc(1, sizeof **stream);
    (*stream)->next = default_stream.next;
    default_stream.next = *stream;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    outside_of_graphs("cudaStreamDestroy");
    run_until(stream, stream->put);
    for (struct fake_stream *s = streams; s != NULL; s = s->next)
        if (s->next == stream)
            s->next = stream->next;
    free(stream);
    return call();
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    outside_of_graphs("cudaEventCreateWithFlags");
    (void)flags;
    CALL();
    *event = calloc(1, sizeof **event);
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    outside_of_graphs("cudaEventDestroy");
    free(event);
    return call();
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    CALL();
    event->stream = the(stream);
    event->count = event->stream->put;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    operation *o;

    (void)flags;
    CALL();
    if (event->stream == NULL)
        return cudaSuccess;
    o = malloc(sizeof *o);
    *o = (operation){.stream = event->stream, .count = event->count};
    put(the(stream), o);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    outside_of_graphs("cudaEventSynchronize");
    CALL();
    if (event->stream != NULL)
        run_until(event->stream, event->count);
    return cudaSuccess;
}

typedef struct copying {
    void *to;
    const void *from;
    size_t size;
} copying;

static void run_copy(const void *args)
{
    const copying *c = args;
    memcpy(c->to, c->from, c->size);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind kind, cudaStream_t stream)
{
    copying c = {to, from, size};

    (void)kind;
    if (fake_cuda.capturing && !(in_device_memory(to) && in_device_memory(from)))
        outside_of_graphs("a copy from or to the host");
    return fake_launch(stream, run_copy, &c, sizeof c);
}

static void run_clear(const void *args)
{
    const copying *c = args;
    fake_check(c->to, c->size);
    memset(c->to, 0, c->size);
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream)
{
    copying c = {p, NULL, size};

    (void)value;
    return fake_launch(stream, run_clear, &c, sizeof c);
}

/* --- cuBLAS ------------------------------------------------------------------------------------------------------- */

struct fake_blas {
    cudaStream_t stream;
    void *workspace;
};

cudaStream_t fake_blas_stream(const struct fake_blas *blas)
{
    return blas->stream;
}

static cublasStatus_t blas_call(void)
{
    return call() == cudaSuccess                          ? CUBLAS_STATUS_SUCCESS
           : fake_cuda.error == cudaErrorMemoryAllocation ? CUBLAS_STATUS_ALLOC_FAILED
                                                          : CUBLAS_STATUS_EXECUTION_FAILED;
}

const char *cublasGetStatusString(cublasStatus_t s)
{
    return s == CUBLAS_STATUS_ALLOC_FAILED ? "CUBLAS_STATUS_ALLOC_FAILED" : "CUBLAS_STATUS_EXECUTION_FAILED";
}

cublasStatus_t cublasCreate(cublasHandle_t *blas)
{
    cublasStatus_t s = blas_call();
    if (s == CUBLAS_STATUS_SUCCESS)
        *blas = calloc(1, sizeof **blas);
    return s;
}

cublasStatus_t cublasDestroy(cublasHandle_t blas)
{
    free(blas);
    return blas_call();
}

cublasStatus_t cublasSetMathMode(cublasHandle_t blas, cublasMath_t mode)
{
    (void)blas;
    (void)mode;
    return blas_call();
}

cublasStatus_t cublasSetPointerMode(cublasHandle_t blas, cublasPointerMode_t mode)
{
    (void)blas;
    (void)mode;
    return blas_call();
}

cublasStatus_t cublasSetStream(cublasHandle_t blas, cudaStream_t stream)
{
    blas->stream = stream;
    blas->workspace = NULL; /* as the documentation says */
    return blas_call();
}

cublasStatus_t cublasSetWorkspace(cublasHandle_t blas, void *workspace, size_t size)
{
    fake_check(workspace, size);
    blas->workspace = workspace;
    return blas_call();
}

/* Columns first: element (i, j) of a matrix is at i + j ld. */
typedef struct product {
    const uint8_t *a, *b;
    uint8_t *c;
    size_t m, n, k, lda, ldb, ldc, elem;
    double alpha, beta;
    int transpose_a, transpose_b;
    cudaDataType type;
    int batch;
    size_t a_step, b_step, c_step;
} product;

static double operand(const product *p, const uint8_t *x, size_t at)
{
    uint16_t bits;

    x += p->elem * at;
    if (p->type == CUDA_R_64F)
        return *(const double *)(const void *)x;
    if (p->type == CUDA_R_32F)
        return (double)*(const float *)(const void *)x;
    memcpy(&bits, x, 2);
    return (double)(p->type == CUDA_R_16F ? xkv_f16_to_f32(bits) : xkv_float_from_bits((uint32_t)bits << 16));
}

/* Sums are f32 unless everything is f64. */
static double next_sum(const product *p, double sum, double more)
{
    return p->type == CUDA_R_64F ? sum + more : (double)((float)sum + (float)more);
}

static void put_result(const product *p, uint8_t *c, double sum)
{
    if (p->type == CUDA_R_64F) {
        double *out = (double *)(void *)c;
        *out = p->alpha * sum + (p->beta != 0 ? p->beta * *out : 0);
    } else {
        float *out = (float *)(void *)c;
        *out = (float)p->alpha * (float)sum + (p->beta != 0 ? (float)p->beta * *out : 0);
    }
}

/* Elements of a matrix of `rows` x `columns`, stored transposed or not. */
static size_t span_of(size_t rows, size_t columns, size_t ld, int transposed)
{
    return transposed ? (rows - 1) * ld + columns : (columns - 1) * ld + rows;
}

static void run_one(const product *p, const uint8_t *a, const uint8_t *b, uint8_t *c)
{
    size_t elem = p->type == CUDA_R_64F ? 8 : 4;

    if (p->k > 0) {
        fake_check(a, p->elem * span_of(p->m, p->k, p->lda, p->transpose_a));
        fake_check(b, p->elem * span_of(p->k, p->n, p->ldb, p->transpose_b));
    }
    fake_check(c, elem * span_of(p->m, p->n, p->ldc, 0));
    for (size_t j = 0; j < p->n; j++)
        for (size_t i = 0; i < p->m; i++) {
            double sum = 0;
            for (size_t l = 0; l < p->k; l++)
                sum = next_sum(p, sum,
                               operand(p, a, p->transpose_a ? i * p->lda + l : l * p->lda + i) *
                                   operand(p, b, p->transpose_b ? l * p->ldb + j : j * p->ldb + l));
            put_result(p, c + elem * (j * p->ldc + i), sum);
        }
}

static void run_product(const void *args)
{
    const product *p = args;
    size_t elem = p->type == CUDA_R_64F ? 8 : 4;

    fake_cuda.exact_products += p->type == CUDA_R_32F;
    for (size_t i = 0; i < (size_t)p->batch; i++)
        run_one(p, p->a + i * p->a_step * p->elem, p->b + i * p->b_step * p->elem, p->c + i * p->c_step * elem);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t blas, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                                          int n, int k, const void *alpha, const void *a, cudaDataType type_a, int lda,
                                          long long a_step, const void *b, cudaDataType type_b, int ldb,
                                          long long b_step, const void *beta, void *c, cudaDataType type_c, int ldc,
                                          long long c_step, int batch, cublasComputeType_t compute,
                                          cublasGemmAlgo_t algo)
{
    product p = {.a = a,
                 .b = b,
                 .c = c,
                 .m = (size_t)m,
                 .n = (size_t)n,
                 .k = (size_t)k,
                 .lda = (size_t)lda,
                 .ldb = (size_t)ldb,
                 .ldc = (size_t)ldc,
                 .elem = type_a == CUDA_R_64F   ? 8
                         : type_a == CUDA_R_32F ? 4
                                                : 2,
                 .transpose_a = op_a == CUBLAS_OP_T,
                 .transpose_b = op_b == CUBLAS_OP_T,
                 .type = type_a,
                 .batch = batch,
                 .a_step = (size_t)a_step,
                 .b_step = (size_t)b_step,
                 .c_step = (size_t)c_step};

    (void)algo;
    p.alpha = compute == CUBLAS_COMPUTE_64F ? *(const double *)alpha : (double)*(const float *)alpha;
    p.beta = compute == CUBLAS_COMPUTE_64F ? *(const double *)beta : (double)*(const float *)beta;
    if (type_a != type_b || type_c != (type_a == CUDA_R_64F ? CUDA_R_64F : CUDA_R_32F) ||
        (compute == CUBLAS_COMPUTE_64F) != (type_a == CUDA_R_64F) || lda < (p.transpose_a ? k : m) || ldc < m ||
        ldb < (p.transpose_b ? n : k) || (compute == CUBLAS_COMPUTE_32F_FAST_TF32 && type_a != CUDA_R_32F) ||
        blas->workspace == NULL) {
        fprintf(stderr, "fake_cuda: a GEMM that cuBLAS would refuse, or one without a workspace\n");
        abort();
    }
    return fake_launch(blas->stream, run_product, &p, sizeof p) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                               : CUBLAS_STATUS_EXECUTION_FAILED;
}
