/* text.h - texts of errors, cut off where they are too long. */
#ifndef XKV_CUDA_TEXT_H
#define XKV_CUDA_TEXT_H

#include <stdarg.h>
#include <stdio.h>

__attribute__((format(printf, 3, 4))) static inline void xkv_write_text(char *text, size_t size, const char *format,
                                                                        ...)
{
    va_list args;

    va_start(args, format);
    (void)vsnprintf(text, size, format, args);
    va_end(args);
}

#endif
