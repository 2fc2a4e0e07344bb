/* hasher.c - the hash that names a blob, taken while the blob is written. */
#include "hasher.h"

#include "kernels.h"
#include "sha256.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#define FOLLOW_FROM  ((uint64_t)4 * XKV_HASH_PIECE) /* smaller files are not worth a thread */
#define RUN_PIECES   64u
#define MOST_THREADS 8u /* memory gives no more */

typedef enum piece_state {
    PIECE_OPEN,    /* to be hashed */
    PIECE_TAKEN,   /* a thread hashes it, */
    PIECE_SPOILED, /* and it was written again meanwhile */
    PIECE_DONE
} piece_state;

typedef struct piece {
    uint8_t digest[32];
    piece_state state;
} piece;

struct xkv_hasher {
    int fd;
    uint8_t *blocks[2]; /* [XKV_HASH_PIECE] of the writer and of the follower */
    pthread_t thread;
    bool tried, started; /* to start the thread */

    pthread_mutex_t mutex; /* of all below; `pieces` is replaced by the writer alone */
    pthread_cond_t changed;
    piece *pieces;
    uint64_t count, capacity; /* pieces of which something was written */
    uint64_t end;             /* of what was written */
    uint64_t next;            /* the first piece that may be open */
    uint32_t busy;            /* threads that hash */
    bool complete, stop;
};

/* --- The hash ----------------------------------------------------------------------------------------------------- */

static void hash_piece(const uint8_t *bytes, size_t size, uint8_t digest[32])
{
    xkv_sha256 h;
    xkv_sha256_begin(&h);
    xkv_sha256_add(&h, bytes, size);
    xkv_sha256_end(&h, digest);
}

/* A whole input, some pieces at a time. */
typedef struct input_hash {
    xkv_ctx *ctx;
    const xkv_input *file;
    uint64_t first;                  /* piece of this run */
    uint8_t *blocks;                 /* XKV_HASH_PIECE bytes for each worker */
    uint8_t digests[RUN_PIECES][32]; /* of the run */
} input_hash;

static xkv_status hash_task(void *user, uint32_t worker, uint64_t index)
{
    input_hash *j = user;
    const uint64_t offset = (j->first + index) * XKV_HASH_PIECE;
    const size_t size = (size_t)xkv_min64(j->file->size - offset, XKV_HASH_PIECE);
    uint8_t *block = j->blocks + (size_t)worker * XKV_HASH_PIECE;
    XKV_TRY(j->file->read(j->file->user, j->ctx, offset, block, size));
    hash_piece(block, size, j->digests[index]);
    return XKV_OK;
}

static xkv_status hash_runs(input_hash *j, xkv_pool *pool, uint8_t hash[32])
{
    const uint64_t count = xkv_ceil_div(j->file->size, XKV_HASH_PIECE);
    xkv_sha256 h;
    xkv_sha256_begin(&h);
    for (; j->first < count; j->first += RUN_PIECES) {
        uint64_t n = xkv_min64(count - j->first, RUN_PIECES);
        XKV_TRY(xkv_pool_run(j->ctx, pool, n, hash_task, j));
        xkv_sha256_add(&h, j->digests, 32 * n);
    }
    xkv_sha256_end(&h, hash);
    return XKV_OK;
}

xkv_status xkv_hash_input(xkv_ctx *ctx, const xkv_input *file, uint8_t hash[32])
{
    input_hash j = {.ctx = ctx, .file = file};
    xkv_pool *pool = NULL;
    xkv_status status = XKV_OK;
    if (file->size >= FOLLOW_FROM && xkv_ctx_threads(ctx) > 1)
        XKV_TRY(xkv_pool_create(ctx, (uint32_t)xkv_min64(xkv_ctx_threads(ctx), MOST_THREADS), &pool));
    XKV_TRY_GOTO(XKV_NEW(ctx, (size_t)xkv_pool_threads(pool) * XKV_HASH_PIECE, &j.blocks), out);
    status = hash_runs(&j, pool, hash);
out:
    xkv_release(ctx, j.blocks);
    xkv_pool_free(ctx, pool);
    return status;
}

