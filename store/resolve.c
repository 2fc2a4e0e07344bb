/* resolve.c - the addresses of a name, within a time. */
#include "resolve.h"

#include "clock.h"

#include <netdb.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#define SLICE_MS  100u /* a wait looks at the caller's cancel flag so often */
#define MOST_LEFT 8

/* Shared by who asks and the thread that looks; the last one frees it. */
typedef struct query {
    char host[XKV_HOST_SIZE];
    pthread_mutex_t mutex; /* of all below */
    pthread_cond_t changed;
    bool done, left; /* the thread is; nobody waits any more */
    int error;       /* of getaddrinfo() */
    xkv_addresses found;
} query;

static atomic_int threads;

static int look_up(const char *host, int flags, xkv_addresses *found)
{
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = flags};
    struct addrinfo *list = NULL;
    int error = getaddrinfo(host, NULL, &hints, &list);
    *found = (xkv_addresses){.count = 0};
    if (error != 0)
        return error;
    for (const struct addrinfo *a = list; a != NULL && found->count < XKV_ADDRESSES; a = a->ai_next) {
        char *text = found->text[found->count];
        found->count += getnameinfo(a->ai_addr, a->ai_addrlen, text, XKV_ADDRESS_SIZE, NULL, 0, NI_NUMERICHOST) == 0;
    }
    freeaddrinfo(list);
    return found->count > 0 ? 0 : EAI_NONAME;
}

static void free_query(query *q)
{
    pthread_cond_destroy(&q->changed);
    pthread_mutex_destroy(&q->mutex);
    free(q);
}

static void *look(void *user)
{
    query *q = user;
    xkv_addresses found;
    int error = look_up(q->host, 0, &found);
    pthread_mutex_lock(&q->mutex);
    q->error = error;
    q->found = found;
    q->done = true;
    bool left = q->left;
    pthread_cond_signal(&q->changed);
    pthread_mutex_unlock(&q->mutex);
    atomic_fetch_sub(&threads, 1);
    if (left)
        free_query(q);
    return NULL;
}

/* A detached thread, which takes no signals. */
static bool start(query *q)
{
    pthread_attr_t detached;
    pthread_t thread;
    sigset_t all, before;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = pthread_create(&thread, &detached, look, q) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
    return started;
}

static query *make_query(const char *host)
{
    pthread_condattr_t monotonic;
    query *q = calloc(1, sizeof *q); /* may outlive every context */
    if (q == NULL)
        return NULL;
    snprintf(q->host, sizeof q->host, "%s", host);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&q->mutex, NULL);
    pthread_cond_init(&q->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return q;
}

/* TIMEOUT, CANCELLED: the thread still looks. */
static xkv_status wait_for(xkv_ctx *ctx, query *q, uint64_t deadline)
{
    xkv_status status = XKV_OK;
    pthread_mutex_lock(&q->mutex);
    while (!q->done && status == XKV_OK) {
        const uint64_t now = xkv_clock_ms();
        const struct timespec at = xkv_clock_after(xkv_min64(deadline > now ? deadline - now : 0, SLICE_MS));
        pthread_cond_timedwait(&q->changed, &q->mutex, &at);
        status = now >= deadline ? XKV_ERROR_TIMEOUT : xkv_check_cancel(ctx);
    }
    if (q->done)
        status = XKV_OK;
    q->left = status != XKV_OK;
    pthread_mutex_unlock(&q->mutex);
    return status;
}

static xkv_status resolve_name(xkv_ctx *ctx, query *q, const char *host, uint64_t deadline, xkv_addresses *addresses)
{
    if (!start(q)) {
        atomic_fetch_sub(&threads, 1);
        free_query(q);
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "cannot start a thread");
    }
    xkv_status status = wait_for(ctx, q, deadline);
    if (status != XKV_OK) /* the thread frees it */
        return xkv_fail(ctx, status, "cannot resolve %s in time", host);
    const int error = q->error;
    *addresses = q->found;
    free_query(q);
    return error == 0 ? XKV_OK : xkv_fail(ctx, XKV_ERROR_IO, "cannot resolve %s: %s", host, gai_strerror(error));
}

xkv_status xkv_resolve(xkv_ctx *ctx, const char *host, uint64_t deadline, xkv_addresses *addresses)
{
    if (look_up(host, AI_NUMERICHOST, addresses) == 0)
        return XKV_OK;
    query *q = make_query(host);
    if (q == NULL)
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "out of memory");
    if (atomic_fetch_add(&threads, 1) < MOST_LEFT)
        return resolve_name(ctx, q, host, deadline, addresses);
    atomic_fetch_sub(&threads, 1);
    free_query(q);
    return xkv_fail(ctx, XKV_ERROR_TIMEOUT, "%d names are still being resolved", MOST_LEFT);
}
