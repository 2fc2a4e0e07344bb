/* safetensors.c - caches in safetensors files, read and written (spec/engines.md, section 4). */
#include "container.h"
#include "engine_file.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define HEADER_CAP      100000000u /* the format's own limit */

#define KEY_LAYOUT      "xkv.layout"
#define KEY_START       "xkv.positions_start"
#define KEY_POSITIONS   "xkv.positions"
#define KEY_TOKEN_IDS   "xkv.token_ids"
#define KEY_ROPES       "xkv.ropes"
#define KEY_LAYER_ROPES "xkv.layer_ropes"

static const char *const layout_names[] = {[XKV_LAYOUT_TOKEN_MAJOR] = "tokens_heads_dim",
                                           [XKV_LAYOUT_DIM_MAJOR] = "",
                                           [XKV_LAYOUT_HEAD_MAJOR] = "heads_tokens_dim"};

/* One tensor of the header, in order of its data. */
typedef struct tensor {
    const char *name; /* belongs to the JSON document */
    json_t *entry;
    uint64_t begin, end; /* data offsets */
    uint32_t dims;
    uint64_t shape[XKV_SAFETENSOR_DIMS];
    uint32_t dtype; /* xkv_dtype; only for planes */
    bool is_plane;
    uint32_t layer, kind;
    uint32_t plane; /* index in the geometry */
} tensor;

typedef struct header {
    xkv_ctx *ctx;
    const char *name; /* of the file */
    json_t *root, *metadata;
    uint64_t size; /* of the JSON text */
    uint32_t count;
    tensor *tensors;
    uint32_t layout;
} header;

static void header_free(header *h)
{
    json_decref(h->root);
    xkv_release(h->ctx, h->tensors);
    *h = (header){0};
}

/* --- Header ------------------------------------------------------------------------------------------------------- */

/* Parse `text`, the header behind its length. */
static xkv_status parse_json(header *h, const uint8_t *text)
{
    json_error_t error;
    h->root = json_loadb((const char *)text, (size_t)h->size, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(h->root))
        return xkv_fail(h->ctx, XKV_ERROR_CORRUPT, "%s: header: %s [SF2]", h->name,
                        h->root ? "not a JSON object" : error.text);
    h->metadata = json_object_get(h->root, "__metadata__");
    const char *key;
    json_t *value;
    if (h->metadata && !json_is_object(h->metadata))
        return xkv_fail(h->ctx, XKV_ERROR_CORRUPT, "%s: __metadata__ is not an object [SF2]", h->name);
    json_object_foreach(h->metadata, key, value)
    {
        if (!json_is_string(value))
            return xkv_fail(h->ctx, XKV_ERROR_CORRUPT, "%s: __metadata__ \"%s\" is not a string [SF2]", h->name, key);
    }
    return XKV_OK;
}

/* "layer.7.key" and the other names of section 4: the layer and the kind. */
static bool parse_name(const char *name, uint32_t *layer, uint32_t *kind)
{
    static const struct {
        const char *before, *after;
        uint32_t kind;
    } forms[] = {
        {"layer.", ".key", XKV_PLANE_K},           {"layer.", ".value", XKV_PLANE_V},
        {"layer.", ".latent", XKV_PLANE_LATENT},   {"layer.", ".key_rope", XKV_PLANE_K_ROPE},
        {"layers.", ".key", XKV_PLANE_K},          {"layers.", ".value", XKV_PLANE_V},
        {"layers.", ".keys", XKV_PLANE_K},         {"layers.", ".values", XKV_PLANE_V},
        {"key_cache.", "", XKV_PLANE_K},           {"value_cache.", "", XKV_PLANE_V},
        {"past_key_values.", ".key", XKV_PLANE_K}, {"past_key_values.", ".value", XKV_PLANE_V},
    };
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        size_t n = strlen(forms[i].before);
        if (strncmp(name, forms[i].before, n) != 0)
            continue;
        uint32_t number = 0, digits = 0;
        for (; digits < 4 && name[n] >= '0' && name[n] <= '9'; digits++)
            number = number * 10 + (uint32_t)(name[n++] - '0');
        if (digits == 0 || number >= XKV_MAX_LAYERS || strcmp(name + n, forms[i].after) != 0)
            continue;
        *layer = number;
        *kind = forms[i].kind;
        return true;
    }
    return false;
}

/* Bytes of an element; 0 for a type name that is not known. */
static uint32_t element_size(const char *dtype)
{
    static const struct {
        const char *name;
        uint32_t size;
    } types[] = {{"F64", 8}, {"I64", 8}, {"U64", 8},  {"F32", 4},     {"I32", 4},
                 {"U32", 4}, {"F16", 2}, {"BF16", 2}, {"I16", 2},     {"U16", 2},
                 {"I8", 1},  {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i].name, dtype) == 0)
            return types[i].size;
    return 0;
}

static bool plane_dtype(const char *dtype, uint32_t *value)
{
    static const char *const names[] = {[XKV_F32] = "F32", [XKV_F16] = "F16", [XKV_BF16] = "BF16"};
    for (uint32_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i], dtype) == 0) {
            *value = i;
            return true;
        }
    return false;
}

