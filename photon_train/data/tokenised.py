"""Corpora on disk as tokens: written shard by shard, restartable, and read through memory maps.

A corpus is a directory of `shard-00000`, `shard-00001`, ... and `corpus.json`, written last. A shard holds

    tokens.bin    every token of its documents (uint16 where the largest id allows, else uint32)
    unlearned.bin one byte per token, 1 where nothing is learned (conversations only)
    offsets.npy   first token of each document, and the end (int64)
    points.npy    where the hash of each document's name lies in [0, 1): decides which split it falls in
    shard.json    what it was made of, and the sizes of the files

Shards appear whole or not at all, so a run that was killed is repeated and goes on after the last one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from photon_train.config import DataSettings
from photon_train.data.chat import say_left_out
from photon_train.data.corpora import Document, hash_point, read_documents, split_threshold
from photon_train.data.identity import arrays_hash, documents_hash, local_source, source_hash, source_stamps
from photon_train.data.packing import IGNORED_LABEL, check_alignment, isolated, tokenize_documents
from photon_train.data.tokenizers import largest_id, tokenizer_hash
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory, atomic_write_text, make_directory, remove_leftovers

CORPUS_FILE = "corpus.json"
_SHARD_FILE = "shard.json"
DOCUMENTS_PER_SHARD = 20_000


# --- writing ---


def write_corpus(
    source: str | None,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    documents_per_shard: int = DOCUMENTS_PER_SHARD,
    max_characters: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Tokenise `source` into `directory`; a complete corpus of the same settings is left as it is.

    Documents are read as a stream, in their order, and `settings.num_workers` processes tokenise whole shards. The
    content does not depend on the number of workers, nor on how often the writing was interrupted.

    Args:
        source, settings, max_characters: As in `corpora.read_documents`.
        tokenizer: For conversations one that `chat.prepare_chat` has accepted.
        directory: The corpus; created, or continued if it was begun with the same settings.
        documents_per_shard: Documents of one shard, the unit of work and of restarting.
        progress: Receives a line after each shard.

    Raises:
        PhotonError: if `directory` belongs to other settings, the source cannot be read, or a worker dies.
    """
    directory = Path(directory)
    stamps, dtype = source_stamps(source), _dtype(tokenizer)
    known = _read_json(directory / CORPUS_FILE) or {}
    if known:
        _check_entries(directory / CORPUS_FILE, known, {"made_of": dict, "shards": int})
    content = known.get("made_of", {}).get("source_content") if known.get("stamps") == stamps else None
    made_of = _made_of(source, settings, tokenizer, documents_per_shard, max_characters)
    made_of["source_content"] = content or source_hash(source)
    if _is_complete(directory, made_of):
        return
    make_directory(directory)
    remove_leftovers(directory)
    documents = read_documents(source, settings, max_characters)
    shards: list[dict[str, Any]] = []
    waiting: list[tuple[int, Future]] = []
    with _one_error(directory), _workers(settings.num_workers, tokenizer) as pool:

        def collect(most: int) -> None:
            while len(waiting) > most:
                number, future = waiting.pop(0)
                shards.append(future.result())
                progress(f"shard {number}: {shards[-1]['documents']:,} documents, {shards[-1]['tokens']:,} tokens")

        number = 0
        while batch := list(islice(documents, documents_per_shard)):
            path = directory / f"shard-{number:05d}"
            mark = {"made_of": made_of, "content": documents_hash(batch), "dtype": dtype}
            if (known := _read_json(path / _SHARD_FILE)) and {key: known.get(key) for key in mark} == mark:
                waiting.append((number, _done(known)))
            else:
                waiting.append((number, pool.submit(_write_shard, path, batch, mark)))
            number += 1
            collect(2 * max(1, settings.num_workers))  # what is read ahead is bounded
        collect(0)
    say_left_out(*(sum(shard[key] for shard in shards) for key in ("left_out", "read")))
    if not sum(shard["documents"] for shard in shards):
        raise PhotonError(f"{source or 'the standard library'}: no document has anything to learn")
    corpus = {
        "made_of": made_of,
        "stamps": stamps,
        "shards": number,
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "vocab_size": len(tokenizer),
    }
    atomic_write_text(directory / CORPUS_FILE, json.dumps(corpus, indent=1) + "\n")


