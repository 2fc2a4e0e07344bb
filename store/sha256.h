/* sha256.h - SHA-256 by libcrypto, which uses the CPU's SHA instructions. The direct calls are deprecated in favour of
 * EVP, which allocates and looks up a provider for each message: as long as a whole block of tokens takes to hash. */
#ifndef XKV_SHA256_H
#define XKV_SHA256_H

#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>

#include <stddef.h>
#include <stdint.h>

typedef SHA256_CTX xkv_sha256;

static inline void xkv_sha256_begin(xkv_sha256 *h)
{
    (void)SHA256_Init(h); /* these calls cannot fail */
}
static inline void xkv_sha256_add(xkv_sha256 *h, const void *bytes, size_t size)
{
    (void)SHA256_Update(h, bytes, size);
}
static inline void xkv_sha256_end(xkv_sha256 *h, uint8_t digest[32])
{
    (void)SHA256_Final(digest, h);
}

#endif
