// A chain of maps and activations over all rows of one replica: forward, backward, and Adam's step on its parameters.
//
// Rows stand in lanes, in panels of two registers (importance/cpu_layers.hpp); past the last row a panel's lanes hold numbers
// that no sum takes. Gradients of a layer's maps are sums over tiles of 64 rows, added in order.
#pragma once

#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "../entry_points.hpp"
#include "../importance/cpu_layers.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int64_t kSigmoidCubeRoot = kActivations;
constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kRootFloor = 1e-6;

// Numbers handed out one after another from one block. The list of arrays is gone through twice: for its size, then for
// addresses.
template <class T>
class Store {
public:
    T* take(int64_t count) {
        const int64_t at = used_;
        used_ += (count + line - 1) / line * line;
        return first_ == nullptr ? nullptr : first_ + at;
    }
    bool make() {
        all_.reset(new (std::nothrow) T[static_cast<size_t>(used_ + line)]());
        if (!all_) return false;
        const int64_t misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(all_.get()) / sizeof(T)) % line;
        first_ = all_.get() + (line - misplaced) % line;
        used_ = 0;
        return true;
    }

private:
    static constexpr int64_t line = kStrip<T>;
    std::unique_ptr<T[]> all_;
    T* first_ = nullptr;
    int64_t used_ = 0;
};

// --- the paper's joint examples: M = chol(A A' + B) ---

// M [d][d] of A, in double.
inline void cholesky_map(const double* a, const double* b, int64_t d, double* m) {
    for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j < d; ++j) {
            double s = i == j ? b[i] : 0;
            for (int64_t k = 0; k < d; ++k) s += a[i * d + k] * a[j * d + k];
            for (int64_t k = 0; k < (j < i ? j : i); ++k) s -= m[i * d + k] * m[j * d + k];
            m[i * d + j] = i < j ? 0 : i == j ? std::sqrt(s) : s / m[j * d + j];
        }
}

// The gradient in A from that in M, g; both [d][d], g is overwritten. With P the lower triangle of M' g, its diagonal halved,
// S = M^-T P M^-1 has the gradient in A A' + B as its symmetric part: the result is (S + S') A.
inline void cholesky_map_gradient(const double* a, const double* m, int64_t d, double* g, double* p, double* result) {
    for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j < d; ++j) {
            double s = 0;
            for (int64_t k = i; k < d; ++k) s += m[k * d + i] * (j <= k ? g[k * d + j] : 0);
            p[i * d + j] = j > i ? 0 : j == i ? 0.5 * s : s;
        }
    for (int64_t j = 0; j < d; ++j)  // M' g = P, column by column from below
        for (int64_t i = d - 1; i >= 0; --i) {
            double s = p[i * d + j];
            for (int64_t k = i + 1; k < d; ++k) s -= m[k * d + i] * g[k * d + j];
            g[i * d + j] = s / m[i * d + i];
        }
    for (int64_t i = 0; i < d; ++i)  // p M = g, row by row from the right
        for (int64_t j = d - 1; j >= 0; --j) {
            double s = g[i * d + j];
            for (int64_t k = j + 1; k < d; ++k) s -= p[i * d + k] * m[k * d + j];
            p[i * d + j] = s / m[j * d + j];
        }
    for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j < d; ++j) {
            double s = 0;
            for (int64_t k = 0; k < d; ++k) s += (p[i * d + k] + p[k * d + i]) * a[k * d + j];
            result[i * d + j] = s;
        }
}

// --- layers ---

// a / (a^2 + 1e-6)^(1/3) in place, and its slope.
template <class T>
void cube_root(T* values, int64_t count, T* slope) {
    using V = Vector<T>;
    for (int64_t i = 0; i < count; i += kWidth<T>) {
        const V a = load<T>(values + i), u = multiply_add(a, a, all<T>(static_cast<T>(kRootFloor)));
        const V root = exp_of<T>(log_of<T>(u) * all<T>(static_cast<T>(-1.0 / 3)));
        store<T>(slope + i, root * (all<T>(1) - all<T>(static_cast<T>(2.0 / 3)) * (a * a / u)));
        store<T>(values + i, a * root);
    }
}

template <class T>
class Chain {
public:
    Chain(const Network& network, int64_t rows) : net(network), layers_(static_cast<size_t>(net.layers)) {
        panels = pieces(rows, kPanel<T>);
        for (int64_t i = 0; i < net.layers; ++i) {
            Layer& layer = layers_[static_cast<size_t>(i)];
            layer.units = net.widths[i + 1], layer.inputs = net.widths[i];
            layer.biased = net.biases[i] != nullptr;
            layer.joint = net.diagonals[i] != nullptr;
            layer.activation = net.activations[i];
            layer.shape = {layer.units, layer.inputs + layer.biased};
            widest_ = widest_ < layer.inputs ? layer.inputs : widest_;
            widest_ = widest_ < layer.units ? layer.units : widest_;
            turned_size_ = turned_size_ < layer.shape.turned() ? layer.shape.turned() : turned_size_;
        }
    }

