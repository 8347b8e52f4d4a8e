#pragma once
// Vector types, atomics, conversions and mathematical functions of CUDA.

#include <assert.h>
#include <math.h>

#include "fiber.h"

struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { u64 x, y; };
struct alignas(4) uchar4 { u8 x, y, z, w; };
struct alignas(4) ushort2 { u16 x, y; };
struct alignas(8) ushort4 { u16 x, y, z, w; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
inline ulonglong2 make_ulonglong2(u64 x, u64 y) { return {x, y}; }
inline uchar4 make_uchar4(u8 x, u8 y, u8 z, u8 w) { return {x, y, z, w}; }
inline ushort2 make_ushort2(u16 x, u16 y) { return {x, y}; }
inline ushort4 make_ushort4(u16 x, u16 y, u16 z, u16 w) { return {x, y, z, w}; }

/// 16 bytes that nobody reads again soon.
inline uint4 load_once(const void* global) { return *(const uint4*)global; }

namespace emulate {

template <class To, class From>
inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

/// Replaces a number by a function of itself, and returns what it was.
template <class T, class F>
inline T replace(T* address, F f) {
    if ((uintptr_t)address % sizeof(T) != 0) fail(current, "an atomic at an address that is not aligned");
    T old, next;
    __atomic_load(address, &old, __ATOMIC_SEQ_CST);
    do {
        next = f(old);
    } while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}

}  // namespace emulate

template <class T>
inline T atomicAdd(T* p, decltype(T()) x) {
    return emulate::replace(p, [x](T old) { return (T)(old + x); });
}
template <class T>
inline T atomicSub(T* p, decltype(T()) x) {
    return emulate::replace(p, [x](T old) { return (T)(old - x); });
}
template <class T>
inline T atomicMax(T* p, decltype(T()) x) {
    static_assert(T(0.5) == T(0), "atomicMax is for integers");
    return emulate::replace(p, [x](T old) { return old > x ? old : x; });
}
template <class T>
inline T atomicMin(T* p, decltype(T()) x) {
    static_assert(T(0.5) == T(0), "atomicMin is for integers");
    return emulate::replace(p, [x](T old) { return old < x ? old : x; });
}
template <class T>
inline T atomicAnd(T* p, decltype(T()) x) {
    return emulate::replace(p, [x](T old) { return old & x; });
}
template <class T>
inline T atomicOr(T* p, decltype(T()) x) {
    return emulate::replace(p, [x](T old) { return old | x; });
}
template <class T>
inline T atomicXor(T* p, decltype(T()) x) {
    return emulate::replace(p, [x](T old) { return old ^ x; });
}
template <class T>
inline T atomicExch(T* p, decltype(T()) x) {
    return emulate::replace(p, [x](T) { return x; });
}
template <class T>
inline T atomicCAS(T* p, decltype(T()) expected, decltype(T()) x) {
    return emulate::replace(p, [expected, x](T old) { return old == expected ? x : old; });
}
inline u32 atomicInc(u32* p, u32 limit) {
    return emulate::replace(p, [limit](u32 old) { return old >= limit ? 0 : old + 1; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T __ldcg(const T* p) {
    return *p;
}
template <class T>
inline T __ldcs(const T* p) {
    return *p;
}
template <class T>
inline void __stcs(T* p, T x) {
    *p = x;
}

inline u32 __float_as_uint(float x) { return emulate::bits_as<u32>(x); }
inline int __float_as_int(float x) { return emulate::bits_as<int>(x); }
inline float __uint_as_float(u32 x) { return emulate::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulate::bits_as<float>(x); }
inline i64 __double_as_longlong(double x) { return emulate::bits_as<i64>(x); }
inline double __longlong_as_double(i64 x) { return emulate::bits_as<double>(x); }

inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __popcll(u64 x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((u32)x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((u64)x); }
inline u32 __brev(u32 x) {
    u32 y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
inline u32 __funnelshift_l(u32 low, u32 high, u32 shift) {
    return (u32)(((u64)high << 32 | low) << (shift & 31) >> 32);
}
inline u32 __funnelshift_r(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) >> (shift & 31)); }

inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 bytes = (u64)b << 32 | a;
    u32 y = 0;
    for (int i = 0; i < 4; i++) {
        u32 s = selector >> 4 * i & 15;
        u32 byte = (u32)(bytes >> 8 * (s & 7)) & 0xff;
        if (s & 8) byte = byte & 0x80 ? 0xff : 0;
        y |= byte << 8 * i;
    }
    return y;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return c;
}
inline u32 __dp4a(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 0xff) * (b >> 8 * i & 0xff);
    return c;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float __fdividef(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __saturatef(float x) { return x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f; }

/// 2^x; subnormal numbers are zero.
inline float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

// glibc declares functions of these names.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)

namespace emulate {

/// A float as an integer as CUDA rounds it: clamped, NaN becomes 0.
template <class T>
inline T to_integer(double x) {
    constexpr double low = T(-1) < T(0) ? -2147483648.0 : 0.0, high = T(-1) < T(0) ? 2147483647.0 : 4294967295.0;
    return x != x ? T(0) : x <= low ? (T)low : x >= high ? (T)high : (T)x;
}

}  // namespace emulate

inline int __float2int_rn(float x) { return emulate::to_integer<int>(rintf(x)); }
inline int __float2int_rd(float x) { return emulate::to_integer<int>(floorf(x)); }
inline int __float2int_ru(float x) { return emulate::to_integer<int>(ceilf(x)); }
inline int __float2int_rz(float x) { return emulate::to_integer<int>(truncf(x)); }
inline u32 __float2uint_rn(float x) { return emulate::to_integer<u32>(rintf(x)); }
inline u32 __float2uint_rd(float x) { return emulate::to_integer<u32>(floorf(x)); }
inline u32 __float2uint_rz(float x) { return emulate::to_integer<u32>(truncf(x)); }
inline int __double2int_rn(double x) { return emulate::to_integer<int>(rint(x)); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(u32 x) { return (float)x; }
inline float __double2float_rn(double x) { return (float)x; }

#define EMULATE_MINIMUM(A, B, C)                              \
    inline C min(A a, B b) { return (C)a < (C)b ? (C)a : (C)b; } \
    inline C max(A a, B b) { return (C)a > (C)b ? (C)a : (C)b; }
EMULATE_MINIMUM(int, int, int)
EMULATE_MINIMUM(u32, u32, u32)
EMULATE_MINIMUM(int, u32, u32)
EMULATE_MINIMUM(u32, int, u32)
EMULATE_MINIMUM(long, long, long)
EMULATE_MINIMUM(unsigned long, unsigned long, unsigned long)
EMULATE_MINIMUM(long long, long long, long long)
EMULATE_MINIMUM(u64, u64, u64)
EMULATE_MINIMUM(long long, u64, u64)
EMULATE_MINIMUM(u64, long long, u64)
#undef EMULATE_MINIMUM
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

[[noreturn]] inline void __trap() { emulate::fail(emulate::current, "__trap"); }
inline void __nanosleep(u32) {}
inline long long clock64() { return (long long)__builtin_ia32_rdtsc(); }
#undef __builtin_assume
#define __builtin_assume(x) ((void)0)
