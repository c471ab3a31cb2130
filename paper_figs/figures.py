#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of this folder, as PNG and SVG, out of experiments/*/out.csv and
experiments/paper.csv alone.

    figures.py [NAME...]                             some of them, or all; NAME is that of the file
    figures.py fig14 ... --csv MINE.csv --to FOLDER
                                                     the same of rows of your captures
"""
import argparse
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

# first: it finds experiments/
from rows import EXPERIMENTS, HERE, column, grouped, of_item, read_csv
from harness import run_main, writing

GIVEN = None  # rows of the user's
INK, ACCENT, PALE, PAPER, OTHER = "#33265c", "#f28e2b", "#e9e5dc", "#8a8a8a", "#2a8f8a"
HALF = "#925a44"  # between INK and ACCENT
matplotlib.rcParams.update({
    "svg.hashsalt": "sparge", "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.constrained_layout.use": True
})


def paper(item, **where):
    """The paper's numbers: {(row, column): value}."""
    return {(r["row"], r["column"]): float(r["value"]) for r in read_csv(EXPERIMENTS / "paper.csv")
            if r["item"] == item and all(r[k] == v for k, v in where.items())}


# ---- Maps of attention ------------------------------------------------------------------------

LOOK = {"aspect": "auto", "interpolation": "nearest"}


def maps_of(source):
    """{(layer, head): (mass, kept, pv_done)}, each [query blocks, key blocks]; NaN where no row may
    see any key."""
    maps = {}
    for (layer, head), rows in grouped([r for r in of_item("fig2") if r["source"] == source],
                                       "layer", "head").items():
        i, j = column(rows, "q_block").astype(int), column(rows, "k_block").astype(int)
        maps[layer, head] = np.full((3, i.max() + 1, j.max() + 1), np.nan)
        maps[layer, head][:, i, j] = [column(rows, name) for name in ("mass", "kept", "pv_done")]
    return maps


def shares(mass, kept, done):
    """Share of visible blocks skipped by the mask, share of P.V dropped by lambda, attention mass
    kept."""
    seen = ~np.isnan(mass)
    return 1 - kept[seen].mean(), (kept -
                                   done)[seen].mean(), np.nansum(mass * kept) / np.nansum(mass)


def attention_map():
    """Three heads of the language model: what attention is, what the mask keeps, what lambda drops
    of it."""
    maps = maps_of("smollm2")
    figure, axes = plt.subplots(len(maps), 3, figsize=(10, 3.3 * len(maps)), sharex=True,
                                sharey=True, squeeze=False)
    for (true, mask, drop), ((layer, head), (mass, kept, done)) in zip(axes, maps.items()):
        skipped, dropped, held = shares(mass, kept, done)
        look = LOOK | {"extent": (0, mass.shape[1], mass.shape[0], 0)}
        image = true.imshow(mass, cmap="magma_r", norm=LogNorm(1e-4, 1), **look)
        true.set_title(f"Layer {layer}, head {head}: attention")
        true.set_ylabel("query block (128 tokens)")
        mask.imshow(kept, cmap=ListedColormap([PALE, INK]), vmin=0, vmax=1, **look)
        mask.set_title(f"Mask: {skipped:.0%} skipped, {held:.1%} of attention kept")
        drop.imshow(kept, cmap=ListedColormap([PALE, INK]), vmin=0, vmax=1, **look)
        share = np.nan_to_num(kept - done)
        drop.imshow(np.ones_like(share), alpha=share, cmap=ListedColormap([ACCENT]), **look)
        drop.set_title(f"Lambda drops P·V of another {dropped:.1%}")
    for axis in axes[-1]:
        axis.set_xlabel("key block (64 tokens)")
    figure.colorbar(image, ax=axes[:, 0], location="bottom", fraction=0.03, pad=0.01, extend="min",
                    label="attention of a query block to a key block")
    figure.legend(
        handles=[
            Patch(color=INK, label="computed"),
            Patch(color=ACCENT, label="P·V dropped by lambda"),
            Patch(color=HALF, label="dropped in part"),
            Patch(color=PALE, label="skipped by the mask")
        ], loc="lower right", bbox_to_anchor=(0.99, 0.012), ncols=2)
    return figure


