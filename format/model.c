/* model.c - models as the cache sees them: layers, rotary embeddings, and whether a cache fits. */
#include "engine_file.h"

#include <math.h>

/* --- Models ------------------------------------------------------------------------------------------------------- */

xkv_status xkv_model_create(xkv_ctx *ctx, uint32_t layer_count, uint32_t rope_count, xkv_model **model_p)
{
    xkv_model *model;
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &model));
    model->layer_count = layer_count;
    model->rope_count = rope_count;
    xkv_status status;
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, layer_count, &model->layers), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, rope_count, &model->ropes), out);
    *model_p = model;
    return XKV_OK;
out:
    xkv_model_free(ctx, model);
    return status;
}

void xkv_model_free(xkv_ctx *ctx, xkv_model *model)
{
    if (!model)
        return;
    xkv_release(ctx, model->layers);
    xkv_release(ctx, model->ropes);
    xkv_release(ctx, model);
}

static xkv_status check_options(xkv_ctx *ctx, uint32_t layer_count, const xkv_rope_options *o)
{
    if (layer_count == 0 || layer_count > XKV_MAX_LAYERS)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "%u layers, expected 1 to %u", layer_count, XKV_MAX_LAYERS);
    if (!(o->base > 0) || o->dims == 0 || o->head_dim == 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a model without a GGUF file needs base, dims and head_dim");
    if (o->style != XKV_ROPE_INTERLEAVED && o->style != XKV_ROPE_HALF_SPLIT)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a model without a GGUF file needs a rope style");
    if (o->dims > o->head_dim || o->head_dim > XKV_MAX_WIDTH)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "rope dims %u with head_dim %u", o->dims, o->head_dim);
    return XKV_OK;
}

xkv_status xkv_model_from_options(xkv_ctx *ctx, uint32_t layer_count, const xkv_rope_options *options,
                                  xkv_model **model_p)
{
    xkv_ctx_begin(ctx);
    xkv_rope_options o = xkv_rope_options_default();
    if (!options)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a model without a GGUF file needs options");
    XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(check_options(ctx, layer_count, &o));
    xkv_rope_recipe recipe = {.n_rot = o.dims,
                              .style = (uint32_t)o.style,
                              .base = o.base,
                              .freq_scale = o.linear_scale > 0 ? o.linear_scale : 1,
                              .scale = 1,
                              .factors = o.freq_factors};
    xkv_model *model;
    XKV_TRY(xkv_model_create(ctx, layer_count, 1, &model));
    if (xkv_rope_resolve(ctx, &recipe, model->ropes) != XKV_OK) {
        xkv_model_free(ctx, model);
        return XKV_ERROR_ARGUMENT;
    }
    for (uint32_t i = 0; i < layer_count; i++)
        model->layers[i] = (xkv_model_layer){.head_dim_k = o.head_dim, .head_dim_v = o.head_dim};
    *model_p = model;
    return XKV_OK;
}

/* --- Fitting caches ----------------------------------------------------------------------------------------------- */

uint32_t xkv_model_cached_layers(const xkv_model *model, uint32_t *list)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < model->layer_count; i++) {
        if (model->layers[i].head_dim_k == 0)
            continue;
        if (list)
            list[count] = i;
        count++;
    }
    return count;
}

xkv_status xkv_model_fit_plane(xkv_ctx *ctx, const char *name, const xkv_model *model, uint32_t width, xkv_plane *plane)
{
    plane->rope = XKV_NO_ROPE;
    plane->heads = 1;
    plane->head_dim = width;
    if (!model)
        return XKV_OK;
    const xkv_model_layer *layer = &model->layers[plane->layer];
    uint32_t dim = plane->kind == XKV_PLANE_V ? layer->head_dim_v : layer->head_dim_k;
    uint32_t heads = layer->kv_heads > 0 || dim == 0 ? layer->kv_heads : width / dim;
    if (heads == 0 || dim == 0 || (uint64_t)heads * dim != width)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH,
                        "%s: layer %u: %s rows have %u elements, the model has %u heads of %u [LS9]", name,
                        plane->layer, xkv_plane_kind_name(plane->kind), width, heads, dim);
    plane->heads = heads;
    plane->head_dim = dim;
    if (plane->kind == XKV_PLANE_K)
        plane->rope = layer->rope;
    return XKV_OK;
}

/* --- Rotary embeddings -------------------------------------------------------------------------------------------- */

/* YaRN: the pair whose wavelength fits `rotations` times into the original context (arXiv 2309.00071, section 3.2,
 * solved for the dimension). */
static double yarn_pair(const xkv_rope_recipe *r, double rotations)
{
    const double two_pi = 6.283185307179586476925286766559;
    return r->n_rot * log(r->context / (rotations * two_pi)) / (2 * log(r->base));
}

/* YaRN: how much of pair `i` is extrapolated, 1 for fast pairs and 0 for slow ones, with a ramp between. */
static double yarn_share(const xkv_rope_recipe *r, uint32_t i)
{
    double low = fmax(0, floor(yarn_pair(r, r->beta_fast)));
    double high = fmin(r->n_rot - 1, ceil(yarn_pair(r, r->beta_slow)));
    double ramp = (i - low) / fmax(0.001, high - low);
    return r->ext_factor * (1 - fmin(1, fmax(0, ramp)));
}

static double pair_frequency(const xkv_rope_recipe *r, uint32_t i)
{
    double plain = pow(r->base, -2.0 * i / r->n_rot) / (r->factors ? r->factors[i] : 1);
    double share = r->ext_factor != 0 ? yarn_share(r, i) : 0;
    return plain * (r->freq_scale * (1 - share) + share);
}

xkv_status xkv_rope_resolve(xkv_ctx *ctx, const xkv_rope_recipe *recipe, xkv_rope *rope)
{
    const uint32_t n_rot = recipe->n_rot;
    if (n_rot < 2 || n_rot % 2 != 0 || n_rot > 2 * XKV_MAX_ROPE_PAIRS)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "rope: %u rotated dims, expected an even number from 2 to %u [G11]",
                        n_rot, 2 * XKV_MAX_ROPE_PAIRS);
    if (!isfinite(recipe->scale) || !(recipe->scale > 0))
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "rope: scale %g, expected a finite number above 0 [G11]",
                        recipe->scale);
    *rope = (xkv_rope){.n_rot = n_rot, .offset = recipe->offset, .style = recipe->style, .scale = recipe->scale};
    for (uint32_t i = 0; i < n_rot / 2; i++) {
        rope->inv_freq[i] = pair_frequency(recipe, i);
        if (!isfinite(rope->inv_freq[i]) || fabs(rope->inv_freq[i]) > 64)
            return xkv_fail(ctx, XKV_ERROR_CORRUPT, "rope: frequency %g of pair %u, expected at most 64 [G11]",
                            rope->inv_freq[i], i);
    }
    return XKV_OK;
}
