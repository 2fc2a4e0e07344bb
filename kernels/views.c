/* views.c - moving tokens between a view (any strides) and dense rows, with or without conversion. */
#include "kernels.h"

/* Elements of a tile side: a tile of 32 x 32 elements, transposed in the L1 cache, turns reads along tokens into
 * writes along dims and back. */
#define TILE 32

/* The heads of a row as the view counts them. */
typedef struct row_heads {
    uint32_t count, dim;
} row_heads;

/* How elements pass between memory (the view) and dense rows. */
typedef struct mover {
    const xkv_kernels *k; /* NULL: elements pass unchanged */
    uint32_t dtype;       /* in memory */
    size_t elem;          /* bytes of an element (or block) in memory */
    size_t dense_elem;    /* ... and in dense rows; without blocks */
    bool scatter;         /* from dense rows to memory */
    uint32_t via;         /* scattering to blocks: the 16-bit type that elements are rounded to before; else `dtype` */
} mover;

/* To blocks of elements that are first rounded to a 16-bit type. */
static void quantize_via(const mover *m, const float *src, uint8_t *memory, size_t n)
{
    enum { PIECE = 256 };
    float rounded[PIECE];
    uint16_t bits[PIECE];
    for (size_t i = 0, piece; i < n; i += piece) {
        piece = (size_t)xkv_min64(PIECE, n - i);
        m->k->from_f32(m->via, src + i, bits, piece);
        m->k->to_f32(m->via, bits, rounded, piece);
        m->k->from_f32(m->dtype, rounded, memory + xkv_dtype_bytes(m->dtype, i), piece);
    }
}

/* Bytes of n neighbouring elements in dense rows. */
static size_t dense_bytes(const mover *m, size_t n)
{
    return m->k != NULL ? n * sizeof(float) : (size_t)xkv_dtype_bytes(m->dtype, n);
}

/* Move n neighbouring elements. */
static void move_run(const mover *m, uint8_t *memory, uint8_t *dense, size_t n)
{
    if (m->k == NULL)
        memcpy(m->scatter ? memory : dense, m->scatter ? dense : memory, dense_bytes(m, n));
    else if (m->scatter && m->via != m->dtype)
        quantize_via(m, (const float *)(const void *)dense, memory, n);
    else if (m->scatter)
        m->k->from_f32(m->dtype, (const float *)(const void *)dense, memory, n);
    else
        m->k->to_f32(m->dtype, memory, (float *)(void *)dense, n);
}

static uint8_t *element(const xkv_view *v, uint32_t token, uint32_t head, uint32_t dim)
{
    int64_t row = v->rows != NULL ? v->rows[token] : token;
    return (uint8_t *)v->data + (row * v->token_stride + head * v->head_stride + dim * v->dim_stride);
}

static void copy_element(uint8_t *dst, const uint8_t *src, size_t size)
{
    if (size == 4)
        memcpy(dst, src, 4);
    else
        memcpy(dst, src, 2);
}

/* Move the tile of `tokens` neighbouring rows in memory and `dims` dims at `memory`; dense rows are row_bytes apart. */
static void move_tile(const mover *m, const xkv_view *v, uint8_t *memory, size_t tokens, size_t dims, uint8_t *dense,
                      size_t row_bytes)
{
    _Alignas(64) uint8_t tile[TILE * TILE * 4]; /* [dim][token] */
    size_t size = m->dense_elem, line = TILE * size;
    for (size_t d = 0; d < dims && !m->scatter; d++)
        move_run(m, memory + (int64_t)d * v->dim_stride, tile + d * line, tokens);
    for (size_t t = 0; t < tokens; t++) {
        for (size_t d = 0; d < dims; d++) {
            uint8_t *in_row = dense + t * row_bytes + d * size, *in_tile = tile + d * line + t * size;
            copy_element(m->scatter ? in_tile : in_row, m->scatter ? in_row : in_tile, size);
        }
    }
    for (size_t d = 0; d < dims && m->scatter; d++)
        move_run(m, memory + (int64_t)d * v->dim_stride, tile + d * line, tokens);
}

/* How many tokens from `t` on, at most a tile, lie behind each other in memory. */
static uint32_t token_run(const mover *m, const xkv_view *v, uint32_t t, uint32_t t1)
{
    uint32_t n = 1;
    if (v->token_stride != (int64_t)m->elem)
        return n;
    while (n < TILE && t + n < t1 && (v->rows == NULL || v->rows[t + n] == v->rows[t] + n))
        n++;
    return n;
}

