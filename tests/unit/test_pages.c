/* test_pages.c - views of engines' pages against the place of each element, written down for each layout by hand. */
#include "kernels.h"
#include "support.h"

#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, BLOCKS = 11, TOKENS = 75, MARGIN = 256, MAX_TENSORS = 2 * LAYERS };

/* One element, and the sizes of its tensor. Dims are counted in blocks of the dtype. */
typedef struct place {
    size_t nb, bs, heads, dim[2]; /* dim: of K and V */
    size_t l, k, b, s, h, d;      /* layer, kind, block, slot, head, dim */
} place;

/* Index of an element in its tensor, as the engine's code or documentation has it. */
typedef size_t (*place_fn)(const place *p);

static size_t flash_nhd(const place *p) /* [2, blocks, slots, heads, dim] */
{
    return (((p->k * p->nb + p->b) * p->bs + p->s) * p->heads + p->h) * p->dim[0] + p->d;
}
static size_t flash_hnd(const place *p) /* [2, blocks, heads, slots, dim] */
{
    return (((p->k * p->nb + p->b) * p->heads + p->h) * p->bs + p->s) * p->dim[0] + p->d;
}
static size_t infer_nhd(const place *p) /* [blocks, 2, slots, heads, dim] */
{
    return (((p->b * 2 + p->k) * p->bs + p->s) * p->heads + p->h) * p->dim[0] + p->d;
}
static size_t infer_hnd(const place *p) /* [blocks, 2, heads, slots, dim] */
{
    return (((p->b * 2 + p->k) * p->heads + p->h) * p->bs + p->s) * p->dim[0] + p->d;
}
static size_t packed_nhd(const place *p) /* [blocks, slots, heads, K | V] */
{
    return ((p->b * p->bs + p->s) * p->heads + p->h) * (p->dim[0] + p->dim[1]) + p->k * p->dim[0] + p->d;
}
static size_t packed_hnd(const place *p) /* [blocks, heads, slots, K | V] */
{
    return ((p->b * p->heads + p->h) * p->bs + p->s) * (p->dim[0] + p->dim[1]) + p->k * p->dim[0] + p->d;
}
static size_t packed_layers(const place *p) /* [layers, blocks, heads, slots, K | V] */
{
    return p->l * p->nb * p->heads * p->bs * (p->dim[0] + p->dim[1]) + packed_hnd(p);
}
static size_t apart_nhd(const place *p) /* [blocks, slots, heads, dim] */
{
    return ((p->b * p->bs + p->s) * p->heads + p->h) * p->dim[p->k] + p->d;
}
static size_t apart_hnd(const place *p) /* [blocks, heads, slots, dim] */
{
    return ((p->b * p->heads + p->h) * p->bs + p->s) * p->dim[p->k] + p->d;
}
static size_t layer_first(const place *p) /* [2, layers, tokens, heads, dim] */
{
    return (((p->k * LAYERS + p->l) * p->nb * p->bs + p->b * p->bs + p->s) * p->heads + p->h) * p->dim[0] + p->d;
}
static size_t page_first(const place *p) /* [2, tokens, layers, heads, dim] */
{
    return (((p->k * p->nb * p->bs + p->b * p->bs + p->s) * LAYERS + p->l) * p->heads + p->h) * p->dim[0] + p->d;
}
static size_t page_direct(const place *p) /* [2, pages, layers, slots, heads, dim] */
{
    return ((((p->k * p->nb + p->b) * LAYERS + p->l) * p->bs + p->s) * p->heads + p->h) * p->dim[0] + p->d;
}
static size_t page_head(const place *p) /* [2, pages, heads, slots, layers, dim] */
{
    return ((((p->k * p->nb + p->b) * p->heads + p->h) * p->bs + p->s) * LAYERS + p->l) * p->dim[0] + p->d;
}
static size_t cells(const place *p) /* [cells, heads * dim] */
{
    return p->b * p->heads * p->dim[p->k] + p->h * p->dim[p->k] + p->d;
}
static size_t cells_across(const place *p) /* [heads * dim, cells] */
{
    return (p->h * p->dim[p->k] + p->d) * p->nb + p->b;
}
enum { SPLIT = 8 };
static size_t split_k(const place *p) /* [blocks, heads, dim / 8, slots, 8] for K, [blocks, heads, dim, slots] for V */
{
    if (p->k == 1)
        return ((p->b * p->heads + p->h) * p->dim[1] + p->d) * p->bs + p->s;
    return (((p->b * p->heads + p->h) * (p->dim[0] / SPLIT) + p->d / SPLIT) * p->bs + p->s) * SPLIT + p->d % SPLIT;
}

