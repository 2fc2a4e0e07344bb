/* store.c - making, opening and closing a store; locks; what killed processes have left. */
#include "store_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#define DEFAULT_MAP   ((uint64_t)1 << 30)
#define LOCK_ATTEMPTS 200
#define LOCK_WAIT     (50 * 1000 * 1000) /* nanoseconds between them: 10 s in all */
#define VERSION       2u                 /* of the folder; 1 named blobs by another hash, before the first release */

static const uint8_t magic[8] = {'x', 'k', 'v', 's', 't', 'o', 'r', 'e'};

/* A second environment on the same files would break LMDB's locks, so a process opens a store once. */
static pthread_mutex_t open_mutex = PTHREAD_MUTEX_INITIALIZER;
static xkv_store *open_stores;

/* --- Small things ------------------------------------------------------------------------------------------------- */

xkv_status xkv_store_begin(xkv_ctx *ctx, const xkv_store *store)
{
    xkv_ctx_begin(ctx);
    if (store->pid != getpid())
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the store was opened before fork(): open it in the child");
    return XKV_OK;
}

xkv_status xkv_store_begin_change(xkv_ctx *ctx, const xkv_store *store)
{
    XKV_TRY(xkv_store_begin(ctx, store));
    return store->read_only ? xkv_fail(ctx, XKV_ERROR_IO, "the store is open read-only") : XKV_OK;
}

static uint64_t system_clock(void *user)
{
    struct timespec t;
    (void)user;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

uint64_t xkv_store_now(const xkv_store *store)
{
    return store->clock(store->clock_user);
}

xkv_status xkv_join_path(xkv_ctx *ctx, const char *path, const char *name, char **joined)
{
    size_t size = strlen(path) + strlen(name) + 2;
    XKV_TRY(XKV_NEW(ctx, size, joined));
    snprintf(*joined, size, "%s/%s", path, name);
    return XKV_OK;
}

/* --- Properties --------------------------------------------------------------------------------------------------- */

static void encode_properties(const xkv_properties *p, uint8_t bytes[XKV_PROPERTIES_SIZE])
{
    memset(bytes, 0, XKV_PROPERTIES_SIZE);
    memcpy(bytes, magic, sizeof magic);
    xkv_store16(bytes + 8, VERSION);
    xkv_store16(bytes + 10, VERSION);
    xkv_store32(bytes + 12, p->block_tokens);
    xkv_store64(bytes + 16, p->byte_cap);
    xkv_store32(bytes + 24, p->encrypted);
    if (p->encrypted)
        memcpy(bytes + 28, p->key_id, sizeof p->key_id);
    xkv_store64(bytes + 56, XXH3_64bits(bytes, 56));
}

static xkv_status decode_properties(xkv_ctx *ctx, const uint8_t *bytes, ssize_t size, xkv_properties *p)
{
    if (size == XKV_PROPERTIES_SIZE && xkv_load64(bytes + 56) != XXH3_64bits(bytes, 56))
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM,
                        "the checksum of the file \"store\" does not match: repair makes it anew [SO3]");
    if (size < 12 || memcmp(bytes, magic, sizeof magic) != 0)
        return xkv_fail(ctx, XKV_ERROR_FORMAT, "not a store: the file \"store\" has another magic [SO1]");
    if (xkv_load16(bytes + 10) != VERSION)
        return xkv_fail(ctx, XKV_ERROR_VERSION, "the store has version %u, this program reads %u [SO2]",
                        xkv_load16(bytes + 10), VERSION);
    if (size != XKV_PROPERTIES_SIZE)
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "the file \"store\" has not %d bytes: repair makes it anew [SO3]",
                        XKV_PROPERTIES_SIZE);
    *p = (xkv_properties){.block_tokens = xkv_load32(bytes + 12),
                          .encrypted = xkv_load32(bytes + 24),
                          .byte_cap = xkv_load64(bytes + 16)};
    memcpy(p->key_id, bytes + 28, sizeof p->key_id);
    for (size_t i = p->encrypted ? 44 : 28; i < 56; i++) {
        if (bytes[i] != 0 || p->encrypted > 1)
            return xkv_fail(ctx, XKV_ERROR_FEATURE, "the store uses unknown features [SO3]");
    }
    if (p->block_tokens < 1 || p->block_tokens > 65536)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "blocks of %u tokens [SO3]", p->block_tokens);
    return XKV_OK;
}

