/* attend_layer.h - what is asked of a layer, checked: which planes its rows are made of, and how queries are counted.
 */
#ifndef XKV_ATTEND_LAYER_H
#define XKV_ATTEND_LAYER_H

#include "rows.h"
#include "xkv/codec.h"

/* The planes that a layer's rows are made of. */
enum { XKV_ROLE_KEY, XKV_ROLE_KEY_ROPE, XKV_ROLE_VALUE, XKV_ROLE_COUNT };

/* A plane in one of these roles. */
typedef struct xkv_plane_role {
    bool present;
    uint32_t plane;         /* in the geometry */
    const xkv_plane *facts; /* of it */
    uint32_t query_dim;     /* keys: where its part of a query begins */
} xkv_plane_role;

typedef struct xkv_attend_layer {
    xkv_plane_role roles[XKV_ROLE_COUNT];
    uint32_t value; /* role that V's rows come from: MLA's latent is K and V */
    uint32_t kv_heads, dim_k, dim_v;
    size_t m, count;      /* queries of one KV head, of all */
    xkv_attend_options o; /* all filled in */
} xkv_attend_layer;

/* Check queries and options (NULL: defaults) for one of the layers [first_layer, first_layer + layer_count) of a
 * geometry. Errors: ARGUMENT, UNSUPPORTED, as xkv_attend(). */
XKV_MUST_CHECK xkv_status xkv_attend_layer_init(xkv_ctx *ctx, const xkv_geometry *geometry, uint32_t first_layer,
                                                uint32_t layer_count, uint32_t layer, const xkv_queries *queries,
                                                const xkv_attend_options *options, xkv_attend_layer *l);

#endif
