// Markov chains on p(z | x): reference.py has the formulas, ../importance/cpu_tile.hpp the decoder over a tile.
//
// A tile has up to 64 chains of one row in lanes, or where a row has at most 32, all those of several rows, and runs from
// the first transition to the last: positions, momenta, slopes and adaptation stay in the L1 cache, and only what is kept
// is written. A chain's numbers depend on its own lane alone: tiles, other rows and threads move no bit of them.
//
// A leapfrog of W7 (2-50-2) costs a register of chains 252 multiply-adds forward and 250 back, and 50 tanh.
#include <algorithm>

#include "../importance/cpu_tile.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

enum Method : int64_t { kHmc, kMala, kRandomWalk, kMethods };

constexpr double kGamma = 0.05, kT0 = 10, kKappa = 0.75;  // of dual averaging
constexpr double kDivergence = 1000;

// A sequence of draws in each lane, made four at a time.
template <class T, bool normal>
class Sequences {
public:
    template <class Place>  // place(lane) -> counters of its row and chain
    void place(const Plan<T>& plan, int64_t r, int64_t stream, int64_t lanes, Place place) {
        key_ = philox_key(plan.call.seed);
        groups_ = pieces(lanes, kLanes), block_ = -1;
        for (int64_t lane = 0; lane < groups_ * kLanes; ++lane) {
            Counters& at = at_[lane / kLanes];
            const auto [row, chain] = place(lane);
            at.row[lane % kLanes] = static_cast<uint32_t>(plan.call.first_row + row);
            at.repetition[lane % kLanes] = static_cast<uint32_t>(chain);
            at.use[lane % kLanes] = static_cast<uint32_t>(stream + 256 * plan.call.replica_ids[r]);
        }
    }
    const T* draw(int64_t i) {  // [64]
        if (i / 4 != block_) make(i / 4);
        return made_[i % 4];
    }

private:
    void make(int64_t block) {
        block_ = block;
        for (int64_t g = 0; g < groups_; ++g) {
            for (uint32_t& one : at_[g].block) one = static_cast<uint32_t>(block);
            alignas(64) T out[4][kLanes];
            if constexpr (normal) normal_lanes(key_, at_[g], out);
            else uniform_lanes(key_, at_[g], out);
            for (int64_t i = 0; i < 4; ++i) std::memcpy(made_[i] + g * kLanes, out[i], sizeof(out[i]));
        }
    }

    PhiloxKey key_;
    int64_t groups_ = 0, block_ = -1;
    Counters at_[kTileSamples / kLanes];
    alignas(64) T made_[4][kTileSamples];
};

// The chains of a tile. Arrays have a chain in each lane, [64], or [latents][64]; the position that moves is space.values[0].
template <class T>
struct Room {
    T *z, *gradient;                  // where the chains stand
    T *u, *slope;                     // momenta times scale; the gradient where the position is
    Panels<T> next;                   // what comes back through the layers
    T *value, *moved;                 // log pi less its constants there, and where the position is
    T *step, *h;                      // eps, with its jitter
    T *mu, *averaged, *bias;          // of dual averaging
    T *probability, *change, *kinetic;
    double acceptance[kTileSamples];
    int64_t divergences[kTileSamples];
    Sequences<T, true> momentum;
    Sequences<T, false> uniform;

    static int64_t size(const Plan<T>& plan) { return (4 * plan.latents + plan.widest + 10) * kTileSamples; }
    void make(const Plan<T>& plan, T* at) {
        const auto take = [&](int64_t arrays) { return std::exchange(at, at + arrays * kTileSamples); };
        z = take(plan.latents), gradient = take(plan.latents), u = take(plan.latents), slope = take(plan.latents);
        next = {take(plan.widest), plan.widest * kPanel<T>};
        value = take(1), moved = take(1), step = take(1), h = take(1), mu = take(1), averaged = take(1), bias = take(1);
        probability = take(1), change = take(1), kinetic = take(1);
    }
};

template <class T>
T* position(const Space<T>& space, int64_t l, int64_t s) {
    return space.values[0].at + s / kPanel<T> * space.values[0].stride + l * kPanel<T> + s % kPanel<T>;
}

// For each register of lanes.
template <class T, class Run>
LIBI_INLINE void over_lanes(const Space<T>& space, Run run) {
    for (int64_t s = 0; s < space.panels * kPanel<T>; s += kWidth<T>) run(s);
}

