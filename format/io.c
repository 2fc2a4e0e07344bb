/* io.c - inputs, and files that appear only when complete. Every system call goes through xkv_io. */
#include "io_hooks.h"

#include "base.h"
#include "xkv/format.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#define COPY_BLOCK    (256u * 1024u)
#define NAME_ATTEMPTS 100

/* --- System calls ----------------------------------------------------------------------------------------------- */

static int real_open(const char *path, int flags, mode_t mode)
{
    return open(path, flags, mode);
}

static int real_rename_new(const char *from, const char *to)
{
    return renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE);
}

const xkv_io_hooks xkv_io_real = {
    .open = real_open,
    .close = close,
    .fstat = fstat,
    .lstat = lstat,
    .pread = pread,
    .pwrite = pwrite,
    .write = write,
    .fallocate = posix_fallocate,
    .mmap = mmap,
    .munmap = munmap,
    .msync = msync,
    .fchmod = fchmod,
    .fsync = fsync,
    .rename = rename,
    .rename_new = real_rename_new,
    .link = link,
    .unlink = unlink,
};

const xkv_io_hooks *xkv_io = &xkv_io_real;

static int open_retry(const char *path, int flags, mode_t mode)
{
    int fd;
    do
        fd = xkv_io->open(path, flags | O_CLOEXEC, mode);
    while (fd < 0 && errno == EINTR);
    return fd;
}

static xkv_status read_at(xkv_ctx *ctx, int fd, const char *name, uint64_t offset, void *dst, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = xkv_io->pread(fd, (uint8_t *)dst + done, size - done, (off_t)(offset + done));
        if (n > 0)
            done += (size_t)n;
        else if (n == 0)
            return xkv_fail(ctx, XKV_ERROR_TRUNCATED, "%s ends at offset %llu: it became shorter while it was read",
                            name, (unsigned long long)(offset + done));
        else if (errno != EINTR)
            return xkv_fail_errno(ctx, "read", name, errno);
    }
    return XKV_OK;
}

static xkv_status write_at(xkv_ctx *ctx, int fd, const char *name, uint64_t offset, const void *src, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = xkv_io->pwrite(fd, (const uint8_t *)src + done, size - done, (off_t)(offset + done));
        if (n > 0)
            done += (size_t)n;
        else if (n == 0 || errno != EINTR)
            return xkv_fail_errno(ctx, "write", name, n == 0 ? ENOSPC : errno);
    }
    return XKV_OK;
}

/* --- Inputs ----------------------------------------------------------------------------------------------------- */

static xkv_status memory_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    (void)ctx;
    if (size > 0)
        memcpy(dst, (const uint8_t *)user + offset, size);
    return XKV_OK;
}

xkv_input xkv_input_from_memory(const void *data, size_t size)
{
    /* The cast drops a const that memory_read() gives back. */
    return (xkv_input){.user = (void *)(uintptr_t)data, .size = size, .read = memory_read};
}

typedef struct file_input {
    int fd;
    char name[];
} file_input;

static xkv_status file_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    const file_input *f = user;
    return read_at(ctx, f->fd, f->name, offset, dst, size);
}

static void file_prefetch(void *user, uint64_t offset, uint64_t size)
{
    const file_input *f = user;
    (void)posix_fadvise(f->fd, (off_t)offset, (off_t)size, POSIX_FADV_WILLNEED);
}

static int file_descriptor(void *user, uint64_t *offset_p)
{
    const file_input *f = user;
    *offset_p = 0;
    return f->fd;
}

/* Open a regular file and learn its size. O_NONBLOCK keeps a FIFO without a writer from blocking the open. */
static xkv_status open_regular(xkv_ctx *ctx, const char *path, int *fd_p, uint64_t *size)
{
    struct stat st;
    int fd = open_retry(path, O_RDONLY | O_NONBLOCK | O_NOCTTY, 0);
    if (fd < 0)
        return xkv_fail_errno(ctx, "open", path, errno);
    xkv_status status = XKV_OK;
    if (xkv_io->fstat(fd, &st) != 0)
        status = xkv_fail_errno(ctx, "examine", path, errno);
    else if (!S_ISREG(st.st_mode))
        status = xkv_fail(ctx, XKV_ERROR_IO, "cannot open %s: not a regular file", path);
    if (status != XKV_OK) {
        xkv_io->close(fd);
        return status;
    }
    *fd_p = fd;
    *size = (uint64_t)st.st_size;
    return XKV_OK;
}

