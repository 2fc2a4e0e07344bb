#include "cross.h"
#include "device_pack_tile.h"
#include "device_svd.h"

static xkv_halves halves_at(const xkv_device_packing *p, uint64_t offset, uint64_t elements)
{
    uint16_t *high = xkv_pack_place(p, offset);

    return (xkv_halves){high, high + elements};
}

/* --- Products ----------------------------------------------------------------------------------------------------- */

static xkv_status halve(const xkv_pack_work *w, const float *rows, uint64_t ld, uint64_t count, uint64_t width,
                        xkv_halves to)
{
    return xkv_device_halve(w->p->ctx, w->p->device, w->p->stream, rows, ld, count, width, to);
}

static xkv_status multiply(const xkv_pack_work *w, xkv_plug_gemm o, bool transposed, xkv_halves a, xkv_halves b)
{
    return xkv_device_multiply(w->p->ctx, w->p->device, w->p->stream, o, transposed, a, b, false);
}

/* --- Coefficients ------------------------------------------------------------------------------------------------ */

/* Components first .. first + count - 1 as operands of analyze_tile(). */
static xkv_status load_analysis(const xkv_pack_work *w, uint32_t first, uint32_t count)
{
    uint64_t width = w->g->width;

    return halve(w, w->basis->analysis + first * width, width, count, width,
                 halves_at(w->p, w->p->at.basis_halves, w->p->need.area));
}

/* Coefficients of a tile on these components, y [count][tile]. Their mean is that of the rows: what the offset of
 * xkv_analyze() takes off is gone already. */
static xkv_status analyze_tile(const xkv_pack_work *w, uint32_t row, uint32_t n, uint32_t count)
{
    xkv_device_packing *p = w->p;
    uint64_t width = w->g->width;
    xkv_halves rows = halves_at(p, p->at.row_halves, (uint64_t)p->at.tile_tokens * p->need.width);
    xkv_halves basis = halves_at(p, p->at.basis_halves, p->need.area);
    xkv_plug_gemm o = {.c = xkv_pack_place(p, p->at.y),
                       .m = count,
                       .n = n,
                       .k = width,
                       .lda = width,
                       .ldb = width,
                       .ldc = p->at.tile_tokens,
                       .alpha = 1};

    XKV_TRY(xkv_pack_gather(w, row, n, xkv_pack_place(w->p, w->p->at.rows)));
    XKV_TRY(halve(w, xkv_pack_place(p, p->at.rows), width, n, width, rows));
    return multiply(w, o, true, basis, rows);
}

/* Integers of `count` components of a tile. */
static xkv_status quantize_tile(xkv_device_packing *p, const float *y, uint32_t tile, uint32_t count, float step,
                                int16_t *q)
{
    uint32_t row, n = xkv_pack_tile(p, tile, &row);
    xkv_plug_quantize o = {.y = y,
                           .y_stride = p->at.tile_tokens,
                           .q = q + row,
                           .q_stride = p->at.stride,
                           .count = count,
                           .tokens = n,
                           .step = step,
                           .stats = (xkv_plug_stats *)xkv_pack_place(p, p->at.stats) + tile,
                           .stats_stride = p->at.tiles};

    XKV_PACKING(p, quantize(p->device->plug, &o, p->stream));
    return XKV_OK;
}

/* --- Measuring ---------------------------------------------------------------------------------------------------- */

/* Where components are in the integers, for expanding them. */
typedef struct operands {
    const int16_t *q;
    const uint32_t *rows; /* the device's */
    uint32_t count;
} operands;

/* What rows are restored from. */
typedef struct measuring {
    xkv_pack_work *w;
    const xkv_coded *coded;
    const xkv_cross *cross; /* NULL: none */
    operands own, stage;
    uint32_t top;       /* coefficients that the stage adds to; 0 without one */
    uint64_t blocks_at; /* unused without a metric */
} measuring;

/* Lists of what is coded: rows for expanding, and for the group itself which components they are. */
static xkv_status send_lists(measuring *m)
{
    xkv_device_packing *p = m->w->p;
    const xkv_coded *c = m->coded;
    uint32_t *list = NULL, *index, *stage, n = 0, k = 0;
    uint32_t *there = xkv_pack_place(p, p->at.lists);
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW_ZERO(p->ctx, (size_t)(3 * p->need.listed), &list));
    index = list + p->need.listed;
    stage = index + p->need.listed;
    for (uint32_t i = 0; i < c->rank; i++)
        if (c->tables[i] != 0) {
            list[n] = (i - c->first_row) << 2 | XKV_OPERAND_WHOLE;
            index[n++] = i;
        }
    for (uint32_t i = 0; m->top > 0 && i < m->cross->rank; i++)
        if (m->cross->tables[i] != 0)
            stage[k++] = i << 2 | XKV_OPERAND_WHOLE;
    m->own = (operands){c->device_q, there, n};
    m->stage = (operands){xkv_pack_place(p, p->at.stage_q), there + 2 * p->need.listed, k};
    XKV_TRY_GOTO(xkv_device_upload(p->ctx, p->device, list, 12 * p->need.listed, there, p->stream), out);
