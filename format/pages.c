/* pages.c - engines' paged caches as plain views: strides from the axes of a tensor, row numbers from a block table. */
#include "container.h"

#include <string.h>

/* The axes of xkv_pages. */
enum { L, K, B, N, H, D, C, X, AXES };
static const char letters[] = "LKBNHDCX";

/* A tensor, worked out. */
typedef struct layout {
    const xkv_pages *pages;
    uint32_t heads, dims[4]; /* of the planes, by place in pages->kinds */
    bool present[AXES];
    uint64_t extent[AXES];        /* 1 where the axis is absent */
    uint64_t stride[AXES];        /* bytes; 0 where the axis is absent */
    bool merged;                  /* blocks reach over heads: H has one head of the whole row */
    uint64_t unit;                /* bytes between rows */
    uint64_t per_block, per_slot; /* rows between blocks, and between slots */
    uint32_t rows;                /* which of the row arrays */
} layout;

typedef struct paging {
    xkv_ctx *ctx;
    const xkv_geometry *geometry;
    uint32_t first, tokens;
    layout *layouts; /* [count] */
    uint32_t count;
    uint32_t row_arrays;
} paging;

static xkv_status refuse(const paging *p, const layout *l, const char *what)
{
    const char *axes = l->pages->axes;
    return xkv_fail(p->ctx, XKV_ERROR_ARGUMENT, "pages %u (axes %.16s): %s", (unsigned)(l - p->layouts),
                    axes ? axes : "none", what);
}

/* --- Shape -------------------------------------------------------------------------------------------------------- */

/* Heads and dims of kind `index` of the tensor: the same in all layers that the geometry has. */
static xkv_status find_dims(const paging *p, layout *l, uint32_t index)
{
    const xkv_pages *pages = l->pages;
    for (uint32_t i = 0; i < p->geometry->plane_count; i++) {
        const xkv_plane *plane = &p->geometry->planes[i];
        if (plane->kind != pages->kinds[index] || plane->layer < pages->first_layer ||
            plane->layer - pages->first_layer >= pages->layer_count)
            continue;
        if ((l->heads != 0 && l->heads != plane->heads) || (l->dims[index] != 0 && l->dims[index] != plane->head_dim))
            return refuse(p, l, "its planes differ in heads or dims");
        l->heads = plane->heads;
        l->dims[index] = plane->head_dim;
    }
    return l->dims[index] != 0 ? XKV_OK : refuse(p, l, "the geometry has no plane of one of its kinds");
}

static xkv_status check_counts(const paging *p, const layout *l)
{
    const xkv_pages *pages = l->pages;
    if (pages->data == NULL || pages->table == NULL || pages->axes == NULL)
        return refuse(p, l, "data, table or axes are NULL");
    if (xkv_dtype_block(pages->dtype) == 0)
        return refuse(p, l, "unknown dtype");
    if (pages->layer_count == 0 || pages->kind_count == 0 || pages->kind_count > 4)
        return refuse(p, l, "no layers, or not 1 to 4 kinds");
    if (pages->block_count == 0 || pages->block_tokens == 0 || pages->block_tokens > XKV_MAX_BLOCK_TOKENS)
        return refuse(p, l, "no blocks, or blocks of not 1 to 256 tokens");
    return XKV_OK;
}

static xkv_status read_axes(const paging *p, layout *l)
{
    for (const char *a = l->pages->axes; *a != '\0'; a++) {
        const char *letter = strchr(letters, *a);
        if (letter == NULL || l->present[letter - letters])
            return refuse(p, l, "an axis that does not exist, or twice");
        l->present[letter - letters] = true;
    }
    if (!l->present[B] || l->present[D] == l->present[C] || (l->present[K] && l->present[C]))
        return refuse(p, l, "it needs B, and either D, with or without K, or C");
    if (l->present[X] != (l->pages->dim_split != 0) || (l->present[X] && !l->present[D]))
        return refuse(p, l, "axis X needs D and dim_split, and dim_split needs X");
    return XKV_OK;
}

