/* gguf.c - what a GGUF file's header tells about a model's cache (spec/engines.md, section 5). */
#include "engine_file.h"

#include <math.h>
#include <stdio.h>
#include <xxhash.h>

#define GGUF_MAGIC   0x46554747u
#define MAX_VALUES   4096u /* files have less than 200; bounds the searches for a key */
#define MAX_TENSORS  (1u << 20)
#define MAX_NESTING  4u
#define MAX_FACTORS  XKV_MAX_ROPE_PAIRS
#define MAX_KEY_SIZE 128u

enum {
    TYPE_U8,
    TYPE_I8,
    TYPE_U16,
    TYPE_I16,
    TYPE_U32,
    TYPE_I32,
    TYPE_F32,
    TYPE_BOOL,
    TYPE_STRING,
    TYPE_ARRAY,
    TYPE_U64,
    TYPE_I64,
    TYPE_F64
};

typedef struct text {
    const uint8_t *bytes;
    uint64_t size;
} text;

/* A key and where its value is. */
typedef struct value {
    text key;
    uint32_t type;
    const uint8_t *bytes; /* of a string: the characters; of an array: the elements */
    uint64_t size;        /* string: bytes; array: elements */
    uint32_t element;     /* array: type of the elements */
} value;

/* A tensor that holds frequency factors, if the file lists it. */
typedef struct factors {
    bool listed;
    uint64_t offset, count;
} factors;

typedef struct gguf {
    xkv_ctx *ctx;
    const char *name;
    const uint8_t *data;
    uint64_t size, offset;
    uint32_t value_count, tensor_count;
    value *values;
    uint64_t data_offset; /* of the tensor data */
    factors all, long_context, short_context;
} gguf;

/* --- Reading ------------------------------------------------------------------------------------------------------ */

static xkv_status take(gguf *g, uint64_t n, const char *field, const uint8_t **bytes)
{
    if (n > g->size - g->offset) {
        xkv_fail(g->ctx, XKV_ERROR_TRUNCATED, "%s: offset %llu: %s needs %llu bytes, %llu are left [GU2]", g->name,
                 (unsigned long long)g->offset, field, (unsigned long long)n,
                 (unsigned long long)(g->size - g->offset));
        return XKV_ERROR_TRUNCATED;
    }
    *bytes = g->data + g->offset;
    g->offset += n;
    return XKV_OK;
}

static xkv_status take_u32(gguf *g, const char *field, uint32_t *v)
{
    const uint8_t *p;
    XKV_TRY(take(g, 4, field, &p));
    *v = xkv_load32(p);
    return XKV_OK;
}

static xkv_status take_u64(gguf *g, const char *field, uint64_t *v)
{
    const uint8_t *p;
    XKV_TRY(take(g, 8, field, &p));
    *v = xkv_load64(p);
    return XKV_OK;
}

static xkv_status take_text(gguf *g, const char *field, text *t)
{
    XKV_TRY(take_u64(g, field, &t->size));
    return take(g, t->size, field, &t->bytes);
}

static xkv_status corrupt(const gguf *g, const char *what, uint64_t found, const char *rule)
{
    return xkv_fail(g->ctx, XKV_ERROR_CORRUPT, "%s: offset %llu: %s %llu [%s]", g->name, (unsigned long long)g->offset,
                    what, (unsigned long long)found, rule);
}

/* Bytes of a value of a type of fixed size; 0 for strings, arrays and unknown types. */
static uint32_t fixed_size(uint32_t type)
{
    static const uint8_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < sizeof sizes ? sizes[type] : 0;
}

static xkv_status skip_array(gguf *g, uint32_t depth, uint32_t *element, uint64_t *count);

static xkv_status skip_value(gguf *g, uint32_t type, uint32_t depth)
{
    const uint8_t *bytes;
    text t;
    uint32_t element;
    uint64_t count;
    if (type == TYPE_STRING)
        return take_text(g, "string", &t);
    if (type == TYPE_ARRAY)
        return skip_array(g, depth + 1, &element, &count);
    if (fixed_size(type) == 0)
        return corrupt(g, "value type", type, "GU4");
    return take(g, fixed_size(type), "value", &bytes);
}

/* Step over the elements of an array, which count against the bytes that are left. */
static xkv_status skip_elements(gguf *g, uint32_t element, uint64_t count, uint32_t depth)
{
    uint64_t bytes;
    const uint8_t *p;
    if (fixed_size(element) > 0) {
        if (!xkv_mul64(count, fixed_size(element), &bytes))
            bytes = UINT64_MAX;
        return take(g, bytes, "array", &p);
    }
    for (uint64_t i = 0; i < count; i++)
        XKV_TRY(skip_value(g, element, depth));
    return XKV_OK;
}

