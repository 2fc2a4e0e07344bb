/* xkv_pack.c - engine files to entries. */
#include "cli.h"

#include <float.h>
#include <stdio.h>
#include <stdlib.h>

enum { OPT_APPEND = CLI_OPT_TOOL };

static const char letters[] = CLI_COMMON_LETTERS CLI_OUTPUT_LETTERS CLI_DICT_LETTERS CLI_PACK_LETTERS;
static const struct option long_options[] = {
    CLI_COMMON_OPTIONS,
    CLI_OUTPUT_OPTIONS,
    CLI_MODEL_OPTIONS,
    CLI_DICT_OPTIONS,
    CLI_PACK_OPTIONS,
    {"rope-base", required_argument, NULL, CLI_OPT_ROPE_BASE},
    {"rope-dim", required_argument, NULL, CLI_OPT_ROPE_DIM},
    {"rope-style", required_argument, NULL, CLI_OPT_ROPE_STYLE},
    {"rope-scale", required_argument, NULL, CLI_OPT_ROPE_SCALE},
    {"head-dim", required_argument, NULL, CLI_OPT_HEAD_DIM},
    {"append", required_argument, NULL, OPT_APPEND},
    CLI_END_OPTIONS,
};

static const char help[] =
    "Pack KV caches saved by llama.cpp, or as safetensors, into .xkv entries.\n"
    "Each FILE becomes FILE.xkv. Without FILE, or for -, standard input is packed to standard output.\n"
    "\n"
    "Codec:\n"
    "      --lossless        exact (the default without dictionary, rank, ratio, error, energy)\n"
    "  -D, --dictionary PATH trained dictionary (.xkvd), or a folder with one for the model\n"
    "                        [$XKV_DICT_PATH]\n"
    "      --profile NAME    auto (the best for a ratio or an error), lossless, svd (grouped\n"
    "                        cross-layer SVD), dict (dictionary) or scalar (each element) [auto]\n"
    "      --quality N       with a dictionary: 1 to 100; each 16 halve the step [50]\n"
    "      --group N         layers in a group [4]\n"
    "      --rank-k N        components of a full group of K planes (with --rank-v)\n"
    "      --rank-v N        components of a full group of V planes (with --rank-k)\n"
    "      --ratio R         raw 16-bit bytes / all bytes of the entry\n"
    "      --error E         relative error over all groups, 0 to 1: see xkv-pack(1)\n"
    "      --energy E        share of each group's sum of squares to keep, 0 to 1\n"
    "      --sinks N         exact tokens at the start [4]\n"
    "      --window N        exact tokens at the end [0]\n"
    "      --iterations N    power iterations of the SVD, 1 to 8 [2]\n"
    "  -1 .. -19             zstd level [4]\n"
    "      --half-factors    svd with --ratio or --error: SVD factors at 16 bits as published\n"
    "      --zstd-factors    compress 16-bit SVD factors with zstd too\n"
    "      --append ENTRY    FILE begins with the tokens of ENTRY: keep these as they are packed\n"
    "                        there, and code the others in the same way\n"
    "\n"
    "Model (lets all but lossless undo RoPE before K is coded):\n"
    "      --model FILE      GGUF file of the model; its header is enough\n"
    "      --fingerprint HEX identity of the model, 32 digits, instead of the GGUF's\n"
    "      --rope-base F     base of the RoPE frequencies\n"
    "      --rope-dim N      rotated dims of a head [all]\n"
    "      --rope-style NAME interleaved or half-split\n"
    "      --rope-scale F    factor on positions [1]\n"
    "      --head-dim N      dims of a head of K and V\n"
    "\n"
    "Files:\n"
    "  -o, --output FILE     write FILE (- for standard output)\n"
    "  -c, --stdout          write to standard output\n"
    "  -f, --force           overwrite outputs; write even to a terminal\n"
    "  -k, --keep            keep the inputs (default)\n"
    "      --rm              remove each input when its output is safe on disk\n"
    "\n"
    "General:\n"
    "  -T, --threads N       worker threads, 0 for all cores [0]\n"
    "  -M, --memory N        memory limit in bytes; suffixes K, M, G [none]\n"
    "      --json            one JSON object per file on standard output\n"
    "  -q, --quiet           errors only\n"
    "  -v, --verbose         more messages; twice: still more\n"
    "  -h, --help            this text\n"
    "  -V, --version         version\n"
    "\n"
    "Exit codes: 0 done, 1 failed, 2 usage, 3 bad input, 4 other model, 5 target out of reach,\n"
    "6 memory or limit, 130 interrupted. See xkv-pack(1).\n";

