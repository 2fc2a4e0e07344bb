/* xkv_store.h - what the two files of xkv-store share. */
#ifndef XKV_CLI_STORE_H
#define XKV_CLI_STORE_H

#include "cli.h"

#include "xkv/store.h"

typedef struct store_tool {
    const struct store_command *command;
    const char *path; /* of the store */
    xkv_store *store;
    xkv_namespace ns;
    xkv_store_properties properties; /* --block, --cap */
    bool cap_given;
    const char *settings, *lora, *salt_path, *key_path;
    const uint8_t *key; /* NULL: none; else key_bytes */
    uint8_t key_bytes[32];
    xkv_pack_options pack; /* of put */
    xkv_put_options put;
    xkv_remote_options remote; /* url NULL: none */
    uint32_t min_tokens;
    uint64_t id; /* --id; 0: not given */
    bool all, decode, compact, unused_dicts;
    xkv_model *model; /* of --model */
    xkv_model bare;   /* of --fingerprint alone */
} store_tool;

/* A command: its arguments after the store are `count` of `arguments`. */
typedef struct store_command {
    const char *name;
    cli_exit (*run)(cli *c, uint32_t count, char **arguments);
    uint32_t least, most; /* arguments */
    bool writes;          /* a read-only store will not do */
    bool opens;           /* the store is open when it runs */
} store_command;

/* The entry's number, "12". */
bool store_parse_id(cli *c, const char *text, uint64_t *id);

/* xkv_store_data.c */
cli_exit store_put(cli *c, uint32_t count, char **arguments);
cli_exit store_get(cli *c, uint32_t count, char **arguments);
cli_exit store_match(cli *c, uint32_t count, char **arguments);
cli_exit store_export(cli *c, uint32_t count, char **arguments);
cli_exit store_import(cli *c, uint32_t count, char **arguments);

#endif
