"""Folder of a run, from start to end: check it, find where to go on, claim it, train, and write the results.

Results are read back by gem/results.py.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gem.checkpoints import WEIGHTS, check_steps_left, find_checkpoint, manifest_flaw, steps_of, write_manifest
from gem.config import PlanArguments
from gem.distributed import decided
from gem.files import check_writable, read_text, write_lines
from gem.lock import check_free, locked
from gem.rails import as_metrics, write_rails
from gem.run_files import (
    BEST_FOLDER,
    COMPLETIONS_FILE,
    LOCK_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RAILS_FILE,
    RUN_FILE,
    STATE_FILE,
    has_manifest,
    numbered_checkpoints,
    read_object,
    step_number,
)
from gem.signals import graceful
from gem.stops import Diverged, Terminated
from gem.together import together

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Settings that do not change what a run computes: where it lies, where it resumes, a secret, and what a dry run reads.
NOT_COMPARED = ("output_dir", "resume_from_checkpoint", "hub_token", *(f.name for f in fields(PlanArguments)))


class RunFolder:
    """The output_dir of a run. All checks are made by the first process, and all processes raise what it finds.

        run = RunFolder(training, "sft", settings)
        if run.finished:
            return
        run.check_input("data", "pairs.jsonl", lambda: data_hash("pairs.jsonl"))
        with run.claimed():
            train_to_end(trainer, evaluation, run.resume)

    Args:
        training: TrainingArguments.
        command: sft or train.
        settings: all settings of the run.

    Attributes:
        resume: the checkpoint to go on from, or None.
        finished: True if the run is finished; its metrics are then printed.

    Raises:
        ValueError: from check_output, check_free and find_checkpoint; or a finished run is to resume from a checkpoint.
    """

    def __init__(self, training: Any, command: str, settings: Mapping[str, Any]) -> None:
        self.training, self.command, self.settings = training, command, settings
        self.folder = Path(training.output_dir)
        self.inputs: dict[str, dict[str, str]] = {}
        self.resume, self.finished = self._decided(self._start)
        self._seen = _progress(self.folder)

    def check_input(self, name: str, source: str, hashed: Callable[[], str]) -> None:
        """Note what goes into the run, and check that it is what the run began with.

        Args:
            name: the setting that gave it.
            source: its value, for messages.
            hashed: returns the hash of its content.

        Raises:
            ValueError: a run that goes on began with another content.
        """

        def compared() -> dict[str, str]:
            now = {"name": source, "hash": hashed()}
            begun = {} if _left_verdicts_alone(self.folder) else read_object(self.folder / RUN_FILE)
            inputs = begun.get("inputs")  # none in runs of older versions
            then = inputs.get(name) if isinstance(inputs, dict) else None
            if isinstance(then, dict) and then.get("hash") != now["hash"]:
                raise ValueError(
                    f"{name} must be what the run began with, got {source} with hash {now['hash']}, {then.get('hash')} then"
                )
            return now

        self.inputs[name] = self._decided(compared)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the folder for the block, and make it the folder of this run.

        An exception of the block leaves no half-written checkpoint, and gets an attribute `kept` that names the last whole one.
        A run that fails before its first checkpoint gives the claim up, so it can be tried again with other settings: also
        if it has stopped itself and left its verdicts there.

        Raises:
            ValueError: another run has taken the folder meanwhile.
        """
        with ExitStack() as stack:
            new, cut_off = self._decided(lambda: self._claim(stack))
            try:
                yield
            except BaseException as error:
                if self._is_first:
                    self._clean(new, cut_off)
                if isinstance(error, Terminated) and self.settings.get("resume_from_checkpoint") not in (None, "true"):
                    error.kept = "without resume_from_checkpoint"  # type: ignore[attr-defined]
                if not hasattr(error, "kept"):
                    error.kept = _kept(self.folder, asked_for=not isinstance(error, Exception))  # type: ignore[attr-defined]
                raise

    @property
    def _is_first(self) -> bool:
        return bool(self.training.process_index == 0)

    def _decided(self, decide: Callable[[], T]) -> T:
        """Return on every process what the first one decides, or raise its error."""
        assert self.training.world_size > 0  # asking for it sets the processes up
        return decided(decide)

    def _start(self) -> tuple[str | None, bool]:
        """Return (checkpoint to go on from or None, True if the run is finished)."""
        folder, asked = self.folder, self.settings.get("resume_from_checkpoint")
        begun = check_output(folder, self.command, self.settings)
        check_free(folder / LOCK_FILE, "output_dir", folder)
        metrics = folder / METRICS_FILE
        ended = begun and metrics.exists()
        flaw = _flaw_of_end(folder) if ended else ""
        if ended and not flaw:
            if asked and asked.lower() != "true":
                raise ValueError(
                    f"output_dir must be another one with resume_from_checkpoint={asked}, got {folder}: this run is finished"
                )
            print(f"{folder} holds this run, finished:\n{read_text(metrics).rstrip()}")
            return None, True
        resume = find_checkpoint(folder, asked, self.training.world_size)
        if flaw:
            start = f"goes on from {resume}" if resume else "starts over"
            logger.warning("the results of this run are not whole (%s): it %s", flaw, start)
        return resume, False

    def _claim(self, stack: ExitStack) -> tuple[bool, list[Path]]:
        """Lock the folder; return (True if it is new, checkpoints that an earlier kill has cut off)."""
        if not (self.folder / RUN_FILE).exists():
            stack.callback(_remove_if_empty, self.folder)
        stack.enter_context(locked(self.folder / LOCK_FILE, "output_dir", self.folder))
        if _progress(self.folder) != self._seen:
            raise ValueError(f"output_dir must be left to one run, got {self.folder}, where another one ran meanwhile")
        new = prepare_output(self.folder, self.command, self.settings, self.inputs)
        if (self.folder / RAILS_FILE).exists():  # of an earlier start that stopped itself, or was not whole
            for name in (STATE_FILE, RAILS_FILE):
                (self.folder / name).unlink(missing_ok=True)
        if self.resume is None:  # it starts over: what an earlier start found best is not this run's
            shutil.rmtree(self.folder / BEST_FOLDER, ignore_errors=True)
        else:
            begin, _ = steps_of(Path(self.resume))
            for checkpoint in numbered_checkpoints(self.folder):
                # A part of an older one would stay: nothing overwrites it.
                if step_number(checkpoint) < begin and not has_manifest(checkpoint):
                    shutil.rmtree(checkpoint, ignore_errors=True)
        return new, _cut_off(self.folder)

    def _clean(self, new: bool, cut_off: list[Path]) -> None:
        """Remove what a failed run has written in part; if that was all, give the folder up."""
        for checkpoint in _cut_off(self.folder):
            if checkpoint not in cut_off:
                shutil.rmtree(checkpoint, ignore_errors=True)
        if new and not {p.name for p in self.folder.glob("*")} - {RUN_FILE, LOCK_FILE}:
            (self.folder / RUN_FILE).unlink(missing_ok=True)


