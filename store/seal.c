/* seal.c - encryption of blobs, by libsodium. */
#include "seal.h"

#include "sha256.h"

#include <sodium.h>

_Static_assert(XKV_SEAL_KEY == crypto_aead_xchacha20poly1305_ietf_KEYBYTES, "key size");
_Static_assert(XKV_SEAL_NONCE == crypto_aead_xchacha20poly1305_ietf_NPUBBYTES, "nonce size");
_Static_assert(XKV_SEAL_TAG == crypto_aead_xchacha20poly1305_ietf_ABYTES, "tag size");

#define STORED_PIECE (XKV_SEAL_PIECE + XKV_SEAL_TAG)
#define SIGNED_HEAD  (XKV_SEAL_TAG_AT + XKV_SEAL_TAG)

void xkv_seal_id(const uint8_t key[XKV_SEAL_KEY], uint8_t id[XKV_SEAL_ID])
{
    static const char label[] = "xkv key 1"; /* hashed with its NUL */
    uint8_t digest[32];
    xkv_sha256 h;
    xkv_sha256_begin(&h);
    xkv_sha256_add(&h, label, sizeof label);
    xkv_sha256_add(&h, key, XKV_SEAL_KEY);
    xkv_sha256_end(&h, digest);
    memcpy(id, digest, XKV_SEAL_ID);
}

xkv_status xkv_seal_begin(xkv_ctx *ctx)
{
    return sodium_init() >= 0 ? XKV_OK : xkv_fail(ctx, XKV_ERROR_MEMORY, "libsodium cannot start");
}

void xkv_seal_nonce(uint8_t nonce[XKV_SEAL_NONCE])
{
    memset(nonce, 0, XKV_SEAL_NONCE);
    randombytes_buf(nonce, XKV_SEAL_NONCE - 8);
}

/* That of a piece; UINT64_MAX: of the head. */
static void piece_nonce(const uint8_t *head, uint64_t piece, uint8_t nonce[XKV_SEAL_NONCE])
{
    memcpy(nonce, head + XKV_SEAL_NONCE_AT, XKV_SEAL_NONCE);
    xkv_store64(nonce + XKV_SEAL_NONCE - 8, piece);
}

uint64_t xkv_sealed_size(uint64_t plain)
{
    return plain + XKV_SEAL_TAG * xkv_ceil_div(plain - XKV_SEAL_HEAD, XKV_SEAL_PIECE);
}

/* The other way round; 0: no file has this size. */
static uint64_t plain_size(uint64_t sealed)
{
    if (sealed <= XKV_SEAL_HEAD + XKV_SEAL_TAG)
        return 0;
    uint64_t pieces = xkv_ceil_div(sealed - XKV_SEAL_HEAD, STORED_PIECE), plain = sealed - XKV_SEAL_TAG * pieces;
    return plain > XKV_SEAL_HEAD && xkv_sealed_size(plain) == sealed ? plain : 0;
}

void xkv_seal_head(const uint8_t key[XKV_SEAL_KEY], uint8_t head[XKV_SEAL_HEAD])
{
    uint8_t nonce[XKV_SEAL_NONCE];
    piece_nonce(head, UINT64_MAX, nonce);
    (void)crypto_aead_xchacha20poly1305_ietf_encrypt(head + XKV_SEAL_TAG_AT, NULL, NULL, 0, head, XKV_SEAL_TAG_AT, NULL,
                                                     nonce, key);
}

void xkv_seal_piece(const uint8_t key[XKV_SEAL_KEY], const uint8_t head[XKV_SEAL_HEAD], uint64_t piece,
                    const uint8_t *plain, size_t size, uint8_t *out)
{
    uint8_t nonce[XKV_SEAL_NONCE];
    piece_nonce(head, piece, nonce);
    (void)crypto_aead_xchacha20poly1305_ietf_encrypt(out, NULL, plain, size, head, SIGNED_HEAD, NULL, nonce, key);
}

