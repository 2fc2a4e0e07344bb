/* remote_redis.c - a Redis server as a remote, over hiredis. Replies are read here rather than by redisCommand(), since
 * that has no deadline for the whole of a reply and no limit of its size. */
#include "remote.h"

#ifndef XKV_REDIS

xkv_status xkv_redis_configure(xkv_ctx *ctx, xkv_ctx *own, const char *url, const xkv_backend **backend,
                               void **config_p)
{
    (void)own;
    (void)url;
    (void)backend;
    (void)config_p;
    return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "redis:// was not built in: configure with -DXKV_REDIS=ON");
}

#else

#include "resolve.h"

#include <errno.h>
#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

#define PIECE       ((size_t)1 << 20) /* of a value that is read or written at once */
#define MAX_REPLY   (PIECE + 65536u)
#define NAME_SIZE   (sizeof "xkv/" + XKV_REMOTE_NAME + 17)
#define CONNECT_MS  3000u
#define SLICE_MS    100u
#define TEMP_EXPIRY "3600" /* seconds after which a value that was not completed goes */

typedef struct redis_config {
    char host[256], password[256];
    int port;
    char database[8];
} redis_config;

typedef struct redis_link {
    redisContext *redis;
    redisReplyObjectFunctions functions;
    uint64_t deadline; /* of the request at hand, in milliseconds */
    bool *final;       /* set when the server refuses */
} redis_link;

/* --- URL ---------------------------------------------------------------------------------------------------------- */

/* A decimal number up to `most` that makes up all of the text. */
static bool parse_number(const char *text, size_t size, long most, long *number)
{
    *number = 0;
    for (size_t i = 0; i < size; i++) {
        if (text[i] < '0' || text[i] > '9')
            return false;
        *number = 10 * *number + (text[i] - '0');
        if (*number > most)
            return false;
    }
    return size > 0;
}

/* HOST or [HOST], which may hold colons: the bytes of it, and what follows. */
static const char *split_host(const char *url, const char **host, size_t *size)
{
    const bool bracket = *url == '[';
    *host = url + bracket;
    *size = strcspn(*host, bracket ? "]" : ":/");
    const char *rest = *host + *size;
    return bracket && *rest == ']' ? rest + 1 : rest;
}

static bool parse_url(const char *url, redis_config *c)
{
    const char *host;
    size_t size;
    long port = 6379, database = 0;
    const char *rest = split_host(url, &host, &size);
    if (size == 0 || size >= sizeof c->host || strpbrk(url, "@?#% ") != NULL)
        return false;
    memcpy(c->host, host, size);
    if (*rest == ':') {
        size_t digits = strcspn(++rest, "/");
        if (!parse_number(rest, digits, 65535, &port) || port == 0)
            return false;
        rest += digits;
    }
    if (*rest == '/' && rest[1] != '\0' && !parse_number(rest + 1, strlen(rest + 1), 65535, &database))
        return false;
    c->port = (int)port;
    snprintf(c->database, sizeof c->database, "%ld", database);
    return *rest == '\0' || *rest == '/';
}

/* --- Replies ------------------------------------------------------------------------------------------------------ */

static struct timeval to_timeval(uint64_t ms)
{
    return (struct timeval){.tv_sec = (time_t)(ms / 1000u), .tv_usec = (suseconds_t)(ms % 1000u * 1000u)};
}

/* No reply that is asked for is an array, and a hostile one would be allocated by its announced length. */
#if HIREDIS_MAJOR >= 1
static void *refuse_array(const redisReadTask *task, size_t elements)
#else
static void *refuse_array(const redisReadTask *task, int elements)
#endif
{
    (void)task;
    (void)elements;
    return NULL;
}

static xkv_status fail_link(xkv_ctx *ctx, const redis_link *l)
{
    if (xkv_clock_ms() >= l->deadline)
        return xkv_fail(ctx, XKV_ERROR_TIMEOUT, "redis: no answer in time");
    return xkv_fail(ctx, XKV_ERROR_IO, "redis: %s", l->redis->err != 0 ? l->redis->errstr : "out of memory");
}

