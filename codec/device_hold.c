/* device_hold.c - what an attention holds, copied to a device. It is laid out twice: first to find out how much it is,
 * then into memory of that size. */
#include "device_attend.h"

#include "parts.h"

#define HELD_ALIGN 16u
/* Tiles of a split at least, and splits that are aimed at: enough for all multiprocessors. */
#define SPLIT_TILES 8u
#define SPLITS      128u

/* A tile of all planes. */
typedef struct cut {
    uint32_t row, count;
    uint32_t token; /* the first one, in its entry */
    uint32_t entry;
    bool exact; /* sinks or window, or rows that are held */
} cut;

/* What the planes of a group share on the device. */
typedef struct held_group {
    const float *basis, *mean;
    const uint32_t *row, *line;
    const uint8_t **data; /* [chunk_count] */
    const xkv_held_line **lines;
} held_group;

typedef struct holding {
    xkv_ctx *ctx;
    const xkv_attention *a;
    const xkv_device_dict *given;
    xkv_device_attention *d;
    uint64_t used;
    uint8_t *asked;       /* [plane_count] of the geometry: rows are held */
    cut *cuts;            /* [tile_count] */
    held_group **groups;  /* [stretch_count][group_count of the entry] */
    xkv_held_tile *tiles; /* [tile_count] of the plane at hand */
    uint8_t *rows;        /* of a tile at hand */
} holding;

/* The next place, and with memory `size` bytes on their way to it. */
static xkv_status place(holding *h, const void *from, uint64_t size, const void **there)
{
    h->used = xkv_align64(h->used, HELD_ALIGN);
    *there = (const void *)((uintptr_t)h->d->memory + h->used);
    h->used += size;
    if (!h->d->memory || size == 0 || !from)
        return XKV_OK;
    return xkv_device_upload(h->ctx, h->d->device, from, size, (void *)(uintptr_t)*there, h->d->device->copies);
}

#define PLACE(h, from, count, there) place(h, from, (uint64_t)(count) * sizeof **(there), (const void **)(there))

/* --- Tiles and splits --------------------------------------------------------------------------------------------- */

static void add_cuts(holding *h, uint32_t row, uint32_t count, uint32_t token, uint32_t entry, bool exact)
{
    for (uint32_t i = 0, n; i < count; i += n) {
        n = (uint32_t)xkv_min64(count - i, XKV_HELD_TOKENS);
        if (h->cuts)
            h->cuts[h->d->tile_count] = (cut){row + i, n, token + i, entry, exact};
        h->d->tile_count++;
    }
}

/* Chunks, and in them sinks, coded tokens, window. */
static void cut_stretch(holding *h, uint32_t entry)
{
    const xkv_stretch *s = &h->a->stretches[entry];
    const xkv_container *c = &s->entry->c;
    const uint32_t bounds[] = {0, c->sinks, c->geometry.token_count - c->window, c->geometry.token_count};

    for (uint32_t at = s->first, next; at < s->end; at = next) {
        next = (uint32_t)xkv_min64(((uint64_t)(at / c->chunk_tokens) + 1) * c->chunk_tokens, s->end);
        for (uint32_t i = 0; i < 3; i++) {
            uint32_t first = bounds[i] > at ? bounds[i] : at, end = bounds[i + 1] < next ? bounds[i + 1] : next;
            if (first < end)
                add_cuts(h, s->at + (first - s->first), end - first, first, entry, i != 1);
        }
    }
}

static void cut_all(holding *h)
{
    h->d->tile_count = 0;
    if (h->a->rows)
        add_cuts(h, 0, h->a->token_count, 0, 0, true);
    for (uint32_t i = 0; i < h->a->stretch_count; i++)
        cut_stretch(h, i);
}

static xkv_status make_cuts(holding *h)
{
    cut_all(h);
    XKV_TRY(XKV_NEW(h->ctx, h->d->tile_count, &h->cuts));
    cut_all(h);
    return XKV_OK;
}

static xkv_status place_splits(holding *h)
{
    uint32_t most = (uint32_t)xkv_max64(SPLIT_TILES, xkv_ceil_div(h->d->tile_count, SPLITS)), count = 0;
    xkv_held_split *splits = NULL;
    xkv_status status;

    XKV_TRY(XKV_NEW(h->ctx, h->d->tile_count, &splits));
    for (uint32_t i = 0; i < h->d->tile_count; i++) {
        const cut *c = &h->cuts[i];
        if (count == 0 || splits[count - 1].entry != c->entry || i - splits[count - 1].first_tile == most)
            splits[count++] = (xkv_held_split){i, i, c->row, c->row, c->entry};
        splits[count - 1].end_tile = i + 1;
        splits[count - 1].end_row = c->row + c->count;
    }
    h->d->split_count = count;
    status = PLACE(h, splits, count, (const xkv_held_split **)&h->d->splits);
    xkv_release(h->ctx, splits);
    return status;
}

