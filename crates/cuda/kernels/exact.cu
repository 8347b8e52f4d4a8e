// Attention over pages of any form, in f32: the history of a query in blocks of up to 128 tokens, joined by an online softmax,
// as crates/cpu/src/{attention,block}.rs do it. HEAD_DIM is the size of a head.

/// Queries of a block: rows times the heads that share a KV head. A warp has four of them.
constexpr int QUERIES = 16;
constexpr int WARPS = QUERIES / 4;
constexpr int THREADS = 32 * WARPS;
/// Tokens that are expanded at a time, and of keys that are stored before RoPE.
constexpr int TOKENS = 32;
constexpr int TURNED_TOKENS = 8;
/// Numbers from one expanded token to the next.
constexpr int STRIDE = HEAD_DIM + 4;
/// Channels of a lane.
constexpr int OWN = (HEAD_DIM + 31) / 32;
constexpr float INFINITE = __builtin_bit_cast(float, 0x7f800000);

/// Tokens of a split, by the length of a history alone; src/attention/exact.rs has the same.
__device__ __forceinline__ int split_tokens(int cached) {
    int tokens = PAGE_TOKENS;
    while (cached > 64 * tokens) tokens *= 2;
    return tokens;
}

/// ln(sinh(a) / a): what rounding adds to a logit on average.
__device__ __forceinline__ float bias_of(float a) {
    a = fabsf(a);
    if (a < 0.5f) {
        const float square = a * a;
        return square * (1.0f / 6.0f - square * (1.0f / 180.0f - square * (1.0f / 2835.0f - square / 37800.0f)));
    }
    return a + logf((1.0f - expf(-2.0f * a)) / (2.0f * a));
}

/// Shared memory of a block.
struct Shared {
    /// Expanded keys or values.
    float tokens[TOKENS * STRIDE];
    float queries[QUERIES * HEAD_DIM];
    /// Logits, and then weights.
    float logits[QUERIES * PAGE_TOKENS];
    /// Weighted values.
    float values[QUERIES * HEAD_DIM];
};

/// Queries of one KV head against some tokens.
struct Attending {
    const Attention& call;
    const Exact& exact;
    const Span& span;
    int head;
    /// Queries, the heads of a row side by side, and how many heads that is.
    int queries, heads;
    int first_row;
    Shared* shared;
    /// Keys of several heads before their rotary embedding.
    float* turned;
    /// Of the four queries of the warp: largest logit, normaliser.
    float top[4], sum[4];

    __device__ int warp() const { return threadIdx.x / 32; }
    __device__ int lane() const { return threadIdx.x % 32; }
    /// Whether the lane has a channel number k.
    __device__ bool exists(int k) const { return lane() + 32 * k < HEAD_DIM; }
    /// Queries of the warp.
    __device__ int own() const { return max(0, min(4, queries - 4 * warp())); }
    __device__ float* logits(int query) const { return shared->logits + (4 * warp() + query) * PAGE_TOKENS; }
    /// A weighted value of the lane.
    __device__ float& value(int query, int k) const {
        return shared->values[(4 * warp() + query) * HEAD_DIM + lane() + 32 * k];
    }
    __device__ const float* query(int query) const { return shared->queries + (4 * warp() + query) * HEAD_DIM; }

