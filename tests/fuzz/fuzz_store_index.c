/* fuzz_store_index.c - an LMDB file of any content as the index of a store: refused, or usable without a crash, for
 * reading all of it and for writing to it. LMDB trusts its file, so everything depends on the check of its pages. */
#include "index.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum { RECORDS = 60 };

static char folder[64], data_path[80];

static void remove_files(void)
{
    char lock_path[80];
    snprintf(lock_path, sizeof lock_path, "%s/lock.mdb", folder);
    unlink(lock_path);
    unlink(data_path);
    rmdir(folder);
}

static void make_folder(void)
{
    if (folder[0] != '\0')
        return;
    snprintf(folder, sizeof folder, "%s/xkv-fuzz-XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    if (mkdtemp(folder) == NULL)
        abort();
    snprintf(data_path, sizeof data_path, "%s/data.mdb", folder);
    atexit(remove_files);
}

static void write_data(const uint8_t *data, size_t size)
{
    int fd = open(data_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size)
        abort();
    close(fd);
}

/* From the first record to the last, at most as many as a small file can hold. */
static xkv_status read_all(xkv_txn *txn, void *user)
{
    xkv_key from = {.size = 0}, key;
    uint8_t value[XKV_VALUE_MAX];
    (void)user;
    from.bytes[from.size++] = 0;
    for (int i = 0; i < 100000; i++) {
        key.size = 0;
        xkv_status status = xkv_txn_seek(txn, &from, 0, &key, value);
        if (status != XKV_OK && (status != XKV_ERROR_CORRUPT || key.size == 0 || key.size >= XKV_KEY_MAX))
            return status;
        from = key;
        from.bytes[from.size++] = 0;
    }
    abort();
}

/* Enough to split pages, join them again and take pages from the free list. */
static xkv_status write_some(xkv_txn *txn, void *user)
{
    uint8_t value[XKV_ITEM_SIZE] = {0};
    (void)user;
    for (uint64_t i = 0; i < RECORDS; i++) {
        xkv_key key = xkv_key_id(XKV_TABLE_ITEM, i * 0x0123456789abcdefu);
        XKV_TRY(xkv_txn_put(txn, &key, value, sizeof value));
    }
    for (uint64_t i = 0; i < RECORDS; i += 2) {
        xkv_key key = xkv_key_id(XKV_TABLE_ITEM, i * 0x0123456789abcdefu);
        XKV_TRY(xkv_txn_delete(txn, &key));
    }
    for (uint64_t i = 0; i < 20; i++) {
        xkv_key key = xkv_key_id(XKV_TABLE_ITEM, i);
        XKV_TRY(xkv_txn_delete(txn, &key));
    }
    return XKV_OK;
}

static void use(xkv_ctx *ctx, xkv_index *index)
{
    uint64_t used, map;
    (void)!xkv_index_read(ctx, index, read_all, NULL);
    if (xkv_index_write(ctx, index, write_some, NULL) == XKV_OK)
        (void)!xkv_index_write(ctx, index, write_some, NULL);
    (void)!xkv_index_read(ctx, index, read_all, NULL);
    xkv_index_sizes(index, &used, &map);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const xkv_index_options o = {.check = true, .no_sync = true, .map_size = 1u << 22};
    xkv_ctx *ctx = NULL;
    xkv_index *index = NULL;
    make_folder();
    write_data(data, size);
    if (xkv_ctx_create(NULL, &ctx) != XKV_OK)
        abort();
    if (xkv_index_open(ctx, folder, &o, &index) == XKV_OK)
        use(ctx, index);
    xkv_index_close(ctx, index);
    if (xkv_ctx_memory_used(ctx) != 0)
        abort();
    xkv_ctx_free(ctx);
    return 0;
}
