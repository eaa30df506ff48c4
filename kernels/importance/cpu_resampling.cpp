// Sampling importance resampling: the sums of cpu.cpp, and with them the posterior's mean and covariance by
// self-normalised weights and draws from the weighted samples. reference.py has the formulas.
//
// A row is gone through twice: once for its log-weights, which are kept (in float32 16 bytes a sample with what is made of
// them), then with their sum known, when only noise is drawn again. Draws are multinomial: number m takes the first sample
// whose cumulated weight passes v_m times the total. Moments are summed about the sample of the largest weight, so that a
// posterior much narrower than its proposal loses nothing.
//
// A thread takes a row; where there are fewer rows than threads, both passes are cut, into segments and into parts. Sums of
// both are merged in order, so that this moves no bit.
#include <algorithm>

#include "cpu_sums.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int64_t kPart = 16 * kSegment;  // samples whose moments are summed as one

// Of one row.
template <class T>
struct Resampled {
    std::unique_ptr<Sums<T>[]> sums;          // [segments]
    std::unique_ptr<T[]> log_weights;         // [samples], and -infinity to whole registers
    std::unique_ptr<T[]> weights;             // their exponentials, the largest 1
    std::unique_ptr<double[]> cumulated;      // sums of those
    std::unique_ptr<T[]> uniforms;            // [draws]
    std::unique_ptr<std::pair<int64_t, int64_t>[]> chosen;  // (sample, draw), in order of samples
    std::unique_ptr<T[]> centre;              // [latents]
    std::unique_ptr<double[]> moments;        // [parts] x first [latents], second [latents][latents]
    double total = 0;                         // of the weights

