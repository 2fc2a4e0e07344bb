/*
 * xkv/format.h - what a KV cache is, which model made it, and the engine files that hold one.
 *
 *   xkv_geometry  planes, widths, RoPE: everything the codec needs to know about a cache
 *   xkv_model     geometry facts and fingerprint of a model, read from a GGUF header or given by the caller
 *   xkv_metric    what errors of a model's keys and values cost, for training
 *   xkv_cache     a cache opened from an engine's file (llama.cpp sequence file, safetensors) as planes in memory
 *   xkv_output    where bytes go: a file written atomically, memory, or the caller's functions
 *   xkv_input     where bytes come from
 */
#ifndef XKV_FORMAT_H
#define XKV_FORMAT_H

#include "xkv/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* --- Limits (spec/container.md, section 11, gives the reasons) -----------------------------------------------------
 */

#define XKV_MAX_LAYERS     4096u
#define XKV_MAX_PLANES     16384u
#define XKV_MAX_TOKENS     0x7fffffffu /* positions and llama.cpp cell indices are 31-bit */
#define XKV_MAX_WIDTH      262144u     /* elements of one plane's row, and of one group's concatenated row */
#define XKV_MAX_ROPES      4096u
#define XKV_MAX_ROPE_PAIRS 512u /* rotated dims per head / 2 */
#define XKV_NO_ROPE        0xffffffffu

/* --- Geometry ----------------------------------------------------------------------------------------------------- */

/* Element types of stored rows. Values are those of the container. The last two are blocks of ggml: 32 neighbouring
 * elements behind one f16 scale d, so that rows of them hold a multiple of 32 elements. */
typedef enum xkv_dtype {
    XKV_F32 = 0,
    XKV_F16 = 1,
    XKV_BF16 = 2,
    XKV_Q8_0 = 3, /* d, then 32 int8 q: an element is d * q. 34 bytes a block */
    XKV_Q4_0 = 4  /* d, then 16 bytes: an element is d * (n - 8), n the low four bits of byte i for element i, and the
                     high four for element 16 + i. 18 bytes a block */
} xkv_dtype;

/* Elements of one block: 32 for Q8_0 and Q4_0, 1 for the others; 0 for an unknown type. */
XKV_API uint32_t xkv_dtype_block(uint32_t dtype);
/* Bytes of one block (4, 2, 2, 34, 18), which is one element where there are no blocks; 0 for an unknown type. */
XKV_API size_t xkv_dtype_size(uint32_t dtype);
/* Bytes of `count` neighbouring elements, a multiple of the block; 0 for an unknown type. */
XKV_API uint64_t xkv_dtype_bytes(uint32_t dtype, uint64_t count);
/* "f32", "f16", "bf16", "q8_0", "q4_0", "unknown". */
XKV_API const char *xkv_dtype_name(uint32_t dtype);

/* What a plane holds. Values are those of the container. */
typedef enum xkv_plane_kind {
    XKV_PLANE_K = 0,      /* keys; engines cache them after RoPE, an entry codes them before RoPE */
    XKV_PLANE_V = 1,      /* values */
    XKV_PLANE_LATENT = 2, /* MLA: the compressed latent shared by keys and values */
    XKV_PLANE_K_ROPE = 3  /* MLA: the rotated part of the key, kept exact */
} xkv_plane_kind;

/* "K", "V", "latent", "K-rope". */
XKV_API const char *xkv_plane_kind_name(uint32_t kind);

/* One per-token vector stream of one layer. A row has heads * head_dim elements, head-major; with a dtype of blocks
 * that is a multiple of the block, and blocks may reach over heads, as those of llama.cpp do. */
typedef struct xkv_plane {
    uint32_t layer;    /* 0 .. layers-1 */
    uint32_t kind;     /* xkv_plane_kind */
    uint32_t dtype;    /* xkv_dtype of the source and of a restore */
    uint32_t heads;    /* KV heads, >= 1; 1 where the file does not tell and no model was given */
    uint32_t head_dim; /* elements, >= 1 */
    uint32_t rope;     /* index into xkv_geometry.ropes: how the engine rotated these rows; XKV_NO_ROPE: it did not, or
                          how is unknown, and rows are coded as they are */
} xkv_plane;

