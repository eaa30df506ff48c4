// Epochs of training of many small models: the objectives of reference.py, over networks.hpp.
//
// A replica's epochs follow one another in one thread, so that its parameters stay in that core's cache and no thread waits for
// another; its numbers do not depend on what trains beside it, nor on the number of threads.
#include <algorithm>

#include "../random/cpu.hpp"
#include "../sizes.hpp"
#include "networks.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr double kClip = 10, kUsual = 0.02, kLinearFrom = 8, kLog2Pi = 1.83787706640934548356;
constexpr int64_t kTerms = 4;
enum Objective : int64_t { kReconstruction, kJoint, kElbo };

struct SafeExp {
    explicit SafeExp(double u)
        : slope(std::exp(u < kLinearFrom ? u : kLinearFrom)), value(u < kLinearFrom ? slope : slope * (1 + u - kLinearFrom)) {
        if (u != u) slope = value = u;
    }
    double slope, value;
};

// The C functions of random numbers and of the statistic, by type.
inline int normals(const Training& call, int64_t r, int64_t epoch, float* out) {
    return philox_normal_f32(call.seed, call.replica_ids + r, 1, 0, call.rows, 0, call.samples * call.latents,
                             call.repetition + epoch, call.stream, 1, out);
}
inline int normals(const Training& call, int64_t r, int64_t epoch, double* out) {
    return philox_normal_f64(call.seed, call.replica_ids + r, 1, 0, call.rows, 0, call.samples * call.latents,
                             call.repetition + epoch, call.stream, 1, out);
}
inline int statistic(const float* z, int64_t n, int64_t d, double beta, int threads, float* value, float* slope) {
    return henze_zirkler_f32(z, 1, n, d, beta, 1, threads, value, slope);
}
inline int statistic(const double* z, int64_t n, int64_t d, double beta, int threads, double* value, double* slope) {
    return henze_zirkler_f64(z, 1, n, d, beta, 1, threads, value, slope);
}

template <class T>
class Trainer {
public:
    Trainer(const Training& call, int threads)
        : call_(call), threads_(threads), encoder_(call.encoder, call.rows), decoder_(call.decoder, call.rows) {
        lay_out();
        if (!store_.make() || !doubles_.make()) return;
        lay_out();
        encoder_.begin();
        decoder_.begin();
        made_ = true;
    }
    explicit operator bool() const { return made_; }

    int train(int64_t r) {
        take_rows(r);
        int error = kOk;
        for (int64_t epoch = 0; epoch < call_.epochs && error == kOk; ++epoch) {
            decoder_.take_up(r);
            if (call_.encoder.trained || epoch == 0) {
                encoder_.take_up(r);
                encoder_.forward(x_, call_.encoder.trained);
            }
            double* const terms = terms_;
            std::fill(terms, terms + kTerms, 0.0);
            error = call_.objective == kElbo ? bound(r, epoch, terms) : joint(r, terms);
            step(r, epoch);
            T* const told = static_cast<T*>(call_.terms) + (epoch * call_.replicas + r) * kTerms;
            for (int64_t k = 0; k < kTerms; ++k) told[k] = static_cast<T>(terms[k]);
        }
        return error;
    }

private:
    void lay_out() {
        const int64_t numbers = encoder_.panels * kPanel<T>, columns = call_.columns, latents = call_.latents;
        encoder_.lay_out(store_, doubles_);
        decoder_.lay_out(store_, doubles_);
        x_ = {store_.take((columns + 1) * numbers), (columns + 1) * kPanel<T>};
        z_ = {store_.take((latents + 1) * numbers), (latents + 1) * kPanel<T>};
        noise_ = store_.take(call_.objective == kElbo && !call_.closed ? call_.rows * call_.samples * latents : 0);
        to_mean_ = store_.take(latents * numbers), to_log_std_ = store_.take(latents * numbers);
        rows_ = store_.take(call_.rows * latents), slope_ = store_.take(call_.rows * latents);
        precision_ = store_.take(columns);
        moments_ = doubles_.take(latents * (latents + 1));
        spread_ = doubles_.take(latents);
        terms_ = doubles_.take(kTerms);
    }

    static T& at(Panels<T> of, int64_t unit, int64_t n) {
        return of.at[n / kPanel<T> * of.stride + unit * kPanel<T> + n % kPanel<T>];
    }

