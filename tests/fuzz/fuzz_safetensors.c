/* fuzz_safetensors.c - any bytes behind the length of a safetensors header, so that mutations of the text need not
 * also keep the length right: the first two bytes of the input say how many bytes of data follow the header. */
#include "base.h"
#include "xkv/format.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void use(xkv_ctx *ctx, const xkv_cache *cache)
{
    xkv_geometry g = *xkv_cache_geometry(cache);
    xkv_framing *f;
    if (g.token_count > 0 &&
        xkv_framing_first(ctx, xkv_cache_framing(cache), &g, (g.token_count + 1) / 2, &f) == XKV_OK)
        xkv_framing_free(ctx, f);
    if (xkv_framing_safetensors(ctx, &g, XKV_LAYOUT_TOKEN_MAJOR, &f) == XKV_OK)
        xkv_framing_free(ctx, f);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    size_t header = size - 2, rows = xkv_load16(data);
    uint8_t *file = calloc(1, 8 + header + rows);
    xkv_ctx *ctx;
    if (!file || xkv_ctx_create(NULL, &ctx) != XKV_OK) {
        free(file);
        return 0;
    }
    xkv_store64(file, header);
    memcpy(file + 8, data + 2, header);
    xkv_cache *cache;
    if (xkv_cache_from_memory(ctx, file, 8 + header + rows, "fuzz", NULL, &cache) == XKV_OK) {
        use(ctx, cache);
        xkv_cache_free(ctx, cache);
    }
    if (xkv_ctx_memory_used(ctx) != 0)
        abort();
    xkv_ctx_free(ctx);
    free(file);
    return 0;
}
