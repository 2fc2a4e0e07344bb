/* store_internal.h - the opened store, and what its files share. */
#ifndef XKV_STORE_INTERNAL_H
#define XKV_STORE_INTERNAL_H

#include "blob.h"
#include "clock.h"
#include "trie.h"

#include <pthread.h>
#include <sys/types.h>

enum {
    XKV_USE_SLOTS = 4096, /* a power of two */
    XKV_USES = XKV_USE_SLOTS / 2,
    XKV_DONE_TRASH = 256,
    XKV_BATCH = 64,    /* entries removed in one transaction */
    XKV_LINE_MAX = 32, /* an entry and those it extends, one after another */
    XKV_DICT_CACHE = 4
};

/* What this process has seen and not yet written to the index. */
typedef struct xkv_pending {
    uint64_t hits, misses, corrupt, tokens_reused, bytes_reused;
    uint32_t use_count, trash_count;
    struct {
        uint64_t id, time;
    } uses[XKV_USE_SLOTS];          /* hashed by id; 0: free */
    uint64_t trash[XKV_DONE_TRASH]; /* deleted blobs whose TRASH record may go */
} xkv_pending;

/* A dictionary in memory; `users` hits hold it. */
typedef struct xkv_cached_dict {
    uint8_t id[16];
    xkv_ctx *own;     /* the dictionary belongs to it */
    xkv_dict *dict;   /* NULL: an empty slot, or */
    uint32_t loading; /* 1: a thread decodes it, and is its only user */
    uint32_t users;
    uint64_t used;
} xkv_cached_dict;

/* What the file "store" says. */
typedef struct xkv_properties {
    uint32_t block_tokens;
    uint32_t encrypted; /* 0 or 1; then with the key of */
    uint8_t key_id[XKV_SEAL_ID];
    uint64_t byte_cap; /* when it was last changed */
} xkv_properties;

struct xkv_store {
    xkv_properties properties;
    xkv_folders folders; /* the root is locked as long as the store is open */
    xkv_index *index;
    bool read_only;
    const uint8_t *key; /* NULL: not encrypted; else key_bytes */
    uint8_t key_bytes[XKV_SEAL_KEY];
    uint64_t (*clock)(void *user);
    void *clock_user;
    pid_t pid;
    dev_t device; /* with `inode`: which folder it is */
    ino_t inode;
    struct xkv_store *next; /* in the list of open stores */

    pthread_mutex_t mutex; /* of all below */
    xkv_pending pending;
    uint64_t flushed;           /* when what was pending was last written */
    pthread_cond_t dict_loaded; /* a dictionary was decoded, or could not be */
    xkv_cached_dict dicts[XKV_DICT_CACHE];
    uint64_t dict_clock;

    struct xkv_remote *remote; /* NULL: none; set before threads come */

    char path[];
};

/* Start a public call on a store. ARGUMENT after fork(). */
XKV_MUST_CHECK xkv_status xkv_store_begin(xkv_ctx *ctx, const xkv_store *store);
/* The same for one that changes it. IO: it is open read-only. */
XKV_MUST_CHECK xkv_status xkv_store_begin_change(xkv_ctx *ctx, const xkv_store *store);
uint64_t xkv_store_now(const xkv_store *store);
/* "PATH/NAME", to be released. */
XKV_MUST_CHECK xkv_status xkv_join_path(xkv_ctx *ctx, const char *path, const char *name, char **joined);

/* --- Properties (the file "store") --- */

enum { XKV_PROPERTIES_SIZE = 64 };
XKV_MUST_CHECK xkv_status xkv_properties_read(xkv_ctx *ctx, int root, xkv_properties *p);
/* Write it under another name, sync, rename; not by two processes at once. */
XKV_MUST_CHECK xkv_status xkv_properties_write(xkv_ctx *ctx, int root, const xkv_properties *p);

/* Those that the blobs show, but for the cap, when the file is damaged or lost; `key` as for opening. MISMATCH [SO6].
 */
XKV_MUST_CHECK xkv_status xkv_properties_recover(xkv_ctx *ctx, const xkv_store *store, const uint8_t *key,
                                                 xkv_properties *p);

/* Use `key` for the blobs, if it is that of the properties (NULL: none is needed). MISMATCH [SO6]. */
XKV_MUST_CHECK xkv_status xkv_store_take_key(xkv_ctx *ctx, xkv_store *store, const uint8_t *key);
void xkv_store_forget_key(xkv_store *store);

/* Open the folders of a store and lock it: alone when nobody else has it open (*alone), else with the others.
 * `exclusive`: fail unless alone, and stay so. Properties that are damaged or lost are an error, or with
 * `lost_properties` noted there. What failed is closed again. */
