"""What makes training fast must not change what is computed.

Convolutions in pairs, the fused loss, audio read ahead, compilation; and the benchmark
that shows it."""

import itertools
import json
import math
import subprocess
import sys
import threading
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, options, script
from torch._subclasses.fake_tensor import FakeTensorMode

import cpc_nb.benchmark
import cpc_nb.contrast
import cpc_nb.scale
from cpc_nb.benchmark import (
    SAMPLED,
    StepSize,
    compare_results,
    kept,
    make_textbook,
    memory,
    precisions_on,
    textbook_loss,
)
from cpc_nb.checkpoint import CPCWithLoss
from cpc_nb.config import LossConfig, make_config
from cpc_nb.corpus import pack
from cpc_nb.data import Windows
from cpc_nb.launch import ProcessGroup, prefetch_audio
from cpc_nb.loss import InfoNCE
from cpc_nb.model import CPC
from cpc_nb.negatives import draw_candidates
from cpc_nb.pairs import convolve_in_pairs, in_pairs_on
from cpc_nb.trainer import Trainer, TrainingData

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "kernel, padding",
    [
        *((k, (half, half)) for k in (4, 8, 12) for half in (0, k // 4)),
        *((k, padding) for k in (4, 8) for padding in ((2, 1), (0, 3), (k - 1, 0))),
    ],
)
def test_convolution_in_pairs_is_the_convolution(kernel, padding):
    torch.manual_seed(0)
    stride = kernel // 2
    lengths = range(kernel - sum(padding), 6 * kernel)
    for n, windows, before, after in itertools.product(lengths, (1, 3), (2, 5), (3,)):
        shapes = (windows, n, before), (after, before, kernel), (after,)
        inputs = [
            torch.randn(*shape, dtype=torch.float64, requires_grad=True)
            for shape in shapes
        ]
        x, weight, bias = inputs
        found = convolve_in_pairs(x, weight, bias, padding)
        expected = F.conv1d(F.pad(x.mT, padding), weight, bias, stride).mT
        torch.testing.assert_close(found, expected)
        grad = torch.randn_like(expected)
        for one, other in zip(
            torch.autograd.grad(found, inputs, grad),
            torch.autograd.grad(expected, inputs, grad),
        ):
            torch.testing.assert_close(one, other)


def relative_errors(values, exact):
    """Error of each tensor, relative to its size."""
    return [
        float((value - truth).norm() / truth.norm())
        for value, truth in zip(values, exact)
    ]


@pytest.mark.parametrize("preset", ["demo", "minimal", "paper"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_encoder_is_as_exact_as_with_the_librarys_convolution(preset, precision):
    torch.manual_seed(0)
    config = make_config(preset)
    model = CPC(config.encoder, config.context)
    audio = 0.05 * torch.randn(2, 1, 4_000)  # most CPUs only emulate bfloat16

    def answer(precision):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            z = model.encoder(audio.to(next(model.parameters()).dtype))
        model.zero_grad()
        (z * torch.linspace(-1, 1, z.numel()).view_as(z).to(z.dtype)).sum().backward()
        gradients = [p.grad.double() for p in model.encoder.parameters()]
        return [z.detach().double(), *gradients]

    with in_pairs_on("cpu"):
        ours = answer(precision)
    with in_pairs_on():
        library = answer(precision)
    model.double()
    with in_pairs_on():
        exact = answer(torch.float64)
    our_errors = relative_errors(ours, exact)
    library_errors = relative_errors(library, exact)
    assert all(
        mine < 3 * theirs + 1e-6 for mine, theirs in zip(our_errors, library_errors)
    ), (our_errors, library_errors)


def by_definition(z, c, criterion, index):
    """InfoNCE from the whole matrix of scores, in double precision."""
    config, g, losses = criterion.config, criterion.group_size, []
    z, c = (x.double().unflatten(0, (-1, g)) for x in (z, c))
    G, _, T, _ = z.shape
    for k, W in zip(config.steps, criterion.predictors):
        pool = z.flatten(1, 2)
        places = torch.arange(g * T).expand(G, -1) if index is None else index
        scores = (
            torch.einsum(
                "gwth,dh,gmd->gwtm",
                c[:, :, :-k],
                W.weight.double(),
                pool.gather(1, places[..., None].expand(-1, -1, pool.shape[-1])),
            )
            * criterion.scale
        )
        truth = (
            torch.einsum(
                "gwth,dh,gwtd->gwt", c[:, :, :-k], W.weight.double(), z[:, :, k:]
            )
            * criterion.scale
        )
        own = (torch.arange(g)[:, None] * T + torch.arange(k, T)).expand(G, -1, -1)[
            ..., None
        ]
        barred = (
            own // T == places[:, None, None] // T
            if config.exclude_same_window
            else own == places[:, None, None]
        )
        scores = torch.cat(
            [truth[..., None], scores.masked_fill(barred, -math.inf)], -1
        ).flatten(0, -2)
        losses.append(
            F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))
        )
    return torch.stack(losses)


@pytest.mark.parametrize("seed", range(12))
def test_the_loss_of_random_shapes_in_any_chunks(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    g, groups, T, D, H = (
        int(rng.integers(2, 6)),
        int(rng.integers(1, 5)),
        int(rng.integers(8, 40)),
        int(rng.integers(3, 30)),
        int(rng.integers(3, 30)),
    )
    candidates, n = ("all", "sampled")[seed % 2], int(rng.integers(4, 40))
    config = LossConfig(
        steps=sorted(rng.choice(np.arange(1, 7), 3, replace=False).tolist()),
        candidates=candidates,
        n_candidates=n,
        exclude_same_window=bool(rng.integers(2)),
    )
    z, c, criterion = (
        torch.randn(g * groups, T, D, requires_grad=True),
        torch.randn(g * groups, T, H, requires_grad=True),
        InfoNCE(D, H, g, config),
    )
    index = (
        draw_candidates(seed, 0, groups, g * T, n) if candidates == "sampled" else None
    )
    wanted = [z, c, *criterion.parameters()]
    weights = torch.rand(3)
    expected = by_definition(z, c, criterion, index)
    expected_grads = torch.autograd.grad(expected @ weights.double(), wanted)
    for at_once in (1, 3 * g * T * n, 2**26):
        monkeypatch.setitem(cpc_nb.contrast.SCORES_AT_ONCE, "cpu", at_once)
        loss, _ = criterion(z, c, index)
        torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
        for found, truth in zip(
            torch.autograd.grad(loss @ weights, wanted), expected_grads
        ):
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(criterion(z, c, index)[0], loss)


def test_the_loss_in_bf16_is_that_in_fp32_within_its_rounding():
    torch.manual_seed(0)
    z, c, criterion = (
        torch.randn(16, 128, 64, requires_grad=True),
        torch.randn(16, 128, 64, requires_grad=True),
        InfoNCE(64, 64, 8, LossConfig(steps=(1, 12))),
    )
    exact, _ = criterion(z, c)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = criterion(z, c)
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0)
    for one, other in zip(
        torch.autograd.grad(rounded.sum(), (z, c)),
        torch.autograd.grad(exact.sum(), (z, c)),
    ):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, SAMPLED], ids=["all", "128"])
