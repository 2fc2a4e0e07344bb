/* xkv_info.c - what entries hold. */
#include "info.h"
#include "report.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { OPT_VERIFY = CLI_OPT_TOOL, OPT_REPORT, OPT_FIDELITY };

static const char letters[] = CLI_COMMON_LETTERS CLI_DICT_LETTERS "f";
static const struct option long_options[] = {
    CLI_COMMON_OPTIONS,
    CLI_DICT_OPTIONS,
    {"verify", no_argument, NULL, OPT_VERIFY},
    {"report", required_argument, NULL, OPT_REPORT},
    {"fidelity", required_argument, NULL, OPT_FIDELITY},
    {"force", no_argument, NULL, 'f'},
    CLI_END_OPTIONS,
};

static const char help[] =
    "List .xkv entries: one line each, with -v a table of groups, with -vv also metadata and sections;\n"
    "describe .xkvd dictionaries.\n"
    "\n"
    "      --verify          check every checksum and rule, and decode everything\n"
    "      --report FILE     write a page about all files, with charts; no table\n"
    "      --fidelity FILE   with --report: also draw these results (JSON of tests/engine)\n"
    "  -f, --force           with --report: overwrite FILE\n"
    "  -D, --dictionary PATH dictionary of the entries (.xkvd), or a folder that has it; for --verify\n"
    "                        and --report [$XKV_DICT_PATH]\n"
    "  -T, --threads N       worker threads, 0 for all cores [0]\n"
    "  -M, --memory N        memory limit in bytes; suffixes K, M, G [none]\n"
    "      --json            one JSON object per file on standard output, with everything\n"
    "  -q, --quiet           no table; with --verify only the exit code and errors\n"
    "  -v, --verbose         more\n"
    "  -h, --help            this text\n"
    "  -V, --version         version\n"
    "\n"
    "Columns: Raw are the bytes of the tensors as the engine holds them, Packed those of the whole entry,\n"
    "Ratio is raw 16-bit bytes / packed; ErrK and ErrV are relative errors, measured while packing\n"
    "(0: lossless, -: no such planes; latents count as K).\n"
    "\n"
    "Exit codes: 0 done, 1 failed, 2 usage, 3 bad input, 4 no dictionary, 6 memory or limit,\n"
    "130 interrupted. See xkv-info(1).\n";

typedef struct info_tool {
    bool verify;
    bool header_shown;
    const char *report_path, *fidelity_path;
    report *report; /* NULL: none is asked for */
    report page;
} info_tool;

static bool take_option(cli *c, int option, const char *value)
{
    info_tool *tool = c->user;
    switch (option) {
    case OPT_REPORT:
        tool->report = &tool->page;
        tool->report_path = value;
        return true;
    case OPT_FIDELITY:
        tool->fidelity_path = value;
        return true;
    default:
        tool->verify = true;
        return true;
    }
}

static bool check_options(cli *c)
{
    const info_tool *tool = c->user;
    const char *problem = NULL;
    if (tool->report == NULL && (tool->fidelity_path != NULL || c->force))
        problem = "--fidelity and -f go with --report";
    else if (tool->report != NULL && c->json && strcmp(tool->report_path, "-") == 0)
        problem = "--json and --report - both write to standard output";
    if (problem != NULL)
        cli_error(c, "%s", problem);
    return problem == NULL;
}

/* --- Tables ---------------------------------------------------------------------------------------------------------
 */

static void print_row(cli *c, const char *name, const xkv_entry *entry, const xkv_entry_info *info, const char *check)
{
    info_tool *tool = c->user;
    const xkv_geometry *g = xkv_entry_geometry(entry);
    double error_k = fmax(info_kind_error(entry, info->group_count, XKV_PLANE_K),
                          info_kind_error(entry, info->group_count, XKV_PLANE_LATENT));
    double error_v = info_kind_error(entry, info->group_count, XKV_PLANE_V);
    char visible[1024];
    cli_printable(visible, sizeof visible, name);
    if (!tool->header_shown)
        printf("%10s %6s %6s %11s %11s %7s %7s %7s %-8s %s%-18s %s\n", "Tokens", "Layers", "Groups", "Raw", "Packed",
               "Ratio", "ErrK", "ErrV", "Codec", tool->verify ? "Check " : "", "Engine", "File");
    tool->header_shown = c->verbosity < 2; /* again after the details of a file */
    char ratio[32] = "-";
    if (info->raw16_bytes > 0)
        snprintf(ratio, sizeof ratio, "%.2f", info_ratio(info));
    printf("%10u %6u %6u %11s %11s %7s %7s %7s %-8s %s%-18s %s\n", g->token_count, g->layer_count, info->group_count,
           cli_size_text(info->raw_bytes).text, cli_size_text(info->file_size).text, ratio,
           info_error_text(error_k).text, info_error_text(error_v).text, info_entry_codec(entry, info), check,
           info_engine_name(entry), visible);
}

