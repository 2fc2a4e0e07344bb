/* support.h - what the Python package needs beside libxkv: memory that grows, and Ctrl-C. */
#ifndef XKV_PYTHON_SUPPORT_H
#define XKV_PYTHON_SUPPORT_H

#include <xkv/common.h>
#include <xkv/format.h>

/* Bytes written in any order. Begin with zeros, end with xkv_py_buffer_free(). */
typedef struct xkv_py_buffer {
    uint8_t *data;
    size_t size, capacity;
} xkv_py_buffer;

/* An output into `buffer`, which must stay where it is. */
xkv_output xkv_py_buffer_output(xkv_py_buffer *buffer);
void xkv_py_buffer_free(xkv_py_buffer *buffer);

/* While a call runs on the main thread: SIGINT also cancels `ctx`, beside what it does otherwise (Python's handler
 * makes it a KeyboardInterrupt after the call). Without effect where SIGINT is ignored or ends the process. Returns
 * what xkv_py_interrupt_end() wants. Main thread only; calls nest. */
xkv_ctx *xkv_py_interrupt_begin(xkv_ctx *ctx);
void xkv_py_interrupt_end(xkv_ctx *outer);

#endif
