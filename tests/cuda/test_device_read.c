/* Restoring into a device's memory, on the emulated device, or with XKV_GPU_PLUGIN on a genuine one: rows against those
 * of xkv_entry_read(), within what spec/codec.md, section 3 allows two decoders, whatever the codec, range, layout,
 * positions and memory; failures of any call; damage. Streams run only when somebody waits, so that what is overwritten
 * too early shows. */
#include "device_support.h"

#include "device_read.h"

#include <math.h>
#include <stdio.h>
#include <xxhash.h>

/* --- Samples ------------------------------------------------------------------------------------------------------ */

/* A cache, packed one way, with its dictionary. */
typedef struct subject {
    synthetic s;
    memory trained;
    xkv_dict *dict;
    packed p;
} subject;

static void train(xkv_ctx *ctx, subject *t, uint32_t cross)
{
    t->dict = train_dict(ctx, &t->s, cross, &t->trained);
}

static subject make_subject(xkv_ctx *ctx, uint32_t tokens, uint32_t dtype, uint32_t profile, double quality,
                            uint32_t cross)
{
    subject t = {.s = sample(tokens, dtype, 1)};
    xkv_pack_options o = xkv_pack_options_default();

    o.profile = profile;
    o.group_layers = 2;
    o.chunk_tokens = 32;
    o.window = 3;
    if (profile == XKV_PROFILE_DICT) {
        train(ctx, &t, cross);
        o.dict = t.dict;
        o.quality = quality;
    } else if (profile == XKV_PROFILE_SVD && quality < 0) {
        o.rank_k = o.rank_v = 9;
    } else if (profile != XKV_PROFILE_LOSSLESS) {
        o.error = quality;
    }
    t.p = pack_planes(ctx, &t.s, &o);
    return t;
}

static void free_subject(xkv_ctx *ctx, subject *t)
{
    free_packed(ctx, &t->p);
    xkv_dict_close(ctx, t->dict);
    memory_free(&t->trained);
    free_synthetic(&t->s);
}

static bool has_codec(const subject *t, uint32_t codec)
{
    for (uint32_t i = 0; i < t->p.entry->c.group_count; i++)
        if (t->p.entry->c.groups[i].codec == codec)
            return true;
    return false;
}

/* --- Comparing --- */

static double value_at(const cache *c, const uint8_t *p)
{
    float f;
    uint16_t h;

    if (c->dtype == XKV_F32) {
        memcpy(&f, p, 4);
        return (double)f;
    }
    memcpy(&h, p, 2);
    return c->dtype == XKV_F16 ? test_from_half(h) : test_from_bf16(h);
}

/* A unit in the last place of x. */
static double ulp(const cache *c, double x)
{
    int digits = c->dtype == XKV_F32 ? 24 : c->dtype == XKV_F16 ? 11 : 8, exponent;

    (void)frexp(x, &exponent);
    return exp2(fmax(exponent, c->dtype == XKV_F16 ? -13 : -125) - digits);
}

static void compare_row(const cache *c, const xkv_plane *p, uint32_t plane, uint32_t t, double share)
{
    const xkv_view *host_view = &c->host_views[plane];
    const uint8_t *expected = host_view->data, *found = c->found + (expected - c->host);
    int64_t row = host_view->rows ? host_view->rows[t] : t;
    double most = 0;

    for (int pass = 0; pass < 2; pass++)
        for (int64_t h = 0; h < p->heads; h++)
            for (int64_t d = 0; d < p->head_dim; d++) {
                int64_t at = row * host_view->token_stride + h * host_view->head_stride + d * host_view->dim_stride;
                double x = value_at(c, found + at);
                double y = value_at(c, expected + at);
                double allowed = fmax(c->dtype == XKV_F32 ? 0 : ulp(c, y), most * share);
                if (pass == 0)
                    most = fmax(most, fabs(y));
                else if (!(fabs(x - y) <= allowed))
                    fail_msg("plane %u, token %u, head %d, dim %d: %.9g, the CPU has %.9g", plane, t, (int)h, (int)d, x,
                             y);
            }
}

/* Rows agree, but for a share of their largest element, and all other bytes are as they were. */
static void compare_within(const subject *s, const cache *c, uint32_t tokens, double share)
{
    uint64_t differ = 0;

    device_copy(c->found, c->there, c->size);
    for (uint32_t i = 0; i < c->planes; i++)
        for (uint32_t t = 0; t < tokens; t++)
            compare_row(c, &s->s.planes[i], i, t, share);
    for (uint32_t i = 0; i < c->planes; i++)
        differ += memcmp(c->found + c->plane_size * i, c->host + c->plane_size * i, SENTINEL) != 0;
    differ += memcmp(c->found + c->size - SENTINEL, c->host + c->size - SENTINEL, SENTINEL) != 0;
    assert_int_equal(differ, 0);
}

/* As two decoders must. */
static void compare(const subject *s, const cache *c, uint32_t tokens)
{
    compare_within(s, c, tokens, exp2(-16));
}

/* --- Reading ------------------------------------------------------------------------------------------------------ */

