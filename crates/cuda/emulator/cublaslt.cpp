// cuBLASLt by plain loops.

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <functional>
#include <vector>

extern "C" int emulate_enqueue(void* stream, const char* name, const std::function<void()>* work);

enum { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
/// Numbers of cudaDataType_t.
enum { F32 = 0, F16 = 2, BF16 = 14 };

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
    int row_major = 0;
    int batch = 1;
    int64_t batch_stride = 0;
};

struct Product {
    int compute, scale;
    int pointer_mode = 0;
    int transpose_a = 0, transpose_b = 0;
    int epilogue = 1;
    const void* bias = nullptr;
    int bias_type = -1;
    int64_t bias_stride = 0;
};

struct Algorithm {
    uint64_t data[8];
};

struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

static float load(const void* base, int type, int64_t i) {
    if (type == F32) return ((const float*)base)[i];
    uint16_t x = ((const uint16_t*)base)[i];
    if (type == F16) return _cvtsh_ss(x);
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static void store(void* base, int type, int64_t i, float x) {
    if (type == F32) {
        ((float*)base)[i] = x;
    } else if (type == F16) {
        ((uint16_t*)base)[i] = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
    } else {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        ((uint16_t*)base)[i] = x != x ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

/// Where an element lies.
static int64_t place(const Layout& layout, int64_t row, int64_t column) {
    return layout.row_major ? row * layout.leading + column : row + column * layout.leading;
}

static bool known(int type) { return type == F32 || type == F16 || type == BF16; }

static bool complain(const char* what) {
    fprintf(stderr, "CUDA emulator: cuBLASLt: %s\n", what);
    return false;
}

static bool fits(const Product& p, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    for (const Layout* layout : {&a, &b, &c, &d}) {
        if (!known(layout->type)) return complain("a type other than f32, f16, bf16");
        if (layout->leading < (int64_t)(layout->row_major ? layout->columns : layout->rows))
            return complain("a leading dimension that is too small");
        if (layout->batch != d.batch) return complain("batches of several sizes");
    }
    if (a.type != b.type) return complain("A and B of several types");
    if (c.type != d.type) return complain("C and D of several types");
    if (a.type == F32 && d.type != F32) return complain("D narrower than A");
    if (a.type != d.type && d.type != F32) return complain("16-bit D of another type than A");
    if (p.scale != F32) return complain("factors other than f32");
    if (p.pointer_mode != 0) return complain("factors on the device");
    if (p.epilogue != 1 && p.epilogue != 4) return complain("an epilogue other than bias");
    uint64_t m = p.transpose_a ? a.columns : a.rows, k = p.transpose_a ? a.rows : a.columns;
    uint64_t n = p.transpose_b ? b.rows : b.columns, inner = p.transpose_b ? b.columns : b.rows;
    if (k != inner || d.rows != m || d.columns != n || c.rows != m || c.columns != n)
        return complain("shapes that do not fit");
    return true;
}

static void multiply(const Product& p, float alpha, const void* a, const Layout& la, const void* b, const Layout& lb,
                     float beta, const void* c, const Layout& lc, void* d, const Layout& ld) {
    int64_t m = ld.rows, n = ld.columns, k = p.transpose_a ? la.rows : la.columns;
    std::vector<float> left(m * k), right(n * k);
    for (int batch = 0; batch < ld.batch; batch++) {
        int64_t at_a = batch * la.batch_stride, at_b = batch * lb.batch_stride;
        int64_t at_c = batch * lc.batch_stride, at_d = batch * ld.batch_stride;
        for (int64_t i = 0; i < m; i++)
            for (int64_t l = 0; l < k; l++)
                left[i * k + l] = load(a, la.type, at_a + (p.transpose_a ? place(la, l, i) : place(la, i, l)));
        for (int64_t j = 0; j < n; j++)
            for (int64_t l = 0; l < k; l++)
                right[j * k + l] = load(b, lb.type, at_b + (p.transpose_b ? place(lb, j, l) : place(lb, l, j)));
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < m; i++) {
                const float *x = &left[i * k], *y = &right[j * k];
                __m256 sums = _mm256_setzero_ps();
                int64_t l = 0;
                for (; l + 8 <= k; l += 8) sums = _mm256_fmadd_ps(_mm256_loadu_ps(x + l), _mm256_loadu_ps(y + l), sums);
                float parts[8], sum = 0;
                _mm256_storeu_ps(parts, sums);
                for (float part : parts) sum += part;
                for (; l < k; l++) sum += x[l] * y[l];
                float result = alpha * sum;
                if (beta != 0) result += beta * load(c, lc.type, at_c + place(lc, i, j));
                if (p.epilogue == 4)
                    result += load(p.bias, p.bias_type < 0 ? ld.type : p.bias_type, batch * p.bias_stride + i);
                store(d, ld.type, at_d + place(ld, i, j), result);
            }
    }
}

extern "C" {

size_t cublasLtGetVersion() { return 130000; }
size_t cublasLtGetCudartVersion() { return 13000; }
const char* cublasLtGetStatusName(int) { return "a status of the emulator"; }
const char* cublasLtGetStatusString(int) { return "a status of the emulator"; }

int cublasLtCreate(void** handle) {
    *handle = new char;
    return SUCCESS;
}
int cublasLtDestroy(void* handle) {
    delete (char*)handle;
    return SUCCESS;
}

int cublasLtMatmulDescCreate(Product** product, int compute, int scale) {
    *product = new Product{compute, scale};
    return SUCCESS;
}
int cublasLtMatmulDescDestroy(Product* product) {
    delete product;
    return SUCCESS;
}
int cublasLtMatmulDescSetAttribute(Product* product, int attribute, const void* value, size_t bytes) {
    int number = 0;
    if (bytes >= 4) memcpy(&number, value, 4);
    switch (attribute) {
        case 2: product->pointer_mode = number; break;
        case 3: product->transpose_a = number != 0; break;
        case 4: product->transpose_b = number != 0; break;
        case 7: product->epilogue = number; break;
        case 8: memcpy(&product->bias, value, 8); break;
        case 10: memcpy(&product->bias_stride, value, 8); break;
        case 26: product->bias_type = number; break;
        default: return NOT_SUPPORTED;
    }
    return SUCCESS;
}

int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = new Layout{type, rows, columns, leading};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}
int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t bytes) {
    int64_t number = 0;
    memcpy(&number, value, bytes < 8 ? bytes : 8);
    switch (attribute) {
        case 0: layout->type = (int)number; break;
        case 1:
            if (number > 1) return NOT_SUPPORTED;
            layout->row_major = (int)number;
            break;
        case 2: layout->rows = number; break;
        case 3: layout->columns = number; break;
        case 4: layout->leading = number; break;
        case 5: layout->batch = (int)number; break;
        case 6: layout->batch_stride = number; break;
        default: return NOT_SUPPORTED;
    }
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(void** preference) { return cublasLtCreate(preference); }
int cublasLtMatmulPreferenceDestroy(void* preference) { return cublasLtDestroy(preference); }
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return SUCCESS; }

int cublasLtMatmulAlgoGetHeuristic(void*, Product* product, Layout* a, Layout* b, Layout* c, Layout* d, void*, int wanted,
                                   Heuristic* results, int* found) {
    *found = 0;
    if (wanted < 1) return INVALID_VALUE;
    if (!fits(*product, *a, *b, *c, *d)) return NOT_SUPPORTED;
    memset(results, 0, sizeof *results);
    results->waves = 1;
    *found = 1;
    return SUCCESS;
}

int cublasLtMatmul(void*, Product* product, const float* alpha, const void* a, Layout* la, const void* b, Layout* lb,
                   const float* beta, const void* c, Layout* lc, void* d, Layout* ld, const Algorithm*, void*, size_t,
                   void* stream) {
    if (!fits(*product, *la, *lb, *lc, *ld)) return NOT_SUPPORTED;
    std::function<void()> work = [p = *product, alpha = *alpha, a, la = *la, b, lb = *lb, beta = *beta, c, lc = *lc, d,
                                  ld = *ld] { multiply(p, alpha, a, la, b, lb, beta, c, lc, d, ld); };
    return emulate_enqueue(stream, "cublasLtMatmul", &work) == 0 ? SUCCESS : EXECUTION_FAILED;
}

}  // extern "C"
