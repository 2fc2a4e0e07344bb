/* device_dict.h - what of a dictionary, and of the static tables, is kept in a device's memory. */
#ifndef XKV_DEVICE_DICT_H
#define XKV_DEVICE_DICT_H

#include "device.h"
#include "dict.h"

/* A basis there, and what its operands are scaled by. */
typedef struct xkv_device_basis {
    float *rows;    /* the device's: [rank][width] synthesis rows */
    float *largest; /* [rank] magnitude in each row */
    float top_norm; /* of the columns of the first `top` rows, the largest */

    float *analysis; /* the device's: [rank][width]; NULL unless the dictionary is open for packing */
} xkv_device_basis;

struct xkv_device_dict {
    xkv_device *device;
    const xkv_dict *dict;
    xkv_device_basis *bases; /* [c.group_count] */
    float *cross;            /* the device's: [rank][width] analysis rows of the cross stage; NULL likewise */
};

/* The basis that belongs to one of the dictionary's; NULL if it is none of them. */
const xkv_device_basis *xkv_device_basis_find(const xkv_device_dict *d, const xkv_basis *basis);

/* xkv_device_dict_create() without forgetting the last error. */
XKV_MUST_CHECK xkv_status xkv_device_dict_copy(xkv_ctx *ctx, xkv_device *device, const xkv_dict *dict,
                                               xkv_device_dict **dict_p);

/* Wait until all that was put on the device's own stream has arrived. Errors: BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_wait_copies(xkv_ctx *ctx, xkv_device *device);

/* Have the static tables on the device. Errors: MEMORY, BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_load_tables(xkv_ctx *ctx, xkv_device *device);

/* The largest magnitude of n elements. */
float xkv_largest(const float *x, size_t n);
/* A power of two that brings it to 2^13 .. 2^14, so that both halves of an operand are normal numbers of f16. */
float xkv_operand_scale(float largest);

#endif
