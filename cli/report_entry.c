/* report_entry.c - the section of an entry: what it is, its groups, and the charts of them. */
#include "html.h"
#include "info.h"
#include "report.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

enum { MAX_PANELS = 64 }; /* charts of single groups */

/* An entry while its section is made. */
typedef struct subject {
    xkv_ctx *ctx;
    const char *name;
    const xkv_entry *entry;
    const xkv_geometry *g;
    xkv_entry_info info;
    xkv_dict *dict;       /* NULL: none, or not at hand */
    report_group *groups; /* [info.group_count] */
    uint32_t coded_tokens;
} subject;

/* --- Facts -------------------------------------------------------------------------------------------------------- */

/* The group of the dictionary that has the first plane of `group`; `count` if there is none. */
static uint32_t find_dict_group(const subject *s, const xkv_group_info *group, uint32_t count)
{
    const xkv_geometry *g = xkv_dict_geometry(s->dict);
    for (uint32_t i = 0; i < count; i++) {
        xkv_group_info candidate;
        xkv_dict_get_group(s->dict, i, &candidate);
        if (group->codec == XKV_CODEC_CROSS && candidate.codec == XKV_CODEC_CROSS)
            return i;
        if (group->plane_count == 0 || candidate.plane_count == 0)
            continue;
        const xkv_plane *a = &s->g->planes[group->planes[0]], *b = &g->planes[candidate.planes[0]];
        if (a->layer == b->layer && a->kind == b->kind)
            return i;
    }
    return count;
}

static void add_sigma(const subject *s, report_group *group)
{
    xkv_dict_info info;
    bool uses = group->info.codec == XKV_CODEC_DICT || group->info.codec == XKV_CODEC_CROSS;
    if (s->dict == NULL || !uses)
        return;
    xkv_dict_get_info(s->dict, &info);
    uint32_t index = find_dict_group(s, &group->info, info.group_count);
    if (index == info.group_count)
        return;
    group->sigma = xkv_dict_sigma(s->dict, index, &group->sigma_count);
    if (group->info.codec == XKV_CODEC_DICT && s->groups[0].info.codec == XKV_CODEC_CROSS)
        group->leading = xkv_dict_leading(s->dict, index);
}

static xkv_status read_group(cli *c, const subject *s, uint32_t index)
{
    report_group *group = &s->groups[index];
    xkv_group_coding coding;
    xkv_entry_get_group(s->entry, index, &group->info);
    group->side = xkv_entry_part_size(s->entry, index, 0);
    group->exact = xkv_entry_part_size(s->entry, index, 1);
    for (uint32_t i = 0; i < s->info.chunk_count; i++)
        group->chunks += xkv_entry_part_size(s->entry, index, 2 + i);
    if (!info_is_coded(&group->info))
        return XKV_OK;
    xkv_status status = xkv_entry_read_coding(c->ctx, s->entry, index, &coding);
    if (status != XKV_OK)
        return status;
    group->step = coding.step;
    group->coded = coding.coded;
    add_sigma(s, group);
    group->components = calloc(group->info.rank + 1u, sizeof *group->components);
    return group->components == NULL ? XKV_ERROR_MEMORY
                                     : xkv_entry_read_components(c->ctx, s->entry, index, group->components);
}

static cli_exit read_groups(cli *c, subject *s)
{
    s->groups = calloc(s->info.group_count + 1u, sizeof *s->groups);
    if (s->groups == NULL)
        return cli_fail(c, s->name, XKV_ERROR_MEMORY);
    for (uint32_t i = 0; i < s->info.group_count; i++) {
        xkv_status status = read_group(c, s, i);
        if (status != XKV_OK)
            return cli_fail(c, s->name, status);
    }
    return CLI_OK;
}

static void free_groups(subject *s)
{
    for (uint32_t i = 0; s->groups != NULL && i < s->info.group_count; i++)
        free(s->groups[i].components);
    free(s->groups);
}

/* The dictionary that is open, if it is that of the entry. */
static xkv_dict *dictionary_of(const cli *c, const xkv_entry_info *info)
{
    xkv_dict_info dict;
    if (c->dict == NULL || !info->needs_dict)
        return NULL;
    xkv_dict_get_info(c->dict, &dict);
    return memcmp(dict.id, info->dictionary_id, sizeof dict.id) == 0 ? c->dict : NULL;
}

