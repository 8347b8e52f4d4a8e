// Operations of training: products of matrices in any order, features, the loss of attention rows, and Adam.
//
// Every sum has one order that depends on shapes alone.

/// What the largest of no numbers is.
__device__ __forceinline__ float least_of_all() { return __uint_as_float(0xff800000u); }

// Tiles of a product, and how deep the slabs of its operands are.
constexpr int TILE = 64, DEPTH = 16, PRODUCT_THREADS = 128;

// Rows of a slab in shared memory begin in different banks, and at multiples of 16 bytes.
constexpr int PITCH = TILE + 4;

// Numbers of a slab that one thread carries.
constexpr int CARRIED = TILE * DEPTH / PRODUCT_THREADS;

/// A thread's share of the slabs, DEPTH deep and TILE wide, that a block takes of an operand. Threads lie side by side
/// along whichever of the two directions is contiguous in memory.
struct Carrier {
    const float* from;
    /// Numbers from one that the thread carries to the next, and from one slab to the next.
    i64 step, slab;
    /// Where the first one lies in a slab, and how far from it the next one does.
    int depth, depth_step, wide, wide_step;
    /// How many columns of the slab there are.
    int width;

    __device__ Carrier(const float* first, i64 along_depth, i64 along_width, int width) : width(width) {
        int thread = threadIdx.x;
        if (along_depth == 1 && along_width != 1) {
            depth = thread % DEPTH, depth_step = 0;
            wide = thread / DEPTH, wide_step = PRODUCT_THREADS / DEPTH;
        } else {
            depth = thread / TILE, depth_step = PRODUCT_THREADS / TILE;
            wide = thread % TILE, wide_step = 0;
        }
        from = first + depth * along_depth + wide * along_width;
        step = depth_step * along_depth + wide_step * along_width;
        slab = DEPTH * along_depth;
    }

    /// Takes the next slab, of which `left` rows are there; zeros stand for what is not.
    __device__ void load(float (&numbers)[CARRIED], int left) {
        const float* own = from;
#pragma unroll
        for (int i = 0; i < CARRIED; i++) {
            bool there = wide + i * wide_step < width && depth + i * depth_step < left;
            numbers[i] = there ? *own : 0.0f;
            own += step;
        }
        from += slab;
    }

    __device__ void store(const float (&numbers)[CARRIED], float* shared) const {
#pragma unroll
        for (int i = 0; i < CARRIED; i++) {
            shared[(depth + i * depth_step) * PITCH + wide + i * wide_step] = numbers[i];
        }
    }
};

__device__ __forceinline__ void unpack(float* to, const float* shared) {
    float4 four = *(const float4*)shared;
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

/// out = scale a b, or out + scale a b, for a of [m, k] and b of [k, n]; a block computes one tile. The sums are in parts
/// of `part` terms, the matrices of whose results lie `out_part` numbers apart.
extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 4)
    product(int m, int n, int k, int part, float scale, const float* a, i64 a_row, i64 a_column, const float* b, i64 b_row,
            i64 b_column, float* out, i64 out_row, i64 out_part, int add) {
    __shared__ __align__(16) float shared_a[2][DEPTH * PITCH], shared_b[2][DEPTH * PITCH];
    int first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE;
    int term = blockIdx.z * part, end = min(k, term + part);
    Carrier from_a(a + first_row * a_row + term * a_column, a_column, a_row, m - first_row);
    Carrier from_b(b + term * b_row + first_column * b_column, b_row, b_column, n - first_column);
    float next_a[CARRIED], next_b[CARRIED];
    from_a.load(next_a, end - term);
    from_b.load(next_b, end - term);
    from_a.store(next_a, shared_a[0]);
    from_b.store(next_b, shared_b[0]);
    __syncthreads();

    // A thread has four rows in each half of the tile, and four columns.
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
    float sums[8][4] = {};
    for (int slab = 0; term < end; slab ^= 1) {
        term += DEPTH;
        bool more = term < end;
        if (more) {
            from_a.load(next_a, end - term);
            from_b.load(next_b, end - term);
        }
        const float *own_a = shared_a[slab], *own_b = shared_b[slab];
#pragma unroll
        for (int depth = 0; depth < DEPTH; depth++) {
            float x[8], y[4];
            unpack(x, own_a + depth * PITCH + row);
            unpack(x + 4, own_a + depth * PITCH + TILE / 2 + row);
            unpack(y, own_b + depth * PITCH + column);
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
            }
        }
        if (more) {
            from_a.store(next_a, shared_a[slab ^ 1]);
            from_b.store(next_b, shared_b[slab ^ 1]);
        }
        __syncthreads();
    }

    out += blockIdx.z * out_part;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int own_row = first_row + (i / 4) * (TILE / 2) + row + i % 4;
        if (own_row >= m) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int own_column = first_column + column + j;
            if (own_column >= n) continue;
            float* own = out + own_row * out_row + own_column;
            *own = add ? fmaf(scale, sums[i][j], *own) : scale * sums[i][j];
        }
    }
}
EXPORT(product)

