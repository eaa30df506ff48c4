// What kernels of Markov chains share: the chains of a tile, their draws, the density where they stand, leapfrogs, and which
// of them go to the proposal. reference.py has the formulas, ../importance/cpu_tile.hpp the decoder over a tile.
//
// A tile has up to 64 chains of one row in lanes, or where a row has at most 32, all those of several rows, and runs from
// the first transition to the last: positions, momenta, slopes and adaptation stay in the L1 cache, and only what is kept
// is written. A chain's numbers depend on its own lane alone: tiles, other rows and threads move no bit of them.
#pragma once

#include <algorithm>
#include <utility>

#include "../importance/cpu_tile.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

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
    T *value, *moved;                 // log p(x, z) less its constants there, and where the position is
    T *step, *h;                      // eps, with its jitter
    T *probability, *change, *kinetic;
    double acceptance[kTileSamples];
    int64_t divergences[kTileSamples];
    Sequences<T, true> momentum;
    Sequences<T, false> uniform;

    static int64_t size(const Plan<T>& plan) { return (4 * plan.latents + plan.widest + 7) * kTileSamples; }
    T* make(const Plan<T>& plan, T* at) {  // -> what is left
        const auto take = [&](int64_t arrays) { return std::exchange(at, at + arrays * kTileSamples); };
        z = take(plan.latents), gradient = take(plan.latents), u = take(plan.latents), slope = take(plan.latents);
        next = {take(plan.widest), plan.widest * kPanel<T>};
        value = take(1), moved = take(1), step = take(1), h = take(1);
        probability = take(1), change = take(1), kinetic = take(1);
        return at;
    }
};

template <class T>
T* position(const Space<T>& space, int64_t l, int64_t s) {
    return space.values[0].at + s / kPanel<T> * space.values[0].stride + l * kPanel<T> + s % kPanel<T>;
}

