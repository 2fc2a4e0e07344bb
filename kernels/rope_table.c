/* rope_table.c - cosines and sines of rotary embeddings: one position, or runs of positions from a table. */
#include "element.h"
#include "kernels.h"

#define LOW_COUNT 32

/* Angles of position = high + low, low in 0 .. 31: cos and sin of the sum follow from those of its parts. */
struct xkv_rope_table {
    const xkv_rope *rope;
    bool inverse;
    int64_t high;                /* the multiple of 32 that high_cos and high_sin stand for */
    double *high_cos, *high_sin; /* [pairs] */
    double *low_cos, *low_sin;   /* [32][pairs] */
};

/* Round once, with the scale of rotating or un-rotating. */
static void store_pair(const xkv_rope *rope, bool inverse, size_t i, double c, double s, float *cos_sin)
{
    size_t pairs = rope->n_rot / 2;
    cos_sin[i] = (float)(inverse ? c / rope->scale : c * rope->scale);
    cos_sin[pairs + i] = (float)(inverse ? s / rope->scale : s * rope->scale);
}

void xkv_rope_cos_sin(const xkv_rope *rope, int32_t position, bool inverse, float *cos_sin)
{
    for (size_t i = 0; i < rope->n_rot / 2; i++) {
        double c, s;
        xkv_cos_sin_of(position, rope->inv_freq[i], &c, &s);
        store_pair(rope, inverse, i, c, s, cos_sin);
    }
}

static void fill_high(xkv_rope_table *table, int64_t high)
{
    for (size_t i = 0; i < table->rope->n_rot / 2; i++)
        xkv_cos_sin_of((double)high, table->rope->inv_freq[i], &table->high_cos[i], &table->high_sin[i]);
    table->high = high;
}

xkv_status xkv_rope_table_create(xkv_ctx *ctx, const xkv_rope *rope, bool inverse, xkv_rope_table **table_p)
{
    size_t pairs = rope->n_rot / 2;
    xkv_rope_table *table = NULL;
    xkv_status status = XKV_OK;
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &table));
    XKV_TRY_GOTO(XKV_NEW(ctx, 2 * (LOW_COUNT + 1) * pairs, &table->low_cos), out);
    table->low_sin = table->low_cos + LOW_COUNT * pairs;
    table->high_cos = table->low_sin + LOW_COUNT * pairs;
    table->high_sin = table->high_cos + pairs;
    table->rope = rope;
    table->inverse = inverse;
    for (size_t low = 0; low < LOW_COUNT; low++)
        for (size_t i = 0; i < pairs; i++)
            xkv_cos_sin_of((double)low, rope->inv_freq[i], &table->low_cos[low * pairs + i],
                           &table->low_sin[low * pairs + i]);
    fill_high(table, 0);
    *table_p = table;
    table = NULL;
out:
    xkv_rope_table_free(ctx, table);
    return status;
}

void xkv_rope_table_free(xkv_ctx *ctx, xkv_rope_table *table)
{
    if (table == NULL)
        return;
    xkv_release(ctx, table->low_cos);
    xkv_release(ctx, table);
}

void xkv_rope_table_row(xkv_rope_table *table, int32_t position, float *cos_sin)
{
    size_t pairs = table->rope->n_rot / 2;
    uint32_t low = (uint32_t)position & (LOW_COUNT - 1); /* also of negative positions: high is rounded down */
    int64_t high = (int64_t)position - low;
    if (high != table->high)
        fill_high(table, high);
    const double *low_cos = table->low_cos + low * pairs, *low_sin = table->low_sin + low * pairs;
    for (size_t i = 0; i < pairs; i++) {
        double c = table->high_cos[i] * low_cos[i] - table->high_sin[i] * low_sin[i];
        double s = table->high_sin[i] * low_cos[i] + table->high_cos[i] * low_sin[i];
        store_pair(table->rope, table->inverse, i, c, s, cos_sin);
    }
}