typedef enum xkv_rope_style {
    XKV_ROPE_INTERLEAVED = 0, /* pairs (2i, 2i+1): llama.cpp "NORM", arch llama */
    XKV_ROPE_HALF_SPLIT = 1   /* pairs (i, i + n_rot/2): "NEOX", transformers' rotate_half */
} xkv_rope_style;

/* One rotary embedding, already resolved: pair i of a row at position p is rotated by the angle p * inv_freq[i] and
 * multiplied by `scale`. Every published scaling (linear, YaRN, llama3, longrope, dynamic at a fixed length) is a
 * choice of inv_freq and scale, so that nothing else need be known to undo or redo it. */
typedef struct xkv_rope {
    uint32_t n_rot;  /* rotated dims per head, even, 2 .. 2*XKV_MAX_ROPE_PAIRS, offset + n_rot <= head_dim */
    uint32_t offset; /* first rotated dim of a head */
    uint32_t style;  /* xkv_rope_style */
    double scale;    /* > 0: YaRN's attention factor; 1 otherwise */
    double inv_freq[XKV_MAX_ROPE_PAIRS]; /* n_rot/2 finite angles per position, radians */
} xkv_rope;

typedef struct xkv_geometry {
    uint32_t layer_count;
    uint32_t plane_count;
    uint32_t rope_count;
    uint32_t token_count;     /* rows of every plane */
    const xkv_plane *planes;  /* [plane_count] in order of layer, then kind */
    const xkv_rope *ropes;    /* [rope_count] */
    const int32_t *positions; /* [token_count] RoPE positions in ascending order (equal ones allowed) */
    const int32_t *token_ids; /* [token_id_count] the prompt as the engine stored it */
    uint32_t token_id_count;  /* 0 when unknown; engines may store more or fewer ids than rows */
} xkv_geometry;

/* Bytes of the raw cache as the engine holds it: sum over planes of tokens * width * element size. */
XKV_API uint64_t xkv_geometry_raw_bytes(const xkv_geometry *g);

/* --- Views: one plane in the caller's memory ---------------------------------------------------------------------- */

/* Element (token t, head h, dim d) lies at
 *     data + row(t) * token_stride + h * head_stride + d * dim_stride         (bytes; strides may be negative)
 * where row(t) = rows ? rows[t] : t. This covers token-major and head-major tensors, transposed V, slices of wider rows
 * and, with rows, the pages of xkv_views_from_pages(). As a source the memory is only read; as a destination only these
 * elements are written.
 * Blocks are not split: with Q8_0 or Q4_0 the head_dim in use is a multiple of 32 and dim_stride is
 * xkv_dtype_size(dtype), the distance between neighbouring blocks of a head. Where a plane's head_dim is no such
 * multiple, and its heads follow each other, set head_dim to the width of the row.
 * To such a destination elements go as they would to the plane's dtype (f16, bf16) and from there as by
 * quantize_row_q8_0_ref() and quantize_row_q4_0_ref() of ggml, bit for bit (q8_0: halves away from zero; the AVX code
 * of ggml rounds halves to even, and its scale in another order, so that rows which an engine quantized itself may
 * differ in the last place). Beyond what ggml defines: a scale stops at the largest f16, a NaN becomes 0 and an
 * infinity the largest finite number. */
typedef struct xkv_view {
    void *data;
    int64_t token_stride;
    int64_t head_stride;
    int64_t dim_stride;
    const uint32_t *rows;
    uint32_t dtype;    /* xkv_dtype in memory; as a destination it may differ from the plane's */
    uint32_t head_dim; /* elements that one head_stride stands for, a divisor of the row's; 0: the plane's head_dim.
                          Another one serves rows that are split elsewhere: see axis X of xkv_pages */
} xkv_view;

/* --- Pages: the caches of serving engines ------------------------------------------------------------------------- */

#define XKV_MAX_BLOCK_TOKENS 256u

