/* device_group.c - a group that the device decodes.
 *
 *     once      constants: codes, row lists, mean, RoPE, planes; components: rows of the basis, scaled, in two halves
 *     a batch   packed chunks -> integers -> operands; cosines and sines        (the next batch is copied meanwhile)
 *     a tile    operands x components -> rows -> + mean, RoPE, rounding -> views
 *
 * An f16 operand holds integers up to 2048 exactly. Components whose table goes beyond have two rows of operands, and a
 * rare escape beyond it sets the fault word, upon which the group is done again with f32. A component is the sum of two
 * halves, which keep 22 bits of it; the product of both with the same operands is one GEMM, twice as long. */
#include "device_read.h"

#include "device_tables.h"
#include "parts.h"

#include <math.h>

#define WHOLE_SPAN     2048u /* integers up to this are exact in f16 */
#define CONSTANT_ALIGN 16u
#define PACKED_ALIGN   4u

/* A group at hand. */
typedef struct work {
    xkv_device_reading *r;
    const xkv_group *g;
    xkv_group_reader reader;
    bool exact, integers, crossed;     /* coefficients are integers; the cross stage adds to them */
    uint32_t own, cross;               /* rows of operands */
    uint32_t *own_rows, *cross_rows;   /* xkv_plug_expand.rows */
    uint32_t *own_index, *cross_index; /* xkv_plug_split.index: the basis' rows; rows of a tile of the stage's */
    const float *components; /* the host's [..][width], of which own_index lists rows; NULL: the device has them */
    const xkv_device_basis *basis; /* dict */
    float step, scale;             /* of the components; scale is a power of two */
    uint32_t angles;               /* elements of a token's cosines and sines */

    /* Offsets in the constants. */
    uint64_t codes_at, own_rows_at, cross_rows_at, own_index_at, cross_index_at, mean_at, planes_at, ropes_at;
} work;

static void *place(const work *w, uint64_t offset)
{
    return w->r->workspace + offset;
}

static void *constant(const work *w, uint64_t offset)
{
    return place(w, w->r->at.constants + offset);
}

/* --- What a group needs ------------------------------------------------------------------------------------------- */

static uint32_t parts_of_table(uint8_t table)
{
    return xkv_table_span(table) > WHOLE_SPAN ? 2 : 1;
}

static uint64_t count_operands(const xkv_side *side)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < side->coded; i++)
        sum += parts_of_table(side->coded_tables[i]);
    return sum;
}

static uint32_t angle_width(const xkv_device_reading *r, const xkv_group *g)
{
    const xkv_geometry *geometry = &r->entry->c.geometry;
    uint32_t sum = 0, last = XKV_NO_ROPE;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        uint32_t rope = geometry->planes[g->planes[i]].rope;
        if (rope != XKV_NO_ROPE && rope != last)
            sum += geometry->ropes[rope].n_rot;
        if (rope != XKV_NO_ROPE)
            last = rope;
    }
    return sum;
}

static uint64_t constant_bytes(const xkv_group *g, uint64_t coded, uint64_t own, uint64_t cross, uint64_t angles)
{
    return 4 * coded + 8 * own + 8 * cross + 4ull * g->width + angles / 2 * sizeof(double) +
           g->plane_count * (sizeof(xkv_plug_plane) + CONSTANT_ALIGN) + 9 * CONSTANT_ALIGN;
}

bool xkv_device_takes(const xkv_device_reading *r, const xkv_group *g)
{
    uint64_t room = r->device->staging_bytes, tokens = r->entry->c.chunk_tokens, most = 0;

    if (g->codec != XKV_GROUP_DICT && g->codec != XKV_GROUP_SVDQ && g->codec != XKV_GROUP_SVD &&
        g->codec != XKV_GROUP_CROSS)
        return false;
    for (uint32_t i = 0; i < r->entry->c.chunk_count; i++)
        most = xkv_max64(most, g->parts[XKV_PART_CHUNKS + i].size);
    if (g->codec == XKV_GROUP_SVD)
        most = tokens * g->rank * 2;
    most += 4 * tokens + sizeof(xkv_plug_stream) + 4 * CONSTANT_ALIGN;
    return most <= room &&
           constant_bytes(g, g->rank, 2ull * g->rank, 2ull * r->need.cross, angle_width(r, g)) <= room &&
           4ull * g->width <= room;
}

