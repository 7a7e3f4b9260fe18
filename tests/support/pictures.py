"""Pictures and generators for tests of perturbations."""

import torch

IMAGE = (3, 8, 11)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(*shape, seed=0):
    """8-bit pictures as floats, so that the exact mode applies to them too."""
    return torch.randint(0, 256, shape, generator=rng(seed)).float() / 255
