"""What feedback alignment conserves along training, what must break it, and what it leads to.

Claim (Robertson and Koyejo 2023): under feedback alignment ``1/2 |W_i|^2 - <W_{i+1}, B_{i+1}>`` is conserved in every
layer; so alignment is bounded below; and a two-layer linear network finds the solution of minimum norm, exponentially.

Command: ``python -m experiments run conservation`` (no data needed).

The law is followed on scikit-learn's digits in double precision (two hidden layers, biases, batches of 50, learning
rate .1), unit by unit: ``Q_j(T) - Q_j(0)`` must be half of the squared steps. Below the last hidden layer direct
feedback has no matrix of the weights' shape; the one that fits the whole training best, unit by unit and in hindsight,
stands in its place, and still fails.

Verdict: holds. The law is exact to rounding where it should be, and all that should break it does; the linear network
comes to the solution of minimum norm, exponentially, from the starts that the theory names and from no other. In the
span of the data it does so though the theory's bound of the rate is below zero there, and promises nothing.
"""

import dataclasses

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common import plots
from experiments.common.experiment import Experiment, Histories, Page, Seeds, Study, Table
from experiments.conservation import laws
from experiments.conservation.convergence import Convergence, convergence
from experiments.conservation.laws import CASES, Followed

RATES = (0.1, 0.01, 0.001)
HORIZON = 2.0  # learning rate times steps
FLOOR = 3e-17  # below it a logarithmic axis has no room; half of a rounding error
HOLDS = (plots.BLUE, "#56b4e9", plots.GREEN, "#7a8a99", plots.INK)
BREAKS = (plots.VERMILLION, plots.PURPLE, plots.ORANGE, "#8c510a")
FIRST = {"random": plots.VERMILLION, "in the span of the data": plots.BLUE, "zero": plots.GREEN}
CAPTION = (
    "(a) By how much the drift of what feedback alignment conserves differs from half of the squared steps, in the "
    "worst unit: by rounding where the law holds, by far more in the controls. (b) Overlap of the weights with their "
    "feedback, of all hidden units, and the bound below which the law says it cannot fall. (c) A two-layer linear "
    "network tends to the least solution from the span of the data alone, (d) but fits the data from every start, "
    "exponentially: dashed, the slope that the state at the end predicts; dotted, the bound, which is above zero for "
    "the start from zero alone. Thin lines are seeds."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Seeds):
    """How long the law and the regressions are followed."""

    steps: int = 500
    """How many steps of gradient descent the law is followed along."""
    iterations: int = 3000
    """How many steps the linear regression takes."""


def study(config: Config, _: Histories) -> Study:
    """Follows everything in double precision."""
    relu, steps = CASES["ReLU"], config.steps
    with jax.enable_x64(True):
        cases = {name: laws.follow(one, rate=RATES[0], steps=steps, seed=config.seed) for name, one in CASES.items()}
        flows = {
            rate: laws.follow(relu, rate=rate, steps=round(HORIZON / rate), seed=config.seed, full=True)
            for rate in RATES
        }
        starts = {
            "random": cases["ReLU"],
            "aligned": laws.follow(relu, rate=RATES[0], steps=steps, seed=config.seed, aligned=True),
        }
        linear = convergence(seeds=config.seeds, seed=config.seed, steps=config.iterations)
    drifts = {rate: float(np.abs(one.drift[-1]).max()) for rate, one in flows.items()}
    numbers = {
        "residual": {name: float(one.residual.max()) for name, one in cases.items()},
        "drift": drifts,
        "least": {start: one.distance[:, -1].tolist() for start, one in linear.items()},
        "rates": {
            start: [one.fitted.tolist(), one.predicted.tolist(), one.bound.tolist()] for start, one in linear.items()
        },
    }
    tables = [
        Table("What is conserved, and what it leads to", _laws(cases, drifts, starts)),
        Table("A linear network's rate of convergence, per step", _rates(linear)),
    ]
    return Study(_figure(cases, starts, linear), CAPTION, tables, _findings(cases, linear), numbers)


def _findings(cases: dict[str, Followed], linear: dict[str, Convergence]) -> list[tuple[str, str]]:
    """How far the law is off where it should hold and where it must not, and how far each start ends."""
    holds, breaks = (
        [float(one.residual.max()) for name, one in cases.items() if CASES[name].holds == wanted]
        for wanted in (True, False)
    )
    said = f"is the most by which the law is off where it should hold. Where it must break: {min(breaks):.0e} or more."
    found = [(f"{max(holds):.0e}", said)]
    for start, one in linear.items():
        said = f"of its norm from the solution of minimum norm: the end of a first layer that starts {start}."
        found.append((f"{one.distance[:, -1].mean():.0e}", said))
    return found


