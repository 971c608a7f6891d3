"""What a run leaves behind where a NaN or an infinity ends it: its state, and the tensor in which it was seen first.

    failed/step-N/                         a checkpoint
    failed/step-N/not_finite.safetensors   the tensor by its role, and those that it came from: of an output the input
                                           (activation) and the parameters of its layer, as the layer used them

The metadata of that file are layer, role, step, and how many of how many elements are NaN and infinite.
"""

from __future__ import annotations

import torch
from safetensors.torch import load, save

from fpsim import checkpoint
from fpsim.errors import NonFiniteError
from fpsim.files import write_bytes
from fpsim.run_directory import FAILED_FOLDER, NOT_FINITE_FILE
from fpsim.session import Session
from fpsim.training import EVALUATION_BATCH, first_non_finite

FIELDS = ("layer", "role", "step", "nan", "inf", "elements")


def not_finite_in_evaluation(session: Session, test_loss: float) -> NonFiniteError:
    """What is not finite first when the test split is evaluated, by each rank as a whole; else the loss itself."""
    model, test = session.model, session.dataset.test
    model.eval()
    try:
        for indices in torch.arange(len(test)).split(EVALUATION_BATCH):
            inputs, _ = test.batch(indices)
            if found := first_non_finite(model, inputs, torch.get_rng_state(), session.step):
                return found
    finally:
        model.train()
    return NonFiniteError("test loss", "(last)", session.step, {"test loss": torch.tensor(test_loss)})


def save_failed(session: Session, error: NonFiniteError) -> str:
    """Write the files, and the log's line: the error, and where they are, in one line. Of the errors that the ranks
    have met together it is the one of the first layer."""
    error = _first_of_ranks(session, error)
    session.save(session.folder / FAILED_FOLDER)
    place = session.folder / FAILED_FOLDER / f"step-{session.step}"
    file = place / NOT_FINITE_FILE
    found = {key: getattr(error, key) for key in FIELDS}
    if session.ranks.is_first:
        write_bytes(file, save(checkpoint.own(error.tensors), {key: str(value) for key, value in found.items()}))
    where = {"state": str(place), "tensor": str(file)}
    session.log("not finite", level="error", reason=str(error), **found, **where)
    return f"{error}; the state at that moment is saved in {place}, the tensor in {file}"


def _first_of_ranks(session: Session, error: NonFiniteError) -> NonFiniteError:
    """The error whose tensor is not finite, as each rank has its own part; of several the one of the first layer."""
    if session.ranks.count == 1:
        return error
    roles, layers = (session.ranks.gathered(text.encode()) for text in (error.role, error.layer))
    tensors = session.ranks.gathered(save(checkpoint.own(error.tensors)))
    errors = [
        NonFiniteError(role.decode(), layer.decode(), error.step, load(own))
        for role, layer, own in zip(roles, layers, tensors, strict=True)
    ]
    places = {name: number for number, (name, _) in enumerate(session.model.named_modules())}
    return min(errors, key=lambda one: (one.nan + one.inf == 0, places.get(one.layer, len(places))))
