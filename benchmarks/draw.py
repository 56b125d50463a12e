"""DRAW on dynamically binarized MNIST within a time budget, and what a step of it costs.

    PYROVAE_DATA=… python benchmarks/draw.py --minutes 45 [--attention 5 5] [--out benchmarks/results/draw.jsonl]
    PYROVAE_DATA=… python benchmarks/draw.py --cost

One optimiser, `Trace_ELBO` with one particle, images drawn anew from the grey values at every step. The budget is `--minutes`
of a core, that is of the one thread's processor time, or `--wall` minutes on the clock, whichever ends first: on a shared
machine the two differ. The learning rate follows it: up over the first 3 %, then down a cosine to zero at the end. Written at
each epoch: both times, mean training loss over the epoch, and −ELBO on the whole test set, binarized by a fixed seed, one draw
of the latents a row. Evaluation and writing count towards neither. `--bfloat16` has training multiply in that type; evaluation
is in float32 always.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyrovae import data
from pyrovae.guides.draw import DRAWGuide
from pyrovae.models.draw import DRAW
from pyrovae.ops import isolated_rng

WARM_UP = 0.03


def main(o: argparse.Namespace) -> None:
    """Train and write the curve."""
    train, test = (data.load("mnist", split=split) for split in (o.split, "test"))
    test = fixed_binary(test)
    torch.manual_seed(o.seed)
    model = DRAW(784, o.latent, o.hidden, o.steps, attention=tuple(o.attention) if o.attention else None)
    model.initialize_bias(fixed_binary(train))
    guide = DRAWGuide(model, hidden=o.hidden)
    nets = nn.ModuleList([model, guide])
    settings = {
        **{k: v for k, v in vars(o).items() if k not in ("out", "weights", "picture", "cost", "turns")},
        "parameters": sum(p.numel() for p in nets.parameters()),
        "rows": len(train),
        "torch": torch.__version__,
    }
    write(o.out, {"settings": settings})
    optimizer = torch.optim.Adam(nets.parameters(), lr=o.lr, fused=True)
    elbo, done, wall, core, epoch, clipped = Trace_ELBO(), 0.0, 0.0, 0.0, 0, 0
    while done < 1:
        total, seen, epoch = 0.0, 0, epoch + 1
        for rows in torch.randperm(len(train)).split(o.batch):
            clock, cpu = time.perf_counter(), time.process_time()
            for group in optimizer.param_groups:
                group["lr"] = o.lr * schedule(done)
            x = torch.bernoulli(train[rows])
            with precision(on=o.bfloat16):
                loss = elbo.differentiable_loss(model, guide, x) / len(x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(nets.parameters(), o.clip))
            if not math.isfinite(norm):
                raise FloatingPointError(f"expected a finite gradient, got norm {norm} in epoch {epoch}")
            optimizer.step()
            total, seen, clipped = total + float(loss.detach()) * len(x), seen + len(x), clipped + (norm > o.clip)
            wall, core = wall + time.perf_counter() - clock, core + time.process_time() - cpu
            done = max(core / (60 * o.minutes), wall / (60 * o.wall))
            if done >= 1:
                break
        row = {
            "seconds": round(wall, 1),
            "core_seconds": round(core, 1),
            "epoch": epoch - 1 + seen / len(train),
            "train": total / seen,
            "clipped": clipped,
        }
        write(o.out, {**row, "test": evaluate(model, guide, test)})
        torch.save({"model": model.state_dict(), "guide": guide.state_dict(), "config": model.config}, o.weights)
    passes = [evaluate(model, guide, test, seed) for seed in range(5)]
    write(o.out, {"final": {"test": statistics.mean(passes), "passes": passes, **row}})
    picture(model, o.picture)


def schedule(done: float) -> float:
    """The learning rate's factor when a share `done` of the budget is used."""
    return done / WARM_UP + 0.01 if done < WARM_UP else 0.5 + 0.5 * math.cos(math.pi * min((done - WARM_UP) / (1 - WARM_UP), 1))


