/* index.c - transactions on the LMDB environment of a store. */
#include "index.h"

#include <errno.h>
#include <lmdb.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
#include <xxhash.h>

#define MAX_READERS 1022u /* as many as the lock file's pages hold without waste */
#define CHECKSUM    8u

/* Every transaction holds `gate` for reading; to change the map, or to open the environment anew, it is held for
 * writing, since LMDB allows that only while this process has no transaction. Writers are preferred, or a busy store
 * would never grow; hence no thread may begin a transaction inside another one. */
struct xkv_index {
    MDB_env *env;
    MDB_dbi dbi;
    pthread_rwlock_t gate;
    pthread_mutex_t commit; /* held during every commit, since whether it is synced is a flag of the environment */
    bool read_only, no_sync;
    size_t map_size;
    uint64_t damaged;
    char path[];
};

struct xkv_txn {
    xkv_ctx *ctx;
    xkv_index *index;
    MDB_txn *mdb;
    int error; /* the last failure of LMDB in this transaction */
};

/* --- Errors ------------------------------------------------------------------------------------------------------- */

static xkv_status status_of(int error)
{
    switch (error) {
    case MDB_SUCCESS:
        return XKV_OK;
    case MDB_NOTFOUND:
        return XKV_ERROR_NOT_FOUND;
    case MDB_VERSION_MISMATCH:
        return XKV_ERROR_VERSION;
    case MDB_PAGE_NOTFOUND:
    case MDB_CORRUPTED:
    case MDB_INVALID:
    case MDB_CURSOR_FULL:
        return XKV_ERROR_CORRUPT;
    case MDB_READERS_FULL:
    case MDB_TXN_FULL:
        return XKV_ERROR_LIMIT;
    case ENOMEM:
        return XKV_ERROR_MEMORY;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return XKV_ERROR_NO_SPACE;
    default:
        return XKV_ERROR_IO;
    }
}

static xkv_status fail_mdb(xkv_ctx *ctx, const char *doing, const char *path, int error)
{
    xkv_status status = status_of(error);
    bool damage = status == XKV_ERROR_CORRUPT || status == XKV_ERROR_VERSION;
    return xkv_fail(ctx, status, "cannot %s the index %s: %s%s", doing, path, mdb_strerror(error),
                    damage ? ": repair rebuilds it [SI1]" : "");
}

/* --- Opening ------------------------------------------------------------------------------------------------------ */

static int open_env(xkv_index *index)
{
    unsigned flags =
        MDB_NOTLS | MDB_NORDAHEAD | (index->read_only ? MDB_RDONLY : 0u) | (index->no_sync ? MDB_NOSYNC : 0u);
    MDB_txn *txn = NULL;
    int error = mdb_env_create(&index->env);
    if (error == 0)
        error = mdb_env_set_mapsize(index->env, index->map_size);
    if (error == 0)
        error = mdb_env_set_maxreaders(index->env, MAX_READERS);
    if (error == 0)
        error = mdb_env_open(index->env, index->path, flags, 0600);
    if (error == 0)
        error = mdb_txn_begin(index->env, NULL, MDB_RDONLY, &txn);
    if (error == 0)
        error = mdb_dbi_open(txn, NULL, 0, &index->dbi);
    mdb_txn_abort(txn);
    if (error == 0)
        error = mdb_reader_check(index->env, NULL); /* slots of killed processes would keep old pages for ever */
    if (error != 0) {
        mdb_env_close(index->env);
        index->env = NULL;
    }
    return error;
}

/* The snapshot that a transaction keeps from being overwritten is checked; a newer meta page may push out the one that
 * describes it, and then a newer snapshot is taken. */
static xkv_status check_pages(xkv_ctx *ctx, xkv_index *index)
{
    xkv_status status = XKV_ERROR_NOT_FOUND;
    for (int attempt = 0; status == XKV_ERROR_NOT_FOUND && attempt < 1000; attempt++) {
        MDB_txn *txn;
        int error = mdb_txn_begin(index->env, NULL, MDB_RDONLY, &txn);
        if (error != 0)
            return fail_mdb(ctx, "read", index->path, error);
        status = xkv_index_check_file(ctx, index->path, mdb_txn_id(txn), &index->damaged);
        mdb_txn_abort(txn);
    }
    return status;
}

