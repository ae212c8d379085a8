"""The second pass: which neurons every parameter joins.

Every value gets a tensor of its own shape with, at each position, the number of the neuron group that sits there.
Views, slices and concatenations act on labels exactly as they act on numbers, so PyTorch itself carries them. A weight
makes a new group at its outputs; element-wise operations join groups that nothing has read yet (gate and up, the parts
of a sum) and otherwise leave a residual connection behind. Parameters are followed as strided views of themselves, so
that it is known which of their elements meets which neuron.
"""

from nino.graph.tracing.neurons.wirer import find_neurons

__all__ = ["find_neurons"]
