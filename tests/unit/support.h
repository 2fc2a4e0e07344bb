/* support.h - what several unit tests need: a growing memory output, a deterministic generator, synthetic caches. */
#ifndef XKV_TEST_SUPPORT_H
#define XKV_TEST_SUPPORT_H

/* cmocka wants these before its own header. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "xkv/codec.h"

#define assert_ok(ctx, expr)                                                                                           \
    do {                                                                                                               \
        xkv_status assert_status_ = (expr);                                                                            \
        if (assert_status_ != XKV_OK)                                                                                  \
            fail_msg("%s: %s", xkv_status_string(assert_status_), xkv_ctx_error(ctx));                                 \
    } while (0)

/* --- Memory output --- */

typedef struct memory {
    uint8_t *data;
    size_t size;
    int fail_at; /* the fail_at-th write fails (1 = the first); 0: never */
    int writes;
} memory;

xkv_output memory_output(memory *m);
void memory_free(memory *m);

/* --- Numbers --- */

/* A splitmix64 sequence: the same on every machine. */
uint64_t test_random(uint64_t *state);
double test_uniform(uint64_t *state); /* [0, 1) */
double test_normal(uint64_t *state);

/* f32 <-> f16 and bf16 written anew for the tests, slow and plain. */
double test_from_half(uint16_t h);
double test_from_bf16(uint16_t h);
uint16_t test_to_half(double x);
uint16_t test_to_bf16(double x);

/* ggml's blocks of 32 elements, likewise; x and what is made of it must be finite. */
void test_quantize(uint32_t dtype, const float *x, uint8_t *block);
double test_from_block(uint32_t dtype, const uint8_t *block, uint32_t i);

/* --- Synthetic caches: planes token-major, one behind the other --- */

typedef struct synthetic {
    xkv_geometry geometry;
    xkv_plane *planes;
    xkv_rope *ropes;
    int32_t *positions;
    xkv_view *views;
    uint8_t *data;
    size_t size;
} synthetic;

typedef struct synthetic_options {
    uint32_t layers, tokens, heads, head_dim, dtype;
    uint32_t rank; /* of each group of group_layers layers; 0: full-rank noise */
    uint32_t group_layers;
    double noise; /* added white noise relative to the signal */
    double mean;  /* size of a constant row that is added to all of a plane */
    int rope;     /* rotate K */
    int mla;      /* latent and K-rope instead of K and V */
    int32_t first_position;
    uint64_t seed; /* other tokens of the same model */
} synthetic_options;

synthetic make_synthetic(const synthetic_options *o);
void free_synthetic(synthetic *s);

/* Views of the same planes in another buffer of s->size bytes. */
xkv_view *views_into(const synthetic *s, uint8_t *data);

/* Element (t, i) of plane p in `data`, whatever its dtype. */
double element(const synthetic *s, const uint8_t *data, uint32_t plane, uint32_t t, uint32_t i);

/* Elements of a row of a plane; row t of plane p in `data`, K before RoPE. */
uint32_t row_width(const xkv_plane *p);
void plane_row(const synthetic *s, const uint8_t *data, uint32_t plane, uint32_t t, double *row);
/* The same after RoPE at another position than its own. */
void moved_row(const synthetic *s, const uint8_t *data, uint32_t plane, uint32_t t, int32_t position, double *row);

/* --- Packing --- */

xkv_ctx *new_ctx(uint32_t threads);

/* An entry in memory, opened, with its dictionary attached. */
typedef struct packed {
    memory m;
    xkv_pack_report report;
    xkv_input input;
    xkv_entry *entry;
} packed;

packed pack_planes(xkv_ctx *ctx, const synthetic *s, const xkv_pack_options *o);
void free_packed(xkv_ctx *ctx, packed *p);

/* The whole entry restored into a buffer laid out like s->data. */
uint8_t *restore(xkv_ctx *ctx, const synthetic *s, const xkv_entry *entry);

/* Train on synthetic caches (at most 8). */
xkv_status train_on(xkv_ctx *ctx, const synthetic *const *list, uint32_t count, const xkv_train_options *o, memory *m);

/* --- Damage --- */

typedef xkv_status (*open_fn)(xkv_ctx *ctx, const xkv_dict *dict, const uint8_t *data, size_t size);

/* Open an entry, with its dictionary unless that is NULL, and verify it. */
xkv_status open_entry(xkv_ctx *ctx, const xkv_dict *dict, const uint8_t *data, size_t size);

/* A file that `open` takes: it takes none with bits of one byte flipped, and none that is cut short. */
void assert_damage_is_found(xkv_ctx *ctx, const memory *m, open_fn open, const xkv_dict *dict);

#endif
