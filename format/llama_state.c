/* llama_state.c - llama.cpp state files as caches, and cut to their first tokens (spec/engines.md, sections 1 to 3). */
#include "llama_walk.h"

typedef xkv_llama_tensor tensor;
typedef xkv_llama_memory memory;
typedef xkv_llama_state state;

/* --- From a walk to a cache --------------------------------------------------------------------------------------- */

/* The layers that are packed, in order of the file: those of the first memory, then those of the second. */
typedef struct packing {
    const state *s;
    const xkv_model *model; /* NULL: not known, or not of this file */
    uint32_t memory_count;  /* memories that are packed; others are literal */
    uint32_t count;
    uint32_t *layer;             /* [count] its number in the geometry */
    uint32_t *k_first, *v_plane; /* [count] where its planes are */
} packing;

/* Whether K is as RoPE left it, so that it can be undone. Not when a token has several positions (M-RoPE), nor
 * behind a Hadamard rotation, which engines apply to quantized rows whose head_dim is a multiple of 64; of that, files
 * before version 4 do not tell. */
static bool can_unrotate(const memory *m, bool told, const xkv_plane *plane)
{
    if (m->rot_k != 0 || m->several_positions)
        return false;
    return told || xkv_dtype_block(plane->dtype) == 1 || plane->head_dim % 64 != 0;
}

/* Whether a K row is stored as two planes, a latent beside a rotated part, none of which splits a block. */
static bool holds_latent(const tensor *t, const xkv_model *model)
{
    return model && model->latent_dim > 0 && model->latent_dim < t->width &&
           model->latent_dim % xkv_dtype_block(t->dtype) == 0;
}

/* Planes of one layer's K: one, or two where a row is a latent beside a rotated part. */
static xkv_status add_k(xkv_ctx *ctx, const xkv_cache *cache, const packing *p, const memory *m, const tensor *t,
                        xkv_plane plane, xkv_plane *planes, uint32_t *count)
{
    plane.kind = XKV_PLANE_K;
    plane.dtype = t->dtype;
    XKV_TRY(xkv_model_fit_plane(ctx, cache->name, p->model, t->width, &plane));
    if (!holds_latent(t, p->model)) {
        if (!can_unrotate(m, p->s->form.rotations, &plane))
            plane.rope = XKV_NO_ROPE;
        planes[(*count)++] = plane;
        return XKV_OK;
    }
    plane.rope = XKV_NO_ROPE;
    plane.heads = 1;
    plane.kind = XKV_PLANE_LATENT;
    plane.head_dim = p->model->latent_dim;
    planes[(*count)++] = plane;
    plane.kind = XKV_PLANE_K_ROPE;
    plane.head_dim = t->width - p->model->latent_dim;
    planes[(*count)++] = plane;
    return XKV_OK;
}

/* Planes of layer `index` of a memory, which is number `at` in the file, in order of their kinds. */
static xkv_status add_layer(xkv_ctx *ctx, const xkv_cache *cache, const packing *p, const memory *m, uint32_t index,
                            uint32_t at, xkv_plane *planes, uint32_t *count)
{
    xkv_plane plane = {.layer = p->layer[at], .rope = XKV_NO_ROPE};
    const tensor *k = &m->k[index], *v = &m->v[index];
    uint32_t first = *count;
    p->k_first[at] = first;
    if (k->coded)
        XKV_TRY(add_k(ctx, cache, p, m, k, plane, planes, count));
    if (!m->has_v || !v->coded)
        return XKV_OK;
    plane.kind = XKV_PLANE_V;
    plane.dtype = v->dtype;
    XKV_TRY(xkv_model_fit_plane(ctx, cache->name, p->model, v->width, &plane));
    p->v_plane[at] = *count;
    if (*count - first == 2) { /* V comes before latent and K-rope */
        memmove(&planes[first + 1], &planes[first], 2 * sizeof *planes);
        p->v_plane[at] = first;
        p->k_first[at] = first + 1;
    }
    planes[p->v_plane[at]] = plane;
    (*count)++;
    return XKV_OK;
}

