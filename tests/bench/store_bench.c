/* store_bench.c - how long a lookup takes, as one JSON document: among many synthetic entries, beside a bare mdb_get
 * and a bare SHA-256 pass over the same tokens.
 *
 *     xkv_store_bench [ENTRIES [FOLDER]]        default: 1000000, a new folder in $TMPDIR or /tmp
 *
 * Prompts of 64 to 32,768 tokens in 16 namespaces; those of one namespace begin with one of 61 shared prefixes. All are
 * in the index; those that are looked up have blobs, whose tokens are read and compared. */
#include "sha256.h"
#include "store_internal.h"

#include <jansson.h>
#include <lmdb.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { SPACES = 16, GROUPS = 61, SHARED = 2048, TARGETS = 500, BATCH = 5000, LONGEST = 32768 };

static const uint32_t query_sizes[] = {64, 256, 1024, 4096, 16384, 32768};
enum { SIZES = sizeof query_sizes / sizeof *query_sizes };

static void die(const char *what, const char *why)
{
    (void)fprintf(stderr, "xkv_store_bench: %s: %s\n", what, why);
    exit(1);
}

static void need(xkv_ctx *ctx, xkv_status status, const char *what)
{
    if (status != XKV_OK)
        die(what, xkv_ctx_error(ctx));
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- Synthetic prompts -------------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Every TARGETS-th of the entries is looked up; those are long. */
typedef struct layout {
    uint64_t entries, stride;
} layout;

static bool is_target(const layout *l, uint64_t i)
{
    return i % l->stride == 0 && i / l->stride < TARGETS;
}

/* Targets share prefixes with each other only: whatever serves a query has a blob. */
static uint64_t group_of(const layout *l, uint64_t i)
{
    return i / SPACES % GROUPS * SPACES + i % SPACES + (is_target(l, i) ? GROUPS * SPACES : 0);
}

static uint32_t shared_of(const layout *l, uint64_t i)
{
    return 16 + (uint32_t)(mix(group_of(l, i)) % (SHARED - 16));
}

static uint32_t size_of(const layout *l, uint64_t i)
{
    double u = (double)(mix(i * 3 + 1) >> 11) / 9007199254740992.0;
    if (is_target(l, i))
        return i / l->stride % 10 == 0 ? LONGEST : 4096 + (uint32_t)(4096 * u);
    uint32_t size = (uint32_t)(64 * pow(LONGEST / 64.0, u)), least = shared_of(l, i) + 16;
    return size > least ? size : least;
}

static uint32_t token_of(const layout *l, uint64_t i, uint32_t at)
{
    uint64_t seed = at < shared_of(l, i) ? group_of(l, i) : i + (1u << 20);
    return (uint32_t)(mix(seed * 0x9e3779b97f4a7c15u + at) % 50000);
}

static xkv_namespace space_of(uint64_t i)
{
    xkv_namespace_fields f = xkv_namespace_fields_default();
    xkv_namespace ns;
    char settings[16];
    snprintf(settings, sizeof settings, "%u", (unsigned)(i % SPACES));
    f.settings = settings;
    if (xkv_namespace_make(NULL, &f, &ns) != XKV_OK)
        die("namespace", "failed");
    return ns;
}

/* --- Filling ------------------------------------------------------------------------------------------------------ */

typedef struct filler {
    xkv_store *store;
    layout l;
    uint64_t first, last; /* entries of this transaction */
    uint64_t *owner;      /* [entries + 1] number of the entry with an id */
    uint32_t *symbols;    /* [LONGEST] */
} filler;

static xkv_common common_with(const filler *f, uint64_t i, uint64_t other)
{
    xkv_common c = {0};
    uint32_t a = size_of(&f->l, i), b = size_of(&f->l, other);
    while (c.count < a && c.count < b && token_of(&f->l, i, c.count) == token_of(&f->l, other, c.count))
        c.count++;
    c.other = c.count < b ? token_of(&f->l, other, c.count) : 0;
    return c;
}

/* A blob with the prompt's tokens and a payload of no meaning, which a lookup does not read. */
static void write_blob(xkv_ctx *ctx, filler *f, uint64_t i, xkv_item *item)
{
    xkv_blob_head head = {.kind = XKV_BLOB_ENTRY, .tokens = item->tokens, .symbols = item->symbols};
    xkv_blob_writer w;
    for (uint32_t at = 0; at < item->symbols; at++)
        f->symbols[at] = token_of(&f->l, i, at);
    memcpy(head.space, item->space, 32);
    memcpy(head.key, item->key, 32);
    need(ctx, xkv_blob_begin(ctx, &f->store->folders, NULL, item->symbols, 0, NULL, &w), "blob");
    xkv_output output = xkv_blob_output(&w);
    need(ctx, output.write(output.user, ctx, 0, "payload", 8), "blob");
    need(ctx, xkv_blob_finish(ctx, &w, &head, f->symbols, NULL), "blob");
    need(ctx, xkv_blob_publish(ctx, &w, item->id), "blob");
    memcpy(item->blob, w.hash, 32);
    item->file_size = head.file_size;
    xkv_blob_end(ctx, &w, true);
}

static xkv_status fill_body(xkv_txn *txn, xkv_meta *meta, xkv_change *change)
{
    filler *f = change->user;
    for (uint64_t i = f->first; i < f->last; i++) {
        const xkv_namespace ns = space_of(i);
        uint32_t size = size_of(&f->l, i);
        xkv_item item = {.id = meta->next_id++, .tokens = size, .symbols = size, .raw_bytes = size, .used = i + 1};
        xkv_common c = {0};
        xkv_space space;
        uint64_t id = 0;
        memcpy(item.space, ns.id, 32);
        for (size_t at = 0; at < 32; at += 8)
            xkv_store64(item.key + at, mix(i * 4 + at));
        if (is_target(&f->l, i))
            write_blob(xkv_txn_ctx(txn), f, i, &item);
        for (uint32_t at = 0; at < size && at < SHARED + 64; at++)
            f->symbols[at] = token_of(&f->l, i, at);
        if (xkv_txn_get_space(txn, ns.id, &space) == XKV_OK &&
            xkv_trie_find(txn, space.root, f->symbols, size, &id) == XKV_OK)
            c = common_with(f, i, f->owner[id]);
        if (c.count == size)
            continue; /* a prefix of another one, which serves it */
        f->owner[item.id] = i;
        XKV_TRY(xkv_entry_insert_known(txn, meta, f->symbols, NULL, &c, &item));
    }
    return XKV_OK;
}

static void fill(xkv_ctx *ctx, filler *f)
{
    for (f->first = 0; f->first < f->l.entries; f->first = f->last) {
        xkv_change change = {.store = f->store, .body = fill_body, .user = f};
        f->last = f->first + BATCH < f->l.entries ? f->first + BATCH : f->l.entries;
        need(ctx, xkv_store_change(ctx, &change), "filling the index");
    }
}

/* --- Measuring ---------------------------------------------------------------------------------------------------- */

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static json_t *percentiles(double *times, size_t count)
{
    double sum = 0;
    qsort(times, count, sizeof *times, compare);
    for (size_t i = 0; i < count; i++)
        sum += times[i];
    return json_pack("{s:f, s:f, s:f, s:f, s:f}", "p50_us", 1e6 * times[count / 2], "p90_us",
                     1e6 * times[count * 9 / 10], "p99_us", 1e6 * times[count * 99 / 100], "max_us",
                     1e6 * times[count - 1], "mean_us", 1e6 * sum / (double)count);
}

/* A query of `size` tokens: all but the last one of them, or all that there are, are those of a target. */
static uint32_t make_query(const layout *l, uint64_t target, uint32_t size, int32_t *tokens)
{
    uint64_t i = target * l->stride;
    uint32_t stored = size_of(l, i);
    for (uint32_t at = 0; at < size; at++)
        tokens[at] = (int32_t)(at < stored ? token_of(l, i, at) : mix(at) % 50000);
    tokens[size - 1] = 50001;
    return stored < size - 1 ? stored : size - 1;
}

enum { ROUNDS = 8 };

static json_t *measure_lookups(xkv_ctx *ctx, const filler *f, uint32_t size, double *times, int32_t *tokens)
{
    size_t count = 0;
    for (uint64_t round = 0; round < ROUNDS; round++)
        for (uint64_t target = 0; target < TARGETS; target++) {
            uint64_t which = (target * 7919 + round * 31) % TARGETS;
            if (which * f->l.stride >= f->l.entries)
                continue;
            uint32_t expected = make_query(&f->l, which, size, tokens);
            const xkv_namespace ns = space_of(which * f->l.stride);
            const xkv_prompt prompt = {.tokens = tokens, .token_count = size};
            xkv_match m;
            xkv_hit *hit = NULL;
            double start = now();
            need(ctx, xkv_store_match(ctx, f->store, &ns, &prompt, 0, &m, &hit), "match");
            double seconds = now() - start;
            xkv_hit_close(ctx, hit);
            if (round > 0) /* the first one warms */
                times[count++] = seconds;
            if (m.tokens < expected && m.reason == XKV_MATCH_FOUND)
                die("match", "found less than is stored");
            if (m.reason != XKV_MATCH_FOUND)
                die("match", "found nothing");
        }
    json_t *object = percentiles(times, count);
    json_object_set_new(object, "tokens", json_integer(size));
    return object;
}

typedef struct bare {
    uint64_t ids[4096];
    size_t count;
    double *times;
} bare;

/* The record of an entry, by the same library: what one read of the index costs. */
static xkv_status bare_gets(xkv_txn *txn, void *user)
{
    bare *b = user;
    for (size_t i = 0; i < b->count; i++) {
        xkv_item item;
        double start = now();
        XKV_TRY(xkv_txn_get_item(txn, b->ids[i], &item));
        b->times[i] = now() - start;
    }
    return XKV_OK;
}

static json_t *measure_gets(xkv_ctx *ctx, const filler *f, double *times)
{
    bare *b = calloc(1, sizeof *b);
    for (uint64_t i = 0; b != NULL && b->count < 4096 && i < 100000; i++) {
        uint64_t id = 1 + mix(i) % f->l.entries;
        if (f->owner[id] != 0)
            b->ids[b->count++] = id;
    }
    if (b == NULL || b->count == 0)
        die("mdb_get", "no entries");
    b->times = times;
    need(ctx, xkv_index_read(ctx, f->store->index, bare_gets, b), "mdb_get");
    need(ctx, xkv_index_read(ctx, f->store->index, bare_gets, b), "mdb_get");
    json_t *object = percentiles(times, b->count);
    free(b);
    return object;
}

/* The chain over the same tokens, which a lookup by block hashes needs before it can begin. */
static json_t *measure_sha(xkv_ctx *ctx, const filler *f, uint32_t size, double *times, int32_t *tokens)
{
    xkv_page_key *keys = calloc(LONGEST / 256, sizeof *keys);
    const xkv_namespace ns = space_of(0);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = size};
    if (keys == NULL)
        die("sha", "no memory");
    make_query(&f->l, 0, size, tokens);
    for (size_t i = 0; i < 1000; i++) {
        double start = now();
        need(ctx, xkv_chain_native(ctx, &ns, &prompt, 256, keys), "chain");
        times[i] = now() - start;
    }
    free(keys);
    json_t *object = percentiles(times, 1000);
    json_object_set_new(object, "tokens", json_integer(size));
    return object;
}

