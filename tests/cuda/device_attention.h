/* device_attention.h - tests/unit/test_attend.c on a device: what is held is copied there, and asked there. */
#include "device_opened.h"

#include "attention.h"

enum { HOLD_LEAST = XKV_HOLD_COEFFICIENTS };
static const double f32_error = 1e-5;

/* --- Asking --- */

/* A call's memory there, with guards behind the results. */
typedef struct call {
    xkv_queries q;
    uint8_t *queries;
    int32_t *positions;
    float *results; /* output, 16 floats, lse, 16 floats */
    void *workspace;
    size_t outputs, lses;
} call;

static uint32_t query_dim(const xkv_geometry *g, uint32_t layer)
{
    const xkv_plane *k = &g->planes[2 * layer];

    return k->kind == XKV_PLANE_LATENT ? 2 * k->head_dim : k->head_dim;
}

/* The queries wherever they lie: the bytes from the lowest to the highest. */
static void put_queries(call *c, const xkv_queries *q, uint32_t dim)
{
    int64_t head = q->head_stride ? q->head_stride : 4 * (int64_t)dim;
    int64_t query = q->query_stride ? q->query_stride : head * q->heads, low = 0, high = 0;

    for (int64_t i = 0; i < q->count; i++)
        for (int64_t h = 0; h < q->heads; h++) {
            int64_t at = i * query + h * head;
            low = at < low ? at : low;
            high = at > high ? at : high;
        }
    high += 4 * (int64_t)dim;
    c->queries = device_alloc((uint64_t)(high - low));
    device_copy(c->queries, (const uint8_t *)q->data + low, (uint64_t)(high - low));
    c->q.data = c->queries - low;
}

static call make_call(const xkv_geometry *g, uint32_t layer, const xkv_queries *q, uint64_t workspace)
{
    size_t count = (size_t)q->count * q->heads;
    call c = {.q = *q, .outputs = count * g->planes[2 * layer].head_dim, .lses = count};
    size_t size = (c.outputs + c.lses + 32) * sizeof(float);
    uint8_t *guards = malloc(size);

    put_queries(&c, q, query_dim(g, layer));
    if (q->positions) {
        c.positions = device_alloc(4 * q->count);
        device_copy(c.positions, q->positions, 4 * q->count);
        c.q.positions = c.positions;
    }
    memset(guards, 0xee, size);
    c.results = device_alloc(size);
    device_copy(c.results, guards, size);
    c.workspace = device_alloc(workspace);
    free(guards);
    return c;
}

static void end_call(call *c, float *output, float *lse)
{
    float *found = malloc((c->outputs + c->lses + 32) * sizeof *found);
    uint8_t guard[64];

    memset(guard, 0xee, sizeof guard);
    device_copy(found, c->results, (c->outputs + c->lses + 32) * sizeof *found);
    memcpy(output, found, c->outputs * sizeof *found);
    memcpy(lse, found + c->outputs + 16, c->lses * sizeof *found);
    assert_memory_equal(found + c->outputs, guard, sizeof guard);
    assert_memory_equal(found + c->outputs + 16 + c->lses, guard, sizeof guard);
    free(found);
    device_free(c->queries);
    device_free(c->positions);
    device_free(c->results);
    device_free(c->workspace);
}

static xkv_status attend(xkv_ctx *ctx, const xkv_attention *attention, uint32_t layer, const xkv_queries *q,
                         const xkv_attend_options *o, float *output, float *lse)
{
    xkv_device_attention *copy = NULL;
    xkv_device_attention_info info;
    xkv_status status;
    call c;

    assert_ok(ctx, xkv_device_attention_create(ctx, device, attention, NULL, &copy));
    xkv_device_attention_get_info(copy, &info);
    c = make_call(&attention->entry->geometry, layer, q, info.workspace_bytes);
    status = xkv_device_attend(ctx, copy, layer, &c.q, o, NULL, c.workspace, c.results, c.results + c.outputs + 16);
    end_call(&c, output, lse);
    xkv_device_attention_free(ctx, copy);
    return status;
}

static void merge(const xkv_attention_state *states, uint32_t state_count, uint64_t rows, uint32_t dim, float *output,
                  float *lse)
{
    uint64_t size = rows * dim * sizeof *output, at = 0;
    float *there = device_alloc((state_count + 1) * (size + rows * sizeof *lse));
    xkv_attention_state moved[XKV_PLUG_STATES + 1];
    xkv_ctx *ctx = new_ctx(1);
    float *out = there, *out_lse = there + rows * dim;

    for (uint32_t i = 0; i < state_count; i++) {
        at = i * (rows * dim + rows);
        moved[i] = (xkv_attention_state){there + at, there + at + rows * dim};
        device_copy(there + at, states[i].output, size);
        device_copy(there + at + rows * dim, states[i].lse, rows * sizeof *lse);
    }
    assert_ok(ctx, xkv_device_attention_merge(ctx, device, moved, state_count, rows, dim, NULL, out, out_lse));
    device_copy(output, out, size); /* onto the first of them */
    device_copy(lse, out_lse, rows * sizeof *lse);
    assert_int_equal(xkv_device_attention_merge(ctx, device, moved, XKV_PLUG_STATES + 1, rows, dim, NULL, out, out_lse),
                     XKV_ERROR_ARGUMENT);
    device_free(there);
    xkv_ctx_free(ctx);
}
