/* pack_elements.h - elements.h for packing: the bodies of the kernels that are no warp's work. */
#ifndef XKV_CUDA_PACK_ELEMENTS_H
#define XKV_CUDA_PACK_ELEMENTS_H

#include "elements.h"

XKV_ELEMENT float xkv_bf16_to_f32(uint16_t h)
{
    return xkv_float_from_bits((uint32_t)h << 16);
}

/* --- Views to rows ------------------------------------------------------------------------------------------------ */

XKV_ELEMENT float xkv_get_element(const xkv_plug_plane *p, uint32_t token, uint32_t e)
{
    const uint8_t *at = xkv_view_element(&p->view, p->head_dim, token, e);

    if (p->view.dtype == XKV_F32)
        return *(const float *)(const void *)at;
    uint16_t bits = *(const uint16_t *)(const void *)at;
    return p->view.dtype == XKV_F16 ? xkv_f16_to_f32(bits) : xkv_bf16_to_f32(bits);
}

XKV_ELEMENT void xkv_put_row(const xkv_plug_gather *o, uint64_t t, uint32_t column, float x)
{
    o->rows[t * o->ld + column] = o->mean ? x - o->mean[column] : x;
}

XKV_ELEMENT void xkv_gather_pair(const xkv_plug_gather *o, const xkv_plug_plane *p, uint32_t t, uint32_t head,
                                 uint32_t pair)
{
    uint32_t i, j, first = head * p->head_dim, column = p->column + first;
    const float *angles = o->angles + t * o->angles_stride + p->angles;
    float c = angles[pair], s = angles[p->pairs + pair], a, b;

    xkv_pair_dims(p, pair, &i, &j);
    a = xkv_get_element(p, o->first + t, first + i);
    b = xkv_get_element(p, o->first + t, first + j);
    xkv_put_row(o, t, column + i, a * c + b * s);
    xkv_put_row(o, t, column + j, b * c - a * s);
}

/* Items are those of xkv_items_of(). */
XKV_ELEMENT void xkv_gather_item(const xkv_plug_gather *o, const xkv_plug_plane *p, uint32_t t, uint32_t item)
{
    uint32_t items = p->head_dim - p->pairs, head = item / items, i = item % items;

    if (i < p->pairs) {
        xkv_gather_pair(o, p, t, head, i);
        return;
    }
    uint32_t e = head * p->head_dim + xkv_unpaired_dim(p, i);
    xkv_put_row(o, t, p->column + e, xkv_get_element(p, o->first + t, e));
}

/* Element `e` of a token. */
XKV_ELEMENT void xkv_take_element(const xkv_plug_take *o, uint32_t t, uint32_t e)
{
    const uint8_t *from = xkv_view_element(&o->view, o->head_dim, o->first + t, e);
    uint8_t *to = o->rows + t * o->row_bytes;

    if (o->view.dtype == XKV_F32)
        ((uint32_t *)(void *)to)[e] = ((const uint32_t *)(const void *)from)[0];
    else
        ((uint16_t *)(void *)to)[e] = ((const uint16_t *)(const void *)from)[0];
}

/* Whether element `e` of a token is NaN or infinite. */
XKV_ELEMENT uint32_t xkv_is_nonfinite(const xkv_plug_plane *p, uint32_t t, uint32_t e)
{
    return (xkv_bits_of_float(xkv_get_element(p, t, e)) & 0x7f800000u) == 0x7f800000u;
}

/* --- Operands ----------------------------------------------------------------------------------------------------- */

XKV_ELEMENT void xkv_halve_element(const xkv_plug_halve *o, uint64_t i, uint64_t column)
{
    float x = o->rows[(o->index ? o->index[i] : i) * o->ld + column] * o->factor;
    uint16_t high = xkv_bf16_from_f32(x);

    o->high[i * o->width + column] = high;
    o->low[i * o->width + column] = xkv_bf16_from_f32(x - xkv_bf16_to_f32(high));
}

/* --- Factors ------------------------------------------------------------------------------------------------------ */

/* Rows of which one thread looks at a column. */
#define XKV_COLUMN_ROWS 64u

/* Bits of the largest magnitude among rows `first` and the next ones; those of magnitudes are ordered as they are. */
XKV_ELEMENT uint32_t xkv_largest_of_column(const xkv_plug_round_columns *o, uint64_t first, uint32_t column)
{
    uint32_t most = 0;

    for (uint64_t i = first; i < first + XKV_COLUMN_ROWS && i < o->count; i++) {
        uint32_t bits = xkv_bits_of_float(o->rows[i * o->width + column]) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    return most;
}

XKV_ELEMENT void xkv_round_element(const xkv_plug_round_columns *o, uint64_t i, uint32_t column)
{
    float scale = o->scales[column], x = o->rows[i * o->width + column];

    o->out[i * o->width + column] = xkv_f16_from_f32(scale > 0 ? x / scale : 0);
}

#endif
