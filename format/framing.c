/* framing.c - engine files as literal bytes and tensors: building, placing planes in them, cutting them. */
#include "engine_file.h"

/* --- Building ----------------------------------------------------------------------------------------------------- */

/* Grow *array_p (of `used` elements) to hold at least `needed`. */
static xkv_status grow(xkv_ctx *ctx, void **array_p, uint64_t used, uint64_t needed, size_t element, uint64_t *capacity)
{
    if (needed <= *capacity)
        return XKV_OK;
    uint64_t wanted = xkv_max64(needed, xkv_max64(64, *capacity + *capacity / 2));
    void *array;
    XKV_TRY(xkv_alloc(ctx, (size_t)wanted, element, &array));
    if (used > 0)
        memcpy(array, *array_p, (size_t)used * element);
    xkv_release(ctx, *array_p);
    *array_p = array;
    *capacity = wanted;
    return XKV_OK;
}

static xkv_status add_segment(xkv_framing_builder *b, const xkv_segment *segment)
{
    uint64_t capacity = b->capacity;
    void *array = b->segments;
    XKV_TRY(grow(b->ctx, &array, b->count, (uint64_t)b->count + 1, sizeof *b->segments, &capacity));
    b->segments = array;
    b->capacity = (uint32_t)capacity;
    b->segments[b->count++] = *segment;
    return XKV_OK;
}

xkv_status xkv_framing_add_literal(xkv_framing_builder *b, const void *bytes, uint64_t size)
{
    if (size == 0)
        return XKV_OK;
    void *array = b->literals;
    uint64_t needed = b->literal_size + size;
    XKV_TRY(grow(b->ctx, &array, b->literal_size, needed, 1, &b->literal_capacity));
    b->literals = array;
    memcpy(b->literals + b->literal_size, bytes, (size_t)size);
    if (b->count > 0 && b->segments[b->count - 1].plane_count == 0)
        b->segments[b->count - 1].size += size;
    else
        XKV_TRY(add_segment(b, &(xkv_segment){.size = size}));
    b->literal_size = needed;
    b->source_size += size;
    return XKV_OK;
}

xkv_status xkv_framing_add_tensor(xkv_framing_builder *b, const xkv_segment *tensor)
{
    XKV_TRY(add_segment(b, tensor));
    b->source_size += tensor->size;
    return XKV_OK;
}

void xkv_framing_take(xkv_framing_builder *b, uint32_t engine, xkv_framing *framing)
{
    framing->engine = engine;
    framing->segment_count = b->count;
    framing->segments = b->segments;
    framing->literals = b->literals;
    framing->literal_size = b->literal_size;
    framing->source_size = b->source_size;
    *b = (xkv_framing_builder){.ctx = b->ctx};
}

void xkv_framing_builder_free(xkv_framing_builder *b)
{
    xkv_release(b->ctx, b->segments);
    xkv_release(b->ctx, b->literals);
    *b = (xkv_framing_builder){.ctx = b->ctx};
}

void xkv_framing_release(xkv_ctx *ctx, xkv_framing *framing)
{
    xkv_release(ctx, (void *)framing->segments);
    xkv_release(ctx, (void *)framing->literals);
    xkv_release(ctx, (void *)framing->rows);
    *framing = (xkv_framing){0};
}

void xkv_framing_free(xkv_ctx *ctx, xkv_framing *framing)
{
    if (!framing)
        return;
    xkv_framing_release(ctx, framing);
    xkv_release(ctx, framing);
}

/* --- Views -------------------------------------------------------------------------------------------------------- */

bool xkv_layout_fits(uint32_t layout, const xkv_plane *p)
{
    uint32_t block = xkv_dtype_block(p->dtype);
    return block == 1 ||
           (layout != XKV_LAYOUT_DIM_MAJOR && (layout != XKV_LAYOUT_HEAD_MAJOR || p->head_dim % block == 0));
}