/* clang-format off */
/* One tensor of an engine's paged cache, which holds some kinds of planes of some layers. `axes` names its axes from
 * the slowest to the fastest, one letter each, every letter at most once:
 *
 *   L  layers, layer_count of them
 *   K  kinds, kind_count of them
 *   B  blocks, block_count of them
 *   N  slots of a block, block_tokens of them
 *   H  heads
 *   D  dims of a head
 *   X  the fastest dim_split dims of a head, where D counts groups of them
 *   C  the dims of all kinds one behind the other, in the order of `kinds`: instead of K and D
 *
 * L, K, N and H may be left out where there is one of it, or for H and D where a head has all dims. Examples:
 *
 *   vLLM up to 0.25   FlashAttention "KBNHD" (HND: "KBHND"), FlashInfer "BKNHD", MLA "BNC" of latent and K-rope,
 *                     split keys "BHDNX" beside values "BHDN"
 *   vLLM from 0.26    "BNHC" (NHD) or "BHNC" (HND), C being K then V
 *   SGLang            a K and a V buffer a layer: "BNHD", or "BHD" with blocks of one token; host pages layer_first
 *                     "KLBNHD", page_first "KBNLHD", page_first_direct "KBLNHD", page_head "KBHNLD"
 *   llama.cpp         a tensor a layer, blocks of one cell: K and V "BHD", transposed V "HDB"
 *
 * A layout is never guessed: engines change theirs. */
/* clang-format on */
typedef struct xkv_pages {
    void *data;
    uint64_t size; /* bytes at `data`: nothing beyond is touched */
    const char *axes;
    const int64_t *strides; /* [strlen(axes)] bytes between neighbours of each axis, >= 0; NULL: dense. Those of blocked
                               dtypes count bytes of whole blocks: D or C has xkv_dtype_size(dtype) */
    uint32_t dtype;         /* xkv_dtype */
    uint32_t first_layer, layer_count;
    uint32_t kinds[4], kind_count; /* xkv_plane_kind */
    uint32_t block_count;          /* blocks of the pool */
    uint32_t block_tokens;         /* slots of a block, 1 .. XKV_MAX_BLOCK_TOKENS */
    uint32_t dim_split;            /* axis X; 0 without it */
    const int32_t *table;          /* [table_size] blocks of the sequence: token t is in slot t % block_tokens of block
                                      table[t / block_tokens] */
    uint32_t table_size;
} xkv_pages;

/* Views of tokens [first_token, first_token + token_count) of a sequence: a view for each plane of `geometry`, whose
 * heads and dims the tensors have; token_count 0: geometry->token_count. Row i of the views is token first_token + i.
 * Every plane lies in exactly one of the `count` tensors; layers that the geometry does not have are left alone, kinds
 * that it does not have are an error. *views_p: [plane_count] views and their rows in one allocation, for
 * xkv_views_free(); `pages` is not kept, its memory must stay. Row numbers have 32 bits: with rows of r bytes a pool
 * may span r * 2^32 of them. Errors: ARGUMENT (axes, strides or sizes that contradict each other or the geometry, a
 * block outside of the pool, a table too short), LIMIT (a pool too large for its row numbers), MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_views_from_pages(xkv_ctx *ctx, const xkv_geometry *geometry,
                                                       const xkv_pages *pages, uint32_t count, uint32_t first_token,
                                                       uint32_t token_count, xkv_view **views_p);
XKV_API void xkv_views_free(xkv_ctx *ctx, xkv_view *views); /* accepts NULL */

/* --- Input and output --------------------------------------------------------------------------------------------- */

/* Random-access bytes. `read` fills exactly `size` bytes from `offset` (offset + size <= the input's size) and may be
 * called from several threads at once. */
typedef struct xkv_input {
    void *user;
    uint64_t size;
    xkv_status (*read)(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size);
    const char *name; /* for messages; may be NULL */
    /* A hint that these bytes are read soon: starts to fetch them and returns at once. May be called from several
     * threads at once; may be NULL. */
    void (*prefetch)(void *user, uint64_t offset, uint64_t size);
    /* A descriptor of a regular file that holds the input's bytes from *offset_p on, for devices that read files
     * themselves: stays the input's, open as long as it is. -1: there is none. May be NULL. */
    int (*file)(void *user, uint64_t *offset_p);
} xkv_input;

/* An input over `size` bytes at `data`, which must outlive it. */
XKV_API xkv_input xkv_input_from_memory(const void *data, size_t size);

/* Open a regular file for reading. Close with xkv_input_close(). Errors: IO. */
XKV_API XKV_MUST_CHECK xkv_status xkv_input_open(xkv_ctx *ctx, const char *path, xkv_input *input);
XKV_API void xkv_input_close(xkv_ctx *ctx, xkv_input *input);

