"""What the positions along a dimension are: products and sums of axes, found by unification.

An :class:`Index` stands for what one dimension of a tensor counts: the channels of a stream, ``heads x dims``, or
``queries + keys + values``. At first it is an *atom* of which only the size is known. An operation says which indices
are the same (:func:`unify`) and where one is a product (:func:`factor`: a reshape) or a sum of others (:func:`cut`: a
slice, a concatenation); then the atom takes that structure wherever it occurs. This is unification as in type
inference, with two constructors. What remains atoms at the end are axes along which neurons may be relabelled, except
those that an operation pinned.

    >>> stream = Index(12)
    >>> heads, dims = factor(stream, 4)
    >>> heads.size, dims.size, stream
    (4, 3, 4 x 3)
    >>> pieces = cut(Index(12), [4, 8])
    >>> unify(pieces[1], product([Index(2), Index(4)]))
    >>> pieces[1]
    2 x 4

Indices that cannot be made the same (a product of 4 x 6 and one of 6 x 4, say) are pinned: nothing is claimed of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from itertools import product as combinations
from math import prod


class Form(Enum):
    """What is known of an index."""

    ATOM = "atom"
    PRODUCT = "product"
    SUM = "sum"


class MismatchError(Exception):
    """Two indices have no common structure."""


@dataclass(eq=False, repr=False)
class Index:
    """What one dimension counts; compare with :func:`same`, since indices merge."""

    size: int
    form: Form = Form.ATOM
    parts: tuple[Index, ...] = ()
    """Factors, the outermost first, or summands."""
    pinned: str = ""
    """Why it may not be relabelled; empty if it may."""
    merged: Index | None = None
    """The index that it was found to be the same as."""
    is_used: bool = False
    """Whether anything is known of it besides where it lies in a product."""
    whole: Index | None = None
    """The product that it is the outer factor of, if that was an atom before."""
    copies: list[Index] = field(default_factory=list)
    """What stands for it in the pieces of a product that was cut apart; see :func:`cut_apart`."""
    apart: Apart | None = None
    """How it was cut apart."""
    number: int = field(default_factory=count().__next__)
    """Orders indices by when they were made."""

    def __repr__(self) -> str:
        root = find(self)
        if root.form is Form.ATOM:
            return str(root.size) + ("!" if root.pinned else "")
        sign = " x " if root.form is Form.PRODUCT else " + "
        return sign.join(repr(p) if find(p).form is Form.ATOM else f"({p!r})" for p in root.parts)


def find(index: Index) -> Index:
    """The index that stands for all that were merged with this one."""
    while index.merged is not None:
        if index.merged.merged is not None:
            index.merged = index.merged.merged
        index = index.merged
    return index


def product(parts: Sequence[Index]) -> Index:
    """The product of indices, the outermost first; those of size 1 count nothing."""
    parts = [part for part in parts if part.size != 1]
    if not parts:
        return Index(1)
    return parts[0] if len(parts) == 1 else Index(prod(p.size for p in parts), Form.PRODUCT, tuple(parts))


def summed(parts: Sequence[Index]) -> Index:
    """The sum of indices, in this order; of pinned ones it does not matter what they were."""
    parts = [part for part in parts if part.size != 0]
    reasons = [find(part).pinned for part in parts if part.size > 1]
    if len(parts) > 1 and reasons and all(reasons):
        return Index(sum(part.size for part in parts), pinned=reasons[0])
    return parts[0] if len(parts) == 1 else Index(sum(p.size for p in parts), Form.SUM, tuple(parts))


def pin(index: Index, reason: str) -> None:
    """Say that nothing in an index may be relabelled; the first reason stays."""
    settle(index)
    root = find(index)
    if not root.pinned and root.size > 1:
        root.pinned = reason
        for part in root.parts:
            pin(part, reason)


def unify(a: Index, b: Index) -> None:
    """Make two indices the same; if that is not possible, pin both."""
    try:
        _unify(a, b)
    except MismatchError as error:
        for index in (a, b):
            pin(index, str(error))


def _unify(a: Index, b: Index) -> None:
    a, b = find(a), find(b)
    if a is b or a.size == b.size == 1:
        return
    for index in (a, b):
        settle(index)
    a, b = find(a), find(b)
    a.is_used = b.is_used = True
    if a is b:
        return
    if a.pinned and b.pinned and a.size == b.size:  # there is nothing to learn from what they are made of
        a.merged = b
        return
    if a.size != b.size:
        raise MismatchError(f"{a} and {b} differ in size")
    if b.form is Form.ATOM:
        a, b = b, a
    if a.form is Form.ATOM:
        a.merged = b
        if a.pinned:
            pin(b, a.pinned)
        return
    if a.form is b.form:
        (_unify_products if a.form is Form.PRODUCT else _unify_sums)(a, b)
        _merge(a, b)
    else:
        _unify_product_with_sum(*((a, b) if a.form is Form.PRODUCT else (b, a)))
        for one, other in ((a, b), (b, a)):
            if one.pinned:
                pin(other, one.pinned)


def _merge(a: Index, b: Index) -> None:
    a, b = find(a), find(b)
    if a is not b:
        a.merged = b
        if a.pinned:
            pin(b, a.pinned)


def _unify_products(a: Index, b: Index) -> None:
    left, right = factors(a), factors(b)
    while left and right:
        if left[0].size < right[0].size:
            left, right = right, left
        if left[0].size > right[0].size:
            left[:1] = factor(left[0], right[0].size)
        _unify(left.pop(0), right.pop(0))


def _unify_sums(a: Index, b: Index) -> None:
    left, right = list(a.parts), list(b.parts)
    while left and right:
        if left[0].size < right[0].size:
            left, right = right, left
        if left[0].size > right[0].size:
            left[:1] = cut(left[0], [right[0].size, left[0].size - right[0].size])
        _unify(left.pop(0), right.pop(0))


def _unify_product_with_sum(a: Index, b: Index) -> None:
    outer, *rest = factors(a)
    inner = prod(part.size for part in rest)
    if all(part.size % inner == 0 for part in b.parts):
        pieces = cut(outer, [part.size // inner for part in b.parts])
        for piece, part in zip(pieces, b.parts, strict=True):
            _unify(product([piece, *rest]), part)
    else:
        first, second = factor(b, outer.size)
        _unify(first, outer)
        _unify(second, product(rest))


def settle(index: Index) -> None:
    """Use an index as it is: it stands for all of its copies, so they are the same; see :func:`cut_apart`."""
    root = find(index)
    root.is_used = True
    copies, root.copies = root.copies, []
    for copy in copies:
        _unify(root, copy)
    for part in root.parts:
        settle(part)


def factors(index: Index) -> list[Index]:
    """The factors of an index, the outermost first, none of them a product or of size 1."""
    root = find(index)
    if root.size == 1:
        return []
    if root.form is not Form.PRODUCT:
        return [root]
    return [factor_ for part in root.parts for factor_ in factors(part)]


def factor(index: Index, size: int) -> tuple[Index, Index]:
    """Split an index into an outer one of ``size`` and an inner one.

    Raises:
        MismatchError: if its structure does not allow it.
    """
    if size == 1:
        return Index(1), find(index)
    if size == index.size:
        return find(index), Index(1)
    settle(index)
    root = find(index)
    if root.size % size:
        raise MismatchError(f"{root} is no product of {size} and something else")
    if root.form is Form.ATOM:
        outer, inner = Index(size, pinned=root.pinned, whole=root), Index(root.size // size, pinned=root.pinned)
        root.form, root.parts = Form.PRODUCT, (outer, inner)
        return outer, inner
    if root.form is Form.SUM:
        return _factor_sum(root, size)
    taken: list[Index] = []
    rest = factors(root)
    while (done := prod(part.size for part in taken)) < size:
        part = rest.pop(0)
        needed, remainder = divmod(size, done)
        if remainder or (part.size > needed and part.size % needed) or (part.size < needed and needed % part.size):
            raise MismatchError(f"{root} is no product of {size} and something else")
        if part.size > needed:
            part, inner = factor(part, needed)
            rest.insert(0, inner)
        taken.append(part)
    return product(taken), product(rest)


def _factor_sum(root: Index, size: int) -> tuple[Index, Index]:
    """A sum of equal products, or of multiples of one, is a product."""
    inner_size = root.size // size
    if any(part.size % inner_size for part in root.parts):
        raise MismatchError(f"{root} is no product of {size} and something else")
    outers, inner = [], Index(inner_size)
    for part in root.parts:
        outer, its_inner = factor(part, part.size // inner_size)
        _unify(inner, its_inner)
        outers.append(outer)
    return summed(outers), inner


def cut(index: Index, sizes: Sequence[int]) -> list[Index]:
    """Cut an index into consecutive pieces.

    Raises:
        MismatchError: if its structure does not allow it.
    """
    if len(sizes) == 1:
        return [find(index)]
    settle(index)
    root = find(index)
    if root.pinned:
        return [Index(size, pinned=root.pinned) for size in sizes]
    if sum(sizes) != root.size:
        raise MismatchError(f"{root} has no pieces of {', '.join(map(str, sizes))}")
    if root.form is Form.ATOM:
        pieces = [Index(size, pinned=root.pinned) for size in sizes]
        root.form, root.parts = Form.SUM, tuple(pieces)
        return pieces
    if root.form is Form.SUM:
        return _cut_sum(root, sizes)
    outer, *rest = factors(root)
    inner = prod(part.size for part in rest)
    if any(size % inner for size in sizes):
        raise MismatchError(f"{root} cannot be cut into {', '.join(map(str, sizes))}")
    return [product([piece, *rest]) for piece in cut(outer, [size // inner for size in sizes])]


MOST_PIECES = 64
"""More pieces than that are no layers that were fused, but places."""


@dataclass(eq=False)
class Apart:
    """How a dimension was cut apart: per piece, what stands for the dimensions within it."""

    inner: list[Index]
    pieces: list[tuple[Index, list[Index]]]

    def dims(self, dims: Sequence[Index], dim: int, place: int) -> list[Index]:
        """The dimensions of a piece."""
        piece, copies = self.pieces[place]
        own = dict(zip(map(id, self.inner), copies, strict=True))
        return [piece if at == dim else own.get(id(find(index)), index) for at, index in enumerate(dims)]


def cut_apart(dims: Sequence[Index], dim: int, sizes: Sequence[int]) -> list[list[Index]]:
    """Cut a dimension into pieces, and give each its own copy of the dimensions that lie within it.

    A fused layer stores ``3 x dims`` for queries, keys and values. Seen as two dimensions and cut along the first, its
    pieces would share the second, and rotary positions, which tell the dimensions of queries apart, would pin those of
    values. As long as nothing but a view has used the second dimension, ``3 x dims`` is ``dims + dims + dims`` as well.

    Args:
        dims: of a value.
        dim: which to cut.
        sizes: of the pieces.

    Returns:
        The dimensions of every piece.

    Raises:
        MismatchError: if the structure of the dimension does not allow it.
    """
    outer = find(dims[dim])
    if len(sizes) > 1 and (outer.apart is not None or _can_come_apart(dims, outer, sizes)):
        return _pieces_apart(dims, dim, sizes)
    return [[*dims[:dim], piece, *dims[dim + 1 :]] for piece in cut(outer, sizes)]


def _can_come_apart(dims: Sequence[Index], outer: Index, sizes: Sequence[int]) -> bool:
    whole = outer.whole and find(outer.whole)
    if whole is None or whole.form is not Form.PRODUCT or find(whole.parts[0]) is not outer or len(sizes) > MOST_PIECES:
        return False
    inner = factors(whole.parts[1])
    here = {id(find(index)) for index in dims}
    return all(f.form is Form.ATOM and not (f.is_used or f.pinned) and id(f) in here for f in inner)


def _pieces_apart(dims: Sequence[Index], dim: int, sizes: Sequence[int]) -> list[list[Index]]:
    outer = find(dims[dim])
    apart = outer.apart or _come_apart(outer, sizes)
    place, out = 0, []
    for size in sizes:
        piece = apart.pieces[place][0]
        if piece.size > size:  # a finer cut than the one before
            finer = cut_apart(apart.dims(dims, dim, place), dim, [size, piece.size - size])
            where = [next(at for at, index in enumerate(dims) if find(index) is find(i)) for i in apart.inner]
            apart.pieces[place : place + 1] = [(of[dim], [of[at] for at in where]) for of in finer]
            piece = apart.pieces[place][0]
        if piece.size == size:
            out.append(apart.dims(dims, dim, place))
            place += 1
            continue
        taken: list[Index] = []
        while sum(part.size for part in taken) < size:  # several pieces at once share what lies within
            taken.append(apart.pieces[place][0])
            place += 1
        if sum(part.size for part in taken) > size:
            raise MismatchError(f"{outer} was cut otherwise before")
        out.append([*dims[:dim], summed(taken), *dims[dim + 1 :]])
    return out


def _come_apart(outer: Index, sizes: Sequence[int]) -> Apart:
    whole = find(outer.whole)  # type: ignore[arg-type]
    inner = factors(whole.parts[1])
    pieces, parts = [], []
    for piece in cut(outer, sizes):
        copies = [Index(index.size) for index in inner]
        for index, copy in zip(inner, copies, strict=True):
            index.copies.append(copy)
        part = product([piece, *copies]) if piece.size == 1 else product([piece, product(copies)])
        piece.whole = part if piece.size > 1 else None
        pieces.append((piece, copies))
        parts.append(part)
    whole.form, whole.parts = Form.SUM, tuple(parts)
    outer.apart = Apart(inner, pieces)
    return outer.apart


def _cut_sum(root: Index, sizes: Sequence[int]) -> list[Index]:
    rest, pieces = list(root.parts), []
    for size in sizes:
        taken: list[Index] = []
        while (missing := size - sum(part.size for part in taken)) > 0:
            part = rest.pop(0)
            if part.size > missing:
                part, remainder = cut(part, [missing, part.size - missing])
                rest.insert(0, remainder)
            taken.append(part)
        pieces.append(summed(taken))
    return pieces


def is_axis(index: Index) -> bool:
    """Whether an index counts as one axis: an atom, or a sum that was pinned as a whole (rotary dimensions)."""
    root = find(index)
    return root.form is Form.ATOM or (root.form is Form.SUM and bool(root.pinned))


def why_pinned(axis: Index) -> str:
    """Why an axis may not be relabelled; empty if it may."""
    root = find(axis)
    return root.pinned or next((why_pinned(part) for part in root.parts), "")


def is_pinned(axis: Index) -> bool:
    """Whether an axis may not be relabelled."""
    return bool(why_pinned(axis))


@dataclass(frozen=True)
class Segment:
    """Positions along a dimension that one product of axes counts."""

    start: int
    axes: tuple[tuple[Index, int], ...]
    """Axes, the outermost first, each with its stride along the dimension."""


def segments(index: Index) -> list[Segment]:
    """Cut a dimension where its index is a sum, everywhere in its structure."""
    root = find(index)
    if root.size == 1:
        return [Segment(0, ())]
    if is_axis(root):
        return [Segment(0, ((root, 1),))]
    if root.form is Form.SUM:
        out, start = [], 0
        for part in root.parts:
            out += [Segment(start + segment.start, segment.axes) for segment in segments(part)]
            start += part.size
        return out
    out, parts = [], factors(root)
    strides = [prod(part.size for part in parts[place + 1 :]) for place in range(len(parts))]
    for choice in combinations(*map(segments, parts)):
        axes = [(axis, stride * s) for segment, stride in zip(choice, strides, strict=True) for axis, s in segment.axes]
        start = sum(segment.start * stride for segment, stride in zip(choice, strides, strict=True))
        out.append(Segment(start, tuple(axes)))
    return out


Combination = tuple[Index, ...]
"""Axes that meet in one element, in an order of no meaning; one that runs along two dimensions is there twice."""


def combinations_of(dims: Iterable[Index]) -> list[Combination]:
    """The axes that meet in the elements of a value: one combination for each choice among the pieces of its sums."""
    found: list[Combination] = [()]
    for index in dims:
        both = (sorted((*a, *b), key=lambda axis: axis.number) for a in found for b in _combinations(find(index)))
        found = list(dict.fromkeys(map(tuple, both)))
    return found


def _combinations(root: Index) -> list[Combination]:
    if root.size == 1:
        return [()]
    if is_axis(root):
        return [(root,)]
    if root.form is Form.SUM:
        return list(dict.fromkeys(choice for part in root.parts for choice in _combinations(find(part))))
    return combinations_of(root.parts)


def axes_of(indices: Iterable[Index]) -> list[Index]:
    """Every axis in some indices, each once, in order of appearance."""
    found: dict[int, Index] = {}
    for index in indices:
        _collect(find(index), found)
    return list(found.values())


def _collect(root: Index, found: dict[int, Index]) -> None:
    if root.size == 1:
        return
    if is_axis(root):
        found[id(root)] = root
        return
    for part in root.parts:
        _collect(find(part), found)