static void add_need(xkv_device_need *need, const xkv_group *g, uint64_t coded, uint64_t own, uint64_t cross,
                     uint64_t angles)
{
    need->coded = xkv_max64(need->coded, coded);
    need->operands = xkv_max64(need->operands, own + cross);
    need->width = xkv_max64(need->width, g->width);
    need->area = xkv_max64(need->area, (own + cross) * g->width);
    need->angles = xkv_max64(need->angles, angles);
    need->constants = xkv_max64(need->constants, constant_bytes(g, coded, own, cross, angles));
}

static bool is_crossed(const xkv_device_reading *r, const xkv_group *g, uint32_t top)
{
    return r->cross.g && g->codec == XKV_GROUP_DICT && top > 0 && r->cross.cross.coded > 0;
}

xkv_status xkv_device_group_need(xkv_device_reading *r, const xkv_group *g, xkv_device_need *need)
{
    const xkv_basis *b = NULL;
    xkv_side side = {0};
    xkv_status status;

    if (g->codec == XKV_GROUP_SVD) {
        add_need(need, g, 0, g->rank, 0, angle_width(r, g));
        return XKV_OK;
    }
    if (g->codec == XKV_GROUP_DICT) {
        if (!r->entry->dict)
            return xkv_dict_missing(r->ctx, r->entry);
        b = xkv_dict_basis(r->entry->dict, &r->entry->c.geometry, g);
        need->top = xkv_max64(need->top, b ? b->top : 0);
    }
    status = xkv_side_read(r->ctx, r->entry, g, &side);
    if (status == XKV_OK)
        add_need(need, g, side.coded, xkv_group_is_cross(g) ? 0 : count_operands(&side),
                 b && is_crossed(r, g, b->top) ? count_operands(&r->cross.side) : 0, angle_width(r, g));
    xkv_side_free(r->ctx, &side);
    return status;
}

/* --- Lists of rows ------------------------------------------------------------------------------------------------ */

/* Row lists of `coded` components with these tables; component i is row index[i] of its basis. */
static uint32_t list_rows(const uint8_t *tables, uint32_t count, bool dense, uint32_t modulus, uint32_t *rows,
                          uint32_t *index)
{
    uint32_t n = 0, coded = 0;

    for (uint32_t i = 0; i < count; i++) {
        if (tables[i] == 0)
            continue;
        uint32_t parts = parts_of_table(tables[i]), from = dense ? coded % modulus : i;
        for (uint32_t part = 0; part < parts; part++, n++) {
            rows[n] = coded << 2 | (parts == 1 ? XKV_OPERAND_WHOLE : XKV_OPERAND_HIGH + part);
            index[n] = from;
        }
        coded++;
    }
    return n;
}

static xkv_status list_own(work *w)
{
    const xkv_group *g = w->g;
    xkv_ctx *ctx = w->r->ctx;

    XKV_TRY(XKV_NEW(ctx, 2ull * g->rank, &w->own_rows));
    XKV_TRY(XKV_NEW(ctx, 2ull * g->rank, &w->own_index));
    if (w->integers) {
        w->own = list_rows(w->reader.side.tables, g->rank, false, 1, w->own_rows, w->own_index);
        return XKV_OK;
    }
    w->own = g->rank;
    for (uint32_t i = 0; i < g->rank; i++) {
        w->own_rows[i] = i << 2;
        w->own_index[i] = i;
    }
    return XKV_OK;
}

static xkv_status list_cross(work *w)
{
    const xkv_side *side = &w->r->cross.side;
    xkv_ctx *ctx = w->r->ctx;

    XKV_TRY(XKV_NEW(ctx, 2ull * side->coded, &w->cross_rows));
    XKV_TRY(XKV_NEW(ctx, 2ull * side->coded, &w->cross_index));
    w->cross = list_rows(side->coded_tables, side->coded, true, w->r->at.tile_tokens, w->cross_rows, w->cross_index);
    return XKV_OK;
}

/* --- Scale -------------------------------------------------------------------------------------------------------- */

/* Elements of the stage's rows in this group: by Cauchy and Schwarz at most |p| times the norm of a column. */
static float largest_crossed(const work *w)
{
    const xkv_cross *cross = &w->r->cross.cross;
    const xkv_transform *t = &w->reader.transform;
    double most = 0;

    for (size_t i = 0; i < cross->rank; i++) {
        const float *p = cross->basis->components + i * cross->basis->width + t->cross_at;
        double sum = 0;
        for (size_t j = 0; cross->tables[i] != 0 && j < t->top; j++)
            sum += (double)p[j] * (double)p[j];
        most = fmax(most, sum);
    }
    return (float)(sqrt(most) * (double)w->basis->top_norm) * cross->step;
}

