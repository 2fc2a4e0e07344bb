#include "gpu_support.h"

#include "warp_pack.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 256, PATTERN = 0x5a };

/* --- The device --------------------------------------------------------------------------------------------------- */

const xkv_plugin *gpu_open(const char *path, xkv_plug_device **device_p)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const xkv_plugin *api = library ? dlsym(library, XKV_PLUGIN_SYMBOL) : NULL;
    char why[256] = "";

    if (!api || api->abi != XKV_PLUGIN_ABI) {
        fprintf(stderr, "%s: %s\n", path, library ? "not this version's plug-in" : dlerror());
        exit(1);
    }
    if (api->count(why, sizeof why) == 0) {
        printf("SKIP: %s\n", why);
        exit(GPU_SKIP);
    }
    if (api->open(0, device_p, why, sizeof why) != XKV_OK) {
        fprintf(stderr, "device 0: %s\n", why);
        exit(1);
    }
    return api;
}

void gpu_try(const xkv_plugin *api, const xkv_plug_device *d, xkv_status status, const char *what)
{
    if (status == XKV_OK)
        return;
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, api->error(d));
    exit(1);
}

gpu gpu_start(const char *path)
{
    gpu g = {0};

    g.api = gpu_open(path, &g.d);
    GPU_TRY(&g, stream_create(g.d, &g.stream));
    GPU_TRY(&g, event_create(g.d, &g.event));
    return g;
}

void gpu_end(gpu *g)
{
    g->api->event_destroy(g->d, g->event);
    g->api->stream_destroy(g->d, g->stream);
    g->api->close(g->d);
}

void gpu_wait(gpu *g)
{
    GPU_TRY(g, record(g->d, g->event, g->stream));
    GPU_TRY(g, wait(g->d, g->event));
}

/* --- Memory ------------------------------------------------------------------------------------------------------- */

gpu_block gpu_alloc(gpu *g, size_t size)
{
    gpu_block b = {.size = size};
    uint8_t *pattern = malloc(size + 2 * GUARD);

    memset(pattern, PATTERN, size + 2 * GUARD);
    GPU_TRY(g, alloc(g->d, size + 2 * GUARD, (void **)&b.raw));
    GPU_TRY(g, copy(g->d, b.raw, pattern, size + 2 * GUARD, g->stream));
    gpu_wait(g);
    free(pattern);
    b.p = b.raw + GUARD;
    return b;
}

gpu_block gpu_put(gpu *g, const void *from, size_t size)
{
    gpu_block b = gpu_alloc(g, size);

    GPU_TRY(g, copy(g->d, b.p, from, size, g->stream));
    gpu_wait(g);
    return b;
}

void gpu_get(gpu *g, const gpu_block *b, void *to)
{
    GPU_TRY(g, copy(g->d, to, b->p, b->size, g->stream));
    gpu_wait(g);
}

bool gpu_free(gpu *g, gpu_block *b)
{
    uint8_t guards[2 * GUARD];
    bool whole = true;

    GPU_TRY(g, copy(g->d, guards, b->raw, GUARD, g->stream));
    GPU_TRY(g, copy(g->d, guards + GUARD, b->p + b->size, GUARD, g->stream));
    gpu_wait(g);
    for (size_t i = 0; i < sizeof guards; i++)
        whole = whole && guards[i] == PATTERN;
    g->api->release(g->d, b->raw);
    *b = (gpu_block){0};
    return whole;
}

/* --- Numbers ------------------------------------------------------------------------------------------------------ */

uint64_t gpu_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

double gpu_normal(uint64_t *state)
{
    double u = ((double)(gpu_random(state) >> 11) + 1) * 0x1p-53, v = (double)(gpu_random(state) >> 11) * 0x1p-53;

    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

int16_t gpu_value(uint32_t table, uint64_t *state)
{
    double x = gpu_normal(state) * exp2(-3 + (table - 1) % 60 / 4.0);

    if (gpu_random(state) % 32 == 0)
        x = (double)xkv_table_span(table) + (double)(gpu_random(state) % 3) - 1;
    if (gpu_random(state) % 64 == 0)
        x = (double)(gpu_random(state) % 65535) - 32767;
    return (int16_t)fmin(fmax(rint(gpu_random(state) % 2 ? x : -x), -32767), 32767);
}

/* --- rANS --------------------------------------------------------------------------------------------------------- */

static const xkv_warp_encode_table *encode_tables(void)
{
    static xkv_warp_encode_table tables[XKV_BASE_TABLES];

    if (tables[0].reach == 0)
        xkv_device_encode_tables(tables);
    return tables;
}

size_t gpu_encode(const int16_t *q, size_t stride, uint32_t tokens, const uint8_t *tables, uint32_t components,
                  uint8_t *out)
{
    uint32_t lanes = tokens < 32 ? tokens : 32, bound = 2 * lanes + 2 * components * tokens;
    uint16_t *words = malloc(bound * sizeof *words);
    xkv_warp_writer w;
    size_t size;

    xkv_warp_write_from(&w, words, bound);
    for (uint32_t i = components; i-- > 0;) {
        xkv_warp_code code = xkv_device_code(tables[i]);
        xkv_warp_encode_component(&w, &encode_tables()[code.table], code.shift, tokens, q + i * stride);
    }
    xkv_warp_write_states(&w, lanes);
    size = (bound - w.next) * sizeof *words;
    memcpy(out, words + w.next, size);
    free(words);
    return size;
}

uint32_t gpu_decode(const xkv_warp_table *tables, const uint8_t *data, size_t size, uint32_t tokens,
                    const uint8_t *components, uint32_t count, int16_t *q, size_t stride)
{
    xkv_warp_reader r;
    uint32_t fault = xkv_warp_open(&r, data, (uint32_t)size, tokens < 32 ? tokens : 32);

    for (uint32_t i = 0; i < count && fault == 0; i++) {
        xkv_warp_code code = xkv_device_code(components[i]);
        if (!xkv_warp_decode_component(&r, &tables[code.table], code.shift, tokens, q + i * stride))
            fault = XKV_WARP_TOO_SHORT;
    }
    return fault ? fault : xkv_warp_close(&r);
}
