// Devices, contexts, modules and launches.

#include "driver.h"

#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

struct Module {
    void* library;
};

struct Function {
    const emulate::Kernel* kernel;
    /// Dynamic shared memory that a launch may ask for.
    unsigned shared_limit;
};

static bool initialised = false;
static Context contexts[16];

static int capability() { return (int)setting("DIBIT_EMULATE_CAPABILITY", 90); }
static int device_count() { return (int)setting("DIBIT_EMULATE_DEVICES", 1); }

/// Largest dynamic shared memory of a block.
static int shared_optin() {
    switch (capability()) {
        case 70: return 96 << 10;
        case 75: return 64 << 10;
        case 80: case 87: return 163 << 10;
        case 86: case 88: case 89: case 120: case 121: return 99 << 10;
        default: return 227 << 10;
    }
}

static const struct {
    int result;
    const char* name;
    const char* text;
} RESULTS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {SHARED_OBJECT_INIT_FAILED, "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED", "shared object initialization failed"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "stream is not capturing, or was not captured here"},
};

/// Bytes of the ELF file at an address.
static size_t image_bytes(const void* image) {
    const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
    return header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
}

static int launch(Function* function, dim3 grid, dim3 block, unsigned shared, Stream* stream, void** parameters) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    if (function == nullptr) return INVALID_HANDLE;
    const emulate::Kernel* kernel = function->kernel;
    if (grid.count() == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || block.count() == 0 ||
        block.count() > 1024 || block.z > 64 || shared > function->shared_limit) {
        char text[256];
        snprintf(text, sizeof text, "cuLaunchKernel(%s): grid %u x %u x %u, block %u x %u x %u, %u bytes of shared memory",
                 kernel->name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
        return complain(INVALID_VALUE, text);
    }
    // Launches copy their parameters.
    std::vector<std::vector<uint64_t>> values;
    for (int i = 0; i < kernel->parameter_count; i++) {
        values.emplace_back((kernel->parameter_sizes[i] + 7) / 8);
        memcpy(values.back().data(), parameters[i], kernel->parameter_sizes[i]);
    }
    return enqueue(stream, std::string("kernel ") + kernel->name, [=]() mutable {
        std::vector<void*> pointers;
        for (auto& value : values) pointers.push_back(value.data());
        pointers.push_back(nullptr);
        kernel->launch(*kernel, grid, block, shared, pointers.data());
    });
}

extern "C" {

int cuInit(unsigned) {
    Lock lock(everything);
    if (device_count() == 0) return NO_DEVICE;
    initialised = true;
    return SUCCESS;
}

int cuDriverGetVersion(int* version) {
    *version = (int)setting("DIBIT_EMULATE_DRIVER", 13000);
    return SUCCESS;
}

int cuGetErrorName(int result, const char** name) {
    for (const auto& known : RESULTS)
        if (known.result == result) return *name = known.name, SUCCESS;
    *name = nullptr;
    return INVALID_VALUE;
}

int cuGetErrorString(int result, const char** text) {
    for (const auto& known : RESULTS)
        if (known.result == result) return *text = known.text, SUCCESS;
    *text = nullptr;
    return INVALID_VALUE;
}

int cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
    Dl_info own;
    dladdr((void*)&cuInit, &own);
    void* library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    std::string name = symbol;
    *function = dlsym(library, (name + "_v2").c_str());
    if (*function == nullptr) *function = dlsym(library, symbol);
    dlclose(library);
    if (status) *status = *function == nullptr;
    return *function ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}

int cuDeviceGetCount(int* count) {
    if (!initialised) return NOT_INITIALIZED;
    *count = device_count();
    return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
    if (!initialised) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= device_count()) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, length, "dibit emulator");
    return SUCCESS;
}

int cuDeviceGetUuid_v2(char* uuid, int device) {
    memset(uuid, 0xd1, 16);
    uuid[15] = (char)device;
    return SUCCESS;
}
int cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = memory_total();
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 1: *value = 1024; break;               // MAX_THREADS_PER_BLOCK
        case 2: case 3: *value = 1024; break;       // MAX_BLOCK_DIM_X, Y
        case 4: *value = 64; break;                 // MAX_BLOCK_DIM_Z
        case 5: *value = 0x7fffffff; break;         // MAX_GRID_DIM_X
        case 6: case 7: *value = 65535; break;      // MAX_GRID_DIM_Y, Z
        case 8: *value = 48 << 10; break;           // MAX_SHARED_MEMORY_PER_BLOCK
        case 9: *value = 64 << 10; break;           // TOTAL_CONSTANT_MEMORY
        case 10: *value = 32; break;                // WARP_SIZE
        case 12: case 82: *value = 65536; break;    // MAX_REGISTERS_PER_BLOCK, PER_MULTIPROCESSOR
        case 13: case 36: *value = 1000000; break;  // CLOCK_RATE, MEMORY_CLOCK_RATE
        case 16: *value = 4; break;                 // MULTIPROCESSOR_COUNT
        case 19: case 31: case 41: case 40: *value = 1; break;
        case 37: *value = 64; break;                // GLOBAL_MEMORY_BUS_WIDTH
        case 38: *value = 4 << 20; break;           // L2_CACHE_SIZE
        case 39: *value = 2048; break;              // MAX_THREADS_PER_MULTIPROCESSOR
        case 75: *value = capability() / 10; break;
        case 76: *value = capability() % 10; break;
        case 81: *value = shared_optin() + 1024; break;  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        case 97: *value = shared_optin(); break;    // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        case 106: *value = 32; break;               // MAX_BLOCKS_PER_MULTIPROCESSOR
        case 111: *value = 1024; break;             // RESERVED_SHARED_MEMORY_PER_BLOCK
        default: *value = 0;
    }
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(Context** context, int device) {
    Lock lock(everything);
    if (!initialised) return NOT_INITIALIZED;
    if (device < 0 || device >= device_count() || device >= 16) return INVALID_DEVICE;
    contexts[device].device = device;
    contexts[device].retained++;
    *context = &contexts[device];
    return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    Lock lock(everything);
    finish();
    if (contexts[device].retained == 0) return INVALID_CONTEXT;
    contexts[device].retained--;
    return SUCCESS;
}

