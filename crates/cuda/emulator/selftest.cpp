// Compares the emulator's instructions with plain loops. Run by selftest.sh.

#define DIBIT_EMULATE
#include "../kernels/prelude.cuh"
#include "../kernels/layout.cuh"

#include <math.h>
#include <stdio.h>

static int failures = 0;

static void check(bool good, const char* what) {
    printf("%s %s\n", good ? "ok  " : "FAIL", what);
    failures += !good;
}

static u32 noise_state = 1;
static u32 noise() { return noise_state = noise_state * 1664525u + 1013904223u; }
static float noise_float() { return (float)(int)(noise() >> 8 & 0xffff) / 8192.0f - 4.0f; }

__constant__ int offsets[2] = {0, 16};

/// C += A B for one 16 x 8 tile, A [16][32] and B [32][8] (BF16 chooses the format of both), by ldmatrix and mma.
template <bool BF16>
__device__ __forceinline__ void multiply_tile(const u16* a, const u16* b, float* c) {
    __shared__ __align__(16) u16 tile_a[16][40];
    __shared__ __align__(16) u16 tile_b[32][24];
    int lane = threadIdx.x;
    for (int i = lane; i < 16 * 4; i += 32) copy_16(&tile_a[i / 4][i % 4 * 8], a + i * 8);
    copy_commit();
    copy_16(&tile_b[lane][0], b + lane * 8);
    copy_16(&tile_b[lane][8], b + lane * 8);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float d[4] = {};
    for (int step = 0; step < 2; step++) {
        u32 fragment[4], other[4];
        load_matrices(fragment, &tile_a[lane % 16][offsets[step] + lane / 16 * 8]);
        load_matrices_transposed(other, &tile_b[16 * step + lane % 16][lane / 16 * 8]);
        u32 column[2] = {other[0], other[1]};
        if (BF16)
            mma_bf16(d, fragment, column);
        else
            mma_half(d, fragment, column);
    }
    for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] += d[i];
}

extern "C" __global__ void tile_half(const u16* a, const u16* b, float* c) { multiply_tile<false>(a, b, c); }
EXPORT(tile_half)
extern "C" __global__ void tile_bf16(const u16* a, const u16* b, float* c) { multiply_tile<true>(a, b, c); }
EXPORT(tile_bf16)

static void test_tiles() {
    alignas(16) static u16 a[16 * 32], b[32 * 8];
    for (int bf16 = 0; bf16 < 2; bf16++) {
        float c[16 * 8], want[16 * 8];
        for (int i = 0; i < 16 * 32; i++) a[i] = bf16 ? float_to_bf16(noise_float()) : float_to_half(noise_float());
        for (int i = 0; i < 32 * 8; i++) b[i] = bf16 ? float_to_bf16(noise_float()) : float_to_half(noise_float());
        // A subnormal number of fp16, times one in the middle of the range.
        if (!bf16) a[0] = 3;
        double worst = 0;
        for (int i = 0; i < 16 * 8; i++) c[i] = want[i] = noise_float();
        if (bf16)
            emulate::launch(tile_bf16, 1, 32, 0, a, b, c);
        else
            emulate::launch(tile_half, 1, 32, 0, a, b, c);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                double sum = want[i * 8 + j];
                for (int k = 0; k < 32; k++)
                    sum += bf16 ? (double)bf16_to_float(a[i * 32 + k]) * bf16_to_float(b[k * 8 + j])
                                : (double)half_to_float(a[i * 32 + k]) * half_to_float(b[k * 8 + j]);
                worst = fmax(worst, fabs(sum - c[i * 8 + j]));
            }
        check(worst < 1e-4, bf16 ? "cp.async, ldmatrix, mma bf16" : "cp.async, ldmatrix, mma half");
    }
}

extern "C" __global__ void transpose(const u32* from, u32* to) { to[threadIdx.x] = transpose_matrix(from[threadIdx.x]); }
EXPORT(transpose)

