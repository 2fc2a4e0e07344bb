/* xkv_train.c - caches of one model to a dictionary. */
#include "cli.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { OPT_METRIC = CLI_OPT_TOOL, OPT_GROUP, OPT_CROSS, OPT_APART, OPT_MAX_QUALITY, OPT_SINKS, OPT_VALIDATE };

enum { DEFAULT_QUALITY = 50, FIRST_QUALITY = 30, QUALITY_STEP = 10 };

/* As the packer decides: a component is coded when that lowers squared error + LAMBDA * step^2 * bits. */
#define LAMBDA 0.06

static const char letters[] = CLI_COMMON_LETTERS "o:f";
static const struct option long_options[] = {
    CLI_COMMON_OPTIONS,
    CLI_MODEL_OPTIONS,
    {"output", required_argument, NULL, 'o'},
    {"force", no_argument, NULL, 'f'},
    {"metric", required_argument, NULL, OPT_METRIC},
    {"group", required_argument, NULL, OPT_GROUP},
    {"cross", required_argument, NULL, OPT_CROSS},
    {"apart", no_argument, NULL, OPT_APART},
    {"max-quality", required_argument, NULL, OPT_MAX_QUALITY},
    {"sinks", required_argument, NULL, OPT_SINKS},
    {"validate", required_argument, NULL, OPT_VALIDATE},
    CLI_END_OPTIONS,
};

static const char help[] = "Train a dictionary (.xkvd) on KV caches of one model, for xkv-pack -D.\n"
                           "\n"
                           "  -o, --output FILE     write FILE (- for standard output)\n"
                           "      --model FILE      GGUF file of the model; its header is enough\n"
                           "      --fingerprint HEX identity of the model, 32 digits, instead of the GGUF's\n"
                           "      --metric FILE     safetensors file with what errors cost (k_metric, v_metric)\n"
                           "      --group N         layers in a group [4]\n"
                           "      --cross N         leading coefficients of each group to code together in a stage\n"
                           "                        over all groups: better, but slower to restore; 0: none [192]\n"
                           "      --apart           K and V in groups of their own; worse at equal size\n"
                           "      --max-quality Q   finest quality that the dictionary is stored for, 1 to 100 [85]\n"
                           "      --sinks N         tokens at the start of each cache to leave out [4]\n"
                           "      --validate FILE   cache that was not trained on, to try the dictionary with\n"
                           "  -f, --force           overwrite the output; write even to a terminal\n"
                           "\n"
                           "General:\n"
                           "  -T, --threads N       worker threads, 0 for all cores [0]\n"
                           "  -M, --memory N        memory limit in bytes; suffixes K, M, G [none]\n"
                           "      --json            the report as one JSON object on standard output\n"
                           "  -q, --quiet           errors only\n"
                           "  -v, --verbose         the spectrum of each group too\n"
                           "  -h, --help            this text\n"
                           "  -V, --version         version\n"
                           "\n"
                           "Exit codes: 0 done, 1 failed, 2 usage, 3 bad input, 4 other model, 6 memory or limit,\n"
                           "130 interrupted. See xkv-train(1).\n";

/* A cache that was named. */
typedef struct named_cache {
    cli_input input;
    xkv_cache *cache;
} named_cache;

typedef struct train_tool {
    xkv_train_options options;
    const char *metric_path, *validate_path;
    xkv_model *model;
    xkv_metric *metric;
    named_cache *caches; /* [count] */
    uint32_t count;
    named_cache validation; /* without a cache: the last one of `caches` */
    uint64_t raw_bytes;     /* of all caches */
} train_tool;

/* --- Options --------------------------------------------------------------------------------------------------------
 */

static bool take_option(cli *c, int option, const char *value)
{
    train_tool *tool = c->user;
    xkv_train_options *o = &tool->options;
    switch (option) {
    case OPT_METRIC:
        tool->metric_path = value;
        return true;
    case OPT_VALIDATE:
        tool->validate_path = value;
        return true;
    case OPT_GROUP:
        return cli_parse_u32(c, "--group", value, 1, XKV_MAX_LAYERS, &o->group_layers);
    case OPT_CROSS:
        return cli_parse_u32(c, "--cross", value, 0, XKV_MAX_WIDTH, &o->cross);
    case OPT_SINKS:
        return cli_parse_u32(c, "--sinks", value, 0, XKV_MAX_TOKENS, &o->sinks);
    case OPT_MAX_QUALITY:
        return cli_parse_quality(c, "--max-quality", value, &o->max_quality);
    default:
        o->apart = 1;
        return true;
    }
}

