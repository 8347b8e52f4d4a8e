// Everything that queries see, brought to shared memory as tiles of tokens.

/// How the pages of a KV head are laid out, in shared memory.
struct Pages {
    Page page;
    bool value_words;

    /// By all threads of a block, before a barrier.
    __device__ __forceinline__ void load(const Cache& cache, int kv_head) {
        const int* from = (const int*)&cache.pages[kv_head];
        for (int i = threadIdx.x; i < (int)(sizeof(Page) / 4); i += THREADS) ((int*)&page)[i] = from[i];
        const Side& values = cache.pages[kv_head].values;
        if (threadIdx.x == 0) value_words = values.half_rows < 0 && lies_in_words(values);
    }
};

/// Parts of a tile that a thread copies, and whether there are fewer for some.
template <int TOKENS>
constexpr int OWN_PARTS = (TOKENS * TILE_PARTS + THREADS - 1) / THREADS;
template <int TOKENS>
constexpr bool UNEVEN = TOKENS * TILE_PARTS % THREADS != 0;

/// Copies rows of a tile behind the program's back; source(row) says from where, null for a row of zeros.
template <int TOKENS, class Source>
__device__ __forceinline__ void copy_rows(u8* tile, int first, Source source) {
#pragma unroll 4
    for (int i = 0; i < OWN_PARTS<TOKENS>; i++) {
        int row = (i * THREADS + threadIdx.x) / TILE_PARTS, part = (i * THREADS + threadIdx.x) % TILE_PARTS;
        if (row < first || (UNEVEN<TOKENS> && row >= TOKENS)) continue;
        const u16* from = source(row);
        u8* to = tile + row_place(row, part);
        if (from != nullptr && (PARTS == TILE_PARTS || part < PARTS))
            copy_16(to, from + part * 8);
        else
            *(uint4*)to = make_uint4(0, 0, 0, 0);
    }
}

/// The same from f32.
template <int TOKENS>
__device__ __forceinline__ void convert_rows(u8* tile, const float* from, int count) {
#pragma unroll 2
    for (int i = 0; i < OWN_PARTS<TOKENS>; i++) {
        int row = (i * THREADS + threadIdx.x) / TILE_PARTS, part = (i * THREADS + threadIdx.x) % TILE_PARTS;
        if (UNEVEN<TOKENS> && row >= TOKENS) continue;
        uint4 y = make_uint4(0, 0, 0, 0);
        if (row < count && (PARTS == TILE_PARTS || part < PARTS)) y = halve(from + (i64)row * HEAD_DIM + part * 8);
        *(uint4*)(tile + row_place(row, part)) = y;
    }
}

/// Tokens that a tile has, and how.
struct Tile {
    /// First token: of the cache, or of the span's rows of the pass in flight.
    int first;
    /// How many of them there are; there may be more of the cache than a tile holds.
    int count;
    bool incoming;
    /// Whether keys lie as columns.
    bool columns;
};

/// The history of a task, as tiles.
template <bool PACKED, int TOKENS>
struct History {
    const Cache& cache;
    const int* blocks;
#if SPAN
    /// Pages are used in turn.
    int block_count;
#endif
    const Pages& pages;
    const Page& layout;
    const u16* halves;
    int slot, kv_head, first_row;
    int packed_keys, packed_values;
    /// Cached tokens that are looked at, and rows of the pass in flight.
    int begin, end, incoming;
    /// First and last protected token.
    int first_sink, last_sink;

    __device__ __forceinline__ History(const Attention& a, const Task& task, const Pages& pages, const u16* halves)
        : cache(a.cache), blocks(a.tables + task.span.blocks), pages(pages), layout(pages.page), halves(halves),
          slot(task.span.slot), kv_head(task.kv_head), first_row(task.span.first_row),
          packed_keys(task.span.packed_keys), packed_values(task.span.packed_values), begin(0), end(task.span.cached),
          incoming(0), first_sink(INT_END), last_sink(-1) {
#if SPAN
        block_count = task.span.block_count;
#endif
        if constexpr (PACKED) {
            int count = cache.sink_capacity > 0 ? cache.sink_counts[slot] : 0;
            for (int i = 0; i < count; i++) {
                int position = cache.sink_positions[slot * cache.sink_capacity + i];
                first_sink = min(first_sink, position);
                last_sink = max(last_sink, position);
            }
        }
    }

    __device__ __forceinline__ int cached_tiles() const { return (end - begin + TOKENS - 1) / TOKENS; }
    __device__ __forceinline__ int tiles() const { return cached_tiles() + (incoming + TOKENS - 1) / TOKENS; }

    __device__ __forceinline__ Tile tile(int index) const {
        Tile tile;
        int cached = cached_tiles();
        tile.incoming = index >= cached;
        tile.first = tile.incoming ? (index - cached) * TOKENS : begin + index * TOKENS;
        tile.count = (tile.incoming ? incoming : end) - tile.first;
        tile.columns = PACKED && !tile.incoming && tile.first < packed_keys && layout.keys.half_rows < 0;
        return tile;
    }

