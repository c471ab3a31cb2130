# SPDX-License-Identifier: Apache-2.0
"""Pictures of attention between blocks and of masks, in the colours of `sparge map`."""
from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any, Callable, cast

import numpy as np
from numpy.typing import NDArray

from sparge._arrays import read
from sparge._check import on_host
from sparge._inspect import ask
from sparge._mask import BlockMask
from sparge._optional import optional
from sparge._options import DEFAULTS, Causal, Options, prepare, takes_options
from sparge._plan import Plan
from sparge._report import Report

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["plot"]

# As tools/picture.c has them: seaborn's rocket (Waskom), dark at 1, and what a mask's blocks are.
# No pair of them is told apart by red and green alone.
HEAT = ("#faebdd", "#f6b48e", "#f37651", "#e13342", "#ad1759", "#701f57", "#35193e", "#03051a")
KEPT, SKIPPED, INVISIBLE, NAN = "#33265c", "#f6efe6", "#d9dbe2", "#18a7a0"
IN_PART, MISSING, EXTRA, EDGE = "#925b45", "#f0902e", "#5aa9e6", "#73737e"
PANELS = ("attention", "mask", "dropped", "predicted")


@takes_options
def plot(what: Any, *, head: int = 0, batch: int = 0, panels: Any = None, ax: Any = None,
         q: Any = None, k: Any = None, **options: Unpack[Options]) -> Any:
    """Draws one head of a mask: which blocks it keeps, of how much attention, and what it drops.

        sparge.plot(mask, q=q, k=k).savefig("mask.png")
        sparge.plot(sparge.check(o, q, k, v, mask=mask), head=3)

    what    a BlockMask, a Plan that has a mask, or the Report of check()
    head, batch  of what to draw
    panels  which pictures: "attention": of a query block to a key block, the mean over its rows, on
            a logarithmic scale; "mask"; "dropped": the attention to blocks that are not kept;
            "predicted" (of a Report): the blocks by which the mask and the predicted one differ.
            None: all that are known, or with `ax` the mask alone
    ax      the axes to draw on, one or a list of one for each panel; None: a new figure
    q, k    as attention() takes them, all heads: where they are given with a mask the attention
            of the head is computed, in double; time grows as Nq * Nk. A Report has it
    options softmax_scale, k_bias and layout of q and k

    Returns the Figure of matplotlib: .savefig() writes it, and a notebook shows it. It is not one
    of pyplot's. ImportError where matplotlib is not installed.
    """
    optional("matplotlib", "sparge.plot()")
    what = what.mask if isinstance(what, Plan) else what
    if not isinstance(what, (BlockMask, Report)):
        raise TypeError(f"what is a {type(what).__name__}, it must be a BlockMask, a Plan or a "
                        "Report")
    report = what if isinstance(what, Report) else None
    mask: Any = report.given if report else what
    shape = report or mask._mask
    for name, n, count in (("batch", batch, shape.batch), ("head", head, shape.heads)):
        if not 0 <= n < count:
            raise ValueError(f"{name} is {n}, it must be at least 0 and below {count}")
    grid = report.block_mass.shape[-2:] if report else mask.shape[-2:]
    if 0 in grid:
        raise ValueError(f"what has {grid[0]} x {grid[1]} blocks, there is nothing to draw")
    mass: Any = None
    if report:
        mass = report.block_mass[batch, head]
    elif q is not None and k is not None:
        mass = _mass(mask, q, k, batch, head, options)
    known = {"attention": mass is not None, "mask": mask is not None,
             "dropped": mass is not None and mask is not None,
             "predicted": report is not None and mask is not None}
    if panels is None:
        panels = [name for name in PANELS if known[name]]
        if ax is not None and not isinstance(ax, (list, tuple, np.ndarray)) and known["mask"]:
            panels = ["mask"]
    panels = [panels] if isinstance(panels, str) else list(panels)
    for name in panels:
        if name not in PANELS:
            raise ValueError(f"panels has {name!r}, it must have some of {', '.join(PANELS)}")
        if not known[name]:
            needs = {"mask": "a mask", "predicted": "the Report of a mask"}
            raise ValueError(f"the panel {name!r} needs {needs.get(name, 'a mask, and q and k')}")
    visible = _visible(report) if report else mask.visible
    kept: Any = None if mask is None else _head(mask, batch, head)
    pictures: dict[str, Callable[[], Any]] = {
        "attention": lambda: (_heat(mass, visible), _scale(mass)),
        "mask": lambda: _of_mask(kept, _partial(mask, batch, head), visible),
        "dropped": lambda: (_heat(np.where(kept, 0.0, mass), visible), _scale(mass)),
        "predicted": lambda: _beside(kept, _head(report and report.predicted, batch, head),
                                     visible)}
    block = (report.block_q, report.block_k) if report else mask.block
    return _draw([(name, *pictures[name]()) for name in panels], block, ax,
                 _title(what, mass, batch, head), _bad(what, batch, head))


