/* remote.c - an attached remote: its life, its connections, requests that are tried again, and when it is left alone.
 */
#include "remote.h"

#include "sha256.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#define BACK_OFF_MS  50u
#define MAX_RETRIES  16u
#define MAX_DOUBLING 6u

static const uint8_t pointer_magic[8] = {0x89, 'X', 'K', 'R', '\r', '\n', 0x1a, '\n'};

/* --- Names and index objects -------------------------------------------------------------------------------------- */

static xkv_remote_name name_of(char kind, const uint8_t digest[32])
{
    xkv_remote_name n = {.text = {kind, '/'}};
    xkv_hex(digest, 32, n.text + 2);
    return n;
}

/* Without the key of an encrypted store nobody can tell which prompt a name stands for. */
static xkv_remote_name hashed_name(const xkv_remote *r, char kind, const uint8_t *id, size_t size)
{
    static const char domain[] = "xkv remote 2"; /* with its zero */
    uint8_t digest[32], kind_and_block[5] = {(uint8_t)kind};
    xkv_sha256 h;
    xkv_store32(kind_and_block + 1, kind == 'i' ? r->block_tokens : 0);
    xkv_sha256_begin(&h);
    xkv_sha256_add(&h, domain, sizeof domain);
    xkv_sha256_add(&h, kind_and_block, sizeof kind_and_block);
    xkv_sha256_add(&h, r->key, sizeof r->key);
    xkv_sha256_add(&h, id, size);
    xkv_sha256_end(&h, digest);
    return name_of(kind, digest);
}

xkv_remote_name xkv_remote_index_name(const xkv_remote *r, const uint8_t key[32])
{
    return hashed_name(r, 'i', key, 32);
}

xkv_remote_name xkv_remote_dict_name(const xkv_remote *r, const uint8_t id[16])
{
    return hashed_name(r, 'd', id, 16);
}

xkv_remote_name xkv_remote_blob_name(const uint8_t hash[32])
{
    return name_of('b', hash);
}

void xkv_pointer_encode(const xkv_pointer *p, uint8_t bytes[XKV_POINTER_SIZE])
{
    memset(bytes, 0, XKV_POINTER_SIZE);
    memcpy(bytes, pointer_magic, sizeof pointer_magic);
    xkv_store16(bytes + 8, 1);
    xkv_store16(bytes + 10, 1);
    xkv_store64(bytes + 16, p->size);
    memcpy(bytes + 24, p->hash, 32);
    xkv_store64(bytes + 56, XXH3_64bits(bytes, 56));
}

xkv_status xkv_pointer_decode(xkv_ctx *ctx, const uint8_t *bytes, uint64_t size, xkv_pointer *p)
{
    if (size != XKV_POINTER_SIZE || memcmp(bytes, pointer_magic, sizeof pointer_magic) != 0)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT, "index object: %llu bytes that are none [SR2]",
                        (unsigned long long)size);
    if (xkv_load64(bytes + 56) != XXH3_64bits(bytes, 56))
        return xkv_fail(ctx, XKV_ERROR_CHECKSUM, "index object: the checksum does not match [SR2]");
    if (xkv_load16(bytes + 10) > 1)
        return xkv_fail(ctx, XKV_ERROR_VERSION, "index object: version %u [SR2]", xkv_load16(bytes + 10));
    p->size = xkv_load64(bytes + 16);
    memcpy(p->hash, bytes + 24, 32);
    if (xkv_load16(bytes + 10) == 0 || xkv_load32(bytes + 12) != 0 || p->size < XKV_REMOTE_MIN_BLOB)
        return xkv_fail(ctx, XKV_ERROR_CORRUPT,
                        "index object: version 0, reserved bytes, or a blob of %llu bytes [SR2]",
                        (unsigned long long)p->size);
    return XKV_OK;
}

/* --- The bytes of a request --------------------------------------------------------------------------------------- */

static xkv_status write_all(xkv_ctx *ctx, xkv_request *q, const uint8_t *bytes, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = pwrite(q->fd, bytes + done, size - done, (off_t)(q->size + done));
        if (n > 0) {
            done += (size_t)n;
        } else if (n == 0 || errno != EINTR) {
            q->ours = true;
            return xkv_fail_errno(ctx, "write", "what the remote sends", n == 0 ? ENOSPC : errno);
        }
    }
    return XKV_OK;
}

