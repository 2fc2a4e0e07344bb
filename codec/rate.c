#include "rate.h"

#include "parts.h"
#include "svdq.h"

#include <math.h>
#include <stdlib.h>

enum { BATCH = 16 };

/* What a step costs. */
typedef struct cost {
    double bits;       /* infinite: a coefficient is too large for the step */
    double basis_bits; /* of components that are stored with the entry */
    double squares;
    double basis_squares; /* from the rounding of such components */
    uint32_t tables;      /* components that are coded */
} cost;

/* The same for all groups; those that the step cannot code count as stored lossless. The error is relative; or that of
 * the worst group over XKV_GROUP_SLACK, if larger. */
typedef xkv_estimate total_cost;

/* The cross stage in a sample: its coefficients are made from the leading ones of the groups, which are then left out
 * of these. */
typedef struct sample_cross {
    const xkv_cross_basis *basis; /* NULL without the stage, which is group 0 */
    float *norms;                 /* [group_count] as for xkv_cross_too_large() */
    bool *left_out;               /* [group_count] groups too large for the step; they count as stored lossless */
    float *weights;               /* [group_count][rank] share of each component's error that a group gets */
    double *squares;              /* [rank] error of each component at the step at hand */
} sample_cross;

struct xkv_sample {
    xkv_ctx *ctx;
    xkv_rotator *rotators;
    const xkv_container *c;
    const xkv_view *views;
    const xkv_transform *transforms;
    uint32_t tokens;  /* sampled */
    uint32_t coded;   /* of how many */
    float **y;        /* [group_count]: [rank][tokens] */
    uint32_t *first;  /* [group_count + 1] index of the group's first batch of components */
    double *energies; /* [group_count]; 0 for the cross stage, whose energy is that of the groups */
    sample_cross cross;
    float *scratch; /* of gathering */
    size_t scratch_size;
    float step;  /* of the evaluation at hand */
    cost *costs; /* [first[group_count]] */
    int16_t *q;  /* [threads][q_size] */
    size_t q_size;
};

/* --- Projection --- */

uint32_t xkv_sample_tile(uint32_t coded, uint32_t sampled, uint32_t tile, uint32_t *row)
{
    uint32_t first = tile * XKV_TILE_ROWS, last = sampled / XKV_TILE_ROWS - 1;

    *row = sampled == coded ? first : (uint32_t)((uint64_t)(coded - XKV_TILE_ROWS) * tile / last);
    return (uint32_t)xkv_min64(XKV_TILE_ROWS, sampled - first);
}

static xkv_status project_task(void *user, uint32_t worker, uint64_t index)
{
    xkv_sample *s = user;
    uint32_t tiles = (uint32_t)xkv_ceil_div(s->tokens, XKV_TILE_ROWS), tile = (uint32_t)(index % tiles), token, n;
    uint64_t group = index / tiles;
    const xkv_group *g = &s->c->groups[group];
    float *x = s->scratch + worker * s->scratch_size;

    if (!s->y[group] || xkv_group_is_cross(g))
        return XKV_OK;
    n = xkv_sample_tile(s->coded, s->tokens, tile, &token);
    token += s->c->sinks;
    XKV_TRY(xkv_gather_rows(s->ctx, &s->rotators[worker], g, s->views, token, token + n, x));
    xkv_analyze(s->rotators->kernels, &s->transforms[group], 0, x, n, s->y[group] + tile * XKV_TILE_ROWS, s->tokens);
    return XKV_OK;
}