# ---- What is drawn ----


def _mass(mask: BlockMask, q: Any, k: Any, batch: int, head: int,
          options: Options) -> NDArray[np.float64]:
    """[Qb, Kb]: attention of one head between blocks."""
    q, k = on_host(q), on_host(k)
    layout = options.get("layout", DEFAULTS["layout"])
    shapes = [read(name, x, layout).shape for name, x in (("q", q), ("k", k))]
    nhd, heads, of = layout == "NHD", mask._mask.heads, mask._mask.batch
    if shapes[0][:2] != (of, heads) or shapes[1][0] != of or not shapes[1][1]:
        raise ValueError(f"q and k are [B, H, N, D] = {list(shapes[0])} and {list(shapes[1])}, the "
                         f"mask is of [B, H] = {[of, heads]}")
    kv_head = head * shapes[1][1] // heads

    def one(x: Any, h: int) -> Any:
        x = x[batch] if x.ndim == 4 else x
        return x[:, h:h + 1] if nhd else x[h:h + 1]

    own: Options = {**options, "block": mask.block, "is_causal": mask.is_causal}
    if own.get("k_bias") is not None:
        bias = on_host(own["k_bias"])
        own["k_bias"] = (bias[batch] if bias.ndim == 3 else bias)[kv_head:kv_head + 1]
    problem, settings = prepare(one(q, head), one(k, kv_head), one(k, kv_head), own)
    found = np.zeros(mask.shape[-2:])
    if (problem.c.q_len, problem.c.k_len) != (mask.q_len, mask.k_len):
        raise ValueError(f"q and k have {problem.c.q_len} and {problem.c.k_len} tokens, the mask "
                         f"is of {mask.q_len} and {mask.k_len}")
    ask(problem, settings, None, mass=found)
    return found


def _visible(report: Report) -> NDArray[np.bool_]:
    """[Qb, Kb]: which blocks causality lets somebody see."""
    return BlockMask.from_blocks(np.zeros(report.block_mass.shape[1:], bool), report.q_len,
                                 report.k_len, block=(report.block_q, report.block_k),
                                 is_causal=cast(Causal, report.causal)).visible


def _head(mask: Any, batch: int, head: int) -> NDArray[np.bool_]:
    """[Qb, Kb]: the blocks of one head that are kept."""
    return np.asarray(mask.blocks.reshape(mask._mask.batch, *mask.shape[-3:])[batch, head])


def _partial(mask: BlockMask, batch: int, head: int) -> NDArray[np.bool_]:
    """[Qb, Kb]: those that are attended in part."""
    found = np.zeros(mask.shape[-2:], bool)
    index = mask._partials()[0]
    found[tuple(index[(index[:, :2] == (batch, head)).all(1)][:, 2:].T)] = True
    return found


def _bad(what: Any, batch: int, head: int) -> NDArray[np.int64]:
    """The query blocks in which rows of o are wrong."""
    if not isinstance(what, Report) or what.ok:
        return np.empty(0, np.int64)
    blocks = what.bad_blocks
    return np.asarray(blocks[(blocks[:, :2] == (batch, head)).all(1), 2])


def _title(what: Any, mass: Any, batch: int, head: int) -> str:
    mask = what.given if isinstance(what, Report) else what
    words = [f"head {head}" + (f" of batch {batch}" if batch else "")]
    if mask is not None:
        counts = mask.head_counts[batch * mask._mask.heads + head]
        words.append(f"{counts.qk_done} of {counts.pairs} blocks, density {counts.density:.3f}")
        if mass is not None:
            kept = mass[_head(mask, batch, head)].sum() / max(mass.sum(), 1e-300)
            words.append(f"about {kept:.1%} of the attention")
    if isinstance(what, Report):
        own = what.per_head[batch * what.heads + head]
        words.append(f"rel. L1 {own.o.l1:.3g}, worst row {own.o.worst_row_l1:.3g}")
    return ", ".join(words)


# ---- Colours ----


def _decades(columns: int) -> int:
    """Those below 1 that the scale shows: two below what an even row pays to each block."""
    return 2 + math.ceil(math.log10(columns if columns > 1 else 10) - 1e-9)


def _scale(mass: NDArray[np.float64]) -> Any:
    """The norm and the colour map of attention."""
    from matplotlib import cm, colors
    norm = colors.LogNorm(10.0**-_decades(mass.shape[1]), 1.0, clip=True)
    return cm.ScalarMappable(norm, colors.LinearSegmentedColormap.from_list("rocket_r", HEAT))