/* Until the socket can be read or written; a look at the clock and for a cancelled context now and then. */
static xkv_status wait_until(xkv_ctx *ctx, const redis_link *l, short event)
{
    for (;;) {
        struct pollfd p = {.fd = l->redis->fd, .events = event};
        const uint64_t now = xkv_clock_ms();
        XKV_TRY(xkv_check_cancel(ctx));
        if (now >= l->deadline)
            return fail_link(ctx, l);
        int n = poll(&p, 1, (int)xkv_min64(l->deadline - now, SLICE_MS));
        if (n > 0)
            return XKV_OK;
        if (n < 0 && errno != EINTR)
            return xkv_fail_errno(ctx, "wait for", "redis", errno);
    }
}

static xkv_status send_all(xkv_ctx *ctx, redis_link *l)
{
    int done = 0;
    while (done == 0) {
        XKV_TRY(wait_until(ctx, l, POLLOUT));
        if (redisBufferWrite(l->redis, &done) != REDIS_OK)
            return fail_link(ctx, l);
    }
    return XKV_OK;
}

static xkv_status receive(xkv_ctx *ctx, redis_link *l, redisReply **reply_p)
{
    void *reply = NULL;
    for (;;) {
        if (redisGetReplyFromReader(l->redis, &reply) != REDIS_OK)
            return fail_link(ctx, l);
        if (reply != NULL)
            break;
        if (l->redis->reader->len > MAX_REPLY)
            return xkv_fail(ctx, XKV_ERROR_IO, "redis: a reply of more than %zu bytes [SR4]", MAX_REPLY);
        XKV_TRY(wait_until(ctx, l, POLLIN));
        if (redisBufferRead(l->redis) != REDIS_OK)
            return fail_link(ctx, l);
    }
    *reply_p = reply;
    return XKV_OK;
}

/* One command of up to five words, and its reply, which is no error. */
typedef struct command {
    const char *words[5];
    size_t sizes[5];
    int count;
} command;

static void add_word(command *c, const void *word, size_t size)
{
    c->words[c->count] = word;
    c->sizes[c->count++] = size;
}

static command command_of(const char *verb, const char *name)
{
    command c = {.count = 0};
    add_word(&c, verb, strlen(verb));
    add_word(&c, name, strlen(name));
    return c;
}

/* Whether a server that refuses now may do it later: while it loads, runs a script, or moves to another one. */
static bool passes_by_itself(const char *error)
{
    static const char *const words[] = {"LOADING ", "BUSY ", "TRYAGAIN ", "MASTERDOWN ", "CLUSTERDOWN "};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (strncmp(error, words[i], strlen(words[i])) == 0)
            return true;
    return false;
}

static xkv_status run_command(xkv_ctx *ctx, redis_link *l, const command *c, redisReply **reply_p)
{
    redisReply *reply = NULL;
    const char *words[5];
    memcpy(words, c->words, sizeof words);
    if (redisAppendCommandArgv(l->redis, c->count, words, c->sizes) != REDIS_OK)
        return fail_link(ctx, l);
    XKV_TRY(send_all(ctx, l));
    XKV_TRY(receive(ctx, l, &reply));
    if (reply->type == REDIS_REPLY_ERROR) {
        *l->final = !passes_by_itself(reply->str);
        xkv_status status = xkv_fail(ctx, XKV_ERROR_IO, "redis: %s: %.100s", c->words[0], reply->str);
        freeReplyObject(reply);
        return status;
    }
    *reply_p = reply;
    return XKV_OK;
}

/* The same for one that answers with a number, or with OK. */
static xkv_status run_counted(xkv_ctx *ctx, redis_link *l, const command *c, uint64_t *number)
{
    redisReply *reply = NULL;
    XKV_TRY(run_command(ctx, l, c, &reply));
    bool fits = reply->type == (number != NULL ? REDIS_REPLY_INTEGER : REDIS_REPLY_STATUS);
    if (fits && number != NULL)
        *number = (uint64_t)reply->integer;
    freeReplyObject(reply);
    return fits ? XKV_OK : xkv_fail(ctx, XKV_ERROR_IO, "redis: %s: an unexpected kind of reply", c->words[0]);
}

/* --- Requests ----------------------------------------------------------------------------------------------------- */

