// Sums over points of cos(t.y) and sin(t.y), and the gradient's way back through them, with nothing of size n x frequencies.
//
// Frequencies come in turns, t / 2 pi: r = p - round(2 p) / 2 is then exact for a phase p = t.y / 2 pi, and with
// |r| <= 1/4,  cos(2 pi p) = +-C(r^2),  sin(2 pi p) = +-r S(r^2),  both with the sign of the half turns. C and S are
// minimax polynomials: absolute errors 2e-10 and 7e-9 before rounding in float, below 1e-17 in double. |p| must stay below
// Wave::most turns, where the rounding of 2 p ends; float's points meet longer phases in double (characteristic.cpp).
//
// In the sums a lane is a frequency, in the way back a row: no sum runs across lanes, so every width of register and every
// number of threads gives the same bits. 256 rows (frequencies) are summed in the type of y, then in double.
#pragma once
#include <cstdint>

#include "../elementary.hpp"
#include "../registers.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

template <class T>
struct Wave;
template <>
struct Wave<float> {
    typedef uint32_t Bits LIBI_REGISTER;
    static constexpr int64_t lanes = 16;  // frequencies and rows are filled up to whole ones, whatever the register
    static constexpr float round = 12582912.0f;  // 1.5 * 2^23
    static constexpr double most = 2097152;      // 2^21
    static constexpr int sign = 31;
    static constexpr float sine[] = {6.2831852801544065f, -41.341680613346515f, 81.602476368925180f, -76.581172644278724f,
                                     39.759827085319101f};
    static constexpr float cosine[] = {1.0f, -19.739208547715783f, 64.939346476210148f, -85.453564760995221f,
                                       60.143889560342147f, -24.981434467891655f};
};
template <>
struct Wave<double> {
    typedef uint64_t Bits LIBI_REGISTER;
    static constexpr int64_t lanes = 8;
    static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double most = 1125899906842624;     // 2^50
    static constexpr int sign = 63;
    static constexpr double sine[] = {6.2831853071795864756, -41.341702240399756862, 81.605249276073615183,
                                      -76.705859752824919209, 42.05869392542868225,  -15.094641676117900093,
                                      3.8199280942271642021,  -0.71773379214134533,  0.10089695501646811};
    static constexpr double cosine[] = {1.0, -19.739208802178717217, 64.939394022668280703, -85.456817206691517718,
                                        60.244641371646725096, -26.426256769631195169, 7.9035358711039378802,
                                        -1.7143794371382703398, 0.28185225938435092808, -0.035219604638146758};
};

constexpr int64_t kInType = 256;  // rows or frequencies whose terms are summed in the type of y
constexpr int kGroup = 8;         // phases at a time, so that their steps overlap

// cos and sin of `count` registers of phases in turns.
template <class T, int count>
LIBI_INLINE void take_waves(const Vector<T> (&phase)[count], Vector<T> (&cosine)[count], Vector<T> (&sine)[count]) {
    using V = Vector<T>;
    using Bits = typename Wave<T>::Bits;
    const V round = all<T>(Wave<T>::round);
    V r[count], z[count];
    Bits sign[count];
    for (int b = 0; b < count; ++b) {
        const V shifted = multiply_add(phase[b], all<T>(2), round);
        sign[b] = bit_cast<Bits>(shifted) << Wave<T>::sign;
        r[b] = multiply_add(shifted - round, all<T>(-0.5), phase[b]);
        z[b] = r[b] * r[b];
    }
    constexpr int sines = static_cast<int>(sizeof(Wave<T>::sine) / sizeof(T));
    constexpr int cosines = static_cast<int>(sizeof(Wave<T>::cosine) / sizeof(T));
    for (int b = 0; b < count; ++b) {
        sine[b] = all<T>(Wave<T>::sine[sines - 1]);
        cosine[b] = all<T>(Wave<T>::cosine[cosines - 1]);
    }
    for (int k = cosines - 2; k >= 0; --k)
        for (int b = 0; b < count; ++b) {
            cosine[b] = multiply_add(cosine[b], z[b], all<T>(Wave<T>::cosine[k]));
            if (k < sines - 1) sine[b] = multiply_add(sine[b], z[b], all<T>(Wave<T>::sine[k]));
        }
    for (int b = 0; b < count; ++b) {
        cosine[b] = bit_cast<V>(bit_cast<Bits>(cosine[b]) ^ sign[b]);
        sine[b] = bit_cast<V>(bit_cast<Bits>(sine[b] * r[b]) ^ sign[b]);
    }
}

