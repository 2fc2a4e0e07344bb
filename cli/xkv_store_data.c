/* xkv_store_data.c - commands that move entries: put, get, match, export, import. */
#include "xkv_store.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* --- Prompts --------------------------------------------------------------------------------------------------------
 */

/* Tokens of a prompt that was named, in one of three ways. */
typedef struct prompt_source {
    cli_input input;
    xkv_cache *cache;
    int32_t *list;
    xkv_prompt prompt;
} prompt_source;

static void close_prompt(cli *c, prompt_source *p)
{
    xkv_cache_free(c->ctx, p->cache);
    cli_input_close(&p->input);
    free(p->list);
    memset(p, 0, sizeof *p);
}

/* Numbers between commas and white space; false when there is anything else. */
static bool parse_tokens(const char *text, size_t size, prompt_source *p)
{
    size_t capacity = size / 2 + 1;
    const char *end = text + size;
    uint32_t count = 0;
    p->list = calloc(capacity, sizeof *p->list);
    while (p->list != NULL) {
        while (text < end && (isspace((unsigned char)*text) || *text == ','))
            text++;
        if (text == end)
            break;
        int64_t value = 0;
        const char *first = text;
        for (; text < end && isdigit((unsigned char)*text) && value <= INT32_MAX; text++)
            value = 10 * value + (*text - '0');
        bool ends = text == end || isspace((unsigned char)*text) || *text == ',';
        if (text == first || value > INT32_MAX || !ends || count == capacity)
            return false;
        p->list[count++] = (int32_t)value;
    }
    p->prompt = (xkv_prompt){.tokens = p->list, .token_count = count};
    return count > 0;
}

static cli_exit bad_prompt(cli *c, const char *name)
{
    cli_error(c, "%s: neither an engine's file nor a list of tokens", name);
    return CLI_BAD_INPUT;
}

/* An engine's file has its tokens; anything else is text. */
static cli_exit read_prompt_file(cli *c, prompt_source *p)
{
    uint64_t size = 0;
    xkv_status status = xkv_cache_open(c->ctx, p->input.path, NULL, &p->cache);
    if (status != XKV_OK)
        return cli_fail(c, p->input.name, status);
    const xkv_geometry *g = xkv_cache_geometry(p->cache);
    if (xkv_cache_framing(p->cache)->engine != XKV_ENGINE_OPAQUE) {
        p->prompt = (xkv_prompt){.tokens = g->token_ids, .token_count = g->token_id_count};
        return g->token_id_count > 0 ? CLI_OK : bad_prompt(c, p->input.name);
    }
    const uint8_t *text = xkv_cache_data(p->cache, &size);
    return parse_tokens((const char *)text, (size_t)size, p) ? CLI_OK : bad_prompt(c, p->input.name);
}

static cli_exit open_prompt(cli *c, const char *argument, prompt_source *p)
{
    memset(p, 0, sizeof *p);
    if (strcmp(argument, "-") != 0 && access(argument, F_OK) != 0) {
        if (parse_tokens(argument, strlen(argument), p))
            return CLI_OK;
        cli_error(c, "%s: neither a file nor a list of tokens", argument);
        return CLI_USAGE;
    }
    cli_exit code = cli_input_open(c, argument, &p->input);
    return code == CLI_OK ? read_prompt_file(c, p) : code;
}

/* --- put ------------------------------------------------------------------------------------------------------------
 */

static void print_put(const cli *c, const char *name, const xkv_put_report *r, double seconds)
{
    if (c->json) {
        cli_json_print(
            json_pack("{s:o, s:b, s:I, s:b, s:i, s:i, s:I, s:I, s:i, s:I, s:f}", "file", cli_json_string(name), "ok", 1,
                      "id", (json_int_t)r->id, "existed", (int)r->existed, "tokens", (int)r->tokens, "base_tokens",
                      (int)r->base_tokens, "parent", (json_int_t)r->parent, "bytes", (json_int_t)r->bytes, "evicted",
                      (int)r->evicted_entries, "evicted_bytes", (json_int_t)r->evicted_bytes, "seconds", seconds));
        return;
    }
    if (c->verbosity < 1)
        return;
    char visible[1024];
    cli_printable(visible, sizeof visible, name);
    printf("%s: %s %" PRIu64 ", %u tokens, %s", visible, r->existed ? "is there as" : "stored as", r->id, r->tokens,
           cli_size_text(r->bytes).text);
    if (r->parent != 0)
        printf(" behind %u tokens of %" PRIu64, r->base_tokens, r->parent);
    putchar('\n');
}