static xkv_status make_gate(xkv_ctx *ctx, pthread_rwlock_t *gate)
{
    pthread_rwlockattr_t attributes;
    int error = pthread_rwlockattr_init(&attributes);
    if (error == 0) {
        pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
        error = pthread_rwlock_init(gate, &attributes);
        pthread_rwlockattr_destroy(&attributes);
    }
    return error == 0 ? XKV_OK : xkv_fail(ctx, XKV_ERROR_MEMORY, "cannot make a lock");
}

xkv_status xkv_index_open(xkv_ctx *ctx, const char *path, const xkv_index_options *options, xkv_index **index_p)
{
    size_t size = strlen(path) + 1;
    xkv_index *index = NULL;
    xkv_status status;
    XKV_TRY(xkv_index_check_meta(ctx, path));
    XKV_TRY(xkv_alloc_zero(ctx, 1, sizeof *index + size, (void **)&index));
    memcpy(index->path, path, size);
    index->read_only = options->read_only;
    index->no_sync = options->no_sync;
    index->map_size = (size_t)xkv_max64(options->map_size, 1u << 16);
    status = make_gate(ctx, &index->gate);
    if (status != XKV_OK) {
        xkv_release(ctx, index);
        return status;
    }
    pthread_mutex_init(&index->commit, NULL); /* which never fails here */
    int error = open_env(index);
    if (error != 0)
        status = fail_mdb(ctx, "open", path, error);
    else if (options->check)
        status = check_pages(ctx, index);
    if (status != XKV_OK) {
        xkv_index_close(ctx, index);
        return status;
    }
    *index_p = index;
    return XKV_OK;
}

void xkv_index_close(xkv_ctx *ctx, xkv_index *index)
{
    if (index == NULL)
        return;
    if (index->env != NULL)
        mdb_env_close(index->env);
    pthread_rwlock_destroy(&index->gate);
    pthread_mutex_destroy(&index->commit);
    xkv_release(ctx, index);
}

uint64_t xkv_index_damaged(const xkv_index *index)
{
    return index->damaged;
}

/* --- Transactions ------------------------------------------------------------------------------------------------- */

/* Make room: `grow` doubles the map, otherwise it becomes as large as another process has made it. */
static int change_map(xkv_index *index, bool grow)
{
    MDB_envinfo info;
    int error = 0;
    pthread_rwlock_wrlock(&index->gate);
    if (index->env == NULL) {
        error = open_env(index);
    } else {
        mdb_env_info(index->env, &info);
        size_t size = info.me_mapsize > SIZE_MAX / 2 ? info.me_mapsize : 2 * info.me_mapsize;
        error = mdb_env_set_mapsize(index->env, grow ? size : 0);
        mdb_env_info(index->env, &info);
        index->map_size = info.me_mapsize;
    }
    pthread_rwlock_unlock(&index->gate);
    return error;
}

/* After a failed write of its meta page LMDB refuses further work until the environment is opened anew. */
static int reopen(xkv_index *index)
{
    int error = 0;
    pthread_rwlock_wrlock(&index->gate);
    if (index->env != NULL)
        mdb_env_close(index->env);
    index->env = NULL;
    error = open_env(index);
    pthread_rwlock_unlock(&index->gate);
    return error;
}

/* Give up the reader slots of killed processes, whose old pages are never used again; true when there were any. */
static bool clear_readers(xkv_index *index)
{
    int dead = 0, error = MDB_PANIC;
    pthread_rwlock_rdlock(&index->gate);
    if (index->env != NULL)
        error = mdb_reader_check(index->env, &dead);
    pthread_rwlock_unlock(&index->gate);
    return error == 0 && dead > 0;
}

