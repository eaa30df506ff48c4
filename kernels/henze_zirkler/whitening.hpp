// Whitening of one replica, and the gradient's way back from the whitened points; every sum in double.
//
// With z_i the rows, s_c the columns' standard deviations (divisor n) and L L' the correlation matrix:
//
//   y_i = A (z_i - mean),  A = L^-1 diag(1/s).  Any square root of the covariance serves where only distances enter.
//   A column is constant where s_c <= 10 eps |mean_c|. The replica is singular where the correlation's smallest eigenvalue
//   is at most 10 d eps times its largest (counted by Sturm's sequence on Householder's tridiagonal form).
//
// The statistic is unchanged where z is replaced by y, so the gradient is taken at y, where mean and covariance are 0 and I,
// and carried back (reference.gradient_at_points): with g_i the slope in y_i taken as free and M = sum_i y_i g_i',
//
//   d/dz_i = A' (g_i - mean g - B y_i),  B the symmetric matrix of M's upper triangle over n.
//
// Rows are taken in blocks of 64, whose coordinates lie apart [d][64]; 1024 rows make a chunk, whose sums one thread takes
// and which are added in order, so that the number of threads moves no bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "../elementary.hpp"
#include "../sizes.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kChunk = 1024;
constexpr int64_t kWorthChunks = 16384;  // numbers in z: fewer are whitened before a second thread has woken

LIBI_INLINE int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }

// Numbers that begin on a cache line; empty where memory is short.
template <class T>
struct Numbers {
    explicit Numbers(int64_t count) : all(new (std::nothrow) T[static_cast<size_t>(count + line)]) {
        const int64_t misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(all.get()) / sizeof(T)) % line;
        first = all ? all.get() + (line - misplaced) % line : nullptr;
    }
    static constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    std::unique_ptr<T[]> all;
    T* first;
};

