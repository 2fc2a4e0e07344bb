#include "coded.h"

#include <math.h>

/* A component is coded when that lowers squared error + LAMBDA * step^2 * bits. The optimum for the squared error alone
 * is 2 ln 2 / 12 = 0.1155; attention dislikes lost energy, and half of that gives the same divergence of the next-token
 * distributions at equal bytes as coding everything, with half of the components. */
#define LAMBDA 0.06
/* The same for a component that is stored with the entry: the optimum. Against 0.06 that codes a seventh fewer of them
 * at equal bytes and error; the divergence (SmolLM2, 1,024 tokens, three prompts) is the same at 8x and a fifth lower
 * at 16x. */
#define OWN_LAMBDA 0.1155
/* Bits that naming a table takes, so that a component of no use is not named. */
#define TABLE_BITS 6

xkv_transform xkv_transform_of_basis(const xkv_basis *b)
{
    return (xkv_transform){.rank = b->rank,
                           .width = b->width,
                           .top = b->top,
                           .cross_at = b->cross_at,
                           .mean = b->mean,
                           .basis = &b->rows,
                           .analysis = b->analysis,
                           .offset = b->offset,
                           .blocks = b->blocks};
}

/* --- Rows to coefficients ----------------------------------------------------------------------------------------- */

static void analyze_diagonal(const xkv_transform *t, const float *x, uint32_t tokens, float *y, size_t stride)
{
    for (size_t i = 0; i < t->width; i++)
        for (size_t s = 0; s < tokens; s++)
            y[i * stride + s] = (x[s * t->width + i] - t->mean[i]) / t->diagonal[i];
}

void xkv_analyze(const xkv_kernels *k, const xkv_transform *t, uint32_t first, const float *x, uint32_t tokens,
                 float *y, size_t stride)
{
    if (t->diagonal) {
        analyze_diagonal(t, x, tokens, y, stride);
        return;
    }
    k->gemm_nt(t->rank - first, tokens, t->width, t->analysis + (size_t)first * t->width, t->width, x, t->width, 0, y,
               stride);
    for (size_t j = first; t->offset && j < t->rank; j++)
        for (size_t s = 0; s < tokens; s++)
            y[(j - first) * stride + s] -= t->offset[j];
}

/* --- Quantize and choose ------------------------------------------------------------------------------------------ */

static double sum_squares(const float *y, uint32_t n)
{
    double sum = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += (double)y[i] * (double)y[i];
    return sum;
}

static double sum_squared_errors(const float *y, const int16_t *q, uint32_t n, float step)
{
    double sum = 0;

    for (uint32_t i = 0; i < n; i++) {
        double d = (double)(y[i] - (float)q[i] * step);
        sum += d * d;
    }
    return sum;
}

bool xkv_is_all_zeros(double energy, float step, uint32_t n)
{
    return energy < 0.01 * (double)step * (double)step * n;
}

bool xkv_is_worth_coding(double gain, float step, bool own, double bits)
{
    return gain > (own ? OWN_LAMBDA : LAMBDA) * (double)step * (double)step * (bits + TABLE_BITS);
}

bool xkv_code_component(const xkv_coder *coder, const float *y, uint32_t n, float step, double more_bits, double lost,
                        int16_t *q, uint8_t *table, double *bits, double *squares)
{
    double energy = sum_squares(y, n), error;

    *table = 0;
    *bits = 0;
    *squares = energy;
    if (xkv_is_all_zeros(energy, step, n))
        return true;
    if (!xkv_quantize(coder, y, n, step, q))
        return false;
    *table = (uint8_t)xkv_table_choose(q, n, bits);
    error = sum_squared_errors(y, q, n, step);
    if (*table == 0 || !xkv_is_worth_coding(energy - error - lost, step, more_bits > 0, *bits + more_bits)) {
        *table = 0;
        *bits = 0;
        return true;
    }
    *squares = error;
    return true;
}

typedef struct components_job {
    const xkv_transform *t;
    const float *y;
    uint32_t first;
    xkv_coded *coded;
    double *bits; /* [rank] infinite: a value does not fit */
} components_job;