static void print_group(const xkv_geometry *g, uint32_t index, const xkv_group_info *group,
                        const xkv_group_coding *coding)
{
    const char *reason = info_lossless_reason(group);
    char rank[32] = "-", step[16] = "-";
    if (group->codec == XKV_CODEC_SVD)
        snprintf(rank, sizeof rank, "%u", group->rank);
    if (info_is_coded(group)) {
        snprintf(rank, sizeof rank, "%u/%u", coding->coded, group->rank);
        snprintf(step, sizeof step, "%.4g", coding->step);
    }
    printf("  %5u %-6s %9s %6u %11s %9s %7u %11s %11s %7.2f %7s  %s%s%s%s\n", index, info_group_kind(g, group),
           info_group_layers(g, group).text, group->plane_count, rank, step, group->width,
           cli_size_text(group->raw_bytes).text, cli_size_text(group->packed_bytes).text,
           group->packed_bytes > 0 ? (double)group->raw_bytes / (double)group->packed_bytes : 0,
           info_error_text(group->error).text, info_codec_name(group), reason ? " (" : "", reason ? reason : "",
           reason ? ")" : "");
}

static void print_groups(const xkv_entry *entry, const xkv_entry_info *info, const xkv_group_coding *codings)
{
    printf("  %5s %-6s %9s %6s %11s %9s %7s %11s %11s %7s %7s  %s\n", "Group", "Kind", "Layers", "Planes", "Rank",
           "Step", "Width", "Raw", "Packed", "Ratio", "Error", "Codec");
    for (uint32_t i = 0; i < info->group_count; i++) {
        xkv_group_info group;
        xkv_entry_get_group(entry, i, &group);
        print_group(xkv_entry_geometry(entry), i, &group, &codings[i]);
    }
}

static void print_value(const xkv_value *v)
{
    char visible[256];
    info_value_text(visible, sizeof visible, v);
    printf("  %-24s %s\n", v->key, visible);
}

static void print_details(const xkv_entry *entry, const xkv_entry_info *info)
{
    const xkv_geometry *g = xkv_entry_geometry(entry);
    for (uint32_t i = 0; i < xkv_entry_value_count(entry); i++) {
        xkv_value value;
        xkv_entry_get_value(entry, i, &value);
        print_value(&value);
    }
    printf("  %-24s %s\n", "content id", cli_hex_text(info->content_id, 16).text);
    if (xkv_entry_framing(entry) != NULL)
        printf("  %-24s %s, %" PRIu64 " bytes\n", "source", cli_hex_text(info->source_hash, 16).text,
               xkv_entry_framing(entry)->source_size);
    printf("  %-24s %u, readable since version %u\n", "format version", info->write_version, info->read_version);
    printf("  %-24s %" PRIu64 " payload, %" PRIu64 " framing, %" PRIu64 " tokens\n", "bytes", info->payload_bytes,
           info->framing_bytes, info->token_bytes);
    printf("  %-24s %u of %u tokens\n", "chunks", info->chunk_count, info->chunk_tokens);
    printf("  %-24s %u sinks, %u window\n", "exact tokens", info->sinks, info->window);
    if (g->token_count > 0)
        printf("  %-24s %d to %d\n", "positions", (int)g->positions[0], (int)g->positions[g->token_count - 1]);
    printf("  %-24s %u\n", "token ids", g->token_id_count);
    if (g->plane_count > 0)
        printf("  %-24s %s\n", "element types", info_element_types(g).text);
    printf("  %-24s %u\n", "rotary embeddings", g->rope_count);
}

