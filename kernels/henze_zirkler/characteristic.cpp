// The statistic by characteristic functions at a cost linear in n, and its gradient; characteristic.py states the maths.
//
// With frequencies t_f and weights w_f, and the means over points c_f of cos(t_f.y), s_f of sin(t_f.y):
//
//   HZ = n sum_f w_f ((c_f - exp(-|t_f|^2/2))^2 + s_f^2),   slope in y_i = sum_f 2 w_f t_f (s_f cos - (c_f - ..) sin)(t_f.y_i)
//
// random: the frequencies are given. sliced: nodes of a quadrature along each direction, of the projected points. quadrature:
// nodes along each coordinate; for two and three coordinates the features are the products of theirs, and sums over points
// are matrix products. Nodes are chosen for each replica by the points' extent, and past 2^22 products it is `exact`.
//
// Frequencies' sums are dealt out to threads by frequency, products' to at most 16 parts of the rows that are merged in order,
// the way back by rows: the number of threads moves no bit. Memory: the points, their slopes and the frequencies.
#include <atomic>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "../entry_points.hpp"
#include "../sizes.hpp"
#include "products.hpp"
#include "waves.hpp"
#include "whitening.hpp"

namespace libi {
namespace LIBI_ISA {

// cpu.cpp's, of this instruction set.
int henze_zirkler_f32(const float*, int64_t, int64_t, int64_t, double, int, int, float*, float*);
int henze_zirkler_f64(const double*, int64_t, int64_t, int64_t, double, int, int, double*, double*);

namespace {

constexpr double kTurn = 6.283185307179586477;
constexpr int64_t kLargestGrid = int64_t{1} << 22;
constexpr int64_t kWorthWaves = int64_t{1} << 17;  // points times frequencies: fewer are done before a thread has woken
enum Method : int { kQuadrature = 0, kRandom = 1, kSliced = 2 };

int exact(const float* z, int64_t n, int64_t d, double beta, bool gradient, int threads, float* value, float* slope) {
    return henze_zirkler_f32(z, 1, n, d, beta, gradient, threads, value, slope);
}
int exact(const double* z, int64_t n, int64_t d, double beta, bool gradient, int threads, double* value, double* slope) {
    return henze_zirkler_f64(z, 1, n, d, beta, gradient, threads, value, slope);
}

LIBI_INLINE int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Nodes +-(k + 1/2) h, k < count, for N(0, beta^2) on a line: see characteristic.axis, which this follows.
struct Axis {
    int64_t count;
    double beta, step;
    double node(int64_t k) const { return beta * (static_cast<double>(k) + 0.5) * step; }
    double end() const { return node(count); }
    double weight(int64_t k) const {
        const double s = (static_cast<double>(k) + 0.5) * step;
        return 2 * step / std::sqrt(kTurn) * std::exp(-0.5 * s * s);
    }
};

struct Extent {
    double low = 0, high = 0;
    template <class T>
    void add(const T* x, int64_t count) {
        T least = x[0], most = x[0];
        for (int64_t i = 1; i < count; ++i) least = x[i] < least ? x[i] : least, most = x[i] > most ? x[i] : most;
        low = static_cast<double>(least), high = static_cast<double>(most);
    }
};

constexpr double kMostNodes = 1 << 30;  // more, as of a beta without end, are refused

template <class T>
Axis make_axis(double between, double away, int64_t n, double beta) {
    const double tolerance = sizeof(T) == 4 ? 1e-7 : 1e-10;
    const double margin = std::sqrt(2 * std::log(static_cast<double>(n) / tolerance));
    const double bandwidth = std::fmax(std::fmax(beta * between + margin, beta * away + margin * std::sqrt(1 + beta * beta)),
                                       margin * std::sqrt(1 + 2 * beta * beta));
    const double nodes = std::ceil(margin * bandwidth / kTurn);
    const int64_t count = nodes < kMostNodes ? up(static_cast<int64_t>(nodes), 8) : static_cast<int64_t>(kMostNodes);
    return {count, beta, margin / static_cast<double>(count)};
}

// One replica: whitened points y [d][stride], zero past n, and slopes [d][stride].
template <class T>
struct Problem {
    const T* y;
    int64_t n, d, stride;
    double beta;
    int threads;
    bool gradient;
    double* slope;
};

// A frequency's share in HZ / n by its mean's difference from the target, and what it adds to every slope, 2 w difference.
template <class T>
LIBI_INLINE double take_difference(double difference, double weight, T& by) {
    by = static_cast<T>(2 * weight * difference);
    return weight * difference * difference;
}

// Rows of a register at a time, of a block of 64: the slopes of waves of frequencies.
template <class T>
void pull_block(const T* y, int64_t stride, const T* turns, int64_t step, int64_t d, const T* by, T* work,
                double* slope, int64_t slope_stride) {
    for (int64_t r = 0; r < kBlock; r += kWidth<T>)
        pull_waves(y + r, stride, turns, step, d, step, by, by + step, work, slope + r, slope_stride);
}

template <class T>
int by_random(const Problem<T>& p, const T* vectors, int64_t count, double* value) {
    constexpr int64_t group = 4 * Wave<T>::lanes;
    const int64_t step = up(count, Wave<T>::lanes), groups = (step + group - 1) / group, d = p.d;
    const int64_t blocks = (p.n + kBlock - 1) / kBlock;
    const int64_t threads = p.n * count < kWorthWaves ? 1 : least(p.threads, blocks);
    const Numbers<T> numbers(d * step + 2 * step + threads * up(d * Wave<T>::lanes, Wave<T>::lanes));
    const Numbers<double> sums(2 * step);
    if (!numbers.first || !sums.first) return kOutOfMemory;
    T *const turns = numbers.first, *const by = turns + d * step, *const works = by + 2 * step;
    for (int64_t k = 0; k < d; ++k)
        for (int64_t f = 0; f < step; ++f)
            turns[k * step + f] = f < count ? static_cast<T>(static_cast<double>(vectors[f * d + k]) / kTurn) : T(0);
    for (int64_t f = 0; f < 2 * step; ++f) sums.first[f] = 0, by[f] = 0;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t i = 0; i < p.n; i += kChunk)
            for (int64_t f = g * group; f < least(step, (g + 1) * group); f += kWidth<T>)
                add_waves(p.y + i, p.stride, least(kChunk, p.n - i), turns + f, step, d, sums.first + f, sums.first + step + f);
    const double n = static_cast<double>(p.n), weight = 1 / static_cast<double>(count);
    double total = 0;
    for (int64_t f = 0; f < count; ++f) {
        double square = 0;
        for (int64_t k = 0; k < d; ++k) {
            const double t = kTurn * static_cast<double>(turns[k * step + f]);  // as the points meet it
            square += t * t;
        }
        total += take_difference(sums.first[f] / n - std::exp(-0.5 * square), weight, by[f]);
        total += take_difference(sums.first[step + f] / n, weight, by[step + f]);
    }
    *value = n * total;
    if (!p.gradient) return kOk;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t slot = 0; slot < threads; ++slot) {
        T* const work = works + slot * d * Wave<T>::lanes;
        for (int64_t b = slot * blocks / threads; b < (slot + 1) * blocks / threads; ++b)
            pull_block(p.y + b * kBlock, p.stride, turns, step, d, by, work, p.slope + b * kBlock, p.stride);
    }
    for (int64_t k = 0; k < d * p.stride; ++k) p.slope[k] *= kTurn;
    return kOk;
}

// Directions [count][d]: each its own sums over the nodes of one axis. Null directions: the first coordinate itself.
template <class T>
int by_lines(const Problem<T>& p, const T* directions, int64_t count, double* value) {
    const int64_t d = p.d, padded = up(p.n, kBlock), blocks = padded / kBlock;
    const int64_t sharers = least(p.threads, count), helpers = p.n * count < kWorthWaves / 16 ? 1 : least(p.threads, blocks);
    const int64_t threads = p.n * count < kWorthWaves / 16 ? 1 : sharers;
    const Numbers<T> points(threads * padded);
    const Numbers<double> widths(2 * count);
    if (!points.first || !widths.first) return kOutOfMemory;
    const auto project = [&](int64_t line, int64_t i, int64_t rows, T* to) {
        for (int64_t r = 0; r < rows; r += kWidth<T>) {
            Vector<T> x = Vector<T>{};
            for (int64_t k = 0; k < d; ++k)
                x = multiply_add(all<T>(directions ? directions[line * d + k] : T(1)), load<T>(p.y + k * p.stride + i + r), x);
            store<T>(to + r, x);
        }
    };
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t slot = 0; slot < threads; ++slot)
        for (int64_t line = slot; line < count; line += threads) {
            T* const x = points.first + slot * padded;
            Extent extent;
            project(line, 0, padded, x);
            extent.add(x, p.n);
            widths.first[2 * line] = extent.high - extent.low;
            widths.first[2 * line + 1] = std::fmax(extent.high, -extent.low);
        }
    double between = 0, away = 0;
    for (int64_t line = 0; line < count; ++line) {
        between = std::fmax(between, widths.first[2 * line]);
        away = std::fmax(away, widths.first[2 * line + 1]);
    }
    const Axis axis = make_axis<T>(between, away, p.n, p.beta);
    const int64_t step = up(axis.count, Wave<T>::lanes);
    if (axis.count >= static_cast<int64_t>(kMostNodes) || !fits(8, count + 1, 2 * step + 128)) return kOutOfMemory;
    const Numbers<T> numbers(step + count * 2 * step + helpers * (Wave<T>::lanes + kBlock));
    const Numbers<double> sums(count * 2 * step + count + helpers * kBlock);
    if (!numbers.first || !sums.first) return kOutOfMemory;
    T *const turns = numbers.first, *const by = turns + step, *const works = by + count * 2 * step;
    double *const totals = sums.first + count * 2 * step, *const pulls = totals + count;
    for (int64_t k = 0; k < step; ++k) turns[k] = k < axis.count ? static_cast<T>(axis.node(k) / kTurn) : T(0);
    const double n = static_cast<double>(p.n);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t slot = 0; slot < threads; ++slot)
        for (int64_t line = slot; line < count; line += threads) {
            T *const x = points.first + slot * padded, *const own = by + line * 2 * step;
            double* const sum = sums.first + line * 2 * step;
            for (int64_t f = 0; f < 2 * step; ++f) sum[f] = 0, own[f] = 0;
            project(line, 0, padded, x);
            for (int64_t f = 0; f < step; f += kWidth<T>)
                add_waves(x, padded, p.n, turns + f, step, 1, sum + f, sum + step + f);
            double total = 0;
            for (int64_t f = 0; f < axis.count; ++f) {
                const double t = kTurn * static_cast<double>(turns[f]), weight = axis.weight(f) / static_cast<double>(count);
                total += take_difference(sum[f] / n - std::exp(-0.5 * t * t), weight, own[f]);
                total += take_difference(sum[step + f] / n, weight, own[step + f]);
            }
            totals[line] = total;
        }
    double total = 0;
    for (int64_t line = 0; line < count; ++line) total += totals[line];
    *value = n * total;
    if (!p.gradient) return kOk;
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(helpers)) if (helpers > 1)
    for (int64_t slot = 0; slot < helpers; ++slot) {
        T* const x = works + slot * (Wave<T>::lanes + kBlock) + Wave<T>::lanes;
        T* const work = x - Wave<T>::lanes;
        double* const pull = pulls + slot * kBlock;
        for (int64_t b = slot; b < blocks; b += helpers)
            for (int64_t line = 0; line < count; ++line) {
                project(line, b * kBlock, kBlock, x);
                for (int64_t r = 0; r < kBlock; ++r) pull[r] = 0;
                pull_block(x, kBlock, turns, step, 1, by + line * 2 * step, work, pull, kBlock);
                for (int64_t k = 0; k < d; ++k) {
                    const double along = kTurn * (directions ? static_cast<double>(directions[line * d + k]) : 1.0);
                    add_scaled(p.slope + k * p.stride + b * kBlock, along, pull);
                }
            }
    }
    return kOk;
}