    void lay_out(Store<T>& store, Store<double>& doubles) {
        for (Layer& layer : layers_) {
            const int64_t weights = layer.units * (layer.inputs + 1), numbers = panels * kPanel<T>;
            layer.weight = store.take(weights), layer.gradient = store.take(weights);
            layer.packed = store.take(weights), layer.packed_back = store.take(weights);
            layer.values = {store.take((layer.units + 1) * numbers), (layer.units + 1) * kPanel<T>};
            layer.slopes = {store.take(layer.activation == kIdentity ? 0 : layer.units * numbers), layer.units * kPanel<T>};
            layer.outer = store.take(layer.shape.size());
            layer.square = doubles.take(layer.joint ? 5 * layer.units * layer.units : 0);
        }
        delta = {store.take(widest_ * panels * kPanel<T>), widest_ * kPanel<T>};
        other_ = {store.take(widest_ * panels * kPanel<T>), widest_ * kPanel<T>};
        turned_ = store.take(turned_size_);
    }

    // After the store was made.
    void begin() {
        for (Layer& layer : layers_)
            for (int64_t p = 0; p < panels; ++p)
                for (int64_t s = 0; s < kPanel<T>; ++s)
                    layer.values.at[p * layer.values.stride + layer.units * kPanel<T> + s] = 1;
    }

    int64_t outputs() const { return net.widths[net.layers]; }
    Panels<T> values() const { return layers_.back().values; }
    // Layer i's map as it stands, [units][inputs] and then its biases.
    const T* map(int64_t i) const { return layers_[static_cast<size_t>(i)].weight; }
    T* map_gradient(int64_t i) { return layers_[static_cast<size_t>(i)].gradient; }

    // The maps of replica r.
    void take_up(int64_t r) {
        for (int64_t i = 0; i < net.layers; ++i) {
            Layer& layer = layers_[static_cast<size_t>(i)];
            const int64_t m = layer.units, k = layer.inputs, count = m * k;
            const T* const w = static_cast<const T*>(net.weights[i]) + r * count;
            if (layer.joint) {
                for (int64_t j = 0; j < count; ++j) layer.square[j] = static_cast<double>(w[j]);
                cholesky_map(layer.square, net.diagonals[i], m, layer.square + count);
                for (int64_t j = 0; j < count; ++j) layer.weight[j] = static_cast<T>(layer.square[count + j]);
            } else {
                for (int64_t j = 0; j < count; ++j) layer.weight[j] = w[j];
            }
            const T* const bias = layer.biased ? static_cast<const T*>(net.biases[i]) + r * m : nullptr;
            for (int64_t j = 0; layer.biased && j < m; ++j) layer.weight[count + j] = bias[j];
            const T* const all = layer.weight;
            pack(m, k + layer.biased, [&](int64_t o, int64_t n) { return n < k ? all[o * k + n] : all[count + o]; }, layer.packed);
            pack(k, m, [&](int64_t n, int64_t o) { return all[o * k + n]; }, layer.packed_back);
        }
    }

    // `in` has a row of ones below. `slopes`: backward follows.
    void forward(Panels<T> in, bool slopes) {
        for (Layer& layer : layers_) {
            const bool plain = layer.activation == kIdentity, halves = layer.activation == kSigmoidCubeRoot;
            const auto run = activation<T>(halves ? int64_t{kSigmoid} : layer.activation, slopes);
            const auto act = [&](int64_t first, int64_t m, int64_t panel, T* values) {
                T* const slope = layer.slopes.at + panel * layer.slopes.stride + first * kPanel<T>;
                if (plain) return;
                if (!halves) return run(values, m, slope);
                const int64_t bounded = smaller(m, (layer.units + 1) / 2 > first ? (layer.units + 1) / 2 - first : 0);
                run(values, bounded, slope);
                cube_root(values + bounded * kPanel<T>, (m - bounded) * kPanel<T>, slope + bounded * kPanel<T>);
            };
            product(layer.packed, layer.units, layer.inputs + layer.biased, in, panels, layer.values, true, act);
            in = layer.values;
        }
    }

    // From the gradients in the outputs, in `delta`: those in the maps (added to what is there unless `fresh`) where `maps`, and
    // those in the inputs, which come to stand in `delta`, where `inputs`.
    void backward(Panels<T> in, bool maps, bool fresh, bool inputs) {
        for (int64_t i = net.layers - 1; i >= 0; --i) {
            Layer& layer = layers_[static_cast<size_t>(i)];
            if (layer.activation != kIdentity) multiply_slopes(layer);
            const Panels<T> below = i > 0 ? layers_[static_cast<size_t>(i - 1)].values : in;
            if (maps) take_outer(layer, below, fresh);
            if (i == 0 && !inputs) return;
            product(layer.packed_back, layer.inputs, layer.units, delta, panels, other_, true,
                    [](int64_t, int64_t, int64_t, T*) {});
            std::swap(delta, other_);
        }
    }