static bool get_size(const json_t *array, size_t index, uint64_t *value)
{
    const json_t *x = json_array_get(array, index);
    if (!json_is_integer(x) || json_integer_value(x) < 0)
        return false;
    *value = (uint64_t)json_integer_value(x);
    return true;
}

/* Shape, offsets and type of one entry, checked against each other. */
static xkv_status parse_entry(header *h, tensor *t)
{
    const char *dtype = json_string_value(json_object_get(t->entry, "dtype"));
    const json_t *shape = json_object_get(t->entry, "shape"), *offsets = json_object_get(t->entry, "data_offsets");
    bool ok = dtype && json_is_array(shape) && json_array_size(offsets) == 2 && get_size(offsets, 0, &t->begin) &&
              get_size(offsets, 1, &t->end) && t->begin <= t->end;
    size_t dims = json_array_size(shape);
    uint64_t elements = 1, bytes, dim;
    for (size_t i = 0; ok && i < dims; i++) {
        ok = get_size(shape, i, &dim) && xkv_mul64(elements, dim, &elements);
        if (ok && i < XKV_SAFETENSOR_DIMS)
            t->shape[i] = dim;
    }
    uint32_t size = ok ? element_size(dtype) : 0;
    ok = ok && (size == 0 || (xkv_mul64(elements, size, &bytes) && bytes == t->end - t->begin));
    if (!ok)
        return xkv_fail(h->ctx, XKV_ERROR_CORRUPT,
                        "%s: tensor \"%s\": dtype, shape and data_offsets do not agree [SF3]", h->name, t->name);
    t->dims = dims <= XKV_SAFETENSOR_DIMS ? (uint32_t)dims : 0;
    t->is_plane = parse_name(t->name, &t->layer, &t->kind) && plane_dtype(dtype, &t->dtype);
    if (t->is_plane && t->dims == 4 && t->shape[0] == 1) { /* a batch of one */
        t->dims = 3;
        memmove(t->shape, t->shape + 1, 3 * sizeof *t->shape);
    }
    t->is_plane = t->is_plane && t->dims == 3;
    return XKV_OK;
}

