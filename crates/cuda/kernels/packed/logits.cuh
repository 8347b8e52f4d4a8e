// Logits of the tokens of a page from the codes of its keys.

/// `ln(sinh(x) / x)`: up to 2 a polynomial that is off by 6e-7 at most.
__device__ __forceinline__ float rounding_bias(float x) {
    float u = x * x;
    if (u > 4.0f) {
        x = fabsf(x);
        return x + logf((1.0f - expf(-2.0f * x)) / (2.0f * x));
    }
    float y = fmaf(1.02112540e-6f, u, -2.31892336e-5f);
    y = fmaf(y, u, 3.48469301e-4f);
    y = fmaf(y, u, -5.55353332e-3f);
    return u * fmaf(y, u, 0.166666508f);
}

/// Products of the codes of keys in a slot and the queries, [tile of tokens (field, parity)][4], and what is added to all.
__device__ __forceinline__ void page_logits(float (&s)[8][4], float (&offset)[2], const u8* slot, const Place& keys,
                                            const Operands& operands, const Range& range, const float (&factor)[2]) {
    int lane = threadIdx.x % 32, t = lane % 4;
    int filled = multiple(keys.rows, 16);
    const u8* scales = slot + 32 * filled;
    const u8* zeros = scales + keys.zeros;
    // Matrices of 8 channels and 8 pairs of tokens: first and second half of the row, for channels of which the second bit is
    // 0, and then 1, so that a lane's four channels of a step lie side by side.
    int channel = lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
    const u8* matrices = slot + key_place(2 * channel + lane / 8 % 2);
    float sum_bias = 0.0f, zero[4] = {};
#pragma unroll
    for (int i = 0; i < 32; i++) s[i / 4][i % 4] = 0.0f;
#if KEY_PLANES
    int steps = filled / 16;
#else
    constexpr int steps = STEPS;
#endif
    // Unrolled further, the code would not stay near.
#pragma unroll 2
    for (int step = 0; step < steps; step++) {
        u32 codes[4], b[2];
        load_matrices_transposed(codes, matrices + 512 * step);
#if KEY_PLANES
        PlaneOperand own = operands.planes[32 * step + lane];
        const u16* of = (const u16*)scales;
        u32 scale[2];
        scale[0] = of[own.channels & 255] | (u32)of[own.channels >> 8 & 255] << 16;
        scale[1] = of[own.channels >> 16 & 255] | (u32)of[own.channels >> 24] << 16;
#pragma unroll
        for (int i = 0; i < 2; i++) b[i] = multiply_halves(own.q[i], scale[i]);
        // Rows of further planes have the steps of the first.
        int rows = keys.zeros / 2 - 16 * step - 4 * t;
#else
        uint2 q = operands.q[32 * step + lane];
        uint2 scale = *(const uint2*)(scales + 32 * step + 8 * t), zero_pairs = *(const uint2*)(zeros + 32 * step + 8 * t);
        b[0] = multiply_halves(q.x, scale.x);
        b[1] = multiply_halves(q.y, scale.y);
        u32 zero_codes[4] = {zero_pairs.x, 0, zero_pairs.y, 0};
        u32 zero_queries[2] = {INTEGER_KEYS ? b[0] : q.x, INTEGER_KEYS ? b[1] : q.y};
        mma_half(zero, zero_codes, zero_queries);
        constexpr int rows = 16;
#endif
        if (BIAS) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (2 * i < rows) sum_bias += rounding_bias(0.5f * range.natural * low_half(b[i]));
                if (2 * i + 1 < rows) sum_bias += rounding_bias(0.5f * range.natural * high_half(b[i]));
            }
        }
#pragma unroll
        for (int field = 0; field < 4; field++) {
            u32 even[4], odd[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                even[i] = field_of(codes[i], field);
                odd[i] = field_of(codes[i] >> 8, field);
            }
            mma_half(s[2 * field], even, b);
            mma_half(s[2 * field + 1], odd, b);
        }
    }
#if KEY_PLANES
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 zero_codes[4] = {pair_at(zeros + 32 * step + 8 * t), 0, pair_at(zeros + 32 * step + 8 * t + 4), 0};
        uint2 q = operands.q[32 * step + lane];
        u32 zero_queries[2] = {q.x, q.y};
        mma_half(zero, zero_codes, zero_queries);
    }
#endif
    if (BIAS) {
        sum_bias += __shfl_xor_sync(ALL_LANES, sum_bias, 1);
        sum_bias += __shfl_xor_sync(ALL_LANES, sum_bias, 2);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        offset[i] = (INTEGER_KEYS ? -zero[i] : zero[i]) * factor[i];
        if (BIAS) offset[i] -= LOG2_E * __shfl_sync(ALL_LANES, sum_bias, 8 * t + 4 * i);
    }
}