/* --- Reading ------------------------------------------------------------------------------------------------------ */

/* Read and open piece `piece`, of *size bytes. */
static xkv_status open_piece(xkv_ctx *ctx, const xkv_sealed *s, uint64_t piece, uint8_t *stored, uint8_t *plain,
                             size_t *size)
{
    uint64_t at = XKV_SEAL_HEAD + piece * STORED_PIECE;
    size_t n = (size_t)xkv_min64(STORED_PIECE, s->file->size - at);
    uint8_t nonce[XKV_SEAL_NONCE];
    XKV_TRY(s->file->read(s->file->user, ctx, at, stored, n));
    piece_nonce(s->head, piece, nonce);
    if (crypto_aead_xchacha20poly1305_ietf_decrypt(plain, NULL, NULL, stored, n, s->head, SIGNED_HEAD, nonce, s->key) !=
        0)
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "blob: piece %llu was not sealed with this key [SB7]",
                        (unsigned long long)piece);
    *size = n - XKV_SEAL_TAG;
    return XKV_OK;
}

static xkv_status read_pieces(xkv_ctx *ctx, const xkv_sealed *s, uint64_t offset, uint8_t *dst, size_t size)
{
    uint8_t *buffer = NULL;
    xkv_status status = XKV_OK;
    XKV_TRY(XKV_NEW(ctx, STORED_PIECE + XKV_SEAL_PIECE, &buffer));
    while (size > 0) {
        uint64_t piece = offset / XKV_SEAL_PIECE;
        size_t from = (size_t)(offset % XKV_SEAL_PIECE), there = 0;
        XKV_TRY_GOTO(open_piece(ctx, s, piece, buffer, buffer + STORED_PIECE, &there), out);
        size_t n = (size_t)xkv_min64(there - from, size);
        memcpy(dst, buffer + STORED_PIECE + from, n);
        dst += n;
        offset += n;
        size -= n;
    }
out:
    sodium_memzero(buffer, STORED_PIECE + XKV_SEAL_PIECE);
    xkv_release(ctx, buffer);
    return status;
}

static xkv_status sealed_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    const xkv_sealed *s = user;
    uint8_t *to = dst;
    if (offset < XKV_SEAL_HEAD) {
        size_t n = (size_t)xkv_min64(XKV_SEAL_HEAD - offset, size);
        memcpy(to, s->head + offset, n);
        to += n;
        offset += n;
        size -= n;
    }
    return size > 0 ? read_pieces(ctx, s, offset - XKV_SEAL_HEAD, to, size) : XKV_OK;
}

xkv_status xkv_sealed_open(xkv_ctx *ctx, const uint8_t key[XKV_SEAL_KEY], const xkv_input *file, xkv_sealed *sealed,
                           xkv_input *plain)
{
    uint8_t nonce[XKV_SEAL_NONCE], none[1];
    uint64_t size = plain_size(file->size);
    if (size == 0)
        return xkv_fail(ctx, XKV_ERROR_TRUNCATED, "blob: %llu bytes are no sealed blob [SB7]",
                        (unsigned long long)file->size);
    XKV_TRY(file->read(file->user, ctx, 0, sealed->head, sizeof sealed->head));
    piece_nonce(sealed->head, UINT64_MAX, nonce);
    if (crypto_aead_xchacha20poly1305_ietf_decrypt(none, NULL, NULL, sealed->head + XKV_SEAL_TAG_AT, XKV_SEAL_TAG,
                                                   sealed->head, XKV_SEAL_TAG_AT, nonce, key) != 0)
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "blob: its head was not sealed with this key [SB7]");
    sealed->file = file;
    sealed->key = key;
    *plain = (xkv_input){.user = sealed, .size = size, .read = sealed_read, .name = file->name};
    return XKV_OK;
}

bool xkv_is_sealed_input(const xkv_input *input)
{
    return input->read == sealed_read;
}
