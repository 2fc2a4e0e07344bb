/* direct.c - cuFile. Its interface is declared here, as NVIDIA's cuFile API Reference Guide describes it: not every
 * toolkit brings its header, and not every machine the library, so that it is neither included nor linked. */
#include "direct.h"

#include "text.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#ifndef XKV_CUFILE_LIBRARY
#define XKV_CUFILE_LIBRARY "libcufile.so.0"
#endif

/* --- The interface of cuFile -------------------------------------------------------------------------------------- */

typedef struct cufile_error {
    int error; /* CUFILE_..., or others */
    int cuda;  /* CUresult */
} cufile_error;

enum { CUFILE_SUCCESS = 0, CUFILE_ALREADY_OPEN = 5026, CUFILE_LINUX_DESCRIPTOR = 1 };

typedef struct cufile_description {
    int kind; /* CUFILE_LINUX_DESCRIPTOR */
    union {
        int fd;
        void *handle;
    } file;
    const void *operations; /* of file systems in user space: NULL */
} cufile_description;

typedef struct cufile_properties {
    struct {
        unsigned major, minor; /* of nvidia-fs; 0.0 without it */
        size_t poll_threshold, most_direct;
        unsigned status, control;
    } driver;
    unsigned others[32]; /* versions differ in how many there are */
} cufile_properties;

typedef struct cufile_functions {
    cufile_error (*driver_open)(void);
    cufile_error (*get_properties)(cufile_properties *p);
    cufile_error (*register_file)(void **handle_p, cufile_description *d);
    void (*deregister_file)(void *handle);
    ssize_t (*read)(void *handle, void *to, size_t size, off_t file_offset, off_t to_offset);
} cufile_functions;

/* --- Loading ------------------------------------------------------------------------------------------------------ */

/* What became of it, which stays so: cuFile is the process's, and is not closed, since others may use it too. */
static struct {
    cufile_functions call;
    int usable, direct; /* direct: there is nvidia-fs */
    char why[256];
} cufile;
static pthread_once_t loaded = PTHREAD_ONCE_INIT;

static int find_functions(void *library)
{
    const struct {
        const char *name;
        void *function;
    } list[] = {
        {"cuFileDriverOpen", &cufile.call.driver_open},
        {"cuFileDriverGetProperties", &cufile.call.get_properties},
        {"cuFileHandleRegister", &cufile.call.register_file},
        {"cuFileHandleDeregister", &cufile.call.deregister_file},
        {"cuFileRead", &cufile.call.read},
    };

    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        void *symbol = dlsym(library, list[i].name);
        if (symbol == NULL) {
            xkv_write_text(cufile.why, sizeof cufile.why, "%s has no %s", XKV_CUFILE_LIBRARY, list[i].name);
            return 0;
        }
        memcpy(list[i].function, &symbol, sizeof symbol);
    }
    return 1;
}

static int start_driver(void)
{
    cufile_properties p;
    cufile_error e = cufile.call.driver_open();

    if (e.error == CUFILE_SUCCESS || e.error == CUFILE_ALREADY_OPEN) {
        memset(&p, 0, sizeof p);
        e = cufile.call.get_properties(&p);
        cufile.direct = e.error == CUFILE_SUCCESS && p.driver.major > 0;
        return 1;
    }
    xkv_write_text(cufile.why, sizeof cufile.why, "cuFileDriverOpen: error %d, CUDA %d", e.error, e.cuda);
    return 0;
}

static void load(void)
{
    void *library = dlopen(XKV_CUFILE_LIBRARY, RTLD_NOW | RTLD_LOCAL);

    if (library == NULL)
        xkv_write_text(cufile.why, sizeof cufile.why, "no cuFile: %s", dlerror());
    else
        cufile.usable = find_functions(library) && start_driver();
}

/* --- Files -------------------------------------------------------------------------------------------------------- */

struct xkv_direct_file {
    int fd;
    void *handle;
};

/* The same file, past the page cache: transfers need that. */
static int open_again(int fd, int emulation)
{
    char path[32];
    int again;

    xkv_write_text(path, sizeof path, "/proc/self/fd/%d", fd);
    again = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    return again < 0 && emulation ? open(path, O_RDONLY | O_CLOEXEC) : again;
}

static xkv_status register_file(xkv_direct_file *f, const xkv_plug_file_open *o, char *error, size_t error_size)
{
    cufile_description d;
    cufile_error e;

    f->fd = open_again(o->fd, o->emulation != 0);
    if (f->fd < 0) {
        xkv_write_text(error, error_size, "cannot open a file for direct reads: %s", strerror(errno));
        return XKV_ERROR_UNSUPPORTED;
    }
    memset(&d, 0, sizeof d);
    d.kind = CUFILE_LINUX_DESCRIPTOR;
    d.file.fd = f->fd;
    e = cufile.call.register_file(&f->handle, &d);
    if (e.error == CUFILE_SUCCESS)
        return XKV_OK;
    f->handle = NULL;
    xkv_write_text(error, error_size, "cuFileHandleRegister: error %d, CUDA %d", e.error, e.cuda);
    return XKV_ERROR_UNSUPPORTED;
}

xkv_status xkv_direct_open(const xkv_plug_file_open *o, xkv_direct_file **file_p, char *error, size_t error_size)
{
    xkv_direct_file *f;
    xkv_status status;

    (void)pthread_once(&loaded, load);
    if (!cufile.usable || (!cufile.direct && !o->emulation)) {
        xkv_write_text(error, error_size, "%s", cufile.usable ? "the driver nvidia-fs is not there" : cufile.why);
        return XKV_ERROR_UNSUPPORTED;
    }
    f = calloc(1, sizeof *f);
    if (f == NULL) {
        xkv_write_text(error, error_size, "out of memory");
        return XKV_ERROR_MEMORY;
    }
    status = register_file(f, o, error, error_size);
    if (status == XKV_OK)
        *file_p = f;
    else
        xkv_direct_close(f);
    return status;
}

void xkv_direct_close(xkv_direct_file *f)
{
    if (f == NULL)
        return;
    if (f->handle != NULL)
        cufile.call.deregister_file(f->handle);
    if (f->fd >= 0)
        (void)close(f->fd);
    free(f);
}

xkv_status xkv_direct_read(const xkv_plug_file_read *o, char *error, size_t error_size)
{
    const xkv_direct_file *f = o->file;

    for (uint64_t done = 0; done < o->size;) {
        ssize_t n =
            cufile.call.read(f->handle, o->to, (size_t)(o->size - done), (off_t)(o->offset + done), (off_t)done);
        if (n > 0) {
            done += (uint64_t)n;
            continue;
        }
        if (n == 0)
            xkv_write_text(error, error_size, "cuFileRead: the file ends at offset %llu",
                           (unsigned long long)(o->offset + done));
        else
            xkv_write_text(error, error_size, "cuFileRead: %s %d", n == -1 ? "errno" : "error",
                           n == -1 ? errno : (int)-n);
        return XKV_ERROR_BACKEND;
    }
    return XKV_OK;
}
