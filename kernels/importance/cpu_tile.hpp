// What forward and backward share: the call made ready, the draws of a tile, and its log-weights.
//
// A tile has 64 samples of one row, or where a row has at most 32, all those of several rows. A sample's numbers depend
// on its own lane alone, so that its place in a tile, the other rows of a call and the threads move no bit of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "../entry_points.hpp"
#include "../random/cpu.hpp"
#include "../sizes.hpp"
#include "cpu_layers.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int64_t kOutputsSummed = 42;  // outputs whose log-probabilities are added up apart: a multiple of every kBlock
constexpr int64_t kWords = int64_t{1} << 32;
constexpr double kLog2Pi = 1.83787706640934548356;

// Memory for a few arrays, each on a cache line.
template <class T>
class Arena {
public:
    static int64_t line(int64_t count) { return pieces(count, kStrip<T>) * kStrip<T>; }
    bool make(int64_t count) {
        memory_.reset(new (std::nothrow) T[static_cast<size_t>(count + kStrip<T>)]);
        const auto misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory_.get()) / sizeof(T)) % kStrip<T>;
        at_ = memory_.get() + (kStrip<T> - misplaced) % kStrip<T>;
        return memory_ != nullptr;
    }
    T* at() const { return at_; }

private:
    std::unique_ptr<T[]> memory_;
    T* at_ = nullptr;
};

struct Shape {
    int64_t units, inputs;  // of a layer; inputs without the bias
};

// The call, checked, with its parameters packed.
template <class T>
struct Plan {
    const Importance& call;
    int64_t latents, outputs, widest = 0;
    int64_t rows_together;       // rows of a tile
    int64_t groups;              // of so many rows
    int64_t tiles;               // of a group
    int64_t own;                 // replicas with parameters of their own, or 1
    int64_t threads;
    int64_t size_packed = 0, size_turned = 0;
    std::unique_ptr<Shape[]> shapes;
    std::unique_ptr<int64_t[]> packed_from, turned_from;  // of each layer
    Arena<T> packed, turned, precision;                    // precision: 1 / (2 variance) [own][outputs]
    std::unique_ptr<T[]> constant;                         // of log p(x | z) [own]

    explicit Plan(const Importance& c) : call(c), threads(team(c.threads)) {}

    int check() {
        if (call.replicas < 0 || call.rows < 0 || call.samples < 1 || call.layers < 1 || call.tail < 0) return kBadSize;
        if (call.layers > (int64_t{1} << 16)) return kBadSize;
        for (int64_t i = 0; i <= call.layers; ++i)
            if (call.widths[i] < 1 || call.widths[i] > (int64_t{1} << 31)) return kBadSize;
        for (int64_t i = 0; i < call.layers; ++i)
            if (call.activations[i] < 0 || call.activations[i] >= kActivations) return kBadSize;
        latents = call.widths[0], outputs = call.widths[call.layers];
        if (call.variances != 0 && call.variances != 1 && call.variances != outputs) return kBadSize;
        if (!sizes_fit()) return kBadSize;
        if (call.samples > 4 * kWords / latents) return kCounterOverflow;
        if (call.first_row < 0 || call.first_row > kWords - call.rows) return kCounterOverflow;
        if (call.repetition < 0 || call.repetition >= kWords) return kCounterOverflow;
        if (call.stream < 0 || call.stream >= 256) return kCounterOverflow;
        for (int64_t r = 0; r < call.replicas; ++r)
            if (call.replica_ids[r] < 0 || call.replica_ids[r] >= (int64_t{1} << 24)) return kCounterOverflow;
        return kOk;
    }

    // Whether all arrays, in the layouts of cpu_layers.hpp with their padding, have sizes within int64.
    bool sizes_fit() const {
        int64_t numbers = 0, across = 1;
        for (int64_t i = 0; i < call.layers; ++i) {
            const int64_t layer = (call.widths[i + 1] + 64) * (call.widths[i] + 64) + kLaneWeights * 64;
            if (layer > std::numeric_limits<int64_t>::max() - numbers) return false;
            numbers += layer, across = std::max({across, call.widths[i], call.widths[i + 1]});
        }
        return fits(8, call.replicas, numbers) && fits(8, kMostThreads, numbers) && fits(8, call.replicas, call.rows, across) &&
               fits(16, call.replicas, call.rows, call.tail) && fits(8, call.replicas, call.rows, call.samples);
    }

