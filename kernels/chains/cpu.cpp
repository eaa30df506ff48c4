// Markov chains on p(z | x): reference.py has the formulas, cpu_chains.hpp the chains of a tile.
//
// A leapfrog of W7 (2-50-2) costs a register of chains 252 multiply-adds forward and 250 back, and 50 tanh.
#include "cpu_chains.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

enum Method : int64_t { kHmc, kMala, kRandomWalk, kMethods };

constexpr double kGamma = 0.05, kT0 = 10, kKappa = 0.75;  // of dual averaging

template <class T>
struct AdaptedRoom : Room<T> {
    T *mu, *averaged, *bias;  // of dual averaging

    static int64_t size(const Plan<T>& plan) { return Room<T>::size(plan) + 3 * kTileSamples; }
    void make(const Plan<T>& plan, T* at) {
        mu = Room<T>::make(plan, at), averaged = mu + kTileSamples, bias = averaged + kTileSamples;
    }
};

// Chains on p(x, z) itself.
template <class T>
struct Joint {
    using V = Vector<T>;
    const Plan<T>& plan;
    Space<T>& space;
    Room<T>& room;

    V h(int64_t s, int64_t at) const { return load<T>(room.h + s) * load<T>(space.scale + at); }
    void advance(const T* gradient, bool half, bool moves) const {
        over_latents(plan, space, [&](int64_t l, int64_t s, int64_t at) {
            const V by = h(s, at), kick = half ? all<T>(static_cast<T>(0.5)) * by : by;
            const V u = multiply_add(kick, load<T>(gradient + at), load<T>(room.u + at));
            store<T>(room.u + at, u);
            if (moves) move<T>(space, l, s, by * u);
        });
    }
    V gain(int64_t s) const { return load<T>(room.moved + s) - load<T>(room.value + s); }
};

// A proposal in space and room.moved, and what it costs in room.change.
template <class T>
void propose(const Chains& call, const Plan<T>& plan, int64_t r, int64_t t, Space<T>& space, Room<T>& room) {
    draw_momenta(plan, t, space, room);
    const Joint<T> joint{plan, space, room};
    if (call.method != kRandomWalk) {
        leapfrog(plan, r, call.method == kHmc ? call.leapfrogs : 1, joint, space, room);
        return;
    }
    over_latents(plan, space, [&](int64_t l, int64_t s, int64_t at) {
        move<T>(space, l, s, joint.h(s, at) * load<T>(room.u + at));
    });
    evaluate<T, false>(plan, r, space, room);
    over_lanes(space, [&](int64_t s) { store<T>(room.change + s, -joint.gain(s)); });
}

// After transition t = 1, 2, .. of the call.
template <class T>
void adapt(double target, int64_t t, const Space<T>& space, AdaptedRoom<T>& room) {
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
void run_chains(
    const Chains& call, const Plan<T>& plan, int64_t r, int64_t group, int64_t first, Space<T>& space, AdaptedRoom<T>& room) {
    const int64_t latents = plan.latents, kept = call.transitions / call.thinning;
    const Lanes lanes = place_chains(call, plan, r, group, first, space, room);
    for (int64_t lane = 0; lane < space.panels * kPanel<T>; ++lane) {
        const T step = static_cast<const T*>(call.step)[lanes.in_all(lane)];
        room.step[lane] = step, room.averaged[lane] = std::log(step), room.bias[lane] = 0;
        room.mu[lane] = std::log(10 * step);
    }
    if (call.method == kRandomWalk) evaluate<T, false>(plan, r, space, room);
    else evaluate<T, true>(plan, r, space, room);
    stay(plan, room);
    const T constant = plan.constant[plan.replica(r)] - static_cast<T>(0.5 * kLog2Pi * static_cast<double>(latents));
    for (int64_t t = 0; t < call.transitions; ++t) {
        const T* const v = draw_steps(call.jitter, call.first_transition + t, space, room);
        propose(call, plan, r, call.first_transition + t, space, room);
        accept(plan, v, space, room);
        if (call.target > 0) adapt(call.target, t + 1, space, room);
        if ((t + 1) % call.thinning != 0) continue;
        for (int64_t lane = 0; lane < space.count; ++lane) {
            const int64_t at = lanes.in_all(lane) * kept + t / call.thinning;
            static_cast<T*>(call.log_density)[at] = room.value[lane] + constant;
            for (int64_t l = 0; l < latents; ++l) static_cast<T*>(call.draws)[at * latents + l] = room.z[l * kTileSamples + lane];
        }
    }
    const double transitions = static_cast<double>(call.transitions > 0 ? call.transitions : 1);
    for (int64_t lane = 0; lane < space.count; ++lane) {
        const int64_t at = lanes.in_all(lane);
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
    if (const int error =
            check_draws(on, call.transitions, call.first_transition, call.momentum_stream, call.acceptance_stream))
        return error;
    return fits(8, on.replicas, on.rows, on.samples, call.transitions / call.thinning + 1, on.widths[0]) ? kOk : kBadSize;
}

}  // namespace

int chains_f32(const Chains* call) { return run_tiles<float, AdaptedRoom<float>>(*call, check, run_chains<float>); }
int chains_f64(const Chains* call) { return run_tiles<double, AdaptedRoom<double>>(*call, check, run_chains<double>); }

}  // namespace LIBI_ISA
}  // namespace libi
