#include "remote.h"
xkv_status xkv_s3_configure(xkv_ctx *ctx, xkv_ctx *own, const char *url, const xkv_backend **backend, void **config_p)
{
    (void)own;
    (void)url;
    (void)backend;
    (void)config_p;
    return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "s3:// was not built in: configure with -DXKV_S3=ON");
}
