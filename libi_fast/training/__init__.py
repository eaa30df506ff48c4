"""LiBI and its rivals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from libi_fast.errors import InputError
from libi_fast.models.likelihoods import likelihood_from_config
from libi_fast.models.model import LatentVariableModel, MeanFieldGaussian
from libi_fast.models.networks import build
from libi_fast.models.proposals import inference_from_config
from libi_fast.training.constraints import constraint_from_config
from libi_fast.training.grid import fit_grid
from libi_fast.training.inference import fit_inference
from libi_fast.training.libi import LiBI
from libi_fast.training.method import Method
from libi_fast.training.vae import IWAE, VAE, LaggingVAE

__all__ = ["CLASSES", "IWAE", "METHODS", "VAE", "LaggingVAE", "LiBI", "Method", "fit_grid", "fit_inference", "from_config"]

CLASSES: dict[str, type[Method]] = {m.name: m for m in (LiBI, VAE, LaggingVAE, IWAE)}

METHODS: dict[str, Callable[..., Method]] = {
    "libi": LiBI,
    "vae": VAE,
    "beta-vae": partial(VAE, beta=4.0),
    "annealing": partial(VAE, anneal=True),
    "lagging": LaggingVAE,
    "iwae": IWAE,
}
"""Every system of the paper, and IWAE, by its name on the command line: ``METHODS[name](model, inference, **settings)``."""


def from_config(
    config: dict[str, Any], decoder: torch.nn.Module | None = None, network: torch.nn.Module | None = None
) -> Method:
    """The method that ``Method.config()`` describes, with fresh weights.

    Args:
        decoder, network: needed where the saved ones were modules of a user's own.

    Raises:
        InputError: an unknown method, or a module of a user's own that was not passed.
    """
    from libi_fast.data import Standardizer

    if config["method"] not in CLASSES:
        raise InputError(f"unknown method {config['method']!r}; known: {', '.join(CLASSES)}")
    dtype = getattr(torch, config["dtype"])

    def module(described: Any, given: torch.nn.Module | None, what: str) -> torch.nn.Module:
        if given is not None:
            return given
        if "custom" in described:
            raise InputError(f"the {what} was a module of your own ({described['custom']}): pass it as {what}=")
        return build(described).to(dtype)

    m = config["model"]
    likelihood = likelihood_from_config(m["likelihood"], dtype)
    model = LatentVariableModel(module(m["decoder"], decoder, "decoder"), likelihood, m["latent_dim"])
    kind = config.get("inference_model", {"name": MeanFieldGaussian.name})  # run folders of before there were others
    inference = inference_from_config(kind, module(config["inference"], network, "network"))
    settings = dict(config["settings"])
    if "constraints" in settings:
        made = [(c, constraint_from_config(c)) for c in settings["constraints"]]
        own = [str(c.get("custom", c.get("name"))) for c, constraint in made if constraint is None]
        if own:  # they played their part in training, which has ended
            warnings.warn(f"without the constraints of your own: {', '.join(own)}", stacklevel=3)
        settings["constraints"] = [constraint for _, constraint in made if constraint is not None]
    method = CLASSES[config["method"]](model, inference, **settings)
    saved = config.get("standardizer")
    method.standardizer = None if saved is None else Standardizer.from_config(saved)
    method.columns = config.get("columns")
    return method
