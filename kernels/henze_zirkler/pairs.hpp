// sum_ij k_ij and, if asked, sum_j k_ij [y_j, 1] for every i, with k_ij = exp(-b^2/2 |y_i - y_j|^2).
//
// k is symmetric, so an exponential is taken once for a pair and given to both of its points. Points are scaled first,
// u = y b sqrt(log2(e) / 2), and then k_ij = 2^-|u_i - u_j|^2: from differences, which lose nothing where points lie
// close, unlike |u_i|^2 + |u_j|^2 - 2 u_i.u_j.
//
// Points stand in strips of 16 (8 in double). A strip takes the square on the diagonal whole, and once all that lies to
// the right of it. Coordinates lie apart, [d][n]. A block of rows runs along a tile of columns, first for k, which
// stays in the L1 cache, then for two coordinates at a time: the rows' sums in registers, the columns' in the cache.
// (All in one run is no faster at d = 2, and slower from d = 4 on, where registers no longer hold it.) Sums are of the
// points' type within a tile, and double beyond it.
//
// Strips are dealt out to 1, 4 or 16 parts, by n alone; each part has sums of its own, and these are added in order. So
// the number of threads moves no bit. Nor does the width of a register, since a lane has the same sums in every build.
// Where the processor has a fused multiply-add it is used: v3 and v4 agree to the bit, generic to rounding.
#pragma once
#include <cstdint>

#include "../elementary.hpp"
#include "../functions.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

// Lanes in a strip, whatever the register. 2^-q = 1 + q (c_1 + q (c_2 + ...)) for |q| <= 1/2, minimax in the relative
// error: 9e-8 and 2e-17. round + n has n + bias in its lowest bits, and 2^-bias is taken for 0.
template <class T>
struct Type;
template <>
struct Type<float> {
    typedef uint32_t Bits LIBI_REGISTER;
    static constexpr int64_t lanes = 16;
    static constexpr float round = 12582912.0f + 127.0f, least = 127.0f;  // 1.5 * 2^23
    static constexpr int mantissa = 23;
    static constexpr float series[] = {-0.6931470036506653f, 0.24022242426872253f, -0.05550733581185341f,
                                       0.009671512991189957f, -0.0013264729641377926f};
};
template <>
struct Type<double> {
    typedef uint64_t Bits LIBI_REGISTER;
    static constexpr int64_t lanes = 8;
    static constexpr double round = 6755399441055744.0 + 1023.0, least = 1023.0;  // 1.5 * 2^52
    static constexpr int mantissa = 52;
    static constexpr double series[] = {-0.693147180559945697,    0.24022650695910098,     -0.0555041086647903946,
                                        0.00961812910760700238,   -0.00133335581534399647, 0.000154035304415721303,
                                        -0.0000152527273851938682, 1.32154426753298221e-6, -1.01806476592341389e-7,
                                        7.07257041281442351e-9,   -4.07807192958833667e-10};
};

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

// What a part works in: totals [d + 1][stride], sum k first; a tile's columns [d + 1][tile + 1], likewise; k of a block
// [rows][tile + 1]. A tile is counted in strips.
template <class T>
struct Sums {
    double* totals;
    T* columns;
    T* kernel;
};

constexpr int kRows = kBytes == 64 ? 8 : 4;  // of a block, as registers allow: a column takes rows one by one
constexpr int64_t kTileBytes = 20480;        // coordinates and sums of a tile's columns, in the L1 cache
constexpr int64_t kStripsInFloat = 16;       // a column has so many strips summed before they go into a double

template <class T>
int64_t tile_strips(int64_t d) {
    const int64_t strips = kTileBytes / (Type<T>::lanes * static_cast<int64_t>(sizeof(T)) * (2 * d + 1));
    return strips < 16 ? 16 : strips;
}

// Adds each row's lanes in a fixed tree, and the sum to its total.
template <class T, size_t lanes>
LIBI_INLINE void add_rows(T (&lane)[kRows][lanes], double* totals) {
    for (size_t half = lanes / 2; half > 0; half /= 2)
        for (auto& row : lane)
            for (size_t l = 0; l < half; ++l) row[l] += row[l + half];
    for (int b = 0; b < kRows; ++b) totals[b] += static_cast<double>(lane[b][0]);
}

// What a block of rows meets: `strips` strips of columns from j on and, with `diagonal`, the strip of its own.
struct Meeting {
    int64_t i, j, strips;
    bool diagonal;
};

