/* engine_support.h - what the tests of engine files share: synthetic llama.cpp state files and ways to look at
 * caches. Offsets and layouts are those of spec/engines.md, written down here a second time. */
#ifndef XKV_TEST_ENGINE_SUPPORT_H
#define XKV_TEST_ENGINE_SUPPORT_H

#include "bytes.h"
#include "xkv/format.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

enum { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q4_0 = 2, TYPE_Q8_0 = 8, TYPE_IQ4_NL = 20, TYPE_BF16 = 30 };

typedef enum file_kind { SEQUENCE_FILE, SESSION_FILE, BLOB } file_kind;

/* x and y of a cell's extension: noise, zeros, its position. */
typedef enum extension_kind { SEVERAL_POSITIONS, TEXT_POSITIONS, EQUAL_POSITIONS } extension_kind;

typedef struct sequence {
    file_kind kind;
    uint32_t version;         /* as sequence files count it: sessions have 7 more, blobs none */
    const char *architecture; /* sessions */
    int output_section;       /* sessions: as engines before February 2026 */
    uint32_t outputs;         /* in that section, each with 7 logits and 3 elements of an embedding */
    int streams;              /* 0: the form without n_stream */
    int used;                 /* the stream that has the cells */
    uint32_t ids;             /* token ids 100, 101, ... */
    int served;               /* in the form of servers: -1, version 1, their number, ids, no media */
    uint32_t cells;           /* cells */
    const int32_t *at;        /* their positions; NULL: 0, 1, ... */
    uint32_t extension;
    extension_kind positions;
    uint32_t v_trans, layers, k_type, k_row, v_type, v_row; /* v_row 0: K only; rows in bytes */
    uint32_t rot_k;
    const struct sequence *second; /* the cache of the layers with a window, behind the first; its head is not used */
} sequence;

/* The case most tests vary: offsets 20 n_stream, 28 cells, 64 v_trans, 84 K0, 120 K1, 156 V0, 180 V1, 192 end. */
static inline sequence plain_sequence(void)
{
    return (sequence){.version = 3,
                      .streams = 1,
                      .ids = 2,
                      .cells = 3,
                      .layers = 2,
                      .k_type = TYPE_F16,
                      .k_row = 8,
                      .v_type = TYPE_F16,
                      .v_row = 4};
}

/* {i32 x, i32 y, [i32 token]}. */
static inline void put_extension(bytes *b, const sequence *s, uint32_t pos)
{
    if (s->extension == 0)
        return;
    if (s->positions == SEVERAL_POSITIONS) {
        put_noise(b, s->extension, 77 + pos);
        return;
    }
    put32(b, s->positions == EQUAL_POSITIONS ? pos : 0);
    put32(b, s->positions == EQUAL_POSITIONS ? pos : 0);
    if (s->extension > 8)
        put32(b, 31000 + pos);
}

static inline void put_memory(bytes *b, const sequence *s)
{
    for (int stream = 0; stream < (s->streams ? s->streams : 1); stream++) {
        if (stream == 0 && s->streams)
            put32(b, (uint32_t)s->streams);
        bool used = stream == s->used && s->cells > 0;
        put32(b, used ? s->cells : 0);
        if (!used && (s->streams || s->layers == 0))
            continue;
        for (uint32_t i = 0; i < s->cells; i++) {
            put32(b, (uint32_t)(s->at ? s->at[i] : (int32_t)i));
            put32(b, 1);
            put_extension(b, s, (uint32_t)(s->at ? s->at[i] : (int32_t)i));
            put32(b, 5); /* seq_id: read and discarded by the engine */
        }
        put32(b, s->v_trans);
        put32(b, s->layers);
        if (s->version == 4) {
            put32(b, s->rot_k);
            put32(b, s->rot_k);
        }
        for (uint32_t i = 0; i < s->layers; i++) {
            put32(b, s->k_type);
            put64(b, s->k_row);
            put_noise(b, (size_t)s->cells * s->k_row, 1000 + i);
        }
        for (uint32_t i = 0; s->v_row && i < s->layers; i++) {
            uint32_t element = s->v_type == TYPE_F32 ? 4 : 2;
            put32(b, s->v_type);
            if (s->v_trans) {
                put32(b, element);
                put32(b, s->v_row / element);
            } else {
                put64(b, s->v_row);
            }
            put_noise(b, (size_t)s->cells * s->v_row, 2000 + i);
        }
    }
}

static inline void put_token_ids(bytes *b, const sequence *s)
{
    put32(b, s->served ? s->ids + 4 : s->ids);
    if (s->served) {
        put32(b, UINT32_MAX);
        put32(b, 1);
        put32(b, s->ids);
    }
    for (uint32_t i = 0; i < s->ids; i++)
        put32(b, 100 + i);
    if (s->served)
        put32(b, 0);
}

