// Gradients of importance-weighted log-likelihoods: reference.py has the formulas, cpu_tile.hpp the tile.
//
// A tile is run forward again; then, from the outputs' slopes times the samples' shares, layer after layer backwards, a
// layer's weights take outer products and its inputs products with the weights turned. Nothing is kept beyond the tile.
//
// Groups of rows are dealt out to parts, by the sizes of the call alone. A part has sums of its own for all parameters,
// and parts join the result in order: the number of threads moves no bit. As many parts are under way as threads are, or
// as fit in kPartsBytes.
#include <algorithm>

#include "cpu_tile.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int64_t kPartsBytes = 1 << 20;

enum Kind : int64_t { kReparameterized, kStickingTheLanding, kDoublyReparameterized, kKinds };

// What a part sums up: each layer's outer products, then the variances' slopes in double.
template <class T>
struct Part {
    T* weights;
    double* variance;
    bool fresh;  // nothing added yet
};

template <class T>
Outer<T> outer_of(const Plan<T>& plan, int64_t layer) {
    return {plan.shapes[layer].units, plan.shapes[layer].inputs + 1};
}

// What backward needs beside a tile's Space.
template <class T>
struct Room {
    T *share, *square, *path;  // grad v; the factor of the path through z (v or 1); a latent's path [64]
    T *from, *turned;          // [widest][64] in panels; for outer
    T* outputs;                // Bernoulli's outputs, where x wants a gradient
    double *mean, *log_scale, *x;  // sums of the rows in the tile [rows][..]
    std::unique_ptr<double[]> rows;

    static int64_t size_turned(const Plan<T>& plan) {
        int64_t size = 0;
        for (int64_t i = 0; i < plan.call.layers; ++i) size = std::max(size, outer_of(plan, i).turned());
        return Arena<T>::line(size);
    }
    static bool keeps_outputs(const Importance& call) { return call.to_x != nullptr && call.variances == 0; }
    static int64_t size(const Plan<T>& plan) {
        const int64_t outputs = keeps_outputs(plan.call) ? plan.widest : 0;
        return (3 + plan.widest + outputs) * kTileSamples + size_turned(plan);
    }
    bool make(const Plan<T>& plan, T* at) {
        share = at, square = share + kTileSamples, path = square + kTileSamples, from = path + kTileSamples;
        turned = from + plan.widest * kTileSamples;
        outputs = keeps_outputs(plan.call) ? turned + size_turned(plan) : nullptr;
        const int64_t wide = plan.call.to_x != nullptr ? plan.outputs : 0;
        rows.reset(new (std::nothrow) double[static_cast<size_t>(plan.rows_together * (2 * plan.latents + wide))]);
        mean = rows.get(), log_scale = mean + plan.rows_together * plan.latents;
        x = log_scale + plan.rows_together * plan.latents;
        return rows != nullptr;
    }
};

// Sums over the lanes of each row.
template <class T>
void add_rows(const Space<T>& space, const T* lanes, double* to, int64_t stride) {
    for (int64_t i = 0; i < space.rows; ++i) {
        double sum[8] = {};
        const T* const a = lanes + i * space.each;
        int64_t s = 0;
        for (; s + 8 <= space.each; s += 8)
            for (int64_t l = 0; l < 8; ++l) sum[l] += static_cast<double>(a[s + l]);
        for (int64_t l = 0; s < space.each; ++s, ++l) sum[l] += static_cast<double>(a[s]);
        to[i * stride] += ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    }
}

template <class T>
void gather(Panels<T> panels, int64_t unit, int64_t count, T* lanes) {
    for (int64_t p = 0; p < count; ++p)
        std::memcpy(lanes + p * kPanel<T>, panels.at + p * panels.stride + unit * kPanel<T>, sizeof(T) * kPanel<T>);
}

