#include "rate.h"

#include "parts.h"

#include <math.h>

enum { SAMPLE_TILES = 4, SAMPLE_TOKENS = SAMPLE_TILES * XKV_TILE_ROWS, BATCH = 16 };

/* What a step costs. */
typedef struct cost {
    double bits, squares;
    uint32_t tables; /* components that are coded */
} cost;

struct xkv_sample {
    xkv_ctx *ctx;
    xkv_rotator *rotators;
    const xkv_container *c;
    const xkv_view *views;
    const xkv_transform *transforms;
    uint32_t tokens; /* sampled */
    uint32_t coded;  /* of how many */
    float **y;       /* [group_count]: [rank][tokens] */
    uint32_t *first; /* [group_count + 1] index of the group's first component among all */
    double energy;
    double lossless; /* bytes of the groups that no step can code, at most */
    float *scratch;  /* of gathering */
    size_t scratch_size;
    float step;  /* of the evaluation at hand */
    cost *costs; /* [batches] */
    int16_t *q;  /* [threads][tokens] */
};

/* --- Projection --- */

/* Tile `tile` of the sample: its token and its column in y. */
static uint32_t sample_tile(const xkv_sample *s, uint32_t tile, uint32_t *token)
{
    uint32_t column = tile * XKV_TILE_ROWS;

    *token =
        s->c->sinks +
        (s->tokens == s->coded ? column : (uint32_t)((uint64_t)(s->coded - XKV_TILE_ROWS) * tile / (SAMPLE_TILES - 1)));
    return (uint32_t)xkv_min64(XKV_TILE_ROWS, s->tokens - column);
}

static xkv_status project_task(void *user, uint32_t worker, uint64_t index)
{
    xkv_sample *s = user;
    uint32_t tiles = (uint32_t)xkv_ceil_div(s->tokens, XKV_TILE_ROWS), tile = (uint32_t)(index % tiles), token, n;
    uint64_t group = index / tiles;
    const xkv_group *g = &s->c->groups[group];
    float *x = s->scratch + worker * s->scratch_size;

    if (!s->y[group])
        return XKV_OK;
    n = sample_tile(s, tile, &token);
    XKV_TRY(xkv_gather_rows(s->ctx, &s->rotators[worker], g, s->views, token, token + n, x));
    xkv_analyze(s->rotators->kernels, &s->transforms[group], x, n, s->y[group] + tile * XKV_TILE_ROWS, s->tokens);
    return XKV_OK;
}

/* A group whose coefficients exceed f32 will be stored lossless, whatever the step: it has no say in it. */
static double group_energy(xkv_sample *s, uint32_t group)
{
    const xkv_group *g = &s->c->groups[group];
    const xkv_geometry *geometry = &s->c->geometry;
    size_t n = (size_t)s->transforms[group].rank * s->tokens;
    double energy = s->rotators->kernels->sum_squares(s->y[group], n);

    if (isfinite(energy))
        return energy;
    memset(s->y[group], 0, n * sizeof *s->y[group]);
    s->lossless += (double)((uint64_t)g->width * s->coded * xkv_dtype_size(geometry->planes[g->planes[0]].dtype));
    return 0;
}

static xkv_status project(xkv_sample *s, xkv_pool *pool)
{
    uint32_t tiles = (uint32_t)xkv_ceil_div(s->tokens, XKV_TILE_ROWS);

    for (uint32_t i = 0; i < s->c->group_count; i++) {
        uint32_t rank = s->transforms[i].rank;
        s->first[i + 1] = s->first[i] + rank;
        s->scratch_size = (size_t)xkv_max64(s->scratch_size, (uint64_t)XKV_TILE_ROWS * s->c->groups[i].width);
        if (rank > 0)
            XKV_TRY(XKV_NEW(s->ctx, (size_t)rank * s->tokens, &s->y[i]));
    }
    XKV_TRY(XKV_NEW(s->ctx, s->scratch_size * xkv_pool_threads(pool), &s->scratch));
    XKV_TRY(xkv_pool_run(s->ctx, pool, (uint64_t)s->c->group_count * tiles, project_task, s));
    for (uint32_t i = 0; i < s->c->group_count; i++)
        if (s->y[i])
            s->energy += group_energy(s, i);
    return XKV_OK;
}

