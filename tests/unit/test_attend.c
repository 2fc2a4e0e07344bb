/* Attention over packed entries, against attention in f64, written here, over what xkv_entry_read() restores. With
 * XKV_EMULATED_PLUGIN (tests/cuda) on the emulated device, or with XKV_GPU_PLUGIN on a genuine one: whatever is held is
 * copied there first. */
#include "support.h"

#include "entry_internal.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>

enum { TOKENS = 700, LAYERS = 4, KV_HEADS = 2, HEAD_DIM = 32, MAX_QUERIES = 40 };

/* --- Caches and entries --- */

enum { LOSSLESS, SVD, SVDQ, SCALAR, DICT, DICT_CROSS, PROFILES };

static const char *const names[] = {"lossless", "svd", "svdq", "scalar", "dict", "dict with a cross stage"};

static synthetic sample_of(uint64_t seed, uint32_t tokens, int mla, uint32_t dtype)
{
    synthetic s = make_synthetic(&(synthetic_options){.layers = LAYERS,
                                                      .tokens = tokens,
                                                      .heads = mla ? 1 : KV_HEADS,
                                                      .head_dim = HEAD_DIM,
                                                      .dtype = dtype,
                                                      .rank = 12,
                                                      .group_layers = 2,
                                                      .noise = 0.05,
                                                      .mean = 0.5,
                                                      .rope = 1,
                                                      .mla = mla,
                                                      .first_position = 11,
                                                      .seed = seed});
    s.ropes[0].scale = 1.25;
    return s;
}

static synthetic sample(uint64_t seed, uint32_t tokens, int mla)
{
    return sample_of(seed, tokens, mla, XKV_F16);
}

/* A dictionary for the samples. */
typedef struct trained {
    memory m;
    xkv_input input;
    xkv_dict *dict;
    uint32_t cross;
} trained;

static trained train(xkv_ctx *ctx, uint32_t cross, int mla)
{
    synthetic s = sample(1, 900, mla);
    const synthetic *list[] = {&s};
    xkv_train_options o = xkv_train_options_default();
    trained t = {.cross = cross};

    o.group_layers = 2;
    o.cross = cross;
    o.zstd_level = 1;
    assert_ok(ctx, train_on(ctx, list, 1, &o, &t.m));
    t.input = xkv_input_from_memory(t.m.data, t.m.size);
    assert_ok(ctx, xkv_dict_open(ctx, &t.input, 1, &t.dict));
    free_synthetic(&s);
    return t;
}

static void free_trained(xkv_ctx *ctx, trained *t)
{
    xkv_dict_close(ctx, t->dict);
    memory_free(&t->m);
}

/* An entry of one of the profiles. */
typedef struct fixture {
    xkv_ctx *ctx;
    synthetic s;
    trained t;
    packed p;
} fixture;

static fixture make_fixture(int profile, uint32_t tokens, int mla)
{
    fixture f = {.ctx = new_ctx(2), .s = sample(0, tokens, mla)};
    xkv_pack_options o = xkv_pack_options_default();

    o.group_layers = 2;
    o.chunk_tokens = 64;
    o.window = 5;
    if (profile == SVD || profile == SVDQ)
        o.profile = XKV_PROFILE_SVD;
    if (profile == SVD)
        o.rank_k = o.rank_v = 20;
    if (profile == SCALAR)
        o.profile = XKV_PROFILE_SCALAR;
    if (profile == SVDQ || profile == SCALAR)
        o.error = 0.1;
    if (profile >= DICT) {
        f.t = train(f.ctx, profile == DICT_CROSS ? 40 : 0, mla);
        o.profile = XKV_PROFILE_DICT;
        o.dict = f.t.dict;
        o.quality = 86; /* at which components that are coded and others alternate */
    }
    f.p = pack_planes(f.ctx, &f.s, &o);
    return f;
}

static void free_fixture(fixture *f)
{
    free_packed(f->ctx, &f->p);
    free_trained(f->ctx, &f->t);
    free_synthetic(&f->s);
    xkv_ctx_free(f->ctx);
}

/* --- The oracle --- */

/* Restored rows in f32, [plane][count][width]; or in the planes' f16, and then in f32. */
static float *restored(xkv_ctx *ctx, const xkv_entry *entry, uint32_t first, uint32_t count, const int32_t *positions,
                       uint32_t dtype)
{
    const xkv_geometry *g = xkv_entry_geometry(entry);
    size_t width = row_width(&g->planes[0]), elements = g->plane_count * (size_t)count * width;
    int64_t elem = dtype == XKV_F32 ? 4 : 2;
    float *data = calloc(elements, sizeof *data);
    xkv_view *views = calloc(g->plane_count, sizeof *views);
    xkv_read_options o = xkv_read_options_default();

    for (uint32_t i = 0; i < g->plane_count; i++)
        views[i] = (xkv_view){.data = (uint8_t *)data + i * count * width * (size_t)elem,
                              .token_stride = elem * (int64_t)width,
                              .head_stride = elem * (int64_t)g->planes[i].head_dim,
                              .dim_stride = elem,
                              .dtype = dtype};
    o.first_token = first;
    o.token_count = count;
    o.positions = positions;
    assert_ok(ctx, xkv_entry_read(ctx, entry, &o, views));
    for (size_t i = elements; dtype == XKV_F16 && i-- > 0;) {
        uint16_t half;
        memcpy(&half, (uint8_t *)data + 2 * i, sizeof half);
        data[i] = (float)test_from_half(half);
    }
    free(views);
    return data;
}

/* What is asked: of one layer. */
typedef struct question {
    uint32_t layer, first, count; /* rows */
    const int32_t *moved;         /* their positions; NULL: as stored */
    uint32_t queries, heads;
    const float *q; /* [queries][heads][dim] */
    const int32_t *positions;
    xkv_attend_options o;
} question;

static int sees(const question *a, const xkv_geometry *g, uint32_t query, uint32_t row)
{
    int64_t at = a->moved ? a->moved[row] : g->positions[a->first + row];
    int64_t distance = a->positions ? a->positions[query] - at : 0;

    return !a->o.causal || (distance >= 0 && (a->o.window == 0 || distance < a->o.window));
}