xkv_status xkv_properties_read(xkv_ctx *ctx, int root, xkv_properties *p)
{
    uint8_t bytes[XKV_PROPERTIES_SIZE + 1];
    int fd = openat(root, "store", O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && errno == ENOENT)
        return xkv_fail(ctx, XKV_ERROR_FORMAT, "not a store: there is no file \"store\" [SO1]");
    if (fd < 0)
        return xkv_fail_errno(ctx, "open the file", "\"store\"", errno);
    ssize_t n = pread(fd, bytes, sizeof bytes, 0);
    int error = errno;
    close(fd);
    return n < 0 ? xkv_fail_errno(ctx, "read the file", "\"store\"", error) : decode_properties(ctx, bytes, n, p);
}

xkv_status xkv_properties_write(xkv_ctx *ctx, int root, const xkv_properties *p)
{
    uint8_t bytes[XKV_PROPERTIES_SIZE];
    encode_properties(p, bytes);
    (void)unlinkat(root, "store.new", 0);
    int fd = openat(root, "store.new", O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return xkv_fail_errno(ctx, "create the file", "\"store\"", errno);
    bool written = pwrite(fd, bytes, sizeof bytes, 0) == (ssize_t)sizeof bytes && fsync(fd) == 0;
    int error = errno;
    close(fd);
    if (!written || renameat(root, "store.new", root, "store") != 0) {
        error = written ? errno : error;
        (void)unlinkat(root, "store.new", 0);
        return xkv_fail_errno(ctx, "write the file", "\"store\"", error);
    }
    return fsync(root) == 0 || errno == EINVAL ? XKV_OK : xkv_fail_errno(ctx, "sync", "the folder", errno);
}

xkv_status xkv_store_take_key(xkv_ctx *ctx, xkv_store *store, const uint8_t *key)
{
    uint8_t id[XKV_SEAL_ID];
    if (key == NULL && !store->properties.encrypted)
        return XKV_OK;
    if (key == NULL || !store->properties.encrypted)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "%s is %s [SO6]", store->path,
                        key == NULL ? "encrypted: it needs its key" : "not encrypted: it takes no key");
    xkv_seal_id(key, id);
    if (memcmp(id, store->properties.key_id, sizeof id) != 0)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "%s is encrypted with another key [SO6]", store->path);
    XKV_TRY(xkv_seal_begin(ctx));
    memcpy(store->key_bytes, key, sizeof store->key_bytes);
    store->key = store->key_bytes;
    return XKV_OK;
}

void xkv_store_forget_key(xkv_store *store)
{
    explicit_bzero(store->key_bytes, sizeof store->key_bytes);
    store->key = NULL;
}

/* --- Creating ----------------------------------------------------------------------------------------------------- */

/* An index with nothing but its META record. */
static xkv_status create_index(xkv_ctx *ctx, const char *path, uint64_t byte_cap)
{
    const xkv_index_options o = {.map_size = DEFAULT_MAP};
    xkv_meta meta = {.next_id = 1, .next_node = 1, .byte_cap = byte_cap};
    xkv_index *index = NULL;
    XKV_TRY(xkv_index_open(ctx, path, &o, &index));
    xkv_status status = xkv_index_put_meta(ctx, index, &meta);
    xkv_index_close(ctx, index);
    return status;
}

static xkv_status note_name(void *user, const char *name)
{
    (void)name;
    *(bool *)user = true;
    return XKV_OK;
}