/* --- Pieces (with the mutex held) --------------------------------------------------------------------------------- */

/* The next piece to hash, if there is one now. The first one, which holds the head, is written last. */
static bool take(xkv_hasher *h, uint64_t *number)
{
    const uint64_t most = h->complete ? h->count : h->end / XKV_HASH_PIECE;
    while (h->next < most && h->pieces[h->next].state != PIECE_OPEN)
        h->next++;
    if (h->next >= most)
        return false;
    *number = h->next++;
    h->pieces[*number].state = PIECE_TAKEN;
    h->busy++;
    return true;
}

/* Errno of reading a part of the file; 0: it was read. */
static int read_part(int fd, uint64_t offset, uint8_t *dst, size_t size)
{
    while (size > 0) {
        ssize_t n = pread(fd, dst, size, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? errno : EIO;
        dst += n;
        offset += (uint64_t)n;
        size -= (size_t)n;
    }
    return 0;
}

/* Hash a piece that was taken; the mutex is not held meanwhile. Errno. */
static int hash_taken(xkv_hasher *h, uint64_t number, uint8_t *block)
{
    const uint64_t offset = number * XKV_HASH_PIECE;
    const size_t size = (size_t)xkv_min64(h->end - offset, XKV_HASH_PIECE);
    uint8_t digest[32];
    pthread_mutex_unlock(&h->mutex);
    int error = read_part(h->fd, offset, block, size);
    if (error == 0)
        hash_piece(block, size, digest);
    pthread_mutex_lock(&h->mutex);
    piece *p = &h->pieces[number];
    bool good = error == 0 && p->state == PIECE_TAKEN;
    if (good)
        memcpy(p->digest, digest, sizeof digest);
    p->state = good ? PIECE_DONE : PIECE_OPEN;
    if (!good && h->complete)
        h->next = xkv_min64(h->next, number);
    h->busy--;
    pthread_cond_broadcast(&h->changed);
    return error;
}

/* --- The thread that follows -------------------------------------------------------------------------------------- */

/* Until it is stopped, or cannot read: the writer does what is left, and sees the error. */
static void *follow(void *user)
{
    xkv_hasher *h = user;
    uint64_t number;
    int error = 0;
    pthread_mutex_lock(&h->mutex);
    while (error == 0 && !h->stop) {
        if (!take(h, &number)) {
            pthread_cond_wait(&h->changed, &h->mutex);
            continue;
        }
        error = hash_taken(h, number, h->blocks[1]);
        pthread_mutex_unlock(&h->mutex);
        (void)sync_file_range(h->fd, (off_t)(number * XKV_HASH_PIECE), XKV_HASH_PIECE, SYNC_FILE_RANGE_WRITE);
        pthread_mutex_lock(&h->mutex);
    }
    pthread_mutex_unlock(&h->mutex);
    return NULL;
}

/* It takes no signals, which are the business of the program's threads. Without it the writer hashes all at the end. */
static void start_following(xkv_ctx *ctx, xkv_hasher *h)
{
    sigset_t all, before;
    h->tried = true;
    if (xkv_ctx_threads(ctx) < 2 || XKV_NEW(ctx, XKV_HASH_PIECE, &h->blocks[1]) != XKV_OK)
        return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    h->started = pthread_create(&h->thread, NULL, follow, h) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* --- The thread that writes --------------------------------------------------------------------------------------- */

xkv_status xkv_hasher_create(xkv_ctx *ctx, int fd, xkv_hasher **hasher_p)
{
    xkv_hasher *h = NULL;
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &h));
    h->fd = fd;
    h->next = 1;
    pthread_mutex_init(&h->mutex, NULL);
    pthread_cond_init(&h->changed, NULL);
    *hasher_p = h;
    return XKV_OK;
}