/* --- Angles ------------------------------------------------------------------------------------------------------- */

static bool is_rotated(const xkv_geometry *g, uint32_t rope)
{
    for (uint32_t i = 0; i < g->plane_count; i++)
        if (g->planes[i].rope == rope)
            return true;
    return false;
}

/* Rows that are held are rotated already. */
static void lay_angles(holding *h)
{
    xkv_device_attention *d = h->d;

    d->angles_stride = 0;
    for (uint32_t i = 0; i < d->geometry->rope_count; i++) {
        d->angles_at[i] = d->angles_stride;
        if (!h->a->rows && is_rotated(d->geometry, i))
            d->angles_stride += d->geometry->ropes[i].n_rot;
    }
}

/* Those of one RoPE, which all entries of a chain have. */
static xkv_status make_angles(holding *h, uint32_t rope)
{
    const xkv_device_attention *d = h->d;
    const xkv_rope *r = &d->geometry->ropes[rope];
    const double *inv_freq;

    XKV_TRY(PLACE(h, r->inv_freq, r->n_rot / 2, &inv_freq));
    if (!d->memory)
        return XKV_OK;
    xkv_plug_angles o = {d->positions,    inv_freq, d->token_count,
                         r->n_rot / 2,    r->scale, d->angles + d->angles_at[rope],
                         d->angles_stride};
    return xkv_device_result(h->ctx, d->device, d->device->api->angles(d->device->plug, &o, d->device->copies));
}

