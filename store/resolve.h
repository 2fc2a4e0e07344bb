/* resolve.h - the addresses of a name, within a time. */
#ifndef XKV_RESOLVE_H
#define XKV_RESOLVE_H

#include "base.h"

enum { XKV_ADDRESSES = 4, XKV_ADDRESS_SIZE = 64, XKV_HOST_SIZE = 256 };

typedef struct xkv_addresses {
    char text[XKV_ADDRESSES][XKV_ADDRESS_SIZE]; /* [count] numeric */
    uint32_t count;
} xkv_addresses;

/* The first addresses of a host (shorter than XKV_HOST_SIZE), until `deadline` of xkv_clock_ms(). getaddrinfo() can
 * take minutes and cannot be stopped, so that it runs on a thread, which is left to itself after that. Errors: IO,
 * TIMEOUT, CANCELLED, MEMORY; LIMIT: too many such threads are left. */
XKV_MUST_CHECK xkv_status xkv_resolve(xkv_ctx *ctx, const char *host, uint64_t deadline, xkv_addresses *addresses);

#endif
