"""What inspection decides for diffusion transformers: shared last names, sensitive layers, nearly all of a Flux."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from qat.errors import SpecError
from qat.inspection import inspect
from qat.spec import QuantSpec
from tests.helpers import WEIGHT_TYPES, of_diffusers
from tests.test_inspection import HeadNet, KeepingNet, Net, rows


class TestLeafNames:
    """Diffusers names float layers by the last part of their name only."""

    def test_an_exclude_that_would_take_others_along_is_refused(self) -> None:
        with pytest.raises(
            SpecError, match=r"excluding \['proj_out'\] would also exclude .*: exclude all of '\*proj_out', or none"
        ):
            inspect(of_diffusers(Net()), QuantSpec(exclude="proj_out"), target="diffusers")

    @pytest.mark.parametrize(
        "overrides", [{"blocks.0.to_q": "float"}, {"blocks.1.to_q": "float"}], ids=["first", "last"]
    )
    def test_so_is_an_override_to_float(self, overrides: dict[str, str]) -> None:
        with pytest.raises(SpecError, match=r"would also exclude .*to_q"):
            inspect(of_diffusers(Net()), QuantSpec.model_validate({"overrides": overrides}), target="diffusers")

    def test_a_whole_family_can_be_excluded(self) -> None:
        report = rows(inspect(of_diffusers(Net()), QuantSpec(exclude="*proj_out"), target="diffusers"))
        assert {name: row.weights for name, row in report.items()} == {
            "blocks.0.to_q": "int8",
            "blocks.0.proj_out": None,
            "blocks.1.to_q": "int8",
            "blocks.1.proj_out": None,
            "proj_out": None,
        }

    def test_a_head_goes_with_its_family(self) -> None:
        report = inspect(of_diffusers(HeadNet()), QuantSpec(), target="diffusers")
        assert rows(report)["proj_out"].weights == "int8"
        assert rows(report)["proj_out"].reason == "quantized, since other layers called 'proj_out' are"
        assert report.notes == (
            "proj_out: quantized although float by default: target 'diffusers' cannot tell it from other 'proj_out'",
        )
        assert rows(inspect(HeadNet(), QuantSpec(), target="quanto"))["proj_out"].weights is None

    @pytest.mark.parametrize("model", [KeepingNet(), Net(last=24, width=256)], ids=["kept in float32", "hazard"])
    def test_a_family_stays_float_with_one_that_must(self, model: nn.Module) -> None:
        if isinstance(model, KeepingNet):
            # The loader casts whatever lies below such a part of a path, but replaces all layers of that last name.
            model.blocks[0].proj_out = nn.Sequential(OrderedDict(kept=nn.ModuleDict({"proj_out": nn.Linear(64, 64)})))
            model._keep_in_fp32_modules = ("kept",)
        report = inspect(of_diffusers(model), QuantSpec(weights="int4"), target="diffusers")
        assert all(row.weights is None for name, row in rows(report).items() if name.endswith("proj_out"))
        assert "which must stay float" in "\n".join(row.reason for row in report.layers)
        assert any(
            "layers called 'proj_out'" in note and "% of linear weights) stay float" in note for note in report.notes
        )

    def test_a_model_without_collisions_has_no_notes(self) -> None:
        assert inspect(of_diffusers(Net()), QuantSpec(), target="diffusers").notes == ()

    def test_a_name_that_the_loader_never_quantizes(self) -> None:
        model = KeepingNet()
        model._keep_in_fp32_modules = ("to_q",)
        report = rows(inspect(of_diffusers(model), QuantSpec(dtype="float32"), target="diffusers"))
        assert {name for name, row in report.items() if row.weights is None} == {"blocks.0.to_q", "blocks.1.to_q"}
        assert report["blocks.0.to_q"].reason == "the loader never quantizes layers called 'to_q' in a KeepingNet"

    def test_every_name_of_a_shared_layer_counts(self) -> None:
        model = Net()
        model.extra = model.blocks[0].to_k = nn.Linear(64, 64)  # type: ignore[assignment]
        model.blocks[1].extra = nn.Linear(64, 64)  # type: ignore[assignment]
        report = rows(inspect(of_diffusers(model), QuantSpec(), target="diffusers"))
        assert report["blocks.1.extra"].weights is None
        assert "shares its last name 'extra'" in report["blocks.1.extra"].reason


class TestSensitiveLayers:
    """With quantized activations the layers around the blocks of a diffusion transformer stay float by default."""

    @pytest.mark.parametrize("activations", [None, "int8"])
    def test_only_with_activations_and_only_in_diffusers(self, activations: str | None) -> None:
        spec = QuantSpec.model_validate({"activations": activations})
        assert rows(inspect(Net(), spec))["proj_out"].weights == "int8"
        row = rows(inspect(of_diffusers(Net()), spec))["proj_out"]
        if activations is None:
            assert row.weights == "int8"
        else:
            assert row.weights is None
            assert row.reason == (
                "sensitive with quantized activations (outside the blocks), float by default (include it by name to "
                "quantize it)"
            )

    @pytest.mark.parametrize("spec", [{"include": ("*",)}, {"overrides": {"proj_out": "int8"}}], ids=str)
    def test_naming_it_quantizes_it(self, spec: dict[str, object]) -> None:
        named = QuantSpec.model_validate({"activations": "int8", **spec})
        row = rows(inspect(of_diffusers(Net()), named))["proj_out"]
        assert (row.weights, row.activations) == ("int8", "int8")


def test_nearly_all_of_a_default_flux_is_quantized() -> None:
    """12 billion parameters, on the meta device."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    for weights in WEIGHT_TYPES:
        report = inspect(model, QuantSpec.model_validate({"weights": weights}), target="diffusers")
        assert report.linear_share >= 0.95
        assert report.linear_share == 1.0  # as measured: none is a hazard, and no last name collides
