// Compares attention by tiles with sums in double precision, over random pages of many forms.
//
// The same runs on a GPU: nvcc -std=c++17 -x cu -arch=sm_90 --expt-relaxed-constexpr tiles.cpp

#ifndef __CUDACC__
#define DIBIT_EMULATE
#endif
#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#include "../../kernels/prelude.cuh"
#include "../../kernels/layout.cuh"
#include "../../kernels/tiles/constants.cuh"
#include "../../kernels/tiles/tasks.cuh"
#include "../../kernels/tiles/fields.cuh"
#include "../../kernels/tiles/expansion.cuh"
#include "../../kernels/tiles/history.cuh"
#include "../../kernels/tiles/sums.cuh"
#include "../../kernels/tiles/biases.cuh"
#include "../../kernels/tiles/products.cuh"
#include "../../kernels/tiles.cu"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#ifdef __CUDACC__
namespace emulate {
static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    printf("FAIL %s\n", cudaGetErrorString(error));
    exit(1);
}
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, unsigned bytes, A... arguments) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<grid, block, bytes>>>((P)arguments...);
    check(cudaDeviceSynchronize());
}
}  // namespace emulate
static void* allocate(size_t bytes) {
    void* memory;
    emulate::check(cudaMallocHost(&memory, bytes));
    return memory;
}
static void release(void* memory) { cudaFreeHost(memory); }
#else
static void* allocate(size_t bytes) { return aligned_alloc(64, bytes); }
static void release(void* memory) { free(memory); }
#endif

static float to_float(u16 x) {
    int exponent = x >> 10 & 31, fraction = x & 1023;
    float size = exponent == 0 ? ldexpf((float)fraction, -24) : ldexpf((float)(1024 + fraction), exponent - 25);
    return x & 0x8000 ? -size : size;
}
/// Of a number within the range of fp16.
static u16 to_half(float x) {
    float size = fabsf(x);
    int exponent = 1;
    while (exponent < 30 && size >= ldexpf(1.0f, exponent - 14)) exponent++;
    int steps = (int)rintf(ldexpf(size, 25 - exponent));
    return (u16)((x < 0 ? 0x8000 : 0) + (exponent - 1) * 1024 + steps);
}

static u32 noise_state = 1;
static u32 noise() { return noise_state = noise_state * 1664525u + 1013904223u; }
/// Between -1 and 1.
static float uniform() { return (float)(int)(noise() >> 8 & 0xffff) / 32768.0f - 1.0f; }
/// About normal.
static float normal() { return (uniform() + uniform() + uniform()) * 1.2f; }

/// Memory whose parts begin at multiples of 64 bytes, and that begins as NaN.
template <class T>
struct Memory {
    T* data;
    size_t count;
    explicit Memory(size_t count) : count(count) {
        size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
        data = (T*)allocate(bytes);
        memset((void*)data, 0xff, bytes);
    }
    Memory(const Memory&) = delete;
    ~Memory() { release(data); }
    T& operator[](size_t i) { return data[i]; }
    T* begin() { return data; }
    T* end() { return data + count; }
};

/// How one side of pages is packed; bits is 16 where it is not, and 0 where channels have planes.
struct Form {
    int bits = 16, group = 128;
    /// Groups of channels (of a token) or of tokens (of a channel).
    bool by_token = false;
    bool integer = false;
    int high = 0;
};

