/* xkv_unpack.c - entries back to engine files. */
#include "cli.h"

#include <stdio.h>
#include <stdlib.h>

enum { OPT_FIRST = CLI_OPT_TOOL, OPT_SAFETENSORS, OPT_ANY_MODEL };

static const char letters[] = CLI_COMMON_LETTERS CLI_OUTPUT_LETTERS CLI_DICT_LETTERS "t";
static const struct option long_options[] = {
    CLI_COMMON_OPTIONS,
    CLI_OUTPUT_OPTIONS,
    CLI_MODEL_OPTIONS,
    CLI_DICT_OPTIONS,
    {"test", no_argument, NULL, 't'},
    {"first", required_argument, NULL, OPT_FIRST},
    {"safetensors", optional_argument, NULL, OPT_SAFETENSORS},
    {"any-model", no_argument, NULL, OPT_ANY_MODEL},
    CLI_END_OPTIONS,
};

static const char help[] =
    "Restore the engine's files from .xkv entries.\n"
    "Each FILE.xkv becomes FILE. Without FILE, or for -, standard input is restored to standard output.\n"
    "An output appears only when it is complete and everything read for it has been checked.\n"
    "\n"
    "What:\n"
    "      --first N         only the first N tokens, as a valid file of the engine\n"
    "      --safetensors[=L] write the planes as safetensors; L is tokens ([tokens, heads, dim], default)\n"
    "                        or heads ([heads, tokens, dim])\n"
    "  -t, --test            check everything, write nothing\n"
    "  -D, --dictionary PATH dictionary of the entries (.xkvd), or a folder that has it\n"
    "                        [$XKV_DICT_PATH]\n"
    "\n"
    "Model:\n"
    "      --model FILE      refuse entries that this model (GGUF) did not make\n"
    "      --fingerprint HEX the same by the model's identity, 32 digits\n"
    "      --any-model       only warn\n"
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
    "Exit codes: 0 done, 1 failed, 2 usage, 3 bad input, 4 other model or no\n"
    "dictionary, 6 memory or limit, 130 interrupted. See xkv-unpack(1).\n";

typedef struct unpack_tool {
    bool test, safetensors, any_model;
    uint32_t layout;
    uint32_t first; /* 0: all */
    xkv_model *model;
} unpack_tool;

static bool take_option(cli *c, int option, const char *value)
{
    static const char *const layouts[] = {"tokens", "heads", NULL};
    unpack_tool *tool = c->user;
    uint32_t choice = 0;
    switch (option) {
    case 't':
        tool->test = true;
        return true;
    case OPT_FIRST:
        return cli_parse_u32(c, "--first", value, 1, XKV_MAX_TOKENS, &tool->first);
    case OPT_ANY_MODEL:
        tool->any_model = true;
        return true;
    default:
        if (value != NULL && !cli_parse_choice(c, "--safetensors", value, layouts, &choice))
            return false;
        tool->safetensors = true;
        tool->layout = choice == 0 ? XKV_LAYOUT_TOKEN_MAJOR : XKV_LAYOUT_HEAD_MAJOR;
        return true;
    }
}

static bool check_options(cli *c)
{
    const unpack_tool *tool = c->user;
    const char *problem = NULL;
    if (tool->test && (c->output != NULL || c->to_stdout || c->remove || tool->first > 0 || tool->safetensors))
        problem = "-t writes nothing: it does not go with -o, -c, --rm, --first or --safetensors";
    if (problem != NULL)
        cli_error(c, "%s", problem);
    return problem == NULL;
}

static cli_exit begin(cli *c)
{
    unpack_tool *tool = c->user;
    return cli_model_load(c, NULL, &tool->model);
}

static void end(cli *c)
{
    unpack_tool *tool = c->user;
    xkv_model_free(c->ctx, tool->model);
}

/* --- Restoring ------------------------------------------------------------------------------------------------------
 */

