/* attend_block.h - attention over held rows (plugin_attend.h): what a block does in each of its kernels. */
#ifndef XKV_CUDA_ATTEND_BLOCK_H
#define XKV_CUDA_ATTEND_BLOCK_H

#include "block.h"
#include "elements.h"

/* Slots that are multiplied at a time, and tokens and elements of which one item takes the products. */
#define XKV_PANEL_SLOTS  32u
#define XKV_PANEL_SQUARE 4u
/* Threads that share the slots of an output's element. */
#define XKV_OUTPUT_PARTS 8u

/* --- Elements ----------------------------------------------------------------------------------------------------- */

XKV_ELEMENT float xkv_element_of(uint32_t dtype, const uint8_t *data, uint64_t i)
{
    if (dtype == XKV_F32)
        return ((const float *)(const void *)data)[i];
    uint16_t bits = ((const uint16_t *)(const void *)data)[i];
    return dtype == XKV_F16 ? xkv_f16_to_f32(bits) : xkv_float_from_bits((uint32_t)bits << 16);
}

/* Token t of a line, times its scale; 0 without one. */
XKV_ELEMENT float xkv_line_value(const xkv_held_tile *tile, uint32_t line, uint32_t t)
{
    if (line == XKV_NO_SOURCE)
        return 0;
    const xkv_held_line *l = &tile->lines[line];
    const uint8_t *data = tile->data + l->at;
    uint64_t i = (uint64_t)tile->from + t;

    if (l->bytes == 1)
        return (float)((const int8_t *)data)[i] * l->scale;
    return (float)((const int16_t *)(const void *)data)[i] * l->scale;
}

/* Coefficient of a slot, of those that the plane has. */
XKV_ELEMENT float xkv_held_coefficient(const xkv_held_plane *p, const xkv_held_tile *tile, uint32_t slot, uint32_t t)
{
    if (p->form == XKV_HELD_LINES)
        return xkv_line_value(tile, p->line[slot], t);
    return xkv_element_of(XKV_F16, tile->data, ((uint64_t)tile->from + t) * p->slots + slot);
}

/* Element e of a row without what slots add to it. */
XKV_ELEMENT float xkv_held_element(const xkv_held_plane *p, const xkv_held_tile *tile, uint32_t t, uint32_t e)
{
    if (p->form == XKV_HELD_ROWS)
        return xkv_element_of(p->dtype, tile->data, ((uint64_t)tile->from + t) * p->width + e);
    float mean = p->mean ? p->mean[p->column + e] : 0;
    return p->form == XKV_HELD_DIAGONAL ? mean + xkv_line_value(tile, p->line[e], t) * p->factor[e] : mean;
}

/* --- Scores of a tile --------------------------------------------------------------------------------------------- */

/* Floats that the kernel of the scores shares: rows of K, one float longer than they are so that neighbouring tokens
 * lie in different banks, and a panel of coefficients. */
XKV_ELEMENT uint32_t xkv_score_row(const xkv_plug_attend *o)
{
    return o->dim_k[0] + o->dim_k[1] + 1;
}

XKV_ELEMENT uint32_t xkv_score_shared(const xkv_plug_attend *o)
{
    return XKV_HELD_TOKENS * xkv_score_row(o) + XKV_PANEL_SLOTS * XKV_HELD_TOKENS;
}

/* Add the products of a panel [slots][XKV_HELD_TOKENS] to a square of x: tokens t .., elements e .. of a head. */
XKV_ELEMENT void xkv_add_square(const xkv_held_plane *p, const float *panel, uint32_t slot, uint32_t slots,
                                uint32_t first, uint32_t dim, uint32_t t, uint32_t e, float *x, uint32_t ld)
{
    float sums[XKV_PANEL_SQUARE][XKV_PANEL_SQUARE] = {{0}};

    for (uint32_t s = 0; s < slots; s++) {
        const float *row = p->basis + p->row[slot + s] * p->ld + p->column + first;
        for (uint32_t j = 0; j < XKV_PANEL_SQUARE; j++) {
            float b = e + j < dim ? row[e + j] : 0;
            for (uint32_t i = 0; i < XKV_PANEL_SQUARE; i++)
                sums[i][j] = XKV_MULTIPLY_ADD(panel[s * XKV_HELD_TOKENS + t + i], b, sums[i][j]);
        }
    }
    for (uint32_t i = 0; i < XKV_PANEL_SQUARE; i++)
        for (uint32_t j = 0; j < XKV_PANEL_SQUARE && e + j < dim; j++)
            x[(t + i) * ld + e + j] += sums[i][j];
}