/* The new folder, or one that is empty. */
static xkv_status create_root(xkv_ctx *ctx, const char *path, int *root)
{
    bool occupied = false;
    if (mkdir(path, 0700) != 0 && errno != EEXIST)
        return xkv_fail_errno(ctx, "create the folder", path, errno);
    *root = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (*root < 0)
        return xkv_fail_errno(ctx, "open the folder", path, errno);
    xkv_status status = xkv_folder_list(ctx, *root, note_name, &occupied);
    if (status == XKV_OK && occupied)
        status = xkv_fail(ctx, XKV_ERROR_EXISTS, "%s exists and is not empty", path);
    if (status == XKV_OK && fchmod(*root, 0700) != 0)
        status = xkv_fail_errno(ctx, "set the permissions of", path, errno);
    if (status != XKV_OK)
        close(*root);
    return status;
}

static xkv_status fill_root(xkv_ctx *ctx, const char *path, int root, const xkv_properties *p)
{
    static const char *const folders[] = {"blobs", "tmp", "quarantine", "index"};
    char *index_path = NULL;
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        if (mkdirat(root, folders[i], 0700) != 0)
            return xkv_fail_errno(ctx, "create the folder", folders[i], errno);
    }
    XKV_TRY(xkv_join_path(ctx, path, "index", &index_path));
    xkv_status status = create_index(ctx, index_path, p->byte_cap);
    xkv_release(ctx, index_path);
    /* Last: from now on it is a store. */
    return status == XKV_OK ? xkv_properties_write(ctx, root, p) : status;
}

xkv_status xkv_store_create(xkv_ctx *ctx, const char *path, const xkv_store_properties *properties)
{
    xkv_store_properties p = xkv_store_properties_default();
    int root = -1;
    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_copy_options(ctx, properties, &p, sizeof p));
    if (p.block_tokens < 1 || p.block_tokens > 65536)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "blocks of %u tokens: 1 to 65536", p.block_tokens);
    xkv_properties stored = {.block_tokens = p.block_tokens, .encrypted = p.key != NULL, .byte_cap = p.byte_cap};
    if (p.key != NULL)
        xkv_seal_id(p.key, stored.key_id);
    XKV_TRY(create_root(ctx, path, &root));
    xkv_status status = fill_root(ctx, path, root, &stored);
    close(root);
    return status;
}

/* --- Folders and the lock ----------------------------------------------------------------------------------------- */

static xkv_status open_folder(xkv_ctx *ctx, int at, const char *name, int *fd)
{
    struct stat st;
    *fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (*fd < 0)
        return xkv_fail_errno(ctx, "open the folder", name, errno);
    if (fstat(*fd, &st) != 0)
        return xkv_fail_errno(ctx, "examine the folder", name, errno);
    if ((st.st_mode & 022) != 0)
        return xkv_fail(ctx, XKV_ERROR_IO, "others can write to the folder %s: mode %o [SO5]", name,
                        (unsigned)(st.st_mode & 0777));
    return XKV_OK;
}

/* Whether the folder of the index has this file, and that it is a file. */
static xkv_status check_index_file(xkv_ctx *ctx, int folder, const char *name, bool *there, uint64_t *size)
{
    struct stat st;
    *there = fstatat(folder, name, &st, AT_SYMLINK_NOFOLLOW) == 0;
    if (*there && !S_ISREG(st.st_mode))
        return xkv_fail(ctx, XKV_ERROR_IO, "index/%s is not a regular file [SO5]", name);
    *size = *there ? (uint64_t)st.st_size : 0;
    return XKV_OK;
}

