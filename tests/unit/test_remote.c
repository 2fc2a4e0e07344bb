/* test_remote.c - the remote tier over a back end in memory that fails as it is told: what travels, what is refused,
 * how often a remote is asked, and how long anybody waits for it. Times are those of a clock that the test moves. */
#include "store_support.h"

#include "remote.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <unistd.h>
#include <xxhash.h>

enum { BLOCK = 8, OBJECTS = 512 };

/* --- The fake --- */

typedef struct object {
    char name[XKV_REMOTE_NAME + 1];
    uint8_t *bytes;
    size_t size;
} object;

/* A server in memory. Requests may come from several threads. */
typedef struct server {
    pthread_mutex_t mutex;
    object objects[OBJECTS];
    size_t count;
    uint64_t now;        /* milliseconds */
    bool ticks;          /* a look at the clock moves it */
    uint32_t fail;       /* so many requests fail */
    bool refuse;         /* they fail for good */
    const char *refused; /* the object that is refused, whatever else is not */
    uint32_t slow;       /* what a request takes */
    uint32_t cut;        /* so many objects end in the middle */
    bool hang;           /* requests never end */
    uint32_t requests, connects, links;
    uint32_t puts_left; /* then the server dies; UINT32_MAX: never */
    uint32_t blobs_put, blobs_got;
} server;

static server fake;

static object *find(const char *name)
{
    for (size_t i = 0; i < fake.count; i++) {
        if (strcmp(fake.objects[i].name, name) == 0)
            return &fake.objects[i];
    }
    return NULL;
}

static void set_object(const char *name, const void *bytes, size_t size)
{
    object *o = find(name);
    if (o == NULL) {
        assert_true(fake.count < OBJECTS);
        o = &fake.objects[fake.count++];
        snprintf(o->name, sizeof o->name, "%s", name);
    }
    free(o->bytes);
    o->bytes = malloc(size + 1);
    assert_non_null(o->bytes);
    memcpy(o->bytes, bytes, size);
    o->size = size;
}

/* The first object of a kind: 'i', 'b' or 'd'. */
static object *first_of(char kind)
{
    for (size_t i = 0; i < fake.count; i++) {
        if (fake.objects[i].name[0] == kind)
            return &fake.objects[i];
    }
    fail_msg("no object of kind %c", kind);
    return NULL;
}

static size_t count_of(char kind)
{
    size_t n = 0;
    for (size_t i = 0; i < fake.count; i++)
        n += fake.objects[i].name[0] == kind;
    return n;
}

static void forget_all(void)
{
    for (size_t i = 0; i < fake.count; i++) {
        free(fake.objects[i].bytes);
        fake.objects[i].bytes = NULL;
    }
    fake.count = 0;
}

static xkv_status fake_connect(xkv_ctx *ctx, xkv_ctx *own, const void *config, uint32_t ms, bool *final, void **link_p)
{
    uint32_t *link = NULL;
    (void)config;
    (void) final;
    (void)ms;
    pthread_mutex_lock(&fake.mutex);
    fake.connects++;
    fake.links++;
    pthread_mutex_unlock(&fake.mutex);
    if (XKV_NEW(own, 1, &link) != XKV_OK)
        return xkv_fail(ctx, XKV_ERROR_MEMORY, "no link");
    *link_p = link;
    return XKV_OK;
}

static void fake_disconnect(xkv_ctx *own, void *link)
{
    pthread_mutex_lock(&fake.mutex);
    fake.links--;
    pthread_mutex_unlock(&fake.mutex);
    xkv_release(own, link);
}

static void fake_free_config(xkv_ctx *own, void *config)
{
    (void)own;
    (void)config;
}

static xkv_status serve(xkv_ctx *ctx, xkv_request *q)
{
    const object *o = find(q->name);
    if (fake.refused != NULL && strcmp(fake.refused, q->name) == 0) {
        q->final = true;
        return xkv_fail(ctx, XKV_ERROR_IO, "refused");
    }
    fake.blobs_put += q->kind == XKV_REQUEST_PUT && q->name[0] == 'b';
    fake.blobs_got += q->kind == XKV_REQUEST_GET && q->name[0] == 'b';
    if (q->kind == XKV_REQUEST_PUT) {
        uint8_t *bytes = malloc((size_t)q->from->size + 1);
        assert_non_null(bytes);
        xkv_status status = xkv_request_give(ctx, q, 0, bytes, (size_t)q->from->size);
        if (status == XKV_OK)
            set_object(q->name, bytes, (size_t)q->from->size);
        free(bytes);
        return status;
    }
    if (o == NULL)
        return XKV_ERROR_NOT_FOUND;
    if (q->kind == XKV_REQUEST_SIZE) {
        q->size = o->size;
        return XKV_OK;
    }
    size_t half = o->size / 2; /* in two parts */
    XKV_TRY(xkv_request_take(ctx, q, o->bytes, half));
    if (fake.cut > 0) {
        fake.cut--;
        return xkv_fail(ctx, XKV_ERROR_IO, "fake: cut off");
    }
    return xkv_request_take(ctx, q, o->bytes + half, o->size - half);
}

static xkv_status fake_run_locked(xkv_ctx *ctx, xkv_request *q, uint32_t ms)
{
    fake.requests++;
    fake.now += 1 + fake.slow;
    if (fake.hang) {
        fake.now += ms;
        return xkv_fail(ctx, XKV_ERROR_TIMEOUT, "fake: no answer");
    }
    if (q->kind == XKV_REQUEST_PUT && fake.puts_left != UINT32_MAX && fake.puts_left-- == 0) {
        fake.puts_left = 0;
        return xkv_fail(ctx, XKV_ERROR_IO, "fake: died");
    }
    if (fake.fail > 0) {
        fake.fail--;
        q->final = fake.refuse;
        return xkv_fail(ctx, XKV_ERROR_IO, "fake: failed");
    }
    return serve(ctx, q);
}

static xkv_status fake_run(xkv_ctx *ctx, void *link, xkv_request *q, uint32_t ms)
{
    (void)link;
    pthread_mutex_lock(&fake.mutex);
    xkv_status status = fake_run_locked(ctx, q, ms);
    pthread_mutex_unlock(&fake.mutex);
    return status;
}

static uint64_t fake_clock(void *user)
{
    (void)user;
    pthread_mutex_lock(&fake.mutex);
    uint64_t now = fake.now += fake.ticks;
    pthread_mutex_unlock(&fake.mutex);
    return now;
}

static void fake_wait(void *user, uint32_t ms)
{
    (void)user;
    pthread_mutex_lock(&fake.mutex);
    fake.now += ms;
    pthread_mutex_unlock(&fake.mutex);
}

static const xkv_backend fake_backend = {fake_connect, fake_run, fake_disconnect, fake_free_config};

/* --- Machines --- */

typedef struct machine {
    test_store s;
    xkv_ctx *ctx; /* with a log */
    uint32_t warnings;
    char warning[256]; /* the last one */
    const uint8_t *key;
    xkv_remote_options options;
    uint64_t wall; /* seconds since 1970 */
} machine;

static machine a, b;

static void note_log(void *user, xkv_log_level level, const char *message)
{
    machine *m = user;
    if (level > XKV_LOG_WARNING)
        return;
    m->warnings++;
    snprintf(m->warning, sizeof m->warning, "%s", message);
}

static uint64_t wall_clock(void *user)
{
    const machine *m = user;
    return m->wall * 1000000u;
}

static void open_machine(machine *m)
{
    const xkv_remote draft = {.backend = &fake_backend, .clock = fake_clock, .wait = fake_wait};
    xkv_store_options o = xkv_store_options_default();
    o.key = m->key;
    o.clock = wall_clock;
    o.clock_user = m;
    assert_ok(m->ctx, xkv_store_open(m->ctx, m->s.path, &o, &m->s.store));
    assert_ok(m->ctx, xkv_remote_attach(m->ctx, m->s.store, &m->options, &draft));
}

static void close_machine(machine *m)
{
    xkv_store_close(m->ctx, m->s.store);
    m->s.store = NULL;
}

