"""The words of the report."""

from __future__ import annotations

from libi_fast.reproduce import closed_forms, published
from libi_fast.reproduce.protocol import Protocol

TITLE = "LiBI: the paper's table and figures, ours beside them"

_INTRODUCTION = """
Yacoby, Pan and Doshi-Velez, "Characterizing and Avoiding Problematic Global Optima of Variational Autoencoders" (AABI
2019, PMLR 118), reproduced by libi_fast, protocol "{name}": {sets} draws of each data set (seeds {seeds}), {rows}
rows to train on, as many to choose by and to test on.

Beside the paper's own measures (log-likelihood importance-sampled from q with S = {samples} and its variance doubled;
smooth k-NN between 100 and 100 points, k = {neighbours}, alpha = 1, mean of {repetitions} repetitions) stands the
exact log-likelihood, in closed form or by quadrature over the codes, its paired difference to the ground truth's on
the same rows, and to that of exact maximum likelihood on the same training rows: the most that a method can be
expected to reach. On Mobius it is that of the map's own six numbers, of which a network of 252 weights knows nothing.

LiBI as published maximises log p(x | h(x)) under penalties on the codes h(x), then the ELBO over q. Our variant ends
step 1 by the likelihood itself, integrated where p(z | x) has its mass (on Mobius with a normal prior on the decoder's
matrices), and learns q by draws from p(z | x) (on Mobius from pairs wider than the prior, too), so that q covers the
posterior and its importance-sampled values can be trusted. Every method starts from whitened codes and a decoder that
is fitted to them for 300 epochs, which the paper leaves open; without that the bounds do not converge where the noise
variance is 1e-6.
"""

_CLOSED_FORMS = """
LinearJTEx: p(x) = N(0, A A' + 0.01 I) whatever B, but the posterior depends on B. What a VAE minimises on endless
data, KL[p || p_theta] + min over mean-field q of E KL[q || p_theta(z | x)], is {objective at the truth:.3f} at the
truth and {objective at the optimum:.3f} at its optimum (the paper: {printed_truth} and {printed_optimum}), where the
log-likelihood is {log-likelihood of the optimum:.3f} instead of {log-likelihood of the truth:.3f}: the bound prefers
a wrong decoder with simpler posteriors.

Univariate example, x = theta z + eps, eps ~ N(0, s2 - theta^2): p(x) = N(0, s2) whatever theta, and I(X; Z) = 1/2
log(s2 / (s2 - theta^2)), from 0 to infinity. The paper's Eq 15 has an additive constant too many: for theta = 0 x and
z are independent, and I(X; Z) must be 0.

M in M M' = A A' + B is the lower Cholesky factor; the upper one gives the same p(x), but not the paper's
{printed_optimum}.
"""

_CLAIMS = """
LinearJTEx: the claim holds. On endless data the VAE's own optimum is {gap:.2f} nats short of the truth, whatever beta, because
beta cannot change what the mean-field family can match; LiBI's is the truth.

Gaussian: there is nothing to gain over converged bounds. A linear decoder without constraints may rotate its codes until
the posterior is diagonal, at no cost in likelihood, so that the optimum of the ELBO (beta = 1) is exact maximum likelihood
(probabilistic PCA; Lucas et al. 2019): see its row in the table. What the paper prints for the VAE, {printed:.2f}, is
optimisation that stopped short, and so is part of ours: at a noise variance of 1e-6 the valley is narrow.

CubicJTEx: importance sampling from q, its variance doubled, misses the posterior, as the paper says of its own values, and
reads a good decoder as a bad one. By exact likelihoods the order of the methods is another. The bounds' rows are what the
optimiser reaches in these epochs, which is not known to be the bounds' optimum.

Mobius: the differences between the methods are small, of the size of what 252 weights lose by being fitted to 500 rows, or
even six: smooth k-NN of the maximum-likelihood row says how far 500 rows stand from p(x) themselves.
"""

FIGURES = {
    "figure1": (
        "Figure 1. LinearJTEx. A: min over mean-field q of KL[q || p(z | x)] over the two numbers of B, of models with "
        "the same p(x); B: I(X; Z) over the same. C, D: data of the truth and of a VAE. E, F: draws of q(z | x) under "
        "the truth and of the VAE."
    ),
    "figure2": (
        "Figure 2. LinearJTEx, VAE: means of q(z | x) and of the true posterior, under the true model (its q fitted by the "
        "ELBO) and under the learned one."
    ),
    "figure3": "Figure 3. As Figure 2, for LiBI and for our variant.",
    "figure4": "Figure 4. CubicJTEx, VAE: means of q(z | x) and of the true posterior, under the true and the learned model.",
    "figure5": "Figure 5. As Figure 4, for LiBI and for our variant.",
}


def introduction(protocol: Protocol) -> str:
    return _INTRODUCTION.format(
        name=protocol.name, sets=len(protocol.seeds), seeds=f"{protocol.seeds[0]} to {protocol.seeds[-1]}",
        rows=protocol.rows, samples=protocol.samples, neighbours=published.NEIGHBOURS, repetitions=protocol.repetitions,
    )  # fmt: skip


def closed_forms_text() -> str:
    paragraphs = (" ".join(part.split()) for part in _CLOSED_FORMS.strip().split("\n\n"))
    printed = {"printed_truth": published.OBJECTIVE_AT_TRUTH, "printed_optimum": published.OBJECTIVE_AT_OPTIMUM}
    return "\n\n".join(paragraphs).format(**closed_forms.worked_example(), **printed)


def claims() -> str:
    example = closed_forms.worked_example()
    gap = example["log-likelihood of the truth"] - example["log-likelihood of the optimum"]
    return _CLAIMS.format(gap=gap, printed=published.TABLE1["VAE", "Gaussian"][published.LOG_LIKELIHOOD].mean)