XKV_MUST_CHECK xkv_status xkv_store_open_folders(xkv_ctx *ctx, const char *path, bool exclusive, bool *lost_properties,
                                                 xkv_store *store, bool *alone);
void xkv_store_close_folders(xkv_store *store);
/* LMDB opens its files by name: the folder "index" and the files in it must not be links to somewhere else. Errors: IO
 * [SO5]; CORRUPT [SO4]: there is no index. */
XKV_MUST_CHECK xkv_status xkv_store_check_index(xkv_ctx *ctx, int root, bool *lock_there);
XKV_MUST_CHECK xkv_status xkv_store_alloc(xkv_ctx *ctx, const char *path, xkv_store **store_p);

/* --- entries.c: inside a write transaction --- */

struct xkv_change;

/* Entries and dictionaries that were removed from the index in a transaction, and whose blobs go after its commit. */
typedef struct xkv_removed {
    uint64_t count, bytes, capacity;
    uint64_t evicted, evicted_bytes; /* of them, by xkv_evict() */
    struct xkv_removed_blob {
        uint64_t id;
        int fd; /* locked against readers; -1: not */
        xkv_blob_name name;
    } * blobs;
} xkv_removed;

/* Forget what an aborted attempt has collected. */
void xkv_removed_clear(xkv_ctx *ctx, xkv_removed *r);
/* After the commit: delete the blobs, or move them to the quarantine; frees the list. */
void xkv_removed_finish(xkv_ctx *ctx, xkv_store *store, xkv_removed *r, bool quarantine, uint64_t byte_cap);

/* Insert an entry: all its records and sums. item: everything but its place. `names` [item->names]. NOT_FOUND: the
 * entry that it extends is not there. */
XKV_MUST_CHECK xkv_status xkv_entry_insert(xkv_txn *txn, xkv_meta *meta, xkv_store *store, const uint32_t *symbols,
                                           const xkv_page_key *names, xkv_item *item, xkv_removed *broken);
/* How far a prompt agrees with any in the tree. */
typedef struct xkv_common {
    uint32_t count; /* symbols of the longest common prefix */
    uint32_t other; /* the one after it, in the entry that xkv_trie_find() gave */
} xkv_common;
/* The same where that is known. */
XKV_MUST_CHECK xkv_status xkv_entry_insert_known(xkv_txn *txn, xkv_meta *meta, const uint32_t *symbols,
                                                 const xkv_page_key *names, const xkv_common *c, xkv_item *item);
/* Take an entry out, after all that extend it. `fd`, its blob locked against readers or -1, is taken over. */
XKV_MUST_CHECK xkv_status xkv_entry_remove(xkv_txn *txn, xkv_meta *meta, const xkv_item *item, xkv_removed *r, int fd);
XKV_MUST_CHECK xkv_status xkv_dict_insert(xkv_txn *txn, xkv_meta *meta, const uint8_t dict_id[16], uint64_t id,
                                          const uint8_t hash[32], uint64_t file_size);
XKV_MUST_CHECK xkv_status xkv_dict_remove(xkv_txn *txn, xkv_meta *meta, const uint8_t dict_id[16],
                                          const xkv_dict_record *dict, xkv_removed *r);
/* Evict, oldest first, until `bytes` more fit under the cap, or a batch has gone: then change->again is set, and the
 * body has nothing more to do in this transaction. When too much is pinned or being read: LIMIT, and for 0 bytes as far
 * as it goes. */
XKV_MUST_CHECK xkv_status xkv_evict(xkv_txn *txn, xkv_meta *meta, struct xkv_change *change, uint64_t bytes);
/* Remove what expired before `now`, up to `most` entries. */
XKV_MUST_CHECK xkv_status xkv_expire(xkv_txn *txn, xkv_meta *meta, uint64_t now, uint64_t most, xkv_removed *r);
/* Change an entry's time of use, pin or expiry, with the records that follow from them. */
XKV_MUST_CHECK xkv_status xkv_entry_change(xkv_txn *txn, xkv_meta *meta, const xkv_item *before, xkv_item *after);
/* First 16 bytes of the hash of a namespace and a page key. */
void xkv_page_hash(const uint8_t space[32], const uint8_t page[32], uint8_t hash[16]);

/* Whether the head of a blob is that of the entry which the record speaks of. CORRUPT [SB6]. */
XKV_MUST_CHECK xkv_status xkv_item_check_head(xkv_ctx *ctx, const xkv_item *item, const xkv_blob_head *head);

/* --- Entries that extend others (line.c) --- */

/* Symbols of a stored entry, from its blob. */
XKV_MUST_CHECK xkv_status xkv_line_read_symbols(xkv_ctx *ctx, const xkv_store *store, const xkv_item *item,
                                                uint32_t **symbols);
