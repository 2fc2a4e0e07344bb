/* xkv_store.c - a store of packed prefixes: options, and the commands that look after it. */
#include "xkv_store.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum {
    OPT_SETTINGS = CLI_OPT_TOOL,
    OPT_LORA,
    OPT_SALT_FILE,
    OPT_KEY_FILE,
    OPT_BLOCK,
    OPT_CAP,
    OPT_TTL,
    OPT_PIN,
    OPT_MIN,
    OPT_ID,
    OPT_ALL,
    OPT_WHOLE,
    OPT_DECODE,
    OPT_COMPACT,
    OPT_UNUSED,
    OPT_REMOTE,
    OPT_WAIT,
};

static const char letters[] = CLI_COMMON_LETTERS CLI_DICT_LETTERS CLI_PACK_LETTERS "o:f";
static const struct option long_options[] = {
    CLI_COMMON_OPTIONS,
    CLI_MODEL_OPTIONS,
    CLI_DICT_OPTIONS,
    CLI_PACK_OPTIONS,
    {"output", required_argument, NULL, 'o'},
    {"force", no_argument, NULL, 'f'},
    {"settings", required_argument, NULL, OPT_SETTINGS},
    {"lora", required_argument, NULL, OPT_LORA},
    {"salt-file", required_argument, NULL, OPT_SALT_FILE},
    {"key-file", required_argument, NULL, OPT_KEY_FILE},
    {"block", required_argument, NULL, OPT_BLOCK},
    {"cap", required_argument, NULL, OPT_CAP},
    {"ttl", required_argument, NULL, OPT_TTL},
    {"pin", no_argument, NULL, OPT_PIN},
    {"whole", no_argument, NULL, OPT_WHOLE},
    {"min", required_argument, NULL, OPT_MIN},
    {"id", required_argument, NULL, OPT_ID},
    {"all", no_argument, NULL, OPT_ALL},
    {"decode", no_argument, NULL, OPT_DECODE},
    {"compact", no_argument, NULL, OPT_COMPACT},
    {"unused-dictionaries", no_argument, NULL, OPT_UNUSED},
    {"remote", required_argument, NULL, OPT_REMOTE},
    {"wait", required_argument, NULL, OPT_WAIT},
    CLI_END_OPTIONS,
};