def _laws(cases: dict[str, Followed], drifts: dict[float, float], starts: dict[str, Followed]) -> list[list[str]]:
    """What the theory says beside what was measured."""
    rows = [["quantity", "theory", "ours"]]
    for name, one in cases.items():
        theory = "0" if CASES[name].holds else "not 0"
        rows.append([f"drift - half squared steps, {name}", theory, f"{one.residual.max():.1e}"])
    for rate, drift in drifts.items():
        theory = f"{drifts[RATES[0]] * rate / RATES[0]:.2e}" if rate < RATES[0] else ""
        rows.append([f"drift, learning rate {rate:g}", theory, f"{drift:.2e}"])
    for name, one in starts.items():
        least, bound = one.overlap.sum(1).min(), one.bound[-1].sum()
        rows.append([f"least overlap with the feedback, {name} start", f">= {bound:.2f}", f"{least:.2f}"])
    return rows


def _rates(linear: dict[str, Convergence]) -> list[list[str]]:
    rows = [["first layer", "distance from the least solution", "theory", "rate, fitted", "by the last state", "bound"]]
    for start, one in linear.items():
        rates = (f"{values.min():.4f} to {values.max():.4f}" for values in (one.fitted, one.predicted, one.bound))
        theory = "not 0" if start == "random" else "0"
        rows.append([start, f"{one.distance[:, -1].min():.1e} to {one.distance[:, -1].max():.1e}", theory, *rates])
    return rows


def _figure(cases: dict[str, Followed], starts: dict[str, Followed], linear: dict[str, Convergence]) -> Figure:
    drawn = Figure(figsize=(11.6, 3.1), layout="constrained")
    grid = drawn.subplots(1, 4)
    _residuals(grid[0], cases)
    for (name, one), color in zip(starts.items(), (plots.VERMILLION, plots.BLUE), strict=True):
        grid[1].plot(one.overlap.sum(1), color=color, linewidth=1.5, label=f"{name} start")
        grid[1].plot(one.bound.sum(1), color=color, linewidth=1.0, linestyle="--", label="its bound")
    grid[1].set(xlabel="step", title=r"(b) overlap $\langle W_{i+1}, B_{i+1}\rangle$")
    for start, found in linear.items():
        steps = np.arange(1, found.distance.shape[1] + 1)
        plots.lines(grid[2], steps, np.maximum(found.distance, 1e-16), FIRST[start], start)
        plots.lines(grid[3], steps, np.maximum(found.residual, 1e-16), FIRST[start], start)
        for rate, style in ((found.predicted[0], "--"), (found.bound[0], ":")):
            line = found.residual[0, len(steps) // 6] * np.exp(-rate * (steps - len(steps) // 6))
            grid[3].plot(steps, line, style, color=plots.INK, linewidth=0.8)
    for axes, title in zip(grid[2:], (r"(c) $\|w - w_{\min}\| / \|w_{\min}\|$", r"(d) $\|Xw - y\|$"), strict=True):
        axes.set(yscale="log", ylim=(1e-16, 100), xlabel="iteration", title=title)
    grid[3].set_xlim(0, linear["zero"].residual.shape[1] / 2)
    for axes in grid[1:3]:
        axes.legend(fontsize=7)
    return drawn


def _residuals(axes: Axes, cases: dict[str, Followed]) -> None:
    kinds = {True: iter(HOLDS), False: iter(BREAKS)}
    for name, one in cases.items():
        # From the second step: the first one is the same with momentum as without.
        residual = np.maximum(one.residual[2:], FLOOR)
        axes.plot(np.arange(2, len(residual) + 2), residual, color=next(kinds[CASES[name].holds]), label=name)
    axes.set(yscale="log", xscale="log", ylim=(FLOOR, 1e4), xlabel="step")
    axes.set_title(r"(a) $|\Delta Q - \frac{1}{2}\sum\|\Delta W\|^2|$, worst unit")
    axes.legend(fontsize=6, ncols=2, loc="center", columnspacing=0.8, handlelength=1.1)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(), "paper": Config(steps=5000, seeds=10)},
    Page("What does feedback alignment conserve?", "Robertson and Koyejo 2023"),
    study=study,
)
