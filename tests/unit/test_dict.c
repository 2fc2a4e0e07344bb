/* Profiles dict and scalar, and training: reconstruction and metric against fp64 from the stored numbers, targets,
 * ranges, fallbacks, wrong and damaged dictionaries. */
#include "support.h"

#include "dict.h"
#include "entry_internal.h"
#include "parts.h"
#include "rans.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- Samples ------------------------------------------------------------------------------------------------------ */

/* Three layers in groups of two, so that the last group is smaller. */
static synthetic_options sample_options(uint32_t tokens)
{
    return (synthetic_options){.layers = 3,
                               .tokens = tokens,
                               .heads = 2,
                               .head_dim = 8,
                               .dtype = XKV_F32,
                               .rank = 6,
                               .group_layers = 2,
                               .noise = 0.1,
                               .mean = 1.5,
                               .rope = 1};
}

static synthetic sample(uint32_t tokens, uint32_t dtype, uint64_t seed)
{
    synthetic_options o = sample_options(tokens);

    o.dtype = dtype;
    o.seed = seed;
    return make_synthetic(&o);
}

typedef struct metric {
    xkv_metric m;
    float *k, *v;
} metric;

/* Symmetric positive definite blocks: A A^T + 0.3. */
static void random_blocks(float *m, uint32_t count, uint32_t n, uint64_t seed)
{
    double *a = malloc(n * n * sizeof *a);

    for (uint32_t b = 0; b < count; b++, m += n * n) {
        for (uint32_t i = 0; i < n * n; i++)
            a[i] = test_normal(&seed);
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t k = 0; k < n; k++) {
                double sum = i == k ? 0.3 : 0;
                for (uint32_t j = 0; j < n; j++)
                    sum += a[i * n + j] * a[k * n + j];
                m[i * n + k] = (float)sum;
            }
    }
    free(a);
}

static metric make_metric(uint32_t layers, uint32_t heads, uint32_t head_dim)
{
    size_t n = (size_t)layers * heads * head_dim * head_dim;
    metric m = {.k = malloc(n * sizeof(float)), .v = malloc(n * sizeof(float))};

    random_blocks(m.k, layers * heads, head_dim, 5);
    random_blocks(m.v, layers * heads, head_dim, 6);
    m.m = (xkv_metric){layers, heads, head_dim, m.k, m.v};
    return m;
}

static void free_metric(metric *m)
{
    free(m->k);
    free(m->v);
}

/* Every test runs without and with a cross stage: set_up() says how many coefficients of each group it takes. */
static uint32_t leading;

static int set_up(void **state)
{
    leading = *(const uint32_t *)*state;
    return 0;
}

/* Where the groups that have planes start. */
static uint32_t first_group(const xkv_container *c)
{
    return c->groups[0].codec == XKV_GROUP_CROSS;
}

typedef struct trained {
    memory m;
    xkv_dict *dict;
} trained;

static trained train(xkv_ctx *ctx, const synthetic *s, const xkv_train_options *given)
{
    xkv_train_options o = given ? *given : xkv_train_options_default();
    trained t = {{0}, NULL};
    memory *m = calloc(1, sizeof *m);
    xkv_input input;

    if (!given)
        o.group_layers = 2;
    o.cross = leading;
    assert_ok(ctx, train_on(ctx, &s, 1, &o, m));
    t.m = *m;
    free(m);
    input = xkv_input_from_memory(t.m.data, t.m.size);
    assert_ok(ctx, xkv_dict_open(ctx, &input, 1, &t.dict));
    return t;
}

static void free_trained(xkv_ctx *ctx, trained *t)
{
    xkv_dict_close(ctx, t->dict);
    memory_free(&t->m);
}

static xkv_pack_options dict_options(const xkv_dict *dict)
{
    xkv_pack_options o = xkv_pack_options_default();

    o.profile = XKV_PROFILE_DICT;
    o.dict = dict;
    return o;
}

static xkv_pack_options scalar_options(double error)
{
    xkv_pack_options o = xkv_pack_options_default();

    o.profile = XKV_PROFILE_SCALAR;
    o.error = error;
    return o;
}

/* --- Oracle: spec/dictionary.md in fp64 --------------------------------------------------------------------------- */

/* One group's basis as stored. */
typedef struct oracle {
    uint32_t width, rank;
    double *mu, *u;       /* [width], [rank][width] */
    double *w, *inverse;  /* [width][width] */
    double *mean, *basis; /* m [width], b [rank][width] */
} oracle;

/* x = row a, a [n][n]. */
static void times(const double *row, const double *a, uint32_t n, double *x)
{
    for (uint32_t i = 0; i < n; i++) {
        x[i] = 0;
        for (uint32_t k = 0; k < n; k++)
            x[i] += row[k] * a[k * n + i];
    }
}

/* Gauss-Jordan with pivots. */
static void invert(const double *matrix, uint32_t n, double *inverse)
{
    double *a = malloc(n * n * sizeof *a);

    memcpy(a, matrix, n * n * sizeof *a);
    for (uint32_t i = 0; i < n * n; i++)
        inverse[i] = i % (n + 1) == 0;
    for (uint32_t c = 0; c < n; c++) {
        uint32_t best = c;
        for (uint32_t r = c; r < n; r++)
            best = fabs(a[r * n + c]) > fabs(a[best * n + c]) ? r : best;
        for (uint32_t k = 0; k < n; k++) {
            double x = a[c * n + k], y = inverse[c * n + k];
            a[c * n + k] = a[best * n + k];
            a[best * n + k] = x;
            inverse[c * n + k] = inverse[best * n + k];
            inverse[best * n + k] = y;
        }
        double pivot = a[c * n + c];
        for (uint32_t k = 0; k < n; k++) {
            a[c * n + k] /= pivot;
            inverse[c * n + k] /= pivot;
        }
        for (uint32_t r = 0; r < n; r++) {
            double f = r == c ? 0 : a[r * n + c];
            for (uint32_t k = 0; k < n && f != 0; k++) {
                a[r * n + k] -= f * a[c * n + k];
                inverse[r * n + k] -= f * inverse[c * n + k];
            }
        }
    }
    free(a);
}

static void read_blocks(const xkv_container *c, const xkv_group *g, const uint8_t *p, double *w)
{
    uint32_t at = 0;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *plane = &c->geometry.planes[g->planes[i]];
        uint32_t n = plane->head_dim;
        for (uint32_t h = 0; h < plane->heads; h++, at += n) {
            double scale = (double)xkv_loadf32(p);
            p += 4;
            for (uint32_t r = 0; r < n; r++)
                for (uint32_t k = 0; k < n; k++, p += 2)
                    w[(at + r) * g->width + at + k] = scale * test_from_half(xkv_load16(p));
        }
    }
}

