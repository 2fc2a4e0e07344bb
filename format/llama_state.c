/*
 * llama_state.c - llama.cpp sequence files (spec/engines.md, sections 1 to 3).
 *
 * The format has no lengths and changed without new version numbers, so a file is walked once for each form it may
 * have; the walk that arrives exactly at the end of the file, or at a server's checkpoint tail, is the right one.
 * Walks read literal bytes and step over tensors, so the same walk serves a file and a framing without its tensors.
 */
#include "engine_file.h"

#include <stdarg.h>
#include <stdio.h>

#define MAGIC_SEQUENCE 0x67677371u
#define MAGIC_SCKP     0x504b4353u
#define MAX_STREAMS    1024u /* the engine allows 256 sequences */
#define MAX_TYPE       64u   /* above the highest ggml_type */

/* Lengths of the heads of tensors: {i32 type, u64 row} and, transposed, {i32 type, u32 element, u32 width}. */
#define TENSOR_HEAD 12u
#define CELL        12u /* {i32 pos, u32 n_seq_id = 1, i32 seq_id} without extension */

typedef enum stage { STAGE_HEAD, STAGE_DATA, STAGE_TAIL } stage;
typedef enum tail { TAIL_NONE, TAIL_CHECKPOINTS, TAIL_UNKNOWN } tail;

typedef struct form {
    bool streams;       /* the state begins with n_stream */
    uint32_t extension; /* bytes a cell has between n_seq_id and seq_id */
} form;

/* The rows of one layer's K or V. */
typedef struct tensor {
    uint64_t head, offset, size; /* of {type, ...} and of the rows, in the file */
    uint32_t width;              /* elements */
    uint32_t dtype;              /* xkv_dtype, if `coded` */
    bool coded;                  /* false: of a type that is not packed, carried as literal bytes */
} tensor;

/* What a walk found. */
typedef struct state {
    form form;
    uint32_t version, id_count, stream_count, cell_count, v_trans, layer_count, rot_k;
    uint64_t ids, begin, count, cells; /* offsets: token ids, memory state, cell_count of the used stream, its cells */
    bool ids_packed;                   /* the token field is not a list of ids */
    bool has_v;
    tensor *k, *v; /* [layer_count] */
    uint64_t end;  /* of the memory state */
    tail tail;
    bool used; /* a stream with cells was found */
} state;

typedef struct walk {
    xkv_ctx *ctx;
    const uint8_t *literals; /* the next literal byte */
    const xkv_segment *segments, *segments_end;
    uint64_t run; /* literal bytes before the next tensor */
    uint64_t offset, size;
    xkv_status status;
    stage stage;
    uint64_t failed_at;
    char detail[160];
} walk;

/* --- Walking ------------------------------------------------------------------------------------------------------ */

static void next_run(walk *w)
{
    w->run = 0;
    for (; w->segments < w->segments_end && w->segments->plane_count == 0; w->segments++)
        w->run += w->segments->size;
}

static void walk_file(walk *w, xkv_ctx *ctx, const xkv_map *file)
{
    *w = (walk){.ctx = ctx, .literals = file->data, .run = file->size, .size = file->size};
}

static void walk_framing(walk *w, xkv_ctx *ctx, const xkv_framing *f)
{
    *w = (walk){.ctx = ctx,
                .literals = f->literals,
                .segments = f->segments,
                .segments_end = f->segments + f->segment_count,
                .size = f->source_size};
    next_run(w);
}

static XKV_PRINTF(3, 4) bool give_up(walk *w, xkv_status status, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(w->detail, sizeof w->detail, fmt, args);
    va_end(args);
    w->status = status;
    w->failed_at = w->offset;
    return false;
}

static uint64_t left(const walk *w)
{
    return w->size - w->offset;
}

