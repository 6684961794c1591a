"""One latent for keys and values: a joint low rank where the two are weighed by different moments.

A token's x = [x_k; x_v] becomes c = E x, and c becomes D_k c and D_v c. The loss is
    E_k |x_k - D_k c|^2 + E_v |x_v - D_v c|^2
with the expectations over x as scores see it (moment K) and as outputs see it (moment V); the metric in which errors
count is part of x. Were K and V the same, PCA would solve it; they are not, and alternating least squares does: each
half step is exact, so the loss never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 10  # from the PCA of both; later ones changed the loss by less than a thousandth on every model measured
NOISE = 1e-10  # of the largest eigenvalue: directions below it are rounding


def joint_low_rank(key_moment: Tensor, value_moment: Tensor, keys: int, rank: int) -> tuple[Tensor, Tensor]:
    """-> E [rank, n], D [n, rank] with orthonormal columns where the moments have that rank. float64.

    key_moment K, value_moment V: [n, n] of x, whose first `keys` channels are x_k.
    """
    n = len(key_moment)
    if rank >= n:
        whole = torch.eye(n, dtype=key_moment.dtype, device=key_moment.device)
        return whole, whole
    encode = _start(key_moment, value_moment, keys, rank)
    white = _whiten(key_moment + value_moment)  # [n, m]: of K + V the identity, of K the diagonal `share`
    share, turn = torch.linalg.eigh(white.mT @ key_moment @ white)
    white, share = white @ turn, share.clamp(0, 1)
    for _ in range(STEPS):
        encode = _encoder(*_decoders(encode, key_moment, value_moment, keys), key_moment, value_moment, white, share)
    decode = torch.cat(_decoders(encode, key_moment, value_moment, keys))
    # The loss leaves any invertible map of c free. With D orthonormal, rounding c costs what rounding D c would.
    decode, mix = torch.linalg.qr(decode)
    return mix @ encode, decode


def loss(encode: Tensor, decode: Tensor, key_moment: Tensor, value_moment: Tensor, keys: int) -> Tensor:
    """What joint_low_rank minimises."""
    left = torch.eye(len(decode), dtype=decode.dtype, device=decode.device) - decode @ encode
    parts = ((left[:keys], key_moment), (left[keys:], value_moment))
    return torch.stack([((rows @ moment) * rows).sum() for rows, moment in parts]).sum()


def _start(key_moment: Tensor, value_moment: Tensor, keys: int, rank: int) -> Tensor:
    """PCA of x_k under K and x_v under V, with what they have in common under both."""
    moment = (key_moment + value_moment) / 2
    moment[:keys, :keys] = key_moment[:keys, :keys]
    moment[keys:, keys:] = value_moment[keys:, keys:]
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :rank].mT


def _decoders(encode: Tensor, key_moment: Tensor, value_moment: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """The best D_k and D_v for an E: x regressed on c."""

    def regress(moment: Tensor, rows: slice) -> Tensor:
        basis = _whiten(encode @ moment @ encode.mT)
        return moment[rows] @ encode.mT @ basis @ basis.mT

    return regress(key_moment, slice(keys)), regress(value_moment, slice(keys, None))


def _encoder(
    decode_k: Tensor, decode_v: Tensor, key_moment: Tensor, value_moment: Tensor, white: Tensor, share: Tensor
) -> Tensor:
    """The best E for a D: D_k^T D_k E K + D_v^T D_v E V = D_k^T K[k] + D_v^T V[v], diagonal in the right bases."""
    keys = len(decode_k)
    grams = decode_k.mT @ decode_k, decode_v.mT @ decode_v
    left = _whiten(grams[0] + grams[1])
    left_share, turn = torch.linalg.eigh(left.mT @ grams[0] @ left)
    left, left_share = left @ turn, left_share.clamp(0, 1)
    target = left.mT @ (decode_k.mT @ key_moment[:keys] + decode_v.mT @ value_moment[keys:]) @ white
    diagonal = left_share[:, None] * share + (1 - left_share)[:, None] * (1 - share)
    return left @ (target / diagonal.clamp_min(1e-6)) @ white.mT


def _whiten(moment: Tensor) -> Tensor:
    """W [n, m] with W^T moment W = 1, over the m directions that are more than rounding."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    kept = values > NOISE * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return vectors[:, kept] / values[kept].sqrt()