template <class T>
LIBI_INLINE void move(const Space<T>& space, int64_t l, int64_t s, Vector<T> by) {
    T* const at = position(space, l, s);
    store<T>(at, load<T>(at) + by);
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

// log p(x, z) less its constants where the position is and, if asked, its gradient.
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

// Where a tile's chains lie among all. Lanes of no chain repeat the first.
struct Lanes {
    int64_t row, each, count;    // the tile's first row; chains of a row in it, and of all rows
    int64_t first, chains;       // the tile's first chain, and all of a row
    int64_t rows_before;         // of other replicas

    int64_t row_of(int64_t lane) const { return row + (lane < count ? lane / each : 0); }
    int64_t chain_of(int64_t lane) const { return first + (lane < count ? lane % each : 0); }
    int64_t in_rows(int64_t lane) const { return rows_before + row_of(lane); }
    int64_t in_all(int64_t lane) const { return in_rows(lane) * chains + chain_of(lane); }
};

// Chains first .. of a group of rows take their places at call.z.
template <class T, class Call>
Lanes place_chains(
    const Call& call, const Plan<T>& plan, int64_t r, int64_t group, int64_t first, Space<T>& space, Room<T>& room) {
    const int64_t chains = plan.call.samples;
    place_rows(plan, r, group, space);
    space.each = smaller(kTileSamples, chains - first);
    space.count = space.rows * space.each;
    space.panels = pieces(space.count, kPanel<T>);
    const Lanes lanes{space.row, space.each, space.count, first, chains, r * plan.call.rows};
    const auto place = [&](int64_t lane) { return std::pair(lanes.row_of(lane), lanes.chain_of(lane)); };
    room.momentum.place(plan, r, call.momentum_stream, space.panels * kPanel<T>, place);
    room.uniform.place(plan, r, call.acceptance_stream, space.panels * kPanel<T>, place);
    for (int64_t lane = 0; lane < space.panels * kPanel<T>; ++lane) {
        const T* const z = static_cast<const T*>(call.z) + lanes.in_all(lane) * plan.latents;
        for (int64_t l = 0; l < plan.latents; ++l) *position(space, l, lane) = room.z[l * kTileSamples + lane] = z[l];
        room.acceptance[lane] = 0, room.divergences[lane] = 0;
    }
    return lanes;
}

// The density where the chains stand becomes what room.moved and room.slope have.
template <class T>
void stay(const Plan<T>& plan, Room<T>& room) {
    std::copy(room.moved, room.moved + kTileSamples, room.value);
    std::copy(room.slope, room.slope + plan.latents * kTileSamples, room.gradient);
}

// Step sizes of transition t of all, with their jitter; -> what decides on acceptance [64].
template <class T>
const T* draw_steps(double jitter, int64_t t, const Space<T>& space, Room<T>& room) {
    using V = Vector<T>;
    const V range = all<T>(static_cast<T>(2 * jitter)), least = all<T>(static_cast<T>(1 - jitter));
    const T *const v = room.uniform.draw(2 * t), *const w = room.uniform.draw(2 * t + 1);
    over_lanes(space, [&](int64_t s) {
        store<T>(room.h + s, load<T>(room.step + s) * multiply_add(range, load<T>(w + s), least));
    });
    return v;
}

template <class T>
void draw_momenta(const Plan<T>& plan, int64_t t, const Space<T>& space, Room<T>& room) {
    for (int64_t l = 0; l < plan.latents; ++l) {
        const T* const drawn = room.momentum.draw(t * plan.latents + l);
        std::copy(drawn, drawn + space.panels * kPanel<T>, room.u + l * kTileSamples);
    }
}

// A proposal in space and room.moved, and what it costs in room.change. The chains' density is what the target makes of
// p(x, z): target.advance(gradient, half, moves) adds h, or half of it, times its slope to the momenta, the gradient [latents][64]
// being that of log p(x, z) where the position is, and moves the position along them; target.gain(s) is what its logarithm
// gains from where the chains stand to where the position is.
template <class T, class Target>
void leapfrog(const Plan<T>& plan, int64_t r, int64_t steps, const Target& target, Space<T>& space, Room<T>& room) {
    using V = Vector<T>;
    const auto kinetic = [&](int64_t s) {  // doubled
        V sum = V{};
        for (int64_t l = 0; l < plan.latents; ++l) {
            const V u = load<T>(room.u + l * kTileSamples + s);
            sum = multiply_add(u, u, sum);
        }
        return sum;
    };
    over_lanes(space, [&](int64_t s) { store<T>(room.kinetic + s, kinetic(s)); });
    target.advance(room.gradient, true, true);
    for (int64_t k = 1; k <= steps; ++k) {
        evaluate<T, true>(plan, r, space, room);
        target.advance(room.slope, k == steps, k < steps);
    }
    over_lanes(space, [&](int64_t s) {
        const V change = all<T>(static_cast<T>(0.5)) * (kinetic(s) - load<T>(room.kinetic + s));
        store<T>(room.change + s, change - target.gain(s));
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

// Whether the draws of these transitions fit the counters.
inline int check_draws(
    const Importance& on, int64_t transitions, int64_t first_transition, int64_t momentum_stream, int64_t acceptance_stream) {
    if (first_transition < 0 || transitions > kWords || first_transition > kWords - transitions) return kCounterOverflow;
    const int64_t drawn = on.widths[0] > 2 ? on.widths[0] : 2;
    if (first_transition + transitions > 4 * kWords / drawn || on.samples > kWords) return kCounterOverflow;
    if (momentum_stream < 0 || momentum_stream >= 256) return kCounterOverflow;
    return acceptance_stream < 0 || acceptance_stream >= 256 ? kCounterOverflow : kOk;
}

// run_tile(call, plan, r, group, first chain, space, room) for all tiles; RoomOf: a Room, with what the kernel adds to it.
template <class T, class RoomOf, class Call, class RunTile>
int run_tiles(const Call& call, int (*check)(const Call&), RunTile run_tile) {
    Plan<T> plan(call.on);
    if (const int error = plan.check()) return error;
    if (const int error = check(call)) return error;
    if (const int error = plan.make(true)) return error;
    const int64_t tasks = call.on.replicas * plan.groups * plan.tiles;
    if (tasks == 0) return kOk;
    const int64_t threads = smaller(plan.threads, tasks);
    const std::unique_ptr<Space<T>[]> spaces(new (std::nothrow) Space<T>[static_cast<size_t>(threads)]);
    const std::unique_ptr<RoomOf[]> rooms(new (std::nothrow) RoomOf[static_cast<size_t>(threads)]);
    if (!spaces || !rooms) return kOutOfMemory;
    for (int64_t t = 0; t < threads; ++t) {
        if (!spaces[t].make(plan, true, RoomOf::size(plan))) return kOutOfMemory;
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
}  // namespace LIBI_ISA
}  // namespace libi
