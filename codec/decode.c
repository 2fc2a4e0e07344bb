#include "dict.h"
#include "entry_internal.h"
#include "moves.h"
#include "parts.h"
#include "scalar.h"
#include "svdq.h"

#include <math.h>
#include <stdio.h>

/* Integers of the cross stage that are kept over the groups: 32 MiB. */
#define MAX_KEPT_INTEGERS (16u << 20)

/* What one thread needs to decode chunks of the group at hand. */
typedef struct worker {
    ZSTD_DCtx *zstd;
    uint8_t *packed, *planes, *raw; /* of the largest part */
    float *coefficients;            /* [XKV_TILE_ROWS][rank] */
    float *rows;                    /* [XKV_TILE_ROWS][width] */
    int16_t *q, *cross_q;           /* [coded][chunk_tokens] of the group, and of the cross stage unless kept */
    xkv_rotator rotator;
    xkv_rotator mover; /* of exact rows, when positions are asked for */
} worker;

/* The side part of a coded group, checked. */
typedef struct side_part {
    uint8_t *bytes;
    float step;
    const uint8_t *tables; /* [rank], in `bytes` */
    uint8_t *coded_tables; /* [coded] without zeros */
    uint32_t coded;
} side_part;

typedef struct decoder {
    xkv_ctx *ctx;
    const xkv_kernels *kernels;
    const xkv_entry *entry;
    const xkv_container *c;
    const xkv_view *views; /* NULL: check only */
    uint32_t first, end;   /* tokens asked for */
    xkv_moves moves;
    xkv_pool *pool;
    uint32_t threads;
    worker *workers; /* [threads] */
    const xkv_group *g;
    uint32_t group; /* its index */
    uint32_t first_chunk;
    float *components; /* svd: [rank][width], times their scales */

    /* Groups of codec dict, scalar and svdq */
    side_part side;
    xkv_scalar scalar;
    xkv_svdq_basis svdq;
    xkv_transform transform;
    xkv_synthesis synthesis;

    /* The cross stage of the entry, for all groups */
    const xkv_group *cross_group; /* NULL: none */
    side_part cross_side;
    xkv_cross cross;
    int16_t *kept;  /* its integers in the asked chunks, [coded][chunk_tokens] each; NULL: decoded for every group */
    uint8_t *known; /* chunks that `kept` holds */
} decoder;

/* --- Parts -------------------------------------------------------------------------------------------------------- */

/* Where a part lies, for messages. */
typedef struct part_name {
    char text[96];
} part_name;

static part_name name_part_of(const decoder *d, const xkv_group *g, uint32_t part)
{
    part_name name;

    (void)snprintf(name.text, sizeof name.text, "offset %llu, group %u, part %u",
                   (unsigned long long)(d->c->payload_offset + g->parts[part].offset), (unsigned)(g - d->c->groups),
                   part);
    return name;
}

static part_name name_part(const decoder *d, uint32_t part)
{
    return name_part_of(d, d->g, part);
}

/* The checked matrix of a part: in w->raw, or for stored parts where it was read to. */
static xkv_status load_part(decoder *d, worker *w, uint32_t part, const uint8_t **matrix)
{
    const xkv_part *p = &d->g->parts[part];
    xkv_shape shape = xkv_part_shape(d->c, d->g, part);

    XKV_TRY(xkv_container_read_part(d->ctx, &d->entry->input, d->c, p, w->packed));
    *matrix = w->packed;
    if (p->method != XKV_METHOD_ZSTD)
        return XKV_OK;
    *matrix = w->raw;
    return xkv_part_decode(d->ctx, d->kernels, w->zstd, shape, w->packed, p->size, w->planes, w->raw,
                           name_part(d, part).text);
}

/* --- Rows to views ------------------------------------------------------------------------------------------------ */

