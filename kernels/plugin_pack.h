/* plugin_pack.h - the operations of plugin.h that packing takes: from rows in a device's memory to rANS streams. The
 * same rules hold. Included by plugin.h. */
#ifndef XKV_PLUGIN_PACK_H
#define XKV_PLUGIN_PACK_H

/* Rows of f32 from the views of all planes, the reverse of xkv_plug_store: row first + t of the views, converted,
 * un-rotated, less `mean` [ld] unless that is NULL, is rows[t * ld + ..]. Angles are divided by the RoPE's scale. */
typedef struct xkv_plug_gather {
    const xkv_plug_plane *planes;
    uint32_t plane_count, tokens, first;
    const float *angles; /* of the tile's first token */
    uint64_t angles_stride;
    const float *mean;
    float *rows;
    uint64_t ld;
} xkv_plug_gather;

/* Elements of one plane as they are into dense rows, the reverse of xkv_plug_move. */
typedef struct xkv_plug_take {
    xkv_view view;
    uint32_t heads, head_dim, tokens, first;
    uint8_t *rows;
    uint64_t row_bytes;
} xkv_plug_take;

/* flags[i] is set to 1 when plane i has an element that is NaN or infinite among its first `tokens` rows. */
typedef struct xkv_plug_scan {
    const xkv_plug_plane *planes;
    uint32_t plane_count, tokens;
    uint32_t *flags; /* [plane_count] */
} xkv_plug_scan;

/* Rows of f32 to two bf16: row i is rows[index ? index[i] : i], `ld` apart, times factor, rounded, in `high`; what that
 * leaves, rounded, goes to `low`. Both are dense. The sum of the two has 16 bits. */
typedef struct xkv_plug_halve {
    const float *rows;
    const uint32_t *index; /* [count] or NULL */
    uint64_t ld, count, width;
    float factor;
    uint16_t *high, *low;
} xkv_plug_halve;

/* Of what type A and B of a product are; C is f32. TF32: f32 of which 11 bits are used. */
enum { XKV_PRODUCT_F16 = 0, XKV_PRODUCT_F32 = 1, XKV_PRODUCT_BF16 = 2, XKV_PRODUCT_TF32 = 3 };

/* C = alpha op(A) op(B) + beta C, where `exact` of `g` is one of these types, `component_major` says that A is stored
 * as [k][lda], and `transposed` that B is stored as [n][ldb]; `batch` of them, a_step, b_step and c_step elements
 * apart. */
typedef struct xkv_plug_product {
    xkv_plug_gemm g;
    uint32_t transposed;
    uint32_t batch; /* >= 1 */
    uint64_t a_step, b_step, c_step;
} xkv_plug_product;

/* Sums of squares: sums[i * stride + t] = the sum over columns begins[i] .. begins[i + 1] - 1 of (rows[t * ld + column]
 * + mean[column])^2, in f64; `mean` may be NULL for 0. */
typedef struct xkv_plug_sums {
    const float *rows;
    const float *mean;
    const uint32_t *begins; /* [count + 1] */
    uint64_t ld, stride;
    uint32_t count, tokens;
    double *sums;
} xkv_plug_sums;

/* What is known of one component over one tile. */
typedef struct xkv_plug_stats {
    double energy, error; /* sums of y^2 and of (y - q step)^2 */
    uint64_t magnitude;   /* sum of |q| */
    uint32_t outside;     /* non-zero: a value exceeds 32767 steps, or is none */
    uint32_t unused;
} xkv_plug_stats;

/* q = y / step, rounded (spec/codec.md, section 6), of `count` components; and their stats, `stats_stride` apart. */
typedef struct xkv_plug_quantize {
    const float *y;
    uint64_t y_stride;
    int16_t *q;
    uint64_t q_stride;
    uint32_t count, tokens;
    float step;
    xkv_plug_stats *stats;
    uint64_t stats_stride;
} xkv_plug_quantize;

/* How often |u| occurs, for the choice of tables (spec/codec.md, section 7): component i's for shifts windows[i] & 255
 * .. + (windows[i] >> 8) - 1 are added to counts[i]. */
#define XKV_COUNT_SHIFTS 7u
#define XKV_COUNT_BINS   129u /* magnitudes 0 .. 127, and all beyond */
typedef struct xkv_plug_count {
    const int16_t *q;
    uint64_t stride, tokens;
    uint32_t count;
    const uint32_t *windows; /* [count] */
    uint32_t *counts;        /* [count][XKV_COUNT_SHIFTS][XKV_COUNT_BINS] */
} xkv_plug_count;

/* Where a chunk is. */
typedef struct xkv_plug_span {
    uint64_t column; /* of its first token in `q` */
    uint32_t tokens; /* >= 1 */
    uint32_t unused;
} xkv_plug_span;

/* Encode `count` chunks of the same components: row rows[i] of q has component i. The stream of a chunk ends with word
 * (chunk + 1) * room of `words`, where room is at least 2 * lanes + 2 * coded * tokens; sizes[chunk] is its bytes. */
typedef struct xkv_plug_encode {
    const int16_t *q;
    uint64_t stride;
    const uint32_t *rows; /* [coded] */
    const xkv_warp_encode_table *tables;
    const xkv_warp_code *codes; /* [coded] */
    uint32_t coded;             /* >= 1 */
    uint32_t count;
    const xkv_plug_span *spans; /* [count] */
    uint16_t *words;
    uint64_t room;
    uint32_t *sizes; /* [count] */
} xkv_plug_encode;

/* Rows of f32 to f16 in units of their columns: scales[i] becomes the largest magnitude in column i, and out = rows /
 * scales, or 0 where that is 0; both dense [count][width]. */
typedef struct xkv_plug_round_columns {
    const float *rows;
    uint64_t count;
    uint32_t width;
    float *scales; /* [width] */
    uint16_t *out;
} xkv_plug_round_columns;

#endif
