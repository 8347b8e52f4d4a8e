// Compares attend_packed with attention in double precision on random caches. Run by packed.sh.

#define DIBIT_EMULATE
#include "../../kernels/prelude.cuh"
#include "../../kernels/layout.cuh"
#include "../../kernels/stored.cuh"
#include "../../kernels/packed/constants.cuh"
#include "../../kernels/packed/sums.cuh"
#include "../../kernels/packed/sides.cuh"
#include "../../kernels/packed/queries.cuh"
#include "../../kernels/packed/copies.cuh"
#include "../../kernels/packed/logits.cuh"
#include "../../kernels/packed/values.cuh"
#include "../../kernels/packed/rows.cuh"
#include "../../kernels/packed/page_sinks.cuh"
#include "../../kernels/packed/pages.cuh"
#include "../../kernels/packed/plain.cuh"
#include "../../kernels/packed/join.cuh"
#include "../../kernels/packed.cu"

#include <math.h>
#include <stdio.h>

#include <algorithm>
#include <random>

static std::mt19937 generator(7);
static float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }
static float normal() { return std::normal_distribution<float>()(generator); }
static const u16 NOT_A_NUMBER = 0x7e00;

/// A kind of cache and a batch.
struct Case {
    const char* name;
    int kv_heads, shared;
    /// Cached tokens and rows of each span.
    std::vector<int> cached;
    int rows;
    /// Kivi's schedule: keys leave the window 128 at a time, values one by one. Else both leave together.
    bool kivi;
    /// No window: all tokens are packed, so that pages are filled in part.
    bool whole;
    /// Protected tokens.
    std::vector<int> sinks;
    bool correction;
    /// Whether the pass in flight is seen.
    bool incoming;
    float key_scale, value_scale;
    /// Queries are so many times larger than those of logits of about 1.
    float sharpness = 1;
};


/// A cache of random numbers, with the reference's view of it.
struct Fixture {
    const Case& c;
    std::vector<Page> pages;
    std::vector<u8> pool;
    std::vector<int> tables, order, positions, counts;
    std::vector<u16> key_ring, value_ring, sink_keys, sink_values;
    std::vector<float> incoming_keys, incoming_values, q, correction;
    std::vector<Span> spans;
    i64 block_bytes;
    int layer_bytes = 0, heads, rows, slots, capacity;

    Fixture(const Case& c) : c(c) {
        heads = c.kv_heads * c.shared;
        rows = (int)c.cached.size() * c.rows;
        slots = c.whole ? 1 : c.kivi ? 129 : 256;
        capacity = (int)c.sinks.size() + (c.sinks.empty() ? 0 : 2);
        for (int head = 0; head < c.kv_heads; head++) place(head);
        block_bytes = layer_bytes + 64;
        int blocks = 0;
        for (size_t i = 0; i < c.cached.size(); i++) {
            Span span = {};
            span.slot = (int)i;
            span.first_row = (int)i * c.rows;
            span.rows = c.rows;
            span.cached = c.cached[i];
            span.packed_keys = c.whole ? span.cached : c.kivi ? span.cached / 128 * 128 : std::max(span.cached - 128, 0) / 128 * 128;
            span.packed_values = c.kivi ? std::max(span.cached - 128, 0) : span.packed_keys;
            span.blocks = blocks;
            blocks += (span.packed_keys + 127) / 128 + 1;
            spans.push_back(span);
        }
        tables.resize(blocks);
        for (int i = 0; i < blocks; i++) tables[i] = i;
        std::shuffle(tables.begin(), tables.end(), generator);
        pool.resize(64 + block_bytes * blocks + 64);
        for (u8& byte : pool) byte = (u8)generator();
        for (const Span& span : spans)
            for (int i = 0; i * 128 < span.packed_keys; i++)
                for (int head = 0; head < c.kv_heads; head++) fill_parameters(span, i, head);
        for (int head = 0; head < c.kv_heads; head++) {
            std::vector<int> own(HEAD_DIM);
            for (int i = 0; i < HEAD_DIM; i++) own[i] = i;
            if (KEY_PLANES) std::shuffle(own.begin(), own.end(), generator);
            order.insert(order.end(), own.begin(), own.end());
        }
        fill_rows();
    }

