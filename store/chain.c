/* chain.c - namespaces, prompts as symbols, and the chains of hashes over them: ours and those of engines. */
#include "chain.h"

#include "sha256.h"

#define WORDS 64u /* symbols turned into bytes at a time */

/* --- Namespaces --------------------------------------------------------------------------------------------------- */

static xkv_status add_field(xkv_ctx *ctx, xkv_sha256 *h, const void *bytes, size_t size)
{
    uint8_t length[4];
    if (size > UINT32_MAX)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "a field of the namespace has %zu bytes", size);
    xkv_store32(length, (uint32_t)size);
    xkv_sha256_add(h, length, sizeof length);
    if (size > 0)
        xkv_sha256_add(h, bytes, size);
    return XKV_OK;
}

static xkv_status add_text(xkv_ctx *ctx, xkv_sha256 *h, const char *text)
{
    return add_field(ctx, h, text, text != NULL ? strlen(text) : 0);
}

xkv_status xkv_namespace_make(xkv_ctx *ctx, const xkv_namespace_fields *fields, xkv_namespace *ns)
{
    static const char label[] = "xkv namespace 1"; /* hashed with its NUL */
    xkv_namespace_fields f = xkv_namespace_fields_default();
    xkv_sha256 h;
    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_copy_options(ctx, fields, &f, sizeof f));
    if (f.salt_size > 0 && f.salt == NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the salt is NULL, its size %zu", f.salt_size);
    xkv_sha256_begin(&h);
    xkv_sha256_add(&h, label, sizeof label);
    XKV_TRY(add_field(ctx, &h, f.fingerprint, f.fingerprint != NULL ? 16 : 0));
    XKV_TRY(add_text(ctx, &h, f.settings));
    XKV_TRY(add_text(ctx, &h, f.lora));
    XKV_TRY(add_field(ctx, &h, f.salt, f.salt_size));
    xkv_sha256_end(&h, ns->id);
    return XKV_OK;
}

/* --- Symbols ------------------------------------------------------------------------------------------------------ */

static xkv_status check_tokens(xkv_ctx *ctx, const int32_t *tokens, uint32_t count)
{
    int32_t any = 0;
    if (count == 0 || count > XKV_MAX_SYMBOLS || tokens == NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a prompt has 1 to %u tokens, not %u", XKV_MAX_SYMBOLS, count);
    for (uint32_t i = 0; i < count; i++)
        any |= tokens[i];
    if (any < 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a token is negative");
    return XKV_OK;
}

static xkv_status check_media(xkv_ctx *ctx, const xkv_prompt *p)
{
    for (uint32_t i = 0; i < p->media_count; i++) {
        const xkv_media *m = &p->media[i];
        if (m->id == NULL || m->id_size == 0 || m->first_token >= p->token_count ||
            (i > 0 && m->first_token < m[-1].first_token))
            return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "medium %u lies before token %u of %u, or has no identity", i,
                            m->first_token, p->token_count);
    }
    return XKV_OK;
}

static uint32_t *spell_medium(const xkv_media *m, uint32_t *to)
{
    uint8_t digest[32];
    xkv_sha256 h;
    xkv_sha256_begin(&h);
    xkv_sha256_add(&h, m->id, m->id_size);
    xkv_sha256_end(&h, digest);
    *to++ = XKV_MEDIA_MARKER;
    for (size_t i = 0; i < sizeof digest; i += 4)
        *to++ = xkv_load32(digest + i);
    return to;
}

xkv_status xkv_symbols_make(xkv_ctx *ctx, const xkv_prompt *prompt, xkv_symbols *symbols)
{
    const uint32_t *tokens = (const uint32_t *)prompt->tokens; /* the unsigned twin of the type may alias it */
    uint64_t count = prompt->token_count + (uint64_t)prompt->media_count * XKV_MEDIA_SYMBOLS;
    uint32_t *owned = NULL;
    XKV_TRY(check_tokens(ctx, prompt->tokens, prompt->token_count));
    XKV_TRY(check_media(ctx, prompt));
    if (count > XKV_MAX_SYMBOLS)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "%u media are too many", prompt->media_count);
    *symbols = (xkv_symbols){.data = tokens, .count = (uint32_t)count, .tokens = prompt->token_count};
    if (prompt->media_count == 0)
        return XKV_OK;
    XKV_TRY(XKV_NEW(ctx, count, &owned));
    uint32_t *to = owned, medium = 0;
    for (uint32_t i = 0; i < prompt->token_count; i++) {
        while (medium < prompt->media_count && prompt->media[medium].first_token == i)
            to = spell_medium(&prompt->media[medium++], to);
        *to++ = tokens[i];
    }
    symbols->data = symbols->owned = owned;
    return XKV_OK;
}

