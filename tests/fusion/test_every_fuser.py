"""What every fuser promises on one block, in float64; whole networks are in tests/backbones/test_contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from every_fuser import MAKERS
from torch import Tensor, nn

from tokenfusion.backbones.mit import MiTBlock
from tokenfusion.fusion import Context, Fuser, NoFusion, make_private

GRID = (4, 4)
C = 8
WORDS = sorted(MAKERS)
STARTS_UNFUSED = {"none", "cross-attention", "mended"}


@pytest.fixture
def block_of(shake) -> Callable[[int], MiTBlock]:
    """A MiT block with private norms and a spatial reduction for M streams, float64."""
    return lambda modalities: shake(
        make_private(MiTBlock(C, 2, 2, drop_path=0.0), modalities, (nn.LayerNorm,)).double()
    ).eval()


@pytest.fixture
def fuser_of(shake) -> Callable[[str, int], Fuser]:
    """A fuser of generic weights, in evaluation."""
    return lambda word, modalities: shake(MAKERS[word](C, modalities, 1, seed=5).double()).eval()


def streams(modalities: int, batch: int = 2, tokens: int = 16) -> Tensor:
    return torch.randn(modalities, batch, tokens, C, dtype=torch.float64)


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("word", WORDS)
def test_presence_of_everybody_changes_nothing(block_of, fuser_of, word: str, modalities: int) -> None:
    block, fuser, x = block_of(modalities), fuser_of(word, modalities), streams(modalities)
    everybody = torch.ones(modalities, 2, dtype=torch.bool)
    with_flag = fuser(block, x, Context(GRID, present=everybody))[0]
    torch.testing.assert_close(with_flag, fuser(block, x, Context(GRID))[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("word", WORDS)
def test_content_of_a_missing_stream_has_no_influence_on_the_others(block_of, fuser_of, word: str) -> None:
    block, fuser, x = block_of(3), fuser_of(word, 3), streams(3)
    present = torch.tensor([[True, True], [False, True], [True, True]])
    garbage = x.clone()
    garbage[1, 0] = 100 * torch.randn(16, C, dtype=torch.float64)
    contexts = [Context(GRID, present=present) for _ in range(2)]
    y, z = (fuser(block, v, ctx)[0] for v, ctx in zip((x, garbage), contexts, strict=True))
    torch.testing.assert_close(y[[0, 2]], z[[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(y[1, 1], z[1, 1], rtol=0, atol=0)
    torch.testing.assert_close(contexts[0].carried, contexts[1].carried, rtol=0, atol=0)


@pytest.mark.parametrize("word", WORDS)
def test_a_sample_is_fused_as_if_its_missing_stream_did_not_exist(block_of, fuser_of, word: str) -> None:
    """Of two streams, one missing: the other gets what it would get if the missing one were anything else, also zeros."""
    block, fuser, x = block_of(2), fuser_of(word, 2), streams(2)
    present = torch.tensor([[True, True], [False, False]])
    alone = fuser(block, x * present[:, :, None, None], Context(GRID, present=present))[0]
    torch.testing.assert_close(fuser(block, x, Context(GRID, present=present))[0][0], alone[0], rtol=0, atol=0)


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("word", WORDS)
def test_a_sample_without_any_stream_stays_finite(block_of, fuser_of, word: str, modalities: int) -> None:
    block, fuser = block_of(modalities), fuser_of(word, modalities)
    x = streams(modalities).requires_grad_()
    present = torch.zeros(modalities, 2, dtype=torch.bool)
    present[:, 0] = True
    y, _ = fuser(block, x, Context(GRID, present=present))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    torch.testing.assert_close(y[:, 0], fuser(block, x, Context(GRID))[0][:, 0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("word", sorted(set(WORDS) - {"tokenfusion-paper"}))  # there it follows the exchange
def test_position_is_added_first(block_of, fuser_of, word: str) -> None:
    block, fuser, x = block_of(3), fuser_of(word, 3), streams(3)
    position = torch.randn(16, C, dtype=torch.float64)
    y = fuser(block, x, Context(GRID, position=position))[0]
    torch.testing.assert_close(y, fuser(block, x + position, Context(GRID))[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("word", WORDS)
def test_gradcheck(block_of, fuser_of, word: str, modalities: int) -> None:
    block, fuser = block_of(modalities), fuser_of(word, modalities)
    x = streams(modalities, batch=1).requires_grad_()
    parameters = dict(fuser.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(fuser, given, (block, x, Context(GRID)))[0]

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("word", sorted(STARTS_UNFUSED))
def test_those_that_start_as_no_fusion_do(block_of, word: str, modalities: int) -> None:
    """Freshly made, whatever is missing: the streams on their own, to the bit."""
    block, fuser, x = block_of(modalities), MAKERS[word](C, modalities).double().eval(), streams(modalities)
    present = torch.ones(modalities, 2, dtype=torch.bool)
    present[-1, 0] = modalities == 1
    plain = NoFusion(C, modalities)
    assert torch.equal(fuser(block, x, Context(GRID))[0], plain(block, x, Context(GRID))[0])
    if word != "mended":  # which fills a missing stream in
        ctx = Context(GRID, present=present)
        assert torch.equal(fuser(block, x, ctx)[0], plain(block, x, ctx)[0])


@pytest.mark.parametrize("word", sorted(set(WORDS) - {"none", "random", *STARTS_UNFUSED}))
def test_the_others_fuse_from_the_start(block_of, word: str) -> None:
    block, x = block_of(2), streams(2)
    fuser = MAKERS[word](C, 2).double().eval()
    assert (fuser(block, x, Context(GRID))[0] - NoFusion(C, 2)(block, x, Context(GRID))[0]).abs().max() > 1e-4
