// Elementary functions of whole registers, with fused multiply-adds where the processor has them: v3 and v4 agree to the
// bit, generic to rounding. (Those of elementary.hpp agree on all three, at about half the speed.)
//
//   exp(x)       x = n ln2 + r, |r| <= ln2 / 2:  2^n (1 + q),  q = expm1(r).  Error about 1 ulp; 0 below -87 (-708), held
//                at e^88 (e^709) above; NaN stays NaN.
//   expm1(x)     2^n q + (2^n - 1): as accurate where x is small.  For x >= -87 (-708).
//   tanh(x)      of expm1; relative error 1.5e-7 (3e-16).
//   log(x)       for finite normal x > 0, error about 1 ulp.
//   log1p(u)     for u in [0, 1]: 2 atanh(u / (2 + u)), accurate where u is small.
//   normal_tail  Phi(-a) and exp(-a^2 / 2) for a >= 0: float t P(t) exp(-a^2 / 2) with t = 1 / (1 + 0.27 a), P fitted at
//                Chebyshev's points to 3e-8; double by the C library, lane for lane.
#pragma once

#include <cmath>

#include "registers.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

template <class T>
struct Constants;
template <>
struct Constants<float> {
    using Word = uint32_t;
    typedef uint32_t Bits LIBI_REGISTER;
    typedef int32_t Ints LIBI_REGISTER;
    static constexpr int mantissa = 23;
    static constexpr float round = 12582912.0f + 127.0f;  // 1.5 * 2^23: n + bias comes to lie in the lowest bits
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float least = -87.0f, most = 88.0f, saturated = 9.02f;
    // expm1(r) = r + r^2 (c_0 + c_1 r + ...), minimax in the relative error: 1.4e-8
    static constexpr float series[] = {4.9999998122e-1f, 1.6666542187e-1f, 4.1667206065e-2f, 8.3667136505e-3f,
                                       1.3882485684e-3f};
    // atanh(s) = s + s z (1/3 + z/5 + ...), z = s^2 <= 1/9
    static constexpr int atanh_terms = 7;
};
template <>
struct Constants<double> {
    using Word = uint64_t;
    typedef uint64_t Bits LIBI_REGISTER;
    typedef int64_t Ints LIBI_REGISTER;
    static constexpr int mantissa = 52;
    static constexpr double round = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
    static constexpr double least = -708.0, most = 709.0, saturated = 19.1;
    static constexpr double series[] = {0.5,           1.0 / 6,       1.0 / 24,       1.0 / 120,
                                        1.0 / 720,     1.0 / 5040,    1.0 / 40320,    1.0 / 362880,
                                        1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    static constexpr int atanh_terms = 16;
};

// The smaller of limit and x, or the larger; NaN where x is. (The unmasked intrinsics warn falsely in GCC 12.)
#if defined(__AVX512F__)
LIBI_INLINE Floats at_most(Floats limit, Floats x) {
    return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)limit, (__m512)x);
}
LIBI_INLINE Floats at_least(Floats limit, Floats x) {
    return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)limit, (__m512)x);
}
LIBI_INLINE Doubles at_most(Doubles limit, Doubles x) {
    return (Doubles)_mm512_maskz_min_pd(0xff, (__m512d)limit, (__m512d)x);
}
LIBI_INLINE Doubles at_least(Doubles limit, Doubles x) {
    return (Doubles)_mm512_maskz_max_pd(0xff, (__m512d)limit, (__m512d)x);
}
#elif defined(__AVX2__)
LIBI_INLINE Floats at_most(Floats limit, Floats x) { return (Floats)_mm256_min_ps((__m256)limit, (__m256)x); }
LIBI_INLINE Floats at_least(Floats limit, Floats x) { return (Floats)_mm256_max_ps((__m256)limit, (__m256)x); }
LIBI_INLINE Doubles at_most(Doubles limit, Doubles x) { return (Doubles)_mm256_min_pd((__m256d)limit, (__m256d)x); }
LIBI_INLINE Doubles at_least(Doubles limit, Doubles x) { return (Doubles)_mm256_max_pd((__m256d)limit, (__m256d)x); }
#else
template <class V>
LIBI_INLINE V at_most(V limit, V x) {
    return limit < x ? limit : x;
}
template <class V>
LIBI_INLINE V at_least(V limit, V x) {
    return limit > x ? limit : x;
}
#endif

// e^x = scale (1 + q), x in [least, most].
template <class T>
LIBI_INLINE void split_exp(Vector<T> x, Vector<T>& scale, Vector<T>& q) {
    using V = Vector<T>;
    using C = Constants<T>;
    const V shifted = multiply_add(x, all<T>(static_cast<T>(1.44269504088896340736)), all<T>(C::round));
    const V n = shifted - all<T>(C::round);
    const V r = multiply_add(n, all<T>(-C::ln2_low), multiply_add(n, all<T>(-C::ln2_high), x));
    constexpr int terms = static_cast<int>(sizeof(C::series) / sizeof(T));
    V p = all<T>(C::series[terms - 1]);
    for (int k = terms - 2; k >= 0; --k) p = multiply_add(p, r, all<T>(C::series[k]));
    q = multiply_add(p, r * r, r);
    scale = bit_cast<V>(bit_cast<typename C::Bits>(shifted) << C::mantissa);
}

