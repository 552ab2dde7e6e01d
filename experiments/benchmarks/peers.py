"""PyTorch's training steps of the same networks: backpropagation, FA and DFA as one writes them from the equations, and
BioTorch's.

They need PyTorch, which nothing else here does: ``pip install torch``. BioTorch is left out where it is not installed:
``pip install --no-deps biotorch``, since of its requirements no other is needed.
"""

import io
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from experiments.benchmarks.workloads import CLASSES, CONTEXT, VOCABULARY


class _Feedback(torch.autograd.Function):
    """``op(x, w)`` whose error returns through ``b``: ``dw`` is the true one, ``dx`` that of ``op(x, b)``."""

    @staticmethod
    def forward(ctx: Any, op: Any, x: Any, w: Any, b: Any) -> Any:
        ctx.op = op
        ctx.save_for_backward(x, w, b)
        return op(x, w)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, w, b = ctx.saved_tensors
        with torch.enable_grad():
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            (dw,) = torch.autograd.grad(ctx.op(x.detach(), w), w, delta)
            dx = torch.autograd.grad(ctx.op(x, b), x, delta)[0] if ctx.needs_input_grad[1] else None
        return None, dx, dw, None


class _Tokens(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.zeros(1, CONTEXT, width))

    def forward(self, x: Any) -> Any:
        return self.tokens(x) + self.positions


class _Block(nn.Module):
    """A residual block of a ResNet, as ``experiments.models.networks.Block``."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Any) -> Any:
        return F.relu(self.inner(x) + self.shortcut(x))


class _Causal(nn.TransformerEncoderLayer):
    def forward(self, x: Any) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return super().forward(x, src_mask=mask, is_causal=True)


def _resnet(repeats: int) -> list[nn.Module]:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    plan = [(16, 16, 1)] * repeats + [(16, 32, 2)] + [(32, 32, 1)] * (repeats - 1)
    blocks = [_Block(*one) for one in [*plan, (32, 64, 2), *[(64, 64, 1)] * (repeats - 1)]]
    return [stem, *blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))]


def _dense(n: int, m: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(n, m), nn.ReLU())


# Stages: direct feedback reaches the output of each but the last.
STAGES: dict[str, Callable[[], list[nn.Module]]] = {
    "mlp": lambda: [_dense(784, 1024), *(_dense(1024, 1024) for _ in range(3)), nn.Linear(1024, CLASSES)],
    "lenet": lambda: [
        nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        _dense(400, 120),
        _dense(120, 84),
        nn.Linear(84, CLASSES),
    ],
    "resnet20": lambda: _resnet(3),
    "decoder": lambda: [
        _Tokens(128),
        *(_Causal(128, 4, 512, 0.0, "gelu", batch_first=True) for _ in range(12)),
        nn.Linear(128, VOCABULARY),
    ],
}


def steps(network: str, inputs: Any, labels: Any) -> dict[str, Callable[[], float]]:
    """What takes one training step of each kind, on these arrays, and returns its seconds."""
    torch.manual_seed(0)
    x = torch.tensor(inputs).moveaxis(-1, 1).contiguous() if inputs.ndim == 4 else torch.tensor(inputs).long()
    y = torch.tensor(labels).long()
    runs: dict[str, Callable[[], float]] = {}
    for name, learn in (("backpropagation", _backpropagation), ("FA", _backpropagation), ("DFA", _direct())):
        if (network, name) == ("decoder", "FA"):
            continue  # PyTorch's attention has no layers inside whose error could be given another way
        stages = STAGES[network]()
        if name == "FA":
            for stage in stages:
                stage.apply(_give_feedback)
        runs[f"PyTorch, {name}"] = _timed(learn, stages, x, y)
    # BioTorch cannot turn attention into layers of its own.
    if find_spec("biotorch") is not None and network != "decoder":
        for name in ("FA", "DFA"):
            runs[f"BioTorch, {name}"] = _timed(_by_biotorch, [_biotorch(STAGES[network](), name.lower())], x, y)
    return runs


def _timed(learn: Any, stages: Sequence[nn.Module], x: Any, y: Any) -> Callable[[], float]:
    optimizer = torch.optim.Adam([p for stage in stages for p in stage.parameters()], lr=1e-3)

    def run() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        learn(stages, x, y)
        optimizer.step()
        return time.perf_counter() - started

    run()
    return run


def _loss(logits: Any, y: Any) -> Any:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def _backpropagation(stages: Sequence[nn.Module], x: Any, y: Any) -> None:
    for stage in stages:
        x = stage(x)
    _loss(x, y).backward()


def _biotorch(stages: Sequence[nn.Module], mode: str) -> nn.Module:
    """The network in one piece, whose layers BioTorch has made its own; it says so, at length."""
    with redirect_stdout(io.StringIO()):
        biomodule = import_module("biotorch.module.biomodule")
        return biomodule.BioModule(nn.Sequential(*stages), mode=mode, output_dim=CLASSES)


def _by_biotorch(stages: Sequence[nn.Module], x: Any, y: Any) -> None:
    (model,) = stages
    # Its DFA gets the output's error during the forward pass, for which it asks for the loss.
    _loss(model(x, y, _loss), y).backward()


def _direct() -> Callable[..., None]:
    matrices: list[Any] = []

    def learn(stages: Sequence[nn.Module], x: Any, y: Any) -> None:
        hidden = []
        for stage in stages[:-1]:
            hidden.append(stage(x))
            x = hidden[-1].detach()
        logits = stages[-1](x)
        loss = _loss(logits, y)
        (e,) = torch.autograd.grad(loss, logits, retain_graph=True)
        loss.backward()
        shared = e.ndim - 1
        if not matrices:
            matrices.extend(torch.randn(e.shape[-1], h[(0,) * shared].numel()) / h[0].numel() ** 0.5 for h in hidden)
        torch.autograd.backward(hidden, [(e @ b).reshape(h.shape) for h, b in zip(hidden, matrices, strict=True)])

    return learn


def _give_feedback(module: nn.Module) -> None:
    """Makes a layer's error return through fixed random weights."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return
    b = module.weight.std().detach() * torch.randn_like(module.weight)
    bias = module.bias

    def op(x: Any, w: Any) -> Any:
        if isinstance(module, nn.Linear):
            return F.linear(x, w)
        return F.conv2d(x, w, None, module.stride, module.padding)

    def forward(x: Any) -> Any:
        y = _Feedback.apply(op, x, module.weight, b)
        return y if bias is None else y + (bias if y.ndim < 4 else bias[:, None, None])

    module.forward = forward
