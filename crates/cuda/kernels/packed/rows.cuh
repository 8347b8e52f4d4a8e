// Values in 16 or 32 bit: of the window, of protected tokens and of the pass in flight.

/// Two numbers of a row from an even place on, as fp16; 0 where there is no row. Rows are fp16, or f32 where FULL.
template <bool FULL>
__device__ __forceinline__ u32 pair_of(const void* row, int place) {
    if (row == nullptr) return 0;
    if (!FULL) return *(const u32*)((const u16*)row + place);
    float2 two = *(const float2*)((const float*)row + place);
    return pack_half(two.x, two.y);
}

/// The lane's numbers of 16 rows of values, of which it has four: pairs of channels [tile][row].
template <bool FULL>
__device__ __forceinline__ void load_rows(u32 (&pairs)[COLUMNS * 4][4], const void* const (&rows)[4]) {
#pragma unroll
    for (int i = 0; i < COLUMNS * 16; i++)
        pairs[i / 4][i % 4] = pair_of<FULL>(rows[i % 4], channel_of(i / 16, i / 4 % 4, threadIdx.x % 32 / 4));
}

/// Adds the weighted values of 16 rows to sums of values.
__device__ __forceinline__ void add_rows(Sums& sums, const float (&s)[4], const u32 (&pairs)[COLUMNS * 4][4]) {
    u32 p[2];
    weights_of(p, s);
#pragma unroll
    for (int tile = 0; tile < COLUMNS * 4; tile++) {
        u32 a[4];
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            a[k] = (pairs[tile][k] & 0xffff) | pairs[tile][k + 1] << 16;
            a[k + 1] = pairs[tile][k] >> 16 | (pairs[tile][k + 1] & 0xffff0000u);
        }
        mma_half(sums.values[tile / 4][tile % 4], a, p);
    }
}

/// Rows of the sequence and the KV head in an array of them, each of `capacity` rows.
__device__ __forceinline__ const u16* rows_of(const u16* rows, const Tile& tile, int capacity) {
    return rows + ((i64)tile.span->slot * tile.a->cache.kv_heads + tile.kv_head) * capacity * HEAD_DIM;
}

#if LATE_VALUES
/// Adds the values of a page's tokens from `values` to `keys` on, which lie in the window, and takes their weights away.
__device__ __forceinline__ void add_window(Sums& sums, float (&s)[8][4], int first, int keys, int values, const Tile& tile) {
    int t = threadIdx.x % 4, slots = tile.a->cache.value_slots;
    const u16* ring = rows_of(tile.a->cache.value_ring, tile, slots);
    // The first page with scales of tokens lowers it as far as it must.
    if (sums.boost == 0.0f) sums.boost = 32768.0f;
    change_unit(sums, 1.0f, false);
#pragma unroll 1
    for (int i = 0; i < 8; i++) {
        int start = i / 2 * 32 + i % 2;
        float recent[4], rest[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            bool packed = start + (int)threadIdx.x % 32 / 4 * 2 + j / 2 * 16 < values;
            recent[j] = packed ? 0.0f : s[0][j];
            rest[j] = packed ? s[0][j] : 0.0f;
        }
        const void* rows[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int token = start + (2 * t + k % 2) * 2 + k / 2 * 16;
            rows[k] = token < values || token >= keys ? nullptr : ring + (first + token) % slots * HEAD_DIM;
        }
        u32 pairs[COLUMNS * 4][4];
        load_rows<false>(pairs, rows);
        add_rows(sums, recent, pairs);
        // The next tile takes the first place, so that all stay in registers.
#pragma unroll
        for (int j = 0; j < 32; j++) s[j / 4][j % 4] = j < 28 ? s[j / 4 + 1 - j / 28][j % 4] : rest[j % 4];
    }
    change_unit(sums, 1.0f, true);
}
#endif