// y [d][stride] and turns [d][step]; the waves' sums over `rows` rows, for as many frequencies as a register holds.
template <class T, int count>
LIBI_INLINE void add_group(const T* y, int64_t stride, const T* turns, int64_t step, int64_t d, Vector<T>& cosines,
                           Vector<T>& sines) {
    using V = Vector<T>;
    V phase[count], cosine[count], sine[count];
    for (V& one : phase) one = V{};
    for (int64_t k = 0; k < d; ++k) {
        const V t = load<T>(turns + k * step);
        for (int b = 0; b < count; ++b) phase[b] = multiply_add(all<T>(y[k * stride + b]), t, phase[b]);
    }
    take_waves<T, count>(phase, cosine, sine);
    for (int half = count / 2; half > 0; half /= 2)
        for (int b = 0; b < half; ++b) {
            cosine[b] = cosine[b] + cosine[b + half];
            sine[b] = sine[b] + sine[b + half];
        }
    cosines = cosines + cosine[0];
    sines = sines + sine[0];
}

template <class T>
void add_waves(const T* y, int64_t stride, int64_t rows, const T* turns, int64_t step, int64_t d, double* to_cosines,
               double* to_sines) {
    using V = Vector<T>;
    for (int64_t first = 0; first < rows; first += kInType) {
        const int64_t end = first + kInType < rows ? first + kInType : rows;
        V cosines = V{}, sines = V{};
        int64_t i = first;
        for (; i + kGroup <= end; i += kGroup) add_group<T, kGroup>(y + i, stride, turns, step, d, cosines, sines);
        for (; i < end; ++i) add_group<T, 1>(y + i, stride, turns, step, d, cosines, sines);
        T lane[2][kWidth<T>];
        store<T>(lane[0], cosines);
        store<T>(lane[1], sines);
        for (int64_t l = 0; l < kWidth<T>; ++l) {
            to_cosines[l] += static_cast<double>(lane[0][l]);
            to_sines[l] += static_cast<double>(lane[1][l]);
        }
    }
}

// sum_f t_f (by_sine_f cos - by_cosine_f sin) for as many rows as a register holds, t in turns, added to
// slope [d][slope_stride]. `frequencies` is a multiple of kGroup; work holds what d registers do.
template <class T>
void pull_waves(const T* y, int64_t stride, const T* turns, int64_t step, int64_t d, int64_t frequencies,
                const T* by_cosine, const T* by_sine, T* work, double* slope, int64_t slope_stride) {
    using V = Vector<T>;
    for (int64_t first = 0; first < frequencies; first += kInType) {
        const int64_t end = first + kInType < frequencies ? first + kInType : frequencies;
        for (int64_t k = 0; k < d; ++k) store<T>(work + k * kWidth<T>, V{});
        for (int64_t f = first; f < end; f += kGroup) {
            V phase[kGroup], cosine[kGroup], sine[kGroup];
            for (V& one : phase) one = V{};
            for (int64_t k = 0; k < d; ++k) {
                const V here = load<T>(y + k * stride);
                for (int b = 0; b < kGroup; ++b) phase[b] = multiply_add(here, all<T>(turns[k * step + f + b]), phase[b]);
            }
            take_waves<T, kGroup>(phase, cosine, sine);
            V pull[kGroup];
            for (int b = 0; b < kGroup; ++b) {
                pull[b] = cosine[b] * all<T>(by_sine[f + b]);
                pull[b] = multiply_add(sine[b], all<T>(-by_cosine[f + b]), pull[b]);
            }
            for (int64_t k = 0; k < d; ++k) {
                const T* const t = turns + k * step + f;
                V even = load<T>(work + k * kWidth<T>), odd = pull[1] * all<T>(t[1]);
                for (int b = 0; b < kGroup; b += 2) even = multiply_add(pull[b], all<T>(t[b]), even);
                for (int b = 3; b < kGroup; b += 2) odd = multiply_add(pull[b], all<T>(t[b]), odd);
                store<T>(work + k * kWidth<T>, even + odd);
            }
        }
        for (int64_t k = 0; k < d; ++k) {
            const T* const lane = work + k * kWidth<T>;
            for (int64_t l = 0; l < kWidth<T>; ++l) slope[k * slope_stride + l] += static_cast<double>(lane[l]);
        }
    }
}

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
