"""Quantized activations after calibration alone: ours as reloaded, stock optimum-quanto in memory and as reloaded.

The same batches for every arm, three draws of them; the reference language model, and the same model with outliers:
some channels are scaled up and the weights after them down, which changes nothing in float. Printed is the divergence
(KL, in nats) of the quantized model's predictions from the float model's, and its loss, on held-out blocks::

    python -m scripts.benchmark_calibration [--device cuda] [--seeds 3] [--output docs/results/calibration.json]
"""

from __future__ import annotations

import copy
import json
import statistics
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import qat

REFERENCE = Path(__file__).parents[1] / "recipes" / "reference"
BLOCK, BATCH, BATCHES, HELD_OUT = 256, 8, 8, 32


@dataclass(frozen=True)
class Data:
    """Blocks of token numbers."""

    batches: list[Tensor]
    held_out: Tensor


def read_blocks(tokenizer: Any) -> Tensor:
    """The standard library's modules as blocks of tokens, ``(blocks, BLOCK)``."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8", errors="ignore"), verbose=False)["input_ids"]
    whole = len(ids) // BLOCK
    return torch.tensor(ids[: whole * BLOCK]).view(whole, BLOCK)


def draw(blocks: Tensor, seed: int) -> Data:
    """The held-out blocks are those of seed 0 for every seed; the batches are drawn from the others."""
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    others = blocks[order[HELD_OUT:]]
    chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed + 1))[: BATCH * BATCHES]
    return Data(list(torch.split(others[chosen], BATCH)), blocks[order[:HELD_OUT]])


@torch.no_grad()
def with_outliers(model: Any, factor: float = 30.0, channels: int = 4) -> nn.Module:
    """The same function in float, with a few channels of each norm and each gate that are ``factor`` times as large."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)

    def chosen(width: int) -> Tensor:
        return torch.randperm(width, generator=generator)[:channels]

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        norms = [(layer.input_layernorm, projections), (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])]
        for norm, readers in norms:
            index = chosen(norm.weight.numel())
            norm.weight[index] *= factor
            for reader in readers:
                reader.weight[:, index] /= factor
        index = chosen(mlp.up_proj.out_features)
        mlp.up_proj.weight[index] *= factor
        mlp.down_proj.weight[:, index] /= factor
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def predictions(model: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities, float32."""
    return torch.cat([model(input_ids=part).logits.float().log_softmax(-1) for part in torch.split(tokens, BATCH)])


def stock_in_memory(model: nn.Module, activations: str, data: Data) -> nn.Module:
    """optimum-quanto's own ``Calibration``, with what it decides about outputs."""
    from optimum.quanto import Calibration, freeze, qfloat8_e4m3fn, qint8, quantize

    qtype = {"int8": qint8, "float8": qfloat8_e4m3fn}[activations]
    quantize(model, weights=qint8, activations=qtype, exclude="lm_head")
    with torch.no_grad(), Calibration():
        for batch in data.batches:
            model(input_ids=batch)
    freeze(model)
    return model


def stock_reloaded(model: nn.Module, activations: str, data: Data) -> nn.Module:
    """The same after optimum-quanto wrote it and read it again."""
    from optimum.quanto import quantization_map, requantize

    plain = copy.deepcopy(model)
    made = stock_in_memory(model, activations, data)
    device = next(plain.parameters()).device
    requantize(plain, made.state_dict(), quantization_map(made), device=device)
    return plain


def ours(target: str) -> Callable[[nn.Module, str, Data], nn.Module]:
    """`qat.calibrate`, exported, and loaded again by the target's own loader."""

    def arm(model: nn.Module, activations: str, data: Data) -> nn.Module:
        device = next(model.parameters()).device
        spec = qat.QuantSpec(weights="int8", activations=activations, dtype="float32")  # type: ignore[arg-type]
        qat.prepare(model, spec, target=target)
        qat.calibrate(model, [{"input_ids": batch} for batch in data.batches])
        qat.freeze(model)
        with TemporaryDirectory() as folder:
            qat.export(model, folder)
            qat.verify(folder)
            return qat.load(folder, device=device)

    return arm


ARMS: dict[str, Callable[[nn.Module, str, Data], nn.Module]] = {
    "stock, in memory": stock_in_memory,
    "stock, reloaded": stock_reloaded,
    "qat, target quanto, reloaded": ours("quanto"),
    "qat, target transformers, reloaded": ours("transformers"),
}


def main(device: str = "cpu", seeds: int = 3, output: Path | None = None, arms: Literal["all", "ours"] = "all") -> None:
    """Measure every arm and print a table.

    Args:
        device: Where the models run.
        seeds: Draws of calibration batches.
        output: A JSON file for the numbers.
        arms: All, or only those of this package.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference: Any = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32, trust_remote_code=False)
    reference = reference.to(device).eval()
    blocks = read_blocks(AutoTokenizer.from_pretrained(REFERENCE, trust_remote_code=False)).to(device)
    models = {"reference": reference, "with outliers": with_outliers(reference)}
    rows = []
    for name, model in models.items():
        wanted = predictions(model, draw(blocks, 0).held_out)
        for activations in ("int8", "float8"):
            for arm, make in ARMS.items():
                if arms == "ours" and arm.startswith("stock"):
                    continue
                kl: list[float] = []
                losses: list[float] = []
                for seed in range(seeds):
                    data = draw(blocks, seed)
                    given = predictions(make(copy.deepcopy(model), activations, data), data.held_out)
                    kl.append(float((wanted.exp() * (wanted - given)).sum(-1).mean()))
                    labels = data.held_out[:, 1:].flatten()
                    losses.append(float(nn.functional.nll_loss(given[:, :-1].flatten(0, 1), labels)))
                rows.append({"model": name, "activations": activations, "arm": arm, "kl": kl, "loss": losses})
                spread = f"KL {statistics.mean(kl):8.4f} ({min(kl):.4f} to {max(kl):.4f})"
                print(f"{name:14}  {activations:6}  {arm:36}  {spread}  loss {statistics.mean(losses):.4f}", flush=True)
    if output is not None:
        output.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
