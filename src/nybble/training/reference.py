"""The reference of a preference objective: the model as training starts.

Its log-probabilities of all rows are computed once, before the first step, while the model still is what training
starts from: adapters that add nothing yet, or those that it continues from. So there is no second model. They are
cached part by part under a key made of everything that decides them, so a start that was interrupted goes on, and
another training from the same start on the same rows computes none again.

Where they are not computed beforehand, and for kto's mismatched answers, the weights that training started from are put
back for the length of a forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble.data import IGNORED, Example, Groups
from nybble.kernels import send
from nybble.run.processes import Processes
from nybble.storage.cache import Cache, digest
from nybble.training.answers import sums_by_answer, token_log_probabilities, with_answers
from nybble.training.evaluate import batches_for, device_of, evaluation_mode

SCORED_TOKENS = 2_048  # in a batch; a longer example is one by itself
_EXAMPLES_A_PART = 256  # of what is cached
_BATCHES_AT_ONCE = 16  # batches of each process between two exchanges
_FILE = "reference.safetensors"


class AnswerScorer:
    """Log-probabilities of the answers of examples, without gradients; processes share the batches.

    Batches are made of neighbouring examples, up to SCORED_TOKENS tokens, so their composition, on which the last bits
    of a 16-bit result depend, follows from the rows alone.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        compute_dtype: torch.dtype,
        ld_alpha: float | None = None,
        processes: Processes = Processes(),  # noqa: B008 - a value
    ) -> None:
        """`ld_alpha`: the weight of tokens beyond the shorter answer of a pair."""
        self._collate = batches_for(model, tokenizer)
        self._dtype = compute_dtype
        self._ld_alpha = ld_alpha
        self.processes = processes

    def __call__(self, model: Any, examples: Sequence[Example]) -> Iterator[tuple[int, list[list[float]]]]:
        """Number of the first of some neighbouring examples, and the sums of each one's answers; part by part."""
        batches = list(self._batches(examples))
        count, rank = self.processes.count, self.processes.rank
        for first in range(0, len(batches), _BATCHES_AT_ONCE * count):
            together = batches[first : first + _BATCHES_AT_ONCE * count]
            mine = []
            with evaluation_mode(model, self._dtype):
                for start in range(0, len(together), count):
                    # Who has none left repeats the last one: shards are gathered by all processes at once.
                    chosen = together[min(start + rank, len(together) - 1)]
                    mine.append((chosen.start, self._sums(model, [examples[i] for i in chosen])))
            for part in self.processes.gather(mine):
                yield from part

    def _batches(self, examples: Sequence[Example]) -> Iterator[range]:
        first = n_tokens = 0
        for number, example in enumerate(examples):
            length = len(example.input_ids)
            if number > first and n_tokens + length > SCORED_TOKENS:
                yield range(first, number)
                first, n_tokens = number, 0
            n_tokens += length
        if len(examples) > first:
            yield range(first, len(examples))

    def _sums(self, model: Any, examples: Sequence[Example]) -> list[list[float]]:
        batch = with_answers(self._collate([Groups([example])[0] for example in examples]), self._ld_alpha)
        device = device_of(model)
        inputs = {name: send(value, device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        sums: list[list[float]] = (
            sums_by_answer(token_log_probabilities(model, inputs), inputs).view(len(examples), -1).tolist()
        )
        return sums


@dataclass(frozen=True)
class Kept:
    """Where the reference's log-probabilities are cached, and the key of everything that decides them."""

    cache: Cache
    key: str

    def read(self, part: int, shape: tuple[int, ...]) -> Tensor | None:
        """What was stored of a part, `shape float32`; None: nothing."""
        entry = self.cache.find(digest(self.key, part))
        values = None if entry is None else load_file(entry / _FILE)["log_probabilities"]
        return values if values is not None and values.shape == shape else None

    def write(self, part: int, values: Tensor) -> None:
        """Store a part; one that cannot be stored is computed again by the next start."""
        tensors = {"log_probabilities": values.contiguous()}
        self.cache.store(digest(self.key, part), 2 * values.nbytes + 4096, lambda f: save_file(tensors, f / _FILE))


class Reference:
    """What the reference says about the answers of the rows, `(examples, answers of one) float32`; NaN: not known."""

    def __init__(self, examples: Sequence[Example], n_answers: int, scorer: AnswerScorer, start: Start | None) -> None:
        """`start`: the weights that training started from, None if nothing is asked for later than at the start."""
        self._examples = examples
        self._scorer = scorer
        self._start = start
        self._is_computed = False  # for all examples, beforehand
        self.values = torch.full((len(examples), n_answers), float("nan"))

    def of(self, places: Sequence[int]) -> Tensor:
        """The log-probabilities of the answers of the examples at `places`, one behind the other."""
        return self.values[list(places)].flatten()

    def compute(self, model: Any, kept: Kept | None, progress: Callable[[int, int], None]) -> int:
        """Compute all that is not cached, with the model as it is; return how many examples were cached.

        Args:
            model: as training starts.
            kept: where they are cached; None: nowhere.
            progress: is called with the examples that are done and their number.
        """
        processes = self._scorer.processes
        n_cached = 0
        for part, first in enumerate(range(0, len(self._examples), _EXAMPLES_A_PART)):
            own = self.values[first : first + _EXAMPLES_A_PART]
            found = kept.read(part, tuple(own.shape)) if kept and processes.is_main else None
            found = processes.gather(found)[0]
            if found is not None:
                own.copy_(found)
                n_cached += len(own)
            else:
                for start, sums in self._scorer(model, _At(self._examples, range(first, first + len(own)))):
                    own[start : start + len(sums)] = torch.tensor(sums)
                if kept and processes.is_main:
                    kept.write(part, own)
            progress(first + len(own), len(self._examples))
        self._is_computed = True
        return n_cached

    def complete(self, model: Any, places: Sequence[int]) -> None:
        """Compute the examples at `places`, those of a step, with the weights that training started from.

        What an earlier step found is not used: it was computed among other rows, so its last bits may differ, and a run
        that is resumed does not have it.
        """
        if not self._is_computed and self._start is not None:
            with self._start.put_back(model):
                for first, sums in self._scorer(model, _At(self._examples, places)):
                    self.values[list(places[first : first + len(sums)])] = torch.tensor(sums)

    def divergence(self, model: Any, places: Sequence[int]) -> Tensor:
        """The mean log-ratio of the answers of these examples, each behind the prompt of the next; a scalar."""
        examples = [self._examples[place] for place in places]
        mismatched = [_with_answer_of(e, examples[i - 1]) for i, e in enumerate(examples)]
        if self._start is None:
            raise ValueError("the divergence needs the weights that training started from")
        found = self._sums(model, mismatched)
        with self._start.put_back(model):
            reference = self._sums(model, mismatched)
        return (found - reference).mean()

    def _sums(self, model: Any, examples: Sequence[Example]) -> Tensor:
        found = torch.zeros(len(examples))
        for first, sums in self._scorer(model, examples):
            found[first : first + len(sums)] = torch.tensor(sums)[:, 0]
        return found


class _At(Sequence[Example]):
    """Some of the examples, each read when it is asked for."""

    def __init__(self, examples: Sequence[Example], places: Sequence[int]) -> None:
        self._examples = examples
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[self._places[index]]


def _with_answer_of(example: Example, other: Example) -> Example:
    """The prompt of an example with the answer of another, which may have several turns, as a row."""
    end, start = _first_learned(example), _first_learned(other)
    ids = [*example.input_ids[:end], *other.input_ids[start:]]
    labels = [*example.labels[:end], *other.labels[start:]]
    return replace(example, input_ids=ids, labels=labels, segments=())


def _first_learned(example: Example) -> int:
    return next(place for place, label in enumerate(example.labels) if label != IGNORED)


class Start:
    """The trained weights as training starts, kept on the host."""

    def __init__(self, model: Any) -> None:
        self._weights = [p.to("cpu", copy=True) for p in _trained(model)]

    @property
    def sha256(self) -> str:
        """Of their bytes, in order."""
        digest_of = hashlib.sha256()
        for weight in self._weights:
            digest_of.update(weight.contiguous().view(torch.uint8).numpy().data)
        return digest_of.hexdigest()

    @contextmanager
    def put_back(self, model: Any) -> Iterator[None]:
        """Within, the model has them again; afterwards the bits that it had."""
        trained = _trained(model)
        now = [p.clone() for p in trained]
        _copy(self._weights, trained)
        try:
            yield
        finally:
            _copy(now, trained)


def _trained(model: Any) -> list[Tensor]:
    """The trained parameters, of shards this process's part, without a graph."""
    found = (p.detach() for p in model.parameters() if p.requires_grad)
    return [p.to_local() if hasattr(p, "to_local") else p for p in found]


@torch.no_grad()
def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for value, parameter in zip(values, into, strict=True):
        parameter.copy_(value)
