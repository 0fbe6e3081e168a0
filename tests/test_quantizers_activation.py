"""Scales of activations: shared codes, and scales that are learned, against autograd of an independent float64 form."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import qat
from qat import kernels
from qat.formats import QUANTO
from qat.layers import Mode, QLinear, quantized_layers
from qat.numerics import QType
from qat.observers import Absmax
from qat.quantizers.activation import ActivationQuantizer, LearnedScale, fake_quantize_output
from tests.helpers import kept_by

BYTES = [QUANTO.qtypes[name] for name in ("int8", "float8")]
LEARNED = qat.StraightThrough(learn_activations=True)


def quantizer(
    qtype: QType, scale: float = 0.03125, kind: type[ActivationQuantizer] = LearnedScale
) -> ActivationQuantizer:
    """A calibrated one, served in float32."""
    made = kind(qtype, torch.float32, Absmax())
    made.observe(torch.tensor(scale * qtype.steps))
    made.refresh()
    return made


def lsq(x: Tensor, scale: Tensor, qtype: QType) -> Tensor:
    """Esser et al. 2020, equations 1 to 3 and 5, in float64: gradients come from autograd."""
    v = x / scale
    low, high = (-448.0, 448.0) if qtype.floating else (-128.0, 127.0)
    clipped = torch.minimum(torch.maximum(v, torch.full_like(v, low)), torch.full_like(v, high))
    codes = clipped.detach().float().to(torch.float8_e4m3fn).double() if qtype.floating else clipped.detach().round()
    return (clipped + (codes - clipped).detach()) * scale


@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_the_gradients_of_a_learned_scale_are_those_of_lsq(qtype: QType) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        learned = quantizer(qtype, 0.5 * 0.03125 if seed % 2 else 0.03125)
        x = torch.randn(7, 33) * learned.scale * qtype.steps / 2.5
        weights = torch.randn(7, 33)
        ours = x.clone().requires_grad_()
        y = fake_quantize_output(ours, learned)
        (y * weights).sum().backward()
        theirs, move = x.double().requires_grad_(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
        z = lsq(theirs, learned.scale.double() * (1 + move), qtype)
        (z * weights.double()).sum().backward()
        assert torch.equal(y.double(), z)
        assert isinstance(learned, LearnedScale)
        assert learned.move.grad is not None
        assert move.grad is not None
        torch.testing.assert_close(learned.move.grad.double(), move.grad, rtol=1e-4, atol=1e-4)
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad)
        assert 0 < int((ours.grad == 0).sum()) < x.numel()


@pytest.mark.parametrize("weights", ["int8", "float8", "int4"])
@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_a_layer_learns_the_scales_of_its_input_and_its_output(weights: str, activations: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 32))
    spec = qat.QuantSpec.model_validate({"weights": weights, "activations": activations, "dtype": "float32"})
    qat.prepare(model, spec, algorithm=LEARNED)
    x = torch.randn(24, 256)
    qat.calibrate(model, [x])
    x = (x * 1.5).requires_grad_()
    y = model(x)
    y.square().mean().backward()
    moves = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters() if n.endswith(".move")}
    assert len(moves) == 4
    z = given = x.detach().double().requires_grad_()
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        assert isinstance(layer, QLinear)
        for side in ("input", "output"):
            one = getattr(layer, f"{side}_quantizer")
            z = lsq(z, one.scale.double() * (1 + moves[f"{name}.{side}_quantizer.move"]), one.qtype)
            if side == "input":
                z = z @ layer.weight_quantizer.quantize(layer.weight, torch.float32).value.double().t() + layer.bias
        z = nn.functional.gelu(z) if name == "0" else z
    z.square().mean().backward()
    torch.testing.assert_close(y.double(), z, rtol=0, atol=1e-6)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), given.grad, rtol=1e-4, atol=1e-7)
    for name, move in moves.items():
        torch.testing.assert_close(model.get_parameter(name).grad.double(), move.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_learned_scales_are_trained_kept_by_calibration_and_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8))
    qat.prepare(model, qat.QuantSpec(activations="int8", dtype="float32"), algorithm=LEARNED)
    x = torch.randn(24, 32)
    qat.calibrate(model, [x])
    groups = {group["name"]: group for group in qat.parameter_groups(model, lr=1e-3, scale_lr=1e-2, weight_decay=0.1)}
    assert len(groups["scales"]["params"]) == 4
    assert groups["scales"]["weight_decay"] == 0
    start = [q.scale.clone() for _, layer in quantized_layers(model) for q in layer.activation_quantizers()]
    optimizer = torch.optim.Adam(groups.values())
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    model.eval()
    y = model(x).detach()
    quantizers = [q for _, layer in quantized_layers(model) for q in layer.activation_quantizers()]
    scales = [q.serving_scale() for q in quantizers]
    assert all(not torch.equal(one, other) for one, other in zip(scales, start, strict=True))
    report = qat.calibrate(model, [x * 3])  # which is for scales that training did not learn
    assert [torch.equal(q.serving_scale(), kept) for q, kept in zip(quantizers, scales, strict=True)] == [True] * 4
    assert report.scales["0"][0] == float(scales[0])
    qat.freeze(model)
    assert torch.equal(model(x).dequantize(), y)


def test_a_learned_scale_never_reaches_zero_and_comes_back() -> None:
    learned = quantizer(BYTES[0])
    assert isinstance(learned, LearnedScale)
    learned.move.data.fill_(-3.0)
    assert float(learned.serving_scale()) == float(learned.scale) / 128
    fake_quantize_output(torch.full((2, 2), 0.1), learned).sum().backward()
    assert learned.move.grad is not None
    assert float(learned.move.grad) > 0


def test_a_layer_named_static_and_one_whose_input_arrives_quantized_learn_no_scale() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    algorithm = qat.StraightThrough(learn_activations=True, static_activations=("4",))
    qat.prepare(model, qat.QuantSpec(activations="int8", dtype="float32"), algorithm=algorithm)
    assert qat.calibrate(model, [torch.randn(8, 16)]).arriving == ("2",)
    assert model[4].input_quantizer.learned_scale() is None
    groups = {group["name"]: group["params"] for group in qat.parameter_groups(model, lr=1e-3)}
    assert len(groups["scales"]) == 4  # those of layer 2 too, whatever a calibration finds
    model(torch.randn(8, 16)).square().sum().backward()
    unused = model[2].input_quantizer.move
    assert torch.equal(unused.grad, torch.zeros(1))  # DDP waits for a gradient of each parameter
    assert model[0].input_quantizer.move.grad.abs() > 0


def test_a_float_checkpoint_gives_quantizers_the_state_of_new_ones() -> None:
    model, weights = nn.Sequential(nn.Linear(16, 4)), nn.Sequential(nn.Linear(16, 4)).state_dict()
    qat.prepare(model, qat.QuantSpec(activations="int8", dtype="float32"), algorithm=LEARNED)
    model.load_state_dict(weights)
    quantizer = model[0].input_quantizer
    assert isinstance(quantizer, LearnedScale)
    assert (quantizer.enabled, quantizer.initialized, quantizer.move.requires_grad) == (True, False, True)


def test_a_learned_scale_that_observes_may_be_used_twice_before_backward() -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    qat.prepare(model, qat.QuantSpec(activations="int8", dtype="float32"), algorithm=LEARNED)
    model[0].mode = Mode(observe=True)
    (model(torch.randn(3, 16)) + model(torch.randn(3, 16) * 2)).sum().backward()
    assert model[0].input_quantizer.move.grad is not None


class Readers(nn.Module):
    """Three layers read one tensor, and one of them another one too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.o(self.q(x) * self.k(x) + self.v(x))