/* Bytes first .. first + PIECE - 1 of a value, or as many as there are. */
static xkv_status get_piece(xkv_ctx *ctx, redis_link *l, const char *name, xkv_request *q, size_t *size)
{
    char first[24], last[24];
    command c = command_of("GETRANGE", name);
    redisReply *reply = NULL;
    snprintf(first, sizeof first, "%llu", (unsigned long long)q->size);
    snprintf(last, sizeof last, "%llu", (unsigned long long)q->size + PIECE - 1);
    add_word(&c, first, strlen(first));
    add_word(&c, last, strlen(last));
    XKV_TRY(run_command(ctx, l, &c, &reply));
    xkv_status status = XKV_OK;
    if (reply->type != REDIS_REPLY_STRING || reply->len > PIECE)
        status = xkv_fail(ctx, XKV_ERROR_IO, "redis: GETRANGE: an unexpected kind of reply");
    else
        status = xkv_request_take(ctx, q, reply->str, reply->len);
    *size = reply->len;
    freeReplyObject(reply);
    return status;
}

/* A value that is not there is an empty one. */
static xkv_status get_value(xkv_ctx *ctx, redis_link *l, const char *name, xkv_request *q)
{
    size_t size;
    do
        XKV_TRY(get_piece(ctx, l, name, q, &size));
    while (size == PIECE);
    return q->size > 0 ? XKV_OK : XKV_ERROR_NOT_FOUND;
}

static xkv_status get_size(xkv_ctx *ctx, redis_link *l, const char *name, xkv_request *q)
{
    const command c = command_of("STRLEN", name);
    XKV_TRY(run_counted(ctx, l, &c, &q->size));
    return q->size > 0 ? XKV_OK : XKV_ERROR_NOT_FOUND;
}

static xkv_status set_small(xkv_ctx *ctx, redis_link *l, const char *name, xkv_request *q, uint8_t *piece)
{
    const size_t size = (size_t)q->from->size;
    command c = command_of("SET", name);
    XKV_TRY(xkv_request_give(ctx, q, 0, piece, size));
    add_word(&c, piece, size);
    return run_counted(ctx, l, &c, NULL);
}

static xkv_status append_all(xkv_ctx *ctx, redis_link *l, const char *name, xkv_request *q, uint8_t *piece)
{
    for (uint64_t offset = 0; offset < q->from->size;) {
        size_t size = (size_t)xkv_min64(q->from->size - offset, PIECE);
        command c = command_of("APPEND", name);
        uint64_t length = 0;
        XKV_TRY(xkv_request_give(ctx, q, offset, piece, size));
        add_word(&c, piece, size);
        XKV_TRY(run_counted(ctx, l, &c, &length));
        offset += size;
        if (length != offset)
            return xkv_fail(ctx, XKV_ERROR_IO, "redis: APPEND: %llu bytes, not %llu", (unsigned long long)length,
                            (unsigned long long)offset);
    }
    return XKV_OK;
}

/* In pieces, under a name of its own that expires, and then in one step under the right name. */
static xkv_status set_large(xkv_ctx *ctx, redis_link *l, const char *name, xkv_request *q, uint8_t *piece)
{
    char temp[NAME_SIZE];
    uint64_t number = 0;
    if (getrandom(&number, sizeof number, 0) != (ssize_t)sizeof number) {
        q->ours = true;
        return xkv_fail(ctx, XKV_ERROR_IO, "no random numbers");
    }
    snprintf(temp, sizeof temp, "%s.%016llx", name, (unsigned long long)number);
    command begin = command_of("SET", temp), rename = command_of("RENAME", temp), keep = command_of("PERSIST", name);
    add_word(&begin, "", 0);
    add_word(&begin, "EX", 2);
    add_word(&begin, TEMP_EXPIRY, strlen(TEMP_EXPIRY));
    add_word(&rename, name, strlen(name));
    XKV_TRY(run_counted(ctx, l, &begin, NULL));
    XKV_TRY(append_all(ctx, l, temp, q, piece));
    XKV_TRY(run_counted(ctx, l, &rename, NULL));
    return run_counted(ctx, l, &keep, &number);
}

static xkv_status set_value(xkv_ctx *ctx, redis_link *l, const char *name, xkv_request *q)
{
    uint8_t *piece = NULL;
    xkv_status status = XKV_NEW(ctx, xkv_min64(q->from->size, PIECE), &piece);
    q->ours = status != XKV_OK;
    XKV_TRY(status);
    status = q->from->size <= PIECE ? set_small(ctx, l, name, q, piece) : set_large(ctx, l, name, q, piece);
    xkv_release(ctx, piece);
    return status;
}

