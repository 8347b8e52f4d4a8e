// Packed rows as fp16 numbers.

/// The parameters of a side of a page.
struct Parameters {
    const u16 *scales, *zeros;
    bool integer_zero;

    __device__ __forceinline__ Parameters(const Side& side, const u8* page)
        : scales((const u16*)(page + side.scales)), zeros((const u16*)(page + side.zeros)),
          integer_zero(side.integer_zero) {}

    /// What codes of a group are multiplied by and what is added, twice in a word; without codes it has no scale.
    __device__ __forceinline__ void load(int index, bool coded, u32& scale, u32& offset) const {
        scale = coded ? scales[index] * 0x10001u : 0;
        offset = zeros[index] * 0x10001u;
        if (integer_zero) offset = fma_halves(scale ^ 0x80008000u, offset, 0);
    }
};

/// Writes four fp16 numbers, or the lowest.
template <int WIDTH>
__device__ __forceinline__ void store_halves(u8* to, u32 low, u32 high) {
    if constexpr (WIDTH == 4)
        *(uint2*)to = make_uint2(low, high);
    else
        *(u16*)to = (u16)low;
}

/// Rows of a packed side, a lane or four neighbours of each.
template <class Place>
struct Rows {
    const u8* codes;
    int row_bytes;
    Fields fields;
    Parameters parameters;
    /// Number of row 0's parameters, where rows have their own.
    int index;
    /// A thread has every `step`th row, which goes to to + place(row).
    int step;
    u8* to;
    Place place;
};

/// Expands rows from `first` on, below `end`, whose codes have FIELDS fields. Parameters belong to rows, or are given
/// for lanes.
template <int WIDTH, int FIELDS, bool BY_ROW, class Place>
__device__ __forceinline__ void expand_rows(const Rows<Place>& rows, int first, int end, const u32 (&scales)[2],
                                            const u32 (&offsets)[2]) {
    // Rows that are on their way at once. The last one is repeated where there are no more.
    constexpr int BATCH = 4;
    constexpr u32 ONES = WIDTH == 4 ? 0x01010101u : 1u;
    u32 masks[FIELDS + 1];
    int places[FIELDS + 1] = {};
#pragma unroll
    for (int i = 0; i < FIELDS; i++) {
        masks[i] = ONES * ((1u << rows.fields.width[i]) - 1);
        places[i + 1] = places[i] + rows.fields.width[i];
    }
#pragma unroll 1
    for (; first < end; first += BATCH * rows.step) {
        u32 codes[BATCH] = {}, scale[BATCH], offset[BATCH];
        u8* to[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int row = min(first + b * rows.step, end - 1);
            const u8* from = rows.codes + row * rows.row_bytes;
#pragma unroll
            for (int i = 0; i < FIELDS; i++) {
                u32 word = WIDTH == 4 ? *(const u32*)(from + rows.fields.offset[i]) : from[rows.fields.offset[i]];
                codes[b] += (word >> rows.fields.shift[i] & masks[i]) << places[i];
            }
            if constexpr (BY_ROW) rows.parameters.load(rows.index + row, FIELDS > 0, scale[b], offset[b]);
            to[b] = rows.to + rows.place(row);
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            // A code beside the exponent of 1024 is a number of fp16.
            u32 numbers[2] = {codes[b] | 0x6400u, 0};
            if constexpr (WIDTH == 4) {
                numbers[0] = __byte_perm(codes[b], 0x64646464u, 0x4140);
                numbers[1] = __byte_perm(codes[b], 0x64646464u, 0x4342);
            }
#pragma unroll
            for (int i = 0; i < WIDTH / 4 + 1; i++) {
                u32 code = add_halves(numbers[i], 0xe400e400u);
                numbers[i] = fma_halves(code, BY_ROW ? scale[b] : scales[i], BY_ROW ? offset[b] : offsets[i]);
            }
            store_halves<WIDTH>(to[b], numbers[0], numbers[1]);
        }
    }
}

