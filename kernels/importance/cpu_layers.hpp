// Layers of a decoder over a tile of samples, as the importance kernels run them.
//
// Samples stand in lanes. A tile of 64 is cut into panels of two registers, and the values of a layer lie as
// [panel][unit][sample of the panel]: one panel of 200 units fills half an L1 cache. Below its units a layer has a row of
// ones, so that a bias is one more weight, added last.
//
//   product   out[m, s] = sum_k w[m, k] h[k, s], m in blocks of kBlock: block x panel stays in registers while k runs, and
//             weights come packed, [block][k][m], one broadcast for each. Every sum runs over k in order with fused
//             multiply-adds, so no block, panel or register width moves a bit of it.
//   outer     c[m, k] += sum_s delta[m, s] h[k, s]. Wide layers: h is turned, [two registers of k][s][k], and c packed
//             likewise; sums run over s in order. Narrow ones: c has a number for each of the 64 / size lanes of a strip. A tile
//             is summed by itself before it joins c: roundings are of the tile's size, not of c's.
//
// cpu_layers.cpp has the blocks of products and the activations, compiled once for all kernels and called by address.
#pragma once

#include <utility>

#include "../functions.hpp"

namespace libi {
namespace LIBI_ISA {

enum Activation : int64_t { kIdentity, kRelu, kTanh, kSigmoid, kSoftplus, kSilu, kGelu, kCube, kLeakyRelu, kElu, kActivations };

// Of up to kBlock units, or with four registers of samples (two panels) of up to kThinBlock:
// (packed weights, inputs, values, from panel to panel, out, likewise).
template <class T>
using Product = void (*)(const T*, int64_t, const T*, int64_t, T*, int64_t);
template <class T>
Product<T> product_of(int64_t units, bool two_panels);

// A block [units][panel] in place, and the slopes if asked.
template <class T>
using Activate = void (*)(T*, int64_t, T*);
template <class T>
Activate<T> activation(int64_t which, bool slopes);

namespace {

constexpr int64_t kTileSamples = 64;
constexpr int64_t kBlock = kBytes == 64 ? 14 : 6;      // units of a product in registers, with two registers of samples
constexpr int64_t kThinBlock = kBytes == 64 ? 6 : 2;   // or as many with four
template <class T>
constexpr int64_t kPanel = 2 * kWidth<T>;
template <class T>
constexpr int64_t kStrip = 64 / static_cast<int64_t>(sizeof(T));

LIBI_INLINE int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }
LIBI_INLINE int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Adds the numbers of a strip in a fixed tree, in place.
template <class T>
T add_strip(T* lane) {
    for (int64_t half = kStrip<T> / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
}

// --- products ---

// [block][k][m] of a matrix given by at(m, k).
template <class T, class At>
void pack(int64_t rows, int64_t inputs, At at, T* packed) {
    for (int64_t first = 0; first < rows; first += kBlock) {
        const int64_t m = smaller(kBlock, rows - first);
        for (int64_t k = 0; k < inputs; ++k)
            for (int64_t i = 0; i < m; ++i) *packed++ = at(first + i, k);
    }
}

// Values of one layer over a tile: at + panel * stride.
template <class T>
struct Panels {
    T* at;
    int64_t stride;
};

// out = w h; finish(first unit, units, panel, values [units][panel]) sees each block while it is in the L1 cache. With
// `keep` false, blocks come to lie on top of each other.
template <class T, class Finish>
LIBI_INLINE void product(const T* packed, int64_t rows, int64_t inputs, Panels<T> h, int64_t panels, Panels<T> out,
                         bool keep, Finish finish) {
    const int64_t together = rows <= kThinBlock ? 2 : 1;
    for (int64_t p = 0; p < panels; p += together) {
        const bool both = together == 2 && p + 1 < panels;
        const T* w = packed;
        for (int64_t first = 0; first < rows; first += kBlock) {
            const int64_t m = smaller(kBlock, rows - first);
            T* const to = out.at + p * out.stride + (keep ? first * kPanel<T> : 0);
            const Product<T> run = product_of<T>(m, both);
            run(w, inputs, h.at + p * h.stride, h.stride, to, out.stride);
            finish(first, m, p, to);
            if (both) finish(first, m, p + 1, to + out.stride);
            w += m * inputs;
        }
    }
}

// --- gradients of weights ---

constexpr int64_t kLaneWeights = 512;  // up to so many weights a layer has sums in lanes: they stay in the L1 cache

template <class T>
struct Outer {
    int64_t units, inputs;  // inputs with the row of ones

    bool lanes() const { return units * inputs <= kLaneWeights; }
    int64_t size() const {
        return lanes() ? units * inputs * kStrip<T> : pieces(inputs, kPanel<T>) * units * kPanel<T>;
    }
    int64_t turned() const { return lanes() ? 0 : pieces(inputs, kPanel<T>) * kTileSamples * kPanel<T>; }
    // What stands in c for weight m, k.
    T value(const T* c, int64_t m, int64_t k) const {
        if (!lanes()) return c[((k / kPanel<T>) * units + m) * kPanel<T> + k % kPanel<T>];
        const T* const at = c + (m * inputs + k) * kStrip<T>;
        T sum[kStrip<T>];
        for (int64_t l = 0; l < kStrip<T>; ++l) sum[l] = at[l];
        return add_strip(sum);
    }
};

template <class T, int m, int k>
void outer_lanes_block(const T* delta, int64_t delta_stride, const T* h, int64_t h_stride, int64_t samples, T* c,
                       int64_t inputs) {
    using V = Vector<T>;
    for (int64_t lane = 0; lane < kStrip<T>; lane += kWidth<T>) {
        V sum[m][k] = {};
        for (int64_t s = lane; s < samples; s += kStrip<T>) {
            const int64_t panel = s / kPanel<T>, at = s % kPanel<T>;
            V x[k];
            for (int j = 0; j < k; ++j) x[j] = load<T>(h + panel * h_stride + j * kPanel<T> + at);
            for (int i = 0; i < m; ++i) {
                const V d = load<T>(delta + panel * delta_stride + i * kPanel<T> + at);
                for (int j = 0; j < k; ++j) sum[i][j] = multiply_add(d, x[j], sum[i][j]);
            }
        }
        for (int i = 0; i < m; ++i)
            for (int j = 0; j < k; ++j) {
                T* const to = c + (i * inputs + j) * kStrip<T> + lane;
                store<T>(to, load<T>(to) + sum[i][j]);
            }
    }
}

template <class T>
void outer_lanes(const Outer<T>& o, Panels<T> delta, Panels<T> h, int64_t samples, T* c) {
    const auto block = [&](auto m, auto k, int64_t i, int64_t j) {
        outer_lanes_block<T, decltype(m)::value, decltype(k)::value>(
            delta.at + i * kPanel<T>, delta.stride, h.at + j * kPanel<T>, h.stride, samples,
            c + (i * o.inputs + j) * kStrip<T>, o.inputs);
    };
    using One = std::integral_constant<int, 1>;
    using Four = std::integral_constant<int, 4>;
    int64_t i = 0;
    for (; i + 4 <= o.units; i += 4) {
        int64_t j = 0;
        for (; j + 4 <= o.inputs; j += 4) block(Four{}, Four{}, i, j);
        for (; j < o.inputs; ++j) block(Four{}, One{}, i, j);
    }
    for (; i < o.units; ++i) {
        int64_t j = 0;
        for (; j + 4 <= o.inputs; j += 4) block(One{}, Four{}, i, j);
        for (; j < o.inputs; ++j) block(One{}, One{}, i, j);
    }
}

template <class T>
void turn(int64_t inputs, Panels<T> h, int64_t samples, T* turned) {
    for (int64_t first = 0; first < inputs; first += kPanel<T>) {
        const int64_t width = smaller(kPanel<T>, inputs - first);
        for (int64_t s = 0; s < samples; ++s) {
            const T* const from = h.at + (s / kPanel<T>) * h.stride + first * kPanel<T> + s % kPanel<T>;
            for (int64_t k = 0; k < width; ++k) turned[s * kPanel<T> + k] = from[k * kPanel<T>];
            for (int64_t k = width; k < kPanel<T>; ++k) turned[s * kPanel<T> + k] = 0;
        }
        turned += kTileSamples * kPanel<T>;
    }
}

template <class T, int m>
void outer_block(const T* delta, int64_t delta_stride, const T* turned, int64_t samples, T* c, bool fresh) {
    using V = Vector<T>;
    V sum[m][2];
#pragma GCC unroll 16
    for (int i = 0; i < m; ++i)
        for (int v = 0; v < 2; ++v) sum[i][v] = V{};
    for (int64_t first = 0; first < samples; first += kPanel<T>) {
        const T* const d = delta + first / kPanel<T> * delta_stride;
        const int64_t count = smaller(kPanel<T>, samples - first);
        for (int64_t s = 0; s < count; ++s) {
            const V low = load<T>(turned + (first + s) * kPanel<T>);
            const V high = load<T>(turned + (first + s) * kPanel<T> + kWidth<T>);
#pragma GCC unroll 16
            for (int i = 0; i < m; ++i) {
                const V x = all<T>(d[i * kPanel<T> + s]);
                sum[i][0] = multiply_add(x, low, sum[i][0]);
                sum[i][1] = multiply_add(x, high, sum[i][1]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < m; ++i)
        for (int v = 0; v < 2; ++v) {
            T* const to = c + i * kPanel<T> + v * kWidth<T>;
            store<T>(to, fresh ? sum[i][v] : load<T>(to) + sum[i][v]);
        }
}

template <class T, int... m>
constexpr auto outer_block_of(int64_t units, std::integer_sequence<int, m...>) {
    using Run = void (*)(const T*, int64_t, const T*, int64_t, T*, bool);
    constexpr Run all[] = {outer_block<T, m + 1>...};
    return all[units - 1];
}

// c += delta h' over the tile's samples, or c = delta h' where it is fresh.
template <class T>
void outer(const Outer<T>& o, Panels<T> delta, Panels<T> h, int64_t samples, T* turned, T* c, bool fresh) {
    if (o.lanes()) {
        if (fresh)
            for (int64_t i = 0; i < o.size(); ++i) c[i] = 0;
        return outer_lanes(o, delta, h, samples, c);
    }
    turn(o.inputs, h, samples, turned);
    for (int64_t k = 0; k < o.inputs; k += kPanel<T>) {
        for (int64_t first = 0; first < o.units; first += kBlock) {
            const int64_t m = smaller(kBlock, o.units - first);
            const auto run = outer_block_of<T>(m, std::make_integer_sequence<int, kBlock>{});
            run(delta.at + first * kPanel<T>, delta.stride, turned, samples, c + first * kPanel<T>, fresh);
        }
        c += o.units * kPanel<T>;
        turned += kTileSamples * kPanel<T>;
    }
}

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
