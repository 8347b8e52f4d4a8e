// Queries that a block takes together, and where their results go.

/// Queries of a span that share tiles.
struct Task {
    Span span;
    int kv_head;
    /// Query heads of a KV head.
    int shared;
    /// First row of the span in this call, counted in the batch; the first query, counted over rows and then heads from
    /// there, and how many there are.
    int first_row, first_query, queries;
};

/// Finds the task of a block among the spans of few, or of many, queries. False where there are not so many tasks.
__device__ __forceinline__ bool find_task(const Attention& a, bool few, int capacity, int index, Task& task) {
    int lane = threadIdx.x % 32;
    task.kv_head = blockIdx.y;
    task.shared = a.heads / a.cache.kv_heads;
    for (int base = 0; base < a.span_count; base += 32) {
        int queries = 0;
        if (base + lane < a.span_count) {
            const Span& span = a.spans[base + lane];
            int first = max(span.first_row, a.first_row);
            int last = min(span.first_row + span.rows, a.first_row + a.row_count);
            if (few_queries(span.rows, task.shared) == few) queries = max(0, last - first) * task.shared;
        }
        int tasks = (queries + capacity - 1) / capacity;
        int end = tasks;
        for (int step = 1; step < 32; step *= 2) {
            int before = __shfl_up_sync(ALL_LANES, end, step);
            if (lane >= step) end += before;
        }
        u32 found = __ballot_sync(ALL_LANES, index < end);
        if (found == 0) {
            index -= __shfl_sync(ALL_LANES, end, 31);
            continue;
        }
        int owner = __ffs((int)found) - 1;
        task.span = a.spans[base + owner];
        task.first_row = max(task.span.first_row, a.first_row);
        task.first_query = (index - __shfl_sync(ALL_LANES, end - tasks, owner)) * capacity;
        task.queries = min(capacity, __shfl_sync(ALL_LANES, queries, owner) - task.first_query);
        return true;
    }
    return false;
}

/// Row of the batch, and head, of a query of a task.
__device__ __forceinline__ int query_row(const Task& task, int query) {
    return task.first_row + (task.first_query + query) / task.shared;
}
__device__ __forceinline__ int query_head(const Task& task, int query) {
    return task.kv_head * task.shared + (task.first_query + query) % task.shared;
}
__device__ __forceinline__ const float* query_numbers(const Attention& a, const Task& task, int query) {
    i64 row = query_row(task, query) - a.first_row;
    return a.q + (row * a.heads + query_head(task, query)) * HEAD_DIM;
}
__device__ __forceinline__ float* partial_of(const Attention& a, const Task& task, int query, int split) {
    i64 row = query_row(task, query) - a.first_row;
    return a.partials + ((row * a.heads + query_head(task, query)) * a.splits + split) * (HEAD_DIM + 2);
}

/// Says of splits that a task does not have that they are empty.
__device__ __forceinline__ void empty_splits(const Attention& a, const Task& task, int first, int end) {
    int count = end - first;
    for (int i = threadIdx.x; i < task.queries * count; i += THREADS) {
        float* partial = partial_of(a, task, i / count, first + i % count);
        *(float2*)partial = make_float2(NO_LOGIT, 0.0f);
    }
}