/* Room for `count` pieces. */
static xkv_status grow(xkv_ctx *ctx, xkv_hasher *h, uint64_t count)
{
    piece *pieces = NULL, *old = h->pieces;
    if (count <= h->capacity)
        return XKV_OK;
    uint64_t capacity = xkv_max64(count, 2 * h->capacity + 64);
    if (capacity > SIZE_MAX)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "a blob of %llu pieces", (unsigned long long)count);
    XKV_TRY(XKV_NEW_ZERO(ctx, (size_t)capacity, &pieces));
    pthread_mutex_lock(&h->mutex);
    if (h->count > 0)
        memcpy(pieces, h->pieces, h->count * sizeof *pieces);
    h->pieces = pieces;
    h->capacity = capacity;
    pthread_mutex_unlock(&h->mutex);
    xkv_release(ctx, old);
    return XKV_OK;
}

xkv_status xkv_hasher_note(xkv_ctx *ctx, xkv_hasher *h, uint64_t offset, uint64_t size)
{
    if (size == 0)
        return XKV_OK;
    const uint64_t first = offset / XKV_HASH_PIECE, last = (offset + size - 1) / XKV_HASH_PIECE;
    XKV_TRY(grow(ctx, h, last + 1));
    pthread_mutex_lock(&h->mutex);
    for (uint64_t i = first; i <= last; i++) {
        piece *p = &h->pieces[i];
        p->state = p->state == PIECE_TAKEN || p->state == PIECE_SPOILED ? PIECE_SPOILED : PIECE_OPEN;
    }
    h->count = xkv_max64(h->count, last + 1);
    h->end = xkv_max64(h->end, offset + size);
    const bool worth_it = h->end >= FOLLOW_FROM;
    pthread_cond_signal(&h->changed);
    pthread_mutex_unlock(&h->mutex);
    if (worth_it && !h->tried)
        start_following(ctx, h);
    return XKV_OK;
}

/* Hash what is left, beside the thread that follows, and wait for that one. */
static int hash_rest(xkv_ctx *ctx, xkv_hasher *h, xkv_status *cancelled)
{
    uint64_t number;
    int error = 0;
    *cancelled = XKV_OK;
    pthread_mutex_lock(&h->mutex);
    h->complete = true;
    h->next = 0;
    pthread_cond_broadcast(&h->changed);
    while (error == 0 && *cancelled == XKV_OK) {
        if (take(h, &number))
            error = hash_taken(h, number, h->blocks[0]);
        else if (h->busy > 0)
            pthread_cond_wait(&h->changed, &h->mutex);
        else
            break;
        *cancelled = xkv_check_cancel(ctx);
    }
    pthread_mutex_unlock(&h->mutex);
    return error;
}

static void stop_following(xkv_hasher *h)
{
    if (!h->started)
        return;
    pthread_mutex_lock(&h->mutex);
    h->stop = true;
    pthread_cond_broadcast(&h->changed);
    pthread_mutex_unlock(&h->mutex);
    pthread_join(h->thread, NULL);
    h->started = false;
}

xkv_status xkv_hasher_finish(xkv_ctx *ctx, xkv_hasher *h, uint8_t hash[32])
{
    xkv_status cancelled;
    xkv_sha256 all;
    XKV_TRY(XKV_NEW(ctx, XKV_HASH_PIECE, &h->blocks[0]));
    int error = hash_rest(ctx, h, &cancelled);
    stop_following(h);
    if (error != 0)
        return xkv_fail_errno(ctx, "read a", "temporary file of the store", error);
    XKV_TRY(cancelled);
    xkv_sha256_begin(&all);
    for (uint64_t i = 0; i < h->count; i++)
        xkv_sha256_add(&all, h->pieces[i].digest, sizeof h->pieces[i].digest);
    xkv_sha256_end(&all, hash);
    return XKV_OK;
}

void xkv_hasher_free(xkv_ctx *ctx, xkv_hasher *h)
{
    if (h == NULL)
        return;
    stop_following(h);
    pthread_cond_destroy(&h->changed);
    pthread_mutex_destroy(&h->mutex);
    xkv_release(ctx, h->pieces);
    xkv_release(ctx, h->blocks[0]);
    xkv_release(ctx, h->blocks[1]);
    xkv_release(ctx, h);
}