static void check_read(xkv_ctx *ctx, const subject *t, const xkv_read_options *o, const xkv_device_target *target,
                       uint32_t dtype, layout l, bool paged)
{
    uint32_t all = t->s.geometry.token_count, tokens = o && o->token_count ? o->token_count : all;
    cache c;

    if (o && !o->token_count)
        tokens = all - o->first_token;
    c = make_cache(&t->s, all, dtype, l, paged);
    assert_ok(ctx, xkv_entry_read(ctx, t->p.entry, o, c.host_views));
    assert_ok(ctx, xkv_device_read(ctx, device, t->p.entry, o, target, c.views));
    compare(t, &c, tokens);
    free_cache(&c);
}

/* All layouts, some ranges, some groups. */
static void check_all(xkv_ctx *ctx, const subject *t)
{
    static const uint32_t ranges[][2] = {{0, 0}, {0, 1}, {0, 33}, {5, 60}, {64, 32}, {97, 0}, {31, 2}, {3, 100}};
    xkv_read_options o = xkv_read_options_default();

    for (int l = 0; l < LAYOUTS; l++)
        for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++)
            check_read(ctx, t, NULL, NULL, dtype, (layout)l, (l + (int)dtype) % 2);
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        o.first_token = ranges[i][0];
        o.token_count = ranges[i][1];
        check_read(ctx, t, &o, NULL, XKV_BF16, TOKEN_MAJOR, i % 2);
    }
    o.first_group = t->p.entry->c.group_count - 1;
    check_read(ctx, t, &o, NULL, XKV_F16, TOKEN_MAJOR, false);
}

/* Some heads: the same bits as in the whole, and nothing else is written. */
static void check_heads(xkv_ctx *ctx, const subject *t, uint32_t first_head, uint32_t heads, const int32_t *positions)
{
    const xkv_plane *p = t->s.geometry.planes;
    uint32_t tokens = t->s.geometry.token_count, dtype = p->dtype;
    size_t head = p->head_dim * xkv_dtype_size(dtype);
    cache whole = make_cache(&t->s, tokens, dtype, TOKEN_MAJOR, true);
    cache part = make_cache(&t->s, tokens, dtype, TOKEN_MAJOR, true);
    xkv_read_options o = xkv_read_options_default();
    uint64_t least, best;

    o.positions = positions;
    assert_ok(ctx, xkv_device_read(ctx, device, t->p.entry, &o, NULL, whole.views));
    o.first_head = first_head;
    o.head_count = heads;
    assert_ok(ctx, xkv_device_read_size(ctx, device, t->p.entry, &o, &least, &best));
    assert_ok(ctx, xkv_device_read(ctx, device, t->p.entry, &o, NULL, part.views));
    device_copy(whole.found, whole.there, whole.size);
    device_copy(part.found, part.there, part.size);
    heads = heads ? heads : p->heads - first_head;
    for (uint32_t i = 0; i < whole.planes; i++)
        for (uint32_t k = 0; k < tokens; k++) {
            size_t at = (size_t)((uint8_t *)whole.views[i].data - whole.there) + k * p->heads * head;
            uint8_t *from = whole.found + at, *to = part.found + at;
            assert_memory_equal(from + first_head * head, to, heads * head);
            for (size_t b = heads * head; b < p->heads * head; b++)
                assert_int_equal(to[b], 0xee);
        }
    free_cache(&whole);
    free_cache(&part);
}

typedef struct kind {
    const char *name;
    uint32_t profile, cross, codec;
    double quality;
} kind;

static const kind kinds[] = {
    {"dict", XKV_PROFILE_DICT, 0, XKV_GROUP_DICT, 60},
    {"dict, cross stage", XKV_PROFILE_DICT, 6, XKV_GROUP_CROSS, 60},
    {"dict, fine", XKV_PROFILE_DICT, 0, XKV_GROUP_DICT, 100},
    {"dict, fine, cross stage", XKV_PROFILE_DICT, 6, XKV_GROUP_CROSS, 100},
    {"svd, 16 bits", XKV_PROFILE_SVD, 0, XKV_GROUP_SVD, -1},
    {"svdq", XKV_PROFILE_SVD, 0, XKV_GROUP_SVDQ, 0.2},
    {"scalar", XKV_PROFILE_SCALAR, 0, XKV_GROUP_SCALAR, 0.1},
    {"lossless", XKV_PROFILE_LOSSLESS, 0, XKV_GROUP_LOSSLESS, 0},
};
#define KINDS (sizeof kinds / sizeof *kinds)

static void test_codecs(void **state)
{
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (size_t i = 0; i < 2 * KINDS; i++) {
        const kind *k = &kinds[i / 2];
        head_dim = i % 2 ? 20 : 16;
        subject t = make_subject(ctx, 131, XKV_BF16, k->profile, k->quality, k->cross);
        uint64_t before = control ? control->fused : 0;
        bool integers = k->codec == XKV_GROUP_DICT || k->codec == XKV_GROUP_CROSS || k->codec == XKV_GROUP_SVDQ;
        if (!has_codec(&t, k->codec))
            fail_msg("%s: not packed like this", k->name);
        check_all(ctx, &t);
        assert_true(!control || (control->fused > before) == (integers && head_dim == 16));
        free_subject(ctx, &t);
    }
    head_dim = 16;
    assert_int_equal(warnings_logged + errors_logged, 0);
    xkv_ctx_free(ctx);
}