// Nodes of one coordinate in turns, filled up to whole registers, and the features of rows [rows][2 count]: cosines, sines.
template <class T>
struct Nodes {
    Axis axis;
    int64_t width;  // 2 count, a multiple of 16
    T* turns;       // [count filled up]

    // A register may run over the end of the cosines, or of the row: registers go from the last to the first, rows forwards.
    void features(const T* y, int64_t rows, T* to) const {
        using V = Vector<T>;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t f = up(axis.count, kWidth<T>) - kWidth<T>; f >= 0; f -= kWidth<T>) {
                const V phase[1] = {all<T>(y[i]) * load<T>(turns + f)};
                V cosine[1], sine[1];
                take_waves<T, 1>(phase, cosine, sine);
                store<T>(to + i * width + f, cosine[0]);
                store<T>(to + i * width + axis.count + f, sine[0]);
            }
    }

    // The slope in y of the slopes `by` in the features; nodes past the last are zero, so what lies there does not count.
    void pull(const T* by, const T* features, int64_t rows, double* slope) const {
        using V = Vector<T>;
        constexpr int64_t lanes = Wave<T>::lanes;
        for (int64_t i = 0; i < rows; ++i) {
            const T *const g = by + i * width, *const x = features + i * width;
            T lane[lanes];
            for (int64_t h = 0; h < lanes; h += kWidth<T>) {
                V sum = V{};
                for (int64_t f = h; f < axis.count; f += lanes) {
                    V one = load<T>(g + axis.count + f) * load<T>(x + f);
                    one = one - load<T>(g + f) * load<T>(x + axis.count + f);
                    sum = multiply_add(one, load<T>(turns + f), sum);
                }
                store<T>(lane + h, sum);
            }
            for (int64_t half = lanes / 2; half > 0; half /= 2)
                for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
            slope[i] += kTurn * static_cast<double>(lane[0]);
        }
    }

    double target(int64_t f) const {
        const double t = kTurn * static_cast<double>(turns[f]);  // as the points meet it
        return f < axis.count ? std::exp(-0.5 * t * t) : 0.0;
    }
    double weight(int64_t f) const { return axis.weight(f % axis.count); }
};