static xkv_status skip_array(gguf *g, uint32_t depth, uint32_t *element, uint64_t *count)
{
    if (depth > MAX_NESTING)
        return corrupt(g, "arrays nested deeper than", MAX_NESTING, "GU4");
    XKV_TRY(take_u32(g, "array type", element));
    XKV_TRY(take_u64(g, "array count", count));
    return skip_elements(g, *element, *count, depth);
}

static xkv_status read_value(gguf *g, value *v)
{
    XKV_TRY(take_text(g, "key", &v->key));
    XKV_TRY(take_u32(g, "value type", &v->type));
    if (v->type == TYPE_STRING) {
        text t;
        XKV_TRY(take_text(g, "string", &t));
        v->bytes = t.bytes;
        v->size = t.size;
        return XKV_OK;
    }
    v->bytes = g->data + g->offset + (v->type == TYPE_ARRAY ? 12 : 0);
    if (v->type == TYPE_ARRAY)
        return skip_array(g, 1, &v->element, &v->size);
    return skip_value(g, v->type, 0);
}

static bool text_is(const text *t, const char *s)
{
    return t->size == strlen(s) && memcmp(t->bytes, s, (size_t)t->size) == 0;
}

/* The frequency factors' tensors are the only ones of interest. */
static xkv_status read_tensor(gguf *g)
{
    text name;
    uint32_t dims, type;
    uint64_t offset, count = 1, dim;
    XKV_TRY(take_text(g, "tensor name", &name));
    XKV_TRY(take_u32(g, "tensor dims", &dims));
    if (dims > 8)
        return corrupt(g, "tensor dimensions:", dims, "GU5");
    for (uint32_t i = 0; i < dims; i++) {
        XKV_TRY(take_u64(g, "tensor shape", &dim));
        if (!xkv_mul64(count, dim, &count))
            return corrupt(g, "tensor dimension", dim, "GU5");
    }
    XKV_TRY(take_u32(g, "tensor type", &type));
    XKV_TRY(take_u64(g, "tensor offset", &offset));
    factors *f = text_is(&name, "rope_freqs.weight")           ? &g->all
                 : text_is(&name, "rope_factors_long.weight")  ? &g->long_context
                 : text_is(&name, "rope_factors_short.weight") ? &g->short_context
                                                               : NULL;
    if (!f)
        return XKV_OK;
    if (type != 0 || count == 0 || count > MAX_FACTORS)
        return corrupt(g, "a tensor of frequency factors is not 1 to 512 f32; its elements:", count, "GU6");
    *f = (factors){.listed = true, .offset = offset, .count = count};
    return XKV_OK;
}

static xkv_status read_head(gguf *g)
{
    uint32_t magic, version;
    uint64_t tensors, values;
    XKV_TRY(take_u32(g, "magic", &magic));
    if (magic != GGUF_MAGIC)
        return xkv_fail(g->ctx, XKV_ERROR_FORMAT, "%s: not a GGUF file [GU1]", g->name);
    XKV_TRY(take_u32(g, "version", &version));
    if (version != 2 && version != 3)
        return xkv_fail(g->ctx, XKV_ERROR_VERSION, "%s: GGUF version %u%s, expected 2 or 3 [GU1]", g->name, version,
                        version != 0 && (version & 0xffff) == 0 ? " (a big-endian file)" : "");
    XKV_TRY(take_u64(g, "tensor count", &tensors));
    XKV_TRY(take_u64(g, "value count", &values));
    if (tensors > MAX_TENSORS || values > MAX_VALUES)
        return xkv_fail(g->ctx, XKV_ERROR_LIMIT, "%s: %llu tensors and %llu values, at most %u and %u [GU3]", g->name,
                        (unsigned long long)tensors, (unsigned long long)values, MAX_TENSORS, MAX_VALUES);
    if (values * 13 + tensors * 24 > g->size - g->offset)
        return xkv_fail(g->ctx, XKV_ERROR_TRUNCATED, "%s: %llu tensors and %llu values in %llu bytes [GU2]", g->name,
                        (unsigned long long)tensors, (unsigned long long)values, (unsigned long long)g->size);
    g->tensor_count = (uint32_t)tensors;
    g->value_count = (uint32_t)values;
    return XKV_OK;
}

/* --- Values by key ------------------------------------------------------------------------------------------------ */

/* The value of `key`, or NULL; a key that is there twice is refused. */
static xkv_status find(const gguf *g, const char *key, const value **found)
{
    *found = NULL;
    for (uint32_t i = 0; i < g->value_count; i++) {
        if (!text_is(&g->values[i].key, key))
            continue;
        if (*found)
            return xkv_fail(g->ctx, XKV_ERROR_CORRUPT, "%s: key %s occurs twice [GU4]", g->name, key);
        *found = &g->values[i];
    }
    return XKV_OK;
}

static xkv_status wrong_type(const gguf *g, const char *key, uint32_t type)
{
    return xkv_fail(g->ctx, XKV_ERROR_CORRUPT, "%s: key %s has type %u [GU4]", g->name, key, type);
}

