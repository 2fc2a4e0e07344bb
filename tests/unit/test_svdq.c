/* Quantized svd and profile auto: reconstruction, errors and least squares in fp64 from the stored numbers, precision
 * of components, targets, ranges, rows it does not suit, damage; and what auto chooses. */
#include "support.h"

#include "entry_internal.h"
#include "parts.h"
#include "rans.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEY_WEIGHT 1.4

/* --- Samples ------------------------------------------------------------------------------------------------------ */

/* Two groups of two layers, of low rank and some noise. */
static synthetic_options sample_options(uint32_t tokens)
{
    return (synthetic_options){.layers = 4,
                               .tokens = tokens,
                               .heads = 2,
                               .head_dim = 8,
                               .dtype = XKV_F16,
                               .rank = 6,
                               .group_layers = 2,
                               .noise = 0.05,
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

static xkv_pack_options options(uint32_t profile, double ratio, double error)
{
    xkv_pack_options o = xkv_pack_options_default();

    o.profile = profile;
    o.group_layers = 2;
    o.ratio = ratio;
    o.error = error;
    return o;
}

/* --- Oracle: spec/dictionary.md, section 1, in fp64 --------------------------------------------------------------- */

/* Rows [t0, t1) of a group in `data`, K before RoPE. */
static double *group_rows(const synthetic *s, const uint8_t *data, const xkv_group *g, uint32_t t0, uint32_t t1)
{
    double *rows = malloc((size_t)(t1 - t0) * g->width * sizeof *rows), *row = rows;

    for (uint32_t t = t0; t < t1; t++)
        for (uint32_t i = 0; i < g->plane_count; i++) {
            plane_row(s, data, g->planes[i], t, row);
            row += row_width(&s->planes[g->planes[i]]);
        }
    return rows;
}

/* What an svdq group stores: x = scale (mean + a v). */
typedef struct stored {
    uint32_t rank, width, tokens;
    double step, mean_step;
    uint8_t *exponents;
    double *scale; /* [width] */
    double *mean;  /* [width] */
    double *v;     /* [rank][width] */
    double *a;     /* [tokens][rank] */
} stored;

static void read_side(xkv_ctx *ctx, const uint8_t *p, size_t size, const xkv_group *g, const xkv_geometry *geometry,
                      stored *s, uint8_t *tables)
{
    uint32_t n = s->width, r = s->rank, planes = g->plane_count, at = 0;
    int16_t *q = calloc((size_t)(r + 1) * n, sizeof *q);
    const uint8_t *exponents = p + 12 + 4 * planes, *stream = exponents + r + r + r + 1;
    xkv_rans_shape shape = {n, r + 1, n, exponents + 2 * r};

    s->step = (double)xkv_loadf32(p);
    s->mean_step = (double)xkv_loadf32(p + 8 + 4 * planes);
    memcpy(s->exponents, exponents, r);
    memcpy(tables, exponents + r, r);
    for (uint32_t i = 0; i < planes; i++)
        for (uint32_t k = 0; k < row_width(&geometry->planes[g->planes[i]]); k++)
            s->scale[at++] = (double)xkv_loadf32(p + 8 + 4 * i);
    assert_ok(ctx, xkv_rans_decode(ctx, xkv_coder_cpu_generic(), &shape, stream, size - (size_t)(stream - p), "", q));
    for (uint32_t i = 0; i < n; i++)
        s->mean[i] = q[i] * s->mean_step;
    for (uint32_t j = 0; j < r; j++)
        for (uint32_t i = 0; i < n; i++)
            s->v[j * n + i] = q[(j + 1) * n + i] * pow(2, -exponents[j] / 8.0);
    free(q);
}

static void read_chunk(xkv_ctx *ctx, const packed *p, const xkv_group *g, uint32_t chunk, const uint8_t *tables,
                       stored *s)
{
    const xkv_container *c = &p->entry->c;
    const xkv_part *part = &g->parts[2 + chunk];
    uint32_t first = c->sinks, t0 = chunk * c->chunk_tokens, t1 = t0 + c->chunk_tokens;
    uint8_t *stream = malloc(part->size + 1);
    int16_t *q = calloc((size_t)s->rank * c->chunk_tokens, sizeof *q);

    t0 = t0 < first ? first : t0;
    t1 = t1 > first + s->tokens ? first + s->tokens : t1;
    if (t0 < t1) {
        xkv_rans_shape shape = {t1 - t0, s->rank, c->chunk_tokens, tables};
        assert_ok(ctx, xkv_container_read_part(ctx, &p->input, c, part, stream));
        assert_ok(ctx, xkv_rans_decode(ctx, xkv_coder_cpu_generic(), &shape, stream, part->size, "chunk", q));
        for (uint32_t t = t0; t < t1; t++)
            for (uint32_t j = 0; j < s->rank; j++)
                s->a[(t - first) * s->rank + j] = q[j * c->chunk_tokens + t - t0] * s->step;
    }
    free(stream);
    free(q);
}

static stored read_stored(xkv_ctx *ctx, const packed *p, uint32_t group)
{
    const xkv_container *c = &p->entry->c;
    const xkv_group *g = &c->groups[group];
    stored s = {.rank = g->rank, .width = g->width, .tokens = c->geometry.token_count - c->sinks - c->window};
    uint8_t *side = malloc(g->parts[0].size), *tables = malloc(g->rank);

    assert_int_equal(g->codec, XKV_CODEC_SVDQ);
    s.exponents = malloc(s.rank);
    s.scale = malloc(s.width * sizeof *s.scale);
    s.mean = malloc(s.width * sizeof *s.mean);
    s.v = malloc((size_t)s.rank * s.width * sizeof *s.v);
    s.a = malloc((size_t)s.rank * s.tokens * sizeof *s.a);
    assert_ok(ctx, xkv_container_read_part(ctx, &p->input, c, &g->parts[0], side));
    read_side(ctx, side, g->parts[0].size, g, &c->geometry, &s, tables);
    for (uint32_t i = 0; i < c->chunk_count; i++)
        read_chunk(ctx, p, g, i, tables, &s);
    free(side);
    free(tables);
    return s;
}

static void free_stored(stored *s)
{
    free(s->exponents);
    free(s->scale);
    free(s->mean);
    free(s->v);
    free(s->a);
}

/* --- Reconstruction ----------------------------------------------------------------------------------------------- */

static void rows_are_mean_plus_components(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(300, XKV_F32, 1);
    xkv_pack_options o = options(XKV_PROFILE_SVD, 0, 0.1);

    (void)state;
    o.window = 3;
    o.chunk_tokens = 64;
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry);
    assert_int_equal(p.report.group_count, 2);
    for (uint32_t g = 0; g < 2; g++) {
        stored f = read_stored(ctx, &p, g);
        double *rows = group_rows(&s, data, &p.entry->c.groups[g], 4, 297), worst = 0;
        for (uint32_t t = 0; t < f.tokens; t++)
            for (uint32_t i = 0; i < f.width; i++) {
                double x = f.mean[i];
                for (uint32_t j = 0; j < f.rank; j++)
                    x += f.a[t * f.rank + j] * f.v[j * f.width + i];
                worst = fmax(worst, fabs(x * f.scale[i] - rows[t * f.width + i]));
            }
        assert_true(worst < 2e-5);
        free(rows);
        free_stored(&f);
    }
    assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
    free(data);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* Solve m x = y for a symmetric positive definite m [n][n] by elimination, all in place. */
static void solve(double *m, double *y, uint32_t n)
{
    for (uint32_t c = 0; c < n; c++)
        for (uint32_t r = c + 1; r < n; r++) {
            double f = m[r * n + c] / m[c * n + c];
            for (uint32_t k = c; k < n; k++)
                m[r * n + k] -= f * m[c * n + k];
            y[r] -= f * y[c];
        }
    for (uint32_t r = n; r-- > 0;) {
        for (uint32_t k = r + 1; k < n; k++)
            y[r] -= m[r * n + k] * y[k];
        y[r] /= m[r * n + r];
    }
}

/* Coefficients are the least-squares solution for the rounded components, rounded: within half a step. */
static void coefficients_are_least_squares(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(300, XKV_F32, 1);
    xkv_pack_options o = options(XKV_PROFILE_SVD, 0, 0.02);
    packed p = pack_planes(ctx, &s, &o);
    stored f = read_stored(ctx, &p, 0);
    double *rows = group_rows(&s, s.data, &p.entry->c.groups[0], 4, 300), worst = 0;
    double *m = malloc((size_t)f.rank * f.rank * sizeof *m), *y = malloc(f.rank * sizeof *y);

    (void)state;
    assert_true(f.rank > 5);
    for (uint32_t t = 0; t < f.tokens; t += 7) {
        for (uint32_t j = 0; j < f.rank; j++) {
            const double *v = f.v + j * f.width;
            y[j] = 0;
            for (uint32_t i = 0; i < f.width; i++)
                y[j] += (rows[t * f.width + i] / f.scale[i] - f.mean[i]) * v[i];
            for (uint32_t k = 0; k < f.rank; k++) {
                m[j * f.rank + k] = 0;
                for (uint32_t i = 0; i < f.width; i++)
                    m[j * f.rank + k] += v[i] * f.v[k * f.width + i];
            }
        }
        solve(m, y, f.rank);
        for (uint32_t j = 0; j < f.rank; j++)
            worst = fmax(worst, fabs(f.a[t * f.rank + j] - y[j]) / f.step);
    }
    assert_true(worst > 0.4 && worst < 0.51);
    free(m);
    free(y);
    free(rows);
    free_stored(&f);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* Step of a component times its singular value is the step of the coefficients, to a sixteenth of an octave; and that
 * of the mean, whose singular value is the square root of the tokens. */
static void precision_follows_singular_values(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(1000, XKV_F32, 1);
    xkv_pack_options o = options(XKV_PROFILE_SVD, 0, 0.05);
    packed p = pack_planes(ctx, &s, &o);
    stored f = read_stored(ctx, &p, 1);
    uint32_t least = 255, most = 0;

    (void)state;
    for (uint32_t j = 0; j < f.rank; j++) {
        double squares = 0, length = 0;
        for (uint32_t t = 0; t < f.tokens; t++)
            squares += f.a[t * f.rank + j] * f.a[t * f.rank + j];
        for (uint32_t i = 0; i < f.width; i++)
            length += f.v[j * f.width + i] * f.v[j * f.width + i];
        double wanted = 8 * log2(sqrt(squares * length) / f.step);
        assert_true(fabs(length - 1) < 0.1);
        assert_true(fabs(f.exponents[j] - wanted) < 1); /* coefficients are rounded, too */
        least = f.exponents[j] < least ? f.exponents[j] : least;
        most = f.exponents[j] > most ? f.exponents[j] : most;
    }
    assert_true(most - least > 16); /* two octaves */
    assert_true(fabs(f.mean_step * sqrt(f.tokens) / f.step - 1) < 1e-5);
    free_stored(&f);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Errors ------------------------------------------------------------------------------------------------------- */

/* Squared error and energy of a plane, and its scale: deviation, over KEY_WEIGHT for keys. */
typedef struct figures {
    double squares, energy, centred, scale;
} figures;

static figures measure_plane(const double *x, const double *y, uint32_t rows, uint32_t width, uint32_t first,
                             const xkv_plane *plane)
{
    figures f = {0};

    for (uint32_t i = first; i < first + row_width(plane); i++) {
        double mean = 0;
        for (uint32_t t = 0; t < rows; t++)
            mean += x[t * width + i] / rows;
        for (uint32_t t = 0; t < rows; t++) {
            double v = x[t * width + i], d = v - y[t * width + i];
            f.squares += d * d;
            f.energy += v * v;
            f.centred += (v - mean) * (v - mean);
        }
    }
    f.scale = sqrt(f.centred / rows / row_width(plane)) / (plane->kind == XKV_PLANE_K ? KEY_WEIGHT : 1);
    return f;
}

/* Checks the plane errors of the record, and returns the error of all groups in units of the planes' scales. */
static double checked_error(const synthetic *s, const packed *p, const uint8_t *data)
{
    const xkv_container *c = &p->entry->c;
    uint32_t t0 = c->sinks, t1 = c->geometry.token_count - c->window;
    double squares = 0, energy = 0;

    for (uint32_t g = 0; g < c->group_count; g++) {
        const xkv_group *group = &c->groups[g];
        double *x = group_rows(s, s->data, group, t0, t1), *y = group_rows(s, data, group, t0, t1);
        for (uint32_t i = 0, first = 0; i < group->plane_count; i++) {
            const xkv_plane *plane = &s->planes[group->planes[i]];
            figures f = measure_plane(x, y, t1 - t0, group->width, first, plane);
            double is = sqrt(f.squares / f.energy);
            assert_true(fabs(group->plane_errors[i] - is) < 1e-3 * is + 1e-6);
            squares += f.squares / (f.scale * f.scale);
            energy += f.centred / (f.scale * f.scale);
            first += row_width(plane);
        }
        free(x);
        free(y);
    }
    return sqrt(squares / energy);
}

static void stored_errors_are_true(void **state)
{
    static const uint32_t profiles[] = {XKV_PROFILE_SVD, XKV_PROFILE_SCALAR};
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(700, XKV_F32, 1);

    (void)state;
    for (int i = 0; i < 6; i++) {
        xkv_pack_options o = options(profiles[i % 2], 0, i < 2 ? 0.3 : i < 4 ? 0.05 : 0.01);
        o.window = 2;
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *data = restore(ctx, &s, p.entry);
        double is = checked_error(&s, &p, data);
        assert_true(fabs(p.report.error_metric - is) < 1e-3 * is);
        assert_true(is <= o.error * 1.001);
        free(data);
        free_packed(ctx, &p);
    }
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Targets ------------------------------------------------------------------------------------------------------ */

static void error_is_kept(void **state)
{
    static const double errors[] = {0.5, 0.2, 0.05, 0.01};
    static const uint32_t tokens[] = {64, 1028, 2100};
    xkv_ctx *ctx = new_ctx(2);

    (void)state;
    for (int i = 0; i < 3; i++) {
        synthetic s = sample(tokens[i], XKV_F16, 1);
        for (int k = 0; k < 4; k++) {
            xkv_pack_options o = options(XKV_PROFILE_SVD, 0, errors[k]);
            packed p = pack_planes(ctx, &s, &o);
            if (p.report.lossless_groups > 0)
                fail_msg("%u tokens, error %g: %u groups are lossless", tokens[i], o.error, p.report.lossless_groups);
            assert_true(p.report.error_metric <= o.error);
            if (p.report.error_metric < 0.85 * o.error) /* it is used up: what is left out is a component at a time */
                fail_msg("%u tokens: asked %g, got %g", tokens[i], o.error, p.report.error_metric);
            free_packed(ctx, &p);
        }
        free_synthetic(&s);
    }
    xkv_ctx_free(ctx);
}

/* A component whose own step would take more than 16 bits gets a coarser one, and the others make up for it. */
static void components_fit_16_bits(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(300, XKV_F32, 1);
    xkv_pack_options o = options(XKV_PROFILE_SVD, 0, 2e-4);
    packed p = pack_planes(ctx, &s, &o);
    stored f = read_stored(ctx, &p, 0);
    double length = 0, squares = 0;

    (void)state;
    assert_int_equal(p.report.lossless_groups, 0);
    assert_true(p.report.error_metric <= o.error);
    for (uint32_t i = 0; i < f.width; i++)
        length += f.v[i] * f.v[i];
    for (uint32_t t = 0; t < f.tokens; t++)
        squares += f.a[t * f.rank] * f.a[t * f.rank];
    assert_true(8 * log2(sqrt(squares * length) / f.step) > f.exponents[0] + 1);
    free_stored(&f);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void ratio_is_met(void **state)
{
    static const double ratios[] = {3, 5, 8};
    static const uint32_t tokens[] = {1000, 2500};
    xkv_ctx *ctx = new_ctx(2);
    synthetic_options so = {
        .layers = 8, .heads = 2, .head_dim = 32, .dtype = XKV_F16, .rank = 12, .group_layers = 4, .noise = 0.2};

    (void)state;
    for (int i = 0; i < 2; i++) {
        so.tokens = tokens[i];
        synthetic s = make_synthetic(&so);
        for (int k = 0; k < 3; k++) {
            xkv_pack_options o = options(XKV_PROFILE_SVD, ratios[k], 0);
            o.group_layers = 4;
            packed p = pack_planes(ctx, &s, &o);
            if (fabs(p.report.ratio / o.ratio - 1) >= 0.01)
                fail_msg("%u tokens: asked %g, got %g", tokens[i], o.ratio, p.report.ratio);
            free_packed(ctx, &p);
        }
        free_synthetic(&s);
    }
    xkv_ctx_free(ctx);
}

/* On rows of low rank quantized factors take less than half of the bytes of 16-bit ones of no more error, and less than
 * profile scalar. */
static void fewer_bytes_than_other_profiles(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic_options so = sample_options(600);

    (void)state;
    so.head_dim = 32;
    synthetic s = make_synthetic(&so);
    xkv_pack_options o[3] = {options(XKV_PROFILE_SVD, 0, 0.1), options(XKV_PROFILE_SVD, 0, 0.1),
                             options(XKV_PROFILE_SCALAR, 0, 0.1)};
    o[1].half_factors = 1;
    o[1].error = 0.09;
    packed p[3];
    for (int i = 0; i < 3; i++)
        p[i] = pack_planes(ctx, &s, &o[i]);
    assert_true(p[0].report.error[XKV_PLANE_V] < 1.3 * p[1].report.error[XKV_PLANE_V]);
    assert_true(2 * p[0].m.size < p[1].m.size);
    assert_true(2 * p[0].m.size < p[2].m.size);
    for (int i = 0; i < 3; i++)
        free_packed(ctx, &p[i]);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Rows it does not suit ---------------------------------------------------------------------------------------- */

enum shift { NOISE, LARGE, HUGE_VALUE, CONSTANT, ZERO, SHIFTS };

static void shift_domain(synthetic *s, enum shift shift)
{
    float *x = (float *)(void *)s->data;
    uint64_t seed = 99;

    for (size_t i = 0; i < s->size / 4; i++) {
        if (shift == NOISE)
            x[i] = (float)(3 * test_normal(&seed));
        if (shift == LARGE)
            x[i] *= 1e12f;
        if (shift == CONSTANT)
            x[i] = 7;
        if (shift == ZERO)
            x[i] = 0;
    }
    if (shift == HUGE_VALUE)
        x[1000] = 1e30f;
}

static void other_domains_keep_the_error(void **state)
{
    static const double errors[] = {0.2, 0.03, 0.001};
    xkv_ctx *ctx = new_ctx(2);

    (void)state;
    for (int shift = 0; shift < SHIFTS; shift++)
        for (int k = 0; k < 6; k++) {
            synthetic s = sample(300, XKV_F32, 1);
            xkv_pack_options o = options(k < 3 ? XKV_PROFILE_SVD : XKV_PROFILE_AUTO, 0, errors[k % 3]);
            shift_domain(&s, (enum shift)shift);
            packed p = pack_planes(ctx, &s, &o);
            uint8_t *data = restore(ctx, &s, p.entry);
            assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
            assert_true(p.report.error_metric <= o.error);
            if (shift == NOISE && p.report.lossless_groups == 0)
                assert_true(checked_error(&s, &p, data) <= o.error * 1.001);
            for (size_t i = 0; shift == ZERO && i < s.size / 4; i++) /* or minus 0, after its rotation */
                assert_true(((float *)(void *)data)[i] == 0);
            free(data);
            free_packed(ctx, &p);
            free_synthetic(&s);
        }
    xkv_ctx_free(ctx);
}

static void nonfinite_groups_are_exact(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(300, XKV_F32, 1);
    xkv_pack_options o = options(XKV_PROFILE_SVD, 0, 0.05);

    (void)state;
    ((float *)s.views[7].data)[77] = NAN; /* V of the last layer */
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry);
    assert_int_equal(p.report.nonfinite_planes, 1);
    assert_int_equal(p.report.group_count, 3);
    assert_int_equal(p.report.lossless_groups, 1);
    assert_memory_equal(data + s.size / 8 * 7, s.data + s.size / 8 * 7, s.size / 8);
    free(data);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void mla_keeps_its_rotated_part(void **state)
{
    synthetic_options so = sample_options(300);
    xkv_ctx *ctx = new_ctx(2);
    xkv_pack_options o = options(XKV_PROFILE_SVD, 0, 0.05);

    (void)state;
    so.mla = 1;
    so.rope = 0;
    synthetic s = make_synthetic(&so);
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry);
    for (uint32_t i = 0; i < 8; i++) {
        bool exact = memcmp(data + s.size / 8 * i, s.data + s.size / 8 * i, s.size / 8) == 0;
        assert_int_equal(exact, i % 2 == 1);
    }
    assert_true(p.report.error[XKV_PLANE_LATENT] < 0.05 && p.report.error[XKV_PLANE_LATENT] > 0);
    free(data);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Tokens and threads ------------------------------------------------------------------------------------------- */

static void all_lengths_work(void **state)
{
    static const uint32_t tokens[] = {1, 4, 5, 6, 8, 31, 33, 255, 257, 700};
    xkv_ctx *ctx = new_ctx(2);

    (void)state;
    for (int i = 0; i < 20; i++) {
        uint32_t n = tokens[i / 2];
        synthetic s = sample(n, XKV_F16, 1);
        xkv_pack_options o = options(XKV_PROFILE_SVD, 0, 0.1);
        o.chunk_tokens = i % 2 ? 32 : 256;
        o.window = 3;
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *data = restore(ctx, &s, p.entry);
        size_t row = 16 * 2, plane = n * row, sinks = n < 4 ? n : 4, window = n - sinks < 3 ? n - sinks : 3;
        for (uint32_t k = 0; k < 8; k++) {
            assert_memory_equal(data + k * plane, s.data + k * plane, sinks * row);
            assert_memory_equal(data + (k + 1) * plane - window * row, s.data + (k + 1) * plane - window * row,
                                window * row);
        }
        assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
        assert_true(p.report.error_metric <= 0.1);
        free(data);
        free_packed(ctx, &p);
        free_synthetic(&s);
    }
    xkv_ctx_free(ctx);
}

static void every_range_is_a_slice(void **state)
{
    static const uint32_t edges[] = {0, 3, 4, 5, 32, 255, 256, 257, 512, 697, 699};
    enum { COUNT = sizeof edges / sizeof *edges };
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(700, XKV_F16, 1);
    xkv_pack_options o = options(XKV_PROFILE_SVD, 6, 0);
    uint8_t *part = malloc(s.size);
    xkv_view *views = views_into(&s, part);

    (void)state;
    o.window = 3;
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *whole = restore(ctx, &s, p.entry);
    for (int a = 0; a < COUNT; a++)
        for (int b = a; b < COUNT; b++) {
            xkv_read_options ro = xkv_read_options_default();
            ro.first_token = edges[a];
            ro.token_count = edges[b] + 1 - edges[a];
            assert_ok(ctx, xkv_entry_read(ctx, p.entry, &ro, views));
            for (uint32_t i = 0; i < s.geometry.plane_count; i++) {
                size_t row = (size_t)s.views[i].token_stride, plane = row * s.geometry.token_count;
                assert_memory_equal(part + i * plane, whole + i * plane + edges[a] * row, ro.token_count * row);
            }
        }
    free(views);
    free(part);
    free(whole);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void threads_do_not_change_a_byte(void **state)
{
    synthetic s = sample(1500, XKV_F16, 1);
    memory files[3][2] = {{{0}}};

    (void)state;
    for (uint32_t i = 0; i < 3; i++)
        for (int k = 0; k < 2; k++) {
            xkv_ctx *ctx = new_ctx(i + 1);
            xkv_pack_options o = options(k ? XKV_PROFILE_AUTO : XKV_PROFILE_SVD, k ? 5 : 0, k ? 0 : 0.1);
            packed p = pack_planes(ctx, &s, &o);
            files[i][k] = p.m;
            xkv_entry_close(ctx, p.entry);
            xkv_ctx_free(ctx);
            assert_int_equal(files[i][k].size, files[0][k].size);
            assert_memory_equal(files[i][k].data, files[0][k].data, files[0][k].size);
        }
    for (int i = 0; i < 6; i++)
        memory_free(&files[i / 2][i % 2]);
    free_synthetic(&s);
}

/* --- Damage ------------------------------------------------------------------------------------------------------- */

static void every_damaged_byte_is_found(void **state)
{
    synthetic s = make_synthetic(&(synthetic_options){.layers = 2,
                                                      .tokens = 70,
                                                      .heads = 1,
                                                      .head_dim = 4,
                                                      .dtype = XKV_F16,
                                                      .rank = 2,
                                                      .group_layers = 1,
                                                      .noise = 0.1});
    xkv_ctx *ctx = new_ctx(1);
    xkv_pack_options o = options(XKV_PROFILE_SVD, 0, 0.1);

    (void)state;
    o.chunk_tokens = 32;
    packed p = pack_planes(ctx, &s, &o);
    assert_int_equal(p.report.lossless_groups, 0);
    assert_damage_is_found(ctx, &p.m, open_entry, NULL);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Auto --------------------------------------------------------------------------------------------------------- */

/* Each estimate is near what the profile makes of the target, and the choice is the best of them. */
static void assert_choice(xkv_ctx *ctx, const synthetic *s, xkv_pack_options o, uint32_t expected)
{
    packed p = pack_planes(ctx, s, &o);
    const xkv_profile_estimate *best = &p.report.estimates[p.report.profile];
    double lossless = p.report.estimates[XKV_PROFILE_LOSSLESS].bytes;

    lossless = lossless > 0 ? lossless : (double)s->size;

    if (p.report.profile != expected)
        fail_msg("ratio %g, error %g: chose %u, expected %u", o.ratio, o.error, p.report.profile, expected);
    assert_true(best->bytes > 0);
    for (uint32_t profile = XKV_PROFILE_LOSSLESS; profile <= XKV_PROFILE_SCALAR; profile++) {
        const xkv_profile_estimate *e = &p.report.estimates[profile];
        xkv_pack_options alone = o;
        alone.profile = profile;
        if (profile == XKV_PROFILE_LOSSLESS)
            alone.error = alone.ratio = 0;
        if (e->bytes == 0 || (profile != XKV_PROFILE_LOSSLESS && e->bytes > lossless))
            continue;
        assert_true(o.ratio > 0 ? e->error >= best->error : e->bytes >= best->bytes);
        packed q = pack_planes(ctx, s, &alone);
        if (fabs((double)q.m.size / e->bytes - 1) > 0.05)
            fail_msg("profile %u: estimated %.0f bytes, got %zu", profile, e->bytes, q.m.size);
        if (profile == p.report.profile)
            assert_true(fabs((double)q.m.size / (double)p.m.size - 1) < 0.01);
        if (!o.dict) /* else auto measures in the dictionary's metric, and the profile by itself does not */
            assert_true(fabs(q.report.error_metric - e->error) <= 0.07 * e->error);
        free_packed(ctx, &q);
    }
    free_packed(ctx, &p);
}

static void auto_takes_the_best(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic_options so = sample_options(600);

    (void)state;
    so.head_dim = 32;
    synthetic low = make_synthetic(&so);
    so.rank = 0;
    synthetic noise = make_synthetic(&so);
    assert_choice(ctx, &low, options(XKV_PROFILE_AUTO, 0, 0.1), XKV_PROFILE_SVD);
    assert_choice(ctx, &low, options(XKV_PROFILE_AUTO, 6, 0), XKV_PROFILE_SVD);
    assert_choice(ctx, &noise, options(XKV_PROFILE_AUTO, 0, 0.1), XKV_PROFILE_SCALAR);
    assert_choice(ctx, &noise, options(XKV_PROFILE_AUTO, 4, 0), XKV_PROFILE_SCALAR);
    assert_choice(ctx, &noise, options(XKV_PROFILE_AUTO, 0, 1e-5), XKV_PROFILE_LOSSLESS);
    free_synthetic(&low);
    free_synthetic(&noise);
    xkv_ctx_free(ctx);
}

/* A dictionary is taken when it helps, and left when its rounding does not reach the error. */
static void auto_weighs_a_dictionary(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic_options so = sample_options(600);
    memory m = {0};
    xkv_dict *dict = NULL;
    xkv_train_options to = xkv_train_options_default();
    xkv_pack_options o = options(XKV_PROFILE_AUTO, 0, 0.2);

    (void)state;
    so.head_dim = 32;
    so.seed = 2;
    synthetic training = make_synthetic(&so);
    const synthetic *list = &training;
    so.seed = 1;
    synthetic s = make_synthetic(&so);
    to.group_layers = 2;
    assert_ok(ctx, train_on(ctx, &list, 1, &to, &m));
    xkv_input input = xkv_input_from_memory(m.data, m.size);
    assert_ok(ctx, xkv_dict_open(ctx, &input, 1, &dict));
    o.dict = dict;
    assert_choice(ctx, &s, o, XKV_PROFILE_DICT);
    o.ratio = 8;
    o.error = 0;
    assert_choice(ctx, &s, o, XKV_PROFILE_DICT);
    o.ratio = 0;
    for (o.error = 0.02; o.error > 0.001; o.error /= 2) {
        packed p = pack_planes(ctx, &s, &o);
        if (o.error < 0.002)
            assert_int_not_equal(p.report.profile, XKV_PROFILE_DICT);
        assert_true(p.report.error_metric <= o.error);
        assert_true(p.report.lossless_groups == 0 && p.report.ratio > 1.5);
        free_packed(ctx, &p);
    }
    xkv_dict_close(ctx, dict);
    memory_free(&m);
    free_synthetic(&training);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void ratio_out_of_reach(void **state)
{
    static const uint32_t profiles[] = {XKV_PROFILE_AUTO, XKV_PROFILE_SVD};
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = sample(64, XKV_F16, 1);

    (void)state;
    for (int i = 0; i < 2; i++) {
        xkv_pack_options o = options(profiles[i], 500, 0);
        memory m = {0};
        xkv_output output = memory_output(&m);
        assert_int_equal(xkv_pack(ctx, &s.geometry, s.views, NULL, NULL, 0, &o, &output, NULL), XKV_ERROR_TARGET);
        memory_free(&m);
    }
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_are_mean_plus_components),
        cmocka_unit_test(coefficients_are_least_squares),
        cmocka_unit_test(precision_follows_singular_values),
        cmocka_unit_test(stored_errors_are_true),
        cmocka_unit_test(error_is_kept),
        cmocka_unit_test(components_fit_16_bits),
        cmocka_unit_test(ratio_is_met),
        cmocka_unit_test(fewer_bytes_than_other_profiles),
        cmocka_unit_test(other_domains_keep_the_error),
        cmocka_unit_test(nonfinite_groups_are_exact),
        cmocka_unit_test(mla_keeps_its_rotated_part),
        cmocka_unit_test(all_lengths_work),
        cmocka_unit_test(every_range_is_a_slice),
        cmocka_unit_test(threads_do_not_change_a_byte),
        cmocka_unit_test(every_damaged_byte_is_found),
        cmocka_unit_test(auto_takes_the_best),
        cmocka_unit_test(auto_weighs_a_dictionary),
        cmocka_unit_test(ratio_out_of_reach),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