static void make_machine(machine *m, const uint8_t *key, uint64_t cap)
{
    xkv_store_properties p = xkv_store_properties_default();
    xkv_ctx_options o = xkv_ctx_options_default();
    memset(m, 0, sizeof *m);
    make_folder(&m->s);
    o.threads = 1;
    o.log = note_log;
    o.log_user = m;
    assert_int_equal(xkv_ctx_create(&o, &m->ctx), XKV_OK);
    p.block_tokens = BLOCK;
    p.key = m->key = key;
    p.byte_cap = cap;
    m->wall = 1000;
    m->options = xkv_remote_options_default();
    m->options.manual = 1;
    assert_ok(m->ctx, xkv_store_create(m->ctx, m->s.path, &p));
    open_machine(m);
}

static void free_machine(machine *m)
{
    if (m->ctx == NULL)
        return;
    close_machine(m);
    assert_int_equal(xkv_ctx_memory_used(m->ctx), 0);
    xkv_ctx_free(m->ctx);
    remove_folder(&m->s);
    m->ctx = NULL;
}

static int setup(void **state)
{
    (void)state;
    memset(&fake, 0, sizeof fake);
    pthread_mutex_init(&fake.mutex, NULL);
    fake.puts_left = UINT32_MAX;
    make_machine(&a, NULL, 0);
    make_machine(&b, NULL, 0);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    free_machine(&a);
    free_machine(&b);
    assert_int_equal(fake.links, 0);
    forget_all();
    pthread_mutex_destroy(&fake.mutex);
    return 0;
}

static xkv_namespace ns_of(const char *salt)
{
    return make_namespace(salt);
}

static void put_with(machine *m, const char *salt, uint64_t seed, uint32_t count, const xkv_put_options *o)
{
    const xkv_namespace ns = ns_of(salt);
    int32_t tokens[STORE_TOKENS];
    make_tokens(seed, 50000, tokens, count);
    assert_ok(m->ctx, put_rows(m->ctx, m->s.store, &ns, tokens, count, o, NULL));
}

static void put(machine *m, uint64_t seed, uint32_t count)
{
    put_with(m, NULL, seed, count, NULL);
}

static xkv_push_report push(machine *m)
{
    xkv_push_report r;
    assert_ok(m->ctx, xkv_store_push(m->ctx, m->s.store, &r));
    return r;
}

/* Leading tokens of the prompt (count tokens of one seed, then `more` of another) that are found and restored right. */
static uint32_t look_up_with(machine *m, const char *salt, uint64_t seed, uint32_t count, uint32_t more)
{
    const xkv_namespace ns = ns_of(salt);
    int32_t tokens[STORE_TOKENS];
    make_tokens(seed, 50000, tokens, count);
    make_tokens(seed + 1000, 50000, tokens + count, more);
    return find_rows(m->ctx, m->s.store, &ns, tokens, count + more).tokens;
}

static uint32_t look_up(machine *m, uint64_t seed, uint32_t count, uint32_t more)
{
    return look_up_with(m, NULL, seed, count, more);
}

static xkv_remote_stats stats(machine *m)
{
    xkv_remote_stats s;
    assert_ok(m->ctx, xkv_store_get_remote_stats(m->ctx, m->s.store, &s));
    return s;
}

static uint32_t files_in(const machine *m, const char *folder)
{
    char path[128];
    uint32_t n = 0;
    snprintf(path, sizeof path, "%s/%s", m->s.path, folder);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (const struct dirent *e = readdir(d); e != NULL; e = readdir(d))
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void assert_nothing_stored(machine *m)
{
    xkv_store_stats s;
    assert_ok(m->ctx, xkv_store_get_stats(m->ctx, m->s.store, &s));
    assert_int_equal(s.entries, 0);
    assert_int_equal(s.dictionaries, 0);
    assert_int_equal(files_in(m, "blobs"), 0);
    assert_int_equal(files_in(m, "tmp"), 0);
    assert_int_equal(files_in(m, "quarantine"), 0);
}

/* A lookup on b that finds nothing, because of an object that is not what it should be. */
static void assert_damaged(uint64_t seed, uint32_t count, const char *why)
{
    const uint64_t before = stats(&b).damaged;
    b.warnings = 0;
    assert_int_equal(look_up(&b, seed, count, 0), 0);
    assert_int_equal(stats(&b).damaged, before + 1);
    assert_int_equal(b.warnings, 1);
    if (strstr(b.warning, why) == NULL)
        fail_msg("the warning should say '%s': %s", why, b.warning);
    assert_nothing_stored(&b);
}

/* --- What travels --- */

static void test_read_through(void **state)
{
    (void)state;
    put(&a, 1, 40);
    assert_int_equal(stats(&a).waiting, 1);
    const xkv_push_report r = push(&a);
    assert_int_equal(r.sent, 1);
    assert_int_equal(r.waiting, 0);
    assert_int_equal(count_of('i'), 5);
    assert_int_equal(count_of('b'), 1);
    assert_int_equal(look_up(&b, 1, 40, 0), 40);
    const xkv_remote_stats s = stats(&b);
    assert_int_equal(s.hits, 1);
    assert_int_equal(s.misses, 0);
    assert_int_equal(s.bytes_in, first_of('b')->size + 64 * 3); /* the first run, the middle one, the last one */
    assert_int_equal(s.waiting, 0);                             /* what came is not sent back */
    const uint32_t before = fake.requests;
    assert_int_equal(look_up(&b, 1, 40, 0), 40);
    assert_int_equal(look_up(&b, 1, 17, 0), 17);
    assert_int_equal(fake.requests, before); /* it is here now */
    assert_int_equal(fake.connects, 2);      /* one each, kept */
}

/* The longest prefix: to the token when a whole block more is common. */
static void test_longest_prefix(void **state)
{
    (void)state;
    put(&a, 1, 100);
    push(&a);
    assert_int_equal(count_of('i'), 13);
    const uint32_t before = fake.requests;
    assert_int_equal(look_up(&b, 1, 61, 200), 61);    /* the entry of 100 tokens */
    assert_true(fake.requests - before <= 1 + 6 + 1); /* of 33 runs of blocks: the first one, bisection, the blob */
}

static void test_miss_is_one_request(void **state)
{
    (void)state;
    put(&a, 1, 100);
    push(&a);
    const uint32_t before = fake.requests;
    assert_int_equal(look_up(&b, 2, 1000, 0), 0);
    assert_int_equal(fake.requests, before + 1);
    assert_int_equal(stats(&b).misses, 1);
}

/* What the folder has is asked for no more; a longer entry of the remote is found beyond it. */
static void test_longer_than_local(void **state)
{
    (void)state;
    put(&b, 1, 20);
    push(&b);
    put(&a, 1, 20);
    assert_int_equal(look_up(&b, 1, 20, 60), 20);
    assert_int_equal(stats(&b).misses, 1);
    put(&a, 1, 64);
    push(&a);
    assert_int_equal(look_up(&b, 1, 64, 0), 64);
    assert_int_equal(stats(&b).hits, 1);
}

/* A hit that is too short for the caller is not fetched again and again. */
static void test_short(void **state)
{
    const xkv_namespace ns = ns_of(NULL);
    int32_t tokens[64];
    xkv_match match;
    (void)state;
    put(&a, 1, 40);
    push(&a);
    make_tokens(1, 50000, tokens, 40);
    make_tokens(7, 50000, tokens + 40, 24);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = 64};
    for (int i = 0; i < 3; i++) {
        assert_ok(b.ctx, xkv_store_match(b.ctx, b.s.store, &ns, &prompt, 60, &match, NULL));
        assert_int_equal(match.reason, XKV_MATCH_SHORT);
    }
    assert_int_equal(stats(&b).hits, 1);
    assert_int_equal(stats(&b).misses, 2);
}

static void test_tenants(void **state)
{
    (void)state;
    put_with(&a, "one", 1, 40, NULL);
    push(&a);
    assert_int_equal(look_up_with(&b, "two", 1, 40, 0), 0);
    assert_int_equal(look_up_with(&b, NULL, 1, 40, 0), 0);
    assert_int_equal(stats(&b).bytes_in, 0);
    assert_int_equal(look_up_with(&b, "one", 1, 40, 0), 40);
    assert_int_equal(look_up_with(&b, "two", 1, 40, 0), 0);
}