xkv_status xkv_request_take(xkv_ctx *ctx, xkv_request *q, const void *bytes, size_t size)
{
    if (size > q->limit - q->size)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "the remote's object is larger than %llu bytes [SR4]",
                        (unsigned long long)q->limit);
    if (q->fd >= 0)
        XKV_TRY(write_all(ctx, q, bytes, size));
    else if (size > 0)
        memcpy(q->bytes + q->size, bytes, size);
    q->size += size;
    return XKV_OK;
}

xkv_status xkv_request_give(xkv_ctx *ctx, xkv_request *q, uint64_t offset, void *bytes, size_t size)
{
    xkv_status status = q->from->read(q->from->user, ctx, offset, bytes, size);
    q->ours = status != XKV_OK;
    return status;
}

/* --- Connections -------------------------------------------------------------------------------------------------- */

/* An idle one, or NULL. */
static void *pick_link(xkv_remote *r)
{
    pthread_mutex_lock(&r->mutex);
    void *link = r->link_count > 0 ? r->links[--r->link_count] : NULL;
    pthread_mutex_unlock(&r->mutex);
    return link;
}

static void keep_link(xkv_remote *r, void *link)
{
    pthread_mutex_lock(&r->mutex);
    bool full = r->link_count == XKV_REMOTE_LINKS;
    if (!full)
        r->links[r->link_count++] = link;
    pthread_mutex_unlock(&r->mutex);
    if (full)
        r->backend->disconnect(r->own, link);
}

/* Whether a request ended as it should: the connection is as good as before. */
static bool is_answer(xkv_status status)
{
    return status == XKV_OK || status == XKV_ERROR_NOT_FOUND;
}

/* Writing to a connection that the other side has closed raises SIGPIPE, which would end the program. */
typedef struct pipe_guard {
    sigset_t only, before;
    bool pending;
} pipe_guard;

static void hold_sigpipe(pipe_guard *g)
{
    sigset_t pending;
    sigemptyset(&g->only);
    sigaddset(&g->only, SIGPIPE);
    sigpending(&pending);
    g->pending = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &g->only, &g->before);
}

static void let_sigpipe(const pipe_guard *g)
{
    const struct timespec none = {0, 0};
    if (!g->pending)
        (void)sigtimedwait(&g->only, NULL, &none);
    pthread_sigmask(SIG_SETMASK, &g->before, NULL);
}

static xkv_status run_once(xkv_ctx *ctx, xkv_remote *r, xkv_request *q, uint32_t ms)
{
    const uint64_t start = xkv_remote_now(r);
    void *link = pick_link(r);
    q->size = 0;
    q->ours = q->final = q->denied = false;
    if (link == NULL)
        XKV_TRY(r->backend->connect(ctx, r->own, r->config, ms, &q->final, &link));
    uint64_t spent = xkv_remote_now(r) - start;
    xkv_status status = spent < ms ? r->backend->run(ctx, link, q, ms - (uint32_t)spent)
                                   : xkv_fail(ctx, XKV_ERROR_TIMEOUT, "connecting took %u ms", ms);
    if (is_answer(status))
        keep_link(r, link);
    else
        r->backend->disconnect(r->own, link);
    return status;
}

/* --- Requests ----------------------------------------------------------------------------------------------------- */

uint64_t xkv_remote_now(const xkv_remote *r)
{
    return r->clock(r->user);
}

void xkv_remote_count(xkv_remote *r, uint64_t *counter, uint64_t n)
{
    pthread_mutex_lock(&r->mutex);
    *counter += n;
    pthread_mutex_unlock(&r->mutex);
}

static uint64_t system_clock(void *user)
{
    (void)user;
    return xkv_clock_ms();
}

void xkv_remote_wait(xkv_remote *r, uint32_t ms)
{
    const struct timespec at = xkv_clock_after(ms);
    pthread_cond_timedwait(&r->changed, &r->mutex, &at);
}

static void pause_request(xkv_remote *r, uint32_t ms)
{
    if (r->wait != NULL) {
        r->wait(r->user, ms);
        return;
    }
    const uint64_t until = xkv_remote_now(r) + ms;
    pthread_mutex_lock(&r->mutex);
    for (uint64_t now = xkv_remote_now(r); !r->stop && now < until; now = xkv_remote_now(r))
        xkv_remote_wait(r, (uint32_t)(until - now));
    pthread_mutex_unlock(&r->mutex);
}

