// The keys, or values, of a page: where codes and parameters lie, and which channels have planes.

/// What is read of a side for each page.
struct Place {
    int codes, rows, row_bytes;
    /// From the codes to the parameters, and from the scales to the zeros.
    int scales, zeros;
};

__device__ __forceinline__ Place place_of(const Side& side) {
    Place place = {side.codes, HEAD_DIM, 0, 0, 2 * HEAD_DIM};
    if (side.tokens_are_lanes ? KEY_PLANES : VALUE_COLUMNS > 0) {
        place.rows = side.rows;
        place.row_bytes = side.row_bytes;
        place.scales = side.scales - side.codes;
        place.zeros = side.zeros - side.scales;
    }
    return place;
}

/// Where the planes of a side end among all of its rows or lanes.
struct Planes {
    int ends[4];

    /// Plane of a row or a lane, and its channel in the order of storage; -1 where there is none.
    __device__ __forceinline__ int channel_of(int number, int& plane) const {
        plane = (number >= ends[0]) + (number >= ends[1]) + (number >= ends[2]);
        int start = plane == 0 ? 0 : plane == 1 ? ends[0] : plane == 2 ? ends[1] : ends[2];
        return number < ends[3] ? number - start : -1;
    }
};

__device__ __forceinline__ Planes planes_of(const Side& side) {
    int all = side.tokens_are_lanes ? side.rows : side.lanes;
    if (side.planes == 0) return {{all, all, all, all}};
    int second = side.with[0] + side.with[1], third = second + side.with[2];
    return {{side.with[0], second, third, third + side.with[3]}};
}

/// Bytes that a side takes in shared memory. Rows of keys are filled up to a multiple of 16; rows of values with scales of
/// channels may be read a little beyond their end.
__device__ __forceinline__ int key_bytes(const Side& side) {
    return multiple(side.rows, 16) * 32 + multiple(side.zeros - side.scales + 2 * HEAD_DIM, 16);
}
__device__ __forceinline__ int value_bytes(const Side& side) {
    if (VALUE_COLUMNS == 0) return VALUE_CODES + TOKEN_PARAMETERS;
    return multiple(side.zeros - side.codes + 2 * HEAD_DIM, 16) + 32;
}
