/* device_replay.c - a restore that is put on a stream again and again, for CUDA graphs.
 *
 * It is recorded: xkv_device_read() runs once with a table of operations that passes each one on and keeps it. What
 * comes from the host is copied into device memory of the replay's own first, so that what is kept reads device memory
 * only; what tells the host about faults is passed on and not kept, for the recorded restore has been found sound.
 * The operations of both streams are kept in the order in which the call made them, in which they are right on one
 * stream too: an event is recorded before anybody follows it. */
#include "device_dict.h"
#include "entry_internal.h"

/* --- Operations --------------------------------------------------------------------------------------------------- */

typedef struct copy_op {
    void *to;
    const void *from;
    uint64_t size;
} copy_op;

typedef struct clear_op {
    void *p;
    uint64_t size;
} clear_op;

typedef enum kind { COPY, CLEAR, DECODE, EXPAND, SPLIT, SPREAD, GEMM, ANGLES, STORE, MOVE, JOIN, FUSED } kind;

typedef struct operation {
    kind kind;
    union {
        copy_op copy;
        clear_op clear;
        xkv_plug_decode decode;
        xkv_plug_expand expand;
        xkv_plug_split split;
        xkv_plug_spread spread;
        xkv_plug_gemm gemm;
        xkv_plug_angles angles;
        xkv_plug_store store;
        xkv_plug_move move;
        xkv_plug_join join;
        xkv_plug_fused fused;
    } o;
} operation;

struct xkv_device_replay {
    xkv_device *device;
    xkv_device_dict *dict; /* its own copy; NULL when the caller has one */
    operation *operations; /* [room] */
    uint64_t count, room;
    void **blocks; /* [block_room] device memory */
    uint64_t block_count, block_room;
    uint64_t bytes; /* of these */

    /* While it is recorded: */
    xkv_ctx *ctx;
    xkv_plugin api;
    xkv_device recorder; /* the device, with this table */
};

/* --- Keeping ------------------------------------------------------------------------------------------------------ */

/* Room for one more element in an array of `count`. */
static xkv_status grow(xkv_ctx *ctx, void **array, uint64_t count, uint64_t *room, size_t size)
{
    uint64_t wanted = *room ? 2 * *room : 64;
    void *larger = NULL;

    if (count < *room)
        return XKV_OK;
    XKV_TRY(xkv_alloc(ctx, (size_t)wanted, size, &larger));
    if (count > 0)
        memcpy(larger, *array, (size_t)count * size);
    xkv_release(ctx, *array);
    *array = larger;
    *room = wanted;
    return XKV_OK;
}

static xkv_status keep(xkv_device_replay *r, operation o)
{
    XKV_TRY(grow(r->ctx, (void **)&r->operations, r->count, &r->room, sizeof o));
    r->operations[r->count++] = o;
    return XKV_OK;
}

static xkv_status alloc_block(xkv_device_replay *r, uint64_t size, void **block)
{
    XKV_TRY(grow(r->ctx, (void **)&r->blocks, r->block_count, &r->block_room, sizeof *r->blocks));
    XKV_TRY(r->device->api->alloc(r->device->plug, size, block));
    r->blocks[r->block_count++] = *block;
    r->bytes += size;
    return XKV_OK;
}

/* Whether an address is in the host's memory that both can reach. */
static bool is_staged(const xkv_device_replay *r, const void *p)
{
    const xkv_device *d = &r->recorder;
    uintptr_t at = (uintptr_t)p;

    for (uint32_t i = 0; i < d->staging_count; i++)
        if (at - (uintptr_t)d->staging[i].bytes < d->staging_bytes) /* wraps in front of it */
            return true;
    return at - (uintptr_t)d->results < XKV_DEVICE_RESULTS;
}

/* The same bytes in memory of the replay's own, if they are the host's. */
static xkv_status take_in(xkv_device_replay *r, const void **p, uint64_t size, void *stream)
{
    void *block = NULL;

    if (!is_staged(r, *p))
        return XKV_OK;
    XKV_TRY(alloc_block(r, size, &block));
    XKV_TRY(r->device->api->copy(r->device->plug, block, *p, size, stream));
    *p = block;
    return XKV_OK;
}