XKV_ELEMENT void xkv_rotate_pair(const xkv_held_plane *p, const float *angles, uint32_t pair, float *x)
{
    uint32_t i = p->offset + (p->style == XKV_ROPE_INTERLEAVED ? 2 * pair : pair);
    uint32_t j = p->style == XKV_ROPE_INTERLEAVED ? i + 1 : i + p->pairs;
    float a = x[i], b = x[j], c = angles[pair], s = angles[p->pairs + pair];

    x[i] = a * c - b * s;
    x[j] = a * s + b * c;
}

/* Rows x [count][ld] of one head, elements first .. first + dim - 1 of the plane's, rotated. `angles`: of row 0. */
XKV_BLOCK void xkv_make_rows(const xkv_held_plane *p, const xkv_held_tile *tile, uint32_t first, uint32_t dim,
                             const float *angles, uint64_t angles_stride, float *x, uint32_t ld, float *panel)
{
    uint32_t across = (dim + XKV_PANEL_SQUARE - 1) / XKV_PANEL_SQUARE;

    XKV_EACH_ITEM(i, XKV_HELD_TOKENS * dim)
    x[i / dim * ld + i % dim] = i / dim < tile->count ? xkv_held_element(p, tile, i / dim, first + i % dim) : 0;
    XKV_TOGETHER();
    for (uint32_t slot = 0; slot < p->slots; slot += XKV_PANEL_SLOTS) {
        uint32_t n = p->slots - slot < XKV_PANEL_SLOTS ? p->slots - slot : XKV_PANEL_SLOTS;
        XKV_EACH_ITEM(i, n * XKV_HELD_TOKENS)
        {
            uint32_t t = i % XKV_HELD_TOKENS;
            panel[i] = t < tile->count ? xkv_held_coefficient(p, tile, slot + i / XKV_HELD_TOKENS, t) : 0;
        }
        XKV_TOGETHER();
        XKV_EACH_ITEM(i, XKV_HELD_TOKENS / XKV_PANEL_SQUARE * across)
        xkv_add_square(p, panel, slot, n, first, dim, i / across * XKV_PANEL_SQUARE, i % across * XKV_PANEL_SQUARE, x,
                       ld);
        XKV_TOGETHER();
    }
    XKV_EACH_ITEM(i, tile->count * p->pairs)
    xkv_rotate_pair(p, angles + (tile->row + i / p->pairs) * angles_stride, i % p->pairs, x + i / p->pairs * ld);
    XKV_TOGETHER();
}

XKV_BLOCK void xkv_make_keys(const xkv_plug_attend *o, uint32_t part, uint32_t number, uint32_t head, float *x,
                             uint32_t ld, float *panel)
{
    const xkv_held_tile *tile = &o->keys[part][number];

    xkv_make_rows(&o->planes[tile->plane], tile, head * o->dim_k[part], o->dim_k[part], o->angles + o->angles_at[part],
                  o->angles_stride, x, ld, panel);
}

XKV_ELEMENT bool xkv_sees(const xkv_plug_attend *o, uint32_t query, uint32_t row)
{
    int64_t distance = o->causal ? (int64_t)o->query_positions[query / o->group] - o->positions[row] : 0;

    return !o->causal || (distance >= 0 && (o->window == 0 || distance < (int64_t)o->window));
}

/* The score of a query and a row x of K. */
XKV_ELEMENT float xkv_score(const xkv_plug_attend *o, uint32_t head, uint32_t query, const float *x)
{
    const float *q = (const float *)(const void *)(o->queries + query / o->group * o->query_stride +
                                                   ((int64_t)head * o->group + query % o->group) * o->head_stride);
    float sum = 0;

    for (uint32_t d = 0; d < o->dim_k[0] + o->dim_k[1]; d++)
        sum = XKV_MULTIPLY_ADD(q[d] * o->scale, x[d], sum);
    return o->softcap > 0 ? o->softcap * tanhf(sum / o->softcap) : sum;
}