def fig2():
    """Attention of single heads, of the language model and of the video model."""
    sources = {
        "smollm2": "SmolLM2-135M, 4096 tokens, causal", "video": "video model, 13 x 14 x 20 tokens"
    }
    found = {source: maps_of(source) for source in sources}
    wide = max(len(maps) for maps in found.values())
    rows = [source for source in sources if found[source]]
    figure, axes = plt.subplots(len(rows), wide, figsize=(3.2 * wide, 3.1 * len(rows)),
                                squeeze=False)
    for line, source in zip(axes, rows):
        for axis in line[len(found[source]):]:
            axis.axis("off")
        for axis, ((layer, head), (mass, _, _)) in zip(line, found[source].items()):
            image = axis.imshow(mass, cmap="magma_r", norm=LogNorm(1e-4, 1), **LOOK)
            axis.set_title(f"{sources[source]}\nlayer {layer}, head {head}")
        line[0].set_ylabel("query block")
    for axis in axes[-1]:
        axis.set_xlabel("key block")
    figure.colorbar(image, ax=axes, fraction=0.02, extend="min",
                    label="attention of a query block to a key block")
    return figure


def fig3():
    """The workflow on the paper's toy, every stage from the program."""
    stage = grouped(of_item("fig3"), "stage")
    titles = {"P of the paper": "Pooled attention, made to be\nthe paper's",
              "P": "P as predicted: a key block that is\nnot self-similar is left out",
              "mask": "Mask: its column, and the row of Q3,\nare set to 1",
              "P.V computed": "P·V computed: lambda drops what\nlies far below the maximum"}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3))
    names = {kind: column(stage[(f"similarity of {kind}",)], "value") for kind in "qk"}
    for axis, (name, title) in zip(axes, titles.items()):
        rows = stage[(name,)]
        shape = int(column(rows, "q_block").max()) + 1, int(column(rows, "k_block").max()) + 1
        image = column(rows, "value").reshape(shape)
        axis.imshow(image, cmap="Purples", vmin=0, vmax=1.2, interpolation="nearest")
        for i, j in np.ndindex(shape):
            axis.text(j, i, f"{round(image[i, j], 2):g}", ha="center", va="center",
                      color="white" if image[i, j] > 0.6 else INK)
        axis.set_xticks(range(shape[1]), [f"K{j + 1}\n{s:.2f}" for j, s in enumerate(names["k"])])
        axis.set_yticks(range(shape[0]), [f"Q{i + 1} {s:.2f}" for i, s in enumerate(names["q"])])
        axis.tick_params(length=0)
        axis.set_title(title)
    axes[0].set_xlabel("beside the names: self-similarity of each block", loc="left")
    return figure


def fig4():
    """128 tokens of q and of k, channel by channel."""
    found = grouped(of_item("fig4"), "capture", "tensor")
    captures = list(dict.fromkeys(name for name, _ in found))
    figure, axes = plt.subplots(2, len(captures), figsize=(3.4 * len(captures), 6), sharex=True,
                                sharey=True)
    for line, tensor in zip(axes, "qk"):
        for axis, capture in zip(line, captures):
            rows = found[capture, tensor]
            image = np.array([[
                float(x) for name, x in row.items() if name.startswith("c") and name[1:].isdigit()
            ] for row in rows])
            bound = np.abs(image).max()
            shown = axis.imshow(image, cmap="RdBu_r", vmin=-bound, vmax=bound, **LOOK)
            layer, group = capture.replace("layer", "").split("_group")
            axis.set_title(f"{tensor} of layer {int(layer)}, key head {group}")
            figure.colorbar(shown, ax=axis, fraction=0.05)
        line[0].set_ylabel("token")
    for axis in axes[-1]:
        axis.set_xlabel("channel")
    return figure


