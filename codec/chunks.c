#include "chunks.h"

#include "dict.h"
#include "parts.h"

#include <math.h>
#include <stdio.h>

/* --- Parts -------------------------------------------------------------------------------------------------------- */

/* Where a part lies, for messages. */
typedef struct part_name {
    char text[96];
} part_name;

static part_name name_part(const xkv_entry *entry, const xkv_group *g, uint32_t part)
{
    part_name name;

    (void)snprintf(name.text, sizeof name.text, "offset %llu, group %u, part %u",
                   (unsigned long long)(entry->c.payload_offset + g->parts[part].offset),
                   (unsigned)(g - entry->c.groups), part);
    return name;
}

static xkv_status read_matrix(const xkv_group_reader *r, uint32_t part, uint8_t **matrix)
{
    return xkv_read_matrix(r->ctx, &r->entry->input, &r->entry->c, r->g, part, name_part(r->entry, r->g, part).text,
                           matrix);
}

/* --- Side parts --------------------------------------------------------------------------------------------------- */

static xkv_status check_tables(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, xkv_side *side)
{
    side->coded = 0;
    XKV_TRY(XKV_NEW(ctx, g->rank, &side->coded_tables));
    for (uint32_t i = 0; i < g->rank; i++) {
        if (side->tables[i] > XKV_TABLE_MAX)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: table of component %u is %u, expected at most %u [Q4]",
                            name_part(entry, g, XKV_PART_COMPONENTS).text, i, side->tables[i], XKV_TABLE_MAX);
        if (side->tables[i] != 0)
            side->coded_tables[side->coded++] = side->tables[i];
    }
    return XKV_OK;
}

/* The side part of svdq is no matrix: a stream follows its arrays. */
static xkv_status read_side_bytes(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, const char *where,
                                  uint8_t **bytes)
{
    const xkv_part *part = &g->parts[XKV_PART_COMPONENTS];

    if (g->codec != XKV_GROUP_SVDQ)
        return xkv_read_matrix(ctx, &entry->input, &entry->c, g, XKV_PART_COMPONENTS, where, bytes);
    XKV_TRY(XKV_NEW(ctx, (size_t)part->size, bytes));
    return xkv_container_read_part(ctx, &entry->input, &entry->c, part, *bytes);
}

xkv_status xkv_side_read(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, xkv_side *side)
{
    part_name where = name_part(entry, g, XKV_PART_COMPONENTS);

    XKV_TRY(read_side_bytes(ctx, entry, g, where.text, &side->bytes));
    side->step = xkv_loadf32(side->bytes);
    if (!isfinite(side->step) || side->step <= 0 || xkv_load32(side->bytes + 4) != 0)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "%s: step is %g, expected finite and positive, then zeros [Q3]",
                        where.text, (double)side->step);
    side->tables = side->bytes + 8;
    if (g->codec == XKV_GROUP_SCALAR)
        side->tables += 4ull * g->plane_count + 2ull * g->width;
    if (g->codec == XKV_GROUP_SVDQ)
        side->tables = side->bytes + xkv_svdq_side(g).tables;
    return check_tables(ctx, entry, g, side);
}

void xkv_side_free(xkv_ctx *ctx, xkv_side *side)
{
    xkv_release(ctx, side->bytes);
    xkv_release(ctx, side->coded_tables);
    *side = (xkv_side){0};
}

/* --- The integers of a chunk -------------------------------------------------------------------------------------- */

xkv_status xkv_side_integers(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, const xkv_side *side,
                             uint32_t chunk, uint8_t *packed, int16_t *q)
{
    const xkv_part *part = &g->parts[XKV_PART_CHUNKS + chunk];
    uint32_t t0, t1;

    xkv_chunk_coded(&entry->c, chunk, &t0, &t1);
    xkv_rans_shape shape = {t1 - t0, side->coded, t1 - t0, side->coded_tables};
    XKV_TRY(xkv_container_read_part(ctx, &entry->input, &entry->c, part, packed));
    return xkv_rans_decode(ctx, xkv_coder_cpu(), &shape, packed, part->size,
                           name_part(entry, g, XKV_PART_CHUNKS + chunk).text, q);
}

