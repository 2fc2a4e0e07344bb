/* remote_s3.c - a bucket of S3, or of a server that speaks like it, as a remote, over libcurl and its SigV4. */
#include "remote.h"

#ifndef XKV_S3

xkv_status xkv_s3_configure(xkv_ctx *ctx, xkv_ctx *own, const char *url, const xkv_backend **backend, void **config_p)
{
    (void)own;
    (void)url;
    (void)backend;
    (void)config_p;
    return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "s3:// was not built in: configure with -DXKV_S3=ON");
}

#else

#include "sha256.h"

#include <curl/curl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define CONNECT_MS 3000
#define BUFFER     (512L * 1024L)
#define URL_SIZE   1200u

/* Everything that follows from the URL and the environment. */
typedef struct s3_config {
    char base[1024];       /* ENDPOINT/BUCKET[/PREFIX] */
    char sigv4[80];        /* "aws:amz:REGION:s3" */
    char credentials[512]; /* ACCESS_KEY_ID:SECRET */
    char token[4200];      /* header of temporary credentials; "": none */
    char ca_file[512];     /* "": the system's */
} s3_config;

typedef struct s3_link {
    CURL *curl;
    const s3_config *config;
    char why[CURL_ERROR_SIZE];
} s3_link;

/* One transfer. */
typedef struct transfer {
    xkv_ctx *ctx;
    CURL *curl;
    xkv_request *q;
    uint64_t sent;
    xkv_status status; /* of this side */
    char refusal[512]; /* the beginning of an answer that is not the object */
    size_t refusal_size;
} transfer;

/* --- URL and environment ------------------------------------------------------------------------------------------ */

/* Names that need no escape in a URL, so that what is signed is what is sent; and no part that is "." or "..". */
static bool is_plain_path(const char *path)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./";
    if (strspn(path, plain) != strlen(path))
        return false;
    for (const char *part = path; *part != '\0';) {
        size_t size = strcspn(part, "/");
        if (size == 0 || (size == 1 && *part == '.') || (size == 2 && part[0] == '.' && part[1] == '.'))
            return false;
        part += size + (part[size] == '/' && part[size + 1] != '\0');
        if (*part == '/')
            return part[1] == '\0';
    }
    return *path != '\0';
}

static const char *environment(const char *name)
{
    const char *value = getenv(name);
    return value != NULL ? value : "";
}

/* Print to a field; false when it does not fit. */
static bool fill(char *field, size_t size, const char *format, const char *first, const char *second) XKV_PRINTF(3, 0);
static bool fill(char *field, size_t size, const char *format, const char *first, const char *second)
{
    int n = snprintf(field, size, format, first, second);
    return n >= 0 && (size_t)n < size;
}

static const char *region_of_environment(void)
{
    const char *region = environment("AWS_REGION");
    if (*region == '\0')
        region = environment("AWS_DEFAULT_REGION");
    return *region != '\0' ? region : "us-east-1";
}

static xkv_status read_environment(xkv_ctx *ctx, s3_config *c, char endpoint[256])
{
    const char *id = environment("AWS_ACCESS_KEY_ID"), *secret = environment("AWS_SECRET_ACCESS_KEY");
    const char *token = environment("AWS_SESSION_TOKEN"), *url = environment("AWS_ENDPOINT_URL");
    const char *region = region_of_environment();
    if (*id == '\0' || *secret == '\0')
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set");
    bool fits = fill(c->sigv4, sizeof c->sigv4, "aws:amz:%s:s3%s", region, "") &&
                fill(c->credentials, sizeof c->credentials, "%s:%s", id, secret) &&
                fill(c->ca_file, sizeof c->ca_file, "%s%s", environment("AWS_CA_BUNDLE"), "");
    if (*token != '\0')
        fits = fits && fill(c->token, sizeof c->token, "X-Amz-Security-Token: %s%s", token, "");
    fits = fits && (*url != '\0' ? fill(endpoint, 256, "%s%s", url, "")
                                 : fill(endpoint, 256, "https://s3.%s.amazonaws.com%s", region, ""));
    if (!fits || strspn(region, "abcdefghijklmnopqrstuvwxyz0123456789-") != strlen(region))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "s3: a variable AWS_... is too long, or the region is none");
    return XKV_OK;
}

