#include "dict.h"

#include "parts.h"
#include "rans.h"
#include "rows.h"

#include <math.h>
#include <stdio.h>

enum { QUALITY_MIDDLE = 50, QUALITY_OCTAVE = 16, ELEMENTS_PER_BYTE = 64 };

double xkv_dict_step(const xkv_dict *dict, double quality)
{
    return 2.0 / 3 * dict->unit * exp2((QUALITY_MIDDLE - quality) / QUALITY_OCTAVE);
}

double xkv_dict_quality(const xkv_dict *dict, double step)
{
    return QUALITY_MIDDLE - QUALITY_OCTAVE * log2(step / (2.0 / 3 * dict->unit));
}

bool xkv_dict_find_plane(const xkv_dict *dict, const xkv_plane *plane, uint32_t *group)
{
    for (uint32_t i = 0; i < dict->c.group_count; i++)
        for (uint32_t k = 0; k < dict->c.groups[i].plane_count; k++) {
            const xkv_plane *p = &dict->c.geometry.planes[dict->c.groups[i].planes[k]];
            if (p->layer == plane->layer && p->kind == plane->kind) {
                *group = i;
                return true;
            }
        }
    return false;
}

static bool same_plane(const xkv_plane *a, const xkv_plane *b)
{
    return a->layer == b->layer && a->kind == b->kind && a->heads == b->heads && a->head_dim == b->head_dim;
}

const xkv_basis *xkv_dict_basis(const xkv_dict *dict, const xkv_geometry *geometry, const xkv_group *g)
{
    const xkv_group *d;
    uint32_t group;

    if (!xkv_dict_find_plane(dict, &geometry->planes[g->planes[0]], &group))
        return NULL;
    d = &dict->c.groups[group];
    if (d->plane_count != g->plane_count)
        return NULL;
    for (uint32_t i = 0; i < g->plane_count; i++)
        if (!same_plane(&dict->c.geometry.planes[d->planes[i]], &geometry->planes[g->planes[i]]))
            return NULL;
    return &dict->bases[group];
}

/* --- Opening ------------------------------------------------------------------------------------------------------ */

/* The load of one group, on one thread. */
typedef struct loader {
    xkv_ctx *ctx;
    const xkv_kernels *kernels;
    const xkv_input *input;
    const xkv_container *c;
    const xkv_group *g;
    xkv_basis *b;
    bool for_packing;
    char where[32];
    uint8_t *header; /* decoded part 0 */
    xkv_basis_header at;
    float *u;         /* [rank][width] components */
    float *dual;      /* [rank][width] what rows are analysed with; NULL unless for packing */
    float *synthesis; /* [rank][width] what they are made of */
} loader;

static xkv_status bad(const loader *l, const char *what, const char *rule)
{
    return xkv_fail(l->ctx, XKV_ERROR_CORRUPT, "%s: %s [%s]", l->where, what, rule);
}

static xkv_status load_floats(const loader *l, uint64_t at, uint32_t n, bool positive, float **array)
{
    XKV_TRY(XKV_NEW(l->ctx, n, array));
    for (uint32_t i = 0; i < n; i++) {
        (*array)[i] = xkv_loadf32(l->header + at + 4ull * i);
        if (!isfinite((*array)[i]) || (positive && (*array)[i] < 0))
            return bad(l, "a value of the header is not finite, or negative", "Y2");
    }
    return XKV_OK;
}

/* Components [rank][width]: integers, with the tables at `tables` of the header, times the steps at `d`. */
static xkv_status load_components(const loader *l, uint32_t width, uint64_t tables, uint64_t d, float **u_p)
{
    const xkv_coder *coder = xkv_coder_cpu();
    const xkv_part *part = &l->g->parts[1];
    size_t rank = l->g->rank;
    xkv_rans_shape shape = {width, l->g->rank, width, l->header + tables};
    uint8_t *packed = NULL;
    int16_t *q = NULL;
    float *u;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW(l->ctx, rank * width, u_p));
    u = *u_p;
    XKV_TRY_GOTO(XKV_NEW(l->ctx, (size_t)part->size, &packed), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(l->ctx, rank * width, &q), out);
    XKV_TRY_GOTO(xkv_container_read_part(l->ctx, l->input, l->c, part, packed), out);
    XKV_TRY_GOTO(xkv_rans_decode(l->ctx, coder, &shape, packed, part->size, l->where, q), out);
    for (size_t j = 0; j < rank; j++) {
        float step = xkv_loadf32(l->header + d + 4 * j);
        if (!isfinite(step) || step <= 0) {
            status = bad(l, "a component's step is not finite and positive", "Y2");
            goto out;
        }
        xkv_dequantize(coder, q + j * width, width, step, u + j * width);
    }