/* A component whose table is given. */
static bool code_given(const xkv_coder *coder, const float *y, uint32_t n, float step, uint8_t table, int16_t *q,
                       double *bits)
{
    if (table == 0)
        return true;
    if (!xkv_quantize(coder, y, n, step, q))
        return false;
    *bits = xkv_table_cost(table, q, n);
    return true;
}

/* One whose table is chosen. */
static bool code_chosen(const components_job *j, size_t component, const float *y, int16_t *q)
{
    xkv_coded *c = j->coded;
    double squares, more_bits = 0, lost = 0;

    if (j->t && j->t->component_bits) {
        more_bits = j->t->component_bits[component];
        lost = j->t->component_lost[component] * sum_squares(y, c->tokens);
    }
    return xkv_code_component(xkv_coder_cpu(), y, c->tokens, c->step, more_bits, lost, q, &c->tables[component],
                              &j->bits[component], &squares);
}

static xkv_status code_task(void *user, uint32_t worker, uint64_t index)
{
    components_job *j = user;
    xkv_coded *c = j->coded;
    size_t at = index * c->tokens, component = j->first + index;
    bool fits;

    (void)worker;
    if (j->t && j->t->tables) {
        c->tables[component] = j->t->tables[component];
        fits = code_given(xkv_coder_cpu(), j->y + at, c->tokens, c->step, c->tables[component], c->q + at,
                          &j->bits[component]);
    } else {
        fits = code_chosen(j, component, j->y + at, c->q + at);
    }
    if (!fits)
        j->bits[component] = INFINITY;
    return XKV_OK;
}

/* Move the rows of the coded components together. */
static void close_up(xkv_coded *c, uint32_t first)
{
    c->coded = 0;
    for (size_t i = first; i < c->rank; i++)
        if (c->tables[i] != 0) {
            memmove(c->q + (size_t)c->coded * c->tokens, c->q + (i - first) * c->tokens, c->tokens * sizeof *c->q);
            c->coded_tables[c->coded++] = c->tables[i];
        }
}

xkv_status xkv_code_components(xkv_ctx *ctx, xkv_pool *pool, const xkv_transform *t, const float *y, uint32_t first,
                               xkv_coded *c)
{
    components_job j = {.t = t, .y = y, .first = first, .coded = c};
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW(ctx, (size_t)(c->rank - first) * c->tokens, &c->q));
    XKV_TRY(XKV_NEW_ZERO(ctx, c->rank, &c->tables));
    XKV_TRY(XKV_NEW(ctx, c->rank, &c->coded_tables));
    XKV_TRY(XKV_NEW_ZERO(ctx, c->rank, &j.bits));
    XKV_TRY_GOTO(xkv_pool_run(ctx, pool, c->rank - first, code_task, &j), out);
    for (uint32_t i = first; i < c->rank; i++)
        c->bits += j.bits[i];
    c->overflow = !isfinite(c->bits);
    if (!c->overflow)
        close_up(c, first);
out:
    xkv_release(ctx, j.bits);
    return status;
}

/* --- Coefficients to rows ----------------------------------------------------------------------------------------- */

/* Of wide rows as many components are added at a time as stay in the second cache, so that few sums are read again;
 * narrow ones stay there themselves. */
#define MAX_DEPTH (4 * XKV_DEPTH)

static void list_coded(const uint8_t *tables, uint32_t rank, uint32_t *rows)
{
    for (uint32_t i = 0; i < rank; i++)
        if (tables[i] != 0)
            *rows++ = i;
}

static uint32_t count_coded(const uint8_t *tables, uint32_t rank)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < rank; i++)
        count += tables[i] != 0;
    return count;
}

static xkv_status list_all(xkv_ctx *ctx, uint32_t count, uint32_t **rows)
{
    XKV_TRY(XKV_NEW(ctx, count, rows));
    for (uint32_t i = 0; i < count; i++)
        (*rows)[i] = i;
    return XKV_OK;
}

static xkv_status list_cross(xkv_ctx *ctx, const xkv_cross *cross, xkv_synthesis *s)
{
    s->top = s->t->top;
    s->mix = &cross->basis->rows;
    s->cross_step = cross->step;
    s->cross_coded = cross->coded;
    XKV_TRY(XKV_NEW(ctx, s->cross_coded, &s->cross_rows));
    list_coded(cross->tables, cross->rank, s->cross_rows);
    return list_all(ctx, s->top, &s->leading);
}

