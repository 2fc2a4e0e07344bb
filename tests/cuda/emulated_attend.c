/* emulated_attend.c - attention on the CPU: the blocks of attend_block.h one after the other. */
#include "attend_block.h"
#include "fake_cuda.h"
#include "launch.h"

#include <stdlib.h>

/* Shared memory of a block, of exactly so many floats, with nothing sensible in it. */
static float *shared_memory(uint32_t floats)
{
    float *shared = malloc(floats * sizeof *shared);

    memset(shared, 0xff, floats * sizeof *shared);
    return shared;
}

static void check_tiles(const xkv_held_plane *planes, const xkv_held_tile *tiles, uint32_t count)
{
    fake_check(tiles, count * sizeof *tiles);
    for (uint32_t i = 0; i < count; i++) {
        const xkv_held_plane *p = &planes[tiles[i].plane];
        fake_check(p, sizeof *p);
        if (p->slots > 0)
            fake_check(p->row, p->slots * sizeof *p->row);
        if (p->form == XKV_HELD_ROWS)
            fake_check(tiles[i].data,
                       (uint64_t)(tiles[i].from + tiles[i].count) * p->width * (p->dtype == XKV_F32 ? 4 : 2));
        else
            fake_check(tiles[i].data, 1);
    }
}

static void check_spans(const xkv_plug_attend *o)
{
    uint64_t queries = (uint64_t)o->kv_heads * o->count;

    for (int i = 0; i < 2; i++)
        if (o->dim_k[i] > 0 && o->tile_count > 0)
            check_tiles(o->planes, o->keys[i], o->tile_count);
    if (o->tile_count > 0) {
        check_tiles(o->planes, o->values, o->tile_count);
        fake_check(o->splits, o->split_count * sizeof *o->splits);
        fake_check(o->positions, o->rows * sizeof *o->positions);
        fake_check(o->scores, queries * o->rows * sizeof *o->scores);
        fake_check(o->largest, o->split_count * queries * sizeof *o->largest);
        fake_check(o->sums, o->split_count * queries * sizeof *o->sums);
        fake_check(o->parts, o->split_count * queries * xkv_value_columns(o) * sizeof *o->parts);
        fake_check(o->merged, queries * xkv_value_columns(o) * sizeof *o->merged);
    }
    fake_check(o->queries, (o->dim_k[0] + o->dim_k[1]) * sizeof(float));
    fake_check(o->output, o->dim_v * sizeof *o->output);
    fake_check(o->lse, sizeof *o->lse);
}

static void run_attend(const void *args)
{
    const xkv_plug_attend *o = args;
    float *scores = shared_memory(xkv_score_shared(o)), *partial = shared_memory(XKV_BLOCK_PARTS);
    float *output = shared_memory(xkv_output_shared(o));

    check_spans(o);
    for (uint32_t i = 0; i < o->tile_count; i++)
        for (uint32_t head = 0; head < o->kv_heads; head++)
            xkv_block_scores(o, i, head, scores);
    for (uint32_t s = 0; s < o->split_count; s++) {
        for (uint32_t query = 0; query < o->kv_heads * o->count; query++)
            xkv_block_weights(o, s, query, partial);
        for (uint32_t head = 0; head < o->kv_heads; head++)
            for (uint32_t column = 0; column < xkv_value_columns(o); column++)
                xkv_value_column(o, s, head, column);
    }
    for (uint32_t query = 0; query < o->kv_heads * o->count; query++)
        xkv_block_output(o, query, output);
    free(scores);
    free(partial);
    free(output);
}

static void run_merge(const void *args)
{
    const xkv_plug_merge *o = args;
    float *partial = shared_memory(2);

    for (uint32_t i = 0; i < o->count; i++) {
        fake_check(o->outputs[i], o->rows * o->dim * sizeof(float));
        fake_check(o->lses[i], o->rows * sizeof(float));
    }
    fake_check(o->output, o->rows * o->dim * sizeof(float));
    fake_check(o->lse, o->rows * sizeof(float));
    for (uint64_t row = 0; row < o->rows; row++)
        xkv_block_merge(o, row, partial);
    free(partial);
}

static void run_restore(const void *args)
{
    const xkv_plug_restore *o = args;
    float *shared = shared_memory(xkv_restore_shared(o));

    check_tiles(o->planes, o->tiles, o->tile_count);
    for (uint32_t i = 0; i < o->tile_count; i++)
        for (uint32_t head = 0; head < o->to.heads; head++)
            xkv_block_restore(o, i, head, shared);
    free(shared);
}

FAKE_LAUNCH(attend)
FAKE_LAUNCH(merge)
FAKE_LAUNCH(restore)
