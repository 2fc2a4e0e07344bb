/* plugin_file.h - bytes that go from a file to the device without passing through the host's memory (GPUDirect
 * Storage), and checking there what the host has not seen. Included by plugin.h. */
#ifndef XKV_PLUGIN_FILE_H
#define XKV_PLUGIN_FILE_H

/* Files are opened anew: the descriptor is the caller's, and may be closed before the file is.
 * UNSUPPORTED, with the reason as the error: there is no cuFile, or it cannot read this file. */
typedef struct xkv_plug_file_open {
    int fd;             /* of a regular file */
    uint32_t emulation; /* also where cuFile would read through the host's memory, as it does without nvidia-fs */
} xkv_plug_file_open;

/* Exactly `size` bytes, which are there when the call returns: the one operation that waits, and is put on no stream.
 * What is on streams must not use `to` meanwhile. Any alignment. BACKEND: whatever went wrong. */
typedef struct xkv_plug_file_read {
    void *file;
    uint64_t offset, size;
    void *to;
} xkv_plug_file_read;

/* Compare streams with their checksums. A stream is empty, or longer than XKV_SUM_SHORT bytes; `packed` and the offsets
 * are multiples of 8. */
#define XKV_SUM_SHORT 240u
typedef struct xkv_plug_verify {
    const uint8_t *packed;
    const xkv_plug_stream *streams; /* [count] */
    uint32_t count;
    uint32_t *fault; /* XKV_WARP_BAD_SUM is set in it */
} xkv_plug_verify;

#endif