static double dot(const float *a, const float *b, uint32_t n)
{
    double sum = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* One query of one head: out[dim_v]; the result is the log-sum-exp. */
static double attend_slowly(const question *a, const xkv_geometry *g, const float *rows, uint32_t query, uint32_t head,
                            double *out)
{
    const xkv_plane *k = &g->planes[2 * a->layer];
    int mla = k->kind == XKV_PLANE_LATENT;
    uint32_t dim = k->head_dim, width = row_width(k), kv = head / (a->heads / k->heads), dim_q = mla ? 2 * dim : dim;
    const float *first = rows + (size_t)2 * a->layer * a->count * width + kv * dim;
    const float *second = first + (size_t)a->count * width, *values = mla ? first : second;
    const float *q = a->q + ((size_t)query * a->heads + head) * dim_q;
    double *scores = calloc(a->count + 1, sizeof *scores), largest = -INFINITY, sum = 0;

    for (uint32_t t = 0; t < a->count; t++) {
        double s = dot(q, first + (size_t)t * width, dim);
        if (mla)
            s += dot(q + dim, second + (size_t)t * width, dim);
        s *= a->o.scale != 0 ? a->o.scale : 1 / sqrt(dim);
        if (a->o.softcap != 0)
            s = a->o.softcap * tanh(s / a->o.softcap);
        scores[t] = sees(a, g, query, t) ? s : -INFINITY;
        largest = fmax(largest, scores[t]);
    }
    memset(out, 0, dim * sizeof *out);
    for (uint32_t t = 0; t < a->count && largest != -INFINITY; t++) {
        double p = exp(scores[t] - largest);
        sum += p;
        for (uint32_t d = 0; d < dim; d++)
            out[d] += p * (double)values[(size_t)t * width + d];
    }
    for (uint32_t d = 0; d < dim && sum > 0; d++)
        out[d] /= sum;
    free(scores);
    return sum > 0 ? largest + log(sum) : -INFINITY;
}

/* Largest relative error of a head's output, and absolute one of its log-sum-exp. */
typedef struct distance {
    double output, lse;
} distance;

static distance compare(const question *a, const xkv_geometry *g, const float *rows, const float *output,
                        const float *lse)
{
    uint32_t dim = g->planes[0].head_dim;
    double *expected = calloc(dim, sizeof *expected);
    distance worst = {0, 0};

    for (uint32_t i = 0; i < a->queries; i++)
        for (uint32_t h = 0; h < a->heads; h++) {
            double sum = attend_slowly(a, g, rows, i, h, expected), squares = 0, error = 0;
            size_t at = (size_t)i * a->heads + h;
            for (uint32_t d = 0; d < dim; d++) {
                squares += expected[d] * expected[d];
                error += pow((double)output[at * dim + d] - expected[d], 2);
            }
            if (sum == -INFINITY) {
                assert_true(error == 0 && (double)lse[at] == sum);
                continue;
            }
            worst.output = fmax(worst.output, sqrt(error / squares));
            worst.lse = fmax(worst.lse, fabs((double)lse[at] - sum));
        }
    free(expected);
    return worst;
}

/* --- Asking --- */

static float *random_queries(uint32_t count, double size)
{
    float *q = calloc(count, sizeof *q);
    uint64_t state = 5;

    for (uint32_t i = 0; i < count; i++)
        q[i] = (float)(size * test_normal(&state));
    return q;
}

static xkv_attention *open_attention(xkv_ctx *ctx, const xkv_entry *entry, const question *a, uint32_t hold)
{
    xkv_attention_options o = xkv_attention_options_default();
    xkv_attention *attention = NULL;

    o.first_token = a->first;
    o.token_count = a->count;
    o.positions = a->moved;
    o.hold = hold;
    assert_ok(ctx, xkv_attention_open(ctx, entry, &o, &attention));
    return attention;
}

#ifdef XKV_EMULATED_PLUGIN
#include "device_attention.h"
#else
static xkv_status attend(xkv_ctx *ctx, const xkv_attention *attention, uint32_t layer, const xkv_queries *q,
                         const xkv_attend_options *o, float *output, float *lse)
{
    return xkv_attend(ctx, attention, layer, q, o, output, lse);
}

static void merge(const xkv_attention_state *states, uint32_t state_count, uint64_t rows, uint32_t dim, float *output,
                  float *lse)
{
    xkv_attention_merge(states, state_count, rows, dim, output, lse);
}

enum { HOLD_LEAST = XKV_HOLD_NOTHING };
static const double f32_error = 2e-6;
#endif

static xkv_status ask(xkv_ctx *ctx, const xkv_attention *attention, const question *a, float *output, float *lse)
{
    xkv_queries q = {.data = a->q, .count = a->queries, .heads = a->heads, .positions = a->positions};

    return attend(ctx, attention, a->layer, &q, &a->o, output, lse);
}

/* The answer is as near to the oracle's, over the same rows (those that are held are rounded to f16), as f32 allows;
 * coefficients of a cross stage are rounded to 16 bits of the largest. */
static void check(const fixture *f, const char *what, const xkv_entry *entry, const question *a, uint32_t hold)
{
    const xkv_geometry *g = xkv_entry_geometry(entry);
    size_t count = (size_t)a->queries * a->heads;
    float *rows = restored(f->ctx, entry, a->first, a->count, a->moved,
                           hold == XKV_HOLD_ROWS && g->planes->dtype == XKV_F16 ? XKV_F16 : XKV_F32);
    float *output = calloc(count * HEAD_DIM, sizeof *output), *lse = calloc(count, sizeof *lse);
    xkv_attention *attention = open_attention(f->ctx, entry, a, hold);
    double limit = hold != XKV_HOLD_ROWS && f->t.cross ? 2e-4 : 2.5 * f32_error;
    distance d;

    assert_ok(f->ctx, ask(f->ctx, attention, a, output, lse));
    d = compare(a, g, rows, output, lse);
    if (!(d.output <= limit && d.lse <= limit))
        fail_msg("%s, hold %u: output %g, lse %g", what, hold, d.output, d.lse);
    xkv_attention_close(f->ctx, attention);
    free(rows);
    free(output);
    free(lse);
}

static void check_holds(const fixture *f, const char *what, const question *a)
{
    for (uint32_t hold = HOLD_LEAST; hold <= XKV_HOLD_ROWS; hold++)
        check(f, what, f->p.entry, a, hold);
}

static question whole(uint32_t layer, uint32_t queries, uint32_t heads, const float *q)
{
    return (question){
        .layer = layer, .count = TOKENS, .queries = queries, .heads = heads, .q = q, .o = xkv_attend_options_default()};
}

static void all_codecs_are_within_the_error(void **state)
{
    float *q = random_queries(MAX_QUERIES * 2 * KV_HEADS * HEAD_DIM, 1);

    (void)state;
    for (int profile = 0; profile < PROFILES; profile++) {
        fixture f = make_fixture(profile, TOKENS, 0);
        for (uint32_t layer = 0; layer < LAYERS; layer += 3)
            for (uint32_t queries = 1; queries <= MAX_QUERIES; queries += MAX_QUERIES - 1) {
                question a = whole(layer, queries, 2 * KV_HEADS, q);
                check_holds(&f, names[profile], &a);
                a.o.rebuild = 1;
                check(&f, names[profile], f.p.entry, &a, HOLD_LEAST);
            }
        free_fixture(&f);
    }
    free(q);
}

/* --- What is asked in other ways --- */

static void heads_share_kv_heads(void **state)
{
    float *q = random_queries(5 * 7 * KV_HEADS * HEAD_DIM, 1);
    fixture f = make_fixture(DICT_CROSS, TOKENS, 0);

    (void)state;
    for (uint32_t group = 1; group <= 7; group += group == 1 ? 2 : 4) {
        question a = whole(1, 5, group * KV_HEADS, q);
        check_holds(&f, "1, 3, 7 heads for each of K and V", &a);
    }
    free_fixture(&f);
    free(q);
}

static void mla_attends_to_the_latent(void **state)
{
    static const int profiles[] = {LOSSLESS, SVD, SVDQ, SCALAR, DICT};
    float *q = random_queries(3 * 4 * 2 * HEAD_DIM, 1);

    (void)state;
    for (size_t i = 0; i < sizeof profiles / sizeof *profiles; i++) {
        fixture f = make_fixture(profiles[i], TOKENS, 1);
        question a = whole(2, 3, 4, q);
        a.o.scale = 0.1;
        check_holds(&f, "MLA", &a);
        free_fixture(&f);
    }
    free(q);
}

/* Rows that an engine holds as ggml's blocks. */
static void rows_of_blocks(void **state)
{
    float *q = random_queries(3 * KV_HEADS * HEAD_DIM, 1);

    (void)state;
    for (uint32_t dtype = XKV_Q8_0; dtype <= XKV_Q4_0; dtype++)
        for (int lossless = 0; lossless < 2; lossless++) {
            fixture f = {.ctx = new_ctx(2), .s = sample_of(0, TOKENS, 0, dtype)};
            xkv_pack_options o = xkv_pack_options_default();
            question a = whole(1, 3, KV_HEADS, q);
            if (!lossless) {
                o.profile = XKV_PROFILE_SCALAR;
                o.error = 0.1;
            }
            f.p = pack_planes(f.ctx, &f.s, &o);
            for (uint32_t hold = HOLD_LEAST; hold <= XKV_HOLD_COEFFICIENTS; hold++)
                check(&f, "blocks", f.p.entry, &a, hold);
            if (lossless) /* others are rounded to blocks */
                check(&f, "blocks", f.p.entry, &a, XKV_HOLD_ROWS);
            free_fixture(&f);
        }
    free(q);
}

static void masks_and_soft_caps(void **state)
{
    static const int32_t positions[] = {10, 11, 200, 2, 5000, 640};
    float *q = random_queries(6 * KV_HEADS * HEAD_DIM, 1);

    (void)state;
    for (int profile = LOSSLESS; profile < PROFILES; profile += 3) {
        fixture f = make_fixture(profile, TOKENS, 0);
        question a = whole(2, 6, KV_HEADS, q);
        a.positions = positions;
        a.o.causal = 1; /* two queries see no row */
        check_holds(&f, "causal", &a);
        a.o.window = 70;
        check_holds(&f, "window", &a);
        a.o.softcap = 2.5;
        check_holds(&f, "soft cap and window", &a);
        a.o = xkv_attend_options_default();
        a.o.softcap = 0.7;
        a.o.scale = 0.5;
        check_holds(&f, "soft cap", &a);
        a.o.softcap = 1e6; /* as good as none */
        check_holds(&f, "large soft cap", &a);
        free_fixture(&f);
    }
    free(q);
}

static void rows_at_other_positions(void **state)
{
    static const int32_t positions[] = {-5, 4000, 300};
    int32_t moved[TOKENS];
    float *q = random_queries(3 * KV_HEADS * HEAD_DIM, 1);

    (void)state;
    for (int profile = 0; profile < PROFILES; profile++) {
        fixture f = make_fixture(profile, TOKENS, 0);
        question a = whole(3, 3, KV_HEADS, q);
        for (int32_t t = 0; t < TOKENS; t++)
            moved[t] = t % 5 ? 11 + t + 1000 : 600 - t;
        a.moved = moved;
        a.positions = positions;
        a.o.causal = 1;
        check_holds(&f, names[profile], &a);
        a.first = 30;
        a.count = 100;
        check_holds(&f, names[profile], &a);
        free_fixture(&f);
    }
    free(q);
}

static void any_range_of_tokens(void **state)
{
    static const uint32_t ranges[][2] = {{0, 1}, {3, 2}, {2, 690}, {37, 500}, {64, 64}, {690, 10}, {697, 3}, {699, 1}};
    float *q = random_queries(2 * KV_HEADS * HEAD_DIM, 1);

    (void)state;
    for (int profile = 0; profile < PROFILES; profile++) {
        fixture f = make_fixture(profile, TOKENS, 0);
        for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
            question a = whole(1, 2, KV_HEADS, q);
            a.first = ranges[i][0];
            a.count = ranges[i][1];
            check_holds(&f, names[profile], &a);
        }
        free_fixture(&f);
    }
    free(q);
}

