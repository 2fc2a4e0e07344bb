/* report_bytes.c - where the bytes of an entry are, and what its planes have lost. */
#include "chart.h"
#include "html.h"
#include "info.h"
#include "report.h"

#include <math.h>
#include <stdlib.h>

enum { WIDTH = 960, LEFT = 64, RIGHT = 948, BAR_LEFT = 210, MAX_BARS = 64 };

/* --- Parts -------------------------------------------------------------------------------------------------------- */

enum { COEFFICIENTS, CROSS, LOSSLESS, EXACT, SIDE, FRAMING, TOKENS, HEAD, PARTS };

typedef struct part {
    const char *name, *class;
    uint64_t bytes;
} part;

static void count_parts(const xkv_entry_info *info, const report_group *groups, part *parts)
{
    static const part all[PARTS] = {{"Coefficients", "p0", 0},
                                    {"Coefficients of the cross stage", "p1", 0},
                                    {"Lossless groups", "p2", 0},
                                    {"Exact rows: sinks and window", "p3", 0},
                                    {"Side parts: steps, tables, components", "p4", 0},
                                    {"Framing of the engine's file", "p5", 0},
                                    {"Token ids", "p6", 0},
                                    {"Header, tables, metadata, alignment", "p7", 0}};
    memcpy(parts, all, sizeof all);
    for (uint32_t i = 0; i < info->group_count; i++) {
        uint32_t codec = groups[i].info.codec;
        uint32_t at = codec == XKV_CODEC_CROSS ? CROSS : codec == XKV_CODEC_LOSSLESS ? LOSSLESS : COEFFICIENTS;
        parts[at].bytes += groups[i].chunks;
        parts[EXACT].bytes += groups[i].exact;
        parts[SIDE].bytes += groups[i].side;
    }
    parts[FRAMING].bytes = info->framing_bytes;
    parts[TOKENS].bytes = info->token_bytes;
    uint64_t known = 0;
    for (uint32_t i = 0; i < HEAD; i++)
        known += parts[i].bytes;
    parts[HEAD].bytes = info->file_size - known;
}

/* A bar of pieces that add up to `whole` over `width` pixels. */
static void draw_bar(FILE *f, const part *parts, uint32_t count, double x, double y, double height, double scale)
{
    for (uint32_t i = 0; i < count; i++) {
        char what[128];
        double width = scale * (double)parts[i].bytes;
        if (parts[i].bytes == 0)
            continue;
        snprintf(what, sizeof what, "%s: %s", parts[i].name, cli_size_text(parts[i].bytes).text);
        chart_box(f, parts[i].class, x, y, width, height, what);
        x += width;
    }
}

static void draw_parts(report *r, const part *parts, uint64_t whole)
{
    FILE *f = r->sections.f;
    chart_begin(f, ++r->drawings, WIDTH, 40, "Bytes by part", "One bar, divided as the table below says.");
    draw_bar(f, parts, PARTS, 0, 4, 32, WIDTH / fmax(1, (double)whole));
    chart_end(f);
}

static void list_parts(FILE *f, const part *parts, uint64_t whole, uint32_t tokens)
{
    html_table_begin(f, "Bytes by part", "<Part|Bytes|Share|A token");
    for (uint32_t i = 0; i < PARTS; i++) {
        if (parts[i].bytes == 0)
            continue;
        fprintf(f,
                "<tr><th scope=\"row\"><svg class=\"swatch\" viewBox=\"0 0 12 12\" aria-hidden=\"true\"><rect "
                "class=\"%s\" width=\"12\" height=\"12\"/></svg>%s</th>",
                parts[i].class, parts[i].name);
        html_cell(f, html_count(parts[i].bytes).text);
        html_cell(f, html_share((double)parts[i].bytes, (double)whole).text);
        html_cell(f, html_number((double)parts[i].bytes / fmax(1, tokens)).text);
        html_row_end(f);
    }
    html_row(f, "All|%s|100 %%|%s", html_count(whole).text, html_number((double)whole / fmax(1, tokens)).text);
    html_table_end(f);
}

/* --- Groups ------------------------------------------------------------------------------------------------------- */

static void group_parts(const report_group *group, part *parts)
{
    uint32_t codec = group->info.codec;
    bool cross = codec == XKV_CODEC_CROSS, lossless = codec == XKV_CODEC_LOSSLESS;
    parts[0] = (part){"coefficients", cross ? "p1" : lossless ? "p2" : "p0", group->chunks};
    parts[1] = (part){"exact rows", "p3", group->exact};
    parts[2] = (part){"side part", "p4", group->side};
}