/* A power of two that brings the largest element to 2^13 .. 2^14, so that both halves are normal numbers of f16. */
static float scale_for(float largest)
{
    int exponent;

    if (!(largest > 0) || !isfinite(largest))
        return 1;
    (void)frexpf(largest, &exponent);
    exponent = 14 - exponent;
    return ldexpf(1, exponent > 100 ? 100 : exponent < -100 ? -100 : exponent);
}

static void find_scale(work *w)
{
    size_t width = w->g->width;
    float most = 0;

    for (uint32_t i = 0; i < w->own; i++) {
        uint32_t row = w->own_index[i];
        most = fmaxf(most, w->components ? xkv_largest(w->components + row * width, width) : w->basis->largest[row]);
    }
    most *= w->step;
    if (w->crossed)
        most = fmaxf(most, largest_crossed(w));
    w->scale = scale_for(most);
}

/* --- Opening ------------------------------------------------------------------------------------------------------ */

static void find_components(work *w)
{
    w->step = w->integers ? w->reader.side.step : 1;
    if (w->g->codec == XKV_GROUP_SVD)
        w->components = w->reader.components;
    else if (w->g->codec == XKV_GROUP_SVDQ)
        w->components = w->reader.transform.synthesis;
    else
        w->basis = xkv_device_basis_find(w->r->dict, xkv_dict_basis(w->r->entry->dict, &w->r->entry->c.geometry, w->g));
}

static xkv_status work_open(xkv_device_reading *r, const xkv_group *g, bool exact, work *w)
{
    *w = (work){.r = r, .g = g, .exact = exact, .integers = xkv_group_is_coded(g) || xkv_group_is_cross(g)};
    if (xkv_group_is_cross(g)) /* only its integers are decoded, for which the call has read the side part */
        return XKV_OK;
    XKV_TRY(xkv_group_reader_open(r->ctx, r->entry, g, &r->cross, &w->reader));
    w->crossed = is_crossed(r, g, w->reader.transform.top);
    find_components(w);
    XKV_TRY(list_own(w));
    if (w->crossed)
        XKV_TRY(list_cross(w));
    find_scale(w);
    w->angles = angle_width(r, g);
    return XKV_OK;
}

static void work_close(work *w)
{
    xkv_ctx *ctx = w->r->ctx;

    xkv_release(ctx, w->own_rows);
    xkv_release(ctx, w->own_index);
    xkv_release(ctx, w->cross_rows);
    xkv_release(ctx, w->cross_index);
    if (w->reader.ctx)
        xkv_group_reader_close(&w->reader);
}

/* The side part that tells how the integers at hand are coded. */
static const xkv_side *side_of(const work *w)
{
    return xkv_group_is_cross(w->g) ? &w->r->cross.side : &w->reader.side;
}

/* --- Constants ---------------------------------------------------------------------------------------------------- */

/* Append to a staging buffer; where it will be in the constants. */
static uint64_t append(uint8_t *bytes, uint64_t *used, const void *from, uint64_t size)
{
    uint64_t at = xkv_align64(*used, CONSTANT_ALIGN);

    if (size > 0)
        memcpy(bytes + at, from, (size_t)size);
    *used = at + size;
    return at;
}

static void append_codes(work *w, uint8_t *bytes, uint64_t *used)
{
    const xkv_side *side = side_of(w);

    w->codes_at = xkv_align64(*used, CONSTANT_ALIGN);
    *used = w->codes_at;
    for (uint32_t i = 0; w->integers && i < side->coded; i++) {
        xkv_warp_code code = xkv_device_code(side->coded_tables[i]);
        memcpy(bytes + *used, &code, sizeof code);
        *used += sizeof code;
    }
}

