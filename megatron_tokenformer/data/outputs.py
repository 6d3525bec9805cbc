"""What preprocessing writes: a dataset, or one for each component; all complete, or a start to go on from."""

from __future__ import annotations

import os
import re
import sys
from copy import deepcopy
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from megatron_tokenformer.data.encode import Encoded, Part
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.data.journal import Counts, Done, Journal
from megatron_tokenformer.data.pair import pair_paths
from megatron_tokenformer.data.problems import Tally
from megatron_tokenformer.data.sidecar import discard_sidecar, sidecar_path, write_sidecar
from megatron_tokenformer.errors import UserError

# More are no components but a mistake, such as splitting by a document's address.
_MOST_COMPONENTS = 256


class Names:
    """The names of the outputs: `PREFIX_<key>_document`, with the component's name before the key."""

    def __init__(self, output_prefix: str, json_key: str, overwrite: bool) -> None:
        self._prefix, self._key, self._overwrite = output_prefix, json_key, overwrite
        self._names: dict[str, str] = {}

    def of(self, component: str) -> str:
        """The prefix of a component's dataset; `""` stands for all documents together.

        Raises:
            UserError: too many components, two of the same file name, or an output that exists.
        """
        if component:
            name = re.sub(r"\W+", "-", component.lower()).strip("-")[:100]
            taken = self._names.setdefault(name, component)
            if not name:
                raise UserError(f"the component {component!r} has no letter to be the file name", exit_code=1)
            if taken != component:
                raise UserError(f"components {taken!r} and {component!r} have the same file name {name!r}", 1)
            if len(self._names) > _MOST_COMPONENTS:
                raise UserError(f"more than {_MOST_COMPONENTS} components; split by another key", exit_code=1)
        prefix = f"{self._prefix}{f'_{name}' if component else ''}_{self._key}_document"
        for path in (*pair_paths(prefix), sidecar_path(prefix)):
            if os.path.exists(path) and not self._overwrite:
                raise UserError(f"{path} already exists; use --overwrite to replace it")
        return prefix


class Outputs:
    """The datasets of one run.  Leaving it without `publish` keeps what `Journal` can tell of.

    Args:
        names: of the datasets.
        dtype: the type of their ids.
        eod_id: to be put after a document that comes in pieces, or None.
        journal: of the run.
        done: where it goes on.
    """

    def __init__(
        self, names: Names, dtype: np.dtype, eod_id: int | None, journal: Journal, done: Done
    ) -> None:
        self._names, self._dtype, self._eod_id, self._journal = names, dtype, eod_id, journal
        self.problems = Tally(done.problems)
        self.counts = deepcopy(done.outputs)
        self._done = done
        self._writers: dict[str, TokenFileWriter] = {}
        self._open_tokens = 0
        for component, counts in done.outputs.items():
            if names.of(component) != counts.prefix:
                raise UserError(f"{journal.path} is of other outputs; remove it to begin anew", exit_code=1)
            if counts.documents:
                self._writers[component] = TokenFileWriter(
                    counts.prefix, dtype, (counts.tokens, counts.documents)
                )

    @property
    def documents(self) -> int:
        """In all datasets so far."""
        return sum(counts.documents for counts in self.counts.values())

    @property
    def tokens(self) -> int:
        """In all datasets so far."""
        return sum(counts.tokens for counts in self.counts.values())

    def add(self, encoded: Encoded) -> None:
        """Write what a worker made, and count its problems."""
        for part in encoded.parts:
            if part.component not in self.counts:
                self.counts[part.component] = Counts(self._names.of(part.component))
            counts = self.counts[part.component]
            counts.text_bytes += part.text_bytes
            counts.empty_texts += part.empty_texts
            counts.eod_inside_text += part.eod_inside_text
            if part.tokens.size or (part.lengths is None and self._open_tokens):
                self._write(part, counts, encoded.ends_document)
        self.problems.add(encoded.problems)

    def finish_input(self, identity: list[Any]) -> None:
        """Note that an input file is in the outputs; now and then also on the disk, to go on from there.

        Args:
            identity: path, bytes and time stamp.
        """
        # In one assignment: an interrupt before it leaves the old state whole, one after it the new.
        self._done = Done([*self._done.inputs, identity], deepcopy(self.counts), self.problems.as_json())
        if self._journal.is_due():
            self.save()

    def save(self) -> None:
        """Make what is done up to the last finished input durable."""
        for writer in self._writers.values():
            writer.sync()
        self._journal.write(self._done)

    def publish(self, descriptions: dict[str, dict[str, Any]]) -> None:
        """Complete all datasets, then give all of them their names.

        Args:
            descriptions: by component.
        """
        for component, writer in self._writers.items():
            write_sidecar(writer.prefix, descriptions[component])
            writer.complete()
        complete = replace(self._done, complete=True)
        self._journal.write(complete)
        self._done = complete
        for writer in self._writers.values():
            writer.publish()
        self._journal.remove()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._done.complete:
            self._leave()

    def _leave(self) -> None:
        """Keep what is worth going on from, and nothing else."""
        kept = bool(self._done.inputs) and self.documents > 0
        if kept:
            try:
                self.save()
            except OSError:  # a full disk: an earlier state may be on it
                kept = self._journal.exists
        for writer in self._writers.values():
            discard_sidecar(writer.prefix)
            writer.close() if kept else writer.discard()
        if not kept:
            if self._writers:  # their locks say that it is not another process's
                self._journal.remove()
            return
        print(
            f"note: {len(self._done.inputs)} input files are done; the same command goes on after them "
            "(--restart begins anew)",
            file=sys.stderr,
        )

    def _write(self, part: Part, counts: Counts, ends_document: bool) -> None:
        writer = self._writers.get(part.component)
        if writer is None:
            writer = self._writers[part.component] = TokenFileWriter(counts.prefix, self._dtype)
        if part.lengths is not None:
            writer.add(part.tokens, part.lengths)
        else:
            self._add_piece(writer, part.tokens, ends_document)
        counts.documents, counts.tokens = writer.documents, writer.tokens

    def _add_piece(self, writer: TokenFileWriter, tokens: np.ndarray, ends_document: bool) -> None:
        if ends_document and self._eod_id is not None:
            tokens = np.append(tokens, np.array([self._eod_id], self._dtype))
        writer.append_tokens(tokens)
        self._open_tokens += tokens.size
        if self._open_tokens > np.iinfo(np.int32).max:
            raise UserError("a document of more than 2,147,483,647 tokens: the index has no room for it", 1)
        if ends_document:
            writer.append_lengths(np.array([self._open_tokens]))
            writer.append_documents(np.array([writer.sequences]))
            self._open_tokens = 0
