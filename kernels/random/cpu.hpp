// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC11) and what is made of its words, as scalar code for lane loops.
//
//   words    key = (seed low, seed high), counter = (row, block, repetition, stream + 256 replica), ten rounds of
//            (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),  k += (W0, W1).
//            Draw i of a row is word i % 4 of block i / 4.
//   uniform  ((w >> 8) + 1/2) 2^-24; the one value that float32 rounds to 1 becomes the largest float below 1.
//   normal   Box-Muller on words (w0, w1) and (w2, w3): u = (w0 + 1/2) 2^-32, t = (w1 mod 2^30) 2^-30,
//            radius sqrt(-2 ln u), angle (quadrant + t) pi/2 with quadrant = w1 >> 30; cosine first, then sine.
//            In float32 the two words are rounded to nearest first: u = float(w0) 2^-32 + 2^-33.
#pragma once

#include <cmath>

#include "../elementary.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace libi {
namespace LIBI_ISA {

constexpr int kLanes = 16;             // Blocks made at a time: one AVX-512 vector of words.
constexpr int kTile = 4 * kLanes;      // Draws made at a time.

struct PhiloxKey {
    uint32_t low, high;
};

struct PhiloxWords {
    uint32_t w0, w1, w2, w3;
};

LIBI_INLINE PhiloxKey philox_key(uint64_t seed) {
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

LIBI_INLINE PhiloxWords philox(PhiloxKey key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key.low;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key.high;
        c3 = static_cast<uint32_t>(a);
        key.low += 0x9E3779B9u;
        key.high += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

LIBI_INLINE void uniform(uint32_t word, float& out) {
    // 24 bits and the half make 25: above 1/2 the sum rounds, and at the very top it would round to 1.
    const float u = (static_cast<float>(static_cast<int32_t>(word >> 8)) + 0.5f) * 5.9604644775390625e-8f;
    out = u < 1.0f ? u : 0.999999940395355224609375f;
}

LIBI_INLINE void uniform(uint32_t word, double& out) {
    out = (static_cast<double>(static_cast<int32_t>(word >> 8)) + 0.5) * 5.9604644775390625e-8;
}

template <class T>
LIBI_INLINE void normal_pair(uint32_t word0, uint32_t word1, T& first, T& second) {
    const T u = static_cast<T>(word0) * static_cast<T>(0x1p-32) + static_cast<T>(0x1p-33);
    const T t = static_cast<T>(static_cast<int32_t>(word1 & 0x3fffffffu)) * static_cast<T>(0x1p-30);
    const T radius = std::sqrt(static_cast<T>(-2) * log(u));
    T c, s;
    cos_sin_quarter(t, c, s);
    const bool odd = (word1 & 0x40000000u) != 0;  // quadrants 1 and 3 swap: (-s, c) and (s, -c)
    const T x = odd ? s : c;
    const T y = odd ? c : s;
    const uint32_t second_bit = word1 ^ (word1 << 1);  // the cosine is negative in quadrants 1 and 2,
    const T sign_x = (second_bit >> 31) != 0 ? static_cast<T>(-1) : static_cast<T>(1);
    const T sign_y = (word1 >> 31) != 0 ? static_cast<T>(-1) : static_cast<T>(1);  // the sine in 2 and 3
    first = radius * x * sign_x;
    second = radius * y * sign_y;
}

// The counters of kLanes blocks: they may lie in one row or in many.
struct Counters {
    alignas(64) uint32_t row[kLanes];
    alignas(64) uint32_t block[kLanes];
    alignas(64) uint32_t repetition[kLanes];
    alignas(64) uint32_t use[kLanes];  // stream + 256 replica
};

struct Words {
    alignas(64) uint32_t word[4][kLanes];
};

#if defined(__x86_64__) && defined(__GNUC__)
// The one place that needs intrinsics: compilers do not find the 32 x 32 -> 64 bit vector multiplication. A word sits
// in the low half of each 64-bit lane; what is in the high half is never read.
#if defined(__AVX512F__)
typedef unsigned long long Wide __attribute__((vector_size(64)));
// The mask is full; the unmasked name draws a false warning of uninitialised memory from GCC 12.
LIBI_INLINE Wide multiply(Wide a, Wide b) { return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
typedef unsigned long long Wide __attribute__((vector_size(32)));
LIBI_INLINE Wide multiply(Wide a, Wide b) { return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#else
typedef unsigned long long Wide __attribute__((vector_size(16)));
LIBI_INLINE Wide multiply(Wide a, Wide b) { return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#endif

LIBI_INLINE void philox_tile(PhiloxKey key, const Counters& at, Words& out) {
    constexpr int width = static_cast<int>(sizeof(Wide) / 8);
    for (int first = 0; first < kLanes; first += width) {
        Wide c0, c1, c2, c3;
        PhiloxKey k = key;
        for (int l = 0; l < width; ++l) {
            c0[l] = at.row[first + l];
            c1[l] = at.block[first + l];
            c2[l] = at.repetition[first + l];
            c3[l] = at.use[first + l];
        }
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const Wide a = multiply(c0, Wide{} + 0xD2511F53u);
            const Wide b = multiply(c2, Wide{} + 0xCD9E8D57u);
            c0 = (b >> 32) ^ c1 ^ (Wide{} + k.low);
            c1 = b;
            c2 = (a >> 32) ^ c3 ^ (Wide{} + k.high);
            c3 = a;
            k.low += 0x9E3779B9u;
            k.high += 0xBB67AE85u;
        }
        for (int l = 0; l < width; ++l) {
            out.word[0][first + l] = static_cast<uint32_t>(c0[l]);
            out.word[1][first + l] = static_cast<uint32_t>(c1[l]);
            out.word[2][first + l] = static_cast<uint32_t>(c2[l]);
            out.word[3][first + l] = static_cast<uint32_t>(c3[l]);
        }
    }
}
#else
LIBI_INLINE void philox_tile(PhiloxKey key, const Counters& at, Words& out) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        const PhiloxWords w = philox(key, at.row[lane], at.block[lane], at.repetition[lane], at.use[lane]);
        out.word[0][lane] = w.w0;
        out.word[1][lane] = w.w1;
        out.word[2][lane] = w.w2;
        out.word[3][lane] = w.w3;
    }
}
#endif

// out[i][lane]: draw i of each lane's block.
template <class T>
LIBI_INLINE void normal_lanes(PhiloxKey key, const Counters& at, T (*out)[kLanes]) {
    Words w;
    philox_tile(key, at, w);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        normal_pair(w.word[0][lane], w.word[1][lane], out[0][lane], out[1][lane]);
        normal_pair(w.word[2][lane], w.word[3][lane], out[2][lane], out[3][lane]);
    }
}

template <class T>
LIBI_INLINE void uniform_lanes(PhiloxKey key, const Counters& at, T (*out)[kLanes]) {
    Words w;
    philox_tile(key, at, w);
    for (int i = 0; i < 4; ++i) {
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) uniform(w.word[i][lane], out[i][lane]);
    }
}

// out[4 lane + i], likewise.
template <class T>
LIBI_INLINE void normal_tile(PhiloxKey key, const Counters& at, T* out) {
    Words w;
    philox_tile(key, at, w);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        normal_pair(w.word[0][lane], w.word[1][lane], out[4 * lane], out[4 * lane + 1]);
        normal_pair(w.word[2][lane], w.word[3][lane], out[4 * lane + 2], out[4 * lane + 3]);
    }
}

template <class T>
LIBI_INLINE void uniform_tile(PhiloxKey key, const Counters& at, T* out) {
    Words w;
    philox_tile(key, at, w);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        uniform(w.word[0][lane], out[4 * lane]);
        uniform(w.word[1][lane], out[4 * lane + 1]);
        uniform(w.word[2][lane], out[4 * lane + 2]);
        uniform(w.word[3][lane], out[4 * lane + 3]);
    }
}

LIBI_INLINE void word_tile(PhiloxKey key, const Counters& at, int64_t* out) {
    Words w;
    philox_tile(key, at, w);
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i) out[4 * lane + i] = w.word[i][lane];
}

}  // namespace LIBI_ISA
}  // namespace libi
