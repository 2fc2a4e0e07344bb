/* report_fidelity.c - divergence over ratio, from the JSON that the engine's test (tests/engine, fidelity) writes. */
#include "chart.h"
#include "html.h"
#include "report.h"

#include <math.h>
#include <stdlib.h>

enum { WIDTH = 960, LEFT = 72, RIGHT = 820, TOP = 26, FOOT = 380, MAX_METHODS = 12, MAX_POINTS = 64, STYLES = 8 };

/* One way to pack, at several ratios. */
typedef struct method {
    char name[40];
    uint32_t count;
    double ratio[MAX_POINTS], kl[MAX_POINTS];
} method;

typedef struct sweep {
    uint32_t count;
    method methods[MAX_METHODS];
} sweep;

/* The number of a member; NaN if there is none. */
static double number_of(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return json_is_number(value) ? json_number_value(value) : NAN;
}

/* "dict" of "dict 16x". */
static void method_name(const char *text, char *name, size_t size)
{
    snprintf(name, size, "%s", text);
    char *space = strrchr(name, ' ');
    if (space != NULL && space[1] != '\0' && space[1 + strspn(space + 1, "0123456789.")] == 'x')
        *space = '\0';
}

static method *find_method(sweep *s, const char *name)
{
    for (uint32_t i = 0; i < s->count; i++)
        if (strcmp(s->methods[i].name, name) == 0)
            return &s->methods[i];
    if (s->count == MAX_METHODS)
        return NULL;
    snprintf(s->methods[s->count].name, sizeof s->methods->name, "%s", name);
    return &s->methods[s->count++];
}

/* Rows are in the order of their ratios, method by method; those of other lengths of the prompt are left out. */
static void read_rows(const json_t *rows, sweep *s)
{
    double tokens = number_of(json_array_get(rows, 0), "tokens");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        const char *text = json_string_value(json_object_get(row, "method"));
        double ratio = number_of(row, "ratio"), kl = number_of(row, "kl");
        char name[40];
        bool sane = ratio > 0 && ratio < 1e4 && kl > 1e-30 && kl < 1e30;
        if (text == NULL || !sane || number_of(row, "tokens") != tokens)
            continue;
        method_name(text, name, sizeof name);
        method *m = find_method(s, name);
        if (m == NULL || m->count == MAX_POINTS)
            continue;
        m->ratio[m->count] = ratio;
        m->kl[m->count++] = kl;
    }
}

/* --- Drawing ------------------------------------------------------------------------------------------------------ */

static chart make_chart(FILE *f, const sweep *s)
{
    double low = INFINITY, high = 0, ratio = 1;
    for (uint32_t i = 0; i < s->count; i++)
        for (uint32_t j = 0; j < s->methods[i].count; j++) {
            low = fmin(low, s->methods[i].kl[j]);
            high = fmax(high, s->methods[i].kl[j]);
            ratio = fmax(ratio, s->methods[i].ratio[j]);
        }
    return (chart){f, chart_linear(ratio, LEFT, RIGHT - LEFT), chart_log(low, high, FOOT, TOP - FOOT)};
}

static void draw_method(const chart *c, const method *m, uint32_t index)
{
    char class[16], what[128];
    snprintf(class, sizeof class, "k%u", index % STYLES);
    chart_line(c, class, m->ratio, m->kl, m->count);
    for (uint32_t i = 0; i < m->count; i++) {
        snprintf(what, sizeof what, "%s, %.2fx: KL %.2g", m->name, m->ratio[i], m->kl[i]);
        chart_point(c, class, index % 2 == 1, m->ratio[i], m->kl[i], what);
    }
    uint32_t last = m->count - 1;
    chart_label(c->f, "note", chart_place(&c->x, m->ratio[last]) + 8, chart_place(&c->y, m->kl[last]) + 4, "start",
                m->name);
}

static void draw(report *r, FILE *f, const sweep *s)
{
    chart c = make_chart(f, s);
    chart_begin(f, ++r->drawings, WIDTH, FOOT + 44, "Divergence over ratio",
                "Curves further right and further down are better. The table below has the same numbers.");
    chart_grid(&c, "KL of the next-token distributions, nats");
    chart_feet(&c, "ratio: raw 16-bit bytes / all bytes");
    for (uint32_t i = 0; i < s->count; i++)
        draw_method(&c, &s->methods[i], i);
    chart_end(f);
}

static void list(FILE *f, const sweep *s)
{
    html_table_begin(f, "Divergence by method and ratio", "<Method|Ratio|KL, nats");
    for (uint32_t i = 0; i < s->count; i++)
        for (uint32_t j = 0; j < s->methods[i].count; j++) {
            html_row_begin(f, s->methods[i].name);
            html_cell(f, html_number(s->methods[i].ratio[j]).text);
            html_cell(f, html_number(s->methods[i].kl[j]).text);
            html_row_end(f);
        }
    html_table_end(f);
}

static bool add_sweep(report *r, FILE *f, const json_t *results)
{
    const json_t *means = json_object_get(results, "means"), *rows = json_object_get(results, "rows");
    const char *model = json_string_value(json_object_get(results, "model"));
    sweep *s = calloc(1, sizeof *s);
    if (s == NULL)
        return false;
    read_rows(json_array_size(means) > 0 ? means : rows, s);
    bool any = s->count > 0;
    if (any) {
        fputs("<figure><figcaption><h3>", f);
        html_format(f, "Divergence over ratio: %s", model != NULL ? model : "a model");
        fputs("</h3><p>", f);
        html_format(f,
                    "%s the engine's next-token distributions with the restored cache, against those with the raw "
                    "one, over %s tokens behind a prompt of %s.",
                    json_array_size(means) > 0 ? "Means over several prompts of" : "Of",
                    html_number(number_of(results, "following")).text,
                    html_number(number_of(json_array_get(rows, 0), "tokens")).text);
        fputs("</p></figcaption>\n", f);
        draw(r, f, s);
        fputs("<details><summary>The same as a table</summary>\n", f);
        list(f, s);
        fputs("</details></figure>\n", f);
    }
    free(s);
    return any;
}

bool report_fidelity(report *r, FILE *f)
{
    const json_t *sweeps = json_object_get(r->fidelity, "sweeps");
    bool any = false;
    fputs("<section><h2>Fidelity</h2>\n", f);
    for (size_t i = 0; i < json_array_size(sweeps); i++)
        any |= add_sweep(r, f, json_array_get(sweeps, i));
    if (sweeps == NULL)
        any = add_sweep(r, f, r->fidelity);
    fputs("</section>\n", f);
    return any;
}
