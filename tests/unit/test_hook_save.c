/* test_hook_save.c - saves in the background: what is copied, the limits of the queue, cancelling at every stage,
 * flushing, closing, memory that runs out, many threads, two processes.
 * With XKV_LONG_TESTS in the environment the mixed load runs for ten minutes instead of two seconds. */
#include "store_support.h"

#include "xkv/hook.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static test_store t;
static xkv_hook *hook;
static xkv_namespace ns;

/* --- A gate in the background: each save that is being packed waits there for a permit ---------------------------- */

enum { UNLIMITED = 1000000 };

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int permits, arrived;
} gate = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, UNLIMITED, 0};

static int pass_gate(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    if (done < total)
        return 0;
    pthread_mutex_lock(&gate.mutex);
    gate.arrived++;
    pthread_cond_broadcast(&gate.changed);
    while (gate.permits == 0)
        pthread_cond_wait(&gate.changed, &gate.mutex);
    if (gate.permits < UNLIMITED)
        gate.permits--;
    pthread_mutex_unlock(&gate.mutex);
    return 0;
}

static void set_gate(int permits)
{
    pthread_mutex_lock(&gate.mutex);
    gate.permits = permits;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.mutex);
}

/* Wait until `count` saves have come to the gate since it was closed. */
static void wait_at_gate(int count)
{
    pthread_mutex_lock(&gate.mutex);
    while (gate.arrived < count)
        pthread_cond_wait(&gate.changed, &gate.mutex);
    pthread_mutex_unlock(&gate.mutex);
}

/* --- Memory: what the hook's contexts hold, and an allocation that fails ------------------------------------------ */

static atomic_llong live_bytes, peak_bytes;
static atomic_long allocations;
static long failing; /* this allocation fails, the first is 1; 0: none */

static void *counted_alloc(void *user, size_t size)
{
    (void)user;
    if (atomic_fetch_add(&allocations, 1) + 1 == failing)
        return NULL;
    size_t *block = malloc(size + 64);
    if (block == NULL)
        return NULL;
    *block = size;
    long long live = atomic_fetch_add(&live_bytes, (long long)size) + (long long)size, peak = atomic_load(&peak_bytes);
    while (peak < live && !atomic_compare_exchange_weak(&peak_bytes, &peak, live)) {
    }
    return (char *)block + 64;
}

static void counted_release(void *user, void *ptr)
{
    size_t *block = (size_t *)(void *)((char *)ptr - 64);
    (void)user;
    atomic_fetch_sub(&live_bytes, (long long)*block);
    free(block);
}

/* --- A hook in a store -------------------------------------------------------------------------------------------- */

static char last_log[256];

static void keep_log(void *user, xkv_log_level level, const char *message)
{
    (void)user;
    (void)level;
    snprintf(last_log, sizeof last_log, "%s", message);
}

static xkv_hook_options hook_options(void)
{
    static xkv_ctx_options context;
    static xkv_pack_options pack;
    xkv_hook_options o = xkv_hook_options_default();
    context = xkv_ctx_options_default();
    context.allocator = (xkv_allocator){NULL, counted_alloc, counted_release};
    context.log = keep_log;
    pack = xkv_pack_options_default();
    pack.progress = pass_gate;
    o.context = &context;
    o.pack = &pack;
    return o;
}

static void open_hook(const xkv_hook_options *o)
{
    assert_ok(t.ctx, xkv_hook_create(t.ctx, t.store, o, &hook));
}

static void close_hook(void)
{
    xkv_hook_close(hook);
    hook = NULL;
    assert_int_equal(live_bytes, 0);
}

static int setup(void **state)
{
    (void)state;
    make_store(&t, 0);
    ns = make_namespace(NULL);
    set_gate(UNLIMITED);
    gate.arrived = 0;
    failing = 0;
    peak_bytes = live_bytes = 0;
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    set_gate(UNLIMITED);
    close_hook();
    remove_folder(&t);
    return 0;
}

static xkv_hook_counters counters(void)
{
    xkv_hook_counters c;
    xkv_hook_get_counters(hook, &c);
    return c;
}

static uint64_t entries(void)
{
    xkv_store_stats s;
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    return s.entries;
}

/* Nothing is wrong in the store, and everything that was queued has come to an end. */
static void assert_sound(void)
{
    xkv_verify_report r;
    xkv_hook_counters c = counters();
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &r));
    if (r.first[0] != '\0')
        fail_msg("%s", r.first);
    assert_int_equal(c.saves_queued,
                     c.saves_stored + c.saves_existed + c.saves_failed + c.saves_cancelled + c.queue_saves);
}

/* --- Prompts ------------------------------------------------------------------------------------------------------ */

enum { SIZE = 100 };

/* The copy of a save: rows, tokens, positions and a little. */
enum { ROWS_BYTES = SIZE * 2 * STORE_WIDTH * 4, COPY_BYTES = ROWS_BYTES + 3000 };

