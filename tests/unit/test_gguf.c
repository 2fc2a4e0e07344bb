/* test_gguf.c - models from GGUF headers: geometry, rotations and their scalings, fingerprint, damage. */
#include "bytes.h"
#include "engine_file.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <xxhash.h>

#include <cmocka.h>

enum { U32 = 4, F32 = 6, STRING = 8, ARRAY = 9, U64 = 10, F64 = 12 };

static xkv_ctx *ctx;
static bytes body; /* values, then tensors */
static bytes file;
static uint32_t values, tensors;

static int setup(void **state)
{
    (void)state;
    return xkv_ctx_create(NULL, &ctx) != XKV_OK;
}

static int teardown(void **state)
{
    (void)state;
    int leak = xkv_ctx_memory_used(ctx) != 0;
    xkv_ctx_free(ctx);
    return leak;
}

/* --- Building ----------------------------------------------------------------------------------------------------- */

static void put_string(bytes *b, const char *s)
{
    put64(b, strlen(s));
    put(b, s, strlen(s));
}

static void key(const char *name, uint32_t type)
{
    put_string(&body, name);
    put32(&body, type);
    values++;
}

static void key_u32(const char *name, uint32_t v)
{
    key(name, U32);
    put32(&body, v);
}

static void key_f32(const char *name, float v)
{
    key(name, F32);
    putf32(&body, v);
}

static void key_string(const char *name, const char *v)
{
    key(name, STRING);
    put_string(&body, v);
}

/* A model of 4 layers with heads of 128: 8 query heads, 2 KV heads, base 1e6. */
static void begin(const char *arch)
{
    char name[128];
    body.size = 0;
    values = tensors = 0;
    key_string("general.architecture", arch);
    key_string("general.name", "A model");
    static const struct {
        const char *suffix;
        uint32_t value;
    } numbers[] = {{"block_count", 4},
                   {"context_length", 32768},
                   {"embedding_length", 1024},
                   {"attention.head_count", 8},
                   {"attention.head_count_kv", 2}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        snprintf(name, sizeof name, "%s.%s", arch, numbers[i].suffix);
        key_u32(name, numbers[i].value);
    }
    snprintf(name, sizeof name, "%s.rope.freq_base", arch);
    key_f32(name, 1e6f);
}

static void tensor_f32(const char *name, uint64_t count, uint64_t offset)
{
    put_string(&body, name);
    put32(&body, 1);
    put64(&body, count);
    put32(&body, 0);
    put64(&body, offset);
    tensors++;
}

static void finish(void)
{
    file.size = 0;
    put32(&file, 0x46554747);
    put32(&file, 3);
    put64(&file, tensors);
    put64(&file, values);
    put(&file, body.data, body.size);
    while (file.size % 32)
        file.data[file.size++] = 0;
}

static xkv_status read_size(size_t size, const xkv_rope_options *options, xkv_model **model)
{
    uint8_t *copy = malloc(size ? size : 1);
    memcpy(copy, file.data, size);
    xkv_ctx_begin(ctx);
    xkv_status status = xkv_model_from_gguf_memory(ctx, copy, size, "test.gguf", options, model);
    free(copy);
    return status;
}

static xkv_model *read_model(const xkv_rope_options *options)
{
    xkv_model *model = NULL;
    xkv_status status = read_size(file.size, options, &model);
    if (status != XKV_OK)
        print_message("%s\n", xkv_ctx_error(ctx));
    assert_int_equal(status, XKV_OK);
    return model;
}

static void assert_close(double found, double expected, double tolerance)
{
    if (!(fabs(found - expected) <= tolerance * fabs(expected)))
        print_message("found %.17g, expected %.17g\n", found, expected);
    assert_true(fabs(found - expected) <= tolerance * fabs(expected));
}

/* Frequencies base^(-2i/n) * scale, in long double. */
static void assert_plain(const xkv_rope *rope, long double base, uint32_t n_rot, long double scale)
{
    assert_int_equal(rope->n_rot, n_rot);
    for (uint32_t i = 0; i < n_rot / 2; i++)
        assert_close(rope->inv_freq[i], (double)(scale * powl(base, -2.0L * i / n_rot)), 1e-14);
}

