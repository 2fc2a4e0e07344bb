/* attend.c - attention over the tiles of a layer. Rows are cut into tasks whatever the number of threads; each gives an
 * output and a log-sum-exp, and these are merged in order, so that the bits do not depend on who did what. */
#include "attend_layer.h"
#include "attention.h"
#include "softmax.h"

#include <math.h>

/* Rows of a task at least, and tasks at most, whose outputs are in memory together. */
#define TASK_ROWS 1024u
#define MAX_TASKS 16u

/* --- A call ------------------------------------------------------------------------------------------------------- */

/* Asked rows [first, end), all of one stretch. */
typedef struct task {
    const xkv_stretch *stretch; /* NULL: rows are held */
    uint32_t first, end;
} task;

/* What one thread has at hand. */
typedef struct worker {
    const xkv_stretch *stretch; /* that it is ready for */
    xkv_tile_plane planes[XKV_ROLE_COUNT];
    uint32_t shared[XKV_ROLE_COUNT]; /* the first role with the same group, whose block is used */
    xkv_block_scratch scratch[XKV_ROLE_COUNT];
    xkv_block blocks[XKV_ROLE_COUNT];
    xkv_rotator rotator, mover;

    float *rows[XKV_ROLE_COUNT]; /* [XKV_ATTEND_TOKENS][width] */
    float *panel;                /* XKV_TILE_PANEL, or as loading a block wants it */
    float *scores;               /* [queries][XKV_ATTEND_TOKENS] */
    xkv_softmax *softmax;        /* [queries] */
    float *output;               /* [queries][dim_v] sums of weighted rows of V */
    size_t slots;                /* weights are summed up as coefficients: so many; 0: rows of V are */
    float *sums;                 /* [queries][slots] of weighted coefficients */
    float *coded;                /* [queries] weights of the rows that these stand for */
} worker;

/* A query is one of one head: those of KV head h are h * m .. h * m + m - 1, heads in order within each token. */
typedef struct job {
    xkv_ctx *ctx;
    const xkv_kernels *kernels;
    const xkv_attention *a;
    const xkv_queries *queries;
    xkv_attend_layer l;
    float *q;            /* [count][dim_k], times the scale */
    int32_t least, most; /* of the queries' positions */
    uint32_t task_count;
    task *tasks;
    worker *workers;
    float *outputs, *lses; /* [task_count][count][dim_v] and [task_count][count], as the caller's */
} job;

/* --- Getting ready ------------------------------------------------------------------------------------------------ */

/* Where query (i, head) of the caller is among ours. */
static size_t place(const job *j, uint32_t i, uint32_t head)
{
    uint32_t group = j->queries->heads / j->l.kv_heads;

    return (head / group) * j->l.m + (size_t)i * group + head % group;
}

static void take_queries(job *j)
{
    const xkv_queries *q = j->queries;
    int64_t head_stride = q->head_stride ? q->head_stride : (int64_t)j->l.dim_k * (int64_t)sizeof(float);
    int64_t query_stride = q->query_stride ? q->query_stride : head_stride * q->heads;

    for (uint32_t i = 0; i < q->count; i++)
        for (uint32_t h = 0; h < q->heads; h++) {
            float *out = j->q + place(j, i, h) * j->l.dim_k;
            memcpy(out, (const uint8_t *)q->data + i * query_stride + h * head_stride, j->l.dim_k * sizeof *out);
            for (uint32_t d = 0; d < j->l.dim_k; d++)
                out[d] *= (float)j->l.o.scale;
        }
    for (uint32_t i = 0; q->positions && i < q->count; i++) {
        j->least = i == 0 || q->positions[i] < j->least ? q->positions[i] : j->least;
        j->most = i == 0 || q->positions[i] > j->most ? q->positions[i] : j->most;
    }
}

/* Cut the rows of a stretch, or all that are held, into tasks that end where chunks do. Without an array they are only
 * counted. */
