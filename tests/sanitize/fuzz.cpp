// Random calls of every entry point, for the sanitizers: libi_fuzz [--seconds 60] [--seed N] [--first C] [--cases M]
//
// A case follows from (seed, its number) alone: `--seed N --first C --cases 1` repeats case C. Arrays lie on the heap in
// their exact size, so that AddressSanitizer sees one element too far. A call is made twice, with another number of threads
// and other bytes in fresh memory: all elements must be written, and the same both times. Now and then a size or a counter
// is bad, and the call must say so, or the kernel's memory is refused.
//
// A new entry point: a function `template <class T> void name(Case& c)`, and its line in kCases.
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <type_traits>
#include <vector>

#include "../../kernels/entry_points.hpp"

extern "C" {
const char* libi_isa();
// All end in SIGABRT, whose handler says which case it was.
const char* __asan_default_options() { return "abort_on_error=1"; }
const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }
const char* __tsan_default_options() { return "abort_on_error=1:halt_on_error=1"; }
}

// --- the kernels' memory, new (std::nothrow): filled, bounded and, if asked, refused ---

namespace {
constexpr size_t kMostBytes = size_t{1} << 28;
std::atomic<int> fill{0};
std::atomic<int64_t> refused{-1};  // how many allocations until then; negative: never
}  // namespace

void* operator new[](size_t bytes, const std::nothrow_t&) noexcept {
    if (bytes > kMostBytes || refused.fetch_sub(1) == 0) return nullptr;
    void* const at = std::malloc(bytes);
    if (at != nullptr) std::memset(at, fill, bytes);
    return at;
}
void* operator new[](size_t bytes) {
    if (void* const at = std::malloc(bytes)) return at;
    throw std::bad_alloc();
}
// Likewise where a type wants more than malloc's alignment.
void* operator new[](size_t bytes, std::align_val_t line, const std::nothrow_t&) noexcept {
    const auto each = static_cast<size_t>(line);
    if (bytes > kMostBytes || refused.fetch_sub(1) == 0) return nullptr;
    void* const at = std::aligned_alloc(each, (bytes + each - 1) / each * each);
    if (at != nullptr) std::memset(at, fill, bytes);
    return at;
}
void operator delete[](void* at) noexcept { std::free(at); }
void operator delete[](void* at, size_t) noexcept { std::free(at); }
void operator delete[](void* at, const std::nothrow_t&) noexcept { std::free(at); }
void operator delete[](void* at, std::align_val_t) noexcept { std::free(at); }
void operator delete[](void* at, size_t, std::align_val_t) noexcept { std::free(at); }
void operator delete[](void* at, std::align_val_t, const std::nothrow_t&) noexcept { std::free(at); }

namespace libi {
namespace {

struct Kernels {
    const char* isa;
#define LIBI_FIELD(name, parameters, arguments) int(*name) parameters;
    LIBI_ENTRY_POINTS(LIBI_FIELD)
};

const Kernels kKernels[] = {
#define LIBI_GENERIC(name, parameters, arguments) generic::name,
    {"generic", LIBI_ENTRY_POINTS(LIBI_GENERIC)},
#if defined(LIBI_X86_LEVELS)
#define LIBI_V3(name, parameters, arguments) v3::name,
#define LIBI_V4(name, parameters, arguments) v4::name,
    {"v3", LIBI_ENTRY_POINTS(LIBI_V3)},
    {"v4", LIBI_ENTRY_POINTS(LIBI_V4)},
#endif
};

template <class T, class F32, class F64>
auto of_type(F32 f32, F64 f64) {
    if constexpr (std::is_same_v<T, float>) return f32;
    else return f64;
}

// --- a case ---

struct Running {
    uint64_t seed;
    int64_t number;
    const char *name, *isa;
} running;

void say_which() {
    std::fprintf(stderr, "libi_fuzz: in %s (%s), repeat with --seed %" PRIu64 " --first %" PRId64 " --cases 1\n",
                 running.name, running.isa, running.seed, running.number);
}

[[noreturn]] void fail(const char* what, int64_t detail) {
    std::fprintf(stderr, "libi_fuzz: %s (%" PRId64 ")\n", what, detail);
    say_which();
    std::exit(1);
}

class Case {
public:
    const Kernels& kernels;

    Case(const Kernels& with, uint64_t seed, int64_t number) : kernels(with) {
        std::seed_seq sequence{seed, seed >> 32, static_cast<uint64_t>(number)};
        engine_.seed(sequence);
    }

    int64_t up_to(int64_t most) { return static_cast<int64_t>(engine_() % (static_cast<uint64_t>(most) + 1)); }
    bool one_in(int64_t n) { return up_to(n - 1) == 0; }
    template <class V>
    V one_of(std::initializer_list<V> values) {
        return values.begin()[up_to(static_cast<int64_t>(values.size()) - 1)];
    }

    // 0 .. most: anywhere, or near a width of registers, blocks and tiles.
    int64_t size(int64_t most) {
        if (one_in(2)) return up_to(one_in(2) ? most : most / 8);
        const auto edge = one_of<int64_t>({1, 4, 6, 8, 14, 16, 32, 42, 64, 128, 512, 1024, 2048, 4096, 65536});
        const int64_t near = (one_in(4) ? 2 * edge : edge) + up_to(2) - 1;
        return near <= most ? near : up_to(most < 3 ? most : 3);
    }

    // A number of some kind: usual, huge, subnormal, or now and then a special one.
    template <class T>
    T number() {
        using Limits = std::numeric_limits<T>;
        if (specials_ && one_in(8))
            return one_of<T>({Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), Limits::max(), Limits::lowest(),
                              Limits::min(), Limits::denorm_min(), -Limits::denorm_min(), T{0}, -T{0}});
        return static_cast<T>(std::uniform_real_distribution<double>(-2, 2)(engine_) * scale_);
    }