static const char help[] =
    "Keep packed prefixes in a folder and find the longest one that a prompt begins with.\n"
    "\n"
    "Commands:\n"
    "  init STORE            make a store: --block, --cap\n"
    "  put STORE FILE...     store engine files (packed on the way), .xkv entries and .xkvd dictionaries\n"
    "  match STORE PROMPT    how much of the prompt is stored\n"
    "  get STORE PROMPT      restore the stored part of the prompt as the engine's file, -o FILE; or of --id\n"
    "  ls STORE              entries of the namespace\n"
    "  stat STORE            sums and counters\n"
    "  rm STORE ID...        remove entries and what extends them; --all: all of the namespace\n"
    "  pin, unpin STORE ID...  keep entries from eviction\n"
    "  gc STORE              remove what is expired, orphaned or in quarantine: --cap, --compact\n"
    "  verify STORE          check every file and record: --decode\n"
    "  repair STORE          rebuild the index and the properties from the files\n"
    "  export STORE ID       one entry, its tokens and what it needs as a file, -o FILE\n"
    "  import STORE FILE...  what export wrote\n"
    "  push STORE            send what waits for the remote; --all: all of the namespace\n"
    "A PROMPT is a list of tokens (1,2,3), a file with such a list, or an engine's file; - is standard input.\n"
    "\n"
    "Namespace (prompts match only within one):\n"
    "      --model FILE      GGUF file of the model; its header is enough\n"
    "      --fingerprint HEX identity of the model, 32 digits, instead of the GGUF's\n"
    "      --settings TEXT   whatever else makes caches differ\n"
    "      --lora NAME       adapter\n"
    "      --salt-file FILE  file with the tenant's secret\n"
    "\n"
    "Encryption (the same for all commands on a store):\n"
    "      --key-file FILE   file with the key, 32 bytes; with init, encrypt the store with it\n"
    "\n"
    "Remote tier (put, import, push send to it; match and get look there too):\n"
    "      --remote URL      s3://BUCKET[/PREFIX] or redis://HOST[:PORT][/DATABASE]\n"
    "      --wait SECONDS    longest that a lookup waits for it [5]\n"
    "\n"
    "Storing:\n"
    "  -D, --dictionary PATH dictionary (.xkvd) to pack with; it is stored too\n"
    "      --lossless, --profile NAME, --quality N, --ratio R, --error E, --energy E, --rank-k N,\n"
    "      --rank-v N, --group N, --sinks N, --window N, --iterations N, --half-factors,\n"
    "      --zstd-factors, -1 .. -19  how to pack engine files, as for xkv-pack\n"
    "      --ttl SECONDS     the entry expires\n"
    "      --pin             never evict it\n"
    "      --whole           store all tokens, also those that another entry begins with\n"
    "\n"
    "Other options of commands:\n"
    "      --block N         tokens in a block of the key chain [256]\n"
    "      --cap BYTES       evict the least recently used above it, 0: none [0]\n"
    "      --min N           shorter matches are misses [1]\n"
    "      --id ID           this entry instead of a prompt\n"
    "      --all             rm, push: all entries of the namespace\n"
    "      --decode          also decode everything\n"
    "      --compact         also give back free pages of the index; the store must not be in use\n"
    "      --unused-dictionaries  also remove dictionaries that no entry needs\n"
    "  -o, --output FILE     write FILE (- for standard output)\n"
    "  -f, --force           overwrite the output; write even to a terminal\n"
    "\n"
    "General:\n"
    "  -T, --threads N       worker threads, 0 for all cores [0]\n"
    "  -M, --memory N        memory limit in bytes; suffixes K, M, G [none]\n"
    "      --json            JSON objects, one a line, on standard output\n"
    "  -q, --quiet           errors only\n"
    "  -v, --verbose         more messages; twice: still more\n"
    "  -h, --help            this text\n"
    "  -V, --version         version\n"
    "\n"
    "Exit codes: 0 done, 1 failed, 2 usage, 3 bad input or damage, 4 other model or no dictionary,\n"
    "5 target, 6 memory, limit or cap, 7 no match or no such entry, 130 interrupted. See xkv-store(1).\n";

/* --- Options --------------------------------------------------------------------------------------------------------
 */

static bool take_flag(store_tool *tool, int option)
{
    switch (option) {
    case OPT_PIN:
        tool->put.pin = 1;
        return true;
    case OPT_WHOLE:
        tool->put.whole = 1;
        return true;
    case OPT_ALL:
        tool->all = true;
        return true;
    case OPT_DECODE:
        tool->decode = true;
        return true;
    case OPT_COMPACT:
        tool->compact = true;
        return true;
    default:
        tool->unused_dicts = true;
        return true;
    }
}

static bool take_wait(cli *c, const char *value)
{
    store_tool *tool = c->user;
    double seconds = 0;
    if (!cli_parse_double(c, "--wait", value, 0.001, 86400, &seconds))
        return false;
    tool->remote.lookup_ms = (uint32_t)(1000 * seconds);
    return true;
}

