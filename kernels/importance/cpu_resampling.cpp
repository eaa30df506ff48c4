// Sampling importance resampling: the sums of cpu.cpp, and with them the posterior's mean and covariance by
// self-normalised weights and draws from the weighted samples. reference.py has the formulas.
//
// A row is gone through twice: once for its log-weights, which its thread keeps (8 bytes a sample), then with their sum
// known, when only noise is drawn again. Draws are multinomial: number m takes the first sample whose cumulated weight
// passes v_m times the total. Moments are summed about the sample of the largest weight, so that a posterior much
// narrower than its proposal loses nothing.
#include <algorithm>

#include "cpu_sums.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

template <class T>
struct Resampled {
    std::unique_ptr<T[]> log_weights;         // [samples], of one row, and -infinity to whole registers
    std::unique_ptr<T[]> weights;             // their exponentials, the largest 1
    std::unique_ptr<double[]> cumulated;      // sums of those
    std::unique_ptr<T[]> uniforms;            // [draws]
    std::unique_ptr<std::pair<int64_t, int64_t>[]> chosen;  // (sample, draw), in order of samples
    std::unique_ptr<double[]> moments;        // first [latents], second [latents][latents]
    std::unique_ptr<T[]> centre;              // [latents]

    bool make(const Plan<T>& plan, int64_t draws) {
        const auto n = static_cast<size_t>(plan.call.samples + kWidth<T>), m = static_cast<size_t>(draws);
        const auto l = static_cast<size_t>(plan.latents);
        log_weights.reset(new (std::nothrow) T[n]);
        weights.reset(new (std::nothrow) T[n]);
        cumulated.reset(new (std::nothrow) double[n]);
        uniforms.reset(new (std::nothrow) T[m + kTile]);
        chosen.reset(new (std::nothrow) std::pair<int64_t, int64_t>[m]);
        moments.reset(new (std::nothrow) double[l + l * l]);
        centre.reset(new (std::nothrow) T[l]);
        return log_weights && weights && cumulated && uniforms && chosen && moments && centre;
    }
};

template <class T>
void draw_uniforms(const Resampling& call, const Plan<T>& plan, int64_t r, int64_t row, T* out) {
    Counters at;
    for (int lane = 0; lane < kLanes; ++lane) {
        at.row[lane] = static_cast<uint32_t>(plan.call.first_row + row);
        at.repetition[lane] = static_cast<uint32_t>(plan.call.repetition);
        at.use[lane] = static_cast<uint32_t>(call.stream + 256 * plan.call.replica_ids[r]);
    }
    for (int64_t first = 0; first < call.draws; first += kTile) {
        for (int lane = 0; lane < kLanes; ++lane) at.block[lane] = static_cast<uint32_t>(first / 4 + lane);
        uniform_tile(philox_key(plan.call.seed), at, out + first);
    }
}

// Which samples the draws take, in order of samples.
template <class T>
void choose(const Resampling& call, const Plan<T>& plan, int64_t r, int64_t row, T pivot, Resampled<T>& room) {
    draw_uniforms(call, plan, r, row, room.uniforms.get());
    double total = 0;
    const int64_t samples = plan.call.samples;
    for (int64_t s = samples; s < samples + kWidth<T>; ++s) room.log_weights[s] = -std::numeric_limits<T>::infinity();
    for (int64_t s = 0; s < samples; s += kWidth<T>)
        store<T>(room.weights.get() + s, exp_of<T>(load<T>(room.log_weights.get() + s) - all<T>(pivot)));
    for (int64_t s = 0; s < samples; ++s) room.cumulated[s] = total += static_cast<double>(room.weights[s]);
    const double* const begin = room.cumulated.get();
    // A row of no weight at all, or with a weight that is NaN, takes its first sample: its moments are NaN.
    for (int64_t m = 0; m < call.draws; ++m) {
        const double level = static_cast<double>(room.uniforms[m]) * total;
        const int64_t at = std::upper_bound(begin, begin + samples, level) - begin;
        room.chosen[m] = {total > 0 ? smaller(at, samples - 1) : 0, m};
    }
    std::sort(room.chosen.get(), room.chosen.get() + call.draws);
}