xkv_status xkv_synthesis_create(xkv_ctx *ctx, const xkv_transform *t, const uint8_t *tables, float step,
                                const xkv_cross *cross, xkv_synthesis *s)
{
    *s = (xkv_synthesis){.t = t, .tables = tables, .step = step};
    if (t->diagonal)
        return XKV_OK;
    s->coded = count_coded(tables, t->rank);
    XKV_TRY(XKV_NEW(ctx, s->coded, &s->rows));
    list_coded(tables, t->rank, s->rows);
    return cross && t->top > 0 && cross->coded > 0 ? list_cross(ctx, cross, s) : XKV_OK;
}

xkv_status xkv_synthesis_create_plain(xkv_ctx *ctx, const xkv_transform *t, xkv_synthesis *s)
{
    *s = (xkv_synthesis){.t = t, .coded = t->rank};
    return list_all(ctx, t->rank, &s->rows);
}

void xkv_synthesis_free(xkv_ctx *ctx, xkv_synthesis *s)
{
    xkv_release(ctx, s->rows);
    xkv_release(ctx, s->cross_rows);
    xkv_release(ctx, s->leading);
    *s = (xkv_synthesis){0};
}

size_t xkv_synthesis_scratch(const xkv_synthesis *s, uint32_t tokens)
{
    return xkv_strips_size(tokens, MAX_DEPTH) + (size_t)tokens * (1 + s->top);
}

static void fill_mean(const xkv_transform *t, uint32_t tokens, float *x)
{
    for (size_t s = 0; s < tokens; s++)
        if (t->mean)
            memcpy(x + s * t->width, t->mean, t->width * sizeof *x);
        else
            memset(x + s * t->width, 0, t->width * sizeof *x);
}

static void synthesize_diagonal(const xkv_synthesis *s, xkv_integers own, uint32_t tokens, float *x)
{
    size_t width = s->t->width;

    for (size_t i = 0; i < width; i++) {
        if (s->tables[i] == 0)
            continue;
        float factor = s->step * s->t->diagonal[i];
        for (size_t t = 0; t < tokens; t++)
            x[t * width + i] += (float)own.q[t] * factor;
        own.q += own.stride;
    }
}

/* What is multiplied with rows of a basis, and where that goes. */
typedef struct target {
    uint32_t tokens, depth; /* components at a time */
    const xkv_panels *basis;
    const xkv_columns *columns;
    uint32_t column_count;
    float *x; /* [tokens][ld], column 0 of it */
    size_t ld;
} target;

static void add_product(const target *to, const float *strips, size_t depth, const uint32_t *rows)
{
    for (uint32_t i = 0; i < to->column_count; i++) {
        size_t first = to->columns[i].first;
        xkv_multiply_panels(to->tokens, depth, strips, to->basis, rows, first, to->columns[i].count, to->x + first,
                            to->ld);
    }
}

/* X += integers times step times those `rows` [count] of the basis. */
static void add_integers(const target *to, xkv_integers in, float step, const uint32_t *rows, size_t count,
                         float *scratch)
{
    float *strips = scratch, *row = scratch + xkv_strips_size(to->tokens, MAX_DEPTH);

    for (size_t first = 0, depth; first < count; first += depth) {
        depth = (size_t)xkv_min64(to->depth, count - first);
        for (size_t k = 0; k < depth; k++) {
            xkv_dequantize(xkv_coder_cpu(), in.q + (first + k) * in.stride, to->tokens, step, row);
            xkv_strips_set(strips, depth, k, row, 1, to->tokens);
        }
        add_product(to, strips, depth, rows + first);
    }
}

/* The same of coefficients z [tokens][count]. */
static void add_coefficients(const target *to, const float *z, const uint32_t *rows, size_t count, float *strips)
{
    for (size_t first = 0, depth; first < count; first += depth) {
        depth = (size_t)xkv_min64(to->depth, count - first);
        xkv_strips_set_rows(strips, depth, z + first, count, to->tokens);
        add_product(to, strips, depth, rows + first);
    }
}

