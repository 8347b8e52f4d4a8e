// Uses the emulator's driver, NVRTC and cuBLASLt as the product does. Run by selftest.sh.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

typedef uint64_t Address;

extern "C" {
int cuInit(unsigned);
int cuDeviceGetAttribute(int*, int, int);
int cuDevicePrimaryCtxRetain(void**, int);
int cuCtxSetCurrent(void*);
int cuMemGetInfo_v2(size_t*, size_t*);
int cuMemAlloc_v2(Address*, size_t);
int cuMemFree_v2(Address);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemFreeHost(void*);
int cuMemcpyHtoDAsync_v2(Address, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, Address, size_t, void*);
int cuMemcpyDtoH_v2(void*, Address, size_t);
int cuMemsetD8Async(Address, unsigned char, size_t, void*);
int cuStreamCreate(void**, unsigned);
int cuStreamSynchronize(void*);
int cuStreamBeginCapture_v2(void*, int);
int cuStreamEndCapture(void*, void**);
int cuGraphInstantiateWithFlags(void**, void*, unsigned long long);
int cuGraphGetNodes(void*, void**, size_t*);
int cuGraphLaunch(void*, void*);
int cuGraphDestroy(void*);
int cuGraphExecDestroy(void*);
int cuModuleLoadData(void**, const void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuFuncSetAttribute(void*, int, int);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int cuGetErrorString(int, const char**);
int nvrtcCreateProgram(void**, const char*, const char*, int, const char* const*, const char* const*);
int nvrtcCompileProgram(void*, int, const char* const*);
int nvrtcGetCUBINSize(void*, size_t*);
int nvrtcGetCUBIN(void*, char*);
int nvrtcGetProgramLogSize(void*, size_t*);
int nvrtcGetProgramLog(void*, char*);
int nvrtcDestroyProgram(void**);
int cublasLtCreate(void**);
int cublasLtMatmulDescCreate(void**, int, int);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatrixLayoutCreate(void**, int, uint64_t, uint64_t, int64_t);
int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulPreferenceCreate(void**);
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int*);
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*,
                   void*, const void*, void*, size_t, void*);
}

static int failures = 0;

static void check(bool good, const char* what) {
    printf("%s %s\n", good ? "ok  " : "FAIL", what);
    failures += !good;
}

static void need(int result, const char* call) {
    if (result == 0) return;
    printf("FAIL %s gives %d\n", call, result);
    exit(1);
}
#define NEED(call) need(call, #call)

static const char* KERNELS = R"(
struct Step { float factor; int count; i64 first; };
extern "C" __global__ void scale(float* x, Step step) {
    __shared__ float tile[WIDTH];
    int i = blockIdx.x * WIDTH + threadIdx.x;
    tile[threadIdx.x] = i < step.count ? x[step.first + i] : 0;
    __syncthreads();
    if (i < step.count) x[step.first + i] = tile[threadIdx.x] * step.factor;
}
EXPORT(scale)
extern "C" __global__ void stray(float* x, int place) { x[place] = 1; }
EXPORT(stray)
extern "C" __global__ void wide(float* x) {
    DYNAMIC_SHARED(memory);
    ((float*)memory)[50000] = 2;
    x[0] = ((float*)memory)[50000];
}
EXPORT(wide)
)";

struct Step {
    float factor;
    int count;
    long long first;
};

static std::string text(const char* path) {
    std::ifstream file(path);
    std::ostringstream s;
    s << file.rdbuf();
    return s.str();
}

static std::vector<char> compile(const std::string& source, const char* width) {
    void* program;
    NEED(nvrtcCreateProgram(&program, source.c_str(), "test.cu", 0, nullptr, nullptr));
    const char* options[] = {"--gpu-architecture=sm_90", "--std=c++17", width};
    int result = nvrtcCompileProgram(program, 3, options);
    size_t bytes = 0;
    if (result != 0) {
        nvrtcGetProgramLogSize(program, &bytes);
        std::vector<char> log(bytes);
        nvrtcGetProgramLog(program, log.data());
        printf("%s\n", log.data());
        return {};
    }
    NEED(nvrtcGetCUBINSize(program, &bytes));
    std::vector<char> image(bytes);
    NEED(nvrtcGetCUBIN(program, image.data()));
    NEED(nvrtcDestroyProgram(&program));
    return image;
}

