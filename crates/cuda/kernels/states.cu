// The linear correction (KVLinC, section 3.2): features of queries and of what the codes of keys miss, and the states that
// sum up what the codes of a whole sequence miss. See crates/cpu/src/adapters.rs.

/// Tokens, or query rows, of a block.
constexpr int TILE = 8;
/// Features that a block adds to a state.
constexpr int FEATURES = 16;
constexpr float INFINITE = __builtin_bit_cast(float, 0x7f800000);

/// Softmax of each half of rows of features in shared memory. All threads call it.
__device__ void softmax_halves(float* rows, int count, int features) {
    const int lane = threadIdx.x % 32, half = features / 2;
    for (int part = threadIdx.x / 32; part < 2 * count; part += blockDim.x / 32) {
        float* own = rows + part * half;
        float most = -INFINITE, sum = 0.0f;
        for (int f = lane; f < half; f += 32) most = fmaxf(most, own[f]);
        most = warp_max(most);
        for (int f = lane; f < half; f += 32) {
            own[f] = expf(own[f] - most);
            sum += own[f];
        }
        const float inverse = 1.0f / warp_sum(sum);
        for (int f = lane; f < half; f += 32) own[f] *= inverse;
    }
    __syncthreads();
}

/// phi(x) = [softmax(x W1), softmax(x W2)] of rows in shared memory, into shared memory: [row][D]. All threads call it.
__device__ void map_features(const float* x, int rows, int head_dim, const float* map, int features, float* out) {
    for (int f = threadIdx.x; f < features; f += blockDim.x) {
        float sums[TILE];
#pragma unroll
        for (int row = 0; row < TILE; row++) sums[row] = 0.0f;
        for (int c = 0; c < head_dim; c++) {
            const float weight = map[(i64)c * features + f];
#pragma unroll
            for (int row = 0; row < TILE; row++)
                if (row < rows) sums[row] = fmaf(x[row * head_dim + c], weight, sums[row]);
        }
#pragma unroll
        for (int row = 0; row < TILE; row++)
            if (row < rows) out[row * features + f] = sums[row];
    }
    __syncthreads();
    softmax_halves(out, rows, features);
}

/// Features of what the codes of the keys of runs miss. Blocks: runs, KV heads, tiles of tokens.
extern "C" __global__ void __launch_bounds__(128)
missed_features(Flush flush, Correction own, Rotation rotation) {
    if ((int)blockIdx.x >= *flush.run_count) return;
    const Run run = flush.runs[blockIdx.x];
    const int head = blockIdx.y, first = blockIdx.z * TILE, count = min(TILE, run.count - first);
    if (!run.keys || count <= 0 || own.places[head] < 0) return;
    DYNAMIC_SHARED(shared);
    const Cache& cache = flush.cache;
    const Span span = flush.spans[run.span];
    const int d = cache.head_dim;
    float *x = (float*)shared, *y = x + TILE * d, *features = y + TILE * d;
    const ClassPages pages = flush.classes[0];
    const u8* page = stored::page_at(cache, pages, run.block, head);
    const Side& side = pages.pages[head].keys;
    const int coded = stored::coded_channels(side);
    for (int i = threadIdx.x; i < count * d; i += blockDim.x) {
        const int token = first + i / d, place = i % d;
        const int channel = cache.key_order ? cache.key_order[head * d + place] : place;
        float missed = 0.0f;
        if (place < coded && side.half_rows < 0) {
            const u16 value = stored::recent(cache, span, 1, head, run.first + token, channel);
            missed = half_to_float(value) - stored::number_at(side, page, place, run.slot + token);
        }
        x[(i / d) * d + channel] = missed;
    }
    const float* turned = stored::rotate<TILE, true>(rotation, head, x, y, count);
    map_features(turned, count, d, own.key_maps + (i64)head * d * own.features, own.features, features);
    for (int i = threadIdx.x; i < count * own.features; i += blockDim.x) {
        const int token = first + i / own.features;
        const bool is_sink = stored::sink_slot(cache, span, run.first + token) >= 0 ||
                             stored::in_page_sinks(pages.pages[head].sinks, page, run.slot + token);
        const i64 row = (i64)(run.index + token) * cache.kv_heads + head;
        own.missed[row * own.features + i % own.features] = is_sink ? 0.0f : features[i];
    }
}
EXPORT(missed_features)