/* --- JSON -----------------------------------------------------------------------------------------------------------
 */

static json_t *json_hex(const uint8_t *bytes, size_t size)
{
    return json_string(cli_hex_text(bytes, size).text);
}

static json_t *groups_json(const xkv_entry *entry, const xkv_entry_info *info, const xkv_group_coding *codings)
{
    const xkv_geometry *g = xkv_entry_geometry(entry);
    json_t *groups = json_array();
    for (uint32_t i = 0; i < info->group_count; i++) {
        xkv_group_info group;
        xkv_entry_get_group(entry, i, &group);
        json_t *planes = json_array();
        for (uint32_t j = 0; j < group.plane_count; j++) {
            const xkv_plane *plane = &g->planes[group.planes[j]];
            json_array_append_new(planes, json_pack("{s:i, s:s, s:s, s:f}", "layer", (int)plane->layer, "kind",
                                                    xkv_plane_kind_name(plane->kind), "dtype",
                                                    xkv_dtype_name(plane->dtype), "error", group.errors[j]));
        }
        json_t *object = json_pack("{s:s, s:s?, s:o, s:i, s:i, s:I, s:I, s:f, s:f}", "codec", info_codec_name(&group),
                                   "reason", info_lossless_reason(&group), "planes", planes, "rank", (int)group.rank,
                                   "width", (int)group.width, "raw_bytes", (json_int_t)group.raw_bytes, "packed_bytes",
                                   (json_int_t)group.packed_bytes, "energy", group.energy, "error", group.error);
        if (info_is_coded(&group)) {
            json_object_set_new(object, "step", json_real(codings[i].step));
            json_object_set_new(object, "coded", json_integer(codings[i].coded));
        }
        json_array_append_new(groups, object);
    }
    return groups;
}

static json_t *metadata_json(const xkv_entry *entry)
{
    json_t *object = json_object();
    for (uint32_t i = 0; i < xkv_entry_value_count(entry); i++) {
        xkv_value v;
        xkv_entry_get_value(entry, i, &v);
        json_t *value = v.type == XKV_VALUE_U64      ? json_integer((json_int_t)v.u64)
                        : v.type == XKV_VALUE_F64    ? json_real(v.f64) /* NULL for NaN */
                        : v.type == XKV_VALUE_STRING ? cli_json_string((const char *)v.bytes)
                                                     : json_hex(v.bytes, v.size);
        json_object_set_new(object, v.key, value != NULL ? value : json_null());
    }
    return object;
}

static void print_json(cli *c, const char *name, const xkv_entry *entry, const xkv_entry_info *info,
                       const xkv_group_coding *codings)
{
    const info_tool *tool = c->user;
    const xkv_geometry *g = xkv_entry_geometry(entry);
    json_t *errors = json_object();
    for (uint32_t kind = 0; kind <= XKV_PLANE_K_ROPE; kind++) {
        double error = info_kind_error(entry, info->group_count, kind);
        if (error >= 0)
            json_object_set_new(errors, xkv_plane_kind_name(kind), json_real(error));
    }
    json_t *object = json_pack(
        "{s:o, s:b, s:i, s:i, s:I, s:I, s:I, s:f, s:o, s:s, s:i, s:i, s:i, s:i}", "file", cli_json_string(name), "ok",
        1, "tokens", (int)g->token_count, "layers", (int)g->layer_count, "raw_bytes", (json_int_t)info->raw_bytes,
        "raw16_bytes", (json_int_t)info->raw16_bytes, "entry_bytes", (json_int_t)info->file_size, "ratio",
        info_ratio(info), "error", errors, "engine", info_engine_name(entry), "write_version", (int)info->write_version,
        "read_version", (int)info->read_version, "sinks", (int)info->sinks, "window", (int)info->window);
    json_object_set_new(object, "verified", json_boolean(tool->verify));
    json_object_set_new(object, "lossless", json_boolean(info->lossless != 0));
    json_object_set_new(object, "whole_prefix_only", json_boolean(info_is_whole_only(c->ctx, entry)));
    json_object_set_new(object, "codec", json_string(info_entry_codec(entry, info)));
    json_object_set_new(object, "dictionary_id", info->needs_dict ? json_hex(info->dictionary_id, 16) : json_null());
    json_object_set_new(object, "chunk_tokens", json_integer(info->chunk_tokens));
    json_object_set_new(object, "token_ids", json_integer(g->token_id_count));
    json_object_set_new(object, "content_id", json_hex(info->content_id, 16));
    json_object_set_new(object, "source_hash", json_hex(info->source_hash, 16));
    json_object_set_new(object, "metadata", metadata_json(entry));
    json_object_set_new(object, "groups", groups_json(entry, info, codings));
    cli_json_print(object);
}

