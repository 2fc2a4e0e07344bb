/* fuzz_store_blob.c - head, page keys and symbols of a blob file of any content: as given, and with the checksums made
 * right, so that the fuzzer gets behind them. */
#include "blob.h"

#include <stdlib.h>
#include <xxhash.h>

#define MEMORY_LIMIT (UINT64_C(64) << 20)

/* What an accepted blob promises. */
static void check_promises(const xkv_blob_head *h, uint32_t count, const uint32_t *symbols, size_t size)
{
    if (h->payload_offset > size || h->payload_size != size - h->payload_offset || count > h->symbols)
        abort();
    if (count == h->symbols && xkv_symbols_to_tokens(symbols, count) != h->tokens)
        abort();
}

/* The framing of an accepted link lies before the payload. */
static void read_link(xkv_ctx *ctx, const xkv_input *input, const xkv_blob_head *head)
{
    xkv_blob_link link;
    uint8_t *bytes = NULL;
    if (!head->extends || xkv_blob_read_link(ctx, input, head, &link, &bytes) != XKV_OK)
        return;
    if (link.parent == 0 || link.base == 0 || link.base >= head->tokens || link.fram_size > head->payload_offset)
        abort();
    xkv_release(ctx, bytes);
}

static void read_blob(const uint8_t *data, size_t size)
{
    xkv_ctx_options o = xkv_ctx_options_default();
    const xkv_input input = xkv_input_from_memory(data, size);
    xkv_ctx *ctx = NULL;
    xkv_blob_head head;
    o.memory_limit = MEMORY_LIMIT;
    if (xkv_ctx_create(&o, &ctx) != XKV_OK)
        abort();
    if (xkv_blob_read_head(ctx, &input, &head) == XKV_OK && head.kind == XKV_BLOB_ENTRY) {
        const uint32_t counts[] = {1, 1025, head.symbols};
        for (size_t i = 0; i < 3; i++) {
            uint32_t count = counts[i], *symbols = NULL;
            xkv_page_key *names = NULL;
            if (xkv_blob_read_body(ctx, &input, &head, &count, &symbols, i == 2 ? &names : NULL) != XKV_OK)
                continue;
            check_promises(&head, count, symbols, size);
            xkv_release(ctx, symbols);
            xkv_release(ctx, names);
        }
        read_link(ctx, &input, &head);
    }
    if (xkv_ctx_memory_used(ctx) != 0)
        abort();
    xkv_ctx_free(ctx);
}

/* Checksums of the runs, of the tables, of the head, as far as they lie inside. */
static void seal(uint8_t *data, size_t size)
{
    if (size < 256)
        return;
    uint64_t symbols = xkv_load32(data + 32), names = xkv_load32(data + 36);
    uint64_t runs = (symbols + 1023) / 1024, table = 8 * (runs + 1), keys = 256 + table + 4 * symbols;
    if (keys + 40 * names <= size) {
        for (uint64_t i = 0; i < runs; i++) {
            uint64_t n = xkv_min64(symbols - 1024 * i, 1024);
            xkv_store64(data + 256 + 8 * i, XXH3_64bits(data + 256 + table + 4096 * i, 4 * n));
        }
        xkv_store64(data + 256 + 8 * runs, XXH3_64bits(data + keys, 40 * names));
        xkv_store64(data + 80, XXH3_64bits(data + 256, table));
    }
    uint64_t link = keys + 40 * names;
    if (link + 64 <= size && link + 64 + xkv_load32(data + link + 44) <= size) {
        xkv_store64(data + link + 48, XXH3_64bits(data + link + 64, xkv_load32(data + link + 44)));
        xkv_store64(data + link + 56, XXH3_64bits(data + link, 56));
    }
    xkv_store64(data + 248, XXH3_64bits(data, 248));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size + 1);
    if (copy == NULL)
        return 0;
    read_blob(data, size);
    if (size > 0)
        memcpy(copy, data, size);
    seal(copy, size);
    read_blob(copy, size);
    free(copy);
    return 0;
}