/* Caches that the engine holds in blocks, restored into plain elements. */
static void test_blocks(void **state)
{
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (size_t i = 0; i < KINDS; i += 3) {
        subject t = make_subject(ctx, 67, XKV_Q8_0, kinds[i].profile, kinds[i].quality, kinds[i].cross);
        for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++)
            check_read(ctx, &t, NULL, NULL, dtype, TOKEN_MAJOR, true);
        free_subject(ctx, &t);
    }
    subject lossless = make_subject(ctx, 67, XKV_Q4_0, XKV_PROFILE_LOSSLESS, 0, 0);
    check_read(ctx, &lossless, NULL, NULL, XKV_F16, HEAD_MAJOR, true);
    free_subject(ctx, &lossless);
    xkv_ctx_free(ctx);
}

/* All planes in blocks, or in f32, dense [planes][tokens][width]; read, or restored from what is held. */
static uint8_t *read_dense(xkv_ctx *ctx, const subject *t, const xkv_device_attention *held, uint32_t dtype,
                           size_t *size)
{
    const xkv_plane *p = t->s.geometry.planes;
    uint32_t planes = t->s.geometry.plane_count, tokens = t->s.geometry.token_count, width = row_width(p);
    size_t row = (size_t)xkv_dtype_bytes(dtype, width);
    xkv_view *views = calloc(planes, sizeof *views);
    uint8_t *there, *data;

    *size = planes * tokens * row;
    data = malloc(*size);
    there = device_alloc(*size);
    for (uint32_t i = 0; i < planes; i++)
        views[i] = (xkv_view){.data = there + i * tokens * row,
                              .token_stride = (int64_t)row,
                              .head_stride = (int64_t)row,
                              .dim_stride = (int64_t)xkv_dtype_size(dtype),
                              .dtype = dtype,
                              .head_dim = width};
    if (held)
        assert_ok(ctx, xkv_device_attention_restore(ctx, held, NULL, views));
    else
        assert_ok(ctx, xkv_device_read(ctx, device, t->p.entry, NULL, NULL, views));
    device_copy(data, there, *size);
    device_free(there);
    free(views);
    return data;
}

/* The blocks are those that the CPU makes of the same rows, rounded to the plane's 16 bits first. */
static void check_blocks(xkv_ctx *ctx, const subject *t, uint32_t dtype)
{
    const xkv_kernels *k = xkv_kernels_cpu();
    size_t rows_size, size, n;
    uint8_t *rows = read_dense(ctx, t, NULL, XKV_F32, &rows_size), *blocks = read_dense(ctx, t, NULL, dtype, &size);
    uint8_t *expected = malloc(size), *bits = malloc(rows_size);
    float *x = (float *)(void *)rows;

    n = rows_size / sizeof *x;
    if (t->s.geometry.planes->dtype != XKV_F32) {
        k->from_f32(t->s.geometry.planes->dtype, x, bits, n);
        k->to_f32(t->s.geometry.planes->dtype, bits, x, n);
    }
    k->from_f32(dtype, x, expected, n);
    assert_memory_equal(blocks, expected, size);
    free(rows);
    free(blocks);
    free(expected);
    free(bits);
}

/* Into a quantized cache, with blocks that reach over heads, and with such that do not. */
static void test_into_blocks(void **state)
{
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (head_dim = 16; head_dim <= 32; head_dim += 16)
        for (size_t i = 0; i < KINDS; i++) {
            subject t = make_subject(ctx, 67,
                                     i % 3 == 2   ? XKV_F32
                                     : i % 3 == 1 ? XKV_F16
                                                  : XKV_BF16,
                                     kinds[i].profile, kinds[i].quality, kinds[i].cross);
            check_blocks(ctx, &t, XKV_Q8_0);
            check_blocks(ctx, &t, XKV_Q4_0);
            free_subject(ctx, &t);
        }
    head_dim = 16;
    xkv_ctx_free(ctx);
}

/* Tokens around those of chunks and rounds. */
static void test_lengths(void **state)
{
    static const uint32_t lengths[] = {8, 31, 32, 33, 35, 36, 39, 63, 64, 65, 67, 68, 300};
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        subject t = make_subject(ctx, lengths[i], XKV_F16, XKV_PROFILE_DICT, 60, i % 2 ? 4 : 0);
        check_read(ctx, &t, NULL, NULL, XKV_F16, TOKEN_MAJOR, true);
        free_subject(ctx, &t);
    }
    xkv_ctx_free(ctx);
}

static void test_positions(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    xkv_read_options o = xkv_read_options_default();
    int32_t positions[90];

    (void)state;
    for (int32_t i = 0; i < 90; i++)
        positions[i] = 1000 + 7 * i;
    o.positions = positions;
    o.first_token = 2;
    o.token_count = 90;
    for (size_t i = 0; i < KINDS; i++) {
        subject t = make_subject(ctx, 131, XKV_BF16, kinds[i].profile, kinds[i].quality, kinds[i].cross);
        check_read(ctx, &t, &o, NULL, XKV_BF16, TOKEN_MAJOR, true);
        free_subject(ctx, &t);
    }
    xkv_ctx_free(ctx);
}

static void test_heads(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    int32_t positions[131];

    (void)state;
    for (int32_t i = 0; i < 131; i++)
        positions[i] = 500 + 3 * i;
    for (size_t i = 0; i < KINDS; i++) {
        subject t = make_subject(ctx, 131, XKV_BF16, kinds[i].profile, kinds[i].quality, kinds[i].cross);
        for (uint32_t first = 0; first < 2; first++) {
            check_heads(ctx, &t, first, 1, NULL);
            check_heads(ctx, &t, first, 0, positions);
        }
        free_subject(ctx, &t);
    }
    xkv_ctx_free(ctx);
}