def prepared() -> Readers:
    torch.manual_seed(0)
    model = Readers()
    qat.prepare(model, qat.QuantSpec(activations="int8", dtype="float32"), target="quanto")
    qat.calibrate(model, [torch.randn(8, 32), torch.randn(8, 32) * 2])
    return model


def calls(model: nn.Module, x: Tensor) -> int:
    """How often inputs are quantized to codes in a forward; outputs are not."""
    count = 0
    with pytest.MonkeyPatch.context() as patch:
        original = kernels.quantize_activation

        def counted(*args: object) -> object:
            nonlocal count
            count += 1
            return original(*args)

        patch.setattr(kernels, "quantize_activation", counted)
        model(x)
    return count


def test_layers_that_read_one_tensor_have_one_scale_and_share_its_codes() -> None:
    model, x = prepared(), torch.randn(8, 32)
    scales = [layer.input_quantizer.scale for layer in (model.q, model.k, model.v)]  # type: ignore[union-attr]
    assert scales[0] == scales[1] == scales[2] != model.o.input_quantizer.scale  # type: ignore[union-attr]
    assert calls(model, x) == 2
    expected = model(x)
    state = model.state_dict()
    assert len({state[f"{name}.input_quantizer.scale"].data_ptr() for name in "qkv"}) == 3  # safetensors wants that
    with torch.no_grad():
        assert calls(model, x) == 4  # nothing keeps codes for a backward pass
        assert torch.equal(model(x), expected)
    other = copy.deepcopy(model)
    assert calls(other, x) == 2
    other.load_state_dict(state)
    assert calls(other, x) == 2
    assert torch.equal(other(x), expected)
    other.to("meta").to_empty(device="cpu")  # whose scales are other tensors
    shared = [layer.input_quantizer.scale for layer in (other.q, other.k, other.v)]  # type: ignore[union-attr]
    assert shared[0] is shared[1] is shared[2]
    other.load_state_dict(state | {"v.input_quantizer.scale": state["v.input_quantizer.scale"] * 2})
    assert calls(other, x) == 3  # two of them share
    assert torch.equal(other.q.input_quantizer.scale, scales[0])  # type: ignore[union-attr]
    assert other.v.input_quantizer.scale == 2 * other.k.input_quantizer.scale  # type: ignore[union-attr, operator]
    qat.calibrate(other, [torch.randn(8, 32)])
    assert calls(other, x) == 2


