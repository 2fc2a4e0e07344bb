/* A stand-in for the header of cuSOLVER, likewise. */
#ifndef FAKE_CUSOLVER_DN_H
#define FAKE_CUSOLVER_DN_H

#include "cublas_v2.h"

#include <stdint.h>

typedef struct fake_solver *cusolverDnHandle_t;
typedef struct fake_params *cusolverDnParams_t;
typedef enum cusolverStatus {
    CUSOLVER_STATUS_SUCCESS = 0,
    CUSOLVER_STATUS_ALLOC_FAILED = 2,
    CUSOLVER_STATUS_EXECUTION_FAILED = 6,
    CUSOLVER_STATUS_INTERNAL_ERROR = 7
} cusolverStatus_t;
typedef enum cusolverEigMode { CUSOLVER_EIG_MODE_VECTOR = 1 } cusolverEigMode_t;

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t *solver);
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t solver);
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t *params);
cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t params);
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t solver, cudaStream_t stream);
cusolverStatus_t cusolverDnDpotrf_bufferSize(cusolverDnHandle_t solver, cublasFillMode_t uplo, int n, double *a,
                                             int lda, int *words);
cusolverStatus_t cusolverDnDpotrf(cusolverDnHandle_t solver, cublasFillMode_t uplo, int n, double *a, int lda,
                                  double *work, int words, int *info);
cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t solver, cusolverDnParams_t params,
                                                   cusolverEigMode_t mode, cublasFillMode_t uplo, int64_t n,
                                                   cudaDataType type_a, const void *a, int64_t lda, cudaDataType type_w,
                                                   const void *w, cudaDataType compute, size_t *on_device,
                                                   size_t *on_host, int64_t batch);
cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t solver, cusolverDnParams_t params, cusolverEigMode_t mode,
                                        cublasFillMode_t uplo, int64_t n, cudaDataType type_a, void *a, int64_t lda,
                                        cudaDataType type_w, void *w, cudaDataType compute, void *device_work,
                                        size_t device_size, void *host_work, size_t host_size, int *info,
                                        int64_t batch);

#endif
