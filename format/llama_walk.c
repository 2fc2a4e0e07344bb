/*
 * llama_walk.c - the layout of llama.cpp state files: sequence files, session files and blobs of sequences
 * (spec/engines.md, section 1).
 *
 * The format has no lengths and changed without new version numbers, so a file is walked once for each form it may
 * have; the walk that arrives exactly at the end of the file, or at a server's checkpoint tail, is the right one.
 * Walks read literal bytes and step over tensors, so the same walk serves a file and a framing without its tensors.
 */
#include "llama_walk.h"

#include <stdarg.h>
#include <stdio.h>

#define MAGIC_SEQUENCE   0x67677371u
#define MAGIC_SESSION    0x6767736eu
#define MAGIC_BLOB       0xaf143cd8u
#define MAGIC_SCKP       0x504b4353u
#define MAX_STREAMS      1024u      /* the engine allows 256 sequences */
#define MAX_TYPE         64u        /* above the highest ggml_type */
#define MAX_ARCHITECTURE 256u       /* bytes of a session's architecture string */
#define MAX_OUTPUT       (1u << 20) /* numbers of one output: the size of a vocabulary */
#define FORM_COUNT       5

typedef enum stage { STAGE_HEAD, STAGE_DATA, STAGE_TAIL } stage;

typedef xkv_llama_form form;
typedef xkv_llama_tensor tensor;
typedef xkv_llama_memory memory;
typedef xkv_llama_state state;

