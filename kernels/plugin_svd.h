/* plugin_svd.h - the operations of plugin.h that the truncated SVD takes beside those of plugin_pack.h: small dense
 * algebra in f64. The same rules hold. Included by plugin.h. */
#ifndef XKV_PLUGIN_SVD_H
#define XKV_PLUGIN_SVD_H

/* Both A and B, and C, of a product are f64: g.c points to doubles. */
enum { XKV_PRODUCT_F64 = 4 };

/* Workspace of cholesky() and eigen() for order n, and `batch` eigenproblems. Asked for first: it also gets what the
 * two need. */
typedef struct xkv_plug_dense_size {
    uint64_t cholesky, eigen; /* bytes of the device */
    uint64_t eigen_host;      /* bytes of the host */
} xkv_plug_dense_size;

/* Random signs in bf16: out[i], i < count, +1 or -1, the same on every machine. */
typedef struct xkv_plug_sketch {
    uint16_t *out;
    uint64_t count, seed;
} xkv_plug_sketch;

/* Numbers to f64 (from f32), or to f32 (from f64). Row i of `to` is row i of `from`, or, `reversed`, row rows - 1 - i.
 */
typedef struct xkv_plug_convert {
    const void *from;
    void *to;
    uint64_t rows, cols;
    uint32_t to_f64, reversed;
} xkv_plug_convert;

/* A Gram matrix of columns made of unit length, with `shift` on its diagonal: out[i][j] = gram[i][j] / sqrt(gram[i][i]
 * gram[j][j]). Columns of z [rows][n] are divided likewise; null columns become 0. */
typedef struct xkv_plug_scale_gram {
    const double *gram;
    double *out, *z;
    uint64_t n, rows;
    double shift;
} xkv_plug_scale_gram;

/* gram [n][n] = L L^T, then z [rows][n] = z L^-T. *info is 0, or the leading minor that is not positive. */
typedef struct xkv_plug_cholesky {
    double *gram, *z;
    uint64_t n, rows;
    void *work;
    uint64_t work_size; /* as dense_size() says */
    int32_t *info;
} xkv_plug_cholesky;

/* Eigenvalues, ascending, and eigenvectors, as rows in place of a, of `batch` symmetric matrices a [batch][n][n];
 * values [batch][n], info [batch]: 0 where found. `host_work` is read and written before the call returns. */
typedef struct xkv_plug_eigen {
    double *a, *values;
    uint64_t n, batch;
    void *work, *host_work;
    uint64_t work_size, host_size; /* as dense_size() says */
    int32_t *info;
} xkv_plug_eigen;

#endif