void xkv_synthesize_own(const xkv_synthesis *s, xkv_integers own, uint32_t tokens, const xkv_columns *columns,
                        uint32_t column_count, float *scratch, float *x)
{
    const target rows = {tokens, MAX_DEPTH, s->t->basis, columns, column_count, x, s->t->width};

    fill_mean(s->t, tokens, x);
    if (s->t->diagonal)
        synthesize_diagonal(s, own, tokens, x);
    else
        add_integers(&rows, own, s->step, s->rows, s->coded, scratch);
}

void xkv_synthesize_cross(const xkv_synthesis *s, xkv_integers cross, uint32_t tokens, const xkv_columns *columns,
                          uint32_t column_count, float *scratch, float *x)
{
    const xkv_columns part = {s->t->cross_at, s->top};
    float *z = scratch + xkv_strips_size(tokens, MAX_DEPTH) + tokens; /* what is added to the leading coefficients */
    const target coefficients = {tokens, XKV_DEPTH, s->mix, &part, 1, z - part.first, s->top};
    const target rows = {tokens, MAX_DEPTH, s->t->basis, columns, column_count, x, s->t->width};

    if (s->top == 0)
        return;
    memset(z, 0, (size_t)tokens * s->top * sizeof *z);
    add_integers(&coefficients, cross, s->cross_step, s->cross_rows, s->cross_coded, scratch);
    add_coefficients(&rows, z, s->leading, s->top, scratch);
}

void xkv_synthesize_plain(const xkv_synthesis *s, const float *y, uint32_t tokens, const xkv_columns *columns,
                          uint32_t column_count, float *scratch, float *x)
{
    const target rows = {tokens, MAX_DEPTH, s->t->basis, columns, column_count, x, s->t->width};

    fill_mean(s->t, tokens, x);
    add_coefficients(&rows, y, s->rows, s->coded, scratch);
}

/* --- A group ------------------------------------------------------------------------------------------------------ */

typedef struct sums {
    double squares, energy; /* of a plane */
} sums;

typedef struct job {
    xkv_ctx *ctx;
    xkv_rotator *rotators;
    const xkv_kernels *kernels;
    const xkv_group *g;
    const xkv_view *views;
    const xkv_transform *t;
    xkv_coded *coded;
    const xkv_cross *cross;
    xkv_integers cross_q;
    uint32_t top; /* components that the cross stage codes */
    xkv_span span;
    float *y;       /* [rank - top][tokens] */
    float *scratch; /* per thread */
    size_t scratch_size;
    xkv_synthesis synthesis;
    sums *planes; /* [tiles][plane_count + 1]; the last one is the metric's */
} job;

static uint32_t tile_tokens(const job *j, uint64_t tile, uint32_t *row)
{
    *row = (uint32_t)(tile * XKV_TILE_ROWS);
    return (uint32_t)xkv_min64(XKV_TILE_ROWS, j->coded->tokens - *row);
}

static xkv_status gather_tile(const job *j, uint32_t worker, uint32_t row, uint32_t n, float *x)
{
    uint32_t token = j->span.t0 + row;

    return xkv_gather_rows(j->ctx, &j->rotators[worker], j->g, j->views, token, token + n, x);
}

static xkv_status analyze_tile(void *user, uint32_t worker, uint64_t tile)
{
    job *j = user;
    uint32_t row, n = tile_tokens(j, tile, &row);
    float *x = j->scratch + worker * j->scratch_size;

    XKV_TRY(gather_tile(j, worker, row, n, x));
    xkv_analyze(j->kernels, j->t, j->top, x, n, j->y + row, j->coded->tokens);
    return XKV_OK;
}

/* Squared norm of rows times W, head by head. */
static double metric_squares(const job *j, const float *rows, uint32_t n, float *product)
{
    const float *block = j->t->blocks;
    size_t column = 0, width = j->t->width;
    double sum = 0;

    for (uint32_t i = 0; i < j->g->plane_count; i++) {
        const xkv_plane *p = &j->rotators->geometry->planes[j->g->planes[i]];
        size_t d = p->head_dim;
        for (uint32_t h = 0; h < p->heads; h++, block += d * d, column += d) {
            j->kernels->gemm_nn(n, d, d, rows + column, width, block, d, 0, product, d);
            sum += j->kernels->sum_squares(product, n * d);
        }
    }
    return sum;
}