/* --- The recorder's table ----------------------------------------------------------------------------------------- */

static xkv_device_replay *replay_of(xkv_plug_device *p)
{
    return (xkv_device_replay *)(void *)p;
}

static const char *error(const xkv_plug_device *p)
{
    const xkv_device_replay *r = (const xkv_device_replay *)(const void *)p;

    return r->device->api->error(r->device->plug);
}

static int dead(const xkv_plug_device *p)
{
    const xkv_device_replay *r = (const xkv_device_replay *)(const void *)p;

    return r->device->api->dead(r->device->plug);
}

static xkv_status alloc(xkv_plug_device *p, uint64_t size, void **block)
{
    return alloc_block(replay_of(p), size, block);
}

/* What the call gives back is still needed. */
static void release(xkv_plug_device *p, void *block)
{
    (void)p;
    (void)block;
}

static xkv_status record(xkv_plug_device *p, void *event, void *stream)
{
    const xkv_device *d = replay_of(p)->device;

    return d->api->record(d->plug, event, stream);
}

static xkv_status follow(xkv_plug_device *p, void *stream, void *event)
{
    const xkv_device *d = replay_of(p)->device;

    return d->api->follow(d->plug, stream, event);
}

static xkv_status wait_for(xkv_plug_device *p, void *event)
{
    const xkv_device *d = replay_of(p)->device;

    return d->api->wait(d->plug, event);
}

static xkv_status copy(xkv_plug_device *p, void *to, const void *from, uint64_t size, void *stream)
{
    xkv_device_replay *r = replay_of(p);

    XKV_TRY(take_in(r, &from, size, stream));
    XKV_TRY(r->device->api->copy(r->device->plug, to, from, size, stream));
    return is_staged(r, to) ? XKV_OK : keep(r, (operation){.kind = COPY, .o.copy = {to, from, size}});
}

static xkv_status clear(xkv_plug_device *p, void *block, uint64_t size, void *stream)
{
    xkv_device_replay *r = replay_of(p);

    XKV_TRY(r->device->api->clear(r->device->plug, block, size, stream));
    return keep(r, (operation){.kind = CLEAR, .o.clear = {block, size}});
}

static xkv_status move(xkv_plug_device *p, const xkv_plug_move *o, void *stream)
{
    xkv_device_replay *r = replay_of(p);
    xkv_plug_move m = *o;
    const void *rows = m.rows;

    XKV_TRY(take_in(r, &rows, m.tokens * m.row_bytes, stream));
    m.rows = rows;
    XKV_TRY(r->device->api->move(r->device->plug, &m, stream));
    return keep(r, (operation){.kind = MOVE, .o.move = m});
}

