# SPDX-License-Identifier: Apache-2.0
"""items.py: the tables and figures of the paper: which folder here has them, what is measured in
their place, what needs more."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """folder: experiments/FOLDER/run.py. covers: names for --only, as in paper.csv. what: the
    paper's. ours: what it is measured on. says: what is to be seen. substitute: another model than
    the paper's. full: about the seconds of a full run, smoke: of a smoke run. needs: what --full
    makes first, of reproduce.SOURCES. figures: in paper_figs/."""
    folder: str
    covers: tuple
    what: str
    ours: str
    says: str
    substitute: bool = True
    full: int = 10
    smoke: int = 5
    needs: tuple = ()
    figures: tuple = ()


LM = "SmolLM2-135M in 4 bits"
VIDEO = "a video transformer of 2.8 M weights, trained here on one clip"

ITEMS = [
    Item(
        "attention_map", ("attention_map", ), "",
        f"nine heads of {LM}, 4096 tokens of text, one setting for all",
        "Attention of a real model, the mask that is predicted for it, and what lambda drops of "
        "what is left.",
        full=45, smoke=20, figures=("attention_map", )),
    Item(
        "table1", ("table1", "table2"), "Tables 1 and 2: end to end",
        f"{LM}: perplexity of five texts, needles, attention and the whole of a prefill on two "
        "cores",
        "The language rows. Speed is the paper's: operations of dense attention by the time that "
        "this one takes. A prefill is the whole model, the latency of Table 2. The model is sixty "
        "times smaller than the paper's, and "
        "the same bound on each head costs it more perplexity.", smoke=30, needs=("weights", "lm")),
    Item(
        "table3", ("table3", ), "Table 3: overhead of predicting the mask",
        "one head of 128 channels (B x H = 1 x 1), all cores of a CPU, not causal",
        "The paper does not say batch and heads; its times fit 4096 channels in all on an RTX "
        "4090. Overhead here is prediction, quantization and packing together; beside the slower "
        "dense attention of a CPU it weighs less.",
        False, 2200, 45, figures=("table3", )),
    Item(
        "fig10", ("fig10", ), "Fig 10: speed by sparsity",
        "one head of 128 channels (B x H = 1 x 1), 22272 tokens, all cores of a CPU",
        "Every speed is divided by that of dense attention by the same kernel, so that machines "
        "can be compared; prediction is included. Dense attention was measured beside each row; "
        "its time varies by 6 % to either "
        "side between rows, so a row can lie as far above the ideal, 1 / (1 - sparsity).", False,
        900, 45, figures=("fig10", )),
    Item(
        "table9", ("table4", "table5", "table9", "table10"),
        "Tables 4, 5, 9 and 10: token orders, and the self-similarity judge",
        f"{VIDEO}; patches of two clips",
        "Neighbours in a video are alike; an order that keeps them together makes blocks that a "
        "mean can stand for. The judge keeps blocks that it cannot. The camera of the model's clip "
        "stands still, so tokens of one place resemble each other through time; patches, with no "
        "model between, show what a moving camera does. Table 5 judges whole clips, which a tiny "
        "model does not make: the errors of attention stand for it.",
        full=600, smoke=15, needs=("clips", "video")),
    Item("table6", ("table6", ), "Table 6: the mask's share and lambda's",
         f"{LM}: nine heads of captures, and the whole model at 8192 tokens",
         "What the mask leaves out of both products, what lambda leaves out of P.V, and both.",
         full=450, needs=("weights", )),
    Item(
        "table7", ("table7", ), "Table 7: sparsity by length at a constant bound", LM,
        "Thresholds are found anew for every length at (l1, l2) = (0.08, 0.09). A head that stays "
        "dense has the error of int8 alone, once above that. At 8192 tokens the small model is "
        "sparser than the paper's at any length: these are its whole context, as 131072 are of the "
        "paper's, and its heads look near by.",
        full=600, needs=("weights", ), figures=("table7", )),
    Item(
        "tune", ("tuner", ), "Sec 3.6: thresholds for every head",
        f"nine heads of {LM}, tuned on one text and judged on another",
        "What the tuner finds at (l1, l2) = (0.08, 0.09), and what that costs on a text that it "
        "has not seen (the "
        "last two columns).", full=35, smoke=20),
    Item("fig2", ("fig2", ), "Fig 2: patterns of attention", f"heads of {LM} and of {VIDEO}",
         "Mean attention of blocks of 128 queries to blocks of 64 keys.", smoke=15,
         figures=("fig2", )),
    Item(
        "fig3", ("fig3", ), "Fig 3: the workflow", "the paper's toy, stage by stage",
        "Three query blocks and four key blocks made so that pooled attention is the paper's; the "
        "third of both are not self-similar. The second row of the mask differs from the picture "
        "in the paper: by Algorithm 1, line 5, "
        "K3 has no part in P, so K1 is what the row keeps beside it.", False, figures=("fig3", )),
    Item(
        "fig4", ("fig4", ), "Fig 4: patterns of q and k", LM,
        "128 tokens of single heads, from token 2048: a channel that is large in one token is so "
        "in its neighbours.",
        figures=("fig4", )),
    Item(
        "fig5", ("fig5", "table8"), "Fig 5 and Table 8: token orders in 1 x 6 x 6", "the same grid",
        "The colour is the block of four that a token falls into. Hilbert's order keeps blocks "
        "square.",
        False, figures=("fig5", )),
    Item("fig9", ("fig9", "fig11", "table11"), "Figs 9 and 11, Table 11: needles in a haystack",
         f"{LM}: four numbers hidden at each depth",
         "The share that is found, by depth and length.", smoke=30, needs=("weights", "lm"),
         figures=("fig9", )),
    Item(
        "fig14", ("fig14", "fig15", "fig16", "fig17"),
        "Figs 14 to 17: sparsity by layer, step, sample and head", VIDEO,
        "Over six layers, six of ten denoising steps, three samples and all heads, in Hilbert's "
        "order. The samples are nearly one clip, so their likeness says little; thresholds come "
        "from the first of them.",
        full=150, needs=("video", ), figures=("fig14", "fig15", "fig16", "fig17")),
    Item(
        "submass", ("submass", ), "Beyond the paper: a threshold on mass",
        f"{LM}: five texts that nothing was tuned on, in int8",
        "Not in the paper. What each way to choose blocks loses at equal density: TopCdf of the "
        "paper, which promises every row of blocks the same lost mass; a threshold on the mass of "
        "a block, by the same scores; and by means of cells of 8 tokens. Numbers of the model were "
        "found on two other texts of 4096 tokens, and hold at every length.",
        full=5, smoke=10, needs=("weights", "losses"), figures=("submass", )),
    Item(
        "frontier", ("frontier", ), "Beyond the paper: every method at the same density",
        f"eighteen heads of {LM}, and of {VIDEO}",
        "Not in the paper. Every method of methods/ on the same q, k and v, at the same density of "
        "token pairs: error in f32, the attention that is kept, what the choice takes. One value "
        "for all heads of an input. The figure's right side is what the language model loses, "
        "which the error of heads does not foretell.",
        full=2400, smoke=15, needs=("weights", "clips", "steps", "field"), figures=("frontier", )),
]

CAPTIONS = {  # of the figures
    "attention_map": "Attention of three heads of SmolLM2-135M over 4096 tokens (left), the blocks "
                     "that the mask keeps (middle), and those of which lambda drops P·V too, "
                     "wholly or in part (right).",
    "fig2": "Fig 2: mean attention of blocks of queries to blocks of keys, in heads of a language "
            "model and of a video model, on a logarithmic scale.",
    "fig3": "Fig 3: the workflow on a toy of three query blocks and four key blocks: pooled "
            "attention, what is predicted, the mask, and the share of P·V that is computed.",
    "fig4": "Fig 4: 128 tokens of q (above) and k (below) of single heads, channel by channel.",
    "fig5": "Fig 5: five orders of a grid of 1 x 6 x 6. The line joins tokens in their order, from "
            "the ring on; a colour and a number are a block of four. As there is one frame, row "
            "and time are the same order.",
    "table3": "Table 3: what prediction costs, in % of dense attention, by length; both axes "
              "logarithmic.",
    "fig9": "Figs 9 and 11: needles found of four, by depth in the text and length; hatched was "
            "not run.",
    "fig10": "Fig 10: speed over dense attention of the same kernel, by sparsity.",
    "table7": "Table 7: sparsity by length, at one bound on the error.",
    "fig14": "Fig 14: sparsity by layer: the mean (bar), the 10th to 90th percentile (line), the "
             "mean of all (dotted).",
    "fig15": "Fig 15: sparsity by denoising step: the mean (bar), the 10th to 90th percentile "
             "(line), the mean of all (dotted).",
    "fig16": "Fig 16: sparsity by sample: the mean (bar), the 10th to 90th percentile (line), the "
             "mean of all (dotted).",
    "fig17": "Fig 17: mean sparsity of each head, layer by layer.",
    "submass": "Loss of five texts together, against dense f32. Left and middle, by density at "
               "4096 tokens: the KL divergence (logarithmic), and the change of perplexity (linear "
               "up to 1 %). Right: the divergence by length, the numbers as found for half density "
               "at 4096.",
    "frontier": "Error of heads by density (left, middle), and the divergence of the model from "
                "dense f32 (right), all logarithmic. Black: chance, nearest keys, and those that "
                "know the attention; chance and knowledge are borders for whole blocks alone.",
}

ORDERS = ("build/venv/bin/python experiments/table9/run.py --captures FOLDER --params P.json -o "
          "out.csv")
LAYERS = ("build/venv/bin/python experiments/fig14/run.py --captures FOLDER --params P.json -o "
          "out.csv")
LM_PROGRAM = "build/release/experiments/lm/sparge-lm"
JUDGE = "the model, its data and the metric"

# What, the paper's number, and how a user with more than this project has fills the cell.
MISSING = [
    ("Table 1, Llama3.1-8B at 128K: perplexity, needles",
     "6.020, 90.9 % (dense 6.013, 90.7 %), 54 % sparse",
     f"{LM_PROGRAM} ppl MODEL TEXT --attention f32,P.json"),
    ("Table 1, Llama3.1-8B: LongBench, InfiniteBench", "39.058, 66.4 % (dense 38.682, 65.9 %)",
     JUDGE),
    ("Table 1, CogvideoX, Mochi, Open-Sora-Plan: CLIPSIM, VQA, FScore", "see Table 1 above", JUDGE),
    ("Table 1, Flux, Stable Diffusion 3.5: FID, CLIP, ImageReward", "see Table 1 above", JUDGE),
    ("Table 2: CogvideoX, Mochi, Llama3.1", "1.54x to 1.83x over the original",
     "the models, on an RTX 4090 and an L40"),
    ("Table 5: VQA and FScore without the judge, Mochi",
     "34.664, 44.722, 1.138 (with: 54.179, 67.219, 1.807)", JUDGE),
    ("Table 6, Llama3.1-8B at 128K", "51.2 % by the mask, 27.7 % by lambda, 54.0 % by both",
     "build/venv/bin/python experiments/table6/run.py --captures FOLDER --params P.json -o out.csv"
     ),
    ("Table 7, Llama3.1-8B, 8K to 128K", "6.8 to 54 % sparse",
     "build/venv/bin/python experiments/table7/run.py --captures FOLDER -o out.csv"),
    ("Tables 4, 9 and 10 on CogvideoX and Mochi", "26.5 and 39.2 % sparse in Hilbert's order",
     ORDERS),
    ("Table 11: needles at 16K to 28K, Llama3.1-8B", "86.3 % (dense 83.8 %), 36 % sparse",
     f"{LM_PROGRAM} needle MODEL TEXT --length 16384 --attention f32,P.json"),
    ("Fig 10 on an RTX 4090", "548 TOPS at half sparse, dense 302",
     "tests/gpu/on_gpu.sh on the machine in question"),
    ("Figs 14 to 17 on CogvideoX", "27 % sparse over layers, steps, samples and heads", LAYERS),
    ("MInference and FlexPrefill (Table 1, Table 11, Figs 9 and 10), SageAttention (Table 2, "
     "Fig 10)",
     "in the tables of the paper's numbers above", "those programs, and the machines of the paper"),
    ("Figs 1, 6, 7, 8, 12, 13: pictures and clips", "looked at", JUDGE),
]