/* Mend what can be: true when it is worth another attempt. The map grows only when nobody dead holds pages of it. */
static bool mend(xkv_index *index, int error, int attempt)
{
    if (attempt >= 40)
        return false;
    switch (error) {
    case MDB_MAP_FULL:
        return clear_readers(index) || change_map(index, true) == 0;
    case MDB_MAP_RESIZED:
        return change_map(index, false) == 0;
    case MDB_PANIC:
        return attempt < 2 && reopen(index) == 0;
    case MDB_READERS_FULL:
        return clear_readers(index);
    default:
        return false;
    }
}

/* Begin with the gate held; on failure it is not held any more. */
static int begin(xkv_index *index, unsigned flags, MDB_txn **txn)
{
    pthread_rwlock_rdlock(&index->gate);
    int error = index->env != NULL ? mdb_txn_begin(index->env, NULL, flags, txn) : MDB_PANIC;
    if (error != 0)
        pthread_rwlock_unlock(&index->gate);
    return error;
}

xkv_status xkv_index_read(xkv_ctx *ctx, xkv_index *index, xkv_txn_fn body, void *user)
{
    for (int attempt = 0;; attempt++) {
        xkv_txn txn = {.ctx = ctx, .index = index};
        int error = begin(index, MDB_RDONLY, &txn.mdb);
        if (error == 0) {
            xkv_status status = body(&txn, user);
            mdb_txn_abort(txn.mdb);
            pthread_rwlock_unlock(&index->gate);
            return status;
        }
        if (!mend(index, error, attempt))
            return fail_mdb(ctx, "read", index->path, error);
    }
}

/* Commit; `lazily`: do not wait until the meta page is on the disk. LMDB 0.9 has no flag for one transaction. */
static int commit(xkv_index *index, MDB_txn *txn, bool lazily)
{
    pthread_mutex_lock(&index->commit);
    if (lazily)
        (void)mdb_env_set_flags(index->env, MDB_NOMETASYNC, 1);
    int error = mdb_txn_commit(txn);
    if (lazily)
        (void)mdb_env_set_flags(index->env, MDB_NOMETASYNC, 0);
    pthread_mutex_unlock(&index->commit);
    return error;
}

/* One attempt; *error is that of LMDB, 0 when the failure is not its. */
static xkv_status write_once(xkv_ctx *ctx, xkv_index *index, bool lazily, xkv_txn_fn body, void *user, int *error)
{
    xkv_txn txn = {.ctx = ctx, .index = index};
    xkv_status status = XKV_OK;
    *error = begin(index, 0, &txn.mdb);
    if (*error != 0)
        return status_of(*error);
    status = body(&txn, user);
    if (status == XKV_OK) {
        *error = commit(index, txn.mdb, lazily);
        status = status_of(*error);
    } else {
        mdb_txn_abort(txn.mdb);
        *error = txn.error;
    }
    pthread_rwlock_unlock(&index->gate);
    return status;
}

static xkv_status write_index(xkv_ctx *ctx, xkv_index *index, bool lazily, xkv_txn_fn body, void *user)
{
    if (index->read_only)
        return xkv_fail(ctx, XKV_ERROR_IO, "the store is open read-only");
    for (int attempt = 0;; attempt++) {
        int error = 0;
        xkv_status status = write_once(ctx, index, lazily, body, user, &error);
        if (status == XKV_OK)
            return XKV_OK;
        if (!mend(index, error, attempt)) {
            if (error == MDB_PANIC || error == EIO || error == ENOSPC)
                (void)reopen(index); /* so that the next call finds a sound environment */
            return error != 0 ? fail_mdb(ctx, "write", index->path, error) : status;
        }
    }
}

xkv_status xkv_index_write(xkv_ctx *ctx, xkv_index *index, xkv_txn_fn body, void *user)
{
    return write_index(ctx, index, false, body, user);
}

xkv_status xkv_index_write_lazily(xkv_ctx *ctx, xkv_index *index, xkv_txn_fn body, void *user)
{
    return write_index(ctx, index, true, body, user);
}

xkv_ctx *xkv_txn_ctx(const xkv_txn *txn)
{
    return txn->ctx;
}

