/* dict_cache.c - the dictionaries of a store that are in memory, decoded.
 *
 * Decoding one takes up to a second, and nobody else shall wait for it: it runs without the store's mutex, in a slot
 * that is marked. Threads that want the same dictionary meanwhile wait for it; others do not. */
#include "store_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

enum { WHY = 256 }; /* bytes of a reason */

/* --- Decoding ----------------------------------------------------------------------------------------------------- */

static xkv_status decode_opened(xkv_ctx *own, const xkv_store *store, const xkv_dict_record *record, const int *fd,
                                xkv_dict **dict_p)
{
    xkv_blob b;
    xkv_input raw;
    XKV_TRY(xkv_blob_file(own, fd, &raw));
    XKV_TRY(xkv_blob_check_hash(own, &raw, record->blob));
    XKV_TRY(xkv_blob_read(own, store->key, fd, &b));
    return xkv_dict_open(own, &b.payload, 0, dict_p);
}

/* Check all of the blob, then decode it. */
static xkv_status decode(xkv_ctx *own, const xkv_store *store, const xkv_dict_record *record, xkv_dict **dict_p)
{
    xkv_blob_name name = xkv_blob_name_of(record->blob, record->id);
    int fd = -1;
    xkv_status status = xkv_blob_open(own, &store->folders, &name, true, &fd);
    if (status == XKV_ERROR_NOT_FOUND && faccessat(store->folders.blobs, name.text, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
        return xkv_fail(own, XKV_ERROR_MISMATCH, "it is just being removed");
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(own, status, "its blob is missing");
    XKV_TRY(status);
    status = decode_opened(own, store, record, &fd, dict_p);
    close(fd);
    return status;
}

/* --- Slots: with the store's mutex held --------------------------------------------------------------------------- */

static void empty_slot(xkv_cached_dict *slot)
{
    if (slot->own != NULL)
        xkv_dict_close(slot->own, slot->dict);
    xkv_ctx_free(slot->own);
    memset(slot, 0, sizeof *slot);
}

/* An empty slot, or the one that is unused for longest; NULL: all are in use. */
static xkv_cached_dict *free_slot(xkv_store *store)
{
    xkv_cached_dict *best = NULL;
    for (size_t i = 0; i < XKV_DICT_CACHE; i++) {
        xkv_cached_dict *d = &store->dicts[i];
        if (d->users == 0 && (best == NULL || d->dict == NULL || (best->dict != NULL && d->used < best->used)))
            best = d;
    }
    return best;
}

/* The slot of the dictionary, decoded or about to be; NULL: there is none. */
static xkv_cached_dict *find_slot(xkv_store *store, const uint8_t id[16])
{
    for (size_t i = 0; i < XKV_DICT_CACHE; i++) {
        xkv_cached_dict *d = &store->dicts[i];
        if ((d->loading || d->dict != NULL) && memcmp(d->id, id, 16) == 0)
            return d;
    }
    return NULL;
}

/* Decode into the slot, which nobody else touches meanwhile; the mutex is given up for that. `why` it failed. */
static xkv_status fill_slot(xkv_store *store, const uint8_t id[16], const xkv_dict_record *record,
                            xkv_cached_dict *slot, char why[WHY])
{
    xkv_ctx *own = NULL; /* the dictionary belongs to it, as long as it is in memory */
    xkv_dict *dict = NULL;
    empty_slot(slot);
    memcpy(slot->id, id, 16);
    slot->loading = slot->users = 1;
    pthread_mutex_unlock(&store->mutex);
    xkv_status status = xkv_ctx_create(NULL, &own);
    if (status == XKV_OK)
        status = decode(own, store, record, &dict);
    if (status != XKV_OK)
        snprintf(why, WHY, "%s", own != NULL ? xkv_ctx_error(own) : "out of memory");
    pthread_mutex_lock(&store->mutex);
    slot->own = own;
    slot->dict = dict;
    slot->loading = slot->users = 0;
    if (status != XKV_OK)
        empty_slot(slot);
    pthread_cond_broadcast(&store->dict_loaded);
    return status;
}

static xkv_status load(xkv_store *store, const uint8_t id[16], const xkv_dict_record *record, xkv_cached_dict **slot_p,
                       char why[WHY])
{
    xkv_cached_dict *slot;
    while ((slot = find_slot(store, id)) != NULL && slot->loading)
        pthread_cond_wait(&store->dict_loaded, &store->mutex); /* then it may be another one's, or empty */
    if (slot == NULL) {
        slot = free_slot(store);
        if (slot == NULL) {
            snprintf(why, WHY, "more than %d dictionaries in use at once", XKV_DICT_CACHE);
            return XKV_ERROR_LIMIT;
        }
        XKV_TRY(fill_slot(store, id, record, slot, why));
    }
    slot->users++;
    slot->used = ++store->dict_clock;
    *slot_p = slot;
    return XKV_OK;
}

/* --- Use ---------------------------------------------------------------------------------------------------------- */

xkv_status xkv_store_use_dict(xkv_ctx *ctx, xkv_store *store, const uint8_t id[16], bool look_only,
                              xkv_cached_dict **slot_p)
{
    char why[WHY];
    xkv_dict_record record;
    xkv_status status = xkv_index_get_dict(ctx, store->index, id, &record);
    if (status == XKV_ERROR_NOT_FOUND)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "the dictionary of the entry is not in the store");
    XKV_TRY(status);
    pthread_mutex_lock(&store->mutex);
    status = load(store, id, &record, slot_p, why);
    pthread_mutex_unlock(&store->mutex);
    if (status == XKV_OK)
        return XKV_OK;
    if (status != XKV_ERROR_NOT_FOUND && !xkv_is_damage(status))
        return xkv_fail(ctx, status, "dictionary: %s", why);
    if (!look_only)
        xkv_store_quarantine_dict(ctx, store, id, record.id, why);
    return xkv_fail(ctx, XKV_ERROR_MISMATCH, "the dictionary of the entry is of no use: %s", why);
}

void xkv_store_leave_dict(xkv_store *store, xkv_cached_dict *slot)
{
    if (slot == NULL)
        return;
    pthread_mutex_lock(&store->mutex);
    slot->users--;
    pthread_mutex_unlock(&store->mutex);
}

void xkv_store_drop_dicts(xkv_store *store)
{
    for (size_t i = 0; i < XKV_DICT_CACHE; i++)
        empty_slot(&store->dicts[i]);
}