template <class T>
LIBI_INLINE Vector<T> exp_of(Vector<T> x) {
    using V = Vector<T>;
    V scale, q;
    split_exp<T>(at_most(all<T>(Constants<T>::most), at_least(all<T>(Constants<T>::least), x)), scale, q);
    return x < all<T>(Constants<T>::least) ? V{} : multiply_add(scale, q, scale);
}

// For x in [least, most] or NaN.
template <class T>
LIBI_INLINE Vector<T> expm1_within(Vector<T> x) {
    Vector<T> scale, q;
    split_exp<T>(x, scale, q);
    return multiply_add(scale, q, scale - all<T>(1));
}

// tanh(x) = e / (e + 2), e = expm1(2 x) = 2^n (1 + q) - 1, q = expm1(2 r) and r = x - n ln2 / 2 by one step: its error grows
// with n, but tanh is flat by then. A division for each is faster than one shared by several.
template <class T>
LIBI_INLINE Vector<T> tanh_of(Vector<T> x) {
    using V = Vector<T>;
    using C = Constants<T>;
    const V most = all<T>(C::saturated);
    x = at_most(most, at_least(-most, x));
    const V shifted = multiply_add(x, all<T>(static_cast<T>(2.88539008177792681472)), all<T>(C::round));
    const V n = shifted - all<T>(C::round);
    const V r = multiply_add(n, all<T>(static_cast<T>(-0.34657359027997265471)), x);
    constexpr int terms = static_cast<int>(sizeof(C::series) / sizeof(T));
    V p = all<T>(C::series[terms - 1] * static_cast<T>(int64_t{2} << terms));
    for (int k = terms - 2; k >= 0; --k) p = multiply_add(p, r, all<T>(C::series[k] * static_cast<T>(int64_t{4} << k)));
    const V q = multiply_add(p, r * r, r + r);
    const V scale = bit_cast<V>(bit_cast<typename C::Bits>(shifted) << C::mantissa);
    const V e = multiply_add(scale, q, scale - all<T>(1));
    return e / (e + all<T>(2));
}

template <class T>
LIBI_INLINE Vector<T> absolute(Vector<T> x) {
    using Bits = typename Constants<T>::Bits;
    return bit_cast<Vector<T>>(bit_cast<Bits>(x) << 1 >> 1);
}

// atanh(s) for |s| <= 1/3
template <class T>
LIBI_INLINE Vector<T> short_atanh(Vector<T> s) {
    constexpr int terms = Constants<T>::atanh_terms;
    const Vector<T> z = s * s;
    Vector<T> p = all<T>(static_cast<T>(1.0 / (2 * terms + 1)));
    for (int k = terms - 1; k >= 1; --k) p = multiply_add(p, z, all<T>(static_cast<T>(1.0 / (2 * k + 1))));
    return multiply_add(s * z, p, s);
}

template <class T>
LIBI_INLINE Vector<T> log1p_of(Vector<T> u) {
    const Vector<T> half = short_atanh<T>(u / (u + all<T>(2)));
    return half + half;
}

template <class T>
LIBI_INLINE Vector<T> log_of(Vector<T> x) {
    using V = Vector<T>;
    using C = Constants<T>;
    using Bits = typename C::Bits;
    // The bits of sqrt(1/2): m comes to lie in [sqrt 1/2, sqrt 2).
    constexpr uint64_t root = sizeof(T) == 4 ? 0x3f3504f3u : 0x3fe6a09e667f3bcdull;
    const Bits bits = bit_cast<Bits>(x);
    const Bits from = Bits{} + static_cast<typename C::Word>(root);
    const typename C::Ints k = bit_cast<typename C::Ints>(bits - from) >> C::mantissa;
#if defined(__GNUC__)
    const V e = __builtin_convertvector(k, V);
#else
    const V e = static_cast<V>(k);
#endif
    const V f = bit_cast<V>(bits - (bit_cast<Bits>(k) << C::mantissa)) - all<T>(1);
    const V half = short_atanh<T>(f / (f + all<T>(2)));
    return multiply_add(e, all<T>(C::ln2_high), multiply_add(e, all<T>(C::ln2_low), half + half));
}

LIBI_INLINE void normal_tail(Floats a, Floats& tail, Floats& bell) {
    constexpr float series[] = {0.1077220931f,   0.1075186033f,  0.101980367f,  0.07140606258f, 0.1092772064f,
                                -0.07121391691f, 0.1714446873f, -0.1272421198f, 0.02910702821f};
    bell = exp_of<float>(a * a * all<float>(-0.5f));
    const Floats t = all<float>(1) / multiply_add(a, all<float>(0.27f), all<float>(1));
    Floats p = all<float>(series[8]);
    for (int k = 7; k >= 0; --k) p = multiply_add(p, t, all<float>(series[k]));
    tail = t * p * bell;
}

LIBI_INLINE void normal_tail(Doubles a, Doubles& tail, Doubles& bell) {
    alignas(64) double x[kWidth<double>];
    store<double>(x, a);
    for (double& one : x) one = 0.5 * std::erfc(one * 0.70710678118654752440);
    tail = load<double>(x);
    bell = exp_of<double>(a * a * all<double>(-0.5));
}

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
