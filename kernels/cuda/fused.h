/* fused.h - the fused kernel, as plugin.c starts it; otherwise as launch.h. */
#ifndef XKV_CUDA_FUSED_H
#define XKV_CUDA_FUSED_H

#include "plugin.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t xkv_launch_fused(const xkv_plug_fused *o, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