/// Adds up the parts of a product's sums, in their order.
extern "C" __global__ void __launch_bounds__(256)
    join_products(int m, int n, int parts, float scale, const float* from, float* out, i64 out_row, int add) {
    i64 numbers = (i64)m * n, index = (i64)blockIdx.x * 256 + threadIdx.x;
    if (index >= numbers) return;
    float sum = 0.0f;
    for (int part = 0; part < parts; part++) sum += from[part * numbers + index];
    float* own = out + index / n * out_row + index % n;
    *own = add ? fmaf(scale, sum, *own) : scale * sum;
}
EXPORT(join_products)

/// gate softmax(x) of `halves` rows of `half` numbers; a warp computes one.
extern "C" __global__ void __launch_bounds__(256) features(float* x, i64 halves, int half, float gate) {
    i64 index = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (index >= halves) return;
    x += index * half;
    int lane = threadIdx.x % 32;
    float most = least_of_all();
    for (int i = lane; i < half; i += 32) most = fmaxf(most, x[i]);
    most = warp_max(most);
    float sum = 0.0f;
    for (int i = lane; i < half; i += 32) {
        x[i] = expf(x[i] - most);
        sum += x[i];
    }
    float scale = gate / warp_sum(sum);
    for (int i = lane; i < half; i += 32) x[i] *= scale;
}
EXPORT(features)

/// Derivatives by what `features` made `rows` rows y of; a warp computes one. The one by the gate goes to
/// by_gate[row * gate_step], where that is not null.
extern "C" __global__ void __launch_bounds__(256)
    features_backward(const float* y, float* dy, i64 rows, int half, float gate, float* by_gate, int gate_step) {
    i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32;
    float total = 0.0f;
    for (int side = 0; side < 2; side++) {
        const float* own = y + (2 * row + side) * half;
        float* derivative = dy + (2 * row + side) * half;
        float sum = 0.0f;
        for (int i = lane; i < half; i += 32) sum = fmaf(own[i], derivative[i], sum);
        // y = gate p: the derivative by the gate is p . dy, that by what p was made of is y (dy - p . dy).
        float mean = warp_sum(sum) / gate;
        for (int i = lane; i < half; i += 32) derivative[i] = own[i] * (derivative[i] - mean);
        total += mean;
    }
    if (by_gate != nullptr && lane == 0) by_gate[row * gate_step] = total;
}
EXPORT(features_backward)

// Threads that compute one attention row.
constexpr int ROW_THREADS = 256, ROW_WARPS = ROW_THREADS / 32;

// What the rows of statistics hold, by place.
constexpr int ROW_STATISTICS = 6, CROSS_ENTROPY = 0, DIVERGENCE = 1, UNCORRECTED = 2, INVERSE = 3, OUTPUT = 4;

// Queries of a launch.
constexpr int QUERIES = 128;

/// What the queries of a launch see, from query `first` of `all` on.
struct Queries {
    u32 visible[QUERIES], packed[QUERIES];
    int first, all;
    /// Keys that are kept exactly.
    int exact;
    /// Numbers from one row to the next.
    int stride;
};

