/*
 * xkv/kernels.h - which backend does the arithmetic.
 *
 * The CPU backend is complete and always there. Its inner loops come in plain C and, on x86-64, for AVX2 and F16C, on
 * AArch64 for NEON, chosen once at run time. Results of all agree bit for bit.
 * The environment variable XKV_CPU ("generic", "avx2", "neon") lowers the choice for tests; a value that names nothing
 * that runs here is ignored with a warning through the context's log.
 */
#ifndef XKV_KERNELS_H
#define XKV_KERNELS_H

#include "xkv/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Name of the CPU code in use: "generic", "avx2" or "neon". Static storage, any thread. */
XKV_API const char *xkv_kernels_cpu_name(void);

/* Name and version of the BLAS behind it, as it reports them. Static storage, any thread. */
XKV_API const char *xkv_kernels_blas_name(void);

#ifdef __cplusplus
}
#endif
#endif
