"""The embedded default: a small dense Llama, pretrained once on the standard library and cached."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from photon_train.config import DataSettings
from photon_train.data.corpora import Document, read_documents, split_documents
from photon_train.data.packing import pack
from photon_train.data.pretrain import PretrainSettings, Stage, pretrain, train_tokenizer
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory, default_cache_dir

# Raise it when the code of the recipe changes what it makes, so that older caches are not taken for it.
RECIPE_VERSION = 1


def demo_dense_model(
    cache_dir: Path | None = None, progress: bool = True, settings: PretrainSettings | None = None
) -> Path:
    """Directory of the demo's dense model in Hugging Face format; pretrains it on first use.

    It is trained on the training side of `split_documents(read_documents(None, ...), settings.held_out_fraction)`,
    so the held-out side of the same split is unseen text. The cache key is a hash of the recipe and of the corpus.
    A run that is killed leaves no directory under that key. Call it on the main process first: the others then find
    the cached one.

    Args:
        cache_dir: Where models are cached; None is `default_cache_dir()`.
        progress: Show the loss, the speed and the remaining time.
        settings: The recipe; None is `PretrainSettings.for_machine()`.

    Returns:
        A directory with `model.safetensors`, `config.json`, `generation_config.json` and the tokenizer's files.

    Raises:
        PhotonError: if there is no standard library source to read, or the cache cannot be written.
    """
    settings = settings or PretrainSettings.for_machine()
    documents = list(read_documents(None, DataSettings()))
    path = (cache_dir or default_cache_dir()) / f"demo-dense-{_fingerprint(settings, documents)}"
    if path.is_dir():
        return path
    train, _ = split_documents(documents, settings.held_out_fraction)
    tokenizer = train_tokenizer((document.text for document in train), settings.vocab_size)
    tokenizer.model_max_length = settings.max_positions
    eos_id = tokenizer.eos_token_id
    dataset = pack(train, tokenizer, settings.seq_len, 1, eos_id, progress=progress)
    stage = Stage(dataset, settings.batch_size, settings.steps)
    try:
        # The directory is opened before the training: a cache that cannot be written is known at once.
        with atomic_directory(path) as directory:
            pretrain(settings, [stage], eos_id, progress).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except OSError as error:
        raise PhotonError(f"{path}: cannot be written: {error}; set PHOTON_TRAIN_CACHE to another place") from error
    return path


def _fingerprint(settings: PretrainSettings, documents: list[Document]) -> str:
    digest = hashlib.sha256(json.dumps([RECIPE_VERSION, asdict(settings)], sort_keys=True).encode())
    for document in documents:
        digest.update(f"\0{document.name}\0{document.text}".encode())
    return digest.hexdigest()[:16]