def fig5():
    """Five orders of a grid of 1 x 6 x 6, four tokens a block."""
    found = grouped(of_item("fig5"), "order")
    figure, axes = plt.subplots(1, len(found), figsize=(11, 2.5))
    for axis, ((order,), rows) in zip(axes, found.items()):
        h, w, block = (column(rows, name) for name in ("h", "w", "block"))
        axis.plot(w, h, color=INK, linewidth=1, zorder=1)
        axis.scatter(w, h, c=block, cmap="viridis", s=110, zorder=2)
        axis.scatter(w[:1], h[:1], s=210, facecolors="none", edgecolors=INK, zorder=3)
        for x, y, n in zip(w, h, block.astype(int)):
            axis.text(x, y, str(n), fontsize=6, ha="center", va="center_baseline", zorder=4,
                      color="white" if n < 5 else INK)
        axis.set(title=order, xticks=[], yticks=[], xlim=(-0.6, 5.6), ylim=(5.6, -0.6),
                 aspect="equal")
        axis.spines[:].set_visible(False)
    return figure


# ---- Speed and sparsity -----------------------------------------------------------------------

def table3():
    """What prediction costs beside dense attention, ours and the paper's."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    colors = {"normal": OTHER, "topics": INK}
    for (inputs,), rows in grouped(of_item("table3"), "inputs").items():
        for name, style in (("f32", "-"), ("int8", "--")):
            axis.plot(column(rows, "tokens"), 100 * column(rows, f"overhead_{name}"), style,
                      marker="o", markersize=4, color=colors[inputs],
                      label=f"CPU, {inputs} inputs, of dense {name}")
    theirs = {
        float(row): value for (row, name), value in paper("table3").items() if name == "overhead"
    }
    axis.plot(theirs.keys(), theirs.values(), color=PAPER, marker="s", markersize=4,
              label="the paper: RTX 4090, of FlashAttention-2")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="prediction, % of dense attention")
    axis.set_xticks([8192 << n for n in range(5)], [f"{8 << n}K" for n in range(5)])
    axis.minorticks_off()
    axis.set_yticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
    axis.legend(fontsize=8)
    return figure


def gpu_speeds():
    """{label: (sparsities, speeds over dense)} of the highest kernel, if on_gpu.sh has been run."""
    path = HERE.parent / "gpu/results/results.csv"
    if not path.exists():
        return {}
    rows = [r for r in read_csv(path) if (r["dim"], r["causal"]) == ("128", "none") and r["kernel"]]
    lines = {}
    for (kernel, dtypes), found in grouped(rows, "kernel", "dtypes").items():
        if kernel != max(r["kernel"] for r in rows):
            continue
        n = max(int(r["n"]) for r in found if r["mask"] == "random")
        here = [r for r in found if int(r["n"]) == n]
        dense = np.median(column([r for r in here if r["mask"] == "dense"], "ms"))
        masked = sorted((r for r in here if r["mask"] == "random"),
                        key=lambda r: float(r["sparsity"]))
        lines[f"GPU, kernel {kernel}, {dtypes}, {n} tokens"] = column(
            masked, "sparsity"), dense / column(masked, "ms")
    return lines


def fig10():
    """Speed over dense attention of the same kernel, by sparsity."""
    figure, axis = plt.subplots(figsize=(6.4, 4))
    share = np.linspace(0, 0.9, 50)
    axis.plot(share, 1 / (1 - share), ":", color="black", linewidth=1,
              label="ideal: 1 / (1 - sparsity)")
    styles = {
        "random": ("o", INK, "CPU, imposed at random"), "banded": ("s", OTHER, "CPU, imposed band"),
        "predicted": ("D", ACCENT, "CPU, predicted, with its prediction"), "torch":
        ("x", "#b0413e", "CPU, FlexAttention of torch, f32")
    }
    for (mask,), rows in grouped(of_item("fig10"), "mask").items():
        rows = [r for r in rows if float(r["sparsity"]) > 0]
        marker, color, label = styles[mask]
        dense = column(rows, "ms_dense_f32" if mask == "torch" else "ms_dense_int8")
        axis.plot(column(rows, "sparsity"), dense / column(rows, "ms"), marker=marker, markersize=4,
                  color=color, label=label)
    for (label, line), color in zip(gpu_speeds().items(), ("#6a8d3a", "#3a6a8d")):
        axis.plot(*line, marker="^", markersize=4, color=color, label=label)
    found = paper("fig10", setting="RTX4090, 22K tokens, 128 channels")
    for name, dense in (("SpargeAttn+Sage", "SageAttn (dense)"), ("SpargeAttn+FA2",
                                                                  "FlashAttn (dense FA2)")):
        points = sorted((float(at), value) for (row, at), value in found.items() if row == name)
        base = next(value for (row, _), value in found.items() if row == dense)
        axis.plot(*zip(*((s, value / base) for s, value in points)), color=PAPER,
                  linestyle="--" if "FA2" in name else "-",
                  label=f"the paper: {name} over {dense.split()[0]}, RTX 4090")
    axis.set(xlabel="sparsity", ylabel="speed over dense attention by the same kernel",
             yscale="log")
    axis.set_yticks([1, 2, 4, 8], ["1x", "2x", "4x", "8x"])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure


def table7():
    """Sparsity by length at a constant bound on the error."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for ((text,), rows), color in zip(grouped(GIVEN or of_item("table7"), "text").items(),
                                      cycle((ACCENT, INK, OTHER, "#b0413e", "#6a8d3a"))):
        label = "nine heads, committed capture" if text == "committed" else f"all heads, {text}"
        axis.plot(column(rows, "tokens"), column(rows, "sparsity"), marker="o", markersize=4,
                  color=color, label=label)
    theirs = {float(row): value / 100 for (row, _), value in paper("table7").items()}
    axis.plot(theirs.keys(), theirs.values(), color=PAPER, marker="s", markersize=4,
              label="the paper: Llama3.1-8B")
    axis.set(xscale="log", xlabel="tokens", ylabel="sparsity", ylim=(0, 1),
             title="" if GIVEN else "SmolLM2-135M, a substitute")
    axis.set_xticks([1024 << n for n in range(8)], [f"{1 << n}K" for n in range(8)])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="upper right")
    return figure