    __device__ __forceinline__ const u8* page_of(int token) const {
#if SPAN
        int page = token / PAGE_TOKENS % block_count;
#else
        int page = token / PAGE_TOKENS;
#endif
        return cache.pool + blocks[page] * cache.block_bytes + cache.layer_offset + layout.offset;
    }
    __device__ __forceinline__ const u16* ring_row(const u16* ring, int slots, int token) const {
        i64 head = (i64)slot * cache.kv_heads + kv_head;
        return ring + (head * slots + (u32)token % (u32)slots) * HEAD_DIM;
    }

    /// Whether keys or values of a tile are packed.
    __device__ __forceinline__ bool expands(const Tile& tile) const {
        bool values = tile.first < packed_values && layout.values.half_rows < 0;
        return PACKED && !tile.incoming && (tile.columns || values);
    }

    /// The bytes of a page from which tiles are expanded.
    __device__ __forceinline__ int first_byte() const { return layout.keys.half_rows < 0 ? 0 : layout.values.codes; }
    __device__ __forceinline__ int end_byte() const {
        return layout.values.half_rows < 0 ? layout.bytes : layout.values.half_rows;
    }

    /// Copies the packed bytes of a tile's page behind the program's back.
    __device__ __forceinline__ void fetch(const Tile& tile, u8* bytes) const {
        const u8* from = page_of(tile.first) + first_byte();
        for (int i = threadIdx.x * 16; i < end_byte() - first_byte(); i += THREADS * 16) copy_16(bytes + i, from + i);
    }

    /// Expands a tile whose page lies in shared memory. What is not packed of it is copied behind the program's back.
    __device__ __forceinline__ void expand_tile(const Tile& tile, const u8* bytes, u8* keys, u8* values) const {
        const u8* page = bytes - first_byte();
        int slot = tile.first % PAGE_TOKENS;
        if (tile.columns) {
            const int* order = cache.key_order == nullptr ? nullptr : cache.key_order + kv_head * HEAD_DIM;
            expand<true, TOKENS>(layout.keys, true, page, 0, HEAD_DIM, slot, keys, [&](int row, int token) {
                int channel = order == nullptr ? row : order[row];
                return column_place<TOKENS>(channel, token / 8) + token % 8 * 2;
            });
            if constexpr (PARTS < TILE_PARTS)
                for (int i = threadIdx.x; i < TOKENS; i += THREADS)
                    *(uint4*)(keys + column_place<TOKENS>(HEAD_DIM + i % 8, i / 8)) = make_uint4(0, 0, 0, 0);
        } else {
            copy_keys(tile, keys);
        }
        int expanded = 0;
        if (layout.values.half_rows < 0) expanded = max(0, min(TOKENS, min(packed_values - tile.first, tile.count)));
        if (expanded > 0)
            expand<false, HEAD_DIM>(layout.values, pages.value_words, page, slot, slot + expanded, 0, values,
                                    [&](int row, int channel) {
                                        return row_place(row - slot, channel / 8) + channel % 8 * 2;
                                    });
        if (expanded < TOKENS) copy_values(tile, values, expanded);
    }

    /// Brings a tile without packed sides to shared memory, behind the program's back as far as it is fp16.
    __device__ __forceinline__ void load(const Tile& tile, u8* keys, u8* values) const {
        if (!tile.incoming) {
            copy_keys(tile, keys);
            copy_values(tile, values, 0);
            return;
        }
        i64 head = (i64)cache.incoming_rows * HEAD_DIM;
        i64 start = kv_head * head + (i64)(first_row + tile.first) * HEAD_DIM;
        if (halves == nullptr) {
            convert_rows<TOKENS>(keys, cache.incoming_keys + start, tile.count);
            convert_rows<TOKENS>(values, cache.incoming_values + start, tile.count);
            return;
        }
        for (int side = 0; side < 2; side++) {
            const u16* from = halves + start + side * cache.kv_heads * head;
            copy_rows<TOKENS>(side == 0 ? keys : values, 0,
                              [&](int row) { return row < tile.count ? from + row * HEAD_DIM : nullptr; });
        }
    }

    __device__ __forceinline__ void copy_keys(const Tile& tile, u8* keys) const {
        bool in_page = tile.first < packed_keys;
        const u16* rows = in_page ? half_rows(tile, layout.keys.half_rows) : nullptr;
        copy_rows<TOKENS>(keys, 0, [&](int row) -> const u16* {
            if (row >= tile.count) return nullptr;
            return in_page ? rows + row * HEAD_DIM : ring_row(cache.key_ring, cache.key_slots, tile.first + row);
        });
    }

