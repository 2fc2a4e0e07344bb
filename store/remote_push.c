/* remote_push.c - what is put is sent to the remote afterwards: the queue in the index, and the thread that empties it.
 */
#include "remote.h"

#include <signal.h>
#include <stdio.h>
#include <sys/file.h>
#include <unistd.h>

/* Sending what waits, once. */
typedef struct push {
    xkv_ctx *ctx;
    xkv_store *store;
    xkv_remote *remote;
    xkv_push_report report;
    uint64_t deadline; /* of the entry at hand */
} push;

/* --- The queue ---------------------------------------------------------------------------------------------------- */

xkv_status xkv_remote_queue(xkv_txn *txn, const xkv_store *store, const xkv_item *item)
{
    xkv_key key = xkv_key_id(XKV_TABLE_UNSENT, item->id);
    return store->remote == NULL ? XKV_OK : xkv_txn_put_mark(txn, &key);
}

/* The first id in the queue from `after` on, and its entry. */
typedef struct queued {
    uint64_t after, id;
    xkv_item line[XKV_LINE_MAX]; /* [count] the entry, the one that it extends, and so on */
    uint32_t count;              /* 0: it, or one that it extends, is not there */
} queued;

/* The entry of this id, and those that it extends. */
static xkv_status find_line(xkv_txn *txn, queued *q)
{
    uint64_t id = q->id;
    uint32_t count = 0;
    q->count = 0;
    do {
        XKV_TRY(xkv_txn_get_item(txn, id, &q->line[count]));
        id = q->line[count++].parent;
    } while (id != 0 && count < XKV_LINE_MAX);
    q->count = id == 0 ? count : 0; /* a longer one cannot be read either [SE3] */
    return XKV_OK;
}

static xkv_status find_queued(xkv_txn *txn, void *user)
{
    queued *q = user;
    xkv_key at = xkv_key_id(XKV_TABLE_UNSENT, q->after), key;
    xkv_status status = xkv_txn_next(txn, &at, 1, &key, NULL);
    if (status != XKV_OK && !(xkv_is_damaged_record(status, &key) && key.size == 9))
        return status; /* a damaged one holds nothing but its key */
    q->id = xkv_key_u64(&key, 1);
    status = find_line(txn, q);
    return status == XKV_ERROR_NOT_FOUND || xkv_is_damage(status) ? XKV_OK : status;
}

static xkv_status unqueue_body(xkv_txn *txn, void *user)
{
    xkv_key key = xkv_key_id(XKV_TABLE_UNSENT, *(const uint64_t *)user);
    return xkv_txn_delete(txn, &key);
}

static xkv_status count_queued(xkv_txn *txn, void *user)
{
    xkv_key at = xkv_key_bytes(XKV_TABLE_UNSENT, NULL, 0), key;
    for (uint64_t *count = user;; ++*count) {
        xkv_status status = xkv_txn_next(txn, &at, 1, &key, NULL);
        if (status != XKV_OK && !xkv_is_damaged_record(status, &key))
            return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
    }
}

/* --- One entry ---------------------------------------------------------------------------------------------------- */

static xkv_status put_object(push *p, const char *name, const xkv_input *from)
{
    xkv_request q = {.kind = XKV_REQUEST_PUT, .name = name, .fd = -1, .from = from};
    return xkv_remote_run(p->ctx, p->remote, &q, p->deadline);
}

/* Whether the remote has an object of the name. */
static xkv_status is_there(push *p, const char *name, uint64_t *size)
{
    xkv_request q = {.kind = XKV_REQUEST_SIZE, .name = name, .fd = -1};
    xkv_status status = xkv_remote_run(p->ctx, p->remote, &q, p->deadline);
    *size = status == XKV_OK ? q.size : 0;
    return status == XKV_ERROR_NOT_FOUND ? XKV_OK : status;
}

/* A blob of the store as it lies there, if it is what it should be. */
static xkv_status put_blob(push *p, const char *name, const uint8_t hash[32], const int *fd)
{
    xkv_input file;
    XKV_TRY(xkv_blob_file(p->ctx, fd, &file));
    XKV_TRY(xkv_blob_check_hash(p->ctx, &file, hash));
    return put_object(p, name, &file);
}

