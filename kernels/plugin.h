/* plugin.h - what a device backend is: a shared library that is loaded at run time and exports one symbol, the table
 * below. It knows nothing of entries and dictionaries: codec/device_read.c makes its operations into a restore,
 * codec/device_pack.c into packing, kernels/device_svd.c into a truncated SVD.
 *
 * The rule of XKV_PLUGIN_ABI: it rises whenever this file changes. A plug-in of another number is refused, for both
 * come from one build.
 *
 * Memory is the device's unless it says otherwise, matrices are row-major, `stream` and `event` are the backend's own
 * handles (cudaStream_t, cudaEvent_t). Operations are put on the stream and return; they allocate nothing and wait for
 * nothing, so that they can be captured into a graph. Arguments were checked by the caller.
 * Threads: one call at a time on a device, from any thread.
 * Statuses: MEMORY (the device's, or pinned, is used up: less may do), BACKEND (anything else; `error` says what).
 * After an error that has broken the device's context `dead` is true, and every further call fails. */
#ifndef XKV_PLUGIN_H
#define XKV_PLUGIN_H

#include "xkv/format.h"

#include "cuda/warp_rans.h"

#ifdef __cplusplus
extern "C" {
#endif

#define XKV_PLUGIN_ABI    5u
#define XKV_PLUGIN_SYMBOL "xkv_plugin_table"

/* --- Operations --------------------------------------------------------------------------------------------------- */

/* One rANS stream: a chunk of a group. */
typedef struct xkv_plug_stream {
    uint64_t offset; /* of its first byte, a multiple of 4; readable up to a multiple of 4 */
    uint32_t size;   /* bytes; 0 only where nothing is coded */
    uint32_t tokens;
    uint64_t column;   /* of its first token in `q` */
    uint64_t checksum; /* XXH3-64 of its bytes, for `verify` */
} xkv_plug_stream;

/* Decode `count` streams of the same components: value of component i and token t of a stream goes to
 * q[i * stride + column + t]. */
typedef struct xkv_plug_decode {
    const uint8_t *packed;
    const xkv_plug_stream *streams; /* [count] */
    uint32_t count;
    const xkv_warp_table *tables;
    const xkv_warp_code *codes; /* [coded] */
    uint32_t coded;             /* >= 1 */
    int16_t *q;
    uint64_t stride;
    uint32_t *fault; /* XKV_WARP_... are set in it; q of a bad stream is undefined */
} xkv_plug_decode;

/* What of an integer goes into a row of a tile. With high = 256 round(q / 256), both parts are exact in f16 whatever q
 * is; the whole is up to 2048. */
enum { XKV_OPERAND_WHOLE = 0, XKV_OPERAND_HIGH = 1, XKV_OPERAND_LOW = 2 };

/* Integers to the rows of a tile of operands: row i of `tile` from integers q[rows[i] >> 2], of which it holds the part
 * rows[i] & 3; a second copy lies `copy` rows further unless that is 0. */
typedef struct xkv_plug_expand {
    const int16_t *q;
    uint64_t q_stride;
    const uint32_t *rows; /* [count] */
    uint32_t count, tokens;
    void *tile; /* f16, or f32 when `exact` */
    uint64_t stride;
    uint64_t copy;
    uint32_t exact;
    uint32_t *fault; /* XKV_WARP_TOO_WIDE is set in it when a value is not exact */
} xkv_plug_expand;

/* Rows of f32 to operands: row i is rows[index ? index[i] : i] * factor * scale, rounded to f16 in `high`; what that
 * leaves, rounded to f16, goes to `low`. `exact`: f32, and only `high`. `factor` and `scale` are applied one after the
 * other, the second one is a power of two. */
typedef struct xkv_plug_split {
    const float *rows;
    const uint32_t *index;
    uint32_t count;
    uint64_t width; /* of all rows, which are dense */
    float factor, scale;
    void *high, *low;
    uint32_t exact;
} xkv_plug_split;

/* Rows of f32 from integers, one element each: rows[t * width + i] = q[source[i] * q_stride + t] * factor[i], or 0
 * where source[i] is XKV_NO_SOURCE. */
#define XKV_NO_SOURCE 0xffffffffu
typedef struct xkv_plug_spread {
    const int16_t *q;
    uint64_t q_stride;
    const uint32_t *source; /* [width] */
    const float *factor;    /* [width] */
    uint32_t width, tokens;
    float *rows;
} xkv_plug_spread;

/* C[m, n] = alpha A[m, k] B[k, n] + beta C, f32 accumulation; A is stored as [k][lda] when `component_major`. A and B
 * are f16 (f32 when `exact`), C f32. */
typedef struct xkv_plug_gemm {
    const void *a, *b;
    float *c;
    uint64_t m, n, k, lda, ldb, ldc;
    float alpha, beta;
    uint32_t component_major, exact;
} xkv_plug_gemm;

/* Cosines, then sines, of every token: out[t * stride + ..], times `scale`, computed in f64. */
typedef struct xkv_plug_angles {
    const int32_t *positions; /* [tokens] */
    const double *inv_freq;   /* [pairs] */
    uint32_t tokens, pairs;
    double scale;
    float *out;
    uint64_t stride;
} xkv_plug_angles;

/* A plane as a destination. */
typedef struct xkv_plug_plane {
    xkv_view view;
    uint32_t heads, head_dim;
    uint32_t column;               /* of its first element in the rows */
    uint32_t pairs, offset, style; /* of its RoPE; pairs 0: none */
    uint32_t angles;               /* where its cosines stand in a row of the angles */
    uint32_t via;                  /* views of blocks: the 16-bit type that elements are rounded to before, or f32 */
} xkv_plug_plane;

/* Store rows [tokens][ld] of f32: each element plus its mean, rotated, rounded, into the views of all planes. Token t
 * of the tile is row first + t of the views. */
typedef struct xkv_plug_store {
    const float *rows;
    uint64_t ld;
    const float *mean;   /* [ld] or NULL */
    const float *angles; /* of the tile's first token */
    uint64_t angles_stride;
    const xkv_plug_plane *planes;
    uint32_t plane_count, tokens, first;
} xkv_plug_store;

/* Move rows of elements as they are: dense [tokens][row_bytes], which the device may read wherever they are, pinned
 * memory included, into the view of one plane, whose first element is `column` bytes into a row. */
typedef struct xkv_plug_move {
    const uint8_t *rows;
    uint64_t row_bytes, column;
    xkv_view view;
    uint32_t heads, head_dim, tokens, first;
} xkv_plug_move;

/* Byte planes to elements: spec/codec.md, section 2. */
typedef struct xkv_plug_join {
    const uint8_t *planes;
    uint64_t rows, cols;
    uint32_t elem;
    uint8_t *out;
} xkv_plug_join;

#include "plugin_attend.h"
#include "plugin_file.h"
#include "plugin_fused.h"
#include "plugin_pack.h"
#include "plugin_svd.h"

/* --- The table ---------------------------------------------------------------------------------------------------- */

typedef struct xkv_plug_device xkv_plug_device;

typedef struct xkv_plug_properties {
    char name[96];              /* of the device */
    uint32_t major, minor;      /* compute capability */
    uint32_t driver, runtime;   /* versions, 1000 * major + 10 * minor */
    uint64_t memory, available; /* bytes */
} xkv_plug_properties;

typedef struct xkv_plugin {
    uint32_t abi;  /* XKV_PLUGIN_ABI: stays the first field for ever */
    uint32_t size; /* of this struct */
    const char *name;

    /* Devices that can be used; 0 with the reason in why[why_size]. */
    uint32_t (*count)(char *why, size_t why_size);
    xkv_status (*open)(uint32_t index, xkv_plug_device **device_p, char *why, size_t why_size);
    void (*close)(xkv_plug_device *d); /* accepts NULL */
    void (*properties)(xkv_plug_device *d, xkv_plug_properties *p);
    const char *(*error)(const xkv_plug_device *d); /* text of the last failure, "" */
    int (*dead)(const xkv_plug_device *d);

    xkv_status (*alloc)(xkv_plug_device *d, uint64_t size, void **p);
    void (*release)(xkv_plug_device *d, void *p);                            /* accepts NULL */
    xkv_status (*alloc_pinned)(xkv_plug_device *d, uint64_t size, void **p); /* the host's, which both can reach */
    void (*release_pinned)(xkv_plug_device *d, void *p);                     /* accepts NULL */

    xkv_status (*stream_create)(xkv_plug_device *d, void **stream_p);
    void (*stream_destroy)(xkv_plug_device *d, void *stream); /* accepts NULL */
    xkv_status (*event_create)(xkv_plug_device *d, void **event_p);
    void (*event_destroy)(xkv_plug_device *d, void *event); /* accepts NULL */
    xkv_status (*record)(xkv_plug_device *d, void *event, void *stream);
    xkv_status (*follow)(xkv_plug_device *d, void *stream,
                         void *event);                   /* what comes later on stream waits for event */
    xkv_status (*wait)(xkv_plug_device *d, void *event); /* the thread does */

    xkv_status (*copy)(xkv_plug_device *d, void *to, const void *from, uint64_t size, void *stream); /* any direction */
    xkv_status (*clear)(xkv_plug_device *d, void *p, uint64_t size, void *stream);

    /* plugin_file.h */
    xkv_status (*file_open)(xkv_plug_device *d, const xkv_plug_file_open *o, void **file_p);
    void (*file_close)(xkv_plug_device *d, void *file); /* accepts NULL */
    xkv_status (*file_read)(xkv_plug_device *d, const xkv_plug_file_read *o);
    xkv_status (*verify)(xkv_plug_device *d, const xkv_plug_verify *o, void *stream);

    xkv_status (*decode)(xkv_plug_device *d, const xkv_plug_decode *o, void *stream);
    xkv_status (*expand)(xkv_plug_device *d, const xkv_plug_expand *o, void *stream);
    xkv_status (*split)(xkv_plug_device *d, const xkv_plug_split *o, void *stream);
    xkv_status (*spread)(xkv_plug_device *d, const xkv_plug_spread *o, void *stream);
    xkv_status (*gemm)(xkv_plug_device *d, const xkv_plug_gemm *o, void *stream);
    xkv_status (*angles)(xkv_plug_device *d, const xkv_plug_angles *o, void *stream);
    xkv_status (*store)(xkv_plug_device *d, const xkv_plug_store *o, void *stream);
    xkv_status (*move)(xkv_plug_device *d, const xkv_plug_move *o, void *stream);
    xkv_status (*join)(xkv_plug_device *d, const xkv_plug_join *o, void *stream);

    /* plugin_attend.h */
    xkv_status (*attend)(xkv_plug_device *d, const xkv_plug_attend *o, void *stream);
    xkv_status (*merge)(xkv_plug_device *d, const xkv_plug_merge *o, void *stream);
    xkv_status (*restore)(xkv_plug_device *d, const xkv_plug_restore *o, void *stream);

    /* plugin_fused.h */
    xkv_status (*fused)(xkv_plug_device *d, const xkv_plug_fused *o, void *stream);

    /* plugin_pack.h */
    xkv_status (*gather)(xkv_plug_device *d, const xkv_plug_gather *o, void *stream);
    xkv_status (*take)(xkv_plug_device *d, const xkv_plug_take *o, void *stream);
    xkv_status (*scan)(xkv_plug_device *d, const xkv_plug_scan *o, void *stream);
    xkv_status (*halve)(xkv_plug_device *d, const xkv_plug_halve *o, void *stream);
    xkv_status (*product)(xkv_plug_device *d, const xkv_plug_product *o, void *stream);
    xkv_status (*sums)(xkv_plug_device *d, const xkv_plug_sums *o, void *stream);
    xkv_status (*quantize)(xkv_plug_device *d, const xkv_plug_quantize *o, void *stream);
    xkv_status (*count_values)(xkv_plug_device *d, const xkv_plug_count *o, void *stream);
    xkv_status (*encode)(xkv_plug_device *d, const xkv_plug_encode *o, void *stream);
    xkv_status (*round_columns)(xkv_plug_device *d, const xkv_plug_round_columns *o, void *stream);

    /* plugin_svd.h */
    xkv_status (*dense_size)(xkv_plug_device *d, uint64_t n, uint64_t batch, xkv_plug_dense_size *size);
    xkv_status (*sketch)(xkv_plug_device *d, const xkv_plug_sketch *o, void *stream);
    xkv_status (*convert)(xkv_plug_device *d, const xkv_plug_convert *o, void *stream);
    xkv_status (*scale_gram)(xkv_plug_device *d, const xkv_plug_scale_gram *o, void *stream);
    xkv_status (*cholesky)(xkv_plug_device *d, const xkv_plug_cholesky *o, void *stream);
    xkv_status (*eigen)(xkv_plug_device *d, const xkv_plug_eigen *o, void *stream);
} xkv_plugin;

#ifdef __cplusplus
}
#endif
#endif