def fixed_binary(x: Tensor) -> Tensor:
    """Images drawn once from the grey values, by a seed of their own."""
    with isolated_rng(20150216):
        return torch.bernoulli(x)


@torch.no_grad()
def evaluate(model: DRAW, guide: DRAWGuide, x: Tensor, seed: int = 0) -> float:
    """Mean −ELBO in nats, one draw of the latents a row by a seed of their own; the random state stays."""
    with isolated_rng(seed):
        return sum(Trace_ELBO().loss(model, guide, part) for part in x.split(500)) / len(x)


@contextlib.contextmanager
def precision(*, on: bool) -> Iterator[None]:
    """Products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        yield


def by_hand(model: DRAW, guide: DRAWGuide, x: Tensor) -> Tensor:
    """The loss without Pyro, for DRAW without attention: what a step must cost at least, the decoder run once."""
    d, e = model.decoder, guide.encoder
    assert e.image is not None
    constant, loss = e.image(x), x.new_zeros(())
    canvas, hd, cd, he, ce = (v.expand(len(x), -1) for v in (d.canvas, d.hidden, d.cell, e.hidden, e.cell))
    for _ in range(model.steps):
        he, ce = cell(e.gates(torch.cat([x - torch.sigmoid(canvas), hd, he], -1)).to(x) + constant, ce)
        loc, log_scale = e.head(he).to(x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        loss = loss + (0.5 * (z.square() - noise.square()) - log_scale).sum()
        hd, cd = cell(d.gates(torch.cat([z, hd], -1)).to(x), cd)
        canvas = canvas + d.write(hd)
    return loss + nn.functional.binary_cross_entropy_with_logits(canvas.to(x), x, reduction="sum")


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """An LSTM's step after its product."""
    f, i, o, g = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def cost(o: argparse.Namespace) -> None:
    """Milliseconds of processor time of a gradient step, Pyro's and by hand, in turn."""
    torch.manual_seed(o.seed)
    model = DRAW(784, o.latent, o.hidden, o.steps)
    guide = DRAWGuide(model, hidden=o.hidden)
    nets = nn.ModuleList([model, guide])
    optimizer = torch.optim.Adam(nets.parameters(), lr=0.0, fused=True)
    x = torch.bernoulli(torch.full((o.batch, 784), 0.13))
    elbo = Trace_ELBO()
    ways: dict[str, Callable[[], Any]] = {
        "Trace_ELBO": lambda: elbo.differentiable_loss(model, guide, x),
        "by hand": lambda: by_hand(model, guide, x),
    }
    times: dict[str, list[float]] = {f"{way}{kind}": [] for kind in ("", ", bfloat16") for way in ways}
    for turn in range(o.turns + 1):
        for name, found in times.items():
            start = time.process_time()
            with precision(on="bfloat16" in name):
                loss = ways[name.split(",")[0]]() / len(x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(nets.parameters(), o.clip)
            optimizer.step()
            if turn:
                found.append(1e3 * (time.process_time() - start))
    rows = {name: {"median": statistics.median(found), "least": min(found)} for name, found in times.items()}
    print(json.dumps({"batch": o.batch, "latent": o.latent, "milliseconds": rows}))


def picture(model: DRAW, path: str) -> None:
    """Means of 64 images from the prior."""
    from torchvision.utils import save_image

    save_image(model.sample(64, mean=True).view(-1, 1, 28, 28), path, nrow=8)


def write(path: str, row: dict[str, Any]) -> None:
    """Append a line, and show it."""
    line = json.dumps(row)
    print(line, flush=True)
    with Path(path).open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"latent": 20, "hidden": 256, "steps": 10, "batch": 200, "seed": 0, "turns": 20}
    rates = {"minutes": 45.0, "wall": 120.0, "lr": 2e-3, "clip": 5.0}
    files = {"out": "benchmarks/results/draw.jsonl", "weights": "draw.pt", "picture": "draw.png"}
    for name, default in {**sizes, **rates, **files, "split": "train"}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--attention", type=int, nargs=2)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--cost", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    (cost if options.cost else main)(options)