    u8* page_at(const Span& span, int index, int head) {
        return start() + tables[span.blocks + index] * block_bytes + 64 + pages[head].offset;
    }
    u8* start() { return pool.data() + (64 - (u64)pool.data() % 64) % 64; }

    void place(int head) {
        Page page = {};
        Side& k = page.keys;
        k.half_rows = page.values.half_rows = -1;
        k.tokens_are_lanes = k.along_lanes = 1;
        k.bits = page.values.bits = 2;
        k.group = page.values.group = 128;
        k.integer_zero = INTEGER_KEYS;
        page.values.integer_zero = INTEGER_VALUES;
        k.rows = HEAD_DIM;
        int channels = HEAD_DIM, with = HEAD_DIM;
        k.lanes = 128;
        k.row_bytes = 32;
        if (KEY_PLANES) {
            int own[3][4] = {{HEAD_DIM - 7, HEAD_DIM / 3, 5, 0}, {HEAD_DIM / 2 + 1, 9, 0, 0}, {HEAD_DIM, HEAD_DIM - 3, 40, 2}};
            memcpy(k.with, own[head % 3], sizeof k.with);
            k.planes = k.with[0];
            k.channels = HEAD_DIM;
            k.rows = k.with[0] + k.with[1] + k.with[2] + k.with[3];
            with = k.with[0];
        }
        k.scales = k.rows * 32;
        k.zeros = k.scales + 2 * with;
        Side& v = page.values;
        v.codes = (k.zeros + 2 * channels + 63) / 64 * 64;
        v.rows = 128;
        v.lanes = HEAD_DIM;
        int count = 128;
        v.along_lanes = VALUE_COLUMNS == 0;
        if (VALUE_COLUMNS > 0) {
            count = HEAD_DIM;
            if (!INTEGER_VALUES) {
                // 4 bytes a row more than the channels take, an odd number of bytes, and a multiple of 16.
                int own[3][4] = {{HEAD_DIM - 9, 20, 4, 0}, {HEAD_DIM - 40, 3, 0, 0}, {HEAD_DIM / 2, HEAD_DIM / 2, 0, 0}};
                memcpy(v.with, own[head % 3], sizeof v.with);
                v.planes = count = v.with[0];
                v.channels = HEAD_DIM;
                v.lanes = v.with[0] + v.with[1] + v.with[2] + v.with[3];
            }
        }
        v.row_bytes = (v.lanes + 3) / 4;
        v.scales = v.codes + 128 * v.row_bytes;
        v.zeros = v.scales + 2 * count;
        int zeros = VALUE_COLUMNS > 0 ? HEAD_DIM : 128;
        int end = v.zeros + 2 * zeros;
        if (PAGE_SINKS) {
            // More than 16 places are two tiles.
            PageSinks& own = page.sinks;
            own.places = head % 2 ? 20 : 8;
            own.key_bytes = 4 + HEAD_DIM;
            own.value_bytes = 4 + HEAD_DIM / 2;
            own.slots = end;
            own.keys = own.slots + own.places;
            own.values = own.keys + own.places * own.key_bytes;
            end = own.values + own.places * own.value_bytes;
        }
        page.offset = layer_bytes;
        page.bytes = (end + 63) / 64 * 64;
        layer_bytes += page.bytes;
        pages.push_back(page);
    }

