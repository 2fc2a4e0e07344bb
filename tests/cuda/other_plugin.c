/* A plug-in of another version: only its first fields may be looked at. */
#include <stdint.h>

struct table {
    uint32_t abi, size;
};

extern const struct table xkv_plugin_table;
__attribute__((visibility("default"))) const struct table xkv_plugin_table = {.abi = 999, .size = 8};
