/* A stand-in for the header of cuBLAS, likewise. */
#ifndef FAKE_CUBLAS_V2_H
#define FAKE_CUBLAS_V2_H

#include "cuda_runtime_api.h"

typedef struct fake_blas *cublasHandle_t;
typedef enum cublasStatus {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_INTERNAL_ERROR = 14
} cublasStatus_t;
typedef enum cublasOperation { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 } cublasOperation_t;
typedef enum cublasComputeType {
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_64F = 70,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77
} cublasComputeType_t;
typedef enum cublasGemmAlgo { CUBLAS_GEMM_DEFAULT = -1 } cublasGemmAlgo_t;
typedef enum cublasPointerMode { CUBLAS_POINTER_MODE_HOST = 0 } cublasPointerMode_t;
typedef enum cublasFillMode { CUBLAS_FILL_MODE_UPPER = 1 } cublasFillMode_t;
typedef enum cublasSideMode { CUBLAS_SIDE_LEFT = 0 } cublasSideMode_t;
typedef enum cublasDiagType { CUBLAS_DIAG_NON_UNIT = 0 } cublasDiagType_t;
typedef int cublasMath_t;
enum { CUBLAS_DEFAULT_MATH = 0, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16 };

const char *cublasGetStatusString(cublasStatus_t s);
cublasStatus_t cublasCreate(cublasHandle_t *blas);
cublasStatus_t cublasDestroy(cublasHandle_t blas);
cublasStatus_t cublasSetMathMode(cublasHandle_t blas, cublasMath_t mode);
cublasStatus_t cublasSetPointerMode(cublasHandle_t blas, cublasPointerMode_t mode);
cublasStatus_t cublasSetStream(cublasHandle_t blas, cudaStream_t stream);
cublasStatus_t cublasSetWorkspace(cublasHandle_t blas, void *workspace, size_t size);
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t blas, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                                          int n, int k, const void *alpha, const void *a, cudaDataType type_a, int lda,
                                          long long a_step, const void *b, cudaDataType type_b, int ldb,
                                          long long b_step, const void *beta, void *c, cudaDataType type_c, int ldc,
                                          long long c_step, int batch, cublasComputeType_t compute,
                                          cublasGemmAlgo_t algo);

cublasStatus_t cublasDtrsm(cublasHandle_t blas, cublasSideMode_t side, cublasFillMode_t uplo, cublasOperation_t op,
                           cublasDiagType_t diagonal, int m, int n, const double *alpha, const double *a, int lda,
                           double *b, int ldb);

#endif
