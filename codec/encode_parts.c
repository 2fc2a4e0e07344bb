#include "device_pack.h"
#include "encoder.h"

/* The group and batch at hand. */
typedef struct batch {
    xkv_encoder *e;
    xkv_group *g;
    const xkv_factors *f;   /* svd */
    const xkv_coded *coded; /* dict, scalar and svdq */
    uint32_t first;
} batch;

/* --- Parts -------------------------------------------------------------------------------------------------------- */

/* Rows of tokens [t0, t1) as the engine holds them: spec/codec.md, section 1. */
static void gather_exact(const xkv_encoder *e, const xkv_group *g, uint32_t t0, uint32_t t1, uint8_t *dst,
                         size_t row_bytes)
{
    size_t column = 0;

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &e->c.geometry.planes[g->planes[i]];
        xkv_view_gather_bytes(&e->views[g->planes[i]], p, t0, t1, dst + column, row_bytes);
        column += (size_t)xkv_dtype_bytes(p->dtype, xkv_plane_width(p));
    }
}

/* spec/dictionary.md, section 1: side part. */
static void side_part(const batch *b, uint8_t *p)
{
    const xkv_container *c = &b->e->c;
    const xkv_scalar *scalar = &b->e->scalars[b->g - c->groups];

    xkv_storef32(p, b->coded->step);
    xkv_store32(p + 4, 0);
    p += 8;
    if (b->g->codec == XKV_GROUP_SCALAR) {
        for (uint32_t i = 0; i < b->g->plane_count; i++, p += 4)
            xkv_storef32(p, scalar->scales[i]);
        memcpy(p, scalar->stored_mean, 2ull * b->g->width);
        p += 2ull * b->g->width;
    }
    memcpy(p, b->coded->tables, b->g->rank);
}

/* The matrix of a part, at s->raw. */
static const void *part_matrix(const batch *b, uint32_t part, xkv_shape shape, xkv_slot *s)
{
    const xkv_container *c = &b->e->c;
    size_t row_bytes = (size_t)(shape.cols * shape.elem);
    uint32_t t0, t1, n = c->geometry.token_count;

    if (part == XKV_PART_COMPONENTS && b->coded) {
        side_part(b, s->raw);
    } else if (part == XKV_PART_COMPONENTS) {
        size_t bytes = (size_t)b->g->rank * b->g->width * 2;
        memcpy(s->raw, b->f->components, bytes);
        for (uint32_t i = 0; i < b->g->rank; i++)
            xkv_storef32(s->raw + bytes + 4ull * i, b->f->scales[i]);
    } else if (part == XKV_PART_EXACT) {
        gather_exact(b->e, b->g, 0, c->sinks, s->raw, row_bytes);
        gather_exact(b->e, b->g, n - c->window, n, s->raw + c->sinks * row_bytes, row_bytes);
    } else if (b->g->codec == XKV_GROUP_SVD) {
        xkv_chunk_coded(c, part - XKV_PART_CHUNKS, &t0, &t1);
        return b->f->coefficients + (size_t)(t0 - b->f->first) * b->g->rank;
    } else {
        xkv_chunk_tokens(c, part - XKV_PART_CHUNKS, &t0, &t1);
        gather_exact(b->e, b->g, t0, t1, s->raw, row_bytes);
    }
    return s->raw;
}

/* The coefficients of one chunk as a rANS stream, if not the device has made it. */
static void encode_chunk(const batch *b, uint32_t part, xkv_slot *s)
{
    const xkv_coded *coded = b->coded;
    uint32_t t0, t1;

    s->method = XKV_METHOD_CODED;
    if (b->e->device) {
        const uint64_t *at = b->e->device->stream_at + (part - XKV_PART_CHUNKS);
        s->data = b->e->device->streams + at[0];
        s->size = at[1] - at[0];
        return;
    }
    xkv_chunk_coded(&b->e->c, part - XKV_PART_CHUNKS, &t0, &t1);
    xkv_rans_shape shape = {t1 - t0, coded->coded, coded->tokens, coded->coded_tables};
    s->size = xkv_rans_encode(xkv_coder_cpu(), &shape, coded->q + (t0 - coded->first), s->packed);
    s->data = s->packed;
}