#define PASS_ON(KIND, name)                                                                                            \
    static xkv_status name(xkv_plug_device *p, const xkv_plug_##name *o, void *stream)                                 \
    {                                                                                                                  \
        xkv_device_replay *r = replay_of(p);                                                                           \
                                                                                                                       \
        XKV_TRY(r->device->api->name(r->device->plug, o, stream));                                                     \
        return keep(r, (operation){.kind = KIND, .o.name = *o});                                                       \
    }
PASS_ON(DECODE, decode)
PASS_ON(EXPAND, expand)
PASS_ON(SPLIT, split)
PASS_ON(SPREAD, spread)
PASS_ON(GEMM, gemm)
PASS_ON(ANGLES, angles)
PASS_ON(STORE, store)
PASS_ON(JOIN, join)
PASS_ON(FUSED, fused)

static void make_recorder(xkv_device_replay *r)
{
    r->api = (xkv_plugin){
        .abi = XKV_PLUGIN_ABI,
        .size = sizeof r->api,
        .name = r->device->api->name,
        .error = error,
        .dead = dead,
        .alloc = alloc,
        .release = release,
        .record = record,
        .follow = follow,
        .wait = wait_for,
        .copy = copy,
        .clear = clear,
        .decode = decode,
        .expand = expand,
        .split = split,
        .spread = spread,
        .gemm = gemm,
        .angles = angles,
        .store = store,
        .move = move,
        .join = join,
        .fused = fused,
    };
    r->recorder = *r->device;
    r->recorder.api = &r->api;
    r->recorder.plug = (xkv_plug_device *)(void *)r;
    r->recorder.direct = XKV_DIRECT_OFF; /* what the host has not seen it could not keep */
}

/* --- Creating ----------------------------------------------------------------------------------------------------- */

/* Not recorded: what later restores can use as it is. */
static xkv_status prepare(xkv_device_replay *r, const xkv_entry *entry, xkv_device_target *t)
{
    XKV_TRY(xkv_device_load_tables(r->ctx, r->device));
    if (t->dict || !entry->dict)
        return XKV_OK;
    XKV_TRY(xkv_device_dict_copy(r->ctx, r->device, entry->dict, &r->dict));
    t->dict = r->dict;
    return XKV_OK;
}

xkv_status xkv_device_replay_create(xkv_ctx *ctx, xkv_device *device, const xkv_entry *entry,
                                    const xkv_read_options *options, const xkv_device_target *target,
                                    const xkv_view *views, xkv_device_replay **replay_p)
{
    xkv_device_target t = xkv_device_target_default();
    xkv_device_replay *r = NULL;
    xkv_status status = XKV_OK;

    xkv_ctx_begin(ctx);
    if (target)
        XKV_TRY(xkv_copy_options(ctx, target, &t, sizeof t));
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &r));
    r->device = device;
    r->ctx = ctx;
    XKV_TRY_GOTO(prepare(r, entry, &t), out);
    make_recorder(r);
    XKV_TRY_GOTO(xkv_device_read(ctx, &r->recorder, entry, options, &t, views), out);
    r->ctx = NULL;
    *replay_p = r;
    return XKV_OK;
out:
    xkv_device_replay_free(ctx, r);
    return status;
}

void xkv_device_replay_free(xkv_ctx *ctx, xkv_device_replay *r)
{
    if (!r)
        return;
    for (uint64_t i = 0; i < r->block_count; i++)
        r->device->api->release(r->device->plug, r->blocks[i]);
    xkv_device_dict_free(ctx, r->dict);
    xkv_release(ctx, r->blocks);
    xkv_release(ctx, r->operations);
    xkv_release(ctx, r);
}

uint64_t xkv_device_replay_bytes(const xkv_device_replay *replay)
{
    return replay->bytes;
}

/* --- Running ------------------------------------------------------------------------------------------------------ */

static xkv_status run(const xkv_plugin *api, xkv_plug_device *plug, const operation *p, void *stream)
{
    switch (p->kind) {
    case COPY:
        return api->copy(plug, p->o.copy.to, p->o.copy.from, p->o.copy.size, stream);
    case CLEAR:
        return api->clear(plug, p->o.clear.p, p->o.clear.size, stream);
    case DECODE:
        return api->decode(plug, &p->o.decode, stream);
    case EXPAND:
        return api->expand(plug, &p->o.expand, stream);
    case SPLIT:
        return api->split(plug, &p->o.split, stream);
    case SPREAD:
        return api->spread(plug, &p->o.spread, stream);
    case GEMM:
        return api->gemm(plug, &p->o.gemm, stream);
    case ANGLES:
        return api->angles(plug, &p->o.angles, stream);
    case STORE:
        return api->store(plug, &p->o.store, stream);
    case MOVE:
        return api->move(plug, &p->o.move, stream);
    case JOIN:
        return api->join(plug, &p->o.join, stream);
    default:
        return api->fused(plug, &p->o.fused, stream);
    }
}

xkv_status xkv_device_replay_run(xkv_ctx *ctx, xkv_device_replay *replay, void *stream)
{
    xkv_device *d = replay->device;

    xkv_ctx_begin(ctx);
    for (uint64_t i = 0; i < replay->count; i++)
        XKV_TRY(xkv_device_result(ctx, d, run(d->api, d->plug, &replay->operations[i], stream)));
    return XKV_OK;
}
