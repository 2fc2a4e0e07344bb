/* store_support.h - a store in a folder of its own, and entries whose rows follow from their tokens, so that whatever
 * is restored can be checked without keeping it. */
#ifndef XKV_TEST_STORE_SUPPORT_H
#define XKV_TEST_STORE_SUPPORT_H

#include "support.h"

#include "xkv/store.h"

#include <stdbool.h>

enum { STORE_LAYERS = 1, STORE_WIDTH = 8, STORE_TOKENS = 2048 /* at most */ };

/* The folder of a test: a fresh one, with room for a path. */
typedef struct test_store {
    char folder[64], path[80];
    xkv_ctx *ctx;
    xkv_store *store; /* NULL: closed */
} test_store;

void make_folder(test_store *t);
void remove_folder(test_store *t);
/* Make a store there (cap 0: none) and open it. */
void make_store(test_store *t, uint64_t byte_cap);
void reopen_store(test_store *t);

xkv_namespace make_namespace(const char *salt);

/* The rows that a prompt of these tokens has: each element follows from the tokens up to its own. */
typedef struct rows {
    xkv_geometry geometry;
    xkv_plane planes[2 * STORE_LAYERS];
    xkv_view views[2 * STORE_LAYERS];
    int32_t positions[STORE_TOKENS];
    float data[2 * STORE_LAYERS][STORE_TOKENS][STORE_WIDTH];
} rows;

rows *make_rows(const int32_t *tokens, uint32_t count);
/* Put the prompt with its rows, lossless. */
xkv_status put_rows(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const int32_t *tokens, uint32_t count,
                    const xkv_put_options *options, xkv_put_report *report);
/* Restore what a hit has matched; true when all rows are those of the tokens. */
bool hit_is_right(xkv_ctx *ctx, xkv_hit *hit, uint32_t matched, const int32_t *tokens, xkv_status *status);

/* Look the prompt up, restore what is found and compare each row; wrong ones fail the test. */
xkv_match find_rows(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const int32_t *tokens, uint32_t count);

/* A cache of 64 tokens that a dictionary can be trained on. */
synthetic small_cache(uint64_t seed);

/* Tokens that depend on a seed alone. */
void make_tokens(uint64_t seed, int32_t vocabulary, int32_t *tokens, uint32_t count);

#endif
