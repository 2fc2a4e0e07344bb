/* seal.h - blobs encrypted with XChaCha20-Poly1305 (spec/store.md, section 9): the head is authenticated, what follows
 * it is encrypted in pieces, so that any part can be read alone, and nothing is handed out that was not authenticated.
 */
#ifndef XKV_SEAL_H
#define XKV_SEAL_H

#include "base.h"
#include "xkv/format.h"

enum {
    XKV_SEAL_KEY = 32,
    XKV_SEAL_NONCE = 24, /* of a blob; its last 8 bytes are 0 and count the pieces */
    XKV_SEAL_TAG = 16,
    XKV_SEAL_PIECE = 65536,
    XKV_SEAL_HEAD = 256,
    XKV_SEAL_NONCE_AT = 168,
    XKV_SEAL_TAG_AT = 192, /* of the bytes before it; those up to its end go into the tag of every piece */
    XKV_SEAL_ID = 16
};

/* Which key it is, without telling it. */
void xkv_seal_id(const uint8_t key[XKV_SEAL_KEY], uint8_t id[XKV_SEAL_ID]);

/* Before anything else here, once or more often. MEMORY when the library cannot start. */
XKV_MUST_CHECK xkv_status xkv_seal_begin(xkv_ctx *ctx);

void xkv_seal_nonce(uint8_t nonce[XKV_SEAL_NONCE]);

/* Bytes of a file that holds `plain` bytes, its head included. */
uint64_t xkv_sealed_size(uint64_t plain);

/* Put the tag into a head that is complete otherwise. */
void xkv_seal_head(const uint8_t key[XKV_SEAL_KEY], uint8_t head[XKV_SEAL_HEAD]);

/* Seal one piece of at most XKV_SEAL_PIECE bytes: `out` gets XKV_SEAL_TAG bytes more. */
void xkv_seal_piece(const uint8_t key[XKV_SEAL_KEY], const uint8_t head[XKV_SEAL_HEAD], uint64_t piece,
                    const uint8_t *plain, size_t size, uint8_t *out);

/* A sealed file as what it was before. All three must outlive the input made of them. */
typedef struct xkv_sealed {
    const xkv_input *file;
    const uint8_t *key;
    uint8_t head[XKV_SEAL_HEAD];
} xkv_sealed;
/* Errors: CHECKSUM [SB7] when the head was not sealed with this key, TRUNCATED, CORRUPT, and what `file` returns. */
XKV_MUST_CHECK xkv_status xkv_sealed_open(xkv_ctx *ctx, const uint8_t key[XKV_SEAL_KEY], const xkv_input *file,
                                          xkv_sealed *sealed, xkv_input *plain);
bool xkv_is_sealed_input(const xkv_input *input);

#endif