static int place_side(Side& side, const Form& form, bool keys, int offset, const std::vector<int>& planes) {
    side = Side();
    if (form.bits == 16) {
        side.half_rows = offset;
        return offset + PAGE_TOKENS * HEAD_DIM * 2;
    }
    side.half_rows = -1;
    side.tokens_are_lanes = keys;
    side.along_lanes = !form.by_token == keys;
    side.bits = form.bits == 0 ? 2 : form.bits;
    side.integer_zero = form.integer;
    side.clip = 1;
    int low = HEAD_DIM - form.high;
    if (form.bits == 0) {
        side.planes = 1;
        side.channels = HEAD_DIM;
        low = 0;
        for (int c = 0; c < HEAD_DIM; c++)
            for (int i = 0; i < planes[c]; i++) side.with[i]++, low++;
    }
    side.rows = keys ? low : PAGE_TOKENS;
    side.lanes = keys ? PAGE_TOKENS : low;
    side.group = min(form.group, side.along_lanes ? side.lanes : side.rows);
    auto bytes = [&](int lanes) {
        if (side.bits == 3) return (lanes + 3) / 4 + (lanes + 7) / 8;
        if (side.bits == 6) return (lanes + 1) / 2 + (lanes + 3) / 4;
        return (lanes * side.bits + 7) / 8;
    };
    int step = side.along_lanes ? side.group : side.lanes;
    for (int first = 0; first < side.lanes; first += step) side.row_bytes += bytes(min(step, side.lanes - first));
    int groups = side.along_lanes ? (side.lanes + side.group - 1) / side.group * side.rows
                                  : (side.rows + side.group - 1) / side.group * side.lanes;
    side.codes = offset;
    side.scales = offset + side.rows * side.row_bytes;
    side.zeros = side.scales + 2 * (side.planes ? side.with[0] : groups);
    offset = side.zeros + 2 * (side.planes ? HEAD_DIM : groups);
    if (form.high > 0) {
        side.high_first_row = keys ? side.rows : 0;
        side.high_rows = keys ? form.high : side.rows;
        side.high_first_lane = keys ? 0 : side.lanes;
        side.high_lanes = keys ? side.lanes : form.high;
        side.high_offset = offset;
        offset += side.high_rows * side.high_lanes * 2;
    }
    return offset;
}

static void fill_side(const Side& side, u8* page) {
    if (side.half_rows >= 0) {
        u16* rows = (u16*)(page + side.half_rows);
        for (int i = 0; i < PAGE_TOKENS * HEAD_DIM; i++) rows[i] = to_half(normal());
        return;
    }
    for (int i = side.codes; i < side.scales; i++) page[i] = (u8)(noise() >> 16);
    u16 *scales = (u16*)(page + side.scales), *zeros = (u16*)(page + side.zeros);
    int count = (side.zeros - side.scales) / 2, most = (1 << side.bits) - 1;
    int zero_count = side.planes ? side.channels : count;
    for (int i = 0; i < count; i++) scales[i] = to_half((2.0f + uniform()) / (float)most);
    for (int i = 0; i < zero_count; i++)
        zeros[i] = to_half(side.integer_zero ? (float)(noise() >> 16) * most / 65536.0f : uniform() - 1.0f);
    if (side.integer_zero)
        for (int i = 0; i < zero_count; i++) zeros[i] = to_half(rintf(to_float(zeros[i])));
    u16* high = (u16*)(page + side.high_offset);
    for (int i = 0; i < side.high_rows * side.high_lanes; i++) high[i] = to_half(normal());
}

/// The code of one lane of a row of `lanes` codes of some bits.
static int code_at(int bits, const u8* row, int lanes, int lane) {
    auto plane = [&](const u8* from, int width) {
        int stride = (lanes + 8 / width - 1) / (8 / width);
        return from[lane % stride] >> lane / stride * width & ((1 << width) - 1);
    };
    if (bits == 3) return plane(row, 2) | plane(row + (lanes + 3) / 4, 1) << 2;
    if (bits == 6) return plane(row, 4) | plane(row + (lanes + 1) / 2, 2) << 4;
    return plane(row, bits);
}