typedef struct pack_tool {
    xkv_pack_options options;
    xkv_rope_options rope;
    bool rope_given;    /* any --rope-* or --head-dim */
    const char *append; /* the entry of --append, or NULL */
    xkv_model *model;   /* of --model */
} pack_tool;

/* --- Options --------------------------------------------------------------------------------------------------------
 */

static bool take_rope_option(cli *c, xkv_rope_options *rope, int option, const char *value)
{
    static const char *const styles[] = {"interleaved", "half-split", NULL};
    uint32_t style;
    switch (option) {
    case CLI_OPT_ROPE_BASE:
        return cli_parse_double(c, "--rope-base", value, 0, DBL_MAX, &rope->base);
    case CLI_OPT_ROPE_DIM:
        return cli_parse_u32(c, "--rope-dim", value, 2, 2 * XKV_MAX_ROPE_PAIRS, &rope->dims);
    case CLI_OPT_ROPE_SCALE:
        return cli_parse_double(c, "--rope-scale", value, 0, DBL_MAX, &rope->linear_scale);
    case CLI_OPT_HEAD_DIM:
        return cli_parse_u32(c, "--head-dim", value, 1, XKV_MAX_WIDTH, &rope->head_dim);
    default:
        if (!cli_parse_choice(c, "--rope-style", value, styles, &style))
            return false;
        rope->style = (int32_t)style;
        return true;
    }
}

static bool take_option(cli *c, int option, const char *value)
{
    pack_tool *tool = c->user;
    switch (option) {
    case CLI_OPT_ROPE_BASE:
    case CLI_OPT_ROPE_DIM:
    case CLI_OPT_ROPE_STYLE:
    case CLI_OPT_ROPE_SCALE:
    case CLI_OPT_HEAD_DIM:
        tool->rope_given = true;
        return take_rope_option(c, &tool->rope, option, value);
    case OPT_APPEND:
        tool->append = value;
        return true;
    default:
        return cli_pack_option(c, option, value, &tool->options);
    }
}

static bool asks_for_loss(const xkv_pack_options *o)
{
    return o->profile > XKV_PROFILE_LOSSLESS || o->dict != NULL || o->rank_k > 0 || o->ratio > 0 || o->error > 0 ||
           o->energy > 0;
}

/* Whether one is used if it is there. */
static bool takes_dictionary(const cli *c, const xkv_pack_options *o)
{
    return cli_pack_needs_dict(c, o) || (o->profile == XKV_PROFILE_AUTO && (o->ratio > 0 || o->error > 0));
}

static bool check_options(cli *c)
{
    const pack_tool *tool = c->user;
    const char *problem = NULL;
    if (tool->append != NULL && cli_pack_asks(&tool->options))
        problem = "--append goes on with the codec of the entry: no profile, rank, ratio, error, energy or quality";
    else if (tool->append != NULL && c->input_count > 1)
        problem = "--append takes one FILE";
    else
        problem = cli_pack_problem(c, &tool->options);
    if (problem == NULL && tool->rope_given && c->model_path == NULL &&
        (tool->rope.base <= 0 || tool->rope.head_dim == 0 || tool->rope.style < 0))
        problem = "a model without --model needs --rope-base, --rope-style and --head-dim";
    if (problem != NULL)
        cli_error(c, "%s", problem);
    return problem == NULL;
}

static cli_exit begin(cli *c)
{
    pack_tool *tool = c->user;
    if (tool->rope_given && c->model_path == NULL && tool->rope.dims == 0)
        tool->rope.dims = tool->rope.head_dim;
    tool->options.progress = cli_progress;
    tool->options.progress_user = c;
    return cli_model_load(c, tool->rope_given ? &tool->rope : NULL, &tool->model);
}