template <class T, class Run>
LIBI_INLINE void over_latents(const Plan<T>& plan, const Space<T>& space, Run run) {
    for (int64_t l = 0; l < plan.latents; ++l) over_lanes(space, [&](int64_t s) { run(l, s, l * kTileSamples + s); });
}

// log pi less its constants where the position is and, if asked, its gradient.
template <class T, bool wants_gradient>
void evaluate(const Plan<T>& plan, int64_t r, Space<T>& space, Room<T>& room) {
    using V = Vector<T>;
    run_layers<T, wants_gradient>(plan, r, T{0}, space, Nothing{});
    over_lanes(space, [&](int64_t s) {
        V sum = V{};
        for (int64_t l = 0; l < plan.latents; ++l) {
            const V z = load<T>(position(space, l, s));
            sum = multiply_add(z, z, sum);
        }
        store<T>(room.moved + s, multiply_add(sum, all<T>(static_cast<T>(-0.5)), load<T>(space.total + s)));
    });
    if constexpr (!wants_gradient) return;
    Panels<T> delta = space.output, next = room.next;
    const int64_t last = plan.call.layers - 1;
    if (plan.call.activations[last] != kIdentity)
        for (int64_t p = 0; p < space.panels; ++p)
            for (int64_t s = 0; s < plan.outputs * kPanel<T>; s += kWidth<T>) {
                T* const at = delta.at + p * delta.stride + s;
                store<T>(at, load<T>(at) * load<T>(space.slopes[last].at + p * space.slopes[last].stride + s));
            }
    for (int64_t i = last; i >= 0; --i) {
        back_through(plan, r, i, space, delta, next);
        std::swap(delta, next);
    }
    over_latents(plan, space, [&](int64_t l, int64_t s, int64_t at) {
        const V back = load<T>(delta.at + s / kPanel<T> * delta.stride + l * kPanel<T> + s % kPanel<T>);
        store<T>(room.slope + at, back - load<T>(position(space, l, s)));
    });
}

// A proposal in space and room.moved, and what it costs in room.change.
template <class T>
void propose(const Chains& call, const Plan<T>& plan, int64_t r, int64_t t, Space<T>& space, Room<T>& room) {
    using V = Vector<T>;
    const V half = all<T>(static_cast<T>(0.5));
    for (int64_t l = 0; l < plan.latents; ++l) {
        const T* const drawn = room.momentum.draw(t * plan.latents + l);
        std::copy(drawn, drawn + space.panels * kPanel<T>, room.u + l * kTileSamples);
    }
    const auto h = [&](int64_t s, int64_t at) { return load<T>(room.h + s) * load<T>(space.scale + at); };
    const auto move = [&](int64_t l, int64_t s, V by) {
        T* const at = position(space, l, s);
        store<T>(at, load<T>(at) + by);
    };
    if (call.method == kRandomWalk) {
        over_latents(plan, space, [&](int64_t l, int64_t s, int64_t at) { move(l, s, h(s, at) * load<T>(room.u + at)); });
        evaluate<T, false>(plan, r, space, room);
        over_lanes(space, [&](int64_t s) { store<T>(room.change + s, load<T>(room.value + s) - load<T>(room.moved + s)); });
        return;
    }
    const auto kinetic = [&](int64_t s) {  // doubled
        V sum = V{};
        for (int64_t l = 0; l < plan.latents; ++l) {
            const V u = load<T>(room.u + l * kTileSamples + s);
            sum = multiply_add(u, u, sum);
        }
        return sum;
    };
    over_lanes(space, [&](int64_t s) { store<T>(room.kinetic + s, kinetic(s)); });
    over_latents(plan, space, [&](int64_t l, int64_t s, int64_t at) {
        const V by = h(s, at), u = multiply_add(half * by, load<T>(room.gradient + at), load<T>(room.u + at));
        store<T>(room.u + at, u);
        move(l, s, by * u);
    });
    const int64_t steps = call.method == kHmc ? call.leapfrogs : 1;
    for (int64_t k = 0; k < steps; ++k) {
        evaluate<T, true>(plan, r, space, room);
        const bool last = k + 1 == steps;
        over_latents(plan, space, [&](int64_t l, int64_t s, int64_t at) {
            const V by = h(s, at), u = multiply_add(last ? half * by : by, load<T>(room.slope + at), load<T>(room.u + at));
            store<T>(room.u + at, u);
            if (!last) move(l, s, by * u);
        });
    }
    over_lanes(space, [&](int64_t s) {
        const V gained = load<T>(room.moved + s) - load<T>(room.value + s);
        store<T>(room.change + s, half * (kinetic(s) - load<T>(room.kinetic + s)) - gained);
    });
}