/* The next `n` literal bytes, or NULL. */
static const uint8_t *take(walk *w, uint64_t n, const char *field)
{
    if (n > left(w)) {
        give_up(w, XKV_ERROR_TRUNCATED, "field \"%s\" needs %llu bytes, %llu are left [LS2]", field,
                (unsigned long long)n, (unsigned long long)left(w));
        return NULL;
    }
    if (n > w->run) {
        give_up(w, XKV_ERROR_CORRUPT, "field \"%s\" lies in a tensor [LS2]", field);
        return NULL;
    }
    const uint8_t *bytes = w->literals;
    w->literals += n;
    w->run -= n;
    w->offset += n;
    return bytes;
}

static bool take_u32(walk *w, const char *field, uint32_t *value)
{
    const uint8_t *p = take(w, 4, field);
    if (p)
        *value = xkv_load32(p);
    return p != NULL;
}

/* Step over the rows of a tensor: in a file they are bytes like all others, in a framing a segment, or literal. */
static bool step_over(walk *w, uint64_t n, const char *field)
{
    if (w->run > 0 || w->segments == w->segments_end)
        return n == 0 || take(w, n, field) != NULL;
    if (n != w->segments->size)
        return give_up(w, XKV_ERROR_CORRUPT, "%s has %llu bytes, its segment %llu [LS2]", field, (unsigned long long)n,
                       (unsigned long long)w->segments->size);
    w->segments++;
    w->offset += n;
    next_run(w);
    return true;
}

/* --- Parts of the file -------------------------------------------------------------------------------------------- */

static bool walk_head(walk *w, state *s)
{
    uint32_t magic;
    if (!take_u32(w, "magic", &magic) || !take_u32(w, "version", &s->version) ||
        !take_u32(w, "n_token_count", &s->id_count))
        return false;
    s->ids = w->offset;
    const uint8_t *ids = take(w, 4 * (uint64_t)s->id_count, "tokens");
    s->ids_packed = ids && s->id_count > 0 && xkv_load32(ids) == UINT32_MAX;
    s->begin = w->offset;
    return ids != NULL;
}

static bool walk_cells(walk *w, state *s)
{
    s->cells = w->offset;
    for (uint32_t i = 0; i < s->cell_count; i++) {
        const uint8_t *cell = take(w, CELL + s->form.extension, "cell");
        if (!cell)
            return false;
        if (xkv_load32(cell) > INT32_MAX || xkv_load32(cell + 4) != 1)
            return give_up(w, XKV_ERROR_CORRUPT, "cell %u: pos %d with %u sequences, expected pos >= 0 with 1 [LS5]", i,
                           (int32_t)xkv_load32(cell), xkv_load32(cell + 4));
    }
    return true;
}

/* Fill `t` from a ggml type and the bytes of a row; the walk stands behind the head. */
static bool describe_tensor(walk *w, tensor *t, uint32_t type, uint64_t row, const char *field)
{
    /* types that planes have, by ggml_type */
    static const struct {
        uint32_t type, dtype;
    } coded[] = {{0, XKV_F32}, {1, XKV_F16}, {2, XKV_Q4_0}, {8, XKV_Q8_0}, {30, XKV_BF16}};
    if (type >= MAX_TYPE || row == 0)
        return give_up(w, XKV_ERROR_CORRUPT, "%s: type %u with rows of %llu bytes [LS7]", field, type,
                       (unsigned long long)row);
    for (size_t i = 0; i < sizeof coded / sizeof *coded; i++) {
        uint64_t size = xkv_dtype_size(coded[i].dtype), block = xkv_dtype_block(coded[i].dtype);
        if (coded[i].type != type)
            continue;
        if (row % size != 0 || row / size > XKV_MAX_WIDTH / block)
            return give_up(w, XKV_ERROR_CORRUPT, "%s: rows of %llu bytes of type %u [LS7]", field,
                           (unsigned long long)row, type);
        t->dtype = coded[i].dtype;
        t->width = (uint32_t)(row / size * block);
        t->coded = true;
    }
    return true;
}

