// Attention by tiles of tokens on tensor cores: flash attention over packed pages, rings, protected tokens and the pass
// in flight. The kernels; their parts lie in tiles/.
//
// Keys and values of a tile come to shared memory as fp16: fp16 rows are copied behind the program's back, packed ones
// are expanded from a page that was copied so. Packed keys are then columns, [channel][token]; all else are rows,
// [token][channel]. A query is divided by a power of two near its largest number, so that fp16 holds it.
//
// attend_tiles is for spans of many queries: its blocks share tiles among 128 queries (64 for large heads).
// attend_splits is for spans of few queries: its warps share a tile's tokens, its blocks the history.
//
// HEAD_DIM is a multiple of 8 up to 256. PAGE_SINKS is 1 where pages protect tokens, SPAN where queries do not see all before
// them, SOFTCAP where logits are capped.

template <bool PACKED>
__device__ __forceinline__ void attend_many(const Attention& a, const u16* halves, u8* memory, Pages& pages) {
    constexpr int BLOCKS = HEAD_DIM > 128 ? 1 : 2;
    constexpr int TOKENS = HEAD_DIM > 128 ? 32 : 64;
    Task task;
    // The last rows see the most, and begin first.
    if (!find_task(a, false, WARPS * 16 * BLOCKS, gridDim.x - 1 - blockIdx.x, task)) return;
    pages.load(a.cache, task.kv_head);
    __syncthreads();
    History<PACKED, TOKENS> history(a, task, pages, halves);
    if (SPAN) history.begin = a.first_page_seen(task.span, query_row(task, 0));
    if (a.incoming) history.incoming = query_row(task, task.queries - 1) - task.span.first_row + 1;

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * 16 * BLOCKS;
    uint4* own = (uint4*)memory + warp * BLOCKS * STEPS * 32 + lane;
    u8* stages = memory + WARPS * BLOCKS * STEPS * 32 * sizeof(uint4);
    Sums<BLOCKS> sums;
    load_queries<BLOCKS>(a, task, first, sums, [&](int block, int step, int i, u32 two) {
        ((u32*)(own + (block * STEPS + step) * 32))[i] = two;
    });
    sums.clear();
    Biases<BLOCKS> biases;
    history.walk(stages, [&](const Tile& tile, const u8* keys, const u8* values, u64 kept) {
        View<BLOCKS> view;
        if (!look<BLOCKS>(a, task, tile, first, 0, TOKENS, kept, view)) return;
        if (PACKED && view.biased) biases.find(a, task, history, first, tile.first, sums);
        attend<BLOCKS, TOKENS / 8, TOKENS>(sums, view, keys, values, biases.values,
                                           a.softcap, [&](int block, int step, u32 (&q)[4]) {
                                               uint4 x = own[(block * STEPS + step) * 32];
                                               q[0] = x.x, q[1] = x.y, q[2] = x.z, q[3] = x.w;
                                           });
    });
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
        for (int which = 0; which < 2; which++) {
            int query = first + 16 * block + 8 * which + lane / 4;
            float total = sums.total(block, which);
            if (query >= task.queries) continue;
            float* partial = partial_of(a, task, query, 0);
            float logit = sums.largest[block][which] * sums.unit[block][which] * LN_2;
            if (lane % 4 == 0) *(float2*)partial = make_float2(logit, total);
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const float(&x)[4] = sums.outputs[block][i];
                *(float2*)(partial + 2 + 8 * i + lane % 4 * 2) = make_float2(x[2 * which], x[2 * which + 1]);
            }
        }
    empty_splits(a, task, 1, a.splits);
}

