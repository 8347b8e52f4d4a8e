// Linear layers of few rows: weights are read once, at the speed of memory. WEIGHT says how they are stored: 0 is f32, 1
// fp16, 2 bf16. A row's result is the same bits whatever other rows there are.

#define WEIGHT_F32 0
#define WEIGHT_HALF 1
#define TILE 16
#define STEP 64

/// One of the matrices of a launch, [outputs][inputs], and what it is for.
struct Projection {
    const u8* weight;
    /// Null where there is none.
    const float* bias;
    float* out;
    int outputs;
    /// The first block of its own.
    int first_block;
};

/// out = x w^T + bias for each projection, where x is normalised first if there is a norm.
struct Linear {
    Projection projections[3];
    const float* x;
    /// Null where there is none.
    const float* norm;
    float eps;
    int rows, inputs;
    /// Whether results are added to what is there.
    int add;
};

__device__ __forceinline__ Projection projection_of_block(const Linear& own) {
    Projection to = own.projections[0];
#pragma unroll
    for (int i = 1; i < 3; i++)
        if ((int)blockIdx.x >= own.projections[i].first_block) to = own.projections[i];
    return to;
}

__device__ __forceinline__ void put(const Linear& own, const Projection& to, int row, int output, float sum) {
    if (to.bias != nullptr) sum += to.bias[output];
    float* out = to.out + (i64)row * to.outputs + output;
    *out = own.add ? *out + sum : sum;
}

__device__ __forceinline__ float widen(const u8* x, i64 i) {
    if (WEIGHT == WEIGHT_F32) return *(const float*)(x + 4 * i);
    u16 bits = *(const u16*)(x + 2 * i);
    return WEIGHT == WEIGHT_HALF ? half_to_float(bits) : bf16_to_float(bits);
}