/* One layer's K or V: head and rows. */
static bool walk_tensor(walk *w, const state *s, tensor *t, bool transposed, const char *field)
{
    t->head = w->offset;
    const uint8_t *head = take(w, TENSOR_HEAD, field);
    if (!head)
        return false;
    uint64_t row = xkv_load64(head + 4);
    if (transposed && !xkv_mul64(xkv_load32(head + 4), xkv_load32(head + 8), &row))
        return false; /* cannot happen: 32-bit factors */
    if (!describe_tensor(w, t, xkv_load32(head), row, field))
        return false;
    t->coded = t->coded && !(transposed && xkv_dtype_block(t->dtype) > 1); /* no engine transposes blocks */
    if (transposed && t->coded && xkv_load32(head + 4) != xkv_dtype_size(t->dtype))
        return give_up(w, XKV_ERROR_CORRUPT, "%s: v_size_el %u with type %u [LS7]", field, xkv_load32(head + 4),
                       xkv_load32(head));
    if (!xkv_mul64(row, s->cell_count, &t->size))
        return give_up(w, XKV_ERROR_CORRUPT, "%s: rows of %llu bytes [LS7]", field, (unsigned long long)row);
    t->offset = w->offset;
    t->coded = t->coded && (w->run == 0 || !w->segments_end); /* a framing may hold it as literal bytes */
    return step_over(w, t->size, field);
}

static bool walk_tensors(walk *w, const state *s, tensor *tensors, char kind, bool transposed)
{
    for (uint32_t i = 0; i < s->layer_count; i++) {
        char field[48];
        snprintf(field, sizeof field, "%c of layer %u", kind, i);
        if (!walk_tensor(w, s, &tensors[i], transposed, field))
            return false;
    }
    return true;
}

/* Whether the walk stands at the bytes `magic`, or at a piece of them that ends the file. */
static bool at_checkpoints(const walk *w)
{
    uint8_t magic[4];
    xkv_store32(magic, MAGIC_SCKP);
    uint64_t n = xkv_min64(4, left(w));
    return n > 0 && n <= w->run && memcmp(w->literals, magic, (size_t)n) == 0;
}

/* Whether a second memory follows: it starts as the first did, with the same streams, cell count and first cell. */
static bool at_second_memory(const walk *w, const uint8_t *first)
{
    const uint64_t n = 4 + 4 + CELL;
    return n <= w->run && memcmp(w->literals, first, (size_t)n) == 0;
}

/* V is there unless the state ends with K, as it does for MLA; nothing in the file says which. Where more follows, it
 * is the next memory if it looks like one, or if the model caches latents and what follows cannot be V. */
static bool walk_v(walk *w, state *s, const uint8_t *memory, const xkv_model *model)
{
    bool k_only = left(w) == 0 || at_checkpoints(w) || (s->form.streams && at_second_memory(w, memory));
    if (k_only)
        return true;
    walk behind_k = *w;
    s->has_v = walk_tensors(w, s, s->v, 'V', s->v_trans == 1);
    if (s->has_v || !model || model->latent_dim == 0)
        return s->has_v;
    *w = behind_k;
    return true;
}

static bool walk_data(walk *w, state *s, const uint8_t *memory, const xkv_model *model)
{
    uint32_t rot_v = 0;
    if (!take_u32(w, "v_trans", &s->v_trans))
        return false;
    if (s->v_trans > 1)
        return give_up(w, XKV_ERROR_CORRUPT, "v_trans is %u, expected 0 or 1 [LS6]", s->v_trans);
    if (!take_u32(w, "n_layer", &s->layer_count))
        return false;
    if (s->layer_count == 0 || s->layer_count > XKV_MAX_LAYERS)
        return give_up(w, XKV_ERROR_CORRUPT, "n_layer is %u, expected 1 to %u [LS6]", s->layer_count, XKV_MAX_LAYERS);
    w->stage = STAGE_DATA;
    if (s->version >= 4 && (!take_u32(w, "n_rot_k", &s->rot_k) || !take_u32(w, "n_rot_v", &rot_v)))
        return false;
    if ((uint64_t)s->layer_count * TENSOR_HEAD > left(w))
        return give_up(w, XKV_ERROR_TRUNCATED, "n_layer is %u, only %llu bytes are left [LS2]", s->layer_count,
                       (unsigned long long)left(w));
    w->status = XKV_NEW_ZERO(w->ctx, s->layer_count, &s->k);
    if (w->status == XKV_OK)
        w->status = XKV_NEW_ZERO(w->ctx, s->layer_count, &s->v);
    return w->status == XKV_OK && walk_tensors(w, s, s->k, 'K', false) && walk_v(w, s, memory, model);
}