static void draw_groups(report *r, const xkv_geometry *g, const report_group *groups, uint32_t count)
{
    FILE *f = r->sections.f;
    uint32_t shown = count < MAX_BARS ? count : MAX_BARS;
    uint64_t most = 1;
    for (uint32_t i = 0; i < shown; i++)
        most = groups[i].info.packed_bytes > most ? groups[i].info.packed_bytes : most;
    chart_begin(f, ++r->drawings, WIDTH, 24.0 * shown + 6, "Bytes by group",
                "A bar for each group, in the colours of the parts; the table of groups has the numbers.");
    for (uint32_t i = 0; i < shown; i++) {
        part parts[3];
        double y = 24.0 * i + 4, scale = (RIGHT - BAR_LEFT - 80) / (double)most;
        group_parts(&groups[i], parts);
        draw_bar(f, parts, 3, BAR_LEFT, y, 18, scale);
        chart_label(f, "tick", BAR_LEFT - 8, y + 13, "end", report_group_name(g, &groups[i], i).text);
        chart_label(f, "tick", BAR_LEFT + scale * (double)groups[i].info.packed_bytes + 6, y + 13, "start",
                    cli_size_text(groups[i].info.packed_bytes).text);
    }
    chart_end(f);
    if (shown < count)
        fprintf(f, "<p>The first %u of %u groups.</p>\n", shown, count);
}

/* --- Chunks ------------------------------------------------------------------------------------------------------- */

static uint64_t chunk_bytes(const xkv_entry *entry, const xkv_entry_info *info, uint32_t chunk)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < info->group_count; i++)
        bytes += xkv_entry_part_size(entry, i, 2 + chunk);
    return bytes;
}

enum { MAX_CHUNKS = 512 };

static void list_chunks(report *r, const xkv_entry *entry, const xkv_entry_info *info)
{
    FILE *f = r->sections.f;
    uint32_t tokens = xkv_entry_geometry(entry)->token_count;
    fprintf(f, "<details><summary>Chunks, %s of %s tokens</summary>\n", html_count(info->chunk_count).text,
            html_count(info->chunk_tokens).text);
    html_table_begin(f, "Bytes of all groups by chunk", "Chunk|First token|Tokens|Bytes|A token");
    for (uint32_t i = 0; i < info->chunk_count && i < MAX_CHUNKS; i++) {
        uint32_t first = i * info->chunk_tokens;
        uint32_t count = tokens - first < info->chunk_tokens ? tokens - first : info->chunk_tokens;
        uint64_t bytes = chunk_bytes(entry, info, i);
        html_row(f, "%u|%s|%s|%s|%s", i, html_count(first).text, html_count(count).text, html_count(bytes).text,
                 html_number((double)bytes / count).text);
    }
    html_table_end(f);
    if (info->chunk_count > MAX_CHUNKS)
        fprintf(f, "<p>The first %d of %u chunks.</p>\n", MAX_CHUNKS, info->chunk_count);
    fputs("</details>\n", f);
}

void report_bytes(report *r, const xkv_entry *entry, const xkv_entry_info *info, const report_group *groups)
{
    part parts[PARTS];
    const xkv_geometry *g = xkv_entry_geometry(entry);
    count_parts(info, groups, parts);
    report_figure_begin(r, "Where the bytes are", "All bytes of the file, by what they hold, then by group.");
    draw_parts(r, parts, info->file_size);
    list_parts(r->sections.f, parts, info->file_size, g->token_count);
    if (info->group_count > 0)
        draw_groups(r, g, groups, info->group_count);
    list_chunks(r, entry, info);
    report_figure_end(r);
}

/* --- Errors ------------------------------------------------------------------------------------------------------- */

enum { KINDS = XKV_PLANE_K_ROPE + 1 };

/* Errors of the planes of one kind, by layer; NaN where there is none. */
static const double *errors_of(const double *errors, uint32_t layers, uint32_t kind)
{
    return errors + (size_t)kind * layers;
}

