// Attention of few queries on two-bit codes as they lie in pages: the kernel. Its parts lie in packed/.
//
// A warp takes a page at a time. Codes become operands of the tensor cores by a mask alone: the bits of a two-bit field
// in a 16-bit number are a subnormal fp16 number, the code times a power of four times 2^-24. Scales of channels are
// folded into the query, those of tokens into the weights; what fields are worth is set right in f32. Tokens in 16 bit
// (window, protected tokens, the pass in flight) are taken 16 at a time by blocks of their own.
//
// HEAD_DIM is 64 or 128. BIAS is 1 where the bias of rounding is taken from logits, INTEGER_KEYS and INTEGER_VALUES where
// code 0 stands for the scale times minus the zero, LATE_VALUES where values leave the window later than keys.
// KEY_PLANES is 1 where packed keys have planes, and then INTEGER_KEYS is 0. VALUE_COLUMNS is 0 where the parameters of
// values belong to tokens; where they belong to channels, a row of packed values has no more than 16 VALUE_COLUMNS bytes.
// PAGE_SINKS is 1 where pages protect tokens, SPAN where queries do not see all before them, SOFTCAP where logits are capped.

/// One split of one KV head's history for 8 queries. Grid: (KV heads * tiles of 8 queries, spans, splits). Splits of pages come
/// first, those of tokens in 16 bit are short and fill what is left.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attend_packed(Attention a) {
    DYNAMIC_SHARED(shared);
    const Span span = a.spans[blockIdx.y];
    int tiles = gridDim.x / a.cache.kv_heads, split = blockIdx.z;
    Tile tile;
    tile.a = &a;
    tile.span = &span;
    tile.kv_head = blockIdx.x / tiles;
    tile.first_row = max(span.first_row, a.first_row);
    tile.rows = min(span.first_row + span.rows, a.first_row + a.row_count) - tile.first_row;
    tile.shared = a.heads / a.cache.kv_heads;
    tile.first = blockIdx.x % tiles * QUERIES;
    if (!tile.has(0)) return;
    int pages = (span.packed_keys + PAGE_TOKENS - 1) / PAGE_TOKENS;
    int first_page = SPAN ? min(pages, a.first_page_seen(span, tile.row(0)) / PAGE_TOKENS) : 0;
    int size = split_pages(pages - first_page);
    int most = multiple(a.cache.sink_capacity + span.cached - span.packed_keys, 16) + (a.incoming ? span.rows : 0);
    int page_splits = (pages - first_page + size - 1) / size, plain = split - page_splits;
    if (plain * PLAIN_TOKENS >= most) {
        if (threadIdx.x < QUERIES && tile.has(threadIdx.x)) {
            float* partial = partial_of(tile, threadIdx.x, split);
            partial[0] = -infinity();
            partial[1] = 0.0f;
        }
        return;
    }
    const Page& page = a.cache.pages[tile.kv_head];
    Memory memory = divide(shared, page);
    Sums sums;
    clear(sums);
    if (plain >= 0)
        add_plain(sums, tile, memory, plain * PLAIN_TOKENS);
    else
        add_pages(sums, tile, page, memory, first_page + split * size, min(first_page + split * size + size, pages));
    join_warps(sums, tile, page, memory, split);
}
EXPORT(attend_packed)