    /// Expands `count` tokens of a packed side from `slot` on. All threads call it.
    __device__ void expand(const Side& side, const u8* page, const u8* chunk, int slot, int count, const int* order) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < count * HEAD_DIM; i += THREADS) {
            // Neighbours in a packed row are expanded by neighbours.
            const int token = side.tokens_are_lanes ? i % count : i / HEAD_DIM;
            const int channel = side.tokens_are_lanes ? i / count : i % HEAD_DIM;
            float x = stored::number_at(side, page, channel, slot + token);
#pragma unroll 1
            for (int r = 0; r < side.rank; r++) {
                const float of_token = half_to_float(stored::half_at(page, side.factor_page, (slot + token) * side.rank + r));
                x += of_token * half_to_float(stored::half_at(chunk, side.factor_chunk, channel * side.rank + r));
            }
            shared->tokens[token * STRIDE + (order ? order[channel] : channel)] = x;
        }
        if (side.outliers_per_end == 0) return;
        __syncthreads();
        // Codes of outliers are 0.
        const int kept = 2 * side.outliers_per_end;
        const int first = side.tokens_are_lanes ? 0 : slot, rows = side.tokens_are_lanes ? side.rows : count;
        for (int row = first + threadIdx.x; row < first + rows; row += THREADS) {
            for (int k = row * kept; k < (row + 1) * kept; k++) {
                const int lane = page[side.outlier_lanes + k];
                const int token = (side.tokens_are_lanes ? lane : row) - slot;
                if (token < 0 || token >= count) continue;
                const int number = stored::parameter(side, row, lane);
                const float scale = half_to_float(stored::half_at(page, side.scales, number));
                const float zero = half_to_float(stored::half_at(page, side.zeros, number));
                const float value = half_to_float(stored::half_at(page, side.outlier_values, k));
                shared->tokens[token * STRIDE + (side.tokens_are_lanes ? row : lane)] +=
                    value - stored::offset_of(side, scale, zero);
            }
        }
    }

    /// The same for keys that are stored before RoPE, of block number `index` of the sequence.
    __device__ void expand_turned(const ClassPages& pages, int block, int index, int slot, int count) const {
        const PreRope& own = exact.pre_rope;
        const int width = own.heads * HEAD_DIM, first_head = head / own.heads * own.heads;
        for (int start = 0; start < count; start += TURNED_TOKENS) {
            const int now = min(TURNED_TOKENS, count - start);
            __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < now * width; i += THREADS) {
                const int token = i % now, channel = i / now;
                const int place = own.places[first_head * HEAD_DIM + channel], of = place / HEAD_DIM;
                const u8* page = stored::page_at(call.cache, pages, block, of);
                turned[token * width + channel] =
                    stored::number_at(pages.pages[of].keys, page, place % HEAD_DIM, slot + start + token);
            }
            __syncthreads();
            if (own.rotation.kind == 1) stored::hadamard<true>(own.rotation, turned, now, width);
            constexpr int HALF = HEAD_DIM / 2;
#pragma unroll 1
        for (int i = threadIdx.x; i < now * HALF; i += THREADS) {
                const int token = i / HALF, pair = i % HALF;
                const float* within = own.tokens + ((slot + start + token) * HALF + pair) * 2;
                const float* first = own.pages + ((i64)index * HALF + pair) * 2;
                const float cosine = within[0] * first[0] - within[1] * first[1];
                const float sine = within[1] * first[0] + within[0] * first[1];
                const float* from = turned + token * width + (head - first_head) * HEAD_DIM + pair;
                float* to = shared->tokens + (start + token) * STRIDE + pair;
                to[0] = from[0] * cosine - from[HALF] * sine;
                to[HALF] = from[HALF] * cosine + from[0] * sine;
            }
        }
    }

    /// Widens fp16 rows of a ring that has `slots` of them, or of a page.
    __device__ void widen(const u16* rows, int first, int slots, int count) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < count * HEAD_DIM; i += THREADS) {
            const int token = i / HEAD_DIM, channel = i % HEAD_DIM;
            const i64 row = (first + token) % slots;
            shared->tokens[token * STRIDE + channel] = half_to_float(rows[row * HEAD_DIM + channel]);
        }
    }

    __device__ void copy(const float* rows, int count) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < count * HEAD_DIM; i += THREADS)
            shared->tokens[i / HEAD_DIM * STRIDE + i % HEAD_DIM] = rows[i];
    }

    /// Logits of the expanded tokens, which are those from `first` on of the block.
    __device__ void multiply(int first, int count) {
        __syncthreads();
        if (own() > 0 && lane() < count) {
            const float* key = shared->tokens + lane() * STRIDE;
            float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
            for (int c = 0; c < HEAD_DIM; c += 4) {
                const float4 k = *(const float4*)(key + c);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float4 q = *(const float4*)(query(i) + c);
                    sums[i] = fmaf(q.x, k.x, fmaf(q.y, k.y, fmaf(q.z, k.z, fmaf(q.w, k.w, sums[i]))));
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < own()) logits(i)[first + lane()] = sums[i];
        }
        __syncthreads();
    }

    /// Adds the expanded values by their weights, which are those from `first` on.
    __device__ void mix(int first, int count) {
        __syncthreads();
        if (own() > 0) {
            float sums[4][OWN];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int k = 0; k < OWN; k++) sums[i][k] = exists(k) ? value(i, k) : 0.0f;
#pragma unroll 1
            for (int token = 0; token < count; token++) {
                float weights[4];
#pragma unroll
                for (int i = 0; i < 4; i++) weights[i] = i < own() ? logits(i)[first + token] : 0.0f;
#pragma unroll
                for (int k = 0; k < OWN; k++) {
                    if (!exists(k)) continue;
                    const float number = shared->tokens[token * STRIDE + lane() + 32 * k];
#pragma unroll
                    for (int i = 0; i < 4; i++) sums[i][k] = fmaf(weights[i], number, sums[i][k]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int k = 0; k < OWN; k++)
                    if (exists(k)) value(i, k) = sums[i][k];
        }
        __syncthreads();
    }

    /// Caps `count` logits, and hides those of tokens at positions from `first` on that a query does not see: later ones, and
    /// those that it has left behind.
    __device__ void limit(int first, int count) {
        __syncwarp();
        for (int i = 0; i < own(); i++) {
            const int row = first_row + (4 * warp() + i) / heads;
            const int last = call.position(span, row), begin = call.first_seen(span, row);
            for (int t = lane(); t < count; t += 32) {
                float& x = logits(i)[t];
                if (call.softcap > 0.0f) x = call.softcap * tanhf(x / call.softcap);
                if (first + t > last || first + t < begin) x = -INFINITE;
            }
        }
    }

    /// Turns `count` logits into weights in the frame of the largest logit so far, and moves the sums there.
    __device__ void softmax(int count) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i >= own()) continue;
            float* own_logits = logits(i);
            float most = -INFINITE, total = 0.0f;
            for (int t = lane(); t < count; t += 32) most = fmaxf(most, own_logits[t]);
            most = warp_max(most);
            if (most > top[i]) {
                const float shrink = expf(top[i] - most);
                sum[i] *= shrink;
                for (int k = 0; k < OWN; k++)
                    if (exists(k)) value(i, k) *= shrink;
                top[i] = most;
            }
            for (int t = lane(); t < count; t += 32) {
                const float weight = top[i] == -INFINITE ? 0.0f : expf(own_logits[t] - top[i]);
                own_logits[t] = weight;
                total += weight;
            }
            sum[i] += warp_sum(total);
        }
        __syncwarp();
    }

    /// Rotates the 128 numbers of each query along the tokens of a page.
    __device__ void rotate_tokens() const {
        for (int i = 0; i < own(); i++) {
            float* x = logits(i);
#pragma unroll 1
            for (int half = 1; half < PAGE_TOKENS; half *= 2) {
                __syncwarp();
#pragma unroll 1
                for (int pair = lane(); pair < PAGE_TOKENS / 2; pair += 32) {
                    const int at = pair / half * 2 * half + pair % half;
                    const float a = x[at], b = x[at + half];
                    x[at] = a + b;
                    x[at + half] = a - b;
                }
            }
            __syncwarp();
            for (int t = lane(); t < PAGE_TOKENS; t += 32) x[t] *= rsqrtf((float)PAGE_TOKENS);
        }
        __syncwarp();
    }

    /// Takes the bias of rounding from logits of packed keys.
    __device__ void take_bias(const Side& side, const u8* page, const int* order, int count) const {
        const int rows = side.planes ? side.with[0] : side.rows;
        for (int i = 0; i < own(); i++) {
            for (int start = 0, group = 0; start < count; start += side.group, group++) {
                float bias = 0.0f;
#pragma unroll 1
                for (int c = lane(); c < rows; c += 32) {
                    const int number = side.planes ? c : group * side.rows + c;
                    const float scale = half_to_float(stored::half_at(page, side.scales, number));
                    bias += bias_of(0.5f * query(i)[order ? order[c] : c] * scale);
                }
                bias = warp_sum(bias);
                for (int t = start + lane(); t < min(count, start + side.group); t += 32) logits(i)[t] -= bias;
            }
        }
        __syncwarp();
    }

    /// Number of a protected token among the packed tokens of a class; -1 where it is none of them.
    __device__ int number_of(const ClassSpan* own, int position) const {
        if (!own) return position;
        int low = 0, high = own->count;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (exact.positions[own->tokens + middle] < position) low = middle + 1;
            else high = middle;
        }
        return low < own->count && exact.positions[own->tokens + low] == position ? low : -1;
    }

    /// Calls f(token within the block, slot) for each protected token among `count` from `first` on.
    template <class F>
    __device__ void each_sink(const ClassSpan* own, int first, int count, F f) const {
        const Cache& cache = call.cache;
        if (cache.sink_capacity == 0) return;
        const int* positions = cache.sink_positions + (i64)span.slot * cache.sink_capacity;
        for (int slot = 0; slot < cache.sink_counts[span.slot]; slot++) {
            const int number = number_of(own, positions[slot]);
            if (number >= first && number < first + count) f(number - first, slot);
        }
    }

    /// Protected tokens are seen as they were.
    __device__ void sink_logits(const ClassSpan* own_class, int first, int count) {
        each_sink(own_class, first, count, [&](int token, int slot) {
            const u16* key = stored::sink(call.cache, span, 1, head, slot);
            for (int i = 0; i < own(); i++) {
                float part = 0.0f;
                for (int c = lane(); c < HEAD_DIM; c += 32) part = fmaf(query(i)[c], half_to_float(key[c]), part);
                part = warp_sum(part);
                if (lane() == 0) logits(i)[token] = part;
            }
        });
        __syncwarp();
    }

    /// Calls f(token, place) for each token that a page protects, counted from `slot` on, among `count`.
    template <class F>
    __device__ void each_page_sink(const PageSinks& sinks, const u8* page, int slot, int count, F f) const {
        for (int place = 0; place < sinks.places; place++) {
            const int token = stored::page_sink_slot(sinks, page, place) - slot;
            if (token >= 0 && token < count) f(token, place);
        }
    }

    /// Tokens that their page protects are seen as it keeps them.
    __device__ void page_sink_logits(const PageSinks& sinks, const u8* page, int slot, int count) {
        each_page_sink(sinks, page, slot, count, [&](int token, int place) {
            for (int i = 0; i < own(); i++) {
                float part = 0.0f;
                for (int c = lane(); c < HEAD_DIM; c += 32)
                    part = fmaf(query(i)[c], stored::page_sink_number(sinks, page, true, place, c), part);
                part = warp_sum(part);
                if (lane() == 0) logits(i)[token] = part;
            }
        });
        __syncwarp();
    }

    __device__ void page_sink_values(const PageSinks& sinks, const u8* page, int slot, int count) {
        each_page_sink(sinks, page, slot, count, [&](int token, int place) {
            for (int i = 0; i < own(); i++) {
                const float weight = logits(i)[token];
                __syncwarp();
                if (lane() == 0) logits(i)[token] = 0.0f;
                for (int k = 0; k < OWN; k++) {
                    if (!exists(k)) continue;
                    const float number = stored::page_sink_number(sinks, page, false, place, lane() + 32 * k);
                    value(i, k) = fmaf(weight, number, value(i, k));
                }
            }
        });
        __syncwarp();
    }

    __device__ void sink_values(const ClassSpan* own_class, int first, int count) {
        each_sink(own_class, first, count, [&](int token, int slot) {
            const u16* kept = stored::sink(call.cache, span, 0, head, slot);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i >= own()) continue;
                const float weight = logits(i)[token];
                __syncwarp();
                if (lane() == 0) logits(i)[token] = 0.0f;
                for (int k = 0; k < OWN; k++)
                    if (exists(k)) value(i, k) = fmaf(weight, half_to_float(kept[lane() + 32 * k]), value(i, k));
            }
        });
        __syncwarp();
    }

    /// Adds `count` cached tokens from `first` on: of their class where they are packed, else of the sequence. Without
    /// classes, those up to packed_values have their values in a page.
    __device__ void look(int token_class, int first, int count, bool in_page) {
        const Cache& cache = call.cache;
        const ClassPages pages = exact.classes[token_class];
        const ClassSpan* own_class = span.class_count > 0 ? exact.class_spans + span.classes + token_class : nullptr;
        const int* table = call.tables + (in_page && own_class ? own_class->blocks : span.blocks);
        const int index = first / PAGE_TOKENS, slot = first % PAGE_TOKENS, end = first + count;
        int border = own_class ? (in_page ? end : first) : max(first, min(end, span.packed_values));
        const bool reads_page = in_page || border > first;
        const int place = in_page && own_class ? index : index % span.block_count;
        const int block = reads_page ? table[place] : 0;
        const u8* page = stored::page_at(cache, pages, block, head);
        const u8* chunk = page;
        const bool factors = pages.pages[head].keys.rank > 0 || pages.pages[head].values.rank > 0;
        if (reads_page && factors) chunk = stored::page_at(cache, pages, table[call.tables[span.chunks + index]], head);
        if (in_page) {
            const Side& side = pages.pages[head].keys;
            const int* order = cache.key_order && side.planes ? cache.key_order + head * HEAD_DIM : nullptr;
            for (int start = 0; start < count; start += TOKENS) {
                const int now = min(TOKENS, count - start);
                if (side.half_rows >= 0) {
                    widen((const u16*)(page + side.half_rows), slot + start, PAGE_TOKENS, now);
                } else if (exact.pre_rope.enabled) {
                    expand_turned(pages, block, index, slot + start, now);
                } else {
                    expand(side, page, chunk, slot + start, now, order);
                }
                multiply(start, now);
            }
            if (side.half_rows < 0) {
                if (cache.bias) take_bias(side, page, order, count);
                if (side.token_hadamard) rotate_tokens();
                page_sink_logits(pages.pages[head].sinks, page, slot, count);
            }
            sink_logits(own_class, first, count);
        } else {
            const u16* ring = cache.key_ring + ((i64)span.slot * cache.kv_heads + head) * cache.key_slots * HEAD_DIM;
            for (int start = 0; start < count; start += TOKENS) {
                const int now = min(TOKENS, count - start);
                widen(ring, first + start, cache.key_slots, now);
                multiply(start, now);
            }
        }
        // Numbers of tokens of a class are no positions: all of them are seen, and nothing is capped.
        if (!in_page || !own_class) limit(first, count);
        softmax(count);
        if (border > first) {
            const Side& side = pages.pages[head].values;
            if (side.half_rows < 0) {
                sink_values(own_class, first, border - first);
                page_sink_values(pages.pages[head].sinks, page, slot, border - first);
                if (side.token_hadamard) rotate_tokens();
            }
            for (int start = 0; start < border - first; start += TOKENS) {
                const int now = min(TOKENS, border - first - start);
                if (side.half_rows >= 0) {
                    widen((const u16*)(page + side.half_rows), slot + start, PAGE_TOKENS, now);
                } else {
                    expand(side, page, chunk, slot + start, now, nullptr);
                }
                mix(start, now);
            }
        }
        const u16* ring = cache.value_ring + ((i64)span.slot * cache.kv_heads + head) * cache.value_slots * HEAD_DIM;
        for (int start = border - first; start < count; start += TOKENS) {
            const int now = min(TOKENS, count - start);
            widen(ring, first + start, cache.value_slots, now);
            mix(start, now);
        }
    }

    /// Adds rows of the pass in flight up to each query's own.
    __device__ void look_incoming(int last_row) {
        const Cache& cache = call.cache;
        const i64 head_rows = (i64)head * cache.incoming_rows;
        const int seen = max(0, call.first_seen(span, first_row) - span.cached);
        for (int first = span.first_row + seen; first <= last_row; first += PAGE_TOKENS) {
            const int count = min(PAGE_TOKENS, last_row + 1 - first);
            for (int start = 0; start < count; start += TOKENS) {
                const int now = min(TOKENS, count - start);
                copy(cache.incoming_keys + (head_rows + first + start) * HEAD_DIM, now);
                multiply(start, now);
            }
            limit(span.cached + first - span.first_row, count);
            softmax(count);
            for (int start = 0; start < count; start += TOKENS) {
                const int now = min(TOKENS, count - start);
                copy(cache.incoming_values + (head_rows + first + start) * HEAD_DIM, now);
                mix(start, now);
            }
        }
    }
};

