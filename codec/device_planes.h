/* device_planes.h - the planes of a group, and the angles of their RoPE, as the device takes them. Neighbouring planes
 * of one RoPE share their angles. */
#ifndef XKV_DEVICE_PLANES_H
#define XKV_DEVICE_PLANES_H

#include "container.h"
#include "device.h"
#include "rows.h"

/* Where arrays of constants begin. */
#define XKV_CONSTANT_ALIGN 16u

/* A view in a device's memory of some heads of a plane. Errors: ARGUMENT, alignment included. */
XKV_MUST_CHECK xkv_status xkv_device_check_view(xkv_ctx *ctx, const xkv_geometry *geometry, uint32_t plane,
                                                xkv_heads heads, const xkv_view *view);

/* planes[g->plane_count]; views [plane_count] of the geometry, of those heads. */
void xkv_device_list_planes(const xkv_geometry *geometry, const xkv_group *g, const xkv_view *views, xkv_heads heads,
                            xkv_plug_plane *planes);

/* The angles per position of the RoPEs in turn, each at a multiple of XKV_CONSTANT_ALIGN, into `to`, which may be NULL.
 * Their bytes. */
uint64_t xkv_device_list_ropes(const xkv_geometry *geometry, const xkv_group *g, uint8_t *to);

/* Cosines and sines that a token has. */
uint32_t xkv_device_count_angles(const xkv_geometry *geometry, const xkv_group *g);

/* Compute them: `o` holds positions, tokens, out and stride; `ropes` is where the list above is on the device. With
 * `inverse` they are those of un-rotating. Errors: BACKEND. */
XKV_MUST_CHECK xkv_status xkv_device_make_angles(xkv_ctx *ctx, xkv_device *device, void *stream,
                                                 const xkv_geometry *geometry, const xkv_group *g, const uint8_t *ropes,
                                                 bool inverse, xkv_plug_angles o);

#endif