void xkv_symbols_free(xkv_ctx *ctx, xkv_symbols *symbols)
{
    xkv_release(ctx, symbols->owned);
    memset(symbols, 0, sizeof *symbols);
}

uint32_t xkv_symbols_common(const uint32_t *a, uint32_t a_count, const uint32_t *b, uint32_t b_count)
{
    uint32_t same = 0;
    while (same < a_count && same < b_count && a[same] == b[same])
        same++;
    return same;
}

uint32_t xkv_symbols_to_tokens(const uint32_t *symbols, uint32_t count)
{
    uint32_t tokens = 0;
    for (uint32_t i = 0; i < count;) {
        bool medium = symbols[i] == XKV_MEDIA_MARKER;
        tokens += !medium;
        i += medium ? XKV_MEDIA_SYMBOLS : 1;
    }
    return tokens;
}

/* --- Native chain ------------------------------------------------------------------------------------------------- */

static void add_symbols(xkv_sha256 *h, const uint32_t *symbols, uint32_t count)
{
    uint8_t bytes[4 * WORDS];
    while (count > 0) {
        uint32_t n = count < WORDS ? count : WORDS;
        for (uint32_t i = 0; i < n; i++)
            xkv_store32(bytes + 4 * i, symbols[i]);
        xkv_sha256_add(h, bytes, 4 * n);
        symbols += n;
        count -= n;
    }
}

/* Symbols that the next `tokens` tokens take, with the media before each of them. */
static uint32_t block_symbols(const uint32_t *symbols, uint32_t count, uint32_t tokens)
{
    uint32_t i = 0;
    while (i < count && tokens > 0) {
        bool medium = symbols[i] == XKV_MEDIA_MARKER;
        tokens -= !medium;
        i += medium ? XKV_MEDIA_SYMBOLS : 1;
    }
    return i;
}

/* Go through the blocks; keys NULL: only the last one is wanted. */
static void hash_blocks(const xkv_namespace *ns, const xkv_symbols *s, uint32_t block_tokens, xkv_page_key *keys,
                        uint8_t last[32])
{
    memcpy(last, ns->id, 32);
    for (uint32_t at = 0, tokens = 0; at < s->count;) {
        uint32_t n = block_symbols(s->data + at, s->count - at, block_tokens);
        xkv_sha256 h;
        xkv_sha256_begin(&h);
        xkv_sha256_add(&h, last, 32);
        add_symbols(&h, s->data + at, n);
        xkv_sha256_end(&h, last);
        at += n;
        tokens = s->tokens - tokens < block_tokens ? s->tokens : tokens + block_tokens;
        if (keys != NULL) {
            memcpy(keys->key, last, 32);
            keys++->tokens = tokens;
        }
    }
}

void xkv_chain_keys(const xkv_namespace *ns, const xkv_symbols *symbols, uint32_t block_tokens, xkv_page_key *keys)
{
    uint8_t last[32];
    hash_blocks(ns, symbols, block_tokens, keys, last);
}

void xkv_chain_last(const xkv_namespace *ns, const xkv_symbols *symbols, uint32_t block_tokens, uint8_t key[32])
{
    hash_blocks(ns, symbols, block_tokens, NULL, key);
}

xkv_status xkv_chain_native(xkv_ctx *ctx, const xkv_namespace *ns, const xkv_prompt *prompt, uint32_t block_tokens,
                            xkv_page_key *keys)
{
    xkv_symbols symbols;
    uint8_t last[32];
    xkv_ctx_begin(ctx);
    if (block_tokens == 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "blocks of 0 tokens");
    XKV_TRY(xkv_symbols_make(ctx, prompt, &symbols));
    hash_blocks(ns, &symbols, block_tokens, keys, last);
    xkv_symbols_free(ctx, &symbols);
    return XKV_OK;
}

