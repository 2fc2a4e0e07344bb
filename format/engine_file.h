/* engine_file.h - what the readers of engine files and of models share (spec/engines.md). */
#ifndef XKV_ENGINE_FILE_H
#define XKV_ENGINE_FILE_H

#include "base.h"
#include "xkv/format.h"

/* --- Files in memory ---------------------------------------------------------------------------------------------- */

typedef struct xkv_map {
    const uint8_t *data;
    uint64_t size;
} xkv_map;

/* Map a regular file for reading; an empty file maps to size 0 and data NULL. Errors: IO. */
XKV_MUST_CHECK xkv_status xkv_map_file(xkv_ctx *ctx, const char *path, xkv_map *map);
void xkv_unmap_file(xkv_map *map); /* accepts a zeroed one */

/* --- Framings under construction ---------------------------------------------------------------------------------- */

/* Collects segments and literal bytes; neighbouring literals become one segment. */
typedef struct xkv_framing_builder {
    xkv_ctx *ctx;
    xkv_segment *segments;
    uint32_t count, capacity;
    uint8_t *literals;
    uint64_t literal_size, literal_capacity;
    uint64_t source_size;
} xkv_framing_builder;

XKV_MUST_CHECK xkv_status xkv_framing_add_literal(xkv_framing_builder *b, const void *bytes, uint64_t size);
XKV_MUST_CHECK xkv_status xkv_framing_add_tensor(xkv_framing_builder *b, const xkv_segment *tensor);
/* Move what was collected to `framing`, which then owns it; `b` is empty afterwards. */
void xkv_framing_take(xkv_framing_builder *b, uint32_t engine, xkv_framing *framing);
void xkv_framing_builder_free(xkv_framing_builder *b);

/* Release the arrays of a framing, not the struct. */
void xkv_framing_release(xkv_ctx *ctx, xkv_framing *framing);

/* Whether rows of a plane can be stored in a layout: one that splits heads or dims must not split blocks [F10]. */
bool xkv_layout_fits(uint32_t layout, const xkv_plane *p);

/* Which file rows the first `kept` of `total` tokens use, and their order among themselves.
 * keep_p: [total] flags by row, or NULL when they are rows 0 .. kept-1 in order; rows_p: the cut framing's rows. */
XKV_MUST_CHECK xkv_status xkv_framing_cut_rows(xkv_ctx *ctx, const xkv_framing *framing, uint32_t total, uint32_t kept,
                                               uint8_t **keep_p, uint32_t **rows_p);

/* --- Caches under construction ------------------------------------------------------------------------------------ */

struct xkv_cache {
    xkv_map file;     /* data and size of the engine file, mapped or the caller's */
    bool mapped;      /* unmap when freed */
    const char *name; /* for messages, while opening */
    xkv_geometry geometry;
    xkv_framing framing;
    xkv_view *views;
};

/* Give the cache the positions of its `count` rows, in file order: sorts them and sets framing.rows when the rows are
 * not in order. */
XKV_MUST_CHECK xkv_status xkv_cache_set_positions(xkv_ctx *ctx, xkv_cache *cache, const int32_t *positions,
                                                  uint32_t count);

/* Copy the model's rotary embeddings into the geometry when one of its planes uses them. */
XKV_MUST_CHECK xkv_status xkv_cache_set_ropes(xkv_ctx *ctx, xkv_cache *cache, const xkv_rope *ropes, uint32_t count);

/* Fill heads and head_dim of a plane whose row has `width` elements from the model's layer. MISMATCH when they differ;
 * `width` or the heads themselves are named in the message. */
XKV_MUST_CHECK xkv_status xkv_model_fit_plane(xkv_ctx *ctx, const char *name, const xkv_model *model, uint32_t width,
                                              xkv_plane *plane);

/* The model's layers that have a cache: their number, and in `list` (room for layer_count, or NULL) which they are. */
uint32_t xkv_model_cached_layers(const xkv_model *model, uint32_t *list);

/* Readers. `*understood` false: the cache was left alone and is carried as opaque bytes. */
XKV_MUST_CHECK xkv_status xkv_llama_open(xkv_ctx *ctx, xkv_cache *cache, const xkv_model *model, bool *understood);
XKV_MUST_CHECK xkv_status xkv_safetensors_open(xkv_ctx *ctx, xkv_cache *cache, const xkv_model *model,
                                               bool *understood);

/* A tensor of a safetensors file. Its data is `file`'s and as long as shape and type say. */
#define XKV_SAFETENSOR_DIMS 8u
typedef struct xkv_safetensor {
    const uint8_t *data;
    uint64_t shape[XKV_SAFETENSOR_DIMS];
    uint32_t dims; /* 0: none, or more than XKV_SAFETENSOR_DIMS */
    bool is_f32;
} xkv_safetensor;

/* Find the tensors wanted[count] in a safetensors file, every one of them. `name` is for messages.
 * Errors: FORMAT, TRUNCATED, CORRUPT [SF1..SF4], MEMORY. */
XKV_MUST_CHECK xkv_status xkv_safetensors_find(xkv_ctx *ctx, const char *name, const xkv_map *file,
                                               const char *const *wanted, uint32_t count, xkv_safetensor *found);

/* xkv_metric_open() over memory, which is not kept. */
XKV_MUST_CHECK xkv_status xkv_metric_from_memory(xkv_ctx *ctx, const uint8_t *data, uint64_t size, const char *name,
                                                 xkv_metric **metric_p);

/* Cut framings to their first tokens; 1 <= token_count <= geometry->token_count. */
XKV_MUST_CHECK xkv_status xkv_llama_first(xkv_ctx *ctx, const xkv_framing *framing, const xkv_geometry *geometry,
                                          uint32_t token_count, xkv_framing *cut);
XKV_MUST_CHECK xkv_status xkv_safetensors_first(xkv_ctx *ctx, const xkv_framing *framing, const xkv_geometry *geometry,
                                                uint32_t token_count, xkv_framing *cut);

/* --- Rotary embeddings -------------------------------------------------------------------------------------------- */

/* A rotary embedding as model files describe it (spec/engines.md, section 5). */
typedef struct xkv_rope_recipe {
    uint32_t n_rot, offset, style;
    double base;
    double freq_scale;           /* positions are multiplied by it: 1 / factor of linear and YaRN scaling */
    double ext_factor;           /* YaRN's share of extrapolation; 0: no YaRN */
    double beta_fast, beta_slow; /* YaRN's ramp, in rotations over the original context */
    double context;              /* YaRN's original context length */
    double scale;                /* of cosine and sine */
    const double *factors;       /* [n_rot/2] divisors of the frequencies, or NULL */
} xkv_rope_recipe;

/* Work out the frequencies. CORRUPT when the recipe is out of the container's bounds [G11]. */
XKV_MUST_CHECK xkv_status xkv_rope_resolve(xkv_ctx *ctx, const xkv_rope_recipe *recipe, xkv_rope *rope);

/* xkv_model_from_gguf() over memory. `size` may end at the tensor data. */
XKV_MUST_CHECK xkv_status xkv_model_from_gguf_memory(xkv_ctx *ctx, const uint8_t *data, uint64_t size, const char *name,
                                                     const xkv_rope_options *options, xkv_model **model_p);

/* An empty model with room for its layers and ropes. */
XKV_MUST_CHECK xkv_status xkv_model_create(xkv_ctx *ctx, uint32_t layer_count, uint32_t rope_count,
                                           xkv_model **model_p);

#endif