XKV_ELEMENT uint64_t xkv_query_of(const xkv_plug_attend *o, uint32_t head, uint32_t r)
{
    return (uint64_t)head * o->count + r;
}

/* A block: one tile, one KV head. Rows that no query sees are not even rebuilt. */
XKV_BLOCK void xkv_block_scores(const xkv_plug_attend *o, uint32_t number, uint32_t head, float *shared)
{
    const xkv_held_tile *tile = &o->keys[0][number];
    uint32_t ld = xkv_score_row(o);
    float *x = shared, *panel = shared + XKV_HELD_TOKENS * ld;
    uint32_t pairs = tile->count * o->count, seen;

    XKV_EACH_ITEM(i, XKV_BLOCK_PARTS)
    panel[i] = 0;
    XKV_TOGETHER();
    XKV_EACH_ITEM(i, pairs)
    if (xkv_sees(o, o->first + i / tile->count, tile->row + i % tile->count))
        panel[0] = 1; /* whoever writes it, it is the same */
    XKV_TOGETHER();
    seen = panel[0] != 0;
    XKV_TOGETHER();
    if (seen) {
        xkv_make_keys(o, 0, number, head, x, ld, panel);
        if (o->dim_k[1] > 0)
            xkv_make_keys(o, 1, number, head, x + o->dim_k[0], ld, panel);
    }
    XKV_EACH_ITEM(i, pairs)
    {
        uint32_t r = i / tile->count, t = i % tile->count;
        o->scores[xkv_query_of(o, head, r) * o->rows + tile->row + t] =
            seen && xkv_sees(o, o->first + r, tile->row + t) ? xkv_score(o, head, o->first + r, x + t * ld) : -INFINITY;
    }
}

/* --- Weights of a split ------------------------------------------------------------------------------------------- */

/* A block: one split, one query. Scores become exp(score - largest). `partial` [XKV_BLOCK_PARTS] is shared. */
XKV_BLOCK void xkv_block_weights(const xkv_plug_attend *o, uint32_t number, uint64_t query, float *partial)
{
    const xkv_held_split *split = &o->splits[number];
    uint64_t at = (uint64_t)number * o->kv_heads * o->count + query;
    float *scores = o->scores + query * o->rows, largest;

    XKV_EACH_ITEM(i, XKV_BLOCK_PARTS)
    {
        float most = -INFINITY;
        for (uint32_t row = split->first_row + i; row < split->end_row; row += XKV_BLOCK_PARTS)
            most = scores[row] > most ? scores[row] : most;
        partial[i] = most;
    }
    xkv_block_largest(partial);
    largest = partial[0];
    XKV_TOGETHER();
    XKV_EACH_ITEM(i, XKV_BLOCK_PARTS)
    {
        float sum = 0;
        for (uint32_t row = split->first_row + i; row < split->end_row; row += XKV_BLOCK_PARTS) {
            float x = scores[row]; /* a NaN stays */
            scores[row] = x == -INFINITY ? 0 : expf(x - (largest == -INFINITY ? 0 : largest));
            sum += scores[row];
        }
        partial[i] = sum;
    }
    xkv_block_sum(partial);
    XKV_EACH_ITEM(i, 1)
    {
        o->largest[at] = largest;
        o->sums[at] = partial[0];
    }
}

/* --- Weighted values of a split ----------------------------------------------------------------------------------- */

XKV_ELEMENT uint32_t xkv_value_columns(const xkv_plug_attend *o)
{
    return o->slots + o->dim_v + 1;
}

/* Token t in a column: a coefficient, an element of a row that has no slots, or 1 where it has. */
XKV_ELEMENT float xkv_value_of(const xkv_plug_attend *o, const xkv_held_plane *p, const xkv_held_tile *tile,
                               uint32_t head, uint32_t column, uint32_t t)
{
    if (column < o->slots)
        return column < p->slots ? xkv_held_coefficient(p, tile, column, t) : 0;
    if (column == o->slots + o->dim_v)
        return p->slots > 0 ? 1 : 0;
    return p->slots > 0 ? 0 : xkv_held_element(p, tile, t, head * o->dim_v + (column - o->slots));
}