/* Stores with one key share, others do not even find each other's names. */
static void test_keys(void **state)
{
    static const uint8_t one[32] = {1}, two[32] = {2};
    machine c, d;
    (void)state;
    free_machine(&a);
    make_machine(&a, one, 0);
    make_machine(&c, one, 0);
    make_machine(&d, two, 0);
    put(&a, 1, 40);
    push(&a);
    assert_int_equal(look_up(&b, 1, 40, 0), 0);
    assert_int_equal(look_up(&d, 1, 40, 0), 0);
    assert_int_equal(stats(&b).damaged + stats(&d).damaged, 0);
    assert_int_equal(look_up(&c, 1, 40, 0), 40);
    free_machine(&c);
    free_machine(&d);
}

/* Blobs that were not sealed with the key are refused, though every name and hash is right. */
static void test_forged(void **state)
{
    static const uint8_t one[32] = {1};
    xkv_pointer pointer = {.size = 0};
    uint8_t bytes[XKV_POINTER_SIZE];
    (void)state;
    put(&b, 1, 40);
    push(&b);
    memcpy(bytes, first_of('i')->bytes, sizeof bytes); /* of the plain blob */
    assert_int_equal(xkv_pointer_decode(NULL, bytes, sizeof bytes, &pointer), XKV_OK);
    free_machine(&b);
    make_machine(&b, one, 0);
    const xkv_namespace ns = ns_of(NULL);
    int32_t tokens[40];
    xkv_page_key keys[5];
    make_tokens(1, 50000, tokens, 40);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = 40};
    assert_ok(b.ctx, xkv_chain_native(b.ctx, &ns, &prompt, BLOCK, keys));
    for (int i = 0; i < 5; i++)
        set_object(xkv_remote_index_name(b.s.store->remote, keys[i].key).text, bytes, sizeof bytes);
    assert_damaged(1, 40, "[SB7]");
}

/* --- Damage and hostility --- */

/* Any flipped bit of any object: a miss, a counter, a line in the log, nothing in the store. */
static void test_damage(void **state)
{
    (void)state;
    put(&a, 1, 8);
    push(&a);
    const char kinds[] = {'i', 'b'};
    for (size_t k = 0; k < sizeof kinds; k++) {
        object *o = first_of(kinds[k]);
        for (size_t i = 0; i < o->size; i += o->size / 61 + 1) {
            o->bytes[i] ^= 4;
            assert_damaged(1, 8, "");
            o->bytes[i] ^= 4;
        }
        o->size--;
        assert_damaged(1, 8, "");
        o->size++;
    }
    assert_int_equal(look_up(&b, 1, 8, 0), 8);
}

static void set_pointer(const xkv_pointer *p, const char *name)
{
    uint8_t bytes[XKV_POINTER_SIZE];
    xkv_pointer_encode(p, bytes);
    set_object(name, bytes, sizeof bytes);
}

static xkv_pointer pointer_to(const object *o)
{
    xkv_pointer p = {.size = o->size};
    const xkv_input file = xkv_input_from_memory(o->bytes, o->size);
    assert_int_equal(xkv_hash_input(a.ctx, &file, p.hash), XKV_OK);
    return p;
}

/* Sizes are bounded before anything is allocated or asked for. */
static void test_sizes(void **state)
{
    (void)state;
    put(&a, 1, 8);
    push(&a);
    object *i = first_of('i'), *o = first_of('b');
    char name[XKV_REMOTE_NAME + 1];
    memcpy(name, i->name, sizeof name);
    const xkv_pointer right = pointer_to(o);
    xkv_pointer p = right;
    p.size = UINT64_MAX / 2;
    set_pointer(&p, name);
    const uint32_t before = fake.requests;
    assert_int_equal(look_up(&b, 1, 8, 0), 0); /* larger than object_bytes: not asked for */
    assert_int_equal(fake.requests, before + 1);
    p.size = right.size - 1; /* then more comes than was announced */
    set_pointer(&p, name);
    assert_damaged(1, 8, "larger than");
    p.size = right.size + 1;
    set_pointer(&p, name);
    assert_damaged(1, 8, "size or hash");
    p = right; /* sound, and not what the name says */
    p.hash[0] ^= 1;
    set_object(xkv_remote_blob_name(p.hash).text, o->bytes, o->size);
    set_pointer(&p, name);
    assert_damaged(1, 8, "size or hash");
    p.size = 256;
    set_pointer(&p, name);
    assert_damaged(1, 8, "[SR2]");
    set_object(name, "xx", 2);
    assert_damaged(1, 8, "[SR2]");
    uint8_t large[4096] = {0};
    set_object(name, large, sizeof large);
    assert_damaged(1, 8, "[SR4]");
    set_pointer(&right, name);
    assert_int_equal(look_up(&b, 1, 8, 0), 8);
}

/* A blob that does not fit under the cap is not fetched. */
static void test_cap(void **state)
{
    machine c;
    (void)state;
    put(&a, 1, 40);
    push(&a);
    make_machine(&c, NULL, 100);
    assert_int_equal(look_up(&c, 1, 40, 0), 0);
    assert_int_equal(stats(&c).bytes_in, 64 * 3);
    free_machine(&c);
    b.options.object_bytes = 100;
    close_machine(&b);
    open_machine(&b);
    assert_int_equal(look_up(&b, 1, 40, 0), 0);
    put(&b, 2, 40);
    assert_int_equal(push(&b).dropped, 1);
    assert_int_equal(stats(&b).waiting, 0);
}

/* A sound entry of another prompt or namespace in the place of the one that was asked for. */
static void test_exchanged(void **state)
{
    (void)state;
    put(&a, 1, 8);
    push(&a);
    char name[XKV_REMOTE_NAME + 1];
    memcpy(name, first_of('i')->name, sizeof name);
    put(&a, 2, 8);
    put_with(&a, "other", 1, 8, NULL);
    push(&a);
    const object *blobs[3];
    size_t n = 0;
    for (size_t i = 0; i < fake.count && n < 3; i++) {
        if (fake.objects[i].name[0] == 'b')
            blobs[n++] = &fake.objects[i];
    }
    const xkv_pointer right = pointer_to(blobs[0]), prompt = pointer_to(blobs[1]), space = pointer_to(blobs[2]);
    set_pointer(&prompt, name);
    assert_damaged(1, 8, "does not begin with the tokens");
    set_pointer(&space, name);
    assert_damaged(1, 8, "no entry of the namespace");
    set_pointer(&right, name);
    assert_int_equal(look_up(&b, 1, 8, 0), 8);
}

static void test_expired(void **state)
{
    xkv_put_options o = xkv_put_options_default();
    (void)state;
    o.ttl = 100;
    put_with(&a, NULL, 1, 40, &o);
    put_with(&a, NULL, 2, 40, &o);
    push(&a);
    b.wall = a.wall + 99;
    assert_int_equal(look_up(&b, 1, 40, 0), 40);
    b.wall = a.wall + 100;
    assert_int_equal(look_up(&b, 2, 40, 0), 0);
    assert_int_equal(stats(&b).hits, 1);
    assert_int_equal(look_up(&b, 1, 40, 0), 0); /* it kept its end */
    assert_int_equal(stats(&b).damaged, 0);
}

/* Blobs that are gone from the remote, by its own expiry for example. */
static void test_dangling(void **state)
{
    (void)state;
    put(&a, 1, 40);
    push(&a);
    first_of('b')->name[0] = 'z';
    assert_int_equal(look_up(&b, 1, 40, 0), 0);
    assert_int_equal(stats(&b).misses, 1);
    assert_int_equal(stats(&b).damaged, 0);
    assert_nothing_stored(&b);
}

/* --- Failures --- */

static void test_down_at_put(void **state)
{
    (void)state;
    fake.fail = UINT32_MAX;
    put(&a, 1, 40);
    put(&a, 2, 40);
    xkv_push_report r = push(&a);
    assert_int_equal(r.sent, 0);
    assert_int_equal(r.waiting, 2);
    assert_non_null(strstr(r.why, "fake: failed"));
    assert_int_equal(look_up(&a, 1, 40, 0), 40);
    close_machine(&a); /* what waits survives */
    open_machine(&a);
    assert_int_equal(stats(&a).waiting, 2);
    fake.fail = 0;
    r = push(&a);
    assert_int_equal(r.sent, 2);
    assert_int_equal(r.waiting, 0);
    assert_int_equal(look_up(&b, 1, 40, 0), 40);
    assert_int_equal(look_up(&b, 2, 40, 0), 40);
}