static void cut(job *j, const xkv_stretch *s)
{
    const xkv_attention *a = j->a;
    uint32_t chunk = s ? s->entry->c.chunk_tokens : XKV_TILE_ROWS, own = s ? s->first : 0, at = s ? s->at : 0;
    uint64_t size = xkv_max64(TASK_ROWS, xkv_ceil_div(a->token_count, MAX_TASKS)), next;
    uint32_t end = s ? s->end : a->token_count;

    size = xkv_ceil_div(size, chunk) * chunk;
    for (uint64_t t = own; t < end; t = next) {
        next = xkv_min64((t / size + 1) * size, end);
        if (j->tasks)
            j->tasks[j->task_count] = (task){s, at + (uint32_t)(t - own), at + (uint32_t)(next - own)};
        j->task_count++;
    }
}

static void cut_all(job *j)
{
    j->task_count = 0;
    if (j->a->rows)
        cut(j, NULL);
    for (uint32_t i = 0; i < j->a->stretch_count; i++)
        cut(j, &j->a->stretches[i]);
}

static xkv_status make_tasks(job *j)
{
    cut_all(j);
    XKV_TRY(XKV_NEW(j->ctx, j->task_count, &j->tasks));
    cut_all(j);
    return XKV_OK;
}

/* --- Workers ------------------------------------------------------------------------------------------------------ */

/* Weighing coefficients takes `slots` products for each query and row, rebuilding V takes them for each element of its
 * row, and then one for each query and element. */
static bool weighing_pays(const job *j, const xkv_tile_plane *v)
{
    double slots = v->group->slots, rebuilt = slots * v->width + (double)j->l.count * j->l.dim_v;

    return !j->l.o.rebuild && xkv_has_slots(v->group) && (double)j->l.count * slots <= rebuilt;
}

/* Find a role's plane in the stretch's groups. */
static void find_plane(const job *j, worker *w, uint32_t role)
{
    w->planes[role] = xkv_stretch_plane(w->stretch, j->l.roles[role].plane);
    w->shared[role] = role;
    for (uint32_t i = role; i-- > 0;)
        if (j->l.roles[i].present && w->planes[i].group == w->planes[role].group)
            w->shared[role] = i;
}

static void release_stretch(const job *j, worker *w)
{
    for (uint32_t i = 0; i < XKV_ROLE_COUNT; i++)
        xkv_block_scratch_free(&w->scratch[i]);
    if (w->rotator.geometry)
        xkv_rotator_free(j->ctx, &w->rotator);
    if (w->mover.geometry)
        xkv_rotator_free(j->ctx, &w->mover);
    xkv_release(j->ctx, w->sums);
    xkv_release(j->ctx, w->panel);
    w->sums = w->panel = NULL;
    w->slots = 0;
    w->stretch = NULL;
}

static xkv_status make_panel(const job *j, worker *w)
{
    size_t size = XKV_TILE_PANEL;

    for (uint32_t i = 0; i < XKV_ROLE_COUNT; i++)
        if (j->l.roles[i].present && !w->stretch->blocks)
            size = (size_t)xkv_max64(size, xkv_block_panel(w->planes[i].group));
    return XKV_NEW(j->ctx, size, &w->panel);
}

/* Scratch for the groups of a stretch. */
static xkv_status enter_stretch(job *j, worker *w, const xkv_stretch *s)
{
    if (w->stretch == s)
        return XKV_OK;
    release_stretch(j, w);
    w->stretch = s;
    XKV_TRY(xkv_rotator_init(j->ctx, &s->entry->c.geometry, j->kernels, false, &w->rotator));
    if (s->moves.distances)
        XKV_TRY(xkv_rotator_init(j->ctx, &s->moves.geometry, j->kernels, false, &w->mover));
    for (uint32_t i = 0; i < XKV_ROLE_COUNT; i++)
        if (j->l.roles[i].present)
            find_plane(j, w, i);
    XKV_TRY(make_panel(j, w));
    for (uint32_t i = 0; i < XKV_ROLE_COUNT; i++)
        if (j->l.roles[i].present && !s->blocks && w->shared[i] == i)
            XKV_TRY(xkv_block_scratch_create(j->ctx, w->planes[i].group, w->panel, &w->scratch[i]));
    if (j->l.value == XKV_ROLE_VALUE && weighing_pays(j, &w->planes[XKV_ROLE_VALUE]))
        w->slots = w->planes[XKV_ROLE_VALUE].group->slots;
    return XKV_NEW(j->ctx, j->l.count * w->slots, &w->sums);
}