static xkv_status read_url(xkv_ctx *ctx, const char *url, s3_config *c)
{
    char endpoint[256];
    if (!is_plain_path(url))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT,
                        "remote: the URL is not s3://BUCKET[/PREFIX] of letters, digits, '-', "
                        "'_' and '.'");
    XKV_TRY(read_environment(ctx, c, endpoint));
    if (strncmp(endpoint, "http://", 7) != 0 && strncmp(endpoint, "https://", 8) != 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "s3: AWS_ENDPOINT_URL begins with neither http:// nor https://");
    for (size_t n = strlen(endpoint); n > 0 && endpoint[n - 1] == '/'; n--)
        endpoint[n - 1] = '\0';
    bool fits = fill(c->base, sizeof c->base, "%s/%s", endpoint, url);
    for (size_t n = strlen(c->base); fits && n > 0 && c->base[n - 1] == '/'; n--)
        c->base[n - 1] = '\0';
    return fits ? XKV_OK : xkv_fail(ctx, XKV_ERROR_ARGUMENT, "remote: the URL is too long");
}

/* --- One transfer ------------------------------------------------------------------------------------------------- */

static long code_of(CURL *curl)
{
    long code = 0;
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &code);
    return code;
}

/* Take a part of the object, unless all of it is announced as too large. (CURLOPT_MAXFILESIZE_LARGE would also hold for
 * what comes in the object's place.) */
static xkv_status take_body(const transfer *t, const char *bytes, size_t size)
{
    curl_off_t announced = -1;
    curl_easy_getinfo(t->curl, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &announced);
    if (announced > 0 && (uint64_t)announced > t->q->limit)
        return xkv_fail(t->ctx, XKV_ERROR_LIMIT, "the remote's object is larger than %llu bytes [SR4]",
                        (unsigned long long)t->q->limit);
    return xkv_request_take(t->ctx, t->q, bytes, size);
}

/* The object, or the beginning of what comes in its place. */
static size_t on_body(char *bytes, size_t one, size_t size, void *user)
{
    transfer *t = user;
    (void)one;
    if (t->q->kind == XKV_REQUEST_GET && code_of(t->curl) == 200) {
        t->status = take_body(t, bytes, size);
        return t->status == XKV_OK ? size : 0;
    }
    size_t n = (size_t)xkv_min64(size, sizeof t->refusal - 1 - t->refusal_size);
    memcpy(t->refusal + t->refusal_size, bytes, n);
    t->refusal_size += n;
    return size;
}

static size_t on_upload(char *bytes, size_t one, size_t room, void *user)
{
    transfer *t = user;
    size_t n = (size_t)xkv_min64(one * room, t->q->from->size - t->sent);
    if (n > 0)
        t->status = xkv_request_give(t->ctx, t->q, t->sent, bytes, n);
    if (t->status != XKV_OK)
        return CURL_READFUNC_ABORT;
    t->sent += n;
    return n;
}

/* A connection that was idle turned out closed: the object again, from its beginning. */
static int on_seek(void *user, curl_off_t offset, int origin)
{
    transfer *t = user;
    if (origin != SEEK_SET || offset < 0)
        return CURL_SEEKFUNC_CANTSEEK;
    t->sent = (uint64_t)offset;
    return CURL_SEEKFUNC_OK;
}

static int on_progress(void *user, curl_off_t down_total, curl_off_t down, curl_off_t up_total, curl_off_t up)
{
    transfer *t = user;
    (void)down_total;
    (void)down;
    (void)up_total;
    (void)up;
    if (t->status == XKV_OK)
        t->status = xkv_check_cancel(t->ctx);
    return t->status != XKV_OK;
}

static void set_upload(CURL *curl, transfer *t)
{
    curl_easy_setopt(curl, CURLOPT_UPLOAD, 1L);
    curl_easy_setopt(curl, CURLOPT_INFILESIZE_LARGE, (curl_off_t)t->q->from->size);
    curl_easy_setopt(curl, CURLOPT_READFUNCTION, on_upload);
    curl_easy_setopt(curl, CURLOPT_READDATA, t);
    curl_easy_setopt(curl, CURLOPT_SEEKFUNCTION, on_seek);
    curl_easy_setopt(curl, CURLOPT_SEEKDATA, t);
}

