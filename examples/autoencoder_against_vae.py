"""An autoencoder and a VAE on the same nets: one reconstructs better, the other can be drawn from.

With two latent numbers, the probability of an image under either decoder and a standard normal prior is an integral over a
plane, and quadrature gives it. The VAE's bound lies beneath its own; the autoencoder was never told where codes shall lie.

Run: python examples/autoencoder_against_vae.py
"""

import argparse
from pathlib import Path

import matplotlib.patches
import matplotlib.style
import pyro
import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, softplus

from pyrovae.data import load, load_labels
from pyrovae.diagnostics import evaluate
from pyrovae.guides import AmortizedMeanField, embed
from pyrovae.models import AutoEncoder, GaussianVAE

INK, SOFT = "#1c1e21", "#5b6168"


@torch.no_grad()
def log_likelihood(decoder: torch.nn.Module, x: Tensor, step: float) -> Tensor:
    """Log of the integral of N(z; 0, I) p(x | z) over the plane, `[n]`, by the trapezoid rule."""
    line = torch.arange(-6, 6 + step / 2, step, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    log_prior = -0.5 * z.square().sum(-1) - torch.tensor(2 * torch.pi).log()
    parts = []  # of 5000 points, to spare memory
    for part, weight in zip(z.split(5_000), (log_prior + 2 * torch.tensor(step).log()).split(5_000), strict=True):
        logits = decoder(part.to(x)).double()
        parts.append((x.double() @ logits.T - softplus(logits).sum(-1) + weight).logsumexp(-1))
    return torch.stack(parts).logsumexp(0)


def much_above(a: Tensor, b: Tensor) -> bool:
    """Whether paired values of `a` are above those of `b` by more than five standard errors."""
    return bool((a - b).mean() > 5 * (a - b).std() / len(a) ** 0.5)


def main(steps: int, output: Path) -> None:
    """Train both, integrate, check and draw."""
    pyro.set_rng_seed(0)
    x = load("digits", binarize="fixed")
    batches = [x[torch.randint(len(x), (100,))] for _ in range(steps)]

    plain = AutoEncoder(64, 2, (200,))
    plain.initialize_bias(x)
    optimizer = torch.optim.Adam(plain.parameters(), lr=3e-3)
    for batch in batches:
        optimizer.zero_grad()
        plain.loss(batch).mean().backward()
        optimizer.step()

    vae = GaussianVAE(64, 2, (200,))
    vae.initialize_bias(x)
    guide = AmortizedMeanField(vae)
    svi = SVI(vae, guide, pyro.optim.Adam({"lr": 3e-3}), Trace_ELBO())
    for batch in batches:
        svi.step(batch)

    shown = x[:1000]
    with torch.no_grad():
        codes = {"autoencoder": plain.encode(shown), "VAE": embed(guide, shown)["z"]}
        decoders = {"autoencoder": plain.decoder, "VAE": vae.decoder}
        images = {name: torch.sigmoid(decoders[name](z)) for name, z in codes.items()}
        errors = {name: binary_cross_entropy(image, shown, reduction="none").sum(-1) for name, image in images.items()}
    exact = {name: log_likelihood(decoder, shown, 0.07) for name, decoder in decoders.items()}
    found = evaluate(vae, guide, shown, num_particles=200)
    for name in decoders:
        finer = log_likelihood(decoders[name], shown[:100], 0.05)
        assert torch.allclose(exact[name][:100], finer, rtol=0, atol=5e-3), (name, (exact[name][:100] - finer).abs().max())
        error, evidence = float(errors[name].mean()), float(exact[name].mean())
        print(f"{name:>12}: a reconstruction is off by {error:.2f} nats, log p(x) {evidence:.2f}")
    print(f"VAE's bound {float(found.hard_elbo.mean()):.2f}, by 200 weights {float(found.log_likelihood.mean()):.2f}")

    assert much_above(errors["VAE"], errors["autoencoder"]), "the autoencoder reconstructs better"
    assert much_above(exact["VAE"], exact["autoencoder"]), "and is the worse model of images"
    assert not much_above(exact["autoencoder"], exact["VAE"])
    room = 6 * found.hard_stderr  # 1000 rows: a false alarm in a million runs
    assert (found.hard_elbo <= exact["VAE"] + room).all(), "the bound lies beneath the integral"
    assert not (exact["autoencoder"] + room >= found.hard_elbo).all(), "not beneath the other one's"
    few = 5 * float(found.stderr.square().sum().sqrt()) / len(shown)  # on average over the rows, weights come close from below
    assert found.hard_elbo.mean() < found.log_likelihood.mean() <= exact["VAE"].mean() + few
    assert found.log_likelihood.mean() > exact["autoencoder"].mean() + few

    with torch.no_grad():
        draws = {name: torch.sigmoid(decoder(torch.randn(48, 2))) for name, decoder in decoders.items()}
    labels = load_labels("digits")[:1000]
    picture(shown, labels, codes, images, draws, errors, exact).savefig(output)
    print(f"picture in {output}")


def mosaic(rows: Tensor, columns: int) -> Tensor:
    """Images of 8x8 side by side, a white gap between them."""
    tiles = torch.zeros(len(rows), 9, 9)
    tiles[:, :8, :8] = rows.reshape(-1, 8, 8)
    return tiles.reshape(-1, columns, 9, 9).transpose(1, 2).reshape(-1, columns * 9)[:-1, :-1]


def picture(shown: Tensor, labels: Tensor, codes: dict, images: dict, draws: dict, errors: dict, exact: dict) -> Figure:
    """A column a model: reconstructions, where codes lie, what draws from the prior look like."""
    with matplotlib.style.context(Path(__file__).with_name("look.mplstyle")):
        figure = Figure(figsize=(9.6, 10.0))
        panels = figure.subplots(3, 2, gridspec_kw={"height_ratios": (0.95, 3.1, 1.5), "hspace": 0.24, "wspace": 0.06})
        figure.subplots_adjust(left=0.07, right=0.985, top=0.86, bottom=0.01)
        reach = 1.05 * max(2.0, *(float(z.abs().max()) for z in codes.values()))  # every code lies within the frame
        figure.text(0.02, 0.967, "The same nets, as an autoencoder and as a VAE", size=13, weight="bold")
        figure.text(0.02, 0.943, "two latent numbers, 8x8 digits; figures on 1000 of the training images", color=SOFT)
        how = "log p(x): of either decoder with a standard Normal prior, by quadrature over the plane of codes"
        figure.text(0.02, 0.921, how, color=SOFT)
        chosen = [int((labels == digit).nonzero()[0]) for digit in range(10)]
        halo = [withStroke(linewidth=3, foreground="white")]
        for (top, middle, bottom), name in zip(panels.T, codes, strict=True):
            top.set_title(f"{name}: reconstructs at {float(errors[name].mean()):.1f} nats", pad=20)
            top.text(0, 1.06, "above the data, beneath the decoded code", transform=top.transAxes, color=SOFT, size=9)
            top.imshow(mosaic(torch.cat([shown[chosen], images[name][chosen]]), 10), vmin=0, vmax=1)
            z = codes[name]
            for digit in range(10):
                colour = matplotlib.colormaps["tab10"](digit)
                mine = z[labels == digit]
                middle.scatter(*mine.T.numpy(), s=9, color=colour, alpha=0.5, lw=0)
                place = mine.median(0).values.tolist()
                middle.text(
                    *place, str(digit), color=colour, size=15, weight="bold", ha="center", va="center", path_effects=halo
                )
            for radius in (1, 2):
                middle.add_patch(matplotlib.patches.Circle((0, 0), radius, fill=False, ec=INK, lw=1.2, ls=(0, (3, 3))))
            middle.set_title("where the codes lie; dashed: the prior, 1 and 2 scales", weight="normal", color=SOFT, fontsize=9)
            middle.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="first latent number")
            middle.locator_params(nbins=6, integer=True)
            middle.tick_params(labelleft=name == "autoencoder")
            middle.set_ylabel("second latent number" if name == "autoencoder" else "")
            middle.spines[:].set_visible(True)
            bottom.set_title(f"decoded draws from the prior; log p(x) = {float(exact[name].mean()):.1f}")
            bottom.imshow(mosaic(draws[name], 12), vmin=0, vmax=1)
            for axes in (top, bottom):
                axes.set_axis_off()
        return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="gradient steps of each, on batches of 100")
    parser.add_argument("--output", type=Path, default=Path("autoencoder_against_vae.png"), help="the picture")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.output)