/* Bytes of one token's row over all planes of a tensor segment. */
static uint64_t segment_row_bytes(const xkv_segment *s, const xkv_geometry *g)
{
    uint64_t bytes = 0;
    for (uint32_t i = s->first_plane; i < s->first_plane + s->plane_count; i++)
        bytes += xkv_dtype_bytes(g->planes[i].dtype, (uint64_t)g->planes[i].heads * g->planes[i].head_dim);
    return bytes;
}

/* Whether a tensor segment fits the geometry; planes_seen counts how often each plane has occurred. */
static xkv_status check_segment(xkv_ctx *ctx, const xkv_segment *s, const xkv_geometry *g, uint8_t *planes_seen)
{
    if (s->first_plane >= g->plane_count || s->plane_count > g->plane_count - s->first_plane)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "segment planes %u..+%u are outside the geometry's %u [F2]",
                        s->first_plane, s->plane_count, g->plane_count);
    bool one_plane = s->layout == XKV_LAYOUT_DIM_MAJOR || s->layout == XKV_LAYOUT_HEAD_MAJOR;
    if (s->layout > XKV_LAYOUT_REVERSED || (one_plane && s->plane_count != 1))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "segment layout %u with %u planes [F2]", s->layout, s->plane_count);
    if (!xkv_layout_fits(s->layout, &g->planes[s->first_plane]))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "segment layout %u splits the blocks of plane %u [F10]", s->layout,
                        s->first_plane);
    uint64_t bytes;
    if (!xkv_mul64(segment_row_bytes(s, g), g->token_count, &bytes) || bytes != s->size)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a tensor segment has %llu bytes, its planes do not [F2]",
                        (unsigned long long)s->size);
    for (uint32_t i = s->first_plane; i < s->first_plane + s->plane_count; i++)
        if (planes_seen[i]++)
            return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u occurs in two segments [F8]", i);
    return XKV_OK;
}

/* The view of one plane whose elements start at `data`, in rows of `row_bytes` where rows are contiguous. */
static xkv_view plane_view(const xkv_plane *p, uint32_t layout, uint64_t tokens, uint64_t row_bytes, uint8_t *data,
                           const uint32_t *rows)
{
    bool split = p->head_dim % xkv_dtype_block(p->dtype) != 0; /* blocks reach over heads */
    uint32_t dim = split ? p->heads * p->head_dim : p->head_dim;
    int64_t element = (int64_t)xkv_dtype_size(p->dtype), head = (int64_t)xkv_dtype_bytes(p->dtype, dim);
    int64_t n = (int64_t)tokens;
    xkv_view v = {.data = data, .rows = rows, .dtype = p->dtype, .head_dim = split ? dim : 0};
    switch (layout) {
    case XKV_LAYOUT_DIM_MAJOR:
        v.token_stride = element;
        v.dim_stride = n * element;
        v.head_stride = dim * n * element;
        break;
    case XKV_LAYOUT_HEAD_MAJOR:
        v.dim_stride = element;
        v.token_stride = head;
        v.head_stride = n * head;
        break;
    default:
        v.dim_stride = element;
        v.head_stride = head;
        v.token_stride = (int64_t)row_bytes;
    }
    return v;
}

static void segment_views(const xkv_segment *s, const xkv_geometry *g, uint8_t *data, const uint32_t *rows,
                          xkv_view *views)
{
    uint64_t row_bytes = segment_row_bytes(s, g);
    for (uint32_t i = 0; i < s->plane_count; i++) {
        uint32_t index = s->first_plane + (s->layout == XKV_LAYOUT_REVERSED ? s->plane_count - 1 - i : i);
        const xkv_plane *p = &g->planes[index];
        views[index] = plane_view(p, s->layout, g->token_count, row_bytes, data, rows);
        data += xkv_dtype_bytes(p->dtype, (uint64_t)p->heads * p->head_dim);
    }
}