/* An integer of any width in 0 .. 2^32-1. */
static bool load_uint(uint32_t type, const uint8_t *p, uint64_t *v)
{
    switch (type) {
    case TYPE_U8:
    case TYPE_BOOL:
        *v = *p;
        return true;
    case TYPE_I8:
        *v = (uint64_t)(int8_t)*p;
        break;
    case TYPE_U16:
        *v = xkv_load16(p);
        return true;
    case TYPE_I16:
        *v = (uint64_t)(int16_t)xkv_load16(p);
        break;
    case TYPE_U32:
        *v = xkv_load32(p);
        return true;
    case TYPE_I32:
        *v = (uint64_t)(int32_t)xkv_load32(p);
        break;
    case TYPE_U64:
    case TYPE_I64:
        *v = xkv_load64(p);
        break;
    default:
        return false;
    }
    return *v <= UINT32_MAX; /* negative numbers are above */
}

/* Element `index` of a value that is one number for all, or an array with one for each. */
static xkv_status uint_at(const gguf *g, const char *key, uint32_t index, uint32_t missing, uint32_t *v)
{
    const value *x;
    uint64_t n;
    *v = missing;
    XKV_TRY(find(g, key, &x));
    if (!x)
        return XKV_OK;
    bool array = x->type == TYPE_ARRAY;
    if (array && index >= x->size)
        return xkv_fail(g->ctx, XKV_ERROR_CORRUPT, "%s: key %s has %llu elements, expected more [GU4]", g->name, key,
                        (unsigned long long)x->size);
    uint32_t type = array ? x->element : x->type;
    if (!load_uint(type, x->bytes + (array ? (uint64_t)index * fixed_size(type) : 0), &n))
        return wrong_type(g, key, type);
    *v = (uint32_t)n;
    return XKV_OK;
}

static xkv_status real_of(const gguf *g, const char *key, double missing, double *v)
{
    const value *x;
    *v = missing;
    XKV_TRY(find(g, key, &x));
    if (!x)
        return XKV_OK;
    if (x->type != TYPE_F32 && x->type != TYPE_F64)
        return wrong_type(g, key, x->type);
    *v = x->type == TYPE_F32 ? (double)xkv_loadf32(x->bytes) : xkv_loadf64(x->bytes);
    return XKV_OK;
}

/* A string, cut to `size` bytes with its NUL, never inside a UTF-8 character. */
static xkv_status text_of(const gguf *g, const char *key, char *dst, size_t size)
{
    const value *x;
    dst[0] = '\0';
    XKV_TRY(find(g, key, &x));
    if (!x)
        return XKV_OK;
    if (x->type != TYPE_STRING)
        return wrong_type(g, key, x->type);
    size_t n = (size_t)xkv_min64(x->size, size - 1);
    while (n > 0 && n < x->size && (x->bytes[n] & 0xc0) == 0x80)
        n--;
    memcpy(dst, x->bytes, n);
    dst[n] = '\0';
    return XKV_OK;
}

/* --- Architectures ------------------------------------------------------------------------------------------------ */

typedef enum rotation {
    ROTATION_UNKNOWN,
    ROTATION_NONE,
    ROTATION_INTERLEAVED,
    ROTATION_HALF_SPLIT,
    ROTATION_SECTIONS /* M-RoPE: halves, sections of which have positions of their own; equal ones for text */
} rotation;

static bool is_one_of(const char *name, const char *const *list)
{
    for (; *list; list++)
        if (strcmp(name, *list) == 0)
            return true;
    return false;
}

/* Which dims the engine pairs, by architecture: facts of llama.cpp's models (llama_model_rope_type). */
static rotation rotation_of(const char *arch)
{
    static const char *const none[] = {"gpt2", "gptj", "mpt",   "refact", "bloom",      "mamba",  "mamba2",
                                       "jais", "t5",   "rwkv6", "rwkv7",  "rwkv6qwen2", "arwkv7", NULL};
    static const char *const interleaved[] = {
        "llama",      "llama4",        "llada",     "deci",       "baichuan",  "starcoder",
        "internlm2",  "minicpm",       "xverse",    "command-r",  "cohere2",   "olmo",
        "arctic",     "deepseek",      "deepseek2", "plm",        "chatglm",   "granite",
        "granitemoe", "granitehybrid", "chameleon", "bailingmoe", "smollm3",   "arcee",
        "ernie4_5",   "ernie4_5-moe",  "mistral3",  "mistral4",   "maincoder", "glm-dsa",
        "glm4",       "deepseek2-ocr", NULL};
    static const char *const half_split[] = {
        "falcon",     "falcon-h1",  "grok",     "dbrx",           "stablelm",     "bitnet",      "qwen",
        "qwen2",      "qwen2moe",   "qwen3",    "qwen3moe",       "qwen3next",    "dream",       "llada-moe",
        "rnd1",       "olmo2",      "olmoe",    "phi2",           "phi3",         "phimoe",      "plamo",
        "plamo2",     "plamo3",     "gemma",    "gemma2",         "gemma3",       "gemma3n",     "gemma4",
        "starcoder2", "openelm",    "gptneox",  "codeshell",      "orion",        "nemotron",    "exaone",
        "exaone4",    "exaone-moe", "minicpm3", "bailingmoe2",    "dots1",        "hunyuan-moe", "hunyuan-dense",
        "gpt-oss",    "jais2",      "lfm2",     "lfm2moe",        "smallthinker", "seed_oss",    "grovemoe",
        "apertus",    "minimax-m2", "cogvlm",   "pangu-embedded", "afmoe",        "mimo2",       "step35",
        "glm4moe",    NULL};
    static const char *const sections[] = {"qwen2vl",   "qwen3vl",   "qwen3vlmoe", "qwen35",
                                           "qwen35moe", "paddleocr", NULL};
    return is_one_of(arch, none)          ? ROTATION_NONE
           : is_one_of(arch, interleaved) ? ROTATION_INTERLEAVED
           : is_one_of(arch, half_split)  ? ROTATION_HALF_SPLIT
           : is_one_of(arch, sections)    ? ROTATION_SECTIONS
                                          : ROTATION_UNKNOWN;
}

