// The exact statistic and its gradient: whitening.hpp, the sums over pairs of pairs.hpp, and what remains.
//
// With K_i = sum_j k_ij, S_i = sum_j k_ij y_j and e_i = exp(-b^2/2/(1+b^2) |y_i|^2):
//
//   HZ = sum_i K_i / n - 2 (1+b^2)^{-d/2} sum_i e_i + n (1+2b^2)^{-d/2}
//   slope in y_i = -2 b^2/n (K_i y_i - S_i) + 2 b^2 (1+b^2)^{-d/2-1} e_i y_i
//
// Fewer than 512 points are one part, more are 4 or 16. Replicas are shared out among the threads where there are enough, or
// but one part; else one comes after another, and its parts are shared out. A replica's only thread adds each part to the sums
// before it takes the next. Few pairs are done before a second thread has woken, and get none.
#include <atomic>
#include <cmath>

#include "../entry_points.hpp"
#include "../sizes.hpp"
#include "pairs.hpp"
#include "whitening.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int64_t kWorthThreads = 32768;  // pairs
constexpr int64_t kTogether = 512;        // points whose parts are added by one thread

// e of a block of u = b sqrt(log2(e) / 2) y: 2^(-|u|^2 / (1 + b^2)), [kBlock].
template <class T>
void take_singles(const Points<T>& points, int64_t i, double b2, T* e) {
    using V = Vector<T>;
    const V factor = all<T>(static_cast<T>(1 / (1 + b2)));
    for (int64_t r = 0; r < kBlock; r += kWidth<T>) {
        V s = V{};
        for (int64_t c = 0; c < points.d; ++c) {
            const V t = load<T>(points.u + c * points.stride + i + r);
            s = multiply_add(t, t, s);
        }
        store<T>(e + r, exp2_minus<T>(s * factor));
    }
}

// All that one replica needs, of one thread or of all of them.
template <class T>
struct Room {
    Room(int64_t n, int64_t d, bool gradient, int64_t parts, int64_t threads)
        : parts(parts),
          threads(threads),
          apart(threads > 1 ? parts : least(parts, 2)),
          strips((n + Type<T>::lanes - 1) / Type<T>::lanes),
          // A block of 64 may be read whole; coordinates a multiple of 4096 bytes apart would share a set of the L1 cache.
          stride((n + kBlock - 1) / kBlock * kBlock + 16),
          size_totals((gradient ? d + 1 : 1) * stride),
          size_columns(gradient ? (d + 1) * (tile_strips<T>(d) + 1) * Type<T>::lanes : 0),
          size_kernel(gradient ? kRows * (tile_strips<T>(d) + 1) * Type<T>::lanes : 0),
          numbers(d * stride + this->threads * (size_columns + size_kernel)),
          totals(apart * size_totals + Whitening<T>::size(n, d, this->threads)) {}

    explicit operator bool() const { return numbers.first != nullptr && totals.first != nullptr; }
    Sums<T> sums(int64_t part, int64_t slot, int64_t d) const {
        T* const at = numbers.first + d * stride + slot * (size_columns + size_kernel);
        return {totals.first + part * size_totals, at, at + size_columns};
    }

    int64_t parts, threads, apart;  // `apart`: parts whose sums are kept at a time
    int64_t strips, stride, size_totals, size_columns, size_kernel;
    Numbers<T> numbers;
    Numbers<double> totals;
};