/* The dictionary of an entry, unless the remote has it. */
static xkv_status push_dict(push *p, const xkv_item *item)
{
    xkv_dict_record record;
    uint64_t size = 0;
    int fd = -1;
    if (!xkv_item_needs_dict(item))
        return XKV_OK;
    xkv_remote_name name = xkv_remote_dict_name(p->remote, item->dict);
    XKV_TRY(is_there(p, name.text, &size));
    if (size > 0)
        return XKV_OK;
    xkv_status status = xkv_index_get_dict(p->ctx, p->store->index, item->dict, &record);
    if (status == XKV_OK) {
        xkv_blob_name blob = xkv_blob_name_of(record.blob, record.id);
        status = xkv_blob_open(p->ctx, &p->store->folders, &blob, true, &fd);
    }
    if (status == XKV_OK)
        status = put_blob(p, name.text, record.blob, &fd);
    if (fd >= 0)
        close(fd);
    return status;
}

/* Index objects, from the shortest run of blocks to the longest, so that whoever finds one finds all before it. Those
 * of the blocks that it takes from another entry are that one's. */
static xkv_status put_pointers(push *p, const xkv_item *item, const xkv_page_key *keys, uint32_t count)
{
    xkv_pointer pointer = {.size = item->file_size};
    uint8_t bytes[XKV_POINTER_SIZE];
    const xkv_input object = xkv_input_from_memory(bytes, sizeof bytes);
    memcpy(pointer.hash, item->blob, 32);
    xkv_pointer_encode(&pointer, bytes);
    for (uint32_t i = item->base_tokens / p->remote->block_tokens; i < count; i++) {
        xkv_remote_name name = xkv_remote_index_name(p->remote, keys[i].key);
        XKV_TRY(put_object(p, name.text, &object));
    }
    return XKV_OK;
}

/* The keys of an entry's blocks, [*count], from the symbols in its blob. */
static xkv_status read_keys(push *p, const xkv_item *item, xkv_page_key **keys, uint32_t *count)
{
    xkv_namespace ns;
    uint32_t *list = NULL;
    XKV_TRY(xkv_line_read_symbols(p->ctx, p->store, item, &list));
    const xkv_symbols symbols = {.data = list, .count = item->symbols, .tokens = item->tokens};
    *count = (uint32_t)xkv_ceil_div(item->tokens, p->remote->block_tokens);
    xkv_status status = XKV_NEW(p->ctx, *count, keys);
    memcpy(ns.id, item->space, 32);
    if (status == XKV_OK)
        xkv_chain_keys(&ns, &symbols, p->remote->block_tokens, *keys);
    xkv_release(p->ctx, list);
    return status;
}

/* Whether the remote has the index objects of an entry: the last one is written last. */
static xkv_status has_pointers(push *p, const xkv_item *item, bool *have)
{
    xkv_page_key *keys = NULL;
    uint32_t count;
    uint64_t size;
    XKV_TRY(read_keys(p, item, &keys, &count));
    xkv_status status = is_there(p, xkv_remote_index_name(p->remote, keys[count - 1].key).text, &size);
    xkv_release(p->ctx, keys);
    *have = size > 0;
    return status;
}

/* Blobs below an id are sent though the remote seems to have them: perhaps they are damaged there. Once, or an entry
 * that always fails would send its blob each time. */
static void resend_below(xkv_remote *r, uint64_t id)
{
    if (r == NULL)
        return;
    pthread_mutex_lock(&r->mutex);
    r->resend_from = 0;
    r->resend_below = id;
    pthread_mutex_unlock(&r->mutex);
}

static void note_sent(xkv_remote *r, uint64_t id)
{
    pthread_mutex_lock(&r->mutex);
    r->resend_from = xkv_max64(r->resend_from, id + 1);
    pthread_mutex_unlock(&r->mutex);
}

/* All objects of an entry but its blob, which is there by the end, too. */
static xkv_status push_opened(push *p, const xkv_item *item, const int *fd, bool have_blob)
{
    xkv_remote_name name = xkv_remote_blob_name(item->blob);
    xkv_page_key *keys = NULL;
    uint32_t count;
    XKV_TRY(read_keys(p, item, &keys, &count));
    xkv_status status = push_dict(p, item);
    if (status == XKV_OK && !have_blob)
        status = put_blob(p, name.text, item->blob, fd);
    if (status == XKV_OK && !have_blob)
        note_sent(p->remote, item->id);
    if (status == XKV_OK)
        status = put_pointers(p, item, keys, count);
    xkv_release(p->ctx, keys);
    return status;
}

/* Whether the blob need not be sent: a try that failed later has sent it, or the entry was sent for one that extends
 * it. Who sends all once more means it. */
static xkv_status has_blob(push *p, const xkv_item *item, bool *have)
{
    xkv_remote *r = p->remote;
    uint64_t size = 0;
    *have = false;
    pthread_mutex_lock(&r->mutex);
    bool again = item->id >= r->resend_from && item->id < r->resend_below;
    pthread_mutex_unlock(&r->mutex);
    if (again)
        return XKV_OK;
    XKV_TRY(is_there(p, xkv_remote_blob_name(item->blob).text, &size));
    *have = size == item->file_size;
    return XKV_OK;
}

