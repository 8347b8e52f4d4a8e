// Tokens that leave the window become codes: the arithmetic of crates/cpu/src/encode.rs, number for number. Products
// and sums are not fused here.

/// Tokens that a block turns back.
constexpr int TURNED_TOKENS = 8;
constexpr int ENCODE_THREADS = 256;
/// Tokens that a page protects, at most: dibit_cache::AutoSinks::MOST.
constexpr int MOST_PAGE_SINKS = 32;
/// Adding it rounds to an integer, half to even; see crates/cpu/src/exp.rs.
constexpr float ROUND = 12582912.0f;
constexpr float MAX_ZERO = 65000.0f;
constexpr float INFINITE = __builtin_bit_cast(float, 0x7f800000);

/// Keys of runs before their rotary embedding, rotated over adjacent heads. Blocks: runs, groups of heads, tiles of tokens.
extern "C" __global__ void __launch_bounds__(256) turn_back(Flush flush) {
    if ((int)blockIdx.x >= *flush.run_count) return;
    const Run run = flush.runs[blockIdx.x];
    const int first = blockIdx.z * TURNED_TOKENS, count = min(TURNED_TOKENS, run.count - first);
    if (!run.keys || count <= 0) return;
    DYNAMIC_SHARED(shared);
    float* x = (float*)shared;
    const Cache& cache = flush.cache;
    const Span span = flush.spans[run.span];
    const int d = cache.head_dim, half = d / 2, heads = flush.pre_rope.heads, width = heads * d;
    const int first_head = blockIdx.y * heads;
    for (int i = threadIdx.x; i < count * heads * half; i += blockDim.x) {
        const int token = first + i / (heads * half), head = i / half % heads, pair = i % half;
        const int at = stored::position(flush.positions, run, token);
        const float a = half_to_float(stored::recent(cache, span, 1, first_head + head, at, pair));
        const float b = half_to_float(stored::recent(cache, span, 1, first_head + head, at, pair + half));
        const float* angle = flush.angles + ((i64)(run.index + token) * half + pair) * 2;
        float* out = x + (token - first) * width + head * d + pair;
        out[0] = a * angle[0] + b * angle[1];
        out[half] = b * angle[0] - a * angle[1];
    }
    __syncthreads();
    if (flush.pre_rope.rotation.kind == 1) stored::hadamard<false>(flush.pre_rope.rotation, x, count, width);
    for (int i = threadIdx.x; i < count * width; i += blockDim.x) {
        i64 row = (i64)(run.index + first + i / width) * cache.kv_heads + first_head;
        flush.turned[row * d + i % width] = x[i];
    }
}
EXPORT(turn_back)

__device__ __forceinline__ float smaller(float a, float b) { return a < b ? a : b; }
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }

/// Scale and zero of a group, as they are stored.
struct Parameters {
    u16 scale, zero;
};

__device__ __forceinline__ bool is_finite(u16 half) { return (half & 0x7c00) != 0x7c00; }

/// dibit_quant::Quantizer::fit_range; false where fp16 cannot hold the result.
__device__ __forceinline__ bool fit(const Side& side, float low, float high, int max_code, Parameters& out) {
    float min = low + 0.0f, max = high;
    out.scale = float_to_half((max - min) / (float)max_code);
    out.zero = float_to_half(min);
    if (!is_finite(out.scale) || !is_finite(out.zero)) return false;
    if (!side.integer_zero) return true;
    min = side.clip * min;
    max = side.clip * max;
    if (side.include_zero) {
        min = fminf(min, 0.0f);
        max = fmaxf(max, 0.0f);
    }
    const float step = (max - min) / (float)max_code;
    if ((float_to_half(step) & 0x7fff) == 0) {
        out.scale = float_to_half(-min);
        out.zero = 0x3c00;
        return true;
    }
    out.scale = float_to_half(fmaxf(step, fabsf(min) / MAX_ZERO));
    out.zero = float_to_half(rintf(-min / half_to_float(out.scale)));
    return true;
}

