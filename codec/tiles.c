#include "tiles.h"

#include "dict.h"
#include "parts.h"

#include <math.h>

/* Tables from this rung on are for integers that rarely all fit into 8 bits: their deviation is 32 and more. */
#define WIDE_RUNG 32u

/* --- Rows of the asked planes ------------------------------------------------------------------------------------- */

static xkv_status set_offsets(xkv_ctx *ctx, const uint8_t *asked, xkv_tile_group *t)
{
    const xkv_geometry *geometry = &t->reader.entry->c.geometry;
    const xkv_group *g = t->reader.g;

    XKV_TRY(XKV_NEW(ctx, g->plane_count, &t->offsets));
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[g->planes[i]];
        t->offsets[i] = XKV_NO_LINE;
        if (!asked[g->planes[i]])
            continue;
        t->offsets[i] = t->row_bytes;
        t->row_bytes += (uint32_t)xkv_dtype_bytes(p->dtype, xkv_plane_width(p));
    }
    return XKV_OK;
}

/* Whole rows of the group to those of the asked planes. */
static void take_columns(const xkv_tile_group *t, const uint8_t *rows, size_t count, uint8_t *out)
{
    const xkv_geometry *geometry = &t->reader.entry->c.geometry;
    const xkv_group *g = t->reader.g;

    for (size_t k = 0; k < count; k++)
        for (uint32_t i = 0; i < g->plane_count; i++) {
            const xkv_plane *p = &geometry->planes[g->planes[i]];
            size_t bytes = (size_t)xkv_dtype_bytes(p->dtype, xkv_plane_width(p));
            if (t->offsets[i] != XKV_NO_LINE)
                memcpy(out + k * t->row_bytes + t->offsets[i], rows, bytes);
            rows += bytes;
        }
}

static xkv_status load_exact(xkv_ctx *ctx, xkv_tile_group *t)
{
    const xkv_container *c = &t->reader.entry->c;
    size_t count = (size_t)c->sinks + c->window;
    uint8_t *rows = NULL;
    xkv_status status = XKV_OK;

    if (count == 0 || t->form == XKV_BLOCK_ROWS)
        return XKV_OK;
    XKV_TRY(xkv_read_exact_rows(&t->reader, &rows));
    XKV_TRY_GOTO(XKV_NEW(ctx, count * t->row_bytes, &t->exact), out);
    take_columns(t, rows, count, t->exact);
out:
    xkv_release(ctx, rows);
    return status;
}

/* --- Slots -------------------------------------------------------------------------------------------------------- */