/* --- Integers that are kept --------------------------------------------------------------------------------------- */

static xkv_status alloc_kept(xkv_ctx *ctx, const xkv_container *c, uint32_t first, uint32_t last, uint32_t coded,
                             xkv_kept *kept)
{
    uint32_t begin, end, unused;

    kept->first = first;
    xkv_chunk_tokens(c, first, &begin, &unused);
    xkv_chunk_tokens(c, last, &unused, &end);
    return XKV_NEW(ctx, (size_t)(end - begin) * coded, &kept->q);
}

/* Where those of the chunk are whose coded tokens begin at t0; `else_q` when none are kept. */
static int16_t *kept_integers(const xkv_container *c, const xkv_kept *kept, uint32_t coded, uint32_t t0,
                              int16_t *else_q)
{
    return kept->q ? kept->q + (t0 - (size_t)kept->first * c->chunk_tokens) * coded : else_q;
}

/* --- The cross stage ---------------------------------------------------------------------------------------------- */

xkv_status xkv_cross_stage_open(xkv_ctx *ctx, const xkv_entry *entry, xkv_cross_stage *stage)
{
    const xkv_group *g = entry->c.groups;
    const xkv_cross_basis *b;

    if (entry->c.group_count == 0 || !xkv_group_is_cross(g))
        return XKV_OK;
    if (!entry->dict)
        return xkv_dict_missing(ctx, entry);
    b = entry->dict->cross;
    if (!b || b->rank < g->rank)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT,
                        "group 0: the dictionary has no cross stage, or one of fewer than %u components [Q6]", g->rank);
    XKV_TRY(xkv_side_read(ctx, entry, g, &stage->side));
    stage->g = g;
    stage->cross = (xkv_cross){.basis = b,
                               .rank = g->rank,
                               .tables = stage->side.tables,
                               .step = stage->side.step,
                               .coded = stage->side.coded,
                               .coded_tables = stage->side.coded_tables};
    return XKV_OK;
}

xkv_status xkv_cross_stage_keep(xkv_ctx *ctx, const xkv_entry *entry, uint32_t first, uint32_t last,
                                xkv_cross_stage *stage)
{
    return stage->g ? alloc_kept(ctx, &entry->c, first, last, stage->cross.coded, &stage->kept) : XKV_OK;
}

void xkv_cross_stage_free(xkv_ctx *ctx, xkv_cross_stage *stage)
{
    xkv_side_free(ctx, &stage->side);
    xkv_release(ctx, stage->kept.q);
    *stage = (xkv_cross_stage){0};
}

/* --- Bases -------------------------------------------------------------------------------------------------------- */

static xkv_status corrupt_factor(const xkv_group_reader *r, uint32_t part, const char *what)
{
    return xkv_fail(r->ctx, XKV_ERROR_CORRUPT, "%s: %s [D3]", name_part(r->entry, r->g, part).text, what);
}

static xkv_status check_components(const xkv_group_reader *r, const uint8_t *matrix)
{
    size_t elements = (size_t)r->g->rank * r->g->width;

    if (!r->kernels->all_finite(XKV_F16, matrix, elements))
        return corrupt_factor(r, XKV_PART_COMPONENTS, "a component is not finite");
    for (size_t i = 0; i < r->g->rank; i++) {
        float scale = xkv_loadf32(matrix + 2 * elements + 4 * i);
        if (!isfinite(scale) || scale < 0)
            return corrupt_factor(r, XKV_PART_COMPONENTS, "a scale is negative or not finite");
    }
    return XKV_OK;
}

xkv_status xkv_read_components(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, uint8_t **matrix_p)
{
    const xkv_group_reader r = {.ctx = ctx, .kernels = xkv_kernels_cpu(), .entry = entry, .g = g};
    uint8_t *matrix = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(read_matrix(&r, XKV_PART_COMPONENTS, &matrix));
    XKV_TRY_GOTO(check_components(&r, matrix), out);
    *matrix_p = matrix;
    matrix = NULL;
out:
    xkv_release(ctx, matrix);
    return status;
}

