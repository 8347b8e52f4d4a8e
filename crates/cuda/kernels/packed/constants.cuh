// Attention on two-bit codes: what it is compiled for, and numbers that all parts share. packed.cu says what the macros
// mean.

#ifndef BIAS
#define BIAS 0
#endif
#ifndef INTEGER_KEYS
#define INTEGER_KEYS 0
#endif
#ifndef INTEGER_VALUES
#define INTEGER_VALUES 0
#endif
#ifndef LATE_VALUES
#define LATE_VALUES 0
#endif
#ifndef KEY_PLANES
#define KEY_PLANES 0
#endif
#ifndef VALUE_COLUMNS
#define VALUE_COLUMNS 0
#endif
#ifndef PAGE_SINKS
#define PAGE_SINKS 0
#endif
#ifndef SPAN
#define SPAN 0
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif

constexpr int WARPS = 4;
/// Blocks of a multiprocessor that registers must allow.
constexpr int BLOCKS = VALUE_COLUMNS > 2 ? 2 : 3;
/// Halves of pages, keys or values, that a warp holds: one that is read and others that come.
constexpr int SLOTS = 3;
/// Queries of a tile: columns of the tensor cores' second operand.
constexpr int QUERIES = 8;
/// Steps of 16 channels.
constexpr int STEPS = HEAD_DIM / 16;
/// Columns of 16 bytes in a row of values, where codes of a token are one group.
constexpr int COLUMNS = HEAD_DIM / 64;
/// Bytes of a column of codes of 128 tokens, where columns lie apart.
constexpr int COLUMN_BYTES = 16 * PAGE_TOKENS;
/// Bytes of the codes of values, where parameters belong to tokens.
constexpr int VALUE_CODES = COLUMNS * COLUMN_BYTES;
/// Bytes of the parameters of 128 tokens or HEAD_DIM channels.
constexpr int TOKEN_PARAMETERS = 4 * PAGE_TOKENS;
constexpr int CHANNEL_PARAMETERS = 4 * HEAD_DIM;
/// Tokens in 16 bit of a split.
constexpr int PLAIN_TOKENS = 128;
/// A place among packed values that is no channel's.
constexpr u32 NOWHERE = 0xf00;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
/// Weights are summed times a power of two, so that small ones are numbers of fp16 too.
constexpr float WEIGHT_BITS = 12.0f;
constexpr float WEIGHT_UNIT = 4096.0f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000); }

__device__ __forceinline__ int multiple(int x, int of) { return (x + of - 1) / of * of; }

/// Pages of a split, from the sequence's number of pages alone: up to 4 splits of up to 16 pages, then more splits, and from 44
/// on, which with 8 KV heads are what a GPU takes at once, more pages.
__device__ __forceinline__ int split_pages(int pages) {
    int few = min(multiple((pages + 3) / 4, WARPS), 16), many = multiple((pages + 43) / 44, WARPS);
    return max(max(few, many), WARPS);
}

/// What one unit of the sum of a field's codes is worth.
__device__ __forceinline__ constexpr float field_unit(int field) { return 16777216.0f / (float)(1 << (2 * field)); }

/// The two-bit field of both 16-bit halves, as subnormal numbers.
__device__ __forceinline__ u32 field_of(u32 x, int field) { return x & (0x00030003u << (2 * field)); }

__device__ __forceinline__ float low_half(u32 x) { return half_to_float((u16)x); }
__device__ __forceinline__ float high_half(u32 x) { return half_to_float((u16)(x >> 16)); }

/// The 16-bit number at an address of a multiple of 2 bytes, and the one behind it.
__device__ __forceinline__ u32 pair_at(const u8* address) {
    const u16* halves = (const u16*)address;
    return halves[0] | (u32)halves[1] << 16;
}
