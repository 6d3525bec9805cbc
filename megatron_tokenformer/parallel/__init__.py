"""Which process holds what, and the differentiable collectives between them."""
