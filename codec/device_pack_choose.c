#include "device_pack.h"
#include "device_tables.h"

#include <math.h>

_Static_assert(XKV_COUNT_BINS == XKV_TABLE_BINS, "the device counts what the choice looks at");

/* Components first .. rank - 1 at hand; i counts from `first`. */
typedef struct choosing {
    xkv_device_packing *p;
    xkv_coded *coded;
    const int16_t *q; /* the device's */
    uint32_t first, count;
    xkv_plug_stats *stats; /* [count][tiles]; then totals in those of the first tile */
    uint32_t *windows;     /* [count] */
    uint32_t *counts;      /* [count][XKV_COUNT_SHIFTS][XKV_COUNT_BINS] */
    double *bits;          /* [count] */
    uint8_t *unknown;      /* [count] the counts were not those that the choice wanted */
} choosing;

static const xkv_plug_stats *total_of(const choosing *j, uint64_t i)
{
    return &j->stats[i * j->p->at.tiles];
}

static void add_up(choosing *j)
{
    for (uint64_t i = 0; i < j->count; i++) {
        xkv_plug_stats *sum = &j->stats[i * j->p->at.tiles];
        for (uint32_t t = 1; t < j->p->at.tiles; t++) {
            sum->energy += sum[t].energy;
            sum->error += sum[t].error;
            sum->magnitude += sum[t].magnitude;
            sum->outside |= sum[t].outside;
        }
        j->coded->overflow |= sum->outside != 0;
    }
}

/* Which shifts are counted; none where a component is not coded anyway. */
static void set_windows(choosing *j)
{
    for (uint64_t i = 0; i < j->count; i++) {
        const xkv_plug_stats *sum = total_of(j, i);
        uint32_t low = 0, shifts = 0;
        if (!xkv_is_all_zeros(sum->energy, j->coded->step, j->coded->tokens))
            xkv_table_window(sum->magnitude, j->coded->tokens, &low, &shifts);
        j->windows[i] = low | (uint32_t)xkv_min64(shifts, XKV_COUNT_SHIFTS) << 8;
    }
}

static xkv_status count_values(choosing *j)
{
    xkv_device_packing *p = j->p;
    uint64_t size = (uint64_t)j->count * XKV_COUNT_SHIFTS * XKV_COUNT_BINS * sizeof(uint32_t);
    xkv_plug_count o = {.q = j->q,
                        .stride = p->at.stride,
                        .tokens = j->coded->tokens,
                        .count = j->count,
                        .windows = xkv_pack_place(p, p->at.windows),
                        .counts = xkv_pack_place(p, p->at.counts)};

    XKV_TRY(
        xkv_device_upload(p->ctx, p->device, j->windows, 4ull * j->count, xkv_pack_place(p, p->at.windows), p->stream));
    XKV_PACKING(p, clear(p->device->plug, o.counts, size, p->stream));
    XKV_PACKING(p, count_values(p->device->plug, &o, p->stream));
    return xkv_device_download(p->ctx, p->device, o.counts, size, j->counts, p->stream);
}

/* Code it with this table unless it is not worth its bits. */
static void decide(choosing *j, uint64_t i, uint32_t table, double bits)
{
    const xkv_plug_stats *sum = total_of(j, i);

    if (table == 0 || !xkv_is_worth_coding(sum->energy - sum->error, j->coded->step, false, bits))
        return;
    j->coded->tables[j->first + i] = (uint8_t)table;
    j->bits[i] = bits;
}

static xkv_status choose_task(void *user, uint32_t worker, uint64_t i)
{
    choosing *j = user;
    xkv_table_counts counts = {j->counts + i * XKV_COUNT_SHIFTS * XKV_COUNT_BINS, j->windows[i] & 255,
                               j->windows[i] >> 8, total_of(j, i)->magnitude};
    uint32_t table;
    double bits;

    (void)worker;
    if (counts.shifts == 0)
        return XKV_OK;
    if (xkv_table_choose_counted(&counts, j->coded->tokens, &table, &bits))
        decide(j, i, table, bits);
    else
        j->unknown[i] = 1;
    return XKV_OK;
}

/* The rare ones whose counts do not say enough: their integers come to the host. */
static xkv_status choose_unknown(choosing *j)
{
    int16_t *q = NULL;
    xkv_status status = XKV_OK;

    for (uint64_t i = 0; i < j->count; i++) {
        double bits;
        uint32_t table;
        if (!j->unknown[i])
            continue;
        if (!q)
            XKV_TRY_GOTO(XKV_NEW(j->p->ctx, j->coded->tokens, &q), out);
        XKV_TRY_GOTO(xkv_device_download(j->p->ctx, j->p->device, j->q + i * j->p->at.stride, 2ull * j->coded->tokens,
                                         q, j->p->stream),
                     out);
        table = xkv_table_choose(q, j->coded->tokens, &bits);
        decide(j, i, table, bits);
    }
out:
    xkv_release(j->p->ctx, q);
    return status;
}

static xkv_status choose(choosing *j, xkv_pool *pool)
{
    xkv_coded *c = j->coded;
    uint64_t tiles = j->p->at.tiles;

    XKV_TRY(xkv_device_download(j->p->ctx, j->p->device, xkv_pack_place(j->p, j->p->at.stats),
                                j->count * tiles * sizeof *j->stats, j->stats, j->p->stream));
    add_up(j);
    if (c->overflow)
        return XKV_OK;
    set_windows(j);
    XKV_TRY(count_values(j));
    XKV_TRY(xkv_pool_run(j->p->ctx, pool, j->count, choose_task, j));
    XKV_TRY(choose_unknown(j));
    for (uint32_t i = 0; i < j->count; i++) {
        c->bits += j->bits[i];
        if (c->tables[j->first + i] != 0)
            c->coded_tables[c->coded++] = c->tables[j->first + i];
    }
    return XKV_OK;
}

xkv_status xkv_device_pack_choose(xkv_device_packing *p, xkv_pool *pool, const int16_t *q, uint32_t first,
                                  xkv_coded *coded)
{
    choosing j = {.p = p, .coded = coded, .q = q, .first = first, .count = coded->rank - first};
    xkv_status status = XKV_OK;

    XKV_TRY_GOTO(XKV_NEW_ZERO(p->ctx, coded->rank, &coded->tables), out);
    XKV_TRY_GOTO(XKV_NEW(p->ctx, coded->rank, &coded->coded_tables), out);
    XKV_TRY_GOTO(XKV_NEW(p->ctx, (size_t)j.count * p->at.tiles, &j.stats), out);
    XKV_TRY_GOTO(XKV_NEW(p->ctx, j.count, &j.windows), out);
    XKV_TRY_GOTO(XKV_NEW(p->ctx, (size_t)j.count * XKV_COUNT_SHIFTS * XKV_COUNT_BINS, &j.counts), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(p->ctx, j.count, &j.bits), out);
    XKV_TRY_GOTO(XKV_NEW_ZERO(p->ctx, j.count, &j.unknown), out);
    XKV_TRY_GOTO(choose(&j, pool), out);
out:
    xkv_release(p->ctx, j.stats);
    xkv_release(p->ctx, j.windows);
    xkv_release(p->ctx, j.counts);
    xkv_release(p->ctx, j.bits);
    xkv_release(p->ctx, j.unknown);
    return status;
}