    void fill_parameters(const Span& span, int index, int head) {
        u8* page = page_at(span, index, head);
        const Page& own = pages[head];
        auto fill = [&](const Side& side, int scales, int zeros, float size) {
            for (int i = 0; i < zeros; i++) {
                float scale = size * uniform(0.1f, 1.0f);
                if (side.planes && i < side.planes) {
                    int planes = 0;
                    while (planes < 4 && i < side.with[planes]) planes++;
                    scale *= 3.0f / ((1 << (2 * planes)) - 1);
                }
                float zero = side.integer_zero ? uniform(0.0f, 3.0f) : size * uniform(-1.0f, 0.2f);
                if (i < scales) ((u16*)(page + side.scales))[i] = float_to_half(scale);
                ((u16*)(page + side.zeros))[i] = float_to_half(zero);
            }
        };
        fill(own.keys, KEY_PLANES ? own.keys.with[0] : HEAD_DIM, HEAD_DIM, c.key_scale);
        int count = VALUE_COLUMNS > 0 ? HEAD_DIM : 128;
        fill(own.values, own.values.planes ? own.values.planes : count, count, c.value_scale);
        if (PAGE_SINKS) fill_page_sinks(own.sinks, page, std::min(span.packed_keys - 128 * index, 128), 128 * index);
        // Parameters of tokens that are not there are no numbers.
        if (VALUE_COLUMNS == 0)
            for (int i = std::max(span.packed_values - 128 * index, 0); i < 128; i++)
                ((u16*)(page + own.values.scales))[i] = ((u16*)(page + own.values.zeros))[i] = NOT_A_NUMBER;
    }

    /// None, few or as many as there are places, of `count` tokens from `first` on.
    void fill_page_sinks(const PageSinks& own, u8* page, int count, int first) {
        int wanted = (int)(generator() % 3) * own.places / 2, place = 0;
        memset(page + own.slots, 0xff, own.places);
        for (int token = 0; token < count && place < wanted; token++) {
            if ((int)(generator() % 128) >= 2 * wanted) continue;
            if (std::find(c.sinks.begin(), c.sinks.end(), first + token) != c.sinks.end()) continue;
            page[own.slots + place] = (u8)token;
            u16* key = (u16*)(page + own.keys + place * own.key_bytes);
            u16* value = (u16*)(page + own.values + place * own.value_bytes);
            key[0] = float_to_half(c.key_scale * uniform(0.01f, 0.02f));
            key[1] = float_to_half(c.key_scale * uniform(-3.0f, -1.0f));
            value[0] = float_to_half(c.value_scale * uniform(0.1f, 0.2f));
            value[1] = float_to_half(c.value_scale * uniform(-1.5f, -1.0f));
            place++;
        }
    }

    /// Place of a token that its page protects; -1 where it is none.
    int place_of(const PageSinks& own, const u8* page, int token) const {
        for (int place = 0; page != nullptr && place < own.places; place++)
            if (page[own.slots + place] == token % 128) return place;
        return -1;
    }

    void fill_rows() {
        i64 sequences = (i64)spans.size() * c.kv_heads;
        key_ring.assign(sequences * slots * HEAD_DIM, NOT_A_NUMBER);
        value_ring = key_ring;
        sink_keys.assign(sequences * std::max(capacity, 1) * HEAD_DIM, NOT_A_NUMBER);
        sink_values = sink_keys;
        positions.assign(spans.size() * std::max(capacity, 1), -1);
        counts.assign(spans.size(), (int)c.sinks.size());
        auto row = [](std::vector<u16>& rows, i64 index, float size) {
            for (int i = 0; i < HEAD_DIM; i++) rows[index * HEAD_DIM + i] = float_to_half(size * normal());
        };
        for (const Span& span : spans)
            for (int head = 0; head < c.kv_heads; head++) {
                i64 own = (i64)span.slot * c.kv_heads + head;
                for (int token = span.packed_values; token < span.cached; token++) {
                    if (token >= span.packed_keys) row(key_ring, own * slots + token % slots, c.key_scale);
                    row(value_ring, own * slots + token % slots, c.value_scale);
                }
                for (size_t i = 0; i < c.sinks.size(); i++) {
                    positions[span.slot * capacity + i] = c.sinks[i];
                    if (c.sinks[i] < span.packed_keys) row(sink_keys, own * capacity + i, c.key_scale);
                    if (c.sinks[i] < span.packed_values) row(sink_values, own * capacity + i, c.value_scale);
                }
            }
        auto floats = [&](std::vector<float>& out, i64 count, float size) {
            out.resize(count);
            for (float& x : out) x = size * normal();
        };
        floats(incoming_keys, (i64)c.kv_heads * rows * HEAD_DIM, c.key_scale);
        floats(incoming_values, (i64)c.kv_heads * rows * HEAD_DIM, c.value_scale);
        floats(q, (i64)rows * heads * HEAD_DIM, c.sharpness / c.key_scale);
        floats(correction, (i64)rows * heads * (HEAD_DIM + 1), c.value_scale);
        for (size_t i = 0; i < correction.size(); i += HEAD_DIM + 1) correction[i] = uniform(0.0f, 2.0f);
    }

