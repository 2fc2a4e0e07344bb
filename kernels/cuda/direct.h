/* direct.h - files that the device reads itself (GPUDirect Storage), by way of cuFile, which is loaded when it is first
 * asked for. Texts of failures go to error[error_size]. Any thread; a file may be read by several at once. */
#ifndef XKV_CUDA_DIRECT_H
#define XKV_CUDA_DIRECT_H

#include "plugin.h"

typedef struct xkv_direct_file xkv_direct_file;

/* As xkv_plug_file_open. Errors: UNSUPPORTED, MEMORY. */
xkv_status xkv_direct_open(const xkv_plug_file_open *o, xkv_direct_file **file_p, char *error, size_t error_size);
void xkv_direct_close(xkv_direct_file *file); /* accepts NULL */

/* As xkv_plug_file_read. Errors: BACKEND. */
xkv_status xkv_direct_read(const xkv_plug_file_read *o, char *error, size_t error_size);

#endif