template <bool PACKED>
__device__ __forceinline__ void attend_few(const Attention& a, const u16* halves, u8* memory, Pages& pages) {
    constexpr int TOKENS = 64;
    constexpr int OWN_TOKENS = TOKENS / WARPS;
    Task task;
    if (!find_task(a, true, FEW_QUERIES, blockIdx.x, task)) return;
    int split = blockIdx.z, splits = splits_of(task.span.cached);
    if (split >= splits) {
        empty_splits(a, task, split, split + 1);
        return;
    }
    pages.load(a.cache, task.kv_head);
    __syncthreads();
    History<PACKED, TOKENS> history(a, task, pages, halves);
    history.begin = split * split_tokens_of(task.span.cached);
    if (SPAN) history.begin = min(history.end, history.begin + a.first_page_seen(task.span, query_row(task, 0)));
    history.end = min(history.end, history.begin + split_tokens_of(task.span.cached));
    if (a.incoming && split == splits - 1)
        history.incoming = query_row(task, task.queries - 1) - task.span.first_row + 1;

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 q[STEPS][4];
    Sums<1> sums;
    load_queries<1>(a, task, 0, sums, [&](int, int step, int i, u32 two) { q[step][i] = two; });
    sums.clear();
    Biases<1> biases;
    history.walk(memory, [&](const Tile& tile, const u8* keys, const u8* values, u64 kept) {
        View<1> view;
        int token = warp * OWN_TOKENS;
        if (!look<1>(a, task, tile, 0, token, OWN_TOKENS, kept, view)) return;
        if (PACKED && view.biased) biases.find(a, task, history, 0, tile.first + token, sums);
        attend<1, OWN_TOKENS / 8, TOKENS>(sums, view, keys, values, biases.values, a.softcap,
                                          [&](int, int step, u32 (&own)[4]) {
            for (int i = 0; i < 4; i++) own[i] = q[step][i];
        });
    });

    // The warps' sums are joined in the place of the tiles, with logits in base 2.
    constexpr int WIDTH = HEAD_DIM + 2;
    float* joined = (float*)memory;
    __syncthreads();
#pragma unroll
    for (int which = 0; which < 2; which++) {
        float* own = joined + (warp * FEW_QUERIES + 8 * which + lane / 4) * WIDTH;
        float total = sums.total(0, which);
        if (lane % 4 == 0) *(float2*)own = make_float2(sums.largest[0][which] * sums.unit[0][which], total);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            const float(&x)[4] = sums.outputs[0][i];
            *(float2*)(own + 2 + 8 * i + lane % 4 * 2) = make_float2(x[2 * which], x[2 * which + 1]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < task.queries * (WIDTH / 2); i += THREADS) {
        int query = i / (WIDTH / 2), place = i % (WIDTH / 2) * 2;
        const float* own = joined + query * WIDTH;
        float top = own[0];
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, own[w * FEW_QUERIES * WIDTH]);
        float origin = top == NO_LOGIT ? 0.0f : top;
        float2 sum = make_float2(0.0f, 0.0f);
        for (int w = 0; w < WARPS; w++) {
            const float* part = own + w * FEW_QUERIES * WIDTH;
            float weight = exp2_fast(part[0] - origin);
            if (place > 0) sum.x = fmaf(weight, part[place], sum.x);
            sum.y = fmaf(weight, part[place + 1], sum.y);
        }
        if (place == 0) sum.x = top * LN_2;
        *(float2*)(partial_of(a, task, query, split) + place) = sum;
    }
}

/// Grid: for spans of many queries, at least as many blocks as there are tiles of queries; KV heads. `halves` has the
/// rows of the pass in flight as halve_incoming leaves them, or is null.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attend_tiles(const __grid_constant__ Attention a, const u16* halves) {
    DYNAMIC_SHARED(memory);
    __shared__ Pages pages;
    attend_many<false>(a, halves, memory, pages);
}
EXPORT(attend_tiles)

/// The same, where sides of pages may be packed.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attend_packed_tiles(const __grid_constant__ Attention a, const u16* halves) {
    DYNAMIC_SHARED(memory);
    __shared__ Pages pages;
    attend_many<true>(a, halves, memory, pages);
}
EXPORT(attend_packed_tiles)

/// Grid: for spans of few queries, at least as many blocks as there are tiles of queries; KV heads; splits.
extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM > 128 ? 1 : 3)
    attend_splits(const __grid_constant__ Attention a, const u16* halves) {
    DYNAMIC_SHARED(memory);
    __shared__ Pages pages;
    attend_few<false>(a, halves, memory, pages);
}
EXPORT(attend_splits)

/// The same, where sides of pages may be packed.
extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM > 128 ? 1 : 3)
    attend_packed_splits(const __grid_constant__ Attention a, const u16* halves) {
    DYNAMIC_SHARED(memory);
    __shared__ Pages pages;
    attend_few<true>(a, halves, memory, pages);
}
EXPORT(attend_packed_splits)

/// Rounds `rows` keys and values of the pass in flight to fp16, [keys, values][kv head][incoming_rows][head_dim]. Grid:
/// blocks of THREADS threads for rows * head_dim / 8 parts; KV heads.
extern "C" __global__ void halve_incoming(const __grid_constant__ Cache cache, int rows, u16* halves) {
    i64 part = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (part >= (i64)rows * PARTS) return;
    i64 head = (i64)cache.incoming_rows * HEAD_DIM;
    for (int side = 0; side < 2; side++) {
        const float* from = side == 0 ? cache.incoming_keys : cache.incoming_values;
        u16* to = halves + (side * cache.kv_heads + blockIdx.y) * head;
        *(uint4*)(to + part * 8) = halve(from + blockIdx.y * head + part * 8);
    }
}
EXPORT(halve_incoming)
