// Products of the quadrature's features in two and three dimensions: small matrix products over a chunk of rows.
//
// Rows' features lie [rows][width], widths whole multiples of 16 numbers. A lane is a column of the result and terms are
// added one by one in order, so the width of a register moves no bit.
#pragma once
#include <cstdint>

#include "../elementary.hpp"
#include "../registers.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int kDown = 4;                         // rows of a tile of the result
constexpr int kAcross = kBytes == 64 ? 4 : 2;  // registers of a tile's row

// A tile of sum_i a[i][x] b[i][y]: x from a on, y from b on; added to `to` in double.
template <class T, int across>
void add_tile(const T* a, int64_t a_width, const T* b, int64_t b_width, int64_t rows, double* to, int64_t to_width) {
    using V = Vector<T>;
    V sum[kDown][across];
    for (auto& some : sum)
        for (V& one : some) one = V{};
    for (int64_t i = 0; i < rows; ++i) {
        V right[across];
        for (int y = 0; y < across; ++y) right[y] = load<T>(b + i * b_width + y * kWidth<T>);
        for (int x = 0; x < kDown; ++x) {
            const V left = all<T>(a[i * a_width + x]);
            for (int y = 0; y < across; ++y) sum[x][y] = multiply_add(left, right[y], sum[x][y]);
        }
    }
    T lane[kWidth<T>];
    for (int x = 0; x < kDown; ++x)
        for (int y = 0; y < across; ++y) {
            store<T>(lane, sum[x][y]);
            for (int64_t l = 0; l < kWidth<T>; ++l) to[x * to_width + y * kWidth<T> + l] += static_cast<double>(lane[l]);
        }
}

// to [a_width][b_width] += a' b over `rows` rows.
template <class T>
void add_gram(const T* a, int64_t a_width, const T* b, int64_t b_width, int64_t rows, double* to) {
    for (int64_t x = 0; x < a_width; x += kDown)
        for (int64_t y = 0; y < b_width;) {
            const bool whole = y + kAcross * kWidth<T> <= b_width;
            const auto add = whole ? add_tile<T, kAcross> : add_tile<T, 1>;
            add(a + x, a_width, b + y, b_width, rows, to + x * b_width + y, b_width);
            y += whole ? kAcross * kWidth<T> : kWidth<T>;
        }
}

// A tile of a s for kDown rows, set or, with `more`, added to `to`.
template <class T, int across>
void map_tile(const T* a, int64_t a_width, const T* s, int64_t s_width, bool more, T* to) {
    using V = Vector<T>;
    V sum[kDown][across];
    for (int x = 0; x < kDown; ++x)
        for (int y = 0; y < across; ++y) sum[x][y] = V{};
    for (int64_t k = 0; k < a_width; ++k) {
        V right[across];
        for (int y = 0; y < across; ++y) right[y] = load<T>(s + k * s_width + y * kWidth<T>);
        for (int x = 0; x < kDown; ++x) {
            const V left = all<T>(a[x * a_width + k]);
            for (int y = 0; y < across; ++y) sum[x][y] = multiply_add(left, right[y], sum[x][y]);
        }
    }
    for (int x = 0; x < kDown; ++x)
        for (int y = 0; y < across; ++y) {
            T* const at = to + x * s_width + y * kWidth<T>;
            store<T>(at, more ? load<T>(at) + sum[x][y] : sum[x][y]);
        }
}

// to [rows][s_width] = (or +=) a [rows][a_width] s [a_width][s_width]; rows are filled up to a multiple of kDown.
template <class T>
void map_rows(const T* a, int64_t a_width, const T* s, int64_t s_width, int64_t rows, bool more, T* to) {
    for (int64_t y = 0; y < s_width;) {
        const bool whole = y + kAcross * kWidth<T> <= s_width;
        const auto map = whole ? map_tile<T, kAcross> : map_tile<T, 1>;
        for (int64_t i = 0; i < rows; i += kDown) map(a + i * a_width, a_width, s + y, s_width, more, to + i * s_width + y);
        y += whole ? kAcross * kWidth<T> : kWidth<T>;
    }
}

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