static bool check_options(cli *c)
{
    const char *problem = NULL;
    if (c->output == NULL)
        problem = "name the dictionary by -o";
    else if (c->input_count == 0)
        problem = "name caches to train on";
    if (problem != NULL)
        cli_error(c, "%s", problem);
    return problem == NULL;
}

/* The library counts rows, a user thinks in bytes; every byte is read twice. */
static int on_progress(void *user, uint64_t done, uint64_t total)
{
    cli *c = user;
    const train_tool *tool = c->user;
    double share = total > 0 ? (double)done / (double)total : 1;
    return cli_progress(c, (uint64_t)(share * (double)tool->raw_bytes), tool->raw_bytes);
}

static cli_exit begin(cli *c)
{
    train_tool *tool = c->user;
    tool->options.progress = on_progress;
    tool->options.progress_user = c;
    cli_exit code = cli_model_load(c, NULL, &tool->model);
    if (code != CLI_OK || tool->metric_path == NULL)
        return code;
    xkv_status status = xkv_metric_open(c->ctx, tool->metric_path, &tool->metric);
    tool->options.metric = tool->metric;
    return status == XKV_OK ? CLI_OK : cli_fail(c, tool->metric_path, status);
}

static void close_cache(cli *c, named_cache *n)
{
    xkv_cache_free(c->ctx, n->cache);
    n->cache = NULL;
    cli_input_close(&n->input);
}

static void end(cli *c)
{
    train_tool *tool = c->user;
    for (uint32_t i = 0; i < tool->count; i++)
        close_cache(c, &tool->caches[i]);
    close_cache(c, &tool->validation);
    free(tool->caches);
    xkv_metric_free(c->ctx, tool->metric);
    xkv_model_free(c->ctx, tool->model);
}

/* --- Inputs ---------------------------------------------------------------------------------------------------------
 */

static bool same_planes(const xkv_cache *a, const xkv_cache *b)
{
    const xkv_geometry *x = xkv_cache_geometry(a), *y = xkv_cache_geometry(b);
    return x->plane_count == y->plane_count && memcmp(x->planes, y->planes, x->plane_count * sizeof *x->planes) == 0;
}

static cli_exit open_cache(cli *c, const char *path, named_cache *n)
{
    const train_tool *tool = c->user;
    const named_cache *first = &tool->caches[0];
    cli_exit code = cli_input_open(c, path, &n->input);
    if (code != CLI_OK)
        return code;
    if (!cli_distinct(c, &n->input, c->output))
        return CLI_USAGE;
    xkv_status status = xkv_cache_open(c->ctx, n->input.path, tool->model, &n->cache);
    if (status != XKV_OK)
        return cli_fail(c, n->input.name, status);
    if (xkv_cache_geometry(n->cache)->plane_count == 0) {
        cli_error(c, "%s: holds no cache that is understood", n->input.name);
        return CLI_BAD_INPUT;
    }
    if (!same_planes(n->cache, first->cache)) {
        cli_error(c, "%s: has other layers, widths or types than %s", n->input.name, first->input.name);
        return CLI_MISMATCH;
    }
    return CLI_OK;
}

static cli_exit open_caches(cli *c, uint32_t count, char **paths)
{
    train_tool *tool = c->user;
    tool->caches = calloc(count, sizeof *tool->caches);
    if (tool->caches == NULL)
        return cli_fail(c, c->output, XKV_ERROR_MEMORY);
    for (uint32_t i = 0; i < count; i++) {
        tool->count = i + 1; /* closed even when it was opened in part */
        cli_exit code = open_cache(c, paths[i], &tool->caches[i]);
        if (code != CLI_OK)
            return code;
        tool->raw_bytes += xkv_geometry_raw_bytes(xkv_cache_geometry(tool->caches[i].cache));
    }
    return tool->validate_path != NULL ? open_cache(c, tool->validate_path, &tool->validation) : CLI_OK;
}

static void warn_without_model(cli *c)
{
    const train_tool *tool = c->user;
    const xkv_geometry *g = xkv_cache_geometry(tool->caches[0].cache);
    for (uint32_t i = 0; i < g->plane_count; i++)
        if (g->planes[i].kind == XKV_PLANE_K && g->planes[i].rope != XKV_NO_ROPE)
            return;
    if (g->planes[0].kind == XKV_PLANE_K)
        cli_note(c, "warning: K is trained on as rotated, at a worse ratio; give --model");
}

/* --- Expectations ---------------------------------------------------------------------------------------------------
 */

/* What packing at one quality should give. */
typedef struct expectation {
    double quality, step, ratio, error;
    uint32_t components; /* that are coded */
} expectation;

