/* tables.c - see tables.h. */
#include "tables.h"

#include "table_data.h"

#include <math.h>
#include <pthread.h>

#define TOTAL      (1u << XKV_PROBABILITY_BITS)
#define MAX_SHIFT  ((XKV_TABLE_RUNGS - XKV_BASE_RUNGS) / 4)
#define COST_UNITS 65536.0 /* of a bit */
#define PATIENCE   4       /* rungs: an octave */

static xkv_base_table tables[XKV_TABLE_SHAPES * XKV_BASE_RUNGS];
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* --- Making the tables -------------------------------------------------------------------------------------------- */

/* States are below f << 20 when a symbol of frequency f is encoded. With 2^K = 2^(31+l), f <= 2^l, the reciprocal
 * floor((2^K - 1) / f) divides x + 1 exactly as long as e f <= 2^(K-20), where e = 2^K - f * reciprocal; otherwise, and
 * only for l = 12, the next larger one divides x exactly. */
static xkv_symbol make_symbol(uint32_t start, uint32_t f)
{
    uint32_t log2_f = 1, increment = 1;
    while (f > 1u << log2_f)
        log2_f++;
    uint64_t power = (uint64_t)1 << (31 + log2_f), reciprocal = (power - 1) / f;
    if ((power - f * reciprocal) * f > power >> 20) {
        reciprocal++;
        increment = 0;
    }
    return (xkv_symbol){(uint32_t)reciprocal, start | (TOTAL - f) << 12 | (log2_f - 1) << 24 | increment << 31};
}

static void add_symbol(xkv_base_table *t, uint32_t *start, uint32_t index, int32_t u, uint32_t f)
{
    t->encode[index] = make_symbol(*start, f);
    for (uint32_t i = 0; i < f; i++)
        t->decode[*start + i] = f | i << 12 | (uint32_t)u << 24;
    *start += f;
}

static uint32_t cost_of(uint32_t f)
{
    return (uint32_t)lrint(COST_UNITS * (XKV_PROBABILITY_BITS - log2(f)));
}

static const uint16_t *make_table(xkv_base_table *t, const uint16_t *data)
{
    int32_t reach = data[0];
    uint32_t start = 0;

    t->reach = data[0];
    t->escape_frequency = data[1];
    t->escape_cost = cost_of(t->escape_frequency) + (uint32_t)(16 * COST_UNITS);
    data += 2;
    for (int32_t u = 0; u <= reach; u++) {
        t->frequency[u] = data[u];
        t->cost[u] = cost_of(data[u]);
    }
    for (int32_t u = -reach; u <= reach; u++)
        add_symbol(t, &start, (uint32_t)(u + reach), u, t->frequency[u < 0 ? -u : u]);
    add_symbol(t, &start, 2 * t->reach + 1, XKV_ESCAPE, t->escape_frequency);
    return data + reach + 1;
}

static void make_tables(void)
{
    const uint16_t *data = table_data;
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        data = make_table(&tables[i], data);
}

xkv_table xkv_table_get(uint32_t index)
{
    uint32_t shape = (index - 1) / XKV_TABLE_RUNGS, rung = (index - 1) % XKV_TABLE_RUNGS, shift = 0;

    pthread_once(&once, make_tables);
    if (rung >= XKV_BASE_RUNGS) {
        shift = 1 + (rung - XKV_BASE_RUNGS) / 4;
        rung -= 4 * shift;
    }
    return (xkv_table){&tables[shape * XKV_BASE_RUNGS + rung], shift};
}

/* --- Cost --------------------------------------------------------------------------------------------------------- */

/* How often |u| occurs for one shift; the last count is for everything beyond the reach of any table. */
typedef struct histogram {
    uint32_t count[XKV_TABLE_BINS];
    bool made;
} histogram;

static void make_histogram(histogram *h, const int16_t *q, size_t n, uint32_t shift)
{
    const int32_t half = (int32_t)((1u << shift) >> 1), offset = 1 << 16;
    uint32_t count[2][XKV_TABLE_BINS] = {{0}}; /* two, because equal neighbours would wait for each other */

    for (size_t i = 0; i < n; i++) {
        int32_t u = ((q[i] + half + offset) >> shift) - (offset >> shift);
        uint32_t magnitude = (uint32_t)(u < 0 ? -u : u);
        count[i & 1][magnitude <= XKV_MAX_REACH ? magnitude : XKV_MAX_REACH + 1]++;
    }
    for (size_t i = 0; i < XKV_TABLE_BINS; i++)
        h->count[i] = count[0][i] + count[1][i];
    h->made = true;
}

static uint64_t histogram_cost(const histogram *h, xkv_table t, size_t n)
{
    uint64_t cost = 0, within = 0;
    for (uint32_t i = 0; i <= t.base->reach; i++) {
        cost += (uint64_t)h->count[i] * t.base->cost[i];
        within += h->count[i];
    }
    return cost + (n - within) * t.base->escape_cost + within * t.shift * (uint64_t)COST_UNITS;
}

