/* test_blocks.c - q8_0 and q4_0 rows: against blocks made elsewhere, in all tables, and at the edges. */
#include "cpu/ops.h"
#include "support.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { BLOCK = 32, MAX_SIZE = 34 };

/* One line of tests/data/blocks.txt. */
typedef struct sample {
    uint32_t dtype;
    float x[BLOCK];
    uint8_t bytes[MAX_SIZE];
} sample;

static bool read_sample(FILE *file, sample *s)
{
    char name[8];
    if (fscanf(file, "%7s", name) != 1)
        return false;
    s->dtype = strcmp(name, "q8_0") == 0 ? XKV_Q8_0 : XKV_Q4_0;
    assert_string_equal(name, xkv_dtype_name(s->dtype));
    for (int i = 0; i < BLOCK; i++) {
        uint32_t bits;
        assert_int_equal(fscanf(file, "%8x", &bits), 1);
        memcpy(&s->x[i], &bits, 4);
    }
    for (size_t i = 0; i < xkv_dtype_size(s->dtype); i++) {
        unsigned byte;
        assert_int_equal(fscanf(file, "%2x", &byte), 1);
        s->bytes[i] = (uint8_t)byte;
    }
    return true;
}

/* The tables that run here, the plain C one first. */
static size_t tables(const xkv_kernels *list[2])
{
    list[0] = xkv_kernels_cpu_generic();
    list[1] = xkv_kernels_cpu_vector();
    return list[1] != NULL ? 2 : 1;
}

/* XKV_BLOCKS names another file of that form, made by a real engine. */
static void blocks_are_those_of_ggml(void **state)
{
    const xkv_kernels *k[2];
    const char *path = getenv("XKV_BLOCKS");
    FILE *file = fopen(path != NULL ? path : XKV_DATA_DIR "/blocks.txt", "r");
    sample s;
    uint32_t count[2] = {0};
    (void)state;
    assert_non_null(file);
    for (; read_sample(file, &s); count[s.dtype - XKV_Q8_0]++)
        for (size_t i = 0; i < tables(k); i++) {
            uint8_t found[MAX_SIZE + 1] = {0};
            k[i]->from_f32(s.dtype, s.x, found, BLOCK);
            assert_memory_equal(found, s.bytes, xkv_dtype_size(s.dtype));
            assert_int_equal(found[xkv_dtype_size(s.dtype)], 0);
        }
    fclose(file);
    assert_true(count[0] >= 28 && count[1] >= 28);
    print_message("%u q8_0 and %u q4_0 blocks\n", count[0], count[1]);
}

/* All bytes and finite scales, at odd addresses; a product of an f16 and 8 bits is exact in f32. */
static void elements_are_scale_times_integer(void **state)
{
    const xkv_kernels *k[2];
    uint64_t random = 5;
    (void)state;
    for (uint32_t dtype = XKV_Q8_0; dtype <= XKV_Q4_0; dtype++)
        for (uint32_t round = 0; round < 2000; round++) {
            uint8_t bytes[1 + 3 * MAX_SIZE], *blocks = bytes + 1;
            size_t size = xkv_dtype_size(dtype);
            for (size_t i = 0; i < sizeof bytes; i++)
                bytes[i] = (uint8_t)test_random(&random);
            for (size_t b = 0; b < 3; b++)
                blocks[b * size + 1] &= 0xfb; /* no infinity, no NaN */
            for (size_t i = 0; i < tables(k); i++) {
                float x[3 * BLOCK];
                k[i]->to_f32(dtype, blocks, x, 3 * BLOCK);
                for (uint32_t e = 0; e < 3 * BLOCK; e++)
                    assert_true((double)x[e] == test_from_block(dtype, blocks + e / BLOCK * size, e % BLOCK));
                assert_true(k[i]->all_finite(dtype, blocks, 3 * BLOCK));
            }
        }
}

static void tables_agree(void **state)
{
    const xkv_kernels *k[2];
    uint64_t random = 11;
    (void)state;
    if (tables(k) < 2)
        skip();
    for (uint32_t round = 0; round < 40000; round++) {
        float x[2 * BLOCK];
        uint8_t a[2 * MAX_SIZE], b[2 * MAX_SIZE];
        double size = ldexp(1, (int)(test_random(&random) % 280) - 150);
        for (int i = 0; i < 2 * BLOCK; i++) {
            x[i] = (float)(size * (round % 2 ? test_normal(&random) : (double)(test_random(&random) % 33) - 16));
            uint64_t special = round % 8 == 3 ? test_random(&random) % 64 : 64;
            x[i] = special == 0   ? NAN
                   : special == 1 ? INFINITY
                   : special == 2 ? -INFINITY
                   : special == 3 ? FLT_MAX
                                  : x[i];
        }
        for (uint32_t dtype = XKV_Q8_0; dtype <= XKV_Q4_0; dtype++) {
            k[0]->from_f32(dtype, x, a, 2 * BLOCK);
            k[1]->from_f32(dtype, x, b, 2 * BLOCK);
            assert_memory_equal(a, b, 2 * xkv_dtype_size(dtype));
        }
    }
}

/* What ggml does not define. */
static void edges(void **state)
{
    const xkv_kernels *k[2];
    (void)state;
    for (uint32_t dtype = XKV_Q8_0; dtype <= XKV_Q4_0; dtype++)
        for (size_t i = 0; i < tables(k); i++) {
            float x[BLOCK] = {1, -2, NAN};
            uint8_t block[MAX_SIZE];
            k[i]->from_f32(dtype, x, block, BLOCK);
            assert_true(test_from_block(dtype, block, 2) == 0);
            assert_true(fabs(test_from_block(dtype, block, 1) + 2) < 0.01);
            x[0] = INFINITY; /* the scale stops at 65504 */
            k[i]->from_f32(dtype, x, block, BLOCK);
            assert_true(test_from_block(dtype, block, 0) == (dtype == XKV_Q8_0 ? 127 : 8) * 65504.0);
            assert_true(test_from_block(dtype, block, 1) == 0);
            assert_true(k[i]->all_finite(dtype, block, BLOCK));
            for (uint32_t bad = 0x7c00; bad < 0x10000; bad += 0x81ff) { /* an infinity, a NaN */
                uint8_t two[2 * MAX_SIZE] = {0};
                two[xkv_dtype_size(dtype)] = (uint8_t)bad;
                two[xkv_dtype_size(dtype) + 1] = (uint8_t)(bad >> 8);
                assert_false(k[i]->all_finite(dtype, two, 2 * BLOCK));
                assert_true(k[i]->all_finite(dtype, two, BLOCK));
            }
        }
}

static void sizes(void **state)
{
    (void)state;
    assert_int_equal(xkv_dtype_bytes(XKV_Q8_0, 64), 68);
    assert_int_equal(xkv_dtype_bytes(XKV_Q4_0, 96), 54);
    assert_int_equal(xkv_dtype_bytes(XKV_BF16, 3), 6);
    assert_int_equal(xkv_dtype_block(XKV_Q4_0), 32);
    assert_int_equal(xkv_dtype_block(XKV_F32), 1);
    assert_int_equal(xkv_dtype_block(5) + xkv_dtype_size(5) + xkv_dtype_bytes(5, 32), 0);
    assert_string_equal(xkv_dtype_name(5), "unknown");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_are_those_of_ggml),
        cmocka_unit_test(elements_are_scale_times_integer),
        cmocka_unit_test(tables_agree),
        cmocka_unit_test(edges),
        cmocka_unit_test(sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