// k of a block, kept for the gradient [rows][strips + 1], the own strip last; and its sums.
template <class T, bool gradient>
void add_kernel(const Points<T>& points, Meeting meeting, T* kernel, int64_t kernel_stride, T* columns,
                double* totals) {
    using V = Vector<T>;
    constexpr int64_t lanes = Type<T>::lanes;
    const int64_t own = meeting.i / lanes * lanes;
    alignas(64) T lane[kRows][lanes];
    for (int64_t h = 0; h < lanes; h += kWidth<T>) {
        V sum[kRows];
        for (V& one : sum) one = V{};
        for (int64_t g = 0; g < meeting.strips + (meeting.diagonal ? 1 : 0); ++g) {
            const bool twice = g < meeting.strips;  // for both points of a pair
            const T* at = points.u + (twice ? meeting.j + g * lanes : own) + h;
            V s[kRows];
            for (V& one : s) one = V{};
            for (int64_t c = 0; c < points.d; ++c) {
                const V there = load<T>(at + c * points.stride);
                for (int b = 0; b < kRows; ++b) {
                    const V t = all<T>(points.u[c * points.stride + meeting.i + b]) - there;
                    s[b] = multiply_add(t, t, s[b]);
                }
            }
            V column = V{};
            if (gradient && twice) column = load<T>(columns + g * lanes + h);
            for (int b = 0; b < kRows; ++b) {
                const V k = exp2_minus<T>(s[b]);
                sum[b] = sum[b] + k;
                column = column + k;
                if constexpr (gradient) store<T>(kernel + b * kernel_stride + g * lanes + h, k);
                else if (twice) sum[b] = sum[b] + k;
            }
            if (gradient && twice) store<T>(columns + g * lanes + h, column);
        }
        for (int b = 0; b < kRows; ++b) store<T>(&lane[b][h], sum[b]);
    }
    add_rows(lane, totals + meeting.i);
}

// sum_j k_ij y_j to the rows, and sum_i k_ij y_i to the columns, for `count` coordinates from u on.
template <class T, int count>
void add_coordinates(const T* u, int64_t stride, Meeting meeting, const T* kernel, int64_t kernel_stride, T* columns,
                     int64_t column_stride, double* totals) {
    using V = Vector<T>;
    constexpr int64_t lanes = Type<T>::lanes;
    const int64_t own = meeting.i / lanes * lanes;
    alignas(64) T lane[count][kRows][lanes];
    for (int64_t h = 0; h < lanes; h += kWidth<T>) {
        V here[count][kRows], sum[count][kRows];
        for (int c = 0; c < count; ++c)
            for (int b = 0; b < kRows; ++b) here[c][b] = all<T>(u[c * stride + meeting.i + b]), sum[c][b] = V{};
        for (int64_t g = h; g < meeting.strips * lanes; g += lanes) {
            V there[count], column[count];
            for (int c = 0; c < count; ++c) {
                there[c] = load<T>(u + c * stride + meeting.j + g);
                column[c] = load<T>(columns + c * column_stride + g);
            }
            for (int b = 0; b < kRows; ++b) {
                const V k = load<T>(kernel + b * kernel_stride + g);
                for (int c = 0; c < count; ++c) {
                    sum[c][b] = multiply_add(k, there[c], sum[c][b]);
                    column[c] = multiply_add(k, here[c][b], column[c]);
                }
            }
            for (int c = 0; c < count; ++c) store<T>(columns + c * column_stride + g, column[c]);
        }
        for (int c = 0; c < count; ++c)
            for (int b = 0; b < kRows; ++b) {
                if (meeting.diagonal) {
                    const V k = load<T>(kernel + b * kernel_stride + meeting.strips * lanes + h);
                    sum[c][b] = multiply_add(k, load<T>(u + c * stride + own + h), sum[c][b]);
                }
                store<T>(&lane[c][b][h], sum[c][b]);
            }
    }
    for (int c = 0; c < count; ++c) add_rows(lane[c], totals + c * stride + meeting.i);
}

template <class T>
void add_coordinates(const Points<T>& points, Meeting meeting, Sums<T> sums, T* columns, int64_t column_stride) {
    for (int64_t c = 0; c < points.d; c += 2) {
        const auto add = c + 1 < points.d ? add_coordinates<T, 2> : add_coordinates<T, 1>;
        add(points.u + c * points.stride, points.stride, meeting, sums.kernel, column_stride,
            columns + (c + 1) * column_stride, column_stride, sums.totals + (c + 1) * points.stride);
    }
}

// One part: its strips against all columns to their right. Totals are set, not added to.
template <class T, bool gradient>
void run_part(const Points<T>& points, int64_t part, int64_t parts, Sums<T> sums) {
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
            for (int64_t i = strip * lanes; i < (strip + 1) * lanes; i += kRows) {
                const Meeting meeting{i, begin * lanes, end - begin, diagonal};
                add_kernel<T, gradient>(points, meeting, sums.kernel, column_stride, columns, sums.totals);
                if constexpr (gradient) add_coordinates(points, meeting, sums, columns, column_stride);
            }
            if (gradient && ++pending == kStripsInFloat) flush(), pending = 0;
        }
        if (pending > 0) flush();
    }
}

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
