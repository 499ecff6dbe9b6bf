"""What a checkpoint's weights were made of. It is held by the checkpoint, so that no other text,
tokenizer or setting takes the place of the run's own when it goes on or is stored again.

Texts are compared by their content: files and the cache may be moved. Paths are kept to name the
file that has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qat.errors import UserError
from qat.quantize.plan import digest_of
from qat.runs.result import conditions, differing

if TYPE_CHECKING:
    from torch import Tensor

    from qat.text.shards import TokenStream
    from qat.text.source import Source
    from qat.text.tokenizer import Tokenizer

KEY = "identity"  # in a checkpoint
WHAT = {"train": "the training text", "val": "the validation text", "tokenizer": "the tokenizer"}
INITIAL, TEACHER = "initial", "teacher"
WEIGHTS = {INITIAL: "model.init_from has other weights", TEACHER: "the teacher has other weights"}
# Settings that say where the text is: they count only if it is another one.
PLACES = ("data.files", "data.train_files", "data.val_files", "data.tokenizer")
MOST_NAMED = 4  # changes in a line


@dataclass(frozen=True)
class CheckpointIdentity:
    """``settings`` by dotted name, without bookkeeping; ``data``: hashes of the tokens of train
    and val, of the tokenizer, and of weights of others that a run is made with; ``files``: path ->
    hash of what the text was read from."""

    settings: dict[str, Any]
    data: dict[str, str]
    files: dict[str, str]

    @staticmethod
    def of(
        settings: dict[str, Any],
        source: Source,
        tokenizer: Tokenizer,
        streams: Mapping[str, TokenStream],
        weights: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> CheckpointIdentity:
        """``settings`` of a row, ``streams`` of train, val or both (reads every token),
        ``weights`` that it began with and those of its teacher."""
        files = {str(tokenizer.path.absolute()): tokenizer.sha256}
        for stream in streams.values():
            files |= stream.digests
        return CheckpointIdentity(
            conditions(settings),
            {side: stream.fingerprint for side, stream in streams.items()}
            | {"tokenizer": tokenizer.sha256}
            | {whose: digest_of(tensors) for whose, tensors in (weights or {}).items()},
            source.files or files,
        )

    @staticmethod
    def held_by(state: Mapping[str, Any]) -> CheckpointIdentity | None:
        """None if an earlier version wrote the checkpoint, which noted nothing."""
        return CheckpointIdentity(**state[KEY]) if KEY in state else None

    def changes(self, now: CheckpointIdentity, apart_from: Iterable[str] = ()) -> list[str]:
        """What is another, a phrase each; ``apart_from``: settings or groups that may be."""
        apart_from = (*apart_from, *PLACES, "data.cache_dir")
        names = differing(self.settings, now.settings, apart_from)
        found = [self._setting(now, name) for name in names]
        both = [whose for whose in WEIGHTS if whose in self.data and whose in now.data]
        found += [WEIGHTS[whose] for whose in both if self.data[whose] != now.data[whose]]
        return found + self._changes_of_text(now)

    def _changes_of_text(self, now: CheckpointIdentity) -> list[str]:
        """Of what ``now`` holds of it."""
        asked = [side for side in WHAT if side in now.data]
        sides = [side for side in asked if now.data[side] != self.data[side]]
        if not sides:
            return []
        there, here = set(self.files.values()), set(now.files.values())
        gone = {path for path, digest in self.files.items() if digest not in here}
        new = {path for path, digest in now.files.items() if digest not in there}
        found = [f"{path} has other content" for path in sorted(gone & new)]
        is_all = asked == [side for side in WHAT if side in self.data]
        if is_all:  # else some of the files are not asked for
            found += [f"{path} is gone" for path in sorted(gone - new)]
            found += [f"{path} is new" for path in sorted(new - gone)]
        names = [n for n in differing(self.settings, now.settings) if n in PLACES]
        found += [self._setting(now, name) for name in names]
        return found or [f"{WHAT[side]} is another" for side in sides]

    def _setting(self, now: CheckpointIdentity, name: str) -> str:
        return f"{name} was {self.settings.get(name)} and is {now.settings.get(name)}"


def check_resumed(
    typed: str,
    held: CheckpointIdentity | None,
    now: CheckpointIdentity,
    apart_from: Iterable[str] = (),
) -> None:
    """UserError naming ``typed`` unless a run goes on with what its checkpoint was made of."""
    if held is None:
        raise UserError(
            f"{typed}: an earlier version wrote its checkpoint, and did not note what text and "
            "settings it was made of; start a new run"
        )
    check_same(typed, held, now, apart_from)


def check_same(
    typed: str,
    held: CheckpointIdentity | None,
    now: CheckpointIdentity,
    apart_from: Iterable[str] = (),
) -> None:
    """The same for what only reads the checkpoint: without a note there is nothing to compare."""
    if held is not None and (changes := held.changes(now, apart_from)):
        more = f" and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else ""
        raise UserError(
            f"{typed}: its checkpoint was made of something else: "
            f"{'; '.join(changes[:MOST_NAMED])}{more}: undo that, or start a new run"
        )
