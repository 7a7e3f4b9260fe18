"""Randomness is derived, never advanced.

A stream is a pure function of (seed, purpose, ids): the same arguments give the same generator in
any process, in any order, after any interruption. Nothing here reads or sets a global generator.

Votes need more care than training. The CPU generator of torch (mt19937) keeps only the low 32 bits
of its seed, so a long study with one hashed seed per chunk would meet the same seed twice by the
birthday bound. Within one image that would repeat votes that a certificate counts as
independent. `vote_generator` therefore hashes the image once and COUNTS the chunks from there in
the low 32 bits: all chunks of one image, of selection and of estimation, have different seeds by
construction.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_LOW = 1 << 32
_VOTE_SLOTS = {
    "selection": 0,
    "estimation": 1,
    "attack": 2,
    "predict": 3,
    "scan": 4,
    "explore": 5,
}
_SLOT_WIDTH = _LOW // 8  # room for two more purposes: another width would change all votes
_MASK63 = (1 << 63) - 1


def derive_seed(seed: int, purpose: str, *ids: int | str) -> int:
    """A 63-bit seed that depends on every argument (BLAKE2b of their unambiguous text)."""
    text = "\x1f".join([str(int(seed)), purpose, *(str(i) for i in ids)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & _MASK63


def generator(
    seed: int, purpose: str, *ids: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator for one purpose, e.g. `generator(seed, "shuffle", client, round)`."""
    return _seeded(derive_seed(seed, purpose, *ids), device)


def numpy_generator(seed: int, purpose: str, *ids: int | str) -> np.random.Generator:
    """A numpy generator for one purpose, for index shuffles and partitions."""
    return np.random.default_rng(derive_seed(seed, purpose, *ids))


def secret_generator(key: bytes, purpose: str, *ids: int | str) -> np.random.Generator:
    """A numpy generator that nobody without the key can repeat: noise and samples of privacy.

    All 128 bits of Philox's key are used, derived with keyed BLAKE2b: torch's CPU generator keeps
    32 bits of its seed, which can be tried out one after the other.

    Args:
        key: 1 to 64 bytes, as secret as the draws must be.
        purpose: what is drawn. ids: for whom and when.
    """
    text = "\x1f".join([purpose, *(str(i) for i in ids)]).encode()
    digest = hashlib.blake2b(text, key=key, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


def image_key(image: torch.Tensor) -> int:
    """A 63-bit name of the content of one image (c, h, w); its votes depend on nothing else of it.

    Certifying an image alone, inside any batch or after a resume therefore draws the same noise,
    and two models certified on the same image with the same seed are compared on common noise.
    """
    pixels = image.detach().cpu().float().contiguous()
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") & _MASK63


def vote_generator(
    seed: int, purpose: str, image: int, chunk: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one chunk of votes of one image; chunks of an image never share a seed.

    Args:
        seed: the study's seed.
        purpose: "selection", "estimation", "attack", "predict", "scan" or "explore"; their seeds
            are disjoint.
        image: `image_key` of the image.
        chunk: number of the chunk, from 0 to 2**29 - 1.
    """
    if not 0 <= chunk < _SLOT_WIDTH:
        raise ValueError(f"chunk must lie in [0, {_SLOT_WIDTH}), got {chunk}")
    base = derive_seed(seed, "votes", image)
    slot = _VOTE_SLOTS[purpose] * _SLOT_WIDTH + chunk
    return _seeded((base - base % _LOW) + (base + slot) % _LOW, device)


def _seeded(seed: int, device: torch.device | str) -> torch.Generator:
    import torch  # here, because streams of numpy are needed where torch is not loaded

    made = torch.Generator(device=device)
    made.manual_seed(seed)
    return made