/* Which planes share a tensor. */
typedef enum sharing { APART, BY_LAYER, ALL } sharing;

typedef struct paged_layout {
    const char *axes, *v_axes; /* v_axes NULL: the same */
    sharing shared;
    place_fn at;
    uint32_t split;
    int flags;
} paged_layout;
enum { ONE_DIM = 1, SINGLES = 2, PLAIN = 4, LATENT = 8 }; /* equal dims of K and V; blocks of 1 token; no q8_0, q4_0 */

static const paged_layout layouts[] = {
    {"KBNHD", NULL, BY_LAYER, flash_nhd, 0, ONE_DIM},
    {"KBHND", NULL, BY_LAYER, flash_hnd, 0, ONE_DIM},
    {"BKNHD", NULL, BY_LAYER, infer_nhd, 0, ONE_DIM},
    {"BKHND", NULL, BY_LAYER, infer_hnd, 0, ONE_DIM},
    {"BNHC", NULL, BY_LAYER, packed_nhd, 0, 0},
    {"BHNC", NULL, BY_LAYER, packed_hnd, 0, 0},
    {"LBHNC", NULL, ALL, packed_layers, 0, 0},
    {"BNHD", NULL, APART, apart_nhd, 0, 0},
    {"BHND", NULL, APART, apart_hnd, 0, 0},
    {"KLBNHD", NULL, ALL, layer_first, 0, ONE_DIM},
    {"KBNLHD", NULL, ALL, page_first, 0, ONE_DIM},
    {"KBLNHD", NULL, ALL, page_direct, 0, ONE_DIM},
    {"KBHNLD", NULL, ALL, page_head, 0, ONE_DIM},
    {"BHD", NULL, APART, cells, 0, SINGLES},
    {"BHD", "HDB", APART, cells_across, 0, SINGLES | PLAIN},
    {"BHDNX", "BHDN", APART, split_k, SPLIT, PLAIN},
    {"BNC", NULL, BY_LAYER, packed_nhd, 0, LATENT},
};

typedef struct fixture {
    const paged_layout *layout;
    xkv_geometry geometry;
    xkv_plane planes[2 * LAYERS];
    xkv_pages pages[MAX_TENSORS];
    uint32_t tensors, first, dtype;
    int32_t table[TOKENS + 17];
    place sizes;
    size_t elem, tensor_size[MAX_TENSORS], size;
    uint8_t *pool, *expected;
} fixture;

static size_t tensor_of(const fixture *f, uint32_t plane)
{
    return f->layout->shared == APART ? plane : f->layout->shared == BY_LAYER ? plane / 2 : 0;
}

static void make_geometry(fixture *f)
{
    int latent = f->layout->flags & LATENT;
    uint32_t heads = latent ? 1 : 3, k_dim = 64, v_dim = f->layout->flags & ONE_DIM ? 64 : 32;
    for (uint32_t i = 0; i < 2 * LAYERS; i++)
        f->planes[i] = (xkv_plane){
            i / 2,      (latent ? XKV_PLANE_LATENT : XKV_PLANE_K) + i % 2, f->dtype, heads, i % 2 ? v_dim : k_dim,
            XKV_NO_ROPE};
    f->geometry =
        (xkv_geometry){.layer_count = LAYERS, .plane_count = 2 * LAYERS, .token_count = TOKENS, .planes = f->planes};
    f->sizes.heads = heads;
    f->sizes.dim[0] = k_dim / xkv_dtype_block(f->dtype);
    f->sizes.dim[1] = v_dim / xkv_dtype_block(f->dtype);
}