static xkv_status save_with(xkv_ctx *ctx, uint64_t number, const xkv_hook_save_options *o, xkv_hook_saved *saved)
{
    int32_t tokens[SIZE];
    make_tokens(number, 50000, tokens, SIZE);
    rows *r = make_rows(tokens, SIZE);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
    xkv_status status = xkv_hook_save(ctx, hook, &ns, &prompt, &r->geometry, r->views, o, saved);
    memset(r, 0x55, sizeof *r);
    free(r);
    return status;
}

static xkv_hook_saved save(uint64_t number)
{
    xkv_hook_saved saved;
    assert_ok(t.ctx, save_with(t.ctx, number, NULL, &saved));
    return saved;
}

static void flush(void)
{
    assert_ok(t.ctx, xkv_hook_flush(t.ctx, hook, XKV_HOOK_FOREVER));
}

/* Whether the prompt can be loaded; all of its rows must be right then. 0: no, 1: yes, -1: wrong rows. */
static int look_up(xkv_ctx *ctx, xkv_hook *from, uint64_t number)
{
    xkv_hook_match_options o = xkv_hook_match_options_default();
    int32_t tokens[SIZE];
    xkv_hook_found f;
    xkv_hook_hit *hit = NULL;
    make_tokens(number, 50000, tokens, SIZE);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
    o.compute_tokens = 0;
    if (xkv_hook_match(ctx, from, &ns, &prompt, &o, &f, &hit) != XKV_OK || hit == NULL)
        return 0;
    rows *expected = make_rows(tokens, f.tokens), *got = make_rows(NULL, f.tokens);
    xkv_hook_load_options load = xkv_hook_load_options_default();
    load.positions = expected->positions;
    xkv_status status = xkv_hook_load(ctx, hit, &got->geometry, got->views, &load);
    int right = memcmp(expected->data, got->data, sizeof got->data) == 0;
    free(expected);
    free(got);
    xkv_hook_hit_close(hit);
    return status != XKV_OK ? 0 : right ? f.tokens == SIZE : -1;
}

static bool is_stored(uint64_t number)
{
    int found = look_up(t.ctx, hook, number);
    assert_int_not_equal(found, -1);
    return found == 1;
}

/* A hook whose only background thread stands at the gate with prompt `number`. */
static xkv_hook_saved hold(const xkv_hook_options *o, uint64_t number)
{
    open_hook(o);
    set_gate(0);
    xkv_hook_saved saved = save(number);
    wait_at_gate(1);
    return saved;
}

/* --- What is copied ----------------------------------------------------------------------------------------------- */

/* A paged cache: rows anywhere, a plane transposed. */
static void any_view_is_copied(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    static float paged[2 * SIZE][STORE_WIDTH], transposed[STORE_WIDTH][SIZE];
    uint32_t at[SIZE];
    int32_t tokens[SIZE];
    make_tokens(1, 50000, tokens, SIZE);
    rows *r = make_rows(tokens, SIZE);
    for (uint32_t i = 0; i < SIZE; i++) {
        at[i] = (i * 37) % (2 * SIZE);
        memcpy(paged[at[i]], r->data[0][i], sizeof paged[0]);
        for (uint32_t d = 0; d < STORE_WIDTH; d++)
            transposed[d][i] = r->data[1][i][d];
    }
    const xkv_view views[2] = {{paged, sizeof paged[0], sizeof paged[0], 4, at, .dtype = XKV_F32},
                               {transposed, 4, 4 * SIZE * STORE_WIDTH, 4 * SIZE, NULL, .dtype = XKV_F32}};
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE - 30}; /* fewer than the rows there are */
    open_hook(&o);
    assert_ok(t.ctx, xkv_hook_save(t.ctx, hook, &ns, &prompt, &r->geometry, views, NULL, NULL));
    memset(paged, 0, sizeof paged);
    memset(transposed, 0, sizeof transposed);
    memset(at, 0xff, sizeof at);
    free(r);
    flush();
    assert_int_equal(counters().saved_tokens, SIZE - 30);
    assert_false(is_stored(1)); /* right rows, but not all of them */
    assert_int_equal(counters().loaded_tokens, SIZE - 30);
    assert_sound();
}

static void media_and_keys_are_copied(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    xkv_hook_save_options with = xkv_hook_save_options_default();
    int32_t tokens[SIZE];
    char cat[] = "cat";
    xkv_media medium = {10, cat, 3};
    xkv_page_key keys[4];
    uint8_t names[4][32];
    xkv_match m;
    hold(&o, 0);
    make_tokens(1, 50000, tokens, SIZE);
    rows *r = make_rows(tokens, SIZE);
    xkv_prompt prompt = {tokens, SIZE, &medium, 1};
    assert_ok(t.ctx, xkv_chain_sglang(t.ctx, tokens, SIZE, 25, keys));
    for (size_t i = 0; i < 4; i++)
        memcpy(names[i], keys[i].key, 32);
    with.keys = keys;
    with.key_count = 4;
    assert_ok(t.ctx, xkv_hook_save(t.ctx, hook, &ns, &prompt, &r->geometry, r->views, &with, NULL));
    free(r);
    memset(keys, 0, sizeof keys);
    memset(tokens, 0, sizeof tokens);
    memcpy(cat, "dog", 3);
    set_gate(UNLIMITED);
    flush();
    assert_int_equal(counters().saves_stored, 2);
    make_tokens(1, 50000, tokens, SIZE);
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, NULL));
    assert_int_equal(m.tokens, 10); /* up to the dog */
    memcpy(cat, "cat", 3);
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, NULL));
    assert_int_equal(m.tokens, SIZE);
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, (const uint8_t(*)[32])names, 4, &m, NULL));
    assert_int_equal(m.tokens, SIZE);
}