static xkv_status project(xkv_sample *s, xkv_pool *pool)
{
    uint32_t tiles = (uint32_t)xkv_ceil_div(s->tokens, XKV_TILE_ROWS);

    for (uint32_t i = 0; i < s->c->group_count; i++) {
        uint32_t rank = s->transforms[i].rank;
        s->first[i + 1] = s->first[i] + (uint32_t)xkv_ceil_div(rank, BATCH);
        s->scratch_size = (size_t)xkv_max64(s->scratch_size, (uint64_t)XKV_TILE_ROWS * s->c->groups[i].width);
        if (rank > 0)
            XKV_TRY(XKV_NEW(s->ctx, (size_t)rank * s->tokens, &s->y[i]));
    }
    XKV_TRY(XKV_NEW(s->ctx, s->scratch_size * xkv_pool_threads(pool), &s->scratch));
    XKV_TRY(xkv_pool_run(s->ctx, pool, (uint64_t)s->c->group_count * tiles, project_task, s));
    for (uint32_t i = 0; i < s->c->group_count; i++)
        if (s->y[i] && !xkv_group_is_cross(&s->c->groups[i]))
            s->energies[i] = s->rotators->kernels->sum_squares(s->y[i], (size_t)s->transforms[i].rank * s->tokens) /
                             (s->transforms[i].own ? s->transforms[i].own->found : 1);
    return XKV_OK;
}

/* --- Cross stage --- */

/* The coefficients of the stage, from those of the groups that are not left out. */
static xkv_status rotate_task(void *user, uint32_t worker, uint64_t tile)
{
    xkv_sample *s = user;
    const xkv_cross_basis *b = s->cross.basis;
    uint32_t row, n = xkv_sample_tile(s->coded, s->tokens, (uint32_t)tile, &row);
    size_t at = tile * XKV_TILE_ROWS;

    (void)worker;
    for (size_t i = 0; i < b->rank; i++)
        memset(s->y[0] + i * s->tokens + at, 0, n * sizeof **s->y);
    for (uint32_t g = 0; g < s->c->group_count; g++)
        if (xkv_takes_part(s->c, s->transforms, g) && !s->cross.left_out[g])
            xkv_cross_add(s->rotators->kernels, b, &s->transforms[g], s->y[g] + at, s->tokens, n, s->y[0] + at,
                          s->tokens);
    return XKV_OK;
}

static xkv_status rotate_cross(xkv_sample *s, xkv_pool *pool)
{
    return xkv_pool_run(s->ctx, pool, xkv_ceil_div(s->tokens, XKV_TILE_ROWS), rotate_task, s);
}

/* Error of the stage is orthogonal to itself nearly enough: a group gets of each component's what it has of its norm.
 */
static void weigh_groups(xkv_sample *s)
{
    const xkv_cross_basis *b = s->cross.basis;

    for (uint32_t g = 0; g < s->c->group_count; g++)
        for (size_t i = 0; i < b->rank && xkv_takes_part(s->c, s->transforms, g); i++)
            s->cross.weights[(size_t)g * b->rank + i] = (float)s->rotators->kernels->sum_squares(
                b->components + i * b->width + s->transforms[g].cross_at, s->transforms[g].top);
}

static xkv_status prepare_cross(xkv_sample *s, xkv_pool *pool, const xkv_cross_basis *basis)
{
    uint32_t count = s->c->group_count;

    if (count == 0 || !xkv_group_is_cross(&s->c->groups[0]))
        return XKV_OK;
    s->cross.basis = basis;
    XKV_TRY(XKV_NEW_ZERO(s->ctx, count, &s->cross.norms));
    XKV_TRY(XKV_NEW_ZERO(s->ctx, count, &s->cross.left_out));
    XKV_TRY(XKV_NEW_ZERO(s->ctx, (size_t)count * basis->rank, &s->cross.weights));
    XKV_TRY(XKV_NEW_ZERO(s->ctx, basis->rank, &s->cross.squares));
    for (uint32_t g = 0; g < count; g++)
        if (xkv_takes_part(s->c, s->transforms, g))
            s->cross.norms[g] = xkv_cross_norm(s->y[g], s->tokens, s->transforms[g].top, s->tokens);
    weigh_groups(s);
    return rotate_cross(s, pool);
}

