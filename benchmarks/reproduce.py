"""Published figures of autoencoders on MNIST, and ours beside them.

    PYROVAE_DATA=... python benchmarks/reproduce.py                  # lists the rows
    PYROVAE_DATA=... python benchmarks/reproduce.py tutorial gaussian --epochs 10

Each row trains one model through `Variational`, judges it with `evaluate` on the 10,000 test images, with hard latents, and
appends what it found to `benchmarks/results/reproduce.jsonl`; the table beside it, `reproduce.md`, is written anew from that
file. Records of the run go to `benchmarks/results/curves/` as it proceeds. The test images are never used to choose anything:
the last weights are judged.

Grey images are those of the files; their cross-entropy is no likelihood. `dynamic` draws training bits afresh at every step and
judges one seeded draw of the test images; `fixed` draws all bits once, by our seed, not Larochelle's files.

References:
    Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017)
    https://arxiv.org/abs/1611.01144
    Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015)
    https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from peers import torch_categorical_vae
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyrovae import data
from pyrovae.diagnostics import evaluate
from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Variational
from pyrovae.inference.fit import versions
from pyrovae.models import BernoulliVAE, CategoricalVAE, GaussianVAE

RESULTS = Path(__file__).parent / "results"
SEED_OF_DATA = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure.

    Attributes:
        what: nets and method, for the table.
        reference: the figure to compare with, and whose it is.
        model: makes the model.
        encoder: makes the encoder; None takes the decoder's mirror image.
        data: "grey", "dynamic" or "fixed".
        train: the first so many of the 60,000 training images; "train" is the seeded 50,000.
        gradient: "pathwise", "reinmax", "straight_through" or "soft".
        epochs: passes over the training images.
        lr: the highest learning rate of the one-cycle schedule.
        particles: draws a datum of a training step.
    """

    what: str
    reference: str
    model: Callable[[], Any]
    encoder: Callable[[Any], nn.Module] | None = None
    data: str
    train: str = "all 60,000"
    gradient: str
    epochs: int
    lr: float = 3e-3
    particles: int = 4


TUTORIAL = partial(CategoricalVAE, likelihood="cross_entropy")
JANG_CATEGORICAL = partial(CategoricalVAE, latents=20, hidden=(200,))
BURDA = partial(GaussianVAE, latent=50, hidden=(200, 200), activation=nn.Tanh)

ROWS: dict[str, Row] = {
    "tutorial": Row(
        what="CategoricalVAE 784-512-256-30x10, ReLU; our recipe",
        reference="tutorial-by-hand after as many epochs; goals 118 (10 epochs) and 106 (30)",
        model=TUTORIAL,
        data="grey",
        gradient="reinmax",
        epochs=10,
    ),
    "jang-bernoulli": Row(
        what="BernoulliVAE 784-200-784, linear",
        reference="105.0, Jang et al. table 1, Gumbel-Softmax",
        model=BernoulliVAE,
        data="fixed",
        train="train",
        gradient="reinmax",
        epochs=100,
    ),
    "jang-categorical": Row(
        what="CategoricalVAE 784-(20x10)-200-784, linear encoder, ReLU decoder",
        reference="101.5, Jang et al. table 1, Gumbel-Softmax",
        model=JANG_CATEGORICAL,
        encoder=lambda model: nn.Linear(784, 200),
        data="fixed",
        train="train",
        gradient="reinmax",
        epochs=100,
    ),
    "gaussian": Row(
        what="GaussianVAE 784-200-200-50, tanh",
        reference="log p(x) -86.76, Burda et al. table 1, k = 1, 3280 epochs",
        model=BURDA,
        data="dynamic",
        gradient="pathwise",
        epochs=230,
        particles=1,
    ),
} | {
    f"{name}-{gradient}": Row(
        what=f"{title}; {words}",
        reference="",
        model=model,
        data="dynamic",
        gradient=gradient,
        epochs=15,
    )
    for name, title, model in (
        ("categorical", "CategoricalVAE 784-512-256-30x10, ReLU", CategoricalVAE),
        ("bernoulli", "BernoulliVAE 784-512-256-200, ReLU", partial(BernoulliVAE, hidden=(512, 256))),
    )
    for gradient, words in (
        ("reinmax", "ReinMax"),
        ("straight_through", "straight-through Gumbel-softmax, temperature 1 to 0.5"),
        ("soft", "soft Gumbel-softmax, temperature 1 to 0.5"),
    )
}
BY_HAND = "tutorial-by-hand"
READING = (
    "",
    "Readings. The recipe was chosen on the tutorial's test images, see `recipe.md`. Budgets are 3 to 230 epochs,",
    "where the papers took hundreds or thousands; the rate of each run ends at zero, so that a longer run is another one, not",
    "a continuation. Of Jang et al.'s nets, and of the number of draws behind these rows, we know what their table says: ours",
    "are the most literal reading, with a fixed uniform prior. For the categorical net our single-draw bound and our `K`",
    "columns lie on either side of theirs. For the linear one, 105.0 as a single-draw bound is beyond what others report:",
    "111.3 on training images after 2 million steps (Concrete, in the table of Grathwohl et al., 2018), 107.3 as a",
    "50,000-draw likelihood (Maddison et al., 2017). `relaxed densities` is far off for nets trained with the categories' KL:",
    "the relaxed KL of a latent that is sure grows with its logits, where that of the categories ends at log 10.",
)
DEFAULT = (
    BY_HAND,
    "tutorial",
    "jang-bernoulli",
    "jang-categorical",
    "gaussian",
    *(name for name in ROWS if name.startswith(("categorical", "bernoulli"))),
)