static inline void put_session_fields(bytes *b, const sequence *s)
{
    put32(b, (uint32_t)strlen(s->architecture));
    put(b, s->architecture, strlen(s->architecture));
    if (!s->output_section)
        return;
    put32(b, s->outputs);
    for (uint32_t i = 0; i < s->outputs; i++)
        put32(b, s->cells - 1 - i); /* places in the batch */
    put64(b, 7 * (uint64_t)s->outputs);
    put_noise(b, 4 * 7 * (size_t)s->outputs, 31);
    put64(b, 3 * (uint64_t)s->outputs);
    put_noise(b, 4 * 3 * (size_t)s->outputs, 32);
}

/* A file of any kind. */
static inline void put_sequence(bytes *b, const sequence *s)
{
    b->size = 0;
    if (s->kind == BLOB) {
        put32(b, 0xaf143cd8);
        put32(b, 5);
    } else {
        put32(b, s->kind == SESSION_FILE ? 0x6767736e : 0x67677371);
        put32(b, s->kind == SESSION_FILE ? s->version + 7 : s->version);
        put_token_ids(b, s);
    }
    if (s->kind == SESSION_FILE)
        put_session_fields(b, s);
    put_memory(b, s);
    if (s->second)
        put_memory(b, s->second);
}

static inline uint32_t engine_of(const sequence *s)
{
    static const uint32_t engines[] = {XKV_ENGINE_LLAMA_SEQUENCE, XKV_ENGINE_LLAMA_SESSION, XKV_ENGINE_LLAMA_BLOB};
    return engines[s->kind];
}

/* A server's checkpoints: two of them. */
static inline void put_checkpoints(bytes *b)
{
    put32(b, 0x504b4353);
    put32(b, 1);
    put32(b, 2);
    for (int i = 0; i < 2; i++) {
        put64(b, 7);
        put32(b, 0);
        put32(b, 6);
        for (uint32_t part = 0; part < 3; part++) {
            put64(b, part * 5);
            put_noise(b, part * 5, part);
        }
    }
}

/* Address of element (t, h, d) of a view, as xkv/format.h defines it. */
static inline uint8_t *view_element(const xkv_view *v, uint32_t t, uint32_t h, uint32_t d)
{
    return (uint8_t *)v->data + (v->rows ? v->rows[t] : t) * v->token_stride + h * v->head_stride + d * v->dim_stride;
}

/* Address of element i of a row, or of the block it begins. */
static inline uint8_t *row_element(const xkv_view *v, const xkv_plane *p, uint32_t t, uint32_t i)
{
    uint32_t dim = v->head_dim ? v->head_dim : p->head_dim;
    return view_element(v, t, i / dim, i % dim / xkv_dtype_block(v->dtype));
}

#define FOR_EACH_BLOCK(p, tokens, t, e)                                                                                \
    for (uint32_t t = 0; t < (tokens); t++)                                                                            \
        for (uint32_t e = 0; e < (p)->heads * (p)->head_dim; e += xkv_dtype_block((p)->dtype))

/* Fails unless the planes of both caches hold the same first `tokens` rows. */
static inline void assert_equal_rows(const xkv_geometry *g, const xkv_view *a, const xkv_view *b, uint32_t tokens)
{
    for (uint32_t i = 0; i < g->plane_count; i++)
        FOR_EACH_BLOCK(&g->planes[i], tokens, t, e)
    assert_memory_equal(row_element(&a[i], &g->planes[i], t, e), row_element(&b[i], &g->planes[i], t, e),
                        xkv_dtype_size(g->planes[i].dtype));
}

static inline void copy_rows(const xkv_geometry *g, const xkv_view *to, const xkv_view *from, uint32_t tokens)
{
    for (uint32_t i = 0; i < g->plane_count; i++)
        FOR_EACH_BLOCK(&g->planes[i], tokens, t, e)
    memcpy(row_element(&to[i], &g->planes[i], t, e), row_element(&from[i], &g->planes[i], t, e),
           xkv_dtype_size(g->planes[i].dtype));
}

/* The literal bytes of a framing in an image whose tensors are zero; free() it. */
static inline uint8_t *literal_image(const xkv_framing *f)
{
    uint8_t *image = calloc(1, (size_t)f->source_size);
    const uint8_t *literals = f->literals;
    uint64_t offset = 0;
    assert_non_null(image);
    for (uint32_t i = 0; i < f->segment_count; i++) {
        if (f->segments[i].plane_count == 0) {
            memcpy(image + offset, literals, (size_t)f->segments[i].size);
            literals += f->segments[i].size;
        }
        offset += f->segments[i].size;
    }
    assert_int_equal(offset, f->source_size);
    assert_int_equal(literals - f->literals, f->literal_size);
    return image;
}

/* Fails unless literals and views together give back the file. */
static inline void assert_framing_is_file(xkv_ctx *ctx, const xkv_cache *cache, const void *file, size_t size)
{
    const xkv_framing *f = xkv_cache_framing(cache);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    assert_int_equal(f->source_size, size);
    uint8_t *image = literal_image(f);
    xkv_view *views = calloc(g->plane_count + 1, sizeof *views);
    assert_int_equal(xkv_framing_views(ctx, f, g, image, views), XKV_OK);
    copy_rows(g, views, xkv_cache_views(cache), g->token_count);
    assert_memory_equal(image, file, size);
    free(views);
    free(image);
}

#endif