static xkv_status restore_engine_file(cli *c, const xkv_entry *entry, xkv_file *file, uint64_t *size)
{
    const unpack_tool *tool = c->user;
    uint8_t *image;
    xkv_status status = xkv_entry_restored_size(c->ctx, entry, tool->first, size);
    if (status == XKV_OK)
        status = xkv_file_map(c->ctx, file, *size, &image);
    if (status == XKV_OK)
        status = xkv_entry_restore(c->ctx, entry, tool->first, cli_progress, c, image, *size);
    return status;
}

static void copy_literals(const xkv_framing *f, uint8_t *image)
{
    const uint8_t *literal = f->literals;
    for (uint32_t i = 0; i < f->segment_count; i++) {
        const xkv_segment *s = &f->segments[i];
        if (s->plane_count == 0) {
            memcpy(image, literal, s->size);
            literal += s->size;
        }
        image += s->size;
    }
}

/* Map the image that `framing` describes and fill it. */
static xkv_status fill_safetensors(cli *c, const xkv_entry *entry, const xkv_geometry *g, const xkv_framing *framing,
                                   xkv_file *file)
{
    xkv_read_options options = xkv_read_options_default();
    options.token_count = g->token_count;
    options.progress = cli_progress;
    options.progress_user = c;
    uint8_t *image;
    xkv_status status = xkv_file_map(c->ctx, file, framing->source_size, &image);
    if (status != XKV_OK)
        return status;
    xkv_view *views = calloc(g->plane_count + 1u, sizeof *views);
    if (views == NULL)
        return XKV_ERROR_MEMORY;
    copy_literals(framing, image);
    status = xkv_framing_views(c->ctx, framing, g, image, views);
    if (status == XKV_OK && g->token_count > 0)
        status = xkv_entry_read(c->ctx, entry, &options, views);
    free(views);
    return status;
}

static xkv_status write_safetensors(cli *c, const xkv_entry *entry, const xkv_geometry *g, xkv_file *file,
                                    uint64_t *size)
{
    const unpack_tool *tool = c->user;
    xkv_framing *framing;
    xkv_status status = xkv_framing_safetensors(c->ctx, g, tool->layout, &framing);
    if (status != XKV_OK)
        return status;
    *size = framing->source_size;
    status = fill_safetensors(c, entry, g, framing, file);
    xkv_framing_free(c->ctx, framing);
    return status;
}

/* Elements of quantized blocks become f32, which holds them exactly. */
static xkv_status restore_safetensors(cli *c, const xkv_entry *entry, xkv_file *file, uint64_t *size)
{
    const unpack_tool *tool = c->user;
    xkv_geometry g = *xkv_entry_geometry(entry);
    xkv_plane *planes = calloc(g.plane_count + 1u, sizeof *planes);
    if (planes == NULL)
        return XKV_ERROR_MEMORY;
    for (uint32_t i = 0; i < g.plane_count; i++) {
        planes[i] = g.planes[i];
        if (xkv_dtype_block(planes[i].dtype) > 1)
            planes[i].dtype = XKV_F32;
    }
    g.planes = planes;
    if (tool->first > 0 && tool->first < g.token_count) {
        g.token_count = tool->first;
        if (g.token_id_count > tool->first)
            g.token_id_count = tool->first;
    }
    xkv_status status = write_safetensors(c, entry, &g, file, size);
    free(planes);
    return status;
}

/* --- One file -------------------------------------------------------------------------------------------------------
 */

/* FILE.xkv -> FILE, for safetensors FILE.safetensors; false when the name does not end so. */
static bool output_path(const char *name, bool safetensors, char *path, size_t size)
{
    static const char suffix[] = ".xkv", tensors[] = ".safetensors";
    size_t n = strlen(name);
    if (n < sizeof suffix || strcmp(name + n - 4, suffix) != 0 || name[n - 5] == '/' || n + sizeof tensors > size)
        return false;
    n -= 4;
    memcpy(path, name, n);
    path[n] = '\0';
    if (safetensors && (n < 12 || strcmp(path + n - 12, tensors) != 0))
        memcpy(path + n, tensors, sizeof tensors);
    return true;
}