int cuCtxSetCurrent(Context* context) {
    current_context = context;
    return SUCCESS;
}
int cuCtxGetCurrent(Context** context) {
    *context = current_context;
    return SUCCESS;
}
int cuCtxGetDevice(int* device) {
    if (current_context == nullptr) return INVALID_CONTEXT;
    *device = current_context->device;
    return SUCCESS;
}

int cuModuleLoadData(Module** module, const void* image) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    if (capture_forbids()) return complain(CAPTURE_UNSUPPORTED, "cuModuleLoadData during a capture");
    if (memcmp(image, ELFMAG, SELFMAG) != 0)
        return complain(INVALID_PTX, "cuModuleLoadData: PTX or an image that the emulator's NVRTC has not made");
    size_t bytes = image_bytes(image);
    int file = memfd_create("dibit-emulator-module", MFD_CLOEXEC);
    for (size_t done = 0; done < bytes;) {
        ssize_t written = write(file, (const char*)image + done, bytes - done);
        if (written <= 0) fail("a module cannot be written");
        done += written;
    }
    std::string path = "/proc/self/fd/" + std::to_string(file);
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    // The file stays open: the loader knows libraries by their names, and another file would get this one's.
    if (library == nullptr) return complain(SHARED_OBJECT_INIT_FAILED, dlerror());
    *module = new Module{library};
    return SUCCESS;
}
int cuModuleLoadDataEx(Module** module, const void* image, unsigned, void*, void**) {
    return cuModuleLoadData(module, image);
}

/// The library stays: other threads of the host may have its stacks.
int cuModuleUnload(Module* module) {
    Lock lock(everything);
    finish();
    delete module;
    return SUCCESS;
}

int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    Lock lock(everything);
    void* kernel = dlsym(module->library, (std::string("emulate_kernel_") + name).c_str());
    if (kernel == nullptr) return complain(NOT_FOUND, std::string("no EXPORT(") + name + ") in the module");
    *function = new Function{(const emulate::Kernel*)kernel, 48 << 10};
    return SUCCESS;
}

int cuFuncSetAttribute(Function* function, int attribute, int value) {
    Lock lock(everything);
    if (attribute == 8) {
        if (value < 0 || value > shared_optin()) return INVALID_VALUE;
        function->shared_limit = (unsigned)value;
    }
    return SUCCESS;
}

int cuFuncGetAttribute(int* value, int attribute, Function* function) {
    switch (attribute) {
        case 0: *value = 1024; break;  // MAX_THREADS_PER_BLOCK
        case 4: *value = 32; break;    // NUM_REGS
        case 5: case 6: *value = capability(); break;
        case 8: *value = (int)function->shared_limit; break;
        default: *value = 0;
    }
    return SUCCESS;
}
int cuFuncSetCacheConfig(Function*, int) { return SUCCESS; }

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function*, int threads, size_t shared) {
    if (threads <= 0 || threads > 1024 || shared > (size_t)shared_optin()) return INVALID_VALUE;
    int by_threads = 2048 / ((threads + 31) / 32 * 32), by_shared = (int)((shared_optin() + 1024) / (shared + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    if (*blocks > 32) *blocks = 32;
    return SUCCESS;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* function, int threads, size_t shared,
                                                         unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, Stream* stream, void** parameters, void** extra) {
    if (extra != nullptr) return NOT_SUPPORTED;
    return launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, stream, parameters);
}

struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    Stream* stream;
    void* attributes;
    unsigned attribute_count;
};

int cuLaunchKernelEx(const LaunchConfig* c, Function* function, void** parameters, void** extra) {
    if (extra != nullptr) return NOT_SUPPORTED;
    return launch(function, {c->grid_x, c->grid_y, c->grid_z}, {c->block_x, c->block_y, c->block_z}, c->shared, c->stream,
                  parameters);
}

int cuProfilerStart() { return SUCCESS; }
int cuProfilerStop() { return SUCCESS; }

}  // extern "C"
