"""The layers that give a network's scores: found, and exchanged for another number of classes."""
