/* chart.c - see chart.h. */
#include "chart.h"

#include "html.h"

#include <math.h>

void chart_begin(FILE *f, unsigned id, double width, double height, const char *title, const char *description)
{
    fprintf(f, "<svg viewBox=\"0 0 %.0f %.0f\" role=\"img\" aria-labelledby=\"t%u d%u\"><title id=\"t%u\">", width,
            height, id, id, id);
    html_text(f, title);
    fprintf(f, "</title><desc id=\"d%u\">", id);
    html_text(f, description);
    fputs("</desc>\n", f);
}

void chart_end(FILE *f)
{
    fputs("</svg>\n", f);
}

/* --- Axes --------------------------------------------------------------------------------------------------------- */

/* 1, 2 or 5 times a power of ten: the distance of about `count` ticks up to `high`. */
static double tick_distance(double high, int count)
{
    double raw = high / count, unit = pow(10, floor(log10(raw)));
    return unit * (raw <= 1.001 * unit ? 1 : raw <= 2.001 * unit ? 2 : raw <= 5.001 * unit ? 5 : 10);
}

static int tick_count(const chart_axis *a)
{
    return (int)fmax(2, fmin(8, fabs(a->length) / 40));
}

chart_axis chart_linear(double high, double start, double length)
{
    chart_axis a = {0, high > 0 ? fmin(high, 1e300) : 1, start, length, false};
    double distance = tick_distance(a.high, tick_count(&a));
    a.high = distance * ceil(a.high / distance - 1e-9);
    return a;
}

chart_axis chart_log(double low, double high, double start, double length)
{
    chart_axis a = {pow(10, floor(log10(low) + 1e-9)), pow(10, ceil(log10(high) - 1e-9)), start, length, true};
    if (a.high <= a.low)
        a.high = 10 * a.low;
    return a;
}

double chart_place(const chart_axis *a, double value)
{
    double share = a->log ? log(value / a->low) / log(a->high / a->low) : (value - a->low) / (a->high - a->low);
    return a->start + a->length * fmin(fmax(share, 0), 1);
}

/* The i-th tick; false behind the last one. */
static bool tick(const chart_axis *a, int i, double *value)
{
    *value = a->log ? a->low * pow(10, i) : a->low + i * tick_distance(a->high, tick_count(a));
    return *value <= a->high * (1 + 1e-9);
}

static cli_text tick_text(const chart_axis *a, double value)
{
    cli_text t;
    if (value >= 1000 && value < 1e9)
        return html_count((uint64_t)llround(value));
    if (a->log && value < 0.9e-4)
        snprintf(t.text, sizeof t.text, "1e%.0f", log10(value));
    else
        snprintf(t.text, sizeof t.text, "%.3g", value);
    return t;
}

void chart_grid(const chart *c, const char *name)
{
    double value, right = c->x.start + c->x.length;
    for (int i = 0; tick(&c->y, i, &value); i++) {
        double y = chart_place(&c->y, value);
        fprintf(c->f, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>", c->x.start, y, right);
        chart_label(c->f, "tick", c->x.start - 6, y + 4, "end", tick_text(&c->y, value).text);
    }
    chart_label(c->f, "axis", c->x.start, c->y.start + c->y.length - 10, "start", name);
}

void chart_feet(const chart *c, const char *name)
{
    double value;
    for (int i = 0; tick(&c->x, i, &value); i++)
        chart_label(c->f, "tick", chart_place(&c->x, value), c->y.start + 16, "middle", tick_text(&c->x, value).text);
    chart_label(c->f, "axis", c->x.start + c->x.length / 2, c->y.start + 34, "middle", name);
}

/* --- Marks -------------------------------------------------------------------------------------------------------- */

void chart_line(const chart *c, const char *class, const double *x, const double *y, uint32_t n)
{
    bool drawing = false;
    fprintf(c->f, "<path class=\"curve %s\" d=\"", class);
    for (uint32_t i = 0; i < n; i++) {
        bool there = isfinite(y[i]) && (!c->y.log || y[i] > 0);
        if (there)
            fprintf(c->f, "%c%.1f %.1f", drawing ? 'L' : 'M', chart_place(&c->x, x[i]), chart_place(&c->y, y[i]));
        drawing = there;
    }
    fputs("\"/>\n", c->f);
}

static void tooltip(FILE *f, const char *what)
{
    if (what == NULL) {
        fputs("/>", f);
        return;
    }
    fputs("><title>", f);
    html_text(f, what);
    fputs("</title>", f);
}

void chart_point(const chart *c, const char *class, bool square, double x, double y, const char *what)
{
    double px = chart_place(&c->x, x), py = chart_place(&c->y, y);
    const char *name = square ? "rect" : "circle";
    if (square)
        fprintf(c->f, "<rect class=\"point %s\" x=\"%.1f\" y=\"%.1f\" width=\"7\" height=\"7\"", class, px - 3.5,
                py - 3.5);
    else
        fprintf(c->f, "<circle class=\"point %s\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"", class, px, py);
    tooltip(c->f, what);
    if (what != NULL)
        fprintf(c->f, "</%s>", name);
}

void chart_rule(const chart *c, const char *class, double y, const char *label)
{
    double at = chart_place(&c->y, y), right = c->x.start + c->x.length;
    fprintf(c->f, "<path class=\"rule %s\" d=\"M%.1f %.1fH%.1f\"/>", class, c->x.start, at, right);
    chart_label(c->f, "note", right + 5, at + 4, "start", label);
}

void chart_band(const chart *c, const char *class, double from, double to, const char *label)
{
    double left = chart_place(&c->x, from), right = chart_place(&c->x, to), top = c->y.start + c->y.length;
    chart_box(c->f, class, left, top, right - left, -c->y.length, NULL);
    chart_label(c->f, "note", left + 4, c->y.start - 6, "start", label);
}

void chart_box(FILE *f, const char *class, double x, double y, double width, double height, const char *what)
{
    fprintf(f, "<rect class=\"%s\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"", class, x, y, width, height);
    tooltip(f, what);
    if (what != NULL)
        fputs("</rect>", f);
}

void chart_label(FILE *f, const char *class, double x, double y, const char *anchor, const char *text)
{
    fprintf(f, "<text class=\"%s\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", class, x, y, anchor);
    html_text(f, text);
    fputs("</text>\n", f);
}
