#include "values.h"

#include <stdio.h>

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

/* "512x5 0 512x5 0": runs of layers that reach back equally far. "" where none has a window, or it is too long. */
static void write_windows(const xkv_model *model, char *text)
{
    size_t used = 0;
    uint32_t widest = 0;
    text[0] = '\0';
    for (uint32_t i = 0, run; i < model->layer_count; i += run) {
        const uint32_t window = model->layers[i].window;
        char count[16] = "";
        for (run = 1; i + run < model->layer_count && model->layers[i + run].window == window; run++)
            ;
        if (run > 1)
            snprintf(count, sizeof count, "x%u", run);
        used += (size_t)snprintf(text + used, XKV_WINDOWS_TEXT - used, "%s%u%s", used > 0 ? " " : "", window, count);
        widest = window > widest ? window : widest;
        if (used >= XKV_WINDOWS_TEXT)
            break;
    }
    if (widest == 0 || used >= XKV_WINDOWS_TEXT)
        text[0] = '\0';
}

void xkv_values_add_model(xkv_values *v, const xkv_model *model)
{
    if (!model)
        return;
    xkv_values_add_string(v, "model.architecture", model->architecture);
    xkv_values_add_bytes(v, "model.fingerprint", model->fingerprint, model->has_fingerprint ? 16 : 0);
    xkv_values_add_string(v, "model.name", model->name);
    write_windows(model, v->windows);
    xkv_values_add_string(v, "model.windows", v->windows);
}