// v_s and shares; those of no sample, and of a row of no weight at all, are 0.
template <class T>
void find_shares(const Plan<T>& plan, int64_t r, const Space<T>& space, Room<T>& room) {
    const auto log_samples = static_cast<T>(std::log(static_cast<double>(plan.call.samples)));
    const int64_t first = r * plan.call.rows + space.row;
    alignas(64) T weights[kTileSamples], grads[kTileSamples];
    for (int64_t s = 0; s < kTileSamples; ++s) {
        const bool inside = s < space.count;
        const int64_t at = first + (inside ? s / space.each : 0);
        const T value = static_cast<const T*>(plan.call.log_likelihood)[at];
        const bool lost = !inside || std::isinf(value);
        weights[s] = lost ? -std::numeric_limits<T>::infinity() : space.log_weights[s] - value - log_samples;
        grads[s] = lost ? T{0} : static_cast<const T*>(plan.call.grad)[at];
    }
    const bool doubly = plan.call.kind == kDoublyReparameterized;
    for (int64_t s = 0; s < kTileSamples; s += kWidth<T>) {
        const Vector<T> v = exp_of<T>(load<T>(weights + s)), share = v * load<T>(grads + s);
        store<T>(room.share + s, share);
        store<T>(room.square + s, doubly ? v : all<T>(1));
    }
}

// The outputs' slopes take their shares; x and the variances their gradients.
template <class T>
void start_back(const Plan<T>& plan, const Space<T>& space, Room<T>& room, Part<T>& part) {
    using V = Vector<T>;
    const Importance& call = plan.call;
    const bool gaussian = call.variances != 0, wants_x = call.to_x != nullptr;
    const bool wants_variance = call.to_variance != nullptr && gaussian;
    const int64_t last = call.layers - 1;
    const bool plain = call.activations[last] == kIdentity;
    alignas(64) T to_x[kTileSamples] = {}, to_variance[kTileSamples] = {};
    for (int64_t d = 0; d < plan.outputs; ++d) {
        for (int64_t s = 0; s < space.panels * kPanel<T>; s += kWidth<T>) {
            const int64_t panel = s / kPanel<T>, in_panel = d * kPanel<T> + s % kPanel<T>;
            T* const at = space.output.at + panel * space.output.stride + in_panel;
            const V share = load<T>(room.share + s), slope = load<T>(at), delta = share * slope;
            if (wants_x)
                store<T>(to_x + s, gaussian ? -delta : share * load<T>(room.outputs + panel * space.output.stride + in_panel));
            if (wants_variance) store<T>(to_variance + s, delta * slope);
            const V back = plain ? delta : delta * load<T>(space.slopes[last].at + panel * space.slopes[last].stride + in_panel);
            store<T>(at, back);
        }
        if (wants_x) add_rows(space, to_x, room.x + d, plan.outputs);
        if (wants_variance) {
            double sum = 0;
            for (int64_t s = 0; s < space.count; ++s) sum += static_cast<double>(to_variance[s]);
            part.variance[call.variances == 1 ? 0 : d] += sum;
        }
    }
    if (wants_variance) {
        double sum = 0;
        for (int64_t s = 0; s < space.count; ++s) sum += static_cast<double>(room.share[s]);
        part.variance[call.variances] += sum;
    }
}

// Codes' slopes, in room.from, become gradients of the proposal.
template <class T>
void end_back(const Plan<T>& plan, const Space<T>& space, Room<T>& room, Panels<T> slope) {
    using V = Vector<T>;
    const bool reparameterized = plan.call.kind == kReparameterized;
    alignas(64) T to_scale[kTileSamples] = {};
    for (int64_t l = 0; l < plan.latents; ++l) {
        const int64_t lanes = l * kTileSamples;
        for (int64_t s = 0; s < space.panels * kPanel<T>; s += kWidth<T>) {
            const int64_t panel = s / kPanel<T>, in_panel = l * kPanel<T> + s % kPanel<T>;
            const V z = load<T>(space.values[0].at + panel * space.values[0].stride + in_panel);
            const V noise = load<T>(space.noise + lanes + s), scale = load<T>(space.scale + lanes + s);
            const V share = load<T>(room.share + s), square = load<T>(room.square + s);
            const V rest = reparameterized ? -z : noise / scale - z;
            const V path = square * multiply_add(share, rest, load<T>(slope.at + panel * slope.stride + in_panel));
            store<T>(room.path + s, path);
            const V through = path * noise * scale;
            store<T>(to_scale + s, reparameterized ? through + share : through);
        }
        add_rows(space, room.path, room.mean + l, plan.latents);
        add_rows(space, to_scale, room.log_scale + l, plan.latents);
    }
}

