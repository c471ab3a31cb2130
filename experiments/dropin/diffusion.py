#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""diffusion.py: diffusers' pipelines with SpargeAttn in their transformers, beside their own
attention: python experiments/dropin/diffusion.py [--check]

The pipelines are CogVideoX's and Flux's, small and of random weights: heads of 64 and 128 channels,
text and pixels in one sequence, four steps from noise to latents; there is no text encoder and no
VAE. Random projections would attend to everything alike, so keys are made as queries are, with
biases: what RoPE then makes of them is attention that falls with distance. One run has thresholds
that the tuner found for each layer.

outputs.csv has how far the latents are from those of diffusers' own attention, the largest and the
mean difference relative to the same of its values; with dense attention in float32 the largest must
be at most 1e-4. diffusion.csv has what was computed in each step and layer.

--check writes nothing, and compares with the committed files: every machine multiplies in an order
of its own, so a mask may differ in some blocks (0.02 of sparsity), and the latents with it.
"""
import argparse
import contextlib
import csv
import io
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file

import sparge.diffusers
from sparge.capture import Recorder

HERE = Path(__file__).parent
STEPS = 4
BOUND = 1e-4  # of dense attention in float32
L1, L2 = 0.05, 0.06  # bounds of tuning: the paper's for video
DENSE = dict(topk=1.0, qk_dtype="f32", pv_dtype="f32")
RUNS = {"dense f32": DENSE, "dense int8": dict(topk=1.0), "tau 0.9": dict(theta=0.3, tau=0.9),
        "tau 0.95, then 0.8": dict(theta=0.3, tau=lambda layer, step: 0.95 if step < 2 else 0.8)}


# ---- Pipelines --------------------------------------------------------------------------------


def local(model):
    """A model whose attention falls with distance, and matters to what it gives."""
    for module in model.modules():
        for query, key, value in (("to_q", "to_k", "to_v"),
                                  ("add_q_proj", "add_k_proj", "add_v_proj")):
            if getattr(module, query, None) is not None:
                torch.nn.init.normal_(getattr(module, query).bias, std=2)
                getattr(module, key).load_state_dict(getattr(module, query).state_dict())
                torch.nn.init.normal_(getattr(module, value).weight, std=0.2)
        for norm in "norm_q", "norm_k", "norm_added_q", "norm_added_k":
            if getattr(module, norm, None) is not None:
                torch.nn.init.constant_(getattr(module, norm).weight, 1.5)
    return model.eval()


def cogvideox(layers=3, frames=17, height=160, width=224, text=226):
    """A pipeline of CogVideoX, and what to call it with. Each 8 x 8 pixels of four frames are a
    latent, and 2 x 2 of those a token."""
    torch.manual_seed(0)
    model = local(CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, num_layers=layers, time_embed_dim=64,
        text_embed_dim=64, max_text_seq_length=text, sample_frames=frames,
        sample_height=height // 8, sample_width=width // 8, use_rotary_positional_embeddings=True))
    prompt = torch.randn(1, text, 64)
    pipe = CogVideoXPipeline(None, None, None, model, CogVideoXDDIMScheduler())
    return pipe, dict(prompt_embeds=prompt, negative_prompt_embeds=torch.zeros_like(prompt),
                      num_frames=frames, height=height, width=width)


def flux(layers=1, single_layers=2, height=512, width=512, text=256):
    """A pipeline of Flux, and what to call it with. Each 16 x 16 pixels are a token."""
    torch.manual_seed(0)
    model = local(FluxTransformer2DModel(
        num_attention_heads=2, attention_head_dim=128, num_layers=layers,
        num_single_layers=single_layers, joint_attention_dim=64, pooled_projection_dim=64))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    return pipe, dict(prompt_embeds=torch.randn(1, text, 64),
                      pooled_prompt_embeds=torch.randn(1, 64), height=height, width=width)


MODELS = {"cogvideox": cogvideox, "flux": flux}


def latents(pipe, arguments, steps=STEPS, seed=1):
    """What a pipeline makes of noise."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(**arguments, num_inference_steps=steps, output_type="latent",
                generator=torch.Generator().manual_seed(seed))[0]


def tuned(pipe, arguments):
    """Thresholds of each layer's heads, from the q, k and v of a step from other noise."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        with Recorder(pipe.transformer, folder, name="random", steps=[2]):
            latents(pipe, arguments, seed=2)
        files = map(load_file, sorted(Path(folder).glob("*/*.safetensors")))  # layer by layer
        return [sparge.tune([(x["q"], x["k"], x["v"])], l1=L1, l2=L2).thresholds for x in files]


# ---- The tables -------------------------------------------------------------------------------


def measure():
    """Lines of outputs.csv and of diffusion.csv."""
    outputs, calls = [], []
    for name, build in MODELS.items():
        pipe, arguments = build()
        own = latents(pipe, arguments)
        layers = tuned(pipe, arguments)
        runs = {**RUNS, f"tuned at {L1}, {L2}": dict(params=lambda layer, step: layers[layer])}
        for run, options in runs.items():
            with sparge.diffusers.attention(pipe.transformer, **options) as made:
                ours = latents(pipe, arguments)
            outputs.append(difference(name, run, ours, own))
            if not run.startswith("dense"):
                calls += [dict(model=name, run=run, step=c.step, layer=c.layer, module=c.module,
                               tokens=c.queries, density=round(c.density, 4),
                               sparsity=round(c.sparsity, 4)) for c in made]
    sparge.diffusers.register(**DENSE)  # of the pipeline that is the last
    pipe.transformer.set_attention_backend("sparge")
    outputs.append(difference(name, "dense f32, by name", latents(pipe, arguments), own))
    return outputs, calls


def difference(model, run, ours, own):
    """A line of outputs.csv."""
    error = (ours - own).abs()
    return dict(model=model, run=run, largest=f"{error.max() / own.abs().max():.1e}",
                mean=f"{error.mean() / own.abs().mean():.1e}")


def missed(outputs, calls):
    """What is not as it must be, in sentences."""
    for line in outputs:
        if line["run"].startswith("dense f32") and not float(line["largest"]) <= BOUND:
            yield f"{line['model']}, {line['run']}: the latents differ by {line['largest']}"
    known = list(csv.DictReader((HERE / "diffusion.csv").open()))
    if len(known) != len(calls):
        yield f"there are {len(calls)} calls, not {len(known)}"
    for line, was in zip(calls, known):
        same = all(str(line[key]) == was[key] for key in ("model", "run", "step", "layer", "module",
                                                          "tokens"))
        if not same or not abs(line["sparsity"] - float(was["sparsity"])) <= 0.02:
            yield f"{line} was {was}"


def write(path, lines):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, lines[0], lineterminator="\n")
        table.writeheader()
        table.writerows(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed files")
    arguments = parser.parse_args()
    warnings.simplefilter("error", UserWarning)  # nothing may be left to diffusers
    outputs, calls = measure()
    for line in outputs:
        print(*(f"{x:20}" for x in line.values()), flush=True)
    if not arguments.check:
        write(HERE / "outputs.csv", outputs)
        write(HERE / "diffusion.csv", calls)
    wrong = list(missed(outputs, calls))
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