    int make(bool backward) {
        if (const int error = check()) return error;
        rows_together = 2 * call.samples <= kTileSamples ? kTileSamples / call.samples : 1;
        groups = pieces(call.rows, rows_together);
        tiles = pieces(call.samples, kTileSamples);
        const auto count = static_cast<size_t>(call.layers);
        shapes.reset(new (std::nothrow) Shape[count]);
        packed_from.reset(new (std::nothrow) int64_t[count]);
        turned_from.reset(new (std::nothrow) int64_t[count]);
        if (!shapes || !packed_from || !turned_from) return kOutOfMemory;
        own = call.variance_stride != 0 ? call.replicas : 1;
        for (int64_t i = 0; i < call.layers; ++i) {
            shapes[i] = {call.widths[i + 1], call.widths[i]};
            widest = call.widths[i + 1] > widest ? call.widths[i + 1] : widest;
            if (call.weight_strides[i] != 0 || call.bias_strides[i] != 0) own = call.replicas;
            packed_from[i] = size_packed, turned_from[i] = size_turned;
            size_packed += Arena<T>::line(shapes[i].units * (shapes[i].inputs + 1));
            size_turned += backward ? Arena<T>::line(shapes[i].units * shapes[i].inputs) : 0;
        }
        widest = latents > widest ? latents : widest;
        constant.reset(new (std::nothrow) T[static_cast<size_t>(own + 1)]);
        if (!packed.make(own * size_packed) || !precision.make(own * outputs) || !constant) return kOutOfMemory;
        if (backward && !turned.make(own * size_turned)) return kOutOfMemory;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (own > 1)
        for (int64_t r = 0; r < own; ++r) pack_replica(r, backward);
        return kOk;
    }

    int64_t replica(int64_t r) const { return own > 1 ? r : 0; }
    const T* weights(int64_t r, int64_t layer) const { return packed.at() + replica(r) * size_packed + packed_from[layer]; }
    const T* turned_weights(int64_t r, int64_t layer) const {
        return turned.at() + replica(r) * size_turned + turned_from[layer];
    }
    const T* x(int64_t r, int64_t row) const {
        return static_cast<const T*>(call.x) + r * call.x_stride + row * outputs;
    }
    int64_t rows_of(int64_t group) const { return smaller(rows_together, call.rows - group * rows_together); }

private:
    void pack_replica(int64_t r, bool backward) {
        for (int64_t i = 0; i < call.layers; ++i) {
            const auto [units, inputs] = shapes[i];
            const T* const w = static_cast<const T*>(call.weights[i]) + r * call.weight_strides[i];
            const T* b = static_cast<const T*>(call.biases[i]);
            if (b != nullptr) b += r * call.bias_strides[i];
            const int64_t in = inputs;
            pack(units, in + 1, [=](int64_t m, int64_t k) { return k < in ? w[m * in + k] : b != nullptr ? b[m] : T{0}; },
                 packed.at() + r * size_packed + packed_from[i]);
            if (backward)
                pack(inputs, units, [=](int64_t m, int64_t k) { return w[k * in + m]; },
                     turned.at() + r * size_turned + turned_from[i]);
        }
        double sum = 0;
        for (int64_t d = 0; d < outputs && call.variances != 0; ++d) {
            const T* const v = static_cast<const T*>(call.variance) + r * call.variance_stride;
            const double variance = static_cast<double>(v[call.variances == 1 ? 0 : d]);
            precision.at()[r * outputs + d] = static_cast<T>(0.5 / variance);
            sum -= 0.5 * (std::log(variance) + kLog2Pi);
        }
        constant[r] = static_cast<T>(sum);
    }
};

// What a thread works in, and the state of its tile. Arrays [..][64] have a sample in each lane; Panels are of cpu_layers.
template <class T>
struct Space {
    // of a group of rows
    int64_t row = 0, rows = 0, each = 0;  // rows in the tile, samples of each
    T *mean, *scale;                      // [latents][64]
    T* log_scales;                        // log scales summed over latents [64]
    const T* target;                      // x: one row, or
    T* targets;                           // [outputs][64]
    // of a tile
    int64_t count = 0, panels = 0;
    T *noise, *log_weights;               // [latents][64], [64]
    Panels<T>* values;                    // of each layer's inputs, with a row of ones below
    Panels<T>* slopes;                    // of each layer's activation (backward)
    Panels<T> output;                     // one block, or in backward all outputs and then what comes back to a layer
    T *partial, *factor, *total;          // of log p(x | z) [64]
    T *draws, *block;

