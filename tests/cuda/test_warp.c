/* What lanes and threads of the device do, run on the CPU: rANS against the CPU's coder, the same integers and the same
 * bytes; operands, RoPE, views and byte planes against the CPU's operations, the same bits. */
#include "support.h"

#include "cpu/ops.h"
#include "device_tables.h"
#include "elements.h"
#include "gpu/gpu_support.h"
#include "rans.h"
#include "warp_sum.h"

#include <math.h>
#include <stdlib.h>
#include <xxhash.h>

enum { MOST_TOKENS = 300, COMPONENTS = 6 };

static xkv_warp_table tables[XKV_BASE_TABLES];

static int make_tables(void **state)
{
    (void)state;
    xkv_device_tables(tables);
    return 0;
}

/* --- rANS --------------------------------------------------------------------------------------------------------- */

typedef struct chunk {
    uint32_t tokens;
    uint8_t tables[COMPONENTS];
    int16_t q[COMPONENTS][MOST_TOKENS];
} chunk;

static xkv_rans_shape shape_of(const chunk *c)
{
    return (xkv_rans_shape){c->tokens, COMPONENTS, MOST_TOKENS, c->tables};
}

/* Values of about the table's deviation, some at the edge of what it codes, some anywhere. */
static int16_t some_value(uint32_t table, uint64_t *seed)
{
    double x = test_normal(seed) * exp2(-3 + (table - 1) % 60 / 4.0);
    uint32_t span = xkv_table_span(table);

    if (test_random(seed) % 32 == 0)
        x = (double)span + (double)(test_random(seed) % 3) - 1;
    if (test_random(seed) % 64 == 0)
        x = (double)(test_random(seed) % 65535) - 32767;
    return (int16_t)fmin(fmax(rint(test_random(seed) % 2 ? x : -x), -32767), 32767);
}

static void fill(chunk *c, uint32_t tokens, uint32_t first_table, uint64_t *seed)
{
    c->tokens = tokens;
    for (uint32_t i = 0; i < COMPONENTS; i++) {
        c->tables[i] = (uint8_t)(i == 2 ? c->tables[1] : 1 + (first_table + 41 * i) % XKV_TABLE_MAX);
        for (uint32_t t = 0; t < tokens; t++)
            c->q[i][t] = some_value(c->tables[i], seed);
    }
}

/* Decode as the kernel does; memory of exactly the size that must be readable. */
static uint32_t warp_decode(chunk *c, const uint8_t *data, size_t size)
{
    uint8_t *exact = aligned_alloc(4, (size + 7) & ~(size_t)3);
    uint8_t *shrunk = realloc(exact, ((size + 3) & ~(size_t)3) + (size == 0));
    uint32_t fault;

    memcpy(shrunk, data, size);
    fault = gpu_decode(tables, shrunk, size, c->tokens, c->tables, COMPONENTS, c->q[0], MOST_TOKENS);
    free(shrunk);
    return fault;
}

static size_t warp_encode(const chunk *c, uint8_t *data)
{
    return gpu_encode(c->q[0], MOST_TOKENS, c->tokens, c->tables, COMPONENTS, data);
}

static const uint32_t token_counts[] = {1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 300};

static void test_round_trip(void **state)
{
    uint64_t seed = 1;
    (void)state;
    for (size_t n = 0; n < sizeof token_counts / sizeof *token_counts; n++)
        for (uint32_t table = 0; table < XKV_TABLE_MAX; table += 3) {
            chunk c, decoded;
            fill(&c, token_counts[n], table, &seed);
            xkv_rans_shape s = shape_of(&c);
            uint8_t *expected = malloc(xkv_rans_bound(&s)), *data = malloc(xkv_rans_bound(&s));
            size_t size = xkv_rans_encode(xkv_coder_cpu_generic(), &s, c.q[0], expected);
            assert_int_equal(warp_encode(&c, data), size);
            assert_memory_equal(data, expected, size);
            decoded = c;
            for (uint32_t i = 0; i < COMPONENTS; i++)
                memset(decoded.q[i], 0x55, c.tokens * sizeof(int16_t));
            assert_int_equal(warp_decode(&decoded, expected, size), 0);
            for (uint32_t i = 0; i < COMPONENTS; i++)
                assert_memory_equal(decoded.q[i], c.q[i], c.tokens * sizeof(int16_t));
            free(data);
            free(expected);
        }
}

