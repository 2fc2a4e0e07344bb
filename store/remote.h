/* remote.h - the remote tier of a store (spec/store.md, section 10): what fetching and sending share, and what a back
 * end is. */
#ifndef XKV_REMOTE_H
#define XKV_REMOTE_H

#include "store_internal.h"

enum {
    XKV_REMOTE_LINKS = 4,                   /* idle connections that are kept */
    XKV_REMOTE_NAME = 2 + 64,               /* "i/", "b/" or "d/" and 64 digits */
    XKV_POINTER_SIZE = 64,                  /* of an index object */
    XKV_REMOTE_MIN_BLOB = XKV_BLOB_HEAD + 1 /* no blob is smaller */
};

/* --- Back ends --- */

typedef enum xkv_request_kind { XKV_REQUEST_GET, XKV_REQUEST_PUT, XKV_REQUEST_SIZE } xkv_request_kind;

/* One request for one object. */
typedef struct xkv_request {
    xkv_request_kind kind;
    const char *name;
    uint64_t limit;        /* GET: a larger object is refused */
    int fd;                /* GET: it goes to this file, or if that is -1 to */
    uint8_t *bytes;        /* [limit] */
    uint64_t size;         /* GET and SIZE: of the object */
    const xkv_input *from; /* PUT: the object, which replaces one of the same name as a whole */
    bool ours;             /* it failed on this machine: the remote is not to blame */
    bool final;            /* it failed, and would fail again */
    bool denied;           /* NOT_FOUND is a guess: the remote does not tell */
} xkv_request;

/* For back ends: the next bytes of the object that is got. LIMIT; errors of the file. */
XKV_MUST_CHECK xkv_status xkv_request_take(xkv_ctx *ctx, xkv_request *q, const void *bytes, size_t size);
/* Bytes of the object that is put. */
XKV_MUST_CHECK xkv_status xkv_request_give(xkv_ctx *ctx, xkv_request *q, uint64_t offset, void *bytes, size_t size);

/* A kind of remote. Functions may be called by several threads at once, but never on one link. */
typedef struct xkv_backend {
    /* Connect within `ms` milliseconds. Links are allocated by `own`. *final: it failed, and would fail again. */
    xkv_status (*connect)(xkv_ctx *ctx, xkv_ctx *own, const void *config, uint32_t ms, bool *final, void **link_p);
    /* Do it within `ms` milliseconds. NOT_FOUND without a message, never for PUT; LIMIT: larger than the limit; IO,
     * TIMEOUT. After a failure the link is not used again. */
    xkv_status (*run)(xkv_ctx *ctx, void *link, xkv_request *q, uint32_t ms);
    void (*disconnect)(xkv_ctx *own, void *link);
    void (*free_config)(xkv_ctx *own, void *config);
} xkv_backend;

/* What a URL says, as the configuration of its back end. Errors: ARGUMENT, UNSUPPORTED (not built in), MEMORY. */
XKV_MUST_CHECK xkv_status xkv_s3_configure(xkv_ctx *ctx, xkv_ctx *own, const char *url, const xkv_backend **backend,
                                           void **config_p);
XKV_MUST_CHECK xkv_status xkv_redis_configure(xkv_ctx *ctx, xkv_ctx *own, const char *url, const xkv_backend **backend,
                                              void **config_p);

/* --- An attached remote --- */

typedef struct xkv_remote {
    const xkv_backend *backend;
    void *config;
    xkv_remote_options o;
    xkv_ctx *own;    /* links and the configuration belong to it */
    uint8_t key[32]; /* goes into all names; zero when the store is not encrypted */
    uint32_t block_tokens;
    uint64_t (*clock)(void *user);         /* milliseconds, never back */
    void (*wait)(void *user, uint32_t ms); /* NULL: until the time has passed, or the store is being closed */
    void *user;                            /* of both */

    pthread_mutex_t mutex; /* of all below */
    pthread_cond_t changed;
    void *links[XKV_REMOTE_LINKS];
    uint32_t link_count;
    uint32_t failures;                  /* in a row; while there are any, nothing is asked */
    uint64_t down_until;                /* before this time */
    bool work, stop;                    /* for the thread that sends */
    bool denied;                        /* a request was, and it is logged */
    uint64_t resend_from, resend_below; /* ids of blobs that are sent whether or not they are there */
    xkv_remote_stats stats;

    pthread_mutex_t push_mutex; /* held while the queue is sent */
    uint64_t push_after;        /* id that it is sent from; with that mutex */
    xkv_ctx *sender;            /* context of the thread; NULL: there is none */
    pthread_t thread;
} xkv_remote;

/* Attach a remote of any kind; `config` is taken over, also when it fails. For tests: `clock` and `wait` with their
 * `user`, or NULL. */
XKV_MUST_CHECK xkv_status xkv_remote_attach(xkv_ctx *ctx, xkv_store *store, const xkv_remote_options *options,
                                            const xkv_remote *draft);

/* Run a request: again after failures, with pauses, until `deadline`. IO without a request while the remote is left
 * alone. Counts and logs what fails. */
XKV_MUST_CHECK xkv_status xkv_remote_run(xkv_ctx *ctx, xkv_remote *r, xkv_request *q, uint64_t deadline);
/* Whether it has failed and is left alone now. */
bool xkv_remote_is_down(xkv_remote *r);
uint64_t xkv_remote_now(const xkv_remote *r);
/* With the mutex held: wait so long, or until something changes. */
void xkv_remote_wait(xkv_remote *r, uint32_t ms);
/* Add to a counter of stats. */
void xkv_remote_count(xkv_remote *r, uint64_t *counter, uint64_t n);

/* --- Names and index objects --- */

typedef struct xkv_remote_name {
    char text[XKV_REMOTE_NAME + 1];
} xkv_remote_name;

xkv_remote_name xkv_remote_index_name(const xkv_remote *r, const uint8_t key[32]);
xkv_remote_name xkv_remote_dict_name(const xkv_remote *r, const uint8_t id[16]);
xkv_remote_name xkv_remote_blob_name(const uint8_t hash[32]);

/* An index object: which blob begins with a run of blocks. */
typedef struct xkv_pointer {
    uint64_t size;
    uint8_t hash[32];
} xkv_pointer;
void xkv_pointer_encode(const xkv_pointer *p, uint8_t bytes[XKV_POINTER_SIZE]);
/* Errors: CORRUPT, CHECKSUM, VERSION [SR2]. */
XKV_MUST_CHECK xkv_status xkv_pointer_decode(xkv_ctx *ctx, const uint8_t *bytes, uint64_t size, xkv_pointer *p);

/* --- remote_push.c --- */

/* Start and stop the thread that sends. */
XKV_MUST_CHECK xkv_status xkv_sender_start(xkv_ctx *ctx, xkv_store *store);
void xkv_sender_stop(xkv_remote *r);

#endif
