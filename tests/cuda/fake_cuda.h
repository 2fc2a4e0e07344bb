/* fake_cuda.h - a device that is made of threads' loops: a CUDA runtime and cuBLAS for tests, which
 * kernels/cuda/plugin.c is compiled against. Device memory is malloc'ed and known by its blocks, so that a host pointer
 * in a kernel's arguments, or a step beyond an allocation, ends the program. Streams do nothing until somebody waits,
 * so that a buffer that is written again too early spoils the result, as it might on a device. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <cuda_runtime_api.h>

#include <stdint.h>

/* What the tests set and read: found by its name in the plug-in. */
typedef struct fake_cuda_control {
    int devices;             /* how many there are */
    cudaError_t count_error; /* what asking for them gives */
    int capability;          /* major */
    uint64_t memory;         /* of the device; 0: no limit */
    uint64_t fail_at;        /* the call of the runtime (1 = the first) that fails with `error`; 0: none */
    cudaError_t error;
    int eager;     /* run everything at once */
    int capturing; /* a graph is: what is not put on a stream ends the program */

    uint64_t calls, used, peak, blocks; /* calls so far; bytes, their most, and blocks (pinned ones too) alive */
    uint64_t launches, exact_products;  /* of all; GEMMs of f32 */
    uint64_t fused;                     /* fused kernels */
} fake_cuda_control;

extern fake_cuda_control fake_cuda;
/* For the other files of the plug-in: what it is told, and the stream of a handle. */
const fake_cuda_control *fake_cuda_now(void);
struct fake_blas;
cudaStream_t fake_blas_stream(const struct fake_blas *blas);

/* Put `run`(args) on a stream. */
cudaError_t fake_launch(cudaStream_t stream, void (*run)(const void *args), const void *args, size_t size);

/* A launch of kernels/cuda/launch.h: run_NAME() put on the stream. */
#define FAKE_LAUNCH(name)                                                                                              \
    XKV_LAUNCH(name)                                                                                                   \
    {                                                                                                                  \
        return fake_launch(stream, run_##name, o, sizeof *o);                                                          \
    }

/* End the program unless [p, p + size) is device memory, or pinned. */
void fake_check(const void *p, uint64_t size);

#endif
