"""What a device computes in."""

import pytest
import torch

from visionmtl.ops.precision import autocast, chosen_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has_amx", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_half_precision_where_the_processor_has_units_for_it(monkeypatch, has_amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    a = torch.ones(2, 2)
    with autocast(CPU, "auto"):
        assert (a @ a).dtype == dtype


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("has_amx", [True, False])
def test_a_precision_that_is_named_is_kept(monkeypatch, name, has_amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert chosen_precision(CPU, name) == name


@pytest.mark.parametrize(("supported", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_asks_the_gpu_whether_it_computes_in_bf16_itself(monkeypatch, supported, name):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or supported)
    assert chosen_precision(torch.device("cuda"), "auto") == name
    assert asked == [{"including_emulation": False}]
