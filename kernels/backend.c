/* backend.c - finding the plug-in of a device backend, and which backend it shall be. */
#include "backend.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define PLUGIN_FILE "libxkv_cuda.so"

/* The plug-in, looked for once: what was found, or why nothing was. It is never unloaded, since CUDA's libraries leave
 * handlers behind. */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static const xkv_plugin *plugin;
static char load_error[256];

/* --- Loading ------------------------------------------------------------------------------------------------------ */

/* Beside the library that this code is in. */
static void default_path(char *path, size_t size)
{
    Dl_info self;
    const char *slash;

    path[0] = '\0';
    if (dladdr((const void *)&once, &self) == 0 || self.dli_fname == NULL)
        return;
    slash = strrchr(self.dli_fname, '/');
    if (slash != NULL)
        (void)snprintf(path, size, "%.*s/%s", (int)(slash - self.dli_fname), self.dli_fname, PLUGIN_FILE);
}

static const xkv_plugin *check_table(const char *path, const xkv_plugin *table)
{
    if (table == NULL)
        (void)snprintf(load_error, sizeof load_error, "%s is no plug-in of xkv", path);
    else if (table->abi != XKV_PLUGIN_ABI || table->size != sizeof *table)
        (void)snprintf(load_error, sizeof load_error, "%s has plug-in version %u, this library needs %u", path,
                       table->abi, XKV_PLUGIN_ABI);
    else
        return table;
    return NULL;
}

static void load(void)
{
    const char *given = secure_getenv("XKV_CUDA_PLUGIN");
    char path[4096];
    void *library;

    if (given != NULL && given[0] != '\0')
        (void)snprintf(path, sizeof path, "%s", given);
    else
        default_path(path, sizeof path);
    library = path[0] != '\0' ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (library == NULL) {
        const char *why = path[0] != '\0' ? dlerror() : NULL;
        (void)snprintf(load_error, sizeof load_error, "no plug-in: %s", why != NULL ? why : PLUGIN_FILE);
        return;
    }
    plugin = check_table(path, dlsym(library, XKV_PLUGIN_SYMBOL));
    if (plugin == NULL)
        (void)dlclose(library);
}

/* --- Choice ------------------------------------------------------------------------------------------------------- */

bool xkv_backend_wanted(uint32_t *backend)
{
    static const char *const names[] = {"auto", "cpu", "cuda"};
    const char *wanted = getenv("XKV_BACKEND");

    *backend = XKV_BACKEND_AUTO;
    if (wanted == NULL || wanted[0] == '\0')
        return true;
    for (uint32_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(wanted, names[i]) == 0) {
            *backend = i;
            return true;
        }
    return false;
}

const xkv_plugin *xkv_backend_plugin(uint32_t *count, char *why, size_t why_size)
{
    *count = 0;
    pthread_once(&once, load);
    if (plugin == NULL) {
        (void)snprintf(why, why_size, "%s", load_error);
        return NULL;
    }
    *count = plugin->count(why, why_size);
    return plugin;
}

void xkv_backend_get_info(xkv_backend_info *info)
{
    uint32_t wanted;

    memset(info, 0, sizeof *info);
    info->backend = XKV_BACKEND_CPU;
    if (!xkv_backend_wanted(&wanted)) {
        (void)snprintf(info->reason, sizeof info->reason, "XKV_BACKEND is none of auto, cpu, cuda");
        return;
    }
    if (wanted == XKV_BACKEND_CPU) {
        (void)snprintf(info->reason, sizeof info->reason, "XKV_BACKEND=cpu");
        return;
    }
    (void)xkv_backend_plugin(&info->device_count, info->reason, sizeof info->reason);
    if (info->device_count > 0) {
        info->backend = XKV_BACKEND_CUDA;
        info->reason[0] = '\0';
    }
}
