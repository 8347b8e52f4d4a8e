// Attention by tiles: numbers that all parts share, and where the bytes of a tile lie in shared memory.

#define LOG2_E 1.44269504088896340736f
#define LN_2 0.69314718055994530942f
/// The logit of what is not seen: minus infinity.
#define NO_LOGIT __uint_as_float(0xff800000u)

#ifndef PAGE_SINKS
#define PAGE_SINKS 0
#endif
#ifndef SPAN
#define SPAN 0
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif

constexpr int INT_END = 0x7fffffff;
constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
/// Steps of 16 channels. The last one may have 8 that are no channels: they are zeros in queries and keys, and what
/// they are in values is not looked at.
constexpr int STEPS = (HEAD_DIM + 15) / 16;
/// Accumulators of 8 channels.
constexpr int OUTPUTS = 2 * STEPS;
/// Parts of a row of 16 bytes, those of a tile, and how many of them rows of a tile lie apart. An odd distance, or a
/// permutation, keeps the same part of eight rows in different banks.
constexpr int PARTS = HEAD_DIM / 8;
constexpr int TILE_PARTS = 2 * STEPS;
constexpr int ROW_PARTS = TILE_PARTS % 8 == 0 ? TILE_PARTS : TILE_PARTS + 1;

/// Queries of a tile of a span of few.
constexpr int FEW_QUERIES = 16;

/// Whether the history of a span is cut into splits.
constexpr __device__ __forceinline__ bool few_queries(int rows, int shared) {
    return rows == 1 || rows * shared <= FEW_QUERIES;
}

/// Tokens of a split of a span of few queries. The span alone decides, so that its batch changes nothing.
constexpr __device__ __forceinline__ int split_tokens_of(int cached) {
    return 2 * PAGE_TOKENS * (cached > 8192 ? (cached + 8191) / 8192 : 1);
}

constexpr __device__ __forceinline__ int splits_of(int cached) {
    int tokens = split_tokens_of(cached);
    return cached > tokens ? (cached + tokens - 1) / tokens : 1;
}

/// Where 16 bytes of a tile lie: of a row of channels, or of a row of the tokens of a tile.
__device__ __forceinline__ int row_place(int token, int part) {
    if constexpr (TILE_PARTS % 8 == 0) part ^= token & 7;
    return (token * ROW_PARTS + part) * 16;
}
template <int TOKENS>
__device__ __forceinline__ int column_place(int channel, int part) {
    part ^= TOKENS == 64 ? channel & 7 : channel >> 1 & 3;
    return (channel * (TOKENS / 8) + part) * 16;
}

/// Bytes of the keys, or values, of a tile.
template <int TOKENS>
constexpr int TILE_BYTES = TOKENS * ROW_PARTS * 16;

__device__ __forceinline__ float clamp_half(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }

/// Eight numbers as fp16.
__device__ __forceinline__ uint4 halve(const float* from) {
    float4 low = *(const float4*)from, high = *(const float4*)(from + 4);
    uint4 y;
    y.x = pack_half(clamp_half(low.x), clamp_half(low.y));
    y.y = pack_half(clamp_half(low.z), clamp_half(low.w));
    y.z = pack_half(clamp_half(high.x), clamp_half(high.y));
    y.w = pack_half(clamp_half(high.z), clamp_half(high.w));
    return y;
}
