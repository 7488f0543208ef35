// The routed product of one layer, for all adapters of a batch, in one call on the CPU.
//
//   phase 1   h = A x and z = W_r x       work items: token block x rows
//   gate      h * w s, the rows left      work items: tokens
//   phase 2   y += B^T h                  work items: token block x columns
//
// Weights are stacked as in guilomo_serve/ops/layer.py. All sums are in float32. Written with GCC's
// vector extensions, so that it is as wide as the machine it is compiled on (-march=native); the one
// instruction spelt out is the bfloat16 dot product.
//
// A token block's rows and columns are shared out among the threads: few tokens (decode) still
// keep every thread busy, and each weight is read once per block.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using bf16 = uint16_t;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t Four __attribute__((vector_size(16)));

// Sixteen accumulators: they fill half of the 32 vector registers, the operands the rest.
constexpr int TILE = 4;              // tokens and rows of a product
constexpr int VECTORS = 8;           // of columns in a sum of rows
constexpr int BLOCK_TOKENS = 32;   // a block of inputs stays in the first-level cache
constexpr int CHUNK_ROWS = 8;
constexpr int CHUNK_COLUMNS = 128;

// One module's part of a layer (q of qkv); ranges are half open.
struct Slice {
    int64_t row_begin, row_end;          // of A
    int64_t expert_begin, expert_end;    // of the router; empty for a single expert
    int64_t column_begin, column_end;    // of y
    const void* b;                       // [rows, columns]
};

// One adapter's weights for one layer.
struct Layer {
    int64_t in_features, rows, experts, top_k, slices;
    const void* a;                       // [rows, in]
    const float* router;                 // [experts, in]
    const float* row_scale;              // [rows]
    const int32_t* expert_of_row;        // [rows], -1 for a module with a single expert
    Slice slice[];

    // Weighted rows of a token: each slice has room for one more, so that rows go in pairs.
    int64_t places() const { return rows + slices; }
};

// Tokens of one adapter and what is known of them; X is the type of x, y, A and B.
template <typename X>
struct Block {
    const Layer* layer;
    const int32_t* tokens;               // rows of x and y
    int count;
    float* h;                            // [count, rows] A x
    float* z;                            // [count, experts] logits, then the experts' weights
    X* weights;                          // [count, places] of the rows that are left, by slice
    int32_t* rows;                       // [count, places] and which of B's rows they are
    int32_t* counts;                     // [count, slices] how many are left
};

struct Item {
    int block, slice;
    int64_t begin, end;                  // phase 1: rows (slice -1 of A, -2 of the router)
};                                       // phase 2: columns within the slice

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Floats load(const bf16* p) {
    Halves v;
    std::memcpy(&v, p, sizeof v);
    return (Floats)(__builtin_convertvector(v, Words) << 16);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// The nearest bfloat16, ties to even. A NaN stays one: those that arise here have no low bits set.
inline Words rounded(Floats v) {
    const Words w = (Words)v;
    return (w + 0x7fff + ((w >> 16) & 1)) >> 16;
}

inline void store(bf16* p, Floats v) {
    Halves h = __builtin_convertvector(rounded(v), Halves);
    std::memcpy(p, &h, sizeof h);
}

inline float as_float(float v) { return v; }

inline float as_float(bf16 v) {
    uint32_t w = (uint32_t)v << 16;
    float f;
    std::memcpy(&f, &w, sizeof f);
    return f;
}

inline void from_float(float* p, float v) { *p = v; }

inline void from_float(bf16* p, float v) {
    uint32_t w;
    std::memcpy(&w, &v, sizeof w);
    *p = (bf16)((w + 0x7fff + ((w >> 16) & 1)) >> 16);
}

inline Quad fold(Floats v) {
    Quad part[LANES / 4];
    std::memcpy(part, &v, sizeof v);
    Quad total = part[0];
    for (int i = 1; i < LANES / 4; i++) total += part[i];
    return total;
}

// Lane i is the sum of the i-th argument.
inline Quad sums(Quad a, Quad b, Quad c, Quad d) {
    const Quad ab = __builtin_shuffle(a, b, Four{0, 4, 1, 5}) + __builtin_shuffle(a, b, Four{2, 6, 3, 7});
    const Quad cd = __builtin_shuffle(c, d, Four{0, 4, 1, 5}) + __builtin_shuffle(c, d, Four{2, 6, 3, 7});
    return __builtin_shuffle(ab, cd, Four{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, Four{2, 3, 6, 7});
}

// out[r] = x . w_r: the vector sums of a tile's rows, and the last n - k elements.
template <int R, typename X, typename W>
void finish(const Floats* total, const X* x, const W* w, int64_t k, int64_t n, float* out) {
    Quad rows[TILE] = {};
    for (int r = 0; r < R; r++) rows[r] = fold(total[r]);
    const Quad summed = sums(rows[0], rows[1], rows[2], rows[3]);
    std::memcpy(out, &summed, R * sizeof(float));
    for (; k < n; k++)
        for (int r = 0; r < R; r++) out[r] += as_float(x[k]) * as_float(w[r * n + k]);
}

// out[t * stride + r] = x_t . w_r, for a tile of T tokens and R rows.
template <int T, int R, typename X, typename W>
void dot_tile(const X* const* x, const W* w, int64_t n, float* out, int64_t stride) {
    Floats total[T][R] = {};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        Floats xs[T];
        for (int t = 0; t < T; t++) xs[t] = load(x[t] + k);
        for (int r = 0; r < R; r++) {
            Floats ws = load(w + r * n + k);
            for (int t = 0; t < T; t++) total[t][r] += xs[t] * ws;
        }
    }
    for (int t = 0; t < T; t++) finish<R>(total[t], x[t], w, k, n, out + t * stride);
}

#if defined(__AVX512BF16__)
template <int T, int R>
void dot_tile(const bf16* const* x, const bf16* w, int64_t n, float* out, int64_t stride) {
    Floats total[T][R] = {};
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) {
        __m512bh xs[T];
        for (int t = 0; t < T; t++) xs[t] = (__m512bh)_mm512_loadu_si512(x[t] + k);
        for (int r = 0; r < R; r++) {
            __m512bh ws = (__m512bh)_mm512_loadu_si512(w + r * n + k);
            for (int t = 0; t < T; t++)
                total[t][r] = (Floats)_mm512_dpbf16_ps((__m512)total[t][r], xs[t], ws);
        }
    }
    for (int t = 0; t < T; t++) finish<R>(total[t], x[t], w, k, n, out + t * stride);
}
#endif