    // Runs over units and registers of rows: f(unit, first row).
    template <class F>
    void over(int64_t units, F f) const {
        for (int64_t p = 0; p < encoder_.panels; ++p)
            for (int64_t u = 0; u < units; ++u)
                for (int64_t s = 0; s < kPanel<T>; s += kWidth<T>) f(u, p * kPanel<T> + s);
    }

    void take_rows(int64_t r) {
        const T* const x = static_cast<const T*>(call_.x) + call_.set[r] * call_.rows * call_.columns;
        for (int64_t n = 0; n < encoder_.panels * kPanel<T>; ++n) {
            // Past the last row stand copies of it: their gradients are 0, which times a number out of range would be none.
            const T* const row = x + std::min(n, call_.rows - 1) * call_.columns;
            for (int64_t d = 0; d < call_.columns; ++d) at(x_, d, n) = row[d];
            at(x_, call_.columns, n) = 1;
            at(z_, call_.latents, n) = 1;
        }
        constant_ = 0;
        for (int64_t d = 0; call_.variances != 0 && d < call_.columns; ++d) {
            const double variance = static_cast<double>(static_cast<const T*>(call_.variance)[call_.variances == 1 ? 0 : d]);
            precision_[d] = static_cast<T>(1 / variance);
            constant_ -= 0.5 * (std::log(variance) + kLog2Pi);
        }
    }

    // The sum over rows of -log p(x | output), and `share` times its gradient in the decoder's delta (0 past the last row).
    double score(double share) {
        using V = Vector<T>;
        const V by = all<T>(static_cast<T>(share));
        const Panels<T> out = decoder_.values(), delta = decoder_.delta;
        double sum = -constant_ * static_cast<double>(call_.rows);
        for (int64_t d = 0; d < call_.columns; ++d)
            sum += sum_of([&](int64_t row) {
                const V o = load<T>(&at(out, d, row)), x = load<T>(&at(x_, d, row));
                if (call_.variances != 0) {
                    const V off = o - x, slope = off * all<T>(precision_[d]);
                    store<T>(&at(delta, d, row), slope * by);
                    return off * slope * all<T>(static_cast<T>(0.5));
                }
                const V e = exp_of<T>(-absolute<T>(o));
                store<T>(&at(delta, d, row), ((o > V{} ? all<T>(1) : e) / (all<T>(1) + e) - x) * by);
                return at_least(V{}, o) + log1p_of<T>(e) - x * o;
            });
        end_rows(delta, call_.columns);
        return sum;
    }

    // -(1/N) sum log p(x | f(z)) of codes in z_; gradients in the decoder's maps, and in z where `codes`.
    double reconstruct(double share, bool fresh, bool codes) {
        decoder_.forward(z_, true);
        const double sum = score(share) * share;
        decoder_.backward(z_, call_.decoder.trained != 0, fresh, codes);
        return sum;
    }

    int joint(int64_t r, double* terms) {
        using V = Vector<T>;
        const int64_t n = call_.rows, latents = call_.latents;
        const double share = 1 / static_cast<double>(n);
        const bool penalties = call_.objective == kJoint;
        const Panels<T> codes = encoder_.values();
        over(latents, [&](int64_t l, int64_t row) { store<T>(&at(z_, l, row), load<T>(&at(codes, l, row))); });
        terms[0] = reconstruct(share, true, penalties);
        if (call_.decoder.trained) decoder_.end_sums();
        if (!penalties) return kOk;

        const double* const weights = call_.weights + 3 * r;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t l = 0; l < latents; ++l) rows_[i * latents + l] = at(codes, l, i);
        T value;
        const int error = statistic(rows_, n, latents, call_.hz_beta, threads_, &value, slope_);
        if (error != kOk) return error;
        const SafeExp normality(static_cast<double>(value));
        terms[1] = weights[0] * normality.value;

