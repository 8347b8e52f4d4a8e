// The walk of a warp through its pages.

/// Which of a page's tokens are seen: a bit for each.
struct Visible {
    u64 low, high;

    __device__ __forceinline__ void hide(int token) {
        u64 bit = ~(1ull << token % 64);
        low &= token < 64 ? bit : ~0ull;
        high &= token < 64 ? ~0ull : bit;
    }
    /// Whether the lane's token of a tile's row g + 8 `upper` is seen.
    __device__ __forceinline__ bool has(int tile, int upper) const {
        u32 bits = (u32)((tile < 4 ? low : high) >> (tile / 2 % 2 * 32));
        return bits >> (tile % 2 + threadIdx.x % 32 / 4 * 2 + 16 * upper) & 1;
    }
};

__device__ __forceinline__ u64 first_bits(int count) { return count >= 64 ? ~0ull : (1ull << max(count, 0)) - 1; }

/// The first `count` tokens of a page but the protected ones.
__device__ __forceinline__ Visible visible_tokens(const Cache& cache, int slot, int first, int count) {
    Visible visible = {first_bits(count), first_bits(count - 64)};
    int sinks = cache.sink_capacity > 0 ? cache.sink_counts[slot] : 0;
    for (int start = 0; start < sinks; start += 32) {
        int index = start + threadIdx.x % 32;
        int token = index < sinks ? cache.sink_positions[(i64)slot * cache.sink_capacity + index] - first : -1;
        u32 here = __ballot_sync(ALL_LANES, token >= 0 && token < PAGE_TOKENS);
        for (; here != 0; here &= here - 1) visible.hide(__shfl_sync(ALL_LANES, token, __ffs(here) - 1));
    }
    return visible;
}

/// Adds the pages of a split that fall to this warp: every fourth one.
__device__ __forceinline__ void add_pages(Sums& sums, const Tile& tile, const Page& page, const Memory& memory, int first,
                                          int end) {
    const Attention& a = *tile.a;
    const Cache& cache = a.cache;
    const Span& span = *tile.span;
    int kv_head = tile.kv_head;
    first += threadIdx.x / 32;
    const u8* pool = cache.pool + cache.layer_offset + page.offset;
    const int* table = a.tables + span.blocks;
    auto block_of = [&](int index) {
        int own = min(index, end - 1);
        return table[SPAN ? own % span.block_count : own];
    };
    Place keys = place_of(page.keys), values = place_of(page.values);
    // Half h of the warp's pages lies in slot h % 3; two halves come while one is read.
    u8* memory_of_warp = memory.of_warp(threadIdx.x / 32);
    u8* slots[SLOTS] = {memory_of_warp, memory_of_warp + memory.slot_bytes, memory_of_warp + 2 * memory.slot_bytes};
    const u8* current = pool + block_of(first) * cache.block_bytes;
    const u8* next = pool + block_of(first + WARPS) * cache.block_bytes;
    if (first < end) copy_keys(slots[0], current, keys);
    copy_commit();
    if (first < end) copy_values(slots[1], current, values);
    copy_commit();
    const int* order = cache.key_order != nullptr ? cache.key_order + kv_head * HEAD_DIM : nullptr;
    Operands operands;
    operands.q = (uint2*)memory.of_warp(WARPS);
    // Nothing is copied to the first warp's third slot yet.
    float* worth = (float*)(memory.of_warp(0) + 2 * memory.slot_bytes);
    load_queries<false>(tile, operands.q, worth, order);
    __syncthreads();
    Range range = {worth[threadIdx.x % 32 / 4]};
#if KEY_PLANES
    operands.planes = (PlaneOperand*)(operands.q + 32 * STEPS);
    fill_planes(operands.planes, tile, page.keys, range, order);
#endif
    __syncthreads();
    // Behind this page no token is protected.
    int last_hidden = -1, sinks = cache.sink_capacity > 0 ? cache.sink_counts[span.slot] : 0;
    for (int i = 0; i < sinks; i++)
        last_hidden = max(last_hidden, cache.sink_positions[(i64)span.slot * cache.sink_capacity + i] / PAGE_TOKENS);
    u8* buffer = memory_of_warp + SLOTS * memory.slot_bytes;
#if VALUE_COLUMNS > 0
    find_places(sums, page.values);
    sums.bare = (float*)(buffer + COLUMN_BYTES);
    sums.bare_count = bare_channels(page.values);
    for (int i = threadIdx.x % 32; i < sums.bare_count * QUERIES; i += 32) sums.bare[i] = 0.0f;
#endif
    for (int index = first; index < end; index += WARPS) {
        int token = index * PAGE_TOKENS;
        int key_count = min(span.packed_keys - token, PAGE_TOKENS);
        int value_count = LATE_VALUES ? min(span.packed_values - token, key_count) : key_count;
        float s[8][4], offset[2];
        int after = block_of(index + 2 * WARPS);
        if (index + WARPS < end) copy_keys(slots[2], next, keys);
        copy_commit();
#if PAGE_SINKS
        int own_slot = own_page_sink(page.sinks, current);
        u32 protected_lanes = __ballot_sync(ALL_LANES, own_slot >= 0);
#else
        constexpr u32 protected_lanes = 0;
#endif
        copy_wait<2>();
        __syncwarp();
        float factor[2];
        range.factors(factor);
        page_logits(s, offset, slots[0], keys, operands, range, factor);
        __syncwarp();
        if (key_count < PAGE_TOKENS || index <= last_hidden || protected_lanes != 0) {
            Visible visible = visible_tokens(cache, span.slot, token, key_count);
#if PAGE_SINKS
            for (u32 rest = protected_lanes; rest != 0; rest &= rest - 1)
                visible.hide(__shfl_sync(ALL_LANES, own_slot, __ffs(rest) - 1));
#endif
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (!visible.has(i / 4, i % 4 / 2)) s[i / 4][i % 4] = -infinity();
        }
#if SPAN
        if (token < a.first_seen(span, tile.row(QUERIES - 1))) {
            for (int j = 0; j < 2; j++) {
                int begin = a.first_seen(span, tile.row(2 * (threadIdx.x % 4) + j)) - token;
                Visible later = {~first_bits(begin), ~first_bits(begin - 64)};
                for (int i = j; i < 32; i += 2)
                    if (!later.has(i / 4, i % 4 / 2)) s[i / 4][i % 4] = -infinity();
            }
        }
#endif
#if SOFTCAP
        cap_logits<8, true>(s, a.softcap, factor, offset);
        float one[2] = {1.0f, 1.0f}, none[2] = {0.0f, 0.0f};
        softmax<8, true>(sums, s, one, none);
#else
        softmax<8, true>(sums, s, factor, offset);
#endif
        if (index + WARPS < end) copy_values(slots[0], next, values);
        copy_commit();
        copy_wait<2>();
        __syncwarp();
#if LATE_VALUES
        if (value_count < key_count) add_window(sums, s, token, key_count, value_count, tile);
#endif
        if (!LATE_VALUES || value_count > 0) add_values(sums, s, slots[1], values, value_count, buffer);
#if PAGE_SINKS
        if (protected_lanes != 0)
            add_page_sinks(sums, tile, page.sinks, current, token, __popc(protected_lanes), operands.q, order, factor);
        current = next;
#endif
        __syncwarp();
        u8* read = slots[1];
        slots[1] = slots[0];
        slots[0] = slots[2];
        slots[2] = read;
        next = pool + after * cache.block_bytes;
    }
    copy_wait<0>();
}