static int compare_offsets(const void *a, const void *b)
{
    const tensor *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    if (x->end != y->end)
        return x->end < y->end ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* The tensors in order of their data, which they must cover without holes: `data_size` bytes. */
static xkv_status parse_tensors(header *h, uint64_t data_size)
{
    const char *key;
    json_t *value;
    uint64_t end = 0;
    XKV_TRY(XKV_NEW_ZERO(h->ctx, json_object_size(h->root), &h->tensors));
    json_object_foreach(h->root, key, value)
    {
        if (value == h->metadata)
            continue;
        tensor *t = &h->tensors[h->count++];
        t->name = key;
        t->entry = value;
        XKV_TRY(parse_entry(h, t));
    }
    qsort(h->tensors, h->count, sizeof *h->tensors, compare_offsets);
    for (uint32_t i = 0; i < h->count; i++) {
        const tensor *t = &h->tensors[i];
        if (t->begin != end)
            return xkv_fail(h->ctx, XKV_ERROR_CORRUPT, "%s: tensor \"%s\" begins at %llu, expected %llu [SF4]", h->name,
                            t->name, (unsigned long long)t->begin, (unsigned long long)end);
        end = t->end;
    }
    if (end != data_size)
        return xkv_fail(h->ctx, end > data_size ? XKV_ERROR_TRUNCATED : XKV_ERROR_CORRUPT,
                        "%s: the tensors end at %llu, the file has %llu bytes of data [SF4]", h->name,
                        (unsigned long long)end, (unsigned long long)data_size);
    return XKV_OK;
}

/* --- Axes --------------------------------------------------------------------------------------------------------- */

static uint32_t token_axis(uint32_t layout)
{
    return layout == XKV_LAYOUT_HEAD_MAJOR ? 1 : 0;
}

/* Whether all planes have as many tokens under `layout`, and the heads of `model`, if it is given. */
static bool layout_fits(const header *h, uint32_t layout, const xkv_model *model)
{
    const tensor *first = NULL;
    for (uint32_t i = 0; i < h->count; i++) {
        const tensor *t = &h->tensors[i];
        if (!t->is_plane)
            continue;
        first = first ? first : t;
        if (t->shape[token_axis(layout)] != first->shape[token_axis(layout)])
            return false;
        if (!model || t->layer >= model->layer_count)
            continue;
        uint32_t heads = model->layers[t->layer].kv_heads;
        if (heads > 0 && t->kind <= XKV_PLANE_V && t->shape[1 - token_axis(layout)] != heads)
            return false;
    }
    return first != NULL;
}

/* The order of the axes: as the metadata says; else what is consistent, and transformers' own where both are. */
static xkv_status choose_layout(header *h, const xkv_model *model, bool *understood)
{
    const char *declared = json_string_value(json_object_get(h->metadata, KEY_LAYOUT));
    *understood = true;
    for (uint32_t i = 0; declared && i < sizeof layout_names / sizeof *layout_names; i++) {
        if (strcmp(declared, layout_names[i]) != 0 || i == XKV_LAYOUT_DIM_MAJOR)
            continue;
        h->layout = i;
        if (layout_fits(h, i, NULL))
            return XKV_OK;
        return xkv_fail(h->ctx, XKV_ERROR_CORRUPT, "%s: layout \"%s\": tensors differ in their number of tokens [SF6]",
                        h->name, declared);
    }
    if (declared)
        return xkv_fail(h->ctx, XKV_ERROR_CORRUPT, "%s: layout \"%s\" is not known [SF6]", h->name, declared);
    const xkv_model *const models[] = {model, NULL};
    for (size_t i = 0; i < 2; i++) {
        h->layout = XKV_LAYOUT_HEAD_MAJOR;
        if (layout_fits(h, h->layout, models[i]))
            return XKV_OK;
        h->layout = XKV_LAYOUT_TOKEN_MAJOR;
        if (layout_fits(h, h->layout, models[i]))
            return XKV_OK;
    }
    *understood = false;
    return XKV_OK;
}

/* --- Metadata ----------------------------------------------------------------------------------------------------- */

static xkv_status bad_metadata(const header *h, const char *key)
{
    return xkv_fail(h->ctx, XKV_ERROR_CORRUPT, "%s: __metadata__ \"%s\" is not what it should be [SF7]", h->name, key);
}

/* The JSON text in a metadata string; NULL in *value when the key is not there. */
static xkv_status metadata_json(const header *h, const char *key, json_t **value)
{
    json_error_t error;
    const char *text = json_string_value(json_object_get(h->metadata, key));
    *value = NULL;
    if (!text)
        return XKV_OK;
    *value = json_loads(text, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, &error);
    return *value ? XKV_OK : bad_metadata(h, key);
}

/* An array of i32 in a metadata string. *list_p NULL when the key is not there. */
static xkv_status metadata_i32(const header *h, const char *key, int32_t **list_p, uint32_t *count)
{
    json_t *array;
    int32_t *list = NULL;
    *list_p = NULL;
    *count = 0;
    XKV_TRY(metadata_json(h, key, &array));
    if (!array)
        return XKV_OK;
    xkv_status status = XKV_OK;
    size_t n = json_array_size(array);
    if (!json_is_array(array) || n > XKV_MAX_TOKENS) {
        status = bad_metadata(h, key);
        goto out;
    }
    XKV_TRY_GOTO(XKV_NEW(h->ctx, n, &list), out);
    for (size_t i = 0; i < n; i++) {
        const json_t *x = json_array_get(array, i);
        json_int_t v = json_integer_value(x);
        if (!json_is_integer(x) || v < INT32_MIN || v > INT32_MAX) {
            status = bad_metadata(h, key);
            goto out;
        }
        list[i] = (int32_t)v;
    }
    *list_p = list;
    *count = (uint32_t)n;
    list = NULL;
out:
    xkv_release(h->ctx, list);
    json_decref(array);
    return status;
}

static xkv_status read_positions(const header *h, xkv_cache *cache, uint32_t token_count)
{
    int32_t *positions;
    uint32_t count;
    json_t *start;
    XKV_TRY(metadata_i32(h, KEY_POSITIONS, &positions, &count));
    xkv_status status = metadata_json(h, KEY_START, &start);
    if (status != XKV_OK)
        goto out;
    if (!positions) {
        json_int_t first = json_integer_value(start);
        if ((start && !json_is_integer(start)) || first < 0 || first > (json_int_t)INT32_MAX - token_count) {
            status = bad_metadata(h, KEY_START);
            goto out;
        }
        XKV_TRY_GOTO(XKV_NEW(h->ctx, token_count, &positions), out);
        for (uint32_t i = 0; i < token_count; i++)
            positions[i] = (int32_t)(first + i);
    } else if (count != token_count) {
        status = bad_metadata(h, KEY_POSITIONS);
        goto out;
    }
    status = xkv_cache_set_positions(h->ctx, cache, positions, token_count);
out:
    json_decref(start);
    xkv_release(h->ctx, positions);
    return status;
}

/* One record of xkv.ropes. */
static bool parse_rope(const json_t *o, xkv_rope *r)
{
    const json_t *n_rot = json_object_get(o, "n_rot"), *offset = json_object_get(o, "offset"),
                 *style = json_object_get(o, "style"), *scale = json_object_get(o, "scale"),
                 *freq = json_object_get(o, "inv_freq");
    json_int_t n = json_integer_value(n_rot), first = json_integer_value(offset), s = json_integer_value(style);
    bool ok = json_is_integer(n_rot) && n >= 2 && n % 2 == 0 && n <= 2 * XKV_MAX_ROPE_PAIRS &&
              json_is_integer(offset) && first >= 0 && first < XKV_MAX_WIDTH && json_is_integer(style) &&
              (s == XKV_ROPE_INTERLEAVED || s == XKV_ROPE_HALF_SPLIT) && json_number_value(scale) > 0 &&
              json_array_size(freq) == (size_t)n / 2;
    if (!ok)
        return false;
    *r = (xkv_rope){(uint32_t)n, (uint32_t)first, (uint32_t)s, json_number_value(scale), {0}};
    for (size_t i = 0; i < (size_t)n / 2; i++) {
        const json_t *x = json_array_get(freq, i);
        r->inv_freq[i] = json_number_value(x);
        if (!json_is_number(x) || fabs(r->inv_freq[i]) > 64)
            return false;
    }
    return true;
}

/* Point the K planes of each layer to its rotary embedding. */
static bool assign_ropes(const json_t *layer_ropes, xkv_plane *planes, uint32_t plane_count, const xkv_rope *ropes,
                         uint32_t rope_count)
{
    for (uint32_t i = 0; i < plane_count; i++) {
        xkv_plane *p = &planes[i];
        const json_t *index = json_array_get(layer_ropes, p->layer);
        p->rope = XKV_NO_ROPE;
        if (p->kind != XKV_PLANE_K || !json_is_integer(index))
            continue;
        json_int_t r = json_integer_value(index);
        if (r < 0 || r >= rope_count || ropes[r].offset + ropes[r].n_rot > p->head_dim)
            return false;
        p->rope = (uint32_t)r;
    }
    return true;
}

/* Rotary embeddings that the file itself describes. */
static xkv_status read_ropes(const header *h, xkv_cache *cache, xkv_plane *planes, bool *found)
{
    json_t *list, *layer_ropes = NULL;
    xkv_rope *ropes = NULL;
    XKV_TRY(metadata_json(h, KEY_ROPES, &list));
    *found = list != NULL;
    if (!list)
        return XKV_OK;
    size_t count = json_array_size(list);
    xkv_status status = XKV_OK;
    bool ok = json_is_array(list) && count <= XKV_MAX_ROPES;
    XKV_TRY_GOTO(metadata_json(h, KEY_LAYER_ROPES, &layer_ropes), out);
    XKV_TRY_GOTO(XKV_NEW(h->ctx, ok ? count : 0, &ropes), out);
    for (size_t i = 0; ok && i < count; i++)
        ok = parse_rope(json_array_get(list, i), &ropes[i]);
    ok = ok && assign_ropes(layer_ropes, planes, cache->geometry.plane_count, ropes, (uint32_t)count);
    status = ok ? xkv_cache_set_ropes(h->ctx, cache, ropes, (uint32_t)count) : bad_metadata(h, KEY_ROPES);
out:
    json_decref(list);
    json_decref(layer_ropes);
    xkv_release(h->ctx, ropes);
    return status;
}

/* Rotary embeddings of the model: files without their own are transformers', which pairs halves whatever the model. */
static xkv_status use_model_ropes(const header *h, xkv_cache *cache, const xkv_model *model)
{
    XKV_TRY(xkv_cache_set_ropes(h->ctx, cache, model->ropes, model->rope_count));
    xkv_rope *ropes = (xkv_rope *)cache->geometry.ropes;
    for (uint32_t i = 0; i < cache->geometry.rope_count; i++)
        ropes[i].style = XKV_ROPE_HALF_SPLIT;
    return XKV_OK;
}

/* --- Planes and segments ------------------------------------------------------------------------------------------ */

static int compare_planes(const void *a, const void *b)
{
    const tensor *x = a, *y = b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return (x->kind > y->kind) - (x->kind < y->kind);
}

static xkv_status add_plane(const header *h, const tensor *t, const xkv_model *model, xkv_plane *p)
{
    uint64_t heads = t->shape[1 - token_axis(h->layout)], dim = t->shape[2];
    if (heads == 0 || dim == 0 || heads > XKV_MAX_WIDTH || dim > XKV_MAX_WIDTH || heads * dim > XKV_MAX_WIDTH)
        return xkv_fail(h->ctx, XKV_ERROR_CORRUPT, "%s: tensor \"%s\": %llu heads of %llu [SF5]", h->name, t->name,
                        (unsigned long long)heads, (unsigned long long)dim);
    *p = (xkv_plane){t->layer, t->kind, t->dtype, (uint32_t)heads, (uint32_t)dim, XKV_NO_ROPE};
    if (!model || t->kind > XKV_PLANE_V)
        return XKV_OK;
    if (t->layer >= model->layer_count)
        return xkv_fail(h->ctx, XKV_ERROR_MISMATCH, "%s: the file has a layer %u, the model %u layers [LS9]", h->name,
                        t->layer, model->layer_count);
    XKV_TRY(xkv_model_fit_plane(h->ctx, h->name, model, (uint32_t)(heads * dim), p));
    if (p->heads != heads)
        return xkv_fail(h->ctx, XKV_ERROR_MISMATCH, "%s: layer %u has %llu heads, the model %u [LS9]", h->name,
                        t->layer, (unsigned long long)heads, p->heads);
    return XKV_OK;
}

/* The planes in order of layer and kind, from tensors in order of their data. */
static xkv_status add_planes(header *h, xkv_cache *cache, const xkv_model *model)
{
    tensor *order = NULL; /* copies of the planes' tensors; their `plane` is the place in the header */
    xkv_plane *planes;
    uint32_t count = 0;
    xkv_status status;
    XKV_TRY_GOTO(XKV_NEW(h->ctx, h->count, &order), out);
    XKV_TRY_GOTO(XKV_NEW(h->ctx, h->count, &planes), out);
    cache->geometry.planes = planes;
    for (uint32_t i = 0; i < h->count; i++)
        if (h->tensors[i].is_plane) {
            order[count] = h->tensors[i];
            order[count++].plane = i;
        }
    qsort(order, count, sizeof *order, compare_planes);
    for (uint32_t i = 0; i < count; i++) {
        if (i > 0 && compare_planes(&order[i - 1], &order[i]) == 0) {
            status = xkv_fail(h->ctx, XKV_ERROR_CORRUPT, "%s: tensors \"%s\" and \"%s\" are the same plane [SF5]",
                              h->name, order[i - 1].name, order[i].name);
            goto out;
        }
        h->tensors[order[i].plane].plane = i;
        XKV_TRY_GOTO(add_plane(h, &order[i], model, &planes[i]), out);
    }
    cache->geometry.plane_count = count;
    cache->geometry.layer_count = count > 0 ? planes[count - 1].layer + 1 : 0;
out:
    xkv_release(h->ctx, order);
    return status;
}

/* A model's layers must all be there. */
static xkv_status check_layer_count(const header *h, const xkv_cache *cache, const xkv_model *model)
{
    const xkv_geometry *g = &cache->geometry;
    uint32_t layers = 0;
    for (uint32_t i = 0; i < g->plane_count; i++)
        layers += i == 0 || g->planes[i].layer != g->planes[i - 1].layer;
    uint32_t cached = xkv_model_cached_layers(model, NULL);
    if (layers != cached)
        return xkv_fail(h->ctx, XKV_ERROR_MISMATCH, "%s: the file has %u layers, the model caches %u [LS9]", h->name,
                        layers, cached);
    return XKV_OK;
}

static xkv_status add_segments(const header *h, xkv_cache *cache)
{
    xkv_framing_builder b = {.ctx = h->ctx};
    const uint8_t *data = cache->file.data + 8 + h->size;
    xkv_status status = xkv_framing_add_literal(&b, cache->file.data, 8 + h->size);
    for (uint32_t i = 0; status == XKV_OK && i < h->count; i++) {
        const tensor *t = &h->tensors[i];
        xkv_segment s = {t->end - t->begin, t->plane, 1, h->layout};
        if (t->is_plane && cache->geometry.plane_count > 0)
            status = xkv_framing_add_tensor(&b, &s);
        else
            status = xkv_framing_add_literal(&b, data + t->begin, s.size);
    }
    if (status == XKV_OK)
        xkv_framing_take(&b, XKV_ENGINE_SAFETENSORS, &cache->framing);
    xkv_framing_builder_free(&b);
    return status;
}

static uint64_t header_tokens(const header *h)
{
    for (uint32_t i = 0; i < h->count; i++)
        if (h->tensors[i].is_plane)
            return h->tensors[i].shape[token_axis(h->layout)];
    return 0;
}

static xkv_status build_cache(header *h, xkv_cache *cache, const xkv_model *model)
{
    int32_t *ids;
    bool own_ropes = true;
    uint64_t tokens = header_tokens(h);
    if (tokens > XKV_MAX_TOKENS)
        return xkv_fail(h->ctx, XKV_ERROR_LIMIT, "%s: %llu tokens, at most %u [SF5]", h->name,
                        (unsigned long long)tokens, XKV_MAX_TOKENS);
    if (tokens > 0) {
        XKV_TRY(add_planes(h, cache, model));
        if (model)
            XKV_TRY(check_layer_count(h, cache, model));
        XKV_TRY(read_ropes(h, cache, (xkv_plane *)cache->geometry.planes, &own_ropes));
    }
    XKV_TRY(add_segments(h, cache));
    if (model && !own_ropes)
        XKV_TRY(use_model_ropes(h, cache, model));
    XKV_TRY(metadata_i32(h, KEY_TOKEN_IDS, &ids, &cache->geometry.token_id_count));
    cache->geometry.token_ids = ids;
    return read_positions(h, cache, (uint32_t)tokens);
}

/* Length and text of the header: the first bytes of `file`, of which `available` are there. */
static xkv_status open_header(header *h, const uint8_t *file, uint64_t available, uint64_t file_size)
{
    h->size = xkv_load64(file);
    if (h->size > available - 8)
        return xkv_fail(h->ctx, XKV_ERROR_TRUNCATED, "%s: offset 0: the header has %llu bytes, %llu are left [SF1]",
                        h->name, (unsigned long long)h->size, (unsigned long long)(available - 8));
    XKV_TRY(parse_json(h, file + 8));
    return parse_tensors(h, file_size - 8 - h->size);
}

/* Whether `file` begins as safetensors files do. */
static bool is_safetensors(const xkv_map *file)
{
    return file->size >= 9 && file->data[8] == '{' && xkv_load64(file->data) >= 2 &&
           xkv_load64(file->data) <= HEADER_CAP;
}

/* Copy what is known of tensor `wanted` to *found, if it is there. */
static bool find_tensor(const header *h, const uint8_t *data, const char *wanted, xkv_safetensor *found)
{
    for (uint32_t i = 0; i < h->count; i++) {
        const tensor *t = &h->tensors[i];
        if (strcmp(t->name, wanted) != 0)
            continue;
        const char *dtype = json_string_value(json_object_get(t->entry, "dtype"));
        *found = (xkv_safetensor){.dims = t->dims, .data = data + t->begin};
        found->is_f32 = strcmp(dtype, "F32") == 0;
        memcpy(found->shape, t->shape, sizeof found->shape);
        return true;
    }
    return false;
}

xkv_status xkv_safetensors_find(xkv_ctx *ctx, const char *name, const xkv_map *file, const char *const *wanted,
                                uint32_t count, xkv_safetensor *found)
{
    header h = {.ctx = ctx, .name = name};
    if (!is_safetensors(file))
        return xkv_fail(ctx, XKV_ERROR_FORMAT, "%s: not a safetensors file [SF1]", name);
    xkv_status status = open_header(&h, file->data, file->size, file->size);
    for (uint32_t i = 0; status == XKV_OK && i < count; i++)
        if (!find_tensor(&h, file->data + 8 + h.size, wanted[i], &found[i]))
            status = xkv_fail(ctx, XKV_ERROR_FORMAT, "%s: no tensor \"%s\"", name, wanted[i]);
    header_free(&h);
    return status;
}

xkv_status xkv_safetensors_open(xkv_ctx *ctx, xkv_cache *cache, const xkv_model *model, bool *understood)
{
    const xkv_map *file = &cache->file;
    if (!is_safetensors(file))
        return XKV_OK;
    header h = {.ctx = ctx, .name = cache->name};
    xkv_status status = open_header(&h, file->data, file->size, file->size);
    if (status == XKV_OK)
        status = choose_layout(&h, model, understood);
    if (status == XKV_OK && !*understood)
        xkv_logf(ctx, XKV_LOG_WARNING, "%s: no cache is found in this safetensors file: carried as opaque bytes",
                 cache->name);
    if (status == XKV_OK && *understood)
        status = build_cache(&h, cache, model);
    header_free(&h);
    return status;
}

/* --- Writing ------------------------------------------------------------------------------------------------------ */

static xkv_status no_memory(xkv_ctx *ctx)
{
    return xkv_fail(ctx, XKV_ERROR_MEMORY, "out of memory for a safetensors header");
}

/* Store a JSON value as text under a metadata key; takes the reference. */
static bool set_text(json_t *metadata, const char *key, json_t *value)
{
    char *text = value ? json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(17)) : NULL;
    json_decref(value);
    bool ok = text && json_object_set_new(metadata, key, json_string(text)) == 0;
    free(text);
    return ok;
}

