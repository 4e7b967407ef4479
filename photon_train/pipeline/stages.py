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
from photon_train.training.settings import binding_settings

FILE_NAME = "stages.json"


class Stages:
    """Results of finished stages, by name.

    Args:
        config: The run; `output` and `resume` decide what is found.
        writes: Whether this process keeps the record (the main process).
        num_processes: Processes of the run.

    Raises:
        PhotonError: if the output directory holds anything and the run does not resume it, or it belongs to a run
            with other settings.
    """

    def __init__(self, config: RunConfig, writes: bool, num_processes: int = 1) -> None:
        self.path = Path(config.output) / FILE_NAME
        self._writes, self._begun = writes, False
        self.done: dict[str, dict[str, Any]] = {}
        self._text: dict[str, str] | None = None
        directory, settings = self.path.parent, binding_settings(config, num_processes)
        if directory.exists() and not directory.is_dir():
            raise PhotonError(f"output {directory} is a file: give a directory")
        if not directory.exists() or all(is_leftover(path) for path in directory.iterdir()):
            self._settings = settings
            return
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
            self._settings, self.done, self._text = record["settings"], record["done"], record.get("text")
        except (ValueError, KeyError, TypeError) as error:
            raise PhotonError(f"{self.path} is damaged: give another output directory") from error
        changed = sorted(
            key for key in settings.keys() | self._settings.keys() if settings.get(key) != self._settings.get(key)
        )
        if changed:
            raise PhotonError(
                f"output {directory} belongs to a run with another {', '.join(changed)}: "
                "use the same settings to resume it, or give another directory"
            )

    def begin(self, config: RunConfig) -> None:
        """Create the output directory with `config.yaml` and the record; what was recorded before is kept too.

        What a killed process was writing is removed.
        """
        self._begun = True
        if self._writes:
            make_directory(self.path.parent)
            remove_leftovers(self.path.parent)
            self._save()
            atomic_write_text(self.path.parent / "config.yaml", to_yaml(config))

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
