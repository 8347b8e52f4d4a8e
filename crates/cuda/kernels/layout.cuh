// What the host tells kernels about a cache. Each struct has a twin in src/abi.rs; all members are 4 bytes wide or
// 8 bytes wide and aligned, so that both compilers lay them out alike.

#define PAGE_TOKENS 128

/// Codes and parameters of one side of a page: dibit_cache::SideLayout. Offsets are bytes from the page's start.
struct Side {
    /// Offset of fp16 rows [token][head_dim]; -1 where the side is packed and the rest has a meaning.
    int half_rows;
    int tokens_are_lanes;
    /// Whether a group is consecutive lanes of a row; if not, consecutive rows of a lane.
    int along_lanes;
    /// 2, 3, 4, 5, 6 or 8.
    int bits;
    int group;
    /// 0: x = s c + z. 1: x = s (c - z).
    int integer_zero;
    float clip;
    int include_zero;
    /// Whether codes span the part of a group's range that misses least.
    int clip_mse;
    int token_hadamard;
    /// Whether channels take up what others miss.
    int feedback;
    int rows;
    int lanes;
    int row_bytes;
    int codes;
    int scales;
    int zeros;
    /// Channels with planes: how many channels have one at least, two, three, four; planes is 0 where there are none.
    int planes;
    int channels;
    int with[4];
    /// Channels in 16 bit; high_rows * high_lanes is 0 where there are none.
    int high_first_row, high_rows, high_first_lane, high_lanes, high_offset;
    /// Low-rank factors; 0 where there are none.
    int rank, factor_page, factor_chunk;
    /// Values kept beside the codes; 0 where there are none.
    int outliers_per_end, outlier_values, outlier_lanes;
};

/// Places of tokens that a page protects: dibit_cache::PageSinks. Offsets are bytes from the page's start.
struct PageSinks {
    /// How many there are; 0 where the page protects no tokens.
    int places;
    /// A token is protected where the norm of its value, in the model's own frame, is below this share of the median of its
    /// page.
    float share;
    /// Offset of the slots, a byte each; of the rows of keys, and of values; and bytes of a row.
    int slots, keys, values, row_bytes;
};

struct Page {
    Side keys;
    Side values;
    PageSinks sinks;
    /// From the layer's first page to this one, and how long it is.
    int offset, bytes;
};

/// The tokens of one sequence in a pass.
struct Span {
    /// The sequence.
    int slot;
    /// Its rows in the batch.
    int first_row, rows;
    /// Tokens cached before this pass, and how many of them have packed keys and values.
    int cached, packed_keys, packed_values;
    /// Where its block table begins among all, and how many blocks it has: where pages are used in turn, page p lies in block
    /// p % block_count.
    int blocks, block_count;
    /// Where its chunks begin: for each block, the index of the first block of its chunk.
    int chunks;
    /// Its classes, as places in the array of ClassSpan; class_count is 0 where the scheme has none.
    int classes, class_count;
};

/// The tokens of one class of a sequence.
struct ClassSpan {
    /// Where the positions of its tokens begin among all, how many they are, and how many of them are packed.
    int tokens, count, packed;
    /// Where its block table begins.
    int blocks;
};

/// One layer of a cache, as attention reads it. Pointers are to device memory.
struct Cache {
    /// Pool of blocks, each of block_bytes; the layer's first page lies at layer_offset in a block of class 0.
    const u8* pool;
    i64 block_bytes;
    i64 layer_offset;
    int kv_heads, head_dim;
    /// Page layouts of the layer, one for each KV head (class 0).
    const Page* pages;
    /// fp16 [slot of the sequence][kv head][ring slot][head_dim]; token t lies in ring slot t % slots.
    const u16* key_ring;
    const u16* value_ring;
    int key_slots, value_slots;
    /// Protected tokens, fp16 [slot of the sequence][kv head][sink][head_dim]; their positions [slot of the
    /// sequence][sink_capacity] in the order of their slots, and how many there are [slot of the sequence].
    const u16* sink_keys;
    const u16* sink_values;
    const int* sink_positions;
    const int* sink_counts;
    int sink_capacity;
    /// Rows of the pass in flight, f32 [kv head][incoming_rows][head_dim].
    const float* incoming_keys;
    const float* incoming_values;
    int incoming_rows;
    /// Channels in the order in which packed keys lie, [kv head][head_dim]; null where that is their own.
    const int* key_order;
    /// Whether the bias of rounding is taken from logits of packed keys.
    int bias;
};

/// Attention of some rows of a batch, one kernel for all spans.
struct Attention {
    Cache cache;
    const Span* spans;
    int span_count;
    /// How many tokens a query sees, itself included.
    int seen;
    /// Block numbers.
    const int* tables;
    /// Queries [row][heads][head_dim] from row first_row of the batch on, in the frame of the stored keys.
    const float* q;
    int heads;
    int first_row, row_count;
    /// Whether the pass in flight is seen. Where it is not, its tokens are stored already.
    int incoming;
    /// The largest number of splits of any span.
    int splits;
    /// Logits x become softcap tanh(x / softcap), where that is not 0.
    float softcap;
    /// [row][head][split][head_dim + 2]: largest logit, normaliser, weighted values in the frame of that logit. Splits that
    /// a row does not have hold -inf, 0 and anything.
    float* partials;