    // An array of `count` numbers of one kind.
    template <class T>
    T* values(int64_t count) {
        T* const at = array<T>(count);
        specials_ = one_in(4);
        scale_ = one_in(2) ? 1 : one_of<double>({1e-3, 30, 1e4, 1e30, 1e-40, 0});
        for (int64_t i = 0; i < count; ++i) at[i] = number<T>();
        return at;
    }

    template <class T>
    T* array(int64_t count) {
        T* const at = new T[static_cast<size_t>(count)];
        kept_.emplace_back(reinterpret_cast<char*>(at), [](char* p) { delete[] reinterpret_cast<T*>(p); });
        return at;
    }

    // An array of results, all of which the call must write.
    template <class T>
    T* result(int64_t count) {
        T* const at = array<T>(count);
        results_.push_back({reinterpret_cast<char*>(at), static_cast<size_t>(count) * sizeof(T)});
        return at;
    }

    // Now and then makes one of `sizes` bad; a call that is not empty must then fail.
    void spoil(std::initializer_list<int64_t*> sizes) {
        if (!one_in(6)) return;
        for (int64_t* const one : sizes) *one = *one < 1 ? 1 : *one;
        constexpr int64_t most = std::numeric_limits<int64_t>::max();
        *one_of(sizes) = one_of<int64_t>({-1, -most - 1, most, most - 1, most / 2, most / 2 + 1, -(int64_t{1} << 32)});
        must_fail_ = true;
    }
    void must_fail() { must_fail_ = true; }