xkv_status xkv_store_check_index(xkv_ctx *ctx, int root, bool *lock_there)
{
    struct stat st;
    uint64_t size = 0, lock_size;
    bool there;
    int folder = -1;
    *lock_there = false;
    xkv_status status = XKV_OK;
    if (fstatat(root, "index", &st, AT_SYMLINK_NOFOLLOW) == 0 || errno != ENOENT)
        status = open_folder(ctx, root, "index", &folder);
    if (status == XKV_OK && folder >= 0)
        status = check_index_file(ctx, folder, "data.mdb", &there, &size);
    if (status == XKV_OK && folder >= 0)
        status = check_index_file(ctx, folder, "lock.mdb", lock_there, &lock_size);
    if (status == XKV_OK && size == 0)
        status = xkv_fail(ctx, XKV_ERROR_CORRUPT, "the index is missing: repair rebuilds it from the blobs [SO4]");
    if (folder >= 0)
        close(folder);
    return status;
}

/* Whoever is alone may make LMDB's lock file anew, or replace the index; so a store is first locked alone, if that is
 * possible, and then with the others. The folder itself is locked: a file in it could get lost. */
static xkv_status take_lock(xkv_ctx *ctx, xkv_store *store, bool exclusive, bool *alone)
{
    const struct timespec wait = {0, LOCK_WAIT};
    *alone = false;
    for (int attempt = 0; attempt < LOCK_ATTEMPTS; attempt++) {
        if (flock(store->folders.root, LOCK_EX | LOCK_NB) == 0) {
            *alone = true;
            return XKV_OK;
        }
        if (exclusive)
            return xkv_fail(ctx, XKV_ERROR_IO, "%s is in use", store->path);
        if (flock(store->folders.root, LOCK_SH | LOCK_NB) == 0)
            return XKV_OK;
        nanosleep(&wait, NULL); /* somebody is opening or repairing it */
    }
    return xkv_fail(ctx, XKV_ERROR_IO, "%s is locked, perhaps for a repair", store->path);
}

/* With `lost`: whether they are damaged or lost, in a way that a newer program's are not. */
static xkv_status read_properties(xkv_ctx *ctx, xkv_store *store, bool *lost)
{
    xkv_status status = xkv_properties_read(ctx, store->folders.root, &store->properties);
    if (lost == NULL || !xkv_is_damage(status))
        return status;
    *lost = true;
    return XKV_OK;
}

