/*
 * xkv/kernels.h - which backend does the arithmetic.
 *
 * The CPU backend is complete and always there. Its inner loops come in plain C and, on x86-64, for AVX2 and F16C, on
 * AArch64 for NEON, chosen once at run time. Results of all agree bit for bit.
 * The environment variable XKV_CPU ("generic", "avx2", "avx512", "neon") lowers the choice for tests; a value that
 * names nothing that runs here is ignored with a warning through the context's log.
 *
 * Devices restore entries straight into their own memory, and pack from there: xkv_device_read() and xkv_device_pack()
 * of <xkv/codec.h>. They come with a plug-in, libxkv_cuda.so, which is looked for beside this library (or program, when
 * it is linked in) and loaded when it is first asked for; the library itself needs no CUDA. The environment variable
 * XKV_BACKEND ("auto", the default; "cpu": use no device; "cuda": there must be one) chooses for programs that do not,
 * and XKV_CUDA_PLUGIN names another file. Everything that has no device falls back to the CPU, and says so.
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

/* --- Backends ----------------------------------------------------------------------------------------------------- */

typedef enum xkv_backend_kind {
    XKV_BACKEND_AUTO = 0, /* what XKV_BACKEND says, else CUDA where it can be used, else the CPU */
    XKV_BACKEND_CPU = 1,
    XKV_BACKEND_CUDA = 2
} xkv_backend_kind;

typedef struct xkv_backend_info {
    uint32_t backend;      /* xkv_backend_kind: what AUTO comes to here, CPU or CUDA */
    uint32_t device_count; /* that can be used */
    char reason[256];      /* why CUDA cannot be used: no plug-in, one of another version, no driver, no device, or
                              XKV_BACKEND; "" when it can */
} xkv_backend_info;

/* Find out, which loads the plug-in. Any thread. */
XKV_API void xkv_backend_get_info(xkv_backend_info *info);

/* --- Devices ------------------------------------------------------------------------------------------------------ */

/* Whether a device reads files itself, past the host's memory (GPUDirect Storage, libcufile.so.0, which is looked for
 * when a device first restores from a file). It takes the parts of entries that hold integers, and checks them. */
typedef enum xkv_direct_kind {
    XKV_DIRECT_AUTO = 0, /* where its driver, nvidia-fs, is there */
    XKV_DIRECT_OFF = 1,
    XKV_DIRECT_ON = 2 /* also by what cuFile does in its stead; without cuFile the log says so */
} xkv_direct_kind;

/* An opened device: its context, staging memory and tables. One call at a time; several may be opened. Once an error
 * has broken its context all calls fail with BACKEND: close it, the process must be started anew to use the device. */
typedef struct xkv_device xkv_device;

typedef struct xkv_device_options {
    size_t struct_size;
    uint32_t backend;       /* xkv_backend_kind; default AUTO. CPU: there is no device to open, UNSUPPORTED */
    uint32_t index;         /* of the device, as the CUDA runtime counts; default 0 */
    uint32_t staging_count; /* pinned buffers between file and device, 2 .. 4; default 3 */
    uint64_t staging_bytes; /* of each; default 16 MiB, at least 1 MiB */
    uint32_t direct;        /* xkv_direct_kind; default AUTO */
} xkv_device_options;

static inline xkv_device_options xkv_device_options_default(void)
{
    xkv_device_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.staging_count = 3;
    o.staging_bytes = 16u << 20;
    return o;
}

/* Open a device. `options` may be NULL for defaults. Errors: UNSUPPORTED with the reason (no plug-in, driver or device;
 * XKV_BACKEND=cpu), ARGUMENT (options; an XKV_BACKEND that is none of the three), MEMORY, BACKEND. */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_open(xkv_ctx *ctx, const xkv_device_options *options,
                                                  xkv_device **device_p);
XKV_API void xkv_device_close(xkv_ctx *ctx, xkv_device *device);

typedef struct xkv_device_info {
    char name[96];
    uint32_t major, minor;      /* compute capability */
    uint32_t driver, runtime;   /* versions, 1000 * major + 10 * minor */
    uint64_t memory, available; /* bytes */
    uint32_t broken;            /* non-zero: every call fails */
    uint64_t direct_bytes;      /* that it has read from files itself so far */
} xkv_device_info;
XKV_API void xkv_device_get_info(xkv_device *device, xkv_device_info *info);

#ifdef __cplusplus
}
#endif
#endif
