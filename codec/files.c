#include "base.h"
#include "xkv/codec.h"

xkv_status xkv_pack_file(xkv_ctx *ctx, const char *engine_path, const char *entry_path, int overwrite,
                         const xkv_pack_options *options, xkv_pack_report *report)
{
    xkv_pack_options o = xkv_pack_options_default();
    xkv_cache *cache = NULL;
    xkv_file *file = NULL;
    xkv_output output;
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY_GOTO(xkv_cache_open(ctx, engine_path, o.model, &cache), out);
    XKV_TRY_GOTO(xkv_file_create(ctx, entry_path, overwrite, &file), out);
    output = xkv_file_output(file);
    XKV_TRY_GOTO(xkv_pack_cache(ctx, cache, &o, &output, report), out);
    status = xkv_file_commit(ctx, file);
    file = NULL; /* gone either way */
out:
    xkv_file_abort(ctx, file);
    xkv_cache_free(ctx, cache);
    return status;
}

static xkv_status restore_to_file(xkv_ctx *ctx, const xkv_entry *entry, uint32_t token_count, xkv_file *file)
{
    uint64_t size;
    uint8_t *image;

    XKV_TRY(xkv_entry_restored_size(ctx, entry, token_count, &size));
    XKV_TRY(xkv_file_map(ctx, file, size, &image));
    return xkv_entry_restore(ctx, entry, token_count, NULL, NULL, image, size);
}

xkv_status xkv_unpack_file(xkv_ctx *ctx, const char *entry_path, const char *engine_path, int overwrite,
                           uint32_t token_count)
{
    xkv_input input = {0};
    xkv_entry *entry = NULL;
    xkv_file *file = NULL;
    xkv_status status;

    XKV_TRY(xkv_input_open(ctx, entry_path, &input));
    XKV_TRY_GOTO(xkv_entry_open(ctx, &input, &entry), out);
    XKV_TRY_GOTO(xkv_file_create(ctx, engine_path, overwrite, &file), out);
    XKV_TRY_GOTO(restore_to_file(ctx, entry, token_count, file), out);
    status = xkv_file_commit(ctx, file);
    file = NULL; /* gone either way */
out:
    xkv_file_abort(ctx, file);
    xkv_entry_close(ctx, entry);
    xkv_input_close(ctx, &input);
    return status;
}
