"""Exports at work: in a pipeline, compiled, moved between devices, offloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.exporting import export
from qat.verification import verify
from qat.verification.outputs import compute_outputs
from tests.exports import DTYPES, TYPES, flux_inputs, frozen, frozen_flux, small_flux, unpack_weight

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*[qQ]uanto.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def exported(directory: Path, **spec: Any) -> Path:
    export(frozen_flux(**spec), directory, example_inputs=flux_inputs(spec.get("dtype", "bfloat16")))
    return directory


def stock(directory: Path, dtype: str = "bfloat16") -> Any:
    from diffusers import AutoModel

    return AutoModel.from_pretrained(str(directory), dtype=getattr(torch, dtype))


def pipeline(transformer: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A FluxPipeline with a tiny random autoencoder, fed with embeddings."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
    )
    made = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae.to(dtype), None, None, None, None, transformer)
    made.set_progress_bar_config(disable=True)
    return made


def picture(made: Any, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    text, pooled = (torch.randn(1, *size, generator=generator, dtype=dtype) for size in ((7, 160), (32,)))
    call = {
        "prompt_embeds": text.to(made._execution_device),
        "pooled_prompt_embeds": pooled.to(made._execution_device),
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "output_type": "pt",
    }
    image: torch.Tensor = made(generator=generator, **call).images
    return image.float().cpu()


@pytest.mark.parametrize("weights", TYPES)
def test_a_pipeline_draws_with_the_loaded_transformer(tmp_path: Path, weights: str) -> None:
    """The same picture with the stock model as with ours, to the kernel's rounding where a move changes the kernel."""
    out = exported(tmp_path / "out", weights=weights)
    ours = picture(pipeline(qat.load(out)))
    assert ours.shape == (1, 3, 16, 16)
    assert ours.isfinite().all()
    assert ours.std() > 0
    moved = pipeline(stock(out)).to("cpu")  # stock says that it is on the meta device until it is moved
    # int4 goes over to a kernel that sums in another order: a few units of bfloat16 near 1 (2 ** -8 each).
    assert (picture(moved) - ours).abs().max() <= (8 * 2**-8 if weights == "int4" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_compiles_as_one_graph(tmp_path: Path, dtype: str) -> None:
    """To rounding; in bfloat16 when the compiler is told to round where eager does.

    By default it drops roundings between fused operations, which took this model to 2.1 units from eager.
    """
    import torch._inductor.config

    model = frozen(small_flux(), "diffusers", weights="int8", dtype=dtype)
    export(model, tmp_path / "out")
    loaded, inputs = stock(tmp_path / "out", dtype), flux_inputs(dtype)
    torch.compiler.reset()
    rounding = torch._inductor.config.patch(emulate_precision_casts=dtype == "bfloat16")
    with torch.no_grad(), rounding:
        eager, compiled = loaded(**inputs).sample, torch.compile(loaded, fullgraph=True)(**inputs).sample
    # A bfloat16 unit of the largest number: it has 8 bits of significand, so at most 2 ** -7 of it. Measured: 2.1.
    bound = 1e-6 if dtype == "float32" else 2.5 * 2**-7
    assert (compiled.float() - eager.float()).abs().max() <= bound * eager.float().abs().max()


@needs_cuda
@pytest.mark.parametrize("weights", TYPES)
def test_moving_to_a_gpu_and_back_keeps_values(tmp_path: Path, weights: str) -> None:
    out = exported(tmp_path / "out", weights=weights)
    model, moved = stock(out), stock(out)
    for device in ("cuda", "cpu"):
        moved.to(device)
        for name, module in model.named_modules():
            if hasattr(module, "weight_qtype"):
                there = moved.get_submodule(name).weight
                assert torch.equal(there.dequantize().cpu(), module.weight.dequantize()), (device, name)
                for old, new in zip(unpack_weight(module.weight), unpack_weight(there), strict=True):
                    assert old is None or torch.equal(old.float(), new.float().cpu()), (device, name)


@needs_cuda
@pytest.mark.parametrize("weights", TYPES)
def test_a_model_frozen_on_a_gpu_is_exported_and_verified(tmp_path: Path, weights: str) -> None:
    model = frozen(small_flux().cuda(), "diffusers", weights=weights)
    export(model, tmp_path / "gpu", example_inputs=flux_inputs("bfloat16"))
    assert verify(tmp_path / "gpu", model).ok
    export(model.cpu(), tmp_path / "cpu", example_inputs=flux_inputs("bfloat16"))
    assert verify(tmp_path / "cpu", model).ok
    loaded = qat.load(tmp_path / "cpu", device="cuda")
    left, right = (compute_outputs(m, flux_inputs("bfloat16"))["sample"] for m in (loaded, model.cuda()))
    assert torch.equal(left, right)


def marked(model: Any) -> Any:
    """With the lines of the model card that keep stock float8 from losing biases on a GPU."""
    from optimum.quanto import qfloat8_e4m3fn

    for module in model.modules():
        if hasattr(module, "weight_qtype"):
            module.weight.activation_qtype = qfloat8_e4m3fn
    return model


@needs_cuda
@pytest.mark.parametrize("weights", TYPES)
def test_cpu_offload(tmp_path: Path, weights: str) -> None:
    out = exported(tmp_path / "out", weights=weights)
    model = stock(out)
    there = picture(pipeline(marked(model) if weights == "float8" else model).to("cuda"))
    offloaded = pipeline(qat.load(out))
    offloaded.enable_model_cpu_offload()
    for _ in range(2):  # the second time it was moved back once
        assert torch.equal(picture(offloaded), there)


@needs_cuda
def test_float8_keeps_its_bias_on_a_gpu_but_for_stock_code(tmp_path: Path) -> None:
    out = exported(tmp_path / "out", weights="float8")
    assert "module.weight.activation_qtype = qfloat8_e4m3fn" in (out / "README.md").read_text()
    name = "transformer_blocks.0.ff.net.0.proj"
    x = torch.randn(16, 256, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    layer = qat.load(out).get_submodule(name)
    with torch.no_grad():
        exact = x.double() @ layer.weight.dequantize().double().t()
        for model, loses in ((qat.load(out, device="cuda"), False), (qat.load(out).cuda(), False),
                             (marked(stock(out)).cuda(), False), (stock(out).cuda(), True)):  # fmt: skip
            found = model.get_submodule(name)(x.cuda()).double().cpu()
            # When this fails for the last one, optimum-quanto has mended its kernel: take the note and the mark away.
            wanted = exact if loses else exact + layer.bias.double()
            assert (found - wanted).norm() < 0.01 * exact.norm()