xkv_status xkv_input_open(xkv_ctx *ctx, const char *path, xkv_input *input)
{
    xkv_ctx_begin(ctx);
    size_t name_size = strlen(path) + 1;
    file_input *f = NULL;
    uint64_t size = 0;
    XKV_TRY(xkv_alloc(ctx, 1, sizeof *f + name_size, (void **)&f));
    memcpy(f->name, path, name_size);
    xkv_status status = open_regular(ctx, path, &f->fd, &size);
    if (status != XKV_OK) {
        xkv_release(ctx, f);
        return status;
    }
    *input = (xkv_input){.user = f,
                         .size = size,
                         .read = file_read,
                         .name = f->name,
                         .prefetch = file_prefetch,
                         .file = file_descriptor};
    return XKV_OK;
}

void xkv_input_close(xkv_ctx *ctx, xkv_input *input)
{
    if (input == NULL || input->read != file_read)
        return;
    file_input *f = input->user;
    xkv_io->close(f->fd);
    xkv_release(ctx, f);
    memset(input, 0, sizeof *input);
}

/* --- Files ------------------------------------------------------------------------------------------------------ */

struct xkv_file {
    int fd;
    int overwrite;
    uint64_t size; /* end of the last byte written or mapped */
    uint8_t *map;
    size_t map_size;
    char *path;    /* NULL: unnamed */
    char *folder;  /* that of path, or the one for temporary files */
    char *temp;    /* NULL: nothing to unlink */
    uint8_t empty; /* what a mapping of 0 bytes points to */
};

static const char *file_name(const xkv_file *file)
{
    return file->path ? file->path : "temporary file";
}

static xkv_status copy_text(xkv_ctx *ctx, const char *text, size_t size, char **copy_p)
{
    char *copy = NULL;
    XKV_TRY(XKV_NEW(ctx, size + 1, &copy));
    memcpy(copy, text, size);
    copy[size] = '\0';
    *copy_p = copy;
    return XKV_OK;
}

static xkv_status copy_folder(xkv_ctx *ctx, const char *path, char **folder_p)
{
    const char *slash = strrchr(path, '/');
    if (slash == NULL)
        return copy_text(ctx, ".", 1, folder_p);
    return copy_text(ctx, path, slash == path ? 1 : (size_t)(slash - path), folder_p);
}

/* Create a hidden file of a new name in file->folder. The name is short whatever that of the target is, and need not be
 * secret: O_EXCL and O_NOFOLLOW refuse what others may have put there. */
static xkv_status create_hidden(xkv_ctx *ctx, xkv_file *file)
{
    size_t size = strlen(file->folder) + 32;
    XKV_TRY(XKV_NEW(ctx, size, &file->temp));
    for (int attempt = 0; attempt < NAME_ATTEMPTS; attempt++) {
        uint64_t number = (uint64_t)getpid() << 32 | (uint64_t)attempt;
        if (getrandom(&number, sizeof number, GRND_NONBLOCK) < 0)
            xkv_logf(ctx, XKV_LOG_DEBUG, "no random numbers: naming the temporary file by process");
        snprintf(file->temp, size, "%s/.xkv-%016llx.tmp", file->folder, (unsigned long long)number);
        file->fd = open_retry(file->temp, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0600);
        if (file->fd >= 0)
            return XKV_OK;
        if (errno != EEXIST)
            break;
    }
    int error = errno;
    xkv_release(ctx, file->temp);
    file->temp = NULL;
    return xkv_fail_errno(ctx, "create a temporary file in", file->folder, error);
}

static xkv_status create_unnamed(xkv_ctx *ctx, xkv_file *file)
{
    const char *folder = getenv("TMPDIR");
    if (folder == NULL || *folder == '\0')
        folder = "/tmp";
    XKV_TRY(copy_text(ctx, folder, strlen(folder), &file->folder));
    file->fd = open_retry(folder, O_RDWR | O_TMPFILE, 0600);
    if (file->fd >= 0)
        return XKV_OK;
    XKV_TRY(create_hidden(ctx, file)); /* a filesystem without O_TMPFILE */
    int failed = xkv_io->unlink(file->temp);
    if (failed)
        return xkv_fail_errno(ctx, "unlink", file->temp, errno);
    xkv_release(ctx, file->temp);
    file->temp = NULL;
    return XKV_OK;
}

static xkv_status fail_exists(xkv_ctx *ctx, const char *path)
{
    return xkv_fail(ctx, XKV_ERROR_EXISTS, "%s exists and is not to be overwritten", path);
}