/* --- Geometry ----------------------------------------------------------------------------------------------------- */

static void test_plain(void **state)
{
    (void)state;
    begin("llama");
    finish();
    xkv_model *m = read_model(NULL);
    assert_string_equal(m->architecture, "llama");
    assert_string_equal(m->name, "A model");
    assert_int_equal(m->layer_count, 4);
    assert_int_equal(m->layers[3].kv_heads, 2);
    assert_int_equal(m->layers[3].head_dim_k, 128);
    assert_int_equal(m->layers[3].head_dim_v, 128);
    assert_int_equal(m->layers[3].rope, 0);
    assert_int_equal(m->rope_count, 1);
    assert_int_equal(m->ropes[0].style, XKV_ROPE_INTERLEAVED);
    assert_int_equal(m->ropes[0].offset, 0);
    assert_true(m->ropes[0].scale == 1);
    assert_plain(&m->ropes[0], 1e6L, 128, 1);
    assert_int_equal(m->latent_dim, 0);
    xkv_model_free(ctx, m);
}

/* The fingerprint covers the header up to the tensor data, and no more; it is stored high half first, big-endian. */
static void test_fingerprint(void **state)
{
    (void)state;
    begin("llama");
    finish();
    XXH128_hash_t hash = XXH3_128bits(file.data, file.size);
    uint8_t expected[16];
    for (int i = 0; i < 8; i++) {
        expected[i] = (uint8_t)(hash.high64 >> (56 - 8 * i));
        expected[8 + i] = (uint8_t)(hash.low64 >> (56 - 8 * i));
    }
    put_noise(&file, 100, 1);
    xkv_model *m = read_model(NULL);
    assert_int_equal(m->has_fingerprint, 1);
    assert_memory_equal(m->fingerprint, expected, 16);
    xkv_model_free(ctx, m);
}

static void test_other_lengths(void **state)
{
    (void)state;
    begin("phi2"); /* partial rotation, heads of their own size, heads by layer */
    key_u32("phi2.rope.dimension_count", 32);
    key_u32("phi2.attention.key_length", 96);
    key_u32("phi2.attention.value_length", 64);
    finish();
    xkv_model *m = read_model(NULL);
    assert_int_equal(m->layers[0].head_dim_k, 96);
    assert_int_equal(m->layers[0].head_dim_v, 64);
    assert_int_equal(m->ropes[0].style, XKV_ROPE_HALF_SPLIT);
    assert_plain(&m->ropes[0], 1e6L, 32, 1);
    xkv_model_free(ctx, m);
}

/* A u64 here and a float there are as good; layers without KV heads have no cache. */
static void test_heads_by_layer(void **state)
{
    (void)state;
    static const uint32_t heads[] = {4, 0, 2, 1};
    body.size = 0;
    values = tensors = 0;
    key_string("general.architecture", "lfm2");
    key("lfm2.block_count", U64);
    put64(&body, 4);
    key_u32("lfm2.embedding_length", 512);
    key_u32("lfm2.attention.head_count", 8);
    key("lfm2.attention.head_count_kv", ARRAY);
    put32(&body, U32);
    put64(&body, 4);
    for (int i = 0; i < 4; i++)
        put32(&body, heads[i]);
    key("lfm2.rope.freq_base", F64);
    xkv_storef64(body.data + body.size, 5e5);
    body.size += 8;
    finish();
    xkv_model *m = read_model(NULL);
    for (int i = 0; i < 4; i++)
        assert_int_equal(m->layers[i].kv_heads, heads[i]);
    assert_int_equal(m->layers[0].head_dim_k, 64);
    assert_int_equal(m->layers[1].head_dim_k, 0);
    assert_int_equal(xkv_model_cached_layers(m, NULL), 3);
    assert_plain(&m->ropes[0], 5e5L, 64, 1);
    xkv_model_free(ctx, m);
}