/* Of damaged bytes the device thinks as the CPU does, and decodes the same where both think they are sound. */
static void test_damage(void **state)
{
    uint64_t seed = 2;
    uint32_t refused = 0, taken = 0;
    (void)state;
    for (uint32_t round = 0; round < 4000; round++) {
        chunk c, device, cpu;
        fill(&c, token_counts[round % 12], (uint32_t)(test_random(&seed) % XKV_TABLE_MAX), &seed);
        xkv_rans_shape s = shape_of(&c);
        uint8_t *data = malloc(xkv_rans_bound(&s) + 64);
        size_t size = xkv_rans_encode(xkv_coder_cpu_generic(), &s, c.q[0], data);
        memset(data + size, 0x11, 64);
        if (round % 4 == 0)
            size = test_random(&seed) % (size + 1);
        else if (round % 4 == 1)
            size += test_random(&seed) % 64;
        else if (size > 0)
            data[test_random(&seed) % size] ^= (uint8_t)(1u << test_random(&seed) % 8);
        device = cpu = c;
        uint32_t fault = warp_decode(&device, data, size);
        xkv_status status = xkv_rans_decode(NULL, xkv_coder_cpu_generic(), &s, data, size, "chunk", cpu.q[0]);
        assert_int_equal(fault != 0, status != XKV_OK);
        if (fault == 0)
            assert_memory_equal(device.q, cpu.q, sizeof cpu.q);
        refused += fault != 0;
        taken += fault == 0;
        free(data);
    }
    assert_true(refused > 1000 && taken > 10);
}

/* --- Operands ----------------------------------------------------------------------------------------------------- */

static void test_parts(void **state)
{
    (void)state;
    for (int32_t q = -32768; q <= 32767; q++) {
        int32_t high = xkv_part_of(q, XKV_OPERAND_HIGH), low = xkv_part_of(q, XKV_OPERAND_LOW);
        assert_int_equal(high + low, q);
        assert_true(test_from_half(xkv_f16_from_f32((float)high)) == high);
        assert_true(test_from_half(xkv_f16_from_f32((float)low)) == low);
        assert_int_equal(xkv_part_of(q, XKV_OPERAND_WHOLE), q);
        if (abs(q) <= 2048)
            assert_true(test_from_half(xkv_f16_from_f32((float)q)) == q);
    }
}

static void test_expand(void **state)
{
    int16_t q[3][5] = {{1, -2048, 2048, 0, 7}, {300, -32768, 32767, 5, -129}, {0, 2049, 0, 0, 0}};
    uint32_t rows[] = {0 << 2 | XKV_OPERAND_WHOLE, 1 << 2 | XKV_OPERAND_HIGH, 1 << 2 | XKV_OPERAND_LOW,
                       2 << 2 | XKV_OPERAND_WHOLE};
    uint16_t tile[8][6];
    float exact[4][6];
    uint32_t fault = 0;
    xkv_plug_expand o = {q[0], 5, rows, 4, 5, tile, 6, 4, 0, &fault};

    (void)state;
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t t = 0; t < 5; t++) {
            uint32_t found = xkv_expand_element(&o, i, t);
            assert_int_equal(found, i == 3 && t == 1 ? XKV_WARP_TOO_WIDE : 0);
            assert_int_equal(tile[i][t], tile[i + 4][t]);
        }
    for (uint32_t t = 0; t < 5; t++) {
        assert_true(test_from_half(tile[0][t]) == q[0][t]);
        assert_true(test_from_half(tile[1][t]) + test_from_half(tile[2][t]) == q[1][t]);
    }
    o = (xkv_plug_expand){q[0], 5, rows, 4, 5, exact, 6, 0, 1, &fault};
    for (uint32_t i = 0; i < 4; i++)
        assert_int_equal(xkv_expand_element(&o, i, 1), 0);
    assert_true(exact[3][1] == 2049 && exact[1][1] == -32768);
}

