/* fuzz_dict.c - any bytes as a dictionary: opened for reading and for packing, and what opened is used to pack a few
 * rows. Each input runs twice, as it is and with all checksums made right. */
#include "seal.h"
#include "xkv/codec.h"

#include <math.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static xkv_status discard(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    (void)user;
    (void)ctx;
    (void)offset;
    (void)src;
    (void)size;
    return XKV_OK;
}

/* Pack 40 rows of the planes of the seeds: one layer of K and V, one head of 4 elements. */
static void pack(xkv_ctx *ctx, const xkv_dict *dict)
{
    static const xkv_plane planes[2] = {{0, XKV_PLANE_K, XKV_F32, 1, 4, XKV_NO_ROPE},
                                        {0, XKV_PLANE_V, XKV_F32, 1, 4, XKV_NO_ROPE}};
    int32_t positions[40];
    float rows[40][4];
    for (int i = 0; i < 40; i++) {
        positions[i] = i;
        for (int k = 0; k < 4; k++)
            rows[i][k] = (float)(i * 7 % 11 - k);
    }
    xkv_view view = {rows, 16, 16, 4, NULL, .dtype = XKV_F32}, views[2] = {view, view};
    xkv_geometry geometry = {
        .layer_count = 1, .plane_count = 2, .token_count = 40, .planes = planes, .positions = positions};
    xkv_output output = {NULL, discard};
    xkv_pack_options o = xkv_pack_options_default();
    o.profile = XKV_PROFILE_DICT;
    o.dict = dict;
    (void)!xkv_pack(ctx, &geometry, views, NULL, NULL, 0, &o, &output, NULL);
}

static void look(const xkv_dict *dict, size_t size)
{
    xkv_dict_info info;
    uint32_t total = 0;
    xkv_dict_get_info(dict, &info);
    for (uint32_t i = 0; i < info.group_count; i++) {
        uint32_t count;
        const float *sigma = xkv_dict_sigma(dict, i, &count);
        total += count - xkv_dict_leading(dict, i);
        for (uint32_t k = 0; k < count; k++)
            if (!(sigma[k] >= 0) || isinf(sigma[k]))
                abort();
    }
    if (total > info.component_count || info.file_size != size || !(info.unit > 0))
        abort();
}

static void run(const uint8_t *data, size_t size, int for_packing)
{
    xkv_ctx_options options = xkv_ctx_options_default();
    options.threads = 1;
    options.memory_limit = 1 << 26;
    xkv_ctx *ctx;
    xkv_dict *dict;
    if (xkv_ctx_create(&options, &ctx) != XKV_OK)
        return;
    xkv_input input = xkv_input_from_memory(data, size);
    if (xkv_dict_open(ctx, &input, for_packing, &dict) == XKV_OK) {
        look(dict, size);
        if (for_packing)
            pack(ctx, dict);
        xkv_dict_close(ctx, dict);
    } else if (*xkv_ctx_error(ctx) == '\0') {
        abort(); /* an error without a text */
    }
    if (xkv_ctx_memory_used(ctx) != 0)
        abort();
    xkv_ctx_free(ctx);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    run(data, size, 0);
    uint8_t *copy = malloc(size ? size : 1);
    if (copy == NULL)
        return 0;
    memcpy(copy, data, size);
    seal((span){copy, size});
    run(copy, size, 0);
    run(copy, size, 1);
    free(copy);
    return 0;
}
