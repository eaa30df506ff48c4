// What this machine's cores can do at most, all threads at once: ./peak THREADS prints fused multiply-adds, 2^x, tanh
// and square roots a second, float32. Best of several runs. Vectors as long as the widest registers.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

// Reduction to |f| <= 1/2 by adding 1.5 * 2^23, five multiply-adds, then the exponent as an integer.
static inline Vector exp2_of(Vector x) {
    const float magic = 12582912.0f;
    Vector shifted = x + magic;
    Vector f = x - (shifted - magic);
    Vector p = f * 1.3390e-3f + 9.6177e-3f;
    p = p * f + 5.5503e-2f;
    p = p * f + 2.4022e-1f;
    p = p * f + 6.9315e-1f;
    p = p * f + 1.0f;
    return (Vector)((Integers)p + ((Integers)shifted << 23));
}

struct MultiplyAdd {
    static Vector step(Vector x, Vector a, Vector b) { return x * a + b; }
    static constexpr int chains = 12;  // all chains are enough to hide latency, few enough for the registers
};
struct Exp2 {
    static Vector step(Vector x, Vector, Vector b) { return exp2_of(x) * b; }  // the product counts for nothing
    static constexpr int chains = 16;
};
// Compilers make a comparison and a choice of `a < b ? a : b`, where one instruction does.
static inline Vector clamped(Vector x, float most) {
#if defined(__AVX512F__)
    const __m512 above = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-most), (__m512)x);
    return (Vector)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(most), above);
#elif defined(__AVX__)
    return (Vector)_mm256_min_ps(_mm256_set1_ps(most), _mm256_max_ps(_mm256_set1_ps(-most), (__m256)x));
#else
    for (int i = 0; i < kLanes; ++i) x[i] = std::min(most, std::max(-most, x[i]));
    return x;
#endif
}

// tanh in two ways, of which the faster counts: x P(x^2) / Q(x^2), both of degree 4, as the kernels have it, and
// 1 - 2 / (1 + 2^x), the factor of x folded into the reduction and no digits of small x kept.
struct Tanh {
    static Vector step(Vector x, Vector, Vector) {
        x = clamped(x, 8.0f);
        Vector z = x * x;
        Vector p = z * 1.523040893e-8f + 2.189465522e-5f, q = z * 8.522442840e-7f + 3.411291400e-4f;
        p = p * z + 3.571597626e-3f, q = q * z + 2.616444230e-2f;
        p = p * z + 1.344449818e-1f, q = q * z + 4.677782357e-1f;
        p = p * z + 1.0f, q = q * z + 1.0f;
        return x * p / q;
    }
    static constexpr int chains = 10;
};
struct TanhByExp2 {
    static Vector step(Vector x, Vector, Vector) { return 1.0f - 2.0f / (1.0f + exp2_of(clamped(x, 30.0f))); }
    static constexpr int chains = 12;
};
struct Root {
    static Vector step(Vector x, Vector, Vector) {
        for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
        return x;
    }
    static constexpr int chains = 4;
};

std::atomic<float> sink{0};

template <class Op>
void work(int64_t steps) {
    Vector x[Op::chains];
    for (int c = 0; c < Op::chains; ++c)
        for (int i = 0; i < kLanes; ++i) x[c][i] = 0.5f + 0.01f * float(i + c);
    Vector a = Vector{} + 0.999f, b = Vector{} + 0.001f;
    for (int64_t s = 0; s < steps; ++s)
        for (int c = 0; c < Op::chains; ++c) x[c] = Op::step(x[c], a, b);
    float total = 0;
    for (int c = 0; c < Op::chains; ++c)
        for (int i = 0; i < kLanes; ++i) total += x[c][i];
    sink = total;
}

template <class Op>
double rate(int threads, int64_t steps) {
    double best = 0;
    for (int attempt = 0; attempt < 7; ++attempt) {
        auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> pool;
        for (int t = 0; t < threads; ++t) pool.emplace_back(work<Op>, steps);
        for (auto& thread : pool) thread.join();
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        best = std::max(best, double(steps) * Op::chains * kLanes * threads / seconds);
    }
    return best;
}

int main(int argc, char** argv) {
    int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    std::printf("%.6e %.6e %.6e %.6e\n", rate<MultiplyAdd>(threads, 10000000), rate<Exp2>(threads, 4000000),
                std::max(rate<Tanh>(threads, 4000000), rate<TanhByExp2>(threads, 4000000)), rate<Root>(threads, 4000000));
}