/* Dying after any number of objects leaves nothing that is wrong, and the rest follows. */
static void test_dies(void **state)
{
    (void)state;
    for (uint32_t puts = 0; puts < 6; puts++) {
        put(&a, 10 + puts, 40);
        fake.puts_left = puts;
        fake.now += 1000000; /* it is asked again */
        assert_int_equal(push(&a).waiting, 1);
        const uint32_t found = look_up(&b, 10 + puts, 40, 0);
        assert_int_equal(found, puts >= 2 ? 40 : 0); /* the blob and one index object */
        fake.puts_left = UINT32_MAX;
        fake.now += 1000000;
        assert_int_equal(push(&a).waiting, 0);
        fake.now += 1000000;
        assert_int_equal(look_up(&b, 10 + puts, 40, 0), 40);
    }
    assert_int_equal(stats(&b).damaged, 0);
}

/* Failed requests are made again, after pauses that double, and counted. */
static void test_retries(void **state)
{
    (void)state;
    put(&a, 1, 8);
    push(&a);
    const uint32_t requests = fake.requests;
    const uint64_t now = fake.now;
    fake.fail = 2;
    assert_int_equal(look_up(&b, 1, 8, 0), 8);
    assert_int_equal(stats(&b).retries, 2);
    assert_int_equal(stats(&b).errors, 0);
    assert_int_equal(fake.requests, requests + 4);  /* three for the index object, the blob */
    assert_int_equal(fake.now, now + 4 + 50 + 100); /* a request takes 1 ms */
    assert_int_equal(b.warnings, 0);
    put(&a, 2, 8);
    push(&a);
    fake.cut = 2; /* what came before does not count */
    assert_int_equal(look_up(&b, 2, 8, 0), 8);
    assert_int_equal(stats(&b).retries, 4);
}

/* Refused for good: not asked again. */
static void test_refused(void **state)
{
    (void)state;
    fake.fail = UINT32_MAX;
    fake.refuse = true;
    assert_int_equal(look_up(&b, 1, 8, 0), 0);
    assert_int_equal(fake.requests, 1);
    assert_int_equal(stats(&b).errors, 1);
    assert_int_equal(stats(&b).retries, 0);
}

/* One that cannot be sent does not keep the others, and is tried again. */
static void test_one_is_refused(void **state)
{
    (void)state;
    char name[XKV_REMOTE_NAME + 1];
    put(&a, 1, 40);
    push(&a);
    snprintf(name, sizeof name, "%s", first_of('b')->name);
    forget_all();
    const xkv_namespace ns = ns_of(NULL);
    assert_ok(a.ctx, xkv_store_queue_all(a.ctx, a.s.store, &ns));
    put(&a, 2, 40);
    fake.refused = name;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(push(&a).waiting, i == 0 ? 2 : 1);
        fake.now += 1000000; /* it is not left alone any more */
    }
    assert_int_equal(count_of('b'), 1);
    assert_int_equal(look_up(&b, 2, 40, 0), 40);
    fake.refused = NULL;
    assert_int_equal(push(&a).waiting, 0);
    assert_int_equal(look_up(&b, 1, 40, 0), 40);
}

/* A remote that is down is asked once, then not until its pause is over, which doubles; one line in the log. */
static void test_left_alone(void **state)
{
    (void)state;
    put(&b, 1, 40);
    fake.fail = UINT32_MAX;
    for (uint64_t i = 0; i < 10; i++)
        assert_int_equal(look_up(&b, 2, 40, 0), 0);
    assert_int_equal(fake.requests, 3);
    assert_int_equal(stats(&b).skipped, 9);
    assert_int_equal(stats(&b).errors, 1);
    assert_int_equal(b.warnings, 1);
    assert_int_equal(look_up(&b, 1, 40, 0), 40); /* the store goes on */
    fake.now += 999;
    look_up(&b, 2, 40, 0);
    assert_int_equal(fake.requests, 3);
    fake.now += 1;
    look_up(&b, 2, 40, 0);
    assert_int_equal(fake.requests, 6);
    fake.now += 1999;
    look_up(&b, 2, 40, 0);
    assert_int_equal(fake.requests, 6);
    fake.now += 1;
    fake.fail = 0;
    look_up(&b, 2, 40, 0);
    assert_int_equal(fake.requests, 7);
    look_up(&b, 2, 40, 0);
    assert_int_equal(fake.requests, 8); /* and is asked as before */
    assert_int_equal(b.warnings, 1);
}

/* A server that never answers costs a lookup no more than its time, retries included. */
static void test_hangs(void **state)
{
    (void)state;
    put(&b, 1, 40);
    fake.hang = true;
    const uint64_t now = fake.now;
    assert_int_equal(look_up(&b, 2, 40, 0), 0);
    assert_true(fake.now - now <= b.options.lookup_ms + 1);
    assert_int_equal(push(&b).waiting, 1);
    assert_int_equal(look_up(&b, 1, 40, 0), 40);
}

/* Nor does a slow one: when the time is over, nothing more is asked. */
static void test_slow(void **state)
{
    (void)state;
    put(&a, 1, 200);
    push(&a);
    fake.slow = 2000;
    const uint32_t requests = fake.requests;
    assert_int_equal(look_up(&b, 1, 200, 0), 0);
    assert_int_equal(fake.requests, requests + 3);
    assert_int_equal(stats(&b).errors, 1);
}

/* What was removed before it was sent is not asked for. */
static void test_evicted_before_sent(void **state)
{
    const xkv_namespace ns = ns_of(NULL);
    (void)state;
    put(&a, 1, 40);
    assert_ok(a.ctx, xkv_store_remove(a.ctx, a.s.store, &ns, 1));
    const xkv_push_report r = push(&a);
    assert_int_equal(r.dropped, 1);
    assert_int_equal(r.waiting, 0);
    assert_int_equal(fake.requests, 0);
}

/* A blob that is damaged here does not get out. */
static void test_damaged_here(void **state)
{
    char path[256];
    (void)state;
    put(&a, 1, 40);
    snprintf(path, sizeof path, "%s/blobs", a.s.path);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (const struct dirent *e = readdir(d); e != NULL; e = readdir(d)) {
        if (e->d_name[0] == '.')
            continue;
        char file[512];
        snprintf(file, sizeof file, "%s/%s", path, e->d_name);
        FILE *f = fopen(file, "r+be");
        assert_non_null(f);
        assert_int_equal(fseek(f, -1, SEEK_END), 0);
        fputc(0x55, f);
        fclose(f);
    }
    closedir(d);
    assert_int_equal(push(&a).dropped, 1);
    assert_int_equal(count_of('b') + count_of('i'), 0);
    assert_int_equal(a.warnings, 1);
}

/* Another process that sends holds a lock; what waits is left to it. */
static void test_two_senders(void **state)
{
    char path[128];
    (void)state;
    put(&a, 1, 40);
    snprintf(path, sizeof path, "%s/tmp", a.s.path);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(flock(fd, LOCK_EX), 0);
    const xkv_push_report r = push(&a);
    assert_int_equal(r.waiting, 1);
    assert_string_equal(r.why, "another process is sending");
    assert_int_equal(fake.requests, 0);
    close(fd);
    assert_int_equal(push(&a).sent, 1);
}

/* Entries from before the remote was there. */
static void test_queue_all(void **state)
{
    const xkv_namespace ns = ns_of(NULL);
    (void)state;
    close_machine(&a);
    assert_ok(a.ctx, xkv_store_open(a.ctx, a.s.path, NULL, &a.s.store));
    for (uint64_t i = 0; i < 70; i++)
        put(&a, i, 8);
    put_with(&a, "salt", 1, 8, NULL);
    close_machine(&a);
    open_machine(&a);
    assert_int_equal(stats(&a).waiting, 0);
    assert_ok(a.ctx, xkv_store_queue_all(a.ctx, a.s.store, &ns));
    assert_int_equal(stats(&a).waiting, 70);
    assert_int_equal(push(&a).sent, 70);
    assert_int_equal(look_up(&b, 69, 8, 0), 8);
}