/* Components [r][n] of a dictionary's group, whose header has their d at `d` and their tables at `tables`. */
static double *read_components(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c, const xkv_group *g,
                               uint32_t n, const uint8_t *d, const uint8_t *tables)
{
    uint32_t r = g->rank;
    uint8_t *stream = malloc(g->parts[1].size + 1);
    int16_t *q = calloc((size_t)r * n, sizeof *q);
    double *u = malloc((size_t)r * n * sizeof *u);
    xkv_rans_shape shape = {n, r, n, tables};

    assert_ok(ctx, xkv_container_read_part(ctx, input, c, &g->parts[1], stream));
    assert_ok(ctx, xkv_rans_decode(ctx, xkv_coder_cpu_generic(), &shape, stream, g->parts[1].size, "stream", q));
    for (uint32_t j = 0; j < r; j++)
        for (uint32_t i = 0; i < n; i++)
            u[j * n + i] = q[j * n + i] * (double)xkv_loadf32(d + 4 * j);
    free(stream);
    free(q);
    return u;
}

static oracle read_basis(xkv_ctx *ctx, const memory *m, uint32_t group)
{
    xkv_input input = xkv_input_from_memory(m->data, m->size);
    xkv_container c;
    oracle o = {0};
    uint8_t *header = NULL;

    assert_ok(ctx, xkv_container_read(ctx, &input, XKV_KIND_DICTIONARY, &c));
    const xkv_group *g = &c.groups[group];
    uint32_t n = o.width = g->width, r = o.rank = g->rank;
    assert_ok(ctx, xkv_read_matrix(ctx, &input, &c, g, 0, "header", &header));
    o.mu = malloc(n * sizeof *o.mu);
    o.mean = malloc(n * sizeof *o.mean);
    o.basis = malloc((size_t)r * n * sizeof *o.basis);
    o.w = calloc((size_t)n * n, sizeof *o.w);
    o.inverse = malloc((size_t)n * n * sizeof *o.inverse);
    for (uint32_t i = 0; i < n; i++)
        o.mu[i] = (double)xkv_loadf32(header + 4 * i);
    o.u = read_components(ctx, &input, &c, g, n, header + 4 * n + 4 * r, header + 4 * n + 8 * r);
    read_blocks(&c, g, header + 4 * n + 9 * r, o.w);
    invert(o.w, n, o.inverse);
    times(o.mu, o.inverse, n, o.mean);
    for (uint32_t j = 0; j < r; j++)
        times(o.u + j * n, o.inverse, n, o.basis + j * n);
    xkv_release(ctx, header);
    xkv_container_free(ctx, &c);
    return o;
}

/* The cross basis as stored. */
typedef struct cross_oracle {
    uint32_t width, rank, counts[4], place[4]; /* of the groups */
    double *p;                                 /* [rank][width] */
} cross_oracle;

static cross_oracle read_cross(xkv_ctx *ctx, const memory *m)
{
    xkv_input input = xkv_input_from_memory(m->data, m->size);
    xkv_container c;
    cross_oracle o = {0};
    uint8_t *header = NULL;

    assert_ok(ctx, xkv_container_read(ctx, &input, XKV_KIND_DICTIONARY, &c));
    const xkv_group *g = &c.groups[c.group_count - 1];
    uint32_t r = o.rank = g->rank, n = c.group_count - 1;
    assert_true(g->codec == XKV_GROUP_CROSS_BASIS && n <= 4);
    assert_ok(ctx, xkv_read_matrix(ctx, &input, &c, g, 0, "header", &header));
    for (uint32_t i = 0; i < n; i++) {
        o.counts[i] = xkv_load32(header + 4 * i);
        o.place[i] = o.width;
        o.width += o.counts[i];
    }
    o.p = read_components(ctx, &input, &c, g, o.width, header + 4 * n + 4 * r, header + 4 * n + 8 * r);
    xkv_release(ctx, header);
    xkv_container_free(ctx, &c);
    return o;
}

static void free_oracle(oracle *o)
{
    free(o->mu);
    free(o->u);
    free(o->w);
    free(o->inverse);
    free(o->mean);
    free(o->basis);
}

/* Row t of a group in `data`, K before RoPE. */
static void group_row(const synthetic *s, const uint8_t *data, const xkv_group *g, uint32_t t, double *row)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        plane_row(s, data, g->planes[i], t, row);
        row += row_width(&s->planes[g->planes[i]]);
    }
}

/* The integers q[rank][tokens] of a coded group, from its parts; *step. */
static int16_t *read_integers(xkv_ctx *ctx, const packed *p, uint32_t group, double *step)
{
    const xkv_container *c = &p->entry->c;
    const xkv_group *g = &c->groups[group];
    uint32_t tokens = c->geometry.token_count;
    int16_t *q = calloc((size_t)g->rank * tokens, sizeof *q);
    uint8_t *side = NULL;

    assert_ok(ctx, xkv_read_matrix(ctx, &p->input, c, g, 0, "side", &side));
    *step = (double)xkv_loadf32(side);
    for (uint32_t i = 0; i < c->chunk_count; i++) {
        const xkv_part *part = &g->parts[2 + i];
        uint32_t t0 = i * c->chunk_tokens, t1 = t0 + c->chunk_tokens, end = tokens - c->window;
        uint8_t *stream = malloc(part->size + 1);
        t0 = t0 < c->sinks ? c->sinks : t0;
        t1 = t1 > end ? end : t1;
        if (t0 < t1) {
            const uint8_t *tables = side + (g->codec == XKV_GROUP_SCALAR ? 8 + 4 * g->plane_count + 2 * g->width : 8);
            xkv_rans_shape shape = {t1 - t0, g->rank, tokens, tables};
            assert_ok(ctx, xkv_container_read_part(ctx, &p->input, c, part, stream));
            assert_ok(ctx, xkv_rans_decode(ctx, xkv_coder_cpu_generic(), &shape, stream, part->size, "chunk", q + t0));
        }
        free(stream);
    }
    xkv_release(ctx, side);
    return q;
}

/* --- Reconstruction ----------------------------------------------------------------------------------------------- */

/* Coefficients [rank][tokens] of the group-th group with planes: its own, and the share of the cross stage. */
static double *read_coefficients(xkv_ctx *ctx, const trained *t, const packed *p, uint32_t group)
{
    const xkv_container *c = &p->entry->c;
    uint32_t tokens = c->geometry.token_count, first = first_group(c), rank = c->groups[first + group].rank;
    double step, cross_step;
    int16_t *q = read_integers(ctx, p, first + group, &step);
    double *a = malloc((size_t)rank * tokens * sizeof *a);

    for (size_t i = 0; i < (size_t)rank * tokens; i++)
        a[i] = q[i] * step;
    free(q);
    if (first == 0)
        return a;
    cross_oracle o = read_cross(ctx, &t->m);
    q = read_integers(ctx, p, 0, &cross_step);
    assert_true(o.rank == c->groups[0].rank && o.counts[group] == leading);
    for (uint32_t j = 0; j < o.counts[group]; j++)
        for (uint32_t i = 0; i < tokens; i++) {
            assert_true(a[j * tokens + i] == 0); /* an encoder codes no such component itself */
            for (uint32_t k = 0; k < o.rank; k++)
                a[j * tokens + i] += q[k * tokens + i] * cross_step * o.p[k * o.width + o.place[group] + j];
        }
    free(o.p);
    free(q);
    return a;
}