    // The sums of `backward` in the places of the maps. To be called once, after the last backward of an epoch.
    void end_sums() {
        for (Layer& layer : layers_)
            for (int64_t m = 0; m < layer.units; ++m) {
                for (int64_t k = 0; k < layer.inputs; ++k)
                    layer.gradient[m * layer.inputs + k] = layer.shape.value(layer.outer, m, k);
                if (layer.biased) layer.gradient[layer.units * layer.inputs + m] = layer.shape.value(layer.outer, m, layer.inputs);
            }
    }

    // From gradients in maps to those in parameters; the sum of their squares.
    double end_gradient() {
        double sum = 0;
        for (int64_t i = 0; i < net.layers; ++i) {
            Layer& layer = layers_[static_cast<size_t>(i)];
            const int64_t count = layer.units * layer.inputs;
            if (layer.joint) {
                double* const s = layer.square;
                for (int64_t j = 0; j < count; ++j) s[2 * count + j] = static_cast<double>(layer.gradient[j]);
                cholesky_map_gradient(s, s + count, layer.units, s + 2 * count, s + 3 * count, s + 4 * count);
                for (int64_t j = 0; j < count; ++j) layer.gradient[j] = static_cast<T>(s[4 * count + j]);
            }
            for (int64_t j = 0; j < count + layer.biased * layer.units; ++j) {
                const double g = static_cast<double>(layer.gradient[j]);
                sum += g * g;
            }
        }
        return sum;
    }

    void step(int64_t r, double factor, double rate, double root, double epsilon) {
        for (int64_t i = 0; i < net.layers; ++i) {
            const Layer& layer = layers_[static_cast<size_t>(i)];
            const int64_t count = layer.units * layer.inputs, m = layer.units;
            const auto at = [&](void* const* of, int64_t size) { return static_cast<T*>(of[i]) + r * size; };
            adam(layer.gradient, count, factor, rate, root, epsilon, at(net.weights, count), at(net.weight_means, count),
                 at(net.weight_squares, count));
            if (layer.biased)
                adam(layer.gradient + count, m, factor, rate, root, epsilon, at(net.biases, m), at(net.bias_means, m),
                     at(net.bias_squares, m));
        }
    }

    const Network net;
    int64_t panels;
    Panels<T> delta;  // [widest]

private:
    struct Layer {
        int64_t units, inputs, activation;
        bool biased, joint;
        Outer<T> shape;
        T *weight, *gradient, *packed, *packed_back, *outer;
        double* square;  // of a joint map: A, M, and room for the gradient
        Panels<T> values, slopes;
    };

    void multiply_slopes(const Layer& layer) {
        for (int64_t p = 0; p < panels; ++p) {
            T* const to = delta.at + p * delta.stride;
            const T* const slope = layer.slopes.at + p * layer.slopes.stride;
            for (int64_t s = 0; s < layer.units * kPanel<T>; s += kWidth<T>)
                store<T>(to + s, load<T>(to + s) * load<T>(slope + s));
        }
    }

    void take_outer(Layer& layer, Panels<T> below, bool fresh) {
        constexpr int64_t tile = kTileSamples / kPanel<T>;
        for (int64_t p = 0; p < panels; p += tile) {
            const Panels<T> d{delta.at + p * delta.stride, delta.stride}, h{below.at + p * below.stride, below.stride};
            outer(layer.shape, d, h, smaller(tile, panels - p) * kPanel<T>, turned_, layer.outer, fresh && p == 0);
        }
    }

    static void adam(const T* g, int64_t count, double factor, double rate, double root, double epsilon, T* p, T* mean,
                     T* square) {
        const T by = static_cast<T>(factor), a = static_cast<T>(1 - kBeta1), b = static_cast<T>(kBeta2);
        const T c = static_cast<T>(1 - kBeta2), step = static_cast<T>(rate), back = static_cast<T>(root);
        const T least = static_cast<T>(epsilon);
        for (int64_t i = 0; i < count; ++i) {
            const T d = g[i] * by;
            mean[i] += a * (d - mean[i]);
            square[i] = b * square[i] + c * d * d;
            p[i] -= step * mean[i] / (std::sqrt(square[i]) / back + least);
        }
    }

    std::vector<Layer> layers_;
    Panels<T> other_;
    T* turned_ = nullptr;
    int64_t widest_ = 0, turned_size_ = 0;
};

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