out:
    xkv_release(l->ctx, packed);
    xkv_release(l->ctx, q);
    return status;
}

static bool is_symmetric(const float *block, uint32_t n)
{
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < i; k++)
            if (block[i * n + k] != block[k * n + i])
                return false;
    return true;
}

/* Fold one head's block into the columns [column, column + n) of everything. */
static xkv_status fold_block(loader *l, const uint8_t *stored, uint32_t n, size_t column, double *inverse, float *block,
                             size_t kept)
{
    xkv_basis *b = l->b;
    float scale = xkv_loadf32(stored);
    size_t width = b->width, elements = (size_t)n * n;
    const float *mu = b->mean + column; /* mu, until fold_mean */

    l->kernels->to_f32(XKV_F16, stored + 4, block, elements);
    for (size_t i = 0; i < elements; i++) {
        block[i] *= scale;
        inverse[i] = (double)block[i];
        if (!isfinite(block[i]))
            return bad(l, "a metric block is not finite", "Y2");
    }
    if (!is_symmetric(block, n))
        return bad(l, "a metric block is not symmetric", "Y2");
    if (b->analysis) {
        l->kernels->gemm_nn(b->rank, n, n, l->dual + column, width, block, n, 0, b->analysis + column, width);
        memcpy(b->blocks + kept, block, elements * sizeof *block);
    }
    if (!xkv_spd_inverse(n, inverse))
        return bad(l, "a metric block is not positive definite", "Y2");
    for (uint32_t j = 0; b->offset && j < b->rank; j++)
        for (uint32_t i = 0; i < n; i++)
            b->offset[j] += mu[i] * l->dual[j * width + column + i];
    for (size_t i = 0; i < elements; i++)
        block[i] = (float)inverse[i];
    l->kernels->gemm_nn(b->rank, n, n, l->u + column, width, block, n, 0, l->synthesis + column, width);
    return XKV_OK;
}

static void fold_mean(float *mean, uint32_t n, const float *inverse, float *scratch)
{
    for (uint32_t i = 0; i < n; i++) {
        double sum = 0;
        for (uint32_t k = 0; k < n; k++)
            sum += (double)mean[k] * (double)inverse[(size_t)k * n + i];
        scratch[i] = (float)sum;
    }
    memcpy(mean, scratch, n * sizeof *mean);
}

static xkv_status fold(loader *l)
{
    const uint8_t *stored = l->header + l->at.blocks;
    size_t column = 0, kept = 0;
    double *inverse = NULL;
    float *block = NULL, *scratch = NULL;
    xkv_status status = XKV_OK;

    for (uint32_t i = 0; i < l->g->plane_count; i++) {
        const xkv_plane *p = &l->c->geometry.planes[l->g->planes[i]];
        size_t elements = (size_t)p->head_dim * p->head_dim;
        xkv_release(l->ctx, inverse);
        xkv_release(l->ctx, block);
        xkv_release(l->ctx, scratch);
        inverse = NULL;
        block = scratch = NULL;
        XKV_TRY_GOTO(XKV_NEW(l->ctx, elements, &inverse), out);
        XKV_TRY_GOTO(XKV_NEW(l->ctx, elements, &block), out);
        XKV_TRY_GOTO(XKV_NEW(l->ctx, p->head_dim, &scratch), out);
        for (uint32_t h = 0; h < p->heads; h++) {
            XKV_TRY_GOTO(fold_block(l, stored, p->head_dim, column, inverse, block, kept), out);
            fold_mean(l->b->mean + column, p->head_dim, block, scratch);
            stored += 4 + 2 * elements;
            column += p->head_dim;
            kept += elements;
        }
    }
out:
    xkv_release(l->ctx, inverse);
    xkv_release(l->ctx, block);
    xkv_release(l->ctx, scratch);
    return status;
}

/* Rounding has cost the components their orthonormality, and a small one would pick up the noise of the large ones. So
 * rows are analysed with a dual basis: the larger half T of the components, which carries nearly all energy, is
 * inverted exactly, and the others are made orthogonal to it: dual_T = (U_T U_T^T)^-1 U_T, dual_j = u_j - (u_j U_T^T)
 * dual_T. */