/* Integers beyond 2048 where the table does not promise them: the group is done again in f32. */
static void test_wide(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = {.s = sample(131, XKV_F32, 0)};
    xkv_pack_options o = xkv_pack_options_default();
    float *row = (float *)(void *)t.s.data;
    uint64_t before;

    (void)state;
    train(ctx, &t, 0);
    for (uint32_t i = 0; i < row_width(t.s.planes); i++)
        row[70 * row_width(t.s.planes) + i] = 2e3f;
    o.profile = XKV_PROFILE_DICT;
    o.dict = t.dict;
    o.quality = 40;
    o.chunk_tokens = 32;
    o.sinks = 4;
    t.p = pack_planes(ctx, &t.s, &o);
    assert_true(has_codec(&t, XKV_GROUP_DICT));
    before = control ? control->exact_products : 0;
    check_read(ctx, &t, NULL, NULL, XKV_F32, TOKEN_MAJOR, false);
    assert_true(!control || control->exact_products > before);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* Tokens [first, end) of a cache, packed alone. */
static packed pack_part(xkv_ctx *ctx, const synthetic *s, uint32_t first, uint32_t end, const xkv_pack_options *o)
{
    synthetic part = *s;
    xkv_view views[6];
    packed p;

    assert_true(s->geometry.plane_count == 6);
    xkv_views_from(s->views, 6, first, views);
    part.views = views;
    part.geometry.positions += first;
    part.geometry.token_count = end - first;
    p = pack_planes(ctx, &part, o);
    return p;
}

/* An entry that extends another of another codec, and of another dictionary. */
static void test_extended(void **state)
{
    static const uint32_t ranges[][2] = {{0, 0}, {0, 40}, {10, 80}, {70, 0}, {63, 2}};
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (int parent_kind = 0; parent_kind < 3; parent_kind++) {
        subject t = {.s = sample(131, XKV_BF16, 1)}, other = {.s = t.s};
        xkv_device_target target = xkv_device_target_default();
        xkv_read_options o = xkv_read_options_default();
        xkv_device_dict *dict = NULL;
        uint64_t least, best;
        train(ctx, &t, 6);
        train(ctx, &other, 0);
        xkv_pack_options own = xkv_pack_options_default();
        own.profile = XKV_PROFILE_DICT;
        own.dict = t.dict;
        own.quality = 60;
        own.chunk_tokens = 32;
        xkv_pack_options parents = own;
        parents.dict = parent_kind == 0 ? t.dict : other.dict;
        if (parent_kind == 2) {
            parents.profile = XKV_PROFILE_LOSSLESS;
            parents.quality = 0;
            parents.dict = NULL;
        }
        packed parent = pack_part(ctx, &t.s, 0, 70, &parents);
        t.p = pack_part(ctx, &t.s, 64, 131, &own);
        assert_ok(ctx, xkv_entry_extend(ctx, t.p.entry, parent.entry, 64, NULL, 0));
        assert_ok(ctx, xkv_device_dict_create(ctx, device, t.dict, &dict));
        target.dict = dict;
        for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
            o.first_token = ranges[i][0];
            o.token_count = ranges[i][1];
            check_read(ctx, &t, &o, i % 2 ? &target : NULL, XKV_BF16, TOKEN_MAJOR, i > 2);
        }
        assert_ok(ctx, xkv_device_read_size(ctx, device, t.p.entry, NULL, &least, &best));
        assert_true(least > 0 && best >= least);
        xkv_device_dict_free(ctx, dict);
        free_packed(ctx, &t.p);
        free_packed(ctx, &parent);
        xkv_dict_close(ctx, other.dict);
        memory_free(&other.trained);
        t.p = (packed){{0}, {0}, {0}, NULL};
        free_subject(ctx, &t);
    }
    xkv_ctx_free(ctx);
}

/* --- Graphs ------------------------------------------------------------------------------------------------------- */

static const xkv_plugin *real;

#define WATCHED(name)                                                                                                  \
    static xkv_status watch_##name(xkv_plug_device *d, const xkv_plug_##name *o, void *stream)                         \
    {                                                                                                                  \
        control->capturing = 1;                                                                                        \
        xkv_status status = real->name(d, o, stream);                                                                  \
        control->capturing = 0;                                                                                        \
        return status;                                                                                                 \
    }
WATCHED(decode)
WATCHED(expand)
WATCHED(split)
WATCHED(spread)
WATCHED(gemm)
WATCHED(angles)
WATCHED(store)
WATCHED(move)
WATCHED(join)
WATCHED(fused)

/* Operations allocate nothing and wait for nothing, so that a graph can take them up: the runtime ends the program. */
static void test_operations_can_be_captured(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    real = device->api;
    xkv_plugin watched = *real;

    (void)state;
    watched.decode = watch_decode;
    watched.expand = watch_expand;
    watched.split = watch_split;
    watched.spread = watch_spread;
    watched.gemm = watch_gemm;
    watched.angles = watch_angles;
    watched.store = watch_store;
    watched.move = watch_move;
    watched.join = watch_join;
    watched.fused = watch_fused;
    device->api = &watched;
    for (size_t i = 0; i < 2 * KINDS; i++) {
        head_dim = i % 2 ? 20 : 16;
        subject t = make_subject(ctx, 70, XKV_BF16, kinds[i / 2].profile, kinds[i / 2].quality, kinds[i / 2].cross);
        check_read(ctx, &t, NULL, NULL, XKV_BF16, TOKEN_MAJOR, true);
        free_subject(ctx, &t);
    }
    head_dim = 16;
    device->api = real;
    xkv_ctx_free(ctx);
}