def check_output(folder: Path, command: str, settings: Mapping[str, Any]) -> bool:
    """Check that a run may use a folder, without writing to it.

    Args:
        folder: output_dir of the run.
        command: sft or train.
        settings: all settings of the run. A folder with the same settings is resumed.

    Returns:
        True if the folder holds this very run, begun earlier, and something to go on from.

    Raises:
        ValueError: the folder holds something else, or a run with other settings, or is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, got {folder}, which is a file")
    check_writable(folder, "output_dir")
    if _left_verdicts_alone(folder):
        return False
    if (folder / RUN_FILE).is_file():
        mine, theirs = _settings(command, settings), read_object(folder / RUN_FILE).get("settings")
        if isinstance(theirs, dict):
            changed = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k) and k not in NOT_COMPARED]
            if changed:
                shown = ", ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} now" for k in sorted(changed)[:5])
                raise ValueError(
                    f"output_dir must be new or hold a run of the same settings, got {folder} with {shown}"
                )
            return True
    if folder.is_dir() and {p.name for p in folder.iterdir()} - {LOCK_FILE}:
        raise ValueError(f"output_dir must be empty or hold a run of this command, got {folder}, which is not empty")
    return False


def prepare_output(
    folder: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
) -> bool:
    """Claim an output folder by a run.json in it, unless it is claimed. Return True if it was new.

    Args:
        folder: output_dir of the run.
        command: sft or train.
        settings: all settings of the run.
        inputs: name and hash of each of its inputs.

    Raises:
        ValueError: from check_output.
    """
    if check_output(folder, command, settings):
        return False
    about = {"settings": _settings(command, settings), "inputs": inputs or {}}
    write_about(folder, folder.name, settings.get("seed", 0), **about)
    return True


def train_to_end(trainer: Any, evaluation: Any, resume: str | None) -> None:
    """Train, save the model and the trainer's state, and write and print the final metrics.

    Args:
        trainer: a GEMTrainer; its output_dir is claimed.
        evaluation: the gem.evaluate.Evaluation that the trainer calls, or None.
        resume: checkpoint to resume from; None: start from the beginning.

    Raises:
        Terminated: a signal came; the step is finished and saved.
        Diverged: a guard rail ended the run because its numbers are no good. Its verdict and the log are in the folder.
    """
    try:
        with together(on_stuck=partial(_leave_verdicts, trainer)):
            _train_to_end(trainer, evaluation, resume)
    except Diverged as error:
        _leave_verdicts(trainer, error)
        raise


def _train_to_end(trainer: Any, evaluation: Any, resume: str | None) -> None:
    if resume is not None:
        check_steps_left(trainer, resume)
        trainer.args.eval_on_start = False  # that evaluation is in the checkpoint's log
    with graceful(trainer) as stop:
        trainer.train(resume_from_checkpoint=resume)
    folder, step, steps = Path(trainer.args.output_dir), trainer.state.global_step, trainer.state.max_steps
    if stop.signum and not trainer.stopped and step < steps:
        saved = f"{folder / f'checkpoint-{step}'} is saved, the same command goes on from there"
        if trainer.args.save_only_model:
            saved = "save_only_model leaves no checkpoint to go on from, resume_from_checkpoint=false starts over"
        raise _terminated(stop.signum, f"terminated after step {step} of {steps}: {saved}")
    if trainer.diverged:
        _raise_diverged(trainer)
    _save(trainer)
    if stop.signum and evaluation is not None:  # which may take long
        text = f"terminated after the last step: {folder} holds the model, the same command evaluates it"
        raise _terminated(stop.signum, text)
    metrics, rails = {"train_steps": float(step), **_restored(trainer)}, trainer.verdicts()
    known = trainer.final_metrics
    if evaluation is not None:
        metrics |= {k.removeprefix("eval_"): v for k, v in (known or trainer.evaluate()).items()}
    metrics |= as_metrics(rails)
    if not trainer.is_world_process_zero():
        return
    if evaluation is not None and not known:
        trainer.save_state()  # now with the final evaluation in its log
    completions = evaluation.completions if evaluation is not None else None
    write_rails(folder, rails)
    write_results(folder, metrics, completions)
    write_manifest(folder, world_size=trainer.args.world_size, files=_artefacts(folder))
    if trainer.stopped:
        print(f"{trainer.stopped}; {_holds(trainer)}")
    print(json.dumps(metrics, indent=1))


def _terminated(signum: int, text: str) -> Terminated:
    """Return the end of a run by a signal, whose text says what is kept."""
    terminated = Terminated(signum, text)
    terminated.kept = ""  # type: ignore[attr-defined]
    return terminated


def _raise_diverged(trainer: Any) -> NoReturn:
    """Save the weights that a guard rail has restored, if there were any, and raise Diverged."""
    diverged = Diverged(trainer.stopped, rail="")
    diverged.kept = _holds(trainer)  # type: ignore[attr-defined]
    if trainer.restored:
        _save(trainer)
    raise diverged


def _leave_verdicts(trainer: Any, error: Exception) -> None:
    """Write the log and the verdicts of a run that stopped itself, which has no other results.

    A full disk must not hide why it stopped.
    """
    if not isinstance(error, Diverged) or not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    with suppress(OSError), _whole_or_none(folder):
        trainer.save_state()
        write_rails(folder, trainer.verdicts(error))


def _holds(trainer: Any) -> str:
    """Say which weights a guard rail has restored."""
    if not trainer.restored:
        return "no checkpoint from before that is there to restore"
    step = steps_of(Path(trainer.restored))[0]
    return f"{trainer.args.output_dir} holds the weights of {Path(trainer.restored).name}, of step {step}"


def _restored(trainer: Any) -> dict[str, float]:
    """Return at which step a guard rail ended the run, and of which step the weights are that it restored."""
    if not trainer.stopped:
        return {}
    steps = {"stopped_step": float(trainer.state.global_step)}
    if trainer.restored:
        steps["restored_step"] = float(steps_of(Path(trainer.restored))[0])
    return steps


def _save(trainer: Any) -> None:
    """Save the model and the trainer's state; if that fails, remove the files that it has written in part."""
    with _whole_or_none(Path(trainer.args.output_dir)) if trainer.is_world_process_zero() else nullcontext():
        trainer.save_model()
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()  # a process that ends by an error now would have torchrun end the others


