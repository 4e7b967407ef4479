"""The commands: `photon-train NAME`, the recipes and `accelerate launch -m photon_train.commands.NAME` run these."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from photon_train.errors import PhotonError
from photon_train.files import expand_path


def place(text: str) -> str:
    """Type of an option that takes a path or a hub id: ``~`` is the home directory, also after ``--option=``.

    Raises:
        argparse.ArgumentTypeError: for the home of a user whom the machine does not know.
    """
    try:
        return expand_path(text)
    except PhotonError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


GENERATION_CONFIG_HELP = (
    "auto: sampling settings of the model's generation_config.json where none is given; ignore: without them"
)


@contextmanager
def requires(extra: str) -> Iterator[None]:
    """Imports in this block need the packages of an extra of ours (`train`, `serve`, ...).

    Raises:
        PhotonError: naming the package that is missing, and the extra that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "photon_train").split(".")[0] in ("photon_train", "photon_kernels"):
            raise
        raise PhotonError(f"{error.name} is not installed: pip install 'photon-train[{extra}]'") from error