template <class T>
void run_back(const Plan<T>& plan, int64_t r, int64_t sample, Space<T>& space, Room<T>& room, Part<T>& part) {
    const Importance& call = plan.call;
    run_tile<T, true>(plan, r, sample, space, [&](int64_t first, int64_t m, int64_t panel, const T* values) {
        if (room.outputs != nullptr)
            std::memcpy(room.outputs + panel * space.output.stride + first * kPanel<T>, values, sizeof(T) * m * kPanel<T>);
    });
    find_shares(plan, r, space, room);
    start_back(plan, space, room, part);
    Panels<T> delta = space.output, next{room.from, plan.widest * kPanel<T>};
    T* sums = part.weights;
    for (int64_t i = call.layers - 1; i >= 0; --i) {
        if (call.to_weights != nullptr) {
            const Outer<T> o = outer_of(plan, i);
            outer(o, delta, space.values[i], space.panels * kPanel<T>, room.turned, sums, part.fresh);
            sums += Arena<T>::line(o.size());
        }
        back_through(plan, r, i, space, delta, next);
        std::swap(delta, next);
    }
    part.fresh = false;
    end_back(plan, space, room, delta);
}

template <class T>
void run_group(const Plan<T>& plan, int64_t r, int64_t group, Space<T>& space, Room<T>& room, Part<T>& part) {
    const Importance& call = plan.call;
    const int64_t latents = plan.latents, outputs = plan.outputs;
    place_rows(plan, r, group, space);
    for (int64_t i = 0; i < space.rows * latents; ++i) room.mean[i] = room.log_scale[i] = 0;
    for (int64_t i = 0; i < space.rows * outputs && call.to_x != nullptr; ++i) room.x[i] = 0;
    for (int64_t sample = 0; sample < call.samples; sample += kTileSamples) run_back(plan, r, sample, space, room, part);
    const int64_t row = r * call.rows + space.row;
    for (int64_t i = 0; i < space.rows * latents; ++i) {
        static_cast<T*>(call.to_mean)[row * latents + i] = static_cast<T>(room.mean[i]);
        static_cast<T*>(call.to_log_scale)[row * latents + i] = static_cast<T>(room.log_scale[i]);
    }
    for (int64_t i = 0; i < space.rows * outputs && call.to_x != nullptr; ++i)
        static_cast<T*>(call.to_x)[row * outputs + i] = static_cast<T>(room.x[i]);
}

// How the rows of a replica are dealt out: enough parts for a few threads, each of several tiles.
int64_t parts_of(int64_t groups, int64_t tiles) {
    const int64_t all = groups * tiles;
    const int64_t many = all / 64;
    const int64_t parts = all <= 64 ? pieces(all, 4) : many < 16 ? 16 : smaller(many, 64);
    return smaller(parts, groups);
}

// Row `unit` of a layer's weights: `count` parts of replica r in order; the first of all sets it, the others add to it.
template <class T>
void join(const Importance& call, const Outer<T>& o, int64_t layer, int64_t r, int64_t unit, const Part<T>* parts,
          int64_t count, int64_t offset, bool set) {
    T* const weight = static_cast<T*>(call.to_weights[layer]) + (r * o.units + unit) * (o.inputs - 1);
    T& bias = static_cast<T*>(call.to_biases[layer])[r * o.units + unit];
    for (int64_t p = 0; p < count; ++p) {
        const T* const from = parts[p].weights + offset;
        const auto add = [&](T& to, int64_t k) { to = set && p == 0 ? o.value(from, unit, k) : to + o.value(from, unit, k); };
        for (int64_t k = 0; k + 1 < o.inputs; ++k) add(weight[k], k);
        add(bias, o.inputs - 1);
    }
}

