// sum_ij k_ij and, if asked, sum_j k_ij [y_j, 1] for every i, with k_ij = exp(-b^2/2 |y_i - y_j|^2).
//
// k is symmetric, so an exponential is taken once for a pair and given to both of its points. Points are scaled first,
// u = y b sqrt(log2(e) / 2), and then k_ij = 2^-|u_i - u_j|^2: from differences, which lose nothing where points lie
// close, unlike |u_i|^2 + |u_j|^2 - 2 u_i.u_j.
//
// Points stand in strips of 16 (8 in double). A strip takes the square on the diagonal whole, and once all that lies to
// the right of it. Coordinates lie apart, [d][n]. A block of rows keeps its sums in registers while it runs along a tile
// of columns, whose own sums stay in the L1 cache. Sums are of the points' type within a tile, and double beyond it.
//
// Strips are dealt out to 1, 4 or 16 parts, by n alone; each part has sums of its own, and these are added in order. So
// the number of threads moves no bit. Nor does the width of a register, since a lane has the same sums in every build.
// Where the processor has a fused multiply-add it is used: v3 and v4 agree to the bit, generic to rounding.
#include <atomic>
#include <memory>
#include <new>

#include "../elementary.hpp"
#include "../entry_points.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace libi {
namespace LIBI_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kBytes = 32;
#else
constexpr int64_t kBytes = 16;
#endif

// A register of numbers. Operators are those of the compiler's vectors; without such, a number is a vector of one.
#if defined(__GNUC__)
#define LIBI_REGISTER __attribute__((vector_size(kBytes)))
#else
#define LIBI_REGISTER
#endif
typedef float Floats LIBI_REGISTER;
typedef double Doubles LIBI_REGISTER;

// Lanes in a strip, whatever the register. 2^-q = 1 + q (c_1 + q (c_2 + ...)) for |q| <= 1/2, minimax in the relative
// error: 9e-8 and 2e-17. round + n has n + bias in its lowest bits, and 2^-bias is taken for 0.
template <class T>
struct Type;
template <>
struct Type<float> {
    using Vector = Floats;
    typedef uint32_t Bits LIBI_REGISTER;
    static constexpr int64_t lanes = 16;
    static constexpr float round = 12582912.0f + 127.0f, least = 127.0f;  // 1.5 * 2^23
    static constexpr int mantissa = 23;
    static constexpr float series[] = {-0.6931470036506653f, 0.24022242426872253f, -0.05550733581185341f,
                                       0.009671512991189957f, -0.0013264729641377926f};
};
template <>
struct Type<double> {
    using Vector = Doubles;
    typedef uint64_t Bits LIBI_REGISTER;
    static constexpr int64_t lanes = 8;
    static constexpr double round = 6755399441055744.0 + 1023.0, least = 1023.0;  // 1.5 * 2^52
    static constexpr int mantissa = 52;
    static constexpr double series[] = {-0.693147180559945697,    0.24022650695910098,     -0.0555041086647903946,
                                        0.00961812910760700238,   -0.00133335581534399647, 0.000154035304415721303,
                                        -0.0000152527273851938682, 1.32154426753298221e-6, -1.01806476592341389e-7,
                                        7.07257041281442351e-9,   -4.07807192958833667e-10};
};

LIBI_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

LIBI_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}

// The smaller of limit and x; NaN where x is. (The unmasked intrinsic warns falsely in GCC 12.)
LIBI_INLINE Floats at_most(Floats limit, Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)limit, (__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_min_ps((__m256)limit, (__m256)x);
#else
    return limit < x ? limit : x;
#endif
}

LIBI_INLINE Doubles at_most(Doubles limit, Doubles x) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_maskz_min_pd(0xff, (__m512d)limit, (__m512d)x);
#elif defined(__AVX2__)
    return (Doubles)_mm256_min_pd((__m256d)limit, (__m256d)x);
#else
    return limit < x ? limit : x;
#endif
}

template <class T>
using Vector = typename Type<T>::Vector;

template <class T>
constexpr int64_t kWidth = static_cast<int64_t>(sizeof(Vector<T>) / sizeof(T));

template <class T>
LIBI_INLINE Vector<T> all(T x) {
    return x - Vector<T>{};
}

