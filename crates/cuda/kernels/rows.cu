// Operations on rows of activations. Activations are f32 and row-major; types of other numbers are 0 for f32, 1 for fp16
// and 2 for bf16, as in src/matrix.rs.

#define TYPE_F32 0
#define TYPE_HALF 1

/// Four numbers that lie at number i of an array, which is aligned to four numbers, as f32.
__device__ __forceinline__ float4 load_four(const u8* x, i64 i, int type) {
    if (type == TYPE_F32) return *(const float4*)(x + 4 * i);
    ushort4 bits = *(const ushort4*)(x + 2 * i);
    if (type == TYPE_HALF)
        return make_float4(half_to_float(bits.x), half_to_float(bits.y), half_to_float(bits.z), half_to_float(bits.w));
    return make_float4(bf16_to_float(bits.x), bf16_to_float(bits.y), bf16_to_float(bits.z), bf16_to_float(bits.w));
}

__device__ __forceinline__ float load_one(const u8* x, i64 i, int type) {
    if (type == TYPE_F32) return *(const float*)(x + 4 * i);
    u16 bits = *(const u16*)(x + 2 * i);
    return type == TYPE_HALF ? half_to_float(bits) : bf16_to_float(bits);
}

__device__ __forceinline__ void store_four(u8* out, i64 i, float4 x, int type) {
    if (type == TYPE_F32)
        *(float4*)(out + 4 * i) = x;
    else if (type == TYPE_HALF)
        *(uint2*)(out + 2 * i) = make_uint2(pack_half(x.x, x.y), pack_half(x.z, x.w));
    else
        *(uint2*)(out + 2 * i) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
}

__device__ __forceinline__ void store_one(u8* out, i64 i, float x, int type) {
    if (type == TYPE_F32)
        *(float*)(out + 4 * i) = x;
    else
        *(u16*)(out + 2 * i) = type == TYPE_HALF ? float_to_half(x) : float_to_bf16(x);
}

/// The sum over a block of whole warps, in an order that only their number decides.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[32];
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane < warps ? parts[lane] : 0.0f);
}

/// out[i] = scale table[ids[i]]: a block for each row.
extern "C" __global__ void embed(const u8* table, int type, const u32* ids, int width, float scale, float* out) {
    i64 from = (i64)ids[blockIdx.x] * width, to = (i64)blockIdx.x * width;
    if (width % 4 == 0) {
        for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
            float4 own = load_four(table, from + i, type);
            *(float4*)(out + to + i) = make_float4(own.x * scale, own.y * scale, own.z * scale, own.w * scale);
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) out[to + i] = load_one(table, from + i, type) * scale;
    }
}
EXPORT(embed)

/// Root mean square normalisation, a block for each row, of x into out, which may be x. Numbers of type `type` are stored
/// times `scale`, or, with `add`, added to what is there in f32.
extern "C" __global__ void rms_norm(const float* x, const float* weight, int width, float eps, u8* out, int type,
                                    float scale, int add) {
    i64 first = (i64)blockIdx.x * width;
    const float* row = x + first;
    bool whole = width % 4 == 0;
    float sum = 0.0f;
    if (whole) {
        for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
            float4 own = *(const float4*)(row + i);
            sum += own.x * own.x + own.y * own.y + own.z * own.z + own.w * own.w;
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += row[i] * row[i];
    }
    float factor = scale / sqrtf(block_sum(sum) / (float)width + eps);
    if (whole) {
        for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
            float4 own = *(const float4*)(row + i), by = *(const float4*)(weight + i);
            own = make_float4(own.x * factor * by.x, own.y * factor * by.y, own.z * factor * by.z,
                              own.w * factor * by.w);
            if (add) {
                float4 before = load_four(out, first + i, TYPE_F32);
                own = make_float4(before.x + own.x, before.y + own.y, before.z + own.z, before.w + own.w);
            }
            store_four(out, first + i, own, type);
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            float own = row[i] * factor * weight[i];
            store_one(out, first + i, add ? load_one(out, first + i, TYPE_F32) + own : own, type);
        }
    }
}
EXPORT(rms_norm)

/// Rounds x times `scale` to a type of 16 bit, four numbers for each thread.
extern "C" __global__ void narrow(const float* x, i64 count, u8* out, int type, float scale) {
    i64 i = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i + 4 <= count) {
        float4 own = *(const float4*)(x + i);
        store_four(out, i, make_float4(own.x * scale, own.y * scale, own.z * scale, own.w * scale), type);
    } else {
        for (; i < count; i++) store_one(out, i, x[i] * scale, type);
    }
}
EXPORT(narrow)

/// Row i of out is `half` cosines and as many sines of positions[i] times the frequencies, times the magnitudes behind them.
/// The functions are those of f64, because those of the CPU round like that.
extern "C" __global__ void rope_table(const float* turns, int half, const u32* positions, int count, float* out) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count * half) return;
    int row = i / half, c = i % half;
    double angle = (double)((float)positions[row] * turns[c]), sine, cosine;
    sincos(angle, &sine, &cosine);
    out[(i64)row * 2 * half + c] = (float)cosine * turns[half + c];
    out[(i64)row * 2 * half + half + c] = (float)sine * turns[half + c];
}
EXPORT(rope_table)

#define PLACED 4

/// Heads [row][heads][head_dim] that are normalised, where there is a norm, and turned.
struct Placed {
    float* x;
    const float* norm;
    int heads;
    int padding;
};