static json_t *i32_array(const int32_t *list, uint32_t count)
{
    json_t *array = json_array();
    for (uint32_t i = 0; array && i < count; i++)
        if (json_array_append_new(array, json_integer(list[i])) != 0) {
            json_decref(array);
            array = NULL;
        }
    return array;
}

/* Positions (row by row of the file) and token ids. */
static bool set_tokens(json_t *metadata, const int32_t *positions, uint32_t count, const int32_t *ids,
                       uint32_t id_count)
{
    bool run = true;
    for (uint32_t i = 1; i < count; i++)
        run = run && (int64_t)positions[i] == (int64_t)positions[0] + i;
    json_object_del(metadata, KEY_POSITIONS);
    json_object_del(metadata, KEY_START);
    json_object_del(metadata, KEY_TOKEN_IDS);
    bool ok = run ? set_text(metadata, KEY_START, json_integer(count > 0 ? positions[0] : 0))
                  : set_text(metadata, KEY_POSITIONS, i32_array(positions, count));
    return ok && (id_count == 0 || set_text(metadata, KEY_TOKEN_IDS, i32_array(ids, id_count)));
}

static json_t *rope_object(const xkv_rope *r)
{
    json_t *freq = json_array();
    for (uint32_t i = 0; freq && i < r->n_rot / 2; i++)
        json_array_append_new(freq, json_real(r->inv_freq[i]));
    return json_pack("{s:i, s:i, s:i, s:f, s:o}", "n_rot", (int)r->n_rot, "offset", (int)r->offset, "style",
                     (int)r->style, "scale", r->scale, "inv_freq", freq);
}

