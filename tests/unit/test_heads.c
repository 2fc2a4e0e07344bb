/* Some KV heads of an entry: their rows are those of a whole restore, whatever the codec, range, positions and layout,
 * and nothing else is written. Where rows are products they agree as spec/codec.md, section 3 demands of two decoders,
 * since some kernels of OpenBLAS round a column differently in a matrix of fewer columns; else bit for bit. */
#include "support.h"

#include "entry_internal.h"

#include <math.h>
#include <stdlib.h>

enum { LAYERS = 3, TOKENS = 150, HEADS = 5, HEAD_DIM = 16 };

typedef struct subject {
    synthetic s;
    memory trained;
    xkv_dict *dict;
    packed p;
} subject;

typedef struct kind {
    uint32_t profile, codec, cross;
    double quality;
} kind;

static const kind kinds[] = {
    {XKV_PROFILE_DICT, XKV_GROUP_DICT, 0, 60},      {XKV_PROFILE_DICT, XKV_GROUP_CROSS, 6, 60},
    {XKV_PROFILE_SVD, XKV_GROUP_SVD, 0, 0},         {XKV_PROFILE_SVD, XKV_GROUP_SVDQ, 0, 0.2},
    {XKV_PROFILE_SCALAR, XKV_GROUP_SCALAR, 0, 0.1}, {XKV_PROFILE_LOSSLESS, XKV_GROUP_LOSSLESS, 0, 0},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static synthetic sample(int mla, uint32_t dtype, uint32_t head_dim)
{
    return make_synthetic(&(synthetic_options){.layers = LAYERS,
                                               .tokens = TOKENS,
                                               .heads = mla ? 1 : HEADS,
                                               .head_dim = head_dim,
                                               .dtype = dtype,
                                               .rank = 9,
                                               .group_layers = 2,
                                               .noise = 0.1,
                                               .mean = 1,
                                               .rope = 1,
                                               .mla = mla,
                                               .first_position = 5});
}

static subject make_subject(xkv_ctx *ctx, const kind *k, int mla)
{
    subject t = {.s = sample(mla, XKV_F16, HEAD_DIM)};
    xkv_pack_options o = xkv_pack_options_default();
    bool found = false;

    o.profile = k->profile;
    o.group_layers = 2;
    o.chunk_tokens = 32;
    o.window = 3;
    if (k->profile == XKV_PROFILE_DICT) {
        xkv_train_options train = xkv_train_options_default();
        const synthetic *list = &t.s;
        train.group_layers = 2;
        train.cross = k->cross;
        train.zstd_level = 1;
        assert_ok(ctx, train_on(ctx, &list, 1, &train, &t.trained));
        xkv_input input = xkv_input_from_memory(t.trained.data, t.trained.size);
        assert_ok(ctx, xkv_dict_open(ctx, &input, 1, &t.dict));
        o.dict = t.dict;
        o.quality = k->quality;
    } else if (k->codec == XKV_GROUP_SVD) {
        o.rank_k = o.rank_v = 7;
    } else {
        o.error = k->quality;
    }
    t.p = pack_planes(ctx, &t.s, &o);
    for (uint32_t i = 0; i < t.p.entry->c.group_count; i++)
        found |= t.p.entry->c.groups[i].codec == k->codec;
    assert_true(found);
    return t;
}

static void free_subject(xkv_ctx *ctx, subject *t)
{
    free_packed(ctx, &t->p);
    xkv_dict_close(ctx, t->dict);
    memory_free(&t->trained);
    free_synthetic(&t->s);
}

/* Rows of `heads` heads in each plane, [planes][tokens][heads][dim], where nothing has been written before. */
static uint8_t *read_heads(xkv_ctx *ctx, const subject *t, const xkv_read_options *o, uint32_t tokens, uint32_t heads,
                           bool head_major, size_t *size)
{
    const xkv_geometry *g = &t->s.geometry;
    xkv_view *views = calloc(g->plane_count, sizeof *views);
    size_t head = g->planes->head_dim * xkv_dtype_size(g->planes->dtype);
    uint8_t *data;

    *size = tokens * heads * head;
    data = malloc(g->plane_count * *size);
    memset(data, 0xee, g->plane_count * *size);
    for (uint32_t i = 0; i < g->plane_count; i++)
        views[i] = (xkv_view){.data = data + i * *size,
                              .token_stride = (int64_t)(head_major ? head : heads * head),
                              .head_stride = (int64_t)(head_major ? tokens * head : head),
                              .dim_stride = (int64_t)xkv_dtype_size(g->planes->dtype),
                              .dtype = g->planes->dtype};
    assert_ok(ctx, xkv_entry_read(ctx, t->p.entry, o, views));
    free(views);
    return data;
}

static uint16_t half_at(const uint8_t *p, size_t i)
{
    uint16_t h;

    memcpy(&h, p + 2 * i, sizeof h);
    return h;
}

/* One token's rows of f16 of a plane: of some heads, `stride` bytes from one to the next, and of all, [all][HEAD_DIM].
 */
static void check_row(const uint8_t *part, size_t stride, uint32_t first, uint32_t heads, const uint8_t *whole,
                      uint32_t all, bool exact)
{
    double most = 0;

    for (uint32_t i = 0; i < all * HEAD_DIM; i++)
        most = fmax(most, fabs(test_from_half(half_at(whole, i))));
    for (uint32_t h = 0; h < heads; h++)
        for (uint32_t d = 0; d < HEAD_DIM; d++) {
            uint16_t found = half_at(part + h * stride, d), expected = half_at(whole, (first + h) * HEAD_DIM + d);
            double x = test_from_half(found), y = test_from_half(expected);
            int exponent;
            (void)frexp(y, &exponent);
            if (exact)
                assert_int_equal(found, expected);
            else
                assert_true(fabs(x - y) <= fmax(exp2(fmax(exponent, -13) - 11), most * exp2(-16)));
        }
}

static void check_part(xkv_ctx *ctx, const subject *t, xkv_read_options o, uint32_t first, uint32_t count,
                       bool head_major, bool exact)
{
    uint32_t tokens = o.token_count ? o.token_count : TOKENS - o.first_token, all = t->s.geometry.planes->heads;
    uint32_t heads = count ? count : all - first;
    size_t whole_size, size, head = t->s.geometry.planes->head_dim * xkv_dtype_size(t->s.geometry.planes->dtype);
    uint8_t *whole = read_heads(ctx, t, &o, tokens, all, false, &whole_size), *part;

    o.first_head = first;
    o.head_count = count;
    part = read_heads(ctx, t, &o, tokens, heads, head_major, &size);
    for (uint32_t i = 0; i < t->s.geometry.plane_count; i++)
        for (uint32_t k = 0; k < tokens; k++)
            check_row(part + i * size + (head_major ? k : k * heads) * head, head_major ? tokens * head : head, first,
                      heads, whole + i * whole_size + k * all * head, all, exact);
    free(whole);
    free(part);
}

static void heads_are_those_of_the_whole(void **state)
{
    static const uint32_t ranges[][2] = {{0, 1}, {2, 2}, {4, 1}, {1, 0}, {0, 5}, {0, 0}};
    xkv_ctx *ctx = new_ctx(2);
    int32_t positions[100];

    (void)state;
    for (int32_t i = 0; i < 100; i++)
        positions[i] = 900 - 5 * i;
    for (int k = 0; k < KINDS; k++) {
        subject t = make_subject(ctx, &kinds[k], 0);
        bool exact = kinds[k].codec == XKV_GROUP_LOSSLESS || kinds[k].codec == XKV_GROUP_SCALAR;
        for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
            xkv_read_options o = xkv_read_options_default();
            check_part(ctx, &t, o, ranges[i][0], ranges[i][1], i % 2, exact);
            o.first_token = 2;
            o.token_count = 100;
            o.positions = i % 2 ? positions : NULL;
            check_part(ctx, &t, o, ranges[i][0], ranges[i][1], i % 3 == 0, exact);
        }
        free_subject(ctx, &t);
    }
    xkv_ctx_free(ctx);
}

