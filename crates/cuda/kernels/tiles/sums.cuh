// What a warp has summed, and its queries as operands of the tensor cores.

/// Sums of the 16 BLOCKS queries of a warp. A thread has those numbered lane / 4 and lane / 4 + 8 of each block, as
/// [block][which].
template <int BLOCKS>
struct Sums {
    /// A product of a query, as it lies in fragments, with a key times this is a logit in base 2.
    float unit[BLOCKS][2];
    /// Largest product so far.
    float largest[BLOCKS][2];
    /// This thread's part of the sum of weights.
    float normaliser[BLOCKS][2];
    float outputs[BLOCKS][OUTPUTS][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
            largest[block][0] = largest[block][1] = NO_LOGIT;
            normaliser[block][0] = normaliser[block][1] = 0.0f;
#pragma unroll
            for (int i = 0; i < OUTPUTS; i++)
                for (int j = 0; j < 4; j++) outputs[block][i][j] = 0.0f;
        }
    }

    __device__ __forceinline__ float origin(int block, int which) const {
        float top = largest[block][which];
        return top == NO_LOGIT ? 0.0f : top * unit[block][which];
    }

    /// The sum of weights, in all threads of a query.
    __device__ __forceinline__ float total(int block, int which) const {
        float sum = normaliser[block][which];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
    }
};

/// Loads the queries of a warp from number `first` of the task on: put(block, step, register, two numbers) gets them as
/// fragments.
template <int BLOCKS, class Put>
__device__ __forceinline__ void load_queries(const Attention& a, const Task& task, int first, Sums<BLOCKS>& sums,
                                             Put put) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
        for (int which = 0; which < 2; which++) {
            int query = first + 16 * block + 8 * which + lane / 4;
            bool there = query < task.queries;
            const float* from = query_numbers(a, task, there ? query : 0) + lane % 4 * 2;
            float largest = 0.0f;
            for (int part = 0; part < PARTS; part++) {
                float2 x = *(const float2*)(from + 8 * part);
                largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
            }
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            // The exponent; zeros take that of a small number.
            int exponent = min(max((int)(__float_as_uint(largest) >> 23), 27), 227);
            float inverse = there ? __uint_as_float((u32)(254 - exponent) << 23) : 0.0f;
            sums.unit[block][which] = __uint_as_float((u32)exponent << 23) * (LOG2_E * rsqrtf((float)HEAD_DIM));
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                float2 x = *(const float2*)(from + 8 * part);
                put(block, part / 2, which + part % 2 * 2, pack_half(x.x * inverse, x.y * inverse));
            }
            if constexpr (PARTS < TILE_PARTS) put(block, STEPS - 1, which + 2, 0u);
        }
}
