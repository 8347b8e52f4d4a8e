// Where the codes of packed rows lie.

/// Where the code of a lane, or of four neighbours, lies in a packed row: up to four fields, the lowest bits first.
struct Fields {
    int count;
    int offset[4], shift[4], width[4];
};

__device__ __forceinline__ int plane_count(int bits) { return bits == 3 || bits == 5 || bits == 6 ? 2 : 1; }
__device__ __forceinline__ int plane_width(int bits, int plane) {
    if (bits == 3) return 2 - plane;
    if (bits == 5) return 4 - 3 * plane;
    if (bits == 6) return 4 - 2 * plane;
    return bits;
}
__device__ __forceinline__ int plane_bytes(int width, int lanes) { return (lanes * width + 7) / 8; }
__device__ __forceinline__ int packed_bytes(int bits, int lanes) {
    int bytes = plane_bytes(plane_width(bits, 0), lanes);
    if (plane_count(bits) == 2) bytes += plane_bytes(plane_width(bits, 1), lanes);
    return bytes;
}

/// The fields of one lane among the planes of bits.
__device__ __forceinline__ Fields bit_fields(const Side& side, int lane) {
    int group = side.along_lanes ? (u32)lane / (u32)side.group : 0;
    int step = side.along_lanes ? side.group : side.lanes;
    int own = lane - group * step, length = min(step, side.lanes - group * step);
    int start = group * packed_bytes(side.bits, step);
    Fields fields = {};
    fields.count = plane_count(side.bits);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int width = plane_width(side.bits, i), bytes = plane_bytes(width, length);
        int place = (u32)own / (u32)bytes;
        fields.offset[i] = start + own - place * bytes;
        fields.shift[i] = place * width;
        fields.width[i] = width;
        start += bytes;
        if (fields.count == 1) break;
    }
    return fields;
}

/// The fields of one lane where channels have planes. Planes of keys are rows: a lane has a field for each plane of the
/// row's channel. Planes of values are lanes.
__device__ __forceinline__ Fields channel_fields(const Side& side, int lane) {
    Fields fields = {};
    int start = 0, bytes = plane_bytes(2, side.lanes);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int field = side.tokens_are_lanes ? lane : start + lane;
        int place = (u32)field / (u32)bytes;
        fields.offset[i] = field - place * bytes + (side.tokens_are_lanes ? start * side.row_bytes : 0);
        fields.shift[i] = place * 2;
        fields.width[i] = 2;
        if (!side.tokens_are_lanes && lane < side.with[i]) fields.count = i + 1;
        start += side.with[i];
    }
    return fields;
}

/// Whether four neighbours that begin at a multiple of four lie in one word each time. Keys always do.
__device__ __forceinline__ bool lies_in_words(const Side& side) {
    if (side.planes) return side.tokens_are_lanes;
    int step = side.along_lanes ? side.group : side.lanes;
    int rest = side.lanes % step;
    int odd = side.lanes | side.row_bytes | side.codes | step | rest;
    for (int i = 0; i < plane_count(side.bits); i++) {
        int width = plane_width(side.bits, i);
        odd |= plane_bytes(width, step) | plane_bytes(width, rest);
    }
    return odd % 4 == 0;
}