// Two or three coordinates. `first` of three multiplies the rows of the second; of two it is 1 and has width 1.
template <class T>
struct Products {
    const Problem<T>& p;
    const Nodes<T>* nodes;  // of the last two; nodes[-1] is the first of three
    bool three;
    int64_t outer, left, right;

    const T* column(int64_t c) const { return p.y + (c + p.d - 2) * p.stride; }
    int64_t size() const { return outer * left * right; }
    // features of three, scaled left features, and slopes of three and of the scaled: each of a chunk.
    int64_t room() const { return 2 * kInType * (outer + 2 * left + right) + 8 * 16; }

    struct Chunk {
        T *first, *left, *right, *scaled, *by_first, *by_left, *by_right, *by_scaled;
    };
    Chunk chunk(T* at) const {
        Chunk c;
        for (auto [to, width] : {std::pair<T**, int64_t>{&c.first, outer}, {&c.left, left}, {&c.right, right},
                                 {&c.scaled, left}, {&c.by_first, outer}, {&c.by_left, left}, {&c.by_right, right},
                                 {&c.by_scaled, left}})
            *to = at, at += up(kInType * width, 16) + 16;
        return c;
    }

    void take_features(int64_t i, int64_t rows, const Chunk& c) const {
        if (three) nodes[-1].features(column(-1) + i, rows, c.first);
        nodes[0].features(column(0) + i, rows, c.left);
        nodes[1].features(column(1) + i, rows, c.right);
    }
    void scale(int64_t rows, int64_t x, const Chunk& c) const {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t l = 0; l < left; ++l) c.scaled[i * left + l] = c.first[i * outer + x] * c.left[i * left + l];
    }

    void add_sums(int64_t i, int64_t rows, const Chunk& c, double* sums) const {
        take_features(i, rows, c);
        for (int64_t x = 0; x < outer; ++x) {
            if (three) scale(rows, x, c);
            add_gram(three ? c.scaled : c.left, left, c.right, right, rows, sums + x * left * right);
        }
    }

    // by [outer][left][right] and its transposes [outer][right][left].
    void pull(int64_t i, int64_t rows, const Chunk& c, const T* by, const T* transposed) const {
        const int64_t filled = up(rows, kDown);
        take_features(i, filled, c);
        for (int64_t x = 0; x < outer; ++x) {
            const int64_t at = x * left * right;
            if (three) scale(filled, x, c);
            map_rows(three ? c.scaled : c.left, left, by + at, right, filled, x > 0, c.by_right);
            map_rows(c.right, right, transposed + at, left, filled, false, three ? c.by_scaled : c.by_left);
            if (!three) continue;
            for (int64_t r = 0; r < rows; ++r) {
                T* const to = c.by_left + r * left;
                const T* const from = c.by_scaled + r * left;
                T sum[16] = {};
                for (int64_t l = 0; l < left; l += 16)
                    for (int64_t k = 0; k < 16; ++k) {
                        sum[k] += from[l + k] * c.left[r * left + l + k];
                        to[l + k] = (x > 0 ? to[l + k] : T(0)) + c.first[r * outer + x] * from[l + k];
                    }
                for (int64_t half = 8; half > 0; half /= 2)
                    for (int64_t k = 0; k < half; ++k) sum[k] += sum[k + half];
                c.by_first[r * outer + x] = sum[0];
            }
        }
        const auto slope = [&](int64_t k) { return p.slope + (k + p.d - 2) * p.stride + i; };
        if (three) nodes[-1].pull(c.by_first, c.first, rows, slope(-1));
        nodes[0].pull(c.by_left, c.left, rows, slope(0));
        nodes[1].pull(c.by_right, c.right, rows, slope(1));
    }
};

