"""Operations that deserve a kernel, each beside the plain PyTorch function it must equal."""