/// The row that a block computes, and what it sees.
struct Row {
    i64 index, first;
    int visible, packed, kept, stride;

    __device__ Row(const Queries& queries) {
        index = (i64)blockIdx.y * queries.all + queries.first + blockIdx.x;
        first = index * queries.stride;
        visible = queries.visible[blockIdx.x];
        packed = queries.packed[blockIdx.x];
        kept = min(queries.exact, packed);
        stride = queries.stride;
    }
};

struct Sum {
    __device__ float operator()(float a, float b) const { return a + b; }
};
struct Most {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

/// Joins what the threads of a row have, in one order; all of them get the result.
template <class Join, int N>
__device__ __forceinline__ void join_row(float (&x)[N]) {
    __shared__ float by_warp[N][ROW_WARPS];
    Join join;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N; i++) {
        for (int step = 16; step > 0; step /= 2) x[i] = join(x[i], __shfl_xor_sync(ALL_LANES, x[i], step));
        if (lane == 0) by_warp[i][warp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = by_warp[i][0];
        for (int other = 1; other < ROW_WARPS; other++) x[i] = join(x[i], by_warp[i][other]);
    }
    __syncthreads();
}

__device__ __forceinline__ float at_least(float value, float least) { return value > least ? value : least; }

/// The loss of attention rows and its derivative by the correction; a block computes one row.
///
/// A thread touches the same keys in every step, so that only sums pass between threads.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    row_loss(Queries queries, float* exact, float* missed, float* correction, float* statistics, int outputs) {
    // Probabilities below this one count as this one.
    const float least = 1e-12f;
    Row row(queries);
    exact += row.first, missed += row.first, correction += row.first, statistics += row.index * ROW_STATISTICS;

    // Logits of what the cache holds, and the largest of both kinds.
    float most[2] = {least_of_all(), least_of_all()};
    for (int i = threadIdx.x; i < row.visible; i += ROW_THREADS) {
        float logit = exact[i], mixed = logit;
        if (i < row.packed) mixed = missed[i] = logit - missed[i];
        most[0] = fmaxf(most[0], logit);
        most[1] = fmaxf(most[1], mixed);
    }
    join_row<Most>(most);
    auto [exact_most, mixed_most] = most;

    // Sums of the exact weights, of these times their logits, of the other weights with and without the correction.
    float sums[4] = {};
    for (int i = threadIdx.x; i < row.visible; i += ROW_THREADS) {
        float logit = exact[i] - exact_most, weight = expf(logit);
        sums[0] += weight;
        sums[1] = fmaf(weight, logit, sums[1]);
        float mixed = (i < row.packed ? missed[i] : exact[i]) - mixed_most, plain = expf(mixed), corrected = plain;
        if (i < row.packed) {
            if (i >= row.kept) corrected += correction[i];
            exact[i] = weight;
            missed[i] = mixed;
            correction[i] = corrected;
        }
        sums[2] += corrected;
        sums[3] += plain;
    }
    join_row<Sum>(sums);
    auto [exact_sum, energy, sum, plain_sum] = sums;
    float share = 1.0f / exact_sum, inverse = 1.0f / sum;
    float sum_ln = logf(sum), plain_ln = logf(plain_sum), least_ln = logf(least);

