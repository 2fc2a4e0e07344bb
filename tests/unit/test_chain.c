/* test_chain.c - namespaces and chains against the vectors of spec/store.md, which were computed by other programs. */
#include "support.h"

#include "xkv/store.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *spec;

static int read_spec(void **state)
{
    (void)state;
    FILE *f = fopen(XKV_SPEC_FILE, "rb");
    spec = calloc(1, 1 << 20);
    if (f == NULL || spec == NULL)
        return -1;
    size_t n = fread(spec, 1, (1 << 20) - 1, f);
    fclose(f);
    return n > 0 ? 0 : -1;
}

static int free_spec(void **state)
{
    (void)state;
    free(spec);
    return 0;
}

/* It is `expected`, and the specification says so too. */
static void assert_vector(const uint8_t bytes[32], const char *expected)
{
    char hex[65];
    for (int i = 0; i < 32; i++)
        snprintf(hex + 2 * i, 3, "%02x", bytes[i]);
    assert_string_equal(hex, expected);
    assert_non_null(strstr(spec, hex));
}

static xkv_namespace full_namespace(void)
{
    static const uint8_t fingerprint[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    xkv_namespace_fields f = xkv_namespace_fields_default();
    xkv_namespace ns;
    f.fingerprint = fingerprint;
    f.settings = "kv=f16 ctx=4096";
    f.lora = "adapter-1";
    f.salt = "secret";
    f.salt_size = 6;
    assert_int_equal(xkv_namespace_make(NULL, &f, &ns), XKV_OK);
    return ns;
}

static xkv_namespace empty_namespace(void)
{
    xkv_namespace ns;
    assert_int_equal(xkv_namespace_make(NULL, NULL, &ns), XKV_OK);
    return ns;
}

static void namespaces(void **state)
{
    (void)state;
    const xkv_namespace full = full_namespace(), empty = empty_namespace();
    assert_vector(empty.id, "a17c4e0667f236cc2deef5d2053b8aab87415c5e4364bacbba5fb629a1382344");
    assert_vector(full.id, "3447ebce95628b1ffd7bcdbb00f217d78f41d3aaa6aa45ed794b701f9dbc6c4d");
}

/* What belongs to one field must not look like another's. */
static void fields_do_not_run_together(void **state)
{
    (void)state;
    xkv_namespace_fields a = xkv_namespace_fields_default(), b = a;
    xkv_namespace first, second;
    a.settings = "ab";
    b.settings = "a";
    b.lora = "b";
    assert_int_equal(xkv_namespace_make(NULL, &a, &first), XKV_OK);
    assert_int_equal(xkv_namespace_make(NULL, &b, &second), XKV_OK);
    assert_memory_not_equal(first.id, second.id, 32);
    a.salt_size = 3;
    assert_int_equal(xkv_namespace_make(NULL, &a, &first), XKV_ERROR_ARGUMENT);
}

static void native_chain(void **state)
{
    (void)state;
    static const int32_t tokens[9] = {1, 2, 3, 4, 5, 6, 7, 128000, 9};
    const xkv_namespace empty = empty_namespace(), full = full_namespace();
    const xkv_media cat = {2, "cat", 3};
    xkv_prompt prompt = {.tokens = tokens, .token_count = 9};
    xkv_page_key keys[3];
    assert_int_equal(xkv_chain_native(NULL, &empty, &prompt, 4, keys), XKV_OK);
    assert_vector(keys[0].key, "d93690e9862196f893772f517879043985a473745a61543ec045809cf959a9a8");
    assert_vector(keys[1].key, "2f9ac8a494d6c7476ed137f9af18a33ef72e1cd399a98145a0a163812124d35c");
    assert_vector(keys[2].key, "381d8cdf818ccee3ff3ce979cb8a94227505abfd2c097b15978db6c5244f3af4");
    assert_int_equal(keys[0].tokens, 4);
    assert_int_equal(keys[1].tokens, 8);
    assert_int_equal(keys[2].tokens, 9);
    prompt.token_count = 4;
    assert_int_equal(xkv_chain_native(NULL, &full, &prompt, 4, keys), XKV_OK);
    assert_vector(keys[0].key, "ebc7aaaef2dd506688dd932efb100decd7a9d9c7d584652c175b43e384ea2cb5");
    prompt.media = &cat;
    prompt.media_count = 1;
    xkv_ctx *ctx = new_ctx(1);
    assert_ok(ctx, xkv_chain_native(ctx, &empty, &prompt, 4, keys));
    assert_vector(keys[0].key, "3ba8d8e53dbce59dd8993bd969f9b563e6fc7041cfb672a1500f496a6892a00a");
    assert_int_equal(keys[0].tokens, 4);
    xkv_ctx_free(ctx);
}

static void engine_chains(void **state)
{
    (void)state;
    static const int32_t pages[8] = {1, 2, 3, 4, 5, 6, 7, 8}, blocks[9] = {1, 2, 3, 4, 5, 6, 7, 128000, 1};
    xkv_page_key keys[2];
    assert_int_equal(xkv_chain_sglang(NULL, pages, 8, 4, keys), XKV_OK);
    assert_vector(keys[0].key, "cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72");
    assert_vector(keys[1].key, "4ebfa8a1f3c341517621838c6e1b9aa350307e3f00b3cbd1a07ef740f54396d6");
    assert_int_equal(xkv_chain_vllm(NULL, "0", blocks, 9, 4, keys), XKV_OK);
    assert_vector(keys[0].key, "c9d58ba695280d69b243e1e0df813136ca9196b286fb1a021e0b2e028ef071cb");
    assert_vector(keys[1].key, "af7f35b3384169a7362478df841434f9250ceae3230a2ef31a992f483d73858b");
    assert_int_equal(keys[1].tokens, 8);
}

/* CBOR has five sizes of numbers; those that tokens need, against a decoder of its definition: the shortest form. */
static void vllm_numbers_are_shortest(void **state)
{
    (void)state;
    /* SHA-256 of 83 5820 <key of seed "0"> 86 17 1818 18ff 190100 19ffff 1a00010000 f6 */
    static const int32_t tokens[6] = {23, 24, 255, 256, 65535, 65536};
    xkv_page_key key;
    char hex[65];
    assert_int_equal(xkv_chain_vllm(NULL, "0", tokens, 6, 6, &key), XKV_OK);
    for (int i = 0; i < 32; i++)
        snprintf(hex + 2 * i, 3, "%02x", key.key[i]);
    assert_string_equal(hex, "47d0252a5eac92c8183053c0ed4e5139beaaf81ce5e0df50bf7837399e7e017c");
}

static void bad_arguments(void **state)
{
    (void)state;
    static const int32_t tokens[4] = {1, -1, 2, 3};
    const xkv_namespace ns = empty_namespace();
    const xkv_media late = {4, "x", 1}, nameless = {0, "x", 0}, disordered[2] = {{3, "x", 1}, {2, "x", 1}};
    xkv_prompt prompt = {.tokens = tokens, .token_count = 4};
    xkv_page_key keys[4];
    assert_int_equal(xkv_chain_native(NULL, &ns, &prompt, 4, keys), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_chain_sglang(NULL, tokens, 4, 2, keys), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_chain_vllm(NULL, "0", tokens + 2, 2, 0, keys), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_chain_vllm(NULL, NULL, tokens + 2, 2, 2, keys), XKV_ERROR_ARGUMENT);
    prompt.token_count = 1;
    assert_int_equal(xkv_chain_native(NULL, &ns, &prompt, 0, keys), XKV_ERROR_ARGUMENT);
    prompt.token_count = 0;
    assert_int_equal(xkv_chain_native(NULL, &ns, &prompt, 4, keys), XKV_ERROR_ARGUMENT);
    prompt = (xkv_prompt){.tokens = tokens + 2, .token_count = 2, .media = &late, .media_count = 1};
    assert_int_equal(xkv_chain_native(NULL, &ns, &prompt, 4, keys), XKV_ERROR_ARGUMENT);
    prompt.media = &nameless;
    assert_int_equal(xkv_chain_native(NULL, &ns, &prompt, 4, keys), XKV_ERROR_ARGUMENT);
    prompt.media = disordered;
    prompt.media_count = 2;
    assert_int_equal(xkv_chain_native(NULL, &ns, &prompt, 4, keys), XKV_ERROR_ARGUMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(namespaces),    cmocka_unit_test(fields_do_not_run_together), cmocka_unit_test(native_chain),
        cmocka_unit_test(engine_chains), cmocka_unit_test(vllm_numbers_are_shortest),  cmocka_unit_test(bad_arguments),
    };
    return cmocka_run_group_tests(tests, read_spec, free_spec);
}