template <int T, typename X, typename W>
void dot_rows(const X* const* x, const W* w, int64_t rows, int64_t n, float* out, int64_t stride) {
    int64_t r = 0;
    for (; r + TILE <= rows; r += TILE) dot_tile<T, TILE>(x, w + r * n, n, out + r, stride);
    switch (rows - r) {
        case 3: dot_tile<T, 3>(x, w + r * n, n, out + r, stride); break;
        case 2: dot_tile<T, 2>(x, w + r * n, n, out + r, stride); break;
        case 1: dot_tile<T, 1>(x, w + r * n, n, out + r, stride); break;
    }
}

template <typename X, typename W>
void shrink(const Block<X>& block, const X* x, int64_t x_stride, const W* w, int64_t rows,
            float* out, int64_t stride) {
    const int64_t n = block.layer->in_features;
    for (int t = 0; t < block.count; t += TILE) {
        const X* tokens[TILE];
        const int count = std::min(TILE, block.count - t);
        for (int i = 0; i < count; i++) tokens[i] = x + block.tokens[t + i] * x_stride;
        float* to = out + t * stride;
        switch (count) {
            case 4: dot_rows<4>(tokens, w, rows, n, to, stride); break;
            case 3: dot_rows<3>(tokens, w, rows, n, to, stride); break;
            case 2: dot_rows<2>(tokens, w, rows, n, to, stride); break;
            case 1: dot_rows<1>(tokens, w, rows, n, to, stride); break;
        }
    }
}

// Softmax over the k largest logits, 0 elsewhere (the renormalised top-k of the softmax).
void route(float* z, int64_t experts, int64_t top_k) {
    uint64_t chosen_low = 0;
    std::vector<char> chosen_many;       // more than 64 experts are legal, and rare
    if (experts > 64) chosen_many.assign(experts, 0);
    auto is_chosen = [&](int64_t e) -> bool {
        return experts > 64 ? chosen_many[e] != 0 : (chosen_low >> e) & 1;
    };
    const int64_t k = std::min(top_k, experts);
    float largest = 0, total = 0;
    for (int64_t i = 0; i < k; i++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++)
            if (!is_chosen(e) && (best < 0 || z[e] > z[best])) best = e;
        if (i == 0) largest = z[best];
        if (experts > 64) chosen_many[best] = 1;
        else chosen_low |= (uint64_t)1 << best;
    }
    for (int64_t e = 0; e < experts; e++) {
        z[e] = is_chosen(e) ? std::exp(z[e] - largest) : 0.0f;
        total += z[e];
    }
    for (int64_t e = 0; e < experts; e++) z[e] /= total;
}