/* Exact rows of tokens [t0, t1) at other positions: what has a RoPE turns by the way between the two. */
static xkv_status scatter_moved(decoder *d, worker *w, const uint8_t *matrix, uint32_t t0, uint32_t t1)
{
    size_t elem = xkv_group_element_size(&d->c->geometry, d->g), width = d->g->width;

    for (uint32_t t = t0; t < t1; t++) {
        uint32_t row = t - d->first;
        size_t column = 0;
        d->kernels->to_f32(d->c->geometry.planes[d->g->planes[0]].dtype, matrix + (t - t0) * width * elem, w->rows,
                           width);
        XKV_TRY(xkv_rotate_rows(d->ctx, &w->mover, d->g, &d->moves.distances[row], 1, w->rows));
        for (uint32_t i = 0; i < d->g->plane_count; i++) {
            const xkv_plane *p = &d->c->geometry.planes[d->g->planes[i]];
            if (p->rope != XKV_NO_ROPE)
                xkv_view_scatter(d->kernels, w->rows + column, width, p, row, row + 1, &d->views[d->g->planes[i]]);
            column += xkv_plane_width(p);
        }
    }
    return XKV_OK;
}

/* Exact rows of tokens [t0, t1), as the engine holds them. */
static xkv_status scatter_exact(decoder *d, worker *w, const uint8_t *matrix, uint32_t t0, uint32_t t1)
{
    size_t elem = xkv_group_element_size(&d->c->geometry, d->g), row_bytes = d->g->width * elem, column = 0;

    for (uint32_t i = 0; d->views && i < d->g->plane_count; i++) {
        const xkv_plane *p = &d->c->geometry.planes[d->g->planes[i]];
        const xkv_view *view = &d->views[d->g->planes[i]];
        size_t width = xkv_plane_width(p);
        bool moved = d->moves.distances && p->rope != XKV_NO_ROPE;
        if (view->dtype == p->dtype && !moved)
            xkv_view_scatter_bytes(matrix + column, row_bytes, p, t0 - d->first, t1 - d->first, view);
        for (uint32_t t = t0; view->dtype != p->dtype && !moved && t < t1; t++) {
            d->kernels->to_f32(p->dtype, matrix + (t - t0) * row_bytes + column, w->rows, width);
            xkv_view_scatter(d->kernels, w->rows, width, p, t - d->first, t - d->first + 1, view);
        }
        column += width * elem;
    }
    return d->views && d->moves.distances ? scatter_moved(d, w, matrix, t0, t1) : XKV_OK;
}

/* Tokens [*t0, *t1) cut to those asked for; false when none is left. */
static bool cut_range(const decoder *d, uint32_t *t0, uint32_t *t1)
{
    if (*t0 < d->first)
        *t0 = d->first;
    if (*t1 > d->end)
        *t1 = d->end;
    return *t0 < *t1;
}

/* Rows t0 .. t1-1 of a matrix whose first row is token `base`. */
static xkv_status scatter_asked(decoder *d, worker *w, const uint8_t *matrix, uint32_t base, uint32_t t0, uint32_t t1)
{
    size_t row_bytes = (size_t)xkv_group_row_bytes(&d->c->geometry, d->g, 1);

    if (!cut_range(d, &t0, &t1))
        return XKV_OK;
    return scatter_exact(d, w, matrix + (t0 - base) * row_bytes, t0, t1);
}

/* --- svd ---------------------------------------------------------------------------------------------------------- */

static xkv_status corrupt_factor(const decoder *d, uint32_t part, const char *what)
{
    return xkv_fail(d->ctx, XKV_ERROR_CORRUPT, "%s: %s [D3]", name_part(d, part).text, what);
}

static xkv_status load_components(decoder *d)
{
    size_t rank = d->g->rank, width = d->g->width;
    const uint8_t *matrix, *scales;

    XKV_TRY(XKV_NEW(d->ctx, rank * width, &d->components));
    XKV_TRY(load_part(d, &d->workers[0], XKV_PART_COMPONENTS, &matrix));
    if (!d->kernels->all_finite(XKV_F16, matrix, rank * width))
        return corrupt_factor(d, XKV_PART_COMPONENTS, "a component is not finite");
    d->kernels->to_f32(XKV_F16, matrix, d->components, rank * width);
    scales = matrix + rank * width * 2;
    for (size_t i = 0; i < rank; i++) {
        float scale = xkv_loadf32(scales + 4 * i);
        if (!isfinite(scale) || scale < 0)
            return corrupt_factor(d, XKV_PART_COMPONENTS, "a scale is negative or not finite");
        for (size_t k = 0; k < width; k++)
            d->components[i * width + k] *= scale;
    }
    return XKV_OK;
}