double xkv_table_cost(uint32_t index, const int16_t *q, size_t n)
{
    histogram h;
    xkv_table t = xkv_table_get(index);
    make_histogram(&h, q, n, t.shift);
    return (double)histogram_cost(&h, t, n) / COST_UNITS;
}

/* --- Choice ------------------------------------------------------------------------------------------------------- */

typedef struct search {
    const int16_t *q; /* NULL: histograms are all that is known */
    bool incomplete;  /* one that was not known was needed */
    size_t n;
    histogram by_shift[MAX_SHIFT + 1];
    uint32_t best; /* table index */
    uint64_t best_cost;
} search;

/* Cost of a table; remembers the best one. */
static uint64_t try_table(search *s, uint32_t shape, uint32_t rung)
{
    uint32_t index = 1 + shape * XKV_TABLE_RUNGS + rung;
    xkv_table t = xkv_table_get(index);
    histogram *h = &s->by_shift[t.shift];
    if (!h->made && !s->q) {
        s->incomplete = true;
        return UINT64_MAX;
    }
    if (!h->made)
        make_histogram(h, s->q, s->n, t.shift);
    uint64_t cost = histogram_cost(h, t, s->n);
    if (cost < s->best_cost) {
        s->best_cost = cost;
        s->best = index;
    }
    return cost;
}

/* Walk along the ladder of one shape until it has not paid for a few rungs: values of few magnitudes see only some of
 * the frequencies, and the cost is not smooth in them. */
static void walk(search *s, uint32_t shape, uint32_t rung, int direction)
{
    uint64_t lowest = try_table(s, shape, rung);
    for (int misses = 0; misses < PATIENCE && (rung += (uint32_t)direction) < XKV_TABLE_RUNGS; misses++) {
        uint64_t cost = try_table(s, shape, rung);
        if (cost < lowest) {
            lowest = cost;
            misses = -1;
        }
    }
}

/* The rung whose sigma/step fits the mean magnitude of a Gaussian or Laplace variable best. */
static uint32_t first_rung(uint64_t magnitude, size_t n)
{
    if (magnitude == 0)
        return XKV_TABLE_RUNGS;
    double rung = 4 * (3 + log2(1.3 * (double)magnitude / (double)n));
    return (uint32_t)fmin(fmax(rung, 0), XKV_TABLE_RUNGS - 1);
}

static void search_init(search *s, const int16_t *q, size_t n)
{
    s->q = q;
    s->incomplete = false;
    s->n = n;
    s->best = 0;
    s->best_cost = UINT64_MAX;
    for (uint32_t i = 0; i <= MAX_SHIFT; i++)
        s->by_shift[i].made = false;
}

static void search_all(search *s, uint32_t rung)
{
    for (uint32_t shape = 0; shape < XKV_TABLE_SHAPES; shape++)
        for (int direction = -1; direction <= 1; direction += 2)
            walk(s, shape, rung, direction);
}

uint32_t xkv_table_choose(const int16_t *q, size_t n, double *bits)
{
    uint64_t magnitude = 0;
    uint32_t rung;
    search s;

    for (size_t i = 0; i < n; i++)
        magnitude += (uint64_t)(q[i] < 0 ? -q[i] : q[i]);
    rung = first_rung(magnitude, n);
    *bits = 0;
    if (rung == XKV_TABLE_RUNGS)
        return 0;
    search_init(&s, q, n);
    search_all(&s, rung);
    *bits = (double)s.best_cost / COST_UNITS;
    return s.best;
}

static uint32_t shift_of_rung(uint32_t rung)
{
    return rung < XKV_BASE_RUNGS ? 0 : 1 + (rung - XKV_BASE_RUNGS) / 4;
}

void xkv_table_window(uint64_t magnitude, size_t n, uint32_t *first, uint32_t *shifts)
{
    uint32_t rung = first_rung(magnitude, n), reach = 3 * PATIENCE;

    *first = *shifts = 0;
    if (rung == XKV_TABLE_RUNGS)
        return;
    *first = shift_of_rung(rung > reach ? rung - reach : 0);
    *shifts = shift_of_rung(rung + reach < XKV_TABLE_RUNGS ? rung + reach : XKV_TABLE_RUNGS - 1) - *first + 1;
}

bool xkv_table_choose_counted(const xkv_table_counts *counts, size_t n, uint32_t *table, double *bits)
{
    uint32_t rung = first_rung(counts->magnitude, n);
    search s;

    *table = 0;
    *bits = 0;
    if (rung == XKV_TABLE_RUNGS)
        return true;
    search_init(&s, NULL, n);
    for (uint32_t i = 0; i < counts->shifts; i++) {
        histogram *h = &s.by_shift[counts->first + i];
        memcpy(h->count, counts->counts + (size_t)i * XKV_TABLE_BINS, sizeof h->count);
        h->made = true;
    }
    search_all(&s, rung);
    *table = s.best;
    *bits = (double)s.best_cost / COST_UNITS;
    return !s.incomplete;
}