/* Leave out the groups that are too large for the step, or none; *changed when that is not as it was. */
static void leave_out(xkv_sample *s, bool large, bool *changed)
{
    *changed = false;
    for (uint32_t g = 0; g < s->c->group_count; g++) {
        bool out = large && xkv_takes_part(s->c, s->transforms, g) &&
                   xkv_cross_too_large(s->cross.norms[g], s->step, s->c->group_count);
        *changed |= out != s->cross.left_out[g];
        s->cross.left_out[g] = out;
    }
}

xkv_status xkv_sample_create(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, const xkv_container *c,
                             const xkv_view *views, const xkv_transform *transforms, const xkv_cross_basis *cross,
                             xkv_sample **sample_p)
{
    uint32_t coded = c->geometry.token_count - c->sinks - c->window;
    xkv_sample *s = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &s));
    *s = (xkv_sample){.ctx = ctx,
                      .rotators = rotators,
                      .c = c,
                      .views = views,
                      .transforms = transforms,
                      .coded = coded,
                      .tokens = (uint32_t)xkv_min64(coded, XKV_SAMPLE_TOKENS)};
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, c->group_count, &s->y), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, c->group_count + 1u, &s->first), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, c->group_count, &s->energies), out);
    XKV_TRY_GOTO(project(s, pool), out);
    XKV_TRY_GOTO(prepare_cross(s, pool, cross), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, s->first[c->group_count], &s->costs), out);
    s->q_size = s->tokens;
    for (uint32_t i = 0; i < c->group_count; i++)
        s->q_size = (size_t)xkv_max64(s->q_size, transforms[i].own ? transforms[i].width : 0);
    XKV_TRY_GOTO(XKV_NEW(ctx, s->q_size * xkv_pool_threads(pool), &s->q), out);
    *sample_p = s;
    s = NULL;
out:
    xkv_sample_free(ctx, s);
    return status;
}

void xkv_sample_free(xkv_ctx *ctx, xkv_sample *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; s->y && i < s->c->group_count; i++)
        xkv_release(ctx, s->y[i]);
    xkv_release(ctx, s->y);
    xkv_release(ctx, s->first);
    xkv_release(ctx, s->energies);
    xkv_release(ctx, s->cross.norms);
    xkv_release(ctx, s->cross.left_out);
    xkv_release(ctx, s->cross.weights);
    xkv_release(ctx, s->cross.squares);
    xkv_release(ctx, s->scratch);
    xkv_release(ctx, s->costs);
    xkv_release(ctx, s->q);
    xkv_release(ctx, s);
}

/* --- Cost of a step --- */

static uint32_t group_of(const xkv_sample *s, uint64_t batch)
{
    uint32_t g = 0;

    while (batch >= s->first[g + 1])
        g++;
    return g;
}

/* Components of a group that are not coded by the cross stage. */
static uint32_t first_own(const xkv_sample *s, uint32_t group)
{
    return s->cross.basis && xkv_takes_part(s->c, s->transforms, group) ? s->transforms[group].top : 0;
}

static void add_cost(cost *sum, const cost *c)
{
    sum->bits += c->bits;
    sum->basis_bits += c->basis_bits;
    sum->squares += c->squares;
    sum->basis_squares += c->basis_squares;
    sum->tables += c->tables;
}

/* Component i of group g; `v` and `q` are scratch. One that is stored with the entry is worth coding only when that
 * pays for its own bits too, of which the sample's rows bear their share. */
static cost component_cost(const xkv_sample *s, uint32_t g, uint32_t i, float *v, int16_t *q)
{
    const xkv_svdq *own = s->transforms[g].own;
    const float *y = s->y[g] + (size_t)i * s->tokens;
    double energy = own ? s->rotators->kernels->sum_squares(y, s->tokens) : 0;
    xkv_component_price price = {0};
    cost c = {0};
    uint8_t table;

    if (own) {
        price = xkv_svdq_price(own, i, s->step, v, q);
        if (price.table == 0)
            return (cost){.squares = energy};
    }
    if (!xkv_code_component(xkv_coder_cpu(), y, s->tokens, s->step, price.bits * s->tokens / s->coded,
                            price.lost * energy, q, &table, &c.bits, &c.squares))
        c.bits = INFINITY;
    c.tables = table != 0;
    c.basis_bits = table != 0 ? price.bits : 0;
    c.basis_squares = table != 0 ? price.lost * energy : 0;
    return c;
}

