/* consumer.c - the smallest program over the whole API: packs and restores two tokens of one plane. */
#include <xkv/codec.h>
#include <xkv/kernels.h>

#include <stdio.h>

typedef struct memory {
    uint8_t bytes[65536];
    size_t size;
} memory;

static xkv_status write_memory(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    memory *m = user;
    (void)ctx;
    if (offset > sizeof m->bytes || size > sizeof m->bytes - offset)
        return XKV_ERROR_NO_SPACE;
    memcpy(m->bytes + offset, src, size);
    if (m->size < offset + size)
        m->size = (size_t)offset + size;
    return XKV_OK;
}

static xkv_status round_trip(xkv_ctx *ctx, int *equal)
{
    static memory packed;
    const float source[2][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
    float restored[2][4] = {{0}};
    const int32_t positions[2] = {0, 1};
    const xkv_plane plane = {.kind = XKV_PLANE_V, .dtype = XKV_F32, .heads = 1, .head_dim = 4, .rope = XKV_NO_ROPE};
    const xkv_geometry geometry = {
        .layer_count = 1, .plane_count = 1, .token_count = 2, .planes = &plane, .positions = positions};
    xkv_view from = {.data = (void *)source, .token_stride = 16, .head_stride = 16, .dim_stride = 4, .dtype = XKV_F32};
    xkv_view to = from;
    to.data = restored;

    xkv_output output = {.user = &packed, .write = write_memory};
    xkv_status status = xkv_pack(ctx, &geometry, &from, NULL, NULL, 0, NULL, &output, NULL);
    if (status != XKV_OK)
        return status;
    xkv_input input = xkv_input_from_memory(packed.bytes, packed.size);
    xkv_entry *entry;
    status = xkv_entry_open(ctx, &input, &entry);
    if (status != XKV_OK)
        return status;
    status = xkv_entry_read(ctx, entry, NULL, &to);
    xkv_entry_close(ctx, entry);
    *equal = memcmp(source, restored, sizeof source) == 0;
    return status;
}

int main(void)
{
    xkv_ctx *ctx;
    int equal = 0;
    if (xkv_ctx_create(NULL, &ctx) != XKV_OK)
        return 1;
    xkv_status status = round_trip(ctx, &equal);
    printf("xkv %s, %s, %s: %s %s\n", xkv_version(), xkv_kernels_cpu_name(), xkv_kernels_blas_name(),
           xkv_status_string(status), xkv_ctx_error(ctx));
    xkv_ctx_free(ctx);
    return status == XKV_OK && equal ? 0 : 1;
}
