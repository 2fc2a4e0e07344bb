/* elements.h - what one thread does to one element, or to a pair of them: the bodies of the kernels that are no warp's
 * work. The kernels and the emulation on the CPU (tests/cuda) differ in how they count. */
#ifndef XKV_CUDA_ELEMENTS_H
#define XKV_CUDA_ELEMENTS_H

#include "block_element.h"
#include "plugin.h"

#include <stdbool.h>

/* --- Operands ----------------------------------------------------------------------------------------------------- */

/* A part of an integer. */
XKV_ELEMENT int32_t xkv_part_of(int32_t q, uint32_t part)
{
    int32_t high = (((q + 32768 + 128) >> 8) - 128) * 256;

    return part == XKV_OPERAND_WHOLE ? q : part == XKV_OPERAND_HIGH ? high : q - high;
}

/* Element t of row i; what is wrong with it, or 0. */
XKV_ELEMENT uint32_t xkv_expand_element(const xkv_plug_expand *o, uint64_t i, uint64_t t)
{
    uint32_t row = o->rows[i];
    int32_t part = xkv_part_of(o->q[(row >> 2) * o->q_stride + t], row & 3u);
    uint64_t at = i * o->stride + t, copy_at = (i + o->copy) * o->stride + t;

    if (o->exact) {
        ((float *)o->tile)[at] = (float)part;
        return 0;
    }
    uint16_t half = xkv_f16_from_f32((float)part);
    ((uint16_t *)o->tile)[at] = half;
    if (o->copy)
        ((uint16_t *)o->tile)[copy_at] = half;
    return (row & 3u) == XKV_OPERAND_WHOLE && (part > 2048 || part < -2048) ? XKV_WARP_TOO_WIDE : 0;
}

XKV_ELEMENT void xkv_split_element(const xkv_plug_split *o, uint64_t i, uint64_t column)
{
    uint64_t row = o->index ? o->index[i] : i, at = i * o->width + column;
    float x = o->rows[row * o->width + column] * o->factor * o->scale;

    if (o->exact) {
        ((float *)o->high)[at] = x;
        return;
    }
    uint16_t high = xkv_f16_from_f32(x);
    ((uint16_t *)o->high)[at] = high;
    ((uint16_t *)o->low)[at] = xkv_f16_from_f32(x - xkv_f16_to_f32(high));
}

XKV_ELEMENT void xkv_spread_element(const xkv_plug_spread *o, uint64_t t, uint32_t i)
{
    uint32_t source = o->source[i];

    o->rows[t * o->width + i] = source == XKV_NO_SOURCE ? 0 : (float)o->q[source * o->q_stride + t] * o->factor[i];
}

/* --- RoPE and views ----------------------------------------------------------------------------------------------- */

XKV_ELEMENT void xkv_angle_element(const xkv_plug_angles *o, uint64_t t, uint32_t pair)
{
    double c, s;

    xkv_cos_sin_of((double)o->positions[t], o->inv_freq[pair], &c, &s);
    o->out[t * o->stride + pair] = (float)(c * o->scale);
    o->out[t * o->stride + o->pairs + pair] = (float)(s * o->scale);
}

/* Where element `e` of a row is, in a plane whose heads have head_dim elements; the view may split rows elsewhere. */
XKV_ELEMENT uint8_t *xkv_view_element(const xkv_view *v, uint32_t head_dim, uint32_t token, uint32_t e)
{
    int64_t row = v->rows ? (int64_t)v->rows[token] : (int64_t)token;
    uint32_t dims = v->head_dim != 0 ? v->head_dim : head_dim;

    return (uint8_t *)v->data + (row * v->token_stride + e / dims * v->head_stride + e % dims * v->dim_stride);
}

XKV_ELEMENT void xkv_put_element(const xkv_plug_plane *p, uint32_t token, uint32_t e, float x)
{
    uint8_t *at = xkv_view_element(&p->view, p->head_dim, token, e);

    if (p->view.dtype == XKV_F32)
        *(float *)(void *)at = x;
    else
        *(uint16_t *)(void *)at = p->view.dtype == XKV_F16 ? xkv_f16_from_f32(x) : xkv_bf16_from_f32(x);
}