/* How many dims the fastest axes count, in blocks of the dtype. */
static xkv_status set_dims(const paging *p, layout *l)
{
    const xkv_pages *pages = l->pages;
    const char *end = pages->axes + strlen(pages->axes);
    uint32_t block = xkv_dtype_block(pages->dtype), split = pages->dim_split;
    uint64_t sum = 0;
    for (uint32_t i = 0; i < pages->kind_count; i++) {
        l->merged |= l->dims[i] % block != 0;
        sum += l->dims[i];
        if (l->present[K] && l->dims[i] != l->dims[0])
            return refuse(p, l, "axis K, but its kinds have other dims");
    }
    if (split != 0 && (block > 1 || l->dims[0] % split != 0))
        return refuse(p, l, "dim_split does not divide the dims, or splits blocks");
    if (block > 1 && end[-1] != 'D' && end[-1] != 'C')
        return refuse(p, l, "the fastest axis of blocks is D or C");
    if (l->merged && (l->present[C] || pages->strides != NULL || end - pages->axes < 2 || end[-2] != 'H' ||
                      (uint64_t)l->heads * l->dims[0] % block != 0))
        return refuse(p, l, "dims are no whole blocks, and heads do not follow each other");
    l->extent[H] = l->merged ? 1 : l->heads;
    l->extent[D] = (l->merged ? (uint64_t)l->heads * l->dims[0] : l->dims[0]) / (split ? split : block);
    l->extent[C] = sum / block;
    l->extent[X] = split ? split : 1;
    return XKV_OK;
}

static xkv_status set_extents(const paging *p, layout *l)
{
    XKV_TRY(set_dims(p, l));
    l->extent[L] = l->pages->layer_count;
    l->extent[K] = l->pages->kind_count;
    l->extent[B] = l->pages->block_count;
    l->extent[N] = l->pages->block_tokens;
    if ((!l->present[L] && l->extent[L] > 1) || (!l->present[N] && l->extent[N] > 1) ||
        (!l->present[H] && l->extent[H] > 1) || (!l->present[K] && !l->present[C] && l->extent[K] > 1))
        return refuse(p, l, "layers, kinds, slots or heads without an axis");
    return XKV_OK;
}

/* --- Strides ------------------------------------------------------------------------------------------------------ */

/* Dense strides, or the caller's; *end: bytes from the first to behind the last element. */
static bool set_strides(layout *l, uint64_t *end)
{
    const xkv_pages *pages = l->pages;
    uint64_t dense = xkv_dtype_size(pages->dtype), span;
    *end = dense;
    for (size_t i = strlen(pages->axes); i-- > 0;) {
        size_t axis = (size_t)(strchr(letters, pages->axes[i]) - letters);
        if (pages->strides != NULL && pages->strides[i] < 0)
            return false;
        l->stride[axis] = pages->strides != NULL ? (uint64_t)pages->strides[i] : dense;
        if (l->extent[axis] > 1 && l->stride[axis] == 0)
            return false;
        if (!xkv_mul64(l->extent[axis] - 1, l->stride[axis], &span) || !xkv_add64(*end, span, end) ||
            !xkv_mul64(dense, l->extent[axis], &dense))
            return false;
    }
    return *end <= INT64_MAX;
}

static xkv_status check_strides(const paging *p, layout *l)
{
    const xkv_pages *pages = l->pages;
    uint64_t end, size = xkv_dtype_size(pages->dtype);
    if (!set_strides(l, &end))
        return refuse(p, l, "a stride is negative or 0, or sizes overflow");
    if (end > pages->size)
        return xkv_fail(p->ctx, XKV_ERROR_ARGUMENT, "pages %u (axes %.16s): %llu bytes, the axes take %llu",
                        (unsigned)(l - p->layouts), pages->axes, (unsigned long long)pages->size,
                        (unsigned long long)end);
    if (xkv_dtype_block(pages->dtype) > 1 && l->stride[l->present[C] ? C : D] != size)
        return refuse(p, l, "blocks of a head do not follow each other");
    if (l->present[X] && l->extent[H] > 1 && l->stride[H] != l->extent[D] * l->stride[D])
        return refuse(p, l, "heads are not as far apart as their groups of dims");
    return XKV_OK;
}

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
    while (b != 0) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* A token's place is block * stride[B] + slot * stride[N]: rows are as far apart as divides both. */