static bool set_ropes(json_t *metadata, const xkv_geometry *g)
{
    if (g->rope_count == 0)
        return true;
    json_t *ropes = json_array(), *layers = json_array();
    for (uint32_t i = 0; i < g->rope_count; i++)
        json_array_append_new(ropes, rope_object(&g->ropes[i]));
    for (uint32_t i = 0; i < g->layer_count; i++)
        json_array_append_new(layers, json_null());
    for (uint32_t i = 0; i < g->plane_count; i++)
        if (g->planes[i].rope != XKV_NO_ROPE)
            json_array_set_new(layers, g->planes[i].layer, json_integer(g->planes[i].rope));
    bool ok = json_array_size(ropes) == g->rope_count && json_array_size(layers) == g->layer_count;
    ok = set_text(metadata, KEY_ROPES, ropes) && ok;
    return set_text(metadata, KEY_LAYER_ROPES, layers) && ok;
}

/* {"dtype": ..., "shape": ..., "data_offsets": ...} of a plane at `*offset`, which moves behind it. */
static json_t *plane_entry(const xkv_geometry *g, const xkv_plane *p, uint32_t layout, uint64_t *offset)
{
    static const char *const names[] = {[XKV_F32] = "F32", [XKV_F16] = "F16", [XKV_BF16] = "BF16"};
    uint64_t begin = *offset;
    uint32_t tokens = g->token_count;
    bool head_major = layout == XKV_LAYOUT_HEAD_MAJOR;
    *offset += (uint64_t)tokens * p->heads * p->head_dim * xkv_dtype_size(p->dtype);
    return json_pack("{s:s, s:[I, I, I], s:[I, I]}", "dtype", names[p->dtype], "shape",
                     (json_int_t)(head_major ? p->heads : tokens), (json_int_t)(head_major ? tokens : p->heads),
                     (json_int_t)p->head_dim, "data_offsets", (json_int_t)begin, (json_int_t)*offset);
}

