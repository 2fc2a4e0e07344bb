/* sample_entry.h - a small good entry made by the writer: the base of the bad files and of the corruption tests. */
#ifndef XKV_SAMPLE_ENTRY_H
#define XKV_SAMPLE_ENTRY_H

#include "container.h"

/* Two layers of K (RoPE, group 0: svd, rank 2) and V (group 1: lossless), width 8, f16, chunks of 32 tokens; framing
 * with five segments and permuted rows, four metadata values. What the parts hold are random bytes of the right sizes:
 * the container does not look into them; one part claims method 1. */
enum {
    SAMPLE_LARGE = 70, /* tokens: three chunks, sinks 4, window 2; blobs compress */
    SAMPLE_SMALL = 3,  /* one chunk, sinks 1, window 1; all blobs stored */
    SAMPLE_MAX_SIZE = 8192,
    SAMPLE_PLANES = 4,
    SAMPLE_SEGMENTS = 5,
    SAMPLE_WIDTH = 8,
    SAMPLE_RANK = 2
};

/* A file in memory, of fixed capacity, zero where nothing was written. */
typedef struct image {
    uint8_t data[SAMPLE_MAX_SIZE];
    size_t size;
} image;

/* Everything the writer takes; the pointers lead into the struct. */
typedef struct sample {
    xkv_container c;
    xkv_plane planes[SAMPLE_PLANES];
    xkv_rope rope;
    int32_t positions[SAMPLE_LARGE], token_ids[SAMPLE_LARGE + 1];
    uint32_t rows[SAMPLE_LARGE];
    xkv_segment segments[SAMPLE_SEGMENTS];
    uint8_t literals[256];
    xkv_meta_value values[4];
    xkv_group groups[2];
    uint32_t group_planes[2][2];
    double plane_errors[2][2];
    xkv_part parts[2][8];
} sample;

xkv_output image_output(image *file);

void sample_init(sample *s, uint32_t tokens);
/* Planes of V become rows of one q4_0 block over four heads; all of their segments are token-major then. */
void sample_use_blocks(sample *s);
/* Write `s`; parts get bytes that only depend on their index. */
xkv_status sample_write(xkv_ctx *ctx, sample *s, image *file);

/* Open, read all parts, check the gaps: everything a container can be checked for. */
xkv_status sample_check(xkv_ctx *ctx, const void *data, size_t size);

#endif
