"""The command line: ``libi-fast fit | evaluate | sample | encode | doctor | demo | reproduce``.

Bad input (InputError) and a disk that refuses (OSError) end in one line on stderr and exit code 2; any other exception
is a bug and keeps its traceback. Outputs are checked before the work and appear whole or not at all.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from libi_fast.errors import InputError

# Options that not every method has. The names are libi_fast.METHODS', written out because importing torch takes a second.
OWN_OPTIONS = {
    "libi": (
        "hz_weight", "covariance_tolerance", "mean_tolerance", "repeats", "step1", "step2", "mutual_information",
        "train_samples",
    ),
    "vae": ("beta",),
    "beta-vae": ("beta",),
    "annealing": ("beta",),
    "lagging": ("beta", "segments"),
    "iwae": ("train_samples",),
}  # fmt: skip
REPRODUCED = ("table1", "figure1", "figure2", "figure3", "figure4", "figure5", "ablations", "all")
PARETO_LIMIT = 0.7  # above it the weights' tail is too heavy to trust the estimate (Vehtari et al., arXiv 1507.02646)
FIT_OPTIONS = ("epochs", "restarts", "survivors", "batch_size", "learning_rate", "tolerance", "log_dir")
LARGE_FILE = 2**30  # bytes of a .npy file that evaluate reads as it goes along


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 (bad input, or the disk refused), 130 (interrupted)."""
    alike = True
    try:
        options = _parser().parse_args(arguments)
        alike = options.run is not _reproduce
        with _processes(options):
            options.run(options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader (head, less) has left; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError, FloatingPointError) as error:  # the last: training that diverged
        if os.environ.get("RANK", "0") == "0" or not alike:  # where torchrun's others do the same, they say the same
            print(f"libi-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"libi-fast: interrupted, {stop if stop.args else 'nothing was written'}", file=sys.stderr)
        return 130


@contextmanager
def _processes(options: argparse.Namespace) -> Iterator[None]:
    """Where torchrun started several of this program, fit and evaluate share the rows and the first alone speaks and writes."""
    options.first = True
    if "TORCHELASTIC_RUN_ID" not in os.environ or options.run not in (_fit, _evaluate):
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    options.first = dist.get_rank() == 0
    if not options.first:
        options.quiet = True
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


# --- commands; torch is imported in them, so that --help and --version answer at once ---


def _fit(options: argparse.Namespace) -> None:
    import torch

    from libi_fast import console, data, runs

    console.require_tables()
    runs.check_target(options.out, force=options.force)
    checkpoint = _checkpoint(options)
    bernoulli = options.likelihood == "bernoulli"
    _check_options_fit_together(options)
    bounds = (0.0, 1.0) if bernoulli else None
    # float64: columns are centred before they are rounded to the model's dtype.
    dataset = data.load(options.data, options.data_seed, dtype=torch.float64, key=options.key, bounds=bounds)
    method = _new_method(options, data_dim=len(dataset.columns))
    try:
        method.fit(
            dataset.train,
            dataset.validation,
            seed=options.seed,
            checkpoint=checkpoint,
            resume=options.resume,
            standardize=not (bernoulli or options.no_standardize),
            columns=dataset.columns,
            progress=not options.quiet,
            early_stopping=not options.no_early_stopping,
            **{name: getattr(options, name) for name in FIT_OPTIONS},
        )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(*[f"go on with --resume ({checkpoint})"] if checkpoint.exists() else []) from stop
    notes: dict[str, Any] = {
        "name": dataset.name,
        "rows": {part: len(getattr(dataset, part)) for part in ("train", "validation", "test")},
        "seed": options.data_seed,
    }
    try:
        result = _log_likelihood(method, dataset.test, options)
        notes["test"] = _summary(result)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{options.out} was written without an evaluation") from stop
    finally:  # whatever happens to the evaluation, the training is kept
        if options.first:
            runs.save(method, options.out, force=options.force, data=notes)
    if not options.quiet:
        title = f"{type(method).__name__} on {dataset.name}: {len(dataset.test)} held-out rows"
        _print_likelihood(title, result, options, caption=f"run folder: {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    import torch

    from libi_fast import console, data

    console.require_tables()
    if options.per_row is not None:
        data.check_output(options.per_row, force=options.force)
    method, columns = _load_run(options.run_folder)
    x = _read_rows(options, columns, method)
    result = _log_likelihood(method, x, options)
    if not options.first:
        return
    if options.per_row is not None:
        names = ["log_likelihood", "standard_error", "effective_sample_size", "pareto_k"]
        values = torch.stack([getattr(result, name).double().cpu() for name in names], 1)
        data.save_table(options.per_row, values, names, force=options.force)
    title = f"{type(method).__name__} in {options.run_folder}, on {options.data}: {len(x)} rows"
    _print_likelihood(title, result, options, caption=f"per row: {options.per_row}" if options.per_row else None)


def _sample(options: argparse.Namespace) -> None:
    from libi_fast import data

    data.check_output(options.out, force=options.force)
    method, columns = _load_run(options.run_folder)
    data.save_table(options.out, method.sample(options.n, seed=options.seed), columns, force=options.force)


def _encode(options: argparse.Namespace) -> None:
    import torch

    from libi_fast import data

    data.check_output(options.out, force=options.force)
    method, columns = _load_run(options.run_folder)
    with torch.no_grad():
        q = method.posterior(_read_rows(options, columns, method))
    mean, deviation = q.expectation(), q.standard_deviations()
    names = [f"z{i + 1}" for i in range(mean.shape[1])]
    values = torch.cat([mean, deviation], 1)
    data.save_table(options.out, values, [*names, *(f"{name}_sd" for name in names)], force=options.force)


def _doctor(options: argparse.Namespace) -> None:
    from libi_fast import doctor

    for line in doctor.report():
        print(line)


def _demo(options: argparse.Namespace) -> None:
    from libi_fast import demo

    demo.run(options.out, seed=options.seed, force=options.force, progress=not options.quiet)


def _reproduce(options: argparse.Namespace) -> None:
    from libi_fast.reproduce import run

    seconds = None if options.minutes is None else 60 * options.minutes
    run(
        options.what, options.protocol, options.out, seconds, options.device, not options.quiet, options.first_seed,
        options.methods, options.datasets,
    )  # fmt: skip


# --- their parts ---


def _checkpoint(options: argparse.Namespace) -> Path:
    """Beside the run folder, which appears once training has ended."""
    file = Path(f"{Path(options.out)}.checkpoint")
    if file.exists() and not options.resume:
        if not options.force:
            raise InputError(f"{file} holds a fit that was interrupted: go on with --resume, or begin anew with --force")
        file.unlink(missing_ok=True)
    return file


def _check_options_fit_together(options: argparse.Namespace) -> None:
    """An option that would do nothing is a mistake to be told, not to be ignored."""
    for name in sorted({name for names in OWN_OPTIONS.values() for name in names}):
        if name not in OWN_OPTIONS[options.method] and getattr(options, name) is not None:
            owners = " or ".join(method for method, names in OWN_OPTIONS.items() if name in names)
            raise InputError(f"--{name.replace('_', '-')} belongs to --method {owners}, not to {options.method}")
    if options.likelihood == "bernoulli" and options.noise_variance is not None:
        raise InputError("--noise-variance belongs to --likelihood gaussian, not to bernoulli")


def _new_method(options: argparse.Namespace, data_dim: int) -> Any:
    import torch

    import libi_fast as lf

    dtype = getattr(torch, options.dtype)
    hidden = [width for widths in options.hidden or [[50]] for width in widths]
    decoder = lf.mlp(options.latent_dim, hidden, data_dim, options.activation)
    network = lf.mlp(data_dim, hidden, 2 * options.latent_dim, options.activation)
    likelihood: lf.Likelihood
    if options.likelihood == "bernoulli":
        likelihood = lf.Bernoulli()
    elif options.noise_variance is not None:
        likelihood = lf.Gaussian(options.noise_variance)
    else:
        likelihood = lf.DiagonalGaussian(torch.ones(data_dim), learned=True)
    model = lf.LatentVariableModel(decoder, likelihood, options.latent_dim).to(dtype)
    q = lf.MeanFieldGaussian(network).to(dtype)
    settings = {name: value for name in OWN_OPTIONS[options.method] if (value := getattr(options, name)) is not None}
    if "mutual_information" in settings:
        settings["constraints"] = [lf.MutualInformation(at_least=settings.pop("mutual_information"))]
    if "train_samples" in settings:
        settings["num_samples"] = settings.pop("train_samples")
    return lf.METHODS[options.method](model, inference=q, **settings)


def _load_run(folder: str) -> tuple[Any, list[str]]:
    """The method in a run folder, and the names of the columns that it was fitted to."""
    from libi_fast import data, runs

    method = runs.load(folder)
    if method.columns is not None:
        return method, list(method.columns)
    return method, data.default_columns(method.sample(1, seed=0).shape[1])


def _read_rows(options: argparse.Namespace, columns: Sequence[str], method: Any) -> Any:
    """All rows of a file, or the test rows of a named set, as [N, D] in the run's columns and dtype."""
    import torch

    from libi_fast import data

    name = data.find_name(options.data)
    try:
        if name is not None:
            x = data.load(name, options.data_seed, dtype=torch.float64)
            table = data.Table(x.test.numpy(), x.columns, named=True)
        else:
            if _is_large(options):
                return data.map_rows(options.data, len(columns))
            table = data.load_table(options.data, key=options.key, min_rows=1)
            if method.model.likelihood.name == "bernoulli":
                table.check_bounds(0.0, 1.0)
        return torch.from_numpy(table.select(columns).values)  # float64, as in fit
    except InputError as error:
        known = str(error).startswith(str(options.data))
        raise InputError(str(error) if known else f"{options.data}: {error}") from error


def _is_large(options: argparse.Namespace) -> bool:
    """Whether a file is read block by block rather than whole (without names of columns, .npy has none)."""
    path = Path(options.data)
    return options.run is _evaluate and path.suffix.lower() == ".npy" and path.stat().st_size >= LARGE_FILE


def _log_likelihood(method: Any, x: Any, options: argparse.Namespace) -> Any:
    return method.log_likelihood(
        x, num_samples=options.num_samples, variance_inflation=options.variance_inflation, seed=options.seed
    )


def _summary(result: Any) -> dict[str, Any]:
    """The means that describe an estimate of N rows. Of one row there is no standard error over rows: None."""
    values = result.log_likelihood.double()
    n = len(values)
    return {
        "rows": n,
        "log_likelihood": float(values.mean()),
        "standard_error": float(values.std() / n**0.5) if n > 1 else None,
        "monte_carlo_error": float(result.standard_error.double().square().sum().sqrt() / n),
        "median_effective_sample_size": float(result.effective_sample_size.double().median()),
        "share_pareto_k_below_0.7": float((result.pareto_k < PARETO_LIMIT).double().mean()),
    }


def _print_likelihood(title: str, result: Any, options: argparse.Namespace, caption: str | None) -> None:
    from libi_fast.console import print_table

    s = _summary(result)
    error = "" if s["standard_error"] is None else f" +- {s['standard_error']:.3f}"
    rows = [
        ("log-likelihood per row, nats", f"{s['log_likelihood']:.3f}{error}"),
        ("its Monte Carlo error", f"{s['monte_carlo_error']:.3f}"),
        ("median effective sample size", f"{s['median_effective_sample_size']:.0f} of {options.num_samples}"),
        ("rows with Pareto k < 0.7", f"{100 * s['share_pareto_k_below_0.7']:.1f}%"),
    ]
    print_table(title, ["in the data's own units", ""], rows, caption)


# --- arguments ---


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as all others of this program."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"libi-fast: error: {message} (see {self.prog} --help)\n")


def _whole(least: int) -> Any:
    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        return value

    convert.__name__ = "whole number"  # argparse names the type by it
    return convert


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


_positive.__name__ = "number"


def _widths(text: str) -> list[int]:
    """``50,50`` as [50, 50]; an empty text as [], a linear map."""
    return [_whole(1)(part) for part in text.split(",") if part.strip()]


_widths.__name__ = "list of widths"


def _add_estimate(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the estimate of the log-likelihood")
    group.add_argument("--num-samples", type=_whole(2), default=5000, metavar="S", help="samples a row (default 5000)")
    group.add_argument(
        "--variance-inflation", type=_positive, default=2.0, metavar="V", help="of q as the proposal (default 2)"
    )


def _add_rows(command: argparse.ArgumentParser) -> None:
    command.add_argument("--key", help="which array of an .npz file")
    command.add_argument("--data-seed", type=_whole(0), default=0, help="of a named data set: its draw or its split")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="libi-fast", description="Latent variable models by likelihood before inference (LiBI).")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    source = "a .csv, .npy, .npz or .parquet file, or a named set: LinearJTEx, CubicJTEx, Gaussian, Mobius, digits, wine"

    fit = commands.add_parser("fit", help="fit a model to data and write a run folder")
    fit.add_argument("data", metavar="DATA", help=source)
    fit.add_argument("--out", required=True, metavar="RUN", help="the run folder to write")
    fit.add_argument("--force", action="store_true", help="replace a run folder that is there")
    fit.add_argument("--resume", action="store_true", help="go on where an interrupted fit stopped (RUN.checkpoint), if it did")
    fit.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    fit.add_argument("--method", choices=list(OWN_OPTIONS), default="libi")
    model = fit.add_argument_group("the model")
    model.add_argument("--likelihood", choices=("gaussian", "bernoulli"), default="gaussian")
    model.add_argument(
        "--noise-variance",
        type=float,
        metavar="V",
        help="hold the gaussian noise at V, in the units of the model (default: one learned variance a column)",
    )
    model.add_argument("--latent-dim", type=_whole(1), default=2, metavar="L")
    model.add_argument(
        "--hidden",
        type=_widths,
        action="append",
        metavar="WIDTHS",
        help="hidden layers of decoder and inference network: 50,50 or --hidden 50 --hidden 50 (default 50)",
    )
    model.add_argument("--activation", default="tanh", help="tanh, relu, ... (default tanh)")
    model.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    model.add_argument("--no-standardize", action="store_true", help="leave the columns' means and scales as they are")
    training = fit.add_argument_group("training")
    training.add_argument("--epochs", type=_whole(1), default=3000, help="passes over the rows in all (default 3000)")
    training.add_argument(
        "--restarts",
        type=_whole(1),
        default=1,
        help="trained side by side, the best on validation rows kept (default 1)",
    )
    training.add_argument("--survivors", type=_whole(1), help="restarts that train to the end, the others drop out early")
    training.add_argument("--batch-size", type=_whole(1), help="rows a step (default: all)")
    training.add_argument("--learning-rate", type=float, default=0.01, help="Adam's (default 0.01)")
    training.add_argument("--no-early-stopping", action="store_true", help="end each phase with its last step")
    training.add_argument("--tolerance", type=float, help="stop early once the objective falls by no more than this")
    training.add_argument("--seed", type=_whole(0), default=0, help="of the weights and the training (default 0)")
    training.add_argument("--hz-weight", type=float, help="libi: weight of the Henze-Zirkler penalty")
    training.add_argument("--covariance-tolerance", type=float, help="libi: of the codes' covariance")
    training.add_argument("--mean-tolerance", type=float, help="libi: of the codes' mean")
    training.add_argument("--repeats", type=_whole(1), help="libi: repetitions of steps 1 to 3")
    training.add_argument("--step1", choices=("joint", "importance", "quadrature"), help="libi: what step 1 maximises")
    steps = ("elbo", "importance", "posterior", "elbo+posterior")
    training.add_argument("--step2", choices=steps, help="libi: what step 2 maximises")
    training.add_argument("--mutual-information", type=_positive, metavar="NATS", help="libi: I(X;Z) is to be at least this")
    training.add_argument("--beta", type=float, help="beta-vae (default 4), vae, annealing, lagging (1): weight of the KL term")
    training.add_argument("--segments", type=_whole(1), help="lagging: segments in which phi alone learns first")
    training.add_argument("--train-samples", type=_whole(1), help="iwae, libi by importance: samples of the bound")
    training.add_argument("--log-dir", metavar="FOLDER", help="write TensorBoard's event files there")
    _add_rows(fit)
    _add_estimate(fit)
    fit.set_defaults(run=_fit)

    evaluate = commands.add_parser("evaluate", help="log-likelihood of data under a run")
    evaluate.add_argument("run_folder", metavar="RUN")
    evaluate.add_argument("data", metavar="DATA", help=f"{source} (its test rows)")
    evaluate.add_argument("--per-row", metavar="FILE", help="write one line a row: log-likelihood, its error, ESS, k")
    evaluate.add_argument("--force", action="store_true", help="replace FILE")
    evaluate.add_argument("--seed", type=_whole(0), default=0, help="of the estimate (default 0)")
    _add_rows(evaluate)
    _add_estimate(evaluate)
    evaluate.set_defaults(run=_evaluate)

    sample = commands.add_parser("sample", help="draw new rows from a run")
    sample.add_argument("run_folder", metavar="RUN")
    sample.add_argument("-n", type=_whole(1), required=True, help="how many rows")
    sample.add_argument("-o", "--out", required=True, metavar="FILE", help=".csv, .npy, .npz or .parquet")
    sample.add_argument("--seed", type=_whole(0), default=0, help="(default 0)")
    sample.add_argument("--force", action="store_true", help="replace FILE")
    sample.set_defaults(run=_sample)

    encode = commands.add_parser("encode", help="codes of data under a run: means z1.. and standard deviations z1_sd..")
    encode.add_argument("run_folder", metavar="RUN")
    encode.add_argument("data", metavar="DATA", help=f"{source} (its test rows)")
    encode.add_argument("-o", "--out", required=True, metavar="FILE", help=".csv, .npy, .npz or .parquet")
    encode.add_argument("--force", action="store_true", help="replace FILE")
    _add_rows(encode)
    encode.set_defaults(run=_encode)

    doctor = commands.add_parser("doctor", help="what this installation has and lacks")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="LiBI beside a converged VAE on LinearJTEx, in under 3 minutes")
    demo.add_argument("--out", default="demo-run", metavar="FOLDER", help="(default demo-run)")
    demo.add_argument("--seed", type=_whole(0), default=0, help="of the data (default 0)")
    demo.add_argument("--force", action="store_true", help="replace an earlier demo")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)

    reproduce = commands.add_parser("reproduce", help="the paper's Table 1 and Figures 1 to 5, and ours beside them")
    reproduce.add_argument("what", choices=REPRODUCED, help="all: everything in one HTML report")
    reproduce.add_argument(
        "--protocol",
        choices=("quick", "paper", "smoke"),
        default="quick",
        help="quick: one setting a method; paper: the full grids; smoke: does it run",
    )
    reproduce.add_argument("--out", default="reproduce-run", metavar="FOLDER", help="what is done lies there (%(default)s)")
    reproduce.add_argument("--minutes", type=_positive, metavar="M", help="begin no piece after that; the same command goes on")
    reproduce.add_argument("--device", default="cpu", help="to train on (default cpu)")
    reproduce.add_argument("--methods", nargs="+", metavar="NAME", help="with table1, these rows alone: VAE, LiBI, ours ...")
    reproduce.add_argument("--datasets", nargs="+", metavar="NAME", help="with table1 and ablations: LinearJTEx, ...")
    reproduce.add_argument("--first-seed", type=_whole(0), metavar="N", help="other data sets: of seeds N, N + 1 and so on")
    reproduce.add_argument("--quiet", action="store_true", help="no progress, only results")
    reproduce.set_defaults(run=_reproduce)
    return parser


class _Version(argparse.Action):
    """Prints the version when asked, and looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *ignored: Any, **also_ignored: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"libi-fast {version('libi-fast')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