/* Components of codec svd in f32, times their scales: matrix holds them in f16, then the scales. */
static void scale_components(const xkv_group_reader *r, const uint8_t *matrix, float *row)
{
    size_t rank = r->g->rank, width = r->g->width;

    for (size_t i = 0; i < rank; i++) {
        float scale = xkv_loadf32(matrix + 2 * rank * width + 4 * i);
        r->kernels->to_f32(XKV_F16, matrix + 2 * i * width, row, width);
        for (size_t k = 0; k < width; k++)
            row[k] *= scale;
        xkv_panels_set(&r->components, i, 1, row);
    }
}

static xkv_status load_components(xkv_group_reader *r)
{
    uint8_t *matrix = NULL;
    float *row = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(xkv_read_components(r->ctx, r->entry, r->g, &matrix));
    XKV_TRY_GOTO(XKV_NEW(r->ctx, r->g->width, &row), out);
    XKV_TRY_GOTO(xkv_panels_create(r->ctx, r->kernels, r->g->rank, r->g->width, &r->components), out);
    scale_components(r, matrix, row);
    r->transform = (xkv_transform){.rank = r->g->rank, .width = r->g->width, .basis = &r->components};
out:
    xkv_release(r->ctx, row);
    xkv_release(r->ctx, matrix);
    return status;
}

/* The dictionary's basis for this group [Q5, Q6]. */
static xkv_status find_basis(xkv_group_reader *r)
{
    const xkv_basis *b;

    if (!r->entry->dict)
        return xkv_dict_missing(r->ctx, r->entry);
    b = xkv_dict_basis(r->entry->dict, &r->entry->c.geometry, r->g);
    if (!b || b->rank < r->g->rank)
        return xkv_fail(r->ctx, XKV_ERROR_CORRUPT,
                        "group %u: the dictionary has no such planes, or fewer than %u components [Q6]",
                        (unsigned)(r->g - r->entry->c.groups), r->g->rank);
    r->transform = xkv_transform_of_basis(b);
    r->transform.rank = r->g->rank;
    return XKV_OK;
}

static xkv_status load_side(xkv_group_reader *r)
{
    const xkv_geometry *geometry = &r->entry->c.geometry;
    const xkv_group *g = r->g;
    part_name where = name_part(r->entry, g, XKV_PART_COMPONENTS);
    const uint8_t *scales;

    XKV_TRY(xkv_side_read(r->ctx, r->entry, g, &r->side));
    scales = r->side.bytes + 8;
    if (g->codec == XKV_GROUP_SCALAR) {
        XKV_TRY(xkv_scalar_parse(r->ctx, geometry, g, scales, scales + 4ull * g->plane_count, where.text, &r->scalar));
        r->transform = xkv_transform_of_scalar(&r->scalar);
    } else if (g->codec == XKV_GROUP_SVDQ) {
        XKV_TRY(xkv_svdq_parse(r->ctx, geometry, g, r->side.bytes, g->parts[XKV_PART_COMPONENTS].size, where.text,
                               &r->svdq));
        r->transform = xkv_transform_of_svdq_basis(&r->svdq);
    } else {
        XKV_TRY(find_basis(r));
    }
    return XKV_OK;
}

xkv_status xkv_group_reader_open(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, xkv_cross_stage *cross,
                                 xkv_group_reader *r)
{
    xkv_status status = XKV_OK;

    *r = (xkv_group_reader){.ctx = ctx, .kernels = xkv_kernels_cpu(), .entry = entry, .g = g};
    r->cross = cross && cross->g ? cross : NULL;
    if (xkv_group_is_coded(g))
        status = load_side(r);
    else if (g->codec == XKV_GROUP_SVD)
        status = load_components(r);
    if (status != XKV_OK)
        xkv_group_reader_close(r);
    return status;
}

static xkv_status choose_columns(xkv_group_reader *r, xkv_heads heads)
{
    uint32_t column = 0;

    r->column_count = heads.count == 0 ? 1 : r->g->plane_count;
    XKV_TRY(XKV_NEW(r->ctx, r->column_count, &r->columns));
    if (heads.count == 0) {
        r->columns[0] = (xkv_columns){0, r->g->width};
        return XKV_OK;
    }
    for (uint32_t i = 0; i < r->g->plane_count; i++) {
        const xkv_plane *p = &r->entry->c.geometry.planes[r->g->planes[i]];
        uint32_t at;
        xkv_plane part = xkv_plane_heads(p, heads, &at);
        r->columns[i] = (xkv_columns){column + at, xkv_plane_width(&part)};
        column += xkv_plane_width(p);
    }
    return XKV_OK;
}