typedef struct walk {
    xkv_ctx *ctx;
    const uint8_t *literals; /* the next literal byte */
    const xkv_segment *segments, *segments_end;
    uint64_t run;          /* literal bytes before the next tensor */
    uint32_t streams_left; /* behind the present one of the memory */
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

/* A server's token field: unwrapped where it has no media, else it is not understood. */
static void unwrap_token_ids(state *s, const uint8_t *words)
{
    const uint32_t ids = s->id_count - XKV_LLAMA_WRAPPING;
    s->ids_wrapped = s->id_count >= XKV_LLAMA_WRAPPING && xkv_load32(words + 4) == 1 && xkv_load32(words + 8) == ids &&
                     xkv_load32(words + 12 + 4 * (uint64_t)ids) == 0;
    s->ids_packed = !s->ids_wrapped;
    if (s->ids_wrapped) {
        s->ids += 12;
        s->id_count = ids;
    }
}

static bool walk_token_ids(walk *w, state *s)
{
    if (!take_u32(w, "version", &s->version) || !take_u32(w, "n_token_count", &s->id_count))
        return false;
    s->ids = w->offset;
    const uint8_t *ids = take(w, 4 * (uint64_t)s->id_count, "tokens");
    if (ids && s->id_count > 0 && xkv_load32(ids) == UINT32_MAX)
        unwrap_token_ids(s, ids);
    return ids != NULL;
}

static bool walk_architecture(walk *w, state *s)
{
    if (!take_u32(w, "architecture length", &s->architecture_size))
        return false;
    if (s->architecture_size > MAX_ARCHITECTURE)
        return give_up(w, XKV_ERROR_CORRUPT, "the architecture's name has %u bytes, expected at most %u [LS12]",
                       s->architecture_size, MAX_ARCHITECTURE);
    s->architecture = w->offset;
    return take(w, s->architecture_size, "architecture") != NULL;
}

/* Numbers of the outputs: logits or embeddings. Where the form is wrong, their count is beyond any vocabulary. */
static bool walk_output_numbers(walk *w, uint32_t outputs, const char *field)
{
    const uint8_t *count = take(w, 8, field);
    if (!count)
        return false;
    if (xkv_load64(count) > (uint64_t)outputs * MAX_OUTPUT)
        return give_up(w, XKV_ERROR_CORRUPT, "%s is %llu with %u outputs [LS13]", field,
                       (unsigned long long)xkv_load64(count), outputs);
    return take(w, 4 * xkv_load64(count), field) != NULL;
}

static bool walk_outputs(walk *w)
{
    uint32_t count;
    return take_u32(w, "n_outputs", &count) && take(w, 4 * (uint64_t)count, "output positions") &&
           walk_output_numbers(w, count, "n_logits") && walk_output_numbers(w, count, "n_embd");
}

/* All that comes before the memory. */
static bool walk_head(walk *w, state *s)
{
    uint32_t magic, sequence;
    if (!take_u32(w, "magic", &magic))
        return false;
    if (s->engine == XKV_ENGINE_LLAMA_BLOB) {
        s->outputs = w->offset + 4;
        return take_u32(w, "seq_id", &sequence);
    }
    if (!walk_token_ids(w, s) || (s->engine == XKV_ENGINE_LLAMA_SESSION && !walk_architecture(w, s)))
        return false;
    s->outputs = w->offset;
    return !s->form.outputs || walk_outputs(w);
}

/* Whether the position of a token has parts that differ. The extension of a cell begins with two of them, which are 0
 * where the engine was given text. */
static bool has_several_positions(const form *f, const uint8_t *cell)
{
    uint32_t pos = xkv_load32(cell), x = f->extension ? xkv_load32(cell + 8) : 0;
    uint32_t y = f->extension ? xkv_load32(cell + 12) : 0;
    return (x != 0 || y != 0) && (x != pos || y != pos);
}

/* The cells of a stream. A session names their sequences, of which there must be one. */
static bool walk_cells(walk *w, const state *s, memory *m)
{
    const uint32_t id = 8 + s->form.extension;
    const uint8_t *first = w->literals;
    m->cells = w->offset;
    for (uint32_t i = 0; i < m->cell_count; i++) {
        const uint8_t *cell = take(w, XKV_LLAMA_CELL + s->form.extension, "cell");
        if (!cell)
            return false;
        if (xkv_load32(cell) > INT32_MAX || xkv_load32(cell + 4) != 1)
            return give_up(w, XKV_ERROR_CORRUPT, "cell %u: pos %d with %u sequences, expected pos >= 0 with 1 [LS5]", i,
                           (int32_t)xkv_load32(cell), xkv_load32(cell + 4));
        if (s->engine == XKV_ENGINE_LLAMA_SESSION && xkv_load32(cell + id) != xkv_load32(first + id))
            return give_up(w, XKV_ERROR_CORRUPT, "cell %u is of sequence %d, the first of %d [LS5]", i,
                           (int32_t)xkv_load32(cell + id), (int32_t)xkv_load32(first + id));
        m->several_positions = m->several_positions || has_several_positions(&s->form, cell);
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
static bool walk_tensor(walk *w, const memory *m, tensor *t, bool transposed, const char *field)
{
    t->head = w->offset;
    const uint8_t *head = take(w, XKV_LLAMA_TENSOR_HEAD, field);
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
    if (!xkv_mul64(row, m->cell_count, &t->size))
        return give_up(w, XKV_ERROR_CORRUPT, "%s: rows of %llu bytes [LS7]", field, (unsigned long long)row);
    t->offset = w->offset;
    t->coded = t->coded && (w->run == 0 || !w->segments_end); /* a framing may hold it as literal bytes */
    return step_over(w, t->size, field);
}

static bool walk_tensors(walk *w, const memory *m, tensor *tensors, char kind, bool transposed)
{
    for (uint32_t i = 0; i < m->layer_count; i++) {
        char field[48];
        snprintf(field, sizeof field, "%c of layer %u", kind, i);
        if (!walk_tensor(w, m, &tensors[i], transposed, field))
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
    const uint64_t n = 4 + 4 + XKV_LLAMA_CELL;
    return n <= w->run && memcmp(w->literals, first, (size_t)n) == 0;
}

/* Whether the memory ends here, but for the counts of `streams` streams without cells. */
static bool at_memory_end(const walk *w, const state *s, const uint8_t *begin, uint32_t streams)
{
    walk behind = *w;
    uint32_t cell_count = 0;
    for (uint32_t i = 0; i < streams && cell_count == 0; i++)
        if (!take_u32(&behind, "cell_count", &cell_count))
            return false;
    return cell_count == 0 &&
           (left(&behind) == 0 || at_checkpoints(&behind) || (s->form.streams && at_second_memory(&behind, begin)));
}

/* V is there unless the state ends with K, as it does for MLA; nothing in the file says which. Where more follows, it
 * is the next memory if it looks like one, or if the model caches latents and what follows cannot be V. */
static bool walk_v(walk *w, const state *s, memory *m, const uint8_t *begin, const xkv_model *model)
{
    if (at_memory_end(w, s, begin, w->streams_left))
        return true;
    walk behind_k = *w;
    m->has_v = walk_tensors(w, m, m->v, 'V', m->v_trans == 1);
    if (m->has_v || !model || model->latent_dim == 0)
        return m->has_v;
    *w = behind_k;
    return true;
}

static bool walk_data(walk *w, const state *s, memory *m, const uint8_t *begin, const xkv_model *model)
{
    uint32_t rot_v = 0;
    if (!take_u32(w, "v_trans", &m->v_trans))
        return false;
    if (m->v_trans > 1)
        return give_up(w, XKV_ERROR_CORRUPT, "v_trans is %u, expected 0 or 1 [LS6]", m->v_trans);
    if (!take_u32(w, "n_layer", &m->layer_count))
        return false;
    if (m->layer_count == 0 || m->layer_count > XKV_MAX_LAYERS)
        return give_up(w, XKV_ERROR_CORRUPT, "n_layer is %u, expected 1 to %u [LS6]", m->layer_count, XKV_MAX_LAYERS);
    w->stage = STAGE_DATA;
    if (s->form.rotations && (!take_u32(w, "n_rot_k", &m->rot_k) || !take_u32(w, "n_rot_v", &rot_v)))
        return false;
    if ((uint64_t)m->layer_count * XKV_LLAMA_TENSOR_HEAD > left(w))
        return give_up(w, XKV_ERROR_TRUNCATED, "n_layer is %u, only %llu bytes are left [LS2]", m->layer_count,
                       (unsigned long long)left(w));
    w->status = XKV_NEW_ZERO(w->ctx, m->layer_count, &m->k);
    if (w->status == XKV_OK)
        w->status = XKV_NEW_ZERO(w->ctx, m->layer_count, &m->v);
    return w->status == XKV_OK && walk_tensors(w, m, m->k, 'K', false) && walk_v(w, s, m, begin, model);
}

static bool walk_stream(walk *w, const state *s, memory *m, uint32_t stream, const uint8_t *begin,
                        const xkv_model *model)
{
    uint64_t at = w->offset;
    uint32_t cell_count;
    if (!take_u32(w, "cell_count", &cell_count))
        return false;
    /* the old form writes the heads of its tensors even when there is no cell */
    if (cell_count == 0 && (s->form.streams || left(w) == 0))
        return true;
    if (m->used || cell_count > XKV_MAX_TOKENS)
        return give_up(w, XKV_ERROR_CORRUPT, "stream %u has %u cells [LS4]", stream, cell_count);
    m->used = true;
    m->count = at;
    m->cell_count = cell_count;
    return walk_cells(w, s, m) && walk_data(w, s, m, begin, model);
}

/* The streams of a memory, of which one may have cells. */
static bool walk_memory(walk *w, const state *s, memory *m, const xkv_model *model)
{
    const uint8_t *begin = w->literals;
    uint32_t streams = 1;
    m->begin = w->offset;
    if (s->form.streams && !take_u32(w, "n_stream", &streams))
        return false;
    if (streams == 0 || streams > MAX_STREAMS)
        return give_up(w, XKV_ERROR_CORRUPT, "n_stream is %u [LS4]", streams);
    for (uint32_t i = 0; i < streams; i++) {
        w->streams_left = streams - 1 - i;
        if (!walk_stream(w, s, m, i, begin, model))
            return false;
    }
    m->end = w->offset;
    return true;
}

static void release_memory(xkv_ctx *ctx, memory *m)
{
    xkv_release(ctx, m->k);
    xkv_release(ctx, m->v);
    *m = (memory){0};
}

/* A second memory, if what follows is one: that of the layers with a window. Where all its cells make sense it is one,
 * and what is wrong behind them is damage; else it is a tail of another kind. */
static bool walk_second(walk *w, state *s, const xkv_model *model)
{
    memory *m = &s->memories[1];
    walk second = *w;
    second.stage = STAGE_HEAD;
    bool arrived = walk_memory(&second, s, m, model);
    if (arrived || second.stage == STAGE_DATA || second.status >= XKV_ERROR_LIMIT) {
        *w = second;
        s->memory_count = 2;
        return arrived;
    }
    release_memory(w->ctx, m);
    return true;
}

static bool walk_memories(walk *w, state *s, const xkv_model *model)
{
    s->memory_count = 1;
    if (!walk_memory(w, s, &s->memories[0], model))
        return false;
    if (left(w) > 0 && !at_checkpoints(w) && !walk_second(w, s, model))
        return false;
    if (!s->memories[0].used && !s->memories[1].used && left(w) > 0 && !at_checkpoints(w))
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
    bool nothing = left(w) == 0, well_formed = false;
    if (at_checkpoints(w) && !walk_checkpoints(w, &well_formed))
        return false;
    s->tail = nothing ? XKV_TAIL_NONE : well_formed ? XKV_TAIL_CHECKPOINTS : XKV_TAIL_UNKNOWN;
    return true;
}

static bool walk_all(walk *w, state *s, const xkv_model *model)
{
    return walk_head(w, s) && walk_memories(w, s, model) && walk_tail(w, s);
}

/* --- Choosing the form -------------------------------------------------------------------------------------------- */

uint32_t xkv_llama_engine(const uint8_t *data, uint64_t size)
{
    uint32_t magic = size < 4 ? 0 : xkv_load32(data);
    return magic == MAGIC_SEQUENCE  ? XKV_ENGINE_LLAMA_SEQUENCE
           : magic == MAGIC_SESSION ? XKV_ENGINE_LLAMA_SESSION
           : magic == MAGIC_BLOB    ? XKV_ENGINE_LLAMA_BLOB
                                    : XKV_ENGINE_NONE;
}

/* The version of the memories' layout as sequence files count it, 0 where it is not told. */
static uint32_t layout_version(uint32_t engine, uint32_t version)
{
    return engine == XKV_ENGINE_LLAMA_SEQUENCE ? version : engine == XKV_ENGINE_LLAMA_SESSION ? version - 7 : 0;
}

bool xkv_llama_knows_version(uint32_t engine, uint32_t version)
{
    uint32_t layout = layout_version(engine, version);
    return engine == XKV_ENGINE_LLAMA_BLOB || (layout >= 2 && layout <= 4);
}

/* The forms of a version, the likeliest first. */
static size_t list_forms(uint32_t engine, uint32_t version, form forms[FORM_COUNT])
{
    static const form sequences2[] = {{.streams = true}, {.streams = true, .extension = 8}, {0}, {.extension = 8}};
    static const form sessions2[] = {
        {.streams = true}, {.streams = true, .extension = 8}, {.streams = true, .outputs = true}, {.outputs = true}};
    static const form later[] = {{.streams = true},
                                 {.streams = true, .extension = 12},
                                 {.streams = true, .rotations = true},
                                 {.streams = true, .extension = 12, .rotations = true},
                                 {.streams = true, .extension = 8}};
    uint32_t layout = layout_version(engine, version);
    const form *from = layout == 4                           ? later + 2
                       : layout == 3 || layout == 0          ? later
                       : engine == XKV_ENGINE_LLAMA_SEQUENCE ? sequences2
                                                             : sessions2;
    size_t count = layout == 0 ? 5 : layout == 2 ? 4 : 2;
    memcpy(forms, from, count * sizeof *forms);
    return count;
}

void xkv_llama_state_free(xkv_ctx *ctx, state *s)
{
    release_memory(ctx, &s->memories[0]);
    release_memory(ctx, &s->memories[1]);
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
static xkv_status walk_forms(const walk *start, const xkv_model *model, walk *best, state *found)
{
    const uint32_t engine = xkv_llama_engine(start->literals, start->run);
    const uint32_t version = start->run < 8 ? 0 : xkv_load32(start->literals + 4);
    form forms[FORM_COUNT];
    const size_t count = list_forms(engine, xkv_llama_knows_version(engine, version) ? version : 0, forms);
    for (size_t i = 0; i < count; i++) {
        walk w = *start;
        state s = {.engine = engine, .form = forms[i]};
        if (!walk_all(&w, &s, model) && w.status >= XKV_ERROR_LIMIT) {
            xkv_llama_state_free(w.ctx, &s);
            return w.status; /* memory, reported where it happened */
        }
        if (i > 0 && !better(&w, &s, best, found)) {
            xkv_llama_state_free(w.ctx, &s);
            continue;
        }
        xkv_llama_state_free(w.ctx, found);
        *best = w;
        *found = s;
    }
    return XKV_OK;
}

static xkv_status walk_from(const walk *start, const xkv_model *model, state *s, xkv_llama_problem *problem)
{
    walk best = {0};
    *s = (state){0};
    *problem = (xkv_llama_problem){0};
    xkv_status status = walk_forms(start, model, &best, s);
    if (status != XKV_OK || best.status == XKV_OK)
        return status;
    problem->status = best.status;
    problem->damaged = best.status == XKV_ERROR_TRUNCATED || best.stage >= STAGE_DATA;
    problem->offset = best.failed_at;
    memcpy(problem->detail, best.detail, sizeof problem->detail);
    return XKV_OK;
}

xkv_status xkv_llama_walk_file(xkv_ctx *ctx, const xkv_map *file, const xkv_model *model, state *s,
                               xkv_llama_problem *problem)
{
    walk w = {.ctx = ctx, .literals = file->data, .run = file->size, .size = file->size};
    return walk_from(&w, model, s, problem);
}

xkv_status xkv_llama_walk_framing(xkv_ctx *ctx, const xkv_framing *f, state *s, xkv_llama_problem *problem)
{
    walk w = {.ctx = ctx,
              .literals = f->literals,
              .segments = f->segments,
              .segments_end = f->segments + f->segment_count,
              .size = f->source_size};
    next_run(&w);
    return walk_from(&w, NULL, s, problem);
}