static void add_planes(const job *j, const float *x, const float *y, uint32_t n, sums *planes)
{
    for (uint32_t s = 0; s < n; s++)
        for (uint32_t i = 0; i < j->g->plane_count; i++) {
            uint32_t width = xkv_plane_width(&j->rotators->geometry->planes[j->g->planes[i]]);
            planes[i].squares += j->kernels->sum_squared_difference(x, y, width);
            planes[i].energy += j->kernels->sum_squares(x, width);
            x += width;
            y += width;
        }
}

/* Errors and energies of rows x that are restored as y; both are used up. */
static void measure_rows(const job *j, float *x, float *y, uint32_t n, float *product, sums *planes)
{
    size_t width = j->g->width, elements = n * width;
    sums *metric = &planes[j->g->plane_count];

    add_planes(j, x, y, n, planes);
    if (!j->t || !j->t->blocks)
        return;
    for (size_t i = 0; i < elements; i++)
        y[i] = x[i] - y[i];
    for (size_t i = 0; i < elements; i++)
        x[i] -= j->t->mean[i % width];
    metric->squares += metric_squares(j, y, n, product);
    metric->energy += metric_squares(j, x, n, product);
}

static xkv_status measure_tile(void *user, uint32_t worker, uint64_t tile)
{
    job *j = user;
    xkv_coded *c = j->coded;
    uint32_t row, n = tile_tokens(j, tile, &row), known = j->span.measured - j->span.t0;
    size_t width = j->g->width, skip = known > row ? known - row : 0;
    float *x = j->scratch + worker * j->scratch_size, *y = x + XKV_TILE_ROWS * width, *a = y + XKV_TILE_ROWS * width;
    const xkv_columns all = {0, j->g->width};

    if (skip >= n)
        return XKV_OK;
    XKV_TRY(gather_tile(j, worker, row, n, x));
    xkv_synthesize_own(&j->synthesis, xkv_integers_from((xkv_integers){c->q, c->tokens}, row), n, &all, 1, a, y);
    xkv_synthesize_cross(&j->synthesis, xkv_integers_from(j->cross_q, row), n, &all, 1, a, y);
    measure_rows(j, x + skip * width, y + skip * width, n - (uint32_t)skip, a,
                 j->planes + tile * (j->g->plane_count + 1));
    return XKV_OK;
}

/* What rows are, against what they are: energies without errors. */
static xkv_status weigh_tile(void *user, uint32_t worker, uint64_t tile)
{
    job *j = user;
    uint32_t row, n = tile_tokens(j, tile, &row);
    size_t rows = (size_t)XKV_TILE_ROWS * j->g->width;
    float *x = j->scratch + worker * j->scratch_size, *y = x + rows;

    XKV_TRY(gather_tile(j, worker, row, n, x));
    memcpy(y, x, (size_t)n * j->g->width * sizeof *y);
    measure_rows(j, x, y, n, y + rows, j->planes + tile * (j->g->plane_count + 1));
    return XKV_OK;
}

/* Per-tile sums in order of the tiles, so that the figures do not depend on the number of threads. */
static void total(const job *j, uint64_t tiles, xkv_group *g)
{
    double squares = 0;

    g->energy = 0;
    for (uint32_t i = 0; i <= g->plane_count; i++) {
        sums s = {0, 0};
        for (uint64_t t = 0; t < tiles; t++) {
            s.squares += j->planes[t * (g->plane_count + 1) + i].squares;
            s.energy += j->planes[t * (g->plane_count + 1) + i].energy;
        }
        if (i == g->plane_count) {
            j->coded->metric_squares = s.squares;
            j->coded->metric_energy = s.energy;
        } else {
            g->plane_errors[i] = xkv_relative_error(s.squares, s.energy);
            g->plane_energies[i] = s.energy;
            squares += s.squares;
            g->energy += s.energy;
        }
    }
    g->error = xkv_relative_error(squares, g->energy);
}