/* What does not depend on the stretch. */
static xkv_status enter_call(job *j, worker *w)
{
    if (w->scores)
        return XKV_OK;
    for (uint32_t i = XKV_ROLE_KEY; i <= XKV_ROLE_KEY_ROPE; i++) {
        size_t width = j->l.roles[i].present ? xkv_plane_width(j->l.roles[i].facts) : 0;
        if (i == XKV_ROLE_KEY && j->l.roles[XKV_ROLE_VALUE].present)
            width = (size_t)xkv_max64(width, xkv_plane_width(j->l.roles[XKV_ROLE_VALUE].facts));
        XKV_TRY(XKV_NEW(j->ctx, XKV_ATTEND_TOKENS * width, &w->rows[i]));
    }
    w->rows[XKV_ROLE_VALUE] = w->rows[XKV_ROLE_KEY]; /* which are done with when those of V are made */
    XKV_TRY(XKV_NEW(j->ctx, j->l.count, &w->softmax));
    XKV_TRY(XKV_NEW(j->ctx, j->l.count, &w->coded));
    XKV_TRY(XKV_NEW(j->ctx, j->l.count * j->l.dim_v, &w->output));
    return XKV_NEW(j->ctx, j->l.count * XKV_ATTEND_TOKENS, &w->scores);
}

static void release_worker(const job *j, worker *w)
{
    release_stretch(j, w);
    xkv_release(j->ctx, w->rows[XKV_ROLE_KEY]);
    xkv_release(j->ctx, w->rows[XKV_ROLE_KEY_ROPE]);
    xkv_release(j->ctx, w->softmax);
    xkv_release(j->ctx, w->coded);
    xkv_release(j->ctx, w->output);
    xkv_release(j->ctx, w->scores);
}

/* --- Rows of a tile ----------------------------------------------------------------------------------------------- */

/* Asked rows [row, row + count), all coded or all exact in any group that has both. */
typedef struct tile {
    uint32_t row, count;
    uint32_t token; /* the first one, in its entry */
    bool exact;     /* sinks or window */
} tile;

/* Rotate one plane. */
static xkv_status rotate(const job *j, xkv_rotator *r, const xkv_tile_plane *p, const int32_t *positions,
                         uint32_t count, float *x)
{
    uint32_t plane = p->plane;
    const xkv_group one = {.plane_count = 1, .planes = &plane, .width = p->width};

    return xkv_rotate_rows(j->ctx, r, &one, positions, count, x);
}

static xkv_status make_rows(job *j, worker *w, uint32_t role, const tile *t)
{
    const xkv_plane_role *r = &j->l.roles[role];
    const xkv_tile_plane *p = &w->planes[role];
    const xkv_stretch *s = w->stretch;
    const xkv_block *b = &w->blocks[w->shared[role]];
    float *x = w->rows[role];
    uint32_t from = s ? t->token - s->first : 0;
    size_t width = xkv_plane_width(r->facts);

    if (!s) {
        j->kernels->to_f32(r->facts->dtype,
                           j->a->rows[r->plane] + t->row * (size_t)xkv_dtype_bytes(r->facts->dtype, width), x,
                           t->count * width);
        return XKV_OK;
    }
    if (t->exact || p->group->form == XKV_BLOCK_ROWS) {
        xkv_tile_exact(p, xkv_tile_stored(p->group, b, t->token), t->count, x);
        return s->moves.distances ? rotate(j, &w->mover, p, s->moves.distances + from, t->count, x) : XKV_OK;
    }
    xkv_tile_rows(p, b, t->token, t->count, w->panel, x);
    return rotate(j, &w->rotator, p, s->moves.positions + from, t->count, x);
}