template <class T>
int by_grid(const Problem<T>& p, bool& too_large, double* value) {
    Nodes<T> nodes[3];
    int64_t numbers_of_turns = 0;
    double grid = 1;
    for (int64_t k = 0; k < p.d; ++k) {
        Extent extent;
        extent.add(p.y + k * p.stride, p.n);
        nodes[k].axis = make_axis<T>(extent.high - extent.low, std::fmax(extent.high, -extent.low), p.n, p.beta);
        nodes[k].width = 2 * nodes[k].axis.count;
        numbers_of_turns += up(nodes[k].axis.count, 16) + 16;
        grid *= static_cast<double>(nodes[k].width);
    }
    too_large = grid > static_cast<double>(kLargestGrid);
    if (too_large) return kOk;
    if (p.d == 1) return by_lines<T>(p, nullptr, 1, value);
    const bool three = p.d == 3;
    const Products<T> products{p, nodes + p.d - 2, three, three ? nodes[0].width : 1, nodes[p.d - 2].width,
                               nodes[p.d - 1].width};
    const int64_t size = products.size(), chunks = (p.n + kInType - 1) / kInType;
    const int64_t most = (int64_t{1} << 20) / size;
    const int64_t parts = least(chunks, most < 1 ? 1 : most > 16 ? 16 : most);
    const int64_t threads = p.n * size < kWorthWaves * 16 ? 1 : least(p.threads, chunks);
    const Numbers<T> numbers(numbers_of_turns + threads * products.room() + 2 * size);
    const Numbers<double> sums(parts * size + 2 * products.right);
    if (!numbers.first || !sums.first) return kOutOfMemory;
    T* at = numbers.first;
    for (int64_t k = 0; k < p.d; ++k) {
        nodes[k].turns = at;
        for (int64_t f = 0; f < up(nodes[k].axis.count, 16) + 16; ++f)
            *at++ = f < nodes[k].axis.count ? static_cast<T>(nodes[k].axis.node(f) / kTurn) : T(0);
    }
    T *const by = at, *const transposed = by + size, *const rooms = transposed + size;
    for (int64_t k = 0; k < threads * products.room(); ++k) rooms[k] = 0;  // what lies past a row's end is finite
    std::atomic<int64_t> next{0};
    const int64_t sharers = least(threads, parts);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(sharers)) if (sharers > 1)
    for (int64_t slot = 0; slot < sharers; ++slot) {
        const auto chunk = products.chunk(rooms + slot * products.room());
        for (int64_t part = next++; part < parts; part = next++) {
            double* const own = sums.first + part * size;
            for (int64_t k = 0; k < size; ++k) own[k] = 0;
            for (int64_t c = part; c < chunks; c += parts)
                products.add_sums(c * kInType, least(kInType, p.n - c * kInType), chunk, own);
        }
    }
    for (int64_t part = 1; part < parts; ++part)
        for (int64_t k = 0; k < size; ++k) sums.first[k] += sums.first[part * size + k];
    const double n = static_cast<double>(p.n);
    const Nodes<T> &left = products.nodes[0], &right = products.nodes[1];
    double *const targets = sums.first + parts * size, *const weights = targets + products.right;
    for (int64_t r = 0; r < products.right; ++r) targets[r] = right.target(r), weights[r] = right.weight(r);
    double total = 0;
    for (int64_t x = 0; x < products.outer; ++x) {
        const double target_x = three ? nodes[0].target(x) : 1, weight_x = three ? nodes[0].weight(x) : 1;
        const int64_t first = x * products.left * products.right;
        for (int64_t l = 0; l < products.left; ++l) {
            const double target = target_x * left.target(l), weight = weight_x * left.weight(l);
            for (int64_t r = 0; r < products.right; ++r) {
                const int64_t k = first + l * products.right + r;
                total += take_difference(sums.first[k] / n - target * targets[r], weight * weights[r], by[k]);
                transposed[first + r * products.left + l] = by[k];
            }
        }
    }
    *value = n * total;
    if (!p.gradient) return kOk;
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t slot = 0; slot < threads; ++slot) {
        const auto chunk = products.chunk(rooms + slot * products.room());
        for (int64_t c = slot; c < chunks; c += threads)
            products.pull(c * kInType, least(kInType, p.n - c * kInType), chunk, by, transposed);
    }
    return kOk;
}