static bool take_option(cli *c, int option, const char *value)
{
    store_tool *tool = c->user;
    switch (option) {
    case OPT_SETTINGS:
        tool->settings = value;
        return true;
    case OPT_LORA:
        tool->lora = value;
        return true;
    case OPT_SALT_FILE:
        tool->salt_path = value;
        return true;
    case OPT_KEY_FILE:
        tool->key_path = value;
        return true;
    case OPT_BLOCK:
        return cli_parse_u32(c, "--block", value, 1, 65536, &tool->properties.block_tokens);
    case OPT_CAP:
        tool->cap_given = true;
        return cli_parse_u64(c, "--cap", value, 0, UINT64_MAX, &tool->properties.byte_cap);
    case OPT_TTL:
        return cli_parse_u64(c, "--ttl", value, 1, UINT32_MAX, &tool->put.ttl);
    case OPT_MIN:
        return cli_parse_u32(c, "--min", value, 1, XKV_MAX_TOKENS, &tool->min_tokens);
    case OPT_REMOTE:
        tool->remote.url = value;
        return true;
    case OPT_WAIT:
        return take_wait(c, value);
    case OPT_ID:
        return cli_parse_u64(c, "--id", value, 1, INT64_MAX, &tool->id);
    case OPT_PIN:
    case OPT_WHOLE:
    case OPT_ALL:
    case OPT_DECODE:
    case OPT_COMPACT:
    case OPT_UNUSED:
        return take_flag(tool, option);
    default:
        return cli_pack_option(c, option, value, &tool->pack);
    }
}

bool store_parse_id(cli *c, const char *text, uint64_t *id)
{
    return cli_parse_u64(c, "ID", text, 1, INT64_MAX, id);
}

/* --- Commands that look after the store -----------------------------------------------------------------------------
 */

static cli_exit report(cli *c, xkv_status status)
{
    const store_tool *tool = c->user;
    return status == XKV_OK ? CLI_OK : cli_fail(c, tool->path, status);
}

static cli_exit run_init(cli *c, uint32_t count, char **arguments)
{
    const store_tool *tool = c->user;
    (void)count;
    (void)arguments;
    xkv_status status = xkv_store_create(c->ctx, tool->path, &tool->properties);
    if (status == XKV_ERROR_EXISTS) {
        cli_error(c, "%s: exists and is not an empty folder", tool->path);
        return CLI_FAILED;
    }
    if (status == XKV_OK && c->json)
        cli_json_print(json_pack("{s:o, s:b}", "file", cli_json_string(tool->path), "ok", 1));
    return report(c, status);
}

/* "2026-11-26 15:00:00", local time; "-" for 0. */
static void time_text(uint64_t microseconds, char text[32])
{
    time_t seconds = (time_t)(microseconds / 1000000u);
    struct tm parts;
    if (microseconds == 0 || localtime_r(&seconds, &parts) == NULL || strftime(text, 32, "%F %T", &parts) == 0)
        snprintf(text, 32, "-");
}

static json_t *item_json(const xkv_store_item *item)
{
    json_t *object = json_pack(
        "{s:I, s:i, s:b, s:I, s:I, s:I, s:I, s:I, s:s, s:s}", "id", (json_int_t)item->id, "tokens", (int)item->tokens,
        "pinned", (int)item->pinned, "bytes", (json_int_t)item->bytes, "raw_bytes", (json_int_t)item->raw_bytes,
        "created", (json_int_t)item->created, "used", (json_int_t)item->used, "expires", (json_int_t)item->expires,
        "key", cli_hex_text(item->key, 31).text, "blob", cli_hex_text(item->blob, 31).text);
    json_object_set_new(object, "parent", json_integer((json_int_t)item->parent));
    json_object_set_new(object, "base_tokens", json_integer(item->base_tokens));
    json_object_set_new(object, "children", json_integer(item->children));
    json_object_set_new(object, "dictionary_id",
                        item->needs_dict ? json_string(cli_hex_text(item->dictionary_id, 16).text) : json_null());
    return object;
}