        double *const mean = moments_, *const excess = moments_ + latents;  // Cov - I
        double off_mean = 0, off_covariance = 0;
        for (int64_t l = 0; l < latents; ++l) {
            mean[l] = sum_of([&](int64_t row) { return load<T>(&at(codes, l, row)); }) * share;
            off_mean += mean[l] * mean[l];
            const V centre = all<T>(static_cast<T>(mean[l]));
            for_rows([&](int64_t row) { store<T>(&at(z_, l, row), load<T>(&at(codes, l, row)) - centre); });
        }
        for (int64_t k = 0; k < latents; ++k)
            for (int64_t l = 0; l <= k; ++l) {
                const double sum = sum_of([&](int64_t row) { return load<T>(&at(z_, k, row)) * load<T>(&at(z_, l, row)); });
                excess[k * latents + l] = excess[l * latents + k] = sum * share - (k == l ? 1 : 0);
            }
        for (int64_t k = 0; k < latents * latents; ++k) off_covariance += excess[k] * excess[k];
        const SafeExp spread(off_covariance / weights[1]), centre(off_mean / weights[2]);
        terms[2] = spread.value, terms[3] = centre.value;

        const double by_spread = 4 * share * spread.slope / weights[1], by_centre = 2 * share * centre.slope / weights[2];
        const V by_statistic = all<T>(static_cast<T>(weights[0] * normality.slope));
        const Panels<T> from = decoder_.delta, to = encoder_.delta;
        clear_delta();
        for (int64_t l = 0; l < latents; ++l) {
            for (int64_t i = 0; i < n; ++i) at(to, l, i) = slope_[i * latents + l];
            for_rows([&](int64_t row) {
                T* const here = &at(to, l, row);
                V g = load<T>(&at(from, l, row)) + all<T>(static_cast<T>(by_centre * mean[l]));
                for (int64_t k = 0; k < latents; ++k)
                    g = multiply_add(all<T>(static_cast<T>(by_spread * excess[l * latents + k])), load<T>(&at(z_, k, row)), g);
                store<T>(here, multiply_add(by_statistic, load<T>(here), g));
            });
        }
        end_rows(to, latents);
        encoder_.backward(x_, true, true, false);
        encoder_.end_sums();
        return kOk;
    }

    // f(first row) of every register of rows.
    template <class F>
    void for_rows(F f) const {
        for (int64_t row = 0; row < encoder_.panels * kPanel<T>; row += kWidth<T>) f(row);
    }

    // The sum over all rows of f(first row), taken in lanes: as many terms each as there are registers.
    template <class F>
    double sum_of(F f) const {
        const int64_t whole = call_.rows / kWidth<T> * kWidth<T>;
        alignas(64) T part[2][kWidth<T>];
        Vector<T> sum{};
        for (int64_t row = 0; row < whole; row += kWidth<T>) sum = sum + f(row);
        store<T>(part[0], sum);
        store<T>(part[1], whole < call_.rows ? f(whole) : Vector<T>{});
        double total = 0;
        for (int64_t l = 0; l < kWidth<T>; ++l) total += static_cast<double>(part[0][l]);
        for (int64_t l = 0; l < call_.rows - whole; ++l) total += static_cast<double>(part[1][l]);
        return total;
    }

    // Past the last row nothing comes back.
    void end_rows(Panels<T> delta, int64_t units) const {
        for (int64_t row = call_.rows; row < encoder_.panels * kPanel<T>; ++row)
            for (int64_t u = 0; u < units; ++u) at(delta, u, row) = 0;
    }

    void clear_delta() {
        over(encoder_.outputs(), [&](int64_t u, int64_t row) { store<T>(&at(encoder_.delta, u, row), Vector<T>{}); });
    }

    int bound(int64_t r, int64_t epoch, double* terms) {
        using V = Vector<T>;
        const int64_t n = call_.rows, latents = call_.latents;
        const double share = 1 / static_cast<double>(n), weight = call_.weights[3 * r] * call_.rises[epoch] * share;
        const Panels<T> q = encoder_.values();
        const auto place = [&](int64_t l, int64_t row) { return l * encoder_.panels * kPanel<T> + row; };
        over(latents, [&](int64_t l, int64_t row) {
            store<T>(to_mean_ + place(l, row), V{}), store<T>(to_log_std_ + place(l, row), V{});
        });
        if (call_.closed) {
            over(latents, [&](int64_t l, int64_t row) { store<T>(&at(z_, l, row), load<T>(&at(q, l, row))); });
            terms[0] = reconstruct(share, true, true);
            over(latents, [&](int64_t l, int64_t row) { store<T>(to_mean_ + place(l, row), load<T>(&at(decoder_.delta, l, row))); });
            if (call_.decoder.trained) decoder_.end_sums();
            terms[0] += spread_of_outputs(q, share);
        } else {
            const int error = normals(call_, r, epoch, noise_);
            if (error != kOk) return error;
            const double each = share / static_cast<double>(call_.samples);
            for (int64_t s = 0; s < call_.samples; ++s) {
                for (int64_t i = 0; i < encoder_.panels * kPanel<T>; ++i)
                    for (int64_t l = 0; l < latents; ++l)
                        at(z_, l, i) = noise_[(std::min(i, n - 1) * call_.samples + s) * latents + l];
                over(latents, [&](int64_t l, int64_t row) {
                    T* const z = &at(z_, l, row);
                    store<T>(z, multiply_add(exp_of<T>(load<T>(&at(q, latents + l, row))), load<T>(z), load<T>(&at(q, l, row))));
                });
                terms[0] += reconstruct(each, s == 0, true);
                over(latents, [&](int64_t l, int64_t row) {
                    const V back = load<T>(&at(decoder_.delta, l, row));
                    T *const to = to_mean_ + place(l, row), *const to_log = to_log_std_ + place(l, row);
                    store<T>(to, load<T>(to) + back);  // and z - mean = std eps
                    store<T>(to_log, multiply_add(back, load<T>(&at(z_, l, row)) - load<T>(&at(q, l, row)), load<T>(to_log)));
                });
            }
            if (call_.decoder.trained) decoder_.end_sums();
        }

        double kl = 0;
        clear_delta();
        const V by = all<T>(static_cast<T>(weight));
        for (int64_t l = 0; l < latents; ++l)
            kl += 0.5 * sum_of([&](int64_t row) {
                const V mean = load<T>(&at(q, l, row)), log_std = load<T>(&at(q, latents + l, row));
                const V square = exp_of<T>(log_std + log_std);
                store<T>(&at(encoder_.delta, l, row), multiply_add(by, mean, load<T>(to_mean_ + place(l, row))));
                store<T>(&at(encoder_.delta, latents + l, row),
                         multiply_add(by, square - all<T>(1), load<T>(to_log_std_ + place(l, row))));
                return multiply_add(mean, mean, square) - all<T>(1) - (log_std + log_std);
            });
        terms[1] = weight * kl;
        if (!call_.encoder.trained) return kOk;
        end_rows(encoder_.delta, 2 * latents);
        encoder_.backward(x_, true, true, false);
        encoder_.end_sums();
        return kOk;
    }

    // What q's spread takes from E log p(x | W z + b) in closed form, 1/2 sum_nl std_nl^2 sum_d W_dl^2 / variance_d, and its
    // gradients in the log standard deviations and in W.
    double spread_of_outputs(Panels<T> q, double share) {
        using V = Vector<T>;
        const int64_t latents = call_.latents;
        const T* const w = decoder_.map(0);
        T* const to = decoder_.map_gradient(0);
        double total = 0;
        for (int64_t l = 0; l < latents; ++l) {
            spread_[l] = 0;
            for (int64_t d = 0; d < call_.columns; ++d) {
                const double column = static_cast<double>(w[d * latents + l]);
                spread_[l] += column * column * static_cast<double>(precision_[d]);
            }
            const V by = all<T>(static_cast<T>(share * spread_[l]));
            double squares = sum_of([&](int64_t row) {
                const V log_std = load<T>(&at(q, latents + l, row)), square = exp_of<T>(log_std + log_std);
                store<T>(to_log_std_ + l * encoder_.panels * kPanel<T> + row, by * square);
                return square;
            });
            squares *= share;
            total += 0.5 * squares * spread_[l];
            for (int64_t d = 0; call_.decoder.trained && d < call_.columns; ++d)
                to[d * latents + l] +=
                    static_cast<T>(squares * static_cast<double>(w[d * latents + l]) * static_cast<double>(precision_[d]));
        }
        return total;
    }

    void step(int64_t r, int64_t epoch) {
        const int64_t taken = call_.steps + epoch;
        double norm = 0;
        if (call_.encoder.trained) norm += encoder_.end_gradient();
        if (call_.decoder.trained) norm += decoder_.end_gradient();
        norm = std::sqrt(norm);
        T& kept = static_cast<T*>(call_.usual)[r];
        const double usual = taken == 0 ? norm : static_cast<double>(kept);
        const double limit = usual > 0 ? kClip * usual : std::numeric_limits<double>::infinity();
        const double factor = norm > limit ? limit / norm : norm == norm ? 1 : norm;
        const double held = norm > limit ? limit : norm;
        kept = static_cast<T>(usual + std::max(kUsual, 1 / static_cast<double>(taken + 1)) * (held - usual));

        const double count = static_cast<double>(taken + 1);
        const double rate = call_.rates[epoch] / (1 - std::pow(kBeta1, count)), root = std::sqrt(1 - std::pow(kBeta2, count));
        if (call_.encoder.trained) encoder_.step(r, factor, rate, root, call_.epsilon);
        if (call_.decoder.trained) decoder_.step(r, factor, rate, root, call_.epsilon);
    }

    const Training& call_;
    const int threads_;
    Chain<T> encoder_, decoder_;
    Store<T> store_;
    Store<double> doubles_;
    Panels<T> x_, z_;  // with a row of ones below
    T *noise_, *to_mean_, *to_log_std_, *rows_, *slope_, *precision_;
    double *moments_, *spread_, *terms_;
    double constant_ = 0;
    bool made_ = false;
};

