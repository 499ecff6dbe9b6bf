"""The challenge's published FineWeb shards, fetched from the Hugging Face hub.

The repository is listed, the shards of one tokenizer family are picked by name, and each file is
fetched with huggingface_hub: progress bars, resumption and a local cache come with it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.language.source import Source

LISTING_TIMEOUT_SECONDS = 20


def from_hub(repo_id: str, revision: str, dataset: str, train_shards: int) -> Source:
    """The first ``train_shards`` training shards, all validation shards and the tokenizer.

    ``dataset`` is a family such as ``fineweb10B_sp1024``; its tokenizer is
    ``fineweb_1024_bpe.model``. UserError when the hub cannot be reached (with the command that
    fetches by hand) or has no such files.
    """
    import huggingface_hub

    vocab = re.search(r"sp(\d+)$", dataset)
    tokenizer_name = f"fineweb_{vocab[1]}_bpe.model" if vocab else ""
    where = f"data.repo_id={repo_id} data.revision={revision}"
    try:
        names = _repository_files(repo_id, revision)
        tokenizers = [name for name in names if name.endswith(f"/{tokenizer_name}")]
        train = [
            n for n in names if re.search(rf"/{re.escape(dataset)}/fineweb_train_\d+\.bin$", n)
        ]
        val = [n for n in names if re.search(rf"/{re.escape(dataset)}/fineweb_val_\d+\.bin$", n)]
        if not (vocab and tokenizers and train and val):
            raise UserError(f"data.dataset={dataset}: {where} has no such shards and tokenizer")
        if len(train) < train_shards:
            raise UserError(
                f"data.train_shards = {train_shards}: {repo_id} has only {len(train)} of {dataset}"
            )

        def fetch(name: str) -> Path:
            return Path(
                huggingface_hub.hf_hub_download(
                    repo_id, name, repo_type="dataset", revision=revision
                )
            )

        return Source(
            [fetch(name) for name in train[:train_shards]],
            [fetch(name) for name in val],
            fetch(tokenizers[0]),
            _identity(repo_id, revision, dataset),
            {},
        )
    except UserError:
        raise
    except Exception as error:  # the hub's HTTP library, and so its errors, differ by version
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"data.dataset={dataset}: cannot fetch from the hub ({reason}); on a connected machine "
            f"run `hf download {repo_id} --repo-type dataset --revision {revision} "
            f"--include '*{dataset}*' --include '*{tokenizer_name}'`, copy its cache here, or give "
            "data.train_files, data.val_files and data.tokenizer"
        ) from None


def _identity(repo_id: str, revision: str, dataset: str) -> dict[str, Any]:
    return {"name": "hub", "repo_id": repo_id, "revision": revision, "dataset": dataset}


def _repository_files(repo_id: str, revision: str) -> list[str]:
    """All file names, from the hub or, offline, from what is already in the local cache."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(
            repo_id, revision=revision, timeout=LISTING_TIMEOUT_SECONDS
        )
        return sorted(sibling.rfilename for sibling in info.siblings or [])
    except Exception as unreachable:
        try:
            snapshot = Path(
                huggingface_hub.snapshot_download(
                    repo_id, repo_type="dataset", revision=revision, local_files_only=True
                )
            )
        except Exception:
            raise unreachable from None
        return sorted(str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file())
