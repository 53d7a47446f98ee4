"""Contexts of one conversation in one sequence, in which a prefix that they share occurs once.

A template that rewrites earlier turns gives each answer of a conversation a context of its own. The contexts form a
tree: a segment of tokens that several contexts begin with is the parent of the segments in which they differ. The
segments follow one another in pre-order. A token sees the tokens of its segment before it and those of the segment's
ancestors, and its position counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nybble.data.tokens import IGNORED

__all__ = ["Segments", "merge_contexts", "n_shared", "path_before", "paths", "places_in_tree", "unfold"]

Segments = tuple[tuple[int, int], ...]  # (number of tokens, index of the parent or -1), in pre-order


@dataclass
class _Node:
    ids: list[int]
    labels: list[int]
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token, in order of first appearance


def merge_contexts(contexts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[list[int], list[int], Segments]:
    """Merge contexts, each given as ids and labels, into one sequence.

    A token that several contexts share is learned if one of them learns it.

    Returns:
        The ids, the labels and the segments; no segments if all contexts are prefixes of one of them.
    """
    root = _Node([], [])
    for ids, labels in contexts:
        _insert(root, list(ids), list(labels))
    merged_ids: list[int] = []
    merged_labels: list[int] = []
    segments: list[tuple[int, int]] = []
    waiting = [(node, -1) for node in reversed(root.children.values())]
    while waiting:
        node, parent = waiting.pop()
        waiting += [(child, len(segments)) for child in reversed(node.children.values())]
        segments.append((len(node.ids), parent))
        if parent < 0 and merged_ids:
            node.labels[0] = IGNORED  # nothing precedes it
        merged_ids += node.ids
        merged_labels += node.labels
    return merged_ids, merged_labels, tuple(segments) if len(segments) > 1 else ()


def _insert(root: _Node, ids: list[int], labels: list[int]) -> None:
    node = root
    while ids:
        child = node.children.get(ids[0])
        if child is None:
            is_leaf = node is not root and not node.children
            if is_leaf:  # the context continues this segment
                node.ids += ids
                node.labels += labels
            else:
                node.children[ids[0]] = _Node(ids, labels)
            return
        n = n_shared(child.ids, ids)
        for at, label in enumerate(labels[:n]):
            if label != IGNORED:
                child.labels[at] = label
        ids = ids[n:]
        labels = labels[n:]
        if ids and n < len(child.ids):
            rest = _Node(child.ids[n:], child.labels[n:], child.children)
            child.ids = child.ids[:n]
            child.labels = child.labels[:n]
            child.children = {rest.ids[0]: rest}
        node = child


def n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens that two contexts begin with."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def paths(segments: Segments) -> list[list[int]]:
    """For each leaf of the tree, the indices of the segments from the root to it."""
    parents = {parent for _length, parent in segments}
    found: list[list[int]] = []
    path: list[int] = []
    for index, (_length, parent) in enumerate(segments):
        while path and path[-1] != parent:
            path.pop()
        path.append(index)
        if index not in parents:
            found.append(list(path))
    return found


def unfold(ids: Sequence[int], labels: Sequence[int], segments: Segments) -> list[tuple[list[int], list[int]]]:
    """The rows that the tree stands for, as ids and labels: the path to each leaf.

    Each learned token is learned in one row only, the first that contains it.
    """
    starts = _starts(segments)
    rows: list[tuple[list[int], list[int]]] = []
    done: set[int] = set()
    for path in paths(segments) or [[0]]:
        row_ids: list[int] = []
        row_labels: list[int] = []
        for index in path:
            own = slice(starts[index], starts[index] + segments[index][0]) if segments else slice(None)
            row_ids += ids[own]
            row_labels += [IGNORED] * len(ids[own]) if index in done else labels[own]
        done.update(path)
        rows.append((row_ids, row_labels))
    return rows


def path_before(ids: Sequence[int], segments: Segments, end: int) -> list[int]:
    """The ids that precede the token at index `end` in its context; if `end` is `len(ids)`, all of the last context."""
    starts = _starts(segments)
    index = max((i for i, start in enumerate(starts[: len(segments)]) if start <= end), default=-1)
    parts: list[Sequence[int]] = []
    last = end
    while index >= 0:
        parts.append(ids[starts[index] : min(last, starts[index + 1])])
        index = segments[index][1]
        last = len(ids)
    return [token for part in reversed(parts) for token in part] if segments else list(ids[:end])


def places_in_tree(ids: Sequence[int], segments: Segments, context: Sequence[int]) -> list[int]:
    """For each token of one of the merged contexts, its index in the merged sequence."""
    starts = _starts(segments)
    children = {(parent, ids[start]): i for i, ((_n, parent), start) in enumerate(zip(segments, starts, strict=False))}
    places: list[int] = []
    index = -1
    while segments and len(places) < len(context):
        index = children[index, context[len(places)]]
        places += range(starts[index], starts[index + 1])
    return places[: len(context)] if segments else list(range(len(context)))


def _starts(segments: Segments) -> list[int]:
    """Where each segment begins, and the end of the last."""
    starts = [0]
    for length, _parent in segments:
        starts.append(starts[-1] + length)
    return starts