template <class T>
int backward(const Importance& call) {
    if (call.kind < 0 || call.kind >= kKinds) return kBadSize;
    Plan<T> plan(call);
    if (const int error = plan.make(true)) return error;
    if (call.replicas * plan.groups == 0) return kOk;
    int64_t size = 0, units = 0;  // of a part; of all layers
    for (int64_t i = 0; i < call.layers && call.to_weights != nullptr; ++i)
        size += Arena<T>::line(outer_of(plan, i).size()), units += plan.shapes[i].units;
    const int64_t parts = parts_of(plan.groups, plan.tiles), all = call.replicas * parts;
    const int64_t threads = smaller(plan.threads, all);
    const int64_t fit = smaller(all, kPartsBytes / ((size + 1) * static_cast<int64_t>(sizeof(T))));
    const int64_t wave = fit > threads ? fit : threads;
    const int64_t slopes = call.variances + 1;  // of the variances, and the sum of shares

    const std::unique_ptr<Space<T>[]> spaces(new (std::nothrow) Space<T>[static_cast<size_t>(threads)]);
    const std::unique_ptr<Room<T>[]> rooms(new (std::nothrow) Room<T>[static_cast<size_t>(threads)]);
    const std::unique_ptr<Part<T>[]> under_way(new (std::nothrow) Part<T>[static_cast<size_t>(wave)]);
    const std::unique_ptr<double[]> variances(new (std::nothrow) double[static_cast<size_t>((wave + call.replicas) * slopes)]);
    Arena<T> weights;
    if (!spaces || !rooms || !under_way || !variances || !weights.make(wave * size)) return kOutOfMemory;
    for (int64_t t = 0; t < threads; ++t)
        if (!spaces[t].make(plan, true, Room<T>::size(plan)) || !rooms[t].make(plan, spaces[t].more())) return kOutOfMemory;
    double* const variance = variances.get() + wave * slopes;  // of each replica
    std::fill(variance, variance + call.replicas * slopes, 0.0);

    for (int64_t first = 0; first < all; first += wave) {
        const int64_t count = smaller(wave, all - first);
        share_out(threads, count, [&](int64_t slot, int64_t p) {
            const int64_t r = (first + p) / parts, part = (first + p) % parts;
            under_way[p] = {weights.at() + p * size, variances.get() + p * slopes, true};
            std::fill(under_way[p].variance, under_way[p].variance + slopes, 0.0);
            for (int64_t g = part * plan.groups / parts; g < (part + 1) * plan.groups / parts; ++g)
                run_group(plan, r, g, spaces[slot], rooms[slot], under_way[p]);
        });
        // Replicas r .. last have parts in this wave; a row of weights is joined by one thread.
        const int64_t r0 = first / parts, last = (first + count - 1) / parts;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
        for (int64_t item = 0; item < (last - r0 + 1) * units; ++item) {
            const int64_t r = r0 + item / units, begin = std::max(first, r * parts);
            const int64_t end = smaller(first + count, (r + 1) * parts);
            int64_t unit = item % units, offset = 0, layer = call.layers - 1;  // layers lie last first
            for (; unit >= plan.shapes[layer].units; --layer) {
                unit -= plan.shapes[layer].units;
                offset += Arena<T>::line(outer_of(plan, layer).size());
            }
            join(call, outer_of(plan, layer), layer, r, unit, under_way.get() + (begin - first), end - begin, offset,
                 begin == r * parts);
        }
        for (int64_t p = 0; p < count; ++p)
            for (int64_t v = 0; v < slopes; ++v) variance[(first + p) / parts * slopes + v] += under_way[p].variance[v];
    }
    if (call.to_variance != nullptr)
        for (int64_t r = 0; r < call.replicas; ++r)
            for (int64_t v = 0; v < call.variances; ++v) {
                const double each = static_cast<double>(call.variances == 1 ? plan.outputs : 1);
                const T* const at = static_cast<const T*>(call.variance) + r * call.variance_stride + v;
                const double shares = variance[r * slopes + call.variances];
                const double slope = variance[r * slopes + v] - each * shares / static_cast<double>(*at);
                static_cast<T*>(call.to_variance)[r * call.variances + v] = static_cast<T>(0.5 * slope);
            }
    return kOk;
}

}  // namespace

int importance_backward_f32(const Importance* call) { return backward<float>(*call); }
int importance_backward_f64(const Importance* call) { return backward<double>(*call); }

}  // namespace LIBI_ISA
}  // namespace libi