    // The cross-entropy with and without the correction, and -A / a; targets that the clamp leaves out pull at nothing.
    float terms[3] = {};
    for (int i = threadIdx.x; i < row.visible; i += ROW_THREADS) {
        float target, probability, probability_ln, mixed, pulled;
        if (i < row.packed) {
            target = exact[i] * share;
            probability = correction[i] * inverse;
            mixed = missed[i];
            float clamped = at_least(probability, least);
            probability_ln = logf(clamped);
            pulled = probability > least ? target : 0.0f;
            correction[i] = -pulled / (clamped * sum);
        } else {
            // A recent key has no correction, and its weight is the power of a known logit.
            target = expf(exact[i] - exact_most) * share;
            mixed = exact[i] - mixed_most;
            probability = expf(mixed) * inverse;
            probability_ln = at_least(mixed - sum_ln, least_ln);
            pulled = probability_ln > least_ln ? target : 0.0f;
        }
        terms[0] = fmaf(target, probability_ln, terms[0]);
        terms[1] = fmaf(target, at_least(mixed - plain_ln, least_ln), terms[1]);
        terms[2] += pulled;
        if (outputs) {
            exact[i] = probability - target;
            missed[i] = probability;
        }
    }
    join_row<Sum>(terms);
    auto [cross, plain_cross, pulling] = terms;
    float pushed = pulling * inverse;
    for (int i = threadIdx.x; i < row.stride; i += ROW_THREADS) {
        correction[i] = i >= row.kept && i < row.packed ? correction[i] + pushed : 0.0f;
        if (outputs && i >= row.visible) exact[i] = missed[i] = 0.0f;
    }
    if (threadIdx.x == 0) {
        float entropy = logf(exact_sum) - energy * share;
        statistics[CROSS_ENTROPY] = -cross;
        statistics[DIVERGENCE] = -cross - entropy;
        statistics[UNCORRECTED] = -plain_cross - entropy;
        statistics[INVERSE] = inverse;
    }
}
EXPORT(row_loss)

/// Adds the squared error of the output to the loss of attention rows; a block computes one row.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    output_loss(Queries queries, float weight, int width, const float* weights, const float* errors, const float* toward,
                float* correction, float* statistics) {
    Row row(queries);
    weights += row.first, toward += row.first, correction += row.first;
    errors += row.index * width, statistics += row.index * ROW_STATISTICS;
    float sums[2] = {};
    for (int i = threadIdx.x; i < row.visible; i += ROW_THREADS) sums[0] = fmaf(weights[i], toward[i], sums[0]);
    for (int i = threadIdx.x; i < width; i += ROW_THREADS) sums[1] = fmaf(errors[i], errors[i], sums[1]);
    join_row<Sum>(sums);
    float scale = 2.0f * weight / (float)width * statistics[INVERSE];
    for (int i = row.kept + threadIdx.x; i < row.packed; i += ROW_THREADS) {
        correction[i] = fmaf(scale, toward[i] - sums[0], correction[i]);
    }
    if (threadIdx.x == 0) statistics[OUTPUT] = sums[1] / (float)width;
}
EXPORT(output_loss)

/// The sum of what the 256 threads of a block have, in one order, to thread 0.
__device__ double join_block(double sum) {
    __shared__ double sums[256];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int step = 128; step > 0; step /= 2) {
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
        __syncthreads();
    }
    return sums[0];
}

/// Sums of the squares of parts of x, `part` numbers each.
extern "C" __global__ void __launch_bounds__(256) sum_squares(const float* x, i64 count, i64 part, double* sums) {
    i64 first = blockIdx.x * part, end = min(count, first + part);
    double sum = 0.0;
    for (i64 i = first + threadIdx.x; i < end; i += 256) sum += (double)x[i] * (double)x[i];
    sum = join_block(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
EXPORT(sum_squares)

/// Adds up `count` sums; one block.
extern "C" __global__ void __launch_bounds__(256) join_sums(const double* sums, int count, double* out) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += 256) sum += sums[i];
    sum = join_block(sum);
    if (threadIdx.x == 0) *out = sum;
}
EXPORT(join_sums)

/// A step of Adam, as the host has it.
struct AdamStep {
    float rate, beta1, beta2, epsilon, scale, correction1, correction2;
};

extern "C" __global__ void __launch_bounds__(256)
    adam(AdamStep step, i64 count, const float* gradients, float* first, float* second, float* x) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= count) return;
    float gradient = gradients[i] * step.scale;
    float mean = step.beta1 * first[i] + (1.0f - step.beta1) * gradient;
    float square = step.beta2 * second[i] + (1.0f - step.beta2) * gradient * gradient;
    first[i] = mean;
    second[i] = square;
    x[i] -= step.rate * (mean / step.correction1) / (sqrtf(square / step.correction2) + step.epsilon);
}
EXPORT(adam)