/* --- Dictionaries --- */

/* Put a prompt on a, packed with a dictionary that is trained for it. */
static void put_with_dict(uint64_t seed)
{
    const xkv_namespace ns = ns_of(NULL);
    xkv_put_options o = xkv_put_options_default();
    xkv_pack_options pack = xkv_pack_options_default();
    int32_t tokens[64];
    synthetic s = small_cache(seed);
    const synthetic *list = &s;
    memory file = {0};
    xkv_dict *dict = NULL;
    make_tokens(seed, 50000, tokens, 64);
    assert_ok(a.ctx, train_on(a.ctx, &list, 1, NULL, &file));
    const xkv_input input = xkv_input_from_memory(file.data, file.size);
    assert_ok(a.ctx, xkv_store_put_dict(a.ctx, a.s.store, &input, NULL));
    assert_ok(a.ctx, xkv_dict_open(a.ctx, &input, 1, &dict));
    const xkv_prompt prompt = {.tokens = tokens, .token_count = 64};
    pack.dict = dict;
    pack.quality = 50;
    o.pack = &pack;
    assert_ok(a.ctx,
              xkv_store_put_planes(a.ctx, a.s.store, &ns, &prompt, &s.geometry, s.views, NULL, NULL, 0, &o, NULL));
    xkv_dict_close(a.ctx, dict);
    memory_free(&file);
    free_synthetic(&s);
}

/* What b finds of such a prompt. */
static uint32_t match_with_dict(uint64_t seed)
{
    const xkv_namespace ns = ns_of(NULL);
    int32_t tokens[64];
    xkv_match m;
    make_tokens(seed, 50000, tokens, 64);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = 64};
    assert_ok(b.ctx, xkv_store_match(b.ctx, b.s.store, &ns, &prompt, 0, &m, NULL));
    return m.tokens;
}

/* A dictionary travels once; another one, a damaged or missing one in its place is refused, and the entry with it. */
static void test_dictionary(void **state)
{
    (void)state;
    put_with_dict(1);
    push(&a);
    assert_int_equal(count_of('d'), 1);
    const uint64_t before = stats(&a).bytes_out;
    const xkv_namespace ns = ns_of(NULL);
    assert_ok(a.ctx, xkv_store_queue_all(a.ctx, a.s.store, &ns));
    push(&a);
    assert_int_equal(stats(&a).bytes_out - before, first_of('b')->size + 8 * 64); /* it is not sent again */
    object *first = first_of('d');
    object right = *first;
    put_with_dict(2);
    push(&a);
    first = find(right.name);
    right = *first;
    object *other = NULL;
    for (size_t i = 0; i < fake.count; i++) {
        if (fake.objects[i].name[0] == 'd' && &fake.objects[i] != first)
            other = &fake.objects[i];
    }
    assert_non_null(other);
    first->bytes = other->bytes; /* a sound one, of another id */
    first->size = other->size;
    assert_int_equal(match_with_dict(1), 0);
    assert_non_null(strstr(b.warning, "another dictionary"));
    assert_nothing_stored(&b);
    first->bytes = right.bytes;
    first->size = right.size;
    for (size_t i = 0; i < right.size; i += right.size / 23 + 1) {
        right.bytes[i] ^= 16;
        assert_int_equal(match_with_dict(1), 0);
        assert_nothing_stored(&b);
        right.bytes[i] ^= 16;
    }
    assert_int_equal(stats(&b).damaged, 24);
    first->name[0] = 'z'; /* missing */
    assert_int_equal(match_with_dict(1), 0);
    assert_nothing_stored(&b);
    first->name[0] = 'd';
    assert_int_equal(match_with_dict(1), 64);
    assert_int_equal(match_with_dict(2), 64);
}

/* A dictionary whose entry does not come after all goes again, unless another one needs it. */
static void test_dictionary_for_nothing(void **state)
{
    (void)state;
    put_with_dict(1);
    push(&a);
    object *blob = first_of('b');
    blob->bytes[blob->size - 1] ^= 1; /* of the rows; the hash is made right */
    xkv_pointer p = pointer_to(blob);
    char name[XKV_REMOTE_NAME + 1];
    snprintf(name, sizeof name, "%s", xkv_remote_blob_name(p.hash).text);
    memcpy(blob->name, name, sizeof name);
    for (size_t i = 0; i < fake.count; i++) {
        if (fake.objects[i].name[0] == 'i')
            xkv_pointer_encode(&p, fake.objects[i].bytes);
    }
    assert_int_equal(match_with_dict(1), 0);
    assert_int_equal(stats(&b).damaged, 1);
    assert_nothing_stored(&b);
}

/* --- Entries that extend others --- */

enum { CHUNK = 32, LINE = 4 };

/* Put the first 32, 64, 96 and 128 tokens of a prompt: each extends the one before, all tokens of which it takes. */
static void put_line(machine *m, const char *salt, uint64_t seed, uint32_t first, uint32_t last, uint64_t ttl)
{
    xkv_pack_options pack = xkv_pack_options_default();
    xkv_put_options o = xkv_put_options_default();
    pack.chunk_tokens = CHUNK;
    o.pack = &pack;
    for (uint32_t i = first; i <= last; i++) {
        o.ttl = i == first ? ttl : 0;
        put_with(m, salt, seed, CHUNK * i, &o);
    }
}

static uint64_t entries_of(machine *m)
{
    xkv_store_stats s;
    assert_ok(m->ctx, xkv_store_get_stats(m->ctx, m->s.store, &s));
    return s.entries;
}

static void assert_sound(machine *m, uint64_t entries)
{
    xkv_verify_report v;
    assert_ok(m->ctx, xkv_store_verify(m->ctx, m->s.store, 1, NULL, NULL, &v));
    assert_int_equal(v.entries, entries);
    assert_int_equal(v.damaged + v.missing + v.orphans + v.wrong_sums + v.bad_records, 0);
}

static void test_line(void **state)
{
    machine c;
    (void)state;
    make_machine(&c, NULL, 0);
    put_line(&a, NULL, 1, 1, LINE, 0);
    assert_int_equal(stats(&a).waiting, LINE);
    assert_int_equal(push(&a).sent, LINE);
    assert_int_equal(count_of('b'), LINE);
    assert_int_equal(count_of('i'), 16); /* each run of blocks is one entry's */
    assert_int_equal(fake.blobs_put, LINE);
    assert_int_equal(look_up(&b, 1, 128, 10), 128);
    assert_int_equal(fake.blobs_got, LINE);
    assert_int_equal(entries_of(&b), LINE);
    assert_int_equal(stats(&b).hits, 1);
    assert_int_equal(stats(&b).waiting, 0);
    assert_sound(&b, LINE);
    const uint32_t before = fake.requests;
    assert_int_equal(look_up(&b, 1, 70, 0), 70);
    assert_int_equal(fake.requests, before);
    fake.blobs_got = 0;
    assert_int_equal(look_up(&c, 1, 60, 0), 60); /* what others extend is found without them */
    assert_int_equal(fake.blobs_got, 2);
    assert_int_equal(entries_of(&c), 2);
    free_machine(&c);
}

/* Of a line only what is not here is fetched, whoever has stored what is. */
static void test_line_goes_on(void **state)
{
    (void)state;
    put_line(&a, NULL, 1, 1, LINE, 0);
    push(&a);
    put_with(&b, NULL, 1, 70, NULL); /* as a whole */
    assert_int_equal(look_up(&b, 1, 128, 0), 128);
    assert_int_equal(fake.blobs_got, 2); /* behind 64 and behind 96 tokens */
    assert_int_equal(entries_of(&b), 3);
    assert_sound(&b, 3);
}

