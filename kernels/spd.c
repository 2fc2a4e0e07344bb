#include "kernels.h"

/* LAPACK as OpenBLAS exports it. */
void dpotrf_(const char *uplo, const int *n, double *a, const int *lda, int *info, size_t uplo_length);
void dpotri_(const char *uplo, const int *n, double *a, const int *lda, int *info, size_t uplo_length);

bool xkv_spd_inverse(uint32_t n, double *a)
{
    int order = (int)n, info = 0;

    dpotrf_("U", &order, a, &order, &info, 1);
    if (info == 0)
        dpotri_("U", &order, a, &order, &info, 1);
    if (info != 0)
        return false;
    for (size_t j = 0; j < n; j++) /* "U" of a column-major matrix: a[j * n + i] with i <= j is set */
        for (size_t i = 0; i < j; i++)
            a[i * n + j] = a[j * n + i];
    return true;
}

xkv_status xkv_gram_inverse(xkv_ctx *ctx, uint32_t n, double ridge, float *gram, bool *regular)
{
    size_t elements = (size_t)n * n;
    double *a;

    XKV_TRY(XKV_NEW(ctx, elements, &a));
    for (size_t i = 0; i < elements; i++) /* a row of zeros shall not make it singular */
        a[i] = (double)gram[i] + (i % (n + (size_t)1) == 0 ? ridge + (gram[i] == 0) : 0);
    *regular = xkv_spd_inverse(n, a);
    for (size_t i = 0; *regular && i < elements; i++)
        gram[i] = (float)a[i];
    xkv_release(ctx, a);
    return XKV_OK;
}