static xkv_status place_angles(holding *h)
{
    xkv_device_attention *d = h->d;

    lay_angles(h);
    XKV_TRY(PLACE(h, h->a->positions, d->token_count, (const int32_t **)&d->positions));
    XKV_TRY(PLACE(h, NULL, d->token_count * d->angles_stride, (const float **)&d->angles));
    for (uint32_t i = 0; d->angles_stride > 0 && i < d->geometry->rope_count; i++)
        if (is_rotated(d->geometry, i))
            XKV_TRY(make_angles(h, i));
    return XKV_OK;
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

/* The dictionary of an entry on the device: the one that was given, or a copy. */
static const xkv_device_dict *dict_of(const holding *h, uint32_t entry)
{
    const xkv_dict *dict = h->a->stretches[entry].entry->dict;

    if (h->given && h->given->dict == dict)
        return h->given;
    for (uint32_t i = 0; i <= entry; i++)
        if (h->d->dicts[i] && h->d->dicts[i]->dict == dict)
            return h->d->dicts[i];
    return NULL;
}

static xkv_status place_rows(holding *h, const xkv_panels *basis, size_t count, const float **there)
{
    float *rows = NULL;
    xkv_status status;

    XKV_TRY(XKV_NEW(h->ctx, basis ? count * basis->cols : 0, &rows));
    if (count > 0)
        xkv_panels_get(basis, 0, count, rows);
    status = PLACE(h, rows, basis ? count * basis->cols : 0, there);
    xkv_release(h->ctx, rows);
    return status;
}

/* The rows of a dictionary are where they are; others are copied. */
static xkv_status place_basis(holding *h, uint32_t entry, const xkv_tile_group *t, held_group *g)
{
    const xkv_entry *e = h->a->stretches[entry].entry;
    uint64_t width = t->reader.g->width;

    if (t->reader.g->codec == XKV_GROUP_DICT)
        g->basis = xkv_device_basis_find(dict_of(h, entry), xkv_dict_basis(e->dict, &e->c.geometry, t->reader.g))->rows;
    else
        XKV_TRY(place_rows(h, t->basis, t->slots > 0 ? t->reader.g->rank : 0, &g->basis));
    g->mean = NULL;
    return t->mean ? PLACE(h, t->mean, width, &g->mean) : XKV_OK;
}

/* Each slot's row of the basis, and its line, which has the same number. */
static xkv_status place_slots(holding *h, const xkv_tile_group *t, held_group *g)
{
    uint32_t *line = NULL;
    xkv_status status;

    XKV_TRY(PLACE(h, t->component, t->slots, &g->row));
    if (t->form != XKV_BLOCK_INTEGERS)
        return XKV_OK;
    XKV_TRY(XKV_NEW(h->ctx, t->slots, &line));
    for (uint32_t i = 0; i < t->slots; i++)
        line[i] = i;
    status = PLACE(h, line, t->slots, &g->line);
    xkv_release(h->ctx, line);
    return status;
}

static xkv_status place_lines(holding *h, const xkv_line *from, uint32_t count, const xkv_held_line **there)
{
    xkv_held_line *lines = NULL;
    xkv_status status;

    XKV_TRY(XKV_NEW(h->ctx, count, &lines));
    for (uint32_t i = 0; i < count; i++)
        lines[i] = (xkv_held_line){from[i].at, from[i].scale, from[i].bytes};
    status = PLACE(h, lines, count, there);
    xkv_release(h->ctx, lines);
    return status;
}

static xkv_status place_blocks(holding *h, const xkv_stretch *s, const xkv_tile_group *t, held_group *g)
{
    const xkv_block *blocks = s->blocks[t - s->groups];

    for (uint32_t i = 0; t->form != XKV_BLOCK_ROWS && i < s->chunk_count; i++) {
        XKV_TRY(PLACE(h, blocks[i].data, blocks[i].size, &g->data[i]));
        if (blocks[i].lines)
            XKV_TRY(place_lines(h, blocks[i].lines, t->lines, &g->lines[i]));
    }
    return XKV_OK;
}

static xkv_status place_group(holding *h, uint32_t entry, uint32_t index)
{
    const xkv_stretch *s = &h->a->stretches[entry];
    const xkv_tile_group *t = &s->groups[index];
    held_group *g = &h->groups[entry][index];

    if (!t->reader.g)
        return XKV_OK;
    if (!g->data) {
        XKV_TRY(XKV_NEW_ZERO(h->ctx, s->chunk_count, &g->data));
        XKV_TRY(XKV_NEW_ZERO(h->ctx, s->chunk_count, &g->lines));
    }
    XKV_TRY(place_basis(h, entry, t, g));
    XKV_TRY(place_slots(h, t, g));
    return place_blocks(h, s, t, g);
}

static xkv_status place_groups(holding *h)
{
    for (uint32_t i = 0; i < h->a->stretch_count; i++)
        for (uint32_t k = 0; k < h->a->stretches[i].entry->c.group_count; k++)
            XKV_TRY(place_group(h, i, k));
    return XKV_OK;
}

/* --- Planes ------------------------------------------------------------------------------------------------------- */

/* Where each element's line is, and what it is multiplied with. */
static xkv_status place_diagonal(holding *h, const xkv_tile_plane *p, xkv_held_plane *out)
{
    const xkv_tile_group *t = p->group;
    uint32_t *line = NULL;
    xkv_status status;

    XKV_TRY(XKV_NEW(h->ctx, p->width, &line));
    for (uint32_t i = 0; i < p->width; i++)
        line[i] = XKV_NO_SOURCE;
    for (uint32_t i = 0; i < t->lines; i++)
        if (t->component[i] - p->column < p->width) /* wraps in front of the plane */
            line[t->component[i] - p->column] = i;
    status = PLACE(h, line, p->width, &out->line);
    xkv_release(h->ctx, line);
    XKV_TRY(status);
    return PLACE(h, t->reader.transform.diagonal + p->column, p->width, &out->factor);
}

static xkv_status describe_coded(holding *h, uint32_t entry, const xkv_tile_plane *p, xkv_held_plane *out)
{
    static const uint32_t forms[] = {XKV_HELD_ROWS, XKV_HELD_FACTORS, XKV_HELD_LINES, XKV_HELD_DIAGONAL};
    const xkv_tile_group *t = p->group;
    const xkv_geometry *c = &t->reader.entry->c.geometry;
    const held_group *g = &h->groups[entry][t - h->a->stretches[entry].groups];
    uint32_t rope = c->planes[p->plane].rope;

    *out = (xkv_held_plane){.form = forms[t->form],
                            .width = p->width,
                            .column = p->column,
                            .slots = xkv_has_slots(t) ? t->slots : 0,
                            .row = g->row,
                            .line = g->line,
                            .basis = g->basis,
                            .mean = g->mean,
                            .ld = t->reader.g->width};
    if (rope != XKV_NO_ROPE) {
        out->pairs = c->ropes[rope].n_rot / 2;
        out->offset = c->ropes[rope].offset;
        out->style = c->ropes[rope].style;
    }
    return t->form == XKV_BLOCK_DIAGONAL ? place_diagonal(h, p, out) : XKV_OK;
}

/* Exact rows are as the engine had them, or turned, or no elements that the device knows: then they are f32. */
static bool as_they_are(const holding *h, uint32_t plane, uint32_t entry)
{
    const xkv_plane *p = &h->d->geometry->planes[plane];
    const xkv_stretch *s = h->a->rows ? NULL : &h->a->stretches[entry];

    return p->dtype <= XKV_BF16 && !(s && s->moves.distances && p->rope != XKV_NO_ROPE);
}

static xkv_status place_planes(holding *h, xkv_held_plane *planes)
{
    xkv_device_attention *d = h->d;

    for (uint32_t i = 0; i < d->geometry->plane_count; i++)
        for (uint32_t k = 0; h->asked[i] && k < d->entry_count; k++) {
            const xkv_plane *p = &d->geometry->planes[i];
            xkv_held_plane *coded = &planes[xkv_held_index(d, i, k, false)], *exact = coded + 1;
            *exact = (xkv_held_plane){
                .form = XKV_HELD_ROWS, .dtype = as_they_are(h, i, k) ? p->dtype : XKV_F32, .width = xkv_plane_width(p)};
            *coded = *exact;
            if (h->a->rows)
                continue;
            xkv_tile_plane found = xkv_stretch_plane(&h->a->stretches[k], i);
            if (found.group->form != XKV_BLOCK_ROWS)
                XKV_TRY(describe_coded(h, k, &found, coded));
            d->slots[i] = coded->slots > d->slots[i] ? coded->slots : d->slots[i];
        }
    return PLACE(h, planes, (uint64_t)d->geometry->plane_count * d->entry_count * 2,
                 (const xkv_held_plane **)&d->planes);
}

static xkv_status place_value_planes(holding *h)
{
    xkv_device_attention *d = h->d;
    uint32_t *list = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW(h->ctx, d->entry_count, &list));
    for (uint32_t i = 0; status == XKV_OK && i < d->geometry->plane_count; i++) {
        for (uint32_t k = 0; k < d->entry_count; k++)
            list[k] = xkv_held_index(d, i, k, false);
        if (h->asked[i])
            status = PLACE(h, list, d->entry_count, (const uint32_t **)&d->value_planes[i]);
    }
    xkv_release(h->ctx, list);
    return status;
}