    static int code(const u8* row, int row_bytes, int lane) { return row[lane % row_bytes] >> (lane / row_bytes * 2) & 3; }

    /// A number of a page: channel of the keys' storage order, or of the values.
    double packed(const Side& side, const u8* page, int token, int channel) const {
        const u16* scales = (const u16*)(page + side.scales);
        const u16* zeros = (const u16*)(page + side.zeros);
        int parameter = side.tokens_are_lanes || !side.along_lanes ? channel : token;
        double zero = half_to_float(zeros[parameter]);
        int sum = 0, start = 0;
        for (int plane = 0; plane < 4; plane++) {
            int with = side.planes ? side.with[plane] : plane == 0 ? HEAD_DIM : 0;
            int row = side.tokens_are_lanes ? start + channel : token, lane = side.tokens_are_lanes ? token : start + channel;
            if (channel < with) sum += code(page + side.codes + row * side.row_bytes, side.row_bytes, lane) << (2 * plane);
            start += with;
        }
        if (side.planes && channel >= side.planes) return zero;
        double scale = half_to_float(scales[parameter]);
        return side.integer_zero ? scale * (sum - zero) : scale * sum + zero;
    }

    /// One query's output.
    void reference(int row, int head, double* out) {
        const Span& span = spans[row / c.rows];
        int kv_head = head / c.shared;
        i64 own = (i64)span.slot * c.kv_heads + kv_head;
        const Page& layout = pages[kv_head];
        const float* query = &q[((i64)row * heads + head) * HEAD_DIM];
        std::vector<double> logits, values;
        int incoming = c.incoming ? row - span.first_row + 1 : 0;
        for (int token = 0; token < span.cached + incoming; token++) {
            double logit = 0;
            auto sink = std::find(c.sinks.begin(), c.sinks.end(), token);
            i64 sink_row = own * capacity + (sink - c.sinks.begin());
            const u8* page = token < span.packed_keys ? page_at(span, token / 128, kv_head) : nullptr;
            i64 fresh = ((i64)kv_head * rows + span.first_row + token - span.cached) * HEAD_DIM;
            bool protected_key = token < span.packed_keys && sink != c.sinks.end();
            int place = place_of(layout.sinks, page, token);
            for (int i = 0; i < HEAD_DIM; i++) {
                int channel = i;
                double key;
                if (protected_key)
                    key = half_to_float(sink_keys[sink_row * HEAD_DIM + i]);
                else if (place >= 0)
                    key = stored::page_sink_number(layout.sinks, page, true, place, i, HEAD_DIM);
                else if (page != nullptr) {
                    channel = order[kv_head * HEAD_DIM + i];
                    key = packed(layout.keys, page, token % 128, i);
                } else if (token < span.cached)
                    key = half_to_float(key_ring[(own * slots + token % slots) * HEAD_DIM + i]);
                else
                    key = incoming_keys[fresh + i];
                double x = query[channel] / sqrt(HEAD_DIM);
                logit += x * key;
                if (BIAS && page != nullptr && !protected_key && place < 0 && (!KEY_PLANES || i < layout.keys.with[0])) {
                    double a = fabs(x * half_to_float(((const u16*)(page + layout.keys.scales))[i]) / 2);
                    if (a > 1e-4) logit -= log(sinh(a) / a);
                }
            }
            logits.push_back(logit);
            for (int i = 0; i < HEAD_DIM; i++) {
                double value;
                if (token < span.packed_values && sink != c.sinks.end())
                    value = half_to_float(sink_values[sink_row * HEAD_DIM + i]);
                else if (place >= 0)
                    value = stored::page_sink_number(layout.sinks, page, false, place, i, HEAD_DIM);
                else if (token < span.packed_values)
                    value = packed(layout.values, page, token % 128, i);
                else if (token < span.cached)
                    value = half_to_float(value_ring[(own * slots + token % slots) * HEAD_DIM + i]);
                else
                    value = incoming_values[fresh + i];
                values.push_back(value);
            }
        }
        double top = *std::max_element(logits.begin(), logits.end()), weight = 0;
        std::fill(out, out + HEAD_DIM, 0.0);
        const float* own_correction = &correction[((i64)row * heads + head) * (HEAD_DIM + 1)];
        if (c.correction) {
            weight = own_correction[0];
            for (int i = 0; i < HEAD_DIM; i++) out[i] = own_correction[1 + i];
        }
        for (size_t token = 0; token < logits.size(); token++) {
            double p = exp(logits[token] - top);
            weight += p;
            for (int i = 0; i < HEAD_DIM; i++) out[i] += p * values[token * HEAD_DIM + i];
        }
        for (int i = 0; i < HEAD_DIM; i++) out[i] /= weight;
    }