/* Planes in order of layer and kind. */
static xkv_status add_planes(xkv_ctx *ctx, xkv_cache *cache, const packing *p, uint32_t layer_count)
{
    xkv_plane *planes;
    uint32_t *place = NULL, planes_found = 0; /* place[layer]: 1 + its number in the file, 0 for none */
    const memory *m = p->s->memories;
    xkv_status status;
    XKV_TRY(XKV_NEW(ctx, (size_t)p->count * 3, &planes));
    cache->geometry.planes = planes;
    cache->geometry.layer_count = layer_count;
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, layer_count, &place), out);
    for (uint32_t at = 0; at < p->count; at++)
        place[p->layer[at]] = at + 1;
    for (uint32_t layer = 0; layer < layer_count; layer++) {
        if (place[layer] == 0)
            continue;
        uint32_t at = place[layer] - 1, second = at >= m[0].layer_count;
        XKV_TRY_GOTO(add_layer(ctx, cache, p, &m[second], at - second * m[0].layer_count, at, planes, &planes_found),
                     out);
    }
    cache->geometry.plane_count = planes_found;
out:
    xkv_release(ctx, place);
    return status;
}

/* Say so when only the missing word about Hadamard rotations keeps K from being un-rotated. */
static void warn_of_rotation(xkv_ctx *ctx, const xkv_cache *cache, const packing *p)
{
    const state *s = p->s;
    const memory *m = &s->memories[0];
    if (!p->model || p->count == 0 || !m->k[0].coded)
        return;
    const xkv_plane *k = &cache->geometry.planes[p->k_first[0]];
    if (k->kind == XKV_PLANE_K && can_unrotate(m, true, k) && !can_unrotate(m, s->form.rotations, k))
        xkv_logf(ctx, XKV_LOG_WARNING,
                 "%s: K is %s, and version %u does not tell whether the engine rotated it by a Hadamard matrix: RoPE "
                 "is not undone",
                 cache->name, xkv_dtype_name(k->dtype), s->version);
}

/* Say so when the second memory is literal. */
static void warn_of_window(xkv_ctx *ctx, const xkv_cache *cache, const packing *p)
{
    if (p->s->memory_count == 2 && p->memory_count == 1 && p->count > 0)
        xkv_logf(ctx, XKV_LOG_WARNING,
                 "%s: the cache of layers with a window does not hold the same tokens as the other: it is carried byte "
                 "for byte, and only the whole prefix can be restored",
                 cache->name);
}

/* Append the bytes of the file up to a tensor, then the tensor. */
static xkv_status add_tensor(xkv_framing_builder *b, const xkv_map *file, const tensor *t, xkv_segment segment)
{
    if (!t->coded || t->size == 0)
        return XKV_OK;
    XKV_TRY(xkv_framing_add_literal(b, file->data + b->source_size, t->offset - b->source_size));
    segment.size = t->size;
    return xkv_framing_add_tensor(b, &segment);
}

static uint32_t k_layout(const memory *m, const xkv_model *model)
{
    /* engines that cached V beside the latent put the rotated part first */
    bool latent_first = model && model->latent_first && !m->has_v;
    return latent_first ? XKV_LAYOUT_TOKEN_MAJOR : XKV_LAYOUT_REVERSED;
}

/* The tensors of a memory whose first layer is number `first` in the file. */
static xkv_status add_memory(xkv_framing_builder *b, const xkv_cache *cache, const packing *p, const memory *m,
                             uint32_t first)
{
    const xkv_plane *planes = cache->geometry.planes;
    for (uint32_t i = 0; i < m->layer_count; i++) {
        uint32_t plane = p->k_first[first + i];
        bool latent = m->k[i].coded && planes[plane].kind == XKV_PLANE_LATENT;
        xkv_segment k = {.first_plane = plane,
                         .plane_count = latent ? 2 : 1,
                         .layout = latent ? k_layout(m, p->model) : XKV_LAYOUT_TOKEN_MAJOR};
        XKV_TRY(add_tensor(b, &cache->file, &m->k[i], k));
    }
    for (uint32_t i = 0; m->has_v && i < m->layer_count; i++) {
        xkv_segment v = {.first_plane = p->v_plane[first + i],
                         .plane_count = 1,
                         .layout = m->v_trans ? XKV_LAYOUT_DIM_MAJOR : XKV_LAYOUT_TOKEN_MAJOR};
        XKV_TRY(add_tensor(b, &cache->file, &m->v[i], v));
    }
    return XKV_OK;
}