static void wrong_saves_are_refused(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    int32_t tokens[SIZE];
    make_tokens(1, 50000, tokens, SIZE);
    open_hook(&o);
    for (int change = 0; change < 9; change++) {
        rows *r = make_rows(tokens, SIZE);
        xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
        const xkv_media nameless = {3, NULL, 4};
        switch (change) {
        case 0:
            r->geometry.token_count--;
            break;
        case 1:
            r->planes[1].heads = 0;
            break;
        case 2:
            r->views[0].dtype = XKV_F16;
            break;
        case 3:
            r->views[1].data = NULL;
            break;
        case 4:
            r->geometry.positions = NULL;
            break;
        case 5:
            r->planes[0].rope = 0;
            break;
        case 6:
            prompt.token_count = 0;
            break;
        case 7:
            prompt.media = &nameless;
            prompt.media_count = 1;
            break;
        case 8:
            r->geometry.plane_count = 0;
            break;
        }
        assert_int_equal(xkv_hook_save(t.ctx, hook, &ns, &prompt, &r->geometry, r->views, NULL, NULL),
                         XKV_ERROR_ARGUMENT);
        assert_string_not_equal(xkv_ctx_error(t.ctx), "");
        free(r);
    }
    assert_int_equal(counters().saves_refused, 9);
    assert_int_equal(counters().saves_queued, 0);
    assert_int_equal(entries(), 0);
}

/* --- The same prompt again ---------------------------------------------------------------------------------------- */

static void known_prompts_cost_nothing(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    xkv_hook_saved first = hold(&o, 0), second = save(1);
    xkv_hook_saved again = save(0);
    assert_int_equal(again.outcome, XKV_SAVE_PENDING); /* being packed */
    assert_int_equal(again.ticket, first.ticket);
    again = save(1);
    assert_int_equal(again.outcome, XKV_SAVE_PENDING); /* waiting */
    assert_int_equal(again.ticket, second.ticket);
    set_gate(UNLIMITED);
    flush();
    assert_int_equal(save(0).outcome, XKV_SAVE_STORED);
    assert_int_equal(save(1).outcome, XKV_SAVE_STORED);
    xkv_hook_counters c = counters();
    assert_int_equal(c.saves_queued, 2);
    assert_int_equal(c.saves_pending, 2);
    assert_int_equal(c.saves_known, 2);
    assert_int_equal(c.saves_stored, 2);
    assert_int_equal(entries(), 2);
    ns = make_namespace("other"); /* the same tokens, but another prompt */
    assert_int_equal(save(0).outcome, XKV_SAVE_QUEUED);
    flush();
    assert_int_equal(entries(), 3);
    assert_sound();
}

static int note_item(void *user, const xkv_store_item *item)
{
    *(xkv_store_item *)user = *item;
    return 0;
}

