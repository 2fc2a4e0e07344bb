/* cli_pack.c - the options that say how to pack. */
#include "cli.h"

#include <stdio.h>

const char *const cli_profiles[] = {"auto", "lossless", "svd", "dict", "scalar", NULL};

static bool take_level(cli *c, int digit, const char *second, xkv_pack_options *o)
{
    char text[16];
    uint32_t level;
    snprintf(text, sizeof text, "%c%s", digit, second == NULL ? "" : second);
    if (!cli_parse_u32(c, "level", text, 1, 19, &level))
        return false;
    o->zstd_level = (int32_t)level;
    return true;
}

bool cli_pack_option(cli *c, int option, const char *value, xkv_pack_options *o)
{
    switch (option) {
    case CLI_OPT_LOSSLESS:
        o->profile = XKV_PROFILE_LOSSLESS;
        return true;
    case CLI_OPT_PROFILE:
        return cli_parse_choice(c, "--profile", value, cli_profiles, &o->profile);
    case CLI_OPT_GROUP:
        return cli_parse_u32(c, "--group", value, 1, XKV_MAX_LAYERS, &o->group_layers);
    case CLI_OPT_RANK_K:
        return cli_parse_u32(c, "--rank-k", value, 1, XKV_MAX_WIDTH, &o->rank_k);
    case CLI_OPT_RANK_V:
        return cli_parse_u32(c, "--rank-v", value, 1, XKV_MAX_WIDTH, &o->rank_v);
    case CLI_OPT_RATIO:
        return cli_parse_double(c, "--ratio", value, 1, 1e6, &o->ratio);
    case CLI_OPT_ERROR:
        return cli_parse_double(c, "--error", value, 0, 1, &o->error);
    case CLI_OPT_ENERGY:
        return cli_parse_double(c, "--energy", value, 0, 1, &o->energy);
    case CLI_OPT_QUALITY:
        return cli_parse_quality(c, "--quality", value, &o->quality);
    case CLI_OPT_SINKS:
        return cli_parse_u32(c, "--sinks", value, 0, XKV_MAX_TOKENS, &o->sinks);
    case CLI_OPT_WINDOW:
        return cli_parse_u32(c, "--window", value, 0, XKV_MAX_TOKENS, &o->window);
    case CLI_OPT_ITERATIONS:
        return cli_parse_u32(c, "--iterations", value, 1, 8, &o->iterations);
    case CLI_OPT_ZSTD_FACTORS:
        o->zstd_factors = 1;
        return true;
    case CLI_OPT_HALF_FACTORS:
        o->half_factors = 1;
        return true;
    default:
        return take_level(c, option, value, o);
    }
}

bool cli_pack_needs_dict(const cli *c, const xkv_pack_options *o)
{
    return c->dict_given || o->profile == XKV_PROFILE_DICT || o->quality > 0;
}

/* What a profile, given or implied, does not go with. */
static const char *profile_problem(const cli *c, const xkv_pack_options *o)
{
    bool svd_only = o->rank_k > 0 || o->energy > 0, dict = cli_pack_needs_dict(c, o);
    if (o->profile == XKV_PROFILE_SCALAR && (svd_only || (o->ratio <= 0 && o->error <= 0)))
        return "--profile scalar needs --ratio or --error";
    if (o->half_factors && (dict || (o->profile != XKV_PROFILE_AUTO && o->profile != XKV_PROFILE_SVD)))
        return "--half-factors goes with --profile svd";
    if (dict && o->profile != XKV_PROFILE_AUTO && o->profile != XKV_PROFILE_DICT)
        return "-D and --quality go with --profile dict or auto";
    if (dict && svd_only)
        return "a dictionary goes with --quality, --ratio or --error, not with ranks or --energy";
    if (dict && c->dict_path == NULL)
        return "--profile dict and --quality need a dictionary: -D, or XKV_DICT_PATH";
    return NULL;
}

static int count_targets(const xkv_pack_options *o)
{
    return (o->rank_k > 0) + (o->ratio > 0) + (o->error > 0) + (o->energy > 0) + (o->quality > 0);
}

bool cli_pack_asks(const xkv_pack_options *o)
{
    return count_targets(o) > 0 || o->rank_v > 0 || o->profile != XKV_PROFILE_AUTO || o->half_factors != 0;
}

const char *cli_pack_problem(const cli *c, const xkv_pack_options *o)
{
    const int targets = count_targets(o);
    if ((o->rank_k > 0) != (o->rank_v > 0))
        return "--rank-k and --rank-v go together";
    if (targets > 1)
        return "ranks, --ratio, --error, --energy and --quality exclude each other";
    if (targets > 0 && o->profile == XKV_PROFILE_LOSSLESS)
        return "a lossless entry has no rank, ratio, error, energy or quality";
    if (targets == 0 && o->profile == XKV_PROFILE_SVD)
        return "--profile svd needs --rank-k and --rank-v, --ratio, --error or --energy";
    return profile_problem(c, o);
}
