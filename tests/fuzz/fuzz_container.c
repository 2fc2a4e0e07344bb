/* fuzz_container.c - opens an entry from memory, reads all parts and gaps: once as given, once with the checksums made
 * right, so that the fuzzer gets behind them. */
#include "container_parse.h"

#include <stdlib.h>
#include <xxhash.h>

#define MEMORY_LIMIT (UINT64_C(256) << 20)

static xkv_status read_parts(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c)
{
    for (uint32_t i = 0; i < c->group_count; i++) {
        for (uint32_t k = 0; k < c->groups[i].part_count; k++) {
            const xkv_part *p = &c->groups[i].parts[k];
            void *dst = NULL;
            XKV_TRY(xkv_alloc(ctx, 1, p->size, &dst));
            xkv_status status = xkv_container_read_part(ctx, input, c, p, dst);
            xkv_release(ctx, dst);
            if (status != XKV_OK && status != XKV_ERROR_CHECKSUM)
                abort();
        }
    }
    return xkv_container_check_gaps(ctx, input, c);
}

/* What an accepted container promises to its users. */
static void check_promises(const xkv_container *c, size_t size)
{
    const xkv_geometry *g = &c->geometry;
    uint64_t widths = 0;
    if (c->file_size != size || c->payload_offset + c->payload_size != size || c->payload_offset % XKV_ALIGN != 0)
        abort();
    for (uint32_t i = 1; i < g->token_count; i++)
        if (g->positions[i - 1] > g->positions[i])
            abort();
    for (uint32_t i = 0; i < c->group_count; i++)
        widths += c->groups[i].width;
    for (uint32_t i = 0; i < g->plane_count; i++)
        widths -= (uint64_t)g->planes[i].heads * g->planes[i].head_dim;
    if (widths != 0)
        abort();
}

static void open_entry(const uint8_t *data, size_t size)
{
    xkv_ctx *ctx = NULL;
    xkv_container c;
    xkv_ctx_options o = xkv_ctx_options_default();
    o.memory_limit = MEMORY_LIMIT;
    o.threads = 1;
    if (xkv_ctx_create(&o, &ctx) != XKV_OK)
        abort();
    xkv_input input = xkv_input_from_memory(data, size);
    xkv_status status = xkv_container_read(ctx, &input, XKV_KIND_ENTRY, &c);
    if (status == XKV_OK) {
        check_promises(&c, size);
        status = read_parts(ctx, &input, &c);
        xkv_container_free(ctx, &c);
    }
    if (status != XKV_OK && *xkv_ctx_error(ctx) == '\0')
        abort(); /* an error without a text */
    if (xkv_ctx_memory_used(ctx) != 0)
        abort();
    xkv_ctx_free(ctx);
}

/* Make the checksums of sections, table and header right, as far as the table lies inside the file. */
static void reseal(uint8_t *data, size_t size)
{
    uint64_t count = xkv_min64(xkv_load32(data + 32), (size - XKV_HEADER_SIZE) / XKV_TABLE_ENTRY_SIZE);
    uint8_t *entry = data + XKV_HEADER_SIZE;
    for (uint64_t i = 0; i < count; i++, entry += XKV_TABLE_ENTRY_SIZE) {
        uint64_t offset = xkv_load64(entry + 8), bytes = xkv_load64(entry + 16);
        if (!(xkv_load32(entry + 4) & XKV_FLAG_BY_PARTS) && offset <= size && bytes <= size - offset)
            xkv_store64(entry + 24, XXH3_64bits(data + offset, (size_t)bytes));
    }
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(data + XKV_HEADER_SIZE, (size_t)(count * XKV_TABLE_ENTRY_SIZE)));
    memcpy(data, xkv_container_magic, sizeof xkv_container_magic);
    xkv_store64(data + 16, size);
    memcpy(data + 40, hash.digest, sizeof hash.digest);
    xkv_store64(data + 56, XXH3_64bits(data, 56));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    open_entry(data, size);
    if (size < XKV_HEADER_SIZE)
        return 0;
    uint8_t *copy = malloc(size);
    if (copy == NULL)
        return 0;
    memcpy(copy, data, size);
    reseal(copy, size);
    open_entry(copy, size);
    free(copy);
    return 0;
}