/* The leading components, and all others that are coded. */
static xkv_status make_slots(xkv_ctx *ctx, xkv_tile_group *t)
{
    uint32_t rank = t->reader.g->rank;

    t->slots = t->form == XKV_BLOCK_FACTORS ? rank : t->lines;
    XKV_TRY(XKV_NEW(ctx, t->slots, &t->component));
    for (uint32_t i = 0; i < t->top; i++)
        t->component[i] = i;
    for (uint32_t j = 0, slot = t->top; j < rank; j++)
        if (t->form == XKV_BLOCK_FACTORS || t->reader.side.tables[j] != 0)
            t->component[slot++] = j;
    return XKV_OK;
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

static xkv_status open_integers(xkv_ctx *ctx, xkv_tile_group *t)
{
    t->form = XKV_BLOCK_INTEGERS;
    t->top = xkv_group_uses_cross(&t->reader) ? t->reader.transform.top : 0;
    t->lines = t->top + t->reader.side.coded;
    t->basis = t->reader.transform.basis;
    t->mean = t->reader.transform.mean;
    return make_slots(ctx, t);
}

static xkv_status open_factors(xkv_ctx *ctx, xkv_tile_group *t)
{
    t->form = XKV_BLOCK_FACTORS;
    t->basis = &t->reader.components;
    return make_slots(ctx, t);
}

/* Elements of the asked planes have a line, where they are coded. */
static xkv_status open_diagonal(xkv_ctx *ctx, const uint8_t *asked, xkv_tile_group *t)
{
    const xkv_group *g = t->reader.g;
    uint32_t coded = 0, element = 0;

    t->form = XKV_BLOCK_DIAGONAL;
    t->mean = t->reader.transform.mean;
    XKV_TRY(XKV_NEW(ctx, t->reader.side.coded, &t->line_of));
    XKV_TRY(XKV_NEW(ctx, t->reader.side.coded, &t->component));
    for (uint32_t i = 0; i < g->plane_count; i++) {
        uint32_t end = element + xkv_plane_width(&t->reader.entry->c.geometry.planes[g->planes[i]]);
        for (; element < end; element++) {
            if (t->reader.side.tables[element] == 0)
                continue;
            t->line_of[coded] = asked[g->planes[i]] ? t->lines : XKV_NO_LINE;
            if (asked[g->planes[i]])
                t->component[t->lines++] = element;
            coded++;
        }
    }
    return XKV_OK;
}

static xkv_status open_form(xkv_ctx *ctx, const uint8_t *asked, xkv_tile_group *t)
{
    switch (t->reader.g->codec) {
    case XKV_GROUP_LOSSLESS:
        t->form = XKV_BLOCK_ROWS;
        return XKV_OK;
    case XKV_GROUP_SVD:
        return open_factors(ctx, t);
    case XKV_GROUP_SCALAR:
        return open_diagonal(ctx, asked, t);
    default:
        return open_integers(ctx, t);
    }
}

xkv_status xkv_tile_group_open(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, xkv_cross_stage *cross,
                               const uint8_t *asked, xkv_tile_group *t)
{
    xkv_status status = XKV_OK;

    *t = (xkv_tile_group){0};
    XKV_TRY(xkv_group_reader_open(ctx, entry, g, cross, &t->reader));
    XKV_TRY_GOTO(set_offsets(ctx, asked, t), out);
    XKV_TRY_GOTO(open_form(ctx, asked, t), out);
    XKV_TRY_GOTO(load_exact(ctx, t), out);
    return XKV_OK;
out:
    xkv_tile_group_close(ctx, t);
    return status;
}

void xkv_tile_group_close(xkv_ctx *ctx, xkv_tile_group *t)
{
    if (t->reader.g)
        xkv_group_reader_close(&t->reader);
    xkv_release(ctx, t->offsets);
    xkv_release(ctx, t->exact);
    xkv_release(ctx, t->line_of);
    xkv_release(ctx, t->component);
    *t = (xkv_tile_group){0};
}

/* --- Loading blocks ----------------------------------------------------------------------------------------------- */

static size_t chunk_tokens(const xkv_tile_group *t)
{
    return (size_t)xkv_min64(t->reader.entry->c.chunk_tokens, t->reader.entry->c.geometry.token_count);
}

/* Bytes that a block of so many tokens is expected to take. */
static size_t expected_size(const xkv_tile_group *t, size_t tokens)
{
    const xkv_side *side = &t->reader.side;
    size_t bytes = 2 * tokens * t->top;

    if (t->form == XKV_BLOCK_ROWS)
        return tokens * t->row_bytes;
    if (t->form == XKV_BLOCK_FACTORS)
        return 2 * tokens * t->slots;
    for (uint32_t i = 0; i < side->coded; i++)
        if (!t->line_of || t->line_of[i] != XKV_NO_LINE)
            bytes += tokens * ((side->coded_tables[i] - 1u) % XKV_TABLE_RUNGS >= WIDE_RUNG ? 2 : 1) + 1;
    return bytes;
}

uint64_t xkv_block_expected_bytes(const xkv_tile_group *t)
{
    return expected_size(t, chunk_tokens(t)) + t->lines * sizeof(xkv_line);
}

uint64_t xkv_block_bytes(const xkv_tile_group *t, const xkv_block *b)
{
    return b->size + (b->lines ? t->lines * sizeof *b->lines : 0);
}

size_t xkv_block_panel(const xkv_tile_group *t)
{
    return t->top > 0 ? XKV_ATTEND_LINES * chunk_tokens(t) : 0;
}

xkv_status xkv_block_scratch_create(xkv_ctx *ctx, const xkv_tile_group *t, float *panel, xkv_block_scratch *s)
{
    size_t tokens = chunk_tokens(t);

    *s = (xkv_block_scratch){.ctx = ctx, .group = t, .reader = t->reader, .panel = panel};
    s->reader.ctx = ctx;
    XKV_TRY(xkv_chunk_scratch_size(&s->reader, false, &s->chunk));
    if (t->form == XKV_BLOCK_FACTORS) /* which are used where they were read to */
        return XKV_OK;
    s->capacity = (size_t)xkv_max64(expected_size(t, tokens), sizeof(float) * tokens * t->top);
    XKV_TRY(XKV_NEW(ctx, s->capacity, &s->memory));
    XKV_TRY(XKV_NEW_ZERO(ctx, t->lines, &s->lines));
    return XKV_NEW(ctx, tokens, &s->q);
}

void xkv_block_scratch_free(xkv_block_scratch *s)
{
    if (!s->ctx)
        return;
    xkv_chunk_scratch_free(s->ctx, &s->chunk);
    xkv_release(s->ctx, s->q);
    xkv_release(s->ctx, s->memory);
    xkv_release(s->ctx, s->lines);
    *s = (xkv_block_scratch){0};
}

/* Room for `size` more bytes. */
static xkv_status reserve(xkv_block_scratch *s, size_t size)
{
    size_t capacity = s->used + size + s->capacity / 8;
    uint8_t *memory = NULL;

    if (size <= s->capacity - s->used)
        return XKV_OK;
    XKV_TRY(XKV_NEW(s->ctx, capacity, &memory));
    if (s->used > 0)
        memcpy(memory, s->memory, s->used);
    xkv_release(s->ctx, s->memory);
    s->memory = memory;
    s->capacity = capacity;
    return XKV_OK;
}

static bool fits_8_bits(const int16_t *q, uint32_t n)
{
    uint32_t over = 0;

    for (uint32_t i = 0; i < n; i++)
        over |= (uint32_t)((uint16_t)(q[i] + 128) > 255);
    return over == 0;
}

/* Line i of the group's own. */
static xkv_status take_own(void *user, uint32_t i, const int16_t *q)
{
    xkv_block_scratch *s = user;
    const xkv_tile_group *t = s->group;
    uint32_t line = t->line_of ? t->line_of[i] : t->top + i;
    bool narrow = fits_8_bits(q, s->tokens);
    size_t size = s->tokens * (narrow ? sizeof(int8_t) : sizeof *q);

    if (line == XKV_NO_LINE)
        return XKV_OK;
    XKV_TRY(reserve(s, size + 1));
    s->used += narrow ? 0 : s->used % 2;
    s->lines[line] = (xkv_line){s->used, s->reader.side.step, narrow ? 1 : 2};
    if (narrow)
        for (uint32_t k = 0; k < s->tokens; k++)
            ((int8_t *)s->memory)[s->used + k] = (int8_t)q[k];
    else
        memcpy(s->memory + s->used, q, size);
    s->used += size;
    return XKV_OK;
}

/* Add the gathered components of the cross stage to the group's leading coefficients. */
static void flush_panel(xkv_block_scratch *s)
{
    const xkv_cross_basis *b = s->reader.cross->cross.basis;

    if (s->panel_count > 0)
        s->reader.kernels->gemm_tn(s->group->top, s->tokens, s->panel_count,
                                   b->components + (size_t)s->panel_first * b->width + s->reader.transform.cross_at,
                                   b->width, s->panel, s->tokens, 1, (float *)s->memory, s->tokens);
    s->panel_count = 0;
}

static xkv_status take_cross(void *user, uint32_t i, const int16_t *q)
{
    xkv_block_scratch *s = user;
    const xkv_cross *cross = &s->reader.cross->cross;
    uint32_t component = i == 0 ? 0 : s->panel_first + s->panel_count; /* at least */

    while (cross->tables[component] == 0)
        component++;
    if (s->panel_count == XKV_ATTEND_LINES || component != s->panel_first + s->panel_count)
        flush_panel(s);
    if (s->panel_count == 0)
        s->panel_first = component;
    xkv_dequantize(xkv_coder_cpu(), q, s->tokens, cross->step, s->panel + (size_t)s->panel_count * s->tokens);
    s->panel_count++;
    return XKV_OK;
}

static float largest_magnitude(const float *x, size_t n)
{
    float largest = 0;

    for (size_t i = 0; i < n; i++)
        if (!(fabsf(x[i]) <= largest)) /* a NaN stays */
            largest = fabsf(x[i]);
    return largest;
}

/* The j-th leading coefficients from f32 to their place among the lines, which is never behind that of the f32. */
static xkv_status round_top(xkv_block_scratch *s, size_t j)
{
    size_t n = s->tokens, at = 2 * j * n;
    float *x = s->panel, scale;

    memcpy(x, s->memory + 2 * at, n * sizeof *x);
    scale = largest_magnitude(x, n) / 32767;
    if (scale == 0)
        memset(s->q, 0, n * sizeof *s->q);
    else if (!xkv_quantize(xkv_coder_cpu(), x, n, scale, s->q))
        return xkv_fail(s->ctx, XKV_ERROR_CORRUPT, "a coefficient of the cross stage overflows");
    memcpy(s->memory + at, s->q, n * sizeof *s->q);
    s->lines[j] = (xkv_line){at, scale, 2};
    return XKV_OK;
}

static xkv_status load_top(xkv_block_scratch *s, uint32_t chunk)
{
    s->panel_first = s->panel_count = 0;
    memset(s->memory, 0, sizeof(float) * s->group->top * s->tokens);
    XKV_TRY(xkv_chunk_visit(&s->reader, &s->chunk, true, chunk, s->q, take_cross, s));
    flush_panel(s);
    for (uint32_t j = 0; j < s->group->top; j++)
        XKV_TRY(round_top(s, j));
    s->used = 2 * (size_t)s->group->top * s->tokens;
    return XKV_OK;
}

static xkv_status load_lines(xkv_block_scratch *s, uint32_t chunk, xkv_block *b)
{
    xkv_chunk_coded(&s->reader.entry->c, chunk, &b->t0, &b->t1);
    s->tokens = b->t1 - b->t0;
    s->used = 0;
    if (s->tokens == 0)
        return XKV_OK;
    if (s->group->top > 0)
        XKV_TRY(load_top(s, chunk));
    XKV_TRY(xkv_chunk_visit(&s->reader, &s->chunk, false, chunk, s->q, take_own, s));
    b->data = s->memory;
    b->size = s->used;
    b->lines = s->lines;
    return XKV_OK;
}

xkv_status xkv_block_load(xkv_block_scratch *s, uint32_t chunk, xkv_block *b)
{
    xkv_chunk loaded;

    *b = (xkv_block){0};
    if (s->group->form == XKV_BLOCK_INTEGERS || s->group->form == XKV_BLOCK_DIAGONAL)
        return load_lines(s, chunk, b);
    XKV_TRY(xkv_chunk_load(&s->reader, &s->chunk, chunk, &loaded));
    b->t0 = loaded.t0;
    b->t1 = loaded.t1;
    b->data = loaded.matrix;
    b->size = expected_size(s->group, b->t1 - b->t0);
    if (s->group->form == XKV_BLOCK_ROWS && b->size > 0) {
        take_columns(s->group, loaded.matrix, b->t1 - b->t0, s->memory);
        b->data = s->memory;
    }
    return XKV_OK;
}

xkv_status xkv_block_keep(xkv_ctx *ctx, const xkv_tile_group *t, const xkv_block *b, xkv_block *kept)
{
    *kept = (xkv_block){.t0 = b->t0, .t1 = b->t1, .size = b->size};
    if (b->size == 0)
        return XKV_OK;
    XKV_TRY(XKV_NEW(ctx, b->size, &kept->memory));
    memcpy(kept->memory, b->data, b->size);
    kept->data = kept->memory;
    if (!b->lines)
        return XKV_OK;
    XKV_TRY(XKV_NEW(ctx, t->lines, &kept->lines));
    memcpy(kept->lines, b->lines, t->lines * sizeof *b->lines);
    return XKV_OK;
}

void xkv_block_free(xkv_ctx *ctx, xkv_block *b)
{
    if (b->memory)
        xkv_release(ctx, b->lines);
    xkv_release(ctx, b->memory);
    *b = (xkv_block){0};
}

/* --- Tiles -------------------------------------------------------------------------------------------------------- */

/* Tokens from .. from + n - 1 of a line; n <= XKV_ATTEND_TOKENS. */
static void expand_line(const xkv_block *b, uint32_t line, size_t from, size_t n, float *y)
{
    const xkv_line *l = &b->lines[line];
    int16_t q[XKV_ATTEND_TOKENS];

    if (l->bytes == 2)
        memcpy(q, b->data + l->at + 2 * from, n * sizeof *q);
    else
        for (size_t i = 0; i < n; i++)
            q[i] = (int8_t)b->data[l->at + from + i];
    xkv_dequantize(xkv_coder_cpu(), q, n, l->scale, y);
}

/* Slots of a group that are multiplied at a time. */
static size_t next_slots(const xkv_tile_group *t, size_t first)
{
    return (size_t)xkv_min64(XKV_ATTEND_SLOTS, t->slots - first);
}

/* Coefficients of slots [first, first + n) as f32: [n][count], or of factors [count][n]. */
static void expand_slots(const xkv_tile_group *t, const xkv_block *b, size_t first, size_t n, size_t from, size_t count,
                         float *y)
{
    if (t->form == XKV_BLOCK_FACTORS)
        for (size_t s = 0; s < count; s++)
            t->reader.kernels->to_f32(XKV_F16, b->data + 2 * ((from + s) * t->slots + first), y + s * n, n);
    else
        for (size_t i = 0; i < n; i++)
            expand_line(b, (uint32_t)(first + i), from, count, y + i * count);
}

/* The same in strips. */
static void expand_strips(const xkv_tile_group *t, const xkv_block *b, size_t first, size_t n, size_t from,
                          size_t count, float *strips)
{
    float line[XKV_ATTEND_TOKENS], row[XKV_ATTEND_SLOTS];

    if (t->form != XKV_BLOCK_FACTORS) {
        for (size_t i = 0; i < n; i++) {
            expand_line(b, (uint32_t)(first + i), from, count, line);
            xkv_strips_set(strips, n, i, line, 1, count);
        }
        return;
    }
    memset(strips, 0, xkv_strips_size(count, n) * sizeof *strips); /* behind the last token too */
    for (size_t s = 0; s < count; s++) {
        t->reader.kernels->to_f32(XKV_F16, b->data + 2 * ((from + s) * t->slots + first), row, n);
        xkv_strips_set_token(strips, n, s, row);
    }
}

static void fill_mean(const xkv_tile_plane *p, size_t count, float *x)
{
    const float *mean = p->group->mean;

    for (size_t s = 0; s < count; s++)
        if (mean)
            memcpy(x + s * p->width, mean + p->column, p->width * sizeof *x);
        else
            memset(x + s * p->width, 0, p->width * sizeof *x);
}

static void add_diagonal(const xkv_tile_plane *p, const xkv_block *b, size_t from, size_t count, float *x)
{
    const xkv_tile_group *t = p->group;
    float y[XKV_ATTEND_TOKENS];

    for (uint32_t i = 0; i < t->lines; i++) {
        size_t element = t->component[i] - p->column; /* wraps in front of the plane */
        if (element >= p->width)
            continue;
        expand_line(b, i, from, count, y);
        for (size_t s = 0; s < count; s++)
            x[s * p->width + element] += y[s] * t->reader.transform.diagonal[t->component[i]];
    }
}

void xkv_tile_rows(const xkv_tile_plane *p, const xkv_block *b, uint32_t t0, uint32_t count, float *panel, float *x)
{
    const xkv_tile_group *t = p->group;
    size_t from = t0 - b->t0;

    fill_mean(p, count, x);
    if (t->form == XKV_BLOCK_DIAGONAL)
        add_diagonal(p, b, from, count, x);
    for (size_t first = 0, n; first < t->slots; first += n) {
        n = next_slots(t, first);
        expand_strips(t, b, first, n, from, count, panel);
        xkv_multiply_panels(count, n, panel, t->basis, t->component + first, p->column, p->width, x, p->width);
    }
}

const uint8_t *xkv_tile_stored(const xkv_tile_group *t, const xkv_block *b, uint32_t token)
{
    const xkv_container *c = &t->reader.entry->c;
    size_t index = token;

    if (t->form == XKV_BLOCK_ROWS)
        return b->data + (size_t)(token - b->t0) * t->row_bytes;
    if (index >= c->sinks)
        index = c->sinks + (index - (c->geometry.token_count - c->window));
    return t->exact + index * t->row_bytes;
}

void xkv_tile_exact(const xkv_tile_plane *p, const uint8_t *rows, uint32_t count, float *x)
{
    const xkv_tile_group *t = p->group;
    uint32_t dtype = t->reader.entry->c.geometry.planes[p->plane].dtype;

    for (size_t s = 0; s < count; s++)
        t->reader.kernels->to_f32(dtype, rows + s * t->row_bytes + t->offsets[p->index], x + s * p->width, p->width);
}

void xkv_tile_weigh(const xkv_tile_plane *p, const xkv_block *b, uint32_t t0, uint32_t count, size_t m,
                    const float *weights, size_t ld, float *panel, float *sums)
{
    const xkv_tile_group *t = p->group;
    const xkv_kernels *k = t->reader.kernels;

    for (size_t first = 0, n; first < t->slots; first += n) {
        n = next_slots(t, first);
        expand_slots(t, b, first, n, t0 - b->t0, count, panel);
        if (t->form == XKV_BLOCK_FACTORS)
            k->gemm_nn(m, n, count, weights, ld, panel, n, 1, sums + first, t->slots);
        else
            k->gemm_nt(m, n, count, weights, ld, panel, count, 1, sums + first, t->slots);
    }
}

/* The sums of at most XKV_ATTEND_TOKENS queries. */
static void apply_basis(const xkv_tile_group *t, size_t m, const float *sums, size_t column, size_t width, float *panel,
                        float *x, size_t ld)
{
    for (size_t first = 0, n; first < t->slots; first += n) {
        n = next_slots(t, first);
        xkv_strips_set_rows(panel, n, sums + first, t->slots, m);
        xkv_multiply_panels(m, n, panel, t->basis, t->component + first, column, width, x, ld);
    }
}

void xkv_tile_apply_basis(const xkv_tile_plane *p, size_t m, const float *sums, const float *weight, uint32_t from,
                          uint32_t n, float *panel, float *x, size_t ld)
{
    const xkv_tile_group *t = p->group;
    size_t column = p->column + from;

    for (size_t r = 0; r < m; r += XKV_ATTEND_TOKENS)
        apply_basis(t, (size_t)xkv_min64(XKV_ATTEND_TOKENS, m - r), sums + r * t->slots, column, n, panel, x + r * ld,
                    ld);
    for (size_t r = 0; t->mean && r < m; r++)
        for (size_t i = 0; i < n; i++)
            x[r * ld + i] += weight[r] * t->mean[column + i];
}
