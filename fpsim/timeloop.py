"""`fpsim timeloop`: the next training step of a run as Timeloop and Sparseloop take it, with its real zeros.

The newest checkpoint is taken up and the run's next batch goes forward and backward once; the run stays as it is.

    LAYER.PASS.problem.yaml                 the loops of a layer in forward, dgrad or wgrad, and its tensors' densities
    LAYER.PASS.sparse_optimizations.yaml    how the run encodes them, and what their zeros save
    masks.safetensors                       `LAYER/activation`, `LAYER/weight`, `LAYER/gradient`: 1 where X, W, dY are
                                            not zero, uint8, as they are multiplied: X and dY as (N, C, ...)
    densities.json                          {"run", "step": steps trained before, "problems": [...], "tensors":
                                            {"LAYER/ROLE": {...}}}, the problems with their files, MACs and densities

A tensor in densities.json has its `shape`, `numel`, `nonzeros` and `density`; `vector_density`, by length 4, 8, 16 and
32: the share of vectors of so many neighbours in dimension 1 (of a weight its inputs, of a transposed one its outputs;
the last vector may be shorter) that are not all zero; `tile_nonzeros`: how many tiles of 64 elements, consecutive in
memory, have 0, 1, ... 64 nonzeros, the last tile with zeros at its end.

A layer that runs again in the step (or a further micro-batch of it) is LAYER@2, LAYER@3. Products of two activations
are not described. All three passes of a layer have the same loops:

    N samples, G groups, M channels of the side that the kernel gives (Y of a convolution, X of a transposed one), C of
    the side that it moves over, P and R positions and taps along the last spatial dimension, Q and S, Z and T along
    those before

The problems count what `accel.ledger.Product` counts: padding is multiplied, as Timeloop knows none. Where the padded
tensor has another density than the real one, a comment says so. The density of a result is the share of its elements
to which at least one product of two nonzeros is added.

Timeloop's density model from real data is not exposed; what its parser takes are distributions, so the densities are
the way in. The masks are for density models of one's own. The files are in the words of timeloop-model and of
timeloop-mapper: names of dimensions have one letter, a target has a `name`, a bitmask is UB; the Python front end of
version 0.4 calls them `target` and B.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from accel.codecs import Codec, find_codec
from accel.ledger import GRANULARITIES, Product
from fpsim.config.schema import Datapath, TensorSpec
from fpsim.console import print_table
from fpsim.emulation import Multiplication
from fpsim.errors import ConfigError, Problem
from fpsim.files import write_bytes, write_json, write_text
from fpsim.layers import LayerSpec
from fpsim.products import AS_IT_IS, LayerProduct
from fpsim.runner import opened
from fpsim.session import forward_and_backward

MASKS_FILE, DENSITIES_FILE = "masks.safetensors", "densities.json"
VERSION = 0.4
TILE = 64
ACTIONS = ("skipping", "gating")
AXES = (("P", "R", "W"), ("Q", "S", "H"), ("Z", "T", "D"))  # from the last dimension on: position, tap, coefficients'

SPACES = {
    "forward": {"x": "Activations", "w": "Weights", "y": "Outputs"},
    "dgrad": {"y": "Gradients", "w": "Weights", "x": "ActivationGradients"},
    "wgrad": {"x": "Activations", "y": "Gradients", "w": "WeightGradients"},
}
"""The data spaces of a pass, by their places in Y = f(X, W); the last one is written."""
MASKS = {"x": "activation", "w": "weight", "y": "gradient"}

RANKS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "bitmask": ("UB",),
    "bitmask2": ("UB",),
    "alpha_tag": ("UB",),
    "alpha": ("UB",),
    "alpha_entropy": ("UB",),
    "rle": ("RLE",),
    "coo": ("CP",),
    "csr": ("UOP", "CP"),
    "nm": ("CP",),
}
"""The formats of a codec's ranks, from the top one down."""
ALPHAS = "+-alpha count as values; in the run they cost bits of tags alone"
NOT_EXPRESSED = {
    "bitmask2": "UB has one level: an empty group of 32 costs its 32 bits; in the run 1",
    "alpha_tag": ALPHAS,
    "alpha": ALPHAS,
    "alpha_entropy": f"{ALPHAS}, which are entropy-coded",
    "rle": "RLE has no entries for runs that are too long for its bits; the run stores and counts them",
    "coo": "the run's coordinates are indices in blocks of elements",
    "csr": "the run's rows are those of shape[0] x rest; UOP and CP split the loops as the mapping orders them",
    "nm": "a group with fewer nonzeros stores zeros in the run",
}
"""What the formats do not say of a codec."""


