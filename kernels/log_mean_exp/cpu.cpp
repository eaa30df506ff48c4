// out_r = log(1/S sum_s exp x_rs), and its gradient  d out_r / d x_rs = exp(x_rs - out_r) / S.
//
// One read of x. A chunk of 1024 numbers stays in the L1 cache while its largest number m, the pivot, is found and
// s = sum exp(x - m) is taken in 64 lanes; pairs (m, s) are then merged in order, in double:
//
//   (m, s) + (m', s') = (M, s exp(m - M) + s' exp(m' - M)),  M = max(m, m').
//
// The pivot is kept finite, between -FLT_MAX and FLT_MAX: inf - inf would be NaN. So a row of -inf gives s = 0 and
// -inf, a +inf gives s = inf and +inf, a NaN reaches s through exp and gives NaN. A row is cut into segments of 64
// chunks whether or not threads share it: neither their number nor the instruction set moves a bit.
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "../elementary.hpp"
#include "../entry_points.hpp"
#include "../sizes.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int64_t kWidth = 64;
constexpr int64_t kChunk = 16 * kWidth;
constexpr int64_t kSegment = 64 * kChunk;
constexpr int64_t kWorthThreads = 32768;  // fewer numbers than this are done before a second thread has woken

struct Sum {
    double pivot, sum;  // sum exp(x) = sum * exp(pivot)
};

Sum merge(Sum a, Sum b) {
    if (b.pivot > a.pivot) return {b.pivot, a.sum * exp(a.pivot - b.pivot) + b.sum};
    return {a.pivot, a.sum + b.sum * exp(b.pivot - a.pivot)};
}

// Combines count lanes in a fixed tree, halves onto halves.
template <int64_t count, class T, class Combine>
LIBI_INLINE T fold(T* lane, Combine combine) {
    if constexpr (count > 1) {
#pragma omp simd
        for (int64_t l = 0; l < count / 2; ++l) lane[l] = combine(lane[l], lane[l + count / 2]);
        return fold<count / 2>(lane, combine);
    }
    return lane[0];
}

// The last chunk of a row is filled up with -inf, whose exponential is 0.
template <class T>
Sum sum_chunk(const T* x, int64_t count) {
    alignas(64) T padded[kWidth];
    alignas(64) T lane[kWidth];
    const int64_t whole = count / kWidth * kWidth;
    for (int64_t l = 0; l < kWidth; ++l) {
        padded[l] = whole + l < count ? x[whole + l] : -std::numeric_limits<T>::infinity();
        lane[l] = padded[l];
    }
    for (int64_t i = 0; i < whole; i += kWidth) {
#pragma omp simd
        for (int64_t l = 0; l < kWidth; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    }
    const T largest = std::numeric_limits<T>::max();
    T pivot = fold<kWidth>(lane, [](T a, T b) { return b > a ? b : a; });
    pivot = pivot > -largest ? pivot : -largest;  // also where it is NaN, which the sum will show
    pivot = pivot < largest ? pivot : largest;

    for (int64_t l = 0; l < kWidth; ++l) lane[l] = 0;
    for (int64_t i = 0; i < whole; i += kWidth) {
#pragma omp simd
        for (int64_t l = 0; l < kWidth; ++l) lane[l] += exp(x[i + l] - pivot);
    }
    if (whole < count) {
#pragma omp simd
        for (int64_t l = 0; l < kWidth; ++l) lane[l] += exp(padded[l] - pivot);
    }
    const T sum = fold<kWidth>(lane, [](T a, T b) { return a + b; });
    return {static_cast<double>(pivot), static_cast<double>(sum)};
}

template <class T>
Sum sum_segment(const T* x, int64_t count) {
    Sum total = sum_chunk(x, count < kChunk ? count : kChunk);
    for (int64_t i = kChunk; i < count; i += kChunk)
        total = merge(total, sum_chunk(x + i, count - i < kChunk ? count - i : kChunk));
    return total;
}

double finish(Sum total, int64_t samples) {
    const double mean = total.sum / static_cast<double>(samples);
    if (mean == 0) return -std::numeric_limits<double>::infinity();
    if (!(mean < std::numeric_limits<double>::infinity())) return mean;  // infinity or NaN
    return total.pivot + log(mean);
}

template <class T>
int forward(const T* x, int64_t rows, int64_t samples, int num_threads, T* out) {
    if (rows < 0 || samples < 1 || !fits(sizeof(T), rows, samples)) return kBadSize;
    const int64_t segments = (samples + kSegment - 1) / kSegment;
    [[maybe_unused]] const bool shared = rows > 0 && samples > kWorthThreads / rows;
    if (segments == 1) {
#pragma omp parallel for schedule(static) num_threads(team(num_threads)) if (shared)
        for (int64_t r = 0; r < rows; ++r)
            out[r] = static_cast<T>(finish(sum_segment(x + r * samples, samples), samples));
        return kOk;
    }
    const std::unique_ptr<Sum[]> part(new (std::nothrow) Sum[static_cast<size_t>(rows * segments)]);
    if (!part) return kOutOfMemory;
#pragma omp parallel for schedule(static) num_threads(team(num_threads)) if (shared)
    for (int64_t i = 0; i < rows * segments; ++i) {
        const int64_t begin = i % segments * kSegment;
        const int64_t left = samples - begin;
        part[i] = sum_segment(x + i / segments * samples + begin, left < kSegment ? left : kSegment);
    }
    for (int64_t r = 0; r < rows; ++r) {
        Sum total = part[r * segments];
        for (int64_t i = 1; i < segments; ++i) total = merge(total, part[r * segments + i]);
        out[r] = static_cast<T>(finish(total, samples));
    }
    return kOk;
}

// Where out is infinite exp(x - out) has no meaning, and the limit is taken: no weight anywhere (out = -inf) gives 0,
// and +inf entries share the gradient equally.
template <class T>
void infinite_row(T grad, const T* row, int64_t samples, const T* from, int64_t count, T* to) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    int64_t sharing = 0;
    for (int64_t s = 0; s < samples; ++s) sharing += row[s] == inf ? 1 : 0;
    const T share = grad / static_cast<T>(sharing > 0 ? sharing : 1);
    for (int64_t s = 0; s < count; ++s) to[s] = from[s] == inf ? share : T(0);
}