/* --- One file -------------------------------------------------------------------------------------------------------
 */

static cli_exit verify(cli *c, const cli_input *input, xkv_entry *entry)
{
    xkv_status status = xkv_entry_verify(c->ctx, entry, cli_progress, c);
    cli_progress_end(c);
    return status == XKV_OK ? CLI_OK : cli_fail(c, input->name, status);
}

/* Report, and return true, when the report would replace the input. */
static bool overwritten(cli *c, const cli_input *input)
{
    const info_tool *tool = c->user;
    return tool->report != NULL && !cli_distinct(c, input, tool->report_path);
}

/* How each group is quantized, for those that want to know. */
static cli_exit read_codings(cli *c, const cli_input *input, const xkv_entry *entry, uint32_t group_count,
                             xkv_group_coding *codings)
{
    for (uint32_t i = 0; i < group_count && (c->json || c->verbosity >= 2); i++) {
        xkv_status status = xkv_entry_read_coding(c->ctx, entry, i, &codings[i]);
        if (status != XKV_OK)
            return cli_fail(c, input->name, status);
    }
    return CLI_OK;
}

static void print_entry(cli *c, const cli_input *input, const xkv_entry *entry, const xkv_entry_info *info,
                        const xkv_group_coding *codings)
{
    const info_tool *tool = c->user;
    if (c->json) {
        print_json(c, input->name, entry, info, codings);
        return;
    }
    if (tool->report != NULL)
        return;
    if (c->verbosity >= 1)
        print_row(c, input->name, entry, info, tool->verify ? "OK    " : "");
    if (c->verbosity >= 2 && info_is_whole_only(c->ctx, entry))
        printf("  whole prefix only: %s\n", xkv_ctx_error(c->ctx));
    if (c->verbosity >= 3)
        print_details(entry, info);
    if (c->verbosity >= 2)
        print_groups(entry, info, codings);
}

static cli_exit process_entry(cli *c, const cli_input *input, xkv_entry *entry)
{
    const info_tool *tool = c->user;
    xkv_entry_info info;
    xkv_entry_get_info(entry, &info);
    cli_exit code = overwritten(c, input) ? CLI_USAGE : CLI_OK;
    if (code != CLI_OK)
        return code;
    if (tool->verify || (tool->report != NULL && c->dict_path != NULL))
        code = cli_dict_attach(c, input->name, entry, false);
    if (code == CLI_OK && tool->verify)
        code = verify(c, input, entry);
    if (code == CLI_OK && tool->report != NULL)
        code = report_add_entry(c, tool->report, input->name, entry, tool->verify);
    if (code != CLI_OK)
        return code;
    xkv_group_coding *codings = calloc(info.group_count + 1u, sizeof *codings);
    if (codings == NULL)
        return cli_fail(c, input->name, XKV_ERROR_MEMORY);
    code = read_codings(c, input, entry, info.group_count, codings);
    if (code == CLI_OK)
        print_entry(c, input, entry, &info, codings);
    free(codings);
    return code;
}

/* --- Dictionaries ---------------------------------------------------------------------------------------------------
 */

