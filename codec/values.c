#include "values.h"

static void add(xkv_values *v, const char *key, uint32_t type, const void *bytes, size_t size)
{
    if (size > 0)
        v->list[v->count++] = (xkv_meta_value){
            .key = (char *)(uintptr_t)key, .type = type, .size = (uint32_t)size, .bytes = (uint8_t *)(uintptr_t)bytes};
}

void xkv_values_add_string(xkv_values *v, const char *key, const char *text)
{
    add(v, key, XKV_VALUE_STRING, text, xkv_utf8_prefix(text, strlen(text)));
}

void xkv_values_add_bytes(xkv_values *v, const char *key, const void *bytes, size_t size)
{
    add(v, key, XKV_VALUE_BYTES, bytes, size);
}

void xkv_values_add_u64(xkv_values *v, const char *key, uint64_t number)
{
    xkv_store64(v->numbers[v->count], number);
    add(v, key, XKV_VALUE_U64, v->numbers[v->count], 8);
}

void xkv_values_add_f64(xkv_values *v, const char *key, double number)
{
    xkv_storef64(v->numbers[v->count], number);
    add(v, key, XKV_VALUE_F64, v->numbers[v->count], 8);
}

void xkv_values_add_model(xkv_values *v, const xkv_model *model)
{
    if (!model)
        return;
    xkv_values_add_string(v, "model.architecture", model->architecture);
    xkv_values_add_bytes(v, "model.fingerprint", model->fingerprint, model->has_fingerprint ? 16 : 0);
    xkv_values_add_string(v, "model.name", model->name);
}
