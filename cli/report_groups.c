/* report_groups.c - spectra of groups and bits of their components. */
#include "chart.h"
#include "html.h"
#include "info.h"
#include "report.h"

#include <math.h>
#include <stdlib.h>

/* A panel in pixels: the plot of deviations, and below it that of bits. */
enum { WIDTH = 480, LEFT = 56, RIGHT = 420, TOP = 26, FOOT = 186, BITS_TOP = 226, BITS_FOOT = 300, MARGIN = 42 };

enum { POINTS = 160 }; /* of a curve at most: averages over equally many components */

/* Averages over runs of components. */
typedef struct curve {
    uint32_t count;
    double x[POINTS]; /* middle of the run */
    double y[POINTS];
} curve;

typedef double (*measure)(const report_group *group, uint32_t component);

static double sigma_of(const report_group *group, uint32_t component)
{
    return (double)group->sigma[component];
}

/* NaN where it is not coded. */
static double deviation_of(const report_group *group, uint32_t component)
{
    return group->components[component].table != 0 ? group->components[component].deviation : NAN;
}

static double bits_of(const report_group *group, uint32_t component)
{
    return group->components[component].bits;
}

/* Averages of what is known of `n` components; NaN where nothing is. */
static void average(const report_group *group, measure of, uint32_t n, curve *c)
{
    c->count = n < POINTS ? n : POINTS;
    for (uint32_t i = 0; i < c->count; i++) {
        uint32_t first = (uint32_t)((uint64_t)i * n / c->count), end = (uint32_t)((uint64_t)(i + 1) * n / c->count);
        uint32_t known = 0;
        double sum = 0;
        for (uint32_t j = first; j < end; j++) {
            double y = of(group, j);
            known += isfinite(y) != 0;
            sum += isfinite(y) ? y : 0;
        }
        c->x[i] = (first + end) / 2.0;
        c->y[i] = known > 0 ? sum / known : NAN;
    }
}

/* --- Names -------------------------------------------------------------------------------------------------------- */

/* " K and V" */
static void add_kinds(const xkv_geometry *g, const xkv_group_info *info, char *text, size_t size)
{
    bool seen[XKV_PLANE_K_ROPE + 1] = {false};
    const char *separator = ", ";
    for (uint32_t i = 0; i < info->plane_count; i++) {
        uint32_t kind = g->planes[info->planes[i]].kind;
        size_t n = strlen(text);
        if (kind > XKV_PLANE_K_ROPE || seen[kind])
            continue;
        snprintf(text + n, size - n, "%s%s", separator, xkv_plane_kind_name(kind));
        seen[kind] = true;
        separator = " and ";
    }
}

cli_text report_group_name(const xkv_geometry *g, const report_group *group, uint32_t index)
{
    cli_text t, layers = info_group_layers(g, &group->info);
    if (group->info.codec == XKV_CODEC_CROSS)
        snprintf(t.text, sizeof t.text, "Group %u: cross stage", index);
    else
        snprintf(t.text, sizeof t.text, "Group %u: layer%s %.24s", index, strchr(layers.text, '-') != NULL ? "s" : "",
                 layers.text);
    add_kinds(g, &group->info, t.text, sizeof t.text);
    return t;
}

static double total_bits(const report_group *group)
{
    double bits = 0;
    for (uint32_t i = 0; group->components != NULL && i < group->info.rank; i++)
        bits += group->components[i].bits;
    return bits;
}

static void describe(const report_group *group, uint32_t tokens, char *text, size_t size)
{
    if (group->components == NULL)
        snprintf(text, size, "%s components, %s", html_count(group->info.rank).text,
                 cli_size_text(group->info.packed_bytes).text);
    else
        snprintf(text, size, "%s of %s components coded, %s bits a token, %s", html_count(group->coded).text,
                 html_count(group->info.rank).text, html_number(tokens > 0 ? total_bits(group) / tokens : 0).text,
                 cli_size_text(group->info.packed_bytes).text);
}

/* --- Charts ------------------------------------------------------------------------------------------------------- */

static void widen(const curve *c, double *low, double *high)
{
    for (uint32_t i = 0; i < c->count; i++) {
        if (!isfinite(c->y[i]) || c->y[i] <= 0)
            continue;
        *low = fmin(*low, c->y[i]);
        *high = fmax(*high, c->y[i]);
    }
}

/* An axis that shows all curves down to a sixteenth of the smallest step. */
static chart_axis deviation_axis(const curve *sigma, const curve *found, const report_step *steps, uint32_t step_count)
{
    double low = INFINITY, high = 0, least = INFINITY;
    widen(sigma, &low, &high);
    widen(found, &low, &high);
    for (uint32_t i = 0; i < step_count; i++) {
        least = fmin(least, steps[i].step / 16);
        low = fmin(low, steps[i].step / 2);
        high = fmax(high, steps[i].step);
    }
    low = fmax(low, isfinite(least) ? least : high / 1e6);
    return chart_log(low, high > low ? high : 10 * low, FOOT, TOP - FOOT);
}

/* What is below the axis is left out, not drawn along its edge. */
static void cut(curve *c, const chart_axis *axis)
{
    for (uint32_t i = 0; i < c->count; i++)
        if (c->y[i] < axis->low)
            c->y[i] = NAN;
}