/* Refuse a target that exists without `overwrite`, or that is no file. A symbolic link is replaced, not followed. */
static xkv_status check_target(xkv_ctx *ctx, const char *path, int overwrite)
{
    struct stat st;
    if (xkv_io->lstat(path, &st) != 0)
        return errno == ENOENT ? XKV_OK : xkv_fail_errno(ctx, "examine", path, errno);
    if (!overwrite)
        return fail_exists(ctx, path);
    if (!S_ISREG(st.st_mode) && !S_ISLNK(st.st_mode))
        return xkv_fail(ctx, XKV_ERROR_IO, "cannot overwrite %s: not a regular file", path);
    return XKV_OK;
}

static xkv_status create_named(xkv_ctx *ctx, const char *path, int overwrite, xkv_file *file)
{
    if (*path == '\0' || path[strlen(path) - 1] == '/')
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "\"%s\" is not the name of a file", path);
    file->overwrite = overwrite;
    XKV_TRY(check_target(ctx, path, overwrite));
    XKV_TRY(copy_text(ctx, path, strlen(path), &file->path));
    XKV_TRY(copy_folder(ctx, path, &file->folder));
    return create_hidden(ctx, file);
}

xkv_status xkv_file_create(xkv_ctx *ctx, const char *path, int overwrite, xkv_file **file_p)
{
    xkv_ctx_begin(ctx);
    xkv_file *file = NULL;
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &file));
    file->fd = -1;
    xkv_status status = path ? create_named(ctx, path, overwrite, file) : create_unnamed(ctx, file);
    if (status != XKV_OK) {
        xkv_file_abort(ctx, file);
        return status;
    }
    *file_p = file;
    return XKV_OK;
}

static xkv_status file_write(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    xkv_file *file = user;
    uint64_t end;
    if (!xkv_add64(offset, size, &end) || end > INT64_MAX)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "%s: offset %llu is beyond what a file can hold", file_name(file),
                        (unsigned long long)offset);
    XKV_TRY(write_at(ctx, file->fd, file_name(file), offset, src, size));
    file->size = xkv_max64(file->size, end);
    return XKV_OK;
}

xkv_output xkv_file_output(xkv_file *file)
{
    return (xkv_output){.user = file, .write = file_write};
}

xkv_status xkv_file_map(xkv_ctx *ctx, xkv_file *file, uint64_t size, uint8_t **data_p)
{
    xkv_ctx_begin(ctx);
    if (file->map != NULL || file->size != 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "%s is already written or mapped", file_name(file));
    if (size > INT64_MAX || size > SIZE_MAX)
        return xkv_fail(ctx, XKV_ERROR_LIMIT, "cannot map %llu bytes", (unsigned long long)size);
    if (size == 0) {
        *data_p = &file->empty;
        return XKV_OK;
    }
    /* Without blocks behind it, a mapping of a file on a full disk dies of SIGBUS. */
    int error;
    do
        error = xkv_io->fallocate(file->fd, 0, (off_t)size);
    while (error == EINTR);
    if (error != 0)
        return xkv_fail_errno(ctx, "reserve space for", file_name(file), error);
    void *map = xkv_io->mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);
    if (map == MAP_FAILED)
        return xkv_fail_errno(ctx, "map", file_name(file), errno);
    file->map = map;
    file->map_size = (size_t)size;
    file->size = size;
    *data_p = map;
    return XKV_OK;
}

static xkv_status file_read_back(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    const xkv_file *file = user;
    return read_at(ctx, file->fd, file_name(file), offset, dst, size);
}

xkv_input xkv_file_input(const xkv_file *file)
{
    return (xkv_input){.user = (void *)(uintptr_t)file, /* file_read_back() gives the const back */
                       .size = file->size,
                       .read = file_read_back,
                       .name = file_name(file)};
}

/* Write to a pipe, a terminal or a file, at its own position; waits when it is in non-blocking mode. */
static xkv_status write_all(xkv_ctx *ctx, int fd, const uint8_t *src, size_t size)
{
    while (size > 0) {
        ssize_t n = xkv_io->write(fd, src, size);
        if (n >= 0) {
            src += n;
            size -= (size_t)n;
        } else if (errno == EAGAIN) {
            poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
        } else if (errno != EINTR) {
            return xkv_fail_errno(ctx, "write to", "the output", errno);
        }
        XKV_TRY(xkv_check_cancel(ctx));
    }
    return XKV_OK;
}