/* The streams of the first memory; exactly one may have cells. */
static bool walk_memory(walk *w, state *s, const xkv_model *model)
{
    const uint8_t *memory = w->literals;
    s->stream_count = 1;
    if (s->form.streams && !take_u32(w, "n_stream", &s->stream_count))
        return false;
    if (s->stream_count == 0 || s->stream_count > MAX_STREAMS)
        return give_up(w, XKV_ERROR_CORRUPT, "n_stream is %u [LS4]", s->stream_count);
    for (uint32_t i = 0; i < s->stream_count; i++) {
        uint64_t at = w->offset;
        uint32_t cell_count;
        if (!take_u32(w, "cell_count", &cell_count))
            return false;
        /* the old form writes the heads of its tensors even when there is no cell */
        if (cell_count == 0 && (s->form.streams || left(w) == 0))
            continue;
        if (s->used || cell_count > XKV_MAX_TOKENS)
            return give_up(w, XKV_ERROR_CORRUPT, "stream %u has %u cells [LS4]", i, cell_count);
        s->used = true;
        s->count = at;
        s->cell_count = cell_count;
        if (!walk_cells(w, s) || !walk_data(w, s, memory, model))
            return false;
    }
    if (!s->used && left(w) > 0 && !at_checkpoints(w))
        return give_up(w, XKV_ERROR_CORRUPT, "bytes follow, but no stream has cells [LS4]");
    return true;
}

/* A server's checkpoints: false when they are damaged; *well_formed: they end where the file does. */
static bool walk_checkpoints(walk *w, bool *well_formed)
{
    const uint8_t *head = take(w, 12, "checkpoints");
    if (!head)
        return false;
    if (xkv_load32(head + 4) != 1)
        return true;
    for (uint32_t i = 0; i < xkv_load32(head + 8); i++) {
        if (!take(w, 16, "checkpoint"))
            return false;
        for (int part = 0; part < 3; part++) {
            const uint8_t *length = take(w, 8, "checkpoint length");
            if (!length || !take(w, xkv_load64(length), "checkpoint data"))
                return false;
        }
    }
    *well_formed = left(w) == 0;
    return true;
}

static bool walk_tail(walk *w, state *s)
{
    w->stage = STAGE_TAIL;
    s->end = w->offset;
    bool well_formed = false;
    if (at_checkpoints(w) && !walk_checkpoints(w, &well_formed))
        return false;
    s->tail = s->end == w->size ? TAIL_NONE : well_formed ? TAIL_CHECKPOINTS : TAIL_UNKNOWN;
    return true;
}

static bool walk_all(walk *w, state *s, const xkv_model *model)
{
    return walk_head(w, s) && walk_memory(w, s, model) && walk_tail(w, s);
}

/* --- Choosing the form -------------------------------------------------------------------------------------------- */

static void state_free(xkv_ctx *ctx, state *s)
{
    xkv_release(ctx, s->k);
    xkv_release(ctx, s->v);
    *s = (state){0};
}

/* Whether outcome a is better than b: a walk that ends exactly, then one before checkpoints, then one before bytes that
 * are not understood, then the one that came farthest, running out of bytes being farther than a contradiction. */
static bool better(const walk *a, const state *sa, const walk *b, const state *sb)
{
    if ((a->status == XKV_OK) != (b->status == XKV_OK))
        return a->status == XKV_OK;
    if (a->status == XKV_OK)
        return sa->tail < sb->tail;
    if (a->stage != b->stage)
        return a->stage > b->stage;
    uint64_t end_a = a->status == XKV_ERROR_TRUNCATED ? UINT64_MAX : a->failed_at;
    uint64_t end_b = b->status == XKV_ERROR_TRUNCATED ? UINT64_MAX : b->failed_at;
    return end_a > end_b;
}