/* What is worked out from the values on the way to a model. */
typedef struct plan {
    const gguf *g;
    const xkv_rope_options *options;
    char arch[64];
    uint32_t layer_count, cached_layers;
    uint32_t latent_dim;
    bool rotated;
    uint32_t window;                 /* tokens of the window of local layers; 0: they have none */
    bool local[XKV_MAX_LAYERS];      /* layers with a window, or that rotate like such */
    bool plain_full_layers;          /* the others are not rotated */
    bool local_rope, local_unscaled; /* local layers have a rotation of their own: rope 1; without scaling */
    xkv_rope_recipe recipe, local_recipe;
    double chosen[MAX_FACTORS];
} plan;

static const char *arch_key(const plan *p, const char *suffix, char key[MAX_KEY_SIZE])
{
    snprintf(key, MAX_KEY_SIZE, "%s.%s", p->arch, suffix);
    return key;
}

static xkv_status arch_uint(const plan *p, const char *suffix, uint32_t layer, uint32_t missing, uint32_t *v)
{
    char key[MAX_KEY_SIZE];
    return uint_at(p->g, arch_key(p, suffix, key), layer, missing, v);
}

static xkv_status arch_real(const plan *p, const char *suffix, double missing, double *v)
{
    char key[MAX_KEY_SIZE];
    return real_of(p->g, arch_key(p, suffix, key), missing, v);
}

static xkv_status plan_layers(plan *p)
{
    uint32_t predicting, shared;
    XKV_TRY(arch_uint(p, "block_count", 0, 0, &p->layer_count));
    if (p->layer_count == 0 || p->layer_count > XKV_MAX_LAYERS)
        return xkv_fail(p->g->ctx, XKV_ERROR_CORRUPT, "%s: %s.block_count is %u, expected 1 to %u [GU7]", p->g->name,
                        p->arch, p->layer_count, XKV_MAX_LAYERS);
    /* the last layers may predict further tokens, or use the cache of earlier ones: they have none of their own */
    XKV_TRY(arch_uint(p, "nextn_predict_layers", 0, 0, &predicting));
    XKV_TRY(arch_uint(p, "attention.shared_kv_layers", 0, 0, &shared));
    if (predicting >= p->layer_count || shared >= p->layer_count - predicting)
        return xkv_fail(p->g->ctx, XKV_ERROR_CORRUPT, "%s: %u of %u layers have no cache [GU7]", p->g->name, predicting,
                        p->layer_count);
    p->cached_layers = p->layer_count - predicting - shared;
    return XKV_OK;
}

/* Which layers have a window, by architecture: facts of llama.cpp's models. */
typedef struct window_rule {
    const char *architecture;
    uint32_t period;     /* of `period` layers one has no window; 0: the file has a flag for each layer */
    uint32_t window;     /* tokens, where the file does not say */
    bool full_first;     /* that one is the first of them, not the last */
    bool plain_full;     /* ... and is not rotated */
    bool always;         /* ... also in models without windows */
    bool local_unscaled; /* layers with a window rotate at a base of their own without scaling */
} window_rule;