static void append_planes(work *w, uint8_t *bytes, uint64_t *used)
{
    const xkv_geometry *geometry = &w->r->entry->c.geometry;
    uint32_t column = 0, angles = 0, last = XKV_NO_ROPE, last_angles = 0;

    w->ropes_at = xkv_align64(*used, CONSTANT_ALIGN);
    *used = w->ropes_at;
    for (uint32_t i = 0; i < w->g->plane_count; i++) { /* neighbouring layers share their angles */
        uint32_t rope = geometry->planes[w->g->planes[i]].rope;
        if (rope == XKV_NO_ROPE || rope == last)
            continue;
        (void)append(bytes, used, geometry->ropes[rope].inv_freq, geometry->ropes[rope].n_rot / 2 * sizeof(double));
        last = rope;
    }
    last = XKV_NO_ROPE;
    w->planes_at = xkv_align64(*used, CONSTANT_ALIGN);
    for (uint32_t i = 0; i < w->g->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[w->g->planes[i]];
        xkv_plug_plane plane = {w->r->views[w->g->planes[i]], p->heads, p->head_dim, column, 0, 0, 0, 0};
        if (p->rope != XKV_NO_ROPE) {
            const xkv_rope *rope = &geometry->ropes[p->rope];
            if (p->rope != last) {
                last_angles = angles;
                angles += rope->n_rot;
            }
            last = p->rope;
            plane.pairs = rope->n_rot / 2;
            plane.offset = rope->offset;
            plane.style = rope->style;
            plane.angles = last_angles;
        }
        memcpy(bytes + w->planes_at + i * sizeof plane, &plane, sizeof plane);
        column += xkv_plane_width(p);
    }
    *used = w->planes_at + w->g->plane_count * sizeof(xkv_plug_plane);
}

static xkv_status send_constants(work *w)
{
    xkv_device_reading *r = w->r;
    xkv_staging *s;
    uint64_t used = 0;

    XKV_TRY(xkv_staging_get(r->ctx, r->device, &s));
    append_codes(w, s->bytes, &used);
    w->own_rows_at = append(s->bytes, &used, w->own_rows, 4ull * w->own);
    w->own_index_at = append(s->bytes, &used, w->own_index, 4ull * w->own);
    w->cross_rows_at = append(s->bytes, &used, w->cross_rows, 4ull * w->cross);
    w->cross_index_at = append(s->bytes, &used, w->cross_index, 4ull * w->cross);
    if (w->reader.transform.mean)
        w->mean_at = append(s->bytes, &used, w->reader.transform.mean, 4ull * w->g->width);
    if (!xkv_group_is_cross(w->g))
        append_planes(w, s->bytes, &used);
    if (used > 0)
        XKV_DEVICE(r, copy(r->device->plug, constant(w, 0), s->bytes, used, r->stream));
    return xkv_staging_put(r->ctx, r->device, s, r->stream);
}

/* --- Components --------------------------------------------------------------------------------------------------- */

/* Rows [at, at + count) of the components from rows of f32 on the device. */
static xkv_status split_rows(work *w, const float *rows, const uint32_t *index, uint32_t at, uint32_t count,
                             float factor)
{
    xkv_device_reading *r = w->r;
    uint64_t width = w->g->width, all = w->own + w->cross, elem = w->exact ? 4 : 2;
    uint8_t *high = (uint8_t *)place(w, r->at.components) + at * width * elem;
    xkv_plug_split o = {rows, index, count, width, factor, w->scale, high, high + all * width * elem, w->exact};

    XKV_DEVICE(r, split(r->device->plug, &o, r->stream));
    return XKV_OK;
}

/* The group's own, from the host, a few rows at a time through the place of the tile's rows. */
static xkv_status send_components(work *w)
{
    xkv_device_reading *r = w->r;
    uint64_t row = 4ull * w->g->width, most = xkv_min64(r->at.tile_tokens, r->device->staging_bytes / row);
    float *there = place(w, r->at.rows);

    for (uint32_t at = 0, n; at < w->own; at += n) {
        xkv_staging *s;
        n = (uint32_t)xkv_min64(w->own - at, most);
        XKV_TRY(xkv_staging_get(r->ctx, r->device, &s));
        for (uint32_t i = 0; i < n; i++)
            memcpy(s->bytes + i * row, w->components + (size_t)w->own_index[at + i] * w->g->width, (size_t)row);
        XKV_DEVICE(r, copy(r->device->plug, there, s->bytes, n * row, r->stream));
        XKV_TRY(xkv_staging_put(r->ctx, r->device, s, r->stream));
        XKV_TRY(split_rows(w, there, NULL, at, n, w->step));
    }
    return XKV_OK;
}