/// A number of a page, by channel in the order of storage.
static double number_at(const Side& side, const u8* page, int token, int channel) {
    if (side.half_rows >= 0) return to_float(((const u16*)(page + side.half_rows))[token * HEAD_DIM + channel]);
    const u16 *scales = (const u16*)(page + side.scales), *zeros = (const u16*)(page + side.zeros);
    if (side.planes) {
        int code = 0, start = 0;
        for (int i = 0; i < 4; i++) {
            int field = start + channel;
            if (channel < side.with[i])
                code += (side.tokens_are_lanes
                             ? code_at(2, page + side.codes + field * side.row_bytes, PAGE_TOKENS, token)
                             : code_at(2, page + side.codes + token * side.row_bytes, side.lanes, field))
                        << 2 * i;
            start += side.with[i];
        }
        double scale = channel < side.with[0] ? to_float(scales[channel]) : 0.0;
        return scale * code + to_float(zeros[channel]);
    }
    int row = side.tokens_are_lanes ? channel : token, lane = side.tokens_are_lanes ? token : channel;
    if (row >= side.rows || lane >= side.lanes) {
        const u16* high = (const u16*)(page + side.high_offset);
        return to_float(high[(row - side.high_first_row) * side.high_lanes + lane - side.high_first_lane]);
    }
    const u8* bytes = page + side.codes + row * side.row_bytes;
    int code, index;
    if (side.along_lanes) {
        int group = lane / side.group, first = group * side.group;
        for (int g = 0; g < group; g++) {
            int n = side.group;
            bytes += side.bits == 3 ? (n + 3) / 4 + (n + 7) / 8
                     : side.bits == 6 ? (n + 1) / 2 + (n + 3) / 4 : (n * side.bits + 7) / 8;
        }
        code = code_at(side.bits, bytes, min(side.group, side.lanes - first), lane - first);
        index = group * side.rows + row;
    } else {
        code = code_at(side.bits, bytes, side.lanes, lane);
        index = row / side.group * side.lanes + lane;
    }
    double scale = to_float(scales[index]), zero = to_float(zeros[index]);
    return side.integer_zero ? scale * (code - zero) : scale * code + zero;
}

struct Case {
    const char* name;
    Form keys, values;
    /// Tokens of the window; 0: everything is in pages at once. Values leave it one by one where `kivi`.
    int window = 128;
    bool kivi = false;
    int sinks = 0;
    bool bias = false;
    int heads = 4, kv_heads = 2;
    bool incoming = true, halves = true;
    /// Cached tokens and rows of each span.
    std::vector<std::pair<int, int>> spans;
    float query_size = 1.0f;
};

/// Bytes of a page that are expanded.
static int packed_page_bytes(const Page& page) {
    int first = page.keys.half_rows < 0 ? 0 : page.values.codes;
    int end = page.values.half_rows < 0 ? page.bytes : page.values.half_rows;
    return page.keys.half_rows < 0 || page.values.half_rows < 0 ? end - first : 0;
}

/// Dynamic shared memory of the kernels: queries, a tile, and another or a page.
static int shared_bytes(bool many, int page_bytes) {
    bool large = HEAD_DIM > 128;
    int tile = 2 * (many && large ? TILE_BYTES<32> : TILE_BYTES<64>);
    return (many ? (large ? 64 : 128) * HEAD_DIM * 2 : 0) + tile + max(tile, page_bytes);
}

static int failures = 0;