static void pins_and_lifetimes_are_renewed(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    xkv_hook_save_options with = xkv_hook_save_options_default();
    xkv_hook_saved saved;
    xkv_store_item item;
    open_hook(&o);
    with.ttl = 1000;
    assert_ok(t.ctx, save_with(t.ctx, 0, &with, NULL));
    flush();
    assert_ok(t.ctx, xkv_store_list(t.ctx, t.store, &ns, note_item, &item));
    uint64_t before = item.expires;
    assert_int_equal(item.pinned, 0);
    with.ttl = 2000;
    with.pin = 1;
    assert_ok(t.ctx, save_with(t.ctx, 0, &with, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_QUEUED);
    flush();
    assert_ok(t.ctx, xkv_store_list(t.ctx, t.store, &ns, note_item, &item));
    assert_true(item.expires >= before + 900 * 1000000u);
    assert_int_equal(item.pinned, 1);
    assert_int_equal(counters().saves_existed, 1);
    assert_int_equal(counters().saves_stored, 1);
    assert_int_equal(entries(), 1);
}

/* A save on its way, or an entry, that lacks what is asked for does not swallow it. */
static void options_of_equal_saves_are_kept(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    xkv_hook_save_options with = xkv_hook_save_options_default();
    xkv_hook_saved saved;
    xkv_store_item item;
    xkv_page_key keys[4];
    uint8_t names[4][32];
    int32_t tokens[SIZE];
    xkv_match m;
    make_tokens(1, 50000, tokens, SIZE);
    assert_ok(t.ctx, xkv_chain_sglang(t.ctx, tokens, SIZE, 25, keys));
    for (size_t i = 0; i < 4; i++)
        memcpy(names[i], keys[i].key, 32);
    hold(&o, 0);
    with.ttl = 1000;
    assert_ok(t.ctx, save_with(t.ctx, 1, &with, &saved));
    assert_ok(t.ctx, save_with(t.ctx, 1, &with, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_PENDING);
    with.ttl = 2000;
    assert_ok(t.ctx, save_with(t.ctx, 1, &with, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_QUEUED);
    with.pin = 1;
    assert_ok(t.ctx, save_with(t.ctx, 1, &with, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_QUEUED);
    with.keys = keys;
    with.key_count = 4;
    assert_ok(t.ctx, save_with(t.ctx, 1, &with, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_QUEUED);
    assert_ok(t.ctx, save_with(t.ctx, 1, &with, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_PENDING);
    with.pin = 0;
    with.ttl = 0; /* for ever */
    assert_ok(t.ctx, save_with(t.ctx, 1, &with, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_QUEUED);
    assert_int_equal(save(1).outcome, XKV_SAVE_PENDING);
    set_gate(UNLIMITED);
    flush();
    assert_int_equal(entries(), 2);
    assert_ok(t.ctx, xkv_store_list(t.ctx, t.store, &ns, note_item, &item)); /* the last one */
    assert_int_equal(item.pinned, 1);
    assert_int_equal(item.expires, 0);
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, (const uint8_t(*)[32])names, 4, &m, NULL));
    assert_int_equal(m.tokens, SIZE);
    assert_ok(t.ctx, save_with(t.ctx, 1, &with, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_STORED);
    keys[3].key[0] ^= 1;
    assert_ok(t.ctx, save_with(t.ctx, 1, &with, &saved));
    assert_int_equal(saved.outcome, XKV_SAVE_QUEUED);
    flush();
    assert_int_equal(entries(), 2);
    names[3][0] ^= 1;
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, (const uint8_t(*)[32])names, 4, &m, NULL));
    assert_int_equal(m.tokens, SIZE);
    assert_true(is_stored(1));
    assert_sound();
}

/* --- Limits of the queue ------------------------------------------------------------------------------------------ */

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void a_full_queue_drops(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    o.queue_saves = 3;
    hold(&o, 0);
    assert_int_equal(save(1).outcome, XKV_SAVE_QUEUED);
    assert_int_equal(save(2).outcome, XKV_SAVE_QUEUED);
    xkv_hook_saved dropped = save(3);
    assert_int_equal(dropped.outcome, XKV_SAVE_DROPPED);
    assert_int_equal(dropped.ticket, 0);
    assert_string_equal(xkv_ctx_error(t.ctx), "");
    assert_int_equal(counters().queue_saves, 3);
    set_gate(UNLIMITED);
    flush();
    assert_int_equal(counters().queue_saves, 0);
    assert_int_equal(counters().saves_dropped, 1);
    assert_int_equal(entries(), 3);
    assert_false(is_stored(3));
    assert_int_equal(save(3).outcome, XKV_SAVE_QUEUED);
    flush();
    assert_true(is_stored(3));
}

static void a_full_queue_waits_as_long_as_asked(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    o.queue_saves = 1;
    o.wait_ms = 120;
    hold(&o, 0);
    double start = seconds();
    assert_int_equal(save(1).outcome, XKV_SAVE_DROPPED);
    assert_true(seconds() - start > 0.11 && seconds() - start < 20);
}

/* What the threads of the next tests do: save a range of prompts. */
typedef struct saver {
    pthread_t thread;
    uint64_t first, count;
    xkv_ctx *ctx;
    xkv_status status; /* the last one */
    int queued;
    atomic_bool done;
} saver;

static void *save_range(void *user)
{
    saver *s = user;
    xkv_hook_saved saved;
    for (uint64_t i = s->first; i < s->first + s->count; i++) {
        s->status = save_with(s->ctx, i, NULL, &saved);
        s->queued += s->status == XKV_OK && saved.outcome == XKV_SAVE_QUEUED;
    }
    atomic_store(&s->done, true);
    return NULL;
}

static void start_saver(saver *s, uint64_t first, uint64_t count)
{
    *s = (saver){.first = first, .count = count, .ctx = new_ctx(1)};
    assert_int_equal(pthread_create(&s->thread, NULL, save_range, s), 0);
}

static void join_saver(saver *s)
{
    pthread_join(s->thread, NULL);
    xkv_ctx_free(s->ctx);
}

static void sleep_ms(long ms)
{
    const struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&pause, NULL);
}

/* Room for four copies; eight threads want to save 64 prompts while nothing gets through. */
static void back_pressure_bounds_memory(void **state)
{
    (void)state;
    enum { SAVERS = 8, EACH = 8 };
    xkv_hook_options o = hook_options();
    saver savers[SAVERS];
    o.queue_bytes = 4 * COPY_BYTES;
    o.queue_saves = 1000;
    o.wait_ms = XKV_HOOK_FOREVER;
    hold(&o, 1000);
    long long held = live_bytes; /* with the one at the gate, and what packing it takes */
    peak_bytes = 0;
    for (uint64_t i = 0; i < SAVERS; i++)
        start_saver(&savers[i], i * EACH, EACH);
    while (counters().queue_bytes + COPY_BYTES <= o.queue_bytes || live_bytes < held + 3 * ROWS_BYTES)
        sleep_ms(1);
    sleep_ms(200); /* nobody gets in any more */
    xkv_hook_counters c = counters();
    assert_true(c.queue_saves >= 4 && c.queue_saves < 4 + SAVERS);
    assert_true(c.queue_bytes <= o.queue_bytes && c.queue_bytes >= c.queue_saves * ROWS_BYTES);
    assert_true(peak_bytes <= held + 3 * COPY_BYTES + SAVERS * 2000);
    assert_true(peak_bytes >= held + 3 * ROWS_BYTES);
    set_gate(UNLIMITED);
    for (size_t i = 0; i < SAVERS; i++) {
        join_saver(&savers[i]);
        assert_int_equal(savers[i].queued, EACH);
    }
    flush();
    c = counters();
    assert_int_equal(c.saves_stored, SAVERS * EACH + 1);
    assert_int_equal(c.saves_dropped, 0);
    assert_int_equal(c.queue_bytes, 0);
    assert_true(c.queue_bytes_peak <= o.queue_bytes);
    for (uint64_t i = 0; i < SAVERS * EACH; i++)
        assert_true(is_stored(i));
    assert_sound();
}

static void what_never_fits_is_refused(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    o.queue_bytes = ROWS_BYTES;
    o.wait_ms = XKV_HOOK_FOREVER;
    open_hook(&o);
    assert_int_equal(save_with(t.ctx, 0, NULL, NULL), XKV_ERROR_LIMIT);
    assert_int_equal(counters().saves_dropped, 1);
    assert_int_equal(counters().saves_refused, 0);
}

/* Of threads that save the same prompt and wait for room together one gets in; the others need not. */
static void equal_saves_wait_together(void **state)
{
    (void)state;
    enum { SAVERS = 4 };
    xkv_hook_options o = hook_options();
    saver savers[SAVERS];
    o.queue_saves = 1;
    o.wait_ms = XKV_HOOK_FOREVER;
    hold(&o, 0);
    for (size_t i = 0; i < SAVERS; i++)
        start_saver(&savers[i], 1, 1);
    sleep_ms(50);
    set_gate(1); /* prompt 0 passes, the next one stands at the gate */
    double end = seconds() + 20;
    while (counters().saves_pending < SAVERS - 1 && seconds() < end)
        sleep_ms(1);
    xkv_hook_counters c = counters();
    set_gate(UNLIMITED);
    for (size_t i = 0; i < SAVERS; i++)
        join_saver(&savers[i]);
    flush();
    assert_int_equal(c.saves_pending, SAVERS - 1);
    assert_int_equal(counters().saves_queued, 2);
    assert_int_equal(counters().saves_stored, 2);
}

/* --- Cancelling --------------------------------------------------------------------------------------------------- */

static void saves_are_cancelled_while_they_wait(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    hold(&o, 0);
    save(1);
    xkv_hook_saved second = save(2);
    save(3);
    assert_int_equal(xkv_hook_cancel(hook, second.ticket), 1);
    assert_int_equal(xkv_hook_cancel(hook, second.ticket), 0);
    assert_int_equal(counters().queue_saves, 3);
    assert_int_equal(counters().saves_cancelled, 1);
    assert_int_equal(save(2).outcome, XKV_SAVE_QUEUED); /* it may come again */
    assert_int_equal(xkv_hook_cancel(hook, 4), 1);
    assert_int_equal(xkv_hook_cancel(hook, 5), 1);
    set_gate(UNLIMITED);
    flush();
    assert_true(is_stored(0) && is_stored(1) && !is_stored(2) && !is_stored(3));
    assert_int_equal(xkv_hook_cancel(hook, 1), 0); /* done */
    assert_sound();
}

static void saves_are_cancelled_while_they_are_packed(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    xkv_hook_saved saved = hold(&o, 0);
    save(1);
    assert_int_equal(xkv_hook_cancel(hook, saved.ticket), 1);
    assert_int_equal(xkv_hook_cancel(hook, saved.ticket), 0);
    assert_int_equal(save(0).outcome, XKV_SAVE_QUEUED); /* not the same as the one that ends */
    set_gate(UNLIMITED);
    flush();
    xkv_hook_counters c = counters();
    assert_int_equal(c.saves_cancelled + c.saves_stored, 3); /* stored: the last group was packed when it came */
    assert_true(is_stored(0) && is_stored(1));
    assert_sound();
}

static void saves_are_cancelled_while_they_wait_for_room(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    saver savers[2];
    o.queue_saves = 1;
    o.wait_ms = XKV_HOOK_FOREVER;
    hold(&o, 0);
    start_saver(&savers[0], 1, 1);
    start_saver(&savers[1], 2, 1);
    sleep_ms(50);
    assert_false(atomic_load(&savers[0].done) || atomic_load(&savers[1].done));
    xkv_ctx_cancel(savers[0].ctx); /* the caller's own */
    join_saver(&savers[0]);
    assert_int_equal(savers[0].status, XKV_ERROR_CANCELLED);
    while (!atomic_load(&savers[1].done)) { /* all, as soon as it waits */
        xkv_hook_cancel(hook, 0);
        sleep_ms(1);
    }
    join_saver(&savers[1]);
    assert_int_equal(savers[1].status, XKV_ERROR_CANCELLED);
    assert_int_equal(counters().saves_refused, 2);
    set_gate(UNLIMITED);
    flush();
    assert_false(is_stored(1) || is_stored(2));
    assert_sound();
}

/* The hook looks at the clock when it begins to copy and when it is done: then all saves are cancelled. */
static atomic_int cancel_at;

static uint64_t cancelling_clock(void *user)
{
    (void)user;
    if (atomic_fetch_sub(&cancel_at, 1) == 1)
        assert_int_equal(xkv_hook_cancel(hook, 0), 1);
    return 0;
}

static void saves_are_cancelled_while_they_are_copied(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    o.clock = cancelling_clock;
    open_hook(&o);
    for (int when = 1; when <= 2; when++) {
        cancel_at = when;
        assert_int_equal(save(0).outcome, XKV_SAVE_QUEUED);
        cancel_at = 0;
        flush();
        assert_int_equal(counters().saves_cancelled, when);
    }
    assert_int_equal(entries(), 0);
    save(0);
    flush();
    assert_int_equal(entries(), 1);
    assert_sound();
}

static void *open_gate_later(void *user)
{
    (void)user;
    sleep_ms(30);
    set_gate(UNLIMITED);
    return NULL;
}

/* Saves that wait and saves that are being packed; nothing of them is left (close_hook() looks). */
static void closing_cancels(void **state)
{
    (void)state;
    for (uint32_t savers = 1; savers <= 3; savers++) {
        xkv_hook_options o = hook_options();
        pthread_t opener;
        o.save_threads = savers;
        gate.arrived = 0;
        hold(&o, 10 * savers);
        for (uint64_t i = 1; i < 10; i++)
            save(10 * savers + i);
        wait_at_gate((int)savers);
        assert_int_equal(pthread_create(&opener, NULL, open_gate_later, NULL), 0);
        close_hook();
        pthread_join(opener, NULL);
    }
    xkv_hook_options o = hook_options();
    open_hook(&o);
    assert_sound();
}

/* --- Flushing ----------------------------------------------------------------------------------------------------- */

static void flushing_takes_no_longer_than_asked(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    hold(&o, 0);
    save(1);
    double start = seconds();
    assert_int_equal(xkv_hook_flush(t.ctx, hook, 120), XKV_ERROR_TIMEOUT);
    assert_true(seconds() - start > 0.11 && seconds() - start < 20);
    assert_string_equal(xkv_ctx_error(t.ctx), "2 saves are still on their way");
    assert_int_equal(xkv_hook_flush(t.ctx, hook, 0), XKV_ERROR_TIMEOUT);
    xkv_ctx_cancel(t.ctx);
    assert_int_equal(xkv_hook_flush(t.ctx, hook, XKV_HOOK_FOREVER), XKV_ERROR_CANCELLED);
    xkv_ctx_reset(t.ctx);
    set_gate(UNLIMITED);
    flush();
    assert_ok(t.ctx, xkv_hook_flush(t.ctx, hook, 0)); /* nothing to wait for */
    assert_true(is_stored(0) && is_stored(1));
}

static atomic_bool stop, wrong;

static void *save_on_and_on(void *user)
{
    xkv_ctx *ctx = new_ctx(1);
    (void)user;
    for (uint64_t i = 100; !atomic_load(&stop); i++) {
        if (save_with(ctx, i, NULL, NULL) != XKV_OK)
            atomic_store(&wrong, true);
    }
    xkv_ctx_free(ctx);
    return NULL;
}

/* Saves that come later do not prolong it, although there is always one on its way. */
static void flushing_waits_for_earlier_saves_only(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    pthread_t saving;
    o.queue_saves = 4;
    open_hook(&o);
    atomic_store(&stop, false);
    assert_int_equal(pthread_create(&saving, NULL, save_on_and_on, NULL), 0);
    for (int i = 0; i < 20; i++)
        assert_ok(t.ctx, xkv_hook_flush(t.ctx, hook, 20000));
    atomic_store(&stop, true);
    pthread_join(saving, NULL);
    assert_false(wrong);
}

/* --- Failures ----------------------------------------------------------------------------------------------------- */

static void failed_saves_are_counted_and_logged(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    xkv_hook_save_options with = xkv_hook_save_options_default();
    with.pin = 1;
    open_hook(&o);
    assert_ok(t.ctx, save_with(t.ctx, 0, &with, NULL));
    flush();
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, 4000, NULL));
    save(1); /* it does not fit beside what is pinned */
    flush();
    assert_int_equal(counters().saves_failed, 1);
    assert_int_equal(counters().saves_stored, 1);
    assert_non_null(strstr(last_log, "a prompt of 100 tokens was not saved: beyond a limit"));
    assert_sound();
}

/* Each allocation of the hook fails, one after another. */
static void memory_runs_out(void **state)
{
    (void)state;
    bool stored = false;
    long n = 0;
    while (!stored) {
        xkv_hook_options o = hook_options();
        allocations = 0;
        failing = ++n;
        xkv_status status = xkv_hook_create(t.ctx, t.store, &o, &hook);
        if (status == XKV_OK) {
            status = save_with(t.ctx, 0, NULL, NULL);
            flush();
            if (status == XKV_OK) {
                xkv_hook_counters c = counters();
                assert_int_equal(c.saves_stored + c.saves_failed, 1);
                stored = c.saves_stored == 1;
            } else {
                assert_int_equal(status, XKV_ERROR_MEMORY);
                assert_int_equal(counters().queue_bytes + counters().queue_saves, 0);
            }
            int found = look_up(t.ctx, hook, 0); /* fails in its turn, or is right */
            assert_true(found == 1 || (found == 0 && (!stored || allocations >= failing)));
            close_hook();
        } else if (status != XKV_ERROR_LIMIT) { /* no thread without a context */
            assert_int_equal(status, XKV_ERROR_MEMORY);
        }
        assert_int_equal(live_bytes, 0);
    }
    assert_true(n > 10);
    /* The save goes through; now the allocations of a match and a load. */
    for (bool loaded = false; !loaded; n++) {
        xkv_hook_options o = hook_options();
        failing = 0;
        open_hook(&o);
        allocations = 0;
        failing = n;
        loaded = look_up(t.ctx, hook, 0) == 1 && allocations < n;
        failing = 0;
        assert_true(is_stored(0)); /* nothing was put into quarantine */
        assert_int_equal(counters().loads_damaged, 0);
        close_hook();
        assert_true(n < 1000);
    }
    xkv_hook_options o = hook_options();
    open_hook(&o);
    assert_sound();
}

/* --- Many threads ------------------------------------------------------------------------------------------------- */

enum { THREADS = 6, PROMPTS = 40 };

static atomic_ullong saves, matches;

static void *mixed_load(void *user)
{
    uint64_t random = (uint64_t)(uintptr_t)user;
    xkv_ctx *ctx = new_ctx(1);
    while (!atomic_load(&stop)) {
        uint64_t number = test_random(&random) % PROMPTS;
        xkv_hook_counters c;
        switch (test_random(&random) % 16) {
        case 0:
            (void)!xkv_hook_flush(ctx, hook, 5);
            break;
        case 1:
            xkv_hook_get_counters(hook, &c);
            xkv_hook_cancel(hook, c.saves_queued - test_random(&random) % 3);
            break;
        case 2:
        case 3:
        case 4:
        case 5:
        case 6:
        case 7:
            atomic_fetch_add(&saves, 1);
            if (save_with(ctx, number, NULL, NULL) != XKV_OK)
                atomic_store(&wrong, true);
            break;
        default:
            atomic_fetch_add(&matches, 1);
            if (look_up(ctx, hook, number) == -1)
                atomic_store(&wrong, true);
        }
    }
    xkv_ctx_free(ctx);
    return NULL;
}

/* A store with room for half of the prompts, so that entries come and go all the time. */
static void many_threads_at_once(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    pthread_t threads[THREADS];
    o.save_threads = 2;
    o.queue_saves = 5;
    o.queue_bytes = 4 * COPY_BYTES;
    open_hook(&o);
    save(0);
    flush();
    xkv_store_stats s;
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    uint64_t each = s.bytes;
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, each * PROMPTS / 2, NULL));
    atomic_store(&stop, false);
    saves = 1;
    matches = 0;
    for (uintptr_t i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, mixed_load, (void *)(i + 1)), 0);
    xkv_hook_counters c = counters();
    double end = seconds() + (getenv("XKV_LONG_TESTS") != NULL ? 600 : 2);
    while (seconds() < end || c.saves_stored < 20 || c.loads_ok < 20) {
        sleep_ms(20);
        c = counters();
        assert_true(c.queue_saves <= o.queue_saves && c.queue_bytes <= o.queue_bytes);
        assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
        assert_true(s.bytes <= s.byte_cap);
    }
    atomic_store(&stop, true);
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    assert_false(wrong);
    flush();
    c = counters();
    assert_int_equal(c.saves_queued + c.saves_known + c.saves_pending + c.saves_dropped + c.saves_refused, saves);
    assert_int_equal(c.matches_found + c.misses_none + c.misses_short + c.misses_gone + c.matches_failed, matches);
    assert_int_equal(c.matches_found, c.loads_ok);
    assert_int_equal(c.matches_failed + c.saves_refused + c.loads_damaged + c.loads_failed, 0);
    assert_sound();
}

