#include "device_support.h"

#include <stdio.h>

uint32_t head_dim = 16;
uint32_t errors_logged, warnings_logged;

static void count_log(void *user, xkv_log_level level, const char *message)
{
    (void)user;
    (void)message;
    errors_logged += level == XKV_LOG_ERROR;
    warnings_logged += level == XKV_LOG_WARNING;
}

xkv_ctx *logging_ctx(void)
{
    xkv_ctx_options o = xkv_ctx_options_default();
    xkv_ctx *ctx;

    o.threads = 2;
    o.log = count_log;
    errors_logged = warnings_logged = 0;
    assert_true(xkv_ctx_create(&o, &ctx) == XKV_OK);
    return ctx;
}

/* --- Samples --- */

synthetic sample(uint32_t tokens, uint32_t dtype, int rope)
{
    synthetic_options o = {.layers = 3,
                           .tokens = tokens,
                           .heads = 2,
                           .head_dim = head_dim,
                           .dtype = dtype,
                           .rank = 10,
                           .group_layers = 2,
                           .noise = 0.1,
                           .mean = 1.5,
                           .rope = rope,
                           .first_position = 11};
    return make_synthetic(&o);
}

/* Blocks that are no multiples of the identity: I + u u^T. */
static float *make_blocks(const synthetic *s, uint64_t *seed)
{
    const xkv_plane *p = s->planes;
    size_t d = p->head_dim, blocks = (size_t)s->geometry.layer_count * p->heads;
    float *list = malloc(blocks * d * d * sizeof *list), u[64];

    for (size_t b = 0; b < blocks; b++) {
        for (size_t i = 0; i < d; i++)
            u[i] = (float)test_normal(seed);
        for (size_t i = 0; i < d * d; i++)
            list[b * d * d + i] = u[i / d] * u[i % d] + (i / d == i % d ? 1.0f : 0.0f);
    }
    return list;
}

xkv_dict *train_dict(xkv_ctx *ctx, const synthetic *s, uint32_t cross, memory *trained)
{
    xkv_train_options o = xkv_train_options_default();
    uint64_t seed = 77;
    float *k = make_blocks(s, &seed), *v = make_blocks(s, &seed);
    xkv_metric metric = {s->geometry.layer_count, s->planes->heads, s->planes->head_dim, k, v};
    xkv_dict *dict = NULL;
    xkv_input input;

    o.group_layers = 2;
    o.cross = cross;
    o.metric = &metric;
    *trained = (memory){0};
    assert_ok(ctx, train_on(ctx, &s, 1, &o, trained));
    free(k);
    free(v);
    input = xkv_input_from_memory(trained->data, trained->size);
    assert_ok(ctx, xkv_dict_open(ctx, &input, 1, &dict));
    return dict;
}

/* --- Caches --- */

static xkv_view make_view(const cache *c, const xkv_plane *p, uint8_t *at, const uint32_t *rows)
{
    int64_t e = (int64_t)xkv_dtype_size(c->dtype), h = p->heads, d = p->head_dim, n = c->tokens;
    const int64_t strides[LAYOUTS][3] = {{h * d * e, d * e, e}, {d * e, n * d * e, e}, {e, n * d * e, n * e}};

    return (xkv_view){.data = at,
                      .token_stride = strides[c->layout][0],
                      .head_stride = strides[c->layout][1],
                      .dim_stride = strides[c->layout][2],
                      .rows = rows,
                      .dtype = c->dtype};
}

void clear_cache(cache *c)
{
    memset(c->found, 0xee, c->size);
    device_copy(c->there, c->found, c->size);
}

cache make_cache(const synthetic *s, uint32_t tokens, uint32_t dtype, layout l, bool paged)
{
    cache c = {.planes = s->geometry.plane_count, .tokens = tokens, .dtype = dtype, .layout = l};
    const xkv_plane *p = s->geometry.planes;

    c.plane_size = SENTINEL + (uint64_t)tokens * row_width(p) * xkv_dtype_size(dtype);
    c.plane_size = (c.plane_size + 15) / 16 * 16;
    c.size = c.plane_size * c.planes + SENTINEL;
    c.there = device_alloc(c.size);
    c.rows = device_alloc(tokens * 4ull);
    c.host = malloc(c.size);
    c.found = malloc(c.size);
    c.host_rows = malloc(tokens * sizeof *c.host_rows);
    memset(c.host, 0xee, c.size);
    clear_cache(&c);
    for (uint32_t i = 0; i < tokens; i++) /* whole pages of 8 tokens from last to first, then what is left */
        c.host_rows[i] = i < tokens / 8 * 8 ? (tokens / 8 - 1 - i / 8) * 8 + i % 8 : i;
    device_copy(c.rows, c.host_rows, tokens * sizeof *c.host_rows);
    c.views = malloc(c.planes * sizeof *c.views);
    c.host_views = malloc(c.planes * sizeof *c.host_views);
    for (uint32_t i = 0; i < c.planes; i++) {
        uint64_t at = c.plane_size * i + SENTINEL;
        c.views[i] = make_view(&c, &p[i], c.there + at, paged ? c.rows : NULL);
        c.host_views[i] = make_view(&c, &p[i], c.host + at, paged ? c.host_rows : NULL);
    }
    return c;
}

void free_cache(cache *c)
{
    device_free(c->there);
    device_free(c->rows);
    free(c->host);
    free(c->found);
    free(c->host_rows);
    free(c->views);
    free(c->host_views);
}
