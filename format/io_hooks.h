/* io_hooks.h - the system calls of io.c behind one table, so that fault tests can make the n-th of them fail. */
#ifndef XKV_IO_HOOKS_H
#define XKV_IO_HOOKS_H

#include <stddef.h>
#include <sys/stat.h>
#include <sys/types.h>

/* Each member behaves like the call of its name: the result, and errno on failure (fallocate returns the error number,
 * as posix_fallocate() does). */
typedef struct xkv_io_hooks {
    int (*open)(const char *path, int flags, mode_t mode);
    int (*close)(int fd);
    int (*fstat)(int fd, struct stat *st);
    int (*lstat)(const char *path, struct stat *st);
    ssize_t (*pread)(int fd, void *dst, size_t size, off_t offset);
    ssize_t (*pwrite)(int fd, const void *src, size_t size, off_t offset);
    ssize_t (*write)(int fd, const void *src, size_t size);
    int (*fallocate)(int fd, off_t offset, off_t size);
    void *(*mmap)(void *address, size_t size, int protection, int flags, int fd, off_t offset);
    int (*munmap)(void *address, size_t size);
    int (*msync)(void *address, size_t size, int flags);
    int (*fchmod)(int fd, mode_t mode);
    int (*fsync)(int fd);
    int (*rename)(const char *from, const char *to);
    int (*rename_new)(const char *from, const char *to); /* renameat2() with RENAME_NOREPLACE */
    int (*link)(const char *from, const char *to);
    int (*unlink)(const char *path);
} xkv_io_hooks;

/* The real calls. */
extern const xkv_io_hooks xkv_io_real;

/* The table in use: &xkv_io_real, which only tests replace, and never while a call runs. */
extern const xkv_io_hooks *xkv_io;

#endif
