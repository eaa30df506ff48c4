"""The formulas of kernels/importance/reference.py on blocks of values, shared by the Triton kernels of this folder.

GPU arithmetic: exp2 and reciprocals are the hardware's approximations (2 ulp), so tanh and sigmoid err by up to 2e-7 absolute.
"""

from __future__ import annotations

import triton
import triton.language as tl

from libi_fast.kernels.random.gpu import log_unit

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2PI = tl.constexpr(1.8378770664093453)


@triton.jit
def exp(a):
    return tl.exp2(a * LOG2_E)


@triton.jit
def sigmoid(a):
    return 1.0 / (1.0 + exp(-a))


@triton.jit
def relu(a):
    """NaN stays: the hardware's plain maximum would make 0 of it."""
    return tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softplus(a):
    return relu(a) + log_unit(1.0 + exp(-tl.abs(a)))


@triton.jit
def gauss_cdf(a):
    return 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))


@triton.jit
def activation(a, NAME: tl.constexpr):
    """The function NAME of reference.ACTIVATIONS."""
    if NAME == "relu":
        h = relu(a)
    elif NAME == "tanh":
        h = 1.0 - 2.0 / (1.0 + exp(2.0 * a))
    elif NAME == "sigmoid":
        h = sigmoid(a)
    elif NAME == "softplus":
        h = softplus(a)
    elif NAME == "silu":
        h = a * sigmoid(a)
    elif NAME == "gelu":
        h = a * gauss_cdf(a)
    elif NAME == "cube":
        h = a * a * a
    elif NAME == "leaky_relu":
        h = tl.where(a > 0.0, a, 0.01 * a)
    elif NAME == "elu":
        h = tl.where(a > 0.0, a, exp(tl.minimum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)) - 1.0)
    else:
        tl.static_assert(NAME == "identity", "unknown activation")
        h = a
    return h


@triton.jit
def activation_slope(a, h, NAME: tl.constexpr):
    """d h / d a at h = activation(a)."""
    if NAME == "relu":
        s = tl.where(a > 0.0, 1.0, 0.0)
    elif NAME == "tanh":
        s = 1.0 - h * h
    elif NAME == "sigmoid":
        s = h * (1.0 - h)
    elif NAME == "softplus":
        s = sigmoid(a)
    elif NAME == "silu":
        p = sigmoid(a)
        s = p + h * (1.0 - p)
    elif NAME == "gelu":
        s = gauss_cdf(a) + a * exp(-0.5 * a * a) * 0.3989422804014327
    elif NAME == "cube":
        s = 3.0 * a * a
    elif NAME == "leaky_relu":
        s = tl.where(a > 0.0, 1.0, 0.01)
    elif NAME == "elu":
        s = tl.where(a > 0.0, 1.0, h + 1.0)
    else:
        tl.static_assert(NAME == "identity", "unknown activation")
        s = tl.full(a.shape, 1.0, tl.float32)
    return s


@triton.jit
def log_prob(x, output, precision, LIKELIHOOD: tl.constexpr):
    """log p(x | output) of each value; the Gaussian's without its constant, which `log_constant` gives."""
    if LIKELIHOOD == "gaussian":
        error = output - x
        value = -0.5 * precision * error * error
    else:
        tl.static_assert(LIKELIHOOD == "bernoulli", "unknown likelihood")
        value = x * output - softplus(output)
    return value


@triton.jit
def log_constant(variance):
    """The Gaussian's -log(2 pi variance) / 2 of each value."""
    return -0.5 * (log_unit(variance) + LOG_2PI)


@triton.jit
def to_output(x, output, precision, LIKELIHOOD: tl.constexpr):
    """d log p(x | output) / d output."""
    if LIKELIHOOD == "gaussian":
        slope = (x - output) * precision
    else:
        slope = x - sigmoid(output)
    return slope


@triton.jit
def to_data(output, to_output, LIKELIHOOD: tl.constexpr):
    """d log p(x | output) / d x, where ``to_output`` is d / d output."""
    if LIKELIHOOD == "gaussian":
        slope = -to_output
    else:
        slope = output
    return slope


@triton.jit
def to_variance(to_output, precision):
    """The Gaussian's d log p / d variance of each value."""
    return 0.5 * (to_output * to_output - precision)


@triton.jit
def prior_over_proposal(z, noise, log_scale):
    """One latent's share of log N(z; 0, I) - log q(z)."""
    return 0.5 * (noise * noise - z * z) + log_scale


@triton.jit
def proposal_path(slope, share, v, z, noise, scale, KIND: tl.constexpr):
    """One latent's gradient to z = mean + scale noise (reference.proposal_gradient); slope: share * d log p(x|z) / d z."""
    if KIND == "doubly-reparameterized":
        slope = slope * v
        share = share * v
    if KIND == "reparameterized":
        path = slope - share * z
    else:
        path = slope + share * (noise / scale - z)
    return path


@triton.jit
def merge(pivot, first, second, log_weights, AXIS: tl.constexpr):
    """The running sums of reference.Sums after a block of log-weights, which is reduced over AXIS."""
    # The floor keeps -inf - -inf out; a NaN weight poisons its row's sums alone.
    lowest: tl.constexpr = -3.4028234663852886e38
    top = tl.maximum(tl.maximum(pivot, tl.max(log_weights, AXIS)), lowest)
    old = exp(pivot - top)
    weights = exp(log_weights - tl.expand_dims(top, AXIS))
    first = first * old + tl.sum(weights, AXIS)
    second = second * old * old + tl.sum(weights * weights, AXIS)
    return top, first, second