static json_t *measure_open(xkv_ctx *ctx, filler *f, const char *path)
{
    double seconds[2];
    for (uint32_t trust = 0; trust < 2; trust++) {
        xkv_store_options o = xkv_store_options_default();
        o.trust_index = trust;
        xkv_store_close(ctx, f->store);
        double start = now();
        need(ctx, xkv_store_open(ctx, path, &o, &f->store), "open");
        seconds[trust] = now() - start;
    }
    return json_pack("{s:f, s:f}", "checked_s", seconds[0], "trusting_s", seconds[1]);
}

static json_t *measure_all(xkv_ctx *ctx, filler *f, const char *path)
{
    double *times = calloc(ROUNDS * TARGETS + 4096, sizeof *times);
    int32_t *tokens = calloc(LONGEST, sizeof *tokens);
    json_t *lookups = json_array(), *chains = json_array();
    xkv_store_stats s;
    if (times == NULL || tokens == NULL)
        die("measuring", "no memory");
    json_t *opening = measure_open(ctx, f, path);
    for (size_t i = 0; i < SIZES; i++) {
        json_array_append_new(lookups, measure_lookups(ctx, f, query_sizes[i], times, tokens));
        json_array_append_new(chains, measure_sha(ctx, f, query_sizes[i], times, tokens));
    }
    json_t *gets = measure_gets(ctx, f, times);
    need(ctx, xkv_store_get_stats(ctx, f->store, &s), "stat");
    json_t *document = json_pack("{s:I, s:I, s:i, s:o, s:o, s:o, s:o}", "entries", (json_int_t)s.entries, "index_bytes",
                                 (json_int_t)s.index_bytes, "namespaces", (int)s.namespaces, "lookup", lookups,
                                 "mdb_get", gets, "sha256_chain", chains, "open", opening);
    free(times);
    free(tokens);
    return document;
}