    /// The position of a row of a span.
    __device__ __forceinline__ int position(const Span& span, int row) const {
        return span.cached + row - span.first_row - (incoming ? 0 : span.rows);
    }
    /// The first token that it sees.
    __device__ __forceinline__ int first_seen(const Span& span, int row) const {
        int own = position(span, row);
        return own < seen ? 0 : own + 1 - seen;
    }
    /// The same, as the first token of its page, but no further than what is cached.
    __device__ __forceinline__ int first_page_seen(const Span& span, int row) const {
        int first = first_seen(span, row) / PAGE_TOKENS * PAGE_TOKENS;
        return first < span.cached ? first : span.cached;
    }
};

/// Pages of the tokens of one class in a layer.
struct ClassPages {
    /// One layout for each KV head.
    const Page* pages;
    /// Offset of the layer's first page in a block of the class.
    i64 offset;
};

/// A normalised Hadamard matrix on the diagonal of a rotation.
struct HadamardBlock {
    /// Rows, and rows of the outer factor: 1, 12 or 20.
    int order, outer;
    /// Where the signs [outer][outer] of that factor begin among those of the rotation.
    int signs;
    /// 1 / sqrt(order).
    float norm;
};

/// A rotation of heads, or another basis.
struct Rotation {
    /// 0: none. 1: Hadamard matrices on the diagonal. 2: a basis.
    int kind;
    /// Rows of the matrix.
    int order;
    int block_count;
    int padding;
    const HadamardBlock* blocks;
    /// Signs, or bases [kv head][order][order].
    const float* matrix;
    /// The way back: signs of the transposed matrices, or inverses of bases.
    const float* back;
};

/// Keys that are stored before RoPE.
struct PreRope {
    /// Whether keys are.
    int enabled;
    /// Adjacent heads that are rotated together; the rotation is over all of their channels.
    int heads;
    Rotation rotation;
    /// Rotated channel that lies at a place in storage, both counted in the layer, and the other way round.
    const int* channels;
    const int* places;
    /// Cosines and sines [128][head_dim / 2][2] of the tokens of a page, and [page][head_dim / 2][2] of the first tokens of
    /// pages.
    const float* tokens;
    const float* pages;
};

/// What channels of keys take up of what others miss.
struct Feedback {
    /// Number in storage of each channel, in the order of coding, [kv head][head_dim].
    const int* places;
    /// [kv head][head_dim][head_dim]: row i has what the channels behind the i-th take up of its error.
    const float* factors;
};

/// Tokens that enter one side of one page.
struct Run {
    int span;
    /// 1: keys. 0: values.
    int keys;
    int token_class;
    int block;
    /// Their slots in the page.
    int slot, count;
    /// The first of them: its position, or its number among those of its class.
    int first;
    /// Where the positions of its class begin among all; -1 where there are no classes.
    int positions;
    /// Number of the first of them among all keys of runs.
    int index;
    /// Tokens after which a state in 16 bit is rounded.
    int flush;
};

/// What went wrong in a pass; all bits are set where nothing did.
struct Errors {
    /// Layer (12 bits), side (1: values), row of the batch (19) and value (32) of the first number that fp16 cannot hold.
    u64 not_finite;
    /// Layer (12 bits), KV head (12), side (1), run (19) and group (20) of the first group that cannot be quantised, and
    /// the ends of its range.
    u64 range;
    u64 ends;
};

/// What enters the pages and rings of a layer in a pass.
struct Flush {
    Cache cache;
    int layer;
    int span_count;
    const Span* spans;
    const Run* runs;
    /// Runs of the pass, in device memory: a recorded launch serves passes with fewer.
    const int* run_count;
    /// Positions of tokens of classes.
    const int* positions;
    const ClassPages* classes;
    PreRope pre_rope;
    Feedback feedback;
    /// The way back from stored values to the model's own frame, [kv head][head_dim][head_dim], row-major for row vectors, where
    /// pages protect tokens by their norms there; null where norms are the same.
    const float* value_frame;
    /// Cosines and sines [key][head_dim / 2][2] by which keys of runs are turned back, and the keys themselves, turned and
    /// rotated, [key][kv head][head_dim].
    const float* angles;
    float* turned;
    Errors* errors;
    /// Numbers of each block of `encode`, where shared memory is too small for them, and how many that is; may be null.
    float* spilled;
    i64 spilled_numbers;
};

/// The linear correction of a layer.
struct Correction {
    /// D, and query heads of a KV head.
    int features;
    int shared;
    /// [query head][head_dim][D], [kv head][head_dim][D], and what each query head is multiplied by.
    const float* query_maps;
    const float* key_maps;
    const float* gates;
    /// States of all sequences: bytes from one sequence to the next, from one KV head to the next, and of the layer's first.
    u8* states;
    i64 sequence_bytes;
    i64 head_bytes;
    i64 offset;
    /// Whether numbers are fp16.
    int half;
    int padding;
    /// Place of each KV head's state; -1 where it has none.
    const int* places;
    /// Features of what the codes of keys miss, [key of runs][kv head][D].
    float* missed;
};

/// What attention of any scheme reads besides.
struct Exact {
    const ClassPages* classes;
    const ClassSpan* class_spans;
    const int* positions;
    PreRope pre_rope;
};