static void test_latent(void **state)
{
    (void)state;
    begin("deepseek2");
    key_u32("deepseek2.attention.key_length", 576);
    key_u32("deepseek2.attention.value_length", 512);
    key_u32("deepseek2.attention.key_length_mla", 192);
    key_u32("deepseek2.attention.value_length_mla", 128);
    key_u32("deepseek2.attention.kv_lora_rank", 512);
    key_u32("deepseek2.rope.dimension_count", 64);
    finish();
    xkv_model *m = read_model(NULL);
    assert_int_equal(m->latent_dim, 512);
    assert_int_equal(m->latent_first, 1);
    assert_int_equal(m->layers[0].head_dim_k, 576);
    assert_int_equal(m->layers[0].rope, XKV_NO_ROPE);
    xkv_model_free(ctx, m);
    begin("deepseek2"); /* the older kind of file: full heads, whose last dims are rotated */
    key_u32("deepseek2.attention.key_length", 192);
    key_u32("deepseek2.attention.value_length", 128);
    key_u32("deepseek2.attention.kv_lora_rank", 512);
    key_u32("deepseek2.rope.dimension_count", 64);
    finish();
    m = read_model(NULL);
    assert_int_equal(m->latent_dim, 0);
    assert_int_equal(m->ropes[0].offset, 128);
    assert_int_equal(m->ropes[0].n_rot, 64);
    xkv_model_free(ctx, m);
}

static void test_layers_that_differ(void **state)
{
    (void)state;
    begin("smollm3");
    finish();
    xkv_model *m = read_model(NULL);
    assert_int_equal(m->layers[2].rope, 0);
    assert_int_equal(m->layers[3].rope, XKV_NO_ROPE);
    xkv_model_free(ctx, m);
    begin("gemma3"); /* layers with a window rotate at base 10000; every second one here has none */
    key_u32("gemma3.attention.sliding_window", 512);
    key_u32("gemma3.attention.sliding_window_pattern", 2);
    key_f32("gemma3.rope.scaling.factor", 8);
    key_string("gemma3.rope.scaling.type", "linear");
    finish();
    m = read_model(NULL);
    assert_int_equal(m->rope_count, 2);
    assert_int_equal(m->layers[0].rope, 1);
    assert_int_equal(m->layers[1].rope, 0);
    assert_plain(&m->ropes[0], 1e6L, 128, 0.125L);
    assert_plain(&m->ropes[1], 1e4L, 128, 1);
    xkv_model_free(ctx, m);
    begin("glm4moe"); /* the last layer predicts further tokens */
    key_u32("glm4moe.nextn_predict_layers", 1);
    finish();
    m = read_model(NULL);
    assert_int_equal(xkv_model_cached_layers(m, NULL), 3);
    assert_int_equal(m->layers[3].head_dim_k, 0);
    xkv_model_free(ctx, m);
}

/* Windows of the layers 0 .. 3 and the index of their rotation. */
static void assert_windows(const uint32_t windows[4], const uint32_t ropes[4])
{
    finish();
    xkv_model *m = read_model(NULL);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(m->layers[i].window, windows[i]);
        assert_int_equal(m->layers[i].rope, ropes[i]);
    }
    xkv_model_free(ctx, m);
}