static xkv_status cost_task(void *user, uint32_t worker, uint64_t batch)
{
    xkv_sample *s = user;
    uint32_t g = group_of(s, batch), i = (uint32_t)(batch - s->first[g]) * BATCH;
    uint32_t end = (uint32_t)xkv_min64(s->transforms[g].rank, i + BATCH);
    float *v = s->scratch + worker * s->scratch_size; /* a tile of the widest group: more than a row */
    int16_t *q = s->q + worker * s->q_size;
    cost sum = {0};

    if (i == 0 && s->transforms[g].own)
        sum.basis_bits = xkv_svdq_mean_bits(s->transforms[g].own, s->step, v, q);
    for (i = (uint32_t)xkv_max64(i, first_own(s, g)); i < end; i++) {
        cost c = component_cost(s, g, i, v, q);
        add_cost(&sum, &c);
        if (xkv_group_is_cross(&s->c->groups[g]))
            s->cross.squares[i] = c.squares;
    }
    s->costs[batch] = sum;
    return XKV_OK;
}

/* All of a group. Noise of components of its own is made good by the coefficients as far as the other components can
 * express it; what the decomposition did not find is lost. */
static cost group_cost(const xkv_sample *s, uint32_t group)
{
    const xkv_svdq *own = s->transforms[group].own;
    cost sum = {0};

    for (uint32_t i = s->first[group]; i < s->first[group + 1]; i++)
        add_cost(&sum, &s->costs[i]);
    if (own) {
        sum.squares += sum.basis_squares * (1 - (double)sum.tables / own->width);
        sum.squares += s->energies[group] * (1 - own->found);
    }
    return sum;
}

/* What a group gets of the error of the cross stage. */
static double cross_squares(const xkv_sample *s, uint32_t group)
{
    double sum = 0;

    for (size_t i = 0; first_own(s, group) > 0 && i < s->cross.basis->rank; i++)
        sum += s->cross.squares[i] * (double)s->cross.weights[(size_t)group * s->cross.basis->rank + i];
    return sum;
}

/* Table lists are zstd-compressed, to about 5 bits an index. */
static double coded_bytes(const xkv_sample *s, uint32_t group, cost sum)
{
    double basis = s->transforms[group].own ? sum.basis_bits / 8 : 0.65 * sum.tables;

    return sum.bits / 8 * s->coded / s->tokens + basis;
}

static bool counts_lossless(const xkv_sample *s, uint32_t group, cost sum)
{
    return !isfinite(sum.bits + sum.basis_bits) || !isfinite(s->energies[group]) ||
           (s->cross.basis && s->cross.left_out[group]);
}

static void add_up(const xkv_sample *s, total_cost *t)
{
    double squares = 0, energy = 0, worst = 0;

    *t = (total_cost){0, 0};
    for (uint32_t i = 0; i < s->c->group_count; i++) {
        cost sum = group_cost(s, i);
        if (xkv_group_is_cross(&s->c->groups[i])) {
            t->bytes += coded_bytes(s, i, sum);
            continue;
        }
        if (counts_lossless(s, i, sum)) {
            t->bytes += (double)xkv_group_row_bytes(&s->c->geometry, &s->c->groups[i], s->coded);
            continue;
        }
        t->bytes += coded_bytes(s, i, sum);
        sum.squares += cross_squares(s, i);
        squares += sum.squares;
        energy += s->energies[i];
        if (s->energies[i] > 0)
            worst = fmax(worst, sum.squares / s->energies[i]);
    }
    t->error = energy > 0 ? sqrt(fmax(squares / energy, worst / (XKV_GROUP_SLACK * XKV_GROUP_SLACK))) : 0;
}