def test_the_loss_keeps_less_than_the_encoder(precision, overrides):
    small = {"encoder.channels": (64,), "context.size": 32, **overrides}
    batch_sizes = (8, 16, 64) if precision == torch.float32 else (8, 16)  # emulated
    sizes = [
        memory(StepSize("paper", small, batch_size), precision, CPU)
        for batch_size in batch_sizes
    ]
    assert all(size["loss"] < size["encoder"] for size in sizes), sizes
    assert sizes[-1]["loss"] < 1.1 * sizes[0]["loss"], sizes


@pytest.mark.parametrize("batch_size", [8, 512])
def test_the_loss_of_any_batch_works_on_few_scores_at_once(batch_size):
    config = make_config("paper", {"train.batch_size": batch_size}).loss
    z, c, criterion = (
        torch.randn(batch_size, 128, 16, requires_grad=True),
        torch.randn(batch_size, 128, 16, requires_grad=True),
        InfoNCE(16, 16, 8, config),
    )
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            nonlocal largest
            result = operation(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Largest():
        assert (
            kept(lambda: criterion(z, c)) < 38 * batch_size * 128 * 16 * 4
        )  # three gradients a step
    assert largest <= max(4 * cpc_nb.contrast.SCORES_AT_ONCE["cpu"], z.nbytes)


@pytest.mark.parametrize("resident", [False, True])
def test_audio_comes_in_order(speech, resident):
    corpus = pack(str(speech))
    windows = Windows(corpus, np.arange(len(corpus)), 8, 2, seed=3)
    shares = [(step, rank, 2) for step in range(7) for rank in range(2)]
    found = list(prefetch_audio(windows, iter(shares), CPU, resident))
    assert len(found) == len(shares) and all(
        audio.dtype == torch.int16
        and np.array_equal(audio, windows.batch(*share).audio)
        for audio, share in zip(found, shares)
    )


def test_a_feed_that_is_left_early_leaves_no_thread(speech):
    corpus = pack(str(speech))
    before, audio = (
        threading.active_count(),
        prefetch_audio(
            Windows(corpus, np.arange(len(corpus)), 8, 2, seed=3),
            ((step, 0, 1) for step in itertools.count()),
            CPU,
        ),
    )
    next(audio)
    assert threading.active_count() == before + 1
    audio.close()
    assert threading.active_count() == before


def test_what_fails_in_reading_fails_the_step(speech):
    corpus = pack(str(speech))
    with pytest.raises(TypeError):
        list(
            prefetch_audio(
                Windows(corpus, np.arange(len(corpus)), 8, 2, seed=3),
                [("no step", 0, 1)],
                CPU,
            )
        )


def test_memory_is_kept():
    """How often arrays that come and go ask for new pages, in a process of its own."""
    program = """
import resource, sys, torch
from cpc_nb.launch import retain_freed_memory
if sys.argv[1] == "keep": retain_freed_memory()
def work(): return sum(float((torch.zeros(2**24) + 1)[0]) for _ in range(5))
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults()]
for _ in range(4):
    work()
    counts.append(faults())
# the least after the first: some systems take idle pages back now and then
print(min(after - before for before, after in zip(counts[1:], counts[2:])))
"""
    kept, not_kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", program, how],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for how in ("keep", "not")
    )
    assert kept < not_kept / 10, (kept, not_kept)


