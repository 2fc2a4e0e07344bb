/* support.c - see support.h. */
#include "support.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* --- Memory that grows ------------------------------------------------------------------------------------------- */

static int grow(xkv_py_buffer *buffer, size_t least)
{
    size_t capacity = buffer->capacity < (1 << 16) ? (1 << 16) : buffer->capacity;
    while (capacity < least)
        capacity += capacity / 2;
    uint8_t *data = realloc(buffer->data, capacity);
    if (data == NULL)
        return 0;
    buffer->data = data;
    buffer->capacity = capacity;
    return 1;
}

static xkv_status buffer_write(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    xkv_py_buffer *buffer = user;
    (void)ctx;
    if (size == 0)
        return XKV_OK;
    if (offset > SIZE_MAX / 2 || size > SIZE_MAX / 2 - offset)
        return XKV_ERROR_LIMIT;
    size_t end = (size_t)offset + size;
    if (end > buffer->capacity && !grow(buffer, end))
        return XKV_ERROR_MEMORY;
    if (offset > buffer->size) /* a gap that is never written reads as zeros, as in a file */
        memset(buffer->data + buffer->size, 0, (size_t)offset - buffer->size);
    memcpy(buffer->data + offset, src, size);
    if (end > buffer->size)
        buffer->size = end;
    return XKV_OK;
}

xkv_output xkv_py_buffer_output(xkv_py_buffer *buffer)
{
    return (xkv_output){buffer, buffer_write};
}

void xkv_py_buffer_free(xkv_py_buffer *buffer)
{
    free(buffer->data);
    *buffer = (xkv_py_buffer){0};
}

/* --- Ctrl-C ------------------------------------------------------------------------------------------------------ */

static _Atomic(xkv_ctx *) interrupted_ctx;
static struct sigaction previous; /* Python's; valid while interrupted_ctx is set */

static void on_interrupt(int number, siginfo_t *info, void *context)
{
    xkv_ctx *ctx = atomic_load(&interrupted_ctx);
    if (ctx != NULL)
        xkv_ctx_cancel(ctx);
    if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(number, info, context);
    else
        previous.sa_handler(number);
}

xkv_ctx *xkv_py_interrupt_begin(xkv_ctx *ctx)
{
    xkv_ctx *outer = atomic_load(&interrupted_ctx);
    struct sigaction now;
    if (outer == NULL) {
        if (sigaction(SIGINT, NULL, &now) != 0 || now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN)
            return NULL;
        previous = now;
        now.sa_sigaction = on_interrupt;
        now.sa_flags |= SA_SIGINFO;
        atomic_store(&interrupted_ctx, ctx);
        sigaction(SIGINT, &now, NULL);
    } else {
        atomic_store(&interrupted_ctx, ctx);
    }
    return outer;
}

void xkv_py_interrupt_end(xkv_ctx *outer)
{
    struct sigaction now;
    if (atomic_load(&interrupted_ctx) == NULL)
        return;
    if (outer == NULL && sigaction(SIGINT, NULL, &now) == 0 && now.sa_sigaction == on_interrupt)
        sigaction(SIGINT, &previous, NULL); /* unless a callback has set another one meanwhile */
    atomic_store(&interrupted_ctx, outer);
}
