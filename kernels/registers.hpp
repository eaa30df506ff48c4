// Registers of numbers, as wide as this instruction set has them, and what the kernels do with a whole one.
#pragma once
#include <cstdint>
#include <cstring>

#include "elementary.hpp"

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

template <class T>
struct RegisterOf;
template <>
struct RegisterOf<float> {
    using Type = Floats;
};
template <>
struct RegisterOf<double> {
    using Type = Doubles;
};

template <class T>
using Vector = typename RegisterOf<T>::Type;

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

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