static void draw_deviations(FILE *f, const report_group *group, chart_axis x, const report_step *steps,
                            uint32_t step_count)
{
    curve sigma = {0}, found = {0};
    if (group->sigma != NULL)
        average(group, sigma_of, group->sigma_count, &sigma);
    if (group->components != NULL)
        average(group, deviation_of, group->info.rank, &found);
    chart c = {f, x, deviation_axis(&sigma, &found, steps, step_count)};
    if (group->leading > 0)
        chart_band(&c, "band", 0, group->leading, "cross stage");
    chart_grid(&c, "deviation of coefficients");
    for (uint32_t i = 0; i < step_count; i++)
        chart_rule(&c, "step", steps[i].step, steps[i].label);
    cut(&sigma, &c.y);
    cut(&found, &c.y);
    chart_line(&c, "sigma", sigma.x, sigma.y, sigma.count);
    chart_line(&c, "found", found.x, found.y, found.count);
    if (group->components == NULL)
        chart_feet(&c, "component");
}

static void draw_bits(FILE *f, const report_group *group, chart_axis x, uint32_t tokens)
{
    curve bits;
    double high = 0;
    average(group, bits_of, group->info.rank, &bits);
    for (uint32_t i = 0; i < bits.count; i++) {
        bits.y[i] /= fmax(1, tokens);
        high = fmax(high, bits.y[i]);
    }
    chart c = {f, x, chart_linear(high, BITS_FOOT, BITS_TOP - BITS_FOOT)};
    chart_grid(&c, "bits per token");
    fprintf(f, "<path class=\"area bits\" d=\"M%.1f %d", chart_place(&x, 0), BITS_FOOT);
    for (uint32_t i = 0; i < bits.count; i++)
        fprintf(f, "V%.1fH%.1f", chart_place(&c.y, bits.y[i]),
                chart_place(&x, (double)(i + 1) * group->info.rank / bits.count));
    fprintf(f, "V%dZ\"/>\n", BITS_FOOT);
    chart_feet(&c, group->info.codec == XKV_CODEC_SCALAR ? "element, by falling deviation" : "component");
}

static int by_deviation(const void *a, const void *b)
{
    const xkv_component *x = a, *y = b;
    return (x->deviation < y->deviation) - (x->deviation > y->deviation);
}

void report_spectrum(report *r, const xkv_geometry *g, const report_group *group, uint32_t index,
                     const report_step *steps, uint32_t step_count, uint32_t tokens)
{
    FILE *f = r->sections.f;
    bool bits = group->components != NULL;
    char what[384];
    double last = fmax(group->info.rank, group->sigma_count);
    chart_axis x = {0, fmax(last, 1), LEFT, RIGHT - LEFT, false};
    if (group->info.codec == XKV_CODEC_SCALAR && bits) /* elements have no order of their own */
        qsort(group->components, group->info.rank, sizeof *group->components, by_deviation);
    describe(group, tokens, what, sizeof what);
    fprintf(f, "<div class=\"panel\"><h4>%s</h4><p>%s</p>", report_group_name(g, group, index).text, what);
    chart_begin(f, ++r->drawings, WIDTH, (bits ? BITS_FOOT : FOOT) + MARGIN, report_group_name(g, group, index).text,
                what);
    draw_deviations(f, group, x, steps, step_count);
    if (bits)
        draw_bits(f, group, x, tokens);
    chart_end(f);
    fputs("</div>\n", f);
}

/* --- Bands -------------------------------------------------------------------------------------------------------- */

/* Bits per token of components first .. end - 1. */
static double band_bits(const report_group *group, uint32_t first, uint32_t end, uint32_t tokens)
{
    double bits = 0;
    for (uint32_t i = first; i < end && i < group->info.rank; i++)
        bits += group->components[i].bits;
    return tokens > 0 ? bits / tokens : 0;
}

static const uint32_t band_ends[] = {16, 64, 256, 1024, UINT32_MAX};
enum { BANDS = sizeof band_ends / sizeof *band_ends };

static void add_band_row(FILE *f, const report_group *group, const char *name, uint32_t tokens)
{
    html_row_begin(f, name);
    for (uint32_t b = 0; b < BANDS; b++) {
        uint32_t first = b > 0 ? band_ends[b - 1] : 0;
        bool own = first < group->info.rank && band_ends[b] > group->leading;
        html_cell(f, own ? html_number(band_bits(group, first, band_ends[b], tokens)).text : "-");
    }
    html_cell(f, html_number(band_bits(group, 0, UINT32_MAX, tokens)).text);
    html_cell(f, html_number(group->coded > 0 ? band_bits(group, 0, UINT32_MAX, tokens) / group->coded : 0).text);
    html_row_end(f);
}

void report_bands(report *r, const xkv_geometry *g, const report_group *groups, uint32_t count, uint32_t tokens)
{
    FILE *f = r->sections.f;
    html_table_begin(f, "Bits per token, by components",
                     "<Group|1 to 16|17 to 64|65 to 256|257 to 1,024|Beyond|All|Each coded one");
    for (uint32_t i = 0; i < count; i++) {
        if (groups[i].components != NULL)
            add_band_row(f, &groups[i], report_group_name(g, &groups[i], i).text, tokens);
    }
    html_table_end(f);
}