/* As llama.cpp's models are: which of the layers have a window, how long it is, and how they rotate. */
static void test_windows(void **state)
{
    (void)state;
    static const uint32_t none[4] = {0}, no = XKV_NO_ROPE;
    begin("gemma2"); /* every second one; the window has a default */
    assert_windows((uint32_t[4]){4096, 0, 4096, 0}, none);
    key_u32("gemma2.attention.sliding_window", 512);
    key_f32("gemma2.rope.freq_base_swa", 5e4f);
    assert_windows((uint32_t[4]){512, 0, 512, 0}, (uint32_t[4]){1, 0, 1, 0});
    begin("gpt-oss");
    key_u32("gpt-oss.attention.sliding_window", 128);
    key_string("gpt-oss.rope.scaling.type", "yarn"); /* which layers with a window share */
    key_f32("gpt-oss.rope.scaling.factor", 32);
    assert_windows((uint32_t[4]){128, 0, 128, 0}, none);
    begin("gemma3"); /* all but every sixth */
    key_u32("gemma3.attention.sliding_window", 512);
    assert_windows((uint32_t[4]){512, 512, 512, 512}, (uint32_t[4]){1, 1, 1, 1});
    begin("gemma3"); /* none, but the rotation is the same */
    assert_windows(none, (uint32_t[4]){1, 1, 1, 1});
    begin("smallthinker"); /* the first of four has none and is not rotated */
    key_u32("smallthinker.attention.sliding_window", 4096);
    assert_windows((uint32_t[4]){0, 4096, 4096, 4096}, (uint32_t[4]){no, 0, 0, 0});
    begin("exaone4"); /* small models have no windows, and rotate all layers */
    assert_windows(none, none);
    begin("exaone4");
    key_u32("exaone4.attention.sliding_window", 4096);
    assert_windows((uint32_t[4]){4096, 4096, 4096, 0}, (uint32_t[4]){0, 0, 0, no});
    begin("qwen2"); /* a window that the engine does not use */
    key_u32("qwen2.attention.sliding_window", 4096);
    assert_windows(none, none);
}

/* gemma4: a flag for each layer; layers with a window have smaller heads, of which other dims are rotated. */
static void test_windows_by_layer(void **state)
{
    (void)state;
    begin("gemma4");
    key_u32("gemma4.attention.sliding_window", 1024);
    key("gemma4.attention.sliding_window_pattern", ARRAY);
    put32(&body, 7); /* bool */
    put64(&body, 4);
    put(&body, "\1\1\0\1", 4);
    key_u32("gemma4.attention.key_length", 512);
    key_u32("gemma4.attention.value_length", 512);
    key_u32("gemma4.attention.key_length_swa", 256);
    key_u32("gemma4.attention.value_length_swa", 256);
    key_u32("gemma4.rope.dimension_count", 512);
    key_u32("gemma4.rope.dimension_count_swa", 256);
    assert_windows((uint32_t[4]){1024, 1024, 0, 1024}, (uint32_t[4]){1, 1, 0, 1});
    xkv_model *m = read_model(NULL);
    assert_int_equal(m->layers[0].head_dim_k, 256);
    assert_int_equal(m->layers[0].head_dim_v, 256);
    assert_int_equal(m->layers[2].head_dim_k, 512);
    assert_plain(&m->ropes[0], 1e6L, 512, 1);
    assert_plain(&m->ropes[1], 1e4L, 256, 1);
    xkv_model_free(ctx, m);
    begin("gemma4"); /* flags for too few layers */
    key_u32("gemma4.attention.sliding_window", 1024);
    key("gemma4.attention.sliding_window_pattern", ARRAY);
    put32(&body, 7);
    put64(&body, 3);
    put(&body, "\1\1\0", 3);
    finish();
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_CORRUPT);
}

static void test_architectures(void **state)
{
    (void)state;
    xkv_rope_options o = xkv_rope_options_default();
    o.style = XKV_ROPE_HALF_SPLIT;
    xkv_model *m;
    begin("no-such-architecture");
    finish();
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_UNSUPPORTED);
    m = read_model(&o);
    assert_int_equal(m->ropes[0].style, XKV_ROPE_HALF_SPLIT);
    xkv_model_free(ctx, m);
    begin("qwen2vl"); /* M-RoPE: as RoPE in halves where all positions of a token are equal */
    finish();
    m = read_model(NULL);
    assert_int_equal(m->ropes[0].style, XKV_ROPE_HALF_SPLIT);
    assert_plain(&m->ropes[0], 1e6L, 128, 1);
    xkv_model_free(ctx, m);
    begin("glm4"); /* interleaved, but in halves with sections */
    key("glm4.rope.dimension_sections", ARRAY);
    put32(&body, U32);
    put64(&body, 4);
    for (uint32_t i = 0; i < 4; i++)
        put32(&body, 16);
    finish();
    m = read_model(NULL);
    assert_int_equal(m->ropes[0].style, XKV_ROPE_HALF_SPLIT);
    xkv_model_free(ctx, m);
    begin("gpt2"); /* no rotation at all */
    finish();
    m = read_model(NULL);
    assert_int_equal(m->rope_count, 0);
    assert_int_equal(m->layers[0].rope, XKV_NO_ROPE);
    xkv_model_free(ctx, m);
}