def _made_of(source, settings, tokenizer, documents_per_shard, max_characters) -> dict[str, Any]:
    """What the content of a corpus depends on, beside that of the source."""
    kept = ("messages_field", "text_field", "hub_config", "hub_split", "max_documents")
    return {
        "source": source,
        **{key: value for key, value in asdict(settings).items() if key in kept},
        "tokenizer": tokenizer_hash(tokenizer),
        "documents_per_shard": documents_per_shard,
        "max_characters": max_characters,
    }


def _dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    """The smallest type that holds every id."""
    return "uint16" if largest_id(tokenizer) < 2**16 else "uint32"


def _is_complete(directory: Path, made_of: dict[str, Any]) -> bool:
    known = _read_json(directory / CORPUS_FILE) or _read_json(directory / "shard-00000" / _SHARD_FILE)
    if known is None:
        return False
    if not isinstance(known, dict) or not isinstance(known.get("made_of"), dict):
        raise _damaged(directory / CORPUS_FILE, "has no usable 'made_of'")
    if known["made_of"] != made_of:
        changed = sorted(key for key in made_of if known["made_of"].get(key) != made_of[key])
        raise PhotonError(f"{directory} was made with another {', '.join(changed)}: give another directory")
    return "shards" in known


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PhotonError(f"{path} cannot be read ({error}): remove it and tokenise again") from error


class _InProcess(Executor):
    """Does the work when it is asked for."""

    def submit(self, function, *arguments):  # noqa: ANN001
        return _done(function(*arguments))


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


_tokenizer: PreTrainedTokenizerBase | None = None  # a worker's own


def _workers(number: int, tokenizer: PreTrainedTokenizerBase) -> Executor:
    if number == 0:
        _start_worker(tokenizer)
        return _InProcess()
    # Not forked: the tokenizers' threads and those of torch would not survive it.
    return ProcessPoolExecutor(number, get_context("spawn"), initializer=_start_worker, initargs=(tokenizer,))


def _start_worker(tokenizer: PreTrainedTokenizerBase) -> None:
    global _tokenizer
    _tokenizer = tokenizer


@contextmanager
def _one_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise PhotonError(
            f"a process that tokenised into {directory} died (out of memory?): run the same command again, with a "
            "smaller dataset.num_workers if it repeats; finished shards are kept"
        ) from error
    except OSError as error:
        raise PhotonError(f"{directory} cannot be written: {error}; finished shards are kept") from error


def _write_shard(path: Path, documents: list[Document], mark: dict[str, Any]) -> dict[str, Any]:
    """Tokenise `documents` into the directory `path`; returns what `shard.json` says."""
    rows, points, unlearned = [], [], []
    for document, ids, mask in tokenize_documents(documents, _tokenizer, _tokenizer.eos_token_id):
        rows.append(ids)
        points.append(hash_point(document.name))
        unlearned.append(mask)
    tokens = np.concatenate(rows).astype(mark["dtype"]) if rows else np.zeros(0, mark["dtype"])
    with atomic_directory(path) as directory:
        tokens.tofile(directory / "tokens.bin")
        if documents[0].messages is not None:
            np.concatenate([*unlearned, np.zeros(0, bool)]).astype(np.uint8).tofile(directory / "unlearned.bin")
        np.save(directory / "offsets.npy", np.cumsum([0, *map(len, rows)], dtype=np.int64))
        np.save(directory / "points.npy", np.asarray(points, dtype=np.float64))
        sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
        counts = {"read": len(documents), "left_out": len(documents) - len(rows), "documents": len(rows)}
        shard = {**mark, **counts, "tokens": len(tokens), "sizes": sizes}
        (directory / _SHARD_FILE).write_text(json.dumps(shard, indent=1) + "\n", encoding="utf-8")
    return shard