/* Random-access sink. Bytes may be written in any order, each at most once except the file header, which is written
 * last. */
typedef struct xkv_output {
    void *user;
    xkv_status (*write)(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size);
} xkv_output;

/* A file that appears under its name only when complete: written as a hidden temporary file in the same folder (mode
 * 0600 until then, finally that of a replaced file, or 0666 less the umask), synced, renamed, folder synced.
 * A handle is used by one thread at a time. */
typedef struct xkv_file xkv_file;

/* Begin. `path` NULL: an unnamed temporary file (in $TMPDIR or /tmp) for xkv_file_copy_to_fd(). Without `overwrite`
 * an existing `path` is XKV_ERROR_EXISTS, checked now and again at the commit, which then never replaces a file.
 * Errors: EXISTS, IO, NO_SPACE, MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_file_create(xkv_ctx *ctx, const char *path, int overwrite, xkv_file **file_p);
XKV_API xkv_output xkv_file_output(xkv_file *file);
/* Reserve `size` bytes on disk (a full disk is reported here) and map them writable; valid until commit or abort. */
XKV_API XKV_MUST_CHECK xkv_status xkv_file_map(xkv_ctx *ctx, xkv_file *file, uint64_t size, uint8_t **data_p);
/* Write everything so far to a descriptor (a pipe, standard output), in order. */
XKV_API XKV_MUST_CHECK xkv_status xkv_file_copy_to_fd(xkv_ctx *ctx, xkv_file *file, int fd);
/* Read back what has been written so far; valid until commit or abort. */
XKV_API xkv_input xkv_file_input(const xkv_file *file);
/* Sync and rename; frees the handle whatever the outcome (on failure the temporary file is gone). */
XKV_API XKV_MUST_CHECK xkv_status xkv_file_commit(xkv_ctx *ctx, xkv_file *file);
/* Remove the temporary file and free the handle; accepts NULL. */
XKV_API void xkv_file_abort(xkv_ctx *ctx, xkv_file *file);

/* --- Models ------------------------------------------------------------------------------------------------------- */

/* One layer of a model, as far as its cache is concerned. */
typedef struct xkv_model_layer {
    uint32_t kv_heads;               /* 0: not known, as many as a row holds */
    uint32_t head_dim_k, head_dim_v; /* head_dim_k 0: the layer has no cache */
    uint32_t rope;                   /* index into xkv_model.ropes, or XKV_NO_ROPE */
    uint32_t window;                 /* tokens that its attention reaches back (sliding window); 0: all */
} xkv_model_layer;

/* Facts about the model that made a cache. */
typedef struct xkv_model {
    uint8_t fingerprint[16]; /* XXH3-128 (canonical, big-endian bytes) of the GGUF file up to its tensor data: metadata,
                                tensor names, shapes and types. Weights are not covered: two fine-tunes with equal
                                headers look equal, so name them apart or set a fingerprint of your own. */
    int has_fingerprint;
    char architecture[64]; /* general.architecture; "" if unknown */
    char name[128];        /* general.name; "" if unknown */
    uint32_t layer_count;
    uint32_t rope_count;
    xkv_model_layer *layers; /* [layer_count] */
    xkv_rope *ropes;         /* [rope_count] */
    uint32_t latent_dim;     /* MLA: elements of the latent in a K row; 0 for other models */
    uint32_t latent_first;   /* MLA: 1 when a row is [latent | rope part], 0 when it is [rope part | latent]; a cache
                                that also holds V is of the second kind whatever this says */
} xkv_model;

/* RoPE choices that a GGUF does not settle, or that replace it. Zero or NULL means: as the model says. */
typedef struct xkv_rope_options {
    size_t struct_size;
    double base;         /* freq_base */
    double linear_scale; /* llama.cpp's freq_scale: positions are multiplied by it; 0 = from the model */
    uint32_t dims;       /* rotated dims per head */
    int32_t style;       /* xkv_rope_style; -1 = by architecture (default) */
    uint32_t head_dim;   /* head dim of K and V, for a model given by options only */
    uint32_t context; /* longrope: the context length the engine ran with, which picks the long or the short factors */
    const double *freq_factors; /* [dims/2] divisors of the frequencies, or NULL */
} xkv_rope_options;