// Where log v < -change the chains go to the proposal; where not, the position goes back.
template <class T>
void accept(const Plan<T>& plan, const T* v, Space<T>& space, Room<T>& room) {
    using V = Vector<T>;
    over_lanes(space, [&](int64_t s) {
        const V gain = -load<T>(room.change + s), probability = exp_of<T>(at_most(V{}, gain));
        store<T>(room.probability + s, probability == probability ? probability : V{});
        const auto taken = log_of<T>(load<T>(v + s)) < gain;
        store<T>(room.value + s, taken ? load<T>(room.moved + s) : load<T>(room.value + s));
        for (int64_t l = 0; l < plan.latents; ++l) {
            const int64_t at = l * kTileSamples + s;
            const V z = taken ? load<T>(position(space, l, s)) : load<T>(room.z + at);
            store<T>(room.z + at, z);
            store<T>(position(space, l, s), z);
            store<T>(room.gradient + at, taken ? load<T>(room.slope + at) : load<T>(room.gradient + at));
        }
    });
    for (int64_t s = 0; s < space.count; ++s) {
        room.acceptance[s] += static_cast<double>(room.probability[s]);
        room.divergences[s] += !(static_cast<double>(room.change[s]) <= kDivergence);
    }
}

// After transition t = 1, 2, .. of the call.
template <class T>
void adapt(double target, int64_t t, const Space<T>& space, Room<T>& room) {
    using V = Vector<T>;
    const double time = static_cast<double>(t), rate = 1 / (time + kT0), weight = std::pow(time, -kKappa);
    const V a = all<T>(static_cast<T>(rate)), b = all<T>(static_cast<T>(1 - rate));
    const V c = all<T>(static_cast<T>(weight)), d = all<T>(static_cast<T>(1 - weight));
    over_lanes(space, [&](int64_t s) {
        const V missed = all<T>(static_cast<T>(target)) - load<T>(room.probability + s);
        const V bias = multiply_add(b, load<T>(room.bias + s), a * missed);
        const V log_step = multiply_add(bias, all<T>(static_cast<T>(-std::sqrt(time) / kGamma)), load<T>(room.mu + s));
        store<T>(room.bias + s, bias);
        store<T>(room.averaged + s, multiply_add(d, load<T>(room.averaged + s), c * log_step));
        store<T>(room.step + s, exp_of<T>(log_step));
    });
}

// A tile: chains first .. of a group of rows.
template <class T>
void run_tile(const Chains& call, const Plan<T>& plan, int64_t r, int64_t group, int64_t first, Space<T>& space, Room<T>& room) {
    using V = Vector<T>;
    const int64_t latents = plan.latents, chains = plan.call.samples, kept = call.transitions / call.thinning;
    place_rows(plan, r, group, space);
    space.each = smaller(kTileSamples, chains - first);
    space.count = space.rows * space.each;
    space.panels = pieces(space.count, kPanel<T>);
    const auto row_of = [&](int64_t lane) { return space.row + (lane < space.count ? lane / space.each : 0); };
    const auto chain_of = [&](int64_t lane) { return first + (lane < space.count ? lane % space.each : 0); };
    // Lanes of no chain repeat the first.
    const auto from = [&](int64_t lane) { return (r * plan.call.rows + row_of(lane)) * chains + chain_of(lane); };
    const auto place = [&](int64_t lane) { return std::pair(row_of(lane), chain_of(lane)); };
    room.momentum.place(plan, r, call.momentum_stream, space.panels * kPanel<T>, place);
    room.uniform.place(plan, r, call.acceptance_stream, space.panels * kPanel<T>, place);
    for (int64_t lane = 0; lane < space.panels * kPanel<T>; ++lane) {
        for (int64_t l = 0; l < latents; ++l)
            *position(space, l, lane) = room.z[l * kTileSamples + lane] = static_cast<const T*>(call.z)[from(lane) * latents + l];
        const T step = static_cast<const T*>(call.step)[from(lane)];
        room.step[lane] = step, room.averaged[lane] = std::log(step), room.bias[lane] = 0;
        room.mu[lane] = std::log(10 * step);
        room.acceptance[lane] = 0, room.divergences[lane] = 0;
    }
    if (call.method == kRandomWalk) evaluate<T, false>(plan, r, space, room);
    else evaluate<T, true>(plan, r, space, room);
    std::copy(room.moved, room.moved + kTileSamples, room.value);
    std::copy(room.slope, room.slope + latents * kTileSamples, room.gradient);
    const T constant = plan.constant[plan.replica(r)] - static_cast<T>(0.5 * kLog2Pi * static_cast<double>(latents));
    const V jitter = all<T>(static_cast<T>(2 * call.jitter)), least = all<T>(static_cast<T>(1 - call.jitter));
    for (int64_t t = 0; t < call.transitions; ++t) {
        const int64_t in_sequence = call.first_transition + t;
        const T *const v = room.uniform.draw(2 * in_sequence), *const w = room.uniform.draw(2 * in_sequence + 1);
        over_lanes(space, [&](int64_t s) {
            store<T>(room.h + s, load<T>(room.step + s) * multiply_add(jitter, load<T>(w + s), least));
        });
        propose(call, plan, r, in_sequence, space, room);
        accept(plan, v, space, room);
        if (call.target > 0) adapt(call.target, t + 1, space, room);
        if ((t + 1) % call.thinning != 0) continue;
        for (int64_t lane = 0; lane < space.count; ++lane) {
            const int64_t at = from(lane) * kept + t / call.thinning;
            static_cast<T*>(call.log_density)[at] = room.value[lane] + constant;
            for (int64_t l = 0; l < latents; ++l) static_cast<T*>(call.draws)[at * latents + l] = room.z[l * kTileSamples + lane];
        }
    }
    const double transitions = static_cast<double>(call.transitions > 0 ? call.transitions : 1);
    for (int64_t lane = 0; lane < space.count; ++lane) {
        const int64_t at = from(lane);
        const T step = call.target > 0 ? std::exp(room.averaged[lane]) : static_cast<const T*>(call.step)[at];
        static_cast<T*>(call.step_out)[at] = step;
        static_cast<T*>(call.acceptance)[at] = static_cast<T>(room.acceptance[lane] / transitions);
        call.divergences[at] = room.divergences[lane];
    }
}