/* Bits and squared error, in steps, of a normal deviate of deviation `s` rounded to whole steps. */
static void quantized_normal(double s, double *bits, double *square)
{
    *bits = log2(s) + 0.5 * log2(2 * 3.14159265358979323846 * 2.71828182845904523536);
    *square = 1.0 / 12;
    if (s > 8) /* both limits are as good as reached */
        return;
    *bits = 0;
    *square = s * s; /* E(x - k)^2 = s^2 + sum over k of k^2 P(k) - 2 k E(x, k) */
    for (int k = 0; k < 12 * s + 2; k++) {
        double low = (k - 0.5) / s, high = (k + 0.5) / s, both = k == 0 ? 1 : 2;
        double p = 0.5 * (erfc(low / sqrt(2)) - erfc(high / sqrt(2)));
        double x = s * (exp(-low * low / 2) - exp(-high * high / 2)) / sqrt(2 * 3.14159265358979323846);
        *bits -= p > 0 ? both * p * log2(p) : 0;
        *square += both * k * (k * p - 2 * x);
    }
}

static expectation expect(const xkv_dict *dict, const xkv_dict_info *info, double quality)
{
    expectation e = {.quality = quality, .step = xkv_dict_step(dict, quality)};
    double total_bits = 0, squares = 0, energy = 0;
    for (uint32_t g = 0; g < info->group_count; g++) {
        uint32_t count;
        const float *sigma = xkv_dict_sigma(dict, g, &count);
        for (uint32_t i = xkv_dict_leading(dict, g); i < count; i++) {
            double s = (double)sigma[i] / e.step, bits = 0, square = s * s;
            energy += square;
            if (s > 0)
                quantized_normal(s, &bits, &square);
            bool coded = s > 0 && square + LAMBDA * bits < s * s;
            e.components += coded;
            total_bits += coded ? bits : 0;
            squares += coded ? square : s * s;
        }
    }
    e.ratio = total_bits > 0 ? 16.0 * info->component_count / total_bits : 0;
    e.error = energy > 0 ? sqrt(squares / energy) : 0;
    return e;
}

/* Stored tokens at which what they save has paid for the dictionary; 0: never. */
static uint64_t break_even(const xkv_dict_info *info, const expectation *e)
{
    double saved = e->ratio > 1 ? 2.0 * info->component_count * (1 - 1 / e->ratio) : 0; /* bytes a token */
    return saved > 0 ? (uint64_t)ceil((double)info->file_size / saved) : 0;
}

/* --- Validation -----------------------------------------------------------------------------------------------------
 */

typedef struct validation {
    const named_cache *on;
    bool trained_on;
    xkv_pack_report report;
} validation;

static xkv_status drop(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    (void)user, (void)ctx, (void)offset, (void)src, (void)size;
    return XKV_OK;
}

/* Pack at the default quality, to nowhere. */
static cli_exit validate(cli *c, const xkv_dict *dict, validation *v)
{
    train_tool *tool = c->user;
    xkv_pack_options o = xkv_pack_options_default();
    const xkv_output nowhere = {.write = drop};
    v->trained_on = tool->validation.cache == NULL;
    v->on = v->trained_on ? &tool->caches[tool->count - 1] : &tool->validation;
    o.dict = dict;
    o.quality = DEFAULT_QUALITY;
    o.sinks = tool->options.sinks;
    xkv_status status = xkv_pack_cache(c->ctx, v->on->cache, &o, &nowhere, &v->report);
    return status == XKV_OK ? CLI_OK : cli_fail(c, v->on->input.name, status);
}

/* --- Report ---------------------------------------------------------------------------------------------------------
 */

typedef struct train_report {
    const char *name; /* of the dictionary */
    const xkv_dict *dict;
    xkv_dict_info info;
    validation v;
    double seconds;
} train_report;

static uint32_t widest_group(const train_report *r)
{
    uint32_t widest = 0, count;
    for (uint32_t g = 0; g < cli_dict_groups(&r->info); g++) {
        xkv_dict_sigma(r->dict, g, &count);
        widest = count > widest ? count : widest;
    }
    return widest;
}

static void warn_few_tokens(cli *c, const train_report *r)
{
    uint32_t width = widest_group(r);
    if (r->info.tokens < 2ull * width)
        cli_note(c,
                 "warning: %" PRIu64 " training tokens are few for bases %u wide; from %" PRIu64
                 " on the figures below hold for other texts",
                 r->info.tokens, width, 2 * (uint64_t)width);
}

/* From 30 in tens to the finest quality; false behind that. */
static bool next_quality(double *quality, double finest)
{
    bool more = *quality < finest;
    *quality = fmin(*quality + QUALITY_STEP, finest);
    return more;
}