static const char *string_value(const subject *s, const char *key, const char *otherwise)
{
    xkv_value v;
    bool found = xkv_entry_find_value(s->entry, key, &v) && v.type == XKV_VALUE_STRING;
    return found ? (const char *)v.bytes : otherwise;
}

static double error_of(const subject *s, uint32_t kind)
{
    return info_kind_error(s->entry, s->info.group_count, kind);
}

/* Latents count as K. */
static double error_of_keys(const subject *s)
{
    return fmax(error_of(s, XKV_PLANE_K), error_of(s, XKV_PLANE_LATENT));
}

static double bits_per_element(const xkv_entry_info *info)
{
    return info->raw16_bytes > 0 ? 16 * (double)info->file_size / (double)info->raw16_bytes : 0;
}

static cli_text ratio_text(const xkv_entry_info *info)
{
    cli_text t = {"-"};
    if (info->raw16_bytes > 0)
        snprintf(t.text, sizeof t.text, "%.2f", info_ratio(info));
    return t;
}

/* --- Text --------------------------------------------------------------------------------------------------------- */

static void add_row(report *r, const subject *s)
{
    FILE *f = r->entries.f;
    report_row_begin(r, f, s->name);
    fputs("<td class=\"text\">", f);
    html_text(f, string_value(s, "model.name", "-"));
    fputs("</td>", f);
    html_cell(f, info_entry_codec(s->entry, &s->info));
    html_cell(f, html_count(s->g->token_count).text);
    html_cell(f, cli_size_text(s->info.raw_bytes).text);
    html_cell(f, cli_size_text(s->info.file_size).text);
    html_cell(f, ratio_text(&s->info).text);
    html_cell(f, info_error_text(error_of_keys(s)).text);
    html_cell(f, info_error_text(error_of(s, XKV_PLANE_V)).text);
    html_cell(f, html_number(bits_per_element(&s->info)).text);
    html_row_end(f);
}

static void add_tiles(report *r, const subject *s)
{
    FILE *f = r->sections.f;
    char text[96];
    fputs("<div class=\"tiles\">", f);
    snprintf(text, sizeof text, "%sx", ratio_text(&s->info).text);
    report_tile(r, text, "smaller than the cache at 16 bits");
    snprintf(text, sizeof text, "of %s", cli_size_text(s->info.raw_bytes).text);
    report_tile(r, cli_size_text(s->info.file_size).text, text);
    snprintf(text, sizeof text, "tokens in %u layers", s->g->layer_count);
    report_tile(r, html_count(s->g->token_count).text, text);
    report_tile(r, info_error_text(error_of_keys(s)).text, "relative error of K");
    report_tile(r, info_error_text(error_of(s, XKV_PLANE_V)).text, "relative error of V");
    report_tile(r, html_number(bits_per_element(&s->info)).text, "bits an element, all bytes counted");
    fputs("</div>\n", f);
}

static void add_quantizer(report *r, const subject *s)
{
    FILE *f = r->sections.f;
    xkv_value v;
    for (uint32_t i = 0; i < s->info.group_count; i++) {
        if (s->groups[i].step <= 0)
            continue;
        if (s->dict != NULL)
            html_fact(f, "Quantizer", "step %.4g, which is quality %.1f", s->groups[i].step,
                      xkv_dict_quality(s->dict, s->groups[i].step));
        else
            html_fact(f, "Quantizer", "step %.4g", s->groups[i].step);
        break;
    }
    if (xkv_entry_find_value(s->entry, "error.metric", &v) && v.type == XKV_VALUE_F64)
        html_fact(f, "Error in the packer's metric", "%.4f", v.f64);
}

static void add_dictionary_fact(report *r, const subject *s)
{
    if (!s->info.needs_dict)
        html_fact(r->sections.f, "Dictionary", "needs none");
    else
        html_fact(r->sections.f, "Dictionary", "%s%s", cli_hex_text(s->info.dictionary_id, 16).text,
                  s->dict != NULL ? "" : " (not at hand: name it by -D to see what it was trained on)");
}

/* A run of equal layers behind `*text`, "512x5 0 ...": how many, and their window; 0: that was the last one. */
static uint32_t next_run(const char **text, uint32_t *window)
{
    char *end;
    *window = (uint32_t)strtoul(*text, &end, 10);
    if (end == *text)
        return 0;
    uint32_t count = *end == 'x' ? (uint32_t)strtoul(end + 1, &end, 10) : 1;
    *text = end;
    return count;
}