/* What two halves leave of an f32 is below 2^-22 of it, or of the largest element below 2^-38. */
static void test_split(void **state)
{
    enum { WIDTH = 1000 };
    static float rows[2][WIDTH];
    static uint16_t high[WIDTH], low[WIDTH];
    uint32_t index = 1;
    uint64_t seed = 3;
    xkv_plug_split o = {rows[0], &index, 1, WIDTH, 0.37f, 65536, high, low, 0};

    (void)state;
    for (uint32_t i = 0; i < WIDTH; i++)
        rows[1][i] = (float)(test_normal(&seed) * exp2(-(double)(test_random(&seed) % 20)) * 0.05);
    for (uint32_t i = 0; i < WIDTH; i++) {
        xkv_split_element(&o, 0, i);
        double x = (double)(rows[1][i] * 0.37f) * 65536, left = x - test_from_half(high[i]) - test_from_half(low[i]);
        assert_true(fabs(left) <= fmax(fabs(x) * exp2(-22), exp2(-25)));
    }
    float whole[WIDTH];
    o = (xkv_plug_split){rows[0], NULL, 2, WIDTH, 0.37f, 4, whole, NULL, 1};
    xkv_split_element(&o, 0, 5);
    assert_true(whole[5] == rows[0][5] * 0.37f * 4);
}

static void test_spread(void **state)
{
    int16_t q[2][4] = {{1, -2, 3, 0}, {-32768, 32767, 5, 7}};
    uint32_t source[3] = {1, XKV_NO_SOURCE, 0};
    float factor[3] = {0.5f, 9, -0.25f}, rows[4][3];
    xkv_plug_spread o = {q[0], 4, source, factor, 3, 4, rows[0]};

    (void)state;
    for (uint32_t t = 0; t < 4; t++)
        for (uint32_t i = 0; i < 3; i++)
            xkv_spread_element(&o, t, i);
    for (uint32_t t = 0; t < 4; t++) {
        assert_true(rows[t][0] == q[1][t] * 0.5f);
        assert_true(rows[t][1] == 0);
        assert_true(rows[t][2] == q[0][t] * -0.25f);
    }
}

/* --- Rows --------------------------------------------------------------------------------------------------------- */

static xkv_rope some_rope(uint32_t n_rot, uint32_t offset, uint32_t style, double scale)
{
    xkv_rope rope = {.n_rot = n_rot, .offset = offset, .style = style, .scale = scale};

    for (uint32_t i = 0; i < n_rot / 2; i++)
        rope.inv_freq[i] = pow(10000, -2.0 * i / n_rot);
    return rope;
}

static void test_angles(void **state)
{
    xkv_rope rope = some_rope(32, 0, XKV_ROPE_HALF_SPLIT, 1.3);
    int32_t positions[] = {0, 1, 77, 65536, 2147483647, -5};
    float out[6][40], expected[32];
    xkv_plug_angles o = {positions, rope.inv_freq, 6, 16, rope.scale, out[0], 40};

    (void)state;
    for (uint32_t t = 0; t < 6; t++) {
        xkv_rope_cos_sin(&rope, positions[t], false, expected);
        for (uint32_t i = 0; i < 16; i++)
            xkv_angle_element(&o, t, i);
        assert_memory_equal(out[t], expected, sizeof expected);
    }
}

enum { TOKENS = 9, HEADS = 3, DIMS = 20, WIDTH = 70, LAYOUTS = 5 };

/* Strides of token-major, head-major and transposed planes, and of backward ones with gaps, for elements of `e` bytes;
 * where element (0, 0, 0) is. */