def test_layers_that_read_one_tensor_keep_its_codes_once_and_not_the_tensor() -> None:
    model, x = prepared(), torch.randn(8, 32)
    kept, _ = kept_by(lambda: model(x))
    sizes = Counter(kept.storages.values())
    assert sizes[x.numel()] == 2  # codes of what q, k and v read, and of what o reads
    assert sizes[x.numel() // 8] == 2 + 4 + 2  # their flags, those of four outputs, and mean and deviation of the norm
    assert sizes[4 * x.numel()] == 3  # float32: what the norm reads, and the outputs of q and k, which are multiplied


def test_a_quantizer_that_observes_has_a_scale_of_its_own_again() -> None:
    model = prepared()
    model.k.mode = Mode(observe=True)
    with torch.no_grad():
        model.norm.weight.mul_(3)
    model(torch.randn(8, 32))
    model.k.input_quantizer.refresh()  # type: ignore[union-attr]
    assert model.k.input_quantizer.scale != model.q.input_quantizer.scale == model.v.input_quantizer.scale  # type: ignore[union-attr]


def test_a_recomputation_under_selective_checkpointing_makes_the_calls_of_the_forward() -> None:
    def must_save(ctx: object, function: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        wanted = function is torch.ops.qat.quantize_activation.default
        return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE

    model, x, gradients = prepared(), torch.randn(8, 32), []
    for wrapped in (False, True):
        given = x.clone().requires_grad_() * 1.0
        context = functools.partial(create_selective_checkpoint_contexts, must_save)
        y = checkpoint(model, given, use_reentrant=False, context_fn=context) if wrapped else model(given)
        gradients.append(torch.autograd.grad(y.square().sum(), list(model.parameters())))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_shared_codes_are_those_of_the_tensor_as_it_is_and_die_with_it() -> None:
    one, other = (quantizer(BYTES[0], 0.03125, ActivationQuantizer) for _ in range(2))
    one.share([other])
    x = torch.randn(4, 8, requires_grad=True) * 1.0
    first = one.quantize(x)
    assert other.quantize(x) is first
    x.mul_(2)
    second = other.quantize(x)
    assert second is not first
    assert torch.equal(second.codes, one.qtype.encode_activation(x, one.scale, torch.float32)[0])
    one.scale.mul_(2)
    assert other.quantize(x) is not second
    second = one.quantize(x)
    leaf = torch.randn(4, 8)
    assert one.quantize(leaf) is not other.quantize(leaf)  # a fused optimizer changes it without a new version
    alive = weakref.ref(second.codes)
    del second
    gc.collect()
    assert alive() is not None
    del x
    gc.collect()
    assert alive() is None
    pickle.loads(pickle.dumps(one))