    // The list of arrays, gone through twice: for the size of all, and for addresses.
    void lay_out(const Plan<T>& plan, bool backward) {
        constexpr int64_t tile = kTileSamples;
        const int64_t layers = plan.call.layers;
        mean = take(plan.latents * tile), scale = take(plan.latents * tile);
        noise = take(plan.latents * tile);
        log_scales = take(tile), log_weights = take(tile), partial = take(tile), factor = take(tile), total = take(tile);
        targets = take(plan.rows_together > 1 ? plan.outputs * tile : 0);
        draws = take(plan.latents * tile + 8 * tile), block = take(4 * kLanes);
        for (int64_t i = 0; i < layers; ++i) {
            const int64_t inputs = plan.shapes[i].inputs;
            values[i] = {take((inputs + 1) * tile), (inputs + 1) * kPanel<T>};
            const bool kept = backward && plan.call.activations[i] != kIdentity;
            slopes[i] = {take(kept ? plan.shapes[i].units * tile : 0), plan.shapes[i].units * kPanel<T>};
        }
        const int64_t kept = backward ? plan.widest : smaller(plan.outputs, kBlock);
        output = {take(kept * tile), kept * kPanel<T>};
    }

    bool make(const Plan<T>& plan, bool backward, int64_t more) {
        const auto layers = static_cast<size_t>(plan.call.layers);
        panels_.reset(new (std::nothrow) Panels<T>[2 * layers]);
        if (!panels_) return false;
        values = panels_.get(), slopes = values + layers;
        lay_out(plan, backward);
        more_ = used_;
        if (!arena_.make(used_ + more)) return false;
        used_ = 0;
        lay_out(plan, backward);
        for (int64_t i = 0; i < plan.call.layers; ++i)
            for (int64_t p = 0; p < kTileSamples / kPanel<T>; ++p)
                for (int64_t s = 0; s < kPanel<T>; ++s)
                    values[i].at[p * values[i].stride + plan.shapes[i].inputs * kPanel<T> + s] = 1;
        return true;
    }

    T* more() const { return arena_.at() + more_; }  // the numbers asked for beside the list

private:
    T* take(int64_t numbers) {
        T* const at = arena_.at() == nullptr ? nullptr : arena_.at() + used_;
        used_ += Arena<T>::line(numbers);
        return at;
    }

    std::unique_ptr<Panels<T>[]> panels_;
    Arena<T> arena_;
    int64_t used_ = 0, more_ = 0;
};

// The rows of a group come to lie in the lanes: all lanes of one row's tile are alike.
template <class T>
void place_rows(const Plan<T>& plan, int64_t r, int64_t group, Space<T>& space) {
    const int64_t latents = plan.latents, samples = plan.call.samples;
    space.row = group * plan.rows_together, space.rows = plan.rows_of(group);
    space.target = plan.x(r, space.row);
    const auto fill = [&](int64_t lane, T value, T* to) {
        if (space.rows == 1) std::fill(to, to + kTileSamples, value);
        else to[lane] = value;
    };
    const int64_t first = (r * plan.call.rows + space.row) * latents;
    for (int64_t lane = 0; lane < (space.rows == 1 ? 1 : kTileSamples); ++lane) {
        const int64_t mine = space.rows > 1 && lane / samples < space.rows ? lane / samples : 0;
        const T* const mean = plan.call.mean == nullptr ? nullptr : static_cast<const T*>(plan.call.mean) + first + mine * latents;
        const T* const log_scale = static_cast<const T*>(plan.call.log_scale) + first + mine * latents;
        T sum = 0;
        for (int64_t l = 0; l < latents; ++l) {
            sum += log_scale[l];
            fill(lane, mean == nullptr ? T{0} : mean[l], space.mean + l * kTileSamples);
            fill(lane, std::exp(log_scale[l]), space.scale + l * kTileSamples);
        }
        fill(lane, sum, space.log_scales);
        for (int64_t d = 0; d < plan.outputs && plan.rows_together > 1; ++d)
            fill(lane, space.target[mine * plan.outputs + d], space.targets + d * kTileSamples);
    }
}

// Whole tiles of 1 or 2 latents take the lanes as Philox fills them: where a sample of such a tile stands, else in order.
inline int64_t lane_of(int64_t sample, int64_t each, int64_t latents) {
    if (each != kTileSamples || latents > 2) return sample;
    const int64_t of_block = 4 / latents, block = sample / of_block;
    return (block / kLanes * of_block + sample % of_block) * kLanes + block % kLanes;
}

