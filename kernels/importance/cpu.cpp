// Importance-weighted log-likelihoods, forward: reference.py has the formulas, cpu_tile.hpp the tile and its log-weights.
//
// A row's log-weights are met tile after tile: pivot m, sum w e^-m and sum w^2 e^-2m (in double), and the largest so far.
// Sums of 1024 samples are merged in order, whether one thread took them all or, where rows are few, each another.
//
// What it costs on 16 lanes, W2 (2-50-2): 200 multiply-adds, 50 tanh of about 14 operations and half a division, 2 random
// words and a normal each; W3 (50-200-200-784): 206,800 multiply-adds, of whose 28 a block needs 16 loads.
#include <algorithm>
#include <atomic>

#include "cpu_tile.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int64_t kSegment = 1024;  // samples whose sums are merged as one

template <class T>
struct Sums {
    T pivot = -std::numeric_limits<T>::infinity();
    double first = 0, second = 0;

    // From here on relative to the larger of both pivots. The floor keeps -inf - -inf out.
    void raise(T other) {
        T top = pivot < other ? other : pivot;
        if (top < -std::numeric_limits<T>::max()) top = -std::numeric_limits<T>::max();
        if (top == pivot) return;
        const double factor = std::exp(static_cast<double>(pivot) - static_cast<double>(top));
        first *= factor, second *= factor * factor, pivot = top;
    }
    void merge(Sums other) {
        raise(other.pivot);
        other.raise(pivot);
        first += other.first, second += other.second;
    }
};

// The largest `wanted` numbers of those pushed: up to twice as many are kept, then cut.
template <class T>
struct Largest {
    T* kept;
    int64_t wanted, size = 0;
    T threshold = -std::numeric_limits<T>::infinity();
    bool nan = false;

    static int64_t capacity(int64_t wanted) { return wanted > 0 ? 2 * wanted + kTileSamples : 0; }
    void push(const T* numbers, int64_t count) {
        if (wanted == 0) return;
        for (int64_t i = 0; i < count; ++i) {
            if (numbers[i] > threshold) kept[size++] = numbers[i];
            nan = nan || numbers[i] != numbers[i];
        }
        if (size >= 2 * wanted) cut();
    }
    void cut() {
        std::nth_element(kept, kept + wanted - 1, kept + size, std::greater<T>());
        size = wanted;
        threshold = kept[wanted - 1];
    }
    // Largest first; -infinity where there were fewer, NaN throughout where there was one.
    void write(T* to) {
        if (size > wanted) cut();
        std::sort(kept, kept + size, std::greater<T>());
        for (int64_t i = 0; i < wanted; ++i)
            to[i] = nan ? std::numeric_limits<T>::quiet_NaN() : i < size ? kept[i] : -std::numeric_limits<T>::infinity();
    }
};