static xkv_status load_exact_rows(decoder *d)
{
    const xkv_container *c = d->c;
    const uint8_t *matrix;
    size_t elem = xkv_group_element_size(&c->geometry, d->g);

    if (c->sinks + c->window == 0)
        return XKV_OK;
    XKV_TRY(load_part(d, &d->workers[0], XKV_PART_EXACT, &matrix));
    XKV_TRY(scatter_asked(d, &d->workers[0], matrix, 0, 0, c->sinks));
    return scatter_asked(d, &d->workers[0], matrix + (size_t)c->sinks * d->g->width * elem,
                         c->geometry.token_count - c->window, c->geometry.token_count - c->window,
                         c->geometry.token_count);
}

/* Of tokens [t0, t1), whose rows are in w->rows, those asked for: rotate, round, store. */
static xkv_status finish_tile(decoder *d, worker *w, uint32_t t0, uint32_t t1)
{
    size_t width = d->g->width, column = 0;
    uint32_t first = t0;
    float *rows;

    if (!cut_range(d, &first, &t1))
        return XKV_OK;
    rows = w->rows + (first - t0) * width;
    XKV_TRY(xkv_rotate_rows(d->ctx, &w->rotator, d->g, d->moves.positions + (first - d->first), t1 - first, rows));
    for (uint32_t i = 0; d->views && i < d->g->plane_count; i++) {
        const xkv_plane *p = &d->c->geometry.planes[d->g->planes[i]];
        xkv_view_scatter(d->kernels, rows + column, width, p, first - d->first, t1 - d->first,
                         &d->views[d->g->planes[i]]);
        column += xkv_plane_width(p);
    }
    return XKV_OK;
}

/* The next tile of a chunk, tokens [*t0, *t1), of which some are asked for; false: no more. Tiles start at the first
 * coded token of the chunk and are computed whole, so that the bits of a row do not depend on the range asked for: a
 * GEMM may round a row differently in a matrix of another height. */
static bool next_tile(const decoder *d, uint32_t end, uint32_t *t0, uint32_t *t1)
{
    for (*t0 = *t1; *t0 < xkv_min64(end, d->end); *t0 = *t1) {
        *t1 = (uint32_t)xkv_min64(end, (uint64_t)*t0 + XKV_TILE_ROWS);
        if (*t1 > d->first)
            return true;
    }
    return false;
}

/* One tile: coefficients times components. */
static xkv_status restore_tile(decoder *d, worker *w, const uint8_t *coefficients, uint32_t t0, uint32_t t1)
{
    size_t width = d->g->width, rank = d->g->rank, rows = t1 - t0;

    d->kernels->to_f32(XKV_F16, coefficients, w->coefficients, rows * rank);
    d->kernels->gemm_nn(rows, width, rank, w->coefficients, rank, d->components, width, 0, w->rows, width);
    return finish_tile(d, w, t0, t1);
}

static xkv_status restore_svd_chunk(decoder *d, worker *w, uint32_t chunk)
{
    uint32_t base, t0, t1, end, rank = d->g->rank;
    const uint8_t *matrix;

    xkv_chunk_coded(d->c, chunk, &base, &end);
    if (base == end)
        return XKV_OK;
    XKV_TRY(load_part(d, w, XKV_PART_CHUNKS + chunk, &matrix));
    if (!d->kernels->all_finite(XKV_F16, matrix, (size_t)(end - base) * rank))
        return corrupt_factor(d, XKV_PART_CHUNKS + chunk, "a coefficient is not finite");
    for (t1 = base; next_tile(d, end, &t0, &t1);)
        XKV_TRY(restore_tile(d, w, matrix + (size_t)(t0 - base) * rank * 2, t0, t1));
    return XKV_OK;
}