template <class T>
int backward(const T* grad, const T* x, const T* out, int64_t rows, int64_t samples, int num_threads, T* grad_x) {
    if (rows < 0 || samples < 0 || !fits(sizeof(T), rows, samples)) return kBadSize;
    if (rows == 0 || samples == 0) return kOk;
    const int64_t segments = (samples + kSegment - 1) / kSegment;
    [[maybe_unused]] const bool shared = samples > kWorthThreads / rows;
#pragma omp parallel for schedule(static) num_threads(team(num_threads)) if (shared)
    for (int64_t i = 0; i < rows * segments; ++i) {
        const int64_t r = i / segments;
        const int64_t begin = i % segments * kSegment;
        const int64_t count = samples - begin < kSegment ? samples - begin : kSegment;
        const T* row = x + r * samples;
        T* to = grad_x + r * samples + begin;
        if (std::isinf(out[r])) {
            infinite_row(grad[r], row, samples, row + begin, count, to);
            continue;
        }
        const T level = out[r];
        const T scale = grad[r] / static_cast<T>(samples);
#pragma omp simd
        for (int64_t s = 0; s < count; ++s) to[s] = scale * exp(row[begin + s] - level);
    }
    return kOk;
}

}  // namespace

int log_mean_exp_f32(const float* x, int64_t rows, int64_t samples, int num_threads, float* out) {
    return forward(x, rows, samples, num_threads, out);
}

int log_mean_exp_f64(const double* x, int64_t rows, int64_t samples, int num_threads, double* out) {
    return forward(x, rows, samples, num_threads, out);
}

int log_mean_exp_backward_f32(const float* grad, const float* x, const float* out, int64_t rows, int64_t samples,
                              int num_threads, float* grad_x) {
    return backward(grad, x, out, rows, samples, num_threads, grad_x);
}

int log_mean_exp_backward_f64(const double* grad, const double* x, const double* out, int64_t rows, int64_t samples,
                              int num_threads, double* grad_x) {
    return backward(grad, x, out, rows, samples, num_threads, grad_x);
}

}  // namespace LIBI_ISA
}  // namespace libi
