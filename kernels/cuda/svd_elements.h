/* svd_elements.h - elements.h for the truncated SVD. */
#ifndef XKV_CUDA_SVD_ELEMENTS_H
#define XKV_CUDA_SVD_ELEMENTS_H

#include "element.h"
#include "plugin.h"

/* One bit of splitmix64. */
XKV_ELEMENT void xkv_sketch_element(const xkv_plug_sketch *o, uint64_t i)
{
    uint64_t z = o->seed + (i + 1) * 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    o->out[i] = (uint16_t)(0x3f80u | (z >> 63) << 15);
}

XKV_ELEMENT void xkv_convert_element(const xkv_plug_convert *o, uint64_t row, uint64_t column)
{
    uint64_t to = row * o->cols + column, from = (o->reversed ? o->rows - 1 - row : row) * o->cols + column;

    if (o->to_f64)
        ((double *)o->to)[to] = (double)((const float *)o->from)[from];
    else
        ((float *)o->to)[to] = (float)((const double *)o->from)[from];
}

XKV_ELEMENT double xkv_unit(const xkv_plug_scale_gram *o, uint64_t i)
{
    double square = o->gram[i * o->n + i];

    return square > 0 ? 1 / sqrt(square) : 0;
}

/* Row `row` of the matrix for row < n, then the rows of z. */
XKV_ELEMENT void xkv_scale_gram_element(const xkv_plug_scale_gram *o, uint64_t row, uint64_t column)
{
    if (row < o->n)
        o->out[row * o->n + column] =
            o->gram[row * o->n + column] * xkv_unit(o, row) * xkv_unit(o, column) + (row == column ? o->shift : 0);
    else
        o->z[(row - o->n) * o->n + column] *= xkv_unit(o, column);
}

#endif