static void end(cli *c)
{
    pack_tool *tool = c->user;
    xkv_model_free(c->ctx, tool->model);
}

/* --- Results --------------------------------------------------------------------------------------------------------
 */

static bool has_kind(const xkv_geometry *g, uint32_t kind)
{
    for (uint32_t i = 0; i < g->plane_count; i++) {
        if (g->planes[i].kind == kind)
            return true;
    }
    return false;
}

static void note_warnings(cli *c, const char *name, const xkv_cache *cache, const xkv_pack_report *r)
{
    const pack_tool *tool = c->user;
    const xkv_geometry *g = xkv_cache_geometry(cache);
    if (xkv_cache_framing(cache)->engine == XKV_ENGINE_OPAQUE)
        cli_note(c, "%s: warning: not a known engine file; stored byte for byte", name);
    if (asks_for_loss(&tool->options) && has_kind(g, XKV_PLANE_K) && g->rope_count == 0)
        cli_note(c, "%s: warning: K is coded as rotated, at a worse ratio; give --model", name);
    if (r->nonfinite_planes > 0)
        cli_note(c, "%s: warning: %u planes hold NaN or Inf and are stored losslessly", name, r->nonfinite_planes);
    if (r->fallback_groups > 0)
        cli_note(c, "%s: warning: %s %u of %u groups; they are stored losslessly", name,
                 r->step > 0 ? "no step suits" : "svd would not shrink", r->fallback_groups, r->group_count);
    if (r->profile == XKV_PROFILE_DICT && r->component_total == 0 && g->token_count > 0 && r->nonfinite_planes == 0 &&
        r->fallback_groups == 0)
        cli_note(c, "%s: warning: the dictionary has no basis for these planes%s; they are stored losslessly", name,
                 g->rope_count == 0 ? " (without --model)" : "");
}

/* The rounding of a dictionary's components, made for its finest quality, would outweigh that of finer coefficients. */
static void warn_quality(cli *c, const char *name)
{
    const pack_tool *tool = c->user;
    xkv_dict_info info;
    if (tool->options.dict == NULL)
        return;
    xkv_dict_get_info(tool->options.dict, &info);
    if (tool->options.quality > info.max_quality && info.max_quality > 0)
        cli_note(c, "%s: warning: the dictionary was trained for qualities up to %g; %g costs more than it gives", name,
                 info.max_quality, tool->options.quality);
}

/* "profile svd for 786 KiB; dict 321 KiB, scalar 1.4 MiB", or with errors: what auto chose, and among what. */
static void note_choice(cli *c, const char *name, const xkv_pack_report *r)
{
    const pack_tool *tool = c->user;
    char text[256];
    size_t n = 0;
    text[0] = '\0';
    for (uint32_t i = XKV_PROFILE_LOSSLESS; cli_profiles[i] != NULL && n < sizeof text; i++) {
        const xkv_profile_estimate *e = &r->estimates[i];
        char error[32];
        snprintf(error, sizeof error, "error %.4f", e->error);
        if (e->bytes > 0)
            n += (size_t)snprintf(text + n, sizeof text - n, "%s%s %s", n > 0 ? ", " : "", cli_profiles[i],
                                  tool->options.ratio > 0 ? error : cli_size_text((uint64_t)e->bytes).text);
    }
    if (n > 0)
        cli_note(c, "%s: profile %s is the best by a sample: %s", name, cli_profiles[r->profile], text);
}

static json_t *estimates_json(const xkv_pack_report *r)
{
    json_t *object = json_object();
    for (uint32_t i = XKV_PROFILE_LOSSLESS; cli_profiles[i] != NULL; i++) {
        const xkv_profile_estimate *e = &r->estimates[i];
        if (e->bytes > 0)
            json_object_set_new(object, cli_profiles[i],
                                json_pack("{s:I, s:f}", "bytes", (json_int_t)e->bytes, "error", e->error));
    }
    return object;
}