__device__ __forceinline__ float load_state(const Correction& own, const u8* state, i64 at) {
    return own.half ? half_to_float(((const u16*)state)[at]) : ((const float*)state)[at];
}

__device__ __forceinline__ void store_state(const Correction& own, u8* state, i64 at, float x) {
    if (own.half) {
        ((u16*)state)[at] = float_to_half(x);
    } else {
        ((float*)state)[at] = x;
    }
}

/// Adds features times values of the keys of runs to S, [D][head_dim], and features to P, [D], which lies behind it: one flush
/// after the other, each rounded once. Blocks: spans, KV heads, tiles of features; a thread for each column, P the last.
extern "C" __global__ void __launch_bounds__(128, 4) add_states(Flush flush, Correction own) {
    const int index = blockIdx.x, head = blockIdx.y, first = blockIdx.z * FEATURES, runs = *flush.run_count;
    if (own.places[head] < 0) return;
    const Cache& cache = flush.cache;
    const Span span = flush.spans[index];
    const int d = cache.head_dim, features = own.features, count = min(FEATURES, features - first);
    u8* state = own.states + span.slot * own.sequence_bytes + own.offset + own.places[head] * own.head_bytes;
    for (int column = threadIdx.x; column <= d; column += blockDim.x) {
        float sums[FEATURES];
        bool loaded = false;
        for (int r = 0; r < runs; r++) {
            const Run run = flush.runs[r];
            if (run.span != index || !run.keys) continue;
            if (!loaded || run.first == 0) {
                // A sequence begins with an empty state, whatever was left there.
                for (int f = 0; f < count; f++) {
                    const i64 at = column < d ? (i64)(first + f) * d + column : (i64)features * d + first + f;
                    sums[f] = run.first == 0 ? 0.0f : load_state(own, state, at);
                }
                loaded = true;
            }
            for (int start = 0; start < run.count; start += run.flush) {
                float added[FEATURES];
#pragma unroll
                for (int f = 0; f < FEATURES; f++) added[f] = 0.0f;
                for (int token = start; token < min(run.count, start + run.flush); token++) {
                    float value = 1.0f;
                    if (column < d)
                        value = half_to_float(stored::recent(cache, span, 0, head, run.first + token, column));
                    const i64 row = (i64)(run.index + token) * cache.kv_heads + head;
                    const float* own_features = own.missed + row * features + first;
#pragma unroll
                    for (int f = 0; f < FEATURES; f++)
                        if (f < count) added[f] = fmaf(own_features[f], value, added[f]);
                }
#pragma unroll
                for (int f = 0; f < FEATURES; f++) {
                    if (f >= count) continue;
                    sums[f] += added[f];
                    if (own.half) sums[f] = half_to_float(float_to_half(sums[f]));
                }
            }
        }
        if (!loaded) return;
        for (int f = 0; f < count; f++) {
            const i64 at = column < d ? (i64)(first + f) * d + column : (i64)features * d + first + f;
            store_state(own, state, at, sums[f]);
        }
    }
}
EXPORT(add_states)