/* --- dict, scalar and svdq ---------------------------------------------------------------------------------------- */

static xkv_status check_tables(const decoder *d, const xkv_group *g, side_part *side)
{
    side->coded = 0;
    XKV_TRY(XKV_NEW(d->ctx, g->rank, &side->coded_tables));
    for (uint32_t i = 0; i < g->rank; i++) {
        if (side->tables[i] > XKV_TABLE_MAX)
            return xkv_fail(d->ctx, XKV_ERROR_CORRUPT, "%s: table of component %u is %u, expected at most %u [Q4]",
                            name_part_of(d, g, XKV_PART_COMPONENTS).text, i, side->tables[i], XKV_TABLE_MAX);
        if (side->tables[i] != 0)
            side->coded_tables[side->coded++] = side->tables[i];
    }
    return XKV_OK;
}

/* The side part of svdq is no matrix: a stream follows its arrays. */
static xkv_status read_side_bytes(const decoder *d, const xkv_group *g, const char *where, uint8_t **bytes)
{
    const xkv_part *part = &g->parts[XKV_PART_COMPONENTS];

    if (g->codec != XKV_GROUP_SVDQ)
        return xkv_read_matrix(d->ctx, &d->entry->input, d->c, g, XKV_PART_COMPONENTS, where, bytes);
    XKV_TRY(XKV_NEW(d->ctx, (size_t)part->size, bytes));
    return xkv_container_read_part(d->ctx, &d->entry->input, d->c, part, *bytes);
}

/* Step and tables: what all codecs have in their side part. */
static xkv_status read_side(const decoder *d, const xkv_group *g, side_part *side)
{
    part_name where = name_part_of(d, g, XKV_PART_COMPONENTS);

    XKV_TRY(read_side_bytes(d, g, where.text, &side->bytes));
    side->step = xkv_loadf32(side->bytes);
    if (!isfinite(side->step) || side->step <= 0 || xkv_load32(side->bytes + 4) != 0)
        return xkv_fail(d->ctx, XKV_ERROR_CORRUPT, "%s: step is %g, expected finite and positive, then zeros [Q3]",
                        where.text, (double)side->step);
    side->tables = side->bytes + 8;
    if (g->codec == XKV_GROUP_SCALAR)
        side->tables += 4ull * g->plane_count + 2ull * g->width;
    if (g->codec == XKV_GROUP_SVDQ)
        side->tables = side->bytes + xkv_svdq_side(g).tables;
    return check_tables(d, g, side);
}

static void free_side(const decoder *d, side_part *side)
{
    xkv_release(d->ctx, side->bytes);
    xkv_release(d->ctx, side->coded_tables);
    *side = (side_part){0};
}

/* The dictionary's basis for this group [Q5, Q6]. */
static xkv_status find_basis(decoder *d)
{
    const xkv_basis *b;

    if (!d->entry->dict)
        return xkv_dict_missing(d->ctx, d->entry);
    b = xkv_dict_basis(d->entry->dict, &d->c->geometry, d->g);
    if (!b || b->rank < d->g->rank)
        return xkv_fail(d->ctx, XKV_ERROR_CORRUPT,
                        "group %u: the dictionary has no such planes, or fewer than %u components [Q6]", d->group,
                        d->g->rank);
    d->transform = xkv_transform_of_basis(b);
    d->transform.rank = d->g->rank;
    return XKV_OK;
}

/* The cross stage, which groups of codec dict are decoded with, if the entry has one. */
static xkv_status load_cross(decoder *d)
{
    const xkv_cross_basis *b;

    if (!xkv_group_is_cross(&d->c->groups[0]))
        return XKV_OK;
    d->cross_group = &d->c->groups[0];
    if (!d->entry->dict)
        return xkv_dict_missing(d->ctx, d->entry);
    b = d->entry->dict->cross;
    if (!b || b->rank < d->cross_group->rank)
        return xkv_fail(d->ctx, XKV_ERROR_CORRUPT,
                        "group 0: the dictionary has no cross stage, or one of fewer than %u components [Q6]",
                        d->cross_group->rank);
    XKV_TRY(read_side(d, d->cross_group, &d->cross_side));
    d->cross = (xkv_cross){.basis = b,
                           .rank = d->cross_group->rank,
                           .tables = d->cross_side.tables,
                           .step = d->cross_side.step,
                           .coded = d->cross_side.coded,
                           .coded_tables = d->cross_side.coded_tables};
    return XKV_OK;
}