/* Whether one entry can extend the other, as their records say. CORRUPT [SE1, SE2]. */
XKV_MUST_CHECK xkv_status xkv_line_check(xkv_ctx *ctx, const xkv_item *child, const xkv_item *parent);
/* Whether the link in the child's blob says what the two records do. CORRUPT [SE1]. */
XKV_MUST_CHECK xkv_status xkv_line_match_link(xkv_ctx *ctx, const xkv_item *child, const xkv_blob_link *link,
                                              const xkv_item *parent);
/* Both, as the link in the child's blob and the tokens of both say, too. */
XKV_MUST_CHECK xkv_status xkv_line_check_link(xkv_ctx *ctx, const xkv_store *store, const xkv_item *child,
                                              const uint32_t *symbols, const xkv_blob_link *link,
                                              const xkv_item *parent);
/* Inside a write transaction: make the entry one of those that extend its parent, if it has one. NOT_FOUND: that is
 * gone. */
XKV_MUST_CHECK xkv_status xkv_line_join(xkv_txn *txn, xkv_meta *meta, const xkv_item *item);
/* The reverse: a use of the entry was one of its parent, which is next in the order of eviction when nothing extends it
 * any more. A parent whose record is damaged is left for a repair. */
XKV_MUST_CHECK xkv_status xkv_line_leave(xkv_txn *txn, xkv_meta *meta, const xkv_item *item);
/* What others extend lives as long as they do: let the parent of `child`, and so on. */
XKV_MUST_CHECK xkv_status xkv_line_extend_life(xkv_txn *txn, xkv_meta *meta, const xkv_item *child);
/* What the entries that extend others need not store. */
XKV_MUST_CHECK xkv_status xkv_line_get_shared(xkv_txn *txn, xkv_shared *shared);
/* One of those that extend entry `id`, taken off the list. NOT_FOUND: none is left. */
XKV_MUST_CHECK xkv_status xkv_line_take_child(xkv_txn *txn, uint64_t id, uint64_t *child);

/* --- Pending uses and counters --- */

/* Note a use. */
void xkv_pending_use(xkv_store *store, uint64_t id, uint64_t time);
/* True, once, when it is time to write what is pending: it is a while since the last time. */
bool xkv_pending_due(xkv_store *store, uint64_t time);
/* Write what is pending in a transaction of its own. */
XKV_MUST_CHECK xkv_status xkv_store_flush(xkv_ctx *ctx, xkv_store *store);

/* A change of the index: `body` gets the META record, which is written back after it. Pending uses go along, blobs of
 * what was removed are deleted after the commit. A body that sets `again` runs once more, in another transaction.
 * Without a body only what is pending is written, which a crash of the machine may undo. */
typedef struct xkv_change {
    xkv_store *store;
    xkv_status (*body)(xkv_txn *txn, xkv_meta *meta, struct xkv_change *change);
    void *user;
    xkv_removed removed;                   /* deleted after the commit */
    xkv_removed quarantine;                /* moved to the quarantine after it */
    bool again;                            /* false whenever the body begins */
    bool blobs_synced;                     /* set by a body that has synced the folder of blobs */
    uint64_t removed_count, removed_bytes; /* of `removed`, added up by the commits */
    uint64_t evicted_count, evicted_bytes; /* the same */
    uint64_t byte_cap;                     /* as the last commit left it */
} xkv_change;
XKV_MUST_CHECK xkv_status xkv_store_change(xkv_ctx *ctx, xkv_change *change);

/* Errors that mean: these bytes are not what was written. */
bool xkv_is_damage(xkv_status status);
/* Those that mean: a newer program wrote them, and can read them. */
bool xkv_is_newer(xkv_status status);

/* Put entry `id` into quarantine, count and log it. Failures are logged. */
void xkv_store_quarantine(xkv_ctx *ctx, xkv_store *store, uint64_t id, const char *why);

/* The same for a dictionary, whose blob `id` is damaged or missing: its record goes, the entries that need it stay. */
void xkv_store_quarantine_dict(xkv_ctx *ctx, xkv_store *store, const uint8_t dict_id[16], uint64_t id, const char *why);

/* A dictionary of the store, decoded; others may use it at the same time. One that is damaged or missing goes into
 * quarantine unless `look_only`. Errors: MISMATCH (it is not there, damaged or missing: no entry is to blame), LIMIT
 * (too many in use), MEMORY, IO. */
XKV_MUST_CHECK xkv_status xkv_store_use_dict(xkv_ctx *ctx, xkv_store *store, const uint8_t id[16], bool look_only,
                                             xkv_cached_dict **slot_p);
void xkv_store_leave_dict(xkv_store *store, xkv_cached_dict *slot); /* accepts NULL */
void xkv_store_drop_dicts(xkv_store *store);                        /* all; none is in use */

/* A hit of an entry to look at it, whatever its age: nothing goes into quarantine because of it. NOT_FOUND without a
 * message: it or its blob is not there. */