out:
    xkv_release(p->ctx, list);
    return status;
}

/* The coded components times the step, and behind them the leading ones of the group as they are. */
static xkv_status load_synthesis(const measuring *m)
{
    const xkv_pack_work *w = m->w;
    xkv_device_packing *p = w->p;
    uint64_t width = w->g->width, at = m->own.count * width;
    xkv_halves basis = halves_at(p, p->at.basis_halves, p->need.area);
    xkv_plug_halve o = {.rows = w->basis->rows,
                        .index = m->own.rows + p->need.listed,
                        .ld = width,
                        .count = m->own.count,
                        .width = width,
                        .factor = m->coded->step,
                        .high = basis.high,
                        .low = basis.low};

    XKV_PACKING(p, halve(p->device->plug, &o, p->stream));
    return halve(w, w->basis->rows, width, m->top, width, (xkv_halves){basis.high + at, basis.low + at});
}

/* The parts of the stage's coded components that are the group's, times their step: [stage][top]. */
static xkv_status send_mix(const measuring *m)
{
    xkv_device_packing *p = m->w->p;
    const xkv_cross_basis *b = m->cross->basis;
    float *mix = NULL, *row;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW(p->ctx, (size_t)m->stage.count * m->top, &mix));
    row = mix;
    for (size_t i = 0; i < m->cross->rank; i++)
        for (size_t j = 0; m->cross->tables[i] != 0 && j < m->top; j++)
            *row++ = b->components[i * b->width + m->w->t->cross_at + j] * m->cross->step;
    XKV_TRY_GOTO(xkv_device_upload(p->ctx, p->device, mix, 4ull * m->stage.count * m->top, xkv_pack_place(p, p->at.mix),
                                   p->stream),
                 out);
out:
    xkv_release(p->ctx, mix);
    return status;
}

static xkv_status prepare(measuring *m)
{
    xkv_device_packing *p = m->w->p;

    XKV_TRY(send_lists(m));
    XKV_TRY(load_synthesis(m));
    if (m->top > 0)
        XKV_TRY(send_mix(m));
    if (!m->w->t->blocks)
        return XKV_OK;
    return xkv_device_upload(p->ctx, p->device, m->w->t->blocks, 4 * xkv_pack_block_elements(p->geometry, m->w->g),
                             xkv_pack_place(p, p->at.blocks), p->stream);
}

/* Integers of a tile to f32, [count][tile]. */
static xkv_status expand(const measuring *m, operands in, uint32_t row, uint32_t n, float *to)
{
    xkv_device_packing *p = m->w->p;
    xkv_plug_expand o = {.q = in.q + row,
                         .q_stride = p->at.stride,
                         .rows = in.rows,
                         .count = in.count,
                         .tokens = n,
                         .tile = to,
                         .stride = p->at.tile_tokens,
                         .exact = 1,
                         .fault = xkv_pack_place(p, p->at.flags)};

    XKV_PACKING(p, expand(p->device->plug, &o, p->stream));
    return XKV_OK;
}

/* What the stage adds to the leading coefficients, [top][tile]. */
static xkv_status mix_tile(const measuring *m, uint32_t row, uint32_t n, float *to)
{
    xkv_device_packing *p = m->w->p;
    xkv_plug_gemm o = {.a = xkv_pack_place(p, p->at.mix),
                       .b = xkv_pack_place(p, p->at.stage_y),
                       .c = to,
                       .m = m->top,
                       .n = n,
                       .k = m->stage.count,
                       .lda = m->top,
                       .ldb = p->at.tile_tokens,
                       .ldc = p->at.tile_tokens,
                       .alpha = 1,
                       .component_major = 1,
                       .exact = XKV_PRODUCT_F32};

    XKV_TRY(expand(m, m->stage, row, n, xkv_pack_place(p, p->at.stage_y)));
    XKV_PACKING(p, gemm(p->device->plug, &o, p->stream));
    return XKV_OK;
}