static bool set_planes(json_t *root, const xkv_geometry *g, uint32_t layout)
{
    static const char *const names[] = {"key", "value", "latent", "key_rope"};
    uint64_t offset = 0;
    for (uint32_t i = 0; i < g->plane_count; i++) {
        char name[48];
        snprintf(name, sizeof name, "layer.%u.%s", g->planes[i].layer, names[g->planes[i].kind]);
        if (json_object_set_new(root, name, plane_entry(g, &g->planes[i], layout, &offset)) != 0)
            return false;
    }
    return true;
}

/* Append the header: its length, then its text, padded so that the data is aligned to 8 bytes. */
static xkv_status add_header(xkv_framing_builder *b, const json_t *root)
{
    uint8_t length[8];
    char *text = json_dumps(root, JSON_COMPACT);
    if (!text)
        return no_memory(b->ctx);
    uint64_t size = strlen(text), padded = xkv_align64(size, 8);
    xkv_store64(length, padded);
    xkv_status status = XKV_OK;
    if (padded > HEADER_CAP)
        status =
            xkv_fail(b->ctx, XKV_ERROR_LIMIT, "the header of the safetensors file has %llu bytes, at most %u [SF1]",
                     (unsigned long long)padded, HEADER_CAP);
    if (status == XKV_OK)
        status = xkv_framing_add_literal(b, length, sizeof length);
    if (status == XKV_OK)
        status = xkv_framing_add_literal(b, text, size);
    if (status == XKV_OK)
        status = xkv_framing_add_literal(b, "       ", padded - size);
    free(text);
    return status;
}