/* An entry, `extended` by the one that is sent or this itself. */
static xkv_status push_item(push *p, const xkv_item *item, bool extended)
{
    bool have, complete = false;
    int fd = -1;
    p->deadline = xkv_remote_now(p->remote) + p->remote->o.send_ms;
    xkv_blob_name name = xkv_blob_name_of(item->blob, item->id);
    XKV_TRY(has_blob(p, item, &have));
    if (have && extended)
        XKV_TRY(has_pointers(p, item, &complete));
    if (complete)
        return XKV_OK;
    XKV_TRY(xkv_blob_open(p->ctx, &p->store->folders, &name, true, &fd));
    xkv_status status = push_opened(p, item, &fd, have);
    close(fd);
    return status;
}

static bool is_to_be_sent(const push *p, const queued *q)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < q->count; i++)
        bytes += q->line[i].file_size;
    return q->count > 0 && bytes <= p->remote->o.object_bytes &&
           !xkv_is_expired(q->line[0].expires, xkv_store_now(p->store));
}

/* What it extends comes first. NOT_FOUND: there is nothing to send any more. */
static xkv_status push_entry(push *p, const queued *q)
{
    if (!is_to_be_sent(p, q))
        return XKV_ERROR_NOT_FOUND;
    for (uint32_t i = q->count; i-- > 0;)
        XKV_TRY(push_item(p, &q->line[i], i > 0));
    return XKV_OK;
}

/* --- All of them -------------------------------------------------------------------------------------------------- */

/* Send the first one that waits; NOT_FOUND when none does. */
static xkv_status push_next(push *p, queued *q)
{
    XKV_TRY(xkv_index_read(p->ctx, p->store->index, find_queued, q));
    xkv_status status = push_entry(p, q);
    bool drop = status == XKV_ERROR_NOT_FOUND || xkv_is_damage(status) || xkv_is_newer(status);
    if (xkv_is_damage(status))
        xkv_logf(p->ctx, XKV_LOG_WARNING, "%s: entry %llu is not sent: %s", p->store->path, (unsigned long long)q->id,
                 xkv_ctx_error(p->ctx));
    if (status != XKV_OK && !drop)
        return status;
    XKV_TRY(xkv_index_write(p->ctx, p->store->index, unqueue_body, &q->id));
    p->report.sent += !drop;
    p->report.dropped += drop;
    xkv_remote_count(p->remote, drop ? &p->remote->stats.dropped : &p->remote->stats.sent, 1);
    return XKV_OK;
}

/* Send from an id on to the last one. Behind one that fails the next round goes on, so that it does not keep others. */
static xkv_status push_from(push *p, uint64_t after)
{
    queued q = {.after = after};
    xkv_status status;
    do
        status = push_next(p, &q);
    while (status == XKV_OK);
    if (status == XKV_ERROR_NOT_FOUND)
        return XKV_OK;
    p->remote->push_after = q.id + 1;
    return status;
}

/* One process at a time sends; the others' entries are in the same queue. */
static xkv_status push_locked(push *p)
{
    const uint64_t after = p->remote->push_after;
    if (flock(p->store->folders.temp, LOCK_EX | LOCK_NB) != 0)
        return xkv_fail(p->ctx, XKV_ERROR_IO, "another process is sending");
    p->remote->push_after = 0;
    xkv_status status = push_from(p, after);
    if (status == XKV_OK && after > 0)
        status = push_from(p, 0);
    (void)flock(p->store->folders.temp, LOCK_UN);
    return status;
}

static xkv_status push_all(push *p)
{
    pthread_mutex_lock(&p->remote->push_mutex);
    xkv_status status = push_locked(p);
    pthread_mutex_unlock(&p->remote->push_mutex);
    return status;
}