def run(name: str, epochs: int, seed: int) -> dict[str, Any]:
    """Train and judge a row of `ROWS`."""
    row = ROWS[name]
    x, x_test = images(row)
    torch.manual_seed(seed)
    pyro.enable_validation(is_validate=False)
    model = row.model()
    model.initialize_bias(data.binarize(x) if row.data == "dynamic" else x)
    encoder = None if row.encoder is None else row.encoder(model)
    guide = AmortizedMeanField(model, encoder, example=(x[:2].round(),))
    method = fitting(row, guide, len(x), epochs, curve_file(name, epochs, seed))
    begin = time.perf_counter()
    fit = method.fit(model, x, validation=x_test)
    seconds = time.perf_counter() - begin
    torch.manual_seed(seed)
    temperature = None if row.gradient in ("pathwise", "reinmax") else 0.5
    return {
        "row": name,
        "what": row.what,
        "reference": row.reference,
        "data": row.data,
        "train": row.train,
        "gradient": row.gradient,
        "particles": row.particles,
        "lr": row.lr,
        "epochs": epochs,
        "seconds": seconds,
        "relaxed_training_loss": fit.history[-1]["loss"] / len(x) if row.gradient == "soft" else None,
        "curve": [{key: record[key] for key in ("step", "bound", "validation", "seconds")} for record in fit.history],
        **judged(model, guide, x_test, temperature),
    }


def fitting(row: Row, guide: Any, num_rows: int, epochs: int, log: Path) -> Variational:
    """The recipe: a one-cycle schedule; for discrete latents four draws a datum, and a KL weight that rises from 0.3."""
    steps = epochs * (num_rows // 100)
    gradients: dict[str, dict[str, Any]] = {
        "pathwise": {},
        "reinmax": {"surrogate": "reinmax"},
        "straight_through": {"temperature": lambda step: annealed(step / steps), "straight_through": True},
        "soft": {"temperature": lambda step: annealed(step / steps)},
    }
    return Variational(
        guide,
        TraceMeanField_ELBO(num_particles=row.particles, vectorize_particles=row.particles > 1),
        optim=partial(torch.optim.Adam, lr=row.lr),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, row.lr, total_steps=steps + 1, cycle_momentum=False
        ),
        beta=lambda step: min(1.0, 0.3 + 0.7 * step / (0.3 * steps)),
        preprocess=data.binarize if row.data == "dynamic" else None,
        num_epochs=epochs,
        batch_size=100,
        log_every=num_rows // 100,
        num_log_samples=2,
        log_rows=5000,
        log=log,
        **gradients[row.gradient],
    )


