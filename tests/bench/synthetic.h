/* synthetic.h - deterministic caches of any size with a given spectrum, made row by row: no memory but the planes. */
#ifndef XKV_BENCH_SYNTHETIC_H
#define XKV_BENCH_SYNTHETIC_H

#include "xkv/format.h"

/* How the singular values of a group fall, k = 1 .. N. */
typedef enum synthetic_spectrum {
    SYNTHETIC_ROOT = 0,       /* k^-0.5 */
    SYNTHETIC_INVERSE = 1,    /* k^-1 */
    SYNTHETIC_EXPONENTIAL = 2 /* exp(-8k/N) + 0.001 */
} synthetic_spectrum;

/* "k^-0.5", "k^-1", "exp(-8k/N)". */
const char *synthetic_spectrum_name(synthetic_spectrum spectrum);

/* A bf16 cache of `layers` layers with K, rotated half-split at positions 0 .. tokens-1, and V. */
typedef struct synthetic {
    xkv_geometry geometry;
    xkv_plane *planes;
    xkv_rope *rope;
    int32_t *positions;
} synthetic;

synthetic synthetic_create(uint32_t tokens, uint32_t layers, uint32_t heads, uint32_t head_dim);
void synthetic_free(synthetic *s);

/* Fill the planes behind `views`: groups of `group_layers` layers share their subspace, K and V apart. The same
 * arguments give the same bits, and token t does not depend on how many tokens there are. */
void synthetic_fill(const synthetic *s, uint32_t group_layers, synthetic_spectrum spectrum, const xkv_view *views);

#endif