static void print_qualities(FILE *to, const train_report *r)
{
    fprintf(to, "  %7s %10s %16s %9s %9s\n", "Quality", "Step", "Components", "Ratio", "Error");
    double q = fmin(FIRST_QUALITY, r->info.max_quality);
    do {
        expectation e = expect(r->dict, &r->info, q);
        fprintf(to, "  %7g %10.4g %9u/%-6u %9.2f %9.4f\n", q, e.step, e.components, r->info.component_count, e.ratio,
                e.error);
    } while (next_quality(&q, r->info.max_quality));
}

/* How many components hold shares of the energy of each group. */
static void print_spectrum(FILE *to, const train_report *r)
{
    static const double shares[] = {0.5, 0.9, 0.99, 0.999};
    fprintf(to, "  %5s %7s %10s %7s %7s %7s %7s\n", "Group", "Width", "Sigma", "50 %", "90 %", "99 %", "99.9 %");
    for (uint32_t g = 0; g < r->info.group_count; g++) {
        uint32_t count, j = 0;
        const float *sigma = xkv_dict_sigma(r->dict, g, &count);
        double energy = 0, sum = 0;
        for (uint32_t i = 0; i < count; i++)
            energy += (double)sigma[i] * (double)sigma[i];
        fprintf(to, "  %5u %7u %10.4g", g, count, count > 0 ? (double)sigma[0] : 0);
        for (size_t s = 0; s < sizeof shares / sizeof *shares; s++) {
            for (; j < count && sum < shares[s] * energy; j++)
                sum += (double)sigma[j] * (double)sigma[j];
            fprintf(to, " %7u", j);
        }
        fputc('\n', to);
    }
}

static void print_report(cli *c, const train_report *r, bool to_stdout)
{
    FILE *to = to_stdout ? stderr : stdout; /* the dictionary itself may go there */
    expectation e = expect(r->dict, &r->info, DEFAULT_QUALITY);
    uint32_t count = ((const train_tool *)c->user)->count;
    char cross[64] = "";
    if (r->info.cross_components > 0)
        snprintf(cross, sizeof cross, ", cross stage of %u components", r->info.cross_components);
    cli_note(c, "%s: %" PRIu64 " tokens of %u cache%s, %u groups%s -> %s, %.2f s", r->name, r->info.tokens, count,
             count == 1 ? "" : "s", cli_dict_groups(&r->info), cross, cli_size_text(r->info.file_size).text,
             r->seconds);
    warn_few_tokens(c, r);
    if (c->verbosity < 1 || c->json)
        return;
    fprintf(to, "dictionary %s\n", cli_hex_text(r->info.id, 16).text);
    print_qualities(to, r);
    fprintf(to, "quality %d: expected ratio %.2f, error %.4f on long prompts like those trained on\n", DEFAULT_QUALITY,
            e.ratio, e.error);
    char visible[1024];
    cli_printable(visible, sizeof visible, r->v.on->input.name);
    fprintf(to, "quality %d: measured ratio %.2f, error %.4f on %s (%u tokens, %s)\n", DEFAULT_QUALITY,
            r->v.report.ratio, r->v.report.error_metric, visible, xkv_cache_geometry(r->v.on->cache)->token_count,
            r->v.trained_on ? "trained on" : "not trained on");
    fprintf(to, "pays for itself from %" PRIu64 " stored tokens on\n", break_even(&r->info, &e));
    if (c->verbosity >= 2)
        print_spectrum(to, r);
}

static json_t *qualities_json(const train_report *r)
{
    json_t *list = json_array();
    double q = fmin(FIRST_QUALITY, r->info.max_quality);
    do {
        expectation e = expect(r->dict, &r->info, q);
        json_array_append_new(list, json_pack("{s:f, s:f, s:i, s:f, s:f}", "quality", q, "step", e.step, "components",
                                              (int)e.components, "ratio", e.ratio, "error", e.error));
    } while (next_quality(&q, r->info.max_quality));
    return list;
}

