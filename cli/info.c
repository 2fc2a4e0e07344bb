/* info.c - facts of entries and dictionaries that tables, JSON and the report tell. */
#include "info.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

const char *info_group_kind(const xkv_geometry *g, const xkv_group_info *group)
{
    if (group->plane_count == 0)
        return "-";
    uint32_t kind = g->planes[group->planes[0]].kind;
    for (uint32_t i = 1; i < group->plane_count; i++) {
        if (g->planes[group->planes[i]].kind != kind)
            return "mixed";
    }
    return xkv_plane_kind_name(kind);
}

cli_text info_group_layers(const xkv_geometry *g, const xkv_group_info *group)
{
    cli_text t = {"-"};
    if (group->plane_count == 0)
        return t;
    uint32_t first = g->planes[group->planes[0]].layer;
    uint32_t last = g->planes[group->planes[group->plane_count - 1]].layer;
    snprintf(t.text, sizeof t.text, first == last ? "%u" : "%u-%u", first, last);
    return t;
}

const char *info_codec_name(const xkv_group_info *group)
{
    static const char *const names[] = {"lossless", "svd", "dict", "scalar", "svdq", "unknown", "cross"};
    return group->codec < sizeof names / sizeof *names ? names[group->codec] : "unknown";
}

const char *info_entry_codec(const xkv_entry *entry, const xkv_entry_info *info)
{
    xkv_group_info group;
    for (uint32_t i = 0; i < info->group_count; i++) {
        xkv_entry_get_group(entry, i, &group);
        if (group.codec != XKV_CODEC_LOSSLESS && group.plane_count > 0)
            return info_codec_name(&group);
    }
    return "lossless";
}

bool info_is_coded(const xkv_group_info *group)
{
    return group->codec == XKV_CODEC_DICT || group->codec == XKV_CODEC_CROSS || group->codec == XKV_CODEC_SCALAR ||
           group->codec == XKV_CODEC_SVDQ;
}

const char *info_lossless_reason(const xkv_group_info *group)
{
    static const char *const reasons[] = {NULL, "no gain", "NaN or Inf", "exact kind", "no tokens", "not trained"};
    return group->codec == XKV_CODEC_LOSSLESS && group->reason <= XKV_REASON_NOT_TRAINED ? reasons[group->reason]
                                                                                         : NULL;
}

/* Mean square of the relative errors of a group's planes of `kind`; -1 without such planes. Of a group that holds no
 * other kind the exact value is on record. */
static double group_square(const xkv_geometry *g, const xkv_group_info *group, uint32_t kind)
{
    double squares = 0;
    uint32_t count = 0;
    for (uint32_t i = 0; i < group->plane_count; i++) {
        if (g->planes[group->planes[i]].kind != kind)
            continue;
        squares += group->errors[i] * group->errors[i];
        count++;
    }
    if (count == 0)
        return -1;
    return count == group->plane_count ? group->error * group->error : squares / count;
}

double info_kind_error(const xkv_entry *entry, uint32_t group_count, uint32_t kind)
{
    const xkv_geometry *g = xkv_entry_geometry(entry);
    double squares = 0, energy = 0;
    bool found = false;
    for (uint32_t i = 0; i < group_count; i++) {
        xkv_group_info group;
        xkv_entry_get_group(entry, i, &group);
        double square = group_square(g, &group, kind);
        if (square < 0)
            continue;
        found = true;
        squares += square * group.energy;
        energy += group.energy;
    }
    return found ? (energy > 0 ? sqrt(squares / energy) : 0) : -1;
}

const char *info_engine_name(const xkv_entry *entry)
{
    const xkv_framing *framing = xkv_entry_framing(entry);
    return framing == NULL ? "none" : xkv_engine_name(framing->engine);
}

bool info_is_whole_only(xkv_ctx *ctx, const xkv_entry *entry)
{
    const xkv_framing *framing = xkv_entry_framing(entry);
    uint32_t whole_only = 0;
    return framing != NULL &&
           xkv_framing_is_whole_only(ctx, framing, xkv_entry_geometry(entry), &whole_only) == XKV_OK && whole_only;
}

double info_ratio(const xkv_entry_info *info)
{
    return (double)info->raw16_bytes / (double)info->file_size;
}

cli_text info_element_types(const xkv_geometry *g)
{
    bool seen[256] = {false};
    cli_text t = {""};
    for (uint32_t i = 0; i < g->plane_count; i++) {
        uint32_t dtype = g->planes[i].dtype & 255u;
        size_t n = strlen(t.text);
        if (!seen[dtype])
            snprintf(t.text + n, sizeof t.text - n, "%s%s", n > 0 ? ", " : "", xkv_dtype_name(dtype));
        seen[dtype] = true;
    }
    return t;
}

void info_value_text(char *dst, size_t size, const xkv_value *v)
{
    switch (v->type) {
    case XKV_VALUE_U64:
        snprintf(dst, size, "%" PRIu64, v->u64);
        break;
    case XKV_VALUE_F64:
        snprintf(dst, size, "%.9g", v->f64);
        break;
    case XKV_VALUE_STRING:
        cli_printable(dst, size, (const char *)v->bytes);
        break;
    default:
        snprintf(dst, size, "%s%s", cli_hex_text(v->bytes, v->size).text, v->size > 31 ? "..." : "");
        break;
    }
}

cli_text info_error_text(double error)
{
    cli_text t = {"-"};
    if (error >= 0)
        snprintf(t.text, sizeof t.text, error > 0 ? "%.4f" : "%.0f", error);
    return t;
}
