// The routed product of one layer, for all adapters of a batch, in one call on the CPU.
//
//   phase 1   h = A x and z = W_r x       work items: token block x rows
//   gate      h *= w s                    work items: tokens
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

// Sixteen accumulators: they fill half of the 32 vector registers, the operands the rest.
constexpr int TILE = 4;
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
};

struct Block {
    const Layer* layer;
    const int32_t* tokens;               // rows of x and y
    int count;
    float* h;                            // [count, rows]
    float* z;                            // [count, experts]
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

inline void store(bf16* p, Floats v) {   // to nearest, ties to even
    Words w = (Words)v;
    w = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    Halves h = __builtin_convertvector(w, Halves);
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

inline float sum(Floats v) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) {
        Words from;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) from[i] = (i + half) % LANES;
        v += __builtin_shuffle(v, from);
    }
    return v[0];
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
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            float s = sum(total[t][r]);
            for (int64_t i = k; i < n; i++) s += as_float(x[t][i]) * as_float(w[r * n + i]);
            out[t * stride + r] = s;
        }
}

#if defined(__AVX512BF16__)
template <int T, int R>
void dot_tile(const bf16* const* x, const bf16* w, int64_t n, float* out, int64_t stride) {
    __m512 total[T][R];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) total[t][r] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) {
        __m512bh xs[T];
        for (int t = 0; t < T; t++) xs[t] = (__m512bh)_mm512_loadu_si512(x[t] + k);
        for (int r = 0; r < R; r++) {
            __m512bh ws = (__m512bh)_mm512_loadu_si512(w + r * n + k);
            for (int t = 0; t < T; t++) total[t][r] = _mm512_dpbf16_ps(total[t][r], xs[t], ws);
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            float s = sum((Floats)total[t][r]);
            for (int64_t i = k; i < n; i++) s += as_float(x[t][i]) * as_float(w[r * n + i]);
            out[t * stride + r] = s;
        }
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
void shrink(const Block& block, const X* x, int64_t x_stride, const W* w, int64_t rows, float* out,
            int64_t stride) {
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

void gate(const Layer& layer, float* h, float* z) {
    for (int64_t s = 0; s < layer.slices; s++) {
        const Slice& slice = layer.slice[s];
        if (slice.expert_end > slice.expert_begin)
            route(z + slice.expert_begin, slice.expert_end - slice.expert_begin, layer.top_k);
    }
    for (int64_t r = 0; r < layer.rows; r++) {
        const int32_t e = layer.expert_of_row[r];
        const float weight = e < 0 ? 1.0f : z[e];
        // An assignment where the weight is 0: nothing is left of a row that overflowed.
        h[r] = weight == 0 ? 0 : h[r] * weight * layer.row_scale[r];
    }
}

// y_t[columns] += sum over rows of h_t[row] b[row, columns], for T tokens and V vectors of columns.
template <int T, int V, typename X>
void expand_tile(X* const* y, const float* const* h, const X* b, int64_t stride, const int* rows,
                 int count) {
    Floats total[T][V] = {};
    for (int i = 0; i < count; i++) {
        const X* row = b + rows[i] * stride;
        Floats bs[V];
        for (int v = 0; v < V; v++) bs[v] = load(row + v * LANES);
        for (int t = 0; t < T; t++) {
            const float weight = h[t][rows[i]];
            for (int v = 0; v < V; v++) total[t][v] += bs[v] * weight;
        }
    }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++)
            store(y[t] + v * LANES, load(y[t] + v * LANES) + total[t][v]);
}

template <int T, typename X>
void expand_tokens(const Block& block, int first, const Slice& slice, int64_t begin, int64_t end,
                   X* y, int64_t y_stride, std::vector<int>& active) {
    const int64_t stride = slice.column_end - slice.column_begin;
    const float* h[T];
    X* to[T];
    for (int t = 0; t < T; t++) {
        h[t] = block.h + (first + t) * block.layer->rows + slice.row_begin;
        to[t] = y + block.tokens[first + t] * y_stride + slice.column_begin;
    }
    active.clear();
    for (int r = 0; r < slice.row_end - slice.row_begin; r++)
        for (int t = 0; t < T; t++)
            if (h[t][r] != 0) {          // true of NaN: it has to show
                active.push_back(r);
                break;
            }
    const int count = (int)active.size();
    const X* b = (const X*)slice.b;
    int64_t c = begin;
    X* at[T];
    auto move = [&] { for (int t = 0; t < T; t++) at[t] = to[t] + c; };
    for (; c + TILE * LANES <= end; c += TILE * LANES) {
        move();
        expand_tile<T, TILE>(at, h, b + c, stride, active.data(), count);
    }
    for (; c + LANES <= end; c += LANES) {
        move();
        expand_tile<T, 1>(at, h, b + c, stride, active.data(), count);
    }
    for (; c < end; c++)
        for (int t = 0; t < T; t++) {
            float total = 0;
            for (int i = 0; i < count; i++)
                total += h[t][active[i]] * as_float(b[active[i] * stride + c]);
            from_float(to[t] + c, as_float(to[t][c]) + total);
        }
}

template <typename X>
void expand(const Block& block, const Item& item, X* y, int64_t y_stride, std::vector<int>& active) {
    const Slice& slice = block.layer->slice[item.slice];
    int t = 0;
    for (; t + TILE <= block.count; t += TILE)
        expand_tokens<TILE>(block, t, slice, item.begin, item.end, y, y_stride, active);
    switch (block.count - t) {
        case 3: expand_tokens<3>(block, t, slice, item.begin, item.end, y, y_stride, active); break;
        case 2: expand_tokens<2>(block, t, slice, item.begin, item.end, y, y_stride, active); break;
        case 1: expand_tokens<1>(block, t, slice, item.begin, item.end, y, y_stride, active); break;
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
    static thread_local std::vector<Block> blocks;
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
            blocks.push_back({layer, order + t, count, nullptr, nullptr});
            needed += count * (layer->rows + layer->experts);
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
    for (Block& block : blocks) {
        block.h = next;
        block.z = next + block.count * block.layer->rows;
        next = block.z + block.count * block.layer->experts;
    }
    // Thread-local names mean another thread's own inside the parallel region.
    const Block* const all = blocks.data();
    const Item* const first = shrinks.data();
    const Item* const second = expands.data();
    const int block_count = (int)blocks.size();
    const int first_count = (int)shrinks.size(), second_count = (int)expands.size();

#pragma omp parallel
    {
        std::vector<int> active;
#pragma omp for schedule(static)
        for (int i = 0; i < first_count; i++) {
            const Block& block = all[first[i].block];
            const Layer& layer = *block.layer;
            const int64_t r = first[i].begin, rows = first[i].end - r, n = layer.in_features;
            if (first[i].slice == -1)
                shrink(block, x, x_stride, (const X*)layer.a + r * n, rows, block.h + r, layer.rows);
            else
                shrink(block, x, x_stride, layer.router + r * n, rows, block.z + r, layer.experts);
        }
#pragma omp for schedule(static)
        for (int i = 0; i < block_count * BLOCK_TOKENS; i++) {
            const Block& block = all[i / BLOCK_TOKENS];
            const int t = i % BLOCK_TOKENS;
            if (t < block.count)
                gate(*block.layer, block.h + t * block.layer->rows,
                     block.z + t * block.layer->experts);
        }
#pragma omp for schedule(static)
        for (int i = 0; i < second_count; i++)
            expand(all[second[i].block], second[i], y, y_stride, active);
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
