#include "plan.h"

#include "dict.h"
#include "parts.h"
#include "rows.h"

#include <math.h>
#include <stdlib.h>

/* --- Options ------------------------------------------------------------------------------------------------------ */

static bool in_unit_interval(double x)
{
    return x == 0 || (x > 0 && x < 1);
}

static xkv_status check_ranges(xkv_ctx *ctx, const xkv_pack_options *o)
{
    if (o->profile > XKV_PROFILE_SCALAR)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "profile %u is not known", o->profile);
    if (o->quality != 0 && !(o->quality >= 1 && o->quality <= 100))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "quality: expected 1 .. 100, found %g", o->quality);
    if (o->group_layers < 1 || o->group_layers > XKV_MAX_LAYERS)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "group_layers: expected 1 .. %u, found %u", XKV_MAX_LAYERS,
                        o->group_layers);
    if (o->iterations < 1 || o->iterations > 8)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "iterations: expected 1 .. 8, found %u", o->iterations);
    if (o->zstd_level < 1 || o->zstd_level > 19)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "zstd_level: expected 1 .. 19, found %d", o->zstd_level);
    if (o->chunk_tokens < 32 || o->chunk_tokens > 65536 || (o->chunk_tokens & (o->chunk_tokens - 1)) != 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "chunk_tokens: expected a power of two, 32 .. 65536, found %u",
                        o->chunk_tokens);
    if (!in_unit_interval(o->error) || !in_unit_interval(o->energy))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "error and energy must lie between 0 and 1");
    if (o->ratio != 0 && !(o->ratio > 1 && o->ratio < 1e6))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "ratio: expected more than 1, found %g", o->ratio);
    return XKV_OK;
}

/* What auto stands for, as far as the options tell; a ratio or an error leaves the choice to what the rows are like. */
static uint32_t choose_profile(const xkv_pack_options *o, int targets)
{
    if (o->rank_k || o->rank_v || o->energy != 0 || o->half_factors)
        return XKV_PROFILE_SVD;
    if (o->quality != 0 || (o->dict && targets == 0))
        return XKV_PROFILE_DICT;
    return targets == 0 ? XKV_PROFILE_LOSSLESS : XKV_PROFILE_AUTO;
}

/* Does the profile take the target it was given? */
static xkv_status check_target(xkv_ctx *ctx, const xkv_pack_options *o, int targets)
{
    bool ranks = o->rank_k || o->rank_v || o->energy != 0;

    if (o->profile == XKV_PROFILE_LOSSLESS && targets != 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "profile lossless takes no rank, ratio, error, energy or quality");
    if (o->profile == XKV_PROFILE_SVD && (targets == 0 || o->quality != 0))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "profile svd needs ranks, a ratio, an error or an energy");
    if (o->profile == XKV_PROFILE_SCALAR && o->ratio == 0 && o->error == 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "profile scalar needs a ratio or an error");
    if (o->profile == XKV_PROFILE_DICT && ranks)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "profile dict takes a ratio, an error or a quality");
    if (o->profile == XKV_PROFILE_DICT && !o->dict)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "profile dict needs a dictionary");
    if ((o->profile == XKV_PROFILE_DICT || o->profile == XKV_PROFILE_AUTO) && o->dict && !o->dict->for_packing)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the dictionary was not opened for packing");
    return XKV_OK;
}

xkv_status xkv_plan_options(xkv_ctx *ctx, const xkv_pack_options *given, xkv_pack_options *options)
{
    xkv_pack_options o = xkv_pack_options_default();
    int targets;

    if (given)
        XKV_TRY(xkv_copy_options(ctx, given, &o, sizeof o));
    XKV_TRY(check_ranges(ctx, &o));
    targets = (o.rank_k || o.rank_v) + (o.ratio != 0) + (o.error != 0) + (o.energy != 0) + (o.quality != 0);
    if (targets > 1)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "ranks, ratio, error, energy and quality exclude each other");
    if (o.profile == XKV_PROFILE_AUTO)
        o.profile = choose_profile(&o, targets);
    XKV_TRY(check_target(ctx, &o, targets));
    if (o.profile == XKV_PROFILE_DICT && targets == 0)
        o.quality = 50;
    *options = o;
    return XKV_OK;
}

