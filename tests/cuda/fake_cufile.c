#include "fake_cufile.h"

#include "fake_cuda.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/* As in kernels/cuda/direct.c, from the same reference. */
typedef struct cufile_error {
    int error, cuda;
} cufile_error;

typedef struct cufile_description {
    int kind;
    union {
        int fd;
        void *handle;
    } file;
    const void *operations;
} cufile_description;

#define EXPORTED __attribute__((visibility("default")))

EXPORTED fake_cufile_control fake_cufile;

EXPORTED cufile_error cuFileDriverOpen(void);
EXPORTED cufile_error cuFileDriverGetProperties(void *properties);
EXPORTED cufile_error cuFileHandleRegister(void **handle_p, cufile_description *d);
EXPORTED void cuFileHandleDeregister(void *handle);
EXPORTED ssize_t cuFileRead(void *handle, void *to, size_t size, off_t file_offset, off_t to_offset);

cufile_error cuFileDriverOpen(void)
{
    return (cufile_error){0, 0};
}

/* Without nvidia-fs: tests ask for the emulation. */
cufile_error cuFileDriverGetProperties(void *properties)
{
    memset(properties, 0, 48);
    return (cufile_error){0, 0};
}

cufile_error cuFileHandleRegister(void **handle_p, cufile_description *d)
{
    if (fake_cufile.register_error != 0 || d->kind != 1 || d->operations != NULL)
        return (cufile_error){fake_cufile.register_error, 0};
    /* The genuine one aligns reads; this one goes by way of the page cache. */
    if (fcntl(d->file.fd, F_SETFL, fcntl(d->file.fd, F_GETFL) & ~O_DIRECT) != 0)
        return (cufile_error){5019, 0};
    *handle_p = (void *)(intptr_t)(d->file.fd + 1);
    fake_cufile.open_files++;
    return (cufile_error){0, 0};
}

void cuFileHandleDeregister(void *handle)
{
    (void)handle;
    fake_cufile.open_files--;
}

ssize_t cuFileRead(void *handle, void *to, size_t size, off_t file_offset, off_t to_offset)
{
    uint8_t *place = (uint8_t *)to + to_offset;
    size_t wanted = fake_cufile.most != 0 && size > fake_cufile.most ? (size_t)fake_cufile.most : size, done = 0;

    fake_check(place, size);
    if (++fake_cufile.reads == fake_cufile.fail_at) {
        errno = EIO;
        return -1;
    }
    while (done < wanted) {
        ssize_t n = pread((int)(intptr_t)handle - 1, place + done, wanted - done, file_offset + (off_t)done);
        if (n <= 0)
            return n;
        done += (size_t)n;
    }
    if (fake_cufile.reads == fake_cufile.flip_at)
        place[wanted / 2] ^= 4;
    return (ssize_t)wanted;
}