static xkv_status set_rows(paging *p, layout *l)
{
    uint64_t blocks = l->extent[B] > 1 ? l->stride[B] : 0, slots = l->extent[N] > 1 ? l->stride[N] : 0, last;
    l->unit = xkv_max64(1, common_divisor(blocks, slots));
    l->per_block = blocks / l->unit;
    l->per_slot = slots / l->unit;
    last = (l->extent[B] - 1) * l->per_block + (l->extent[N] - 1) * l->per_slot; /* less than the bytes */
    if (last > UINT32_MAX)
        return xkv_fail(p->ctx, XKV_ERROR_LIMIT,
                        "pages %u (axes %.16s): the pool has rows every %llu bytes and more than 2^32 of them",
                        (unsigned)(l - p->layouts), l->pages->axes, (unsigned long long)l->unit);
    l->rows = p->row_arrays;
    for (const layout *other = p->layouts; other < l; other++)
        if (other->pages->table == l->pages->table && other->pages->block_tokens == l->pages->block_tokens &&
            other->per_block == l->per_block && other->per_slot == l->per_slot) {
            l->rows = other->rows;
            return XKV_OK;
        }
    p->row_arrays++;
    return XKV_OK;
}

static xkv_status check_table(const paging *p, const layout *l)
{
    const xkv_pages *pages = l->pages;
    uint64_t end = (uint64_t)p->first + p->tokens;
    if (xkv_ceil_div(end, pages->block_tokens) > pages->table_size)
        return xkv_fail(p->ctx, XKV_ERROR_ARGUMENT, "a table of %u blocks of %u tokens does not reach token %llu",
                        pages->table_size, pages->block_tokens, (unsigned long long)(end - 1));
    for (uint32_t i = p->first / pages->block_tokens; i < xkv_ceil_div(end, pages->block_tokens); i++)
        if (pages->table[i] < 0 || (uint32_t)pages->table[i] >= pages->block_count)
            return xkv_fail(p->ctx, XKV_ERROR_ARGUMENT, "entry %u of the table is block %d, expected 0 .. %u", i,
                            pages->table[i], pages->block_count - 1);
    return XKV_OK;
}

static xkv_status work_out(paging *p, layout *l)
{
    XKV_TRY(check_counts(p, l));
    for (uint32_t i = 0; i < l->pages->kind_count; i++)
        XKV_TRY(find_dims(p, l, i));
    XKV_TRY(read_axes(p, l));
    XKV_TRY(set_extents(p, l));
    XKV_TRY(check_strides(p, l));
    XKV_TRY(set_rows(p, l));
    return check_table(p, l);
}

/* --- Views -------------------------------------------------------------------------------------------------------- */

static void fill_rows(const paging *p, const layout *l, uint32_t *rows)
{
    uint32_t slots = l->pages->block_tokens;
    for (uint32_t i = 0; i < p->tokens; i++) {
        uint64_t token = (uint64_t)p->first + i, block = (uint32_t)l->pages->table[token / slots];
        rows[i] = (uint32_t)(block * l->per_block + token % slots * l->per_slot);
    }
}

/* Where the plane of `layer` and the kind `index` begins. */
static uint64_t plane_offset(const layout *l, uint32_t layer, uint32_t index)
{
    uint64_t before = 0;
    for (uint32_t i = 0; i < index; i++)
        before += l->dims[i] / xkv_dtype_block(l->pages->dtype);
    return (layer - l->pages->first_layer) * l->stride[L] +
           (l->present[C] ? before * l->stride[C] : index * l->stride[K]);
}