    /// Splits of a span, as the host counts them.
    int splits(const Span& span) const {
        int pages = (span.packed_keys + 127) / 128, size = split_pages(pages);
        int most = multiple(capacity + span.cached - span.packed_keys, 16) + (c.incoming ? span.rows : 0);
        return (pages + size - 1) / size + (most + PLAIN_TOKENS - 1) / PLAIN_TOKENS;
    }

    /// Output of the spans from `first` on.
    std::vector<float> attend(int first, int count, int more_splits) {
        Attention a = {};
        a.cache.pool = start();
        a.cache.block_bytes = block_bytes;
        a.cache.layer_offset = 64;
        a.cache.kv_heads = c.kv_heads;
        a.cache.head_dim = HEAD_DIM;
        a.cache.pages = pages.data();
        a.cache.key_ring = key_ring.data();
        a.cache.value_ring = value_ring.data();
        a.cache.key_slots = a.cache.value_slots = slots;
        a.cache.sink_keys = sink_keys.data();
        a.cache.sink_values = sink_values.data();
        a.cache.sink_positions = positions.data();
        a.cache.sink_counts = counts.data();
        a.cache.sink_capacity = capacity;
        a.cache.incoming_keys = incoming_keys.data();
        a.cache.incoming_values = incoming_values.data();
        a.cache.incoming_rows = rows;
        a.cache.key_order = KEY_PLANES ? order.data() : nullptr;
        a.cache.bias = BIAS;
        a.spans = &spans[first];
        a.span_count = count;
        a.tables = tables.data();
        a.first_row = first * c.rows;
        a.row_count = count * c.rows;
        a.q = &q[(i64)a.first_row * heads * HEAD_DIM];
        a.heads = heads;
        a.incoming = c.incoming;
        a.splits = more_splits;
        int memory = 0;
        for (int i = first; i < first + count; i++) a.splits = std::max(a.splits, more_splits + splits(spans[i]));
        for (const Page& page : pages) {
            int own = WARPS * (SLOTS * std::max(key_bytes(page.keys), value_bytes(page.values)) + (VALUE_COLUMNS > 0 ? 2048 + 32 * bare_channels(page.values) : 0));
            own += operand_bytes(page.keys);
            memory = std::max(memory, own);
        }
        std::vector<float> partials((i64)a.row_count * heads * a.splits * (HEAD_DIM + 2), NAN);
        std::vector<float> out((i64)a.row_count * heads * HEAD_DIM, NAN);
        a.partials = partials.data();
        int tiles = (c.rows * c.shared + 7) / 8;
        emulate::launch(attend_packed, dim3(c.kv_heads * tiles, count, a.splits), 32 * WARPS, memory, a);
        const float* added = c.correction ? &correction[(i64)a.first_row * heads * (HEAD_DIM + 1)] : nullptr;
        for (int query = 0; query < a.row_count * heads; query++)
            join_splits(a, query, added == nullptr ? nullptr : added + (i64)query * (HEAD_DIM + 1),
                        &out[(i64)query * HEAD_DIM]);
        return out;
    }