/* Side part of svdq. */
static void encode_basis(const batch *b, xkv_slot *s)
{
    s->size = xkv_svdq_store(b->g, b->coded->basis, b->coded, s->packed);
    s->method = XKV_METHOD_CODED;
    s->data = s->packed;
}

/* --- Parts of the entry that is appended to ----------------------------------------------------------------------- */

static bool is_kept(const xkv_encoder *e, uint32_t part)
{
    if (!e->append.base || part == XKV_PART_COMPONENTS)
        return e->append.base != NULL;
    if (part == XKV_PART_EXACT)
        return e->c.window == 0;
    return part - XKV_PART_CHUNKS < e->append.chunks;
}

static const xkv_part *kept_part(const xkv_encoder *e, const xkv_group *g, uint32_t part)
{
    return &e->append.base->c.groups[g - e->c.groups].parts[part];
}

/* A lossless entry gives back the very file that is appended [F7]: the rows it has must be those there. */
static xkv_status compare_kept(const batch *b, uint32_t part)
{
    const xkv_entry *base = b->e->append.base;
    const xkv_group *g = &base->c.groups[b->g - b->e->c.groups];
    xkv_shape shape = xkv_part_shape(&base->c, g, part);
    uint8_t *kept = NULL, *given = NULL;
    uint32_t t0, t1;
    xkv_status status = XKV_OK;

    xkv_chunk_tokens(&base->c, part - XKV_PART_CHUNKS, &t0, &t1);
    XKV_TRY_GOTO(XKV_NEW(b->e->ctx, (size_t)xkv_shape_bytes(shape), &given), out);
    gather_exact(b->e, b->g, t0, t1, given, (size_t)(shape.cols * shape.elem));
    XKV_TRY_GOTO(xkv_read_matrix(b->e->ctx, &base->input, &base->c, g, part, "the entry to append to", &kept), out);
    if (memcmp(kept, given, (size_t)xkv_shape_bytes(shape)) != 0)
        status = xkv_fail(b->e->ctx, XKV_ERROR_MISMATCH,
                          "tokens %u .. %u: the rows are not those of the lossless entry to append to", t0, t1 - 1);
out:
    xkv_release(b->e->ctx, kept);
    xkv_release(b->e->ctx, given);
    return status;
}

static xkv_status keep_part(const batch *b, uint32_t part, xkv_slot *s)
{
    const xkv_entry *base = b->e->append.base;
    const xkv_part *p = kept_part(b->e, b->g, part);

    s->data = s->packed;
    s->size = p->size;
    s->method = p->method;
    XKV_TRY(xkv_container_read_part(b->e->ctx, &base->input, &base->c, p, s->packed));
    return b->e->append.exact && part >= XKV_PART_CHUNKS ? compare_kept(b, part) : XKV_OK;
}

/* --- All parts ---------------------------------------------------------------------------------------------------- */

static xkv_status encode_part(const batch *b, uint32_t part, xkv_slot *s)
{
    xkv_shape shape = xkv_part_shape(&b->e->c, b->g, part);
    bool factors = b->g->codec == XKV_GROUP_SVD && part != XKV_PART_EXACT;

    if (is_kept(b->e, part))
        return keep_part(b, part, s);
    if (xkv_shape_bytes(shape) == 0) {
        s->size = 0;
        s->method = XKV_METHOD_STORED;
        return XKV_OK;
    }
    if (shape.coded) {
        if (part == XKV_PART_COMPONENTS)
            encode_basis(b, s);
        else
            encode_chunk(b, part, s);
        return XKV_OK;
    }
    return xkv_part_encode(b->e->ctx, b->e->kernels, s->zstd, factors && !b->e->o.zstd_factors ? 0 : b->e->o.zstd_level,
                           shape, part_matrix(b, part, shape, s), s->planes, s->packed, &s->data, &s->size, &s->method);
}

