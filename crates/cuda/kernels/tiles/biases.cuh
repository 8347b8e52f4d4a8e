// What rounding adds to logits on average.

/// ln(sinh(a) / a).
__device__ __forceinline__ float rounding_bias(float a) {
    a = fabsf(a);
    float square = a * a;
    if (a < 0.5f) {
        float rest = 1.0f / 2835.0f - square * (1.0f / 37800.0f);
        return square * (1.0f / 6.0f - square * (1.0f / 180.0f - square * rest));
    }
    return a + __logf((1.0f - __expf(-2.0f * a)) / (2.0f * a));
}

/// What rounding adds to products with the keys of a group on average, for the queries of a warp.
template <int BLOCKS>
__device__ __forceinline__ void load_biases(const Attention& a, const Task& task, int first, const Side& side,
                                            const u8* page, int group, const Sums<BLOCKS>& sums,
                                            float (&biases)[BLOCKS][2]) {
    int lane = threadIdx.x % 32;
    const int* order = a.cache.key_order == nullptr ? nullptr : a.cache.key_order + task.kv_head * HEAD_DIM;
    const u16* scales = (const u16*)(page + side.scales) + group * side.rows;
    int rows = side.planes ? side.with[0] : side.rows;
    // A lane's channels, and half the steps of their codes; there is no step where there is no code.
    constexpr int OWN = (HEAD_DIM + 31) / 32;
    float steps[OWN];
    int channels[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int row = lane + 32 * i;
        steps[i] = row < rows ? 0.5f * rsqrtf((float)HEAD_DIM) * half_to_float(scales[row]) : 0.0f;
        channels[i] = row >= rows ? 0 : order == nullptr ? row : order[row];
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll 4
            for (int i = 0; i < 8; i++) {
                int query = min(first + 16 * block + 8 * which + i, task.queries - 1);
                const float* numbers = query_numbers(a, task, query);
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < OWN; j++) sum += rounding_bias(numbers[channels[j]] * steps[j]);
                sum = warp_sum(sum);
                if (lane / 4 == i) biases[block][which] = sum * LOG2_E / sums.unit[block][which];
            }
}

/// Biases of the queries of a warp, and of which group they are.
template <int BLOCKS>
struct Biases {
    float values[BLOCKS][2] = {};
    int first_token = -1;

    /// Sees to it that they are those of the group of a token.
    template <bool PACKED, int TOKENS>
    __device__ __forceinline__ void find(const Attention& a, const Task& task, const History<PACKED, TOKENS>& history,
                                         int first, int token, const Sums<BLOCKS>& sums) {
        const Side& side = history.layout.keys;
        int group = token % PAGE_TOKENS / side.group;
        int group_start = token / PAGE_TOKENS * PAGE_TOKENS + group * side.group;
        if (group_start == first_token) return;
        first_token = group_start;
        load_biases<BLOCKS>(a, task, first, side, history.page_of(token), group, sums, values);
    }
};