/* The rows of a tile less what is restored of them. */
static xkv_status subtract_tile(const measuring *m, uint32_t row, uint32_t n)
{
    const xkv_pack_work *w = m->w;
    xkv_device_packing *p = w->p;
    uint64_t width = w->g->width, count = (uint64_t)m->own.count + m->top, tile = p->at.tile_tokens;
    float *y = xkv_pack_place(p, p->at.y);
    xkv_halves in = halves_at(p, p->at.y_halves, p->need.operands * tile);
    xkv_plug_gemm o = {.c = xkv_pack_place(p, p->at.rows),
                       .m = n,
                       .n = width,
                       .k = count,
                       .lda = n,
                       .ldb = width,
                       .ldc = width,
                       .alpha = -1,
                       .beta = 1,
                       .component_major = 1};

    if (count == 0)
        return XKV_OK;
    XKV_TRY(expand(m, m->own, row, n, y));
    if (m->top > 0)
        XKV_TRY(mix_tile(m, row, n, y + m->own.count * tile));
    XKV_TRY(halve(w, y, tile, count, n, in));
    return multiply(w, o, false, in, halves_at(p, p->at.basis_halves, p->need.area));
}

/* The rows of a tile times the metric's blocks. */
static xkv_status weigh_tile(const xkv_pack_work *w, uint32_t n)
{
    xkv_device_packing *p = w->p;
    float *block = xkv_pack_place(p, p->at.blocks), *rows = xkv_pack_place(p, p->at.rows);
    float *out = xkv_pack_place(p, p->at.product);

    for (uint32_t i = 0; i < w->g->plane_count; i++) {
        const xkv_plane *plane = &p->geometry->planes[w->g->planes[i]];
        uint64_t d = plane->head_dim;
        xkv_plug_product o = {.g = {.a = rows,
                                    .b = block,
                                    .c = out,
                                    .m = n,
                                    .n = d,
                                    .k = d,
                                    .lda = w->g->width,
                                    .ldb = d,
                                    .ldc = w->g->width,
                                    .alpha = 1,
                                    .exact = XKV_PRODUCT_TF32},
                              .batch = plane->heads,
                              .a_step = d,
                              .b_step = d * d,
                              .c_step = d};
        XKV_PACKING(p, product(p->device->plug, &o, p->stream));
        rows += plane->heads * d;
        out += plane->heads * d;
        block += plane->heads * d * d;
    }
    return XKV_OK;
}

/* Sums of squares of a tile: those of the planes, and in the metric, behind `first` others. With the mean added to what
 * the planes' are of. */
static xkv_status sum_tile(const xkv_pack_work *w, uint32_t row, uint32_t n, uint32_t first, bool mean)
{
    xkv_device_packing *p = w->p;
    uint32_t planes = w->g->plane_count;
    const uint32_t *begins = xkv_pack_constant(w, w->begins_at);
    xkv_plug_sums o = {.rows = xkv_pack_place(p, p->at.rows),
                       .mean = mean ? xkv_pack_constant(w, w->mean_at) : NULL,
                       .begins = begins,
                       .ld = w->g->width,
                       .stride = p->at.stride,
                       .count = planes,
                       .tokens = n,
                       .sums = (double *)xkv_pack_place(p, p->at.sums) + first * p->at.stride + row};

    XKV_PACKING(p, sums(p->device->plug, &o, p->stream));
    if (!w->t->blocks)
        return XKV_OK;
    XKV_TRY(weigh_tile(w, n));
    o.rows = xkv_pack_place(p, p->at.product);
    o.mean = NULL;
    o.begins = begins + planes + 1;
    o.count = 1;
    o.sums += planes * p->at.stride;
    XKV_PACKING(p, sums(p->device->plug, &o, p->stream));
    return XKV_OK;
}

/* As total() of coded.c. */
static xkv_status add_up(const xkv_pack_work *w, double *scratch, xkv_group *g, xkv_coded *coded)
{
    uint32_t planes = g->plane_count;
    double squares = 0;

    g->energy = 0;
    for (uint32_t i = 0; i < planes; i++) {
        double error;
        XKV_TRY(xkv_pack_total(w, i, scratch, &g->plane_energies[i]));
        XKV_TRY(xkv_pack_total(w, planes + 1 + i, scratch, &error));
        g->plane_errors[i] = xkv_relative_error(error, g->plane_energies[i]);
        g->energy += g->plane_energies[i];
        squares += error;
    }
    g->error = xkv_relative_error(squares, g->energy);
    if (!w->t->blocks)
        return XKV_OK;
    XKV_TRY(xkv_pack_total(w, planes, scratch, &coded->metric_energy));
    return xkv_pack_total(w, 2 * planes + 1, scratch, &coded->metric_squares);
}