def fig9():
    """Needles found, by depth and length."""
    every = of_item("fig9")
    found = grouped(every, "attention")
    tokens, depths = (sorted({float(r[key]) for r in every}) for key in ("tokens", "depth"))
    figure, axes = plt.subplots(1, len(found), figsize=(2.3 * len(found), 2.7), sharey=True)
    for axis, ((name,), rows) in zip(axes, found.items()):
        score = np.full((len(depths), len(tokens)), np.nan)
        for r in rows:
            score[depths.index(float(r["depth"])),
                  tokens.index(float(r["tokens"]))] = int(r["found"]) / int(r["needles"])
        axis.patch.set(hatch="////", facecolor="white",
                       edgecolor=PAPER)  # shows where there is no image
        image = axis.imshow(score, cmap="cividis", vmin=0, vmax=1, **LOOK)
        for i, j in np.argwhere(~np.isnan(score)):
            axis.text(j, i, f"{100 * score[i, j]:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if score[i, j] < 0.6 else INK)
        axis.set_xticks(range(len(tokens)), [f"{int(n) // 1024}K" for n in tokens])
        axis.set_title(name.replace("SpargeAttn, ", "SpargeAttn,\n").replace("dense, ", "dense,\n"))
        axis.set_xlabel("tokens")
    axes[0].set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes, fraction=0.02, label="share found", format=PercentFormatter(1))
    figure.legend(
        handles=[Patch(facecolor="white", edgecolor=PAPER, hatch="////", label="not run")],
        loc="outside lower right")
    return figure


# ---- By layer, step, sample and head ----------------------------------------------------------

def whole():
    """All but those of the small captures."""
    return GIVEN or [r for r in of_item("fig14") if r["source"] != "committed"]


def bars(number, key, title, rows):
    figure, axis = plt.subplots(figsize=(6, 2.8))
    found = grouped(rows, key)
    names = sorted((name for name, in found), key=lambda name: (len(name), name))
    axis.bar(range(len(names)), [column(found[name, ], "sparsity").mean() for name in names],
             color=INK, width=0.7)
    for n, name in enumerate(names):
        spread = column(found[name,], "sparsity")
        axis.plot([n, n],
                  [np.percentile(spread, 10), np.percentile(spread, 90)], color=ACCENT, linewidth=2)
    axis.axhline(column(rows, "sparsity").mean(), color=PAPER, linestyle=":", linewidth=1)
    axis.set_xticks(range(len(names)), names)
    axis.set(xlabel=title, ylabel="sparsity", ylim=(0, 1))
    axis.set_title(f"Fig {number}, by {title}: mean, 10th to 90th percentile, mean of all (dotted)")
    return figure


