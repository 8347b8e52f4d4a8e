#pragma once
// Instructions of a warp and of a block.

#include <immintrin.h>

#include "fiber.h"

/// fp16, by its bits, to float and back (round to nearest, ties to even).
inline float half_to_float(u16 x) { return _cvtsh_ss(x); }
inline u16 float_to_half(float x) { return x != x ? 0x7fff : _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline u32 pack_half(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
inline u32 multiply_halves(u32 a, u32 b) {
    return pack_half(half_to_float((u16)a) * half_to_float((u16)b),
                     half_to_float((u16)(a >> 16)) * half_to_float((u16)(b >> 16)));
}

template <int HIGH>
inline u32 multiply_by_half(u32 a, u32 b) {
    u32 half = HIGH ? b >> 16 : b & 0xffff;
    return multiply_halves(a, half | half << 16);
}

inline u32 max_halves(u32 a, u32 b) {
    float low[2] = {half_to_float((u16)a), half_to_float((u16)b)};
    float high[2] = {half_to_float((u16)(a >> 16)), half_to_float((u16)(b >> 16))};
    return pack_half(low[0] < low[1] ? low[1] : low[0], high[0] < high[1] ? high[1] : high[0]);
}

/// a b + c of two fp16 numbers each. It is rounded to float first, which makes a difference only next to ties.
inline u32 fma_halves(u32 a, u32 b, u32 c) {
    float low = __builtin_fmaf(half_to_float((u16)a), half_to_float((u16)b), half_to_float((u16)c));
    return pack_half(low, __builtin_fmaf(half_to_float(a >> 16), half_to_float(b >> 16), half_to_float(c >> 16)));
}
inline u32 add_halves(u32 a, u32 b) { return fma_halves(a, 0x3c003c00u, b); }

inline float bf16_to_float(u16 x) {
    u32 bits = (u32)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline u16 float_to_bf16(float x) {
    if (x != x) return 0x7fff;
    u32 bits;
    memcpy(&bits, &x, 4);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 pack_bf16(float low, float high) { return float_to_bf16(low) | (u32)float_to_bf16(high) << 16; }

inline void __syncthreads() {
    emulate::block_barrier("__syncthreads", nullptr, [](emulate::Block*) {});
}

inline void __syncwarp(u32 mask = 0xffffffffu) {
    u32 none;
    emulate::warp_barrier(mask, "__syncwarp", none, [](emulate::Lanes) {});
}

namespace emulate {

struct Predicate {
    int value;
    int result;
};

template <class Join>
inline int join_block(const char* what, int first, int predicate, Join join) {
    Predicate p = {predicate, 0};
    block_barrier(what, &p, [first, join](Block* block) {
        int result = first;
        for (Fiber* f : block->fibers)
            if (f->number < block->count) result = join(result, ((Predicate*)f->operands)->value);
        for (Fiber* f : block->fibers)
            if (f->number < block->count) ((Predicate*)f->operands)->result = result;
    });
    return p.result;
}

template <class T>
struct Shuffle {
    T value;
    int source;
};

/// Gives each lane the value of its source; all ones where that takes no part.
template <class T>
inline T shuffle(u32 mask, const char* what, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    Shuffle<T> s = {value, source};
    warp_barrier(mask, what, s, [](Lanes lanes) {
        T values[32];
        memset(values, 0xff, sizeof values);
        for (u32 rest = lanes.mask; rest; rest &= rest - 1) {
            int lane = __builtin_ctz(rest);
            values[lane] = lanes.operands<Shuffle<T>>(lane).value;
        }
        for (u32 rest = lanes.mask; rest; rest &= rest - 1) {
            Shuffle<T>& s = lanes.operands<Shuffle<T>>(__builtin_ctz(rest));
            s.value = values[s.source];
        }
    });
    return s.value;
}

template <class T>
struct Vote {
    T value;
    u32 result;
};

/// One function of all lanes' values.
template <class T, class Join>
inline u32 vote(u32 mask, const char* what, T value, u32 first, Join join) {
    Vote<T> v = {value, 0};
    warp_barrier(mask, what, v, [first, join](Lanes lanes) {
        u32 result = first;
        for (u32 rest = lanes.mask; rest; rest &= rest - 1) {
            int lane = __builtin_ctz(rest);
            result = join(result, lanes.operands<Vote<T>>(lane).value, lane);
        }
        for (u32 rest = lanes.mask; rest; rest &= rest - 1)
            lanes.operands<Vote<T>>(__builtin_ctz(rest)).result = result;
    });
    return v.result;
}

inline void need_all(Lanes lanes, const char* message) {
    if (lanes.mask != 0xffffffffu) fail(current, message);
}

struct Product {
    float* d;
    const u32* a;
    const u32* b;
};

/// d += a b. Lane l holds rows l / 4 and l / 4 + 8 of a and d, and column l / 4 of b (PTX, mma.m16n8k16).
template <class ToFloat>
inline void multiply(Lanes lanes, ToFloat to_float) {
    need_all(lanes, "mma in a warp of fewer than 32 threads");
    float a[16][16];
    alignas(32) float b[16][8], d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Product& p = lanes.operands<Product>(lane);
        int row = lane / 4, pair = lane % 4 * 2;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 2; i++) {
                a[row][pair + 8 * i + half] = to_float((u16)(p.a[2 * i] >> 16 * half));
                a[row + 8][pair + 8 * i + half] = to_float((u16)(p.a[2 * i + 1] >> 16 * half));
                b[pair + 8 * i + half][row] = to_float((u16)(p.b[i] >> 16 * half));
            }
            d[row][pair + half] = p.d[half];
            d[row + 8][pair + half] = p.d[2 + half];
        }
    }
    for (int row = 0; row < 16; row++) {
        __m256 sum = _mm256_load_ps(d[row]);
        for (int k = 0; k < 16; k++)
            sum = _mm256_fmadd_ps(_mm256_set1_ps(a[row][k]), _mm256_load_ps(b[k]), sum);
        _mm256_store_ps(d[row], sum);
    }
    for (int lane = 0; lane < 32; lane++) {
        Product& p = lanes.operands<Product>(lane);
        int row = lane / 4, pair = lane % 4 * 2;
        for (int half = 0; half < 2; half++) {
            p.d[half] = d[row][pair + half];
            p.d[2 + half] = d[row + 8][pair + half];
        }
    }
}

struct Rows {
    const void* row;
    u32* r;
};

template <bool transposed>
inline void load(Lanes lanes) {
    need_all(lanes, "ldmatrix in a warp of fewer than 32 threads");
    for (int matrix = 0; matrix < 4; matrix++) {
        u16 m[8][8];
        for (int row = 0; row < 8; row++) memcpy(m[row], lanes.operands<Rows>(8 * matrix + row).row, 16);
        for (int lane = 0; lane < 32; lane++) {
            int row = lane / 4, pair = lane % 4 * 2;
            lanes.operands<Rows>(lane).r[matrix] = transposed ? m[pair][row] | (u32)m[pair + 1][row] << 16
                                                              : m[row][pair] | (u32)m[row][pair + 1] << 16;
        }
    }
}

inline void copy_until(Fiber* fiber, int group) {
    size_t done = 0;
    for (; done < fiber->copies.size() && fiber->copies[done].group < group; done++)
        memcpy(fiber->copies[done].to, fiber->copies[done].from, 16);
    fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + done);
}

}  // namespace emulate