@pytest.mark.parametrize(
    "preset, overrides",
    [("demo", {}), ("minimal", {}), ("paper", {}), ("paper", SAMPLED)],
    ids=["demo", "minimal", "paper", "128"],
)
def test_a_step_compiles_whole_but_for_the_recurrent_network(preset, overrides):
    """As on a GPU, with the library's convolutions.

    No compiler is needed to see where PyTorch's tracer gives up, nor that what it
    traced computes the same."""
    torch.manual_seed(0)
    small = {
        "encoder.channels": (16,),
        "context.size": 16,
        "data.group_size": 4,
        "train.batch_size": 8,
        **overrides,
    }
    objective, audio = (
        CPCWithLoss(make_config(preset, small)),
        torch.randint(-9999, 9999, (8, 1, 20_480), dtype=torch.int16),
    )
    index = objective.candidates(0, 0, audio)

    def answer(network):
        objective.zero_grad()
        loss, accuracy = network(audio, index)
        loss.mean().backward()
        return loss, accuracy, *(p.grad.clone() for p in objective.parameters())

    with in_pairs_on():
        torch._dynamo.reset()
        breaks = torch._dynamo.explain(objective)(audio, index).break_reasons
        assert breaks and all(
            "RNN, GRU, or LSTM" in reason.reason for reason in breaks
        ), breaks
        torch._dynamo.reset()
        torch.testing.assert_close(
            answer(torch.compile(objective, backend="aot_eager")), answer(objective)
        )