static xkv_status check_geometry(xkv_ctx *ctx, const xkv_geometry *g, uint32_t layout)
{
    if (layout != XKV_LAYOUT_TOKEN_MAJOR && layout != XKV_LAYOUT_HEAD_MAJOR)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "layout %u cannot be written to a safetensors file", layout);
    for (uint32_t i = 0; i < g->plane_count; i++) {
        XKV_TRY(xkv_check_plane(ctx, g, i));
        if (xkv_dtype_block(g->planes[i].dtype) > 1)
            return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u: safetensors files have no type %s", i,
                            xkv_dtype_name(g->planes[i].dtype));
    }
    return XKV_OK;
}

static json_t *image_header(const xkv_geometry *g, uint32_t layout)
{
    json_t *root = json_object(), *metadata = json_object();
    bool ok = root && metadata && json_object_set(root, "__metadata__", metadata) == 0 &&
              json_object_set_new(metadata, KEY_LAYOUT, json_string(layout_names[layout])) == 0 &&
              set_tokens(metadata, g->positions, g->token_count, g->token_ids, g->token_id_count) &&
              set_ropes(metadata, g) && set_planes(root, g, layout);
    json_decref(metadata);
    if (ok)
        return root;
    json_decref(root);
    return NULL;
}

xkv_status xkv_framing_safetensors(xkv_ctx *ctx, const xkv_geometry *geometry, uint32_t layout, xkv_framing **framing_p)
{
    xkv_ctx_begin(ctx);
    XKV_TRY(check_geometry(ctx, geometry, layout));
    xkv_framing_builder b = {.ctx = ctx};
    xkv_framing *framing = NULL;
    xkv_status status;
    json_t *root = image_header(geometry, layout);
    if (!root)
        return no_memory(ctx);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, 1, &framing), out);
    XKV_TRY_GOTO(add_header(&b, root), out);
    for (uint32_t i = 0; i < geometry->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[i];
        uint64_t size = (uint64_t)p->heads * p->head_dim * xkv_dtype_size(p->dtype) * geometry->token_count;
        XKV_TRY_GOTO(xkv_framing_add_tensor(&b, &(xkv_segment){size, i, 1, layout}), out);
    }
    xkv_framing_take(&b, XKV_ENGINE_SAFETENSORS, framing);
    *framing_p = framing;
    framing = NULL;
out:
    json_decref(root);
    xkv_framing_builder_free(&b);
    xkv_framing_free(ctx, framing);
    return status;
}

/* --- Cutting ------------------------------------------------------------------------------------------------------ */