// Adds the numbers of a strip in a fixed tree.
template <class T>
double add_strip(T* lane) {
    for (int64_t half = kStrip<T> / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    return static_cast<double>(lane[0]);
}

// A whole tile's log-weights, of one row, join its sums. NaN passes over the maximum, and makes the sums NaN.
template <class T>
void merge_tile(const T* log_weights, Sums<T>& sums) {
    using V = Vector<T>;
    constexpr int64_t lanes = kStrip<T>;
    alignas(64) T top[lanes], first[lanes], second[lanes];
    for (int64_t lane = 0; lane < lanes; lane += kWidth<T>) {
        V most = all<T>(-std::numeric_limits<T>::infinity());
        for (int64_t s = lane; s < kTileSamples; s += lanes) most = at_least(load<T>(log_weights + s), most);
        store<T>(top + lane, most);
    }
    for (int64_t half = lanes / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) top[l] = top[l] < top[l + half] ? top[l + half] : top[l];
    sums.raise(top[0]);
    for (int64_t lane = 0; lane < lanes; lane += kWidth<T>) {
        V one = V{}, two = V{};
        for (int64_t s = lane; s < kTileSamples; s += lanes) {
            const V w = exp_of<T>(load<T>(log_weights + s) - all<T>(sums.pivot));
            one = one + w, two = multiply_add(w, w, two);
        }
        store<T>(first + lane, one), store<T>(second + lane, two);
    }
    sums.first += add_strip(first), sums.second += add_strip(second);
}

// Likewise the samples of a row in lanes begin .. end - 1, moved to the front so that their place moves no bit.
template <class T>
void merge_lanes(const T* log_weights, int64_t begin, int64_t end, Sums<T>& sums) {
    alignas(64) T moved[kTileSamples];
    std::fill(moved, moved + kTileSamples, -std::numeric_limits<T>::infinity());
    std::copy(log_weights + begin, log_weights + end, moved);
    merge_tile(moved, sums);
}

template <class T>
void write_row(const Plan<T>& plan, int64_t at, const Sums<T>& sums, Largest<T>& largest) {
    const double log_samples = std::log(static_cast<double>(plan.call.samples));
    const double value = static_cast<double>(sums.pivot) + std::log(sums.first) - log_samples;
    static_cast<T*>(plan.call.log_likelihood)[at] = static_cast<T>(value);
    const double effective = sums.first == 0 ? 0 : sums.first * sums.first / sums.second;
    static_cast<T*>(plan.call.effective)[at] = static_cast<T>(effective);
    if (plan.call.tail > 0) largest.write(static_cast<T*>(plan.call.top) + at * plan.call.tail);
}

struct Nothing {
    template <class T>
    void operator()(int64_t, int64_t, int64_t, T*) const {}
};

// The rows of a group that share a tile.
template <class T>
void run_together(const Plan<T>& plan, int64_t r, int64_t group, Space<T>& space, T* kept) {
    place_rows(plan, r, group, space);
    run_tile<T, false>(plan, r, 0, space, Nothing{});
    for (int64_t i = 0; i < space.rows; ++i) {
        Sums<T> sums;
        Largest<T> largest{kept, plan.call.tail};
        const int64_t begin = i * plan.call.samples, end = begin + plan.call.samples;
        merge_lanes(space.log_weights, begin, end, sums);
        largest.push(space.log_weights + begin, end - begin);
        write_row(plan, r * plan.call.rows + space.row + i, sums, largest);
    }
}

template <class T>
Sums<T> run_segment(const Plan<T>& plan, int64_t r, int64_t segment, Space<T>& space, Largest<T>& largest) {
    Sums<T> sums;
    const int64_t begin = segment * kSegment, end = smaller(begin + kSegment, plan.call.samples);
    for (int64_t sample = begin; sample < end; sample += kTileSamples) {
        run_tile<T, false>(plan, r, sample, space, Nothing{});
        merge_tile(space.log_weights, sums);
        largest.push(space.log_weights, space.count);
    }
    return sums;
}

template <class T>
void run_row(const Plan<T>& plan, int64_t r, int64_t row, Space<T>& space, T* kept) {
    place_rows(plan, r, row, space);
    Sums<T> sums;
    Largest<T> largest{kept, plan.call.tail};
    for (int64_t segment = 0; segment * kSegment < plan.call.samples; ++segment) {
        sums.merge(run_segment(plan, r, segment, space, largest));
    }
    write_row(plan, r * plan.call.rows + row, sums, largest);
}

constexpr int64_t kFewRows = 4;  // per thread: fewer are cut into segments

template <class T>
int forward(const Importance& call) {
    Plan<T> plan(call);
    if (const int error = plan.make(false)) return error;
    const int64_t groups = call.replicas * plan.groups, tail = call.tail;
    if (groups == 0) return kOk;
    const int64_t segments = pieces(call.samples, kSegment);
    const bool cut = segments > 1 && groups < kFewRows * plan.threads;
    const int64_t tasks = cut ? groups * segments : groups;
    const int64_t threads = smaller(plan.threads, tasks);
    if (!fits(sizeof(T), tasks, tail)) return kOutOfMemory;
    const int64_t room = Largest<T>::capacity(tail);
    const std::unique_ptr<Space<T>[]> spaces(new (std::nothrow) Space<T>[static_cast<size_t>(threads)]);
    const std::unique_ptr<Sums<T>[]> sums(new (std::nothrow) Sums<T>[static_cast<size_t>(cut ? tasks : 0)]);
    const std::unique_ptr<T[]> tops(new (std::nothrow) T[static_cast<size_t>(cut ? tasks * tail : 0)]);
    if (!spaces || !sums || !tops) return kOutOfMemory;
    for (int64_t t = 0; t < threads; ++t)
        if (!spaces[t].make(plan, false, room)) return kOutOfMemory;

    std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t slot = 0; slot < threads; ++slot) {
        Space<T>& space = spaces[slot];
        for (int64_t task = next++; task < tasks; task = next++) {
            if (cut) {
                const int64_t r = task / segments / plan.groups, row = task / segments % plan.groups;
                place_rows(plan, r, row, space);
                Largest<T> largest{space.more(), tail};
                sums[task] = run_segment(plan, r, task % segments, space, largest);
                if (tail > 0) largest.write(tops.get() + task * tail);
            } else if (plan.rows_together > 1) {
                run_together(plan, task / plan.groups, task % plan.groups, space, space.more());
            } else {
                run_row(plan, task / plan.groups, task % plan.groups, space, space.more());
            }
        }
    }
    for (int64_t row = 0; cut && row < groups; ++row) {
        Sums<T> all;
        Largest<T> largest{spaces[0].more(), tail};
        for (int64_t task = row * segments; task < (row + 1) * segments; ++task) {
            all.merge(sums[task]);
            for (int64_t i = 0; i < tail; i += kTileSamples)
                largest.push(tops.get() + task * tail + i, smaller(kTileSamples, tail - i));
        }
        write_row(plan, row, all, largest);
    }
    return kOk;
}

}  // namespace

int importance_f32(const Importance* call) { return forward<float>(*call); }
int importance_f64(const Importance* call) { return forward<double>(*call); }

}  // namespace LIBI_ISA
}  // namespace libi