static const window_rule *rule_of(const char *architecture)
{
    static const window_rule rules[] = {
        {"smollm3", .period = 4, .plain_full = true, .always = true},
        {"cohere2", .period = 4, .plain_full = true, .always = true},
        {"afmoe", .period = 4, .plain_full = true, .always = true},
        {"llama4", .period = 4, .window = 8192, .plain_full = true},
        {"exaone4", .period = 4, .plain_full = true},
        {"exaone-moe", .period = 4, .plain_full = true},
        {"smallthinker", .period = 4, .full_first = true, .plain_full = true},
        {"gemma2", .period = 2, .window = 4096},
        {"gpt-oss", .period = 2},
        {"olmo2", .period = 4},
        {"plamo3", .period = 8},
        {"gemma3", .period = 6, .always = true, .local_unscaled = true},
        {"gemma3n", .period = 5, .always = true, .local_unscaled = true},
        {"gemma4", .local_unscaled = true},
    };
    static const window_rule none = {0};
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (strcmp(rules[i].architecture, architecture) == 0)
            return &rules[i];
    return &none;
}

/* Flags of the layers that have a window, one by one. */
static xkv_status list_windows(plan *p, const char *key)
{
    for (uint32_t i = 0; i < p->layer_count; i++) {
        uint32_t flag;
        XKV_TRY(uint_at(p->g, key, i, 0, &flag));
        p->local[i] = flag != 0;
    }
    return XKV_OK;
}

/* Layers that differ from the others: they have a window, or rotate otherwise. */
static xkv_status plan_windows(plan *p)
{
    const window_rule *rule = rule_of(p->arch);
    const value *pattern;
    uint32_t period = rule->period;
    char key[MAX_KEY_SIZE];
    XKV_TRY(arch_uint(p, "attention.sliding_window", 0, rule->window, &p->window));
    XKV_TRY(find(p->g, arch_key(p, "attention.sliding_window_pattern", key), &pattern));
    bool flags = pattern && pattern->type == TYPE_ARRAY && rule->period == 0;
    if (pattern && pattern->type != TYPE_ARRAY)
        XKV_TRY(uint_at(p->g, key, 0, 0, &period));
    if ((p->window == 0 && !rule->always) || (period == 0 && !flags))
        return XKV_OK;
    p->plain_full_layers = rule->plain_full;
    p->local_unscaled = rule->local_unscaled;
    if (flags)
        return list_windows(p, key);
    for (uint32_t i = 0; i < p->layer_count; i++)
        p->local[i] = i % period != (rule->full_first ? 0 : period - 1);
    return XKV_OK;
}

/* Heads and dims of one layer; a layer without KV heads (recurrent) has no cache. */
static xkv_status plan_layer(const plan *p, uint32_t index, xkv_model_layer *layer)
{
    uint32_t heads, kv_heads, embedding, dim;
    XKV_TRY(arch_uint(p, "embedding_length", 0, 0, &embedding));
    XKV_TRY(arch_uint(p, "attention.head_count", index, 0, &heads));
    XKV_TRY(arch_uint(p, "attention.head_count_kv", index, heads, &kv_heads));
    *layer = (xkv_model_layer){.rope = XKV_NO_ROPE};
    if (index >= p->cached_layers || kv_heads == 0)
        return XKV_OK;
    dim = heads > 0 ? embedding / heads : 0;
    layer->kv_heads = kv_heads;
    XKV_TRY(arch_uint(p, "attention.key_length", index, dim, &layer->head_dim_k));
    XKV_TRY(arch_uint(p, "attention.value_length", index, dim, &layer->head_dim_v));
    if (p->local[index]) {
        layer->window = p->window;
        XKV_TRY(arch_uint(p, "attention.key_length_swa", index, layer->head_dim_k, &layer->head_dim_k));
        XKV_TRY(arch_uint(p, "attention.value_length_swa", index, layer->head_dim_v, &layer->head_dim_v));
    }
    const uint64_t limit = XKV_MAX_WIDTH;
    if (layer->head_dim_k == 0 || layer->head_dim_v == 0 || (uint64_t)kv_heads * layer->head_dim_k > limit ||
        (uint64_t)kv_heads * layer->head_dim_v > limit)
        return xkv_fail(p->g->ctx, XKV_ERROR_CORRUPT, "%s: layer %u has %u heads of %u and %u [GU7]", p->g->name, index,
                        kv_heads, layer->head_dim_k, layer->head_dim_v);
    if (p->rotated && p->latent_dim == 0 && !(p->plain_full_layers && !p->local[index]))
        layer->rope = p->local_rope && p->local[index] ? 1 : 0;
    return XKV_OK;
}

/* Models with a latent cache have "MLA" lengths beside the ones of the cache; older files of the same architectures
 * cache full heads, in which the rotated dims come last. */
static xkv_status plan_latent(plan *p, uint32_t head_dim)
{
    static const char *const rotated_last[] = {"deepseek2", "minicpm3", "plm", "glm-dsa", "mistral4", NULL};
    uint32_t expanded, rank;
    XKV_TRY(arch_uint(p, "attention.key_length_mla", 0, 0, &expanded));
    XKV_TRY(arch_uint(p, "attention.kv_lora_rank", 0, 0, &rank));
    if (expanded > 0 && rank > 0) {
        if (rank >= head_dim)
            return xkv_fail(p->g->ctx, XKV_ERROR_CORRUPT, "%s: kv_lora_rank %u with key_length %u [GU7]", p->g->name,
                            rank, head_dim);
        p->latent_dim = rank;
    } else if (is_one_of(p->arch, rotated_last) && p->recipe.n_rot < head_dim) {
        p->recipe.offset = head_dim - p->recipe.n_rot;
    }
    return XKV_OK;
}