/* --- Restores that are repeated --- */

/* The pages of a cache elsewhere: rows from first to last. */
static void turn_pages(cache *c)
{
    for (uint32_t t = 0; t < c->tokens; t++)
        c->host_rows[t] = c->tokens - 1 - c->host_rows[t];
    device_copy(c->rows, c->host_rows, c->tokens * sizeof *c->host_rows);
    memset(c->host, 0xee, c->size);
    clear_cache(c);
}

/* Put the restore on a stream as a graph would, and compare. */
static void check_run(xkv_ctx *ctx, const subject *t, const xkv_read_options *o, xkv_device_replay *replay, cache *c,
                      uint32_t tokens)
{
    void *stream;

    assert_true(device->api->stream_create(device->plug, &stream) == XKV_OK);
    assert_ok(ctx, xkv_entry_read(ctx, t->p.entry, o, c->host_views));
    clear_cache(c);
    if (control)
        control->capturing = 1;
    assert_ok(ctx, xkv_device_replay_run(ctx, replay, stream));
    if (control)
        control->capturing = 0;
    assert_true(device->api->record(device->plug, device->begun, stream) == XKV_OK);
    assert_true(device->api->wait(device->plug, device->begun) == XKV_OK);
    compare(t, c, tokens);
    device->api->stream_destroy(device->plug, stream);
}

static void check_replay(xkv_ctx *ctx, const subject *t, const subject *other, const xkv_read_options *o,
                         uint32_t tokens)
{
    cache c = make_cache(&t->s, t->s.geometry.token_count, XKV_F16, TOKEN_MAJOR, true);
    uint64_t blocks = control ? control->blocks : 0;
    xkv_device_replay *replay = NULL;

    assert_ok(ctx, xkv_device_replay_create(ctx, device, t->p.entry, o, NULL, c.views, &replay));
    assert_true(xkv_device_replay_bytes(replay) > 0);
    assert_ok(ctx, xkv_entry_read(ctx, t->p.entry, o, c.host_views));
    compare(t, &c, tokens);
    check_read(ctx, other, NULL, NULL, XKV_BF16, TOKEN_MAJOR, false); /* what was staged is overwritten */
    check_run(ctx, t, o, replay, &c, tokens);
    turn_pages(&c);
    check_run(ctx, t, o, replay, &c, tokens);
    xkv_device_replay_free(ctx, replay);
    assert_true(!control || control->blocks == blocks);
    free_cache(&c);
}

static void test_replays(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject other = make_subject(ctx, 190, XKV_BF16, XKV_PROFILE_LOSSLESS, 0, 0);
    xkv_read_options some = xkv_read_options_default();

    (void)state;
    some.first_token = 5;
    some.token_count = 60;
    check_read(ctx, &other, NULL, NULL, XKV_BF16, TOKEN_MAJOR, false); /* the device has its tables then */
    for (size_t i = 0; i < 2 * KINDS; i++) {
        head_dim = i % 2 ? 20 : 16;
        subject t = make_subject(ctx, 131, XKV_BF16, kinds[i / 2].profile, kinds[i / 2].quality, kinds[i / 2].cross);
        head_dim = 16;
        check_replay(ctx, &t, &other, NULL, 131);
        check_replay(ctx, &t, &other, &some, 60);
        free_subject(ctx, &t);
    }
    free_subject(ctx, &other);
    xkv_ctx_free(ctx);
}

/* Whichever call of the runtime fails while one is made: nothing stays. */
static void test_replay_failures(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 70, XKV_BF16, XKV_PROFILE_DICT, 60, 6);
    cache c = make_cache(&t.s, 70, XKV_F16, TOKEN_MAJOR, true);
    bool reached = control;
    uint32_t failures = 0;

    (void)state;
    for (uint64_t n = 1; reached; n += 1 + n / 16) {
        uint64_t blocks = control->blocks;
        xkv_device_replay *replay = NULL;
        control->error = n % 2 ? cudaErrorMemoryAllocation : cudaErrorInvalidValue;
        control->fail_at = control->calls + n;
        xkv_status status = xkv_device_replay_create(ctx, device, t.p.entry, NULL, NULL, c.views, &replay);
        reached = control->calls >= control->fail_at;
        control->fail_at = 0;
        failures += status != XKV_OK;
        assert_true(status == XKV_OK || status == XKV_ERROR_MEMORY || status == XKV_ERROR_BACKEND);
        xkv_device_replay_free(ctx, replay);
        assert_true(control->blocks <= blocks + 1); /* giving back may be what failed */
    }
    assert_true(!control || failures > 20);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

static xkv_device_attention *hold(xkv_ctx *ctx, const subject *t, const xkv_read_options *o, uint32_t what)
{
    xkv_attention_options options = xkv_attention_options_default();
    xkv_attention *attention = NULL;
    xkv_device_attention *copy = NULL;

    options.hold = what;
    options.first_token = o->first_token;
    options.token_count = o->token_count;
    options.positions = o->positions;
    assert_ok(ctx, xkv_attention_open(ctx, t->p.entry, &options, &attention));
    assert_ok(ctx, xkv_device_attention_create(ctx, device, attention, NULL, &copy));
    xkv_attention_close(ctx, attention);
    return copy;
}