def fig14():
    """By layer."""
    return bars(14, "layer", "layer", whole())


def fig15():
    """By denoising step."""
    return bars(15, "step", "denoising step", whole())


def fig16():
    """By sample."""
    return bars(16, "sample", "sample", whole())


def fig17():
    """By head, layer by layer."""
    found = grouped(whole(), "layer", "head")
    layers, heads = (sorted({int(at[n]) for at in found}) for n in (0, 1))
    image = np.full((len(layers), len(heads)),
                    np.nan)  # captures may have other heads in other layers
    for (layer, head), rows in found.items():
        image[layers.index(int(layer)), heads.index(int(head))] = column(rows, "sparsity").mean()
    figure, axis = plt.subplots(figsize=(1.5 + 0.9 * len(heads), 1.2 + 0.45 * len(layers)))
    shown = axis.imshow(image, cmap="Purples", vmin=0, vmax=1, **LOOK)
    for i, j in np.argwhere(~np.isnan(image)):
        axis.text(j, i, f"{image[i, j]:.2f}", ha="center", va="center",
                  color="white" if image[i, j] > 0.5 else INK)
    axis.set_xticks(range(len(heads)), heads)
    axis.set_yticks(range(len(layers)), layers)
    axis.set(xlabel="head", ylabel="layer", title="Fig 17, by head: mean")
    figure.colorbar(shown, ax=axis, fraction=0.06, label="sparsity")
    return figure


# ---- Beyond the paper -------------------------------------------------------------------------

def submass():
    """What each way to choose blocks loses: by density at one length, and by length at one
    setting."""
    rows = [r for r in of_item("submass") if not r["lambda"]]
    colors = dict(zip(dict.fromkeys(r["rule"] for r in rows if r["rule"] != "dense, f32"),
                      ("black", PAPER, "#b0413e", ACCENT, OTHER, INK, HALF)))
    lines = {"128x64": "-", "64x64": "--", "64x32": "-.", "64x16": ":"}
    panels = [("kl", "density", "KL from dense f32, 0.01 nat for each token"),
              ("change", "density", "perplexity, % over dense f32"),
              ("kl", "tokens", "KL, the settings of half density")]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for axis, (key, by, label) in zip(axes, panels):
        for (rule, blocks), found in grouped(rows, "rule", "blocks").items():
            if by == "density":
                found = [r for r in found if r["tokens"] == "4096"]
            else:
                found = [r for r in found if r["wanted"] in ("", "0.5") and blocks == "128x64"]
            if rule in colors and found:
                style = {"marker": "o" if found[0]["wanted"] else "D", "markersize": 4,
                         "linestyle": lines[blocks]}
                axis.plot(column(found, by), 100 * column(found, key), color=colors[rule],
                          label=f"{rule}, {blocks}", **style)
        axis.set(xlabel=by, ylabel=label)
    for axis in axes[0], axes[2]:
        axis.set_yscale("log")
    axes[1].set_yscale("symlog", linthresh=1)
    axes[2].set_xscale("log")
    axes[2].set_xticks([1024 << n for n in range(4)], [f"{1 << n}K" for n in range(4)])
    losses = 0.2, 0.5, 1, 2, 5, 10, 20, 50
    for axis, ticks in zip(axes, (losses, (-0.5, 0, 0.5, *losses[2:-1]), losses)):
        axis.set_yticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
    labels = {line.get_label(): line for axis in axes for line in axis.lines}
    figure.legend(handles=labels.values(), fontsize=7, ncols=4, handlelength=4,
                  loc="outside lower center")
    return figure


BORDERS = {"random": ("black", "--"), "window": (PAPER, "--"), "oracle_mass": ("black", "-."),
           "oracle_mass_t": ("black", "-"), "oracle_pairs": ("black", ":")}