static void describe_tensor(fixture *f, uint32_t tensor)
{
    const paged_layout *l = f->layout;
    const place *s = &f->sizes;
    size_t rows = s->nb * s->bs * s->heads, both = rows * (s->dim[0] + s->dim[1]);
    int is_v = l->shared == APART && tensor % 2 == 1;
    f->tensor_size[tensor] = f->elem * (l->shared == ALL        ? LAYERS * both
                                        : l->shared == BY_LAYER ? both
                                                                : rows * s->dim[is_v]);
    f->pages[tensor] = (xkv_pages){.data = f->pool + f->size,
                                   .size = f->tensor_size[tensor],
                                   .axes = is_v && l->v_axes ? l->v_axes : l->axes,
                                   .dtype = f->dtype,
                                   .first_layer = l->shared == APART      ? tensor / 2
                                                  : l->shared == BY_LAYER ? tensor
                                                                          : 0,
                                   .layer_count = l->shared == ALL ? LAYERS : 1,
                                   .kinds = {f->planes[is_v].kind, f->planes[1].kind},
                                   .kind_count = l->shared == APART ? 1 : 2,
                                   .block_count = (uint32_t)s->nb,
                                   .block_tokens = (uint32_t)s->bs,
                                   .dim_split = is_v ? 0 : l->split,
                                   .table = f->table,
                                   .table_size = (uint32_t)((TOKENS + f->first + s->bs - 1) / s->bs)};
    f->size += f->tensor_size[tensor] + MARGIN;
}

/* Blocks of the sequence in no order, with unused ones between them. */
static void make_table(fixture *f)
{
    for (uint32_t i = 0; i < TOKENS + 17; i++)
        f->table[i] = (int32_t)((i * 7 + 5) % f->sizes.nb);
}

static int setup_pages(fixture *f, const paged_layout *l, uint32_t block_tokens, uint32_t dtype, uint32_t first)
{
    memset(f, 0, sizeof *f);
    if ((l->flags & SINGLES && block_tokens != 1) || (l->flags & PLAIN && xkv_dtype_block(dtype) > 1))
        return 0;
    f->layout = l;
    f->dtype = dtype;
    f->first = first;
    f->elem = xkv_dtype_size(dtype);
    make_geometry(f);
    f->sizes.bs = block_tokens;
    f->sizes.nb = (TOKENS + first) / block_tokens + 6;
    f->sizes.nb += f->sizes.nb % 7 == 0; /* so that the steps of the table meet every block once */
    make_table(f);
    f->tensors = l->shared == APART ? 2 * LAYERS : l->shared == BY_LAYER ? LAYERS : 1;
    size_t most = f->tensors * MARGIN + MARGIN +
                  f->elem * LAYERS * f->sizes.nb * f->sizes.bs * f->sizes.heads * (f->sizes.dim[0] + f->sizes.dim[1]);
    f->pool = malloc(most);
    f->expected = malloc(most);
    assert_true(f->pool && f->expected);
    f->size = MARGIN;
    for (uint32_t i = 0; i < f->tensors; i++)
        describe_tensor(f, i);
    assert_int_equal(f->size, most);
    memset(f->pool, 0xa5, most);
    memset(f->expected, 0xa5, most);
    return 1;
}

/* Bytes of element (plane, token, i) that occur nowhere else nearby. */
static void element_bytes(const fixture *f, uint32_t plane, uint32_t t, size_t i, uint8_t *bytes)
{
    uint64_t seed = (plane * 1000ull + t) * 1000 + i;
    for (size_t b = 0; b < f->elem; b++)
        bytes[b] = (uint8_t)test_random(&seed);
}

static size_t row_elements(const fixture *f, uint32_t plane)
{
    return f->sizes.heads * f->sizes.dim[plane % 2];
}

/* Put every element where the layout has it. */
static void write_expected(fixture *f)
{
    for (uint32_t plane = 0; plane < 2 * LAYERS; plane++)
        for (uint32_t t = 0; t < TOKENS; t++)
            for (size_t i = 0; i < row_elements(f, plane); i++) {
                place p = f->sizes;
                size_t tensor = tensor_of(f, plane), dim = p.dim[plane % 2];
                p.l = plane / 2;
                p.k = plane % 2;
                p.b = (size_t)f->table[(t + f->first) / p.bs];
                p.s = (t + f->first) % p.bs;
                p.h = i / dim;
                p.d = i % dim;
                uint8_t *data = f->expected + ((uint8_t *)f->pages[tensor].data - f->pool);
                size_t at = (f->layout->at == cells_across && p.k == 0 ? cells : f->layout->at)(&p);
                assert_true((at + 1) * f->elem <= f->tensor_size[tensor]);
                element_bytes(f, plane, t, i, data + at * f->elem);
            }
}

