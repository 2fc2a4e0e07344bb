/* values.h - building the metadata of a file. */
#ifndef XKV_VALUES_H
#define XKV_VALUES_H

#include "container.h"
#include "xkv/codec.h"

enum { XKV_MAX_OWN_VALUES = 12, XKV_WINDOWS_TEXT = 1024 };

/* A list in the making. Strings and bytes are not copied: they must live until the container is begun. Values are added
 * in ascending order of their keys [M3]; empty ones are left out. */
typedef struct xkv_values {
    xkv_meta_value list[XKV_MAX_OWN_VALUES];
    uint8_t numbers[XKV_MAX_OWN_VALUES][8];
    char windows[XKV_WINDOWS_TEXT];
    uint32_t count;
} xkv_values;

void xkv_values_add_string(xkv_values *v, const char *key, const char *text); /* cut to valid UTF-8 [M6] */
void xkv_values_add_bytes(xkv_values *v, const char *key, const void *bytes, size_t size);
void xkv_values_add_u64(xkv_values *v, const char *key, uint64_t number);
void xkv_values_add_f64(xkv_values *v, const char *key, double number);
/* model.architecture, model.fingerprint, model.name, model.windows; NULL: nothing. */
void xkv_values_add_model(xkv_values *v, const xkv_model *model);

#endif