/// What states add to a query row of each of several spans of one row: [row][head][head_dim + 1], the normaliser first. A
/// sum is cut into parts, which are joined in their order. Blocks: rows, heads.
extern "C" __global__ void __launch_bounds__(512)
correct_row(Correction own, const Span* spans, int span_count, const float* q, int first_row, int heads, int head_dim,
            float* out) {
    __shared__ int found;
    DYNAMIC_SHARED(shared);
    const int row = blockIdx.x, head = blockIdx.y, kv_head = head / own.shared, d = head_dim, width = own.features;
    float *x = (float*)shared, *features = x + d, *parts = features + width;
    for (int i = threadIdx.x; i < span_count; i += blockDim.x)
        if (spans[i].first_row == first_row + row) found = i;
    for (int i = threadIdx.x; i < d; i += blockDim.x) x[i] = q[((i64)row * heads + head) * d + i];
    __syncthreads();
    const Span span = spans[found];
    float* to = out + ((i64)row * heads + head) * (d + 1);
    if (span.packed_keys == 0 || own.places[kv_head] < 0) {
        for (int i = threadIdx.x; i <= d; i += blockDim.x) to[i] = 0.0f;
        return;
    }
    const float* map = own.query_maps + (i64)head * d * width;
    int groups = blockDim.x / width, group = threadIdx.x / width, place = threadIdx.x % width;
    if (group < groups) {
        float sum = 0.0f;
#pragma unroll 16
        for (int c = group; c < d; c += groups) sum = fmaf(x[c], map[(i64)c * width + place], sum);
        parts[threadIdx.x] = sum;
    }
    __syncthreads();
    for (int f = threadIdx.x; f < width; f += blockDim.x) {
        float sum = 0.0f;
        for (int part = 0; part < groups; part++) sum += parts[part * width + f];
        features[f] = sum;
    }
    __syncthreads();
    softmax_halves(features, 1, width);
    const u8* state = own.states + span.slot * own.sequence_bytes + own.offset + own.places[kv_head] * own.head_bytes;
    const float gate = own.gates[head];
    groups = blockDim.x / d, group = threadIdx.x / d, place = threadIdx.x % d;
    if (group < groups) {
        float sum = 0.0f;
#pragma unroll 16
        for (int f = group; f < width; f += groups) sum = fmaf(features[f], load_state(own, state, (i64)f * d + place), sum);
        parts[threadIdx.x] = sum;
    }
    float total = 0.0f;
    if (threadIdx.x < 32)
        for (int f = threadIdx.x; f < width; f += 32) total = fmaf(features[f], load_state(own, state, (i64)width * d + f), total);
    __syncthreads();
    total = warp_sum(total);
    if (threadIdx.x == 0) to[0] = gate * total;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        float sum = 0.0f;
        for (int part = 0; part < groups; part++) sum += parts[part * d + i];
        to[1 + i] = gate * sum;
    }
}
EXPORT(correct_row)

/// What states add to query rows: [row][head][head_dim + 1], the normaliser first. Blocks: tiles of rows, heads.
extern "C" __global__ void __launch_bounds__(128)
correct(Correction own, const Span* spans, int span_count, const float* q, int first_row, int row_count, int heads, int head_dim,
        float* out) {
    int index = 0, tile = blockIdx.x, first = 0, count = 0;
    for (; index < span_count; index++) {
        const Span& span = spans[index];
        const int start = max(span.first_row, first_row), end = min(span.first_row + span.rows, first_row + row_count);
        const int tiles = max(0, (end - start + TILE - 1) / TILE);
        first = start + tile * TILE;
        count = min(TILE, end - first);
        if (tile < tiles) break;
        tile -= tiles;
    }
    if (index == span_count) return;
    DYNAMIC_SHARED(shared);
    float *x = (float*)shared, *features = x + TILE * head_dim;
    const Span span = spans[index];
    const int head = blockIdx.y, kv_head = head / own.shared, d = head_dim, width = own.features;
    const bool has_state = span.packed_keys > 0 && own.places[kv_head] >= 0;
    for (int i = threadIdx.x; i < count * d; i += blockDim.x)
        x[i] = q[((i64)(first - first_row + i / d) * heads + head) * d + i % d];
    __syncthreads();
    if (has_state) map_features(x, count, d, own.query_maps + (i64)head * d * width, width, features);
    const u8* state = own.states + span.slot * own.sequence_bytes + own.offset + own.places[kv_head] * own.head_bytes;
    const float gate = own.gates[head];
    for (int column = threadIdx.x; column <= d; column += blockDim.x) {
        float sums[TILE];
#pragma unroll
        for (int row = 0; row < TILE; row++) sums[row] = 0.0f;
        for (int f = 0; has_state && f < width; f++) {
            const i64 at = column > 0 ? (i64)f * d + column - 1 : (i64)width * d + f;
            const float number = load_state(own, state, at) * gate;
#pragma unroll
            for (int row = 0; row < TILE; row++)
                if (row < count) sums[row] = fmaf(features[row * width + f], number, sums[row]);
        }
#pragma unroll
        for (int row = 0; row < TILE; row++)
            if (row < count) out[((i64)(first - first_row + row) * heads + head) * (d + 1) + column] = sums[row];
    }
}
EXPORT(correct)
