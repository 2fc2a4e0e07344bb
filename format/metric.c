/* metric.c - what errors of keys and values cost, from a safetensors file (spec/engines.md, section 6). */
#include "engine_file.h"

#include <math.h>

/* Of the largest element of a block: rounding on the way here, not another quantity. */
#define ASYMMETRY 1e-3f

typedef struct reader {
    xkv_ctx *ctx;
    const char *name; /* of the file */
    xkv_metric *m;
} reader;

static xkv_status check_shape(const reader *r, const char *name, const xkv_safetensor *t)
{
    const uint64_t *n = t->shape;
    uint64_t width;
    if (t->is_f32 && t->dims == 4 && n[2] == n[3] && n[0] >= 1 && n[0] <= XKV_MAX_LAYERS &&
        xkv_mul64(n[1], n[2], &width) && width >= 1 && width <= XKV_MAX_WIDTH)
        return XKV_OK;
    return xkv_fail(r->ctx, XKV_ERROR_CORRUPT,
                    "%s: tensor \"%s\": expected F32 of [layers, heads, head_dim, head_dim] within limits [ME1]",
                    r->name, name);
}

static xkv_status check_block(const reader *r, const char *name, uint32_t block, const float *m)
{
    size_t n = r->m->head_dim;
    float largest = 0, trace = 0;
    const char *problem = NULL;
    for (size_t i = 0; i < n * n; i++) {
        if (!isfinite(m[i]))
            return xkv_fail(r->ctx, XKV_ERROR_CORRUPT, "%s: %s: layer %u, head %u: element %zu is not finite [ME2]",
                            r->name, name, block / r->m->heads, block % r->m->heads, i);
        largest = fmaxf(largest, fabsf(m[i]));
    }
    for (size_t i = 0; i < n; i++) {
        trace += m[i * n + i] / (float)n; /* finite: a mean */
        if (m[i * n + i] < 0)
            problem = "an error would gain something [ME4]";
        for (size_t k = 0; k < i; k++)
            if (fabsf(m[i * n + k] / 2 - m[k * n + i] / 2) > ASYMMETRY / 2 * largest)
                problem = "is not symmetric [ME3]";
    }
    if (!problem && !(trace > 0))
        problem = "errors cost nothing [ME4]";
    if (!problem)
        return XKV_OK;
    return xkv_fail(r->ctx, XKV_ERROR_CORRUPT, "%s: %s: layer %u, head %u: %s", r->name, name, block / r->m->heads,
                    block % r->m->heads, problem);
}

static xkv_status read_tensor(const reader *r, const char *name, const xkv_safetensor *t, const float **all_p)
{
    uint32_t blocks = r->m->layers * r->m->heads;
    size_t elements = (size_t)r->m->head_dim * r->m->head_dim;
    float *all;
    XKV_TRY(XKV_NEW(r->ctx, blocks * elements, &all)); /* the file holds as many */
    *all_p = all;
    for (size_t i = 0; i < blocks * elements; i++)
        all[i] = xkv_loadf32(t->data + 4 * i);
    for (uint32_t i = 0; i < blocks; i++)
        XKV_TRY(check_block(r, name, i, all + i * elements));
    return XKV_OK;
}

static xkv_status read_metric(const reader *r, const xkv_map *file)
{
    static const char *const names[] = {"k_metric", "v_metric"};
    xkv_safetensor found[2];
    XKV_TRY(xkv_safetensors_find(r->ctx, r->name, file, names, 2, found));
    for (uint32_t i = 0; i < 2; i++)
        XKV_TRY(check_shape(r, names[i], &found[i]));
    for (uint32_t i = 0; i < 4; i++)
        if (found[0].shape[i] != found[1].shape[i])
            return xkv_fail(r->ctx, XKV_ERROR_CORRUPT, "%s: k_metric and v_metric differ in shape [ME1]", r->name);
    r->m->layers = (uint32_t)found[0].shape[0];
    r->m->heads = (uint32_t)found[0].shape[1];
    r->m->head_dim = (uint32_t)found[0].shape[2];
    XKV_TRY(read_tensor(r, names[0], &found[0], &r->m->k));
    return read_tensor(r, names[1], &found[1], &r->m->v);
}

xkv_status xkv_metric_from_memory(xkv_ctx *ctx, const uint8_t *data, uint64_t size, const char *name,
                                  xkv_metric **metric_p)
{
    reader r = {.ctx = ctx, .name = name};
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &r.m));
    xkv_status status = read_metric(&r, &(xkv_map){data, size});
    if (status == XKV_OK)
        *metric_p = r.m;
    else
        xkv_metric_free(ctx, r.m);
    return status;
}

xkv_status xkv_metric_open(xkv_ctx *ctx, const char *path, xkv_metric **metric_p)
{
    xkv_map file = {0};
    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_map_file(ctx, path, &file));
    xkv_status status = xkv_metric_from_memory(ctx, file.data, file.size, path, metric_p);
    xkv_unmap_file(&file);
    return status;
}

void xkv_metric_free(xkv_ctx *ctx, xkv_metric *metric)
{
    if (!metric)
        return;
    xkv_release(ctx, (void *)(uintptr_t)metric->k);
    xkv_release(ctx, (void *)(uintptr_t)metric->v);
    xkv_release(ctx, metric);
}