static int print_item(void *user, const xkv_store_item *item)
{
    cli *c = user;
    char used[32], expires[32], extends[48] = "";
    if (c->json) {
        cli_json_print(item_json(item));
        return 0;
    }
    time_text(item->used, used);
    time_text(item->expires, expires);
    if (item->parent != 0)
        snprintf(extends, sizeof extends, "%u of %" PRIu64 " ", item->base_tokens, item->parent);
    printf("%8" PRIu64 " %8u %11s %11s %7.2f  %-19s  %-19s %s%s\n", item->id, item->tokens,
           cli_size_text(item->raw_bytes).text, cli_size_text(item->bytes).text,
           (double)item->raw_bytes / (double)item->bytes, used, expires, extends, item->pinned ? "pinned" : "");
    return 0;
}

static cli_exit run_ls(cli *c, uint32_t count, char **arguments)
{
    const store_tool *tool = c->user;
    (void)count;
    (void)arguments;
    if (!c->json && c->verbosity >= 1)
        printf("%8s %8s %11s %11s %7s  %-19s  %s\n", "Id", "Tokens", "Raw", "Stored", "Ratio", "Used", "Expires");
    return report(c, xkv_store_list(c->ctx, tool->store, &tool->ns, print_item, c));
}

static void print_number(const char *name, uint64_t value)
{
    printf("  %-24s %" PRIu64 "\n", name, value);
}

static void print_bytes(const char *name, uint64_t value)
{
    printf("  %-24s %" PRIu64 " (%s)\n", name, value, cli_size_text(value).text);
}

static void print_stats(const xkv_store_stats *s)
{
    print_number("entries", s->entries);
    print_number("pinned", s->pinned);
    print_number("namespaces", s->namespaces);
    print_number("dictionaries", s->dictionaries);
    print_bytes("bytes", s->bytes);
    print_bytes("byte cap", s->byte_cap);
    print_bytes("index", s->index_bytes);
    print_number("quarantined files", s->quarantined);
    print_bytes("quarantined bytes", s->quarantined_bytes);
    print_number("block tokens", s->block_tokens);
    print_number("puts", s->puts);
    print_number("hits", s->hits);
    print_number("misses", s->misses);
    print_number("evictions", s->evictions);
    print_number("expirations", s->expirations);
    print_number("damaged", s->corrupt);
    print_number("tokens reused", s->tokens_reused);
    print_bytes("raw bytes reused", s->bytes_reused);
    print_number("extending entries", s->extending);
    print_bytes("raw bytes shared", s->bytes_shared);
}

static json_t *stats_json(const xkv_store_stats *s)
{
    const struct {
        const char *name;
        uint64_t value;
    } fields[] = {
        {"entries", s->entries},
        {"pinned", s->pinned},
        {"namespaces", s->namespaces},
        {"dictionaries", s->dictionaries},
        {"bytes", s->bytes},
        {"byte_cap", s->byte_cap},
        {"index_bytes", s->index_bytes},
        {"quarantined", s->quarantined},
        {"quarantined_bytes", s->quarantined_bytes},
        {"puts", s->puts},
        {"hits", s->hits},
        {"misses", s->misses},
        {"evictions", s->evictions},
        {"expirations", s->expirations},
        {"damaged", s->corrupt},
        {"block_tokens", s->block_tokens},
        {"tokens_reused", s->tokens_reused},
        {"bytes_reused", s->bytes_reused},
        {"extending", s->extending},
        {"bytes_shared", s->bytes_shared},
    };
    json_t *object = json_object();
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        json_object_set_new(object, fields[i].name, json_integer((json_int_t)fields[i].value));
    return object;
}

static cli_exit run_stat(cli *c, uint32_t count, char **arguments)
{
    const store_tool *tool = c->user;
    xkv_store_stats s;
    (void)count;
    (void)arguments;
    xkv_status status = xkv_store_get_stats(c->ctx, tool->store, &s);
    if (status == XKV_OK && c->json)
        cli_json_print(stats_json(&s));
    else if (status == XKV_OK && c->verbosity >= 1)
        print_stats(&s);
    return report(c, status);
}