static xkv_status plan_style(plan *p)
{
    uint32_t sections;
    rotation r = rotation_of(p->arch);
    p->rotated = r != ROTATION_NONE || p->options->style >= 0;
    if (p->options->style >= 0) {
        if (p->options->style > XKV_ROPE_HALF_SPLIT)
            return xkv_fail(p->g->ctx, XKV_ERROR_ARGUMENT, "rope style %d", p->options->style);
        p->recipe.style = (uint32_t)p->options->style;
        return XKV_OK;
    }
    if (r == ROTATION_UNKNOWN)
        return xkv_fail(p->g->ctx, XKV_ERROR_UNSUPPORTED,
                        "%s: architecture \"%s\" is not known; give a rope style [GU8]", p->g->name, p->arch);
    XKV_TRY(arch_uint(p, "rope.dimension_sections", 0, 0, &sections));
    bool halves = r == ROTATION_HALF_SPLIT || r == ROTATION_SECTIONS || (r == ROTATION_INTERLEAVED && sections > 0);
    p->recipe.style = halves ? XKV_ROPE_HALF_SPLIT : XKV_ROPE_INTERLEAVED;
    return XKV_OK;
}

/* --- RoPE scaling ------------------------------------------------------------------------------------------------- */

/* YaRN's factor on cosine and sine. The engine multiplies by 1 + 0.1 ln(factor) where it rotates and divides by it
 * where it prepares, so that this is what stays; deepseek2 folds its own part into the attention scale. */
static double yarn_scale(const plan *p, double factor, double log_multiplier)
{
    if (log_multiplier != 0 && strcmp(p->arch, "deepseek2") == 0)
        return 1;
    double part = factor > 1 ? 0.1 * log(factor) : 0;
    return log_multiplier != 0 ? (1 + part) / (1 + part * log_multiplier) : 1 + part;
}

static xkv_status plan_scaling(plan *p)
{
    char type[32], key[MAX_KEY_SIZE];
    double factor, legacy, attention, log_multiplier, ext;
    uint32_t trained, original;
    xkv_rope_recipe *r = &p->recipe;
    XKV_TRY(text_of(p->g, arch_key(p, "rope.scaling.type", key), type, sizeof type));
    XKV_TRY(arch_real(p, "rope.scale_linear", 0, &legacy));
    XKV_TRY(arch_real(p, "rope.scaling.factor", legacy, &factor));
    XKV_TRY(arch_real(p, "rope.scaling.attn_factor", 1, &attention));
    XKV_TRY(arch_real(p, "rope.scaling.yarn_log_multiplier", 0, &log_multiplier));
    XKV_TRY(arch_real(p, "rope.scaling.yarn_beta_fast", 32, &r->beta_fast));
    XKV_TRY(arch_real(p, "rope.scaling.yarn_beta_slow", 1, &r->beta_slow));
    XKV_TRY(arch_uint(p, "context_length", 0, 0, &trained));
    XKV_TRY(arch_uint(p, "rope.scaling.original_context_length", 0, trained, &original));
    static const char *const known[] = {"", "none", "linear", "yarn", "longrope", NULL};
    if (!is_one_of(type, known))
        return xkv_fail(p->g->ctx, XKV_ERROR_UNSUPPORTED, "%s: rope scaling \"%s\" is not known [GU9]", p->g->name,
                        type);
    bool yarn = strcmp(type, "yarn") == 0;
    XKV_TRY(arch_real(p, "rope.scaling.yarn_ext_factor", yarn ? 1 : 0, &ext));
    if (factor < 0 || isnan(factor) || strcmp(type, "none") == 0)
        factor = 0;
    r->freq_scale = factor > 0 ? 1 / factor : 1;
    if (p->options->linear_scale > 0)
        r->freq_scale = p->options->linear_scale;
    r->ext_factor = ext < 0 ? (yarn ? 1 : 0) : ext;
    r->context = original;
    r->scale = attention;
    if (r->ext_factor == 0)
        return XKV_OK;
    if (original == 0)
        return xkv_fail(p->g->ctx, XKV_ERROR_CORRUPT, "%s: YaRN without a context length [GU9]", p->g->name);
    r->scale *= yarn_scale(p, 1 / r->freq_scale, log_multiplier);
    return XKV_OK;
}

