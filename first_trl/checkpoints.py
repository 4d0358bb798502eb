"""Checkpoints that can be trusted, and the progress of a training.

With every checkpoint goes a list of its files, written when all processes have written theirs. A checkpoint without
the list, or with a file that is not as listed, is never resumed from: the one before is, or training starts over.
"""

import json
import os
import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import ProgressCallback, TrainerCallback

from .files import file_digest, files_of, write_atomically
from .log import Progress, status

LIST = "first_trl_files.json"
HASHED_BELOW = 64 * 2**20  # bytes; of larger files the size is compared alone, which a cut write does not survive


class ListFiles(TrainerCallback):
    """Writes the list of a checkpoint's files, when these are on the disk."""

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # each process saves its own random state
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            for name in files_of(folder):
                with open(folder / name, "rb") as file:
                    os.fsync(file.fileno())
            write_atomically(folder / LIST, json.dumps({name: _described(folder / name) for name in files_of(folder)}))


class ShowProgress(TrainerCallback):
    """A bar with the loss and the time that is left; what the trainer logs goes to the log alone."""

    def __init__(self, title: str):
        self.title, self.loss = title, ""

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress = Progress(self.title, state.max_steps)
        self.progress.n = self.progress.initial = state.global_step  # an earlier attempt's tell nothing about time

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(state.global_step - self.progress.n, self.loss)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            print(f"step {state.global_step}: {json.dumps(logs)}")
            self.loss = f"loss {float(logs['loss']):.3g}" if "loss" in logs else self.loss

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.close()


def watch(trainer, title: str) -> None:
    """Give a trainer the two callbacks in place of its own bar."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShowProgress(title))
    trainer.add_callback(ListFiles())


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose files are as listed, None without one; says which newer ones are not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if (problem := _damage(path)) is None:
            return str(path)
        status(f"{path.name} cannot be resumed from: {problem}; going back to the one before it, if there is one")
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished training: the model replaces them."""
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        listed = json.loads((checkpoint / LIST).read_text(encoding="utf-8"))
        wrong = [name for name, made in listed.items() if _described(checkpoint / name) != made]
    except FileNotFoundError as error:
        name = Path(error.filename).name
        return "it was not written to its end" if name == LIST else f"{name} is missing"
    except (OSError, ValueError, AttributeError):
        return f"{LIST} cannot be read"
    if not any(name.startswith(("optimizer", "global_step")) for name in listed):
        return "it has no state of the optimizer (save_only_model)"
    return f"{wrong[0]} is not as it was written" if wrong else None


def _described(file: Path) -> list:
    size = file.stat().st_size
    return [size, file_digest(file) if size < HASHED_BELOW else None]