/// Blocks: tiles of query rows, KV heads times parts of their query heads, splits.
extern "C" __global__ void __launch_bounds__(THREADS, 4) attend_exact(Attention call, Exact exact) {
    DYNAMIC_SHARED(bytes);
    const Cache& cache = call.cache;
    const int shared_heads = call.heads / cache.kv_heads;
    const int parts = (shared_heads + QUERIES - 1) / QUERIES;
    const int head = blockIdx.y / parts, first_head = blockIdx.y % parts * QUERIES;
    const int heads = min(QUERIES, shared_heads - first_head), tile_rows = max(1, QUERIES / shared_heads);
    int index = 0, tile = blockIdx.x, first = 0, rows = 0;
    for (; index < call.span_count; index++) {
        const Span& span = call.spans[index];
        const int start = max(span.first_row, call.first_row);
        const int end = min(span.first_row + span.rows, call.first_row + call.row_count);
        const int tiles = max(0, (end - start + tile_rows - 1) / tile_rows);
        first = start + tile * tile_rows;
        rows = min(tile_rows, end - first);
        if (tile < tiles) break;
        tile -= tiles;
    }
    if (index == call.span_count) return;
    Shared* shared = (Shared*)bytes;
    float* turned = (float*)(bytes + sizeof(Shared));
    Attending own = {call, exact, call.spans[index], head, rows * heads, heads, first, shared, turned};
    const float scale = 1.0f / sqrtf((float)HEAD_DIM);
    for (int i = threadIdx.x; i < QUERIES * HEAD_DIM; i += THREADS) {
        const int query = i / HEAD_DIM;
        const i64 row = first - call.first_row + query / heads;
        const i64 at = row * call.heads + head * shared_heads + first_head + query % heads;
        own.shared->queries[i] = query < own.queries ? call.q[at * HEAD_DIM + i % HEAD_DIM] * scale : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        own.top[i] = -INFINITE;
        own.sum[i] = 0.0f;
        for (int k = 0; k < OWN; k++)
            if (own.exists(k)) own.value(i, k) = 0.0f;
    }
    __syncthreads();
    const Span& span = own.span;
    // Prompts, and sequences of several classes, are not split.
    const bool whole = span.rows > 1 || span.class_count > 0;
    const int step = whole ? max(1, span.cached) : split_tokens(span.cached);
    const int split = blockIdx.z, seen = call.first_page_seen(span, first);
    const int start = min(span.cached, seen + split * step), end = min(span.cached, start + step);
    const bool exists = split == 0 || start < span.cached;
    if (exists) {
        for (int c = 0; c < span.class_count; c++) {
            const int packed = exact.class_spans[span.classes + c].packed;
            for (int at = 0; at < packed; at += PAGE_TOKENS) own.look(c, at, min(PAGE_TOKENS, packed - at), true);
        }
        int at = span.class_count > 0 ? span.packed_keys : start;
        while (at < end) {
            const int next = min(end, (at / PAGE_TOKENS + 1) * PAGE_TOKENS);
            own.look(0, at, next - at, next <= span.packed_keys);
            at = next;
        }
        if (end == span.cached && call.incoming) own.look_incoming(first + rows - 1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i >= own.own()) continue;
        const int query = 4 * own.warp() + i;
        const i64 row = first - call.first_row + query / heads;
        const i64 at = row * call.heads + head * shared_heads + first_head + query % heads;
        float* out = call.partials + (at * call.splits + split) * (HEAD_DIM + 2);
        if (own.lane() == 0) {
            out[0] = own.top[i];
            out[1] = own.sum[i];
        }
        for (int k = 0; k < OWN; k++)
            if (own.exists(k)) out[2 + own.lane() + 32 * k] = own.value(i, k);
    }
}
EXPORT(attend_exact)