/* Several threads load one hit at once. */
static xkv_hook_hit *shared_hit;

static void *load_shared(void *user)
{
    int32_t tokens[SIZE];
    xkv_ctx *ctx = new_ctx(1);
    (void)user;
    make_tokens(0, 50000, tokens, SIZE);
    rows *expected = make_rows(tokens, SIZE - 1);
    for (int i = 0; i < 20; i++) {
        rows *got = make_rows(NULL, SIZE - 1);
        if (xkv_hook_load(ctx, shared_hit, &got->geometry, got->views, NULL) != XKV_OK ||
            memcmp(expected->data, got->data, sizeof got->data) != 0)
            atomic_store(&wrong, true);
        free(got);
    }
    free(expected);
    xkv_ctx_free(ctx);
    return NULL;
}

static void one_hit_serves_many_threads(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    pthread_t threads[THREADS];
    int32_t tokens[SIZE];
    xkv_hook_found f;
    open_hook(&o);
    save(0);
    flush();
    make_tokens(0, 50000, tokens, SIZE);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
    assert_ok(t.ctx, xkv_hook_match(t.ctx, hook, &ns, &prompt, NULL, &f, &shared_hit));
    assert_int_equal(f.tokens, SIZE - 1);
    for (size_t i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, load_shared, NULL), 0);
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    assert_false(wrong);
    assert_int_equal(counters().loads_ok, 20 * THREADS);
    xkv_hook_hit_close(shared_hit);
}

