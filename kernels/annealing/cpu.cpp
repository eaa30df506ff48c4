// Annealed importance sampling: reference.py has the formulas, ../chains/cpu_chains.hpp the chains of a tile.
//
// A tile runs from the first temperature to the last. Where the chains stand, Room keeps log p(x, z) and its gradient, which
// are the same at every temperature; q is a few multiplications a latent, and made anew where it is needed.
#include "../chains/cpu_chains.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

template <class T>
struct AnnealedRoom : Room<T> {
    T *inverse, *pull;  // 1 / scale of q; slopes of log f_b [latents][64]
    T *offset;          // logarithm of what the adaptation made of the step sizes [64]
    T* tril;            // scales of the transitions, row after row of the triangle [latents (latents + 1) / 2][64]
    double log_weights[kTileSamples];

    static int64_t size(const Plan<T>& plan) {
        return Room<T>::size(plan) + (2 * plan.latents + 1 + plan.latents * (plan.latents + 1) / 2) * kTileSamples;
    }
    void make(const Plan<T>& plan, T* at) {
        inverse = Room<T>::make(plan, at), pull = inverse + plan.latents * kTileSamples;
        offset = pull + plan.latents * kTileSamples, tril = offset + kTileSamples;
    }
};

// log f_b, between log q and log p(x, z).
template <class T>
struct Between {
    using V = Vector<T>;
    const Plan<T>& plan;
    Space<T>& space;
    AnnealedRoom<T>& room;
    V b, rest;  // b, 1 - b

    V from_mean(const T* z, int64_t at) const {  // in standard deviations of q
        return (load<T>(z) - load<T>(space.mean + at)) * load<T>(room.inverse + at);
    }
    void advance(const T* gradient, bool half, bool moves) const {
        over_latents(plan, space, [&](int64_t l, int64_t s, int64_t at) {
            const V of_q = -from_mean(position(space, l, s), at) * load<T>(room.inverse + at);
            store<T>(room.pull + at, multiply_add(b, load<T>(gradient + at), rest * of_q));
        });
        const auto scale = [&](int64_t row, int64_t column, int64_t s) {
            return load<T>(room.tril + (row * (row + 1) / 2 + column) * kTileSamples + s);
        };
        over_latents(plan, space, [&](int64_t l, int64_t s, int64_t at) {
            V sum = V{};
            for (int64_t k = l; k < plan.latents; ++k)
                sum = multiply_add(scale(k, l, s), load<T>(room.pull + k * kTileSamples + s), sum);
            const V by = load<T>(room.h + s), kick = half ? all<T>(static_cast<T>(0.5)) * by : by;
            store<T>(room.u + at, multiply_add(kick, sum, load<T>(room.u + at)));
        });
        if (!moves) return;
        over_latents(plan, space, [&](int64_t l, int64_t s, int64_t) {
            V sum = V{};
            for (int64_t k = 0; k <= l; ++k)
                sum = multiply_add(scale(l, k, s), load<T>(room.u + k * kTileSamples + s), sum);
            move<T>(space, l, s, load<T>(room.h + s) * sum);
        });
    }
    template <class Z>  // log q less its constants at z(l)
    V log_q(int64_t s, Z z) const {
        V sum = V{};
        for (int64_t l = 0; l < plan.latents; ++l) {
            const V off = from_mean(z(l), l * kTileSamples + s);
            sum = multiply_add(off, off, sum);
        }
        return sum * all<T>(static_cast<T>(-0.5));
    }
    V log_q_there(int64_t s) const {  // where the chains stand
        return log_q(s, [&](int64_t l) { return room.z + l * kTileSamples + s; });
    }
    V gain(int64_t s) const {
        const V of_q = log_q(s, [&](int64_t l) { return position(space, l, s); }) - log_q_there(s);
        return multiply_add(b, load<T>(room.moved + s) - load<T>(room.value + s), rest * of_q);
    }
};