    /// Joins the splits of a query. A correction adds to the normaliser and to the values in the frame of the largest
    /// logit.
    static void join_splits(const Attention& a, int query, const float* added, float* out) {
        const float* own = a.partials + (i64)query * a.splits * (HEAD_DIM + 2);
        double top = -INFINITY, weight = added == nullptr ? 0 : added[0];
        double values[HEAD_DIM] = {};
        for (int split = 0; split < a.splits; split++) top = std::max(top, (double)own[split * (HEAD_DIM + 2)]);
        for (int i = 0; added != nullptr && i < HEAD_DIM; i++) values[i] = added[1 + i];
        for (int split = 0; split < a.splits; split++) {
            const float* part = own + split * (HEAD_DIM + 2);
            // Splits that the query does not have hold anything.
            if (part[0] == -INFINITY) continue;
            double factor = exp(part[0] - top);
            weight += factor * part[1];
            for (int i = 0; i < HEAD_DIM; i++) values[i] += factor * part[2 + i];
        }
        for (int i = 0; i < HEAD_DIM; i++) out[i] = (float)(values[i] / weight);
    }
};

/// Runs a case; returns whether it is right.
static bool run(const Case& c) {
    Fixture fixture(c);
    std::vector<float> out = fixture.attend(0, (int)c.cached.size(), 0);
    double worst = 0;
    bool numbers = true;
    for (int row = 0; row < fixture.rows; row++)
        for (int head = 0; head < fixture.heads; head++) {
            double want[HEAD_DIM], square = 0, most = 0;
            fixture.reference(row, head, want);
            for (int i = 0; i < HEAD_DIM; i++) {
                double x = out[((i64)row * fixture.heads + head) * HEAD_DIM + i];
                numbers &= std::isfinite(x);
                square += want[i] * want[i];
                most = std::max(most, fabs(x - want[i]));
            }
            worst = std::max(worst, most / sqrt(square / HEAD_DIM));
        }
    bool same = true;
    for (size_t i = 0; i < c.cached.size(); i++) {
        std::vector<float> own = fixture.attend((int)i, 1, (int)i);
        same &= !memcmp(own.data(), &out[i * own.size()], own.size() * 4);
    }
    bool good = numbers && worst < 4e-3 && same;
    printf("%s head_dim %d bias %d integer %d%d planes %d columns %d page sinks %d: %s, off by %.1e of the root mean square%s%s\n", good ? "ok  " : "FAIL", HEAD_DIM,
           BIAS, INTEGER_KEYS, INTEGER_VALUES, KEY_PLANES, VALUE_COLUMNS, PAGE_SINKS, c.name, worst, numbers ? "" : ", not finite", same ? "" : ", not the same alone");
    fflush(stdout);
    return good;
}

int main() {
    bool good = true;
    std::vector<int> lengths = {0, 1, 127, 128, 129, 255, 256, 384, 1000};
    good &= run({"8 queries a head", 2, 8, lengths, 1, false, false, {}, false, true, 1, 1});
    good &= run({"one query a head", 3, 1, {5000, 300}, 1, false, false, {}, true, true, 1, 0.01f});
    good &= run({"two queries, stored already", 3, 2, {0 + 1, 600}, 1, false, false, {0, 1, 2, 3}, false, false, 1, 30});
    good &= run({"4 queries, sinks, small values", 2, 4, {3, 700, 1300}, 1, false, false, {0, 5, 131, 640, 900}, false, true, 3, 1e-3f});
    good &= run({"16 queries", 1, 16, {900}, 1, false, false, {2}, false, true, 2, 1, 3});
    good &= run({"rows of one pass", 1, 3, {400, 17}, 5, false, false, {1}, false, true, 1, 1});
    good &= run({"no window", 2, 2, {40, 130, 640}, 1, false, true, {7, 129}, false, true, 1, 1});
    if (LATE_VALUES)
        good &= run({"KIVI's schedule", 2, 4, {127, 128, 300, 511, 1000}, 1, true, false, {0, 3, 200, 290}, false, true, 1, 0.05f});
    return !good;
}