/* --- Two processes ------------------------------------------------------------------------------------------------ */

enum { ROUNDS = 150 };

static int complain(const char *what)
{
    fprintf(stderr, "process %d, %s: %s\n", (int)getpid(), what, xkv_ctx_error(t.ctx));
    return -1;
}

/* Save and load prompts in turn; how many came from the store, -1 when something went wrong. */
static int take_part(uint64_t seed)
{
    xkv_hook_options o = hook_options();
    int loaded = 0;
    o.wait_ms = XKV_HOOK_FOREVER;
    if (xkv_store_open(t.ctx, t.path, NULL, &t.store) != XKV_OK)
        return complain("open");
    if (xkv_hook_create(t.ctx, t.store, &o, &hook) != XKV_OK)
        return complain("hook");
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t number = test_random(&seed) % PROMPTS;
        int found = look_up(t.ctx, hook, number);
        if (found < 0)
            return complain("wrong rows");
        loaded += found;
        if (found == 0 && save_with(t.ctx, number, NULL, NULL) != XKV_OK)
            return complain("save");
        if (i % 10 == 9 && xkv_hook_flush(t.ctx, hook, XKV_HOOK_FOREVER) != XKV_OK)
            return complain("flush");
    }
    return counters().saves_failed + counters().loads_failed + counters().loads_damaged == 0 ? loaded
                                                                                             : complain(last_log);
}