/* --- Scores and weights ------------------------------------------------------------------------------------------- */

/* scores [count][XKV_ATTEND_TOKENS] = Q K^T */
static xkv_status make_scores(job *j, worker *w, const tile *t)
{
    for (uint32_t i = XKV_ROLE_KEY; i <= XKV_ROLE_KEY_ROPE; i++) {
        if (!j->l.roles[i].present)
            continue;
        size_t dim = j->l.roles[i].facts->head_dim;
        XKV_TRY(make_rows(j, w, i, t));
        for (size_t h = 0; h < j->l.kv_heads; h++)
            j->kernels->gemm_nt(j->l.m, t->count, dim, j->q + h * j->l.m * j->l.dim_k + j->l.roles[i].query_dim,
                                j->l.dim_k, w->rows[i] + h * dim, j->l.kv_heads * dim, i == XKV_ROLE_KEY ? 0 : 1,
                                w->scores + h * j->l.m * XKV_ATTEND_TOKENS, XKV_ATTEND_TOKENS);
    }
    return XKV_OK;
}

static bool is_visible(const job *j, int64_t query, int64_t row)
{
    return row <= query && (j->l.o.window == 0 || query - row < j->l.o.window);
}

/* Whether any query may see one of these rows. */
static bool any_visible(const job *j, uint32_t first, uint32_t count)
{
    if (!j->l.o.causal)
        return true;
    for (uint32_t k = 0; k < count; k++) {
        int64_t row = j->a->positions[first + k];
        if (row <= j->most && (j->l.o.window == 0 || j->least - row < (int64_t)j->l.o.window))
            return true;
    }
    return false;
}

static void hide_rows(const job *j, const tile *t, size_t query, float *scores)
{
    uint32_t group = j->queries->heads / j->l.kv_heads;
    int64_t position = j->queries->positions[query % j->l.m / group];

    for (uint32_t k = 0; k < t->count; k++)
        if (!is_visible(j, position, j->a->positions[t->row + k]))
            scores[k] = -INFINITY;
}

static void scale(float *x, size_t n, float factor)
{
    for (size_t i = 0; i < n; i++)
        x[i] *= factor;
}

/* Scores to weights; what is summed up already follows the largest score. */
static void make_weights(job *j, worker *w, const tile *t, bool weigh)
{
    for (size_t r = 0; r < j->l.count; r++) {
        float *scores = w->scores + r * XKV_ATTEND_TOKENS, factor, added;
        if (j->l.o.softcap > 0)
            xkv_softcap(scores, t->count, (float)j->l.o.softcap);
        if (j->l.o.causal)
            hide_rows(j, t, r, scores);
        factor = xkv_softmax_add(&w->softmax[r], scores, t->count, &added);
        if (factor != 1) {
            scale(w->output + r * j->l.dim_v, j->l.dim_v, factor);
            if (w->slots > 0)
                scale(w->sums + r * w->slots, w->slots, factor);
            w->coded[r] *= factor;
        }
        if (weigh)
            w->coded[r] += added;
    }
}

/* --- Tiles and tasks ---------------------------------------------------------------------------------------------- */

static xkv_status add_tile(job *j, worker *w, const tile *t)
{
    bool weigh = w->slots > 0 && !t->exact;

    if (!any_visible(j, t->row, t->count))
        return XKV_OK;
    XKV_TRY(make_scores(j, w, t));
    make_weights(j, w, t, weigh);
    if (weigh) {
        xkv_tile_weigh(&w->planes[XKV_ROLE_VALUE], &w->blocks[w->shared[XKV_ROLE_VALUE]], t->token, t->count,
                       j->l.count, w->scores, XKV_ATTEND_TOKENS, w->panel, w->sums);
        return XKV_OK;
    }
    if (j->l.value == XKV_ROLE_VALUE)
        XKV_TRY(make_rows(j, w, XKV_ROLE_VALUE, t));
    for (size_t h = 0; h < j->l.kv_heads; h++)
        j->kernels->gemm_nn(j->l.m, j->l.dim_v, t->count, w->scores + h * j->l.m * XKV_ATTEND_TOKENS, XKV_ATTEND_TOKENS,
                            w->rows[j->l.value] + h * j->l.dim_v, j->l.kv_heads * j->l.dim_v, 1,
                            w->output + h * j->l.m * j->l.dim_v, j->l.dim_v);
    return XKV_OK;
}

