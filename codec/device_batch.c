/* device_batch.c - chunks of a group on their way to the device. */
#include "device_work.h"

#define PACKED_ALIGN 64u /* as parts lie in a file: spec/container.md, rule P1 */

void xkv_device_tokens_of(const xkv_device_work *w, uint32_t chunk, uint32_t *t0, uint32_t *t1)
{
    if (w->lossless)
        xkv_chunk_tokens(&w->r->entry->c, chunk, t0, t1);
    else
        xkv_chunk_coded(&w->r->entry->c, chunk, t0, t1);
}

uint64_t xkv_device_chunk_bytes(const xkv_device_work *w, uint32_t chunk)
{
    uint32_t t0, t1;

    if (w->integers)
        return xkv_align64(w->g->parts[XKV_PART_CHUNKS + chunk].size, PACKED_ALIGN);
    xkv_device_tokens_of(w, chunk, &t0, &t1);
    if (w->lossless)
        return xkv_align64(xkv_group_row_bytes(&w->r->entry->c.geometry, w->g, t1 - t0), PACKED_ALIGN);
    return 2ull * (t1 - t0) * w->g->rank;
}

static uint64_t header_bytes(uint64_t tokens, uint64_t chunks)
{
    return 4 * tokens + chunks * sizeof(xkv_plug_stream) + 3 * XKV_CONSTANT_ALIGN;
}

void xkv_device_plan_batch(xkv_device_batch *b)
{
    const xkv_device_reading *r = b->w->r;
    uint32_t end = r->first_chunk + r->chunks, t0, t1;
    uint64_t bytes = 0;

    xkv_device_tokens_of(b->w, b->chunk, &b->t0, &b->t1);
    for (b->chunks = 0; b->chunk + b->chunks < end; b->chunks++) {
        uint64_t more = xkv_device_chunk_bytes(b->w, b->chunk + b->chunks);
        xkv_device_tokens_of(b->w, b->chunk + b->chunks, &t0, &t1);
        if (b->chunks > 0 && (t1 - b->t0 > r->at.batch_tokens ||
                              header_bytes(t1 - b->t0, b->chunks + 1) + bytes + more > r->device->staging_bytes))
            break;
        bytes += more;
        b->t1 = t1;
    }
    b->first = (uint32_t)xkv_max64(b->t0, r->target.first);
    b->end = (uint32_t)xkv_min64(b->t1, r->target.end);
    if (b->end < b->first)
        b->end = b->first;
    b->streams_at = xkv_align64(4ull * (b->end - b->first), XKV_CONSTANT_ALIGN);
    b->data_at = xkv_align64(b->streams_at + b->chunks * sizeof(xkv_plug_stream), XKV_CONSTANT_ALIGN);
    b->size = b->data_at + bytes;
}

/* What the device decodes it checks; a chunk of which it decodes nothing is checked here. */
static xkv_status load_packed(const xkv_device_work *w, uint32_t chunk, uint8_t *to)
{
    const xkv_device_reading *r = w->r;
    const xkv_part *part = &w->g->parts[XKV_PART_CHUNKS + chunk];

    if (part->size > 0 && xkv_device_side_of(w)->coded == 0)
        return xkv_fail(r->ctx, XKV_ERROR_CORRUPT, "group %u, chunk %u: %llu bytes, expected none [E2]",
                        (unsigned)(w->g - r->entry->c.groups), chunk, (unsigned long long)part->size);
    return xkv_container_read_part(r->ctx, &r->entry->input, &r->entry->c, part, to);
}

/* One chunk into its place. */
static xkv_status load_chunk(void *user, uint32_t worker, uint64_t index)
{
    const xkv_device_batch *b = user;
    const xkv_device_work *w = b->w;
    xkv_plug_stream stream;
    xkv_chunk chunk;

    memcpy(&stream, b->staging->bytes + b->streams_at + index * sizeof stream, sizeof stream);
    uint8_t *to = b->staging->bytes + b->data_at + stream.offset;
    if (w->integers)
        return load_packed(w, b->chunk + (uint32_t)index, to);
    if (w->lossless)
        return xkv_chunk_load_planes(&w->reader, &w->r->scratch[worker], b->chunk + (uint32_t)index, to);
    XKV_TRY(xkv_chunk_load(&w->reader, &w->r->scratch[worker], b->chunk + (uint32_t)index, &chunk));
    if (chunk.t1 > chunk.t0)
        memcpy(to, chunk.matrix, 2ull * (chunk.t1 - chunk.t0) * w->g->rank);
    return XKV_OK;
}

/* All but the chunks. */
static void fill_front(xkv_device_batch *b)
{
    const xkv_device_reading *r = b->w->r;
    uint64_t offset = 0;

    if (b->end > b->first)
        memcpy(b->staging->bytes, r->target.moves.positions + (b->first - r->target.first), 4ull * (b->end - b->first));
    for (uint32_t i = 0; i < b->chunks; i++) {
        uint32_t t0, t1;
        const xkv_part *part = &b->w->g->parts[XKV_PART_CHUNKS + b->chunk + i];
        xkv_device_tokens_of(b->w, b->chunk + i, &t0, &t1);
        xkv_plug_stream s = {offset, (uint32_t)part->size, t1 - t0, t0 - b->t0, part->checksum};
        memcpy(b->staging->bytes + b->streams_at + i * sizeof s, &s, sizeof s);
        offset += xkv_device_chunk_bytes(b->w, b->chunk + i);
    }
}

xkv_status xkv_device_send_batch(xkv_device_batch *b)
{
    xkv_device_reading *r = b->w->r;
    xkv_device *d = r->device;
    uint32_t slot = r->slot;
    bool direct;

    b->there = (uint8_t *)xkv_device_place(b->w, r->at.packed[slot]);
    direct = xkv_device_reads(b) && xkv_device_direct_read(b);
    XKV_TRY(xkv_staging_get(r->ctx, d, &b->staging));
    fill_front(b);
    if (!direct)
        XKV_TRY(xkv_pool_run(r->ctx, r->pool, b->chunks, load_chunk, b));
    if (r->slot_used[slot])
        XKV_DEVICE(r, follow(d->plug, d->copies, d->used[slot]));
    XKV_DEVICE(r, copy(d->plug, b->there, b->staging->bytes, direct ? b->data_at : b->size, d->copies));
    XKV_TRY(xkv_staging_put(r->ctx, d, b->staging, d->copies));
    XKV_DEVICE(r, record(d->plug, d->arrived[slot], d->copies));
    XKV_DEVICE(r, follow(d->plug, r->stream, d->arrived[slot]));
    return direct ? xkv_device_verify(b) : XKV_OK;
}

xkv_status xkv_device_release_slot(const xkv_device_batch *b)
{
    xkv_device_reading *r = b->w->r;

    XKV_DEVICE(r, record(r->device->plug, r->device->used[r->slot], r->stream));
    r->slot_used[r->slot] = true;
    r->slot ^= 1;
    return XKV_OK;
}
