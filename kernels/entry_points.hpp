// The C ABI, once: LIBI_ENTRY_POINTS(X) calls X(name, parameters, arguments) for every function of the library.
//
// A new kernel adds its line here, defines the function inside namespace libi::LIBI_ISA, and is listed in
// CMakeLists.txt; dispatch.cpp makes the exported libi_<name> from it. Sizes are int64, a result is 0 or an Error.
#pragma once

#include <cstdint>

#define LIBI_DRAWS                                                                                                    \
    uint64_t seed, const int64_t *replicas, int64_t num_replicas, int64_t first_row, int64_t rows, int64_t first,      \
        int64_t count, int64_t repetition, int64_t stream, int num_threads
#define LIBI_DRAWS_ARGUMENTS seed, replicas, num_replicas, first_row, rows, first, count, repetition, stream, num_threads

namespace libi {

// The arguments of the importance kernels. T is float or double by the entry point's name. Tensors are contiguous, with
// replicas in front; a stride counts values from one replica to the next and is 0 where all share them.
struct Importance {
    // sizes
    int64_t replicas, rows, samples, layers;
    const int64_t* widths;       // [layers + 1], from latents to outputs
    const int64_t* activations;  // [layers]: identity relu tanh sigmoid softplus silu gelu cube leaky_relu elu
    int64_t variances;           // 0: Bernoulli; 1 or outputs: Gaussian
    int64_t tail;                // how many of the largest log-weights of a row are kept
    // tensors
    const void *x, *mean, *log_scale;        // [replicas, rows, outputs], [replicas, rows, latents] twice
    int64_t x_stride;
    const void* const* weights;              // [layers] of [out, in]
    const void* const* biases;               // [layers] of [out], or null
    const int64_t *weight_strides, *bias_strides;
    const void* variance;                    // [variances]
    int64_t variance_stride;
    // random numbers
    uint64_t seed;
    const int64_t* replica_ids;              // [replicas]
    int64_t first_row, repetition, stream;
    int64_t threads;
    // forward: results; backward: log_likelihood is an argument
    void *log_likelihood, *effective, *top;  // [replicas, rows] twice, [replicas, rows, tail]
    // backward
    int64_t kind;                            // reparameterized, sticking-the-landing, doubly-reparameterized
    const void* grad;                        // [replicas, rows]
    void *to_x, *to_variance;                // [replicas, rows, outputs], [replicas, variances]; null: not wanted
    void *to_mean, *to_log_scale;
    void* const* to_weights;                 // [layers] of [replicas, out, in]; null: no parameter wants a gradient
    void* const* to_biases;                  // [layers] of [replicas, out], also where a layer has no bias
};

// The arguments of the resampling kernels.
struct Resampling {
    Importance on;                           // with its results
    int64_t draws, stream;                   // of each row; of their uniform numbers
    void *mean, *covariance;                 // [replicas, rows, latents], [replicas, rows, latents, latents]
    void *z, *log_density;                   // [replicas, rows, draws, latents], [replicas, rows, draws]
};

// The arguments of the chain kernels.
struct Chains {
    Importance on;                           // data, decoder and counters; samples: chains; log_scale: of the steps
    int64_t method;                          // hmc, mala, random-walk
    int64_t transitions, leapfrogs, thinning, first_transition;
    int64_t momentum_stream, acceptance_stream;
    double jitter, target;                   // target: acceptance rate to adapt to, or 0
    const void *z, *step;                    // [replicas, rows, chains, latents], [replicas, rows, chains]
    // results: kept = transitions / thinning
    void *draws, *log_density;               // [replicas, rows, chains, kept, latents], [replicas, rows, chains, kept]
    void *step_out, *acceptance;             // [replicas, rows, chains]
    int64_t* divergences;                    // likewise
};

// The arguments of the annealed importance sampling kernels.
struct Annealing {
    Importance on;                           // data, decoder, counters, q (no mean: 0); samples: chains
    int64_t temperatures, leapfrogs, first_transition;
    int64_t momentum_stream, acceptance_stream;
    double jitter, rate, target;             // rate: of the adaptation of step sizes to acceptance rate target, or 0
    const double* betas;                     // [replicas, temperatures + 1]
    const void *z, *step;                    // [replicas, rows, chains, latents], [replicas, rows, temperatures]
    int64_t windows;                         // transition t has the scales of number t windows / temperatures
    const void* scale_tril;                  // [replicas, rows, windows, latents, latents], lower triangular
    // results
    void *last, *log_weights, *acceptance;   // [replicas, rows, chains, latents], [replicas, rows, chains] twice
    void *steps, *path;                      // [replicas, rows, chains, temperatures] and with latents; null where the rate is 0
};

// A chain of maps and activations of the training kernels, and what Adam keeps of its parameters.
struct Network {
    int64_t layers;
    const int64_t* widths;                   // [layers + 1], from inputs to outputs
    const int64_t* activations;              // [layers]: as above, then sigmoid_cube_root
    int64_t trained;
    const double* const* diagonals;          // [layers]: null, or B [in] of chol(A A' + B), whose A is the weight
    void *const *weights, *const *weight_means, *const *weight_squares;  // [layers] of [replicas, out, in]
    void *const *biases, *const *bias_means, *const *bias_squares;       // [layers] of [replicas, out], or null
};

// The arguments of the training kernels.
struct Training {
    int64_t replicas, rows, columns, latents;
    const void* x;                           // [sets, rows, columns]
    const int64_t* set;                      // [replicas]
    Network encoder, decoder;
    int64_t objective;                       // reconstruction, joint, elbo
    int64_t variances;                       // 0: Bernoulli; 1 or columns: Gaussian
    const void* variance;                    // [variances]
    const double* weights;                   // [replicas, 3]
    double hz_beta;
    int64_t closed, samples;
    uint64_t seed;
    const int64_t* replica_ids;              // [replicas]
    int64_t repetition, stream;
    int64_t epochs;
    const double *rates, *rises;             // [epochs]
    int64_t steps;                           // taken before
    double epsilon;
    void* usual;                             // [replicas]
    int64_t threads;
    void* terms;                             // [epochs, replicas, 4]
};

}  // namespace libi

