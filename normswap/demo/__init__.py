"""What `normswap demo` shows: real digits, a network trained on them, and the figures of converting it."""