// The longest phase in turns that `random` or `sliced` may meet.
template <class T>
double longest_phase(const Problem<T>& p, const T* vectors, int64_t count, int method) {
    double point = 0, square = 0;
    for (int64_t k = 0; k < p.d; ++k) {
        Extent extent;
        extent.add(p.y + k * p.stride, p.n);
        const double away = std::fmax(extent.high, -extent.low);
        point += away * away;
    }
    if (method == kSliced) return std::sqrt(point) * make_axis<T>(0, 0, p.n, p.beta).end() / kTurn;
    for (int64_t f = 0; f < count; ++f) {
        double own = 0;
        for (int64_t k = 0; k < p.d; ++k) {
            const double t = static_cast<double>(vectors[f * p.d + k]);
            own += t * t;
        }
        square = std::fmax(square, own);
    }
    return std::sqrt(point * square) / kTurn;
}

template <class T>
int run_replica(const T* z, const T* vectors, int64_t count, int method, int64_t n, int64_t d, double beta, bool gradient,
                int threads, T* value, T* slope);

// One replica of floats in double, for phases that float cannot tell from any other.
int in_double(const float* z, const float* vectors, int64_t count, int method, int64_t n, int64_t d, double beta,
              bool gradient, int threads, float* value, float* slope) {
    const Numbers<double> wide(2 * n * d + count * d);
    if (!wide.first) return kOutOfMemory;
    double *const points = wide.first, *const slopes = points + n * d, *const others = slopes + n * d;
    for (int64_t k = 0; k < n * d; ++k) points[k] = static_cast<double>(z[k]);
    for (int64_t k = 0; k < count * d; ++k) others[k] = static_cast<double>(vectors[k]);
    double found = 0;
    const int error = run_replica(points, others, count, method, n, d, beta, gradient, threads, &found, slopes);
    if (error != kOk) return error;
    *value = static_cast<float>(found);
    if (gradient)
        for (int64_t k = 0; k < n * d; ++k) slope[k] = static_cast<float>(slopes[k]);
    return kOk;
}

