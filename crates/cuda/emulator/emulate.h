#pragma once
// CUDA on a CPU: what prelude.cuh includes under DIBIT_EMULATE. See README.md.

#if !defined(__F16C__) || !defined(__AVX2__) || !defined(__FMA__)
#error "compile with -mavx2 -mf16c -mfma -ffp-contract=off"
#endif

#include "fiber.h"
#include "warp.h"
#include "arithmetic.h"
#include "launch.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after another on a thread of the host.
#define __shared__ static thread_local

#define threadIdx (emulate::current->thread_index)
#define blockIdx (emulate::current->block->index)
#define blockDim (emulate::current->block->shape)
#define gridDim (emulate::current->block->grid)
#define warpSize 32

#define DYNAMIC_SHARED(name) u8* name = emulate::current->block->shared
#define EXPORT(kernel)                                                                              \
    extern "C" __attribute__((visibility("default"))) const emulate::Kernel emulate_kernel_##kernel = \
        emulate::describe<&kernel>(#kernel);                                                        \
    static const emulate::Known emulate_known_##kernel((void*)&kernel, &emulate_kernel_##kernel);