static void two_processes_share_a_store(void **state)
{
    (void)state;
    int status;
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    pid_t child = fork(); /* before anything is opened */
    assert_true(child >= 0);
    if (child == 0) {
        int loaded = take_part(1);
        xkv_hook_close(hook);
        xkv_store_close(t.ctx, t.store);
        _exit(loaded > 0 ? 0 : 1);
    }
    assert_true(take_part(2) > 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    for (uint64_t i = 0; i < PROMPTS; i++)
        is_stored(i);
    assert_true(entries() > PROMPTS / 2 && entries() <= PROMPTS);
    assert_sound();
}

/* --- After fork() ------------------------------------------------------------------------------------------------- */

static void a_child_is_told_to_open_its_own(void **state)
{
    (void)state;
    xkv_hook_options o = hook_options();
    int status;
    open_hook(&o);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        xkv_ctx *ctx = new_ctx(1);
        bool refused = xkv_hook_flush(ctx, hook, 0) == XKV_ERROR_ARGUMENT &&
                       save_with(ctx, 0, NULL, NULL) == XKV_ERROR_ARGUMENT &&
                       strstr(xkv_ctx_error(ctx), "fork()") != NULL && look_up(ctx, hook, 0) == 0;
        _exit(refused ? 0 : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(two_processes_share_a_store), /* first: this process has no other threads yet */
        TEST(any_view_is_copied),
        TEST(media_and_keys_are_copied),
        TEST(wrong_saves_are_refused),
        TEST(known_prompts_cost_nothing),
        TEST(pins_and_lifetimes_are_renewed),
        TEST(options_of_equal_saves_are_kept),
        TEST(a_full_queue_drops),
        TEST(a_full_queue_waits_as_long_as_asked),
        TEST(back_pressure_bounds_memory),
        TEST(what_never_fits_is_refused),
        TEST(equal_saves_wait_together),
        TEST(saves_are_cancelled_while_they_wait),
        TEST(saves_are_cancelled_while_they_are_packed),
        TEST(saves_are_cancelled_while_they_wait_for_room),
        TEST(saves_are_cancelled_while_they_are_copied),
        TEST(closing_cancels),
        TEST(flushing_takes_no_longer_than_asked),
        TEST(flushing_waits_for_earlier_saves_only),
        TEST(failed_saves_are_counted_and_logged),
        TEST(memory_runs_out),
        TEST(one_hit_serves_many_threads),
        TEST(many_threads_at_once),
        TEST(a_child_is_told_to_open_its_own),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