/* An entry of 200 rows, of another codec, that extends the first 300 of one. */
static void entries_that_extend_another(void **state)
{
    static const uint32_t ranges[][2] = {{0, 0}, {280, 40}, {300, 200}, {20, 100}};
    float *q = random_queries(3 * KV_HEADS * HEAD_DIM, 1);

    (void)state;
    for (int profile = 0; profile < PROFILES; profile++) {
        fixture f = make_fixture(profile, TOKENS, 0);
        synthetic more = sample(9, 200, 0);
        xkv_pack_options o = xkv_pack_options_default();
        packed p;
        for (uint32_t t = 0; t < 200; t++)
            more.positions[t] += 300;
        o.profile = XKV_PROFILE_SCALAR;
        o.error = 0.1;
        o.group_layers = 4;
        p = pack_planes(f.ctx, &more, &o);
        assert_ok(f.ctx, xkv_entry_extend(f.ctx, p.entry, f.p.entry, 300, NULL, 0));
        for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
            for (uint32_t hold = HOLD_LEAST; hold <= XKV_HOLD_ROWS; hold++) {
                question a = whole(2, 3, KV_HEADS, q);
                a.first = ranges[i][0];
                a.count = ranges[i][1] ? ranges[i][1] : 500;
                check(&f, names[profile], p.entry, &a, hold);
            }
        free_packed(f.ctx, &p);
        free_synthetic(&more);
        free_fixture(&f);
    }
    free(q);
}

