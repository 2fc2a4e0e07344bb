/*
 * xkv/store.h - a folder of packed prefixes: put one, find the longest stored prefix of a prompt, restore it.
 *
 * A store is embedded, as SQLite and LMDB are: a library over a folder, used by any number of processes and threads at
 * once, without a server. What is committed survives a killed process and a power cut; the index can be rebuilt from
 * the blobs. spec/store.md has the files and their rules.
 *
 *   xkv_namespace   whose prefixes: model, cache settings, adapter, tenant. Prompts never match across namespaces
 *   xkv_prompt      tokens, and the identities of images and the like among them
 *   xkv_store       the opened folder
 *   xkv_hit         a stored entry that serves a prefix of the prompt asked for, safe from eviction while it is open
 *
 * What is protected: a damaged, foreign or half-written file is never handed out as data. What is not: a cache is as
 * good as the text of its prompt, and lies in the folder unencrypted unless the store was made with a key, readable by
 * its owner (modes 0600 and 0700). The index, which is never encrypted, holds hashes of prompts and single tokens.
 */
#ifndef XKV_STORE_H
#define XKV_STORE_H

#include "xkv/codec.h"

#ifdef __cplusplus
extern "C" {
#endif

/* --- Namespaces and prompts ----------------------------------------------------------------------------------------
 */

/* SHA-256 of what tells caches apart (spec/store.md, section 3). */
typedef struct xkv_namespace {
    uint8_t id[32];
} xkv_namespace;

typedef struct xkv_namespace_fields {
    size_t struct_size;
    const uint8_t *fingerprint; /* [16] of the model; NULL: none */
    const char *settings;       /* whatever else makes caches differ: dtype, context length, ...; NULL: "" */
    const char *lora;           /* adapter; NULL: "" */
    const void *salt;           /* secret of the tenant; without it nothing of the namespace can be found or listed */
    size_t salt_size;           /* bytes; 0: no salt */
} xkv_namespace_fields;

static inline xkv_namespace_fields xkv_namespace_fields_default(void)
{
    xkv_namespace_fields f;
    memset(&f, 0, sizeof f);
    f.struct_size = sizeof f;
    return f;
}

/* Errors: ARGUMENT, LIMIT (a field of 2^32 bytes or more). */
XKV_API XKV_MUST_CHECK xkv_status xkv_namespace_make(xkv_ctx *ctx, const xkv_namespace_fields *fields,
                                                     xkv_namespace *ns);

/* Something that is not a token, such as an image: prompts that agree in their (placeholder) tokens but not in this
 * identity share only what comes before it. */
typedef struct xkv_media {
    uint32_t first_token; /* it lies before this token */
    const void *id;       /* its identity, for example a hash of the pixels */
    size_t id_size;       /* bytes, > 0 */
} xkv_media;

typedef struct xkv_prompt {
    const int32_t *tokens; /* [token_count], each >= 0 */
    uint32_t token_count;
    const xkv_media *media; /* [media_count] in order of first_token */
    uint32_t media_count;
} xkv_prompt;

/* Name of a run of leading tokens in an engine's own scheme: a vLLM block hash, an SGLang page hash, or any 32 bytes
 * that stand for everything from the start of the prompt to `tokens`. */
typedef struct xkv_page_key {
    uint8_t key[32];
    uint32_t tokens;
} xkv_page_key;

/* xkv's own chain (spec/store.md, section 4): keys [ceil(token_count / block_tokens)], one for each block, the last
 * one, which names the whole prompt, perhaps for a shorter block. Errors: ARGUMENT, MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_chain_native(xkv_ctx *ctx, const xkv_namespace *ns, const xkv_prompt *prompt,
                                                   uint32_t block_tokens, xkv_page_key *keys);

/* SGLang's chain over full pages: keys [token_count / page_tokens]. */
XKV_API XKV_MUST_CHECK xkv_status xkv_chain_sglang(xkv_ctx *ctx, const int32_t *tokens, uint32_t token_count,
                                                   uint32_t page_tokens, xkv_page_key *keys);

/* vLLM's chain of algorithm sha256_cbor over full blocks, without extra keys: keys [token_count / block_tokens].
 * `seed`: the text of PYTHONHASHSEED that NONE_HASH is made from, as vLLM before its fixed default. */
XKV_API XKV_MUST_CHECK xkv_status xkv_chain_vllm(xkv_ctx *ctx, const char *seed, const int32_t *tokens,
                                                 uint32_t token_count, uint32_t block_tokens, xkv_page_key *keys);

/* --- Opening -------------------------------------------------------------------------------------------------------
 */

/* Threads: shared by all, each call with its own context. A folder is opened once in a process; not across fork(). */
typedef struct xkv_store xkv_store;

typedef enum xkv_store_access {
    XKV_STORE_READ_WRITE = 0,
    XKV_STORE_READ_ONLY = 1, /* neither uses nor counters are recorded, and what is expired or damaged stays */
    XKV_STORE_AUTO = 2       /* read-only where the file system is */
} xkv_store_access;

typedef struct xkv_store_options {
    size_t struct_size;
    uint32_t access;               /* xkv_store_access; default READ_WRITE */
    uint32_t trust_index;          /* non-zero: leave out the check of every index page on opening (spec, section 7) */
    uint64_t map_size;             /* bytes of address space for the index at first, it grows by itself; 0: 1 GiB */
    const uint8_t *key;            /* [32] of an encrypted store, copied; NULL: it is not encrypted */
    uint64_t (*clock)(void *user); /* microseconds since 1970; NULL: the system's */
    void *clock_user;
} xkv_store_options;

static inline xkv_store_options xkv_store_options_default(void)
{
    xkv_store_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

typedef struct xkv_store_properties {
    size_t struct_size;
    uint32_t block_tokens; /* of the native chain, 1 .. 65536; default 256; fixed for ever */
    uint64_t byte_cap;  /* of all blobs; 0: none (default). Beside it: one blob, or a sixteenth of it, in quarantine */
    const uint8_t *key; /* [32] random bytes: encrypt all blobs with it; NULL: do not (default); fixed for ever */
} xkv_store_properties;

static inline xkv_store_properties xkv_store_properties_default(void)
{
    xkv_store_properties p;
    memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    p.block_tokens = 256;
    return p;
}

/* Make a store at `path`, a folder that does not exist or is empty. `properties` may be NULL.
 * Errors: ARGUMENT, EXISTS, IO, NO_SPACE, MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_create(xkv_ctx *ctx, const char *path,
                                                   const xkv_store_properties *properties);

/* Open the store at `path`; what killed processes left behind is removed. `options` may be NULL.
 * Errors: FORMAT (no store), VERSION, CORRUPT and CHECKSUM (xkv_store_repair() helps), IO (also for symbolic links and
 * folders that others can write to), ARGUMENT (already open in this process), LIMIT, MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_open(xkv_ctx *ctx, const char *path, const xkv_store_options *options,
                                                 xkv_store **store_p);

/* Writes uses and counters that are not yet recorded. All hits must be closed. Accepts NULL. */
XKV_API void xkv_store_close(xkv_ctx *ctx, xkv_store *store);

/* --- Putting -------------------------------------------------------------------------------------------------------
 */

typedef struct xkv_put_options {
    size_t struct_size;
    uint64_t ttl;             /* seconds until the entry expires; 0: never (default) */
    uint32_t pin;             /* non-zero: never evicted until unpinned */
    const xkv_page_key *keys; /* [key_count] names in an engine's scheme: of every page from the first one on */
    uint32_t key_count;
    const xkv_pack_options *pack; /* for xkv_store_put_planes(); NULL: defaults */
    uint32_t whole; /* non-zero: xkv_store_put_planes() stores all tokens, also those of a stored prefix (default 0) */
} xkv_put_options;

static inline xkv_put_options xkv_put_options_default(void)
{
    xkv_put_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

typedef struct xkv_put_report {
    uint64_t id;      /* of the entry */
    uint32_t existed; /* non-zero: the very prompt was stored already; its use, pin and ttl were renewed, no more.
                         An entry without the keys of this put is replaced instead */
    uint32_t tokens;
    uint64_t bytes;           /* of the blob */
    uint32_t evicted_entries; /* to make room; a put that fails may have evicted some, too */
    uint64_t evicted_bytes;   /* of them */
    xkv_pack_report pack;     /* xkv_store_put_planes() that packed; else zero. Of the tokens from base_tokens on */
    uint64_t parent;          /* the entry that this one extends; 0: none, all tokens were stored */
    uint32_t base_tokens;     /* tokens that it takes from there */
} xkv_put_report;

/* Store a packed entry (.xkv) under the prompt that made it. `prompt` NULL: the token ids in the entry. The prompt has
 * at most as many tokens as the entry has rows; token ids in the entry must agree with it. On return the entry is on
 * disk. `options` and `report` may be NULL.
 * Errors: ARGUMENT, MISMATCH (tokens or model differ; the entry's dictionary is not in the store), UNSUPPORTED (an
 * entry without rows), VERSION and FEATURE (also: the nearest prompt is in an entry that only a newer program can
 * read), LIMIT (larger than what the byte cap leaves beside what is pinned or being read), NO_SPACE, IO,
 * MEMORY, CANCELLED, those of xkv_entry_open(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_put(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                                                const xkv_prompt *prompt, const xkv_input *entry,
                                                const xkv_put_options *options, xkv_put_report *report);

/* Pack planes straight into the store: the arguments are those of xkv_pack(). The dictionary of the pack options must
 * be in the store. Errors: also those of xkv_pack().
 *
 * Where another entry begins like the prompt, only the chunks that follow are packed, and the new entry extends that
 * one: it is found, restored and removed like any other, and keeps the other one from eviction and expiry. That is done
 * when at least half of the other entry is shared, both caches have the same planes and positions, and the shared rows
 * are as good as asked for: they are lossless, or coded with the dictionary of the pack options at the step of their
 * quality or within their error; a ratio, ranks and an energy are kept for the whole, which is then stored. Extending
 * is the default since it costs no quality, and bytes in proportion to what is new; `whole` is for entries that shall
 * not depend on others. Rows are packed from `views` and not again later, so that loss does not add up. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_put_planes(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                                                       const xkv_prompt *prompt, const xkv_geometry *geometry,
                                                       const xkv_view *views, const xkv_framing *framing,
                                                       const void *source, uint64_t source_size,
                                                       const xkv_put_options *options, xkv_put_report *report);

/* Store a dictionary (.xkvd), once for each id; one whose blob is damaged or missing is replaced. `id` (may be NULL)
 * gets it. Errors: as xkv_store_put(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_put_dict(xkv_ctx *ctx, xkv_store *store, const xkv_input *dictionary,
                                                     uint8_t id[16]);

/* --- Finding -------------------------------------------------------------------------------------------------------
 */

typedef enum xkv_match_reason {
    XKV_MATCH_FOUND = 0,
    XKV_MATCH_NONE = 1,          /* no entry begins with the first token, or the namespace is empty */
    XKV_MATCH_SHORT = 2,         /* the longest common prefix is shorter than asked for */
    XKV_MATCH_EXPIRED = 3,       /* the best entry outlived its ttl */
    XKV_MATCH_NO_DICTIONARY = 4, /* the best entry needs a dictionary that is not in the store */
    XKV_MATCH_CORRUPT = 5,       /* the best entry or its record is damaged; it was put into quarantine */
    XKV_MATCH_GONE = 6,          /* the best entry is just being removed */
    XKV_MATCH_NEWER = 7,         /* the best entry can be read by a newer program only; it stays */
    XKV_MATCH_WHOLE_ONLY = 8 /* the best entry can be restored only as a whole, and the prompt parts from it before */
} xkv_match_reason;

typedef struct xkv_match {
    uint32_t reason;       /* xkv_match_reason */
    uint32_t tokens;       /* leading tokens of the prompt that can be restored; 0 unless FOUND */
    uint32_t entry_tokens; /* of the entry that serves them */
    uint32_t keys;         /* xkv_store_match_keys(): leading keys that are stored */
    uint64_t id;           /* of the entry; also for EXPIRED, NO_DICTIONARY, CORRUPT, GONE, NEWER and WHOLE_ONLY when it
                              is known */
    uint64_t bytes;        /* of the entry's blob, and of its share of those that it extends */
    uint64_t raw_bytes;    /* of the matched tokens, as the engine holds them */
    uint32_t whole_only;   /* non-zero: fewer of these tokens cannot be restored to the engine's file (a window that has
                              slid); they are then all of the entry's */
} xkv_match;

typedef struct xkv_hit xkv_hit;

/* Find the entry with the longest common prefix with `prompt`, compared token by token, and keep it from eviction, by
 * other processes too, until xkv_hit_close(). What cannot serve (expired, damaged, without its dictionary, longer
 * than the common prefix and only to be restored whole, ...) is stepped over; it is the reason of the miss if no other
 * entry serves. What is not FOUND is a miss: XKV_OK with the reason. `min_tokens`: shorter ones are misses. `hit_p` may
 * be NULL, only to ask: that is no use of the entry and counts neither as hit nor as miss. Errors: ARGUMENT, IO,
 * MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_match(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                                                  const xkv_prompt *prompt, uint32_t min_tokens, xkv_match *match,
                                                  xkv_hit **hit_p);

/* The same by an engine's keys: keys[i] names everything up to and with page i. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_match_keys(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                                                       const uint8_t (*keys)[32], uint32_t key_count, xkv_match *match,
                                                       xkv_hit **hit_p);

/* The entry by its id: FOUND, or a miss with EXPIRED, NO_DICTIONARY or NEWER. Counts nothing. Errors: NOT_FOUND (also
 * for another namespace's), FORMAT, CORRUPT, CHECKSUM and TRUNCATED (it was damaged and went into quarantine),
 * otherwise as xkv_store_match(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_get(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, uint64_t id,
                                                xkv_match *match, xkv_hit **hit_p);

/* The packed entry, opened with its dictionary attached; it lives until xkv_hit_close(). Not for two threads at once.
 * When it fails, or decoding does, call xkv_hit_reject(). Errors: those of xkv_entry_open(), LIMIT, MISMATCH (the
 * dictionary is gone, missing or damaged: then that goes into quarantine, and the entry stays). */
XKV_API XKV_MUST_CHECK xkv_status xkv_hit_entry(xkv_ctx *ctx, xkv_hit *hit, const xkv_entry **entry_p);

/* Restore planes, as xkv_entry_read(), of at most the matched tokens: options->token_count 0 means up to there. An
 * entry that turns out damaged goes into quarantine. On error nothing in the views may be used. */
XKV_API XKV_MUST_CHECK xkv_status xkv_hit_read(xkv_ctx *ctx, xkv_hit *hit, const xkv_read_options *options,
                                               const xkv_view *views);

/* Put the hit's entry into quarantine: it will not be found again. For data that could not be decoded; without effect
 * when it was for want of its dictionary. */
XKV_API void xkv_hit_reject(xkv_ctx *ctx, xkv_hit *hit);

/* With the context that it was made with, before the store is closed. Accepts NULL. */
XKV_API void xkv_hit_close(xkv_ctx *ctx, xkv_hit *hit);

/* --- Keeping -------------------------------------------------------------------------------------------------------
 */

/* One entry. */
typedef struct xkv_store_item {
    uint64_t id;
    uint32_t tokens;
    uint32_t pinned;
    uint64_t bytes, raw_bytes;       /* of the blob; of the cache as the engine holds it */
    uint64_t created, expires, used; /* microseconds since 1970; expires 0: never */
    uint32_t needs_dict;
    uint8_t dictionary_id[16];
    uint8_t key[32];                /* the last of the native chain */
    uint8_t blob[32];               /* hash of the blob file (spec/store.md, section 2) */
    uint64_t parent;                /* the entry that it extends; 0: none */
    uint32_t base_tokens, children; /* tokens that it takes from there; entries that extend it */
} xkv_store_item;

/* Call `item` for every entry of a namespace, in order of id; return non-zero from it to stop. Without the namespace,
 * hence without its salt, nothing is listed. Errors: CORRUPT, IO. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_list(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                                                 int (*item)(void *user, const xkv_store_item *item), void *user);

/* A pinned entry keeps those that it extends; removing one removes all that extend it, pinned ones too.
 * Errors of these: NOT_FOUND (no such id in the namespace), IO, NO_SPACE, CORRUPT. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_pin(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, uint64_t id,
                                                int pinned);
XKV_API XKV_MUST_CHECK xkv_status xkv_store_remove(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                                                   uint64_t id);
/* Remove all of a namespace, pinned ones too; *removed entries (may be NULL). */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_remove_namespace(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns,
                                                             uint64_t *removed);

/* Sums over the life of the store; those of this process that are not yet recorded are included. */
typedef struct xkv_store_stats {
    uint32_t block_tokens;
    uint32_t read_only;
    uint64_t byte_cap, bytes;                           /* cap; of all blobs, dictionaries included */
    uint64_t entries, pinned, namespaces, dictionaries; /* now there */
    uint64_t index_bytes, map_bytes;                    /* pages of the index in use; its address space */
    uint64_t quarantined, quarantined_bytes;            /* blobs now in quarantine, which the cap does not count */
    uint64_t puts, hits, misses, evictions, expirations, corrupt;
    uint64_t tokens_reused; /* matched, over all hits */
    uint64_t bytes_reused;  /* raw bytes of the caches that these tokens stand for */
    uint64_t extending;     /* entries now there that extend others */
    uint64_t bytes_shared;  /* raw bytes of the tokens that these need not store */
} xkv_store_stats;
XKV_API XKV_MUST_CHECK xkv_status xkv_store_get_stats(xkv_ctx *ctx, xkv_store *store, xkv_store_stats *stats);

typedef struct xkv_collect_report {
    uint64_t expired, evicted; /* entries */
    uint64_t freed_bytes;      /* of all that was removed */
    uint64_t orphans;          /* blobs that no record knew */
    uint64_t leftovers;        /* temporary files of killed processes */
    uint64_t dictionaries;     /* that no entry needs; only with `unused_dicts` */
} xkv_collect_report;

/* Change the byte cap, and evict down to it as far as entries are neither pinned nor being read. `report` (may be NULL)
 * gets what was evicted and freed. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_set_cap(xkv_ctx *ctx, xkv_store *store, uint64_t byte_cap,
                                                    xkv_collect_report *report);

/* Remove what is expired, what is above the cap, orphaned blobs, leftovers, everything in quarantine, and on request
 * dictionaries without entries. `report` may be NULL. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_collect(xkv_ctx *ctx, xkv_store *store, int unused_dicts,
                                                    xkv_collect_report *report);

typedef struct xkv_verify_report {
    uint64_t entries, dictionaries, bytes; /* that were checked */
    uint64_t damaged;                      /* blobs that are not what their record says */
    uint64_t missing;                      /* blobs that are not there */
    uint64_t unreachable;                  /* entries that a lookup of their tokens does not find */
    uint64_t orphans;                      /* blobs without a record */
    uint64_t wrong_sums;                   /* records whose counts disagree with what is there */
    uint64_t bad_records;                  /* other records that are damaged, or contradict each other */
    char first[256];                       /* what was wrong first; "" */
} xkv_verify_report;

/* Check every record of every table, every blob's hash and every link between them; with `decode` also decode
 * everything. Nothing is changed. Returns XKV_OK with the report when it could look at everything, also when something
 * is wrong. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_verify(xkv_ctx *ctx, xkv_store *store, int decode, xkv_progress_fn progress,
                                                   void *progress_user, xkv_verify_report *report);

typedef struct xkv_repair_report {
    uint64_t entries, dictionaries; /* now in the index */
    uint64_t quarantined;           /* blobs that were damaged */
    uint64_t newer;                 /* blobs that only a newer program can read: left alone, and not in the index */
    uint32_t kept_uses;             /* non-zero: pins, times of use and counters of the old index could be read */
    uint32_t lost_properties;       /* non-zero: those of the store were damaged or lost, and were made anew: the cap as
                                       the old index had it, or none; the size of blocks as it follows from the keys of
                                       prompts, or the default where all are shorter */
} xkv_repair_report;

/* Rebuild the index of the store at `path` from its blobs, and its properties, if they are damaged; entries whose
 * dictionary is damaged or missing are kept, and are found again once it is put. With `compact_only` copy a sound index
 * without its free pages instead. The store must not be open anywhere. `key`: as for opening. A failure leaves the old
 * index as it was. Errors: IO (also: in use; symbolic links, which are removed by hand), FORMAT, VERSION, NO_SPACE,
 * MEMORY, CANCELLED. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_repair(xkv_ctx *ctx, const char *path, const uint8_t *key, int compact_only,
                                                   xkv_repair_report *report);

/* Write one entry, with its tokens, keys and namespace id, and whatever it needs (the entries that it extends,
 * dictionaries), as a file that any store can import; it is not encrypted. Errors: NOT_FOUND, MISMATCH (a dictionary is
 * not in the store), CORRUPT, CHECKSUM, IO, and what `output` returns. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_export(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, uint64_t id,
                                                   const xkv_output *output);

/* Store what xkv_store_export() wrote, in the namespace it came from, each part after checking all of it: what came
 * before a part that fails stays. The report is that of the entry. Errors: as xkv_store_put(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_import(xkv_ctx *ctx, xkv_store *store, const xkv_input *file,
                                                   xkv_put_report *report);

/* --- Remote tier ---------------------------------------------------------------------------------------------------
 *
 * A second level behind the folder, shared by machines (spec/store.md, section 10). Lookups by tokens that find less
 * than the whole prompt ask it for more, and store what it has; entries that are put are sent to it afterwards. It is
 * never in the way: a remote that is slow, down, damaged or hostile costs a lookup at most lookup_ms, then nothing for
 * a while, and no put or lookup fails because of it.
 *
 * What arrives is checked as an import is: hash, namespace, tokens, all rows decoded. That proves that it is whole, not
 * who made it: whoever can write to the remote of a store without a key can make entries that hold wrong rows for the
 * right tokens. With a key the entries of others are refused, and the remote learns their sizes, not what is in them.
 */
typedef struct xkv_remote_options {
    size_t struct_size;
    /* s3://BUCKET[/PREFIX]: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION (or
     * AWS_DEFAULT_REGION), AWS_ENDPOINT_URL and AWS_CA_BUNDLE are taken from the environment.
     * redis://HOST[:PORT][/DATABASE]: plain TCP; the password from REDISCLI_AUTH. */
    const char *url;
    uint32_t lookup_ms;    /* longest that one lookup waits for the remote, everything included; default 5000 */
    uint32_t send_ms;      /* longest that sending one entry takes; default 60000 */
    uint32_t retries;      /* of a request that failed, after pauses of 50 ms, 100 ms, ...; at most 16; default 2 */
    uint32_t pause_ms;     /* a remote that failed is left alone so long, twice as long after each further failure, at
                              most 64 times as long; default 1000 */
    uint64_t object_bytes; /* larger blobs, of an entry and those it extends together, are not fetched or sent; default
                              512 MiB */
    uint32_t manual;       /* non-zero: only xkv_store_push() sends; default 0: a background thread does */
    /* Allocator, log and memory limit of the background thread; the log is called on it. Read once. NULL: defaults */
    const xkv_ctx_options *context;
} xkv_remote_options;

static inline xkv_remote_options xkv_remote_options_default(void)
{
    xkv_remote_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.lookup_ms = 5000;
    o.send_ms = 60000;
    o.retries = 2;
    o.pause_ms = 1000;
    o.object_bytes = (uint64_t)512 << 20;
    return o;
}

/* Attach a remote to a store that is open for writing, before other threads use the store; it stays until the store is
 * closed. It is not contacted yet. Entries that are put from now on are noted in the index as to be sent, in the same
 * transaction; so they are sent some time later even if the process is killed, by whoever attaches a remote next.
 * Errors: ARGUMENT (URL, credentials that are not set, attached already, read-only), UNSUPPORTED (a kind of remote that
 * this build does not have), LIMIT (no thread could be started), MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_attach_remote(xkv_ctx *ctx, xkv_store *store,
                                                          const xkv_remote_options *options);

typedef struct xkv_push_report {
    uint64_t sent;    /* entries */
    uint64_t dropped; /* not to be sent any more: gone, expired, damaged, or larger than object_bytes */
    uint64_t waiting; /* still to be sent: the remote failed, or another process is sending */
    char why[256];    /* how it failed; "" */
} xkv_push_report;

