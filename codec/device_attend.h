/* device_attend.h - attention on a device: device_hold.c copies what an attention holds, device_attend.c puts calls on
 * a stream. */
#ifndef XKV_DEVICE_ATTEND_H
#define XKV_DEVICE_ATTEND_H

#include "attend_layer.h"
#include "attention.h"
#include "device_dict.h"

/* Elements of a head whose tile fits into shared memory. */
#define XKV_HELD_DIM 640u

struct xkv_device_attention {
    xkv_device *device;
    const xkv_geometry *geometry;
    uint32_t first_layer, layer_count, token_count;
    uint32_t entry_count; /* of a chain, that give rows; 1 when rows are held */
    uint32_t tile_count, split_count;
    uint8_t *memory; /* the device's: all that follows */
    uint64_t size;
    xkv_device_dict **dicts; /* [entry_count] copied for this attention, or NULL */

    int32_t *positions;      /* [token_count] */
    float *angles;           /* [token_count][angles_stride] */
    uint64_t angles_stride;  /* in floats */
    uint64_t *angles_at;     /* the host's: [rope_count] */
    xkv_held_plane *planes;  /* [plane_count][entry_count][2]: coded, exact */
    uint32_t **value_planes; /* the host's: [plane_count] of [entry_count] */
    xkv_held_tile **tiles;   /* the host's: [plane_count] of [tile_count]; NULL: not asked for */
    uint32_t *slots;         /* the host's: [plane_count] the most of its entries */
    xkv_held_split *splits;
};

/* Where a plane's rows in entry `entry` of the chain are described. */
static inline uint32_t xkv_held_index(const xkv_device_attention *d, uint32_t plane, uint32_t entry, bool exact)
{
    return (plane * d->entry_count + entry) * 2 + exact;
}

#endif