def frontier():
    """The error of heads, and what a model loses, by density: a line for each method, and between
    which lines they lie."""
    rows = [r for r in of_item("frontier") if r["asked"] and not ("theta=" in r["method"] and
                                                                   "theta=-1" not in r["method"])]
    losses = [r for r in read_csv(EXPERIMENTS / "frontier/ppl.csv") if r["tokens"] == "4096"]
    names = [name for name in dict.fromkeys(r["method"] for r in rows) if name not in BORDERS]
    looks = {name: {"color": plt.cm.tab20(n % 20), "linestyle": "-" if n < 20 else "--"}
             for n, name in enumerate(names)}
    looks |= {name: dict(zip(("color", "linestyle"), look)) for name, look in BORDERS.items()}
    panels = [("heads of text and code", ("text", "code")), ("heads of video", ("video", ))]
    figure, axes = plt.subplots(1, 3, figsize=(13, 5.6))
    for axis, (title, inputs) in zip(axes, panels):
        for (name, ), found in grouped([r for r in rows if r["input"] in inputs],
                                       "method").items():
            by = [(float(asked), column(some, "l1").mean()) for (asked, ), some in
                  grouped([r for r in found if r["reached"] == "1"], "asked").items()]
            if by:
                axis.plot(*zip(*by), marker=".", label=name, **looks[name])
        axis.set(xlabel="density", ylabel="relative L1, mean of the heads", title=title)
    for (name, ), found in grouped([r for r in losses if r["asked"]], "method").items():
        by = [(float(asked), 100 * column(some, "kl").mean())
              for (asked, ), some in grouped(found, "asked").items()]
        if name in looks:
            axes[2].plot(*zip(*sorted(by)), marker=".", label=name, **looks[name])
    axes[2].set(xlabel="density", ylabel="KL from dense f32, 0.01 nat for each token",
                title="SmolLM2, two texts")
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xticks([0.1, 0.2, 0.3, 0.5])
    labels = {line.get_label(): line for axis in axes for line in axis.lines}
    figure.legend(handles=labels.values(), fontsize=7, ncols=7, handlelength=3,
                  loc="outside lower center")
    return figure


FIGURES = {
    f.__name__: f for f in (attention_map, fig2, fig3, fig4, fig5, table3, fig9, fig10, table7,
                            fig14, fig15, fig16, fig17, submass, frontier)
}

OF_CAPTURES = {"table7": {"text", "tokens", "sparsity"}
               } | {  # and the columns that they are drawn from
                   name: {"sample", "layer", "step", "head", "sparsity"}
                   for name in ("fig14", "fig15", "fig16", "fig17")
               }


def given(path, names, error):
    """Rows of the user's, if all of these figures can be drawn from them."""
    if not names or not set(names) <= set(OF_CAPTURES):
        error(f"of rows of yours there are {', '.join(OF_CAPTURES)}")
    rows = read_csv(path)
    for name in names:
        if not rows or not OF_CAPTURES[name] <= rows[0].keys():
            error(
                f"{path} has no rows with {', '.join(sorted(OF_CAPTURES[name]))}, as {name} needs "
                "them"
            )
    return rows


def draw(names, to):
    to.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name in names:
        try:
            figure = FIGURES[name]()
        except FileNotFoundError as missing:
            print(f"{name}: not drawn, {missing.filename} is not there")
            continue
        for kind, how in ("png", {"dpi": 150, "metadata":
                                  {"Software": None}}), ("svg", {"metadata": {"Date": None}}):
            with writing(to / f"{name}.{kind}", "wb") as file:
                figure.savefig(file, format=kind, **how)
        plt.close(figure)
        drawn += 1
    print(f"wrote {drawn} figures into {to.name}/")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*")
    parser.add_argument("--csv", type=Path, help="rows to draw, in place of the committed ones")
    parser.add_argument("--to", type=Path, default=HERE, help="folder of the pictures")
    args = parser.parse_args()
    if not set(args.name) <= set(FIGURES):
        parser.error(f"the figures are {', '.join(FIGURES)}")
    if args.csv and args.to == HERE:
        parser.error("--csv needs --to: the pictures here are of the committed rows")
    global GIVEN
    GIVEN = given(args.csv, args.name, parser.error) if args.csv else None
    draw(args.name or FIGURES, args.to)


if __name__ == "__main__":
    run_main(main)