/* "0-4, 6" of layers: text grows by them. */
static void name_layers(cli_text *t, uint32_t first, uint32_t count)
{
    size_t used = strlen(t->text);
    const char *comma = used > 0 ? ", " : "";
    if (used > sizeof t->text - 28)
        snprintf(t->text + used, sizeof t->text - used, "%s", t->text[used - 1] == '.' ? "" : ", ...");
    else if (count == 1)
        snprintf(t->text + used, sizeof t->text - used, "%s%u", comma, first);
    else
        snprintf(t->text + used, sizeof t->text - used, "%s%u-%u", comma, first, first + count - 1);
}

/* How far back the attention of which layers reaches, as the model says. */
static void add_windows(report *r, const subject *s)
{
    const char *text = string_value(s, "model.windows", "");
    uint32_t window, run, first = 0, widest = 0;
    cli_text layers = {""};
    for (; (run = next_run(&text, &window)) > 0 && first < s->g->layer_count; first += run) {
        widest = window > widest ? window : widest;
        if (window > 0)
            name_layers(&layers, first, run);
    }
    if (widest > 0)
        html_fact(r->sections.f, "Sliding windows", "%s tokens, layers %s", html_count(widest).text, layers.text);
}

static bool has_planes(const subject *s, uint32_t layer)
{
    for (uint32_t i = 0; i < s->g->plane_count; i++)
        if (s->g->planes[i].layer == layer)
            return true;
    return false;
}

/* What of the engine's file can be restored, and which layers are in it byte for byte. */
static void add_restoring(report *r, const subject *s)
{
    FILE *f = r->sections.f;
    cli_text carried = {""};
    if (xkv_entry_framing(s->entry) == NULL)
        html_fact(f, "Restores", "rows: it was packed from memory");
    else if (info_is_whole_only(s->ctx, s->entry))
        html_fact(f, "Restores", "whole prefix only: %s", xkv_ctx_error(s->ctx));
    else
        html_fact(f, "Restores", "any number of first tokens");
    for (uint32_t i = 0, run; i < s->g->layer_count; i += run) {
        for (run = 0; i + run < s->g->layer_count && !has_planes(s, i + run); run++)
            ;
        if (run > 0)
            name_layers(&carried, i, run);
        run += run == 0;
    }
    if (carried.text[0] != '\0' && xkv_entry_framing(s->entry) != NULL)
        html_fact(f, "Carried byte for byte", "layers %s", carried.text);
}

static void add_facts(report *r, const subject *s, bool verified)
{
    FILE *f = r->sections.f;
    const xkv_entry_info *i = &s->info;
    fputs("<dl>\n", f);
    html_fact(f, "Model", "%s (%s)", string_value(s, "model.name", "unknown"),
              string_value(s, "model.architecture", "architecture unknown"));
    html_fact(f, "Codec", "%s, %u groups", info_entry_codec(s->entry, i), i->group_count);
    add_quantizer(r, s);
    add_dictionary_fact(r, s);
    html_fact(f, "Engine", "%s", info_engine_name(s->entry));
    html_fact(f, "Element types", "%s", s->g->plane_count > 0 ? info_element_types(s->g).text : "-");
    html_fact(f, "Exact tokens", "%u sinks, %u window", i->sinks, i->window);
    add_restoring(r, s);
    add_windows(r, s);
    html_fact(f, "Chunks", "%u of %u tokens", i->chunk_count, i->chunk_tokens);
    if (s->g->token_count > 0)
        html_fact(f, "Positions", "%d to %d", (int)s->g->positions[0], (int)s->g->positions[s->g->token_count - 1]);
    html_fact(f, "Token ids", "%s", html_count(s->g->token_id_count).text);
    html_fact(f, "Content id", "%s", cli_hex_text(i->content_id, 16).text);
    html_fact(f, "Format version", "%u, readable since version %u", i->write_version, i->read_version);
    html_fact(f, "Checked", "%s", verified ? "everything decoded, all checksums right" : "header and tables");
    fputs("</dl>\n", f);
}

/* "600 of 1536" of quantized groups. */
static cli_text components_text(const report_group *group)
{
    cli_text t = {"-"};
    if (group->components != NULL)
        snprintf(t.text, sizeof t.text, "%.20s of %.20s", html_count(group->coded).text,
                 html_count(group->info.rank).text);
    else if (group->info.codec == XKV_CODEC_SVD)
        return html_count(group->info.rank);
    return t;
}

