// Products of a warp's queries with the keys of a tile, and of their weights with its values.

/// What a warp sees of a tile.
template <int BLOCKS>
struct View {
    /// The first token.
    int first;
    bool columns;
    /// Whether some of the tokens are hidden from some of the queries, and from which token of the tile on.
    bool masked;
    int limits[BLOCKS][2];
#if SPAN
    /// The first token of the tile that each query sees.
    int begins[BLOCKS][2];
#endif
    /// Whether biases are taken from products with the keys of all tokens but these.
    bool biased;
    u64 kept;
};

/// Adds 8 GROUPS tokens of a tile to the sums. fragments(block, step, registers) yields those of queries.
template <int BLOCKS, int GROUPS, int TOKENS, class Fragments>
__device__ __forceinline__ void attend(Sums<BLOCKS>& sums, const View<BLOCKS>& view, const u8* keys, const u8* values,
                                       const float (&biases)[BLOCKS][2], float softcap, Fragments fragments) {
    int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
    float s[BLOCKS][GROUPS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
            for (int j = 0; j < 4; j++) s[block][i][j] = 0.0f;

    auto multiply = [&](auto key_place) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 q[BLOCKS][4];
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) fragments(block, step, q[block]);
#pragma unroll
            for (int pair = 0; pair < GROUPS / 2; pair++) {
                u32 k[4];
                key_place(step, pair, k);
                u32 first[2] = {k[0], k[1]}, second[2] = {k[2], k[3]};
#pragma unroll
                for (int block = 0; block < BLOCKS; block++) {
                    mma_half(s[block][2 * pair], q[block], first);
                    mma_half(s[block][2 * pair + 1], q[block], second);
                }
            }
        }
    };
    if (view.columns)
        multiply([&](int step, int pair, u32 (&k)[4]) {
            int channel = 16 * step + matrix % 2 * 8 + line;
            load_matrices_transposed(k, keys + column_place<TOKENS>(channel, view.first / 8 + 2 * pair + matrix / 2));
        });
    else
        multiply([&](int step, int pair, u32 (&k)[4]) {
            int token = view.first + 16 * pair + matrix / 2 * 8 + line;
            load_matrices(k, keys + row_place(token, 2 * step + matrix % 2));
        });

    if (view.masked || view.biased || SOFTCAP) {
#if SOFTCAP
        float cap = softcap * LOG2_E;
#endif
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int token = view.first + 8 * i + lane % 4 * 2 + j % 2;
                    if (view.biased && !(view.kept >> token & 1)) s[block][i][j] -= biases[block][j / 2];
#if SOFTCAP
                    float unit = sums.unit[block][j / 2];
                    s[block][i][j] = cap * tanhf(s[block][i][j] * unit / cap) / unit;
                    if (!view.masked) continue;
#endif
                    if (token >= view.limits[block][j / 2]) s[block][i][j] = NO_LOGIT;
#if SPAN
                    if (token < view.begins[block][j / 2]) s[block][i][j] = NO_LOGIT;
#endif
                }
    }

    float top[BLOCKS][2];
    bool grows = false;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
        for (int which = 0; which < 2; which++) {
            float own = NO_LOGIT;
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                own = fmaxf(own, fmaxf(s[block][i][2 * which], s[block][i][2 * which + 1]));
            own = fmaxf(own, __shfl_xor_sync(ALL_LANES, own, 1));
            own = fmaxf(own, __shfl_xor_sync(ALL_LANES, own, 2));
            top[block][which] = own;
            grows |= own > sums.largest[block][which];
        }
    if (__any_sync(ALL_LANES, grows)) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
#pragma unroll
            for (int which = 0; which < 2; which++) {
                // Exactly 1 where the largest stays, so that a query does not depend on its neighbours.
                float before = sums.largest[block][which], after = fmaxf(before, top[block][which]);
                float factor = before == after ? 1.0f : exp2_fast((before - after) * sums.unit[block][which]);
                sums.largest[block][which] = after;
                sums.normaliser[block][which] *= factor;
#pragma unroll
                for (int i = 0; i < OUTPUTS; i++) {
                    sums.outputs[block][i][2 * which] *= factor;
                    sums.outputs[block][i][2 * which + 1] *= factor;
                }
            }
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        float origins[2] = {sums.origin(block, 0), sums.origin(block, 1)};
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[block][i][j] = exp2_fast(fmaf(s[block][i][j], sums.unit[block][j / 2], -origins[j / 2]));
                sums.normaliser[block][j / 2] += s[block][i][j];
            }
    }

#pragma unroll
    for (int pair = 0; pair < GROUPS / 2; pair++) {
        u32 p[BLOCKS][4];
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float(&two)[4] = s[block][2 * pair + i / 2];
                p[block][i] = pack_half(two[i % 2 * 2], two[i % 2 * 2 + 1]);
            }
        int token = view.first + 16 * pair + matrix % 2 * 8 + line;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 v[4];
            load_matrices_transposed(v, values + row_place(token, 2 * step + matrix / 2));
            u32 first[2] = {v[0], v[1]}, second[2] = {v[2], v[3]};
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                mma_half(sums.outputs[block][2 * step], p[block], first);
                mma_half(sums.outputs[block][2 * step + 1], p[block], second);
            }
        }
    }
}

/// Finds what the queries of a warp, from number `first` of the task on, see of some tokens of a tile. False where that
/// is nothing.
template <int BLOCKS>
__device__ __forceinline__ bool look(const Attention& a, const Task& task, const Tile& tile, int first, int first_token,
                                     int tokens, u64 kept, View<BLOCKS>& view) {
    if (first >= task.queries || first_token >= tile.count) return false;
    int begin = task.span.first_row + tile.first;
    int last = min(first + 16 * BLOCKS, task.queries) - 1;
    if (tile.incoming && query_row(task, last) - begin < first_token) return false;
    int lane = threadIdx.x % 32;
    view.first = first_token;
    view.columns = tile.columns;
    view.masked = (tile.incoming ? query_row(task, first) - begin + 1 : tile.count) < first_token + tokens;
    view.biased = tile.columns && a.cache.bias;
    view.kept = kept;
#if SPAN
    int position = tile.first + (tile.incoming ? task.span.cached : 0);
    // Later queries see less of what lies behind.
    if (a.first_seen(task.span, query_row(task, first)) - position >= first_token + tokens) return false;
    view.masked |= a.first_seen(task.span, query_row(task, last)) - position > first_token;
#endif
    if (!view.masked && !view.biased) return true;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
        for (int which = 0; which < 2; which++) {
            int query = min(first + 16 * block + 8 * which + lane / 4, last);
            view.limits[block][which] = tile.incoming ? query_row(task, query) - begin + 1 : tile.count;
#if SPAN
            view.begins[block][which] = a.first_seen(task.span, query_row(task, query)) - position;
#endif
        }
    return true;
}