/* An entry here of the same tokens and other rows is left alone: the remote has what its line needs. */
static void test_line_beside_another(void **state)
{
    (void)state;
    const xkv_namespace ns = ns_of(NULL);
    int32_t tokens[STORE_TOKENS], positions[STORE_TOKENS];
    put_line(&a, NULL, 1, 1, LINE, 0);
    push(&a);
    make_tokens(1, 50000, tokens, 70);
    rows *r = make_rows(tokens, 70);
    for (int32_t i = 0; i < 70; i++)
        positions[i] = i + 5;
    r->geometry.positions = positions;
    const xkv_prompt prompt = {.tokens = tokens, .token_count = 70};
    assert_ok(b.ctx,
              xkv_store_put_planes(b.ctx, b.s.store, &ns, &prompt, &r->geometry, r->views, NULL, NULL, 0, NULL, NULL));
    free(r);
    assert_int_equal(look_up(&b, 1, 128, 0), 128);
    assert_int_equal(fake.blobs_got, LINE);
    assert_sound(&b, LINE + 1);
}

static void test_sealed_line(void **state)
{
    static const uint8_t key[32] = {7};
    machine c, d;
    (void)state;
    make_machine(&c, key, 0);
    make_machine(&d, key, 0);
    put_line(&c, "salt", 1, 1, LINE, 0);
    assert_int_equal(push(&c).sent, LINE);
    assert_int_equal(look_up_with(&d, "salt", 1, 128, 0), 128);
    assert_sound(&d, LINE);
    assert_int_equal(look_up_with(&b, "salt", 1, 128, 0), 0);
    free_machine(&c);
    free_machine(&d);
}

/* As put_line(), the first `count` entries, when machine a has no remote yet. */
static void put_line_before_the_remote(uint32_t count)
{
    close_machine(&a);
    assert_ok(a.ctx, xkv_store_open(a.ctx, a.s.path, NULL, &a.s.store));
    put_line(&a, NULL, 1, 1, count, 0);
    close_machine(&a);
    open_machine(&a);
}

/* What was put before the remote was there is sent with what extends it, and once. */
static void test_line_is_completed(void **state)
{
    (void)state;
    put_line_before_the_remote(2);
    put_line(&a, NULL, 1, 3, 3, 0);
    assert_int_equal(push(&a).sent, 1);
    assert_int_equal(count_of('b'), 3);
    put_line(&a, NULL, 1, 4, 4, 0);
    assert_int_equal(push(&a).sent, 1);
    assert_int_equal(fake.blobs_put, 4);
    assert_int_equal(look_up(&b, 1, 128, 0), 128);
}

/* The same when the server dies after the blob of the first, before its index objects: whoever asks for the first alone
 * finds it in the end. */
static void test_line_is_completed_later(void **state)
{
    (void)state;
    put_line_before_the_remote(1);
    put_line(&a, NULL, 1, 2, 2, 0);
    fake.puts_left = 1;
    assert_int_equal(push(&a).waiting, 1);
    fake.puts_left = UINT32_MAX;
    fake.now += 100000;
    assert_int_equal(push(&a).sent, 1);
    assert_int_equal(fake.blobs_put, 2);
    assert_int_equal(look_up(&b, 1, CHUNK, 8), CHUNK);
}

/* The blob at which the object of `tokens` tokens points. */
static object *blob_of(uint64_t seed, uint32_t tokens)
{
    const xkv_namespace ns = ns_of(NULL);
    int32_t list[STORE_TOKENS];
    xkv_symbols symbols = {0};
    xkv_page_key keys[64];
    xkv_pointer p;
    make_tokens(seed, 50000, list, tokens);
    const xkv_prompt prompt = {.tokens = list, .token_count = tokens};
    assert_ok(a.ctx, xkv_symbols_make(a.ctx, &prompt, &symbols));
    xkv_chain_keys(&ns, &symbols, BLOCK, keys);
    xkv_symbols_free(a.ctx, &symbols);
    const object *i = find(xkv_remote_index_name(a.s.store->remote, keys[tokens / BLOCK - 1].key).text);
    assert_non_null(i);
    assert_ok(a.ctx, xkv_pointer_decode(a.ctx, i->bytes, i->size, &p));
    return find(xkv_remote_blob_name(p.hash).text);
}

/* Whatever is wrong with one of a line: a miss, and nothing is stored. */
static void test_line_with_gaps(void **state)
{
    (void)state;
    put_line(&a, NULL, 1, 1, LINE, 0);
    push(&a);
    for (uint32_t i = 1; i <= LINE; i++) {
        object *o = blob_of(1, 32 * i);
        o->name[0] = 'z';
        assert_int_equal(look_up(&b, 1, 128, 0), 0);
        assert_nothing_stored(&b);
        o->name[0] = 'b';
        for (size_t j = 0; j < o->size; j += o->size / 7 + 1) {
            o->bytes[j] ^= 32;
            assert_damaged(1, 128, "size or hash");
            o->bytes[j] ^= 32;
        }
        o->size--;
        assert_damaged(1, 128, "");
        o->size++;
    }
    assert_int_equal(look_up(&b, 1, 128, 0), 128);
}

/* A blob and all that points to it get the hash that it has now. */
static void rename_blob(object *o)
{
    const xkv_pointer p = pointer_to(o);
    for (size_t i = 0; i < fake.count; i++) {
        object *x = &fake.objects[i];
        xkv_pointer old;
        if (x->name[0] != 'i')
            continue;
        assert_ok(a.ctx, xkv_pointer_decode(a.ctx, x->bytes, x->size, &old));
        if (strcmp(xkv_remote_blob_name(old.hash).text, o->name) == 0)
            xkv_pointer_encode(&p, x->bytes);
    }
    snprintf(o->name, sizeof o->name, "%s", xkv_remote_blob_name(p.hash).text);
}

static uint8_t *link_of(const object *o)
{
    return o->bytes + 256 + 8 * 2 + 4 * xkv_load32(o->bytes + 32) + 40 * xkv_load32(o->bytes + 36);
}

static void set_link(object *o, const uint8_t hash[32], uint32_t base)
{
    uint8_t *link = link_of(o);
    memcpy(link, hash, 32);
    xkv_store32(link + 40, base);
    xkv_store64(link + 56, XXH3_64bits(link, 56));
    rename_blob(o);
}

/* Links that lie: to another prompt, to a dictionary, to one that does not reach as far, to itself, round and round. */
static void test_forged_lines(void **state)
{
    (void)state;
    put_line(&a, NULL, 1, 1, 3, 0);
    put(&a, 2, 64);
    put_with_dict(3);
    push(&a);
    object *middle = blob_of(1, 64), *top = blob_of(1, 96);
    const xkv_pointer right = pointer_to(middle), other = pointer_to(blob_of(2, 64)), self = pointer_to(top);
    const xkv_pointer dict = pointer_to(first_of('d'));
    set_object(xkv_remote_blob_name(dict.hash).text, first_of('d')->bytes, first_of('d')->size);
    top = blob_of(1, 96);
    set_link(top, dict.hash, 64);
    assert_damaged(1, 96, "no entry of the namespace");
    set_link(top, self.hash, 64); /* which is gone, with the name that it had */
    assert_int_equal(look_up(&b, 1, 96, 0), 0);
    set_link(top, right.hash, 32); /* the other one begins there itself */
    assert_damaged(1, 96, "[SE2]");
    set_link(top, right.hash, 95); /* the other one ends before */
    assert_damaged(1, 96, "[SE2]");
    set_link(top, other.hash, 64);
    assert_damaged(1, 96, "[SE1]");
    set_link(top, right.hash, 64);
    top->bytes[top->size - 1] ^= 1; /* of its rows: all before it can be used */
    rename_blob(top);
    assert_int_equal(look_up(&b, 1, 96, 0), 64);
    assert_int_equal(stats(&b).damaged, 5);
    assert_sound(&b, 2);
    top->bytes[top->size - 1] ^= 1;
    rename_blob(top);
    assert_int_equal(look_up(&b, 1, 96, 0), 96);
    assert_sound(&b, 3);
}