static xkv_status load_side(decoder *d)
{
    part_name where = name_part(d, XKV_PART_COMPONENTS);
    const uint8_t *scales;

    XKV_TRY(read_side(d, d->g, &d->side));
    scales = d->side.bytes + 8;
    if (d->g->codec == XKV_GROUP_SCALAR) {
        XKV_TRY(xkv_scalar_parse(d->ctx, &d->c->geometry, d->g, scales, scales + 4ull * d->g->plane_count, where.text,
                                 &d->scalar));
        d->transform = xkv_transform_of_scalar(&d->scalar);
    } else if (d->g->codec == XKV_GROUP_SVDQ) {
        XKV_TRY(xkv_svdq_parse(d->ctx, &d->c->geometry, d->g, d->side.bytes, d->g->parts[XKV_PART_COMPONENTS].size,
                               where.text, &d->svdq));
        d->transform = xkv_transform_of_svdq_basis(&d->svdq);
    } else {
        XKV_TRY(find_basis(d));
    }
    return xkv_synthesis_create(d->ctx, &d->transform, d->side.tables, d->side.step, d->cross_group ? &d->cross : NULL,
                                &d->synthesis);
}

/* The integers of a chunk of `g`, for its `tokens` coded tokens. */
static xkv_status decode_integers(const decoder *d, const worker *w, const xkv_group *g, uint32_t chunk,
                                  uint32_t tokens, const uint8_t *coded_tables, uint32_t coded, int16_t *q)
{
    const xkv_part *part = &g->parts[XKV_PART_CHUNKS + chunk];
    xkv_rans_shape shape = {tokens, coded, tokens, coded_tables};

    XKV_TRY(xkv_container_read_part(d->ctx, &d->entry->input, d->c, part, w->packed));
    return xkv_rans_decode(d->ctx, xkv_coder_cpu(), &shape, w->packed, part->size,
                           name_part_of(d, g, XKV_PART_CHUNKS + chunk).text, q);
}

/* Every group needs the integers of the stage: keep them where they are not many. */
static xkv_status keep_cross(decoder *d)
{
    uint64_t chunks = (d->end - 1) / d->c->chunk_tokens - d->first_chunk + 1;
    uint64_t count = chunks * d->c->chunk_tokens * d->cross.coded;

    if (count == 0 || count > MAX_KEPT_INTEGERS)
        return XKV_OK;
    XKV_TRY(XKV_NEW(d->ctx, (size_t)count, &d->kept));
    return XKV_NEW_ZERO(d->ctx, (size_t)chunks, &d->known);
}

/* Integers of the cross stage in a chunk that has coded tokens. A chunk is one task of a group, and groups come one
 * after the other. */
static xkv_status decode_cross(const decoder *d, const worker *w, uint32_t chunk, const int16_t **q_p)
{
    size_t index = chunk - d->first_chunk;
    int16_t *q = d->kept ? d->kept + index * d->c->chunk_tokens * d->cross.coded : w->cross_q;
    uint32_t t0, t1;

    *q_p = q;
    if (d->known && d->known[index])
        return XKV_OK;
    xkv_chunk_coded(d->c, chunk, &t0, &t1);
    XKV_TRY(decode_integers(d, w, d->cross_group, chunk, t1 - t0, d->cross.coded_tables, d->cross.coded, q));
    if (d->known)
        d->known[index] = 1;
    return XKV_OK;
}