/* Rows [first, end) in tiles. */
static xkv_status add_rows(job *j, worker *w, uint32_t first, uint32_t end, uint32_t token, bool exact)
{
    for (uint32_t row = first; row < end; row += XKV_ATTEND_TOKENS) {
        tile t = {row, (uint32_t)xkv_min64(end - row, XKV_ATTEND_TOKENS), token + (row - first), exact};
        XKV_TRY(add_tile(j, w, &t));
    }
    return XKV_OK;
}

static xkv_status load_blocks(job *j, worker *w, uint32_t chunk)
{
    const xkv_stretch *s = w->stretch;

    for (uint32_t i = 0; i < XKV_ROLE_COUNT; i++) {
        if (!j->l.roles[i].present || w->shared[i] != i)
            continue;
        if (s->blocks)
            w->blocks[i] = s->blocks[w->planes[i].group - s->groups][chunk - s->first_chunk];
        else
            XKV_TRY(xkv_block_load(&w->scratch[i], chunk, &w->blocks[i]));
    }
    return XKV_OK;
}

/* Tokens [first, end) of a chunk: sinks, coded ones, window. What no query sees is not even read. */
static xkv_status add_chunk(job *j, worker *w, uint32_t chunk, uint32_t first, uint32_t end)
{
    const xkv_stretch *s = w->stretch;
    const xkv_container *c = &s->entry->c;
    uint32_t cuts[] = {0, c->sinks, c->geometry.token_count - c->window, c->geometry.token_count};

    XKV_TRY(xkv_check_cancel(j->ctx));
    if (!any_visible(j, s->at + (first - s->first), end - first))
        return XKV_OK;
    XKV_TRY(load_blocks(j, w, chunk));
    for (uint32_t i = 0; i < 3; i++) {
        uint32_t a = cuts[i] > first ? cuts[i] : first, b = cuts[i + 1] < end ? cuts[i + 1] : end;
        if (a < b)
            XKV_TRY(add_rows(j, w, s->at + (a - s->first), s->at + (b - s->first), a, i != 1));
    }
    return XKV_OK;
}

static xkv_status add_stretch(job *j, worker *w, const task *t)
{
    const xkv_stretch *s = t->stretch;
    uint32_t first = s->first + (t->first - s->at), end = s->first + (t->end - s->at), next;

    for (uint32_t at = first; at < end; at = next) {
        uint32_t chunk = at / s->entry->c.chunk_tokens;
        next = (uint32_t)xkv_min64(((uint64_t)chunk + 1) * s->entry->c.chunk_tokens, end);
        XKV_TRY(add_chunk(j, w, chunk, at, next));
    }
    return XKV_OK;
}

static void begin(const job *j, worker *w)
{
    for (size_t r = 0; r < j->l.count; r++) {
        w->softmax[r] = (xkv_softmax){.largest = -INFINITY};
        w->coded[r] = 0;
    }
    memset(w->output, 0, j->l.count * j->l.dim_v * sizeof *w->output);
    if (w->slots > 0)
        memset(w->sums, 0, j->l.count * w->slots * sizeof *w->sums);
}

