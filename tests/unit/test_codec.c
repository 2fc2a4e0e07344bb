/* Packing and restoring synthetic planes: exactness, measured errors against fp64, targets, ranges, fallbacks, damage.
 */
#include "support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- Lossless --- */

static void lossless_is_exact(void **state)
{
    static const uint32_t tokens[] = {1, 2, 31, 255, 256, 257, 700};
    xkv_ctx *ctx = new_ctx(2);

    (void)state;
    for (uint32_t dtype = 0; dtype < 3; dtype++)
        for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
            synthetic s = make_synthetic(&(synthetic_options){
                .layers = 3, .tokens = tokens[i], .heads = 2, .head_dim = 6, .dtype = dtype, .rope = 1});
            packed p = pack_planes(ctx, &s, NULL);
            uint8_t *data = restore(ctx, &s, p.entry);
            assert_memory_equal(data, s.data, s.size);
            assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
            free(data);
            free_packed(ctx, &p);
            free_synthetic(&s);
        }
    xkv_ctx_free(ctx);
}

static void no_tokens_no_planes(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s = {0};
    packed p = pack_planes(ctx, &s, NULL);

    (void)state;
    assert_int_equal(xkv_entry_geometry(p.entry)->plane_count, 0);
    assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
    free_packed(ctx, &p);
    xkv_ctx_free(ctx);
}