static inline xkv_rope_options xkv_rope_options_default(void)
{
    xkv_rope_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.style = -1;
    return o;
}

/* Read a GGUF file's header (the tensor data need not be there). Supported: default, linear, YaRN, llama3 and longrope
 * scalings, partial rotary dims, per-layer KV head counts, sliding windows with a rotation of their own, MLA. `options`
 * may be NULL. Formulas: linear: Chen et al. 2023 (arXiv 2306.15595); YaRN: Peng et al. 2023 (arXiv 2309.00071),
 * section 3.4; factors: f_i = base^(-2i/n_rot) / factor_i. Errors: IO, FORMAT, VERSION (not GGUF 2 or 3), TRUNCATED,
 * CORRUPT, LIMIT, UNSUPPORTED (an architecture or scaling whose rotation is not known; give options), MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_model_from_gguf(xkv_ctx *ctx, const char *path, const xkv_rope_options *options,
                                                      xkv_model **model_p);

/* A model of `layer_count` equal layers described by options alone (base, dims, style and head_dim are required).
 * Errors: ARGUMENT, MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_model_from_options(xkv_ctx *ctx, uint32_t layer_count,
                                                         const xkv_rope_options *options, xkv_model **model_p);

XKV_API void xkv_model_free(xkv_ctx *ctx, xkv_model *model);

/* --- Metrics ------------------------------------------------------------------------------------------------------ */

/* What the errors of a cache cost: e^T M e for an error e of one head's row, K before RoPE. Each M is symmetric. */
typedef struct xkv_metric {
    uint32_t layers, heads, head_dim;
    const float *k, *v; /* [layers][heads][head_dim][head_dim] */
} xkv_metric;

/* Read the tensors k_metric and v_metric, F32 of that shape, of a safetensors file; others are ignored
 * (spec/engines.md, section 6). Errors: IO, FORMAT (no such file or tensors), TRUNCATED, CORRUPT, LIMIT, MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_metric_open(xkv_ctx *ctx, const char *path, xkv_metric **metric_p);
XKV_API void xkv_metric_free(xkv_ctx *ctx, xkv_metric *metric);

/* --- Engine files ------------------------------------------------------------------------------------------------- */

typedef enum xkv_engine {
    XKV_ENGINE_NONE = 0,           /* planes in memory only */
    XKV_ENGINE_LLAMA_SEQUENCE = 1, /* llama.cpp `ggsq` state versions 2, 3, 4; server slot files */
    XKV_ENGINE_SAFETENSORS = 2,    /* layer.{i}.key / layer.{i}.value, see spec/engines.md */
    XKV_ENGINE_OPAQUE = 3,         /* not understood: carried byte for byte, nothing packed but by zstd */
    XKV_ENGINE_LLAMA_SESSION = 4,  /* llama.cpp `ggsn` state versions 9, 10, 11, with one sequence */
    XKV_ENGINE_LLAMA_BLOB = 5      /* what llama_state_seq_get_data() writes to memory since May 2026 */
} xkv_engine;

XKV_API const char *xkv_engine_name(uint32_t engine); /* "llama.cpp sequence", ... */

/* How the elements of a tensor segment are ordered in the engine's file. */
typedef enum xkv_layout {
    XKV_LAYOUT_TOKEN_MAJOR = 0, /* [row][plane][dim]: llama.cpp, safetensors [tokens, heads, dim] */
    XKV_LAYOUT_DIM_MAJOR = 1,   /* [dim][row]: llama.cpp's transposed V */
    XKV_LAYOUT_HEAD_MAJOR = 2,  /* [head][row][dim]: safetensors [heads, tokens, dim] */
    XKV_LAYOUT_REVERSED = 3     /* [row][plane][dim], planes from last to first: MLA rows [rope part | latent] */
} xkv_layout;

/* A piece of an engine file: literal bytes, or all rows of `plane_count` neighbouring planes. */
typedef struct xkv_segment {
    uint64_t size;        /* bytes in the engine's file */
    uint32_t first_plane; /* tensor segments only */
    uint32_t plane_count; /* 0: literal */
    uint32_t layout;      /* xkv_layout */
} xkv_segment;