/* --- Records ------------------------------------------------------------------------------------------------------ */

static uint64_t checksum(const void *key, size_t key_size, const void *value, size_t size)
{
    uint8_t bytes[XKV_KEY_MAX + XKV_VALUE_MAX];
    memcpy(bytes, key, key_size);
    memcpy(bytes + key_size, value, size);
    return XXH3_64bits(bytes, key_size + size);
}

const char *xkv_stored_problem(const void *key, size_t key_size, const void *value, size_t value_size)
{
    if (key_size > XKV_KEY_MAX || value_size < CHECKSUM || value_size > XKV_VALUE_MAX + CHECKSUM)
        return "its size is impossible [SI3]";
    size_t size = value_size - CHECKSUM;
    if (xkv_load64((const uint8_t *)value + size) != checksum(key, key_size, value, size))
        return "its checksum does not match [SI2]";
    return xkv_record_problem(key, key_size, value, size);
}

static xkv_status fail_record(xkv_txn *txn, const xkv_key *key, const char *what)
{
    return xkv_fail(txn->ctx, XKV_ERROR_CORRUPT,
                    "record '%c' of %zu key bytes in the index %s, which repair rebuilds: %s", key->bytes[0], key->size,
                    txn->index->path, what);
}

/* Check the value that the map holds. */
static xkv_status check_value(xkv_txn *txn, const xkv_key *key, const MDB_val *v)
{
    const char *problem = xkv_stored_problem(key->bytes, key->size, v->mv_data, v->mv_size);
    return problem == NULL ? XKV_OK : fail_record(txn, key, problem);
}

static xkv_status fail_txn(xkv_txn *txn, int error)
{
    if (error == MDB_NOTFOUND)
        return XKV_ERROR_NOT_FOUND;
    txn->error = error;
    if (error == MDB_MAP_FULL || error == MDB_PANIC) /* the loop of xkv_index_write() may mend it */
        return status_of(error);
    return fail_mdb(txn->ctx, "use", txn->index->path, error);
}

static MDB_val key_value(const xkv_key *key)
{
    return (MDB_val){key->size, (void *)(uintptr_t)key->bytes}; /* LMDB does not write to it */
}

xkv_status xkv_txn_get(xkv_txn *txn, const xkv_key *key, uint8_t *value, size_t size)
{
    MDB_val k = key_value(key), v;
    int error = mdb_get(txn->mdb, txn->index->dbi, &k, &v);
    if (error != 0)
        return fail_txn(txn, error);
    XKV_TRY(check_value(txn, key, &v));
    if (v.mv_size != size + CHECKSUM)
        return fail_record(txn, key, "its size is not the one of its table [SI3]");
    memcpy(value, v.mv_data, size);
    return XKV_OK;
}

xkv_status xkv_txn_put(xkv_txn *txn, const xkv_key *key, const uint8_t *value, size_t size)
{
    uint8_t bytes[XKV_VALUE_MAX + CHECKSUM];
    MDB_val k = key_value(key), v = {size + CHECKSUM, bytes};
    if (size > 0)
        memcpy(bytes, value, size);
    xkv_store64(bytes + size, checksum(key->bytes, key->size, bytes, size));
    int error = mdb_put(txn->mdb, txn->index->dbi, &k, &v, 0);
    return error == 0 ? XKV_OK : fail_txn(txn, error);
}

xkv_status xkv_txn_delete(xkv_txn *txn, const xkv_key *key)
{
    MDB_val k = key_value(key);
    int error = mdb_del(txn->mdb, txn->index->dbi, &k, NULL);
    return error == 0 || error == MDB_NOTFOUND ? XKV_OK : fail_txn(txn, error);
}

static xkv_status take_record(xkv_txn *txn, const MDB_val *k, const MDB_val *v, xkv_key *key, uint8_t *value)
{
    memset(key->bytes, 0, sizeof key->bytes); /* a damaged index may hold shorter keys than are looked at */
    memcpy(key->bytes, k->mv_data, k->mv_size);
    key->size = k->mv_size;
    XKV_TRY(check_value(txn, key, v));
    if (value != NULL)
        memcpy(value, v->mv_data, v->mv_size - CHECKSUM);
    return XKV_OK;
}

