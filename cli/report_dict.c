/* report_dict.c - the section of a dictionary. */
#include "html.h"
#include "info.h"
#include "report.h"

enum { MAX_PANELS = 64 };

static const double qualities[] = {35, 50, 65, 80};
enum { QUALITIES = sizeof qualities / sizeof *qualities };

static const char *string_value(const xkv_dict *dict, const char *key, const char *otherwise)
{
    for (uint32_t i = 0; i < xkv_dict_value_count(dict); i++) {
        xkv_value v;
        xkv_dict_get_value(dict, i, &v);
        if (v.type == XKV_VALUE_STRING && strcmp(v.key, key) == 0)
            return (const char *)v.bytes;
    }
    return otherwise;
}

static void add_row(report *r, const char *name, const xkv_dict *dict, const xkv_dict_info *info)
{
    FILE *f = r->dictionaries.f;
    report_row_begin(r, f, name);
    fputs("<td class=\"text\">", f);
    html_text(f, string_value(dict, "model.name", "-"));
    fputs("</td>", f);
    html_cell(f, html_count(info->layer_count).text);
    html_cell(f, html_count(cli_dict_groups(info)).text);
    html_cell(f, html_count(info->component_count).text);
    html_cell(f, html_count(info->cross_components).text);
    html_cell(f, html_count(info->tokens).text);
    html_cell(f, cli_size_text(info->file_size).text);
    html_row_end(f);
}

static void add_tiles(report *r, const xkv_dict_info *info)
{
    char text[96];
    fputs("<div class=\"tiles\">", r->sections.f);
    report_tile(r, cli_size_text(info->file_size).text, "size of the dictionary");
    report_tile(r, html_count(info->tokens).text, "training tokens");
    snprintf(text, sizeof text, "components in %u groups of %u layers", cli_dict_groups(info), info->layer_count);
    report_tile(r, html_count(info->component_count).text, text);
    report_tile(r, html_count(info->cross_components).text, "components of the cross stage");
    fputs("</div>\n", r->sections.f);
}

static void add_facts(report *r, const xkv_dict *dict, const xkv_dict_info *info)
{
    FILE *f = r->sections.f;
    static const uint8_t none[16];
    bool known = memcmp(info->fingerprint, none, sizeof none) != 0;
    fputs("<dl>\n", f);
    html_fact(f, "Model", "%s (%s)", string_value(dict, "model.name", "unknown"),
              string_value(dict, "model.architecture", "architecture unknown"));
    html_fact(f, "Fingerprint of the model", "%s", known ? cli_hex_text(info->fingerprint, 16).text : "unknown");
    html_fact(f, "Id", "%s", cli_hex_text(info->id, 16).text);
    html_fact(f, "Unit of quality", "%.4g", info->unit);
    html_fact(f, "Finest quality", "%g", info->max_quality);
    fputs("</dl>\n", f);
}

static void read_group(const xkv_dict *dict, uint32_t index, report_group *group)
{
    *group = (report_group){0};
    xkv_dict_get_group(dict, index, &group->info);
    group->sigma = xkv_dict_sigma(dict, index, &group->sigma_count);
    if (group->info.codec == XKV_CODEC_DICT)
        group->leading = xkv_dict_leading(dict, index);
}

/* Components whose deviation is at least that of half a step. */
static uint32_t count_above(const report_group *group, double step)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < group->sigma_count; i++)
        count += (double)group->sigma[i] >= step / 2;
    return count;
}

static void add_groups(report *r, const xkv_dict *dict, const xkv_dict_info *info)
{
    FILE *f = r->sections.f;
    char headings[256] = "<Group|Width|Components|Of them in the cross stage|Size";
    for (uint32_t q = 0; q < QUALITIES; q++) {
        size_t n = strlen(headings);
        snprintf(headings + n, sizeof headings - n, "|Wide at quality %g", qualities[q]);
    }
    html_table_begin(f, "Groups. Wide are components that deviate by half a step or more", headings);
    for (uint32_t i = 0; i < info->group_count; i++) {
        report_group group;
        char wide[QUALITIES][64];
        read_group(dict, i, &group);
        for (uint32_t q = 0; q < QUALITIES; q++)
            snprintf(wide[q], sizeof wide[q], "%s",
                     html_count(count_above(&group, xkv_dict_step(dict, qualities[q]))).text);
        bool cross = group.info.codec == XKV_CODEC_CROSS;
        html_row(f, "%s|%s|%s|%s|%s|%s|%s|%s|%s", report_group_name(xkv_dict_geometry(dict), &group, i).text,
                 cross ? "-" : html_count(group.info.width).text, html_count(group.info.rank).text,
                 cross ? "-" : html_count(group.leading).text, cli_size_text(group.info.packed_bytes).text, wide[0],
                 wide[1], wide[2], wide[3]);
    }
    html_table_end(f);
}

static void add_spectra(report *r, const xkv_dict *dict, const xkv_dict_info *info)
{
    report_step steps[QUALITIES];
    for (uint32_t q = 0; q < QUALITIES; q++) {
        steps[q].step = xkv_dict_step(dict, qualities[q]);
        snprintf(steps[q].label, sizeof steps[q].label, "quality %g", qualities[q]);
    }
    report_figure_begin(r, "Spectrum of each group",
                        "Standard deviation of the coefficients in training. At a quality, components well below its "
                        "line are not coded.");
    fputs("<p class=\"keys\">", r->sections.f);
    report_key(r, "curve sigma", "deviation in training");
    report_key(r, "rule step", "step of the quantizer");
    if (info->cross_components > 0)
        report_key(r, "band", "coded by the cross stage");
    fputs("</p>\n<div class=\"panels\">\n", r->sections.f);
    for (uint32_t i = 0; i < info->group_count && i < MAX_PANELS; i++) {
        report_group group;
        read_group(dict, i, &group);
        report_spectrum(r, xkv_dict_geometry(dict), &group, i, steps, QUALITIES, 0);
    }
    fputs("</div>\n", r->sections.f);
    if (info->group_count > MAX_PANELS)
        fprintf(r->sections.f, "<p>The first %d of %u groups.</p>\n", MAX_PANELS, info->group_count);
    report_figure_end(r);
}

static void get_value(const void *of, uint32_t index, xkv_value *value)
{
    xkv_dict_get_value(of, index, value);
}

void report_add_dictionary(report *r, const char *name, const xkv_dict *dict)
{
    xkv_dict_info info;
    xkv_dict_get_info(dict, &info);
    r->dictionary_count++;
    add_row(r, name, dict, &info);
    report_section_begin(r, name, "dictionary");
    add_tiles(r, &info);
    add_facts(r, dict, &info);
    add_spectra(r, dict, &info);
    add_groups(r, dict, &info);
    report_metadata(r, xkv_dict_value_count(dict), get_value, dict);
    report_section_end(r);
}
