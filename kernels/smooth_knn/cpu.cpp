// The smooth k-nearest-neighbour statistic of every repetition: reference.py has the formulas.
//
// Lanes are rows i of P: a group of them goes through all other points j together. With odds w_j = exp(x_j), x the row's
// -alpha D less its maximum, scaled to sum to k, and e_m the elementary symmetric polynomials,
//
//   P_j = w_j e_{k-1}(w without j) / e_k(w),   e_m <= k^m / m!, so that nothing overflows.
//
// Points stand in blocks of 4. The polynomial of the blocks before (kept), times that of the blocks after (updated), has
// its four highest coefficients taken, by four sums that share their reads; from these each point of the block finds its
// own by multiplying with the three others. All terms are positive: nothing cancels, and no division is needed. Where rows
// are long only some of the polynomials are kept, and those between found again.
//
// Rows where e_k is too small or k too large for that are taken again: points are chosen with probabilities
// p_j = sigmoid(x_j + t) that sum to about k, as the reference has it, and 1 + w_j x becomes 1 - p_j + p_j x.
//
// float takes the first form only, and no more than it can: where distances are so long, or the probabilities so near to
// each other, that float would be seen in the result, the repetition is computed in double. Sums of a row are in double.
//
// A row's place in a register moves no bit, nor does the number of threads, as these share out repetitions. Where the
// processor has a fused multiply-add it is used: v3 and v4 agree to the bit, generic to rounding.
#include <atomic>
#include <cmath>
#include <memory>
#include <new>

#include "../elementary.hpp"
#include "../entry_points.hpp"
#include "../registers.hpp"
#include "../sizes.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

// e_k lies between least and exp(k), and products of a prefix and a suffix that underflow do not count beside it.
template <class T>
struct Type;
template <>
struct Type<float> {
    static constexpr double least = 1e-12;
    static constexpr int64_t largest_k = 40;
};
template <>
struct Type<double> {
    static constexpr double least = 1e-100;
    static constexpr int64_t largest_k = 300;
};

constexpr double kJitter = 1e-5;
constexpr int64_t kBlock = 4;
constexpr int64_t kTile = 16;                // of the matrix, in the sums over its pairs
constexpr int64_t kPrefixBytes = 256 * 1024;  // polynomials kept by a group of rows, in the L2 cache
constexpr double kLongestInFloat = 16;       // alpha D: float's error in it shows in the odds
constexpr double kSteepestInFloat = 4;      // k / sqrt(variance), likewise in the statistic

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Problem {
    int64_t n1, n2, d;
    int64_t k;           // how many are chosen, or how many are not: at most half of the others
    bool complement;
    const double* alphas;
    int64_t num_alphas;
    int64_t blocks, slots;  // a block has points of one sample; its slots that none fills copy point 0 and count for nothing
    int64_t stride;         // slots in whole tiles
    std::unique_ptr<int64_t[]> point;  // in a slot, or -1 [stride]
    std::unique_ptr<int64_t[]> blank;  // slots that none fills
    int64_t blanks;
    int64_t origin;  // the slot of point 0

    int64_t n() const { return n1 + n2; }
    bool counts(int64_t slot) const { return point[slot] >= 0; }
    bool second(int64_t block) const { return point[block * kBlock] >= n1; }

    // Blocks of the two samples alternate, as evenly as their numbers allow: the roundings of a long product drift from its
    // one end to the other, which would otherwise look like a difference between the samples.
    bool arrange() {
        const int64_t blocks1 = round_up(n1, kBlock) / kBlock, blocks2 = round_up(n2, kBlock) / kBlock;
        blocks = blocks1 + blocks2, slots = blocks * kBlock, stride = round_up(slots, kTile), blanks = 0;
        point.reset(new (std::nothrow) int64_t[static_cast<size_t>(stride)]);
        blank.reset(new (std::nothrow) int64_t[2 * kBlock]);
        if (!point || !blank) return false;
        int64_t done1 = 0, done2 = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            const bool other = (2 * done1 + 1) * blocks2 > (2 * done2 + 1) * blocks1;
            const int64_t begin = other ? n1 + kBlock * done2++ : kBlock * done1++, end = other ? n1 + n2 : n1;
            for (int64_t i = 0; i < kBlock; ++i) {
                if (begin + i == 0) origin = b * kBlock;
                point[b * kBlock + i] = begin + i < end ? begin + i : -1;
                if (begin + i >= end) blank[blanks++] = b * kBlock + i;
            }
        }
        for (int64_t i = slots; i < stride; ++i) point[i] = -1;
        return true;
    }
};