// Weighs a token's rows and keeps those that an expert of its choice has.
template <typename X>
void gate(const Block<X>& block, int t) {
    const Layer& layer = *block.layer;
    const float* h = block.h + t * layer.rows;
    float* z = block.z + t * layer.experts;
    X* weights = block.weights + t * layer.places();
    int32_t* rows = block.rows + t * layer.places();
    for (int64_t s = 0; s < layer.slices; s++) {
        const Slice& slice = layer.slice[s];
        const bool routed = slice.expert_end > slice.expert_begin;
        if (routed)
            route(z + slice.expert_begin, slice.expert_end - slice.expert_begin, layer.top_k);
        const int64_t first = slice.row_begin + s;
        int64_t last = first;
        for (int64_t r = slice.row_begin; r < slice.row_end; r++) {
            const float weight = routed ? z[layer.expert_of_row[r]] : 1.0f;
            if (weight == 0) continue;   // left out, even where the row overflowed
            from_float(weights + last, h[r] * weight * layer.row_scale[r]);
            rows[last++] = (int32_t)(r - slice.row_begin);
        }
        block.counts[t * layer.slices + s] = (int32_t)(last - first);
        if (last == first) continue;
        weights[last] = 0;               // rows go in pairs: an odd one gets a partner
        rows[last] = rows[last - 1];
    }
}

// y += sum over `count` rows of weight b[row], for V vectors of columns.
template <int V, typename X>
void expand_tile(X* y, const X* b, int64_t stride, const X* weights, const int32_t* rows,
                 int count) {
    Floats total[V];
    for (int v = 0; v < V; v++) total[v] = load(y + v * LANES);
    for (int i = 0; i < count; i++) {
        const X* row = b + rows[i] * stride;
        const float weight = as_float(weights[i]);
        for (int v = 0; v < V; v++) total[v] += load(row + v * LANES) * weight;
    }
    for (int v = 0; v < V; v++) store(y + v * LANES, total[v]);
}

#if defined(__AVX512BF16__)
// Two rows at a time: interleaved, they are what the dot product takes. Interleaving is done within
// 128 bits, so the totals hold columns 0-3 and 4-7 of each eight; y is taken apart in the same way.
template <int V>
void expand_tile(bf16* y, const bf16* b, int64_t stride, const bf16* weights, const int32_t* rows,
                 int count) {
    constexpr int PAIRS = V / 2;
    static_assert(LANES == 16 && V % 2 == 0);
    const __m512i zero = _mm512_setzero_si512();
    __m512 low[PAIRS], high[PAIRS];
    for (int v = 0; v < PAIRS; v++) {
        const __m512i old = _mm512_loadu_si512(y + v * 32);
        low[v] = (__m512)_mm512_unpacklo_epi16(zero, old);
        high[v] = (__m512)_mm512_unpackhi_epi16(zero, old);
    }
    for (int i = 0; i < count; i += 2) {
        const bf16 *first = b + rows[i] * stride, *second = b + rows[i + 1] * stride;
        int32_t pair;
        std::memcpy(&pair, weights + i, sizeof pair);
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < PAIRS; v++) {
            const __m512i one = _mm512_loadu_si512(first + v * 32);
            const __m512i two = _mm512_loadu_si512(second + v * 32);
            low[v] = _mm512_dpbf16_ps(low[v], weight, (__m512bh)_mm512_unpacklo_epi16(one, two));
            high[v] = _mm512_dpbf16_ps(high[v], weight, (__m512bh)_mm512_unpackhi_epi16(one, two));
        }
    }
    for (int v = 0; v < PAIRS; v++)
        _mm512_storeu_si512(y + v * 32, _mm512_packus_epi32((__m512i)rounded((Floats)low[v]),
                                                            (__m512i)rounded((Floats)high[v])));
}
#endif

template <typename X>
void expand(const Block<X>& block, const Item& item, X* y, int64_t y_stride) {
    const Layer& layer = *block.layer;
    const Slice& slice = layer.slice[item.slice];
    const int64_t stride = slice.column_end - slice.column_begin;
    const X* b = (const X*)slice.b;
    for (int t = 0; t < block.count; t++) {
        X* to = y + block.tokens[t] * y_stride + slice.column_begin;
        const int64_t first = t * layer.places() + slice.row_begin + item.slice;
        const X* weights = block.weights + first;
        const int32_t* rows = block.rows + first;
        const int count = block.counts[t * layer.slices + item.slice];
        int64_t c = item.begin;
        for (; c + VECTORS * LANES <= item.end; c += VECTORS * LANES)
            expand_tile<VECTORS>(to + c, b + c, stride, weights, rows, count);
        for (; c + 2 * LANES <= item.end; c += 2 * LANES)
            expand_tile<2>(to + c, b + c, stride, weights, rows, count);
        for (; c < item.end; c++) {
            float total = as_float(to[c]);
            for (int i = 0; i < count; i++)
                total += as_float(weights[i]) * as_float(b[rows[i] * stride + c]);
            from_float(to + c, total);
        }
    }
}