static void print_result(cli *c, const cli_input *input, const char *output, const xkv_entry_info *info, uint64_t size,
                         double seconds)
{
    if (output == NULL)
        cli_note(c, "%s: OK, %s, %.2f s", input->name, cli_size_text(info->file_size).text, seconds);
    else
        cli_note(c, "%s: %s -> %s, %s, %.2f s", input->name, cli_size_text(info->file_size).text,
                 cli_size_text(size).text, info->lossless ? "lossless" : "lossy", seconds);
    if (!c->json)
        return;
    json_t *object =
        json_pack("{s:o, s:b, s:I, s:b, s:f}", "file", cli_json_string(input->name), "ok", 1, "entry_bytes",
                  (json_int_t)info->file_size, "lossless", info->lossless != 0, "seconds", seconds);
    if (output != NULL) {
        json_object_set_new(object, "output", cli_json_string(output));
        json_object_set_new(object, "output_bytes", json_integer((json_int_t)size));
    }
    cli_json_print(object);
}

static cli_exit test_entry(cli *c, const cli_input *input, const xkv_entry *entry, const xkv_entry_info *info)
{
    double start = cli_seconds();
    xkv_status status = xkv_entry_verify(c->ctx, entry, cli_progress, c);
    if (status != XKV_OK)
        return cli_fail(c, input->name, status);
    print_result(c, input, NULL, info, 0, cli_seconds() - start);
    return CLI_OK;
}

static cli_exit unpack_entry(cli *c, const cli_input *input, const xkv_entry *entry, const xkv_entry_info *info)
{
    const unpack_tool *tool = c->user;
    double start = cli_seconds();
    cli_output output = {0};
    uint64_t size = 0;
    char path[4096];
    bool named = output_path(input->name, tool->safetensors, path, sizeof path);
    cli_exit code = cli_output_open(c, input, named ? path : NULL, &output);
    if (code == CLI_OK) {
        xkv_status status = tool->safetensors ? restore_safetensors(c, entry, output.file, &size)
                                              : restore_engine_file(c, entry, output.file, &size);
        code = status == XKV_OK ? cli_output_commit(c, input, &output) : cli_fail(c, input->name, status);
    }
    if (code == CLI_OK)
        print_result(c, input, output.name, info, size, cli_seconds() - start);
    cli_output_abort(c, &output);
    return code;
}

static cli_exit check_model(cli *c, const cli_input *input, const xkv_entry *entry)
{
    const unpack_tool *tool = c->user;
    xkv_model bare;
    const xkv_model *model = tool->model != NULL ? tool->model : cli_model_bare(c, &bare);
    xkv_status status = model == NULL ? XKV_OK : xkv_entry_check_model(c->ctx, entry, model);
    if (status == XKV_ERROR_MISMATCH && tool->any_model) {
        cli_note(c, "%s: warning: %s", input->name, xkv_ctx_error(c->ctx));
        return CLI_OK;
    }
    return status == XKV_OK ? CLI_OK : cli_fail(c, input->name, status);
}

static cli_exit process_entry(cli *c, const cli_input *input, xkv_entry *entry)
{
    const unpack_tool *tool = c->user;
    xkv_entry_info info;
    xkv_entry_get_info(entry, &info);
    cli_exit code = check_model(c, input, entry);
    if (code == CLI_OK)
        code = cli_dict_attach(c, input->name, entry, false);
    if (code != CLI_OK)
        return code;
    return tool->test ? test_entry(c, input, entry, &info) : unpack_entry(c, input, entry, &info);
}

static cli_exit process(cli *c, const char *path)
{
    return cli_process_entry(c, path, process_entry, NULL);
}

int main(int argc, char **argv)
{
    static const cli_tool tool = {
        .name = "xkv-unpack",
        .usage = "Usage: xkv-unpack [options] [FILE...]",
        .help = help,
        .letters = letters,
        .options = long_options,
        .option = take_option,
        .check = check_options,
        .begin = begin,
        .end = end,
        .process = process,
    };
    unpack_tool state = {0};
    return cli_main(&tool, &state, argc, argv);
}