// What a thread works in.
template <class T>
struct Space {
    T* u;          // points [d][stride]
    T* distance;   // of a group of rows [slots][lanes]
    T* odds;       // [slots][lanes], then w_j e_{k-1}(w without j), without scale
    T* rest;       // 1 - p, where odds are p
    T* prefix;     // [blocks of a segment][k][lanes]
    T* kept;       // the segments' first [segments][k][lanes]
    T* suffix;     // [k][lanes], three zeros before it
    T* excess;     // E_ij at [j][i], [stride][stride]
    double* row;   // sum of E_ij over j of the other sample [stride]
    int64_t segment, segments;  // blocks of a segment
    std::unique_ptr<unsigned char[]> memory;

    bool make(const Problem& p) {
        constexpr int64_t lanes = kWidth<T>, line = 64;
        const int64_t polynomial = (p.k > 0 ? p.k : 1) * lanes, size = static_cast<int64_t>(sizeof(T));
        const int64_t root = static_cast<int64_t>(std::sqrt(static_cast<double>(p.blocks))) + 1;
        const int64_t fit = kPrefixBytes / (polynomial * size);
        segment = fit > root ? fit : root;
        if (segment > p.blocks) segment = p.blocks;
        segments = (p.blocks + segment - 1) / segment;
        const int64_t counts[] = {p.d * p.stride,       p.slots * lanes,       p.slots * lanes,
                                  p.slots * lanes,      segment * polynomial,  segments * polynomial,
                                  polynomial + 3 * lanes, p.stride * p.stride, p.stride * 8 / size};
        int64_t total = line;
        for (const int64_t count : counts) total += round_up(count * size, line);
        memory.reset(new (std::nothrow) unsigned char[static_cast<size_t>(total)]);
        if (!memory) return false;
        const auto start = reinterpret_cast<uintptr_t>(memory.get());
        unsigned char* at = memory.get() + (line - static_cast<int64_t>(start % line)) % line;
        int next = 0;
        const auto take = [&] {
            unsigned char* mine = at;
            at += round_up(counts[next++] * size, line);
            return mine;
        };
        const auto numbers = [&] { return reinterpret_cast<T*>(take()); };
        u = numbers(), distance = numbers(), odds = numbers(), rest = numbers(), prefix = numbers(), kept = numbers();
        suffix = numbers(), excess = numbers();
        row = reinterpret_cast<double*>(take());
        return true;
    }
};

// from(x) times four factors (q + w x), to the coefficient k - 1; q = 1 unless tilted. In place too.
template <class T, bool tilted>
LIBI_INLINE void multiply_block(const T* odds, const T* rest, int64_t k, const T* from, T* to) {
    using V = Vector<T>;
    constexpr int64_t lanes = kWidth<T>;
    const V w0 = load(odds), w1 = load(odds + lanes), w2 = load(odds + 2 * lanes), w3 = load(odds + 3 * lanes);
    V q0{}, q1{}, q2{}, q3{};
    if constexpr (tilted)
        q0 = load(rest), q1 = load(rest + lanes), q2 = load(rest + 2 * lanes), q3 = load(rest + 3 * lanes);
    V a{}, b{}, c{}, e{};
    for (int64_t m = 0; m < k; ++m) {
        const V x = load(from + m * lanes);
        const V y0 = multiply_add(w0, a, tilted ? q0 * x : x);
        const V y1 = multiply_add(w1, b, tilted ? q1 * y0 : y0);
        const V y2 = multiply_add(w2, c, tilted ? q2 * y1 : y1);
        const V y3 = multiply_add(w3, e, tilted ? q3 * y2 : y2);
        store(to + m * lanes, y3);
        a = x, b = y0, c = y1, e = y2;
    }
}