/* [KINDS][layers] of them, and behind them the numbers of the layers. NULL: no memory. */
static double *errors_by_layer(const xkv_geometry *g, const report_group *groups, uint32_t count)
{
    size_t layers = g->layer_count, n = layers * KINDS;
    double *errors = malloc((n + layers) * sizeof *errors);
    if (errors == NULL)
        return NULL;
    for (size_t i = 0; i < n + layers; i++)
        errors[i] = i < n ? NAN : (double)(i - n);
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t j = 0; j < groups[i].info.plane_count; j++) {
            const xkv_plane *p = &g->planes[groups[i].info.planes[j]];
            if (p->kind < KINDS && p->layer < layers)
                errors[p->kind * layers + p->layer] = groups[i].info.errors[j];
        }
    }
    return errors;
}

static bool has_kind(const double *errors, uint32_t layers, uint32_t kind)
{
    for (uint32_t i = 0; i < layers; i++)
        if (isfinite(errors_of(errors, layers, kind)[i]))
            return true;
    return false;
}

static void draw_kind(const chart *c, const double *errors, uint32_t layers, uint32_t kind)
{
    const double *y = errors_of(errors, layers, kind), *x = errors_of(errors, layers, KINDS);
    char class[16], what[96];
    snprintf(class, sizeof class, "k%u", kind);
    chart_line(c, class, x, y, layers);
    for (uint32_t i = 0; i < layers; i++) {
        snprintf(what, sizeof what, "layer %u, %s: %s", i, xkv_plane_kind_name(kind), info_error_text(y[i]).text);
        if (isfinite(y[i]))
            chart_point(c, class, kind % 2 == 1, i, y[i], what);
    }
    fputs("\n", c->f);
}

static void draw_errors(report *r, const double *errors, uint32_t layers)
{
    FILE *f = r->sections.f;
    double high = 0;
    for (size_t i = 0; i < (size_t)layers * KINDS; i++)
        high = isfinite(errors[i]) ? fmax(high, errors[i]) : high;
    chart c = {f, {-0.5, layers - 0.5, LEFT, RIGHT - LEFT, false}, chart_linear(high, 246, 26 - 246)};
    chart_begin(f, ++r->drawings, WIDTH, 290, "Error by layer", "The table below has the same numbers.");
    chart_grid(&c, "relative error");
    uint32_t every = layers <= 48 ? 1 : (layers + 47) / 48;
    for (uint32_t i = 0; i < layers; i += every) {
        char number[16];
        snprintf(number, sizeof number, "%u", i);
        chart_label(f, "tick", chart_place(&c.x, i), 264, "middle", number);
    }
    chart_label(f, "axis", (LEFT + RIGHT) / 2.0, 282, "middle", "layer");
    for (uint32_t kind = 0; kind < KINDS; kind++)
        if (has_kind(errors, layers, kind))
            draw_kind(&c, errors, layers, kind);
    chart_end(f);
}

static void list_errors(FILE *f, const double *errors, uint32_t layers)
{
    char headings[64] = "Layer";
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        size_t n = strlen(headings);
        if (has_kind(errors, layers, kind))
            snprintf(headings + n, sizeof headings - n, "|%s", xkv_plane_kind_name(kind));
    }
    fputs("<details><summary>Errors as a table</summary>\n", f);
    html_table_begin(f, "Relative error by layer", headings);
    for (uint32_t i = 0; i < layers; i++) {
        html_row_begin(f, html_count(i).text);
        for (uint32_t kind = 0; kind < KINDS; kind++)
            if (has_kind(errors, layers, kind))
                html_cell(f, info_error_text(errors_of(errors, layers, kind)[i]).text);
        html_row_end(f);
    }
    html_table_end(f);
    fputs("</details>\n", f);
}

void report_errors(report *r, const xkv_entry *entry, const report_group *groups, uint32_t count)
{
    const xkv_geometry *g = xkv_entry_geometry(entry);
    xkv_entry_info info;
    xkv_entry_get_info(entry, &info);
    if (info.lossless || g->layer_count == 0)
        return;
    double *errors = errors_by_layer(g, groups, count);
    if (errors == NULL)
        return;
    report_figure_begin(r, "Error by layer",
                        "Relative error of each plane over the coded tokens, measured while packing: the root of the "
                        "squared errors over the squares.");
    fputs("<p class=\"keys\">", r->sections.f);
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        char class[16];
        snprintf(class, sizeof class, "point k%u", kind);
        if (has_kind(errors, g->layer_count, kind))
            report_key(r, class, xkv_plane_kind_name(kind));
    }
    fputs("</p>\n", r->sections.f);
    draw_errors(r, errors, g->layer_count);
    list_errors(r->sections.f, errors, g->layer_count);
    report_figure_end(r);
    free(errors);
}