/// The code of a number in a group.
__device__ __forceinline__ int code_of(const Side& side, float value, float scale, float zero, float max_code) {
    const float steps = side.integer_zero ? ((value / scale + ROUND) - ROUND) + zero : (value - zero) / scale;
    float clamped = smaller(larger(steps, 0.0f), max_code);
    clamped = scale == 0.0f ? 0.0f : clamped;
    return (int)(__float_as_uint(clamped + ROUND) & 0xff);
}

/// dibit_quant::Clip::SHARES.
constexpr int SHARES = 7;

/// Narrows a range to a share of it, around its middle.
__device__ __forceinline__ void narrow(int share, float& low, float& high) {
    constexpr float shares[SHARES] = {1.0f, 0.92f, 0.84f, 0.76f, 0.68f, 0.6f, 0.5f};
    if (share == 0) return;
    const float middle = 0.5f * (low + high), half = 0.5f * (high - low);
    low = middle - shares[share] * half;
    high = middle + shares[share] * half;
}

/// The square of what the code of a number misses.
__device__ __forceinline__ float missed_square(const Side& side, float value, Parameters own, float max_code) {
    const float scale = half_to_float(own.scale), zero = half_to_float(own.zero);
    const float code = (float)code_of(side, value, scale, zero, max_code);
    const float missed = value - (code * scale + stored::offset_of(side, scale, zero));
    return missed * missed;
}

/// Bits of a channel in the order of storage; 0 where it has no plane.
__device__ __forceinline__ int bits_of(const Side& side, int channel) {
    if (!side.planes) return side.bits;
    int planes = 0;
    for (int i = 0; i < 4; i++) planes += channel < side.with[i];
    return 2 * planes;
}

/// One head of a run on its way into a page.
struct Encoding {
    Flush flush;
    Run run;
    Side side;
    u8* page;
    int head;
    /// [token][stride]: numbers, and then codes in their place. In shared memory where they fit.
    float* x;
    int stride;
    /// Slot of each token that is protected; -1 for the others.
    const int* sinks;

    /// Number of the parameters of a slot and a channel.
    __device__ int number_of(int slot, int channel) const {
        if (side.planes) return channel;
        return side.tokens_are_lanes ? stored::parameter(side, channel, slot) : stored::parameter(side, slot, channel);
    }

    __device__ void write_parameters(int slot, int channel, Parameters own) const {
        const int number = number_of(slot, channel);
        if (!side.planes || channel < side.with[0]) ((u16*)(page + side.scales))[number] = own.scale;
        ((u16*)(page + side.zeros))[number] = own.zero;
    }

    /// Notes a group that fp16 cannot describe.
    __device__ void refuse(int group, float low, float high) const {
        const u64 place = (u64)flush.layer << 52 | (u64)head << 40 | (u64)(1 - run.keys) << 39 |
                          (u64)(blockIdx.x & 0x7ffff) << 20 | (u64)(group & 0xfffff);
        if (atomicMin(&flush.errors->range, place) > place)
            atomicExch(&flush.errors->ends, (u64)__float_as_uint(low) << 32 | __float_as_uint(high));
    }

    /// Parameters of that share of a channel's range that misses least; of equals the largest. Shares that fp16 cannot hold
    /// are left out.
    __device__ Parameters clip_channel(int channel, int from, int to, float low, float high, int max_code) const {
        Parameters best = {0, 0};
        float least = INFINITE;
        for (int share = 0; share < SHARES; share++) {
            float min = low, max = high, error = 0.0f;
            narrow(share, min, max);
            Parameters tried;
            if (!fit(side, min, max, max_code, tried)) continue;
            for (int i = from; i < to; i++)
                if (sinks[i] < 0) error += missed_square(side, x[i * stride + channel], tried, (float)max_code);
            if (error < least) {
                least = error;
                best = tried;
            }
        }
        return best;
    }