// The noise of samples sample .. of the rows.
template <class T>
void draw_noise(const Plan<T>& plan, int64_t r, int64_t sample, Space<T>& space) {
    const Importance& call = plan.call;
    const int64_t latents = plan.latents;
    const PhiloxKey key = philox_key(call.seed);
    Counters at;
    for (uint32_t& one : at.repetition) one = static_cast<uint32_t>(call.repetition);
    const auto use = static_cast<uint32_t>(call.stream + 256 * call.replica_ids[r]);
    for (uint32_t& one : at.use) one = use;
    const int64_t block = sample * latents / 4;
    const auto row = static_cast<uint32_t>(call.first_row + space.row);
    if (space.each == kTileSamples && (latents == 1 || latents == 2 || latents == 4)) {
        for (uint32_t& one : at.row) one = row;
        for (int64_t g = 0; g < latents; ++g) {
            for (int lane = 0; lane < kLanes; ++lane) at.block[lane] = static_cast<uint32_t>(block + g * kLanes + lane);
            T(*const made)[kLanes] = reinterpret_cast<T(*)[kLanes]>(space.block);
            normal_lanes(key, at, made);
            for (int64_t i = 0; i < 4; ++i) {
                const int64_t place = (g * (4 / latents) + i / latents) * kLanes;
                std::memcpy(space.noise + i % latents * kTileSamples + place, made[i], sizeof(made[i]));
            }
        }
        return;
    }
    const int64_t each = pieces(space.each * latents, 4), blocks = space.rows * each;  // of a row, of all
    for (int64_t first = 0; first < blocks; first += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t b = smaller(first + lane, blocks - 1);
            at.row[lane] = row + static_cast<uint32_t>(b / each);
            at.block[lane] = static_cast<uint32_t>(block + b % each);
        }
        normal_tile(key, at, space.draws + 4 * first);
    }
    for (int64_t lane = 0; lane < kTileSamples; ++lane) {
        const bool inside = lane < space.count;
        const T* const from = space.draws + (inside ? lane / space.each * 4 * each + lane % space.each * latents : 0);
        for (int64_t l = 0; l < latents; ++l) space.noise[l * kTileSamples + lane] = inside ? from[l] : T{0};
    }
}

// log p(x | output) of a block of outputs; in backward its slope takes the outputs' place.
template <class T, bool gaussian, bool slopes>
LIBI_INLINE void score_block(const Plan<T>& plan, int64_t r, Space<T>& space, int64_t first, int64_t units, int64_t panel,
                             T* values) {
    using V = Vector<T>;
    const T* const precision = plan.precision.at() + plan.replica(r) * plan.outputs + first;
    const int64_t in_tile = panel * kPanel<T>;
    const bool together = plan.rows_together > 1;
    for (int64_t v = 0; v < kPanel<T>; v += kWidth<T>) {
        V partial = load<T>(space.partial + in_tile + v), factor = load<T>(space.factor + in_tile + v);
        for (int64_t d = 0; d < units; ++d) {
            const V x = together ? load<T>(space.targets + (first + d) * kTileSamples + in_tile + v)
                                 : all<T>(space.target[first + d]);
            T* const at = values + d * kPanel<T> + v;
            const V o = load<T>(at);
            if constexpr (gaussian) {
                const V error = x - o, scaled = error * all<T>(precision[d]);
                partial = multiply_add(-error, scaled, partial);
                if constexpr (slopes) store<T>(at, scaled + scaled);
            } else {
                // log(1 + e^-|o|) is taken of a product, at most 2^42, once for all.
                const V e = exp_of<T>(-absolute<T>(o));
                partial = partial + multiply_add(x, o, -at_least(V{}, o));
                factor = multiply_add(factor, e, factor);
                if constexpr (slopes) {
                    const V inverse = all<T>(1) / (all<T>(1) + e);
                    store<T>(at, x - (o > V{} ? inverse : e * inverse));
                }
            }
        }
        const bool last = (first + units) % kOutputsSummed == 0 || first + units == plan.outputs;
        if (last) {
            if constexpr (!gaussian) partial = partial - log_of<T>(factor), factor = all<T>(1);
            T* const total = space.total + in_tile + v;
            store<T>(total, load<T>(total) + partial);
            partial = V{};
        }
        store<T>(space.partial + in_tile + v, partial);
        store<T>(space.factor + in_tile + v, factor);
    }
}