def _rgb(colour: str) -> NDArray[np.float64]:
    return np.array([int(colour[n:n + 2], 16) / 255 for n in (1, 3, 5)])


def _heat(mass: NDArray[np.float64], visible: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[Qb, Kb, 3]: the colours of attention."""
    scale = _scale(mass)
    image = np.asarray(scale.cmap(scale.norm(np.nan_to_num(np.maximum(mass, 1e-300)))))[..., :3]
    image[~visible] = _rgb(INVISIBLE)
    image[np.isnan(mass)] = _rgb(NAN)
    return image


Legend = dict[str, str]  # colours by their words


def _image(legend: Legend, where: dict[str, NDArray[np.bool_]]) -> tuple[Any, Legend]:
    """[Qb, Kb, 3] from which cells each word is for, the later over the earlier, and the words that
    are on it."""
    image = np.ones((*next(iter(where.values())).shape, 3))
    for word, cells in where.items():
        image[cells] = _rgb(legend[word])
    shown = {word: colour for word, colour in legend.items()
             if (image == _rgb(colour)).all(-1).any()}
    return image, shown


def _of_mask(kept: Any, partial: NDArray[np.bool_],
             visible: NDArray[np.bool_]) -> tuple[Any, Legend]:
    return _image({"kept": KEPT, "in part": IN_PART, "skipped": SKIPPED, "not visible": INVISIBLE},
                  {"skipped": ~kept, "kept": kept, "in part": partial, "not visible": ~visible})


def _beside(kept: Any, predicted: NDArray[np.bool_],
            visible: NDArray[np.bool_]) -> tuple[Any, Legend]:
    return _image({"in both": KEPT, "missing": MISSING, "extra": EXTRA, "in neither": SKIPPED,
                   "not visible": INVISIBLE},
                  {"in neither": ~kept, "in both": kept & predicted, "missing": predicted & ~kept,
                   "extra": kept & ~predicted, "not visible": ~visible})


# ---- Drawing ----

TITLES = {"attention": "attention", "mask": "mask", "dropped": "attention that is dropped",
          "predicted": "beside the predicted mask", "wrong": " (\u25b6: wrong rows of o)"}


def _figure() -> Any:
    """A figure that notebooks show once, and not pyplot again."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Picture(Figure):  # type: ignore[misc]

        def _repr_png_(self) -> bytes:
            out = io.BytesIO()
            self.savefig(out, format="png", bbox_inches="tight")
            return out.getvalue()

    figure = Picture(layout="compressed")
    FigureCanvasAgg(figure)
    return figure


def _draw(panels: list[tuple[str, Any, Any]], block: tuple[int, int], ax: Any, title: str,
          bad: Any) -> Any:
    """bad: query blocks with rows above the bound."""
    if ax is None:
        figure = _figure()
        figure.set_size_inches(1 + 2.8 * max(1, len(panels)), 4.2)
        axes = list(figure.subplots(1, max(1, len(panels)), squeeze=False)[0])
        figure.get_layout_engine().set(h_pad=0.1)  # inches
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    else:
        axes = list(np.atleast_1d(ax).flat)
        figure = getattr(axes[0], "figure", None)
    if len(axes) != len(panels):
        raise ValueError(f"ax has {len(axes)} axes, it must have one for each of the {len(panels)} "
                         f"panels: {', '.join(name for name, _, _ in panels)}")
    wrong = TITLES["wrong"] if len(bad) else ""
    for own, (name, image, key) in zip(axes, panels):
        own.imshow(image, aspect=block[0] / block[1], interpolation="nearest")
        own.set_title(TITLES[name] + wrong * (own is axes[0]), fontsize=10, loc="left")
        own.set_xlabel("key block", fontsize=9)
        if own is axes[0]:
            own.set_ylabel("query block", fontsize=9)
            own.scatter(np.full(len(bad), -0.025), bad, marker=">", s=16, c=MISSING, clip_on=False,
                        transform=own.get_yaxis_transform())
        own.tick_params(labelsize=8, colors=EDGE)
        _explain(own, key)
    return figure


def _explain(ax: Any, key: Any) -> None:
    """What the colours mean, below the axes: a scale, or words."""
    from matplotlib import patches, ticker
    if not isinstance(key, dict):
        bar = ax.figure.colorbar(key, ax=ax, location="bottom", fraction=0.05, pad=0.03, aspect=30)
        bar.ax.tick_params(labelsize=8)
        bar.ax.xaxis.set_minor_locator(ticker.NullLocator())
        return
    boxes = [patches.Patch(facecolor=colour, edgecolor=EDGE, linewidth=0.5, label=word)
             for word, colour in key.items()]
    ax.legend(handles=boxes, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2, fontsize=8,
              frameon=False, borderaxespad=0, handlelength=1, handleheight=1)