template <class T>
void run_replica(const T* z, int64_t n, int64_t d, double beta, bool gradient, const Room<T>& room, T* value, T* slope) {
    const double scale = beta * 0.84932180028801904272, b2 = beta * beta;  // sqrt(log2(e) / 2)
    const int64_t stride = room.stride, components = gradient ? d + 1 : 1;
    double* const totals = room.totals.first;
    const Whitening<T> whitening(z, n, d, room.threads, totals + room.apart * room.size_totals);
    const Kind kind = whitening.prepare();
    if (kind != Kind::kRegular) return write_irregular(kind, n, d, gradient, value, slope);
    T* const u = room.numbers.first;
    const Points<T> points{u, n, d, room.strips, stride};
    whitening.write_points(scale, u, stride);
    for (int64_t c = 0; c < d; ++c)
        for (int64_t i = n; i < stride; ++i) u[c * stride + i] = std::numeric_limits<T>::max() / 4;

    const auto run = gradient ? run_part<T, true> : run_part<T, false>;
    const auto clear = [&](int64_t slot) {
        const Sums<T> sums = room.sums(0, slot, d);
        for (int64_t k = 0; k < room.size_columns; ++k) sums.columns[k] = 0;
    };
    if (room.threads == 1) {
        clear(0);
        for (int64_t p = 0; p < room.parts; ++p) {
            run(points, p, room.parts, room.sums(p > 0, 0, d));
            for (int64_t c = 0; p > 0 && c < components; ++c)
                for (int64_t i = c * stride; i < c * stride + n; ++i) totals[i] += totals[room.size_totals + i];
        }
    } else {
        std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(room.threads))
        for (int64_t slot = 0; slot < room.threads; ++slot) {
            clear(slot);
            for (int64_t p = next++; p < room.parts; p = next++) run(points, p, room.parts, room.sums(p, slot, d));
        }
        const int64_t pieces = (n + kTogether - 1) / kTogether;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(room.threads))
        for (int64_t piece = 0; piece < pieces; ++piece)
            for (int64_t c = 0; c < components; ++c) {
                double* const to = totals + c * stride;
                for (int64_t p = 1; p < room.parts; ++p)
                    for (int64_t i = piece * kTogether; i < least(n, (piece + 1) * kTogether); ++i)
                        to[i] += to[p * room.size_totals + i];
            }
    }

    const double count = static_cast<double>(n), dims = static_cast<double>(d);
    double pairs = 0, once = 0;
    for (int64_t i = 0; i < n; i += kBlock) {
        alignas(64) T e[kBlock];
        take_singles(points, i, b2, e);
        double lane[2][8] = {};
        const int64_t rows = least(kBlock, n - i);
        for (int64_t r = 0; r < rows; ++r) lane[0][r % 8] += totals[i + r], lane[1][r % 8] += static_cast<double>(e[r]);
        pairs += tree(lane[0]), once += tree(lane[1]);
    }
    *value = static_cast<T>(pairs / count - 2 * std::pow(1 + b2, -dims / 2) * once + count * std::pow(1 + 2 * b2, -dims / 2));
    if (!gradient) return;
    const double back = 1 / scale, by_pairs = -2 * b2 / count * back;
    const double by_single = 2 * b2 * std::pow(1 + b2, -dims / 2 - 1) * back;
    whitening.write_gradient(
        [&](int64_t i, int64_t rows, double* y, double* g) {
            alignas(64) T e[kBlock];
            take_singles(points, i, b2, e);
            for (int64_t c = 0; c < d; ++c) {
                const T* const x = u + c * stride + i;
                const double *const k = totals + i, *const s = totals + (c + 1) * stride + i;
                double *const to_y = y + c * kBlock, *const to = g + c * kBlock;
                for (int64_t r = 0; r < rows; ++r) {
                    const double here = static_cast<double>(x[r]);
                    to_y[r] = here * back;
                    to[r] = by_pairs * (k[r] * here - s[r]) + by_single * static_cast<double>(e[r]) * here;
                }
                for (int64_t r = rows; r < kBlock; ++r) to_y[r] = to[r] = 0;
            }
        },
        slope);
}

template <class T>
int forward(const T* z, int64_t replicas, int64_t n, int64_t d, double beta, int gradient, int num_threads, T* value,
            T* slope) {
    constexpr int64_t most = int64_t{1} << 31;  // so that n^2 fits
    if (replicas < 0 || n < 1 || d < 1 || n > most || d > most) return kBadSize;
    if (!fits(8, replicas, n, d + 1) || !fits(8, 16, n + 128, d + 1) || !fits(8, 64, d, d)) return kBadSize;
    if (!Whitening<T>::fitting(n, d)) return kBadSize;
    if (replicas == 0) return kOk;
    const int64_t parts = n < 512 ? 1 : n < 2048 ? 4 : 16;
    const bool shared = n * n / 2 >= (kWorthThreads + replicas - 1) / replicas;
    const int64_t most_threads = shared ? team(num_threads) : 1;
    const bool apart = parts == 1 || replicas >= most_threads;
    const int64_t slots = apart ? least(most_threads, replicas) : 1;
    const int64_t threads = apart ? 1 : least(most_threads, parts);  // of a replica
    std::atomic<int64_t> next{0};
    std::atomic<int> error{kOk};
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(slots)) if (slots > 1)
    for (int64_t slot = 0; slot < slots; ++slot) {
        const Room<T> room(n, d, gradient != 0, parts, threads);
        if (!room) error = kOutOfMemory;
        else
            for (int64_t r = next++; r < replicas; r = next++)
                run_replica(z + r * n * d, n, d, beta, gradient != 0, room, value + r, slope + r * n * d);
    }
    return error;
}

}  // namespace

int henze_zirkler_f32(const float* z, int64_t replicas, int64_t n, int64_t d, double beta, int gradient, int num_threads,
                      float* value, float* slope) {
    return forward(z, replicas, n, d, beta, gradient, num_threads, value, slope);
}

int henze_zirkler_f64(const double* z, int64_t replicas, int64_t n, int64_t d, double beta, int gradient, int num_threads,
                      double* value, double* slope) {
    return forward(z, replicas, n, d, beta, gradient, num_threads, value, slope);
}

}  // namespace LIBI_ISA
}  // namespace libi