/* Run `change` for every ID; the first failure is the exit code. */
static cli_exit for_each_id(cli *c, uint32_t count, char **arguments, xkv_status (*change)(cli *c, uint64_t id))
{
    cli_exit code = CLI_OK;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t id;
        cli_exit one = store_parse_id(c, arguments[i], &id) ? report(c, change(c, id)) : CLI_USAGE;
        if (one == CLI_OK && c->json)
            cli_json_print(json_pack("{s:I, s:b}", "id", (json_int_t)id, "ok", 1));
        if (code == CLI_OK)
            code = one;
    }
    return code;
}

static xkv_status remove_id(cli *c, uint64_t id)
{
    const store_tool *tool = c->user;
    return xkv_store_remove(c->ctx, tool->store, &tool->ns, id);
}

static cli_exit run_rm(cli *c, uint32_t count, char **arguments)
{
    const store_tool *tool = c->user;
    uint64_t removed = 0;
    if (!tool->all)
        return for_each_id(c, count, arguments, remove_id);
    xkv_status status = xkv_store_remove_namespace(c->ctx, tool->store, &tool->ns, &removed);
    if (status == XKV_OK && c->json)
        cli_json_print(json_pack("{s:I, s:b}", "removed", (json_int_t)removed, "ok", 1));
    else if (status == XKV_OK)
        cli_note(c, "%s: removed %" PRIu64 " entries", tool->path, removed);
    return report(c, status);
}

static xkv_status pin_id(cli *c, uint64_t id)
{
    const store_tool *tool = c->user;
    return xkv_store_pin(c->ctx, tool->store, &tool->ns, id, 1);
}

static xkv_status unpin_id(cli *c, uint64_t id)
{
    const store_tool *tool = c->user;
    return xkv_store_pin(c->ctx, tool->store, &tool->ns, id, 0);
}

static cli_exit run_pin(cli *c, uint32_t count, char **arguments)
{
    return for_each_id(c, count, arguments, pin_id);
}

static cli_exit run_unpin(cli *c, uint32_t count, char **arguments)
{
    return for_each_id(c, count, arguments, unpin_id);
}

static void print_collected(cli *c, const xkv_collect_report *r)
{
    const store_tool *tool = c->user;
    if (c->json)
        cli_json_print(json_pack("{s:b, s:I, s:I, s:I, s:I, s:I, s:I}", "ok", 1, "expired", (json_int_t)r->expired,
                                 "evicted", (json_int_t)r->evicted, "orphans", (json_int_t)r->orphans, "leftovers",
                                 (json_int_t)r->leftovers, "dictionaries", (json_int_t)r->dictionaries, "freed_bytes",
                                 (json_int_t)r->freed_bytes));
    else
        cli_note(c,
                 "%s: %" PRIu64 " expired, %" PRIu64 " evicted, %" PRIu64 " orphans, %" PRIu64 " leftovers, %s freed",
                 tool->path, r->expired, r->evicted, r->orphans, r->leftovers, cli_size_text(r->freed_bytes).text);
}

static cli_exit run_gc(cli *c, uint32_t count, char **arguments)
{
    store_tool *tool = c->user;
    xkv_collect_report r, by_cap = {0};
    xkv_status status = XKV_OK;
    (void)count;
    (void)arguments;
    if (tool->cap_given)
        status = xkv_store_set_cap(c->ctx, tool->store, tool->properties.byte_cap, &by_cap);
    if (status == XKV_OK)
        status = xkv_store_collect(c->ctx, tool->store, tool->unused_dicts, &r);
    if (status == XKV_OK && tool->compact) {
        xkv_store_close(c->ctx, tool->store);
        tool->store = NULL;
        status = xkv_store_repair(c->ctx, tool->path, tool->key, 1, NULL);
    }
    if (status == XKV_OK) {
        r.evicted += by_cap.evicted;
        r.freed_bytes += by_cap.freed_bytes;
        print_collected(c, &r);
    }
    return report(c, status);
}

