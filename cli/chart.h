/* chart.h - charts of a page as inline SVG. Colours and lines come from the style sheet (report.css), by class. */
#ifndef CHART_H
#define CHART_H

#include "cli.h"

#include <stdio.h>

/* Values low..high lie at start .. start + length (a negative length: upwards) of the drawing. */
typedef struct chart_axis {
    double low, high, start, length;
    bool log;
} chart_axis;

/* A plot within a drawing. */
typedef struct chart {
    FILE *f;
    chart_axis x, y;
} chart;

/* A drawing of this size, in pixels at which its text is 12 high, with a title and a description for those who do not
 * see it, which are escaped. `id` is its own in the page. */
void chart_begin(FILE *f, unsigned id, double width, double height, const char *title, const char *description);
void chart_end(FILE *f);

/* An axis around low .. high that ends at round numbers: linear from 0, or by powers of ten. low and high are finite;
 * of a logarithmic one positive. */
chart_axis chart_linear(double high, double start, double length);
chart_axis chart_log(double low, double high, double start, double length);
double chart_place(const chart_axis *axis, double value);

/* Lines across the plot with numbers on their left, and numbers below the plot; `name` stands above or behind them. */
void chart_grid(const chart *c, const char *name);
void chart_feet(const chart *c, const char *name);

/* A line through y[n] at x[n]; it is interrupted where y is not finite or, on a logarithmic axis, not positive. */
void chart_line(const chart *c, const char *class, const double *x, const double *y, uint32_t n);
/* Points: squares or circles, with what they are as a tooltip; `what` may be NULL. */
void chart_point(const chart *c, const char *class, bool square, double x, double y, const char *what);
/* A line across the plot at y, with a label behind it, on its right. */
void chart_rule(const chart *c, const char *class, double y, const char *label);
/* A box between two x, over the whole height, that says `label` at its foot. */
void chart_band(const chart *c, const char *class, double from, double to, const char *label);
/* A rectangle of the drawing with a tooltip. */
void chart_box(FILE *f, const char *class, double x, double y, double width, double height, const char *what);
/* anchor: "start", "middle", "end". */
void chart_label(FILE *f, const char *class, double x, double y, const char *anchor, const char *text);

#endif