/* Walk from `start` in every form; *best and *found are those of the best one. */
static xkv_status walk_forms(const walk *start, const xkv_model *model, uint32_t version, walk *best, state *found)
{
    const uint32_t extension = version == 2 ? 8 : 12;
    const form forms[] = {{true, 0}, {true, extension}, {false, 0}, {false, extension}};
    const size_t count = version == 2 ? 4 : 2; /* n_stream came before version 3 */
    for (size_t i = 0; i < count; i++) {
        walk w = *start;
        state s = {.form = forms[i]};
        if (!walk_all(&w, &s, model) && w.status >= XKV_ERROR_LIMIT) {
            state_free(w.ctx, &s);
            return w.status; /* memory, reported where it happened */
        }
        if (i > 0 && !better(&w, &s, best, found)) {
            state_free(w.ctx, &s);
            continue;
        }
        state_free(w.ctx, found);
        *best = w;
        *found = s;
    }
    return XKV_OK;
}

/* --- From a walk to a cache --------------------------------------------------------------------------------------- */

/* Whether K is as RoPE left it, so that it can be undone. Not when a token has positions of several parts (M-RoPE), nor
 * behind a Hadamard rotation, which engines apply to quantized rows whose head_dim is a multiple of 64; of that, files
 * before version 4 do not tell. */
static bool can_unrotate(const state *s, const xkv_plane *plane)
{
    if (s->rot_k != 0 || s->form.extension != 0)
        return false;
    return s->version >= 4 || xkv_dtype_block(plane->dtype) == 1 || plane->head_dim % 64 != 0;
}

/* Whether a K row is stored as two planes, a latent beside a rotated part, none of which splits a block. */
static bool holds_latent(const tensor *t, const xkv_model *model)
{
    return model && model->latent_dim > 0 && model->latent_dim < t->width &&
           model->latent_dim % xkv_dtype_block(t->dtype) == 0;
}

/* Planes of one layer's K: one, or two where a row is a latent beside a rotated part. */
static xkv_status add_k(xkv_ctx *ctx, const xkv_cache *cache, const state *s, const tensor *t, const xkv_model *model,
                        xkv_plane plane, xkv_plane *planes, uint32_t *count)
{
    plane.kind = XKV_PLANE_K;
    plane.dtype = t->dtype;
    XKV_TRY(xkv_model_fit_plane(ctx, cache->name, model, t->width, &plane));
    if (!holds_latent(t, model)) {
        if (!can_unrotate(s, &plane))
            plane.rope = XKV_NO_ROPE;
        planes[(*count)++] = plane;
        return XKV_OK;
    }
    plane.rope = XKV_NO_ROPE;
    plane.heads = 1;
    plane.kind = XKV_PLANE_LATENT;
    plane.head_dim = model->latent_dim;
    planes[(*count)++] = plane;
    plane.kind = XKV_PLANE_K_ROPE;
    plane.head_dim = t->width - model->latent_dim;
    planes[(*count)++] = plane;
    return XKV_OK;
}

/* The model, if the file's layers can be told from it; NULL otherwise. MISMATCH for a plain file of another model. */
static xkv_status match_layers(xkv_ctx *ctx, const xkv_cache *cache, const state *s, const xkv_model **model)
{
    if (!*model || s->cell_count == 0)
        return XKV_OK;
    uint32_t cached = xkv_model_cached_layers(*model, NULL);
    if (cached == s->layer_count)
        return XKV_OK;
    if (s->tail != TAIL_UNKNOWN)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "%s: the file has %u layers, the model caches %u [LS9]", cache->name,
                        s->layer_count, cached);
    xkv_logf(ctx, XKV_LOG_WARNING,
             "%s: several memories, %u layers in the first: the model (%u layers) is not used for it", cache->name,
             s->layer_count, cached);
    *model = NULL;
    return XKV_OK;
}