template <class T>
LIBI_INLINE Vector<T> load(const T* from) {
    Vector<T> v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

template <class T>
LIBI_INLINE void store(T* to, Vector<T> v) {
    std::memcpy(to, &v, sizeof(v));
}

// 2^-s for s >= 0: 1 at 0, 0 where s rounds to 127 (1023) or more, NaN where s is.
template <class T>
LIBI_INLINE Vector<T> exp2_minus(Vector<T> s) {
    using V = Vector<T>;
    const V round = all<T>(Type<T>::round);
    const V clipped = at_most(all<T>(Type<T>::least), s);
    const V shifted = round - clipped;
    const V q = clipped + (shifted - round);
    constexpr int degree = static_cast<int>(sizeof(Type<T>::series) / sizeof(T));
    V p = all<T>(Type<T>::series[degree - 1]);
    for (int k = degree - 2; k >= 0; --k) p = multiply_add(p, q, all<T>(Type<T>::series[k]));
    p = multiply_add(p, q, all<T>(1));
    return p * bit_cast<V>(bit_cast<typename Type<T>::Bits>(shifted) << Type<T>::mantissa);
}

// Points of one replica, scaled: u[c * stride + i]. Rows are filled up with points so far off that their k is 0.
template <class T>
struct Points {
    const T* u;
    int64_t n, d, strips, stride;
};

// What a part works in: totals [components][stride], and the sums of one tile's columns, [components][tile + 16].
template <class T>
struct Sums {
    double* totals;
    T* columns;
    T* kernel;  // only where d is not known to the compiler: one block's k, [rows][tile]
};

constexpr int64_t kTileBytes = 20480;    // of coordinates and sums of columns, in the L1 cache
constexpr int64_t kStripsInFloat = 16;   // rows of so many strips are summed before they go into a double
constexpr int64_t kKnown = 8;            // dimensions up to here have a kernel of their own
constexpr int kRowsAny = 4;

template <class T>
int64_t tile_strips(int64_t d) {
    const int64_t strips = kTileBytes / (Type<T>::lanes * static_cast<int64_t>(sizeof(T)) * (2 * d + 1));
    return strips < 16 ? 16 : strips;
}

// Adds each row's lanes in a fixed tree, and the sum to its total.
template <class T, int rows, int components>
LIBI_INLINE void add_rows(T (&lane)[rows][components][Type<T>::lanes], double* totals, int64_t stride) {
    for (int half = Type<T>::lanes / 2; half > 0; half /= 2)
        for (int b = 0; b < rows; ++b)
            for (int c = 0; c < components; ++c)
                for (int l = 0; l < half; ++l) lane[b][c][l] += lane[b][c][l + half];
    for (int b = 0; b < rows; ++b)
        for (int c = 0; c < components; ++c) totals[c * stride + b] += static_cast<double>(lane[b][c][0]);
}

// Rows [i, i + rows) against `strips` strips of columns from j on; with `diagonal` the strip before those is the rows' own.
template <class T, int d, bool gradient, int rows>
void block(const Points<T>& points, int64_t i, int64_t j, int64_t strips, bool diagonal, Sums<T> sums, T* columns,
           int64_t column_stride) {
    using V = Vector<T>;
    constexpr int components = gradient ? d + 1 : 1;  // the last is sum k
    constexpr int64_t lanes = Type<T>::lanes;
    constexpr int last = components - 1;
    alignas(64) T lane[rows][components][lanes];
    for (int64_t h = 0; h < lanes; h += kWidth<T>) {
        V here[rows][d], sum[rows][components];
        for (int b = 0; b < rows; ++b) {
            for (int c = 0; c < d; ++c) here[b][c] = all<T>(points.u[c * points.stride + i + b]);
            for (int c = 0; c < components; ++c) sum[b][c] = V{};
        }
        const T* at = points.u + j + h;
        T* to = columns + h;
        for (int64_t g = 0; g < strips; ++g, at += lanes, to += lanes) {
            V there[d], column[components];
            for (int c = 0; c < d; ++c) there[c] = load<T>(at + c * points.stride);
            if constexpr (gradient)
                for (int c = 0; c < components; ++c) column[c] = load<T>(to + c * column_stride);
            for (int b = 0; b < rows; ++b) {
                V s = here[b][0] - there[0];
                s = s * s;
                for (int c = 1; c < d; ++c) {
                    const V t = here[b][c] - there[c];
                    s = multiply_add(t, t, s);
                }
                const V k = exp2_minus<T>(s);
                sum[b][last] = sum[b][last] + k;
                if constexpr (gradient) {
                    for (int c = 0; c < d; ++c) {
                        sum[b][c] = multiply_add(k, there[c], sum[b][c]);
                        column[c] = multiply_add(k, here[b][c], column[c]);
                    }
                    column[last] = column[last] + k;
                }
            }
            if constexpr (gradient)
                for (int c = 0; c < components; ++c) store<T>(to + c * column_stride, column[c]);
        }
        if constexpr (!gradient)
            for (int b = 0; b < rows; ++b) sum[b][0] = sum[b][0] + sum[b][0];  // for both points of a pair
        if (diagonal) {
            at = points.u + i / lanes * lanes + h;
            for (int b = 0; b < rows; ++b) {
                V s = V{};
                for (int c = 0; c < d; ++c) {
                    const V t = here[b][c] - load<T>(at + c * points.stride);
                    s = multiply_add(t, t, s);
                }
                const V k = exp2_minus<T>(s);
                sum[b][last] = sum[b][last] + k;
                if constexpr (gradient)
                    for (int c = 0; c < d; ++c) sum[b][c] = multiply_add(k, load<T>(at + c * points.stride), sum[b][c]);
            }
        }
        for (int b = 0; b < rows; ++b)
            for (int c = 0; c < components; ++c) store<T>(&lane[b][c][h], sum[b][c]);
    }
    add_rows<T, rows, components>(lane, sums.totals + i, points.stride);
}

// The same for any d: first k, kept for the block, then one coordinate after another.
template <class T, bool gradient>
void block_any(const Points<T>& points, int64_t i, int64_t j, int64_t strips, bool diagonal, Sums<T> sums, T* columns,
               int64_t column_stride) {
    using V = Vector<T>;
    constexpr int rows = kRowsAny;
    constexpr int64_t lanes = Type<T>::lanes;
    const int64_t d = points.d;
    const int64_t ones = gradient ? d : 0;
    const int64_t kept = (strips + 1) * lanes;  // the rows' own strip comes last
    const int64_t own = i / lanes * lanes;
    alignas(64) T lane[rows][1][lanes];
    for (int64_t h = 0; h < lanes; h += kWidth<T>) {
        V sum[rows];
        for (int b = 0; b < rows; ++b) sum[b] = V{};
        for (int64_t g = 0; g < strips + (diagonal ? 1 : 0); ++g) {
            const bool twice = g < strips;
            const T* at = points.u + (twice ? j + g * lanes : own) + h;
            V s[rows];
            for (int b = 0; b < rows; ++b) s[b] = V{};
            for (int64_t c = 0; c < d; ++c) {
                const V there = load<T>(at + c * points.stride);
                for (int b = 0; b < rows; ++b) {
                    const V t = all<T>(points.u[c * points.stride + i + b]) - there;
                    s[b] = multiply_add(t, t, s[b]);
                }
            }
            for (int b = 0; b < rows; ++b) {
                s[b] = exp2_minus<T>(s[b]);
                sum[b] = sum[b] + s[b];
                if constexpr (gradient) store<T>(sums.kernel + b * kept + g * lanes + h, s[b]);
                else if (twice) sum[b] = sum[b] + s[b];
            }
            if (gradient && twice) {
                T* to = columns + ones * column_stride + g * lanes + h;
                V column = load<T>(to);
                for (int b = 0; b < rows; ++b) column = column + s[b];
                store<T>(to, column);
            }
        }
        for (int b = 0; b < rows; ++b) store<T>(&lane[b][0][h], sum[b]);
    }
    add_rows<T, rows, 1>(lane, sums.totals + ones * points.stride + i, points.stride);
    if constexpr (!gradient) return;
    for (int64_t c = 0; c < d; ++c) {
        const T* u = points.u + c * points.stride;
        T* to = columns + c * column_stride;
        for (int64_t h = 0; h < lanes; h += kWidth<T>) {
            V here[rows], sum[rows];
            for (int b = 0; b < rows; ++b) here[b] = all<T>(u[i + b]), sum[b] = V{};
            for (int64_t g = 0; g < strips; ++g) {
                const V there = load<T>(u + j + g * lanes + h);
                V column = load<T>(to + g * lanes + h);
                for (int b = 0; b < rows; ++b) {
                    const V k = load<T>(sums.kernel + b * kept + g * lanes + h);
                    sum[b] = multiply_add(k, there, sum[b]);
                    column = multiply_add(k, here[b], column);
                }
                store<T>(to + g * lanes + h, column);
            }
            if (diagonal)
                for (int b = 0; b < rows; ++b)
                    sum[b] = multiply_add(load<T>(sums.kernel + b * kept + strips * lanes + h), load<T>(u + own + h), sum[b]);
            for (int b = 0; b < rows; ++b) store<T>(&lane[b][0][h], sum[b]);
        }
        add_rows<T, rows, 1>(lane, sums.totals + c * points.stride + i, points.stride);
    }
}

// One part: its strips against all columns to their right. Totals are set, not added to.
template <class T, int d, bool gradient>
void run_part(const Points<T>& points, int64_t part, int64_t parts, Sums<T> sums) {
    // As many rows as the registers hold sums and coordinates for. It moves no bit: a column takes its rows one by one.
    constexpr int rows = d == 0 ? kRowsAny : kBytes == 64 ? (d <= 3 ? 4 : 2) : d <= 2 ? 2 : 1;
    constexpr int64_t lanes = Type<T>::lanes;
    const int64_t components = gradient ? points.d + 1 : 1;
    const int64_t tile = tile_strips<T>(points.d);
    const int64_t column_stride = (tile + 1) * lanes;
    for (int64_t k = 0; k < components * points.stride; ++k) sums.totals[k] = 0;
    for (int64_t first = 0; first < points.strips; first += tile) {
        const int64_t end = first + tile < points.strips ? first + tile : points.strips;
        const int64_t width = (end - first) * lanes;
        const auto flush = [&] {
            for (int64_t c = 0; c < components; ++c) {
                double* total = sums.totals + c * points.stride + first * lanes;
                T* column = sums.columns + c * column_stride;
                for (int64_t l = 0; l < width; ++l) {
                    total[l] += static_cast<double>(column[l]);
                    column[l] = 0;
                }
            }
        };
        int64_t pending = 0;
        // Forth and back through the parts, so that each has as many long rows as short ones.
        for (int64_t turn = 0; turn * parts < end; ++turn) {
            const int64_t strip = turn * parts + (turn % 2 == 0 ? part : parts - 1 - part);
            if (strip >= end) continue;
            const bool diagonal = strip >= first;
            const int64_t begin = diagonal ? strip + 1 : first;
            T* columns = sums.columns + (begin - first) * lanes;
            for (int64_t i = strip * lanes; i < (strip + 1) * lanes; i += rows) {
                if constexpr (d == 0)
                    block_any<T, gradient>(points, i, begin * lanes, end - begin, diagonal, sums, columns, column_stride);
                else
                    block<T, d, gradient, rows>(points, i, begin * lanes, end - begin, diagonal, sums, columns,
                                                column_stride);
            }
            if (gradient && ++pending == kStripsInFloat) flush(), pending = 0;
        }
        if (pending > 0) flush();
    }
}

template <class T>
using Part = void (*)(const Points<T>&, int64_t, int64_t, Sums<T>);

template <class T, bool gradient>
Part<T> choose(int64_t d) {
    static_assert(kKnown == 8, "one entry a dimension");
    constexpr Part<T> known[] = {run_part<T, 0, gradient>, run_part<T, 1, gradient>, run_part<T, 2, gradient>,
                                 run_part<T, 3, gradient>, run_part<T, 4, gradient>, run_part<T, 5, gradient>,
                                 run_part<T, 6, gradient>, run_part<T, 7, gradient>, run_part<T, 8, gradient>};
    return known[d <= kKnown ? d : 0];
}

// y [n, d] -> u [d][stride].
template <class T>
void scale_points(const T* y, const Points<T>& points, double scale, T* u) {
    for (int64_t c = 0; c < points.d; ++c) {
        T* to = u + c * points.stride;
        for (int64_t i = 0; i < points.n; ++i) to[i] = static_cast<T>(static_cast<double>(y[i * points.d + c]) * scale);
        for (int64_t i = points.n; i < points.stride; ++i) to[i] = std::numeric_limits<T>::max() / 4;
    }
}

// totals of u -> sums of y [n, d + 1].
template <class T>
void write_sums(const double* totals, const Points<T>& points, double scale, int64_t begin, int64_t end, T* sums) {
    for (int64_t c = 0; c <= points.d; ++c) {
        const double back = c < points.d ? 1 / scale : 1;
        for (int64_t i = begin; i < end; ++i)
            sums[i * (points.d + 1) + c] = static_cast<T>(totals[c * points.stride + i] * back);
    }
}

double add_up(const double* x, int64_t count) {
    constexpr int64_t width = 8;
    double lane[width] = {};
    const int64_t whole = count / width * width;
    for (int64_t i = 0; i < whole; i += width)
        for (int64_t l = 0; l < width; ++l) lane[l] += x[i + l];
    for (int64_t i = whole; i < count; ++i) lane[i - whole] += x[i];
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

constexpr int64_t kWorthThreads = 32768;  // fewer pairs than this are done before a second thread has woken
constexpr int64_t kTogether = 512;        // points whose parts are added by one thread

int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }

template <class T>
int forward(const T* y, int64_t replicas, int64_t n, int64_t d, double beta, int gradient, int num_threads, double* pairs,
            T* sums) {
    constexpr int64_t lanes = Type<T>::lanes;
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));  // numbers in a cache line
    if (replicas < 0 || n < 1 || d < 1) return kBadSize;
    if (replicas == 0) return kOk;
    const double scale = beta * 0.84932180028801904272;  // sqrt(log2(e) / 2)
    const int64_t strips = (n + lanes - 1) / lanes;
    // Coordinates a multiple of 4096 bytes apart would share one set of the L1 cache.
    const int64_t stride = strips * lanes + (strips % 16 == 0 ? 16 : 0);
    const int64_t components = gradient ? d + 1 : 1;
    const int64_t parts = n < 512 ? 1 : n < 2048 ? 4 : 16;
    const int64_t tile = tile_strips<T>(d) + 1;
    const Part<T> run = gradient ? choose<T, true>(d) : choose<T, false>(d);

    const bool whole = parts == 1;  // replicas are shared out among the threads, else the parts of one after another
    const bool shared = replicas * (n * n / 2) >= kWorthThreads;
    const int64_t threads = shared && num_threads > 1 ? least(num_threads, whole ? replicas : parts) : 1;
    const int64_t size_u = d * stride;
    const int64_t size_columns = gradient ? components * tile * lanes : 0;
    const int64_t size_kernel = gradient && d > kKnown ? kRowsAny * tile * lanes : 0;
    const int64_t size_thread = size_columns + size_kernel + (whole ? size_u : 0);
    const int64_t size_totals = components * stride;
    const int64_t size = threads * size_thread + (whole ? 0 : size_u) + 4 * line;
    const int64_t many = (whole ? threads : parts) * size_totals;
    const std::unique_ptr<T[]> numbers(new (std::nothrow) T[static_cast<size_t>(size)]);
    const std::unique_ptr<double[]> totals(new (std::nothrow) double[static_cast<size_t>(many)]);
    if (!numbers || !totals) return kOutOfMemory;
    const int64_t misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(numbers.get()) / sizeof(T)) % line;
    T* const base = numbers.get() + (line - misplaced) % line;  // all sizes are multiples of a line or nearly so
    for (int64_t k = 0; k < threads * size_thread; ++k) base[k] = 0;
    const auto space = [&](int64_t slot) { return base + slot * size_thread; };

    if (whole) {
        std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
        for (int64_t slot = 0; slot < threads; ++slot) {
            T* const u = space(slot) + size_columns + size_kernel;
            double* const mine = totals.get() + slot * size_totals;
            const Points<T> points{u, n, d, strips, stride};
            for (int64_t r = next++; r < replicas; r = next++) {
                scale_points(y + r * n * d, points, scale, u);
                run(points, 0, 1, {mine, space(slot), space(slot) + size_columns});
                pairs[r] = add_up(mine + (components - 1) * stride, n);
                if (gradient) write_sums(mine, points, scale, 0, n, sums + r * n * (d + 1));
            }
        }
        return kOk;
    }
    T* const u = base + threads * size_thread;
    const Points<T> points{u, n, d, strips, stride};
    const int64_t pieces = (n + kTogether - 1) / kTogether;
    for (int64_t r = 0; r < replicas; ++r) {
        scale_points(y + r * n * d, points, scale, u);
        std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
        for (int64_t slot = 0; slot < threads; ++slot)
            for (int64_t p = next++; p < parts; p = next++)
                run(points, p, parts, {totals.get() + p * size_totals, space(slot), space(slot) + size_columns});
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t begin = piece * kTogether, end = least(n, begin + kTogether);
            for (int64_t c = 0; c < components; ++c) {
                double* to = totals.get() + c * stride;
                for (int64_t p = 1; p < parts; ++p)
                    for (int64_t i = begin; i < end; ++i) to[i] += to[p * size_totals + i];
            }
            if (gradient) write_sums(totals.get(), points, scale, begin, end, sums + r * n * (d + 1));
        }
        pairs[r] = add_up(totals.get() + (components - 1) * stride, n);
    }
    return kOk;
}

}  // namespace

int henze_zirkler_pairs_f32(const float* y, int64_t replicas, int64_t n, int64_t d, double beta, int gradient,
                            int num_threads, double* pairs, float* sums) {
    return forward(y, replicas, n, d, beta, gradient, num_threads, pairs, sums);
}

int henze_zirkler_pairs_f64(const double* y, int64_t replicas, int64_t n, int64_t d, double beta, int gradient,
                            int num_threads, double* pairs, double* sums) {
    return forward(y, replicas, n, d, beta, gradient, num_threads, pairs, sums);
}

}  // namespace LIBI_ISA
}  // namespace libi
