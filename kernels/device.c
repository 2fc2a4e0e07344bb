/* device.c - opening a device, its staging buffers, and its errors. */
#include "device.h"

#include "backend.h"

#define LEAST_STAGING (1u << 20)

/* --- Errors ------------------------------------------------------------------------------------------------------- */

xkv_status xkv_device_result(xkv_ctx *ctx, xkv_device *device, xkv_status status)
{
    if (status == XKV_OK)
        return XKV_OK;
    if (device->api->dead(device->plug) && !device->reported) {
        device->reported = true;
        xkv_logf(ctx, XKV_LOG_ERROR, "%s: %s", device->api->name, device->api->error(device->plug));
    }
    return xkv_fail(ctx, status, "%s: %s", device->api->name, device->api->error(device->plug));
}

/* --- Opening ------------------------------------------------------------------------------------------------------ */

/* The plug-in, when there is a device to open. */
static xkv_status find_plugin(xkv_ctx *ctx, const xkv_device_options *o, const xkv_plugin **plugin_p)
{
    uint32_t wanted, count;
    char why[256] = "";

    if (!xkv_backend_wanted(&wanted))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "XKV_BACKEND is none of auto, cpu, cuda");
    if (o->backend != XKV_BACKEND_AUTO)
        wanted = o->backend;
    if (wanted == XKV_BACKEND_CPU)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "the CPU was asked for, which is no device");
    *plugin_p = xkv_backend_plugin(&count, why, sizeof why);
    if (count == 0)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "CUDA cannot be used: %s", why);
    if (o->index >= count)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "there is no device %u, only %u of them", o->index, count);
    return XKV_OK;
}

static xkv_status check_options(xkv_ctx *ctx, const xkv_device_options *o)
{
    if (o->backend > XKV_BACKEND_CUDA || o->staging_count < 2 || o->staging_count > XKV_MAX_STAGING ||
        o->staging_bytes < LEAST_STAGING || o->direct > XKV_DIRECT_ON)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT,
                        "backend %u, %u staging buffers of %llu bytes, direct %u: expected one of three, 2 to %u of at "
                        "least %u, one of three",
                        o->backend, o->staging_count, (unsigned long long)o->staging_bytes, o->direct, XKV_MAX_STAGING,
                        LEAST_STAGING);
    return XKV_OK;
}

static xkv_status prepare(xkv_ctx *ctx, xkv_device *d, const xkv_device_options *o)
{
    const xkv_plugin *api = d->api;

    d->staging_count = o->staging_count;
    d->staging_bytes = xkv_align64(o->staging_bytes, 256);
    d->direct = o->direct;
    XKV_TRY(xkv_device_result(ctx, d, api->stream_create(d->plug, &d->copies)));
    XKV_TRY(xkv_device_result(ctx, d, api->event_create(d->plug, &d->begun)));
    for (uint32_t i = 0; i < 2; i++) {
        XKV_TRY(xkv_device_result(ctx, d, api->event_create(d->plug, &d->ready[i])));
        XKV_TRY(xkv_device_result(ctx, d, api->event_create(d->plug, &d->arrived[i])));
        XKV_TRY(xkv_device_result(ctx, d, api->event_create(d->plug, &d->used[i])));
    }
    XKV_TRY(xkv_device_result(ctx, d, api->alloc_pinned(d->plug, XKV_DEVICE_RESULTS, &d->results)));
    for (uint32_t i = 0; i < d->staging_count; i++) {
        xkv_staging *s = &d->staging[i];
        XKV_TRY(xkv_device_result(ctx, d, api->event_create(d->plug, &s->event)));
        XKV_TRY(xkv_device_result(ctx, d, api->alloc_pinned(d->plug, d->staging_bytes, (void **)&s->bytes)));
    }
    return XKV_OK;
}

xkv_status xkv_device_open(xkv_ctx *ctx, const xkv_device_options *options, xkv_device **device_p)
{
    xkv_device_options o = xkv_device_options_default();
    const xkv_plugin *plugin = NULL;
    xkv_device *d = NULL;
    char why[256] = "";
    xkv_status status;

    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    XKV_TRY(check_options(ctx, &o));
    XKV_TRY(find_plugin(ctx, &o, &plugin));
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &d));
    d->api = plugin;
    status = plugin->open(o.index, &d->plug, why, sizeof why);
    if (status != XKV_OK) {
        status = xkv_fail(ctx, status, "%s: device %u: %s", plugin->name, o.index, why);
        goto out;
    }
    XKV_TRY_GOTO(prepare(ctx, d, &o), out);
    *device_p = d;
    d = NULL;
