// Tokens that a page protects: rows beside its codes.

#if PAGE_SINKS

/// Slot of the token of the lane's place; -1 where it has none. There are no more places than lanes.
__device__ __forceinline__ int own_page_sink(const PageSinks& sinks, const u8* page) {
    int lane = threadIdx.x % 32;
    return lane < sinks.places ? stored::page_sink_slot(sinks, page, lane) : -1;
}

/// Adds the tokens of the first `count` places of a page, whose first token is `token`. `order` has the channels of keys in
/// the order of the queries.
__device__ __forceinline__ void add_page_sinks(Sums& sums, const Tile& tile, const PageSinks& sinks, const u8* page,
                                               int token, int count, const uint2* q, const int* order,
                                               const float (&range)[2]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    change_unit(sums, 1.0f, false);
#pragma unroll 1
    for (int start = 0; start < count; start += 16) {
        auto pair = [&](bool keys, int place, int first, int second) -> u32 {
            if (place >= count) return 0;
            return pack_half(stored::page_sink_number(sinks, page, keys, place, first),
                             stored::page_sink_number(sinks, page, keys, place, second));
        };
        float s[1][4] = {}, offset[2] = {};
#pragma unroll 2
        for (int step = 0; step < STEPS; step++) {
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int channel = 16 * step + 4 * t + i / 2 * 2;
                int first = order != nullptr ? order[channel] : channel;
                int second = order != nullptr ? order[channel + 1] : channel + 1;
                a[i] = pair(true, start + g + i % 2 * 8, first, second);
            }
            uint2 own = q[32 * step + lane];
            u32 b[2] = {own.x, own.y};
            mma_half(s[0], a, b);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int place = start + g + i / 2 * 8;
            if (place >= count) s[0][i] = -infinity();
#if SPAN
            int begin = tile.a->first_seen(*tile.span, tile.row(2 * t + i % 2));
            if (place < count && token + stored::page_sink_slot(sinks, page, place) < begin) s[0][i] = -infinity();
#endif
        }
        float factor[2] = {range[0], range[1]};
#if SOFTCAP
        cap_logits<1, false>(s, tile.a->softcap, factor, offset);
        for (int i = 0; i < 2; i++) factor[i] = 1.0f;
#endif
        softmax<1, false>(sums, s, factor, offset);
        u32 pairs[COLUMNS * 4][4];
#pragma unroll
        for (int i = 0; i < COLUMNS * 16; i++) {
            int channel = channel_of(i / 16, i / 4 % 4, g);
            pairs[i / 4][i % 4] = pair(false, start + 2 * t + i % 2 + i % 4 / 2 * 8, channel, channel + 1);
        }
        add_rows(sums, s[0], pairs);
    }
    change_unit(sums, 1.0f, true);
}

#endif