void chunks(std::vector<Item>& items, int block, int slice, int64_t size, int64_t chunk) {
    for (int64_t i = 0; i < size; i += chunk)
        items.push_back({block, slice, i, std::min(size, i + chunk)});
}

template <typename X>
void run(X* y, int64_t y_stride, const X* x, int64_t x_stride, const Layer* const* slots,
         const int32_t* segments, int64_t segment_count, const int32_t* order) {
    // Kept between calls: a layer's call must not wait for the allocator.
    static thread_local std::vector<Block<X>> blocks;
    static thread_local std::vector<Item> shrinks, expands;
    static thread_local std::vector<float> scratch;
    blocks.clear();
    shrinks.clear();
    expands.clear();
    size_t needed = 0;
    for (int64_t s = 0; s < segment_count; s++) {
        const int32_t* segment = segments + 3 * s;     // slot, begin, end
        const Layer* layer = slots[segment[0]];
        if (layer == nullptr) continue;
        for (int32_t t = segment[1]; t < segment[2]; t += BLOCK_TOKENS) {
            const int count = std::min(BLOCK_TOKENS, segment[2] - t);
            const int index = (int)blocks.size();
            blocks.push_back({layer, order + t, count, {}, {}, {}, {}, {}});
            needed += count * (layer->rows + layer->experts + 2 * layer->places() + layer->slices);
            chunks(shrinks, index, -1, layer->rows, CHUNK_ROWS);
            chunks(shrinks, index, -2, layer->experts, CHUNK_ROWS);
            for (int64_t i = 0; i < layer->slices; i++)
                chunks(expands, index, (int)i,
                       layer->slice[i].column_end - layer->slice[i].column_begin, CHUNK_COLUMNS);
        }
    }
    if (blocks.empty()) return;
    if (scratch.size() < needed) scratch.resize(needed);
    float* next = scratch.data();
    auto take = [&](int64_t words) { float* p = next; next += words; return p; };
    for (Block<X>& block : blocks) {
        const int64_t places = block.count * block.layer->places();
        block.h = take(block.count * block.layer->rows);
        block.z = take(block.count * block.layer->experts);
        block.weights = (X*)take(places);
        block.rows = (int32_t*)take(places);
        block.counts = (int32_t*)take(block.count * block.layer->slices);
    }
    // Thread-local names mean another thread's own inside the parallel region.
    const Block<X>* const all = blocks.data();
    const Item* const first = shrinks.data();
    const Item* const second = expands.data();
    const int block_count = (int)blocks.size();
    const int first_count = (int)shrinks.size(), second_count = (int)expands.size();

#pragma omp parallel
    {
#pragma omp for schedule(static, 1)
        for (int i = 0; i < first_count; i++) {
            const Block<X>& block = all[first[i].block];
            const Layer& layer = *block.layer;
            const int64_t r = first[i].begin, rows = first[i].end - r, n = layer.in_features;
            if (first[i].slice == -1)
                shrink(block, x, x_stride, (const X*)layer.a + r * n, rows, block.h + r, layer.rows);
            else
                shrink(block, x, x_stride, layer.router + r * n, rows, block.z + r, layer.experts);
        }
#pragma omp for schedule(static, 1)
        for (int i = 0; i < block_count * BLOCK_TOKENS; i++) {
            const Block<X>& block = all[i / BLOCK_TOKENS];
            if (i % BLOCK_TOKENS < block.count) gate(block, i % BLOCK_TOKENS);
        }
#pragma omp for schedule(static)
        for (int i = 0; i < second_count; i++) expand(all[second[i].block], second[i], y, y_stride);
    }
}

}  // namespace

extern "C" {

// y [tokens, out] += routed product of x [tokens, in], for the tokens named in `order`.
//
// slots: a Layer for each slot of the batch, null where the slot's adapter leaves the layer alone.
// segments: triples (slot, begin, end) into `order`, which holds row numbers of x and y.
void guilomo_routed_linear_bf16(void* y, int64_t y_stride, const void* x, int64_t x_stride,
                                const void* const* slots, const int32_t* segments,
                                int64_t segment_count, const int32_t* order) {
    run((bf16*)y, y_stride, (const bf16*)x, x_stride, (const Layer* const*)slots, segments,
        segment_count, order);
}

void guilomo_routed_linear_f32(void* y, int64_t y_stride, const void* x, int64_t x_stride,
                               const void* const* slots, const int32_t* segments,
                               int64_t segment_count, const int32_t* order) {
    run((float*)y, y_stride, (const float*)x, x_stride, (const Layer* const*)slots, segments,
        segment_count, order);
}

}  // extern "C"