/* "error K 0.031 V 0.054", or "lossless". */
static cli_text error_text(const xkv_geometry *g, const xkv_pack_report *r)
{
    cli_text t = {"lossless"};
    if (r->lossless_groups == r->group_count)
        return t;
    size_t n = (size_t)snprintf(t.text, sizeof t.text, "error");
    for (uint32_t kind = 0; kind <= XKV_PLANE_LATENT && n < sizeof t.text; kind++) {
        if (has_kind(g, kind))
            n += (size_t)snprintf(t.text + n, sizeof t.text - n, " %s %.4f", xkv_plane_kind_name(kind), r->error[kind]);
    }
    return t;
}

/* "step 0.0123, metric error 0.0912, 3021 of 11520 components, dictionary 0011aabb, " for quantized entries; without a
 * metric and a dictionary, those of other profiles, and without an error, if they were appended to. */
static void coded_text(const pack_tool *tool, const xkv_pack_report *r, char *text, size_t size)
{
    xkv_dict_info info;
    size_t n;
    text[0] = '\0';
    if (r->component_total == 0)
        return;
    n = (size_t)snprintf(text, size, "step %.4g, ", r->step);
    if (r->error_metric > 0)
        n += (size_t)snprintf(text + n, size - n, "%s%.4f, ",
                              r->profile == XKV_PROFILE_DICT ? "metric error " : "error ", r->error_metric);
    n += (size_t)snprintf(text + n, size - n, "%u of %u components, ", r->components, r->component_total);
    if (r->profile != XKV_PROFILE_DICT)
        return;
    xkv_dict_get_info(tool->options.dict, &info);
    snprintf(text + n, size - n, "dictionary %.8s, ", cli_hex_text(info.id, 16).text);
}

static void add_coded_json(json_t *object, const pack_tool *tool, const xkv_pack_report *r)
{
    xkv_dict_info info;
    if (r->component_total == 0)
        return;
    json_object_set_new(object, "step", json_real(r->step));
    json_object_set_new(object, "error_metric", json_real(r->error_metric));
    json_object_set_new(object, "components", json_integer(r->components));
    json_object_set_new(object, "component_total", json_integer(r->component_total));
    if (r->profile != XKV_PROFILE_DICT)
        return;
    xkv_dict_get_info(tool->options.dict, &info);
    json_object_set_new(object, "dictionary_id", json_string(cli_hex_text(info.id, 16).text));
    json_object_set_new(object, "dictionary_bytes", json_integer((json_int_t)info.file_size));
}

static void print_json(const pack_tool *tool, const cli_input *input, const cli_output *output, const xkv_geometry *g,
                       const xkv_pack_report *r, double seconds)
{
    json_t *errors = json_object();
    for (uint32_t kind = 0; kind <= XKV_PLANE_K_ROPE; kind++) {
        if (has_kind(g, kind))
            json_object_set_new(errors, xkv_plane_kind_name(kind), json_real(r->error[kind]));
    }
    json_t *object = json_pack(
        "{s:o, s:b, s:o, s:i, s:I, s:I, s:I, s:f, s:o, s:i, s:i, s:i, s:i, s:f}", "file", cli_json_string(input->name),
        "ok", 1, "output", cli_json_string(output->name), "tokens", (int)g->token_count, "raw_bytes",
        (json_int_t)r->raw_bytes, "raw16_bytes", (json_int_t)r->raw16_bytes, "entry_bytes", (json_int_t)r->entry_bytes,
        "ratio", r->ratio, "error", errors, "groups", (int)r->group_count, "lossless_groups", (int)r->lossless_groups,
        "fallback_groups", (int)r->fallback_groups, "nonfinite_planes", (int)r->nonfinite_planes, "seconds", seconds);
    json_object_set_new(object, "profile", json_string(cli_profiles[r->profile]));
    json_object_set_new(object, "estimates", estimates_json(r));
    add_coded_json(object, tool, r);
    cli_json_print(object);
}

