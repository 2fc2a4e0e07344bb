#include "device_opened.h"

#include <stdio.h>

fake_cuda_control *control;
xkv_device *device;

static xkv_device *open_device(xkv_ctx *ctx)
{
    xkv_device_options o = xkv_device_options_default();
    xkv_device *d = NULL;

    o.staging_bytes = 1u << 20;
    o.staging_count = 2;
    assert_ok(ctx, xkv_device_open(ctx, &o, &d));
    return d;
}

bool find_device(void)
{
    xkv_backend_info info;

#ifdef XKV_GPU_PLUGIN
    setenv("XKV_CUDA_PLUGIN", XKV_GPU_PLUGIN, 0);
#else
    control = emulated_control();
#endif
    xkv_backend_get_info(&info);
    if (info.device_count == 0)
        print_message("SKIP: %s\n", info.reason);
    return info.device_count > 0;
}

int open_the_device(void **state)
{
    xkv_ctx *ctx = new_ctx(1);

    (void)state;
    device = open_device(ctx);
    xkv_ctx_free(ctx);
    return 0;
}

void *device_alloc(uint64_t size)
{
    void *p;

    assert_true(device->api->alloc(device->plug, size, &p) == XKV_OK);
    return p;
}

void device_free(void *p)
{
    device->api->release(device->plug, p);
}

void device_copy(void *to, const void *from, uint64_t size)
{
    void *event;

    assert_true(device->api->event_create(device->plug, &event) == XKV_OK);
    assert_true(device->api->copy(device->plug, to, from, size, NULL) == XKV_OK);
    assert_true(device->api->record(device->plug, event, NULL) == XKV_OK);
    assert_true(device->api->wait(device->plug, event) == XKV_OK);
    device->api->event_destroy(device->plug, event);
}
