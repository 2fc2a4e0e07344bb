#include "device_pack.h"
#include "device_tables.h"
#include "parts.h"

/* What is coded, and where its streams go. */
typedef struct coding {
    xkv_device_packing *p;
    const xkv_container *c;
    const xkv_coded *coded;
    xkv_plug_encode o;
    xkv_plug_span *spans; /* [batch_chunks] */
    uint32_t *chunks;     /* [batch_chunks] which they are */
    uint32_t *sizes;      /* [batch_chunks] */
} coding;

/* Rows of the integers, and codes, of the coded components. Components that the cross stage speaks for have no row. */
static xkv_status send_lists(coding *j)
{
    xkv_device_packing *p = j->p;
    const xkv_coded *c = j->coded;
    uint8_t *list = NULL;
    uint32_t n = 0;
    uint64_t codes_at = 4ull * c->coded;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW(p->ctx, (4 + sizeof(xkv_warp_code)) * c->coded, &list));
    for (uint32_t i = 0; i < c->rank; i++) {
        uint32_t row = i - c->first_row;
        xkv_warp_code code;
        if (c->tables[i] == 0)
            continue;
        code = xkv_device_code(c->tables[i]);
        memcpy(list + 4ull * n, &row, 4);
        memcpy(list + codes_at + n * sizeof code, &code, sizeof code);
        n++;
    }
    j->o.rows = xkv_pack_place(p, p->at.lists);
    j->o.codes = (const xkv_warp_code *)xkv_pack_place(p, p->at.lists + codes_at);
    XKV_TRY_GOTO(xkv_device_upload(p->ctx, p->device, list, codes_at + sizeof(xkv_warp_code) * c->coded,
                                   xkv_pack_place(p, p->at.lists), p->stream),
                 out);
out:
    xkv_release(p->ctx, list);
    return status;
}

/* Room for `more` bytes of streams behind `used`. */
static xkv_status grow(xkv_device_packing *p, uint64_t used, uint64_t more)
{
    uint64_t room = xkv_max64(used + more, 2 * p->stream_room);
    uint8_t *larger = NULL;

    if (used + more <= p->stream_room)
        return XKV_OK;
    XKV_TRY(XKV_NEW(p->ctx, (size_t)room, &larger));
    if (used > 0)
        memcpy(larger, p->streams, (size_t)used);
    xkv_release(p->ctx, p->streams);
    p->streams = larger;
    p->stream_room = room;
    return XKV_OK;
}

/* What has been copied to a staging buffer, behind the streams there are. */
static xkv_status land(coding *j, xkv_staging *s, uint64_t size, uint64_t *used)
{
    xkv_device_packing *p = j->p;

    XKV_TRY(xkv_staging_put(p->ctx, p->device, s, p->stream));
    XKV_PACKING(p, wait(p->device->plug, s->event));
    memcpy(p->streams + *used, s->bytes, (size_t)size);
    *used += size;
    return XKV_OK;
}

/* The streams of a batch, which end where their words do, one behind the other. */
static xkv_status fetch(coding *j, uint32_t count, uint64_t *used)
{
    xkv_device_packing *p = j->p;
    xkv_staging *s = NULL;
    uint64_t there = 0;

    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *from = (const uint8_t *)(j->o.words + (i + 1ull) * j->o.room) - j->sizes[i];
        for (uint64_t at = 0, n; at < j->sizes[i]; at += n) {
            if (!s)
                XKV_TRY(xkv_staging_get(p->ctx, p->device, &s));
            n = xkv_min64(j->sizes[i] - at, p->device->staging_bytes - there);
            XKV_PACKING(p, copy(p->device->plug, s->bytes + there, from + at, n, p->stream));
            there += n;
            if (there == p->device->staging_bytes) {
                XKV_TRY(land(j, s, there, used));
                s = NULL;
                there = 0;
            }
        }
    }
    return s ? land(j, s, there, used) : XKV_OK;
}

static xkv_status encode_batch(coding *j, uint32_t count, uint64_t *used)
{
    xkv_device_packing *p = j->p;
    uint64_t bytes = 0;

    j->o.count = count;
    XKV_TRY(xkv_device_upload(p->ctx, p->device, j->spans, count * sizeof *j->spans, xkv_pack_place(p, p->at.spans),
                              p->stream));
    XKV_PACKING(p, encode(p->device->plug, &j->o, p->stream));
    XKV_TRY(xkv_device_download(p->ctx, p->device, j->o.sizes, 4ull * count, j->sizes, p->stream));
    for (uint32_t i = 0; i < count; i++)
        bytes += j->sizes[i];
    XKV_TRY(grow(p, *used, bytes));
    XKV_TRY(fetch(j, count, used));
    for (uint32_t i = 0; i < count; i++) /* sizes; they are made offsets in the end */
        p->stream_at[j->chunks[i] + 1] = j->sizes[i];
    return XKV_OK;
}

/* Chunks with coded tokens, a batch at a time. */
static xkv_status encode_chunks(coding *j)
{
    uint64_t used = 0;
    uint32_t count = 0, t0, t1;

    for (uint32_t i = 0; i < j->c->chunk_count; i++) {
        xkv_chunk_coded(j->c, i, &t0, &t1);
        if (t0 < t1) {
            j->spans[count] = (xkv_plug_span){t0 - j->coded->first, t1 - t0, 0};
            j->chunks[count++] = i;
        }
        if (count > 0 && (count == j->p->at.batch_chunks || i + 1 == j->c->chunk_count)) {
            XKV_TRY(encode_batch(j, count, &used));
            count = 0;
        }
    }
    return XKV_OK;
}

static xkv_status run(coding *j)
{
    xkv_device_packing *p = j->p;

    XKV_TRY(XKV_NEW(p->ctx, p->at.batch_chunks, &j->spans));
    XKV_TRY(XKV_NEW(p->ctx, p->at.batch_chunks, &j->chunks));
    XKV_TRY(XKV_NEW(p->ctx, p->at.batch_chunks, &j->sizes));
    if (j->coded->coded == 0)
        return XKV_OK;
    XKV_TRY(send_lists(j));
    return encode_chunks(j);
}

xkv_status xkv_device_pack_streams(xkv_device_packing *p, const xkv_container *c, const xkv_coded *coded)
{
    coding j = {.p = p,
                .c = c,
                .coded = coded,
                .o = {.q = coded->device_q,
                      .stride = p->at.stride,
                      .tables = xkv_pack_place(p, p->at.tables),
                      .coded = coded->coded,
                      .spans = xkv_pack_place(p, p->at.spans),
                      .words = xkv_pack_place(p, p->at.words),
                      .room = p->at.room,
                      .sizes = xkv_pack_place(p, p->at.sizes)}};
    xkv_status status;

    if (p->streams_made)
        return XKV_OK;
    if (!p->stream_at)
        XKV_TRY(XKV_NEW(p->ctx, c->chunk_count + 1u, &p->stream_at));
    memset(p->stream_at, 0, (c->chunk_count + 1u) * sizeof *p->stream_at);
    status = run(&j);
    for (uint32_t i = 0; i < c->chunk_count; i++)
        p->stream_at[i + 1] += p->stream_at[i];
    p->streams_made = status == XKV_OK;
    xkv_release(p->ctx, j.spans);
    xkv_release(p->ctx, j.chunks);
    xkv_release(p->ctx, j.sizes);
    return status;
}