static void print_result(cli *c, const cli_input *input, const cli_output *output, const xkv_cache *cache,
                         const xkv_pack_report *r, double seconds)
{
    const pack_tool *tool = c->user;
    const xkv_geometry *g = xkv_cache_geometry(cache);
    uint64_t file_size;
    char coded[128];
    xkv_cache_data(cache, &file_size);
    note_warnings(c, input->name, cache, r);
    warn_quality(c, input->name);
    note_choice(c, input->name, r);
    coded_text(tool, r, coded, sizeof coded);
    /* A file without tensors has no ratio of its own. */
    double ratio = r->raw16_bytes > 0 ? r->ratio : (double)file_size / (double)r->entry_bytes;
    cli_note(c, "%s: %s -> %s (%.2fx), %s%s, %.2f s", input->name,
             cli_size_text(r->raw_bytes > 0 ? r->raw_bytes : file_size).text, cli_size_text(r->entry_bytes).text, ratio,
             coded, error_text(g, r).text, seconds);
    if (c->verbosity >= 2 && r->profile == XKV_PROFILE_DICT) {
        xkv_dict_info info;
        xkv_dict_get_info(tool->options.dict, &info);
        cli_note(c, "%s: dictionary %s, %s, %u groups, %u components", input->name, cli_hex_text(info.id, 16).text,
                 cli_size_text(info.file_size).text, cli_dict_groups(&info), info.component_count);
    }
    if (c->verbosity >= 2)
        cli_note(c, "%s: %u tokens, %u layers, %u groups (%u lossless), %s, peak memory %s", input->name,
                 g->token_count, g->layer_count, r->group_count, r->lossless_groups,
                 xkv_engine_name(xkv_cache_framing(cache)->engine), cli_size_text(xkv_ctx_memory_peak(c->ctx)).text);
    if (c->json)
        print_json(tool, input, output, g, r, seconds);
}

/* --- One file -------------------------------------------------------------------------------------------------------
 */

/* A model given by options has as many layers as the file, so the file is opened twice. */
static xkv_status open_with_options(cli *c, const char *path, xkv_model **model_p, xkv_cache **cache_p)
{
    const pack_tool *tool = c->user;
    xkv_status status = xkv_cache_open(c->ctx, path, NULL, cache_p);
    if (status != XKV_OK || xkv_cache_geometry(*cache_p)->layer_count == 0)
        return status;
    status = xkv_model_from_options(c->ctx, xkv_cache_geometry(*cache_p)->layer_count, &tool->rope, model_p);
    if (status != XKV_OK)
        return status;
    cli_model_mark(c, *model_p);
    xkv_cache_free(c->ctx, *cache_p);
    *cache_p = NULL;
    return xkv_cache_open(c->ctx, path, *model_p, cache_p);
}

/* A file without planes is carried as it is, whatever else was asked for. */
static xkv_pack_options options_for(const pack_tool *tool, const xkv_cache *cache)
{
    xkv_pack_options o = tool->options;
    if (xkv_cache_geometry(cache)->plane_count > 0)
        return o;
    o.profile = XKV_PROFILE_LOSSLESS;
    o.rank_k = o.rank_v = 0;
    o.ratio = o.error = o.energy = o.quality = 0;
    return o;
}

static cli_exit pack_whole(cli *c, const cli_input *input, const xkv_model *model, const xkv_cache *cache,
                           const xkv_output *sink, xkv_pack_report *report)
{
    xkv_pack_options options = options_for(c->user, cache);
    xkv_model bare;
    options.model = model != NULL ? model : cli_model_bare(c, &bare);
    xkv_status status = xkv_pack_cache(c->ctx, cache, &options, sink, report);
    return status == XKV_OK ? CLI_OK : cli_fail(c, input->name, status);
}

static cli_exit append_to(cli *c, const cli_input *input, xkv_entry *entry, const xkv_cache *cache,
                          const xkv_output *sink, xkv_pack_report *report)
{
    pack_tool *tool = c->user;
    xkv_append_options o = xkv_append_options_default();
    cli_exit code = cli_dict_attach(c, tool->append, entry, true);
    if (code != CLI_OK)
        return code;
    tool->options.dict = c->dict;
    o.zstd_level = tool->options.zstd_level;
    o.writer = tool->options.writer;
    o.progress = tool->options.progress;
    o.progress_user = tool->options.progress_user;
    xkv_status status = xkv_append_cache(c->ctx, entry, cache, &o, sink, report);
    return status == XKV_OK ? CLI_OK : cli_fail(c, input->name, status);
}

