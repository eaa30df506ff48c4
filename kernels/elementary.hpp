// Elementary functions for lane loops: plain scalar code that compilers turn into vectors of any width.
//
// Every function is branch-free, uses only +, -, *, /, comparisons and integer operations, and is compiled with
// -ffp-contract=off. IEEE 754 fixes the result of each of those, so all instruction sets give the same bits.
//
//   exp(x)   x = n ln2 + r, |r| <= ln2 / 2:  2^n p(r).  Error about 1 ulp. Below about -87 (-708 for double) it is 0,
//            above 2^127 (2^1023) it is infinite; NaN stays NaN.
//   log(x)   x = 2^k m, m in [sqrt 1/2, sqrt 2):  k ln2 + log m.  Error about 1 ulp. For finite normal x > 0 only.
//   cos_sin_quarter(t)   cos and sin of t pi/2 for t in [0, 1]. For t > 1/2 they swap at 1 - t, which is exact, so that
//            both keep their relative accuracy where they vanish.
//
// float: Cephes' minimax polynomials. double: Taylor and atanh series, cut below 1e-17.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(_MSC_VER)
#define LIBI_INLINE static __forceinline
#else
#define LIBI_INLINE static inline __attribute__((always_inline))
#endif

// One namespace for each instruction set, so that no linker can merge their functions.
#ifndef LIBI_ISA
#define LIBI_ISA generic
#endif

namespace libi {
namespace LIBI_ISA {

template <class To, class From>
LIBI_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

LIBI_INLINE float exp(float x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const float shifted = x * 1.44269504088896341f + round;
    const float n = shifted - round;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * (r * r) + r) + 1.0f;
    const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
    const float y = p * scale;
    const float low = x < -87.3f ? 0.0f : y;
    return x > 88.0f ? std::numeric_limits<float>::infinity() : low;
}

LIBI_INLINE double exp(double x) {
    const double round = 6755399441055744.0;  // 1.5 * 2^52
    const double shifted = x * 1.4426950408889634 + round;
    const double n = shifted - round;
    const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = (p * (r * r) + r) + 1.0;
    const double scale = bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023u) << 52);
    const double y = p * scale;
    const double low = x < -708.0 ? 0.0 : y;
    return x > 709.0 ? std::numeric_limits<double>::infinity() : low;
}

LIBI_INLINE float log(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const int32_t k = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;  // 0x3f3504f3: sqrt 1/2
    const float e = static_cast<float>(k);
    const float f = bit_cast<float>(bits - (static_cast<uint32_t>(k) << 23)) - 1.0f;
    const float ff = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float small = (p * f) * ff + e * -2.12194440e-4f;
    return (f + (small - 0.5f * ff)) + e * 0.693359375f;
}

LIBI_INLINE double log(double x) {
    const uint64_t bits = bit_cast<uint64_t>(x);
    // The exponent by unsigned shifts and a bias of 2048: no 64-bit arithmetic shift before AVX-512.
    const uint64_t biased = (bits - 0x3fe6a09e667f3bcdull + (2048ull << 52)) >> 52;
    const double e = static_cast<double>(static_cast<int32_t>(biased) - 2048);
    const double f = bit_cast<double>(bits - ((biased - 2048ull) << 52)) - 1.0;
    const double s = f / (2.0 + f);  // log(1 + f) = 2 atanh(s)
    const double z = s * s;
    double p = 1.0 / 23.0;
    p = p * z + 1.0 / 21.0;
    p = p * z + 1.0 / 19.0;
    p = p * z + 1.0 / 17.0;
    p = p * z + 1.0 / 15.0;
    p = p * z + 1.0 / 13.0;
    p = p * z + 1.0 / 11.0;
    p = p * z + 1.0 / 9.0;
    p = p * z + 1.0 / 7.0;
    p = p * z + 1.0 / 5.0;
    p = p * z + 1.0 / 3.0;
    const double two_s = s + s;
    // f - s f is 2 s with one rounding fewer in the leading term.
    const double small = two_s * (p * z) + e * 1.90821492927058770002e-10;
    return (f - (s * f - small)) + e * 6.93147180369123816490e-01;
}

LIBI_INLINE void cos_sin_quarter(float t, float& cosine, float& sine) {
    const bool upper = t > 0.5f;
    const float y = (upper ? 1.0f - t : t) * 1.57079632679489662f;
    const float z = y * y;
    const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * y + y;
    const float p = (2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
    const float c = p * (z * z) - 0.5f * z + 1.0f;
    cosine = upper ? s : c;
    sine = upper ? c : s;
}

LIBI_INLINE void cos_sin_quarter(double t, double& cosine, double& sine) {
    const bool upper = t > 0.5;
    const double y = (upper ? 1.0 - t : t) * 1.57079632679489662;
    const double z = y * y;
    double s = 1.0 / 355687428096000.0;
    s = s * z - 1.0 / 1307674368000.0;
    s = s * z + 1.0 / 6227020800.0;
    s = s * z - 1.0 / 39916800.0;
    s = s * z + 1.0 / 362880.0;
    s = s * z - 1.0 / 5040.0;
    s = s * z + 1.0 / 120.0;
    s = s * z - 1.0 / 6.0;
    s = s * z * y + y;
    double c = 1.0 / 20922789888000.0;
    c = c * z - 1.0 / 87178291200.0;
    c = c * z + 1.0 / 479001600.0;
    c = c * z - 1.0 / 3628800.0;
    c = c * z + 1.0 / 40320.0;
    c = c * z - 1.0 / 720.0;
    c = c * z + 1.0 / 24.0;
    c = c * (z * z) - 0.5 * z + 1.0;
    cosine = upper ? s : c;
    sine = upper ? c : s;
}

}  // namespace LIBI_ISA
}  // namespace libi