/// Any type and any number of inputs: a warp for each output, four rows at a time.
template <bool FOUR>
__device__ __forceinline__ void multiply_plain(const Linear& own) {
    const Projection to = projection_of_block(own);
    int lane = threadIdx.x % 32;
    int output = (blockIdx.x - to.first_block) * (blockDim.x / 32) + threadIdx.x / 32;
    if (output >= to.outputs) return;
    const int inputs = own.inputs;
    const u8* weight = to.weight + (i64)output * inputs * (WEIGHT == WEIGHT_F32 ? 4 : 2);
    for (int first = 0; first < own.rows; first += 4) {
        float sums[4] = {}, squares[4] = {};
        auto take = [&](int row, float x, float norm, float w) {
            squares[row] = fmaf(x, x, squares[row]);
            sums[row] = fmaf(x * norm, w, sums[row]);
        };
        const float* x[4];
        for (int i = 0; i < 4; i++) x[i] = own.x + (i64)min(first + i, own.rows - 1) * inputs;
        if (FOUR) {
#pragma unroll 4
            for (int k = 4 * lane; k < inputs; k += 128) {
                float4 w = *(const float4*)(weight + 4 * k), norm = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
                if (own.norm != nullptr) norm = *(const float4*)(own.norm + k);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float4 part = *(const float4*)(x[i] + k);
                    take(i, part.x, norm.x, w.x);
                    take(i, part.y, norm.y, w.y);
                    take(i, part.z, norm.z, w.z);
                    take(i, part.w, norm.w, w.w);
                }
            }
        } else {
            for (int k = lane; k < inputs; k += 32) {
                float w = widen(weight, k), norm = own.norm != nullptr ? own.norm[k] : 1.0f;
#pragma unroll
                for (int i = 0; i < 4; i++) take(i, x[i][k], norm, w);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float sum = warp_sum(sums[i]), square = warp_sum(squares[i]);
            if (own.norm != nullptr) sum *= 1.0f / sqrtf(square / (float)inputs + own.eps);
            if (lane == i && first + i < own.rows) put(own, to, first + i, output, sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) plain(Linear own) { multiply_plain<false>(own); }
EXPORT(plain)

#if WEIGHT == WEIGHT_F32

extern "C" __global__ void __launch_bounds__(256) plain_four(Linear own) { multiply_plain<true>(own); }
EXPORT(plain_four)

#else

// Activations of f32 are split in two parts of 16 bit, which together hold 16 bits of their mantissa in bf16 and 22 in
// fp16. fp16 has a small range: the first part is taken of a number 2^10 times smaller, and the second part is stored 2^11
// times larger.
#define FIRST_SCALE (WEIGHT == WEIGHT_HALF ? 0x1p-10f : 1.0f)
#define SECOND_SCALE (WEIGHT == WEIGHT_HALF ? 0x1p11f : 1.0f)

__device__ __forceinline__ void split(float a, float b, u32& first, u32& second) {
    a *= FIRST_SCALE;
    b *= FIRST_SCALE;
    if (WEIGHT == WEIGHT_HALF) {
        first = pack_half(a, b);
        float rest_a = a - half_to_float((u16)first), rest_b = b - half_to_float((u16)(first >> 16));
        second = pack_half(rest_a * SECOND_SCALE, rest_b * SECOND_SCALE);
    } else {
        first = pack_bf16(a, b);
        second = pack_bf16(a - __uint_as_float(first << 16), b - __uint_as_float(first & 0xffff0000u));
    }
}

__device__ __forceinline__ float join(float first, float second) {
    return (first + second * (1.0f / SECOND_SCALE)) * (1.0f / FIRST_SCALE);
}

__device__ __forceinline__ void multiply_tile(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if (WEIGHT == WEIGHT_HALF)
        mma_half(sums, a, b);
    else
        mma_bf16(sums, a, b);
}

/// 16-bit weights and a multiple of 8 inputs: up to ROWS rows times 16 TILES outputs for each block. Its WARPS warps
/// share the inputs, 64 at a time, whose products tensor cores sum; weights are loaded DEPTH times ahead. A thread loads
/// 8 inputs that lie together where a tile has them apart: so it does for weights and activations alike, and the order of
/// inputs in a sum is free. That order does not depend on ROWS, TILES or DEPTH, but on WARPS.
template <int ROWS, bool NORM, int TILES, int DEPTH, int WARPS>
__device__ __forceinline__ void multiply_few(const Linear& own) {
    // Up to 4 rows, both parts of a row are columns of one tile.
    constexpr bool FOLDED = ROWS <= 4;
    constexpr int GROUPS = ROWS > 8 ? 2 : 1, PARTS = FOLDED ? 1 : 2;
    constexpr int OUTPUTS = TILE * TILES;
    __shared__ float all_sums[WARPS][ROWS][OUTPUTS];
    __shared__ float all_squares[WARPS][ROWS];

    const Projection to = projection_of_block(own);
    const int first_output = (blockIdx.x - to.first_block) * OUTPUTS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int group = lane / 4, inputs = own.inputs;
    const int place = 8 * (lane % 4);

    const u8* weights[2 * TILES];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++)
        weights[i] = to.weight + (i64)min(first_output + group + 8 * i, to.outputs - 1) * inputs * 2;
    const float* x[GROUPS];
    bool there[GROUPS];
    for (int i = 0; i < GROUPS; i++) {
        int row = FOLDED ? group % 4 : 8 * i + group;
        there[i] = row < own.rows;
        x[i] = own.x + (i64)(there[i] ? row : 0) * inputs;
    }

    uint4 ring[DEPTH][2][2 * TILES];
    auto load = [&](uint4 (&own_weights)[2][2 * TILES], int first) {
#pragma unroll
        for (int part = 0; part < 2; part++) {
            int k = first + 32 * part + place;
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++)
                own_weights[part][i] = k < inputs ? load_once(weights[i] + 2 * k) : make_uint4(0, 0, 0, 0);
        }
    };

    float sums[TILES][GROUPS][PARTS][4] = {};
    float squares[GROUPS] = {};
    auto multiply = [&](const uint4 (&own_weights)[2][2 * TILES], int first) {
#pragma unroll
        for (int part = 0; part < 2; part++) {
            int k = first + 32 * part + place;
            float4 norm[2];
            if (NORM && k < inputs) {
                norm[0] = *(const float4*)(own.norm + k);
                norm[1] = *(const float4*)(own.norm + k + 4);
            }
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float4 own_x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (there[i] && k < inputs) {
                        own_x = *(const float4*)(x[i] + k + 4 * half);
                        if (NORM) {
                            squares[i] = fmaf(own_x.x, own_x.x, squares[i]);
                            squares[i] = fmaf(own_x.y, own_x.y, squares[i]);
                            squares[i] = fmaf(own_x.z, own_x.z, squares[i]);
                            squares[i] = fmaf(own_x.w, own_x.w, squares[i]);
                            const float4& by = norm[half];
                            // Rounded, so that the compiler cannot make one sum of it and the split, here or there.
                            own_x = make_float4(__fmul_rn(own_x.x, by.x), __fmul_rn(own_x.y, by.y),
                                                __fmul_rn(own_x.z, by.z), __fmul_rn(own_x.w, by.w));
                        }
                    }
                    u32 b[2][2];
                    split(own_x.x, own_x.y, b[0][0], b[1][0]);
                    split(own_x.z, own_x.w, b[0][1], b[1][1]);
                    u32 both[2] = {group < 4 ? b[0][0] : b[1][0], group < 4 ? b[0][1] : b[1][1]};
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        const uint4 &low = own_weights[part][2 * tile], &high = own_weights[part][2 * tile + 1];
                        u32 a[4] = {low.x, high.x, low.y, high.y};
                        if (half == 1) a[0] = low.z, a[1] = high.z, a[2] = low.w, a[3] = high.w;
#pragma unroll
                        for (int j = 0; j < PARTS; j++) multiply_tile(sums[tile][i][j], a, FOLDED ? both : b[j]);
                    }
                }
            }
        }
    };

    const int stride = WARPS * STEP;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) load(ring[i], warp * STEP + i * stride);
    for (int first = warp * STEP; first < inputs; first += DEPTH * stride) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            multiply(ring[i], first + i * stride);
            load(ring[i], first + (i + DEPTH) * stride);
        }
    }