static xkv_status make_dual(const loader *l, const float *u, size_t rank, size_t width, float **dual_p)
{
    size_t top = rank < 64 ? rank : rank / 2;
    float *gram = NULL, *dual = NULL; /* gram [rank][top] */
    bool regular;
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(XKV_NEW(l->ctx, rank * top, &gram), out);
    XKV_TRY_GOTO(XKV_NEW(l->ctx, rank * width, &dual), out);
    l->kernels->gemm_nt(rank, top, width, u, width, u, width, 0, gram, top);
    XKV_TRY_GOTO(xkv_gram_inverse(l->ctx, (uint32_t)top, 0, gram, &regular), out);
    if (!regular) {
        status = bad(l, "the components are linearly dependent", "Y2");
        goto out;
    }
    l->kernels->gemm_nn(top, width, top, gram, top, u, width, 0, dual, width);
    for (size_t i = top * top; i < rank * top; i++)
        gram[i] = -gram[i];
    memcpy(dual + top * width, u + top * width, (rank - top) * width * sizeof *dual);
    if (rank > top)
        l->kernels->gemm_nn(rank - top, width, top, gram + top * top, top, dual, width, 1, dual + top * width, width);
    *dual_p = dual;
    dual = NULL;
out:
    xkv_release(l->ctx, gram);
    xkv_release(l->ctx, dual);
    return status;
}

/* Values that are finite by themselves may not be so together. */
static xkv_status check_folded(const loader *l)
{
    const xkv_basis *b = l->b;
    size_t n = (size_t)b->rank * b->width;

    if (!l->kernels->all_finite(XKV_F32, b->mean, b->width) || !xkv_panels_finite(&b->rows, l->kernels) ||
        (b->analysis && !l->kernels->all_finite(XKV_F32, b->analysis, n)) ||
        (b->offset && !l->kernels->all_finite(XKV_F32, b->offset, b->rank)))
        return bad(l, "the basis overflows when its metric is folded into it", "Y2");
    return XKV_OK;
}

static xkv_status lay_out(const loader *l, const float *rows, uint32_t count, uint32_t width, xkv_panels *panels)
{
    XKV_TRY(xkv_panels_create(l->ctx, l->kernels, count, width, panels));
    xkv_panels_set(panels, 0, count, rows);
    return XKV_OK;
}

static xkv_status load_basis(loader *l)
{
    xkv_basis *b = l->b;
    size_t n = (size_t)l->g->rank * l->g->width;

    l->at = xkv_basis_layout(&l->c->geometry, l->g);
    b->rank = l->g->rank;
    b->width = l->g->width;
    XKV_TRY(xkv_read_matrix(l->ctx, l->input, l->c, l->g, 0, l->where, &l->header));
    XKV_TRY(load_floats(l, l->at.mu, b->width, false, &b->mean));
    XKV_TRY(load_floats(l, l->at.sigma, b->rank, true, &b->sigma));
    XKV_TRY(load_components(l, b->width, l->at.tables, l->at.d, &l->u));
    XKV_TRY(XKV_NEW(l->ctx, n, &l->synthesis));
    if (l->for_packing) {
        XKV_TRY(make_dual(l, l->u, b->rank, b->width, &l->dual));
        XKV_TRY(XKV_NEW(l->ctx, n, &b->analysis));
        XKV_TRY(XKV_NEW_ZERO(l->ctx, b->rank, &b->offset));
        XKV_TRY(XKV_NEW(l->ctx, (size_t)(l->at.size - l->at.blocks) / 2, &b->blocks)); /* a little more than needed */
    }
    XKV_TRY(fold(l));
    XKV_TRY(lay_out(l, l->synthesis, b->rank, b->width, &b->rows));
    return check_folded(l);
}

/* --- Cross stage -------------------------------------------------------------------------------------------------- */

/* How many leading coefficients of each group take part: sets the bases' `top` and `cross_at`, and the sum. */
static xkv_status load_counts(const loader *l, xkv_dict *dict, uint32_t *width)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < l->c->group_count - 1; i++) {
        xkv_basis *b = &dict->bases[i];
        b->top = xkv_load32(l->header + 4ull * i);
        b->cross_at = (uint32_t)sum;
        if (b->top > b->rank)
            return bad(l, "more coefficients of a group take part than it has", "Y4");
        sum += b->top;
        if (sum > XKV_MAX_WIDTH)
            return bad(l, "wider than the limit of a group", "Y4");
    }
    if (l->g->rank > sum)
        return bad(l, "more components than coefficients that take part", "Y4");
    *width = (uint32_t)sum;
    return XKV_OK;
}

