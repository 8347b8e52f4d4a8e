// The result of a block: its warps joined, as the split's part of the result.

/// Where the partial result of a query and a split lies.
__device__ __forceinline__ float* partial_of(const Tile& tile, int query, int split) {
    return tile.a->partials + (tile.place(query) * tile.a->splits + split) * (HEAD_DIM + 2);
}

/// Joins what the warps of a block have summed, and writes it.
__device__ __forceinline__ void join_warps(Sums& sums, const Tile& tile, const Page& page, const Memory& memory, int split) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // [query][channel], then the largest logits and the normalisers. Rows of different queries begin in different banks.
    constexpr int ROW = HEAD_DIM + 8, TOPS = QUERIES * ROW, WEIGHTS = TOPS + QUERIES;
    float* own = (float*)memory.of_warp(threadIdx.x / 32);
    if (sums.boost == 0.0f) sums.boost = 1.0f;
    change_unit(sums, 1.0f, false);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        for (int step = 4; step < 32; step *= 2) {
            sums.weight[i] += __shfl_xor_sync(ALL_LANES, sums.weight[i], step);
            sums.zero[i] += __shfl_xor_sync(ALL_LANES, sums.zero[i], step);
        }
        if (g == 0) {
            own[TOPS + 2 * t + i] = sums.top[i];
            own[WEIGHTS + 2 * t + i] = sums.weight[i];
        }
    }
#pragma unroll
    for (int i = 0; i < COLUMNS * 8; i++) {
        const float(&tile_values)[4] = sums.values[i / 8][i / 2 % 4];
        float zero = sums.zero[i % 2];
        *(float2*)(own + (2 * t + i % 2) * ROW + channel_of(i / 8, i / 2 % 4, g)) =
            make_float2(tile_values[i % 2] + zero, tile_values[2 + i % 2] + zero);
    }
#if VALUE_COLUMNS > 0
    __syncwarp();
    for (int i = threadIdx.x % 32; i < sums.bare_count * QUERIES; i += 32)
        own[i % QUERIES * ROW + HEAD_DIM - sums.bare_count + i / QUERIES] += sums.bare[i];
    // Planes of a channel lie in different lanes.
#pragma unroll 1
    for (int plane = 0; plane < 4; plane++) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < VALUE_COLUMNS * 8; i++) {
            int place = sums.places[i / 8][i / 2 % 4] >> (i % 2 * 16) & 0xffff;
            if (place >> 8 != plane) continue;
#pragma unroll
            for (int j = 0; j < 2; j++)
                own[(2 * t + j) * ROW + (place & 255)] += sums.lanes[i / 8][i / 2 % 4][i % 2 * 2 + j] * (float)(1 << (2 * plane));
        }
    }
#endif
    __syncthreads();
    int lane = threadIdx.x % 32;
    for (int query = threadIdx.x / 32; query < QUERIES && tile.has(query); query += WARPS) {
        float top = -infinity(), weight = 0.0f;
        float2 values[HEAD_DIM / 64] = {};
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) top = fmaxf(top, ((const float*)memory.of_warp(warp))[TOPS + query]);
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            const float* other = (const float*)memory.of_warp(warp);
            float frame = other[TOPS + query];
            float factor = frame == -infinity() ? 0.0f : exp2_fast(frame - top) / WEIGHT_UNIT;
            weight = fmaf(factor, other[WEIGHTS + query], weight);
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 64; i++) {
                float2 two = *(const float2*)(other + query * ROW + 64 * i + 2 * lane);
                values[i].x = fmaf(factor, two.x, values[i].x);
                values[i].y = fmaf(factor, two.y, values[i].y);
            }
        }
        float* partial = partial_of(tile, query, split);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 64; i++) *(float2*)(partial + 2 + 64 * i + 2 * lane) = values[i];
        if (lane == 0) *(float2*)partial = make_float2(top * LN_2, weight);
    }
}
