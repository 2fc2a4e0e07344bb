/* chain.h - prompts as symbols, and the native chain over them (spec/store.md, sections 3 and 4). */
#ifndef XKV_CHAIN_H
#define XKV_CHAIN_H

#include "base.h"
#include "xkv/store.h"

#define XKV_MEDIA_MARKER  0xffffffffu /* no token: those are below 2^31 */
#define XKV_MEDIA_SYMBOLS 9u          /* the marker and the eight words of a SHA-256 */
#define XKV_MAX_SYMBOLS   (1u << 28)

/* A prompt: its tokens, with nine symbols in front of the token that a medium lies before. */
typedef struct xkv_symbols {
    const uint32_t *data; /* [count] */
    uint32_t count;
    uint32_t tokens;
    uint32_t *owned; /* what data points to, unless that is the caller's memory */
} xkv_symbols;

/* Check a prompt and spell it out. Errors: ARGUMENT, LIMIT, MEMORY. Free with xkv_symbols_free(). */
XKV_MUST_CHECK xkv_status xkv_symbols_make(xkv_ctx *ctx, const xkv_prompt *prompt, xkv_symbols *symbols);
void xkv_symbols_free(xkv_ctx *ctx, xkv_symbols *symbols);

/* Tokens among the first `count` symbols. */
uint32_t xkv_symbols_common(const uint32_t *a, uint32_t a_count, const uint32_t *b, uint32_t b_count);
uint32_t xkv_symbols_to_tokens(const uint32_t *symbols, uint32_t count);

/* All keys of the native chain: [ceil(tokens / block_tokens)]. */
void xkv_chain_keys(const xkv_namespace *ns, const xkv_symbols *symbols, uint32_t block_tokens, xkv_page_key *keys);
/* The last one. */
void xkv_chain_last(const xkv_namespace *ns, const xkv_symbols *symbols, uint32_t block_tokens, uint8_t key[32]);

#endif