static void check_layout(fixture *f)
{
    xkv_ctx *ctx = new_ctx(1);
    xkv_view *views;
    write_expected(f);
    assert_ok(ctx, xkv_views_from_pages(ctx, &f->geometry, f->pages, f->tensors, f->first, 0, &views));
    for (uint32_t plane = 0; plane < 2 * LAYERS; plane++) {
        size_t row = row_elements(f, plane) * f->elem;
        uint8_t *dense = malloc(TOKENS * row), *back = malloc(TOKENS * row);
        for (uint32_t t = 0; t < TOKENS; t++)
            for (size_t i = 0; i < row / f->elem; i++)
                element_bytes(f, plane, t, i, dense + t * row + i * f->elem);
        xkv_view_scatter_bytes(dense, row, &f->planes[plane], 0, 31, &views[plane]);
        xkv_view_scatter_bytes(dense + 31 * row, row, &f->planes[plane], 31, TOKENS, &views[plane]);
        xkv_view_gather_bytes(&views[plane], &f->planes[plane], 0, TOKENS, back, row);
        assert_memory_equal(dense, back, TOKENS * row);
        free(dense);
        free(back);
    }
    assert_memory_equal(f->pool, f->expected, f->size); /* nothing beside them was touched */
    xkv_views_free(ctx, views);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    xkv_ctx_free(ctx);
}

static void every_layout(void **state)
{
    static const uint32_t block_tokens[] = {1, 3, 16, 61, 256}, first[] = {0, 1, 17};
    static const uint32_t dtypes[] = {XKV_F32, XKV_F16, XKV_Q8_0, XKV_Q4_0};
    fixture f;
    (void)state;
    for (size_t l = 0; l < sizeof layouts / sizeof *layouts; l++)
        for (size_t b = 0; b < 5; b++)
            for (size_t i = 0; i < 3; i++)
                for (size_t d = 0; d < 4; d++)
                    if (setup_pages(&f, &layouts[l], block_tokens[b], dtypes[d], first[i])) {
                        check_layout(&f);
                        free(f.pool);
                        free(f.expected);
                    }
}

/* Blocks of a row of three heads of 80, as llama.cpp has them. */
static void blocks_over_heads(void **state)
{
    enum { CELLS = 9, ROW = 3 * 80 / 32 };
    static const xkv_plane plane = {0, XKV_PLANE_K, XKV_Q8_0, 2, 80, XKV_NO_ROPE};
    static const int32_t table[] = {4, 8, 0};
    static uint8_t pool[CELLS * 5 * 34], rows[3 * 5 * 34];
    const xkv_geometry g = {.layer_count = 1, .plane_count = 1, .token_count = 3, .planes = &plane};
    xkv_pages pages = {.data = pool,
                       .size = sizeof pool,
                       .axes = "BHD",
                       .dtype = XKV_Q8_0,
                       .layer_count = 1,
                       .kind_count = 1,
                       .block_count = CELLS,
                       .block_tokens = 1,
                       .table = table,
                       .table_size = 3};
    xkv_ctx *ctx = new_ctx(1);
    xkv_view *views;
    (void)state;
    for (size_t i = 0; i < sizeof rows; i++)
        rows[i] = (uint8_t)(i * 7 + 1);
    assert_ok(ctx, xkv_views_from_pages(ctx, &g, &pages, 1, 0, 0, &views));
    xkv_view_scatter_bytes(rows, 170, &plane, 0, 3, views);
    for (int i = 0; i < 3; i++)
        assert_memory_equal(pool + table[i] * 170, rows + i * 170, 170);
    xkv_views_free(ctx, views);
    pages.axes = "HBD"; /* heads are apart: blocks would be split */
    assert_int_equal(xkv_views_from_pages(ctx, &g, &pages, 1, 0, 0, &views), XKV_ERROR_ARGUMENT);
    xkv_ctx_free(ctx);
}

