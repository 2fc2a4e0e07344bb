/* dispatch.c - which operation table this process uses. Chosen once. */
#include "ops.h"

#include <cblas.h>
#include <pthread.h>
#include <stdlib.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const xkv_kernels *chosen;
static bool choice_ignored;

const xkv_kernels *xkv_kernels_cpu_vector(void)
{
    const xkv_kernels *tables[] = {xkv_kernels_cpu_avx512(), xkv_kernels_cpu_avx2(), xkv_kernels_cpu_neon()};

    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (tables[i])
            return tables[i];
    return NULL;
}

static void choose(void)
{
    const xkv_kernels *generic = xkv_kernels_cpu_generic(), *vector = xkv_kernels_cpu_vector();
    const xkv_kernels *lower[] = {xkv_kernels_cpu_avx2(), generic};
    const char *wanted = getenv("XKV_CPU");
    chosen = vector != NULL ? vector : generic;
    for (size_t i = 0; wanted != NULL && i < sizeof lower / sizeof *lower; i++)
        if (lower[i] != NULL && strcmp(wanted, lower[i]->name) == 0)
            chosen = lower[i];
    choice_ignored = wanted != NULL && strcmp(wanted, chosen->name) != 0;
}

const xkv_kernels *xkv_kernels_cpu(void)
{
    pthread_once(&once, choose);
    return chosen;
}

bool xkv_kernels_cpu_choice_ignored(void)
{
    pthread_once(&once, choose);
    return choice_ignored;
}

const char *xkv_kernels_cpu_name(void)
{
    return xkv_kernels_cpu()->name;
}

const char *xkv_kernels_blas_name(void)
{
    return openblas_get_config();
}