/* Every rank needs what all heads share. */
static void latents_are_whole(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    subject t = make_subject(ctx, &kinds[2], 1);
    xkv_read_options o = xkv_read_options_default();
    size_t size;
    uint8_t *whole = read_heads(ctx, &t, &o, TOKENS, 1, false, &size), *part;

    (void)state;
    o.first_head = 3;
    o.head_count = 2;
    part = read_heads(ctx, &t, &o, TOKENS, 1, false, &size);
    assert_memory_equal(part, whole, size * t.s.geometry.plane_count);
    free(whole);
    free(part);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

static void wrong_heads_are_refused(void **state)
{
    static const uint32_t wrong[][2] = {{5, 0}, {5, 1}, {0, 6}, {4, 2}, {1, UINT32_MAX}, {UINT32_MAX, 1}};
    xkv_ctx *ctx = new_ctx(1);
    subject t = make_subject(ctx, &kinds[5], 0);
    xkv_read_options o = xkv_read_options_default();

    (void)state;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        o.first_head = wrong[i][0];
        o.head_count = wrong[i][1];
        assert_int_equal(xkv_entry_read(ctx, t.p.entry, &o, t.s.views), XKV_ERROR_ARGUMENT);
    }
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* Rows of blocks, which do not reach over heads. */
static void blocks_stay_whole(void **state)
{
    enum { BLOCK = 34, BYTES = 2 * BLOCK };
    xkv_ctx *ctx = new_ctx(1);
    xkv_read_options o = xkv_read_options_default();
    xkv_pack_options p = xkv_pack_options_default();
    subject t = {.s = sample(0, XKV_Q8_0, 32)};
    uint32_t planes = t.s.geometry.plane_count;
    uint8_t *data = malloc((size_t)TOKENS * BYTES * planes);
    xkv_view *views = calloc(planes, sizeof *views);

    (void)state;
    t.p = pack_planes(ctx, &t.s, &p);
    for (uint32_t i = 0; i < planes; i++)
        views[i] = (xkv_view){data + (size_t)i * TOKENS * BYTES, BYTES, BLOCK, BLOCK, NULL, XKV_Q8_0, 0};
    o.first_head = 1;
    o.head_count = 2;
    assert_ok(ctx, xkv_entry_read(ctx, t.p.entry, &o, views));
    for (uint32_t i = 0; i < planes; i++)
        for (uint32_t k = 0; k < TOKENS; k++)
            assert_memory_equal(data + ((size_t)i * TOKENS + k) * BYTES,
                                (uint8_t *)t.s.views[i].data + (size_t)k * HEADS * BLOCK + BLOCK, BYTES);
    free(data);
    free(views);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(heads_are_those_of_the_whole),
        cmocka_unit_test(latents_are_whole),
        cmocka_unit_test(wrong_heads_are_refused),
        cmocka_unit_test(blocks_stay_whole),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