xkv_status xkv_framing_views(xkv_ctx *ctx, const xkv_framing *framing, const xkv_geometry *geometry, uint8_t *image,
                             xkv_view *views)
{
    uint8_t *seen = NULL;
    uint64_t offset = 0;
    xkv_status status = XKV_NEW_ZERO(ctx, geometry->plane_count, &seen);
    if (status != XKV_OK)
        return status;
    for (uint32_t i = 0; i < framing->segment_count; i++) {
        const xkv_segment *s = &framing->segments[i];
        if (s->size > framing->source_size - offset) {
            status = xkv_fail(ctx, XKV_ERROR_ARGUMENT, "segments are larger than the source size [F2]");
            goto out;
        }
        if (s->plane_count > 0) {
            XKV_TRY_GOTO(check_segment(ctx, s, geometry, seen), out);
            segment_views(s, geometry, image + offset, framing->rows, views);
        }
        offset += s->size;
    }
    for (uint32_t i = 0; i < geometry->plane_count; i++)
        if (!seen[i]) {
            status = xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u is in no segment [F8]", i);
            goto out;
        }
out:
    xkv_release(ctx, seen);
    return status;
}

/* --- Cutting ------------------------------------------------------------------------------------------------------ */

xkv_status xkv_framing_cut_rows(xkv_ctx *ctx, const xkv_framing *framing, uint32_t total, uint32_t kept,
                                uint8_t **keep_p, uint32_t **rows_p)
{
    *keep_p = NULL;
    *rows_p = NULL;
    if (!framing->rows)
        return XKV_OK;
    uint8_t *keep = NULL;
    uint32_t *rows = NULL, *place = NULL; /* place: the new number of an old row */
    xkv_status status;
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, total, &keep), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, total, &place), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, kept, &rows), out);
    for (uint32_t i = 0; i < kept; i++)
        keep[framing->rows[i]] = 1;
    for (uint32_t row = 0, next = 0; row < total; row++)
        if (keep[row])
            place[row] = next++;
    for (uint32_t i = 0; i < kept; i++)
        rows[i] = place[framing->rows[i]];
    *keep_p = keep;
    *rows_p = rows;
    keep = NULL;
    rows = NULL;
out:
    xkv_release(ctx, keep);
    xkv_release(ctx, rows);
    xkv_release(ctx, place);
    return status;
}

xkv_status xkv_framing_first(xkv_ctx *ctx, const xkv_framing *framing, const xkv_geometry *geometry,
                             uint32_t token_count, xkv_framing **framing_p)
{
    xkv_ctx_begin(ctx);
    if (token_count == 0 || token_count > geometry->token_count)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "cannot cut to %u tokens: the cache has %u", token_count,
                        geometry->token_count);
    xkv_framing *cut;
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &cut));
    xkv_status status;
    switch (framing->engine) {
    case XKV_ENGINE_LLAMA_SEQUENCE:
    case XKV_ENGINE_LLAMA_SESSION:
    case XKV_ENGINE_LLAMA_BLOB:
        status = xkv_llama_first(ctx, framing, geometry, token_count, cut);
        break;
    case XKV_ENGINE_SAFETENSORS:
        status = xkv_safetensors_first(ctx, framing, geometry, token_count, cut);
        break;
    default:
        status = xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "an engine file of kind \"%s\" cannot be cut",
                          xkv_engine_name(framing->engine));
    }
    if (status != XKV_OK) {
        xkv_framing_free(ctx, cut);
        return status;
    }
    *framing_p = cut;
    return XKV_OK;
}

xkv_status xkv_framing_is_whole_only(xkv_ctx *ctx, const xkv_framing *framing, const xkv_geometry *geometry,
                                     uint32_t *whole_only)
{
    xkv_framing *cut = NULL;
    xkv_status status = geometry->token_count > 0 ? xkv_framing_first(ctx, framing, geometry, 1, &cut) : XKV_OK;
    xkv_framing_free(ctx, cut);
    *whole_only = status == XKV_ERROR_UNSUPPORTED;
    return *whole_only ? XKV_OK : status;
}
