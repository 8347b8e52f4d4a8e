// Tokens outside of pages.

/// Tokens outside of pages, in order: protected ones and the window, up to a multiple of 16; the pass in flight.
struct Plain {
    int sinks, recent, incoming;
    /// Ring slots of number 0, if that were in the window; those behind the last slot go on at the first.
    int key_slot, value_slot;

    __device__ __forceinline__ int half() const { return multiple(sinks + recent, 16); }
};

__device__ __forceinline__ Plain plain_tokens(const Tile& tile) {
    const Attention& a = *tile.a;
    const Span& span = *tile.span;
    int sinks = a.cache.sink_capacity > 0 ? a.cache.sink_counts[span.slot] : 0;
    int incoming = a.incoming ? tile.first_row + tile.rows - span.first_row : 0;
    int key_slot = span.packed_keys % a.cache.key_slots, value_slot = span.packed_keys % a.cache.value_slots;
    return {sinks, span.cached - span.packed_keys, incoming, key_slot - sinks, value_slot - sinks};
}

/// The key or the value of a plain token; nothing for one that is not there, or is protected and still in the window.
template <bool KEYS, bool FULL>
__device__ __forceinline__ const void* plain_row(const Tile& tile, const Plain& plain, int index) {
    const Cache& cache = tile.a->cache;
    const Span& span = *tile.span;
    if (FULL) {
        int row = index - plain.half();
        if (row >= plain.incoming) return nullptr;
        const float* rows = KEYS ? cache.incoming_keys : cache.incoming_values;
        return rows + ((i64)tile.kv_head * cache.incoming_rows + span.first_row + row) * HEAD_DIM;
    }
    if (index >= plain.sinks + plain.recent) return nullptr;
    int token = span.packed_keys + index - plain.sinks;
    if (index < plain.sinks) {
        token = cache.sink_positions[(i64)span.slot * cache.sink_capacity + index];
        if (token >= span.packed_keys) return nullptr;
        if (KEYS || token < span.packed_values)
            return rows_of(KEYS ? cache.sink_keys : cache.sink_values, tile, cache.sink_capacity) + index * HEAD_DIM;
    }
    int slots = KEYS ? cache.key_slots : cache.value_slots;
    int slot = index < plain.sinks ? token % slots : (KEYS ? plain.key_slot : plain.value_slot) + index;
    if (slot >= slots) slot -= slots;
    return rows_of(KEYS ? cache.key_ring : cache.value_ring, tile, slots) + slot * HEAD_DIM;
}

/// The position of a plain token.
template <bool FULL>
__device__ __forceinline__ int plain_position(const Tile& tile, const Plain& plain, int index) {
    const Span& span = *tile.span;
    if (FULL) return span.cached + index - plain.half();
    if (index >= plain.sinks) return span.packed_keys + index - plain.sinks;
    return tile.a->cache.sink_positions[(i64)span.slot * tile.a->cache.sink_capacity + index];
}

/// Adds 16 plain tokens from `start` on.
template <bool FULL>
__device__ __forceinline__ void add_plain_tile(Sums& sums, const Tile& tile, const Plain& plain, int start, const uint2* q,
                                               const Range& range) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const void* keys[2] = {plain_row<true, FULL>(tile, plain, start + g), plain_row<true, FULL>(tile, plain, start + g + 8)};
    const void* values[4];
#pragma unroll
    for (int k = 0; k < 4; k++) values[k] = plain_row<false, FULL>(tile, plain, start + 2 * t + k % 2 + k / 2 * 8);
    u32 numbers[2][STEPS / 2][4], pairs[COLUMNS * 4][4];
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        int place = i / 2 * 32 + 8 * t;
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (!FULL && keys[i % 2] != nullptr) eight = *(const uint4*)((const u16*)keys[i % 2] + place);
        if (FULL)
            eight = make_uint4(pair_of<FULL>(keys[i % 2], place), pair_of<FULL>(keys[i % 2], place + 2),
                               pair_of<FULL>(keys[i % 2], place + 4), pair_of<FULL>(keys[i % 2], place + 6));
        u32 own[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int j = 0; j < 4; j++) numbers[i % 2][i / 2][j] = own[j];
    }
    load_rows<FULL>(pairs, values);
    float s[1][4] = {}, offset[2] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const u32 *low = numbers[0][step / 2] + step % 2 * 2, *high = numbers[1][step / 2] + step % 2 * 2;
        u32 a[4] = {low[0], high[0], low[1], high[1]};
        uint2 own = q[32 * step + lane];
        u32 b[2] = {own.x, own.y};
        mma_half(s[0], a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = tile.span->first_row + start + g + i / 2 * 8 - plain.half();
        if (keys[i / 2] == nullptr || (FULL && row > tile.row(2 * t + i % 2))) s[0][i] = -infinity();
#if SPAN
        int position = plain_position<FULL>(tile, plain, start + g + i / 2 * 8);
        if (position < tile.a->first_seen(*tile.span, tile.row(2 * t + i % 2))) s[0][i] = -infinity();
#endif
    }
    float factor[2];
    range.factors(factor);
#if SOFTCAP
    cap_logits<1, false>(s, tile.a->softcap, factor, offset);
    for (int i = 0; i < 2; i++) factor[i] = 1.0f;
#endif
    softmax<1, false>(sums, s, factor, offset);
    add_rows(sums, s[0], pairs);
}

/// Adds the plain tokens of a split that fall to this warp: 16 of every 64.
__device__ __forceinline__ void add_plain(Sums& sums, const Tile& tile, const Memory& memory, int first) {
    sums.boost = 1.0f;
    uint2* q = (uint2*)memory.of_warp(WARPS);
    float* worth = (float*)memory.of_warp(0);
    load_queries<true>(tile, q, worth, nullptr);
    __syncthreads();
    Range range = {worth[threadIdx.x % 32 / 4]};
    __syncthreads();
    Plain plain = plain_tokens(tile);
    int end = min(first + PLAIN_TOKENS, plain.half() + plain.incoming);
#pragma unroll 1
    for (int start = first + threadIdx.x / 32 * 16; start < end; start += 16 * WARPS) {
        if (start < plain.half())
            add_plain_tile<false>(sums, tile, plain, start, q, range);
        else
            add_plain_tile<true>(sums, tile, plain, start, q, range);
    }
    change_unit(sums, 1.0f, true);
}