    /// Copies the values from one of the tile's tokens on.
    __device__ __forceinline__ void copy_values(const Tile& tile, u8* values, int first) const {
        bool in_page = tile.first + first < packed_values;
        const u16* rows = in_page ? half_rows(tile, layout.values.half_rows) : nullptr;
        copy_rows<TOKENS>(values, first, [&](int row) -> const u16* {
            if (row >= tile.count) return nullptr;
            if (tile.first + row < packed_values) return rows + row * HEAD_DIM;
            return ring_row(cache.value_ring, cache.value_slots, tile.first + row);
        });
    }

    __device__ __forceinline__ const u16* half_rows(const Tile& tile, int offset) const {
        return (const u16*)(page_of(tile.first) + offset) + tile.first % PAGE_TOKENS * HEAD_DIM;
    }

    /// Goes through all tiles: attend(tile, keys, values, kept) for each, once it lies in shared memory. While a tile
    /// is attended to, the next one comes, or the page that it is expanded from.
    template <class Attend>
    __device__ __forceinline__ void walk(u8* memory, Attend attend) const {
        constexpr int BYTES = TILE_BYTES<TOKENS>;
        u8 *first = memory, *second = memory + 2 * BYTES;
        u8* next_place = first;
        int count = tiles();
        for (int index = -1; index < count; index++) {
            u8* place = next_place;
            Tile own = tile(max(index, 0));
            copy_wait<0>();
            __syncthreads();
            u64 kept = 0;
            bool expanded = PACKED && index >= 0 && expands(own);
            if (expanded) {
                place = first;
                expand_tile(own, second, place, place + BYTES);
                copy_commit();
                copy_wait<0>();
                __syncthreads();
#if PAGE_SINKS
                protect_in_page(own, second, place, place + BYTES, kept);
                __syncthreads();
#endif
            }
            if (index + 1 < count) {
                Tile next = tile(index + 1);
                if (PACKED && expands(next)) {
                    if (next.first % PAGE_TOKENS == 0) fetch(next, second);
                } else {
                    next_place = index >= 0 && place == first ? second : first;
                    load(next, next_place, next_place + BYTES);
                }
            }
            copy_commit();
            if (index < 0) continue;
            if (expanded && protect(own, place, place + BYTES, kept)) __syncthreads();
            attend(own, place, place + BYTES, kept);
        }
    }

    /// Puts protected tokens in the places that they have in pages; `kept` gets those with keys too. Whether there are any.
    __device__ __forceinline__ bool protect(const Tile& tile, u8* keys, u8* values, u64& kept) const {
        if (tile.incoming || tile.first > last_sink || tile.first + TOKENS <= first_sink) return false;
        for (int i = 0; i < cache.sink_counts[slot]; i++) {
            int token = cache.sink_positions[slot * cache.sink_capacity + i] - tile.first;
            if (token < 0 || token >= min(TOKENS, tile.count)) continue;
            i64 row = (((i64)slot * cache.kv_heads + kv_head) * cache.sink_capacity + i) * HEAD_DIM;
            bool in_page = tile.first + token < packed_values && layout.values.half_rows < 0;
            for (int channel = threadIdx.x; channel < HEAD_DIM; channel += THREADS) {
                int place = column_place<TOKENS>(channel, token / 8) + token % 8 * 2;
                if (tile.columns) *(u16*)(keys + place) = cache.sink_keys[row + channel];
                place = row_place(token, channel / 8) + channel % 8 * 2;
                if (in_page) *(u16*)(values + place) = cache.sink_values[row + channel];
            }
            if (tile.columns) kept |= 1ull << token;
        }
        return true;
    }

#if PAGE_SINKS
    /// The same for tokens that the tile's page protects, of which `bytes` were fetched.
    __device__ __forceinline__ void protect_in_page(const Tile& tile, const u8* bytes, u8* keys, u8* values,
                                                    u64& kept) const {
        const PageSinks& sinks = layout.sinks;
        bool half_values = layout.values.half_rows >= 0;
        // They lie behind the values, up to which is fetched where those are fp16.
        const u8* page = half_values ? page_of(tile.first) : bytes - first_byte();
        for (int i = 0; i < sinks.places; i++) {
            int token = stored::page_sink_slot(sinks, page, i) - tile.first % PAGE_TOKENS;
            if (token < 0 || token >= min(TOKENS, tile.count)) continue;
            bool in_page = tile.first + token < packed_values && !half_values;
            for (int channel = threadIdx.x; channel < HEAD_DIM; channel += THREADS) {
                auto number = [&](bool is_key) {
                    return float_to_half(stored::page_sink_number(sinks, page, is_key, i, channel));
                };
                int place = column_place<TOKENS>(channel, token / 8) + token % 8 * 2;
                if (tile.columns) *(u16*)(keys + place) = number(true);
                place = row_place(token, channel / 8) + channel % 8 * 2;
                if (in_page) *(u16*)(values + place) = number(false);
            }
            if (tile.columns) kept |= 1ull << token;
        }
    }
#endif
};