/// Joins the splits of rows, and adds the linear correction in the frame of the largest logit of all. Blocks: heads, rows.
/// Corrections, [row][head][HEAD_DIM + 1], may be null, as may sinks: for each head the logit of a token without a value.
extern "C" __global__ void __launch_bounds__(128)
join_splits(const float* partials, int splits, const float* corrections, const float* sinks, float* out) {
    constexpr int WARPS = 4, STRIDE = HEAD_DIM + 2, CHANNELS = (HEAD_DIM + 31) / 32;
    // For each warp: weighted values, normaliser.
    __shared__ float parts[WARPS][HEAD_DIM + 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 query = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    const float* own = partials + query * splits * STRIDE;
    float most = -INFINITE;
    for (int split = lane; split < splits; split += 32) most = fmaxf(most, own[split * STRIDE]);
    most = warp_max(most);
    if (sinks) most = fmaxf(most, sinks[blockIdx.x]);
    float total = 0.0f, sums[CHANNELS] = {};
#pragma unroll 4
    for (int split = warp; split < splits; split += WARPS) {
        const float* part = own + split * STRIDE;
        // Of splits that a row does not have, nothing else is written.
        const bool has = part[0] != -INFINITE;
        const float weight = has ? expf(part[0] - most) : 0.0f;
        total = has ? fmaf(weight, part[1], total) : total;
#pragma unroll
        for (int k = 0; k < CHANNELS; k++) {
            const int channel = lane + 32 * k;
            if (channel < HEAD_DIM) sums[k] = has ? fmaf(weight, part[2 + channel], sums[k]) : sums[k];
        }
    }
#pragma unroll
    for (int k = 0; k < CHANNELS; k++)
        if (lane + 32 * k < HEAD_DIM) parts[warp][lane + 32 * k] = sums[k];
    if (lane == 0) parts[warp][HEAD_DIM] = total;
    __syncthreads();
    total = 0.0f;
    for (int i = 0; i < WARPS; i++) total += parts[i][HEAD_DIM];
    const float* correction = corrections ? corrections + query * (HEAD_DIM + 1) : nullptr;
    if (correction) total += correction[0];
    if (sinks) total += expf(sinks[blockIdx.x] - most);
    for (int channel = threadIdx.x; channel < HEAD_DIM; channel += blockDim.x) {
        float sum = 0.0f;
        for (int i = 0; i < WARPS; i++) sum += parts[i][channel];
        if (correction) sum += correction[1 + channel];
        out[query * HEAD_DIM + channel] = sum / total;
    }
}
EXPORT(join_splits)