@dataclass(frozen=True)
class Loops:
    """The iteration space of a product. dimensions: sizes by name. projections: by place (x, w, y), for each dimension
    of the tensor the terms that add up to its index, each a dimension, or a dimension times a coefficient."""

    dimensions: dict[str, int]
    coefficients: dict[str, int]
    projections: dict[str, list[list[list[str]]]]


@dataclass(frozen=True)
class Described:
    """What was written. problems: one a layer and pass, with file, MACs (all, and those of two nonzeros), densities."""

    run: Path
    step: int
    files: list[Path]
    problems: list[dict[str, Any]]


def describe(
    run_dir: str | Path,
    output: Path | None = None,
    storage: str = "DRAM",
    compute: str = "MAC",
    action: str = "skipping",
) -> Described:
    """Write the files into `output`, by default RUN/timeloop.

    storage, compute: names of levels of the user's architecture. action: what zeros save, of ACTIONS.
    Raises ConfigError for what is not a run, a run without emulation, an action that is none, and a folder that cannot
    be made; RunError for a run without a checkpoint or with a damaged one.
    """
    if action not in ACTIONS:
        raise ConfigError([Problem("--action", f"must be one of {', '.join(ACTIONS)} (got {action!r})")])
    with torch.random.fork_rng():
        session = opened(run_dir)
        if session.config.emulation is None:
            raise session.config.problem("emulation", "is null: the run emulates nothing that could be described")
        folder = _made(session.folder / "timeloop" if output is None else output)
        found: list[Multiplication] = []
        session.emulator.multiplications = found
        session.emulator.sample_this_step()
        forward_and_backward(session)
    names = _names(found)
    masks: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    problems = []
    products = (product for product in session.emulator.ledger.products if product.layer in session.emulator.layers)
    for one, product in zip(found, products, strict=True):
        name, spec = names[id(one.product)], session.emulator.specs[one.layer]
        operands = _operands(one)
        masks |= {f"{name}/{MASKS[place]}": mask for place, mask in operands.items()}
        title = f"{name}.{one.pass_name}"
        problem, notes = problem_of(title, one, spec)
        file = f"{title}.problem.yaml"
        texts[file] = _yaml({"problem": problem}, notes)
        sparse, notes = sparse_optimizations_of(one, spec, storage, compute, action)
        texts[f"{title}.sparse_optimizations.yaml"] = _yaml({"sparse_optimizations": sparse}, notes)
        problems.append(_row(name, one, product, file, problem["instance"]["densities"]))
    for file, text in texts.items():
        write_text(folder / file, text)
    write_bytes(
        folder / MASKS_FILE, save({key: mask.to("cpu", torch.uint8).contiguous() for key, mask in masks.items()})
    )
    files = [folder / file for file in (*texts, MASKS_FILE, DENSITIES_FILE)]
    described = Described(session.folder, session.step, files, problems)
    write_json(files[-1], {**to_data(described), "tensors": {key: density_of(mask) for key, mask in masks.items()}})
    return described


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([Problem("--output", f"cannot be made: {error.strerror}", str(folder))]) from error
    return folder


def _names(found: Iterable[Multiplication]) -> dict[int, str]:
    """The name of each call of a layer, by the identity of its product."""
    calls: dict[str, int] = defaultdict(int)
    names: dict[int, str] = {}
    for one in found:
        if id(one.product) not in names:
            calls[one.layer] += 1
            number = calls[one.layer]
            names[id(one.product)] = (one.layer or "model") + (f"@{number}" if number > 1 else "")
    return names


def _operands(one: Multiplication) -> dict[str, Tensor]:
    """The masks of what a product reads, by place."""
    masks = {"x": one.x, "w": one.w, "y": one.dy}
    return {place: mask for place in list(SPACES[one.pass_name])[:2] if (mask := masks[place]) is not None}


def _result(one: Multiplication) -> Tensor:
    """The mask of what a product writes: where at least one product of two nonzeros is added."""
    plain, x, w = replace(one.product, datapath=Datapath()), one.x.float(), one.w.float()
    if one.dy is None:
        return plain.forward(x, w) > 0.5
    gradient: Callable[..., Tensor] = getattr(plain, one.pass_name)
    return gradient(one.dy.float(), AS_IT_IS, x, w) > 0.5


# --- problems -------------------------------------------------------------------------------------------------------