static void queries_may_lie_anywhere(void **state)
{
    enum { QUERIES = 3, HEADS = 2 * KV_HEADS, DIM = HEAD_DIM };
    fixture f = make_fixture(DICT, TOKENS, 0);
    float *q = random_queries(QUERIES * HEADS * DIM, 1), turned[HEADS][QUERIES + 1][DIM + 3];
    float one[2][QUERIES * HEADS * DIM], lse[2][QUERIES * HEADS];
    question a = whole(0, QUERIES, HEADS, q);
    xkv_attention *attention = open_attention(f.ctx, f.p.entry, &a, XKV_HOLD_COEFFICIENTS);
    xkv_queries strided = {.data = &turned[0][QUERIES - 1],
                           .count = QUERIES,
                           .heads = HEADS,
                           .query_stride = -(int64_t)sizeof turned[0][0],
                           .head_stride = sizeof turned[0]};

    (void)state;
    for (int i = 0; i < QUERIES; i++)
        for (int h = 0; h < HEADS; h++)
            memcpy(turned[h][QUERIES - 1 - i], q + (i * HEADS + h) * DIM, DIM * sizeof *q);
    assert_ok(f.ctx, ask(f.ctx, attention, &a, one[0], lse[0]));
    assert_ok(f.ctx, attend(f.ctx, attention, 0, &strided, NULL, one[1], lse[1]));
    assert_memory_equal(one[0], one[1], sizeof one[0]);
    assert_memory_equal(lse[0], lse[1], sizeof lse[0]);
    xkv_attention_close(f.ctx, attention);
    free_fixture(&f);
    free(q);
}

/* --- Mathematics --- */

enum { ROWS = 4 * KV_HEADS, ELEMENTS = ROWS * HEAD_DIM };

static void assert_near(const float *a, const float *b, size_t n, double error)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)a[i] - (double)b[i]) <= error * (1 + fabs((double)b[i]))))
            fail_msg("element %zu: %g, expected %g", i, (double)a[i], (double)b[i]);
}

/* The answer over one range. */
static void ask_range(const fixture *f, question a, uint32_t first, uint32_t count, float *output, float *lse)
{
    xkv_attention *attention;

    a.first = first;
    a.count = count;
    attention = open_attention(f->ctx, f->p.entry, &a, HOLD_LEAST);
    assert_ok(f->ctx, ask(f->ctx, attention, &a, output, lse));
    xkv_attention_close(f->ctx, attention);
}

static void parts_merge_to_the_whole(void **state)
{
    static const uint32_t cuts[] = {0, 3, 100, 101, 500, TOKENS};
    static const int32_t positions[] = {60, 120, 11, 4};
    float *q = random_queries(ELEMENTS, 1), output[6][ELEMENTS], lse[6][ROWS];
    fixture f = make_fixture(DICT_CROSS, TOKENS, 0);
    xkv_attention_state states[5];

    (void)state;
    for (uint32_t causal = 0; causal < 2; causal++) {
        question a = whole(1, 4, KV_HEADS, q);
        a.positions = positions;
        a.o.causal = causal; /* most parts are seen by no query, and one query sees none */
        for (int i = 0; i < 5; i++) {
            ask_range(&f, a, cuts[i], cuts[i + 1] - cuts[i], output[i], lse[i]);
            states[i] = (xkv_attention_state){output[i], lse[i]};
        }
        ask_range(&f, a, 0, TOKENS, output[5], lse[5]);
        merge(states, 5, ROWS, HEAD_DIM, output[2], lse[2]); /* onto one of them */
        assert_near(output[2], output[5], ELEMENTS, f32_error);
        for (int r = 0; r < ROWS; r++)
            assert_true(lse[2][r] == lse[5][r] || fabs((double)(lse[2][r] - lse[5][r])) < f32_error);
    }
    free_fixture(&f);
    free(q);
}

/* Averages by hand: weights 1 : 3, a state that has seen nothing, none at all, and a huge difference. */
static void merging_by_hand(void **state)
{
    const float zero[2] = {NAN, NAN}, a[2] = {1, -2}, b[2] = {5, 6};
    const float none = -INFINITY, lse_a = 0.5f, lse_b = 0.5f + (float)log(3), far = 400;
    xkv_attention_state states[] = {{zero, &none}, {a, &lse_a}, {b, &lse_b}, {b, &far}};
    float output[2], lse;

    (void)state;
    merge(states, 3, 1, 2, output, &lse);
    assert_near(output, (const float[]){4, 4}, 2, 1e-6);
    assert_near(&lse, (const float[]){0.5f + (float)log(4)}, 1, 1e-6);
    merge(states, 4, 1, 2, output, &lse);
    assert_true(output[0] == 5 && output[1] == 6 && lse == 400);
    for (uint32_t count = 0; count < 2; count++) {
        merge(states, count, 1, 2, output, &lse);
        assert_true(output[0] == 0 && output[1] == 0 && lse == -INFINITY);
    }
    for (int order = 0; order < 3; order++) { /* before, behind, and before what has seen nothing */
        const xkv_attention_state bad = {zero, &(const float){NAN}}, unseen = {zero, &none};
        const xkv_attention_state pair[2] = {order == 1 ? states[1] : bad, order == 0   ? states[1]
                                                                           : order == 1 ? bad
                                                                                        : unseen};
        merge(pair, 2, 1, 2, output, &lse);
        assert_true(isnan(output[0]) && isnan(lse));
    }
}

static void one_visible_row_is_the_answer(void **state)
{
    static const uint32_t tokens[] = {2, 300, 698}; /* a sink, a coded row, one of the window */
    float *q = random_queries(ELEMENTS, 1), output[ELEMENTS], lse[ROWS];

    (void)state;
    for (int profile = 0; profile < PROFILES; profile++) {
        fixture f = make_fixture(profile, TOKENS, 0);
        float *rows = restored(f.ctx, f.p.entry, 0, TOKENS, NULL, XKV_F32);
        for (int i = 0; i < 3; i++) {
            const float *v = rows + (3 * (size_t)TOKENS + tokens[i]) * KV_HEADS * HEAD_DIM;
            ask_range(&f, whole(1, 4, KV_HEADS, q), tokens[i], 1, output, lse);
            for (int r = 0; r < ROWS; r++)
                assert_near(output + r * HEAD_DIM, v + r % KV_HEADS * HEAD_DIM, HEAD_DIM,
                            profile == DICT_CROSS ? 2e-4 : f32_error);
        }
        free(rows);
        free_fixture(&f);
    }
    free(q);
}

static void causal_is_full_with_fewer_rows(void **state)
{
    float *q = random_queries(ELEMENTS, 1), output[2][ELEMENTS], lse[2][ROWS];
    fixture f = make_fixture(SVDQ, TOKENS, 0);

    (void)state;
    for (uint32_t seen = 1; seen < TOKENS; seen += 97) {
        int32_t at = 11 + (int32_t)seen - 1, positions[] = {at, at, at, at};
        question a = whole(1, 4, KV_HEADS, q);
        ask_range(&f, a, 0, seen, output[0], lse[0]);
        a.positions = positions;
        a.o.causal = 1;
        ask_range(&f, a, 0, TOKENS, output[1], lse[1]);
        assert_near(output[1], output[0], ELEMENTS, f32_error);
        assert_near(lse[1], lse[0], ROWS, f32_error);
    }
    free_fixture(&f);
    free(q);
}