    /// The same of a group of channels of a token, by half a warp: a lane for each share.
    __device__ Parameters clip_token(const float* own, int count, float low, float high, int max_code) const {
        const int lane = threadIdx.x % 16;
        Parameters tried = {0, 0};
        float error = INFINITE;
        if (lane < SHARES) {
            narrow(lane, low, high);
            if (fit(side, low, high, max_code, tried)) {
                error = 0.0f;
                for (int i = 0; i < count; i++) error += missed_square(side, own[i], tried, (float)max_code);
            }
        }
        float least = INFINITE;
        int best = 0;
        for (int share = 0; share < SHARES; share++) {
            const float other = __shfl_sync(ALL_LANES, error, share, 16);
            if (other < least) {
                least = other;
                best = share;
            }
        }
        const int both = __shfl_sync(ALL_LANES, (int)tried.scale << 16 | (int)tried.zero, best, 16);
        return {(u16)((u32)both >> 16), (u16)both};
    }

    /// Groups of tokens in each channel: a thread for each.
    __device__ void code_channels() const {
        const int channels = stored::coded_channels(side), end = run.slot + run.count;
        const int first_group = run.slot / side.group, groups = (end - 1) / side.group + 1 - first_group;
        for (int unit = threadIdx.x; unit < channels * groups; unit += blockDim.x) {
            const int channel = unit % channels, group = first_group + unit / channels;
            const int from = max(group * side.group, run.slot) - run.slot;
            const int to = min((group + 1) * side.group, end) - run.slot;
            float low = INFINITE, high = -INFINITE;
            double sum = 0.0;
            int seen = 0;
            for (int i = from; i < to; i++) {
                if (sinks[i] >= 0) continue;
                const float value = x[i * stride + channel];
                low = smaller(value, low);
                high = larger(value, high);
                sum += (double)value;
                seen++;
            }
            const int bits = bits_of(side, channel), max_code = (1 << bits) - 1;
            Parameters own = {0, 0};
            if (seen > 0 && bits == 0) {
                own.zero = float_to_half((float)(sum / (double)seen));
            } else if (seen > 0 && !fit(side, low, high, max_code, own)) {
                refuse(unit, low, high);
            } else if (seen > 0 && side.clip_mse) {
                own = clip_channel(channel, from, to, low, high, max_code);
            }
            write_parameters(run.slot + from, channel, own);
            if (takes_feedback()) continue;
            const float scale = half_to_float(own.scale), zero = half_to_float(own.zero);
            for (int i = from; i < to; i++) {
                float* at = x + i * stride + channel;
                *at = sinks[i] >= 0 ? 0.0f : (float)code_of(side, *at, scale, zero, (float)max_code);
            }
        }
    }

    __device__ bool takes_feedback() const { return side.feedback && flush.feedback.places; }

    /// Codes channels one after the other, a thread for each token: what the code of one misses changes those behind it.
    __device__ void code_with_feedback() const {
        constexpr int AT_ONCE = 8;
        const int d = flush.cache.head_dim, *places = flush.feedback.places + head * d;
        for (int token = threadIdx.x; token < run.count; token += blockDim.x) {
            const float* factors = flush.feedback.factors + (i64)head * d * d;
            float* own = x + token * stride;
            for (int i = 0; i < d; i++, factors += d) {
                const int channel = places[i], bits = bits_of(side, channel), number = number_of(run.slot, channel);
                if (sinks[token] >= 0) {
                    own[channel] = 0.0f;
                    continue;
                }
                const float scale = bits == 0 ? 0.0f : half_to_float(stored::half_at(page, side.scales, number));
                const float zero = half_to_float(stored::half_at(page, side.zeros, number));
                const float code = (float)code_of(side, own[channel], scale, zero, (float)((1 << bits) - 1));
                const float missed = own[channel] - (code * scale + zero);
                own[channel] = code;
#pragma unroll 1
                for (int first = i + 1; first < d; first += AT_ONCE) {
                    // All are loaded before any is stored.
                    float later[AT_ONCE];
#pragma unroll
                    for (int k = 0; k < AT_ONCE; k++) {
                        const int j = min(first + k, d - 1);
                        later[k] = own[places[j]] - missed * factors[j];
                    }
#pragma unroll
                    for (int k = 0; k < AT_ONCE; k++)
                        if (first + k < d) own[places[first + k]] = later[k];
                }
            }
        }
    }