/* Rewrite the entry of a tensor to `tokens` tokens at *offset. */
static bool cut_entry(tensor *t, uint32_t layout, uint32_t tokens, uint64_t new_size, uint64_t *offset)
{
    json_t *shape = json_object_get(t->entry, "shape");
    size_t axis = json_array_size(shape) - 3 + token_axis(layout);
    uint64_t begin = *offset;
    *offset += new_size;
    return json_array_set_new(shape, axis, json_integer(tokens)) == 0 &&
           json_object_set_new(t->entry, "data_offsets", json_pack("[I, I]", (json_int_t)begin, (json_int_t)*offset)) ==
               0;
}

/* The positions of the kept tokens in the order of their rows in the file. */
static xkv_status cut_positions(const header *h, const xkv_geometry *g, uint32_t kept, const uint32_t *rows,
                                json_t *metadata)
{
    int32_t *positions;
    XKV_TRY(XKV_NEW(h->ctx, kept, &positions));
    for (uint32_t i = 0; i < kept; i++)
        positions[rows ? rows[i] : i] = g->positions[i];
    uint32_t id_count = g->token_id_count < kept ? g->token_id_count : kept;
    bool ok = set_tokens(metadata, positions, kept, g->token_ids, id_count);
    xkv_release(h->ctx, positions);
    return ok ? XKV_OK : no_memory(h->ctx);
}

/* Pair the tensor segments with the header's tensors, both in file order, and collect the cut segments. */
static xkv_status cut_segments(header *h, const xkv_framing *framing, uint32_t total, uint32_t kept,
                               xkv_framing_builder *b)
{
    uint32_t next = 0;
    uint64_t offset = 0;
    for (uint32_t i = 0; i < framing->segment_count; i++) {
        xkv_segment s = framing->segments[i];
        if (s.plane_count == 0)
            continue;
        tensor *t = next < h->count ? &h->tensors[next++] : NULL;
        if (!t || !t->is_plane || t->end - t->begin != s.size || s.layout > XKV_LAYOUT_HEAD_MAJOR ||
            t->shape[token_axis(s.layout)] != total)
            return xkv_fail(h->ctx, XKV_ERROR_UNSUPPORTED, "cannot cut: segment %u is not what the header says [SF8]",
                            i);
        s.size = s.size / total * kept;
        if (!cut_entry(t, s.layout, kept, s.size, &offset))
            return no_memory(h->ctx);
        XKV_TRY(xkv_framing_add_tensor(b, &s));
    }
    if (next != h->count)
        return xkv_fail(h->ctx, XKV_ERROR_UNSUPPORTED, "cannot cut: tensor \"%s\" is not part of the cache [SF8]",
                        h->tensors[next].name);
    return XKV_OK;
}

/* Header and segments of the cut framing; the header is written when the segments are known. */
static xkv_status cut_file(header *h, const xkv_framing *framing, const xkv_geometry *g, uint32_t kept,
                           xkv_framing *cut)
{
    xkv_framing_builder tensors = {.ctx = h->ctx}, b = {.ctx = h->ctx};
    json_t *metadata = h->metadata;
    uint8_t *keep = NULL;
    uint32_t *rows = NULL;
    xkv_status status;
    if (!metadata) {
        metadata = json_object();
        if (json_object_set_new(h->root, "__metadata__", metadata) != 0)
            return no_memory(h->ctx);
    }
    XKV_TRY_GOTO(xkv_framing_cut_rows(h->ctx, framing, g->token_count, kept, &keep, &rows), out);
    cut->rows = rows;
    XKV_TRY_GOTO(cut_segments(h, framing, g->token_count, kept, &tensors), out);
    XKV_TRY_GOTO(cut_positions(h, g, kept, rows, metadata), out);
    /* the order of the axes may have been found by comparing numbers of tokens: from here on the file says it */
    if (tensors.count > 0)
        json_object_set_new(metadata, KEY_LAYOUT, json_string(layout_names[tensors.segments[0].layout]));
    XKV_TRY_GOTO(add_header(&b, h->root), out);
    for (uint32_t i = 0; i < tensors.count; i++)
        XKV_TRY_GOTO(xkv_framing_add_tensor(&b, &tensors.segments[i]), out);
    xkv_framing_take(&b, XKV_ENGINE_SAFETENSORS, cut);
out:
    xkv_release(h->ctx, keep);
    xkv_framing_builder_free(&tensors);
    xkv_framing_builder_free(&b);
    return status;
}

xkv_status xkv_safetensors_first(xkv_ctx *ctx, const xkv_framing *framing, const xkv_geometry *geometry,
                                 uint32_t token_count, xkv_framing *cut)
{
    if (framing->segment_count == 0 || framing->segments[0].plane_count > 0 || framing->segments[0].size < 9 ||
        framing->source_size < framing->segments[0].size)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "cannot cut: the framing has no safetensors header [SF8]");
    header h = {.ctx = ctx, .name = "framing"};
    xkv_status status = open_header(&h, framing->literals, framing->segments[0].size, framing->source_size);
    if (status == XKV_OK)
        status = cut_file(&h, framing, geometry, token_count, cut);
    header_free(&h);
    return status;
}