template <class T>
int run_replica(const T* z, const T* vectors, int64_t count, int method, int64_t n, int64_t d, double beta, bool gradient,
                int threads, T* value, T* slope) {
    const int64_t stride = up(n, kInType) + 16;
    const Numbers<T> points(d * stride);
    const Numbers<double> numbers(d * stride + Whitening<T>::size(n, d, threads));
    if (!points.first || !numbers.first) return kOutOfMemory;
    const Whitening<T> whitening(z, n, d, threads, numbers.first + d * stride);
    const Kind kind = whitening.prepare();
    if (kind != Kind::kRegular) return write_irregular(kind, n, d, gradient, value, slope), kOk;
    whitening.write_points(1, points.first, stride);
    for (int64_t c = 0; c < d; ++c)
        for (int64_t i = n; i < stride; ++i) points.first[c * stride + i] = 0;
    double* const slopes = numbers.first;
    if (gradient)
        for (int64_t k = 0; k < d * stride; ++k) slopes[k] = 0;
    const Problem<T> p{points.first, n, d, stride, beta, threads, gradient, slopes};
    if constexpr (sizeof(T) == sizeof(float))
        if (method != kQuadrature && !(longest_phase(p, vectors, count, method) < Wave<T>::most))
            return in_double(z, vectors, count, method, n, d, beta, gradient, threads, value, slope);
    double found = 0;
    bool too_large = false;
    const int error = method == kRandom   ? by_random(p, vectors, count, &found)
                      : method == kSliced ? by_lines(p, vectors, count, &found)
                                          : by_grid(p, too_large, &found);
    if (error != kOk) return error;
    if (too_large) return exact(z, n, d, beta, gradient, threads, value, slope);
    *value = static_cast<T>(found);
    if (gradient)
        whitening.write_gradient(
            [&](int64_t i, int64_t rows, double* y, double* g) {
                for (int64_t c = 0; c < d; ++c)
                    for (int64_t r = 0; r < kBlock; ++r) {
                        y[c * kBlock + r] = r < rows ? static_cast<double>(points.first[c * stride + i + r]) : 0;
                        g[c * kBlock + r] = r < rows ? slopes[c * stride + i + r] : 0;
                    }
            },
            slope);
    return kOk;
}