out:
    xkv_device_close(ctx, d);
    return status;
}

void xkv_device_close(xkv_ctx *ctx, xkv_device *d)
{
    if (d == NULL)
        return;
    if (d->plug != NULL) {
        for (uint32_t i = 0; i < d->staging_count; i++) {
            d->api->release_pinned(d->plug, d->staging[i].bytes);
            d->api->event_destroy(d->plug, d->staging[i].event);
        }
        for (uint32_t i = 0; i < 2; i++) {
            d->api->event_destroy(d->plug, d->ready[i]);
            d->api->event_destroy(d->plug, d->arrived[i]);
            d->api->event_destroy(d->plug, d->used[i]);
        }
        d->api->event_destroy(d->plug, d->begun);
        d->api->release_pinned(d->plug, d->results);
        d->api->stream_destroy(d->plug, d->copies);
        d->api->release(d->plug, d->tables);
        d->api->close(d->plug);
    }
    xkv_release(ctx, d);
}

void xkv_device_get_info(xkv_device *device, xkv_device_info *info)
{
    xkv_plug_properties p;

    device->api->properties(device->plug, &p);
    memset(info, 0, sizeof *info);
    memcpy(info->name, p.name, sizeof info->name);
    info->major = p.major;
    info->minor = p.minor;
    info->driver = p.driver;
    info->runtime = p.runtime;
    info->memory = p.memory;
    info->available = p.available;
    info->broken = device->api->dead(device->plug) ? 1 : 0;
    info->direct_bytes = device->direct_bytes;
}

/* --- Staging ------------------------------------------------------------------------------------------------------ */

xkv_status xkv_staging_get(xkv_ctx *ctx, xkv_device *d, xkv_staging **staging_p)
{
    xkv_staging *s = &d->staging[d->staging_next];

    if (s->busy)
        XKV_TRY(xkv_device_result(ctx, d, d->api->wait(d->plug, s->event)));
    s->busy = false;
    d->staging_next = (d->staging_next + 1) % d->staging_count;
    *staging_p = s;
    return XKV_OK;
}

xkv_status xkv_staging_put(xkv_ctx *ctx, xkv_device *d, xkv_staging *s, void *stream)
{
    XKV_TRY(xkv_device_result(ctx, d, d->api->record(d->plug, s->event, stream)));
    s->busy = true;
    return XKV_OK;
}

/* --- Copying ------------------------------------------------------------------------------------------------------ */

xkv_status xkv_device_upload(xkv_ctx *ctx, xkv_device *d, const void *from, uint64_t size, void *to, void *stream)
{
    for (uint64_t at = 0, n; at < size; at += n) {
        xkv_staging *s;
        n = xkv_min64(size - at, d->staging_bytes);
        XKV_TRY(xkv_staging_get(ctx, d, &s));
        memcpy(s->bytes, (const uint8_t *)from + at, (size_t)n);
        XKV_TRY(xkv_device_result(ctx, d, d->api->copy(d->plug, (uint8_t *)to + at, s->bytes, n, stream)));
        XKV_TRY(xkv_staging_put(ctx, d, s, stream));
    }
    return XKV_OK;
}

xkv_status xkv_device_download(xkv_ctx *ctx, xkv_device *d, const void *from, uint64_t size, void *to, void *stream)
{
    for (uint64_t at = 0, n; at < size; at += n) {
        xkv_staging *s;
        n = xkv_min64(size - at, d->staging_bytes);
        XKV_TRY(xkv_staging_get(ctx, d, &s));
        XKV_TRY(xkv_device_result(ctx, d, d->api->copy(d->plug, s->bytes, (const uint8_t *)from + at, n, stream)));
        XKV_TRY(xkv_staging_put(ctx, d, s, stream));
        XKV_TRY(xkv_device_result(ctx, d, d->api->wait(d->plug, s->event)));
        memcpy((uint8_t *)to + at, s->bytes, (size_t)n);
    }
    return XKV_OK;
}