// All layers over the codes in space.values[0]: log p(x | z) + start comes to stand in space.total, and in backward the slopes
// of log p(x | output) in space.output. `keep_outputs` is called with each block of outputs before slopes take its place.
template <class T, bool backward, class KeepOutputs>
void run_layers(const Plan<T>& plan, int64_t r, T start, Space<T>& space, KeepOutputs keep_outputs) {
    const Importance& call = plan.call;
    for (int64_t s = 0; s < space.panels * kPanel<T>; s += kWidth<T>) {
        store<T>(space.total + s, all<T>(start));
        store<T>(space.partial + s, Vector<T>{});
        store<T>(space.factor + s, all<T>(1));
    }
    for (int64_t i = 0; i < call.layers; ++i) {
        const auto [units, inputs] = plan.shapes[i];
        const bool last = i + 1 == call.layers, plain = call.activations[i] == kIdentity;
        const Panels<T> slopes = space.slopes[i];
        const auto run = activation<T>(call.activations[i], backward);
        const auto act = [&](int64_t first, int64_t m, int64_t panel, T* values) {
            if (!plain) run(values, m, slopes.at + panel * slopes.stride + first * kPanel<T>);
        };
        const T* const w = plan.weights(r, i);
        if (!last) {
            product(w, units, inputs + 1, space.values[i], space.panels, space.values[i + 1], true, act);
            continue;
        }
        const auto score = [&](int64_t first, int64_t m, int64_t panel, T* values) {
            act(first, m, panel, values);
            keep_outputs(first, m, panel, values);
            if (call.variances != 0) score_block<T, true, backward>(plan, r, space, first, m, panel, values);
            else score_block<T, false, backward>(plan, r, space, first, m, panel, values);
        };
        product(w, units, inputs + 1, space.values[i], space.panels, space.output, backward, score);
    }
}

struct Nothing {
    template <class T>
    void operator()(int64_t, int64_t, int64_t, T*) const {}
};

// What comes back through layer i from the slopes of its sums: those of the sums of the layer below, or of the codes.
template <class T>
void back_through(const Plan<T>& plan, int64_t r, int64_t i, const Space<T>& space, Panels<T> delta, Panels<T> next) {
    const auto [units, inputs] = plan.shapes[i];
    const Panels<T> slopes = i > 0 ? space.slopes[i - 1] : Panels<T>{};
    const bool plain = i == 0 || plan.call.activations[i - 1] == kIdentity;
    const auto chain = [&](int64_t first, int64_t m, int64_t panel, T* values) {
        if (plain) return;
        const T* const slope = slopes.at + panel * slopes.stride + first * kPanel<T>;
        for (int64_t s = 0; s < m * kPanel<T>; s += kWidth<T>) store<T>(values + s, load<T>(values + s) * load<T>(slope + s));
    };
    product(plan.turned_weights(r, i), inputs, units, delta, space.panels, next, true, chain);
}

// The codes of samples `sample` .. of the rows placed, and log N(z; 0, I) - log q(z) in space.log_weights.
template <class T>
void draw_codes(const Plan<T>& plan, int64_t r, int64_t sample, Space<T>& space) {
    using V = Vector<T>;
    space.each = smaller(kTileSamples, plan.call.samples - sample);
    space.count = space.rows * space.each;
    space.panels = pieces(space.count, kPanel<T>);
    draw_noise(plan, r, sample, space);
    for (int64_t s = 0; s < space.panels * kPanel<T>; s += kWidth<T>) {
        const int64_t panel = s / kPanel<T>, in_panel = s % kPanel<T>;
        V sum = V{};
        for (int64_t l = 0; l < plan.latents; ++l) {
            const V noise = load<T>(space.noise + l * kTileSamples + s);
            const V z = multiply_add(load<T>(space.scale + l * kTileSamples + s), noise,
                                     load<T>(space.mean + l * kTileSamples + s));
            store<T>(space.values[0].at + panel * space.values[0].stride + l * kPanel<T> + in_panel, z);
            sum = sum + multiply_add(noise, noise, -(z * z));
        }
        store<T>(space.log_weights + s, multiply_add(sum, all<T>(static_cast<T>(0.5)), load<T>(space.log_scales + s)));
    }
}

// The tile of these samples: codes, layers, log-weights (-infinity in lanes of no sample).
template <class T, bool backward, class KeepOutputs>
void run_tile(const Plan<T>& plan, int64_t r, int64_t sample, Space<T>& space, KeepOutputs keep_outputs) {
    draw_codes(plan, r, sample, space);
    run_layers<T, backward>(plan, r, plan.constant[plan.replica(r)], space, keep_outputs);
    for (int64_t s = 0; s < space.count; ++s) space.log_weights[s] += space.total[s];
    for (int64_t s = space.count; s < kTileSamples; ++s) space.log_weights[s] = -std::numeric_limits<T>::infinity();
}

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