static void test_matmul(void* stream) {
    // D (m x n) = A^T B + C of two batches, as the product multiplies rows with weights.
    const int m = 5, n = 3, k = 19, batch = 2;
    std::vector<uint16_t> a(m * k * batch), b(n * k * batch);
    std::vector<float> c(m * n * batch), want(m * n * batch);
    for (size_t i = 0; i < a.size(); i++) a[i] = (uint16_t)(0x3c00 + i % 7 * 64 + (i % 2 << 15));
    for (size_t i = 0; i < b.size(); i++) b[i] = (uint16_t)(0x3800 + i % 5 * 32 + (i % 3 / 2 << 15));
    auto value = [](uint16_t h) { return (float)ldexp(1024 + (h & 1023), (h >> 10 & 31) - 25) * (h & 0x8000 ? -1 : 1); };
    for (int z = 0; z < batch; z++)
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                float sum = c[(z * n + j) * m + i] = (float)i;
                for (int l = 0; l < k; l++) sum += value(a[(z * m + i) * k + l]) * value(b[(z * n + j) * k + l]);
                want[(z * n + j) * m + i] = sum;
            }
    Address da, db, dc;
    NEED(cuMemAlloc_v2(&da, a.size() * 2));
    NEED(cuMemAlloc_v2(&db, b.size() * 2));
    NEED(cuMemAlloc_v2(&dc, c.size() * 4));
    NEED(cuMemcpyHtoDAsync_v2(da, a.data(), a.size() * 2, stream));
    NEED(cuMemcpyHtoDAsync_v2(db, b.data(), b.size() * 2, stream));
    NEED(cuMemcpyHtoDAsync_v2(dc, c.data(), c.size() * 4, stream));
    void *handle, *product, *la, *lb, *lc, *preference;
    NEED(cublasLtCreate(&handle));
    NEED(cublasLtMatmulDescCreate(&product, 68, 0));
    int yes = 1, found = 0;
    NEED(cublasLtMatmulDescSetAttribute(product, 3, &yes, 4));
    NEED(cublasLtMatrixLayoutCreate(&la, 2, k, m, k));
    NEED(cublasLtMatrixLayoutCreate(&lb, 2, k, n, k));
    NEED(cublasLtMatrixLayoutCreate(&lc, 0, m, n, m));
    int64_t strides[] = {m * k, n * k, m * n};
    void* layouts[] = {la, lb, lc};
    for (int i = 0; i < 3; i++) {
        NEED(cublasLtMatrixLayoutSetAttribute(layouts[i], 5, &batch, 4));
        NEED(cublasLtMatrixLayoutSetAttribute(layouts[i], 6, &strides[i], 8));
    }
    NEED(cublasLtMatmulPreferenceCreate(&preference));
    char heuristic[128];
    NEED(cublasLtMatmulAlgoGetHeuristic(handle, product, la, lb, lc, lc, preference, 1, heuristic, &found));
    float one = 1;
    NEED(cublasLtMatmul(handle, product, &one, (void*)da, la, (void*)db, lb, &one, (void*)dc, lc, (void*)dc, lc, heuristic,
                        nullptr, 0, stream));
    NEED(cuMemcpyDtoHAsync_v2(c.data(), dc, c.size() * 4, stream));
    bool good = found == 1;
    for (size_t i = 0; i < c.size(); i++) good &= fabsf(c[i] - want[i]) < 1e-4f;
    check(good, "cublasLtMatmul");
    NEED(cuMemFree_v2(da));
    NEED(cuMemFree_v2(db));
    NEED(cuMemFree_v2(dc));
}