#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int column = 2 * (lane % 4) + j % 2, output = TILE * tile + group + j / 2 * 8;
                const float(&own_sums)[PARTS][4] = sums[tile][i];
                float second = FOLDED ? __shfl_xor_sync(ALL_LANES, own_sums[0][j], 2) : own_sums[PARTS - 1][j];
                if (!FOLDED || column < 4) all_sums[warp][8 * i + column][output] = join(own_sums[0][j], second);
            }
        }
        if (NORM) {
            squares[i] += __shfl_xor_sync(ALL_LANES, squares[i], 1);
            squares[i] += __shfl_xor_sync(ALL_LANES, squares[i], 2);
            if (lane % 4 == 0 && 8 * i + group < ROWS) all_squares[warp][8 * i + group] = squares[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < own.rows * OUTPUTS; i += 32 * WARPS) {
        int row = i / OUTPUTS, output = i % OUTPUTS;
        if (first_output + output >= to.outputs) continue;
        float sum = 0.0f, square = 0.0f;
        for (int other = 0; other < WARPS; other++) {
            sum += all_sums[other][row][output];
            if (NORM) square += all_squares[other][row];
        }
        if (NORM) sum = __fmul_rn(sum, 1.0f / sqrtf(square / (float)inputs + own.eps));
        put(own, to, row, first_output + output, sum);
    }
}

// For a block on each multiprocessor, for two of them, and for more. Tiles and depth are what was fastest on an H100.

extern "C" __global__ void __launch_bounds__(512) narrow_4(Linear own) { multiply_few<4, false, 1, 2, 16>(own); }
EXPORT(narrow_4)
extern "C" __global__ void __launch_bounds__(512) narrow_8(Linear own) { multiply_few<8, false, 1, 2, 16>(own); }
EXPORT(narrow_8)
extern "C" __global__ void __launch_bounds__(512) narrow_16(Linear own) { multiply_few<16, false, 1, 2, 16>(own); }
EXPORT(narrow_16)
extern "C" __global__ void __launch_bounds__(512) norm_narrow_4(Linear own) { multiply_few<4, true, 1, 2, 16>(own); }
EXPORT(norm_narrow_4)
extern "C" __global__ void __launch_bounds__(512) norm_narrow_8(Linear own) { multiply_few<8, true, 1, 2, 16>(own); }
EXPORT(norm_narrow_8)
extern "C" __global__ void __launch_bounds__(512) norm_narrow_16(Linear own) { multiply_few<16, true, 1, 2, 16>(own); }
EXPORT(norm_narrow_16)
extern "C" __global__ void __launch_bounds__(512) medium_4(Linear own) { multiply_few<4, false, 2, 1, 16>(own); }
EXPORT(medium_4)
extern "C" __global__ void __launch_bounds__(512) medium_8(Linear own) { multiply_few<8, false, 2, 1, 16>(own); }
EXPORT(medium_8)
extern "C" __global__ void __launch_bounds__(512) medium_16(Linear own) { multiply_few<16, false, 2, 1, 16>(own); }
EXPORT(medium_16)
extern "C" __global__ void __launch_bounds__(512) norm_medium_4(Linear own) { multiply_few<4, true, 2, 1, 16>(own); }
EXPORT(norm_medium_4)
extern "C" __global__ void __launch_bounds__(512) norm_medium_8(Linear own) { multiply_few<8, true, 2, 1, 16>(own); }
EXPORT(norm_medium_8)
extern "C" __global__ void __launch_bounds__(512) norm_medium_16(Linear own) { multiply_few<16, true, 2, 1, 16>(own); }
EXPORT(norm_medium_16)
extern "C" __global__ void __launch_bounds__(128) wide_4(Linear own) { multiply_few<4, false, 2, 2, 4>(own); }
EXPORT(wide_4)
extern "C" __global__ void __launch_bounds__(128) wide_8(Linear own) { multiply_few<8, false, 2, 2, 4>(own); }
EXPORT(wide_8)
extern "C" __global__ void __launch_bounds__(128) wide_16(Linear own) { multiply_few<16, false, 4, 1, 4>(own); }
EXPORT(wide_16)
extern "C" __global__ void __launch_bounds__(128) norm_wide_4(Linear own) { multiply_few<4, true, 2, 2, 4>(own); }
EXPORT(norm_wide_4)
extern "C" __global__ void __launch_bounds__(128) norm_wide_8(Linear own) { multiply_few<8, true, 2, 2, 4>(own); }
EXPORT(norm_wide_8)
extern "C" __global__ void __launch_bounds__(128) norm_wide_16(Linear own) { multiply_few<16, true, 4, 1, 4>(own); }
EXPORT(norm_wide_16)

#endif