static xkv_status load_cross(loader *l, xkv_dict *dict)
{
    xkv_cross_header at = xkv_cross_layout(l->c->group_count, l->g);
    xkv_cross_basis *b;
    uint64_t n;

    XKV_TRY(XKV_NEW_ZERO(l->ctx, 1, &dict->cross));
    b = dict->cross;
    b->rank = l->g->rank;
    XKV_TRY(xkv_read_matrix(l->ctx, l->input, l->c, l->g, 0, l->where, &l->header));
    XKV_TRY(load_counts(l, dict, &b->width));
    n = (uint64_t)b->rank * b->width;
    if (n > ELEMENTS_PER_BYTE * l->c->file_size)
        return xkv_fail(l->ctx, XKV_ERROR_LIMIT, "a cross basis of more than %d elements a byte of the file",
                        ELEMENTS_PER_BYTE);
    XKV_TRY(load_floats(l, at.sigma, b->rank, true, &b->sigma));
    XKV_TRY(load_components(l, b->width, at.tables, at.d, &b->components));
    if (l->for_packing)
        XKV_TRY(make_dual(l, b->components, b->rank, b->width, &b->analysis));
    if (!l->kernels->all_finite(XKV_F32, b->components, (size_t)n) ||
        (b->analysis && !l->kernels->all_finite(XKV_F32, b->analysis, (size_t)n)))
        return bad(l, "the components overflow", "Y2");
    return lay_out(l, b->components, b->rank, b->width, &b->rows);
}

typedef struct load_all {
    xkv_ctx *ctx;
    const xkv_input *input;
    xkv_dict *dict;
    bool for_packing;
} load_all;

static loader make_loader(const load_all *all, uint32_t group)
{
    loader l = {.ctx = all->ctx,
                .kernels = xkv_kernels_cpu(),
                .input = all->input,
                .c = &all->dict->c,
                .g = &all->dict->c.groups[group],
                .b = &all->dict->bases[group],
                .for_packing = all->for_packing};

    (void)snprintf(l.where, sizeof l.where, "basis of group %u", (unsigned)group);
    return l;
}

static void free_loader(loader *l)
{
    xkv_release(l->ctx, l->header);
    xkv_release(l->ctx, l->u);
    xkv_release(l->ctx, l->dual);
    xkv_release(l->ctx, l->synthesis);
}

static xkv_status load_task(void *user, uint32_t worker, uint64_t index)
{
    loader l = make_loader(user, (uint32_t)index);
    xkv_status status = load_basis(&l);

    (void)worker;
    free_loader(&l);
    return status;
}

/* The bases of all groups on the pool, then that of the cross stage, which speaks of them. */
static xkv_status load_bases(xkv_ctx *ctx, const xkv_input *input, bool for_packing, xkv_dict *dict)
{
    load_all all = {ctx, input, dict, for_packing};
    uint32_t count = dict->c.group_count;
    bool cross = count > 0 && xkv_group_is_cross(&dict->c.groups[count - 1]);
    xkv_pool *pool = NULL;
    loader l;
    xkv_status status;

    XKV_TRY(XKV_NEW_ZERO(ctx, count, &dict->bases));
    XKV_TRY(xkv_pool_create(ctx, xkv_ctx_threads(ctx), &pool));
    status = xkv_pool_run(ctx, pool, count - cross, load_task, &all);
    if (status == XKV_OK && cross) {
        l = make_loader(&all, count - 1);
        status = load_cross(&l, dict);
        free_loader(&l);
    }
    xkv_pool_free(ctx, pool); /* not before: it holds OpenBLAS at one thread */
    return status;
}

static const xkv_meta_value *find_value(const xkv_container *c, const char *key, uint32_t type, uint32_t size)
{
    for (uint32_t i = 0; i < c->value_count; i++) {
        const xkv_meta_value *v = &c->values[i];
        if (strcmp(v->key, key) == 0 && v->type == type && v->size == size)
            return v;
    }
    return NULL;
}

static xkv_status find_unit(xkv_ctx *ctx, const xkv_container *c, double *unit)
{
    const xkv_meta_value *v = find_value(c, "dict.unit", XKV_VALUE_F64, 8);

    *unit = v ? xkv_loadf64(v->bytes) : 0;
    if (!(isfinite(*unit) && *unit > 0))
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "META: no dict.unit, or one that is not positive [Y3]");
    return XKV_OK;
}

