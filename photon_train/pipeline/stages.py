"""What a run has finished: `stages.json` in its output directory, so that a resumed run goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from photon_train.config import RunConfig, to_yaml
from photon_train.errors import PhotonError
from photon_train.files import atomic_write_text, is_leftover, make_directory, remove_leftovers
from photon_train.pipeline.lock import FILE_NAME as LOCK
from photon_train.pipeline.lock import OutputLock
from photon_train.training.settings import binding_settings

FILE_NAME = "stages.json"


class Stages:
    """Results of finished stages, by name; as a context, the run's hold on its output directory.

    Args:
        config: The run; `output` and `resume` decide what is found.
        writes: Whether this process keeps the record (the main process).
        num_processes: Processes of the run.

    Raises:
        PhotonError: if another run writes into the output directory, if that holds anything and the run does not
            resume it, or if it belongs to a run with other settings.
    """

    def __init__(self, config: RunConfig, writes: bool, num_processes: int = 1) -> None:
        self.path = Path(config.output) / FILE_NAME
        self._writes, self._begun = writes, False
        self._lock = OutputLock(self.path.parent)
        if writes:
            self._lock.check()
        self._settings = binding_settings(config, num_processes)
        found = self._read(config)
        if found is not None:
            self._check_settings(found["settings"])
            self._settings = found["settings"]
        self._found = found
        self.done: dict[str, dict[str, Any]] = dict(found["done"]) if found else {}
        self._text: dict[str, str] | None = found["text"] if found else None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        """Let other runs have the output directory."""
        if self._writes and self._begun:
            self._lock.release()

    def begin(self, config: RunConfig) -> None:
        """Create the output directory with `config.yaml` and the record; what was recorded before is kept too.

        What a killed process was writing is removed. Until the context is left no other run can write there.

        Raises:
            PhotonError: if another run writes there, or has written there meanwhile.
        """
        if self._writes:
            make_directory(self.path.parent)
            self._lock.acquire()
            if not self._begun:
                self._check_unchanged(config)
            remove_leftovers(self.path.parent)
        self._begun = True
        self._save()
        if self._writes:
            atomic_write_text(self.path.parent / "config.yaml", to_yaml(config))

    def _check_unchanged(self, config: RunConfig) -> None:
        """Check, now that no other run can write, that none has since this one looked; let go of the lock if so."""
        try:
            if self._read(config) != self._found:
                raise PhotonError(f"another run has written into output {self.path.parent} meanwhile: start again")
        except PhotonError:
            self._lock.release()
            raise

    def _read(self, config: RunConfig) -> dict[str, Any] | None:
        """The record in the output directory; None where there is nothing yet."""
        directory = self.path.parent
        if directory.exists() and not directory.is_dir():
            raise PhotonError(f"output {directory} is a file: give a directory")
        if not directory.exists() or all(is_leftover(path) or path.name == LOCK for path in directory.iterdir()):
            return None
        if not config.resume:
            raise PhotonError(
                f"output {directory} is not empty: add --resume to go on with that run (a command that has it from the "
                "start can be repeated as it is after a kill), or give another"
            )
        if not self.path.is_file():
            raise PhotonError(
                f"output {directory} is not empty and holds no {FILE_NAME} of a run: give another directory"
            )
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            return {"settings": dict(record["settings"]), "done": dict(record["done"]), "text": record.get("text")}
        except (ValueError, KeyError, TypeError) as error:
            raise PhotonError(f"{self.path} is damaged: give another output directory") from error

    def _check_settings(self, recorded: dict[str, Any]) -> None:
        settings = self._settings
        changed = sorted(key for key in settings.keys() | recorded.keys() if settings.get(key) != recorded.get(key))
        if changed:
            raise PhotonError(
                f"output {self.path.parent} belongs to a run with another {', '.join(changed)}: "
                "use the same settings to resume it, or give another directory"
            )

    def bind_text(self, hashes: dict[str, str]) -> None:
        """Hold the run to its text: finished stages and those to come shall have read the same.

        Args:
            hashes: From `checkpoint.text_hashes`.

        Raises:
            PhotonError: if the run was begun with another text.
        """
        changed = sorted(key for key in hashes if self._text is not None and self._text.get(key) != hashes[key])
        if changed:
            raise PhotonError(
                f"output {self.path.parent} belongs to a run with another {', '.join(changed)} (files were changed, "
                "added or removed, or a hub data set was): restore the text to resume it, or give another directory"
            )
        self._text = hashes

    def run(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `stage`: recorded earlier, or computed now and recorded with its `seconds`.

        A training adds up the seconds of all its attempts itself; its own count then stands.
        """
        if name not in self.done:
            began = time.perf_counter()
            result = stage()
            self.done[name] = {"seconds": time.perf_counter() - began, **result}
            self._save()
        return self.done[name]

    def seconds(self) -> dict[str, float]:
        """Time of each finished stage."""
        return {name: result["seconds"] for name, result in self.done.items()}

    def _save(self) -> None:
        if self._writes and self._begun:
            text = json.dumps({"settings": self._settings, "text": self._text, "done": self.done}, indent=1)
            atomic_write_text(self.path, text + "\n")