/* Views of every layout the API speaks of restore the same elements. */
static void views_in_other_layouts(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s =
        make_synthetic(&(synthetic_options){.layers = 1, .tokens = 70, .heads = 3, .head_dim = 10, .dtype = XKV_F16});
    packed p = pack_planes(ctx, &s, NULL);
    uint16_t head_major[2100], transposed[2100];
    uint32_t rows[70];
    xkv_view views[2] = {{head_major, 20, 70 * 20, 2, rows, .dtype = XKV_F16},
                         {transposed, 2, 10 * 140, 140, NULL, .dtype = XKV_F16}};

    (void)state;
    for (uint32_t t = 0; t < 70; t++)
        rows[t] = (t * 37 + 5) % 70;
    assert_ok(ctx, xkv_entry_read(ctx, p.entry, NULL, views));
    for (uint32_t t = 0; t < 70; t++)
        for (uint32_t h = 0; h < 3; h++)
            for (uint32_t d = 0; d < 10; d++) {
                double k = test_from_half(head_major[h * 700 + rows[t] * 10 + d]),
                       v = test_from_half(transposed[(h * 10 + d) * 70 + t]);
                assert_true(k == element(&s, s.data, 0, t, h * 10 + d));
                assert_true(v == element(&s, s.data, 1, t, h * 10 + d));
            }
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- svd --- */

static const synthetic_options low_rank = {.layers = 6,
                                           .tokens = 600,
                                           .heads = 2,
                                           .head_dim = 16,
                                           .dtype = XKV_F16,
                                           .rank = 5,
                                           .group_layers = 4,
                                           .noise = 0,
                                           .rope = 1,
                                           .first_position = 3};

static xkv_pack_options ranks(uint32_t k, uint32_t v)
{
    xkv_pack_options o = xkv_pack_options_default();

    o.rank_k = k;
    o.rank_v = v;
    return o;
}

/* Relative error of a plane over coded tokens, rotated or not: RoPE is an isometry. */
static double plane_error(const synthetic *s, const uint8_t *data, uint32_t plane, uint32_t t0, uint32_t t1)
{
    double squares = 0, energy = 0;

    for (uint32_t t = t0; t < t1; t++)
        for (uint32_t i = 0; i < s->planes[plane].heads * s->planes[plane].head_dim; i++) {
            double x = element(s, s->data, plane, t, i), d = x - element(s, data, plane, t, i);
            squares += d * d;
            energy += x * x;
        }
    return sqrt(squares / energy);
}

/* Data of rank 5 before RoPE comes back to 16-bit accuracy; if K were not un-rotated it could not. */
static void svd_recovers_low_rank(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = make_synthetic(&low_rank);
    xkv_pack_options o = ranks(10, 10);
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry);

    (void)state;
    for (uint32_t plane = 0; plane < 12; plane++)
        assert_true(plane_error(&s, data, plane, 4, 600) < 1.5e-3);
    assert_memory_equal(data, s.data, 4 * 64); /* sinks of the first plane */
    assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
    free(data);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* What the entry says about its error is what comes out. */
static void stored_errors_are_true(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic_options so = low_rank;
    so.noise = 0.5;
    so.dtype = XKV_F32;
    synthetic s = make_synthetic(&so);
    xkv_pack_options o = ranks(8, 12);
    o.window = 10;
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry);
    xkv_entry_info info;

    (void)state;
    xkv_entry_get_info(p.entry, &info);
    assert_int_equal(info.group_count, 4);
    for (uint32_t g = 0; g < 4; g++) {
        static const uint32_t expected[] = {8, 12, 4, 6};
        xkv_group_info gi;
        xkv_entry_get_group(p.entry, g, &gi);
        assert_int_equal(gi.codec, XKV_CODEC_SVD);
        assert_int_equal(gi.rank, expected[g]);
        for (uint32_t i = 0; i < gi.plane_count; i++) {
            double measured = plane_error(&s, data, gi.planes[i], 4, 590);
            assert_true(fabs(measured - gi.errors[i]) < 1e-5);
            assert_true(measured > 0.1);
        }
    }
    for (uint32_t plane = 0; plane < 12; plane++)
        for (uint32_t i = 0; i < 32; i++) {
            assert_true(element(&s, data, plane, 3, i) == element(&s, s.data, plane, 3, i));
            assert_true(element(&s, data, plane, 590, i) == element(&s, s.data, plane, 590, i));
            assert_true(element(&s, data, plane, 599, i) == element(&s, s.data, plane, 599, i));
        }
    free(data);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void error_target_holds(void **state)
{
    static const double targets[] = {0.5, 0.2, 0.05, 0.004};
    xkv_ctx *ctx = new_ctx(2);
    synthetic_options so = low_rank;
    so.noise = 0.02;
    synthetic s = make_synthetic(&so);
    uint64_t last = 0;

    (void)state;
    for (size_t i = 0; i < 4; i++) {
        xkv_pack_options o = xkv_pack_options_default();
        o.error = targets[i];
        o.half_factors = 1;
        packed p = pack_planes(ctx, &s, &o);
        for (uint32_t g = 0; g < 4; g++) {
            xkv_group_info gi;
            xkv_entry_get_group(p.entry, g, &gi);
            assert_true(gi.error <= targets[i]);
        }
        assert_true(p.report.entry_bytes >= last);
        last = p.report.entry_bytes;
        free_packed(ctx, &p);
    }
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void ratio_target_holds(void **state)
{
    static const double targets[] = {2, 4, 8};
    xkv_ctx *ctx = new_ctx(2);
    synthetic_options so = low_rank;
    so.tokens = 2000;
    so.heads = 4;
    so.noise = 0.3;
    synthetic s = make_synthetic(&so);

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        xkv_pack_options o = xkv_pack_options_default();
        o.ratio = targets[i];
        o.half_factors = 1;
        packed p = pack_planes(ctx, &s, &o);
        double ratio = (double)s.size / (double)p.m.size;
        assert_true(ratio >= targets[i] && ratio < targets[i] * 1.03);
        assert_true(fabs(ratio - p.report.ratio) < 1e-9);
        free_packed(ctx, &p);
    }
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void unreachable_ratio_is_an_error(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s =
        make_synthetic(&(synthetic_options){.layers = 2, .tokens = 20, .heads = 1, .head_dim = 8, .dtype = XKV_F16});
    xkv_pack_options o = xkv_pack_options_default();
    memory m = {0};
    xkv_output output = memory_output(&m);

    (void)state;
    o.ratio = 50;
    assert_int_equal(xkv_pack(ctx, &s.geometry, s.views, NULL, NULL, 0, &o, &output, NULL), XKV_ERROR_TARGET);
    assert_non_null(strstr(xkv_ctx_error(ctx), "ratio of 50"));
    memory_free(&m);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Exceptions --- */

static void groups_that_do_not_shrink(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s =
        make_synthetic(&(synthetic_options){.layers = 4, .tokens = 50, .heads = 2, .head_dim = 32, .dtype = XKV_F16});
    xkv_pack_options o = ranks(46, 1);
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry);
    xkv_group_info gi;

    (void)state;
    assert_int_equal(p.report.fallback_groups, 1);
    xkv_entry_get_group(p.entry, 0, &gi);
    assert_int_equal(gi.codec, XKV_CODEC_LOSSLESS);
    assert_int_equal(gi.reason, XKV_REASON_NO_GAIN);
    for (uint32_t plane = 0; plane < 8; plane += 2)
        assert_true(plane_error(&s, data, plane, 0, 50) == 0);
    free(data);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void nonfinite_planes_are_exact(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = make_synthetic(&low_rank);
    xkv_pack_options o = ranks(10, 10);
    uint16_t nan_bits = 0x7e01, inf_bits = 0xfc00;
    xkv_group_info gi;
    packed p;
    uint8_t *data;

    (void)state;
    memcpy((uint8_t *)s.views[2].data + 4444, &nan_bits, 2);
    memcpy((uint8_t *)s.views[7].data + 2, &inf_bits, 2);
    p = pack_planes(ctx, &s, &o);
    data = restore(ctx, &s, p.entry);
    assert_int_equal(p.report.nonfinite_planes, 2);
    assert_int_equal(p.report.lossless_groups, 2);
    xkv_entry_get_group(p.entry, 2, &gi);
    assert_int_equal(gi.reason, XKV_REASON_NONFINITE);
    assert_int_equal(gi.planes[0], 2);
    assert_memory_equal(data + 2 * 38400, s.data + 2 * 38400, 38400);
    assert_memory_equal(data + 7 * 38400, s.data + 7 * 38400, 38400);
    assert_true(plane_error(&s, data, 4, 4, 600) < 1.5e-3);
    free(data);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void mla_keeps_its_rotated_part(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic_options so = low_rank;
    so.mla = 1;
    so.rope = 0;
    synthetic s = make_synthetic(&so);
    xkv_pack_options o = ranks(10, 0);
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = restore(ctx, &s, p.entry);

    (void)state;
    for (uint32_t plane = 0; plane < 12; plane++)
        assert_true(plane_error(&s, data, plane, 4, 600) < (plane % 2 ? 1e-30 : 1.5e-3));
    assert_int_equal(p.report.lossless_groups, 2);
    free(data);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void zeros_and_single_tokens(void **state)
{
    xkv_ctx *ctx = new_ctx(2);

    (void)state;
    for (uint32_t tokens = 1; tokens < 8; tokens++) {
        synthetic s = make_synthetic(
            &(synthetic_options){.layers = 2, .tokens = tokens, .heads = 1, .head_dim = 8, .dtype = XKV_F16});
        xkv_pack_options o = ranks(3, 3);
        memset(s.data, 0, s.size / 4); /* the K plane of layer 0 */
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *data = restore(ctx, &s, p.entry);
        assert_true(memcmp(data, s.data, s.size / 4) == 0);
        free(data);
        free_packed(ctx, &p);
        free_synthetic(&s);
    }
    xkv_ctx_free(ctx);
}

/* --- Ranges --- */

static void every_range_is_a_slice(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = make_synthetic(&low_rank);
    size_t plane_size = s.size / 12, row = plane_size / 600;
    uint8_t *part = malloc(s.size);

    (void)state;
    for (int profile = 0; profile < 2; profile++) {
        xkv_pack_options o = profile ? ranks(10, 10) : xkv_pack_options_default();
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *whole = restore(ctx, &s, p.entry);
        xkv_view *views = views_into(&s, part);
        for (uint32_t first = 0; first < 600; first += 83)
            for (uint32_t count = 1; count <= 600 - first; count += 61) {
                xkv_read_options r = xkv_read_options_default();
                r.first_token = first;
                r.token_count = count;
                memset(part, 0x77, s.size);
                assert_ok(ctx, xkv_entry_read(ctx, p.entry, &r, views));
                for (uint32_t i = 0; i < 12; i++) {
                    assert_memory_equal(part + i * plane_size, whole + i * plane_size + first * row, count * row);
                    if (count < 600)
                        assert_int_equal(part[i * plane_size + count * row], 0x77);
                }
            }
        free(views);
        free(whole);
        free_packed(ctx, &p);
    }
    free(part);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static int note_group(void *user, uint32_t group)
{
    uint32_t *seen = user;

    assert_int_equal(group, *seen);
    ++*seen;
    return group == 2;
}

static void groups_are_announced_in_order(void **state)
{
    xkv_ctx *ctx = new_ctx(2);
    synthetic s = make_synthetic(&low_rank);
    packed p = pack_planes(ctx, &s, NULL);
    xkv_read_options r = xkv_read_options_default();
    uint32_t seen = 1;

    (void)state;
    r.first_group = 1;
    r.group_ready = note_group;
    r.group_ready_user = &seen;
    assert_int_equal(xkv_entry_read(ctx, p.entry, &r, s.views), XKV_ERROR_CANCELLED);
    assert_int_equal(seen, 3);
    r.group_count = 9;
    assert_int_equal(xkv_entry_read(ctx, p.entry, &r, s.views), XKV_ERROR_ARGUMENT);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* --- Determinism, options --- */

static void threads_do_not_change_a_byte(void **state)
{
    synthetic s = make_synthetic(&low_rank);
    xkv_pack_options o = ranks(7, 9);
    packed first = {{0}, {0}, {0}, NULL};
    xkv_ctx *ctx = NULL;

    (void)state;
    for (uint32_t threads = 1; threads <= 3; threads++) {
        xkv_ctx *mine = new_ctx(threads);
        packed p = pack_planes(mine, &s, &o);
        if (threads == 1) {
            first = p;
            ctx = mine;
            continue;
        }
        assert_int_equal(p.m.size, first.m.size);
        assert_memory_equal(p.m.data, first.m.data, p.m.size);
        free_packed(mine, &p);
        xkv_ctx_free(mine);
    }
    free_packed(ctx, &first);
    xkv_ctx_free(ctx);
    free_synthetic(&s);
}

static void options_are_checked(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s =
        make_synthetic(&(synthetic_options){.layers = 1, .tokens = 9, .heads = 1, .head_dim = 8, .dtype = XKV_F16});
    memory m = {0};
    xkv_output output = memory_output(&m);
    xkv_pack_options bad[10];

    (void)state;
    for (int i = 0; i < 10; i++)
        bad[i] = xkv_pack_options_default();
    bad[0].group_layers = 0;
    bad[1].iterations = 9;
    bad[2].chunk_tokens = 100;
    bad[3].error = 1.5;
    bad[4].ratio = 0.5;
    bad[5].ratio = 4, bad[5].error = 0.1;
    bad[6].profile = XKV_PROFILE_SVD;
    bad[7].profile = XKV_PROFILE_LOSSLESS, bad[7].rank_k = 4;
    bad[8].rank_k = 4; /* and none for V */
    bad[9].zstd_level = 20;
    for (int i = 0; i < 10; i++) {
        assert_int_equal(xkv_pack(ctx, &s.geometry, s.views, NULL, NULL, 0, &bad[i], &output, NULL),
                         XKV_ERROR_ARGUMENT);
        assert_true(strlen(xkv_ctx_error(ctx)) > 10);
    }
    memory_free(&m);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* A program compiled against an older, shorter struct gets today's defaults for the rest. */
static void old_options_keep_working(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s = make_synthetic(&low_rank);
    xkv_pack_options o = ranks(10, 10);
    packed whole = pack_planes(ctx, &s, &o), cut;

    (void)state;
    o.struct_size = offsetof(xkv_pack_options, iterations);
    o.iterations = 99; /* beyond what it says it has */
    cut = pack_planes(ctx, &s, &o);
    assert_int_equal(cut.m.size, whole.m.size);
    assert_memory_equal(cut.m.data, whole.m.data, cut.m.size);
    free_packed(ctx, &whole);
    free_packed(ctx, &cut);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

/* The file level reads no field that an old program's options lack: here all behind group_layers. */
static void old_options_keep_working_on_files(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    size_t size = offsetof(xkv_pack_options, sinks);
    xkv_pack_options o = xkv_pack_options_default(), *old = malloc(size);

    (void)state;
    o.struct_size = size;
    memcpy(old, &o, size);
    assert_int_equal(xkv_pack_file(ctx, "/dev/null", "/dev/null/entry", 0, old, NULL), XKV_ERROR_IO);
    memset(old, 0, sizeof(size_t)); /* struct_size, without a word to the compiler about the rest */
    assert_int_equal(xkv_pack_file(ctx, "/dev/null", "/dev/null/entry", 0, old, NULL), XKV_ERROR_ARGUMENT);
    free(old);
    xkv_ctx_free(ctx);
}

/* --- Damage --- */

static void every_damaged_byte_is_found(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s = make_synthetic(&(synthetic_options){.layers = 2,
                                                      .tokens = 40,
                                                      .heads = 1,
                                                      .head_dim = 8,
                                                      .dtype = XKV_F16,
                                                      .rank = 2,
                                                      .group_layers = 2,
                                                      .noise = 0.1,
                                                      .rope = 1});

    (void)state;
    for (int profile = 0; profile < 2; profile++) {
        xkv_pack_options o = profile ? ranks(2, 3) : xkv_pack_options_default();
        packed p = pack_planes(ctx, &s, &o);
        assert_damage_is_found(ctx, &p.m, open_entry, NULL);
        free_packed(ctx, &p);
    }
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lossless_is_exact),
        cmocka_unit_test(no_tokens_no_planes),
        cmocka_unit_test(views_in_other_layouts),
        cmocka_unit_test(svd_recovers_low_rank),
        cmocka_unit_test(stored_errors_are_true),
        cmocka_unit_test(error_target_holds),
        cmocka_unit_test(ratio_target_holds),
        cmocka_unit_test(unreachable_ratio_is_an_error),
        cmocka_unit_test(groups_that_do_not_shrink),
        cmocka_unit_test(nonfinite_planes_are_exact),
        cmocka_unit_test(mla_keeps_its_rotated_part),
        cmocka_unit_test(zeros_and_single_tokens),
        cmocka_unit_test(every_range_is_a_slice),
        cmocka_unit_test(groups_are_announced_in_order),
        cmocka_unit_test(threads_do_not_change_a_byte),
        cmocka_unit_test(options_are_checked),
        cmocka_unit_test(old_options_keep_working),
        cmocka_unit_test(old_options_keep_working_on_files),
        cmocka_unit_test(every_damaged_byte_is_found),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
