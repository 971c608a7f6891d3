"""What a run leaves behind where a NaN or an infinity ends it: its state, and the tensor in which it was seen first.

    failed/step-N/                         a checkpoint
    failed/step-N/not_finite.safetensors   the tensor by its role, and those that it came from: of an output the input
                                           (activation) and the parameters of its layer, as the layer used them

The metadata of that file are layer, role, step, and how many of how many elements are NaN and infinite.
"""

from __future__ import annotations

import torch
from safetensors.torch import save

from fpsim import checkpoint
from fpsim.errors import NonFiniteError
from fpsim.files import write_bytes
from fpsim.run_directory import FAILED_FOLDER, NOT_FINITE_FILE, log
from fpsim.session import Session
from fpsim.training import EVALUATION_BATCH, first_non_finite


def first_in_evaluation(session: Session) -> NonFiniteError | None:
    """What is not finite first when the test split is evaluated; None where all is finite."""
    model, test = session.model, session.dataset.test
    model.eval()
    try:
        for indices in torch.arange(len(test)).split(EVALUATION_BATCH):
            inputs, _ = test.batch(indices)
            if found := first_non_finite(model, inputs, torch.get_rng_state(), session.step):
                return found
    finally:
        model.train()
    return None


def save_failed(session: Session, error: NonFiniteError) -> str:
    """Write the files, and the log's line: the error, and where they are, in one line."""
    session.save(session.folder / FAILED_FOLDER)
    place = session.folder / FAILED_FOLDER / f"step-{session.step}"
    file = place / NOT_FINITE_FILE
    counts = {key: getattr(error, key) for key in ("layer", "role", "step", "nan", "inf", "elements")}
    metadata = {key: str(value) for key, value in counts.items()}
    write_bytes(file, save(checkpoint.own(error.tensors), metadata))
    where = {"state": str(place), "tensor": str(file)}
    log(session.folder, "not finite", level="error", reason=str(error), **counts, **where)
    return f"{error}; the state at that moment is saved in {place}, the tensor in {file}"