XKV_ELEMENT bool xkv_is_blocks(uint32_t dtype)
{
    return dtype == XKV_Q8_0 || dtype == XKV_Q4_0;
}

/* The work on one token of `heads` heads comes in items: a pair that is rotated, or an element that is not; or a block.
 */
XKV_ELEMENT uint32_t xkv_items_of(const xkv_plug_plane *p, uint32_t heads)
{
    return xkv_is_blocks(p->view.dtype) ? heads * p->head_dim / XKV_BLOCK_ELEMENTS : heads * (p->head_dim - p->pairs);
}

XKV_ELEMENT float xkv_stored_value(const xkv_plug_store *o, uint64_t t, uint32_t column)
{
    float x = o->rows[t * o->ld + column];

    return o->mean ? o->mean[column] + x : x;
}

/* The two dims of a pair. */
XKV_ELEMENT void xkv_pair_dims(const xkv_plug_plane *p, uint32_t pair, uint32_t *i, uint32_t *j)
{
    *i = p->offset + (p->style == XKV_ROPE_INTERLEAVED ? 2 * pair : pair);
    *j = p->style == XKV_ROPE_INTERLEAVED ? *i + 1 : *i + p->pairs;
}

/* The dim of an item of a head that is no pair. */
XKV_ELEMENT uint32_t xkv_unpaired_dim(const xkv_plug_plane *p, uint32_t item)
{
    uint32_t dim = item - p->pairs;

    return dim >= p->offset ? dim + 2 * p->pairs : dim;
}

XKV_ELEMENT void xkv_store_pair(const xkv_plug_store *o, const xkv_plug_plane *p, uint32_t t, uint32_t head,
                                uint32_t pair)
{
    uint32_t i, j, first = head * p->head_dim, column = p->column + first;
    const float *angles = o->angles + t * o->angles_stride + p->angles;
    float c = angles[pair], s = angles[p->pairs + pair], a, b;

    xkv_pair_dims(p, pair, &i, &j);
    a = xkv_stored_value(o, t, column + i);
    b = xkv_stored_value(o, t, column + j);
    xkv_put_element(p, o->first + t, first + i, a * c - b * s);
    xkv_put_element(p, o->first + t, first + j, a * s + b * c);
}

/* Element `e` of a row, rotated. */
XKV_ELEMENT float xkv_rotated_value(const xkv_plug_store *o, const xkv_plug_plane *p, uint32_t t, uint32_t e)
{
    uint32_t head = e / p->head_dim, i = e % p->head_dim - p->offset; /* wraps in front of the rotated ones */
    bool interleaved = p->style == XKV_ROPE_INTERLEAVED;

    if (i >= 2 * p->pairs)
        return xkv_stored_value(o, t, p->column + e);
    uint32_t pair = interleaved ? i / 2 : i % p->pairs, second = interleaved ? i % 2 : i / p->pairs;
    uint32_t at = p->column + head * p->head_dim + p->offset + (interleaved ? 2 * pair : pair);
    const float *angles = o->angles + t * o->angles_stride + p->angles;
    float a = xkv_stored_value(o, t, at), b = xkv_stored_value(o, t, at + (interleaved ? 1 : p->pairs));
    float c = angles[pair], s = angles[p->pairs + pair];

    return second ? a * s + b * c : a * c - b * s;
}

/* Where a block's elements begin in the view; dim_stride is that of blocks. */
XKV_ELEMENT uint8_t *xkv_view_block(const xkv_view *v, uint32_t head_dim, uint32_t token, uint32_t block)
{
    int64_t row = v->rows ? (int64_t)v->rows[token] : (int64_t)token;
    uint32_t dims = v->head_dim != 0 ? v->head_dim : head_dim, e = block * XKV_BLOCK_ELEMENTS;

    return (uint8_t *)v->data +
           (row * v->token_stride + e / dims * v->head_stride + e % dims / XKV_BLOCK_ELEMENTS * v->dim_stride);
}