/* --- Chains of engines -------------------------------------------------------------------------------------------- */

static xkv_status check_chain(xkv_ctx *ctx, const int32_t *tokens, uint32_t token_count, uint32_t page_tokens)
{
    if (page_tokens == 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "pages of 0 tokens");
    return check_tokens(ctx, tokens, token_count);
}

/* SHA-256 of the previous hash (nothing before the first page) and the tokens as u32. */
xkv_status xkv_chain_sglang(xkv_ctx *ctx, const int32_t *tokens, uint32_t token_count, uint32_t page_tokens,
                            xkv_page_key *keys)
{
    xkv_ctx_begin(ctx);
    XKV_TRY(check_chain(ctx, tokens, token_count, page_tokens));
    for (uint32_t i = 0; i < token_count / page_tokens; i++) {
        xkv_sha256 h;
        xkv_sha256_begin(&h);
        if (i > 0)
            xkv_sha256_add(&h, keys[i - 1].key, 32);
        add_symbols(&h, (const uint32_t *)tokens + (size_t)i * page_tokens, page_tokens);
        xkv_sha256_end(&h, keys[i].key);
        keys[i].tokens = (i + 1) * page_tokens;
    }
    return XKV_OK;
}

/* CBOR (RFC 8949, section 3): a head of major type and argument in its shortest form. */
static void add_cbor_head(xkv_sha256 *h, unsigned major, uint32_t value)
{
    uint8_t bytes[5] = {(uint8_t)(major << 5)};
    size_t size = value < 24 ? 1 : value < 0x100 ? 2 : value < 0x10000 ? 3 : 5;
    static const uint8_t lead[] = {0, 0, 24, 25, 0, 26};
    bytes[0] = (uint8_t)(bytes[0] | (size == 1 ? value : lead[size]));
    for (size_t i = 1; i < size; i++)
        bytes[i] = (uint8_t)(value >> 8 * (size - 1 - i));
    xkv_sha256_add(h, bytes, size);
}

enum { CBOR_UNSIGNED = 0, CBOR_BYTES = 2, CBOR_TEXT = 3, CBOR_ARRAY = 4, CBOR_NULL = 0xf6 };

static void vllm_block(const uint8_t parent[32], const int32_t *tokens, uint32_t count, uint8_t key[32])
{
    static const uint8_t no_extra_keys = CBOR_NULL;
    xkv_sha256 h;
    xkv_sha256_begin(&h);
    add_cbor_head(&h, CBOR_ARRAY, 3);
    add_cbor_head(&h, CBOR_BYTES, 32);
    xkv_sha256_add(&h, parent, 32);
    add_cbor_head(&h, CBOR_ARRAY, count);
    for (uint32_t i = 0; i < count; i++)
        add_cbor_head(&h, CBOR_UNSIGNED, (uint32_t)tokens[i]);
    xkv_sha256_add(&h, &no_extra_keys, 1);
    xkv_sha256_end(&h, key);
}

xkv_status xkv_chain_vllm(xkv_ctx *ctx, const char *seed, const int32_t *tokens, uint32_t token_count,
                          uint32_t block_tokens, xkv_page_key *keys)
{
    uint8_t parent[32];
    xkv_sha256 h;
    xkv_ctx_begin(ctx);
    XKV_TRY(check_chain(ctx, tokens, token_count, block_tokens));
    if (seed == NULL || strlen(seed) > UINT16_MAX)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a seed is a text of at most 65535 bytes");
    xkv_sha256_begin(&h);
    add_cbor_head(&h, CBOR_TEXT, (uint32_t)strlen(seed));
    xkv_sha256_add(&h, seed, strlen(seed));
    xkv_sha256_end(&h, parent);
    for (uint32_t i = 0; i < token_count / block_tokens; i++) {
        vllm_block(parent, tokens + (size_t)i * block_tokens, block_tokens, keys[i].key);
        keys[i].tokens = (i + 1) * block_tokens;
        memcpy(parent, keys[i].key, 32);
    }
    return XKV_OK;
}