static void run(const Case& c) {
    const int d = HEAD_DIM, shared = c.heads / c.kv_heads;
    bool packed = c.keys.bits != 16 || c.values.bits != 16;
    int count = (int)c.spans.size(), placed = 0, rows = 0, blocks = 0;
    Memory<Span> spans(c.spans.size());
    for (auto [cached, own] : c.spans) {
        Span span = {};
        span.slot = placed;
        span.first_row = rows;
        span.rows = own;
        span.cached = cached;
        int whole = max(0, cached - c.window) / 128 * 128;
        span.packed_keys = c.window == 0 ? cached : c.kivi ? cached / c.window * c.window : whole;
        span.packed_values = c.window == 0 ? cached : c.kivi ? max(0, cached - c.window) : whole;
        span.blocks = blocks;
        blocks += (max(span.packed_keys, span.packed_values) + 127) / 128;
        rows += own;
        spans[placed++] = span;
    }
    // Pages.
    Memory<Page> pages(c.kv_heads);
    int layer_bytes = 0;
    Memory<int> order(c.kv_heads * d);
    for (int h = 0; h < c.kv_heads; h++) {
        std::vector<int> planes(d), value_planes(d);
        for (int i = 0; i < d; i++) planes[i] = noise() >> 16 & 3, value_planes[i] = (noise() >> 16) % 5;
        int place = 0;
        for (int p = 4; p >= 0; p--)
            for (int i = 0; i < d; i++)
                if (planes[i] == p) order[h * d + place++] = i;
        int end = place_side(pages[h].keys, c.keys, true, 0, planes);
        end = place_side(pages[h].values, c.values, false, (end + 63) / 64 * 64, value_planes);
        pages[h].offset = layer_bytes;
        pages[h].bytes = (end + 63) / 64 * 64;
        layer_bytes += pages[h].bytes;
    }
    i64 layer_offset = 128, block_bytes = layer_offset + layer_bytes + 64;
    Memory<u8> pool(block_bytes * (blocks + 1));
    Memory<int> tables(blocks + 1);
    for (int i = 0; i < blocks; i++) {
        tables[i] = blocks - i;
        for (int h = 0; h < c.kv_heads; h++) {
            u8* page = pool.data + tables[i] * block_bytes + layer_offset + pages[h].offset;
            fill_side(pages[h].keys, page);
            fill_side(pages[h].values, page);
        }
    }
    // Rings, protected tokens, the pass in flight.
    int key_slots = c.kivi ? max(1, c.window) : c.window + 128, value_slots = c.kivi ? c.window + 1 : key_slots;
    i64 sequences = (i64)count * c.kv_heads;
    Memory<u16> key_ring(sequences * key_slots * d), value_ring(sequences * value_slots * d);
    Memory<u16> sink_keys(sequences * (c.sinks + 1) * d), sink_values(sequences * (c.sinks + 1) * d);
    Memory<int> sink_positions(count * (c.sinks + 1)), sink_counts(count);
    int capacity = c.sinks + 1, incoming_rows = rows + 3;
    i64 incoming_numbers = (i64)c.kv_heads * incoming_rows * d;
    Memory<float> incoming_keys(incoming_numbers), incoming_values(incoming_numbers);
    Memory<u16> halves(2 * incoming_numbers);
    auto ring = [&](u16* ring, int slots, const Span& s, int h, int token) {
        return ring + (((i64)s.slot * c.kv_heads + h) * slots + token % slots) * d;
    };
    for (const Span& s : spans) {
        sink_counts[s.slot] = c.sinks;
        for (int i = 0; i < c.sinks; i++)
            sink_positions[s.slot * capacity + i] = i < 2 ? 1 - i : (i * 97 + 5) % max(c.sinks * 97 + 6, s.cached);
        for (int h = 0; h < c.kv_heads; h++) {
            for (int t = s.packed_keys; t < s.cached; t++)
                for (int i = 0; i < d; i++) ring(key_ring.data, key_slots, s, h, t)[i] = to_half(normal());
            for (int t = s.packed_values; t < s.cached; t++)
                for (int i = 0; i < d; i++) ring(value_ring.data, value_slots, s, h, t)[i] = to_half(normal());
            i64 first = ((i64)s.slot * c.kv_heads + h) * capacity * d;
            for (int i = 0; i < c.sinks * d; i++) {
                sink_keys[first + i] = to_half(2 * normal());
                sink_values[first + i] = to_half(2 * normal());
            }
            for (int i = s.first_row * d; i < (s.first_row + s.rows) * d; i++) {
                incoming_keys[(i64)h * incoming_rows * d + i] = normal();
                incoming_values[(i64)h * incoming_rows * d + i] = normal();
            }
        }
    }
    Memory<float> q((i64)rows * c.heads * d);
    for (i64 i = 0; i < (i64)rows * c.heads * d; i++) q[i] = normal() * c.query_size;

    int splits = 1, many = 0, few = 0;
    for (const Span& s : spans) {
        int queries = s.rows * shared;
        if (few_queries(s.rows, shared)) {
            splits = max(splits, splits_of(s.cached));
            few += (queries + 15) / 16;
        } else {
            many += (queries + 63) / 64;
        }
    }
    Memory<float> partials((i64)rows * c.heads * splits * (d + 2));
    Attention a = {};
    const int* channel_order = c.keys.bits == 0 ? order.data : nullptr;
    a.cache = {pool.data, block_bytes, layer_offset, c.kv_heads, d, pages.data, key_ring.data, value_ring.data,
               key_slots, value_slots, sink_keys.data, sink_values.data, sink_positions.data, sink_counts.data,
               capacity, incoming_keys.data, incoming_values.data, incoming_rows, channel_order, c.bias};
    a.spans = spans.data;
    a.span_count = count;
    a.tables = tables.data;
    a.q = q.data;
    a.heads = c.heads;
    a.first_row = 0;
    a.row_count = rows;
    a.incoming = c.incoming;
    a.splits = splits;
    a.partials = partials.data;
    const u16* incoming = c.halves ? halves.data : nullptr;
    emulate::launch(halve_incoming, dim3((rows * d / 8 + 127) / 128, c.kv_heads), 128, 0, a.cache, rows, halves.data);
    int page_bytes = 0;
    for (Page& page : pages) page_bytes = max(page_bytes, packed_page_bytes(page));
    auto attend = [&](Attention a) {
        if (many > 0)
            emulate::launch(packed ? attend_packed_tiles : attend_tiles, dim3(many, c.kv_heads), 128,
                            shared_bytes(true, page_bytes), a, incoming);
        if (few > 0)
            emulate::launch(packed ? attend_packed_splits : attend_splits, dim3(few, c.kv_heads, splits), 128,
                            shared_bytes(false, page_bytes), a, incoming);
    };
    attend(a);

    auto page_of = [&](const Span& s, int h, int token) {
        return pool.data + tables[s.blocks + token / 128] * block_bytes + layer_offset + pages[h].offset;
    };
    double square = 0, error_square = 0, worst = 0;
    i64 numbers = 0;
    bool exact = true;
    for (const Span& s : spans) {
        for (int row = s.first_row; row < s.first_row + s.rows; row++)
            for (int head = 0; head < c.heads; head++) {
                int h = head / shared;
                const float* query = q.data + ((i64)row * c.heads + head) * d;
                int total = s.cached + (c.incoming ? row - s.first_row + 1 : 0);
                std::vector<double> logits(total);
                std::vector<double> out(d);
                std::vector<double> value(d);
                auto token_numbers = [&](int t, bool keys, std::vector<double>& x) {
                    int packed_tokens = keys ? s.packed_keys : s.packed_values;
                    const Side& side = keys ? pages[h].keys : pages[h].values;
                    if (t >= s.cached) {
                        i64 place = ((i64)h * incoming_rows + s.first_row + t - s.cached) * d;
                        for (int i = 0; i < d; i++) x[i] = (keys ? incoming_keys : incoming_values)[place + i];
                        return false;
                    }
                    if (t >= packed_tokens) {
                        u16* from = keys ? ring(key_ring.data, key_slots, s, h, t)
                                         : ring(value_ring.data, value_slots, s, h, t);
                        for (int i = 0; i < d; i++) x[i] = to_float(from[i]);
                        return false;
                    }
                    if (side.half_rows < 0)
                        for (int k = 0; k < c.sinks; k++) {
                            if (sink_positions[s.slot * capacity + k] != t) continue;
                            i64 place = (((i64)s.slot * c.kv_heads + h) * capacity + k) * d;
                            for (int i = 0; i < d; i++) x[i] = to_float((keys ? sink_keys : sink_values)[place + i]);
                            return false;
                        }
                    const u8* page = page_of(s, h, t);
                    for (int i = 0; i < d; i++)
                        x[keys && side.planes ? order[h * d + i] : i] = number_at(side, page, t % 128, i);
                    return side.half_rows < 0;
                };
                double top = -1e300;
                for (int t = 0; t < total; t++) {
                    bool rounded = token_numbers(t, true, value);
                    double sum = 0;
                    for (int i = 0; i < d; i++) sum += query[i] * value[i];
                    logits[t] = sum / sqrt((double)d);
                    if (rounded && c.bias) {
                        const Side& side = pages[h].keys;
                        const u8* page = page_of(s, h, t);
                        const u16* scales = (const u16*)(page + side.scales) + t % 128 / side.group * side.rows;
                        for (int i = 0; i < (side.planes ? side.with[0] : side.rows); i++) {
                            double x = 0.5 * query[side.planes ? order[h * d + i] : i] / sqrt((double)d);
                            x *= to_float(scales[i]);
                            if (fabs(x) > 1e-4) logits[t] -= log(sinh(x) / x);
                        }
                    }
                    top = fmax(top, logits[t]);
                }
                double normaliser = 0;
                for (int t = 0; t < total; t++) {
                    double weight = exp(logits[t] - top);
                    normaliser += weight;
                    token_numbers(t, false, value);
                    for (int i = 0; i < d; i++) out[i] += weight * value[i];
                }
                const float* parts = partials.data + ((i64)row * c.heads + head) * splits * (d + 2);
                double found_top = -INFINITY, found = 0;
                for (int k = 0; k < splits; k++) found_top = fmax(found_top, parts[k * (d + 2)]);
                std::vector<double> joined(d);
                int own = few_queries(s.rows, shared) ? splits_of(s.cached) : 1;
                for (int k = 0; k < splits; k++) {
                    const float* part = parts + k * (d + 2);
                    if (k >= own) {
                        exact &= part[0] == -INFINITY && part[1] == 0;
                        continue;
                    }
                    double weight = exp(part[0] - found_top);
                    found += weight * part[1];
                    for (int i = 0; i < d; i++) joined[i] += weight * part[2 + i];
                }
                exact &= fabs(found_top - top) < 0.02 * fmax(1.0, fabs(top) * 0.1);
                for (int i = 0; i < d; i++) {
                    double want = out[i] / normaliser, error = fabs(joined[i] / found - want);
                    square += want * want;
                    error_square += error * error;
                    numbers++;
                    worst = error > worst || error != error ? error : worst;
                    if (error != error) exact = false;
                }
            }
    }
    // Alone, and row by row where it is cut there, a span gets the same.
    Memory<float> again((i64)rows * c.heads * splits * (d + 2));
    a.partials = again.data;
    for (const Span& s : spans) {
        a.spans = &s;
        a.span_count = 1;
        int cut = s.rows > 1 ? s.rows / 2 : 1;
        for (int first = 0; first < s.rows; first += cut) {
            a.first_row = s.first_row + first;
            a.row_count = min(cut, s.rows - first);
            a.q = q.data + (i64)a.first_row * c.heads * d;
            a.partials = again.data + (i64)a.first_row * c.heads * splits * (d + 2);
            attend(a);
        }
    }
    for (i64 i = 0; i < (i64)rows * c.heads; i++)
        for (int k = 0; k < splits; k++) {
            i64 place = (i * splits + k) * (d + 2);
            if (memcmp(&partials[place], &again[place], 8) != 0) exact = false;
            bool empty = partials[place] == -INFINITY;
            if (!empty && memcmp(&partials[place], &again[place], 4 * (d + 2)) != 0) exact = false;
        }
    double rms = sqrt(square / (double)numbers), relative = sqrt(error_square / (double)numbers) / rms;
    bool good = exact && relative < 2e-3 && worst < 2e-2 * rms;
    printf("%s %-28s head_dim %3d error %.1e, worst %.1e, of rms\n", good ? "ok  " : "FAIL", c.name, d, relative,
           worst / rms);
    if (!exact) printf("     logits, empty splits or a span alone differ\n");
    fflush(stdout);
    failures += !good;
}