static xkv_status redis_run(xkv_ctx *ctx, void *link, xkv_request *q, uint32_t ms)
{
    redis_link *l = link;
    char name[NAME_SIZE];
    snprintf(name, sizeof name, "xkv/%s", q->name);
    l->deadline = xkv_clock_ms() + ms;
    l->final = &q->final;
    if (q->kind == XKV_REQUEST_GET)
        return get_value(ctx, l, name, q);
    return q->kind == XKV_REQUEST_PUT ? set_value(ctx, l, name, q) : get_size(ctx, l, name, q);
}

/* --- Connections -------------------------------------------------------------------------------------------------- */

static void redis_disconnect(xkv_ctx *own, void *link)
{
    redis_link *l = link;
    redisFree(l->redis);
    xkv_release(own, l);
}

static xkv_status log_in(xkv_ctx *ctx, redis_link *l, const redis_config *config)
{
    const command auth = command_of("AUTH", config->password), select = command_of("SELECT", config->database);
    if (config->password[0] != '\0')
        XKV_TRY(run_counted(ctx, l, &auth, NULL));
    return strcmp(config->database, "0") == 0 ? XKV_OK : run_counted(ctx, l, &select, NULL);
}

/* hiredis connects with a time limit only when it blocks; after that this file waits, by wait_until(). */
static void stop_blocking(redisContext *redis)
{
    redis->flags &= ~REDIS_BLOCK;
    (void)fcntl(redis->fd, F_SETFL, fcntl(redis->fd, F_GETFL) | O_NONBLOCK);
}

/* To one address of the host after the other. */
static xkv_status connect_any(xkv_ctx *ctx, redis_link *l, const redis_config *c)
{
    xkv_addresses a;
    XKV_TRY(xkv_resolve(ctx, c->host, l->deadline, &a));
    for (uint32_t i = 0; i < a.count; i++) {
        const uint64_t now = xkv_clock_ms();
        redisFree(l->redis);
        l->redis = NULL;
        if (now >= l->deadline)
            return xkv_fail(ctx, XKV_ERROR_TIMEOUT, "redis: cannot connect to %s in time", c->host);
        l->redis = redisConnectWithTimeout(a.text[i], c->port, to_timeval(xkv_min64(l->deadline - now, CONNECT_MS)));
        if (l->redis != NULL && l->redis->err == 0)
            return XKV_OK;
    }
    return xkv_fail(ctx, XKV_ERROR_IO, "redis: cannot connect to %s:%d: %s", c->host, c->port,
                    l->redis == NULL ? "out of memory" : l->redis->errstr);
}

static xkv_status redis_connect(xkv_ctx *ctx, xkv_ctx *own, const void *config, uint32_t ms, bool *final, void **link_p)
{
    const redis_config *c = config;
    redis_link *l = NULL;
    XKV_TRY(XKV_NEW_ZERO(own, 1, &l));
    l->deadline = xkv_clock_ms() + ms;
    l->final = final;
    xkv_status status = connect_any(ctx, l, c);
    if (status == XKV_OK) {
        stop_blocking(l->redis);
        l->functions = *l->redis->reader->fn;
        l->functions.createArray = refuse_array;
        l->redis->reader->fn = &l->functions;
        status = log_in(ctx, l, c);
    }
    if (status == XKV_OK)
        *link_p = l;
    else
        redis_disconnect(own, l);
    return status;
}

static void redis_free_config(xkv_ctx *own, void *config)
{
    explicit_bzero(config, sizeof(redis_config));
    xkv_release(own, config);
}

xkv_status xkv_redis_configure(xkv_ctx *ctx, xkv_ctx *own, const char *url, const xkv_backend **backend,
                               void **config_p)
{
    static const xkv_backend redis = {redis_connect, redis_run, redis_disconnect, redis_free_config};
    const char *password = getenv("REDISCLI_AUTH");
    redis_config c = {.port = 0}, *config = NULL;
    if (!parse_url(url, &c))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT,
                        "remote: the URL is not redis://HOST[:PORT][/DATABASE]; a password "
                        "comes from REDISCLI_AUTH");
    if (password != NULL && strlen(password) >= sizeof c.password)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "REDISCLI_AUTH is too long");
    if (password != NULL)
        snprintf(c.password, sizeof c.password, "%s", password);
    XKV_TRY(XKV_NEW(own, 1, &config));
    *config = c;
    explicit_bzero(&c, sizeof c);
    *backend = &redis;
    *config_p = config;
    return XKV_OK;
}

#endif
