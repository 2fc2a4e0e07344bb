/* pack.h - launch.h for the kernels of packing. */
#ifndef XKV_CUDA_PACK_H
#define XKV_CUDA_PACK_H

#include "plugin.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t xkv_launch_gather(const xkv_plug_gather *o, cudaStream_t stream);
cudaError_t xkv_launch_take(const xkv_plug_take *o, cudaStream_t stream);
cudaError_t xkv_launch_scan(const xkv_plug_scan *o, cudaStream_t stream);
cudaError_t xkv_launch_halve(const xkv_plug_halve *o, cudaStream_t stream);
cudaError_t xkv_launch_sums(const xkv_plug_sums *o, cudaStream_t stream);
cudaError_t xkv_launch_quantize(const xkv_plug_quantize *o, cudaStream_t stream);
cudaError_t xkv_launch_count(const xkv_plug_count *o, cudaStream_t stream);
cudaError_t xkv_launch_encode(const xkv_plug_encode *o, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