int check(const Chains& call) {
    const Importance& on = call.on;
    if (call.method < 0 || call.method >= kMethods || call.transitions < 0 || call.leapfrogs < 1 || call.thinning < 1)
        return kBadSize;
    if (!(call.jitter >= 0 && call.jitter < 1) || !(call.target >= 0 && call.target < 1)) return kBadSize;
    if (call.first_transition < 0 || call.transitions > kWords || call.first_transition > kWords - call.transitions)
        return kCounterOverflow;
    const int64_t drawn = on.widths[0] > 2 ? on.widths[0] : 2;
    if (call.first_transition + call.transitions > 4 * kWords / drawn || on.samples > kWords) return kCounterOverflow;
    if (call.momentum_stream < 0 || call.momentum_stream >= 256) return kCounterOverflow;
    if (call.acceptance_stream < 0 || call.acceptance_stream >= 256) return kCounterOverflow;
    return fits(8, on.replicas, on.rows, on.samples, call.transitions / call.thinning + 1, on.widths[0]) ? kOk : kBadSize;
}

template <class T>
int run(const Chains& call) {
    Plan<T> plan(call.on);
    if (const int error = plan.check()) return error;
    if (const int error = check(call)) return error;
    if (const int error = plan.make(true)) return error;
    const int64_t tasks = call.on.replicas * plan.groups * plan.tiles;
    if (tasks == 0) return kOk;
    const int64_t threads = smaller(plan.threads, tasks);
    const std::unique_ptr<Space<T>[]> spaces(new (std::nothrow) Space<T>[static_cast<size_t>(threads)]);
    const std::unique_ptr<Room<T>[]> rooms(new (std::nothrow) Room<T>[static_cast<size_t>(threads)]);
    if (!spaces || !rooms) return kOutOfMemory;
    for (int64_t t = 0; t < threads; ++t) {
        if (!spaces[t].make(plan, true, Room<T>::size(plan))) return kOutOfMemory;
        rooms[t].make(plan, spaces[t].more());
    }
    share_out(threads, tasks, [&](int64_t slot, int64_t task) {
        const int64_t group = task / plan.tiles;
        run_tile(call, plan, group / plan.groups, group % plan.groups, task % plan.tiles * kTileSamples, spaces[slot],
                 rooms[slot]);
    });
    return kOk;
}

}  // namespace

int chains_f32(const Chains* call) { return run<float>(*call); }
int chains_f64(const Chains* call) { return run<double>(*call); }

}  // namespace LIBI_ISA
}  // namespace libi
