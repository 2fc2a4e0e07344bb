#include "synthetic.h"

#include "bench.h"

#include <math.h>
#include <stdlib.h>

const char *synthetic_spectrum_name(synthetic_spectrum spectrum)
{
    static const char *const names[] = {"k^-0.5", "k^-1", "exp(-8k/N)"};

    return names[spectrum];
}

/* --- Geometry ----------------------------------------------------------------------------------------------------- */

static void set_rope(xkv_rope *rope, uint32_t head_dim)
{
    rope->n_rot = head_dim;
    rope->style = XKV_ROPE_HALF_SPLIT;
    rope->scale = 1;
    for (uint32_t i = 0; i < head_dim / 2; i++)
        rope->inv_freq[i] = pow(10000.0, -2.0 * i / head_dim);
}

synthetic synthetic_create(uint32_t tokens, uint32_t layers, uint32_t heads, uint32_t head_dim)
{
    synthetic s = {.planes = bench_alloc(2 * layers, sizeof *s.planes),
                   .rope = bench_alloc(1, sizeof *s.rope),
                   .positions = bench_alloc(tokens, sizeof *s.positions)};

    for (uint32_t i = 0; i < 2 * layers; i++)
        s.planes[i] = (xkv_plane){.layer = i / 2,
                                  .kind = i % 2 ? XKV_PLANE_V : XKV_PLANE_K,
                                  .dtype = XKV_BF16,
                                  .heads = heads,
                                  .head_dim = head_dim,
                                  .rope = i % 2 ? XKV_NO_ROPE : 0};
    for (uint32_t t = 0; t < tokens; t++)
        s.positions[t] = (int32_t)t;
    set_rope(s.rope, head_dim);
    s.geometry = (xkv_geometry){.layer_count = layers,
                                .plane_count = 2 * layers,
                                .rope_count = 1,
                                .token_count = tokens,
                                .planes = s.planes,
                                .ropes = s.rope,
                                .positions = s.positions};
    return s;
}

void synthetic_free(synthetic *s)
{
    free(s->planes);
    free(s->rope);
    free(s->positions);
    *s = (synthetic){0};
}

/* --- Numbers from counters ---------------------------------------------------------------------------------------- */

/* The finalizer of splitmix64 over key and counter. */
static uint64_t hash(uint64_t key, uint64_t counter)
{
    uint64_t x = key * 0xd1342543de82ef95u + counter * 0x9e3779b97f4a7c15u;

    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Nearly normal, mean 0, variance 1: the sum of four 16-bit uniforms, exact on every machine. */
static float nearly_normal(uint64_t bits)
{
    uint64_t sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);

    return ((float)sum - 131070.0f) * (1.7320508f / 65536.0f);
}

/* --- Rows with a given covariance --------------------------------------------------------------------------------- */

/* What the rows of one group are made of: x = M (z * sigma) * sign, M orthogonal. */
typedef struct mixer {
    uint64_t key;
    uint32_t width, block, blocks; /* width = blocks * block, block the largest power of two in it */
    float *sigma, *sign;           /* [width] */
    float *hartley;                /* [blocks][blocks] */
    float *row, *scratch;          /* [width], [blocks] */
} mixer;

static double singular_value(synthetic_spectrum spectrum, double k, double n)
{
    if (spectrum == SYNTHETIC_EXPONENTIAL)
        return exp(-8 * k / n) + 0.001;
    return pow(k, spectrum == SYNTHETIC_ROOT ? -0.5 : -1.0);
}

/* Scaled so that the elements have variance 1, whatever the spectrum. */
static void set_sigma(mixer *m, synthetic_spectrum spectrum)
{
    double squares = 0;

    for (uint32_t k = 0; k < m->width; k++)
        squares += pow(singular_value(spectrum, k + 1, m->width), 2);
    for (uint32_t k = 0; k < m->width; k++)
        m->sigma[k] = (float)(singular_value(spectrum, k + 1, m->width) * sqrt(m->width / squares));
}

static mixer mixer_create(uint64_t key, uint32_t width, synthetic_spectrum spectrum)
{
    mixer m = {.key = key, .width = width, .block = width & (0u - width)};

    m.blocks = width / m.block;
    m.sigma = bench_alloc(width, sizeof *m.sigma);
    m.sign = bench_alloc(width, sizeof *m.sign);
    m.row = bench_alloc(width, sizeof *m.row);
    m.scratch = bench_alloc(m.blocks, sizeof *m.scratch);
    m.hartley = bench_alloc((size_t)m.blocks * m.blocks, sizeof *m.hartley);
    set_sigma(&m, spectrum);
    for (uint32_t k = 0; k < width; k++)
        m.sign[k] = hash(key, k) & 1 ? 1.0f : -1.0f;
    for (uint32_t i = 0; i < m.blocks * m.blocks; i++) {
        double angle = 2 * 3.14159265358979323846 * (i / m.blocks) * (i % m.blocks) / m.blocks;
        m.hartley[i] = (float)((cos(angle) + sin(angle)) / sqrt(m.blocks));
    }
    return m;
}