xkv_status xkv_sample_create(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, const xkv_container *c,
                             const xkv_view *views, const xkv_transform *transforms, xkv_sample **sample_p)
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
                      .tokens = coded < SAMPLE_TOKENS ? coded : SAMPLE_TOKENS};
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, c->group_count, &s->y), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, c->group_count + 1u, &s->first), out);
    XKV_TRY_GOTO(project(s, pool), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, xkv_ceil_div(s->first[c->group_count], BATCH), &s->costs), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)s->tokens * xkv_pool_threads(pool), &s->q), out);
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
    xkv_release(ctx, s->scratch);
    xkv_release(ctx, s->costs);
    xkv_release(ctx, s->q);
    xkv_release(ctx, s);
}

/* --- Cost of a step --- */

static const float *component(const xkv_sample *s, uint32_t index)
{
    uint32_t g = 0;

    while (index >= s->first[g + 1])
        g++;
    return s->y[g] + (size_t)(index - s->first[g]) * s->tokens;
}

static xkv_status cost_task(void *user, uint32_t worker, uint64_t batch)
{
    xkv_sample *s = user;
    uint32_t all = s->first[s->c->group_count], end = (uint32_t)xkv_min64(all, (batch + 1) * BATCH);
    cost sum = {0, 0, 0};

    for (uint32_t i = (uint32_t)batch * BATCH; i < end; i++) {
        double bits, squares;
        uint8_t table;
        if (!xkv_code_component(xkv_coder_cpu(), component(s, i), s->tokens, s->step, s->q + (size_t)worker * s->tokens,
                                &table, &bits, &squares))
            bits = INFINITY; /* too fine a step */
        sum.bits += bits;
        sum.squares += squares;
        sum.tables += table != 0;
    }
    s->costs[batch] = sum;
    return XKV_OK;
}

static xkv_status evaluate(xkv_sample *s, xkv_pool *pool, double step, cost *sum)
{
    uint64_t batches = xkv_ceil_div(s->first[s->c->group_count], BATCH);

    s->step = (float)step;
    XKV_TRY(xkv_pool_run(s->ctx, pool, batches, cost_task, s));
    *sum = (cost){0, 0, 0};
    for (uint64_t i = 0; i < batches; i++) {
        sum->bits += s->costs[i].bits;
        sum->squares += s->costs[i].squares;
        sum->tables += s->costs[i].tables;
    }
    return XKV_OK;
}

/* Bytes of the whole entry's streams, table lists and groups that cannot be coded; lists are zstd-compressed, to about
 * 5 bits an index. */
static double total_bytes(const xkv_sample *s, const cost *sum)
{
    return sum->bits / 8 * s->coded / s->tokens + 0.65 * sum->tables + s->lossless;
}

static xkv_status out_of_reach(xkv_ctx *ctx)
{
    return xkv_fail(ctx, XKV_ERROR_TARGET, "the ratio cannot be reached: even the coarsest step needs more bytes");
}

xkv_status xkv_sample_step(xkv_ctx *ctx, xkv_pool *pool, xkv_sample *s, double bytes, double error, float *step)
{
    double rms, lo, hi;
    cost sum;

    if (bytes > 0 && s->lossless > bytes)
        return out_of_reach(ctx);
    if (s->tokens == 0 || s->energy == 0) {
        *step = 1;
        return XKV_OK;
    }
    rms = sqrt(s->energy / s->tokens / s->first[s->c->group_count]);
    lo = log2(rms) - 9;
    hi = log2(rms) + 9;
    for (int i = 0; i < 14; i++) {
        double mid = (lo + hi) / 2;
        XKV_TRY(evaluate(s, pool, exp2(mid), &sum));
        /* Finer, while there is room or while the error is too large. */
        if (bytes > 0 ? total_bytes(s, &sum) <= bytes : isfinite(sum.bits) && sqrt(sum.squares / s->energy) > error)
            hi = mid;
        else
            lo = mid;
    }
    *step = (float)exp2(bytes > 0 ? hi : lo);
    if (bytes > 0 && hi >= log2(rms) + 8.99)
        return out_of_reach(ctx);
    return XKV_OK;
}