/* What a graph would take up, put on a stream: kernels, of which there is one for each plane, and nothing else is asked
 * of the runtime. */
static void restore_held(xkv_ctx *ctx, const xkv_device_attention *copy, const cache *c)
{
    uint64_t launches = control ? control->launches : 0, calls = control ? control->calls : 0;

    if (control)
        control->capturing = 1;
    assert_ok(ctx, xkv_device_attention_restore(ctx, copy, NULL, c->views));
    if (control) {
        control->capturing = 0;
        assert_int_equal(control->launches - launches, c->planes);
        assert_true(control->calls - calls <= 4ull * c->planes);
    }
}

/* Into one cache, then into another whose pages lie elsewhere: only the array of rows has changed, as between two
 * launches of a graph. Coefficients that a cross stage adds to are rounded to 16 bits of the largest of a
 * chunk. */
static void check_restore(xkv_ctx *ctx, const subject *t, const xkv_read_options *o, uint32_t what, uint32_t dtype,
                          layout l)
{
    uint32_t all = t->s.geometry.token_count, tokens = o->token_count ? o->token_count : all - o->first_token;
    xkv_device_attention *copy = hold(ctx, t, o, what);
    cache c = make_cache(&t->s, all, dtype, l, true);
    bool rounded = what == XKV_HOLD_COEFFICIENTS && has_codec(t, XKV_GROUP_CROSS);

    for (int launch = 0; launch < 2; launch++) {
        assert_ok(ctx, xkv_entry_read(ctx, t->p.entry, o, c.host_views));
        restore_held(ctx, copy, &c);
        compare_within(t, &c, tokens, rounded ? exp2(-13) : exp2(-16));
        for (uint32_t i = 0; i < all; i++)
            c.host_rows[i] = (c.host_rows[i] + 8) % all;
        device_copy(c.rows, c.host_rows, all * sizeof *c.host_rows);
        clear_cache(&c);
    }
    free_cache(&c);
    xkv_device_attention_free(ctx, copy);
}

/* Coefficients, or rows, that are held there: every codec, layout and dtype, ranges, other positions. */
static void test_held_rows(void **state)
{
    static const uint32_t ranges[][2] = {{0, 0}, {0, 1}, {5, 60}, {31, 2}, {97, 0}};
    xkv_ctx *ctx = logging_ctx();
    int32_t positions[131];

    (void)state;
    for (int32_t i = 0; i < 131; i++)
        positions[i] = 500 + 3 * i;
    for (size_t i = 0; i < 2 * KINDS; i++) {
        const kind *k = &kinds[i / 2];
        head_dim = i % 2 ? 20 : 16;
        subject t = make_subject(ctx, 131, XKV_BF16, k->profile, k->quality, k->cross);
        for (size_t j = 0; j < sizeof ranges / sizeof *ranges; j++) {
            xkv_read_options o = xkv_read_options_default();
            o.first_token = ranges[j][0];
            o.token_count = ranges[j][1];
            o.positions = j % 2 ? NULL : positions;
            check_restore(ctx, &t, &o, XKV_HOLD_ROWS, XKV_BF16, (layout)(j % LAYOUTS));
            check_restore(ctx, &t, &o, XKV_HOLD_COEFFICIENTS, (uint32_t)(XKV_F32 + j % 3), (layout)(j % LAYOUTS));
        }
        free_subject(ctx, &t);
    }
    head_dim = 16;
    xkv_ctx_free(ctx);
}

/* Into blocks: those of the same rows. Blocks that reach over heads, and what no view can be, are refused. */
static void test_held_into_blocks(void **state)
{
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (head_dim = 16; head_dim <= 32; head_dim += 16) {
        subject t = make_subject(ctx, 67, XKV_BF16, XKV_PROFILE_LOSSLESS, 0, 0);
        xkv_read_options o = xkv_read_options_default();
        xkv_device_attention *copy = hold(ctx, &t, &o, XKV_HOLD_ROWS);
        size_t size;
        uint8_t *expected = read_dense(ctx, &t, NULL, XKV_Q8_0, &size), *found;
        if (head_dim == 32) {
            found = read_dense(ctx, &t, copy, XKV_Q8_0, &size);
            assert_memory_equal(found, expected, size);
            free(found);
        } else {
            xkv_view views[6];
            for (int i = 0; i < 6; i++)
                views[i] = (xkv_view){.data = expected,
                                      .token_stride = 34,
                                      .head_stride = 34,
                                      .dim_stride = 34,
                                      .dtype = XKV_Q8_0,
                                      .head_dim = 32};
            assert_int_equal(xkv_device_attention_restore(ctx, copy, NULL, views), XKV_ERROR_UNSUPPORTED);
            assert_int_equal(xkv_device_attention_restore(ctx, copy, NULL, NULL), XKV_ERROR_ARGUMENT);
            views[5].dtype = 99;
            assert_int_equal(xkv_device_attention_restore(ctx, copy, NULL, views), XKV_ERROR_UNSUPPORTED);
        }
        free(expected);
        xkv_device_attention_free(ctx, copy);
        free_subject(ctx, &t);
    }
    head_dim = 16;
    xkv_ctx_free(ctx);
}

/* --- The caller's memory, stream and dictionary ------------------------------------------------------------------- */