/* A block of elements, each rounded to 16 bits before. */
XKV_ELEMENT void xkv_put_block(const xkv_plug_plane *p, uint32_t token, uint32_t block, const float *from)
{
    float x[XKV_BLOCK_ELEMENTS];

    for (uint32_t i = 0; i < XKV_BLOCK_ELEMENTS; i++)
        x[i] = p->via == XKV_F16    ? xkv_f16_to_f32(xkv_f16_from_f32(from[i]))
               : p->via == XKV_BF16 ? xkv_float_from_bits((uint32_t)xkv_bf16_from_f32(from[i]) << 16)
                                    : from[i];
    xkv_block_from_f32(p->view.dtype, x, xkv_view_block(&p->view, p->head_dim, token, block));
}

/* Elements, or blocks: how many elements one has. */
XKV_ELEMENT uint32_t xkv_item_size(uint32_t dtype)
{
    return xkv_is_blocks(dtype) ? XKV_BLOCK_ELEMENTS : 1;
}

/* Element, or block, `item` of a row. */
XKV_ELEMENT void xkv_put_item(const xkv_plug_plane *p, uint32_t token, uint32_t item, const float *from)
{
    if (xkv_is_blocks(p->view.dtype))
        xkv_put_block(p, token, item, from);
    else
        xkv_put_element(p, token, item, *from);
}

XKV_ELEMENT void xkv_store_block(const xkv_plug_store *o, const xkv_plug_plane *p, uint32_t t, uint32_t block)
{
    float x[XKV_BLOCK_ELEMENTS];

    for (uint32_t i = 0; i < XKV_BLOCK_ELEMENTS; i++)
        x[i] = xkv_rotated_value(o, p, t, block * XKV_BLOCK_ELEMENTS + i);
    xkv_put_block(p, o->first + t, block, x);
}

XKV_ELEMENT void xkv_store_item(const xkv_plug_store *o, const xkv_plug_plane *p, uint32_t t, uint32_t item)
{
    uint32_t items = p->head_dim - p->pairs, head = item / items, i = item % items;

    if (xkv_is_blocks(p->view.dtype)) {
        xkv_store_block(o, p, t, item);
        return;
    }
    if (i < p->pairs) {
        xkv_store_pair(o, p, t, head, i);
        return;
    }
    uint32_t e = head * p->head_dim + xkv_unpaired_dim(p, i);
    xkv_put_element(p, o->first + t, e, xkv_stored_value(o, t, p->column + e));
}

XKV_ELEMENT uint32_t xkv_move_items(const xkv_plug_move *o)
{
    return o->heads * o->head_dim / xkv_item_size(o->view.dtype);
}

/* Element, or block, `e` of a token. */
XKV_ELEMENT void xkv_move_element(const xkv_plug_move *o, uint32_t t, uint32_t e)
{
    const uint8_t *from = o->rows + t * o->row_bytes + o->column;

    if (xkv_is_blocks(o->view.dtype)) {
        uint8_t *block = xkv_view_block(&o->view, o->head_dim, o->first + t, e);
        uint32_t size = o->view.dtype == XKV_Q8_0 ? 34 : 18;
        for (uint32_t i = 0; i < size; i++)
            block[i] = from[e * size + i];
        return;
    }
    uint8_t *to = xkv_view_element(&o->view, o->head_dim, o->first + t, e);
    if (o->view.dtype == XKV_F32)
        ((uint32_t *)(void *)to)[0] = ((const uint32_t *)(const void *)from)[e];
    else
        ((uint16_t *)(void *)to)[0] = ((const uint16_t *)(const void *)from)[e];
}

/* --- Byte planes -------------------------------------------------------------------------------------------------- */

/* Bytes of the element in row r and column c: planes 0 .. elem-2 in the order of the elements, the highest transposed.
 */
XKV_ELEMENT void xkv_join_element(const xkv_plug_join *o, uint64_t r, uint64_t c)
{
    uint64_t count = o->rows * o->cols, i = r * o->cols + c;
    uint8_t *to = o->out + i * o->elem;

    for (uint32_t b = 0; b + 1 < o->elem; b++)
        to[b] = o->planes[b * count + i];
    to[o->elem - 1] = o->planes[(o->elem - 1) * count + c * o->rows + r];
}

#endif