xkv_status xkv_group_reader_for_rows(xkv_group_reader *r, xkv_heads heads)
{
    XKV_TRY(choose_columns(r, heads));
    if (r->g->codec == XKV_GROUP_SVD)
        return xkv_synthesis_create_plain(r->ctx, &r->transform, &r->synthesis);
    if (!xkv_group_is_coded(r->g))
        return XKV_OK;
    return xkv_synthesis_create(r->ctx, &r->transform, r->side.tables, r->side.step, r->cross ? &r->cross->cross : NULL,
                                &r->synthesis);
}

void xkv_group_reader_close(xkv_group_reader *r)
{
    xkv_release(r->ctx, r->columns);
    xkv_panels_free(r->ctx, &r->components);
    xkv_release(r->ctx, r->kept.q);
    xkv_side_free(r->ctx, &r->side);
    xkv_scalar_free(r->ctx, &r->scalar);
    xkv_svdq_basis_free(r->ctx, &r->svdq);
    xkv_synthesis_free(r->ctx, &r->synthesis);
    *r = (xkv_group_reader){0};
}

xkv_status xkv_read_exact_rows(const xkv_group_reader *r, uint8_t **rows)
{
    return read_matrix(r, XKV_PART_EXACT, rows);
}

/* --- Chunks ------------------------------------------------------------------------------------------------------- */

bool xkv_group_uses_cross(const xkv_group_reader *r)
{
    if (r->cross && xkv_group_is_cross(r->g)) /* the stage's own chunks are read even when nothing is coded */
        return true;
    return r->cross && r->cross->cross.coded > 0 && r->transform.top > 0;
}

xkv_status xkv_chunk_scratch_size(const xkv_group_reader *r, bool integers, xkv_chunk_scratch *s)
{
    const xkv_container *c = &r->entry->c;
    size_t chunk = (size_t)xkv_min64(c->chunk_tokens, c->geometry.token_count);
    uint64_t raw = 0, packed = 0;

    xkv_chunk_scratch_empty(r->ctx, s);
    for (uint32_t i = 0; i < c->chunk_count; i++) {
        uint32_t part = XKV_PART_CHUNKS + i;
        xkv_shape shape = xkv_part_shape(c, r->g, part);
        raw = xkv_max64(raw, shape.coded ? 0 : xkv_shape_bytes(shape));
        packed = xkv_max64(packed, r->g->parts[part].size);
        if (!integers && xkv_group_uses_cross(r)) /* xkv_chunk_visit() reads both */
            packed = xkv_max64(packed, r->cross->g->parts[part].size);
    }
    XKV_TRY(XKV_NEW(r->ctx, (size_t)packed, &s->packed));
    XKV_TRY(XKV_NEW(r->ctx, (size_t)raw, &s->planes));
    XKV_TRY(XKV_NEW(r->ctx, (size_t)raw, &s->raw));
    if (!integers)
        return XKV_OK;
    if (!r->kept.q)
        XKV_TRY(XKV_NEW(r->ctx, chunk * r->side.coded, &s->q));
    if (xkv_group_is_cross(r->g) && !r->cross->kept.q)
        XKV_TRY(XKV_NEW(r->ctx, chunk * r->cross->cross.coded, &s->cross_q));
    if (r->g->codec == XKV_GROUP_SVD)
        XKV_TRY(XKV_NEW(r->ctx, (size_t)XKV_CHUNK_ROWS * r->g->rank, &s->coefficients));
    return r->synthesis.t ? XKV_NEW(r->ctx, xkv_synthesis_scratch(&r->synthesis, XKV_CHUNK_ROWS), &s->synthesis)
                          : XKV_OK;
}

