"""Squares of per-sample gradients against torch.func on small networks, and sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fpsim.weights import per_sample
from fpsim.weights.per_sample import sum_of_squares
from fpsim.weights.snr import moments_of_parts

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (6, 5)),
    "linear of a text": (lambda: nn.Linear(5, 3), (6, 2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (6, 4, 7, 5)),
    "conv2d, groups, strides": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=2),
        (6, 4, 9, 8),
    ),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (6, 4, 7, 5)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (6, 2, 7, 9)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (6, 2, 7, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (6, 4, 11)),
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (6, 4, 11)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (6, 2, 4, 3, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (6, 4, 5, 3)),
}


def one_by_one(module: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    assert isinstance(module.weight, Tensor)
    total = torch.zeros_like(module.weight)
    for i in range(len(x)):
        (gradient,) = torch.autograd.grad(module(x[i : i + 1]), [module.weight], dy[i : i + 1])
        total += gradient.square()
    return total


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("held", [1 << 24, 100])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_sample_by_sample(layer: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_sample, "MOST_ELEMENTS", held)
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    module, x = build().double(), torch.randn(shape, dtype=torch.float64)
    dy = torch.randn_like(module(x))
    torch.testing.assert_close(sum_of_squares(module, x, dy), one_by_one(module, x, dy))


def test_an_embedding_that_counts_over_the_batch_is_refused() -> None:
    module = nn.Embedding(5, 3, scale_grad_by_freq=True)
    with pytest.raises(ValueError, match="scale_grad_by_freq has no gradient of a single sample"):
        sum_of_squares(module, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 3))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_adds_up_what_a_sample_looks_up_twice(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    module, x = nn.Embedding(5, 3, padding_idx=padding_idx).double(), torch.randint(0, 5, (4, 7))
    dy = torch.randn(4, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(sum_of_squares(module, x, dy), one_by_one(module, x, dy))


def test_a_network_against_torch_func() -> None:
    """g^2 and Sigma of every weight of a small network, its per-sample gradients by vmap of grad of the whole loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(1), nn.Linear(48, 4)).double()
    x, labels = torch.randn(9, 1, 6, 6, dtype=torch.float64), torch.randint(0, 4, (9,))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, x.unsqueeze(0))
        return nn.functional.cross_entropy(output, label.unsqueeze(0))

    samples = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, labels)
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def after(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            output.register_hook(lambda dy: seen.__setitem__(name, (module, inputs[0], dy)))

        module.register_forward_hook(after)

    for name in ("0", "3"):
        watch(name, model.get_submodule(name))
    nn.functional.cross_entropy(model(x), labels).backward()
    for name, (module, inputs, dy) in seen.items():
        squares = sum_of_squares(module, inputs, dy)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        assert module.weight.grad is not None
        mean_square, variance = moments_of_parts(module.weight.grad, squares, 9)
        expected = samples[f"{name}.weight"]
        torch.testing.assert_close(mean_square, expected.mean(0).square())
        torch.testing.assert_close(variance, expected.var(0) / 9)
    assert set(seen) == {"0", "3"}