def loops_of(product: LayerProduct, x: Tensor, w: Tensor) -> Loops:
    """The loops of a layer's product with x (samples) and w."""
    conv, kernel = product.conv, tuple(w.shape[2:])
    axes = AXES[: len(kernel)][::-1]
    groups = {"G": conv.groups} if conv.groups > 1 else {}
    positions = zip(axes, conv.positions(product.spatial, kernel), strict=True)
    dimensions = {
        "N": x.shape[0],
        **groups,
        "M": w.shape[0] // conv.groups,
        "C": w.shape[1],
        **{axis[0]: count for axis, count in positions},
        **{axis[1]: count for axis, count in zip(axes, kernel, strict=True)},
    }
    each = zip(axes, conv.stride, conv.dilation, strict=True)
    coefficients = {f"{axis[2]}{what}": n for axis, s, d in each for what, n in (("stride", s), ("dilation", d))}
    group = [[["G"]]] if groups else []
    narrow = [[["N"]], *group, [["M"]], *([[position]] for position, _, _ in axes)]
    moved = [[[position, f"{of}stride"], [tap, f"{of}dilation"]] for position, tap, of in axes]
    wide = [[["N"]], *group, [["C"]], *moved]
    weight = [*group, [["M"]], [["C"]], *([[tap]] for _, tap, _ in axes)]
    x_side, y_side = (narrow, wide) if product.is_transposed else (wide, narrow)
    return Loops(dimensions, coefficients, {"x": x_side, "w": weight, "y": y_side})


def problem_of(name: str, one: Multiplication, spec: LayerSpec) -> tuple[dict[str, Any], list[str]]:
    """The problem of a product, and what a comment should say of it."""
    loops, spaces, operands = loops_of(one.product, one.x, one.w), SPACES[one.pass_name], _operands(one)
    written = list(spaces)[-1]
    densities, notes = {}, []
    for place, mask in {**operands, written: _result(one)}.items():
        codec = None if place == written else _codec(spec, place)
        distribution = "fixed_structured" if codec is not None and _kind(codec) == "nm" else "hypergeometric"
        densities[spaces[place]] = {"distribution": distribution, "density": _density(mask)}
        padded = mask if place in ("w", written) else _with_padding(one.product, place, mask, loops)
        if padded.shape != mask.shape:
            notes.append(
                f"{spaces[place]}: {_shape(mask)} as a tensor; {_shape(padded)} in the problem, where padding has "
                f"density {_density(padded)!r}"
            )
    data_spaces = [
        {"name": space, "projection": loops.projections[place], **({"read_write": True} if place == written else {})}
        for place, space in spaces.items()
    ]
    coefficients = [{"name": key, "default": n} for key, n in loops.coefficients.items()]
    shape = {
        "name": name,
        "dimensions": list(loops.dimensions),
        **({"coefficients": coefficients} if coefficients else {}),
        "data_spaces": data_spaces,
    }
    instance = {**loops.dimensions, **loops.coefficients, "densities": densities}
    return {"version": VERSION, "shape": shape, "instance": instance}, notes


def _with_padding(product: LayerProduct, place: str, mask: Tensor, loops: Loops) -> Tensor:
    """The mask as the loops see it: what the kernel moves over with its padding, and without what it never meets."""
    if (place == "x") == product.is_transposed:
        return mask
    margins: list[int] = []
    moved = loops.projections[place][-len(product.spatial) or len(loops.projections[place]) :]
    for terms, padding, size in zip(moved, product.conv.padding, mask.shape[2:], strict=True):
        extent = 1 + sum((loops.dimensions[of] - 1) * loops.coefficients[times] for of, times in terms)
        margins = [padding, extent - padding - size, *margins]
    return functional.pad(mask, margins) if any(margins) else mask


# --- encodings ------------------------------------------------------------------------------------------------------