static xkv_status add_segments(xkv_framing_builder *b, const xkv_cache *cache, const packing *p)
{
    const memory *m = p->s->memories;
    if (p->count > 0)
        XKV_TRY(add_memory(b, cache, p, &m[0], 0));
    if (p->memory_count > 1)
        XKV_TRY(add_memory(b, cache, p, &m[1], m[0].layer_count));
    return xkv_framing_add_literal(b, cache->file.data + b->source_size, cache->file.size - b->source_size);
}

/* The model's layers that have a cache, with or without a window: their number, and which they are, if `list`. */
static uint32_t list_layers(const xkv_model *model, bool window, uint32_t *list)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < model->layer_count; i++) {
        if (model->layers[i].head_dim_k == 0 || (model->layers[i].window > 0) != window)
            continue;
        if (list)
            list[count] = i;
        count++;
    }
    return count;
}

/* Whether the memories of the file are those of the model's layers without and with a window. */
static bool is_split_by_windows(const state *s, const xkv_model *model)
{
    const memory *m = s->memories;
    uint32_t windows = list_layers(model, true, NULL);
    return windows > 0 && list_layers(model, false, NULL) == m[0].layer_count &&
           (s->memory_count == 2 ? windows == m[1].layer_count : s->tail == XKV_TAIL_UNKNOWN);
}

/* Number the layers by the model, if they can be told from it; p->model is NULL otherwise. MISMATCH for a plain file of
 * another model. */
static xkv_status number_layers(xkv_ctx *ctx, const xkv_cache *cache, packing *p, const xkv_model *model)
{
    const state *s = p->s;
    uint32_t found = s->memories[0].layer_count;
    for (uint32_t i = 0; i < p->count; i++)
        p->layer[i] = i;
    p->model = p->count == 0 ? model : NULL; /* without cells there is nothing to disagree about */
    if (!model || p->count == 0)
        return XKV_OK;
    if (is_split_by_windows(s, model)) {
        p->model = model;
        list_layers(model, false, p->layer);
        if (p->memory_count == 2)
            list_layers(model, true, p->layer + found);
        return XKV_OK;
    }
    uint32_t cached = xkv_model_cached_layers(model, NULL);
    if (cached == found) { /* what a second memory holds beside all layers is not known */
        p->model = model;
        p->memory_count = 1;
        p->count = found;
        xkv_model_cached_layers(model, p->layer);
        return XKV_OK;
    }
    if (s->memory_count == 1 && s->tail != XKV_TAIL_UNKNOWN)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "%s: the file has %u layers, the model caches %u [LS9]", cache->name,
                        found, cached);
    xkv_logf(ctx, XKV_LOG_WARNING,
             "%s: several memories, %u layers in the first: the model (%u layers) is not used for it", cache->name,
             found, cached);
    return XKV_OK;
}

/* Whether the cells of the memories are the same tokens in the same order, as those of a container's planes are. */
static bool has_same_cells(const xkv_cache *cache, const state *s)
{
    const memory *a = &s->memories[0], *b = &s->memories[1];
    const uint64_t size = XKV_LLAMA_CELL + s->form.extension;
    if (a->cell_count != b->cell_count)
        return false;
    for (uint32_t i = 0; i < a->cell_count; i++)
        if (memcmp(cache->file.data + a->cells + i * size, cache->file.data + b->cells + i * size, 4) != 0)
            return false;
    return true;
}

/* Which memories are packed: none without cells, and a second one that has the cells of the first. */
static packing plan_packing(const xkv_cache *cache, const state *s)
{
    packing p = {.s = s, .memory_count = 1};
    if (s->memories[0].cell_count == 0)
        return p;
    p.count = s->memories[0].layer_count;
    if (s->memory_count == 2 && has_same_cells(cache, s)) {
        p.memory_count = 2;
        p.count += s->memories[1].layer_count;
    }
    return p;
}