static void mixer_free(mixer *m)
{
    free(m->sigma);
    free(m->sign);
    free(m->row);
    free(m->scratch);
    free(m->hartley);
}

/* Orthonormal Walsh-Hadamard transform of n = 2^i elements. */
static void hadamard(float *x, uint32_t n)
{
    const float root = 0.70710678f;

    for (uint32_t half = 1; half < n; half *= 2)
        for (uint32_t i = 0; i < n; i += 2 * half)
            for (uint32_t j = i; j < i + half; j++) {
                float a = x[j], b = x[j + half];
                x[j] = (a + b) * root;
                x[j + half] = (a - b) * root;
            }
}

/* Orthonormal Hartley transform over the odd factor of the width, at stride `block`. */
static void hartley(mixer *m, float *x)
{
    for (uint32_t i = 0; i < m->blocks; i++) {
        m->scratch[i] = 0;
        for (uint32_t j = 0; j < m->blocks; j++)
            m->scratch[i] += m->hartley[i * m->blocks + j] * x[(size_t)j * m->block];
    }
    for (uint32_t i = 0; i < m->blocks; i++)
        x[(size_t)i * m->block] = m->scratch[i];
}

static const float *mixer_row(mixer *m, uint32_t token)
{
    for (uint32_t k = 0; k < m->width; k++)
        m->row[k] = m->sigma[k] * nearly_normal(hash(m->key + 1, (uint64_t)token << 20 | k));
    for (uint32_t i = 0; i < m->blocks; i++)
        hadamard(m->row + (size_t)i * m->block, m->block);
    for (uint32_t i = 0; i < m->block && m->blocks > 1; i++)
        hartley(m, m->row + i);
    for (uint32_t k = 0; k < m->width; k++)
        m->row[k] *= m->sign[k];
    return m->row;
}

/* --- Rows to planes ----------------------------------------------------------------------------------------------- */

static void angles(const xkv_rope *rope, int32_t position, float *cosines, float *sines)
{
    for (uint32_t i = 0; i < rope->n_rot / 2; i++) {
        cosines[i] = (float)cos(position * rope->inv_freq[i]);
        sines[i] = (float)sin(position * rope->inv_freq[i]);
    }
}

static void rotate(const float *x, uint32_t half, const float *cosines, const float *sines, float *y)
{
    for (uint32_t i = 0; i < half; i++) {
        y[i] = x[i] * cosines[i] - x[i + half] * sines[i];
        y[i + half] = x[i] * sines[i] + x[i + half] * cosines[i];
    }
}

/* To the nearest, ties to even; the values here are finite. */
static uint16_t to_bf16(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void store_head(const xkv_view *view, uint32_t token, uint32_t head, const float *x, uint32_t head_dim)
{
    uint8_t *dst = (uint8_t *)view->data + view->token_stride * (view->rows ? view->rows[token] : token) +
                   view->head_stride * head;

    for (uint32_t i = 0; i < head_dim; i++) {
        uint16_t v = to_bf16(x[i]);
        memcpy(dst + view->dim_stride * i, &v, 2);
    }
}

static void store_row(const synthetic *s, const xkv_view *views, uint32_t plane, uint32_t token, const float *cos_sin,
                      const float *x)
{
    const xkv_plane *p = &s->planes[plane];
    float rotated[2 * XKV_MAX_ROPE_PAIRS];

    for (uint32_t head = 0; head < p->heads; head++, x += p->head_dim) {
        const float *y = x;
        if (p->kind == XKV_PLANE_K) {
            rotate(x, p->head_dim / 2, cos_sin, cos_sin + XKV_MAX_ROPE_PAIRS, rotated);
            y = rotated;
        }
        store_head(&views[plane], token, head, y, p->head_dim);
    }
}

/* Planes `kind` (0 or 1) of layers [first, end). */
static void fill_group(const synthetic *s, uint32_t first, uint32_t end, uint32_t kind, synthetic_spectrum spectrum,
                       const xkv_view *views)
{
    uint32_t width = s->planes->heads * s->planes->head_dim;
    mixer m = mixer_create(2ull * (2ull * first + kind), (end - first) * width, spectrum);
    float cos_sin[2 * XKV_MAX_ROPE_PAIRS];

    for (uint32_t t = 0; t < s->geometry.token_count; t++) {
        const float *row = mixer_row(&m, t);
        if (kind == XKV_PLANE_K)
            angles(s->rope, s->positions[t], cos_sin, cos_sin + XKV_MAX_ROPE_PAIRS);
        for (uint32_t layer = first; layer < end; layer++)
            store_row(s, views, 2 * layer + kind, t, cos_sin, row + (size_t)(layer - first) * width);
    }
    mixer_free(&m);
}

void synthetic_fill(const synthetic *s, uint32_t group_layers, synthetic_spectrum spectrum, const xkv_view *views)
{
    uint32_t layers = s->geometry.layer_count;

    for (uint32_t first = 0; first < layers; first += group_layers)
        for (uint32_t kind = 0; kind < 2; kind++)
            fill_group(s, first, first + group_layers < layers ? first + group_layers : layers, kind, spectrum, views);
}