xkv_status xkv_store_open_folders(xkv_ctx *ctx, const char *path, bool exclusive, bool *lost_properties,
                                  xkv_store *store, bool *alone)
{
    struct stat st;
    xkv_folders *f = &store->folders;
    XKV_TRY(open_folder(ctx, AT_FDCWD, path, &f->root));
    if (fstat(f->root, &st) != 0)
        return xkv_fail_errno(ctx, "examine the folder", path, errno);
    store->device = st.st_dev;
    store->inode = st.st_ino;
    XKV_TRY(read_properties(ctx, store, lost_properties));
    XKV_TRY(open_folder(ctx, f->root, "blobs", &f->blobs));
    XKV_TRY(open_folder(ctx, f->root, "tmp", &f->temp));
    XKV_TRY(open_folder(ctx, f->root, "quarantine", &f->quarantine));
    return take_lock(ctx, store, exclusive, alone);
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void xkv_store_close_folders(xkv_store *store)
{
    close_fd(&store->folders.quarantine);
    close_fd(&store->folders.temp);
    close_fd(&store->folders.blobs);
    close_fd(&store->folders.root);
}

xkv_status xkv_store_alloc(xkv_ctx *ctx, const char *path, xkv_store **store_p)
{
    size_t size = strlen(path) + 1;
    xkv_store *store = NULL;
    XKV_TRY(xkv_alloc_zero(ctx, 1, sizeof *store + size, (void **)&store));
    memcpy(store->path, path, size);
    store->folders = (xkv_folders){-1, -1, -1, -1};
    store->pid = getpid();
    store->clock = system_clock;
    *store_p = store;
    return XKV_OK;
}

/* --- Tidying ------------------------------------------------------------------------------------------------------ */

typedef struct tidy {
    xkv_ctx *ctx;
    xkv_store *store;
    uint64_t removed;
} tidy;

static void compare_known(xkv_known_blob *k, uint64_t id, const uint8_t hash[32])
{
    k->taken = k->taken || id == k->id;
    k->found = k->found || (id == k->id && memcmp(hash, k->hash, 32) == 0);
}

static xkv_status find_among_dicts(xkv_txn *txn, xkv_known_blob *k)
{
    xkv_key at = xkv_key_bytes(XKV_TABLE_DICT, NULL, 0), key;
    uint8_t value[XKV_VALUE_MAX];
    for (;;) {
        xkv_dict_record dict;
        xkv_status status = xkv_txn_next(txn, &at, 1, &key, value);
        if (status != XKV_OK)
            return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
        xkv_dict_record_decode(value, &dict);
        compare_known(k, dict.id, dict.blob);
    }
}

xkv_status xkv_find_blob(xkv_txn *txn, void *user)
{
    xkv_known_blob *k = user;
    xkv_item item;
    k->taken = k->found = false;
    xkv_status status = xkv_txn_get_item(txn, k->id, &item);
    if (status == XKV_OK)
        compare_known(k, item.id, item.blob);
    return status == XKV_ERROR_NOT_FOUND ? find_among_dicts(txn, k) : status;
}

/* Whether the index knows the blob of this name. `surely`: in a write transaction, which changes nothing, but comes
 * after every commit; a reader may still see what was before that of a process which was killed as it committed. */
static xkv_status is_known(tidy *t, const char *name, bool surely, xkv_known_blob *k, bool *is_name)
{
    k->found = false;
    *is_name = xkv_blob_name_parse(name, k->hash, &k->id);
    if (!*is_name)
        return XKV_OK;
    xkv_status status = surely && !t->store->read_only ? xkv_index_write(t->ctx, t->store->index, xkv_find_blob, k)
                                                       : xkv_index_read(t->ctx, t->store->index, xkv_find_blob, k);
    if (status != XKV_ERROR_CORRUPT)
        return status;
    k->found = true; /* perhaps: a record that may speak of it is damaged */
    return XKV_OK;
}

/* A temporary file that nobody has locked was left by a killed process. Under a final name it may be linked to the
 * blobs already: with a record in the index it is a blob, and nobody may find it locked; without, neither name may
 * stay. */
static xkv_status tidy_temp(void *user, const char *name)
{
    tidy *t = user;
    const xkv_folders *f = &t->store->folders;
    xkv_known_blob k;
    bool is_name;
    XKV_TRY(is_known(t, name, false, &k, &is_name));
    int fd = openat(f->temp, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return XKV_OK; /* gone, or nothing of ours */
    xkv_status status = XKV_OK;
    if (k.found || flock(fd, LOCK_EX | LOCK_NB) == 0) {
        if (!k.found)
            status = is_known(t, name, true, &k, &is_name);
        xkv_blob_name blob = xkv_blob_name_of(k.hash, k.id);
        if (status == XKV_OK && is_name && !k.found)
            xkv_blob_unlink(f, &blob);
        if (status == XKV_OK && unlinkat(f->temp, name, 0) == 0)
            t->removed++;
    }
    close(fd);
    return status;
}

/* A live writer holds its blob locked until the index knows it. */
xkv_status xkv_store_is_orphan(xkv_ctx *ctx, xkv_store *store, const char *name, bool *orphan)
{
    tidy t = {.ctx = ctx, .store = store};
    xkv_known_blob k;
    bool is_name;
    int fd = -1;
    *orphan = false;
    XKV_TRY(is_known(&t, name, false, &k, &is_name));
    if (!is_name || k.found)
        return XKV_OK;
    xkv_blob_name blob = xkv_blob_name_of(k.hash, k.id);
    bool locked = false;
    XKV_TRY(xkv_blob_try_lock(ctx, &store->folders, &blob, &locked, &fd));
    if (fd < 0)
        return XKV_OK;
    xkv_status status = is_known(&t, name, true, &k, &is_name);
    *orphan = status == XKV_OK && !k.found;
    close(fd);
    return status;
}

typedef struct trash {
    uint64_t after;
    uint64_t id;
    bool damaged; /* the record; then without */
    uint8_t hash[32];
} trash;

static xkv_status next_trash(xkv_txn *txn, void *user)
{
    trash *t = user;
    xkv_key from = xkv_key_id(XKV_TABLE_TRASH, t->after), key = {.size = 0};
    uint8_t value[XKV_VALUE_MAX];
    xkv_status status = xkv_txn_seek(txn, &from, 1, &key, value);
    t->id = xkv_key_u64(&key, 1);
    t->damaged = status == XKV_ERROR_CORRUPT && key.size > 0;
    if (status == XKV_OK)
        memcpy(t->hash, value, sizeof t->hash);
    return t->damaged ? XKV_OK : status;
}

/* Whether the blob is gone and noted, so that its record may go; false: there was no room for the note. */
static bool delete_blob(const tidy *t, const trash *next)
{
    xkv_blob_name name = xkv_blob_name_of(next->hash, next->id);
    bool gone = xkv_blob_unlink(&t->store->folders, &name);
    xkv_pending *p = &t->store->pending;
    pthread_mutex_lock(&t->store->mutex);
    bool full = gone && p->trash_count == XKV_DONE_TRASH;
    if (gone && !full)
        p->trash[p->trash_count++] = next->id;
    pthread_mutex_unlock(&t->store->mutex);
    return !full;
}

/* Blobs whose deletion a killed process has committed and not done. Behind a damaged record the blob stays, as an
 * orphan. */
static xkv_status empty_trash(tidy *t)
{
    trash next = {0};
    while (next.after != UINT64_MAX) {
        xkv_status status = xkv_index_read(t->ctx, t->store->index, next_trash, &next);
        if (status != XKV_OK)
            return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
        bool done = next.damaged || delete_blob(t, &next);
        if (!done)
            XKV_TRY(xkv_store_flush(t->ctx, t->store));
        next.after = next.id + done;
    }
    return XKV_OK;
}

xkv_status xkv_store_tidy(xkv_ctx *ctx, xkv_store *store, uint64_t *leftovers)
{
    tidy t = {.ctx = ctx, .store = store};
    xkv_index_clear_readers(store->index);
    XKV_TRY(xkv_folder_list(ctx, store->folders.temp, tidy_temp, &t));
    XKV_TRY(empty_trash(&t));
    *leftovers = t.removed;
    return XKV_OK;
}

/* --- Opening ------------------------------------------------------------------------------------------------------ */

/* True, with the store in the list, unless its folder is in the list already. Stores that were open before fork() do
 * not count: the child has none of their locks, and cannot use them. */
static bool register_store(xkv_store *store)
{
    bool fresh = true;
    pthread_mutex_lock(&open_mutex);
    for (const xkv_store *s = open_stores; s != NULL; s = s->next)
        fresh = fresh && (s->pid != store->pid || s->device != store->device || s->inode != store->inode);
    if (fresh) {
        store->next = open_stores;
        open_stores = store;
    }
    pthread_mutex_unlock(&open_mutex);
    return fresh;
}

static void unregister_store(const xkv_store *store)
{
    pthread_mutex_lock(&open_mutex);
    for (xkv_store **s = &open_stores; *s != NULL; s = &(*s)->next) {
        if (*s == store) {
            *s = store->next;
            break;
        }
    }
    pthread_mutex_unlock(&open_mutex);
}

static xkv_status open_index(xkv_ctx *ctx, xkv_store *store, const xkv_store_options *o, bool alone)
{
    const xkv_index_options options = {.read_only = store->read_only,
                                       .check = o->trust_index == 0,
                                       .map_size = o->map_size != 0 ? o->map_size : DEFAULT_MAP};
    bool lock_there = false;
    char *path = NULL;
    xkv_meta meta;
    XKV_TRY(xkv_store_check_index(ctx, store->folders.root, &lock_there));
    if (!lock_there && !alone && !store->read_only)
        return xkv_fail(ctx, XKV_ERROR_IO, "index/lock.mdb was removed while the store is in use: close it everywhere");
    XKV_TRY(xkv_join_path(ctx, store->path, "index", &path));
    xkv_status status = xkv_index_open(ctx, path, &options, &store->index);
    xkv_release(ctx, path);
    XKV_TRY(status);
    store->pending.corrupt += xkv_index_damaged(store->index);
    if (xkv_index_damaged(store->index) > 0)
        xkv_logf(ctx, XKV_LOG_WARNING, "%s: %llu records of the index are damaged; repair rebuilds it from the blobs",
                 store->path, (unsigned long long)xkv_index_damaged(store->index));
    return xkv_index_get_meta(ctx, store->index, &meta);
}

static xkv_status open_store(xkv_ctx *ctx, xkv_store *store, const xkv_store_options *o)
{
    bool alone = false;
    uint64_t leftovers = 0;
    XKV_TRY(xkv_store_open_folders(ctx, store->path, false, NULL, store, &alone));
    XKV_TRY(xkv_store_take_key(ctx, store, o->key));
    if (!register_store(store))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "%s is already open in this process", store->path);
    XKV_TRY(open_index(ctx, store, o, alone));
    if (alone && flock(store->folders.root, LOCK_SH | LOCK_NB) != 0)
        return xkv_fail_errno(ctx, "lock", store->path, errno);
    if (store->read_only)
        return XKV_OK;
    XKV_TRY(xkv_store_tidy(ctx, store, &leftovers));
    if (leftovers > 0)
        xkv_logf(ctx, XKV_LOG_INFO, "%s: removed %llu files that a killed process had left", store->path,
                 (unsigned long long)leftovers);
    return XKV_OK;
}

/* Free everything but what is pending. */
static void drop_store(xkv_ctx *ctx, xkv_store *store)
{
    xkv_store_drop_dicts(store);
    xkv_index_close(ctx, store->index);
    unregister_store(store);
    xkv_store_close_folders(store);
    xkv_store_forget_key(store);
    pthread_cond_destroy(&store->dict_loaded);
    pthread_mutex_destroy(&store->mutex);
    xkv_release(ctx, store);
}

static bool on_read_only_file_system(const char *path)
{
    return faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) != 0 && (errno == EROFS || errno == EACCES);
}

