/* make_ggsq.c - writes synthetic llama.cpp state files (sequence version 2, 3 or 4) to standard output.
 *
 *     make_ggsq [layers=N] [tokens=N] [width=N] [version=2|3|4] [dtype=f16|bf16|f32] [vtrans=1] [shuffle=1]
 *               [nan=LAYER] [inf=LAYER] [seed=N] [session=1] [window=N]
 *
 * Rows are sums of a few smooth curves and a little noise, so that they have low rank but not an exact one. Layout:
 * u32 magic, version, tokens; i32 ids; u32 streams, cells; {i32 pos, u32 1, i32 seq}; u32 v_trans, layers;
 * [version 4: u32 0, 0]; per layer {i32 type, u64 row bytes, rows} for K, then for V. A session has another magic, 7
 * more in its version, and u32 5, "llama" behind the ids. With window=N the second half of the layers has a cache of
 * its own behind the first, which holds the last N tokens. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    unsigned layers, tokens, width, version, vtrans, shuffle, seed, session, window;
    int nan_layer, inf_layer;
    const char *dtype;
} options;

static void put(const void *bytes, size_t size)
{
    if (fwrite(bytes, 1, size, stdout) != size)
        exit(1);
}

static void put32(uint32_t v)
{
    const uint8_t bytes[4] = {(uint8_t)v, (uint8_t)(v >> 8), (uint8_t)(v >> 16), (uint8_t)(v >> 24)};
    put(bytes, sizeof bytes);
}

/* Truncating conversion; the values here are normal numbers of f16, or NaN and infinity. */
static uint16_t to_f16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t sign = u >> 16 & 0x8000, exponent = u >> 23 & 0xff, mantissa = u >> 13 & 0x3ff;
    if (exponent == 0xff)
        return (uint16_t)(sign | 0x7c00 | (u & 0x7fffff ? 0x200 : 0));
    if (exponent <= 112)
        return (uint16_t)sign;
    return (uint16_t)(sign | (exponent - 112) << 10 | mantissa);
}

static void put_element(const options *o, float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    if (strcmp(o->dtype, "f32") == 0) {
        put32(u);
        return;
    }
    uint16_t half = strcmp(o->dtype, "f16") == 0 ? to_f16(f) : (uint16_t)(u >> 16);
    const uint8_t bytes[2] = {(uint8_t)half, (uint8_t)(half >> 8)};
    put(bytes, sizeof bytes);
}

static float value(const options *o, unsigned layer, int is_v, unsigned token, unsigned dim)
{
    if (!is_v && token == o->tokens / 2 && dim == 1) {
        if ((int)layer == o->nan_layer)
            return NAN;
        if ((int)layer == o->inf_layer)
            return INFINITY;
    }
    double x = 0;
    for (unsigned j = 1; j <= 6; j++)
        x += sin(token * 0.07 * j + o->seed) * cos(dim * 0.13 * j + layer * (is_v ? 0.9 : 0.5) + is_v) / j;
    /* A cheap hash as noise. */
    uint32_t h = (token * 73856093u) ^ (dim * 19349663u) ^ (layer * 83492791u) ^ (uint32_t)is_v;
    h = (h ^ h >> 15) * 0x2c1b3c6du;
    h = (h ^ h >> 12) * 0x297a2d39u;
    return (float)(x + 0.02 * ((h ^ h >> 15) / 4294967296.0 - 0.5));
}

/* A KV cache: some layers, and the last tokens. */
typedef struct memory {
    unsigned first_layer, layers, first_token, cells;
} memory;

/* Cell i holds the token of this number. */
static unsigned token_of(const options *o, const memory *m, unsigned cell)
{
    return m->first_token + (o->shuffle ? (cell + m->cells / 3) % m->cells : cell);
}

static void put_tensor(const options *o, const memory *m, unsigned layer, int is_v)
{
    uint32_t type = strcmp(o->dtype, "f32") == 0 ? 0 : strcmp(o->dtype, "f16") == 0 ? 1 : 30;
    uint32_t element = type == 0 ? 4 : 2;
    put32(type);
    if (is_v && o->vtrans) {
        put32(element);
        put32(o->width);
        for (unsigned dim = 0; dim < o->width; dim++) {
            for (unsigned cell = 0; cell < m->cells; cell++)
                put_element(o, value(o, layer, is_v, token_of(o, m, cell), dim));
        }
        return;
    }
    put32(o->width * element);
    put32(0);
    for (unsigned cell = 0; cell < m->cells; cell++) {
        for (unsigned dim = 0; dim < o->width; dim++)
            put_element(o, value(o, layer, is_v, token_of(o, m, cell), dim));
    }
}

static void put_memory(const options *o, const memory *m)
{
    put32(1);
    put32(m->cells);
    if (m->cells == 0)
        return;
    for (unsigned i = 0; i < m->cells; i++) {
        put32(token_of(o, m, i));
        put32(1);
        put32(0);
    }
    put32(o->vtrans);
    put32(m->layers);
    if (o->version >= 4) {
        put32(0);
        put32(0);
    }
    for (int is_v = 0; is_v < 2; is_v++) {
        for (unsigned i = 0; i < m->layers; i++)
            put_tensor(o, m, m->first_layer + i, is_v);
    }
}

static void put_file(const options *o)
{
    unsigned split = o->window > 0 ? o->layers / 2 : o->layers, local = o->window < o->tokens ? o->window : o->tokens;
    put32(o->session ? 0x6767736e : 0x67677371);
    put32(o->session ? o->version + 7 : o->version);
    put32(o->tokens);
    for (unsigned i = 0; i < o->tokens; i++)
        put32(100 + i * 7 % 1000);
    if (o->session) {
        put32(5);
        put("llama", 5);
    }
    put_memory(o, &(memory){0, split, 0, o->tokens});
    if (o->window > 0)
        put_memory(o, &(memory){split, o->layers - split, o->tokens - local, local});
}

int main(int argc, char **argv)
{
    options o = {
        .layers = 4, .tokens = 100, .width = 32, .version = 3, .nan_layer = -1, .inf_layer = -1, .dtype = "f16"};
    const struct {
        const char *name;
        void *target;
    } numbers[] = {{"layers", &o.layers}, {"tokens", &o.tokens},   {"width", &o.width},  {"version", &o.version},
                   {"vtrans", &o.vtrans}, {"shuffle", &o.shuffle}, {"seed", &o.seed},    {"session", &o.session},
                   {"window", &o.window}, {"nan", &o.nan_layer},   {"inf", &o.inf_layer}};
    for (int i = 1; i < argc; i++) {
        char *equals = strchr(argv[i], '=');
        size_t known = 0;
        if (equals == NULL)
            return 2;
        *equals = '\0';
        if (strcmp(argv[i], "dtype") == 0) {
            o.dtype = equals + 1;
            continue;
        }
        for (; known < sizeof numbers / sizeof *numbers && strcmp(argv[i], numbers[known].name) != 0; known++)
            ;
        if (known == sizeof numbers / sizeof *numbers)
            return 2;
        *(int *)numbers[known].target = (int)strtol(equals + 1, NULL, 10);
    }
    put_file(&o);
    return fflush(stdout) == 0 ? 0 : 1;
}