// A tile: chains first .. of a group of rows.
template <class T>
void anneal(
    const Annealing& call, const Plan<T>& plan, int64_t r, int64_t group, int64_t first, Space<T>& space, AnnealedRoom<T>& room) {
    using V = Vector<T>;
    const int64_t latents = plan.latents, temperatures = call.temperatures, windows = call.windows;
    const Lanes lanes = place_chains(call, plan, r, group, first, space, room);
    const double* const betas = call.betas + r * (temperatures + 1);
    const T* steps[kTileSamples];  // of each lane's row
    for (int64_t lane = 0; lane < space.panels * kPanel<T>; ++lane) {
        steps[lane] = static_cast<const T*>(call.step) + lanes.in_rows(lane) * temperatures;
        room.offset[lane] = 0, room.log_weights[lane] = 0;
    }
    over_latents(plan, space, [&](int64_t, int64_t, int64_t at) {
        store<T>(room.inverse + at, all<T>(1) / load<T>(space.scale + at));
    });
    const auto take_scales = [&](int64_t window) {
        for (int64_t lane = 0; lane < space.panels * kPanel<T>; ++lane) {
            const T* const matrix =
                static_cast<const T*>(call.scale_tril) + (lanes.in_rows(lane) * windows + window) * latents * latents;
            T* to = room.tril + lane;
            for (int64_t l = 0; l < latents; ++l)
                for (int64_t k = 0; k <= l; ++k, to += kTileSamples) *to = matrix[l * latents + k];
        }
    };
    evaluate<T, true>(plan, r, space, room);
    stay(plan, room);
    int64_t window = -1;
    for (int64_t t = 0; t < temperatures; ++t) {
        const int64_t in_sequence = call.first_transition + t;
        if (t * windows / temperatures != window) take_scales(window = t * windows / temperatures);
        const double b = betas[t + 1], colder = b - betas[t];
        const Between<T> between{plan, space, room, all<T>(static_cast<T>(b)), all<T>(static_cast<T>(1 - b))};
        over_lanes(space, [&](int64_t s) { store<T>(room.change + s, load<T>(room.value + s) - between.log_q_there(s)); });
        for (int64_t lane = 0; lane < space.panels * kPanel<T>; ++lane) {
            room.log_weights[lane] += colder * static_cast<double>(room.change[lane]);
            room.step[lane] = steps[lane][t];
        }
        if (call.rate > 0)
            over_lanes(space, [&](int64_t s) {
                store<T>(room.step + s, load<T>(room.step + s) * exp_of<T>(load<T>(room.offset + s)));
            });
        const T* const v = draw_steps(call.jitter, in_sequence, space, room);
        draw_momenta(plan, in_sequence, space, room);
        leapfrog(plan, r, call.leapfrogs, between, space, room);
        accept(plan, v, space, room);
        if (!(call.rate > 0)) continue;
        for (int64_t lane = 0; lane < space.count; ++lane) {
            const int64_t at = lanes.in_all(lane) * temperatures + t;
            static_cast<T*>(call.steps)[at] = room.step[lane];
            for (int64_t l = 0; l < latents; ++l) static_cast<T*>(call.path)[at * latents + l] = room.z[l * kTileSamples + lane];
        }
        const V rate = all<T>(static_cast<T>(call.rate)), target = all<T>(static_cast<T>(call.target));
        over_lanes(space, [&](int64_t s) {
            const V excess = load<T>(room.probability + s) - target;
            store<T>(room.offset + s, multiply_add(rate, excess, load<T>(room.offset + s)));
        });
    }
    const double constant = static_cast<double>(plan.constant[plan.replica(r)]), range = betas[temperatures] - betas[0];
    for (int64_t lane = 0; lane < space.count; ++lane) {
        const int64_t at = lanes.in_all(lane);
        const double whole = room.log_weights[lane] + range * (constant + static_cast<double>(space.log_scales[lane]));
        static_cast<T*>(call.log_weights)[at] = static_cast<T>(whole);
        static_cast<T*>(call.acceptance)[at] = static_cast<T>(room.acceptance[lane] / static_cast<double>(temperatures));
        for (int64_t l = 0; l < latents; ++l) static_cast<T*>(call.last)[at * latents + l] = room.z[l * kTileSamples + lane];
    }
}

int check(const Annealing& call) {
    const Importance& on = call.on;
    constexpr int64_t most_windows = 1 << 16, most_latents = 1 << 15;
    if (call.temperatures < 1 || call.leapfrogs < 1 || call.windows < 1 || call.windows > most_windows) return kBadSize;
    if (on.widths[0] > most_latents) return kBadSize;
    if (!(call.jitter >= 0 && call.jitter < 1) || !(call.target >= 0 && call.target < 1)) return kBadSize;
    if (!(call.rate >= 0 && call.rate <= 1)) return kBadSize;
    if (const int error =
            check_draws(on, call.temperatures, call.first_transition, call.momentum_stream, call.acceptance_stream))
        return error;
    if (!fits(8, on.replicas, on.rows, on.samples, call.temperatures, on.widths[0])) return kBadSize;
    if (!fits(8, on.replicas, on.rows, call.windows, on.widths[0], on.widths[0])) return kBadSize;
    for (int64_t t = 0; t < on.replicas * (call.temperatures + 1); ++t)
        if (!(call.betas[t] >= 0 && call.betas[t] <= 1)) return kBadSize;
    return kOk;
}

}  // namespace

int annealing_f32(const Annealing* call) { return run_tiles<float, AnnealedRoom<float>>(*call, check, anneal<float>); }
int annealing_f64(const Annealing* call) { return run_tiles<double, AnnealedRoom<double>>(*call, check, anneal<double>); }

}  // namespace LIBI_ISA
}  // namespace libi
