/* attend.h - the kernels of attention and of restoring what it holds, as plugin.c starts them; otherwise as launch.h.
 */
#ifndef XKV_CUDA_ATTEND_H
#define XKV_CUDA_ATTEND_H

#include "plugin.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t xkv_launch_attend(const xkv_plug_attend *o, cudaStream_t stream);
cudaError_t xkv_launch_merge(const xkv_plug_merge *o, cudaStream_t stream);
cudaError_t xkv_launch_restore(const xkv_plug_restore *o, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