    /// Groups of channels of each token: half a warp for each, its lanes in the order in which the CPU's go.
    __device__ void code_tokens() const {
        const int channels = stored::coded_channels(side), groups = (channels + side.group - 1) / side.group;
        const int units = run.count * groups, lane = threadIdx.x % 16, max_code = (1 << side.bits) - 1;
        for (int base = threadIdx.x / 32 * 2; base < units; base += blockDim.x / 16) {
            const int unit = base + threadIdx.x / 16 % 2;
            const bool exists = unit < units;
            const int token = exists ? unit / groups : 0, first = exists ? unit % groups * side.group : 0;
            const int count = min(side.group, channels - first), whole = count & ~15;
            float* own = x + token * stride + first;
            float low = INFINITE, high = -INFINITE;
            for (int i = lane; i < whole; i += 16) {
                low = smaller(own[i], low);
                high = larger(own[i], high);
            }
            float min = INFINITE, max = -INFINITE;
            for (int i = 0; i < 16; i++) {
                min = smaller(__shfl_sync(ALL_LANES, low, i, 16), min);
                max = larger(__shfl_sync(ALL_LANES, high, i, 16), max);
            }
            for (int i = whole; i < count; i++) {
                min = smaller(own[i], min);
                max = larger(own[i], max);
            }
            Parameters clipped = {0, 0};
            if (side.clip_mse) clipped = clip_token(own, count, min, max, max_code);
            __syncwarp();
            if (!exists) continue;
            const bool is_sink = sinks[token] >= 0;
            Parameters parameters = {0, 0};
            if (!is_sink && !fit(side, min, max, max_code, parameters) && lane == 0) refuse(unit, min, max);
            if (!is_sink && side.clip_mse) parameters = clipped;
            if (lane == 0) write_parameters(run.slot + token, first, parameters);
            const float scale = half_to_float(parameters.scale), zero = half_to_float(parameters.zero);
            for (int i = lane; i < count; i += 16)
                own[i] = is_sink ? 0.0f : (float)code_of(side, own[i], scale, zero, (float)max_code);
        }
    }

    /// The code of a row and lane whose token is of the run.
    __device__ int packed_code(int row, int lane) const {
        int channel = side.tokens_are_lanes ? row : lane, plane = 0;
        const int token = (side.tokens_are_lanes ? lane : row) - run.slot;
        if (side.planes)
            while (channel >= side.with[plane]) channel -= side.with[plane++];
        const int code = (int)x[token * stride + channel];
        return side.planes ? code >> (2 * plane) & 3 : code;
    }