static void values_that_are_no_numbers_stay_so(void **state)
{
    float *q = random_queries(ELEMENTS, 1), output[2][ELEMENTS], lse[2][ROWS];
    fixture f = make_fixture(DICT, TOKENS, 0);
    question a = whole(1, 4, KV_HEADS, q);

    (void)state;
    ask_range(&f, a, 0, TOKENS, output[0], lse[0]);
    q[5] = NAN;
    q[KV_HEADS * HEAD_DIM] = INFINITY;
    ask_range(&f, a, 0, TOKENS, output[1], lse[1]);
    assert_true(isnan(output[1][0]) && isnan(lse[1][0]) && isnan(output[1][KV_HEADS * HEAD_DIM]));
    assert_memory_equal(output[1] + HEAD_DIM, output[0] + HEAD_DIM, HEAD_DIM * sizeof *q); /* other heads do not mind */
    free_fixture(&f);
    free(q);
}

#ifdef XKV_EMULATED_PLUGIN

/* --- Only on a device --- */

/* Beside the CPU's own answer from the same coefficients, within what the header promises, whatever kernels OpenBLAS
 * has; for many queries: more than are attended to at a time. */
static void a_device_agrees_with_the_cpu(void **state)
{
    enum { QUERIES = 11, HEADS = 3 * KV_HEADS, COUNT = QUERIES * HEADS };
    float *q = random_queries(COUNT * HEAD_DIM, 2), *one = calloc(COUNT * HEAD_DIM, sizeof *one);
    float *two = calloc(COUNT * HEAD_DIM, sizeof *two), lse[2][COUNT];

    (void)state;
    for (int profile = 0; profile < PROFILES; profile++) {
        fixture f = make_fixture(profile, TOKENS, 0);
        question a = whole(3, QUERIES, HEADS, q);
        xkv_attention *attention = open_attention(f.ctx, f.p.entry, &a, XKV_HOLD_COEFFICIENTS);
        xkv_queries queries = {.data = q, .count = QUERIES, .heads = HEADS};
        assert_ok(f.ctx, xkv_attend(f.ctx, attention, 3, &queries, NULL, one, lse[0]));
        assert_ok(f.ctx, attend(f.ctx, attention, 3, &queries, NULL, two, lse[1]));
        assert_near(two, one, COUNT * HEAD_DIM, 1e-5);
        assert_near(lse[1], lse[0], COUNT, 1e-5);
        xkv_attention_close(f.ctx, attention);
        free_fixture(&f);
    }
    free(q);
    free(one);
    free(two);
}

/* As graphs need it: what a call puts on its stream are kernels, and nothing else is asked of the runtime. */
static void a_call_allocates_nothing_and_waits_for_nothing(void **state)
{
    float *q = random_queries(9 * KV_HEADS * HEAD_DIM, 1), output[9 * ELEMENTS], lse[9 * ROWS];
    fixture f = make_fixture(DICT_CROSS, TOKENS, 0);
    question a = whole(1, 9, KV_HEADS, q);
    xkv_attention *attention = open_attention(f.ctx, f.p.entry, &a, XKV_HOLD_COEFFICIENTS);
    xkv_queries queries = {.data = q, .count = 9, .heads = KV_HEADS};
    xkv_device_dict *dict = NULL;
    xkv_device_attention *copy = NULL, *whole_copy = NULL;
    xkv_device_attention_info info, more;
    void *stream;

    (void)state;
    assert_ok(f.ctx, xkv_device_dict_create(f.ctx, device, f.t.dict, &dict));
    assert_ok(f.ctx, xkv_device_attention_create(f.ctx, device, attention, dict, &copy));
    assert_ok(f.ctx, xkv_device_attention_create(f.ctx, device, attention, NULL, &whole_copy));
    xkv_attention_close(f.ctx, attention); /* which is not needed any more */
    xkv_device_attention_get_info(copy, &info);
    xkv_device_attention_get_info(whole_copy, &more);
    assert_true(more.held_bytes > info.held_bytes && more.workspace_bytes == info.workspace_bytes);
    assert_true(device->api->stream_create(device->plug, &stream) == XKV_OK);
    call c = make_call(xkv_entry_geometry(f.p.entry), 1, &queries, info.workspace_bytes);
    for (int turn = 0; turn < 2; turn++) {
        if (control)
            control->capturing = 1;
        assert_ok(f.ctx, xkv_device_attend(f.ctx, turn ? whole_copy : copy, 1, &c.q, NULL, stream, c.workspace,
                                           c.results, c.results + c.outputs + 16));
        if (control)
            control->capturing = 0;
    }
    device->api->stream_destroy(device->plug, stream); /* which waits */
    end_call(&c, output, lse);
    xkv_device_attention_free(f.ctx, copy);
    xkv_device_attention_free(f.ctx, whole_copy);
    xkv_device_dict_free(f.ctx, dict);
    free_fixture(&f);
    free(q);
}

static void wrong_calls_on_a_device_are_refused(void **state)
{
    float *q = random_queries(ELEMENTS, 1), *there = device_alloc(4096);
    fixture f = make_fixture(SVDQ, TOKENS, 0);
    question a = whole(1, 1, KV_HEADS, q);
    xkv_attention *nothing = open_attention(f.ctx, f.p.entry, &a, XKV_HOLD_NOTHING);
    xkv_attention *rows = open_attention(f.ctx, f.p.entry, &a, XKV_HOLD_ROWS);
    xkv_queries queries = {.data = there, .count = 1, .heads = KV_HEADS};
    xkv_device_attention *copy = NULL;

    (void)state;
    assert_int_equal(xkv_device_attention_create(f.ctx, device, nothing, NULL, &copy), XKV_ERROR_ARGUMENT);
    assert_ok(f.ctx, xkv_device_attention_create(f.ctx, device, rows, NULL, &copy));
    assert_int_equal(xkv_device_attend(f.ctx, copy, LAYERS, &queries, NULL, NULL, there, there, there),
                     XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_device_attend(f.ctx, copy, 1, &queries, NULL, NULL, NULL, there, there), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_device_attend(f.ctx, copy, 1, &queries, NULL, NULL, there + 1, there, there),
                     XKV_ERROR_ARGUMENT);
    queries.head_stride = 6;
    assert_int_equal(xkv_device_attend(f.ctx, copy, 1, &queries, NULL, NULL, there, there, there), XKV_ERROR_ARGUMENT);
    xkv_device_attention_free(f.ctx, copy);
    xkv_attention_close(f.ctx, nothing);
    xkv_attention_close(f.ctx, rows);
    free_fixture(&f);
    device_free(there);
    free(q);
}