void xkv_chunk_scratch_empty(xkv_ctx *ctx, xkv_chunk_scratch *s)
{
    xkv_release(ctx, s->packed);
    xkv_release(ctx, s->planes);
    xkv_release(ctx, s->raw);
    xkv_release(ctx, s->q);
    xkv_release(ctx, s->cross_q);
    xkv_release(ctx, s->coefficients);
    xkv_release(ctx, s->synthesis);
    *s = (xkv_chunk_scratch){.zstd = s->zstd};
}

void xkv_chunk_scratch_free(xkv_ctx *ctx, xkv_chunk_scratch *s)
{
    xkv_chunk_scratch_empty(ctx, s);
    ZSTD_freeDCtx(s->zstd);
    s->zstd = NULL;
}

static xkv_status need_zstd(const xkv_group_reader *r, xkv_chunk_scratch *s)
{
    if (!s->zstd)
        s->zstd = ZSTD_createDCtx();
    return s->zstd ? XKV_OK : xkv_fail(r->ctx, XKV_ERROR_MEMORY, "zstd: no memory for a context");
}

/* The matrix of a chunk's part: in s->raw, or for stored parts where it was read to. */
static xkv_status load_matrix(const xkv_group_reader *r, xkv_chunk_scratch *s, uint32_t part, const uint8_t **matrix)
{
    const xkv_container *c = &r->entry->c;
    const xkv_part *p = &r->g->parts[part];

    XKV_TRY(xkv_container_read_part(r->ctx, &r->entry->input, c, p, s->packed));
    *matrix = s->packed;
    if (p->method != XKV_METHOD_ZSTD)
        return XKV_OK;
    XKV_TRY(need_zstd(r, s));
    *matrix = s->raw;
    return xkv_part_decode(r->ctx, r->kernels, s->zstd, xkv_part_shape(c, r->g, part), s->packed, p->size, s->planes,
                           s->raw, name_part(r->entry, r->g, part).text);
}

xkv_status xkv_chunk_load_planes(const xkv_group_reader *r, xkv_chunk_scratch *s, uint32_t chunk, uint8_t *to)
{
    const xkv_container *c = &r->entry->c;
    uint32_t part = XKV_PART_CHUNKS + chunk;
    const xkv_part *p = &r->g->parts[part];

    if (p->method != XKV_METHOD_ZSTD)
        return xkv_container_read_part(r->ctx, &r->entry->input, c, p, to);
    XKV_TRY(xkv_container_read_part(r->ctx, &r->entry->input, c, p, s->packed));
    XKV_TRY(need_zstd(r, s));
    return xkv_part_planes(r->ctx, s->zstd, xkv_part_shape(c, r->g, part), s->packed, p->size, to,
                           name_part(r->entry, r->g, part).text);
}

static xkv_status load_svd_chunk(const xkv_group_reader *r, xkv_chunk_scratch *s, uint32_t part, xkv_chunk *out)
{
    XKV_TRY(load_matrix(r, s, part, &out->matrix));
    if (!r->kernels->all_finite(XKV_F16, out->matrix, (size_t)(out->t1 - out->t0) * r->g->rank))
        return corrupt_factor(r, part, "a coefficient is not finite");
    return XKV_OK;
}

static xkv_status load_integers(const xkv_group_reader *r, xkv_chunk_scratch *s, uint32_t chunk, xkv_chunk *out)
{
    const xkv_container *c = &r->entry->c;
    uint32_t tokens = out->t1 - out->t0;
    int16_t *own, *stage = NULL;

    if (xkv_group_uses_cross(r))
        stage = kept_integers(c, &r->cross->kept, r->cross->cross.coded, out->t0, s->cross_q);
    out->cross = (xkv_integers){stage, tokens};
    if (xkv_group_is_cross(r->g))
        return xkv_side_integers(r->ctx, r->entry, r->g, &r->cross->side, chunk, s->packed, stage);
    own = kept_integers(c, &r->kept, r->side.coded, out->t0, s->q);
    out->own = (xkv_integers){own, tokens};
    return r->kept.q ? XKV_OK : xkv_side_integers(r->ctx, r->entry, r->g, &r->side, chunk, s->packed, own);
}