    bool make(const Plan<T>& plan, int64_t draws) {
        const auto n = static_cast<size_t>(plan.call.samples + kWidth<T>), m = static_cast<size_t>(draws);
        const auto l = static_cast<size_t>(plan.latents), parts = static_cast<size_t>(pieces(plan.call.samples, kPart));
        sums.reset(new (std::nothrow) Sums<T>[static_cast<size_t>(pieces(plan.call.samples, kSegment))]);
        log_weights.reset(new (std::nothrow) T[n]);
        weights.reset(new (std::nothrow) T[n]);
        cumulated.reset(new (std::nothrow) double[n]);
        uniforms.reset(new (std::nothrow) T[m + kTile]);
        chosen.reset(new (std::nothrow) std::pair<int64_t, int64_t>[m]);
        centre.reset(new (std::nothrow) T[l]);
        moments.reset(new (std::nothrow) double[parts * (l + l * l)]);
        return sums && log_weights && weights && cumulated && uniforms && chosen && centre && moments;
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
                 int64_t first, int64_t& next, double* moments, const Resampled<T>& room) {
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
    double* const second = moments + latents;
    for (int64_t l = 0; l < latents; ++l) {
        const V c = all<T>(room.centre[l]);
        moments[l] += sum([&](int64_t s) { return code(l, s) - c; });
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
void write_moments(const Resampling& call, const Plan<T>& plan, int64_t at_row, const Resampled<T>& room) {
    const int64_t latents = plan.latents, each = latents + latents * latents;
    double *const first = room.moments.get(), *const second = first + latents;
    for (int64_t part = 1; part < pieces(plan.call.samples, kPart); ++part)
        for (int64_t i = 0; i < each; ++i) first[i] += first[part * each + i];
    T* const mean = static_cast<T*>(call.mean) + at_row * latents;
    T* const covariance = static_cast<T*>(call.covariance) + at_row * latents * latents;
    for (int64_t l = 0; l < latents; ++l) {
        const double off = first[l] / room.total;
        mean[l] = static_cast<T>(static_cast<double>(room.centre[l]) + off);
        for (int64_t k = 0; k <= l; ++k) {
            const T value = static_cast<T>(second[l * latents + k] / room.total - off * (first[k] / room.total));
            covariance[l * latents + k] = covariance[k * latents + l] = value;
        }
    }
}

// Between both passes: what is written of a row's sums, which samples its draws take, and the code that moments are summed
// about. Where a tile holds all samples, in lanes begin .., their codes still stand there.
template <class T>
void settle(const Resampling& call, const Plan<T>& plan, int64_t r, int64_t row, int64_t begin, const Sums<T>& sums,
            Space<T>& space, Resampled<T>& room) {
    const int64_t samples = plan.call.samples;
    const T* const log_weights = room.log_weights.get();
    Largest<T> largest{space.more(), plan.call.tail};
    for (int64_t s = 0; s < samples; s += kTileSamples) largest.push(log_weights + s, smaller(kTileSamples, samples - s));
    write_row(plan, r * plan.call.rows + row, sums, largest);
    choose(call, plan, r, row, sums.pivot, room);
    room.total = sums.first;
    const int64_t best = std::max_element(log_weights, log_weights + samples) - log_weights;
    if (plan.tiles > 1) draw_codes(plan, r, best / kTileSamples * kTileSamples, space);
    const int64_t lane = begin + lane_of(best % kTileSamples, space.each, plan.latents);
    for (int64_t l = 0; l < plan.latents; ++l)
        room.centre[l] = space.values[0].at[lane / kPanel<T> * space.values[0].stride + l * kPanel<T> + lane % kPanel<T>];
}

// The second pass over a part of a row.
template <class T>
void run_part(const Resampling& call, const Plan<T>& plan, int64_t r, int64_t row, int64_t begin, int64_t part,
              Space<T>& space, const Resampled<T>& room) {
    const int64_t samples = plan.call.samples, each = plan.latents + plan.latents * plan.latents;
    double* const moments = room.moments.get() + part * each;
    std::fill(moments, moments + each, 0.0);
    const auto *const chosen = room.chosen.get(), *const end = chosen + call.draws;
    int64_t next = std::lower_bound(chosen, end, std::pair(part * kPart, int64_t{0})) - chosen;
    for (int64_t first = part * kPart; first < smaller(samples, (part + 1) * kPart); first += kTileSamples) {
        if (plan.tiles > 1) draw_codes(plan, r, first, space);
        const int64_t count = smaller(kTileSamples, samples - first);
        second_pass(call, plan, space, r * plan.call.rows + row, begin, begin + count, first, next, moments, room);
    }
}

// The rows of a group that share a tile.
template <class T>
void resample_together(const Resampling& call, const Plan<T>& plan, int64_t group, Space<T>& space, Resampled<T>& room) {
    const int64_t samples = plan.call.samples, r = group / plan.groups;
    place_rows(plan, r, group % plan.groups, space);
    run_tile<T, false>(plan, r, 0, space, Nothing{});
    for (int64_t i = 0; i < space.rows; ++i) {
        const int64_t row = space.row + i, begin = i * samples;
        Sums<T> sums;
        merge_lanes(space.log_weights, begin, begin + samples, sums);
        std::copy(space.log_weights + begin, space.log_weights + begin + samples, room.log_weights.get());
        settle(call, plan, r, row, begin, sums, space, room);
        run_part(call, plan, r, row, begin, 0, space, room);
        write_moments(call, plan, r * plan.call.rows + row, room);
    }
}

// Rows first .. first + count - 1 of all replicas', with tiles of their own and a room each: every step is shared out.
template <class T>
void resample_rows(const Resampling& call, const Plan<T>& plan, int64_t first, int64_t count, int64_t threads,
                   Space<T>* spaces, Resampled<T>* rooms) {
    const int64_t segments = pieces(plan.call.samples, kSegment), parts = pieces(plan.call.samples, kPart);
    const auto each = [&](int64_t steps, auto run) {  // run(replica, row, step, space, room)
        share_out(smaller(threads, count * steps), count * steps, [&](int64_t slot, int64_t i) {
            const int64_t r = (first + i / steps) / plan.groups, row = (first + i / steps) % plan.groups;
            place_rows(plan, r, row, spaces[slot]);
            run(r, row, i % steps, spaces[slot], rooms[i / steps]);
        });
    };
    each(segments, [&](int64_t r, int64_t, int64_t segment, Space<T>& space, Resampled<T>& room) {
        Largest<T> none;
        room.sums[segment] = run_segment(plan, r, segment, space, none, room.log_weights.get());
    });
    each(1, [&](int64_t r, int64_t row, int64_t, Space<T>& space, Resampled<T>& room) {
        Sums<T> sums;
        for (int64_t segment = 0; segment < segments; ++segment) sums.merge(room.sums[segment]);
        settle(call, plan, r, row, 0, sums, space, room);
    });
    each(parts, [&](int64_t r, int64_t row, int64_t part, Space<T>& space, Resampled<T>& room) {
        run_part(call, plan, r, row, 0, part, space, room);
    });
    for (int64_t row = 0; row < count; ++row) write_moments(call, plan, first + row, rooms[row]);
}

template <class T>
int resample(const Resampling& call) {
    Plan<T> plan(call.on);
    if (const int error = plan.check()) return error;
    if (call.draws < 0) return kBadSize;
    if (call.draws > 4 * kWords || call.stream < 0 || call.stream >= 256) return kCounterOverflow;
    if (!fits(8, call.on.replicas, call.on.rows, call.draws + 1, plan.latents)) return kBadSize;
    if (!fits(8, call.on.replicas, call.on.rows, plan.latents, plan.latents)) return kBadSize;
    if (!fits(8, pieces(call.on.samples, kPart), plan.latents, plan.latents + 1)) return kBadSize;
    if (const int error = plan.make(false)) return error;
    const int64_t groups = call.on.replicas * plan.groups;
    if (groups == 0) return kOk;
    const bool cut = groups < plan.threads && call.on.samples > kSegment;
    const int64_t threads = smaller(plan.threads, cut ? groups * pieces(call.on.samples, kSegment) : groups);
    const int64_t at_once = cut ? groups : threads;  // rows
    const std::unique_ptr<Space<T>[]> spaces(new (std::nothrow) Space<T>[static_cast<size_t>(threads)]);
    const std::unique_ptr<Resampled<T>[]> rooms(new (std::nothrow) Resampled<T>[static_cast<size_t>(at_once)]);
    if (!spaces || !rooms) return kOutOfMemory;
    for (int64_t t = 0; t < threads; ++t)
        if (!spaces[t].make(plan, false, Largest<T>::capacity(call.on.tail))) return kOutOfMemory;
    for (int64_t i = 0; i < at_once; ++i)
        if (!rooms[i].make(plan, call.draws)) return kOutOfMemory;
    if (cut) {
        resample_rows(call, plan, 0, groups, threads, spaces.get(), rooms.get());
        return kOk;
    }
    share_out(threads, groups, [&](int64_t slot, int64_t task) {
        if (plan.rows_together > 1) resample_together(call, plan, task, spaces[slot], rooms[slot]);
        else resample_rows(call, plan, task, 1, 1, &spaces[slot], &rooms[slot]);
    });
    return kOk;
}

}  // namespace

int resampling_f32(const Resampling* call) { return resample<float>(*call); }
int resampling_f64(const Resampling* call) { return resample<double>(*call); }

}  // namespace LIBI_ISA
}  // namespace libi
