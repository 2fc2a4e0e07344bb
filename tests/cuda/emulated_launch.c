/* emulated_launch.c - the kernels of kernels/cuda on the CPU: the same elements and warps, counted by loops. */
#include "elements.h"
#include "fake_cuda.h"
#include "launch.h"
#include "warp_sum.h"

/* The spans that the kernels touch are checked before they run. Views are checked element by element. */

static void run_verify(const void *args)
{
    const xkv_plug_verify *o = args;

    fake_check(o->streams, o->count * sizeof *o->streams);
    fake_check(o->fault, sizeof *o->fault);
    for (uint32_t i = 0; i < o->count; i++) {
        const xkv_plug_stream *s = &o->streams[i];
        fake_check(o->packed + s->offset, s->size);
        if (s->size > 0 && xkv_warp_sum_of(o->packed + s->offset, s->size) != s->checksum)
            *o->fault |= XKV_WARP_BAD_SUM;
    }
}

static uint32_t decode_stream(const xkv_plug_decode *o, const xkv_plug_stream *s)
{
    xkv_warp_reader r;
    uint32_t fault = xkv_warp_open(&r, o->packed + s->offset, s->size, s->tokens < 32 ? s->tokens : 32);

    for (uint32_t i = 0; i < o->coded && fault == 0; i++)
        if (!xkv_warp_decode_component(&r, &o->tables[o->codes[i].table], o->codes[i].shift, s->tokens,
                                       o->q + i * o->stride + s->column))
            fault = XKV_WARP_TOO_SHORT;
    return fault != 0 ? fault : xkv_warp_close(&r);
}

static void run_decode(const void *args)
{
    const xkv_plug_decode *o = args;

    fake_check(o->streams, o->count * sizeof *o->streams);
    fake_check(o->codes, o->coded * sizeof *o->codes);
    fake_check(o->fault, sizeof *o->fault);
    for (uint32_t i = 0; i < o->count; i++) {
        const xkv_plug_stream *s = &o->streams[i];
        fake_check(o->packed + s->offset, (s->size + 3ull) & ~3ull);
        fake_check(o->q + s->column, ((o->coded - 1) * o->stride + s->tokens) * sizeof *o->q);
        *o->fault |= decode_stream(o, s);
    }
}

static void run_expand(const void *args)
{
    const xkv_plug_expand *o = args;
    uint64_t elem = o->exact ? 4 : 2, rows = o->copy + o->count;

    fake_check(o->tile, ((rows - 1) * o->stride + o->tokens) * elem);
    fake_check(o->rows, o->count * sizeof *o->rows);
    fake_check(o->fault, sizeof *o->fault);
    for (uint64_t i = 0; i < o->count; i++) {
        fake_check(o->q + (o->rows[i] >> 2) * o->q_stride, o->tokens * sizeof *o->q);
        for (uint64_t t = 0; t < o->tokens; t++)
            *o->fault |= xkv_expand_element(o, i, t);
    }
}

static void run_split(const void *args)
{
    const xkv_plug_split *o = args;
    uint64_t size = o->count * o->width;

    fake_check(o->high, size * (o->exact ? 4 : 2));
    if (!o->exact)
        fake_check(o->low, size * 2);
    if (o->index)
        fake_check(o->index, o->count * sizeof *o->index);
    for (uint64_t i = 0; i < o->count; i++) {
        fake_check(o->rows + (o->index ? o->index[i] : i) * o->width, o->width * sizeof *o->rows);
        for (uint64_t c = 0; c < o->width; c++)
            xkv_split_element(o, i, c);
    }
}

static void run_spread(const void *args)
{
    const xkv_plug_spread *o = args;

    fake_check(o->source, o->width * sizeof *o->source);
    fake_check(o->factor, o->width * sizeof *o->factor);
    fake_check(o->rows, (uint64_t)o->tokens * o->width * sizeof *o->rows);
    for (uint32_t i = 0; i < o->width; i++) {
        if (o->source[i] != XKV_NO_SOURCE)
            fake_check(o->q + o->source[i] * o->q_stride, o->tokens * sizeof *o->q);
        for (uint32_t t = 0; t < o->tokens; t++)
            xkv_spread_element(o, t, i);
    }
}

static void run_angles(const void *args)
{
    const xkv_plug_angles *o = args;

    fake_check(o->positions, o->tokens * sizeof *o->positions);
    fake_check(o->inv_freq, o->pairs * sizeof *o->inv_freq);
    fake_check(o->out, ((o->tokens - 1) * o->stride + 2 * o->pairs) * sizeof *o->out);
    for (uint32_t t = 0; t < o->tokens; t++)
        for (uint32_t i = 0; i < o->pairs; i++)
            xkv_angle_element(o, t, i);
}

/* All elements of a token in a view. */
static void check_row(const xkv_view *v, uint32_t token, uint32_t heads, uint32_t head_dim)
{
    if (v->rows)
        fake_check(&v->rows[token], sizeof *v->rows);
    if (xkv_is_blocks(v->dtype)) {
        for (uint32_t i = 0; i < heads * head_dim / XKV_BLOCK_ELEMENTS; i++)
            fake_check(xkv_view_block(v, head_dim, token, i), v->dtype == XKV_Q8_0 ? 34 : 18);
        return;
    }
    for (uint32_t e = 0; e < heads * head_dim; e++)
        fake_check(xkv_view_element(v, head_dim, token, e), v->dtype == XKV_F32 ? 4 : 2);
}

static void run_store(const void *args)
{
    const xkv_plug_store *o = args;

    fake_check(o->planes, o->plane_count * sizeof *o->planes);
    fake_check(o->rows, o->tokens * o->ld * sizeof *o->rows);
    if (o->mean)
        fake_check(o->mean, o->ld * sizeof *o->mean);
    for (uint32_t i = 0; i < o->plane_count; i++)
        for (uint32_t t = 0; t < o->tokens; t++) {
            const xkv_plug_plane *p = &o->planes[i];
            check_row(&p->view, o->first + t, p->heads, p->head_dim);
            if (p->pairs > 0)
                fake_check(o->angles + t * o->angles_stride + p->angles, 2 * p->pairs * sizeof *o->angles);
            for (uint32_t item = 0; item < xkv_items_of(p, p->heads); item++)
                xkv_store_item(o, p, t, item);
        }
}

static void run_move(const void *args)
{
    const xkv_plug_move *o = args;

    fake_check(o->rows, o->tokens * o->row_bytes);
    for (uint32_t t = 0; t < o->tokens; t++) {
        check_row(&o->view, o->first + t, o->heads, o->head_dim);
        for (uint32_t e = 0; e < xkv_move_items(o); e++)
            xkv_move_element(o, t, e);
    }
}

static void run_join(const void *args)
{
    const xkv_plug_join *o = args;

    fake_check(o->planes, o->rows * o->cols * o->elem);
    fake_check(o->out, o->rows * o->cols * o->elem);
    for (uint64_t r = 0; r < o->rows; r++)
        for (uint64_t c = 0; c < o->cols; c++)
            xkv_join_element(o, r, c);
}

FAKE_LAUNCH(verify)
FAKE_LAUNCH(decode)
FAKE_LAUNCH(expand)
FAKE_LAUNCH(split)
FAKE_LAUNCH(spread)
FAKE_LAUNCH(angles)
FAKE_LAUNCH(store)
FAKE_LAUNCH(move)
FAKE_LAUNCH(join)