// Weights, codes and moments of a tile: lanes begin .. end - 1 hold samples first .. of the row.
template <class T>
void second_pass(const Resampling& call, const Plan<T>& plan, const Space<T>& space, int64_t at_row, int64_t begin, int64_t end,
                 int64_t first, int64_t& next, Resampled<T>& room) {
    using V = Vector<T>;
    const int64_t latents = plan.latents;
    alignas(64) T weight[kTileSamples] = {};
    const auto lane_of = [&](int64_t s) { return begin + LIBI_ISA::lane_of(s, space.each, latents); };
    for (int64_t s = 0; s < end - begin; ++s) weight[lane_of(s)] = room.weights[first + s];
    const auto code = [&](int64_t l, int64_t s) {
        return load<T>(space.values[0].at + s / kPanel<T> * space.values[0].stride + l * kPanel<T> + s % kPanel<T>);
    };
    const auto sum = [&](auto term) {
        alignas(64) T lanes[kStrip<T>] = {};
        for (int64_t s = begin / kStrip<T> * kStrip<T>; s < end; s += kWidth<T>) {
            T* const to = lanes + s % kStrip<T>;
            const V w = load<T>(weight + s);
            store<T>(to, load<T>(to) + (w > V{} ? w * term(s) : V{}));
        }
        return static_cast<double>(add_strip(lanes));
    };
    double* const second = room.moments.get() + latents;
    for (int64_t l = 0; l < latents; ++l) {
        const V c = all<T>(room.centre[l]);
        room.moments[l] += sum([&](int64_t s) { return code(l, s) - c; });
        for (int64_t k = 0; k <= l; ++k)
            second[l * latents + k] += sum([&](int64_t s) { return (code(l, s) - c) * (code(k, s) - all<T>(room.centre[k])); });
    }
    for (; next < call.draws && room.chosen[next].first < first + end - begin; ++next) {
        const auto [sample, m] = room.chosen[next];
        const int64_t lane = lane_of(sample - first), to = at_row * call.draws + m;
        T squares = 0;
        for (int64_t l = 0; l < latents; ++l) {
            const T noise = space.noise[l * kTileSamples + lane];
            squares += noise * noise;
            static_cast<T*>(call.z)[to * latents + l] =
                space.values[0].at[lane / kPanel<T> * space.values[0].stride + l * kPanel<T> + lane % kPanel<T>];
        }
        const T log_q = static_cast<T>(-0.5) * squares - space.log_scales[lane] -
                        static_cast<T>(0.5 * kLog2Pi * static_cast<double>(latents));
        static_cast<T*>(call.log_density)[to] = room.log_weights[sample] + log_q;
    }
}

template <class T>
void write_moments(const Resampling& call, const Plan<T>& plan, int64_t at_row, double total, const Resampled<T>& room) {
    const int64_t latents = plan.latents;
    const double* const second = room.moments.get() + latents;
    T* const mean = static_cast<T*>(call.mean) + at_row * latents;
    T* const covariance = static_cast<T*>(call.covariance) + at_row * latents * latents;
    for (int64_t l = 0; l < latents; ++l) {
        const double off = room.moments[l] / total;
        mean[l] = static_cast<T>(static_cast<double>(room.centre[l]) + off);
        for (int64_t k = 0; k <= l; ++k) {
            const T value = static_cast<T>(second[l * latents + k] / total - off * (room.moments[k] / total));
            covariance[l * latents + k] = covariance[k * latents + l] = value;
        }
    }
}

