// What lies in a cache, read one number at a time, and rotations of heads. Every kernel file gets it behind layout.cuh.

namespace stored {

/// Bits of a code in the first plane of a packed row (dibit_quant::Bits::planes).
__device__ __forceinline__ int first_width(int bits) { return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits; }

/// Bytes of one plane of a packed row.
__device__ __forceinline__ int plane_bytes(int width, int lanes) { return (lanes * width + 7) / 8; }

/// Bytes of a packed row.
__device__ __forceinline__ int row_bytes(int bits, int lanes) {
    int width = first_width(bits);
    return plane_bytes(width, lanes) + (width < bits ? plane_bytes(bits - width, lanes) : 0);
}

/// Some bits of the code of a lane.
__device__ __forceinline__ int plane_code(int width, const u8* bytes, int lanes, int lane) {
    int stride = plane_bytes(width, lanes);
    return bytes[lane % stride] >> (lane / stride * width) & ((1 << width) - 1);
}

/// A part of a packed row that was packed by itself.
struct Part {
    int first_lane, lanes, first_byte;
};

__device__ __forceinline__ Part part_of(const Side& side, int lane) {
    if (!side.along_lanes) return {0, side.lanes, 0};
    int group = lane / side.group;
    return {group * side.group, min(side.group, side.lanes - group * side.group), group * row_bytes(side.bits, side.group)};
}

/// The code of a row and lane.
__device__ __forceinline__ int code_at(const Side& side, const u8* page, int row, int lane) {
    Part part = part_of(side, lane);
    const u8* bytes = page + side.codes + (i64)row * side.row_bytes + part.first_byte;
    int width = first_width(side.bits);
    lane -= part.first_lane;
    int code = plane_code(width, bytes, part.lanes, lane);
    if (width < side.bits)
        code |= plane_code(side.bits - width, bytes + plane_bytes(width, part.lanes), part.lanes, lane) << width;
    return code;
}

/// Number of the parameters of a code.
__device__ __forceinline__ int parameter(const Side& side, int row, int lane) {
    return side.along_lanes ? lane / side.group * side.rows + row : row / side.group * side.lanes + lane;
}

/// Channels that have codes, or a mean in their place.
__device__ __forceinline__ int coded_channels(const Side& side) {
    return side.planes ? side.channels : side.tokens_are_lanes ? side.rows : side.lanes;
}

__device__ __forceinline__ u16 half_at(const u8* page, int offset, int index) {
    return ((const u16*)(page + offset))[index];
}

/// What code 0 stands for.
__device__ __forceinline__ float offset_of(const Side& side, float scale, float zero) {
    return side.integer_zero ? -scale * zero : zero;
}

/// Number of a channel, in the order of storage, and slot of a packed side, without factors and outliers.
__device__ __forceinline__ float number_at(const Side& side, const u8* page, int channel, int slot) {
    if (side.planes) {
        float zero = half_to_float(half_at(page, side.zeros, channel));
        if (channel >= side.with[0]) return zero;
        int code = 0, start = 0;
        for (int plane = 0; plane < 4; plane++) {
            if (channel >= side.with[plane]) break;
            int at = start + channel;
            code |= (side.tokens_are_lanes ? code_at(side, page, at, slot) : code_at(side, page, slot, at)) << (2 * plane);
            start += side.with[plane];
        }
        return (float)code * half_to_float(half_at(page, side.scales, channel)) + zero;
    }
    int row = side.tokens_are_lanes ? channel : slot, lane = side.tokens_are_lanes ? slot : channel;
    if (channel >= coded_channels(side)) {
        int at = (row - side.high_first_row) * side.high_lanes + lane - side.high_first_lane;
        return half_to_float(half_at(page, side.high_offset, at));
    }
    int own = parameter(side, row, lane);
    float scale = half_to_float(half_at(page, side.scales, own));
    float zero = half_to_float(half_at(page, side.zeros, own));
    return (float)code_at(side, page, row, lane) * scale + offset_of(side, scale, zero);
}

/// Slot of the token of a place; -1 where it has none.
__device__ __forceinline__ int page_sink_slot(const PageSinks& own, const u8* page, int place) {
    const u8 slot = page[own.slots + place];
    return slot == 0xff ? -1 : slot;
}

/// Whether a page protects the token of a slot.
__device__ __forceinline__ bool in_page_sinks(const PageSinks& own, const u8* page, int slot) {
    for (int place = 0; place < own.places; place++)
        if (page_sink_slot(own, page, place) == slot) return true;
    return false;
}

/// A channel of the key, or the value, of a place.
__device__ __forceinline__ float page_sink_number(const PageSinks& own, const u8* page, bool keys, int place, int channel) {
    const u8* row = page + (keys ? own.keys : own.values) + place * own.row_bytes;
    return (float)row[4 + channel] * half_to_float(half_at(row, 0, 0)) + half_to_float(half_at(row, 0, 1));
}

/// x <- x H, or x <- x H^T, for one block of H and its part of rows that begin `stride` numbers apart.
template <bool INVERSE>
__device__ void hadamard_block(const HadamardBlock& own, const float* signs, float* x, int rows, int stride) {
    int order = own.order, inner = order / own.outer, pairs = order / 2;
    for (int half = 1; half < inner; half *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < rows * pairs; i += blockDim.x) {
            int pair = i % pairs;
            float* at = x + i / pairs * stride + pair / half * 2 * half + pair % half;
            float a = at[0], b = at[half];
            at[0] = a + b;
            at[half] = a - b;
        }
    }
    if (own.outer > 1) {
        __syncthreads();
        for (int i = threadIdx.x; i < rows * inner; i += blockDim.x) {
            float* at = x + i / inner * stride + i % inner;
            float column[20];
            for (int k = 0; k < own.outer; k++) column[k] = at[k * inner];
            for (int j = 0; j < own.outer; j++) {
                float sum = -0.0f;
                for (int k = 0; k < own.outer; k++)
                    sum += column[k] * signs[INVERSE ? j * own.outer + k : k * own.outer + j];
                at[j * inner] = sum;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * order; i += blockDim.x) x[i / order * stride + i % order] *= own.norm;
    __syncthreads();
}

/// x <- x H, or x <- x H^T, for rows in shared memory that begin `stride` numbers apart. All threads of the block call it.
template <bool INVERSE>
__device__ void hadamard(const Rotation& own, float* x, int rows, int stride) {
    for (int i = 0; i < own.block_count; i++) {
        const HadamardBlock block = own.blocks[i];
        hadamard_block<INVERSE>(block, own.matrix + block.signs, x, rows, stride);
        x += block.order;
    }
}

/// y <- x T, or x T^-1, by the rotation of a head; where it is none or a Hadamard matrix, in place. Rows are packed one behind
/// the other in shared memory, no more than ROWS of them. Returns where the result lies. All threads of the block call it.
template <int ROWS, bool INVERSE>
__device__ float* rotate(const Rotation& own, int head, float* x, float* y, int rows) {
    __syncthreads();
    if (own.kind == 0) return x;
    if (own.kind == 1) {
        hadamard<INVERSE>(own, x, rows, own.order);
        return x;
    }
    int order = own.order;
    const float* matrix = (INVERSE ? own.back : own.matrix) + (i64)head * order * order;
    for (int j = threadIdx.x; j < order; j += blockDim.x) {
        float sums[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++) sums[row] = 0.0f;
#pragma unroll 16
        for (int i = 0; i < order; i++) {
            float u = matrix[i * order + j];
#pragma unroll
            for (int row = 0; row < ROWS; row++)
                if (row < rows) sums[row] += x[row * order + i] * u;
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++)
            if (row < rows) y[row * order + j] = sums[row];
    }
    __syncthreads();
    return y;
}

/// A key or value of a token that is not packed yet, as fp16.
__device__ __forceinline__ u16 recent(const Cache& cache, const Span& span, int keys, int head, int token, int channel) {
    if (token >= span.cached) {
        i64 row = (i64)head * cache.incoming_rows + span.first_row + token - span.cached;
        return float_to_half((keys ? cache.incoming_keys : cache.incoming_values)[row * cache.head_dim + channel]);
    }
    int slots = keys ? cache.key_slots : cache.value_slots;
    i64 row = ((i64)span.slot * cache.kv_heads + head) * slots + token % slots;
    return (keys ? cache.key_ring : cache.value_ring)[row * cache.head_dim + channel];
}

/// Where a protected token lies.
__device__ __forceinline__ const u16* sink(const Cache& cache, const Span& span, int keys, int head, int slot) {
    i64 row = ((i64)span.slot * cache.kv_heads + head) * cache.sink_capacity + slot;
    return (keys ? cache.sink_keys : cache.sink_values) + row * cache.head_dim;
}

/// Slot of a protected token; -1 where it is none.
__device__ __forceinline__ int sink_slot(const Cache& cache, const Span& span, int token) {
    if (cache.sink_capacity == 0) return -1;
    const int* positions = cache.sink_positions + (i64)span.slot * cache.sink_capacity;
    int count = cache.sink_counts[span.slot];
    for (int slot = 0; slot < count; slot++)
        if (positions[slot] == token) return slot;
    return -1;
}

/// A page.
__device__ __forceinline__ u8* page_at(const Cache& cache, const ClassPages& own, int block, int head) {
    return (u8*)cache.pool + block * cache.block_bytes + own.offset + own.pages[head].offset;
}

/// Position of the i-th token of a run.
__device__ __forceinline__ int position(const int* positions, const Run& run, int i) {
    return run.positions < 0 ? run.first + i : positions[run.positions + run.first + i];
}

}  // namespace stored
