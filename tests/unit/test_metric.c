/* test_metric.c - metric files: what is read, and a refusal for every rule of spec/engines.md, section 6. */
#include "bytes.h"
#include "engine_file.h"
#include "xkv/codec.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

enum { LAYERS = 2, HEADS = 3, DIM = 4, BLOCK = DIM * DIM, ELEMENTS = LAYERS * HEADS * BLOCK };

static xkv_ctx *ctx;
static bytes file;
static float k[ELEMENTS], v[ELEMENTS];

/* Block b is symmetric with b + 1 on its diagonal. */
static void reset(void)
{
    for (int b = 0; b < LAYERS * HEADS; b++)
        for (int i = 0; i < DIM; i++)
            for (int j = 0; j < DIM; j++) {
                k[b * BLOCK + i * DIM + j] = i == j ? (float)(b + 1) : 0.01f * (float)(i + j);
                v[b * BLOCK + i * DIM + j] = 2 * k[b * BLOCK + i * DIM + j];
            }
}

static int setup(void **state)
{
    (void)state;
    reset();
    return xkv_ctx_create(NULL, &ctx) != XKV_OK;
}

static int teardown(void **state)
{
    (void)state;
    int leak = xkv_ctx_memory_used(ctx) != 0;
    xkv_ctx_free(ctx);
    return leak;
}

static void build(const char *header)
{
    file.size = 0;
    put64(&file, strlen(header));
    put(&file, header, strlen(header));
    for (int i = 0; i < ELEMENTS; i++)
        putf32(&file, v[i]);
    for (int i = 0; i < ELEMENTS; i++)
        putf32(&file, k[i]);
    putf32(&file, 7); /* another tensor */
}

/* 2 x 3 x 4 x 4 floats are 384 bytes; V comes first, and something else behind. */
#define HEADER(dtype, v_shape, k_shape)                                                                                \
    "{\"v_metric\":{\"dtype\":\"" dtype "\",\"shape\":" v_shape ",\"data_offsets\":[0,384]},"                          \
    "\"k_metric\":{\"dtype\":\"" dtype "\",\"shape\":" k_shape ",\"data_offsets\":[384,768]},"                         \
    "\"other\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[768,772]}}"
static const char good[] = HEADER("F32", "[2,3,4,4]", "[2,3,4,4]");

static xkv_status open_size(size_t size, xkv_metric **m)
{
    uint8_t *copy = malloc(size ? size : 1); /* exact, for the sanitizer */
    assert_non_null(copy);
    memcpy(copy, file.data, size);
    xkv_status status = xkv_metric_from_memory(ctx, copy, size, "test", m);
    free(copy);
    return status;
}

static void refused(xkv_status expected, const char *text)
{
    xkv_metric *m = NULL;
    assert_int_equal(open_size(file.size, &m), expected);
    assert_null(m);
    if (!strstr(xkv_ctx_error(ctx), text))
        fail_msg("'%s' does not hold '%s'", xkv_ctx_error(ctx), text);
    xkv_ctx_free(ctx); /* the first error of a call wins: begin anew */
    assert_int_equal(xkv_ctx_create(NULL, &ctx), XKV_OK);
}

static void test_read(void **state)
{
    (void)state;
    xkv_metric *m;
    build(good);
    assert_int_equal(open_size(file.size, &m), XKV_OK);
    assert_int_equal(m->layers, LAYERS);
    assert_int_equal(m->heads, HEADS);
    assert_int_equal(m->head_dim, DIM);
    assert_memory_equal(m->k, k, sizeof k);
    assert_memory_equal(m->v, v, sizeof v);
    xkv_metric_free(ctx, m);
    xkv_metric_free(ctx, NULL);
}

/* One layer: the first axis is no batch. */
static void test_one_layer(void **state)
{
    (void)state;
    xkv_metric *m;
    build(HEADER("F32", "[1,6,4,4]", "[1,6,4,4]"));
    assert_int_equal(open_size(file.size, &m), XKV_OK);
    assert_int_equal(m->layers, 1);
    assert_int_equal(m->heads, 6);
    xkv_metric_free(ctx, m);
}

static void test_shapes(void **state)
{
    (void)state;
    build(HEADER("F32", "[2,3,4,4]", "[3,2,4,4]"));
    refused(XKV_ERROR_CORRUPT, "k_metric and v_metric differ in shape [ME1]");
    static const char *const bad[] = {HEADER("F32", "[6,4,4]", "[6,4,4]"), HEADER("F32", "[2,3,2,8]", "[2,3,2,8]"),
                                      HEADER("I32", "[2,3,4,4]", "[2,3,4,4]"), HEADER("F16", "[2,6,4,4]", "[2,6,4,4]")};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        build(bad[i]);
        refused(XKV_ERROR_CORRUPT, "tensor \"k_metric\": expected F32 of [layers, heads, head_dim, head_dim]");
    }
    build("{\"k_metric\":{\"dtype\":\"F32\",\"shape\":[0,3,4,4],\"data_offsets\":[0,0]},"
          "\"v_metric\":{\"dtype\":\"F32\",\"shape\":[0,3,4,4],\"data_offsets\":[0,0]},"
          "\"x\":{\"dtype\":\"F32\",\"shape\":[193],\"data_offsets\":[0,772]}}");
    refused(XKV_ERROR_CORRUPT, "[ME1]");
    build("{\"k_metric\":{\"dtype\":\"F32\",\"shape\":[193],\"data_offsets\":[0,772]}}");
    refused(XKV_ERROR_FORMAT, "no tensor \"v_metric\"");
}