/* Only to check it. */
static xkv_status check_cross_chunk(const decoder *d, const worker *w, uint32_t chunk)
{
    const int16_t *q;
    uint32_t t0, t1;

    xkv_chunk_coded(d->c, chunk, &t0, &t1);
    return t0 == t1 ? XKV_OK : decode_cross(d, w, chunk, &q);
}

static xkv_status restore_coded_chunk(decoder *d, worker *w, uint32_t chunk)
{
    const side_part *side = &d->side;
    xkv_integers own = {w->q, 0}, cross = {NULL, 0};
    uint32_t base, t0, t1, end;

    xkv_chunk_coded(d->c, chunk, &base, &end);
    if (base == end)
        return XKV_OK;
    own.stride = cross.stride = end - base;
    XKV_TRY(decode_integers(d, w, d->g, chunk, end - base, side->coded_tables, side->coded, w->q));
    if (d->synthesis.top > 0)
        XKV_TRY(decode_cross(d, w, chunk, &cross.q));
    for (t1 = base; next_tile(d, end, &t0, &t1);) {
        xkv_synthesize(d->kernels, &d->synthesis, xkv_integers_from(own, t0 - base),
                       xkv_integers_from(cross, t0 - base), t1 - t0, w->coefficients, w->rows);
        XKV_TRY(finish_tile(d, w, t0, t1));
    }
    return XKV_OK;
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

static xkv_status restore_chunk(void *user, uint32_t index, uint64_t task)
{
    decoder *d = user;
    worker *w = &d->workers[index];
    uint32_t chunk = d->first_chunk + (uint32_t)task, t0, t1;
    const uint8_t *matrix;

    if (d->g->codec == XKV_GROUP_SVD)
        return restore_svd_chunk(d, w, chunk);
    if (xkv_group_is_cross(d->g))
        return check_cross_chunk(d, w, chunk);
    if (d->g->codec != XKV_GROUP_LOSSLESS)
        return restore_coded_chunk(d, w, chunk);
    xkv_chunk_tokens(d->c, chunk, &t0, &t1);
    XKV_TRY(load_part(d, w, XKV_PART_CHUNKS + chunk, &matrix));
    return scatter_asked(d, w, matrix, t0, t0, t1);
}

/* Scratch for the group at hand, in every thread. */
static xkv_status size_workers(decoder *d)
{
    uint64_t raw = 0, packed = 0, chunk = xkv_min64(d->c->chunk_tokens, d->c->geometry.token_count);
    size_t coefficients = (size_t)XKV_TILE_ROWS * d->g->rank;

    for (uint32_t i = 0; i < d->g->part_count; i++) {
        xkv_shape s = xkv_part_shape(d->c, d->g, i);
        raw = xkv_max64(raw, s.coded ? 0 : xkv_shape_bytes(s));
        packed = xkv_max64(packed, d->g->parts[i].size);
        if (d->cross_group)
            packed = xkv_max64(packed, d->cross_group->parts[i].size);
    }
    if (d->synthesis.t)
        coefficients = xkv_synthesis_scratch(&d->synthesis, XKV_TILE_ROWS);
    for (uint32_t i = 0; i < d->threads; i++) {
        worker *w = &d->workers[i];
        XKV_TRY(XKV_NEW(d->ctx, (size_t)packed, &w->packed));
        XKV_TRY(XKV_NEW(d->ctx, (size_t)raw, &w->planes));
        XKV_TRY(XKV_NEW(d->ctx, (size_t)raw, &w->raw));
        XKV_TRY(XKV_NEW(d->ctx, coefficients, &w->coefficients));
        XKV_TRY(XKV_NEW(d->ctx, (size_t)XKV_TILE_ROWS * d->g->width, &w->rows));
        XKV_TRY(XKV_NEW(d->ctx, (size_t)chunk * d->side.coded, &w->q));
        XKV_TRY(XKV_NEW(d->ctx, d->kept ? 0 : (size_t)chunk * d->cross.coded, &w->cross_q));
    }
    return XKV_OK;
}

static void release_workers(decoder *d)
{
    for (uint32_t i = 0; i < d->threads; i++) {
        worker *w = &d->workers[i];
        xkv_release(d->ctx, w->packed);
        xkv_release(d->ctx, w->planes);
        xkv_release(d->ctx, w->raw);
        xkv_release(d->ctx, w->coefficients);
        xkv_release(d->ctx, w->rows);
        xkv_release(d->ctx, w->q);
        xkv_release(d->ctx, w->cross_q);
        w->q = w->cross_q = NULL;
        w->packed = w->planes = w->raw = NULL;
        w->coefficients = w->rows = NULL;
    }
    xkv_release(d->ctx, d->components);
    xkv_svdq_basis_free(d->ctx, &d->svdq);
    d->components = NULL;
    free_side(d, &d->side);
    xkv_synthesis_free(d->ctx, &d->synthesis);
    xkv_scalar_free(d->ctx, &d->scalar);
}

static bool is_coded(const xkv_group *g)
{
    return g->codec == XKV_GROUP_DICT || g->codec == XKV_GROUP_SCALAR || g->codec == XKV_GROUP_SVDQ;
}

static xkv_status restore_group(decoder *d, uint32_t group)
{
    uint32_t last_chunk = (d->end - 1) / d->c->chunk_tokens;
    xkv_status status = XKV_OK;

    d->group = group;
    d->g = &d->c->groups[group];
    if (d->views && xkv_group_is_cross(d->g)) /* it has no planes: those that follow decode it as they need it */
        return XKV_OK;
    if (is_coded(d->g))
        XKV_TRY_GOTO(load_side(d), out);
    XKV_TRY_GOTO(size_workers(d), out);
    if (d->g->codec == XKV_GROUP_SVD)
        XKV_TRY_GOTO(load_components(d), out);
    if (d->g->codec != XKV_GROUP_LOSSLESS)
        XKV_TRY_GOTO(load_exact_rows(d), out);
    XKV_TRY_GOTO(xkv_pool_run(d->ctx, d->pool, last_chunk - d->first_chunk + 1, restore_chunk, d), out);
out:
    release_workers(d);
    return status;
}

/* --- Entry point -------------------------------------------------------------------------------------------------- */

static xkv_status init(decoder *d)
{
    d->threads = xkv_ctx_threads(d->ctx);
    XKV_TRY(xkv_pool_create(d->ctx, d->threads, &d->pool));
    d->threads = xkv_pool_threads(d->pool);
    XKV_TRY(XKV_NEW_ZERO(d->ctx, d->threads, &d->workers));
    for (uint32_t i = 0; i < d->threads; i++) {
        XKV_TRY(xkv_rotator_init(d->ctx, &d->c->geometry, d->kernels, false, &d->workers[i].rotator));
        if (d->moves.distances)
            XKV_TRY(xkv_rotator_init(d->ctx, &d->moves.geometry, d->kernels, false, &d->workers[i].mover));
        d->workers[i].zstd = ZSTD_createDCtx();
        if (!d->workers[i].zstd)
            return xkv_fail(d->ctx, XKV_ERROR_MEMORY, "zstd: no memory for a context");
    }
    return XKV_OK;
}

static void fini(decoder *d)
{
    free_side(d, &d->cross_side);
    xkv_release(d->ctx, d->kept);
    xkv_release(d->ctx, d->known);
    for (uint32_t i = 0; d->workers && i < d->threads; i++) {
        if (d->workers[i].rotator.geometry)
            xkv_rotator_free(d->ctx, &d->workers[i].rotator);
        if (d->workers[i].mover.geometry)
            xkv_rotator_free(d->ctx, &d->workers[i].mover);
        ZSTD_freeDCtx(d->workers[i].zstd);
    }
    xkv_release(d->ctx, d->workers);
    xkv_moves_free(d->ctx, &d->moves);
    xkv_pool_free(d->ctx, d->pool);
}

static uint64_t asked_bytes(const decoder *d, const xkv_group *g)
{
    return xkv_group_row_bytes(&d->c->geometry, g, d->end - d->first);
}

static xkv_status restore_groups(decoder *d, const xkv_read_options *o)
{
    uint64_t done = 0, total = 0;
    uint32_t end = o->first_group + o->group_count;
    bool coded = false;

    for (uint32_t i = o->first_group; i < end; i++) {
        total += asked_bytes(d, &d->c->groups[i]);
        coded |= d->c->groups[i].codec == XKV_GROUP_DICT || (!d->views && xkv_group_is_cross(&d->c->groups[i]));
    }
    if (coded) {
        XKV_TRY(load_cross(d));
        XKV_TRY(keep_cross(d));
    }
    for (uint32_t i = o->first_group; i < end; i++) {
        XKV_TRY(xkv_check_cancel(d->ctx));
        XKV_TRY(restore_group(d, i));
        done += asked_bytes(d, &d->c->groups[i]);
        if ((o->group_ready && o->group_ready(o->group_ready_user, i) != 0) ||
            (o->progress && o->progress(o->progress_user, done, total) != 0))
            return xkv_fail(d->ctx, XKV_ERROR_CANCELLED, "stopped by a callback");
    }
    return XKV_OK;
}

/* Fill in what 0 stands for, and check the ranges. */
static xkv_status resolve(xkv_ctx *ctx, const xkv_entry *entry, uint32_t tokens, xkv_read_options *o)
{
    uint32_t groups = entry->c.group_count;

    if (o->first_token > tokens || o->token_count > tokens - o->first_token)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "tokens %u + %u are not within the %u of the entry", o->first_token,
                        o->token_count, tokens);
    if (o->first_group > groups || o->group_count > groups - o->first_group)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "groups %u + %u are not within the %u of the entry", o->first_group,
                        o->group_count, groups);
    if (o->token_count == 0)
        o->token_count = tokens - o->first_token;
    if (o->group_count == 0)
        o->group_count = groups - o->first_group;
    return XKV_OK;
}

