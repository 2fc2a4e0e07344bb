/* hasher.h - the hash that names a blob (spec/store.md, section 2): SHA-256 of the SHA-256 of its pieces, so that a
 * piece can be hashed as soon as it is written, in any order and by another thread than the one that writes. */
#ifndef XKV_HASHER_H
#define XKV_HASHER_H

#include "base.h"
#include "xkv/format.h"

enum { XKV_HASH_PIECE = 256 * 1024 };

/* The hash of a whole input, by as many threads as the context may use. */
XKV_MUST_CHECK xkv_status xkv_hash_input(xkv_ctx *ctx, const xkv_input *file, uint8_t hash[32]);

/* The hash of a file that is being written. */
typedef struct xkv_hasher xkv_hasher;

/* `fd`, which is open for reading too, must outlive it. */
XKV_MUST_CHECK xkv_status xkv_hasher_create(xkv_ctx *ctx, int fd, xkv_hasher **hasher_p);
/* After each write of the file: what was hashed there before is void. Behind a first few pieces, and if the context may
 * use more than one thread, a thread follows the writer: it hashes pieces that are whole, and sends them on their way
 * to the disk. Errors: MEMORY. */
XKV_MUST_CHECK xkv_status xkv_hasher_note(xkv_ctx *ctx, xkv_hasher *h, uint64_t offset, uint64_t size);
/* All is written: hash the rest. Call it once. Errors: those of reading, CANCELLED. */
XKV_MUST_CHECK xkv_status xkv_hasher_finish(xkv_ctx *ctx, xkv_hasher *h, uint8_t hash[32]);
void xkv_hasher_free(xkv_ctx *ctx, xkv_hasher *h); /* accepts NULL */

#endif