    /// Packs the codes: a thread for each byte that holds one of the run.
    __device__ void pack() const {
        const int first_row = side.tokens_are_lanes ? 0 : run.slot, rows = side.tokens_are_lanes ? side.rows : run.count;
        const int first_lane = side.tokens_are_lanes ? run.slot : 0;
        const int end_lane = side.tokens_are_lanes ? run.slot + run.count : side.lanes;
        const int group_bytes = side.along_lanes ? stored::row_bytes(side.bits, side.group) : side.row_bytes;
        for (int i = threadIdx.x; i < rows * side.row_bytes; i += blockDim.x) {
            const int row = first_row + i / side.row_bytes, at = i % side.row_bytes, group = at / group_bytes;
            const int start = side.along_lanes ? group * side.group : 0;
            const int lanes = side.along_lanes ? min(side.group, side.lanes - start) : side.lanes;
            int place = at - group * group_bytes, width = stored::first_width(side.bits), shift = 0;
            int bytes = stored::plane_bytes(width, lanes);
            if (place >= bytes) {
                place -= bytes;
                shift = width;
                width = side.bits - width;
                bytes = stored::plane_bytes(width, lanes);
            }
            u8* target = page + side.codes + (i64)row * side.row_bytes + at;
            const int mask = (1 << width) - 1;
            int keep = side.tokens_are_lanes ? 0xff : 0, value = 0;
            for (int field = 0; field * width < 8; field++) {
                const int lane = start + place + field * bytes;
                if (lane >= start + lanes || lane < first_lane || lane >= end_lane) continue;
                keep &= ~(mask << (field * width));
                value |= (packed_code(row, lane) >> shift & mask) << (field * width);
            }
            if (keep == 0xff) continue;
            *target = (u8)(keep == 0 ? value : (*target & keep) | value);
        }
    }

    /// Channels in 16 bit.
    __device__ void keep_high(int head_dim) const {
        const int channels = stored::coded_channels(side), high = head_dim - channels;
        for (int i = threadIdx.x; i < run.count * high; i += blockDim.x) {
            const int token = i / high, channel = channels + i % high, slot = run.slot + token;
            const int row = (side.tokens_are_lanes ? channel : slot) - side.high_first_row;
            const int lane = (side.tokens_are_lanes ? slot : channel) - side.high_first_lane;
            ((u16*)(page + side.high_offset))[row * side.high_lanes + lane] = float_to_half(x[token * stride + channel]);
        }
    }
};

/// Squares of the norms of the values of a run's tokens in the model's own frame, in the order in which
/// dibit_cache::square_norm adds them: a warp for some tokens, a lane for every 32nd channel.
__device__ void square_norms(const Flush& flush, const Run& run, const Span& span, int head, float* norms) {
    constexpr int TOKENS = 2;
    const int d = flush.cache.head_dim, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const float* frame = flush.value_frame ? flush.value_frame + (i64)head * d * d : nullptr;
    for (int first = threadIdx.x / 32 * TOKENS; first < run.count; first += warps * TOKENS) {
        int positions[TOKENS];
        float sums[TOKENS] = {};
#pragma unroll
        for (int i = 0; i < TOKENS; i++)
            positions[i] = stored::position(flush.positions, run, min(first + i, run.count - 1));
        auto value = [&](int i, int channel) {
            return half_to_float(stored::recent(flush.cache, span, 0, head, positions[i], channel));
        };
        for (int channel = lane; channel < d; channel += 32) {
            float own[TOKENS] = {};
            if (frame) {
                for (int from = 0; from < d; from++) {
                    const float factor = frame[from * d + channel];
#pragma unroll
                    for (int i = 0; i < TOKENS; i++) own[i] += value(i, from) * factor;
                }
            } else {
#pragma unroll
                for (int i = 0; i < TOKENS; i++) own[i] = value(i, channel);
            }
#pragma unroll
            for (int i = 0; i < TOKENS; i++) sums[i] += own[i] * own[i];
        }
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            for (int step = 16; step > 0; step /= 2) sums[i] += __shfl_xor_sync(ALL_LANES, sums[i], step);
            if (lane == 0 && first + i < run.count) norms[first + i] = sums[i];
        }
    }
}