/* Whichever call of the runtime fails: a status, and nothing is left behind. */
static void any_call_of_the_runtime_may_fail(void **state)
{
    float *q = random_queries(ELEMENTS, 1);
    fixture f = make_fixture(DICT, 130, 0);
    question a = whole(1, 1, KV_HEADS, q);
    xkv_device_attention *copy = NULL;
    uint64_t calls, blocks;

    (void)state;
    if (!control)
        skip();
    a.count = 130;
    xkv_attention *attention = open_attention(f.ctx, f.p.entry, &a, XKV_HOLD_COEFFICIENTS);
    blocks = control->blocks;
    calls = control->calls;
    assert_ok(f.ctx, xkv_device_attention_create(f.ctx, device, attention, NULL, &copy));
    calls = control->calls - calls;
    xkv_device_attention_free(f.ctx, copy);
    for (uint64_t at = 1; at <= calls; at++) {
        control->error = at % 2 ? cudaErrorInvalidValue : cudaErrorMemoryAllocation;
        control->fail_at = control->calls + at;
        xkv_status status = xkv_device_attention_create(f.ctx, device, attention, NULL, &copy);
        control->fail_at = 0;
        assert_true(status == XKV_OK || status == XKV_ERROR_BACKEND || status == XKV_ERROR_MEMORY);
        if (status == XKV_OK)
            xkv_device_attention_free(f.ctx, copy);
        assert_true(control->blocks <= blocks + 2); /* giving back may be what failed */
        blocks = control->blocks;
    }
    xkv_attention_close(f.ctx, attention);
    free_fixture(&f);
    free(q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_codecs_are_within_the_error),
        cmocka_unit_test(heads_share_kv_heads),
        cmocka_unit_test(mla_attends_to_the_latent),
        cmocka_unit_test(rows_of_blocks),
        cmocka_unit_test(masks_and_soft_caps),
        cmocka_unit_test(rows_at_other_positions),
        cmocka_unit_test(any_range_of_tokens),
        cmocka_unit_test(entries_that_extend_another),
        cmocka_unit_test(queries_may_lie_anywhere),
        cmocka_unit_test(parts_merge_to_the_whole),
        cmocka_unit_test(merging_by_hand),
        cmocka_unit_test(one_visible_row_is_the_answer),
        cmocka_unit_test(causal_is_full_with_fewer_rows),
        cmocka_unit_test(values_that_are_no_numbers_stay_so),
        cmocka_unit_test(a_device_agrees_with_the_cpu),
        cmocka_unit_test(a_call_allocates_nothing_and_waits_for_nothing),
        cmocka_unit_test(wrong_calls_on_a_device_are_refused),
        cmocka_unit_test(any_call_of_the_runtime_may_fail),
    };

    if (!find_device())
        return 77;
    return cmocka_run_group_tests(tests, open_the_device, NULL);
}

#else

/* --- Threads, memory, failures --- */

static void threads_change_no_bit(void **state)
{
    enum { LONG = 3000 };
    float *q = random_queries(ELEMENTS, 1), output[2][ELEMENTS], lse[2][ROWS];

    (void)state;
    for (int profile = 0; profile < PROFILES; profile++) {
        fixture f = make_fixture(profile, LONG, 0);
        question a = whole(1, 4, KV_HEADS, q);
        a.count = LONG;
        for (uint32_t hold = XKV_HOLD_NOTHING; hold <= XKV_HOLD_ROWS; hold++)
            for (uint32_t threads = 1; threads <= 5; threads += 2) {
                xkv_ctx *ctx = new_ctx(threads);
                xkv_attention *attention = open_attention(ctx, f.p.entry, &a, hold);
                int which = threads > 1;
                assert_ok(ctx, ask(ctx, attention, &a, output[which], lse[which]));
                xkv_attention_close(ctx, attention);
                xkv_ctx_free(ctx);
                if (which) {
                    assert_memory_equal(output[0], output[1], sizeof output[0]);
                    assert_memory_equal(lse[0], lse[1], sizeof lse[0]);
                }
            }
        free_fixture(&f);
    }
    free(q);
}

/* One attention for several threads, each with a context of its own. */
typedef struct sharer {
    const xkv_attention *attention;
    const question *a;
    float output[ELEMENTS], lse[ROWS];
} sharer;

static void *share(void *user)
{
    sharer *s = user;
    xkv_ctx *ctx = new_ctx(1);

    for (int i = 0; i < 5; i++)
        assert_ok(ctx, ask(ctx, s->attention, s->a, s->output, s->lse));
    xkv_ctx_free(ctx);
    return NULL;
}

static void an_attention_is_shared(void **state)
{
    float *q = random_queries(ELEMENTS, 1);
    fixture f = make_fixture(DICT_CROSS, TOKENS, 0);
    question a = whole(1, 4, KV_HEADS, q);

    (void)state;
    for (uint32_t hold = XKV_HOLD_NOTHING; hold <= XKV_HOLD_ROWS; hold++) {
        xkv_attention *attention = open_attention(f.ctx, f.p.entry, &a, hold);
        sharer s[3] = {{attention, &a, {0}, {0}}, {attention, &a, {0}, {0}}, {attention, &a, {0}, {0}}};
        pthread_t threads[3];
        for (int i = 0; i < 3; i++)
            assert_int_equal(pthread_create(&threads[i], NULL, share, &s[i]), 0);
        for (int i = 0; i < 3; i++)
            pthread_join(threads[i], NULL);
        for (int i = 1; i < 3; i++)
            assert_memory_equal(s[0].output, s[i].output, sizeof s[0].output);
        xkv_attention_close(f.ctx, attention);
    }
    free_fixture(&f);
    free(q);
}

/* Scratch does not grow with the tokens, and is far below the rows: what holding nothing is for. */
static void memory_does_not_follow_the_tokens(void **state)
{
    float *q = random_queries(ELEMENTS, 1), output[ELEMENTS], lse[ROWS];
    uint64_t peaks[2];

    (void)state;
    for (int i = 0; i < 2; i++) {
        uint32_t tokens = i ? 6000 : 1500;
        fixture f = make_fixture(DICT, tokens, 0);
        question a = whole(1, 1, KV_HEADS, q);
        xkv_ctx *ctx = new_ctx(1);
        xkv_attention *attention;
        a.count = tokens;
        attention = open_attention(ctx, f.p.entry, &a, XKV_HOLD_NOTHING);
        assert_ok(ctx, ask(ctx, attention, &a, output, lse));
        xkv_attention_close(ctx, attention);
        peaks[i] = xkv_ctx_memory_peak(ctx);
        assert_int_equal(xkv_ctx_memory_used(ctx), 0);
        xkv_ctx_free(ctx);
        free_fixture(&f);
    }
    assert_true(peaks[1] < peaks[0] + 16384);
    free(q);
}

