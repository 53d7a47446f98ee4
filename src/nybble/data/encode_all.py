"""Encode all rows as examples in several processes and bounded memory, and cache the result on disk.

Rows go to the workers in chunks and come back as Arrow records, which are written as they arrive, in the order of the
rows. So neither the rows nor the tokens are ever all in memory, and the result does not depend on the number of
workers. Rows that fit into one chunk take a fraction of a second: they are encoded in this process, stay in memory and
are not cached.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from pyarrow import RecordBatch

from nybble.data.columns import Converted, Layout, convert_row
from nybble.data.coverage import lost_in
from nybble.data.encode import EncodedRow, Example, encode_row
from nybble.data.files import Row
from nybble.data.pairs import encode_pair, encode_rated
from nybble.data.preferences import convert_preference
from nybble.data.rows import Placed, Rows
from nybble.data.shapes import Form, Turn, prompt_form_of
from nybble.data.store import Examples, map_records, to_records, write_records
from nybble.data.templates import dates_in, many_renderings
from nybble.data.tokens import IGNORED, adds_bos
from nybble.errors import CannotRunError, RowsError
from nybble.recipe import DataSection
from nybble.run.record import Observer
from nybble.storage.cache import Cache, digest

CHUNK = 250  # rows per task of a worker; fewer if the rows are long
_CHUNK_BYTES = 8 << 20  # approximate limit for a chunk as JSON; each worker has at most three chunks in flight
_MOST_WORKERS = 16  # with more workers, reading the rows is the bottleneck
# Part of every cache key: raise it when the same rows and settings give different tokens or a different record layout.
_VERSION = 8
_NO_LIMIT = 1 << 40  # tokens

_Chunk = tuple[int, list[Placed]]  # the number of rows before the chunk, and the chunk's rows


@dataclass(frozen=True)
class Encoder:
    """Everything except the rows that determines the tokens."""

    tokenizer: Any  # a fast tokenizer of transformers
    layout: Layout
    data: DataSection
    answer_field: str
    objective: str = "sft"

    def key(self) -> str:
        """A cache key that is equal for encoders that encode the same rows identically."""
        import tokenizers
        import transformers

        tokenizer = self.tokenizer
        tokenizer("")  # resets the padding and truncation of an earlier call, which would appear in its JSON
        template = str(tokenizer.chat_template)
        return digest(
            (_VERSION, tokenizers.__version__, transformers.__version__),
            tokenizer.backend_tokenizer.to_str(),
            {name: str(value) for name, value in tokenizer.init_kwargs.items() if not name.endswith(("file", "path"))},
            (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id),
            (template, dates_in(template)),
            (asdict(self.layout) | {"ignored": sorted(self.layout.ignored)}, self.answer_field, self.objective),
            self.data.model_dump(include={"loss_on", "reasoning", "on_bad_row", "overlong", "max_length"}),
        )

    def encode(self, chunk: _Chunk) -> RecordBatch:
        """Encode the rows of a chunk as records."""
        before, rows = chunk
        with many_renderings():
            return to_records(self._encode(number, *placed) for number, placed in enumerate(rows, start=before + 1))

    def _encode(self, number: int, where: str, row: Row | RowsError) -> EncodedRow:
        try:
            if isinstance(row, RowsError):
                raise row
            return self._encode_good(number, where, row)
        except RowsError as error:
            if self.data.on_bad_row == "stop":
                raise
            return _skipped(number, str(error))

    def _encode_good(self, number: int, where: str, row: Row) -> EncodedRow:
        data = self.data
        converted = self._convert(where, row)
        form = converted.form
        if self.objective == "kto":
            label = True if converted.is_desirable is None else converted.is_desirable
            answers = [(form, label), *([(converted.rejected, False)] if converted.rejected else [])]
            return self._completed(encode_rated(answers, self.tokenizer, data, where), converted, number, row)
        if self.objective != "sft":
            encoded = encode_pair((form, converted.rejected), self.tokenizer, data, where)
            return self._completed(encoded, converted, number, row)
        encoded = self._encode_form(form, data.max_length, where)
        is_text = self.layout.shape == "text" and not prompt_form_of(form)
        if is_text and encoded.length > data.max_length and data.overlong != "drop":
            # No part of a text without answers is worth less than its beginning.
            documents = [self._encode_form([piece], _NO_LIMIT, where).examples[0] for piece in form]
            encoded = replace(encoded, examples=[part for whole in documents for part in self._parts(whole)])
        return self._completed(encoded, converted, number, row)

    def _convert(self, where: str, row: Row) -> Converted:
        has_template = bool(self.tokenizer.chat_template)
        convert = convert_preference if self.layout.shape == "preference" else convert_row
        converted = convert(row, self.layout, where, has_template, self.answer_field)
        if not has_template and any(isinstance(part, Turn) for part in converted.form):
            raise RowsError(
                f"{where}: {self.layout.shape} rows need a chat template and this tokenizer has none; "
                "set --chat_template inst, chatml or a .jinja file"
            )
        return converted

    def _completed(self, encoded: EncodedRow, converted: Converted, number: int, row: Row) -> EncodedRow:
        """The row with its number, its reference answer, and what the ledger counts of its columns."""
        answer = row.get(self.answer_field)
        examples = [
            replace(
                example if converted.is_learned else _not_learned(example),
                row=number,
                answer=answer if isinstance(answer, str) else None,
            )
            for example in encoded.examples
        ]
        notes = (*converted.notes, *encoded.notes)
        lost = lost_in([*converted.form, *converted.rejected], self.tokenizer)
        return replace(encoded, examples=examples, not_used=converted.not_used, notes=notes, lost=lost)

    def _encode_form(self, form: Form, max_length: int, where: str) -> EncodedRow:
        data = self.data
        return encode_row(form, self.tokenizer, max_length, data.loss_on, data.overlong, data.reasoning, where)

    def _parts(self, whole: Example) -> Iterator[Example]:
        """Part a text into pieces of `max_length` tokens, each with a begin token if the text has one."""
        begin = [self.tokenizer.bos_token_id] if adds_bos(self.tokenizer) else []
        end = len(whole.input_ids)
        cuts = list(range(len(begin), end, self.data.max_length - len(begin)))
        if len(cuts) > 1 and end - cuts[-1] + len(begin) < 2:  # a piece of one token predicts nothing
            cuts[-1] -= 1
        for first, last in pairwise([*cuts, end]):
            shift = len(begin) - first
            spans = ((max(a, first) + shift, min(b, last) + shift, kind) for a, b, kind in whole.spans)
            yield replace(
                whole,
                input_ids=begin + whole.input_ids[first:last],
                labels=[IGNORED] * len(begin) + whole.labels[first:last],
                spans=tuple((a, b, kind) for a, b, kind in spans if a < b),
                n_answers=int(last == end),
                n_stops=int(last == end),
                stop_tokens=whole.stop_tokens if last == end else (),
                last_answer_start=len(begin),
            )


def _not_learned(example: Example) -> Example:
    """The example without anything to learn."""
    return replace(
        example,
        labels=[IGNORED] * len(example.labels),
        spans=(),
        n_answers=0,
        n_stops=0,
        n_cut_stops=0,
        stop_tokens=(),
        n_empty=0,
    )


def _skipped(number: int, fault: str) -> EncodedRow:
    """A row that cannot be used, which is counted and named."""
    empty = Example(
        input_ids=[],
        labels=[],
        n_answers=0,
        n_stops=0,
        n_cut_stops=0,
        stop_tokens=(),
        n_empty=0,
        last_answer_start=0,
        is_truncated=False,
        row=number,
    )
    return EncodedRow([empty], length=0, n_turns=0, key=0, prompt_form="", fault=fault)


def encode_rows(rows: Rows, encoder: Encoder, cache: Cache | None, watch: Observer) -> Examples:
    """Encode all rows, in order, or take their examples from `cache`.

    Raises:
        RowsError: a row cannot be used.
        CannotRunError: a worker process was killed.
    """
    if len(rows) <= _rows_a_chunk(rows):
        return Examples([encoder.encode((0, list(rows)))])

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_records(_records(rows, encoder, watch), folder / "examples.arrow")

    if cache is not None:
        key = digest(rows.fingerprint, encoder.key())
        entry = cache.find(key)
        if entry is not None:
            watch.note(f"tokens of {rows.source} loaded from the cache")
            return Examples(map_records(entry / "examples.arrow"))
        why_not = cache.store(key, rows.n_bytes, write)
        if why_not is None:
            return Examples(map_records(cache.path(key) / "examples.arrow"))
        watch.note(f"the tokenized data {why_not}")
    folder = Path(tempfile.mkdtemp(prefix="nybble-"))
    try:
        write(folder / "rows")
        return Examples(map_records(folder / "rows" / "examples.arrow"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # the mapped file stays readable


def _records(rows: Rows, encoder: Encoder, watch: Observer) -> Iterator[RecordBatch]:
    size = _rows_a_chunk(rows)
    n_workers = min(_n_workers(encoder.data.dataset_num_proc), -(-len(rows) // size))
    chunks = _chunks(rows, size)
    batches = _in_processes(chunks, encoder, n_workers) if n_workers > 1 else map(encoder.encode, chunks)
    for number, batch in enumerate(batches, start=1):
        watch.progress("tokenizing", min(number * size, len(rows)), len(rows))
        yield batch


def _rows_a_chunk(rows: Rows) -> int:
    return max(1, min(CHUNK, _CHUNK_BYTES * len(rows) // rows.n_bytes))


def _chunks(rows: Rows, size: int) -> Iterator[_Chunk]:
    placed = iter(rows)
    before = 0
    while chunk := list(islice(placed, size)):
        yield before, chunk
        before += len(chunk)


def _n_workers(wanted: int | None) -> int:
    # A forked process does not need the caller's script; a spawned one would run it again. On macOS, fork is unsafe.
    if sys.platform != "linux":
        return 1
    return wanted or min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def _in_processes(chunks: Iterator[_Chunk], encoder: Encoder, n_workers: int) -> Iterator[RecordBatch]:
    waiting: deque[Future[RecordBatch]] = deque()
    with ProcessPoolExecutor(
        n_workers, multiprocessing.get_context("fork"), initializer=_begin, initargs=(encoder,)
    ) as pool:
        try:
            with warnings.catch_warnings():  # Python 3.12 warns of forking with threads; the children only tokenize
                warnings.simplefilter("ignore", DeprecationWarning)
                pool.submit(bool)  # the first task starts all workers
            for chunk in chunks:
                waiting.append(pool.submit(_encode_chunk, chunk))
                if len(waiting) > 2 * n_workers:  # bounds the results in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise CannotRunError(
                "a worker process that tokenizes rows was killed, probably because memory ran out; set "
                "--dataset_num_proc 1"
            ) from error


_encoders: list[Encoder] = []  # in a worker process: the one encoder that it was started with


def _begin(encoder: Encoder) -> None:
    _encoders.append(encoder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the tokenizer do not survive the fork


def _encode_chunk(chunk: _Chunk) -> RecordBatch:
    return _encoders[0].encode(chunk)
