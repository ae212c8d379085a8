"""The graph of any model, found by watching it compute.

Nothing is known here of layers, of their names or of families of models. A model is run once on an example and every
operation on tensors is recorded (:mod:`~nino.graph.tracing.recorder`). Two questions are then asked of the record.

**Which neurons are alike?** Along every dimension of every value lies an *index*: what its positions count
(:mod:`~nino.graph.tracing.indices`). At first all that is known of an index is its size. Then the calls are gone
through in order, and the rule of each operation (:mod:`~nino.graph.tracing.rules`) says which indices have to be the
same: those of two summands, the columns of a matrix and the vector that it multiplies. A reshape says that an index
is a *product* of others, a slice or a concatenation that it is a *sum*; from then on it is that wherever it occurs,
also in values before. This is type inference by unification, as in ML: indices are types, parameters are the
variables whose types are wanted. In attention, ``view`` makes ``heads x dims`` of what the query projection gives,
the product of queries and keys identifies their heads and dims, and so the rows of the query's and the key's weights
are products of the same two axes. What is never split is an *axis*. What tells positions apart *pins* the index (a
cumulative sum, a constant that differs, the spatial dimensions of a convolution, whatever the model takes and gives).

*Why this is sound.* Claim: relabel every axis that is not pinned by a permutation, in all parameters at once, and
every value of the forward pass comes out relabelled along its own axes; so the outputs, whose axes are all pinned,
stay. It holds for parameters by construction, for inputs and constants because what varies in them is pinned, and, by
induction over the calls, for all other values if each operation commutes with relabelling. So that is what a rule has
to ensure:

- Element by element, two operands commute with relabelling if aligned dimensions have the same index.
- Moving elements about (a view, a transpose) commutes if the output's indices are the input's, regrouped in order;
  the factors and summands of an index are ordered, so a regrouping in another order does not unify with it by
  mistake.
- A sum over an axis, or any function of it that is symmetric (softmax, a norm, a maximum, sorting), does not see its
  order. What comes out in order of rank is pinned.
- A contraction is a product element by element and a sum.
- Numbers that *are* positions along an axis (``argmax``) change with it. They may be copied, and used to read along
  the same axis; anything else pins it (:mod:`~nino.graph.tracing.positions`).
- For everything else there is no rule, and all that it touches is pinned.

A fused layer is ``3 x dims`` and as well ``dims + dims + dims``. It is cut into pieces with dims of their own
(:func:`~nino.graph.tracing.indices.cut_apart`) as long as nothing but views and cuts has used the whole; whatever uses
it whole afterwards makes the dims of its pieces the same.

Two indices that would have to be the same and cannot be (``4 x 6`` and ``6 x 4``) are pinned as well. So a gap in
what the rules know costs symmetries and never claims one too many.

*When an axis lies within another.* The dimensions of values may be relabelled in every head differently. In general
an axis B may be relabelled separately for each position a of an axis A, by some permutation p_a, if every element
that has a coordinate b has exactly one coordinate a, so that it is clear which p_a is meant, and if no operation
mixes elements of different a before b is gone. The first holds if A occurs once with B in every value. The second
would fail in an operation that mixes along A and keeps B: its output has B without A, unless it gives A back (softmax
along A, a square matrix). Or in a contraction over B of factors that each have an A of their own (heads compared with
heads). So each rule notes with :meth:`Axes.occur_alone` what stays while other dimensions are mixed, and what is
summed over in common; ``wiring`` then reads off which axis never occurs without exactly one of which other.

**Which parameter joins which neurons?** The calls are gone through once more with labels instead of numbers
(:mod:`~nino.graph.tracing.neurons`), which gives neuron groups, the pieces of parameters between them, and the
connections that carry no parameter. Nothing of this can make a symmetry wrong, since a piece moves along the axes
that the first pass found; it decides what a nowcast sees.

Last, :mod:`~nino.graph.tracing.wiring` turns both answers into blocks of the graph. Afterwards
:func:`nino.check_wiring` can prove the result on the model itself.

What cannot be seen: numbers that leave PyTorch (``.numpy()``, ``.tolist()``), and the path not taken where a model
looks at numbers; see :meth:`Trace.decisions`.
"""
