/* device.h - an opened device, as the codec uses it. */
#ifndef XKV_DEVICE_H
#define XKV_DEVICE_H

#include "base.h"
#include "plugin.h"
#include "xkv/kernels.h"

#define XKV_MAX_STAGING    4u
#define XKV_DEVICE_RESULTS 64u

/* A pinned buffer on its way to the device, and when it may be written again. */
typedef struct xkv_staging {
    uint8_t *bytes;
    void *event; /* of the last work that reads it */
    bool busy;   /* the event was recorded, and nobody has waited for it */
} xkv_staging;

struct xkv_device {
    const xkv_plugin *api;
    xkv_plug_device *plug;
    bool reported; /* that it is broken */

    void *copies;   /* a stream of our own, for what goes to the device beside the caller's work */
    void *begun;    /* event: where the caller's stream was when a call began */
    void *ready[2]; /* events: a group is restored; this one, and the one before */
    void *results;  /* pinned, XKV_DEVICE_RESULTS bytes */
    /* Events of two places that take turns: what one is to hold has arrived, has been used. */
    void *arrived[2], *used[2];

    uint32_t staging_count, staging_next;
    uint64_t staging_bytes;
    xkv_staging staging[XKV_MAX_STAGING];

    uint32_t direct;       /* xkv_direct_kind */
    uint64_t direct_bytes; /* read past the host so far */

    void *tables; /* the codec's, put here by its first call; released with the device */
};

/* What a call of the device's table came to: passed on, with the device's own text. That a device is broken is logged
 * once. */
xkv_status xkv_device_result(xkv_ctx *ctx, xkv_device *device, xkv_status status);

/* The next staging buffer, once the device has read what was in it. Errors: BACKEND. */
XKV_MUST_CHECK xkv_status xkv_staging_get(xkv_ctx *ctx, xkv_device *device, xkv_staging **staging_p);
/* All work on `stream` so far reads it. */
XKV_MUST_CHECK xkv_status xkv_staging_put(xkv_ctx *ctx, xkv_device *device, xkv_staging *staging, void *stream);

/* Copy host memory, any size, through the staging buffers, behind what is on `stream`. */
XKV_MUST_CHECK xkv_status xkv_device_upload(xkv_ctx *ctx, xkv_device *device, const void *from, uint64_t size, void *to,
                                            void *stream);

/* The reverse, and wait for it. */
XKV_MUST_CHECK xkv_status xkv_device_download(xkv_ctx *ctx, xkv_device *device, const void *from, uint64_t size,
                                              void *to, void *stream);

#endif
