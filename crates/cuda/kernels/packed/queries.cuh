// Queries of a block: which ones they are, and how they lie as operands of the tensor cores.

/// The tile of queries of a warp.
struct Tile {
    const Attention* a;
    const Span* span;
    int kv_head;
    /// Rows of the batch that the call and the span have in common, and query heads of a KV head.
    int first_row, rows, shared;
    /// Number of the tile's first query among those of the rows.
    int first;

    __device__ __forceinline__ bool has(int query) const { return first + query < rows * shared; }
    __device__ __forceinline__ int row(int query) const { return first_row + (rows == 1 ? 0 : (first + query) / shared); }
    /// The query's place in an array of rows of heads.
    __device__ __forceinline__ i64 place(int query) const {
        int own = row(query) - first_row, head = kv_head * shared + first + query - own * shared;
        return (i64)(own + first_row - a->first_row) * a->heads + head;
    }
};

/// What products of query g are worth as logits, and of queries 2 t and 2 t + 1 to base 2. A query's numbers are divided by
/// the largest one, so that fp16 takes them with any scale.
struct Range {
    float natural;

    /// Asked for again for each page, as there are more registers for nothing else.
    __device__ __forceinline__ void factors(float (&factor)[2]) const {
        for (int i = 0; i < 2; i++) factor[i] = __shfl_sync(ALL_LANES, natural, threadIdx.x % 4 * 8 + 4 * i) * LOG2_E;
    }
};

/// Where a channel of a query lies among the operands of products over channels, as a number of halves from the query's
/// first one. For rows of 16 bit the 8 channels that a lane loads side by side are its own of two steps.
template <bool PLAIN>
__device__ __forceinline__ int operand_place(int channel) {
    int step = PLAIN ? channel / 32 * 2 + channel / 4 % 2 : channel / 16;
    int t = PLAIN ? channel / 8 % 4 : channel / 4 % 4;
    return 128 * step + 4 * t + channel % 4;
}

/// Lays the queries down as operands [step][lane], and what their products are worth, all warps together. They are there behind
/// the next barrier.
template <bool PLAIN>
__device__ __forceinline__ void load_queries(const Tile& tile, uint2* operands, float* worth, const int* order) {
    constexpr int NUMBERS = HEAD_DIM / 32;
    int lane = threadIdx.x % 32;
    float numbers[QUERIES / WARPS][NUMBERS];
#pragma unroll
    for (int turn = 0; turn < QUERIES / WARPS; turn++) {
        int query = turn * WARPS + threadIdx.x / 32;
        bool has = tile.has(query);
        const float* own = tile.a->q + (has ? tile.place(query) : 0) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < NUMBERS; i++) {
            int channel = lane * 2 + i / 2 * 64 + i % 2;
            numbers[turn][i] = has ? own[order != nullptr ? order[channel] : channel] : 0.0f;
        }
    }
#pragma unroll
    for (int turn = 0; turn < QUERIES / WARPS; turn++) {
        int query = turn * WARPS + threadIdx.x / 32;
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < NUMBERS; i++) largest = fmaxf(largest, fabsf(numbers[turn][i]));
        if (tile.has(query)) largest = warp_max(largest);
        float inverse = largest > 0.0f ? __fdividef(1.0f, largest) : 0.0f;
#pragma unroll
        for (int i = 0; i < NUMBERS; i += 2)
            *(u32*)((u16*)operands + 16 * query + operand_place<PLAIN>(lane * 2 + i / 2 * 64)) =
                pack_half(numbers[turn][i] * inverse, numbers[turn][i + 1] * inverse);
        if (lane == 0) worth[query] = (largest > 0.0f ? largest : 1.0f) * rsqrtf((float)HEAD_DIM);
    }
}

#if KEY_PLANES
/// The operand of 16 packed rows that are planes: the lane's four numbers, times what the plane is worth, and their channels.
struct PlaneOperand {
    u32 q[2];
    u32 channels;
};
#endif

/// Queries as all warps of a block read them.
struct Operands {
    /// [step][lane]: channels in the order of storage.
    uint2* q;
#if KEY_PLANES
    /// [step of rows][lane].
    PlaneOperand* planes;
#endif
};

/// Bytes of shared memory that they take.
__device__ __forceinline__ int operand_bytes(const Side& keys) {
    return 256 * STEPS + (KEY_PLANES ? multiple(keys.rows, 16) / 16 * 384 : 0);
}

#if KEY_PLANES
/// Fills `operands` [step][lane] of rows, all warps together.
__device__ __forceinline__ void fill_planes(PlaneOperand* operands, const Tile& tile, const Side& side, const Range& range,
                                            const int* order) {
    int lane = threadIdx.x % 32, g = lane / 4;
    const float* query = tile.a->q + (tile.has(g) ? tile.place(g) : 0) * HEAD_DIM;
    float inverse = rsqrtf((float)HEAD_DIM) / range.natural;
    Planes planes = planes_of(side);
    for (int step = threadIdx.x / 32; 16 * step < side.rows; step += WARPS) {
        PlaneOperand own = {{0, 0}, 0};
        for (int i = 0; i < 4; i++) {
            int plane;
            int channel = planes.channel_of(16 * step + lane % 4 * 4 + i, plane);
            if (channel < 0 || !tile.has(g)) continue;
            float number = query[order != nullptr ? order[channel] : channel] * inverse * (float)(1 << (2 * plane));
            own.q[i / 2] |= (u32)float_to_half(number) << (i % 2 * 16);
            own.channels |= (u32)channel << (8 * i);
        }
        operands[32 * step + lane] = own;
    }
}
#endif