static cli_exit put_dictionary(cli *c, const char *path)
{
    const store_tool *tool = c->user;
    xkv_input input = {0};
    xkv_status status = xkv_input_open(c->ctx, path, &input);
    if (status != XKV_OK)
        return cli_fail(c, path, status);
    status = xkv_store_put_dict(c->ctx, tool->store, &input, NULL);
    xkv_input_close(c->ctx, &input);
    return status == XKV_OK ? CLI_OK : cli_fail(c, path, status);
}

static cli_exit put_entry(cli *c, const cli_input *file, const xkv_input *input)
{
    const store_tool *tool = c->user;
    xkv_put_report report;
    double start = cli_seconds();
    xkv_status status = xkv_store_put(c->ctx, tool->store, &tool->ns, NULL, input, &tool->put, &report);
    if (status != XKV_OK)
        return cli_fail(c, file->name, status);
    print_put(c, file->name, &report, cli_seconds() - start);
    return CLI_OK;
}

static cli_exit put_cache(cli *c, const cli_input *file, const xkv_cache *cache)
{
    store_tool *tool = c->user;
    uint64_t size = 0;
    const uint8_t *data = xkv_cache_data(cache, &size);
    const xkv_geometry *g = xkv_cache_geometry(cache);
    xkv_put_report report;
    double start = cli_seconds();
    if (xkv_cache_framing(cache)->engine == XKV_ENGINE_OPAQUE) {
        cli_error(c, "%s: neither an entry nor a known engine file", file->name);
        return CLI_BAD_INPUT;
    }
    tool->pack.dict = c->dict;
    tool->put.pack = &tool->pack;
    xkv_status status = xkv_store_put_planes(c->ctx, tool->store, &tool->ns, NULL, g, xkv_cache_views(cache),
                                             xkv_cache_framing(cache), data, size, &tool->put, &report);
    if (status != XKV_OK)
        return cli_fail(c, file->name, status);
    print_put(c, file->name, &report, cli_seconds() - start);
    return CLI_OK;
}

/* Magic of spec/container.md; the kind is 2 for dictionaries. 0: neither. */
static uint32_t container_kind(cli *c, const xkv_input *input)
{
    static const uint8_t magic[8] = {0x89, 'X', 'K', 'V', '\r', '\n', 0x1a, '\n'};
    uint8_t header[16];
    bool container = input->size >= sizeof header &&
                     input->read(input->user, c->ctx, 0, header, sizeof header) == XKV_OK &&
                     memcmp(header, magic, sizeof magic) == 0;
    return !container ? 0 : header[12] == 2 ? 2 : 1;
}

static cli_exit pack_and_put(cli *c, const cli_input *file)
{
    const store_tool *tool = c->user;
    xkv_cache *cache = NULL;
    xkv_status status = xkv_cache_open(c->ctx, file->path, tool->model, &cache);
    if (status != XKV_OK)
        return cli_fail(c, file->name, status);
    cli_exit code = CLI_OK;
    if (cli_pack_needs_dict(c, &tool->pack))
        code = cli_dict_choose(c, file->name, tool->pack.model, xkv_cache_geometry(cache)->layer_count, true);
    if (code == CLI_OK)
        code = put_cache(c, file, cache);
    xkv_cache_free(c->ctx, cache);
    return code;
}

static cli_exit put_opened(cli *c, const cli_input *file)
{
    xkv_input input = {0};
    xkv_status status = xkv_input_open(c->ctx, file->path, &input);
    if (status != XKV_OK)
        return cli_fail(c, file->name, status);
    uint32_t kind = container_kind(c, &input);
    cli_exit code = kind == 1 ? put_entry(c, file, &input) : CLI_OK;
    xkv_input_close(c->ctx, &input);
    if (kind == 2)
        return put_dictionary(c, file->path);
    return kind == 0 ? pack_and_put(c, file) : code;
}

/* A remote that fails is no failure of the command: the entries are stored, and wait. */
static cli_exit send_stored(cli *c, cli_exit code)
{
    const store_tool *tool = c->user;
    xkv_push_report r;
    if (tool->remote.url == NULL)
        return code;
    xkv_status status = xkv_store_push(c->ctx, tool->store, &r);
    if (status == XKV_OK && r.waiting > 0)
        cli_error(c, "%s: %" PRIu64 " entries wait to be sent, push sends them: %s", tool->path, r.waiting, r.why);
    return code != CLI_OK || status == XKV_OK ? code : cli_fail(c, tool->path, status);
}