// One row: of a tile that it shares, or of tiles of its own.
template <class T>
void resample_row(const Resampling& call, const Plan<T>& plan, int64_t r, int64_t row, int64_t begin, Space<T>& space,
                  const Sums<T>& sums, Resampled<T>& room) {
    const int64_t samples = plan.call.samples, latents = plan.latents, at_row = r * plan.call.rows + row;
    const bool drawn = plan.tiles == 1;  // and its codes still stand there
    choose(call, plan, r, row, sums.pivot, room);
    const T* const weights = room.log_weights.get();
    const int64_t best = std::max_element(weights, weights + samples) - weights;
    if (!drawn) draw_codes(plan, r, best / kTileSamples * kTileSamples, space);
    const int64_t lane = begin + lane_of(best % kTileSamples, space.each, latents);
    for (int64_t l = 0; l < latents; ++l)
        room.centre[l] = space.values[0].at[lane / kPanel<T> * space.values[0].stride + l * kPanel<T> + lane % kPanel<T>];
    std::fill(room.moments.get(), room.moments.get() + latents + latents * latents, 0.0);
    int64_t next = 0;
    if (drawn) {
        second_pass(call, plan, space, at_row, begin, begin + samples, 0, next, room);
    } else {
        for (int64_t first = 0; first < samples; first += kTileSamples) {
            draw_codes(plan, r, first, space);
            second_pass(call, plan, space, at_row, 0, space.count, first, next, room);
        }
    }
    write_moments(call, plan, at_row, sums.first, room);
}

template <class T>
void resample_group(const Resampling& call, const Plan<T>& plan, int64_t r, int64_t group, Space<T>& space, Resampled<T>& room) {
    const int64_t samples = plan.call.samples, tail = plan.call.tail;
    place_rows(plan, r, group, space);
    if (plan.rows_together > 1) {
        run_tile<T, false>(plan, r, 0, space, Nothing{});
        for (int64_t i = 0; i < space.rows; ++i) {
            const T* const log_weights = space.log_weights + i * samples;
            Sums<T> sums;
            Largest<T> largest{space.more(), tail};
            merge_lanes(space.log_weights, i * samples, (i + 1) * samples, sums);
            largest.push(log_weights, samples);
            write_row(plan, r * plan.call.rows + space.row + i, sums, largest);
            std::copy(log_weights, log_weights + samples, room.log_weights.get());
            resample_row(call, plan, r, space.row + i, i * samples, space, sums, room);
        }
        return;
    }
    Sums<T> sums;
    Largest<T> largest{space.more(), tail};
    for (int64_t segment = 0; segment * kSegment < samples; ++segment)
        sums.merge(run_segment(plan, r, segment, space, largest, room.log_weights.get()));
    write_row(plan, r * plan.call.rows + space.row, sums, largest);
    resample_row(call, plan, r, space.row, 0, space, sums, room);
}

template <class T>
int resample(const Resampling& call) {
    Plan<T> plan(call.on);
    if (const int error = plan.check()) return error;
    if (call.draws < 0) return kBadSize;
    if (call.draws > 4 * kWords || call.stream < 0 || call.stream >= 256) return kCounterOverflow;
    if (!fits(8, call.on.replicas, call.on.rows, call.draws + 1, plan.latents)) return kBadSize;
    if (!fits(8, call.on.replicas, call.on.rows, plan.latents, plan.latents)) return kBadSize;
    if (const int error = plan.make(false)) return error;
    const int64_t groups = call.on.replicas * plan.groups;
    if (groups == 0) return kOk;
    const int64_t threads = smaller(plan.threads, groups);
    const std::unique_ptr<Space<T>[]> spaces(new (std::nothrow) Space<T>[static_cast<size_t>(threads)]);
    const std::unique_ptr<Resampled<T>[]> rooms(new (std::nothrow) Resampled<T>[static_cast<size_t>(threads)]);
    if (!spaces || !rooms) return kOutOfMemory;
    for (int64_t t = 0; t < threads; ++t)
        if (!spaces[t].make(plan, false, Largest<T>::capacity(call.on.tail)) || !rooms[t].make(plan, call.draws))
            return kOutOfMemory;
    share_out(threads, groups, [&](int64_t slot, int64_t task) {
        resample_group(call, plan, task / plan.groups, task % plan.groups, spaces[slot], rooms[slot]);
    });
    return kOk;
}

}  // namespace

int resampling_f32(const Resampling* call) { return resample<float>(*call); }
int resampling_f64(const Resampling* call) { return resample<double>(*call); }

}  // namespace LIBI_ISA
}  // namespace libi