static cli_exit run_verify(cli *c, uint32_t count, char **arguments)
{
    const store_tool *tool = c->user;
    xkv_verify_report r;
    (void)count;
    (void)arguments;
    xkv_status status = xkv_store_verify(c->ctx, tool->store, tool->decode, cli_progress, c, &r);
    cli_progress_end(c);
    if (status != XKV_OK)
        return report(c, status);
    uint64_t wrong = r.damaged + r.missing + r.unreachable + r.wrong_sums + r.bad_records;
    if (c->json)
        cli_json_print(json_pack("{s:b, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o}", "ok", wrong == 0, "entries",
                                 (json_int_t)r.entries, "dictionaries", (json_int_t)r.dictionaries, "bytes",
                                 (json_int_t)r.bytes, "damaged", (json_int_t)r.damaged, "missing",
                                 (json_int_t)r.missing, "unreachable", (json_int_t)r.unreachable, "orphans",
                                 (json_int_t)r.orphans, "wrong_sums", (json_int_t)r.wrong_sums, "bad_records",
                                 (json_int_t)r.bad_records, "first", cli_json_string(r.first)));
    else if (wrong == 0)
        cli_note(c, "%s: OK, %" PRIu64 " entries, %s%s", tool->path, r.entries, cli_size_text(r.bytes).text,
                 r.orphans > 0 ? ", and orphaned files; gc removes them" : "");
    if (wrong > 0)
        cli_error(c,
                  "%s: %" PRIu64 " damaged, %" PRIu64 " missing, %" PRIu64 " unreachable, %" PRIu64 " bad records; %s",
                  tool->path, r.damaged, r.missing, r.unreachable, r.bad_records, r.first);
    c->reported = c->json;
    return wrong == 0 ? CLI_OK : CLI_BAD_INPUT;
}

static void print_repaired(cli *c, const xkv_repair_report *r)
{
    const store_tool *tool = c->user;
    char newer[80] = "";
    if (r->newer > 0)
        snprintf(newer, sizeof newer, ", %" PRIu64 " that only a newer program can read", r->newer);
    cli_note(c, "%s: %" PRIu64 " entries and %" PRIu64 " dictionaries%s, %" PRIu64 " damaged files in quarantine%s%s",
             tool->path, r->entries, r->dictionaries, newer, r->quarantined,
             r->kept_uses ? "" : "; pins and times of use are lost",
             r->lost_properties ? "; the properties of the store were damaged and are made anew" : "");
}

static cli_exit run_repair(cli *c, uint32_t count, char **arguments)
{
    const store_tool *tool = c->user;
    xkv_repair_report r;
    (void)count;
    (void)arguments;
    xkv_status status = xkv_store_repair(c->ctx, tool->path, tool->key, 0, &r);
    if (status == XKV_OK && c->json)
        cli_json_print(json_pack("{s:b, s:I, s:I, s:I, s:I, s:b, s:b}", "ok", 1, "entries", (json_int_t)r.entries,
                                 "dictionaries", (json_int_t)r.dictionaries, "quarantined", (json_int_t)r.quarantined,
                                 "newer", (json_int_t)r.newer, "kept_uses", (int)r.kept_uses, "lost_properties",
                                 (int)r.lost_properties));
    else if (status == XKV_OK)
        print_repaired(c, &r);
    return report(c, status);
}