static xkv_status cost_all(xkv_sample *s, xkv_pool *pool)
{
    return xkv_pool_run(s->ctx, pool, s->first[s->c->group_count], cost_task, s);
}

/* Cost all, with the groups left out that the cross stage cannot code, or none. */
static xkv_status cost_with(xkv_sample *s, xkv_pool *pool, bool large)
{
    bool changed;

    leave_out(s, large, &changed);
    if (changed)
        XKV_TRY(rotate_cross(s, pool));
    return cost_all(s, pool);
}

static xkv_status evaluate(xkv_sample *s, xkv_pool *pool, double step, total_cost *t)
{
    s->step = (float)step;
    if (s->cross.basis) {
        XKV_TRY(cost_with(s, pool, false));
        if (!isfinite(group_cost(s, 0).bits))
            XKV_TRY(cost_with(s, pool, true));
    } else {
        XKV_TRY(cost_all(s, pool));
    }
    add_up(s, t);
    return XKV_OK;
}

xkv_status xkv_sample_estimate(xkv_pool *pool, xkv_sample *s, float step, xkv_estimate *estimate)
{
    return evaluate(s, pool, (double)step, estimate);
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

/* Binary logarithms of a step that is fine, and of one that is coarse, for the middle one of the groups: a group of
 * huge values has no say in it. False when there is nothing to code. */
static xkv_status search_range(const xkv_sample *s, double *lo, double *hi, bool *some)
{
    uint32_t n = 0;
    double *rms;

    XKV_TRY(XKV_NEW(s->ctx, s->c->group_count, &rms));
    for (uint32_t i = 0; i < s->c->group_count; i++)
        if (s->energies[i] > 0 && isfinite(s->energies[i]))
            rms[n++] = 0.5 * log2(s->energies[i] / s->tokens / s->transforms[i].rank);
    qsort(rms, n, sizeof *rms, compare_doubles);
    *some = n > 0;
    if (n > 0) {
        *lo = rms[(n - 1) / 2] - 12;
        *hi = rms[(n - 1) / 2] + 9;
    }
    xkv_release(s->ctx, rms);
    return XKV_OK;
}

static xkv_status out_of_reach(xkv_ctx *ctx)
{
    return xkv_fail(ctx, XKV_ERROR_TARGET, "the ratio cannot be reached: even the coarsest step needs more bytes");
}

/* Bisection; finer, while there is room or while the error is too large. */
static xkv_status search(xkv_pool *pool, xkv_sample *s, double bytes, double error, double *lo, double *hi)
{
    total_cost t;

    while (*hi - *lo > 0.002) {
        double mid = (*lo + *hi) / 2;
        XKV_TRY(evaluate(s, pool, exp2(mid), &t));
        if (bytes > 0 ? t.bytes <= bytes : t.error > error)
            *hi = mid;
        else
            *lo = mid;
    }
    return XKV_OK;
}

xkv_status xkv_sample_step(xkv_ctx *ctx, xkv_pool *pool, xkv_sample *s, double bytes, double error, float *step)
{
    double lo = 0, hi = 0, coarsest;
    bool some;
    total_cost t;

    *step = 1;
    if (s->tokens == 0)
        return XKV_OK;
    XKV_TRY(search_range(s, &lo, &hi, &some));
    coarsest = hi;
    XKV_TRY(evaluate(s, pool, exp2(coarsest), &t));
    if (bytes > 0 && t.bytes > bytes)
        return out_of_reach(ctx);
    if (!some)
        return XKV_OK;
    XKV_TRY(search(pool, s, bytes, error, &lo, &hi));
    *step = (float)exp2(bytes > 0 ? hi : lo);
    return XKV_OK;
}