/* No redirects, no other protocols, no signals, and nothing beyond the limit. */
static xkv_status set_options(xkv_ctx *ctx, s3_link *l, transfer *t, const char *url, struct curl_slist *headers,
                              uint32_t ms)
{
    CURL *curl = l->curl;
    curl_easy_reset(curl);
    l->why[0] = '\0';
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, l->why);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, (long)ms);
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS, (long)xkv_min64(ms, CONNECT_MS));
    curl_easy_setopt(curl, CURLOPT_BUFFERSIZE, BUFFER);
    curl_easy_setopt(curl, CURLOPT_UPLOAD_BUFFERSIZE, BUFFER);
    if (curl_easy_setopt(curl, CURLOPT_AWS_SIGV4, l->config->sigv4) != CURLE_OK) /* or the secret goes out as it is */
        return xkv_fail(ctx, XKV_ERROR_UNSUPPORTED, "s3: this libcurl cannot sign requests");
    curl_easy_setopt(curl, CURLOPT_USERPWD, l->config->credentials);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, t);
    curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(curl, CURLOPT_XFERINFODATA, t);
    curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
    if (l->config->ca_file[0] != '\0')
        curl_easy_setopt(curl, CURLOPT_CAINFO, l->config->ca_file);
    if (t->q->kind == XKV_REQUEST_PUT)
        set_upload(curl, t);
    else if (t->q->kind == XKV_REQUEST_SIZE)
        curl_easy_setopt(curl, CURLOPT_NOBODY, 1L);
    return XKV_OK;
}

static xkv_status add_to_hash(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    (void)ctx;
    (void)offset;
    xkv_sha256_add(user, src, size);
    return XKV_OK;
}

/* SHA-256 of the bytes that are sent; of none where there are none. */
static xkv_status hash_body(xkv_ctx *ctx, xkv_request *q, uint8_t hash[32])
{
    xkv_sha256 h;
    const xkv_output sum = {.user = &h, .write = add_to_hash};
    xkv_status status = XKV_OK;
    xkv_sha256_begin(&h);
    if (q->kind == XKV_REQUEST_PUT)
        status = xkv_input_copy(ctx, q->from, &sum);
    q->ours = status != XKV_OK;
    xkv_sha256_end(&h, hash);
    return status;
}

/* The server checks the hash of what arrives, which is signed too. */
static xkv_status make_headers(xkv_ctx *ctx, const s3_link *l, xkv_request *q, struct curl_slist **headers)
{
    char line[128];
    uint8_t hash[32];
    XKV_TRY(hash_body(ctx, q, hash));
    snprintf(line, sizeof line, "x-amz-content-sha256: %s", xkv_remote_blob_name(hash).text + 2);
    *headers = curl_slist_append(NULL, line);
    if (*headers != NULL && (l->config->token[0] == '\0' || curl_slist_append(*headers, l->config->token) != NULL))
        return XKV_OK;
    curl_slist_free_all(*headers);
    return xkv_fail(ctx, XKV_ERROR_MEMORY, "s3: out of memory");
}

/* What libcurl says, unless this side has said it. */
static xkv_status judge_curl(const s3_link *l, const transfer *t, CURLcode result)
{
    const char *why = l->why[0] != '\0' ? l->why : curl_easy_strerror(result);
    if (t->status != XKV_OK)
        return t->status;
    if (result == CURLE_OPERATION_TIMEDOUT)
        return xkv_fail(t->ctx, XKV_ERROR_TIMEOUT, "s3: %s", why);
    if (result == CURLE_PEER_FAILED_VERIFICATION || result == CURLE_SSL_CACERT_BADFILE)
        t->q->final = true;
    return result == CURLE_OK ? XKV_OK : xkv_fail(t->ctx, XKV_ERROR_IO, "s3: %s", why);
}