def sparse_optimizations_of(
    one: Multiplication, spec: LayerSpec, storage: str, compute: str, action: str
) -> tuple[dict[str, Any], list[str]]:
    """How a product's operands are encoded and what their zeros save, and what a comment should say of it.

    What a result is stored as is a matter of the layer that reads it, and left open.
    """
    loops, spaces = loops_of(one.product, one.x, one.w), SPACES[one.pass_name]
    operands, written = _operands(one), list(spaces.values())[-1]
    formats, notes = [], []
    for place in operands:
        codec = _codec(spec, place)
        if codec is None or not RANKS[_kind(codec)]:
            continue
        formats.append({"name": spaces[place], "ranks": _ranks(codec, place, loops)})
        if said := NOT_EXPRESSED.get(_kind(codec)):
            notes.append(f"{spaces[place]}: {codec.name}: {said}")
    sparse = [spaces[place] for place, mask in operands.items() if not bool(mask.all())]
    conditions = [(spaces[place], [other for other in sparse if other != spaces[place]]) for place in operands]
    actions = [
        {"type": action, "options": [{"target": target, "condition_on": on}]}
        for target, on in [*conditions, (written, sparse)]
        if on
    ]
    target = {
        "name": storage,
        **({"representation_format": {"data_spaces": formats}} if formats else {}),
        **({"action_optimization": actions} if actions else {}),
    }
    targets = [target] if len(target) > 1 else []
    if sparse:
        targets.append({"name": compute, "compute_optimization": [{"type": action}]})
    return {"version": VERSION, "targets": targets}, notes


def _ranks(codec: Codec, place: str, loops: Loops) -> list[dict[str, Any]]:
    """The ranks of a codec: the lowest takes the innermost loops that it may, of several those within a row."""
    kind = _kind(codec)
    names = [term[0] for index in loops.projections[place] for term in index]
    within = [name for name in names if name not in (("G", "M") if place == "w" else ("N",))]
    bits = {"rle": codec.first, "nm": max(1, (codec.second - 1).bit_length())}.get(kind, 1)
    has_bits = kind not in ("coo", "csr")  # whose width the level's own metadata words have
    return [
        {
            "format": fmt,
            "flattened_rankIDs": [names if i == 0 else within],
            **({"metadata_word_bits": bits} if has_bits else {}),
        }
        for i, fmt in enumerate(RANKS[kind])
    ]


def _codec(spec: LayerSpec, place: str) -> Codec | None:
    """The codec of an operand, None for float32."""
    role: TensorSpec | None = {"x": spec.activations, "w": spec.weights, "y": spec.gradients}[place]
    return None if role is None else find_codec(role.codec)


def _kind(codec: Codec) -> str:
    return codec.name.partition("(")[0]


# --- densities ------------------------------------------------------------------------------------------------------


def density_of(mask: Tensor) -> dict[str, Any]:
    """What densities.json says of a mask (see above)."""
    tiles = functional.pad(mask.flatten(), (0, -mask.numel() % TILE)).view(-1, TILE).sum(1)
    return {
        "shape": list(mask.shape),
        "numel": mask.numel(),
        "nonzeros": int(mask.sum()),
        "density": _density(mask),
        "vector_density": {str(of): _density(_vectors(mask, of)) for of in GRANULARITIES if of > 1},
        "tile_nonzeros": torch.bincount(tiles, minlength=TILE + 1).tolist(),
    }


def _vectors(mask: Tensor, length: int) -> Tensor:
    """Which vectors of neighbours in dimension 1 have a nonzero."""
    padded = functional.pad(mask, [0, 0] * (mask.ndim - 2) + [0, -mask.shape[1] % length])
    return padded.unflatten(1, (-1, length)).any(2)


def _density(mask: Tensor) -> float:
    return int(mask.sum()) / max(mask.numel(), 1)


# --- output ---------------------------------------------------------------------------------------------------------


def _shape(mask: Tensor) -> str:
    return "x".join(map(str, mask.shape))


def _yaml(data: dict[str, Any], notes: list[str]) -> str:
    comments = "".join(f"# {note}\n" for note in notes)
    return comments + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)


def _row(
    name: str, one: Multiplication, product: Product, file: str, densities: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "layer": name,
        "pass": one.pass_name,
        "file": file,
        "macs": product.macs,
        "effectual_macs": product.effectual[1].both,
        "densities": {space: said["density"] for space, said in densities.items()},
    }


def to_data(described: Described) -> dict[str, Any]:
    """The problems as plain data."""
    return {"run": str(described.run), "step": described.step, "problems": described.problems}


def show(described: Described) -> None:
    """Print a table of the problems, and where the files are."""
    cells = [
        (row["layer"], row["pass"], f"{row['macs']:,}", f"{100 * row['effectual_macs'] / max(row['macs'], 1):.1f}",
         ", ".join(f"{space} {density:.3f}" for space, density in row["densities"].items()))
        for row in described.problems
    ]  # fmt: skip
    print_table(["layer", "pass", "MACs", "effectual %", "densities"], cells)
    print(f"step {described.step + 1}: {len(described.files)} files in {described.files[-1].parent}")