xkv_status xkv_txn_seek(xkv_txn *txn, const xkv_key *from, size_t prefix, xkv_key *key, uint8_t *value)
{
    MDB_cursor *cursor;
    MDB_val k = key_value(from), v;
    int error = mdb_cursor_open(txn->mdb, txn->index->dbi, &cursor);
    if (error != 0)
        return fail_txn(txn, error);
    error = mdb_cursor_get(cursor, &k, &v, MDB_SET_RANGE);
    xkv_status status = error == 0 ? XKV_OK : fail_txn(txn, error);
    if (status == XKV_OK && (k.mv_size < prefix || memcmp(k.mv_data, from->bytes, prefix) != 0))
        status = XKV_ERROR_NOT_FOUND;
    if (status == XKV_OK && k.mv_size > XKV_KEY_MAX)
        status = fail_record(txn, from, "the next key is too long [SI3]");
    if (status == XKV_OK)
        status = take_record(txn, &k, &v, key, value);
    mdb_cursor_close(cursor);
    return status;
}

xkv_status xkv_txn_next(xkv_txn *txn, xkv_key *at, size_t prefix, xkv_key *key, uint8_t *value)
{
    key->size = 0;
    xkv_status status = xkv_txn_seek(txn, at, prefix, key, value);
    if (status != XKV_OK && !xkv_is_damaged_record(status, key))
        return status;
    *at = *key;
    xkv_key_step(at);
    return status;
}

/* --- The whole ---------------------------------------------------------------------------------------------------- */

xkv_status xkv_index_copy(xkv_ctx *ctx, xkv_index *index, const char *folder)
{
    pthread_rwlock_rdlock(&index->gate);
    int error = index->env != NULL ? mdb_env_copy2(index->env, folder, MDB_CP_COMPACT) : MDB_PANIC;
    pthread_rwlock_unlock(&index->gate);
    return error == 0 ? XKV_OK : fail_mdb(ctx, "copy", index->path, error);
}

void xkv_index_clear_readers(xkv_index *index)
{
    (void)clear_readers(index); /* if it fails, the next one to open the store tries again */
}

void xkv_index_sizes(xkv_index *index, uint64_t *used, uint64_t *map)
{
    MDB_envinfo info;
    MDB_stat stat;
    *used = *map = 0;
    pthread_rwlock_rdlock(&index->gate);
    if (index->env != NULL && mdb_env_info(index->env, &info) == 0 && mdb_env_stat(index->env, &stat) == 0) {
        *map = info.me_mapsize;
        *used = (uint64_t)(stat.ms_branch_pages + stat.ms_leaf_pages + stat.ms_overflow_pages) * stat.ms_psize;
    }
    pthread_rwlock_unlock(&index->gate);
}

/* --- Records by kind ---------------------------------------------------------------------------------------------- */

xkv_status xkv_txn_get_meta(xkv_txn *txn, xkv_meta *meta)
{
    uint8_t value[XKV_META_SIZE];
    xkv_key key = xkv_key_meta();
    xkv_status status = xkv_txn_get(txn, &key, value, sizeof value);
    if (status == XKV_ERROR_NOT_FOUND)
        return fail_record(txn, &key, "it is not there [SI2]");
    XKV_TRY(status);
    xkv_meta_decode(value, meta);
    return XKV_OK;
}

xkv_status xkv_txn_put_meta(xkv_txn *txn, const xkv_meta *meta)
{
    uint8_t value[XKV_META_SIZE];
    xkv_key key = xkv_key_meta();
    xkv_meta_encode(meta, value);
    return xkv_txn_put(txn, &key, value, sizeof value);
}

static xkv_status get_meta_body(xkv_txn *txn, void *user)
{
    return xkv_txn_get_meta(txn, user);
}

xkv_status xkv_index_get_meta(xkv_ctx *ctx, xkv_index *index, xkv_meta *meta)
{
    return xkv_index_read(ctx, index, get_meta_body, meta);
}