/* Planes and segments; a cache without cells has neither planes nor tensors. */
static xkv_status add_layers(xkv_ctx *ctx, xkv_cache *cache, const state *s, const xkv_model *model)
{
    packing p = plan_packing(cache, s);
    xkv_framing_builder b = {.ctx = ctx};
    xkv_status status;
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, p.count, &p.layer), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, p.count, &p.k_first), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, p.count, &p.v_plane), out);
    XKV_TRY_GOTO(number_layers(ctx, cache, &p, model), out);
    XKV_TRY_GOTO(add_planes(ctx, cache, &p, p.model ? p.model->layer_count : p.count), out);
    warn_of_rotation(ctx, cache, &p);
    warn_of_window(ctx, cache, &p);
    XKV_TRY_GOTO(add_segments(&b, cache, &p), out);
    xkv_framing_take(&b, s->engine, &cache->framing);
    if (p.model)
        status = xkv_cache_set_ropes(ctx, cache, p.model->ropes, p.model->rope_count);
out:
    xkv_framing_builder_free(&b);
    xkv_release(ctx, p.layer);
    xkv_release(ctx, p.k_first);
    xkv_release(ctx, p.v_plane);
    return status;
}

static xkv_status add_token_ids(xkv_ctx *ctx, xkv_cache *cache, const state *s)
{
    if (s->ids_packed || s->id_count == 0)
        return XKV_OK;
    int32_t *ids;
    XKV_TRY(XKV_NEW(ctx, s->id_count, &ids));
    for (uint32_t i = 0; i < s->id_count; i++)
        ids[i] = (int32_t)xkv_load32(cache->file.data + s->ids + 4 * (uint64_t)i);
    cache->geometry.token_ids = ids;
    cache->geometry.token_id_count = s->id_count;
    return XKV_OK;
}

static xkv_status add_positions(xkv_ctx *ctx, xkv_cache *cache, const state *s)
{
    const memory *m = &s->memories[0];
    const uint64_t size = XKV_LLAMA_CELL + s->form.extension;
    int32_t *positions;
    XKV_TRY(XKV_NEW(ctx, m->cell_count, &positions));
    for (uint32_t i = 0; i < m->cell_count; i++)
        positions[i] = (int32_t)xkv_load32(cache->file.data + m->cells + i * size);
    xkv_status status = xkv_cache_set_positions(ctx, cache, positions, m->cell_count);
    xkv_release(ctx, positions);
    return status;
}

/* A session names the architecture of its model. */
static xkv_status check_architecture(xkv_ctx *ctx, const xkv_cache *cache, const state *s, const xkv_model *model)
{
    const char *name = (const char *)cache->file.data + s->architecture;
    if (s->engine != XKV_ENGINE_LLAMA_SESSION || !model || model->architecture[0] == '\0')
        return XKV_OK;
    if (strlen(model->architecture) == s->architecture_size &&
        memcmp(name, model->architecture, s->architecture_size) == 0)
        return XKV_OK;
    return xkv_fail(ctx, XKV_ERROR_MISMATCH, "%s: a session of the architecture \"%.*s\", the model's is \"%s\" [LS12]",
                    cache->name, (int)s->architecture_size, name, model->architecture);
}

static xkv_status build_cache(xkv_ctx *ctx, xkv_cache *cache, const state *s, const xkv_model *model)
{
    XKV_TRY(check_architecture(ctx, cache, s, model));
    XKV_TRY(add_layers(ctx, cache, s, model));
    XKV_TRY(add_token_ids(ctx, cache, s));
    return add_positions(ctx, cache, s);
}

/* No form fits: an error where the file is known to be damaged; otherwise it is of a kind that is not known. */
static xkv_status judge_failure(xkv_ctx *ctx, const xkv_cache *cache, const xkv_llama_problem *problem)
{
    if (problem->damaged)
        return xkv_fail(ctx, problem->status, "%s: offset %llu: %s", cache->name, (unsigned long long)problem->offset,
                        problem->detail);
    xkv_logf(ctx, XKV_LOG_WARNING, "%s: offset %llu: %s: carried as opaque bytes", cache->name,
             (unsigned long long)problem->offset, problem->detail);
    return XKV_OK;
}