    // Whether the call, given a number of threads, succeeded; it is made twice.
    bool run(const std::function<int(int)>& call) {
        const bool refuse = one_in(20);
        const int64_t allocations = up_to(7);
        std::vector<std::vector<char>> before;
        for (int pass = 0; pass < 2; ++pass) {
            fill = pass == 0 ? 0xff : 0x01;
            for (const Result& one : results_) std::memset(one.at, fill, one.bytes);
            refused = refuse ? allocations : -1;
            const int threads = static_cast<int>(pass == 0 ? 1 : one_in(8) ? one_of<int64_t>({0, -1}) : 2 + up_to(1));
            const int error = call(threads);
            if (must_fail_ ? error == kOk : error != kOk && !(refuse && error == kOutOfMemory)) fail("unexpected result", error);
            if (error != kOk) return false;
            for (size_t i = 0; i < results_.size(); ++i) {
                const Result& one = results_[i];
                if (pass == 0) before.emplace_back(one.at, one.at + one.bytes);
                else if (one.bytes > 0 && std::memcmp(before[i].data(), one.at, one.bytes) != 0)
                    fail("results differ, or were not written: array", static_cast<int64_t>(i));
            }
        }
        results_.clear();
        return true;
    }

private:
    struct Result {
        char* at;
        size_t bytes;
    };
    std::mt19937_64 engine_;
    double scale_ = 1;
    bool specials_ = false, must_fail_ = false;
    std::vector<std::unique_ptr<char, void (*)(char*)>> kept_;
    std::vector<Result> results_;
};

// --- the entry points ---

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();

struct Counters {
    uint64_t seed;
    int64_t *replicas, num_replicas, first_row, rows, first, count, repetition, stream;
};

// Of LIBI_DRAWS, all valid unless `unit` draws (4 for blocks) too many are asked for, say.
Counters counters(Case& c, int64_t unit) {
    constexpr int64_t words = int64_t{1} << 32, most = std::numeric_limits<int64_t>::max();
    Counters at{};
    at.seed = static_cast<uint64_t>(c.up_to(most));
    at.num_replicas = c.size(4), at.rows = c.size(c.one_in(4) ? 600 : 20), at.count = c.size(c.one_in(4) ? 9000 : 300);
    at.first_row = c.one_in(4) ? words - at.rows : c.up_to(words - at.rows);
    at.first = c.one_in(4) ? 4 * words / unit - at.count : c.up_to(4 * words / unit - at.count);
    at.repetition = c.one_of<int64_t>({0, 1, words - 1});
    at.stream = c.one_of<int64_t>({0, 3, 255});
    at.replicas = c.array<int64_t>(at.num_replicas);
    for (int64_t r = 0; r < at.num_replicas; ++r) at.replicas[r] = c.one_of<int64_t>({0, 7, (1 << 24) - 1});
    return at;
}

void spoil(Case& c, Counters& at) {
    constexpr int64_t words = int64_t{1} << 32, most = std::numeric_limits<int64_t>::max();
    if (c.one_in(10)) {
        const auto bad = c.one_of<int64_t>({-1, -most - 1, most, 4 * words + 1});
        *c.one_of({&at.first_row, &at.first, &at.repetition, &at.stream}) = bad;
        c.must_fail();
    } else if (c.one_in(10) && at.num_replicas > 0) {
        at.replicas[c.up_to(at.num_replicas - 1)] = c.one_of<int64_t>({-1, 1 << 24, most, -most - 1});
        c.must_fail();
    } else {
        c.spoil({&at.num_replicas, &at.rows, &at.count});
    }
}

template <class T, class Kernel>
void draw(Case& c, Kernel kernel, int64_t words) {
    Counters at = counters(c, words);
    T* const out = c.result<T>(at.num_replicas * at.rows * at.count * words);
    spoil(c, at);
    c.run([&](int threads) {
        return kernel(at.seed, at.replicas, at.num_replicas, at.first_row, at.rows, at.first, at.count, at.repetition, at.stream,
                      threads, out);
    });
}

void philox_words(Case& c) { draw<int64_t>(c, c.kernels.philox_words, 4); }

template <class T>
void philox_uniform(Case& c) {
    draw<T>(c, of_type<T>(c.kernels.philox_uniform_f32, c.kernels.philox_uniform_f64), 1);
}

template <class T>
void philox_normal(Case& c) {
    draw<T>(c, of_type<T>(c.kernels.philox_normal_f32, c.kernels.philox_normal_f64), 1);
}

template <class T>
void log_mean_exp(Case& c) {
    int64_t rows = c.size(40), samples = c.size(c.one_in(4) ? 140000 / (rows + 1) : 300);
    const T* const x = c.values<T>(rows * samples);
    T* const out = c.result<T>(rows);
    if (samples == 0) c.must_fail();
    c.spoil({&rows, &samples});
    const auto forward = of_type<T>(c.kernels.log_mean_exp_f32, c.kernels.log_mean_exp_f64);
    c.run([&](int threads) { return forward(x, rows, samples, threads, out); });
}

template <class T>
void log_mean_exp_backward(Case& c) {
    int64_t rows = c.size(40), samples = c.size(c.one_in(4) ? 140000 / (rows + 1) : 300);
    const T *const x = c.values<T>(rows * samples), *const grad = c.values<T>(rows), *const out = c.values<T>(rows);
    T* const to_x = c.result<T>(rows * samples);
    c.spoil({&rows, &samples});
    const auto backward = of_type<T>(c.kernels.log_mean_exp_backward_f32, c.kernels.log_mean_exp_backward_f64);
    c.run([&](int threads) { return backward(grad, x, out, rows, samples, threads, to_x); });
}

double beta_of(Case& c) {
    return c.one_in(8) ? c.one_of({0.0, -1.0, 1e300, 1e-300, kNaN, kInfinity}) : 1.0;
}

template <class T>
void henze_zirkler(Case& c) {
    int64_t replicas = c.size(5), n = c.size(c.one_in(8) ? 1100 : 140), d = c.size(c.one_in(4) ? 70 : 5);
    if (n > 200) replicas = c.up_to(1), d = c.size(3);
    const double beta = beta_of(c);
    const int gradient = c.one_in(2) ? 1 : 0;
    const T* const z = c.values<T>(replicas * n * d);
    T* const value = c.result<T>(replicas);
    T* const slope = gradient != 0 ? c.result<T>(replicas * n * d) : nullptr;
    if (n < 1 || d < 1) c.must_fail();
    c.spoil({&replicas, &n, &d});
    const auto kernel = of_type<T>(c.kernels.henze_zirkler_f32, c.kernels.henze_zirkler_f64);
    c.run([&](int threads) { return kernel(z, replicas, n, d, beta, gradient, threads, value, slope); });
}

// By quadrature, random frequencies and slices; the quadrature takes no vectors.
template <class T>
void henze_zirkler_characteristic(Case& c) {
    constexpr int kMethods = 3, kQuadrature = 0, kSliced = 2;
    const int method = c.one_in(16) ? kMethods : static_cast<int>(c.up_to(kMethods - 1));
    int64_t replicas = c.size(4), n = c.size(c.one_in(8) ? 1100 : 140), count = c.size(c.one_in(4) ? 300 : 20);
    int64_t d = c.size(method == kQuadrature ? 2 : c.one_in(4) ? 40 : 5);
    if (n > 200) replicas = c.up_to(1), d = c.size(2);
    // Slices want as many nodes as beta is large; the quadrature turns to the exact form.
    const double beta = method == kQuadrature ? beta_of(c) : c.one_in(8) ? c.one_of({0.0, -1.0, 1e-300, 20.0}) : 1.0;
    const int gradient = c.one_in(2) ? 1 : 0;
    const T* const z = c.values<T>(replicas * n * d);
    T* const vectors = c.values<T>(count * d);
    // Long directions, too, want many nodes.
    for (int64_t i = 0; i < count * d && method == kSliced; ++i) vectors[i] = static_cast<T>(c.up_to(2000) - 1000) / 1000;
    T* const value = c.result<T>(replicas);
    T* const slope = gradient != 0 ? c.result<T>(replicas * n * d) : nullptr;
    if (n < 1 || d < 1 || method == kMethods || (method == kQuadrature ? d > 3 : count < 1)) c.must_fail();
    c.spoil({&replicas, &n, &d, &count});
    const auto kernel =
        of_type<T>(c.kernels.henze_zirkler_characteristic_f32, c.kernels.henze_zirkler_characteristic_f64);
    c.run([&](int threads) {
        return kernel(z, vectors, count, method, replicas, n, d, beta, gradient, threads, value, slope);
    });
}

template <class T>
void smooth_knn(Case& c) {
    int64_t replicas = c.size(4), n1 = c.size(c.one_in(8) ? 130 : 20), n2 = c.size(20), d = c.size(c.one_in(4) ? 20 : 3);
    int64_t k = c.one_in(4) ? n1 + n2 - 1 - c.up_to(2) : c.size(n1 + n2), num_alphas = c.size(3);
    const T* const z = c.values<T>(replicas * (n1 + n2) * d);
    double* const alphas = c.array<double>(num_alphas);
    for (int64_t a = 0; a < num_alphas; ++a)
        alphas[a] = c.one_in(4) ? c.one_of({0.0, -1.0, 1e300, 1e-300, kNaN, kInfinity, 90.0}) : 1.0;
    T* const out = c.result<T>(replicas);
    if (n1 < 2 || n2 < 2 || d < 1 || k < 1 || k > n1 + n2 - 1 || num_alphas < 1) c.must_fail();
    c.spoil({&replicas, &n1, &n2, &d, &k, &num_alphas});
    const auto kernel = of_type<T>(c.kernels.smooth_knn_f32, c.kernels.smooth_knn_f64);
    c.run([&](int threads) { return kernel(z, replicas, n1, n2, d, k, alphas, num_alphas, threads, out); });
}

// The arguments that all kernels on a decoder share, and those of its arrays that may be spoiled.
struct Problem {
    Importance call;
    int64_t *widths, *activations, batch, latents, outputs;
};

template <class T>
Problem problem(Case& c, int64_t most_samples, int64_t most_rows) {
    Importance call{};
    call.replicas = c.size(3), call.rows = c.size(c.one_in(4) ? most_rows : 9);
    call.samples = c.size(c.one_in(8) ? most_samples : 140), call.layers = 1 + c.up_to(3);
    if (call.samples > 300) call.rows = c.up_to(2);
    const int64_t widest = c.one_in(4) ? 70 : 10, batch = call.replicas * call.rows;
    int64_t *const widths = c.array<int64_t>(call.layers + 1), *const activations = c.array<int64_t>(call.layers);
    for (int64_t i = 0; i <= call.layers; ++i) widths[i] = 1 + c.size(widest - 1);
    for (int64_t i = 0; i < call.layers; ++i) activations[i] = c.up_to(9);
    const int64_t latents = widths[0], outputs = widths[call.layers];
    call.widths = widths, call.activations = activations;
    call.variances = c.one_of<int64_t>({0, 1, outputs});
    call.tail = c.one_in(2) ? 0 : c.size(call.samples);
    const auto shared = [&] { return c.one_in(2) || call.replicas == 0; };
    const auto own = [&](int64_t stride) { return stride != 0 ? call.replicas : 1; };
    call.x_stride = shared() ? 0 : call.rows * outputs;
    call.x = c.values<T>(own(call.x_stride) * call.rows * outputs);
    call.mean = c.values<T>(batch * latents), call.log_scale = c.values<T>(batch * latents);
    auto** const weights = c.array<const void*>(call.layers);
    auto** const biases = c.array<const void*>(call.layers);
    auto *const weight_strides = c.array<int64_t>(call.layers), *const bias_strides = c.array<int64_t>(call.layers);
    for (int64_t i = 0; i < call.layers; ++i) {
        const int64_t units = widths[i + 1], size = units * widths[i];
        weight_strides[i] = shared() ? 0 : size, bias_strides[i] = shared() ? 0 : units;
        weights[i] = c.values<T>(own(weight_strides[i]) * size);
        biases[i] = c.one_in(3) ? nullptr : c.values<T>(own(bias_strides[i]) * units);
        if (biases[i] == nullptr) bias_strides[i] = 0;
    }
    call.weights = weights, call.biases = biases, call.weight_strides = weight_strides, call.bias_strides = bias_strides;
    call.variance_stride = shared() ? 0 : call.variances;
    call.variance = c.values<T>(own(call.variance_stride) * call.variances);
    const Counters at = counters(c, 1);
    int64_t* const ids = c.array<int64_t>(call.replicas);
    for (int64_t r = 0; r < call.replicas; ++r) ids[r] = c.one_of<int64_t>({0, 5, (1 << 24) - 1});
    call.seed = at.seed, call.repetition = at.repetition, call.stream = at.stream, call.replica_ids = ids;
    call.first_row = c.one_in(4) ? (int64_t{1} << 32) - call.rows : 0;
    if (call.samples < 1) c.must_fail();
    return {call, widths, activations, batch, latents, outputs};
}

template <class T>
void add_results(Case& c, Problem& p) {
    p.call.log_likelihood = c.result<T>(p.batch), p.call.effective = c.result<T>(p.batch);
    p.call.top = c.result<T>(p.batch * p.call.tail);
}

void spoil(Case& c, Problem& p) {
    Importance& call = p.call;
    if (c.one_in(10)) {
        int64_t* const wrong[] = {&call.first_row, &call.repetition, &call.stream, &p.activations[0], &call.variances};
        *wrong[c.up_to(4)] = c.one_of<int64_t>({-1, int64_t{1} << 40});
        c.must_fail();
    } else if (p.batch > 0) {
        c.spoil({&call.replicas, &call.rows, &call.samples, &call.layers, &call.tail, &p.widths[c.up_to(call.layers)]});
    }
}

// Forward, then backward with what it found.
template <class T>
void importance(Case& c) {
    Problem p = problem<T>(c, 2100, 70);
    Importance& call = p.call;
    add_results<T>(c, p);
    spoil(c, p);
    const auto forward = of_type<T>(c.kernels.importance_f32, c.kernels.importance_f64);
    const auto with_threads = [&](int threads) {
        call.threads = threads;
        return &call;
    };
    if (!c.run([&](int threads) { return forward(with_threads(threads)); })) return;

    const auto result = [&](int64_t count) { return p.batch > 0 ? c.result<T>(count) : c.array<T>(count); };
    auto **const to_weights = c.array<void*>(call.layers), **const to_biases = c.array<void*>(call.layers);
    for (int64_t i = 0; i < call.layers; ++i) {
        to_weights[i] = result(call.replicas * p.widths[i] * p.widths[i + 1]);
        to_biases[i] = result(call.replicas * p.widths[i + 1]);
    }
    call.kind = c.up_to(2), call.grad = c.values<T>(p.batch);
    call.to_x = c.one_in(2) ? nullptr : result(p.batch * p.outputs);
    call.to_variance = c.one_in(2) || call.variances == 0 ? nullptr : result(call.replicas * call.variances);
    call.to_mean = result(p.batch * p.latents), call.to_log_scale = result(p.batch * p.latents);
    call.to_weights = to_weights, call.to_biases = to_biases;
    if (c.one_in(20)) call.kind = c.one_of<int64_t>({-1, 3}), c.must_fail();
    const auto backward = of_type<T>(c.kernels.importance_backward_f32, c.kernels.importance_backward_f64);
    c.run([&](int threads) { return backward(with_threads(threads)); });
}

template <class T>
void expect_same(const char* what, const void* a, const void* b, int64_t count) {
    const T *const x = static_cast<const T*>(a), *const y = static_cast<const T*>(b);
    for (int64_t i = 0; i < count; ++i)
        if (x[i] != y[i] && (x[i] == x[i] || y[i] == y[i])) fail(what, i);
}

// Its sums are those of the importance kernel.
template <class T>
void resampling(Case& c) {
    Problem p = problem<T>(c, c.one_in(4) ? 40'000 : 2100, 70);  // of several parts
    Resampling call{};
    add_results<T>(c, p);
    call.draws = c.size(c.one_in(8) ? 2100 : 140), call.stream = c.one_of<int64_t>({0, 3, 255});
    call.mean = c.result<T>(p.batch * p.latents), call.covariance = c.result<T>(p.batch * p.latents * p.latents);
    call.z = c.result<T>(p.batch * call.draws * p.latents), call.log_density = c.result<T>(p.batch * call.draws);
    if (c.one_in(16)) {
        *c.one_of({&call.draws, &call.stream}) = c.one_of<int64_t>({-1, int64_t{1} << 40, -(int64_t{1} << 62)});
        c.must_fail();
    } else {
        spoil(c, p);
    }
    const auto kernel = of_type<T>(c.kernels.resampling_f32, c.kernels.resampling_f64);
    const auto run = [&](int threads) {
        call.on = p.call, call.on.threads = threads;
        return kernel(&call);
    };
    if (!c.run(run)) return;
    Importance sums = call.on;
    sums.log_likelihood = c.array<T>(p.batch), sums.effective = c.array<T>(p.batch);
    sums.top = c.array<T>(p.batch * sums.tail);
    if (of_type<T>(c.kernels.importance_f32, c.kernels.importance_f64)(&sums) != kOk) return;  // memory was refused
    expect_same<T>("resampling has another log-likelihood", call.on.log_likelihood, sums.log_likelihood, p.batch);
    expect_same<T>("resampling has another effective sample size", call.on.effective, sums.effective, p.batch);
    expect_same<T>("resampling has another tail", call.on.top, sums.top, p.batch * sums.tail);
}

// Without adaptation, a call that goes on where another ended has the draws of one.
template <class T>
void chains(Case& c) {
    constexpr int64_t kMethods = 3, words = int64_t{1} << 32;
    Problem p = problem<T>(c, 200, 40);
    p.call.tail = 0;
    if (c.one_in(2)) p.call.mean = nullptr;
    Chains call{};
    const int64_t latents = p.latents, in_all = p.batch * p.call.samples;
    call.method = c.up_to(kMethods - 1), call.transitions = c.size(c.one_in(4) ? 9 : 4), call.leapfrogs = 1 + c.size(2);
    call.thinning = c.one_in(2) ? 1 : 1 + c.size(5);
    const int64_t last = 4 * words / (latents > 2 ? latents : 2) - call.transitions;
    const int64_t most = last < words - call.transitions ? last : words - call.transitions;
    call.first_transition = c.one_in(2) ? 0 : c.one_in(2) ? most : c.up_to(most);
    call.momentum_stream = c.one_of<int64_t>({0, 3, 255}), call.acceptance_stream = c.one_of<int64_t>({0, 4, 255});
    call.jitter = c.one_of({0.0, 0.0, 0.5, 1 - 0x1p-53}), call.target = c.one_of({0.0, 0.0, 0.8, 1e-300, 1 - 0x1p-53});
    call.z = c.values<T>(in_all * latents);
    T* const step = c.values<T>(in_all);
    const bool usual = c.one_in(2);  // steps that move
    for (int64_t i = 0; i < in_all && usual; ++i) step[i] = static_cast<T>(c.up_to(1000)) / 1000;
    call.step = step;
    const int64_t kept = call.transitions / call.thinning;
    T *const draws = c.result<T>(in_all * kept * latents), *const log_density = c.result<T>(in_all * kept);
    T* const acceptance = c.result<T>(in_all);
    int64_t* const divergences = c.result<int64_t>(in_all);
    call.draws = draws, call.log_density = log_density, call.acceptance = acceptance, call.divergences = divergences;
    call.step_out = c.result<T>(in_all);
    if (c.one_in(10)) {
        constexpr int64_t lowest = std::numeric_limits<int64_t>::min(), highest = std::numeric_limits<int64_t>::max();
        const int64_t low = c.one_of<int64_t>({-1, lowest}), high = c.one_of<int64_t>({low, words + 1, highest});
        if (c.one_in(4)) *c.one_of({&call.jitter, &call.target}) = c.one_of({-1e-9, 1.0, kNaN, kInfinity});
        else if (c.one_in(3)) *c.one_of({&call.leapfrogs, &call.thinning}) = c.one_in(2) ? 0 : low;
        else if (c.one_in(2)) *c.one_of({&call.momentum_stream, &call.acceptance_stream}) = high;
        else *c.one_of({&call.method, &call.transitions, &call.first_transition}) = high;
        c.must_fail();
    } else {
        spoil(c, p);
    }
    const auto kernel = of_type<T>(c.kernels.chains_f32, c.kernels.chains_f64);
    const auto run = [&](int threads) {
        call.on = p.call, call.on.threads = threads;
        return kernel(&call);
    };
    if (!c.run(run)) return;
    for (int64_t i = 0; i < in_all; ++i) {
        if (!(acceptance[i] >= 0 && acceptance[i] <= 1)) fail("no acceptance rate", i);
        if (divergences[i] < 0 || divergences[i] > call.transitions) fail("no number of divergences", i);
    }
    if (call.target > 0 || call.thinning > 1 || kept < 2) return;
    Chains part = call;
    const int64_t cut = 1 + c.up_to(kept - 2);
    T* const z = c.array<T>(in_all * latents);
    for (int64_t i = 0; i < in_all; ++i)
        for (int64_t l = 0; l < latents; ++l) z[i * latents + l] = draws[(i * kept + cut - 1) * latents + l];
    part.z = z, part.first_transition += cut, part.transitions -= cut;
    part.draws = c.array<T>(in_all * part.transitions * latents), part.log_density = c.array<T>(in_all * part.transitions);
    part.step_out = c.array<T>(in_all), part.acceptance = c.array<T>(in_all), part.divergences = c.array<int64_t>(in_all);
    if (kernel(&part) != kOk) return;  // memory was refused
    for (int64_t i = 0; i < in_all; ++i) {
        const auto rest = [&](const void* of, int64_t at) { return static_cast<const T*>(of) + at; };
        expect_same<T>("a chain in two parts has other draws", draws + (i * kept + cut) * latents,
                       rest(part.draws, i * part.transitions * latents), part.transitions * latents);
        expect_same<T>("a chain in two parts has other densities", log_density + i * kept + cut,
                       rest(part.log_density, i * part.transitions), part.transitions);
    }
}

// Without adaptation, a call that goes on where another ended ends where one would.
template <class T>
void annealing(Case& c) {
    constexpr int64_t words = int64_t{1} << 32;
    Problem p = problem<T>(c, 200, 40);
    p.call.tail = 0;
    if (c.one_in(2)) p.call.mean = nullptr;
    Annealing call{};
    const int64_t latents = p.latents, in_all = p.batch * p.call.samples;
    call.temperatures = 1 + c.size(c.one_in(4) ? 9 : 4), call.leapfrogs = 1 + c.size(2);
    const int64_t last = 4 * words / (latents > 2 ? latents : 2) - call.temperatures;
    const int64_t most = last < words - call.temperatures ? last : words - call.temperatures;
    call.first_transition = c.one_in(2) ? 0 : c.one_in(2) ? most : c.up_to(most);
    call.momentum_stream = c.one_of<int64_t>({0, 3, 255}), call.acceptance_stream = c.one_of<int64_t>({0, 4, 255});
    call.jitter = c.one_of({0.0, 0.0, 0.5, 1 - 0x1p-53}), call.target = c.one_of({0.0, 0.8, 1e-300, 1 - 0x1p-53});
    call.rate = c.one_of({0.0, 0.0, 0.1, 1.0, 1e-300});
    const int64_t replicas = p.call.replicas, all_betas = replicas * (call.temperatures + 1);
    double* const betas = c.array<double>(all_betas);
    for (int64_t t = 0; t < all_betas; ++t) betas[t] = static_cast<double>(c.up_to(4)) / 4;
    call.betas = betas;
    call.z = c.values<T>(in_all * latents);
    T* const step = c.values<T>(p.batch * call.temperatures);
    const bool usual = c.one_in(2);  // steps that move
    for (int64_t i = 0; i < p.batch * call.temperatures && usual; ++i) step[i] = static_cast<T>(c.up_to(1000)) / 1000;
    call.step = step;
    call.windows = 1 + c.size(5);
    call.scale_tril = c.values<T>(p.batch * call.windows * latents * latents);
    T *const z = c.result<T>(in_all * latents), *const acceptance = c.result<T>(in_all);
    call.last = z, call.acceptance = acceptance, call.log_weights = c.result<T>(in_all);
    if (call.rate > 0) {
        call.steps = c.result<T>(in_all * call.temperatures);
        call.path = c.result<T>(in_all * call.temperatures * latents);
    }
    if (c.one_in(10)) {
        constexpr int64_t lowest = std::numeric_limits<int64_t>::min(), highest = std::numeric_limits<int64_t>::max();
        const int64_t low = c.one_of<int64_t>({-1, lowest}), high = c.one_of<int64_t>({low, words + 1, highest});
        if (c.one_in(4)) *c.one_of({&call.jitter, &call.target, &call.rate}) = c.one_of({-1e-9, 1.1, kNaN, kInfinity});
        else if (all_betas > 0 && c.one_in(4)) betas[c.up_to(all_betas - 1)] = c.one_of({-1e-9, 1.1, kNaN, kInfinity});
        else if (c.one_in(3)) *c.one_of({&call.leapfrogs, &call.temperatures, &call.windows}) = c.one_in(2) ? 0 : low;
        else if (c.one_in(2)) *c.one_of({&call.momentum_stream, &call.acceptance_stream}) = high;
        else *c.one_of({&call.temperatures, &call.first_transition}) = high;
        c.must_fail();
    } else {
        spoil(c, p);
    }
    const auto kernel = of_type<T>(c.kernels.annealing_f32, c.kernels.annealing_f64);
    const auto run = [&](int threads) {
        call.on = p.call, call.on.threads = threads;
        return kernel(&call);
    };
    if (!c.run(run)) return;
    for (int64_t i = 0; i < in_all; ++i)
        if (!(acceptance[i] >= 0 && acceptance[i] <= 1)) fail("no acceptance rate", i);
    if (call.rate > 0 || call.temperatures < 2 || call.windows > 1) return;
    const int64_t cut = 1 + c.up_to(call.temperatures - 2), left = call.temperatures - cut;
    T *const early = c.array<T>(p.batch * cut), *const late = c.array<T>(p.batch * left);
    for (int64_t i = 0; i < p.batch; ++i)
        for (int64_t t = 0; t < call.temperatures; ++t)
            *(t < cut ? early + i * cut + t : late + i * left + t - cut) = step[i * call.temperatures + t];
    double *const warm = c.array<double>(replicas * (cut + 1)), *const cold = c.array<double>(replicas * (left + 1));
    for (int64_t r = 0; r < replicas; ++r)
        for (int64_t t = 0; t <= call.temperatures; ++t) {
            const double b = betas[r * (call.temperatures + 1) + t];
            if (t <= cut) warm[r * (cut + 1) + t] = b;
            if (t >= cut) cold[r * (left + 1) + t - cut] = b;
        }
    Annealing part = call;
    T *const halfway = c.array<T>(in_all * latents), *const end = c.array<T>(in_all * latents);
    part.acceptance = c.array<T>(in_all), part.log_weights = c.array<T>(in_all);
    part.temperatures = cut, part.betas = warm, part.step = early, part.last = halfway;
    if (kernel(&part) != kOk) return;  // memory was refused
    part.temperatures = left, part.step = late, part.betas = cold, part.first_transition += cut, part.z = halfway;
    part.last = end;
    if (kernel(&part) == kOk) expect_same<T>("annealing in two parts ends elsewhere", z, end, in_all * latents);
}

// A network's parameters and Adam's moments; all but those that are trained stay as they are.
template <class T>
class Trained {
public:
    Trained(Case& c, int64_t replicas, std::vector<int64_t> widths, bool plain) : widths_(std::move(widths)) {
        const size_t layers = widths_.size() - 1;
        net.layers = static_cast<int64_t>(layers), net.trained = !c.one_in(4);
        for (auto* const each : {&weights_, &means_, &squares_, &biases_, &bias_means_, &bias_squares_}) each->resize(layers);
        activations_.resize(layers), diagonals_.resize(layers);
        for (size_t i = 0; i < layers; ++i) {
            const int64_t in = widths_[i], out = widths_[i + 1];
            activations_[i] = plain ? 0 : c.up_to(10);
            const bool joint = in == out && c.one_in(2);
            if (joint) {
                double* const b = c.array<double>(in);
                for (int64_t j = 0; j < in; ++j) b[j] = c.one_of({0.006, 1.0, 0.0, -1.0});
                diagonals_[i] = b;
            }
            add(c, replicas * in * out, weights_[i], means_[i], squares_[i]);
            if (!joint && c.one_in(2)) add(c, replicas * out, biases_[i], bias_means_[i], bias_squares_[i]);
        }
        net.widths = widths_.data(), net.activations = activations_.data(), net.diagonals = diagonals_.data();
        net.weights = weights_.data(), net.weight_means = means_.data(), net.weight_squares = squares_.data();
        net.biases = biases_.data(), net.bias_means = bias_means_.data(), net.bias_squares = bias_squares_.data();
    }
    Trained(const Trained&) = delete;

    void begin() const {
        for (const Start& one : starts_) std::memcpy(one.at, one.from, static_cast<size_t>(one.count) * sizeof(T));
    }

    Network net{};

private:
    struct Start {
        T* at;
        const T* from;
        int64_t count;
    };
    void add(Case& c, int64_t count, void*& values, void*& means, void*& squares) {
        for (void** const each : {&values, &means, &squares}) {
            if (each != &values && !net.trained) continue;
            T* const at = c.result<T>(count);
            starts_.push_back({at, c.values<T>(count), count});
            *each = at;
        }
    }

    std::vector<int64_t> widths_, activations_;
    std::vector<const double*> diagonals_;
    std::vector<void*> weights_, means_, squares_, biases_, bias_means_, bias_squares_;
    std::vector<Start> starts_;
};

// A call that goes on where another ended ends where one would.
template <class T>
void training(Case& c) {
    Training call{};
    call.replicas = c.size(4), call.rows = 1 + c.size(c.one_in(4) ? 200 : 40), call.columns = 1 + c.size(6);
    call.latents = 1 + c.size(4), call.objective = c.up_to(2), call.samples = 1 + c.size(3), call.epochs = c.size(3);
    const bool elbo = call.objective == 2;
    call.variances = c.one_of<int64_t>({0, 1, call.columns});
    call.closed = elbo && call.variances > 0 && c.one_in(2);
    const auto widths = [&](int64_t first, int64_t last, bool one) {
        std::vector<int64_t> found{first};
        for (int64_t more = one ? 0 : c.up_to(2); more > 0; --more) found.push_back(c.one_in(3) ? found.back() : 1 + c.size(40));
        found.push_back(last);
        return found;
    };
    Trained<T> encoder(c, call.replicas, widths(call.columns, (elbo ? 2 : 1) * call.latents + c.up_to(1), false), false);
    Trained<T> decoder(c, call.replicas, widths(call.latents, call.columns, call.closed != 0), call.closed != 0);
    const int64_t sets = 1 + c.size(2), words = int64_t{1} << 32;
    call.x = c.values<T>(sets * call.rows * call.columns), call.variance = c.values<T>(call.variances);
    int64_t *const set = c.array<int64_t>(call.replicas), *const ids = c.array<int64_t>(call.replicas);
    for (int64_t r = 0; r < call.replicas; ++r) set[r] = c.up_to(sets - 1), ids[r] = c.one_of<int64_t>({0, 7, (1 << 24) - 1});
    call.set = set, call.replica_ids = ids;
    double* const weights = c.array<double>(3 * call.replicas);
    for (int64_t i = 0; i < 3 * call.replicas; ++i) weights[i] = c.one_of({1.0, 0.2, 0.0, 1e300, kNaN});
    double *const rates = c.array<double>(call.epochs), *const rises = c.array<double>(call.epochs);
    for (int64_t e = 0; e < call.epochs; ++e) rates[e] = c.one_of({0.01, 0.0, 1e30}), rises[e] = c.one_of({1.0, 0.0, 0.5});
    call.weights = weights, call.rates = rates, call.rises = rises, call.hz_beta = c.one_of({1.3, 1e-3, 30.0});
    call.seed = static_cast<uint64_t>(c.up_to(std::numeric_limits<int64_t>::max()));
    call.repetition = c.one_of<int64_t>({0, 1, words - call.epochs}), call.stream = c.one_of<int64_t>({0, 3, 255});
    call.steps = c.one_of<int64_t>({0, 1, 1000}), call.epsilon = 1e-8;
    const int64_t replicas = call.replicas;
    T *const usual = c.result<T>(replicas), *const before = c.values<T>(replicas);
    T* const terms = c.result<T>(call.epochs * call.replicas * 4);
    call.usual = usual, call.terms = terms;
    call.encoder = encoder.net, call.decoder = decoder.net;
    if (call.objective == 0 && call.encoder.trained) c.must_fail();
    if (c.one_in(10)) {
        const int64_t bad = c.one_of<int64_t>({-1, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()});
        if (c.one_in(3)) *c.one_of({&call.objective, &call.variances, &call.steps}) = c.one_of<int64_t>({-1, -(words << 8)});
        else if (c.one_in(3)) *c.one_of({&call.encoder.layers, &call.decoder.layers}) = 0;
        else *c.one_of({&call.replicas, &call.rows, &call.columns, &call.latents, &call.epochs}) = bad;
        c.must_fail();
    }
    const auto kernel = of_type<T>(c.kernels.training_f32, c.kernels.training_f64);
    const auto run = [&](Training& with, int threads) {
        encoder.begin(), decoder.begin();
        std::memcpy(usual, before, static_cast<size_t>(replicas) * sizeof(T));
        with.threads = threads;
        return kernel(&with);
    };
    if (!c.run([&](int threads) { return run(call, threads); }) || call.epochs < 2) return;
    T* const ended = c.array<T>(4 * replicas);
    const T* const last = terms + (call.epochs - 1) * replicas * 4;
    std::memcpy(ended, last, static_cast<size_t>(4 * replicas) * sizeof(T));
    Training part = call;
    part.epochs = 1;
    if (run(part, 1) != kOk) return;  // memory was refused
    part.epochs = call.epochs - 1, part.rates += 1, part.rises += 1, part.steps += 1, part.repetition += 1;
    part.terms = terms + replicas * 4;
    if (kernel(&part) == kOk) expect_same<T>("training in two parts ends elsewhere", ended, last, 4 * replicas);
}

struct Entry {
    const char* name;
    void (*run)(Case&);
};

#define LIBI_BOTH(name) {#name " f32", name<float>}, {#name " f64", name<double>}
const Entry kCases[] = {
    {"philox_words", philox_words}, LIBI_BOTH(philox_uniform),      LIBI_BOTH(philox_normal), LIBI_BOTH(log_mean_exp),
    LIBI_BOTH(log_mean_exp_backward), LIBI_BOTH(henze_zirkler), LIBI_BOTH(henze_zirkler_characteristic),
    LIBI_BOTH(smooth_knn), LIBI_BOTH(importance), LIBI_BOTH(resampling), LIBI_BOTH(chains),
    LIBI_BOTH(annealing), LIBI_BOTH(training),
};

int64_t option(int count, char** arguments, const char* name, int64_t otherwise) {
    for (int i = 1; i + 1 < count; i += 2)
        if (std::strcmp(arguments[i], name) == 0) return std::strtoll(arguments[i + 1], nullptr, 10);
    return otherwise;
}

int run_all(int count, char** arguments) {
    const int64_t seconds = option(count, arguments, "--seconds", 60), cases = option(count, arguments, "--cases", 0);
    const int64_t first = option(count, arguments, "--first", 0);
    running.seed = static_cast<uint64_t>(option(count, arguments, "--seed", static_cast<int64_t>(std::random_device{}())));
    int64_t present = 1;  // instruction sets: up to the one that dispatch.cpp took
    while (std::strcmp(kKernels[present - 1].isa, libi_isa()) != 0) ++present;
    constexpr int64_t entries = sizeof(kCases) / sizeof(kCases[0]);
    std::printf("libi_fuzz: seed %" PRIu64 ", %d entry points, instruction sets up to %s\n", running.seed,
                static_cast<int>(entries), libi_isa());
    std::fflush(stdout);
    std::signal(SIGABRT, [](int) { say_which(); });
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    int64_t number = first;
    for (; cases > 0 ? number < first + cases : std::chrono::steady_clock::now() < end; ++number) {
        const Entry& entry = kCases[number % entries];
        const Kernels& kernels = kKernels[number / entries % present];
        running.number = number, running.name = entry.name, running.isa = kernels.isa;
        Case one(kernels, running.seed, number);
        entry.run(one);
    }
    std::printf("libi_fuzz: %" PRId64 " cases, nothing found\n", number - first);
    return 0;
}

}  // namespace
}  // namespace libi

int main(int count, char** arguments) { return libi::run_all(count, arguments); }