/* Read the factors of a tensor; UNSUPPORTED when the file ends before it. */
static xkv_status load_factors(plan *p, const factors *f, const char *name)
{
    const gguf *g = p->g;
    uint64_t begin;
    if (f->count != p->recipe.n_rot / 2)
        return xkv_fail(g->ctx, XKV_ERROR_CORRUPT, "%s: %s has %llu factors for %u rotated dims [GU6]", g->name, name,
                        (unsigned long long)f->count, p->recipe.n_rot);
    if (!xkv_add64(g->data_offset, f->offset, &begin) || begin > g->size || f->count * 4 > g->size - begin)
        return xkv_fail(g->ctx, XKV_ERROR_UNSUPPORTED,
                        "%s: the file ends before the tensor %s, which holds the rope frequency factors: give the "
                        "whole GGUF file, or the factors [GU6]",
                        g->name, name);
    for (uint32_t i = 0; i < f->count; i++) {
        p->chosen[i] = xkv_loadf32(g->data + begin + 4 * (uint64_t)i);
        if (!isfinite(p->chosen[i]) || p->chosen[i] == 0)
            return xkv_fail(g->ctx, XKV_ERROR_CORRUPT, "%s: %s: factor %u is %g [GU6]", g->name, name, i, p->chosen[i]);
    }
    p->recipe.factors = p->chosen;
    return XKV_OK;
}

/* The engine takes the long factors when it runs with more context than the model was trained for at first. */
static xkv_status plan_factors(plan *p)
{
    const gguf *g = p->g;
    uint32_t context;
    if (p->options->freq_factors) {
        memcpy(p->chosen, p->options->freq_factors, p->recipe.n_rot / 2 * sizeof *p->chosen);
        p->recipe.factors = p->chosen;
        return XKV_OK;
    }
    if (g->all.listed)
        return load_factors(p, &g->all, "rope_freqs.weight");
    XKV_TRY(arch_uint(p, "context_length", 0, 0, &context));
    if (p->options->context > 0)
        context = p->options->context;
    bool is_long = context > p->recipe.context;
    if (is_long ? g->long_context.listed : g->short_context.listed)
        return load_factors(p, is_long ? &g->long_context : &g->short_context,
                            is_long ? "rope_factors_long.weight" : "rope_factors_short.weight");
    return XKV_OK;
}

/* Layers with a window may have a base of their own, and fewer dims. */
static xkv_status plan_local_rope(plan *p)
{
    xkv_rope_recipe *r = &p->local_recipe;
    *r = p->recipe;
    if (p->local_unscaled) { /* no scaling where the window keeps distances short */
        r->freq_scale = 1;
        r->ext_factor = 0;
        r->scale = 1;
        r->factors = NULL;
    }
    XKV_TRY(arch_real(p, "rope.freq_base_swa", p->local_unscaled ? 10000 : p->recipe.base, &r->base));
    XKV_TRY(arch_uint(p, "rope.dimension_count_swa", 0, p->recipe.n_rot, &r->n_rot));
    p->local_rope = p->local_unscaled || r->base != p->recipe.base || r->n_rot != p->recipe.n_rot;
    return XKV_OK;
}

static xkv_status plan_rope(plan *p, uint32_t head_dim)
{
    xkv_rope_recipe *r = &p->recipe;
    XKV_TRY(plan_style(p));
    XKV_TRY(arch_uint(p, "rope.dimension_count", 0, head_dim, &r->n_rot));
    XKV_TRY(arch_real(p, "rope.freq_base", 10000, &r->base));
    if (p->options->dims > 0)
        r->n_rot = p->options->dims;
    if (p->options->base > 0)
        r->base = p->options->base;
    XKV_TRY(plan_latent(p, head_dim));
    if (p->rotated && (r->n_rot > head_dim || r->n_rot > 2 * XKV_MAX_ROPE_PAIRS))
        return xkv_fail(p->g->ctx, XKV_ERROR_CORRUPT, "%s: %u rotated dims in heads of %u [GU7]", p->g->name, r->n_rot,
                        head_dim);
    XKV_TRY(plan_scaling(p));
    if (p->rotated)
        XKV_TRY(plan_factors(p));
    return plan_local_rope(p);
}

/* --- The model ---------------------------------------------------------------------------------------------------- */

/* Heads may have other dims than the first cached layer's, for which the rotation was planned. */
static xkv_status check_layer_rope(const plan *p, const xkv_model *model, uint32_t index)
{
    const xkv_model_layer *layer = &model->layers[index];
    if (layer->rope == XKV_NO_ROPE)
        return XKV_OK;
    const xkv_rope *rope = &model->ropes[layer->rope];
    if (rope->offset + rope->n_rot > layer->head_dim_k)
        return xkv_fail(p->g->ctx, XKV_ERROR_UNSUPPORTED, "%s: layer %u: %u rotated dims in heads of %u [GU8]",
                        p->g->name, index, rope->offset + rope->n_rot, layer->head_dim_k);
    return XKV_OK;
}