/* With any limit either the same bits or LIMIT, and nothing left behind. */
static void a_memory_limit_is_kept(void **state)
{
    float *q = random_queries(ELEMENTS, 1), output[2][ELEMENTS], lse[ROWS];
    fixture f = make_fixture(DICT_CROSS, TOKENS, 0);
    question a = whole(1, 4, KV_HEADS, q);
    xkv_queries queries = {.data = q, .count = 4, .heads = KV_HEADS};

    (void)state;
    for (uint32_t hold = XKV_HOLD_NOTHING; hold <= XKV_HOLD_ROWS; hold++) {
        xkv_attention *whole_one = open_attention(f.ctx, f.p.entry, &a, hold);
        xkv_status status = XKV_ERROR_LIMIT;
        assert_ok(f.ctx, ask(f.ctx, whole_one, &a, output[0], lse));
        xkv_attention_close(f.ctx, whole_one);
        for (uint64_t limit = 1000; status != XKV_OK; limit += limit / 3) {
            xkv_ctx_options o = xkv_ctx_options_default();
            xkv_attention_options open = xkv_attention_options_default();
            xkv_attention *attention = NULL;
            xkv_ctx *ctx;
            o.threads = 1;
            o.memory_limit = limit;
            open.hold = hold;
            assert_int_equal(xkv_ctx_create(&o, &ctx), XKV_OK);
            status = xkv_attention_open(ctx, f.p.entry, &open, &attention);
            if (status == XKV_OK)
                status = xkv_attend(ctx, attention, 1, &queries, NULL, output[1], lse);
            assert_true(status == XKV_OK || status == XKV_ERROR_LIMIT);
            xkv_attention_close(ctx, attention);
            assert_int_equal(xkv_ctx_memory_used(ctx), 0);
            xkv_ctx_free(ctx);
        }
        assert_memory_equal(output[0], output[1], sizeof output[0]);
    }
    free_fixture(&f);
    free(q);
}

/* An input that at its n-th read fails, or cancels the call. */
typedef struct trouble {
    const xkv_input *input;
    xkv_ctx *cancel;
    long at, reads;
} trouble;

static xkv_status troubled_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    trouble *t = user;
    long read = __atomic_add_fetch(&t->reads, 1, __ATOMIC_SEQ_CST);

    if (read == t->at && t->cancel)
        xkv_ctx_cancel(t->cancel);
    return read == t->at && !t->cancel ? XKV_ERROR_IO : t->input->read(t->input->user, ctx, offset, dst, size);
}

/* Open, attend, close, with trouble at the n-th read of these. */
static xkv_status troubled_call(const fixture *f, uint32_t hold, long at, int cancel, long *reads)
{
    float *q = random_queries(ELEMENTS, 1), output[ELEMENTS], lse[ROWS];
    question a = whole(1, 4, KV_HEADS, q);
    xkv_attention_options o = xkv_attention_options_default();
    xkv_ctx *ctx = new_ctx(1);
    trouble t = {.input = &f->p.input};
    xkv_input input = {.user = &t, .size = f->p.input.size, .read = troubled_read};
    xkv_attention *attention = NULL;
    xkv_entry *entry;
    xkv_status status;

    assert_ok(ctx, xkv_entry_open(ctx, &input, &entry));
    if (f->t.dict)
        assert_ok(ctx, xkv_entry_attach(ctx, entry, f->t.dict));
    t.reads = 0;
    t.at = at;
    t.cancel = cancel ? ctx : NULL;
    o.hold = hold;
    status = xkv_attention_open(ctx, entry, &o, &attention);
    if (status == XKV_OK)
        status = ask(ctx, attention, &a, output, lse);
    *reads = t.reads;
    xkv_attention_close(ctx, attention);
    xkv_entry_close(ctx, entry);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    xkv_ctx_free(ctx);
    free(q);
    return status;
}

static void any_read_may_fail_or_be_the_last(void **state)
{
    (void)state;
    for (int profile = 0; profile < PROFILES; profile++) {
        fixture f = make_fixture(profile, TOKENS, 0);
        for (uint32_t hold = XKV_HOLD_NOTHING; hold <= XKV_HOLD_ROWS; hold++) {
            long reads, unused;
            assert_int_equal(troubled_call(&f, hold, 0, 0, &reads), XKV_OK);
            for (long at = 1; at <= reads; at++) {
                xkv_status status = troubled_call(&f, hold, at, 1, &unused);
                assert_int_equal(troubled_call(&f, hold, at, 0, &unused), XKV_ERROR_IO);
                assert_true(status == XKV_ERROR_CANCELLED || at + 1 >= reads); /* in the last chunk: too late */
            }
        }
        free_fixture(&f);
    }
}

/* A window over the last rows leaves most of the chunks alone. */
static void what_is_not_seen_is_not_read(void **state)
{
    static const int32_t positions[] = {11 + TOKENS - 1};
    float *q = random_queries(ELEMENTS, 1), output[ELEMENTS], lse[ROWS];
    fixture f = make_fixture(LOSSLESS, TOKENS, 0);
    trouble t = {.input = &f.p.input};
    xkv_input input = {.user = &t, .size = f.p.input.size, .read = troubled_read};
    question a = whole(1, 1, KV_HEADS, q);
    xkv_attention *attention;
    xkv_entry *entry;
    long all;

    (void)state;
    a.positions = positions;
    a.o.causal = 1;
    assert_ok(f.ctx, xkv_entry_open(f.ctx, &input, &entry));
    attention = open_attention(f.ctx, entry, &a, XKV_HOLD_NOTHING);
    t.reads = 0;
    assert_ok(f.ctx, ask(f.ctx, attention, &a, output, lse));
    all = t.reads;
    a.o.window = 100; /* the last 2 of 11 chunks */
    t.reads = 0;
    assert_ok(f.ctx, ask(f.ctx, attention, &a, output, lse));
    assert_true(all >= 11 && t.reads * 11 == all * 2);
    xkv_attention_close(f.ctx, attention);
    xkv_entry_close(f.ctx, entry);
    free_fixture(&f);
    free(q);
}

static void a_cancelled_context_does_nothing(void **state)
{
    float *q = random_queries(ELEMENTS, 1), output[ELEMENTS], lse[ROWS];
    fixture f = make_fixture(DICT, TOKENS, 0);
    question a = whole(1, 4, KV_HEADS, q);
    xkv_attention *attention = open_attention(f.ctx, f.p.entry, &a, XKV_HOLD_COEFFICIENTS);

    (void)state;
    xkv_ctx_cancel(f.ctx);
    assert_int_equal(ask(f.ctx, attention, &a, output, lse), XKV_ERROR_CANCELLED);
    xkv_ctx_reset(f.ctx);
    assert_int_equal(ask(f.ctx, attention, &a, output, lse), XKV_OK);
    xkv_attention_close(f.ctx, attention);
    free_fixture(&f);
    free(q);
}

/* --- Arguments and choices --- */

