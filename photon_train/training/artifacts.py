"""The exported model as an artifact of W&B, with the model and the data that it was made from."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from photon_train.config import RunConfig
from photon_train.training.tracking import run_identity, wandb_mode

logger = logging.getLogger(__name__)
_KEPT = ("preset", "tuned_ce", "converted_ce", "dense_ce", "kv_ratio", "parameters", "steps", "tokens")


def log_export(
    config: RunConfig, output_dir: Path, exported: Path, inputs: dict[str, str], report: dict[str, Any]
) -> str | None:
    """Log `exported` to the W&B run that trained it; the main process calls this after the export.

    The artifact refers to the files where they lie (`tracking.artifact=reference`), or holds them (`upload`). Its
    version follows from the export's manifest, which is stored in it. The model and the data become artifacts that the
    run has used where W&B is online; offline, which knows no lineage, the metadata name them.

    Args:
        inputs: `model` and whatever was read as data: directories, files or hub ids.
        report: Numbers for the artifact's metadata.

    Returns:
        The artifact's name; None where there is no W&B, or it fails (with a warning: the export is complete).
    """
    settings = config.tracking
    if settings.tracker != "wandb" or settings.artifact == "none" or wandb_mode(settings) == "disabled":
        return None
    import wandb

    name = _name(f"{settings.run_name or 'photon'}-export")
    try:
        run = wandb.init(
            project=settings.project,
            mode=wandb_mode(settings),
            dir=str(output_dir),
            group=settings.group,
            job_type="photon",
            reinit="finish_previous",
            **run_identity(output_dir, "photon", resume=True),
        )
        with run:
            metadata = {**{key: report[key] for key in _KEPT if key in report}, "made_from": inputs}
            artifact = wandb.Artifact(name, type="model", metadata=metadata)
            if settings.artifact == "upload":
                artifact.add_dir(str(exported))
            else:
                artifact.add_reference(exported.resolve().as_uri(), checksum=False)
                artifact.add_file(str(exported / "manifest.json"), name="export_manifest.json")
            if not run.offline:
                for role, source in inputs.items():
                    used = wandb.Artifact(_name(source), type="model" if role == "model" else "dataset")
                    used.add_reference(_uri(source, role), checksum=False)
                    run.use_artifact(used)
            run.log_artifact(artifact)
    except Exception as error:  # W&B raises what it likes; the export is on disk
        logger.warning("the export was not logged to W&B: %s", (str(error).splitlines() or [repr(error)])[0])
        return None
    return name


def _name(text: str) -> str:
    """`text` as W&B takes names: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.-]+", "-", str(text)).strip("-")[-120:] or "unnamed"


def _uri(source: str, role: str) -> str:
    path = Path(source)
    if path.exists():
        return path.resolve().as_uri()
    return f"https://huggingface.co/{'' if role == 'model' else 'datasets/'}{source}".replace(" ", "%20")