xkv_status xkv_entry_decode_own(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                                const xkv_view *views)
{
    xkv_read_options o = xkv_read_options_default();
    decoder d = {.ctx = ctx, .kernels = xkv_kernels_cpu(), .entry = entry, .c = &entry->c, .views = views};
    xkv_status status;

    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(resolve(ctx, entry, entry->c.geometry.token_count, &o));
    if (o.token_count == 0 || o.group_count == 0)
        return XKV_OK;
    d.first = o.first_token;
    d.end = o.first_token + o.token_count;
    d.first_chunk = d.first / entry->c.chunk_tokens;
    XKV_TRY_GOTO(xkv_moves_create(ctx, &entry->c.geometry, entry->c.groups, &o, &d.moves), out);
    XKV_TRY_GOTO(init(&d), out);
    XKV_TRY_GOTO(restore_groups(&d, &o), out);
out:
    fini(&d);
    return status;
}

xkv_status xkv_entry_decode(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                            const xkv_view *views)
{
    xkv_read_options o = xkv_read_options_default();

    if (!entry->parent)
        return xkv_entry_decode_own(ctx, entry, options, views);
    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(resolve(ctx, entry, entry->geometry.token_count, &o));
    return o.token_count == 0 || o.group_count == 0 ? XKV_OK : xkv_extended_decode(ctx, entry, &o, views);
}

xkv_status xkv_entry_read(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options, const xkv_view *views)
{
    xkv_ctx_begin(ctx);
    if (!views)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "no views to restore into");
    return xkv_entry_decode(ctx, entry, options, views);
}

xkv_status xkv_entry_read_coding(xkv_ctx *ctx, const xkv_entry *entry, uint32_t group, xkv_group_coding *coding)
{
    const xkv_group *g = &entry->c.groups[group];
    const decoder d = {.ctx = ctx, .entry = entry, .c = &entry->c};
    side_part side = {0};
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    if (g->codec != XKV_GROUP_LOSSLESS && g->codec != XKV_GROUP_SVD)
        XKV_TRY_GOTO(read_side(&d, g, &side), out);
    *coding = (xkv_group_coding){.step = (double)side.step, .coded = side.coded};
out:
    free_side(&d, &side);
    return status;
}