/* Slots and blocks with something behind them: rows are found at the common divisor of both strides. */
static void padded_strides(void **state)
{
    fixture f;
    static const int64_t strides[] = {5 * (3 * 64 * 4 + 8) + 24, 3 * 64 * 4 + 8, 64 * 4, 4}; /* BNHD in f32 */
    (void)state;
    assert_true(setup_pages(&f, &layouts[7], 5, XKV_F32, 2));
    xkv_ctx *ctx = new_ctx(1);
    xkv_view *views;
    free(f.pool);
    size_t size = f.sizes.nb * (size_t)strides[0];
    f.pool = calloc(1, size);
    assert_non_null(f.pool);
    for (uint32_t i = 0; i < f.tensors; i++) {
        f.planes[i].head_dim = 64;
        f.pages[i].data = f.pool;
        f.pages[i].strides = strides;
        f.pages[i].size = size;
    }
    assert_ok(ctx, xkv_views_from_pages(ctx, &f.geometry, f.pages, 4, 2, 0, &views));
    for (uint32_t t = 0; t < TOKENS; t++) {
        int64_t at = views[0].rows[t] * views[0].token_stride;
        assert_true(at == f.table[(t + 2) / 5] * strides[0] + (t + 2) % 5 * strides[1]);
    }
    assert_ptr_equal(views[0].rows, views[3].rows); /* one table, one array */
    xkv_views_free(ctx, views);
    xkv_ctx_free(ctx);
    free(f.pool);
    free(f.expected);
}

/* --- What is refused ---------------------------------------------------------------------------------------------- */

static void refuse(fixture *f, uint32_t first, uint32_t tokens, xkv_status expected, const char *text)
{
    xkv_ctx *ctx = new_ctx(1);
    xkv_view *views = NULL;
    assert_int_equal(xkv_views_from_pages(ctx, &f->geometry, f->pages, f->tensors, first, tokens, &views), expected);
    if (strstr(xkv_ctx_error(ctx), text) == NULL)
        fail_msg("\"%s\" does not say \"%s\"", xkv_ctx_error(ctx), text);
    assert_null(views);
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    xkv_ctx_free(ctx);
}

#define REFUSE(change, first, tokens, status, text)                                                                    \
    do {                                                                                                               \
        fixture f = good;                                                                                              \
        change;                                                                                                        \
        refuse(&f, first, tokens, status, text);                                                                       \
    } while (0)