static xkv_view plane_view(const layout *l, uint32_t layer, uint32_t index, const uint32_t *rows)
{
    const xkv_pages *pages = l->pages;
    xkv_view v = {.data = (uint8_t *)pages->data + plane_offset(l, layer, index),
                  .token_stride = (int64_t)l->unit,
                  .head_stride = (int64_t)l->stride[H],
                  .dim_stride = (int64_t)l->stride[l->present[C] ? C : D],
                  .rows = rows,
                  .dtype = pages->dtype};
    if (l->merged)
        v.head_dim = l->heads * l->dims[index];
    if (l->present[X]) { /* groups of dims are heads of their own */
        v.head_dim = pages->dim_split;
        v.head_stride = (int64_t)l->stride[D];
        v.dim_stride = (int64_t)l->stride[X];
    }
    return v;
}

/* The tensor that holds a plane. */
static xkv_status find_view(const paging *p, uint32_t index, const uint32_t *rows, xkv_view *view)
{
    const xkv_plane *plane = &p->geometry->planes[index];
    uint32_t found = 0;
    for (uint32_t i = 0; i < p->count; i++) {
        const layout *l = &p->layouts[i];
        for (uint32_t k = 0; k < l->pages->kind_count; k++) {
            if (l->pages->kinds[k] != plane->kind || plane->layer < l->pages->first_layer ||
                plane->layer - l->pages->first_layer >= l->pages->layer_count)
                continue;
            *view = plane_view(l, plane->layer, k, rows + (size_t)l->rows * p->tokens);
            found++;
        }
    }
    if (found != 1)
        return xkv_fail(p->ctx, XKV_ERROR_ARGUMENT, "plane %u (layer %u, %s) is in %u tensors of pages, expected one",
                        index, plane->layer, xkv_plane_kind_name(plane->kind), found);
    return xkv_check_view(p->ctx, p->geometry, index, view);
}

static xkv_status make_views(const paging *p, xkv_view **views_p)
{
    size_t planes = p->geometry->plane_count;
    uint64_t bytes = (uint64_t)p->row_arrays * p->tokens * sizeof(uint32_t) + planes * sizeof(xkv_view);
    void *block;
    xkv_status status = xkv_alloc(p->ctx, (size_t)bytes, 1, &block);
    if (status != XKV_OK)
        return status;
    xkv_view *views = block;
    uint32_t *rows = (uint32_t *)(void *)(views + planes);
    for (uint32_t i = 0; i < p->count; i++)
        fill_rows(p, &p->layouts[i], rows + (size_t)p->layouts[i].rows * p->tokens);
    for (uint32_t i = 0; i < planes; i++)
        XKV_TRY_GOTO(find_view(p, i, rows, &views[i]), out);
    *views_p = views;
    views = NULL;
out:
    xkv_release(p->ctx, views);
    return status;
}

xkv_status xkv_views_from_pages(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_pages *pages, uint32_t count,
                                uint32_t first_token, uint32_t token_count, xkv_view **views_p)
{
    paging p = {.ctx = ctx,
                .geometry = geometry,
                .first = first_token,
                .tokens = token_count ? token_count : geometry->token_count,
                .count = count};
    xkv_status status = XKV_OK;
    xkv_ctx_begin(ctx);
    if (p.tokens == 0 || p.tokens > XKV_MAX_TOKENS || first_token > XKV_MAX_TOKENS - p.tokens)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "tokens %u + %u are none, or more than 2^31 - 1", first_token,
                        p.tokens);
    for (uint32_t i = 0; i < geometry->plane_count; i++)
        XKV_TRY(xkv_check_plane(ctx, geometry, i));
    XKV_TRY(XKV_NEW_ZERO(ctx, count, &p.layouts));
    for (uint32_t i = 0; i < count; i++) {
        p.layouts[i].pages = &pages[i];
        for (int axis = 0; axis < AXES; axis++)
            p.layouts[i].extent[axis] = 1;
        XKV_TRY_GOTO(work_out(&p, &p.layouts[i]), out);
    }
    status = make_views(&p, views_p);
out:
    xkv_release(ctx, p.layouts);
    return status;
}

void xkv_views_free(xkv_ctx *ctx, xkv_view *views)
{
    xkv_release(ctx, views);
}