// A fixed tree over eight sums, as every instruction set can keep them.
LIBI_INLINE double tree(const double* lane) {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

LIBI_INLINE double dot(const double* a, const double* b) {
    double lane[8] = {};
    for (int64_t r = 0; r < kBlock; r += 8)
        for (int l = 0; l < 8; ++l) lane[l] += a[r + l] * b[r + l];
    return tree(lane);
}

LIBI_INLINE double block_sum(const double* a) {
    double lane[8] = {};
    for (int64_t r = 0; r < kBlock; r += 8)
        for (int l = 0; l < 8; ++l) lane[l] += a[r + l];
    return tree(lane);
}

LIBI_INLINE void add_scaled(double* to, double factor, const double* from) {
    for (int64_t r = 0; r < kBlock; ++r) to[r] += factor * from[r];
}

// Whether the smallest eigenvalue of the symmetric a [d][d] is at most `tolerance` times the largest. Overwrites a and work [2d].
inline bool nearly_singular(double* a, int64_t d, double tolerance, double* work) {
    double *v = work, *p = work + d;
    for (int64_t k = 0; k + 2 < d; ++k) {  // Householder: column k below the first subdiagonal becomes zero
        double norm = 0;
        for (int64_t i = k + 1; i < d; ++i) v[i] = a[i * d + k], norm += v[i] * v[i];
        norm = std::sqrt(norm);
        if (norm == 0) continue;
        const double head = v[k + 1] > 0 ? -norm : norm;
        v[k + 1] -= head;
        double square = 0;
        for (int64_t i = k + 1; i < d; ++i) square += v[i] * v[i];
        const double factor = 2 / square;
        double along = 0;
        for (int64_t i = k + 1; i < d; ++i) {
            double sum = 0;
            for (int64_t j = k + 1; j < d; ++j) sum += a[i * d + j] * v[j];
            p[i] = factor * sum;
            along += p[i] * v[i];
        }
        for (int64_t i = k + 1; i < d; ++i) p[i] -= 0.5 * factor * along * v[i];
        for (int64_t i = k + 1; i < d; ++i)
            for (int64_t j = k + 1; j < d; ++j) a[i * d + j] -= v[i] * p[j] + p[i] * v[j];
        a[(k + 1) * d + k] = head;
    }
    double high = 0;
    for (int64_t i = 0; i < d; ++i) {
        const double left = i > 0 ? std::fabs(a[i * d + i - 1]) : 0, right = i + 1 < d ? std::fabs(a[(i + 1) * d + i]) : 0;
        high = std::fmax(high, a[i * d + i] + left + right);
    }
    const auto below = [&](double x) {  // eigenvalues less than x
        int64_t count = 0;
        double q = 1;
        for (int64_t i = 0; i < d; ++i) {
            const double off = i > 0 ? a[i * d + i - 1] : 0;
            q = a[i * d + i] - x - off * off / q;
            if (std::fabs(q) < 1e-300) q = -1e-300;
            count += q < 0;
        }
        return count;
    };
    double low = 0;  // the largest lies in low .. high
    for (int step = 0; step < 24; ++step) {
        const double middle = 0.5 * (low + high);
        (below(middle) < d ? low : high) = middle;
    }
    return below(tolerance * high) > 0 || high <= 0;
}

enum class Kind { kRegular, kSingular, kNotFinite };

// One replica [n, d] and the room that its sums and matrices take.
template <class T>
struct Whitening {
    const T* z;
    int64_t n, d, threads;
    double *mean, *map, *matrix, *work;  // [d], A [d][d], [d][d], [3 d]
    double* sums;                        // [chunks][d + d^2]
    double* blocks;                      // [threads][3 d][kBlock]; all of these in one piece of size() numbers

    static int64_t size_matrices(int64_t d) { return 2 * d * d + 4 * d; }
    static int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }
    static int64_t size(int64_t n, int64_t d, int64_t threads) {
        return size_matrices(d) + chunks_of(n) * (d + d * d) + threads * 3 * d * kBlock;
    }

    static bool fitting(int64_t n, int64_t d) { return fits(8, 4, chunks_of(n) + 4, d, d + 1); }  // all but the blocks

    Whitening(const T* z, int64_t n, int64_t d, int64_t threads, double* space)
        : z(z), n(n), d(d), threads(n * d < kWorthChunks ? 1 : least(threads, chunks_of(n))) {
        mean = space, map = mean + d, matrix = map + d * d, work = matrix + d * d;
        sums = space + size_matrices(d), blocks = sums + chunks_of(n) * (d + d * d);
    }

    // each(first row, rows, the sums of its chunk, room for 3 d blocks) for every block, in order within a chunk; then
    // the chunks' sums are added to the first's.
    template <class Each>
    void every_block(int64_t count, Each each) const {
        const int64_t chunks = chunks_of(n);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
        for (int64_t slot = 0; slot < threads; ++slot)
            for (int64_t chunk = slot; chunk < chunks; chunk += threads) {
                double* const own = sums + chunk * (d + d * d);
                for (int64_t k = 0; k < count; ++k) own[k] = 0;
                const int64_t end = least(n, (chunk + 1) * kChunk);
                for (int64_t i = chunk * kChunk; i < end; i += kBlock)
                    each(i, least(kBlock, end - i), own, blocks + slot * 3 * d * kBlock);
            }
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
            for (int64_t k = 0; k < count; ++k) sums[k] += sums[chunk * (d + d * d) + k];
    }

    // z - mean of a block, [d][kBlock], zero past its rows.
    void centre(int64_t i, int64_t rows, bool about_mean, double* x) const {
        for (int64_t c = 0; c < d; ++c) {
            const double middle = about_mean ? mean[c] : 0;
            double* const to = x + c * kBlock;
            for (int64_t r = 0; r < rows; ++r) to[r] = static_cast<double>(z[(i + r) * d + c]) - middle;
            for (int64_t r = rows; r < kBlock; ++r) to[r] = 0;
        }
    }

    Kind prepare() const {
        every_block(d, [&](int64_t i, int64_t rows, double* own, double* x) {
            centre(i, rows, false, x);
            for (int64_t c = 0; c < d; ++c) own[c] += block_sum(x + c * kBlock);
        });
        for (int64_t c = 0; c < d; ++c) mean[c] = sums[c] / static_cast<double>(n);
        every_block(d * d, [&](int64_t i, int64_t rows, double* own, double* x) {
            centre(i, rows, true, x);
            for (int64_t c = 0; c < d; ++c)
                for (int64_t k = 0; k <= c; ++k) own[c * d + k] += dot(x + c * kBlock, x + k * kBlock);
        });
        const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
        double* const inverse = work;  // 1 / s
        bool constant = false, finite = true;
        for (int64_t c = 0; c < d; ++c) {
            const double scale = std::sqrt(sums[c * d + c] / static_cast<double>(n));
            constant = constant || scale <= 10 * eps * std::fabs(mean[c]) || scale == 0;
            inverse[c] = 1 / scale;
        }
        for (int64_t c = 0; c < d; ++c)
            for (int64_t k = 0; k <= c; ++k) {
                finite = finite && std::isfinite(sums[c * d + k]);
                const double r = sums[c * d + k] / static_cast<double>(n) * inverse[c] * inverse[k];
                matrix[c * d + k] = matrix[k * d + c] = r;
            }
        if (!finite) return Kind::kNotFinite;
        if (constant) return Kind::kSingular;
        double* const l = map;  // the factor first; its inverse takes its place
        for (int64_t k = 0; k < d * d; ++k) l[k] = matrix[k];
        if (nearly_singular(matrix, d, 10 * static_cast<double>(d) * eps, work + d)) return Kind::kSingular;
        for (int64_t c = 0; c < d; ++c)
            for (int64_t k = 0; k <= c; ++k) {
                double sum = l[c * d + k];
                for (int64_t e = 0; e < k; ++e) sum -= l[c * d + e] * l[k * d + e];
                if (c == k && !(sum > 0)) return Kind::kSingular;
                l[c * d + k] = c == k ? std::sqrt(sum) : sum / l[k * d + k];
            }
        for (int64_t k = 0; k < d; ++k) {  // columns of the inverse, each below its diagonal
            for (int64_t c = k; c < d; ++c) {
                double sum = c == k ? 1 : 0;
                for (int64_t e = k; e < c; ++e) sum -= l[c * d + e] * matrix[e * d + k];
                matrix[c * d + k] = sum / l[c * d + c];
            }
        }
        for (int64_t c = 0; c < d; ++c)
            for (int64_t k = 0; k < d; ++k) map[c * d + k] = k <= c ? matrix[c * d + k] * inverse[k] : 0;
        return Kind::kRegular;
    }

    // factor * y -> u [d][stride].
    void write_points(double factor, T* u, int64_t stride) const {
        every_block(0, [&](int64_t i, int64_t rows, double*, double* x) {
            double* const y = x + d * kBlock;
            centre(i, rows, true, x);
            for (int64_t c = 0; c < d; ++c) {
                for (int64_t r = 0; r < kBlock; ++r) y[r] = 0;
                for (int64_t k = 0; k <= c; ++k) add_scaled(y, factor * map[c * d + k], x + k * kBlock);
                for (int64_t r = 0; r < rows; ++r) u[c * stride + i + r] = static_cast<T>(y[r]);
            }
        });
    }

    // slope(first row, rows, y [d][kBlock], slope [d][kBlock]) sets both, zero past the rows; called twice for a block.
    // -> the gradient [n, d].
    template <class Slope>
    void write_gradient(Slope slope, T* gradient) const {
        every_block(d + d * d, [&](int64_t i, int64_t rows, double* own, double* y) {
            double* const g = y + d * kBlock;
            slope(i, rows, y, g);
            for (int64_t c = 0; c < d; ++c) {
                own[c] += block_sum(g + c * kBlock);
                for (int64_t e = 0; e <= c; ++e) own[d + c * d + e] += dot(y + e * kBlock, g + c * kBlock);
            }
        });
        double* const middle = work;
        for (int64_t c = 0; c < d; ++c) {
            middle[c] = sums[c] / static_cast<double>(n);
            for (int64_t e = 0; e <= c; ++e) matrix[c * d + e] = matrix[e * d + c] = sums[d + c * d + e] / static_cast<double>(n);
        }
        every_block(0, [&](int64_t i, int64_t rows, double*, double* y) {
            double *const g = y + d * kBlock, *const through = y + 2 * d * kBlock;
            slope(i, rows, y, g);
            for (int64_t c = 0; c < d; ++c) {
                double* const to = through + c * kBlock;
                for (int64_t r = 0; r < kBlock; ++r) to[r] = g[c * kBlock + r] - middle[c];
                for (int64_t e = 0; e < d; ++e) add_scaled(to, -matrix[e * d + c], y + e * kBlock);
            }
            for (int64_t k = 0; k < d; ++k) {
                for (int64_t r = 0; r < kBlock; ++r) g[r] = 0;
                for (int64_t c = k; c < d; ++c) add_scaled(g, map[c * d + k], through + c * kBlock);
                for (int64_t r = 0; r < rows; ++r) gradient[(i + r) * d + k] = static_cast<T>(g[r]);
            }
        });
    }
};

// What a replica that is not regular gives.
template <class T>
void write_irregular(Kind kind, int64_t n, int64_t d, bool gradient, T* value, T* slope) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    *value = kind == Kind::kSingular ? static_cast<T>(4 * n) : nan;
    if (gradient)
        for (int64_t k = 0; k < n * d; ++k) slope[k] = kind == Kind::kSingular ? 0 : nan;
}

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