/* --- A plane's tiles ---------------------------------------------------------------------------------------------- */

/* Turn a tile's exact rows to other positions. */
static xkv_status turn_rows(holding *h, const xkv_stretch *s, const cut *c, uint32_t plane, float *x)
{
    const xkv_group one = {
        .plane_count = 1, .planes = &plane, .width = xkv_plane_width(&h->d->geometry->planes[plane])};
    xkv_rotator r = {0};
    xkv_status status;

    if (!s->moves.distances)
        return XKV_OK;
    status = xkv_rotator_init(h->ctx, &s->moves.geometry, xkv_kernels_cpu(), false, &r);
    if (status == XKV_OK)
        status = xkv_rotate_rows(h->ctx, &r, &one, s->moves.distances + (c->token - s->first), c->count, x);
    xkv_rotator_free(h->ctx, &r);
    return status;
}

/* Exact rows of a tile, [count][width] in `rows`. */
static xkv_status take_exact(holding *h, const cut *c, uint32_t plane)
{
    const xkv_plane *p = &h->d->geometry->planes[plane];
    uint32_t width = xkv_plane_width(p);
    size_t bytes = (size_t)xkv_dtype_bytes(p->dtype, width);
    float *x = (float *)(void *)h->rows;

    if (h->a->rows) {
        const uint8_t *from = h->a->rows[plane] + c->row * bytes;
        if (as_they_are(h, plane, 0))
            memcpy(h->rows, from, c->count * bytes);
        else
            xkv_kernels_cpu()->to_f32(p->dtype, from, x, (size_t)c->count * width);
        return XKV_OK;
    }
    const xkv_stretch *s = &h->a->stretches[c->entry];
    xkv_tile_plane found = xkv_stretch_plane(s, plane);
    const xkv_tile_group *t = found.group;
    const xkv_block *b = &s->blocks[t - s->groups][c->token / s->entry->c.chunk_tokens - s->first_chunk];
    const uint8_t *from = xkv_tile_stored(t, b, c->token);
    if (!as_they_are(h, plane, c->entry)) {
        xkv_tile_exact(&found, from, c->count, x);
        return turn_rows(h, s, c, plane, x);
    }
    for (uint32_t i = 0; i < c->count; i++)
        memcpy(h->rows + i * bytes, from + (size_t)i * t->row_bytes + t->offsets[found.index], bytes);
    return XKV_OK;
}

