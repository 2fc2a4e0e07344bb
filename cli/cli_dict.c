/* cli_dict.c - dictionaries: opened by name, or found in a folder by what is needed. */
#include "cli.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

/* What a dictionary is looked for by. */
typedef struct wanted {
    const uint8_t *id;          /* its own; NULL: any that fits the model */
    const uint8_t *fingerprint; /* of the model; NULL: not known */
    uint32_t layers;
} wanted;

typedef struct found {
    int rank; /* how well it fits: 0 not at all */
    uint32_t count;
    uint8_t id[16];
    char path[4096];
} found;

void cli_dict_close(cli *c)
{
    xkv_dict_close(c->ctx, c->dict);
    c->dict = NULL;
}

uint32_t cli_dict_groups(const xkv_dict_info *info)
{
    return info->group_count - (info->cross_components > 0);
}

static bool is_loaded(const cli *c, const uint8_t *id)
{
    xkv_dict_info info;
    if (c->dict == NULL)
        return false;
    xkv_dict_get_info(c->dict, &info);
    return memcmp(info.id, id, sizeof info.id) == 0;
}

static xkv_status read_info(cli *c, const char *path, xkv_dict_info *info)
{
    xkv_input input;
    xkv_status status = xkv_input_open(c->ctx, path, &input);
    if (status != XKV_OK)
        return status;
    status = xkv_dict_read_info(c->ctx, &input, info);
    xkv_input_close(c->ctx, &input);
    return status;
}

static cli_exit load(cli *c, const char *path, int for_packing)
{
    xkv_input input;
    cli_dict_close(c);
    xkv_status status = xkv_input_open(c->ctx, path, &input);
    if (status == XKV_OK) {
        status = xkv_dict_open(c->ctx, &input, for_packing, &c->dict);
        xkv_input_close(c->ctx, &input);
    }
    return status == XKV_OK ? CLI_OK : cli_fail(c, path, status);
}

/* --- Folders --------------------------------------------------------------------------------------------------------
 */

static bool has_fingerprint(const xkv_dict_info *info)
{
    static const uint8_t none[16];
    return memcmp(info->fingerprint, none, sizeof none) != 0;
}

static int rank(const wanted *w, const xkv_dict_info *info)
{
    if (w->id != NULL)
        return memcmp(info->id, w->id, sizeof info->id) == 0;
    if (w->fingerprint != NULL && has_fingerprint(info))
        return memcmp(info->fingerprint, w->fingerprint, sizeof info->fingerprint) == 0 ? 2 : 0;
    return info->layer_count == w->layers;
}

/* Two copies of one dictionary count once. */
static void consider(const wanted *w, const char *path, const xkv_dict_info *info, found *best)
{
    int r = rank(w, info);
    if (r == 0 || r < best->rank)
        return;
    if (r == best->rank) {
        best->count += memcmp(best->id, info->id, sizeof info->id) != 0;
        return;
    }
    best->rank = r;
    best->count = 1;
    memcpy(best->id, info->id, sizeof info->id);
    snprintf(best->path, sizeof best->path, "%s", path);
}

static int is_dictionary(const struct dirent *entry)
{
    size_t n = strlen(entry->d_name);
    return n > 5 && strcmp(entry->d_name + n - 5, ".xkvd") == 0;
}

static cli_exit search(cli *c, const wanted *w, found *best)
{
    struct dirent **list;
    int count = scandir(c->dict_path, &list, is_dictionary, alphasort);
    if (count < 0)
        return cli_fail_errno(c, c->dict_path, "cannot open");
    for (int i = 0; i < count; i++) {
        char path[sizeof best->path];
        xkv_dict_info info;
        bool fits = (size_t)snprintf(path, sizeof path, "%s/%s", c->dict_path, list[i]->d_name) < sizeof path;
        if (fits && read_info(c, path, &info) == XKV_OK)
            consider(w, path, &info, best);
        else if (c->verbosity >= 2)
            cli_note(c, "%s: skipped: %s", path, xkv_ctx_error(c->ctx));
        free(list[i]);
    }
    free(list);
    return CLI_OK;
}