/* Largest difference between the restored rows of a group and mean + sum a b, over the rms of the rows. */
static double reconstruction_error(xkv_ctx *ctx, const synthetic *s, const trained *t, const packed *p, uint32_t group,
                                   const uint8_t *data)
{
    const xkv_container *c = &p->entry->c;
    const xkv_group *g = &c->groups[first_group(c) + group];
    uint32_t n = g->width, tokens = c->geometry.token_count;
    double worst = 0, energy = 0, row[64], want[64];
    oracle o = read_basis(ctx, &t->m, group);
    double *a = read_coefficients(ctx, t, p, group);

    assert_true(n <= 64 && o.width == n && o.rank == g->rank);
    for (uint32_t i = c->sinks; i < tokens - c->window; i++) {
        group_row(s, data, g, i, row);
        memcpy(want, o.mean, n * sizeof *want);
        for (uint32_t j = 0; j < g->rank; j++)
            for (uint32_t k = 0; k < n; k++)
                want[k] += a[j * tokens + i] * o.basis[j * n + k];
        for (uint32_t k = 0; k < n; k++) {
            worst = fmax(worst, fabs(row[k] - want[k]));
            energy += want[k] * want[k];
        }
    }
    free_oracle(&o);
    free(a);
    return worst / sqrt(energy / n / (tokens - c->sinks - c->window));
}