// odds -> w_j e_{k-1}(w without j) in their place, for a group of rows; their sums over either sample.
template <class T, bool tilted>
void condition(const Problem& p, Space<T>& s, double (&first)[kWidth<T>], double (&second)[kWidth<T>]) {
    using V = Vector<T>;
    constexpr int64_t lanes = kWidth<T>;
    const int64_t k = p.k, step = kBlock * lanes, polynomial = k * lanes;
    for (int64_t l = 0; l < 3 * lanes; ++l) s.suffix[l] = 0;
    T* const suffix = s.suffix + 3 * lanes;
    for (int64_t l = 0; l < polynomial; ++l) suffix[l] = s.kept[l] = l < lanes ? 1 : 0;
    for (int64_t b = 0; b < (s.segments - 1) * s.segment; ++b) {
        const T* const from = b % s.segment == 0 ? s.kept + b / s.segment * polynomial : s.prefix;
        const int64_t after = b + 1;
        T* const to = after % s.segment == 0 ? s.kept + after / s.segment * polynomial : s.prefix;
        multiply_block<T, tilted>(s.odds + b * step, s.rest + b * step, k, from, to);
    }
    for (int64_t l = 0; l < lanes; ++l) first[l] = second[l] = 0;
    for (int64_t part = s.segments - 1; part >= 0; --part) {
        const int64_t begin = part * s.segment, all_blocks = p.blocks;
        const int64_t end = begin + s.segment < all_blocks ? begin + s.segment : all_blocks;
        for (int64_t l = 0; l < polynomial; ++l) s.prefix[l] = s.kept[part * polynomial + l];
        for (int64_t b = begin; b + 1 < end; ++b) {
            const T* const from = s.prefix + (b - begin) * polynomial;
            multiply_block<T, tilted>(s.odds + b * step, s.rest + b * step, k, from, s.prefix + (b + 1 - begin) * polynomial);
        }
        for (int64_t b = end - 1; b >= begin; --b) {
            const T* before = s.prefix + (b - begin) * polynomial;
            const T* after = suffix + (k - 1) * lanes;
            V o0{}, o1{}, o2{}, o3{}, r0{}, r1{}, r2{}, r3{};
            V a0 = load(after), a1 = load(after - lanes), a2 = load(after - 2 * lanes);
            int64_t m = 0;
            for (; m + 1 < k; m += 2, before += 2 * lanes, after -= 2 * lanes) {
                const V x = load(before), y = load(before + lanes);
                const V a3 = load(after - 3 * lanes), a4 = load(after - 4 * lanes);
                o0 = multiply_add(x, a0, o0), o1 = multiply_add(x, a1, o1);
                o2 = multiply_add(x, a2, o2), o3 = multiply_add(x, a3, o3);
                r0 = multiply_add(y, a1, r0), r1 = multiply_add(y, a2, r1);
                r2 = multiply_add(y, a3, r2), r3 = multiply_add(y, a4, r3);
                a0 = a2, a1 = a3, a2 = a4;
            }
            if (m < k) o0 = multiply_add(load(before), a0, o0);
            o0 += r0, o1 += r1, o2 += r2, o3 += r3;

            T* const odds = s.odds + b * step;
            const T* const rest = s.rest + b * step;
            const V w0 = load(odds), w1 = load(odds + lanes), w2 = load(odds + 2 * lanes), w3 = load(odds + 3 * lanes);
            V q0{}, q1{}, q2{}, q3{};
            if constexpr (tilted)
                q0 = load(rest), q1 = load(rest + lanes), q2 = load(rest + 2 * lanes), q3 = load(rest + 3 * lanes);
            multiply_block<T, tilted>(odds, rest, k, suffix, suffix);
            const auto by = [](V w, V high, V q, V low) { return multiply_add(w, high, tilted ? q * low : low); };
            const V t0 = by(w2, o1, q2, o0), t1 = by(w2, o2, q2, o1), t2 = by(w2, o3, q2, o2);
            const V u0 = by(w3, t1, q3, t0), u1 = by(w3, t2, q3, t1);
            const V s0 = by(w0, o1, q0, o0), s1 = by(w0, o2, q0, o1), s2 = by(w0, o3, q0, o2);
            const V v0 = by(w1, s1, q1, s0), v1 = by(w1, s2, q1, s1);
            const V j0 = w0 * by(w1, u1, q1, u0), j1 = w1 * by(w0, u1, q0, u0);
            const V j2 = w2 * by(w3, v1, q3, v0), j3 = w3 * by(w2, v1, q2, v0);
            store(odds, j0), store(odds + lanes, j1), store(odds + 2 * lanes, j2), store(odds + 3 * lanes, j3);
            T sum[lanes];
            store(sum, (j0 + j1) + (j2 + j3));
            double* const total = p.second(b) ? second : first;
#pragma omp simd
            for (int64_t l = 0; l < lanes; ++l) total[l] += static_cast<double>(sum[l]);
        }
    }
}