/// Chooses which tokens of a run its page protects, as dibit_cache::AutoSinks::choose does, by its values: `tokens` gets the
/// token of each place, -1 where it has none. `sinks` has the slots of tokens that are protected elsewhere, -1 for the
/// others. All threads of the block call it.
__device__ void choose_page_sinks(const Flush& flush, const Run& run, const Span& span, int head, const PageSinks& own,
                                  const int* sinks, int* tokens) {
    __shared__ float norms[PAGE_TOKENS];
    __shared__ int chosen[PAGE_TOKENS];
    __shared__ float median;
    square_norms(flush, run, span, head, norms);
    __syncthreads();
    const int token = threadIdx.x;
    const bool counts = token < run.count && sinks[token] < 0;
    const float norm = counts ? norms[token] : INFINITE;
    __syncthreads();
    if (token < run.count) norms[token] = norm;
    for (int place = threadIdx.x; place < own.places; place += blockDim.x) tokens[place] = -1;
    __syncthreads();
    int rank = 0, seen = 0;
    for (int other = 0; token < run.count && other < run.count; other++) {
        rank += norms[other] < norm || (norms[other] == norm && other < token);
        seen += norms[other] < INFINITE;
    }
    if (counts && rank == seen / 2) median = norm;
    __syncthreads();
    const bool small = counts && rank < own.places && norm < own.share * own.share * median;
    if (token < run.count) chosen[token] = small;
    __syncthreads();
    int place = 0;
    for (int other = 0; small && other < token; other++) place += chosen[other];
    if (small) tokens[place] = token;
    __syncthreads();
}

/// Keeps the rows of tokens that a page protects beside its codes: a warp for each place.
__device__ void keep_page_sinks(const Flush& flush, const Run& run, const Span& span, int head, const PageSinks& own,
                                const int* tokens, u8* page) {
    const Side plain = {};
    const int d = flush.cache.head_dim, lane = threadIdx.x % 32, max_code = 255;
    for (int place = threadIdx.x / 32; place < own.places; place += blockDim.x / 32) {
        const int token = tokens[place];
        if (run.keys && lane == 0) page[own.slots + place] = (u8)(token < 0 ? 0xff : run.slot + token);
        if (token < 0) continue;
        const int position = stored::position(flush.positions, run, token);
        auto number = [&](int channel) {
            return half_to_float(stored::recent(flush.cache, span, run.keys, head, position, channel));
        };
        float low = INFINITE, high = -INFINITE;
        for (int channel = lane; channel < d; channel += 32) {
            low = smaller(number(channel), low);
            high = larger(number(channel), high);
        }
        for (int step = 1; step < 32; step *= 2) {
            low = smaller(__shfl_xor_sync(ALL_LANES, low, step), low);
            high = larger(__shfl_xor_sync(ALL_LANES, high, step), high);
        }
        Parameters parameters;
        fit(plain, low, high, max_code, parameters);
        const float scale = half_to_float(parameters.scale), zero = half_to_float(parameters.zero);
        auto code = [&](int channel) { return code_of(plain, number(channel), scale, zero, (float)max_code); };
        u8* row = page + (run.keys ? own.keys : own.values) + place * own.row_bytes;
        if (lane < 2) ((u16*)row)[lane] = lane == 0 ? parameters.scale : parameters.zero;
        for (int channel = lane; channel < d; channel += 32) row[4 + channel] = (u8)code(channel);
    }
}

/// Finds the tokens that pages protect among those of runs, and keeps them. Blocks: runs, KV heads.
extern "C" __global__ void __launch_bounds__(ENCODE_THREADS) protect_in_pages(Flush flush) {
    if ((int)blockIdx.x >= *flush.run_count) return;
    __shared__ int sinks[PAGE_TOKENS], tokens[MOST_PAGE_SINKS];
    const Run run = flush.runs[blockIdx.x];
    const Span span = flush.spans[run.span];
    const int head = blockIdx.y;
    const ClassPages own = flush.classes[run.token_class];
    for (int i = threadIdx.x; i < run.count; i += blockDim.x)
        sinks[i] = stored::sink_slot(flush.cache, span, stored::position(flush.positions, run, i));
    __syncthreads();
    const PageSinks places = own.pages[head].sinks;
    choose_page_sinks(flush, run, span, head, places, sinks, tokens);
    keep_page_sinks(flush, run, span, head, places, tokens, stored::page_at(flush.cache, own, run.block, head));
}
EXPORT(protect_in_pages)