# --- reading ---


def is_corpus(source: str | None) -> bool:
    """Whether `source` is the directory of a tokenised corpus, complete or not."""
    path = local_source(source)
    return path is not None and path.is_dir() and ((path / CORPUS_FILE).exists() or (path / "shard-00000").exists())


class Corpus:
    """A complete corpus.

    Args:
        directory: From `write_corpus`.
        tokenizer: The tokenizer of the run, which must be the corpus'.

    Raises:
        PhotonError: if the corpus is incomplete, a file of it is truncated, or it was made with another tokenizer.
    """

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.directory = Path(directory)
        corpus = _read_json(self.directory / CORPUS_FILE)
        if corpus is None:
            raise PhotonError(f"{self.directory} is not complete: run the command that tokenises it again")
        _check_entries(self.directory / CORPUS_FILE, corpus, {"made_of": dict, "shards": int})
        if corpus["made_of"].get("tokenizer") != tokenizer_hash(tokenizer):
            raise PhotonError(
                f"{self.directory} was tokenised with another tokenizer or chat template than the model's: "
                "tokenise it again"
            )
        self.tokens: list[np.ndarray] = []
        self.unlearned: list[np.ndarray | None] = []
        offsets, points, hashes = [], [], []
        for number in range(corpus["shards"]):
            path = self.directory / f"shard-{number:05d}"
            shard = _read_json(path / _SHARD_FILE) or {"sizes": {_SHARD_FILE: 0}, "dtype": ""}
            _check_entries(path / _SHARD_FILE, shard, {"sizes": dict, "dtype": str})
            for name, size in shard["sizes"].items():
                found = (path / name).stat().st_size if (path / name).is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                    raise PhotonError(f"{path / name} {state}: remove {path} and {CORPUS_FILE}, and tokenise again")
            if shard["dtype"] != _dtype(tokenizer):
                raise PhotonError(
                    f"{path / 'tokens.bin'} holds ids as {shard['dtype']}, which the tokenizer's do not fit: remove "
                    f"{self.directory}, and tokenise again"
                )
            self.tokens.append(_map(path / "tokens.bin", shard["dtype"]))
            hashes.append(shard.get("content"))
            mask = path / "unlearned.bin"
            self.unlearned.append(_map(mask, np.uint8) if mask.exists() else None)
            offsets.append(_load_array(path / "offsets.npy", np.int64))
            points.append(_load_array(path / "points.npy", np.float64))
            ends = offsets[-1][[0, -1]].tolist() if len(offsets[-1]) else []
            if ends != [0, len(self.tokens[-1])] or (np.diff(offsets[-1]) < 0).any():
                raise _damaged(path / "offsets.npy", "does not fit tokens.bin")
            if len(points[-1]) != len(offsets[-1]) - 1:
                raise _damaged(path / "points.npy", "does not fit offsets.npy")
        self.points = np.concatenate(points)
        self.lengths = np.concatenate([np.diff(shard) for shard in offsets])
        # Tokens follow from documents and tokenizer; corpora of older versions know the names of documents alone.
        tokens = (*self.tokens, *self.unlearned, self.lengths)
        self.content = f"{tokenizer_hash(tokenizer)} {hashes}" if all(hashes) else arrays_hash(*tokens)
        self.first = np.concatenate([shard[:-1] for shard in offsets])
        self.shard = np.repeat(np.arange(len(offsets)), [len(shard) - 1 for shard in offsets])

    def split(self, held_out_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the training and of the held-out documents, as `corpora.split_documents` chooses them.

        Raises:
            PhotonError: if there are fewer than two documents.
        """
        if len(self.points) < 2:
            raise PhotonError(f"{self.directory} holds a single document, so none can be held out: give more")
        held_out = self.points < split_threshold(self.points.min(), self.points.max(), held_out_fraction)
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _check_entries(path: Path, content: Any, wanted: dict[str, type]) -> None:
    """That a JSON file has these entries.

    Raises:
        PhotonError: if one is missing or of another type, or the file holds something else.
    """
    for key, kind in wanted.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise _damaged(path, f"has no usable {key!r}")


def _load_array(path: Path, dtype: Any) -> np.ndarray:
    """A vector from a .npy file.

    Raises:
        PhotonError: if the file holds something else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype != dtype:
        raise _damaged(path, "is no vector of the type that was written")
    return found


def _damaged(path: Path, what: str) -> PhotonError:
    remove = path if path.name == CORPUS_FILE else f"{path.parent} and {CORPUS_FILE}"
    return PhotonError(f"{path} {what}: remove {remove}, and tokenise again")


def _map(path: Path, dtype: Any) -> np.ndarray:
    """A file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


class CorpusDataset(torch.utils.data.Dataset):
    """Documents of a corpus packed into sequences, as `packing.pack` packs them, without holding their tokens.

    Where each document starts follows from the lengths alone (20 bytes per document are kept), so any sequence can be
    read at any time: a resumed run replays nothing, and processes and workers need not agree about a position.

    Args:
        corpus: The corpus.
        documents: Indices of its documents, in order.
        seq_len, align, pad_id, pad_last, isolate: As in `packing.pack`.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: np.ndarray,
        seq_len: int,
        align: int,
        pad_id: int,
        pad_last: bool = False,
        isolate: bool = False,
    ) -> None:
        check_alignment(seq_len, align)
        self.isolate = isolate
        self.corpus, self.documents, self.seq_len, self.pad_id = corpus, documents, seq_len, pad_id
        lengths = corpus.lengths[documents]
        taken = -(-lengths // align) * align
        self.starts = np.cumsum(taken) - taken
        total = int(taken.sum())
        self._length = -(-total // seq_len) if pad_last or total < seq_len else total // seq_len
        end = self._length * seq_len
        self.num_documents = len(documents)
        self.num_tokens = int(np.clip(end - self.starts, 0, lengths).sum())
        self.packing_efficiency = self.num_tokens / end

    def __len__(self) -> int:
        return self._length

    def content_hash(self) -> str:
        """As `PackedDataset.content_hash`, of what the corpus was made of."""
        return hashlib.sha256(f"{self.corpus.content} {arrays_hash(self.documents)}".encode()).hexdigest()

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """As `PackedDataset.batch`."""
        tokens = np.full((len(indices), self.seq_len), self.pad_id, dtype=np.int64)
        masked = np.ones((len(indices), self.seq_len), dtype=bool)
        starts = np.zeros((len(indices), self.seq_len + 1), dtype=bool)
        for row, index in enumerate(indices.tolist()):
            for place, shard, first, length in self._parts(index):
                starts[row, [place, place + length]] = True
                tokens[row, place : place + length] = self.corpus.tokens[shard][first : first + length]
                unlearned = self.corpus.unlearned[shard]
                masked[row, place : place + length] = False if unlearned is None else unlearned[first : first + length]
        input_ids = torch.from_numpy(tokens)
        labels = input_ids.masked_fill(torch.from_numpy(masked), IGNORED_LABEL)
        rows = {"input_ids": input_ids, "labels": labels}
        return isolated(rows, torch.from_numpy(starts[:, :-1])) if self.isolate else rows

    def _parts(self, index: int) -> Iterator[tuple[int, int, int, int]]:
        """Pieces of sequence `index`: start in it, shard, first token there, tokens."""
        begin, end = index * self.seq_len, (index + 1) * self.seq_len
        number = max(0, int(np.searchsorted(self.starts, begin, side="right")) - 1)
        while number < len(self.starts) and self.starts[number] < end:
            document, start = self.documents[number], int(self.starts[number])
            skipped = max(0, begin - start)
            length = min(int(self.corpus.lengths[document]) - skipped, end - max(begin, start))
            if length > 0:
                first = int(self.corpus.first[document]) + skipped
                yield max(begin, start) - begin, int(self.corpus.shard[document]), first, length
            number += 1