/* One column of a split, for all queries of a KV head. */
XKV_ELEMENT void xkv_value_column(const xkv_plug_attend *o, uint32_t number, uint32_t head, uint32_t column)
{
    const xkv_held_split *split = &o->splits[number];
    const float *weights = o->scores + xkv_query_of(o, head, 0) * o->rows;
    float sums[XKV_ATTEND_QUERIES] = {0};

    for (uint32_t i = split->first_tile; i < split->end_tile; i++) {
        const xkv_held_tile *tile = &o->values[i];
        const xkv_held_plane *p = &o->planes[tile->plane];
        for (uint32_t t = 0; t < tile->count; t++) {
            float x = xkv_value_of(o, p, tile, head, column, t);
            for (uint32_t r = 0; r < XKV_ATTEND_QUERIES; r++)
                if (r < o->count)
                    sums[r] = XKV_MULTIPLY_ADD(weights[(uint64_t)r * o->rows + tile->row + t], x, sums[r]);
        }
    }
    for (uint32_t r = 0; r < XKV_ATTEND_QUERIES; r++)
        if (r < o->count)
            o->parts[((uint64_t)number * o->kv_heads * o->count + xkv_query_of(o, head, r)) * xkv_value_columns(o) +
                     column] = sums[r];
}

/* --- Output ------------------------------------------------------------------------------------------------------- */

/* Floats that its kernel shares. */
XKV_ELEMENT uint32_t xkv_output_shared(const xkv_plug_attend *o)
{
    return XKV_BLOCK_PARTS + XKV_OUTPUT_PARTS * o->dim_v;
}

/* What a split's sums are multiplied with when `largest` is that of all. */
XKV_ELEMENT float xkv_split_factor(const xkv_plug_attend *o, uint32_t number, uint64_t query, float largest)
{
    float own = o->largest[(uint64_t)number * o->kv_heads * o->count + query];

    return own == -INFINITY ? 0 : expf(own - largest);
}

/* Splits [begin, end), all of one entry: sums of their parts, then what these are in the plane's basis, a share of the
 * slots each. */
XKV_BLOCK void xkv_add_splits(const xkv_plug_attend *o, uint32_t begin, uint32_t end, uint64_t query, float largest,
                              float *shares)
{
    const xkv_held_plane *p = &o->planes[o->value_planes[o->splits[begin].entry]];
    uint32_t columns = xkv_value_columns(o), first = (uint32_t)(query / o->count) * o->dim_v;
    float *merged = o->merged + query * columns;

    XKV_EACH_ITEM(c, columns)
    {
        float sum = 0;
        for (uint32_t s = begin; s < end; s++) {
            uint64_t at = (uint64_t)s * o->kv_heads * o->count + query;
            if (o->sums[at] != 0)
                sum += xkv_split_factor(o, s, query, largest) * o->parts[at * columns + c];
        }
        merged[c] = sum;
    }
    XKV_TOGETHER();
    XKV_EACH_ITEM(i, XKV_OUTPUT_PARTS * o->dim_v)
    {
        uint32_t share = i / o->dim_v, e = i % o->dim_v, column = p->column + first + e;
        float sum = 0;
        for (uint32_t s = share; s < p->slots; s += XKV_OUTPUT_PARTS)
            sum = XKV_MULTIPLY_ADD(merged[s], p->basis[p->row[s] * p->ld + column], sum);
        if (share == 0)
            sum += merged[o->slots + e] + (p->mean && p->slots > 0 ? merged[columns - 1] * p->mean[column] : 0);
        shares[i] += sum;
    }
    XKV_TOGETHER();
}