/* Scratch of a thread for analyzing and for measuring a tile: two sets of rows, and coefficients or products. */
static xkv_status size_scratch(job *j, xkv_pool *pool, size_t coefficients)
{
    size_t tile = (size_t)XKV_TILE_ROWS * j->g->width;

    xkv_release(j->ctx, j->scratch);
    j->scratch = NULL;
    j->scratch_size = 2 * tile + (coefficients > tile ? coefficients : tile);
    return XKV_NEW(j->ctx, j->scratch_size * xkv_pool_threads(pool), &j->scratch);
}

static xkv_status measure(job *j, xkv_pool *pool, uint64_t tiles, xkv_task_fn task, xkv_group *g)
{
    XKV_TRY(XKV_NEW_ZERO(j->ctx, (size_t)tiles * (g->plane_count + 1), &j->planes));
    XKV_TRY(xkv_pool_run(j->ctx, pool, tiles, task, j));
    total(j, tiles, g);
    return XKV_OK;
}

static xkv_status run(job *j, xkv_pool *pool, xkv_group *g)
{
    xkv_coded *c = j->coded;
    uint64_t tiles = xkv_ceil_div(c->tokens, XKV_TILE_ROWS);

    XKV_TRY(size_scratch(j, pool, 0));
    XKV_TRY(XKV_NEW(j->ctx, (size_t)(c->rank - j->top) * c->tokens, &j->y));
    XKV_TRY(xkv_pool_run(j->ctx, pool, tiles, analyze_tile, j));
    XKV_TRY(xkv_code_components(j->ctx, pool, j->t, j->y, j->top, c));
    xkv_release(j->ctx, j->y);
    j->y = NULL;
    if (c->overflow)
        return XKV_OK;
    if (j->t->own) /* only a choice among components */
        return XKV_OK;
    XKV_TRY(xkv_synthesis_create(j->ctx, j->t, c->tables, c->step, j->cross, &j->synthesis));
    XKV_TRY(size_scratch(j, pool, xkv_synthesis_scratch(&j->synthesis, XKV_TILE_ROWS)));
    return measure(j, pool, tiles, measure_tile, g);
}

static void release(job *j)
{
    xkv_release(j->ctx, j->scratch);
    xkv_release(j->ctx, j->y);
    xkv_release(j->ctx, j->planes);
    xkv_synthesis_free(j->ctx, &j->synthesis);
}

xkv_status xkv_code_group(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, xkv_group *g, const xkv_view *views,
                          xkv_span span, const xkv_transform *t, float step, const xkv_cross *cross,
                          xkv_integers cross_q, xkv_coded *coded)
{
    job j = {.ctx = ctx,
             .rotators = rotators,
             .kernels = rotators->kernels,
             .g = g,
             .views = views,
             .t = t,
             .coded = coded,
             .cross = cross,
             .cross_q = cross_q,
             .top = cross ? t->top : 0,
             .span = span};
    xkv_status status;

    *coded = (xkv_coded){.first = span.t0, .tokens = span.t1 - span.t0, .rank = t->rank, .step = step};
    status = run(&j, pool, g);
    release(&j);
    if (status != XKV_OK)
        xkv_coded_free(ctx, coded);
    return status;
}

xkv_status xkv_weigh_group(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, xkv_group *g, const xkv_view *views,
                           uint32_t t0, uint32_t t1, const xkv_transform *t, double *metric_energy)
{
    xkv_coded coded = {.tokens = t1 - t0};
    job j = {.ctx = ctx,
             .rotators = rotators,
             .kernels = rotators->kernels,
             .g = g,
             .views = views,
             .t = t,
             .coded = &coded,
             .span = {t0, t1, t0}};
    xkv_status status;

    XKV_TRY_GOTO(size_scratch(&j, pool, 0), out);
    XKV_TRY_GOTO(measure(&j, pool, xkv_ceil_div(coded.tokens, XKV_TILE_ROWS), weigh_tile, g), out);
    *metric_energy = coded.metric_energy;
out:
    release(&j);
    return status;
}

void xkv_coded_free(xkv_ctx *ctx, xkv_coded *coded)
{
    xkv_release(ctx, coded->q);
    xkv_release(ctx, coded->tables);
    xkv_release(ctx, coded->coded_tables);
    *coded = (xkv_coded){0};
}
