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

    void merge(T other_pivot, double other_first, double other_second) {
        // The floor keeps -inf - -inf out; NaN is the larger of any two.
        T top = pivot > other_pivot || pivot != pivot ? pivot : other_pivot;
        if (top < -std::numeric_limits<T>::max()) top = -std::numeric_limits<T>::max();
        const double mine = std::exp(static_cast<double>(pivot) - static_cast<double>(top));
        const double others = std::exp(static_cast<double>(other_pivot) - static_cast<double>(top));
        first = first * mine + other_first * others;
        second = second * mine * mine + other_second * others * others;
        pivot = top;
    }
};

// Adds a[begin] .. a[end - 1] in an order that depends on their number alone.
template <class T>
double add_lanes(const T* a, int64_t begin, int64_t end) {
    T lane[16] = {};
    int64_t i = begin;
    for (; i + 16 <= end; i += 16)
        for (int64_t l = 0; l < 16; ++l) lane[l] += a[i + l];
    for (int64_t l = 0; i < end; ++i, ++l) lane[l] += a[i];
    for (int64_t half = 8; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    return static_cast<double>(lane[0]);
}

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

// Log-weights in lanes begin .. end - 1, all of one row, join its sums. `weights` is room for a tile.
template <class T>
void merge_lanes(const T* log_weights, int64_t begin, int64_t end, T* weights, Sums<T>& sums) {
    T top = log_weights[begin];
    bool nan = false;
    for (int64_t s = begin; s < end; ++s) {
        top = log_weights[s] > top ? log_weights[s] : top;
        nan = nan || log_weights[s] != log_weights[s];
    }
    if (nan) top = std::numeric_limits<T>::quiet_NaN();
    const T pivot = top < -std::numeric_limits<T>::max() ? -std::numeric_limits<T>::max() : top;
    for (int64_t s = 0; s < kTileSamples; s += kWidth<T>)
        store<T>(weights + s, exp_of<T>(load<T>(log_weights + s) - all<T>(pivot)));
    const double first = add_lanes(weights, begin, end);
    for (int64_t s = 0; s < kTileSamples; ++s) weights[s] *= weights[s];
    sums.merge(pivot, first, add_lanes(weights, begin, end));
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
        merge_lanes(space.log_weights, begin, end, space.partial, sums);
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
        merge_lanes(space.log_weights, 0, space.count, space.partial, sums);
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
        const Sums<T> more = run_segment(plan, r, segment, space, largest);
        sums.merge(more.pivot, more.first, more.second);
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
            all.merge(sums[task].pivot, sums[task].first, sums[task].second);
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