struct AllPlaced {
    Placed all[PLACED];
};

/// Normalises and turns the heads of `rows` rows by as many rows of a table of cosines and sines: a warp for each head.
extern "C" __global__ void place_heads(AllPlaced all, float eps, int head_dim, const float* table, int rows) {
    int heads = 0;
#pragma unroll
    for (int i = 0; i < PLACED; i++) heads += all.all[i].heads;
    i64 warp = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp >= (i64)rows * heads) return;
    i64 row = warp / heads;
    int head = (int)(warp % heads);
    Placed own = all.all[0];
#pragma unroll
    for (int i = 1; i < PLACED; i++) {
        if (head >= own.heads) {
            head -= own.heads;
            own = all.all[i];
        }
    }
    float* x = own.x + (row * own.heads + head) * head_dim;
    int lane = threadIdx.x % 32, half = head_dim / 2;
    float factor = 1.0f;
    if (own.norm != nullptr) {
        float sum = 0.0f;
        for (int c = lane; c < head_dim; c += 32) sum += x[c] * x[c];
        factor = 1.0f / sqrtf(warp_sum(sum) / (float)head_dim + eps);
    }
    const float* angles = table + row * head_dim;
    for (int c = lane; c < half; c += 32) {
        float a = x[c], b = x[c + half], cosine = angles[c], sine = angles[c + half];
        if (own.norm != nullptr) {
            a = a * factor * own.norm[c];
            b = b * factor * own.norm[c + half];
        }
        x[c] = a * cosine - b * sine;
        x[c + half] = b * cosine + a * sine;
    }
}
EXPORT(place_heads)

// Activations, as in src/rows.rs.
#define SILU 0
#define GELU_TANH 1
#define GELU 2
#define CLAMPED 3

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

/// What a gated layer makes of the two halves of a number.
template <int ACTIVATION>
__device__ __forceinline__ float activated(float gate, float up, float limit) {
    if (ACTIVATION == SILU) return silu(gate) * up;
    if (ACTIVATION == GELU_TANH)
        return gate * (0.5f + 0.5f * tanhf(0.797884561f * (gate + 0.044715f * (gate * gate * gate)))) * up;
    if (ACTIVATION == GELU) return gate * (0.5f * erfcf(-gate * 0.707106781f)) * up;
    float own = fminf(gate, limit), other = fminf(fmaxf(up, -limit), limit);
    return own / (1.0f + expf(-1.702f * own)) * (other + 1.0f);
}

template <int ACTIVATION>
__device__ __forceinline__ void activate_four(float* gate, const float* up, i64 count, float limit) {
    i64 i = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i + 4 <= count) {
        float4 a = *(const float4*)(gate + i), b = *(const float4*)(up + i);
        *(float4*)(gate + i) = make_float4(activated<ACTIVATION>(a.x, b.x, limit), activated<ACTIVATION>(a.y, b.y, limit),
                                           activated<ACTIVATION>(a.z, b.z, limit), activated<ACTIVATION>(a.w, b.w, limit));
    } else {
        for (; i < count; i++) gate[i] = activated<ACTIVATION>(gate[i], up[i], limit);
    }
}

/// gate = what an activation makes of gate and up, four numbers for each thread.
extern "C" __global__ void activate(float* gate, const float* up, i64 count, int activation, float limit) {
    if (activation == SILU) activate_four<SILU>(gate, up, count, limit);
    if (activation == GELU_TANH) activate_four<GELU_TANH>(gate, up, count, limit);
    if (activation == GELU) activate_four<GELU>(gate, up, count, limit);
    if (activation == CLAMPED) activate_four<CLAMPED>(gate, up, count, limit);
}
EXPORT(activate)

#define NOT_FINITE 0xffffffffu

/// The largest number of a part of a row, and its place in the row: NOT_FINITE where not all numbers of the part are finite.
struct Largest {
    float value;
    u32 place;
};

__device__ __forceinline__ Largest larger(Largest a, Largest b) {
    if (a.place == NOT_FINITE || b.place == NOT_FINITE) return {0.0f, NOT_FINITE};
    return b.value > a.value || (b.value == a.value && b.place < a.place) ? b : a;
}

/// The largest number, the first of equals, of each of gridDim.x parts of each row: out [row][part].
extern "C" __global__ void __launch_bounds__(256) argmax(const float* x, int width, Largest* out) {
    __shared__ Largest parts[8];
    const float* row = x + (i64)blockIdx.y * width;
    const int first = (int)((i64)width * blockIdx.x / gridDim.x);
    const int end = (int)((i64)width * (blockIdx.x + 1) / gridDim.x);
    // Threads that have no number of their own take one of another.
    Largest best = {row[first], (u32)first};
    if (!isfinite(best.value)) best.place = NOT_FINITE;
    for (int i = first + threadIdx.x; i < end; i += 256) {
        Largest own = {row[i], (u32)i};
        if (!isfinite(own.value)) own.place = NOT_FINITE;
        best = larger(best, own);
    }
    for (int step = 16; step > 0; step /= 2) {
        Largest other;
        other.value = __shfl_xor_sync(ALL_LANES, best.value, step);
        other.place = __shfl_xor_sync(ALL_LANES, best.place, step);
        best = larger(best, other);
    }
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < 8; i++) best = larger(best, parts[i]);
    out[blockIdx.y * gridDim.x + blockIdx.x] = best;
}
EXPORT(argmax)