// k = 1: the odds themselves.
template <class T>
void sum_odds(const Problem& p, const T* odds, double (&first)[kWidth<T>], double (&second)[kWidth<T>]) {
    constexpr int64_t lanes = kWidth<T>;
    for (int64_t l = 0; l < lanes; ++l) first[l] = second[l] = 0;
    for (int64_t j = 0; j < p.slots; j += kBlock) {
        const T* const at = odds + j * lanes;
        T sum[lanes];
        store(sum, (load(at) + load(at + lanes)) + (load(at + 2 * lanes) + load(at + 3 * lanes)));
        double* const total = p.second(j / kBlock) ? second : first;
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) total[l] += static_cast<double>(sum[l]);
    }
}

template <class T>
LIBI_INLINE void leave_out(const Problem& p, int64_t row, T* odds, T value) {
    constexpr int64_t lanes = kWidth<T>;
    for (int64_t l = 0; l < lanes; ++l) odds[(p.counts(row + l) ? row + l : p.origin) * lanes + l] = value;
    for (int64_t b = 0; b < p.blanks; ++b)
        for (int64_t l = 0; l < lanes; ++l) odds[p.blank[b] * lanes + l] = value;
}

// x_j = slope (D_j - extreme_l) <= 0 -> probabilities p = sigmoid(x + t) with a sum within 1/4 of k, and 1 - p.
template <class T>
void tilt(const Problem& p, Space<T>& s, int64_t row, double slope, const T* extreme) {
    constexpr int64_t lanes = kWidth<T>;
    constexpr double minus_infinity = -std::numeric_limits<double>::infinity();
    double sum[lanes] = {}, far[lanes] = {}, least[lanes] = {}, low[lanes], high[lanes], t[lanes];
    T* const x = s.odds;
    for (int64_t j = 0; j < p.slots; ++j)
        for (int64_t l = 0; l < lanes; ++l)
            x[j * lanes + l] = static_cast<T>(slope) * (s.distance[j * lanes + l] - extreme[l]);
    leave_out(p, row, x, static_cast<T>(minus_infinity));
    const double k = static_cast<double>(p.k), others = static_cast<double>(p.n() - 1);
    for (int64_t j = 0; j < p.slots; ++j)
        for (int64_t l = 0; l < lanes; ++l) {
            const double value = x[j * lanes + l];
            sum[l] += exp(value);
            if (value > minus_infinity && value < least[l]) least[l] = value;
        }
    for (int64_t j = 0; j < p.slots; ++j)
        for (int64_t l = 0; l < lanes; ++l) {
            const double value = x[j * lanes + l];
            if (value > minus_infinity) far[l] += exp(least[l] - value);
        }
    for (int64_t l = 0; l < lanes; ++l) {
        t[l] = low[l] = std::log(k) - std::log(sum[l]);
        high[l] = std::log(far[l]) - least[l] - std::log(others - k);
    }
    for (int iteration = 0; iteration < 100; ++iteration) {
        double total[lanes] = {}, variance[lanes] = {};
        for (int64_t j = 0; j < p.slots; ++j)
#pragma omp simd
            for (int64_t l = 0; l < lanes; ++l) {
                const double y = static_cast<double>(x[j * lanes + l]) + t[l];
                const double z = exp(y < 0 ? y : -y);
                const double part = 1 / (1 + z);
                total[l] += y < 0 ? z * part : part;
                variance[l] += z * part * part;
            }
        bool todo = false;
        for (int64_t l = 0; l < lanes; ++l) {
            if (!(std::abs(total[l] - k) > 0.25)) continue;
            todo = true;
            (total[l] < k ? low : high)[l] = t[l];
            const double newton = t[l] + total[l] * std::log(k / total[l]) / variance[l];
            const bool good = newton > low[l] && newton < high[l] && iteration < 10;
            t[l] = good ? newton : (low[l] + high[l]) / 2;
        }
        if (!todo) break;
    }
    for (int64_t j = 0; j < p.slots; ++j)
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) {
            const double y = static_cast<double>(x[j * lanes + l]) + t[l];
            const double z = exp(y < 0 ? y : -y);
            const double part = 1 / (1 + z), other = z * part;
            s.odds[j * lanes + l] = static_cast<T>(y < 0 ? other : part);
            s.rest[j * lanes + l] = static_cast<T>(y < 0 ? part : other);
        }
}