/* <Code>...</Code> of an answer in XML; the text is that of somebody else's machine. */
static void find_reason(const transfer *t, char reason[64])
{
    const char *code = strstr(t->refusal, "<Code>");
    size_t n = code != NULL ? strspn(code + 6, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") : 0;
    snprintf(reason, 64, "%.*s", (int)xkv_min64(n, 63), code != NULL ? code + 6 : "");
}

/* Who may not list the bucket is denied access to what is not there. An answer to HEAD has no text. */
static bool may_be_missing(const xkv_request *q, const char *reason)
{
    return q->kind == XKV_REQUEST_SIZE || (q->kind == XKV_REQUEST_GET && strcmp(reason, "AccessDenied") == 0);
}

static xkv_status judge_code(const s3_link *l, transfer *t)
{
    const long code = code_of(l->curl);
    char reason[64];
    curl_off_t size = -1;
    find_reason(t, reason);
    if (code == 404 && t->q->kind != XKV_REQUEST_PUT && strcmp(reason, "NoSuchBucket") != 0)
        return XKV_ERROR_NOT_FOUND;
    if (code == 403 && may_be_missing(t->q, reason)) {
        t->q->denied = true;
        return XKV_ERROR_NOT_FOUND;
    }
    if (code == 200 && t->q->kind == XKV_REQUEST_SIZE) {
        curl_easy_getinfo(l->curl, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &size);
        t->q->size = size > 0 ? (uint64_t)size : 0;
    }
    if (code == 200)
        return XKV_OK;
    t->q->final = code < 500 && code != 408 && code != 429;
    return xkv_fail(t->ctx, XKV_ERROR_IO, "s3: HTTP %ld %s", code, reason);
}

static xkv_status s3_run(xkv_ctx *ctx, void *link, xkv_request *q, uint32_t ms)
{
    s3_link *l = link;
    transfer t = {.ctx = ctx, .curl = l->curl, .q = q};
    char url[URL_SIZE];
    struct curl_slist *headers = NULL;
    XKV_TRY(make_headers(ctx, l, q, &headers));
    snprintf(url, sizeof url, "%s/%s", l->config->base, q->name);
    xkv_status status = set_options(ctx, l, &t, url, headers, ms);
    if (status == XKV_OK)
        status = judge_curl(l, &t, curl_easy_perform(l->curl));
    if (status == XKV_OK)
        status = judge_code(l, &t);
    curl_easy_setopt(l->curl, CURLOPT_HTTPHEADER, NULL);
    curl_slist_free_all(headers);
    return status;
}

/* --- Connections -------------------------------------------------------------------------------------------------- */

static void start_library(void)
{
    (void)curl_global_init(CURL_GLOBAL_DEFAULT); /* what fails here fails in curl_easy_init() again */
}

static void s3_disconnect(xkv_ctx *own, void *link)
{
    s3_link *l = link;
    curl_easy_cleanup(l->curl);
    xkv_release(own, l);
}

/* libcurl connects with the first request. */
static xkv_status s3_connect(xkv_ctx *ctx, xkv_ctx *own, const void *config, uint32_t ms, bool *final, void **link_p)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    s3_link *l = NULL;
    (void)ms;
    (void) final;
    pthread_once(&once, start_library);
    if (XKV_NEW_ZERO(own, 1, &l) != XKV_OK)
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "s3: out of memory");
    l->config = config;
    l->curl = curl_easy_init();
    if (l->curl == NULL) {
        s3_disconnect(own, l);
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "s3: libcurl does not start");
    }
    *link_p = l;
    return XKV_OK;
}

static void s3_free_config(xkv_ctx *own, void *config)
{
    explicit_bzero(config, sizeof(s3_config));
    xkv_release(own, config);
}

xkv_status xkv_s3_configure(xkv_ctx *ctx, xkv_ctx *own, const char *url, const xkv_backend **backend, void **config_p)
{
    static const xkv_backend s3 = {s3_connect, s3_run, s3_disconnect, s3_free_config};
    s3_config *c = NULL;
    XKV_TRY(XKV_NEW_ZERO(own, 1, &c));
    xkv_status status = read_url(ctx, url, c);
    if (status != XKV_OK) {
        s3_free_config(own, c);
        return status;
    }
    *backend = &s3;
    *config_p = c;
    return XKV_OK;
}

#endif