/* Planes in order of layer and kind. k_first, v_plane [layer_count]: where a layer's are. */
static xkv_status add_planes(xkv_ctx *ctx, xkv_cache *cache, const state *s, const xkv_model *model, uint32_t *k_first,
                             uint32_t *v_plane, uint32_t *layers)
{
    xkv_plane *planes;
    XKV_TRY(XKV_NEW(ctx, (size_t)s->layer_count * 3, &planes));
    cache->geometry.planes = planes;
    uint32_t count = 0;
    for (uint32_t i = 0; i < s->layer_count; i++) {
        xkv_plane plane = {.layer = model ? layers[i] : i, .rope = XKV_NO_ROPE};
        uint32_t first = count;
        k_first[i] = first;
        if (s->k[i].coded)
            XKV_TRY(add_k(ctx, cache, s, &s->k[i], model, plane, planes, &count));
        if (s->has_v && s->v[i].coded) {
            plane.kind = XKV_PLANE_V;
            plane.dtype = s->v[i].dtype;
            XKV_TRY(xkv_model_fit_plane(ctx, cache->name, model, s->v[i].width, &plane));
            v_plane[i] = count;
            if (count - first == 2) { /* V comes before latent and K-rope */
                memmove(&planes[first + 1], &planes[first], 2 * sizeof *planes);
                v_plane[i] = first;
                k_first[i] = first + 1;
            }
            planes[v_plane[i]] = plane;
            count++;
        }
    }
    cache->geometry.plane_count = count;
    cache->geometry.layer_count = model ? model->layer_count : s->layer_count;
    return XKV_OK;
}

/* Say so when only the missing word about Hadamard rotations keeps K from being un-rotated. */
static void warn_of_rotation(xkv_ctx *ctx, const xkv_cache *cache, const state *s, uint32_t k_first)
{
    const xkv_plane *k = &cache->geometry.planes[k_first];
    state known = *s;
    known.version = 4;
    if (s->k[0].coded && k->kind == XKV_PLANE_K && can_unrotate(&known, k) && !can_unrotate(s, k))
        xkv_logf(ctx, XKV_LOG_WARNING,
                 "%s: K is %s, and version %u does not tell whether the engine rotated it by a Hadamard matrix: RoPE "
                 "is not undone",
                 cache->name, xkv_dtype_name(k->dtype), s->version);
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

static uint32_t k_layout(const state *s, const xkv_model *model)
{
    /* engines that cached V beside the latent put the rotated part first */
    bool latent_first = model && model->latent_first && !s->has_v;
    return latent_first ? XKV_LAYOUT_TOKEN_MAJOR : XKV_LAYOUT_REVERSED;
}

static xkv_status add_segments(xkv_framing_builder *b, const xkv_cache *cache, const state *s, const xkv_model *model,
                               const uint32_t *k_first, const uint32_t *v_plane)
{
    const xkv_plane *planes = cache->geometry.planes;
    for (uint32_t i = 0; i < s->layer_count; i++) {
        bool latent = s->k[i].coded && planes[k_first[i]].kind == XKV_PLANE_LATENT;
        xkv_segment k = {.first_plane = k_first[i],
                         .plane_count = latent ? 2 : 1,
                         .layout = latent ? k_layout(s, model) : XKV_LAYOUT_TOKEN_MAJOR};
        XKV_TRY(add_tensor(b, &cache->file, &s->k[i], k));
    }
    for (uint32_t i = 0; s->has_v && i < s->layer_count; i++) {
        xkv_segment v = {.first_plane = v_plane[i],
                         .plane_count = 1,
                         .layout = s->v_trans ? XKV_LAYOUT_DIM_MAJOR : XKV_LAYOUT_TOKEN_MAJOR};
        XKV_TRY(add_tensor(b, &cache->file, &s->v[i], v));
    }
    return xkv_framing_add_literal(b, cache->file.data + b->source_size, cache->file.size - b->source_size);
}

/* Planes and segments; a cache without cells has neither planes nor tensors. */
static xkv_status add_layers(xkv_ctx *ctx, xkv_cache *cache, const state *s, const xkv_model *model)
{
    xkv_framing_builder b = {.ctx = ctx};
    uint32_t *index = NULL, layers = s->cell_count > 0 ? s->layer_count : 0;
    state cut = *s;
    cut.layer_count = layers;
    xkv_status status = match_layers(ctx, cache, s, &model);
    if (status != XKV_OK)
        return status;
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, (size_t)layers * 2 + (model ? model->layer_count : 0), &index), out);
    if (model)
        xkv_model_cached_layers(model, index + 2 * (size_t)layers);
    XKV_TRY_GOTO(add_planes(ctx, cache, &cut, model, index, index + layers, index + 2 * (size_t)layers), out);
    if (model && layers > 0)
        warn_of_rotation(ctx, cache, s, index[0]);
    XKV_TRY_GOTO(add_segments(&b, cache, &cut, model, index, index + layers), out);
    xkv_framing_take(&b, XKV_ENGINE_LLAMA_SEQUENCE, &cache->framing);
    if (model)
        status = xkv_cache_set_ropes(ctx, cache, model->ropes, model->rope_count);