static xkv_status make_tile(holding *h, uint32_t plane, uint32_t index)
{
    const cut *c = &h->cuts[index];
    xkv_held_tile *tile = &h->tiles[index];
    const xkv_plane *p = &h->d->geometry->planes[plane];
    bool exact = c->exact;

    *tile = (xkv_held_tile){.row = c->row, .count = c->count};
    if (!exact) {
        const xkv_stretch *s = &h->a->stretches[c->entry];
        const xkv_tile_group *t = xkv_stretch_plane(s, plane).group;
        uint32_t chunk = c->token / s->entry->c.chunk_tokens - s->first_chunk;
        exact = t->form == XKV_BLOCK_ROWS;
        if (!exact) {
            const held_group *g = &h->groups[c->entry][t - s->groups];
            tile->data = g->data[chunk];
            tile->lines = g->lines[chunk];
            tile->from = c->token - s->blocks[t - s->groups][chunk].t0;
        }
    }
    tile->plane = xkv_held_index(h->d, plane, c->entry, exact);
    if (!exact)
        return XKV_OK;
    if (h->d->memory)
        XKV_TRY(take_exact(h, c, plane));
    return place(h, h->rows,
                 c->count * xkv_dtype_bytes(as_they_are(h, plane, c->entry) ? p->dtype : XKV_F32, xkv_plane_width(p)),
                 (const void **)&tile->data);
}

static xkv_status place_tiles(holding *h)
{
    const xkv_device_attention *d = h->d;

    for (uint32_t i = 0; i < d->geometry->plane_count; i++) {
        if (!h->asked[i])
            continue;
        for (uint32_t k = 0; k < d->tile_count; k++)
            XKV_TRY(make_tile(h, i, k));
        XKV_TRY(PLACE(h, h->tiles, d->tile_count, (const xkv_held_tile **)&d->tiles[i]));
    }
    return XKV_OK;
}

/* --- All of it ---------------------------------------------------------------------------------------------------- */

static xkv_status place_all(holding *h)
{
    xkv_held_plane *planes = NULL;
    xkv_status status;

    h->used = 0;
    XKV_TRY(place_splits(h));
    XKV_TRY(place_angles(h));
    XKV_TRY(place_groups(h));
    XKV_TRY(XKV_NEW_ZERO(h->ctx, (size_t)h->d->geometry->plane_count * h->d->entry_count * 2, &planes));
    status = place_planes(h, planes);
    xkv_release(h->ctx, planes);
    XKV_TRY(status);
    XKV_TRY(place_value_planes(h));
    return place_tiles(h);
}

/* Dictionaries that are not on the device yet. */
static xkv_status copy_dicts(holding *h)
{
    for (uint32_t i = 0; i < h->a->stretch_count; i++) {
        const xkv_entry *e = h->a->stretches[i].entry;
        if (e->dict && !dict_of(h, i))
            XKV_TRY(xkv_device_dict_copy(h->ctx, h->d->device, e->dict, &h->d->dicts[i]));
    }
    return XKV_OK;
}

static xkv_status check_held(const holding *h)
{
    const xkv_attention *a = h->a;

    if (a->hold != XKV_HOLD_COEFFICIENTS && a->hold != XKV_HOLD_ROWS)
        return xkv_fail(h->ctx, XKV_ERROR_ARGUMENT, "the attention holds neither coefficients nor rows");
    if (h->given && h->given->device != h->d->device)
        return xkv_fail(h->ctx, XKV_ERROR_ARGUMENT, "the dictionary is on another device");
    for (uint32_t i = 0; i < h->d->geometry->plane_count; i++)
        if (h->d->geometry->planes[i].head_dim > XKV_HELD_DIM && h->d->geometry->planes[i].kind != XKV_PLANE_V)
            return xkv_fail(h->ctx, XKV_ERROR_UNSUPPORTED, "heads of %u elements, at most %u on a device",
                            h->d->geometry->planes[i].head_dim, XKV_HELD_DIM);
    return XKV_OK;
}