inline int __syncthreads_or(int predicate) {
    return emulate::join_block("__syncthreads_or", 0, predicate, [](int a, int b) { return (int)(a || b); });
}
inline int __syncthreads_and(int predicate) {
    return emulate::join_block("__syncthreads_and", 1, predicate, [](int a, int b) { return (int)(a && b); });
}
inline int __syncthreads_count(int predicate) {
    return emulate::join_block("__syncthreads_count", 0, predicate, [](int a, int b) { return a + (b != 0); });
}

template <class T>
inline T __shfl_sync(u32 mask, T value, int source, int width = 32) {
    int lane = emulate::current->lane();
    return emulate::shuffle(mask, "__shfl_sync", value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(u32 mask, T value, int bits, int width = 32) {
    int lane = emulate::current->lane(), source = lane ^ bits;
    // Lower segments of a warp can be read, higher ones cannot.
    return emulate::shuffle(mask, "__shfl_xor_sync", value, source > (lane | (width - 1)) ? lane : source & 31);
}
template <class T>
inline T __shfl_up_sync(u32 mask, T value, u32 delta, int width = 32) {
    int lane = emulate::current->lane(), source = lane - (int)delta;
    return emulate::shuffle(mask, "__shfl_up_sync", value, source < (lane & ~(width - 1)) ? lane : source);
}
template <class T>
inline T __shfl_down_sync(u32 mask, T value, u32 delta, int width = 32) {
    int lane = emulate::current->lane(), source = lane + (int)delta;
    return emulate::shuffle(mask, "__shfl_down_sync", value, source > (lane | (width - 1)) ? lane : source);
}

inline u32 __ballot_sync(u32 mask, int predicate) {
    return emulate::vote(mask, "__ballot_sync", predicate, 0,
                         [](u32 all, int p, int lane) { return all | (u32)(p != 0) << lane; });
}
inline int __any_sync(u32 mask, int predicate) {
    return (int)emulate::vote(mask, "__any_sync", predicate, 0, [](u32 all, int p, int) { return all | (p != 0); });
}
inline int __all_sync(u32 mask, int predicate) {
    return (int)emulate::vote(mask, "__all_sync", predicate, 1, [](u32 all, int p, int) { return all & (p != 0); });
}
inline u32 __reduce_add_sync(u32 mask, u32 x) {
    return emulate::vote(mask, "__reduce_add_sync", x, 0, [](u32 all, u32 y, int) { return all + y; });
}
inline int __reduce_add_sync(u32 mask, int x) { return (int)__reduce_add_sync(mask, (u32)x); }
inline u32 __reduce_max_sync(u32 mask, u32 x) {
    return emulate::vote(mask, "__reduce_max_sync", x, 0, [](u32 all, u32 y, int) { return all > y ? all : y; });
}
inline int __reduce_max_sync(u32 mask, int x) {
    return (int)(__reduce_max_sync(mask, (u32)x ^ 0x80000000u) ^ 0x80000000u);
}
inline u32 __reduce_min_sync(u32 mask, u32 x) { return ~__reduce_max_sync(mask, ~x); }
inline int __reduce_min_sync(u32 mask, int x) { return ~__reduce_max_sync(mask, ~x); }
inline u32 __reduce_or_sync(u32 mask, u32 x) {
    return emulate::vote(mask, "__reduce_or_sync", x, 0, [](u32 all, u32 y, int) { return all | y; });
}

/// d += a b for a of 16 x 16, b of 16 x 8.
inline void mma_half(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulate::Product p = {d, a, b};
    emulate::warp_barrier(0xffffffffu, "mma_half", p,
                          [](emulate::Lanes lanes) { emulate::multiply(lanes, half_to_float); });
}
inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulate::Product p = {d, a, b};
    emulate::warp_barrier(0xffffffffu, "mma_bf16", p,
                          [](emulate::Lanes lanes) { emulate::multiply(lanes, bf16_to_float); });
}

/// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8, 16 bytes aligned.
inline void load_matrices(u32 (&r)[4], const void* row) {
    emulate::check_shared(row, 16);
    emulate::Rows rows = {row, r};
    emulate::warp_barrier(0xffffffffu, "load_matrices", rows, emulate::load<false>);
}
inline void load_matrices_transposed(u32 (&r)[4], const void* row) {
    emulate::check_shared(row, 16);
    emulate::Rows rows = {row, r};
    emulate::warp_barrier(0xffffffffu, "load_matrices_transposed", rows, emulate::load<true>);
}

/// Transposes an 8 x 8 matrix of 16-bit numbers that lies across a warp.
inline u32 transpose_matrix(u32 x) {
    emulate::warp_barrier(0xffffffffu, "transpose_matrix", x, [](emulate::Lanes lanes) {
        emulate::need_all(lanes, "movmatrix in a warp of fewer than 32 threads");
        u16 m[8][8];
        for (int lane = 0; lane < 32; lane++)
            for (int half = 0; half < 2; half++)
                m[lane / 4][lane % 4 * 2 + half] = (u16)(lanes.operands<u32>(lane) >> 16 * half);
        for (int lane = 0; lane < 32; lane++) {
            int row = lane / 4, pair = lane % 4 * 2;
            lanes.operands<u32>(lane) = m[pair][row] | (u32)m[pair + 1][row] << 16;
        }
    });
    return x;
}

/// Copies 16 bytes to shared memory, no earlier than copy_wait says.
inline void copy_16(void* shared, const void* global) {
    emulate::Fiber* fiber = emulate::current;
    emulate::check_shared(shared, 16);
    if ((uintptr_t)global % 16 != 0) emulate::fail(fiber, "copy_16 from an address that is not aligned to 16 bytes");
    fiber->copies.push_back({shared, global, fiber->groups});
}
inline void copy_commit() { emulate::current->groups++; }
/// Waits until no more than N committed groups of this thread's copies are under way.
template <int N>
inline void copy_wait() {
    emulate::copy_until(emulate::current, emulate::current->groups - N);
}