// Adds an alpha's share of E, of the lanes that are wanted.
template <class T>
void add_excess(const Problem& p, Space<T>& s, int64_t row, const double (&first)[kWidth<T>],
                const double (&second)[kWidth<T>], const bool (&wanted)[kWidth<T>], bool all_wanted) {
    using V = Vector<T>;
    constexpr int64_t lanes = kWidth<T>;
    const double k = static_cast<double>(p.k), others = static_cast<double>(p.n() - 1);
    const double weight = 1 / static_cast<double>(p.num_alphas);
    T factor[lanes], mask[lanes];
    for (int64_t l = 0; l < lanes; ++l) {
        const bool in_second = p.point[row + l] >= p.n1;
        const double sum = first[l] + second[l];
        const double other = (in_second ? first[l] : second[l]) / sum;
        const double expected = static_cast<double>(in_second ? p.n1 : p.n2) / others;
        if (wanted[l]) s.row[row + l] += k * (other - expected) * weight;
        factor[l] = static_cast<T>(k / sum * weight);
        mask[l] = wanted[l] ? 1 : 0;
    }
    const V scale = load(factor), level = all<T>(static_cast<T>(k / others * weight)), chosen = load(mask);
    for (int64_t j = 0; j < p.slots; ++j) {
        T* const to = s.excess + j * p.stride + row;
        const V value = load(s.odds + j * lanes) * scale - level;
        store(to, load(to) + (all_wanted ? value : chosen > V{} ? value : V{}));
    }
}

