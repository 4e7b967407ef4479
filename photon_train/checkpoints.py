"""What can be told of a checkpoint on disk without reading its weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from photon_train.errors import PhotonError

# Kinds of PHOTON models.
MODEL_TYPES = ("photon", "photon_hierarchical")
ADAPTER = "adapter_config.json"


def read_config(directory: str | Path) -> PretrainedConfig:
    """The configuration of a converted or exported model.

    Raises:
        PhotonError: in one line, if there is none, it is of another kind of model, of an older layout, or unsound, or
            an adapter lies beside it.
    """
    import photon_train.models  # noqa: F401  registers PHOTON with the Auto classes

    directory = Path(directory)
    refuse_adapter(directory)
    if not (directory / "config.json").is_file():
        raise PhotonError(f"{directory} holds no config.json: give the converted/ or export/ directory of a run")
    try:
        model_type = PretrainedConfig.get_config_dict(directory)[0].get("model_type")
        if model_type in MODEL_TYPES:
            return AutoConfig.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise PhotonError(f"{directory / 'config.json'}: {first_line(error)}") from error
    raise PhotonError(
        f"{directory} is a {model_type} model and no PHOTON model: convert it with `photon-train convert --model "
        f"{directory} --output RUN`, then give RUN/export"
    )


def read_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's directory (or of a hub id).

    Raises:
        PhotonError: in one line with the fix, if there is none or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        fix = "put tokenizer.json and tokenizer_config.json there"
        has_rules = Path(source, "tokenizer.json").is_file()
        if Path(source, "tokenizer.model").is_file() and not has_rules and find_spec("sentencepiece") is None:
            # What transformers says is of another package, which it tries next.
            raise PhotonError(
                f"{source}: tokenizer.model is read with the package sentencepiece: pip install sentencepiece, or {fix}"
            ) from error
        raise PhotonError(f"{source}: no tokenizer could be read ({first_line(error)}): {fix}") from error


def with_softcap(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, which computes the soft cap of its attention scores if its family has one.

    By itself transformers 5.17 runs Gemma 2 with `sdpa`, which leaves the cap out without a word; 5.18 takes `eager`.
    """
    if model.config.model_type == "gemma2" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return model


def refuse_adapter(directory: Path) -> None:
    """Check that no adapter of PEFT lies in a checkpoint's directory.

    transformers loads one by itself, so that what it computes is not what the weight files hold.

    Raises:
        PhotonError: if there is one.
    """
    if not (directory / ADAPTER).is_file():
        return
    merge = "merge it with `merge_and_unload()` of peft, save that with `save_pretrained`, and give its directory"
    if (directory / "config.json").is_file() or any(directory.glob("*.gguf")):
        raise PhotonError(
            f"{directory / ADAPTER}: an adapter lies beside the model, whose weight files are without it: {merge}; to "
            "leave it out, move the adapter's files away"
        )
    raise PhotonError(f"{directory} is a PEFT adapter, not a model: {merge}")


def first_line(error: Exception) -> str:
    """What transformers says first; more lines are advice about its hub."""
    return str(error).strip().split("\n")[0]