int main(int count, char** arguments) {
    void *context, *stream, *module, *other, *scale, *scale_narrow, *stray, *wide;
    NEED(cuInit(0));
    Address early;
    check(cuMemAlloc_v2(&early, 16) == 201, "calls without a context are refused");
    NEED(cuDevicePrimaryCtxRetain(&context, 0));
    NEED(cuCtxSetCurrent(context));
    NEED(cuStreamCreate(&stream, 1));
    std::string source = text(arguments[1]) + "\n" + text(arguments[2]) + "\n#line 1 \"test.cu\"\n" + KERNELS;
    std::vector<char> image = compile(source, "-DWIDTH=64"), narrow = compile(source, "-DWIDTH=16");
    NEED(cuModuleLoadData(&module, image.data()));
    NEED(cuModuleLoadData(&other, narrow.data()));
    NEED(cuModuleGetFunction(&scale, module, "scale"));
    NEED(cuModuleGetFunction(&scale_narrow, other, "scale"));
    NEED(cuModuleGetFunction(&stray, module, "stray"));
    NEED(cuModuleGetFunction(&wide, module, "wide"));
    check(cuModuleGetFunction(&context, module, "nothing") == 500, "unknown kernels are not found");

    Address x;
    const int length = 1000;
    NEED(cuMemAlloc_v2(&x, length * 4));
    if (count > 3) {
        // Ends the process with a message.
        int place = length;
        void* parameters[] = {&x, &place};
        NEED(cuLaunchKernel(stray, 1, 1, 1, 1, 1, 1, 0, stream, parameters, nullptr));
        NEED(cuStreamSynchronize(stream));
        return 0;
    }
    float* host;
    NEED(cuMemHostAlloc((void**)&host, length * 4, 0));
    for (int i = 0; i < length; i++) host[i] = (float)i;
    NEED(cuMemcpyHtoDAsync_v2(x, host, length * 4, stream));
    {
        Step step = {3, 990, 5};
        void* parameters[] = {&x, &step};
        NEED(cuLaunchKernel(scale, 16, 1, 1, 64, 1, 1, 0, stream, parameters, nullptr));
        step = {2, 990, 5};
        NEED(cuLaunchKernel(scale_narrow, 62, 1, 1, 16, 1, 1, 0, stream, parameters, nullptr));
        step.factor = 1000;
    }
    NEED(cuMemcpyDtoHAsync_v2(host, x, length * 4, stream));
    check(host[500] == 500, "nothing is done before somebody waits");
    NEED(cuStreamSynchronize(stream));
    bool good = true;
    for (int i = 0; i < length; i++) good &= host[i] == (i >= 5 && i < 995 ? 6.0f : 1.0f) * (float)i;
    check(good, "modules of two widths, launches in order");

    void *graph, *instance;
    NEED(cuStreamBeginCapture_v2(stream, 0));
    {
        Step step = {0.5f, length, 0};
        void* parameters[] = {&x, &step};
        NEED(cuLaunchKernel(scale, 16, 1, 1, 64, 1, 1, 0, stream, parameters, nullptr));
        NEED(cuMemcpyDtoHAsync_v2(host, x, length * 4, stream));
        step.factor = 1000;
    }
    check(cuStreamSynchronize(stream) == 900 && cuMemAlloc_v2(&early, 16) == 900, "captures forbid waiting and allocating");
    NEED(cuStreamEndCapture(stream, &graph));
    size_t nodes = 0;
    NEED(cuGraphGetNodes(graph, nullptr, &nodes));
    NEED(cuGraphInstantiateWithFlags(&instance, graph, 0));
    NEED(cuGraphDestroy(graph));
    for (int i = 0; i < 3; i++) NEED(cuGraphLaunch(instance, stream));
    NEED(cuStreamSynchronize(stream));
    check(nodes == 2 && host[2] == 0.25f && host[500] == 500 * 0.75f, "graphs");
    NEED(cuGraphExecDestroy(instance));

    void* parameters[] = {&x};
    check(cuLaunchKernel(wide, 1, 1, 1, 1, 1, 1, 200004, stream, parameters, nullptr) == 1, "large shared memory is opt-in");
    NEED(cuFuncSetAttribute(wide, 8, 232448));
    NEED(cuLaunchKernel(wide, 1, 1, 1, 1, 1, 1, 200004, stream, parameters, nullptr));
    NEED(cuMemcpyDtoH_v2(host, x, 4));
    check(host[0] == 2, "large shared memory");
    NEED(cuMemsetD8Async(x, 0, 4, stream));
    check(cuMemsetD8Async(x + 8, 0, length * 4, stream) == 1, "ranges outside of memory are refused");

    size_t free = 0, total = 0;
    NEED(cuMemGetInfo_v2(&free, &total));
    check(total == 1000000 && free == total - 4096, "cuMemGetInfo");
    check(cuMemAlloc_v2(&early, free + 1) == 2, "memory ends");
    NEED(cuMemFree_v2(x));
    NEED(cuMemFreeHost(host));
    test_matmul(stream);
    check(compile("int x = ;", "-DWIDTH=1").empty(), "errors of the compiler are reported");
    const char* message = nullptr;
    check(cuGetErrorString(2, &message) == 0 && !strcmp(message, "out of memory"), "cuGetErrorString");
    return failures != 0;
}