static void with_element(float *at, float value, const char *text)
{
    float old = *at;
    *at = value;
    build(good);
    refused(XKV_ERROR_CORRUPT, text);
    *at = old;
}

static void test_values(void **state)
{
    (void)state;
    with_element(&k[BLOCK], (float)atof("nan"), "k_metric: layer 0, head 1: element 0 is not finite [ME2]");
    with_element(&v[5 * BLOCK + 15], (float)atof("inf"), "v_metric: layer 1, head 2: element 15 is not finite [ME2]");
    with_element(&k[1], k[DIM] + 0.01f, "k_metric: layer 0, head 0: is not symmetric [ME3]");
    with_element(&v[0], -1e-6f, "v_metric: layer 0, head 0: an error would gain something [ME4]");
    memset(v, 0, sizeof v);
    build(good);
    refused(XKV_ERROR_CORRUPT, "errors cost nothing [ME4]");
    reset();
    k[1] += 1e-4f; /* rounding is not asymmetry */
    build(good);
    xkv_metric *m;
    assert_int_equal(open_size(file.size, &m), XKV_OK);
    xkv_metric_free(ctx, m);
    reset();
}

static void test_cut(void **state)
{
    (void)state;
    xkv_metric *m = NULL;
    build(good);
    for (size_t size = 0; size < file.size; size++) {
        xkv_status status = open_size(size, &m);
        if (status != XKV_ERROR_FORMAT && status != XKV_ERROR_TRUNCATED && status != XKV_ERROR_CORRUPT)
            fail_msg("cut to %zu: status %d", size, status);
    }
    assert_null(m);
}

/* Every allocation fails once. */
static void *fail_at(void *user, size_t size)
{
    int *left = user;
    return (*left)-- > 0 ? malloc(size) : NULL;
}

static void release(void *user, void *ptr)
{
    (void)user;
    free(ptr);
}

static void test_no_memory(void **state)
{
    (void)state;
    xkv_status status = XKV_ERROR_MEMORY;
    build(good);
    for (int n = 0; status != XKV_OK; n++) {
        int left = n + 1; /* the context is one as well */
        xkv_ctx_options o = xkv_ctx_options_default();
        o.allocator = (xkv_allocator){&left, fail_at, release};
        xkv_ctx *poor;
        xkv_metric *m = NULL;
        assert_int_equal(xkv_ctx_create(&o, &poor), XKV_OK);
        status = xkv_metric_from_memory(poor, file.data, file.size, "test", &m);
        if (status != XKV_OK)
            assert_int_equal(status, XKV_ERROR_MEMORY);
        xkv_metric_free(poor, m);
        assert_int_equal(xkv_ctx_memory_used(poor), 0);
        xkv_ctx_free(poor);
        assert_in_range(n, 0, 10);
    }
}

static void test_genuine(void **state)
{
    (void)state;
    if (XKV_SHARED_DIR[0] == '\0') {
        print_message("XKV_SHARED_DIR is not set: no genuine metric to read\n");
        skip();
    }
    xkv_metric *m;
    assert_int_equal(xkv_metric_open(ctx, XKV_SHARED_DIR "/data/smollm2-135m/metric.safetensors", &m), XKV_OK);
    assert_int_equal(m->layers, 30);
    assert_int_equal(m->heads, 3);
    assert_int_equal(m->head_dim, 64);
    xkv_metric_free(ctx, m);
    assert_int_equal(xkv_metric_open(ctx, XKV_DATA_DIR "/missing", &m), XKV_ERROR_IO);
}

/* --- The trainer checks that a metric is of its caches' model ----------------------------------------------------- */

static xkv_status drop(void *user, xkv_ctx *c, uint64_t offset, const void *src, size_t size)
{
    (void)user, (void)c, (void)offset, (void)src, (void)size;
    return XKV_OK;
}

static void test_trainer(void **state)
{
    (void)state;
    xkv_cache *cache;
    assert_int_equal(xkv_cache_open(ctx, XKV_DATA_DIR "/smollm2-135m-jargon.ggsq", NULL, &cache), XKV_OK);
    xkv_metric m = {LAYERS, HEADS, DIM, k, v};
    xkv_train_options o = xkv_train_options_default();
    xkv_output output = {NULL, drop};
    o.metric = &m;
    assert_int_equal(xkv_train(ctx, (const xkv_cache *const *)&cache, 1, &o, &output), XKV_ERROR_MISMATCH);
    assert_string_equal(xkv_ctx_error(ctx), "the metric has 2 layers, the caches 30");
    m.layers = 30;
    assert_int_equal(xkv_train(ctx, (const xkv_cache *const *)&cache, 1, &o, &output), XKV_ERROR_MISMATCH);
    assert_string_equal(xkv_ctx_error(ctx), "layer 0, K: the metric has 3 heads of 4 elements, the caches 1 of 192");
    xkv_cache_free(ctx, cache);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_read),    cmocka_unit_test(test_one_layer), cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_values),  cmocka_unit_test(test_cut),       cmocka_unit_test(test_genuine),
        cmocka_unit_test(test_trainer), cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