out:
    xkv_framing_builder_free(&b);
    xkv_release(ctx, index);
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
    int32_t *positions;
    XKV_TRY(XKV_NEW(ctx, s->cell_count, &positions));
    for (uint32_t i = 0; i < s->cell_count; i++)
        positions[i] = (int32_t)xkv_load32(cache->file.data + s->cells + (uint64_t)i * (CELL + s->form.extension));
    xkv_status status = xkv_cache_set_positions(ctx, cache, positions, s->cell_count);
    xkv_release(ctx, positions);
    return status;
}

static xkv_status build_cache(xkv_ctx *ctx, xkv_cache *cache, const state *s, const xkv_model *model)
{
    XKV_TRY(add_layers(ctx, cache, s, model));
    XKV_TRY(add_token_ids(ctx, cache, s));
    return add_positions(ctx, cache, s);
}

/* A walk that failed: an error where the file is known to be damaged; otherwise the form is not known. */
static xkv_status judge_failure(xkv_ctx *ctx, const xkv_cache *cache, const walk *w)
{
    if (w->status == XKV_ERROR_TRUNCATED || w->stage >= STAGE_DATA)
        return xkv_fail(ctx, w->status, "%s: offset %llu: %s", cache->name, (unsigned long long)w->failed_at,
                        w->detail);
    xkv_logf(ctx, XKV_LOG_WARNING, "%s: offset %llu: %s: carried as opaque bytes", cache->name,
             (unsigned long long)w->failed_at, w->detail);
    return XKV_OK;
}

xkv_status xkv_llama_open(xkv_ctx *ctx, xkv_cache *cache, const xkv_model *model, bool *understood)
{
    const xkv_map *file = &cache->file;
    if (file->size < 4 || xkv_load32(file->data) != MAGIC_SEQUENCE)
        return XKV_OK;
    uint32_t version = file->size < 8 ? 2 : xkv_load32(file->data + 4);
    if (version < 2 || version > 4) {
        xkv_logf(ctx, XKV_LOG_WARNING, "%s: state version %u is not known [LS3]: carried as opaque bytes", cache->name,
                 version);
        return XKV_OK;
    }
    walk start, best = {0};
    state found = {0};
    walk_file(&start, ctx, file);
    xkv_status status = walk_forms(&start, model, version, &best, &found);
    if (status == XKV_OK && best.status != XKV_OK) {
        status = judge_failure(ctx, cache, &best);
    } else if (status == XKV_OK) {
        status = build_cache(ctx, cache, &found, model);
        *understood = true;
    }
    state_free(ctx, &found);
    return status;
}

/* --- Cutting ------------------------------------------------------------------------------------------------------ */

/* Builds the framing of the first `kept` tokens while it follows the whole one. */
typedef struct cutter {
    xkv_framing_builder out;
    const xkv_framing *from;
    const state *s;
    const uint8_t *literals; /* the next literal byte of `from` */
    uint32_t segment;        /* the next segment of `from` */
    uint32_t total, kept;
    const uint8_t *keep; /* [total] flags by row, or NULL: the first rows */
} cutter;

