#pragma once
// What a launch looks like to both the kernels and the driver.

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr unsigned long long count() const { return (unsigned long long)x * y * z; }
};

namespace emulate {

/// How EXPORT(name) makes a kernel known, as `emulate_kernel_NAME`.
struct Kernel {
    const char* name;
    void (*launch)(const Kernel& kernel, dim3 grid, dim3 block, unsigned shared_bytes, void** parameters);
    /// Calls the kernel as one thread.
    void (*call)(void** parameters);
    int parameter_count;
    const unsigned* parameter_sizes;
};

}  // namespace emulate