/* Leading parts of the stage's components first .. of those that are coded, times the step. */
static xkv_status send_mix(work *w, uint32_t first, uint32_t count, void *to)
{
    const xkv_cross *cross = &w->r->cross.cross;
    const xkv_transform *t = &w->reader.transform;
    float *mix = NULL, *row;
    uint32_t coded = 0;
    xkv_status status;

    XKV_TRY(XKV_NEW(w->r->ctx, (size_t)count * t->top, &mix));
    row = mix;
    for (size_t i = 0; i < cross->rank; i++) {
        if (cross->tables[i] == 0)
            continue;
        if (coded >= first && coded < first + count)
            for (size_t j = 0; j < t->top; j++)
                *row++ = cross->basis->components[i * cross->basis->width + t->cross_at + j] * cross->step;
        coded++;
    }
    status = xkv_device_upload(w->r->ctx, w->r->device, mix, 4ull * count * t->top, to, w->r->stream);
    xkv_release(w->r->ctx, mix);
    return status;
}

/* What the stage's components are in the group's rows: their parts times the leading rows of its basis. The place of
 * the operands holds the parts meanwhile. */
static xkv_status mix_components(work *w)
{
    xkv_device_reading *r = w->r;
    uint32_t coded = r->cross.cross.coded, top = w->reader.transform.top, at = 0;
    float *rows = place(w, r->at.rows), *parts = place(w, r->at.operands);

    for (uint32_t first = 0; first < coded; first += r->at.tile_tokens) {
        uint32_t count = (uint32_t)xkv_min64(coded - first, r->at.tile_tokens), end = at;
        xkv_plug_gemm o = {parts,       w->basis->rows, rows, count, w->g->width, top, top,
                           w->g->width, w->g->width,    1,    0,     0,           1};
        while (end < w->cross && w->cross_rows[end] >> 2 < first + count)
            end++;
        XKV_TRY(send_mix(w, first, count, parts));
        XKV_DEVICE(r, gemm(r->device->plug, &o, r->stream));
        XKV_TRY(split_rows(w, rows, (const uint32_t *)constant(w, w->cross_index_at) + at, w->own + at, end - at, 1));
        at = end;
    }
    return XKV_OK;
}

static xkv_status make_components(work *w)
{
    if (w->components)
        XKV_TRY(send_components(w));
    else
        XKV_TRY(split_rows(w, w->basis->rows, constant(w, w->own_index_at), 0, w->own, w->step));
    return w->crossed ? mix_components(w) : XKV_OK;
}

/* --- Batches ------------------------------------------------------------------------------------------------------ */

/* Neighbouring chunks on their way: positions of the tokens that are asked for, streams, then the chunks' bytes. */
typedef struct batch {
    work *w;
    uint32_t chunk, chunks;
    uint32_t t0, t1;     /* coded tokens */
    uint32_t first, end; /* of these, asked for */
    uint64_t streams_at, data_at, size;
    xkv_staging *staging;
    uint8_t *there;
} batch;

static uint64_t chunk_bytes(const work *w, uint32_t chunk)
{
    uint32_t t0, t1;

    if (w->integers)
        return xkv_align64(w->g->parts[XKV_PART_CHUNKS + chunk].size, PACKED_ALIGN);
    xkv_chunk_coded(&w->r->entry->c, chunk, &t0, &t1);
    return 2ull * (t1 - t0) * w->g->rank;
}

static uint64_t header_bytes(uint64_t tokens, uint64_t chunks)
{
    return 4 * tokens + chunks * sizeof(xkv_plug_stream) + 3 * CONSTANT_ALIGN;
}

/* As many chunks from b->chunk on as fit. */
static void plan_batch(batch *b)
{
    const xkv_device_reading *r = b->w->r;
    uint32_t end = r->first_chunk + r->chunks, t0, t1;
    uint64_t bytes = 0;

    xkv_chunk_coded(&r->entry->c, b->chunk, &b->t0, &b->t1);
    for (b->chunks = 0; b->chunk + b->chunks < end; b->chunks++) {
        uint64_t more = chunk_bytes(b->w, b->chunk + b->chunks);
        xkv_chunk_coded(&r->entry->c, b->chunk + b->chunks, &t0, &t1);
        if (b->chunks > 0 && (t1 - b->t0 > r->at.batch_tokens ||
                              header_bytes(t1 - b->t0, b->chunks + 1) + bytes + more > r->device->staging_bytes))
            break;
        bytes += more;
        b->t1 = t1;
    }
    b->first = (uint32_t)xkv_max64(b->t0, r->target.first);
    b->end = (uint32_t)xkv_min64(b->t1, r->target.end);
    if (b->end < b->first)
        b->end = b->first;
    b->streams_at = xkv_align64(4ull * (b->end - b->first), CONSTANT_ALIGN);
    b->data_at = xkv_align64(b->streams_at + b->chunks * sizeof(xkv_plug_stream), CONSTANT_ALIGN);
    b->size = b->data_at + bytes;
}