static xkv_status copy_literal(cutter *c, uint64_t size)
{
    c->literals += size;
    return xkv_framing_add_literal(&c->out, c->literals - size, size);
}

static xkv_status replace_u32(cutter *c, uint32_t value)
{
    uint8_t bytes[4];
    xkv_store32(bytes, value);
    c->literals += 4;
    return xkv_framing_add_literal(&c->out, bytes, 4);
}

static xkv_status cut_cells(cutter *c)
{
    const uint64_t size = CELL + c->s->form.extension;
    for (uint32_t row = 0; row < c->total; row++) {
        if (c->keep ? c->keep[row] : row < c->kept)
            XKV_TRY(copy_literal(c, size));
        else
            c->literals += size;
    }
    return XKV_OK;
}

static xkv_status cut_tensor(cutter *c)
{
    while (c->from->segments[c->segment].plane_count == 0)
        c->segment++;
    xkv_segment segment = c->from->segments[c->segment++];
    segment.size = segment.size / c->total * c->kept;
    XKV_TRY(copy_literal(c, TENSOR_HEAD));
    return xkv_framing_add_tensor(&c->out, &segment);
}

static xkv_status cut_all(cutter *c)
{
    const state *s = c->s;
    uint32_t id_count = s->id_count < c->kept ? s->id_count : c->kept;
    XKV_TRY(copy_literal(c, 8)); /* magic, version */
    XKV_TRY(replace_u32(c, id_count));
    XKV_TRY(copy_literal(c, 4 * (uint64_t)id_count));
    c->literals += 4 * (uint64_t)(s->id_count - id_count);
    XKV_TRY(copy_literal(c, s->count - s->begin));
    XKV_TRY(replace_u32(c, c->kept));
    XKV_TRY(cut_cells(c));
    XKV_TRY(copy_literal(c, s->k[0].head - s->cells - c->total * (uint64_t)(CELL + s->form.extension)));
    for (uint32_t i = 0; i < s->layer_count * (s->has_v ? 2 : 1); i++)
        XKV_TRY(cut_tensor(c));
    const tensor *last = s->has_v ? &s->v[s->layer_count - 1] : &s->k[s->layer_count - 1];
    return copy_literal(c, s->end - last->offset - last->size); /* the counts of empty streams */
}

/* Whether every part of the file can be cut. */
static xkv_status check_cut(xkv_ctx *ctx, const walk *w, const state *s, const xkv_geometry *g)
{
    if (w->status != XKV_OK)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "cannot cut: offset %llu of the framing: %s [LS11]",
                        (unsigned long long)w->failed_at, w->detail);
    const char *reason = s->ids_packed                     ? "its token field is packed"
                         : s->tail == TAIL_UNKNOWN         ? "it holds a part that is not understood"
                         : s->cell_count != g->token_count ? "its cells are not the entry's tokens"
                                                           : NULL;
    for (uint32_t i = 0; i < s->layer_count; i++)
        if (!s->k[i].coded || (s->has_v && !s->v[i].coded))
            reason = "it holds rows that are not packed";
    if (reason)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "cannot cut this llama.cpp sequence: %s [LS11]", reason);
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
        xkv_framing_take(&c.out, XKV_ENGINE_LLAMA_SEQUENCE, cut);
    xkv_framing_builder_free(&c.out);
    xkv_release(ctx, keep);
    return status;
}

xkv_status xkv_llama_first(xkv_ctx *ctx, const xkv_framing *framing, const xkv_geometry *geometry, uint32_t token_count,
                           xkv_framing *cut)
{
    walk start, best = {0};
    state found = {0};
    walk_framing(&start, ctx, framing);
    if (start.run < 12)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "cannot cut: the framing has no head [LS11]");
    xkv_status status;
    XKV_TRY_GOTO(walk_forms(&start, NULL, xkv_load32(framing->literals + 4), &best, &found), out);
    XKV_TRY_GOTO(check_cut(ctx, &best, &found, geometry), out);
    status = cut_framing(ctx, framing, &found, geometry->token_count, token_count, cut);
out:
    state_free(ctx, &found);
    return status;
}