static void contradictions(void **state)
{
    static const int64_t negative[] = {64, -64, 64, 64, 2}, zero[] = {64, 0, 64, 64, 2};
    static const int64_t huge[] = {2, (int64_t)1 << 36 | 2, 4, 128, 2};
    fixture good;
    (void)state;
    assert_true(setup_pages(&good, &layouts[0], 16, XKV_F16, 0)); /* KBNHD */
    REFUSE(f.pages[0].data = NULL, 0, 0, XKV_ERROR_ARGUMENT, "NULL");
    REFUSE(f.pages[1].table = NULL, 0, 0, XKV_ERROR_ARGUMENT, "NULL");
    REFUSE(f.pages[1].axes = NULL, 0, 0, XKV_ERROR_ARGUMENT, "NULL");
    REFUSE(f.pages[0].dtype = 9, 0, 0, XKV_ERROR_ARGUMENT, "dtype");
    REFUSE(f.pages[0].layer_count = 0, 0, 0, XKV_ERROR_ARGUMENT, "no layers");
    REFUSE(f.pages[0].kind_count = 5, 0, 0, XKV_ERROR_ARGUMENT, "kinds");
    REFUSE(f.pages[0].block_count = 0, 0, 0, XKV_ERROR_ARGUMENT, "blocks");
    REFUSE(f.pages[0].block_tokens = 257, 0, 0, XKV_ERROR_ARGUMENT, "256");
    REFUSE(f.pages[0].block_tokens = 0, 0, 0, XKV_ERROR_ARGUMENT, "256");
    REFUSE(f.pages[0].axes = "KBNHQ", 0, 0, XKV_ERROR_ARGUMENT, "axis");
    REFUSE(f.pages[0].axes = "KBNHDD", 0, 0, XKV_ERROR_ARGUMENT, "twice");
    REFUSE(f.pages[0].axes = "KNHD", 0, 0, XKV_ERROR_ARGUMENT, "needs B");
    REFUSE(f.pages[0].axes = "KBNHC", 0, 0, XKV_ERROR_ARGUMENT, "needs B");
    REFUSE(f.pages[0].axes = "KBNHDX", 0, 0, XKV_ERROR_ARGUMENT, "dim_split");
    REFUSE(f.pages[0].dim_split = 8, 0, 0, XKV_ERROR_ARGUMENT, "dim_split");
    REFUSE((f.pages[0].axes = "KBNHDX", f.pages[0].dim_split = 7), 0, 0, XKV_ERROR_ARGUMENT, "dim_split");
    REFUSE(f.pages[0].axes = "BNHD", 0, 0, XKV_ERROR_ARGUMENT, "without an axis");
    REFUSE(f.pages[0].axes = "KBHD", 0, 0, XKV_ERROR_ARGUMENT, "without an axis");
    REFUSE(f.pages[0].axes = "KBND", 0, 0, XKV_ERROR_ARGUMENT, "without an axis");
    REFUSE(f.pages[0].layer_count = 2, 0, 0, XKV_ERROR_ARGUMENT, "without an axis");
    REFUSE(f.pages[0].size--, 0, 0, XKV_ERROR_ARGUMENT, "the axes take");
    REFUSE(f.pages[0].strides = negative, 0, 0, XKV_ERROR_ARGUMENT, "stride");
    REFUSE(f.pages[0].strides = zero, 0, 0, XKV_ERROR_ARGUMENT, "stride");
    REFUSE((f.pages[0].strides = huge, f.pages[0].size = INT64_MAX), 0, 0, XKV_ERROR_LIMIT, "2^32");
    REFUSE(f.pages[0].kinds[0] = XKV_PLANE_LATENT, 0, 0, XKV_ERROR_ARGUMENT, "no plane of one of its kinds");
    REFUSE((f.planes[1].head_dim = 32, f.geometry.planes = f.planes), 0, 0, XKV_ERROR_ARGUMENT, "other dims");
    REFUSE((f.planes[1].heads = 2, f.geometry.planes = f.planes), 0, 0, XKV_ERROR_ARGUMENT, "differ");
    REFUSE(f.pages[1].first_layer = 0, 0, 0, XKV_ERROR_ARGUMENT, "is in 2 tensors");
    REFUSE(f.tensors = 1, 0, 0, XKV_ERROR_ARGUMENT, "is in 0 tensors");
    REFUSE(f.pages[1].table_size--, 0, 0, XKV_ERROR_ARGUMENT, "does not reach token 74");
    REFUSE((void)0, 6, 0, XKV_ERROR_ARGUMENT, "does not reach token 80");
    REFUSE((void)0, 0x7fffffff, 1, XKV_ERROR_ARGUMENT, "2^31");
    REFUSE((f.table[2] = -1, f.pages[0].table = f.table), 0, 0, XKV_ERROR_ARGUMENT, "entry 2 of the table is block -1");
    REFUSE((f.table[4] = (int32_t)f.sizes.nb, f.pages[0].table = f.table), 0, 0, XKV_ERROR_ARGUMENT, "entry 4");
    free(good.pool);
    free(good.expected);
    assert_true(setup_pages(&good, &layouts[1], 16, XKV_Q8_0, 0)); /* KBHND */
    REFUSE(f.pages[0].axes = "KBHDN", 0, 0, XKV_ERROR_ARGUMENT, "fastest axis");
    REFUSE((f.pages[0].axes = "KBHNDX", f.pages[0].dim_split = 32), 0, 0, XKV_ERROR_ARGUMENT, "splits blocks");
    free(good.pool);
    free(good.expected);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_layout),
        cmocka_unit_test(blocks_over_heads),
        cmocka_unit_test(padded_strides),
        cmocka_unit_test(contradictions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