bool sensible(const Network& net, int64_t replicas, int64_t rows) {
    if (net.layers < 1) return false;
    for (int64_t i = 0; i < net.layers; ++i) {
        const int64_t in = net.widths[i], out = net.widths[i + 1];
        if (!fits(1, in, out) || in < 1 || out < 1) return false;
        if (net.activations[i] < 0 || net.activations[i] > kSigmoidCubeRoot) return false;
        if (net.diagonals[i] != nullptr && (in != out || net.biases[i] != nullptr)) return false;
        if (!fits(256, replicas, in, out) || !fits(256, rows, in, out) || !fits(256, kTileSamples, in, out)) return false;
    }
    return true;
}

template <class T>
int run(const Training& call) {
    const int64_t latents = call.latents, outputs = call.encoder.layers < 1 ? 0 : call.encoder.widths[call.encoder.layers];
    if (call.replicas < 0 || call.rows < 1 || call.columns < 1 || latents < 1 || call.epochs < 0 || call.steps < 0) return kBadSize;
    if (!sensible(call.encoder, call.replicas, call.rows) || !sensible(call.decoder, call.replicas, call.rows)) return kBadSize;
    if (call.decoder.widths[0] != latents || call.decoder.widths[call.decoder.layers] != call.columns) return kBadSize;
    if (call.encoder.widths[0] != call.columns || outputs < (call.objective == kElbo ? 2 : 1) * latents) return kBadSize;
    if (call.variances != 0 && call.variances != 1 && call.variances != call.columns) return kBadSize;
    if (call.objective < kReconstruction || call.objective > kElbo) return kBadSize;
    if (call.objective == kReconstruction && call.encoder.trained) return kBadSize;  // its codes are held
    if (call.closed && (call.decoder.layers != 1 || call.decoder.activations[0] != kIdentity || call.variances == 0)) return kBadSize;
    if (call.objective == kElbo && !call.closed && call.samples < 1) return kBadSize;
    if (!fits(8, call.rows, latents, call.samples < 1 ? 1 : call.samples) || !fits(8, call.epochs, call.replicas, kTerms)) return kBadSize;
    const int64_t slots = std::min<int64_t>(team(call.threads), call.replicas);
    std::atomic<int> error{kOk};
    std::vector<std::unique_ptr<Trainer<T>>> trainers(static_cast<size_t>(slots < 1 ? 1 : slots));
    for (auto& trainer : trainers) {
        trainer.reset(new (std::nothrow) Trainer<T>(call, slots > 1 ? 1 : team(call.threads)));
        if (!trainer || !*trainer) return kOutOfMemory;
    }
    share_out(slots, call.replicas, [&](int64_t slot, int64_t r) {
        const int found = trainers[static_cast<size_t>(slot)]->train(r);
        if (found != kOk) error = found;
    });
    return error;
}

}  // namespace

int training_f32(const Training* call) { return run<float>(*call); }
int training_f64(const Training* call) { return run<double>(*call); }

}  // namespace LIBI_ISA
}  // namespace libi
