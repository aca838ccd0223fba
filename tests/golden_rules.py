"""Golden cases: deterministic weights and inputs by rule, and the numbers of the published reference implementation.

Nothing of a network is stored: every tensor follows from its key in the reference's state dict, every input from its
tag. A case folder under ``tests/golden`` holds ``case.json`` (settings, tolerances, float64 means), ``keys.json``
(reference key -> shape, dtype, first key of the same tensor), ``outputs.npz`` and ``grads.json`` (gradient norms).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
SCORE_GAIN = 24.0  # on the last layer of a score network: its scores then straddle the threshold of 0.02
EMBEDDINGS = ("pos_embed", "cls_token", "det_token", "mid_pos_embed")


def stream(name: str, shape: Iterable[int]) -> np.ndarray:
    """Standard normals in float64 that depend on name and shape alone."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def fill(key: str, shape: list[int]) -> np.ndarray:
    """The tensor that belongs to a key of the reference; the first rule that applies."""
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.full(tuple(shape), 1, np.int64)
    noise = stream(key, shape)
    if last == "running_var":
        value = np.exp(0.1 * noise)
    elif last == "running_mean":
        value = 0.1 * noise
    elif last in EMBEDDINGS:
        value = 0.02 * noise
    elif len(shape) == 1 and last == "weight":
        value = 1.0 + 0.1 * noise
    elif len(shape) <= 1:
        value = 0.1 * noise
    else:
        value = noise / math.sqrt(math.prod(shape[1:]))
        if "score_nets" in key and key.endswith(".7.weight"):
            value = value * SCORE_GAIN
        elif len(shape) > 2 and math.prod(shape[2:]) == 1 and not key.startswith("project."):
            value = value * math.sqrt(2.0)
    return value.astype(np.float32)


class Case:
    """One golden case: builds its weights and inputs and asserts that figures agree with the stored ones."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN / name
        self.case = json.loads((self.folder / "case.json").read_text())
        with np.load(self.folder / "outputs.npz") as file:
            self.outputs = dict(file)

    def state_dict(self) -> dict[str, Tensor]:
        """The reference's whole state dict, checked against the stored checksum."""
        keys = json.loads((self.folder / "keys.json").read_text())
        arrays = {key: fill(entry[2] if len(entry) > 2 else key, entry[0]) for key, entry in keys.items()}
        checksum = 0
        for array in arrays.values():
            checksum = zlib.crc32(array.tobytes(), checksum)
        if checksum != self.case["weights_crc32"]:  # the last bit of exp() may differ; another random stream may not
            probe = fill("selftest.weight", [2, 3]).ravel()[:3]
            np.testing.assert_allclose(
                probe, [-0.65122944, -0.08827851, 0.32449263], rtol=1e-5, err_msg="numpy's stream"
            )
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def input(self, name: str) -> Tensor:
        entry = self.case["inputs"][name]
        noise = stream(entry["tag"], entry["shape"])
        value = (np.tanh(noise) if "tanh" in entry.get("transform", "") else noise).astype(np.float32)
        np.testing.assert_allclose(value.ravel()[:4], self.case["input_check"][name]["first"], rtol=1e-6)
        return torch.from_numpy(value)

    def assert_close(self, name: str, value: Tensor, atol: float) -> None:
        """Within ``atol`` of the stored output; an output stored in part is compared in that part."""
        golden = self.outputs[name]
        mine = value.detach().cpu().numpy()
        if name in self.case.get("slices", {}):
            assert self.case["slices"][name] == "only [0:1]"
            mine = mine[:1]
        assert mine.shape == golden.shape, name
        np.testing.assert_allclose(mine, golden, rtol=0, atol=atol, err_msg=name)

    def assert_float64(self, name: str, value: Tensor, rtol: float) -> None:
        """Mean and root mean square of the reference's float64 run: sees constants that float32 hides."""
        assert value.dtype == torch.float64, name
        figures = [value.mean().item(), value.pow(2).mean().sqrt().item()]
        np.testing.assert_allclose(figures, self.case["float64_run"][name], rtol=rtol, err_msg=name)

    def assert_gradients(self, norms: Mapping[str, float], rtol: float, floor: float = 1e-6) -> None:
        """Gradient norms by reference key; those below ``floor`` of the largest are rounding noise and left out."""
        golden: dict[str, float | None] = json.loads((self.folder / "grads.json").read_text())
        largest = max(norm for norm in golden.values() if norm is not None)
        compared = {key: norm for key, norm in golden.items() if norm is not None and norm > floor * largest}
        assert len(compared) > len(golden) // 2
        wrong = {key: (norms.get(key), norm) for key, norm in compared.items() if not _near(norms.get(key), norm, rtol)}
        assert not wrong, wrong


def _near(mine: float | None, golden: float, rtol: float) -> bool:
    return mine is not None and abs(mine - golden) <= rtol * golden