static void test_workspace(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 300, XKV_BF16, XKV_PROFILE_DICT, 60, 6);
    xkv_device_target target = xkv_device_target_default();
    xkv_device_dict *dict = NULL;
    uint64_t least, best, used;

    (void)state;
    assert_ok(ctx, xkv_device_dict_create(ctx, device, t.dict, &dict));
    assert_ok(ctx, xkv_device_read_size(ctx, device, t.p.entry, NULL, &least, &best));
    assert_true(least > 0 && least < best);
    target.dict = dict;
    assert_true(device->api->stream_create(device->plug, &target.stream) == XKV_OK);
    for (uint64_t size = least; size <= best; size += (best - least) / 3) {
        target.workspace_size = size;
        target.workspace = device_alloc(size);
        used = control ? control->blocks : 0;
        check_read(ctx, &t, NULL, &target, XKV_BF16, TOKEN_MAJOR, true);
        assert_true(!control || control->blocks == used); /* nothing is allocated that stays */
        device_free(target.workspace);
    }
    target.workspace = device_alloc(best);
    target.workspace_size = least - 1;
    xkv_view none[6] = {{0}};
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, &target, none), XKV_ERROR_ARGUMENT);
    target.workspace_size = best - 1;
    target.workspace = (uint8_t *)target.workspace + 1;
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, &target, none), XKV_ERROR_ARGUMENT);
    device_free((uint8_t *)target.workspace - 1);
    device->api->stream_destroy(device->plug, target.stream);
    xkv_device_dict_free(ctx, dict);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* Less and less memory: smaller tiles, then the CPU; always the rows, and a word in the log. */
static void test_short_of_memory(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 300, XKV_BF16, XKV_PROFILE_DICT, 60, 6);
    cache c = make_cache(&t.s, 300, XKV_BF16, TOKEN_MAJOR, true);
    uint64_t least, best;
    uint32_t smaller = 0, warned = 0;

    (void)state;
    assert_ok(ctx, xkv_entry_read(ctx, t.p.entry, NULL, c.host_views));
    assert_ok(ctx, xkv_device_read_size(ctx, device, t.p.entry, NULL, &least, &best));
    for (uint64_t room = 0; room < best + (1u << 20); room += best / 40) {
        clear_cache(&c);
        control->memory = control->used + room;
        warnings_logged = 0;
        assert_ok(ctx, xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views));
        compare(&t, &c, 300);
        assert_true(warnings_logged <= 1);
        assert_string_equal(xkv_ctx_error(ctx), "");
        smaller += warnings_logged == 1 && room > least;
        warned += warnings_logged;
    }
    control->memory = 0;
    assert_true(smaller > 0 && warned > smaller);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

static int note_group(void *user, uint32_t group)
{
    uint32_t *next = user;
    assert_int_equal(group, (*next)++);
    return 0;
}

static int stop(void *user, uint32_t group)
{
    (void)user;
    return group == 1;
}

static void test_callbacks(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 131, XKV_BF16, XKV_PROFILE_DICT, 60, 0);
    xkv_read_options o = xkv_read_options_default();
    cache c = make_cache(&t.s, 131, XKV_BF16, TOKEN_MAJOR, false);
    uint32_t next = 0;

    (void)state;
    o.group_ready = note_group;
    o.group_ready_user = &next;
    assert_ok(ctx, xkv_device_read(ctx, device, t.p.entry, &o, NULL, c.views));
    assert_int_equal(next, t.p.entry->c.group_count);
    o.group_ready = stop;
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, &o, NULL, c.views), XKV_ERROR_CANCELLED);
    xkv_ctx_cancel(ctx);
    o.group_ready = NULL;
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, &o, NULL, c.views), XKV_ERROR_CANCELLED);
    xkv_ctx_reset(ctx);
    assert_ok(ctx, xkv_device_read(ctx, device, t.p.entry, &o, NULL, c.views));
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

static void test_refusals(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 131, XKV_BF16, XKV_PROFILE_DICT, 60, 0), other = t;
    cache c = make_cache(&t.s, 131, XKV_BF16, TOKEN_MAJOR, false);
    xkv_device_target target = xkv_device_target_default();
    xkv_device_dict *dict = NULL;

    (void)state;
    c.views[1].data = (uint8_t *)c.views[1].data + 1;
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views), XKV_ERROR_ARGUMENT);
    c.views[1].data = (uint8_t *)c.views[1].data - 1;
    c.views[1].dtype = XKV_Q8_0; /* blocks that reach over heads */
    c.views[1].dim_stride = 34;
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views), XKV_ERROR_ARGUMENT);
    c.views[1].dtype = 99;
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views), XKV_ERROR_ARGUMENT);
    c.views[1].dim_stride = 2;
    c.views[1].dtype = XKV_BF16;
    c.views[1].dim_stride = 2;
    c.views[1].head_dim = 7;
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views), XKV_ERROR_ARGUMENT);
    c.views[1].head_dim = 0;
    train(ctx, &other, 0);
    assert_ok(ctx, xkv_device_dict_create(ctx, device, other.dict, &dict));
    target.dict = dict;
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, &target, c.views), XKV_ERROR_ARGUMENT);
    xkv_device_dict_free(ctx, dict);
    xkv_dict_close(ctx, other.dict);
    memory_free(&other.trained);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* --- Damage ------------------------------------------------------------------------------------------------------- */

