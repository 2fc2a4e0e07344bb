/* Any bytes as a chunk of any shape: both coders must give the same answer. Input: u8 tokens - 1, u8 components, the
 * table of each, then the chunk. */
#include "rans.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static xkv_status decode(const xkv_coder *coder, const xkv_rans_shape *s, const uint8_t *data, size_t size, int16_t **q)
{
    *q = calloc((size_t)s->components * s->tokens + 1, sizeof **q);
    if (*q == NULL)
        abort();
    return xkv_rans_decode(NULL, coder, s, data, size, "chunk", *q);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int16_t *a, *b;

    if (size < 2 || size - 2 < data[1])
        return 0;
    xkv_rans_shape s = {data[0] + 1u, data[1], data[0] + 1u, data + 2};
    data += 2 + s.components;
    size -= 2 + s.components;
    xkv_status status = decode(xkv_coder_cpu_generic(), &s, data, size, &a);
    if (decode(xkv_coder_cpu(), &s, data, size, &b) != status)
        abort();
    if (status == XKV_OK && memcmp(a, b, (size_t)s.components * s.tokens * sizeof *a) != 0)
        abort();
    free(a);
    free(b);
    return 0;
}