/* What the device decodes it checks; a chunk of which it decodes nothing is checked here. */
static xkv_status load_packed(const work *w, uint32_t chunk, uint8_t *to)
{
    const xkv_device_reading *r = w->r;
    const xkv_part *part = &w->g->parts[XKV_PART_CHUNKS + chunk];

    if (part->size > 0 && side_of(w)->coded == 0)
        return xkv_fail(r->ctx, XKV_ERROR_CORRUPT, "group %u, chunk %u: %llu bytes, expected none [E2]",
                        (unsigned)(w->g - r->entry->c.groups), chunk, (unsigned long long)part->size);
    return xkv_container_read_part(r->ctx, &r->entry->input, &r->entry->c, part, to);
}

/* One chunk into its place. */
static xkv_status load_chunk(void *user, uint32_t worker, uint64_t index)
{
    const batch *b = user;
    const work *w = b->w;
    xkv_plug_stream stream;
    xkv_chunk chunk;

    memcpy(&stream, b->staging->bytes + b->streams_at + index * sizeof stream, sizeof stream);
    uint8_t *to = b->staging->bytes + b->data_at + stream.offset;
    if (w->integers)
        return load_packed(w, b->chunk + (uint32_t)index, to);
    XKV_TRY(xkv_chunk_load(&w->reader, &w->r->scratch[worker], b->chunk + (uint32_t)index, &chunk));
    if (chunk.t1 > chunk.t0)
        memcpy(to, chunk.matrix, 2ull * (chunk.t1 - chunk.t0) * w->g->rank);
    return XKV_OK;
}

static xkv_status fill_batch(batch *b)
{
    const xkv_device_reading *r = b->w->r;
    uint64_t offset = 0;

    memcpy(b->staging->bytes, r->target.moves.positions + (b->first - r->target.first), 4ull * (b->end - b->first));
    for (uint32_t i = 0; i < b->chunks; i++) {
        uint32_t t0, t1;
        xkv_chunk_coded(&r->entry->c, b->chunk + i, &t0, &t1);
        xkv_plug_stream s = {offset, (uint32_t)b->w->g->parts[XKV_PART_CHUNKS + b->chunk + i].size, t1 - t0,
                             t0 - b->t0};
        memcpy(b->staging->bytes + b->streams_at + i * sizeof s, &s, sizeof s);
        offset += chunk_bytes(b->w, b->chunk + i);
    }
    return xkv_pool_run(r->ctx, r->pool, b->chunks, load_chunk, b);
}

/* Copy it on the stream of copies, while the caller's is busy with the batch before. */
static xkv_status send_batch(batch *b)
{
    xkv_device_reading *r = b->w->r;
    xkv_device *d = r->device;
    uint32_t slot = r->slot;

    XKV_TRY(xkv_staging_get(r->ctx, d, &b->staging));
    XKV_TRY(fill_batch(b));
    b->there = (uint8_t *)place(b->w, r->at.packed[slot]);
    if (r->slot_used[slot])
        XKV_DEVICE(r, follow(d->plug, d->copies, d->used[slot]));
    XKV_DEVICE(r, copy(d->plug, b->there, b->staging->bytes, b->size, d->copies));
    XKV_TRY(xkv_staging_put(r->ctx, d, b->staging, d->copies));
    XKV_DEVICE(r, record(d->plug, d->arrived[slot], d->copies));
    XKV_DEVICE(r, follow(d->plug, r->stream, d->arrived[slot]));
    return XKV_OK;
}

static xkv_status release_slot(const batch *b)
{
    xkv_device_reading *r = b->w->r;

    XKV_DEVICE(r, record(r->device->plug, r->device->used[r->slot], r->stream));
    r->slot_used[r->slot] = true;
    r->slot ^= 1;
    return XKV_OK;
}

/* --- Tiles -------------------------------------------------------------------------------------------------------- */