static cli_exit run_push(cli *c, uint32_t count, char **arguments)
{
    const store_tool *tool = c->user;
    xkv_push_report r;
    (void)count;
    (void)arguments;
    xkv_status status = tool->all ? xkv_store_queue_all(c->ctx, tool->store, &tool->ns) : XKV_OK;
    if (status == XKV_OK)
        status = xkv_store_push(c->ctx, tool->store, &r);
    if (status != XKV_OK)
        return report(c, status);
    if (c->json)
        cli_json_print(json_pack("{s:b, s:I, s:I, s:I, s:o}", "ok", r.waiting == 0, "sent", (json_int_t)r.sent,
                                 "dropped", (json_int_t)r.dropped, "waiting", (json_int_t)r.waiting, "why",
                                 cli_json_string(r.why)));
    else
        cli_note(c, "%s: %" PRIu64 " entries sent, %" PRIu64 " waiting", tool->path, r.sent, r.waiting);
    if (r.waiting > 0)
        cli_error(c, "%s: %" PRIu64 " entries wait: %s", tool->path, r.waiting, r.why);
    c->reported = c->json;
    return r.waiting == 0 ? CLI_OK : CLI_FAILED;
}

/* --- The frame ------------------------------------------------------------------------------------------------------
 */

static const store_command commands[] = {
    {"init", run_init, 0, 0, true, false},
    {"put", store_put, 1, UINT32_MAX, true, true},
    {"match", store_match, 1, 1, false, true},
    {"get", store_get, 0, 1, false, true},
    {"ls", run_ls, 0, 0, false, true},
    {"stat", run_stat, 0, 0, false, true},
    {"rm", run_rm, 0, UINT32_MAX, true, true},
    {"pin", run_pin, 1, UINT32_MAX, true, true},
    {"unpin", run_unpin, 1, UINT32_MAX, true, true},
    {"gc", run_gc, 0, 0, true, true},
    {"verify", run_verify, 0, 0, false, true},
    {"repair", run_repair, 0, 0, true, false},
    {"export", store_export, 1, 1, false, true},
    {"import", store_import, 1, UINT32_MAX, true, true},
    {"push", run_push, 0, 0, true, true},
};

static const store_command *find_command(const char *name)
{
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(commands[i].name, name) == 0)
            return &commands[i];
    }
    return NULL;
}

static const char *problem_of(const cli *c, const store_tool *tool, uint32_t count)
{
    bool writes_file = tool->command->run == store_get || tool->command->run == store_export;
    if (count < tool->command->least || count > tool->command->most)
        return "wrong number of arguments for this command";
    if (writes_file != (c->output != NULL))
        return writes_file ? "name the output by -o" : "-o goes with get and export";
    if (tool->command->run == store_get && (count == 1) == (tool->id != 0))
        return "get takes either a prompt or --id";
    if (tool->command->run != store_get && tool->id != 0)
        return "--id goes with get";
    if (tool->command->run == run_rm && (count > 0) == tool->all)
        return "rm takes either ids or --all";
    if (tool->command->run == run_push && tool->remote.url == NULL)
        return "push needs --remote";
    return cli_pack_problem(c, &tool->pack);
}

static bool check_options(cli *c)
{
    store_tool *tool = c->user;
    if (c->input_count < 2) {
        cli_error(c, "name a command and a store");
        return false;
    }
    tool->command = find_command(c->arguments[0]);
    if (tool->command == NULL) {
        cli_error(c, "'%s' is not a command", c->arguments[0]);
        return false;
    }
    tool->path = c->subject = c->arguments[1];
    const char *problem = problem_of(c, tool, c->input_count - 2);
    if (problem != NULL)
        cli_error(c, "%s", problem);
    return problem == NULL;
}

/* The bytes of the salt file, without line ends at its end. */
static cli_exit read_salt(cli *c, const char *path, uint8_t *salt, size_t capacity, size_t *size)
{
    FILE *f = fopen(path, "rbe");
    if (f == NULL)
        return cli_fail_errno(c, path, "cannot open");
    *size = fread(salt, 1, capacity, f);
    bool failed = ferror(f) != 0;
    fclose(f);
    while (*size > 0 && (salt[*size - 1] == '\n' || salt[*size - 1] == '\r'))
        --*size;
    if (!failed && *size > 0 && *size < capacity)
        return CLI_OK;
    cli_error(c, "%s: cannot be read, is empty, or too long for a salt", path);
    return CLI_FAILED;
}