/* What is new in a cache, behind the entry of --append. */
static cli_exit pack_rest(cli *c, const cli_input *input, const xkv_cache *cache, const xkv_output *sink,
                          xkv_pack_report *report)
{
    pack_tool *tool = c->user;
    xkv_input file = {0};
    xkv_entry *entry = NULL;
    xkv_status status = xkv_input_open(c->ctx, tool->append, &file);
    if (status == XKV_OK)
        status = xkv_entry_open(c->ctx, &file, &entry);
    cli_exit code =
        status == XKV_OK ? append_to(c, input, entry, cache, sink, report) : cli_fail(c, tool->append, status);
    xkv_entry_close(c->ctx, entry);
    xkv_input_close(c->ctx, &file);
    return code;
}

static cli_exit pack_cache(cli *c, const cli_input *input, const xkv_model *model, const xkv_cache *cache)
{
    const pack_tool *tool = c->user;
    xkv_pack_report report;
    cli_output output = {0};
    double start = cli_seconds();
    char path[4096 + 8];
    if ((size_t)snprintf(path, sizeof path, "%s.xkv", input->name) >= sizeof path) {
        cli_error(c, "%s: the name is too long", input->name);
        return CLI_FAILED;
    }
    cli_exit code = cli_output_open(c, input, path, &output);
    if (code == CLI_OK) {
        xkv_output sink = xkv_file_output(output.file);
        code = tool->append != NULL ? pack_rest(c, input, cache, &sink, &report)
                                    : pack_whole(c, input, model, cache, &sink, &report);
    }
    if (code == CLI_OK)
        code = cli_output_commit(c, input, &output);
    if (code == CLI_OK)
        print_result(c, input, &output, cache, &report, cli_seconds() - start);
    cli_output_abort(c, &output);
    return code;
}

/* Set the dictionary that this cache is packed with, if any. */
static cli_exit choose_dictionary(cli *c, const cli_input *input, const xkv_model *model, const xkv_cache *cache)
{
    pack_tool *tool = c->user;
    uint32_t layers = xkv_cache_geometry(cache)->layer_count;
    xkv_model bare;
    cli_exit code = CLI_OK;
    tool->options.dict = NULL;
    if (layers == 0 || c->dict_path == NULL || tool->append != NULL || !takes_dictionary(c, &tool->options))
        return CLI_OK;
    if (model == NULL)
        model = cli_model_bare(c, &bare);
    code = cli_dict_choose(c, input->name, model, layers, cli_pack_needs_dict(c, &tool->options));
    tool->options.dict = c->dict;
    return code;
}

static cli_exit process(cli *c, const char *path)
{
    pack_tool *tool = c->user;
    cli_input input;
    xkv_model *model = NULL; /* of this file */
    xkv_cache *cache = NULL;
    cli_exit code = cli_input_open(c, path, &input);
    if (code == CLI_OK) {
        xkv_status status = tool->rope_given && tool->model == NULL
                                ? open_with_options(c, input.path, &model, &cache)
                                : xkv_cache_open(c->ctx, input.path, tool->model, &cache);
        const xkv_model *known = model != NULL ? model : tool->model;
        code = status == XKV_OK ? choose_dictionary(c, &input, known, cache) : cli_fail(c, input.name, status);
        if (code == CLI_OK)
            code = pack_cache(c, &input, known, cache);
    }
    xkv_cache_free(c->ctx, cache);
    xkv_model_free(c->ctx, model);
    cli_input_close(&input);
    return code;
}

int main(int argc, char **argv)
{
    static const cli_tool tool = {
        .name = "xkv-pack",
        .usage = "Usage: xkv-pack [options] [FILE...]",
        .help = help,
        .letters = letters,
        .options = long_options,
        .option = take_option,
        .check = check_options,
        .begin = begin,
        .end = end,
        .process = process,
    };
    pack_tool state = {.options = xkv_pack_options_default(), .rope = xkv_rope_options_default()};
    char writer[64];
    snprintf(writer, sizeof writer, "xkv-pack %s", xkv_version());
    state.options.writer = writer;
    return cli_main(&tool, &state, argc, argv);
}