static void print_dictionary_json(const cli *c, const char *name, const xkv_dict_info *info)
{
    const info_tool *tool = c->user;
    cli_json_print(json_pack("{s:o, s:b, s:s, s:o, s:o, s:i, s:i, s:i, s:i, s:I, s:f, s:f, s:I, s:b}", "file",
                             cli_json_string(name), "ok", 1, "kind", "dictionary", "id", json_hex(info->id, 16),
                             "model_fingerprint", json_hex(info->fingerprint, 16), "layers", (int)info->layer_count,
                             "groups", (int)cli_dict_groups(info), "cross_components", (int)info->cross_components,
                             "components", (int)info->component_count, "tokens", (json_int_t)info->tokens, "unit",
                             info->unit, "max_quality", info->max_quality, "dictionary_bytes",
                             (json_int_t)info->file_size, "verified", (int)tool->verify));
}

static void print_dictionary(cli *c, const char *name, const xkv_dict_info *info)
{
    info_tool *tool = c->user;
    static const uint8_t none[16];
    bool known = memcmp(info->fingerprint, none, sizeof none) != 0;
    char visible[1024];
    cli_printable(visible, sizeof visible, name);
    printf("%s: dictionary%s\n", visible, tool->verify ? ", OK" : "");
    printf("  %-24s %s\n", "id", cli_hex_text(info->id, 16).text);
    printf("  %-24s %s\n", "model.fingerprint", known ? cli_hex_text(info->fingerprint, 16).text : "unknown");
    printf("  %-24s %u\n", "layers", info->layer_count);
    printf("  %-24s %u\n", "groups", cli_dict_groups(info));
    printf("  %-24s %u\n", "cross components", info->cross_components);
    printf("  %-24s %u\n", "components", info->component_count);
    printf("  %-24s %" PRIu64 "\n", "training tokens", info->tokens);
    printf("  %-24s %.6g\n", "unit", info->unit);
    printf("  %-24s %g\n", "max quality", info->max_quality);
    printf("  %-24s %" PRIu64 " (%s)\n", "bytes", info->file_size, cli_size_text(info->file_size).text);
    tool->header_shown = false;
}

/* With --verify all bases are decoded, and the gaps between the parts checked. */
static cli_exit describe_dictionary(cli *c, const cli_input *file, const xkv_input *dictionary)
{
    const info_tool *tool = c->user;
    xkv_dict_info info;
    xkv_dict *dict = NULL;
    if (overwritten(c, file))
        return CLI_USAGE;
    xkv_status status = xkv_dict_read_info(c->ctx, dictionary, &info);
    if (status == XKV_OK && (tool->verify || tool->report != NULL))
        status = xkv_dict_open(c->ctx, dictionary, 0, &dict);
    if (status == XKV_OK && tool->report != NULL)
        report_add_dictionary(tool->report, file->name, dict);
    xkv_dict_close(c->ctx, dict);
    if (status != XKV_OK)
        return cli_fail(c, file->name, status);
    if (c->json)
        print_dictionary_json(c, file->name, &info);
    else if (c->verbosity >= 1 && tool->report == NULL)
        print_dictionary(c, file->name, &info);
    return CLI_OK;
}

/* --- The report -----------------------------------------------------------------------------------------------------
 */

static cli_exit begin(cli *c)
{
    info_tool *tool = c->user;
    if (tool->report == NULL)
        return CLI_OK;
    c->output = tool->report_path;
    return report_begin(c, tool->report, tool->fidelity_path);
}

static cli_exit finish(cli *c)
{
    const info_tool *tool = c->user;
    return tool->report != NULL ? report_finish(c, tool->report) : CLI_OK;
}

static void end(cli *c)
{
    info_tool *tool = c->user;
    if (tool->report != NULL)
        report_free(c, tool->report);
}

static cli_exit process(cli *c, const char *path)
{
    const info_tool *tool = c->user;
    cli_exit code = cli_process_entry(c, path, process_entry, describe_dictionary);
    if (code != CLI_OK && tool->report != NULL)
        report_add_failure(tool->report, strcmp(path, "-") == 0 ? "stdin" : path, c->last_error);
    return code;
}

int main(int argc, char **argv)
{
    static const cli_tool tool = {
        .name = "xkv-info",
        .usage = "Usage: xkv-info [options] [FILE...]",
        .help = help,
        .letters = letters,
        .options = long_options,
        .option = take_option,
        .check = check_options,
        .begin = begin,
        .end = end,
        .process = process,
        .finish = finish,
    };
    info_tool state = {0};
    return cli_main(&tool, &state, argc, argv);
}