@pytest.mark.parametrize("preset", ["demo", "minimal", "paper"])
def test_an_update_never_asks_the_device_for_a_number(preset, speech):
    """A GPU that is asked for a value must first finish all that it was given.

    So must one that is asked how many values there are."""
    config = make_config(
        preset,
        {
            **SMALL,
            "data.source": str(speech),
            "data.group_size": 4,
            "train.batch_size": 8,
            "train.grad_clip": 1.0,
            "launch.n_gpus": 0,
        },
    )
    task = TrainingData(config)
    trainer, asked = Trainer(config, task.windows, ProcessGroup(CPU)), []

    class Asked(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            if operation.name() in (
                "aten::_local_scalar_dense",
                "aten::item",
                "aten::nonzero",
                "aten::is_nonzero",
                "aten::equal",
                "aten::masked_select",
                "aten::_unique2",
                "aten::bincount",
            ):
                asked.append(operation.name())
            return operation(*arguments, **(keywords or {}))

    trainer.begin()
    with closing(trainer.audio(range(3))) as audio, Asked():
        for step in range(3):
            found = trainer.update(step, 1e-4, audio)
        assert not asked, asked
        found.sum().item()
    assert asked


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the name, the arguments and the result of each operation but views."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        if not operation.is_view:
            self.operations.append(
                (operation.name(), arguments, keywords or {}, result)
            )
        return result


@contextmanager
def imagined_gpu():
    """PyTorch's fake GPU, under autocast to bfloat16.

    It knows what each tensor is and where, and refuses to mix them."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` itself wants a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


@pytest.mark.parametrize(
    "preset, overrides",
    [("demo", {}), ("minimal", {}), ("paper", {}), ("paper", SAMPLED)],
    ids=["demo", "minimal", "paper", "128"],
)
def test_what_a_gpu_is_sent_does_not_wait_for_it(preset, overrides, monkeypatch):
    """The forward pass; a fake GPU has no recurrent network, and pins no memory."""
    pinned, config = [], make_config(preset, overrides)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)

    class Memoryless(torch.nn.Linear):
        def forward(self, z, state=None):
            return super().forward(z), state

    with imagined_gpu():
        with torch.device("cuda"):
            objective = CPCWithLoss(config)
            objective.model.context.rnn = Memoryless(
                objective.model.encoder.size, config.context.size
            )
            audio = torch.zeros(config.train.batch_size, 1, 20_480, dtype=torch.int16)
        with Watched() as watched:
            loss, accuracy = objective(audio, objective.candidates(0, 0, audio))
    assert loss.device.type == accuracy.device.type == "cuda"
    sent = [
        (any(given[0] is x for x in pinned), more.get("non_blocking", False))
        for name, given, more, result in watched.operations
        if name == "aten::_to_copy" and given[0].device != result.device
    ]
    assert sent == ([(True, True)] if overrides else [])


@pytest.mark.parametrize(
    "norm, operations",
    [
        ("none", {"aten::convolution", "aten::relu_"}),
        ("channel", {"aten::convolution", "aten::native_layer_norm", "aten::relu_"}),
    ],
)
def test_activations_on_a_gpu_are_written_no_more_than_they_must(norm, operations):
    """All in bfloat16, and neither converted nor copied between layers.

    (A fake GPU has no cuDNN, whose convolution gives what batch normalisation takes as
    it is.)"""
    with imagined_gpu():
        with torch.device("cuda"):
            encoder, audio = (
                CPCWithLoss(make_config("paper", {"encoder.norm": norm})).model.encoder,
                torch.zeros(7, 1, 20_480),
            )
        with Watched() as watched:
            encoder(audio)
    written = [
        (name, out.dtype)
        for name, _, _, result in watched.operations
        for out in torch.utils._pytree.tree_leaves(result)
        if isinstance(out, torch.Tensor)
        and len(out) == 7
        and out.numel() > audio.numel() + 7
    ]
    assert (
        {dtype for _, dtype in written} == {torch.bfloat16}
        and {name for name, _ in written} == operations
        and len(written) == 5 * len(operations)
    )


def test_without_a_compiler_training_goes_on(speech, tmp_path):
    given = options(
        {
            "data": str(speech),
            "run_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "batch_size": 8,
            "compile": True,
            "n_gpus": 0,
            "overrides": {**SMALL, "data.group_size": 2},
        }
    )
    done = script(
        "cpc_train",
        *given,
        CXX="no-such-compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        PATH=str(tmp_path),
    )
    assert done.code == 0 and "training goes on without compile" in done.output, (
        done.output[-3000:]
    )


def test_importing_the_package_does_not_load_pytorch():
    subprocess.run(
        [sys.executable, "-c", "import sys, cpc_nb; assert 'torch' not in sys.modules"],
        check=True,
    )


def test_the_benchmark(speech, tmp_path):
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cpc_nb.benchmark",
            "--sizes",
            '["samples"]',
            "--rounds",
            "1",
            "--run_s",
            "2",
            "--data",
            str(speech),
            "--protocols",
            '["speaker_window"]',
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    for part, precision in itertools.product(
        (
            "encoder",
            "encoder, library convolution",
            "context",
            "loss",
            "step",
            "step of 64 windows",
        ),
        precisions_on(CPU),
    ):
        name = f"samples | {part} | {precision}"
        assert (
            name in done.stdout
            and result["audio_seconds_per_second"][name]["median"] > 0
        )
    assert (
        "samples | textbook step | fp32" in done.stdout
        and "data | a file decoded for each window" in done.stdout
        and "parts | mel encoder, plain" in done.stdout
    )
    assert (
        0 <= result["runs"]["samples"]["waited_for_data"] < 1
        and result["runs"]["samples"]["seconds"] >= 2
        and result["peaks"]["bytes"] > 0
    )
    seconds = result["evaluation_seconds"]
    assert (
        min(seconds.values()) > 0
        and seconds["features"] + seconds["probes"] + seconds["t-SNE"] < seconds["all"]
    )
    # at least what was kept for the backward pass; the textbook's gather takes more
    most = result["peak_bytes_per_window"]["samples"]
    assert (
        all(
            most[precision]
            > sum(result["kept_bytes_per_window"][f"samples | {precision}"].values())
            for precision in precisions_on(CPU)
        )
        and most["textbook"] > most["fp32"]
    )
    # of each product forward there are two backward, but for the first layer's input
    samples_in, layers = 20_480, make_config("samples").encoder.layers
    flop, before = 0, 1
    for number, (kernel, stride, channels) in enumerate(layers):
        samples_in //= stride
        flop += (3 if number else 2) * 2 * samples_in * kernel * before * channels
        before = channels
    assert result["work_per_audio_second"]["samples | encoder | fp32"][
        "flop"
    ] == pytest.approx(flop / 1.28, rel=0.01)
    again = subprocess.run(
        [
            sys.executable,
            "-m",
            "cpc_nb.benchmark",
            "--old",
            str(out),
            "--new",
            str(out),
        ],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0 and again.stdout.count("1.00 ×") == len(
        result["audio_seconds_per_second"]
    )
    slower = {
        **result,
        "audio_seconds_per_second": {
            name: {**rate, "median": rate["median"] / 2}
            for name, rate in result["audio_seconds_per_second"].items()
        },
    }
    assert compare_results(result, slower).count("0.50 ×") == len(
        result["audio_seconds_per_second"]
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", '["dmo"]'], "size 'dmo' is unknown"),
        (["--new", "x.json"], "x.json holds no benchmark"),
        (["--old", "/dev/null"], "holds no benchmark"),
    ],
)
def test_a_benchmark_that_cannot_be(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "cpc_nb.benchmark", *arguments],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and message in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_textbook_learns():
    """The reference works and is no straw man: its loss falls."""
    torch.manual_seed(0)
    config = make_config(
        "samples",
        {
            "encoder.channels": (16, 16, 16, 32, 32),
            "context.size": 32,
            "loss.steps": (1, 2),
        },
    )
    network, wave = make_textbook(config), torch.randn(4, 1, 20_480)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        (loss := textbook_loss(network, wave, n_negatives=16)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(17)) < 1 and losses[-1] < 0.8 * losses[0]


def flop_by_definition(config) -> float:
    """FLOP of a window's step, forward and backward, from sizes alone."""
    n, before, flop = config.data.window, 1, 0
    for number, (kernel, stride, channels) in enumerate(config.encoder.layers):
        padding = kernel - stride if config.encoder.padding else 0
        n = (n + padding - kernel) // stride + 1
        # the first layer's input has no gradient
        flop += (3 if number else 2) * 2 * n * kernel * before * channels
        before = channels
    T, D, H, loss = n, before, config.context.size, config.loss
    gates = {"gru": 3, "lstm": 4}[config.context.kind]
    flop += 3 * 2 * T * gates * H * (D + H)
    for k in loss.steps:
        if loss.project == "context":
            flop += 3 * 2 * T * H * D + 3 * 2 * (T - k) * config.group_size * T * D
        else:
            flop += 3 * 2 * (T - k) * (D * H + config.group_size * H)
    return flop


@pytest.mark.parametrize("preset", ["paper", "minimal"])
def test_the_work_of_a_window_is_that_of_the_definition(preset):
    small = {"encoder.channels": (32,), "context.size": 48, "data.group_size": 4}
    config = make_config(preset, small | {"train.batch_size": 4})
    for precision in (torch.float32, torch.bfloat16):
        found = cpc_nb.scale.measure_demand(config, precision).flops
        assert found == pytest.approx(flop_by_definition(config), rel=1e-3)


def test_what_does_not_fit_is_a_row_and_the_rest_is_measured(monkeypatch):
    def too_large():
        raise torch.OutOfMemoryError("no memory")

    models = {
        "samples | step | fp32": lambda: (
            {"samples | step | fp32": (lambda step: None, 1)},
            {},
        ),
        "samples | step of 512 windows | fp32": too_large,
        "samples | loss | fp32": lambda: (
            {"samples | loss | fp32": (lambda step: None, 1)},
            {},
        ),
    }
    monkeypatch.setattr("cpc_nb.benchmark.models_of_a_size", lambda *_: models)
    rates, _, large = cpc_nb.benchmark.measure_size("samples", 1, CPU, False)
    assert set(rates) == {"samples | step | fp32", "samples | loss | fp32"}
    assert large == ["samples | step of 512 windows | fp32"]
