/* attention.h - an opened attention (<xkv/codec.h>). */
#ifndef XKV_ATTENTION_H
#define XKV_ATTENTION_H

#include "moves.h"
#include "tiles.h"

/* The rows that one entry of a chain gives. */
typedef struct xkv_stretch {
    const xkv_entry *entry;
    uint32_t first, end; /* its own tokens */
    uint32_t at;         /* of the first one, among all rows asked for */
    uint32_t first_chunk, chunk_count;
    xkv_moves moves;
    xkv_cross_stage cross;
    xkv_tile_group *groups; /* [group_count of the entry]; those without asked planes are empty */
    xkv_block **blocks;     /* [group_count][chunk_count] of those; NULL: not held */
} xkv_stretch;

struct xkv_attention {
    const xkv_entry *entry;
    uint32_t first_token, token_count;
    uint32_t first_layer, layer_count;
    const int32_t *positions; /* [token_count] of the rows */
    int32_t *own_positions;   /* the same, when others than the entry's were asked for */
    uint32_t hold;
    uint64_t held_bytes;
    uint32_t stretch_count;
    xkv_stretch *stretches; /* in order of tokens; none when rows are held */
    uint8_t **rows;         /* [plane_count] restored planes, those of asked layers; NULL: not held */
};

/* Where a plane of an asked layer is in the stretch's groups. */
xkv_tile_plane xkv_stretch_plane(const xkv_stretch *s, uint32_t plane);

#endif