/* --- Scalings ----------------------------------------------------------------------------------------------------- */

static void test_options(void **state)
{
    (void)state;
    double divisors[32];
    for (int i = 0; i < 32; i++)
        divisors[i] = 1 + i;
    xkv_rope_options o = xkv_rope_options_default();
    o.base = 5000;
    o.linear_scale = 0.5;
    o.dims = 64;
    o.freq_factors = divisors;
    begin("llama");
    tensor_f32("rope_freqs.weight", 64, 0); /* the given factors stand for the ones that are not in the file */
    finish();
    xkv_model *m = read_model(&o);
    for (uint32_t i = 0; i < 32; i++)
        assert_close(m->ropes[0].inv_freq[i], (double)(0.5L * powl(5000, -2.0L * i / 64) / (1 + i)), 1e-14);
    xkv_model_free(ctx, m);
}

static void test_from_options(void **state)
{
    (void)state;
    xkv_model *m;
    xkv_rope_options o = xkv_rope_options_default();
    o.base = 10000;
    o.dims = 64;
    o.head_dim = 64;
    assert_int_equal(xkv_model_from_options(ctx, 3, &o, &m), XKV_ERROR_ARGUMENT); /* no style */
    o.style = XKV_ROPE_INTERLEAVED;
    assert_int_equal(xkv_model_from_options(ctx, 0, &o, &m), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_model_from_options(ctx, 3, &o, &m), XKV_OK);
    assert_int_equal(m->layer_count, 3);
    assert_int_equal(m->has_fingerprint, 0);
    assert_plain(&m->ropes[0], 10000, 64, 1);
    xkv_model_free(ctx, m);
    o.dims = 65;
    o.head_dim = 128;
    assert_int_equal(xkv_model_from_options(ctx, 3, &o, &m), XKV_ERROR_ARGUMENT);
}

/* Constants computed apart from the formulas of arXiv 2309.00071: base 1e6, 128 dims, factor 4, context 32768, ramp
 * from pair 23 to pair 40. */
static void test_yarn(void **state)
{
    (void)state;
    static const struct {
        uint32_t pair;
        double frequency;
    } expected[] = {{0, 1.0},
                    {20, 0.01333521432163324},
                    {24, 0.005375321490790102},
                    {30, 0.001064360981247002},
                    {39, 6.490394320837029e-05},
                    {40, 4.445698525097307e-05},
                    {45, 1.510740975595332e-05},
                    {63, 3.102344401879299e-07}};
    begin("qwen2");
    key_string("qwen2.rope.scaling.type", "yarn");
    key_f32("qwen2.rope.scaling.factor", 4);
    key_u32("qwen2.rope.scaling.original_context_length", 32768);
    finish();
    xkv_model *m = read_model(NULL);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        assert_close(m->ropes[0].inv_freq[expected[i].pair], expected[i].frequency, 1e-13);
    assert_close(m->ropes[0].scale, 1.138629436111989, 1e-14); /* 0.1 ln 4 + 1 */
    xkv_model_free(ctx, m);
}