xkv_status xkv_store_open(xkv_ctx *ctx, const char *path, const xkv_store_options *options, xkv_store **store_p)
{
    xkv_store_options o = xkv_store_options_default();
    xkv_store *store = NULL;
    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_copy_options(ctx, options, &o, sizeof o));
    if (o.access > XKV_STORE_AUTO)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "access %u", o.access);
    XKV_TRY(xkv_store_alloc(ctx, path, &store));
    if (o.clock != NULL) {
        store->clock = o.clock;
        store->clock_user = o.clock_user;
    }
    store->flushed = xkv_store_now(store);
    store->read_only =
        o.access == XKV_STORE_READ_ONLY || (o.access == XKV_STORE_AUTO && on_read_only_file_system(path));
    xkv_status status = pthread_mutex_init(&store->mutex, NULL) == 0 ? XKV_OK : XKV_ERROR_MEMORY;
    pthread_cond_init(&store->dict_loaded, NULL); /* which never fails here */
    if (status == XKV_OK)
        status = open_store(ctx, store, &o);
    if (status != XKV_OK) {
        drop_store(ctx, store);
        return status;
    }
    *store_p = store;
    return XKV_OK;
}

void xkv_store_close(xkv_ctx *ctx, xkv_store *store)
{
    if (store == NULL)
        return;
    if (store->pid == getpid())
        xkv_remote_detach(store);
    if (store->pid == getpid() && !store->read_only && xkv_store_flush(ctx, store) != XKV_OK)
        xkv_logf(ctx, XKV_LOG_WARNING, "%s: uses and counters were not recorded: %s", store->path, xkv_ctx_error(ctx));
    drop_store(ctx, store);
}