/// X <- H X along the 128 tokens of a page.
__device__ void rotate_tokens(float* x, int stride, int channels) {
    for (int half = 1; half < PAGE_TOKENS; half *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < PAGE_TOKENS / 2 * channels; i += blockDim.x) {
            const int pair = i / channels;
            float* at = x + (pair / half * 2 * half + pair % half) * stride + i % channels;
            const float a = at[0], b = at[half * stride];
            at[0] = a + b;
            at[half * stride] = a - b;
        }
    }
    __syncthreads();
    const float norm = 1.0f / sqrtf((float)PAGE_TOKENS);
    for (int i = threadIdx.x; i < PAGE_TOKENS * channels; i += blockDim.x) x[i / channels * stride + i % channels] *= norm;
    __syncthreads();
}

/// Packs all runs of a layer, behind `protect_in_pages` where its pages protect tokens. Blocks: runs, KV heads.
extern "C" __global__ void __launch_bounds__(ENCODE_THREADS) encode(Flush flush) {
    if ((int)blockIdx.x >= *flush.run_count) return;
    DYNAMIC_SHARED(shared);
    __shared__ int sinks[PAGE_TOKENS];
    const Run run = flush.runs[blockIdx.x];
    const Cache& cache = flush.cache;
    const Span span = flush.spans[run.span];
    const int head = blockIdx.y, d = cache.head_dim;
    const ClassPages own = flush.classes[run.token_class];
    u8* page = stored::page_at(cache, own, run.block, head);
    const Side side = run.keys ? own.pages[head].keys : own.pages[head].values;
    for (int i = threadIdx.x; i < run.count; i += blockDim.x)
        sinks[i] = stored::sink_slot(cache, span, stored::position(flush.positions, run, i));
    __syncthreads();
    const i64 block = (i64)blockIdx.x * gridDim.y + blockIdx.y;
    float* x = flush.spilled ? flush.spilled + block * flush.spilled_numbers : (float*)shared;
    const int stride = d + 1;
    for (int i = threadIdx.x; i < run.count * d; i += blockDim.x) {
        const int token = i / d, channel = i % d;
        const int position = stored::position(flush.positions, run, token);
        const u16 value = stored::recent(cache, span, run.keys, head, position, channel);
        if (sinks[token] >= 0) ((u16*)stored::sink(cache, span, run.keys, head, sinks[token]))[channel] = value;
        if (side.half_rows >= 0) {
            ((u16*)(page + side.half_rows))[(run.slot + token) * d + channel] = value;
        } else if (run.keys && flush.pre_rope.enabled) {
            const i64 row = (i64)(run.index + token) * cache.kv_heads * d;
            x[token * stride + channel] = flush.turned[row + flush.pre_rope.channels[head * d + channel]];
        } else if (run.keys && cache.key_order) {
            const u16 ordered = stored::recent(cache, span, 1, head, position, cache.key_order[head * d + channel]);
            x[token * stride + channel] = half_to_float(ordered);
        } else {
            x[token * stride + channel] = half_to_float(value);
        }
    }
    if (side.half_rows >= 0) return;
    __syncthreads();
    // Whatever protects a token, it has no part in what follows.
    const PageSinks& protected_here = own.pages[head].sinks;
    if ((int)threadIdx.x < protected_here.places) {
        const int slot = stored::page_sink_slot(protected_here, page, threadIdx.x);
        if (slot >= 0) sinks[slot - run.slot] = 0;
    }
    __syncthreads();
    if (side.token_hadamard) rotate_tokens(x, stride, d);
    const Encoding encoding = {flush, run, side, page, head, x, stride, sinks};
    if (side.along_lanes == side.tokens_are_lanes) {
        encoding.code_channels();
        __syncthreads();
        if (encoding.takes_feedback()) encoding.code_with_feedback();
    } else {
        encoding.code_tokens();
    }
    __syncthreads();
    encoding.pack();
    if (!side.planes) encoding.keep_high(d);
}
EXPORT(encode)
