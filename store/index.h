/* index.h - the LMDB environment of a store: transactions that survive a map that is full, grown by others, or broken,
 * and records with a checksum. */
#ifndef XKV_INDEX_H
#define XKV_INDEX_H

#include "records.h"

typedef struct xkv_index xkv_index;

/* An open transaction; lives inside xkv_index_read() and xkv_index_write() only. */
typedef struct xkv_txn xkv_txn;

typedef struct xkv_index_options {
    bool read_only;
    bool check;        /* every page, before anything is looked up in it */
    bool no_sync;      /* commits are not synced: for an index that is thrown away if anything fails */
    uint64_t map_size; /* of a new map */
} xkv_index_options;

/* Open the environment in the folder `path`; a file that is not there is made, unless it is opened read-only.
 * Errors: IO, NO_SPACE, VERSION, CORRUPT, MEMORY. */
XKV_MUST_CHECK xkv_status xkv_index_open(xkv_ctx *ctx, const char *path, const xkv_index_options *options,
                                         xkv_index **index_p);
void xkv_index_close(xkv_ctx *ctx, xkv_index *index);
/* Records that the check on opening found damaged. */
uint64_t xkv_index_damaged(const xkv_index *index);

/* Run `body` in a read transaction. */
typedef xkv_status (*xkv_txn_fn)(xkv_txn *txn, void *user);
XKV_MUST_CHECK xkv_status xkv_index_read(xkv_ctx *ctx, xkv_index *index, xkv_txn_fn body, void *user);
/* Run `body` in the write transaction and commit it, or leave everything as it was. When the map is full it is grown
 * and `body` runs again, from the start. */
XKV_MUST_CHECK xkv_status xkv_index_write(xkv_ctx *ctx, xkv_index *index, xkv_txn_fn body, void *user);
/* The same for what need not survive a crash of the machine: that may undo the commit, and no other one. It saves one
 * of two syncs. */
XKV_MUST_CHECK xkv_status xkv_index_write_lazily(xkv_ctx *ctx, xkv_index *index, xkv_txn_fn body, void *user);

xkv_ctx *xkv_txn_ctx(const xkv_txn *txn);

/* Read a record, of the `size` bytes that its table has. NOT_FOUND without a message; CORRUPT [SI2, SI3]. */
XKV_MUST_CHECK xkv_status xkv_txn_get(xkv_txn *txn, const xkv_key *key, uint8_t *value, size_t size);
XKV_MUST_CHECK xkv_status xkv_txn_put(xkv_txn *txn, const xkv_key *key, const uint8_t *value, size_t size);
/* Whether or not it is there. */
XKV_MUST_CHECK xkv_status xkv_txn_delete(xkv_txn *txn, const xkv_key *key);
/* The first record whose key is not below `from` and begins with the same `prefix` bytes: its key, and its value of the
 * size that its table has, at most XKV_VALUE_MAX. NOT_FOUND without a message. CORRUPT [SI2, SI3]: with the key, of a
 * size that may be any, unless that is too long: then key->size is as it was. `value` may be NULL. */
XKV_MUST_CHECK xkv_status xkv_txn_seek(xkv_txn *txn, const xkv_key *from, size_t prefix, xkv_key *key, uint8_t *value);

/* The same, after which `at` is right behind the key that was found, so that the next call goes on there. */
XKV_MUST_CHECK xkv_status xkv_txn_next(xkv_txn *txn, xkv_key *at, size_t prefix, xkv_key *key, uint8_t *value);
/* What xkv_txn_next() returned means: the record is damaged, and those behind it can be read. */
static inline bool xkv_is_damaged_record(xkv_status status, const xkv_key *key)
{
    return status == XKV_ERROR_CORRUPT && key->size > 0;
}

/* Copy to a new environment in `folder`, without free pages. */
XKV_MUST_CHECK xkv_status xkv_index_copy(xkv_ctx *ctx, xkv_index *index, const char *folder);

/* Give up the reader slots of killed processes, which would keep old pages from being used again. */
void xkv_index_clear_readers(xkv_index *index);

/* Pages in use and address space, in bytes. */
void xkv_index_sizes(xkv_index *index, uint64_t *used, uint64_t *map);

/* --- Record helpers: get and put by kind --- */
XKV_MUST_CHECK xkv_status xkv_txn_get_meta(xkv_txn *txn, xkv_meta *meta);
XKV_MUST_CHECK xkv_status xkv_txn_put_meta(xkv_txn *txn, const xkv_meta *meta);
/* The same in a transaction of their own. */
XKV_MUST_CHECK xkv_status xkv_index_get_dict(xkv_ctx *ctx, xkv_index *index, const uint8_t id[16],
                                             xkv_dict_record *dict);
XKV_MUST_CHECK xkv_status xkv_index_get_meta(xkv_ctx *ctx, xkv_index *index, xkv_meta *meta);
XKV_MUST_CHECK xkv_status xkv_index_put_meta(xkv_ctx *ctx, xkv_index *index, xkv_meta *meta);
XKV_MUST_CHECK xkv_status xkv_txn_get_space(xkv_txn *txn, const uint8_t ns[32], xkv_space *space);
XKV_MUST_CHECK xkv_status xkv_txn_put_space(xkv_txn *txn, const uint8_t ns[32], const xkv_space *space);
XKV_MUST_CHECK xkv_status xkv_txn_get_item(xkv_txn *txn, uint64_t id, xkv_item *item);
XKV_MUST_CHECK xkv_status xkv_txn_put_item(xkv_txn *txn, const xkv_item *item);
XKV_MUST_CHECK xkv_status xkv_txn_get_dict(xkv_txn *txn, const uint8_t id[16], xkv_dict_record *dict);
XKV_MUST_CHECK xkv_status xkv_txn_put_dict(xkv_txn *txn, const uint8_t id[16], const xkv_dict_record *dict);
/* A record that holds one number (KEY, PAGE), and one that holds nothing (USED, EXPIRES). */
XKV_MUST_CHECK xkv_status xkv_txn_get_u64(xkv_txn *txn, const xkv_key *key, uint64_t *number);
XKV_MUST_CHECK xkv_status xkv_txn_put_u64(xkv_txn *txn, const xkv_key *key, uint64_t number);
XKV_MUST_CHECK xkv_status xkv_txn_put_mark(xkv_txn *txn, const xkv_key *key);

/* --- index_check.c --- */

/* Check every page of the snapshot `txn_id` of the environment's file at `path`: headers, bounds of every record, and
 * that each page is used once (spec/store.md, section 7); *damaged records are not what they must be [SI2, SI3].
 * NOT_FOUND, without a message, when no meta page has that snapshot any more. Errors: CORRUPT [SI1], IO, MEMORY. */
XKV_MUST_CHECK xkv_status xkv_index_check_file(xkv_ctx *ctx, const char *path, uint64_t txn_id, uint64_t *damaged);
/* What is wrong with a record as it lies in the map: its checksum [SI2], or what xkv_record_problem() says. NULL:
 * nothing. */
const char *xkv_stored_problem(const void *key, size_t key_size, const void *value, size_t value_size);
/* Check the meta pages alone, before LMDB maps the file; an absent or empty file is sound. Errors: CORRUPT [SI1],
 * VERSION, IO. */
XKV_MUST_CHECK xkv_status xkv_index_check_meta(xkv_ctx *ctx, const char *path);

#endif
