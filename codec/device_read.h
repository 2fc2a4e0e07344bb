/* device_read.h - what restoring into a device's memory is made of: device_read.c plans the call and puts groups in
 * order, device_group.c has a group decoded by the device, device_direct.c has it read files, device_rows.c brings rows
 * from the CPU. */
#ifndef XKV_DEVICE_READ_H
#define XKV_DEVICE_READ_H

#include "chunks.h"
#include "device_dict.h"
#include "scatter.h"

/* What groups need of the workspace: the most of all of them. */
typedef struct xkv_device_need {
    uint64_t coded;     /* components with integers */
    uint64_t operands;  /* rows of a tile's operands: some components have two (plugin.h) */
    uint64_t width;     /* of a group */
    uint64_t area;      /* operands * width of a group */
    uint64_t angles;    /* cosines and sines of a token */
    uint64_t constants; /* bytes: what a group brings beside its chunks */
    uint64_t cross;     /* coded components of the cross stage */
    uint64_t matrix;    /* bytes of a chunk of lossless rows */
    uint64_t top;       /* leading coefficients of a group that it codes */
} xkv_device_need;

/* Where everything is: offsets into the workspace. */
typedef struct xkv_device_layout {
    uint32_t batch_tokens; /* that are decoded at a time, whole chunks */
    uint32_t tile_tokens;  /* whose rows are computed at a time */
    uint64_t stride;       /* of integers and operands */
    uint64_t cross_stride; /* of the cross stage's integers */
    uint64_t fault, constants, packed[2], integers, cross, angles, operands, components, rows;
    uint64_t size;
} xkv_device_layout;

/* One call. */
typedef struct xkv_device_reading {
    xkv_ctx *ctx;
    xkv_device *device;
    const xkv_plugin *api;
    const xkv_entry *entry;
    const xkv_read_options *o; /* all filled in */
    const xkv_view *views;
    const xkv_device_dict *dict;
    void *stream;
    xkv_target target;               /* without views: for positions, and exact rows */
    uint32_t first_chunk, chunks;    /* that have tokens asked for */
    uint32_t cross_begin, cross_end; /* coded tokens of these chunks */
    xkv_cross_stage cross;
    xkv_device_need need;
    xkv_device_layout at;
    uint8_t *workspace;
    void *file;           /* that the device reads itself; NULL: the host does */
    uint64_t file_offset; /* of the entry */
    uint32_t slot;        /* of the two places for packed bytes: the next */
    bool slot_used[2];

    xkv_pool *pool;
    xkv_chunk_scratch *scratch; /* [threads], of the group at hand */
} xkv_device_reading;

/* A call of the device's table, passed on. */
#define XKV_DEVICE(r, call) XKV_TRY(xkv_device_result((r)->ctx, (r)->device, (r)->api->call))

/* Whether the device can decode a group at all. */
bool xkv_device_takes(const xkv_device_reading *r, const xkv_group *g);

/* Add what a group needs. Errors: as xkv_side_read(); MISMATCH (no dictionary). */
XKV_MUST_CHECK xkv_status xkv_device_group_need(xkv_device_reading *r, const xkv_group *g, xkv_device_need *need);

/* Put the work of a group on the stream, its fault word into results[which], and the event ready[which] behind it.
 * Exact operands are f32: slower, and right for any integer. */
XKV_MUST_CHECK xkv_status xkv_device_group(xkv_device_reading *r, const xkv_group *g, uint32_t which, bool exact);

/* Have the device read the entry's file, if it may and can; and no more. */
XKV_MUST_CHECK xkv_status xkv_device_direct_open(xkv_device_reading *r);
void xkv_device_direct_close(xkv_device_reading *r);

/* Rows of tokens [first, end) of groups that the CPU decodes. Errors: as xkv_entry_read(). */
XKV_MUST_CHECK xkv_status xkv_device_host_rows(xkv_device_reading *r, uint32_t first_group, uint32_t group_count,
                                               uint32_t first, uint32_t end);
/* Sinks and window of a group, as far as they are asked for. */
XKV_MUST_CHECK xkv_status xkv_device_exact_rows(xkv_device_reading *r, const xkv_group_reader *reader);

#endif