static void test_transpose() {
    u32 from[32], to[32];
    for (u32& x : from) x = noise();
    emulate::launch(transpose, 1, 32, 0, from, to);
    bool good = true;
    const u16 *m = (const u16*)from, *t = (const u16*)to;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) good &= m[i * 8 + j] == t[j * 8 + i];
    check(good, "movmatrix");
}

struct Range {
    int first, count;
    i64 stride;
};

/// The sum of each block's part, and of all parts by atomics.
extern "C" __global__ void __launch_bounds__(256) sum_blocks(const float* x, Range range, float* sums, u64* total) {
    DYNAMIC_SHARED(memory);
    float* parts = (float*)memory;
    float sum = 0;
    for (int i = threadIdx.x; i < range.count; i += blockDim.x) sum += x[range.first + blockIdx.x * range.stride + i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int n = blockDim.x / 64; n > 0; n /= 2) {
        if ((int)threadIdx.x < n) parts[threadIdx.x] += parts[threadIdx.x + n];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = parts[0];
    if (threadIdx.x == 0) atomicAdd(total, (u64)parts[0]);
}
EXPORT(sum_blocks)

static void test_sum() {
    static float x[37 * 1000], sums[37];
    for (float& v : x) v = (float)(noise() >> 28);
    u64 total = 0, want_total = 0;
    emulate::launch(sum_blocks, 37, 256, 8 * 4, x, Range{0, 1000, 1000}, sums, &total);
    bool good = true;
    for (int b = 0; b < 37; b++) {
        float want = 0;
        for (int i = 0; i < 1000; i++) want += x[b * 1000 + i];
        good &= want == sums[b];
        want_total += (u64)want;
    }
    check(good && total == want_total, "__syncthreads, warp_sum, atomicAdd, shared memory");
}

extern "C" __global__ void shuffles(int* out) {
    int lane = threadIdx.x, *o = out + 8 * lane;
    o[0] = __shfl_sync(ALL_LANES, lane * 3, 5);
    o[1] = __shfl_xor_sync(ALL_LANES, lane, 9);
    o[2] = __shfl_up_sync(ALL_LANES, lane, 3);
    o[3] = __shfl_down_sync(ALL_LANES, lane, 3, 8);
    o[4] = (int)__ballot_sync(ALL_LANES, lane % 3 == 0);
    if (lane < 16)
        o[5] = __any_sync(0xffffu, lane == 7) + 2 * __all_sync(0xffffu, lane < 9);
    else
        o[5] = __shfl_sync(0xffff0000u, lane, lane - 16, 16);
    i64 wide = __shfl_sync(ALL_LANES, (i64)lane << 33, 31 - lane);
    o[6] = (int)(wide >> 33);
    o[7] = __reduce_max_sync(ALL_LANES, lane ^ 21) + __syncthreads_count(lane & 1);
}
EXPORT(shuffles)

static void test_shuffles() {
    int out[32 * 8];
    emulate::launch(shuffles, 1, 32, 0, out);
    bool good = true;
    for (int l = 0; l < 32; l++) {
        const int* o = out + 8 * l;
        good &= o[0] == 15 && o[1] == (l ^ 9) && o[2] == (l < 3 ? l : l - 3) && o[3] == (l % 8 > 4 ? l : l + 3);
        good &= (u32)o[4] == 0x49249249u && o[5] == (l < 16 ? 1 : l) && o[6] == 31 - l && o[7] == 31 + 16;
    }
    check(good, "shuffles and votes");
}

/// A copy that is not waited for is not there, and shared memory begins as NaN.
extern "C" __global__ void late(const float* from, float* out) {
    __shared__ __align__(16) float buffer[8];
    copy_16(buffer, from);
    copy_commit();
    copy_16(buffer + 4, from + 4);
    copy_commit();
    out[0] = buffer[0];
    copy_wait<1>();
    out[1] = buffer[0];
    out[2] = buffer[4];
    copy_wait<0>();
    out[3] = buffer[7];
}
EXPORT(late)

static void test_late() {
    alignas(16) float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    float out[4];
    emulate::launch(late, 3, 1, 0, from, out);
    check(isnan(out[0]) && out[1] == 1 && isnan(out[2]) && out[3] == 8, "copies come when they are waited for");
}

static void test_conversions() {
    bool good = true;
    for (u32 h = 0; h < 65536; h++) {
        float x = half_to_float((u16)h);
        int exponent = h >> 10 & 31, fraction = h & 1023;
        double want = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
        if (h & 0x8000) want = -want;
        if (exponent < 31) good &= x == (float)want && float_to_half(x) == h;
        if (exponent == 31 && fraction == 0) good &= isinf(x) && float_to_half(x) == h;
        if (exponent == 31 && fraction != 0) good &= isnan(x) && float_to_half(x) == 0x7fff;
        // Halfway to the next number is rounded to the even one.
        if (exponent < 31 && !(h & 0x8000)) {
            float next = h == 0x7bff ? 65536.0f : half_to_float((u16)(h + 1));
            good &= float_to_half((x + next) / 2) == h + (h & 1);
        }
    }
    good &= float_to_bf16(1.00390625f) == 0x3f80 && float_to_bf16(1.01171875f) == 0x3f82 && float_to_bf16(3.4e38f) == 0x7f80;
    good &= float_to_bf16(NAN) == 0x7fff && pack_half(1, 2) == 0x40003c00u && pack_bf16(1, 2) == 0x40003f80u;
    good &= exp2_fast(-1e9f) == 0 && exp2_fast(3) == 8;
    check(good, "fp16 and bf16");
}

extern "C" __global__ void odd_block(int* out) {
    atomicAdd(&out[blockIdx.x + gridDim.x * blockIdx.y], (int)(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z));
    atomicMax(&out[6], (int)blockIdx.y - 1);
    __syncwarp();
    __syncthreads();
    if (atomicCAS(&out[7], 0, 5) == 0) atomicExch(&out[8], 9);
}
EXPORT(odd_block)

static void test_odd_block() {
    int out[9] = {0, 0, 0, 0, 0, 0, -5, 0, 0};
    emulate::launch(odd_block, dim3(2, 3), dim3(3, 5, 7), 0, out);
    int want = 0;
    for (int i = 0; i < 3 * 5 * 7; i++) want += i % 3 + 10 * (i / 3 % 5) + 100 * (i / 15);
    bool good = out[6] == 1 && out[7] == 5 && out[8] == 9;
    for (int i = 0; i < 6; i++) good &= out[i] == want;
    check(good, "blocks and grids of three dimensions, atomics");
}

extern "C" __global__ void stuck() {
    if (threadIdx.x == 7) return;
    __syncthreads();
}
EXPORT(stuck)
extern "C" __global__ void divergent(float* out) {
    if (threadIdx.x < 16) out[0] = warp_sum(1.0f);
}
EXPORT(divergent)
extern "C" __global__ void beyond() {
    DYNAMIC_SHARED(memory);
    memory[64 + threadIdx.x] = 1;
}
EXPORT(beyond)
extern "C" __global__ void deep(int* out) {
    volatile int large[16290];
    for (int i = 0; i < 16290; i++) large[i] = i;
    out[0] = large[threadIdx.x];
}
EXPORT(deep)

extern "C" __global__ void nowhere(int* out) { out[1 << 20] = *out; }
EXPORT(nowhere)

int main(int count, char** arguments) {
    int out[4];
    if (count > 1) {
        // Each of these ends the process with a message.
        if (!strcmp(arguments[1], "stuck")) emulate::launch(stuck, 2, 64, 0);
        if (!strcmp(arguments[1], "divergent")) emulate::launch(divergent, 1, 32, 0, (float*)out);
        if (!strcmp(arguments[1], "beyond")) emulate::launch(beyond, 1, 32, 64);
        if (!strcmp(arguments[1], "deep")) emulate::launch(deep, 1, 1, 0, out);
        if (!strcmp(arguments[1], "nowhere")) emulate::launch(nowhere, 1, 1, 0, (int*)nullptr);
        return 0;
    }
    test_conversions();
    test_tiles();
    test_transpose();
    test_sum();
    test_shuffles();
    test_late();
    test_odd_block();
    return failures != 0;
}