bool xkv_remote_is_down(xkv_remote *r)
{
    const uint64_t now = xkv_remote_now(r);
    pthread_mutex_lock(&r->mutex);
    bool down = r->failures > 0 && now < r->down_until;
    pthread_mutex_unlock(&r->mutex);
    return down;
}

/* Whether the remote may be asked. When it has been left alone long enough, one request may, and the others once that
 * one has succeeded. */
static bool may_ask(xkv_remote *r)
{
    const uint64_t now = xkv_remote_now(r);
    pthread_mutex_lock(&r->mutex);
    bool may = r->failures == 0 || now >= r->down_until;
    if (may && r->failures > 0)
        r->down_until = now + r->o.pause_ms;
    pthread_mutex_unlock(&r->mutex);
    return may;
}

/* Note the outcome; the first failure in a row is logged, and the success after it. */
static void settle(xkv_ctx *ctx, xkv_remote *r, const xkv_request *q, xkv_status status)
{
    const bool failed = (status == XKV_ERROR_IO || status == XKV_ERROR_TIMEOUT) && !q->ours;
    pthread_mutex_lock(&r->mutex);
    const uint32_t before = r->failures;
    const bool first_denied = q->denied && !r->denied;
    r->denied = r->denied || q->denied;
    if (failed) {
        r->failures = before == UINT32_MAX ? before : before + 1;
        r->down_until =
            xkv_remote_now(r) + ((uint64_t)r->o.pause_ms << (before < MAX_DOUBLING ? before : MAX_DOUBLING));
    } else if (is_answer(status)) {
        r->failures = 0;
    }
    r->stats.errors += failed;
    r->stats.bytes_in += q->kind == XKV_REQUEST_GET && status == XKV_OK ? q->size : 0;
    r->stats.bytes_out += q->kind == XKV_REQUEST_PUT && status == XKV_OK ? q->from->size : 0;
    pthread_mutex_unlock(&r->mutex);
    if (first_denied)
        xkv_logf(ctx, XKV_LOG_WARNING,
                 "the remote denies access to %s, which counts as not there: it tells only who may list the bucket",
                 q->name);
    if (failed && before == 0)
        xkv_logf(ctx, XKV_LOG_WARNING, "the remote failed and is left alone for a while: %s", xkv_ctx_error(ctx));
    else if (is_answer(status) && before > 0)
        xkv_logf(ctx, XKV_LOG_INFO, "the remote answers again");
}

/* Whether another attempt makes sense, and may wait `ms` for it. */
static bool is_worth_retrying(const xkv_remote *r, const xkv_request *q, xkv_status status, uint32_t attempt,
                              uint64_t deadline, uint32_t *ms)
{
    *ms = BACK_OFF_MS << attempt;
    return (status == XKV_ERROR_IO || status == XKV_ERROR_TIMEOUT) && !q->ours && !q->final && attempt < r->o.retries &&
           xkv_remote_now(r) + *ms < deadline;
}

static xkv_status run_until(xkv_ctx *ctx, xkv_remote *r, xkv_request *q, uint64_t deadline)
{
    for (uint32_t attempt = 0;; attempt++) {
        const uint64_t now = xkv_remote_now(r);
        uint32_t ms;
        if (now >= deadline)
            return xkv_fail(ctx, XKV_ERROR_TIMEOUT, "the remote has had its time");
        xkv_status status = run_once(ctx, r, q, (uint32_t)(deadline - now));
        if (xkv_check_cancel(ctx) != XKV_OK)
            return is_answer(status) ? status : XKV_ERROR_CANCELLED;
        if (!is_worth_retrying(r, q, status, attempt, deadline, &ms))
            return status;
        xkv_remote_count(r, &r->stats.retries, 1);
        pause_request(r, ms);
    }
}

xkv_status xkv_remote_run(xkv_ctx *ctx, xkv_remote *r, xkv_request *q, uint64_t deadline)
{
    pipe_guard guard;
    if (!may_ask(r))
        return xkv_fail(ctx, XKV_ERROR_IO, "the remote failed and is left alone for a while");
    xkv_ctx_begin(ctx);
    hold_sigpipe(&guard);
    xkv_status status = run_until(ctx, r, q, deadline);
    let_sigpipe(&guard);
    settle(ctx, r, q, status);
    return status;
}

