/* emulated.h - the emulated plug-in in tests. */
#ifndef XKV_TEST_EMULATED_H
#define XKV_TEST_EMULATED_H

#include "support.h"

#include "../cuda/fake_cuda.h"
#include "device.h"

#include <dlfcn.h>
#include <stdlib.h>

/* Make it the plug-in of this process, before anything asks for one; what it is told to do. */
static inline fake_cuda_control *emulated_control(void)
{
    void *library = dlopen(XKV_EMULATED_PLUGIN, RTLD_NOW | RTLD_LOCAL);
    fake_cuda_control *control;

    if (library == NULL) {
        print_error("%s\n", dlerror());
        abort();
    }
    control = dlsym(library, "fake_cuda");
    setenv("XKV_CUDA_PLUGIN", XKV_EMULATED_PLUGIN, 1);
    return control;
}

#endif