static void assert_refused(const fixture *f, const xkv_attention *attention, const question *a, uint32_t layer,
                           const xkv_attend_options *o, const char *text)
{
    xkv_queries q = {.data = a->q, .count = a->queries, .heads = a->heads, .positions = a->positions};
    float output[ELEMENTS], lse[ROWS];

    assert_int_equal(xkv_attend(f->ctx, attention, layer, &q, o, output, lse), XKV_ERROR_ARGUMENT);
    assert_non_null(strstr(xkv_ctx_error(f->ctx), text));
}

static void wrong_calls_are_refused(void **state)
{
    float *q = random_queries(ELEMENTS, 1);
    fixture f = make_fixture(DICT, TOKENS, 0), mla = make_fixture(LOSSLESS, 10, 1);
    question a = whole(1, 4, KV_HEADS, q), odd = whole(1, 1, 3, q), all = {.count = 10};
    xkv_attention *attention = open_attention(f.ctx, f.p.entry, &a, XKV_HOLD_NOTHING);
    xkv_attention *latent = open_attention(f.ctx, mla.p.entry, &all, XKV_HOLD_NOTHING), *other;
    xkv_attention_options o = xkv_attention_options_default();
    xkv_attend_options w = xkv_attend_options_default();

    (void)state;
    assert_refused(&f, attention, &a, LAYERS, NULL, "layer 4");
    assert_refused(&f, attention, &odd, 1, NULL, "multiple of the 2 KV heads");
    assert_refused(&f, latent, &odd, 1, NULL, "no default");
    w.window = 5;
    assert_refused(&f, attention, &a, 1, &w, "window");
    w.causal = 1;
    assert_refused(&f, attention, &a, 1, &w, "positions");
    w = xkv_attend_options_default();
    w.scale = -1;
    assert_refused(&f, attention, &a, 1, &w, "scale");
    w.scale = INFINITY;
    assert_refused(&f, attention, &a, 1, &w, "scale");
    w.scale = 1;
    w.softcap = NAN;
    assert_refused(&f, attention, &a, 1, &w, "softcap");
    o.first_token = TOKENS + 1;
    assert_int_equal(xkv_attention_open(f.ctx, f.p.entry, &o, &other), XKV_ERROR_ARGUMENT);
    o = xkv_attention_options_default();
    o.first_layer = o.layer_count = LAYERS;
    assert_int_equal(xkv_attention_open(f.ctx, f.p.entry, &o, &other), XKV_ERROR_ARGUMENT);
    o = xkv_attention_options_default();
    o.hold = XKV_HOLD_ROWS + 1;
    assert_int_equal(xkv_attention_open(f.ctx, f.p.entry, &o, &other), XKV_ERROR_ARGUMENT);
    xkv_attention_close(f.ctx, attention);
    xkv_attention_close(f.ctx, latent);
    free_fixture(&mla);
    free_fixture(&f);
    free(q);
}

static void a_dictionary_is_missed(void **state)
{
    fixture f = make_fixture(DICT_CROSS, TOKENS, 0);
    xkv_attention *attention;
    xkv_entry *bare;

    (void)state;
    assert_ok(f.ctx, xkv_entry_open(f.ctx, &f.p.input, &bare));
    for (uint32_t hold = XKV_HOLD_AUTO; hold <= XKV_HOLD_ROWS; hold++) {
        xkv_attention_options o = xkv_attention_options_default();
        o.hold = hold;
        assert_int_equal(xkv_attention_open(f.ctx, bare, &o, &attention), XKV_ERROR_MISMATCH);
    }
    xkv_entry_close(f.ctx, bare);
    free_fixture(&f);
}

static uint32_t chosen(const fixture *f, uint32_t calls, uint64_t most)
{
    xkv_attention_options o = xkv_attention_options_default();
    xkv_attention_info info;
    xkv_attention *attention;

    o.first_layer = 1;
    o.layer_count = 1;
    o.calls = calls;
    o.memory = most;
    assert_ok(f->ctx, xkv_attention_open(f->ctx, f->p.entry, &o, &attention));
    xkv_attention_get_info(attention, &info);
    xkv_attention_close(f->ctx, attention);
    assert_true(info.token_count == TOKENS && info.first_layer == 1 && info.layer_count == 1);
    if (info.hold == XKV_HOLD_ROWS)
        assert_int_equal(info.held_bytes, 2 * TOKENS * KV_HEADS * HEAD_DIM * 2);
    assert_true((info.held_bytes == 0) == (info.hold == XKV_HOLD_NOTHING));
    assert_true(most == 0 || info.held_bytes <= most);
    return info.hold;
}

static void auto_follows_calls_and_memory(void **state)
{
    fixture f = make_fixture(DICT, TOKENS, 0);

    (void)state;
    assert_int_equal(chosen(&f, 0, 0), XKV_HOLD_ROWS);
    assert_int_equal(chosen(&f, 2, 1 << 20), XKV_HOLD_ROWS);
    assert_int_equal(chosen(&f, 1, 0), XKV_HOLD_COEFFICIENTS);
    assert_int_equal(chosen(&f, 0, 100000), XKV_HOLD_COEFFICIENTS);
    assert_int_equal(chosen(&f, 0, 10000), XKV_HOLD_NOTHING);
    assert_int_equal(chosen(&f, 1, 10000), XKV_HOLD_NOTHING);
    free_fixture(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_codecs_are_within_the_error),
        cmocka_unit_test(heads_share_kv_heads),
        cmocka_unit_test(mla_attends_to_the_latent),
        cmocka_unit_test(rows_of_blocks),
        cmocka_unit_test(masks_and_soft_caps),
        cmocka_unit_test(rows_at_other_positions),
        cmocka_unit_test(any_range_of_tokens),
        cmocka_unit_test(entries_that_extend_another),
        cmocka_unit_test(queries_may_lie_anywhere),
        cmocka_unit_test(parts_merge_to_the_whole),
        cmocka_unit_test(merging_by_hand),
        cmocka_unit_test(one_visible_row_is_the_answer),
        cmocka_unit_test(causal_is_full_with_fewer_rows),
        cmocka_unit_test(threads_change_no_bit),
        cmocka_unit_test(an_attention_is_shared),
        cmocka_unit_test(memory_does_not_follow_the_tokens),
        cmocka_unit_test(a_memory_limit_is_kept),
        cmocka_unit_test(any_read_may_fail_or_be_the_last),
        cmocka_unit_test(what_is_not_seen_is_not_read),
        cmocka_unit_test(a_cancelled_context_does_nothing),
        cmocka_unit_test(wrong_calls_are_refused),
        cmocka_unit_test(a_dictionary_is_missed),
        cmocka_unit_test(values_that_are_no_numbers_stay_so),
        cmocka_unit_test(auto_follows_calls_and_memory),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}

#endif
