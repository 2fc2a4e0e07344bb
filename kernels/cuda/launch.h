/* launch.h - the kernels, as plugin.c starts them. Each puts its kernels on the stream; the result is that of the
 * launches alone. Arguments are those of plugin.h. */
#ifndef XKV_CUDA_LAUNCH_H
#define XKV_CUDA_LAUNCH_H

#include "plugin.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#define XKV_LAUNCH(name) cudaError_t xkv_launch_##name(const xkv_plug_##name *o, cudaStream_t stream)

/* launch.cu */
XKV_LAUNCH(verify);
XKV_LAUNCH(decode);
XKV_LAUNCH(expand);
XKV_LAUNCH(split);
XKV_LAUNCH(spread);
XKV_LAUNCH(angles);
XKV_LAUNCH(store);
XKV_LAUNCH(move);
XKV_LAUNCH(join);

/* attend.cu */
XKV_LAUNCH(attend);
XKV_LAUNCH(merge);
XKV_LAUNCH(restore);

/* fused.cu */
XKV_LAUNCH(fused);

/* pack.cu */
XKV_LAUNCH(gather);
XKV_LAUNCH(take);
XKV_LAUNCH(scan);
XKV_LAUNCH(halve);
XKV_LAUNCH(sums);
XKV_LAUNCH(quantize);
XKV_LAUNCH(count);
XKV_LAUNCH(encode);
XKV_LAUNCH(round_columns);

/* svd.cu */
XKV_LAUNCH(sketch);
XKV_LAUNCH(convert);
XKV_LAUNCH(scale_gram);

#ifdef __cplusplus
}
#endif
#endif