/* Dims are apart in memory: tiles, which are fast where tokens are neighbours (transposed V). */
static void move_by_tiles(const mover *m, const xkv_view *v, row_heads s, uint32_t t0, uint32_t t1, uint8_t *dense,
                          size_t row_bytes)
{
    for (uint32_t h = 0; h < s.count; h++) {
        for (uint32_t d = 0; d < s.dim; d += TILE) {
            size_t dims = xkv_min64(TILE, s.dim - d);
            uint8_t *column = dense + ((size_t)h * s.dim + d) * m->dense_elem;
            for (uint32_t t = t0, n; t < t1; t += n) {
                n = token_run(m, v, t, t1);
                move_tile(m, v, element(v, t, h, d), n, dims, column + (t - t0) * row_bytes, row_bytes);
            }
        }
    }
}

/* Dims are neighbours: whole rows where heads are too, else head by head. */
static void move_by_rows(const mover *m, const xkv_view *v, row_heads s, uint32_t t0, uint32_t t1, uint8_t *dense,
                         size_t row_bytes)
{
    bool whole = s.count == 1 || v->head_stride == (int64_t)xkv_dtype_bytes(m->dtype, s.dim);
    uint32_t runs = whole ? 1 : s.count;
    size_t n = whole ? (size_t)s.count * s.dim : s.dim, head = dense_bytes(m, n);
    for (uint32_t t = t0; t < t1; t++)
        for (uint32_t h = 0; h < runs; h++)
            move_run(m, element(v, t, h, 0), dense + (t - t0) * row_bytes + h * head, n);
}

static void move_tokens(const mover *m, const xkv_view *v, const xkv_plane *p, uint32_t t0, uint32_t t1, uint8_t *dense,
                        size_t row_bytes)
{
    uint32_t dim = v->head_dim != 0 ? v->head_dim : p->head_dim;
    row_heads s = {p->heads * p->head_dim / dim, dim};
    if (v->dim_stride == (int64_t)m->elem)
        move_by_rows(m, v, s, t0, t1, dense, row_bytes);
    else
        move_by_tiles(m, v, s, t0, t1, dense, row_bytes);
}

/* Element sizes are those of known dtypes; whoever made the view and the plane has checked them. */
static mover mover_to_f32(const xkv_kernels *k, const xkv_view *view, const xkv_plane *p, bool scatter)
{
    bool via = xkv_dtype_block(view->dtype) > 1 && (p->dtype == XKV_F16 || p->dtype == XKV_BF16);
    return (mover){.k = k,
                   .dtype = view->dtype,
                   .elem = xkv_dtype_size(view->dtype),
                   .dense_elem = sizeof(float),
                   .scatter = scatter,
                   .via = via ? p->dtype : view->dtype};
}

static mover mover_of_bytes(const xkv_plane *p, bool scatter)
{
    size_t elem = xkv_dtype_size(p->dtype);
    return (mover){.dtype = p->dtype, .elem = elem, .dense_elem = elem, .scatter = scatter};
}

void xkv_view_gather(const xkv_kernels *k, const xkv_view *view, const xkv_plane *p, uint32_t t0, uint32_t t1,
                     float *dst, size_t ld)
{
    mover m = mover_to_f32(k, view, p, false);
    move_tokens(&m, view, p, t0, t1, (uint8_t *)dst, ld * sizeof *dst);
}

void xkv_view_scatter(const xkv_kernels *k, const float *src, size_t ld, const xkv_plane *p, uint32_t t0, uint32_t t1,
                      const xkv_view *view)
{
    mover m = mover_to_f32(k, view, p, true);
    move_tokens(&m, view, p, t0, t1, (uint8_t *)(uintptr_t)src, ld * sizeof *src); /* only read when scattering */
}

void xkv_view_gather_bytes(const xkv_view *view, const xkv_plane *p, uint32_t t0, uint32_t t1, uint8_t *dst,
                           size_t row_bytes)
{
    mover m = mover_of_bytes(p, false);
    move_tokens(&m, view, p, t0, t1, dst, row_bytes);
}

void xkv_view_scatter_bytes(const uint8_t *src, size_t row_bytes, const xkv_plane *p, uint32_t t0, uint32_t t1,
                            const xkv_view *view)
{
    mover m = mover_of_bytes(p, true);
    move_tokens(&m, view, p, t0, t1, (uint8_t *)(uintptr_t)src, row_bytes);
}