/* --- Life --------------------------------------------------------------------------------------------------------- */

static void free_remote(xkv_remote *r)
{
    xkv_ctx *own = r->own;
    while (r->link_count > 0)
        r->backend->disconnect(own, r->links[--r->link_count]);
    r->backend->free_config(own, r->config);
    explicit_bzero(r->key, sizeof r->key);
    pthread_mutex_destroy(&r->push_mutex);
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->mutex);
    xkv_release(own, r);
    xkv_ctx_free(own);
}

static void init_locks(xkv_remote *r)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->mutex, NULL);
    pthread_mutex_init(&r->push_mutex, NULL);
    pthread_cond_init(&r->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

static xkv_status check_options(xkv_ctx *ctx, const xkv_store *store, const xkv_remote_options *o)
{
    if (store->read_only)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the store is open read-only: what a remote has cannot be stored");
    if (store->remote != NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the store has a remote already");
    if (o->lookup_ms == 0 || o->send_ms == 0 || o->pause_ms == 0 || o->object_bytes == 0 || o->retries > MAX_RETRIES)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "remote: times and sizes are not 0, retries at most %u", MAX_RETRIES);
    return XKV_OK;
}

/* The rest of an attached remote, whose back end is known. */
static xkv_status complete(xkv_ctx *ctx, xkv_store *store, const xkv_remote *draft)
{
    xkv_remote *r = NULL;
    xkv_status status = XKV_NEW_ZERO(draft->own, 1, &r);
    if (status != XKV_OK) {
        draft->backend->free_config(draft->own, draft->config);
        xkv_ctx_free(draft->own);
        return xkv_fail(ctx, status, "no memory for a remote");
    }
    *r = *draft;
    if (r->clock == NULL)
        r->clock = system_clock;
    if (store->key != NULL)
        memcpy(r->key, store->key, sizeof r->key);
    r->block_tokens = store->properties.block_tokens;
    init_locks(r);
    store->remote = r;
    status = r->o.manual ? XKV_OK : xkv_sender_start(ctx, store);
    if (status != XKV_OK)
        xkv_remote_detach(store);
    return status;
}

static xkv_status configure(xkv_ctx *ctx, xkv_remote *draft)
{
    const char *url = draft->o.url;
    if (url == NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "remote: no URL");
    if (strncmp(url, "s3://", 5) == 0)
        return xkv_s3_configure(ctx, draft->own, url + 5, &draft->backend, &draft->config);
    if (strncmp(url, "redis://", 8) == 0)
        return xkv_redis_configure(ctx, draft->own, url + 8, &draft->backend, &draft->config);
    if (strncmp(url, "rediss://", 9) == 0)
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED,
                        "rediss:// (TLS) is not supported: use a tunnel, or s3:// over https");
    return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "remote: the URL begins with neither s3:// nor redis://");
}

xkv_status xkv_remote_attach(xkv_ctx *ctx, xkv_store *store, const xkv_remote_options *options, const xkv_remote *given)
{
    xkv_remote draft = {.o = xkv_remote_options_default()};
    if (given != NULL) {
        draft = *given;
        draft.o = xkv_remote_options_default();
    }
    XKV_TRY(xkv_copy_options(ctx, options, &draft.o, sizeof draft.o));
    XKV_TRY(check_options(ctx, store, &draft.o));
    xkv_status status = xkv_ctx_create(draft.o.context, &draft.own);
    if (status != XKV_OK)
        return xkv_fail(ctx, status, "the context of the remote: %s", xkv_status_string(status));
    if (draft.backend == NULL)
        status = configure(ctx, &draft);
    if (status == XKV_OK)
        return complete(ctx, store, &draft);
    xkv_ctx_free(draft.own);
    return status;
}

xkv_status xkv_store_attach_remote(xkv_ctx *ctx, xkv_store *store, const xkv_remote_options *options)
{
    XKV_TRY(xkv_store_begin(ctx, store));
    return xkv_remote_attach(ctx, store, options, NULL);
}

void xkv_remote_detach(xkv_store *store)
{
    if (store->remote == NULL)
        return;
    xkv_sender_stop(store->remote);
    free_remote(store->remote);
    store->remote = NULL;
}