static void fill_info(const xkv_container *c, double unit, xkv_dict_info *info)
{
    const xkv_meta_value *tokens = find_value(c, "dict.tokens", XKV_VALUE_U64, 8);
    const xkv_meta_value *quality = find_value(c, "dict.quality.max", XKV_VALUE_F64, 8);
    const xkv_meta_value *fingerprint = find_value(c, "model.fingerprint", XKV_VALUE_BYTES, 16);

    memset(info, 0, sizeof *info);
    memcpy(info->id, c->content_id, 16);
    info->file_size = c->file_size;
    info->layer_count = c->geometry.layer_count;
    info->group_count = c->group_count;
    for (uint32_t i = 0; i < c->group_count; i++)
        *(xkv_group_is_cross(&c->groups[i]) ? &info->cross_components : &info->component_count) += c->groups[i].rank;
    info->unit = unit;
    info->tokens = tokens ? xkv_load64(tokens->bytes) : 0;
    info->max_quality = quality ? xkv_loadf64(quality->bytes) : 0;
    if (fingerprint)
        memcpy(info->fingerprint, fingerprint->bytes, 16);
}

void xkv_dict_get_info(const xkv_dict *dict, xkv_dict_info *info)
{
    fill_info(&dict->c, dict->unit, info);
}

xkv_status xkv_dict_read_info(xkv_ctx *ctx, const xkv_input *input, xkv_dict_info *info)
{
    xkv_container c = {0};
    double unit;
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_container_read(ctx, input, XKV_KIND_DICTIONARY, &c));
    XKV_TRY_GOTO(find_unit(ctx, &c, &unit), out);
    fill_info(&c, unit, info);
out:
    xkv_container_free(ctx, &c);
    return status;
}

const float *xkv_dict_sigma(const xkv_dict *dict, uint32_t group, uint32_t *count)
{
    bool cross = xkv_group_is_cross(&dict->c.groups[group]);

    *count = cross ? dict->cross->rank : dict->bases[group].rank;
    return cross ? dict->cross->sigma : dict->bases[group].sigma;
}

uint32_t xkv_dict_leading(const xkv_dict *dict, uint32_t group)
{
    return dict->bases[group].top;
}

/* A stream of next to nothing may claim a basis of any size: do not let a small file ask for the machine's memory.
 * Trained bases hold 1 to 10 elements a byte. */
static xkv_status check_size(xkv_ctx *ctx, const xkv_container *c)
{
    uint64_t elements = 0, most = ELEMENTS_PER_BYTE * c->file_size;

    for (uint32_t i = 0; i < c->group_count && elements <= most; i++)
        elements += (uint64_t)c->groups[i].rank * c->groups[i].width;
    if (elements > most)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "bases of more than %d elements a byte of the file", ELEMENTS_PER_BYTE);
    return XKV_OK;
}

xkv_status xkv_dict_open(xkv_ctx *ctx, const xkv_input *input, int for_packing, xkv_dict **dict_p)
{
    xkv_dict *dict = NULL;
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &dict));
    XKV_TRY_GOTO(xkv_container_read(ctx, input, XKV_KIND_DICTIONARY, &dict->c), out);
    XKV_TRY_GOTO(xkv_container_check_gaps(ctx, input, &dict->c), out);
    if (dict->c.has_framing || dict->c.geometry.token_id_count > 0) {
        status = xkv_fail(ctx, XKV_ERROR_CORRUPT, "a dictionary holds token ids or an engine's framing [Y1]");
        goto out;
    }
    XKV_TRY_GOTO(check_size(ctx, &dict->c), out);
    XKV_TRY_GOTO(find_unit(ctx, &dict->c, &dict->unit), out);
    dict->for_packing = for_packing != 0;
    XKV_TRY_GOTO(load_bases(ctx, input, dict->for_packing, dict), out);
    *dict_p = dict;
    dict = NULL;
out:
    xkv_dict_close(ctx, dict);
    return status;
}

static void free_cross(xkv_ctx *ctx, xkv_cross_basis *b)
{
    if (!b)
        return;
    xkv_release(ctx, b->sigma);
    xkv_release(ctx, b->components);
    xkv_panels_free(ctx, &b->rows);
    xkv_release(ctx, b->analysis);
    xkv_release(ctx, b);
}

void xkv_dict_close(xkv_ctx *ctx, xkv_dict *dict)
{
    if (!dict)
        return;
    for (uint32_t i = 0; dict->bases && i < dict->c.group_count; i++) {
        xkv_basis *b = &dict->bases[i];
        xkv_release(ctx, b->mean);
        xkv_release(ctx, b->sigma);
        xkv_panels_free(ctx, &b->rows);
        xkv_release(ctx, b->analysis);
        xkv_release(ctx, b->offset);
        xkv_release(ctx, b->blocks);
    }
    xkv_release(ctx, dict->bases);
    free_cross(ctx, dict->cross);
    xkv_container_free(ctx, &dict->c);
    xkv_release(ctx, dict);
}