static int64_t lay_out(xkv_view *v, int layout, int64_t e)
{
    const int64_t strides[LAYOUTS][4] = {
        {HEADS * DIMS * e, DIMS * e, e, 0},
        {DIMS * e, TOKENS * DIMS * e, e, 0},
        {e, TOKENS * DIMS * e, TOKENS * e, 0},
        {-2 * HEADS * DIMS * e, 2 * DIMS * e, 2 * e, (TOKENS - 1) * 2 * HEADS * DIMS * e},
        {4 * e, 4 * TOKENS * e, e, 0}};
    v->head_dim = layout == 4 ? 4 : 0; /* rows are split into groups of 4 elements */
    v->token_stride = strides[layout][0];
    v->head_stride = strides[layout][1];
    v->dim_stride = strides[layout][2];
    return strides[layout][3];
}

typedef struct stored {
    uint8_t bytes[2 * TOKENS * HEADS * DIMS * 4 + 64];
} stored;

static xkv_view view_into(stored *s, int layout, uint32_t dtype, const uint32_t *rows)
{
    xkv_view v = {.rows = rows, .dtype = dtype};
    int64_t start = lay_out(&v, layout, (int64_t)xkv_dtype_size(dtype));

    memset(s->bytes, 0xee, sizeof s->bytes);
    v.data = s->bytes + start;
    return v;
}

/* The CPU: add the mean, rotate, scatter. */
static void expect_rows(const float *rows, const float *mean, const float *angles, const xkv_rope *rope,
                        const xkv_plane *p, uint32_t column, const xkv_view *view)
{
    float x[TOKENS][HEADS * DIMS];

    for (uint32_t t = 0; t < TOKENS - 1; t++) {
        for (uint32_t i = 0; i < HEADS * DIMS; i++)
            x[t][i] = (mean ? mean[column + i] : 0) + rows[t * WIDTH + column + i];
        if (rope)
            xkv_generic_rope_row(x[t], HEADS, DIMS, rope, angles + t * rope->n_rot, false);
    }
    xkv_view_scatter(xkv_kernels_cpu_generic(), x[0], HEADS * DIMS, p, 1, TOKENS, view);
}

static void check_store(int layout, uint32_t dtype, const xkv_rope *rope, const uint32_t *map, bool with_mean,
                        uint64_t *seed)
{
    static stored found, expected;
    const uint32_t column = 7;
    const xkv_plane plane = {.heads = HEADS, .head_dim = DIMS, .dtype = dtype};
    float rows[TOKENS * WIDTH], mean[WIDTH], angles[TOKENS * DIMS];
    xkv_view view = view_into(&expected, layout, dtype, map);

    for (uint32_t i = 0; i < TOKENS * WIDTH; i++)
        rows[i] = (float)(test_normal(seed) * (i % 91 == 0 ? 1e6 : 1));
    for (uint32_t i = 0; i < WIDTH; i++)
        mean[i] = (float)test_normal(seed);
    for (int32_t t = 0; rope && t < TOKENS; t++)
        xkv_rope_cos_sin(rope, 1000 + t, false, angles + (uint32_t)t * rope->n_rot);
    expect_rows(rows, with_mean ? mean : NULL, angles, rope, &plane, column, &view);

    xkv_plug_plane p = {view_into(&found, layout, dtype, map), HEADS, DIMS, column, 0, 0, 0, 0, XKV_F32};
    if (rope) {
        p.pairs = rope->n_rot / 2;
        p.offset = rope->offset;
        p.style = rope->style;
    }
    xkv_plug_store o = {rows, WIDTH, with_mean ? mean : NULL, angles, rope ? rope->n_rot : 0, &p, 1, TOKENS - 1, 1};
    for (uint32_t t = 0; t < o.tokens; t++)
        for (uint32_t i = 0; i < xkv_items_of(&p, p.heads); i++)
            xkv_store_item(&o, &p, t, i);
    assert_memory_equal(found.bytes, expected.bytes, sizeof found.bytes);
}

static const uint32_t paged[TOKENS] = {4, 5, 6, 7, 0, 1, 2, 3, 8};