static Case make(const char* name, Form keys, Form values, std::vector<std::pair<int, int>> spans) {
    Case c;
    c.name = name;
    c.keys = keys;
    c.values = values;
    c.spans = std::move(spans);
    return c;
}

static Form packed(int bits, bool by_token, int group = 128, bool integer = false, int high = 0) {
    Form form;
    form.bits = bits;
    form.by_token = by_token;
    form.group = group;
    form.integer = integer;
    form.high = high;
    return form;
}

int main(int argc, char** argv) {
    std::vector<Case> cases;
    Form half;
    Case c = make("fp16 prefill", half, half, {{0, 45}, {0, 70}, {3, 1}});
    c.window = 0;
    cases.push_back(c);
    c.name = "fp16 prefill from f32";
    c.halves = false;
    cases.push_back(c);
    c = make("fp16 chunks and decode", half, half, {{130, 20}, {300, 1}, {64, 1}, {1, 3}, {257, 9}});
    c.window = 0;
    c.query_size = 3;
    cases.push_back(c);
    c = make("fp16 one KV head, large q", half, half, {{200, 1}, {77, 5}});
    c.window = 0;
    c.heads = 20, c.kv_heads = 1;
    c.query_size = 8;
    cases.push_back(c);
    c = make("fp16 four heads alone", half, half, {{4300, 1}, {129, 1}});
    c.window = 0;
    c.heads = c.kv_heads = 1;
    cases.push_back(c);
    c = make("kivi two bits", packed(2, false), packed(2, true), {{700, 1}, {300, 17}, {40, 2}, {0, 1}});
    cases.push_back(c);
    c = make("kivi's schedule, sinks", packed(2, false), packed(2, true), {{333, 1}, {401, 12}, {100, 1}});
    c.kivi = true;
    c.sinks = 4;
    cases.push_back(c);
    c = make("dibit planes, sinks, bias", packed(0, false), packed(0, false), {{500, 1}, {390, 11}, {385, 2}});
    c.sinks = 4;
    c.bias = true;
    cases.push_back(c);
    c = make("three bits, groups of 64", packed(3, false, 64), packed(3, true, 64), {{500, 1}, {390, 11}});
    c.bias = true;
    c.sinks = 3;
    cases.push_back(c);
    c = make("four bits, groups of 32", packed(4, false, 32), packed(4, true, 32), {{500, 1}, {390, 11}});
    cases.push_back(c);
    c = make("six bits, integer, tokens", packed(6, true, 64, true), packed(6, true, 128, true), {{431, 1}, {290, 11}});
    c.window = 0;
    c.incoming = false;
    cases.push_back(c);
    c = make("eight bits per channel", packed(8, false, 32), packed(8, false, 64), {{431, 1}, {290, 11}});
    cases.push_back(c);
    c = make("resq", packed(2, true, 128, false, 4), packed(2, true, 128, false, 4), {{431, 1}, {290, 11}});
    cases.push_back(c);
    c = make("resq-official", packed(2, true, 128, true, 16), packed(2, true, 128, true, 16), {{431, 1}, {290, 11}});
    c.window = 0;
    cases.push_back(c);
    c = make("keys in 16 bit", half, packed(2, true, 128), {{431, 1}, {290, 11}});
    c.sinks = 4;
    cases.push_back(c);
    c = make("values in 16 bit", packed(4, false, 128), half, {{431, 1}, {290, 11}});
    c.sinks = 2;
    cases.push_back(c);
    for (const Case& c : cases)
        if (argc < 2 || strstr(c.name, argv[1])) run(c);
    return failures > 0;
}
