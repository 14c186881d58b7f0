"""Which layer feeds which norm: symbolic and recorded runs, and what follows from them."""