static void rows_are_mean_plus_coefficients(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(300, XKV_F32, 1), training = sample(400, XKV_F32, 2);
    metric m = make_metric(3, 2, 8);

    (void)state;
    for (int variant = 0; variant < 4; variant++) {
        xkv_train_options to = xkv_train_options_default();
        to.group_layers = 2;
        to.apart = variant & 1;
        to.metric = variant & 2 ? &m.m : NULL;
        trained t = train(ctx, &training, &to);
        xkv_pack_options o = dict_options(t.dict);
        o.window = 3;
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *data = restore(ctx, &s, p.entry);
        uint32_t count = to.apart ? 4 : 2;
        assert_int_equal(p.report.group_count, count);
        assert_int_equal(p.report.lossless_groups, 0);
        for (uint32_t g = 0; g < count; g++)
            assert_true(reconstruction_error(ctx, &s, &t, &p, g, data) < 2e-5);
        assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
        free(data);
        free_packed(ctx, &p);
        free_trained(ctx, &t);
    }
    free_metric(&m);
    free_synthetic(&s);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

static void scalar_rows_are_mean_plus_coefficients(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(300, XKV_F32, 1);
    xkv_pack_options o = scalar_options(0.1);
    packed p = pack_planes(ctx, &s, &o);
    const xkv_container *c = &p.entry->c;
    uint8_t *data = restore(ctx, &s, p.entry);

    (void)state;
    assert_int_equal(p.report.group_count, 1); /* all three layers: the default are 4 */
    const xkv_group *g = &c->groups[0];
    double step, *want = malloc(g->width * sizeof *want), *got = malloc(g->width * sizeof *got);
    int16_t *q = read_integers(ctx, &p, 0, &step);
    uint8_t *side = NULL;
    assert_ok(ctx, xkv_read_matrix(ctx, &p.input, c, g, 0, "side", &side));
    for (uint32_t t = c->sinks; t < 300; t++) {
        group_row(&s, data, g, t, got);
        for (uint32_t i = 0; i < g->width; i++) {
            double scale = (double)xkv_loadf32(side + 8 + 4 * (i / 16));
            double mean = test_from_half(xkv_load16(side + 8 + 4 * g->plane_count + 2 * i));
            want[i] = mean + q[i * 300 + t] * step * scale;
            assert_true(fabs(want[i] - got[i]) < 1e-5 * (1 + fabs(want[i])));
        }
    }
    xkv_release(ctx, side);
    free(q);
    free(want);
    free(got);
    free(data);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Errors ------------------------------------------------------------------------------------------------------- */

/* Of one plane, over the coded tokens, K before RoPE (rotations keep lengths). */
static double plane_error(const synthetic *s, const uint8_t *data, uint32_t plane, uint32_t t0, uint32_t t1)
{
    double squares = 0, energy = 0;

    for (uint32_t t = t0; t < t1; t++)
        for (uint32_t i = 0; i < row_width(&s->planes[plane]); i++) {
            double x = element(s, s->data, plane, t, i), d = x - element(s, data, plane, t, i);
            squares += d * d;
            energy += x * x;
        }
    return sqrt(squares / energy);
}

static void assert_plane_errors(const synthetic *s, const packed *p, const uint8_t *data)
{
    const xkv_container *c = &p->entry->c;

    for (uint32_t i = 0; i < c->group_count; i++)
        for (uint32_t k = 0; k < c->groups[i].plane_count; k++) {
            double is = plane_error(s, data, c->groups[i].planes[k], c->sinks, c->geometry.token_count - c->window);
            assert_true(fabs(c->groups[i].plane_errors[k] - is) < 1e-3 * is + 1e-6);
        }
}

/* sqrt( sum |(x - y) W|^2 / sum |x W - mu|^2 ) of all groups. */
static double metric_error(xkv_ctx *ctx, const synthetic *s, const trained *t, const packed *p, const uint8_t *data)
{
    const xkv_container *c = &p->entry->c;
    double squares = 0, energy = 0, x[64], y[64], product[64];

    for (uint32_t i = first_group(c); i < c->group_count; i++) {
        const xkv_group *g = &c->groups[i];
        oracle o = read_basis(ctx, &t->m, i - first_group(c));
        for (uint32_t token = c->sinks; token < c->geometry.token_count - c->window; token++) {
            group_row(s, s->data, g, token, x);
            group_row(s, data, g, token, y);
            for (uint32_t k = 0; k < g->width; k++)
                y[k] = x[k] - y[k];
            times(y, o.w, g->width, product);
            for (uint32_t k = 0; k < g->width; k++)
                squares += product[k] * product[k];
            times(x, o.w, g->width, product);
            for (uint32_t k = 0; k < g->width; k++)
                energy += (product[k] - o.mu[k]) * (product[k] - o.mu[k]);
        }
        free_oracle(&o);
    }
    return sqrt(squares / energy);
}

static void stored_errors_are_true(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(700, XKV_F32, 1), training = sample(400, XKV_F32, 2);
    metric m = make_metric(3, 2, 8);

    (void)state;
    for (int with = 0; with < 2; with++) {
        xkv_train_options to = xkv_train_options_default();
        to.group_layers = 2;
        to.metric = with ? &m.m : NULL;
        trained t = train(ctx, &training, &to);
        for (int quality = 30; quality <= 70; quality += 20) {
            xkv_pack_options o = dict_options(t.dict);
            xkv_value v;
            o.quality = quality;
            o.window = 2;
            packed p = pack_planes(ctx, &s, &o);
            uint8_t *data = restore(ctx, &s, p.entry);
            double is = metric_error(ctx, &s, &t, &p, data);
            assert_plane_errors(&s, &p, data);
            assert_true(xkv_entry_find_value(p.entry, "error.metric", &v));
            assert_true(v.f64 > 0 && v.f64 == p.report.error_metric);
            assert_true(fabs(v.f64 - is) < 1e-3 * is);
            free(data);
            free_packed(ctx, &p);
        }
        free_trained(ctx, &t);
    }
    xkv_pack_options so = scalar_options(0.1);
    packed p = pack_planes(ctx, &s, &so);
    uint8_t *data = restore(ctx, &s, p.entry);
    assert_plane_errors(&s, &p, data);
    free(data);
    free_packed(ctx, &p);
    free_metric(&m);
    free_synthetic(&s);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

/* The step is that of the quality, and the unit is the rms of sigma over the components of all groups that hold planes.
 */
static void quality_is_a_step(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic training = sample(400, XKV_F32, 2);
    trained t = train(ctx, &training, NULL);
    xkv_dict_info info;
    double sum = 0, count = 0;

    (void)state;
    xkv_dict_get_info(t.dict, &info);
    for (uint32_t g = 0; g < info.group_count; g++) {
        uint32_t n;
        const float *sigma = xkv_dict_sigma(t.dict, g, &n);
        assert_int_equal(xkv_dict_leading(t.dict, g), g < 2 ? leading : 0);
        for (uint32_t i = 0; g < 2 && i < n; i++)
            sum += (double)sigma[i] * (double)sigma[i];
        count += n - xkv_dict_leading(t.dict, g);
    }
    assert_int_equal(info.tokens, 396);
    assert_int_equal(info.group_count, leading > 0 ? 3 : 2);
    assert_int_equal(info.component_count, 96);
    assert_true(count == 96);
    assert_int_equal(info.file_size, t.m.size);
    assert_true(fabs(info.unit - sqrt(sum / count)) < 1e-4 * info.unit);
    assert_true(fabs(xkv_dict_step(t.dict, 50) - info.unit * 2 / 3) < 1e-12);
    assert_true(fabs(xkv_dict_step(t.dict, 66) - info.unit / 3) < 1e-12);
    free_trained(ctx, &t);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

/* --- Targets ------------------------------------------------------------------------------------------------------ */

static void error_is_kept(void **state)
{
    static const double errors[] = {0.5, 0.2, 0.05, 0.01};
    static const uint32_t tokens[] = {64, 1028, 2100};
    xkv_ctx *ctx = new_ctx(2);
    synthetic training = sample(600, XKV_F32, 2);
    trained t = train(ctx, &training, NULL);

    (void)state;
    for (int i = 0; i < 3; i++) {
        synthetic s = sample(tokens[i], XKV_F16, 1);
        for (int k = 0; k < 8; k++) {
            xkv_pack_options o = k < 4 ? dict_options(t.dict) : scalar_options(0);
            o.error = errors[k % 4];
            packed p = pack_planes(ctx, &s, &o);
            assert_true(p.report.error_metric <= o.error);
            if (p.report.lossless_groups == 0) /* and is used up: what is left out is a component at a time */
                assert_true(p.report.error_metric > 0.4 * o.error);
            free_packed(ctx, &p);
        }
        free_synthetic(&s);
    }
    free_trained(ctx, &t);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

static void ratio_is_met(void **state)
{
    static const double ratios[] = {3, 5, 8};
    static const uint32_t tokens[] = {1000, 2500};
    xkv_ctx *ctx = new_ctx(2);
    synthetic_options so = {
        .layers = 8, .heads = 2, .head_dim = 32, .dtype = XKV_F16, .rank = 12, .group_layers = 4, .noise = 0.2};
    so.tokens = 800;
    so.seed = 2;
    synthetic training = make_synthetic(&so);
    xkv_train_options to = xkv_train_options_default();
    trained t = train(ctx, &training, &to);

    (void)state;
    so.seed = 1;
    for (int i = 0; i < 2; i++) {
        so.tokens = tokens[i];
        synthetic s = make_synthetic(&so);
        for (int k = 0; k < 6; k++) {
            xkv_pack_options o = k < 3 ? dict_options(t.dict) : scalar_options(0);
            o.ratio = ratios[k % 3];
            packed p = pack_planes(ctx, &s, &o);
            if (fabs(p.report.ratio / o.ratio - 1) >= 0.01)
                fail_msg("%s, %u tokens: asked %g, got %g", k < 3 ? "dict" : "scalar", tokens[i], o.ratio,
                         p.report.ratio);
            free_packed(ctx, &p);
        }
        free_synthetic(&s);
    }
    free_trained(ctx, &t);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

/* --- Rows unlike those of the training ---------------------------------------------------------------------------- */

enum shift { NOISE, HUGE_VALUES, CONSTANT, ZERO, SHIFTS };

static void shift_domain(synthetic *s, enum shift shift)
{
    uint64_t seed = 99;
    float *x = (float *)(void *)s->data;

    for (size_t i = 0; i < s->size / 4; i++) {
        if (shift == NOISE)
            x[i] = (float)(3 * test_normal(&seed));
        if (shift == HUGE_VALUES)
            x[i] *= 1000;
        if (shift == CONSTANT)
            x[i] = 7;
        if (shift == ZERO)
            x[i] = 0;
    }
}

static void other_domains_keep_the_error(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic training = sample(600, XKV_F32, 2);
    trained t = train(ctx, &training, NULL);

    (void)state;
    for (int shift = 0; shift < SHIFTS; shift++)
        for (int k = 0; k < 6; k++) {
            static const double errors[] = {0.2, 0.03, 0.001};
            synthetic s = sample(300, XKV_F32, 1);
            xkv_pack_options o = k < 3 ? dict_options(t.dict) : scalar_options(0);
            shift_domain(&s, (enum shift)shift);
            o.error = errors[k % 3];
            packed p = pack_planes(ctx, &s, &o);
            assert_true(p.report.error_metric <= o.error);
            uint8_t *data = restore(ctx, &s, p.entry);
            assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
            if (k < 3 && p.report.lossless_groups == 0 && shift != ZERO)
                assert_true(metric_error(ctx, &s, &t, &p, data) <= o.error * 1.001 + 1e-6);
            free(data);
            free_packed(ctx, &p);
            free_synthetic(&s);
        }
    free_trained(ctx, &t);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

/* A coefficient beyond 32767 steps makes its group lossless, and only that. */
static void outliers_make_a_group_lossless(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(300, XKV_F32, 1), training = sample(600, XKV_F32, 2);
    trained t = train(ctx, &training, NULL);
    xkv_pack_options o = dict_options(t.dict);
    float *x = (float *)s.views[5].data; /* V of the last layer, which is a group of its own */

    (void)state;
    x[1000] = 1e30f;
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry);
    assert_int_equal(p.report.fallback_groups, 1);
    const xkv_group *groups = p.entry->c.groups + first_group(&p.entry->c);
    assert_int_equal(groups[0].codec, XKV_GROUP_DICT);
    assert_int_equal(groups[1].codec, XKV_GROUP_LOSSLESS);
    assert_int_equal(groups[1].reason, XKV_REASON_NO_GAIN);
    assert_memory_equal(data + s.size / 3 * 2, s.data + s.size / 3 * 2, s.size / 3);
    assert_string_equal(xkv_ctx_error(ctx), "");
    free(data);
    free_packed(ctx, &p);
    free_trained(ctx, &t);
    free_synthetic(&s);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

/* Huge values in one group cost bytes there and no quality elsewhere, whatever the target. */
static void an_outlier_leaves_other_groups_alone(void **state)
{
    static const float outliers[] = {3e4f, 1e9f, 1e30f};
    xkv_ctx *ctx = new_ctx(2);
    synthetic training = sample(600, XKV_F32, 2);
    trained t = train(ctx, &training, NULL);

    (void)state;
    for (int i = 0; i < 3; i++) {
        synthetic s = sample(600, XKV_F32, 1);
        xkv_pack_options o = dict_options(t.dict);
        xkv_group_info g;
        ((float *)s.views[5].data)[1000] = outliers[i];
        o.quality = 0;
        o.error = 0.1;
        packed p = pack_planes(ctx, &s, &o);
        xkv_entry_get_group(p.entry, first_group(&p.entry->c), &g);
        assert_int_equal(g.codec, XKV_CODEC_DICT);
        assert_true(g.error < 0.4);
        free_packed(ctx, &p);
        free_synthetic(&s);
    }
    free_trained(ctx, &t);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

/* Coefficients that even f32 does not hold have no say in the step of the other groups, which here are all zeros, and
 * no step but a finite one is written [Q3]. */
static void values_beyond_f32_leave_a_finite_step(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(256, XKV_BF16, 1);
    xkv_pack_options o = scalar_options(0.05);
    uint16_t *x = (uint16_t *)s.views[1].data;
    size_t third = s.size / 3; /* a layer */
    uint64_t seed = 3;
    memory m = {0};
    xkv_output output = memory_output(&m);

    (void)state;
    o.group_layers = 1;
    o.sinks = 0;
    for (size_t i = 0; i < 256 * (size_t)row_width(&s.planes[1]); i++) /* 2^127 has no variance: the scale is 1e-3 */
        x[i] = i % row_width(&s.planes[1]) == 0 ? 0x7f00 : test_to_bf16(1e-3 * test_normal(&seed));
    memset(s.data + third, 0, 2 * third);
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry);
    assert_int_equal(p.entry->c.groups[0].codec, XKV_GROUP_LOSSLESS);
    assert_int_equal(p.entry->c.groups[1].codec, XKV_GROUP_SCALAR);
    assert_true(isfinite(p.report.step) && p.report.step > 0);
    assert_memory_equal(data, s.data, third);
    free(data);
    free_packed(ctx, &p);
    o.error = 0;
    o.ratio = 3; /* the layer that cannot be coded already takes a third */
    assert_int_equal(xkv_pack(ctx, &s.geometry, s.views, NULL, NULL, 0, &o, &output, NULL), XKV_ERROR_TARGET);
    memory_free(&m);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* A dictionary may hold any finite unit, but an entry no infinite step. */
static void infinite_steps_are_refused(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(300, XKV_F32, 1);
    trained t = train(ctx, &s, NULL);
    xkv_pack_options o = dict_options(t.dict);
    memory m = {0};
    xkv_output output = memory_output(&m);

    (void)state;
    t.dict->unit = 1e300;
    assert_int_equal(xkv_pack(ctx, &s.geometry, s.views, NULL, NULL, 0, &o, &output, NULL), XKV_ERROR_TARGET);
    t.dict->unit = 1e-300;
    assert_int_equal(xkv_pack(ctx, &s.geometry, s.views, NULL, NULL, 0, &o, &output, NULL), XKV_ERROR_TARGET);
    memory_free(&m);
    free_trained(ctx, &t);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void nonfinite_groups_are_exact(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(300, XKV_F32, 1), training = sample(600, XKV_F32, 2);
    trained t = train(ctx, &training, NULL);

    (void)state;
    ((float *)s.views[4].data)[77] = NAN; /* K of the last layer */
    for (int k = 0; k < 2; k++) {
        xkv_pack_options o = k ? scalar_options(0.05) : dict_options(t.dict);
        o.group_layers = 2;
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *data = restore(ctx, &s, p.entry);
        assert_int_equal(p.report.nonfinite_planes, 1);
        assert_int_equal(p.report.lossless_groups, 1);
        assert_memory_equal(data + s.size / 6 * 4, s.data + s.size / 6 * 4, s.size / 6);
        assert_int_equal(p.entry->c.groups[first_group(&p.entry->c) + 1].reason, XKV_REASON_NONFINITE);
        free(data);
        free_packed(ctx, &p);
    }
    synthetic *list = &s;
    memory m = {0};
    assert_int_equal(train_on(ctx, (const synthetic *const *)&list, 1, NULL, &m), XKV_ERROR_ARGUMENT);
    memory_free(&m);
    free_trained(ctx, &t);
    free_synthetic(&s);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

/* Latents are coded, the rotated part of keys is exact; its planes may be of another width. */
static void mla_keeps_its_rotated_part(void **state)
{
    synthetic_options so = sample_options(300);
    xkv_ctx *ctx = new_ctx(2);

    (void)state;
    so.mla = 1;
    so.rope = 0;
    so.group_layers = 4;
    synthetic s = make_synthetic(&so);
    for (uint32_t i = 1; i < 6; i += 2) /* K-rope planes of 4 elements: the others' memory stays where it is */
        s.planes[i].heads = 1, s.planes[i].head_dim = 4;
    for (uint32_t i = 1; i < 6; i += 2)
        s.views[i].token_stride = 16;
    trained t = train(ctx, &s, NULL);
    for (int k = 0; k < 2; k++) {
        xkv_pack_options o = k ? scalar_options(0.05) : dict_options(t.dict);
        o.quality = k ? 0 : 60;
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *data = restore(ctx, &s, p.entry);
        assert_plane_errors(&s, &p, data);
        for (uint32_t i = 0; i < 6; i++) {
            bool exact = memcmp(data + s.size / 6 * i, s.data + s.size / 6 * i, 300 * 16) == 0;
            assert_int_equal(exact, i % 2 == 1);
        }
        for (uint32_t i = 0; i < 6; i += 2)
            assert_true(plane_error(&s, data, i, 4, 300) < 0.1);
        free(data);
        free_packed(ctx, &p);
    }
    free_trained(ctx, &t);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* Caches without planes, as opaque files give them, and values whose squares f32 does not hold. */
static void useless_caches_are_refused(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic empty = {0}, huge = sample(64, XKV_F32, 1);
    const synthetic *list = &empty;
    memory m = {0};

    (void)state;
    assert_int_equal(train_on(ctx, &list, 1, NULL, &m), XKV_ERROR_ARGUMENT);
    assert_non_null(strstr(xkv_ctx_error(ctx), "nothing to train on"));
    for (size_t i = 0; i < huge.size / 4; i++)
        ((float *)huge.data)[i] *= 1e30f;
    list = &huge;
    assert_int_equal(train_on(ctx, &list, 1, NULL, &m), XKV_ERROR_ARGUMENT);
    assert_non_null(strstr(xkv_ctx_error(ctx), "too large"));
    memory_free(&m);
    free_synthetic(&huge);
    xkv_ctx_free(ctx);
}

static void few_training_tokens_still_work(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic training = sample(20, XKV_F32, 2), s = sample(300, XKV_F32, 1), none = sample(5, XKV_F32, 2);
    const synthetic *list = &none;
    memory m = {0};
    trained t = train(ctx, &training, NULL); /* 16 rows for a width of 64 */
    xkv_pack_options o = dict_options(t.dict);

    (void)state;
    o.error = 0.1;
    packed p = pack_planes(ctx, &s, &o);
    assert_true(p.report.error_metric <= 0.1);
    assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
    assert_int_equal(train_on(ctx, &list, 1, NULL, &m), XKV_ERROR_ARGUMENT); /* one row */
    memory_free(&m);
    free_packed(ctx, &p);
    free_trained(ctx, &t);
    free_synthetic(&training);
    free_synthetic(&none);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Tokens ------------------------------------------------------------------------------------------------------- */

/* Sinks and window are exact, f16 sources too. */
static void check_lengths(xkv_ctx *ctx, const xkv_dict *dict, uint32_t tokens, uint32_t chunk)
{
    for (int k = 0; k < 2; k++) {
        synthetic s = sample(tokens, XKV_F16, 1);
        xkv_pack_options o = k ? scalar_options(0.1) : dict_options(dict);
        o.chunk_tokens = chunk;
        o.window = 3;
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *data = restore(ctx, &s, p.entry);
        size_t row = 16 * 2, plane = tokens * row, sinks = tokens < 4 ? tokens : 4,
               window = tokens - sinks < 3 ? tokens - sinks : 3;
        for (uint32_t i = 0; i < 6; i++) {
            assert_memory_equal(data + i * plane, s.data + i * plane, sinks * row);
            assert_memory_equal(data + (i + 1) * plane - window * row, s.data + (i + 1) * plane - window * row,
                                window * row);
            if (tokens > 40)
                assert_true(plane_error(&s, data, i, 4, tokens - 3) < 0.5);
        }
        assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
        free(data);
        free_packed(ctx, &p);
        free_synthetic(&s);
    }
}

static void all_lengths_work(void **state)
{
    static const uint32_t tokens[] = {1, 4, 8, 31, 32, 33, 255, 256, 257, 700};
    xkv_ctx *ctx = new_ctx(2);
    synthetic training = sample(600, XKV_F16, 2);
    trained t = train(ctx, &training, NULL);

    (void)state;
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        check_lengths(ctx, t.dict, tokens[i], 256);
        check_lengths(ctx, t.dict, tokens[i], 32);
    }
    free_trained(ctx, &t);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

static void check_range(xkv_ctx *ctx, const synthetic *s, const packed *p, const uint8_t *whole, uint32_t first,
                        uint32_t count)
{
    xkv_read_options ro = xkv_read_options_default();
    uint8_t *data = malloc(s->size);
    xkv_view *views = views_into(s, data);

    ro.first_token = first;
    ro.token_count = count;
    assert_ok(ctx, xkv_entry_read(ctx, p->entry, &ro, views));
    for (uint32_t i = 0; i < s->geometry.plane_count; i++) {
        size_t row = (size_t)s->views[i].token_stride, plane = row * s->geometry.token_count;
        assert_memory_equal(data + i * plane, whole + i * plane + first * row, count * row);
    }
    free(views);
    free(data);
}

static void every_range_is_a_slice(void **state)
{
    static const uint32_t edges[] = {0, 3, 4, 5, 31, 32, 33, 255, 256, 257, 512, 695, 697, 699};
    enum { COUNT = sizeof edges / sizeof *edges };
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(700, XKV_F16, 1), training = sample(600, XKV_F16, 2);
    trained t = train(ctx, &training, NULL);

    (void)state;
    for (int k = 0; k < 2; k++) {
        xkv_pack_options o = k ? scalar_options(0.1) : dict_options(t.dict);
        o.window = 3;
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *whole = restore(ctx, &s, p.entry);
        for (int a = 0; a < COUNT; a++)
            for (int b = a; b < COUNT; b++)
                check_range(ctx, &s, &p, whole, edges[a], edges[b] + 1 - edges[a]);
        free(whole);
        free_packed(ctx, &p);
    }
    free_trained(ctx, &t);
    free_synthetic(&s);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

static void threads_do_not_change_a_byte(void **state)
{
    synthetic s = sample(700, XKV_F16, 1), training = sample(600, XKV_F16, 2);
    memory files[3][3] = {{{0}}}; /* dictionary, dict, scalar */
    uint8_t *data[3][2];

    (void)state;
    for (uint32_t i = 0; i < 3; i++) {
        xkv_ctx *ctx = new_ctx(i + 1);
        trained t = train(ctx, &training, NULL);
        for (int k = 0; k < 2; k++) {
            xkv_pack_options o = k ? scalar_options(0.1) : dict_options(t.dict);
            o.error = 0.1;
            packed p = pack_planes(ctx, &s, &o);
            data[i][k] = restore(ctx, &s, p.entry);
            files[i][1 + k] = p.m;
            xkv_entry_close(ctx, p.entry);
        }
        xkv_dict_close(ctx, t.dict);
        files[i][0] = t.m;
        xkv_ctx_free(ctx);
        for (int k = 0; k < 3; k++) {
            assert_int_equal(files[i][k].size, files[0][k].size);
            assert_memory_equal(files[i][k].data, files[0][k].data, files[0][k].size);
        }
        for (int k = 0; k < 2; k++)
            assert_memory_equal(data[i][k], data[0][k], s.size);
    }
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 3; k++)
            memory_free(&files[i][k]);
        free(data[i][0]);
        free(data[i][1]);
    }
    free_synthetic(&s);
    free_synthetic(&training);
}

/* --- Wrong and missing dictionaries ------------------------------------------------------------------------------- */

static void to_hex(const uint8_t *id, char hex[33])
{
    for (int i = 0; i < 16; i++)
        (void)snprintf(hex + 2 * i, 3, "%02x", id[i]);
}

static void other_dictionaries_are_refused(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s = sample(100, XKV_F16, 1), training = sample(200, XKV_F16, 2), other = sample(200, XKV_F16, 3);
    trained t = train(ctx, &training, NULL), wrong = train(ctx, &other, NULL);
    xkv_pack_options o = dict_options(t.dict);
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = malloc(s.size);
    xkv_view *views = views_into(&s, data);
    xkv_entry *entry = NULL;
    xkv_entry_info info;
    xkv_dict_info have, want;
    char hex[2][33];

    (void)state;
    xkv_dict_get_info(t.dict, &want);
    xkv_dict_get_info(wrong.dict, &have);
    to_hex(want.id, hex[0]);
    to_hex(have.id, hex[1]);
    assert_ok(ctx, xkv_entry_open(ctx, &p.input, &entry));
    xkv_entry_get_info(entry, &info);
    assert_true(info.needs_dict);
    assert_memory_equal(info.dictionary_id, want.id, 16);
    for (uint32_t i = 0; i < info.group_count; i++) {
        xkv_group_info g;
        xkv_entry_get_group(entry, i, &g);
        assert_int_equal(g.codec, leading > 0 && i == 0 ? XKV_CODEC_CROSS : XKV_CODEC_DICT);
        assert_int_equal(g.rank, g.codec == XKV_CODEC_CROSS ? 2 * leading : g.width);
    }
    assert_int_equal(xkv_entry_read(ctx, entry, NULL, views), XKV_ERROR_MISMATCH);
    assert_non_null(strstr(xkv_ctx_error(ctx), hex[0]));
    assert_int_equal(xkv_entry_verify(ctx, entry, NULL, NULL), XKV_ERROR_MISMATCH);
    assert_int_equal(xkv_entry_attach(ctx, entry, wrong.dict), XKV_ERROR_MISMATCH);
    assert_non_null(strstr(xkv_ctx_error(ctx), hex[0]));
    assert_non_null(strstr(xkv_ctx_error(ctx), hex[1]));
    assert_int_equal(xkv_entry_read(ctx, entry, NULL, views), XKV_ERROR_MISMATCH);
    assert_ok(ctx, xkv_entry_attach(ctx, entry, t.dict));
    assert_ok(ctx, xkv_entry_read(ctx, entry, NULL, views));
    xkv_entry_close(ctx, entry);
    free_packed(ctx, &p);
    o = scalar_options(0.1);
    p = pack_planes(ctx, &s, &o);
    assert_int_equal(xkv_entry_attach(ctx, p.entry, t.dict), XKV_ERROR_ARGUMENT);
    free_packed(ctx, &p);
    free(views);
    free(data);
    free_trained(ctx, &t);
    free_trained(ctx, &wrong);
    free_synthetic(&s);
    free_synthetic(&training);
    free_synthetic(&other);
    xkv_ctx_free(ctx);
}

/* A dictionary opened for reading decodes the same bytes, and cannot pack. */
static void reading_needs_half(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s = sample(100, XKV_F16, 1), training = sample(200, XKV_F16, 2);
    trained t = train(ctx, &training, NULL);
    xkv_pack_options o = dict_options(t.dict);
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry), *again;
    xkv_input input = xkv_input_from_memory(t.m.data, t.m.size);
    memory m = {0};
    xkv_output output = memory_output(&m);
    xkv_dict *dict = NULL;

    (void)state;
    assert_ok(ctx, xkv_dict_open(ctx, &input, 0, &dict));
    assert_ok(ctx, xkv_entry_attach(ctx, p.entry, dict));
    again = restore(ctx, &s, p.entry);
    assert_memory_equal(data, again, s.size);
    o.dict = dict;
    assert_int_equal(xkv_pack(ctx, &s.geometry, s.views, NULL, NULL, 0, &o, &output, NULL), XKV_ERROR_ARGUMENT);
    o.dict = NULL;
    assert_int_equal(xkv_pack(ctx, &s.geometry, s.views, NULL, NULL, 0, &o, &output, NULL), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_dict_open(ctx, &p.input, 0, &dict), XKV_ERROR_FORMAT); /* an entry */
    free(again);
    free(data);
    free_packed(ctx, &p);
    xkv_dict_close(ctx, dict);
    free_trained(ctx, &t);
    free_synthetic(&s);
    free_synthetic(&training);
    memory_free(&m);
    xkv_ctx_free(ctx);
}

/* Layers that the dictionary does not know are stored lossless, the others coded. */
static void unknown_layers_are_exact(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic_options so = sample_options(100);
    xkv_train_options to = xkv_train_options_default();

    (void)state;
    so.layers = 2;
    so.group_layers = 1;
    synthetic training = make_synthetic(&so);
    so.layers = 4;
    synthetic s = make_synthetic(&so);
    to.group_layers = 2;
    for (to.apart = 0; to.apart < 2; to.apart++) {
        trained t = train(ctx, &training, &to);
        xkv_pack_options o = dict_options(t.dict);
        o.group_layers = 2;
        packed p = pack_planes(ctx, &s, &o);
        for (uint32_t i = first_group(&p.entry->c); i < p.entry->c.group_count; i++) {
            bool known = s.planes[p.entry->c.groups[i].planes[0]].layer < 2;
            assert_int_equal(p.entry->c.groups[i].codec, known ? XKV_GROUP_DICT : XKV_GROUP_LOSSLESS);
            assert_int_equal(p.entry->c.groups[i].reason, known ? 0 : XKV_REASON_NOT_TRAINED);
        }
        free_packed(ctx, &p);
        free_trained(ctx, &t);
    }
    free_synthetic(&s);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

/* --- Damage ------------------------------------------------------------------------------------------------------- */

static synthetic small_sample(uint32_t tokens, uint64_t seed)
{
    return make_synthetic(&(synthetic_options){.layers = 2,
                                               .tokens = tokens,
                                               .heads = 1,
                                               .head_dim = 4,
                                               .dtype = XKV_F16,
                                               .rank = 2,
                                               .group_layers = 1,
                                               .noise = 0.1,
                                               .seed = seed});
}

static xkv_status open_dict(xkv_ctx *ctx, const xkv_dict *unused, const uint8_t *data, size_t size)
{
    xkv_input input = xkv_input_from_memory(data, size);
    xkv_dict *dict = NULL;
    xkv_status status = xkv_dict_open(ctx, &input, 1, &dict);

    (void)unused;
    xkv_dict_close(ctx, dict);
    return status;
}

static void every_damaged_byte_is_found(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s = small_sample(70, 1), training = small_sample(100, 2);
    xkv_train_options to = xkv_train_options_default();

    (void)state;
    to.group_layers = 1;
    leading = leading > 0 ? 2 : 0; /* of 8 */
    trained t = train(ctx, &training, &to);
    assert_damage_is_found(ctx, &t.m, open_dict, NULL);
    for (int k = 0; k < 2; k++) {
        xkv_pack_options o = k ? scalar_options(0.1) : dict_options(t.dict);
        o.chunk_tokens = 32;
        o.group_layers = 1;
        packed p = pack_planes(ctx, &s, &o);
        assert_damage_is_found(ctx, &p.m, open_entry, k ? NULL : t.dict);
        free_packed(ctx, &p);
    }
    free_trained(ctx, &t);
    free_synthetic(&s);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

/* The same entry with no component of the cross stage named, while its chunks hold what they held. */
static memory without_stage(xkv_ctx *ctx, const packed *p)
{
    memory *m = calloc(1, sizeof *m), result;
    xkv_output output = memory_output(m);
    xkv_container c = p->entry->c;
    xkv_container_writer w;
    uint64_t size;

    c.groups = malloc(c.group_count * sizeof *c.groups);
    assert_non_null(c.groups);
    memcpy(c.groups, p->entry->c.groups, c.group_count * sizeof *c.groups);
    for (uint32_t i = 0; i < c.group_count; i++)
        c.groups[i].parts = calloc(c.groups[i].part_count, sizeof *c.groups[i].parts);
    assert_ok(ctx, xkv_container_begin(ctx, &c, &output, 4, &w));
    for (uint32_t i = 0; i < c.group_count; i++)
        for (uint32_t k = 0; k < c.groups[i].part_count; k++) {
            const xkv_part *part = &p->entry->c.groups[i].parts[k];
            uint8_t *bytes = malloc((size_t)part->size + 1);
            assert_ok(ctx, xkv_container_read_part(ctx, &p->input, &p->entry->c, part, bytes));
            if (i == 0 && k == XKV_PART_COMPONENTS) {
                assert_int_equal(part->method, XKV_METHOD_STORED);
                memset(bytes + 8, 0, c.groups[0].rank);
            }
            assert_ok(ctx, xkv_container_add_part(ctx, &w, &c.groups[i].parts[k], bytes, part->size, part->method));
            free(bytes);
        }
    assert_ok(ctx, xkv_container_finish(ctx, &w, &size));
    for (uint32_t i = 0; i < c.group_count; i++)
        free(c.groups[i].parts);
    free(c.groups);
    result = *m;
    free(m);
    return result;
}

static void chunks_of_a_stage_without_components_are_checked(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s = small_sample(70, 1);
    xkv_train_options to = xkv_train_options_default();

    (void)state;
    to.group_layers = 1;
    leading = 2;
    trained t = train(ctx, &s, &to);
    xkv_pack_options o = dict_options(t.dict);
    o.group_layers = 1;
    packed p = pack_planes(ctx, &s, &o);
    memory m = without_stage(ctx, &p);
    assert_int_equal(open_entry(ctx, t.dict, m.data, m.size), XKV_ERROR_CORRUPT);
    assert_non_null(strstr(xkv_ctx_error(ctx), "[E2]"));
    memory_free(&m);
    free_packed(ctx, &p);
    free_trained(ctx, &t);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Description -------------------------------------------------------------------------------------------------- */

/* Code length of q[n] by the formula of spec/codec.md, section 7. */
static double code_length(uint32_t table, const int16_t *q, uint32_t n)
{
    xkv_table t = xkv_table_get(table);
    double bits = 0;

    for (uint32_t i = 0; i < n; i++) {
        int u = (int)floor((q[i] + floor(ldexp(0.5, (int)t.shift))) / ldexp(1, (int)t.shift));
        bool escaped = (uint32_t)abs(u) > t.base->reach;
        double f = escaped ? t.base->escape_frequency : t.base->frequency[abs(u)];
        bits += escaped ? 28 - log2(f) : 12 - log2(f) + t.shift;
    }
    return bits;
}

static void assert_components(xkv_ctx *ctx, const packed *p, uint32_t group)
{
    const xkv_container *c = &p->entry->c;
    uint32_t rank = c->groups[group].rank, tokens = c->geometry.token_count, coded = tokens - c->sinks - c->window;
    xkv_component *components = malloc(rank * sizeof *components);
    xkv_group_coding coding;
    double step, bits = 0;
    uint64_t bytes = 0;
    int16_t *q = read_integers(ctx, p, group, &step);

    assert_ok(ctx, xkv_entry_read_coding(ctx, p->entry, group, &coding));
    assert_ok(ctx, xkv_entry_read_components(ctx, p->entry, group, components));
    for (uint32_t j = 0; j < rank; j++) {
        double squares = 0;
        for (uint32_t i = 0; i < tokens; i++)
            squares += (double)q[j * tokens + i] * q[j * tokens + i];
        assert_true(fabs(components[j].deviation - step * sqrt(squares / coded)) < 1e-12 * step);
        coding.coded -= components[j].table != 0;
        if (components[j].table)
            assert_true(fabs(components[j].bits - code_length(components[j].table, q + j * tokens + c->sinks, coded)) <
                        1e-4 * coded);
        else
            assert_true(components[j].bits == 0 && squares == 0);
        bits += components[j].bits;
    }
    assert_int_equal(coding.coded, 0);
    for (uint32_t i = 0; i < c->chunk_count; i++)
        bytes += xkv_entry_part_size(p->entry, group, 2 + i);
    assert_in_range(bytes, (uint64_t)(bits / 8), (uint64_t)(bits / 8) + 128 * c->chunk_count);
    free(components);
    free(q);
}

/* What the report shows: exact code lengths, which add up to the bytes of the chunks. */
static void components_are_described(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic training = sample(600, XKV_F32, 1), s = sample(150, XKV_F16, 2);
    trained t = train(ctx, &training, NULL);
    xkv_group_info info;
    xkv_component component;

    (void)state;
    for (uint32_t k = 0; k < 2; k++) {
        xkv_pack_options o = k ? scalar_options(0.1) : dict_options(t.dict);
        o.chunk_tokens = 64;
        o.window = 3;
        packed p = pack_planes(ctx, &s, &o);
        for (uint32_t i = 0; i < p.entry->c.group_count; i++)
            assert_components(ctx, &p, i);
        free_packed(ctx, &p);
    }
    packed p = pack_planes(ctx, &s, NULL);
    assert_int_equal(xkv_entry_read_components(ctx, p.entry, 0, &component), XKV_ERROR_ARGUMENT);
    free_packed(ctx, &p);

    xkv_dict_get_group(t.dict, 1, &info);
    assert_true(info.codec == XKV_CODEC_DICT && info.plane_count == 2 && info.width == info.rank);
    assert_int_equal(xkv_dict_geometry(t.dict)->planes[info.planes[0]].layer, 2);
    free_trained(ctx, &t);
    free_synthetic(&s);
    free_synthetic(&training);
    xkv_ctx_free(ctx);
}

#define BOTH_WAYS(f)                                                                                                   \
    {#f, f, set_up, NULL, &without},                                                                                   \
    {                                                                                                                  \
#f " with a cross stage", f, set_up, NULL, &with                                                               \
    }

int main(void)
{
    static uint32_t without = 0, with = 8;
    const struct CMUnitTest tests[] = {
        BOTH_WAYS(rows_are_mean_plus_coefficients),
        cmocka_unit_test(scalar_rows_are_mean_plus_coefficients),
        BOTH_WAYS(stored_errors_are_true),
        BOTH_WAYS(quality_is_a_step),
        BOTH_WAYS(error_is_kept),
        BOTH_WAYS(ratio_is_met),
        BOTH_WAYS(other_domains_keep_the_error),
        BOTH_WAYS(outliers_make_a_group_lossless),
        BOTH_WAYS(an_outlier_leaves_other_groups_alone),
        cmocka_unit_test(values_beyond_f32_leave_a_finite_step),
        BOTH_WAYS(infinite_steps_are_refused),
        BOTH_WAYS(nonfinite_groups_are_exact),
        BOTH_WAYS(mla_keeps_its_rotated_part),
        BOTH_WAYS(few_training_tokens_still_work),
        BOTH_WAYS(useless_caches_are_refused),
        BOTH_WAYS(all_lengths_work),
        BOTH_WAYS(every_range_is_a_slice),
        BOTH_WAYS(threads_do_not_change_a_byte),
        BOTH_WAYS(other_dictionaries_are_refused),
        BOTH_WAYS(reading_needs_half),
        BOTH_WAYS(unknown_layers_are_exact),
        BOTH_WAYS(every_damaged_byte_is_found),
        cmocka_unit_test(chunks_of_a_stage_without_components_are_checked),
        BOTH_WAYS(components_are_described),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