/* Weighted coefficients to rows of V, weights to averages, our order to the caller's. */
static void finish(const job *j, worker *w, float *output, float *lse)
{
    for (uint32_t h = 0; w->slots > 0 && h < j->l.kv_heads; h++)
        xkv_tile_apply_basis(&w->planes[XKV_ROLE_VALUE], j->l.m, w->sums + h * j->l.m * w->slots, w->coded + h * j->l.m,
                             h * j->l.dim_v, j->l.dim_v, w->panel, w->output + h * j->l.m * j->l.dim_v, j->l.dim_v);
    for (uint32_t i = 0; i < j->queries->count; i++)
        for (uint32_t head = 0; head < j->queries->heads; head++) {
            size_t r = place(j, i, head), out = (size_t)i * j->queries->heads + head;
            double sum = w->softmax[r].sum;
            for (uint32_t d = 0; d < j->l.dim_v; d++)
                output[out * j->l.dim_v + d] = sum == 0 ? 0 : (float)((double)w->output[r * j->l.dim_v + d] / sum);
            lse[out] = xkv_softmax_lse(&w->softmax[r]);
        }
}

static xkv_status run_task(void *user, uint32_t index, uint64_t number)
{
    job *j = user;
    worker *w = &j->workers[index];
    const task *t = &j->tasks[number];

    XKV_TRY(enter_call(j, w));
    if (t->stretch)
        XKV_TRY(enter_stretch(j, w, t->stretch));
    begin(j, w);
    if (t->stretch)
        XKV_TRY(add_stretch(j, w, t));
    else
        XKV_TRY(add_rows(j, w, t->first, t->end, 0, false));
    finish(j, w, j->outputs + number * j->l.count * j->l.dim_v, j->lses + number * j->l.count);
    return XKV_OK;
}

/* --- Entry point -------------------------------------------------------------------------------------------------- */

static xkv_status merge_tasks(const job *j, float *output, float *lse)
{
    xkv_attention_state *states = NULL;

    XKV_TRY(XKV_NEW(j->ctx, j->task_count, &states));
    for (uint32_t i = 0; i < j->task_count; i++)
        states[i] = (xkv_attention_state){j->outputs + i * j->l.count * j->l.dim_v, j->lses + i * j->l.count};
    xkv_attention_merge(states, j->task_count, j->l.count, j->l.dim_v, output, lse);
    xkv_release(j->ctx, states);
    return XKV_OK;
}

static xkv_status run(job *j, float *output, float *lse)
{
    uint32_t threads;
    xkv_pool *pool = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(make_tasks(j));
    XKV_TRY(XKV_NEW(j->ctx, j->l.count * j->l.dim_k, &j->q));
    take_queries(j);
    XKV_TRY(XKV_NEW(j->ctx, j->task_count * j->l.count * j->l.dim_v, &j->outputs));
    XKV_TRY(XKV_NEW(j->ctx, j->task_count * j->l.count, &j->lses));
    threads = (uint32_t)xkv_min64(xkv_ctx_threads(j->ctx), xkv_max64(j->task_count, 1));
    XKV_TRY(xkv_pool_create(j->ctx, threads, &pool));
    threads = xkv_pool_threads(pool);
    XKV_TRY_GOTO(XKV_NEW_ZERO(j->ctx, threads, &j->workers), out);
    XKV_TRY_GOTO(xkv_pool_run(j->ctx, pool, j->task_count, run_task, j), out);
    XKV_TRY_GOTO(merge_tasks(j, output, lse), out);
out:
    for (uint32_t i = 0; j->workers && i < threads; i++)
        release_worker(j, &j->workers[i]);
    xkv_pool_free(j->ctx, pool);
    return status;
}

xkv_status xkv_attend(xkv_ctx *ctx, const xkv_attention *attention, uint32_t layer, const xkv_queries *queries,
                      const xkv_attend_options *options, float *output, float *lse)
{
    job j = {.ctx = ctx, .kernels = xkv_kernels_cpu(), .a = attention, .queries = queries};
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_attend_layer_init(ctx, &attention->entry->geometry, attention->first_layer, attention->layer_count,
                                  layer, queries, options, &j.l));
    if (j.l.count == 0)
        return XKV_OK;
    status = run(&j, output, lse);
    xkv_release(ctx, j.tasks);
    xkv_release(ctx, j.q);
    xkv_release(ctx, j.outputs);
    xkv_release(ctx, j.lses);
    xkv_release(ctx, j.workers);
    return status;
}
