// Shared memory of a block, and copies of pages to it behind the program's back.

/// Where the 16 bytes of this number lie among codes in shared memory: in another order within 128 bytes, so that the rows
/// that a matrix of operands takes lie in different banks. Copies still fill whole lines.
__device__ __forceinline__ int key_place(int piece) { return 16 * (piece ^ ((piece >> 3 & 1) | (piece >> 2 & 4))); }
__device__ __forceinline__ int value_place(int piece) { return 16 * (piece ^ (piece >> 3 & 3)); }

/// Begins to copy the keys of a page: codes, swizzled, and parameters behind the last multiple of 16 rows.
__device__ __forceinline__ void copy_keys(u8* slot, const u8* page, const Place& keys) {
    int lane = threadIdx.x % 32;
    const u8* source = page + keys.codes + 16 * lane;
    u8* to = slot + key_place(lane);
    // 16 rows at a time.
#pragma unroll
    for (int i = 0; i < (KEY_PLANES ? keys.rows / 16 : STEPS); i++) copy_16(to + 512 * i, source + 512 * i);
    if (KEY_PLANES && lane < keys.rows % 16 * 2) copy_16(to + keys.rows / 16 * 512, source + keys.rows / 16 * 512);
    int parameters = multiple(keys.zeros + 2 * HEAD_DIM, 16) / 16;
    to = slot + 32 * multiple(keys.rows, 16) + 16 * lane;
    source += 32 * keys.rows;
#pragma unroll
    for (int i = lane; i < (KEY_PLANES ? parameters : HEAD_DIM / 4); i += 32, to += 512, source += 512) copy_16(to, source);
}

/// Place of a token among 128 such that 8 tokens of a matrix of operands follow each other.
__device__ __forceinline__ int token_at(int place) { return (place & ~15) | (place & 7) << 1 | (place >> 3 & 1); }

/// Begins to copy the values of a page: codes, swizzled, and parameters, or, where rows are of any length, the bytes as they
/// are.
__device__ __forceinline__ void copy_values(u8* slot, const u8* page, const Place& values) {
    int lane = threadIdx.x % 32;
    const u8* source = page + values.codes + 16 * lane;
    if (VALUE_COLUMNS > 0) {
        int count = multiple(values.scales + values.zeros + 2 * HEAD_DIM, 16) / 16;
        for (int i = 0; 32 * i + lane < count; i++) copy_16(slot + 16 * lane + 512 * i, source + 512 * i);
        return;
    }
#pragma unroll
    for (int i = 0; i < VALUE_CODES / 512; i++) copy_16(slot + value_place(lane) + 512 * i, source + 512 * i);
    copy_16(slot + VALUE_CODES + 16 * lane, source + VALUE_CODES);
}

/// What a block has of shared memory: for each warp its slots and a column of values, then what all warps share.
struct Memory {
    u8* all;
    int warp_bytes, slot_bytes;

    __device__ __forceinline__ u8* of_warp(int warp) const { return all + warp * warp_bytes; }
};

/// How many channels have no plane.
__device__ __forceinline__ int bare_channels(const Side& side) { return side.planes ? HEAD_DIM - side.with[0] : 0; }

__device__ __forceinline__ Memory divide(u8* memory, const Page& page) {
    int slot = max(key_bytes(page.keys), value_bytes(page.values));
    int bytes = SLOTS * slot + (VALUE_COLUMNS > 0 ? COLUMN_BYTES + 4 * QUERIES * bare_channels(page.values) : 0);
    return {memory, bytes, slot};
}
