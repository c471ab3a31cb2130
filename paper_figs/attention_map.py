#!/usr/bin/env python3
"""Draws attention_map.png and .svg from attention_map.csv: after the paper's Figs 2 and 3, for one head a
layer the true block-averaged attention map, the predicted mask, and what lambda dropped of it."""
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "sparge"
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch

HERE = Path(__file__).resolve().parent
SKIPPED, KEPT, DROPPED = "#e9e5dc", "#33265c", "#f28e2b"


def read_maps(path):
    """{(layer, head): (mass, kept, pv_done)}, each [nq, nk]; NaN where no row may see any key."""
    rows = defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(file):
            rows[int(row["layer"]), int(row["head"])].append(
                (int(row["q_block"]), int(row["k_block"]), float(row["mass"]), float(row["kept"]), float(row["pv_done"])))
    maps = {}
    for head, entries in rows.items():
        i, j, *values = np.array(entries).T
        i, j = i.astype(int), j.astype(int)
        maps[head] = np.full((3, i.max() + 1, j.max() + 1), np.nan)
        maps[head][:, i, j] = values
    return maps


def shares(mass, kept, done):
    """Share of visible blocks skipped by the mask, share of P.V dropped by lambda, attention mass kept."""
    seen = ~np.isnan(mass)
    return (1 - kept[seen].mean(), (kept - done)[seen].mean(), np.nansum(mass * kept) / np.nansum(mass))


def main():
    maps = read_maps(HERE / "attention_map.csv")
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9,
                         "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(len(maps), 3, figsize=(10, 3.3 * len(maps)), sharex=True, sharey=True,
                                squeeze=False, layout="constrained")
    for (true, mask, drop), ((layer, head), (mass, kept, done)) in zip(axes, maps.items()):
        skipped, dropped, held = shares(mass, kept, done)
        look = {"aspect": "auto", "interpolation": "nearest", "extent": (0, mass.shape[1], mass.shape[0], 0)}

        image = true.imshow(mass, cmap="magma_r", norm=LogNorm(1e-4, 1), **look)
        true.set_title(f"Layer {layer}, head {head}: attention")
        true.set_ylabel("query block (128 tokens)")

        mask.imshow(kept, cmap=ListedColormap([SKIPPED, KEPT]), vmin=0, vmax=1, **look)
        mask.set_title(f"Mask: {skipped:.0%} skipped, {held:.1%} of attention kept")

        drop.imshow(kept, cmap=ListedColormap([SKIPPED, KEPT]), vmin=0, vmax=1, **look)
        share = np.nan_to_num(kept - done)
        drop.imshow(np.ones_like(share), alpha=share, cmap=ListedColormap([DROPPED]), **look)
        drop.set_title(f"Lambda drops P·V of another {dropped:.1%}")
    for axis in axes[-1]:
        axis.set_xlabel("key block (64 tokens)")
    figure.colorbar(image, ax=axes[:, 0], location="bottom", fraction=0.03, pad=0.01, extend="min",
                    label="attention of a query block to a key block")
    figure.legend(handles=[Patch(color=KEPT, label="computed"), Patch(color=DROPPED, label="P·V dropped by lambda"),
                           Patch(color=SKIPPED, label="skipped by the mask")],
                  loc="lower right", bbox_to_anchor=(0.97, 0.012), ncols=3, frameon=False)
    figure.savefig(HERE / "attention_map.png", dpi=150, metadata={"Software": None})
    figure.savefig(HERE / "attention_map.svg", metadata={"Date": None})
    print(f"wrote paper_figs/attention_map.png and .svg ({len(maps)} heads)")


if __name__ == "__main__":
    main()