/* A line is as long as lines may be, and no longer. */
static void test_endless_line(void **state)
{
    const xkv_namespace ns = ns_of(NULL);
    (void)state;
    xkv_pack_options pack = xkv_pack_options_default();
    xkv_put_options o = xkv_put_options_default();
    pack.chunk_tokens = CHUNK;
    o.pack = &pack;
    for (uint32_t i = 1; i <= XKV_LINE_MAX; i++)
        put_with(&a, NULL, 1, CHUNK * i, &o);
    assert_int_equal(push(&a).sent, XKV_LINE_MAX);
    assert_int_equal(look_up(&b, 1, CHUNK * XKV_LINE_MAX, 0), CHUNK * XKV_LINE_MAX);
    assert_sound(&b, XKV_LINE_MAX);
    assert_ok(b.ctx, xkv_store_remove_namespace(b.ctx, b.s.store, &ns, NULL));
    put_with(&b, NULL, 1, CHUNK, &o); /* one of them is here */
    assert_int_equal(look_up(&b, 1, CHUNK * XKV_LINE_MAX, 0), CHUNK * XKV_LINE_MAX);
}

/* Together they are no larger than an object may be. */
static void test_sizes_of_lines(void **state)
{
    (void)state;
    put_line(&a, NULL, 1, 1, LINE, 0);
    push(&a);
    uint64_t all = 0;
    for (uint32_t i = 1; i <= LINE; i++)
        all += blob_of(1, 32 * i)->size;
    close_machine(&b);
    b.options.object_bytes = all - 1;
    open_machine(&b);
    assert_int_equal(look_up(&b, 1, 128, 0), 0);
    assert_nothing_stored(&b);
    assert_int_equal(stats(&b).damaged, 0); /* there is no room for it */
    close_machine(&b);
    b.options.object_bytes = all;
    open_machine(&b);
    assert_int_equal(look_up(&b, 1, 128, 0), 128);
    close_machine(&a);
    a.options.object_bytes = all - 1;
    open_machine(&a);
    const xkv_namespace ns = ns_of(NULL);
    assert_ok(a.ctx, xkv_store_queue_all(a.ctx, a.s.store, &ns));
    const xkv_push_report r = push(&a);
    assert_int_equal(r.sent, LINE - 1);
    assert_int_equal(r.dropped, 1);
}

/* What is extended lives as long as what extends it, whatever its blob says. */
static void test_line_outlives(void **state)
{
    (void)state;
    put_line(&a, NULL, 1, 1, 2, 60);
    push(&a);
    b.wall += 100;
    assert_int_equal(look_up(&b, 1, 64, 0), 64);
    assert_sound(&b, 2);
}

/* A try that fails late does not send the blob again; who sends all once more does. */
static void test_blob_is_sent_once(void **state)
{
    const xkv_namespace ns = ns_of(NULL);
    (void)state;
    put(&a, 1, 40);
    fake.puts_left = 3; /* the blob and two index objects */
    assert_int_equal(push(&a).waiting, 1);
    assert_int_equal(fake.blobs_put, 1);
    close_machine(&a);
    open_machine(&a); /* another process */
    fake.puts_left = UINT32_MAX;
    assert_int_equal(push(&a).sent, 1);
    assert_int_equal(fake.blobs_put, 1);
    object *o = first_of('b');
    o->bytes[o->size / 2] ^= 1;
    assert_damaged(1, 40, "size or hash");
    assert_ok(a.ctx, xkv_store_queue_all(a.ctx, a.s.store, &ns));
    fake.puts_left = 2;
    assert_int_equal(push(&a).waiting, 1);
    fake.puts_left = UINT32_MAX;
    fake.now += 100000;
    assert_int_equal(push(&a).sent, 1);
    assert_int_equal(fake.blobs_put, 2);
    assert_int_equal(look_up(&b, 1, 40, 0), 40);
}

/* --- Threads --- */

enum { THREADS = 4, ROUNDS = 12 };

static void *put_and_look(void *user)
{
    const uint64_t number = *(const uint64_t *)user;
    const xkv_namespace ns = make_namespace(NULL);
    xkv_ctx *ctx = NULL;
    if (xkv_ctx_create(NULL, &ctx) != XKV_OK)
        return user;
    for (uint64_t i = 0; i < ROUNDS; i++) {
        int32_t tokens[40];
        xkv_match m;
        make_tokens(100 * number + i, 50000, tokens, 40);
        if (put_rows(ctx, a.s.store, &ns, tokens, 40, NULL, NULL) != XKV_OK)
            return user;
        make_tokens(100 * (number ^ 1) + i / 2, 50000, tokens, 40); /* another thread's */
        const xkv_prompt prompt = {.tokens = tokens, .token_count = 40};
        if (xkv_store_match(ctx, b.s.store, &ns, &prompt, 0, &m, NULL) != XKV_OK)
            return user;
    }
    xkv_ctx_free(ctx);
    return NULL;
}

/* Closing does not wait for a server that takes a connection and never answers: an hour would be too long for CTest. */
static void check_hanging_close(const char *url, uint64_t seed)
{
    xkv_remote_options o = xkv_remote_options_default();
    close_machine(&a);
    o.send_ms = 3600 * 1000;
    o.url = url;
    assert_ok(a.ctx, xkv_store_open(a.ctx, a.s.path, NULL, &a.s.store));
    xkv_status status = xkv_store_attach_remote(a.ctx, a.s.store, &o);
    if (status == XKV_ERROR_UNSUPPORTED)
        return;
    assert_ok(a.ctx, status);
    put(&a, seed, 40);
    usleep(200000); /* the thread is waiting by then, or soon */
}

static void test_hanging_close(void **state)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    char url[64];
    (void)state;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, size), 0);
    assert_int_equal(listen(fd, 8), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &size), 0);
    snprintf(url, sizeof url, "redis://127.0.0.1:%u", ntohs(address.sin_port));
    check_hanging_close(url, 1);
    snprintf(url, sizeof url, "http://127.0.0.1:%u", ntohs(address.sin_port));
    setenv("AWS_ENDPOINT_URL", url, 1);
    setenv("AWS_ACCESS_KEY_ID", "a", 1);
    setenv("AWS_SECRET_ACCESS_KEY", "b", 1);
    setenv("no_proxy", "127.0.0.1", 1);
    check_hanging_close("s3://bucket", 2);
    close_machine(&a);
    close(fd);
}

static pthread_mutex_t names_mutex = PTHREAD_MUTEX_INITIALIZER; /* held: no name is found */

/* In place of the C library's: a server of names that does not answer. */
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **list)
{
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    *(void **)&real = dlsym(RTLD_NEXT, "getaddrinfo");
    if (strcmp(node, "slow.test") != 0)
        return real(node, service, hints, list);
    if (hints != NULL && (hints->ai_flags & AI_NUMERICHOST) != 0)
        return EAI_NONAME;
    pthread_mutex_lock(&names_mutex);
    pthread_mutex_unlock(&names_mutex);
    return EAI_AGAIN;
}

/* A lookup waits no longer for a name than for anything else. */
static void test_slow_name(void **state)
{
    xkv_remote_options o = xkv_remote_options_default();
    (void)state;
    close_machine(&b);
    o.lookup_ms = 300;
    o.manual = 1;
    o.url = "redis://slow.test";
    assert_ok(b.ctx, xkv_store_open(b.ctx, b.s.path, NULL, &b.s.store));
    xkv_status status = xkv_store_attach_remote(b.ctx, b.s.store, &o);
    if (status == XKV_ERROR_UNSUPPORTED)
        return;
    assert_ok(b.ctx, status);
    pthread_mutex_lock(&names_mutex);
    const uint64_t start = xkv_clock_ms();
    assert_int_equal(look_up(&b, 1, 40, 0), 0);
    assert_in_range(xkv_clock_ms() - start, 250, 10000);
    assert_non_null(strstr(b.warning, "cannot resolve slow.test in time"));
    pthread_mutex_unlock(&names_mutex);
    usleep(1100000); /* it is left alone for a second */
    assert_int_equal(look_up(&b, 1, 40, 0), 0);
    assert_int_equal(stats(&b).errors, 2);
}

