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