static xkv_status encode_task(void *user, uint32_t worker, uint64_t index)
{
    batch *b = user;

    (void)worker; /* slots belong to tasks, since their contents outlive the run */
    return encode_part(b, b->first + (uint32_t)index, &b->e->slots[index]);
}

/* Encode all parts of a group in order, and write them; or, with `count_only`, add up their aligned sizes. */
static xkv_status encode_parts(xkv_encoder *e, xkv_group *g, const xkv_factors *f, const xkv_coded *coded,
                               uint64_t *count_only)
{
    batch b = {.e = e, .g = g, .f = f, .coded = coded};

    for (; b.first < g->part_count; b.first += e->threads) {
        uint32_t n = (uint32_t)xkv_min64(e->threads, g->part_count - b.first);
        XKV_TRY(xkv_pool_run(e->ctx, e->pool, n, encode_task, &b));
        for (uint32_t i = 0; i < n; i++) {
            const xkv_slot *s = &e->slots[i];
            if (count_only)
                *count_only += xkv_align64(s->size, XKV_ALIGN);
            else
                XKV_TRY(xkv_container_add_part(e->ctx, &e->w, &g->parts[b.first + i], s->data, s->size, s->method));
        }
    }
    return XKV_OK;
}

/* Scratch for the largest part of a group, in every slot. */
static xkv_status size_slots(xkv_encoder *e, const xkv_group *g, const xkv_coded *coded)
{
    uint64_t raw = 0, packed = 0;

    for (uint32_t i = 0; i < g->part_count; i++) {
        xkv_shape s = xkv_part_shape(&e->c, g, i);
        xkv_rans_shape stream = {(uint32_t)s.rows, coded ? coded->coded : 0, 0, coded ? coded->coded_tables : NULL};
        if (!s.coded)
            raw = xkv_max64(raw, xkv_shape_bytes(s));
        packed = xkv_max64(packed, s.coded ? xkv_rans_bound(&stream) : xkv_part_bound(s));
        if (is_kept(e, i))
            packed = xkv_max64(packed, kept_part(e, g, i)->size);
    }
    if (g->codec == XKV_GROUP_SVDQ && coded->basis)
        packed = xkv_max64(packed, xkv_svdq_bound(g, coded->basis));
    for (uint32_t i = 0; i < e->threads; i++) {
        xkv_slot *s = &e->slots[i];
        XKV_TRY(XKV_NEW(e->ctx, (size_t)raw, &s->raw));
        XKV_TRY(XKV_NEW(e->ctx, (size_t)raw, &s->planes));
        XKV_TRY(XKV_NEW(e->ctx, (size_t)packed, &s->packed));
    }
    return XKV_OK;
}

void xkv_encoder_release_slots(xkv_encoder *e)
{
    for (uint32_t i = 0; i < e->threads; i++) {
        xkv_slot *s = &e->slots[i];
        xkv_release(e->ctx, s->raw);
        xkv_release(e->ctx, s->planes);
        xkv_release(e->ctx, s->packed);
        s->raw = s->planes = s->packed = NULL;
    }
}

/* What the device has of a group: its streams, or all rows of one that is stored lossless. */
static xkv_status get_from_device(xkv_encoder *e, const xkv_group *g, const xkv_coded *coded)
{
    XKV_TRY(xkv_device_pack_bring(e->device, g->codec == XKV_GROUP_LOSSLESS ? g : NULL));
    return coded ? xkv_device_pack_streams(e->device, &e->c, coded) : XKV_OK;
}

xkv_status xkv_encoder_write_group(xkv_encoder *e, xkv_group *g, const xkv_factors *f, const xkv_coded *coded,
                                   uint64_t *count_only)
{
    xkv_status status = XKV_OK;

    if (e->device)
        XKV_TRY_GOTO(get_from_device(e, g, coded), out);
    XKV_TRY_GOTO(size_slots(e, g, coded), out);
    XKV_TRY_GOTO(encode_parts(e, g, f, coded, count_only), out);
out:
    xkv_encoder_release_slots(e);
    return status;
}