XKV_MUST_CHECK xkv_status xkv_store_look(xkv_ctx *ctx, xkv_store *store, uint64_t id, xkv_hit **hit_p);

/* A hit of the entry that has the longest common prefix with the symbols, and how many *tokens that is; NULL when none
 * can be read. Counts nothing. */
XKV_MUST_CHECK xkv_status xkv_store_nearest(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                                            const uint32_t *symbols, uint32_t count, uint32_t *tokens, xkv_hit **hit_p);
/* In place of xkv_hit_entry() for who does not read rows: no dictionary is decoded. */
XKV_MUST_CHECK xkv_status xkv_hit_examine(xkv_ctx *ctx, xkv_hit *hit, const xkv_entry **entry_p);
/* The record of the hit's entry (0), of the one that it extends (1), and so on; NULL behind the last one. */
const xkv_item *xkv_hit_item(const xkv_hit *hit, uint32_t i);

/* xkv_store_match(), but a hit counts as one, and as a use of the entry, only when xkv_hit_count() says how many of its
 * tokens are reused. */
XKV_MUST_CHECK xkv_status xkv_store_find(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                                         const xkv_prompt *prompt, uint32_t min_tokens, xkv_match *match,
                                         xkv_hit **hit_p);
void xkv_hit_count(xkv_ctx *ctx, const xkv_hit *hit, uint32_t tokens);

/* --- Verifying --- */

typedef struct xkv_records_report {
    uint64_t bad;                    /* records that are damaged or contradict others; but for those of entries */
    uint64_t spaces, entries, bytes; /* namespaces, and what they count */
    char first[256];                 /* what was wrong first; "" */
} xkv_records_report;
/* Every record of the index, but for the blobs they speak of. */
XKV_MUST_CHECK xkv_status xkv_verify_records(xkv_ctx *ctx, xkv_store *store, xkv_records_report *report);
/* Whether the entry stands in USED or EXPIRES under this time. */
bool xkv_item_is_listed(const xkv_item *item, uint8_t table, uint64_t time);

/* --- Importing (put.c) --- */

typedef struct xkv_import {
    uint64_t before;  /* id of the entry that it extends, or of one that extends that one; if it extends any */
    uint64_t expires; /* it does not before this; 0: never */
    bool fetched;     /* it came from the remote, and is not sent there again */
} xkv_import;
/* xkv_store_import() of one entry, a blob file that is not sealed; its *id here. */
XKV_MUST_CHECK xkv_status xkv_store_import_entry(xkv_ctx *ctx, xkv_store *store, const xkv_input *file,
                                                 const xkv_import *how, uint64_t *id);
/* xkv_store_put_dict() that says whether it has *added a blob, of this id; 0: one was there. */
XKV_MUST_CHECK xkv_status xkv_store_add_dict(xkv_ctx *ctx, xkv_store *store, const xkv_input *dictionary,
                                             uint8_t id[16], uint64_t *added);
/* Take such a blob out again, unless an entry needs it by now. */
XKV_MUST_CHECK xkv_status xkv_store_drop_dict(xkv_ctx *ctx, xkv_store *store, const uint8_t id[16], uint64_t added);

/* --- Remote tier (remote.c, remote_fetch.c, remote_push.c) --- */

/* Ask the remote, if there is one, for an entry that has more than the first `have` tokens of a prompt; true when one
 * was stored. Whatever fails is counted and logged, no more. */
bool xkv_remote_fetch(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const xkv_symbols *prompt,
                      uint32_t have);
/* Note an entry as to be sent, if there is a remote and it can be. */
XKV_MUST_CHECK xkv_status xkv_remote_queue(xkv_txn *txn, const xkv_store *store, const xkv_item *item);
/* After the commit: tell the thread that sends. */
void xkv_remote_wake(const xkv_store *store);
/* Stop sending and free the remote, if there is one. */
void xkv_remote_detach(xkv_store *store);

/* --- Tidying (store.c) --- */

/* Body of a transaction: what the index knows of a blob. */
typedef struct xkv_known_blob {
    uint64_t id;
    uint8_t hash[32];
    bool taken; /* an entry or a dictionary has the id */
    bool found; /* and this is its blob */
} xkv_known_blob;
XKV_MUST_CHECK xkv_status xkv_find_blob(xkv_txn *txn, void *user);

/* Whether a file among the blobs is known to nobody, and nobody is about to make it known. */
XKV_MUST_CHECK xkv_status xkv_store_is_orphan(xkv_ctx *ctx, xkv_store *store, const char *name, bool *orphan);
/* Remove what killed processes have left: temporary files, blobs that were to be deleted. */
XKV_MUST_CHECK xkv_status xkv_store_tidy(xkv_ctx *ctx, xkv_store *store, uint64_t *leftovers);

#endif
