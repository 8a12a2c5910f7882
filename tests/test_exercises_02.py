"""Expected answers of the exercises in the notebook about the model."""

import torch

from cpc_nb.config import ContextConfig, EncoderConfig
from cpc_nb.model import CPC, Context, geometry


def test_without_overlap_a_frame_sees_exactly_one_hop():
    hop, width, _ = geometry(EncoderConfig(kernels=(5, 4, 2, 2, 2)))
    assert width == hop == 160


def past_changes(standardise: str) -> bool:
    """Whether c_t of frames before 64 changes with the samples long after them."""
    torch.manual_seed(0)
    encoder = EncoderConfig(channels=(32,), standardise=standardise)
    model = CPC(encoder, ContextConfig(size=16)).eval()
    wave = 0.05 * torch.randn(20_480)
    other = wave.clone()
    other[66 * 160 :] = 0.2 * torch.randn(20_480 - 66 * 160)
    with torch.no_grad():
        _, (c, other_c) = model(torch.stack([wave, other])[:, None])
    assert not torch.equal(c[70:], other_c[70:])
    return not torch.equal(c[:64], other_c[:64])


def test_standardising_a_whole_waveform_leaks_the_future():
    assert not past_changes("gain")
    assert past_changes("waveform")


def test_a_context_reads_on_from_its_state():
    torch.manual_seed(0)
    context, z = Context(32, ContextConfig(size=16)), torch.randn(2, 128, 32)
    first, state = context(z[:, :64])
    second, _ = context(z[:, 64:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), context(z)[0])
