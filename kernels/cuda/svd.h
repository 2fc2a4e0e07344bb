/* svd.h - launch.h for the kernels of the truncated SVD. */
#ifndef XKV_CUDA_SVD_H
#define XKV_CUDA_SVD_H

#include "plugin.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t xkv_launch_sketch(const xkv_plug_sketch *o, cudaStream_t stream);
cudaError_t xkv_launch_convert(const xkv_plug_convert *o, cudaStream_t stream);
cudaError_t xkv_launch_scale_gram(const xkv_plug_scale_gram *o, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