static xkv_status put_meta_body(xkv_txn *txn, void *user)
{
    return xkv_txn_put_meta(txn, user);
}

xkv_status xkv_index_put_meta(xkv_ctx *ctx, xkv_index *index, xkv_meta *meta)
{
    return xkv_index_write(ctx, index, put_meta_body, meta);
}

xkv_status xkv_txn_get_space(xkv_txn *txn, const uint8_t ns[32], xkv_space *space)
{
    uint8_t value[XKV_SPACE_SIZE];
    xkv_key key = xkv_key_bytes(XKV_TABLE_SPACE, ns, 32);
    XKV_TRY(xkv_txn_get(txn, &key, value, sizeof value));
    xkv_space_decode(value, space);
    return XKV_OK;
}

xkv_status xkv_txn_put_space(xkv_txn *txn, const uint8_t ns[32], const xkv_space *space)
{
    uint8_t value[XKV_SPACE_SIZE];
    xkv_key key = xkv_key_bytes(XKV_TABLE_SPACE, ns, 32);
    xkv_space_encode(space, value);
    return xkv_txn_put(txn, &key, value, sizeof value);
}

xkv_status xkv_txn_get_item(xkv_txn *txn, uint64_t id, xkv_item *item)
{
    uint8_t value[XKV_ITEM_SIZE];
    xkv_key key = xkv_key_id(XKV_TABLE_ITEM, id);
    XKV_TRY(xkv_txn_get(txn, &key, value, sizeof value));
    xkv_item_decode(value, item);
    return XKV_OK;
}

xkv_status xkv_txn_put_item(xkv_txn *txn, const xkv_item *item)
{
    uint8_t value[XKV_ITEM_SIZE];
    xkv_key key = xkv_key_id(XKV_TABLE_ITEM, item->id);
    xkv_item_encode(item, value);
    return xkv_txn_put(txn, &key, value, sizeof value);
}

xkv_status xkv_txn_get_dict(xkv_txn *txn, const uint8_t id[16], xkv_dict_record *dict)
{
    uint8_t value[XKV_DICT_SIZE];
    xkv_key key = xkv_key_bytes(XKV_TABLE_DICT, id, 16);
    XKV_TRY(xkv_txn_get(txn, &key, value, sizeof value));
    xkv_dict_record_decode(value, dict);
    return XKV_OK;
}

xkv_status xkv_txn_put_dict(xkv_txn *txn, const uint8_t id[16], const xkv_dict_record *dict)
{
    uint8_t value[XKV_DICT_SIZE];
    xkv_key key = xkv_key_bytes(XKV_TABLE_DICT, id, 16);
    xkv_dict_record_encode(dict, value);
    return xkv_txn_put(txn, &key, value, sizeof value);
}

typedef struct dict_search {
    const uint8_t *id;
    xkv_dict_record *dict;
} dict_search;

static xkv_status get_dict_body(xkv_txn *txn, void *user)
{
    const dict_search *s = user;
    return xkv_txn_get_dict(txn, s->id, s->dict);
}

xkv_status xkv_index_get_dict(xkv_ctx *ctx, xkv_index *index, const uint8_t id[16], xkv_dict_record *dict)
{
    dict_search s = {.id = id, .dict = dict};
    return xkv_index_read(ctx, index, get_dict_body, &s);
}

xkv_status xkv_txn_get_u64(xkv_txn *txn, const xkv_key *key, uint64_t *number)
{
    uint8_t value[8];
    XKV_TRY(xkv_txn_get(txn, key, value, sizeof value));
    *number = xkv_load64(value);
    return XKV_OK;
}

xkv_status xkv_txn_put_u64(xkv_txn *txn, const xkv_key *key, uint64_t number)
{
    uint8_t value[8];
    xkv_store64(value, number);
    return xkv_txn_put(txn, key, value, sizeof value);
}

xkv_status xkv_txn_put_mark(xkv_txn *txn, const xkv_key *key)
{
    return xkv_txn_put(txn, key, NULL, 0);
}