static void test_yarn_scale(void **state)
{
    (void)state;
    begin("mistral3"); /* (0.1 ln 40 + 1) / (0.05 ln 40 + 1), times the attention factor */
    key_string("mistral3.rope.scaling.type", "yarn");
    key_f32("mistral3.rope.scaling.factor", 40);
    key_f32("mistral3.rope.scaling.yarn_log_multiplier", 0.5f);
    key_f32("mistral3.rope.scaling.attn_factor", 2);
    finish();
    xkv_model *m = read_model(NULL);
    assert_close(m->ropes[0].scale, 2 * 1.1557219901962608, 1e-6); /* 1/40 in f32 */
    xkv_model_free(ctx, m);
    begin("deepseek2"); /* its own part is in the attention scale */
    key_u32("deepseek2.rope.dimension_count", 64);
    key_string("deepseek2.rope.scaling.type", "yarn");
    key_f32("deepseek2.rope.scaling.factor", 40);
    key_f32("deepseek2.rope.scaling.yarn_log_multiplier", 0.0707f);
    finish();
    m = read_model(NULL);
    assert_true(m->ropes[0].scale == 1);
    xkv_model_free(ctx, m);
}

static void test_linear(void **state)
{
    (void)state;
    begin("llama");
    key_string("llama.rope.scaling.type", "linear");
    key_f32("llama.rope.scaling.factor", 4);
    finish();
    xkv_model *m = read_model(NULL);
    assert_plain(&m->ropes[0], 1e6L, 128, 0.25L);
    xkv_model_free(ctx, m);
    begin("llama");
    key_string("llama.rope.scaling.type", "none");
    key_f32("llama.rope.scaling.factor", 4);
    finish();
    m = read_model(NULL);
    assert_plain(&m->ropes[0], 1e6L, 128, 1);
    xkv_model_free(ctx, m);
    begin("llama");
    key_string("llama.rope.scaling.type", "spiral");
    finish();
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_UNSUPPORTED);
}

/* Llama 3.1: base 500000, factor 8, bands at 1 and 4 of 8192. The converter writes the divisors as a tensor; three of
 * them and the frequencies were computed apart. */
static void test_llama3(void **state)
{
    (void)state;
    static const float divisors[] = {1.207483871283662f, 1.5534146285049255f, 0, 0, 0, 5.257326588708467f};
    begin("llama");
    xkv_storef32(body.data + body.size - 4, 500000);
    tensor_f32("rope_freqs.weight", 64, 64);
    finish();
    xkv_model *m;
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_UNSUPPORTED); /* the file ends before its tensors */
    assert_non_null(strstr(xkv_ctx_error(ctx), "rope_freqs.weight"));
    put_noise(&file, 64, 1);
    for (int i = 0; i < 64; i++) {
        bool ramp = i == 29 || i == 30 || i == 34;
        putf32(&file, ramp ? divisors[i - 29] : i < 29 ? 1 : 8);
    }
    m = read_model(NULL);
    assert_close(m->ropes[0].inv_freq[10], 0.12868737343265052, 1e-12);
    assert_close(m->ropes[0].inv_freq[29], 0.002166570763503359, 1e-7);
    assert_close(m->ropes[0].inv_freq[30], 0.0013718935677611381, 1e-7);
    assert_close(m->ropes[0].inv_freq[34], 0.0001785078127679964, 1e-7);
    assert_close(m->ropes[0].inv_freq[63], 3.068925988914511e-07, 1e-12);
    assert_int_equal(m->ropes[0].scale, 1);
    xkv_model_free(ctx, m);
    assert_int_equal(read_size(file.size - 1, NULL, &m), XKV_ERROR_UNSUPPORTED);
    xkv_storef32(file.data + file.size - 4, 0);
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_CORRUPT);
}

/* longrope: two sets of divisors, chosen by the context length the engine ran with. */
static void test_longrope(void **state)
{
    (void)state;
    begin("phi3");
    key_u32("phi3.rope.scaling.original_context_length", 4096);
    key_f32("phi3.rope.scaling.attn_factor", 1.25f);
    tensor_f32("rope_factors_long.weight", 64, 0);
    tensor_f32("rope_factors_short.weight", 64, 256);
    finish();
    for (int i = 0; i < 64; i++)
        putf32(&file, 4.0f + (float)i);
    for (int i = 0; i < 64; i++)
        putf32(&file, 1.0f + (float)i / 64);
    static const uint32_t contexts[] = {0, 4096, 4097};
    for (int c = 0; c < 3; c++) {
        xkv_rope_options o = xkv_rope_options_default();
        o.context = contexts[c]; /* 0: what the model was trained for, 32768 */
        xkv_model *m = read_model(&o);
        for (uint32_t i = 0; i < 64; i++) {
            long double divisor = c == 1 ? 1 + i / 64.0L : 4 + i;
            assert_close(m->ropes[0].inv_freq[i], (double)(powl(1e6L, -2.0L * i / 128) / divisor), 1e-14);
        }
        assert_true(m->ropes[0].scale == 1.25);
        xkv_model_free(ctx, m);
    }
}