cli_exit store_put(cli *c, uint32_t count, char **arguments)
{
    const store_tool *tool = c->user;
    cli_exit code = CLI_OK;
    if (cli_pack_needs_dict(c, &tool->pack))
        code = put_dictionary(c, c->dict_path);
    if (code != CLI_OK)
        return code;
    for (uint32_t i = 0; i < count; i++) {
        cli_input file;
        c->progress_name = arguments[i];
        cli_exit file_code = cli_input_open(c, arguments[i], &file);
        if (file_code == CLI_OK)
            file_code = put_opened(c, &file);
        cli_progress_end(c);
        cli_input_close(&file);
        if (code == CLI_OK)
            code = file_code;
    }
    return send_stored(c, code);
}

/* --- match ----------------------------------------------------------------------------------------------------------
 */

static const char *reason_text(uint32_t reason)
{
    static const char *const texts[] = {"found",
                                        "nothing stored begins like it",
                                        "what is stored is too short",
                                        "the entry has expired",
                                        "the dictionary of the entry is not in the store",
                                        "the entry is damaged",
                                        "the entry is being removed",
                                        "only a newer program can read the entry",
                                        "the entry can only be restored whole, and the prompt parts from it before"};
    return reason < sizeof texts / sizeof *texts ? texts[reason] : "unknown";
}

static const char *reason_name(uint32_t reason)
{
    static const char *const names[] = {"found",   "none", "short", "expired",   "no dictionary",
                                        "corrupt", "gone", "newer", "whole only"};
    return reason < sizeof names / sizeof *names ? names[reason] : "unknown";
}

static void print_match(const cli *c, const char *name, uint32_t prompt_tokens, const xkv_match *m)
{
    if (c->json) {
        cli_json_print(json_pack("{s:o, s:b, s:s, s:i, s:i, s:i, s:I, s:I}", "file", cli_json_string(name), "ok",
                                 m->reason == XKV_MATCH_FOUND, "reason", reason_name(m->reason), "tokens",
                                 (int)m->tokens, "prompt_tokens", (int)prompt_tokens, "entry_tokens",
                                 (int)m->entry_tokens, "id", (json_int_t)m->id, "bytes", (json_int_t)m->bytes));
        return;
    }
    if (c->verbosity < 1)
        return;
    if (m->reason == XKV_MATCH_FOUND)
        printf("%u of %u tokens, entry %" PRIu64 " of %u tokens, %s\n", m->tokens, prompt_tokens, m->id,
               m->entry_tokens, cli_size_text(m->bytes).text);
    else
        printf("0 of %u tokens: %s\n", prompt_tokens, reason_text(m->reason));
}

/* Look the prompt up, or the entry of --id. CLI_MISS is reported by the caller. */
static cli_exit find(cli *c, uint32_t count, char **arguments, prompt_source *p, xkv_match *m, xkv_hit **hit)
{
    const store_tool *tool = c->user;
    xkv_status status;
    memset(p, 0, sizeof *p);
    if (tool->id != 0) {
        status = xkv_store_get(c->ctx, tool->store, &tool->ns, tool->id, m, hit);
        return status == XKV_OK ? CLI_OK : cli_fail(c, tool->path, status);
    }
    cli_exit code = open_prompt(c, count > 0 ? arguments[0] : "-", p);
    if (code != CLI_OK)
        return code;
    status = xkv_store_match(c->ctx, tool->store, &tool->ns, &p->prompt, tool->min_tokens, m, hit);
    return status == XKV_OK ? CLI_OK : cli_fail(c, tool->path, status);
}

cli_exit store_match(cli *c, uint32_t count, char **arguments)
{
    prompt_source p;
    xkv_match m;
    cli_exit code = find(c, count, arguments, &p, &m, NULL);
    if (code == CLI_OK) {
        print_match(c, count > 0 ? arguments[0] : "stdin", p.prompt.token_count, &m);
        code = m.reason == XKV_MATCH_FOUND ? CLI_OK : CLI_MISS;
    }
    if (code == CLI_MISS)
        c->reported = c->json;
    close_prompt(c, &p);
    return code;
}

/* --- get ------------------------------------------------------------------------------------------------------------
 */

static xkv_status restore(cli *c, xkv_hit *hit, const xkv_match *m, xkv_file *file, uint64_t *size)
{
    const xkv_entry *entry = NULL;
    uint8_t *image;
    uint32_t first = m->tokens < m->entry_tokens ? m->tokens : 0; /* 0: all, also rows beyond the prompt's tokens */
    xkv_status status = xkv_hit_entry(c->ctx, hit, &entry);
    if (status == XKV_OK)
        status = xkv_entry_restored_size(c->ctx, entry, first, size);
    if (status == XKV_OK)
        status = xkv_file_map(c->ctx, file, *size, &image);
    if (status == XKV_OK)
        status = xkv_entry_restore(c->ctx, entry, first, cli_progress, c, image, *size);
    return status;
}

