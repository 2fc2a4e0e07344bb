#include "support.h"

#include "engine_file.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- Memory output --- */

static xkv_status memory_write(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    memory *m = user;

    (void)ctx;
    if (++m->writes == m->fail_at)
        return XKV_ERROR_IO;
    if (offset + size > m->size) {
        m->data = realloc(m->data, offset + size);
        assert_non_null(m->data);
        memset(m->data + m->size, 0, offset + size - m->size);
        m->size = offset + size;
    }
    if (size > 0)
        memcpy(m->data + offset, src, size);
    return XKV_OK;
}

xkv_output memory_output(memory *m)
{
    xkv_output o = {m, memory_write};

    return o;
}

void memory_free(memory *m)
{
    free(m->data);
    memset(m, 0, sizeof *m);
}

/* --- Numbers --- */

uint64_t test_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double test_uniform(uint64_t *state)
{
    return (double)(test_random(state) >> 11) / 9007199254740992.0;
}

double test_normal(uint64_t *state)
{
    double u = 1 - test_uniform(state), v = test_uniform(state);

    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

double test_from_half(uint16_t h)
{
    int e = h >> 10 & 31, m = h & 1023;
    double s = h >> 15 ? -1 : 1;

    if (e == 31)
        return m ? (double)NAN : s * (double)INFINITY;
    return s * (e ? ldexp(1024 + m, e - 25) : ldexp(m, -24));
}

double test_from_bf16(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float f;

    memcpy(&f, &u, 4);
    return (double)f;
}

/* Nearest value of a grid of `bits` significant bits and smallest exponent `low`, ties to even (the rounding mode of
 * nearbyint). */
static double round_to_grid(double x, int bits, int low)
{
    int e;
    double unit;

    (void)frexp(x, &e);
    unit = ldexp(1, (e - bits > low ? e - bits : low));
    return nearbyint(x / unit) * unit;
}

uint16_t test_to_half(double x)
{
    double a = fmin(round_to_grid(fabs(x), 11, -24), 65504);
    uint16_t s = signbit(x) ? 0x8000 : 0;
    int e;

    if (a < ldexp(1, -14))
        return (uint16_t)(s | (uint16_t)ldexp(a, 24));
    (void)frexp(a, &e);
    return (uint16_t)(s | (uint16_t)(e + 14) << 10 | ((uint16_t)ldexp(a, 11 - e) & 1023));
}

uint16_t test_to_bf16(double x)
{
    float f = (float)round_to_grid(x, 8, -133);
    uint32_t u;

    memcpy(&u, &f, 4);
    return (uint16_t)(u >> 16);
}

/* --- Synthetic caches --- */

void test_quantize(uint32_t dtype, const float *x, uint8_t *block)
{
    float most = 0, d, v[32];
    uint16_t h;

    for (int i = 0; i < 32; i++)
        if (fabsf(x[i]) > fabsf(most))
            most = x[i];
    d = dtype == XKV_Q8_0 ? fabsf(most) / 127 : most / -8;
    h = test_to_half((double)d);
    memcpy(block, &h, 2);
    for (int i = 0; i < 32; i++)
        v[i] = x[i] * (d != 0 ? 1 / d : 0);
    for (int i = 0; i < 32 && dtype == XKV_Q8_0; i++)
        block[2 + i] = (uint8_t)lroundf(v[i]);
    for (int i = 0; i < 16 && dtype == XKV_Q4_0; i++)
        block[2 + i] = (uint8_t)(fminf(floorf(v[i] + 8.5f), 15) + 16 * fminf(floorf(v[i + 16] + 8.5f), 15));
}

double test_from_block(uint32_t dtype, const uint8_t *block, uint32_t i)
{
    double d = test_from_half((uint16_t)(block[0] | block[1] << 8));

    if (dtype == XKV_Q8_0)
        return d * (block[2 + i] < 128 ? block[2 + i] : block[2 + i] - 256);
    return d * ((i < 16 ? block[2 + i] & 15 : block[2 + i - 16] >> 4) - 8);
}

static void store_row(uint8_t *p, uint32_t dtype, const double *x, uint32_t width)
{
    size_t size = xkv_dtype_size(dtype);

    for (uint32_t i = 0; i < width; i += xkv_dtype_block(dtype), p += size) {
        float f[32];
        uint16_t h = dtype == XKV_F16 ? test_to_half(x[i]) : test_to_bf16(x[i]);
        for (uint32_t k = 0; k < xkv_dtype_block(dtype); k++)
            f[k] = (float)x[i + k];
        if (dtype == XKV_F32)
            memcpy(p, f, 4);
        else if (dtype >= XKV_Q8_0)
            test_quantize(dtype, f, p);
        else
            memcpy(p, &h, 2);
    }
}

double element(const synthetic *s, const uint8_t *data, uint32_t plane, uint32_t t, uint32_t i)
{
    const xkv_plane *p = &s->planes[plane];
    uint32_t block = xkv_dtype_block(p->dtype);
    const uint8_t *at = data + ((uint8_t *)s->views[plane].data - s->data) +
                        ((size_t)t * row_width(p) + i) / block * xkv_dtype_size(p->dtype);
    float f;
    uint16_t h;

    if (block > 1)
        return test_from_block(p->dtype, at, i % block);
    memcpy(&h, at, 2);
    if (p->dtype == XKV_F16)
        return test_from_half(h);
    if (p->dtype == XKV_BF16)
        return test_from_bf16(h);
    memcpy(&f, at, 4);
    return (double)f;
}

xkv_view *views_into(const synthetic *s, uint8_t *data)
{
    xkv_view *views = malloc((s->geometry.plane_count + 1) * sizeof *views);

    assert_non_null(views);
    for (uint32_t i = 0; i < s->geometry.plane_count; i++) {
        views[i] = s->views[i];
        views[i].data = data + ((uint8_t *)s->views[i].data - s->data);
    }
    return views;
}

static void make_planes(synthetic *s, const synthetic_options *o)
{
    uint32_t width = o->heads * o->head_dim, head_dim = o->head_dim % xkv_dtype_block(o->dtype) ? width : o->head_dim;
    size_t row = (size_t)xkv_dtype_bytes(o->dtype, width), plane_size = o->tokens * row, offset = 0;

    s->size = plane_size * o->layers * 2;
    s->data = calloc(1, s->size + 1);
    s->planes = calloc(o->layers * 2, sizeof *s->planes);
    s->views = calloc(o->layers * 2, sizeof *s->views);
    for (uint32_t i = 0; i < o->layers * 2; i++) {
        uint32_t kind = (o->mla ? XKV_PLANE_LATENT : XKV_PLANE_K) + i % 2;
        s->planes[i] = (xkv_plane){i / 2, kind, o->dtype, o->heads, o->head_dim, XKV_NO_ROPE};
        if (o->rope && kind == XKV_PLANE_K)
            s->planes[i].rope = 0;
        s->views[i] = (xkv_view){s->data + offset,
                                 (int64_t)row,
                                 (int64_t)xkv_dtype_bytes(o->dtype, head_dim),
                                 (int64_t)xkv_dtype_size(o->dtype),
                                 NULL,
                                 .dtype = o->dtype,
                                 .head_dim = head_dim == o->head_dim ? 0 : head_dim};
        offset += plane_size;
    }
}

/* Half-split pairs, base 10000. */
static void make_rope(synthetic *s, const synthetic_options *o)
{
    s->ropes = calloc(1, sizeof *s->ropes);
    s->ropes->n_rot = o->head_dim;
    s->ropes->style = XKV_ROPE_HALF_SPLIT;
    s->ropes->scale = 1;
    for (uint32_t i = 0; i < o->head_dim / 2; i++)
        s->ropes->inv_freq[i] = pow(10000, -2.0 * i / o->head_dim);
}

/* Rotate (sign 1) or un-rotate (-1) the heads of a row. */
static void turn(const synthetic *s, const xkv_plane *p, int32_t position, int sign, double *row)
{
    const xkv_rope *r = s->ropes;

    for (uint32_t h = 0; p->rope != XKV_NO_ROPE && h < p->heads; h++)
        for (uint32_t i = 0; i < r->n_rot / 2; i++) {
            double *a = row + h * p->head_dim + i, *b = a + r->n_rot / 2, t = sign * position * r->inv_freq[i];
            double x = *a * cos(t) - *b * sin(t), y = *a * sin(t) + *b * cos(t);
            *a = x;
            *b = y;
        }
}

/* What all rows of a plane are made of: [rank] directions, then the mean. */
static double *make_directions(const synthetic_options *o, uint32_t plane, uint32_t width)
{
    double *directions = calloc((o->rank + 1) * (size_t)width, sizeof *directions), *out = directions;

    for (uint32_t j = 0; j < o->rank; j++) {
        uint64_t direction = 77 + plane * 65537ull + j * 4099ull;
        for (uint32_t i = 0; i < width; i++)
            *out++ = test_normal(&direction);
    }
    for (uint32_t i = 0; i < width && o->mean != 0; i++) {
        uint64_t constant = 501 + plane * 9176867ull + i;
        *out++ = o->mean * test_normal(&constant);
    }
    return directions;
}

/* Row t of a plane: its directions with coefficients that all planes of the group share, plus noise. Both come from
 * generators seeded by what they belong to, so that rows can be made in any order. */
static void make_row(const synthetic *s, const synthetic_options *o, const double *directions, uint32_t plane,
                     uint32_t t, double *row)
{
    const xkv_plane *p = &s->planes[plane];
    uint32_t width = row_width(p), group = o->group_layers ? p->layer / o->group_layers : p->layer;
    uint64_t token = 1000003ull * (group * 4 + p->kind) + 7919ull * t + 1 + (o->seed << 32),
             noise = 31 + plane * 1000003ull + t + (o->seed << 33);

    memset(row, 0, width * sizeof *row);
    for (uint32_t j = 0; j < o->rank; j++) {
        double a = test_normal(&token) / (1 + j);
        for (uint32_t i = 0; i < width; i++)
            row[i] += a * *directions++;
    }
    for (uint32_t i = 0; i < width; i++)
        row[i] += *directions++;
    for (uint32_t i = 0; i < width; i++)
        row[i] += (o->rank ? o->noise : 1) * test_normal(&noise);
}

synthetic make_synthetic(const synthetic_options *o)
{
    synthetic s = {0};
    uint32_t width = o->heads * o->head_dim;
    double *row = calloc(width, sizeof *row);

    make_planes(&s, o);
    make_rope(&s, o);
    s.positions = calloc(o->tokens + 1, sizeof *s.positions);
    for (uint32_t t = 0; t < o->tokens; t++)
        s.positions[t] = o->first_position + (int32_t)t;
    for (uint32_t p = 0; p < o->layers * 2; p++) {
        double *directions = make_directions(o, p, width);
        for (uint32_t t = 0; t < o->tokens; t++) {
            make_row(&s, o, directions, p, t, row);
            turn(&s, &s.planes[p], s.positions[t], 1, row);
            store_row((uint8_t *)s.views[p].data + t * (size_t)s.views[p].token_stride, o->dtype, row, width);
        }
        free(directions);
    }
    s.geometry = (xkv_geometry){.layer_count = o->layers,
                                .plane_count = o->layers * 2,
                                .rope_count = 1,
                                .token_count = o->tokens,
                                .planes = s.planes,
                                .ropes = s.ropes,
                                .positions = s.positions};
    free(row);
    return s;
}

void free_synthetic(synthetic *s)
{
    free(s->planes);
    free(s->ropes);
    free(s->positions);
    free(s->views);
    free(s->data);
}

uint32_t row_width(const xkv_plane *p)
{
    return p->heads * p->head_dim;
}

void plane_row(const synthetic *s, const uint8_t *data, uint32_t plane, uint32_t t, double *row)
{
    const xkv_plane *p = &s->planes[plane];

    for (uint32_t i = 0; i < row_width(p); i++)
        row[i] = element(s, data, plane, t, i);
    turn(s, p, s->positions[t], -1, row);
}

void moved_row(const synthetic *s, const uint8_t *data, uint32_t plane, uint32_t t, int32_t position, double *row)
{
    plane_row(s, data, plane, t, row);
    turn(s, &s->planes[plane], position, 1, row);
}

/* --- Packing --- */

xkv_ctx *new_ctx(uint32_t threads)
{
    xkv_ctx_options o = xkv_ctx_options_default();
    xkv_ctx *ctx = NULL;

    o.threads = threads;
    assert_int_equal(xkv_ctx_create(&o, &ctx), XKV_OK);
    return ctx;
}

packed pack_planes(xkv_ctx *ctx, const synthetic *s, const xkv_pack_options *o)
{
    packed p = {{0}, {0}, {0}, NULL};
    xkv_output output = memory_output(&p.m);
    xkv_entry_info info;

    /* The memory moves: the output must point to the final place. */
    memory *m = calloc(1, sizeof *m);
    output.user = m;
    assert_ok(ctx, xkv_pack(ctx, &s->geometry, s->views, NULL, NULL, 0, o, &output, &p.report));
    p.m = *m;
    free(m);
    assert_int_equal(p.m.size, p.report.entry_bytes);
    p.input = xkv_input_from_memory(p.m.data, p.m.size);
    assert_ok(ctx, xkv_entry_open(ctx, &p.input, &p.entry));
    xkv_entry_get_info(p.entry, &info);
    if (info.needs_dict)
        assert_ok(ctx, xkv_entry_attach(ctx, p.entry, o->dict));
    return p;
}

void free_packed(xkv_ctx *ctx, packed *p)
{
    xkv_entry_close(ctx, p->entry);
    memory_free(&p->m);
}

uint8_t *restore(xkv_ctx *ctx, const synthetic *s, const xkv_entry *entry)
{
    uint8_t *data = malloc(s->size + 1);
    xkv_view *views = views_into(s, data);

    memset(data, 0x5a, s->size + 1);
    assert_ok(ctx, xkv_entry_read(ctx, entry, NULL, views));
    free(views);
    return data;
}

xkv_status train_on(xkv_ctx *ctx, const synthetic *const *list, uint32_t count, const xkv_train_options *o, memory *m)
{
    xkv_output output = memory_output(m);
    xkv_cache caches[8];
    const xkv_cache *pointers[8];

    for (uint32_t i = 0; i < count; i++) {
        caches[i] = (xkv_cache){.geometry = list[i]->geometry, .views = list[i]->views};
        pointers[i] = &caches[i];
    }
    return xkv_train(ctx, pointers, count, o, &output);
}

/* --- Damage --- */

xkv_status open_entry(xkv_ctx *ctx, const xkv_dict *dict, const uint8_t *data, size_t size)
{
    xkv_input input = xkv_input_from_memory(data, size);
    xkv_entry *entry = NULL;
    xkv_status status = xkv_entry_open(ctx, &input, &entry);

    if (status == XKV_OK && dict)
        status = xkv_entry_attach(ctx, entry, dict);
    if (status == XKV_OK)
        status = xkv_entry_verify(ctx, entry, NULL, NULL);
    xkv_entry_close(ctx, entry);
    return status;
}

void assert_damage_is_found(xkv_ctx *ctx, const memory *m, open_fn open, const xkv_dict *dict)
{
    static const uint8_t masks[] = {0x01, 0x80, 0xff};
    uint8_t *copy = malloc(m->size);

    memcpy(copy, m->data, m->size);
    assert_ok(ctx, open(ctx, dict, copy, m->size));
    for (size_t i = 0; i < m->size; i++)
        for (size_t k = 0; k < sizeof masks; k++) {
            copy[i] ^= masks[k];
            if (open(ctx, dict, copy, m->size) == XKV_OK)
                fail_msg("byte %zu, mask %02x", i, masks[k]);
            copy[i] ^= masks[k];
        }
    free(copy);
    for (size_t size = 0; size < m->size; size++) {
        uint8_t *cut = malloc(size ? size : 1); /* of that size, so that a sanitizer sees reads behind the end */
        memcpy(cut, m->data, size);
        if (open(ctx, dict, cut, size) == XKV_OK)
            fail_msg("cut to %zu bytes", size);
        free(cut);
    }
}
