// The sum of weighted values of the tokens of a page from their codes.

/// Adds the products of 32 tokens' codes of one column, whose matrices of 8 tokens begin at `matrices` for this lane, and
/// the first weights.
__device__ __forceinline__ void mix_column(float (&d)[4][4], const u8* matrices, const u32 (&p)[8][2]) {
    u32 codes[4];
    load_matrices_transposed(codes, matrices);
#pragma unroll
    for (int parity = 0; parity < 2; parity++) {
        u32 low[2] = {codes[2 * parity], codes[2 * parity + 1]};
        u32 high[2] = {low[0] >> 8, low[1] >> 8};
#pragma unroll
        for (int field = 0; field < 4; field++) {
            u32 a[4] = {field_of(low[0], field), field_of(high[0], field), field_of(low[1], field), field_of(high[1], field)};
            mma_half(d[field], a, p[parity]);
        }
    }
}

/// Lets the weights of the next 32 tokens be the first ones.
__device__ __forceinline__ void turn_weights(u32 (&p)[8][2]) {
    u32 first[4] = {p[0][0], p[0][1], p[1][0], p[1][1]};
#pragma unroll
    for (int i = 0; i < 12; i++) p[i / 2][i % 2] = p[i / 2 + 2][i % 2];
#pragma unroll
    for (int i = 0; i < 4; i++) p[6 + i / 2][i % 2] = first[i];
}

#if VALUE_COLUMNS == 0

/// Sees to it that scales of tokens times the boost are at most 15, which weights times WEIGHT_UNIT can bear.
__device__ __forceinline__ void fit_boost(Sums& sums, float largest) {
    if (!__any_sync(ALL_LANES, sums.boost == 0.0f || largest * sums.boost >= 15.0f)) return;
    for (int step = 4; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
    // A power of two of fp16 that makes the largest one 4 to 7.
    u32 exponent = __float_as_uint(fmaxf(largest, 1.5e-4f)) >> 23;
    float boost = __uint_as_float((127 + 127 + 2 - exponent) << 23);
    float ratio = sums.boost == 0.0f ? 1.0f : boost / sums.boost, change[2] = {ratio, ratio};
    scale_values<true>(sums, change);
    sums.boost = boost;
}

/// Adds the values of a page, which have scales of tokens; those from `count` on are not there.
__device__ __forceinline__ void add_values(Sums& sums, const float (&s)[8][4], u8* slot, const Place& values, int count,
                                           u8*) {
    int lane = threadIdx.x % 32, g = lane / 4;
    u8* parameters = slot + VALUE_CODES;
    if (count < PAGE_TOKENS) {
        for (int token = count + lane; token < PAGE_TOKENS; token += 32)
            ((u16*)parameters)[token] = ((u16*)parameters)[PAGE_TOKENS + token] = 0;
        __syncwarp();
    }
    // Scales of the lane's tokens 16 i + 2 g and the one behind.
    u32 scales[8], largest = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        scales[i] = *(const u32*)(parameters + 4 * (8 * i + g));
        largest = i == 0 ? scales[0] : max_halves(largest, scales[i]);
    }
    fit_boost(sums, fmaxf(low_half(largest), high_half(largest)));
    u32 p[8][2], boost = pack_half(sums.boost, sums.boost);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 zeros = *(const u32*)(parameters + 2 * PAGE_TOKENS + 4 * (8 * i + g));
        u32 scale = multiply_halves(scales[i], boost);
#pragma unroll
        for (int parity = 0; parity < 2; parity++) {
            const float* own = s[i / 2 * 2 + parity] + i % 2 * 2;
            float zero = parity ? high_half(zeros) : low_half(zeros);
            if (INTEGER_VALUES) zero *= -(parity ? high_half(scales[i]) : low_half(scales[i]));
            sums.zero[0] = fmaf(own[0], zero, sums.zero[0]);
            sums.zero[1] = fmaf(own[1], zero, sums.zero[1]);
            u32 weights = pack_half(own[0], own[1]);
            weights = parity ? multiply_by_half<1>(weights, scale) : multiply_by_half<0>(weights, scale);
            p[i / 2 * 2 + parity][i % 2] = transpose_matrix(weights);
        }
    }
    // Matrices of 8 tokens and 8 pairs of channels: even tokens, then odd ones, of each the first and the second 8.
    int matrices = value_place(COLUMNS * token_at(lane / 8 % 2 * 16 + lane / 16 * 8 + lane % 8));
