/* emulated_pack.c - emulated_launch.c for the kernels of packing. */
#include "fake_cuda.h"
#include "launch.h"
#include "pack_elements.h"
#include "warp_pack.h"

static void check_row(const xkv_plug_plane *p, uint32_t token)
{
    if (p->view.rows)
        fake_check(&p->view.rows[token], sizeof *p->view.rows);
    for (uint32_t e = 0; e < p->heads * p->head_dim; e++)
        fake_check(xkv_view_element(&p->view, p->head_dim, token, e), p->view.dtype == XKV_F32 ? 4 : 2);
}

static void run_gather(const void *args)
{
    const xkv_plug_gather *o = args;

    fake_check(o->planes, o->plane_count * sizeof *o->planes);
    fake_check(o->rows, o->tokens * o->ld * sizeof *o->rows);
    if (o->mean)
        fake_check(o->mean, o->ld * sizeof *o->mean);
    for (uint32_t i = 0; i < o->plane_count; i++)
        for (uint32_t t = 0; t < o->tokens; t++) {
            const xkv_plug_plane *p = &o->planes[i];
            check_row(p, o->first + t);
            if (p->pairs > 0)
                fake_check(o->angles + t * o->angles_stride + p->angles, 2 * p->pairs * sizeof *o->angles);
            for (uint32_t item = 0; item < xkv_items_of(p, p->heads); item++)
                xkv_gather_item(o, p, t, item);
        }
}

static void run_take(const void *args)
{
    const xkv_plug_take *o = args;
    const xkv_plug_plane p = {o->view, o->heads, o->head_dim, 0, 0, 0, 0, 0, 0};

    fake_check(o->rows, o->tokens * o->row_bytes);
    for (uint32_t t = 0; t < o->tokens; t++) {
        check_row(&p, o->first + t);
        for (uint32_t e = 0; e < o->heads * o->head_dim; e++)
            xkv_take_element(o, t, e);
    }
}

static void run_scan(const void *args)
{
    const xkv_plug_scan *o = args;

    fake_check(o->planes, o->plane_count * sizeof *o->planes);
    fake_check(o->flags, o->plane_count * sizeof *o->flags);
    for (uint32_t i = 0; i < o->plane_count; i++)
        for (uint32_t t = 0; t < o->tokens; t++) {
            check_row(&o->planes[i], t);
            for (uint32_t e = 0; e < o->planes[i].heads * o->planes[i].head_dim; e++)
                o->flags[i] |= xkv_is_nonfinite(&o->planes[i], t, e);
        }
}

static void run_halve(const void *args)
{
    const xkv_plug_halve *o = args;

    fake_check(o->high, o->count * o->width * sizeof *o->high);
    fake_check(o->low, o->count * o->width * sizeof *o->low);
    if (o->index)
        fake_check(o->index, o->count * sizeof *o->index);
    for (uint64_t i = 0; i < o->count; i++) {
        fake_check(o->rows + (o->index ? o->index[i] : i) * o->ld, o->width * sizeof *o->rows);
        for (uint64_t c = 0; c < o->width; c++)
            xkv_halve_element(o, i, c);
    }
}

static void run_sums(const void *args)
{
    const xkv_plug_sums *o = args;

    fake_check(o->begins, (o->count + 1) * sizeof *o->begins);
    fake_check(o->rows, ((o->tokens - 1) * o->ld + o->begins[o->count]) * sizeof *o->rows);
    if (o->mean)
        fake_check(o->mean, o->begins[o->count] * sizeof *o->mean);
    for (uint32_t i = 0; i < o->count; i++) {
        fake_check(o->sums + i * o->stride, o->tokens * sizeof *o->sums);
        for (uint32_t t = 0; t < o->tokens; t++)
            xkv_warp_sum_squares(o, i, t);
    }
}

static void run_quantize(const void *args)
{
    const xkv_plug_quantize *o = args;

    for (uint64_t i = 0; i < o->count; i++) {
        fake_check(o->y + i * o->y_stride, o->tokens * sizeof *o->y);
        fake_check(o->q + i * o->q_stride, o->tokens * sizeof *o->q);
        fake_check(o->stats + i * o->stats_stride, sizeof *o->stats);
        xkv_warp_quantize(o, i);
    }
}

static void run_count(const void *args)
{
    const xkv_plug_count *o = args;
    uint32_t held[XKV_COUNT_SHIFTS * XKV_COUNT_BINS];

    fake_check(o->windows, o->count * sizeof *o->windows);
    fake_check(o->counts, o->count * sizeof held);
    for (uint64_t i = 0; i < o->count; i++) {
        fake_check(o->q + i * o->stride, o->tokens * sizeof *o->q);
        for (uint64_t first = 0; first < o->tokens; first += XKV_COUNT_TOKENS)
            xkv_warp_count(o, i, first, held);
    }
}

static void encode_chunk(const xkv_plug_encode *o, uint32_t chunk)
{
    const xkv_plug_span *s = &o->spans[chunk];
    xkv_warp_writer w;

    xkv_warp_write_from(&w, o->words + chunk * o->room, (uint32_t)o->room);
    for (uint32_t i = o->coded; i-- > 0;) {
        fake_check(o->q + o->rows[i] * o->stride + s->column, s->tokens * sizeof *o->q);
        xkv_warp_encode_component(&w, &o->tables[o->codes[i].table], o->codes[i].shift, s->tokens,
                                  o->q + o->rows[i] * o->stride + s->column);
    }
    xkv_warp_write_states(&w, s->tokens < 32 ? s->tokens : 32);
    o->sizes[chunk] = 2 * ((uint32_t)o->room - w.next);
}

static void run_encode(const void *args)
{
    const xkv_plug_encode *o = args;

    fake_check(o->rows, o->coded * sizeof *o->rows);
    fake_check(o->codes, o->coded * sizeof *o->codes);
    fake_check(o->spans, o->count * sizeof *o->spans);
    fake_check(o->sizes, o->count * sizeof *o->sizes);
    fake_check(o->words, o->count * o->room * sizeof *o->words);
    for (uint32_t i = 0; i < o->count; i++)
        encode_chunk(o, i);
}

static void run_round_columns(const void *args)
{
    const xkv_plug_round_columns *o = args;

    fake_check(o->rows, o->count * o->width * sizeof *o->rows);
    fake_check(o->scales, o->width * sizeof *o->scales);
    fake_check(o->out, o->count * o->width * sizeof *o->out);
    memset(o->scales, 0, o->width * sizeof *o->scales);
    for (uint32_t c = 0; c < o->width; c++)
        for (uint64_t i = 0; i < o->count; i += XKV_COLUMN_ROWS) {
            uint32_t bits = xkv_largest_of_column(o, i, c);
            if (bits > xkv_bits_of_float(o->scales[c]))
                o->scales[c] = xkv_float_from_bits(bits);
        }
    for (uint64_t i = 0; i < o->count; i++)
        for (uint32_t c = 0; c < o->width; c++)
            xkv_round_element(o, i, c);
}

FAKE_LAUNCH(gather)
FAKE_LAUNCH(take)
FAKE_LAUNCH(scan)
FAKE_LAUNCH(halve)
FAKE_LAUNCH(sums)
FAKE_LAUNCH(quantize)
FAKE_LAUNCH(count)
FAKE_LAUNCH(encode)
FAKE_LAUNCH(round_columns)