/* The thread that sends empties the queue beside writers and readers, also over failures. */
static void test_threads(void **state)
{
    pthread_t threads[THREADS];
    uint64_t numbers[THREADS];
    (void)state;
    close_machine(&a);
    a.options.manual = 0;
    a.options.pause_ms = 1;
    open_machine(&a);
    pthread_mutex_lock(&fake.mutex);
    fake.fail = 20;
    fake.ticks = true;
    pthread_mutex_unlock(&fake.mutex);
    for (uint64_t i = 0; i < THREADS; i++) {
        numbers[i] = i;
        assert_int_equal(pthread_create(&threads[i], NULL, put_and_look, &numbers[i]), 0);
    }
    for (uint64_t i = 0; i < THREADS; i++) {
        void *failed;
        assert_int_equal(pthread_join(threads[i], &failed), 0);
        assert_null(failed);
    }
    for (int i = 0; i < 10000 && stats(&a).waiting > 0; i++)
        usleep(10000);
    assert_int_equal(stats(&a).waiting, 0);
    assert_int_equal(stats(&a).sent, THREADS * ROUNDS);
    pthread_mutex_lock(&fake.mutex);
    fake.now += 1000000;
    pthread_mutex_unlock(&fake.mutex);
    for (uint64_t i = 0; i < THREADS; i++)
        assert_int_equal(look_up(&b, 100 * i + ROUNDS - 1, 40, 0), 40);
}

/* Closing does not wait for a remote that hangs, and what was not sent waits. */
static void test_close(void **state)
{
    (void)state;
    close_machine(&a);
    a.options.manual = 0;
    open_machine(&a);
    pthread_mutex_lock(&fake.mutex);
    fake.fail = UINT32_MAX;
    pthread_mutex_unlock(&fake.mutex);
    put(&a, 1, 40);
    close_machine(&a);
    fake.fail = 0;
    a.options.manual = 1;
    open_machine(&a);
    assert_int_equal(push(&a).sent, 1);
}

/* --- Names --- */

/* spec/store.md, section 10, has these. */
static void test_names(void **state)
{
    static const uint8_t key[32] = {1}, id[16] = {2};
    xkv_remote r = {.block_tokens = 256};
    uint8_t h[32];
    (void)state;
    for (size_t i = 0; i < sizeof h; i++)
        h[i] = (uint8_t)i;
    assert_string_equal(xkv_remote_index_name(&r, h).text,
                        "i/fd8784c03325ebb5787e021e60326782e6602ba081fd4b36415d1cb4f379e354");
    assert_string_equal(xkv_remote_dict_name(&r, id).text,
                        "d/36447e49a873a64ce0f6f37f84bd4cf854f55a76c4a1daf3b8e27740994c3392");
    memcpy(r.key, key, sizeof key);
    assert_string_equal(xkv_remote_index_name(&r, h).text,
                        "i/ebea6e9419298729f732bfe27182345b2b32faebb6349c23dd6dc335a289c7de");
}

/* --- Arguments --- */

static void test_arguments(void **state)
{
    static const char *const bad[] = {"http://x",          "s3:/x",       "redis://",        "redis://:6379",
                                      "redis://h:0",       "redis://h:x", "redis://h:70000", "redis://h/x",
                                      "redis://user:pw@h", "s3://",       "s3:///x",         "s3://a/b?c",
                                      "s3://b/../c"};
    static const char *const good[] = {"redis://h", "redis://h/", "redis://[::1]:1/2", "redis://1.2.3.4:65535",
                                       "s3://a",    "s3://a/",    "s3://a-b.c/d_E/f"};
    xkv_remote_options o = xkv_remote_options_default();
    (void)state;
    assert_int_equal(xkv_store_attach_remote(a.ctx, a.s.store, &o), XKV_ERROR_ARGUMENT); /* it has one */
    close_machine(&a);
    assert_ok(a.ctx, xkv_store_open(a.ctx, a.s.path, NULL, &a.s.store));
    assert_int_equal(xkv_store_attach_remote(a.ctx, a.s.store, &o), XKV_ERROR_ARGUMENT); /* no URL */
    setenv("AWS_ACCESS_KEY_ID", "a", 1);
    setenv("AWS_SECRET_ACCESS_KEY", "b", 1);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        o.url = bad[i];
        xkv_status status = xkv_store_attach_remote(a.ctx, a.s.store, &o);
        if (status != XKV_ERROR_ARGUMENT && status != XKV_ERROR_UNSUPPORTED)
            fail_msg("%s: %s", bad[i], xkv_status_string(status));
    }
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        o.url = good[i]; /* it is not contacted yet */
        o.manual = 1;
        xkv_status status = xkv_store_attach_remote(a.ctx, a.s.store, &o);
        if (status != XKV_OK && status != XKV_ERROR_UNSUPPORTED)
            fail_msg("%s: %s", good[i], xkv_ctx_error(a.ctx));
        close_machine(&a);
        assert_ok(a.ctx, xkv_store_open(a.ctx, a.s.path, NULL, &a.s.store));
    }
    o.url = "rediss://h";
    assert_int_equal(xkv_store_attach_remote(a.ctx, a.s.store, &o), XKV_ERROR_UNSUPPORTED);
    o.url = "redis://h";
    o.retries = 17;
    assert_int_equal(xkv_store_attach_remote(a.ctx, a.s.store, &o), XKV_ERROR_ARGUMENT);
    xkv_remote_stats s;
    assert_int_equal(xkv_store_get_remote_stats(a.ctx, a.s.store, &s), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_store_push(a.ctx, a.s.store, NULL), XKV_ERROR_ARGUMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_read_through, setup, teardown),
        cmocka_unit_test_setup_teardown(test_longest_prefix, setup, teardown),
        cmocka_unit_test_setup_teardown(test_miss_is_one_request, setup, teardown),
        cmocka_unit_test_setup_teardown(test_longer_than_local, setup, teardown),
        cmocka_unit_test_setup_teardown(test_short, setup, teardown),
        cmocka_unit_test_setup_teardown(test_tenants, setup, teardown),
        cmocka_unit_test_setup_teardown(test_keys, setup, teardown),
        cmocka_unit_test_setup_teardown(test_forged, setup, teardown),
        cmocka_unit_test_setup_teardown(test_damage, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sizes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cap, setup, teardown),
        cmocka_unit_test_setup_teardown(test_exchanged, setup, teardown),
        cmocka_unit_test_setup_teardown(test_expired, setup, teardown),
        cmocka_unit_test_setup_teardown(test_dangling, setup, teardown),
        cmocka_unit_test_setup_teardown(test_down_at_put, setup, teardown),
        cmocka_unit_test_setup_teardown(test_dies, setup, teardown),
        cmocka_unit_test_setup_teardown(test_retries, setup, teardown),
        cmocka_unit_test_setup_teardown(test_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_one_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_left_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(test_hangs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_evicted_before_sent, setup, teardown),
        cmocka_unit_test_setup_teardown(test_damaged_here, setup, teardown),
        cmocka_unit_test_setup_teardown(test_two_senders, setup, teardown),
        cmocka_unit_test_setup_teardown(test_queue_all, setup, teardown),
        cmocka_unit_test_setup_teardown(test_dictionary, setup, teardown),
        cmocka_unit_test_setup_teardown(test_dictionary_for_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_line, setup, teardown),
        cmocka_unit_test_setup_teardown(test_line_goes_on, setup, teardown),
        cmocka_unit_test_setup_teardown(test_line_beside_another, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sealed_line, setup, teardown),
        cmocka_unit_test_setup_teardown(test_line_is_completed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_line_is_completed_later, setup, teardown),
        cmocka_unit_test_setup_teardown(test_line_with_gaps, setup, teardown),
        cmocka_unit_test_setup_teardown(test_forged_lines, setup, teardown),
        cmocka_unit_test_setup_teardown(test_endless_line, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sizes_of_lines, setup, teardown),
        cmocka_unit_test_setup_teardown(test_line_outlives, setup, teardown),
        cmocka_unit_test_setup_teardown(test_blob_is_sent_once, setup, teardown),
        cmocka_unit_test_setup_teardown(test_threads, setup, teardown),
        cmocka_unit_test_setup_teardown(test_hanging_close, setup, teardown),
        cmocka_unit_test_setup_teardown(test_slow_name, setup, teardown),
        cmocka_unit_test_setup_teardown(test_slow, setup, teardown),
        cmocka_unit_test_setup_teardown(test_close, setup, teardown),
        cmocka_unit_test_setup_teardown(test_names, setup, teardown),
        cmocka_unit_test_setup_teardown(test_arguments, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