// E of the rows from `row` on, one alpha after the other. False if float does not serve.
template <class T>
bool run_group(const Problem& p, Space<T>& s, int64_t row) {
    using V = Vector<T>;
    constexpr int64_t lanes = kWidth<T>;
    constexpr bool single = sizeof(T) == 4;
    T* const distance = s.distance;
    T* const odds = s.odds;
    V most{};
    for (int64_t j = 0; j < p.slots; ++j) {
        V sum = all<T>(static_cast<T>(kJitter));
        for (int64_t c = 0; c < p.d; ++c) {
            const V difference = load(s.u + c * p.stride + row) - all<T>(s.u[c * p.stride + j]);
            sum = multiply_add(difference, difference, sum);
        }
        store(distance + j * lanes, sum);
        most = sum > most ? sum : most;
    }
    // The farthest may be the point itself or a copy: that changes nothing.
    T near[lanes], far[lanes];
    store(far, most);
    for (int64_t l = 0; l < lanes; ++l) near[l] = std::numeric_limits<T>::max(), far[l] = std::sqrt(far[l]);
#pragma omp simd
    for (int64_t i = 0; i < p.slots * lanes; ++i) distance[i] = std::sqrt(distance[i]);
    leave_out(p, row, distance, p.complement ? T(0) : std::numeric_limits<T>::max());
    for (int64_t j = 0; j < p.slots; ++j) {
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l)
            near[l] = distance[j * lanes + l] < near[l] ? distance[j * lanes + l] : near[l];
    }
    const T* const extreme = p.complement ? far : near;
    const double k = static_cast<double>(p.k);
    for (int64_t j = 0; j < p.slots; ++j) store(s.excess + j * p.stride + row, V{});
    for (int64_t l = 0; l < lanes; ++l) s.row[row + l] = 0;
    for (int64_t a = 0; a < p.num_alphas; ++a) {
        const double slope = p.complement ? p.alphas[a] : -p.alphas[a];
        if (single)
            for (int64_t l = 0; l < lanes; ++l)
                if (!(p.alphas[a] * static_cast<double>(far[l]) <= kLongestInFloat)) return false;
        double first[lanes] = {}, second[lanes] = {};
        const bool fits = p.k <= Type<T>::largest_k;
        bool good[lanes] = {}, all_good = fits;
        if (fits) {
            const T factor = static_cast<T>(slope);
            for (int64_t j = 0; j < p.slots; ++j) {
#pragma omp simd
                for (int64_t l = 0; l < lanes; ++l)
                    odds[j * lanes + l] = exp(factor * (distance[j * lanes + l] - extreme[l]));
            }
            leave_out(p, row, odds, T(0));
            sum_odds(p, odds, first, second);
            if (p.k > 1) {
                T scale[lanes];
                for (int64_t l = 0; l < lanes; ++l) scale[l] = static_cast<T>(k / (first[l] + second[l]));
                for (int64_t j = 0; j < p.slots; ++j) store(odds + j * lanes, load(odds + j * lanes) * load(scale));
                condition<T, false>(p, s, first, second);
            }
            for (int64_t l = 0; l < lanes; ++l) {
                const double sum = first[l] + second[l];
                good[l] = sum >= Type<T>::least && sum < std::numeric_limits<double>::max();
                all_good = all_good && good[l];
            }
        }
        if (all_good || (fits && !single)) add_excess(p, s, row, first, second, good, all_good);
        if (all_good) continue;
        if constexpr (single) {
            return false;
        } else {
            for (bool& lane : good) lane = !lane;
            tilt(p, s, row, slope, extreme);
            condition<T, true>(p, s, first, second);
            add_excess(p, s, row, first, second, good, false);
        }
    }
    for (int64_t l = 0; l < lanes; ++l) {
        s.excess[(row + l) * p.stride + row + l] = 0;
        if (p.counts(row + l)) continue;
        for (int64_t j = 0; j < p.slots; ++j) s.excess[j * p.stride + row + l] = 0;
        s.row[row + l] = 0;
    }
    return true;
}