/* Send what is waiting, on this thread, until nothing waits or the remote fails. A failing remote is no error: see
 * report->waiting. `report` may be NULL. Errors: ARGUMENT (no remote is attached), CANCELLED, IO, MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_push(xkv_ctx *ctx, xkv_store *store, xkv_push_report *report);

/* Note all entries of a namespace as to be sent, also those put without a remote, and their blobs as to be sent though
 * the remote may have them. Errors: IO, NO_SPACE, CORRUPT,
 * MEMORY. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_queue_all(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns);

/* Sums since the remote was attached; `waiting` is what the index says now. */
typedef struct xkv_remote_stats {
    uint64_t hits;    /* lookups that got more from the remote than the folder had */
    uint64_t misses;  /* lookups that asked it and did not */
    uint64_t skipped; /* lookups that did not ask, since it failed a moment ago */
    uint64_t errors;  /* requests that failed in the end */
    uint64_t retries; /* that were made */
    uint64_t damaged; /* objects that were not what they should be */
    uint64_t sent, dropped, waiting;
    uint64_t bytes_in, bytes_out; /* of objects */
} xkv_remote_stats;

/* Errors: ARGUMENT (no remote is attached), CORRUPT, IO. */
XKV_API XKV_MUST_CHECK xkv_status xkv_store_get_remote_stats(xkv_ctx *ctx, xkv_store *store, xkv_remote_stats *stats);

#ifdef __cplusplus
}
#endif
#endif
