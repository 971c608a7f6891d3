"""The masks of a model's weights in training: when they are renewed, from what, and what is measured on the way.

Forward and backward see theta_hat = mask * theta; the optimizer updates the dense theta. Which gradient it takes is the
method's: `snr` and `dpf` that of theta_hat for every weight, so that a pruned one keeps learning and can return; `gmp`
and `magnitude` none for a pruned one, which never returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.config.schema import DensePruning, Refresh, SnrPruning, WeightPruning
from fpsim.errors import RunError
from fpsim.ranges import WEIGHT_PRUNING, spanned
from fpsim.ranks import ALONE, Ranks
from fpsim.weights.masks import Masks, keep_by_snr, keep_share, ramp
from fpsim.weights.per_sample import sum_of_squares
from fpsim.weights.snr import Average, false_prune_rate, moments_of_parts, threshold_of_rate

HISTOGRAM = range(-16, 17)  # edges of the classes of log2 snr


class WeightPruner:
    """What prunes the weights of some layers; `rows` holds what every renewal of the masks did.

    layers: by name, each with a parameter `weight`. steps_per_epoch: for the methods that count in epochs. ranks: those
    that train on a part of every batch each; their gradients are parts of a batch like those of micro-batches.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        spec: WeightPruning,
        steps_per_epoch: int | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.spec, self.ranks = spec, ranks
        self.rows: list[dict[str, Any]] = []
        self.masks: Masks = {}
        self.sparsity = 0.0  # share of zeros in all masks
        self._masked: dict[str, tuple[int, int, Tensor]] = {}  # theta_hat, and of which weights it is
        self.epoch_is_new = False
        self._layers = dict(layers)
        self._renewed_at: int | None = None
        self._is_final = False
        self._returns = not isinstance(spec, DensePruning) and spec.returns
        self._part_count: int | None = None  # of the latest step
        self._parts: dict[str, int] = {}
        self._totals: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._averages: dict[str, Average] = {}
        self._estimator = spec.estimator if isinstance(spec, SnrPruning) else None
        if isinstance(spec, SnrPruning):
            self._averages = {name: Average(spec.rule, spec.beta) for name in self._layers}
            for name in self._layers:
                self._handles.append(self._weight(name).register_hook(self._part_of(name)))
        elif not isinstance(spec, DensePruning):
            if steps_per_epoch is None:
                raise ValueError(f"weight pruning by {spec.name} counts in epochs: give steps_per_epoch")
            self._begin, self._end = (round(epochs * steps_per_epoch) for epochs in spec.epochs_of_ramp)

    # --- in a step ------------------------------------------------------------------------------------------------

    @spanned(WEIGHT_PRUNING)
    def masked(self, name: str, weight: Tensor) -> Tensor:
        """theta_hat, whose gradient is the dense weight's, or that times the mask where pruned weights stay pruned."""
        mask = self.masks.get(name)
        if mask is None:
            return weight
        known = self._masked.get(name)
        if known is None or known[:2] != (weight.data_ptr(), weight._version):
            zeroed = torch.where(mask, weight.detach(), 0.0)  # mask * weight, without -0
            known = self._masked[name] = weight.data_ptr(), weight._version, zeroed
        masked: Tensor = _Masked.apply(weight, known[2], None if self._returns else mask)
        return masked

    def wants_samples(self, name: str) -> bool:
        """Whether `samples` is to be called in the backward pass of a layer."""
        return name in self._averages and self._estimator == "per_sample"

    @spanned(WEIGHT_PRUNING)
    def samples(self, name: str, x: Tensor, dy: Tensor) -> None:
        """Count the gradients of single samples: a layer's input and the gradient at its output, batch first."""
        squares = sum_of_squares(self._layers[name], x, dy)
        if name in self._squares:
            squares += self._squares[name]
        self._squares[name] = squares
        self._parts[name] = self._parts.get(name, 0) + len(x)

    def _part_of(self, name: str) -> Any:
        """A hook that adds the gradient of one backward pass."""

        @spanned(WEIGHT_PRUNING)
        def add(gradient: Tensor) -> None:
            known = self._totals.get(name)
            self._totals[name] = gradient.detach().clone() if known is None else known.add_(gradient)
            if self._estimator == "microbatch":
                squares = self._squares.get(name)
                self._squares[name] = gradient.square() if squares is None else squares.addcmul_(gradient, gradient)
                self._parts[name] = self._parts.get(name, 0) + 1

        return add

    @spanned(WEIGHT_PRUNING)
    def begin_step(self, step: int) -> bool:
        """Renew the masks where that is due; whether it was."""
        is_due, self.epoch_is_new = self._is_due(step), False
        if is_due:
            self._renew(step)
        return is_due

    @spanned(WEIGHT_PRUNING)
    def end_step(self) -> None:
        """Add the step's gradients to the averages. Raises RunError where they do not tell a variance."""
        self._add_up_ranks()
        for name, total in self._totals.items():
            average = self._averages[name]
            if average.rule == "ema":
                average.add(total)
                continue
            try:
                average.add(*moments_of_parts(total, self._squares[name], self._parts[name]))
                self._part_count = self._parts[name]
            except (KeyError, ValueError):
                raise RunError(
                    f"layer {name!r}: the snr of a gradient needs two parts of a batch or more a step "
                    f"({self._estimator}: got {self._parts.get(name, 0)})"
                ) from None
        self.restart_step()

    def _add_up_ranks(self) -> None:
        sums = [*self._totals.values(), *self._squares.values()]
        if self.ranks.count == 1 or not sums:
            return
        everything = self.ranks.total(torch.cat([one.flatten() for one in sums]))
        for one, summed in zip(sums, everything.split([one.numel() for one in sums]), strict=True):
            one.copy_(summed.view_as(one))
        for name in self._parts:
            self._parts[name] *= self.ranks.count

    def restart_step(self) -> None:
        """Forget the gradients of the current step."""
        for parts in (self._totals, self._squares, self._parts):
            parts.clear()

    # --- masks ----------------------------------------------------------------------------------------------------

    def _is_due(self, step: int) -> bool:
        spec = self.spec
        if isinstance(spec, SnrPruning):
            if max(average.steps for average in self._averages.values()) < (2 if spec.estimator == "ema" else 1):
                return False
            every: Refresh = spec.burn_in if self._renewed_at is None else spec.interval or spec.burn_in
            if every == "epoch":
                return self.epoch_is_new and step > 0
            return step - (self._renewed_at or 0) >= every
        if isinstance(spec, DensePruning) or self._is_final:
            return False
        return step >= self._end or (step > self._begin and (step - self._begin) % spec.interval == 0)

    def _renew(self, step: int) -> None:
        before, spec = self.masks, self.spec
        weights = {name: self._weight(name).detach() for name in self._layers}
        measured: dict[str, dict[str, Any]] = {}
        if isinstance(spec, SnrPruning):
            if idle := [name for name, average in self._averages.items() if not average.steps]:
                raise RunError(f"layer {idle[0]!r} had no gradient so far: exclude it from weight_pruning")
            snr, threshold = {name: self._averages[name].snr() for name in self._layers}, self.threshold
            masks = keep_by_snr(snr, weights, threshold, spec.scope, spec.agreement)
            measured = {
                name: {"snr_at_most_threshold": int((ratio <= threshold).sum()), "log2_snr": _histogram(ratio)}
                for name, ratio in snr.items()
            }
        else:
            assert not isinstance(spec, DensePruning)
            is_dense = spec.returns or not before
            kept = weights if is_dense else {name: weight * before[name] for name, weight in weights.items()}
            masks = keep_share(kept, ramp(step, self._begin, self._end, spec.sparsity), spec.scope)
            self._is_final = step >= self._end
        self._take(masks)
        self._renewed_at = step
        self.rows.append(self._row(step, before, measured))

    def _take(self, masks: Masks) -> None:
        self.masks = masks
        self._masked.clear()
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        self.sparsity = zeros / max(sum(mask.numel() for mask in masks.values()), 1)

    def _row(self, step: int, before: Masks, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        layers = []
        for name, mask in self.masks.items():
            old = before.get(name, torch.ones_like(mask))
            counts = {
                "layer": name,
                "numel": mask.numel(),
                "zeros": int((~mask).sum()),
                "pruned": int((old & ~mask).sum()),
                "returned": int((mask & ~old).sum()),
            }
            layers.append(counts | measured.get(name, {}))
        return {"step": step, "sparsity": self.sparsity, "layers": layers}

    @property
    def threshold(self) -> float:
        """Of the snr: as configured, or of the rate that is configured."""
        assert isinstance(self.spec, SnrPruning)
        wanted = self.spec.threshold
        if isinstance(wanted, float):
            return wanted
        return threshold_of_rate(wanted.false_prune_rate, self.spec.rule, self.spec.beta, self._part_count)

    # --- what is kept and told -------------------------------------------------------------------------------------

    @property
    def summary(self) -> dict[str, Any] | None:
        """The pruning so far, None for dense: sparsity, of all and by layer, and what the renewals did."""
        if isinstance(self.spec, DensePruning):
            return None
        latest = self.rows[-1]["layers"] if self.rows else []
        found: dict[str, Any] = {
            "name": self.spec.name,
            "sparsity": self.sparsity,
            "renewals": len(self.rows),
            "returned": sum(layer["returned"] for row in self.rows for layer in row["layers"]),
            "layers": [{key: layer[key] for key in ("layer", "numel", "zeros")} for layer in latest],
            "history": [
                {"step": row["step"], "sparsity": row["sparsity"]}
                | {key: sum(layer[key] for layer in row["layers"]) for key in ("pruned", "returned")}
                for row in self.rows
            ],
        }
        if isinstance(self.spec, SnrPruning) and self._renewed_at is not None:
            rate = false_prune_rate(self.threshold, self.spec.rule, self.spec.beta, self._part_count)
            classes = [layer["log2_snr"] for layer in latest]
            found |= {
                "threshold": self.threshold,
                "parts": self._part_count,
                "false_prune_rate": rate,
                "log2_snr": {"lowest": HISTOGRAM[0], "counts": [sum(counts) for counts in zip(*classes, strict=True)]},
            }
        return found

    def detach(self) -> None:
        """Remove the hooks on the weights; the weights stay dense."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """All but the tensors and the rows, as plain data (JSON)."""
        return {
            "name": self.spec.name,
            "renewed_at": self._renewed_at,
            "is_final": self._is_final,
            "part_count": self._part_count,
            "steps": {name: average.steps for name, average in self._averages.items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        """Masks and averages."""
        averages = [(n, key, getattr(a, key)) for n, a in self._averages.items() for key in ("first", "second")]
        found = {f"{key}.{name}": tensor for name, key, tensor in averages if tensor is not None}
        return found | {f"mask.{name}": mask for name, mask in self.masks.items()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict()` and `tensors()`. Raises ValueError where these are of another method."""
        if state["name"] != self.spec.name or set(state["steps"]) != set(self._averages):
            raise ValueError(f"the saved state is of weight pruning by {state['name']} or of other layers")
        self._renewed_at, self._is_final = state["renewed_at"], state["is_final"]
        self._part_count = state["part_count"]
        for name, average in self._averages.items():
            average.steps = state["steps"][name]
            average.first, average.second = (tensors.get(f"{key}.{name}") for key in ("first", "second"))
        self._take({name: tensors[f"mask.{name}"] for name in self._layers if f"mask.{name}" in tensors})

    def _weight(self, name: str) -> nn.Parameter:
        weight = self._layers[name]._parameters["weight"]
        assert isinstance(weight, nn.Parameter)
        return weight


def _histogram(snr: Tensor) -> list[int]:
    """How many values lie in each class of HISTOGRAM, those below in the first and those above in the last."""
    exponents = snr.log2().floor().clamp(HISTOGRAM[0], HISTOGRAM[-1])
    counts: list[int] = torch.bincount((exponents - HISTOGRAM[0]).long().flatten(), minlength=len(HISTOGRAM)).tolist()
    return counts


class _Masked(torch.autograd.Function):
    """The masked weight forward; backward the gradient itself, or mask * gradient where there is a mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, masked: Tensor, mask: Tensor | None) -> Tensor:
        ctx.mask = mask
        return masked

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] if ctx.mask is None else gradients[0] * ctx.mask, None, None