/* The damage is reported, and the entry will not be found again. */
static cli_exit fail_restore(cli *c, xkv_hit *hit, xkv_status status)
{
    const store_tool *tool = c->user;
    cli_exit code = cli_fail(c, tool->path, status);
    if (code == CLI_BAD_INPUT)
        xkv_hit_reject(c->ctx, hit);
    return code;
}

static cli_exit write_found(cli *c, xkv_hit *hit, const xkv_match *m)
{
    const store_tool *tool = c->user;
    const cli_input from = {.name = tool->path, .path = tool->path};
    cli_output output;
    uint64_t size = 0;
    cli_exit code = cli_output_open(c, &from, NULL, &output);
    if (code == CLI_OK) {
        xkv_status status = restore(c, hit, m, output.file, &size);
        code = status == XKV_OK ? cli_output_commit(c, &from, &output) : fail_restore(c, hit, status);
    }
    if (code == CLI_OK && c->json)
        cli_json_print(json_pack("{s:o, s:b, s:I, s:i, s:i, s:I}", "file", cli_json_string(output.name), "ok", 1, "id",
                                 (json_int_t)m->id, "tokens", (int)m->tokens, "entry_tokens", (int)m->entry_tokens,
                                 "output_bytes", (json_int_t)size));
    else if (code == CLI_OK)
        cli_note(c, "%s: %u tokens of entry %" PRIu64 ", %s", output.name, m->tokens, m->id, cli_size_text(size).text);
    cli_output_abort(c, &output);
    return code;
}

cli_exit store_get(cli *c, uint32_t count, char **arguments)
{
    prompt_source p;
    xkv_match m;
    xkv_hit *hit = NULL;
    cli_exit code = find(c, count, arguments, &p, &m, &hit);
    if (code == CLI_OK && m.reason != XKV_MATCH_FOUND) {
        cli_error(c, "%s", reason_text(m.reason));
        code = CLI_MISS;
    }
    if (code == CLI_OK)
        code = write_found(c, hit, &m);
    xkv_hit_close(c->ctx, hit);
    close_prompt(c, &p);
    return code;
}

/* --- export and import ----------------------------------------------------------------------------------------------
 */

cli_exit store_export(cli *c, uint32_t count, char **arguments)
{
    const store_tool *tool = c->user;
    const cli_input from = {.name = tool->path, .path = tool->path};
    cli_output output;
    uint64_t id;
    (void)count;
    if (!store_parse_id(c, arguments[0], &id))
        return CLI_USAGE;
    cli_exit code = cli_output_open(c, &from, NULL, &output);
    if (code == CLI_OK) {
        const xkv_output to = xkv_file_output(output.file);
        xkv_status status = xkv_store_export(c->ctx, tool->store, &tool->ns, id, &to);
        code = status == XKV_OK ? cli_output_commit(c, &from, &output) : cli_fail(c, tool->path, status);
    }
    if (code == CLI_OK && c->json)
        cli_json_print(
            json_pack("{s:o, s:b, s:I}", "file", cli_json_string(output.name), "ok", 1, "id", (json_int_t)id));
    cli_output_abort(c, &output);
    return code;
}

static cli_exit import_one(cli *c, const char *path)
{
    const store_tool *tool = c->user;
    cli_input file;
    xkv_input input = {0};
    xkv_put_report report;
    double start = cli_seconds();
    cli_exit code = cli_input_open(c, path, &file);
    if (code == CLI_OK) {
        xkv_status status = xkv_input_open(c->ctx, file.path, &input);
        if (status == XKV_OK) {
            status = xkv_store_import(c->ctx, tool->store, &input, &report);
            xkv_input_close(c->ctx, &input);
        }
        code = status == XKV_OK ? CLI_OK : cli_fail(c, file.name, status);
    }
    if (code == CLI_OK)
        print_put(c, file.name, &report, cli_seconds() - start);
    cli_input_close(&file);
    return code;
}

cli_exit store_import(cli *c, uint32_t count, char **arguments)
{
    cli_exit code = CLI_OK;
    for (uint32_t i = 0; i < count; i++) {
        cli_exit file_code = import_one(c, arguments[i]);
        if (code == CLI_OK)
            code = file_code;
    }
    return send_stored(c, code);
}