static xkv_status decode_batch(const batch *b)
{
    xkv_device_reading *r = b->w->r;
    bool cross = xkv_group_is_cross(b->w->g);
    int16_t *q = place(b->w, cross ? r->at.cross : r->at.integers);
    xkv_plug_decode o = {.packed = b->there + b->data_at,
                         .streams = (const xkv_plug_stream *)(const void *)(b->there + b->streams_at),
                         .count = b->chunks,
                         .tables = r->device->tables,
                         .codes = constant(b->w, b->w->codes_at),
                         .coded = side_of(b->w)->coded,
                         .q = cross ? q + (b->t0 - r->cross_begin) : q,
                         .stride = cross ? r->at.cross_stride : r->at.stride,
                         .fault = place(b->w, r->at.fault)};

    if (o.coded > 0 && b->t1 > b->t0)
        XKV_DEVICE(r, decode(r->device->plug, &o, r->stream));
    return XKV_OK;
}

static xkv_status expand_rows(const batch *b, const int16_t *q, uint64_t q_stride, uint64_t rows_at, uint32_t count,
                              uint64_t at)
{
    const work *w = b->w;
    xkv_device_reading *r = w->r;
    uint64_t elem = w->exact ? 4 : 2;
    xkv_plug_expand o = {.q = q,
                         .q_stride = q_stride,
                         .rows = constant(w, rows_at),
                         .count = count,
                         .tokens = b->end - b->first,
                         .tile = (uint8_t *)place(w, r->at.operands) + at * r->at.stride * elem,
                         .stride = r->at.stride,
                         .copy = w->exact ? 0 : w->own + w->cross,
                         .exact = w->exact,
                         .fault = place(w, r->at.fault)};

    XKV_DEVICE(r, expand(r->device->plug, &o, r->stream));
    return XKV_OK;
}

static xkv_status expand_batch(const batch *b)
{
    const work *w = b->w;
    xkv_device_reading *r = w->r;

    XKV_TRY(expand_rows(b, (int16_t *)place(w, r->at.integers) + (b->first - b->t0), r->at.stride, w->own_rows_at,
                        w->own, 0));
    if (!w->crossed)
        return XKV_OK;
    return expand_rows(b, (int16_t *)place(w, r->at.cross) + (b->first - r->cross_begin), r->at.cross_stride,
                       w->cross_rows_at, w->cross, w->own);
}

static xkv_status make_angles(const batch *b)
{
    const work *w = b->w;
    xkv_device_reading *r = w->r;
    const xkv_geometry *geometry = &r->entry->c.geometry;
    uint32_t last = XKV_NO_ROPE, at = 0;
    uint64_t rope_at = w->ropes_at;

    for (uint32_t i = 0; i < w->g->plane_count; i++) {
        uint32_t index = geometry->planes[w->g->planes[i]].rope;
        if (index == XKV_NO_ROPE || index == last)
            continue;
        const xkv_rope *rope = &geometry->ropes[index];
        xkv_plug_angles o = {(const int32_t *)(const void *)b->there,
                             constant(w, rope_at),
                             b->end - b->first,
                             rope->n_rot / 2,
                             rope->scale,
                             (float *)place(w, r->at.angles) + at,
                             w->angles};
        XKV_DEVICE(r, angles(r->device->plug, &o, r->stream));
        rope_at = xkv_align64(rope_at + rope->n_rot / 2 * sizeof(double), CONSTANT_ALIGN);
        at += rope->n_rot;
        last = index;
    }
    return XKV_OK;
}

/* Coefficients of codec svd, as they are stored: token by token. */
static xkv_status multiply_factors(const batch *b, uint32_t t0, xkv_plug_gemm *o)
{
    const work *w = b->w;
    const uint8_t *low = (const uint8_t *)o->b + 2ull * w->own * w->g->width;

    o->a = b->there + b->data_at + 2ull * (t0 - b->t0) * w->g->rank;
    o->lda = w->g->rank;
    o->k = w->own;
    XKV_DEVICE(w->r, gemm(w->r->device->plug, o, w->r->stream));
    o->b = low;
    o->beta = 1;
    XKV_DEVICE(w->r, gemm(w->r->device->plug, o, w->r->stream));
    return XKV_OK;
}