static void test_store(void **state)
{
    const xkv_rope ropes[] = {some_rope(20, 0, XKV_ROPE_HALF_SPLIT, 1), some_rope(20, 0, XKV_ROPE_INTERLEAVED, 1),
                              some_rope(8, 6, XKV_ROPE_HALF_SPLIT, 1.2), some_rope(2, 18, XKV_ROPE_INTERLEAVED, 0.9)};
    uint64_t seed = 4;

    (void)state;
    for (int layout = 0; layout < LAYOUTS; layout++)
        for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++)
            for (int r = 0; r < 5; r++)
                for (int kind = 0; kind < 4; kind++)
                    check_store(layout, dtype, r < 4 ? &ropes[r] : NULL, kind & 1 ? paged : NULL, (kind & 2) != 0,
                                &seed);
}

static void test_move(void **state)
{
    static stored found, expected;
    uint64_t seed = 5;

    (void)state;
    for (int layout = 0; layout < LAYOUTS; layout++)
        for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++) {
            const xkv_plane plane = {.heads = HEADS, .head_dim = DIMS, .dtype = dtype};
            size_t e = xkv_dtype_size(dtype), row_bytes = WIDTH * e, column = 4 * e;
            _Alignas(4) uint8_t rows[TOKENS * WIDTH * 4];
            for (size_t i = 0; i < sizeof rows; i++)
                rows[i] = (uint8_t)test_random(&seed);
            xkv_view view = view_into(&expected, layout, dtype, paged);
            xkv_view_scatter_bytes(rows + column, row_bytes, &plane, 2, TOKENS, &view);
            xkv_plug_move o = {rows,  row_bytes, column,     view_into(&found, layout, dtype, paged),
                               HEADS, DIMS,      TOKENS - 2, 2};
            for (uint32_t t = 0; t < o.tokens; t++)
                for (uint32_t i = 0; i < HEADS * DIMS; i++)
                    xkv_move_element(&o, t, i);
            assert_memory_equal(found.bytes, expected.bytes, sizeof found.bytes);
        }
}

static void test_join(void **state)
{
    enum { ROWS = 37, COLS = 71 };
    static uint8_t planes[ROWS * COLS * 4], found[ROWS * COLS * 4], expected[ROWS * COLS * 4];
    uint64_t seed = 6;

    (void)state;
    for (size_t i = 0; i < sizeof planes; i++)
        planes[i] = (uint8_t)test_random(&seed);
    for (uint32_t elem = 2; elem <= 4; elem += 2) {
        xkv_plug_join o = {planes, ROWS, COLS, elem, found};
        xkv_generic_join_bytes(planes, ROWS, COLS, elem, expected);
        for (uint64_t r = 0; r < ROWS; r++)
            for (uint64_t c = 0; c < COLS; c++)
                xkv_join_element(&o, r, c);
        assert_memory_equal(found, expected, (size_t)ROWS * COLS * elem);
    }
}

/* --- Checksums ---------------------------------------------------------------------------------------------------- */

/* Against the library, for every length around the ends of stripes and blocks. */
static void test_sums(void **state)
{
    enum { MOST = 5 * XKV_SUM_BLOCK };
    uint64_t bytes[MOST / 8], seed = 7;

    (void)state;
    for (size_t i = 0; i < MOST / 8; i++)
        bytes[i] = test_random(&seed);
    for (size_t size = XKV_SUM_SHORT + 1; size <= MOST; size++)
        if (xkv_warp_sum_of((const uint8_t *)bytes, size) != XXH3_64bits(bytes, size))
            fail_msg("%zu bytes", size);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_damage), cmocka_unit_test(test_parts),
        cmocka_unit_test(test_expand),     cmocka_unit_test(test_split),  cmocka_unit_test(test_spread),
        cmocka_unit_test(test_angles),     cmocka_unit_test(test_store),  cmocka_unit_test(test_move),
        cmocka_unit_test(test_join),       cmocka_unit_test(test_sums),
    };
    return cmocka_run_group_tests(tests, make_tables, NULL);
}
