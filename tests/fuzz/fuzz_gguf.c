/* fuzz_gguf.c - any bytes as a GGUF file. What is accepted must be a model within the container's bounds. */
#include "engine_file.h"

#include <math.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_model(const xkv_model *m)
{
    for (uint32_t i = 0; i < m->layer_count; i++) {
        const xkv_model_layer *layer = &m->layers[i];
        if ((uint64_t)layer->kv_heads * layer->head_dim_k > XKV_MAX_WIDTH)
            abort();
        if (layer->rope == XKV_NO_ROPE)
            continue;
        if (layer->rope >= m->rope_count)
            abort();
        const xkv_rope *rope = &m->ropes[layer->rope];
        if (rope->offset + rope->n_rot > layer->head_dim_k || !(rope->scale > 0))
            abort();
        for (uint32_t k = 0; k < rope->n_rot / 2; k++)
            if (!(fabs(rope->inv_freq[k]) <= 64))
                abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    xkv_rope_options options = xkv_rope_options_default();
    options.style = XKV_ROPE_INTERLEAVED;
    xkv_ctx *ctx;
    if (xkv_ctx_create(NULL, &ctx) != XKV_OK)
        return 0;
    for (int i = 0; i < 2; i++) {
        xkv_model *m;
        xkv_ctx_begin(ctx);
        if (xkv_model_from_gguf_memory(ctx, data, size, "fuzz", i ? &options : NULL, &m) != XKV_OK)
            continue;
        check_model(m);
        xkv_model_free(ctx, m);
    }
    if (xkv_ctx_memory_used(ctx) != 0)
        abort();
    xkv_ctx_free(ctx);
    return 0;
}