def annealed(done: float) -> float:
    """The temperature when a share of the steps is done: from 1 down to 0.5, where it stays for the last half."""
    return max(0.5, math.exp(-2 * math.log(2) * done))


def run_by_hand(epochs: int, seed: int) -> dict[str, Any]:
    """Train the tutorial's net by a plain PyTorch loop, and judge it both by its own code and by `evaluate`."""
    row = ROWS["tutorial"]
    x, x_test = images(row)
    torch.manual_seed(seed)
    log = curve_file(BY_HAND, epochs, seed)
    log.unlink(missing_ok=True)
    curve = []
    begin = time.perf_counter()

    def after_epoch(epoch: int, loss: float, net: Any) -> None:
        hard = torch_categorical_vae.hard_loss(net, x_test)
        curve.append({"epoch": epoch, "loss": loss, "validation": -hard, "seconds": time.perf_counter() - begin})
        with log.open("a") as file:
            file.write(json.dumps(curve[-1]) + "\n")

    net = torch_categorical_vae.train(x, epochs, after_epoch=after_epoch)
    seconds = time.perf_counter() - begin
    own = torch_categorical_vae.hard_loss(net, x_test, samples=10)
    model = TUTORIAL()
    model.decoder.load_state_dict(net.decoder.state_dict())
    guide = AmortizedMeanField(model, net.encoder, example=(x[:2],))
    return {
        "row": BY_HAND,
        "what": "784-512-256-30x10, ReLU; a plain PyTorch loop: soft samples at temperature 1, Adam 1e-3",
        "reference": "128.5 after 10 epochs, seen before",
        "data": row.data,
        "train": row.train,
        "gradient": "soft",
        "particles": 1,
        "lr": 1e-3,
        "epochs": epochs,
        "seconds": seconds,
        "curve": curve,
        "relaxed_training_loss": curve[-1]["loss"],
        "hard_loss_by_hand": own,
        **judged(model, guide, x_test, None),
    }


def judged(model: Any, guide: Any, x: Tensor, temperature: float | None) -> dict[str, Any]:
    """Bounds on all test rows by a few draws; the likelihood by 5000 on the first rows, and its difference to few on them.

    log p(x) of all rows is then the estimate by few draws plus that mean difference: both are of the same rows, so that the
    difference is known far better than either.
    """
    with torch.no_grad():
        found = evaluate(model, guide, x, num_particles=200 if model.normalized else 10, batch_size=500)
        result: dict[str, Any] = {"bounds": found.summary()}
        if temperature is not None:
            soft = evaluate(model, guide, x, num_particles=10, temperature=temperature, batch_size=500)
            result["bounds"]["relaxed_elbo"] = soft.summary()["relaxed_elbo"]
        if model.normalized:
            first = 200
            many = evaluate(model, guide, x[:first], num_particles=5000, batch_size=10)
            gain = many.log_likelihood - found.log_likelihood[:first]
            result |= {
                "log_likelihood_200": float(found.log_likelihood.mean()),
                "gain_of_5000": float(gain.mean()),
                "gain_of_5000_stderr": float(gain.std() / math.sqrt(first)),
                "gain_of_5000_rows": first,
                "log_likelihood_5000": float(found.log_likelihood.mean() + gain.mean()),
            }
    return result


def images(row: Row) -> tuple[Tensor, Tensor]:
    """Training and test images `[N, 784]`; those to binarize dynamically are grey, their test images drawn once."""
    how = "fixed" if row.data == "fixed" else None
    x = data.load("mnist", split="train" if row.train == "train" else "all", binarize=how, seed=SEED_OF_DATA)
    test = data.load("mnist", split="test", binarize=None if row.data == "grey" else "fixed", seed=SEED_OF_DATA)
    return x[: 50_000 if row.train == "train" else 60_000].clone(), test