xkv_status xkv_chunk_load(const xkv_group_reader *r, xkv_chunk_scratch *s, uint32_t chunk, xkv_chunk *out)
{
    const xkv_container *c = &r->entry->c;

    *out = (xkv_chunk){0};
    if (r->g->codec == XKV_GROUP_LOSSLESS) {
        xkv_chunk_tokens(c, chunk, &out->t0, &out->t1);
        return load_matrix(r, s, XKV_PART_CHUNKS + chunk, &out->matrix);
    }
    xkv_chunk_coded(c, chunk, &out->t0, &out->t1);
    if (out->t0 == out->t1)
        return XKV_OK;
    if (r->g->codec == XKV_GROUP_SVD)
        return load_svd_chunk(r, s, XKV_PART_CHUNKS + chunk, out);
    return load_integers(r, s, chunk, out);
}

xkv_status xkv_group_reader_keep(xkv_group_reader *r, xkv_chunk_scratch *s, uint32_t first, uint32_t last)
{
    const xkv_container *c = &r->entry->c;

    XKV_TRY(alloc_kept(r->ctx, c, first, last, r->side.coded, &r->kept));
    for (uint32_t i = first; i <= last; i++) {
        uint32_t t0, t1;
        xkv_chunk_coded(c, i, &t0, &t1);
        if (t0 < t1)
            XKV_TRY(xkv_side_integers(r->ctx, r->entry, r->g, &r->side, i, s->packed,
                                      kept_integers(c, &r->kept, r->side.coded, t0, NULL)));
    }
    return XKV_OK;
}

xkv_status xkv_chunk_visit(const xkv_group_reader *r, const xkv_chunk_scratch *s, bool cross, uint32_t chunk,
                           int16_t *q, xkv_component_fn take, void *user)
{
    const xkv_group *g = cross ? r->cross->g : r->g;
    const xkv_side *side = cross ? &r->cross->side : &r->side;
    const xkv_part *part = &g->parts[XKV_PART_CHUNKS + chunk];
    part_name where = name_part(r->entry, g, XKV_PART_CHUNKS + chunk);
    xkv_rans_shape shape = {.components = side->coded, .tables = side->coded_tables};
    xkv_rans_reader reader;
    uint32_t t0, t1;

    xkv_chunk_coded(&r->entry->c, chunk, &t0, &t1);
    shape.tokens = t1 - t0;
    XKV_TRY(xkv_container_read_part(r->ctx, &r->entry->input, &r->entry->c, part, s->packed));
    XKV_TRY(xkv_rans_open(r->ctx, &shape, s->packed, part->size, where.text, &reader));
    for (uint32_t i = 0; shape.tokens > 0 && i < shape.components; i++) {
        XKV_TRY(xkv_rans_next(r->ctx, xkv_coder_cpu(), &shape, i, where.text, &reader, q));
        XKV_TRY(take(user, i, q));
    }
    return xkv_rans_close(r->ctx, &shape, where.text, &reader);
}

void xkv_chunk_own_rows(const xkv_group_reader *r, xkv_chunk_scratch *s, const xkv_chunk *chunk, uint32_t t0,
                        uint32_t t1, float *x)
{
    uint32_t from = t0 - chunk->t0, tokens = t1 - t0;
    size_t rank = r->g->rank;

    if (r->g->codec == XKV_GROUP_SVD) {
        r->kernels->to_f32(XKV_F16, chunk->matrix + from * rank * 2, s->coefficients, tokens * rank);
        xkv_synthesize_plain(&r->synthesis, s->coefficients, tokens, r->columns, r->column_count, s->synthesis, x);
    } else {
        xkv_synthesize_own(&r->synthesis, xkv_integers_from(chunk->own, from), tokens, r->columns, r->column_count,
                           s->synthesis, x);
    }
}

void xkv_chunk_add_cross(const xkv_group_reader *r, xkv_chunk_scratch *s, const xkv_chunk *chunk, uint32_t t0,
                         uint32_t t1, float *x)
{
    if (r->synthesis.top > 0)
        xkv_synthesize_cross(&r->synthesis, xkv_integers_from(chunk->cross, t0 - chunk->t0), t1 - t0, r->columns,
                             r->column_count, s->synthesis, x);
}
