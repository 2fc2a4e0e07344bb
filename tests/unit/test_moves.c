/* Rows restored at other positions: un-rotated and rotated again in f64, from those restored where they were. */
#include "support.h"

#include <math.h>
#include <stdlib.h>

enum { TOKENS = 600, FIRST = 37, COUNT = 500 };

static synthetic sample(uint32_t dtype)
{
    synthetic s = make_synthetic(&(synthetic_options){.layers = 4,
                                                      .tokens = TOKENS,
                                                      .heads = 2,
                                                      .head_dim = 32,
                                                      .dtype = dtype,
                                                      .rank = 6,
                                                      .group_layers = 4,
                                                      .noise = 0.01,
                                                      .rope = 1,
                                                      .first_position = 11});
    s.ropes[0].scale = 1.25; /* the rows count as scaled; moving them must not do it again */
    return s;
}

static xkv_pack_options profile(int which)
{
    xkv_pack_options o = xkv_pack_options_default();

    if (which == 0)
        return o;
    o.profile = which == 1 ? XKV_PROFILE_SVD : XKV_PROFILE_SCALAR;
    o.error = 0.1;
    o.window = 5; /* exact rows in front, behind, and coded ones between */
    return o;
}

/* The asked tokens at `positions`, in a buffer laid out like s->data. */
static xkv_status read_at(xkv_ctx *ctx, const synthetic *s, const packed *p, const int32_t *positions, uint8_t *data)
{
    xkv_read_options r = xkv_read_options_default();
    xkv_view *views = views_into(s, data);
    xkv_status status;

    r.first_token = FIRST;
    r.token_count = COUNT;
    r.positions = positions;
    status = xkv_entry_read(ctx, p->entry, &r, views);
    free(views);
    return status;
}

/* What rounding to an f16 at x, after f32 arithmetic on values of a few units, may be off. */
static double half_ulp(double x)
{
    return 0.5 * exp2(fmax(floor(log2(fabs(x) + 1e-30)), -14) - 10) + 4e-6;
}

static void assert_rows_moved(const synthetic *s, const uint8_t *whole, const int32_t *positions, const uint8_t *moved)
{
    uint32_t width = row_width(&s->planes[0]);
    double *expected = calloc(width, sizeof *expected);

    for (uint32_t p = 0; p < s->geometry.plane_count; p++)
        for (uint32_t t = 0; t < COUNT; t++) {
            moved_row(s, whole, p, FIRST + t, positions[t], expected);
            for (uint32_t i = 0; i < width; i++) {
                double error = fabs(element(s, moved, p, t, i) - expected[i]);
                if (s->planes[p].rope == XKV_NO_ROPE)
                    assert_true(error == 0);
                else
                    assert_true(error <= (s->planes[p].dtype == XKV_F16 ? half_ulp(expected[i]) : 4e-6));
            }
        }
    free(expected);
}

static void fill(int pattern, int32_t *positions)
{
    for (int32_t t = 0; t < COUNT; t++) {
        const int32_t at[] = {11 + FIRST + t + 1000, t, 5000 - 7 * t, t % 3 ? t : -t, 11 + FIRST + t};
        positions[t] = at[pattern];
    }
}

static void rows_turn_to_their_positions(void **state)
{
    xkv_ctx *ctx = new_ctx(2);

    (void)state;
    for (int which = 0; which < 4; which++) { /* the last: f16, all rows exact */
        synthetic s = sample(which == 3 ? XKV_F16 : XKV_F32);
        xkv_pack_options o = profile(which % 3);
        packed p = pack_planes(ctx, &s, &o);
        uint8_t *whole = restore(ctx, &s, p.entry), *moved = calloc(1, s.size);
        int32_t positions[COUNT];
        for (int pattern = 0; pattern < 5; pattern++) {
            fill(pattern, positions);
            assert_int_equal(read_at(ctx, &s, &p, positions, moved), XKV_OK);
            assert_rows_moved(&s, whole, positions, moved);
        }
        free(whole);
        free(moved);
        free_packed(ctx, &p);
        free_synthetic(&s);
    }
    xkv_ctx_free(ctx);
}

static void the_same_positions_change_no_bit(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s = sample(XKV_F16);
    xkv_pack_options o = xkv_pack_options_default();
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *one = calloc(1, s.size), *two = calloc(1, s.size);

    (void)state;
    assert_int_equal(read_at(ctx, &s, &p, s.positions + FIRST, one), XKV_OK);
    assert_int_equal(read_at(ctx, &s, &p, NULL, two), XKV_OK);
    assert_memory_equal(one, two, s.size);
    free(one);
    free(two);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

static void what_cannot_move_is_refused(void **state)
{
    xkv_ctx *ctx = new_ctx(1);
    synthetic s = make_synthetic(
        &(synthetic_options){.layers = 1, .tokens = TOKENS, .heads = 1, .head_dim = 8, .dtype = XKV_F16});
    xkv_pack_options o = xkv_pack_options_default();
    packed p = pack_planes(ctx, &s, &o);
    uint8_t *data = calloc(1, s.size), *untouched = calloc(1, s.size);
    int32_t positions[COUNT];

    (void)state;
    fill(0, positions);
    assert_int_equal(read_at(ctx, &s, &p, positions, data), XKV_ERROR_UNSUPPORTED);
    assert_non_null(strstr(xkv_ctx_error(ctx), "layer 0"));
    for (uint32_t t = 0; t < COUNT; t++) /* it may stay where it is */
        positions[t] = s.positions[FIRST + t];
    assert_memory_equal(data, untouched, s.size);
    assert_int_equal(read_at(ctx, &s, &p, positions, data), XKV_OK);
    positions[3] = INT32_MIN;
    assert_int_equal(read_at(ctx, &s, &p, positions, data), XKV_ERROR_ARGUMENT);
    free(data);
    free(untouched);
    free_packed(ctx, &p);
    free_synthetic(&s);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_turn_to_their_positions),
        cmocka_unit_test(the_same_positions_change_no_bit),
        cmocka_unit_test(what_cannot_move_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