static xkv_status fill_model(plan *p, xkv_model *model)
{
    const gguf *g = p->g;
    memcpy(model->architecture, p->arch, sizeof p->arch);
    XKV_TRY(text_of(g, "general.name", model->name, sizeof model->name));
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(g->data, (size_t)g->data_offset));
    memcpy(model->fingerprint, hash.digest, sizeof model->fingerprint);
    model->has_fingerprint = 1;
    model->latent_dim = p->latent_dim;
    model->latent_first = p->latent_dim > 0;
    if (model->rope_count > 0)
        XKV_TRY(xkv_rope_resolve(g->ctx, &p->recipe, &model->ropes[0]));
    if (model->rope_count > 1)
        XKV_TRY(xkv_rope_resolve(g->ctx, &p->local_recipe, &model->ropes[1]));
    for (uint32_t i = 0; i < p->layer_count; i++) {
        XKV_TRY(plan_layer(p, i, &model->layers[i]));
        XKV_TRY(check_layer_rope(p, model, i));
    }
    return XKV_OK;
}

/* Dim of the heads of the first layer with a cache, one without window if there is one; the rotation is planned for
 * it. */
static xkv_status first_head_dim(const plan *p, uint32_t *dim)
{
    uint32_t local_dim = 0;
    *dim = 0;
    for (uint32_t i = 0; i < p->cached_layers && *dim == 0; i++) {
        xkv_model_layer layer;
        XKV_TRY(plan_layer(p, i, &layer));
        if (!p->local[i])
            *dim = layer.head_dim_k;
        else if (local_dim == 0)
            local_dim = layer.head_dim_k;
    }
    *dim = *dim > 0 ? *dim : local_dim;
    if (*dim == 0)
        return xkv_fail(p->g->ctx, XKV_ERROR_UNSUPPORTED, "%s: no layer has a KV cache [GU7]", p->g->name);
    return XKV_OK;
}

static xkv_status make_model(const gguf *g, const xkv_rope_options *options, xkv_model **model_p)
{
    plan p = {.g = g, .options = options};
    uint32_t head_dim;
    XKV_TRY(text_of(g, "general.architecture", p.arch, sizeof p.arch));
    if (p.arch[0] == '\0')
        return xkv_fail(g->ctx, XKV_ERROR_CORRUPT, "%s: key general.architecture is missing [GU7]", g->name);
    XKV_TRY(plan_layers(&p));
    XKV_TRY(plan_windows(&p));
    XKV_TRY(first_head_dim(&p, &head_dim));
    XKV_TRY(plan_rope(&p, head_dim));
    bool rotated = p.rotated && p.latent_dim == 0; /* beside a latent the rotated part is not un-rotated */
    xkv_model *model;
    XKV_TRY(xkv_model_create(g->ctx, p.layer_count, rotated ? (p.local_rope ? 2 : 1) : 0, &model));
    xkv_status status = fill_model(&p, model);
    if (status != XKV_OK)
        xkv_model_free(g->ctx, model);
    else
        *model_p = model;
    return status;
}

/* Read all values and tensor descriptions; the header ends where the aligned tensor data begins. */
static xkv_status read_tables(gguf *g)
{
    uint32_t alignment;
    XKV_TRY(XKV_NEW_ZERO(g->ctx, g->value_count, &g->values));
    for (uint32_t i = 0; i < g->value_count; i++)
        XKV_TRY(read_value(g, &g->values[i]));
    for (uint32_t i = 0; i < g->tensor_count; i++)
        XKV_TRY(read_tensor(g));
    XKV_TRY(uint_at(g, "general.alignment", 0, 32, &alignment));
    if (alignment == 0 || (alignment & (alignment - 1)) != 0 || alignment > 65536)
        return xkv_fail(g->ctx, XKV_ERROR_CORRUPT, "%s: general.alignment is %u [GU4]", g->name, alignment);
    const uint8_t *padding;
    g->data_offset = xkv_align64(g->offset, alignment);
    return take(g, g->data_offset - g->offset, "padding", &padding);
}

xkv_status xkv_model_from_gguf_memory(xkv_ctx *ctx, const uint8_t *data, uint64_t size, const char *name,
                                      const xkv_rope_options *options, xkv_model **model_p)
{
    xkv_rope_options o = xkv_rope_options_default();
    if (options)
        XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    gguf g = {.ctx = ctx, .name = name, .data = data, .size = size};
    xkv_status status;
    XKV_TRY_GOTO(read_head(&g), out);
    XKV_TRY_GOTO(read_tables(&g), out);
    status = make_model(&g, &o, model_p);
out:
    xkv_release(ctx, g.values);
    return status;
}

xkv_status xkv_model_from_gguf(xkv_ctx *ctx, const char *path, const xkv_rope_options *options, xkv_model **model_p)
{
    xkv_ctx_begin(ctx);
    xkv_map map;
    XKV_TRY(xkv_map_file(ctx, path, &map));
    xkv_status status = xkv_model_from_gguf_memory(ctx, map.data, map.size, path, options, model_p);
    xkv_unmap_file(&map);
    return status;
}
