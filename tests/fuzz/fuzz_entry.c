/* fuzz_entry.c - any bytes as an entry: opened, verified, restored whole and in part, attended to, with the
 * dictionaries of the seeds. Each input runs twice, as it is and with all checksums made right, because a changed byte
 * is otherwise refused before any table is looked at. */
#include "seal.h"
#include "xkv/codec.h"

#include <stdbool.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* --- Using what was opened ------------------------------------------------------------------------------------------
 */

static void look(const xkv_entry *entry)
{
    xkv_entry_info info;
    xkv_entry_get_info(entry, &info);
    for (uint32_t i = 0; i < info.group_count; i++) {
        xkv_group_info group;
        xkv_entry_get_group(entry, i, &group);
        for (uint32_t j = 0; j < group.plane_count; j++) {
            if (group.planes[j] >= xkv_entry_geometry(entry)->plane_count)
                abort();
        }
    }
    for (uint32_t i = 0; i < xkv_entry_value_count(entry); i++) {
        xkv_value value, found;
        xkv_entry_get_value(entry, i, &value);
        if (!xkv_entry_find_value(entry, value.key, &found))
            abort();
    }
}

/* The components of all groups; false when some cannot be read. */
static bool count_components(xkv_ctx *ctx, const xkv_entry *entry)
{
    xkv_entry_info info;
    bool all = true;
    xkv_entry_get_info(entry, &info);
    for (uint32_t i = 0; i < info.group_count; i++) {
        xkv_group_info group;
        xkv_entry_get_group(entry, i, &group);
        xkv_component *components = malloc((group.rank + 1) * sizeof *components);
        bool coded = group.codec != XKV_CODEC_LOSSLESS && group.codec != XKV_CODEC_SVD;
        all &= components != NULL && (!coded || xkv_entry_read_components(ctx, entry, i, components) == XKV_OK);
        free(components);
    }
    return all;
}

static xkv_status restore(xkv_ctx *ctx, const xkv_entry *entry, uint32_t tokens)
{
    uint64_t size;
    xkv_status status = xkv_entry_restored_size(ctx, entry, tokens, &size);
    if (status != XKV_OK || size > 1 << 24)
        return status == XKV_OK ? XKV_ERROR_LIMIT : status;
    uint8_t *image = malloc(size ? size : 1);
    if (image == NULL)
        return XKV_ERROR_MEMORY;
    status = xkv_entry_restore(ctx, entry, tokens, NULL, NULL, image, size);
    free(image);
    return status;
}

enum { MAX_HEADS = 64, MAX_DIM = 1024 };

/* One query of the first plane's layer, with each way to hold what it needs: of what verifies none is damaged. */
static void attend(xkv_ctx *ctx, const xkv_entry *entry, xkv_status verified)
{
    const xkv_geometry *g = xkv_entry_geometry(entry);
    static float query[MAX_HEADS * 2 * MAX_DIM], output[MAX_HEADS * MAX_DIM], lse[MAX_HEADS];
    xkv_attention_options o = xkv_attention_options_default();
    xkv_attend_options how = xkv_attend_options_default();
    for (uint32_t i = 0; i < g->plane_count; i++) {
        if (g->planes[i].heads > MAX_HEADS || g->planes[i].head_dim > MAX_DIM)
            return;
    }
    how.scale = 1;
    for (o.hold = XKV_HOLD_AUTO; g->plane_count > 0 && o.hold <= XKV_HOLD_ROWS; o.hold++) {
        const xkv_queries queries = {.data = query, .count = 1, .heads = g->planes[0].heads};
        xkv_attention *attention = NULL;
        xkv_status status = xkv_attention_open(ctx, entry, &o, &attention);
        if (status == XKV_OK)
            status = xkv_attend(ctx, attention, g->planes[0].layer, &queries, &how, output, lse);
        if (verified == XKV_OK && o.hold == XKV_HOLD_NOTHING &&
            (status == XKV_ERROR_CORRUPT || status == XKV_ERROR_CHECKSUM))
            abort();
        xkv_attention_close(ctx, attention);
    }
}

/* A dictionary that the seeds with dict groups need. */
static xkv_dict *open_dict(xkv_ctx *ctx, const char *path)
{
    xkv_input input;
    xkv_dict *dict;
    if (xkv_input_open(ctx, path, &input) != XKV_OK || xkv_dict_open(ctx, &input, 0, &dict) != XKV_OK)
        abort();
    xkv_input_close(ctx, &input);
    return dict;
}

/* The dictionary that the entry names, attached. */
static xkv_dict *attach(xkv_ctx *ctx, xkv_entry *entry)
{
    static const char *const paths[] = {XKV_FUZZ_DICTS "/joint.xkvd", XKV_FUZZ_DICTS "/cross.xkvd"};
    xkv_entry_info info;
    xkv_entry_get_info(entry, &info);
    for (int i = 0; info.needs_dict && i < 2; i++) {
        xkv_dict *dict = open_dict(ctx, paths[i]);
        if (xkv_entry_attach(ctx, entry, dict) == XKV_OK)
            return dict;
        xkv_dict_close(ctx, dict);
    }
    return NULL;
}

static void run(const uint8_t *data, size_t size)
{
    xkv_ctx_options options = xkv_ctx_options_default();
    options.threads = 1;
    options.memory_limit = 1 << 26;
    xkv_ctx *ctx;
    xkv_entry *entry;
    if (xkv_ctx_create(&options, &ctx) != XKV_OK)
        return;
    xkv_input input = xkv_input_from_memory(data, size);
    if (xkv_entry_open(ctx, &input, &entry) == XKV_OK) {
        look(entry);
        xkv_dict *dict = attach(ctx, entry);
        xkv_status verified = xkv_entry_verify(ctx, entry, NULL, NULL);
        if (!count_components(ctx, entry) && verified == XKV_OK)
            abort();
        xkv_status restored = restore(ctx, entry, 0);
        /* What verifies can be restored, unless it holds no engine file or is too big here. */
        if (verified == XKV_OK && restored != XKV_OK && restored != XKV_ERROR_UNSUPPORTED &&
            restored != XKV_ERROR_LIMIT)
            abort();
        (void)!restore(ctx, entry, 1);
        attend(ctx, entry, verified);
        xkv_entry_close(ctx, entry);
        xkv_dict_close(ctx, dict);
    }
    if (xkv_ctx_memory_used(ctx) != 0)
        abort();
    xkv_ctx_free(ctx);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    run(data, size);
    uint8_t *copy = malloc(size ? size : 1);
    if (copy == NULL)
        return 0;
    memcpy(copy, data, size);
    seal((span){copy, size});
    run(copy, size);
    free(copy);
    return 0;
}