template <class T>
int forward(const T* z, const T* vectors, int64_t count, int method, int64_t replicas, int64_t n, int64_t d, double beta,
            int gradient, int num_threads, T* value, T* slope) {
    if (replicas < 0 || n < 1 || d < 1 || count < 0 || method < kQuadrature || method > kSliced) return kBadSize;
    if (method == kQuadrature ? d > 3 : count < 1) return kBadSize;
    constexpr int64_t most = int64_t{1} << 31;
    if (n > most || d > most || count > most || !fits(8, replicas, n, d + 1) || !fits(8, 16, n + 128, d + 1)) return kBadSize;
    if (!fits(8, 64, d, d) || !fits(8, 16, count + 128, d + 1) || !Whitening<T>::fitting(n, d)) return kBadSize;
    const int threads = team(num_threads);
    const bool apart = replicas >= 2 * threads;  // replicas are shared out, else one after another has all threads
    const int64_t slots = apart ? threads : 1;
    std::atomic<int64_t> next{0};
    std::atomic<int> error{kOk};
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(slots)) if (slots > 1)
    for (int64_t slot = 0; slot < slots; ++slot)
        for (int64_t r = next++; r < replicas; r = next++) {
            const int found = run_replica(z + r * n * d, vectors, count, method, n, d, beta, gradient != 0,
                                          apart ? 1 : threads, value + r, slope + r * n * d);
            if (found != kOk) error = found;
        }
    return error;
}

}  // namespace

int henze_zirkler_characteristic_f32(const float* z, const float* vectors, int64_t count, int method, int64_t replicas,
                                     int64_t n, int64_t d, double beta, int gradient, int num_threads, float* value,
                                     float* slope) {
    return forward(z, vectors, count, method, replicas, n, d, beta, gradient, num_threads, value, slope);
}

int henze_zirkler_characteristic_f64(const double* z, const double* vectors, int64_t count, int method, int64_t replicas,
                                     int64_t n, int64_t d, double beta, int gradient, int num_threads, double* value,
                                     double* slope) {
    return forward(z, vectors, count, method, replicas, n, d, beta, gradient, num_threads, value, slope);
}

}  // namespace LIBI_ISA
}  // namespace libi