static void make_folder(char path[4096], const char *given)
{
    const char *base = getenv("TMPDIR");
    if (given != NULL)
        snprintf(path, 4096, "%s", given);
    else
        snprintf(path, 4096, "%s/xkv-store-bench-%ld", base != NULL ? base : "/tmp", (long)getpid());
}

static void remove_store(const char *path)
{
    char command[4200];
    snprintf(command, sizeof command, "rm -rf '%s'", path);
    if (strchr(path, '\'') == NULL && system(command) != 0) // NOLINT(cert-env33-c)
        die(path, "cannot be removed");
}

int main(int argc, char **argv)
{
    filler f = {.l = {.entries = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000000}};
    char path[4096];
    xkv_ctx *ctx = NULL;
    f.l.stride = f.l.entries / TARGETS > 0 ? f.l.entries / TARGETS : 1;
    make_folder(path, argc > 2 ? argv[2] : NULL);
    f.owner = calloc(f.l.entries + 2, sizeof *f.owner);
    f.symbols = calloc(LONGEST, sizeof *f.symbols);
    if (f.owner == NULL || f.symbols == NULL || xkv_ctx_create(NULL, &ctx) != XKV_OK)
        die("start", "no memory");
    need(ctx, xkv_store_create(ctx, path, NULL), "create");
    need(ctx, xkv_store_open(ctx, path, NULL, &f.store), "open");
    double start = now();
    fill(ctx, &f);
    double seconds = now() - start;
    json_t *document = measure_all(ctx, &f, path);
    json_object_set_new(document, "fill_s", json_real(seconds));
    xkv_store_close(ctx, f.store);
    remove_store(path);
    json_dumpf(document, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(6));
    putchar('\n');
    json_decref(document);
    free(f.owner);
    free(f.symbols);
    xkv_ctx_free(ctx);
    return 0;
}
