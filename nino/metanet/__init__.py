"""Graph metanetworks: networks that read, predict and edit the weights of other networks."""