static cli_exit read_key(cli *c)
{
    store_tool *tool = c->user;
    uint8_t bytes[33];
    if (tool->key_path == NULL)
        return CLI_OK;
    FILE *f = fopen(tool->key_path, "rbe");
    if (f == NULL)
        return cli_fail_errno(c, tool->key_path, "cannot open");
    size_t n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    if (n != sizeof tool->key_bytes) {
        cli_error(c, "%s: a key is a file of 32 bytes", tool->key_path);
        return CLI_FAILED;
    }
    memcpy(tool->key_bytes, bytes, sizeof tool->key_bytes);
    tool->key = tool->properties.key = tool->key_bytes;
    return CLI_OK;
}

static cli_exit make_namespace(cli *c)
{
    store_tool *tool = c->user;
    xkv_namespace_fields f = xkv_namespace_fields_default();
    uint8_t salt[4096];
    size_t salt_size = 0;
    if (tool->salt_path != NULL) {
        cli_exit code = read_salt(c, tool->salt_path, salt, sizeof salt, &salt_size);
        if (code != CLI_OK)
            return code;
    }
    if (c->has_fingerprint)
        f.fingerprint = c->fingerprint;
    else if (tool->model != NULL && tool->model->has_fingerprint)
        f.fingerprint = tool->model->fingerprint;
    f.settings = tool->settings;
    f.lora = tool->lora;
    f.salt = salt;
    f.salt_size = salt_size;
    return report(c, xkv_namespace_make(c->ctx, &f, &tool->ns));
}

/* This program sends when it has stored, not on a thread. */
static cli_exit attach_remote(cli *c)
{
    store_tool *tool = c->user;
    tool->remote.manual = 1;
    xkv_status status = xkv_store_attach_remote(c->ctx, tool->store, &tool->remote);
    return status == XKV_OK ? CLI_OK : cli_fail(c, tool->remote.url, status);
}

static cli_exit begin(cli *c)
{
    store_tool *tool = c->user;
    xkv_store_options o = xkv_store_options_default();
    cli_exit code = cli_model_load(c, NULL, &tool->model);
    if (code == CLI_OK)
        code = read_key(c);
    if (code == CLI_OK)
        code = make_namespace(c);
    if (code != CLI_OK || !tool->command->opens)
        return code;
    tool->pack.model = tool->model != NULL ? tool->model : cli_model_bare(c, &tool->bare);
    tool->pack.progress = cli_progress;
    tool->pack.progress_user = c;
    o.key = tool->key;
    o.access = tool->command->writes || tool->remote.url != NULL ? XKV_STORE_READ_WRITE : XKV_STORE_AUTO;
    code = report(c, xkv_store_open(c->ctx, tool->path, &o, &tool->store));
    return code == CLI_OK && tool->remote.url != NULL ? attach_remote(c) : code;
}

static void end(cli *c)
{
    store_tool *tool = c->user;
    xkv_store_close(c->ctx, tool->store);
    xkv_model_free(c->ctx, tool->model);
}

static cli_exit process_all(cli *c, uint32_t count, char **paths)
{
    const store_tool *tool = c->user;
    return tool->command->run(c, count - 2, paths + 2);
}

int main(int argc, char **argv)
{
    static const cli_tool tool = {
        .name = "xkv-store",
        .usage = "Usage: xkv-store COMMAND [options] STORE [ARGUMENT...]",
        .help = help,
        .letters = letters,
        .options = long_options,
        .option = take_option,
        .check = check_options,
        .begin = begin,
        .end = end,
        .process_all = process_all,
    };
    store_tool state = {.properties = xkv_store_properties_default(),
                        .pack = xkv_pack_options_default(),
                        .put = xkv_put_options_default(),
                        .remote = xkv_remote_options_default()};
    return cli_main(&tool, &state, argc, argv);
}
