/* fuzz_llama_state.c - any bytes as an engine file: opened without and with a model, cut, and put together again. */
#include "xkv/format.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Literals and rows must give back the file. */
static void check_framing(const xkv_framing *f, const uint8_t *data)
{
    uint64_t offset = 0, literal = 0;
    for (uint32_t i = 0; i < f->segment_count; i++) {
        uint64_t n = f->segments[i].size;
        if (f->segments[i].plane_count == 0) {
            if (memcmp(f->literals + literal, data + offset, (size_t)n) != 0)
                abort();
            literal += n;
        }
        offset += n;
    }
    if (offset != f->source_size || literal != f->literal_size)
        abort();
}

/* The cut framing must be placeable for its number of tokens. */
static void cut(xkv_ctx *ctx, const xkv_cache *cache, uint32_t token_count)
{
    xkv_geometry g = *xkv_cache_geometry(cache);
    xkv_framing *f;
    if (xkv_framing_first(ctx, xkv_cache_framing(cache), &g, token_count, &f) != XKV_OK)
        return;
    g.token_count = token_count;
    uint8_t *image = malloc((size_t)f->source_size + 1);
    xkv_view *views = calloc((size_t)g.plane_count + 1, sizeof *views);
    if (!image || !views || xkv_framing_views(ctx, f, &g, image, views) != XKV_OK)
        abort();
    free(views);
    free(image);
    xkv_framing_free(ctx, f);
}

static void open_with(xkv_ctx *ctx, const uint8_t *data, size_t size, const xkv_model *model)
{
    xkv_cache *cache;
    if (xkv_cache_from_memory(ctx, data, size, "fuzz", model, &cache) != XKV_OK)
        return;
    uint32_t n = xkv_cache_geometry(cache)->token_count;
    check_framing(xkv_cache_framing(cache), data);
    if (n > 0) {
        cut(ctx, cache, 1);
        cut(ctx, cache, n / 2);
        cut(ctx, cache, n);
    }
    xkv_cache_free(ctx, cache);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    xkv_model_layer layers[2] = {{1, 4, 2, XKV_NO_ROPE, 0}, {1, 4, 2, XKV_NO_ROPE, 0}};
    const xkv_model latent = {.layer_count = 2, .layers = layers, .latent_dim = 3, .latent_first = 1};
    xkv_rope rope = {.n_rot = 2, .scale = 1};
    xkv_model_layer split[5] = {{1, 4, 2, 0, 2}, {1, 4, 2, 0, 0}, {1, 4, 2, 0, 2}, {1, 4, 2, 0, 0}, {1, 4, 2, 0, 2}};
    const xkv_model windows = {.layer_count = 5, .layers = split, .rope_count = 1, .ropes = &rope};
    xkv_ctx_options options = xkv_ctx_options_default();
    options.memory_limit = 256u << 20;
    xkv_ctx *ctx;
    if (xkv_ctx_create(&options, &ctx) != XKV_OK)
        return 0;
    open_with(ctx, data, size, NULL);
    open_with(ctx, data, size, &latent);
    open_with(ctx, data, size, &windows);
    if (xkv_ctx_memory_used(ctx) != 0)
        abort();
    xkv_ctx_free(ctx);
    return 0;
}
