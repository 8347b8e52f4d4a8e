// How tokens enter the pass in flight and the rings, and queries the frame of the stored keys.

/// Rows that a block rotates.
constexpr int ROWS = 4;
constexpr float HALF_MAX = 65504.0f;

/// Keys, or values, on their way in: rows of all heads, and where they go.
struct Written {
    const float* source;
    float* target;
    Rotation rotation;
    /// What each KV head is multiplied by; null where they are stored as they are.
    const float* factors;
};

/// Rows first_row.. of the batch, to [head][capacity][head_dim]. Blocks: tiles of rows, KV heads, keys and values.
extern "C" __global__ void __launch_bounds__(128)
write_rows(Written keys, Written values, int first_row, int rows, int capacity, int head_dim, int layer, Errors* errors) {
    DYNAMIC_SHARED(shared);
    float* x = (float*)shared;
    const bool is_values = blockIdx.z == 1;
    const Written own = is_values ? values : keys;
    const int first = blockIdx.x * ROWS, count = min(ROWS, rows - first), head = blockIdx.y;
    for (int i = threadIdx.x; i < count * head_dim; i += blockDim.x) {
        i64 row = first + i / head_dim;
        x[i] = own.source[(row * gridDim.y + head) * head_dim + i % head_dim];
    }
    const float* y = stored::rotate<ROWS, false>(own.rotation, head, x, x + ROWS * head_dim, count);
    const float factor = own.factors ? own.factors[head] : 1.0f;
    for (int i = threadIdx.x; i < count * head_dim; i += blockDim.x) {
        const int row = first_row + first + i / head_dim;
        const float value = y[i] * factor;
        own.target[((i64)head * capacity + row) * head_dim + i % head_dim] = value;
        if (!(fabsf(value) <= HALF_MAX)) {
            // The last 8 bits of the number give way to the head.
            const u32 number = (__float_as_uint(value) & ~0xffu) | (head & 0xff);
            const u64 place = (u64)layer << 52 | (u64)is_values << 51 | (u64)row << 32 | number;
            atomicMin(&errors->not_finite, place);
        }
    }
}
EXPORT(write_rows)

/// Rows of query heads, rotated as their KV head is and multiplied by its factor, where `factors` are not null; `rotated` may
/// be `q`. Blocks: tiles of rows, heads.
extern "C" __global__ void __launch_bounds__(128)
rotate_rows(const float* q, float* rotated, Rotation rotation, const float* factors, int rows, int head_dim,
            int shared_heads) {
    DYNAMIC_SHARED(shared);
    float* x = (float*)shared;
    const int first = blockIdx.x * ROWS, count = min(ROWS, rows - first), head = blockIdx.y;
    for (int i = threadIdx.x; i < count * head_dim; i += blockDim.x) {
        i64 row = first + i / head_dim;
        x[i] = q[(row * gridDim.y + head) * head_dim + i % head_dim];
    }
    const float* y = stored::rotate<ROWS, false>(rotation, head / shared_heads, x, x + ROWS * head_dim, count);
    const float factor = factors ? factors[head / shared_heads] : 1.0f;
    for (int i = threadIdx.x; i < count * head_dim; i += blockDim.x) {
        i64 row = first + i / head_dim;
        rotated[(row * gridDim.y + head) * head_dim + i % head_dim] = y[i] * factor;
    }
}
EXPORT(rotate_rows)

/// Copies the pass in flight into the rings, once what leaves them is packed. Blocks: rows of the spans; KV heads; keys and
/// values.
extern "C" __global__ void __launch_bounds__(128) append_rows(Cache cache, const Span* spans, int span_count) {
    int index = 0, row = blockIdx.x;
    while (index < span_count && row >= spans[index].rows) row -= spans[index++].rows;
    if (index == span_count) return;
    const Span span = spans[index];
    const int token = span.cached + row, left = span.rows - row, d = cache.head_dim;
    const int slots = blockIdx.z == 0 ? cache.key_slots : cache.value_slots;
    // Where more tokens come than a ring holds, the last ones stay.
    if (left > slots) return;
    u16* ring = (u16*)(blockIdx.z == 0 ? cache.key_ring : cache.value_ring);
    const float* incoming = blockIdx.z == 0 ? cache.incoming_keys : cache.incoming_values;
    const float* from = incoming + ((i64)blockIdx.y * cache.incoming_rows + span.first_row + row) * d;
    u16* to = ring + (((i64)span.slot * cache.kv_heads + blockIdx.y) * slots + token % slots) * d;
    for (int i = threadIdx.x; i < d; i += blockDim.x) to[i] = float_to_half(from[i]);
}
EXPORT(append_rows)