static xkv_status host_arrays(holding *h)
{
    xkv_device_attention *d = h->d;
    uint32_t planes = d->geometry->plane_count, width = 0;

    XKV_TRY(XKV_NEW_ZERO(h->ctx, d->entry_count, &d->dicts));
    XKV_TRY(XKV_NEW_ZERO(h->ctx, d->geometry->rope_count, &d->angles_at));
    XKV_TRY(XKV_NEW_ZERO(h->ctx, planes, &d->value_planes));
    XKV_TRY(XKV_NEW_ZERO(h->ctx, planes, &d->tiles));
    XKV_TRY(XKV_NEW_ZERO(h->ctx, planes, &d->slots));
    XKV_TRY(XKV_NEW_ZERO(h->ctx, planes, &h->asked));
    XKV_TRY(XKV_NEW_ZERO(h->ctx, h->a->stretch_count, &h->groups));
    for (uint32_t i = 0; i < h->a->stretch_count; i++)
        XKV_TRY(XKV_NEW_ZERO(h->ctx, h->a->stretches[i].entry->c.group_count, &h->groups[i]));
    for (uint32_t i = 0; i < planes; i++) {
        const xkv_plane *p = &d->geometry->planes[i];
        width = (uint32_t)xkv_max64(width, xkv_plane_width(p));
        h->asked[i] = p->layer - d->first_layer < d->layer_count && p->kind <= XKV_PLANE_K_ROPE;
    }
    XKV_TRY(XKV_NEW(h->ctx, (size_t)XKV_HELD_TOKENS * width * sizeof(float), &h->rows));
    XKV_TRY(make_cuts(h));
    return XKV_NEW(h->ctx, d->tile_count, &h->tiles);
}

static void holding_fini(holding *h)
{
    for (uint32_t i = 0; h->groups && i < h->a->stretch_count; i++) {
        for (uint32_t k = 0; h->groups[i] && k < h->a->stretches[i].entry->c.group_count; k++) {
            xkv_release(h->ctx, h->groups[i][k].data);
            xkv_release(h->ctx, h->groups[i][k].lines);
        }
        xkv_release(h->ctx, h->groups[i]);
    }
    xkv_release(h->ctx, h->groups);
    xkv_release(h->ctx, h->asked);
    xkv_release(h->ctx, h->cuts);
    xkv_release(h->ctx, h->tiles);
    xkv_release(h->ctx, h->rows);
}

static xkv_status hold(holding *h)
{
    xkv_device_attention *d = h->d;

    XKV_TRY(check_held(h));
    XKV_TRY(host_arrays(h));
    XKV_TRY(copy_dicts(h));
    XKV_TRY(place_all(h));
    d->size = h->used;
    XKV_TRY(xkv_device_result(h->ctx, d->device,
                              d->device->api->alloc(d->device->plug, xkv_max64(d->size, 1), (void **)&d->memory)));
    XKV_TRY(place_all(h));
    return xkv_device_wait_copies(h->ctx, d->device);
}

/* Nothing is on its way any more to what is given back. */
static void settle(xkv_device *d)
{
    if (d->api->record(d->plug, d->begun, d->copies) == XKV_OK)
        (void)d->api->wait(d->plug, d->begun);
}

xkv_status xkv_device_attention_create(xkv_ctx *ctx, xkv_device *device, const xkv_attention *attention,
                                       const xkv_device_dict *dict, xkv_device_attention **copy_p)
{
    holding h = {.ctx = ctx, .a = attention, .given = dict};
    xkv_status status;

    xkv_ctx_begin(ctx);
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &h.d));
    *h.d = (xkv_device_attention){.device = device,
                                  .geometry = &attention->entry->geometry,
                                  .first_layer = attention->first_layer,
                                  .layer_count = attention->layer_count,
                                  .token_count = attention->token_count,
                                  .entry_count = (uint32_t)xkv_max64(attention->stretch_count, 1)};
    status = hold(&h);
    holding_fini(&h);
    if (status != XKV_OK) {
        settle(device);
        xkv_device_attention_free(ctx, h.d);
        return status;
    }
    *copy_p = h.d;
    return XKV_OK;
}

void xkv_device_attention_free(xkv_ctx *ctx, xkv_device_attention *d)
{
    if (!d)
        return;
    for (uint32_t i = 0; d->dicts && i < d->entry_count; i++)
        xkv_device_dict_free(ctx, d->dicts[i]);
    d->device->api->release(d->device->plug, d->memory);
    xkv_release(ctx, d->dicts);
    xkv_release(ctx, d->angles_at);
    xkv_release(ctx, d->value_planes);
    xkv_release(ctx, d->tiles);
    xkv_release(ctx, d->slots);
    xkv_release(ctx, d);
}