xkv_status xkv_llama_open(xkv_ctx *ctx, xkv_cache *cache, const xkv_model *model, bool *understood)
{
    const xkv_map *file = &cache->file;
    const uint32_t engine = xkv_llama_engine(file->data, file->size);
    if (engine == XKV_ENGINE_NONE)
        return XKV_OK;
    if (file->size >= 8 && !xkv_llama_knows_version(engine, xkv_load32(file->data + 4))) {
        xkv_logf(ctx, XKV_LOG_WARNING, "%s: state version %u is not known [LS3]: carried as opaque bytes", cache->name,
                 xkv_load32(file->data + 4));
        return XKV_OK;
    }
    state found = {0};
    xkv_llama_problem problem;
    xkv_status status = xkv_llama_walk_file(ctx, file, model, &found, &problem);
    if (status == XKV_OK && problem.status != XKV_OK) {
        status = judge_failure(ctx, cache, &problem);
    } else if (status == XKV_OK) {
        status = build_cache(ctx, cache, &found, model);
        *understood = true;
    }
    xkv_llama_state_free(ctx, &found);
    return status;
}

/* --- Cutting ------------------------------------------------------------------------------------------------------ */

/* Builds the framing of the first `kept` tokens while it follows the whole one. */
typedef struct cutter {
    xkv_framing_builder out;
    const xkv_framing *from;
    const state *s;
    uint64_t offset;         /* in the whole file */
    const uint8_t *literals; /* the next literal byte of `from` */
    uint32_t segment;        /* the next segment of `from` */
    uint32_t total, kept;
    const uint8_t *keep; /* [total] flags by row, or NULL: the first rows */
} cutter;

static xkv_status copy_literal(cutter *c, uint64_t size)
{
    c->literals += size;
    c->offset += size;
    return xkv_framing_add_literal(&c->out, c->literals - size, size);
}

/* Copy what comes before `offset` of the whole file, all of it literal. */
static xkv_status copy_up_to(cutter *c, uint64_t offset)
{
    return copy_literal(c, offset - c->offset);
}

static void skip_literal(cutter *c, uint64_t size)
{
    c->literals += size;
    c->offset += size;
}

static xkv_status replace_u32(cutter *c, uint32_t value)
{
    uint8_t bytes[4];
    xkv_store32(bytes, value);
    skip_literal(c, 4);
    return xkv_framing_add_literal(&c->out, bytes, 4);
}

static xkv_status cut_cells(cutter *c)
{
    const uint64_t size = XKV_LLAMA_CELL + c->s->form.extension;
    for (uint32_t row = 0; row < c->total; row++) {
        if (c->keep ? c->keep[row] : row < c->kept)
            XKV_TRY(copy_literal(c, size));
        else
            skip_literal(c, size);
    }
    return XKV_OK;
}

static xkv_status cut_tensor(cutter *c, const tensor *t)
{
    while (c->from->segments[c->segment].plane_count == 0)
        c->segment++;
    xkv_segment segment = c->from->segments[c->segment++];
    segment.size = segment.size / c->total * c->kept;
    XKV_TRY(copy_up_to(c, t->offset));
    c->offset += t->size;
    return xkv_framing_add_tensor(&c->out, &segment);
}

static xkv_status cut_memory(cutter *c, const memory *m)
{
    XKV_TRY(copy_up_to(c, m->count));
    XKV_TRY(replace_u32(c, c->kept));
    XKV_TRY(cut_cells(c));
    for (uint32_t i = 0; i < m->layer_count; i++)
        XKV_TRY(cut_tensor(c, &m->k[i]));
    for (uint32_t i = 0; m->has_v && i < m->layer_count; i++)
        XKV_TRY(cut_tensor(c, &m->v[i]));
    return copy_up_to(c, m->end); /* the counts of empty streams */
}

