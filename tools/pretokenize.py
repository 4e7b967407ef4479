"""Tokenise a large corpus once, into a directory that recipes then take as `--data`.

python tools/pretokenize.py --model DIR|HUB_ID --data PATH|HUB_ID --output DIR --dataset.num_workers 8

The settings are those of the recipes (`dataset.*`). The tokens are written in shards and mapped into memory in
training; repeating the command after it was stopped goes on with the first shard that is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from photon_train.cli import main_wrapper
from photon_train.config import load_config
from photon_train.errors import PhotonError


def main() -> None:
    config = load_config(None, prog="python tools/pretokenize.py", description=__doc__.splitlines()[0])
    if config.model is None:
        raise PhotonError("model is not set: name the dense checkpoint whose tokenizer is to be used")
    from photon_train.data.tokenised import Corpus, write_corpus
    from photon_train.data.tokenizers import tokenizer_for

    tokenizer = tokenizer_for(config.model, config.dataset)
    write_corpus(
        config.data,
        config.dataset,
        tokenizer,
        Path(config.output),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    corpus = Corpus(Path(config.output), tokenizer)
    print(f"{config.output}: {len(corpus.points):,} documents, {int(corpus.lengths.sum()):,} tokens")


if __name__ == "__main__":
    main_wrapper(main)