/* Chunks whose checksums are right and whose bytes are not: the status and the words are the CPU's. */
static void test_damaged_chunks(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    uint64_t seed = 9;
    uint32_t refused = 0;

    (void)state;
    for (uint32_t round = 0; round < 60; round++) {
        subject t = make_subject(ctx, 131, XKV_BF16, XKV_PROFILE_DICT, 60, round % 2 ? 6 : 0);
        cache c = make_cache(&t.s, 131, XKV_BF16, TOKEN_MAJOR, false);
        xkv_container *k = &t.p.entry->c;
        xkv_group *g = &k->groups[test_random(&seed) % k->group_count];
        xkv_part *part = &g->parts[XKV_PART_CHUNKS + test_random(&seed) % k->chunk_count];
        char words[256];
        if (part->size > 0) {
            uint8_t *bytes = t.p.m.data + k->payload_offset + part->offset;
            bytes[test_random(&seed) % part->size] ^= (uint8_t)(1u << test_random(&seed) % 8);
            if (round % 3 == 0 && part->size > 8)
                part->size -= 2;
            part->checksum = XXH3_64bits(bytes, part->size);
        }
        xkv_status expected = xkv_entry_read(ctx, t.p.entry, NULL, c.host_views);
        snprintf(words, sizeof words, "%s", xkv_ctx_error(ctx));
        assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views), expected);
        if (expected == XKV_OK)
            compare(&t, &c, 131);
        else
            assert_string_equal(xkv_ctx_error(ctx), words);
        refused += expected != XKV_OK;
        free_cache(&c);
        free_subject(ctx, &t);
    }
    assert_in_range(refused, 20, 60);
    xkv_ctx_free(ctx);
}

/* --- Failures ----------------------------------------------------------------------------------------------------- */

/* Whichever call of the runtime fails, the status says so or the rows are right, nothing is left behind, and the next
 * read is right. */
static void test_failing_calls(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 70, XKV_BF16, XKV_PROFILE_DICT, 60, 6);
    cache c = make_cache(&t.s, 70, XKV_BF16, TOKEN_MAJOR, false);
    uint64_t blocks = control->blocks, calls = control->calls;
    uint32_t failed = 0;

    (void)state;
    assert_ok(ctx, xkv_entry_read(ctx, t.p.entry, NULL, c.host_views));
    assert_ok(ctx, xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views));
    calls = control->calls - calls;
    for (uint64_t at = 1; at <= calls; at++) {
        control->error = at % 2 ? cudaErrorInvalidValue : cudaErrorMemoryAllocation;
        control->fail_at = control->calls + at;
        xkv_status status = xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views);
        control->fail_at = 0;
        if (status == XKV_OK)
            compare(&t, &c, 70);
        else
            assert_true(status == XKV_ERROR_BACKEND || status == XKV_ERROR_MEMORY);
        failed += status != XKV_OK;
        assert_true(control->blocks <= blocks + 4); /* giving back may be what failed */
        blocks = control->blocks;
    }
    assert_true(failed > calls / 4);
    clear_cache(&c);
    assert_ok(ctx, xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views));
    compare(&t, &c, 70);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* A broken context: a status for this and every further call, one line in the log, and the CPU goes on. Last, since
 * nothing repairs it. */
static void test_broken_device(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 70, XKV_BF16, XKV_PROFILE_DICT, 60, 0);
    cache c = make_cache(&t.s, 70, XKV_BF16, TOKEN_MAJOR, false);
    xkv_device_info info;

    (void)state;
    control->error = cudaErrorIllegalAddress;
    control->fail_at = control->calls + 150;
    assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views), XKV_ERROR_BACKEND);
    assert_non_null(strstr(xkv_ctx_error(ctx), "cannot be used any more"));
    for (int i = 0; i < 3; i++)
        assert_int_equal(xkv_device_read(ctx, device, t.p.entry, NULL, NULL, c.views), XKV_ERROR_BACKEND);
    assert_int_equal(errors_logged, 1);
    xkv_device_get_info(device, &info);
    assert_true(info.broken);
    assert_ok(ctx, xkv_entry_read(ctx, t.p.entry, NULL, c.host_views));
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest everywhere[] = {
        cmocka_unit_test(test_codecs),    cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_lengths),   cmocka_unit_test(test_positions),
        cmocka_unit_test(test_wide),      cmocka_unit_test(test_workspace),
        cmocka_unit_test(test_callbacks), cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_extended),  cmocka_unit_test(test_damaged_chunks),
        cmocka_unit_test(test_heads),     cmocka_unit_test(test_into_blocks),
        cmocka_unit_test(test_held_rows), cmocka_unit_test(test_held_into_blocks),
        cmocka_unit_test(test_replays),
    };
    const struct CMUnitTest told_to_fail[] = {
        /* the last one leaves the device broken */
        cmocka_unit_test(test_operations_can_be_captured),
        cmocka_unit_test(test_replay_failures),
        cmocka_unit_test(test_short_of_memory),
        cmocka_unit_test(test_failing_calls),
        cmocka_unit_test(test_broken_device),
    };
    int failed;

    if (!find_device())
        return 77;
    failed = cmocka_run_group_tests_name("everywhere", everywhere, open_the_device, NULL);
    if (control != NULL)
        failed += cmocka_run_group_tests_name("told to fail", told_to_fail, NULL, NULL);
    return failed;
}