bool xkv_plan_quantized(const xkv_pack_options *o)
{
    if (o->profile == XKV_PROFILE_SVD)
        return (o->ratio != 0 || o->error != 0) && !o->half_factors;
    return o->profile == XKV_PROFILE_DICT || o->profile == XKV_PROFILE_SCALAR;
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

uint32_t xkv_plan_coded_tokens(const xkv_container *c)
{
    return c->geometry.token_count - c->sinks - c->window;
}

/* The order in which planes are put into groups: by run of layers, kind, finiteness, dtype, then layer. Planes that
 * agree in all but the layer form a group. */
typedef struct plane_key {
    uint32_t run, kind, nonfinite, dtype, plane;
} plane_key;

/* With a dictionary groups are its groups, for the other profiles of auto too: errors are compared in its metric. There
 * a group is coded whole or not at all, so that one plane with a NaN makes all of it lossless. */
static plane_key make_key(const xkv_pack_options *o, bool joint, const xkv_geometry *geometry, const uint8_t *nonfinite,
                          uint32_t plane)
{
    const xkv_plane *p = &geometry->planes[plane];
    bool own_kind = !joint || p->kind == XKV_PLANE_K_ROPE;
    plane_key key = {p->layer / o->group_layers, own_kind ? p->kind : 0, nonfinite[plane], p->dtype, plane};
    uint32_t group;

    if (!joint || !o->dict || !xkv_dict_find_plane(o->dict, p, &group))
        return key;
    key.run = XKV_MAX_LAYERS + group; /* apart from the runs of planes that it does not know */
    key.kind = 0;
    for (uint32_t i = 0; i < geometry->plane_count; i++) {
        uint32_t other;
        if (nonfinite[i] && xkv_dict_find_plane(o->dict, &geometry->planes[i], &other) && other == group)
            key.nonfinite = 1;
    }
    return key;
}

static bool same_group(const plane_key *a, const plane_key *b)
{
    return a->run == b->run && a->kind == b->kind && a->nonfinite == b->nonfinite && a->dtype == b->dtype;
}

static int compare_keys(const void *pa, const void *pb)
{
    const uint32_t *a = pa, *b = pb;

    for (size_t i = 0; i < sizeof(plane_key) / sizeof *a; i++)
        if (a[i] != b[i])
            return a[i] < b[i] ? -1 : 1;
    return 0;
}

static int compare_groups(const void *pa, const void *pb)
{
    const xkv_group *a = pa, *b = pb;

    return a->planes[0] < b->planes[0] ? -1 : a->planes[0] > b->planes[0];
}

/* The cross stage of the dictionary comes first, when a group is coded that it speaks for. */
static xkv_status add_cross(xkv_ctx *ctx, const xkv_pack_options *o, xkv_container *c)
{
    bool needed = false;
    xkv_group *g = c->groups;

    for (uint32_t i = 0; i < c->group_count; i++)
        needed |= g[i].codec == XKV_GROUP_DICT && xkv_dict_basis(o->dict, &c->geometry, &g[i])->top > 0;
    if (!needed)
        return XKV_OK;
    memmove(g + 1, g, c->group_count * sizeof *g);
    *g = (xkv_group){.codec = XKV_GROUP_CROSS, .rank = o->dict->cross->rank, .part_count = c->chunk_count + 2};
    c->group_count++;
    return XKV_NEW_ZERO(ctx, g->part_count, &g->parts);
}

static xkv_status make_group(xkv_ctx *ctx, const xkv_geometry *geometry, const plane_key *keys, uint32_t count,
                             uint32_t parts, xkv_group *g)
{
    uint64_t width = 0;

    for (uint32_t i = 0; i < count; i++)
        width += xkv_plane_width(&geometry->planes[keys[i].plane]);
    if (width > XKV_MAX_WIDTH)
        return xkv_fail(ctx, XKV_ERROR_LIMIT,
                        "a group of %u planes is %llu elements wide, at most %u are allowed: use smaller groups", count,
                        (unsigned long long)width, XKV_MAX_WIDTH);
    g->width = (uint32_t)width;
    g->plane_count = count;
    g->part_count = parts;
    XKV_TRY(XKV_NEW(ctx, count, &g->planes));
    XKV_TRY(XKV_NEW_ZERO(ctx, count, &g->plane_errors));
    XKV_TRY(XKV_NEW_ZERO(ctx, count, &g->plane_energies));
    XKV_TRY(XKV_NEW_ZERO(ctx, parts, &g->parts));
    for (uint32_t i = 0; i < count; i++)
        g->planes[i] = keys[i].plane;
    return XKV_OK;
}

/* Components of a group of `planes` planes when a full one of `full` has `rank`: its share by layers, rounded down. */
static uint32_t rank_share(uint64_t rank, uint32_t planes, uint32_t full)
{
    return (uint32_t)xkv_max64(1, rank * planes / full);
}

static uint32_t largest_rank(const xkv_container *c, const xkv_group *g)
{
    return (uint32_t)xkv_min64(xkv_plan_coded_tokens(c), g->width);
}

static void choose_rank(const xkv_pack_options *o, const xkv_container *c, uint32_t kind, xkv_group *g)
{
    uint32_t rank = kind == XKV_PLANE_V ? o->rank_v : o->rank_k;

    if (o->profile == XKV_PROFILE_DICT)
        g->rank = xkv_dict_basis(o->dict, &c->geometry, g)->rank;
    else if (o->profile == XKV_PROFILE_SCALAR)
        g->rank = g->width;
    else
        g->rank = (uint32_t)xkv_min64(rank_share(rank, g->plane_count, o->group_layers), largest_rank(c, g));
}

/* Why a group cannot be coded with loss; ASKED when it can. */
static uint32_t lossless_reason(const xkv_pack_options *o, const xkv_container *c, const plane_key *key,
                                const xkv_group *g)
{
    if (key->nonfinite)
        return XKV_REASON_NONFINITE;
    if (key->kind == XKV_PLANE_K_ROPE)
        return XKV_REASON_EXACT_KIND;
    if (xkv_plan_coded_tokens(c) == 0)
        return XKV_REASON_NO_TOKENS;
    if (o->profile == XKV_PROFILE_DICT && !xkv_dict_basis(o->dict, &c->geometry, g))
        return XKV_REASON_NOT_TRAINED;
    return XKV_REASON_ASKED;
}

static xkv_status choose_codec(xkv_ctx *ctx, const xkv_pack_options *o, const xkv_container *c, const plane_key *key,
                               xkv_group *g)
{
    static const uint32_t codecs[] = {0, XKV_GROUP_LOSSLESS, XKV_GROUP_SVD, XKV_GROUP_DICT, XKV_GROUP_SCALAR};

    g->codec = XKV_GROUP_LOSSLESS;
    g->reason = XKV_REASON_ASKED;
    if (o->profile == XKV_PROFILE_LOSSLESS)
        return XKV_OK;
    g->reason = lossless_reason(o, c, key, g);
    if (g->reason != XKV_REASON_ASKED)
        return XKV_OK;
    if ((o->rank_k || o->rank_v) && (key->kind == XKV_PLANE_V ? o->rank_v : o->rank_k) == 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a rank for %s planes is needed", xkv_plane_kind_name(key->kind));
    g->codec = codecs[o->profile];
    if (g->codec == XKV_GROUP_SVD && xkv_plan_quantized(o))
        g->codec = XKV_GROUP_SVDQ;
    choose_rank(o, c, key->kind, g);
    return XKV_OK;
}

static void set_chunks(const xkv_pack_options *o, xkv_container *c)
{
    uint32_t n = c->geometry.token_count;

    c->chunk_tokens = o->chunk_tokens;
    c->chunk_count = (uint32_t)xkv_ceil_div(n, o->chunk_tokens);
    c->sinks = o->sinks < n ? o->sinks : n;
    c->window = o->window < n - c->sinks ? o->window : n - c->sinks;
}

void xkv_plan_release(xkv_ctx *ctx, xkv_container *c)
{
    for (uint32_t i = 0; c->groups && i < c->group_count; i++) {
        xkv_release(ctx, c->groups[i].planes);
        xkv_release(ctx, c->groups[i].plane_errors);
        xkv_release(ctx, c->groups[i].plane_energies);
        xkv_release(ctx, c->groups[i].parts);
    }
    xkv_release(ctx, c->groups);
    c->groups = NULL;
    c->group_count = 0;
}

xkv_status xkv_plan_groups(xkv_ctx *ctx, const xkv_pack_options *o, bool joint, const uint8_t *nonfinite,
                           xkv_container *c)
{
    const xkv_geometry *geometry = &c->geometry;
    uint32_t n = geometry->plane_count, end;
    plane_key *keys = NULL;
    xkv_status status = XKV_OK;

    set_chunks(o, c);
    XKV_TRY(XKV_NEW(ctx, n, &keys));
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, n + 1ull, &c->groups), out);
    for (uint32_t i = 0; i < n; i++)
        keys[i] = make_key(o, joint, geometry, nonfinite, i);
    qsort(keys, n, sizeof *keys, compare_keys);
    for (uint32_t i = 0; i < n; i = end) {
        xkv_group *g = &c->groups[c->group_count];
        for (end = i + 1; end < n && same_group(&keys[i], &keys[end]); end++)
            ;
        c->group_count++;
        XKV_TRY_GOTO(make_group(ctx, geometry, &keys[i], end - i, c->chunk_count + 2, g), out);
        XKV_TRY_GOTO(choose_codec(ctx, o, c, &keys[i], g), out);
    }
    qsort(c->groups, c->group_count, sizeof *c->groups, compare_groups);
    if (o->profile == XKV_PROFILE_DICT)
        XKV_TRY_GOTO(add_cross(ctx, o, c), out);
out:
    xkv_release(ctx, keys);
    return status;
}

