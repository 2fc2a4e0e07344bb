/* device_direct.c - chunks that the device reads from the file itself.
 *
 * A batch has its chunks at the same distances as the file (spec/container.md, rule P1), so that one read brings them
 * all; positions and streams come from the host, which does not see the chunks. The device compares them with their
 * checksums (P3); what it finds wrong is read again by the host, which then has the words for it. */
#include "device_work.h"

xkv_status xkv_device_direct_open(xkv_device_reading *r)
{
    const xkv_input *input = &r->entry->input;
    xkv_device *d = r->device;
    xkv_plug_file_open o = {.fd = -1, .emulation = d->direct == XKV_DIRECT_ON};

    if (d->direct == XKV_DIRECT_OFF || input->file == NULL)
        return XKV_OK;
    o.fd = input->file(input->user, &r->file_offset);
    if (o.fd < 0 || r->api->file_open(d->plug, &o, &r->file) == XKV_OK)
        return XKV_OK;
    r->file = NULL;
    if (r->api->dead(d->plug))
        return xkv_device_result(r->ctx, d, XKV_ERROR_BACKEND);
    xkv_logf(r->ctx, o.emulation ? XKV_LOG_WARNING : XKV_LOG_DEBUG, "%s: the host reads: %s", r->api->name,
             r->api->error(d->plug));
    return XKV_OK;
}

void xkv_device_direct_close(xkv_device_reading *r)
{
    if (r->file)
        r->api->file_close(r->device->plug, r->file);
    r->file = NULL;
}

/* The first chunk of a batch that is not empty, or the last one. */
static const xkv_part *first_part(const xkv_device_batch *b)
{
    const xkv_part *part = &b->w->g->parts[XKV_PART_CHUNKS + b->chunk], *last = part + b->chunks - 1;

    while (part < last && part->size == 0)
        part++;
    return part;
}

bool xkv_device_reads(const xkv_device_batch *b)
{
    const xkv_device_work *w = b->w;
    const xkv_part *parts = &w->g->parts[XKV_PART_CHUNKS + b->chunk];
    uint64_t begin = first_part(b)->offset, place = 0;

    if (!w->r->file || !w->integers || xkv_device_side_of(w)->coded == 0 || b->size == b->data_at)
        return false;
    for (uint32_t i = 0; i < b->chunks; i++) {
        if (parts[i].size > 0 && (parts[i].size <= XKV_SUM_SHORT || parts[i].offset - begin != place))
            return false;
        place += xkv_device_chunk_bytes(w, b->chunk + i);
    }
    return true;
}

/* Whatever may use the place where the bytes go must be done. */
static xkv_status read_chunks(const xkv_device_batch *b)
{
    const xkv_device_reading *r = b->w->r;
    const xkv_part *first = first_part(b), *last = &b->w->g->parts[XKV_PART_CHUNKS + b->chunk + b->chunks - 1];
    xkv_plug_file_read o = {.file = r->file,
                            .offset = r->file_offset + r->entry->c.payload_offset + first->offset,
                            .to = b->there + b->data_at};

    while (last->size == 0)
        last--;
    o.size = last->offset + last->size - first->offset;
    XKV_TRY(r->api->wait(r->device->plug, r->slot_used[r->slot] ? r->device->used[r->slot] : r->device->begun));
    XKV_TRY(r->api->file_read(r->device->plug, &o));
    r->device->direct_bytes += o.size;
    return XKV_OK;
}

bool xkv_device_direct_read(const xkv_device_batch *b)
{
    xkv_device_reading *r = b->w->r;

    if (read_chunks(b) == XKV_OK)
        return true;
    xkv_logf(r->ctx, XKV_LOG_WARNING, "%s: the host reads: %s", r->api->name, r->api->error(r->device->plug));
    xkv_device_direct_close(r);
    return false;
}

xkv_status xkv_device_verify(const xkv_device_batch *b)
{
    xkv_device_reading *r = b->w->r;
    xkv_plug_verify o = {.packed = b->there + b->data_at,
                         .streams = (const xkv_plug_stream *)(const void *)(b->there + b->streams_at),
                         .count = b->chunks,
                         .fault = xkv_device_place(b->w, r->at.fault)};

    XKV_DEVICE(r, verify(r->device->plug, &o, r->stream));
    return XKV_OK;
}