/* A block: one query of a KV head, out of kv_heads * count. */
XKV_BLOCK void xkv_block_output(const xkv_plug_attend *o, uint64_t query, float *shared)
{
    uint32_t head = (uint32_t)(query / o->count), r = o->first + (uint32_t)(query % o->count);
    uint64_t out = (uint64_t)(r / o->group) * o->kv_heads * o->group + (uint64_t)head * o->group + r % o->group;
    float *partial = shared, *shares = shared + XKV_BLOCK_PARTS, largest, total;

    XKV_EACH_ITEM(i, XKV_OUTPUT_PARTS * o->dim_v)
    shares[i] = 0;
    XKV_EACH_ITEM(i, XKV_BLOCK_PARTS)
    {
        partial[i] = -INFINITY;
        for (uint32_t s = i; s < o->split_count; s += XKV_BLOCK_PARTS) {
            float own = o->largest[(uint64_t)s * o->kv_heads * o->count + query];
            partial[i] = own > partial[i] ? own : partial[i];
        }
    }
    xkv_block_largest(partial);
    largest = partial[0];
    XKV_TOGETHER();
    XKV_EACH_ITEM(i, XKV_BLOCK_PARTS)
    {
        partial[i] = 0;
        for (uint32_t s = i; s < o->split_count; s += XKV_BLOCK_PARTS) {
            float sum = o->sums[(uint64_t)s * o->kv_heads * o->count + query];
            if (sum != 0)
                partial[i] += sum == sum ? xkv_split_factor(o, s, query, largest) * sum : sum;
        }
    }
    xkv_block_sum(partial);
    total = partial[0];
    for (uint32_t begin = 0, end; begin < o->split_count; begin = end) {
        for (end = begin + 1; end < o->split_count && o->splits[end].entry == o->splits[begin].entry;)
            end++;
        xkv_add_splits(o, begin, end, query, largest, shares);
    }
    XKV_EACH_ITEM(e, o->dim_v)
    {
        float sum = 0;
        for (uint32_t i = 0; i < XKV_OUTPUT_PARTS; i++)
            sum += shares[i * o->dim_v + e];
        o->output[out * o->dim_v + e] = total == 0 ? 0 : sum / total;
    }
    XKV_EACH_ITEM(i, 1)
    o->lse[out] = total == 0 ? -INFINITY : largest + logf(total);
}

/* --- Restoring ---------------------------------------------------------------------------------------------------- */

XKV_ELEMENT uint32_t xkv_restore_shared(const xkv_plug_restore *o)
{
    return XKV_HELD_TOKENS * (o->to.head_dim + 1) + XKV_PANEL_SLOTS * XKV_HELD_TOKENS;
}

/* A block: one tile, one head. */
XKV_BLOCK void xkv_block_restore(const xkv_plug_restore *o, uint32_t number, uint32_t head, float *shared)
{
    const xkv_held_tile *tile = &o->tiles[number];
    uint32_t dim = o->to.head_dim, ld = dim + 1, items = dim / xkv_item_size(o->to.view.dtype);

    xkv_make_rows(&o->planes[tile->plane], tile, head * dim, dim, o->angles, o->angles_stride, shared, ld,
                  shared + XKV_HELD_TOKENS * ld);
    XKV_EACH_ITEM(i, tile->count * items)
    xkv_put_item(&o->to, tile->row + i / items, head * items + i % items,
                 shared + i / items * ld + i % items * xkv_item_size(o->to.view.dtype));
}

/* --- Merging ------------------------------------------------------------------------------------------------------ */

/* A block: one row. `partial` [2] is shared. */
XKV_BLOCK void xkv_block_merge(const xkv_plug_merge *o, uint64_t row, float *partial)
{
    XKV_EACH_ITEM(i, 1)
    {
        float largest = -INFINITY;
        for (uint32_t s = 0; s < o->count; s++)
            largest = o->lses[s][row] > largest ? o->lses[s][row] : largest;
        partial[0] = largest;
    }
    XKV_TOGETHER();
    XKV_EACH_ITEM(d, o->dim + 1)
    { /* the last one is the sum of the weights */
        float sum = 0, total = 0;
        for (uint32_t s = 0; s < o->count; s++) {
            float lse = o->lses[s][row], weight = lse == -INFINITY ? 0 : expf(lse - partial[0]);
            total += weight;
            if (weight != 0 && d < o->dim)
                sum += weight * o->outputs[s][row * o->dim + d];
        }
        if (d < o->dim)
            o->output[row * o->dim + d] = total == 0 ? 0 : sum / total;
        else
            partial[1] = total == 0 ? -INFINITY : partial[0] + logf(total);
    }
    XKV_TOGETHER();
    XKV_EACH_ITEM(i, 1)
    o->lse[row] = partial[1];
}

#endif
