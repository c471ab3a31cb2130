# SPDX-License-Identifier: Apache-2.0
"""The Python of README.md and python/README.md runs as it is printed.

The indented texts of a page are one program, in their order. Those for models run where the
model's package is installed."""
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("torch", "transformers", "diffusers")


def programs(page, title=""):
    """The indented texts of a page, or of one of its sections, without their indentation."""
    text = (ROOT / page).read_text()
    if title:
        text = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^(?:    .*)?\n)+", text, re.M)
    return [re.sub(r"^    ", "", x, flags=re.M).strip("\n") + "\n" for x in found if x.strip()]


def package(program):
    """The package whose models a program is for, or None."""
    return next((name for name in MODELS if f"sparge.{name}" in program), None)


def runs(program, names):
    exec(compile(program, "README.md", "exec"), names)


def test_first_page(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    program, = programs("README.md", "From Python")
    assert len(program.splitlines()) == 6
    runs(program, {})
    said = capsys.readouterr().out
    assert "density 0.2219" in said and "\nok: o f16 [1, 3, 4096, 64]" in said


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The names that the programs of python/README.md make, but for those for models."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for program in programs("python/README.md"):
            if package(program) is None:
                runs(program, found)
        assert Path("params.json").exists()
    return found


def test_package(made):
    assert made["report"].ok
    assert made["o"].shape == made["q"].shape and np.isfinite(made["o"]).all()


def run_models(name, made):
    pytest.importorskip(name)
    program, = [x for x in programs("python/README.md") if package(x) == name]
    names = dict(made)
    runs(program, names)
    return names


def test_torch(made):
    found = run_models("torch", made)
    assert found["o"].shape == (1, 8, 1024, 64)
    assert len(found["record"].calls) == 1


def test_transformers(made, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    found = run_models("transformers", {**made, "path": tmp_path})
    import torch
    with torch.no_grad():
        found["model"](torch.arange(90)[None])
    assert [call.layer for call in found["record"].calls] == [0, 1]


def test_diffusers(made):
    pytest.importorskip("diffusers")
    import torch

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    class Pipe:
        transformer = Model()

        def __call__(self, prompt):
            for _ in range(3):
                self.transformer(torch.ones(1, 1, 128, 16))

    found = run_models("diffusers", {**made, "pipe": Pipe()})
    assert [bool(call.fallback) for call in found["calls"]] == [True, True, False]