@contextmanager
def _whole_or_none(folder: Path) -> Iterator[None]:
    """Remove the files of a folder that the block has written, if it fails."""
    before = _written(folder)
    try:
        yield
    except BaseException:
        for path, when in _written(folder).items():
            if before.get(path) != when:
                path.unlink(missing_ok=True)
        raise


def _written(folder: Path) -> dict[Path, int]:
    """Return when each file of a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def _artefacts(folder: Path) -> list[Path]:
    """Return the files that a finished run is made of."""
    patterns = (*WEIGHTS, "*.json", "*.jinja", COMPLETIONS_FILE)
    return [p for pattern in patterns for p in folder.glob(pattern) if p.name not in (RUN_FILE, MANIFEST_FILE)]


def _flaw_of_end(folder: Path) -> str:
    """Return why the results in a folder are not those of a finished run; "" if they are."""
    path = folder / METRICS_FILE
    try:
        metrics = read_object(path)
    except (OSError, ValueError) as error:
        return str(error)
    wrong = [k for k, v in metrics.items() if type(v) not in (int, float) or not math.isfinite(v)]
    if wrong or "train_steps" not in metrics:
        got = f"{wrong[0]}: {metrics[wrong[0]]!r}" if wrong else f"{sorted(metrics)[:8]}"
        return f"{path}: expected finite numbers, train_steps among them, got {got}"
    if (folder / MANIFEST_FILE).exists():
        return manifest_flaw(folder)
    is_old = "inputs" not in read_object(folder / RUN_FILE)  # of a release without manifests
    return "" if is_old else f"it has no {MANIFEST_FILE}, which is written last"


def _kept(folder: Path, *, asked_for: bool) -> str:
    """Say what is left of a run that ended too early, and after a signal how to go on."""
    saved = (*numbered_checkpoints(folder), folder / BEST_FOLDER)
    whole = next(filter(has_manifest, saved), None)
    if whole is None:
        return "no checkpoint was written"
    if whole.name == BEST_FOLDER:
        return f"{whole} holds the weights of the best evaluation"
    return f"{whole} is the last whole checkpoint" + (", the same command goes on from there" if asked_for else "")


def _left_verdicts_alone(folder: Path) -> bool:
    """Return True if a folder holds a run that stopped itself before its first checkpoint: there is nothing to go on from."""
    names = {path.name for path in folder.glob("*")} - {LOCK_FILE}
    return RAILS_FILE in names and names <= {RUN_FILE, RAILS_FILE, STATE_FILE}


def _progress(folder: Path) -> set[str]:
    """Return the names of what a run writes in the course of time."""
    names = {path.name for path in numbered_checkpoints(folder)}
    return names | {name for name in (RUN_FILE, METRICS_FILE) if (folder / name).exists()}


def _cut_off(folder: Path) -> list[Path]:
    """Return the checkpoints without a manifest."""
    best = folder / BEST_FOLDER
    return [p for p in (*numbered_checkpoints(folder), best) if p.is_dir() and not has_manifest(p)]


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def write_about(folder: Path, name: str, seed: int, **more: Any) -> None:
    """Write run.json, which makes `folder` the folder of a run: its name and seed in reports, and more."""
    write_lines(folder / RUN_FILE, [json.dumps({"name": name, "seed": seed, **more}, indent=1)])


def write_results(
    folder: Path, metrics: Mapping[str, float], completions: Sequence[Mapping[str, str]] | None = None
) -> None:
    """Write a run's completions, if given, and then its metrics: a folder with metrics holds a finished run."""
    if completions is not None:
        lines = [json.dumps(completion, ensure_ascii=False) for completion in completions]
        write_lines(folder / COMPLETIONS_FILE, lines)
    write_lines(folder / METRICS_FILE, [json.dumps(metrics, indent=1)])


def _settings(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make a run this run, as JSON gives them back."""
    kept = {"command": command, **{k: v for k, v in settings.items() if k not in NOT_COMPARED}}
    return dict(json.loads(json.dumps(kept, default=str)))