static xkv_status cut_token_ids(cutter *c)
{
    const state *s = c->s;
    uint32_t count = s->id_count < c->kept ? s->id_count : c->kept;
    if (s->ids_wrapped) {
        XKV_TRY(copy_up_to(c, s->ids - 4 * XKV_LLAMA_WRAPPING));
        XKV_TRY(replace_u32(c, count + XKV_LLAMA_WRAPPING));
    }
    XKV_TRY(copy_up_to(c, s->ids - 4));
    XKV_TRY(replace_u32(c, count));
    XKV_TRY(copy_literal(c, 4 * (uint64_t)count));
    skip_literal(c, 4 * (uint64_t)(s->id_count - count));
    return XKV_OK;
}

/* The outputs of a session belong to its last tokens: a cut one has none. */
static xkv_status cut_outputs(cutter *c)
{
    static const uint8_t none[4 + 8 + 8];
    if (!c->s->form.outputs)
        return XKV_OK;
    XKV_TRY(copy_up_to(c, c->s->outputs));
    skip_literal(c, c->s->memories[0].begin - c->offset);
    return xkv_framing_add_literal(&c->out, none, sizeof none);
}

static xkv_status cut_all(cutter *c)
{
    const state *s = c->s;
    if (s->engine != XKV_ENGINE_LLAMA_BLOB)
        XKV_TRY(cut_token_ids(c));
    XKV_TRY(cut_outputs(c));
    for (uint32_t i = 0; i < s->memory_count; i++)
        XKV_TRY(cut_memory(c, &s->memories[i]));
    return XKV_OK;
}

/* Why a memory cannot be cut; NULL when it can. */
static const char *memory_reason(const memory *m, uint32_t token_count)
{
    if (!m->used || m->cell_count != token_count)
        return "its cells are not the entry's tokens";
    for (uint32_t i = 0; i < m->layer_count; i++)
        if (!m->k[i].coded || (m->has_v && !m->v[i].coded))
            return "it holds rows that are not packed";
    return NULL;
}

/* Whether every part of the file can be cut. */
static xkv_status check_cut(xkv_ctx *ctx, const xkv_llama_problem *problem, const state *s, const xkv_geometry *g)
{
    if (problem->status != XKV_OK)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "cannot cut: offset %llu of the framing: %s [LS11]",
                        (unsigned long long)problem->offset, problem->detail);
    const char *reason = s->ids_packed                 ? "its token field is not understood"
                         : s->tail == XKV_TAIL_UNKNOWN ? "it holds a part that is not understood"
                                                       : memory_reason(&s->memories[0], g->token_count);
    if (!reason && s->memory_count == 2 && memory_reason(&s->memories[1], g->token_count))
        reason = "the cache of its layers with a window does not hold the same tokens";
    if (reason)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "cannot cut this %s, only restore its whole prefix: %s [LS11]",
                        xkv_engine_name(s->engine), reason);
    return XKV_OK;
}

static xkv_status cut_framing(xkv_ctx *ctx, const xkv_framing *framing, const state *s, uint32_t total, uint32_t kept,
                              xkv_framing *cut)
{
    uint8_t *keep;
    uint32_t *rows;
    XKV_TRY(xkv_framing_cut_rows(ctx, framing, total, kept, &keep, &rows));
    cut->rows = rows;
    cutter c = {.out = {.ctx = ctx},
                .from = framing,
                .s = s,
                .literals = framing->literals,
                .total = total,
                .kept = kept,
                .keep = keep};
    xkv_status status = cut_all(&c);
    if (status == XKV_OK)
        xkv_framing_take(&c.out, s->engine, cut);
    xkv_framing_builder_free(&c.out);
    xkv_release(ctx, keep);
    return status;
}

xkv_status xkv_llama_first(xkv_ctx *ctx, const xkv_framing *framing, const xkv_geometry *geometry, uint32_t token_count,
                           xkv_framing *cut)
{
    state found = {0};
    xkv_llama_problem problem;
    xkv_status status;
    XKV_TRY_GOTO(xkv_llama_walk_framing(ctx, framing, &found, &problem), out);
    XKV_TRY_GOTO(check_cut(ctx, &problem, &found, geometry), out);
    status = cut_framing(ctx, framing, &found, geometry->token_count, token_count, cut);
out:
    xkv_llama_state_free(ctx, &found);
    return status;
}