xkv_status xkv_file_copy_to_fd(xkv_ctx *ctx, xkv_file *file, int fd)
{
    xkv_ctx_begin(ctx);
    xkv_status status = XKV_OK;
    uint8_t *block = NULL;
    XKV_TRY(XKV_NEW(ctx, COPY_BLOCK, &block));
    for (uint64_t offset = 0; offset < file->size;) {
        size_t n = (size_t)xkv_min64(file->size - offset, COPY_BLOCK);
        XKV_TRY_GOTO(read_at(ctx, file->fd, file_name(file), offset, block, n), out);
        XKV_TRY_GOTO(write_all(ctx, fd, block, n), out);
        offset += n;
    }
out:
    xkv_release(ctx, block);
    return status;
}

/* The umask, read from /proc because umask() can only be read by changing it, for all threads; where there is no /proc
 * the file stays private. */
static mode_t process_umask(void)
{
    char text[4096];
    unsigned mask = 077;
    int fd = open_retry("/proc/self/status", O_RDONLY, 0);
    if (fd < 0)
        return mask;
    ssize_t n = xkv_io->pread(fd, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = '\0';
    const char *line = strstr(text, "\nUmask:");
    if (line != NULL && sscanf(line, "\nUmask: %o", &mask) != 1)
        mask = 077;
    xkv_io->close(fd);
    return (mode_t)mask;
}

static mode_t final_mode(const xkv_file *file)
{
    struct stat st;
    if (file->overwrite && xkv_io->lstat(file->path, &st) == 0 && S_ISREG(st.st_mode))
        return st.st_mode & 0777;
    return 0666 & ~process_umask();
}

static xkv_status sync_file(xkv_ctx *ctx, xkv_file *file)
{
    if (file->map != NULL && xkv_io->msync(file->map, file->map_size, MS_SYNC) != 0)
        return xkv_fail_errno(ctx, "write", file->path, errno);
    if (xkv_io->fchmod(file->fd, final_mode(file)) != 0)
        return xkv_fail_errno(ctx, "set the permissions of", file->path, errno);
    if (xkv_io->fsync(file->fd) != 0)
        return xkv_fail_errno(ctx, "write", file->path, errno);
    return XKV_OK;
}

/* Give the complete file its name. Without overwrite in one step that fails when the name is taken: renameat2(), or,
 * where the filesystem lacks that flag, link(). */
static xkv_status publish(xkv_ctx *ctx, xkv_file *file)
{
    int failed = file->overwrite ? xkv_io->rename(file->temp, file->path) : xkv_io->rename_new(file->temp, file->path);
    if (failed && !file->overwrite && (errno == EINVAL || errno == ENOSYS)) {
        failed = xkv_io->link(file->temp, file->path);
        if (!failed)
            return XKV_OK; /* file->temp, the second name, is unlinked at the end */
    }
    if (failed)
        return errno == EEXIST ? fail_exists(ctx, file->path) : xkv_fail_errno(ctx, "rename to", file->path, errno);
    xkv_release(ctx, file->temp);
    file->temp = NULL;
    return XKV_OK;
}

/* Sync the folder, so that the new name survives a power cut. Some filesystems cannot (EINVAL): nothing to be done. */
static xkv_status sync_folder(xkv_ctx *ctx, int fd, const xkv_file *file)
{
    if (xkv_io->fsync(fd) == 0 || errno == EINVAL)
        return XKV_OK;
    return xkv_fail_errno(ctx, "sync the folder of the complete file", file->path, errno);
}

static xkv_status commit_named(xkv_ctx *ctx, xkv_file *file)
{
    XKV_TRY(sync_file(ctx, file));
    /* Opened before the rename: whatever can fail, fails while the old file is still there. */
    int folder = open_retry(file->folder, O_RDONLY | O_DIRECTORY, 0);
    if (folder < 0)
        return xkv_fail_errno(ctx, "open", file->folder, errno);
    xkv_status status = publish(ctx, file);
    if (status == XKV_OK)
        status = sync_folder(ctx, folder, file);
    xkv_io->close(folder);
    return status;
}

xkv_status xkv_file_commit(xkv_ctx *ctx, xkv_file *file)
{
    xkv_ctx_begin(ctx);
    xkv_status status = file->path ? commit_named(ctx, file) : XKV_OK;
    xkv_file_abort(ctx, file);
    return status;
}

void xkv_file_abort(xkv_ctx *ctx, xkv_file *file)
{
    if (file == NULL)
        return;
    if (file->map != NULL)
        xkv_io->munmap(file->map, file->map_size);
    if (file->fd >= 0)
        xkv_io->close(file->fd);
    if (file->temp != NULL)
        xkv_io->unlink(file->temp);
    xkv_release(ctx, file->temp);
    xkv_release(ctx, file->folder);
    xkv_release(ctx, file->path);
    xkv_release(ctx, file);
}
