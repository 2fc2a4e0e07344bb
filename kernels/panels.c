#include "panels.h"

#define ALIGNMENT 64u /* a cache line */
#define LINE      (ALIGNMENT / sizeof(float))

static size_t panel_count(const xkv_panels *p)
{
    return (size_t)xkv_ceil_div(p->cols, p->tile->cols);
}

/* The panel that starts with this column. */
static float *panel_at(const xkv_panels *p, size_t column)
{
    return p->data + column * p->rows;
}

xkv_status xkv_panels_create(xkv_ctx *ctx, const xkv_kernels *k, size_t rows, size_t cols, xkv_panels *p)
{
    *p = (xkv_panels){.tile = &k->panel_tile, .rows = rows, .cols = cols};
    XKV_TRY(XKV_NEW_ZERO(ctx, panel_count(p) * p->tile->cols * rows + LINE, &p->memory));
    p->data = p->memory + (ALIGNMENT - (uintptr_t)p->memory % ALIGNMENT) % ALIGNMENT / sizeof(float);
    return XKV_OK;
}

void xkv_panels_free(xkv_ctx *ctx, xkv_panels *p)
{
    xkv_release(ctx, p->memory);
    *p = (xkv_panels){0};
}

void xkv_panels_set(const xkv_panels *p, size_t first, size_t count, const float *rows)
{
    size_t width = p->tile->cols;

    for (size_t column = 0; column < p->cols; column += width) {
        size_t n = (size_t)xkv_min64(width, p->cols - column);
        float *to = panel_at(p, column) + first * width;
        for (size_t j = 0; j < count; j++)
            memcpy(to + j * width, rows + j * p->cols + column, n * sizeof *to);
    }
}

void xkv_panels_get(const xkv_panels *p, size_t first, size_t count, float *rows)
{
    size_t width = p->tile->cols;

    for (size_t column = 0; column < p->cols; column += width) {
        size_t n = (size_t)xkv_min64(width, p->cols - column);
        const float *from = panel_at(p, column) + first * width;
        for (size_t j = 0; j < count; j++)
            memcpy(rows + j * p->cols + column, from + j * width, n * sizeof *rows);
    }
}

bool xkv_panels_finite(const xkv_panels *p, const xkv_kernels *k)
{
    return k->all_finite(XKV_F32, p->data, panel_count(p) * p->tile->cols * p->rows);
}

static size_t strip_count(size_t m)
{
    return (size_t)xkv_ceil_div(m, XKV_STRIP);
}

size_t xkv_strips_size(size_t m, size_t depth)
{
    return strip_count(m) * XKV_STRIP * depth;
}

void xkv_strips_set(float *strips, size_t depth, size_t k, const float *a, size_t stride, size_t m)
{
    size_t block = k / XKV_DEPTH * XKV_DEPTH, rows = (size_t)xkv_min64(XKV_DEPTH, depth - block), t = 0;
    float *to = strips + xkv_strips_size(m, block) + (k - block) * XKV_STRIP;

    for (; t + XKV_STRIP <= m; t += XKV_STRIP, to += rows * XKV_STRIP)
        for (size_t i = 0; i < XKV_STRIP; i++)
            to[i] = a[(t + i) * stride];
    for (size_t i = 0; t < m && i < XKV_STRIP; i++)
        to[i] = t + i < m ? a[(t + i) * stride] : 0;
}

void xkv_strips_set_rows(float *strips, size_t depth, const float *a, size_t stride, size_t m)
{
    for (size_t k = 0; k < depth; k++)
        xkv_strips_set(strips, depth, k, a + k, stride, m);
}

void xkv_strips_set_token(float *strips, size_t depth, size_t t, const float *a)
{
    float *to = strips + t / XKV_STRIP * depth * XKV_STRIP + t % XKV_STRIP;

    for (size_t k = 0; k < depth; k++)
        to[k * XKV_STRIP] = a[k];
}

/* --- Products ----------------------------------------------------------------------------------------------------- */

/* Components [k, k + depth) of a product, for the panel whose columns [skip, skip + cols) c has. */
typedef struct block {
    const xkv_panels *b;
    const uint32_t *pick;
    size_t k, depth;
    const float *strips, *panel;
    size_t skip, cols;
    const float *next; /* the panel that is multiplied next, with components [next_k, next_k + next_depth) */
    size_t next_k, next_depth;
} block;

/* Strip s of `strips`, of which `rows` rows matter. A basis is larger than the caches: while a block of a panel is
 * multiplied, each strip has its share of the next one fetched. */
static xkv_tile_product strip_product(const block *b, size_t s, size_t strips, size_t rows)
{
    size_t from = b->next_depth * s / strips, to = b->next_depth * (s + 1) / strips;

    return (xkv_tile_product){.rows = rows,
                              .depth = b->depth,
                              .a = b->strips + s * b->depth * XKV_STRIP,
                              .b = b->panel,
                              .pick = b->pick + b->k,
                              .next = b->next,
                              .next_pick = b->pick + b->next_k + from,
                              .next_count = to - from};
}

/* A tile that reaches over the sums that are asked for. */
static void add_edge(const block *b, xkv_tile_product *p, float *c, size_t ldc)
{
    float sums[XKV_STRIP * XKV_MAX_PANEL] = {0};

    p->c = sums;
    p->ldc = b->b->tile->cols;
    b->b->tile->add(p);
    for (size_t i = 0; i < p->rows; i++)
        for (size_t j = 0; j < b->cols; j++)
            c[i * ldc + j] += sums[i * p->ldc + b->skip + j];
}

static void multiply_block(const block *b, size_t m, float *c, size_t ldc)
{
    for (size_t row = 0; row < m; row += XKV_STRIP, c += XKV_STRIP * ldc) {
        xkv_tile_product p = strip_product(b, row / XKV_STRIP, strip_count(m), (size_t)xkv_min64(XKV_STRIP, m - row));
        if (p.rows < XKV_STRIP || b->cols < b->b->tile->cols) {
            add_edge(b, &p, c, ldc);
            continue;
        }
        p.c = c;
        p.ldc = ldc;
        b->b->tile->add(&p);
    }
}

void xkv_multiply_panels(size_t m, size_t depth, const float *strips, const xkv_panels *b, const uint32_t *pick,
                         size_t first, size_t count, float *c, size_t ldc)
{
    size_t width = b->tile->cols, end = first + count;

    for (size_t at = first / width * width; at < end; at += width) {
        size_t from = (size_t)xkv_max64(at, first), to = (size_t)xkv_min64(at + width, end);
        block p = {.b = b, .pick = pick, .panel = panel_at(b, at), .skip = from - at, .cols = to - from};
        for (size_t k = 0; k < depth; k += XKV_DEPTH) {
            p.k = k;
            p.depth = (size_t)xkv_min64(XKV_DEPTH, depth - k);
            p.strips = strips + xkv_strips_size(m, k);
            p.next_k = k + p.depth < depth ? k + p.depth : 0;
            p.next_depth = p.next_k > 0 || at + width < end ? (size_t)xkv_min64(XKV_DEPTH, depth - p.next_k) : 0;
            p.next = p.next_k > 0 ? p.panel : panel_at(b, at + width);
            multiply_block(&p, m, c + (from - first), ldc);
        }
    }
}