/* --- Damage ------------------------------------------------------------------------------------------------------- */

static void test_truncation(void **state)
{
    (void)state;
    begin("llama");
    key("tokenizer.ggml.tokens", ARRAY);
    put32(&body, STRING);
    put64(&body, 3);
    put_string(&body, "a");
    put_string(&body, "");
    put_string(&body, "ccc");
    tensor_f32("token_embd.weight", 64, 0);
    finish();
    for (size_t size = 0; size < file.size; size++) {
        xkv_model *m;
        assert_int_equal(read_size(size, NULL, &m), XKV_ERROR_TRUNCATED);
    }
    xkv_model_free(ctx, read_model(NULL));
}

static void assert_refused(xkv_status expected, const char *rule)
{
    xkv_model *m;
    finish();
    xkv_status status = read_size(file.size, NULL, &m);
    if (status != expected || !strstr(xkv_ctx_error(ctx), rule))
        print_message("%s\n", xkv_ctx_error(ctx));
    assert_int_equal(status, expected);
    assert_non_null(strstr(xkv_ctx_error(ctx), rule));
}

static void test_hostile(void **state)
{
    (void)state;
    xkv_model *m;
    begin("llama");
    key("deep", ARRAY);
    for (int i = 0; i < 200; i++) {
        put32(&body, ARRAY);
        put64(&body, 1);
    }
    assert_refused(XKV_ERROR_CORRUPT, "[GU4]");
    begin("llama");
    key("wide", ARRAY);
    put32(&body, U64);
    put64(&body, UINT64_MAX / 4);
    assert_refused(XKV_ERROR_TRUNCATED, "[GU2]");
    begin("llama");
    key("strings", ARRAY);
    put32(&body, STRING);
    put64(&body, UINT64_MAX);
    assert_refused(XKV_ERROR_TRUNCATED, "[GU2]");
    begin("llama");
    key("text", STRING);
    put64(&body, UINT64_MAX - 3);
    assert_refused(XKV_ERROR_TRUNCATED, "[GU2]");
    begin("llama");
    key("odd", 13);
    assert_refused(XKV_ERROR_CORRUPT, "[GU4]");
    begin("llama");
    key_u32("llama.block_count", 5);
    assert_refused(XKV_ERROR_CORRUPT, "[GU4]"); /* twice */
    begin("llama");
    key_u32("llama.rope.dimension_count", 130);
    assert_refused(XKV_ERROR_CORRUPT, "[GU7]");
    begin("llama");
    key_u32("llama.rope.dimension_count", 63);
    assert_refused(XKV_ERROR_CORRUPT, "[G11]");
    begin("llama");
    key_u32("general.alignment", 24);
    assert_refused(XKV_ERROR_CORRUPT, "[GU4]");
    begin("llama");
    key_u32("llama.attention.key_length", 262144);
    assert_refused(XKV_ERROR_CORRUPT, "[GU7]");
    begin("llama");
    tensor_f32("rope_freqs.weight", 63, 0);
    assert_refused(XKV_ERROR_CORRUPT, "[GU6]");
    begin("llama");
    key_string("llama.rope.scaling.factor", "4");
    assert_refused(XKV_ERROR_CORRUPT, "[GU4]");
    body.size = 0;
    values = tensors = 0;
    key_string("general.architecture", "llama");
    assert_refused(XKV_ERROR_CORRUPT, "[GU7]");
    begin("llama");
    finish();
    xkv_store64(file.data + 8, 1u << 20);
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_TRUNCATED);
    xkv_store64(file.data + 8, UINT64_MAX);
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_LIMIT);
    finish();
    xkv_store32(file.data + 4, 1);
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_VERSION);
    xkv_store32(file.data + 4, 3u << 24);
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_VERSION);
    xkv_store32(file.data, 0);
    assert_int_equal(read_size(file.size, NULL, &m), XKV_ERROR_FORMAT);
}