xkv_status xkv_store_push(xkv_ctx *ctx, xkv_store *store, xkv_push_report *report)
{
    push p = {.ctx = ctx, .store = store, .remote = store->remote};
    XKV_TRY(xkv_store_begin(ctx, store));
    if (store->remote == NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the store has no remote");
    xkv_status status = push_all(&p);
    if (status != XKV_OK && status != XKV_ERROR_IO && status != XKV_ERROR_TIMEOUT)
        return status;
    if (status != XKV_OK)
        snprintf(p.report.why, sizeof p.report.why, "%s", xkv_ctx_error(ctx));
    XKV_TRY(xkv_index_read(ctx, store->index, count_queued, &p.report.waiting));
    if (report != NULL)
        *report = p.report;
    return XKV_OK;
}

/* --- Everything of a namespace ------------------------------------------------------------------------------------ */

typedef struct queue_all {
    const xkv_namespace *ns;
    uint64_t after, next; /* ids that this batch begins with, and the next one */
    bool done;
} queue_all;

/* A batch of them, in a transaction of its own. */
static xkv_status queue_some(xkv_txn *txn, void *user)
{
    queue_all *q = user;
    uint8_t value[XKV_VALUE_MAX];
    xkv_key at = xkv_key_id(XKV_TABLE_ITEM, q->after), key;
    q->next = q->after;
    for (uint32_t i = 0; i < XKV_BATCH; i++) {
        xkv_item item;
        xkv_status status = xkv_txn_next(txn, &at, 1, &key, value);
        q->done = status == XKV_ERROR_NOT_FOUND;
        if (q->done)
            return XKV_OK;
        XKV_TRY(status);
        xkv_item_decode(value, &item);
        xkv_key mark = xkv_key_id(XKV_TABLE_UNSENT, item.id);
        if (memcmp(item.space, q->ns->id, 32) == 0)
            XKV_TRY(xkv_txn_put_mark(txn, &mark));
        q->next = xkv_key_u64(&key, 1) + 1;
    }
    return XKV_OK;
}

xkv_status xkv_store_queue_all(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns)
{
    queue_all q = {.ns = ns};
    XKV_TRY(xkv_store_begin_change(ctx, store));
    while (!q.done) {
        XKV_TRY(xkv_index_write(ctx, store->index, queue_some, &q));
        XKV_TRY(xkv_check_cancel(ctx));
        q.after = q.next;
    }
    resend_below(store->remote, q.next);
    xkv_remote_wake(store);
    return XKV_OK;
}

/* --- Counters ----------------------------------------------------------------------------------------------------- */

xkv_status xkv_store_get_remote_stats(xkv_ctx *ctx, xkv_store *store, xkv_remote_stats *stats)
{
    xkv_remote *r = store->remote;
    uint64_t waiting = 0;
    XKV_TRY(xkv_store_begin(ctx, store));
    if (r == NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the store has no remote");
    XKV_TRY(xkv_index_read(ctx, store->index, count_queued, &waiting));
    pthread_mutex_lock(&r->mutex);
    *stats = r->stats;
    pthread_mutex_unlock(&r->mutex);
    stats->waiting = waiting;
    return XKV_OK;
}

/* --- The thread --------------------------------------------------------------------------------------------------- */

void xkv_remote_wake(const xkv_store *store)
{
    xkv_remote *r = store->remote;
    if (r == NULL)
        return;
    pthread_mutex_lock(&r->mutex);
    r->work = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->mutex);
}

/* Wait for something to send; after a failure, for the time of another try. False: stop. */
static bool wait_for_work(xkv_remote *r, bool failed)
{
    pthread_mutex_lock(&r->mutex);
    if (failed && !r->stop)
        xkv_remote_wait(r, r->o.pause_ms);
    while (!failed && !r->work && !r->stop)
        pthread_cond_wait(&r->changed, &r->mutex);
    r->work = false;
    bool go_on = !r->stop;
    pthread_mutex_unlock(&r->mutex);
    return go_on;
}

static void *sender_main(void *user)
{
    xkv_store *store = user;
    xkv_remote *r = store->remote;
    bool failed;
    do {
        push p = {.ctx = r->sender, .store = store, .remote = r};
        xkv_ctx_begin(r->sender);
        failed = xkv_remote_is_down(r) || push_all(&p) != XKV_OK;
    } while (wait_for_work(r, failed));
    return NULL;
}

/* It takes no signals, which are the business of the program's threads. */
xkv_status xkv_sender_start(xkv_ctx *ctx, xkv_store *store)
{
    xkv_remote *r = store->remote;
    sigset_t all, before;
    xkv_status status = xkv_ctx_create(r->o.context, &r->sender);
    if (status != XKV_OK)
        return xkv_fail(ctx, status, "the context of the thread that sends: %s", xkv_status_string(status));
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = pthread_create(&r->thread, NULL, sender_main, store) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started)
        return XKV_OK;
    xkv_ctx_free(r->sender);
    r->sender = NULL;
    return xkv_fail(ctx, XKV_ERROR_LIMIT, "the thread that sends could not be started");
}

void xkv_sender_stop(xkv_remote *r)
{
    pthread_mutex_lock(&r->mutex);
    r->stop = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->mutex);
    if (r->sender == NULL)
        return;
    xkv_ctx_cancel(r->sender);
    pthread_join(r->thread, NULL);
    xkv_ctx_free(r->sender);
    r->sender = NULL;
}
