"""Which norm suits a network and its task, what a swap will cost, and what in the network stands in the way."""