#pragma unroll
    for (int tokens = 0; tokens < 4; tokens++) {
        // The second column's place differs by its lowest bit alone.
#pragma unroll
        for (int column = 0; column < COLUMNS; column++)
            mix_column(sums.values[column], slot + (matrices ^ 16 * column) + 32 * 16 * COLUMNS * tokens, p);
        turn_weights(p);
    }
}

#else

/// Finds the channels of the lane's packed values (column, field, r), [column][field], for both r.
__device__ __forceinline__ void find_places(Sums& sums, const Side& side) {
    Planes planes = planes_of(side);
#pragma unroll
    for (int i = 0; i < VALUE_COLUMNS * 4; i++) {
        u32 both = 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int byte = i / 4 * 16 + threadIdx.x % 32 / 4 * 2 + r, plane;
            int channel = planes.channel_of(i % 4 * side.row_bytes + byte, plane);
            both |= (channel < 0 || byte >= side.row_bytes ? NOWHERE : channel | plane << 8) << (16 * r);
        }
        sums.places[i / 4][i % 4] = both;
    }
}

/// Lays a column of rows of any length out as tokens of 16 bytes.
__device__ __forceinline__ void lay_column(u8* column, const u8* rows, int row_bytes) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int place = 32 * i + threadIdx.x % 32, start = token_at(place) * row_bytes;
        const u32* words = (const u32*)(rows + (start & ~3));
        int shift = 8 * (start & 3);
        u32 low = words[0], out[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 high = words[j + 1];
            out[j] = (u32)(((u64)high << 32 | low) >> shift);
            low = high;
        }
        *(uint4*)(column + 16 * place) = make_uint4(out[0], out[1], out[2], out[3]);
    }
}

/// Adds the values of a page, which have scales of channels; those from `count` on are not there.
__device__ __forceinline__ void add_values(Sums& sums, const float (&s)[8][4], u8* slot, const Place& values, int count,
                                           u8* buffer) {
    int lane = threadIdx.x % 32;
    u32 p[8][2];
    float total[2] = {};
#pragma unroll
    for (int tile = 0; tile < 8; tile++) {
        weights_of(p[tile], s[tile]);
#pragma unroll
        for (int i = 0; i < 4; i++) total[i % 2] += s[tile][i];
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        for (int step = 4; step < 32; step *= 2) total[i] += __shfl_xor_sync(ALL_LANES, total[i], step);
    const u16* scales = (const u16*)(slot + values.scales);
    const u16* zeros = (const u16*)(slot + values.scales + values.zeros);
    float own_total = of_query(total);
    int planes = HEAD_DIM - sums.bare_count;
    for (int i = lane; i < sums.bare_count * QUERIES; i += 32)
        sums.bare[i] += own_total * half_to_float(zeros[planes + i / QUERIES]);
#pragma unroll
    for (int column = 0; column < VALUE_COLUMNS; column++) {
        if (16 * column >= values.row_bytes) break;
        const u8* matrices = slot + 16 * column;
        int row = lane / 16 * 8 + lane / 8 % 2 * 16 + lane % 8, stride;
        float d[4][4] = {};
        if (values.row_bytes % 16 == 0) {
            matrices += token_at(row) * values.row_bytes;
            stride = 32 * values.row_bytes;
        } else {
            __syncwarp();
            lay_column(buffer, matrices, values.row_bytes);
            __syncwarp();
            matrices = buffer + 16 * row;
            stride = 512;
        }
#pragma unroll 1
        for (int tokens = 0; tokens < 4; tokens++) {
            mix_column(d, matrices + tokens * stride, p);
            turn_weights(p);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int place = sums.places[column][i / 2] >> (i % 2 * 16) & 0xffff, channel = place & 255;
            float scale = half_to_float(scales[channel]), zero = half_to_float(zeros[channel]);
            if (INTEGER_VALUES) zero *= -scale;
            if (place > 255) zero = 0.0f;
            scale *= field_unit(i / 2);
#pragma unroll
            for (int j = 0; j < 2; j++)
                sums.lanes[column][i / 2][i % 2 * 2 + j] += scale * d[i / 2][i % 2 * 2 + j] + zero * total[j];
        }
    }
}

#endif