static void print_json(const cli *c, const train_report *r)
{
    const train_tool *tool = c->user;
    expectation e = expect(r->dict, &r->info, DEFAULT_QUALITY);
    json_t *tried = json_pack("{s:o, s:b, s:i, s:i, s:f, s:f, s:f, s:f, s:i}", "file",
                              cli_json_string(r->v.on->input.name), "trained_on", (int)r->v.trained_on, "quality",
                              DEFAULT_QUALITY, "tokens", (int)xkv_cache_geometry(r->v.on->cache)->token_count, "ratio",
                              r->v.report.ratio, "error", r->v.report.error_metric, "expected_ratio", e.ratio,
                              "expected_error", e.error, "components", (int)r->v.report.components);
    cli_json_print(json_pack("{s:o, s:b, s:o, s:i, s:I, s:i, s:i, s:i, s:i, s:f, s:f, s:I, s:I, s:o, s:o, s:f}", "file",
                             cli_json_string(r->name), "ok", 1, "id", json_string(cli_hex_text(r->info.id, 16).text),
                             "caches", (int)tool->count, "tokens", (json_int_t)r->info.tokens, "groups",
                             (int)cli_dict_groups(&r->info), "cross_components", (int)r->info.cross_components,
                             "components", (int)r->info.component_count, "width", (int)widest_group(r), "unit",
                             r->info.unit, "max_quality", r->info.max_quality, "dictionary_bytes",
                             (json_int_t)r->info.file_size, "break_even_tokens", (json_int_t)break_even(&r->info, &e),
                             "qualities", qualities_json(r), "validation", tried, "seconds", r->seconds));
}

/* --- Training -------------------------------------------------------------------------------------------------------
 */

/* The library counts caches; a user has named files. */
static cli_exit fail_training(cli *c, const cli_output *output, xkv_status status)
{
    const train_tool *tool = c->user;
    unsigned index;
    if (status != XKV_ERROR_ARGUMENT)
        return cli_fail(c, output->name, status);
    bool numbered = sscanf(xkv_ctx_error(c->ctx), "cache %u ", &index) == 1 && index < tool->count;
    cli_error(c, "%s: %s", numbered ? tool->caches[index].input.name : output->name, xkv_ctx_error(c->ctx));
    return CLI_BAD_INPUT; /* the options have been checked */
}

static xkv_status train(cli *c, xkv_file *file)
{
    const train_tool *tool = c->user;
    xkv_output output = xkv_file_output(file);
    const xkv_cache **list = calloc(tool->count, sizeof *list);
    if (list == NULL)
        return XKV_ERROR_MEMORY;
    for (uint32_t i = 0; i < tool->count; i++)
        list[i] = tool->caches[i].cache;
    xkv_status status = xkv_train(c->ctx, list, tool->count, &tool->options, &output);
    free(list);
    cli_progress_end(c);
    return status;
}

/* Train into `output`, and try what came out before it appears. */
static cli_exit make_dictionary(cli *c, cli_output *output, train_report *r)
{
    double start = cli_seconds();
    xkv_dict *dict = NULL;
    xkv_status status = train(c, output->file);
    if (status != XKV_OK)
        return fail_training(c, output, status);
    xkv_input input = xkv_file_input(output->file);
    status = xkv_dict_open(c->ctx, &input, 1, &dict);
    c->dict = dict; /* closed with the tool */
    if (status != XKV_OK)
        return cli_fail(c, output->name, status);
    r->name = output->name;
    r->dict = dict;
    xkv_dict_get_info(dict, &r->info);
    cli_exit code = validate(c, dict, &r->v);
    if (code == CLI_OK)
        code = cli_output_commit(c, &((train_tool *)c->user)->caches[0].input, output);
    r->seconds = cli_seconds() - start;
    return code;
}

static cli_exit process_all(cli *c, uint32_t count, char **paths)
{
    train_tool *tool = c->user;
    cli_output output = {0};
    train_report r = {0};
    xkv_model bare;
    cli_exit code = open_caches(c, count, paths);
    if (code == CLI_OK)
        code = cli_output_open(c, &tool->caches[0].input, NULL, &output);
    if (code == CLI_OK) {
        warn_without_model(c);
        tool->options.model = tool->model != NULL ? tool->model : cli_model_bare(c, &bare);
        code = make_dictionary(c, &output, &r);
    }
    if (code == CLI_OK)
        print_report(c, &r, output.fd >= 0);
    if (code == CLI_OK && c->json)
        print_json(c, &r);
    cli_output_abort(c, &output);
    return code;
}

int main(int argc, char **argv)
{
    static const cli_tool tool = {
        .name = "xkv-train",
        .usage = "Usage: xkv-train [options] -o FILE CACHE...",
        .help = help,
        .letters = letters,
        .options = long_options,
        .option = take_option,
        .check = check_options,
        .begin = begin,
        .end = end,
        .process_all = process_all,
    };
    train_tool state = {.options = xkv_train_options_default()};
    char writer[64];
    snprintf(writer, sizeof writer, "xkv-train %s", xkv_version());
    state.options.writer = writer;
    return cli_main(&tool, &state, argc, argv);
}