static void add_groups(report *r, const subject *s)
{
    FILE *f = r->sections.f;
    html_table_begin(f, "Groups", "<Group|<Codec|Components|Step|Raw|Packed|Ratio|Error");
    for (uint32_t i = 0; i < s->info.group_count; i++) {
        const report_group *group = &s->groups[i];
        const char *reason = info_lossless_reason(&group->info);
        double ratio = group->info.packed_bytes > 0 && group->info.raw_bytes > 0
                           ? (double)group->info.raw_bytes / (double)group->info.packed_bytes
                           : NAN;
        html_row(f, "%s|%s%s%s|%s|%s|%s|%s|%s|%s", report_group_name(s->g, group, i).text,
                 info_codec_name(&group->info), reason != NULL ? ": " : "", reason != NULL ? reason : "",
                 components_text(group).text, group->step > 0 ? html_number(group->step).text : "-",
                 cli_size_text(group->info.raw_bytes).text, cli_size_text(group->info.packed_bytes).text,
                 html_number(ratio).text, group->info.plane_count > 0 ? info_error_text(group->info.error).text : "-");
    }
    html_table_end(f);
}

/* --- Charts ------------------------------------------------------------------------------------------------------- */

static void add_spectra_keys(report *r, const subject *s)
{
    fputs("<p class=\"keys\">", r->sections.f);
    if (s->dict != NULL)
        report_key(r, "curve sigma", "deviation in training");
    report_key(r, "curve found", "deviation in this entry, as decoded");
    report_key(r, "rule step", "step of the quantizer");
    report_key(r, "area bits", "bits per token");
    fputs("</p>\n", r->sections.f);
}

static void add_spectra(report *r, const subject *s)
{
    uint32_t shown = 0;
    for (uint32_t i = 0; i < s->info.group_count; i++)
        shown += s->groups[i].components != NULL;
    if (shown == 0)
        return;
    report_figure_begin(
        r, "Spectrum and bits of each group",
        "Above: how far the coefficients of each component spread. What lies well below the step is not "
        "coded. Below: what coding a component takes, exact, from the tables that the entry names.");
    add_spectra_keys(r, s);
    fputs("<div class=\"panels\">\n", r->sections.f);
    for (uint32_t i = 0, drawn = 0; i < s->info.group_count && drawn < MAX_PANELS; i++) {
        const report_group *group = &s->groups[i];
        report_step step = {.step = group->step, .label = "step"};
        if (group->components == NULL)
            continue;
        report_spectrum(r, s->g, group, i, &step, 1, s->coded_tokens);
        drawn++;
    }
    fputs("</div>\n", r->sections.f);
    if (shown > MAX_PANELS)
        fprintf(r->sections.f, "<p>The first %d of %u groups.</p>\n", MAX_PANELS, shown);
    report_bands(r, s->g, s->groups, s->info.group_count, s->coded_tokens);
    report_figure_end(r);
}

static void get_value(const void *of, uint32_t index, xkv_value *value)
{
    xkv_entry_get_value(of, index, value);
}

static void add_section(report *r, const subject *s, bool verified)
{
    report_section_begin(r, s->name, "entry");
    add_tiles(r, s);
    add_facts(r, s, verified);
    report_bytes(r, s->entry, &s->info, s->groups);
    report_errors(r, s->entry, s->groups, s->info.group_count);
    add_spectra(r, s);
    add_groups(r, s);
    report_metadata(r, xkv_entry_value_count(s->entry), get_value, s->entry);
    report_section_end(r);
}

cli_exit report_add_entry(cli *c, report *r, const char *name, const xkv_entry *entry, bool verified)
{
    subject s = {.ctx = c->ctx, .name = name, .entry = entry, .g = xkv_entry_geometry(entry)};
    xkv_entry_get_info(entry, &s.info);
    s.dict = dictionary_of(c, &s.info);
    s.coded_tokens = s.g->token_count - s.info.sinks - s.info.window;
    cli_exit code = read_groups(c, &s);
    if (code == CLI_OK) {
        r->entry_count++;
        add_row(r, &s);
        add_section(r, &s, verified);
    }
    free_groups(&s);
    return code;
}