#define LIBI_ENTRY_POINTS(X)                                                                                          \
    X(philox_words, (LIBI_DRAWS, int64_t *out), (LIBI_DRAWS_ARGUMENTS, out))                                          \
    X(philox_uniform_f32, (LIBI_DRAWS, float *out), (LIBI_DRAWS_ARGUMENTS, out))                                      \
    X(philox_uniform_f64, (LIBI_DRAWS, double *out), (LIBI_DRAWS_ARGUMENTS, out))                                     \
    X(philox_normal_f32, (LIBI_DRAWS, float *out), (LIBI_DRAWS_ARGUMENTS, out))                                       \
    X(philox_normal_f64, (LIBI_DRAWS, double *out), (LIBI_DRAWS_ARGUMENTS, out))                                      \
    X(log_mean_exp_f32, (const float *x, int64_t rows, int64_t samples, int num_threads, float *out),                 \
      (x, rows, samples, num_threads, out))                                                                           \
    X(log_mean_exp_f64, (const double *x, int64_t rows, int64_t samples, int num_threads, double *out),               \
      (x, rows, samples, num_threads, out))                                                                           \
    X(log_mean_exp_backward_f32,                                                                                      \
      (const float *grad, const float *x, const float *out, int64_t rows, int64_t samples, int num_threads,           \
       float *grad_x),                                                                                                \
      (grad, x, out, rows, samples, num_threads, grad_x))                                                             \
    X(log_mean_exp_backward_f64,                                                                                      \
      (const double *grad, const double *x, const double *out, int64_t rows, int64_t samples, int num_threads,        \
       double *grad_x),                                                                                               \
      (grad, x, out, rows, samples, num_threads, grad_x))                                                             \
    X(henze_zirkler_f32,                                                                                              \
      (const float *z, int64_t replicas, int64_t n, int64_t d, double beta, int gradient, int num_threads,            \
       float *value, float *slope),                                                                                   \
      (z, replicas, n, d, beta, gradient, num_threads, value, slope))                                                 \
    X(henze_zirkler_f64,                                                                                              \
      (const double *z, int64_t replicas, int64_t n, int64_t d, double beta, int gradient, int num_threads,           \
       double *value, double *slope),                                                                                 \
      (z, replicas, n, d, beta, gradient, num_threads, value, slope))                                                 \
    X(henze_zirkler_characteristic_f32,                                                                               \
      (const float *z, const float *vectors, int64_t count, int method, int64_t replicas, int64_t n, int64_t d,       \
       double beta, int gradient, int num_threads, float *value, float *slope),                                       \
      (z, vectors, count, method, replicas, n, d, beta, gradient, num_threads, value, slope))                         \
    X(henze_zirkler_characteristic_f64,                                                                               \
      (const double *z, const double *vectors, int64_t count, int method, int64_t replicas, int64_t n, int64_t d,     \
       double beta, int gradient, int num_threads, double *value, double *slope),                                     \
      (z, vectors, count, method, replicas, n, d, beta, gradient, num_threads, value, slope))                         \
    X(smooth_knn_f32,                                                                                                 \
      (const float *z, int64_t replicas, int64_t n1, int64_t n2, int64_t d, int64_t k, const double *alphas,          \
       int64_t num_alphas, int num_threads, float *out),                                                              \
      (z, replicas, n1, n2, d, k, alphas, num_alphas, num_threads, out))                                              \
    X(smooth_knn_f64,                                                                                                 \
      (const double *z, int64_t replicas, int64_t n1, int64_t n2, int64_t d, int64_t k, const double *alphas,         \
       int64_t num_alphas, int num_threads, double *out),                                                             \
      (z, replicas, n1, n2, d, k, alphas, num_alphas, num_threads, out))                                              \
    X(importance_f32, (const Importance *call), (call))                                                               \
    X(importance_f64, (const Importance *call), (call))                                                               \
    X(importance_backward_f32, (const Importance *call), (call))                                                      \
    X(importance_backward_f64, (const Importance *call), (call))                                                      \
    X(resampling_f32, (const Resampling *call), (call))                                                               \
    X(resampling_f64, (const Resampling *call), (call))                                                               \
    X(chains_f32, (const Chains *call), (call))                                                                       \
    X(chains_f64, (const Chains *call), (call))                                                                       \
    X(annealing_f32, (const Annealing *call), (call))                                                                 \
    X(annealing_f64, (const Annealing *call), (call))                                                                 \
    X(training_f32, (const Training *call), (call))                                                                   \
    X(training_f64, (const Training *call), (call))

namespace libi {

enum Error : int { kOk = 0, kBadSize = 1, kCounterOverflow = 2, kOutOfMemory = 3 };

#define LIBI_DECLARE(name, parameters, arguments) int name parameters;
namespace generic {
LIBI_ENTRY_POINTS(LIBI_DECLARE)
}
#if defined(LIBI_X86_LEVELS)
namespace v3 {
LIBI_ENTRY_POINTS(LIBI_DECLARE)
}
namespace v4 {
LIBI_ENTRY_POINTS(LIBI_DECLARE)
}
#endif
#if defined(LIBI_ISA)  // kernels call one another
namespace LIBI_ISA {
LIBI_ENTRY_POINTS(LIBI_DECLARE)
}
#endif
#undef LIBI_DECLARE

}  // namespace libi