template <class T>
double fold(T* lane) {
    for (int64_t half = kTile / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    return static_cast<double>(lane[0]);
}

// The statistic of one repetition of points z [n, d]. False if float does not serve.
template <class T, class Given>
bool run(const Problem& p, Space<T>& s, const Given* z, double& statistic) {
    bool finite = true;
    for (int64_t c = 0; c < p.d; ++c)
        for (int64_t i = 0; i < p.stride; ++i) {
            const Given value = z[(p.counts(i) ? p.point[i] : 0) * p.d + c];
            finite = finite && value - value == 0;
            s.u[c * p.stride + i] = static_cast<T>(value);
        }
    statistic = finite ? 0 : std::numeric_limits<double>::quiet_NaN();
    if (!finite || p.k == 0) return true;
    for (int64_t row = 0; row < p.slots; row += kWidth<T>)
        if (!run_group(p, s, row)) return false;
    // Slots that no point fills.
    for (int64_t j = 0; j < p.stride; ++j)
        if (!p.counts(j))
            for (int64_t i = 0; i < p.stride; ++i) s.excess[j * p.stride + i] = 0;
    for (int64_t j = 0; j < p.slots; ++j)
        for (int64_t i = round_up(p.slots, kWidth<T>); i < p.stride; ++i) s.excess[j * p.stride + i] = 0;

    double between = 0, columns = 0, pairs = 0;
    for (int64_t i = 0; i < p.slots; ++i) between += s.row[i];
    for (int64_t j = 0; j < p.slots; ++j) {
        T lane[kTile] = {};
        for (int64_t i = 0; i < p.stride; i += kTile)
#pragma omp simd
            for (int64_t l = 0; l < kTile; ++l) lane[l] += s.excess[j * p.stride + i + l];
        const double column = fold(lane);
        columns += column * column;
    }
    // sum_ij E_ij (E_ij + E_ji) = 1/2 sum_ij (E_ij + E_ji)^2, in tiles on and right of the diagonal.
    for (int64_t jt = 0; jt < p.stride; jt += kTile)
        for (int64_t it = jt; it < p.stride; it += kTile) {
            T turned[kTile][kTile], lane[kTile] = {};
            for (int64_t i = 0; i < kTile; ++i)
                for (int64_t j = 0; j < kTile; ++j) turned[j][i] = s.excess[(it + i) * p.stride + jt + j];
            for (int64_t j = 0; j < kTile; ++j) {
                const T* const straight = s.excess + (jt + j) * p.stride + it;
#pragma omp simd
                for (int64_t i = 0; i < kTile; ++i) {
                    const T both = straight[i] + turned[j][i];
                    lane[i] += both * both;
                }
            }
            pairs += fold(lane) * (it == jt ? 0.5 : 1.0);
        }
    const double n = static_cast<double>(p.n()), n1 = static_cast<double>(p.n1), n2 = static_cast<double>(p.n2);
    const double chi1 = n1 * n2 / (n * (n - 1)), chi2 = 4 * (n1 - 1) * (n2 - 1) / ((n - 2) * (n - 3));
    const double variance = chi1 * (1 - chi2) * columns + chi1 * chi2 * pairs;
    const double deviation = std::sqrt(kJitter + variance);
    statistic = (p.complement ? between : -between) / deviation;
    return sizeof(T) > 4 || static_cast<double>(p.k) <= kSteepestInFloat * deviation;
}

template <class T>
int forward(const T* z, int64_t replicas, int64_t n1, int64_t n2, int64_t d, int64_t k, const double* alphas,
            int64_t num_alphas, int num_threads, T* out) {
    constexpr int64_t most = int64_t{1} << 28;
    if (replicas < 0 || n1 < 2 || n2 < 2 || d < 1 || k < 1 || num_alphas < 1) return kBadSize;
    if (n1 > most || n2 > most || d > most || k > n1 + n2 - 1) return kBadSize;
    if (!fits(8, replicas, n1 + n2, d) || !fits(8, num_alphas)) return kBadSize;
    if (replicas == 0) return kOk;
    Problem p{};
    const int64_t others = n1 + n2 - 1;
    p.n1 = n1, p.n2 = n2, p.d = d, p.alphas = alphas, p.num_alphas = num_alphas;
    p.complement = 2 * k > others;
    p.k = p.complement ? others - k : k;
    if (!p.arrange()) return kOutOfMemory;
    std::atomic<int64_t> next{0};
    std::atomic<int> error{kOk};
    const int64_t threads = team(num_threads) < replicas ? team(num_threads) : replicas;
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t slot = 0; slot < threads; ++slot) {
        Space<float> floats{};
        Space<double> doubles{};
        for (int64_t r = next++; r < replicas && error == kOk; r = next++) {
            const T* const points = z + r * p.n() * d;
            double statistic = 0;
            bool done = false;
            if constexpr (sizeof(T) == 4) {
                if (!floats.memory && !floats.make(p)) error = kOutOfMemory;
                if (error == kOk) done = run(p, floats, points, statistic);
            }
            if (!done && error == kOk) {
                if (!doubles.memory && !doubles.make(p)) error = kOutOfMemory;
                if (error == kOk) run(p, doubles, points, statistic);
            }
            if (error == kOk) out[r] = static_cast<T>(statistic);
        }
    }
    return error;
}

}  // namespace

int smooth_knn_f32(const float* z, int64_t replicas, int64_t n1, int64_t n2, int64_t d, int64_t k, const double* alphas,
                   int64_t num_alphas, int num_threads, float* out) {
    return forward(z, replicas, n1, n2, d, k, alphas, num_alphas, num_threads, out);
}

int smooth_knn_f64(const double* z, int64_t replicas, int64_t n1, int64_t n2, int64_t d, int64_t k,
                   const double* alphas, int64_t num_alphas, int num_threads, double* out) {
    return forward(z, replicas, n1, n2, d, k, alphas, num_alphas, num_threads, out);
}

}  // namespace LIBI_ISA
}  // namespace libi