/* Whether -D is a folder; its absence is reported. */
static cli_exit check_path(cli *c, bool *folder)
{
    struct stat st;
    if (stat(c->dict_path, &st) != 0)
        return cli_fail_errno(c, c->dict_path, "cannot open");
    *folder = S_ISDIR(st.st_mode);
    return CLI_OK;
}

/* --- Packing --------------------------------------------------------------------------------------------------------
 */

static cli_exit choose_from_folder(cli *c, const char *name, const wanted *w, bool required)
{
    found best = {0};
    cli_exit code = search(c, w, &best);
    if (code != CLI_OK)
        return code;
    if (best.count == 1)
        return is_loaded(c, best.id) ? CLI_OK : load(c, best.path, 1);
    cli_dict_close(c);
    if (!required)
        return CLI_OK;
    if (best.count == 0)
        cli_error(c, "%s: no dictionary in %s fits the model", name, c->dict_path);
    else
        cli_error(c, "%s: %u dictionaries in %s fit; name one by -D", name, best.count, c->dict_path);
    return CLI_MISMATCH;
}

static cli_exit use_named(cli *c, const char *name, const wanted *w)
{
    xkv_dict_info info;
    xkv_status status = read_info(c, c->dict_path, &info);
    if (status != XKV_OK)
        return cli_fail(c, c->dict_path, status);
    if (info.layer_count != w->layers) {
        cli_error(c, "%s: has %u layers, the dictionary %s %u", name, w->layers, c->dict_path, info.layer_count);
        return CLI_MISMATCH;
    }
    if (w->fingerprint != NULL && has_fingerprint(&info) && memcmp(info.fingerprint, w->fingerprint, 16) != 0)
        cli_note(c, "%s: warning: the dictionary %s was trained on the model %s", name, c->dict_path,
                 cli_hex_text(info.fingerprint, 16).text);
    return is_loaded(c, info.id) ? CLI_OK : load(c, c->dict_path, 1);
}

cli_exit cli_dict_choose(cli *c, const char *name, const xkv_model *model, uint32_t layer_count, bool required)
{
    wanted w = {.layers = layer_count};
    bool folder = false;
    if (model != NULL && model->has_fingerprint)
        w.fingerprint = model->fingerprint;
    cli_exit code = check_path(c, &folder);
    if (code != CLI_OK)
        return code;
    return folder ? choose_from_folder(c, name, &w, required) : use_named(c, name, &w);
}

/* --- Restoring ------------------------------------------------------------------------------------------------------
 */

static cli_exit load_by_id(cli *c, const char *name, const uint8_t *id, bool for_packing)
{
    found best = {0};
    bool folder = false;
    cli_exit code = check_path(c, &folder);
    if (code != CLI_OK)
        return code;
    if (!folder)
        return load(c, c->dict_path, for_packing);
    code = search(c, &(wanted){.id = id}, &best);
    if (code != CLI_OK)
        return code;
    if (best.count > 0)
        return load(c, best.path, for_packing);
    cli_error(c, "%s: needs the dictionary %s, which is not in %s", name, cli_hex_text(id, 16).text, c->dict_path);
    return CLI_MISMATCH;
}

cli_exit cli_dict_attach(cli *c, const char *name, xkv_entry *entry, bool for_packing)
{
    xkv_entry_info info;
    cli_exit code = CLI_OK;
    xkv_entry_get_info(entry, &info);
    if (!info.needs_dict)
        return CLI_OK;
    if (c->dict_path == NULL) {
        cli_error(c, "%s: needs the dictionary %s; name it, or its folder, by -D", name,
                  cli_hex_text(info.dictionary_id, 16).text);
        return CLI_MISMATCH;
    }
    if (!is_loaded(c, info.dictionary_id))
        code = load_by_id(c, name, info.dictionary_id, for_packing);
    if (code != CLI_OK)
        return code;
    xkv_status status = xkv_entry_attach(c->ctx, entry, c->dict);
    return status == XKV_OK ? CLI_OK : cli_fail(c, name, status);
}
