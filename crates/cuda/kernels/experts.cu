// Mixtures of experts. WEIGHT says how weights are stored, as in linear.cu. A pair is a row and one of its experts; a pair's
// results are the same bits whatever other rows have chosen.

#define WEIGHT_F32 0
#define WEIGHT_HALF 1

/// Pairs that share what is read of a matrix.
#define TILE 8
#define WARPS 8

/// Pairs of one expert: places in the order of pairs.
struct Tile {
    int expert, first, count;
};

/// Chooses the experts of rows: a warp for each row. Of equal logits the first is taken; those that are no numbers come last.
extern "C" __global__ void choose(const float* logits, int rows, int experts, int chosen, int normalised, int* pairs,
                                  float* weights) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const float* own = logits + (i64)row * experts;
    const float low = __uint_as_float(0xff800000u);
    float largest = low;
    for (int e = lane; e < experts; e += 32) largest = fmaxf(largest, own[e]);
    largest = warp_max(largest);
    float total = 0.0f, last_logit = __uint_as_float(0x7f800000u);
    int last = -1;
    for (int i = 0; i < chosen; i++) {
        // The best of those behind the last one.
        float best = low;
        int place = experts;
        for (int e = lane; e < experts; e += 32) {
            float x = own[e];
            if (!(x == x)) x = low;
            bool behind = x < last_logit || (x == last_logit && e > last);
            if (behind && (x > best || (x == best && e < place))) best = x, place = e;
        }
        for (int step = 16; step > 0; step /= 2) {
            float x = __shfl_xor_sync(ALL_LANES, best, step);
            int e = __shfl_xor_sync(ALL_LANES, place, step);
            if (x > best || (x == best && e < place)) best = x, place = e;
        }
        last_logit = best, last = place;
        float weight = expf(own[place] - largest);
        total += weight;
        if (lane == 0) {
            pairs[row * chosen + i] = place;
            weights[row * chosen + i] = weight;
        }
    }
    if (!normalised) {
        total = 0.0f;
        for (int e = lane; e < experts; e += 32) total += expf(own[e] - largest);
        total = warp_sum(total);
    }
    __syncwarp();
    for (int i = lane; i < chosen; i += 32) weights[row * chosen + i] /= total;
}
EXPORT(choose)

/// Orders pairs by experts, and cuts those of each into tiles: one block. Shared memory: two numbers for each expert.
extern "C" __global__ void __launch_bounds__(256)
group(const int* pairs, int count, int experts, int* order, Tile* tiles, int* tile_count) {
    DYNAMIC_SHARED(memory);
    int *next = (int*)memory, *counts = next + experts;
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) atomicAdd(&counts[pairs[i]], 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        int first = 0, tile = 0;
        for (int e = 0; e < experts; e++) {
            next[e] = first;
            for (int done = 0; done < counts[e]; done += TILE) tiles[tile++] = {e, first + done, min(TILE, counts[e] - done)};
            first += counts[e];
        }
        *tile_count = tile;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) order[atomicAdd(&next[pairs[i]], 1)] = i;
}
EXPORT(group)

/// Eight weights of a row, as f32.
__device__ __forceinline__ void load_eight(float (&w)[8], const u8* weights, i64 at) {
    if (WEIGHT == WEIGHT_F32) {
        float4 a = *(const float4*)(weights + 4 * at), b = *(const float4*)(weights + 4 * at + 16);
        w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
        return;
    }
    uint4 bits = *(const uint4*)(weights + 2 * at);
    u32 own[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u16 half = (u16)(own[i / 2] >> (i % 2 * 16));
        w[i] = WEIGHT == WEIGHT_HALF ? half_to_float(half) : bf16_to_float(half);
    }
}

__device__ __forceinline__ float load_weight(const u8* weights, i64 at) {
    if (WEIGHT == WEIGHT_F32) return *(const float*)(weights + 4 * at);
    u16 half = *(const u16*)(weights + 2 * at);
    return WEIGHT == WEIGHT_HALF ? half_to_float(half) : bf16_to_float(half);
}

/// out[pair] = x w^T + bias for each pair, where x has a row for `share` pairs: a warp for an output of a tile. Blocks: outputs
/// by WARPS, tiles at most.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
expert_linear(const u8* const* stack, const float* bias, const float* x, int share, int inputs, int outputs, const int* order,
              const Tile* tiles, const int* tile_count, float* out) {
    if ((int)blockIdx.y >= *tile_count) return;
    const Tile tile = tiles[blockIdx.y];
    int output = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (output >= outputs) return;
    const u8* weights = stack[tile.expert];
    i64 row = (i64)output * inputs;
    int pairs[TILE];
    const float* from[TILE];
    float sums[TILE];
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        pairs[i] = order[tile.first + min(i, tile.count - 1)];
        from[i] = x + (i64)(pairs[i] / share) * inputs;
        sums[i] = 0.0f;
    }
    int whole = inputs % 8 == 0 ? inputs : 0;
    for (int c = 8 * lane; c < whole; c += 256) {
        float w[8];
        load_eight(w, weights, row + c);
#pragma unroll
        for (int i = 0; i < TILE; i++) {
            if (i >= tile.count) break;
            float4 a = *(const float4*)(from[i] + c), b = *(const float4*)(from[i] + c + 4);
            sums[i] += w[0] * a.x + w[1] * a.y + w[2] * a.z + w[3] * a.w + w[4] * b.x + w[5] * b.y + w[6] * b.z + w[7] * b.w;
        }
    }
    for (int c = whole + lane; c < inputs; c += 32) {
        float w = load_weight(weights, row + c);
#pragma unroll
        for (int i = 0; i < TILE; i++) sums[i] += w * from[i][c];
    }
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        float sum = warp_sum(sums[i]);
        if (bias != nullptr) sum += bias[(i64)tile.expert * outputs + output];
        if (lane == 0 && i < tile.count) out[(i64)pairs[i] * outputs + output] = sum;
    }
}
EXPORT(expert_linear)

/// out[row] += sum of weights times x over the pairs of the row. Blocks: rows.
extern "C" __global__ void add_experts(const float* x, const float* weights, int chosen, int width, float* out) {
    i64 row = blockIdx.x;
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = out[row * width + c];
        for (int i = 0; i < chosen; i++) sum += weights[row * chosen + i] * x[(row * chosen + i) * width + c];
        out[row * width + c] = sum;
    }
}
EXPORT(add_experts)
