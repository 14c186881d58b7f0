"""Train a converted network: distillation from the original."""