/* --- Ranks for a ratio -------------------------------------------------------------------------------------------- */

uint64_t xkv_plan_svd_bytes(const xkv_container *c, const xkv_group *g, uint32_t rank)
{
    xkv_group trial = *g;
    uint64_t sum = 0;

    trial.rank = rank;
    trial.codec = XKV_GROUP_SVD;
    for (uint32_t i = 0; i < g->part_count; i++)
        if (i != XKV_PART_EXACT)
            sum += xkv_align64(xkv_shape_bytes(xkv_part_shape(c, &trial, i)), XKV_ALIGN);
    return sum;
}

/* Ranks at `scale` components per K layer of a full group; returns their bytes. */
static uint64_t set_ranks(xkv_container *c, double scale)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < c->group_count; i++) {
        xkv_group *g = &c->groups[i];
        double kind_scale = c->geometry.planes[g->planes[0]].kind == XKV_PLANE_V ? 1.5 : 1.0;
        if (g->codec != XKV_GROUP_SVD)
            continue;
        double rank = fmin(floor(scale * kind_scale * g->plane_count), largest_rank(c, g));
        g->rank = (uint32_t)fmax(1, rank);
        sum += xkv_plan_svd_bytes(c, g, g->rank);
    }
    return sum;
}

/* What rounding down left over goes to the first groups, one component each. */
static void spend_rest(xkv_container *c, uint64_t rest)
{
    for (uint32_t i = 0; i < c->group_count; i++) {
        xkv_group *g = &c->groups[i];
        if (g->codec != XKV_GROUP_SVD || g->rank >= largest_rank(c, g))
            continue;
        uint64_t more = xkv_plan_svd_bytes(c, g, g->rank + 1) - xkv_plan_svd_bytes(c, g, g->rank);
        if (more > rest)
            continue;
        g->rank++;
        rest -= more;
    }
}

bool xkv_plan_fill(xkv_container *c, uint64_t budget)
{
    double lo = 0, hi = XKV_MAX_WIDTH;

    if (set_ranks(c, lo) > budget)
        return false;
    for (int i = 0; i < 60; i++) {
        double mid = (lo + hi) / 2;
        if (set_ranks(c, mid) <= budget)
            lo = mid;
        else
            hi = mid;
    }
    spend_rest(c, budget - set_ranks(c, lo));
    return true;
}