/* An engine file split into what is tensor and what is not. The concatenated segments are the file. */
typedef struct xkv_framing {
    uint32_t engine; /* xkv_engine */
    uint32_t segment_count;
    const xkv_segment *segments;
    const uint8_t *literals; /* the literal segments' bytes, concatenated */
    uint64_t literal_size;
    uint64_t source_size; /* sum of the segments */
    const uint32_t *rows; /* [token_count] row of the i-th token (by position) in every tensor segment; NULL: row i */
} xkv_framing;

/* A cache opened from an engine file. Immutable, may be shared by threads. */
typedef struct xkv_cache xkv_cache;

/* Map `path`, find out what it is and walk it to the last byte. `model` may be NULL: then rows count as one head
 * without RoPE (enough for lossless, and K is coded as rotated otherwise). With a model, layer count and row widths
 * must match. A file whose structure is not understood opens with engine OPAQUE, no planes and one literal segment.
 * Errors: IO, TRUNCATED, CORRUPT (understood in part, and that part contradicts itself), MISMATCH (model), LIMIT,
 * MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_cache_open(xkv_ctx *ctx, const char *path, const xkv_model *model,
                                                 xkv_cache **cache_p);

/* The same over memory that stays valid and unchanged while the cache lives. `name` is for messages. */
XKV_API XKV_MUST_CHECK xkv_status xkv_cache_from_memory(xkv_ctx *ctx, const void *data, size_t size, const char *name,
                                                        const xkv_model *model, xkv_cache **cache_p);

XKV_API void xkv_cache_free(xkv_ctx *ctx, xkv_cache *cache);

XKV_API const xkv_geometry *xkv_cache_geometry(const xkv_cache *cache);
XKV_API const xkv_framing *xkv_cache_framing(const xkv_cache *cache);
/* [plane_count] views into the mapped file, rows in order of position. */
XKV_API const xkv_view *xkv_cache_views(const xkv_cache *cache);
/* The whole mapped file. */
XKV_API const uint8_t *xkv_cache_data(const xkv_cache *cache, uint64_t *size);

/* Views of the planes inside an engine file image of `framing->source_size` bytes at `image` (for filling a restored
 * file): views[plane_count]. Tensor segments must agree with `geometry`. Errors: ARGUMENT. */
XKV_API XKV_MUST_CHECK xkv_status xkv_framing_views(xkv_ctx *ctx, const xkv_framing *framing,
                                                    const xkv_geometry *geometry, uint8_t *image, xkv_view *views);

/* The framing of the same engine file cut to its first `token_count` tokens (by position): counts, cells, token ids and
 * sizes are rewritten, a server's checkpoint tail is dropped. Free with xkv_framing_free().
 * Errors: ARGUMENT (0 or more tokens than there are), UNSUPPORTED (engine or a part that cannot be cut). */
XKV_API XKV_MUST_CHECK xkv_status xkv_framing_first(xkv_ctx *ctx, const xkv_framing *framing,
                                                    const xkv_geometry *geometry, uint32_t token_count,
                                                    xkv_framing **framing_p);

/* *whole_only: non-zero when that is UNSUPPORTED, and then xkv_ctx_error() says why: a window that has slid, rows that
 * are not packed. Errors: MEMORY, CORRUPT. */
XKV_API XKV_MUST_CHECK xkv_status xkv_framing_is_whole_only(xkv_ctx *ctx, const xkv_framing *framing,
                                                            const xkv_geometry *geometry, uint32_t *whole_only);
XKV_API void xkv_framing_free(xkv_ctx *ctx, xkv_framing *framing);

/* Write a safetensors image of `geometry`: K and V of layer i as layer.{i}.key / layer.{i}.value ([tokens, heads, dim]
 * or, with layout HEAD_MAJOR, [heads, tokens, dim]; MLA: layer.{i}.latent / layer.{i}.key_rope), geometry in
 * __metadata__. The result is a framing whose tensor segments are still to be filled: see xkv_framing_views().
 * Errors: ARGUMENT (layout), MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_framing_safetensors(xkv_ctx *ctx, const xkv_geometry *geometry, uint32_t layout,
                                                          xkv_framing **framing_p);

#ifdef __cplusplus
}
#endif
#endif