static xkv_status measure(xkv_pack_work *w, xkv_group *g, const xkv_cross *cross, xkv_coded *coded)
{
    xkv_device_packing *p = w->p;
    measuring m = {.w = w, .coded = coded, .cross = cross};
    double *scratch = NULL;
    xkv_status status;

    m.top = cross && cross->coded > 0 ? w->t->top : 0;
    XKV_TRY(prepare(&m));
    for (uint32_t tile = 0; tile < p->at.tiles; tile++) {
        uint32_t row, n = xkv_pack_tile(p, tile, &row);
        XKV_TRY(xkv_pack_gather(w, row, n, xkv_pack_place(w->p, w->p->at.rows)));
        XKV_TRY(sum_tile(w, row, n, 0, true));
        XKV_TRY(subtract_tile(&m, row, n));
        XKV_TRY(sum_tile(w, row, n, g->plane_count + 1, false));
        XKV_TRY(xkv_check_cancel(p->ctx));
    }
    XKV_TRY(XKV_NEW(p->ctx, p->tokens, &scratch));
    status = add_up(w, scratch, g, coded);
    xkv_release(p->ctx, scratch);
    return status;
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

static xkv_status code_group(xkv_pack_work *w, xkv_pool *pool, xkv_group *g, const xkv_cross *cross, xkv_coded *coded)
{
    xkv_device_packing *p = w->p;
    uint32_t first = coded->first_row, count = coded->rank - first;
    int16_t *q = xkv_pack_place(p, p->at.q);

    coded->device_q = q;
    XKV_TRY(load_analysis(w, first, count));
    for (uint32_t tile = 0; tile < p->at.tiles; tile++) {
        uint32_t row, n = xkv_pack_tile(p, tile, &row);
        XKV_TRY(analyze_tile(w, row, n, count));
        XKV_TRY(quantize_tile(p, xkv_pack_place(p, p->at.y), tile, count, coded->step, q));
        XKV_TRY(xkv_check_cancel(p->ctx));
    }
    XKV_TRY(xkv_device_pack_choose(p, pool, q, first, coded));
    return coded->overflow ? XKV_OK : measure(w, g, cross, coded);
}

xkv_status xkv_device_code_group(xkv_device_packing *p, xkv_pool *pool, xkv_group *g, const xkv_transform *t,
                                 float step, const xkv_cross *cross, xkv_coded *coded)
{
    xkv_status status = XKV_OK;
    xkv_pack_work w;

    *coded = (xkv_coded){.first = p->sinks, .tokens = p->tokens, .rank = t->rank, .step = step};
    coded->first_row = cross ? t->top : 0;
    p->streams_made = false;
    XKV_TRY_GOTO(xkv_pack_open(p, g, t, &w), out);
    XKV_TRY_GOTO(code_group(&w, pool, g, cross, coded), out);
out:
    if (status != XKV_OK)
        xkv_coded_free(p->ctx, coded);
    return status;
}

/* --- The cross stage ---------------------------------------------------------------------------------------------- */

/* The leading coefficients of a group in a tile, at y. */
static xkv_status lead_tile(xkv_device_packing *p, const xkv_container *c, const xkv_transform *t, uint32_t group,
                            uint32_t row, uint32_t n)
{
    xkv_pack_work w;

    XKV_TRY(xkv_pack_open(p, &c->groups[group], t, &w));
    XKV_TRY(load_analysis(&w, 0, t->top));
    return analyze_tile(&w, row, n, t->top);
}

/* Add them to the coefficients of the stage; `more`: to those there are. */
static xkv_status add_to_stage(xkv_device_packing *p, const xkv_transform *t, uint32_t n, bool more)
{
    const xkv_cross_basis *b = p->dict->cross;
    xkv_plug_gemm o = {.a = p->device_dict->cross + t->cross_at,
                       .b = xkv_pack_place(p, p->at.y),
                       .c = xkv_pack_place(p, p->at.stage_y),
                       .m = b->rank,
                       .n = n,
                       .k = t->top,
                       .lda = b->width,
                       .ldb = p->at.tile_tokens,
                       .ldc = p->at.tile_tokens,
                       .alpha = 1,
                       .beta = more ? 1 : 0,
                       .exact = XKV_PRODUCT_F32};

    XKV_PACKING(p, gemm(p->device->plug, &o, p->stream));
    return XKV_OK;
}

static xkv_status stage_tile(xkv_device_packing *p, const xkv_container *c, const xkv_transform *transforms,
                             uint32_t row, uint32_t n)
{
    float *stage = xkv_pack_place(p, p->at.stage_y);
    bool more = false;

    for (uint32_t i = 0; i < c->group_count; i++) {
        if (!xkv_takes_part(c, transforms, i))
            continue;
        XKV_TRY(lead_tile(p, c, &transforms[i], i, row, n));
        XKV_TRY(add_to_stage(p, &transforms[i], n, more));
        more = true;
    }
    if (!more)
        XKV_PACKING(p, clear(p->device->plug, stage, 4 * p->need.stage * p->at.tile_tokens, p->stream));
    return xkv_check_cancel(p->ctx);
}

static xkv_status code_cross(xkv_device_packing *p, xkv_pool *pool, const xkv_container *c,
                             const xkv_transform *transforms, xkv_coded *coded)
{
    int16_t *q = xkv_pack_place(p, p->at.stage_q);

    coded->device_q = q;
    for (uint32_t tile = 0; tile < p->at.tiles; tile++) {
        uint32_t row, n = xkv_pack_tile(p, tile, &row);
        XKV_TRY(stage_tile(p, c, transforms, row, n));
        XKV_TRY(quantize_tile(p, xkv_pack_place(p, p->at.stage_y), tile, coded->rank, coded->step, q));
    }
    return xkv_device_pack_choose(p, pool, q, 0, coded);
}

xkv_status xkv_device_code_cross(xkv_device_packing *p, xkv_pool *pool, const xkv_container *c,
                                 const xkv_transform *transforms, float step, xkv_coded *coded)
{
    xkv_status status;

    *coded = (xkv_coded){.first = p->sinks, .tokens = p->tokens, .rank = p->dict->cross->rank, .step = step};
    p->streams_made = false;
    status = code_cross(p, pool, c, transforms, coded);
    if (status != XKV_OK)
        xkv_coded_free(p->ctx, coded);
    return status;
}

/* The largest norm of a group. */
static xkv_status find_norm(xkv_device_packing *p, const xkv_container *c, const xkv_transform *t, uint32_t group,
                            float *z, float *norm)
{
    uint64_t size = 4ull * t->top * p->at.tile_tokens;

    for (uint32_t tile = 0; tile < p->at.tiles; tile++) {
        uint32_t row, n = xkv_pack_tile(p, tile, &row);
        float largest;
        XKV_TRY(lead_tile(p, c, t, group, row, n));
        XKV_TRY(xkv_device_download(p->ctx, p->device, xkv_pack_place(p, p->at.y), size, z, p->stream));
        largest = xkv_cross_norm(z, p->at.tile_tokens, t->top, n);
        if (!(largest <= *norm)) /* a NaN stays */
            *norm = largest;
    }
    return XKV_OK;
}

xkv_status xkv_device_cross_norms(xkv_device_packing *p, const xkv_container *c, const xkv_transform *transforms,
                                  float *norms)
{
    float *z = NULL;
    xkv_status status = XKV_OK;

    memset(norms, 0, c->group_count * sizeof *norms);
    XKV_TRY(XKV_NEW(p->ctx, (size_t)(p->need.top * p->at.tile_tokens), &z));
    for (uint32_t i = 0; i < c->group_count; i++)
        if (xkv_takes_part(c, transforms, i))
            XKV_TRY_GOTO(find_norm(p, c, &transforms[i], i, z, &norms[i]), out);
out:
    xkv_release(p->ctx, z);
    return status;
}

/* --- NaN and infinities ------------------------------------------------------------------------------------------- */

xkv_status xkv_device_pack_scan(xkv_device_packing *p, uint8_t *nonfinite)
{
    uint32_t flag;
    xkv_plug_plane plane;
    xkv_plug_scan o = {.planes = xkv_pack_place(p, p->at.constants),
                       .plane_count = 1,
                       .tokens = p->geometry->token_count,
                       .flags = xkv_pack_place(p, p->at.flags)};

    for (uint32_t i = 0; i < p->geometry->plane_count; i++) {
        const xkv_plane *g = &p->geometry->planes[i];
        plane = (xkv_plug_plane){p->views[i], g->heads, g->head_dim, 0, 0, 0, 0, 0, 0};
        XKV_TRY(
            xkv_device_upload(p->ctx, p->device, &plane, sizeof plane, xkv_pack_place(p, p->at.constants), p->stream));
        XKV_PACKING(p, clear(p->device->plug, o.flags, sizeof flag, p->stream));
        XKV_PACKING(p, scan(p->device->plug, &o, p->stream));
        XKV_TRY(xkv_device_download(p->ctx, p->device, o.flags, sizeof flag, &flag, p->stream));
        nonfinite[i] = flag != 0;
    }
    return XKV_OK;
}