/// The same, where the number of fields is known later.
template <int WIDTH, bool PLANES, bool BY_ROW, class Place>
__device__ __forceinline__ void expand_rows(const Rows<Place>& rows, int fields, int first, int end,
                                            const u32 (&scales)[2], const u32 (&offsets)[2]) {
    if (fields == 1) return expand_rows<WIDTH, 1, BY_ROW>(rows, first, end, scales, offsets);
    if (fields == 2) return expand_rows<WIDTH, 2, BY_ROW>(rows, first, end, scales, offsets);
    if constexpr (PLANES) {
        if (fields == 0) return expand_rows<WIDTH, 0, BY_ROW>(rows, first, end, scales, offsets);
        if (fields == 3) return expand_rows<WIDTH, 3, BY_ROW>(rows, first, end, scales, offsets);
        expand_rows<WIDTH, 4, BY_ROW>(rows, first, end, scales, offsets);
    }
}

/// Expands LANES lanes of the rows from first_row on, below `end`, WIDTH (4 or 1) at a time, to fp16 at to +
/// place(row, lane). The lane is counted from first_lane.
template <bool KEYS, int WIDTH, int LANES, class Place>
__device__ __forceinline__ void expand_by(const Side& side, const u8* page, int first_row, int end, int first_lane,
                                          u8* to, Place place) {
    constexpr int ITEMS = LANES / WIDTH;
    constexpr int ACROSS = ITEMS < THREADS ? ITEMS : THREADS;
    constexpr int STEP = THREADS / ACROSS;
    if ((int)threadIdx.x >= ACROSS * STEP) return;
    int own = threadIdx.x / ACROSS;
#pragma unroll 1
    for (int item = threadIdx.x % ACROSS; item < ITEMS; item += ACROSS) {
        int lane = first_lane + item * WIDTH;
        auto row_place = [&](int row) { return place(row, item * WIDTH); };
        // Channels in 16 bit are the last rows, or the last lanes.
        int coded = min(end, !side.planes && lane >= side.lanes ? 0 : side.rows);
        if (!side.planes) {
            const u16* high = (const u16*)(page + side.high_offset) + lane - side.high_first_lane;
#pragma unroll 1
            for (int row = max(first_row, coded) + own; row < end; row += STEP) {
                const u16* from = high + (row - side.high_first_row) * side.high_lanes;
                u32 low = from[0], upper = 0;
                if constexpr (WIDTH == 4) {
                    low |= (u32)from[1] << 16;
                    upper = from[2] | (u32)from[3] << 16;
                }
                store_halves<WIDTH>(to + row_place(row), low, upper);
            }
            if (coded == 0) continue;
        }
        Fields fields = side.planes ? channel_fields(side, lane) : bit_fields(side, lane);
        int index = side.along_lanes ? (u32)lane / (u32)side.group * side.rows : 0;
        Rows<decltype(row_place)> rows = {
            page + side.codes, side.row_bytes, fields, Parameters(side, page), index, STEP, to, row_place};
        u32 scales[2] = {}, offsets[2] = {};
        if (KEYS && side.planes) {
            // Rows with most planes come first.
            for (int planes = 4; planes >= 0; planes--) {
                int first = planes == 4 ? 0 : side.with[planes], last = planes == 0 ? end : side.with[planes - 1];
                expand_rows<WIDTH, true, true>(rows, planes, first + own, last, scales, offsets);
            }
        } else if (side.along_lanes) {
            expand_rows<WIDTH, false, true>(rows, fields.count, first_row + own, coded, scales, offsets);
        } else {
            for (int start = first_row; start < coded;) {
                int group = (u32)start / (u32)side.group, last = min(coded, (group + 1) * side.group);
                int number = side.planes ? lane : group * side.lanes + lane;
#pragma unroll
                for (int i = 0; i < WIDTH; i++) {
                    u32 scale, offset;
                    rows.parameters.load(number + i, fields.count > 0, scale, offset);
                    scales[i / 2] = __byte_perm(scales[i / 2], scale, i % 2 == 0 ? 0x5454 : 0x5410);
                    offsets[i / 2] = __byte_perm(offsets[i / 2], offset, i % 2 == 0 ? 0x5454 : 0x5410);
                }
                expand_rows<WIDTH, !KEYS && WIDTH == 1, false>(rows, fields.count, start + own, last, scales, offsets);
                start = last;
            }
        }
    }
}

template <bool KEYS, int LANES, class Place>
__device__ __forceinline__ void expand(const Side& side, bool in_words, const u8* page, int first_row, int end,
                                       int first_lane, u8* to, Place place) {
    if (KEYS || in_words)
        expand_by<KEYS, 4, LANES>(side, page, first_row, end, first_lane, to, place);
    else
        expand_by<KEYS, 1, LANES>(side, page, first_row, end, first_lane, to, place);
}