static xkv_status multiply_tile(const batch *b, uint32_t t0, uint32_t tokens, float *rows)
{
    const work *w = b->w;
    xkv_device_reading *r = w->r;
    uint64_t operands = w->own + w->cross, elem = w->exact ? 4 : 2;
    xkv_plug_gemm o = {.a = (uint8_t *)place(w, r->at.operands) + (t0 - b->first) * elem,
                       .b = place(w, r->at.components),
                       .c = rows,
                       .m = tokens,
                       .n = w->g->width,
                       .k = w->exact ? operands : 2 * operands,
                       .lda = r->at.stride,
                       .ldb = w->g->width,
                       .ldc = w->g->width,
                       .alpha = 1 / w->scale,
                       .component_major = w->integers,
                       .exact = w->exact};

    if (operands == 0)
        XKV_DEVICE(r, clear(r->device->plug, rows, 4ull * tokens * w->g->width, r->stream));
    else if (w->integers)
        XKV_DEVICE(r, gemm(r->device->plug, &o, r->stream));
    else
        XKV_TRY(multiply_factors(b, t0, &o));
    return XKV_OK;
}

static xkv_status store_tile(const batch *b, uint32_t t0, uint32_t tokens, const float *rows)
{
    const work *w = b->w;
    xkv_device_reading *r = w->r;
    xkv_plug_store o = {.rows = rows,
                        .ld = w->g->width,
                        .mean = w->reader.transform.mean ? constant(w, w->mean_at) : NULL,
                        .angles = (float *)place(w, r->at.angles) + (uint64_t)(t0 - b->first) * w->angles,
                        .angles_stride = w->angles,
                        .planes = constant(w, w->planes_at),
                        .plane_count = w->g->plane_count,
                        .tokens = tokens,
                        .first = t0 - r->target.first};

    XKV_DEVICE(r, store(r->device->plug, &o, r->stream));
    return XKV_OK;
}

static xkv_status make_rows(const batch *b)
{
    float *rows = place(b->w, b->w->r->at.rows);

    XKV_TRY(make_angles(b));
    if (b->w->integers)
        XKV_TRY(expand_batch(b));
    for (uint32_t t0 = b->first, n; t0 < b->end; t0 += n) {
        n = (uint32_t)xkv_min64(b->end - t0, b->w->r->at.tile_tokens);
        XKV_TRY(multiply_tile(b, t0, n, rows));
        XKV_TRY(store_tile(b, t0, n, rows));
    }
    return XKV_OK;
}

static xkv_status run_batch(batch *b)
{
    XKV_TRY(send_batch(b));
    if (b->w->integers)
        XKV_TRY(decode_batch(b));
    if (!xkv_group_is_cross(b->w->g))
        XKV_TRY(make_rows(b));
    return release_slot(b);
}

/* --- The group ---------------------------------------------------------------------------------------------------- */

static xkv_status run_batches(work *w)
{
    xkv_device_reading *r = w->r;
    batch b = {.w = w, .chunk = r->first_chunk};

    while (b.chunk < r->first_chunk + r->chunks) {
        plan_batch(&b);
        XKV_TRY(run_batch(&b));
        b.chunk += b.chunks;
    }
    return XKV_OK;
}

static xkv_status run_group(work *w)
{
    xkv_device_reading *r = w->r;
    uint32_t threads = xkv_pool_threads(r->pool);

    XKV_DEVICE(r, clear(r->device->plug, place(w, r->at.fault), sizeof(uint32_t), r->stream));
    XKV_TRY(send_constants(w));
    if (!xkv_group_is_cross(w->g))
        XKV_TRY(make_components(w));
    for (uint32_t i = 0; !w->integers && i < threads; i++)
        XKV_TRY(xkv_chunk_scratch_size(&w->reader, false, &r->scratch[i]));
    XKV_TRY(run_batches(w));
    return xkv_group_is_cross(w->g) ? XKV_OK : xkv_device_exact_rows(r, &w->reader);
}

xkv_status xkv_device_group(xkv_device_reading *r, const xkv_group *g, uint32_t which, bool exact)
{
    work w;
    xkv_status status;

    XKV_TRY_GOTO(work_open(r, g, exact, &w), out);
    XKV_TRY_GOTO(run_group(&w), out);
    XKV_TRY_GOTO(xkv_device_result(r->ctx, r->device,
                                   r->api->copy(r->device->plug, (uint32_t *)r->device->results + which,
                                                place(&w, r->at.fault), sizeof(uint32_t), r->stream)),
                 out);
    XKV_TRY_GOTO(
        xkv_device_result(r->ctx, r->device, r->api->record(r->device->plug, r->device->ready[which], r->stream)), out);
out:
    work_close(&w);
    return status;
}
