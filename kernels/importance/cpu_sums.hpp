// The running sums of a row: pivot m, sum w e^-m and sum w^2 e^-2m (in double), and the largest log-weights so far.
#pragma once

#include <algorithm>
#include <functional>

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
    T* kept = nullptr;
    int64_t wanted = 0, size = 0;
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
    sums.first += static_cast<double>(add_strip(first));
    sums.second += static_cast<double>(add_strip(second));
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

// The sums of a segment of a row; its log-weights go to keep[sample] if asked.
template <class T>
Sums<T> run_segment(const Plan<T>& plan, int64_t r, int64_t segment, Space<T>& space, Largest<T>& largest,
                    T* keep = nullptr) {
    Sums<T> sums;
    const int64_t begin = segment * kSegment, end = smaller(begin + kSegment, plan.call.samples);
    for (int64_t sample = begin; sample < end; sample += kTileSamples) {
        run_tile<T, false>(plan, r, sample, space, Nothing{});
        merge_tile(space.log_weights, sums);
        for (int64_t s = 0; s < space.count && keep != nullptr; ++s)
            keep[sample + s] = space.log_weights[lane_of(s, space.each, plan.latents)];
        largest.push(space.log_weights, space.count);
    }
    return sums;
}

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
