"""Who asks: answers from the batch and the speed layer together."""
