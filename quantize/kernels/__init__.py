"""Fast products with quantized weights, each beside the plain PyTorch function it must equal."""
