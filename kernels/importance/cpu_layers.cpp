// The inner loops of a decoder's layers: cpu_layers.hpp has their layout.
#include "cpu_layers.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

template <class T, int m, int panels>
void product_block(const T* w, int64_t inputs, const T* h, int64_t h_stride, T* out, int64_t out_stride) {
    using V = Vector<T>;
    V sum[m][2 * panels];
#pragma GCC unroll 16
    for (int i = 0; i < m; ++i)
        for (int v = 0; v < 2 * panels; ++v) sum[i][v] = V{};
    for (int64_t k = 0; k < inputs; ++k) {
        V x[2 * panels];
#pragma GCC unroll 4
        for (int v = 0; v < 2 * panels; ++v)
            x[v] = load<T>(h + (v / 2) * h_stride + k * kPanel<T> + (v % 2) * kWidth<T>);
#pragma GCC unroll 16
        for (int i = 0; i < m; ++i) {
            const V c = all<T>(w[k * m + i]);
#pragma GCC unroll 4
            for (int v = 0; v < 2 * panels; ++v) sum[i][v] = multiply_add(c, x[v], sum[i][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < m; ++i)
        for (int v = 0; v < 2 * panels; ++v)
            store<T>(out + (v / 2) * out_stride + i * kPanel<T> + (v % 2) * kWidth<T>, sum[i][v]);
}

template <class T, int panels, int... m>
Product<T> block_of(int64_t units, std::integer_sequence<int, m...>) {
    constexpr Product<T> all[] = {product_block<T, m + 1, panels>...};
    return all[units - 1];
}

template <class T>
LIBI_INLINE Vector<T> sigmoid(Vector<T> a) {
    return all<T>(1) / (all<T>(1) + exp_of<T>(-a));
}

// A::run(a, slope) gives the value, and the slope with it.
struct Identity {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        slope = all<T>(1);
        return a;
    }
};

struct Relu {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        slope = a > Vector<T>{} ? all<T>(1) : Vector<T>{};
        return at_least(Vector<T>{}, a);
    }
};

struct Tanh {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        const Vector<T> h = tanh_of(a);
        slope = multiply_add(-h, h, all<T>(1));
        return h;
    }
};

struct Sigmoid {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        const Vector<T> h = sigmoid<T>(a);
        slope = h * (all<T>(1) - h);
        return h;
    }
};

struct Softplus {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        slope = sigmoid<T>(a);
        return at_least(Vector<T>{}, a) + log1p_of<T>(exp_of<T>(-absolute<T>(a)));
    }
};

struct Silu {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        const Vector<T> s = sigmoid<T>(a), h = a * s;
        slope = multiply_add(h, all<T>(1) - s, s);
        return h;
    }
};

struct Gelu {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        Vector<T> tail, bell;
        normal_tail(absolute<T>(a), tail, bell);
        const Vector<T> phi = a > Vector<T>{} ? all<T>(1) - tail : tail;
        slope = multiply_add(a * all<T>(static_cast<T>(0.39894228040143267794)), bell, phi);  // 1 / sqrt(2 pi)
        return a * phi;
    }
};

struct Cube {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        slope = a * a * all<T>(3);
        return a * a * a;
    }
};

struct LeakyRelu {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        slope = a > Vector<T>{} ? all<T>(1) : all<T>(static_cast<T>(0.01));
        return a * slope;
    }
};

struct Elu {
    template <class T>
    LIBI_INLINE Vector<T> run(Vector<T> a, Vector<T>& slope) {
        const Vector<T> low = expm1_within<T>(at_least(all<T>(Constants<T>::least), at_most(Vector<T>{}, a)));
        slope = a > Vector<T>{} ? all<T>(1) : low + all<T>(1);
        return a > Vector<T>{} ? a : low;
    }
};

template <class T, class A, bool slopes>
void activate(T* values, int64_t units, T* slope) {
    for (int64_t i = 0; i < units * kPanel<T>; i += kWidth<T>) {
        Vector<T> s;
        store<T>(values + i, A::template run<T>(load<T>(values + i), s));
        if constexpr (slopes) store<T>(slope + i, s);
    }
}

template <class T, bool slopes>
Activate<T> choose(int64_t which) {
    constexpr Activate<T> all[] = {
        activate<T, Identity, slopes>, activate<T, Relu, slopes>,      activate<T, Tanh, slopes>,
        activate<T, Sigmoid, slopes>,  activate<T, Softplus, slopes>,  activate<T, Silu, slopes>,
        activate<T, Gelu, slopes>,     activate<T, Cube, slopes>,      activate<T, LeakyRelu, slopes>,
        activate<T, Elu, slopes>};
    return all[which];
}

}  // namespace

template <class T>
Product<T> product_of(int64_t units, bool two_panels) {
    return two_panels ? block_of<T, 2>(units, std::make_integer_sequence<int, kThinBlock>{})
                      : block_of<T, 1>(units, std::make_integer_sequence<int, kBlock>{});
}

template <class T>
Activate<T> activation(int64_t which, bool slopes) {
    return slopes ? choose<T, true>(which) : choose<T, false>(which);
}

template Product<float> product_of<float>(int64_t, bool);
template Product<double> product_of<double>(int64_t, bool);
template Activate<float> activation<float>(int64_t, bool);
template Activate<double> activation<double>(int64_t, bool);

}  // namespace LIBI_ISA
}  // namespace libi