/* A name is cut between characters. */
static void test_long_name(void **state)
{
    (void)state;
    char name[200] = "";
    for (int i = 0; i < 63; i++)
        strcat(name, "\xc3\xa9");
    strcat(name, "\xe2\x82\xac");
    body.size = 0;
    values = tensors = 0;
    key_string("general.architecture", "llama");
    key_string("general.name", name);
    key_u32("llama.block_count", 1);
    key_u32("llama.embedding_length", 64);
    key_u32("llama.attention.head_count", 1);
    finish();
    xkv_model *m = read_model(NULL);
    assert_int_equal(strlen(m->name), 126);
    xkv_model_free(ctx, m);
}

/* --- Genuine files ------------------------------------------------------------------------------------------------ */

static void test_genuine_files(void **state)
{
    (void)state;
    static const struct {
        const char *path, *architecture;
        uint32_t layers, heads, style;
        long double base;
    } models[] = {{"smollm2-135m", "llama", 30, 3, XKV_ROPE_INTERLEAVED, 1e5L},
                  {"qwen2.5-coder-0.5b", "qwen2", 24, 2, XKV_ROPE_HALF_SPLIT, 1e6L}};
    for (int i = 0; i < 2; i++) {
        char path[1024];
        snprintf(path, sizeof path, "%s/data/%s/header.gguf", XKV_SHARED_DIR, models[i].path);
        xkv_model *m;
        if (xkv_model_from_gguf(ctx, path, NULL, &m) == XKV_ERROR_IO) {
            print_message("skipped: no %s\n", path);
            skip();
        }
        assert_string_equal(m->architecture, models[i].architecture);
        assert_int_equal(m->layer_count, models[i].layers);
        assert_int_equal(m->layers[0].kv_heads, models[i].heads);
        assert_int_equal(m->layers[0].head_dim_k, 64);
        assert_int_equal(m->layers[0].head_dim_v, 64);
        assert_int_equal(m->ropes[0].style, models[i].style);
        assert_plain(&m->ropes[0], models[i].base, 64, 1);
        assert_int_equal(m->has_fingerprint, 1);
        xkv_model_free(ctx, m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_plain, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fingerprint, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_lengths, setup, teardown),
        cmocka_unit_test_setup_teardown(test_heads_by_layer, setup, teardown),
        cmocka_unit_test_setup_teardown(test_latent, setup, teardown),
        cmocka_unit_test_setup_teardown(test_layers_that_differ, setup, teardown),
        cmocka_unit_test_setup_teardown(test_windows, setup, teardown),
        cmocka_unit_test_setup_teardown(test_windows_by_layer, setup, teardown),
        cmocka_unit_test_setup_teardown(test_architectures, setup, teardown),
        cmocka_unit_test_setup_teardown(test_options, setup, teardown),
        cmocka_unit_test_setup_teardown(test_from_options, setup, teardown),
        cmocka_unit_test_setup_teardown(test_yarn, setup, teardown),
        cmocka_unit_test_setup_teardown(test_yarn_scale, setup, teardown),
        cmocka_unit_test_setup_teardown(test_linear, setup, teardown),
        cmocka_unit_test_setup_teardown(test_llama3, setup, teardown),
        cmocka_unit_test_setup_teardown(test_longrope, setup, teardown),
        cmocka_unit_test_setup_teardown(test_truncation, setup, teardown),
        cmocka_unit_test_setup_teardown(test_hostile, setup, teardown),
        cmocka_unit_test_setup_teardown(test_long_name, setup, teardown),
        cmocka_unit_test_setup_teardown(test_genuine_files, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
