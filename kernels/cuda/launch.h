/* launch.h - the kernels, as plugin.c starts them. Each puts one kernel on the stream; the result is that of the launch
 * alone. Arguments are those of plugin.h. */
#ifndef XKV_CUDA_LAUNCH_H
#define XKV_CUDA_LAUNCH_H

#include "plugin.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t xkv_launch_decode(const xkv_plug_decode *o, cudaStream_t stream);
cudaError_t xkv_launch_expand(const xkv_plug_expand *o, cudaStream_t stream);
cudaError_t xkv_launch_split(const xkv_plug_split *o, cudaStream_t stream);
cudaError_t xkv_launch_spread(const xkv_plug_spread *o, cudaStream_t stream);
cudaError_t xkv_launch_angles(const xkv_plug_angles *o, cudaStream_t stream);
cudaError_t xkv_launch_store(const xkv_plug_store *o, cudaStream_t stream);
cudaError_t xkv_launch_move(const xkv_plug_move *o, cudaStream_t stream);
cudaError_t xkv_launch_join(const xkv_plug_join *o, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