def curve_file(name: str, epochs: int, seed: int) -> Path:
    """Where a run's records go."""
    folder = RESULTS / "curves"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{epochs}-{seed}.jsonl"


def write_table() -> None:
    """Write `reproduce.md` from `reproduce.jsonl`; of runs alike the last."""
    runs = {}
    for line in (RESULTS / "reproduce.jsonl").read_text().splitlines():
        found = json.loads(line)
        runs[found["row"], found["epochs"], found["seed"]] = found
    head = [
        "row",
        "what",
        "images",
        "gradient x draws",
        "epochs",
        "hard loss",
        "relaxed, training",
        "relaxed densities",
        "-log p(x), K=200",
        "K=5000",
        "compare with",
        "seconds",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "|".join([":--"] * 4 + ["--:"] * 6 + [":--", "--:"]) + "|"]
    for found in runs.values():
        bounds = found["bounds"]
        analytic = bounds.get("analytic_elbo")
        hard = -(bounds["hard_elbo"] if analytic is None else analytic)
        cells = [
            found["row"],
            found["what"],
            f"{found['data']}, {found['train']}",
            f"{found['gradient'].replace('_', '-')} x {found['particles']}",
            found["epochs"],
            f"{hard:.2f}",
            _number(found.get("relaxed_training_loss")),
            _number(bounds.get("relaxed_elbo"), sign=-1),
            _number(found.get("log_likelihood_200"), sign=-1),
            _number(found.get("log_likelihood_5000"), sign=-1),
            found["reference"],
            f"{found['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    last = list(runs.values())[-1]
    text = [
        "# Published figures, and ours",
        "",
        "Nats a datum, 10,000 test images, lower is better. `hard loss`: -ELBO with hard latents and the KL by its formula",
        "(grey images: cross-entropy + KL, no likelihood). `relaxed, training`: what soft training minimises, soft draws and",
        "the KL of the categories, training images, last epoch. `relaxed densities`: -ELBO of the relaxed programs, densities",
        "and all, temperature 0.5. Neither is a bound of log p(x). `K=200`: importance-weighted bound, all test images;",
        "`K=5000`: the same plus the mean difference between 5000 and 200 draws on the first hundreds of them.",
        "",
        *lines,
        "",
        f"Batch 100; {last['threads']} thread of a shared machine, so that seconds mean little; "
        + ", ".join(f"{name} {version}" for name, version in last["versions"].items())
        + ".",
        "Command: `python benchmarks/reproduce.py <row> --epochs <epochs>`. Curves: `curves/`; everything: `reproduce.jsonl`.",
        *READING,
    ]
    (RESULTS / "reproduce.md").write_text("\n".join(text) + "\n")


def _number(value: float | None, unit: str = "", *, sign: int = 1) -> str:
    return "" if value is None else f"{sign * value:.2f}{unit}"


def main() -> None:
    """Run rows by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=f"all, or some of {', '.join((BY_HAND, *ROWS))}")
    parser.add_argument("--epochs", type=int, help="instead of the row's own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.rows:
        for name in (BY_HAND, *ROWS):
            print(f"{name:<30}{ROWS[name].what if name in ROWS else 'the tutorial by a plain PyTorch loop'}")
        return
    names = DEFAULT if args.rows == ["all"] else args.rows
    if unknown := [name for name in names if name not in (BY_HAND, *ROWS)]:
        raise SystemExit(f"expected rows of {', '.join((BY_HAND, *ROWS))}, got {', '.join(unknown)}")
    for name in names:
        epochs = args.epochs or (10 if name == BY_HAND else ROWS[name].epochs)
        found = run_by_hand(epochs, args.seed) if name == BY_HAND else run(name, epochs, args.seed)
        found |= {
            "seed": args.seed,
            "command": f"python benchmarks/reproduce.py {name} --epochs {epochs} --seed {args.seed}",
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        with (RESULTS / "reproduce.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")
        write_table()
        print(f"{name}: {json.dumps({key: value for key, value in found.items() if key != 'curve'})}", file=sys.stderr)


if __name__ == "__main__":
    main()
