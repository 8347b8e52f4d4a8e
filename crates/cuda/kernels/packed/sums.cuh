// What a warp has summed of the values of tokens that it has seen, and the softmax over their logits.

/// What a warp has summed for its 8 queries. Lane (g, t) = (lane / 4, lane % 4) holds queries 2 t and 2 t + 1.
struct Sums {
    /// Largest logit, to base 2.
    float top[2];
    /// Over the lane's own tokens: sum of weights, and of weights times what code 0 of the token's value stands for. All
    /// weights are times WEIGHT_UNIT.
    float weight[2], zero[2];
    /// [column][field][2 r + query]: weighted values of the channel of (column, field, r); see channel_of.
    float values[COLUMNS][4][4];
#if VALUE_COLUMNS > 0
    /// Weighted codes times scales, for the lane of packed values of (column, field, r).
    float lanes[VALUE_COLUMNS][4][4];
    /// Channels of these packed values, plus 256 times the plane; NOWHERE where there is none.
    u32 places[VALUE_COLUMNS][4];
    /// Of packed values the channels without a plane, [channel][query], in shared memory; and how many there are.
    float* bare;
    int bare_count;
#endif
    /// What values' scales have been multiplied by.
    float boost;
};

/// Channel of the first of two rows r that a lane holds of a tile of values.
__device__ __forceinline__ int channel_of(int column, int field, int g) {
    return field * (HEAD_DIM / 4) + 16 * column + 2 * g;
}

__device__ __forceinline__ void clear(Sums& sums) {
    for (int i = 0; i < 2; i++) {
        sums.top[i] = -infinity();
        sums.weight[i] = sums.zero[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < COLUMNS * 16; i++) sums.values[i / 16][i / 4 % 4][i % 4] = 0.0f;
#if VALUE_COLUMNS > 0
#pragma unroll
    for (int i = 0; i < VALUE_COLUMNS * 16; i++) sums.lanes[i / 16][i / 4 % 4][i % 4] = 0.0f;
    for (int i = 0; i < VALUE_COLUMNS * 4; i++) sums.places[i / 4][i % 4] = NOWHERE | NOWHERE << 16;
    sums.bare_count = 0;
#endif
    sums.boost = 0.0f;
}

#if VALUE_COLUMNS > 0
/// Of two numbers of the lane's queries 2 t and 2 t + 1, that of query lane % 8.
__device__ __forceinline__ float of_query(const float (&both)[2]) {
    int source = threadIdx.x % 8 / 2;
    float first = __shfl_sync(ALL_LANES, both[0], source), second = __shfl_sync(ALL_LANES, both[1], source);
    return threadIdx.x % 2 ? second : first;
}
#endif

/// Multiplies sums of values, those of each query by its factor. Warps that read pages with scales of channels have nothing
/// but sums of lanes, unless pages protect tokens; others have no such sums.
template <bool CODES>
__device__ __forceinline__ void scale_values(Sums& sums, const float (&change)[2]) {
    if (!CODES || VALUE_COLUMNS == 0 || LATE_VALUES || PAGE_SINKS) {
#pragma unroll
        for (int i = 0; i < COLUMNS * 16; i++) sums.values[i / 16][i / 4 % 4][i % 4] *= change[i % 2];
    }
#if VALUE_COLUMNS > 0
    if (!CODES && !PAGE_SINKS) return;
#pragma unroll
    for (int i = 0; i < VALUE_COLUMNS * 16; i++) sums.lanes[i / 16][i / 4 % 4][i % 4] *= change[i % 2];
    float own = of_query(change);
    for (int i = threadIdx.x % 32; i < sums.bare_count * QUERIES; i += 32) sums.bare[i] *= own;
#endif
}

/// Turns sums of products into weights in the frame of the largest logit so far, and moves the sums there: the logit of an
/// element is `element * factor + offset`, times the unit of its field where the tiles are of codes.
template <int TILES, bool CODES>
__device__ __forceinline__ void softmax(Sums& sums, float (&s)[TILES][4], const float (&factor)[2],
                                        const float (&offset)[2]) {
    float top[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            top[i] = fmaxf(top[i], fmaxf(s[tile][i], s[tile][i + 2]) * (factor[i] * (CODES ? field_unit(tile / 2) : 1.0f)));
#pragma unroll
    for (int i = 0; i < 2; i++) {
        for (int step = 4; step < 32; step *= 2) top[i] = fmaxf(top[i], __shfl_xor_sync(ALL_LANES, top[i], step));
        top[i] = fmaxf(top[i] + offset[i], sums.top[i]);
    }
    if (__any_sync(ALL_LANES, top[0] > sums.top[0] || top[1] > sums.top[1])) {
        float change[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            change[i] = top[i] == -infinity() ? 0.0f : exp2_fast(sums.top[i] - top[i]);
            sums.top[i] = top[i];
            sums.weight[i] *= change[i];
            sums.zero[i] *= change[i];
        }
        scale_values<CODES>(sums, change);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float base = top[i] == -infinity() ? 0.0f : offset[i] - top[i] + WEIGHT_BITS;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int j = i; j < 4; j += 2) {
                s[tile][j] = exp2_fast(fmaf(s[tile][j], factor[i] * (CODES ? field_unit(tile / 2) : 1.0f), base));
                sums.weight[i] += s[tile][j];
            }
    }
}

/// Caps the logits of sums of products, which become sums of which the factor is 1 and the offset 0. What is not seen stays so.
template <int TILES, bool CODES>
__device__ __forceinline__ void cap_logits(float (&s)[TILES][4], float softcap, const float (&factor)[2],
                                           const float (&offset)[2]) {
    float cap = softcap * LOG2_E;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float unit = CODES ? field_unit(tile / 2) : 1.0f;
            if (s[tile][j] == -infinity()) continue;
            s[tile][j] = cap * tanhf(fmaf(s[tile][j], factor[j % 2] * unit, offset[j % 2]) / cap) / unit;
        }
}

/// Weights of 16 tokens as the second operand of a product over them.
__device__ __forceinline__ void weights_of(u32 (&p)[2], const float (&s)[4]) {
    p[0] = transpose_matrix(pack_half(s[0], s[1]));
    p[1] = transpose_matrix(pack_half(s[2], s[3]));
}

/// Turns sums of codes times scales into values times a factor, or back.
__device__ __forceinline__ void change_unit(Sums& sums, float factor, bool back) {
    if (VALUE_COLUMNS == 0) factor /= sums.boost;
    if (back) factor = 1.0f / factor;
#pragma unroll
    for (int i = 0; i < COLUMNS * 16; i++) {
        float unit = VALUE_COLUMNS > 0 ? 1.0f : field_unit(i / 4 % 4);
        sums.values[i / 16][i / 4 % 4][i % 4] *= factor * (back ? 1.0f / unit : unit);
    }
}
